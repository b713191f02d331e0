"""Trimmed k-means in one dimension: centres for all but the values farthest from them."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .clustering import optimal_centres
from .intervals import error_between
from .ordered import Floats, Ints, Ordered, ascending, union
from .windows import ROUNDING, Windows, counted, refined, split

_GRID = 320  # positions on the first grid, about; all of them if there are fewer
_PER_CLUSTER = 20  # and at least so many for each cluster
_WORK = 1 << 23  # pairs of cuts that are compared, in all
_LARGEST = 1 << 20  # of them in one table
_COUNTED = 1 << 22  # pairs of cuts times numbers of dropped values
_PRICES = 24  # prices tried on one grid
_RADII = 15  # tried at once
_SWEEPS = 300  # of the alternation, at most


@dataclass(frozen=True)
class Trimmed:
    """k centres (k,), ascending; what they cost, and what any centres cost at least."""

    centres: Floats
    value: float
    bound: float
    certain: bool


def trimmed_centres(
    x: Tensor,
    k: int,
    *,
    drop: int | None = None,
    price: float | None = None,
    warm: Floats | None = None,
    work: float = 1.0,
) -> Trimmed:
    """Centres c (k,) that minimise Σ min_j (x − c_j)² over all but the `drop` values farthest from
    them, or over all that cost less than `price`, which the others cost.

    Exact where a dynamic programme over the cuts can afford it, which is so for most weights of any
    number; `certain` says whether. If not, the best clusters found, which an alternation does not
    improve, and a bound.

    The programme. The best clusters hold all values within some distance of a centre, so each is a
    range of the sorted values, and what is dropped lies between them. To drop a value at a price
    makes a shortest path of them, over the cuts between clusters and dropped values, and at any
    price p its length less p · drop bounds the error of clusters that drop that many from below.
    Cuts are first allowed on a coarse grid. What it costs at most to move a cut onto it is known
    (`Windows.block_costs`), so positions whose paths are longer than what was found are no cuts of
    optimal clusters; a finer grid looks between those that are left, until they are single values.
    Of these few a programme that counts dropped values finds the best (`counted`). Where a finer
    grid would not help, as no price makes the bound large enough, the positions of one cut are
    looked at in two halves, each with a price of its own: branch and bound.

    Args:
        x: values (n,), finite.
        drop, price: exactly one; 0 <= drop < n, or a price > 0.
        warm: centres (k,) to start from; the value is not above theirs.
        work: factor on the number of cuts that may be compared.

    Cost: O(n log n) to sort, one pass for sums, and at most 2^23 · work pairs of cuts; 2^16 sums
        and 2^23 · work errors are kept, next to a copy of the values.
    """
    if x.device.type != "cpu":
        x = torch.sort(x).values.cpu()
    values = ascending(x, None)
    centres = values.distinct(k)
    if centres is not None:
        return Trimmed(np.pad(centres, (0, k - centres.size), mode="edge"), 0.0, 0.0, True)
    exponent = values.scale()
    with np.errstate(over="ignore", under="ignore"):
        limit = None if price is None else float(np.ldexp(price, -2 * exponent))
        start = None if warm is None else np.ldexp(np.sort(warm), -exponent)
        trimming = Trimming(Ordered(values), k, drop, limit, work)
        best = trimming.solve(start)
        value, bound = np.ldexp([best.value, trimming.bound], 2 * exponent).tolist()
        centres = np.ldexp(best.centres, exponent)
    return Trimmed(centres, value, bound, trimming.certain)


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of consecutive values, their cuts (2 k,) starts and stops in turn, with centres (k,)
    ascending; the rest is dropped. `value` is their error, plus the price of what is dropped, up to
    `noise`.
    """

    cuts: Ints
    centres: Floats
    value: float
    noise: float


class Node(NamedTuple):
    """Windows to look at, their grid, and a price to begin with."""

    positions: Ints
    low: Ints
    high: Ints
    price: float


