"""THE table: every part configuration with its declared facts, and the brute force behind them.

A new part is a new row. Each row runs through every property of `lc_compress.testing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from lc_compress.binary import Binary, Ternary
from lc_compress.codebook import FixedCodebook, KMeans, PowersOfTwo
from lc_compress.compose import QuantizedThenPruned, each
from lc_compress.fixed_point import FixedPoint
from lc_compress.formats import Int
from lc_compress.hbfp import HBFP
from lc_compress.l1 import L1Ball, L1Penalty
from lc_compress.low_rank import LowRank
from lc_compress.mx import MX
from lc_compress.nm import NM
from lc_compress.rank_selection import RankSelection
from lc_compress.scaled import ScaledCodebook
from lc_compress.sparse import Sparse, SparsePenalty
from lc_compress.structured import BlockPenalty, BlockSparse, GroupL2Penalty
from lc_compress.testing import (
    Brute,
    Case,
    Shape,
    flip_signs,
    gaussian,
    negate,
    permute,
    permute_axes,
    rescale,
    rotate,
    zero,
)
from lc_compress.views import KernelMatrix, Matrix, Vector

BF16 = torch.bfloat16
CODEBOOK = (-1.0, 0.0, 0.5)
SMALL: Shape = (2, 3)  # for four classes a weight
KERNELS: tuple[Shape, ...] = ((4, 3, 2, 2), (2, 5, 1, 3), (1, 1, 1, 1))

# ------------------------------------------------------------------ brute force
#
# Every weight is put in one of a few classes: a level, or "corrected" (stored exactly, at a price
# or within a budget). All assignments are tried, so no theorem about them is assumed; given one,
# the best scale or centres are weighted means.

Fit = Callable[[Tensor, Tensor, Tensor], Tensor]  # w (n,), importance (rows, n), classes -> errors


@lru_cache(maxsize=16)
def assignments(n: int, classes: int) -> Tensor:
    """All ways to put n weights in classes: (classesⁿ, n)."""
    return torch.arange(classes**n)[:, None] // classes ** torch.arange(n) % classes


def scaled(*levels: float) -> Fit:
    """Σ h (w − a t)² with t from the levels and the best common a."""

    def fit(w: Tensor, h: Tensor, classes: Tensor) -> Tensor:
        t = torch.tensor(levels, dtype=torch.float64)[classes]
        return (h * (w - ratio((h * t * w).sum(1), (h * t * t).sum(1)) * t) ** 2).sum(1)

    return fit


def fixed(*levels: float) -> Fit:
    """Σ h (w − t)² with t from the levels."""

    def fit(w: Tensor, h: Tensor, classes: Tensor) -> Tensor:
        return (h * (w - torch.tensor(levels, dtype=torch.float64)[classes]) ** 2).sum(1)

    return fit


def centres(k: int) -> Fit:
    """Σ h (w − c)² with the best c for each of k classes."""

    def fit(w: Tensor, h: Tensor, classes: Tensor) -> Tensor:
        errors = []
        for j in range(k):
            mass = h * (classes == j)
            errors.append((mass * (w - ratio((mass * w).sum(1), mass.sum(1))) ** 2).sum(1))
        return torch.stack(errors).sum(0)

    return fit


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b as a column, 0 where b is."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)[:, None]


def brute(
    fit: Fit,
    classes: int,
    *,
    nonzeros: int | None = None,
    density: float | None = None,
    alpha: float | None = None,
) -> Brute:
    """The least objective over all assignments, with corrections if one of the last is given."""
    corrections = (nonzeros, density, alpha) != (None, None, None)

    def least(w: Tensor, importance: Tensor, mu: float) -> float:
        w, importance = w.flatten(), importance.flatten()
        classes_of = assignments(w.numel(), classes + corrections)
        corrected = classes_of == classes
        h = importance * ~corrected
        count = corrected.sum(1)
        value = mu / 2 * fit(w, h, classes_of.clamp(max=classes - 1)) + (alpha or 0.0) * count
        budget = round(density * w.numel()) if density is not None else nonzeros
        return float(value[count <= (w.numel() if budget is None else budget)].min())

    return least


def blockwise(inner: Brute, split: Callable[[Tensor], tuple[Tensor, ...]]) -> Brute:
    """The sum of independent problems."""

    def least(w: Tensor, importance: Tensor, mu: float) -> float | None:
        total = 0.0
        for block, weights in zip(split(w), split(importance), strict=True):
            value = inner(block, weights, mu)
            if value is None:
                return None
            total += value
        return total

    return least


def rows(w: Tensor) -> tuple[Tensor, ...]:
    return tuple(w)


def fives(w: Tensor) -> tuple[Tensor, ...]:
    return tuple(w.flatten().split(5))


def spectrum(rank: int, show: Callable[[Tensor], Tensor] = lambda w: w) -> Brute:
    """The tail of the spectrum; with unequal importance the problem is NP-hard."""

    def least(w: Tensor, importance: Tensor, mu: float) -> float | None:
        if rank == 0:
            return mu / 2 * float((importance * w**2).sum())
        if not bool((importance == importance.flatten()[0]).all()):
            return None
        tail = torch.linalg.svdvals(show(w))[rank:]
        return mu / 2 * float((tail**2).sum() * importance.flatten()[0])

    return least


Cost = Callable[[Tensor], Tensor]  # what is not zero, (rows, *shape) -> (rows,); inf: not allowed


def supports(cost: Cost, fit: Fit | None = None, levels: int = 0) -> Brute:
    """The least objective over all supports; on one every weight is kept, or takes one of the
    levels of `fit`, which has a class of zeros after them.
    """
    inner = fit or fixed(0)

    def least(w: Tensor, importance: Tensor, mu: float) -> float:
        classes = assignments(w.numel(), levels + 1 if levels else 2)
        kept = classes < levels if levels else classes == 1
        h = importance.flatten() * (torch.ones_like(kept) if levels else ~kept)
        error = inner(w.flatten(), h, classes if levels else torch.zeros_like(classes))
        return float((mu / 2 * error + cost(kept.view(-1, *w.shape))).min())

    return least


def within(count: Tensor, budget: int) -> Tensor:
    return torch.where(count <= budget, 0.0, torch.inf)


def at_most(nonzeros: int) -> Cost:
    return lambda kept: within(kept.flatten(1).sum(1), nonzeros)


def n_of_m(n: int, m: int, axis: int = -1) -> Cost:
    return lambda kept: torch.stack(
        [within(g.sum(axis, True), n).flatten(1).sum(1) for g in kept.split(m, axis)]
    ).sum(0)


def row_count(kept: Tensor) -> Tensor:
    """How many rows are not zero."""
    return kept.flatten(2).any(2).sum(1)


def l1_ball(radius: float, *levels: float) -> Brute:
    """All codes and, for what they leave, all supports of θ: on the best one the norm is the
    radius, unless all of it is inside. Weights without importance are left out.
    """

    def least(w: Tensor, importance: Tensor, mu: float) -> float:
        counts = importance.flatten() > 0
        w, h = w.flatten()[counts], importance.flatten()[counts]
        codes = torch.tensor(levels or (0.0,), dtype=torch.float64)
        d = (w - codes[assignments(w.numel(), codes.numel())]).abs()  # (codes, n)
        best = torch.where(d.sum(1) <= radius, 0.0, (h * d**2).sum(1))
        for support in assignments(w.numel(), 2)[1:].bool():
            inside = d[:, support]
            shrink = 1 / h[support]
            theta = inside - ((inside.sum(1, True) - radius) / shrink.sum()) * shrink
            error = (h * d**2).sum(1) - (h[support] * (inside**2 - (inside - theta) ** 2)).sum(1)
            best = torch.where((theta >= 0).all(1), torch.minimum(best, error), best)
        return mu / 2 * float(best.min())

    return least


def l1_penalty(alpha: float, *levels: float) -> Brute:
    """All codes; each θ is zero or a stationary point on its weight's side."""

    def least(w: Tensor, importance: Tensor, mu: float) -> float:
        w, h = w.flatten(), importance.flatten() * mu
        codes = torch.tensor(levels or (0.0,), dtype=torch.float64)
        d = (w - codes[assignments(w.numel(), codes.numel())]).abs()
        theta = d - alpha / h
        cost = torch.where(theta > 0, alpha**2 / h / 2 + alpha * theta, torch.inf)
        return float(torch.minimum(h / 2 * d**2, cost).sum(1).min())

    return least


