"""Number formats: integers times learned scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .binary import scale_ops
from .blocks import Blocks
from .coding import Fixed, Raw
from .number_format import Format, Rounding
from .part import Field, Ops, check_value_dtype, check_whole, rounded, working
from .scaled import admits_scale, rounded_scales
from .scaling import best_scales, best_scales_and_zeros

# The exact search tries more scales with every bit, each at twice the cost, and gains less.
_EXACT_SYMMETRIC = 8
_EXACT_ASYMMETRIC = 6


@dataclass(frozen=True, eq=False)
class IntState:
    """scale (blocks,) in the weights' dtype; zero (blocks,): zero points, int64; integers of the
    weights' shape, int8, int16 or int32: Δ over its scale, the code minus the zero point.
    """

    scale: Tensor
    zero: Tensor
    integers: Tensor


@dataclass(frozen=True)
class Int(Format[IntState]):
    """Integers of a few bits times a scale per block: what hardware calls int8, int4, …

    Solves   min Σ h (w − a k)²   over integers k of w's shape, one a >= 0 per block.

    symmetric: k in −m … m with m = 2^(width−1) − 1. The code that is left for −m − 1 stays unused:
        with it the grid would reach further down than up, and −w not get the mirror image of Δ.
    not symmetric: k = q − z with codes q and one zero point z per block in 0 … 2^width − 1, so that
        0 can be represented whatever the range.

    scale="best" takes the least squared error. Symmetric and up to 8 bits, or with zero points and
    up to 6, it is the global optimum, whatever the importance (`scaling.best_scales` and
    `best_scales_and_zeros`, which have the proofs), up to the rounding of a to `value_dtype`.
    Beyond, a search: 53 scales from that of the range down to 1/64 of it, ever closer to the best
    one, each corrected to the best scale for its codes; zero points are those of the range. On
    Gaussian, exponential and heavy-tailed rows of 1152 weights it came within 2.5 % of the least
    error, 0.6 % on average (9 and 10 bits; 7 and 8 with zero points).
    scale="max" takes the range of the weights, as most toolkits do, and ignores the importance:
    a m = max |w|, or a (2^width − 1) = max(w, 0) − min(w, 0) with z = round(−min(w, 0) / a).

    Then every weight gets its nearest integer in range, half-way ones the even one. A block of
    zeros, or without importance, gets a = 0.

    Args:
        width: bits per weight, 2 to 16.
        symmetric: no zero points.
        axis, group, value_dtype: where scales lie and how they are stored, as in `Binary`.
        scale: "best" or "max".

    State:
        scale (blocks,), zero (blocks,), integers of w's shape.

    Cost: "max" O(N). "best": O(N log N), and for each scale tried O(2^width log n) per block of n
        weights, or O(n) in the search; 8 bits take ten times as long as 4 and gain less, so that
        "max" may do. Stores width · N bits and the scales; zero points take `width` bits each.

    Raises:
        ValueError: `width` outside 2 to 16, another `scale`; as `Binary`.
    """

    width: int
    symmetric: bool = True
    axis: int | None = None
    group: int | None = None
    scale: Literal["best", "max"] = "best"
    value_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_whole(self, width=self.width)
        if self.width == 1:
            raise ValueError(
                f"{self}: one bit holds two values. Use `Binary` for {{−a, a}}, "
                "`ScaledCodebook((0, 1))` for {0, a}."
            )
        if not 2 <= self.width <= 16:
            raise ValueError(f"{self}: width must be from 2 to 16 bits.")
        if self.scale not in ("best", "max"):
            raise ValueError(f'{self}: scale must be "best" or "max".')
        check_value_dtype(self, self.value_dtype)
        Blocks(self.axis, self.group)

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.axis, self.group)

    @property
    def top(self) -> int:
        """The largest code: 2 m, or 2^width − 1."""
        return (1 << self.width) - (2 if self.symmetric else 1)

    @property
    def exact(self) -> bool:
        return self.scale == "best" and self._searched_exactly and self.value_dtype is None

    @property
    def exact_weighted(self) -> bool:
        return self.exact

    @property
    def keeps_zero(self) -> bool:
        return self.symmetric

    @property
    def scale_of_largest(self) -> bool:
        return self.symmetric and self.scale == "max"

    def block_ids(self, shape: torch.Size, device: torch.device | None = None) -> Tensor:
        ids = torch.arange(self.blocks.count(shape), device=device)
        return self.blocks.spread(ids, shape).expand(shape)

    def bits_per_element(self, shape: torch.Size, dtype: torch.dtype = torch.float32) -> float:
        shape = torch.Size(shape)
        scale = 8 * (self.value_dtype or dtype).itemsize + (0 if self.symmetric else self.width)
        return self.width + scale * self.blocks.count(shape) / shape.numel()

    def widest_cell(self, x: Tensor) -> Tensor:
        state = self.solve(x.detach(), None, None, None)
        low, high = (v.double() for v in self.blocks.split(working(x)).aminmax(dim=1))
        step = working(state.scale).double()
        clipped = (high - step * (self.top - state.zero)).maximum(-low - step * state.zero)
        cell = torch.where(step > 0, (clipped + step / 2).maximum(step), 2 * clipped)
        return self.blocks.spread(cell, x.shape).expand(x.shape).to(working(x).dtype)

    @property
    def _searched_exactly(self) -> bool:
        return self.width <= (_EXACT_SYMMETRIC if self.symmetric else _EXACT_ASYMMETRIC)

    @property
    def free(self) -> tuple[str, ...]:
        return ("scale",)

    def solve(
        self, w: Tensor, warm: IntState | None, mu: float | None, importance: Tensor | None
    ) -> IntState:
        x = working(w)
        rows, h = self.blocks.split(x), self.blocks.split_importance(importance, w)
        if self.scale == "best" and self._searched_exactly:
            scale, zero = self._best(rows, h)
        else:
            scale, zero = self._range(rows)
            if self.scale == "best":
                scale = _refined(rows.double(), h, scale, zero[:, None], self.top)
        scale = rounded_scales(scale, zero.maximum(self.top - zero), w.dtype, self.value_dtype)
        return self._rounded(w, scale, zero, torch.round)

    def _rounded(self, w: Tensor, scale: Tensor, zero: Tensor, rounding: Rounding) -> IntState:
        x = working(w)
        # zero weights for a scale of zero, without 0 / 0
        divisor = torch.where(scale > 0, working(scale), float("inf"))
        integers = rounding(x / self.blocks.spread(divisor, w.shape))
        if self.symmetric:
            integers.clamp_(-(self.top // 2), self.top // 2)
        else:
            low = -self.blocks.spread(zero, w.shape).to(x.dtype)
            integers = integers.maximum(low).minimum(low + self.top)
        return IntState(scale, zero, integers.to(self._integer))

    def with_scales(self, w: Tensor, state: IntState, rounding: Rounding | None = None) -> IntState:
        return self._rounded(w, state.scale, state.zero, rounding or torch.round)

    @property
    def _integer(self) -> torch.dtype:
        """The type of the integers: from −m to m, or from −top to top."""
        largest = self.top // 2 if self.symmetric else self.top
        types = (torch.int8, torch.int16, torch.int32)
        return next(x for x in types if largest <= torch.iinfo(x).max)

    def _best(self, rows: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.symmetric:
            return best_scales_and_zeros(rows, h, self.top)
        m = self.top // 2
        scale = best_scales(rows, h, torch.arange(-m, m + 1, device=rows.device))
        return scale, self._middle(scale)

    def _range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (x.double() for x in rows.aminmax(dim=1))
        if self.symmetric:
            scale = torch.maximum(high, -low) / (self.top // 2)
            return scale, self._middle(scale)
        low = low.clamp_max(0)
        scale = (high.clamp_min(0) - low) / self.top
        return scale, (-low / torch.where(scale > 0, scale, 1)).round().long().clamp(0, self.top)

    def _middle(self, scale: Tensor) -> Tensor:
        return torch.full_like(scale, self.top // 2, dtype=torch.int64)

    def reconstruct(self, state: IntState) -> Tensor:
        scale = working(state.scale)
        spread = self.blocks.spread(scale, state.integers.shape)
        return rounded(state.integers.to(scale.dtype) * spread, state.scale.dtype, None)

    def _codes(self, state: IntState) -> Tensor:
        wide = torch.int16 if self.width <= 8 else torch.int32
        return state.integers.to(wide) + self.blocks.spread(
            state.zero.to(wide), state.integers.shape
        )

    def encode(self, state: IntState) -> dict[str, Field]:
        stored = self.value_dtype or state.scale.dtype
        codes = self._codes(state).to(torch.uint8 if self.width <= 8 else torch.int32)
        fields = {
            "scale": Field(state.scale.to(stored), Raw(stored)),
            "codes": Field(codes, Fixed(self.width), per_weight=True),
        }
        if not self.symmetric:
            fields["zero"] = Field(state.zero, Fixed(self.width))
        return fields

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> IntState:
        scale, codes = arrays["scale"].to(dtype), arrays["codes"].reshape(shape)
        if codes.numel() and int(codes.max()) > self.top:
            raise ValueError(f"{self}: damaged codes, at most {self.top}, found {codes.max()}.")
        zero = self._middle(scale) if self.symmetric else arrays["zero"].long()
        wide = torch.int16 if self.width <= 8 else torch.int32
        integers = codes.to(wide) - self.blocks.spread(zero, shape).to(wide)
        return IntState(scale, zero, integers.to(self._integer))

    def free_shapes(self, shape: torch.Size, arrays: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {"scale": torch.Size((self.blocks.count(shape),))}

    def admits(self, state: IntState) -> bool:
        if not admits_scale(self.blocks, self.value_dtype, state.scale, state.integers):
            return False
        if self.symmetric and not torch.equal(state.zero, self._middle(state.zero)):
            return False
        codes = self._codes(state)
        return not bool(((codes < 0) | (codes > self.top)).any())

    def ops(self, state: IntState, positions: int = 1) -> Ops:
        """Products with small integers count as such; each scale multiplies once."""
        terms = int((state.integers != 0).sum())
        sums = scale_ops(state.integers.shape, state.scale.numel(), terms, positions)
        return sums + Ops(positions * terms, 0)


def _refined(x: Tensor, h: Tensor | None, full: Tensor, zero: Tensor, top: int) -> Tensor:
    """The best scales found from those of the range down to 1/64 of them, by ever finer steps; 0
    where none helps. x (blocks, n) and h in float64, zero (blocks, 1).
    """
    gain, best = torch.zeros_like(full), torch.zeros_like(full)

    def look(scale: Tensor) -> None:
        nonlocal gain, best
        divisor = torch.where(scale > 0, scale, float("inf"))
        k = (x / divisor[:, None]).round_().maximum(-zero).minimum(top - zero)
        hk = k if h is None else h * k
        a, b = (hk * x).sum(1), (hk * k).sum(1)
        fitted = a / b.clamp_min(torch.finfo(torch.float64).tiny)  # the best scale for these codes
        gained = a.clamp_min(0) * fitted
        better = gained > gain
        gain, best = torch.where(better, gained, gain), torch.where(better, fitted, best)

    for k in range(25):
        look(full * 2.0 ** (-k / 4))
    for step in (1 / 16, 1 / 64, 1 / 256, 1 / 1024):
        centre = best
        for k in range(-3, 4):
            look(centre * 2.0 ** (step * k))
    return best
