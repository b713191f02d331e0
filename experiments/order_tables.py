"""Tables and the figure of docs/training-order.md, from the stored runs of `training_order.py` and
`super_resolution.py`: seeds of one setting are one row; what was not run says how to run it.

Run:      python experiments/order_tables.py        (the figure; `readme_tables.py` fills the page)
Results:  docs/figures/training-order.png and .svg
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any, TypeAlias

from tables import cell, table

Record: TypeAlias = dict[str, Any]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
ORDERS = {
    "prune-quantize": "P then Q",
    "quantize-prune": "Q then P",
    "late": "late Q then P",
    "together": "together",
    "prune-quantize-24": "P then Q, 24 % of the steps after the last event",
}
WAYS = {
    "direct": "direct compression, no training",
    "at-once": "direct compression, then training",
    "prune-quantize": "on a schedule, straight-through (P then Q)",
    "lc": "LC",
}
WHATS = {"weights": "weights", "both": "weights and activations"}
DELAYED = ("P then Q", "prune-quantize", "nearest", "before")
ABLATIONS = (
    ("rounding towards zero", "prune-quantize", "truncate", "before"),
    ("quantized from the start", "from-start", "nearest", "before"),
    ("masks after the ReLU", "prune-quantize", "nearest", "after"),
)
DRAWN = {
    "P→Q\nweights": "weights, prune then quantize",
    "Q→P\nweights": "weights, quantize then prune",
    "P→Q\nboth": "both, prune then quantize",
    "Q→P\nboth": "both, quantize then prune",
    "Q→P\nboth,\nsame steps": "both, quantize then prune, pruned at the same steps",
}
DIGITS = "digits"  # in the name of a folder of theirs
SUPER = ("prune then quantize", "quantize then prune")


def runs(folder: Path) -> list[Record]:
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]


def chosen(found: list[Record], **settings: Any) -> list[Record]:
    wanted = {"rounding": "nearest", "masks": "before"} | settings
    own = [r for r in found if all(r["config"][k] == v for k, v in wanted.items())]
    return sorted(own, key=lambda r: r["config"]["seed"])


def numbers(found: list[Record], name: str) -> list[float]:
    return [r["result"][name] for r in found if name in r["result"]]


def row(name: str, own: list[Record]) -> list[str]:
    """Accuracy, size and densities of one setting."""
    size = f"{statistics.mean(numbers(own, 'file_bytes')) / 1000:.1f}"
    return [
        name,
        cell(numbers(own, "accuracy")),
        cell(numbers(own, "loss"), 3),
        str(len(own)),
        size,
        f"{statistics.mean(numbers(own, 'density_paper')):.2f}",
        f"{statistics.mean(numbers(own, 'density_stored')):.2f}",
    ]


COLUMNS = [
    "accuracy, %",
    "test loss",
    "seeds",
    "file, kB",
    "density, paper's",
    "density, all stored",
]


def missing(found: list[Record], given: str) -> str:
    """The command that fills a row: with the settings of what was run, and this."""
    name, _, settings = found[0]["command"].partition(" --orders ")
    parts = settings.split(" --seeds ")[1].split(" ", 1)
    return f"needs more time: `{' '.join([name, given, *parts[1:]])}`"


def command(found: list[Record]) -> str:
    """What makes these records, which differ in their orders and seeds only."""
    text = str(found[0]["command"])
    for option, key in (("orders", "order"), ("seeds", "seed")):
        given = dict.fromkeys(str(r["config"][key]) for r in found if key in r["config"])
        if len(given) > 1:
            text = re.sub(rf"--{option} \S+", f'--{option} "{" ".join(given)}"', text)
    return text


def row_or_command(found: list[Record], name: str, given: str, **settings: Any) -> list[str]:
    own = chosen(found, **settings)
    if not found:
        return [name, "not run", *[""] * (len(COLUMNS) - 1)]
    return row(name, own) if own else [name, missing(found, given), *[""] * (len(COLUMNS) - 1)]


def orders(folder: Path, what: str, widths: tuple[int, ...] = (8, 4)) -> str:
    """The paper's comparison."""
    found, rows = runs(folder), []
    for bits in widths:
        for order, name in list(ORDERS.items())[: 5 if what == "both" else 4]:
            given = f"--orders {order} --whats {what} --bits {bits}"
            settings = {"order": order, "what": what, "bits": bits}
            rows.append(row_or_command(found, f"{bits} bits, {name}", given, **settings))
    return table([WHATS[what], *COLUMNS], rows)


