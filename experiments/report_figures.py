"""The figures of `report.py`: the error-compression plane, training curves, bits by layer and part.

One colour and one shape per family; the colours stay apart for the three kinds of colour blindness
(simulated), and a sequential combination has the colour of the sum of the same parts. Hollow is
direct compression, tinted is learned, solid is refined; baselines are drawn as strokes.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
Points = list[tuple[float, float]]


def polygon(corners: int, turn: float, radius: float, inner: float = 1.0) -> Points:
    """Corners on a circle, the first at `turn` degrees; every second one at `inner` of the radius.

    All shapes have their y axis upwards and about one area.
    """
    angles = [math.radians(turn + 360 * i / corners) for i in range(corners)]
    radii = [radius * (inner if i % 2 else 1) for i in range(corners)]
    pairs = zip(angles, radii, strict=True)
    return [(round(r * math.cos(a), 4), round(r * math.sin(a), 4)) for a, r in pairs]


CROSS = [(0.37, 1.0), (0.37, 0.37), (1.0, 0.37), (1.0, -0.37), (0.37, -0.37), (0.37, -1.0)]
MARKS: dict[str, Record] = {  # of the families: shape, colours on light and on dark ground
    "Q": {"shape": polygon(32, 0, 0.9), "light": "#1C3C71", "dark": "#3F86D8"},
    "L": {"shape": polygon(4, 45, 1.12), "light": "#0E8042", "dark": "#599D8D"},
    "S": {"shape": polygon(3, 90, 1.25), "light": "#D09632", "dark": "#EBBA4E"},
    "Q+S": {"shape": polygon(4, 90, 1.2), "light": "#752912", "dark": "#DA6900"},
    "L+S": {"shape": polygon(3, 270, 1.25), "light": "#74A4C6", "dark": "#7ACCFC"},
    "Q+L": {"shape": polygon(5, 90, 1.08), "light": "#AA48A2", "dark": "#B05A80"},
    "Q+L+S": {"shape": polygon(10, 90, 1.4, 0.45), "light": "#1B1F24", "dark": "#F2F4F7"},
    "S>Q": {"shape": polygon(3, 0, 1.25), "light": "#752912", "dark": "#DA6900"},
    "L>Q": {
        "shape": CROSS + [(-x, -y) for x, y in CROSS],
        "light": "#AA48A2",
        "dark": "#B05A80",
    },
    "": {"shape": polygon(6, 0, 1.0), "light": "#6B7280", "dark": "#9CA3AF"},  # any other
}
BASELINES: dict[str, list[Points]] = {  # of the methods: strokes
    "ste": [[(-0.9, -0.9), (0.9, 0.9)], [(-0.9, 0.9), (0.9, -0.9)]],
    "finetune": [[(-1.1, 0), (1.1, 0)], [(0, -1.1), (0, 1.1)]],
    "parq": [[(0, 0), polygon(3, 90 + 120 * i, 1.2)[0]] for i in range(3)],
}
PARTS: dict[str, str] = {  # colours of the parts in the bars; others take a family's
    "Binary": "Q",
    "Ternary": "Q",
    "Int": "Q",
    "KMeans": "Q",
    "LowRank": "L",
    "RankSelection": "L",
    "Sparse": "S",
    "NM": "S",
}
AXES = {
    "bits_per_weight": "bits per weight of the compressed layers",
    "file_ratio": "dense float32 file / packed file",
}
STROKES = {"ste": "straight-through", "finetune": "fine-tuning", "parq": "PARQ"}
REFERENCE: Record = {"color": "0.35", "linewidth": 0.9, "linestyle": (0, (5, 3))}
FRONT: Record = {"color": "0.1", "linewidth": 1.0}
STEPS = (
    [1],
    [1, 2, 5],
    [1, 1.5, 2, 3, 5, 7],
    [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9],
)  # of round numbers within a decade
TINT = 0.35  # of a learned point's fill
PANELS = 10  # configurations in the figure of the layers at most
LETTER = 0.0135  # its width in a label, as a share of a plane's width


def check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit(
            "The figures need matplotlib: install it (pip install 'lc-compress[plot]'), "
            "or run with --no-figure for the tables and the page alone."
        )


def mark(family: str) -> Record:
    return MARKS.get(family, MARKS[""])


def style(family: str, stage: str, method: str) -> Record:
    """Keyword arguments of a line that draws the mark of a point."""
    from matplotlib.colors import to_rgba
    from matplotlib.path import Path as Outline

    color, corners = mark(family)["light"], mark(family)["shape"]
    outline, width = Outline([*corners, corners[0]], closed=True), 1.1
    if method in BASELINES and stage != "direct":
        corners = [corner for stroke in BASELINES[method] for corner in stroke]
        moves = [Outline.MOVETO, Outline.LINETO] * (len(corners) // 2)
        outline, width = Outline(corners, moves), 1.6
    return {
        "color": color,
        "linestyle": "none",
        "marker": outline,
        "markersize": 6.0 * max(abs(x) for corner in corners for x in corner),  # of one box
        "markeredgecolor": color,
        "markeredgewidth": width,
        "markerfacecolor": {"direct": "none", "refined": color}.get(stage, to_rgba(color, TINT)),
    }


def bare(axes: Axes) -> None:
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers for a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in STEPS:
        found = [float(f"{step * 10.0**k:.6g}") for k in decades for step in steps]
        found = [x for x in found if low <= x <= high]
        if len(found) >= 4:
            return found[:: math.ceil(len(found) / 9)]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= 2 if (high - low) / step > 6 else 1
    first = math.ceil(low / step)
    return [float(f"{i * step:.6g}") for i in range(first, math.floor(high / step) + 1)]


def logarithmic(axes: Axes, name: str, values: Sequence[float], more: Sequence[float]) -> None:
    """Axis "x" or "y" around `values`: logarithmic with plain numbers, linear where one is 0.

    more: room on both sides, as shares of the range of `values`.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(values), max(values)
    if low <= 0:
        return
    across = max(high / low, 1.3)
    low, high = low / across ** more[0], high * across ** more[1]
    axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high)})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(FixedLocator(ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


# ------------------------------------------------------------------ figures


def plane(figure: Figure, report: Record, network: Record) -> None:
    """Test error against both sizes: every row, its spread, the front and the reference."""
    rows = [x for x in report["rows"] if x["network"] == network["name"]]
    points = [x for x in rows if x["stage"] != "reference"]
    for axes, axis in zip(figure.subplots(1, 2, sharey=True), AXES, strict=True):
        bare(axes)
        left = axis == "bits_per_weight"  # where the front's labels stand
        sizes = [x[axis][0] for x in points]
        names = {
            (x[axis][0], x["test_error"][0]): x["scheme"] for x in points if axis in x["front"]
        }
        best = sorted(names)
        share = 0.03 + LETTER * len(short(names[best[0 if left else -1]]))  # of the outermost label
        room = max(0.3, 1.06 * share / (1 - share))
        logarithmic(axes, "x", sizes, (room, 0.06) if left else (0.06, room))
        errors = [*network["references"], *(x["test_error"][0] for x in points)]
        logarithmic(axes, "y", errors, (0.1, 0.06))
        for error in network["references"]:
            axes.axhline(error, **REFERENCE, zorder=1)
        for x in points:
            drawn = style(x["family"], x["stage"], x["method"])
            if x["before"] is not None:
                pair = [report["rows"][x["before"]], x]
                ends = [[each[name][0] for each in pair] for name in (axis, "test_error")]
                axes.plot(*ends, color=drawn["color"], linewidth=0.6, alpha=0.15, zorder=1)
            spread = {"yerr": x["test_error"][1] or None, "xerr": x[axis][1] or None}
            at = (x[axis][0], x["test_error"][0])
            thin = {"linewidth": 0.9, "capsize": 1.8}
            axes.errorbar(*at, **spread, fmt="none", color=drawn["color"], **thin, zorder=2)
            axes.plot(*at, **drawn, zorder=3)
        steps = {"where": "post" if left else "pre", "zorder": 1.5}
        axes.step(*zip(*best, strict=True), **steps, **FRONT)
        label(axes, names, left)
        axes.set_xlabel(AXES[axis])
    figure.axes[0].set_ylabel("test error, %")
    figure.legend(handles=legend(points), loc="outside right center", frameon=False, fontsize=8)


def label(axes: Axes, names: dict[tuple[float, float], str], left: bool) -> None:
    """The schemes of the front beside its points, on the side where no point can lie.

    One that would lie over another is not written: the tables mark the whole front.
    """
    boxes: list[Any] = []
    for at, name in names.items():
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        beside = {"xytext": (-5 if left else 5, -4), "textcoords": "offset points"}
        aligned = {"ha": "right" if left else "left", "va": "top"}
        text = axes.annotate(
            short(name), at, **beside, **aligned, fontsize=6.5, color="0.25", bbox=ground
        )
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in boxes):
            text.remove()
        else:
            boxes.append(box)


def short(text: str, most: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def families(names: set[str]) -> list[str]:
    """In one order everywhere: the known ones first."""
    return [*(x for x in MARKS if x in names), *sorted(names - MARKS.keys())]


def legend(points: Sequence[Record]) -> list[Any]:
    from matplotlib.lines import Line2D

    def entry(name: str, **look: Any) -> Line2D:
        return Line2D([], [], label=name, **look)

    found = [
        entry(short(x), **style(x, "refined", "")) for x in families({x["family"] for x in points})
    ]
    own = {x["stage"] for x in points if x["method"] not in BASELINES}
    stages = {"direct": "direct", "learned": "LC", "refined": "LC + refine"}
    found += [entry(name, **style("", x, "")) for x, name in stages.items() if x in own]
    used = {x["method"] for x in points}
    found += [entry(STROKES[x], **style("", "learned", x)) for x in STROKES if x in used]
    return [*found, entry("Pareto front", **FRONT), entry("reference", **REFERENCE)]


def curves(figure: Figure, report: Record, network: Record) -> None:
    """Loss, gap and mu over the epochs: a line per run in the colour of its family."""
    from matplotlib.lines import Line2D

    runs = [x for x in report["runs"] if x["network"] == network["name"]]
    titles = {"loss": "training loss", "gap": "gap ‖w − Δ(θ)‖ / ‖w‖", "mu": "μ"}
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        bare(axes)
        axes.set(xlabel="epoch", title=title)
        values: list[float] = []
        for run in runs:
            pairs = zip(run["curve"]["epoch"], run["curve"][name], strict=True)
            known = [(epoch, y) for epoch, y in pairs if y is not None and y > 0]
            if known:
                axes.plot(*zip(*known, strict=True), **line_of(run), linewidth=0.9, alpha=0.8)
                values += [y for _, y in known]
        if values:
            logarithmic(axes, "y", values, (0.05, 0.05))
        else:
            axes.text(0.5, 0.5, "none in these runs", transform=axes.transAxes, ha="center")
    kinds = {(x["family"], x["method"] in BASELINES): line_of(x) for x in runs}
    names = families({family for family, _ in kinds})
    order = sorted(kinds, key=lambda kind: (names.index(kind[0]), kind[1]))
    handles = [
        Line2D(
            [], [], label=f"{short(family)}{', baseline' if other else ''}", **kinds[family, other]
        )
        for family, other in order
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)


def line_of(run: Record) -> Record:
    return {
        "color": mark(run["family"])["light"],
        "linestyle": "--" if run["method"] in BASELINES or ">" in run["family"] else "-",
    }


def layered(report: Record, network: Record) -> list[tuple[Record, Record]]:
    """Rows of the front, smallest first, each with its first run that has layers."""
    found = []
    for x in report["rows"]:
        if x["network"] == network["name"] and x["front"] and x["stage"] in ("learned", "refined"):
            runs = [run for run in report["runs"] if run["file"] in x["files"] and run["layers"]]
            found += [(x, runs[0])] if runs else []
    return found[:PANELS]


def part_color(name: str, ground: str = "light") -> str:
    order = [x for x in MARKS if x]
    family = PARTS.get(name) or order[sum(map(ord, name)) % len(order)]
    return str(MARKS[family][ground])


def layers(figure: Figure, report: Record, network: Record) -> None:
    """Bits per weight of every layer by part, for the front's configurations (first seed)."""
    from matplotlib.patches import Patch

    chosen = layered(report, network)
    names: dict[str, None] = {}
    for axes, (x, run) in zip(
        figure.subplots(len(chosen), squeeze=False)[:, 0], chosen, strict=True
    ):
        bare(axes)
        at, below = range(len(run["layers"])), [0.0] * len(run["layers"])
        for part in dict.fromkeys(name for layer in run["layers"] for name in layer["bits"]):
            names[part] = None
            heights = [layer["bits"].get(part, 0) / layer["weights"] for layer in run["layers"]]
            axes.bar(at, heights, 0.78, below, color=part_color(part), edgecolor="white", lw=0.5)
            below = [a + b for a, b in zip(below, heights, strict=True)]
        method = report["methods"].get(x["method"], short(x["method"]))
        title = f"{short(x['scheme'], 60)}, {method}: {x['test_error'][0]:.2f} %, "
        axes.set_title(
            f"{title}{x['bits_per_weight'][0]:.2f} bits per weight", fontsize=9, loc="left"
        )
        axes.set_ylabel("bits per weight")
        axes.set(xticks=[], xlim=(-0.6, len(at) - 0.4))
    last = [short(layer["name"], 24) for layer in chosen[-1][1]["layers"]]
    axes.set_xticks(range(len(last)), last, rotation=90, fontsize=7)
    handles = [Patch(color=part_color(name), label=short(name)) for name in names]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)


def draw(report: Record, folder: Path) -> None:
    """NETWORK_plane, NETWORK_curves and NETWORK_layers, each as .png and .svg."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fixed: Any = {"svg.hashsalt": "report", "svg.fonttype": "path", "font.size": 9}
    fixed["text.parse_math"] = False  # names are no formulas
    for network in report["networks"]:
        count = len(layered(report, network))
        kinds = [("plane", plane, (9.6, 4.4)), ("curves", curves, (9.6, 3.0))]
        kinds += [("layers", layers, (9.6, 1.2 + 1.5 * count))] if count else []
        for kind, make, size in kinds:
            with matplotlib.rc_context(fixed):
                figure = Figure(figsize=size, layout="constrained", facecolor="white")
                FigureCanvasAgg(figure)
                make(figure, report, network)
                figure.suptitle(short(network["name"], 60), fontsize=10, fontweight="bold")
                for suffix, other in (
                    (".png", {"dpi": 150}),
                    (".svg", {"metadata": {"Date": None}}),
                ):
                    path = folder / f"{network['slug']}_{kind}{suffix}"
                    temporary = path.with_name(f"{path.stem}.{os.getpid()}{suffix}")
                    figure.savefig(temporary, **other)
                    os.replace(temporary, path)
