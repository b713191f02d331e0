"""Modules that sit before or after a layer as its children: what `scheduled.insert` attaches, and
what layers that take a layer's place carry over.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Inserted(nn.Module):
    """A module for activations, as far as files are concerned."""

    @property
    def stored(self) -> dict[str, int]:
        """Buffers that a file must have as 0 or as this number: they stand for what the module is
        made of, which the file does not hold.
        """
        return {}


class _Hook:
    """Calls a child module of its layer. Copied and pickled like a new one."""

    def __init__(self) -> None:
        # By default torch.compile does not look at hooks when it takes code that it has compiled
        # for another model of the class: one without these modules would do, silently.
        from torch import _dynamo  # takes seconds to import; an optimizer does so anyway

        if _dynamo.config.skip_nnmodule_hook_guards:
            _dynamo.config.skip_nnmodule_hook_guards = False
            _dynamo.reset()  # what is compiled already does not look either

    def __reduce__(self) -> Any:
        return type(self), ()


class Before(_Hook):
    """A forward pre-hook: the layer's first input passes through a child module first."""

    name = "inserted_before"

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (getattr(module, self.name)(args[0]), *args[1:])


class After(_Hook):
    """A forward hook: the layer's output passes through a child module."""

    name = "inserted_after"

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return getattr(module, self.name)(output)


def attach(layer: nn.Module, kind: Any, chain: nn.Module) -> None:
    layer.add_module(kind.name, chain)
    if kind is Before:
        layer.register_forward_pre_hook(Before())
    else:
        layer.register_forward_hook(After())


def carry(old: nn.Module, new: nn.Module) -> None:
    """What is inserted at one layer also at the layer that takes its place."""
    for kind in (Before, After):
        if kind.name in old._modules:
            attach(new, kind, old.get_submodule(kind.name))
