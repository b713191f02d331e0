"""Microscaling formats: small floats, or integers, times a power of two shared by a block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .block_scaled import BlockScaled, Element
from .number_format import Rounding

# bits of an element, and its magnitudes: mantissa bits, exponent of the subnormals, largest code
_ELEMENTS = {
    "e4m3": (8, Element(3, -6, 126)),  # up to 448; the code above is NaN
    "e5m2": (8, Element(2, -14, 123)),  # up to 57344; the codes above are inf and NaN
    "e2m3": (6, Element(3, 0, 31)),  # up to 7.5
    "e3m2": (6, Element(2, -2, 31)),  # up to 28
    "e2m1": (4, Element(1, 0, 7)),  # up to 6
    "int8": (8, Element(6, 0, 127)),  # up to 127 / 64
}


@dataclass(frozen=True)
class MX(BlockScaled):
    """Microscaling: elements t of a small format times a power of two, 2^s, shared by a block.

    The elements of the OCP standard: e4m3 and e5m2 (MXFP8), e2m3 and e3m2 (MXFP6), e2m1 (MXFP4):
    floats of so many exponent and mantissa bits, with subnormals and without inf and NaN; int8
    (MXINT8): k / 64 with |k| <= 127, stored as sign and magnitude (the standard stores the two's
    complement, which has no −0).

    scale="reference" takes s = ⌊log2 max |w|⌋ − ⌊log2 t_max⌋, so the maximum lies in the binade of
    the largest element, and is clamped where it is beyond it. s = −127 for a block of zeros. Each
    weight gets its nearest element: half-way ones the larger (rounding="nearest", the reference's
    default) or the one of even code (rounding="even").
    scale="best" solves   min Σ h (w − t 2^s)²   over t and s of each block exactly, whatever the
    importance (`block_scaled.BlockScaled` has the proof); never worse than the reference.

    Args:
        element: "e4m3", "e5m2", "e2m3", "e3m2", "e2m1" or "int8".
        block: weights that share s: consecutive ones along the axis. The last block of a line may
            be shorter.
        axis: direction of the blocks. −1 is that of the inputs in a linear layer.
        scale: "reference" or "best".
        rounding: "nearest" or "even".

    State:
        exponents s (*other axes, blocks along the axis), codes of w's shape: the bit patterns of
        the elements.

    Cost: O(N); "best" some times that. Stores 8, 6 or 4 bits per weight and 8 per block: s from
        −127 to 127 (E8M0), which float32 never leaves; weights beyond are clamped.

    Raises:
        ValueError: another `element`, `scale` or `rounding`, `block` < 1, no such axis.

    Source: papers/sparsity-quantization-order.md, section 2.
    """

    element: Literal["e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "int8"]
    block: int = 32
    axis: int = -1
    scale: Literal["reference", "best"] = "reference"
    rounding: Literal["nearest", "even"] = "nearest"

    def __post_init__(self) -> None:
        if self.element not in _ELEMENTS:
            raise ValueError(f"{self}: elements are {', '.join(_ELEMENTS)}.")
        if self.rounding not in ("nearest", "even"):
            raise ValueError(f'{self}: rounding must be "nearest" or "even".')
        self._check()

    @property
    def _element(self) -> Element:
        return _ELEMENTS[self.element][1]

    @property
    def _width(self) -> int:
        return _ELEMENTS[self.element][0]

    @property
    def first(self) -> int:
        return -127

    @property
    def last(self) -> int:
        return 127  # 255 stands for NaN

    @property
    def nearest(self) -> Rounding:
        return torch.round if self.rounding == "even" else _half_up

    def reference(self, largest: Tensor) -> Tensor:
        exponent = torch.frexp(largest).exponent - math.frexp(self._element.largest)[1]
        return torch.where(largest > 0, exponent, self.first).clamp_(self.first, self.last)


def _half_up(y: Tensor) -> Tensor:
    return (y + 0.5).floor_()