def differences(folder: Path) -> str:
    """Test loss of other orders less that of P then Q, seed by seed: finer than accuracy."""
    found, rows = runs(folder), []
    for what, text in WHATS.items():
        for bits in (8, 4):
            own = {o: chosen(found, order=o, what=what, bits=bits) for o in ORDERS}
            base = {r["config"]["seed"]: r["result"]["loss"] for r in own["prune-quantize"]}
            cells = []
            for order in list(ORDERS)[1:]:
                pairs = [
                    r["result"]["loss"] - base[r["config"]["seed"]]
                    for r in own[order]
                    if r["config"]["seed"] in base
                ]
                cells.append(cell(pairs, 3))
            if any(cells):
                rows.append([f"{text}, {bits} bits", *cells])
    return table(["test loss less that of P then Q", *list(ORDERS.values())[1:]], rows)


def ways(folder: Path, widths: tuple[int, ...] = (4, 2)) -> str:
    """What learns best in equal steps, at equal bytes."""
    found, rows = runs(folder), []
    for bits in widths:
        for way, name in WAYS.items():
            given = f"--orders {way} --whats weights --bits {bits}"
            settings = {"order": way, "what": "weights", "bits": bits}
            rows.append(row_or_command(found, f"{bits} bits, {name}", given, **settings))
    return table(["weights", *COLUMNS], rows)


def ablations(folder: Path) -> str:
    found, rows = runs(folder), []
    for name, order, rounding, masks in (DELAYED, *ABLATIONS):
        given = f"--orders {order} --whats both --bits 4 --rounding {rounding} --masks {masks}"
        settings = {"order": order, "rounding": rounding, "masks": masks, "what": "both", "bits": 4}
        rows.append(row_or_command(found, name, given, **settings))
    return table(["weights and activations, 4 bits", *COLUMNS], rows)


def references(folder: Path) -> str:
    """What the accuracies are to be held against."""
    found, rows = runs(folder), []
    own = [r for r in found if r["config"]["order"] == "dense"]
    if own:
        rows.append(["not compressed, the same training", *losses(own)])
    for what, text in WHATS.items():
        for bits in (8, 4):
            if own := chosen(found, order="direct", what=what, bits=bits):
                rows.append([f"{text}, {bits} bits: direct compression, no training", *losses(own)])
    return table(["", "accuracy, %", "test loss", "seeds"], rows)


def losses(own: list[Record]) -> list[str]:
    return [cell(numbers(own, "accuracy")), cell(numbers(own, "loss"), 3), str(len(own))]


def levels(folder: Path) -> str:
    """The most distinct values of an activation tensor."""
    found, rows = runs(folder), []
    for bits in (8, 4):
        own = [r for r in found if r["config"]["what"] == "both" and r["config"]["bits"] == bits]
        if own:
            most = [max(numbers(own, f"levels_{mode}")) for mode in ("training", "evaluation")]
            rows.append([f"{bits} bits", *map(str, most), str(2**bits), str(len(own))])
    header = ["distinct values per scale", "in training", "in evaluation", "at most", "models"]
    return table(header, rows)


def budget(folder: Path) -> str:
    """What was run, in words."""
    found = runs(folder)
    if not found:
        return "Not run yet."
    config, images = found[0]["config"], 1437 if DIGITS in folder.name else 50_000
    minutes = sum(numbers(found, "processor_seconds")) / 60
    before = f" after {config['pretrain']} without compression" if config.get("pretrain") else ""
    return (
        f"{len(found)} runs of {config['steps']} steps of {config['batch']} images"
        f" ({config['steps'] * config['batch'] / images:.2g} epochs){before}, SGD, momentum "
        f"{config['momentum']:g}, learning rate {config['lr']:g} falling to 0 as a cosine, windows "
        f"of {config['window']} images, {config['test_images']:,} test images; "
        f"{minutes:.1f} minutes of one processor core ({found[0]['device']}) in all."
    )


def super_resolution(folder: Path) -> str:
    found = runs(folder)
    if not found:
        return "Not run yet: `python experiments/super_resolution.py --data DIR`."
    rows = []
    for name in found[0]["result"]["arms"]:
        own = [r["result"]["arms"][name] for r in found]
        size = f"{own[0]['file_bytes'] / 1000:.1f}" if "file_bytes" in own[0] else ""
        densities = [
            f"{statistics.mean([x[key] for x in own]):.2f}" if key in own[0] else ""
            for key in ("density_paper", "density_stored")
        ]
        rows.append([name, cell([x["psnr"] for x in own]), str(len(own)), size, *densities])
    config = found[0]["config"]
    minutes = sum(numbers(found, "processor_seconds")) / 60
    text = (
        f"{config['steps']:,} steps of Adam with {config['batch']} images each, "
        f"{config['test_images']:,} test images, {len(found)} seeds, {minutes:.0f} minutes of one "
        "processor core."
    )
    return f"{text}\n\n{table(['8 bits unless said', 'PSNR, dB', *COLUMNS[2:]], rows)}"


