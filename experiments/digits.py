"""Handwritten digits: a small convolutional net as sums of binary, low-rank and sparse parts.

Claim: over 5 seeds, LC with one bit per weight plus 2 % floats stays within 0.5 points of the
reference's mean test error; direct compression is shown beside it.

Run:      python experiments/digits.py [--seeds 5] [--gradient weights] [--quiet]
Results:  digits.json, and the error-compression plane beside it as PNG and SVG, in
          experiments/results or where --out says; digits_demo.* for one seed, digits_weights.* for
          classic LC.

The 500 test images are the same for all seeds and choose nothing: the settings come from held-out
training images and other seeds (digits_study.py), and the last LC step counts. Files are
written when all is done: an interrupted run leaves earlier results as they were.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from common import option, origin, write
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lc_compress import (
    LC,
    Binary,
    LowRank,
    Matrix,
    Part,
    Sparse,
    Ternary,
    constant,
    geometric,
)

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Config:
    seed: int = 0  # the first: decides split, initial weights and batches
    seeds: int = 1
    # parts
    density: float = 0.02  # exact floats per layer
    rank: int = 2
    # LC
    gradient: str = (
        "sum"  # "weights": classic; "sum": straight-through; "both": one, then the other
    )
    epochs: int = 20
    lr: float = 0.05
    lr_end: float = 0.0005  # falls linearly
    every: int = 1  # straight-through: batches between C steps
    handover: float = 0.5  # "both": share of the epochs that are classic
    steps: int = 80  # classic: LC steps in these epochs
    first: float = 1.0  # classic: length of the first L step, in those of the others
    mu0: float = 0.05
    growth: float = 1.4  # of mu, per epoch
    multipliers: bool = True  # augmented Lagrangian; without: quadratic penalty
    lr_guard: bool = False
    implicit: bool = False  # classic: the penalty in an implicit step of its own
    # reference
    reference_epochs: int = 20
    reference_lr: float = 0.05  # falls linearly to 0
    # both
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 5e-4
    batch: int = 64
    held_out: int = 300
    test: int = 500
    out: str = ""  # folder
    figure: bool = True
    quiet: bool = False  # no progress on stderr
    smoke: bool = False


SMOKE = Config(reference_epochs=2, epochs=1, steps=2, held_out=100, test=100, smoke=True)


# ------------------------------------------------------------------ data


@dataclass(frozen=True)
class Data:
    images: Tensor  # (n, 1, 8, 8) in [0, 1]
    labels: Tensor  # (n,)
    train: Tensor  # indices
    held_out: Tensor
    test: Tensor


def load(config: Config, seed: int) -> Data:
    """The test images are the same for every seed; the seed splits the others."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(12345))
    test, rest = order[: config.test], order[config.test :]
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    held_out, train = rest[: config.held_out], rest[config.held_out :]
    if config.smoke:
        train = train[: 4 * config.batch]
    return Data(images, torch.from_numpy(labels).long(), train, held_out, test)


