"""ResNet20 on CIFAR-10: every layer as one bit per weight plus 2 % floats, learned by LC.

Reference, direct compression (BatchNorm of the reference, and re-estimated) and LC in one run, with
the loss gradient at w (classic) or at Δ(θ) (`--gradient sum`). Nothing is chosen on test images:
the last step counts. Classic runs hold out 5 000 training images to watch it; straight-through runs
train on all 50 000, since what limits them is not the training loss.

Run:      python experiments/cifar_resnet.py --data DIR --weights FILE [--gradient sum] [--seed 1]
          DIR: CIFAR-10's binary files.   FILE: resnet20-12fca82f.th, the pretrained network.
Summary:  python experiments/cifar_resnet.py --summary          (all stored seeds: mean and spread)
Results:  experiments/results/cifar_resnet20_*.json, with hardware and wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from common import option, origin, write
from data import TEST, TRAIN, augmented, cifar10, normalized, padded
from networks import network, reference
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lc_compress import LC, Binary, Sparse, constant, geometric

CALIBRATION_EPOCH = 99  # its batches are drawn for BatchNorm only
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Config:
    data: str = "data"
    weights: str = "data/resnet20-12fca82f.th"
    depth: int = 20
    gradient: str = "weights"  # "weights": classic LC; "sum": straight-through
    density: float = 0.02  # exact floats per layer
    epochs: int = 4
    steps_per_epoch: int = 4  # classic: LC steps in one epoch
    multipliers: bool = True  # augmented Lagrangian; without: quadratic penalty
    mu0: float = 0.05
    growth: float = 1.6  # of mu, per epoch
    lr: float = 0.03
    lr_end: float = 0.001  # falls linearly
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch: int = 128
    held_out: int = 5_000  # training images kept to watch the run; 0: none
    calibration: int = 64  # batches for BatchNorm statistics, augmented as in training
    seed: int = 0
    compile: bool = True
    bfloat16: bool = False  # pays only where the processor has instructions for it
    checkpoint: str = ""  # file to resume from
    out: str = ""
    smoke: bool = False


DEFAULTS = {
    "weights": {},
    "sum": {"lr": 0.02, "lr_end": 0.0005, "epochs": 12, "steps_per_epoch": 1, "held_out": 0},
}


# ------------------------------------------------------------------ model


def pretrained(config: Config) -> nn.Module:
    name = f"resnet{config.depth}"
    model = network(name) if config.smoke else reference(name, config.weights)
    return model.to(memory_format=torch.channels_last)


# ------------------------------------------------------------------ data


@dataclass
class Data:
    images: Tensor
    labels: Tensor
    train: Tensor  # indices
    held_out: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(config: Config) -> Data:
    if config.smoke:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (600, 3, 32, 32), generator=generator).to(torch.uint8)
        labels = torch.randint(0, 10, (600,), generator=generator)
        test_images, test_labels = images[:200], labels[:200]
    else:
        images, labels = cifar10(config.data, TRAIN)
        test_images, test_labels = cifar10(config.data, TEST)
    order = torch.randperm(
        len(images), generator=torch.Generator().manual_seed(12345)
    )  # the same split for all seeds
    split = config.held_out
    return Data(images, labels, order[split:], order[:split], test_images, test_labels)


def batches(
    data: Data, pad: Tensor, config: Config, epoch: int, first: int, last: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches first … last − 1 of an epoch, with their labels.

    A function of seed and epoch alone: a resumed run sees the same ones.
    """
    order = torch.randperm(
        len(data.train), generator=torch.Generator().manual_seed(1000 * config.seed + epoch)
    )
    for b in range(first, last):
        index = data.train[order[b * config.batch : (b + 1) * config.batch]]
        generator = torch.Generator().manual_seed((1000 * config.seed + epoch) * 100_000 + b)
        yield normalized(augmented(pad, index, generator)), data.labels[index]


