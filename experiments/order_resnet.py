"""Does the order of pruning and quantization matter for the accuracy of ResNet20 on CIFAR-10?

Pruned and quantized are all convolutions but the first; weights as rows of one dot product each.
Two settings: weights only, and weights and activations, where each of these convolutions gets its
input quantized in the same format along the channels of each pixel. BatchNorm is re-estimated for
every compressed network on augmented training images; nothing is chosen on test images.

one shot      {2:4, 50 %, 75 %} × 7 formats: dense, S, Q, S→Q, Q→S, the threshold EM(S) + EM(Q) −
              EM(dense) and the excess over it, with 95 % t intervals over groups of test images,
              which all cells share.
fine-tuned    the same after a short sparse fine-tuning, `LC(gradient="sum")` at
              μ = 0, over seeds; dense: fine-tuned as long, not pruned. Both orders start from the
              weights behind the mask.

Run:      python experiments/order_resnet.py --data DIR --weights resnet20-12fca82f.th
          Stopped, it goes on where it was: each measurement goes into --records.
Results:  experiments/results/order_resnet.json, .png, .svg; order_resnet_tuned.png, .svg.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from data import normalized
from networks import network, reference
from order_figure import excesses
from order_grid import (
    FORMATS,
    PRUNERS,
    Hook,
    Records,
    Weights,
    cells,
    compressed,
    grid_size,
    one_shot,
    tuned,
    tuned_cells,
)
from order_runs import parser_of, start
from torch import Tensor, nn
from torch.nn import functional as F
from training import CALIBRATION, Images, batches, images

from lc_compress import LC, Format, Matrix, Sparse, recalibrate

METRICS = {"loss": "cross-entropy", "error": "test error, %"}


@dataclass(frozen=True)
class Config:
    images: int = field(default=1000, metadata={"help": "test images, the first ones"})
    group: int = field(default=50, metadata={"help": "test images per value for the intervals"})
    batch: int = field(default=128, metadata={"help": "training images per batch"})
    calibration: int = field(default=3, metadata={"help": "batches for BatchNorm"})
    steps: int = field(default=40, metadata={"help": "of sparse fine-tuning"})
    lr: float = field(default=0.01, metadata={"help": "at the start; falls linearly"})
    seeds: int = 3


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """All convolutions but the first."""
    found = [(n, x) for n, x in model.named_modules() if isinstance(x, nn.Conv2d)]
    return dict(found[1:])


def inputs(form: Format[Any]) -> Hook:
    """Blocks and rows of the format lie along the channels of a pixel."""

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].permute(0, 2, 3, 1)
        codes = form.quantize(x.flatten(0, -2)).view(x.shape)
        return (codes.permute(0, 3, 1, 2),)

    return hook


class Measured:
    """Test images and calibration batches, and what a network gives on them."""

    def __init__(self, model: nn.Module, data: Images, config: Config) -> None:
        self.model, self.config, self.layers = model, config, layers_of(model)
        self.test, self.labels = data.test[: config.images], data.test_labels[: config.images]
        drawn = batches(data, config.batch, 0, CALIBRATION, 0, config.calibration)
        self.calibration = [x for x, _ in drawn]

    @torch.no_grad()
    def __call__(self, weights: Weights, hook: Hook | None) -> dict[str, list[float]]:
        """Mean loss and error of each group of test images."""
        statistics = copy.deepcopy(self.model.state_dict())
        losses, errors = [], []
        with compressed(self.layers, weights, hook):
            recalibrate(self.model, self.calibration)
            self.model.eval()
            chunks = zip(self.test.split(500), self.labels.split(500), strict=True)
            for x, y in chunks:
                logits = self.model(normalized(x))
                losses.append(F.cross_entropy(logits, y, reduction="none"))
                errors.append(100.0 * (logits.argmax(1) != y))
        self.model.load_state_dict(statistics)
        means = (
            torch.cat(x).view(-1, self.config.group).mean(1).tolist() for x in (losses, errors)
        )
        return dict(zip(METRICS, means, strict=True))


def fine_tuned(
    start: nn.Module, data: Images, pruning: str | None, config: Config, seed: int
) -> nn.Module:
    """A copy, trained sparse with the library's straight-through controller. It holds w."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=config.steps)
    part = (PRUNERS[pruning] if pruning else Sparse(density=1.0)).over(Matrix())
    names = {f"{name}.weight": part for name in layers_of(model)}
    lc = LC(model, names, schedule=[0.0], optimizer=optimizer, gradient="sum")
    model.train()
    for _ in lc.steps(progress=False):
        for x, y in batches(data, config.batch, seed, 0, 0, config.steps):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    lc.release()
    return model.eval()


def main(argv: list[str]) -> None:
    inputs_ = {"data": ("data", "DIR"), "weights": ("resnet20-12fca82f.th", "FILE")}
    parser = parser_of(__doc__, inputs_)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--tuned", action=argparse.BooleanOptionalAction, default=True)
    small = {"images": 16, "group": 4, "batch": 8, "calibration": 1, "steps": 1, "seeds": 2}
    this = start(__file__, parser, Config(), small, argv)
    config, options = this.config, this.options
    if options.smoke:
        torch.manual_seed(0)
    model = network("resnet8") if options.smoke else reference("resnet20", options.weights)
    model = model.eval()
    data = images(options.data, torch.device("cpu"), options.smoke)
    formats = FORMATS[-1:] if options.smoke else options.formats
    records = Records(this, grid_size(formats, config.seeds))
    measure = Measured(model, data, config)
    one_shot(measure.layers, measure, inputs, records, formats=formats)

    def train(pruning: str | None, seed: int) -> tuple[dict[str, nn.Module], Measured]:
        found = Measured(fine_tuned(model, data, pruning, config, seed), data, config)
        return found.layers, found

    if options.tuned:
        tuned(train, inputs, records, config.seeds, formats)
    found = records.found
    result: dict[str, Any] = {"one_shot": {}, "tuned": {}}
    for metric, name in METRICS.items():
        result["one_shot"][metric] = cells(found, metric, name, False)
        result["tuned"][metric] = tuned_cells(found, metric, name, False, config.seeds, formats)
    excesses(result["one_shot"]["loss"], this.stem, "cross-entropy", 0.01)
    stem = this.stem.with_name(f"{this.stem.name}_tuned")
    excesses(result["tuned"]["loss"], stem, "cross-entropy", 0.01)
    result["records"] = found
    result["wall_seconds"] = records.seconds
    this.write(result)


if __name__ == "__main__":
    main(sys.argv[1:])
