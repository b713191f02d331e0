"""Reading a packed file: into a model, or into a plain file of dense weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..atomic import replacing
from ..inserted import Inserted
from ..modules import Materialize, PackedState, check_replaceable, replace_modules, replace_tensor
from ..selection import clean, unwrap
from .index import Record
from .records import PackedFile
from .specs import known_types

Model = TypeVar("Model", bound=nn.Module)

_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}


def load(
    path: str | os.PathLike[str],
    model: Model,
    *,
    materialize: Materialize | None = None,
    parts: Iterable[type] = (),
) -> Model:
    """Read a packed file into `model`, which is returned.

    Executes no code of the file. All checksums, names, shapes, types and hooks are checked before
    anything is changed: a model that is refused is as it was. Then tensor by tensor is decoded on
    the CPU and copied into the model's own, in the model's type and on its device. (Bytes that no
    `save` wrote, forged together with their checksum, are refused before any change with
    `materialize`; without, which decodes once only, at their tensor, when those before it are read.
    `verify` reads such a file without a model.)

    Args:
        path: a file that `save` wrote.
        model: one of the same architecture, on any device. Tensors on the meta device are made
            anew, on the CPU.
        materialize: None: plain layers with dense weights. Otherwise `Linear`, `Conv1d`, `Conv2d`
            and `Embedding` layers whose weight is compressed alone become layers that hold the
            packed parts (`modules`), by this policy: "never" unpacks in each forward, "on_load" and
            "on_first_use" once. Other compressed weights are dense all the same.
        parts: classes of third-party parts and views that the file may name.

    Raises:
        FormatError: not a packed file, damaged, of an unknown version or with unknown parts; the
            message names the file, the tensor and the cause.
        ValueError: a file of another model: names that are missing there or here, other shapes.
        OSError: it cannot be read.
    """
    if materialize not in (None, "never", "on_load", "on_first_use"):
        raise ValueError(
            "load: materialize must be 'never', 'on_load', 'on_first_use' or None, got "
            f"{materialize!r}."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"load reads into a module, got {type(model).__name__}.")
    file = PackedFile(Path(path), known_types(parts), bounded=False)
    inner = unwrap(model)
    targets = _matched(file, inner)
    file.check()
    raw = _parameters(inner) if materialize is not None else {}
    kept = {r.number for r in file.records if r.part is not None and raw.keys() >= set(r.names)}
    _check(file, inner, targets, raw, kept)
    copies: dict[str, list[str]] = {}  # tied in the file, but not in the model
    for alias, first in file.aliases.items():
        if targets[alias] is not targets[first]:
            copies.setdefault(first, []).append(alias)
    for record in file.records:
        packed = record.number in kept
        if packed:
            assert materialize is not None and record.part is not None
            arrays = PackedState(file.packed(record))
            replace_modules(inner, {_key(record, raw): (record.part, arrays)}, materialize)
        if packed and copies.keys().isdisjoint(record.names):
            continue
        direct = None if packed else _direct(inner, targets, record)
        if direct is not None:
            file.fill(record, direct)
        tensors = file.tensors(record) if direct is None else {record.names[0]: direct}
        for name, x in tensors.items():
            own = [] if packed or direct is not None else [name]
            for target in (*own, *copies.get(name, ())):
                _fill(inner, targets, target, x)
        del tensors  # before the next ones are read
    return model


def _check(
    file: PackedFile,
    model: nn.Module,
    targets: Mapping[str, Tensor],
    raw: Mapping[str, str],
    kept: Set[int],
) -> None:
    """Refuse, before anything is changed, what could not be read into the model.

    raw: what the model calls its parameters.   kept: records that are held packed where they can.

    Raises:
        FormatError, ValueError: see `load`.
    """
    dtypes: dict[str, torch.dtype] = {}
    for record in file.records:
        for name, dtype in zip(record.names, record.dtypes, strict=True):
            dtypes[name] = dtype
            if record.number in kept and targets[name].dtype != dtype:
                raise ValueError(
                    f"load: {name} is {dtype} in {file.path}, {targets[name].dtype} in the model. "
                    "With materialize= they must be the same: cast the model afterwards."
                )
    dtypes |= {alias: dtypes[first] for alias, first in file.aliases.items()}
    for name, dtype in dtypes.items():
        target = targets[name]
        if (target.is_complex(), target.is_floating_point()) != (
            dtype.is_complex,
            dtype.is_floating_point,
        ):
            raise ValueError(f"load: {name} is {dtype} in {file.path}, {target.dtype} here.")
        if 0 in target.stride() and target.numel() > 1:
            raise ValueError(
                f"load: {name} is an expanded tensor: several of its entries are one number. Give "
                "the model a tensor of its own (`.clone()`)."
            )
    records = {name: record for record in file.records for name in record.names}
    for prefix, module in model.named_modules():
        for key, number in module.stored.items() if isinstance(module, Inserted) else ():
            name = clean(f"{prefix}.{key}")
            found = int(file.tensors(records[file.aliases.get(name, name)])[name])
            if found not in (0, number):
                raise ValueError(
                    f"load: {prefix} of {file.path} was saved with another number format than "
                    f"{module} here: `insert` the same as then."
                )
    try:
        if kept:
            check_replaceable(model, [_key(r, raw) for r in file.records if r.number in kept])
    except ValueError as cause:
        raise ValueError(f"{file.path}: {cause}") from cause
    if kept:
        for record in file.records:
            file.check_record(record)


def _parameters(model: nn.Module) -> dict[str, str]:
    """The names of the model's parameters by those in files."""
    return {clean(n): n for n, _ in model.named_parameters(remove_duplicate=False)}


