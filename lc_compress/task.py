"""One task of a run: tensors of the model, the part they become, and what the LC algorithm knows of
them (θ, Δ(θ), λ).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .part import Part, working
from .selection import Selected
from .views import joined


class Task:
    """State of one task. Weights are read and written through the model's own parameters.

    names, parameters: the tensors, one unless the task is joint.
    state: θ.
    delta: Δ(θ), one tensor per parameter, in its memory format.
    multipliers: λ, likewise; in float32 for half-precision weights, where small steps vanish.
    weights: w where the parameters hold Δ(θ) instead (straight-through), else None.
    aside: w while the parameters hold Δ(θ) for a moment (`LC.compressed`), else None.
    """

    def __init__(self, selected: Selected) -> None:
        self.name = selected.name
        self.part: Part[Any] = selected.part
        self.names = tuple(selected.tensors)
        self.parameters: tuple[nn.Parameter, ...] = tuple(selected.tensors.values())
        self.state: Any = None
        self.delta: tuple[Tensor, ...] = ()
        self.multipliers = tuple(torch.zeros_like(working(p.detach())) for p in self.parameters)
        self.weights: tuple[Tensor, ...] | None = None
        self.aside: tuple[Tensor, ...] | None = None

    @property
    def current(self) -> tuple[Tensor, ...]:
        """w, wherever it is."""
        return self.weights or self.aside or tuple(p.detach() for p in self.parameters)

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def shape(self) -> torch.Size:
        """Shape of what the part sees."""
        return joined([p.shape for p in self.parameters])

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors as the part sees them: one as it is, several as one vector."""
        if len(tensors) == 1:
            return tensors[0]
        return torch.cat([x.reshape(-1) for x in tensors])

    def split(self, joined: Tensor) -> tuple[Tensor, ...]:
        """Back to one tensor per parameter, in its memory format."""
        pieces = joined.reshape(-1).split([p.numel() for p in self.parameters])
        shaped = [x.view(p.shape) for x, p in zip(pieces, self.parameters, strict=True)]
        return tuple(
            torch.empty_like(p, requires_grad=False).copy_(x)
            for x, p in zip(shaped, self.parameters, strict=True)
        )

    @torch.no_grad()
    def solve(self, mu: float) -> Any:
        """The C step: θ = argmin ‖w − λ/μ − Δ(θ)‖², from the current θ. Nothing is changed.

        Raises:
            RuntimeError: from the cause, with the task's name, shape, part and μ.
        """
        try:
            target = self.join(self.current)
            if mu > 0:
                target = (working(target) - working(self.join(self.multipliers)) / mu).to(
                    target.dtype
                )
            return self.part.project(target, self.state, mu=mu or None)
        except Exception as cause:
            raise RuntimeError(
                f"C step failed for {self.name}, shape {tuple(self.shape)}, with {self.part}, "
                f"mu={mu:g}: {cause}"
            ) from cause

    @torch.no_grad()
    def adopt(self, state: Any) -> None:
        """Take `state` as θ."""
        self.state = state
        self.delta = self.split(self.part.reconstruct(state))

    @torch.no_grad()
    def step_multipliers(self, mu: float) -> None:
        """λ ← λ − μ (w − Δ(θ))."""
        for multiplier, w, delta in zip(self.multipliers, self.current, self.delta, strict=True):
            multiplier.sub_(working(w) - working(delta), alpha=mu)

    @torch.no_grad()
    def show_delta(self) -> None:
        """The parameters hold Δ(θ)."""
        for p, delta in zip(self.parameters, self.delta, strict=True):
            p.copy_(delta)

    def norms(self) -> tuple[float, float]:
        """‖w − Δ(θ)‖² and ‖w‖², in float64."""
        pairs = zip(self.current, self.delta, strict=True)
        distance = sum(float((w.double() - d.double()).square().sum()) for w, d in pairs)
        return distance, sum(float(w.double().square().sum()) for w in self.current)

    def gap(self) -> float:
        """‖w − Δ(θ)‖ / ‖w‖; 0 where both are zero."""
        distance, size = self.norms()
        return math.sqrt(distance / size) if size > 0 else math.sqrt(distance)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and strings: θ by the arrays that its part stores."""
        fields = self.part.encode(self.state)
        return {
            "part": str(self.part),
            "names": list(self.names),
            "shapes": [list(p.shape) for p in self.parameters],
            "arrays": {name: field.data.clone() for name, field in fields.items()},
            "multipliers": [x.clone() for x in self.multipliers],
            "weights": None if self.weights is None else [w.clone() for w in self.weights],
        }

    def check_state(self, saved: dict[str, Any], started: Sequence[Tensor]) -> Any:
        """θ of a state that was made by this task; others are refused. Nothing is changed.

        Raises:
            ValueError: another plan, or damaged.
        """
        own: dict[str, object] = {"part": str(self.part), "names": list(self.names)}
        own["shapes"] = [list(p.shape) for p in self.parameters]
        for key, expected in own.items():
            if saved.get(key) != expected:
                raise ValueError(
                    f"The state is of another model or plan: {self.name} has {key} {expected}, "
                    f"the state {saved.get(key)}."
                )
        if (saved["weights"] is None) != (self.weights is None):
            raise ValueError(f"The state of {self.name} was made with another `gradient`.")
        try:
            for name, here, there in (
                ("multipliers", self.multipliers, saved["multipliers"]),
                ("weights", self.weights or (), saved["weights"] or ()),
                ("started", self.parameters, started),
            ):
                for x, y in zip(here, there, strict=True):
                    if y.shape != x.shape or y.dtype != x.dtype:
                        raise ValueError(f"{name} has shape {tuple(y.shape)}, {y.dtype}")
            theta = self.decoded(saved["arrays"])
            delta = self.part.reconstruct(theta)
            if delta.shape != self.shape or delta.dtype != self.parameters[0].dtype:
                raise ValueError(f"Δ(θ) has shape {tuple(delta.shape)}, {delta.dtype}")
        except Exception as cause:
            raise ValueError(
                f"The state of {self.name}, shape {tuple(self.shape)}, is damaged: {cause}"
            ) from cause
        return theta

    def decoded(self, arrays: dict[str, Tensor]) -> Any:
        """θ from the arrays that `state_dict` holds."""
        p = self.parameters[0]
        moved = {name: x.to(p.device) for name, x in arrays.items()}
        return self.part.decode(moved, self.shape, p.dtype)

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any], theta: Any) -> None:
        """Restore θ, λ and w; `theta` is what `check_state` returned, called on all tasks first."""
        self.adopt(theta)
        for own, other in zip(self.multipliers, saved["multipliers"], strict=True):
            own.copy_(other)
        for own, other in zip(self.weights or (), saved["weights"] or (), strict=True):
            own.copy_(other)
