"""Arrays as they are stored, in buffers of a module."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..coding import Raw
from ..codings_json import payload_bytes
from ..part import Coding, Part


@dataclass(frozen=True, eq=False)
class Packed:
    """One stored array: the bytes (uint8) that its coding wrote for data of this shape."""

    coding: Coding
    shape: torch.Size
    payload: Tensor

    def unpack(self) -> Tensor:
        """The array, on the CPU. Plain numbers share the payload's memory: do not write to them."""
        payload, coding = self.payload.cpu(), self.coding
        if isinstance(coding, Raw) and coding.dtype != torch.bool and sys.byteorder == "little":
            return payload.view(coding.dtype).view(self.shape)
        stored: Any = payload.numpy().data  # codings read it as they do bytes
        return coding.unpack(stored, self.shape)


def pack(part: Part[Any], state: Any) -> dict[str, Packed]:
    """The state as `part.encode` says it is written, on the state's device."""
    return {
        name: Packed(
            field.coding,
            field.data.shape,
            as_bytes(field.coding.pack(field.data)).to(field.data.device),
        )
        for name, field in part.encode(state).items()
    }


def as_bytes(payload: bytes) -> Tensor:
    """A payload as a tensor of its own."""
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else _empty()


def _empty() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


class PackedArrays(nn.Module):
    """Stored arrays in buffers: uint8, so that `.half()` and the like leave them alone.

    `state_dict` holds the payload of each array as `packed:<name>` (dots as slashes), and all their
    shapes as `shapes`. `load_state_dict` takes payloads of other lengths, as another support has.
    """

    shapes: Tensor

    def __init__(self, arrays: Mapping[str, Packed]) -> None:
        super().__init__()
        self.codings = {name: x.coding for name, x in arrays.items()}
        self.sizes = {name: x.shape for name, x in arrays.items()}
        for name, x in arrays.items():
            self.register_buffer(_key(name), x.payload)
        numbers = [n for shape in self.sizes.values() for n in (len(shape), *shape)]
        device = next((x.payload.device for x in arrays.values()), None)
        self.register_buffer("shapes", torch.tensor(numbers, dtype=torch.int64, device=device))

    def payload(self, name: str) -> Tensor:
        """The bytes of an array."""
        found: Tensor = getattr(self, _key(name))
        return found

    def arrays(self) -> dict[str, Packed]:
        """What it was made of."""
        return {
            name: Packed(coding, self.sizes[name], self.payload(name))
            for name, coding in self.codings.items()
        }

    def floats(self, name: str) -> Tensor:
        """A `Raw` array, without a copy."""
        coding = self.codings[name]
        assert isinstance(coding, Raw)
        return self.payload(name).view(coding.dtype).view(self.sizes[name])

    def refresh(self) -> None:
        """Derive anew what depends on the payloads. Called when they have changed."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """All arrays or none: those of one state belong together."""
        _, _, missing, _, errors = args
        keys = [f"{prefix}shapes", *(prefix + _key(name) for name in self.codings)]
        missed = [key for key in keys if key not in state_dict]
        if missed:
            missing.extend(missed)
            return
        found = state_dict[keys[0]]
        sizes = self._read_shapes(found)
        if sizes is None:
            errors.append(f"{prefix}shapes are not those of {len(self.sizes)} arrays.")
            return
        before = len(errors)
        for name, shape in sizes.items():
            given = state_dict[prefix + _key(name)]
            coding = self.codings[name]
            expected = payload_bytes(coding, shape)
            if given.dtype != torch.uint8 or given.dim() != 1:
                errors.append(f"{prefix}{_key(name)}: bytes expected, got {given.dtype}.")
            elif expected is not None and given.numel() != expected:
                errors.append(
                    f"{prefix}{_key(name)}: {coding} of shape {tuple(shape)} takes {expected} "
                    f"bytes, got {given.numel()}."
                )
        if len(errors) > before:
            return
        for key in keys:  # they may have other lengths
            own = self._buffers[key[len(prefix) :]]
            assert own is not None
            if own.shape != state_dict[key].shape:
                self._buffers[key[len(prefix) :]] = own.new_empty(state_dict[key].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.sizes = sizes
        self.refresh()

    def _read_shapes(self, found: Tensor) -> dict[str, torch.Size] | None:
        numbers = found.tolist()
        sizes = {}
        for name in self.sizes:
            if not numbers or not 0 <= numbers[0] < len(numbers):
                return None
            axes, numbers = numbers[1 : numbers[0] + 1], numbers[numbers[0] + 1 :]
            sizes[name] = torch.Size(axes)
        return None if numbers else sizes


def _key(name: str) -> str:
    return "packed:" + name.replace(".", "/")