def group_l2(alpha: float) -> Brute:
    """For each row the least over t of the price written as α √n (‖θ‖²/t + t)/2, quadratic in θ."""

    def least(w: Tensor, importance: Tensor, mu: float) -> float:
        total = 0.0
        for row, weights in zip(w, importance * mu, strict=True):
            price, a = alpha * row.numel() ** 0.5, weights * row**2
            if price == 0:
                continue

            def value(t: float, h: Tensor = weights, a: Tensor = a, price: float = price) -> float:
                return float((a * price / (h * t + price)).sum() + price * t) / 2

            high = max(float(row.norm()), 1e-300)
            found = minimize_scalar(
                value, bounds=(0, high), method="bounded", options={"xatol": 1e-13 * high}
            )
            total += min(float(found.fun), value(0.0), value(high))
        return total

    return least


def priced_spectrum(
    alpha: float,
    cost: Callable[[int, int, int], float],
    *shows: Callable[[Tensor], Tensor],
) -> Brute:
    """The least price plus tail of the spectrum over all ranks and schemes; as `spectrum`."""

    def least(w: Tensor, importance: Tensor, mu: float) -> float | None:
        h = importance.flatten()
        if not bool((h == h[0]).all()):
            return None
        values = []
        for matrix in [show(w) for show in shows]:
            s = torch.linalg.svdvals(matrix)
            for r in range(len(s) + 1):
                tail = float((s[r:] ** 2).sum() * h[0])
                values.append(mu / 2 * tail + alpha * cost(r, *matrix.shape))
        return min(values)

    return least


