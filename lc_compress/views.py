"""How a part sees a tensor. Every view only rearranges entries, so distances, and with them
projections, stay the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def joined(shapes: Sequence[torch.Size]) -> torch.Size:
    """The shape that a part sees of a task's tensors: that of the one there is, or one vector of a
    group's.
    """
    return shapes[0] if len(shapes) == 1 else torch.Size((sum(map(math.prod, shapes)),))


class View(ABC):
    """A rearrangement of a tensor's entries: `restore(show(w), w.shape)` is `w`."""

    @abstractmethod
    def show(self, w: Tensor) -> Tensor:
        """`w` as the part sees it."""

    @abstractmethod
    def restore(self, shown: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of this shape that `show` turns into `shown`."""

    @abstractmethod
    def shape(self, shape: torch.Size) -> torch.Size:
        """Shape of what `show` makes of a tensor of this shape."""


@dataclass(frozen=True)
class Vector(View):
    """All entries, the last axis fastest."""

    def show(self, w: Tensor) -> Tensor:
        return w.reshape(-1)

    def restore(self, shown: Tensor, shape: torch.Size) -> Tensor:
        return shown.reshape(shape)

    def shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((math.prod(shape),))


@dataclass(frozen=True)
class Matrix(View):
    """The first `rows` axes as rows, the others as columns.

    `Matrix()` is scheme 1 for convolutions: (out, in, kh, kw) becomes out × (in·kh·kw), which
    factors into a convolution with `rank` filters and a 1×1 convolution. A linear weight stays as
    it is.
    """

    rows: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"Matrix(rows={self.rows}): rows must be at least 1.")

    def show(self, w: Tensor) -> Tensor:
        return w.reshape(self.shape(w.shape))

    def restore(self, shown: Tensor, shape: torch.Size) -> Tensor:
        return shown.reshape(shape)

    def shape(self, shape: torch.Size) -> torch.Size:
        if len(shape) <= self.rows:
            raise ValueError(
                f"Matrix(rows={self.rows}) needs a tensor of more than {self.rows} axes, got "
                f"shape {tuple(shape)}."
            )
        return torch.Size((math.prod(shape[: self.rows]), math.prod(shape[self.rows :])))


@dataclass(frozen=True)
class KernelMatrix(View):
    """Scheme 2 for convolutions: (out, in, kh, kw) becomes (out·kh) × (in·kw).

    A rank-r matrix is then a pair of convolutions with r channels between them and kernels 1×kw and
    kh×1.
    """

    def show(self, w: Tensor) -> Tensor:
        self.shape(w.shape)
        return w.permute(0, 2, 1, 3).reshape(w.shape[0] * w.shape[2], -1)

    def restore(self, shown: Tensor, shape: torch.Size) -> Tensor:
        out, inner, height, width = shape
        return shown.reshape(out, height, inner, width).permute(0, 2, 1, 3).contiguous()

    def shape(self, shape: torch.Size) -> torch.Size:
        if len(shape) != 4:
            raise ValueError(
                "KernelMatrix splits two-dimensional kernels, (out, in, height, width), got "
                f"shape {tuple(shape)}. Use Matrix()."
            )
        return torch.Size((shape[0] * shape[2], shape[1] * shape[3]))