def super_differences(folder: Path) -> str:
    """PSNR of Q then P less that of P then Q, seed by seed."""
    rows = []
    arms = [r["result"]["arms"] for r in runs(folder)]
    for text, what, suffix in (
        ("weights, 8 bits", "weights", ""),
        ("weights and activations, 8 bits", "both", ""),
        ("the same, both pruned at the same steps", "both", ", pruned at the same steps"),
        ("weights and activations, 4 bits", "both", ", 4 bit"),
    ):
        first, second = (f"{what}, {order}{suffix}" for order in SUPER)
        pairs = [
            own[second]["psnr"] - own.get(first, own[f"{what}, {SUPER[0]}"])["psnr"] for own in arms
        ]
        better = sum(x > 0 for x in pairs)
        rows.append([text, cell(pairs, 3), f"{better} of {len(pairs)}"])
    return table(["", "Q then P less P then Q, dB", "seeds where Q then P is better"], rows)


def overhead(folder: Path) -> str:
    """What a compiled training step costs, against one of the plain network."""
    path = folder / "bench_scheduled.json"
    if not path.is_file():
        return "Not measured yet: `python experiments/bench_scheduled.py`."
    ways = json.loads(path.read_text(encoding="utf-8"))["result"]["ways"]
    rows = []
    for name, own in ways.items():
        low, high = own["quartiles"]
        limit = f"{own['limit']:g}" if "limit" in own else ""
        middle = f"{own['ratio']:.3f} ({low:.3f} to {high:.3f})" if limit else "1"
        rows.append([name, f"{1000 * own['seconds']:.0f}", middle, limit])
    return table(["", "ms a step", "of a plain step (quartiles)", "at most"], rows)


def marks(axes: Any, at: float, own: list[float], marker: str, colour: str) -> None:
    """One for each seed, and their mean."""
    axes.plot([at] * len(own), own, marker, color=colour, mfc="none")
    if own:
        axes.plot(at, statistics.mean(own), "_", color=colour, ms=18)


def figure(folder: Path, out: Path) -> None:
    from matplotlib.figure import Figure

    sources = {"digits, ResNet8": f"training_order_{DIGITS}", "ResNet20": "training_order_400"}
    plans = [
        (name, runs(folder / place), what) for name, place in sources.items() for what in WHATS
    ]
    plans = [x for x in plans if chosen(x[1], what=x[2], order="prune-quantize")]
    drawing = Figure(figsize=(10.5, 7), layout="constrained")
    panels = list(drawing.subplots(2, 3).flat)
    names = list(ORDERS)[:4]
    for axes, (network, found, what) in zip(panels, plans, strict=False):
        for bits, marker, colour, shift in ((8, "o", "C0", -0.1), (4, "s", "C1", 0.1)):
            for i, order in enumerate(names):
                own = numbers(chosen(found, order=order, what=what, bits=bits), "loss")
                marks(axes, i + shift, own, marker, colour)
            axes.plot([], [], marker, color=colour, mfc="none", label=f"{bits} bits")
        axes.set_xticks(range(len(names)), [ORDERS[n].replace(" then ", "→") for n in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_title(f"{network}: {WHATS[what]}", fontsize=10)
        axes.set_ylabel("test loss (lower is better)")
        axes.legend(fontsize=8)
    for axes in panels[len(plans) + 1 :]:
        axes.set_axis_off()
    panels = panels[: len(plans) + 1]
    arms = [r["result"]["arms"] for r in runs(folder / "super_resolution")]
    for i, arm in enumerate(DRAWN.values()):
        marks(panels[-1], i, [a[arm]["psnr"] for a in arms], "o", "C2")
    panels[-1].set_xticks(range(len(DRAWN)), list(DRAWN), fontsize=8)
    panels[-1].set_xlim(-0.5, len(DRAWN) - 0.5)
    panels[-1].set_title("ESPCN ×3, 8 bits", fontsize=10)
    panels[-1].set_ylabel("PSNR, dB (higher is better)")
    for suffix in (".png", ".svg"):
        drawing.savefig(out / f"training-order{suffix}", dpi=150)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default=str(RESULTS), help="folder of the records")
    parser.add_argument("--out", default=str(ROOT / "docs" / "figures"))
    given = parser.parse_args(argv)
    Path(given.out).mkdir(parents=True, exist_ok=True)
    figure(Path(given.results), Path(given.out))


if __name__ == "__main__":
    main(sys.argv[1:])
