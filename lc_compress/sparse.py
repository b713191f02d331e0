"""Sparse weights: a few exact values at chosen positions, by a budget or by a price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .coding import Raw, Support
from .order import top
from .part import Coding, Field, Ops, Part, check_value_dtype, rounded, working


@dataclass(frozen=True, eq=False)
class SparseState:
    """positions (k,) int64, ascending, into the flattened weights; values (k,) in their dtype;
    shape of the weights.
    """

    positions: Tensor
    values: Tensor
    shape: torch.Size


def gains(w: Tensor, importance: Tensor | None, value_dtype: torch.dtype | None) -> Tensor:
    """h (w² − (w − r)²): by how much storing r = round(w) instead of 0 lowers the squared error, in
    float64.
    """
    x = w.double()
    r = x if value_dtype is None else rounded(w, w.dtype, value_dtype).double()
    gain = r * (2 * x - r)
    return gain if importance is None else gain * importance


def magnitudes(w: Tensor, importance: Tensor | None) -> Tensor:
    """What the largest weights are chosen by: |w|, or h w² in float64."""
    return working(w).abs() if importance is None else gains(w, importance, None)


def where(mask: Tensor) -> Tensor:
    """Positions, ascending, at which the flattened mask holds."""
    flat = mask.reshape(-1)
    if flat.device.type == "cpu":  # an eighth of the time of torch's
        return torch.from_numpy(np.flatnonzero(flat.numpy()))
    return torch.nonzero(flat).reshape(-1)


def check_price(part: object, alpha: float) -> None:
    if not (alpha >= 0 and math.isfinite(alpha)):
        name = type(part).__name__
        raise ValueError(f"{name}(alpha={alpha}): alpha must be finite and >= 0.")


def weighed(part: object, mu: float | None) -> float:
    """μ, which a penalty form cannot do without."""
    if mu is None:
        raise ValueError(
            f"{part} weighs a penalty against the distance to w, so `project` needs `mu`."
        )
    return mu


class SparseForm(Part[SparseState]):
    """What all forms of sparsity share: how a chosen support is rebuilt and written."""

    value_dtype: torch.dtype | None

    @property
    def exact(self) -> bool:
        return True

    @property
    def exact_weighted(self) -> bool:
        return True

    @property
    def free(self) -> tuple[str, ...]:
        return ("values",)

    def keep(self, w: Tensor, positions: Tensor) -> SparseState:
        """The state with `w`'s values at ascending positions (k,) of the flattened weights; zeros
        are not stored, they would gain nothing.
        """
        values = rounded(w.reshape(-1)[positions], w.dtype, self.value_dtype)
        if not bool(values.all()):
            positions, values = positions[values != 0], values[values != 0]
        return SparseState(positions, values, w.shape)

    def coding(self, shape: torch.Size) -> Coding:
        """How positions in weights of this shape are written."""
        return Support(math.prod(shape))

    def reconstruct(self, state: SparseState) -> Tensor:
        zeros = state.values.new_zeros(math.prod(state.shape))
        return zeros.scatter(0, state.positions, state.values).view(state.shape)

    def added(self, total: Tensor, state: SparseState) -> Tensor:
        values = state.values.to(total.dtype)
        return total.reshape(-1).index_add(0, state.positions, values).view(total.shape)

    def encode(self, state: SparseState) -> dict[str, Field]:
        stored = self.value_dtype or state.values.dtype
        return {
            "positions": Field(state.positions, self.coding(state.shape)),
            "values": Field(state.values.to(stored), Raw(stored)),
        }

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> SparseState:
        return SparseState(arrays["positions"], arrays["values"].to(dtype), torch.Size(shape))

    def free_shapes(self, shape: torch.Size, arrays: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {"values": torch.Size(shape)}  # `then` sees them in the dense layout

    def ops(self, state: SparseState, positions: int = 1) -> Ops:
        k = state.positions.numel()
        return Ops(positions * k, positions * k)


@dataclass(frozen=True)
class Sparse(SparseForm):
    """At most a given number of weights that are not zero, each stored exactly.

    Solves   min Σ h (w − θ)²   s.t. ‖θ‖₀ ≤ κ
    exactly, by keeping the κ largest |w| (with importance, the largest h w²; with a `value_dtype`,
    the largest gain after rounding). Among equal weights the first in memory order are kept
    (papers/learning-compression.md, section 3, l0 constraint).

    Args: exactly one of
        nonzeros: κ, at least 0; more than there are weights keeps all.
        density: κ as a share of the weights, in [0, 1], rounded to the nearest count.
    and value_dtype: how values are stored; None: in the weights' dtype.

    Cost: O(N) selection. Stores the values and the cheapest of a bitmap and gap-coded positions.
        Applies in κ multiplications.

    Raises:
        ValueError: not exactly one budget, a negative count, or a density outside [0, 1].
    """

    nonzeros: int | None = None
    density: float | None = None
    value_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_value_dtype(self, self.value_dtype)
        if (self.nonzeros is None) == (self.density is None):
            raise ValueError(
                f"Sparse needs exactly one budget, nonzeros or density, got {self.nonzeros} and "
                f"{self.density}."
            )
        if self.nonzeros is not None and self.nonzeros < 0:
            raise ValueError(f"Sparse(nonzeros={self.nonzeros}): nonzeros must be >= 0.")
        if self.density is not None and not 0 <= self.density <= 1:
            raise ValueError(f"Sparse(density={self.density}): density must be in [0, 1].")

    def budget(self, size: int) -> int:
        """κ for a tensor of `size` weights."""
        if self.nonzeros is not None:
            return min(self.nonzeros, size)
        assert self.density is not None
        return round(self.density * size)

    def with_share(self, share: float) -> Sparse:
        if self.nonzeros is not None:
            return replace(self, nonzeros=round(share * self.nonzeros))
        assert self.density is not None
        return replace(self, density=share * self.density)

    def solve(
        self, w: Tensor, warm: SparseState | None, mu: float | None, importance: Tensor | None
    ) -> SparseState:
        plain = importance is None and self.value_dtype is None
        score = working(w).abs() if plain else gains(w, importance, self.value_dtype)
        return self.keep(w, self.select(score))

    def select(self, score: Tensor) -> Tensor:
        """Positions, ascending, of the entries of largest score that the budget allows."""
        return top(score, self.budget(score.numel()))

    def admits(self, state: SparseState) -> bool:
        return state.positions.numel() <= self.budget(math.prod(state.shape))


@dataclass(frozen=True)
class SparsePenalty(SparseForm):
    """Sparse weights at a price per weight.

    Solves   min  μ/2 Σ h (w − θ)² + α ‖θ‖₀
    exactly, by hard thresholding: w is kept where μ/2 · h w² > α, so |w| > √(2α/μ) without
    importance (papers/learning-compression.md, section 3, l0 penalty).

    Args:
        alpha: price of one stored weight, >= 0, in units of the loss.
        value_dtype: how values are stored; None: in the weights' dtype.

    Cost: O(N).

    Raises:
        ValueError: `alpha` is negative or not finite; `project` was called without `mu`, which a
            penalty is weighed against.
    """

    alpha: float
    value_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_value_dtype(self, self.value_dtype)
        check_price(self, self.alpha)

    def solve(
        self, w: Tensor, warm: SparseState | None, mu: float | None, importance: Tensor | None
    ) -> SparseState:
        kept = gains(w, importance, self.value_dtype) * (weighed(self, mu) / 2) > self.alpha
        return self.keep(w, where(kept))

    def penalty(self, state: SparseState) -> float:
        return self.alpha * state.positions.numel()
