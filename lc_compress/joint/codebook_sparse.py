"""A fixed codebook plus sparse: the nearest codeword is best whatever is corrected."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..codebook import FixedCodebook
from ..part import Part, rounded, working
from ..sparse import Sparse, SparsePenalty, SparseState
from .registry import register


def _stores_exactly(quantizer: Any, sparse: Any) -> bool:
    return sparse.value_dtype is None


@register(FixedCodebook, Sparse, exact=_stores_exactly, weighted=_stores_exactly)
@register(FixedCodebook, SparsePenalty, exact=_stores_exactly, weighted=_stores_exactly)
def codebook_sparse(
    a: FixedCodebook,
    b: Part[SparseState],
    w: Tensor,
    warm: tuple[Any, SparseState] | None,
    mu: float | None,
    importance: Tensor | None,
) -> tuple[Any, SparseState]:
    """A fixed codebook plus an l0 constraint or penalty, exactly, weighted too
    (papers/learning-compression.md, 4.1 and 4.2).

    Proof. Let d_i be the distance of w_i to its nearest codeword. Whatever the support of θ,
    entries in it cost 0 (or the price α) and the others at least h_i d_i², which the nearest
    codeword attains. So take the nearest codeword everywhere, and correct where h_i d_i² is largest
    (or above the price). O(N log K) and a selection.
    """
    state = a.solve(w, None, mu, importance)
    residual = rounded(working(w) - working(a.reconstruct(state)), w.dtype, None)
    return state, b.solve(residual, None, mu, importance)
