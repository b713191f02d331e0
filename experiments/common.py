"""What the scripts share: settings as options of the command line, where a result comes from, and
how it is written.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent


def origin(script: str) -> dict[str, object]:
    """Commit, checksums of the script and of the package, version of torch, device."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    package = hashlib.sha256()
    for path in sorted((ROOT.parent / "lc_compress").rglob("*.py")):
        package.update(path.read_bytes())
    return {
        "commit": commit.stdout.strip(),
        "source_sha256": hashlib.sha256(Path(script).read_bytes()).hexdigest(),
        "package_sha256": package.hexdigest(),
        "torch": torch.__version__,
        "device": device_name(),
        "threads": torch.get_num_threads(),
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def bfloat16_pays() -> bool:
    """Whether this machine has instructions for bfloat16: a GPU, or a processor that multiplies it.

    On the CPU of bench_l_step.json, which has them, a step then takes two thirds of the time.
    """
    found = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions
    return torch.cuda.is_available() or any(has for x, has in found.items() if "bf16" in x)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file that one process can hold at a time; it is removed afterwards, and free if the
    process dies.

    Raises:
        BlockingIOError: another process holds it.
    """
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path))):
            raise BlockingIOError(f"{path} was another process's a moment ago")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_out(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as cause:
        raise SystemExit(
            f"--out {folder} cannot be written to ({cause}): give a folder that can."
        ) from cause


def apart(config: Any) -> Any:
    """The settings with an output of their own for --smoke, unless one was given: nothing made of
    random data replaces a result.
    """
    path = Path(type(config)().out)
    if not config.smoke or config.out != str(path):
        return config
    return replace(config, out=str(path.with_name(f"{path.stem}_smoke{path.suffix}")))


def write(path: Path, content: object) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def add_options(parser: argparse.ArgumentParser, config: Any) -> None:
    """An option for every field of a dataclass; `config` has the defaults. A field's metadata may
    have its "help" and other names of it, "also".
    """
    for field in fields(config):
        value = getattr(config, field.name)
        names = [f"--{field.name.replace('_', '-')}", *field.metadata.get("also", ())]
        shown = f"{field.metadata.get('help', '')} ({value!r})".replace("%", "%%")
        if isinstance(value, bool):
            parser.add_argument(
                *names, action=argparse.BooleanOptionalAction, default=value, help=shown
            )
        else:
            parser.add_argument(
                *names, type=type(value), default=value, dest=field.name, help=shown
            )


def option(key: str, value: object) -> str:
    """A setting as it is written on the command line."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


def changed(config: Any) -> dict[str, Any]:
    """The settings of a dataclass that are not at their default."""
    return {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.default is MISSING or getattr(config, f.name) != f.default
    }
