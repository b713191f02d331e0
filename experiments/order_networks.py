"""What the order of pruning and quantization does to weights of trained networks, layer by layer.

`order_report` on every compressed layer (not the first convolution, the last linear layer and the
embedding) of ResNet20, ResNet56 and the 15 M-parameter language model: 7 formats × {2:4, 50 %,
75 %}. Per layer and in total: L2 error of Q→S over that of S→Q, share of the survivors that the
orders do not have in common, and L1 error of Q→S over its upper bound. Convolution weights are seen
as (out, in·kh·kw); 50 and 75 % are one budget per layer.

Run:      python experiments/order_networks.py --weights DIR
          DIR: the folder of resnet_cifar10/resnet{20,56}-*.th and stories15m/*.npz, or of one.
Results:  experiments/results/order_networks.json, with command, hardware and wall time; .png, .svg.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import origin, write
from networks import network, reference
from order_grid import FORMATS, PRUNERS
from order_lm import RESULTS, pretrained, tiny
from torch import nn
from tqdm import tqdm

from lc_compress import number_format
from lc_compress.interplay import order_report


def networks(folder: Path, smoke: bool) -> dict[str, nn.Module]:
    """Those whose files are there."""
    if smoke:
        torch.manual_seed(0)
        return {"ResNet8, random": network("resnet8"), "language model, random": tiny()}
    found: dict[str, nn.Module] = {}
    for depth in (20, 56):
        for path in (folder / "resnet_cifar10").glob(f"resnet{depth}-*.th"):
            found[f"ResNet{depth}"] = reference(f"resnet{depth}", str(path))
    if (folder / "stories15m").is_dir():
        found["stories15M"] = pretrained(folder / "stories15m")
    if not found:
        raise SystemExit(
            f"{folder} holds neither resnet_cifar10/resnet20-*.th nor stories15m: give --weights "
            "the folder of the pretrained networks."
        )
    return found


def run(models: dict[str, nn.Module], quiet: bool) -> list[dict[str, Any]]:
    plans = [(net, form, s) for net in models for form in FORMATS for s in PRUNERS]
    rows = []
    for net, form, pruning in tqdm(plans, disable=quiet, file=sys.stderr):
        started = time.process_time()
        report = order_report(models[net], PRUNERS[pruning], number_format(form))
        layers, total = [x.weights for x in report.layers], report.total.weights
        rows.append(
            {
                "network": net,
                "format": form,
                "pruning": pruning,
                "layers": len(layers),
                "nesting_layers": sum(x.nests for x in layers),
                "ratio": total.l2.ratio,
                "swapped": total.swapped,
                "tied": total.tied,
                "tightness": total.tightness,
                "relative_errors": {
                    name: getattr(total.l2, name) / total.norm for name in ("s", "q", "sq", "qs")
                },
                "pythagoras": total.pythagoras,
                "layers_where_sq_is_worse": sum(x.l2.ratio < 1 for x in layers),
                "layers_above_triangle": {
                    norm: sum(getattr(x, norm).qs > getattr(x, norm).triangle for x in layers)
                    for norm in ("l1", "l2", "linf")
                },
                "layer_ratio": {x.name: round(x.l2.ratio, 6) for x in layers},
                "layer_swapped": [round(x.swapped, 6) for x in layers],
                "layer_tightness": [round(x.tightness, 6) for x in layers],
                "cpu_seconds": time.process_time() - started,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = ["network", "format", "pruning", "nests", "Q→S/S→Q", "least", "most", "S→Q worse"]
    lines = [[*head, "swapped", "tied", "L1/bound", "s"]]
    for x in rows:
        ratios = list(x["layer_ratio"].values())
        lines.append(
            [x["network"], x["format"], x["pruning"], f"{x['nesting_layers']}/{x['layers']}"]
            + [f"{value:.4f}" for value in (x["ratio"], min(ratios), max(ratios))]
            + [str(x["layers_where_sq_is_worse"]), f"{x['swapped']:.2%}", f"{x['tied']:.2%}"]
            + [f"{x['tightness']:.3f}", f"{x['cpu_seconds']:.1f}"]
        )
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(size) if i < 3 else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(line, sizes, strict=True))
        )
        for line in lines
    )


def draw(rows: list[dict[str, Any]], stem: Path) -> None:
    """For each pruning, over the formats: what Q→S costs in each layer, and in total."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    nets = list(dict.fromkeys(x["network"] for x in rows))
    style = dict(zip(nets, (("o", "#0072B2"), ("s", "#D55E00"), ("^", "#009E73")), strict=False))
    options: Any = {"svg.hashsalt": "order", "svg.fonttype": "path", "font.size": 10}
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(11, 4.2), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(1, len(PRUNERS), sharey=True)
        for axes, pruning in zip(grid, PRUNERS, strict=True):
            for k, net in enumerate(nets):
                marker, color = style[net]
                for i, form in enumerate(FORMATS):
                    (x,) = [
                        x
                        for x in rows
                        if (x["network"], x["format"], x["pruning"]) == (net, form, pruning)
                    ]
                    costs = [100 * (ratio - 1) for ratio in x["layer_ratio"].values()]
                    at = i + 0.26 * (k - (len(nets) - 1) / 2)
                    axes.plot([at] * len(costs), costs, "_", color=color, alpha=0.35, markersize=7)
                    named = {"label": net} if i == 0 else {}
                    axes.plot(
                        at,
                        100 * (x["ratio"] - 1),
                        marker,
                        color=color,
                        markeredgecolor="white",
                        markersize=8,
                        linestyle="none",
                        **named,
                    )
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_yticks([-1, -0.1, 0, 0.1, 1, 10], ["−1", "−0.1", "0", "0.1", "1", "10"])
            axes.set_title(pruning, fontsize=10)
            axes.set_xticks(range(len(FORMATS)), FORMATS, rotation=60)
            axes.grid(axis="y", color="0.9", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        grid[0].set_ylabel("L2 error of Q→S over S→Q,\n% more (below 0: Q→S is better)")
        handles, labels = grid[0].get_legend_handles_labels()
        title = "marker: all layers together; dashes: each layer"
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3, frameon=False, title=title
        )
        for suffix, more in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
            temporary = stem.with_name(f"{stem.name}.{os.getpid()}{suffix}")
            figure.savefig(temporary, **more)
            os.replace(temporary, stem.with_name(stem.name + suffix))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=Path("data"))
    parser.add_argument("--smoke", action="store_true", help="two tiny random models, in seconds")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    source, started = origin(__file__), time.perf_counter()
    rows = run(networks(options.weights, options.smoke), options.quiet)
    print(table(rows))
    stem = (options.out or RESULTS) / f"order_networks{'_smoke' if options.smoke else ''}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, stem)
    result: dict[str, Any] = {"rows": rows, "wall_seconds": time.perf_counter() - started}
    result["cpu_seconds"] = time.process_time()  # of one core, however busy the machine is
    smoke = " --smoke" if options.smoke else ""
    command = f"python experiments/order_networks.py --weights DIR{smoke}"
    content = {"command": command, "config": {"smoke": options.smoke}, "result": result, **source}
    write(stem.with_suffix(".json"), content)


if __name__ == "__main__":
    main(sys.argv[1:])
