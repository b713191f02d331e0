"""Fields of several states in one dictionary: `0.scale`, `1.values`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

States: TypeAlias = tuple[Any, ...]


def prefixed(groups: Iterable[tuple[object, Mapping[str, Any]]]) -> dict[str, Any]:
    """One dictionary of several, the names joined with a dot."""
    return {f"{prefix}.{name}": x for prefix, group in groups for name, x in group.items()}


def below(prefix: object, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries under `prefix`, without it."""
    start = f"{prefix}."
    return {name[len(start) :]: x for name, x in values.items() if name.startswith(start)}


def as_importance(importance: Tensor, w: Tensor) -> Tensor:
    """Importance in the shape of `w`, on its device."""
    return importance.to(w.device).expand(w.shape)
