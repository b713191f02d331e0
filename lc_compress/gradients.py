"""Rules (grad, w, θ) → grad: what the straight-through gradient becomes before the step.

For `LC(gradient="sum", rule=)` and `Scheduled(rule=)`. The loss gradient arrives as it is at Δ(θ);
a rule returns another tensor and changes nothing. In a joint group all three are of the group.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from .compose import ThenState
from .fixed_point import FixedPointState
from .grids import Grid
from .sparse import SparseState


@singledispatch
def kept(state: Any) -> Tensor | None:
    """Mask of the weights that a state has not pruned; None where none can be."""
    return None


@kept.register
def _(state: SparseState) -> Tensor:
    mask = torch.zeros(state.shape.numel(), dtype=torch.bool, device=state.positions.device)
    mask[state.positions] = True
    return mask.view(state.shape)


@kept.register
def _(state: ThenState) -> Tensor | None:
    return kept(state.outer)


@singledispatch
def representable(state: Any) -> Grid | None:
    """The fixed-point grid that the weights lie on; None for other states."""
    return None


@representable.register
def _(state: FixedPointState) -> Grid:
    return state.grid


@representable.register
def _(state: ThenState) -> Grid | None:
    return representable(state.inner["values"]) if isinstance(state.outer, SparseState) else None


def dense(grad: Tensor, w: Tensor, state: Any) -> Tensor:
    """The gradient as it is: pruned weights go on learning, and may come back."""
    return grad


def masked(grad: Tensor, w: Tensor, state: Any) -> Tensor:
    """No gradient for pruned weights."""
    mask = kept(state)
    return grad if mask is None else torch.where(mask, grad, 0)


def clipped(grad: Tensor, w: Tensor, state: Any) -> Tensor:
    """Values of the gradient clipped to the range of the fixed-point grid,
    [−2^(N−d−1), 2^(N−d−1) − 2^−d]: there is no mask by w (papers/joint-weights-activations.md,
    section 1).
    """
    scale = representable(state)
    return grad if scale is None else scale.clip(grad)


def paper(grad: Tensor, w: Tensor, state: Any) -> Tensor:
    """Joint quantization and pruning in training as the paper has it: Q(P(w)) backwards, so first
    `clipped`, then `masked`.
    """
    return masked(clipped(grad, w, state), w, state)
