"""Everything a run needs to go on as if it had never been killed: one file, written atomically.

Reading it executes no code (`weights_only`), and finds any damaged byte that matters.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from .atomic import replacing

VERSION = 1


def _ranks() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


# ------------------------------------------------------------------ what belongs to a process


def generators() -> dict[str, Any]:
    """The state of Python's, NumPy's, torch's and CUDA's global generators."""
    version, words, gauss = random.getstate()
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    name, keys, position, has_gauss, cached = state
    return {  # the words as tensors: thousands of numbers would be slow to read
        "python": (version, torch.tensor(words), gauss),
        "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generators(saved: Mapping[str, Any]) -> None:
    """Restore what `generators` returned; CUDA's as far as there are devices."""
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(saved["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda"][: torch.cuda.device_count()])


def object_state(name: str, thing: Any) -> Any:
    """What restores one of the user's objects: its state_dict, or the state of a generator.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, np.random.Generator):
        return _without_arrays(thing.bit_generator.state)
    if hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict"):
        return thing.state_dict()
    raise TypeError(
        f"save={{{name!r}: ...}} needs an object with state_dict and load_state_dict, "
        f"or a torch or NumPy generator, got {type(thing).__name__}."
    )


def _without_arrays(state: Any) -> Any:
    """NumPy arrays as lists: they would need code to be read back, and generators take both."""
    if isinstance(state, Mapping):
        return {key: _without_arrays(x) for key, x in state.items()}
    return state.tolist() if isinstance(state, np.ndarray | np.generic) else state


def _set_object_state(thing: Any, state: Any) -> None:
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    elif isinstance(thing, np.random.Generator):
        thing.bit_generator.state = state
    else:
        thing.load_state_dict(state)


def set_objects(save: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Restore all of the user's objects, or none.

    Raises:
        ValueError: an object refuses its state; all are then as they were.
    """
    before = {name: copy.deepcopy(object_state(name, thing)) for name, thing in save.items()}
    for name, thing in save.items():
        try:
            _set_object_state(thing, states[name])
        except Exception as cause:
            for other, state in before.items():
                with suppress(Exception):  # the first failure is the one to tell
                    _set_object_state(save[other], state)
            raise ValueError(
                f"The checkpoint does not fit save={{{name!r}: ...}}: {cause}. "
                "Give the same objects, made the same way."
            ) from cause


@torch.no_grad()
def set_process(model: nn.Module, own: Mapping[str, Any]) -> None:
    """Restore buffers, gradients, train and eval modes, and last the global generators."""
    for name, x in model.named_buffers():
        saved = own["buffers"].get(name)
        if saved is not None and saved.shape == x.shape:  # a cache may have grown meanwhile
            x.copy_(saved)
    for name, p in model.named_parameters():
        grad = own["gradients"].get(name)
        p.grad = None if grad is None else grad.to(p.device)
    for name, module in model.named_modules():
        module.training = name in own["training"]
    set_generators(own["generators"])


def _kinds(save: Mapping[str, Any]) -> dict[str, str]:
    return {name: type(thing).__name__ for name, thing in save.items()}


# ------------------------------------------------------------------ the file


def exists(path: Path) -> bool:
    """Whether there is a checkpoint to go on from; all processes must see the same.

    Raises:
        ValueError: some processes see the file and others do not.
    """
    _, world = _ranks()
    seen = [path.exists()] * world
    if world > 1:
        distributed.all_gather_object(seen, path.exists())
    if len(set(seen)) > 1:
        raise ValueError(
            f"checkpoint={str(path)!r}: only processes {[i for i, x in enumerate(seen) if x]} of "
            f"{world} see this file. Give a path on a file system that all share."
        )
    return seen[0]


