"""Formats whose blocks share a power of two: what HBFP and MX have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from .binary import scale_ops
from .codebook import looked_up
from .coding import Fixed
from .nm import Groups
from .number_format import Format, Rounding
from .part import Field, Ops, check_weights, check_whole, rounded, working

_EXPONENT_BITS = 8
_BIAS = 127


@dataclass(frozen=True, eq=False)
class BlockScaledState:
    """exponents (*other axes, blocks along the axis), int16: the scale of a block is 2 to this;
    codes of the weights' shape, uint8 up to 8 bits, else int32: the sign above the magnitude's
    code; dtype of the weights.
    """

    exponents: Tensor
    codes: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Element:
    """Small floats: `mantissa` bits m after the leading one, exponents from `lowest` on.

    The magnitude of code c is c 2^(lowest − m) up to c = 2^(m+1); from there on the spacing doubles
    every 2^m codes, as in the bit patterns of floats. Codes end at `top`. A grid that ends before
    2^(m+1) is uniform: integers.
    """

    mantissa: int
    lowest: int
    top: int

    @property
    def largest(self) -> float:
        return self.magnitude(self.top)

    @property
    def uniform(self) -> bool:
        return self.top < 2 << self.mantissa

    @property
    def ceiling(self) -> float:
        """The power of two above the largest magnitude."""
        return 2.0 ** math.frexp(self.largest)[1]

    @property
    def step(self) -> float:
        """Between the two largest magnitudes."""
        return self.largest - self.magnitude(self.top - 1)

    def magnitude(self, code: int) -> float:
        octave = max((code >> self.mantissa) - 1, 0)
        units = code - (octave << self.mantissa)
        return math.ldexp(units, self.lowest + octave - self.mantissa)

    def codes(self, t: Tensor, rounding: Rounding) -> Tensor:
        """Codes, as whole numbers in the type of t, of magnitudes t >= 0; the top one beyond."""
        unit = 2.0 ** (self.mantissa - self.lowest)
        t = t.clamp_max(2 * self.ceiling)
        if self.uniform:
            return rounding(t * unit).clamp_max_(self.top)
        fraction, exponent = torch.frexp(t)
        octave = (exponent - 1 - self.lowest).clamp_min_(0)
        low = t < 2.0**self.lowest
        units = torch.where(low, t * unit, fraction * 2.0 ** (self.mantissa + 1))
        return (rounding(units) + torch.where(low, 0, octave) * (1 << self.mantissa)).clamp_max_(
            self.top
        )

    def rounded_floats(self, t: Tensor, rounding: Rounding) -> Tensor:
        """The magnitudes of `codes(t)`, without the codes. t >= 0 float32 is overwritten."""
        t = t.clamp_max_(2 * self.ceiling)
        if self.uniform:
            unit = 2.0 ** (self.mantissa - self.lowest)
            return rounding(t.mul_(unit)).clamp_max_(self.top).mul_(1 / unit)
        # the spacing around t: 2 to its exponent, at least `lowest`, less the mantissa bits
        spacing = t.view(torch.int32) >> 23
        spacing = spacing.clamp_min_(self.lowest + 127).sub_(self.mantissa)
        step = spacing.bitwise_left_shift_(23).view(torch.float32)
        return rounding(t.div_(step)).mul_(step).clamp_max_(self.largest)


@lru_cache(maxsize=64)
def _values(element: Element, width: int) -> Tensor:
    """What each code of `width` bits stands for, in float64; the upper half is negative."""
    magnitudes = [element.magnitude(min(c, element.top)) for c in range(1 << (width - 1))]
    positive = torch.tensor(magnitudes, dtype=torch.float64)
    return torch.cat((positive, -positive))


def power(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """2 to the given exponents, exactly on every device: written into the bits of float64."""
    bits = torch.bitwise_left_shift(exponents.long() + 1023, 52)
    return bits.view(torch.float64).to(dtype)


class BlockScaled(Format[BlockScaledState]):
    """Elements times a power of two, one for each block of consecutive weights along an axis.

    `scale="best"` finds the exponent of least Σ h (w − q)² of each block, exactly:

    * Doubling a magnitude of these formats gives another one, or one beyond the largest. So a grid
      that reaches the block's largest weight contains all values of the next coarser grid up to its
      own end, and those beyond are further from every weight than that end is: no exponent above
      the least one that reaches all weights of importance > 0 is better than it.
    * Below, weights beyond the largest value V 2^e are clipped, which alone costs
      Σ h (|w| − V 2^e)₊². That only grows as e falls, so the search ends where it exceeds the least
      error found.

    In a tie the exponent of the reference stays.
    """

    axis: int
    block: int
    scale: Literal["reference", "best"]

    @property
    @abstractmethod
    def _element(self) -> Element: ...

    @property
    @abstractmethod
    def _width(self) -> int:
        """Bits of an element, sign included."""

    @property
    @abstractmethod
    def first(self) -> int:
        """The exponent that is stored as 0."""

    @property
    def last(self) -> int:
        """The largest exponent that can be stored."""
        return self.first + (1 << _EXPONENT_BITS) - 1

    @property
    def nearest(self) -> Rounding:
        """The rounding of magnitudes to whole numbers."""
        return torch.round

    @abstractmethod
    def reference(self, largest: Tensor) -> Tensor:
        """The exponents, int32, that the format prescribes for blocks of these maxima; what cannot
        be stored is clamped.
        """

    def _check(self) -> None:
        check_whole(self, block=self.block, axis=self.axis)
        if self.block < 1:
            raise ValueError(f"{self}: block must be at least 1.")
        if self.scale not in ("reference", "best"):
            raise ValueError(f'{self}: scale must be "reference" or "best".')

    @property
    def exact(self) -> bool:
        return self.scale == "best"

    @property
    def exact_weighted(self) -> bool:
        return self.scale == "best"

    @property
    def keeps_zero(self) -> bool:
        return True

    @property
    def scale_of_largest(self) -> bool:
        return self.scale == "reference"

    def _groups(self, shape: torch.Size) -> Groups:
        _, length = Groups(self.block, self.axis).lines(shape)
        return Groups(min(self.block, length), self.axis)  # a short axis is not padded to a block

    def exponent_shape(self, shape: torch.Size) -> torch.Size:
        """Of the exponents."""
        axis, size = self.axis % len(shape), self._groups(shape).m
        return torch.Size((*shape[:axis], *shape[axis + 1 :], -(-shape[axis] // size)))

    def block_ids(self, shape: torch.Size, device: torch.device | None = None) -> Tensor:
        groups, layout = self._groups(shape), self.exponent_shape(shape)
        ids = torch.arange(layout.numel(), device=device)[:, None].expand(-1, groups.m)
        return groups.merge(ids, shape)

    def bits_per_element(self, shape: torch.Size, dtype: torch.dtype = torch.float32) -> float:
        shape = torch.Size(shape)
        return self._width + _EXPONENT_BITS * self.exponent_shape(shape).numel() / shape.numel()

    def solve(
        self,
        w: Tensor,
        warm: BlockScaledState | None,
        mu: float | None,
        importance: Tensor | None,
    ) -> BlockScaledState:
        groups = self._groups(w.shape)
        x = groups.split(working(w), 0.0)
        exponents = self.reference(x.abs().amax(1))
        if self.scale == "best":
            h = None
            if importance is not None:
                h = groups.split(importance.to(w.device, torch.float64).expand(w.shape), 0.0)
            exponents = self._best(x, h, exponents)
        return self._state(w, x, exponents, self.nearest)

    @torch.no_grad()
    def quantize(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """As every format's; float32 goes straight to the values, several times as fast as by
        codes, since activations are quantized in every forward pass.
        """
        if generator is not None or x.dtype != torch.float32 or self.scale != "reference":
            return super().quantize(x, generator)
        check_weights(self, x)
        groups = self._groups(x.shape)
        rows = groups.split(x.detach(), 0.0)
        magnitudes = rows.abs()
        scale = power(self.reference(magnitudes.amax(1)), torch.float32)[:, None]
        q = self._element.rounded_floats(magnitudes.div_(scale), self.nearest).mul_(scale)
        q = q.clamp_max_(torch.finfo(torch.float32).max).copysign_(rows)
        return groups.merge(q, x.shape)

    def with_scales(
        self, w: Tensor, state: BlockScaledState, rounding: Rounding | None = None
    ) -> BlockScaledState:
        x = self._groups(w.shape).split(working(w), 0.0)
        return self._state(w, x, state.exponents.reshape(-1), rounding or self.nearest)

    def _state(
        self, w: Tensor, x: Tensor, exponents: Tensor, rounding: Rounding
    ) -> BlockScaledState:
        codes = self._groups(w.shape).merge(self._codes(x, exponents, rounding), w.shape)
        layout = exponents.to(torch.int16).view(self.exponent_shape(w.shape))
        return BlockScaledState(layout, codes.contiguous(), w.dtype)

    def _codes(self, x: Tensor, exponents: Tensor, rounding: Rounding) -> Tensor:
        """Codes of x (blocks, n)."""
        scaled = x.abs() / power(exponents, x.dtype)[:, None]
        codes = self._element.codes(scaled, rounding).to(torch.int32)
        codes += torch.signbit(x).int() << (self._width - 1)
        return codes.to(torch.uint8) if self._width <= 8 else codes

    def _decoded(self, codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of codes (blocks, n)."""
        values = _values(self._element, self._width).to(codes.device, dtype)
        limit = torch.finfo(dtype).max  # of the weights' type the grid may reach beyond the end
        return (looked_up(values, codes) * power(exponents, dtype)[:, None]).clamp_(-limit, limit)

    def _best(self, x: Tensor, h: Tensor | None, exponents: Tensor) -> Tensor:
        """The exponents (blocks,) of least error, none worse than those given."""
        u = x.abs().double()
        least = self._error(x, h, exponents)
        fraction, high = torch.frexp((u if h is None else torch.where(h > 0, u, 0)).amax(1))
        reach, above = math.frexp(self._element.largest)
        high = (high - above + (fraction > reach)).clamp_(self.first, self.last)  # reaches all
        rows = torch.arange(len(x), device=x.device)
        while rows.numel():
            error = self._error(x, h, high)
            better = error < least[rows]
            exponents[rows] = torch.where(better, high, exponents[rows])
            least[rows] = torch.where(better, error, least[rows])
            high = high - 1
            clipped = (u - self._element.largest * power(high, u.dtype)[:, None]).clamp_min_(0)
            cost = _weighted(clipped, h)
            alive = torch.nonzero((cost < least[rows]) & (high >= self.first)).reshape(-1)
            rows, high, x, u = rows[alive], high[alive], x[alive], u[alive]
            h = None if h is None else h[alive]
        return exponents

    def _error(self, x: Tensor, h: Tensor | None, exponents: Tensor) -> Tensor:
        """Σ h (x − q)² of each block, in float64."""
        q = self._decoded(self._codes(x, exponents, self.nearest), exponents, x.dtype)
        return _weighted(x.double() - q, h)

    def widest_cell(self, x: Tensor) -> Tensor:
        element, groups = self._element, self._groups(x.shape)
        blocks = groups.split(working(x), 0.0)
        state = self.solve(x.detach(), None, None, None)
        scale = power(state.exponents.reshape(-1), torch.float64)
        reached = blocks.abs().amax(1).double() / scale
        if self.scale == "reference":
            reached = reached.clamp_min(element.ceiling)  # the largest maximum of this scale
        cell = (reached - element.largest + element.step / 2).clamp_min(element.step) * scale
        spread = cell[:, None].expand(-1, groups.m)
        return groups.merge(spread, x.shape).to(blocks.dtype)

    def reconstruct(self, state: BlockScaledState) -> Tensor:
        shape, dtype = state.codes.shape, torch.promote_types(state.dtype, torch.float32)
        groups = self._groups(shape)
        values = self._decoded(groups.split(state.codes, 0), state.exponents.reshape(-1), dtype)
        return rounded(groups.merge(values, shape).contiguous(), state.dtype, None)

    def encode(self, state: BlockScaledState) -> dict[str, Field]:
        exponents = (state.exponents - self.first).to(torch.uint8)
        return {
            "exponents": Field(exponents, Fixed(_EXPONENT_BITS)),
            "codes": Field(state.codes, Fixed(self._width), per_weight=True),
        }

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> BlockScaledState:
        codes = arrays["codes"].reshape(shape).to(torch.uint8 if self._width <= 8 else torch.int32)
        exponents = arrays["exponents"].to(torch.int16) + self.first
        state = BlockScaledState(exponents.reshape(self.exponent_shape(codes.shape)), codes, dtype)
        if not self.admits(state):
            raise ValueError(
                f"{self}: damaged fields, exponents {int(exponents.min())} to "
                f"{int(exponents.max())} of at most {self.last}, magnitudes up to code "
                f"{int(self._magnitudes(codes).max())} of at most {self._element.top}."
            )
        return state

    def admits(self, state: BlockScaledState) -> bool:
        return (
            state.exponents.shape == self.exponent_shape(state.codes.shape)
            and bool((state.exponents >= self.first).all())
            and bool((state.exponents <= self.last).all())
            and int(self._magnitudes(state.codes).max()) <= self._element.top
        )

    def _magnitudes(self, codes: Tensor) -> Tensor:
        return codes & ((1 << (self._width - 1)) - 1)

    def ops(self, state: BlockScaledState, positions: int = 1) -> Ops:
        """Products with small elements count as such; each scale multiplies once."""
        terms = int((self._magnitudes(state.codes) != 0).sum())
        sums = scale_ops(state.codes.shape, state.exponents.numel(), terms, positions)
        return sums + Ops(positions * terms, 0)


def _weighted(error: Tensor, h: Tensor | None) -> Tensor:
    squares = error.square()
    return (squares if h is None else h * squares).sum(1)
