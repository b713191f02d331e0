"""Sparse weights by their ℓ1 norm: the ball, and the price per unit of magnitude."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .order import argsort_rows
from .part import check_value_dtype, rounded, working
from .sparse import SparseForm, SparseState, check_price, weighed, where

_NEGLIGIBLE = 1e-200  # importance below this share of the largest counts as none: 1/h overflows
_SAMPLE = 4096  # weights that the first guess of the threshold looks at
_SUMMATION = 1e-12  # what two orders of adding up ‖θ‖₁ may differ by, relatively


class L1Form(SparseForm):
    """What both ℓ1 forms share: exact up to the rounding of values, and their norm."""

    @property
    def exact(self) -> bool:
        return self.value_dtype is None

    @property
    def exact_weighted(self) -> bool:
        return self.value_dtype is None

    def soft(self, w: Tensor, positions: Tensor, values: Tensor) -> SparseState:
        """The state with given magnitudes (k,) and `w`'s signs at ascending positions; zeros are
        not stored.
        """
        magnitudes = rounded(values, w.dtype, self.value_dtype)
        if not bool((magnitudes > 0).all()):
            kept = where(magnitudes > 0)
            positions, magnitudes = positions[kept], magnitudes[kept]
        signed = torch.copysign(magnitudes, w.reshape(-1)[positions])
        return SparseState(positions, signed, w.shape)

    def norm(self, state: SparseState) -> float:
        """‖θ‖₁, summed in float64."""
        return float(state.values.abs().sum(dtype=torch.float64))


@dataclass(frozen=True)
class L1Ball(L1Form):
    """Weights whose magnitudes add up to at most a given radius.

    Solves   min Σ h (w − θ)²   s.t. ‖θ‖₁ ≤ radius
    exactly: θ = sign(w)·max(|w| − τ/h, 0) with the one τ ≥ 0 for which the norm is the radius, or
    τ = 0 where w is inside; without importance all kept magnitudes shrink by the same τ. Weights
    of importance 0 become 0.

    The norm as a function of τ is convex and piecewise linear. Newton's method on it rises
    monotonically to τ and ends after finitely many steps: each works on the weights that the last
    threshold kept (papers/learning-compression.md, section 3, ℓ1 constraint; section 7, row 6).

    Feasible in the stored numbers: ‖θ‖₁ ≤ radius up to the rounding of the sum in float64. Where
    rounding values to the nearest would leave the ball, they are rounded towards zero. Exact up to
    that rounding; with a `value_dtype` the part does not claim to be exact.

    Args:
        radius: at least 0; 0 gives Δ = 0, one of at least ‖w‖₁ gives w.
        value_dtype: how values are stored; None: in the weights' dtype.

    State: as `Sparse`. What `then` or `refine` makes of the values keeps the support, not the
        radius.

    Cost: a few passes over w. Stores the non-zero values and the cheapest of a bitmap and gap-coded
        positions.

    Raises:
        ValueError: `radius` is negative or not finite.
    """

    radius: float
    value_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_value_dtype(self, self.value_dtype)
        if not (self.radius >= 0 and math.isfinite(self.radius)):
            raise ValueError(f"L1Ball(radius={self.radius}): radius must be finite and >= 0.")

    def solve(
        self, w: Tensor, warm: SparseState | None, mu: float | None, importance: Tensor | None
    ) -> SparseState:
        u = working(w).abs().reshape(-1)
        shrink = None
        if importance is not None:
            shrink = _inverse(importance.to(w.device).double().expand(w.shape).reshape(-1))
            u = torch.where(shrink.isfinite(), u, 0)
        positions, values = project_l1(u, shrink, self.radius)
        state = self.soft(w, positions, values)
        if self.norm(state) <= self.radius:
            return state
        return self.soft(w, positions, _towards_zero(values, w.dtype, self.value_dtype))

    def admits(self, state: SparseState) -> bool:
        return self.norm(state) <= self.radius * (1 + _SUMMATION)


@dataclass(frozen=True)
class L1Penalty(L1Form):
    """Sparse weights at a price per unit of magnitude.

    Solves   min  μ/2 Σ h (w − θ)² + α ‖θ‖₁
    exactly, by soft thresholding: θ = sign(w)·max(|w| − α/(μ h), 0)
    (papers/learning-compression.md, section 3, ℓ1 penalty). Weights of importance 0 become 0. Of
    the numbers that `value_dtype` holds the nearest to θ is the best: the objective is a parabola
    around it on w's side of zero, and zero is on both sides.

    Args:
        alpha: price of a unit of magnitude, >= 0, in units of the loss.
        value_dtype: how values are stored; None: in the weights' dtype.

    State: as `Sparse`.

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

    @property
    def exact(self) -> bool:
        return True

    @property
    def exact_weighted(self) -> bool:
        return True

    def solve(
        self, w: Tensor, warm: SparseState | None, mu: float | None, importance: Tensor | None
    ) -> SparseState:
        step = self.alpha / weighed(self, mu)
        u = working(w).abs().reshape(-1)
        if importance is None:
            positions = where(u >= min(step, torch.finfo(u.dtype).max))
            return self.soft(w, positions, u[positions].double() - step)
        h = importance.to(w.device).double().expand(w.shape).reshape(-1)
        values = torch.where(h > 0, u - step / h, 0)
        positions = where(values > 0)
        return self.soft(w, positions, values[positions])

    def penalty(self, state: SparseState) -> float:
        return self.alpha * self.norm(state)


