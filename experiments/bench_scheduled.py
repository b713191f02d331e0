"""What a schedule costs: one training step with it against one without, ResNet20, batch 128, under
torch.compile.

Three copies of the network take turns, step by step, in one process: plain SGD; weights pruned by
half and quantized to 8 bits; the same and activations, pruned by half before the ReLU and
quantized to 8 bits, the network's input and the blocks' outputs quantized too. All of it is
switched on in the first steps, which are not measured. Ratios are medians over pairs of
neighbouring steps. On the CPU, processor time of one thread; on a GPU, wall time with one
synchronisation a step.

Run:      python experiments/bench_scheduled.py
Results:  experiments/results/bench_scheduled.json
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_l_step import clock, in_turns, summary
from common import add_options, apart, changed, option, origin, write
from networks import network
from torch import nn
from torch.nn import functional as F

from lc_compress import FixedPoint, Sparse
from lc_compress.scheduled import (
    ActivationPruner,
    ActivationQuantizer,
    Delay,
    Plan,
    Scheduled,
    insert,
)

PLAN = Plan(1000, Delay(1), Delay(2), Delay(3), Delay(4))
LIMITS = {"weights": 1.15, "weights and activations": 1.3}
_FIRST = 5  # steps in which all is switched on


@dataclass(frozen=True)
class Config:
    network: str = "resnet20"
    batch: int = 128
    rounds: int = 40
    compiled: bool = True
    out: str = "experiments/results/bench_scheduled.json"
    smoke: bool = False


class Trained:
    """A network with its optimizer; `step` is one training step and returns its seconds."""

    def __init__(self, config: Config, way: str) -> None:
        torch.manual_seed(0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = network(config.network).to(device, memory_format=torch.channels_last)
        images = torch.randn(config.batch, 3, 32, 32, device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, 10, (config.batch,), device=device)
        if way == "weights and activations":
            quantize = ActivationQuantizer(FixedPoint(8), window=config.batch)
            both = (ActivationPruner(0.5, window=config.batch), quantize)
            after = {"bn1": both, "layer?.?.bn1": both, "layer?.?": quantize}
            insert(model, self.images, before={"conv1": quantize}, after=after)
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)
        if way != "plain":
            weights = {
                "layer*.weight": Sparse(density=0.5).then(FixedPoint(8)),
                "conv1.weight": FixedPoint(8),
                "linear.weight": FixedPoint(8),
            }
            self.run = Scheduled(
                model, weights, plan=PLAN, optimizer=self.optimizer, batch_size=config.batch
            )
        self.forward: nn.Module = model
        for _ in range(_FIRST):
            self.step()
        if config.compiled:
            self.forward = torch.compile(model)

    def step(self) -> float:
        begin = clock()
        loss = F.cross_entropy(self.forward(self.images), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return clock() - begin


def run(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {way: Trained(config, way) for way in ("plain", *LIMITS)}
    result = summary(in_turns(found, config.rounds), "plain")
    for name, limit in LIMITS.items():
        result[name] |= {"limit": limit, "met": result[name]["ratio"] <= limit}
    return {"ways": result}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, Config())
    config = apart(Config(**vars(parser.parse_args(argv))))
    if config.smoke:
        config = replace(config, network="resnet8", rounds=2, batch=8, compiled=False)
    torch.set_num_threads(1)
    where, started = origin(__file__), time.perf_counter()
    result = run(config)
    result["wall_seconds"] = time.perf_counter() - started
    given = [option(k, v) for k, v in changed(config).items() if k != "out"]
    command = " ".join(["python experiments/bench_scheduled.py", *given])
    kept = {k: v for k, v in asdict(config).items() if k != "out"}
    write(Path(config.out), {"command": command, "config": kept, "result": result, **where})
    for name, row in result["ways"].items():
        limit = f", at most {row['limit']}" if "limit" in row else ""
        print(f"{name:25} {1e3 * row['seconds']:8.1f} ms  x {row['ratio']:.3f}{limit}")


if __name__ == "__main__":
    main(sys.argv[1:])
