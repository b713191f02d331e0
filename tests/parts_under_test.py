"""THE table: every part configuration with its declared facts, and the brute force behind them.

A new part is a new row. Each row runs through every property of `lc_compress.testing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from lc_compress.binary import Binary, Ternary
from lc_compress.codebook import FixedCodebook, KMeans
from lc_compress.compose import each
from lc_compress.low_rank import LowRank
from lc_compress.sparse import Sparse, SparsePenalty
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
    slow(
        Case(
            KMeans(2) + Sparse(nonzeros=3),
            symmetries=(rescale,),
            brute=brute(centres(2), 2, nonzeros=3),
        )
    ),
    slow(Case(LowRank(1) + Sparse(nonzeros=5), symmetries=(rescale,))),
    slow(Case(Binary() + LowRank(2), symmetries=(rescale,))),
    slow(Case(Binary() + LowRank(1) + Sparse(nonzeros=3), symmetries=(rescale,))),
    slow(Case(Binary() + LowRank(1) + SparsePenalty(0.3), mu=2.0)),
    slow(Case(Binary() + LowRank(2).then(KMeans(4)) + Sparse(nonzeros=2), symmetries=(rescale,))),
]

COMPOSED = [
    Case(Sparse(nonzeros=10).then(KMeans(4)), symmetries=(negate, rescale)),
    Case(Sparse(nonzeros=10).then(Binary()), symmetries=(negate, flip_signs, rescale)),
    Case(Sparse(nonzeros=10).then(Binary(group=5)), symmetries=(negate, flip_signs, rescale)),
    Case(SparsePenalty(0.3).then(KMeans(2)), mu=2.0),
    Case(LowRank(2).then(KMeans(4)), symmetries=(rescale,)),
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

CASES = [*LEAVES, *SUMS, *COMPOSED]