def as_it_is(w: Tensor) -> Tensor:
    return w


def as_rows(w: Tensor) -> Tensor:
    return w.flatten(1)


def as_kernels(w: Tensor) -> Tensor:
    return w.transpose(1, 2).flatten(2).flatten(0, 1)


def stored(rank: int, rows: int, columns: int) -> float:
    return rank * (rows + columns)


def stairs(rank: int, rows: int, columns: int) -> float:
    """A cost with steps, as measured times have: ranks of odd size gain nothing."""
    return 3 + (rank + 1) // 2 * (rows + columns)


binary = brute(scaled(-1, 1), 2)
ternary = brute(scaled(-1, 0, 1), 3)

# ------------------------------------------------------------------ the table


def slow(case: Case) -> Case:
    """Fewer weights, for sums whose alternation takes many sweeps; on ties it takes most."""
    return replace(
        case,
        shapes=tuple(dict.fromkeys((case.shapes[0], case.shapes[-1]))),
        kinds=(gaussian, zero),
        dtypes=(torch.float64, torch.bfloat16),
    )


ANY_ORDER = (permute, negate, rescale)
ANY_SIGN = (*ANY_ORDER, flip_signs)

LEAVES = [
    Case(Binary(), cone=True, symmetries=ANY_SIGN, brute=binary),
    Case(
        Binary(axis=0),
        cone=True,
        symmetries=(permute_axes, negate, flip_signs, rescale),
        brute=blockwise(binary, rows),
    ),
    Case(
        Binary(group=5),
        cone=True,
        symmetries=(negate, flip_signs, rescale),
        brute=blockwise(binary, fives),
    ),
    Case(Binary(value_dtype=BF16), cone=True, symmetries=ANY_SIGN, brute=binary, value_dtype=BF16),
    Case(Ternary(), cone=True, symmetries=ANY_SIGN, brute=ternary),
    Case(
        Ternary(axis=0),
        cone=True,
        symmetries=(permute_axes, negate, flip_signs, rescale),
        brute=blockwise(ternary, rows),
    ),
    Case(
        Ternary(group=5),
        cone=True,
        symmetries=(negate, flip_signs, rescale),
        brute=blockwise(ternary, fives),
    ),
    Case(
        Ternary(value_dtype=BF16), cone=True, symmetries=ANY_SIGN, brute=ternary, value_dtype=BF16
    ),
    *(
        Case(
            KMeans(k),
            cone=True,
            symmetries=ANY_ORDER,
            brute=brute(centres(k), k),
            brute_shape=SMALL,
        )
        for k in (1, 2, 4)
    ),
    Case(
        KMeans(4, value_dtype=BF16),
        cone=True,
        symmetries=ANY_ORDER,
        brute=brute(centres(4), 4),
        brute_shape=SMALL,
        value_dtype=BF16,
    ),
    Case(FixedCodebook(CODEBOOK), symmetries=(permute,), brute=brute(fixed(*CODEBOOK), 3)),
    Case(FixedCodebook((0.25,)), symmetries=(permute,), brute=brute(fixed(0.25), 1)),
    *(
        Case(
            LowRank(rank),
            cone=True,
            symmetries=(negate, rescale, permute_axes, rotate),
            brute=spectrum(rank),
            brute_shape=(4, 5),
        )
        for rank in (0, 2, 99)
    ),
    *(
        Case(
            RankSelection(alpha),
            symmetries=(negate, permute_axes, rotate),
            brute=priced_spectrum(alpha, stored, as_it_is),
            brute_shape=(4, 5),
            mu=mu,
        )
        for alpha, mu in ((0.1, 2.0), (0.0, 1.0), (9.0, 1.0))
    ),
    Case(
        RankSelection(0.1, cost=stairs),
        brute=priced_spectrum(0.1, stairs, as_it_is),
        brute_shape=(4, 5),
        mu=2.0,
    ),
    Case(
        RankSelection(0.02, cost="flops", positions=3, schemes=(Matrix(), KernelMatrix())),
        shapes=KERNELS,
        symmetries=(negate, permute_axes),
        brute=priced_spectrum(0.06, stored, as_rows, as_kernels),
        brute_shape=(2, 3, 2, 2),
        mu=2.0,
    ),
    Case(RankSelection(0.1, value_dtype=BF16), mu=2.0, value_dtype=BF16),
    *(
        Case(
            Sparse(nonzeros=count),
            cone=True,
            symmetries=ANY_SIGN,
            brute=brute(fixed(0), 1, nonzeros=count),
        )
        for count in (0, 1, 4, 48, 999)  # 48 = full in the first of the default shapes
    ),
    Case(
        Sparse(density=0.3), cone=True, symmetries=ANY_SIGN, brute=brute(fixed(0), 1, density=0.3)
    ),
    Case(
        Sparse(nonzeros=4, value_dtype=BF16),
        symmetries=ANY_SIGN,
        brute=brute(fixed(0), 1, nonzeros=4),
        value_dtype=BF16,
    ),
    Case(Sparse(nonzeros=4, value_dtype=torch.float16), value_dtype=torch.float16),
    Case(Binary(value_dtype=torch.float16), cone=True, value_dtype=torch.float16),
    *(
        Case(
            SparsePenalty(alpha),
            cone=True,
            symmetries=(permute, flip_signs),
            brute=brute(fixed(0), 1, alpha=alpha),
            mu=mu,
        )
        for alpha, mu in ((0.3, 2.0), (0.1, 0.5), (5.0, 1.0))
    ),
]

