"""The optimal one-dimensional k-means: a shortest path over the cuts of sorted values.

From coarse to fine: a coarse grid of positions says where the optimal cuts can be, a finer one
looks there only.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .intervals import bisection, error_between, reach
from .ordered import Floats, Ints, Ordered, ascending, union

_ROUNDING = 1e-14  # relative error of a running sum, with a margin
_GRID = 12  # blocks per cluster on the first grid
_FINER = 4  # pieces that a block is split into for the next
_UNEVEN = 8  # a block this many times as costly as the mean is split at once
_EVERY = 1 << 15  # up to so many pairs of neighbouring cuts
_WIDEST = 1 << 13  # in windows no wider than this, every position is on the grid
_TABLE = 1 << 15  # up to this many pairs a whole table is faster than the bisection


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
    cut by cut (`_Grid.allowance`). So if the best partition through a grid position, less what is
    allowed for its cuts, is worse than one that was found, no cut of an optimal partition is in the
    blocks beside that position. A finer grid looks between those that are left, until they are
    single values.

    Equal values need no merging: the error is concave in a cut among them, so one of their ends is
    as good.
    """
    n = x.size
    # window j: where the first j clusters may end, low[j] and high[j] included; none is empty
    low, high = np.ones(k + 1, dtype=np.int64), np.full(k + 1, n - 1)
    low[[0, -1]] = high[[0, -1]] = 0, n
    positions = None
    best = np.inf
    while True:
        sizes = (high - low + 1).astype(np.float64)
        if sizes[1:] @ sizes[:-1] <= _EVERY and sizes.max() <= _WIDEST:
            every = (np.arange(a, b + 1) for a, b in zip(low, high, strict=True))
            positions = union(*every)
        elif positions is None:
            positions = union(x.even_grid(_GRID * k), low, high)
        grid = _Grid(x, positions, low, high)
        while (limit := _UNEVEN * grid.typical) < grid.worst:
            grid = _Grid(x, grid.finer(low, high, limit), low, high)
        if not grid.worst:
            return grid.best_starts()
        through, found = grid.best_through(best)
        best = min(best, found + (k + 1) * float(grid.noise[0] + grid.noise[-1]))
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
        # those of the cuts, as slices of the positions
        windows = zip(self.first[1:-1], self.last[1:-1], strict=True)
        self.windows = [slice(a, b + 1) for a, b in windows]
        self.sums = x.sums(positions)  # (3, m)
        self.ends = x.values(positions[:-1]), x.values(positions[1:] - 1)  # of the blocks
        self.noise = self._noise()
        self.spread = self._spread()
        self.gaps = self._gaps()
        cost = np.zeros(positions.size - 1)
        for w, gap in zip(self.windows, self.gaps.tolist(), strict=True):
            inside = cost[w.start : w.stop - 1]
            np.maximum(inside, gap, out=inside)
        self.cost = cost * self.spread
        self.worst = float(self.cost.max())
        self.typical = float(self.cost.sum()) / max(int((self.cost > 0).sum()), 1)
        self._tables: dict[tuple[int, ...], Floats] = {}

    def _noise(self) -> Floats:
        """What rounding may change in the error of a cluster that starts or ends here (m,)."""
        _, first, second = np.abs(self.sums)
        # sums run outwards from x.shift: the last value in one is the largest
        starts, stops = self.ends
        outer = np.maximum(np.append(self.x.shift - starts, 0), np.append(0, stops - self.x.shift))
        noise: Floats = _ROUNDING * (second + first * outer)
        return noise

    def _spread(self) -> Floats:
        """At least Σ h |v − mean| over each block (m − 1,); zero where all values are equal."""
        mass = np.diff(self.sums[0])
        error = (
            error_between(self.sums[:, :-1], self.sums[:, 1:]) + self.noise[:-1] + self.noise[1:]
        )
        bound: Floats = np.minimum(mass * (self.ends[1] - self.ends[0]) / 2, np.sqrt(mass * error))
        return bound

    def _gaps(self) -> Floats:
        """At least the distance of the centres on both sides of each cut (k − 1,).

        The mean of the values between two positions does not decrease with either of them.
        """
        first, last = np.array(self.first), np.array(self.last)
        gaps: Floats = self._mean(last[1:-1], last[2:], 1) - self._mean(first[:-2], first[1:-1], -1)
        return np.maximum(gaps, 0)

    def _mean(self, start: Ints, stop: Ints, side: int) -> Floats:
        """At least (side = 1) or at most (−1) the mean of all values between these positions, given
        by their numbers, and of any values before the stop or after the start where there are none.
        """
        mass, first, _ = self.sums[:, stop] - self.sums[:, start]
        slack = 1e-14 * (np.abs(self.sums[1, stop]) + np.abs(self.sums[1, start]))
        least = 1e-12 * self.x.mass  # less may be what cancellation left
        mean = self.x.shift + (first + side * slack) / np.maximum(mass, least)
        last = self.positions.size - 2
        extreme = self.ends[1][stop - 1] if side > 0 else self.ends[0][np.minimum(start, last)]
        return np.where(mass > least, mean, extreme)

    def allowance(self, bound: float) -> tuple[list[Floats], float]:
        """What it costs at most to move the cuts of an optimal partition, of an error of at most
        the bound, onto the grid: for each window by the position that its cut is moved to, from a
        block beside it; and a constant.

        Proof. Give all values of a block with mean m to the centre nearest to m. For each cut
        between centres c < c' this moves the values on the side of the cut away from m, at
        2 (c' − c) Σ h |v − cut| over them: at most (c' − c) e with e = Σ h |v − m| over the block.
        The distances c' − c of all cuts whose centres lie in some range add up to no more than the
        range, so a constant, range · max e, allows for all of those.
        """
        beside = []
        for w in self.windows:
            e = np.zeros(w.stop - w.start)
            e[1:] = self.spread[w.start : w.stop - 1]
            np.maximum(e[:-1], e[1:], out=e[:-1])
            beside.append(e)
        options = [([gap * e for gap, e in zip(self.gaps, beside, strict=True)], 0.0)]
        if (self.high[:-1] > self.low[1:]).any():
            # windows overlap: the gap of one cut covers the centres of others too
            least, most = self._centres(bound)
            near = most - least
            inner = near <= 4 * np.median(near)  # not next to outliers
            width = float(most[inner].max() - least[inner].min())
            outer = np.where(inner, 0.0, near)
            costs = [
                np.minimum(gap, outer[w]) * e
                for gap, w, e in zip(self.gaps, self.windows, beside, strict=True)
            ]
            worst = max(
                float((inner[w] * e).max()) for w, e in zip(self.windows, beside, strict=True)
            )
            options.append((costs, width * worst))
        return min(options, key=lambda option: sum(float(e.max()) for e in option[0]) + option[1])

    def _centres(self, bound: float) -> tuple[Floats, Floats]:
        """At most the centre before and at least the centre after a cut in a block beside each
        position, (m,) each, if no cluster has a larger error than the bound.
        """
        m = self.positions.size
        here = np.arange(m)
        single = np.diff(self.positions) == 1
        after = reach(self.sums, np.append(single, True), bound)
        before = m - 1 - reach(-self.sums[:, ::-1], np.append(single[::-1], True), bound)[::-1]
        least, most = self._mean(before, here, -1), self._mean(here, after, 1)
        return np.append(self.ends[0][0], least[:-1]), np.append(most[1:], self.ends[1][-1])

    def rounding(self) -> list[Floats]:
        """What rounding may change in the error of a partition, for each window and position.

        The error of a cluster between two cuts that are known is the same number in all of them.
        """
        known = np.equal(self.first, self.last)
        counted = ~(known[:-1] & known[1:])
        times = np.append(0, counted) + np.append(counted, 0)
        windows = zip(times.tolist(), self.first, self.last, strict=True)
        return [count * self.noise[a : b + 1] for count, a, b in windows]

    def best_through(self, bound: float) -> tuple[list[Floats], float]:
        """For each window and position in it, at most the error of an optimal partition, which is
        at most the bound, with that cut in a block beside the position; and at least the error of
        some partition.
        """
        k = len(self.first) - 1
        costs, constant = self.allowance(bound)
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
        found = float(error_between(self.sums[:, path[:-1]], self.sums[:, path[1:]]).sum())
        places = zip(rounding, path.tolist(), self.first, strict=True)
        return through, found + sum(float(noise[i - a]) for noise, i, a in places)

    def narrowed(self, through: list[Floats], bound: float) -> tuple[Ints, Ints]:
        """The windows without the positions where `through` is above the bound."""
        low, high = self.low.copy(), self.high.copy()
        wide = self.spread > 0  # in the other blocks no cut is better than at both ends
        for j, (w, error) in enumerate(zip(self.windows, through, strict=True), 1):
            kept = np.flatnonzero(error <= bound)
            a, b = w.start + int(kept[0]), w.start + int(kept[-1])
            low[j] = self.positions[a - 1 if a > w.start and wide[a - 1] else a]
            high[j] = self.positions[b + 1 if b < w.stop - 1 and wide[b] else b]
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
            return bisection(self.sums, before, a, b, d)
        table = error_between(self.sums[:, a : c + 1, None], self.sums[:, None, b : d + 1])
        table += before[:, None]
        if c > b:
            table[np.arange(a, c + 1)[:, None] > np.arange(b, d + 1)] = np.inf
        choice = table.argmin(0)
        return table[choice, np.arange(choice.size)], a + choice

    def _forward(self, j: int, before: Floats) -> Floats:
        """The same without the choice."""
        (a, b), (c, d) = self.first[j - 1 : j + 1], self.last[j - 1 : j + 1]
        table = self._table(j)
        if table is None:
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
        if table is None:
            end = self.positions.size - 1
            mirrored = -self.sums[:, ::-1], behind[::-1], end - d, end - c, end - a
            return bisection(*mirrored)[0][::-1]
        behind = behind + self.sums[2, b : d + 1]
        least: Floats = (table + behind).min(1) - self.sums[2, a : c + 1]
        return least

    def _table(self, j: int) -> Floats | None:
        """cost(t, i) less Σ h v² for t in window j − 1 and i in window j, infinite for t > i; None
        if that is too large, or a single number, which is not to be rounded in another way.
        """
        (a, b), (c, d) = self.first[j - 1 : j + 1], self.last[j - 1 : j + 1]
        size = (c - a + 1) * (d - b + 1)
        if size == 1 or size > _TABLE * (8 if (a, c) == (b, d) else 1):  # of many in a row
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
