"""Clusters of consecutive values that leave values out: a programme over the cuts between them.

2 k cuts in ascending order, the start and the stop of each cluster, are allowed at some positions
only. What lies in no cluster is dropped, each value at a price.
"""

from __future__ import annotations

import numpy as np

from .intervals import error_between
from .ordered import Floats, Ints, Ordered, union

ROUNDING = 1e-14  # relative error of a running sum, with a margin
_FINER = 4  # pieces that a block is split into for the next grid
_UNEVEN = 8  # a block this many times as costly as the mean is split at once


class Windows:
    """Cuts on `positions` (m,), from 0 to n, cut b from low[b] to high[b], which are among them."""

    def __init__(self, x: Ordered, positions: Ints, low: Ints, high: Ints) -> None:
        self.x, self.positions, self.low, self.high = x, positions, low, high
        self.first = np.searchsorted(positions, low).tolist()
        self.last = np.searchsorted(positions, high).tolist()
        self.slices = [slice(a, b + 1) for a, b in zip(self.first, self.last, strict=True)]
        self.k = len(self.first) // 2
        self.sums = x.sums(positions)  # (3, m)
        sizes = np.array(self.last) - np.array(self.first) + 1
        self._sizes = sizes[::2] * sizes[1::2]
        # of the blocks between positions
        ends = x.values(positions[:-1]), x.values(positions[1:] - 1)
        self.width = ends[1] - ends[0]
        self.mass = np.diff(positions)
        self.noise = self._noise(*ends)
        self.spread = self._spread()
        change = np.zeros(positions.size, dtype=np.int64)
        np.add.at(change, self.first, 1)
        np.add.at(change, self.last, -1)
        self.inside = np.cumsum(change[:-1]) > 0  # of a window
        self._tables: dict[tuple[int, ...], Floats] = {}

    @property
    def pairs(self) -> int:
        """How many pairs of a start and a stop there are, of all clusters."""
        return int(self._sizes.sum())

    @property
    def largest(self) -> int:
        """And of one cluster."""
        return int(self._sizes.max())

    def _noise(self, starts: Floats, stops: Floats) -> Floats:
        """What rounding may change in the error of a cluster that starts or ends here (m,)."""
        _, first, second = np.abs(self.sums)
        # sums run outwards from x.shift: the last value in one is the largest
        outer = np.maximum(np.append(self.x.shift - starts, 0), np.append(0, stops - self.x.shift))
        noise: Floats = ROUNDING * (second + first * outer)
        return noise

    def _spread(self) -> Floats:
        """At least Σ |v − mean| over each block (m − 1,); zero where all values are equal."""
        error = error_between(self.sums[:, :-1], self.sums[:, 1:])
        error += self.noise[:-1] + self.noise[1:]
        bound: Floats = np.minimum(self.mass * self.width / 2, np.sqrt(self.mass * error))
        return bound

    # ------------------------------------------------------------------ the programme

    def table(self, j: int) -> Floats:
        """The error of cluster j from each start to each stop, infinite where it ends before."""
        rows, columns = self.slices[2 * j : 2 * j + 2]
        key = rows.start, rows.stop, columns.start, columns.stop
        if key not in self._tables:
            table = error_between(self.sums[:, rows, None], self.sums[:, None, columns])
            if rows.stop > columns.start:
                here, there = np.arange(rows.start, rows.stop), np.arange(*key[2:])
                table[here[:, None] > there] = np.inf
            self._tables[key] = table
        return self._tables[key]

    def ahead(self, price: float, costs: list[Floats] | None = None) -> list[Floats]:
        """For each cut and position in its window the least cost up to there, less `costs` of the
        cuts. A kept value costs −price, a dropped one nothing.
        """
        at = price * self.positions
        found: list[Floats] = []
        for j in range(self.k):
            rows, columns = self.slices[2 * j : 2 * j + 2]
            start = np.zeros(rows.stop - rows.start)
            if j:  # the best stop up to the position
                here = np.minimum(np.arange(rows.start, rows.stop), self.last[2 * j - 1])
                start = np.minimum.accumulate(found[-1])[here - self.first[2 * j - 1]]
            if costs is not None:
                start = start - costs[2 * j]
            stop = (self.table(j) + (start + at[rows])[:, None]).min(0) - at[columns]
            if costs is not None:
                stop -= costs[2 * j + 1]
            found += [start, stop]
        return found

    def best(self, price: float) -> tuple[Ints, float]:
        """The best cuts (2 k,) at a price, and the error of their clusters."""
        found = self.ahead(price)
        at = price * self.positions
        path = [self.first[-1] + int(found[-1].argmin())]
        for j in range(self.k - 1, -1, -1):
            rows = self.slices[2 * j]
            column = self.table(j)[:, path[-1] - self.first[2 * j + 1]]
            path.append(rows.start + int((column + found[2 * j] + at[rows]).argmin()))
            if j:
                before = found[2 * j - 1][: path[-1] - self.first[2 * j - 1] + 1]
                path.append(self.first[2 * j - 1] + int(before.argmin()))
        cuts = np.array(path[::-1])
        error = error_between(self.sums[:, cuts[::2]], self.sums[:, cuts[1::2]])
        return self.positions[cuts], float(error.sum())

    # ------------------------------------------------------------------ bounds

    def block_costs(self, price: float) -> Floats:
        """What it costs at most to move a cut of optimal clusters in a block to one of its ends, at
        this price of a dropped value.

        Proof. Let r² be the price, v the values of a block of width δ with mean m and
        e = Σ |v − m|, and let one cut be in it, the stop of the values around a centre c. If
        q = c + r > m, keep all of the block. That costs Σ (v − c)² − r² over values dropped until
        then, each at most (v − q) (2 r + δ) where positive, so v > q > m. Their Σ (v − q) is at
        most e / 2. Else drop all of it: r² − (v − c)² <= 2 r (q − v), again summed over one side of
        the mean. Starts alike. Where the cut is between clusters that touch, of centres c < c',
        give all values to the centre nearest to m: that costs at most (c' − c) e, and if
        c' − c > 2 (r + δ) it costs nothing to drop them all. So (r + δ) e allows for a cut, and for
        each of those two. With more cuts in a block that is less wide than r, all its values are
        nearer than r to any centre in it: no value of it is dropped, and the cuts add up.
        Whatever the cuts are, to drop a whole block costs at most r² for each value.
        """
        root = price**0.5
        whole = price * self.mass
        near = np.minimum((root + self.width) * self.spread, whole)
        return np.where(self.width <= root, near, whole) * (self.width > 0)

    def _beside(self, price: float) -> list[Floats]:
        """The same for each cut and position in its window that it may be moved to."""
        cost, beside = self.block_costs(price), []
        noise = 2 * self.noise + 1e-15 * price * self.x.size
        for w in self.slices:
            own = np.zeros(w.stop - w.start)
            own[1:] = cost[w.start : w.stop - 1]
            np.maximum(own[:-1], own[1:], out=own[:-1])
            beside.append(own + noise[w])
        return beside

    def through(self, price: float) -> list[Floats]:
        """For each cut and position in its window at most the error plus price · dropped of optimal
        clusters with that cut in a block beside the position.
        """
        costs = self._beside(price)
        at = price * self.positions
        ahead = self.ahead(price, costs)
        found: list[Floats] = []
        behind = np.zeros(ahead[-1].size)  # the least cost from there on
        for j in range(self.k - 1, -1, -1):
            rows, columns = self.slices[2 * j : 2 * j + 2]
            found.append(ahead[2 * j + 1] + behind)
            behind = behind - costs[2 * j + 1] - at[columns]
            behind = (self.table(j) + behind).min(1) + at[rows]
            found.append(ahead[2 * j] + behind)
            if j:
                behind = np.minimum.accumulate((behind - costs[2 * j])[::-1])[::-1]
                here = np.arange(self.first[2 * j - 1], self.last[2 * j - 1] + 1)
                behind = behind[np.maximum(here - rows.start, 0)]
        return [error + price * self.x.size for error in found[::-1]]

    def narrowed(
        self, through: list[Floats], bound: float, counted: bool
    ) -> tuple[Ints, Ints] | None:
        """The windows without the positions where `through` is above the bound; None if for some
        cut that is everywhere.
        """
        low, high = self.low.copy(), self.high.copy()
        # among equal values one of both ends is as good a cut, unless a number is to be dropped
        wide = self.mass > 1 if counted else self.width > 0
        for b, (w, error) in enumerate(zip(self.slices, through, strict=True)):
            kept = np.flatnonzero(error <= bound)
            if not kept.size:
                return None
            start, stop = w.start + int(kept[0]), w.start + int(kept[-1])
            low[b] = self.positions[max(start - 1, w.start) if wide[start - 1] else start]
            grown = stop < w.stop - 1 and wide[stop]
            high[b] = self.positions[stop + 1 if grown else stop]
        return np.maximum.accumulate(low), np.minimum.accumulate(high[::-1])[::-1]

    def worst(self, price: float) -> float:
        """The largest cost of a block in a window; 0 if all of them are of equal values."""
        return float((self.block_costs(price) * self.inside).max(initial=0.0))

    def finer(self, low: Ints, high: Ints, price: float, limit: float) -> Ints:
        """The positions in windows within these, and more in blocks that cost more than the
        limit.
        """
        change = np.zeros(self.positions.size, dtype=np.int64)
        np.add.at(change, np.searchsorted(self.positions, low), 1)
        np.add.at(change, np.searchsorted(self.positions, high), -1)
        block = np.cumsum(change[:-1]) > 0  # which are in a window
        split = np.flatnonzero(block & (self.block_costs(price) > limit))
        start, size = self.positions[split], self.mass[split]
        pieces = [start + size * i // _FINER for i in range(1, _FINER)]
        kept = np.append(block, False)
        kept[1:] |= block
        return union(self.positions[kept], low, high, *pieces)


def refined(x: Ordered, positions: Ints, low: Ints, high: Ints, price: float) -> Windows:
    """The windows on a grid none of whose blocks costs far more than the others."""
    while True:
        windows = Windows(x, positions, low, high)
        cost = windows.block_costs(price) * windows.inside
        limit = _UNEVEN * float(cost.sum()) / max(int((cost > 0).sum()), 1)
        if not limit < cost.max(initial=0.0):
            return windows
        positions = windows.finer(low, high, price, limit)


def split(
    positions: Ints, low: Ints, high: Ints, paths: list[Ints]
) -> list[tuple[Ints, Ints, Ints]]:
    """The windows, and their grid, in two: between the places that two paths have for a cut, or in
    the middle of the widest.
    """
    ends = np.stack((low, high))
    if len(paths) == 2:
        places = np.sort(np.clip(paths, low, high), 0)
        ends = places if (places[1] > places[0]).any() else ends
    cut = int((ends[1] - ends[0]).argmax())
    middle = int(ends[:, cut].sum()) // 2
    below, above = high.copy(), low.copy()
    below[: cut + 1] = np.minimum(high[: cut + 1], middle)
    above[cut:] = np.maximum(low[cut:], middle + 1)
    positions = union(positions, np.array([middle, middle + 1]))
    return [(positions, low, below), (positions, above, high)]


# ------------------------------------------------------------------ a number of dropped values


def counted(x: Ordered, low: Ints, high: Ints, drop: int, work: int) -> tuple[Ints | None, bool]:
    """The best cuts (2 k,) that drop this number of values, each at any position from low to high,
    or None if there are none; and False if there are more than `work` pairs to compare for one
    cluster.

    The programme counts the values that are dropped before a cut. In a cluster that number stays
    the same, between clusters that of the kept ones: in turn the tables go by one and the other.
    """
    at = [np.arange(a, b + 1) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    least, most = int(low[0]), min(int(high[0]), drop)  # dropped before the cluster
    cost = np.where(at[0][:, None] == np.arange(least, most + 1), 0.0, np.inf)
    places: list[tuple[Ints, int]] = []  # the best place in the window before, from which number on
    for b in range(0, len(at), 2):
        start, stop = at[b], at[b + 1]
        if b:
            before, fewest = at[b - 1], int(at[b - 1][0]) - most  # kept up to it, at least
            cost = _sheared(cost, before, least, fewest, int(before[-1]) - least)
            here = np.minimum(start - before[0], before.size - 1)  # the best stop up to the start
            lowest = np.minimum.accumulate(cost, 0)
            place = np.where(cost == lowest, np.arange(before.size)[:, None], 0)
            places.append((np.maximum.accumulate(place, 0)[here], fewest))
            least += max(int(start[0] - before[-1]), 0)
            most = min(most + int(start[-1] - before[0]), drop)
            cost = _sheared(lowest[here], start, fewest, least, most)
        if least > most:
            return None, True
        if start.size * stop.size * (most - least + 1) > work:
            return None, False
        error = error_between(x.sums(start)[:, :, None], x.sums(stop)[:, None])
        error[start[:, None] > stop] = np.inf
        best = np.full((stop.size, most - least + 1), np.inf)
        place = np.zeros(best.shape, dtype=np.int64)
        for i, row in enumerate(cost):
            found = row + error[i][:, None]
            np.copyto(place, i, where=found < best)
            np.minimum(best, found, out=best)
        places.append((place, least))
        cost = best
    number = x.size - drop
    last = _sheared(cost, at[-1], least, number, number)[:, 0]
    if not last.min() < np.inf:
        return None, True
    cuts = [int(at[-1][last.argmin()])]
    for window, (place, fewest) in zip(at[-2::-1], places[::-1], strict=True):
        number = cuts[-1] - number  # of dropped values before the cut for kept ones, or the reverse
        now = cuts[-1] - int(at[-len(cuts)][0])
        cuts.append(int(window[place[now, number - fewest]]))
    return np.array(cuts[::-1]), True


def _sheared(table: Floats, positions: Ints, base: int, least: int, most: int) -> Floats:
    """From columns for base, base + 1, … of the values before each position to columns for least
    to most of the others.
    """
    column = positions[:, None] - np.arange(least, most + 1) - base
    inside = (column >= 0) & (column < table.shape[1])
    rows = np.arange(positions.size)[:, None]
    return np.where(inside, table[rows, np.where(inside, column, 0)], np.inf)
