"""Range asymmetric numeral systems: symbols of known frequencies in close to their entropy.

All in integers, so that every machine writes and reads the same bytes. The frequencies f_s of the
symbols are integers that sum to M = 2**14, and c_s = f_0 + … + f_(s−1). A state x < 2**32 takes a
symbol in by

    x ← ⌊x / f_s⌋ · M + c_s + (x mod f_s)

and gives it back, last in first out: with y = x mod M, s is the symbol of c_s <= y < c_(s+1), and

    x ← f_s · ⌊x / M⌋ + y − c_s.

A state that is f_s · 2**18 or more before it takes a symbol first gives its lower 16 bits away as a
word, x ← ⌊x / 2**16⌋. Reading, a state below 2**16 after a symbol takes a word, x ← 2**16 x + word.

Fewer than 2**17 symbols have one state; it starts at 0, and reading it takes words only while there
are any. From there on n symbols have L = 2**⌊log2(n / 8192)⌋ states, which start at 2**16. Symbol i
belongs to state i mod L, and of L consecutive symbols the words lie in the order of the states: so
L symbols are coded at a time. A payload is the L states, 32 bits each, and the words, 16 bits each,
in the order of reading, all little-endian. After the last symbol every state is back at its start
and no word is left: what does not end like this is damaged.

An encoder starts at the last symbol. No symbols take no bytes. A state costs 2 to 4 bytes, which is
all that a payload is longer than the entropy of its frequencies.

Source: Duda, Asymmetric numeral systems, 2013, arXiv:1311.2540.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

PRECISION = 14
TOTAL = 1 << PRECISION  # M: what the frequencies sum to

Ints = npt.NDArray[Any]

_ONE_STATE = 1 << 17  # symbols from which there are more
_START = 1 << 16  # of a state among several


def states(count: int) -> int:
    """How many states code `count` symbols."""
    return 1 if count < _ONE_STATE else 1 << ((count >> 13).bit_length() - 1)


def quantized(weights: Ints) -> Ints:
    """Frequencies that sum to M, at least 1 where the weight is not 0, in proportion to weights.

    f_s = 1 + ⌊w_s (M − m) / Σ w⌋ for the m weights that are not 0; what is missing to M goes to the
    largest weight, the first of equal ones. Weights (at most M of them) are integers that sum to
    less than 2**49.
    """
    w = weights.astype(np.int64)
    used = w > 0
    frequencies = used + w * (TOTAL - int(used.sum())) // int(w.sum())
    frequencies[w.argmax()] += TOTAL - int(frequencies.sum())
    result: Ints = frequencies
    return result


def encode(symbols: Ints, frequencies: Ints) -> bytes:
    """Symbols (n,), indices into `frequencies`, all of a frequency that is not 0."""
    if symbols.size == 0:
        return b""
    starts = np.cumsum(frequencies) - frequencies
    lanes = states(symbols.size)
    if lanes == 1:
        return _encode_one(symbols, frequencies, starts)
    x = np.full(lanes, _START, np.int64)
    words = []
    last = (symbols.size - 1) // lanes
    for row in range(last, -1, -1):
        s = symbols[row * lanes : (row + 1) * lanes]
        f, state = frequencies[s], x[: s.size]
        out = np.flatnonzero(state >= f << 18)
        if out.size:
            words.append((state[out] & 0xFFFF).astype("<u2"))
            state[out] >>= 16
        quotient = state // f
        # ⌊x/f⌋ · M + c + x − ⌊x/f⌋ · f
        state += quotient * (TOTAL - f) + starts[s]
    return x.astype("<u4").tobytes() + b"".join(w.tobytes() for w in reversed(words))


def decode(payload: bytes, count: int, frequencies: Ints) -> Ints:
    """The `count` symbols that `encode` was given.

    Time and memory are at most proportional to the payload's length plus a constant: at most
    16384 symbols share a state (fewer than 2**17 of them, the one state).

    Raises:
        ValueError: a payload that `encode` has not written for that many symbols.
    """
    lanes = states(count)
    if count == 0:
        if payload:
            raise ValueError(f"{len(payload)} bytes hold no symbol.")
        return np.zeros(0, np.uint16)
    if len(payload) < 4 * lanes or len(payload) % 2:
        raise ValueError(f"{len(payload)} bytes hold no {lanes} states and words of two bytes.")
    table = np.repeat(np.arange(frequencies.size, dtype=np.uint16), frequencies)  # y -> s
    starts = np.cumsum(frequencies) - frequencies
    factors = frequencies.astype(np.int64)[table]
    offsets = np.arange(TOTAL) - starts[table]  # y − c_s
    x = np.frombuffer(payload, "<u4", lanes).astype(np.int64)
    words = np.frombuffer(payload, "<u2", offset=4 * lanes)
    if lanes == 1:
        return _decode_one(int(x[0]), words, count, table, factors, offsets)
    symbols = np.empty(count, np.uint16)
    read = 0
    for at in range(0, count, lanes):
        state = x[: count - at]
        y = state & (TOTAL - 1)
        symbols[at : at + lanes] = table[y]
        state >>= PRECISION
        state *= factors[y]
        state += offsets[y]
        need = np.flatnonzero(state < 1 << 16)
        if need.size:
            if read + need.size > words.size:
                raise ValueError("the words end before the symbols.")
            state[need] = (state[need] << 16) | words[read : read + need.size]
            read += need.size
    if read < words.size or bool((x != _START).any()):
        raise ValueError("the symbols end before the words, or in another state.")
    return symbols


def _encode_one(symbols: Ints, frequencies: Ints, starts: Ints) -> bytes:
    """In Python's own integers: a step on one state is faster than numpy's."""
    f_of, c_of = frequencies.tolist(), starts.tolist()
    words = []
    x = 0
    for s in reversed(symbols.tolist()):
        f = f_of[s]
        if x >= f << 18:
            words.append(x & 0xFFFF)
            x >>= 16
        x = (x // f << PRECISION) + c_of[s] + x % f
    return x.to_bytes(4, "little") + np.array(words[::-1], "<u2").tobytes()


def _decode_one(x: int, words: Ints, count: int, table: Ints, factors: Ints, offsets: Ints) -> Ints:
    f_at, offset_at = factors.tolist(), offsets.tolist()
    slots = []
    unread = words[::-1].tolist()
    for _ in range(count):
        y = x & (TOTAL - 1)
        slots.append(y)
        x = f_at[y] * (x >> PRECISION) + offset_at[y]
        if x < 1 << 16 and unread:
            x = x << 16 | unread.pop()
    if unread or x:
        raise ValueError("the symbols end before the words, or in another state.")
    symbols: Ints = table[np.array(slots)]
    return symbols
