"""Δ(θ) from the stored arrays, a few weights at a time: what fits in the cache is written once, and
no second copy of the weights is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ..blocks import Blocks
from ..coding import Raw
from ..compose import Over, Sum, Then
from ..compose.names import below
from ..low_rank import LowRank
from ..modules.coded import Coded
from ..modules.packed import Packed
from ..modules.terms import fast_terms, plain
from ..part import Part, rounded
from ..sparse import SparseForm
from ..views import Matrix, Vector

TILE = 1 << 19  # weights: fewer, and calls of Python cost more than what the cache saves
_ALIGNED = 40  # rows after which codes of all kinds begin a new byte

Arrays: TypeAlias = Mapping[str, Packed]


class Piecewise(Protocol):
    """One term of Δ(θ): its weights from `start` on are written, or added, to `total`."""

    def fill(self, total: Tensor, ready: Any, start: int) -> None: ...

    def add_to(self, total: Tensor, ready: Any, start: int) -> None: ...


@torch.no_grad()
def fill(part: Part[Any], arrays: Arrays, target: Tensor) -> None:
    """Write Δ(θ) to `target`, a contiguous tensor on the CPU, in the type that θ is of.

    Codes are read from their packed bytes, sparse values are put to their places, and a product of
    two factors is written to where it belongs. Other terms of a sum are rebuilt one by one as a
    whole. The numbers are those of `part.reconstruct`.

    Raises:
        Exception: arrays that are no state, as `part.decode` finds.
    """
    shape, dtype, flat = target.shape, target.dtype, target.view(-1)
    terms = _terms(part, arrays)
    exact = torch.promote_types(dtype, torch.float32)
    written = dtype == exact and _multiplied(*terms[0], target)
    found = [_piecewise(p, own, shape, dtype) for p, own in terms[written:]]
    if not found:
        return
    row = max(1, math.prod(shape[1:]))
    rows = max(1, TILE // row)
    step = row * (rows - rows % _ALIGNED if rows > _ALIGNED else rows)
    starts = range(0, flat.numel(), step)
    ready = [term.prepare(exact) if isinstance(term, Coded) else None for term in found]
    if dtype != exact:
        memory = torch.empty(2, step, dtype=exact)
        for start in starts:
            piece = flat[start : start + step]
            piece.copy_(_rounded_sum(found, ready, memory[:, : len(piece)], start, dtype))
        return
    for i, (term, prepared) in enumerate(zip(found, ready, strict=True)):
        write = term.fill if i == 0 and not written else term.add_to
        if isinstance(term, Coded):
            for start in starts:
                write(flat[start : start + step], prepared, start)
        else:
            write(flat, prepared, 0)


@torch.no_grad()
def check(part: Part[Any], arrays: Arrays, shape: torch.Size, dtype: torch.dtype) -> None:
    """Refuse what `fill` refuses, without the weights.

    Raises:
        Exception: arrays that are no state, as `part.decode` finds.
    """
    for term, own in _terms(part, arrays):
        inner, seen = _behind(term, shape)
        if isinstance(inner, LowRank):
            inner.decode({name: x.unpack() for name, x in own.items()}, seen, dtype)
        else:
            _piecewise(term, own, shape, dtype)


def _terms(part: Part[Any], arrays: Arrays) -> list[tuple[Part[Any], Arrays]]:
    if isinstance(part, Sum):
        return [(p, below(i, arrays)) for i, p in enumerate(part.parts)]
    return [(part, arrays)]


def _rounded_sum(
    found: list[Piecewise], ready: list[Any], memory: Tensor, start: int, dtype: torch.dtype
) -> Tensor:
    """The sum of terms that are each rounded to `dtype`; saturated where it is one."""
    total, own = memory[0], memory[1]
    for i, (term, prepared) in enumerate(zip(found, ready, strict=True)):
        term.fill(own, prepared, start)
        own.copy_(rounded(own, dtype, None))
        if i:
            total += own
        else:
            total.copy_(own)
    return total


def _multiplied(part: Part[Any], arrays: Arrays, target: Tensor) -> bool:
    """Write the product of two factors to `target`, if that is what the part is."""
    inner, shape = _behind(part, target.shape)
    if not isinstance(inner, LowRank):
        return False
    state = inner.decode({name: x.unpack() for name, x in arrays.items()}, shape, target.dtype)
    torch.mm(state.left, state.right, out=target.view(shape))
    return True


def _behind(part: Part[Any], shape: torch.Size) -> tuple[Part[Any], torch.Size]:
    """The part behind views that leave all weights in their order, and what it sees."""
    while isinstance(part, Over) and isinstance(part.view, Vector | Matrix):
        shape, part = part.view.shape(shape), part.part
    return part, shape


def _piecewise(part: Part[Any], arrays: Arrays, shape: torch.Size, dtype: torch.dtype) -> Piecewise:
    inner, seen = _behind(part, shape)
    if isinstance(inner, SparseForm):
        state = inner.decode({name: x.unpack() for name, x in arrays.items()}, seen, dtype)
        return _Kept(state.positions, state.values, shape.numel())
    if isinstance(inner, Then) and isinstance(inner.outer, SparseForm):
        values = _kept_values(inner, arrays, dtype)
        if values is not None:
            return _Kept(arrays["positions"].unpack(), values, shape.numel())
    codes = _codes(part, arrays, shape, dtype)
    if codes is not None:
        return codes
    return _Whole(part, part.decode({name: x.unpack() for name, x in arrays.items()}, shape, dtype))


def _codes(part: Part[Any], arrays: Arrays, shape: torch.Size, dtype: torch.dtype) -> Coded | None:
    """The term of codes that this part is, if it can be read from its packed bytes."""
    own = {name: plain(x) for name, x in arrays.items()}
    for x in own.values():
        if isinstance(x.coding, Raw) and torch.promote_types(x.coding.dtype, dtype) != dtype:
            return None  # its numbers are to be rounded to those of the weights first
    found = fast_terms(part, own, shape, dtype, None)
    if not found or not isinstance(found[0], Coded):
        return None
    found[0].check()
    return found[0]


def _kept_values(part: Then, arrays: Arrays, dtype: torch.dtype) -> Tensor | None:
    """The values (k,) of kept weights from their codes, where no scale depends on their places."""
    inner = part.inner
    if getattr(inner, "blocks", Blocks()) != Blocks():
        return None
    own = below("values", arrays) | below("values@positions", arrays)
    count = torch.Size(arrays["positions"].shape)
    codes = _codes(inner, own, count, dtype) if own and count.numel() else None
    if codes is None:
        return None
    values = torch.empty(count, dtype=torch.promote_types(dtype, torch.float32))
    codes.fill(values, codes.prepare(values.dtype), 0)
    return rounded(values, dtype, None)


class _Kept:
    """values (k,) at ascending positions (k,) of `size` weights, 0 elsewhere."""

    def __init__(self, positions: Tensor, values: Tensor, size: int) -> None:
        self.positions, self.values, self.size = positions, values, size

    def _inside(self, total: Tensor, start: int) -> tuple[Tensor, Tensor]:
        if start == 0 and len(total) == self.size:
            return self.positions, self.values.to(total.dtype)
        ends = torch.tensor([start, start + len(total)])
        first, last = torch.searchsorted(self.positions, ends).tolist()
        return self.positions[first:last] - start, self.values[first:last].to(total.dtype)

    def fill(self, total: Tensor, ready: Any, start: int) -> None:
        total.zero_().scatter_(0, *self._inside(total, start))

    def add_to(self, total: Tensor, ready: Any, start: int) -> None:
        total.index_add_(0, *self._inside(total, start))


class _Whole:
    """A term that only its part can rebuild."""

    def __init__(self, part: Part[Any], state: Any) -> None:
        self.part, self.state = part, state

    @cached_property
    def delta(self) -> Tensor:
        return self.part.reconstruct(self.state).reshape(-1)

    def fill(self, total: Tensor, ready: Any, start: int) -> None:
        total.copy_(self.delta[start : start + len(total)])

    def add_to(self, total: Tensor, ready: Any, start: int) -> None:
        total.add_(self.delta[start : start + len(total)])
