"""Low-rank matrices: the product of a tall and a wide factor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from scipy.linalg import LinAlgError, eigh
from torch import Tensor

from .coding import Raw
from .part import Field, Ops, Part, check_value_dtype, rounded, working

Factors: TypeAlias = tuple[Tensor, Tensor]

SWEEPS = 200  # of the majorisation, at most
WARM_SWEEPS = 20  # from a warm start: in a sum the other terms move between the calls anyway
_SETTLED = 1e-7  # relative decrease of the error that ends it
_SEPARABLE = 1e-6  # relative difference from a product that is put down to rounding
_SMALL = 64  # up to this side float64 costs as little as float32, and all eigenvectors as some
_LOSS = 2.5e-7  # share of the error that the eigenvectors may lose before they are computed anew


@dataclass(frozen=True, eq=False)
class LowRankState:
    """left (out, r) and right (r, in), in the weights' dtype."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]


@dataclass(frozen=True)
class LowRank(Part[LowRankState]):
    """Matrices of rank at most `rank`.

    Solves   min Σ h (w − U V)²   over U (out, rank), V (rank, in)

    * without importance: exactly, by truncating the singular value decomposition
      (papers/learning-compression.md, section 3; Eckart and Young, Psychometrika 1936). Singular
      vectors are the leading eigenvectors of the smaller Gram matrix, in float32 for weights of at
      most that precision. Their spectrum bounds what rounding can have cost; where that is more
      than 1e-6 of the error (next to low-rank weights, steep spectra), they are computed again in
      float64, and then by the decomposition itself.
    * importance h = a bᵀ: exactly, by the decomposition of √h w. Δ is 0 in rows and columns without
      importance.
    * other importance: NP-hard (Gillis and Glineur, SIAM J. Matrix Anal. Appl. 2011,
      arXiv:1012.0197). With a bᵀ >= h and p = h / a bᵀ, the error is majorised at the current Δ by
      Σ a bᵀ (p w + (1 − p) Δ − U V)², solved as above (for equal a and b: Srebro and Jaakkola,
      Weighted low-rank approximations, ICML 2003): repeat, with momentum that restarts where the
      error would rise, until it settles. Starts from the best of the warm start and the solutions
      for h = 1 and for h = a bᵀ, and ends no worse.

    Exact up to the rounding of the factors to w's dtype and to `value_dtype`; with a `value_dtype`
    the part does not claim to be exact. Ties in the spectrum are broken by `torch.linalg`. The last
    bits of the factors depend on the number of threads, as those of matrix products do.

    Args:
        rank: number of columns of U, at least 0, which gives Δ = 0. `rank >= min(out, in)`
            reproduces `w` to rounding.
        value_dtype: how the factors are stored; None: in the weights' dtype.

    State:
        left (out, r), right (r, in), in w's dtype, with r = min(rank, out, in). Column i of `left`
        and row i of `right` have equal norms; the largest entry of each column is positive.

    Cost: O(out · in · min(out, in)) time per projection, little more than that of W Wᵀ; up to 200
    times that for an importance that is not a product. Stores r (out + in) floats; applies in
    r (out + in) mults.

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
        x, exponent = scaled(working(w))
        rank, eps = min(self.rank, *w.shape), torch.finfo(x.dtype).eps
        if importance is None or not bool(importance.any()):
            left, right = truncated(x, rank, eps)
        else:
            h = importance.double().expand(w.shape)
            starts = [] if warm is None else [(warm.left, warm.right.double() * 2.0**-exponent)]
            goes_on = warm is not None and warm.rank <= rank
            sweeps = WARM_SWEEPS if goes_on else SWEEPS
            left, right = weighted(x.double(), h / h.max(), starts, rank, eps, sweeps)
        return LowRankState(*finished(left, right, exponent, w.dtype, self.value_dtype))

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


def scaled(w: Tensor) -> tuple[Tensor, int]:
    """w · 2^−e and e, so that squares neither overflow nor vanish: e is even, and 0 where it can
    be. Each factor then takes its half.
    """
    low, high = torch.aminmax(w)
    exponent = 2 * max(-500, (math.frexp(max(-float(low), float(high)))[1] + 1) // 2)
    if abs(exponent) <= 32:
        return w, 0
    return w * 2.0**-exponent, exponent


def shifted(x: float, power: int) -> float:
    """x · 2^power, infinite where that is too large."""
    try:
        return math.ldexp(x, power)
    except OverflowError:
        return math.inf


def product(left: Tensor, right: Tensor) -> Tensor:
    """U V in float64."""
    return left.double() @ right.double()


def finished(
    left: Tensor, right: Tensor, exponent: int, dtype: torch.dtype, value_dtype: torch.dtype | None
) -> Factors:
    """The factors as a state holds them: scales split evenly, that of `scaled` undone, rounded."""
    left, right = _balanced(left, right)
    if exponent:
        left, right = left * 2.0 ** (exponent // 2), right * 2.0 ** (exponent // 2)
    return rounded(left, dtype, value_dtype), rounded(right, dtype, value_dtype)


def truncated(x: Tensor, rank: int, eps: float) -> Factors:
    """Factors (m, rank), (rank, n) of the best approximation of x (m, n), float32 or float64, to
    weights of relative precision `eps`.

    The factor of the smaller side has orthonormal vectors, in the order of the singular values.
    """
    if x.shape[0] > x.shape[1]:
        left, right = truncated(x.mT, rank, eps)
        return right.mT, left.mT
    if rank == 0:
        return x[:, :0], x[:0]
    coarse = x.dtype == torch.float32 and x.shape[0] > _SMALL
    for dtype in (torch.float32, torch.float64) if coarse else (torch.float64,):
        y = x.to(dtype)
        gram = _gram(y)
        values, u = _leading(gram, rank)
        right = u.mT @ y  # s Vᵀ, and the best right factor whatever the rounding of u
        if _accurate(values, right, gram.diagonal().sum(dtype=torch.float64), eps):
            return u, right
    y = x.double()
    u = torch.linalg.svd(y, full_matrices=False)[0][:, :rank]
    return u, u.mT @ y


def spectrum(x: Tensor, eps: float) -> Tensor:
    """The squared singular values of x (m, n) in descending order, in float64."""
    if eps < 1e-10:
        values: Tensor = torch.linalg.svdvals(x.double())
        return values.square()
    y = x.double() if x.shape[0] <= x.shape[1] else x.double().mT
    values = torch.linalg.eigvalsh(_gram(y))  # ascending
    return values.flip(0).clamp_min(0)


def _gram(x: Tensor) -> Tensor:
    """x xᵀ. On the CPU by numpy, whose product of a matrix and its transpose does half the work."""
    if x.device.type != "cpu":
        return x @ x.mT
    rows = x.detach().numpy()
    product: Tensor = torch.from_numpy(rows @ rows.T)
    return product


def _leading(gram: Tensor, count: int) -> Factors:
    """The count + 1 largest eigenvalues (all, if that is more than a few), descending, and the
    orthonormal eigenvectors of the first `count`.
    """
    size = gram.shape[0]
    if gram.device.type == "cpu" and size > _SMALL and 4 * count <= size:
        ends = (size - count - 1, size - 1)
        try:
            found, vectors = eigh(
                gram.numpy(), subset_by_index=ends, driver="evr", check_finite=False
            )
        except LinAlgError:  # inverse iteration did not converge
            found, vectors = np.empty(0), np.empty((size, 0))
        if found.size == count + 1:  # of equal eigenvalues bisection may miss some
            u = torch.from_numpy(vectors).flip(1)[:, :count]
            return torch.from_numpy(found).flip(0), torch.linalg.qr(u)[0]  # orthogonal to eps
    values, u = torch.linalg.eigh(gram)  # ascending
    return values.flip(0), u.flip(1)[:, :count]


def _accurate(values: Tensor, right: Tensor, total: Tensor, eps: float) -> bool:
    """Whether the subspace of computed eigenvectors loses next to nothing against the best one.

    With Gram matrix G, computed G + E and E of norm e, turning the computed vector of eigenvalue λᵢ
    towards those beyond the rank r would gain at most e²/(λᵢ − λᵣ₊₁), and never more than 2e. e is
    judged by the machine precision and by how far the λᵢ are from the energy ‖uᵢᵀ w‖² that the
    vectors hold. Accepted is a share of the error, or what rounding the factors costs anyway.
    """
    rank, precision = right.shape[0], torch.finfo(values.dtype).eps
    wanted = (values.double(), right.double().square().sum(1), total.reshape(1))
    numbers: list[float] = torch.cat(wanted).tolist()  # at once: each would wait for the device
    found, held, energy = numbers[: -rank - 1], numbers[-rank - 1 : -1], numbers[-1]
    misses = [abs(x - y) for x, y in zip(found, held, strict=False)]
    noise = 2 * max(precision * found[0], *misses)
    loss = 0.0
    if rank < len(found):  # else nothing is beyond the rank
        loss = sum(noise * min(2.0, noise / max(x - found[rank], 1e-300)) for x in found[:rank])
    tail = energy - sum(held) - 16 * precision * energy
    if math.isnan(tail):
        return False
    return loss <= _LOSS * max(0.0, tail) + (4 * eps) ** 2 * energy


def envelope(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A product a bᵀ >= h (m, n), as a (m, 1) and b (n,), and h / a bᵀ: 1 where h is a product."""
    a = h.amax(1, keepdim=True)
    b = torch.where(a > 0, h / a, 0).amax(0)  # touches h in each column
    p = torch.where(a * b > 0, h / (a * b), 1)
    return a, b, torch.where(p >= 1 - _SEPARABLE, 1, p)


