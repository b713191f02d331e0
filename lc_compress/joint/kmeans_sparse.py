"""A learned codebook plus sparse, trimmed k-means: joint C steps for a budget and for a price."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..codebook import CodebookState, KMeans, nearest
from ..order import largest
from ..part import rounded, squared_error, working
from ..sparse import Sparse, SparseForm, SparsePenalty, SparseState, weighed
from ..trimmed import trimmed_centres
from .registry import register

_SWEEPS = 100  # of an alternation, at most
_COARSE = 1e-6  # relative decrease in a sweep that ends it
_FINE = 1e-9  # and that of the best one

States: TypeAlias = tuple[CodebookState, SparseState]
Drop: TypeAlias = Callable[[Tensor], Tensor]  # the costs of the values -> which are dropped


def _never(codebook: Any, sparse: Any) -> bool:
    return False


def _only_codebook(codebook: Any, sparse: Any) -> bool:
    """Nothing may be corrected: k-means alone."""
    return codebook.value_dtype is None and 0 in (sparse.nonzeros, sparse.density)


@register(KMeans, Sparse, exact=_only_codebook, weighted=_only_codebook)
def kmeans_sparse(
    a: KMeans,
    b: Sparse,
    w: Tensor,
    warm: States | None,
    mu: float | None,
    importance: Tensor | None,
) -> States:
    """min ‖w − c[q] − θ‖²  s.t. ‖θ‖₀ ≤ κ over c (k,) and q: k-means of all but κ values.

    Proof. Given c, the nearest codeword everywhere leaves the least residual, and θ corrects its κ
    largest entries. So what is left to find is c with the least Σ min_j (w − c_j)² over all but the
    κ values farthest from them: `trimmed.trimmed_centres`, exact by a dynamic programme where it
    can afford that, else clusters that no alternation improves. Which of both depends on the
    weights, so the pair does not claim to be exact; how often, and how far from it, is measured in
    experiments/trimmed.py. O(N log N).

    With importance, or where a part rounds what it stores: local. From several starts, the warm one
    among them, codebook and corrections are improved in turn, in the end by the exact projections
    of both parts.
    """
    dropped = b.budget(w.numel())
    if dropped in (0, w.numel()):
        return _Pair(a, b, w, mu, importance).around(a.solve(w, None, mu, importance))
    pair = _Pair(a, b, w, mu, _unequal(importance))
    return pair.solve(warm, lambda cost: largest(cost, dropped), drop=dropped)


@register(KMeans, SparsePenalty, exact=_never)
def kmeans_sparse_penalty(
    a: KMeans,
    b: SparsePenalty,
    w: Tensor,
    warm: States | None,
    mu: float | None,
    importance: Tensor | None,
) -> States:
    """min μ/2 ‖w − c[q] − θ‖² + α ‖θ‖₀ over c (k,) and q.

    As for a budget, but θ corrects the entries whose squared residual is above 2α/μ, so what c
    minimises is Σ min(min_j (w − c_j)², 2α/μ): k-means in which no value costs more than that. With
    the same claims.
    """
    mu = weighed(b, mu)
    h = _unequal(importance)
    if importance is not None and h is None:  # a matter of μ alone
        mu *= float(importance.max())
    x = working(w).double()
    price = 2 * b.alpha / mu if mu > 0 else math.inf
    if not 0 < price < float(x.max() - x.min()) ** 2:  # all are corrected, or none
        return _Pair(a, b, w, mu, h).around(a.solve(w, None, mu, h))
    return _Pair(a, b, w, mu, h).solve(warm, lambda cost: cost > price, price=price)


def _unequal(importance: Tensor | None) -> Tensor | None:
    """None where every weight counts the same."""
    if importance is None or bool((importance == importance.max()).all()):
        return None
    return importance


@dataclass(frozen=True)
class _Pair:
    """The problem in terms of the parts' own states."""

    codebook: KMeans
    sparse: SparseForm
    w: Tensor
    mu: float | None
    importance: Tensor | None

    def solve(
        self,
        warm: States | None,
        dropped: Drop,
        *,
        drop: int | None = None,
        price: float | None = None,
    ) -> States:
        """The best states found, `drop` values or those that cost more than `price` corrected."""
        start = None
        if warm is not None and warm[0].codebook.numel() == self.codebook.k:
            start = warm[0].codebook.double().reshape(-1).sort().values
        found = trimmed_centres(
            working(self.w).detach().reshape(-1),
            self.codebook.k,
            drop=drop,
            price=price,
            warm=None if start is None else start.cpu().numpy(),
        )
        centres = torch.from_numpy(found.centres).to(self.w.device)
        if self.importance is not None:
            starts = [centres] if start is None else [centres, start]
            return self.alternated(
                self.around(self.state(self._weighted(starts, dropped, price or 0.0)))
            )
        states = self.around(self.state(centres))
        if found.certain and self.codebook.value_dtype is None and self.sparse.value_dtype is None:
            return states
        return self.alternated(states)

    def state(self, centres: Tensor) -> CodebookState:
        codebook = rounded(centres, self.w.dtype, self.codebook.value_dtype)
        return CodebookState(codebook, nearest(self.w, codebook))

    def around(self, state: CodebookState) -> States:
        """With the best corrections of what the codebook leaves."""
        left = self._without(self.codebook.reconstruct(state))
        return state, self.sparse.solve(left, None, self.mu, self.importance)

    def alternated(self, states: States) -> States:
        """Exact projections in turn, as long as a sweep lowers the value."""
        least = self._value(states)
        for _ in range(_SWEEPS):
            left = self._without(self.sparse.reconstruct(states[1]))
            new = self.around(self.codebook.solve(left, None, self.mu, self.importance))
            value = self._value(new)
            done = least - value <= _FINE * abs(value)
            if value < least:
                states, least = new, value
            if done:
                break
        return states

    def _without(self, delta: Tensor) -> Tensor:
        return rounded(working(self.w) - working(delta), self.w.dtype, None)

    def _value(self, states: States) -> float:
        codes, values = self.codebook.reconstruct(states[0]), self.sparse.reconstruct(states[1])
        delta = (working(codes) + working(values)).to(self.w.dtype)
        error = squared_error(self.w, delta, self.importance)
        return (1.0 if self.mu is None else self.mu) / 2 * error + self.sparse.penalty(states[1])

    def _weighted(self, starts: list[Tensor], dropped: Drop, price: float) -> Tensor:
        """The best centres of an alternation for values of unequal importance, from these starts
        and from the weighted k-means of all values, and of those whose size is not dropped.
        """
        assert self.importance is not None
        x, order = working(self.w).double().reshape(-1).sort(stable=True)
        h = self.importance.to(x).expand(self.w.shape).reshape(-1)[order]
        starts = [*starts, self.codebook.solve(x, None, None, h).codebook]
        kept = ~dropped(h * x * x)
        if bool(kept.any()):
            starts.append(self.codebook.solve(x[kept], None, None, h[kept]).codebook)
        found = [_climb(x, h, c, dropped, price) for c in starts]
        return min(found, key=lambda one: one[0])[1]


def _climb(
    x: Tensor, h: Tensor, centres: Tensor, dropped: Drop, price: float
) -> tuple[float, Tensor]:
    """The least value of an alternation and its centres (k,): each moves to the mean of what is
    kept around it. x (n,) and the centres ascend.
    """
    centres = centres.double()
    least, best = math.inf, centres
    for _ in range(_SWEEPS):
        cuts = torch.searchsorted(x, centres[:-1] / 2 + centres[1:] / 2).tolist()
        sizes = [b - a for a, b in pairwise([0, *cuts, x.numel()])]
        cost = h * (x - centres.repeat_interleave(torch.tensor(sizes, device=x.device))) ** 2
        drop = dropped(cost)
        value = float(torch.where(drop, price, cost).sum())
        done = not value < least * (1 - _COARSE)
        if value < least:
            least, best = value, centres
        if done:
            break
        kept = torch.where(drop, 0.0, h)
        mass = torch.stack([part.sum() for part in kept.split(sizes)])
        first = torch.stack([part.sum() for part in (kept * x).split(sizes)])
        means = torch.where(mass > 0, first / torch.where(mass > 0, mass, 1.0), centres)
        centres = means.cummax(0).values  # those of clusters without mass stay in order
    return least, best
