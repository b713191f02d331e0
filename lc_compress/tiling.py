"""Partitions of the weights into rows, columns, channels or tiles, and how a choice of them is
written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .coding import Fixed, Support
from .part import Coding
from .sparse import where


@dataclass(frozen=True)
class Tiling:
    """A partition of a tensor, or of each tensor of a group, into blocks.

    axis: one block per index of this axis.
    block: (r, c) tiles of the matrix (first axis, all others); those at the edges are smaller.
    shapes: the tensors of a joint group, which arrive as one vector.
    """

    axis: int | None = None
    block: tuple[int, int] | None = None
    shapes: tuple[torch.Size, ...] | None = None

    def tensors(self, shape: torch.Size) -> list[torch.Size]:
        """Shapes of the tensors that weights of this shape consist of; refuses what has no
        blocks.
        """
        shapes = [torch.Size(shape)] if self.shapes is None else list(self.shapes)
        if self.shapes is not None and sum(map(math.prod, shapes)) != math.prod(shape):
            raise ValueError(
                f"the shapes {[tuple(s) for s in shapes]} do not add up to weights of shape "
                f"{tuple(shape)}."
            )
        for one in shapes:
            if len(one) < 2:
                raise ValueError(
                    f"whole rows, columns or tiles need weights of two axes or more, got shape "
                    f"{tuple(one)}. Use `Sparse` for vectors; in a joint group give `shapes`."
                )
            if self.axis is not None and not -len(one) <= self.axis < len(one):
                raise ValueError(
                    f"axis={self.axis} does not exist in weights of shape {tuple(one)}."
                )
        return shapes

    def split(self, x: Tensor) -> list[Tensor]:
        """`x` as (blocks, size), one for each tensor; smaller blocks are filled up with zeros."""
        shapes = self.tensors(x.shape)
        pieces = [x] if self.shapes is None else x.reshape(-1).split([s.numel() for s in shapes])
        return [self._split(piece.reshape(s)) for piece, s in zip(pieces, shapes, strict=True)]

    def merge(self, blocks: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """The weights of this shape that `split` turned into `blocks`."""
        pieces = [
            self._merge(b, s) for b, s in zip(blocks, self.tensors(torch.Size(shape)), strict=True)
        ]
        if self.shapes is None:
            return pieces[0]
        return torch.cat([piece.reshape(-1) for piece in pieces]).view(shape)

    def sums(self, x: Tensor) -> Tensor:
        """Σ of each block, (blocks,), in float64."""
        return torch.cat([b.sum(1, dtype=torch.float64) for b in self.split(x)])

    def counts(self, positions: Tensor, shape: torch.Size) -> Tensor:
        """How many of the positions lie in each block, (blocks,), in float64."""
        mask = torch.zeros(math.prod(shape), device=positions.device)
        mask[positions] = 1
        return self.sums(mask.view(shape))

    def sizes(self, shape: torch.Size) -> Tensor:
        """Number of weights in each block, (blocks,), float64 on the CPU."""
        return torch.cat([self._sizes(s) for s in self.tensors(shape)])

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        """One value per block, (blocks,), as weights of this shape."""
        counts = [self._sizes(s).numel() for s in self.tensors(shape)]
        columns = [
            self._widened(v[:, None], s)
            for v, s in zip(values.split(counts), self.tensors(shape), strict=True)
        ]
        return self.merge(columns, shape)

    def _sizes(self, shape: torch.Size) -> Tensor:
        n = math.prod(shape)
        if self.axis is not None:
            count = shape[self.axis]
            return torch.full((count,), n // max(count, 1), dtype=torch.float64)
        (r, c), rows, columns = self._tile, shape[0], math.prod(shape[1:])
        heights = [float(min(r, rows - i)) for i in range(0, rows, r)]
        widths = [float(min(c, columns - j)) for j in range(0, columns, c)]
        return torch.outer(*(torch.tensor(x, dtype=torch.float64) for x in (heights, widths))).view(
            -1
        )

    def _widened(self, column: Tensor, shape: torch.Size) -> Tensor:
        """(blocks, 1) as (blocks, size), without copying."""
        if self.axis is None:
            return column.expand(-1, math.prod(self._tile))
        return column.expand(-1, math.prod(shape) // max(shape[self.axis], 1))

    def _split(self, x: Tensor) -> Tensor:
        if self.axis is not None:
            return x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)
        (r, c), x = self._tile, x.reshape(x.shape[0], -1)
        x = F.pad(x, (0, -x.shape[1] % c, 0, -x.shape[0] % r))
        grid = x.view(x.shape[0] // r, r, x.shape[1] // c, c).transpose(1, 2)  # (R, C, r, c)
        return grid.reshape(-1, r * c)

    def _merge(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        if self.axis is not None:
            others = [n for i, n in enumerate(shape) if i != self.axis % len(shape)]
            return blocks.reshape(-1, *others).movedim(0, self.axis)
        (r, c), rows, columns = self._tile, shape[0], math.prod(shape[1:])
        grid = blocks.reshape(-(-rows // r), -(-columns // c), r, c).transpose(1, 2)
        return grid.reshape(grid.shape[0] * r, -1)[:rows, :columns].reshape(shape)

    @property
    def _tile(self) -> tuple[int, int]:
        assert self.block is not None
        return self.block


@dataclass(frozen=True)
class BlockSupport(Coding):
    """Sorted positions (k,), int64, of all weights in some of the blocks of a tiling.

    Blocks of equal size: their numbers, as `Support` writes them. Otherwise (tiles smaller at the
    edges, tensors of different shapes) one bit per block, since k does not tell how many there are.
    `unpack` returns int64.

    Raises:
        ValueError: data that is not a union of blocks, or a payload that this coding has not
            written.
    """

    shape: tuple[int, ...]
    tiling: Tiling

    def bits(self, data: Tensor) -> int:
        coding, numbers = self._numbers(data)
        return coding.bits(numbers)

    def pack(self, data: Tensor) -> bytes:
        coding, numbers = self._numbers(data)
        return coding.pack(numbers)

    def unpack(self, payload: bytes, shape: torch.Size) -> Tensor:
        k, sizes = math.prod(shape), self._sizes
        kept = torch.zeros(sizes.numel(), dtype=torch.bool)
        if bool((sizes == sizes[0]).all()):
            count, rest = divmod(k, int(sizes[0]))
            if rest:
                raise ValueError(f"{self}: {k} positions are no number of blocks of {sizes[0]:g}.")
            kept[Support(sizes.numel()).unpack(payload, torch.Size((count,)))] = True
        else:
            kept = Fixed(1).unpack(payload, sizes.shape).bool()
        positions = where(self.tiling.spread(kept, torch.Size(self.shape)))
        if positions.numel() != k:
            raise ValueError(
                f"{self}: damaged payload, the blocks hold {positions.numel()} weights, not {k}."
            )
        return positions

    @property
    def _sizes(self) -> Tensor:
        return self.tiling.sizes(torch.Size(self.shape))

    def _numbers(self, data: Tensor) -> tuple[Coding, Tensor]:
        """A coding for the blocks, and what it is to write."""
        Support(math.prod(self.shape)).bits(data)  # refuses what is not a support
        counts, sizes = self.tiling.counts(data.cpu(), torch.Size(self.shape)), self._sizes
        if bool(((counts > 0) & (counts < sizes)).any()):
            raise ValueError(f"{self}: the positions are not those of whole blocks.")
        if bool((sizes == sizes[0]).all()):
            return Support(sizes.numel()), where(counts > 0)
        return Fixed(1), counts > 0
