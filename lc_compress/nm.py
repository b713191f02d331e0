"""N:M sparsity: at most n non-zero weights in every m consecutive ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from .coding import Fixed, Support
from .order import argsort_rows
from .part import Coding, check_value_dtype, working
from .sparse import SparseForm, SparseState, gains, where

_PAIRWISE = 32  # up to this m, comparing all pairs is faster than sorting
_WIDEST, _MOST = 4096, 64  # m and n of groups whose positions are one number


@dataclass(frozen=True)
class Groups:
    """Every m consecutive entries along an axis; the last group of each line may be shorter."""

    m: int
    axis: int

    def lines(self, shape: torch.Size) -> tuple[int, int]:
        """How many lines run along the axis, and how long they are."""
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"axis={self.axis} does not exist in weights of shape {tuple(shape)}.")
        length = shape[self.axis]
        return math.prod(shape) // max(length, 1), length

    def split(self, x: Tensor, fill: float) -> Tensor:
        """`x` as (groups, m), short groups filled up."""
        _, length = self.lines(x.shape)
        return F.pad(x.movedim(self.axis, -1), (0, -length % self.m), value=fill).reshape(
            -1, self.m
        )

    def merge(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of this shape that `split` turned into `groups`."""
        _, length = self.lines(shape)
        others = [n for i, n in enumerate(shape) if i != self.axis % len(shape)]
        return groups.reshape(*others, -1)[..., :length].movedim(-1, self.axis)


@dataclass(frozen=True)
class NM(SparseForm):
    """At most n non-zero weights in every m consecutive ones along an axis: 2:4 is NM(2, 4).

    Solves   min Σ h (w − θ)²   s.t. ‖θ_g‖₀ ≤ n for every group g
    exactly, by keeping the n largest |w| of each group (with importance, the largest h w²; with a
    `value_dtype`, the largest gain after rounding). Among equal weights the first along the axis
    are kept. Where m does not divide the axis, the last group is shorter and keeps at most n as
    well. A joint group is one vector there: use `each(NM(n, m))`.

    Args:
        n: from 0 to m; 0 gives Δ = 0 and m gives w.
        m: size of a group, at least 1.
        axis: direction of the groups. −1 is that of the inputs in a linear layer; in a convolution
            weight (out, in, height, width) they lie on axis 1.
        value_dtype: how values are stored; None: in the weights' dtype.

    State: as `Sparse`.

    Cost: O(N m) comparisons for m up to 32, else O(N log m). Stores the values and, where all
        groups are full, ceil(log2 C(m, n)) bits per group: 3 for 2:4. Otherwise (exact zeros among
        the weights) positions as `Sparse` does. Applies in n/m of the multiplications.

    Raises:
        ValueError: `n` or `m` out of range, or no such axis.
    """

    n: int
    m: int
    axis: int = -1
    value_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_value_dtype(self, self.value_dtype)
        if self.m < 1 or not 0 <= self.n <= self.m:
            raise ValueError(f"{self}: m must be at least 1 and n from 0 to m.")

    @property
    def groups(self) -> Groups:
        return Groups(self.m, self.axis)

    def coding(self, shape: torch.Size) -> Coding:
        return GroupSupport(tuple(shape), self.n, self.m, self.axis)

    def solve(
        self, w: Tensor, warm: SparseState | None, mu: float | None, importance: Tensor | None
    ) -> SparseState:
        plain = importance is None and self.value_dtype is None
        score = working(w).abs() if plain else gains(w, importance, self.value_dtype)
        return self.keep(w, self.select(score))

    def select(self, score: Tensor) -> Tensor:
        """Positions, ascending, of the n entries of largest score in each group."""
        best = _best(self.groups.split(score, -math.inf), self.n)
        return where(self.groups.merge(best, score.shape))

    def admits(self, state: SparseState) -> bool:
        kept = torch.zeros(math.prod(state.shape), dtype=torch.bool, device=state.positions.device)
        kept[state.positions] = True
        counts = self.groups.split(kept.view(state.shape).to(torch.uint8), 0).sum(1)
        return bool((counts <= self.n).all())


