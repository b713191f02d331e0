"""The figure that the experiments on the order share: excess of both orders over the threshold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

STYLE = {"S→Q": ("o", "#0072B2", -0.14), "Q→S": ("s", "#D55E00", 0.14)}


def excesses(cells: list[dict[str, Any]], stem: Path, metric: str, linear: float) -> None:
    """For each setting (rows) and pruning (columns), over the formats, with intervals. Written as
    stem.png and stem.svg; no cells, no figure.

    cells: with setting, pruning, format and the `dicts()` of an orthogonality.   metric: with its
    unit.   linear: up to which excess the axis is linear; beyond, logarithmic.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not cells:
        return
    stem.parent.mkdir(parents=True, exist_ok=True)
    settings, prunings = (
        list(dict.fromkeys(c[key] for c in cells)) for key in ("setting", "pruning")
    )
    options: Any = {"svg.hashsalt": "order", "svg.fonttype": "path", "font.size": 10}
    with matplotlib.rc_context(options):
        size = (11, 0.8 + 2.8 * len(settings))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        shape = (len(settings), len(prunings))
        grid = figure.subplots(*shape, sharex=True, sharey="row", squeeze=False)
        for row, setting in zip(grid, settings, strict=True):
            for axes, pruning in zip(row, prunings, strict=True):
                chosen = [c for c in cells if (c["setting"], c["pruning"]) == (setting, pruning)]
                panel(axes, chosen, linear)
                axes.set_title(f"{pruning}, {setting}", fontsize=10)
            break_ = "\n" if len(metric) > 14 else " "
            label = f"{metric}{break_}beyond the threshold\n(> 0: worse than S and Q alone)"
            row[0].set_ylabel(label)
        legend(figure, grid[0][0])
        for suffix, more in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
            temporary = stem.with_name(f"{stem.name}.{os.getpid()}{suffix}")
            figure.savefig(temporary, **more)
            os.replace(temporary, stem.with_name(stem.name + suffix))


def panel(axes: Any, cells: list[dict[str, Any]], linear: float) -> None:
    for i, cell in enumerate(cells):
        for one in cell["orthogonality"]["combined"]:
            marker, color, shift = STYLE[one["name"]]
            e, at = one["excess"], i + shift
            face = "white" if one["verdict"] == "inconclusive" else color
            axes.plot([at, at], [e["low"], e["high"]], color=color, linewidth=1.6)
            axes.plot(at, e["value"], marker, color=color, markerfacecolor=face)
    axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
    axes.set_yscale("symlog", linthresh=linear)
    axes.set_xticks(range(len(cells)), [c["format"] for c in cells], rotation=60)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Any, axes: Any) -> None:
    empty: list[float] = []
    for name, (marker, color, _) in STYLE.items():
        axes.plot(empty, empty, marker, color=color, linestyle="none", label=name)
    white = {"color": "0.3", "markerfacecolor": "white", "linestyle": "none"}
    axes.plot(empty, empty, "o", label="inconclusive: the interval holds 0", **white)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