def batches(
    data: Data, config: Config, seed: int, first: int, last: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches first … last − 1 of an endless run of epochs, each in its own order."""
    per_epoch = len(data.train) // config.batch
    for k in range(first, last):
        epoch, b = divmod(k, per_epoch)
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(data.train), generator=generator)
        index = data.train[order[b * config.batch : (b + 1) * config.batch]]
        yield data.images[index], data.labels[index]


# ------------------------------------------------------------------ reference


def network() -> nn.Sequential:
    """15 248 weights in three convolutions and a linear layer; 170 other parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        nn.MaxPool2d(2),
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


def sgd(model: nn.Module, config: Config, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(), lr, config.momentum, weight_decay=config.weight_decay, nesterov=True
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def measure(model: nn.Module, data: Data, index: Tensor) -> tuple[float, float]:
    """Share of wrong answers in percent, and mean cross-entropy."""
    model.eval()
    scores, labels = model(data.images[index]), data.labels[index]
    wrong = int((scores.argmax(1) != labels).sum())
    return 100 * wrong / len(index), F.cross_entropy(scores, labels).item()


def reference(data: Data, config: Config, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network().train()
    optimizer = sgd(model, config, config.reference_lr)
    total = config.reference_epochs * (len(data.train) // config.batch)
    for k, (x, y) in enumerate(batches(data, config, seed, 0, total)):
        optimizer.param_groups[0]["lr"] = config.reference_lr * (1 - k / total)
        train(model, optimizer, x, y)
    return model


# ------------------------------------------------------------------ compression


def schemes(config: Config) -> dict[str, Part[Any]]:
    """Each part alone, then sums of the same parts."""
    binary, sparse = Binary(), Sparse(density=config.density)
    low_rank = LowRank(config.rank).over(Matrix())
    return {
        "binary": binary,
        "ternary": Ternary(),
        "low-rank": low_rank,
        "sparse": sparse,
        "binary + sparse": binary + sparse,
        "low-rank + sparse": low_rank + sparse,
        "binary + low-rank": binary + low_rank,
        "binary + low-rank + sparse": binary + low_rank + sparse,
    }


def compress(
    model: nn.Module, part: Part[Any], data: Data, config: Config, seed: int, index: Tensor
) -> dict[str, float]:
    """Direct compression, then LC; both measured on the images `index`. `model` becomes Δ(θ)."""
    started = time.perf_counter()
    calibration = data.images[data.train].split(256)
    total = config.epochs * (len(data.train) // config.batch)
    share = {"weights": 1.0, "sum": 0.0, "both": config.handover}[config.gradient]
    switch = round(share * total)
    result: dict[str, float] = {}
    for gradient, begin, end in (("weights", 0, switch), ("sum", switch, total)):
        if begin == end:
            continue
        classic = gradient == "weights"
        steps = max(1, round(config.steps * (end - begin) / total))
        optimizer = sgd(model, config, config.lr)
        lc = LC(
            model,
            {"*weight": part},  # of two axes or more: not BatchNorm's
            schedule=geometric(config.mu0, config.growth ** (config.epochs / config.steps), steps)
            if classic
            else constant(0.0, steps),
            optimizer=optimizer,
            gradient="weights" if classic else "sum",
            every=1 if classic else config.every,
            multipliers=config.multipliers,
            lr_guard=config.lr_guard,
            implicit=classic and config.implicit,
        )
        if not result:
            with lc.compressed(calibration=calibration):
                result["direct_error"], result["direct_loss"] = measure(model, data, index)
        longer = config.first if classic else 1.0
        cuts = [0.0, *((longer + k) / (longer + steps - 1) for k in range(steps))]
        for step in lc.steps(progress=False):
            first, last = (begin + round((end - begin) * x) for x in cuts[step.index :][:2])
            model.train()
            for k, (x, y) in enumerate(batches(data, config, seed, first, last), start=first):
                optimizer.param_groups[0]["lr"] = (
                    config.lr + (config.lr_end - config.lr) * k / total
                )
                train(model, optimizer, x, y)
        if end < total:  # hand w over, not Δ(θ)
            lc.release()
    size, guarded = lc.report().total, lc.guarded
    lc.finalize(calibration=calibration)
    result["lc_error"], result["lc_loss"] = measure(model, data, index)
    return result | {
        "bits": size.bits,
        "bits_per_weight": size.bits_per_weight,
        "ratio_float32": size.ratio32,
        "gap": lc.history[-1]["gap"],
        "guarded_steps": guarded,
        "seconds": time.perf_counter() - started,
    }


# ------------------------------------------------------------------ all seeds and schemes


def run(config: Config) -> dict[str, Any]:
    started = time.perf_counter()
    parts = schemes(config)
    seeds = range(config.seed, config.seed + config.seeds)
    errors: list[float] = []
    found: dict[str, list[dict[str, float]]] = {name: [] for name in parts}
    with tqdm(total=len(seeds) * (1 + len(parts)), disable=config.quiet) as bar:
        for seed in seeds:
            data = load(config, seed)
            bar.set_description(f"seed {seed}: reference")
            model = reference(data, config, seed)
            errors.append(measure(model, data, data.test)[0])
            bar.update()
            for name, part in parts.items():
                bar.set_description(f"seed {seed}: {name}")
                found[name].append(compress(deepcopy(model), part, data, config, seed, data.test))
                bar.update()
    return {
        "seeds": list(seeds),
        **spread("reference_error", errors),
        "schemes": {
            name: {
                "part": str(parts[name]),
                **spread("direct_error", [r["direct_error"] for r in rows]),
                **spread("lc_error", [r["lc_error"] for r in rows]),
                **{
                    key: statistics.mean(r[key] for r in rows)
                    for key in ("bits", "bits_per_weight", "ratio_float32", "gap", "seconds")
                },
            }
            for name, rows in found.items()
        },
        "wall_seconds": time.perf_counter() - started,
    }


def spread(name: str, values: list[float]) -> dict[str, Any]:
    return {
        f"{name}s": values,
        f"{name}_mean": statistics.mean(values),
        f"{name}_std": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


# ------------------------------------------------------------------ results


def table(result: dict[str, Any]) -> str:
    several = len(result["seeds"]) > 1

    def percent(entry: dict[str, Any], name: str) -> str:
        std = f" ± {entry[f'{name}_std']:.2f}" if several else ""
        return f"{entry[f'{name}_mean']:.2f}{std}"

    lines = [("test error, %", "direct", "LC", "bits/weight", "ratio to float32")]
    lines.append(("reference", "", percent(result, "reference_error"), "32.00", "1.0"))
    for name, entry in result["schemes"].items():
        errors = percent(entry, "direct_error"), percent(entry, "lc_error")
        size = f"{entry['bits_per_weight']:.2f}", f"{entry['ratio_float32']:.1f}"
        lines.append((name, *errors, *size))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit(
            "The figure needs matplotlib: install it (pip install 'lc-compress[plot]'), "
            "or run with --no-figure for the table and the JSON alone."
        )


def draw(result: dict[str, Any], stem: Path) -> None:
    """The error-compression plane: each scheme from direct compression (hollow) to LC (filled)."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    colors = [
        "#0072B2",
        "#B87A00",
        "#009E73",
        "#CC79A7",
        "#D55E00",
        "#8C6D31",
        "#7F3C8D",
        "#444444",
    ]

    def inverse(x: Any) -> Any:
        return 32 / (x + 1e-9)  # matplotlib also asks at 0

    least = 0.1  # % at which an error of 0 is drawn on the logarithmic axis
    learned = [entry["lc_error_mean"] for entry in result["schemes"].values()]
    lowest = max(least, min(0.5, result["reference_error_mean"], *learned))
    with matplotlib.rc_context({"svg.hashsalt": "digits", "svg.fonttype": "path", "font.size": 10}):
        figure = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log", xlim=(1.25, 10), ylim=(0.7 * lowest, 150))
        axes.set_xlabel("bits per weight, all parameters counted")
        axes.set_ylabel("test error, %")
        ticks = [1.5, 2, 3, 4, 5, 6, 8, 10]
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ratio = axes.secondary_xaxis("top", functions=(inverse, inverse))
        ratio.set_xlabel("ratio to float32")
        ratios = [20, 15, 10, 8, 6, 5, 4]
        ratio.set_xticks(ratios, [f"{x:g}" for x in ratios])
        levels = [y for y in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if y >= 0.7 * lowest]
        axes.set_yticks(levels, [f"{y:g}" for y in levels])
        for axis in (axes.xaxis, axes.yaxis, ratio.xaxis):
            axis.set_minor_locator(NullLocator())
        axes.grid(color="0.92", linewidth=0.6)
        axes.spines["right"].set_visible(False)

        floor = max(result["reference_error_mean"], least)
        axes.axhline(floor, color="0.4", linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        marks = []
        for (name, entry), color in zip(result["schemes"].items(), colors, strict=False):
            x = entry["bits_per_weight"]
            ends = [max(entry[f"{way}_error_mean"], least) for way in ("direct", "lc")]
            axes.annotate(
                "",
                xy=(x, ends[1]),
                xytext=(x, ends[0]),
                arrowprops={"arrowstyle": "-|>", "color": color, "shrinkA": 4, "shrinkB": 4},
            )
            axes.plot(x, ends[0], "o", markersize=7, color=color, markerfacecolor="white", zorder=3)
            axes.plot(x, ends[1], "o", markersize=7, color=color, zorder=3)
            marks.append((name, color, x, ends))
        axes.plot([], [], "o", color="0.3", markerfacecolor="white", label="direct compression")
        axes.plot([], [], "o", color="0.3", label="LC")
        legend = axes.legend(loc="upper right", frameon=False)
        label(figure, axes, marks, floor, legend)
        for suffix, options in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
            path = stem.with_name(stem.name + suffix)
            temporary = stem.with_name(f"{stem.name}.{os.getpid()}{suffix}")
            figure.savefig(temporary, **options)
            os.replace(temporary, path)


def label(figure: Any, axes: Any, marks: list[Any], floor: float, legend: Any) -> None:
    """Each scheme's name beside one of its markers, in the first place where it covers nothing."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()
    figure.set_layout_engine("none")  # the places below are measured in this layout
    pixel = figure.dpi / 72
    taken = [legend.get_window_extent().padded(2 * pixel)]
    for _, _, x, ends in marks:
        points = axes.transData.transform([(x, min(ends)), (x, max(ends))])
        taken.append(Bbox(points).padded(7 * pixel))
    low, high = axes.get_xlim()
    line = axes.transData.transform([(low, floor), (high, floor)])
    taken.append(Bbox(line).padded(1.5 * pixel))
    frame = axes.get_window_extent()

    def place(text: str, color: str, spots: list[tuple[float, float, int, int]]) -> None:
        written = None
        for x, y, dx, dy in spots:
            if written is not None:
                written.remove()
            written = axes.annotate(
                text,
                (x, y),
                (9 * dx, 7 * dy),
                textcoords="offset points",
                color=color,
                ha={-1: "right", 0: "center", 1: "left"}[dx],
                va={-1: "top", 0: "center", 1: "bottom"}[dy],
            )
            box = written.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        if written is not None:
            taken.append(written.get_window_extent().padded(pixel))

    for name, color, x, ends in marks:
        around = ((1, 0), (-1, 0), (1, -1), (1, 1), (-1, 1), (-1, -1), (0, 1), (0, -1))
        place(name, color, [(x, y, dx, dy) for y in ends for dx, dy in around])
    text = f"reference, {floor:.2g} % at 32 bits"
    places = [high * (low / high) ** (i / 40) for i in range(41)]
    place(text, "0.3", [(x, floor, -1, dy) for dy in (-1, 1) for x in places])


def parse(argv: list[str]) -> Config:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = SMOKE if "--smoke" in argv else Config()
    for field in fields(Config):
        name, value = f"--{field.name.replace('_', '-')}", getattr(defaults, field.name)
        if isinstance(value, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=value)
        elif field.name == "gradient":
            parser.add_argument(name, choices=["weights", "sum", "both"], default=value)
        else:
            parser.add_argument(name, type=type(value), default=value)
    config = Config(**vars(parser.parse_args(argv)))
    if config.seeds < 1:
        raise SystemExit(f"--seeds {config.seeds}: at least 1.")
    return config


def main(argv: list[str]) -> None:
    config = parse(argv)
    if config.figure:
        check_matplotlib()
    torch.set_num_threads(1)  # the net is too small for more, and the numbers stay the same
    where = origin(__file__)  # of the code that runs, not of what the folder holds when it ends
    try:
        result = run(config)
    except KeyboardInterrupt:
        print("Interrupted: nothing was written.", file=sys.stderr)
        raise SystemExit(130) from None
    name = "digits" if config.gradient == Config.gradient else f"digits_{config.gradient}"
    name += ("_demo" if config.seeds == 1 else "") + ("_smoke" if config.smoke else "")
    stem = (Path(config.out) if config.out else RESULTS) / name
    kept = {key: x for key, x in asdict(config).items() if key not in ("out", "quiet", "figure")}
    given = [key for key, x in kept.items() if x != getattr(Config, key)]
    command = " ".join(["python experiments/digits.py", *(option(key, kept[key]) for key in given)])
    content = {"command": command, "config": kept, "result": result, **where}
    write(stem.with_name(f"{name}.json"), content)
    print(table(result))
    if config.figure:
        draw(result, stem)
    print(f"\n{stem}.json{', .png, .svg' if config.figure else ''}")


if __name__ == "__main__":
    main(sys.argv[1:])
