"""Sparse terms: values at chosen positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..coding import Fixed, Support
from .packed import Packed, as_bytes
from .term import Term, tile_rows
from .unpacking import codes

_UNARY = 64  # first byte of `Support`, minus b: gaps whose upper bits are in unary
_WIDEST = 32  # bits of a gap
_PIECE = 1 << 13  # codes looked at together where the table of tiles is made


class Start(NamedTuple):
    """Where a tile begins: at which code, and the position and the number of the value that come
    next there.
    """

    code: int
    position: int
    value: int


class Scattered(Term):
    """Δ is values[i] at positions[i], ascending, and 0 elsewhere.

    Positions are read as `Support` packs them: as a sequence of codes, each of which passes some
    weights, and ends at a kept one or not.

    * bitmap: each passes one weight, kept if the bit is set;
    * gaps: the weights skipped and the kept one, or, an escape, only weights skipped;
    * gaps with upper bits in unary: a zero passes 2**b weights, a one as many as the lower bits say
      and the kept one.

    A small table, made when the module is, says where each tile begins, so a tile reads only its
    own codes. Those that end at no kept weight get the value 0. So shapes follow from the table,
    never from what is read.
    """

    def __init__(self, arrays: Mapping[str, Packed], shape: torch.Size) -> None:
        super().__init__(arrays)
        self.shape = shape
        self.refresh()

    @property
    def count(self) -> int:
        """Stored values."""
        return math.prod(self.sizes["values"])

    def refresh(self) -> None:
        size = math.prod(self.shape)
        self.full, self.empty = self.count == size, self.count == 0
        self.kind, self.step = 0, tile_rows(self.shape) * math.prod(self.shape[1:])
        self.starts: tuple[Start, ...] = ()
        if not (self.full or self.empty):
            payload = self.payload("positions").cpu()
            self.kind = int(payload[0])
            ends = [*range(0, size, self.step), size]
            self.starts = tuple(_starts(payload, self.count, ends))

    def fill(self, total: Tensor, ready: Any, start: int) -> None:
        total.zero_()
        self.add_to(total, ready, start)

    def add_to(self, total: Tensor, ready: Any, start: int) -> None:
        values, stop = self.floats("values"), start + total.shape[0]
        if self.full:
            total.add_(values[start:stop])
        if not self.starts:
            return
        first, last = self.starts[start // self.step], self.starts[-(-stop // self.step)]
        if first.value == last.value:
            return
        values = values[first.value : last.value].to(total.dtype)
        body = self.payload("positions")[1:]
        if self.kind == 0:
            kept = codes(body, Fixed(1), first.position, last.position)
            number = kept.cumsum(0, dtype=torch.int32) - 1
            dense = values.index_select(0, number.clamp_min(0)) * kept
            total.add_(dense.narrow(0, start - first.position, stop - start))
            return
        passed, ends = _walk(body, self.kind, self.count, first, last)
        at = passed.cumsum(0) + (first.position - start - 1)
        if ends.shape[0] > values.shape[0]:
            number = ends.cumsum(0) - 1
            values = values.index_select(0, number.clamp_min(0)) * ends
        if start % self.step or (stop % self.step and stop < math.prod(self.shape)):
            inside = (at >= 0) & (at < stop - start)  # others come before and after
            values, at = values * inside, at * inside
        total.index_add_(0, at, values)

    def rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Compressed rows of the matrix (first axis, the rest): where each starts and the columns
        of the entries, both int32, and the entries.
        """
        columns = math.prod(self.shape[1:])
        positions = self.arrays()["positions"].unpack().numpy()
        starts = np.searchsorted(positions, np.arange(self.shape[0] + 1) * columns)
        device = self.shapes.device
        return (
            torch.from_numpy(starts.astype(np.int32)).to(device),
            torch.from_numpy((positions % columns).astype(np.int32)).to(device),
            self.floats("values").to(dtype),
        )


def readable_support(positions: Packed, size: int) -> Packed | None:
    """Positions below `size` as `Support` packs them; those of another coding are packed again,
    which takes at most one bit per weight. None for a way of `Support` that is not read here.
    """
    if positions.coding != Support(size):
        found = positions.unpack()
        if found.numel() and int(found[-1]) >= size:
            return None
        payload = as_bytes(Support(size).pack(found)).to(positions.payload.device)
        positions = Packed(Support(size), found.shape, payload)
    kind = int(positions.payload[0]) if positions.payload.numel() else 0
    known = kind <= _WIDEST or _UNARY < kind <= _UNARY + _WIDEST
    return positions if known else None


def _walk(body: Tensor, kind: int, count: int, first: Start, last: Start) -> tuple[Tensor, Tensor]:
    """How many weights each code from `first` to `last` passes, and 1 where it ends at a kept one,
    else 0; int64. `body` is the payload without its first byte.
    """
    if kind <= _WIDEST:
        gaps = codes(body, Fixed(kind), first.code, last.code).long()
        ends = (gaps != 2**kind - 1).long()
        return gaps + ends, ends
    b = kind - _UNARY
    unary = count * b  # where the upper bits begin
    ends = codes(body, Fixed(1), unary + first.code, unary + last.code).long()
    if first.value == last.value:
        return (ends + 1) * 2**b, ends  # no ones: all pass as many
    lower = codes(body, Fixed(b), first.value, last.value).long()
    number = (ends.cumsum(0) - 1).clamp_min(0)
    return torch.where(ends == 1, lower.index_select(0, number) + 1, 2**b), ends


def _starts(payload: Tensor, count: int, tiles: list[int]) -> list[Start]:
    """Where to begin for each of the ascending positions `tiles`: at the first code that leads
    beyond it.
    """
    kind, body = int(payload[0]), payload[1:]
    if kind == 0:
        counts = [0]
        for a, b in pairwise(tiles):
            counts.append(counts[-1] + int(codes(body, Fixed(1), a, b).sum()))
        return [Start(0, a, value) for a, value in zip(tiles, counts, strict=True)]
    total = (
        8 * body.numel() // kind if kind <= _WIDEST else 8 * body.numel() - count * (kind - _UNARY)
    )
    found: list[Start] = []
    here = Start(0, 0, 0)
    while len(found) < len(tiles) and here.value < count and here.code < total:
        stop = min(here.code + _PIECE, total)
        most = min(here.value + stop - here.code, count)  # values that these codes may end at
        passed, ends = _walk(body, kind, count, here, Start(stop, 0, most))
        values = here.value + np.cumsum(ends.numpy())
        used = int(np.searchsorted(values, count)) + 1  # padding follows the last value
        values, after = values[:used], here.position + np.cumsum(passed.numpy()[:used])
        while len(found) < len(tiles) and tiles[len(found)] < after[-1]:
            at = int(np.searchsorted(after, tiles[len(found)], side="right"))
            start = Start(here.code + at, int(after[at - 1]), int(values[at - 1]))
            found.append(start if at else here)
        here = Start(here.code + len(after), int(after[-1]), int(values[-1]))
    return found + [here] * (len(tiles) - len(found))
