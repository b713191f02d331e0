"""The interface of a term of a packed weight."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .packed import Packed, PackedArrays

TILE = 1 << 18  # weights unpacked at once: 1 MB in float32


def tile_rows(shape: torch.Size) -> int:
    """Rows (of the first axis) in a tile: as many as make up `TILE` weights, at least one."""
    return max(1, TILE // max(1, math.prod(shape[1:])))


class Term(PackedArrays):
    """One term Δᵢ of a weight Δ = Σ Δᵢ, in packed arrays.

    `prefix`: what the names of its arrays begin with in `part.encode` of the whole weight.
    """

    def __init__(self, arrays: Mapping[str, Packed]) -> None:
        super().__init__(arrays)
        self.prefix = ""

    def prepare(self, dtype: torch.dtype) -> Any:
        """What all tiles of one forward need, in small tensors; `dtype` is float32 or float64."""
        return None

    @abstractmethod
    def fill(self, total: Tensor, ready: Any, start: int) -> None:
        """Write weights `start` to `start + len(total)`, whole rows of the flattened tensor, to
        `total`; `ready` is from `prepare` for its dtype.
        """

    def add_to(self, total: Tensor, ready: Any, start: int) -> None:
        """Add them to `total`."""
        own = torch.empty_like(total)
        self.fill(own, ready, start)
        total.add_(own)