def write(path: Path, lc: Any, model: nn.Module, save: Mapping[str, Any]) -> None:
    """Write the checkpoint whole or not at all; with several processes the first writes for all.

    It is first written beside `path` under one fixed name: what a killed run left there is
    overwritten by the next write.

    Raises:
        TypeError: an object in `save` has no state, or one that cannot be read back without
            executing code. In every process; the file is as before.
        OSError: no room, or no permission. The file is as before.
    """
    own = {
        "generators": generators(),
        "saved": {name: object_state(name, thing) for name, thing in save.items()},
        "kinds": _kinds(save),
        # the next body may go on accumulating gradients; BatchNorm has its own in each process
        "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        "buffers": dict(model.named_buffers()),
        "training": [name for name, module in model.named_modules() if module.training],
        "lc": {name: lc[name] for name in ("history", "best")},
    }
    rank, world = _ranks()
    every = [own] if world == 1 else _gathered(own)
    failure: list[Exception | None] = [None]
    if rank == 0:
        try:
            content = {"version": VERSION, "lc": lc, "model": model.state_dict(), "ranks": every}
            _write(path, content)
        except Exception as cause:
            failure = [cause]
    if world > 1:
        distributed.broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


def _gathered(own: Mapping[str, Any]) -> list[Any]:
    """Every process's part, in the first process, on its CPU; in the others nothing."""
    rank, world = _ranks()
    buffer = io.BytesIO()
    torch.save(own, buffer)
    parts: list[Any] | None = [None] * world if rank == 0 else None
    distributed.gather_object(buffer.getvalue(), parts)
    # from our own processes, a moment ago: whether it is plain data is checked once written
    return [torch.load(io.BytesIO(x), "cpu", weights_only=False) for x in parts or []]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        check = partial(_load, mmap=True)  # not only at the resume
        with replacing(path, check, owned=True) as file:
            torch.save(content, file)
    except (pickle.PickleError, AttributeError, TypeError) as cause:  # how pickle refuses
        raise TypeError(
            "The state of an object in `save`, or of the model, is not plain data "
            f"(tensors, numbers, strings, containers): {cause}"
        ) from cause


def _load(path: Path, mmap: bool = False) -> Any:
    """The file's content, every record checked: torch itself reads over flipped bits."""
    with zipfile.ZipFile(path) as records:
        damaged = records.testzip()
    if damaged is not None:
        raise RuntimeError(f"wrong checksum in {damaged}")
    return torch.load(path, "cpu", weights_only=True, mmap=mmap)


_DICTS = ("generators", "saved", "kinds", "gradients", "buffers", "lc")
_PROCESS = dict.fromkeys(_DICTS, dict) | {"training": list}


def read(path: Path, model: nn.Module, save: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint of this process, checked against `model` and `save`; changes nothing.

    Raises:
        ValueError: not a checkpoint of this version, damaged, of another number of processes,
            of another model, or with other saved objects.
    """
    try:
        content = _load(path)
    except Exception as cause:
        raise ValueError(
            f"{path} is not a readable checkpoint ({cause}). Delete it to start anew."
        ) from cause
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(
            f"{path} is not a checkpoint of version {VERSION}. Delete it to start anew."
        )
    rank, world = _ranks()
    kinds = {"lc": dict, "model": dict, "ranks": list}
    if not _has(content, kinds) or not all(_has(own, _PROCESS) for own in content["ranks"]):
        raise ValueError(f"{path} is not a checkpoint of this library. Delete it to start anew.")
    if len(content["ranks"]) != world:
        raise ValueError(
            f"{path} was written by {len(content['ranks'])} processes, now there are {world}."
        )
    own = content["ranks"][rank]
    if own["kinds"] != _kinds(save):
        raise ValueError(
            f"{path} was written with save={own['kinds']}, this run has {_kinds(save)}: "
            "give the same objects."
        )
    saved, present = _layout(content["model"]), _layout(model.state_dict())
    if saved != present:
        differing = [x for x in {**saved, **present} if saved.get(x) != present.get(x)]
        raise ValueError(
            f"{path} is of another model: {differing} are missing there or here, "
            "or of another shape or type."
        )
    return {**own, "lc": {**content["lc"], **own["lc"]}, "model": content["model"]}


def _has(content: Any, kinds: Mapping[str, type]) -> bool:
    return isinstance(content, dict) and all(
        isinstance(content.get(name), kind) for name, kind in kinds.items()
    )


def _layout(state: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {
        name: (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else ()
        for name, x in state.items()
    }
