"""Activations masked by their magnitude."""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, distributed

from ..order import largest
from ..part import working
from .watching import Activation

Kind: TypeAlias = Literal["map", "channel", "dynamic"]


class ActivationPruner(Activation):
    """Activations masked by their magnitude over many inputs, or of each input alone.

    kind="map": a static mask of the shape of one example, of the largest Σ |x| over the window.
    kind="channel": the same for whole channels (axis 1): for inputs of several sizes.
    kind="dynamic": the largest |x| of each example by itself (all that tie with the last are kept).
    Static masks change at the events of the schedule and are frozen after the last. Among equal
    sums the first are kept.

    Place it before the non-linearity: behind a ReLU the smallest values are zeros, and to prune
    those changes nothing (a warning).

    Args:
        sparsity: share that is zero after the last event, in [0, 1).
        kind, window: see above.
        shape: of one example; given by `insert`. "dynamic" does without.

    Buffers: mask, 0 or 1 (uint8: compiled loops over bool are slow), or share () for "dynamic".
    `insert` lays it out in memory as the activations that it sees: a mask in the order C, H, W
    before channels-last activations is transposed for every example, which costs half a
    convolution. So `model.to(memory_format=...)` comes first.

    Raises:
        ValueError: an argument out of range; in `forward`, an input of another shape.
        RuntimeError: at an event, if no data has passed in training mode.
    """

    mask: Tensor
    share: Tensor

    def __init__(
        self,
        sparsity: float,
        kind: Kind = "map",
        shape: tuple[int, ...] | None = None,
        *,
        window: int = 2048,
    ) -> None:
        if not 0 <= sparsity < 1:
            raise ValueError(f"ActivationPruner: sparsity must be in [0, 1), got {sparsity}.")
        if kind not in ("map", "channel", "dynamic"):
            raise ValueError(
                f"ActivationPruner: kind must be 'map', 'channel' or 'dynamic', got {kind!r}."
            )
        super().__init__(None, window)
        self.sparsity, self.kind = sparsity, kind
        self._new = False  # the next input shows whether dynamic pruning changes anything
        if kind == "dynamic":
            self.register_buffer("share", torch.zeros((), dtype=torch.float64))
        if shape is not None:
            self.bind(shape)

    def bind(self, shape: tuple[int, ...], like: Tensor | None = None) -> None:
        super().bind(shape, like)
        if self.kind == "dynamic":
            return
        if self.kind == "map" and like is not None:
            mask = torch.ones_like(like[0], dtype=torch.uint8)
        else:
            own = shape if self.kind == "map" else (shape[0], *(1 for _ in shape[1:]))
            mask = torch.ones(own, dtype=torch.uint8)
        self.register_buffer("mask", mask)

    @property
    def watches(self) -> bool:
        return self.kind != "dynamic"

    @property
    def on(self) -> bool:
        if self.kind == "dynamic":
            return not self.share.is_meta and bool(self.share > 0)
        return self.shape is not None and not self.mask.is_meta and bool((self.mask == 0).any())

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "dynamic":
            size = x.abs().flatten(1)
            pruned = (self.share * size.shape[1]).round().long().clamp_max(size.shape[1] - 1)
            sizes = size.detach().sort(1).values
            last = sizes.gather(1, pruned.expand(size.shape[0], 1))
            if not torch.compiler.is_compiling() and self._new:
                self._new = False
                smallest = sizes[:, : int(pruned)]
                if smallest.numel() and not bool(smallest.any()):
                    _warn(f"{float(self.share):.0%} of each example, all of them 0 already")
            return torch.where((size >= last).view(x.shape), x, 0)
        if self.shape is None:
            raise RuntimeError(f"{self}: give shape=, or use `insert`.")
        if self._fits(x.shape[1:]):
            if self.store is not None and self.training:
                self._watch(x.detach())
            return x * self.mask
        raise ValueError(
            f"ActivationPruner(kind={self.kind!r}) has a static mask for examples of shape "
            f"{tuple(self.shape)}, got {tuple(x.shape[1:])}. For inputs of several sizes use "
            "kind='channel' or kind='dynamic'."
        )

    def _fits(self, shape: torch.Size) -> bool:
        assert self.shape is not None
        if self.kind == "map":
            return shape == self.shape
        return len(shape) == len(self.shape) and shape[0] == self.shape[0]

    def begin(self, steps: int, batch: int) -> None:
        self.store = torch.zeros_like(self.mask, dtype=torch.float64)
        self.seen = torch.zeros((), dtype=torch.int64, device=self.store.device)

    @torch.no_grad()
    def _watch(self, x: Tensor) -> None:
        assert self.store is not None and self.seen is not None
        axes = [0] if self.kind == "map" else [0, *range(2, x.dim())]
        self.store.add_(working(x).abs().sum(axes).view(self.store.shape))
        self.seen.add_(1)

    def gather(self, group: Any) -> None:
        if self.store is not None and self.seen is not None:
            distributed.all_reduce(self.store, group=group)
            distributed.all_reduce(self.seen, distributed.ReduceOp.MIN, group)

    @torch.no_grad()
    def switch(self, share: float) -> None:
        """A new mask, at a share of the sparsity."""
        if self.kind == "dynamic":
            self.share.fill_(share * self.sparsity)
            self._new = share * self.sparsity > 0
            return
        sums = self._collected()
        self.seen = None
        count = sums.numel() - round(share * self.sparsity * sums.numel())
        self.mask.copy_(largest(sums, count))
        pruned = sums[self.mask == 0]
        if pruned.numel() and not bool(pruned.any()):
            _warn(f"{pruned.numel()} of {sums.numel()} activations, 0 in the whole window")

    def extra_repr(self) -> str:
        if any(x.is_meta for x in self.buffers()):
            return f"{self.sparsity:g}, {self.kind}"
        if self.kind == "dynamic":
            now = float(self.share)
        else:
            now = 0.0 if self.shape is None else float((self.mask == 0).double().mean())
        return f"{self.sparsity:g}, {self.kind}, {now:.4g} pruned"


def _warn(what: str) -> None:
    warnings.warn(
        f"ActivationPruner prunes {what}: that changes nothing. Place it before the non-linearity.",
        stacklevel=3,
    )
