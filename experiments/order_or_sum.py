"""At equal bytes: prune, then quantize (`Sparse.then(Int)`), or a sum (`Int + Sparse`)?

ResNet20 on CIFAR-10 (all convolutions but the first) and the language model of TinyStories (the
matrices of the blocks). Bits are counted from what is stored, positions included, scales and exact
values in 16 bits.

one shot    For a number of bits per weight and a width of the integers, the density that fits; both
            families, every width that has room. Error of the weights, and loss on the test data.
selection   One density, magnitudes or gains (the C step): error and loss, at few bits.
learned     The language model, LC with the gradient at Δ(θ): in each family the width with the
            least one-shot error of the weights, at the smallest size, over seeds.

Run:      python experiments/order_or_sum.py --data DIR --weights resnet20-12fca82f.th --lm DIR
          --text DIR      --data: CIFAR-10; --lm: stories15M_fp16.npz; --text: tokens.
          Stopped, it goes on where it was: each measurement goes into --records.
Results:  experiments/results/order_or_sum.json
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import order_lm
import order_lm_tuned
import order_resnet
import torch
from networks import network, reference
from order_grid import Records, Weights, compressed, copies
from order_runs import parser_of, start
from torch import Tensor, nn
from torch.nn import functional as F
from training import images

from lc_compress import HBFP, LC, MX, Binary, Format, Int, Matrix, Part, Sparse

HALF = torch.float16
WIDTHS = {"then": (2, 3, 4, 6), "sum": (1, 2, 3)}
SELECTED: dict[str, Format[Any]] = {
    "INT4": Int(4, axis=0, scale="max"),
    "INT3": Int(3, axis=0, scale="max"),
    "MXFP4": MX("e2m1"),
    "HBFP4": HBFP(4),
}
DENSITIES = (0.5, 0.25, 0.1)
VIEW = Matrix()
NETS = ("ResNet20", "stories15M")
STEPS = (*NETS, *(f"selection, {name}" for name in NETS), "learned")


@dataclass(frozen=True)
class Config:
    images: int = field(default=1000, metadata={"help": "test images, the first ones"})
    windows: int = field(default=8, metadata={"help": "of validation text"})
    train: int = field(default=384, metadata={"help": "windows of training text, learned"})
    batch: int = field(default=2, metadata={"help": "windows per step"})
    every: int = field(default=12, metadata={"help": "optimizer steps between C steps"})
    lr: float = 1e-4
    seeds: int = 3


# ------------------------------------------------------------------ parts of a given size


def integers(width: int) -> Part[Any]:
    if width == 1:
        return Binary(axis=0, value_dtype=HALF)
    # wider ones hardly gain by the search for the best scale
    return Int(width, axis=0, scale="best" if width <= 3 else "max", value_dtype=HALF)


def made(family: str, width: int, density: float) -> Part[Any]:
    if family == "then":
        return Sparse(density=density).then(integers(width))
    return integers(width) + Sparse(density=density, value_dtype=HALF)


def positions(density: float, weights: list[Tensor]) -> float:
    """Bits per weight for where the largest ones are, as they are stored."""
    part = Sparse(density=density, value_dtype=HALF)
    states = [part.project(w) for w in weights]
    bits = sum(part.bits(x) - 16 * x.values.numel() for x in states)
    return bits / sum(w.numel() for w in weights)


def fitting(family: str, width: int, bits: float, weights: list[Tensor]) -> float | None:
    """The density at which the part takes so many bits per weight; None without room for 0.1 %."""
    scales = 16 * sum(w.shape[0] for w in weights) / sum(w.numel() for w in weights)

    def size(density: float) -> float:
        each, fixed = (width, 0) if family == "then" else (16, width)
        return fixed + density * each + positions(density, weights) + scales

    low, high = 0.001, 0.5 if family == "sum" else 0.95
    if size(low) > bits or size(high) < bits:
        return None
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) < bits else (low, middle)
    return low


# ------------------------------------------------------------------ networks


class Network:
    """The layers that are compressed, and the loss on test data with given weights."""

    def __init__(
        self, layers: dict[str, nn.Module], measure: Callable[[Weights], dict[str, Any]]
    ) -> None:
        self.layers, self.measure = layers, measure
        self.weights = copies(layers)
        self.shown = {name: VIEW.show(w) for name, w in self.weights.items()}

    def direct(self, make: Callable[[Tensor], tuple[Tensor, int]]) -> dict[str, Any]:
        """Each weight replaced by what `make` gives, with its bits; bits per weight, relative
        error, and the measures.
        """
        bits, error, norm, weights = 0, 0.0, 0.0, {}
        for name, w in self.shown.items():
            delta, size = make(w)
            bits += size
            error += float((w - delta).double().square().sum())
            norm += float(w.double().square().sum())
            weights[name] = VIEW.restore(delta, self.weights[name].shape)
        count = sum(w.numel() for w in self.shown.values())
        found: dict[str, Any] = {"bits": bits / count, "error": math.sqrt(error / norm)}
        return found | self.measure(weights)


def projected(part: Part[Any]) -> Callable[[Tensor], tuple[Tensor, int]]:
    def make(w: Tensor) -> tuple[Tensor, int]:
        state = part.project(w)
        return part.reconstruct(state), part.bits(state)

    return make


def by_magnitude(density: float, form: Format[Any]) -> Callable[[Tensor], tuple[Tensor, int]]:
    """q(s(w)) with the largest |w|; bits as those of the gains, whose support is as large."""
    pruner = Sparse(density=density)

    def make(w: Tensor) -> tuple[Tensor, int]:
        return form.quantize(pruner.reconstruct(pruner.project(w))), 0

    return make


def resnet(options: argparse.Namespace, config: Config) -> Network:
    torch.manual_seed(0)
    model = network("resnet8") if options.smoke else reference("resnet20", options.weights)
    data = images(options.data, torch.device("cpu"), options.smoke)
    small = {"group": 4, "batch": 8, "calibration": 1} if options.smoke else {}
    setup = order_resnet.Config(**({"images": config.images, "group": 50} | small))
    measured = order_resnet.Measured(model.eval(), data, setup)

    def measure(weights: Weights) -> dict[str, Any]:
        found = measured(weights, None)
        loss, error = (float(np.mean(found[name])) for name in ("loss", "error"))
        return {"loss": loss, "losses": found["loss"], "test_error": error}

    return Network(measured.layers, measure)


class Text:
    """The language model cut to the words of its texts, training and test windows."""

    def __init__(self, options: argparse.Namespace, config: Config) -> None:
        if options.smoke:
            generator = torch.Generator().manual_seed(0)
            self.model = order_lm.tiny()
            self.train, self.test = (
                torch.randint(0, 64, (n, 17), generator=generator) for n in (8, 2)
            )
            return
        model = order_lm.pretrained(options.lm)
        train, test = order_lm_tuned.training_windows(options.text), order_lm.windows(options.text)
        test = test[torch.linspace(0, len(test) - 1, config.windows).round().long()]
        self.model, (self.train, self.test) = order_lm_tuned.narrowed(model, [train, test])

    def network(self) -> Network:
        layers: dict[str, nn.Module] = dict(order_lm.matrices(self.model))

        def measure(weights: Weights) -> dict[str, Any]:
            with compressed(layers, weights, None):
                losses = order_lm.losses(self.model, self.test)
            loss = float(np.mean(losses))
            return {"loss": loss, "losses": losses, "perplexity": math.exp(loss)}

        return Network(layers, measure)


# ------------------------------------------------------------------ the three comparisons


def one_shot(
    name: str, net: Network, sizes: tuple[float, ...], records: Records, now: bool
) -> list[dict[str, Any]]:
    rows = []
    weights = list(net.shown.values())
    for bits in sizes:
        for family, widths in WIDTHS.items():
            for width in widths:
                density = fitting(family, width, bits, weights)
                if density is None:
                    continue
                part = made(family, width, density)
                key = f"{name}/{bits}/{family}/{width}"
                found = records.get(key, lambda part=part: net.direct(projected(part)), now)
                if found is None:
                    continue
                plan = {"network": name, "target": bits, "family": family, "width": width}
                rows.append(plan | {"density": density} | found)
    return rows


def selection(name: str, net: Network, records: Records, now: bool) -> list[dict[str, Any]]:
    rows = []
    for form, number in SELECTED.items():
        for density in DENSITIES:
            ways = {
                "magnitude": by_magnitude(density, number),
                "gain": projected(Sparse(density=density).then(number)),
            }
            for way, make in ways.items():
                key = f"{name}/selection/{form}/{density}/{way}"
                found = records.get(key, lambda make=make: net.direct(make), now)
                if found is None:
                    continue
                plan = {"network": name, "format": form, "density": density, "way": way}
                rows.append(plan | found)
    return rows


def learned(text: Text, part: Part[Any], config: Config, seed: int) -> dict[str, float]:
    model = copy.deepcopy(text.model)
    model.words.weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(seed))
    batches = order[: config.train].split(config.batch)
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    tasks = {f"layers.{name}.weight": part for name in order_lm.matrices(model)}
    lc = LC(model, tasks, schedule=[0.0], optimizer=optimizer, gradient="sum", every=config.every)
    for _ in lc.steps(progress=False):
        for batch in batches:
            logits = model(text.train[batch, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), text.train[batch, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    lc.finalize(calibration=None)
    count = sum(task.size for task in lc.tasks)
    bits = sum(task.part.bits(task.state) for task in lc.tasks) / count
    loss = float(np.mean(order_lm.losses(model.eval(), text.test)))
    return {"bits": bits, "loss": loss, "perplexity": math.exp(loss)}


def learning(
    text: Text, rows: list[dict[str, Any]], config: Config, records: Records, now: bool
) -> list[dict[str, Any]]:
    if not rows:
        return []
    target = min(row["target"] for row in rows)
    found = []
    for family in WIDTHS:
        own = [r for r in rows if (r["target"], r["family"]) == (target, family)]
        best = min(own, key=lambda r: r["error"])
        part = made(family, best["width"], best["density"])
        for seed in range(config.seeds):
            key = f"learned/{target}/{family}/{best['width']}/seed{seed}"
            run = records.get(
                key, lambda part=part, seed=seed: learned(text, part, config, seed), now
            )
            if run is None:
                continue
            plan = {"target": target, "family": family, "width": best["width"], "seed": seed}
            found.append(plan | {"density": best["density"], "direct": best["perplexity"]} | run)
    return found


def main(argv: list[str]) -> None:
    inputs = {"data": ("data", "DIR"), "weights": ("resnet20-12fca82f.th", "FILE")}
    inputs |= {"lm": ("data/stories15m", "DIR"), "text": ("data/tinystories", "DIR")}
    parser = parser_of(__doc__, inputs)
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, help="to measure now")
    small = {"images": 8, "windows": 2, "train": 4, "every": 1, "seeds": 2}
    this = start(__file__, parser, Config(), small, argv)
    config, options = this.config, this.options
    records = Records(this, 0)
    text = Text(options, config)
    nets = dict(zip(NETS, (resnet(options, config), text.network()), strict=True))
    sizes = {"ResNet20": (1.5, 2.0, 3.0, 4.0), "stories15M": (2.0, 3.0)}
    if options.smoke:  # the scales of tiny layers weigh more
        sizes = {name: (3.5,) for name in nets}
    result: dict[str, Any] = {"one_shot": [], "selection": []}
    for name, net in nets.items():
        dense = records.get(f"{name}/dense", lambda net=net: net.measure(net.weights))
        result[f"dense, {name}"] = dense
        result["one_shot"] += one_shot(name, net, sizes[name], records, name in options.steps)
    rows = [row for row in result["one_shot"] if row["network"] == "stories15M"]
    result["learned"] = learning(text, rows, config, records, "learned" in options.steps)
    for name, net in nets.items():
        now = f"selection, {name}" in options.steps
        result["selection"] += selection(name, net, records, now)
    result["wall_seconds"] = records.seconds
    this.write(result)


if __name__ == "__main__":
    main(sys.argv[1:])
