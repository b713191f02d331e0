"""Which tensors of a model belong to which task: patterns to names, with every ambiguity
an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .compose import Each, Over, Sum, Then, bound
from .low_rank import LowRank
from .part import Part
from .rank_selection import RankSelection

Pattern: TypeAlias = str | Callable[[str, Tensor], bool]


@dataclass(frozen=True)
class Joint:
    """One task of all the tensors that a pattern matches: one codebook, one budget or one scale for
    them together.

    The part sees the tensors, in the model's order, as one vector; `each(part)` inside it keeps one
    state per tensor.
    """

    pattern: Pattern | tuple[Pattern, ...]


Key: TypeAlias = Pattern | Joint


@dataclass(frozen=True)
class Selected:
    """A task before it has a state: its name, its part, and the model's tensors it owns,
    by name.
    """

    name: str
    part: Part[Any]
    tensors: dict[str, nn.Parameter]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile` and (Distributed)DataParallel."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]  # an attribute of compiled modules
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def clean(name: str) -> str:
    """A parameter's name without what `torch.compile` puts into it."""
    return name.replace("_orig_mod.", "")


def named_tensors(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """The model's parameters by their first name, and for each further name of a tied one its
    first.
    """
    first: dict[int, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    aliases: dict[str, str] = {}
    for raw, parameter in unwrap(model).named_parameters(remove_duplicate=False):
        name = clean(raw)
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
            parameters[name] = parameter
    return parameters, aliases


def select(model: nn.Module, tasks: Mapping[Key, Part[Any]]) -> list[Selected]:
    """Resolve patterns to tensors.

    A string is an exact name, a glob, or `re:` and a regular expression for the whole name; a
    function takes (name, tensor). Exact names win over globs and expressions, those over functions.
    Globs, expressions and functions see tensors of two axes or more: biases and normalization
    scales are compressed only by exact name. A tied tensor answers to each of its names and is
    compressed once.

    Raises:
        TypeError: a key is no pattern, a value no part.
        ValueError: a pattern matches nothing, or nothing that a more specific one leaves; two
            equally specific patterns match one tensor; a tensor cannot be compressed (its name, and
            why).
    """
    if not isinstance(tasks, Mapping):
        raise TypeError(f"Tasks are given as {{pattern: part, ...}}, got {type(tasks).__name__}.")
    if not tasks:
        raise ValueError("LC needs at least one task: {pattern: part, ...}.")
    parameters, aliases = named_tensors(model)
    claims: dict[str, tuple[int, list[Key]]] = {}  # the most specific patterns so far
    for key, part in tasks.items():
        if not isinstance(part, Part):
            raise TypeError(f"The task {key!r} needs a part, got {type(part).__name__}.")
        for pattern in _patterns(key):
            rank, names = _matches(pattern, parameters, aliases)
            if not names:
                raise ValueError(_nothing(pattern, parameters))
            for name in names:
                best, keys = claims.get(name, (0, []))
                if best < rank:
                    claims[name] = rank, [key]
                elif best == rank and key not in keys:
                    keys.append(key)
    for name, (_, keys) in claims.items():
        if len(keys) > 1:
            raise ValueError(
                f"Two equally specific patterns match {name!r}: {_show(keys[0])} and "
                f"{_show(keys[1])}. Name it exactly."
            )
    selected = []
    for key, part in tasks.items():
        names = [name for name in parameters if name in claims and claims[name][1] == [key]]
        if not names:
            raise ValueError(
                f"Every tensor that {_show(key)} matches belongs to a more specific pattern."
            )
        selected += _tasks(key, part, {name: parameters[name] for name in names})
    own = {name: p for task in selected for name, p in task.tensors.items()}
    _check_tensors(own, parameters)
    _check_grouped(model, selected)
    _check_embeddings(model, own)
    return selected


def _tasks(key: Key, part: Part[Any], tensors: dict[str, nn.Parameter]) -> list[Selected]:
    if not isinstance(key, Joint):
        return [Selected(name, part, {name: p}) for name, p in tensors.items()]
    kinds = {(p.dtype, p.device) for p in tensors.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"{_show(key)} joins tensors of different dtypes or devices: {list(tensors)}."
        )
    shapes = tuple(p.shape for p in tensors.values())
    return [Selected(_show(key), bound(part, shapes), tensors)]


def _patterns(key: Key) -> tuple[Pattern, ...]:
    pattern = key.pattern if isinstance(key, Joint) else key
    patterns = pattern if isinstance(pattern, tuple) else (pattern,)
    for one in patterns:
        if not (isinstance(one, str) or callable(one)):
            raise TypeError(f"A pattern is a string or a function of (name, tensor), got {one!r}.")
    return patterns


def _show(key: Key) -> str:
    if isinstance(key, Joint):
        return f"Joint({', '.join(map(_show, _patterns(key)))})"
    return repr(key) if isinstance(key, str) else getattr(key, "__name__", repr(key))


def _matches(
    pattern: Pattern, parameters: Mapping[str, nn.Parameter], aliases: Mapping[str, str]
) -> tuple[int, list[str]]:
    """How specific the pattern is, and the first names of the tensors it matches."""
    tensors = dict(parameters) | {alias: parameters[name] for alias, name in aliases.items()}
    if isinstance(pattern, str) and pattern in tensors:
        return 3, [aliases.get(pattern, pattern)]
    large = {name: p for name, p in tensors.items() if _is_lazy(p) or p.dim() > 1}
    if not isinstance(pattern, str):
        names, rank = [name for name, p in large.items() if pattern(name, p)], 1
    elif pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as cause:
            raise ValueError(f"{pattern!r} is not a regular expression: {cause}.") from cause
        names, rank = [name for name in large if expression.fullmatch(name)], 2
    else:
        names, rank = [name for name in large if fnmatchcase(name, pattern)], 2
    return rank, list(dict.fromkeys(aliases.get(name, name) for name in names))


def _is_lazy(p: Tensor) -> bool:
    """Whether the parameter of a lazy module has no shape yet."""
    return isinstance(p, nn.UninitializedParameter)


def _nothing(pattern: Pattern, parameters: Mapping[str, nn.Parameter]) -> str:
    return (
        f"No parameter named {_show(pattern)}. The model has: {sorted(parameters)}. Patterns other "
        "than exact names only see tensors of two axes or more."
    )


def _check_tensors(own: Mapping[str, nn.Parameter], parameters: Mapping[str, nn.Parameter]) -> None:
    memory: dict[int, str] = {}
    for name, p in parameters.items():
        if _is_lazy(p):
            if name in own:
                raise ValueError(
                    f"{name!r} is not initialized yet: run one batch through the model."
                )
            continue
        if name in own:
            _check_tensor(name, p)
        if p.layout is torch.strided and p.numel() and not p.is_meta and type(p) is nn.Parameter:
            other = memory.setdefault(p.data_ptr(), name)
            if other != name and (name in own or other in own):
                raise ValueError(
                    f"{name!r} and {other!r} are different parameters in the same memory. Tie "
                    "them as one parameter."
                )


def _check_tensor(name: str, p: nn.Parameter) -> None:
    if hasattr(p, "device_mesh") or hasattr(p.data, "device_mesh"):
        raise ValueError(f"{name!r} is a DTensor (sharded over processes): not supported yet.")
    if type(p) is not nn.Parameter or type(p.data) is not Tensor or p.layout is not torch.strided:
        raise ValueError(
            f"{name!r} is a {type(p.data).__name__} of layout {p.layout}: plain tensors only."
        )
    if not p.is_floating_point():
        raise ValueError(
            f"{name!r} is of type {p.dtype}: only real floating-point weights are compressed."
        )
    if p.is_meta:
        raise ValueError(
            f"{name!r} is on the meta device: it has a shape but no values. Load the model first."
        )
    if p.numel() == 0:
        raise ValueError(f"{name!r} is empty, shape {tuple(p.shape)}.")
    if not bool(torch.isfinite(p).all()):
        raise ValueError(f"{name!r} contains NaN or inf.")


def _check_grouped(model: nn.Module, selected: list[Selected]) -> None:
    """A low-rank factor mixes the inputs of all outputs, which a grouped convolution
    keeps apart.
    """
    groups = {
        id(module.weight): module.groups
        for module in unwrap(model).modules()
        if isinstance(module, nn.modules.conv._ConvNd)
    }
    for task in selected:
        if not has_low_rank(task.part):
            continue
        for name, p in task.tensors.items():
            if groups.get(id(p), 1) > 1:
                raise ValueError(
                    f"{name!r} belongs to a grouped convolution (groups={groups[id(p)]}), which "
                    f"{task.part} cannot factor: "
                    f"its outputs do not share their inputs. Use parts without low rank there."
                )


def _check_embeddings(model: nn.Module, own: Mapping[str, nn.Parameter]) -> None:
    """Rows that an embedding fixes or rescales by itself would not be those of Δ(θ)."""
    names = {id(p): name for name, p in own.items()}
    for module in unwrap(model).modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or id(module.weight) not in names:
            continue
        name = names[id(module.weight)]
        if module.padding_idx is not None:
            raise ValueError(
                f"{name!r} belongs to an embedding with padding_idx={module.padding_idx}, whose "
                "row is not trained, and compression would change it. Leave the embedding out, or "
                "set its padding_idx to None."
            )
        if module.max_norm is not None:
            raise ValueError(
                f"{name!r} belongs to an embedding with max_norm={module.max_norm}, which rescales "
                "its rows when it is used: they would not stay compressed. Leave the embedding "
                "out, or set its max_norm to None."
            )


def has_low_rank(part: Part[Any]) -> bool:
    """Whether a low-rank matrix is among the terms."""
    if isinstance(part, Sum):
        return any(map(has_low_rank, part.parts))
    if isinstance(part, Then):
        return has_low_rank(part.outer)
    if isinstance(part, Over | Each):
        return has_low_rank(part.part)
    return isinstance(part, LowRank | RankSelection)