LEAVES += [
    *(
        Case(
            L1Ball(radius),
            symmetries=(permute, flip_signs),
            brute=l1_ball(radius),
            brute_shape=SMALL,
        )
        for radius in (0.0, 1.5, 999.0)
    ),
    Case(
        L1Ball(1.5, value_dtype=BF16),
        symmetries=(permute, flip_signs),
        brute=l1_ball(1.5),
        brute_shape=SMALL,
        value_dtype=BF16,
    ),
    *(
        Case(
            L1Penalty(alpha, value_dtype=stored),
            symmetries=(permute, flip_signs),
            brute=l1_penalty(alpha),
            mu=mu,
            value_dtype=stored,
        )
        for alpha, mu, stored in (
            (0.3, 2.0, None),
            (0.1, 0.5, None),
            (0.0, 1.0, None),
            (0.3, 2.0, BF16),
        )
    ),
    *(
        Case(
            NM(n, m),
            cone=True,
            symmetries=(negate, flip_signs, rescale),
            brute=supports(n_of_m(n, m)),
        )
        for n, m in ((2, 4), (1, 3), (0, 2), (2, 2), (3, 40))
    ),
    Case(
        NM(1, 2, axis=0),
        cone=True,
        symmetries=(negate, flip_signs, rescale),
        brute=supports(n_of_m(1, 2, 1)),
        brute_shape=(4, 1),
    ),
    Case(
        NM(2, 4, axis=1),
        shapes=KERNELS,
        cone=True,
        symmetries=(negate, flip_signs, rescale),
    ),
    Case(
        NM(2, 4, value_dtype=BF16),
        symmetries=(negate, flip_signs, rescale),
        brute=supports(n_of_m(2, 4)),
        value_dtype=BF16,
    ),
    *(
        Case(
            BlockSparse(blocks=count, axis=0),
            cone=True,
            symmetries=(permute_axes, negate, flip_signs, rescale),
            brute=supports(lambda kept, count=count: within(row_count(kept), count)),
        )
        for count in (0, 1, 99)
    ),
    Case(
        BlockSparse(density=0.5, axis=-1),
        cone=True,
        symmetries=(permute_axes, negate, flip_signs, rescale),
    ),
    Case(BlockSparse(blocks=2, axis=1), shapes=KERNELS, cone=True, symmetries=(negate, rescale)),
    *(
        Case(
            BlockSparse(blocks=3, block=block),
            cone=True,
            symmetries=(negate, flip_signs, rescale),
        )
        for block in ((2, 4), (4, 3))
    ),
    Case(
        BlockSparse(blocks=1, axis=0, value_dtype=BF16),
        symmetries=(permute_axes, flip_signs),
        brute=supports(lambda kept: within(row_count(kept), 1)),
        value_dtype=BF16,
    ),
    Case(
        BlockSparse(blocks=2, axis=0, shapes=(torch.Size((2, 3)), torch.Size((3, 2, 2)))),
        shapes=((18,),),
        cone=True,
        symmetries=(negate, flip_signs, rescale),
    ),
    Case(
        BlockPenalty(0.9, axis=0),
        cone=True,
        symmetries=(permute_axes, flip_signs),
        brute=supports(lambda kept: 0.9 * row_count(kept)),
        mu=1.0,
    ),
    *(
        Case(
            GroupL2Penalty(alpha, axis=0),
            symmetries=(permute_axes, flip_signs),
            brute=group_l2(alpha),
            mu=2.0,
        )
        for alpha in (0.0, 0.4)
    ),
    Case(GroupL2Penalty(0.3, block=(4, 3), value_dtype=BF16), mu=1.0, value_dtype=BF16),
]

SKEWED = (-1.0, 0.25, 0.5)
EACH_ROW = (permute_axes, negate, flip_signs, rescale)


