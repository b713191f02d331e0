"""Codings: how one array is written, to the bit.

A coding is a value, so a state's size and its file come from the same object: `bits` counts what
`pack` fills. `unpack` trusts nothing it reads: a payload that this coding cannot have written for
that shape is a ValueError, never a wrong array.

Everything is little-endian, and the first code takes the lowest bits of the first byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .part import Coding

_LITTLE_ENDIAN = {
    torch.float64: "<f8",
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.bfloat16: "<i2",  # numpy has no bfloat16: its bits travel as int16
    torch.int64: "<i8",
    torch.int32: "<i4",
    torch.int16: "<i2",
    torch.int8: "<i1",
    torch.uint8: "<u1",
    torch.bool: "<u1",
}
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Raw(Coding):
    """Plain little-endian numbers of one torch dtype.

    Size: numel · itemsize · 8 bits. `unpack` returns `dtype`. Data that already has this dtype is
    kept bit for bit, NaN included; other data must survive the conversion.

    Args:
        dtype: float64, float32, float16, bfloat16, int64, int32, int16, int8, uint8 or bool.

    Raises:
        ValueError: another dtype; a value that `dtype` cannot hold exactly; a payload of the wrong
            length, or one with a bool that is neither 0 nor 1.
    """

    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in _LITTLE_ENDIAN:
            raise ValueError(f"{self}: dtype must be one of {_names(_LITTLE_ENDIAN)}.")

    def bits(self, data: Tensor) -> int:
        return 8 * data.numel() * self.dtype.itemsize

    def pack(self, data: Tensor) -> bytes:
        if data.dtype not in _LITTLE_ENDIAN:
            raise ValueError(f"{self} writes {_names(_LITTLE_ENDIAN)}, got {data.dtype}.")
        data = data.detach().cpu()
        numbers = data.to(self.dtype)
        if data.dtype != self.dtype:
            lost = int((numbers.to(data.dtype) != data).sum())
            if lost:
                raise ValueError(
                    f"{self}: {lost} of {data.numel()} values are not exactly representable; they "
                    f"arrived as {data.dtype}. Round them first, or write them as {data.dtype}."
                )
        if self.dtype == torch.bfloat16:
            numbers = numbers.view(torch.int16)
        return numbers.numpy().astype(_LITTLE_ENDIAN[self.dtype]).tobytes()

    def unpack(self, payload: bytes, shape: torch.Size) -> Tensor:
        count = _numel(self, shape)
        _check_payload(self, payload, 8 * count * self.dtype.itemsize)
        stored = np.frombuffer(payload, _LITTLE_ENDIAN[self.dtype], count).reshape(shape)
        numbers = torch.from_numpy(stored.astype(stored.dtype.newbyteorder("=")))
        if self.dtype == torch.bool and bool((numbers > 1).any()):
            raise ValueError(f"{self}: damaged payload, a bool is neither 0 nor 1.")
        if self.dtype == torch.bfloat16:
            return numbers.view(torch.bfloat16)
        return numbers.to(self.dtype)


@dataclass(frozen=True)
class Fixed(Coding):
    """Integers in [0, 2**width), `width` bits each, one after the other.

    Size: numel · width bits. `unpack` returns uint8 for `width` <= 8, else int64.

    >>> Fixed(3).pack(torch.tensor([1, 2, 3]))  # 1 + 2 · 8 + 3 · 64 = 209 = 0xd1
    b'\\xd1\\x00'

    Args:
        width: 0 to 63. With 0 every code is 0 (a codebook of one entry) and nothing is stored.

    Raises:
        ValueError: `width` outside 0 to 63; data that is not integer or bool, is negative or does
            not fit; a payload of the wrong length or with padding bits set.
    """

    width: int

    def __post_init__(self) -> None:
        if not 0 <= self.width <= 63:
            raise ValueError(f"{self}: width must be from 0 to 63.")

    def bits(self, data: Tensor) -> int:
        return data.numel() * self.width

    def pack(self, data: Tensor) -> bytes:
        return _pack_codes(_codes(self, data, 2**self.width), self.width)

    def unpack(self, payload: bytes, shape: torch.Size) -> Tensor:
        count = _numel(self, shape)
        _check_payload(self, payload, count * self.width)
        codes = _unpack_codes(payload, count, self.width)
        return torch.from_numpy(codes.astype(np.uint8 if self.width <= 8 else np.int64)).view(shape)


@dataclass(frozen=True)
class Radix(Coding):
    """Integers in [0, base), as many to a byte as fit: the largest d with base**d <= 256.

    Size: 8 · ceil(numel / d) bits, so a ternary digit takes 1.6 bits where `Fixed(2)` takes 2.
    A byte is Σ_i digit_i · base**i. `unpack` returns uint8.

    >>> Radix(3).pack(torch.tensor([1, 2, 0, 0, 1]))  # 1 + 2 · 3 + 81
    b'X'

    Args:
        base: 2 to 256. Five digits to a byte for 3, two for 7 to 16, one from 17 on.

    Raises:
        ValueError: `base` outside 2 to 256; data that is not integer or bool, is negative or not
            below `base`; a payload of the wrong length or with impossible bytes.
    """

    base: int

    def __post_init__(self) -> None:
        if not 2 <= self.base <= 256:
            raise ValueError(f"{self}: base must be from 2 to 256.")

    @property
    def digits(self) -> int:
        """Digits to a byte."""
        return max(d for d in range(1, 9) if self.base**d <= 256)

    def bits(self, data: Tensor) -> int:
        return 8 * math.ceil(data.numel() / self.digits)

    def pack(self, data: Tensor) -> bytes:
        codes = _codes(self, data, self.base)
        padded = np.zeros((math.ceil(codes.size / self.digits), self.digits), np.uint8)
        padded.reshape(-1)[: codes.size] = codes
        powers = np.array([self.base**i for i in range(self.digits)], np.uint8)
        return (padded @ powers).tobytes()  # below base**digits <= 256: uint8 holds every sum

    def unpack(self, payload: bytes, shape: torch.Size) -> Tensor:
        count = _numel(self, shape)
        _check_payload(self, payload, 8 * math.ceil(count / self.digits))
        stored = np.frombuffer(payload, np.uint8).astype(np.uint16)  # 256 is a divisor
        if stored.size and int(stored.max()) >= self.base**self.digits:
            raise ValueError(
                f"{self}: damaged payload, {self.digits} digits are less than "
                f"{self.base**self.digits}, found a byte of {stored.max()}."
            )
        codes = np.empty((stored.size, self.digits), np.uint8)
        for i in range(self.digits):
            stored, codes[:, i] = stored // self.base, stored % self.base
        flat = codes.reshape(-1)
        if flat[count:].any():
            raise ValueError(f"{self}: damaged payload, the digits after the last one are not 0.")
        return torch.from_numpy(flat[:count].copy()).view(shape)


@dataclass(frozen=True)
class Support(Coding):
    """Sorted positions in [0, size): which k of `size` weights are kept. Shape (k,), int64.

    The cheapest of two ways, named by a first byte:

    * 0: a bitmap, `size` bits, bit p set if position p is kept;
    * b = 1 to 32: the gaps g_j = p_j − p_(j−1) − 1 (the number of weights skipped, with
      p_(−1) = −1, so the first position counts as well) in b bits each. The code 2**b − 1 is an
      escape, "skip 2**b − 1 more and go on", so  cost(b) = b · Σ_j (⌊g_j / (2**b − 1)⌋ + 1).

    Size: 8 + min(size, min_b cost(b)) bits, found without packing; an empty or a full support
    takes none. Ties go to the bitmap, then to the smaller b. Storing g_j instead of the difference
    g_j + 1, which is never 0, leaves no code unused. b = 1 is a bitmap that ends at the last kept
    position. `unpack` returns int64.

    >>> Support(100).bits(torch.tensor([3, 9]))  # gaps 3 and 5: 3 bits each, and the first byte
    14

    Args:
        size: number of positions to choose from, at least 0.

    Cost: O(k · log(largest gap)) time for `bits`, O(k + bits) for `pack` and `unpack`.

    Raises:
        ValueError: `size` < 0; data that is not an int64 vector, not strictly increasing or
            outside [0, size); a payload of the wrong length, of an unknown kind, or one that
            leads to other than k positions in [0, size).

    Source: gaps in a fixed width with fillers for the long ones are those of Han, Mao, Dally, Deep
    compression, ICLR 2016, arXiv:1510.00149; there a filler is a stored zero, here a code.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"{self}: size must be >= 0.")

    def bits(self, data: Tensor) -> int:
        gaps = self._gaps(data)
        if gaps.size in (0, self.size):
            return 0
        return 8 + self._cheapest(gaps)[0]

    def pack(self, data: Tensor) -> bytes:
        gaps = self._gaps(data)
        if gaps.size in (0, self.size):
            return b""
        _, width = self._cheapest(gaps)
        if width == 0:
            kept = np.zeros(self.size, np.bool_)
            kept[data.cpu().numpy()] = True
            return bytes([0]) + np.packbits(kept, bitorder="little").tobytes()
        escape = 2**width - 1
        ends = np.cumsum(gaps // escape + 1)
        codes = np.full(int(ends[-1]), escape)
        codes[ends - 1] = gaps % escape
        return bytes([width]) + _pack_codes(codes, width)

    def unpack(self, payload: bytes, shape: torch.Size) -> Tensor:
        kept = _numel(self, shape)
        if len(shape) != 1 or kept > self.size:
            raise ValueError(
                f"{self} holds a vector of at most {self.size} positions, asked for shape "
                f"{tuple(shape)}."
            )
        if kept in (0, self.size):
            _check_payload(self, payload, 0)
            return torch.arange(kept)
        if not payload:
            raise ValueError(f"{self}: the payload of {kept} positions is empty.")
        width = payload[0]
        if width > 32:
            raise ValueError(
                f"{self}: damaged payload, it starts with {width}; 0 is a bitmap, 1 to 32 gaps."
            )
        positions = self._unpack_gaps(payload, kept) if width else self._unpack_bitmap(payload)
        if positions.size != kept or int(positions[-1]) >= self.size:
            raise ValueError(
                f"{self}: damaged payload, {kept} positions below {self.size} were stored, "
                f"found {positions.size} up to {positions.max(initial=-1)}."
            )
        return torch.from_numpy(positions)

    def _gaps(self, data: Tensor) -> npt.NDArray[np.int64]:
        """Weights skipped before each position; refuses what is not a support."""
        if data.dtype != torch.int64 or data.dim() != 1:
            raise ValueError(
                f"{self} writes a vector of int64, got {data.dtype} of shape {tuple(data.shape)}."
            )
        positions = data.detach().cpu().numpy()
        if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < self.size:
            raise ValueError(
                f"{self}: positions must be from 0 to {self.size - 1}, got {positions.min()} to "
                f"{positions.max()}."
            )
        gaps: npt.NDArray[np.int64] = np.diff(positions, prepend=-1) - 1
        if positions.size and int(gaps.min()) < 0:
            at = int(gaps.argmin())
            raise ValueError(
                f"{self}: positions must be strictly increasing, got {positions[at - 1]} before "
                f"{positions[at]}. Sort them and drop repeats."
            )
        return gaps

    def _cheapest(self, gaps: npt.NDArray[np.int64]) -> tuple[int, int]:
        """(bits, first byte) of the cheapest way to write at least one gap."""
        widest = min(32, (int(gaps.max()) + 1).bit_length())  # needs no escape: wider costs more
        ways = [(self.size, 0)]
        for width in range(1, widest + 1):
            codes = gaps.size + int((gaps // (2**width - 1)).sum())
            ways.append((codes * width, width))
        return min(ways)

    def _unpack_bitmap(self, payload: bytes) -> npt.NDArray[np.int64]:
        _check_payload(self, payload, 8 + self.size)
        stored = np.frombuffer(payload, np.uint8, offset=1)
        kept = np.unpackbits(stored, count=self.size, bitorder="little")
        return np.flatnonzero(kept).astype(np.int64)

    def _unpack_gaps(self, payload: bytes, kept: int) -> npt.NDArray[np.int64]:
        width, body = payload[0], payload[1:]
        codes = _unpack_codes(body, 8 * len(body) // width, width).astype(np.int64)
        ends = np.flatnonzero(codes != 2**width - 1)[:kept]
        if ends.size < kept:
            raise ValueError(
                f"{self}: damaged payload, {len(payload)} bytes hold {ends.size} of {kept} "
                "positions."
            )
        last = int(ends[-1]) + 1
        _check_payload(self, payload, 8 + last * width)
        skipped: npt.NDArray[np.int64] = np.cumsum(codes[:last])[ends]
        return skipped + np.arange(kept, dtype=np.int64)


def _pack_codes(codes: npt.NDArray[Any], width: int) -> bytes:
    """Codes below 2**width, `width` bits each, padded with zeros to a byte."""
    size = _code_bytes(width)
    octets = codes.astype(f"<u{size}").view(np.uint8).reshape(-1, size)
    bits = np.unpackbits(octets, axis=1, count=width, bitorder="little")  # (codes, width)
    return np.packbits(bits, bitorder="little").tobytes()


def _unpack_codes(payload: bytes, count: int, width: int) -> npt.NDArray[Any]:
    """The first `count` codes of `width` bits; the payload is known to hold them."""
    stored = np.frombuffer(payload, np.uint8)
    bits = np.unpackbits(stored, count=count * width, bitorder="little").reshape(count, width)
    octets = np.zeros((count, _code_bytes(width)), np.uint8)
    octets[:, : math.ceil(width / 8)] = np.packbits(bits, axis=1, bitorder="little")
    return octets.view(f"<u{octets.shape[1]}")[:, 0]


def _code_bytes(width: int) -> int:
    """Bytes of the smallest unsigned integer that holds `width` bits."""
    return next(size for size in (1, 2, 4, 8) if width <= 8 * size)


def _codes(coding: Coding, data: Tensor, limit: int) -> npt.NDArray[Any]:
    """`data` as a flat array; refuses what is not an integer in [0, limit)."""
    if data.dtype not in _INTEGERS:
        raise ValueError(f"{coding} writes {_names(_INTEGERS)}, got {data.dtype}.")
    codes = data.detach().cpu().numpy().reshape(-1)
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < limit:
        raise ValueError(
            f"{coding} writes integers from 0 to {limit - 1}, got {codes.min()} to {codes.max()}."
        )
    return codes


def _numel(coding: Coding, shape: torch.Size) -> int:
    """Entries of an array of this shape; refuses a negative length."""
    if any(length < 0 for length in shape):
        raise ValueError(f"{coding}: {tuple(shape)} is not a shape.")
    return math.prod(shape)


def _check_payload(coding: Coding, payload: bytes, bits: int) -> None:
    """Refuse a payload that is not `bits` long or whose padding is not zero."""
    if len(payload) != math.ceil(bits / 8):
        raise ValueError(
            f"{coding}: the payload must be {math.ceil(bits / 8)} bytes long, got {len(payload)}."
        )
    if bits % 8 and payload[-1] >> bits % 8:
        raise ValueError(f"{coding}: damaged payload, the bits after the last code are not 0.")


def _names(dtypes: Any) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
