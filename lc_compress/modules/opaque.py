"""Terms that only their own part can read: rebuilt as a whole, as one operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..part import Coding, Part
from .packed import Packed
from .term import Term


@dataclass(frozen=True)
class Plan:
    """How to rebuild Δ from payloads, but for the payloads."""

    part: Part[Any]
    arrays: tuple[tuple[str, Coding, tuple[int, ...]], ...]
    shape: torch.Size
    dtype: torch.dtype


_plans: list[Plan] = []
_numbers: dict[Plan, int] = {}

_library = torch.library.Library("lc_compress", "FRAGMENT")
_library.define("rebuild(Tensor[] payloads, Tensor like, int plan) -> Tensor")


def number_of(plan: Plan) -> int:
    """A number that stands for the plan in this process; equal plans have the same."""
    if plan not in _numbers:
        _plans.append(plan)
        _numbers[plan] = len(_plans) - 1
    return _numbers[plan]


@torch.library.impl(_library, "rebuild", "CompositeExplicitAutograd")
def _rebuild(payloads: list[Tensor], like: Tensor, plan: int) -> Tensor:
    how = _plans[plan]
    arrays = {
        name: Packed(coding, torch.Size(shape), payload).unpack()
        for (name, coding, shape), payload in zip(how.arrays, payloads, strict=True)
    }
    state = how.part.decode(arrays, how.shape, how.dtype)
    return how.part.reconstruct(state).to(like).contiguous()


@torch.library.register_fake("lc_compress::rebuild")  # type: ignore[untyped-decorator]
def _(payloads: list[Tensor], like: Tensor, plan: int) -> Tensor:
    return like.new_empty(_plans[plan].shape)


class Opaque(Term):
    """Any part with any codings: unpacked on the CPU, decoded and reconstructed by the part itself,
    the whole term at each forward.

    To a compiler it is one operator, `lc_compress::rebuild`. That names the part by a number of
    this process, so an exported program that contains it runs in this process only.
    """

    def __init__(
        self,
        part: Part[Any],
        arrays: Mapping[str, Packed],
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(arrays)
        self.part, self.shape, self.dtype = part, shape, dtype
        self.refresh()
        self.check()

    def check(self) -> None:
        """Refuse arrays of weights of another shape."""
        state = self.part.decode(
            {name: x.unpack() for name, x in self.arrays().items()}, self.shape, self.dtype
        )
        found = self.part.reconstruct(state).shape
        if found != self.shape:
            raise ValueError(f"Δ has shape {tuple(found)}")

    def refresh(self) -> None:
        arrays = tuple((n, coding, tuple(self.sizes[n])) for n, coding in self.codings.items())
        self.plan = number_of(Plan(self.part, arrays, self.shape, self.dtype))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.refresh()  # another process numbers its plans itself

    def prepare(self, dtype: torch.dtype) -> Tensor:
        """Δ, flat. Whatever the dtype of the weights that the state was made for, its own."""
        payloads = [self.payload(name) for name in self.codings]
        like = torch.empty(0, dtype=dtype, device=self.shapes.device)
        whole: Tensor = torch.ops.lc_compress.rebuild(payloads, like, self.plan)
        return whole.reshape(-1)

    def fill(self, total: Tensor, ready: Tensor, start: int) -> None:
        total.copy_(ready.narrow(0, start, total.shape[0]))

    def add_to(self, total: Tensor, ready: Tensor, start: int) -> None:
        total.add_(ready.narrow(0, start, total.shape[0]))
