"""Integers of a fixed width in bits, one after the other, little-endian: packed and unpacked fast.

Codes of at most 8 bits travel eight at a time in one 64-bit word, eight bytes on one side and
8 · width bits on the other. Three steps of shift and mask turn one into the other: they close
(or open) the gaps between the two halves of 8, of 4 and of 2 codes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .part import Coding

Codes = npt.NDArray[Any]

_WORDS = 1 << 14  # at a time: 128 kB, which stay in the cache
_BYTES = 1 << 15  # looked up at a time
# numbers of so many bytes, as which rows of a table are copied
_WIDE = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16", 32: "V32"}


def pack_codes(codes: Codes, width: int) -> bytes:
    """Codes (n,) below 2**width, `width` bits each, padded with zeros to a byte."""
    if width == 0 or codes.size == 0:
        return b""
    if width == 1:
        return np.packbits(codes.astype(np.bool_, copy=False), bitorder="little").tobytes()
    if width in (8, 16, 32):
        return codes.astype(f"<u{width // 8}", copy=False).tobytes()
    if width < 8:
        return _pack_narrow(codes, width)
    return b"".join(
        _pack_wide(codes[at : at + _WORDS], width) for at in range(0, codes.size, _WORDS)
    )


def unpack_codes(payload: bytes | memoryview, count: int, width: int) -> Codes:
    """The first `count` codes of `width` bits, (count,), in the smallest unsigned integer that
    holds them; the payload is known to hold that many. The caller owns the memory.
    """
    if width == 0 or count == 0:
        return np.zeros(count, f"u{code_bytes(width)}")
    stored = np.frombuffer(payload, np.uint8)
    if width == 1:
        return np.unpackbits(stored, count=count, bitorder="little")
    if width in (8, 16, 32):
        numbers = np.frombuffer(payload, f"<u{width // 8}", count)
        return numbers.astype(numbers.dtype.newbyteorder("="))
    if width in (2, 4):
        opened = np.empty(8 // width * -(-count * width // 8), np.uint8)
        look_up(_codes(width), stored[: opened.size * width // 8], opened.reshape(-1, 8 // width))
        return opened[:count]
    if width < 8:
        return _unpack_narrow(stored, count, width)
    if width <= 57:
        return _unpack_wide(stored, count, width)
    bits = np.unpackbits(stored, count=count * width, bitorder="little").reshape(count, width)
    return np.packbits(bits, axis=1, bitorder="little").view("<u8")[:, 0].astype(np.uint64)


def look_up(table: Codes, stored: Codes, result: Codes) -> None:
    """Write to `result` (n, m) the row of `table` (256, m) for each byte (n,).

    NumPy copies rows of 1, 2, 4, 8, 16 or 32 bytes several times as fast as others: a row is cut
    into such pieces.
    """
    size, at, pieces = table.itemsize, 0, []
    for bytes_, kind in reversed(_WIDE.items()):
        while bytes_ >= size and at + bytes_ // size <= table.shape[1]:
            stop = at + bytes_ // size
            column = np.ascontiguousarray(table[:, at:stop]).view(kind)[:, 0]
            pieces.append((at, stop, column, kind))
            at = stop
    for start in range(0, len(stored), _BYTES):
        index = stored[start : start + _BYTES].astype(np.intp)
        rows = result[start : start + _BYTES]
        for first, last, column, kind in pieces:
            target = rows[:, first:last].view(kind)[:, 0]
            if len(pieces) == 1:
                np.take(column, index, out=target, mode="clip")  # "raise" would copy it first
            else:
                target[...] = column.take(index, mode="clip")


@lru_cache(maxsize=2)
def _codes(width: int) -> Codes:
    """(256, 8 / width): the codes of every byte."""
    codes: Codes = np.arange(256)[:, None] >> np.arange(0, 8, width) & 2**width - 1
    return codes.astype(np.uint8)


def code_bytes(width: int) -> int:
    """Bytes of the smallest unsigned integer that holds `width` bits."""
    return next(size for size in (1, 2, 4, 8) if width <= 8 * size)


def _steps(width: int) -> list[tuple[int, np.uint64, np.uint64]]:
    """For halves of 8, 4 and 2 codes: by how much the upper one moves, and where the two lie in
    the packed word.
    """
    steps = []
    for codes in (4, 2, 1):  # codes in a half; its room in the open word is 8 · codes bits
        low = (1 << codes * width) - 1
        places = range(0, 64, 16 * codes)
        lower = sum(low << place for place in places)
        steps.append((codes * (8 - width), np.uint64(lower), np.uint64(lower << codes * width)))
    return steps


def _pack_wide(codes: Codes, width: int) -> bytes:
    """Any width; a byte of memory for each bit."""
    size = code_bytes(width)
    octets = codes.astype(f"<u{size}").view(np.uint8).reshape(-1, size)
    bits = np.unpackbits(octets, axis=1, count=width, bitorder="little")  # (codes, width)
    return np.packbits(bits, bitorder="little").tobytes()


def _pack_narrow(codes: Codes, width: int) -> bytes:
    words = -(-codes.size // 8)
    padded = codes.astype(np.uint8, copy=False)
    if codes.size % 8:
        padded = np.concatenate([padded, np.zeros(-codes.size % 8, np.uint8)])
    opened = np.ascontiguousarray(padded).view("<u8")
    packed = np.empty((words, width), np.uint8)
    for start in range(0, words, _WORDS):
        x = opened[start : start + _WORDS].astype(np.uint64)
        upper = np.empty_like(x)
        for shift, low, high in reversed(_steps(width)):
            np.right_shift(x, np.uint64(shift), out=upper)
            upper &= high
            x &= low
            x |= upper
        if width in (2, 4):  # a number of its own, where rows of bytes are copied one by one
            packed[start : start + _WORDS] = (
                x.astype(f"<u{width}").view(np.uint8).reshape(-1, width)
            )
        else:
            octets = x.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)
            packed[start : start + _WORDS] = octets[:, :width]
    return packed.tobytes()[: -(-codes.size * width // 8)]


def _unpack_narrow(stored: Codes, count: int, width: int) -> Codes:
    words = -(-count // 8)
    padded = np.zeros(words * width + 8, np.uint8)  # the last word reads beyond its codes
    used = min(stored.size, words * width)
    padded[:used] = stored[:used]
    packed = np.ndarray((words,), "<u8", padded.data, strides=(width,))  # overlapping, unaligned
    opened = np.empty(words, "<u8")
    for start in range(0, words, _WORDS):
        x = packed[start : start + _WORDS].astype(np.uint64)
        x &= np.uint64((1 << 8 * width) - 1)
        upper = np.empty_like(x)
        for shift, low, high in _steps(width):
            np.bitwise_and(x, high, out=upper)
            upper <<= np.uint64(shift)
            x &= low
            x |= upper
        opened[start : start + _WORDS] = x
    return opened.view(np.uint8)[:count]


def _unpack_wide(stored: Codes, count: int, width: int) -> Codes:
    """Code j of each eight starts at bit j · width of their `width` bytes."""
    groups = -(-count // 8)
    padded = np.zeros(groups * width + 8, np.uint8)
    used = min(stored.size, groups * width)
    padded[:used] = stored[:used]
    codes = np.empty((groups, 8), f"u{code_bytes(width)}")
    mask = np.uint64((1 << width) - 1)
    for start in range(0, groups, _WORDS // 8):
        stop = min(groups, start + _WORDS // 8)
        for j in range(8):
            byte, bit = divmod(j * width, 8)
            at = start * width + byte
            x = np.ndarray((stop - start,), "<u8", padded.data, at, (width,)).astype(np.uint64)
            x >>= np.uint64(bit)
            x &= mask
            codes[start:stop, j] = x
    return codes.reshape(-1)[:count]


def below(limit: int, width: int, stored: Codes) -> bool:
    """Whether all codes of 2 or 4 bits in the bytes (n,), uint8, are below `limit`, 1 … 2**width.

    Adding 2**width − limit to every other code carries into the bit above it where it is not.
    """
    words = np.zeros(_WORDS, np.uint64)
    codes = range(0, 64, 2 * width)
    lanes, carried = (np.uint64(sum(x << at for at in codes)) for x in (2**width - 1, 2**width))
    missing = np.uint64(sum((2**width - limit) << at for at in codes))
    for start in range(0, len(stored), 8 * _WORDS):
        piece = stored[start : start + 8 * _WORDS]
        words[-1 - len(piece) // 8 :] = 0  # what the last bytes do not fill
        words.view(np.uint8)[: len(piece)] = piece
        lower = words & lanes
        upper = words >> np.uint64(width)
        upper &= lanes
        lower += missing
        upper += missing
        lower |= upper
        lower &= carried
        if lower.any():
            return False
    return True


def numel(coding: Coding, shape: torch.Size) -> int:
    """Entries of an array of this shape; refuses a negative length."""
    if any(length < 0 for length in shape):
        raise ValueError(f"{coding}: {tuple(shape)} is not a shape.")
    return math.prod(shape)


def check_payload(coding: Coding, payload: bytes | memoryview, bits: int) -> None:
    """Refuse a payload that is not `bits` long or whose padding is not zero."""
    if len(payload) != -(-bits // 8):
        raise ValueError(
            f"{coding}: the payload must be {-(-bits // 8)} bytes long, got {len(payload)}."
        )
    if bits % 8 and payload[-1] >> bits % 8:
        raise ValueError(f"{coding}: damaged payload, the bits after the last code are not 0.")
