"""Sums of parts: joint solvers where they exist, block descent otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor

from .. import joint
from ..part import Field, Ops, Part, rounded, working
from .names import States, as_importance, below, prefixed
from .wrapped import Over, OverState

_GROWTH = 32  # sweeps in which budgets grow to their number


@dataclass(frozen=True)
class Block:
    """Terms that one solver handles together: one part, or a pair with a joint solver."""

    terms: tuple[int, ...]
    pair: joint.Joint | None = None


@dataclass(frozen=True)
class Sum(Part[States]):
    """Additive combination Δ(θ) = Δ₁(θ₁) + Δ₂(θ₂) + …, the weights of a model as a sum of
    separately compressed parts.

    Solves   min μ/2 Σ h (w − Σ_i Δ_i(θ_i))² + Σ_i penalty_i(θ_i)

    A pair with a joint solver (`joint`) is solved as that says: binary or given values plus sparse
    exactly (binary plus sparse for h = 1, else monotone), a learned codebook plus sparse optimally
    wherever its programme finishes; and if the pair is the whole sum, so is the sum. `exact` and
    `exact_weighted` say which holds. Otherwise block descent: each block projects
    the residual that the others leave, warm-started, until a sweep lowers the objective by less
    than `tolerance`, relatively. From a warm state there is one descent. A cold start tries the
    orders of the terms (all of up to three terms, else the rotations of the written order): each is
    greedy, then descended coarsely term by term. One more start sweeps the blocks while a budget of
    corrections grows to its number, since too many too early fit what the other terms would
    explain. The three best are continued in blocks. On the layers of a ResNet20 that is never worse
    than the best of all orders run to the end, which the pairs' blocks alone are not (measured in
    experiments/restarts.py). The result is
    block-stationary: a local optimum, which in general depends on the start, though never on how
    the sum was bracketed.

    Args:
        parts: the terms; sums among them are flattened.
        tolerance: relative decrease of the objective in one sweep at which the descent stops.
        sweeps: most sweeps of a descent.

    State: the tuple of the terms' states.

    Raises:
        TypeError: a term is not a part.
        ValueError: no terms.

    Source: papers/learning-compression.md, section 4.
    """

    parts: tuple[Part[Any], ...]
    tolerance: float = 1e-9
    sweeps: int = 500

    def __post_init__(self) -> None:
        flat: list[Part[Any]] = []
        for part in self.parts:
            if not isinstance(part, Part):
                raise TypeError(f"Sum adds parts, got {type(part).__name__}.")
            flat.extend(part.parts if isinstance(part, Sum) else (part,))
        if not flat:
            raise ValueError("Sum needs at least one part.")
        if self.sweeps < 1 or not self.tolerance >= 0:
            raise ValueError(
                f"Sum: sweeps must be at least 1 and tolerance >= 0, got {self.sweeps} and "
                f"{self.tolerance}."
            )
        object.__setattr__(self, "parts", tuple(flat))

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The terms grouped into blocks, in written order of their first terms.

        Of several possible partners a term gets one that makes an exactly solved pair, if any.
        """
        pairs = []
        for i, j in combinations(range(len(self.parts)), 2):
            views = _same_view(self.parts[i], self.parts[j])
            pair = joint.find(*views)
            if pair is not None:
                local = not pair.certain(*views, weighted=False)
                pairs.append((local, Block((i, j), pair)))
        chosen = {i: Block((i,)) for i in range(len(self.parts))}
        for _, block in sorted(pairs, key=lambda found: found[0]):
            if all(len(chosen[i].terms) == 1 for i in block.terms):
                chosen |= dict.fromkeys(block.terms, block)
        return tuple(dict.fromkeys(chosen.values()))

    def _certain(self, weighted: bool) -> bool:
        blocks = self.blocks
        if len(blocks) > 1:
            return False
        (block,) = blocks
        if block.pair is None:
            part = self.parts[0]
            return part.exact_weighted if weighted else part.exact
        return block.pair.certain(*_same_view(*(self.parts[i] for i in block.terms)), weighted)

    @property
    def exact(self) -> bool:
        return self._certain(weighted=False)

    @property
    def exact_weighted(self) -> bool:
        return self._certain(weighted=True)

    def solve(
        self, w: Tensor, warm: States | None, mu: float | None, importance: Tensor | None
    ) -> States:
        problem = _Descent(self, w, mu, importance)
        if len(problem.blocks) == 1:  # the whole problem: `improve` compares with the warm start
            return problem.solved(problem.blocks[0], warm, w)
        if warm is not None:
            return problem.descend(list(warm), self.tolerance, self.sweeps)
        single = tuple(Block((i,)) for i in range(len(self.parts)))
        orders: Sequence[tuple[Block, ...]] = list(permutations(single))
        if len(single) > 3:
            orders = [single[i:] + single[:i] for i in range(len(single))]
        starts = [problem.descend(problem.greedy(x), 1e-3, 20, blocks=x) for x in orders]
        if (grown := problem.grown()) is not None:
            starts.append(grown)
        best = sorted(starts, key=problem.value)[:3]
        ends = [problem.descend(list(states), self.tolerance, self.sweeps) for states in best]
        return min(ends, key=problem.value)

    def reconstruct(self, state: States) -> Tensor:
        first = self.parts[0].reconstruct(state[0])
        total = working(first)  # half precisions are added in float32 and rounded once
        for part, s in zip(self.parts[1:], state[1:], strict=True):
            total = part.added(total, s)
        return total.to(first.dtype)

    def encode(self, state: States) -> dict[str, Field]:
        return prefixed(
            (i, part.encode(s)) for i, (part, s) in enumerate(zip(self.parts, state, strict=True))
        )

    def decode(self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> States:
        return tuple(p.decode(below(i, arrays), shape, dtype) for i, p in enumerate(self.parts))

    def ops(self, state: States, positions: int = 1) -> Ops:
        counts = [part.ops(s, positions) for part, s in zip(self.parts, state, strict=True)]
        return sum(counts, start=Ops(0, 0))

    def penalty(self, state: States) -> float:
        return sum(part.penalty(s) for part, s in zip(self.parts, state, strict=True))

    def admits(self, state: States) -> bool:
        return all(part.admits(s) for part, s in zip(self.parts, state, strict=True))

    def tunable(self, state: States) -> dict[str, Tensor]:
        return prefixed(
            (i, part.tunable(s)) for i, (part, s) in enumerate(zip(self.parts, state, strict=True))
        )

    def with_tunable(self, state: States, values: Mapping[str, Tensor]) -> States:
        terms = enumerate(zip(self.parts, state, strict=True))
        return tuple(part.with_tunable(s, below(i, values)) for i, (part, s) in terms)


def _same_view(a: Part[Any], b: Part[Any]) -> tuple[Part[Any], Part[Any]]:
    """The inner parts if both look at the tensor through the same view; otherwise the parts
    themselves.
    """
    if isinstance(a, Over) and isinstance(b, Over) and a.view == b.view:
        return a.part, b.part
    return a, b


class _Descent:
    """Block descent on one problem: (w, μ, importance) for one sum."""

    def __init__(self, total: Sum, w: Tensor, mu: float | None, importance: Tensor | None) -> None:
        self.sum, self.w, self.mu, self.importance = total, w, mu, importance
        self.blocks = total.blocks

    def value(self, states: Sequence[Any]) -> float:
        """The objective."""
        return self.sum.objective(self.w, tuple(states), self.mu, self.importance)

    def greedy(self, order: Sequence[Block]) -> list[Any]:
        """Each block in turn projects what the ones before it left."""
        states: list[Any] = [None] * len(self.sum.parts)
        residual = self.w
        for block in order:
            self.update(block, states, residual)
            for i in block.terms:
                residual = self._minus(residual, [self.sum.parts[i].reconstruct(states[i])])
        return states

    def descend(
        self,
        states: list[Any],
        tolerance: float,
        sweeps: int,
        blocks: Sequence[Block] | None = None,
    ) -> States:
        """Sweeps of warm-started block projections; the best states seen."""
        terms = [part.reconstruct(s) for part, s in zip(self.sum.parts, states, strict=True)]
        valid = self.sum.admits(tuple(states))
        best, best_value = tuple(states), self.value(states) if valid else math.inf
        for _ in range(sweeps):
            self.sweep(states, terms, blocks or self.blocks)
            value = self.value(states)
            done = best_value - value <= tolerance * abs(value)
            if value < best_value:
                best, best_value = tuple(states), value
            if done:
                break
        return best

    def sweep(self, states: list[Any], terms: list[Tensor], blocks: Iterable[Block]) -> None:
        """Each block in turn projects what the other terms leave; both lists are brought up to
        date.
        """
        for block in blocks:
            others = [t for i, t in enumerate(terms) if i not in block.terms]
            self.update(block, states, self._minus(self.w, others))
            for i in block.terms:
                terms[i] = self.sum.parts[i].reconstruct(states[i])

    def grown(self) -> States | None:
        """A start whose budgets grow to their number, a sweep at each size, other blocks first;
        None where no term has a budget that can grow.
        """
        parts = self.sum.parts
        growing = {i for i, part in enumerate(parts) if part.with_share(1.0) is not None}
        if not growing:
            return None
        sizes = (step / _GROWTH for step in range(1, _GROWTH + 1))
        totals = (Sum(tuple(part.with_share(x) or part for part in parts)) for x in sizes)
        states: list[Any] = []
        for total in dict.fromkeys(totals):  # a small count does not grow in each step
            small = _Descent(total, self.w, self.mu, self.importance)
            order = sorted(small.blocks, key=lambda block: not growing.isdisjoint(block.terms))
            if not states:
                states = small.greedy(order)
            else:
                terms = [part.reconstruct(s) for part, s in zip(parts, states, strict=True)]
                small.sweep(states, terms, order)
        return tuple(states)

    def _minus(self, w: Tensor, terms: Sequence[Tensor]) -> Tensor:
        total = working(w)
        for term in terms:
            total = total - term
        return rounded(total, w.dtype, None)

    def solved(self, block: Block, warm: States | None, target: Tensor) -> States:
        """The block's states for `target`, a pair's jointly and behind the view that both share;
        whether warm ones are better is not asked.
        """
        parts = [self.sum.parts[i] for i in block.terms]
        mu, importance = self.mu, self.importance
        if block.pair is None:
            return (parts[0].solve(target, None if warm is None else warm[0], mu, importance),)
        a, b = parts
        inner = _same_view(a, b)
        if inner[0] is a or not (isinstance(a, Over) and isinstance(b, Over)):
            both = None if warm is None else (warm[0], warm[1])
            return block.pair(a, b, target, both, mu, importance)
        shown = None if importance is None else a.view.show(as_importance(importance, target))
        below_view = None if warm is None else (warm[0].inner, warm[1].inner)
        found = block.pair(*inner, a.view.show(target), below_view, mu, shown)
        return tuple(OverState(state, target.shape) for state in found)

    def update(self, block: Block, states: list[Any], target: Tensor) -> None:
        """Replace the block's states by better ones for `target`; `states` may hold None for a cold
        start.
        """
        parts = [self.sum.parts[i] for i in block.terms]
        if block.pair is None:
            (i,), (part,) = block.terms, parts
            states[i] = part.improve(target, states[i], self.mu, self.importance)
            return
        i, j = block.terms
        warm = None if states[i] is None else (states[i], states[j])
        new = self.solved(block, warm, target)
        weighted = self.importance is not None
        if warm is not None and not block.pair.certain(*_same_view(*parts), weighted):
            both = Sum(tuple(parts))
            value = partial(both.objective, target, mu=self.mu, importance=self.importance)
            if both.admits(warm) and not value(new) <= value(warm):
                new = warm
        states[i], states[j] = new
