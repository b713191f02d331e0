"""Figures of the two reports; they need matplotlib."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .orthogonality import Orthogonality
    from .report import OrderReport

# colours that stay apart for colour-blind readers, and in grey by their markers and lines
STYLE: dict[str, dict[str, Any]] = {
    "s": {"color": "#666666", "marker": "", "linestyle": "--", "label": "S alone"},
    "q": {"color": "#666666", "marker": "", "linestyle": ":", "label": "Q alone"},
    "sq": {"color": "#0072B2", "marker": "o", "linestyle": "-", "label": "S→Q: q(s(w))"},
    "qs": {
        "color": "#D55E00",
        "marker": "s",
        "linestyle": "-",
        "label": "Q→S: s(q(w))",
        "markersize": 7,  # open and larger: where the orders agree both are seen
        "markerfacecolor": "none",
    },
}
VERDICTS = {"orthogonal": "#009E73", "inconclusive": "#666666", "non-orthogonal": "#D55E00"}
_NAMED = 40  # more layers than this are numbered


@contextmanager
def drawing(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Any]:
    """A figure, written to `path` in the end, the same bytes for the same data.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as cause:
        raise ImportError(
            "Figures need matplotlib: pip install 'lc_compress[plot]'. `print` and `.json` do "
            "without."
        ) from cause
    style: Any = {"svg.hashsalt": "interplay", "svg.fonttype": "path", "font.size": 10}
    target = Path(path)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        options: dict[str, Any] = {"metadata": {"Date": None}} if target.suffix == ".svg" else {}
        temporary = target.with_name(f"{target.stem}.{os.getpid()}{target.suffix}")
        figure.savefig(temporary, dpi=150, **options)
        os.replace(temporary, target)


def bare(axes: Any, grid: str = "y") -> None:
    axes.grid(axis=grid, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_orders(report: OrderReport, path: str | os.PathLike[str]) -> None:
    """Over the layers: errors of the weights, cost of the order, and with data how errors grow."""
    rows = report.layers
    names = [row.weights.name.removesuffix(".weight") for row in rows]
    place = range(len(rows))
    followed = all(row.propagated for row in rows)
    panels = 3 if followed else 2
    width = min(14.0, max(7.0, 2.5 + 0.24 * len(rows)))
    with drawing(path, width, 2.4 * panels + 1.4) as figure:
        axes = figure.subplots(panels, 1, sharex=True)
        top, middle = axes[0], axes[1]
        for arm, style in STYLE.items():
            values = [getattr(row.weights.l2, arm) / (row.weights.norm or 1.0) for row in rows]
            top.plot(place, values, **{"markersize": 4, "linewidth": 1.4} | style)
        top.set_ylabel("relative L2 error\nof the weights")
        cost = [100 * (row.weights.l2.ratio - 1) for row in rows]
        colors = [STYLE["qs"]["color"] if x >= 0 else STYLE["sq"]["color"] for x in cost]
        middle.bar(place, cost, 0.7, color=colors)
        middle.axhline(0, color="black", linewidth=0.8)
        middle.set_ylabel("L2 error of Q→S\nover S→Q, % more")
        swapped = [100 * row.weights.swapped for row in rows]
        other = middle.twinx()
        other.plot(place, swapped, "D", color="black", markersize=3.5, markerfacecolor="white")
        other.set_ylabel("swapped survivors, %  ◇")
        other.set_ylim(bottom=min(0.0, *middle.get_ylim()))
        other.spines["top"].set_visible(False)
        if followed:
            for arm, style in STYLE.items():
                values = [getattr(row.propagated, arm) for row in rows]
                axes[2].plot(place, values, **{"markersize": 4, "linewidth": 1.4} | style)
            axes[2].set_ylabel("relative error of\nthe layer's output")
        for one in axes:
            bare(one)
            one.set_ylim(bottom=min(0.0, one.get_ylim()[0]))
        if len(rows) <= _NAMED:
            axes[-1].set_xticks(place, names, rotation=90, fontsize=8)
        else:
            axes[-1].set_xlabel("layer, in the model's order")
        axes[-1].set_xlim(-0.6, len(rows) - 0.4)
        nested = sum(row.weights.nests for row in rows)
        figure.suptitle(
            f"S = {report.sparse},  Q = {report.quantizer};  groups nest in {nested} of "
            f"{len(rows)} layers",
            fontsize=10,
        )
        handles, labels = top.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def draw_orthogonality(result: Orthogonality, path: str | os.PathLike[str]) -> None:
    """Left: the metric of everything, with the threshold. Right: excess with its interval."""
    rows: list[tuple[str, float, str, str]] = [("dense", result.dense, "black", "D")]
    rows += [(name, value, "#666666", "o") for name, value in result.parts.items()]
    rows += [(x.name, x.metric, VERDICTS[x.verdict], "s") for x in result.combined]
    count = len(result.combined)
    with drawing(path, 9.0, 1.5 + 0.36 * len(rows)) as figure:
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1.15)})
        for i, (_, value, color, marker) in enumerate(rows):
            left.plot(value, i, marker, color=color, markersize=7)
        left.axvline(result.threshold, color="black", linestyle="--", linewidth=1)
        left.annotate(
            "threshold",
            (result.threshold, 0),
            (4, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
        )
        left.set_yticks(range(len(rows)), [name for name, *_ in rows])
        left.set_ylim(len(rows) - 0.5, -0.5)
        better = "higher" if result.higher_is_better else "lower"
        left.set_xlabel(f"{result.metric} ({better} is better)")
        left.margins(x=0.12)
        for i, x in enumerate(result.combined):
            color, e = VERDICTS[x.verdict], x.excess
            right.plot([e.low, e.high], [i, i], color=color, linewidth=2)
            right.plot(e.value, i, "s", color=color, markersize=7)
            right.annotate(
                x.verdict,
                (e.value, i),
                (0, 8),
                textcoords="offset points",
                color=color,
                ha="center",
                fontsize=9,
            )
        right.axvline(0, color="black", linestyle="--", linewidth=1)
        right.set_yticks(range(count), [x.name for x in result.combined])
        right.set_ylim(count - 0.5, -0.7)
        right.margins(x=0.15)
        interval = f"{result.confidence:.0%} interval"
        right.set_xlabel(f"excess over the threshold, {interval} (> 0: worse)")
        bare(left, "x")
        bare(right, "x")
        figure.suptitle(f"Intervals: {result.interval}", fontsize=9)
