"""Parts made of parts: sums, ordered composition, views, and one state per tensor of a group. Each
is itself a `Part`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch

from ..part import Part
from ..structured import BlockForm
from . import viewed as viewed
from .ordered import Exposed as Exposed
from .ordered import QuantizedThenPruned as QuantizedThenPruned
from .ordered import Then as Then
from .ordered import ThenState as ThenState
from .ordered import expose as expose
from .ordered import then as then
from .sums import Sum as Sum
from .wrapped import Each as Each
from .wrapped import Over as Over
from .wrapped import OverState as OverState
from .wrapped import each as each


@singledispatch
def bound(part: Part[Any], shapes: tuple[torch.Size, ...]) -> Part[Any]:
    """`part` with every `each` in it told the shapes of the group's tensors."""
    return part


@bound.register
def _(part: Each, shapes: tuple[torch.Size, ...]) -> Part[Any]:
    return replace(part, shapes=shapes)


@bound.register
def _(part: Sum, shapes: tuple[torch.Size, ...]) -> Part[Any]:
    return replace(part, parts=tuple(bound(p, shapes) for p in part.parts))


@bound.register
def _(part: Then, shapes: tuple[torch.Size, ...]) -> Part[Any]:
    return Then(bound(part.outer, shapes), bound(part.inner, shapes))


@bound.register
def _(part: BlockForm, shapes: tuple[torch.Size, ...]) -> Part[Any]:
    if len(shapes) == 1:  # a group of one tensor keeps its shape
        return part
    return replace(part, shapes=shapes)  # type: ignore[type-var]  # its subclasses are dataclasses
