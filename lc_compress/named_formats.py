"""Number formats by the names that papers and tables use."""

from __future__ import annotations

from typing import Any

from .formats import Int
from .hbfp import HBFP
from .mx import MX
from .number_format import Format

_FORMATS: dict[str, Format[Any]] = {
    "INT8": Int(8, axis=0, scale="max"),
    "INT4": Int(4, axis=0, scale="max"),
    "HBFP8": HBFP(8),
    "HBFP6": HBFP(6),
    "HBFP4": HBFP(4),
    "MXFP8": MX("e4m3"),
    "MXFP8-E5M2": MX("e5m2"),
    "MXFP6": MX("e2m3"),
    "MXFP6-E3M2": MX("e3m2"),
    "MXFP4": MX("e2m1"),
    "MXINT8": MX("int8"),
}


def number_format(name: str) -> Format[Any]:
    """The format of this name, in upper or lower case: symmetric integers with one scale per output
    row from the largest weight; HBFP with blocks of 64 and MX with blocks of 32 along the last
    axis.

    >>> number_format("mxfp4")
    MX(element='e2m1', block=32, axis=-1, scale='reference', rounding='nearest')

    Raises:
        TypeError: no name.
        ValueError: an unknown name; the message lists the known ones.
    """
    if not isinstance(name, str):
        raise TypeError(f"number_format takes a name, such as 'MXFP4', got {name!r}.")
    found = _FORMATS.get(name.upper())
    if found is None:
        raise ValueError(f"unknown number format {name!r}. Known are {', '.join(_FORMATS)}.")
    return found
