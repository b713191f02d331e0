"""Codings as plain JSON data, for the header of a file, and back.

    ["raw", "bfloat16"]                    Raw(torch.bfloat16)
    ["fixed", 1]                           Fixed(1)
    ["radix", 3]                           Radix(3)
    ["support", 36864]                     Support(36864)
    ["entropy", ["support", 36864]]        Entropy(Support(36864))
    ["groups", [64, 32], 2, 4, -1]         GroupSupport((64, 32), 2, 4, -1)
    ["blocks", [64, 32], {"axis": 0}]      BlockSupport((64, 32), Tiling(axis=0))

`described` trusts nothing: data that `describe` cannot have made is a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .coding import Fixed, Radix, Raw, Support
from .entropy import Entropy
from .nm import GroupSupport
from .part import Coding
from .plain_data import NUMBERS, as_dtype, as_integer, as_shape, dtype_name, short
from .tiling import BlockSupport, Tiling


def describe(coding: Coding) -> list[Any]:
    """`coding` as lists, strings and integers: its kind, then its arguments.

    >>> describe(Entropy(Fixed(2)))
    ['entropy', ['fixed', 2]]

    Raises:
        ValueError: a coding of another class; files know those of this library only.
    """
    if type(coding) is Raw:
        return ["raw", dtype_name(coding.dtype)]
    if type(coding) is Fixed:
        return ["fixed", coding.width]
    if type(coding) is Radix:
        return ["radix", coding.base]
    if type(coding) is Support:
        return ["support", coding.size]
    if type(coding) is Entropy:
        return ["entropy", describe(coding.inner)]
    if type(coding) is GroupSupport:
        return ["groups", list(coding.shape), coding.n, coding.m, coding.axis]
    if type(coding) is BlockSupport:
        return ["blocks", list(coding.shape), _tiling(coding.tiling)]
    raise ValueError(
        f"{coding}: files describe the codings {', '.join(_READERS)} of this library only. Write "
        "the field with one of these."
    )


def described(data: object) -> Coding:
    """The coding that `describe` was given.

    >>> described(["entropy", ["fixed", 2]])
    Entropy(inner=Fixed(width=2))

    Raises:
        ValueError: anything that `describe` cannot have returned: another kind, a wrong number or
            type of arguments, an argument out of range, an entropy coding inside another.
    """
    kind, *arguments = data if isinstance(data, list) and data else [None]
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise ValueError(
            f"A coding is a list that starts with one of {', '.join(_READERS)}, got {short(data)}."
        )
    count, read = reader
    if len(arguments) != count:
        raise ValueError(f"A coding '{kind}' has {count} argument(s), got {short(data)}.")
    return read(*arguments)


def payload_bytes(coding: Coding, shape: torch.Size) -> int | None:
    """Length of a payload, where it follows from the array's shape; None where it depends on the
    data (`Support`, `Entropy` and the supports of groups and blocks).

    >>> payload_bytes(Fixed(3), torch.Size([5])), payload_bytes(Support(9), torch.Size([5]))
    (2, None)
    """
    count = math.prod(shape)
    if isinstance(coding, Raw):
        return count * coding.dtype.itemsize
    if isinstance(coding, Fixed):
        return -(-count * coding.width // 8)
    if isinstance(coding, Radix):
        return -(-count // coding.digits)
    return None


def _raw(name: object) -> Coding:
    found = as_dtype(name, NUMBERS)
    if found is None:
        known = ", ".join(map(dtype_name, NUMBERS))
        raise ValueError(f"A coding 'raw' names one of {known}, got {short(name)}.")
    return Raw(found)


def _fixed(width: object) -> Coding:
    return Fixed(as_integer("the width of a coding 'fixed'", width, 0, 63))


def _radix(base: object) -> Coding:
    return Radix(as_integer("the base of a coding 'radix'", base, 2, 256))


def _support(size: object) -> Coding:
    return Support(as_integer("the size of a coding 'support'", size))


def _entropy(inner: object) -> Coding:
    if isinstance(inner, list) and inner and inner[0] == "entropy":  # also bounds the recursion
        raise ValueError(f"An entropy coding holds a plain one, got {short(inner)}.")
    return Entropy(described(inner))


def _groups(shape: object, n: object, m: object, axis: object) -> Coding:
    lengths = tuple(as_shape("the shape of a coding 'groups'", shape))
    largest = as_integer("m of a coding 'groups'", m, 1, 2**31)
    count = as_integer("n of a coding 'groups'", n, 0, largest)
    return GroupSupport(lengths, count, largest, _axis("groups", axis, lengths))


def _blocks(shape: object, tiling: object) -> Coding:
    lengths = tuple(as_shape("the shape of a coding 'blocks'", shape))
    given = tiling if isinstance(tiling, dict) else {}
    axis, block, shapes = (given.get(name) for name in ("axis", "block", "shapes"))
    one_way = (axis is None) != (block is None)
    if not one_way or None in given.values() or not set(given) <= {"axis", "block", "shapes"}:
        raise ValueError(
            f"A coding 'blocks' has an axis or a block, and shapes of a joint group, got "
            f"{short(tiling)}."
        )
    tensors = None
    if shapes is not None:
        if not isinstance(shapes, list) or not shapes:
            raise ValueError(f"The shapes of a coding 'blocks' are a list, got {short(shapes)}.")
        tensors = tuple(as_shape("a shape of a coding 'blocks'", s) for s in shapes)
    pair: tuple[int, int] | None = None
    if block is not None:
        sides = as_shape("the block of a coding 'blocks'", block)
        if len(sides) != 2 or 0 in sides:
            raise ValueError(f"The block of a coding 'blocks' is two lengths, got {short(block)}.")
        pair = (sides[0], sides[1])
    shortest = min((tensors or (lengths,)), key=len)
    where = None if axis is None else _axis("blocks", axis, tuple(shortest))
    coding = BlockSupport(lengths, Tiling(where, pair, tensors))
    coding.tiling.tensors(torch.Size(lengths))  # refuses shapes that do not fit together
    return coding


def _tiling(tiling: Tiling) -> dict[str, Any]:
    """Only what is given."""
    if tiling.axis is not None:
        given: dict[str, Any] = {"axis": tiling.axis}
    else:
        assert tiling.block is not None
        given = {"block": list(tiling.block)}
    if tiling.shapes is not None:
        given["shapes"] = [list(shape) for shape in tiling.shapes]
    return given


def _axis(kind: str, axis: object, shape: tuple[int, ...]) -> int:
    return as_integer(f"the axis of a coding '{kind}'", axis, -len(shape), len(shape) - 1)


_READERS: dict[str, tuple[int, Callable[..., Coding]]] = {
    "raw": (1, _raw),
    "fixed": (1, _fixed),
    "radix": (1, _radix),
    "support": (1, _support),
    "entropy": (1, _entropy),
    "groups": (4, _groups),
    "blocks": (2, _blocks),
}
