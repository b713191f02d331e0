"""Which fields a part has: their names, their shapes, and whether they are integers or floats.

`decode` only needs arrays that it can use; a file is to hold exactly those that the format says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, TypeAlias

import torch

from ..binary import Binary, Ternary
from ..block_scaled import BlockScaled
from ..codebook import FixedCodebook, KMeans, PowersOfTwo
from ..coding import Fixed, Radix, Raw, Support
from ..compose import Each, Over, QuantizedThenPruned, Sum, Then
from ..compose.names import below
from ..entropy import Entropy
from ..fixed_point import FixedPoint
from ..formats import Int
from ..low_rank import LowRank
from ..modules.packed import Packed
from ..part import Coding, Part, all_finite
from ..rank_selection import RankSelection
from ..scaled import ScaledCodebook
from ..sparse import SparseForm

Arrays: TypeAlias = Mapping[str, Packed]


@dataclass(frozen=True)
class Weights:
    """The weights that a part sees. stored: the shape of their fields per weight, which is that
    outside of a view.
    """

    shape: torch.Size
    stored: torch.Size


def check_fields(part: Part[Any], arrays: Arrays, shape: torch.Size) -> None:
    """Refuse arrays that are not the fields of `part` for weights of this shape. Those of parts
    that are not this library's are left to their `decode`.

    Raises:
        ValueError: a name, a shape or a kind of coding is another; says which.
    """
    check(part, arrays, Weights(shape, shape))


@singledispatch
def check(part: Part[Any], arrays: Arrays, w: Weights) -> None:
    """`check_fields` for a part inside another one."""


def _exactly(
    arrays: Arrays, floats: Mapping[str, torch.Size], integers: Mapping[str, torch.Size]
) -> None:
    expected = {**floats, **integers}
    if set(arrays) != set(expected):
        raise ValueError(f"fields {sorted(expected)} were expected, got {sorted(arrays)}")
    for name, shape in expected.items():
        x = arrays[name]
        if x.shape != shape:
            raise ValueError(f"field {name} has shape {tuple(x.shape)}, not {tuple(shape)}")
        coding = _inner(x.coding)
        if (isinstance(coding, Raw) and coding.dtype.is_floating_point) != (name in floats):
            kind = "floating-point numbers" if name in floats else "integers"
            raise ValueError(f"field {name} is to hold {kind}, it is written by {x.coding}")
        stored = name in floats and isinstance(x.coding, Raw) and x.payload.numel() > 0
        if stored and not all_finite(x.unpack()):
            raise ValueError(f"field {name} contains NaN or inf")


def _inner(coding: Coding) -> Coding:
    return coding.inner if isinstance(coding, Entropy) else coding


def _free(part: Part[Any], arrays: Arrays, shape: torch.Size) -> dict[str, torch.Size]:
    """Shapes of the continuous fields; of the others a part asks for single numbers only."""
    numbers = {n: x.unpack() for n, x in arrays.items() if x.shape == (1,) and n not in part.free}
    return part.free_shapes(shape, numbers) if part.free else {}


@check.register
def _(
    part: Binary | Ternary | KMeans | FixedCodebook | PowersOfTwo | ScaledCodebook | Int,
    arrays: Arrays,
    w: Weights,
) -> None:
    per_weight = {Binary: "positive", Ternary: "signs"}.get(type(part), "codes")
    integers, limits = {per_weight: w.stored}, {"positive": 2, "signs": 3}
    if isinstance(part, Int) and not part.symmetric:
        integers["zero"] = torch.Size((part.blocks.count(w.shape),))
        limits["zero"] = part.top + 1
    _exactly(arrays, _free(part, {}, w.shape), integers)
    for name in limits.keys() & integers.keys():  # `decode` looks at the other ones
        _check_range(name, arrays[name], limits[name])


def _check_range(name: str, x: Packed, limit: int) -> None:
    coding = _inner(x.coding)
    if isinstance(coding, Fixed | Radix):
        most = coding.base if isinstance(coding, Radix) else 2**coding.width
        if most <= limit:
            return
    data = x.unpack()
    if data.numel() and not 0 <= int(data.min()) <= int(data.max()) < limit:
        raise ValueError(f"field {name} holds numbers that are not from 0 to {limit - 1}")


@check.register
def _(part: BlockScaled | FixedPoint, arrays: Arrays, w: Weights) -> None:
    _exactly(arrays, {}, {"codes": w.stored, "exponents": part.exponent_shape(w.shape)})


@check.register
def _(part: SparseForm, arrays: Arrays, w: Weights) -> None:
    given = arrays.get("positions")
    count = torch.Size() if given is None else torch.Size((math.prod(given.shape),))
    _exactly(arrays, {"values": count}, {"positions": count})
    coding = _inner(arrays["positions"].coding)
    if coding not in (part.coding(w.shape), Support(math.prod(w.shape))):
        raise ValueError(f"field positions is written by {coding}, for other weights")


@check.register
def _(part: LowRank, arrays: Arrays, w: Weights) -> None:
    _exactly(arrays, _free(part, {}, w.shape), {})


@check.register
def _(part: RankSelection, arrays: Arrays, w: Weights) -> None:
    one = torch.Size((1,))
    floats = {name: x.shape for name, x in arrays.items() if name in part.free}
    _exactly(arrays, floats, {"scheme": one, "rank": one})
    _exactly(arrays, _free(part, arrays, w.shape), {"scheme": one, "rank": one})


@check.register
def _(part: Sum, arrays: Arrays, w: Weights) -> None:
    terms = [below(i, arrays) for i in range(len(part.parts))]
    _complete(arrays, *terms)
    for term, own in zip(part.parts, terms, strict=True):
        check(term, own, w)


@check.register
def _(part: Over, arrays: Arrays, w: Weights) -> None:
    check(part.part, arrays, Weights(part.view.shape(w.shape), w.stored))


@check.register
def _(part: Each, arrays: Arrays, w: Weights) -> None:
    every = below("all", arrays)
    own = [below(i, arrays) for i in range(len(part.shapes or ()))]
    _complete(arrays, every, *own)
    for name, x in every.items():
        if x.shape != w.stored:
            raise ValueError(f"field all.{name} has shape {tuple(x.shape)}, not {tuple(w.stored)}")
    for fields, shape in zip(own, part.shapes or (), strict=True):
        shared = {name: replace(x, shape=shape) for name, x in every.items()}
        check(part.part, {**fields, **shared}, Weights(shape, shape))


@check.register
def _(part: Then, arrays: Arrays, w: Weights) -> None:
    outer = {name: x for name, x in arrays.items() if "." not in name}
    layouts = _free(part.outer, outer, w.shape)
    groups = [below(f"{name}{kept}", arrays) for name in layouts for kept in ("", "@positions")]
    _complete(arrays, outer, *groups)
    for name, layout in layouts.items():
        kept, mine = below(f"{name}@positions", arrays), below(name, arrays)
        if not (kept or mine) and layout.numel() == 0:
            continue  # nothing to compress: it is stored as it is
        if name in outer:
            raise ValueError(f"field {name} is compressed by another part, so it is not stored")
        sparse = isinstance(part.outer, SparseForm) and "positions" in outer
        own = outer["positions"].shape if sparse else layout
        for key, x in kept.items():
            if not sparse or x.shape != own:
                raise ValueError(f"field {name}@positions.{key} has shape {tuple(x.shape)}")
            mine[key] = replace(x, shape=layout)
        check(part.inner, mine, Weights(layout, layout))
        outer[name] = Packed(Raw(torch.float32), own, torch.empty(0))
    check(part.outer, outer, w)


@check.register
def _(part: QuantizedThenPruned, arrays: Arrays, w: Weights) -> None:
    check(part.product, arrays, w)


def _complete(arrays: Arrays, *groups: Arrays) -> None:
    """All arrays are in one of the groups."""
    if sum(map(len, groups)) != len(arrays):
        raise ValueError(f"there are fields that no part has: {sorted(arrays)}")
