"""What the user's optimizer step does for LC: the two points at which the loss gradient can be
taken, and the two ways to follow the penalty.

`PenaltyHook`: the parameters hold w; the gradient of the penalty is added just before the step
(classic LC). `ImplicitHook`: the same, but the penalty has its own implicit step after the
optimizer's. `SumHook`: the parameters hold Δ(θ) and w lives here; it is put back for the step only
(straight-through over the sum).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .part import working
from .task import Task

Rule: TypeAlias = Callable[[Tensor, Tensor, Any], Tensor]


class Hook(ABC):
    """Attached to one optimizer: `before` its step, `after` it."""

    def __init__(self, optimizer: Optimizer, tasks: Sequence[Task], lr_guard: bool) -> None:
        self.optimizer, self.tasks, self.lr_guard = optimizer, tasks, lr_guard
        self.mu = 0.0
        self.guarded = (
            0  # optimizer steps in which the learning-rate guard was below the user's rate
        )
        self._rates: list[Any] | None = None
        self._check_groups()
        self._handles = [
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
        ]

    @abstractmethod
    def begin(self, mu: float) -> None:
        """A new μ, Δ(θ) or λ holds from the next step on."""

    @abstractmethod
    def before(self) -> None: ...

    @abstractmethod
    def after(self) -> None: ...

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _check_groups(self) -> None:
        own = {id(p) for task in self.tasks for p in task.parameters}
        for hook in self.optimizer._optimizer_step_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, Hook):
                shared = [
                    name
                    for task in other.tasks
                    for name, p in zip(task.names, task.parameters, strict=True)
                    if id(p) in own
                ]
                if shared:
                    raise ValueError(
                        f"Another LC already acts on {shared} in this optimizer: with two the "
                        "penalty would count twice. "
                        f"Finalize it, or make a new optimizer."
                    )
        if any(group.get("maximize", False) for group in self.optimizer.param_groups):
            raise ValueError(
                f"{type(self.optimizer).__name__}(maximize=True) would step away from the "
                "compressed weights. Minimize the negative of the objective instead."
            )
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for task in self.tasks:
            for name, p in zip(task.names, task.parameters, strict=True):
                if p.requires_grad and id(p) not in held:
                    raise ValueError(
                        f"{name!r} is to be compressed but is not in the optimizer. Make the "
                        "optimizer from this model's parameters."
                    )

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(x is not None for x in (*args[1:], *kwargs.values())):  # args[0] is the optimizer
            raise RuntimeError(
                f"{type(optimizer).__name__}.step(closure) computes its gradients inside the "
                "step, after LC's turn. "
                f"Compute them before step(), or use loss + lc.penalty() without optimizer=."
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__}(fused=True) under GradScaler unscales gradients "
                "inside its step, after LC's turn. "
                f"Use fused=False, or loss + lc.penalty()."
            )
        if any(task.aside is not None for task in self.tasks):
            raise RuntimeError(
                "optimizer.step() inside compressed() would train Δ(θ) instead of w."
            )
        self._check_gradients()
        self.before()  # may raise: before anything else is changed
        self._guard()

    def _post(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._rates is not None:
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                # a second LC on this optimizer may have saved a rate that the first had lowered
                _set_rate(group, max(group["lr"], rate))
            self._rates = None
        self.after()

    def _check_gradients(self) -> None:
        """On the CPU, where it costs no synchronisation; elsewhere the next C step finds the
        weights.
        """
        pairs = [
            (n, p.grad) for t in self.tasks for n, p in zip(t.names, t.parameters, strict=True)
        ]
        sparse = [n for n, grad in pairs if grad is not None and grad.layout is not torch.strided]
        if sparse:
            raise RuntimeError(
                f"The gradient of {sparse} is sparse, the penalty's is not: use sparse=False."
            )
        if getattr(self.optimizer, "found_inf", None) is not None:
            return  # a fused optimizer under GradScaler skips the step by itself
        grads = [grad for _, grad in pairs if grad is not None and grad.device.type == "cpu"]
        if grads and not torch.stack(torch._foreach_norm(grads)).isfinite().all():
            bad = [n for n, grad in pairs if grad is not None and not grad.isfinite().all()]
            if bad:
                raise RuntimeError(
                    f"The gradient of {bad} contains NaN or inf; no step was taken. "
                    "If training diverged as mu grew, lower the learning rate or use lr_guard=True."
                )

    def _guard(self) -> None:
        """lr ≤ 1/μ during this step (papers/learning-compression.md, section 1)."""
        if not self.lr_guard or self.mu <= 0:
            return
        groups = self.optimizer.param_groups
        if any(float(group["lr"]) > 1 / self.mu for group in groups):
            self.guarded += 1
            self._rates = [
                g["lr"].clone() if isinstance(g["lr"], Tensor) else g["lr"] for g in groups
            ]
            for group in groups:
                _set_rate(group, min(float(group["lr"]), 1 / self.mu))


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def fill_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Zeros for weights that the loss did not reach, if it reached others.

    The penalty acts on all of them, as it would as a term of the loss.
    """
    if any(p.grad is not None for p in parameters):
        for p in parameters:
            if p.grad is None and p.requires_grad:
                p.grad = torch.zeros_like(p)


