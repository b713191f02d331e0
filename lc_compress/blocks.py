"""Which weights share a scale: the whole tensor, each index of an axis, or groups of consecutive
weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .part import check_whole


@dataclass(frozen=True)
class Blocks:
    """A partition of a tensor's entries into blocks of equal size.

    axis: one block per index of this axis (0: per output channel of linear and convolution
    weights).
    group: one block per `group` consecutive weights of the flattened tensor; the last may be
    shorter.
    Neither: one block, the tensor. Both: an error.
    """

    axis: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        given = {"axis": self.axis, "group": self.group}
        check_whole(None, **{name: x for name, x in given.items() if x is not None})
        if self.axis is not None and self.group is not None:
            raise ValueError(
                f"scales are per axis or per group, got axis={self.axis} and group={self.group}."
            )
        if self.group is not None and self.group < 1:
            raise ValueError(f"group must be at least 1, got {self.group}.")

    def count(self, shape: torch.Size) -> int:
        """Number of blocks in a tensor of this shape."""
        if self.axis is not None:
            if not -len(shape) <= self.axis < len(shape):
                raise ValueError(
                    f"axis={self.axis} does not exist in weights of shape {tuple(shape)}."
                )
            return shape[self.axis]
        return 1 if self.group is None else -(-math.prod(shape) // self.group)

    def split(self, x: Tensor) -> Tensor:
        """`x` as (blocks, size), the last block padded with zeros."""
        blocks = self.count(x.shape)
        if self.axis is not None:
            return x.movedim(self.axis, 0).reshape(blocks, -1)
        if self.group is None:
            return x.reshape(1, -1)
        return F.pad(x.reshape(-1), (0, blocks * self.group - x.numel())).view(blocks, self.group)

    def split_importance(self, importance: Tensor | None, w: Tensor) -> Tensor | None:
        """Importance as (blocks, size) in float64, zero on padding; None where every entry counts
        1.
        """
        if importance is None:
            if self.group is None or w.numel() % self.group == 0:
                return None
            importance = torch.ones((), device=w.device)
        return self.split(importance.to(device=w.device, dtype=torch.float64).expand(w.shape))

    def spread(self, scale: Tensor, shape: torch.Size) -> Tensor:
        """One value per block (blocks,) as a tensor that broadcasts to `shape`; differentiable."""
        if self.axis is not None:
            return scale.view([-1 if i == self.axis % len(shape) else 1 for i in range(len(shape))])
        if self.group is None:
            return scale.reshape(())
        return scale.repeat_interleave(self.group)[: math.prod(shape)].view(shape)
