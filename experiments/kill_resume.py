"""Runs killed with SIGKILL at random instants, started again, and compared with whole ones.

A small convolutional net on scikit-learn's digits, with BatchNorm, dropout, noise from NumPy and
Python, a shuffling loader and a learning-rate schedule, compressed by classic LC (SGD, momentum)
and straight-through (AdamW, a C step after every second optimizer step). A run is started, killed
after a random time, and started again until it finishes; then the next one begins, until there
were enough kills. Compared are all bits of weights, buffers, θ, λ, w, history, optimizer, scheduler
and generators.

Claim: 100 kills, some of them in the middle of writing the checkpoint, change no bit.

Run:      python experiments/kill_resume.py [--kills 100]      (1 minute on one idle core)
Results:  experiments/results/kill_resume.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import origin, write
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from lc_compress import LC, Binary, LowRank, Matrix, Sparse, Sum, constant, geometric

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Config:
    kills: int = 100  # half of them in classic runs, half in straight-through ones
    steps: int = 20  # LC steps of one run
    images: int = 128  # for training; a body sees each once
    batch: int = 32
    lr: float = 0.05  # classic; straight-through: a tenth
    mu0: float = 0.01
    growth: float = 1.2
    density: float = 0.05
    writes: int = 2  # a kill comes after at most as many writes of the checkpoint,
    share: float = 0.1  # and then within this share of an uninterrupted run's duration
    seed: int = 0  # of the runs; the instants of the kills are not reproducible
    out: str = ""
    smoke: bool = False


# ------------------------------------------------------------------ the run that gets killed


def net() -> nn.Sequential:
    convolutions = (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 10))


def run(config: Config, gradient: str, checkpoint: str | None, result: str) -> None:
    """One run, gone on with if its checkpoint exists; writes a hash of every bit of its outcome."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its semaphores would survive the kill
    resumed = checkpoint is not None and Path(checkpoint).exists()
    seed = config.seed + 1000 * resumed  # all that a resumed run starts with is wrong
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    order = torch.Generator().manual_seed(seed)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[: config.images, None] / 16
    y = torch.tensor(digits.target)[: config.images]
    loader = DataLoader(TensorDataset(x, y), config.batch, shuffle=True, generator=order)
    model = net()
    straight = gradient == "sum"
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), config.lr / 10)
        if straight
        else torch.optim.SGD(model.parameters(), config.lr, momentum=0.9)
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    sparse = Sparse(density=config.density)
    three = Sum((Binary(), LowRank(2).over(Matrix()), sparse), tolerance=1e-4)
    lc = LC(
        model,
        {"0.weight": Binary(axis=0) + sparse if straight else three, "6.weight": Binary() + sparse},
        schedule=constant(0.0, config.steps)
        if straight
        else geometric(config.mu0, config.growth, config.steps),
        optimizer=optimizer,
        gradient=gradient,
        every=2 if straight else 1,
    )
    save = {"optimizer": optimizer, "scheduler": scheduler, "order": order}
    for _ in lc.steps(progress=False, checkpoint=checkpoint, save=save if checkpoint else None):
        model.train()
        total = 0.0
        for images, labels in loader:
            noise = torch.from_numpy(np.random.standard_normal(images.shape)).float()
            loss = F.cross_entropy(model(images + 0.1 * random.random() * noise), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        scheduler.step()
        lc.log(loss=total)
    outcome = {
        "lc": lc.state_dict(),
        "trained": {name: x.clone() for name, x in model.state_dict().items()},
        **{name: thing.state_dict() for name, thing in save.items() if thing is not order},
        "order": order.get_state(),
        "generators": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
    }
    lc.finalize(calibration=[x])
    outcome["final"] = dict(model.state_dict())
    write(Path(result), {"sha256": digest(outcome), "loss": lc.history[-1]["loss"]})


def digest(outcome: Any) -> str:
    """A hash of every value, type, shape and layout."""
    total = hashlib.sha256()

    def add(x: Any) -> None:
        if isinstance(x, Tensor):
            total.update(f"{x.dtype} {tuple(x.shape)} {x.stride()}".encode())
            total.update(x.detach().contiguous().numpy().tobytes())
        elif isinstance(x, np.ndarray):
            total.update(x.tobytes())
        elif isinstance(x, Mapping):
            for key, value in x.items():
                total.update(f"{key}:".encode())
                add(value)
        elif isinstance(x, list | tuple):
            total.update(f"{len(x)}".encode())
            for value in x:
                add(value)
        else:
            total.update(f"{type(x).__name__} {x!r}".encode())

    add(outcome)
    return total.hexdigest()


# ------------------------------------------------------------------ killing


def started(config: Config, gradient: str, checkpoint: Path | None, result: Path) -> Any:
    """A new process, forked from one that has only imported: that takes longer than the run."""
    context = multiprocessing.get_context("forkserver")
    name = None if checkpoint is None else str(checkpoint)
    process = context.Process(target=run, args=(config, gradient, name, str(result)))
    process.start()
    return process


def finished(process: Any) -> None:
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"The run failed by itself, exit code {process.exitcode}.")


