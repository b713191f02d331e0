"""Low rank behind a view plus sparse: the joint C step where only one of the two has a view."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..joint import register
from ..joint.low_rank_sparse import low_rank_sparse
from ..low_rank import LowRank
from ..part import Part
from ..sparse import Sparse, SparsePenalty, SparseState
from .names import as_importance
from .wrapped import Over, OverState


def _shows_low_rank(over: Over, sparse: Any) -> bool:
    return isinstance(over.part, LowRank)


def _never(over: Over, sparse: Any) -> bool:
    return False


@register(Over, Sparse, applies=_shows_low_rank, exact=_never)
@register(Over, SparsePenalty, applies=_shows_low_rank, exact=_never)
def viewed_low_rank_sparse(
    a: Over,
    b: Part[SparseState],
    w: Tensor,
    warm: tuple[OverState, SparseState] | None,
    mu: float | None,
    importance: Tensor | None,
) -> tuple[OverState, SparseState]:
    """`joint.low_rank_sparse` in the view: θ corrects an entry wherever that is shown."""
    matrix = a.view.show(w)
    h = None if importance is None else a.view.show(as_importance(importance, w))
    entries = torch.arange(w.numel(), device=w.device).view(w.shape)
    shown = a.view.show(entries).reshape(-1)  # the entry of w that each of the matrix is
    start = None
    if warm is not None:
        back = torch.empty_like(shown)
        back[shown] = entries.view(-1)
        start = warm[0].inner, _moved(warm[1], back, matrix.shape)
    assert isinstance(a.part, LowRank)
    low, sparse = low_rank_sparse(a.part, b, matrix, start, mu, h)
    return OverState(low, w.shape), _moved(sparse, shown, w.shape)


def _moved(state: SparseState, where_to: Tensor, shape: torch.Size) -> SparseState:
    """The state for weights of another shape, whose entries lie elsewhere."""
    positions, order = where_to[state.positions].sort()
    return SparseState(positions, state.values[order], shape)
