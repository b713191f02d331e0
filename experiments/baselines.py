"""What LC is compared with: straight-through binarization as it is usually written, and PARQ of
torchao, a living library. Both train every convolution and linear weight towards one bit.
"""

from __future__ import annotations

from typing import Any

import torch
from schemes import LAYERS
from torch import Tensor, nn
from torch.nn.utils import parametrize

_ANNEALED = 0.9  # share of the steps after which PARQ's weights are all binary


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return torch.where(w < 0, -1.0, 1.0) * w.abs().mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return grads[0] * (w.abs() <= 1)


class Binarized(nn.Module):
    """sign(w) · mean |w|; the gradient passes where |w| ≤ 1."""

    def forward(self, w: Tensor) -> Tensor:
        return _Sign.apply(w)


def weights(model: nn.Module) -> list[nn.Parameter]:
    """The trained weights of the layers, shared ones once; under `binarize` those behind what the
    layers see.
    """
    found = [
        m.parametrizations.weight.original if parametrize.is_parametrized(m, "weight") else m.weight
        for m in model.modules()
        if isinstance(m, LAYERS)
    ]
    return list({id(w): w for w in found}.values())


def binarize(model: nn.Module) -> None:
    """The layers' weights are seen through `Binarized` from here on."""
    for module in model.modules():
        if isinstance(module, LAYERS):
            parametrize.register_parametrization(module, "weight", Binarized())


def settle(model: nn.Module) -> None:
    """Plain weights again: what the layers saw last."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


def parq(model: nn.Module, base: torch.optim.Optimizer, steps: int) -> Any:
    """PARQ around `base`, whose first group holds `weights(model)`; least-squares binary values.

    Raises:
        SystemExit: torchao is not installed.
    """
    try:
        from torchao.prototype.parq import LSBQuantizer, ProxPARQ, QuantOptimizer
    except ImportError as cause:
        raise SystemExit(f"--method parq needs torchao: pip install torchao ({cause}).") from cause
    base.param_groups[0]["quant_bits"] = 1
    prox = ProxPARQ(anneal_start=0, anneal_end=max(1, int(_ANNEALED * steps)))
    return QuantOptimizer(base, LSBQuantizer(), prox, quant_period=1)
