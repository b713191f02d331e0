"""Low-rank matrices: the product of a tall and a wide factor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .coding import Raw
from .part import Field, Ops, Part, check_value_dtype, rounded, working

_SWEEPS = 200  # of the majorisation, at most
_WARM_SWEEPS = 20  # from a warm start: in a sum the other terms move between the calls anyway
_SETTLED = 1e-7  # relative decrease of the error that ends it
_SEPARABLE = 1e-6  # relative difference from a product that is put down to rounding


@dataclass(frozen=True, eq=False)
class LowRankState:
    """left (out, r) and right (r, in), in the weights' dtype."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class LowRank(Part[LowRankState]):
    """Matrices of rank at most `rank`.

    Solves   min Σ h (w − U V)²   over U (out, rank), V (rank, in)

    * without importance: exactly, by truncating the singular value decomposition
      (papers/learning-compression.md, section 3; Eckart and Young, Psychometrika 1936). Singular
      vectors come from the smaller Gram matrix in float64; for float64 weights from the
      decomposition itself, as the Gram matrix would cost them half their digits.
    * importance h = a bᵀ: exactly, by the decomposition of √h w. Δ is 0 in rows and columns without
      importance.
    * other importance: NP-hard (Gillis and Glineur, SIAM J. Matrix Anal. Appl. 2011,
      arXiv:1012.0197). With a bᵀ >= h and p = h / a bᵀ, the error is majorised at the current Δ by
      Σ a bᵀ (p w + (1 − p) Δ − U V)², solved as above (for equal a and b: Srebro and Jaakkola,
      Weighted low-rank approximations, ICML 2003): repeat, with momentum that restarts where the
      error would rise, until it settles. Starts from the best of the warm start and the solutions
      for h = 1 and for h = a bᵀ, and ends no worse.

    Exact up to the rounding of the factors to w's dtype and to `value_dtype`; with a `value_dtype`
    the part does not claim to be exact. Ties in the spectrum are broken by `torch.linalg`.

    Args:
        rank: number of columns of U, at least 0, which gives Δ = 0. `rank >= min(out, in)`
            reproduces `w` to rounding.
        value_dtype: how the factors are stored; None: in the weights' dtype.

    State:
        left (out, r), right (r, in), in w's dtype, with r = min(rank, out, in). Column i of `left`
        and row i of `right` have equal norms; the largest entry of each column is positive.

    Cost: O(out · in · min(out, in)) time per projection, up to 200 times that for an importance
    that is not a product; stores r (out + in) floats; applies in r (out + in) mults.

    Raises:
        ValueError: `rank` < 0, `w` is not a matrix (see a convolution as one with
            `.over(Matrix())`), or a `value_dtype` that is not floating point.
    """

    rank: int
    value_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_value_dtype(self, self.value_dtype)
        if self.rank < 0:
            raise ValueError(f"{self}: rank must be >= 0.")

    @property
    def exact(self) -> bool:
        return self.value_dtype is None

    @property
    def free(self) -> tuple[str, ...]:
        return ("left", "right")

    def solve(
        self, w: Tensor, warm: LowRankState | None, mu: float | None, importance: Tensor | None
    ) -> LowRankState:
        if w.dim() != 2:
            raise ValueError(
                f"{self} projects matrices, got shape {tuple(w.shape)}. "
                "See a convolution as one with `.over(Matrix())`."
            )
        # an even power of two: squares neither overflow nor vanish, and each factor takes its half
        exponent = 2 * max(-500, (math.frexp(float(w.abs().max()))[1] + 1) // 2)
        x = w.double() * 2.0**-exponent
        rank, accurate = min(self.rank, *w.shape), w.dtype == torch.float64
        if importance is None or not bool(importance.any()):
            left, right = _truncated(x, rank, accurate)
        else:
            h = importance.double().expand(w.shape)
            start = None if warm is None else _product(warm) * 2.0**-exponent
            goes_on = warm is not None and warm.left.shape[1] <= rank
            sweeps = _WARM_SWEEPS if goes_on else _SWEEPS
            left, right = _weighted(x, h / h.max(), start, rank, accurate, sweeps)
        left, right = _balanced(left, right)
        half = 2.0 ** (exponent // 2)
        return LowRankState(
            rounded(left * half, w.dtype, self.value_dtype),
            rounded(right * half, w.dtype, self.value_dtype),
        )

    def reconstruct(self, state: LowRankState) -> Tensor:
        product = working(state.left) @ working(state.right)
        return rounded(product, state.left.dtype, None)

    def encode(self, state: LowRankState) -> dict[str, Field]:
        stored = self.value_dtype or state.left.dtype
        return {
            "left": Field(state.left.to(stored), Raw(stored)),
            "right": Field(state.right.to(stored), Raw(stored)),
        }

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> LowRankState:
        return LowRankState(arrays["left"].to(dtype), arrays["right"].to(dtype))

    def free_shapes(self, shape: torch.Size, arrays: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        r = min(self.rank, *shape)
        return {"left": torch.Size((shape[0], r)), "right": torch.Size((r, shape[1]))}

    def admits(self, state: LowRankState) -> bool:
        factors = (state.left, state.right)
        return state.left.shape[1] <= self.rank and all(
            torch.equal(rounded(f, f.dtype, self.value_dtype), f) for f in factors
        )

    def ops(self, state: LowRankState, positions: int = 1) -> Ops:
        (m, r), n = state.left.shape, state.right.shape[1]
        adds = max(r * (n - 1) + m * (r - 1), 0)
        return Ops(positions * r * (m + n), positions * adds)


def _product(state: LowRankState) -> Tensor:
    return state.left.double() @ state.right.double()


def _truncated(x: Tensor, rank: int, accurate: bool) -> tuple[Tensor, Tensor]:
    """Factors (m, rank), (rank, n) of the best approximation of x (m, n), float64.

    The factor of the smaller side has orthonormal vectors, in the order of the singular values.
    """
    if x.shape[0] > x.shape[1]:
        left, right = _truncated(x.T, rank, accurate)
        return right.T, left.T
    if accurate:
        u = torch.linalg.svd(x, full_matrices=False)[0][:, :rank]
    else:
        u = torch.linalg.eigh(x @ x.T)[1].flip(1)[:, :rank]  # ascending: the last are the largest
    return u, u.T @ x  # s Vᵀ, and the best right factor whatever the rounding of u


def _weighted(
    x: Tensor, h: Tensor, start: Tensor | None, rank: int, accurate: bool, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Factors for an importance h (m, n) of maximum 1: exact if it is a product, else by
    descent.
    """
    # the envelope a bᵀ >= h: it touches h in each column, and a product is its own
    a = h.amax(1, keepdim=True)
    b = torch.where(a > 0, h / a, 0).amax(0)
    envelope = a * b
    p = torch.where(envelope > 0, h / envelope, 1)
    a, b = a.sqrt(), b.sqrt()

    def truncated(target: Tensor) -> tuple[Tensor, Tensor]:
        left, right = _truncated(a * target * b, rank, accurate)
        return torch.where(a > 0, left / a, 0), torch.where(b > 0, right / b, 0)

    best = truncated(x)
    if bool((p >= 1 - _SEPARABLE).all()):
        return best

    def error_of(approximation: Tensor) -> float:
        return float((h * (x - approximation).square()).sum())

    plain = _truncated(x, rank, accurate)
    if error_of(plain[0] @ plain[1]) < error_of(best[0] @ best[1]):
        best = plain
    current = best[0] @ best[1]
    least = error = error_of(current)
    if start is not None and error_of(start) < error:
        current, error = start, error_of(start)  # of a higher rank, perhaps: then it only leads
    before, momentum = current, 0
    for _ in range(sweeps):
        ahead = current + momentum / (momentum + 3) * (current - before)
        factors = truncated(p * x + (1 - p) * ahead)
        approximation = factors[0] @ factors[1]
        now = error_of(approximation)
        if now > error and momentum:
            momentum = 0  # too far: step again, from where the error cannot rise
            continue
        if now < least:
            best, least = factors, now
        if abs(error - now) <= _SETTLED * error:
            break
        before, current, error, momentum = current, approximation, now, momentum + 1
    return best


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, scales split evenly, the largest entry of each left column positive."""
    a, b = left.norm(dim=0), right.norm(dim=1)
    tiny = torch.finfo(torch.float64).tiny
    share = (a * b).sqrt()
    peaks = left.gather(0, left.abs().argmax(0, keepdim=True))[0]
    left = left * (share / a.clamp_min(tiny)).copysign(peaks)
    return left, right * (share / b.clamp_min(tiny)).copysign(peaks)[:, None]
