"""Hybrid block floating point: integers times a power of two shared by a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .block_scaled import BlockScaled, Element
from .part import check_whole


@dataclass(frozen=True)
class HBFP(BlockScaled):
    """Block floating point: k 2^s with |k| < 2^(width−1) and one s for a block.

    scale="reference" takes s as the paper's code does: s = e − (width − 1) with
    e = ⌈log2(max |w| + 1e-8)⌉, computed in the weights' precision (half precisions in float32).
    k is the nearest integer, half-way ones the even one, clamped. Where the maximum m has m + 1e-8
    = 2^e it is clamped too, to 2^e (1 − 2^(1−width)): in float32 so are all powers of two from 0.25
    on, in which 1e-8 is lost, and q(q(w)) may differ from q(w). Below 2^-26 everything becomes 0.
    scale="best" solves   min Σ h (w − k 2^s)²   over k and s of each block exactly, whatever the
    importance (`block_scaled.BlockScaled` has the proof); never worse than the reference.

    Args:
        width: bits of an element, sign included, 2 to 16.
        block: weights that share s: consecutive ones along the axis. The last block of a line may
            be shorter.
        axis: direction of the blocks. −1 is that of the inputs in a linear layer.
        scale: "reference" or "best".

    State:
        exponents s (*other axes, blocks along the axis), codes of w's shape: |k|, and the sign in
        the highest bit. −0 is a code of its own.

    Cost: O(N); "best" some times that. Stores width · N and 8 bits per block: e from −127 to 128,
        all that float32 has; of float64 what is beyond is clamped.

    Raises:
        ValueError: `width` outside 2 to 16, `block` < 1, another `scale`, no such axis.

    Source: papers/sparsity-quantization-order.md, section 2.
    """

    width: int
    block: int = 64
    axis: int = -1
    scale: Literal["reference", "best"] = "reference"

    def __post_init__(self) -> None:
        check_whole(self, width=self.width)
        if not 2 <= self.width <= 16:
            raise ValueError(f"{self}: width must be from 2 to 16 bits.")
        self._check()

    @property
    def _element(self) -> Element:
        mantissa = self.width - 1
        return Element(mantissa, mantissa, (1 << mantissa) - 1)

    @property
    def _width(self) -> int:
        return self.width

    @property
    def first(self) -> int:
        return -127 - (self.width - 1)

    def reference(self, largest: Tensor) -> Tensor:
        fraction, exponent = torch.frexp(largest + 1e-8)
        exponent = exponent - (fraction == 0.5).int()  # ⌈log2⌉, exactly
        return (exponent - (self.width - 1)).clamp_(self.first, self.last)
