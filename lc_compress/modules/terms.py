"""What one part of a weight can do from its packed arrays: give any range of the flattened weights.

`terms(part, arrays, shape, dtype)` is the list for a part, dispatched on its type; register yours,
or let it be rebuilt as a whole (`opaque.Opaque`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from ..binary import Binary, Ternary
from ..blocks import Blocks
from ..codebook import FixedCodebook, KMeans, PowersOfTwo
from ..coding import Raw, Support
from ..compose import Over, Sum
from ..compose.names import below
from ..entropy import Entropy
from ..formats import Int
from ..low_rank import LowRank
from ..part import Part, rounded
from ..rank_selection import RankSelection
from ..scaled import ScaledCodebook
from ..sparse import SparseForm
from ..views import KernelMatrix, Matrix, Vector, View
from .coded import Coded
from .factors import Factors
from .opaque import Opaque
from .packed import Packed, as_bytes
from .supports import Scattered, readable_support
from .term import Term
from .unpacking import can_unpack

Arrays = Mapping[str, Packed]


def terms(
    part: Part[Any],
    arrays: Arrays,
    shape: torch.Size,
    dtype: torch.dtype,
    view: View | None = None,
) -> list[Term]:
    """The terms of `part` for weights of this shape, whose state is of this dtype.

    What an entropy coder wrote is written again by its inner coding: entropy is decoded once, here.

    Raises:
        ValueError: the arrays are for weights of another shape.
    """
    arrays = {name: plain(x) for name, x in arrays.items()}
    found = fast_terms(part, arrays, shape, dtype, view)
    if found is None:
        whole = part if view is None else Over(part, view)
        return [Opaque(whole, arrays, shape, dtype)]
    return found


@singledispatch
def fast_terms(
    part: Part[Any],
    arrays: Arrays,
    shape: torch.Size,
    dtype: torch.dtype,
    view: View | None,
) -> list[Term] | None:
    """Terms that unpack a range at a time; None where there are none for this part, view (of the
    weights, that the part looks through) or these codings, or where the arrays do not fit.
    """
    return None


@fast_terms.register
def _(
    part: Sum, arrays: Arrays, shape: torch.Size, dtype: torch.dtype, view: View | None
) -> list[Term] | None:
    if view is not None:
        return None
    found = []
    for i, term in enumerate(part.parts):
        for one in terms(term, below(i, arrays), shape, dtype):
            one.prefix = f"{i}.{one.prefix}"
            found.append(one)
    return found


@fast_terms.register
def _(
    part: Over, arrays: Arrays, shape: torch.Size, dtype: torch.dtype, view: View | None
) -> list[Term] | None:
    if view is not None or type(part.view) not in (Vector, Matrix, KernelMatrix):
        return None
    return fast_terms(part.part, arrays, shape, dtype, part.view)


def _coded(
    arrays: Arrays,
    name: str,
    blocks: Blocks,
    shape: torch.Size,
    view: View | None,
    levels: Tensor | None = None,
    first: int = 0,
    limit: int | None = None,
) -> list[Term] | None:
    """The term of codes, one per weight."""
    coding = arrays[name].coding
    if not can_unpack(coding) or any(
        not isinstance(x.coding, Raw) for key, x in arrays.items() if key not in (name, "zero")
    ):
        return None
    if isinstance(view, KernelMatrix) and blocks != Blocks():
        return None  # codes lie as the weights do, blocks as the view shows them
    shown = shape if view is None else view.shape(shape)
    if math.prod(arrays[name].shape) != math.prod(shape) or any(
        math.prod(arrays[key].shape) != blocks.count(shown)
        for key in {"scale", "zero"} & set(arrays)
    ):
        return None
    return [Coded(arrays, name, blocks, shown, levels, first, limit)]


def _signs(part: Binary | Ternary, dtype: torch.dtype, *signs: float) -> Tensor:
    """Levels in float64: signs, times the scale if that is given."""
    levels = torch.tensor(signs, dtype=torch.float64)
    if part.scale is None:
        return levels
    return levels * rounded(torch.tensor(part.scale, dtype=torch.float64), dtype, None).double()


@fast_terms.register
def _(
    part: Binary, arrays: Arrays, shape: torch.Size, dtype: torch.dtype, view: View | None
) -> list[Term] | None:
    levels = _signs(part, dtype, -1, 1)
    return _coded(arrays, "positive", part.blocks, shape, view, levels)


@fast_terms.register
def _(
    part: Ternary, arrays: Arrays, shape: torch.Size, dtype: torch.dtype, view: View | None
) -> list[Term] | None:
    levels = _signs(part, dtype, -1, 0, 1)
    return _coded(arrays, "signs", part.blocks, shape, view, levels)


@fast_terms.register
def _(
    part: KMeans, arrays: Arrays, shape: torch.Size, dtype: torch.dtype, view: View | None
) -> list[Term] | None:
    return _coded(arrays, "codes", Blocks(), shape, view)


@fast_terms.register
def _(
    part: FixedCodebook, arrays: Arrays, shape: torch.Size, dtype: torch.dtype, view: View | None
) -> list[Term] | None:
    levels = part.codebook(dtype, torch.device("cpu")).double()
    return _coded(arrays, "codes", Blocks(), shape, view, levels)


@fast_terms.register
def _(
    part: PowersOfTwo, arrays: Arrays, shape: torch.Size, dtype: torch.dtype, view: View | None
) -> list[Term] | None:
    return fast_terms(part.fixed, arrays, shape, dtype, view)


@fast_terms.register
def _(
    part: ScaledCodebook, arrays: Arrays, shape: torch.Size, dtype: torch.dtype, view: View | None
) -> list[Term] | None:
    exact = torch.promote_types(dtype, torch.float32)
    levels = part.unscaled.codebook(exact, torch.device("cpu")).double()
    return _coded(arrays, "codes", part.blocks, shape, view, levels)


@fast_terms.register
def _(
    part: Int, arrays: Arrays, shape: torch.Size, dtype: torch.dtype, view: View | None
) -> list[Term] | None:
    if not part.symmetric and not can_unpack(arrays["zero"].coding):
        return None
    first = -(part.top // 2) if part.symmetric else 0
    return _coded(arrays, "codes", part.blocks, shape, view, first=first, limit=part.top + 1)


@fast_terms.register
def _(
    part: SparseForm, arrays: Arrays, shape: torch.Size, dtype: torch.dtype, view: View | None
) -> list[Term] | None:
    values = arrays.get("values")
    if set(arrays) != {"positions", "values"} or values is None:
        return None
    if isinstance(view, KernelMatrix) or not isinstance(values.coding, Raw):
        return None
    shown = shape if view is None else view.shape(shape)
    given, size = arrays["positions"], math.prod(shape)
    if given.coding not in (part.coding(shown), Support(size)):
        raise ValueError(f"positions are written by {given.coding}")
    positions = readable_support(given, size)
    if positions is None or positions.shape != values.shape:
        return None
    return [Scattered({"positions": positions, "values": values}, shape)]


def _factors(arrays: Arrays, shape: torch.Size, *views: View | None) -> list[Term] | None:
    left, right = arrays["left"], arrays["right"]
    if not (isinstance(left.coding, Raw) and isinstance(right.coding, Raw)):
        return None
    if any(type(view) not in (type(None), Matrix, KernelMatrix) for view in views):
        return None
    found = Factors(arrays, shape, views)
    return [found] if found.fits() else None


@fast_terms.register
def _(
    part: LowRank, arrays: Arrays, shape: torch.Size, dtype: torch.dtype, view: View | None
) -> list[Term] | None:
    return _factors(arrays, shape, view)


@fast_terms.register
def _(
    part: RankSelection, arrays: Arrays, shape: torch.Size, dtype: torch.dtype, view: View | None
) -> list[Term] | None:
    return None if view is not None else _factors(arrays, shape, *part.schemes)


def plain(x: Packed) -> Packed:
    """The array without an entropy coder."""
    if not isinstance(x.coding, Entropy):
        return x
    inner = x.coding.inner
    payload = as_bytes(inner.pack(x.unpack())).to(x.payload.device)
    return Packed(inner, x.shape, payload)
