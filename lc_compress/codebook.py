"""Codebooks: every weight is one of K values, learned (`KMeans`) or given (`FixedCodebook`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .coding import Fixed, Raw
from .part import Field, Ops, Part, check_value_dtype, rounded, working

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_TINY = 1e-300  # a divisor for a mass that cancelled to zero
_GRID = 64  # positions per cluster on the coarsest grid
_FINER = 8  # times as many on the next
_TABLE = 1 << 14  # up to this many candidates a whole table is faster than the bisection
_CHUNK = 1 << 16  # candidates evaluated at once: their temporaries stay in the cache


@dataclass(frozen=True, eq=False)
class CodebookState:
    """codebook (K,), in the weights' dtype, ascending until it is trained; codes, in their shape.

    Codes are uint8 for K <= 256, else int64.
    """

    codebook: Tensor
    codes: Tensor


@dataclass(frozen=True)
class KMeans(Part[CodebookState]):
    """Weights that take at most k learned values.

    Solves   min Σ h (w − c[q])²   over c (k,), q of w's shape in {0 … k − 1}
    to the global optimum, with importance too. In one dimension the optimal clusters are intervals
    of the sorted weights, so the problem is a shortest path over the cuts between them,
    D_j(i) = min_t D_{j−1}(t) + cost(t, i),  and the best t does not decrease with i: each D_j is
    found by bisection over i (dynamic programme of Wu and Rokne, papers/learning-compression.md,
    section 3), first on a coarse grid of cuts, which bounds where the optimal ones can be. Equal
    weights are merged; of equally good cuts the first is taken. A warm start is not needed.

    Weights without importance do not influence the codebook; if none has any, all count the same.
    At the end every weight gets its nearest codeword, the lower code in a tie. With fewer than k
    distinct weights the last codeword is repeated and Δ = w.

    Exact up to rounding: sums carry a relative error of about 1e-16 Σ h (w − median)², and the
    optimal centres are rounded to the weights' dtype and to `value_dtype`. Among codebooks of half
    precision another one may then be slightly better; with a `value_dtype` the part does not claim
    to be exact.

    Args:
        k: number of codewords, at least 1.
        value_dtype: how the codebook is stored; None: in the weights' dtype.

    State:
        codebook (k,), ascending, in w's dtype; codes of w's shape.

    Cost: O(N log N) to sort, at most O(k N log N) for the cuts and usually far less than the
    sorting; on the CPU. Memory O(N) and as much as 16 k N bytes where the grid excludes no cut.
    Stores N ceil(log2 k) bits and k floats.

    Raises:
        ValueError: `k` < 1, or a `value_dtype` that is not floating point.
    """

    k: int
    value_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_value_dtype(self, self.value_dtype)
        if self.k < 1:
            raise ValueError(f"{self}: k must be >= 1.")

    @property
    def exact(self) -> bool:
        return self.value_dtype is None

    @property
    def exact_weighted(self) -> bool:
        return self.value_dtype is None

    @property
    def free(self) -> tuple[str, ...]:
        return ("codebook",)

    def solve(
        self, w: Tensor, warm: CodebookState | None, mu: float | None, importance: Tensor | None
    ) -> CodebookState:
        x = working(w).detach().reshape(-1).cpu().numpy()
        h = None
        if importance is not None and bool(importance.any()):
            h = importance.detach().double().expand(w.shape).reshape(-1).cpu().numpy()
        centres = torch.from_numpy(optimal_centres(x, h, self.k)).to(w.device)
        codebook = rounded(centres, w.dtype, self.value_dtype)
        return CodebookState(codebook, nearest(w, codebook))

    def reconstruct(self, state: CodebookState) -> Tensor:
        return state.codebook[state.codes.long()]

    def encode(self, state: CodebookState) -> dict[str, Field]:
        stored = self.value_dtype or state.codebook.dtype
        return {
            "codebook": Field(state.codebook.to(stored), Raw(stored)),
            "codes": Field(state.codes, _code(self.k), per_weight=True),
        }

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> CodebookState:
        codes = _checked_codes(self, arrays["codes"], self.k)
        return CodebookState(arrays["codebook"].to(dtype), codes.reshape(shape))

    def free_shapes(self, shape: torch.Size, arrays: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {"codebook": torch.Size((self.k,))}

    def admits(self, state: CodebookState) -> bool:
        c = state.codebook
        return c.shape == (self.k,) and torch.equal(rounded(c, c.dtype, self.value_dtype), c)

    def ops(self, state: CodebookState, positions: int = 1) -> Ops:
        return _codebook_ops(state, self.k, positions)


@dataclass(frozen=True)
class FixedCodebook(Part[CodebookState]):
    """Weights that take given values.

    Solves   min Σ h (w − c[q])²   over q of w's shape
    exactly, whatever the importance: the nearest value, the lower one in a tie
    (papers/learning-compression.md, section 3). Values are first rounded to w's dtype, those beyond
    its range to its largest number.

    Args:
        values: the codebook, at least one finite number; sorted, repeats dropped.

    State:
        codes of w's shape; the codebook in w's dtype, which is not stored: it is the part's own.

    Cost: O(N log K). Stores N ceil(log2 K) bits.

    Raises:
        ValueError: no value, or one that is NaN or inf.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        values = [float(value) for value in self.values]
        if not values or not all(math.isfinite(value) for value in values):
            raise ValueError(f"{self}: values must be finite numbers, at least one.")
        # + 0.0 turns −0.0 into 0.0
        object.__setattr__(self, "values", tuple(sorted({value + 0.0 for value in values})))

    @property
    def exact(self) -> bool:
        return True

    @property
    def exact_weighted(self) -> bool:
        return True

    def codebook(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The values (K,) as weights of this dtype can take them."""
        return rounded(torch.tensor(self.values, dtype=torch.float64), dtype, None).to(device)

    def solve(
        self, w: Tensor, warm: CodebookState | None, mu: float | None, importance: Tensor | None
    ) -> CodebookState:
        codebook = self.codebook(w.dtype, w.device)
        return CodebookState(codebook, nearest(w, codebook))

    def reconstruct(self, state: CodebookState) -> Tensor:
        return state.codebook[state.codes.long()]

    def encode(self, state: CodebookState) -> dict[str, Field]:
        return {"codes": Field(state.codes, _code(len(self.values)), per_weight=True)}

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> CodebookState:
        codes = _checked_codes(self, arrays["codes"], len(self.values))
        return CodebookState(self.codebook(dtype, codes.device), codes.reshape(shape))

    def admits(self, state: CodebookState) -> bool:
        c = state.codebook
        return torch.equal(c, self.codebook(c.dtype, c.device))

    def ops(self, state: CodebookState, positions: int = 1) -> Ops:
        return _codebook_ops(state, len(self.values), positions)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Codes, of x's shape, of the nearest entries of an ascending codebook (K,).

    The lowest code in a tie, also among equal entries.
    """
    c = codebook.double()
    middles = c[:-1] / 2 + c[1:] / 2  # halved before the sum: it may overflow
    codes = torch.bucketize(x.double().contiguous(), middles, out_int32=True)
    return codes.to(torch.uint8 if codebook.numel() <= 256 else torch.int64)


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


def _code(k: int) -> Fixed:
    return Fixed((k - 1).bit_length())


def _checked_codes(part: object, codes: Tensor, k: int) -> Tensor:
    if codes.numel() and int(codes.max()) >= k:
        raise ValueError(f"{part}: damaged codes, they must be below {k}, found {codes.max()}.")
    return codes


def _codebook_ops(state: CodebookState, k: int, positions: int) -> Ops:
    """Each output adds up its inputs by code, one addition per weight, then scales the k sums."""
    rows = state.codes.shape[0] if state.codes.dim() > 1 else 1
    return Ops(positions * k * rows, positions * state.codes.numel())
