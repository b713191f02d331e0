"""Put packed modules in the place of plain ones, and the other way round."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..inserted import After, Before
from ..part import Part
from ..views import joined
from .layers import Conv1d, Conv2d, Embedding, Linear, PackedModule
from .packed import Packed, pack
from .weight import Materialize, PackedWeight

KINDS: dict[type[nn.Module], type[PackedModule]] = {
    kind.plain: kind for kind in (Linear, Conv1d, Conv2d, Embedding)
}

Users: TypeAlias = dict[nn.Parameter, list[tuple[nn.Module, str]]]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, eq=False)
class PackedState:
    """A state as it lies in a file: the packed arrays of `part.encode`, by name. Given instead of a
    state, it is never unpacked as a whole.
    """

    arrays: Mapping[str, Packed]


def compress_module(
    module: nn.Module, part: Part[Any], state: Any, materialize: Materialize = "never"
) -> PackedModule:
    """The packed module that computes as `module` with the weight `part.reconstruct(state)`.

    Bias, hyper-parameters and the training flag are those of `module`; its weight is not looked at
    and may be on the meta device. The packed arrays go to its device, from meta to the state's.

    Args:
        module: an `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` or `nn.Embedding`, not a subclass.
        part, state: of its weight; the state may be a `PackedState`.
        materialize: "never", "on_load" or "on_first_use", see `PackedWeight`.

    Raises:
        TypeError: another kind of module.
        ValueError: a module with hooks, or an embedding with an option that needs its weight; a
            state for weights of another shape; an unknown `materialize`.
    """
    kind = KINDS.get(type(module))
    if kind is None:
        raise TypeError(
            f"compress_module takes {', '.join(k.__name__ for k in KINDS)}, not subclasses, got "
            f"{type(module).__name__}."
        )
    _check(module)
    packed = _packed([module], part, state, materialize)
    return kind(module, packed)


def replace_modules(
    model: nn.Module,
    weights: Mapping[str | tuple[str, ...], tuple[Part[Any], Any]],
    materialize: Materialize = "never",
) -> nn.Module:
    """Swap, in place, the modules that hold these weights for packed ones; returns `model`.

    Modules that share a weight share its packed arrays. A weight gets dense, Δ(θ) in its parameter,
    where not all that use it are modules `compress_module` takes (recurrent layers, transposed
    convolutions, parameters of the user's own modules), and so do those of a joint group.

    Args:
        model: may be on the meta device; packed weights are then never dense in memory.
        weights: (part, state) by the parameter's name, "layer1.0.conv1.weight"; for a joint group
            by the tuple of the names. The state may be a `PackedState`.
        materialize: as `compress_module`.

    Raises:
        ValueError: no such parameter; the weight of `model` itself; as `compress_module`. Unless it
            is a state that fits no weights of this shape, nothing is changed then.
    """
    users = check_replaceable(model, weights)
    named = dict(model.named_parameters(remove_duplicate=False))
    swapped: dict[nn.Module, nn.Module] = {}
    for names, (part, state) in weights.items():
        own = [named[name] for name in _tuple(names)]
        owners = users[own[0]]
        if _held_packed(own, users):
            packed = _packed([m for m, _ in owners], part, state, materialize)
            swapped |= {m: KINDS[type(m)](m, packed) for m, _ in owners}
        else:
            _write_dense(own, users, part, state)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in swapped:
                parent._modules[name] = swapped[child]
    return model


def check_replaceable(model: nn.Module, weights: Iterable[str | tuple[str, ...]]) -> Users:
    """Refuse what `replace_modules` refuses for weights of these names, before anything is changed;
    which modules use each parameter, and as what.

    Raises:
        ValueError: as `replace_modules`, whatever the parts and states are.
    """
    if type(model) in KINDS:
        raise ValueError(
            f"{type(model).__name__} cannot be replaced in place: use `compress_module`."
        )
    named = dict(model.named_parameters(remove_duplicate=False))
    users: Users = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                users.setdefault(p, []).append((module, name))
    done: set[nn.Parameter] = set()
    for names in weights:
        for name in _tuple(names):
            if name not in named:
                raise ValueError(f"No parameter named {name!r}. The model has: {sorted(named)}.")
        own = [named[name] for name in _tuple(names)]
        if done.intersection(own):
            raise ValueError(f"{names} is a weight that is given under another name, too.")
        done.update(own)
        if _held_packed(own, users):
            for module, _ in users[own[0]]:
                _check(module, f"{names}: ")
    return users


def _held_packed(own: list[nn.Parameter], users: Users) -> bool:
    """Whether all that use these parameters can hold them packed."""
    if len(own) > 1:
        return False
    return all(type(module) in KINDS and name == "weight" for module, name in users[own[0]])


def unpack_all(model: nn.Module) -> nn.Module:
    """Unpack now what is to be unpacked at the first use, for a model that is compiled or exported
    next; returns `model`.
    """
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.form()
    return model


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of `model` with plain modules in the place of packed ones; shared weights are shared
    again.
    """
    model = copy.deepcopy(model)
    weights: dict[PackedWeight, nn.Parameter] = {}
    swapped: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, PackedModule):
            if module.packed not in weights:
                weights[module.packed] = nn.Parameter(module.packed.dense())
            swapped[module] = module.with_weight(weights[module.packed])
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in swapped:
                parent._modules[name] = swapped[child]
    return swapped.get(model, model)


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _check(module: nn.Module, label: str = "") -> None:
    """Refuse what a packed module would silently do otherwise."""
    own = (hook for hooks in _HOOKS for hook in getattr(module, hooks).values())
    if not all(isinstance(hook, Before | After) for hook in own):
        raise ValueError(
            f"{label}{type(module).__name__} has hooks, which a packed module would not have. "
            "Remove them first (a hook that computes the weight, by `remove_weight_norm` or the "
            "like)."
        )
    if isinstance(module, nn.Embedding):
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise ValueError(
                    f"{label}Embedding with {option}={getattr(module, option)} cannot be packed: "
                    f"the option acts on a weight that is trained. Set it to "
                    f"{None if option == 'max_norm' else False}."
                )


