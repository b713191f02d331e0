"""One projection problem, the rounding it allows, and assertions about what solves it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, gaussian, generator

# ------------------------------------------------------------------ tolerances, all of them

# Optimal and stationary up to this share of the objective.
RELATIVE = 1e-6
# Rounding errors allowed in Δ, in units of eps of the coarsest type that Δ passes through: a low
# rank product has two rounded factors and a rounded sum, the longest chain there is.
ROUNDINGS = 8
# Sums in float64 may lose this share of Σ w²: solvers that score candidates by prefix sums
# (S₂ − S₁²/m) cannot tell two apart that differ by less.
CANCELLATION = 1e-13
# Two ways to the same Δ (another order of summation, another basis) may differ by this many eps of
# the weights' type, more than rounding where a gap in the spectrum amplifies it.
SAME_DELTA = 100


def coarsest_eps(case: Case, w: Tensor) -> float:
    """Relative spacing of the coarsest type that the values of Δ are rounded to."""
    return max(torch.finfo(t).eps for t in (w.dtype, case.value_dtype) if t is not None)


# ------------------------------------------------------------------ one projection problem


@dataclass(frozen=True, eq=False)
class Problem:
    """min over θ of  μ/2 Σ importance·(w − Δ(θ))² + penalty(θ), with the rounding it allows."""

    case: Case
    w: Tensor
    importance: Tensor | None = None

    @property
    def certain(self) -> bool:
        """The part claims a global minimiser."""
        part = self.case.part
        return part.exact if self.importance is None else part.exact_weighted

    @property
    def kind(self) -> str:
        """For messages."""
        return "" if self.importance is None else " with importance"

    def solve(self, warm: Any = None) -> Any:
        """`solve` as `project` calls it, but without the safeguard."""
        with torch.no_grad():
            return self.case.part.solve(self.w, warm, self.case.mu, self.importance)

    def project(self, warm: Any = None) -> Any:
        """The checked, safeguarded projection."""
        return self.case.part.project(self.w, warm, mu=self.case.mu, importance=self.importance)

    def delta(self, state: Any) -> Tensor:
        """Δ(θ)."""
        with torch.no_grad():
            return self.case.part.reconstruct(state)

    def objective(self, state: Any) -> float:
        """The value that `project` compares."""
        return self.case.part.objective(self.w, state, self.case.mu, self.importance)

    def slack(self, state: Any, value: float) -> float:
        """How far rounding can move an objective of about `value`, reached by `state`.

        A change δ of Δ changes ‖w − Δ‖² by at most 2 ‖w − Δ‖ ‖δ‖ + ‖δ‖².
        """
        weights = torch.ones_like(self.w) if self.importance is None else self.importance
        size = self.w.double() ** 2 + self.delta(state).double() ** 2
        energy = float((size * weights.double()).sum())
        half_mu = (1.0 if self.case.mu is None else self.case.mu) / 2
        moved = ROUNDINGS * coarsest_eps(self.case, self.w) * math.sqrt(energy)
        residual = math.sqrt(abs(value) / half_mu)
        rounding = half_mu * (2 * residual * moved + moved**2 + CANCELLATION * energy)
        return rounding + RELATIVE * abs(value)


def expect(condition: bool, message: str) -> None:
    """An assertion that survives `python -O`."""
    if not condition:
        raise AssertionError(message)


def expect_same(a: Tensor, b: Tensor, message: str) -> None:
    """Bit for bit."""
    expect(a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all()), message)


def expect_close(a: Tensor, b: Tensor, message: str) -> None:
    """The same Δ up to the order of floating-point operations."""
    tolerance = max(SAME_DELTA * torch.finfo(a.dtype).eps, 1e-10)
    distance = float(torch.linalg.vector_norm(a.double() - b.double()))
    allowed = tolerance * float(torch.linalg.vector_norm(b.double()))
    expect(distance <= allowed, f"{message}: distance {distance:.3g} > {allowed:.3g}")


def random_importance(w: Tensor) -> Tensor:
    """Between 0.1 and 1.1, in float64 for such weights, else in float32."""
    dtype = w.dtype if w.dtype == torch.float64 else torch.float32
    random = torch.rand(w.shape, generator=generator(1), dtype=torch.float64) + 0.1
    return random.to(w.device, dtype)


def partial_importance(w: Tensor) -> Tensor:
    """The same, and zero for about a third of the weights."""
    counts = torch.rand(w.shape, generator=generator(2)) > 1 / 3
    return random_importance(w) * counts.to(w.device)


def suitable_importance(case: Case, w: Tensor) -> Tensor:
    """With zeros if the part is exact; weights that do not count make local solvers very slow."""
    return partial_importance(w) if case.part.exact_weighted else random_importance(w)


def neighbours(w: Tensor) -> list[Tensor]:
    """Other weights of the same size: moved a little, and unrelated."""
    noise = gaussian(tuple(w.shape), generator(3)).to(w.device)
    scale = w.double().abs().max()
    return [(w.double() + 0.05 * scale * noise).to(w.dtype), (scale * noise / 4).to(w.dtype)]
