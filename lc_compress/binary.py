"""Binary and ternary weights: {−a, a} and {−a, 0, a}, one learned a per block or a given one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .blocks import Blocks
from .coding import Fixed, Radix, Raw
from .order import argsort_rows, sort_rows
from .part import Field, Ops, Part, check_value_dtype, rounded, working


@dataclass(frozen=True, eq=False)
class BinaryState:
    """scale (blocks,) in the weights' dtype; positive: bool, shape of the weights."""

    scale: Tensor
    positive: Tensor


@dataclass(frozen=True, eq=False)
class TernaryState:
    """scale (blocks,) in the weights' dtype; signs: int8 in {−1, 0, 1}, shape of the weights."""

    scale: Tensor
    signs: Tensor


SignState = TypeVar("SignState", BinaryState, TernaryState)


def scale_ops(shape: torch.Size, scales: int, terms: int, positions: int) -> Ops:
    """Additions of the inputs under each scale, then one multiplication by it: `terms` weights are
    not zero.
    """
    rows = shape[0] if len(shape) > 1 else 1
    return Ops(positions * max(rows, scales), positions * max(terms - rows, 0))


def _given(scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A given scale (1,) as weights of this dtype can take it."""
    return rounded(torch.tensor([scale], dtype=torch.float64), dtype, None).to(device)


@dataclass(frozen=True)
class ScaledSigns(Part[SignState]):
    """What `Binary` and `Ternary` share: a scale for each block, learned or given."""

    axis: int | None = None
    group: int | None = None
    value_dtype: torch.dtype | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        check_value_dtype(self, self.value_dtype)
        Blocks(self.axis, self.group)
        if self.scale is None:
            return
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"{self}: scale must be positive and finite, or None to learn it.")
        if (self.axis, self.group, self.value_dtype) != (None, None, None):
            raise ValueError(
                f"{self}: a given scale is the same everywhere and not stored, so axis, group and "
                "value_dtype do not apply."
            )

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.axis, self.group)

    @property
    def exact_weighted(self) -> bool:
        return self.exact

    @property
    def free(self) -> tuple[str, ...]:
        return ("scale",) if self.scale is None else ()

    def free_shapes(self, shape: torch.Size, arrays: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {name: torch.Size((self.blocks.count(shape),)) for name in self.free}

    def admits(self, state: SignState) -> bool:
        if self.scale is None:
            return True
        given = _given(self.scale, state.scale.dtype, state.scale.device)
        return torch.equal(state.scale, given)

    def stored(self, scale: Tensor) -> dict[str, Field]:
        """The fields of the scales: none if they are given."""
        if self.scale is not None:
            return {}
        dtype = self.value_dtype or scale.dtype
        return {"scale": Field(scale.to(dtype), Raw(dtype))}

    def read(
        self, arrays: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The scales, stored or given."""
        if self.scale is not None:
            return _given(self.scale, dtype, device)
        return arrays["scale"].to(dtype)


@dataclass(frozen=True)
class Binary(ScaledSigns[BinaryState]):
    """Weights of one magnitude per block, with free signs: 1 bit per weight.

    Solves   min Σ h (w − a s)²   over s ∈ {−1, 1}, one a ≥ 0 per block
    exactly: s = sign(w) and a = Σ h |w| / Σ h (papers/learning-compression.md, section 3, scaled
    binary, weighted). A zero weight is positive; a block without importance gets a = 0. With a
    `scale`, s = sign(w) is best whatever the importance.

    Args:
        axis: one scale per index of this axis (0: per output channel; transposed convolutions
            have their outputs on axis 1).
        group: one scale per `group` consecutive weights of the flattened tensor, the last group
            possibly shorter. With neither, one scale for the tensor.
        value_dtype: how scales are stored; None: in the weights' dtype.
        scale: a, the same for all weights and not stored, rounded to the weights' dtype; None:
            learned.

    Cost: O(N). Stores N bits and the scales. Applies in N additions and one multiplication per
        output or scale.

    Raises:
        ValueError: both `axis` and `group`, `group` < 1, no such axis, a `value_dtype` that is not
            floating point, a `scale` that is not positive and finite or comes with one of them.
    """

    @property
    def exact(self) -> bool:
        return True

    def solve(
        self, w: Tensor, warm: BinaryState | None, mu: float | None, importance: Tensor | None
    ) -> BinaryState:
        if self.scale is not None:
            return BinaryState(_given(self.scale, w.dtype, w.device), w >= 0)
        u = self.blocks.split(w.abs())  # (blocks, size)
        h = self.blocks.split_importance(importance, w)
        if h is None:
            scale = u.mean(1, dtype=torch.float64)
        else:
            scale = (h * u).sum(1) / h.sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        return BinaryState(rounded(scale, w.dtype, self.value_dtype), w >= 0)

    def reconstruct(self, state: BinaryState) -> Tensor:
        scale = self.blocks.spread(state.scale, state.positive.shape)
        signs = state.positive.view(torch.int8).mul(2).sub_(1)
        return signs.to(scale.dtype) * scale  # a tenth of the time of `where`

    def encode(self, state: BinaryState) -> dict[str, Field]:
        signs = Field(state.positive, Fixed(1), per_weight=True)
        return {**self.stored(state.scale), "positive": signs}

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> BinaryState:
        positive = arrays["positive"].bool().reshape(shape)
        return BinaryState(self.read(arrays, dtype, positive.device), positive)

    def ops(self, state: BinaryState, positions: int = 1) -> Ops:
        n = state.positive.numel()
        return scale_ops(state.positive.shape, state.scale.numel(), n, positions)


@dataclass(frozen=True)
class Ternary(ScaledSigns[TernaryState]):
    """Weights −a, 0 or a, with one a per block: log2(3) bits per weight, stored five to a byte.

    Solves   min Σ h (w − a t)²   over t ∈ {−1, 0, 1}, one a ≥ 0 per block
    exactly. For a given a the best t is sign(w) where |w| > a/2, so the support is a prefix of the
    weights sorted by |w|, whatever the importance; a prefix scores (Σ h |w|)² / Σ h, and the best
    one gives a = Σ h |w| / Σ h over it (papers/learning-compression.md, section 3, scaled ternary,
    weighted). Exact up to the rounding of a to `value_dtype`. With a given `scale` only the best t
    remains to be taken.

    Args, Raises: as `Binary`.

    Cost: O(N log N). Stores 1.6 bits per weight and the scales.
    """

    @property
    def exact(self) -> bool:
        return self.value_dtype is None

    def solve(
        self, w: Tensor, warm: TernaryState | None, mu: float | None, importance: Tensor | None
    ) -> TernaryState:
        if self.scale is not None:
            return self._nearest(w, _given(self.scale, w.dtype, w.device))
        u = self.blocks.split(working(w).abs())  # (blocks, size)
        h = self.blocks.split_importance(importance, w)
        if h is None:
            first = sort_rows(u).flip(1).double().cumsum(1)  # Σ|w| over each prefix
            zeroth = torch.arange(1, u.shape[1] + 1, dtype=torch.float64, device=u.device)
            zeroth = zeroth.expand_as(first)
        else:
            order = argsort_rows(u).flip(1)
            h = h.gather(1, order)
            first = (h * u.gather(1, order)).cumsum(1)
            zeroth = h.cumsum(1)
        mean = first / zeroth.clamp_min(torch.finfo(torch.float64).tiny)
        best = (first * mean).argmax(1, keepdim=True)  # (Σ h|w|)² / Σ h
        return self._nearest(w, rounded(mean.gather(1, best).squeeze(1), w.dtype, self.value_dtype))

    def _nearest(self, w: Tensor, scale: Tensor) -> TernaryState:
        threshold = self.blocks.spread(working(scale) / 2, w.shape)
        kept = working(w).abs() > threshold
        return TernaryState(scale, torch.where(kept, torch.sign(w), 0).to(torch.int8))

    def reconstruct(self, state: TernaryState) -> Tensor:
        scale = self.blocks.spread(state.scale, state.signs.shape)
        return state.signs.to(scale.dtype) * scale

    def encode(self, state: TernaryState) -> dict[str, Field]:
        signs = Field(state.signs + 1, Radix(3), per_weight=True)
        return {**self.stored(state.scale), "signs": signs}

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> TernaryState:
        signs = arrays["signs"].to(torch.int8).reshape(shape) - 1
        return TernaryState(self.read(arrays, dtype, signs.device), signs)

    def ops(self, state: TernaryState, positions: int = 1) -> Ops:
        terms = int((state.signs != 0).sum())
        return scale_ops(state.signs.shape, state.scale.numel(), terms, positions)
