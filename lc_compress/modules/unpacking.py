"""Packed bytes to numbers with torch: on any device, of fixed shapes, nothing that a compiler or an
exporter could not follow. On a CPU with few threads NumPy does the same, faster.

The formats are those of `coding`: little-endian, the first code in the lowest bits. All functions
take a range of the array, so that a large one is unpacked a tile at a time.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..bits import look_up, unpack_codes
from ..coding import Fixed, Radix

_WIDEST = 32  # bits of a code
_THREADS = 3  # NumPy uses one, in which it selects rows two to five times as fast as torch


def in_bytes(coding: Fixed | Radix) -> bool:
    """Whether no code crosses the end of a byte: one look-up of a byte gives all its codes."""
    return isinstance(coding, Radix) or coding.width in (1, 2, 4, 8)


def can_unpack(coding: object) -> bool:
    """Whether `codes` reads this coding."""
    return isinstance(coding, Radix) or (isinstance(coding, Fixed) and coding.width <= _WIDEST)


def codes(payload: Tensor, coding: Fixed | Radix, start: int, stop: int) -> Tensor:
    """Codes `start` to `stop` of a payload (uint8): uint8, int32 or int64."""
    if isinstance(coding, Fixed) and coding.width == 0:
        return torch.zeros(stop - start, dtype=torch.int32, device=payload.device)
    if isinstance(coding, Fixed) and coding.width == 8:
        return payload[start:stop]
    if isinstance(coding, Fixed) and by_numpy(payload):
        first = start // 8  # eight codes take a whole number of bytes
        stored = payload[first * coding.width :].numpy().data
        found = unpack_codes(stored, stop - 8 * first, coding.width)[start - 8 * first :]
        wider = {1: np.uint8, 2: np.int32, 4: np.int64}[found.itemsize]
        return torch.from_numpy(found.astype(wider, copy=False))
    if not in_bytes(coding):
        assert isinstance(coding, Fixed)
        return _shifted(payload, coding.width, start, stop)
    every = torch.arange(_size(coding), dtype=torch.int32, device=payload.device)
    return looked_up(payload, coding, every, start, stop)


def looked_up(
    payload: Tensor, coding: Fixed | Radix, values: Tensor, start: int, stop: int
) -> Tensor:
    """values[code] for codes `start` to `stop`; `values` (K,) of any type, on the same device.

    Codes that no writer writes, K and above, give values[0] or 0, never an error.
    """
    if not in_bytes(coding):
        values = _filled(values, _size(coding))
        return values.index_select(0, codes(payload, coding, start, stop))
    found = torch.empty(stop - start, dtype=values.dtype, device=values.device)
    from_bytes(payload, byte_table(coding, values), start, stop, found)
    return found


def byte_table(coding: Fixed | Radix, values: Tensor) -> Tensor:
    """The values of all codes in a byte, for each byte: (256, codes in a byte)."""
    byte = torch.arange(256, device=values.device)[:, None]
    if isinstance(coding, Radix):
        powers = [coding.base**i for i in range(coding.digits)]
        digits = byte // torch.tensor(powers, device=values.device) % coding.base
    else:
        shifts = torch.arange(0, 8, coding.width, device=values.device)
        digits = (byte >> shifts) & (2**coding.width - 1)
    return _filled(values, _size(coding))[digits]


def from_bytes(payload: Tensor, table: Tensor, start: int, stop: int, result: Tensor) -> None:
    """Write what a `byte_table` has for codes `start` to `stop` to `result` (stop − start,)."""
    per_byte = table.shape[1]
    first = start // per_byte
    stored = payload[first : -(-stop // per_byte)]
    whole = start % per_byte == stop % per_byte == 0  # a row of the table for each byte
    if not whole and by_numpy(result) and stop - start >= 2 * per_byte:
        ends = (start, start + -start % per_byte, stop - stop % per_byte, stop)
        for a, b in pairwise(ends):
            from_bytes(payload, table, a, b, result[a - start : b - start])
        return
    if whole and by_numpy(result):
        look_up(table.numpy(), stored.numpy(), result.view(-1, per_byte).numpy())
    elif whole:
        write_selected(result.view(-1, per_byte), table, stored)
    else:
        flat = table.index_select(0, stored.to(torch.int32)).view(-1)
        result.copy_(flat.narrow(0, start - first * per_byte, stop - start))


def write_selected(result: Tensor, table: Tensor, index: Tensor) -> None:
    """result = table[index], without memory in between unless this is being compiled."""
    if torch.compiler.is_compiling():
        result.copy_(table.index_select(0, index.to(torch.int32)))
    elif by_numpy(result) and table.dim() == 1:
        np.take(table.numpy(), index.numpy(), out=result.numpy(), mode="clip")
    elif by_numpy(result):
        look_up(table.numpy(), index.numpy(), result.numpy())
    else:
        torch.index_select(table, 0, index.to(torch.int32), out=result)


def by_numpy(x: Tensor) -> bool:
    """Whether NumPy is to write or read this tensor."""
    if torch.compiler.is_compiling():
        return False
    return x.is_cpu and x.dtype != torch.bfloat16 and torch.get_num_threads() <= _THREADS


def _shifted(payload: Tensor, width: int, start: int, stop: int) -> Tensor:
    """Eight codes lie in `width` bytes: in one word of 64 bits, or a few."""
    first, last = start // 8, -(-stop // 8)
    stored = payload[first * width : last * width]
    stored = F.pad(stored, (0, (last - first) * width - stored.shape[0])).view(-1, width)
    in_word = next(n for n in (8, 4, 2, 1) if _fit(width, n))
    pieces = []
    for j in range(0, 8, in_word):  # code j starts at bit j · width
        byte, bit = divmod(j * width, 8)
        word = stored[:, byte : byte + 8]
        if word.shape[1] < 8:
            word = F.pad(word, (0, 8 - word.shape[1]))
        else:
            word = word.clone(memory_format=torch.contiguous_format)
        word = word.view(torch.int64)
        shifts = torch.arange(bit, bit + in_word * width, width, device=payload.device)
        pieces.append((word >> shifts).bitwise_and_(2**width - 1))
    read = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    return read.view(-1).narrow(0, start - 8 * first, stop - start)


def _fit(width: int, codes: int) -> bool:
    """Whether as many codes of each eight lie in the 64 bits that begin with the first one's
    byte.
    """
    return all(j * width % 8 + codes * width <= 64 for j in range(0, 8, codes))


def _size(coding: Fixed | Radix) -> int:
    """How many different codes there can be."""
    return coding.base if isinstance(coding, Radix) else 2**coding.width


def _filled(values: Tensor, size: int) -> Tensor:
    return F.pad(values, (0, size - values.shape[0]))