def zero_points(top: int) -> Brute:
    """Integers from −z to top − z times a scale, with the best z."""
    choices = [brute(scaled(*range(-z, top - z + 1)), top + 1) for z in range(top + 1)]
    return lambda w, h, mu: min(value for b in choices if (value := b(w, h, mu)) is not None)


LEAVES += [
    Case(
        Binary(scale=0.5),
        symmetries=(permute, negate, flip_signs),
        brute=brute(fixed(-0.5, 0.5), 2),
    ),
    Case(
        Ternary(scale=0.75),
        symmetries=(permute, negate, flip_signs),
        brute=brute(fixed(-0.75, 0, 0.75), 3),
    ),
    Case(
        PowersOfTwo(1),
        symmetries=(permute, negate, flip_signs),
        brute=brute(fixed(-1, -0.5, 0, 0.5, 1), 5),
        brute_shape=SMALL,
    ),
    Case(ScaledCodebook(SKEWED), cone=True, symmetries=ANY_ORDER, brute=brute(scaled(*SKEWED), 3)),
    Case(
        Int(3, axis=0),
        cone=True,
        symmetries=EACH_ROW,
        brute=blockwise(brute(scaled(*range(-3, 4)), 7), rows),
        brute_shape=SMALL,
    ),
    Case(
        Int(2, symmetric=False),
        cone=True,
        symmetries=ANY_ORDER,
        brute=zero_points(3),
        brute_shape=SMALL,
    ),
    Case(Int(4, scale="max"), symmetries=ANY_SIGN),
    *(
        slow(case)
        for case in (
            Case(
                ScaledCodebook((-3.0, -1.0, 1.0, 3.0), axis=0),
                cone=True,
                symmetries=EACH_ROW,
                brute=blockwise(brute(scaled(-3, -1, 1, 3), 4), rows),
            ),
            Case(
                ScaledCodebook((0.5, 1.0, 2.0), group=5),
                cone=True,
                symmetries=(negate, rescale),
                brute=blockwise(brute(scaled(0.5, 1, 2), 3), fives),
            ),
            Case(
                ScaledCodebook(SKEWED, value_dtype=BF16),
                cone=True,
                symmetries=ANY_ORDER,
                brute=brute(scaled(*SKEWED), 3),
                value_dtype=BF16,
            ),
            Case(
                ScaledCodebook((-0.3,)),
                cone=True,
                symmetries=ANY_ORDER,
                brute=brute(scaled(-0.3), 1),
            ),
            Case(ScaledCodebook((0.0,)), cone=True, brute=brute(scaled(0), 1)),
            Case(Int(2), cone=True, symmetries=ANY_SIGN, brute=ternary),
            Case(
                Int(3, group=5),
                cone=True,
                symmetries=(negate, flip_signs, rescale),
                brute=blockwise(brute(scaled(*range(-3, 4)), 7), fives),
                brute_shape=(1, 4),
            ),
            Case(
                Int(2, symmetric=False, axis=0),
                cone=True,
                symmetries=(permute_axes, negate, rescale),
                brute=blockwise(zero_points(3), rows),
            ),
            Case(Int(4, symmetric=False, group=5), cone=True, symmetries=(negate, rescale)),
            Case(Int(8), cone=True, symmetries=ANY_SIGN),
            Case(Int(4, value_dtype=BF16), cone=True, symmetries=ANY_SIGN, value_dtype=BF16),
            Case(Int(8, symmetric=False), symmetries=(permute, rescale)),
            Case(Int(12), symmetries=ANY_SIGN),
            Case(Int(4, symmetric=False, axis=0, scale="max"), symmetries=(permute_axes, rescale)),
        )
    ),
]

