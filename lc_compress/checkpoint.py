"""Everything a run needs to go on as if it had never been killed: one file, written atomically, read without executing code."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

VERSION = 1


def _ranks() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def generators() -> dict[str, Any]:
    """The state of Python's, NumPy's, torch's and CUDA's global generators."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(name), keys.tolist(), int(position), int(has_gauss), float(cached)),  # type: ignore[union-attr]  # a tuple, as asked
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generators(saved: Mapping[str, Any]) -> None:
    """Restore what `generators` returned."""
    random.setstate(saved["python"])
    name, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda"])


def object_state(name: str, thing: Any) -> Any:
    """What restores one of the user's objects: its state_dict, or the state of a generator."""
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, np.random.Generator):
        return thing.bit_generator.state
    if hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict"):
        return thing.state_dict()
    raise TypeError(
        f"save={{{name!r}: ...}} needs an object with state_dict and load_state_dict, or a torch or NumPy generator, "
        f"got {type(thing).__name__}."
    )


def set_object_state(thing: Any, state: Any) -> None:
    """Restore what `object_state` returned."""
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    elif isinstance(thing, np.random.Generator):
        thing.bit_generator.state = state
    else:
        thing.load_state_dict(state)


def write(path: Path, lc: Any, model: nn.Module, save: Mapping[str, Any]) -> None:
    """Write the checkpoint whole or not at all; with several processes the first writes for all.

    Raises:
        TypeError: something in `save` cannot be read back without executing code.
    """
    rank, world = _ranks()
    own = {
        "generators": generators(),
        "saved": {name: object_state(name, thing) for name, thing in save.items()},
    }
    every: list[Any] = [own]
    if world > 1:
        every = [None] * world
        torch.distributed.all_gather_object(every, own)
    if rank == 0:
        content = {"version": VERSION, "lc": lc, "model": model.state_dict(), "ranks": every}
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            if not path.exists():
                _check_readable(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    if world > 1:
        torch.distributed.barrier()


def _check_readable(path: Path) -> None:
    """Find out at the first write, not at the resume, that an object's state is not plain data."""
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as cause:
        raise TypeError(
            f"The state of an object in `save` is not plain data (tensors, numbers, strings, containers): {cause}"
        ) from cause


def read(path: Path, save: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint of this process, checked against `save`, before anything is restored.

    Raises:
        ValueError: not a checkpoint of this version, damaged, of another number of processes, or with other saved objects.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as cause:
        raise ValueError(
            f"{path} is not a readable checkpoint ({cause}). Delete it to start anew."
        ) from cause
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(
            f"{path} is not a checkpoint of version {VERSION}. Delete it to start anew."
        )
    rank, world = _ranks()
    if len(content["ranks"]) != world:
        raise ValueError(
            f"{path} was written by {len(content['ranks'])} processes, now there are {world}."
        )
    own = content["ranks"][rank]
    if set(own["saved"]) != set(save):
        raise ValueError(
            f"{path} was written with save={sorted(own['saved'])}, this run has {sorted(save)}: give the same objects."
        )
    return {"lc": content["lc"], "model": content["model"], **own}
