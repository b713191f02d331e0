"""Ordered composition: `a.then(b)`, where b compresses what a left continuous."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, Literal

import torch
from torch import Tensor

from .. import joint
from ..nm import NM
from ..number_format import Format
from ..part import Field, Ops, Part
from ..sparse import Sparse, SparseForm, SparseState, magnitudes
from .names import below, prefixed
from .sums import Sum
from .wrapped import Each, Over


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
    only); `LowRank(r).then(KMeans(16))` quantizes each factor. Pairs with their own projection
    (`joint.register_then`) solve  min Σ h (w − Δ(θ))²  over both. For the others this is a
    heuristic: first `outer` projects w, then `inner` its values. Other parts expose their `free`
    fields, for example a binary part its scales.

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

    @property
    def exact(self) -> bool:
        pair = joint.find_then(self.outer, self.inner)
        return pair is not None and pair.certain(self.outer, self.inner, weighted=False)

    @property
    def exact_weighted(self) -> bool:
        pair = joint.find_then(self.outer, self.inner)
        return pair is not None and pair.certain(self.outer, self.inner, weighted=True)

    def solve(
        self, w: Tensor, warm: ThenState | None, mu: float | None, importance: Tensor | None
    ) -> ThenState:
        pair = joint.find_then(self.outer, self.inner)
        if pair is not None:
            (name,) = self.outer.free
            start = None if warm is None else (warm.outer, warm.inner[name])
            outer, state = pair(self.outer, self.inner, w, start, mu, importance)
            return ThenState(outer, {name: state})
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


@dataclass(frozen=True)
class QuantizedThenPruned(Part[ThenState]):
    """Quantize, then prune, `format.then(Sparse(...))` or `format.then(NM(n, m))`: for analysis.

    Not a projection: Δ = s(q(w)) need not be the sparse point of the grid closest to w, and the
    scales are those of all weights. `pruner.then(format)` is the projection. `solve` takes no warm
    start, and `project` keeps one that is closer.

    Args:
        format: `Int`, `HBFP` or `MX`.
        pruner: `Sparse` or `NM`. With importance it keeps the largest h |·|².
        mask_from: which magnitudes it looks at: "post", those of q(w), where ties are decided by
            order; "pre", those of w, which makes it prune, then quantize, bit for bit, where the
            groups nest in the scale blocks and scales are those of the largest weight
            (papers/sparsity-quantization-order.md, section 7 item 6).

    State, fields and cost: those of `pruner.then(format)`.

    Raises:
        TypeError: another kind of part.
        ValueError: another `mask_from`.
    """

    format: Format[Any]
    pruner: Sparse | NM
    mask_from: Literal["post", "pre"] = "post"

    def __post_init__(self) -> None:
        if not (isinstance(self.format, Format) and isinstance(self.pruner, Sparse | NM)):
            raise TypeError(
                "QuantizedThenPruned takes a number format and Sparse or NM, got "
                f"{type(self.format).__name__} and {type(self.pruner).__name__}."
            )
        if self.mask_from not in ("post", "pre"):
            raise ValueError(f'mask_from must be "post" or "pre", got {self.mask_from!r}.')

    def __str__(self) -> str:
        mask = "" if self.mask_from == "post" else " with the mask of the weights"
        return f"{self.format}.then({self.pruner}){mask} (no projection)"

    @property
    def product(self) -> Then:
        """The same set of Δ, so the same state."""
        return Then(self.pruner, self.format)

    def solve(
        self, w: Tensor, warm: ThenState | None, mu: float | None, importance: Tensor | None
    ) -> ThenState:
        inner = self.format.solve(w, None, mu, importance)
        q = self.format.reconstruct(inner)
        seen = q if self.mask_from == "post" else w
        positions = self.pruner.select(magnitudes(seen, importance))
        kept = SparseState(positions, q.reshape(-1)[positions], w.shape)
        return ThenState(kept, {"values": inner})

    def reconstruct(self, state: ThenState) -> Tensor:
        return self.product.reconstruct(state)

    def encode(self, state: ThenState) -> dict[str, Field]:
        return self.product.encode(state)

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> ThenState:
        return self.product.decode(arrays, shape, dtype)

    def ops(self, state: ThenState, positions: int = 1) -> Ops:
        return self.product.ops(state, positions)

    def admits(self, state: ThenState) -> bool:
        return self.product.admits(state)

    def tunable(self, state: ThenState) -> dict[str, Tensor]:
        return self.product.tunable(state)

    def with_tunable(self, state: ThenState, values: Mapping[str, Tensor]) -> ThenState:
        return self.product.with_tunable(state, values)


def then(outer: Part[Any], inner: Part[Any]) -> Part[Any]:
    """`outer.then(inner)`: passes through views, groups and an earlier `then` to the part whose
    values are continuous. A number format, then a pruner is `QuantizedThenPruned`.
    """
    if isinstance(outer, Over):
        return Over(then(outer.part, inner), outer.view)
    if isinstance(outer, Each):
        return replace(outer, part=then(outer.part, inner))
    if isinstance(outer, Then):
        return Then(outer.outer, then(outer.inner, inner))
    if isinstance(outer, Format) and isinstance(inner, Sparse | NM):
        return QuantizedThenPruned(outer, inner)
    return Then(outer, inner)
