"""Activations rounded to a number format, with a straight-through gradient."""

from __future__ import annotations

import zlib
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, distributed

from ..blocks import Blocks
from ..grids import Grid, grid, has_grid
from ..number_format import Format
from .watching import Activation

_VALUES = 1 << 16  # of a window, at most, that a scale is fitted to
_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, fill an interval evenly


def passed(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient straight through; NaN where x is not finite.

    As it depends on x, a compiler keeps x for the backward pass. Else it would keep what a ReLU
    before needs of x, a bool each, which compiled PyTorch 2.13 writes ten times slower than floats
    on processors with AVX-512 (experiments/bench_scheduled.py).
    """
    return grad + 0 * x


class _OnGrid(torch.autograd.Function):
    """Values on a grid where it is active; straight through it, the gradient's values clipped."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, active: Tensor, step: Tensor, low: Tensor, high: Tensor, how: Any
    ) -> Tensor:
        direction, ctx.clip = how
        ctx.save_for_backward(x, active, step, low, high)
        return torch.where(active, Grid(step, low, high, direction).values(x), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, active, step, low, high = ctx.saved_tensors
        if ctx.clip:
            grad = torch.where(active, Grid(step, low, high).clip(grad), grad)
        return passed(grad, x), None, None, None, None, None


class _Formatted(torch.autograd.Function):
    """q(x) with the scales of x itself, where it is active; straight through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, active: Tensor, part: Any) -> Tensor:
        ctx.save_for_backward(x)
        q = part.reconstruct(part.solve(x, None, None, None))
        return torch.where(active, q, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return passed(grad, x), None, None


class ActivationQuantizer(Activation):
    """Activations rounded to a number format.

    `FixedPoint` and `Int`: the scale is chosen once, when the schedule switches it on, by the
    part's own rule on up to 65 536 values spread over the window (all of them if they are fewer),
    and frozen: at most 2^width values per scale, whatever arrives. Other formats (`HBFP`, `MX`)
    take the scales of each input: their blocks are part of the format. Until it is on, x passes.

    Args:
        part: a number format; `axis` counts with the batch axis, so 1 is the channels; no `group`.
        shape: of one example; needed with `axis`, given by `insert`.
        window: examples before the event that the scale is fitted to.
        clip: the paper's gradient rule, values of the gradient clipped to the range of the grid.
            False: the gradient passes as it is. Formats without a grid pass it as it is.

    Buffers: active (), 0 or from the event on `code`, a number that stands for the part: what was
    saved for another format is refused; step, low, high (blocks,).

    Raises:
        TypeError: no number format.
        ValueError: scales along the batch, or in groups; in `forward`, another number of channels
            than there are scales.
        RuntimeError: at the event, if no data has passed in training mode.
    """

    active: Tensor
    step: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        part: Format[Any],
        shape: tuple[int, ...] | None = None,
        *,
        window: int = 2048,
        clip: bool = True,
    ) -> None:
        if not isinstance(part, Format):
            raise TypeError(f"ActivationQuantizer takes a number format, got {part!r}.")
        super().__init__(None, window)
        self.part, self.clip, self.frozen = part, clip, has_grid(part)
        blocks = getattr(part, "blocks", None)
        self.axis = blocks.axis if self.frozen and blocks is not None else None
        if self.frozen and (blocks is None or blocks.group is not None or self.axis == 0):
            raise ValueError(
                f"{part}: activations have one scale per tensor or along an axis that is not the "
                "batch."
            )
        self.register_buffer("active", torch.zeros((), dtype=torch.int32))
        if shape is not None:
            self.bind(shape)
        elif self.frozen and self.axis is None:
            self._make(1)

    def bind(self, shape: tuple[int, ...], like: Tensor | None = None) -> None:
        super().bind(shape, like)
        if not self.frozen:
            return
        whole = torch.Size((1, *shape))
        if self.axis is not None and self.axis % len(whole) == 0:
            raise ValueError(f"{self.part}: axis {self.axis} is the batch in {tuple(whole)}.")
        self._make(Blocks(self.axis).count(whole))

    def _make(self, blocks: int) -> None:
        for name in ("step", "low", "high"):
            self.register_buffer(name, torch.zeros(blocks))

    @property
    def code(self) -> int:
        """Of the part: its name and what differs from the defaults."""
        part: Any = self.part
        named = [(f.name, getattr(part, f.name), f.default) for f in fields(part)]
        text = [type(self.part).__name__, *(f"{n}={x!r}" for n, x, usual in named if x != usual)]
        return zlib.crc32(" ".join(text).encode()) & 0x7FFFFFFF | 1

    @property
    def stored(self) -> dict[str, int]:
        return {"active": self.code}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        found = state_dict.get(f"{prefix}active")
        if isinstance(found, Tensor) and found.shape == () and not found.is_meta:
            if found.dtype == torch.bool:  # of before: it does not say which format
                state_dict[f"{prefix}active"] = found.to(torch.int32) * self.code
            elif found.is_floating_point() or int(found) not in (0, self.code):
                name = prefix.removesuffix(".") or type(self).__name__
                errors.append(f"{name}: saved with another number format than {self.part}.")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def watches(self) -> bool:
        return self.frozen

    @property
    def on(self) -> bool:
        return not self.active.is_meta and bool(self.active)

    def forward(self, x: Tensor) -> Tensor:
        if not self.frozen:
            q: Tensor = _Formatted.apply(x, self.active != 0, self.part)  # type: ignore[no-untyped-call]
            return q
        if not hasattr(self, "step"):
            raise RuntimeError(f"{self}: give shape=, or use `insert`.")
        if self.store is not None and self.training:
            self._watch(x.detach())
        places = Blocks(self.axis)
        if places.count(x.shape) != self.step.numel():
            raise ValueError(
                f"{self.part} has {self.step.numel()} scales along axis {self.axis}, got "
                f"activations of shape {tuple(x.shape)}. One scale per tensor (no axis) takes any "
                "shape."
            )
        step, low, high = (places.spread(b, x.shape) for b in (self.step, self.low, self.high))
        how = (getattr(self.part, "rounding", "nearest"), self.clip)
        y: Tensor = _OnGrid.apply(x, self.active != 0, step, low, high, how)  # type: ignore[no-untyped-call]
        return y

    def begin(self, steps: int, batch: int) -> None:
        quota = max(_VALUES // (steps * self.step.numel()), 64)
        if self.shape is not None:
            quota = min(quota, max(batch * self.shape.numel() // self.step.numel(), 1))
        device = self._device()
        self.store = torch.zeros(self.step.numel(), steps, quota, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def _watch(self, x: Tensor) -> None:
        """Keep some values of each block, at places that no size of the axes resonates with."""
        assert self.store is not None and self.seen is not None
        rows = Blocks(self.axis).split(x)
        steps, quota = self.store.shape[1:]
        index = torch.arange(quota, device=x.device)
        if rows.shape[1] <= quota:
            index = index % rows.shape[1]
        else:
            places = (index + self.seen * quota).double() * _GOLDEN
            index = (places % 1 * rows.shape[1]).long()
        kept = rows[:, index].to(self.store.dtype)
        self.store.index_copy_(1, (self.seen % steps).view(1), kept[:, None])
        self.seen.add_(1)

    def gather(self, group: Any) -> None:
        if self.store is None or self.seen is None:
            return
        stores = [torch.empty_like(self.store) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(stores, self.store, group)
        distributed.all_reduce(self.seen, distributed.ReduceOp.MIN, group)
        self.store = torch.cat(stores, 2)

    @torch.no_grad()
    def switch(self, share: float = 1.0) -> None:
        """Choose the scales and use them from now on."""
        if self.frozen:
            store = self._collected()
            assert self.seen is not None
            rows = store[:, : int(self.seen)].flatten(1)
            own: Any = self.part
            part = own if self.axis is None else replace(own, axis=0)
            found = grid(part, part.project(rows))
            assert found is not None
            for name in ("step", "low", "high"):
                getattr(self, name).copy_(getattr(found, name))
            self.seen = None
        self.active.fill_(self.code)

    def extra_repr(self) -> str:
        return f"{self.part}, {'on' if self.on else 'off'}"
