"""Modules put before or after named layers of a model, whose own names stay."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

from ..evaluating import watched
from ..inserted import After, Before, attach
from ..selection import unwrap
from .pruner import ActivationPruner
from .watching import Activation

Model = TypeVar("Model", bound=nn.Module)
Inserted: TypeAlias = Activation | Sequence[Activation]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def insert(
    model: Model,
    example_inputs: Any,
    *,
    before: Mapping[str, Inserted] | None = None,
    after: Mapping[str, Inserted] | None = None,
) -> Model:
    """Put modules for activations before or after layers, in place; returns `model`.

    Each layer gets its own copy, a child named `inserted_before` or `inserted_after` that hooks of
    the layer call: names and parameters stay. The same call makes a new model ready for
    `load_state_dict` or `load`. Several at one place act in the given order: prune, then quantize,
    is `(ActivationPruner(0.5), ActivationQuantizer(FixedPoint(8)))`.

    Call it before `torch.compile` and DistributedDataParallel, after `model.to(memory_format=...)`.

    Args:
        example_inputs: a batch, or a tuple of arguments: a run in evaluation mode on it gives the
            sizes of the buffers.
        before, after: by layer: an exact name, or a glob (`layer*.bn?`). An exact name wins.

    Warns:
        UserWarning: a pruner where values are never negative and some are 0: behind a ReLU.

    Raises:
        TypeError: no such module.
        ValueError: a pattern that matches nothing, a layer named twice, a container, a layer that
            is called not exactly once or not on one tensor, or a wrapped model. Nothing has then
            been changed.
    """
    if unwrap(model) is not model:
        raise ValueError(
            "insert changes the model inside torch.compile or DistributedDataParallel too late: "
            "call it first, then wrap the model."
        )
    places = [
        (name, kind, given)
        for kind, patterns in ((Before, before), (After, after))
        for name, given in _matched(model, patterns or {}, kind).items()
    ]
    seen = _seen(model, example_inputs, [(name, kind) for name, kind, _ in places])
    layers = dict(model.named_modules())
    made = []
    for (name, kind, given), x in zip(places, seen, strict=True):
        modules = [copy.deepcopy(module) for module in given]
        for module in modules:
            module.bind(tuple(x.shape[1:]), x)
            module.train(layers[name].training)
        if any(isinstance(module, ActivationPruner) for module in modules):
            _check_values(name, x)
        made.append((layers[name], kind, nn.Sequential(*modules).to(x.device)))
    for layer, kind, chain in made:
        attach(layer, kind, chain.train(layer.training))
    return model


def _matched(
    model: nn.Module, patterns: Mapping[str, Inserted], kind: Any
) -> dict[str, list[Activation]]:
    """What goes to which layer."""
    names = [name for name, _ in model.named_modules() if name and "inserted_" not in name]
    found: dict[str, tuple[str, list[Activation]]] = {}
    for pattern, given in patterns.items():
        modules = [given] if isinstance(given, nn.Module) else list(given)
        for module in modules:
            if not isinstance(module, Activation):
                raise TypeError(
                    f"{pattern!r}: insert takes ActivationPruner and ActivationQuantizer, got "
                    f"{type(module).__name__}."
                )
        own = [pattern] if pattern in names else [n for n in names if fnmatchcase(n, pattern)]
        if not own:
            raise ValueError(f"No layer named {pattern!r}. The model has: {names}.")
        own = [name for name in own if pattern in names or name not in patterns]
        if not own:
            raise ValueError(f"Every layer that {pattern!r} matches is named exactly, too.")
        for name in own:
            if name in found:
                raise ValueError(
                    f"The layer {name!r} is named twice, by {found[name][0]!r} and {pattern!r}. "
                    "Give all modules of one place together, as a tuple."
                )
            layer = model.get_submodule(name)
            if isinstance(layer, _CONTAINERS):
                raise ValueError(
                    f"{name!r} is a {type(layer).__name__}: name its first or last layer instead."
                )
            if hasattr(layer, kind.name):
                raise ValueError(f"{name!r} already has an {kind.name}.")
            found[name] = pattern, modules
    return {name: modules for name, (_, modules) in found.items()}


def _seen(model: nn.Module, example_inputs: Any, places: list[tuple[str, Any]]) -> list[Tensor]:
    """The tensor at each place, for the examples."""
    seen: list[list[Any]] = [[] for _ in places]
    handles = []
    for calls, (name, kind) in zip(seen, places, strict=True):
        layer = model.get_submodule(name)
        if kind is Before:
            see: Any = lambda m, args, calls=calls: calls.append(args[0] if args else None)  # noqa: E731
            handles.append(layer.register_forward_pre_hook(see))
        else:
            see = lambda m, args, out, calls=calls: calls.append(out)  # noqa: E731
            handles.append(layer.register_forward_hook(see))
    watched(model, example_inputs, handles)
    for calls, (name, _) in zip(seen, places, strict=True):
        if len(calls) != 1:
            raise ValueError(
                f"The layer {name!r} is called {len(calls)} times per example, which would share "
                "masks and scales between places: give each call a layer of its own."
            )
        if not isinstance(calls[0], Tensor) or calls[0].dim() < 2:
            raise ValueError(f"At {name!r} there is no one tensor with a batch axis.")
    return [calls[0] for calls in seen]


def _check_values(name: str, x: Tensor) -> None:
    """Warn where the smallest magnitudes are zeros by construction."""
    zeros = float((x == 0).double().mean())
    if zeros > 0 and not bool((x < 0).any()):
        warnings.warn(
            f"ActivationPruner at {name!r}: the values there are never negative and {zeros:.0%} "
            "are 0, as behind a ReLU. To prune those changes nothing: place it before the "
            "non-linearity.",
            stacklevel=3,
        )
