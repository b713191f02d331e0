"""Markdown tables of means and spreads, as the pages show them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def table(header: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def cell(numbers: list[float], digits: int = 2) -> str:
    """Mean, and the standard deviation where there are several."""
    if not numbers:
        return ""
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return f"{mean} ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean, and how far its 95 % t interval reaches."""
    count = len(numbers)
    error = statistics.stdev(numbers) / math.sqrt(count)
    return statistics.mean(numbers), float(stats.t.ppf(0.975, count - 1)) * error


def difference(first: list[float], second: list[float], digits: int = 2) -> str:
    """Mean of second − first, paired, with its 95 % t interval; "noise" where that holds 0."""
    pairs = [b - a for a, b in zip(first, second, strict=True)]
    if len(pairs) == 1:
        return f"{pairs[0]:+.{digits}f}"
    mean, reach = interval(pairs)
    text = f"{mean:+.{digits}f} [{mean - reach:+.{digits}f}, {mean + reach:+.{digits}f}]"
    return text + (" noise" if abs(mean) <= reach else "")
