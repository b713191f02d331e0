"""What modules for activations share: buffers, and the statistics of a window.

What inference needs lies in buffers, of sizes that are known at construction: a checkpoint loads
into a model that has never run. Statistics of the window before an event are plain tensors that
exist only then (as buffers, DistributedDataParallel would overwrite them); `Scheduled.state_dict`
holds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..inserted import Inserted


class Activation(Inserted):
    """What both kinds of modules share: the statistics of a window.

    shape: of one example, without the batch axis; None as long as it is not known.
    window: how many examples before an event are looked at.
    store, seen: the statistics, and the batches in them; None between windows.
    """

    shape: torch.Size | None
    window: int
    store: Tensor | None
    seen: Tensor | None

    def __init__(self, shape: tuple[int, ...] | None, window: int) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"{type(self).__name__}: window must be at least 1, got {window}.")
        self.shape, self.window = None, window
        self.store = self.seen = None
        if shape is not None:
            self.bind(shape)

    def bind(self, shape: tuple[int, ...], like: Tensor | None = None) -> None:
        """Make the buffers for examples of this shape; `like`: a batch, laid out in memory as they
        will be.
        """
        self.shape = torch.Size(shape)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moved as any module, but numbers keep their types: scales in half precision would be
        other scales.
        """
        numbers = {n: b for n, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in numbers.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    @property
    def on(self) -> bool:
        """Whether it changes what passes."""
        raise NotImplementedError

    @property
    def watches(self) -> bool:
        """Whether it needs to see data before it is switched on."""
        return True

    def begin(self, steps: int, batch: int) -> None:
        """Collect from here on, for about so many batches of so many examples."""
        raise NotImplementedError

    def switch(self, share: float) -> None:
        """The event: use what was collected."""
        raise NotImplementedError

    def gather(self, group: Any) -> None:
        """Add the statistics of other processes."""
        raise NotImplementedError

    def _device(self) -> torch.device:
        return next(self.buffers()).device

    def _collected(self) -> Tensor:
        if self.store is None or self.seen is None or int(self.seen) == 0:
            raise RuntimeError(
                f"{type(self).__name__} is switched on before it has seen any data. Run the model "
                "in training mode before the event, or move the event to a later step."
            )
        store, self.store = self.store, None
        if not bool(torch.isfinite(store).all()):
            raise RuntimeError("The activations of the window contain NaN or inf.")
        return store
