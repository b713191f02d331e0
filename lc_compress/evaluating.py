"""Running a user's model to look at it: in evaluation mode, and left as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def watched(model: nn.Module, example_inputs: Any, hooks: Iterable[RemovableHandle]) -> None:
    """Run the model once on the examples, a tensor or a tuple of arguments, without gradients; then
    take its `hooks` off again.
    """
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    try:
        with evaluating(model), torch.no_grad():
            model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
