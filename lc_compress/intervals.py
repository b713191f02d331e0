"""Clusters of consecutive values: their errors from running sums, and searches among them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .ordered import Floats, Ints, union

_TINY = 1e-300  # a divisor for an empty mass
_CHUNK = 1 << 16  # pairs evaluated at once in a bisection: their temporaries stay in the cache


def error_between(start: Floats, stop: Floats) -> Floats:
    """Squared error around their mean of the values between two positions, given sums (3, …)."""
    mass = stop[0] - start[0]
    first = stop[1] - start[1]
    error: Floats = stop[2] - start[2]
    with np.errstate(over="ignore"):  # where the stop is before the start
        first *= first
        first /= np.maximum(mass, _TINY, out=mass)
    error -= first
    return np.maximum(error, 0, out=error)


def reach(sums: Floats, single: npt.NDArray[np.bool_], bound: float) -> Ints:
    """For each of m positions at least the last stop of a cluster that starts there, if its error
    is within the bound; `single` (m,) says where the block from a position on is one value.
    """
    m = sums.shape[1]
    if bound == np.inf:
        return np.full(m, m - 1)
    start = far = np.arange(m)
    step = 1 << (m.bit_length() - 1)
    while step:
        further = np.minimum(far + step, m - 1)
        far = np.where(error_between(sums[:, start], sums[:, further]) <= bound, further, far)
        step //= 2
    return np.where(single[far], far, far + 1)


def bisection(sums: Floats, before: Floats, base: int, low: int, high: int) -> tuple[Floats, Ints]:
    """For i from low to high the least of before(t) + cost(t, i) over t <= i from `base` on, as
    many as `before` has, and the first best t.

    Rows i in the order of a search: the best t does not decrease with i, so that of a row lies
    between those of its neighbours one level up, a multiple of four times as far apart.
    """
    rows = high - low + 1
    # row r stands for i = low − 1 + r; the ends hold the range of t
    best = np.full(rows + 2, base + before.size - 1)
    best[0] = base
    least = np.empty(rows)
    step = 1 << ((rows.bit_length() - 1) // 2 * 2)
    while step:
        r = np.arange(step, rows + 1, step)
        r = r[r % (4 * step) != 0]
        above = r // (4 * step) * (4 * step)
        i = low - 1 + r
        first = best[above]
        final = np.minimum(best[np.minimum(above + 4 * step, rows + 1)], i)
        final = np.maximum(final, first)  # rounding may have them cross
        ends = np.cumsum(final - first + 1)
        cuts = np.searchsorted(ends, np.arange(_CHUNK, int(ends[-1]), _CHUNK))
        for a, b in pairwise(union(np.array([0, r.size]), cuts)):
            lengths = final[a:b] - first[a:b] + 1
            starts = np.cumsum(lengths) - lengths
            t = np.arange(int(lengths.sum())) + np.repeat(first[a:b] - starts, lengths)
            stop = np.repeat(sums[:, i[a:b]], lengths, axis=1)
            error = before[t - base] + error_between(sums[:, t], stop)
            lowest = np.minimum.reduceat(error, starts)
            hits = np.flatnonzero(error == np.repeat(lowest, lengths))
            least[r[a:b] - 1] = lowest
            best[r[a:b]] = t[hits[np.searchsorted(hits, starts)]]
        step //= 4
    return least, best[1:-1]
