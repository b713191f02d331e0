"""One layer as dot products: its inputs as vectors beside the rows of its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..number_format import Format
from ..views import View

FOLLOWED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
_Conv = nn.Conv1d | nn.Conv2d


class Layer:
    """A layer with several versions of its weight.

    rows: each version as (outputs, inputs of one dot product), as `view` shows the weight. Input
        vectors are brought into the same order: scale blocks of weights and of activations then lie
        over each other.

    Raises:
        ValueError: the view of a convolution has not one row per output.
    """

    def __init__(
        self, name: str, module: nn.Module, view: View, rows: Mapping[str, Tensor]
    ) -> None:
        self.name, self.module, self.rows = name, module, rows
        self.groups, self.order = 1, None
        if isinstance(module, _Conv):
            self.groups, inner = module.groups, module.weight.shape[1:]
            index = torch.arange(inner.numel(), device=module.weight.device)
            shown = view.show(index.view(1, *inner))
            if shown.shape != (1, len(index)):
                raise ValueError(
                    f"order_report: {view} does not show {name!r}, shape "
                    f"{tuple(module.weight.shape)}, with one row per output, which dot products "
                    "need. Use Matrix(), or leave `data` out."
                )
            self.order = None if torch.equal(shown[0], index) else shown[0]

    def columns(self, x: Tensor) -> Tensor:
        """The input vectors, (positions, groups, inputs): of a convolution the patches."""
        module = self.module
        if not isinstance(module, _Conv):
            return x.reshape(-1, 1, x.shape[-1])
        axes = len(module.kernel_size)
        x = x.unsqueeze(0) if x.dim() == axes + 1 else x
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        window = [module.kernel_size, module.dilation, module.stride]
        if axes == 1:  # as a picture of one row
            x, window = x.unsqueeze(2), [(1, *size) for size in window]
        kernel, dilation, stride = window
        patches = F.unfold(x, kernel, dilation, 0, stride).transpose(1, 2)  # (n, places, in·kh·kw)
        columns = patches.reshape(-1, self.groups, patches.shape[2] // self.groups)
        return columns if self.order is None else columns[..., self.order]

    def product(self, columns: Tensor, rows: Tensor) -> Tensor:
        """Dot products (positions, outputs) of columns with rows (outputs, inputs)."""
        grouped = rows.reshape(self.groups, -1, rows.shape[-1])
        return torch.einsum("pgi,goi->pgo", columns, grouped).flatten(1)

    def output(
        self, x: Tensor, version: str, quantizer: Format[Any] | None, like: Tensor
    ) -> Tensor:
        """What the layer gives for input x with a version of its weight, in the shape of `like`;
        with a quantizer, of quantized activations.
        """
        module, rows = self.module, self.rows[version]
        if isinstance(module, nn.Embedding):
            return F.embedding(x, rows)
        columns = self.columns(x)
        columns = columns if quantizer is None else quantizer.quantize(columns)
        y = self.product(columns, rows.to(columns.dtype))
        y = y + module.bias if isinstance(module.bias, Tensor) else y
        if isinstance(module, _Conv):
            batch = like.shape[0] if like.dim() == len(module.kernel_size) + 2 else 1
            y = y.view(batch, -1, y.shape[1]).transpose(1, 2)
        return y.reshape(like.shape)
