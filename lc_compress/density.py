"""Performance density: a metric per Mbit of weights and activations, as the paper counts them and
as they are stored.

Both reward a collapse of the metric, if it is small enough: print them beside it
(papers/joint-weights-activations.md, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .evaluating import watched
from .metrics import Report
from .scheduled import ActivationPruner, ActivationQuantizer
from .scheduled.watching import Activation
from .selection import unwrap


@dataclass(frozen=True)
class Amount:
    """So many numbers of so many bits, a share of which is zero and not counted."""

    count: int
    bits: float = 32
    sparsity: float = 0.0

    @property
    def megabits(self) -> float:
        return self.count * self.bits * (1 - self.sparsity) / 1e6


def performance_density(metric: float, weights: Amount, features: Amount) -> float:
    """metric / (#W b_w (1 − s_w) + #F b_f (1 − s_f)), per Mbit: the paper's formula.

    Masks, positions and scales are not counted, nor what stays in float32.

    >>> round(performance_density(92.6, Amount(2296922), Amount(6899732)), 8)
    0.31465248
    """
    return metric / (weights.megabits + features.megabits)


def stored_density(metric: float, report: Report, features: Features) -> float:
    """metric / (bits of the whole model + bits of the activations of one example), per Mbit, with
    everything that is stored: positions, masks, scales, and what is not compressed.

    Args:
        report: of `Scheduled` or `LC`.
        features: from `count_features`.
    """
    return metric / ((report.total.bits + features.bits) / 1e6)


@dataclass(frozen=True)
class Features:
    """Activations of one example. count: outputs of all layers; bits: of what is stored of them,
    with masks and scales.
    """

    count: int
    bits: int


@dataclass
class _Output:
    """Of one layer: numbers, those not pruned, bits of each, masks and scales."""

    count: int
    kept: int
    width: float = 32
    extra: float = 0

    def through(self, module: Activation, shape: torch.Size) -> None:
        if isinstance(module, ActivationPruner):
            if module.kind == "dynamic":
                self.kept -= round(float(module.share) * self.count)
                self.extra += self.count
            else:
                self.kept = round(self.kept * float(module.mask.double().mean()))
                self.extra += module.mask.numel()
        elif isinstance(module, ActivationQuantizer) and bool(module.active):
            part: Any = module.part
            stored = part.bits_per_element(torch.Size((1, *shape[1:]))) * self.count
            if module.frozen:
                self.width = part.width
                self.extra += stored - self.width * self.count
            else:  # blocks hold their zeros
                self.width, self.kept = stored / self.count, self.count

    @property
    def bits(self) -> int:
        return round(self.kept * self.width + self.extra)


def count_features(model: nn.Module, example_inputs: Any) -> Features:
    """Count the outputs of all layers without children, for one of the examples; what inserted
    modules leave of an output takes its place.

    Static masks and scales count once per model in fact; here they count with the example. Dynamic
    masks cost a bit per activation.

    Args:
        example_inputs: a batch, or a tuple of arguments.
    """
    outputs: list[_Output] = []
    places: dict[int, _Output] = {}
    alive: list[Any] = []  # no tensor dies, so no id comes twice

    def layer(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            count = out.numel() // out.shape[0]
            places[id(out)] = _Output(count, count)
            outputs.append(places[id(out)])
            alive.append(out)

    def inserted(module: nn.Module, args: Any, out: Tensor) -> None:
        assert isinstance(module, Activation)
        if (own := places.get(id(args[0]))) is not None:
            own.through(module, out.shape)
            places[id(out)] = own
            alive.append(out)

    inner = unwrap(model)
    handles = []
    for name, module in inner.named_modules():
        if isinstance(module, Activation):
            handles.append(module.register_forward_hook(inserted))
        elif "inserted_" not in name and all("inserted_" in n for n in module._modules):
            handles.append(module.register_forward_hook(layer, prepend=True))
    watched(inner, example_inputs, handles)
    return Features(sum(x.count for x in outputs), sum(x.bits for x in outputs))