class Trimming:
    """The problem for sorted values; `bound` is what clusters cost at least, as far as known."""

    def __init__(
        self, x: Ordered, k: int, drop: int | None, price: float | None, work: float
    ) -> None:
        assert (drop is None) != (price is None)
        self.x, self.k, self.work = x, k, work
        self.drop, self.price = drop, price
        self.values = x.values(np.arange(x.size))
        self.bound = 0.0
        self.certain = False

    def solve(self, warm: Floats | None) -> Clusters:
        """The best clusters found."""
        if warm is None:  # the middles of k equal shares
            share = (np.arange(self.k) + 0.5) / self.k
            warm = self.values[(share * self.x.size).astype(np.int64)]
        best = self._search(self.descend(warm, 10))
        if self.certain:
            return best
        starts = [best.centres, self._clustered(self.values)]
        if self.drop is not None:  # without those that are farthest out
            far = np.abs(self.values - self.x.shift)
            near = np.partition(far, far.size - self.drop - 1)[far.size - self.drop - 1]
            starts.append(self._clustered(self.values[far <= near]))
        best = min((self.descend(centres) for centres in starts), key=_value)
        self._proved(best, self.bound)
        return best

    def _clustered(self, values: Floats) -> Floats:
        """The centres of the optimal k-means of all these values."""
        return optimal_centres(torch.from_numpy(values), None, self.k)

    def _search(self, best: Clusters) -> Clusters:
        """Branch and bound from the whole range of every cut, the lowest bound first."""
        n = self.x.size
        work, number = _WORK * self.work, 0
        grid = int(min(max(_GRID, _PER_CLUSTER * self.k), (work / 2 / self.k) ** 0.5))
        if grid < 4 * self.k:
            return best
        positions = np.arange(n + 1)
        if n > grid:
            even = np.linspace(0, n, grid // 2 + 1).astype(np.int64)
            positions = union(even, self.x.even_grid(grid // 2))
        price = self._radius(best) ** 2 if self.price is None else self.price
        low = np.zeros(2 * self.k, dtype=np.int64)
        todo = [(0.0, 0, Node(positions, low, np.full_like(low, n), price))]
        while todo and not self._proved(best, todo[0][0]):
            windows = refined(self.x, *todo[0][2])
            work -= windows.pairs
            if work < 0:
                return best
            least, _, node = heapq.heappop(todo)
            if windows.largest > _LARGEST:
                halves = split(*node[:3], [])
                bound, children = least, [Node(*half, node.price) for half in halves]
            else:
                bound, best, children = self._branch(windows, node.price, best)
            for child in children:
                number += 1
                heapq.heappush(todo, (max(bound, least), number, child))
        if not todo:
            self._proved(best, best.value)
        return best

    def _proved(self, best: Clusters, bound: float) -> bool:
        self.bound = max(self.bound, min(bound, best.value))
        self.certain = best.value <= self.bound + best.noise
        return self.certain

    def _branch(
        self, windows: Windows, price: float, best: Clusters
    ) -> tuple[float, Clusters, list[Node]]:
        """A bound of what is in these windows, the best clusters so far, and what is left to look
        at.
        """
        if self.drop is None:
            cuts, error = windows.best(price)
            paths, top, fixed = [cuts], error + price * self._dropped(cuts), 0.0
        else:
            price, top, paths = self._priced(windows, price, self.drop)
            fixed = price * self.drop
        best = min([best, *(self._from(cuts) for cuts in paths)], key=_value)
        through = windows.through(price)
        bound = min(float(least.min()) for least in through) - fixed
        found = windows.narrowed(through, best.value + fixed, self.drop is not None)
        if found is None:
            return bound, best, []
        low, high = found
        worst = windows.worst(price)
        if worst == 0:  # every position is on the grid
            if self.drop is None:
                return bound, min(best, self._clusters(paths[0]), key=_value), []
            last, done = counted(self.x, low, high, self.drop, _COUNTED)
            if last is not None:
                best = min(best, self._clusters(last), key=_value)
            if done:
                return bound, best, []
        elif self.drop is None or top - bound > (best.value - top) / 2:
            # the bound lacks more because of the grid than because of the price
            finer = windows.finer(low, high, price, worst / 16)
            return bound, best, [Node(finer, low, high, price)]
        positions = windows.finer(low, high, price, np.inf)
        halves = split(positions, low, high, paths)
        return bound, best, [Node(*half, price) for half in halves]

    def _priced(self, windows: Windows, price: float, drop: int) -> tuple[float, float, list[Ints]]:
        """The price at which the bound is largest, that bound, and the best cuts on both sides.

        The bound is concave in the price, a minimum of lines whose slopes are the numbers of values
        that some cuts drop beyond `drop`. So where the lines on both sides of its top meet is the
        next price.
        """
        best = -np.inf, price
        sides: dict[bool, tuple[float, int, float, Ints]] = {}
        expected = np.inf
        for _ in range(_PRICES):
            cuts, error = windows.best(price)
            more = self._dropped(cuts) - drop
            bound = error + price * more
            best = max(best, (bound, price))
            if more == 0 or bound >= expected - 1e-13 * abs(expected):
                sides[more > 0] = price, more, error, cuts
                break
            sides[more > 0] = price, more, error, cuts
            if len(sides) < 2:
                price *= 2.0 if more > 0 else 0.5
                continue
            (_, above, small, _), (_, below, large, _) = sides[True], sides[False]
            price = (large - small) / (above - below)
            expected = small + price * above
        return best[1], best[0], [cuts for *_, cuts in sides.values()]

    # ------------------------------------------------------------------ clusters

    def _dropped(self, cuts: Ints) -> int:
        return self.x.size - int((cuts[1::2] - cuts[::2]).sum())

    def _clusters(self, cuts: Ints, otherwise: Floats | None = None) -> Clusters:
        """With the best centres; `otherwise` (k,) for empty clusters, or the value there."""
        sums = self.x.sums(cuts)
        starts, stops = sums[:, ::2], sums[:, 1::2]
        mass, first, _ = stops - starts
        if otherwise is None:
            otherwise = self.values[np.minimum(cuts[::2], self.x.size - 1)]
        centres = np.where(mass > 0, self.x.shift + first / np.maximum(mass, 1), otherwise)
        value = float(error_between(starts, stops).sum())
        noise = ROUNDING * float(np.abs(sums[2]).sum())
        if self.price is not None:
            value += self.price * self._dropped(cuts)
            noise += 1e-15 * self.price * self.x.size
        return Clusters(cuts, np.maximum.accumulate(centres), value, noise)

    def _from(self, cuts: Ints) -> Clusters:
        """Descended a little from these."""
        return self.descend(self._clusters(cuts).centres, 3)

    def _radius(self, clusters: Clusters) -> float:
        """The largest distance of a kept value from its centre."""
        starts, stops = clusters.cuts[::2], clusters.cuts[1::2]
        c, last = clusters.centres, self.x.size - 1
        inner = np.maximum(c - self.values[np.minimum(starts, last)], self.values[stops - 1] - c)
        return float(inner[stops > starts].max(initial=0.0))

    # ------------------------------------------------------------------ alternation

    def descend(self, centres: Floats, sweeps: int = _SWEEPS) -> Clusters:
        """From these centres, ascending: keep the values near them and move each centre to their
        mean, as long as that lowers the value.
        """
        best = self._clusters(self._nearest(centres), centres)
        for _ in range(sweeps - 1):
            new = self._clusters(self._nearest(best.centres), best.centres)
            if not new.value < best.value:
                break
            best = new
        return best

    def _nearest(self, centres: Floats) -> Ints:
        """The cuts (2 k,) around the values to keep with these centres."""
        n, x = self.x.size, self.values
        middles = np.searchsorted(x, centres[:-1] / 2 + centres[1:] / 2, side="right")
        left, right = np.append(0, middles), np.append(middles, n)
        inner = np.clip(np.searchsorted(x, centres), left, right)

        def within(radii: Floats) -> Ints:  # (r,) -> (r, 2 k)
            cuts = np.empty((radii.size, 2 * self.k), dtype=np.int64)
            reach = radii[:, None]
            np.clip(np.searchsorted(x, centres - reach), left, inner, out=cuts[:, ::2])
            stops = np.searchsorted(x, centres + reach, side="right")
            np.clip(stops, inner, right, out=cuts[:, 1::2])
            return cuts

        if self.price is not None:
            return within(np.array([self.price**0.5])).reshape(-1)
        ends = np.stack((np.repeat(inner, 2), np.stack((left, right), 1).reshape(-1)))
        return self._of_number(within, ends, centres)

    def _of_number(self, within: Callable[[Floats], Ints], ends: Ints, centres: Floats) -> Ints:
        """The cuts `within` a radius that keeps the right number of values, some of those that tie.

        ends (2, 2 k): with a radius too small and one too large.
        """
        x, keep = self.values, self.x.size - (self.drop or 0)
        low, high = 0.0, float(x[-1] - x[0])
        while True:
            few, many = ends[0], ends[1]
            least, most = (ends[:, 1::2] - ends[:, ::2]).sum(1).tolist()
            step = (high - low) / (_RADII + 1)
            if most - least <= 16 * self.k + 64 or not low < low + step < high - step < high:
                break
            radii: Floats = low + step * np.arange(1.0, _RADII + 1)
            cuts = within(radii)
            i = int(((cuts[:, 1::2] - cuts[:, ::2]).sum(1) < keep).sum())
            ends = np.stack((cuts[i - 1] if i else few, cuts[i] if i < _RADII else many))
            low, high = radii[i - 1] if i else low, radii[i] if i < _RADII else high
        # of the values between both, those that are nearest; in each list outwards
        lists = [np.arange(a, b, -1) - 1 for a, b in zip(few[::2], many[::2], strict=True)]
        lists += [np.arange(a, b) for a, b in zip(few[1::2], many[1::2], strict=True)]
        at = np.concatenate(lists)
        which = np.repeat(np.arange(2 * self.k), [a.size for a in lists])
        distance = np.abs(x[at] - centres[which % self.k])
        taken = which[np.argsort(distance, kind="stable")[: keep - least]]
        more = np.bincount(taken, minlength=2 * self.k)
        found: Ints = few.copy()
        found[::2] -= more[: self.k]
        found[1::2] += more[self.k :]
        return found


def _value(clusters: Clusters) -> float:
    return clusters.value
