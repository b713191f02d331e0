"""A part behind a view, and one state per tensor of a group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..part import Field, Ops, Part
from ..views import View
from .names import States, as_importance, below, prefixed


@dataclass(frozen=True, eq=False)
class OverState:
    """inner: the part's state for the viewed tensor; shape: of the weights themselves."""

    inner: Any
    shape: torch.Size


@dataclass(frozen=True)
class Over(Part[OverState]):
    """A part that sees the weights through a view: `LowRank(4).over(Matrix())` for a convolution.

    Solves the part's problem for `view.show(w)`: the same problem, since a view only rearranges
    entries. So a matrix part and a vector part of one tensor add up.
    """

    part: Part[Any]
    view: View

    def __str__(self) -> str:
        return f"({self.part}).over({self.view})"

    @property
    def exact(self) -> bool:
        return self.part.exact

    @property
    def exact_weighted(self) -> bool:
        return self.part.exact_weighted

    def solve(
        self, w: Tensor, warm: OverState | None, mu: float | None, importance: Tensor | None
    ) -> OverState:
        shown = None if importance is None else self.view.show(as_importance(importance, w))
        inner = None if warm is None else warm.inner
        return OverState(self.part.improve(self.view.show(w), inner, mu, shown), w.shape)

    def reconstruct(self, state: OverState) -> Tensor:
        return self.view.restore(self.part.reconstruct(state.inner), state.shape)

    def encode(self, state: OverState) -> dict[str, Field]:
        return {
            name: replace(f, data=self.view.restore(f.data, state.shape)) if f.per_weight else f
            for name, f in self.part.encode(state.inner).items()
        }

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> OverState:
        shown = {n: self.view.show(x) if x.shape == shape else x for n, x in arrays.items()}
        inner = self.part.decode(shown, self.view.shape(shape), dtype)
        return OverState(inner, torch.Size(shape))

    def ops(self, state: OverState, positions: int = 1) -> Ops:
        return self.part.ops(state.inner, positions)

    def penalty(self, state: OverState) -> float:
        return self.part.penalty(state.inner)

    def admits(self, state: OverState) -> bool:
        return self.part.admits(state.inner)

    def with_share(self, share: float) -> Over | None:
        part = self.part.with_share(share)
        return None if part is None else Over(part, self.view)

    def tunable(self, state: OverState) -> dict[str, Tensor]:
        return self.part.tunable(state.inner)

    def with_tunable(self, state: OverState, values: Mapping[str, Tensor]) -> OverState:
        return replace(state, inner=self.part.with_tunable(state.inner, values))


@dataclass(frozen=True)
class Each(Part[States]):
    """One state per tensor of a joint group, whose tensors arrive as one vector.

    `each(Binary()) + Sparse(density=0.01)` on a joint group is a scale per layer plus one budget of
    floats for all of them. The controller fills in the shapes; without a group, give them.

    State: the tuple of the tensors' states.

    Raises:
        ValueError: no shapes yet, or they do not add up to the vector.
    """

    part: Part[Any]
    shapes: tuple[torch.Size, ...] | None = None

    def __post_init__(self) -> None:
        if self.shapes is not None:
            object.__setattr__(self, "shapes", tuple(map(torch.Size, self.shapes)))

    def __str__(self) -> str:
        return f"each({self.part})"

    @property
    def exact(self) -> bool:
        return self.part.exact

    @property
    def exact_weighted(self) -> bool:
        return self.part.exact_weighted

    @property
    def _sizes(self) -> list[int]:
        if self.shapes is None:
            raise ValueError(
                f"{self} stands for one state per tensor of a group: use it in a Joint task, or "
                "give `shapes`."
            )
        return [math.prod(shape) for shape in self.shapes]

    def split(self, w: Tensor) -> list[Tensor]:
        """The tensors of a group from its vector."""
        sizes = self._sizes
        if w.dim() != 1 or w.numel() != sum(sizes):
            raise ValueError(
                f"{self} splits a vector of {sum(sizes)} weights, got shape {tuple(w.shape)}."
            )
        assert self.shapes is not None
        return [x.view(s) for x, s in zip(w.split(sizes), self.shapes, strict=True)]

    def solve(
        self, w: Tensor, warm: States | None, mu: float | None, importance: Tensor | None
    ) -> States:
        tensors = self.split(w.contiguous())
        count = len(tensors)
        weights: Sequence[Tensor | None] = [None] * count
        if importance is not None:
            weights = self.split(as_importance(importance, w).contiguous())
        return tuple(
            self.part.improve(x, s, mu, h)
            for x, s, h in zip(tensors, warm or [None] * count, weights, strict=True)
        )

    def reconstruct(self, state: States) -> Tensor:
        return torch.cat([self.part.reconstruct(s).reshape(-1) for s in state])

    def encode(self, state: States) -> dict[str, Field]:
        """The tensors' fields, numbered; one per weight in the same coding for all is written as
        one array for the group, under "all".
        """
        each = [self.part.encode(s) for s in state]
        fields: dict[str, Field] = {}
        for name in dict.fromkeys(name for own in each for name in own):
            group = {i: own[name] for i, own in enumerate(each) if name in own}
            first = next(iter(group.values()))
            alike = all(f.per_weight and f.coding == first.coding for f in group.values())
            if alike and len(group) == len(each):
                data = torch.cat([f.data.reshape(-1) for f in group.values()])
                fields[f"all.{name}"] = Field(data, first.coding, per_weight=True)
            else:
                for i, f in group.items():
                    fields[f"{i}.{name}"] = replace(f, per_weight=False)
        return fields

    def decode(self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> States:
        sizes = self._sizes
        assert self.shapes is not None
        own = [below(i, arrays) for i in range(len(sizes))]
        for name, x in below("all", arrays).items():
            for fields, piece in zip(own, x.split(sizes), strict=True):
                fields[name] = piece
        return tuple(self.part.decode(f, s, dtype) for f, s in zip(own, self.shapes, strict=True))

    def ops(self, state: States, positions: int = 1) -> Ops:
        return sum((self.part.ops(s, positions) for s in state), start=Ops(0, 0))

    def penalty(self, state: States) -> float:
        return sum(map(self.part.penalty, state))

    def admits(self, state: States) -> bool:
        return all(map(self.part.admits, state))

    def with_share(self, share: float) -> Each | None:
        part = self.part.with_share(share)
        return None if part is None else replace(self, part=part)

    def tunable(self, state: States) -> dict[str, Tensor]:
        return prefixed((i, self.part.tunable(s)) for i, s in enumerate(state))

    def with_tunable(self, state: States, values: Mapping[str, Tensor]) -> States:
        return tuple(self.part.with_tunable(s, below(i, values)) for i, s in enumerate(state))


def each(part: Part[Any], shapes: Iterable[Sequence[int]] | None = None) -> Each:
    """`part`, with one state per tensor of a joint group."""
    return Each(part, None if shapes is None else tuple(torch.Size(s) for s in shapes))
