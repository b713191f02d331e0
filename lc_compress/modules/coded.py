"""Codes, one per weight: binary, ternary, codebooks, integers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..bits import below, check_payload
from ..blocks import Blocks
from ..coding import Fixed, Radix
from .packed import Packed
from .term import Term
from .unpacking import byte_table, codes, from_bytes, in_bytes, write_selected


class Ready(NamedTuple):
    """table: values for each byte, or for each code; None: the code itself plus `first`."""

    table: Tensor | None
    scale: Tensor | None
    zero: Tensor | None


class Coded(Term):
    """Δ = (t[q] − z) · a with codes q, levels t, and in each block a scale a and a zero point z.

    Levels are given, or stored as "codebook", or the integers from `first` on; scales are
    stored as "scale" or 1; zero points as "zero" or 0. Codes are below `limit`.
    """

    levels: Tensor | None

    def __init__(
        self,
        arrays: Mapping[str, Packed],
        name: str,
        blocks: Blocks,
        shape: torch.Size,
        levels: Tensor | None = None,
        first: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(arrays)
        self.name, self.first = name, first
        coding = self.codings[name]
        assert isinstance(coding, Fixed | Radix)
        self.coding = coding
        if limit is None:
            limit = math.prod(self.sizes["codebook"]) if levels is None else len(levels)
        self.limit = limit
        # the block of flat position f is (f // run) % count
        self.count = blocks.count(shape)
        if blocks.axis is not None:
            self.run = math.prod(shape[blocks.axis % len(shape) + 1 :])
        else:
            self.run = blocks.group or math.prod(shape)
        if levels is not None:  # bytes of float64, which no cast touches
            levels = levels.contiguous().view(torch.uint8).to(self.payload(name).device)
        self.register_buffer("levels", levels, persistent=False)

    def prepare(self, dtype: torch.dtype) -> Ready:
        table: Tensor | None = None
        if self.levels is not None:
            table = self.levels.view(torch.float64).to(dtype)
        elif "codebook" in self.codings:
            table = self.floats("codebook").to(dtype)
        elif isinstance(self.coding, Fixed) and self.coding.width in (1, 2, 4):
            count, device = 2**self.coding.width, self.payload(self.name).device
            table = torch.arange(self.first, self.first + count, dtype=dtype, device=device)
        scale = self.floats("scale").to(dtype) if "scale" in self.codings else None
        zero = None
        if "zero" in self.codings:
            coding, count = self.codings["zero"], math.prod(self.sizes["zero"])
            assert isinstance(coding, Fixed)
            zero = codes(self.payload("zero"), coding, 0, count).to(dtype)
        if table is not None and self.count == 1:  # one block: a table of Δ itself
            table = table if zero is None else table - zero
            table = table if scale is None else table * scale
            scale = zero = None
        if table is not None and in_bytes(self.coding):
            table = byte_table(self.coding, table)
        elif table is not None and self.coding == Fixed(3):  # for two codes at once
            table = F.pad(table, (0, 8 - len(table)))
            table = torch.stack([table.repeat(8), table.repeat_interleave(8)], 1)
        return Ready(table, scale, zero)

    def fill(self, total: Tensor, ready: Ready, start: int) -> None:
        payload, stop = self.payload(self.name), start + total.shape[0]
        step = total.shape[0] if torch.compiler.is_compiling() else self._piece()
        for a in range(start, stop, step):
            b = min(a + step, stop)
            here = total.narrow(0, a - start, b - a)
            if ready.table is None:
                here.copy_(codes(payload, self.coding, a, b))
            elif in_bytes(self.coding):
                from_bytes(payload, ready.table, a, b, here)
            else:
                self._select(here, ready.table, a, b)
        if ready.table is None and self.first:
            total += self.first
        if ready.scale is not None or ready.zero is not None:
            grid, blocks = self._grid(total, start, stop)
            if ready.zero is not None:
                grid -= _taken(ready.zero, blocks)
            if ready.scale is not None:
                grid *= _taken(ready.scale, blocks)

    def _select(self, here: Tensor, table: Tensor, a: int, b: int) -> None:
        payload = self.payload(self.name)
        if table.dim() == 1:
            write_selected(here, table, codes(payload, self.coding, a, b))
        elif a % 2 == b % 2 == 0:
            read = codes(payload, Fixed(6), a // 2, b // 2)
            write_selected(here.view(-1, 2), table, read)
        else:
            write_selected(here, table[:8, 0], codes(payload, self.coding, a, b))

    def check(self) -> None:
        """Refuse codes, digits and padding that no writer writes."""
        for name, coding in self.codings.items():
            payload, count = self.payload(name).cpu().numpy().data, math.prod(self.sizes[name])
            if isinstance(coding, Radix):
                coding.checked(payload, count)
            elif isinstance(coding, Fixed):
                check_payload(coding, payload, count * coding.width)
        coding, stored = self.coding, self.payload(self.name)
        most = coding.base if isinstance(coding, Radix) else 2**coding.width
        count = math.prod(self.sizes[self.name])
        if most <= self.limit or count == 0:
            return
        if isinstance(coding, Fixed) and coding.width in (2, 4):
            if below(self.limit, coding.width, stored.cpu().numpy()):
                return
            shifts, width = range(0, 8, coding.width), coding.width
            largest = max(
                int((piece >> shift).bitwise_and_(2**width - 1).max())
                for piece in stored.split(1 << 16)
                for shift in shifts
            )
        else:
            step = self._piece()
            starts = range(0, count, step)
            largest = max(int(codes(stored, coding, a, min(a + step, count)).max()) for a in starts)
        if largest >= self.limit:
            raise ValueError(f"damaged codes, they must be below {self.limit}, found {largest}")

    def _piece(self) -> int:
        """Codes that are read at once: their numbers on the way take at most 512 kB."""
        if not in_bytes(self.coding):
            return 1 << 16
        per_byte = self.coding.digits if isinstance(self.coding, Radix) else 8 // self.coding.width
        return per_byte << 16

    def _grid(self, values: Tensor, start: int, stop: int) -> tuple[Tensor, Any]:
        """A view of the values, and the blocks that broadcast to it: a range, or their numbers."""
        run, count = self.run, self.count
        if start % run == 0 and stop % run == 0:
            first, last = start // run, stop // run
            if first // count == (last - 1) // count:  # within one turn through the blocks
                return values.view(-1, run), (first % count, last - first)
            if first % count == 0 and last % count == 0:
                return values.view(-1, count, run), (0, count)
        f = torch.arange(start, stop, device=values.device)
        return values, f // run % count


def _taken(x: Tensor, blocks: Any) -> Tensor:
    if isinstance(blocks, Tensor):
        return x[blocks]
    first, number = blocks
    return x.narrow(0, first, number)[:, None]
