"""Parts made of parts: sums, ordered composition, views, and one state per tensor of a group. Each
is itself a `Part`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from itertools import permutations
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import joint
from .part import Field, Ops, Part, rounded, working
from .sparse import SparseForm, SparseState
from .views import View

States: TypeAlias = tuple[Any, ...]


def prefixed(groups: Iterable[tuple[object, Mapping[str, Any]]]) -> dict[str, Any]:
    """One dictionary of several, the names joined with a dot."""
    return {f"{prefix}.{name}": x for prefix, group in groups for name, x in group.items()}


def below(prefix: object, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries under `prefix`, without it."""
    start = f"{prefix}."
    return {name[len(start) :]: x for name, x in values.items() if name.startswith(start)}


def as_importance(importance: Tensor, w: Tensor) -> Tensor:
    """Importance in the shape of `w`, on its device."""
    return importance.to(w.device).expand(w.shape)


# --------------------------------------------------------------------------------------- sum


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

    A pair with a joint solver (`joint.py`: binary or a fixed codebook, plus sparse) is solved
    exactly, and if it is the whole sum, so is the sum. Otherwise block descent: each block projects
    the residual that the others leave, warm-started, until a sweep lowers the objective by less
    than `tolerance`, relatively. From a warm state there is one descent. A cold start tries the
    orders of the blocks (all of up to three blocks, else the rotations of the written order), each
    greedy first and then descended coarsely, and continues the best one. The result is
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
        """The terms grouped into blocks, in written order of their first terms."""
        free = list(range(len(self.parts)))
        blocks: list[Block] = []
        while free:
            i = free.pop(0)
            for j in free:
                pair = joint.find(*_same_view(self.parts[i], self.parts[j]))
                if pair is not None:
                    free.remove(j)
                    blocks.append(Block((i, j), pair))
                    break
            else:
                blocks.append(Block((i,)))
        return tuple(blocks)

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
        count = len(problem.blocks)
        if count == 1:  # one projection is the whole problem
            states = [None] * len(self.parts) if warm is None else list(warm)
            problem.update(problem.blocks[0], states, w)
            return tuple(states)
        if warm is not None:
            return problem.descend(list(warm), self.tolerance, self.sweeps)
        orders: Sequence[tuple[Block, ...]] = list(permutations(problem.blocks))
        if count > 3:
            orders = [problem.blocks[i:] + problem.blocks[:i] for i in range(count)]
        starts = [problem.descend(problem.greedy(order), 1e-3, 20) for order in orders]
        best = min(starts, key=lambda states: problem.value(states))
        return problem.descend(list(best), self.tolerance, self.sweeps)

    def reconstruct(self, state: States) -> Tensor:
        return _add(part.reconstruct(s) for part, s in zip(self.parts, state, strict=True))

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


def _add(terms: Iterable[Tensor]) -> Tensor:
    """Sum of tensors, half precisions added in float32 and rounded once."""
    first, *rest = terms
    total = working(first)
    for term in rest:
        total = total + term
    return total.to(first.dtype)


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

    def descend(self, states: list[Any], tolerance: float, sweeps: int) -> States:
        """Sweeps of warm-started block projections; the best states seen."""
        terms = [part.reconstruct(s) for part, s in zip(self.sum.parts, states, strict=True)]
        valid = self.sum.admits(tuple(states))
        best, best_value = tuple(states), self.value(states) if valid else math.inf
        for _ in range(sweeps):
            for block in self.blocks:
                others = [t for i, t in enumerate(terms) if i not in block.terms]
                self.update(block, states, self._minus(self.w, others))
                for i in block.terms:
                    terms[i] = self.sum.parts[i].reconstruct(states[i])
            value = self.value(states)
            done = best_value - value <= tolerance * abs(value)
            if value < best_value:
                best, best_value = tuple(states), value
            if done:
                break
        return best

    def _minus(self, w: Tensor, terms: Sequence[Tensor]) -> Tensor:
        total = working(w)
        for term in terms:
            total = total - term
        return rounded(total, w.dtype, None)

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
        states[i], states[j] = _improve_pair(
            block.pair, parts[0], parts[1], target, warm, self.mu, self.importance
        )