def _packed(
    modules: list[nn.Module], part: Part[Any], state: Any, materialize: Materialize
) -> PackedWeight:
    weight = modules[0].weight
    assert isinstance(weight, Tensor)
    arrays = dict(state.arrays) if isinstance(state, PackedState) else pack(part, state)
    if not weight.is_meta:
        arrays = {
            name: Packed(x.coding, x.shape, x.payload.to(weight.device))
            for name, x in arrays.items()
        }
    products = frozenset.intersection(*(KINDS[type(m)].products(m) for m in modules))
    return PackedWeight(part, arrays, weight.shape, weight.dtype, materialize, products)


@torch.no_grad()
def _write_dense(
    own: list[nn.Parameter],
    users: Users,
    part: Part[Any],
    state: Any,
) -> None:
    """Δ(θ) into the parameters; those on the meta device are replaced."""
    sizes, shape = [p.numel() for p in own], joined([p.shape for p in own])
    if isinstance(state, PackedState):
        arrays = {name: x.unpack() for name, x in state.arrays.items()}
        state = part.decode(arrays, shape, own[0].dtype)
    delta = part.reconstruct(state)
    if delta.shape != shape:
        raise ValueError(
            f"{part}: the state is for weights of shape {tuple(delta.shape)}, the model has "
            f"{tuple(shape)}."
        )
    for p, piece in zip(own, delta.reshape(-1).split(sizes), strict=True):
        if not p.is_meta:
            p.copy_(piece.view(p.shape))
            continue
        made = piece.view(p.shape).to(p.dtype, copy=True)
        replace_tensor([module for module, _ in users[p]], p, made)


def replace_tensor(modules: Iterable[nn.Module], old: Tensor, new: Tensor) -> Tensor:
    """`new` takes the place of the parameter or buffer `old` wherever these modules have it; what
    is then there.
    """
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module in modules:
        for own in (module._parameters, module._buffers):
            for name, x in own.items():
                if x is old:
                    own[name] = new  # type: ignore[assignment]
    return new
