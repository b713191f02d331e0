"""Low rank plus sparse: a local joint C step, for a budget and for a price of corrections."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..low_rank import Factors, LowRank, LowRankState, finished, scaled, shifted, truncated
from ..order import top
from ..part import Part, rounded, squared_error, working
from ..sparse import Sparse, SparsePenalty, SparseState, weighed, where
from .registry import register

_GROWTH = 16  # steps in which the corrections grow to their number
_STEPS = 200  # of the accelerated descent, at most
_COARSE = 1e-3  # relative decrease in a step that ends the descent of a second start
_FINE = 1e-7  # and of the one that is kept, as of the alternation after it

States: TypeAlias = tuple[LowRankState, SparseState]
Corrections: TypeAlias = Callable[[Tensor, float], tuple[Tensor, float]]


def _never(low: Any, sparse: Any) -> bool:
    return False


@register(LowRank, Sparse, exact=_never)
@register(LowRank, SparsePenalty, exact=_never)
def low_rank_sparse(
    a: LowRank,
    b: Part[SparseState],
    w: Tensor,
    warm: States | None,
    mu: float | None,
    importance: Tensor | None,
) -> States:
    """min ‖w − U V − θ‖²  with ‖θ‖₀ ≤ κ or at a price α ‖θ‖₀, to a local minimum
    (papers/learning-compression.md, 4.6).

    Given Δ = U V the best θ corrects the largest |w − Δ|. What is left, the function to minimise
    over Δ, is majorised at any Δ̄ by ‖t − Δ‖² with t = Δ̄ on the entries that θ corrects there and
    w elsewhere. Each step lowers that by two subspace iterations (four thin products of t and the
    factors), from a Δ̄ ahead of Δ (Nesterov's momentum, restarted where the value rises). In the
    end both terms are projected exactly, in turn, until neither gains more than 1e-7.

    A cold start projects what the largest weights leave. From there the corrections grow to their
    number step by step, which on weights of real networks ends up to a tenth lower than with all
    of them at once: too many too early, they fit what a better Δ explains. Next to huge outliers
    it is the other way round, so both are tried. A warm start is followed from where it is.

    With unequal importance: plain alternation, from both orders when cold.
    """
    if importance is not None and bool((importance == (level := importance.max())).all()):
        if level > 0:  # a matter of μ alone
            mu, importance = None if mu is None else mu * float(level), None
    problem = _Pair(a, b, w, mu, importance)
    rank, size = min(a.rank, *w.shape), w.numel()
    nothing = isinstance(b, Sparse) and b.budget(size) in (0, size)
    if importance is None and w.dim() == 2 and 0 < rank < min(w.shape) and not nothing:
        with torch.autocast(w.device.type, enabled=False):  # it would round the factors
            start = problem.accelerated(rank, warm)
        return problem.alternated(start, _FINE, 500)
    if warm is not None:
        return problem.alternated(warm, 1e-9, 500)
    starts = [problem.alternated(start, 1e-3, 20) for start in problem.greedy()]
    return problem.alternated(min(starts, key=problem.value), 1e-9, 500)


@dataclass(frozen=True)
class _Pair:
    """The problem in terms of the parts' own states."""

    low: LowRank
    sparse: Part[SparseState]
    w: Tensor
    mu: float | None
    importance: Tensor | None

    def without(self, delta: Tensor) -> Tensor:
        return rounded(working(self.w) - working(delta), self.w.dtype, None)

    def low_for(self, sparse: SparseState, warm: LowRankState | None) -> LowRankState:
        left = self.without(self.sparse.reconstruct(sparse))
        return self.low.improve(left, warm, self.mu, self.importance)

    def sparse_for(self, low: LowRankState, warm: SparseState | None) -> SparseState:
        left = self.without(self.low.reconstruct(low))
        return self.sparse.improve(left, warm, self.mu, self.importance)

    def value(self, states: States) -> float:
        low, sparse = self.low.reconstruct(states[0]), self.sparse.reconstruct(states[1])
        delta = (working(low) + working(sparse)).to(self.w.dtype)
        error = squared_error(self.w, delta, self.importance)
        return (1.0 if self.mu is None else self.mu) / 2 * error + self.sparse.penalty(states[1])

    def greedy(self) -> list[States]:
        """Each term first."""
        low = self.low.solve(self.w, None, self.mu, self.importance)
        sparse = self.sparse.solve(self.w, None, self.mu, self.importance)
        return [(low, self.sparse_for(low, None)), (self.low_for(sparse, None), sparse)]

    def alternated(self, states: States, tolerance: float, sweeps: int) -> States:
        """Exact projections in turn, until a sweep lowers the value by less than `tolerance`; the
        best states seen.
        """
        valid = self.low.admits(states[0]) and self.sparse.admits(states[1])
        best, least = states, self.value(states) if valid else math.inf
        for _ in range(sweeps):
            low = self.low_for(states[1], states[0])
            states = low, self.sparse_for(low, states[1])
            value = self.value(states)
            done = least - value <= tolerance * abs(value)
            if value < least:
                best, least = states, value
            if done:
                break
        return best

    def accelerated(self, rank: int, warm: States | None) -> States:
        """Where the accelerated descent ends, without importance."""
        tall = self.w.shape[0] > self.w.shape[1]
        x, exponent = scaled(working(self.w.mT if tall else self.w).contiguous())
        descent = _Descent(x, rank, self._corrections(exponent))
        if warm is None:
            first = descent.after(torch.zeros_like(x))  # the largest weights corrected
            factors, value = descent.run(first, _GROWTH, _FINE)
            other, least = descent.run(first, 0, _COARSE)
            if least < value * (1 + 2 * _COARSE):
                other, least = descent.run(other, 0, _FINE)
                factors = other if least < value else factors
        else:
            delta = working(warm[0].left) @ (working(warm[0].right) * 2.0**-exponent)
            delta = (delta.mT if tall else delta).contiguous()
            factors, _ = descent.run(descent.after(delta), 0, _FINE)
        left, right = (factors[1].mT, factors[0].mT) if tall else factors
        low = LowRankState(*finished(left, right, exponent, self.w.dtype, self.low.value_dtype))
        return low, self.sparse_for(low, None)

    def _corrections(self, exponent: int) -> Corrections:
        """Where θ corrects a residual of these magnitudes, growing with a share from 0 to 1, and
        what that costs, in the squared units of x.
        """
        sparse, size = self.sparse, self.w.numel()
        if isinstance(sparse, Sparse):
            budget = sparse.budget(size)
            return lambda score, share: (top(score, round(share * budget)), 0.0)
        assert isinstance(sparse, SparsePenalty)
        price = shifted(2 * sparse.alpha / weighed(sparse, self.mu), -2 * exponent)
        price = min(price, sys.float_info.max)  # a finite price of nothing is nothing

        def priced(score: Tensor, share: float) -> tuple[Tensor, float]:
            found = where(score > price**0.5)
            count = found.numel()
            return found if share == 1 else top(score, round(share * count)), price * count

        return priced


@dataclass(frozen=True)
class _Descent:
    """The accelerated descent on x, in its own precision."""

    x: Tensor
    rank: int
    corrections: Corrections

    def projected(self, target: Tensor) -> Factors:
        return truncated(target, self.rank, torch.finfo(self.x.dtype).eps)

    def after(self, delta: Tensor) -> Factors:
        """The exact step from `delta`."""
        target = torch.empty_like(self.x)
        self.fill(target, delta, 1.0, torch.empty_like(self.x))
        return self.projected(target)

    def fill(self, target: Tensor, delta: Tensor, share: float, score: Tensor) -> float:
        """Make `target` x, but `delta` where θ corrects it; the price of that."""
        found, price = self.corrections(torch.sub(self.x, delta, out=score).abs_(), share)
        target.copy_(self.x).view(-1)[found] = delta.view(-1)[found]
        return price

    def run(self, factors: Factors, growth: int, tolerance: float) -> tuple[Factors, float]:
        """The best factors seen once the corrections are complete, and the value there."""
        x = self.x
        right = factors[1].to(x.dtype)
        now = factors[0].to(x.dtype) @ right
        # buffers of the size of x, as fresh ones cost a third of the time
        before, spare, point, target, score = now, *(torch.empty_like(x) for _ in range(4))
        best, least, last, momentum = factors, math.inf, math.inf, 0
        floor = (4 * torch.finfo(x.dtype).eps) ** 2 * _energy(x)
        for step in range(1, growth + _STEPS):
            ahead = now
            if momentum:
                ahead = torch.lerp(before, now, 1 + momentum / (momentum + 3), out=point)
            price = self.fill(target, ahead, min(1.0, step / growth) if growth else 1.0, score)
            for _ in range(2):
                left = torch.linalg.qr(target @ right.mT)[0]
                right = left.mT @ target
            unused = torch.empty_like(x) if before is now else before
            before, now, spare = now, torch.mm(left, right, out=spare), unused
            momentum += 1
            if step < growth:
                continue
            value = _energy(target.sub_(now)) + price
            if value < least:
                best, least = (left, right), value
            if abs(last - value) <= tolerance * value or value <= floor:
                break
            if value > last:
                momentum = 0
            last = value
        return best, least


def _energy(x: Tensor) -> float:
    """‖x‖²: rows in x's precision, their sum in float64."""
    rows: Tensor = torch.linalg.vector_norm(x, dim=1).double()
    return float(rows @ rows)
