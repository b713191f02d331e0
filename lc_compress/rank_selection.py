"""Low-rank matrices whose rank, and the shape the weights are seen in, are learned at a price."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from .coding import Fixed, Raw
from .low_rank import (
    SWEEPS,
    WARM_SWEEPS,
    Factors,
    envelope,
    finished,
    product,
    scaled,
    shifted,
    spectrum,
    truncated,
    weighted,
)
from .part import Field, Ops, Part, check_value_dtype, check_weights, rounded, working
from .sparse import check_price, weighed
from .views import Matrix, View

Cost: TypeAlias = Callable[[int, int, int], float]


@dataclass(frozen=True, eq=False)
class RankSelectionState:
    """left (rows, r) and right (r, columns), in the weights' dtype, of the matrix that
    `schemes[scheme]` makes of weights of this shape.
    """

    left: Tensor
    right: Tensor
    scheme: int
    shape: torch.Size

    @property
    def rank(self) -> int:
        """The learned rank."""
        return self.left.shape[1]


@dataclass(frozen=True)
class RankSelection(Part[RankSelectionState]):
    """Low-rank weights of a learned rank, seen as the matrix that suits them best.

    Solves   min μ/2 Σ h (w − Δ)² + α C(r)   over r, the scheme, and Δ of rank r in that scheme

    exactly where h is constant or the product of a row and a column factor, in each scheme: of
    all ranks r = 0 … R the one with the least α C(r) + μ/2 Σ_{i>r} s_i², s being the singular
    values (papers/learning-compression.md, section 3, CVPR 2020, and ICASSP 2021 for the choice of
    the shape). Ties go to the lower rank and the earlier scheme. For any other importance the
    descent of `LowRank` at one rank after the other, from the choice for the mean importance (and
    the warm start) to where both neighbours are worse: never worse than the warm start, but a
    better rank may be missed. Ranks are chosen before the factors are rounded to w's
    dtype and to `value_dtype`; with a `value_dtype` the part does not claim to be exact.

    As μ → 0 the best rank is 0. One of at least 1 needs, for the costs "storage" and "flops",
    μ > 2 α (rows + columns) · positions / s_1²   (same page, section 1): start a schedule above
    `smallest_mu(w)`, or w is drawn to 0 first.

    Args:
        alpha: price of a unit of cost, >= 0, in units of the loss.
        cost: C for a matrix (rows, columns) of rank r.
            "storage": r (rows + columns), the numbers stored.
            "flops": r (rows + columns) · positions, the multiplications of one example (as in the
                paper; a count of multiplications and additions is twice that).
            A function (rank, rows, columns) → cost, for example measured times (ICIP 2021). It
                should be one of a module, for the part to be copied and stored.
        schemes: views among which each tensor takes the one of the lowest objective; for a
            convolution `(Matrix(), KernelMatrix())`.
        positions: output positions of a convolution, for "flops" (`LC(..., example_inputs=x)`
            reports them); 1 for a linear layer.
        value_dtype: how the factors are stored; None: in the weights' dtype.

    State:
        left (rows, r), right (r, columns), as `LowRank` has them; `rank`; `scheme`, an index into
        `schemes`; shape of the weights.

    Cost: the singular values of each scheme's matrix and one projection. Stores the rank and the
        scheme in as many bits as they need; applies in r (rows + columns) mults.

    Raises:
        ValueError: an `alpha` that is negative or not finite, an unknown cost, no schemes, a
            scheme that does not fit w's shape, positions < 1 or without "flops"; a cost that is
            not finite; `project` was called without `mu`, which a penalty is weighed against.
    """

    alpha: float
    cost: str | Cost = "storage"
    schemes: tuple[View, ...] = (Matrix(),)
    positions: int = 1
    value_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "schemes", tuple(self.schemes))
        check_value_dtype(self, self.value_dtype)
        check_price(self, self.alpha)
        if not callable(self.cost) and self.cost not in ("storage", "flops"):
            raise ValueError(
                f"RankSelection: cost must be 'storage', 'flops' or a function, got {self.cost!r}."
            )
        if not self.schemes or not all(isinstance(view, View) for view in self.schemes):
            raise ValueError(f"RankSelection: schemes must be views, got {self.schemes}.")
        if self.positions < 1 or (self.positions != 1 and self.cost != "flops"):
            raise ValueError(
                f"RankSelection: positions, at least 1, belong to cost='flops', got positions="
                f"{self.positions} with cost={self.cost!r}."
            )

    def __str__(self) -> str:
        text = super().__str__()
        if not callable(self.cost):
            return text
        name = getattr(self.cost, "__name__", type(self.cost).__name__)  # not where it lies
        return text.replace(str(self.cost), name)

    @property
    def exact(self) -> bool:
        return self.value_dtype is None

    @property
    def free(self) -> tuple[str, ...]:
        return ("left", "right")

    def price(self, rank: int, rows: int, columns: int) -> float:
        """α C(rank) for a matrix of this shape."""
        if callable(self.cost):
            cost = float(self.cost(rank, rows, columns))
            if not math.isfinite(cost):
                raise ValueError(f"{self}: the cost of {rank, rows, columns} is {cost}.")
            return self.alpha * cost
        return self.alpha * rank * (rows + columns) * self.positions

    def smallest_mu(self, w: Tensor) -> float:
        """The μ above which `project` gives `w` a rank of at least 1; infinite if none does.

        min over ranks and schemes of 2 (α C(r) − α C(0)) / Σ_{i≤r} s_i²; for the costs "storage"
        and "flops" the least is at r = 1.
        """
        check_weights(self, w)
        x, exponent = scaled(working(w.detach()))
        least = math.inf
        nothing = min(self.price(0, *view.shape(w.shape)) for view in self.schemes)
        for view in self.schemes:
            prices = self._prices(view.shape(w.shape)).tolist()
            gains = spectrum(view.show(x), torch.finfo(x.dtype).eps).cumsum(0).tolist()
            for price, gain in zip(prices[1:], gains, strict=True):
                if gain > 0:
                    least = min(least, 2 * (price - nothing) / gain)
        return max(0.0, shifted(least, -2 * exponent))

    def _prices(self, shape: torch.Size) -> Tensor:
        """α C(r) for r = 0 … R, float64."""
        rows, columns = shape
        ranks = range(min(rows, columns) + 1)
        return torch.tensor([self.price(r, rows, columns) for r in ranks], dtype=torch.float64)

    def solve(
        self,
        w: Tensor,
        warm: RankSelectionState | None,
        mu: float | None,
        importance: Tensor | None,
    ) -> RankSelectionState:
        mu = weighed(self, mu)
        x, exponent = scaled(working(w))
        eps, h, peak = torch.finfo(x.dtype).eps, None, 1.0
        if importance is not None:
            h = importance.double().expand(w.shape)
            peak = float(h.max())
            h = h / peak if peak > 0 else None  # else no weight counts: the cheapest rank
        unit = min(shifted(mu * peak / 2, 2 * exponent), sys.float_info.max)
        fits: list[tuple[float, int, Factors | None, int]] = []
        for i, view in enumerate(self.schemes):
            choice = _Choice(self._prices(view.shape(w.shape)), unit, eps)
            if h is None:
                fits.append((*choice.rank(view.show(x)), None, i))
                continue
            start = None
            if warm is not None and warm.scheme == i:
                start = warm.left, warm.right.double() * 2.0**-exponent
            fits.append((*choice.weighted(view.show(x).double(), view.show(h), start), i))
        _, rank, factors, index = min(fits, key=lambda fit: fit[0])
        if factors is None:
            factors = truncated(self.schemes[index].show(x), rank, eps)
        left, right = finished(*factors, exponent, w.dtype, self.value_dtype)
        return RankSelectionState(left, right, index, w.shape)

    def reconstruct(self, state: RankSelectionState) -> Tensor:
        delta = working(state.left) @ working(state.right)
        view = self.schemes[state.scheme]
        return view.restore(rounded(delta, state.left.dtype, None), state.shape)

    def encode(self, state: RankSelectionState) -> dict[str, Field]:
        stored = self.value_dtype or state.left.dtype
        most = min(self.schemes[state.scheme].shape(state.shape))
        return {
            "scheme": _number(state.scheme, len(self.schemes) - 1),
            "rank": _number(state.rank, most),
            "left": Field(state.left.to(stored), Raw(stored)),
            "right": Field(state.right.to(stored), Raw(stored)),
        }

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> RankSelectionState:
        left, right = arrays["left"].to(dtype), arrays["right"].to(dtype)
        return RankSelectionState(left, right, int(arrays["scheme"]), torch.Size(shape))

    def free_shapes(self, shape: torch.Size, arrays: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        rows, columns = self.schemes[int(arrays["scheme"])].shape(shape)
        rank = int(arrays["rank"])
        return {"left": torch.Size((rows, rank)), "right": torch.Size((rank, columns))}

    def admits(self, state: RankSelectionState) -> bool:
        return state.scheme < len(self.schemes) and all(
            torch.equal(rounded(f, f.dtype, self.value_dtype), f) for f in (state.left, state.right)
        )

    def penalty(self, state: RankSelectionState) -> float:
        return self.price(state.rank, *self.schemes[state.scheme].shape(state.shape))

    def ops(self, state: RankSelectionState, positions: int = 1) -> Ops:
        (m, r), n = state.left.shape, state.right.shape[1]
        adds = max(r * (n - 1) + m * (r - 1), 0)
        return Ops(positions * r * (m + n), positions * adds)


@dataclass(frozen=True)
class _Choice:
    """min unit · Σ h (x − Δ)² + prices[r] over r and Δ of rank r, for x in one scheme."""

    prices: Tensor
    unit: float
    eps: float

    def rank(self, x: Tensor) -> tuple[float, int]:
        """The least value for h = 1, and the rank that has it."""
        tails = torch.zeros(len(self.prices), dtype=torch.float64)
        tails[:-1] = spectrum(x, self.eps).cpu().flip(0).cumsum(0).flip(0)
        values = self.unit * tails + self.prices
        best = int(values.argmin())  # the first of equal ones
        return float(values[best]), best

    def weighted(self, x: Tensor, h: Tensor, start: Factors | None) -> tuple[float, int, Factors]:
        """The value reached for an importance of maximum 1, its rank and factors."""
        a, b, p = envelope(h)
        if bool((p == 1).all()):
            return self._fit(x, h, self.rank(a.sqrt() * x * b.sqrt())[1], None)
        ranks = {replace(self, unit=self.unit * float(h.mean())).rank(x)[1]}
        if start is not None:
            ranks.add(start[0].shape[1])
        fits = [self._fit(x, h, rank, start) for rank in ranks]
        best = min(fits, key=lambda fit: fit[:2])
        for step in (1, -1):  # to where both neighbours are worse
            while 0 <= best[1] + step < len(self.prices):
                fit = self._fit(x, h, best[1] + step, best[2])
                if fit[0] >= best[0]:
                    break
                best = fit
        return best

    def _fit(
        self, x: Tensor, h: Tensor, rank: int, start: Factors | None
    ) -> tuple[float, int, Factors]:
        sweeps = SWEEPS if start is None else WARM_SWEEPS
        factors = weighted(x, h, [] if start is None else [start], rank, self.eps, sweeps)
        error = float((h * (x - product(*factors)).square()).sum())
        return self.unit * error + float(self.prices[rank]), rank, factors


def _number(value: int, most: int) -> Field:
    """A number from 0 to `most` in as many bits as that takes."""
    return Field(torch.tensor([value]), Fixed(most.bit_length()))
