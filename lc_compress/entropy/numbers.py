"""Unsigned integers as symbols (their upper bits, entropy-coded) and lower bits (as they are)."""

from __future__ import annotations

import numpy as np

from ..bits import code_bytes, pack_codes, unpack_codes
from . import frequencies, rans
from .rans import Ints

PIECE = 1 << 16  # numbers at a time


def pack_numbers(numbers: Ints, width: int, plain: int) -> bytes | None:
    """Numbers (n,), n > 0, below 2**width, with that number r of lower bits which makes them
    shortest; `None` where they are estimated at `plain` bits or more.
    """
    least, most = int(numbers.min()), int(numbers.max())
    r = max(0, width - 62, (most - least).bit_length() - frequencies.SYMBOLS.bit_length() + 1)
    if (most >> r) - (least >> r) >= frequencies.SYMBOLS:
        r += 1
    low = least >> r
    counts = _counts(_symbols(numbers, r, low))
    best: tuple[float, int, int, bytes, Ints] | None = None
    worse = 0  # tables in a row that were of no use; the cost has few ups and downs over r
    while r < width and worse < 3:
        if counts.size <= numbers.size:
            table, fitted, cost = frequencies.fitted(counts)
            head = bytes([1 + r]) + base128(low) + base128(counts.size - 1) + table
            cost += 8 * (len(head) - len(table)) + numbers.size * r + 16
            if best is None or cost < best[0]:
                best, worse = (cost, r, low, head, fitted), 0
            else:
                worse += 1
        if counts.size == 1:
            break
        front = low % 2  # neighbours 2i and 2i + 1 become one symbol
        counts = np.concatenate([np.zeros(front, np.int64), counts])
        counts = np.concatenate([counts, np.zeros(counts.size % 2, np.int64)])
        counts, low, r = counts.reshape(-1, 2).sum(1), low // 2, r + 1
    if best is None or best[0] >= plain:
        return None
    _, r, low, head, fitted = best
    symbols = _symbols(numbers, r, low)
    lower = pack_codes(numbers & numbers.dtype.type((1 << r) - 1), r) if r else b""
    return b"".join([head, lower, rans.encode(symbols, fitted)])


def _symbols(numbers: Ints, r: int, low: int) -> Ints:
    """The upper bits, less `low`: below `SYMBOLS`."""
    symbols = np.empty(numbers.size, np.uint16)
    for at in range(0, numbers.size, PIECE):
        upper = numbers[at : at + PIECE] >> numbers.dtype.type(r)
        symbols[at : at + PIECE] = upper - numbers.dtype.type(low)
    return symbols


def _counts(symbols: Ints) -> Ints:
    """How often each occurs. NumPy's own function takes 8 bytes a symbol."""
    size = int(symbols.max()) + 1
    counts = np.zeros(size, np.int64)
    for at in range(0, symbols.size, PIECE):
        counts += np.bincount(symbols[at : at + PIECE], minlength=size)
    return counts


def unpack_numbers(payload: bytes, count: int, width: int) -> Ints:
    """The numbers (count,), count > 0, that `pack_numbers` was given.

    Raises:
        ValueError: a payload that it has not written for that many numbers of that width.
    """
    r = payload[0] - 1
    if not 0 <= r < width:
        raise ValueError(f"it starts with {payload[0]}, beyond {width} bits.")
    low, at = read_base128(payload, 1)
    more, at = read_base128(payload, at)
    if more >= frequencies.SYMBOLS or (low + more) >> (width - r):
        raise ValueError(f"{more + 1} symbols from {low} do not fit {width - r} bits.")
    fitted, length = frequencies.read(payload[at:], more + 1)
    lower, at = read_lower(payload, at + length, count, r)
    dtype = f"u{code_bytes(width)}"
    numbers = rans.decode(payload[at:], count, fitted).astype(dtype)
    numbers += numbers.dtype.type(low)
    if r:
        numbers <<= numbers.dtype.type(r)
        numbers |= lower
    return numbers


def read_lower(payload: bytes, at: int, count: int, r: int) -> tuple[Ints, int]:
    """`count` numbers of r bits that start at a byte of a payload (for r = 0 a single 0, which
    broadcasts), and the byte behind them.
    """
    end = at - (-count * r // 8)
    if len(payload) < end:
        raise ValueError(f"{len(payload)} bytes do not hold {count} times {r} bits.")
    if count * r % 8 and payload[end - 1] >> count * r % 8:
        raise ValueError("the bits after the last code are not 0.")
    if r == 0:  # no zeros for a count that nothing vouches for yet
        return np.zeros(1, np.uint8), end
    return unpack_codes(payload[at:end], count, r), end


def base128(number: int) -> bytes:
    """7 bits to a byte, the lowest first; all bytes but the last have 128 added."""
    octets = bytearray()
    while number >= 128:
        octets.append(number % 128 + 128)
        number //= 128
    return bytes([*octets, number])


def read_base128(payload: bytes, at: int) -> tuple[int, int]:
    """The number below 2**63 that starts at a byte of a payload, and the byte behind it."""
    number = 0
    for i, octet in enumerate(payload[at : at + 9]):
        number |= octet % 128 << 7 * i
        if octet < 128:
            return number, at + i + 1
    raise ValueError("a number in base 128 does not end.")
