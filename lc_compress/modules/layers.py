"""Linear layers, convolutions and embeddings that compute from a packed weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inserted import carry
from .term import TILE
from .weight import Dense, PackedWeight


class PackedModule(nn.Module):
    """A module whose weight is packed; see `PackedWeight` for when it is unpacked.

    `weight` unpacks Δ(θ) at each access (unless it is there already): for code that looks at it.
    Inputs have the weight's dtype, as for the plain module, or are cast by autocast.
    """

    plain: ClassVar[type[nn.Module]]
    kept: ClassVar[tuple[str, ...]]  # attributes that are those of the plain module
    packed: PackedWeight

    def __init__(self, module: nn.Module, packed: PackedWeight) -> None:
        super().__init__()
        self.packed = packed
        for name in self.kept:
            setattr(self, name, getattr(module, name))
        if hasattr(module, "bias"):
            self.register_parameter("bias", module.bias)  # type: ignore[arg-type]
        carry(module, self)
        self.train(module.training)

    @classmethod
    def products(cls, module: nn.Module) -> frozenset[str]:
        """Which products the module can do without the dense weight."""
        return frozenset()

    @property
    def weight(self) -> Tensor:
        ready = self.packed.ready
        return ready.weight if isinstance(ready, Dense) else self.packed.dense()

    def to_dense(self) -> nn.Module:
        """The plain module with the weight Δ(θ), on the same device."""
        return self.with_weight(nn.Parameter(self.packed.dense()))

    def with_weight(self, weight: nn.Parameter) -> nn.Module:
        """The plain module with this weight, and a copy of the bias."""
        dense = self.plain.__new__(self.plain)
        nn.Module.__init__(dense)
        for name in self.kept:
            setattr(dense, name, getattr(self, name))
        dense.register_parameter("weight", weight)
        if "bias" in self._parameters:
            bias = self._parameters["bias"]
            if bias is not None:
                bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
            dense.register_parameter("bias", bias)
        carry(self, dense)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return self.plain.extra_repr(self)  # it has what that reads

    def _recorded(self, x: Tensor) -> bool:
        """Whether autograd keeps what a forward reads."""
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(p.requires_grad for p in self.parameters(recurse=False))

    def _cast(self, x: Tensor) -> Tensor:
        """`x` in the dtype to compute in."""
        kind, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            return x.to(torch.get_autocast_dtype(kind))
        own = self.packed.like.dtype
        if dtype != own:
            raise TypeError(
                f"{type(self).__name__}: the weight is {own}, the input {dtype}. Cast one of them."
            )
        return x


class Linear(PackedModule):
    """x Δᵀ + b, as `nn.Linear`."""

    plain = nn.Linear
    kept = ("in_features", "out_features")
    bias: nn.Parameter | None

    @classmethod
    def products(cls, module: nn.Module) -> frozenset[str]:
        return frozenset({"factors", "sparse"})

    def forward(self, x: Tensor) -> Tensor:
        form = self.packed.form()
        if isinstance(form, Dense):
            return F.linear(x, form.weight, self.bias)
        x = self._cast(x)
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if form is not None:
            return form.linear(x, bias)
        pairs, others = self.packed.split()
        total = None
        if others:
            rows = self.packed.reader(others, x.dtype, self._recorded(x))
            total = torch.cat(
                [
                    F.linear(x, rows(a, b), None if bias is None else bias[a:b])
                    for a, b in self.packed.blocks()
                ],
                -1,
            )
            bias = None
        for pair in pairs:
            y = _low_rank(x, pair.floats("left"), pair.floats("right"), bias)
            total, bias = y if total is None else total + y, None
        assert total is not None
        return total


def _low_rank(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """x (U V)ᵀ + b."""
    return _in_pieces(_in_pieces(x, right, None), left, bias)


def _in_pieces(x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b for a W of any floating-point type: cast a tile at a time."""
    if stored.dtype == x.dtype:
        return F.linear(x, stored, bias)
    if stored.numel() <= TILE:
        return F.linear(x, stored.to(x.dtype), bias)
    rows = max(1, TILE // stored.shape[1])
    return torch.cat(
        [
            F.linear(x, piece.to(x.dtype), None if bias is None else bias[a : a + rows])
            for a, piece in zip(range(0, stored.shape[0], rows), stored.split(rows), strict=True)
        ],
        -1,
    )


class Embedding(PackedModule):
    """Rows of Δ, as `nn.Embedding` without `max_norm`, `scale_grad_by_freq` and `sparse`, which act
    on the training of the weight.
    """

    plain = nn.Embedding
    kept = (
        *("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"),
        *("scale_grad_by_freq", "sparse"),
    )
    padding_idx: int | None
    num_embeddings: int

    def forward(self, indices: Tensor) -> Tensor:
        form = self.packed.form()
        if isinstance(form, Dense):
            return F.embedding(indices, form.weight, self.padding_idx)
        # as a dense one; in a graph, where values are not looked at, such indices give 0
        if not torch.compiler.is_compiling() and indices.is_cpu and indices.numel():
            low, high = (int(x) for x in indices.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(
                    f"Embedding of {self.num_embeddings} rows got indices from {low} to {high}."
                )
        dtype = self.packed.dtype
        rows = self.packed.reader(self.packed._terms(), dtype)
        total = None
        for a, b in self.packed.blocks():
            found = F.embedding((indices - a).clamp(0, b - a - 1), rows(a, b))
            inside = ((indices >= a) & (indices < b))[..., None]
            total = found * inside if total is None else torch.where(inside, found, total)
        assert total is not None
        return total


class _Conv(PackedModule):
    kept = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
        *("transposed", "output_padding", "groups", "padding_mode"),
        "_reversed_padding_repeated_twice",
    )
    axes: ClassVar[int]
    bias: nn.Parameter | None
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...] | str
    padding_mode: str
    groups: int

    @classmethod
    def products(cls, module: nn.Module) -> frozenset[str]:
        return frozenset({"factors"} if module.groups == 1 else ())

    def _conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int = 1,
    ) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        form = self.packed.form()
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)  # type: ignore[arg-type]
            padding = (0,) * self.axes
        geometry = (self.stride, padding, self.dilation)
        if isinstance(form, Dense):
            return self._conv(x, form.weight, self.bias, *geometry, self.groups)
        x = self._cast(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        total = None
        if form is not None:
            pairs = [(*pair, kernel) for pair, kernel in zip(form.pairs, form.kernels, strict=True)]
        else:
            factors, others = self.packed.split()
            pairs = [(f.floats("left"), f.floats("right"), f.split_kernel) for f in factors]
            if others:
                rows = self.packed.reader(others, x.dtype, self._recorded(x))
                pieces = [
                    self._rows(x, rows(a, b), bias, a, b, geometry)
                    for a, b in self.packed.blocks(self.groups)
                ]
                total, bias = torch.cat(pieces, -1 - self.axes), None
        for left, right, kernel in pairs:
            y = self._factored(x, left, right, kernel, bias, geometry)
            total, bias = y if total is None else total + y, None
        assert total is not None
        return total

    def _rows(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, a: int, b: int, geometry: Any
    ) -> Tensor:
        """Output channels a to b: some whole groups, or a part of one."""
        per_group = self.packed.shape[0] // self.groups
        first, last = a // per_group, -(-b // per_group)
        width = self.packed.shape[1]
        x = x.narrow(-1 - self.axes, first * width, (last - first) * width)
        own = None if bias is None else bias[a:b]
        stride, padding, dilation = geometry
        return self._conv(x, weight, own, stride, padding, dilation, last - first)

    def _factored(
        self,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        kernel: bool,
        bias: Tensor | None,
        geometry: Any,
    ) -> Tensor:
        """Two convolutions: `rank` filters and then 1×1; or kernels 1×width and then height×1."""
        shape = self.packed.shape
        left, right = left.to(x.dtype), right.to(x.dtype)
        rank = right.shape[0]
        if not kernel:
            hidden = self._conv(x, right.view(rank, *shape[1:]), None, *geometry)
            ones = (1,) * self.axes
            return self._conv(
                hidden, left.view(shape[0], rank, *ones), bias, ones, (0,) * self.axes, ones
            )
        stride, padding, dilation = geometry
        pads = padding if isinstance(padding, str) else None
        wide = right.view(rank, shape[1], 1, shape[3])
        tall = left.view(shape[0], shape[2], rank).transpose(1, 2)[..., None]
        hidden = self._conv(
            x, wide, None, (1, stride[1]), pads or (0, padding[1]), (1, dilation[1])
        )
        return self._conv(
            hidden, tall, bias, (stride[0], 1), pads or (padding[0], 0), (dilation[0], 1)
        )


class Conv1d(_Conv):
    """As `nn.Conv1d`."""

    plain = nn.Conv1d
    axes = 1

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        return F.conv1d(x, weight, bias, *rest)


class Conv2d(_Conv):
    """As `nn.Conv2d`."""

    plain = nn.Conv2d
    axes = 2

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        return F.conv2d(x, weight, bias, *rest)
