"""What all number formats share: rounding with given scales, their size, and where scales lie."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .nm import NM
from .part import Part, State, check_weights
from .sparse import Sparse

Rounding: TypeAlias = Callable[[Tensor], Tensor]  # to whole numbers


class Format(Part[State]):
    """A part that rounds every weight to a grid of few bits times a scale that its block shares.

    `project` rounds to the nearest value. `quantize` gives that Δ directly, or rounds at random.
    The facts that statements about pruned and quantized weights rest on
    (papers/sparsity-quantization-order.md, section 7):

        monotone: for given scales a larger weight never gets a smaller value.
        keeps_zero: every grid is symmetric about 0, so q(0) = 0 and q(−w) = −q(w). False with zero
            points: a 0 stays 0 there too, but a weight that becomes 0 moves the grid of others.
        scale_of_largest: a block's scale depends on its largest magnitude only, so pruning the
            smaller ones leaves the codes of the others as they are.
    """

    @property
    def monotone(self) -> bool:
        return True

    @property
    @abstractmethod
    def keeps_zero(self) -> bool:
        """Whether every grid is symmetric about 0."""

    @property
    @abstractmethod
    def scale_of_largest(self) -> bool:
        """Whether a block's scale depends on its largest magnitude only."""

    @abstractmethod
    def block_ids(self, shape: torch.Size, device: torch.device | None = None) -> Tensor:
        """The number, int64 of this shape, of the block that each weight lies in."""

    @abstractmethod
    def bits_per_element(self, shape: torch.Size, dtype: torch.dtype = torch.float32) -> float:
        """Stored bits per weight: its code and its share of the scales (and zero points).

        dtype: of the weights, which is that of scales without a `value_dtype`.
        """

    @abstractmethod
    def widest_cell(self, x: Tensor) -> Tensor:
        """For each weight the widest code cell of its block, Δ_max, expanded to the shape of x.

        It is a step of the grid, or twice the largest error: beyond the outermost value the block's
        largest weight may be further away than half a step.
        """

    @abstractmethod
    def with_scales(self, w: Tensor, state: State, rounding: Rounding | None = None) -> State:
        """The scales of `state` with the codes of w. `rounding` replaces the format's own."""

    def quantize(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """q(x), in the type of x.

        With a generator each weight goes to one of the two grid values around it, at random and so
        that the mean is the weight; beyond the largest value, to that. The scales stay the same.

        Raises:
            TypeError, ValueError: as `project`.
        """
        check_weights(self, x)
        with torch.no_grad():
            state = self.solve(x.detach(), None, None, None)
            if generator is not None:
                state = self.with_scales(x.detach(), state, at_random(generator))
            return self.reconstruct(state)


def at_random(generator: torch.Generator) -> Rounding:
    """Down or up, with the mean of the number itself; whole numbers stay."""

    def rounding(y: Tensor) -> Tensor:
        below = y.floor()
        u = torch.rand(y.shape, generator=generator, dtype=y.dtype, device=generator.device)
        return below + (u.to(y.device) < y - below)

    return rounding


def nests(pruner: Part[Any], quantizer: Format[Any], shape: torch.Size) -> bool:
    """Whether each group of weights that the pruner chooses among lies inside one scale block: a
    group of m for `NM`, the whole tensor for `Sparse`.

    Then the survivors by magnitude, quantized, are closest to w
    (papers/sparsity-quantization-order.md, section 9).

    Raises:
        TypeError: another pruner.
        ValueError: an axis that the shape does not have.
    """
    if not isinstance(pruner, Sparse | NM):
        raise TypeError(f"nests knows the groups of Sparse and NM, got {type(pruner).__name__}.")
    return _nests(pruner, quantizer, torch.Size(shape))


@lru_cache(maxsize=256)
def _nests(pruner: Sparse | NM, quantizer: Format[Any], shape: torch.Size) -> bool:
    ids = quantizer.block_ids(shape)
    if isinstance(pruner, Sparse):
        return int(ids.min()) == int(ids.max())
    split = pruner.groups.split
    return torch.equal(split(ids, ids.numel()).amin(1), split(ids, -1).amax(1))