SUMS = [
    Case(
        Binary() + Sparse(nonzeros=3),
        cone=True,
        symmetries=ANY_SIGN,
        brute=brute(scaled(-1, 1), 2, nonzeros=3),
    ),
    Case(
        Sparse(density=0.25) + Binary(),
        cone=True,
        symmetries=ANY_SIGN,
        brute=brute(scaled(-1, 1), 2, density=0.25),
    ),
    Case(
        Binary(value_dtype=BF16) + Sparse(nonzeros=3, value_dtype=BF16),
        brute=brute(scaled(-1, 1), 2, nonzeros=3),
        value_dtype=BF16,
    ),
    Case(Binary(axis=0) + Sparse(nonzeros=3), symmetries=(rescale,)),
    Case(
        Binary() + SparsePenalty(0.3),
        symmetries=(permute, flip_signs),
        brute=brute(scaled(-1, 1), 2, alpha=0.3),
        mu=2.0,
    ),
    Case(
        FixedCodebook(CODEBOOK) + Sparse(nonzeros=3),
        symmetries=(permute,),
        brute=brute(fixed(*CODEBOOK), 3, nonzeros=3),
        brute_shape=SMALL,
    ),
    Case(
        FixedCodebook(CODEBOOK) + SparsePenalty(0.1),
        symmetries=(permute,),
        brute=brute(fixed(*CODEBOOK), 3, alpha=0.1),
        brute_shape=SMALL,
        mu=4.0,
    ),
    Case(
        Ternary() + Sparse(nonzeros=3),
        symmetries=(flip_signs, rescale),
        brute=brute(scaled(-1, 0, 1), 3, nonzeros=3),
        brute_shape=SMALL,
    ),
    *(
        Case(
            KMeans(k) + Sparse(nonzeros=count),
            symmetries=(permute, rescale),
            brute=brute(centres(k), k, nonzeros=count),
            brute_shape=SMALL,
        )
        for k, count in ((2, 3), (3, 2), (3, 0), (2, 999))
    ),
    Case(
        KMeans(2) + SparsePenalty(0.1),
        symmetries=(permute,),
        brute=brute(centres(2), 2, alpha=0.1),
        brute_shape=SMALL,
        mu=2.0,
    ),
    slow(Case(KMeans(3, value_dtype=BF16) + Sparse(nonzeros=3), value_dtype=BF16)),
    slow(Case(LowRank(1) + Sparse(nonzeros=5), symmetries=(rescale,))),
    slow(Case(Sparse(density=0.2, value_dtype=BF16) + LowRank(2), value_dtype=BF16)),
    slow(Case(LowRank(2, value_dtype=BF16) + Sparse(nonzeros=9), value_dtype=BF16)),
    slow(Case(LowRank(2) + SparsePenalty(0.3), mu=2.0)),
    # every start of this sum tries every rank in every sweep
    slow(Case(RankSelection(0.1) + Sparse(nonzeros=5), shapes=((3, 4), (1, 1)), mu=2.0)),
    slow(Case(Binary() + LowRank(2), symmetries=(rescale,))),
    slow(Case(Binary() + LowRank(1) + Sparse(nonzeros=3), symmetries=(rescale,))),
    slow(Case(Binary() + LowRank(1) + SparsePenalty(0.3), mu=2.0)),
    slow(Case(Binary() + LowRank(2).then(KMeans(4)) + Sparse(nonzeros=2), symmetries=(rescale,))),
]

SUMS += [
    Case(
        FixedCodebook(CODEBOOK) + L1Ball(0.7),
        symmetries=(permute,),
        brute=l1_ball(0.7, *CODEBOOK),
        brute_shape=(2, 2),
    ),
    Case(
        L1Penalty(0.2) + FixedCodebook(CODEBOOK),
        symmetries=(permute,),
        brute=l1_penalty(0.2, *CODEBOOK),
        brute_shape=SMALL,
        mu=2.0,
    ),
    Case(FixedCodebook(CODEBOOK) + NM(1, 3)),
    Case(FixedCodebook(CODEBOOK) + BlockSparse(blocks=2, axis=0), symmetries=(permute_axes,)),
    Case(FixedCodebook(CODEBOOK) + GroupL2Penalty(0.1, axis=0), mu=2.0),
    Case(Binary() + NM(1, 4), symmetries=(flip_signs, rescale)),
    slow(Case(Binary() + L1Penalty(0.3), mu=2.0)),
    slow(Case(Binary() + BlockSparse(blocks=2, axis=0), symmetries=(rescale,))),
]

COMPOSED = [
    Case(Sparse(nonzeros=10).then(KMeans(4)), symmetries=(negate, rescale)),
    Case(Sparse(nonzeros=10).then(Binary()), symmetries=(negate, flip_signs, rescale)),
    Case(Sparse(nonzeros=10).then(Binary(group=5)), symmetries=(negate, flip_signs, rescale)),
    Case(SparsePenalty(0.3).then(KMeans(2)), mu=2.0),
    Case(LowRank(2).then(KMeans(4)), symmetries=(rescale,)),
    Case(RankSelection(0.1).then(KMeans(4)), mu=2.0),
    Case(Binary(axis=0).then(KMeans(2)), symmetries=(negate, flip_signs, rescale)),
    Case(
        LowRank(1).over(Matrix()),
        shapes=KERNELS,
        cone=True,
        symmetries=(negate, rescale, permute_axes),
        brute=spectrum(1, lambda w: w.flatten(1)),
        brute_shape=(2, 3, 2, 2),
    ),
    Case(
        LowRank(1).over(KernelMatrix()),
        shapes=KERNELS,
        cone=True,
        symmetries=(negate, rescale, permute_axes),
        brute=spectrum(1, lambda w: w.transpose(1, 2).flatten(2).flatten(0, 1)),
        brute_shape=(2, 3, 2, 2),
    ),
    slow(
        Case(
            LowRank(1).over(KernelMatrix()) + Binary() + Sparse(nonzeros=3),
            shapes=KERNELS,
            symmetries=(rescale,),
        )
    ),
    slow(
        Case(
            LowRank(1).over(KernelMatrix()) + Sparse(nonzeros=5),
            shapes=KERNELS,
            symmetries=(rescale,),
        )
    ),
    slow(
        Case(
            LowRank(1).over(Matrix()) + LowRank(1).over(KernelMatrix()),
            shapes=KERNELS,
            symmetries=(rescale,),
        )
    ),
    Case(Binary().over(Vector()), cone=True, symmetries=ANY_SIGN, brute=binary),
    Case(
        Binary(axis=0).over(KernelMatrix()),
        shapes=KERNELS,
        cone=True,
        symmetries=(negate, flip_signs, rescale),
        brute=blockwise(binary, lambda w: tuple(w.transpose(1, 2).flatten(2).flatten(0, 1))),
        brute_shape=(2, 2, 2, 2),
    ),
    Case(
        each(Binary(), shapes=((2, 3), (4,), (1, 1, 5))),
        shapes=((15,),),
        cone=True,
        symmetries=(negate, flip_signs, rescale),
        brute=blockwise(binary, lambda w: w.split((6, 4, 5))),
        brute_shape=(15,),
    ),
    slow(
        Case(
            each(Binary(), shapes=((2, 3), (4,), (1, 1, 5))) + Sparse(nonzeros=3),
            shapes=((15,),),
            symmetries=(rescale,),
        )
    ),
    slow(
        Case(
            each(LowRank(1), shapes=((2, 3), (3, 3))) + Sparse(nonzeros=3),
            shapes=((15,),),
            symmetries=(rescale,),
        )
    ),
]