def _key(record: Record, raw: Mapping[str, str]) -> str | tuple[str, ...]:
    names = tuple(raw[name] for name in record.names)
    return names[0] if len(names) == 1 else names


def _matched(file: PackedFile, model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name, each with one in the file of the same shape.

    Raises:
        ValueError: they do not match; the message says which.
    """
    targets = {clean(n): x for n, x in model.state_dict(keep_vars=True).items()}
    stored = {
        name: shape for r in file.records for name, shape in zip(r.names, r.shapes, strict=True)
    }
    names = {*stored, *file.aliases}
    missing, extra = sorted(set(targets) - names), sorted(names - set(targets))
    if missing or extra:
        raise ValueError(
            f"{file.path} is of another model: it lacks {_some(missing)}, and has {_some(extra)} "
            "which the model has not."
        )
    for name, shape in stored.items():
        if not isinstance(targets[name], Tensor) or targets[name].shape != shape:
            raise ValueError(
                f"{file.path} is of another model: {name} has shape {tuple(shape)} there, "
                f"{tuple(getattr(targets[name], 'shape', ()))} in the model."
            )
    for alias, first in file.aliases.items():
        if targets[alias].shape != targets[first].shape:
            raise ValueError(
                f"{file.path} is of another model: there {alias} is the same tensor as {first}, of "
                f"shape {tuple(targets[first].shape)}, here it has shape "
                f"{tuple(targets[alias].shape)}."
            )
    owner: dict[int, str] = {}
    for name in stored:
        other = owner.setdefault(id(targets[name]), name)
        if other != name:
            raise ValueError(
                f"{file.path} is of another model: {name} and {other} are one tied tensor in the "
                "model, two in the file."
            )
    return targets


def _some(names: list[str]) -> str:
    text = ", ".join(names[:4]) or "nothing"
    return text if len(names) <= 4 else f"{text}, … ({len(names)})"


def _direct(model: nn.Module, targets: dict[str, Tensor], record: Record) -> Tensor | None:
    """The model's own tensor, where Δ(θ) can be written to it as it is."""
    if record.part is None or len(record.names) > 1:
        return None
    (name,), (dtype,) = record.names, record.dtypes
    if targets[name].dtype != dtype or targets[name].device.type not in ("cpu", "meta"):
        return None
    target = _made(model, targets, name).detach()
    return target if target.is_contiguous() else None


@torch.no_grad()
def _fill(model: nn.Module, targets: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Copy into the model's own tensor."""
    _made(model, targets, name).copy_(value)


def _made(model: nn.Module, targets: dict[str, Tensor], name: str) -> Tensor:
    """The model's own tensor; one on the meta device is replaced, wherever it is tied."""
    target = targets[name]
    if not target.is_meta:
        return target
    empty = torch.empty_like(target, device="cpu", requires_grad=False)
    made = replace_tensor(model.modules(), target, empty)
    targets.update({other: made for other, x in targets.items() if x is target})
    return made


def to_dense(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    parts: Iterable[type] = (),
) -> None:
    """Write the dense weights of a packed file as a plain safetensors file, atomically; one record
    is in memory at a time. Tied tensors are written under each of their names.

    Raises:
        FormatError: see `load`. Nothing is then written.
        OSError: a file cannot be read or written.
    """
    file = PackedFile(Path(path), known_types(parts))
    file.check()
    aliases: dict[str, list[str]] = {}
    for alias, first in file.aliases.items():
        aliases.setdefault(first, []).append(alias)
    header: dict[str, Any] = {}
    offset = 0
    for record in file.records:
        for name, shape, dtype in zip(record.names, record.shapes, record.dtypes, strict=True):
            if dtype not in _SAFETENSORS:
                raise ValueError(f"to_dense: a safetensors file has no type for {name}, {dtype}.")
            size = shape.numel() * dtype.itemsize
            for each in (name, *aliases.get(name, ())):
                header[each] = {
                    "dtype": _SAFETENSORS[dtype],
                    "shape": list(shape),
                    "data_offsets": [offset, offset + size],
                }
                offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with replacing(Path(target)) as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for record in file.records:
            for name, x in file.tensors(record).items():
                data = x.contiguous().reshape(-1).view(torch.uint8).numpy()
                for _ in (name, *aliases.get(name, ())):
                    sink.write(data.data)
