"""A given codebook times learned scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Blocks
from .codebook import CodebookState, FixedCodebook, checked_values, looked_up, nearest
from .coding import Raw
from .part import Field, Ops, Part, check_value_dtype, rounded, working
from .scaling import best_scales


@dataclass(frozen=True, eq=False)
class ScaledState:
    """scale (blocks,) in the weights' dtype; codes of the weights' shape: uint8 for K <= 256, else
    int64.
    """

    scale: Tensor
    codes: Tensor


@dataclass(frozen=True)
class ScaledCodebook(Part[ScaledState]):
    """Weights that take given values times a learned scale, one per block.

    Solves   min Σ h (w − a t[q])²   over codes q and one real a per block
    to the global optimum, whatever the importance: `scaling.best_scales`, which has the proof. The
    problem is that of papers/learning-compression.md, section 3, any fixed codebook times a learned
    scale; the paper sweeps all N K scales at which an assignment changes, here a bound excludes
    almost all of them. a may be negative, which mirrors the codebook; for a symmetric one a >= 0.
    At the end every weight gets its nearest value, the lower code in a tie. A block without
    importance gets a = 0. Exact up to the rounding of a to `value_dtype`.

    Args:
        values: the codebook t, at least one finite number; sorted, repeats dropped. Only their
            ratios matter, as long as w's dtype holds the scale, about max |w| / max |t|. They count
            as 32-bit numbers, for float64 weights as 64-bit ones.
        axis, group, value_dtype: where scales lie and how they are stored, as in `Binary`.

    State:
        scale (blocks,), codes of w's shape. The codebook is the part's own and not stored.

    Cost: O(N log N) and O(K log N) for each scale tried, typically 60 to 200. Stores
        N ceil(log2 K) bits and the scales.

    Raises:
        ValueError: no value, or one that is NaN or inf; as `Binary`.
    """

    values: tuple[float, ...]
    axis: int | None = None
    group: int | None = None
    value_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", checked_values(self, self.values))
        check_value_dtype(self, self.value_dtype)
        Blocks(self.axis, self.group)

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.axis, self.group)

    @property
    def unscaled(self) -> FixedCodebook:
        """The codebook, which knows how codes are stored."""
        return FixedCodebook(self.values)

    @property
    def exact(self) -> bool:
        return self.value_dtype is None

    @property
    def exact_weighted(self) -> bool:
        return self.value_dtype is None

    @property
    def free(self) -> tuple[str, ...]:
        return ("scale",)

    def solve(
        self, w: Tensor, warm: ScaledState | None, mu: float | None, importance: Tensor | None
    ) -> ScaledState:
        x = working(w)
        levels = self.unscaled.codebook(x.dtype, x.device)
        rows, h = self.blocks.split(x), self.blocks.split_importance(importance, w)
        largest = levels.abs().max()
        scale = rounded_scales(best_scales(rows, h, levels), largest, w.dtype, self.value_dtype)
        divisor = self.blocks.spread(working(scale), w.shape)
        t = torch.where(divisor == 0, 0, x.double() / divisor)
        return ScaledState(scale, nearest(t, levels))

    def reconstruct(self, state: ScaledState) -> Tensor:
        scale = working(state.scale)
        levels = self.unscaled.codebook(scale.dtype, scale.device)
        spread = self.blocks.spread(scale, state.codes.shape)
        return rounded(looked_up(levels, state.codes) * spread, state.scale.dtype, None)

    def encode(self, state: ScaledState) -> dict[str, Field]:
        stored = self.value_dtype or state.scale.dtype
        codes = self.unscaled.encode(CodebookState(state.scale, state.codes))
        return {"scale": Field(state.scale.to(stored), Raw(stored)), **codes}

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> ScaledState:
        codes = self.unscaled.decode(arrays, shape, dtype).codes
        return ScaledState(arrays["scale"].to(dtype), codes)

    def free_shapes(self, shape: torch.Size, arrays: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {"scale": torch.Size((self.blocks.count(shape),))}

    def admits(self, state: ScaledState) -> bool:
        return admits_scale(self.blocks, self.value_dtype, state.scale, state.codes) and (
            int(state.codes.max()) < len(self.values)
        )

    def ops(self, state: ScaledState, positions: int = 1) -> Ops:
        """Under each scale the inputs are added up by code, multiplied by the values and scaled."""
        rows = state.codes.shape[0] if state.codes.dim() > 1 else 1
        sums = max(rows, state.scale.numel())
        return Ops(positions * (len(self.values) + 1) * sums, positions * state.codes.numel())


def rounded_scales(
    scales: Tensor, largest: Tensor, dtype: torch.dtype, value_dtype: torch.dtype | None
) -> Tensor:
    """float64 scales as they are stored, so that the largest |level| times its scale is finite."""
    finite = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    limit = (1 - 1e-6) * finite / largest.double().clamp_min(1)
    return rounded(scales.clamp(-limit, limit), dtype, value_dtype)


def admits_scale(
    blocks: Blocks, value_dtype: torch.dtype | None, scale: Tensor, codes: Tensor
) -> bool:
    """Whether there is one scale for each block of the codes, as it is stored."""
    return scale.shape == (blocks.count(codes.shape),) and torch.equal(
        rounded(scale, scale.dtype, value_dtype), scale
    )
