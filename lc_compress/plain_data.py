"""What descriptions in JSON have in common: numbers, shapes and types by name, checked."""

from __future__ import annotations

import math

import torch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NUMBERS = (
    *(*FLOATS, torch.int64, torch.int32, torch.int16),
    *(torch.int8, torch.uint8, torch.bool),
)
EVERY = (
    *(*NUMBERS, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)

_LARGEST = 2**63 - 1  # positions are int64
_AXES = 64  # more than torch allows


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def as_dtype(name: object, known: tuple[torch.dtype, ...] = EVERY) -> torch.dtype | None:
    """The type of this name, if it is one of the `known`."""
    return next((x for x in known if dtype_name(x) == name), None)


def as_shape(what: str, lengths: object) -> torch.Size:
    """A shape from a list of lengths; ValueError for anything else."""
    if not isinstance(lengths, list) or len(lengths) > _AXES:
        raise ValueError(f"{what} must be a list of lengths, got {short(lengths)}.")
    found = torch.Size([as_integer(f"a length in {what}", x) for x in lengths])
    if math.prod(found) > _LARGEST:
        raise ValueError(f"{what} has more than 2**63 - 1 entries: {short(lengths)}.")
    return found


def as_integer(what: str, number: object, least: int = 0, most: int = _LARGEST) -> int:
    """An integer in range, which no bool is; ValueError for anything else."""
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
        raise ValueError(f"{what} must be an integer from {least} to {most}, got {short(number)}.")
    return number


def short(data: object) -> str:
    """`data` in a message, cut: a hostile header may hold anything."""
    try:
        text = data[:200] if isinstance(data, str) else repr(data)
    except (RecursionError, ValueError):  # nested too deep; more digits than Python prints
        text = f"a {type(data).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
