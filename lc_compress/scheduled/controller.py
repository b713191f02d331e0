"""The controller: it switches parts on, ramps and freezes them while the user trains."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .. import gradients
from ..lstep import Rule, SumHook
from ..metrics import Report, measure_positions, report
from ..part import Part
from ..selection import Key, select, unwrap
from ..task import Task
from .plan import Event, Plan
from .pruner import ActivationPruner
from .watching import Activation
from .weights import ScheduledTask

_VERSION = 1


@dataclass(frozen=True)
class ScheduledReport(Report):
    """A report, and how far the plan has come.

    Weights that nothing is switched on for yet count as uncompressed.

    status: what is done and what is next.   activations: a line per module.
    """

    status: str = ""
    activations: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([self.status, super().__str__(), *self.activations])


@dataclass(frozen=True)
class _Due:
    """One thing to do after a step: `what` is prune, quantize, switch or begin."""

    what: str
    name: str
    share: float = 1.0

    def __str__(self) -> str:
        return f"{self.what} {self.name}"


class Scheduled:
    """Train with parts that a plan switches on, ramps and freezes, straight-through.

    The parameters hold Δ(θ) except inside `optimizer.step()`, as in `LC(gradient="sum")`: the loss
    and its gradient are those of the compressed model, the step acts on weights w that this object
    keeps. Masks follow |w| at the events of pruning, stay in between, and are frozen after the
    last. Scales of number formats are chosen once, when they are switched on; their codes follow w
    at every step. Parts that are neither sparsity nor a number format are projected anew at every
    step from then on. Values are always masked first, then quantized: the plan says only which
    starts first (papers/joint-weights-activations.md).

    Modules for activations are part of the model: `insert` them first. Their windows end at an
    event and begin at the one before at the earliest. With DistributedDataParallel sums are added
    up and values are gathered over the processes.

    Modules that an earlier run has switched on may stay as they are: a plan without their event
    leaves them alone.

    A finished run (`finalize`) is reported, saved and loaded as one of `LC`.

    Args:
        model: any module; its parameters stay plain parameters.
        weights: {pattern: part} as for `LC`. Of `Sparse(…).then(FixedPoint(8))` the first is pruned
            by the plan, the second quantized; `Sparse`, `NM` and `BlockSparse` alone are pruned,
            all other parts are switched on at the time of quantization.
        plan: when, and how long the training is.
        optimizer: its step is the clock.
        plans: other plans of as many steps, by the name of a task or of a layer with inserted
            modules, or a glob.
        rule: a function (grad, w, θ) → grad for weights (`gradients`); the default is the paper's.
        batch_size: examples per step and process, for the windows of activations.
        example_inputs: a batch, to count the operations of convolutions in `report()`.

    Raises:
        TypeError, ValueError: weights, plans or options do not fit, a part that the plan never
            switches on, activations that are switched on before there is any data; nothing has then
            been changed.
        RuntimeError: in `optimizer.step()`: a quantizer or pruner that has seen no data, NaN.
    """

    inside: str | None = None

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[Key, Part[Any]] | None = None,
        *,
        plan: Plan,
        optimizer: Optimizer,
        plans: Mapping[str, Plan] | None = None,
        rule: Rule = gradients.paper,
        batch_size: int | None = None,
        example_inputs: Any = None,
    ) -> None:
        self.model, self.plan = model, plan
        self.tasks: list[Any] = (
            [ScheduledTask(x) for x in select(model, weights)] if weights else []
        )
        self.activations = {
            n: m for n, m in unwrap(model).named_modules() if isinstance(m, Activation)
        }
        if not self.tasks and not self.activations:
            raise ValueError("Scheduled needs weights={pattern: part}, or activations: `insert`.")
        self._group = _group(model)
        self._batch = batch_size
        self._timeline: dict[int, list[_Due]] = {}
        self._plans = dict(plans or {})
        self._fill_timeline(self._plans)
        for task in self.tasks:
            task.check()
        self._positions = measure_positions(model, example_inputs)
        self._started = {task.name: tuple(w.clone() for w in task.weights) for task in self.tasks}
        self._hook: SumHook | None = SumHook(optimizer, self.tasks, False, 1, rule, self._advance)
        self._done = 0
        try:
            self._advance()
        except BaseException:
            self._hook.remove()
            raise
        for task in self.tasks:
            task.show_delta()

    # ------------------------------------------------------------------ the timeline

    def _fill_timeline(self, plans: Mapping[str, Plan]) -> None:
        places = [name.partition(".inserted_")[0] for name in self.activations]
        names = [*(task.name for task in self.tasks), *places]
        for pattern in plans:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"plans: no task or layer {pattern!r}. There are {names}.")
            if plans[pattern].steps != self.plan.steps:
                raise ValueError(
                    f"plans: that of {pattern!r} is for {plans[pattern].steps} steps, the training "
                    f"has {self.plan.steps}. Write it for as many, or take `plan.scaled(total)`."
                )
        for task in self.tasks:
            plan = self._plan_of(task.name, plans)
            for half, what in ((task.pruner, "prune"), (task.quantizer, "quantize")):
                if half is not None:
                    for event in _events(plan, what, task.name, half):
                        self._add(event.step, _Due(what, task.name, event.share))
        for place, (name, module) in zip(places, self.activations.items(), strict=True):
            plan = self._plan_of(place, plans)
            prunes = isinstance(module, ActivationPruner)
            what = "prune_activations" if prunes else "quantize_activations"
            if module.on and not plan.events(what):
                continue  # from an earlier run; stays as it is
            start = 0
            for event in _events(plan, what, name, module):
                if module.watches:
                    self._add(max(start, event.step - self._window(module)), _Due("begin", name))
                    if event.step == 0:
                        raise ValueError(
                            f"{name} is switched on at step 0, before it has seen any data: step 1 "
                            "is the first possible."
                        )
                self._add(event.step, _Due("switch", name, event.share))
                start = event.step
        order = ("prune", "quantize", "switch", "begin")
        for dues in self._timeline.values():
            dues.sort(key=lambda due: order.index(due.what))

    def _plan_of(self, name: str, plans: Mapping[str, Plan]) -> Plan:
        found = {key for key in plans if fnmatchcase(name, key)}
        key = name if name in found else next(iter(found), None)
        if len(found) > 1 and key != name:
            raise ValueError(f"plans: {sorted(found)} both match {name!r}. Name it exactly.")
        return self.plan if key is None else plans[key]

    def _add(self, step: int, due: _Due) -> None:
        self._timeline.setdefault(step, []).append(due)

    def _window(self, module: Activation) -> int:
        """In steps."""
        if self._batch is None or self._batch < 1:
            raise ValueError(
                "Scheduled needs batch_size=, the examples per step and process, to know when the "
                f"windows of activations begin; got {self._batch}."
            )
        world = 1 if self._group is None else torch.distributed.get_world_size(self._group)
        return -(-module.window // (self._batch * world))

    @property
    def position(self) -> int:
        """Optimizer steps done."""
        return self._hook.count if self._hook is not None else self._done

    @property
    def finished(self) -> bool:
        """Whether `finalize` has ended the run."""
        return self._hook is None

    def _left(self) -> dict[int, list[_Due]]:
        """Events to come."""
        return {
            step: events
            for step, dues in sorted(self._timeline.items())
            if step > self.position and (events := [x for x in dues if x.what != "begin"])
        }

    @torch.no_grad()
    def _advance(self) -> None:
        """After a step: what is due, then Δ(θ) of the weights of now."""
        named = {task.name: task for task in self.tasks}
        for due in self._timeline.get(self.position, ()):
            try:
                if due.what == "prune":
                    named[due.name].prune(due.share)
                elif due.what == "quantize":
                    named[due.name].quantize()
                elif due.what == "begin":
                    self._begin(self.activations[due.name])
                else:
                    if self._group is not None:
                        self.activations[due.name].gather(self._group)
                    self.activations[due.name].switch(due.share)
            except Exception as cause:
                raise RuntimeError(f"Step {self.position}: {due}: {cause}") from cause
        for task in self.tasks:
            task.follow()

    def _begin(self, module: Activation) -> None:
        assert self._batch is not None
        module.begin(self._window(module), self._batch)

    # ------------------------------------------------------------------ the end, and in between

    def finalize(self) -> None:
        """End the run: the model is Δ(θ) from here on, and the optimizer's hooks are gone.
        BatchNorm statistics were collected with Δ(θ), so nothing has to be calibrated.

        Raises:
            RuntimeError: events are left, or the run is finished.
        """
        if self._hook is None:
            raise RuntimeError("finalize() after finalize(): the run is over.")
        if left := self._left():
            raise RuntimeError(
                f"finalize() at step {self.position}, before the plan is done: the next event is "
                f"at step {min(left)} ({left[min(left)][0]}), the last at {max(left)}."
            )
        self._hook.remove()
        self._done, self._hook = self._hook.count, None
        settled = [task.settled() for task in self.tasks]
        for task in settled:
            task.weights = None
            task.adopt(task.state)
            task.show_delta()
        self.tasks = settled

    def report(self) -> ScheduledReport:
        """Sizes, operations and distances of what is switched on, counted from what would be
        stored, and how far the plan has come.
        """
        tasks: list[Task] = self.tasks
        if not self.finished:
            tasks = [task.settled() for task in self.tasks if task.active]
        found = report(self.model, tasks, self._positions, self._started)
        lines = tuple(f"{name}: {module.extra_repr()}" for name, module in self.activations.items())
        return ScheduledReport(found.rows, found.uncompressed, found.total, self._status(), lines)

    def _status(self) -> str:
        left = self._left()
        at = f"step {self.position} of {self.plan.steps}"
        if not left:
            return f"{at}: all events are done"
        begun = any(
            step <= self.position and any(x.what != "begin" for x in dues)
            for step, dues in self._timeline.items()
        )
        state = "half-ramped" if begun else "nothing is switched on"
        if not begun and any(module.on for module in self.activations.values()):
            state = "activations are on from an earlier run, nothing of this plan"
        step = min(left)
        more = f" and {len(left[step]) - 1} more" if len(left[step]) > 1 else ""
        return f"{at}: {state}; next at step {step}: {left[step][0]}{more}"

    def __str__(self) -> str:
        applies = []
        for half, name in (("pruner", "prune"), ("quantizer", "quantize")):
            if any(getattr(task, half, None) is not None for task in self.tasks):
                applies.append(name)
        prunes = [isinstance(module, ActivationPruner) for module in self.activations.values()]
        applies += ["prune_activations"] if any(prunes) else []
        applies += ["quantize_activations"] if not all(prunes) else []
        lines = [str(self.plan.only(*applies))]
        lines += [f"{name}: {plan.only(*applies)}" for name, plan in self._plans.items()]
        return "\n".join([*lines, self._status()])

    # ------------------------------------------------------------------ resume

    def state_dict(self) -> dict[str, Any]:
        """Everything of the run that is not in the model: w, masks, scales, the statistics of open
        windows and the position; plain data.
        """
        return {
            "version": _VERSION,
            "plan": asdict(self.plan),
            "timeline": {s: [asdict(x) for x in dues] for s, dues in self._timeline.items()},
            "position": self.position,
            "tasks": {} if self.finished else {task.name: task.arrays() for task in self.tasks},
            "windows": {name: _window_of(module) for name, module in self.activations.items()},
            "started": {name: list(ws) for name, ws in self._started.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, on a run built for the same model and plan.

        The model's own weights and buffers are the caller's: load them first.

        Raises:
            RuntimeError: the run is finished.
            ValueError: the state is damaged, or of another model, plan or version; nothing has then
                been changed.
        """
        if self._hook is None:
            raise RuntimeError("load_state_dict() after finalize(): the run is over.")
        if not isinstance(state, Mapping) or state.get("version") != _VERSION:
            raise ValueError(f"The state is not one of version {_VERSION} of Scheduled.")
        own = self.state_dict()
        if missing := own.keys() - state.keys():
            raise ValueError(f"The state is damaged: it lacks {sorted(missing)}.")
        for key in ("plan", "timeline"):
            if state[key] != own[key]:
                raise ValueError(f"The state was made with another {key}: use the same to go on.")
        if self.tasks and state["tasks"] == {}:
            raise ValueError("The state is of a finished run: its file is what `save` writes.")
        for key in ("tasks", "windows", "started"):
            if not isinstance(state[key], Mapping):
                raise ValueError(f"The state is damaged: {key} is {state[key]!r:.80}.")
            if state[key].keys() != own[key].keys():
                raise ValueError(
                    f"The state is of another model: it has {list(state[key])}, this run "
                    f"{list(own[key])}."
                )
        position = state["position"]
        if type(position) is not int or position < 0:
            raise ValueError(f"The state is damaged: position {position!r} is no number of steps.")
        read = [task.read(state["tasks"][task.name]) for task in self.tasks]
        for task, (mask, inner) in zip(self.tasks, read, strict=True):
            been = self._been(task.name, position)
            if (mask is not None, inner is not None) != ("prune" in been, "quantize" in been):
                raise ValueError(f"The state is damaged: {task.name} at step {position}.")
            saved = state["started"][task.name]
            shapes = [getattr(w, "shape", None) for w in saved] if isinstance(saved, list) else None
            if shapes != [w.shape for w in self._started[task.name]]:
                raise ValueError(f"The state is damaged: started weights of {task.name}: {shapes}.")
        for name in self.activations:
            self._check_window(name, state["windows"][name], position)
        for task, (mask, inner) in zip(self.tasks, read, strict=True):
            task.restore(state["tasks"][task.name], mask, inner)
            device = task.parameters[0].device
            self._started[task.name] = tuple(w.to(device) for w in state["started"][task.name])
        for name, module in self.activations.items():
            device = next(module.buffers()).device
            for key, x in state["windows"][name].items():
                setattr(module, key, None if x is None else x.clone().to(device))
        self._hook.count = position

    def _been(self, name: str, position: int) -> list[str]:
        """What has been done to a task or a module by a position, in order."""
        return [
            due.what
            for step, dues in sorted(self._timeline.items())
            for due in dues
            if due.name == name and step <= position
        ]

    def _check_window(self, name: str, saved: Any, position: int) -> None:
        """Whether these are the statistics of a module at a position.

        Raises:
            ValueError: they are not.
        """
        probe = copy.copy(self.activations[name])  # shares the buffers, which `begin` leaves alone
        probe.store = probe.seen = None
        if self._been(name, position)[-1:] == ["begin"]:
            self._begin(probe)
        wanted = _window_of(probe)
        if not isinstance(saved, Mapping) or saved.keys() != wanted.keys():
            raise ValueError(f"The state is damaged: the window of {name} is {saved!r:.80}.")
        shown = [{key: getattr(x, "shape", None) for key, x in w.items()} for w in (saved, wanted)]
        if shown[0] != shown[1]:
            raise ValueError(
                f"The state is damaged, or of another window or batch size: {name} has statistics "
                f"of shapes {shown[0]} at step {position}, they should be {shown[1]}."
            )


def _window_of(module: Activation) -> dict[str, Any]:
    pair = {"store": module.store, "seen": module.seen}
    return {name: None if x is None else x.clone() for name, x in pair.items()}


def _events(plan: Plan, what: str, name: str, part: object) -> Sequence[Event]:
    """Of one part; one that is never switched on would be silence."""
    events = plan.events(what)
    if not events:
        raise ValueError(f"The plan never switches {part} of {name} on: it has no {what}.")
    return events


def _group(model: Any) -> Any:
    """The processes that train together; None for one alone."""
    while model is not None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model.process_group
        model = getattr(model, "_orig_mod", None)
    return None