def _improve_pair(
    pair: joint.Joint,
    a: Part[Any],
    b: Part[Any],
    w: Tensor,
    warm: tuple[Any, Any] | None,
    mu: float | None,
    importance: Tensor | None,
) -> tuple[Any, Any]:
    """The pair's joint solution, or the warm one where that is better and the solver is not
    certain.
    """
    inner = _same_view(a, b)
    if (
        inner[0] is not a and isinstance(a, Over) and isinstance(b, Over)
    ):  # solve behind the shared view
        shown = None if importance is None else a.view.show(as_importance(importance, w))
        states = None if warm is None else (warm[0].inner, warm[1].inner)
        first, second = _improve_pair(pair, *inner, a.view.show(w), states, mu, shown)
        return OverState(first, w.shape), OverState(second, w.shape)
    new = pair(a, b, w, warm, mu, importance)
    if warm is None or pair.certain(a, b, importance is not None):
        return new
    if not (a.admits(warm[0]) and b.admits(warm[1])):
        return new
    both = Sum((a, b))
    old_value = both.objective(w, warm, mu, importance)
    return new if both.objective(w, new, mu, importance) <= old_value else warm


# --------------------------------------------------------------------------------------- then


@dataclass(frozen=True, eq=False)
class Exposed:
    """A continuous field of a state, laid out for the inner part: its values, which count how much,
    and the stored positions.
    """

    values: Tensor
    importance: Tensor | None = None
    positions: Tensor | None = None


@singledispatch
def expose(part: Part[Any], state: Any, importance: Tensor | None) -> dict[str, Exposed]:
    """What `then` compresses further: by default each free field of the state as it is."""
    return {name: Exposed(getattr(state, name)) for name in part.free}


@expose.register
def _(part: SparseForm, state: SparseState, importance: Tensor | None) -> dict[str, Exposed]:
    """The dense layout, with value and importance 0 off the support, so that blocks of a format lie
    on the dense weight.
    """
    dense = part.reconstruct(state)
    support = torch.zeros(dense.numel(), dtype=torch.bool, device=dense.device)
    support[state.positions] = True
    mask = support.view(dense.shape).double()
    counts = mask if importance is None else mask * importance
    return {"values": Exposed(dense, counts, state.positions)}


_KEPT = "@positions."  # marks inner fields that are stored for the kept weights only


@dataclass(frozen=True, eq=False)
class ThenState:
    """outer: state of the first part, its continuous fields replaced by their compressed values;
    inner: one state per such field.
    """

    outer: Any
    inner: dict[str, Any]


