"""Parts as plain JSON data, for the header of a file, and back.

    Binary(axis=0) + Sparse(density=0.02, value_dtype=torch.float16)

    {"type": "Sum", "parts": [
        {"type": "Binary", "axis": 0},
        {"type": "Sparse", "density": 0.02, "value_dtype": {"dtype": "float16"}}]}

Only classes of this library, and those that the caller names, are ever built.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from ..binary import Binary, Ternary
from ..codebook import FixedCodebook, KMeans, PowersOfTwo
from ..compose import Each, Over, QuantizedThenPruned, Sum, Then
from ..fixed_point import FixedPoint
from ..formats import Int
from ..hbfp import HBFP
from ..l1 import L1Ball, L1Penalty
from ..low_rank import LowRank
from ..mx import MX
from ..nm import NM
from ..part import Part, given
from ..plain_data import FLOATS, as_dtype, dtype_name, short
from ..rank_selection import RankSelection
from ..scaled import ScaledCodebook
from ..sparse import Sparse, SparsePenalty
from ..structured import BlockPenalty, BlockSparse, GroupL2Penalty
from ..views import KernelMatrix, Matrix, Vector, View

Spec = dict[str, Any]

_OWN: tuple[type, ...] = (
    *(Binary, Ternary, KMeans, FixedCodebook, PowersOfTwo, ScaledCodebook, Int, HBFP, MX),
    *(Sparse, SparsePenalty, L1Ball, L1Penalty, NM, BlockSparse, BlockPenalty, GroupL2Penalty),
    *(FixedPoint, LowRank, RankSelection, Sum, Then, QuantizedThenPruned, Over, Each),
    *(Vector, Matrix, KernelMatrix),
)
_DEEPEST = 32  # parts within parts


class NotStored:
    """Stands for a function, such as a price of ranks, that a file only names."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: Any) -> Any:
        raise RuntimeError(
            f"The file names the function {self.__name__} but does not hold it: build the part "
            "anew to project with it."
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NotStored) and self.__name__ == other.__name__

    def __hash__(self) -> int:
        return hash(self.__name__)


def known_types(extra: Iterable[type] = ()) -> dict[str, type]:
    """The classes that a file may name: those of this library and `extra`.

    Raises:
        TypeError: one of `extra` is no part or view written as a dataclass.
        ValueError: one has the name of another.
    """
    known = {cls.__name__: cls for cls in _OWN}
    for cls in extra:
        if not (isinstance(cls, type) and issubclass(cls, Part | View) and is_dataclass(cls)):
            raise TypeError(f"parts= takes classes of parts and views (dataclasses), got {cls!r}.")
        if known.setdefault(cls.__name__, cls) is not cls:
            raise ValueError(f"parts=: there are two classes of the name {cls.__name__}.")
    return known


def describe_part(part: Part[Any] | View) -> Spec:
    """`part` as JSON data: its class name and the arguments that are not at their default.

    Raises:
        TypeError: it has an argument that is not a number, a string, a dtype, a function, a part, a
            view, or a sequence of these.
    """
    if not is_dataclass(part):
        raise TypeError(f"{part} is no dataclass: its hyper-parameters cannot be stored.")
    return {"type": type(part).__name__} | {
        name: _plain(value, part, name) for name, value in given(part).items()
    }


def _plain(value: Any, part: Any, name: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, Part | View):
        return describe_part(value)
    if isinstance(value, tuple | list):  # torch.Size is a tuple
        return [_plain(x, part, name) for x in value]
    if callable(value):
        return {"function": getattr(value, "__name__", type(value).__name__)}
    raise TypeError(
        f"{type(part).__name__}.{name} = {value!r} cannot be stored: a file holds numbers, "
        "strings, dtypes, parts, views and sequences of these."
    )


def built_part(spec: object, known: dict[str, type]) -> Part[Any]:
    """The part that `describe_part` was given.

    Raises:
        ValueError: an unknown class, unknown or impossible arguments; anything that is no part.
    """
    part = _built(spec, known, 0)
    if not isinstance(part, Part):
        raise ValueError(f"{short(spec)} is no part.")
    return part


def _built(spec: object, known: dict[str, type], depth: int) -> Any:
    if depth > _DEEPEST:
        raise ValueError(f"parts are nested more than {_DEEPEST} deep.")
    name = spec.get("type") if isinstance(spec, dict) else None
    if not isinstance(spec, dict) or not isinstance(name, str):
        raise ValueError(f"a part is an object with a type, got {short(spec)}.")
    cls = known.get(name)
    if cls is None:
        raise ValueError(
            f"unknown part {short(name)}. Known are {', '.join(known)}; "
            "name the class of another with parts=[...]."
        )
    arguments = {str(f.name) for f in fields(cls) if f.init}
    unknown = set(spec) - arguments - {"type"}
    if unknown:
        raise ValueError(f"{name} has no arguments {short(sorted(unknown))}.")
    values = {key: _value(x, known, depth) for key, x in spec.items() if key != "type"}
    try:
        return cls(**values)
    except Exception as cause:  # a third-party class may raise anything
        raise ValueError(f"impossible arguments of {name}: {cause}") from cause


def _value(data: Any, known: dict[str, type], depth: int) -> Any:
    if isinstance(data, list):
        if depth > _DEEPEST:
            raise ValueError(f"parts are nested more than {_DEEPEST} deep.")
        return tuple(_value(x, known, depth + 1) for x in data)
    if not isinstance(data, dict):
        return data
    if set(data) == {"dtype"}:
        found = as_dtype(data["dtype"], FLOATS)
        if found is None:
            raise ValueError(f"unknown dtype {short(data['dtype'])}.")
        return found
    if set(data) == {"function"} and isinstance(data["function"], str):
        return NotStored(data["function"])
    return _built(data, known, depth + 1)
