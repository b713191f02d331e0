"""Codings: how one array is written, to the bit.

A coding is a value, so a state's size and its file come from the same object: `bits` counts what
`pack` fills. `unpack` trusts nothing it reads: a payload that this coding cannot have written for
that shape is a ValueError, never a wrong array.

Everything is little-endian, and the first code takes the lowest bits of the first byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .bits import check_payload, look_up, numel, pack_codes, unpack_codes
from .part import Coding
from .support import Support

__all__ = ["Fixed", "Radix", "Raw", "Support"]

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
        return numbers.numpy().astype(_LITTLE_ENDIAN[self.dtype], copy=False).tobytes()

    def unpack(self, payload: bytes, shape: torch.Size) -> Tensor:
        count = numel(self, shape)
        check_payload(self, payload, 8 * count * self.dtype.itemsize)
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
        return pack_codes(code_array(self, data, 2**self.width), self.width)

    def unpack(self, payload: bytes, shape: torch.Size) -> Tensor:
        count = numel(self, shape)
        check_payload(self, payload, count * self.width)
        codes = unpack_codes(payload, count, self.width)
        dtype = np.uint8 if self.width <= 8 else np.int64
        return torch.from_numpy(codes.astype(dtype, copy=False)).view(shape)


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
        return 8 * self._octets(data.numel())

    def pack(self, data: Tensor) -> bytes:
        codes = code_array(self, data, self.base)
        digits, octets = self.digits, self._octets(codes.size)
        padded = codes.astype(np.uint8, copy=False)
        if codes.size < octets * digits:
            padded = np.concatenate([padded, np.zeros(octets * digits - codes.size, np.uint8)])
        rows = padded.reshape(octets, digits)
        packed = rows[:, digits - 1].copy()
        for i in range(digits - 2, -1, -1):  # below base**digits <= 256: uint8 holds every sum
            packed *= np.uint8(self.base % 256)
            packed += rows[:, i]
        return packed.tobytes()

    def unpack(self, payload: bytes, shape: torch.Size) -> Tensor:
        count = numel(self, shape)
        stored = self.checked(payload, count)
        flat = np.empty((stored.size, self.digits), np.uint8)
        look_up(_digits(self.base, self.digits), stored, flat)
        return torch.from_numpy(flat.reshape(-1)[:count]).view(shape)

    def checked(self, payload: bytes | memoryview, count: int) -> npt.NDArray[np.uint8]:
        """The bytes, if this coding can have written them for so many digits."""
        check_payload(self, payload, 8 * self._octets(count))
        stored = np.frombuffer(payload, np.uint8)
        if stored.size and int(stored.max()) >= self.base**self.digits:
            raise ValueError(
                f"{self}: damaged payload, {self.digits} digits are less than "
                f"{self.base**self.digits}, found a byte of {stored.max()}."
            )
        if count % self.digits and stored[-1] >= self.base ** (count % self.digits):
            raise ValueError(f"{self}: damaged payload, the digits after the last one are not 0.")
        return stored

    def _octets(self, count: int) -> int:
        return -(-count // self.digits)


@lru_cache(maxsize=8)
def _digits(base: int, digits: int) -> npt.NDArray[np.uint8]:
    """(256, digits): the digits of every byte."""
    powers = base ** np.arange(digits)
    return (np.arange(256)[:, None] // powers % base).astype(np.uint8)


def code_array(coding: Coding, data: Tensor, limit: int) -> npt.NDArray[Any]:
    """`data` as a flat array; refuses what is not an integer in [0, limit)."""
    if data.dtype not in _INTEGERS:
        raise ValueError(f"{coding} writes {_names(_INTEGERS)}, got {data.dtype}.")
    codes = data.detach().cpu().numpy().reshape(-1)
    if data.dtype == torch.bool and limit > 1:
        return codes.view(np.uint8)
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < limit:
        raise ValueError(
            f"{coding} writes integers from 0 to {limit - 1}, got {codes.min()} to {codes.max()}."
        )
    return codes


def _names(dtypes: Any) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
