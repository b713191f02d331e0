"""Writing a compressed model: one pass over its tensors, one record in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batchnorm import batchnorms
from ..coding import Fixed, Radix, Raw, Support
from ..entropy import Entropy
from ..lc import LC
from ..modules import PackedModule, PackedWeight
from ..part import Coding, Field, Part, all_finite
from ..plain_data import EVERY, dtype_name
from ..scheduled import Scheduled
from ..selection import clean, unwrap
from ..views import joined
from .container import Writer, writing
from .index import describe_fields
from .specs import describe_part

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_HALVES = (torch.float16, torch.bfloat16)
_WORTH = 8  # bytes that entropy coding must save: the index grows by about as many
_SMALL = (
    1024  # uncompressed tensors of fewer entries are not entropy-coded: it saves next to nothing
)


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed task on its way to the file. fields: of θ."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    part: Part[Any]
    fields: Mapping[str, Field]


def save(
    source: LC | Scheduled | nn.Module,
    path: str | os.PathLike[str],
    *,
    uncompressed: torch.dtype | None = None,
    entropy: bool = False,
) -> None:
    """Write a model as one file: θ of its compressed weights, and the rest of its state dict.

    The file takes the place of `path` at the end, whole or not at all (a killed process may leave
    "<name>.<8 digits>.unfinished" beside it). Beyond the model, one task
    is in memory at a time. Tied tensors are stored once: those that share memory, shape and strides
    (a tensor and its transposed view are two).

    Args:
        source: an `LC` or a finished `Scheduled`, whose model is stored as Δ(θ); or a module. Of
            the layers that `load` made (`materialize=`) the packed parts are stored again.
        path: the file; `docs/format.md` describes it.
        uncompressed: float16 or bfloat16, to round all other floating-point tensors to; None: as
            they are. Integers take the smallest type that holds them.
        entropy: entropy-code the fields where that is shorter; smaller, and slower to read. Fields
            of floats take up to five times their size while they are coded, codes two bytes each.

    Raises:
        TypeError: `source` is neither; a part has an argument that is no plain data.
        ValueError: a tensor that cannot be stored: of an unknown type, too large for `uncompressed`
            (its name), or extra state of a module that is no tensor; NaN or inf in θ.
        RuntimeError: the model holds BatchNorm statistics of w instead of Δ(θ) (finalize first), or
            weights that were changed after `finalize`.
        OSError: no room, or no permission. The old file is then as it was.
    """
    if uncompressed not in (None, *_HALVES, torch.float32):
        raise ValueError(
            f"save: uncompressed must be float16, bfloat16, float32 or None, got {uncompressed}."
        )
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"save: there is no folder {target.parent}. Make it first.")
    if isinstance(source, LC | Scheduled):
        _check_run(source)
        model, tasks = unwrap(source.model), _tasks(source)
    elif isinstance(source, nn.Module):
        model = unwrap(source)
        tasks = _packed_layers(model)
    else:
        raise TypeError(f"save takes an LC, a Scheduled or a module, got {type(source).__name__}.")
    with writing(target) as writer:
        _write(writer, model, tasks, uncompressed, entropy)


def _check_run(lc: LC | Scheduled) -> None:
    """Refuse a model whose other tensors do not belong to Δ(θ)."""
    if lc.inside == "refine":
        raise RuntimeError("save inside lc.refine(): θ is brought up to date at its end.")
    if lc.finished:
        for task in lc.tasks:
            if any((p != d).any() for p, d in zip(task.parameters, task.delta, strict=True)):
                raise RuntimeError(
                    f"save: {task.name} was changed after lc.finalize(), so the file would hold "
                    "another model. Train with lc.refine(), or save the module itself."
                )
    elif isinstance(lc, Scheduled):
        raise RuntimeError("save: the plan is not done. Save after scheduled.finalize().")
    elif batchnorms(unwrap(lc.model)) and lc.inside != "compressed":
        raise RuntimeError(
            "save: the BatchNorm statistics still belong to w. Save after lc.finalize("
            "calibration=...), or inside lc.compressed(calibration=...)."
        )


def _tasks(lc: LC | Scheduled) -> Iterator[Compressed]:
    for task in lc.tasks:
        shapes = tuple(p.shape for p in task.parameters)
        dtype, part = task.parameters[0].dtype, task.part
        yield Compressed(task.names, shapes, dtype, part, part.encode(task.state))


def _packed_layers(model: nn.Module) -> Iterator[Compressed]:
    """The packed weights of layers that `load` or `replace_modules` made, each once."""
    seen: set[PackedWeight] = set()
    for name, module in model.named_modules():
        if isinstance(module, PackedModule) and module.packed not in seen:
            weight = module.packed
            seen.add(weight)
            own = (clean(f"{name}.weight" if name else "weight"),)
            yield Compressed(
                own,
                (weight.shape,),
                weight.stored_dtype,
                weight.part,
                {n: Field(x.unpack(), x.coding) for n, x in weight.arrays().items()},
            )


def _write(
    writer: Writer,
    model: nn.Module,
    tasks: Iterable[Compressed],
    uncompressed: torch.dtype | None,
    entropy: bool,
) -> None:
    specs: list[dict[str, Any]] = []
    tensors: list[dict[str, Any]] = []
    done: set[str] = set()
    for task in tasks:
        label = ", ".join(task.names[:4])
        _check_finite(label, task.fields)
        fields, written = _packed(label, task.fields, entropy)
        writer.record(written.values())
        spec = describe_part(task.part)
        if spec not in specs:
            specs.append(spec)
        tensors.append(
            {
                "names": list(task.names),
                "shapes": [list(shape) for shape in task.shapes],
                "dtype": dtype_name(task.dtype),
                "part": specs.index(spec),
                "fields": describe_fields(fields, written, joined(task.shapes)),
            }
        )
        done.update(task.names)
        del task, fields, written  # before the next ones are made
    own, aliases = entries(model)
    rest: list[list[Any]] = []
    modules: dict[str, dict[str, Tensor]] = {}
    for name, x in own.items():
        if name not in done:
            module, _, entry = name.rpartition(".")
            modules.setdefault(module, {})[entry] = x
    for module, held in modules.items():
        described: list[list[Any]] = []
        payloads: dict[str, bytes] = {}
        for entry, x in held.items():
            name = f"{module}.{entry}" if module else entry
            field = {entry: _stored(name, x, uncompressed)}
            packed, payload = _packed(name, field, entropy and x.numel() >= _SMALL)
            payloads |= payload
            ((_, *how),) = describe_fields(packed, payload)
            described.append([entry, dtype_name(x.dtype), *how])
        writer.record(payloads.values())
        rest.append([module, described])
    writer.finish({"parts": specs, "tensors": tensors, "rest": rest, "aliases": aliases})


def entries(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a model's state dict by name, and for each further name of a tied one its
    first.

    Raises:
        ValueError: an entry that is no tensor.
    """
    first: dict[Any, str] = {}
    own: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    inside: list[str] = []  # prefixes of packed weights
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule):
            start = clean(f"{path}." if path else "")
            inside.append(f"{start}packed.")
            name = f"{start}weight"
            if first.setdefault(module.packed, name) != name:
                aliases[name] = first[module.packed]
    packed = tuple(inside)
    for raw, x in model.state_dict(keep_vars=True).items():
        name = clean(raw)
        if name.startswith(packed):
            continue
        if not isinstance(x, Tensor):
            raise ValueError(
                f"save: {name} is a {type(x).__name__}; a packed file holds tensors only."
            )
        # what shares all its memory is one tensor: parameters tied by assignment, or as `.data`
        place = (x.device, x.data_ptr(), x.shape, x.stride(), x.dtype) if x.numel() else id(x)
        key = id(x) if x.is_meta else place
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            own[name] = x
    return own, aliases