def project_l1(u: Tensor, shrink: Tensor | None, radius: float) -> tuple[Tensor, Tensor]:
    """Positions, ascending, and magnitudes in float64 of what the projection of magnitudes u (n,)
    keeps: max(u − τ·shrink, 0).

    A weight's `shrink` is 1/h up to a common factor; None: all 1. Those with u = 0 are never kept.
    """
    if float(u.sum(dtype=torch.float64)) <= radius:
        positions = where(u > 0)
        return positions, u[positions].double()
    guess = (0.9 * _guess(u, shrink, radius)).to(u.dtype)
    # Weights below a cut never matter if the threshold found without them is not below it.
    for cut in (guess, torch.zeros_like(guess)):
        positions = where(u > (cut if shrink is None else cut * shrink))
        kept = u[positions].double()
        slopes = None if shrink is None else shrink[positions]
        tau, active = _newton(kept, slopes, radius)
        if bool(tau >= cut):
            break
    if not bool(active.all()):
        chosen = where(active)
        positions, kept = positions[chosen], kept[chosen]
        slopes = None if slopes is None else slopes[chosen]
    slope = 1.0 if slopes is None else slopes
    values = kept - tau * slope
    # One more step on the set found makes good what this difference cancelled.
    rest = (values.sum() - radius) / (kept.numel() if slopes is None else slopes.sum())
    values = (values - rest * slope).clamp_min(0)
    total = values.sum()
    return positions, torch.where(total > radius, values * (radius / total), values)


def _newton(kept: Tensor, slopes: Tensor | None, radius: float) -> tuple[Tensor, Tensor]:
    """τ with Σ max(kept − τ·slopes, 0) = radius < Σ kept, and a mask of the terms that count.

    Rises from 0; the terms that count become fewer until they stay the same.
    """
    tau, left = kept.new_zeros(()), kept.clone()
    active, count = torch.ones_like(kept, dtype=torch.bool), kept.numel()
    while count > 0:
        slope = count if slopes is None else torch.where(active, slopes, 0).sum()
        tau = tau + (left.clamp_min_(0).sum() - radius) / slope
        left = kept - (tau if slopes is None else tau * slopes)
        remain = left > 0
        found = int(torch.count_nonzero(remain))
        if found in (0, count):  # 0: of a radius next to nothing
            break
        active, count = remain, found
    return tau, active


def _guess(u: Tensor, shrink: Tensor | None, radius: float) -> Tensor:
    """The threshold for every n-th weight and the n-th part of the radius.

    τ = max over k of (Σ u − radius) / Σ shrink over the k weights of largest u/shrink.
    """
    every = max(1, u.numel() // _SAMPLE)
    x = u[::every].double()
    slopes = torch.ones_like(x) if shrink is None else shrink[::every]
    slopes = torch.where(x > 0, slopes, 1)  # not inf
    order = argsort_rows((x / slopes).reshape(1, -1)).reshape(-1).flip(0)
    share = radius * x.numel() / u.numel()
    return ((x[order].cumsum(0) - share) / slopes[order].cumsum(0)).max().clamp_min(0)


def _inverse(h: Tensor) -> Tensor:
    """max(h) / h, at least 1; inf where h is 0 or next to nothing."""
    largest = h.max()
    return torch.where(h > largest * _NEGLIGIBLE, largest / h, torch.inf)


def _towards_zero(x: Tensor, dtype: torch.dtype, value_dtype: torch.dtype | None) -> Tensor:
    """Numbers that both dtypes hold, not above x >= 0 and at most 3/2 units in the last place below
    it; 0 for x below the smallest normal number that has no such neighbour.
    """
    eps = max(torch.finfo(t).eps for t in (dtype, value_dtype or dtype))
    result = torch.zeros_like(x)
    for candidate in (x * (1 - eps), x):
        near = rounded(candidate, dtype, value_dtype).double()
        result = torch.where(near <= x, near, result)
    return result
