"""When parts are switched on, ramped and frozen."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, TypeAlias

_WIDTH = 40  # characters of a timeline
_LEVELS = "·░▒▓█"
_SCHEDULES = ("prune", "quantize", "prune_activations", "quantize_activations")


@dataclass(frozen=True)
class Cubic:
    """A sparsity that rises fast at first: s (1 − (1 − i/n)³) at start + i · every, i = 1 … n, for
    a part of sparsity s (Zhu and Gupta; papers/joint-weights-activations.md, section 2).

    Args:
        start: the first event is one `every` later.
        every: between events, above 0.
        repeats: n, at least 1.

    >>> Cubic(100, every=15, repeats=4).levels(0.5)
    (0.2890625, 0.4375, 0.4921875, 0.5)
    """

    start: float
    every: float
    repeats: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.repeats, Integral) or self.repeats < 1:
            raise ValueError(f"{self}: repeats must be a whole number, at least 1.")
        _check_number(self, self.every)
        if self.every <= 0:
            raise ValueError(f"{self} ends before it starts: every must be above 0.")
        _check_time(self, self.start)
        _check_time(self, self.every)

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(self.start + i * self.every for i in range(1, self.repeats + 1))

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the final sparsity, at each event."""
        return tuple(1 - (1 - i / self.repeats) ** 3 for i in range(1, self.repeats + 1))

    def levels(self, sparsity: float) -> tuple[float, ...]:
        """The sparsities on the way to this one."""
        return tuple(sparsity * share for share in self.shares)

    def times_factor(self, factor: float) -> Cubic:
        """In another unit of time."""
        return replace(self, start=self.start * factor, every=self.every * factor)


@dataclass(frozen=True)
class Delay:
    """Switched on at a time, whole."""

    at: float

    def __post_init__(self) -> None:
        _check_time(self, self.at)

    @property
    def times(self) -> tuple[float, ...]:
        return (self.at,)

    @property
    def shares(self) -> tuple[float, ...]:
        return (1.0,)

    def times_factor(self, factor: float) -> Delay:
        """In another unit of time."""
        return Delay(self.at * factor)


Schedule: TypeAlias = Cubic | Delay


def _check_number(schedule: object, time: float) -> None:
    if not isinstance(time, Real):
        raise TypeError(f"{schedule}: times are numbers, got {time!r}.")


def _check_time(schedule: object, time: float) -> None:
    _check_number(schedule, time)
    if not (time >= 0 and math.isfinite(time)):
        raise ValueError(f"{schedule}: times must be finite and >= 0.")


@dataclass(frozen=True)
class Event:
    """After `step` optimizer steps, `share` of the way to what the part asks for."""

    step: int
    share: float