def _packed(
    name: str, fields: Mapping[str, Field], entropy: bool
) -> tuple[dict[str, Field], dict[str, bytes]]:
    """The fields as they are written, and their bytes."""
    chosen: dict[str, Field] = {}
    payloads: dict[str, bytes] = {}
    for key, field in fields.items():
        try:
            chosen[key] = field
            if entropy and isinstance(field.coding, Raw | Fixed | Radix | Support):
                coding = Entropy(field.coding)
                payloads[key] = coding.pack(field.data)
                plain = -(-field.coding.bits(field.data) // 8)
                if len(payloads[key]) + _WORTH < plain:
                    chosen[key] = replace(field, coding=coding)
                    continue
                del payloads[key]  # before the other is made
            payloads[key] = field.coding.pack(field.data)
        except ValueError as cause:
            raise ValueError(f"save: {name}, field {key}: {cause}") from cause
    return chosen, payloads


def _check_finite(label: str, fields: Mapping[str, Field]) -> None:
    for key, field in fields.items():
        if field.data.is_floating_point() and not all_finite(field.data):
            raise ValueError(f"save: {label}, field {key}: it contains NaN or inf.")


def _stored(name: str, x: Tensor, uncompressed: torch.dtype | None) -> Field:
    """An uncompressed tensor as a field."""
    x = x.detach()
    if x.is_meta:
        raise ValueError(f"save: {name} is a meta tensor: it has a shape but no values.")
    if x.is_sparse or x.is_quantized or x.layout != torch.strided:
        raise ValueError(f"save: {name} is no plain dense tensor ({x.layout}).")
    if x.dtype not in EVERY:
        raise ValueError(f"save: {name} is {dtype_name(x.dtype)}, which the format does not hold.")
    if x.dtype == torch.bool or (x.dtype == torch.uint8 and x.numel() and int(x.max()) < 2):
        return Field(x, Fixed(1))  # masks
    if x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        x = x.contiguous().view(torch.uint8)
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    if x.is_floating_point() and uncompressed is not None:
        x = _rounded(name, x, uncompressed)
    if x.dtype in _INTEGERS:
        return Field(x, _smallest(x))
    return Field(x, Raw(x.dtype))


def _rounded(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the smaller of both types."""
    if dtype.itemsize >= x.dtype.itemsize:
        return x
    small = x.to(dtype)
    lost = int((torch.isfinite(x) & ~torch.isfinite(small)).sum())
    if lost:
        raise ValueError(
            f"save: {lost} of {x.numel()} values of {name} are too large for "
            f"{dtype_name(dtype)} (up to {float(x.abs().max()):g}): save with "
            "uncompressed=torch.bfloat16 or None."
        )
    return small


def _smallest(x: Tensor) -> Coding:
    """The smallest integers that hold all of `x`."""
    low, high = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
    for dtype in _INTEGERS:
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return Raw(dtype)
    raise AssertionError
