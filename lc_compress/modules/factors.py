"""Low-rank terms: two factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..views import KernelMatrix, View
from .packed import Packed
from .term import Term


class Factors(Term):
    """Δ = U V, seen through a view: "left" (rows, r) and "right" (r, columns) of its matrix.

    views: those that "scheme" chooses from, or the one there is; None is the weight itself.
    """

    def __init__(
        self, arrays: Mapping[str, Packed], shape: torch.Size, views: tuple[View | None, ...]
    ) -> None:
        super().__init__(arrays)
        self.shape, self.views = shape, views
        self.refresh()

    def refresh(self) -> None:
        scheme = self.arrays().get("scheme")
        self.view = self.views[0 if scheme is None else int(scheme.unpack())]

    def fits(self) -> bool:
        """Whether the factors are two matrices whose product has the weights' shape in the view."""
        left, right = self.sizes["left"], self.sizes["right"]
        shown = self.shape if self.view is None else self.view.shape(self.shape)
        return len(left) == len(right) == 2 and left[1] == right[0] and (left[0], right[1]) == shown

    @property
    def numbers(self) -> int:
        """In both factors: multiplications of one product."""
        return math.prod(self.sizes["left"]) + math.prod(self.sizes["right"])

    @property
    def whole_rows(self) -> bool:
        """Whether the matrix is (outputs, all the rest), so that U and V are two layers."""
        return self.sizes["left"][0] == self.shape[0] and not self.split_kernel

    @property
    def split_kernel(self) -> bool:
        """Whether the matrix is (outputs · height, inputs · width): two convolutions."""
        return isinstance(self.view, KernelMatrix)

    def fill(self, total: Tensor, ready: Any, start: int) -> None:
        dtype, stop = total.dtype, start + total.shape[0]
        columns = self.sizes["right"][1]
        if self.split_kernel:
            per_row = math.prod(self.shape[1:])
            height = self.shape[2]
            first, last = start // per_row, stop // per_row
            product = self._product(first * height, last * height, dtype)
            rows = torch.Size((last - first, *self.shape[1:]))
            assert self.view is not None
            total.copy_(self.view.restore(product, rows).reshape(-1))
            return
        first = start // columns
        product = self._product(first, -(-stop // columns), dtype).reshape(-1)
        total.copy_(product.narrow(0, start - first * columns, stop - start))

    def _product(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        left = self.floats("left")[first:last].to(dtype)
        return left @ self.floats("right").to(dtype)
