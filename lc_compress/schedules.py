"""Sequences of μ, one value per LC step."""

from __future__ import annotations

import math
from collections.abc import Iterable


def geometric(mu0: float, growth: float, steps: int) -> tuple[float, ...]:
    """μ_k = mu0 · growthᵏ for k = 0 … steps − 1.

    Raises:
        ValueError: mu0 <= 0, growth < 1 or steps < 1.

    >>> geometric(0.5, growth=2, steps=3)
    (0.5, 1.0, 2.0)
    """
    if not mu0 > 0:
        raise ValueError(f"geometric: mu0 must be positive, got {mu0}.")
    if not growth >= 1:
        raise ValueError(f"geometric: growth must be at least 1 (mu may not fall), got {growth}.")
    return checked(mu0 * growth**k for k in range(_count("geometric", steps)))


def constant(mu: float, steps: int) -> tuple[float, ...]:
    """The same μ at every step; 0 is for the straight-through gradient only.

    Multipliers move after the last step with a μ, so here only once, at the end: to learn with
    them at a nearly constant μ use `geometric` with a growth just above 1.

    >>> constant(0.0, steps=2)
    (0.0, 0.0)
    """
    return checked([mu] * _count("constant", steps))


def checked(schedule: Iterable[float]) -> tuple[float, ...]:
    """The schedule as floats, if it is one: not empty, finite, not negative, not falling."""
    if not isinstance(schedule, Iterable):
        raise TypeError(f"A schedule is a sequence of mu, one per LC step, got {schedule!r}.")
    values = tuple(float(mu) for mu in schedule)
    if not values:
        raise ValueError("The schedule is empty: give at least one mu.")
    for k, mu in enumerate(values):
        if not (mu >= 0 and math.isfinite(mu)):
            raise ValueError(f"The schedule's mu must be finite and >= 0, got {mu} at step {k}.")
        if k and mu < values[k - 1]:
            raise ValueError(f"The schedule's mu falls from {values[k - 1]} to {mu} at step {k}.")
    return values


def _count(name: str, steps: int) -> int:
    if steps < 1:
        raise ValueError(f"{name}: steps must be at least 1, got {steps}.")
    return steps
