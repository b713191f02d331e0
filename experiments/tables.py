"""Markdown tables of means and spreads, as the pages show them."""

from __future__ import annotations

import statistics


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
