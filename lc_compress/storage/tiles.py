"""Δ(θ) a few rows at a time, from the stored arrays: what fits in the cache is written once, and no
second copy of the weights is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import singledispatch
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..binary import Binary, Ternary
from ..blocks import Blocks
from ..codebook import FixedCodebook, KMeans, PowersOfTwo
from ..compose import Sum
from ..compose.names import below
from ..formats import Int
from ..part import Part
from ..scaled import ScaledCodebook
from ..sparse import SparseForm

TILE = 1 << 19  # weights: fewer, and calls of Python cost more than what the cache saves
_PER_BLOCK = ("scale", "zero")

Arrays: TypeAlias = Mapping[str, Tensor]
Term: TypeAlias = tuple[Part[Any], Arrays]


def fill(part: Part[Any], arrays: Arrays, target: Tensor) -> bool:
    """Write Δ(θ) to `target`, in the type that θ is of; False where the part is not made of rows.

    Raises:
        Exception: arrays that are no state, as `part.decode` finds.
    """
    coded, sparse = _terms(part, arrays)
    if coded is None or target.dim() == 0 or not target.is_contiguous():
        return False
    one, own = coded
    cut = rows(one, own, target.shape)
    if cut is None:
        return False
    step = max(1, TILE // max(1, math.prod(target.shape[1:])))
    for start in range(0, target.shape[0], step):
        piece = target[start : start + step]
        state = one.decode(cut(start, start + len(piece)), piece.shape, target.dtype)
        piece.copy_(one.reconstruct(state))
    flat = target.view(-1)
    for part, own in sparse:
        state = part.decode(own, target.shape, target.dtype)
        flat.index_add_(0, state.positions, state.values)
    return True


def _terms(part: Part[Any], arrays: Arrays) -> tuple[Term | None, list[Term]]:
    """The first term, and the others if they are all sparse: so they are added in the order of the
    sum.
    """
    if not isinstance(part, Sum):
        return (part, arrays), []
    terms: list[Term] = [(p, below(i, arrays)) for i, p in enumerate(part.parts)]
    first, *others = terms
    if not all(isinstance(p, SparseForm) for p, _ in others):
        return None, []
    return first, others


@singledispatch
def rows(
    part: Part[Any], arrays: Arrays, shape: torch.Size
) -> Callable[[int, int], dict[str, Tensor]] | None:
    """A function that cuts the arrays of a part down to some rows (first axis) of the weights, of
    which they make a state of the same part; None where there is none.
    """
    return None


@rows.register
def _(
    part: KMeans | FixedCodebook | PowersOfTwo, arrays: Arrays, shape: torch.Size
) -> Callable[[int, int], dict[str, Tensor]] | None:
    return _cut(arrays, shape, {"codes"})


@rows.register
def _(
    part: Binary | Ternary | ScaledCodebook | Int, arrays: Arrays, shape: torch.Size
) -> Callable[[int, int], dict[str, Tensor]] | None:
    blocks: Blocks = part.blocks
    if blocks.group is not None:
        return None
    per_row = {"positive", "signs", "codes"}
    if blocks.axis is not None:
        if blocks.axis % len(shape) != 0:
            return None
        per_row |= set(_PER_BLOCK)
    return _cut(arrays, shape, per_row)


def _cut(
    arrays: Arrays, shape: torch.Size, per_row: set[str]
) -> Callable[[int, int], dict[str, Tensor]] | None:
    if any(x.shape[:1] != shape[:1] for name, x in arrays.items() if name in per_row):
        return None
    return lambda a, b: {name: x[a:b] if name in per_row else x for name, x in arrays.items()}
