"""Binary plus sparse: the exact joint C steps, for a budget and for a price."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..binary import Binary, BinaryState
from ..order import extremes, largest, sort_rows
from ..part import Part, rounded, working
from ..sparse import Sparse, SparsePenalty, SparseState
from .registry import register


def _both_store_exactly(binary: Any, sparse: Any) -> bool:
    """With the scale rounded another window may be better."""
    return binary.value_dtype is None and sparse.value_dtype is None


def _one_learned_scale(binary: Any, sparse: Any) -> bool:
    return binary.axis is None and binary.group is None and binary.scale is None


def _correct(
    binary: Binary,
    sparse: Part[SparseState],
    w: Tensor,
    scale: Tensor,
    mu: float | None,
    h: Tensor | None,
) -> tuple[BinaryState, SparseState]:
    """The best states for a given scale: nearest sign everywhere, then the best corrections of what
    is left.
    """
    state = BinaryState(rounded(scale.reshape(1), w.dtype, binary.value_dtype), w >= 0)
    residual = rounded(working(w) - working(binary.reconstruct(state)), w.dtype, None)
    return state, sparse.solve(residual, None, mu, h)


def _kept_mean(u: Tensor, h: Tensor, dropped: Tensor) -> Tensor:
    kept = torch.where(dropped, 0.0, h)
    return (kept * u).sum() / kept.sum().clamp_min(torch.finfo(torch.float64).tiny)


def _trimmed(
    u: Tensor, h: Tensor, starts: list[Tensor], drop: Callable[[Tensor], Tensor], price: float
) -> Tensor:
    """Weighted case, local: from each start alternate kept set and weighted mean; the best scale
    found.

    With unequal importance the corrected entries, the largest h (u − a)², are no longer the outside
    of a window of sorted u. Each half step lowers Σ_kept h (u − a)² + price·corrections, so the
    alternation ends; the better of the starts is returned.
    """
    best, best_error = starts[0], float("inf")
    for scale in starts:
        error = float("inf")
        for _ in range(100):
            cost = h * (u - scale) ** 2
            dropped = drop(cost)
            paid = price * dropped.sum(dtype=torch.float64)
            now = float(torch.where(dropped, 0.0, cost).sum() + paid)
            if now < best_error:
                best, best_error = scale, now
            if not now < error:
                break
            error, scale = now, _kept_mean(u, h, dropped)
    return best


def _starts(
    u: Tensor, h: Tensor, scale: Tensor, warm: tuple[BinaryState, Any] | None
) -> list[Tensor]:
    """The scale for equal importance, and the warm one, or cold the mean and the quartiles."""
    if warm is not None:
        return [scale, warm[0].scale.double().reshape(())]
    levels = torch.quantile(u[:: max(1, u.numel() // 100_000)], u.new_tensor([0.25, 0.5, 0.75]))
    return [scale, _kept_mean(u, h, torch.zeros_like(u, dtype=torch.bool)), *levels]


@register(Binary, Sparse, applies=_one_learned_scale, exact=_both_store_exactly)
def binary_sparse(
    a: Binary,
    b: Sparse,
    w: Tensor,
    warm: tuple[BinaryState, SparseState] | None,
    mu: float | None,
    importance: Tensor | None,
) -> tuple[BinaryState, SparseState]:
    """min ‖w − a s − θ‖²  s.t. ‖θ‖₀ ≤ κ, exactly (papers/learning-compression.md, 4.4), with one
    scale.

    Proof. Let u = |w|. Entries in the support of θ cost nothing; any other costs (u_i − a)², with
    s_i = sign(w_i). For a given a the best support holds the κ largest |u_i − a|, so the other N −
    κ entries are a contiguous window of sorted u; for a given window a is its mean. The least Σ(u −
    mean)² over the κ + 1 windows is therefore the minimum; the κ smallest and largest u and sums
    over all give it. O(N + κ log κ), in float64.

    With importance the kept set is no window: alternation from several starts, not worse than the
    warm start.
    """
    u = working(w).abs().reshape(-1)
    n = u.numel()
    dropped = b.budget(n)
    if dropped == n:  # any scale will do, and 0 leaves w itself: no digit is lost
        return _correct(a, b, w, u.new_zeros((), dtype=torch.float64), mu, importance)
    low, high = extremes(u, dropped)
    shift = u.mean(dtype=torch.float64)  # centred sums lose nothing to cancellation
    low1, low2 = _prefix(low.double() - shift)  # over the j smallest
    high1, high2 = _prefix(high.double().flip(0) - shift)  # over the κ − j largest, read backwards
    sums = -low1 - high1.flip(0)  # over the window: all of them are 0
    scatter = -low2 - high2.flip(0) - sums * sums / (n - dropped)  # up to a constant
    scale = shift + sums[scatter.argmin()] / (n - dropped)
    if importance is not None:
        flat, h = u.double().reshape(-1), importance.double().expand(w.shape).reshape(-1)
        scale = _trimmed(
            flat, h, _starts(flat, h, scale, warm), lambda cost: largest(cost, dropped), 0.0
        )
    return _correct(a, b, w, scale, mu, importance)


@register(Binary, SparsePenalty, applies=_one_learned_scale, exact=_both_store_exactly)
def binary_sparse_penalty(
    a: Binary,
    b: SparsePenalty,
    w: Tensor,
    warm: tuple[BinaryState, SparseState] | None,
    mu: float | None,
    importance: Tensor | None,
) -> tuple[BinaryState, SparseState]:
    """min μ/2 ‖w − a s − θ‖² + α ‖θ‖₀, exactly (papers/learning-compression.md, 4.5), with one
    scale.

    Proof. With u = |w| and t² = 2α/μ the problem is min_a Σ min((u_i − a)², t²). As a grows, the
    kept set {|u_i − a| ≤ t}, a window of sorted u, changes only when an entry enters at its right
    end or leaves at its left: at most 2N windows. Scoring each window at its own mean plus t² per
    entry outside is an upper bound of the objective at that mean, and tight at the best a, whose
    window is among them. O(N log N).

    With importance: alternation from several starts, not worse than the warm start.
    """
    if mu is None:
        b.solve(w, None, mu, importance)  # raises: a penalty form needs mu
        raise AssertionError
    u = working(w).abs().reshape(1, -1)
    n = u.numel()
    price = min(2 * b.alpha / mu, sys.float_info.max)  # a finite price of nothing is nothing
    ordered = sort_rows(u).double().reshape(-1)
    reach = 2 * price**0.5
    right = torch.searchsorted(
        ordered, ordered + reach, right=True
    )  # widest window that starts at i
    left = torch.searchsorted(ordered, ordered - reach)  # widest window that ends at j
    here = torch.arange(n, device=w.device)
    start = torch.cat([here, left, (here + 1).clamp_max(n - 1)])
    stop = torch.cat([right, here + 1, right])
    count = (stop - start).clamp_min(0)
    shift = ordered.mean()
    first, second = _prefix(ordered - shift)
    sums = first[stop] - first[start]
    spread = second[stop] - second[start] - sums * sums / count.clamp_min(1)
    score = torch.where(count > 0, spread, 0.0) + price * (n - count).double()
    best = score.argmin()
    scale = shift + sums[best] / count[best].clamp_min(1)
    if importance is not None:
        flat, h = u.double().reshape(-1), importance.double().expand(w.shape).reshape(-1)
        scale = _trimmed(flat, h, _starts(flat, h, scale, warm), lambda cost: cost > price, price)
    return _correct(a, b, w, scale, mu, importance)


def _prefix(x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ x and Σ x² over the first 0, 1, …, N entries."""
    zero = x.new_zeros(1)
    return torch.cat([zero, x.cumsum(0)]), torch.cat([zero, (x * x).cumsum(0)])
