"""Positions as gaps under a geometric model that shape and size determine."""

from __future__ import annotations

import numpy as np

from ..bits import pack_codes
from . import rans
from .numbers import base128, read_base128, read_lower
from .rans import Ints

_BUCKETS = 64  # symbols; the last one is an escape


def pack_positions(gaps: Ints, size: int) -> bytes:
    """k positions below `size`, 0 < k < size, given by their gaps (k,), int64."""
    if 2 * gaps.size > size:
        gaps = _complement(gaps, size)
    r, fitted = _model(gaps.size, size)
    upper = gaps >> r
    escaped = upper[upper >= _BUCKETS - 1] - (_BUCKETS - 1)
    head = bytes([2]) + base128(escaped.size) if escaped.size else bytes([1])
    head += b"".join(base128(x) for x in escaped.tolist())
    symbols = np.minimum(upper, _BUCKETS - 1)
    return head + pack_codes(gaps & (1 << r) - 1, r) + rans.encode(symbols, fitted)


def unpack_positions(payload: bytes, kept: int, size: int) -> Ints:
    """The positions (kept,), 0 < kept < size, that `pack_positions` wrote.

    Raises:
        ValueError: a payload that it has not written for that many positions below `size`.
    """
    k = min(kept, size - kept)
    r, fitted = _model(k, size)
    if payload[0] not in (1, 2):
        raise ValueError(f"it starts with {payload[0]}, not 1 or 2.")
    escaped, at = [], 1
    if payload[0] == 2:
        escapes, at = read_base128(payload, 1)
        if not 0 < escapes <= len(payload):
            raise ValueError(f"{escapes} long gaps do not fit {len(payload)} bytes.")
        for _ in range(escapes):
            more, at = read_base128(payload, at)
            if more > size >> r:
                raise ValueError(f"a gap is beyond {size}.")
            escaped.append(more)
    lower, at = read_lower(payload, at, k, r)
    gaps = rans.decode(payload[at:], k, fitted).astype(np.int64)
    at_escapes = np.flatnonzero(gaps == _BUCKETS - 1)
    if at_escapes.size != len(escaped):
        raise ValueError(f"{at_escapes.size} gaps are long, {len(escaped)} were announced.")
    gaps[at_escapes] += np.array(escaped, np.int64)
    if int(gaps.max()) > size >> r:
        raise ValueError(f"a gap is beyond {size}.")
    gaps <<= r
    gaps |= lower.astype(np.int64)
    gaps += 1
    # an overflow turns a number negative, as long as no single step or sum passes 2**64
    if int(gaps.min()) <= 0 or float(gaps.sum(dtype=np.float64)) > 1.5 * size:
        raise ValueError(f"the gaps lead beyond {size}.")
    written: Ints = np.cumsum(gaps, out=gaps)
    written -= 1
    if not 0 <= int(written[-1]) < size:
        raise ValueError(f"the gaps lead beyond {size}.")
    if k == kept:
        return written
    mask = np.ones(size, np.bool_)
    mask[written] = False
    return np.flatnonzero(mask)


def _complement(gaps: Ints, size: int) -> Ints:
    """Gaps between the positions that are not among those of the given gaps."""
    mask = np.ones(size, np.bool_)
    mask[np.cumsum(gaps + 1) - 1] = False
    return np.diff(np.flatnonzero(mask), prepend=-1) - 1


def _model(k: int, size: int) -> tuple[int, Ints]:
    """Lower bits r, and the frequencies of the upper parts of the gaps."""
    r = max(0, (size // k).bit_length() - 3)
    q = ((size - k) << 62) // size
    for _ in range(r):
        q = q * q >> 62
    beyond = [1 << 40]  # s_i: probability of an upper part of i or more, times 2**40
    for _ in range(_BUCKETS - 1):
        beyond.append(beyond[-1] * q >> 62)
    weights = [max(1, a - b) for a, b in zip(beyond, [*beyond[1:], 0], strict=True)]
    return r, rans.quantized(np.array(weights))
