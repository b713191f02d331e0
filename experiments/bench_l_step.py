"""What the penalty costs: one training step with LC against one without, ResNet20, batch 128.

Four copies of the network take turns, step by step, in one process: plain SGD, classic LC (penalty
in the gradient, and as an implicit step) and straight-through with a C step in every iteration,
on one bit + 2 % floats in all layers; in float32 and with bfloat16 autocast. Ratios are medians
over pairs of neighbouring steps. On the CPU, processor time of one thread; on a GPU, wall time with
one synchronisation a step.

Then the plain step in other settings of PyTorch: which of them the runs on this machine should use.

Run:      python experiments/bench_l_step.py
Results:  experiments/results/bench_l_step.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import schemes
import torch
from common import add_options, apart, changed, option, origin, write
from networks import network
from torch import Tensor, nn
from torch.nn import functional as F

from lc_compress import LC, constant

WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "classic": {"implicit": False},
    "classic, implicit": {"implicit": True},
    "straight-through, C step every iteration": {"gradient": "sum"},
}
LIMITS = {"classic": 1.03, "straight-through, C step every iteration": 1.15}
TYPES = {"ways": False, "ways_bfloat16": True}  # group of the result: with bfloat16 autocast
_WARM = 3  # steps before the measurement; torch.compile works in the first


@dataclass(frozen=True)
class Config:
    network: str = "resnet20"
    scheme: str = "binary + sparse 2%"
    batch: int = 128
    rounds: int = 40
    settings: bool = True  # also compare settings of PyTorch
    out: str = "experiments/results/bench_l_step.json"
    smoke: bool = False


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Trained:
    """A network with its optimizer; `step` is one training step and returns its seconds."""

    def __init__(
        self,
        config: Config,
        options: dict[str, Any] | None,
        *,
        compiled: bool,
        channels_last: bool = True,
        half: bool = False,
    ) -> None:
        torch.manual_seed(0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = network(config.network).to(device, memory_format=layout)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4
        )
        self.lc = None
        if options is not None:
            mu = 0.0 if options.get("gradient") == "sum" else 0.1
            tasks = schemes.tasks(self.model, config.scheme)
            steps = constant(mu, 1)
            self.lc = LC(self.model, tasks, schedule=steps, optimizer=self.optimizer, **options)
        self.forward: nn.Module = torch.compile(self.model) if compiled else self.model
        images = torch.randn(config.batch, 3, 32, 32, device=device)
        self.images = images.contiguous(memory_format=layout)
        self.labels = torch.randint(0, 10, (config.batch,), device=device)
        self.half, self.device = half, device

    def step(self) -> float:
        begin = clock()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss: Tensor = F.cross_entropy(self.forward(self.images), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return clock() - begin


def in_turns(found: dict[str, Trained], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step; the order turns round by one each time."""
    names = list(found)
    for name in names:
        for _ in range(_WARM):
            found[name].step()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(found[name].step())
    return seconds


def summary(seconds: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Medians, and the median of the ratios to the base's step of the same round."""
    table: dict[str, Any] = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[base], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        table[name] = {"seconds": statistics.median(own), "ratio": statistics.median(ratios)}
        table[name]["quartiles"] = [quartiles[0], quartiles[2]]
    return table


def run(config: Config) -> dict[str, Any]:
    compiled = not config.smoke
    make: Callable[..., Trained] = lambda **o: Trained(config, **o)  # noqa: E731
    result: dict[str, Any] = {}
    for group, half in TYPES.items():
        ways = {n: make(options=o, compiled=compiled, half=half) for n, o in WAYS.items()}
        result[group] = summary(in_turns(ways, config.rounds), "plain")
        for name, limit in LIMITS.items():
            row = result[group][name]
            row |= {"limit": limit, "met": row["ratio"] <= limit}
    if config.settings:
        settings = {
            ", ".join(
                (
                    "compiled" if c else "eager",
                    "channels last" if last else "contiguous",
                    "bfloat16" if half else "float32",
                )
            ): make(options=None, compiled=c, channels_last=last, half=half)
            for c, last, half in product((compiled, False), (True, False), (False, True))
        }
        rounds = max(2, config.rounds // 3)
        result["settings"] = summary(in_turns(settings, rounds), next(iter(settings)))
    return result


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, Config())
    config = apart(Config(**vars(parser.parse_args(argv))))
    if config.smoke:
        config = replace(config, network="resnet8", rounds=2, batch=16)
    torch.set_num_threads(1)
    where, started = origin(__file__), time.perf_counter()
    result = run(config)
    result["wall_seconds"] = time.perf_counter() - started
    given = [option(k, v) for k, v in changed(config).items() if k != "out"]
    command = " ".join(["python experiments/bench_l_step.py", *given])
    kept = {k: v for k, v in asdict(config).items() if k != "out"}
    write(Path(config.out), {"command": command, "config": kept, "result": result, **where})
    for group in (x for x in (*TYPES, "settings") if x in result):
        print(group)
        for name, row in result[group].items():
            limit = f", at most {row['limit']}" if "limit" in row else ""
            print(f"{name:45} {1e3 * row['seconds']:8.1f} ms  x {row['ratio']:.3f}{limit}")


if __name__ == "__main__":
    main(sys.argv[1:])