@dataclass(frozen=True)
class Plan:
    """When weights and activations are pruned and quantized in a training of a given length.

    An event at step t acts on what follows the t-th optimizer step; 0 is before the first.
    `print` it for a timeline.

    Args:
        total: length of the training.
        prune, quantize: of weights; None: never.
        prune_activations, quantize_activations: likewise.
        steps_per_epoch: 1: all times are in optimizer steps. Otherwise in epochs of so many steps;
            events are rounded to the nearest step.

    Raises:
        TypeError: what is no `Cubic` or `Delay`.
        ValueError: an event that never happens before the training ends, two events of one schedule
            in the same step, a quantization that ramps.
    """

    total: float
    prune: Schedule | None = None
    quantize: Delay | None = None
    prune_activations: Schedule | None = None
    quantize_activations: Delay | None = None
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1 or not (self.total > 0 and math.isfinite(self.total)):
            raise ValueError(
                f"A plan needs total > 0 and steps_per_epoch >= 1, got {self.total} and "
                f"{self.steps_per_epoch}."
            )
        for name in _SCHEDULES:
            if not isinstance(given := getattr(self, name), Cubic | Delay | None):
                raise TypeError(
                    f"{name}={given!r}: give Delay(when), for pruning also Cubic(start, every), or "
                    "None for never."
                )
        for name, schedule in self.schedules.items():
            if name.startswith("quantize") and not isinstance(schedule, Delay):
                raise ValueError(f"{name}={schedule}: quantization starts at once, give a Delay.")
            steps = [event.step for event in self.events(name)]
            if steps[-1] >= self.steps:
                raise ValueError(
                    f"{name}={schedule} never happens in full: its last event is at step "
                    f"{steps[-1]}, training ends after {self.steps}. Start earlier or train longer."
                )
            if len(set(steps)) < len(steps):
                raise ValueError(
                    f"{name}={schedule} overlaps itself: events at steps {steps}. Space them by at "
                    "least one step."
                )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return round(self.total * self.steps_per_epoch)

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Those that are given, by argument."""
        named = {name: getattr(self, name) for name in _SCHEDULES}
        return {name: x for name, x in named.items() if x is not None}

    def events(self, name: str) -> tuple[Event, ...]:
        """Of one of the four schedules, in optimizer steps."""
        schedule = getattr(self, name)
        if schedule is None:
            return ()
        times = (round(time * self.steps_per_epoch) for time in schedule.times)
        return tuple(Event(*pair) for pair in zip(times, schedule.shares, strict=True))

    def scaled(self, total: float, steps_per_epoch: int | None = None) -> Plan:
        """The same plan for a training of another length, in the same unit of time unless another
        `steps_per_epoch` is given.
        """
        factor = total / self.total
        if steps_per_epoch is None:
            steps_per_epoch = self.steps_per_epoch
        moved: dict[str, Any] = {n: x.times_factor(factor) for n, x in self.schedules.items()}
        return replace(self, total=total, steps_per_epoch=steps_per_epoch, **moved)

    def only(self, *names: str) -> Plan:
        """The same with these of the four schedules only."""
        left: dict[str, Any] = {name: None for name in _SCHEDULES if name not in names}
        return replace(self, **left)

    def __str__(self) -> str:
        unit = "" if self.steps_per_epoch == 1 else f" ({self.total:g} epochs)"
        lines = [f"plan of {self.steps} steps{unit}"]
        for name in self.schedules:
            what, _, of = name.partition("_")
            events = self.events(name)
            marks = [
                sum(event.step < i * self.steps / _WIDTH for event in events)
                for i in range(1, _WIDTH + 1)  # by the end of each cell
            ]
            bar = "".join(_LEVELS[-(-4 * n // len(events))] for n in marks)
            at = ", ".join(str(event.step) for event in events)
            lines.append(f"{of or 'weights':<12}{what:<9}{bar}  at {at}")
        return "\n".join(lines)

    def figure(self, path: str | os.PathLike[str]) -> None:
        """Draw the shares over the training as a picture, of the type of the file's ending.

        Raises:
            ImportError: matplotlib is missing (the extra `plot`).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as cause:
            raise ImportError("figure() needs matplotlib, the extra lc-compress[plot].") from cause
        drawing = Figure(figsize=(6, 2.5), layout="constrained")
        axes = drawing.add_subplot()
        for name in self.schedules:
            events = self.events(name)
            at = [0, *(event.step for event in events), self.steps]
            shares = [0.0, *(event.share for event in events)]
            what, _, of = name.partition("_")
            label = f"{of or 'weights'}: {what}"
            axes.plot(at, [*shares, shares[-1]], drawstyle="steps-post", label=label)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("share of the goal")
        if self.schedules:
            axes.legend()
        drawing.savefig(path)


# The paper's schedules as shares of the training, in percent (papers/joint-weights-activations.md,
# sections 3 and 9). Which operator stands first inside a step does not depend on them: values are
# always masked, then quantized.
_RAMP = Cubic(40, 6, 4)
_PRUNE_FIRST = Plan(100, _RAMP, Delay(92), _RAMP, Delay(94))
_QUANTIZE_FIRST = Plan(100, Cubic(52, 6, 4), Delay(40), Cubic(52, 6, 4), Delay(44))
_LATE = Plan(100, Cubic(72, 6, 4), Delay(64), Cubic(72, 6, 4), Delay(68))
_TOGETHER = Plan(100, _RAMP, Delay(46), _RAMP, Delay(46))


def prune_then_quantize(total: float, steps_per_epoch: int = 1) -> Plan:
    """Pruning ramps from 46 to 64 % of the training; weights are quantized at 92 %, activations at
    94 %: the paper's P→Q.

    >>> print(prune_then_quantize(1000))
    plan of 1000 steps
    weights     prune    ··················░░▒▒▒▓▓███████████████  at 460, 520, 580, 640
    weights     quantize ····································████  at 920
    activations prune    ··················░░▒▒▒▓▓███████████████  at 460, 520, 580, 640
    activations quantize ·····································███  at 940
    """
    return _PRUNE_FIRST.scaled(total, steps_per_epoch)


def quantize_then_prune(total: float, steps_per_epoch: int = 1, *, late: bool = False) -> Plan:
    """Weights are quantized at 40 % of the training, activations at 44 %; pruning ramps from 58 to
    76 %: the paper's Q→P. late: at 64, 68, and from 78 to 96 %.
    """
    return (_LATE if late else _QUANTIZE_FIRST).scaled(total, steps_per_epoch)


def together(total: float, steps_per_epoch: int = 1) -> Plan:
    """Quantization starts with the first event of a ramp from 46 to 64 % of the training."""
    return _TOGETHER.scaled(total, steps_per_epoch)