class PenaltyHook(Hook):
    """Adds μ (w − Δ(θ)) − λ to the gradient of w: fused passes over the weights, no graph."""

    @torch.no_grad()
    def begin(self, mu: float) -> None:
        self.mu = mu
        self._parameters = [p for task in self.tasks for p in task.parameters]
        self._deltas = [delta for task in self.tasks for delta in task.delta]
        self._multipliers = [x for task in self.tasks for x in task.multipliers]

    @torch.no_grad()
    def before(self) -> None:
        fill_gradients(self._parameters)
        active = [
            (p, p.grad, delta, multiplier)
            for p, delta, multiplier in zip(
                self._parameters, self._deltas, self._multipliers, strict=True
            )
            if p.grad is not None
        ]
        if active:
            parameters, grads, deltas, multipliers = map(list, zip(*active, strict=True))
            distances = torch._foreach_sub(parameters, deltas)  # first, as μw and μΔ would cancel
            torch._foreach_add_(grads, distances, alpha=self.mu)
            torch._foreach_sub_(grads, multipliers)

    def after(self) -> None:
        pass


class ImplicitHook(Hook):
    """After the optimizer's own step on the loss, w ← (w + η (μ Δ(θ) + λ)) / (1 + η μ): an implicit
    Euler step on the penalty with the learning rate η of w's group, stable for any μ.
    """

    @torch.no_grad()
    def begin(self, mu: float) -> None:
        self.mu = mu
        self._targets = {
            id(p): (working(delta) + working(multiplier) / mu).to(p.dtype)
            for task in self.tasks
            for p, delta, multiplier in zip(
                task.parameters, task.delta, task.multipliers, strict=True
            )
        }

    def before(self) -> None:
        pass

    @torch.no_grad()
    def after(self) -> None:
        for group in self.optimizer.param_groups:
            own = [p for p in group["params"] if id(p) in self._targets and p.requires_grad]
            pull = float(group["lr"]) * self.mu
            if own:
                targets = [self._targets[id(p)] for p in own]
                torch._foreach_lerp_(own, targets, pull / (1 + pull))


def _change(task: Task, rule: Rule) -> None:
    """The rule on a task's gradient, which is that of the group where several tensors are one
    task. A tensor that the loss did not reach counts as 0 there and gets no gradient.
    """
    reached = [p for p in task.parameters if p.grad is not None]
    if not reached:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in task.parameters]
    changed = rule(task.join(grads), task.join(task.current), task.state)
    pieces = (changed,) if len(grads) == 1 else task.split(changed)
    for p, piece in zip(task.parameters, pieces, strict=True):
        if p.grad is not None:
            p.grad.copy_(piece)


class SumHook(Hook):
    """The loss gradient is taken at Δ(θ) and applied to w; a C step follows every `every` optimizer
    steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: Sequence[Task],
        lr_guard: bool,
        every: int,
        rule: Rule | None,
        c_step: Callable[[], None],
    ) -> None:
        super().__init__(optimizer, tasks, lr_guard)
        self.every, self.rule, self.c_step = every, rule, c_step
        self.count = 0

    def begin(self, mu: float) -> None:
        self.mu = mu

    @torch.no_grad()
    def before(self) -> None:
        if self.mu > 0:
            fill_gradients([p for task in self.tasks for p in task.parameters])
        for task in self.tasks:
            assert task.weights is not None
            if self.rule is not None:
                _change(task, self.rule)
            if self.mu > 0:
                zipped = zip(
                    task.parameters, task.weights, task.delta, task.multipliers, strict=True
                )
                for p, w, delta, multiplier in zipped:
                    if p.grad is not None:
                        p.grad.add_(w - delta, alpha=self.mu).sub_(multiplier)
        for task in self.tasks:  # last: the rule is the user's and may raise
            for p, w in zip(task.parameters, task.weights or (), strict=True):
                p.copy_(w)

    @torch.no_grad()
    def after(self) -> None:
        for task in self.tasks:
            assert task.weights is not None
            for p, w in zip(task.parameters, task.weights, strict=True):
                w.copy_(p)
        self.count += 1
        try:
            if self.count % self.every == 0:
                self.c_step()
        finally:
            for task in self.tasks:
                task.show_delta()