@dataclass(frozen=True)
class Then(Part[ThenState]):
    """Ordered composition: `inner` compresses what `outer` left continuous.

    `Sparse(...).then(KMeans(4))` prunes, then quantizes the survivors (codes are stored for them
    only); `LowRank(r).then(KMeans(16))` quantizes each factor. A heuristic for  min Σ h (w − Δ(θ))²
    over both (`exact` is False): first `outer` projects w, then `inner` its values. Other parts
    expose their `free` fields, for example a binary part its scales.

    Raises:
        TypeError: `outer` has no continuous values (a fixed codebook), does not define
            `free_shapes`, or is a sum (compose its terms instead).
    """

    outer: Part[Any]
    inner: Part[Any]

    def __post_init__(self) -> None:
        if isinstance(self.outer, Sum):
            raise TypeError(
                f"`then` on a sum has no one meaning: use it on a term of ({self.outer})."
            )
        if isinstance(self.outer, Then | Over | Each):
            raise TypeError("Build this composition with the method `then`, which reorders it.")
        if not isinstance(self.inner, Part):
            raise TypeError(f"`then` takes a part, got {type(self.inner).__name__}.")
        if not self.outer.free:
            raise TypeError(f"{self.outer} leaves nothing continuous that `then` could compress.")
        if type(self.outer).free_shapes is Part.free_shapes:
            raise TypeError(
                f"`then` needs {type(self.outer).__name__}.free_shapes, the shapes of its fields "
                f"{self.outer.free}, to read a state back."
            )

    def __str__(self) -> str:
        return f"{self.outer}.then({self.inner})"

    def solve(
        self, w: Tensor, warm: ThenState | None, mu: float | None, importance: Tensor | None
    ) -> ThenState:
        outer = self.outer.solve(w, None if warm is None else warm.outer, mu, importance)
        inner = {
            name: self.inner.improve(
                x.values, self._fitting(warm, name, x.values.shape), mu, x.importance
            )
            for name, x in expose(self.outer, outer, importance).items()
            if x.values.numel() > 0
        }
        return ThenState(self._filled(outer, inner), inner)

    def _fitting(self, warm: ThenState | None, name: str, shape: torch.Size) -> Any:
        """The warm state of a field, unless the field had another shape (as factors of another rank
        have).
        """
        state = None if warm is None else warm.inner.get(name)
        if state is None or self.inner.reconstruct(state).shape != shape:
            return None
        return state

    def _filled(self, outer: Any, inner: Mapping[str, Any]) -> Any:
        """`outer` with its exposed fields rebuilt by the inner part."""
        values = {name: self.inner.reconstruct(s) for name, s in inner.items()}
        if isinstance(outer, SparseState) and "values" in values:
            values["values"] = values["values"].reshape(-1)[outer.positions]
        return replace(outer, **values) if values else outer

    def reconstruct(self, state: ThenState) -> Tensor:
        delta: Tensor = self.outer.reconstruct(self._filled(state.outer, state.inner))
        return delta

    def encode(self, state: ThenState) -> dict[str, Field]:
        outer = self.outer.encode(state.outer)
        positions = state.outer.positions if isinstance(state.outer, SparseState) else None
        fields = {name: field for name, field in outer.items() if name not in state.inner}
        for name, inner in state.inner.items():
            for key, field in self.inner.encode(inner).items():
                if positions is not None and field.per_weight:
                    data = field.data.reshape(-1)[positions]
                    fields[f"{name}{_KEPT}{key}"] = Field(data, field.coding)
                else:
                    fields[f"{name}.{key}"] = replace(field, per_weight=False)
        return fields

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> ThenState:
        outer = {name: x for name, x in arrays.items() if "." not in name}
        layouts = self.outer.free_shapes(shape, outer)
        inner: dict[str, Any] = {}
        for name in self.outer.free:
            mine = below(name, arrays)
            for key, x in below(f"{name}{_KEPT[:-1]}", arrays).items():
                dense = x.new_zeros(math.prod(layouts[name]))
                dense[outer["positions"]] = x
                mine[key] = dense.view(layouts[name])
            if mine:
                inner[name] = self.inner.decode(mine, layouts[name], dtype)
                values = self.inner.reconstruct(inner[name])
                kept = isinstance(self.outer, SparseForm)
                outer[name] = values.reshape(-1)[outer["positions"]] if kept else values
        return ThenState(self.outer.decode(outer, shape, dtype), inner)

    def ops(self, state: ThenState, positions: int = 1) -> Ops:
        return self.outer.ops(state.outer, positions)

    def penalty(self, state: ThenState) -> float:
        return self.outer.penalty(state.outer) + sum(map(self.inner.penalty, state.inner.values()))

    def admits(self, state: ThenState) -> bool:
        return self.outer.admits(state.outer) and all(map(self.inner.admits, state.inner.values()))

    def tunable(self, state: ThenState) -> dict[str, Tensor]:
        return prefixed((name, self.inner.tunable(s)) for name, s in state.inner.items())

    def with_tunable(self, state: ThenState, values: Mapping[str, Tensor]) -> ThenState:
        inner = {
            name: self.inner.with_tunable(s, below(name, values)) for name, s in state.inner.items()
        }
        return ThenState(self._filled(state.outer, inner), inner)


