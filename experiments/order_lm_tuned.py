"""Does the order of pruning and quantization matter in a language model after fine-tuning?

The 15 M-parameter model of TinyStories. Trained straight-through: forward and backward pass see the
compressed matrices, the step changes the weights behind them (pruned ones too), masks and codes
follow at every step. That is what `LC(gradient="sum")` does at μ = 0 with exact parts (a test
compares); a loop of its own, because s(q(w)), the order in question, is no projection. All arms see
the same windows of the training text in the same order per seed, with AdamW and a learning rate
that falls linearly; the matrices and norms of the blocks are trained, the embedding (also the head)
is not. The vocabulary is cut to the words that the two texts use, a tenth of all, which makes the
arms twice as fast: perplexities are over these, and not those of order_lm.json.

sparse arms   fine-tuned sparse in float32, then quantized in one shot, in both orders, from the
              same weights. Threshold EM(S) + EM(Q) − EM(dense), dense: as long, not pruned.
trained arms  fine-tuned with quantized activations and both q and s on the weights: Q→S as in the
              paper, and S→Q as the matched arm, which differs from it in the order alone.
The paper compares the trained Q→S with the sparse arm's S→Q. That gap is the sum of two: what the
way of training costs or gains (S→Q trained − S→Q in one shot) and what the order does (Q→S − S→Q,
both trained).

Run:      python experiments/order_lm_tuned.py --weights DIR --data DIR
          Stopped, it goes on where it was: each arm leaves a record in --records.
Results:  experiments/results/order_lm_tuned.json (losses of each seed and window, intervals over
          seeds), .png, .svg.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write
from order_figure import excesses
from order_grid import (
    FORMATS,
    ORDERS,
    PRUNERS,
    SETTINGS,
    Hook,
    Weights,
    compressed,
    copies,
    ordered,
    pruned,
    put,
    quantized,
    token_inputs,
)
from order_lm import (
    CONTEXT,
    Llama,
    losses,
    matrices,
    pretrained,
    tiny,
    windows,
)
from order_runs import parser_of, start
from tables import interval
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lc_compress import Format, Part, number_format
from lc_compress.interplay import orthogonality

TRAINED = ("MXFP4", "INT4")
TRAINED_PRUNERS = ("50%", "2:4")
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    train: int = field(default=48, metadata={"help": "windows of training text per arm"})
    batch: int = field(default=2, metadata={"help": "windows per step"})
    lr: float = field(default=1e-4, metadata={"help": "of AdamW at the start"})
    windows: int = field(default=4, metadata={"help": "of validation text, evenly spread"})
    seeds: int = 3


def training_windows(folder: Path) -> Tensor:
    tokens = torch.from_numpy(np.load(folder / "train_tokens.npz")["tokens"].astype(np.int64))
    return tokens.unfold(0, CONTEXT + 1, CONTEXT)


def narrowed(model: Llama, texts: list[Tensor]) -> tuple[Llama, list[Tensor]]:
    """The model with only the words that the texts use, and the texts in the new numbers."""
    used, numbers = torch.cat([x.flatten() for x in texts]).unique(return_inverse=True)
    result = copy.deepcopy(model)
    result.words = torch.nn.Embedding.from_pretrained(model.words.weight[used].detach())
    result.head.weight = result.words.weight
    pieces = numbers.split([x.numel() for x in texts])
    return result, [n.view(x.shape) for n, x in zip(pieces, texts, strict=True)]


# ------------------------------------------------------------------ arms


def fine_tuned(
    start: Llama,
    data: Tensor,
    change: Change,
    activations: Format[Any] | None,
    config: Config,
    seed: int,
) -> Llama:
    """A copy of the model, trained with change(w) in place of every matrix w. It holds w."""
    model = copy.deepcopy(start)
    model.words.weight.requires_grad_(False)
    layers = matrices(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    batches = order[: config.train].split(config.batch)
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    hooks = []
    if activations is not None:
        hook = straight_through(activations)
        hooks = [layer.register_forward_pre_hook(hook) for layer in layers.values()]
    for batch in batches:
        behind = copies(layers)
        for name, layer in layers.items():
            put(layer, change(behind[name]))
        logits = model(data[batch, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), data[batch, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, layer in layers.items():
            put(layer, behind[name])
        optimizer.step()
        schedule.step()
    for hook in hooks:
        hook.remove()
    return model.eval()


def straight_through(form: Format[Any]) -> Callable[..., tuple[Tensor]]:
    """Inputs quantized, one scale per token where scales are per row; gradients pass unchanged."""

    def hook(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0]
        codes = form.quantize(x.detach().flatten(0, -2)).view(x.shape)
        return (x + (codes - x.detach()),)

    return hook


def measured(model: Llama, data: Tensor, weights: Weights, hook: Hook | None) -> list[float]:
    with compressed(matrices(model), weights, hook):
        return losses(model, data)


def one_shot(model: Llama, data: Tensor, pruner: Part[Any] | None) -> dict[str, Any]:
    """Losses of the fine-tuned model by setting and format: Q of the dense one, both orders of a
    sparse one; and of the model itself.
    """
    w = copies(matrices(model))
    kept = {n: pruned(x, pruner) for n, x in w.items()} if pruner else w
    found: dict[str, Any] = {"itself": measured(model, data, kept, None)}
    for name in FORMATS:
        form = number_format(name)
        if pruner is None:
            arms = {"Q": {n: quantized(x, form) for n, x in w.items()}}
        else:
            arms = {o: {n: ordered(x, o, pruner, form) for n, x in w.items()} for o in ORDERS}
        for setting in SETTINGS:
            hook = None if setting == "weights" else token_inputs(form)
            found[f"{setting}/{name}"] = {
                arm: measured(model, data, weights, hook) for arm, weights in arms.items()
            }
    return found


@dataclass(frozen=True)
class Arm:
    """pruning None: dense.   format None: trained without quantization, then quantized at once."""

    seed: int
    pruning: str | None
    format: str | None = None
    order: str | None = None

    @property
    def name(self) -> str:
        parts = [self.pruning or "dense", self.format, self.order, f"seed{self.seed}"]
        text = "_".join(x for x in parts if x)
        return text.replace(":", "-").replace("%", "").replace("→", "-then-")

    def run(self, start: Llama, train: Tensor, data: Tensor, config: Config) -> dict[str, Any]:
        pruner = PRUNERS[self.pruning] if self.pruning else None
        if self.format is None:
            change: Change = lambda w: pruner.reconstruct(pruner.project(w)) if pruner else w  # noqa: E731
            model = fine_tuned(start, train, change, None, config, self.seed)
            return one_shot(model, data, pruner)
        form, order = number_format(self.format), self.order
        assert pruner is not None and order is not None
        both = lambda w: ordered(w, order, pruner, form)  # noqa: E731
        model = fine_tuned(start, train, both, form, config, self.seed)
        weights = {n: both(x.weight.detach()) for n, x in matrices(model).items()}
        return {"trained": measured(model, data, weights, token_inputs(form))}


def plan(config: Config) -> list[Arm]:
    """What matters first comes first: a whole seed of the sparse arms, then the trained ones."""
    seeds = range(config.seeds)
    sparse = [Arm(seed, pruning) for seed in seeds for pruning in (None, *PRUNERS)]
    trained = [
        Arm(seed, pruning, form, order)
        for pruning in TRAINED_PRUNERS
        for form in TRAINED
        for seed in seeds
        for order in ORDERS
    ]
    return sparse + trained


def records(
    start: Llama, train: Tensor, data: Tensor, config: Config, folder: Path, only: str, quiet: bool
) -> dict[Arm, dict[str, Any]]:
    """Those of all arms that were run; first runs the ones that are missing and match `only`."""
    found = {}
    for arm in tqdm(plan(config), disable=quiet, file=sys.stderr):
        path = folder / f"{arm.name}.json"
        if not path.is_file():
            if not fnmatchcase(arm.name, only):
                continue
            began = time.process_time()
            content = {"config": asdict(config), "losses": arm.run(start, train, data, config)}
            write(path, content | {"cpu_seconds": time.process_time() - began})
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["config"] != asdict(config):
            raise SystemExit(
                f"{path} was made with {content['config']}, asked for is {asdict(config)}: give "
                "another --records."
            )
        found[arm] = content
    return found


# ------------------------------------------------------------------ what they say


def values(
    found: dict[Arm, dict[str, Any]], arms: dict[str, tuple[Arm, tuple[str, ...]]], seeds: int
) -> tuple[dict[str, list[float]], dict[str, Any]] | None:
    """Losses of each arm, paired: one value per seed (mean over the windows) from three seeds on,
    otherwise one per window (mean over the seeds). Only seeds that have all arms.

    arms: of seed 0, with the place of the losses in their record.
    """
    complete = [
        seed
        for seed in range(seeds)
        if all(replace(arm, seed=seed) in found for arm, _ in arms.values())
    ]
    if not complete:
        return None
    series = {}
    for name, (arm, path) in arms.items():
        rows = []
        for seed in complete:
            losses_ = found[replace(arm, seed=seed)]["losses"]
            for key in path:
                losses_ = losses_[key]
            rows.append(losses_)
        series[name] = [float(x) for x in np.mean(rows, axis=1 if len(complete) >= 3 else 0)]
    over = "seeds" if len(complete) >= 3 else "windows"
    return series, {"seeds": len(complete), "values_over": over}


def cells(found: dict[Arm, dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """Threshold and excess of both orders, of what was run."""
    rows = []
    for setting in SETTINGS:
        for form in FORMATS:
            for pruning in PRUNERS:
                key, dense, sparse = f"{setting}/{form}", Arm(0, None), Arm(0, pruning)
                arms = {"dense": (dense, ("itself",)), "S": (sparse, ("itself",))}
                arms["Q"] = (dense, (key, "Q"))
                arms |= {order: (sparse, (key, order)) for order in ORDERS}
                got = values(found, arms, seeds)
                if got is None:
                    continue
                series, about = got
                result = orthogonality(
                    "perplexity",
                    dense=series["dense"],
                    parts={name: series[name] for name in ("S", "Q")},
                    combined={name: series[name] for name in ORDERS},
                    higher_is_better=False,
                    transform=np.exp,
                )
                rows.append(
                    {"setting": setting, "format": form, "pruning": pruning}
                    | about
                    | {"mean_losses": series, "orthogonality": result.dicts()}
                )
    return rows


def gaps(found: dict[Arm, dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """The published gap, split into the way of training and the order. In perplexity."""
    rows = []
    for pruning in TRAINED_PRUNERS:
        for form in TRAINED:
            arms = {"S→Q, one shot": (Arm(0, pruning), (f"{SETTINGS[1]}/{form}", "S→Q"))}
            for order in ORDERS:
                arms[f"{order}, trained"] = (Arm(0, pruning, form, order), ("trained",))
            got = values(found, arms, seeds)
            if got is None:
                continue
            series, about = got
            perplexity = {name: np.exp(x) for name, x in series.items()}
            shot, matched, paper = perplexity.values()
            rows.append(
                {"pruning": pruning, "format": form, "mean_losses": series}
                | about
                | {"perplexity": {name: float(x.mean()) for name, x in perplexity.items()}}
                | {"published_gap": spread(paper - shot), "order": spread(paper - matched)}
                | {"training": spread(matched - shot)}
            )
    return rows


def spread(values: Any) -> dict[str, Any]:
    """Mean of the values with its 95 % t interval."""
    mean, reach = interval([float(x) for x in values])
    noise = mean - reach <= 0 <= mean + reach
    return {"value": mean, "low": mean - reach, "high": mean + reach, "noise": noise}


def main(argv: list[str]) -> None:
    inputs = {"weights": ("data/stories15m", "DIR"), "data": ("data/tinystories", "DIR")}
    parser = parser_of(__doc__, inputs)
    parser.add_argument("--only", default="*", help="arms to run now, a glob: 50_*_seed0")
    this = start(__file__, parser, Config(), {"train": 4, "windows": 2, "seeds": 2}, argv)
    config, options, started = this.config, this.options, time.perf_counter()
    if options.smoke:
        generator = torch.Generator().manual_seed(0)
        model = tiny()
        train, data = (torch.randint(0, 64, (n, 17), generator=generator) for n in (8, 2))
    else:
        model, train = pretrained(options.weights), training_windows(options.data)
        data = windows(options.data)
        data = data[torch.linspace(0, len(data) - 1, config.windows).round().long()]
    words = model.words.num_embeddings
    model, (train, data) = narrowed(model, [train, data])
    folder = options.records or this.stem.with_suffix("")
    found = records(model, train, data, config, folder, options.only, options.quiet)
    rows, split = cells(found, config.seeds), gaps(found, config.seeds)
    excesses(rows, this.stem, "perplexity", 0.02)
    for row in split:
        print(row["pruning"], row["format"], row["published_gap"], row["order"], row["training"])
    result = {
        "cells": rows,
        "vocabulary": {"kept": model.words.num_embeddings, "of": words},
        "gaps": split,
        "records": {arm.name: content["losses"] for arm, content in found.items()},
        "wall_seconds": time.perf_counter() - started,
        "cpu_seconds": sum(content["cpu_seconds"] for content in found.values()),
    }
    this.write(result)


if __name__ == "__main__":
    main(sys.argv[1:])
