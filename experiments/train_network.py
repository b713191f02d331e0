"""Train a reference network on CIFAR-10 from random weights, for `cifar.py` to compress.

For VGG16, whose trained weights are not around: at full width on a GPU, with a quarter of the
channels (vgg16/4) on a CPU. SGD, a learning rate that rises and falls once, flips and crops.

Run:      python experiments/train_network.py --data DIR --network vgg16/4 --epochs 12
Results:  OUT.pt (the state dict) and OUT.json (errors, epochs, hardware), goes on from OUT.ckpt if
          it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import add_options, apart, bfloat16_pays, changed, check_out, option, origin, write
from networks import network
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from training import batches, images, measured, pieces, train


@dataclass(frozen=True)
class Config:
    data: str = "data"
    out: str = "vgg16"  # path without ending
    network: str = "vgg16/4"
    epochs: int = 12
    lr: float = 0.1  # the highest
    warm: float = 0.2  # share of the steps in which it rises
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 128
    seed: int = 0
    compile: bool = True
    bfloat16: bool = bfloat16_pays()
    smoke: bool = False


def rate(config: Config, done: float) -> float:
    """The learning rate when a share of the steps is done."""
    rising, falling = done / config.warm, (1 - done) / (1 - config.warm)
    return config.lr * min(rising, falling) + 1e-4


def run(config: Config) -> dict[str, Any]:
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = network(config.network).to(device, memory_format=torch.channels_last)
    data = images(config.data, device, config.smoke)
    forward: Any = torch.compile(model) if config.compile else model
    optimizer = torch.optim.SGD(
        model.parameters(),
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
            logits = forward(x)
        return F.cross_entropy(logits.float(), y)

    checkpoint = Path(f"{config.out}.ckpt")
    losses: list[float] = []
    spent = 0.0
    per_epoch = len(data) // config.batch
    total = config.epochs * per_epoch

    def get() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "losses": losses,
            "seconds": spent + time.perf_counter() - started,
            "config": kept(config),
        }

    def put(state: dict[str, Any]) -> None:
        nonlocal spent
        if state["config"] != kept(config):
            raise SystemExit(f"{checkpoint} is of a run with other settings: give another --out.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses.extend(state["losses"])
        spent = state["seconds"]

    with tqdm(total=config.epochs, disable=not sys.stderr.isatty()) as bar:
        for epoch in pieces(checkpoint, config.epochs, get, put, bar):
            model.train()
            stream = batches(data, config.batch, config.seed, epoch, 0, per_epoch)
            first = epoch * per_epoch
            rates = (rate(config, (first + b) / total) for b in range(per_epoch))
            losses.append(train(step, optimizer, stream, rates))
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    error, _ = measured(model, data.test, data.test_labels)
    torch.save(model.state_dict(), f"{config.out}.tmp")
    os.replace(f"{config.out}.tmp", f"{config.out}.pt")
    checkpoint.unlink(missing_ok=True)
    seconds = spent + time.perf_counter() - started
    return {"test_error": error, "losses": losses, "wall_seconds": seconds}


def kept(config: Config) -> dict[str, Any]:
    return {k: v for k, v in asdict(config).items() if k not in ("data", "out")}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, Config())
    config = apart(Config(**vars(parser.parse_args(argv))))
    if config.smoke:
        config = replace(config, network="vgg16/16", epochs=1, batch=64, compile=False)
    check_out(Path(config.out).parent)
    path = Path(f"{config.out}.json")
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8"))["config"] != kept(config):
            raise SystemExit(f"{path} is of a network trained otherwise: give another --out.")
        print(f"{path} is there: delete it to train again.")
        return
    where = origin(__file__)
    result = run(config)
    shown = changed(config) | {"bfloat16": config.bfloat16}  # its default is the machine's
    options = [option(k, v) for k, v in shown.items() if k not in ("data", "out")]
    command = " ".join(["python experiments/train_network.py --data DIR", *options])
    write(path, {"command": command, "config": kept(config), "result": result, **where})
    print(f"{config.network}: {result['test_error']:.2f} % test error")


if __name__ == "__main__":
    main(sys.argv[1:])