COMPOSED += [
    *(
        Case(
            Sparse(nonzeros=3).then(inner),
            cone=True,
            symmetries=ANY_SIGN,
            brute=supports(at_most(3), scaled(-1, 1, 0), 2),
        )
        for inner in (Binary(), Ternary())
    ),
    *(
        Case(
            NM(1, 3).then(inner),
            cone=True,
            symmetries=(negate, flip_signs, rescale),
            brute=supports(n_of_m(1, 3), scaled(-1, 1, 0), 2),
        )
        for inner in (Binary(), Ternary())
    ),
    *(
        Case(
            outer.then(FixedCodebook(levels)),
            brute=supports(cost, fixed(*levels, 0.0), len(levels)),
            brute_shape=shape,
        )
        for levels in (CODEBOOK, (-0.75, 0.5))
        for outer, cost, shape in (
            (Sparse(nonzeros=2), at_most(2), SMALL),
            (NM(1, 2), n_of_m(1, 2), SMALL),
        )
    ),
    Case(Sparse(nonzeros=10).then(Ternary(group=5)), symmetries=(negate, flip_signs, rescale)),
    Case(
        NM(2, 4).then(Binary(axis=0)),
        cone=True,
        symmetries=(negate, flip_signs, rescale),
        brute=blockwise(supports(n_of_m(2, 4), scaled(-1, 1, 0), 2), rows),
    ),
    Case(NM(2, 4).then(KMeans(4)), symmetries=(negate, rescale)),
    Case(BlockSparse(blocks=3, block=(4, 3)).then(KMeans(4)), symmetries=(negate, rescale)),
    Case(each(NM(2, 4), shapes=((2, 3), (3, 3))), shapes=((15,),), cone=True),
]

SUMS += [
    slow(Case(Int(3, axis=0) + Sparse(nonzeros=3), symmetries=(rescale,))),
    Case(
        Binary(scale=0.5) + Sparse(nonzeros=3),  # residuals of tiny weights tie: not `permute`
        symmetries=(flip_signs,),
        brute=brute(fixed(-0.5, 0.5), 2, nonzeros=3),
    ),
    Case(
        SparsePenalty(0.1) + Ternary(scale=0.75),
        symmetries=(permute, flip_signs),
        brute=brute(fixed(-0.75, 0, 0.75), 3, alpha=0.1),
        brute_shape=SMALL,
        mu=4.0,
    ),
    Case(PowersOfTwo(1) + NM(1, 3)),
]

COMPOSED += [
    Case(Sparse(nonzeros=10).then(FixedPoint(4))),
    slow(Case(Sparse(nonzeros=10).then(Int(3, group=5)), symmetries=(negate, rescale))),
    slow(Case(Sparse(nonzeros=10).then(Int(3, symmetric=False)), symmetries=(rescale,))),
    slow(Case(Sparse(nonzeros=10).then(ScaledCodebook(SKEWED)), symmetries=(negate, rescale))),
    slow(Case(LowRank(2).then(Int(8)), symmetries=(rescale,))),
]


def powers(width: int, least: int, largest: int) -> Brute:
    """Integers of a width times the best power of two of a range."""
    levels = range(-(1 << width - 1), 1 << width - 1)
    tried = [
        brute(fixed(*(k * 2.0**-d for k in levels)), len(levels)) for d in range(least, largest + 1)
    ]
    return lambda w, h, mu: min(value for b in tried if (value := b(w, h, mu)) is not None)