def then(outer: Part[Any], inner: Part[Any]) -> Part[Any]:
    """`outer.then(inner)`: passes through views, groups and an earlier `then` to the part whose
    values are continuous.
    """
    if isinstance(outer, Over):
        return Over(then(outer.part, inner), outer.view)
    if isinstance(outer, Each):
        return replace(outer, part=then(outer.part, inner))
    if isinstance(outer, Then):
        return Then(outer.outer, then(outer.inner, inner))
    return Then(outer, inner)


# --------------------------------------------------------------------------------------- over


@dataclass(frozen=True, eq=False)
class OverState:
    """inner: the part's state for the viewed tensor; shape: of the weights themselves."""

    inner: Any
    shape: torch.Size


@dataclass(frozen=True)
class Over(Part[OverState]):
    """A part that sees the weights through a view: `LowRank(4).over(Matrix())` for a convolution.

    Solves the part's problem for `view.show(w)`: the same problem, since a view only rearranges
    entries. So a matrix part and a vector part of one tensor add up.
    """

    part: Part[Any]
    view: View

    def __str__(self) -> str:
        return f"({self.part}).over({self.view})"

    @property
    def exact(self) -> bool:
        return self.part.exact

    @property
    def exact_weighted(self) -> bool:
        return self.part.exact_weighted

    def solve(
        self, w: Tensor, warm: OverState | None, mu: float | None, importance: Tensor | None
    ) -> OverState:
        shown = None if importance is None else self.view.show(as_importance(importance, w))
        inner = None if warm is None else warm.inner
        return OverState(self.part.improve(self.view.show(w), inner, mu, shown), w.shape)

    def reconstruct(self, state: OverState) -> Tensor:
        return self.view.restore(self.part.reconstruct(state.inner), state.shape)

    def encode(self, state: OverState) -> dict[str, Field]:
        return {
            name: replace(f, data=self.view.restore(f.data, state.shape)) if f.per_weight else f
            for name, f in self.part.encode(state.inner).items()
        }

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> OverState:
        shown = {n: self.view.show(x) if x.shape == shape else x for n, x in arrays.items()}
        inner = self.part.decode(shown, self.view.shape(shape), dtype)
        return OverState(inner, torch.Size(shape))

    def ops(self, state: OverState, positions: int = 1) -> Ops:
        return self.part.ops(state.inner, positions)

    def penalty(self, state: OverState) -> float:
        return self.part.penalty(state.inner)

    def admits(self, state: OverState) -> bool:
        return self.part.admits(state.inner)

    def tunable(self, state: OverState) -> dict[str, Tensor]:
        return self.part.tunable(state.inner)

    def with_tunable(self, state: OverState, values: Mapping[str, Tensor]) -> OverState:
        return replace(state, inner=self.part.with_tunable(state.inner, values))


# --------------------------------------------------------------------------------------- each


