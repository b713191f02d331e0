"""A short table of frequencies: how often each of A symbols occurs, in a few bits per symbol.

A table is a byte a + 16 b and A codes of b bits, written as `Fixed(b)` writes them. Code 0 says
that a symbol does not occur; code 1 + 2**a e + f, with 0 <= f < 2**a, that its weight is
(2**a + f) 2**e: a small floating-point number with a bits of mantissa. b = 0 says that all weights
are 1. a is at most 10 and e at most 23. The frequencies are `rans.quantized(weights)`.

Coding with frequencies that are off costs bits only in second order: an array of few symbols gets a
coarse table, one of many a fine one.
"""

from __future__ import annotations

import math

import numpy as np

from ..bits import pack_codes, unpack_codes
from .rans import TOTAL, Ints, quantized

SYMBOLS = 1 << 12  # at most, so that a table stays small beside 2**14
_MANTISSA = 10  # bits, at most
_OCTAVES = 24  # at most: e is below


def fitted(counts: Ints) -> tuple[bytes, Ints, float]:
    """The table that codes symbols of these counts (A,), A from 1 to 4096, in the fewest bits,
    itself included; the frequencies it stands for; the bits.
    """
    total = int(counts.sum())
    present = counts[counts > 0]
    octaves = math.log2(int(present.max()) / int(present.min()))
    best: tuple[float, int, int, Ints, Ints] | None = None
    for mantissa, width in [(0, 0), *_precisions(octaves, total)]:
        codes = _codes(counts, mantissa, width)
        frequencies = quantized(_weights(codes, mantissa, width))
        used = np.maximum(frequencies, 1)  # what does not occur does not count
        cost = 8 * _length(counts.size, width) + float((counts * np.log2(TOTAL / used)).sum())
        if best is None or cost < best[0]:
            best = cost, mantissa, width, codes, frequencies
    assert best is not None
    cost, mantissa, width, codes, frequencies = best
    return bytes([mantissa | width << 4]) + pack_codes(codes, width), frequencies, cost


def read(payload: bytes, symbols: int) -> tuple[Ints, int]:
    """Frequencies (A,) of the table that a payload starts with, and the table's length in bytes.

    Raises:
        ValueError: there is no such table.
    """
    if not payload:
        raise ValueError("the table of frequencies is missing.")
    mantissa, width = payload[0] & 15, payload[0] >> 4
    length = _length(symbols, width)
    if mantissa > _MANTISSA or (width and 2**width - 2 >> mantissa >= _OCTAVES):
        raise ValueError(f"{payload[0]} names no table of frequencies.")
    if len(payload) < length:
        raise ValueError(f"{len(payload)} bytes hold no table of {length}.")
    codes = unpack_codes(payload[1:length], symbols, width).astype(np.int64)
    weights = _weights(codes, mantissa, width)
    if not weights.any():
        raise ValueError("no symbol of the table of frequencies occurs.")
    return quantized(weights), length


def _length(symbols: int, width: int) -> int:
    """Bytes of a table."""
    return 1 + -(-symbols * width // 8)


def _precisions(octaves: float, total: int) -> list[tuple[int, int]]:
    """Mantissa and width of tables worth a try: as wide as the counts ask for, or a bit less.

    A count n is only as good as √n, so half its bits of mantissa are enough.
    """
    pairs = []
    for mantissa in range(min(_MANTISSA, total.bit_length() // 2 + 1) + 1):
        need = min((octaves + 1) * 2**mantissa + 1, _OCTAVES * 2**mantissa)
        most = math.floor(math.log2(need)) + 1
        for width in (most, most - 1):
            if 1 <= width <= 15 and 2**width - 2 >> mantissa < _OCTAVES:
                pairs.append((mantissa, width))
    return pairs


def _codes(counts: Ints, mantissa: int, width: int) -> Ints:
    """The nearest codes, with the most frequent symbol at the largest one."""
    if width == 0:
        return np.zeros(counts.size, np.int64)
    largest = int(_weights(np.array([2**width - 1]), mantissa, width)[0])
    wanted = np.maximum(counts * (largest / int(counts.max())), float(1 << mantissa))
    exponent = np.floor(np.log2(wanted)).astype(np.int64) - mantissa
    fraction = np.rint(wanted / 2.0**exponent).astype(np.int64) - (1 << mantissa)
    codes: Ints = np.minimum(1 + (exponent << mantissa) + fraction, 2**width - 1)
    return np.where(counts > 0, codes, 0)


def _weights(codes: Ints, mantissa: int, width: int) -> Ints:
    if width == 0:
        return np.ones(codes.size, np.int64)
    exponent, fraction = codes - 1 >> mantissa, codes - 1 & (1 << mantissa) - 1
    return np.where(codes > 0, (1 << mantissa) + fraction << np.maximum(exponent, 0), 0)