@torch.no_grad()
def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of wrong answers in percent."""
    model.eval()
    wrong = 0
    for x, y in zip(images.split(1000), labels.split(1000), strict=True):
        wrong += int((model(normalized(x)).argmax(1) != y).sum())
    return 100 * wrong / len(labels)


# ------------------------------------------------------------------ one run


def run(config: Config) -> dict[str, object]:
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    data, model = load(config), pretrained(config)
    pad = padded(data.images)
    per_epoch = len(data.train) // config.batch
    count = min(config.calibration, per_epoch)
    calibration = [x for x, _ in batches(data, pad, config, CALIBRATION_EPOCH, 0, count)]
    clean = [normalized(data.images[index]) for index in data.train[:5000].split(500)]
    test = (data.test_images, data.test_labels)
    held_out = (data.images[data.held_out], data.labels[data.held_out])

    reference = error(model, *test)
    if config.depth == 20 and not config.smoke and abs(reference - 8.27) > 0.005:
        raise SystemExit(
            f"The reference has {reference:.2f} % test error instead of 8.27 %: "
            "wrong weights or data."
        )
    say(f"reference: {reference:.2f} % test error")

    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    steps = config.epochs * config.steps_per_epoch
    straight = config.gradient == "sum"
    schedule = (
        constant(0.0, steps)
        if straight
        else geometric(config.mu0, config.growth ** (1 / config.steps_per_epoch), steps)
    )
    part = Binary() + Sparse(density=config.density)
    lc = LC(
        model,
        {"*conv*.weight": part, "linear.weight": part},
        schedule=schedule,
        optimizer=optimizer,
        gradient=config.gradient,
        multipliers=config.multipliers,
        implicit=False,
        example_inputs=torch.zeros(1, 3, 32, 32),
    )
    with lc.compressed(calibration=None):
        direct_raw = error(model, *test)
    with lc.compressed(calibration=calibration):
        direct = error(model, *test)
    say(f"direct compression: {direct_raw:.2f} %, with BatchNorm re-estimated {direct:.2f} %")

    network = torch.compile(model) if config.compile else model
    curve: list[dict[str, float]] = []
    trained = 0.0
    for step in lc.steps(checkpoint=config.checkpoint or None, save={"optimizer": optimizer}):
        begin = time.perf_counter()
        epoch, quarter = divmod(step.index, config.steps_per_epoch)
        first = quarter * per_epoch // config.steps_per_epoch
        last = (quarter + 1) * per_epoch // config.steps_per_epoch
        model.train()
        total = 0.0
        for b, (x, y) in enumerate(batches(data, pad, config, epoch, first, last), start=first):
            share = (epoch * per_epoch + b) / (config.epochs * per_epoch)
            optimizer.param_groups[0]["lr"] = config.lr + (config.lr_end - config.lr) * share
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
                loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        lc.log(loss=total / max(last - first, 1))
        trained += time.perf_counter() - begin
        if quarter + 1 == config.steps_per_epoch:
            entry = {"epoch": epoch + 1, "mu": step.mu, "loss": total / max(last - first, 1)}
            if config.held_out:
                lc.c_step()
                with lc.compressed(calibration=calibration):
                    entry["held_out_error"] = error(model, *held_out)
                lc.log(held_out=entry["held_out_error"])
            curve.append(entry)
            seconds = time.perf_counter() - started
            shown = ", ".join(f"{key} {value:.4g}" for key, value in entry.items())
            say(f"{shown}, {seconds:.0f} s")
    report = lc.report()
    with lc.compressed(calibration=None):
        kept = error(model, *test)
    with lc.compressed(calibration=clean):
        cleaned = error(model, *test)
    lc.finalize(calibration=calibration)
    final = error(model, *test)
    size = f"{report.total.bits / 8e3:.1f} kB, ratio {report.total.ratio32:.2f}"
    say(f"LC, last step: {final:.2f} % test error, {size}")
    return {
        "reference_error": reference,
        "direct_error_reference_batchnorm": direct_raw,
        "direct_error": direct,
        "lc_error": final,
        "lc_error_batchnorm_of_training": kept,
        "lc_error_batchnorm_without_augmentation": cleaned,
        "bits": report.total.bits,
        "bits_per_weight": report.total.bits_per_weight,
        "ratio_float32": report.total.ratio32,
        "ratio_float16": report.total.ratio16,
        "gap": [entry["gap"] for entry in lc.history],
        "curve": curve,
        "training_seconds": trained,
        "wall_seconds": time.perf_counter() - started,
    }


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


# ------------------------------------------------------------------ results


def summary(folder: Path) -> None:
    """Mean and spread over the stored seeds, for each way of learning."""
    table: dict[str, object] = {}
    for gradient in ("weights", "sum"):
        runs = [
            json.loads(p.read_text())
            for p in sorted(folder.glob(f"cifar_resnet20_{gradient}_seed*.json"))
        ]
        if not runs:
            continue
        errors = [r["result"]["lc_error"] for r in runs]
        first = runs[0]["result"]
        table[gradient] = {
            "seeds": [r["config"]["seed"] for r in runs],
            "epochs": runs[0]["config"]["epochs"],
            "reference_error": first["reference_error"],
            "direct_error_reference_batchnorm": first["direct_error_reference_batchnorm"],
            "direct_error": first["direct_error"],
            "lc_errors": errors,
            "lc_error_mean": statistics.mean(errors),
            "lc_error_std": statistics.stdev(errors) if len(errors) > 1 else 0.0,
            "ratio_float32": statistics.mean(r["result"]["ratio_float32"] for r in runs),
            "bits_per_weight": statistics.mean(r["result"]["bits_per_weight"] for r in runs),
            "wall_seconds_mean": statistics.mean(r["result"]["wall_seconds"] for r in runs),
            "command": runs[0]["command"],
        }
    write(folder / "cifar_resnet20.json", table)
    print(json.dumps(table, indent=1))


def defaults_of(gradient: str) -> Config:
    return replace(Config(), gradient=gradient, **DEFAULTS[gradient])


def parse(argv: list[str]) -> tuple[Config, bool]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--gradient", choices=["weights", "sum"], default="weights")
    known, _ = parser.parse_known_args(argv)
    defaults = defaults_of(known.gradient)
    for field in fields(Config):
        value = getattr(defaults, field.name)
        if field.name == "gradient":
            continue
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(option, type=type(value), default=value)
    chosen = vars(parser.parse_args(argv))
    wanted = chosen.pop("summary")
    config = Config(**chosen)
    if config.smoke:
        config = replace(
            config,
            depth=8,
            epochs=2,
            held_out=min(config.held_out, 100),
            calibration=2,
            batch=64,
            compile=False,
        )
    return config, wanted


def main(argv: list[str]) -> None:
    config, wanted = parse(argv)
    if wanted:
        summary(Path(config.out) if config.out else RESULTS)
        return
    where = origin(__file__)  # of the code that runs, not of what the folder holds when it ends
    result = run(config)
    smoke = "_smoke" if config.smoke else ""
    name = f"cifar_resnet{config.depth}_{config.gradient}_seed{config.seed}{smoke}.json"
    path = Path(config.out) if config.out else RESULTS / name
    local = {"data": "DIR", "weights": "FILE", "checkpoint": "", "out": ""}
    kept = {key: value for key, value in asdict(config).items() if key not in local}
    changed = {key: x for key, x in kept.items() if x != getattr(defaults_of(config.gradient), key)}
    options = [option(key, x) for key, x in changed.items()]
    command = (
        "python experiments/cifar_resnet.py --data DIR --weights FILE "
        f"--gradient {config.gradient} {' '.join(options)}".rstrip()
    )
    write(path, {"command": command, "config": kept, "result": result, **where})


if __name__ == "__main__":
    main(sys.argv[1:])