LEAVES += [
    Case(
        FixedPoint(2, exponents=(-1, 2)),
        symmetries=(permute,),
        brute=powers(2, -1, 2),
        brute_shape=SMALL,
    ),
    Case(
        FixedPoint(2, axis=0, exponents=(0, 3)),
        symmetries=(permute_axes,),
        brute=blockwise(powers(2, 0, 3), rows),
        brute_shape=SMALL,
    ),
    Case(FixedPoint(4, rounding="truncate")),
    slow(Case(FixedPoint(8), symmetries=(permute,))),
    slow(Case(FixedPoint(4, rounding="floor", saturate=(0.01, 0.99)))),
    slow(Case(FixedPoint(16, exponents=(-60, 60)), symmetries=(rescale,))),
]

SIGNS = (negate, flip_signs, rescale)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def powers(magnitudes: tuple[float, ...], block: int, cost: Cost | None = None) -> Brute:
    """Blocks of magnitudes times a power of two, over all supports and exponents from −127 to 127.

    For a support the blocks are problems of their own.
    """
    grid = torch.tensor(magnitudes, dtype=torch.float64)
    grid = 2.0 ** torch.arange(-127, 128)[:, None].double() * torch.cat((grid, -grid))

    def least(w: Tensor, importance: Tensor, mu: float) -> float:
        nearest = (w[..., None, None] - grid).square().amin(-1)  # (*shape, exponents)
        kept = assignments(w.numel(), 2).view(-1, *w.shape).bool()
        error = torch.where(kept[..., None], nearest, w.square()[..., None])
        blocks = (importance[..., None] * error).split(block, -2)
        total = sum(x.sum(-2).amin(-1).flatten(1).sum(1) for x in blocks)
        return mu / 2 * float((total + (cost(kept) if cost else 0)).min())

    return least


LEAVES += [
    Case(HBFP(4, block=5), symmetries=SIGNS),
    Case(
        HBFP(3, block=3, scale="best"),
        symmetries=SIGNS,
        brute=powers((0.0, 1.0, 2.0, 3.0), 3),
        brute_shape=(1, 5),
    ),
    Case(MX("e2m1"), symmetries=SIGNS),
    Case(
        MX("e2m1", block=3, scale="best"),
        symmetries=SIGNS,
        brute=powers(E2M1, 3),
        brute_shape=(1, 5),
    ),
    *(
        slow(case)
        for case in (
            Case(HBFP(12, block=4, axis=0, scale="best"), symmetries=SIGNS),
            *(
                Case(MX(element, block=4, axis=axis, rounding="even"), symmetries=SIGNS)
                for element, axis in (("e4m3", -1), ("e5m2", 0), ("e2m3", 1), ("e3m2", -2))
            ),
            Case(MX("int8", block=4, scale="best"), symmetries=SIGNS),
        )
    ),
]

SUMS += [
    replace(slow(Case(Binary() + NM(2, 4).then(HBFP(4)))), dtypes=(torch.float64,)),
    slow(Case(Binary() + HBFP(4).then(Sparse(nonzeros=10)))),
    slow(Case(MX("e2m1") + Sparse(nonzeros=3), symmetries=(rescale,))),
]

COMPOSED += [
    *(
        slow(
            Case(
                NM(2, 4).then(inner),
                symmetries=SIGNS,
                brute=powers(magnitudes, 4, n_of_m(2, 4)),
                brute_shape=(1, 4),
            )
        )
        for inner, magnitudes in (
            (HBFP(3, block=4, scale="best"), (0.0, 1.0, 2.0, 3.0)),
            (MX("e2m1", block=8, scale="best"), E2M1),
        )
    ),
    slow(Case(Sparse(nonzeros=10).then(HBFP(4, block=4)), symmetries=SIGNS)),
    slow(
        Case(
            Sparse(nonzeros=3).then(Int(3)),
            cone=True,
            symmetries=ANY_SIGN,
            brute=supports(at_most(3), scaled(*range(-3, 0), *range(1, 4), 0), 6),
            brute_shape=(1, 4),
        )
    ),
    slow(Case(NM(2, 4).then(MX("e2m1", block=6)), symmetries=SIGNS)),
    slow(Case(NM(2, 4).then(Int(4, axis=0, scale="max")), symmetries=SIGNS)),
    slow(Case(HBFP(4).then(Sparse(nonzeros=10)), symmetries=SIGNS)),
    slow(Case(MX("e2m1").then(NM(2, 4)), symmetries=SIGNS)),
    slow(
        Case(
            QuantizedThenPruned(Int(3, axis=0), NM(2, 4), mask_from="pre"),
            symmetries=(flip_signs, rescale),
        )
    ),
    slow(Case(HBFP(4).over(Matrix()), shapes=KERNELS, symmetries=SIGNS)),
]

CASES = [*LEAVES, *SUMS, *COMPOSED]
