"""Grids: multiples of a step within a range, which quantizers round to once their scale is known.

A `Grid` is what stays of a number format when its scale is frozen: the codes then follow the values
without a search. Activations are quantized on one, and weights between two events of a schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .formats import Int, IntState
from .number_format import Rounding
from .part import Part, working

Direction: TypeAlias = Literal["nearest", "truncate", "floor"]

ROUNDINGS: dict[str, Rounding] = {
    "nearest": torch.round,  # half to even
    "truncate": torch.trunc,
    "floor": torch.floor,
}


@dataclass(frozen=True, eq=False)
class Grid:
    """k · step with integers low <= k <= high; the three broadcast to the values.

    A step of 0 holds the value 0 only.
    """

    step: Tensor
    low: Tensor
    high: Tensor
    rounding: Direction = "nearest"

    def codes(self, x: Tensor, rounding: Rounding | None = None) -> Tensor:
        """The integers k of `x`, as floating-point numbers. `rounding` replaces the grid's own."""
        divisor = torch.where(self.step > 0, self.step, float("inf"))
        turn = rounding or ROUNDINGS[self.rounding]
        return turn(x / divisor).maximum(self.low).minimum(self.high)

    def values(self, x: Tensor) -> Tensor:
        """`x` on the grid, in its own dtype."""
        return (self.codes(working(x)) * self.step).to(x.dtype)

    def clip(self, gradient: Tensor) -> Tensor:
        """The paper's gradient rule: values of the gradient beyond the range of the grid become its
        ends. A new tensor.
        """
        low, high = self.low * self.step, self.high * self.step
        return gradient.maximum(low.to(gradient.dtype)).minimum(high.to(gradient.dtype))


@singledispatch
def grid(part: Part[Any], state: Any) -> Grid | None:
    """The grid of a state, one entry per block of `part.blocks`; None where the values of Δ(θ) are
    no multiples of a step.
    """
    return None


@grid.register
def _(part: Int, state: IntState) -> Grid:
    scale, zero = working(state.scale), state.zero
    return Grid(scale, (-zero).to(scale.dtype), (part.top - zero).to(scale.dtype))


def has_grid(part: Part[Any]) -> bool:
    """Whether the part rounds to a grid."""
    return grid.dispatch(type(part)) is not grid.dispatch(object)


def spread(part: Any, blocks: Grid, shape: torch.Size) -> Grid:
    """A grid with one entry per block, broadcasting to weights of this shape."""
    step, low, high = (part.blocks.spread(x, shape) for x in (blocks.step, blocks.low, blocks.high))
    return Grid(step, low, high, blocks.rounding)