def killed(config: Config, gradient: str, kills: int, folder: Path) -> dict[str, Any]:
    """Kill runs `kills` times in all, each again and again until it has finished, and compare."""
    reference = folder / "reference.json"
    seconds = 0.0
    for _ in range(2):  # the second does not wait for imports
        begin = time.perf_counter()
        finished(started(config, gradient, None, reference))
        seconds = time.perf_counter() - begin
    expected = json.loads(reference.read_text())
    checkpoint, end = folder / "run.pt", folder / "run.json"
    temporary = folder / "run.pt.tmp"
    counts = {"kills": 0, "before_the_first_checkpoint": 0, "in_a_write": 0, "runs": 0}
    identical = True
    while True:
        process = started(config, gradient, checkpoint, end)
        before = stamp(temporary)  # of an earlier kill
        if counts["kills"] < kills:
            for _ in range(random.randint(0, config.writes)):
                last = stamp(checkpoint)
                while process.is_alive() and stamp(checkpoint) == last:
                    time.sleep(0.001)
            process.join(timeout=random.uniform(0, config.share * seconds))
        else:
            process.join()
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        if process.exitcode == -signal.SIGKILL:
            counts["kills"] += 1
            counts["before_the_first_checkpoint"] += not checkpoint.exists()
            counts["in_a_write"] += stamp(temporary) not in (None, before)
            continue
        finished(process)
        counts["runs"] += 1
        identical &= json.loads(end.read_text()) == expected
        for path in (checkpoint, end):
            path.unlink()
        if temporary.exists():
            raise SystemExit(f"{temporary.name} is left after a run that finished.")
        if counts["kills"] >= kills:
            return {**counts, "identical": identical, "run_seconds": seconds, **expected}


def stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


# ------------------------------------------------------------------ results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Config):
        option, value = f"--{field.name.replace('_', '-')}", getattr(Config(), field.name)
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(option, type=type(value), default=value)
    config = Config(**vars(parser.parse_args()))
    if config.smoke:
        config = replace(config, kills=2, steps=5)
    where, begin = origin(__file__), time.perf_counter()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "sklearn.datasets", "lc_compress"])
    result = {}
    for gradient, kills in (("weights", (config.kills + 1) // 2), ("sum", config.kills // 2)):
        with tempfile.TemporaryDirectory() as folder:
            result[gradient] = killed(config, gradient, kills, Path(folder))
    total = {
        key: sum(mode[key] for mode in result.values()) for key in ("kills", "in_a_write", "runs")
    }
    total["identical"] = all(mode["identical"] for mode in result.values())
    kept = {key: value for key, value in asdict(config).items() if key != "out"}
    name = f"kill_resume{'_smoke' if config.smoke else ''}.json"
    write(
        Path(config.out) if config.out else RESULTS / name,
        {
            "command": f"python experiments/kill_resume.py --kills {config.kills}",
            "config": kept,
            "result": {**total, **result, "wall_seconds": time.perf_counter() - begin},
            **where,
        },
    )
    verdict = "identical" if total["identical"] else "NOT identical"
    print(
        f"{total['kills']} kills in {total['runs']} runs, {total['in_a_write']} of the kills "
        f"in a write: {verdict} to runs that were never killed"
    )
    if not total["identical"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
