"""The optimal one-dimensional k-means: sorted values, prefix sums and a programme over cuts.

In numpy, on the CPU.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_TINY = 1e-300  # a divisor for a mass that cancelled to zero
_GRID = 64  # positions per cluster on the coarsest grid
_FINER = 8  # times as many on the next
_TABLE = 1 << 14  # up to this many candidates a whole table is faster than the bisection
_CHUNK = 1 << 16  # candidates evaluated at once: their temporaries stay in the cache


def optimal_centres(x: npt.NDArray[np.floating], h: Floats | None, k: int) -> Floats:
    """The ascending centres (k,) of the optimal k-means of x (N,), finite.

    h (N,): importance, non-negative and not all zero; None counts every value as 1.
    """
    if h is not None:
        h = np.ldexp(h, -int(np.frexp(h.max())[1]))
        x, h = x[h > 0], h[h > 0]
    distinct, mass = _merged(x, h)
    if distinct.size <= k:
        return np.pad(distinct.astype(np.float64), (0, k - distinct.size), mode="edge")
    # a power of two, so that squares neither overflow nor vanish and scaling back is exact
    exponent = int(np.frexp(np.abs(distinct).max())[1])
    values = np.ldexp(distinct.astype(np.float64), -exponent)
    starts = _optimal_starts(values, mass, k)
    sizes = np.diff(starts, append=values.size)
    # means from each cluster's first value on: exact for one value, accurate for a tight cluster
    first = values[starts]
    offset = np.add.reduceat(mass * (values - np.repeat(first, sizes)), starts)
    centres = first + offset / np.add.reduceat(mass, starts)
    # fewer than k clusters only if rounding hid what the others would gain
    return np.ldexp(np.pad(centres, (0, k - starts.size), mode="edge"), exponent)


def _merged(
    x: npt.NDArray[np.floating], h: Floats | None
) -> tuple[npt.NDArray[np.floating], Floats]:
    """The distinct values in ascending order and the importance of each."""
    order = None if h is None else np.argsort(x, kind="stable")
    x = np.sort(x) if order is None else x[order]
    starts = np.flatnonzero(np.concatenate(([True], x[1:] != x[:-1])))
    if h is None or order is None:
        return x[starts], np.diff(starts, append=x.size).astype(np.float64)
    return x[starts], np.add.reduceat(h[order], starts)


def _optimal_starts(values: Floats, mass: Floats, k: int) -> Ints:
    """First position of each cluster when ascending values (n,), n > k, are cut into k at least
    error.

    Exact, from coarse to fine. At first cuts are allowed on a coarse grid of positions only, where
    the programme is short. Any optimal partition can be moved onto the grid at a cost of at most
    `_snapping`, so each of its cuts is next to a grid position through which some partition on the
    grid costs no more than the best one plus that. A finer grid then looks between those only.
    """
    n = values.size
    moments = _moments(values, mass)
    rounding = 1e-12 * float(np.abs(moments[2, [0, -1]]).sum())
    # window j: the positions where the first j clusters may end, low[j] and high[j] included
    low, high = np.array([0] * k + [n]), np.array([0] + [n] * k)
    grid, size, density = np.array([0, n]), _GRID * k, _density(values, mass)
    while 4 * size < n:
        steps = np.arange(1, size) / size * density[-1]
        grid = np.union1d(grid, np.searchsorted(density, steps))
        sums = moments[:, grid]
        first, last = np.searchsorted(grid, low), np.searchsorted(grid, high)
        ahead = [least for least, _ in _layers(sums, first, last)]
        # the same from the other end: the values after i in k − j clusters
        end = grid.size - 1
        mirrored = _layers(-sums[:, ::-1], end - last[::-1], end - first[::-1])
        behind = [least[::-1] for least, _ in mirrored][::-1]
        windows = [slice(a, b) for a, b in zip(first[1:-1], last[1:-1], strict=True)]
        snapping = _snapping(values, np.diff(sums[0]), grid, windows, low, high)
        bound = float(ahead[-1][0]) + snapping + rounding
        for j in range(1, k):
            kept = first[j] + np.flatnonzero(ahead[j] + behind[j] <= bound)
            low[j] = max(low[j], grid[max(kept[0] - 1, 0)])
            high[j] = min(high[j], grid[min(kept[-1] + 1, end)])
        low, high = np.maximum.accumulate(low), np.minimum.accumulate(high[::-1])[::-1]
        size *= _FINER
    layers = _layers(moments, low, high)
    cuts = [n]
    for j in range(k, 0, -1):
        cuts.append(int(layers[j][1][cuts[-1] - low[j]]))
    starts = np.unique(cuts[1:])
    return starts[starts < n]


def _density(values: Floats, mass: Floats) -> Floats:
    """A running sum (n,) of √(mass · gap): equal steps make blocks of about equal mass · width."""
    weight = np.sqrt(mass[1:] * np.diff(values))
    for _ in range(4):
        # a gap wider than a block is one block: do not spend the grid on it
        weight = np.minimum(weight, weight.sum() / 256)
    return np.concatenate(([0.0], np.cumsum(weight)))


def _snapping(
    values: Floats, mass: Floats, grid: Ints, windows: list[slice], low: Ints, high: Ints
) -> float:
    """What it costs at most to move the cuts of an optimal partition, each to an end of its block.

    Blocks lie between grid positions; cut j is in window j, the blocks `windows[j − 1]`. Give all
    points of a block with mean m to the centre nearest to m. For each cut between centres c < c'
    this moves the points on the side of the cut away from m, at 2 (c' − c) Σ h |x − cut| over them:
    at most (c' − c) e with e = Σ h |x − m| over the block, itself at most mass · width / 2.
    """
    block = mass * (values[grid[1:] - 1] - values[grid[:-1]]) / 2
    worst = np.array([block[window].max(initial=0) for window in windows])
    # c and c' lie among the values from cut j − 1 to cut j + 1, and all c' − c add up to the range
    ends = values[high[2:] - 1] - values[np.minimum(low[:-2], values.size - 1)]
    spread = float(values[-1] - values[0])
    return min(float(ends @ worst), spread * float(worst.max(initial=0)))


def _moments(values: Floats, mass: Floats) -> Floats:
    """Running sums (3, n + 1) of h, h x and h x², outwards from the median and with x from there.

    Outwards, because the difference of two sums should not cancel against outliers beyond both.
    """
    middle = values.size // 2
    x = values - values[middle]
    terms = np.stack((mass, mass * x, mass * x * x))
    sums = np.zeros((3, values.size + 1))
    np.cumsum(terms[:, middle:], axis=1, out=sums[:, middle + 1 :])
    sums[:, :middle] = -np.cumsum(terms[:, :middle][:, ::-1], axis=1)[:, ::-1]
    return sums


def _cost(start: Floats, stop: Floats) -> Floats:
    """Squared error around their mean of the values between two positions, given moments (3, …)."""
    mass, first, second = stop - start
    cost: Floats = np.maximum(second - first * first / np.maximum(mass, _TINY), 0)
    return cost


def _layers(moments: Floats, low: Ints, high: Ints) -> list[tuple[Floats, Ints]]:
    """For j = 0 … k and i in window j: D_j(i), the error of the values before i in j clusters.

    D_j(i) = min_t D_(j−1)(t) + cost(t, i)  over t <= i in window j − 1, and the first best t.
    """
    layers = [(np.zeros(1), np.zeros(1, np.int64))]
    for j in range(1, low.size):
        previous = layers[-1][0]
        layers.append(_layer(moments, previous, int(low[j - 1]), int(low[j]), int(high[j])))
    return layers


def _layer(
    moments: Floats, previous: Floats, base: int, low: int, high: int
) -> tuple[Floats, Ints]:
    """One layer, as (high − low + 1,) each: i from low to high, t from base on, as `previous` has.

    The rows i in the order of a bisection: the best t does not decrease with i, so that of a row
    lies between those of its neighbours one level up, and a level looks at no more candidates than
    there are t and i together.
    """
    rows, columns = high - low + 1, previous.size
    if rows * columns <= _TABLE:
        t, i = np.arange(base, base + columns)[:, None], np.arange(low, high + 1)
        with np.errstate(over="ignore"):  # where t > i
            table = previous[:, None] + _cost(moments[:, t], moments[:, None, i])
        table[t > i] = np.inf
        choice = table.argmin(0)
        return table[choice, np.arange(rows)], base + choice
    # row r stands for i = low − 1 + r; the ends hold the range of t
    best = np.full(rows + 2, base + columns - 1)
    best[0] = base
    least = np.empty(rows)
    step = 1 << (rows.bit_length() - 1)
    while step:
        r = np.arange(step, rows + 1, 2 * step)
        i = low - 1 + r
        first = best[r - step]
        final = np.minimum(best[np.minimum(r + step, rows + 1)], i)
        ends = np.cumsum(final - first + 1)
        cuts = np.searchsorted(ends, np.arange(_CHUNK, int(ends[-1]), _CHUNK))
        bounds = np.unique(np.concatenate(([0], cuts, [r.size])))
        for a, b in pairwise(bounds):
            lengths = final[a:b] - first[a:b] + 1
            starts = np.cumsum(lengths) - lengths
            t = np.arange(int(lengths.sum())) + np.repeat(first[a:b] - starts, lengths)
            stop = np.repeat(moments[:, i[a:b]], lengths, axis=1)
            error = previous[t - base] + _cost(moments[:, t], stop)
            lowest = np.minimum.reduceat(error, starts)
            hits = np.flatnonzero(error == np.repeat(lowest, lengths))
            least[r[a:b] - 1] = lowest
            best[r[a:b]] = t[hits[np.searchsorted(hits, starts)]]
        step //= 2
    return least, best[1:-1]
