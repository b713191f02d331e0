"""The optimal one-dimensional k-means: sorted values and a programme over cuts, coarse to fine."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from torch import Tensor

from .ordered import Floats, Ints, Ordered, ascending, union

_TINY = 1e-300  # a divisor for an empty mass
_ROUNDING = 1e-14  # relative error of a running sum, with a margin
_GRID = 12  # blocks per cluster on the first grid
_FINER = 4  # pieces that a block is split into for the next
_UNEVEN = 8  # a block this many times as costly as the mean is split at once
_EVERY = 1 << 15  # with no more pairs of neighbouring cuts than this, every position is on the grid
_TABLE = 1 << 15  # up to this many pairs a whole table is faster than the bisection
_CHUNK = 1 << 16  # pairs evaluated at once in a bisection: their temporaries stay in the cache


def optimal_centres(x: Tensor, h: Tensor | None, k: int) -> Floats:
    """The ascending centres (k,) of the optimal k-means of x (n,), finite.

    h (n,): importance in float64, non-negative and not all zero; None counts every value as 1.
    """
    values = ascending(x, h)
    centres = values.distinct(k)
    if centres is None:
        exponent = values.scale()
        ordered = Ordered(values)
        centres = np.ldexp(ordered.means(optimal_starts(ordered, k)), exponent)
    # fewer than k clusters: as few distinct values, or rounding hid what the others would gain
    return np.pad(centres, (0, k - centres.size), mode="edge")


def optimal_starts(x: Ordered, k: int) -> Ints:
    """First position of each cluster when x, of more than k distinct values, is cut into k at least
    error.

    Exact, from coarse to fine. Cuts are first allowed on a coarse grid of positions only, where the
    programme is short. An optimal partition can be moved onto the grid at a cost that is bounded
    cut by cut (`_Grid.moving`). So if the best partition through a grid position, less the bound
    for its cuts, is worse than one that was found, no cut of an optimal partition is in the blocks
    beside that position. A finer grid looks between those that are left, until they are single
    values.

    Equal values need no merging: the error is concave in a cut among them, so one of their ends is
    as good.
    """
    n = x.size
    # window j: where the first j clusters may end, low[j] and high[j] included
    low, high = np.array([0] + [1] * (k - 1) + [n]), np.array([0] + [n - 1] * (k - 1) + [n])
    positions = union(x.even_grid(_GRID * k), np.array([1, n-1]))
    best = np.inf  # at least the least error
    while True:
        sizes = (high - low + 1).astype(np.float64)
        if sizes[1:] @ sizes[:-1] <= _EVERY:
            every = (np.arange(a, b + 1) for a, b in zip(low, high, strict=True))
            positions = union(*every)
        grid = _Grid(x, positions, low, high)
        while (limit := _UNEVEN * grid.typical) < grid.worst:
            grid = _Grid(x, grid.finer(low, high, limit), low, high)
        if not grid.worst:
            return grid.best_starts()
        through, found = grid.best_through(best)
        best = min(best, found + float(grid.noise[0] + grid.noise[-1]) * 2)
        low, high = grid.narrowed(through, found)
        # pieces of a block of even density cost _FINER² times less
        positions = grid.finer(low, high, grid.worst / _FINER**2)


class _Grid:
    """Positions (m,) from 0 to n where cuts are allowed, within windows that start and end on them.

    worst, typical: what it costs at most to move a cut onto the grid, from the worst block and on
    average over the blocks.
    """

    def __init__(self, x: Ordered, positions: Ints, low: Ints, high: Ints) -> None:
        self.x, self.positions, self.low, self.high = x, positions, low, high
        self.first = np.searchsorted(positions, low).tolist()
        self.last = np.searchsorted(positions, high).tolist()
        self.sums = x.sums(positions)  # (3, m)
        starts, ends = x.values(positions[:-1]), x.values(positions[1:] - 1)  # of the blocks
        self.noise = self._noise(starts - x.shift, ends - x.shift)
        self.spread = self._spread(ends - starts)
        self.gaps = self._gaps()
        cost = np.zeros(positions.size - 1)
        for a, b, gap in self._cuts():
            np.maximum(cost[a:b], gap, out=cost[a:b])
        self.cost = cost * self.spread
        self.worst = float(self.cost.max())
        self.typical = self.cost.sum() / max(np.count_nonzero(self.cost), 1)
        self._tables: dict[tuple[int, ...], Floats] = {}

    def _cuts(self) -> zip[tuple[int, int, float]]:
        """Of each cut, the first and last position of its window and the gap of the centres."""
        return zip(self.first[1:-1], self.last[1:-1], self.gaps.tolist(), strict=True)

    def _noise(self, starts: Floats, ends: Floats) -> Floats:
        """What rounding may change in the error of a cluster that starts or ends here (m,)."""
        _, first, second = np.abs(self.sums)
        # sums run outwards, and the last value in them is the largest
        outer = np.maximum(np.append(-starts, 0), np.append(0, ends))
        noise: Floats = _ROUNDING * (second + first * outer)
        return noise

    def _spread(self, width: Floats) -> Floats:
        """At least Σ h |v − mean| over each block (m − 1,); zero where all values are equal."""
        mass = np.diff(self.sums[0])
        error = _cost(self.sums[:, :-1], self.sums[:, 1:]) + self.noise[:-1] + self.noise[1:]
        bound: Floats = np.minimum(mass * width / 2, np.sqrt(mass * error))
        return bound

    def _gaps(self) -> Floats:
        """At least the distance of the centres on both sides of each cut (k − 1,).

        The mean of the values between two positions does not decrease with either of them.
        """
        x, low, high = self.x, self.low, self.high
        least = _mean(x, self.sums[:, self.first], np.minimum(low[:-1], x.size - 1), -1)
        most = _mean(x, self.sums[:, self.last], high[1:] - 1, 1)
        gaps: Floats = np.maximum(most[1:] - least[:-1], 0)
        return gaps

    def moving(self, bound) -> tuple[list[Floats], float]:
        """What it costs at most to move the cuts of an optimal partition onto the grid: for each
        window, by the position to which its cut is moved from a block beside it; and a constant.

        Proof. Give all values of a block with mean m to the centre nearest to m. For each cut
        between centres c < c' this moves the values on the side of the cut away from m, at
        2 (c' − c) Σ h |v − cut| over them: at most (c' − c) e with e = Σ h |v − m| over the block.
        All c' − c add up to at most the range, so a constant is enough, with the largest e.
        """
        windows = [slice(a, b + 1) for a, b in zip(self.first[1:-1], self.last[1:-1], strict=True)]
        beside = []
        for a, b, _ in self._cuts():
            e = np.zeros(b - a + 1)
            e[1:] = self.spread[a:b]
            np.maximum(e[:-1], self.spread[a:b], out=e[:-1])
            beside.append(e)
        options = [([e * gap for e, gap in zip(beside, self.gaps, strict=True)], 0.0)]
        if (self.high[:-1] > self.low[1:]).any():
            worst = float(self.spread[self.cost > 0].max())
            ends = self.x.values(np.array([0, self.x.size - 1]))
            options.append(([np.zeros_like(e) for e in beside], float((ends[1] - ends[0]) * worst)))
            if bound < np.inf:
                bottom, top = self._near(bound)
                inner = top - bottom <= 4 * np.median(top - bottom)
                width = top[inner].max() - bottom[inner].min()
                near = np.where(inner, 0, top - bottom)
                costs = [e * np.minimum(gap, near[w]) for e, gap, w in zip(beside, self.gaps, windows, strict=True)]
                worst = max(float((e * inner[w]).max()) for e, w in zip(beside, windows, strict=True))
                options.append((costs, float(width * worst)))
        return min(options, key=lambda o: sum(float(x.max()) for x in o[0]) + o[1])

    def _near(self, bound: float) -> Floats:
        """At least the distance of the centres beside a cut in a block beside each position, if no
        cluster has a larger error than the bound.
        """
        m = self.positions.size
        single = np.append(np.diff(self.positions) == 1, True)
        def reach(sums, single):
            at = np.arange(m); far = at
            step = 1 << (m.bit_length()-1)
            while step:
                there = np.minimum(far + step, m-1)
                ok = _cost(sums[:, at], sums[:, there]) <= bound
                far = np.where(ok, there, far)
                step //= 2
            return np.where(single[far], far, far+1)
        right = reach(self.sums, single)
        left = m-1-reach(-self.sums[:, ::-1], np.append(single[-2::-1], True))[::-1]
        x=self.x
        at=np.arange(m)
        def mean(a,b,other,side):
            s0,s1=self.sums[:,a],self.sums[:,b]
            mass=s1[0]-s0[0]; slack=1e-14*(np.abs(s0[1])+np.abs(s1[1])); least=1e-12*x.mass
            return np.where(mass>least, x.shift+(s1[1]-s0[1]+side*slack)/np.maximum(mass,least), x.values(other))
        top = mean(at, right, np.maximum(self.positions[right]-1,0), 1)
        bottom = mean(left, at, np.minimum(self.positions[left],x.size-1), -1)
        ends = x.values(np.array([0, x.size - 1]))
        return np.append(ends[0], bottom[:-1]), np.append(top[1:], ends[1])

    def rounding(self) -> list[Floats]:
        """What rounding may change in the error of a partition, for each window and position.

        The error of a cluster between two cuts that are known is the same number in all of them.
        """
        known = np.equal(self.first, self.last)
        counted = ~(known[:-1] & known[1:])
        times = np.append(0, counted) + np.append(counted, 0)
        windows = zip(times.tolist(), self.first, self.last, strict=True)
        return [count * self.noise[a : b + 1] for count, a, b in windows]

    def best_through(self, bound) -> tuple[list[Floats], float]:
        """For each window and position in it, at most the error of an optimal partition with that
        cut in a block beside the position; and at least the error of some partition.
        """
        k = len(self.first) - 1
        costs, constant = self.moving(bound)
        rounding = self.rounding()
        costs = [a + b for a, b in zip(costs, rounding[1:], strict=False)]
        constant += float(rounding[0][0] + rounding[k][0])
        ahead = [np.zeros(1)]  # the best for the values before a cut
        for j in range(1, k):
            ahead.append(self._forward(j, ahead[-1]) - costs[j - 1])
        through = []
        behind = np.zeros(1)  # the best for the values after it
        for j in range(k - 1, 0, -1):
            behind = self._backward(j + 1, behind)
            through.append(ahead[j] + behind - constant)
            behind = behind - costs[j - 1]
        through.reverse()
        best = [a + int(error.argmin()) for a, error in zip(self.first[1:], through, strict=False)]
        path = np.maximum.accumulate([0, *best, self.positions.size - 1])
        found = _cost(self.sums[:, path[:-1]], self.sums[:, path[1:]]).sum()
        slack = sum(float(e[i - a]) for e, i, a in zip(rounding, path, self.first, strict=True))
        return through, float(found) + slack

    def narrowed(self, through: list[Floats], bound: float) -> tuple[Ints, Ints]:
        """The windows without the positions where `through` is above the bound."""
        low, high = self.low.copy(), self.high.copy()
        wide = self.spread > 0  # in the other blocks no cut is better than at both ends
        for j, error in enumerate(through, 1):
            kept = np.flatnonzero(error <= bound)
            a, b = self.first[j] + int(kept[0]), self.first[j] + int(kept[-1])
            low[j] = self.positions[a - 1 if a > self.first[j] and wide[a - 1] else a]
            high[j] = self.positions[b + 1 if b < self.last[j] and wide[b] else b]
        return np.maximum.accumulate(low), np.minimum.accumulate(high[::-1])[::-1]

    def finer(self, low: Ints, high: Ints, limit: float) -> Ints:
        """The positions in windows within those of the grid, and more in blocks that cost more than
        the limit.
        """
        change = np.zeros(self.positions.size, dtype=np.int64)
        first, last = np.searchsorted(self.positions, low), np.searchsorted(self.positions, high)
        np.add.at(change, first, 1)
        np.add.at(change, last, -1)
        block = np.cumsum(change[:-1]) > 0  # which are in a window
        split = np.flatnonzero(block & (self.cost > limit))
        start, size = self.positions[split], self.positions[split + 1] - self.positions[split]
        pieces = [start + size * i // _FINER for i in range(1, _FINER)]
        if self.x.block > 1:
            align = np.where(size >= _FINER * self.x.block, self.x.block, 1)
            pieces = [at // align * align for at in pieces]
        kept = np.append(block, False)
        kept[1:] |= block
        kept[first] = kept[last] = True
        return union(self.positions[kept], *pieces)

    def best_starts(self) -> Ints:
        """First position of each cluster of the best partition on the grid."""
        choices = []
        least = np.zeros(1)
        for j in range(1, len(self.first)):
            least, choice = self._choose(j, least)
            choices.append(choice)
        cuts = [self.positions.size - 1]
        for j in range(len(choices), 0, -1):
            cuts.append(int(choices[j - 1][cuts[-1] - self.first[j]]))
        starts = union(self.positions[cuts[1:]])
        return starts[starts < self.x.size]

    def _choose(self, j: int, before: Floats) -> tuple[Floats, Ints]:
        """For each position i in window j the least of before(t) + cost(t, i) over t <= i in window
        j − 1, and the first best t.
        """
        (a, b), (c, d) = self.first[j - 1 : j + 1], self.last[j - 1 : j + 1]
        if (c - a + 1) * (d - b + 1) > _TABLE:
            return _bisection(self.sums, before, a, b, d)
        table = _cost(self.sums[:, a : c + 1, None], self.sums[:, None, b : d + 1])
        table += before[:, None]
        if c > b:
            table[np.arange(a, c + 1)[:, None] > np.arange(b, d + 1)] = np.inf
        choice = table.argmin(0)
        return table[choice, np.arange(choice.size)], a + choice

    def _forward(self, j: int, before: Floats) -> Floats:
        """The same without the choice."""
        table = self._table(j)
        (a, b), (c, d) = self.first[j - 1 : j + 1], self.last[j - 1 : j + 1]
        if table is None or (a, b) == (c, d):
            return self._choose(j, before)[0]
        before = before - self.sums[2, a : c + 1]
        least: Floats = (table + before[:, None]).min(0) + self.sums[2, b : d + 1]
        return least

    def _backward(self, j: int, behind: Floats) -> Floats:
        """For each position t in window j − 1 the least of cost(t, i) + behind(i) over i >= t in
        window j.
        """
        (a, b), (c, d) = self.first[j - 1 : j + 1], self.last[j - 1 : j + 1]
        table = self._table(j)
        if table is None or (a, b) == (c, d):
            end = self.positions.size - 1
            mirrored = -self.sums[:, ::-1], behind[::-1], end - d, end - c, end - a
            return _bisection(*mirrored)[0][::-1]
        behind = behind + self.sums[2, b : d + 1]
        least: Floats = (table + behind).min(1) - self.sums[2, a : c + 1]
        return least

    def _table(self, j: int) -> Floats | None:
        """cost(t, i) less Σ h v² for t in window j − 1 and i in window j, infinite for t > i; None
        if that is too large.
        """
        (a, b), (c, d) = self.first[j - 1 : j + 1], self.last[j - 1 : j + 1]
        if (c - a + 1) * (d - b + 1) > _TABLE * (8 if (a, c) == (b, d) else 1):
            return None
        if (a, b, c, d) not in self._tables:
            table = self.sums[1, a : c + 1, None] - self.sums[1, b : d + 1]
            table *= table
            mass = self.sums[0, a : c + 1, None] - self.sums[0, b : d + 1]  # negative
            np.minimum(mass, self.x.mass * -1e-16, out=mass)  # may have cancelled to zero
            table /= mass
            if c > b:
                table[np.arange(a, c + 1)[:, None] > np.arange(b, d + 1)] = np.inf
            self._tables[a, b, c, d] = table
        return self._tables[a, b, c, d]


def _cost(start: Floats, stop: Floats) -> Floats:
    """Squared error around their mean of the values between two positions, given sums (3, …)."""
    mass = stop[0] - start[0]
    first = stop[1] - start[1]
    error: Floats = stop[2] - start[2]
    with np.errstate(over="ignore"):  # where the stop is before the start
        first *= first
        first /= np.maximum(mass, _TINY, out=mass)
    error -= first
    return np.maximum(error, 0, out=error)


def _mean(x: Ordered, sums: Floats, otherwise: Ints, side: int) -> Floats:
    """Means of the values from each position to the next, on the safe side of what rounding does to
    them; where there are few or none, the values at `otherwise`.
    """
    mass = np.diff(sums[0])
    slack = 1e-14 * (np.abs(sums[1, 1:]) + np.abs(sums[1, :-1]))
    least = 1e-12 * x.mass  # below that the mass may be what cancellation left
    mean = x.shift + (np.diff(sums[1]) + side * slack) / np.maximum(mass, least)
    return np.where(mass > least, mean, x.values(otherwise))


def _bisection(
    sums: Floats, before: Floats, base: int, low: int, high: int
) -> tuple[Floats, Ints]:
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
            error = before[t - base] + _cost(sums[:, t], stop)
            lowest = np.minimum.reduceat(error, starts)
            hits = np.flatnonzero(error == np.repeat(lowest, lengths))
            least[r[a:b] - 1] = lowest
            best[r[a:b]] = t[hits[np.searchsorted(hits, starts)]]
        step //= 4
    return least, best[1:-1]
