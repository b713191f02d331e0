"""Fixed-point numbers: integers of a few bits times a power of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Blocks
from .coding import Fixed
from .grids import ROUNDINGS, Direction, Grid, grid, spread
from .number_format import Format, Rounding
from .order import sort_rows
from .part import Field, Ops, check_whole, rounded, working

_CHUNK = 1 << 16  # weights whose float64 copies stay in the cache
_BIAS = 128  # of an exponent in its byte
_LARGEST = 126  # 2 to it and its inverse are normal float32


@dataclass(frozen=True, eq=False)
class FixedPointState:
    """exponents (blocks,) int64: d, the step is 2^−d; integers of the weights' shape, int8 or
    int16; grid: steps and range, broadcasting to them; dtype of the weights.
    """

    exponents: Tensor
    integers: Tensor
    grid: Grid
    dtype: torch.dtype


@dataclass(frozen=True)
class FixedPoint(Format[FixedPointState]):
    """Integers of `width` bits times a power of two 2^−d, one d per tensor or channel.

    Solves   min Σ h (w − 2^−d k)²   over integers d of a range and k in −2^(N−1) … 2^(N−1) − 1
    to the global optimum, by trying every d (among equal errors the smallest); k is the nearest
    integer in range, half-way the even one.

    That is so for rounding="nearest" only. "truncate" (towards zero: what the paper's code does)
    and "floor" (what its formula says) round otherwise: d is then the best one for that rounding,
    and Δ(θ) no projection. On Gaussian weights truncating to 8 bits has 3.6 times the squared error
    (papers/joint-weights-activations.md, section 1).

    Args:
        width: N, the bits per weight, 2 to 16.
        axis: one d per index of this axis; None: one for the tensor.
        rounding: "nearest", "truncate" or "floor".
        exponents: the least and the largest d to try, from −126 to 126. The default is the paper's:
            steps of at most 1, so that weights or activations beyond 2^(N−1) saturate.
        saturate: (q_l, q_u): d is fitted to the weights clipped to these quantiles (of each block,
            linear between two), so that rare large ones do not choose it; they are rounded as they
            are all the same. No projection either.

    State:
        exponents (blocks,), integers of w's shape; the grid they lie on and w's dtype.

    Cost: O(N) for each d. Stores N bits per weight and 8 per exponent.

    Raises:
        ValueError: an argument out of range, or no such axis.

    Source: papers/joint-weights-activations.md, section 1.
    """

    width: int
    axis: int | None = None
    rounding: Direction = "nearest"
    exponents: tuple[int, int] = (0, 19)
    saturate: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "exponents", tuple(self.exponents))
        check_whole(self, width=self.width)
        if not 2 <= self.width <= 16:
            raise ValueError(f"{self}: width must be from 2 to 16 bits.")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"{self}: rounding must be one of {', '.join(ROUNDINGS)}.")
        if len(self.exponents) != 2 or not all(isinstance(d, int) for d in self.exponents):
            raise ValueError(f"{self}: exponents must be (least, largest), two integers.")
        if not -_LARGEST <= self.exponents[0] <= self.exponents[1] <= _LARGEST:
            raise ValueError(
                f"{self}: exponents must be (least, largest) from -{_LARGEST} to {_LARGEST}."
            )
        if self.saturate is not None:
            object.__setattr__(self, "saturate", tuple(self.saturate))
            if len(self.saturate) != 2 or not 0 <= self.saturate[0] < self.saturate[1] <= 1:
                raise ValueError(
                    f"{self}: saturate must be two quantiles, 0 <= lower < upper <= 1."
                )

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.axis)

    @property
    def exact(self) -> bool:
        return self.rounding == "nearest" and self.saturate is None

    @property
    def exact_weighted(self) -> bool:
        return self.exact

    @property
    def keeps_zero(self) -> bool:
        return False  # the range reaches one step further down than up

    @property
    def scale_of_largest(self) -> bool:
        return False

    def exponent_shape(self, shape: torch.Size) -> torch.Size:
        """One exponent per block."""
        return torch.Size((self.blocks.count(shape),))

    def block_ids(self, shape: torch.Size, device: torch.device | None = None) -> Tensor:
        ids = torch.arange(self.blocks.count(shape), device=device)
        return self.blocks.spread(ids, shape).expand(shape)

    def bits_per_element(self, shape: torch.Size, dtype: torch.dtype = torch.float32) -> float:
        shape = torch.Size(shape)
        return self.width + 8 * self.blocks.count(shape) / shape.numel()

    def widest_cell(self, x: Tensor) -> Tensor:
        scale = self._grid(self.solve(x.detach(), None, None, None).exponents, x.dtype)
        low, high = self.blocks.split(working(x)).aminmax(dim=1)
        clipped = (high - scale.step * scale.high).maximum(scale.step * scale.low - low)
        widest = 2 * scale.step if self.rounding == "truncate" else scale.step  # around 0
        cell = (clipped + scale.step / 2).maximum(widest)
        return self.blocks.spread(cell, x.shape).expand(x.shape).to(working(x).dtype)

    def solve(
        self, w: Tensor, warm: FixedPointState | None, mu: float | None, importance: Tensor | None
    ) -> FixedPointState:
        rows, h = self.blocks.split(working(w)), self.blocks.split_importance(importance, w)
        if self.saturate is not None:
            rows = _clipped(rows, *self.saturate)
        return self._rounded(w, self._best(rows, h), None)

    def with_scales(
        self, w: Tensor, state: FixedPointState, rounding: Rounding | None = None
    ) -> FixedPointState:
        return self._rounded(w, state.exponents, rounding)

    def _rounded(self, w: Tensor, exponents: Tensor, turn: Rounding | None) -> FixedPointState:
        scale = spread(self, self._grid(exponents, w.dtype), w.shape)
        integers = scale.codes(working(w), turn).to(self._integer)
        return FixedPointState(exponents, integers, scale, w.dtype)

    def _best(self, rows: Tensor, h: Tensor | None) -> Tensor:
        """The exponent of least error for each row; the smallest of equal ones."""
        low, high, turn = -self._half, self._half - 1, ROUNDINGS[self.rounding]
        tried = range(self.exponents[0], self.exponents[1] + 1)
        errors = rows.new_zeros(len(tried), rows.shape[0], dtype=torch.float64)
        size = max(1, _CHUNK // rows.shape[0])
        for start in range(0, rows.shape[1], size):
            piece = rows[:, start : start + size].double()
            for i, d in enumerate(tried):
                x = piece * 2.0**d
                residual = (x - turn(x).clamp_(low, high)) * 2.0**-d
                square = residual.square_()
                if h is not None:
                    square *= h[:, start : start + size]
                errors[i] += square.sum(1)
        return errors.argmin(0) + self.exponents[0]

    @property
    def _half(self) -> int:
        return 1 << (self.width - 1)

    @property
    def _integer(self) -> torch.dtype:
        return torch.int8 if self.width <= 8 else torch.int16

    def _grid(self, exponents: Tensor, dtype: torch.dtype) -> Grid:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        step = torch.ldexp(torch.ones_like(exponents, dtype=exact), -exponents)
        low = torch.full_like(step, -self._half)
        return Grid(step, low, -low - 1, self.rounding)

    def reconstruct(self, state: FixedPointState) -> Tensor:
        step = state.grid.step
        return rounded(state.integers.to(step.dtype) * step, state.dtype, None)

    def encode(self, state: FixedPointState) -> dict[str, Field]:
        codes = state.integers.to(torch.int32) + self._half
        return {
            "exponents": Field(state.exponents + _BIAS, Fixed(8)),
            "codes": Field(codes, Fixed(self.width), per_weight=True),
        }

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> FixedPointState:
        exponents = arrays["exponents"].long() - _BIAS
        if not self._tried(exponents):
            raise ValueError(f"{self}: damaged exponents, {self.exponents} at most.")
        integers = arrays["codes"].reshape(shape).to(torch.int32) - self._half
        scale = spread(self, self._grid(exponents, dtype), torch.Size(shape))
        return FixedPointState(exponents, integers.to(self._integer), scale, dtype)

    def _tried(self, exponents: Tensor) -> bool:
        low, high = self.exponents
        return bool(((exponents >= low) & (exponents <= high)).all())

    def admits(self, state: FixedPointState) -> bool:
        """Integers of this width, exponents of the range, one per block."""
        if state.exponents.numel() != self.blocks.count(state.integers.shape):
            return False
        low, high = (int(x) for x in state.integers.aminmax())
        return self._tried(state.exponents) and -self._half <= low and high < self._half

    def ops(self, state: FixedPointState, positions: int = 1) -> Ops:
        """Products with small integers count as such; the steps are shifts."""
        terms = int((state.integers != 0).sum())
        return Ops(positions * terms, positions * terms)


@grid.register
def _(part: FixedPoint, state: FixedPointState) -> Grid:
    return part._grid(state.exponents, state.dtype)


def _clipped(rows: Tensor, lower: float, upper: float) -> Tensor:
    """Each row clipped to two of its quantiles, which lie linearly between sorted values."""
    ordered = sort_rows(rows)
    low, high = (_quantile(ordered, q) for q in (lower, upper))
    return rows.maximum(low).minimum(high)


def _quantile(ordered: Tensor, q: float) -> Tensor:
    place = q * (ordered.shape[1] - 1)
    i = min(int(place), max(ordered.shape[1] - 2, 0))
    left, right = ordered[:, i : i + 1], ordered[:, i + 1 : i + 2]
    return left if right.numel() == 0 else left + (right - left) * (place - i)
