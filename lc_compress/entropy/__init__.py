"""Entropy coding: codes, floats and supports in close to as many bits as they carry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..bits import code_bytes, numel
from ..coding import Fixed, Radix, Raw, Support, code_array
from ..part import Coding
from .numbers import PIECE, pack_numbers, unpack_numbers
from .positions import pack_positions, unpack_positions
from .rans import Ints


@dataclass(frozen=True)
class Entropy(Coding):
    """The data of another coding, as symbols of unequal frequency in close to their entropy.

    An array whose inner payload takes no bits (no entries, `Fixed(0)`, an empty or full support)
    takes none here either. Otherwise a first byte says how it is written, in the way that takes the
    fewest bits:

    * 0: as the inner coding writes it. So no array takes more than 8 bits too many.
    * Numbers, first byte 1 + r: their upper bits as symbols, their lower r bits as they are. The
      numbers are the codes of `Fixed` and `Radix`; of `Raw` the bits of each entry as an unsigned
      integer, for floats with the sign moved from the highest to the lowest bit, so that symbols
      are exponents, perhaps with some of the mantissa. There follow: the least symbol, and the
      number A of symbols minus 1, in base 128; a table of frequencies (`frequencies`); the lower
      bits as `Fixed(r)` writes them; the symbols minus the least one (`rans`).
    * Positions, first byte 1 or 2: gaps as for `Support`, of the kept or of the missing positions,
      whichever are fewer (the missing where 2k > size; k is the number of those written from here
      on). The model is geometric, as if each position were written with probability k / size
      independently of the others; it follows from shape and size and takes no space. With
      r = max(0, ⌊log2(size / k)⌋ − 2) the symbols are min(⌊gap / 2**r⌋, 63). After a 2 there
      follow, in base 128, the number of symbols that are 63, and ⌊gap / 2**r⌋ − 63 for each of
      them; a 1 says that there are none. Then the lower r bits of all gaps as `Fixed(r)` writes
      them, and the symbols. Their frequencies are `rans.quantized` of the weights
      max(1, s_i − s_(i+1)) for i < 63 and max(1, s_63), where s_0 = 2**40,
      s_(i+1) = ⌊s_i q / 2**62⌋, and q is ⌊(size − k) 2**62 / size⌋, r times replaced by
      ⌊q² / 2**62⌋.

    Base 128: 7 bits to a byte, the lowest first; all bytes but the last have 128 added.

    Size: found by packing. The entropy meant is that of the counts, independent of the order.

    >>> Entropy(Fixed(8)).bits(torch.tensor([3, 4, 3, 3] * 250))  # the entropy is 811
    872

    Args:
        inner: a `Raw`, `Fixed`, `Radix` or `Support`.

    Cost: about 0.4 µs per symbol to pack or to unpack below 2**17 symbols; from there on some 0.1 s
    and, for millions, 35 ns per symbol.

    Raises:
        ValueError: another inner coding; data that it refuses; a payload that this coding cannot
            have written.
    """

    inner: Coding

    def __post_init__(self) -> None:
        if type(self.inner) not in (Raw, Fixed, Radix, Support):
            raise ValueError(f"{self}: the inner coding must be Raw, Fixed, Radix or Support.")

    def bits(self, data: Tensor) -> int:
        plain = self.inner.bits(data)
        coded = self._coded(data, plain)
        return (8 if plain else 0) + plain if coded is None else 8 * len(coded)

    def pack(self, data: Tensor) -> bytes:
        plain = self.inner.bits(data)
        coded = self._coded(data, plain)
        if coded is not None:
            return coded
        return (b"\0" if plain else b"") + self.inner.pack(data)

    def unpack(self, payload: bytes, shape: torch.Size) -> Tensor:
        count = numel(self, shape)
        if not payload or (payload[0] == 0 and len(payload) > 1):  # nothing, or the inner coding's
            return self.inner.unpack(payload[1:], shape)
        if isinstance(self.inner, Support):
            size = self.inner.size
            if len(shape) != 1 or not 0 < count < size:
                raise ValueError(
                    f"{self}: damaged payload, {len(payload)} bytes for positions of shape "
                    f"{tuple(shape)}."
                )
            try:
                return torch.from_numpy(unpack_positions(payload, count, size))
            except ValueError as damage:
                raise ValueError(f"{self}: damaged payload, {damage}") from damage
        if count == 0:
            raise ValueError(f"{self}: damaged payload, {len(payload)} bytes for no entry.")
        try:
            numbers = unpack_numbers(payload, count, self._width)
        except ValueError as damage:
            raise ValueError(f"{self}: damaged payload, {damage}") from damage
        return self._array(numbers, shape)

    def _coded(self, data: Tensor, plain: int) -> bytes | None:
        """The payload of another way than the inner one, where it takes fewer bits."""
        if plain == 0:
            return None
        if isinstance(self.inner, Support):
            coded: bytes | None = pack_positions(self.inner.gaps(data), self.inner.size)
        else:
            coded = pack_numbers(self._numbers(data), self._width, 8 + plain)
        return coded if coded is not None and 8 * len(coded) < 8 + plain else None

    @property
    def _width(self) -> int:
        """Bits of a number."""
        if isinstance(self.inner, Raw):
            return 8 * self.inner.dtype.itemsize
        if isinstance(self.inner, Fixed):
            return self.inner.width
        assert isinstance(self.inner, Radix)
        return (self.inner.base - 1).bit_length()

    def _numbers(self, data: Tensor) -> Ints:
        """The entries as unsigned integers (n,)."""
        dtype = f"u{code_bytes(self._width)}"
        if not isinstance(self.inner, Raw):
            limit = self.inner.base if isinstance(self.inner, Radix) else 1 << self._width
            return code_array(self.inner, data, limit).astype(dtype, copy=False)
        bits: Ints = np.frombuffer(self.inner.pack(data), f"<{dtype}").astype(dtype, copy=False)
        if not self.inner.dtype.is_floating_point:
            return bits
        one, sign = bits.dtype.type(1), bits.dtype.type(self._width - 1)
        turned: Ints = bits << one
        for at in range(0, bits.size, PIECE):
            turned[at : at + PIECE] |= bits[at : at + PIECE] >> sign
        return turned

    def _array(self, numbers: Ints, shape: torch.Size) -> Tensor:
        """The entries that `_numbers` turned into integers."""
        if isinstance(self.inner, Raw):
            if self.inner.dtype.is_floating_point:
                one, sign = numbers.dtype.type(1), numbers.dtype.type(self._width - 1)
                numbers = (numbers >> one) | (numbers << sign)
            return self.inner.unpack(numbers.astype(f"<{numbers.dtype.str[1:]}").tobytes(), shape)
        if isinstance(self.inner, Radix) and int(numbers.max()) >= self.inner.base:
            raise ValueError(
                f"{self}: damaged payload, found a code of {numbers.max()}, not below "
                f"{self.inner.base}."
            )
        dtype = np.uint8 if self._width <= 8 else np.int64
        return torch.from_numpy(numbers.astype(dtype, copy=False)).view(shape)
