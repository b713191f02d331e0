"""The controller of the learning-compression algorithm: the user's loop is the L step, the parts
are the C step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from . import checkpoint as checkpoints
from .batchnorm import Calibration, batchnorms, recalibrate
from .lstep import Hook, ImplicitHook, PenaltyHook, Rule, SumHook
from .metrics import Report, measure_positions, overall_gap, report, table
from .part import Part, working
from .refine import refining
from .schedules import checked
from .selection import Key, clean, select, unwrap
from .task import Task


class _Unset:
    def __repr__(self) -> str:
        return "<not given>"


_UNSET = _Unset()


@dataclass(frozen=True)
class Step:
    """One LC step: its number, from 0, of how many, and its μ."""

    index: int
    count: int
    mu: float


class LC:
    """Learn the weights of a model as Δ(θ), a sum of separately compressed parts.

    Solves   min_w,θ L(w)   s.t. w = Δ(θ)
    by the augmented Lagrangian (or, with `multipliers=False`, the quadratic penalty)

        L step   w ← argmin L(w) + μ/2 ‖w − Δ(θ) − λ/μ‖²      the user's loop
        C step   θ ← argmin ‖w − λ/μ − Δ(θ)‖²                 a projection, by the part
        λ ← λ − μ (w − Δ(θ)), after the last step with this μ;  then the next μ

    (papers/learning-compression.md, section 1). On construction θ is the direct compression of the
    model's weights, at the first μ.

    Args:
        model: any module; its parameters stay plain parameters.
        tasks: {pattern: part}. A pattern is an exact name, a glob, `re:` and an expression, a
            function of (name, tensor), or `Joint(pattern)` for one task of all it matches. See
            `selection.select`.
        schedule: μ per LC step, not falling; `geometric(mu0, growth, steps)` or any sequence.
        optimizer: given, the L step is done by hooks on it: call nothing else. Not given, add
            `lc.penalty()` to the loss.
        gradient: where the loss gradient is taken. "weights": at w, the classic algorithm. "sum":
            at Δ(θ), straight-through; the parameters then hold Δ(θ) except inside
            `optimizer.step()`, a C step follows every `every` optimizer steps, and μ may be 0.
        every: see `gradient="sum"`.
        multipliers: use λ. They assume that the L step comes near its minimum: where it is only a
            few batches long they overshoot, and the quadratic penalty does better (measured in
            experiments/digits_study.py).
        lr_guard: use min(lr, 1/μ) in the optimizer's steps; `lc.guarded` counts the steps in which
            it was below the optimizer's own rate.
        implicit: with optimizer= and gradient="weights": leave the loss gradient alone and follow
            the penalty after each optimizer step by w ← (w + η (μ Δ(θ) + λ)) / (1 + η μ) with the
            step's learning rate η. Stable for any μ, so no `lr_guard` is needed; momentum does not
            speed up the pull, so that for the same effect μ is 1 / (1 − momentum) times as large.
            None: yes, unless `lr_guard` is asked for: in equal epochs it ends at half the training
            loss, and never diverged (experiments/implicit.py). False: the penalty's gradient is
            added to that of the loss, as `lc.penalty()` does.
        rule: with gradient="sum", a function (grad, w, θ) → grad that changes the loss gradient.
        example_inputs: a batch, to count the operations of convolutions in `report()`.

    Raises:
        TypeError, ValueError: the tasks, the schedule or the options do not fit; nothing has then
            been changed.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[Key, Part[Any]],
        *,
        schedule: Sequence[float],
        optimizer: Optimizer | None = None,
        gradient: Literal["weights", "sum"] = "weights",
        every: int = 1,
        multipliers: bool = True,
        lr_guard: bool = False,
        implicit: bool | None = None,
        rule: Rule | None = None,
        example_inputs: Any = None,
    ) -> None:
        self.schedule = checked(schedule)
        self.multipliers = multipliers
        self.gradient = gradient
        self._options = {
            "gradient": gradient,
            "every": every,
            "multipliers": multipliers,
            "lr_guard": lr_guard,
            "implicit": implicit,
        }
        if implicit is None:
            implicit = optimizer is not None and gradient == "weights" and not lr_guard
        _check_options(self.schedule, optimizer, gradient, every, lr_guard, implicit, rule)
        if type(model).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "FullyShardedDataParallel shards the weights over processes: not supported yet."
            )
        self.model = model
        self.tasks = [Task(selected) for selected in select(model, tasks)]
        self.position = 0  # LC steps done
        self.history: list[dict[str, float]] = []
        self._logged: dict[str, float] = {}
        self._c_done = False
        self._busy: str | None = None  # what holds the model's weights right now
        self._best: dict[str, Any] | None = None
        self._finished = False
        self._released = False  # by `release`: then the model is not Δ(θ)
        self._guarded = 0  # by hooks that are gone
        self._bar: Any = None
        self._positions = measure_positions(model, example_inputs)
        self._started = {task.name: tuple(w.clone() for w in task.current) for task in self.tasks}
        for task in self.tasks:
            task.adopt(task.solve(self.mu))
        self._hook: Hook | None = None
        if optimizer is not None and gradient == "sum":
            self._hook = SumHook(optimizer, self.tasks, lr_guard, every, rule, self.c_step)
            for task in self.tasks:
                task.weights = tuple(w.clone() for w in task.current)
                task.show_delta()
        elif optimizer is not None:
            kind = ImplicitHook if implicit else PenaltyHook
            self._hook = kind(optimizer, self.tasks, lr_guard)
        self._begin()

    # ------------------------------------------------------------------ the loop

    @property
    def mu(self) -> float:
        """μ of the current LC step (of the last one, when all are done)."""
        return self.schedule[min(self.position, len(self.schedule) - 1)]

    @property
    def finished(self) -> bool:
        """Whether `finalize` or `release` has ended the run."""
        return self._finished

    @property
    def inside(self) -> str | None:
        """ "compressed" or "refine" inside these, else None."""
        return self._busy

    @property
    def guarded(self) -> int:
        """Optimizer steps in which the learning-rate guard was below the optimizer's own rate."""
        return self._guarded + (self._hook.guarded if self._hook else 0)

    def penalty(self) -> Tensor:
        """μ/2 ‖w − Δ(θ)‖² − λᵀ(w − Δ(θ)), to be added to the loss: the L step's penalty up to a
        constant. A scalar, differentiable in w.

        Raises:
            RuntimeError: the optimizer hook already adds its gradient, or the run is finished.
        """
        if self._hook is not None:
            raise RuntimeError(
                "LC was given optimizer=, whose hook adds the penalty's gradient: with "
                "lc.penalty() in the loss it would count twice. Use one."
            )
        self._refuse_if_finished("penalty()")
        total: Tensor = torch.zeros(())
        for task in self.tasks:
            for p, delta, multiplier in zip(
                task.parameters, task.delta, task.multipliers, strict=True
            ):
                distance = working(p) - working(delta)
                term = (
                    self.mu / 2 * distance.square().sum() - (working(multiplier) * distance).sum()
                )
                total = total.to(term.device) + term
        return total

    def steps(
        self,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        save: Mapping[str, Any] | None = None,
    ) -> Iterator[Step]:
        """The LC steps that are left. Train in the body; at its end come the C step and the
        multiplier step.

        A body that is left early (break, exception) leaves its step undone: a new call of `steps()`
        runs it again.

        Args:
            progress: show a bar with μ, gap, whatever was given to `log`, and the time left.
            checkpoint: a file. If it exists the run goes on from it, else it is written now; it is
                rewritten, whole or not at all, after each step. All processes must see the same
                file.
            save: objects whose state belongs to the run: optimizer, scheduler, scaler, and the
                loader's generator. What else a loader keeps (persistent workers) is not restored.

        Raises:
            TypeError: the state of an object in `save` is not plain data; no file is then written.
            ValueError: the checkpoint is damaged or of another run; nothing has then been changed.
        """
        self._refuse_if_finished("steps()")
        objects = dict(save or {})
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None:
            _check_folder(path)
            if checkpoints.exists(path):
                self._resume(path, objects)
            else:
                checkpoints.write(path, self.state_dict(), unwrap(self.model), objects)
        count = len(self.schedule)
        bar = tqdm(total=count, initial=self.position, desc="LC", disable=not progress)
        self._bar = bar
        try:
            while self.position < count:
                self._c_done = False
                self._logged = {}
                for task in self.tasks:
                    if task.weights is not None:  # an exception inside a step may have left w there
                        task.show_delta()
                self._begin()
                self._show()
                yield Step(self.position, count, self.mu)
                self._end()
                if path is not None:
                    checkpoints.write(path, self.state_dict(), unwrap(self.model), objects)
                bar.update()
                self._show()
        finally:  # also where the body is left early
            bar.close()
            self._bar = None

    def c_step(self) -> None:
        """Project now: every θ ← argmin ‖w − λ/μ − Δ(θ)‖². Called in the body of a step, it takes
        the place of the one at its end.

        Raises:
            RuntimeError: a projection failed; the message names the tensor. No θ has then been
                changed.
        """
        self._refuse_if_finished("c_step()")
        if self._busy:
            raise RuntimeError(f"c_step() inside {self._busy}() would project Δ(θ) instead of w.")
        states = [task.solve(self.mu) for task in self.tasks]
        for task, state in zip(self.tasks, states, strict=True):
            task.adopt(state)
            if task.weights is not None:
                task.show_delta()
        self._c_done = True
        self._begin()

    def log(self, **values: float | Tensor) -> None:
        """Numbers of the user's loop (loss=...) for the progress bar and `history`."""
        self._logged |= {
            name: float(x.detach() if isinstance(x, Tensor) else x) for name, x in values.items()
        }
        self._show()

    def gap(self) -> dict[str, float]:
        """‖w − Δ(θ)‖ / ‖w‖ per task."""
        return {task.name: task.gap() for task in self.tasks}

    def _begin(self) -> None:
        if self._hook is not None:
            self._hook.begin(self.mu)

    def _end(self) -> None:
        """The end of a body: C step, multiplier step, history, next position."""
        self._check_owned()
        if self.gradient == "sum" or not self._c_done:
            self.c_step()
        k, mu = self.position, self.mu
        entry = {"step": k, "mu": mu, "gap": overall_gap(self.tasks), **self._logged}
        last = k + 1 == len(self.schedule) or self.schedule[k + 1] != mu
        if self.multipliers and last and mu > 0:
            for task in self.tasks:
                task.step_multipliers(mu)
        self.history.append(entry)
        self.position += 1
        self._begin()

    def _show(self) -> None:
        if self._bar is None or self._bar.disable:
            return
        shown = {"μ": f"{self.mu:.3g}"}
        if self.history:
            shown["gap"] = f"{self.history[-1]['gap']:.4f}"
        last = self.history[-1] if self.history else {}
        logged = {n: x for n, x in last.items() if n not in ("step", "mu", "gap")} | self._logged
        shown |= {name: f"{value:.4g}" for name, value in logged.items()}
        if self.guarded:
            shown["lr≤1/μ"] = f"{self.guarded} steps"
        self._bar.set_postfix(shown)

    # ------------------------------------------------------------------ the compressed model

    @contextmanager
    def compressed(self, calibration: Calibration | _Unset | None = _UNSET) -> Iterator[nn.Module]:
        """Inside, the model's weights are Δ(θ) and BatchNorm fits them; on exit everything is as
        before.

        Args:
            calibration: training batches to re-estimate the running statistics of BatchNorm on, or
                a function that runs the model on them. `None` keeps the statistics, which belong to
                w; a model with BatchNorm asks for one or the other.
        """
        self._check_calibration(calibration, "compressed")
        if self._busy:
            raise RuntimeError(f"compressed() inside {self._busy}().")
        self._check_owned()
        inner = unwrap(self.model)
        for task in self.tasks:
            task.aside = tuple(p.detach().clone() for p in task.parameters)
        statistics = {
            n: {k: v.clone() for k, v in m.state_dict().items()}
            for n, m in batchnorms(inner).items()
        }
        self._busy = "compressed"
        try:
            self._show_delta(calibration)
            yield self.model
        finally:
            self._busy = None
            with torch.no_grad():
                for task in self.tasks:
                    for p, w in zip(task.parameters, task.aside or (), strict=True):
                        p.copy_(w)
                    task.aside = None
                for name, module in batchnorms(inner).items():
                    module.load_state_dict(statistics[name])

    def keep_best(self, metric: float, *, smaller_is_better: bool = True) -> bool:
        """Remember θ and the rest of the model if `metric` is the best so far;
        `finalize(best=True)` returns to it.

        Call it where the metric was measured, usually inside `compressed(...)`. Measure on training
        or held-out training data.
        """
        value = metric if smaller_is_better else -metric
        if value != value:
            raise ValueError("keep_best: the metric is NaN.")
        if self._best is not None and value >= self._best["value"]:
            return False
        names = {name for task in self.tasks for name in task.names}
        rest = {
            name: x.clone()
            for name, x in _tensors(unwrap(self.model)).items()
            if clean(name) not in names
        }
        arrays = [task.state_dict()["arrays"] for task in self.tasks]
        self._best = {"value": float(value), "step": self.position, "arrays": arrays, "rest": rest}
        return True

    def finalize(
        self, calibration: Calibration | _Unset | None = _UNSET, *, best: bool = False
    ) -> None:
        """End the run: the model is Δ(θ) from here on, and the optimizer's hooks are gone.

        Args:
            calibration: as in `compressed`. With `best=True` and statistics kept inside
                `compressed(...)`, `None` keeps those.
            best: return to what `keep_best` kept last.
        """
        self._refuse_if_finished("finalize()")
        self._check_calibration(calibration, "finalize")
        if self._busy:
            raise RuntimeError(f"finalize() inside {self._busy}().")
        self._check_owned()
        if best and self._best is None:
            raise RuntimeError("finalize(best=True): keep_best(metric) was never called.")
        inner = unwrap(self.model)
        kept = {name: x.clone() for name, x in _tensors(inner).items()}
        states = [task.state for task in self.tasks]
        try:
            if best and self._best is not None:
                for task, arrays in zip(self.tasks, self._best["arrays"], strict=True):
                    task.adopt(task.decoded(arrays))
                _restore(inner, self._best["rest"])
            self._show_delta(calibration)
        except BaseException:  # the calibration runs on the user's data: the run can go on
            for task, state in zip(self.tasks, states, strict=True):
                task.adopt(state)
            _restore(inner, kept)
            raise
        self._detach()
        self._finished = True

    def refine(
        self,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        *,
        preconditioned: bool = True,
    ) -> AbstractContextManager[Optimizer]:
        """Train the continuous fields of θ (scales, values, factors, codebooks) with signs,
        supports and codes fixed.

            with lc.refine(lambda parameters: torch.optim.SGD(parameters, lr=0.01)) as optimizer:
                train_one_epoch(model, loader, optimizer)

        Inside, the model is Δ(θ); `make_optimizer` gets the fields and the model's uncompressed
        parameters. Afterwards θ is rounded to what its parts store. Use it after the LC steps,
        before or after `finalize`.

        preconditioned: divide the gradient of each value by ‖∂Δ/∂value‖², taken at the start. A
            value that many weights share has the sum of their gradients, and SGD at a rate that
            suits weights diverges. Divided, a step of SGD moves Δ(θ) by what a step on the weights
            themselves would, projected on what the field reaches, so the rates of the training
            hold. Optimizers that scale by themselves (Adam) hardly see it.

        Raises:
            RuntimeError: LC steps are left, or the model's weights are in use.
        """
        if self._released:
            self._refuse_if_finished("refine()")
        if not self._finished and self.position < len(self.schedule):
            raise RuntimeError(
                f"refine() fixes the structure: finish the LC steps first ({self.position} of "
                f"{len(self.schedule)} done)."
            )
        return self._refine(make_optimizer, preconditioned)

    @contextmanager
    def _refine(
        self, make: Callable[[list[nn.Parameter]], Optimizer], preconditioned: bool
    ) -> Iterator[Optimizer]:
        if self._busy:
            raise RuntimeError(f"refine() inside {self._busy}().")
        self._check_owned()
        self._busy = "refine"
        try:
            with refining(self.model, self.tasks, make, preconditioned) as optimizer:
                self._detach()  # steps of its optimizer would pull towards the old Δ(θ)
                yield optimizer
        finally:
            self._busy = None

    def release(self) -> None:
        """End the run without compressing: the model holds w, and the optimizer's hooks are gone.

        For a hand-over: a new LC on the same model goes on from w, say with another `gradient`.
        """
        self._refuse_if_finished("release()")
        if self._busy:
            raise RuntimeError(f"release() inside {self._busy}().")
        self._check_owned()
        with torch.no_grad():
            for task in self.tasks:
                for p, w in zip(task.parameters, task.current, strict=True):
                    p.copy_(w)
        self._detach()
        self._finished = self._released = True

    def _detach(self) -> None:
        """No more hooks on the optimizer, no w beside the model's own weights."""
        if self._hook is not None:
            self._hook.remove()
            self._guarded += self._hook.guarded
            self._hook = None
        for task in self.tasks:
            task.weights = None

    def _show_delta(self, calibration: Calibration | _Unset | None) -> None:
        """The model's weights are Δ(θ), and BatchNorm fits them if there is calibration data."""
        for task in self.tasks:
            task.show_delta()
        inner = unwrap(self.model)
        if calibration is None or isinstance(calibration, _Unset) or not batchnorms(inner):
            return
        recalibrate(inner, calibration)

    def _check_owned(self) -> None:
        """Δ(θ) is written into the parameters seen at construction: they must be the model's."""
        held = {id(p) for p in unwrap(self.model).parameters()}
        lost = [
            name
            for task in self.tasks
            for name, p in zip(task.names, task.parameters, strict=True)
            if id(p) not in held
        ]
        if lost:
            raise RuntimeError(
                f"The parameters {lost} were replaced in the model after LC was made (by "
                "load_state_dict(assign=True), a parametrization, or by hand). Make the model's "
                "parameters final before LC, and change their values in place."
            )

    def _check_calibration(self, calibration: object, where: str) -> None:
        norms = batchnorms(unwrap(self.model))
        if isinstance(calibration, _Unset) and norms:
            raise TypeError(
                f"{where}() needs calibration=: the running statistics of {len(norms)} BatchNorm "
                "layers belong to w, not to the compressed "
                "weights. Give training batches to re-estimate them, or calibration=None to "
                "keep them."
            )

    def _refuse_if_finished(self, what: str) -> None:
        if self._released:
            raise RuntimeError(f"{what} after release(): the run is over and the model holds w.")
        if self._finished:
            raise RuntimeError(f"{what} after finalize(): the run is over and the model is Δ(θ).")

    # ------------------------------------------------------------------ report, resume

    def report(self) -> Report:
        """Sizes, operations and distances per task and in total, counted from what would
        be stored.
        """
        return report(self.model, self.tasks, self._positions, self._started)

    def __str__(self) -> str:
        lines: list[Sequence[str]] = [("task", "parts", "shape", "weights", "bits", "bits/w")]
        for task in self.tasks:
            bits = task.part.bits(task.state)
            shape = "×".join(map(str, task.shape))
            lines.append(
                (
                    task.name,
                    str(task.part),
                    shape,
                    f"{task.size:,}",
                    f"{bits:,}",
                    f"{bits / task.size:.3f}",
                )
            )
        mus = f"μ {self.schedule[0]:.3g} … {self.schedule[-1]:.3g}"
        progress = f"step {self.position} of {len(self.schedule)}"
        return f"{table(lines)}\n{progress}, {mus}, gradient at {self.gradient}"

    def state_dict(self) -> dict[str, Any]:
        """Everything of the run that is not in the model: θ, λ, w, the position; plain data."""
        return {
            "version": checkpoints.VERSION,
            "schedule": list(self.schedule),
            "options": dict(self._options),
            "position": self.position,
            "history": [dict(entry) for entry in self.history],
            "tasks": {task.name: task.state_dict() for task in self.tasks},
            "started": {name: list(ws) for name, ws in self._started.items()},
            "best": self._best,
            "optimizer_steps": getattr(self._hook, "count", 0),
            "guarded": self.guarded,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, on an LC built for the same model, plan and options.

        The model's own weights are the caller's: load them first.

        Raises:
            RuntimeError: the run is finished.
            ValueError: the state is damaged, or of another model, plan, schedule, option or
                version; nothing has then been changed.
        """
        self._refuse_if_finished("load_state_dict()")
        self._take(state, self._check_state(state))

    def _take(self, state: Mapping[str, Any], thetas: Sequence[Any]) -> None:
        """Take over a state that `_check_state` has read."""
        for task, theta in zip(self.tasks, thetas, strict=True):
            task.load_state_dict(state["tasks"][task.name], theta)
            if task.weights is not None:
                task.show_delta()
        self.position = state["position"]
        self.history = [dict(entry) for entry in state["history"]]
        self._started = {
            task.name: tuple(
                w.to(p.device)
                for w, p in zip(state["started"][task.name], task.parameters, strict=True)
            )
            for task in self.tasks
        }
        self._best = state["best"]
        if self._hook is not None:
            self._hook.guarded = state["guarded"]
            if isinstance(self._hook, SumHook):
                self._hook.count = state["optimizer_steps"]
        self._begin()

    def _check_state(self, state: Mapping[str, Any]) -> list[Any]:
        """θ of each task, read from a state that fits this run; nothing is changed."""
        if not isinstance(state, Mapping) or state.get("version") != checkpoints.VERSION:
            version = state.get("version") if isinstance(state, Mapping) else None
            raise ValueError(
                f"The state is of version {version}, this library reads {checkpoints.VERSION}."
            )
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"The state is damaged: it lacks {sorted(missing)}.")
        if list(state["schedule"]) != list(self.schedule):
            raise ValueError("The state was made with another schedule: use the same one to go on.")
        if state["options"] != self._options:
            raise ValueError(
                f"The state was made with {state['options']}, this run has {self._options}: "
                "use the same to go on."
            )
        names = [task.name for task in self.tasks]
        if list(state["tasks"]) != names or list(state["started"]) != names:
            raise ValueError(
                f"The state is of another model or plan: it has {list(state['tasks'])}, this run "
                f"{names}."
            )
        return [
            task.check_state(state["tasks"][task.name], state["started"][task.name])
            for task in self.tasks
        ]

    def _resume(self, path: Path, save: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. All that can be refused is, before anything is changed."""
        model = unwrap(self.model)
        content = checkpoints.read(path, model, save)
        thetas = self._check_state(content["lc"])
        checkpoints.set_objects(save, content["saved"])
        model.load_state_dict(content["model"])
        self._take(content["lc"], thetas)
        checkpoints.set_process(model, content)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, without whatever else modules put into their state."""
    return {name: x for name, x in model.state_dict().items() if isinstance(x, Tensor)}


@torch.no_grad()
def _restore(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, x in _tensors(model).items():
        if name in values:
            x.copy_(values[name])


def _check_options(
    schedule: Sequence[float],
    optimizer: Optimizer | None,
    gradient: str,
    every: int,
    lr_guard: bool,
    implicit: bool,
    rule: Rule | None,
) -> None:
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}."
        )
    if gradient not in ("weights", "sum"):
        raise ValueError(f"gradient must be 'weights' or 'sum', got {gradient!r}.")
    if gradient == "sum" and optimizer is None:
        raise ValueError("gradient='sum' needs optimizer=: its step is where w is updated.")
    if gradient == "weights" and schedule[0] == 0:
        raise ValueError(
            "mu = 0 leaves the L step without a penalty: start above 0, or use gradient='sum'."
        )
    if every < 1 or (every > 1 and gradient != "sum"):
        raise ValueError(f"every={every}: at least 1, and above 1 only with gradient='sum'.")
    if rule is not None and gradient != "sum":
        raise ValueError("rule= changes the straight-through gradient: it needs gradient='sum'.")
    if implicit and (optimizer is None or gradient != "weights" or lr_guard):
        raise ValueError(
            "implicit=True is a step of its own on the penalty: it needs optimizer= and "
            "gradient='weights', and no lr_guard."
        )
    if lr_guard and optimizer is None:
        raise ValueError("lr_guard=True needs optimizer=: the guard acts on its learning rates.")


def _check_folder(path: Path) -> None:
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(
            f"checkpoint={str(path)!r}: {folder} is not a folder that can be written to."
        )