def weighted(
    x: Tensor, h: Tensor, starts: Sequence[Factors], rank: int, eps: float, sweeps: int
) -> Factors:
    """Factors for an importance h (m, n) of maximum 1 and x in float64: exact if h is a product,
    else by descent.
    """
    a, b, p = envelope(h)
    a, b = a.sqrt(), b.sqrt()

    def majorised(target: Tensor) -> Factors:
        left, right = truncated(a * target * b, rank, eps)
        return torch.where(a > 0, left / a, 0), torch.where(b > 0, right / b, 0)

    best = majorised(x)
    if bool((p == 1).all()):
        return best

    def error_of(factors: Factors) -> float:
        return float((h * (x - product(*factors)).square()).sum())

    plain = truncated(x, rank, eps)
    if error_of(plain) < error_of(best):
        best = plain
    lead, error = best, error_of(best)
    for start in starts:
        if error_of(start) < error:
            lead, error = start, error_of(start)  # of any rank: it only leads
    least = error_of(best)
    current = before = product(*lead)
    momentum = 0
    for _ in range(sweeps):
        ahead = current + momentum / (momentum + 3) * (current - before)
        factors = majorised(p * x + (1 - p) * ahead)
        now = error_of(factors)
        if now > error and momentum:
            momentum = 0  # too far: step again, from where the error cannot rise
            continue
        if now < least:
            best, least = factors, now
        if abs(error - now) <= _SETTLED * error:
            break
        before, current, error, momentum = current, product(*factors), now, momentum + 1
    return best


def _balanced(left: Tensor, right: Tensor) -> Factors:
    """The same product, scales split evenly, the largest entry of each left column positive."""
    a, b = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    tiny = torch.finfo(left.dtype).tiny
    share = (a * b).sqrt()
    peaks = left.gather(0, left.abs().argmax(0, keepdim=True))[0]
    left = left * (share / a.clamp_min(tiny)).copysign(peaks)
    return left, right * (share / b.clamp_min(tiny)).copysign(peaks)[:, None]