def _best(score: Tensor, n: int) -> Tensor:
    """Mask (rows, m) of the n largest entries of each row, the first ones among equal."""
    m = score.shape[1]
    if m > _PAIRWISE:
        order = argsort_rows(-score)[:, :n]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
    columns = score.T.contiguous()
    beaten = torch.zeros_like(columns, dtype=torch.uint8)  # by how many of the row
    for i in range(m):
        for j in range(i + 1, m):
            later = columns[j] > columns[i]
            beaten[i] += later
            beaten[j] += ~later
    return (beaten < n).T


@dataclass(frozen=True)
class GroupSupport(Coding):
    """Sorted positions (k,), int64, into weights of a shape, at most n in each group of m.

    If all groups are full (n positions, or as many as a shorter last group has), one number of
    ceil(log2 C(m, n)) bits each: the place of the group's n slots s₁ < s₂ < … among all choices,
    Σ_i C(s_i, i). A last group shorter than n is filled up with the slots that follow. Otherwise,
    or where C(m, n) needs more than 62 bits, m > 4096 or n > 64, as `Support` writes them. Which of
    the two is known from k. `unpack` returns int64.

    Raises:
        ValueError: data that is not a support, or a payload that this coding has not written.
    """

    shape: tuple[int, ...]
    n: int
    m: int
    axis: int

    def bits(self, data: Tensor) -> int:
        if not self._full(data.numel()):
            return self._plain.bits(data)
        return self._count * self._width

    def pack(self, data: Tensor) -> bytes:
        if not self._full(data.numel()):
            return self._plain.pack(data)
        kept = torch.zeros(math.prod(self.shape), dtype=torch.bool)
        positions = data.detach().cpu()
        self._plain.bits(positions)  # refuses what is not a support
        kept[positions] = True
        grid = self._groups.split(kept.view(self.shape).to(torch.uint8), 0).bool()
        grid[:, : self.n] |= self._inside()[:, : self.n].logical_not()
        if not bool((grid.sum(1) == self.n).all()):
            raise ValueError(f"{self}: a group has more than {self.n} positions.")
        slots = grid.nonzero()[:, 1].view(-1, self.n).numpy()
        table = self._table()
        codes = sum((table[slots[:, i], i + 1] for i in range(self.n)), np.zeros(len(slots), int))
        return Fixed(self._width).pack(torch.from_numpy(codes))

    def unpack(self, payload: bytes, shape: torch.Size) -> Tensor:
        k = math.prod(shape)
        if not self._full(k):
            return self._plain.unpack(payload, shape)
        codes = Fixed(self._width).unpack(payload, torch.Size((self._count,))).long().numpy()
        table = self._table()
        grid = torch.zeros(self._count, self.m, dtype=torch.bool)
        for i in range(self.n, 0, -1):  # the largest slot s with C(s, i) not above what is left
            slots = np.searchsorted(table[:, i], codes, side="right") - 1
            codes = codes - table[slots, i]
            grid[torch.arange(self._count), torch.from_numpy(slots)] = True
        positions = where(self._groups.merge(grid & self._inside(), torch.Size(self.shape)))
        if positions.numel() != k or self.pack(positions) != payload:
            raise ValueError(f"{self}: damaged payload, a group holds an impossible choice.")
        return positions

    @property
    def _plain(self) -> Support:
        return Support(math.prod(self.shape))

    @property
    def _groups(self) -> Groups:
        return Groups(self.m, self.axis)

    @property
    def _count(self) -> int:
        lines, length = self._groups.lines(torch.Size(self.shape))
        return lines * -(-length // self.m)

    @property
    def _width(self) -> int:
        if self.m > _WIDEST or self.n > _MOST:
            return 63  # its table would be long: no number
        return (math.comb(self.m, self.n) - 1).bit_length()

    def _full(self, k: int) -> bool:
        """Whether k positions fill all groups, and a group's choice fits a number."""
        lines, length = self._groups.lines(torch.Size(self.shape))
        full = lines * (length // self.m * self.n + min(length % self.m, self.n))
        return k == full and 0 < self._width <= 62

    def _inside(self) -> Tensor:
        """(groups, m): slots that are weights, not beyond the end of a line."""
        weights = torch.ones(1, dtype=torch.uint8).expand(self.shape)
        return self._groups.split(weights, 0).bool()

    def _table(self) -> npt.NDArray[np.int64]:
        """C(s, i) for slots s below m and i up to n; what is above every code is cut off."""
        rows = [[min(math.comb(s, i), 2**62) for i in range(self.n + 1)] for s in range(self.m)]
        return np.array(rows, np.int64)