@dataclass(frozen=True)
class Each(Part[States]):
    """One state per tensor of a joint group, whose tensors arrive as one vector.

    `each(Binary()) + Sparse(density=0.01)` on a joint group is a scale per layer plus one budget of
    floats for all of them. The controller fills in the shapes; without a group, give them.

    State: the tuple of the tensors' states.

    Raises:
        ValueError: no shapes yet, or they do not add up to the vector.
    """

    part: Part[Any]
    shapes: tuple[torch.Size, ...] | None = None

    def __post_init__(self) -> None:
        if self.shapes is not None:
            object.__setattr__(self, "shapes", tuple(map(torch.Size, self.shapes)))

    def __str__(self) -> str:
        return f"each({self.part})"

    @property
    def exact(self) -> bool:
        return self.part.exact

    @property
    def exact_weighted(self) -> bool:
        return self.part.exact_weighted

    @property
    def _sizes(self) -> list[int]:
        if self.shapes is None:
            raise ValueError(
                f"{self} stands for one state per tensor of a group: use it in a Joint task, or "
                "give `shapes`."
            )
        return [math.prod(shape) for shape in self.shapes]

    def _split(self, w: Tensor) -> list[Tensor]:
        sizes = self._sizes
        if w.dim() != 1 or w.numel() != sum(sizes):
            raise ValueError(
                f"{self} splits a vector of {sum(sizes)} weights, got shape {tuple(w.shape)}."
            )
        assert self.shapes is not None
        return [x.view(s) for x, s in zip(w.split(sizes), self.shapes, strict=True)]

    def solve(
        self, w: Tensor, warm: States | None, mu: float | None, importance: Tensor | None
    ) -> States:
        tensors = self._split(w.contiguous())
        count = len(tensors)
        weights: Sequence[Tensor | None] = [None] * count
        if importance is not None:
            weights = self._split(as_importance(importance, w).contiguous())
        return tuple(
            self.part.improve(x, s, mu, h)
            for x, s, h in zip(tensors, warm or [None] * count, weights, strict=True)
        )

    def reconstruct(self, state: States) -> Tensor:
        return torch.cat([self.part.reconstruct(s).reshape(-1) for s in state])

    def encode(self, state: States) -> dict[str, Field]:
        """The tensors' fields, numbered; one per weight in the same coding for all is written as
        one array for the group, under "all".
        """
        each = [self.part.encode(s) for s in state]
        fields: dict[str, Field] = {}
        for name, first in each[0].items():
            group = [fields_of[name] for fields_of in each]
            if all(f.per_weight and f.coding == first.coding for f in group):
                data = torch.cat([f.data.reshape(-1) for f in group])
                fields[f"all.{name}"] = Field(data, first.coding, per_weight=True)
            else:
                for i, f in enumerate(group):
                    fields[f"{i}.{name}"] = replace(f, per_weight=False)
        return fields

    def decode(self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> States:
        sizes = self._sizes
        assert self.shapes is not None
        own = [below(i, arrays) for i in range(len(sizes))]
        for name, x in below("all", arrays).items():
            for fields, piece in zip(own, x.split(sizes), strict=True):
                fields[name] = piece
        return tuple(self.part.decode(f, s, dtype) for f, s in zip(own, self.shapes, strict=True))

    def ops(self, state: States, positions: int = 1) -> Ops:
        return sum((self.part.ops(s, positions) for s in state), start=Ops(0, 0))

    def penalty(self, state: States) -> float:
        return sum(map(self.part.penalty, state))

    def admits(self, state: States) -> bool:
        return all(map(self.part.admits, state))

    def tunable(self, state: States) -> dict[str, Tensor]:
        return prefixed((i, self.part.tunable(s)) for i, s in enumerate(state))

    def with_tunable(self, state: States, values: Mapping[str, Tensor]) -> States:
        return tuple(self.part.with_tunable(s, below(i, values)) for i, s in enumerate(state))


def each(part: Part[Any], shapes: Iterable[Sequence[int]] | None = None) -> Each:
    """`part`, with one state per tensor of a joint group."""
    return Each(part, None if shapes is None else tuple(torch.Size(s) for s in shapes))


@singledispatch
def bound(part: Part[Any], shapes: tuple[torch.Size, ...]) -> Part[Any]:
    """`part` with every `each` in it told the shapes of the group's tensors."""
    return part


@bound.register
def _(part: Each, shapes: tuple[torch.Size, ...]) -> Part[Any]:
    return replace(part, shapes=shapes)


@bound.register
def _(part: Sum, shapes: tuple[torch.Size, ...]) -> Part[Any]:
    return replace(part, parts=tuple(bound(p, shapes) for p in part.parts))


@bound.register
def _(part: Then, shapes: tuple[torch.Size, ...]) -> Part[Any]:
    return Then(bound(part.outer, shapes), bound(part.inner, shapes))
