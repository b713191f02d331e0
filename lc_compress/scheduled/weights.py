"""A weight on a schedule: masked and quantized by rules that are fixed at events and followed in
between.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from ..compose import Each, Over, OverState, Then, ThenState
from ..gradients import kept, representable
from ..grids import Grid, grid, spread
from ..nm import NM
from ..number_format import Format
from ..order import largest
from ..part import Part, rounded, working
from ..selection import Selected
from ..sparse import Sparse, SparseForm, SparseState, where
from ..structured import BlockSparse
from ..task import Task

_ARRAYS = ("goal", "names", "weights", "share", "mask", "inner")  # of a state


@singledispatch
def ramped(part: Part[Any], share: float, shape: torch.Size) -> Part[Any] | None:
    """The part at a share of its sparsity; None for parts that are not switched on as pruning."""
    return None


@ramped.register
def _(part: Sparse, share: float, shape: torch.Size) -> Sparse:
    size = math.prod(shape)
    kept_at_last = part.budget(size)
    return Sparse(size - round(share * (size - kept_at_last)), value_dtype=part.value_dtype)


@ramped.register
def _(part: NM, share: float, shape: torch.Size) -> NM:
    return replace(part, n=part.m - round(share * (part.m - part.n)))


@ramped.register
def _(part: BlockSparse, share: float, shape: torch.Size) -> BlockSparse:
    count = part.tiling.sizes(shape).numel()
    kept_at_last = part.budget(count)
    return replace(part, density=None, blocks=count - round(share * (count - kept_at_last)))


@singledispatch
def refilled(part: Part[Any], w: Tensor, state: Any) -> Any:
    """A state with its scales, which stay, and the codes of w; None for parts whose state has no
    scales of a number format.
    """
    return None


@refilled.register
def _(part: Format, w: Tensor, state: Any) -> Any:  # type: ignore[type-arg]
    return part.with_scales(w, state)


@refilled.register
def _(part: Over, w: Tensor, state: OverState) -> OverState | None:
    inner = refilled(part.part, part.view.show(w), state.inner)
    return None if inner is None else OverState(inner, state.shape)


@refilled.register
def _(part: Each, w: Tensor, state: Any) -> Any:
    pairs = zip(part.split(w), state, strict=True)
    found = tuple(refilled(part.part, x, own) for x, own in pairs)
    return None if any(x is None for x in found) else found


def chosen(part: SparseForm, w: Tensor) -> Tensor:
    """Mask of the weights that the part keeps, zeros among them too."""
    if isinstance(part, BlockSparse):
        scores = part.scores(w, None)
        return part.tiling.spread(largest(scores, part.budget(scores.numel())), w.shape)
    assert isinstance(part, Sparse | NM)
    mask = torch.zeros(w.numel(), dtype=torch.bool, device=w.device)
    mask[part.select(working(w).abs())] = True
    return mask.view(w.shape)


@dataclass(frozen=True, eq=False)
class Masked:
    """What gradient rules see of a pruned weight on a schedule: the mask, and the state of its
    quantizer if that is on (scales as they are, codes perhaps older).
    """

    mask: Tensor
    inner: Any = None


@kept.register
def _(state: Masked) -> Tensor:
    return state.mask


@representable.register
def _(state: Masked) -> Grid | None:
    return representable(state.inner)


class ScheduledTask(Task):
    """A task whose part is switched on in steps.

    goal: the part as given; `part` is the one of now, None as long as nothing is on.
    pruner, quantizer: the two halves of the goal; what is no sparsity is a quantizer.
    mask: of the weights kept, from the last event.
    inner: state of the quantizer. Scales of a number format stay those of the event, codes follow
        the weights; other parts are projected anew at each step.
    grid: of these scales, where there is one: then Δ(θ) needs no codes, and those of `inner` are
        brought up to date when somebody asks (`current_inner`).
    """

    def __init__(self, selected: Selected) -> None:
        super().__init__(selected)
        self.goal = self.part
        halves = (self.goal.outer, self.goal.inner) if isinstance(self.goal, Then) else (self.goal,)
        prunes = ramped(halves[0], 1.0, self.shape) is not None
        self.pruner: Any = halves[0] if prunes else None
        self.quantizer: Any = (halves[1] if len(halves) > 1 else None) if prunes else self.goal
        self.share = 0.0
        self.mask: Tensor | None = None
        self.inner: Any = None
        self.grid: Grid | None = None
        self.weights = tuple(p.detach().clone() for p in self.parameters)
        self.delta = self.weights

    @property
    def active(self) -> bool:
        """Whether Δ(θ) is anything else than w."""
        return self.mask is not None or self.inner is not None

    def check(self) -> None:
        """Refuse now what could not be done at an event: a penalty (there is no μ), another shape.

        Raises:
            TypeError, ValueError: from the part.
        """
        if self.pruner is not None:
            chosen(self.pruner, self.join(self.current))
        if self.quantizer is not None:
            self.quantizer.project(self.join(self.current))

    @torch.no_grad()
    def prune(self, share: float) -> None:
        """A new mask, of the largest weights."""
        self.share = share
        self.mask = chosen(self._pruner(), self.join(self.current))

    def _pruner(self) -> Any:
        """The sparsity of now."""
        return self.pruner if self.share == 1 else ramped(self.pruner, self.share, self.shape)

    @torch.no_grad()
    def quantize(self, share: float = 1.0) -> None:
        """Choose the scales, by squared error."""
        importance = None if self.mask is None else self.mask.double()
        self.take(self.quantizer.project(self._masked(), importance=importance))

    def take(self, inner: Any) -> None:
        """A new state of the quantizer."""
        self.inner = inner
        blocks = None if inner is None else grid(self.quantizer, inner)
        self.grid = None if blocks is None else spread(self.quantizer, blocks, self.shape)

    def _masked(self) -> Tensor:
        """The weights with zeros where they are pruned."""
        x = self.join(self.current)
        return x if self.mask is None else torch.where(self.mask, x, 0)

    def current_inner(self) -> Any:
        """The state of the quantizer for the weights of now."""
        if self.grid is not None:
            self.inner = self.quantizer.with_scales(self._masked(), self.inner)
        return self.inner

    @torch.no_grad()
    def follow(self) -> None:
        """The state and Δ(θ) for the weights of now."""
        if self.inner is not None and self.grid is None:
            inner = refilled(self.quantizer, self._masked(), self.inner)
            if inner is None:
                importance = None if self.mask is None else self.mask.double()
                inner = self.quantizer.improve(self._masked(), self.inner, None, importance)
            self.inner = inner
        self.rebuild()

    @torch.no_grad()
    def rebuild(self) -> None:
        """Δ(θ) of mask, scales or state, and weights."""
        if not self.active:
            assert self.weights is not None
            self.delta = self.weights
            return
        if self.grid is not None:
            values = self.grid.values(self._masked())  # 0 stays 0
        elif self.inner is None:
            values = rounded(self._masked(), self.parameters[0].dtype, self.pruner.value_dtype)
        else:
            values = self.quantizer.reconstruct(self.inner)
            values = values if self.mask is None else torch.where(self.mask, values, 0)
        self.delta = (values,) if len(self.parameters) == 1 else self.split(values)
        self.state = self.inner if self.mask is None else Masked(self.mask, self.inner)

    def settled(self) -> Task:
        """This task as LC has it: the part of now, its state and Δ(θ)."""
        task, inner = copy.copy(self), self.current_inner()
        if self.mask is None:
            task.part, task.state = self.quantizer, inner
            return task
        positions = where(self.mask)
        values = self.join(self.delta).reshape(-1)[positions]
        outer = SparseState(positions, values, self.shape)
        task.part, task.state = self._pruner(), outer
        if inner is not None:
            task.part = Then(task.part, self.quantizer)
            task.state = ThenState(outer, {"values": inner})
        return task

    def arrays(self) -> dict[str, Any]:
        """Plain tensors and numbers that restore it."""
        inner = None
        if self.inner is not None:
            fields = self.quantizer.encode(self.current_inner())
            inner = {name: field.data.clone() for name, field in fields.items()}
        return {
            "goal": str(self.goal),
            "names": list(self.names),
            "weights": [w.clone() for w in self.current],
            "share": self.share,
            "mask": None if self.mask is None else self.mask.clone(),
            "inner": inner,
        }

    def read(self, saved: dict[str, Any]) -> tuple[Any, Any]:
        """Mask and inner state from what `arrays` returned; nothing is changed.

        Raises:
            ValueError: of another model or part, or damaged.
        """
        if not isinstance(saved, dict) or saved.keys() != set(_ARRAYS):
            raise ValueError(f"The state of {self.name} is damaged: {saved!r:.80}.")
        if not isinstance(saved["share"], int | float) or not 0 <= saved["share"] <= 1:
            raise ValueError(f"The state of {self.name} is damaged: share {saved['share']!r}.")
        if saved["goal"] != str(self.goal) or saved["names"] != list(self.names):
            raise ValueError(
                f"The state is of another model or plan: {saved['names']} with {saved['goal']} "
                f"there, {list(self.names)} with {self.goal} here."
            )
        weights = saved["weights"] if isinstance(saved["weights"], list) else []
        shapes = [getattr(w, "shape", None) for w in weights]
        if shapes != [p.shape for p in self.parameters]:
            raise ValueError(f"The state of {self.name} has weights of shapes {shapes}.")
        if not all(bool(torch.isfinite(w).all()) for w in weights):
            raise ValueError(f"The state of {self.name} is damaged: weights with NaN or inf.")
        device, dtype = self.parameters[0].device, self.parameters[0].dtype
        mask, inner = saved["mask"], saved["inner"]
        try:
            mask = None if mask is None else mask.to(device, torch.bool).view(self.shape)
            if inner is not None:
                moved = {name: x.to(device) for name, x in inner.items()}
                inner = self.quantizer.decode(moved, self.shape, dtype)
        except Exception as cause:
            raise ValueError(f"The state of {self.name} is damaged: {cause}") from cause
        return mask, inner

    @torch.no_grad()
    def restore(self, saved: dict[str, Any], mask: Tensor | None, inner: Any) -> None:
        """Take over what `read` has read."""
        self.share, self.mask = saved["share"], mask
        self.take(inner)
        for own, other in zip(self.weights or (), saved["weights"], strict=True):
            own.copy_(other)
        self.rebuild()
        self.show_delta()
