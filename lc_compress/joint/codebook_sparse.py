"""Given values plus sparse, of any form: the nearest value is best whatever is corrected."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..binary import Binary, Ternary
from ..codebook import FixedCodebook, PowersOfTwo
from ..l1 import L1Ball, L1Penalty
from ..nm import NM
from ..part import Part, rounded, working
from ..sparse import Sparse, SparsePenalty, SparseState
from ..structured import BlockPenalty, BlockSparse, GroupL2Penalty
from .registry import register

FORMS = (Sparse, SparsePenalty, L1Ball, L1Penalty, NM, BlockSparse, BlockPenalty, GroupL2Penalty)


def codebook_sparse(
    a: Part[Any],
    b: Part[SparseState],
    w: Tensor,
    warm: tuple[Any, SparseState] | None,
    mu: float | None,
    importance: Tensor | None,
) -> tuple[Any, SparseState]:
    """Given values plus what may always shrink: an l0 or ℓ1 constraint or penalty, N:M, or whole
    blocks by a budget, a price or their ℓ2 norm. Exact, weighted too
    (papers/learning-compression.md, 4.1 to 4.3).

    Proof. Given codes q, what is left is a projection of the residual d = w − q with some least
    objective V(d). Let d' be another residual with |d'_i| ≤ |d_i| for all i, so d' = c∘d with
    |c_i| ≤ 1. From the best θ for d take c∘θ: no entry grows and no zero becomes another number, so
    it satisfies the constraint or costs no more, and Σ h (d' − c∘θ)² = Σ h c² (d − θ)² ≤
    Σ h (d − θ)². So V(d') ≤ V(d): the nearest value everywhere makes every |d_i|, and with them V,
    as small as possible. Then project the residual. O(N log K) and the projection.
    """
    state = a.solve(w, None, mu, importance)
    residual = rounded(working(w) - working(a.reconstruct(state)), w.dtype, None)
    return state, b.solve(residual, None, mu, importance)


def _stores_exactly(quantizer: Any, sparse: Any) -> bool:
    return sparse.value_dtype is None


def _given_scale(quantizer: Any, sparse: Any) -> bool:
    return quantizer.scale is not None


for form in FORMS:
    for values in (FixedCodebook, PowersOfTwo):
        register(values, form, exact=_stores_exactly, weighted=_stores_exactly)(codebook_sparse)
    for signs in (Binary, Ternary):
        register(
            signs, form, applies=_given_scale, exact=_stores_exactly, weighted=_stores_exactly
        )(codebook_sparse)
