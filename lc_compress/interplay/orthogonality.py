"""`orthogonality`: whether parts together cost more than their costs added up."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from ..metrics import table, written

Floats = npt.NDArray[np.float64]
Values = Sequence[float] | Floats | float
Verdict = Literal["orthogonal", "non-orthogonal", "inconclusive"]


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Combined:
    """Parts together. excess: how far the metric is beyond the threshold, positive where it is
    worse, whichever direction is better.
    """

    name: str
    metric: float
    excess: Interval
    verdict: Verdict


@dataclass(frozen=True)
class Difference:
    """Metric of `second` minus that of `first`. noise: its interval contains 0, or comes as near
    to it as rounding.
    """

    first: str
    second: str
    difference: Interval
    rounding: float = 0.0

    @property
    def noise(self) -> bool:
        return self.difference.low <= self.rounding and -self.rounding <= self.difference.high


@dataclass(frozen=True)
class Orthogonality:
    """Threshold and verdicts. `print` it, write it as JSON, or draw it.

    values: how many seeds or batches.   interval: how the intervals were made.
    rounding: what is no larger counts as 0.
    """

    metric: str
    higher_is_better: bool
    values: int
    interval: str
    confidence: float
    rounding: float
    dense: float
    parts: dict[str, float]
    threshold: float
    combined: tuple[Combined, ...]
    differences: tuple[Difference, ...]

    def dicts(self) -> dict[str, Any]:
        """Everything as plain dictionaries."""
        plain = asdict(self)
        for entry, difference in zip(plain["differences"], self.differences, strict=True):
            entry["noise"] = difference.noise
        return plain

    def json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON; also written to `path` if given."""
        return written(json.dumps(self.dicts(), indent=1), path)

    def figure(self, path: str | os.PathLike[str]) -> None:
        """Draw it, in the format of the path's suffix (.png, .svg, .pdf).

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .figures import draw_orthogonality

        draw_orthogonality(self, path)

    def __str__(self) -> str:
        direction = "higher" if self.higher_is_better else "lower"
        rows = [("", "", self.metric, "excess", "interval")]
        rows.append(("dense", "", f"{self.dense:.5g}", "", ""))
        rows += [(name, "", f"{value:.5g}", "", "") for name, value in self.parts.items()]
        rows.append(("threshold", "", f"{self.threshold:.5g}", "", ""))
        for x in self.combined:
            low, high = f"{x.excess.low:+.4g}", f"{x.excess.high:+.4g}"
            cells = (f"{x.metric:.5g}", f"{x.excess.value:+.4g}", f"[{low}, {high}]")
            rows.append((x.name, x.verdict, *cells))
        for d in self.differences:
            low, high = f"{d.difference.low:+.4g}", f"{d.difference.high:+.4g}"
            verdict = "noise" if d.noise else "differs"
            cells = ("", f"{d.difference.value:+.4g}", f"[{low}, {high}]")
            rows.append((f"{d.second} − {d.first}", verdict, *cells))
        return (
            f"{self.metric}, {direction} is better; {self.confidence:.0%} intervals: "
            f"{self.interval}. Excess over the threshold, positive: worse.\n{table(rows)}"
        )


def orthogonality(
    metric: str,
    *,
    dense: Values,
    parts: Mapping[str, Values],
    combined: Mapping[str, Values],
    higher_is_better: bool | None = None,
    transform: Callable[[Floats], Floats] | None = None,
    confidence: float = 0.95,
    rounding: float | None = None,
) -> Orthogonality:
    """Whether the harm of parts together exceeds the sum of their harms.

        threshold = Σ EM(part) − (k − 1) EM(dense)      for k parts
        excess    = EM(combined) − threshold, or its negative where higher is better

    with the evaluation metric EM. *non-orthogonal*: the excess is above 0 with the whole interval.
    *orthogonal*: below or at 0 with the whole interval. Otherwise *inconclusive*. Differences
    between the combined ones, such as two orders, are called noise where their interval contains 0.
    In all of this, 0 is what is no larger than `rounding`: two orders that give the same weights up
    to the last bit do not differ, however sure the interval.

    Values are those of seeds or of evaluation batches, paired by position: the i-th of every
    sequence was measured with the same seed or on the same batch. Intervals are t intervals around
    jackknife standard errors, all values at one position left out together; for a mean, the usual
    paired t interval. (Resampling understates the spread of few values: of 95 % bootstrap BCa
    intervals of 8 Gaussian values 86 % hold the truth, of 20 90 %; of these 96 % and 98 %.)

    Args:
        metric: its name, such as "perplexity".
        dense: values of the uncompressed model. A number stands for one without spread.
        parts: values of each part alone, {"S": ..., "Q": ...}. Q acts on weights and activations
            where `combined` does.
        combined: values of the parts together, {"S→Q": ..., "Q→S": ...}.
        higher_is_better: accuracy: True; perplexity, error, loss: False. Must be given.
        transform: of arrays of means, elementwise: with losses per batch and `numpy.exp`, EM is
            the perplexity of all batches, not a mean of perplexities.
        confidence: of the intervals.
        rounding: of the metric; None: 1e-6 of its largest mean, as float32 evaluation leaves it.

    Raises:
        TypeError: `higher_is_better` is not stated.
        ValueError: no part or nothing combined, a name twice, unequal lengths, fewer than 2 values,
            values that are not finite or that `transform` makes so, `confidence` or `rounding` out
            of range.

    Source: papers/sparsity-quantization-order.md, section 3 equation 12 and section 11.
    """
    if not isinstance(higher_is_better, bool):
        raise TypeError(
            f"orthogonality: is a higher {metric} better? Give higher_is_better=True (accuracy) or "
            f"False (perplexity, error, loss), got {higher_is_better!r}."
        )
    if not parts or not combined:
        raise ValueError("orthogonality: `parts` and `combined` need at least one entry each.")
    names = ["dense", *parts, *combined]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(
            f"orthogonality: {twice} stands for two things; `parts` and `combined` need names of "
            "their own, and 'dense' is that of the uncompressed model."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"orthogonality: confidence must be in (0, 1), got {confidence}.")
    if rounding is not None and not 0 <= rounding < math.inf:
        raise ValueError(f"orthogonality: rounding must be finite and at least 0, got {rounding}.")
    sign, k = (-1 if higher_is_better else 1), len(parts)
    columns = _columns({"dense": dense} | _named("part", parts) | _named("combined", combined))
    means = dict(zip(names, _metrics(columns, transform), strict=True))
    for name, value in means.items():
        if not math.isfinite(value):
            raise ValueError(
                f"orthogonality: the {metric} of {name!r} is {value}: `transform` makes it so of "
                f"the mean {columns[names.index(name)].mean():.6g}."
            )
    if rounding is None:
        rounding = 1e-6 * max(abs(x) for x in means.values())

    def interval(coefficients: Sequence[float]) -> Interval:
        return _interval(columns, np.array(coefficients), transform, confidence)

    def unit(*signed: tuple[int, int]) -> list[float]:
        return [dict(signed).get(i, 0) for i in range(len(combined))]

    rows = []
    for i, name in enumerate(combined):
        excess = interval([sign * (k - 1), *[-sign] * k, *unit((i, sign))])
        rows.append(Combined(name, means[name], excess, _verdict(excess, rounding)))
    pairs = itertools.combinations(enumerate(combined), 2)
    differences = tuple(
        Difference(a, b, interval([0, *[0] * k, *unit((i, -1), (j, 1))]), rounding)
        for (i, a), (j, b) in pairs
    )
    count = columns.shape[1]
    return Orthogonality(
        metric=metric,
        higher_is_better=higher_is_better,
        values=count,
        interval=f"t, of {count} values",
        confidence=confidence,
        rounding=rounding,
        dense=means["dense"],
        parts={name: means[name] for name in parts},
        threshold=sum(means[name] for name in parts) - (k - 1) * means["dense"],
        combined=tuple(rows),
        differences=differences,
    )


def _verdict(excess: Interval, rounding: float) -> Verdict:
    if excess.low > rounding:
        return "non-orthogonal"
    return "orthogonal" if excess.high <= rounding else "inconclusive"


def _named(kind: str, values: Mapping[str, Values]) -> dict[str, Values]:
    return {f"{kind} {name!r}": x for name, x in values.items()}


def _columns(named: Mapping[str, Values]) -> Floats:
    """(series, values), numbers repeated."""
    series = {name: np.asarray(x, dtype=np.float64) for name, x in named.items()}
    counts = {name: len(x) for name, x in series.items() if x.ndim == 1}
    deep = [name for name, x in series.items() if x.ndim > 1]
    if deep:
        raise ValueError(f"orthogonality: {deep[0]} must be one row of values or a number.")
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"orthogonality: values are paired by position and need equal lengths, got {counts}."
        )
    count = max(counts.values(), default=1)
    if count < 2:
        raise ValueError(
            f"orthogonality: {count} value has no spread. Give at least 2 seeds or batches."
        )
    for name, x in series.items():
        if not np.isfinite(x).all():
            raise ValueError(f"orthogonality: {name} has NaN or inf: {x.tolist()}.")
    return np.stack([np.broadcast_to(x, (count,)) for x in series.values()])


def _metrics(columns: Floats, transform: Callable[[Floats], Floats] | None) -> list[float]:
    means = columns.mean(axis=-1)
    with np.errstate(all="ignore"):  # what is not finite is refused by name
        return [float(x) for x in (means if transform is None else transform(means))]


def _interval(
    columns: Floats,
    coefficients: Floats,
    transform: Callable[[Floats], Floats] | None,
    confidence: float,
) -> Interval:
    """Of Σ coefficient · EM(series)."""

    def statistic(means: Floats) -> Floats:
        metrics = means if transform is None else np.asarray(transform(means))
        return np.tensordot(coefficients, metrics, axes=1)

    value = float(statistic(columns.mean(axis=1)))
    count = columns.shape[1]
    with np.errstate(all="ignore"):
        without = statistic((columns.sum(axis=1, keepdims=True) - columns) / (count - 1))
        spread = float(without.std())
    if not math.isfinite(spread):
        raise ValueError(
            "orthogonality: without one of the values, `transform` gives NaN or inf; its interval "
            "is not known."
        )
    if spread <= 1e-14 * max(1.0, abs(value)):  # all values agree
        return Interval(value, value, value)
    error = math.sqrt(count - 1) * spread  # jackknife
    reach = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
    return Interval(value, value - reach, value + reach)
