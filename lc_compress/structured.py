"""Structured sparsity: whole rows, columns, channels, filters or tiles of the weights are zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .order import top
from .part import Coding, check_value_dtype, rounded
from .sparse import SparseForm, SparseState, check_price, gains, weighed, where
from .tiling import BlockSupport, Tiling


class BlockForm(SparseForm):
    """What all structured forms share: which blocks are kept, and how they are written."""

    axis: int | None
    block: tuple[int, int] | None
    shapes: tuple[torch.Size, ...] | None

    def _check(self) -> None:
        check_value_dtype(self, self.value_dtype)
        name = type(self).__name__
        if (self.axis is None) == (self.block is None):
            raise ValueError(
                f"{name} needs one kind of blocks, an axis or block=(rows, columns), got "
                f"{self.axis} and {self.block}."
            )
        if self.block is not None:
            object.__setattr__(self, "block", tuple(self.block))
            if len(self.block) != 2 or min(self.block) < 1:
                raise ValueError(f"{name}: block must be (rows, columns), got {self.block}.")
        if self.shapes is not None:
            object.__setattr__(self, "shapes", tuple(map(torch.Size, self.shapes)))

    def __str__(self) -> str:
        """Without the shapes, which belong to the group."""
        return super().__str__().partition(", shapes=")[0] + ")" * (self.shapes is not None)

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.axis, self.block, self.shapes)

    def coding(self, shape: torch.Size) -> Coding:
        return BlockSupport(tuple(shape), self.tiling)

    def whole(self, w: Tensor, kept: Tensor, dtype: torch.dtype) -> SparseState:
        """The state with `w`'s values, rounded, in the blocks (blocks,) that are kept; a block of
        zeros is not stored.
        """
        values = rounded(w, dtype, self.value_dtype)
        kept = kept & (self.tiling.sums(values != 0) > 0)
        positions = where(self.tiling.spread(kept, w.shape))
        return SparseState(positions, values.reshape(-1)[positions], w.shape)

    def scores(self, w: Tensor, importance: Tensor | None) -> Tensor:
        """By how much keeping a block lowers the squared error, (blocks,)."""
        return self.tiling.sums(gains(w, importance, self.value_dtype))

    def counts(self, state: SparseState) -> Tensor:
        """Values stored in each block, (blocks,)."""
        return self.tiling.counts(state.positions, state.shape)

    def admits(self, state: SparseState) -> bool:
        counts = self.counts(state)
        return bool(((counts == 0) | (counts == self.tiling.sizes(state.shape).to(counts))).all())


@dataclass(frozen=True)
class BlockSparse(BlockForm):
    """At most a given number of blocks of weights that are not zero: filters, rows, columns, input
    channels, kernels or tiles.

    Solves   min Σ h (w − θ)²   s.t. at most κ blocks of θ are not zero
    exactly, by keeping the κ blocks of largest Σ h w² (with a `value_dtype`, of the largest gain
    after rounding); among equal blocks the first are kept.

    Args: exactly one of
        blocks: κ, at least 0; more than there are keeps all.
        density: κ as a share of the blocks, in [0, 1], rounded to the nearest count.
    and exactly one of
        axis: a block is one index of this axis: 0 for rows or filters, 1 for columns or input
            channels.
        block: (r, c): blocks are tiles of the matrix (first axis, all others), smaller at its
            edges; (1, height·width) are the kernels of a convolution.
    and
        value_dtype: how values are stored; None: in the weights' dtype.
        shapes: in a joint group, whose tensors arrive as one vector, their shapes: the blocks of
            all of them compete for one budget.

    State: as `Sparse`, with all entries of the kept blocks, zeros among them too.

    Cost: O(N). Stores the values of the kept blocks and the cheapest of one bit per block and
        gap-coded block numbers; one bit per block where blocks have unequal sizes. Applies in one
        multiplication per value.

    Raises:
        ValueError: not exactly one budget or not one kind of blocks, one out of range, weights of
            fewer than two axes.
    """

    blocks: int | None = None
    density: float | None = None
    axis: int | None = None
    block: tuple[int, int] | None = None
    value_dtype: torch.dtype | None = None
    shapes: tuple[torch.Size, ...] | None = None

    def __post_init__(self) -> None:
        self._check()
        if (self.blocks is None) == (self.density is None):
            raise ValueError(
                f"BlockSparse needs exactly one budget, blocks or density, got {self.blocks} and "
                f"{self.density}."
            )
        if self.blocks is not None and self.blocks < 0:
            raise ValueError(f"BlockSparse(blocks={self.blocks}): blocks must be >= 0.")
        if self.density is not None and not 0 <= self.density <= 1:
            raise ValueError(f"BlockSparse(density={self.density}): density must be in [0, 1].")

    def budget(self, count: int) -> int:
        """κ for weights of `count` blocks."""
        if self.blocks is not None:
            return min(self.blocks, count)
        assert self.density is not None
        return round(self.density * count)

    def solve(
        self, w: Tensor, warm: SparseState | None, mu: float | None, importance: Tensor | None
    ) -> SparseState:
        scores = self.scores(w, importance)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[top(scores, self.budget(scores.numel()))] = True
        return self.whole(w, kept, w.dtype)

    def admits(self, state: SparseState) -> bool:
        counts = self.counts(state)
        return super().admits(state) and int((counts > 0).sum()) <= self.budget(counts.numel())


@dataclass(frozen=True)
class BlockPenalty(BlockForm):
    """Structured sparsity at a price per block.

    Solves   min  μ/2 Σ h (w − θ)² + α · (number of blocks of θ that are not zero)
    exactly: a block is kept where μ/2 Σ h w² > α.

    Args:
        alpha: price of one block, >= 0, in units of the loss.
        axis, block, value_dtype, shapes: as `BlockSparse`.

    State, Cost: as `BlockSparse`.

    Raises:
        ValueError: `alpha` is negative or not finite, or as `BlockSparse`; `project` was called
            without `mu`, which a penalty is weighed against.
    """

    alpha: float
    axis: int | None = None
    block: tuple[int, int] | None = None
    value_dtype: torch.dtype | None = None
    shapes: tuple[torch.Size, ...] | None = None

    def __post_init__(self) -> None:
        self._check()
        check_price(self, self.alpha)

    def solve(
        self, w: Tensor, warm: SparseState | None, mu: float | None, importance: Tensor | None
    ) -> SparseState:
        half = weighed(self, mu) / 2
        return self.whole(w, self.scores(w, importance) * half > self.alpha, w.dtype)

    def penalty(self, state: SparseState) -> float:
        return self.alpha * int((self.counts(state) > 0).sum())


@dataclass(frozen=True)
class GroupL2Penalty(BlockForm):
    """Structured sparsity by a convex price, the group lasso: each block pays its ℓ2 norm.

    Solves   min  μ/2 Σ h (w − θ)² + α Σ_b √size_b ‖θ_b‖₂
    exactly. With λ = α √size_b, block b is zero where ‖μ h w‖ ≤ λ; otherwise
    θ = μ h w / (μ h + λ/t), where t = ‖θ_b‖ is the root of  Σ (μ h w)² / (μ h t + λ)² = 1.
    Without importance that is block soft thresholding, θ = w (1 − λ / (μ ‖w_b‖)). With it, one over
    the root of the left side is concave in t, so Newton's method rises to t monotonically. Weights
    of importance 0 become 0. Exact up to the rounding of values; with a `value_dtype` the part
    does not claim to be exact.

    Args:
        alpha: price of a block of one weight and norm 1, >= 0, in units of the loss.
        axis, block, value_dtype, shapes: as `BlockSparse`.

    State, Cost: as `BlockSparse`; with importance a few passes more.

    Raises:
        ValueError: `alpha` is negative or not finite, or as `BlockSparse`; `project` was called
            without `mu`, which a penalty is weighed against.

    Source: Yuan, Lin, Model selection and estimation in regression with grouped variables, JRSS B
    68 (2006): the √size weights.
    """

    alpha: float
    axis: int | None = None
    block: tuple[int, int] | None = None
    value_dtype: torch.dtype | None = None
    shapes: tuple[torch.Size, ...] | None = None

    def __post_init__(self) -> None:
        self._check()
        check_price(self, self.alpha)

    @property
    def exact(self) -> bool:
        return self.value_dtype is None

    @property
    def exact_weighted(self) -> bool:
        return self.value_dtype is None

    def solve(
        self, w: Tensor, warm: SparseState | None, mu: float | None, importance: Tensor | None
    ) -> SparseState:
        price = self.alpha / weighed(self, mu) * self.tiling.sizes(w.shape).to(w.device).sqrt()
        blocks = [b.double() for b in self.tiling.split(w)]  # of (blocks, size)
        prices = price[:, None].split([b.shape[0] for b in blocks])
        if importance is None:
            shrunk = [_shrunk(b, p) for b, p in zip(blocks, prices, strict=True)]
        else:
            h = self.tiling.split(importance.to(w.device).double().expand(w.shape))
            shrunk = [_shrunk_weighted(*x) for x in zip(blocks, prices, h, strict=True)]
        kept = torch.cat([b.any(1) for b in shrunk])
        return self.whole(self.tiling.merge(shrunk, w.shape), kept, w.dtype)

    def penalty(self, state: SparseState) -> float:
        squares = self.tiling.sums(self.reconstruct(state).double().square())
        return self.alpha * float((squares.cpu() * self.tiling.sizes(state.shape)).sqrt().sum())


def _shrunk(w: Tensor, price: Tensor) -> Tensor:
    """θ minimising ½ Σ (w − θ)² + price ‖θ‖ for each row of w (blocks, size); price (blocks, 1)."""
    norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    return w * torch.where(norm > price, 1 - price / norm, 0)


def _shrunk_weighted(w: Tensor, price: Tensor, h: Tensor) -> Tensor:
    """θ minimising ½ Σ h (w − θ)² + price ‖θ‖ for each row; all float64."""
    largest = h.amax(1, keepdim=True)
    result = torch.zeros_like(w)
    largest = torch.where(largest > 0, largest, 1)
    h, price = h / largest, price / largest  # whatever its size
    pull = h * w
    norm = torch.linalg.vector_norm(pull, dim=1, keepdim=True)
    rows = where(norm > price)
    if rows.numel() == 0:
        return result
    w, price, h, pull = w[rows], price[rows], h[rows], pull[rows]
    t = norm[rows] - price  # the root if all h are equal, else below it
    for _ in range(200):
        inner = h * t + price
        share = torch.where(h > 0, pull / inner, 0)  # (blocks, size), of norm 1 at the root
        square = (share * share).sum(1, keepdim=True)
        slope = (share * share * torch.where(h > 0, h / inner, 0)).sum(1, keepdim=True)
        step = square * (square.sqrt() - 1) / slope
        if not bool((step > 4 * torch.finfo(torch.float64).eps * t).any()):
            break
        t = t + step.clamp_min(0)
    result[rows] = torch.where(h > 0, pull * t / (h * t + price), 0)
    return result
