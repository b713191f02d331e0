"""Which starts first in training, pruning or quantization? A pretrained ResNet20 is fine-tuned on
CIFAR-10 with weights, or weights and activations, pruned by half and quantized, by every order of
"Training Deep Neural Networks with Joint Quantization and Pruning of Weights and Activations", its
schedule scaled to the steps at hand.

The paper trains 250 epochs from random weights; this is fine-tuning, as long as --steps says. The
first convolution and the last layer are quantized and not pruned; activations have one scale per
tensor; masks sit before the ReLUs; the sums of shortcuts and the network's input are quantized
only. Each point is measured from its packed file: saved, loaded into a new network, tested. The
running statistics of BatchNorm are re-estimated at the end, for all alike. Nothing is chosen on
test images: the last step counts.

Run:      python experiments/training_order.py --data DIR --weights FILE
          [--orders "prune-quantize late"] [--whats "weights both"] [--bits "8 4"] [--seeds "0 1 2"]
          every combination that has no record yet; --orders all: the orders of the paper.
          --data digits --network resnet8: handwritten digits, 8×8, trained from random weights;
          --pretrain STEPS: without compression first.
Results:  OUT/NAME.json, one for each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import add_options, changed, option, origin, write
from data import normalized
from networks import network, reference
from torch import Tensor, nn
from torch.nn import functional as F
from training import CALIBRATION, Images, batches, images, measured

from lc_compress import LC, FixedPoint, Sparse, geometric, load, save
from lc_compress.batchnorm import recalibrate
from lc_compress.density import Amount, count_features, performance_density, stored_density
from lc_compress.scheduled import (
    ActivationPruner,
    ActivationQuantizer,
    Delay,
    Plan,
    Scheduled,
    insert,
    prune_then_quantize,
    quantize_then_prune,
    together,
)

RESULTS = Path(__file__).parent / "results" / "training_order"
SPARSITY = 0.5
LC_STEPS = 10  # C steps of LC, whatever the number of optimizer steps


def as_long_after(total: float) -> Plan:
    """The paper's P→Q, quantized so early that as many steps follow the last event as in its Q→P
    (24 %): the comparison that time does not confound.
    """
    plan = prune_then_quantize(total)
    return replace(plan, quantize=Delay(0.74 * total), quantize_activations=Delay(0.76 * total))


def from_the_start(total: float) -> Plan:
    """Quantized from the start on (activations after the first 4 %, as they need data); pruned as
    in P→Q.
    """
    plan = prune_then_quantize(total)
    return replace(plan, quantize=Delay(0), quantize_activations=Delay(0.04 * total))


def at_once(total: float) -> Plan:
    """Direct compression, then training: everything is on before the first step (activations: after
    4 % of the steps, as they need data).
    """
    first, data = Delay(0), Delay(0.04 * total)
    return Plan(total, first, first, data, data)


ORDERS: dict[str, Callable[[float], Plan]] = {
    "prune-quantize": prune_then_quantize,
    "quantize-prune": quantize_then_prune,
    "late": lambda total: quantize_then_prune(total, late=True),
    "together": together,
}
OTHERS: dict[str, Callable[[float], Plan]] = {
    "prune-quantize-24": as_long_after,
    "from-start": from_the_start,
    "at-once": at_once,
    "direct": lambda total: Plan(total, Delay(0), Delay(0), Delay(total - 1), Delay(total - 1)),
}
# direct: nothing is trained (a learning rate of 0); dense: nothing is compressed; lc:
# learning-compression, of weights only
WAYS = (*ORDERS, *OTHERS, "dense", "lc")


@dataclass(frozen=True)
class Config:
    data: str = "data"
    weights: str = "data/resnet20-12fca82f.th"
    network: str = "resnet20"
    order: str = ""  # one of WAYS
    what: str = "weights"  # or both: weights and activations
    bits: int = 8
    rounding: str = "nearest"  # or truncate, floor
    masks: str = "before"  # the ReLU, or after it
    pretrain: int = 0  # steps without compression before, at the same learning rates
    steps: int = 100  # of the optimizer
    batch: int = 32
    lr: float = 0.01  # at the start; falls to 0 as a cosine
    momentum: float = 0.9
    weight_decay: float = 5e-4
    window: int = 128  # examples that masks and scales of activations are chosen from
    calibration: int = 24  # batches for BatchNorm
    test_images: int = 10_000  # the first so many
    seed: int = 0
    smoke: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Of an image."""
        return (8, 8) if self.data == "digits" else (32, 32)


# ------------------------------------------------------------------ the model


def empty(config: Config) -> nn.Module:
    """The network with random weights."""
    model = network("resnet8" if config.smoke else config.network)
    return model.to(memory_format=torch.channels_last)


def pretrained(config: Config, data: Images) -> nn.Module:
    """The trained network in the file, or the same for digits: random, or trained here."""
    if config.smoke or config.data == "digits":
        model = empty(config)
        if config.pretrain:
            other = replace(config, steps=config.pretrain, order="dense", seed=config.seed + 500)
            learned(other, model, data)
        return model
    return reference(config.network, config.weights).to(memory_format=torch.channels_last)


def with_activations(config: Config, model: nn.Module) -> nn.Module:
    """The modules for activations inserted, if there are to be any."""
    if config.what != "both":
        return model
    part = FixedPoint(config.bits, rounding=config.rounding)  # type: ignore[arg-type]
    quantize = ActivationQuantizer(part, window=config.window)
    prune = ActivationPruner(SPARSITY, window=config.window)
    before: dict[str, Any] = {"conv1": quantize}
    after: dict[str, Any] = {"layer?.?": quantize}
    if config.masks == "before":
        after |= {"bn1": (prune, quantize), "layer?.?.bn1": (prune, quantize)}
    else:
        before |= {"layer1.0": (prune, quantize), "layer?.?.conv2": (prune, quantize)}
    model.eval()
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, 3, *config.size, generator=generator)
    return insert(model, example, before=before, after=after)


def parts(config: Config) -> dict[str, Any]:
    format_ = FixedPoint(config.bits, rounding=config.rounding)  # type: ignore[arg-type]
    return {
        "layer*.weight": Sparse(density=1 - SPARSITY).then(format_),
        "conv1.weight": format_,
        "linear.weight": format_,
    }


# ------------------------------------------------------------------ training


def pictures(config: Config) -> Images:
    """CIFAR-10, or handwritten digits: 1437 to train with, 360 to test."""
    if config.data != "digits":
        return images(config.data, torch.device("cpu"), config.smoke)
    from sklearn.datasets import load_digits

    found, classes = load_digits(return_X_y=True)
    pixels = torch.from_numpy(found * (255 / 16)).to(torch.uint8).view(-1, 1, 8, 8)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(12345))
    pixels, labels = pixels.expand(-1, 3, 8, 8)[order], torch.from_numpy(classes).long()[order]
    return Images(pixels[360:], labels[360:], pixels[:360], labels[:360])


def stream(config: Config, data: Images, epoch: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first batches of an epoch: augmented, but for digits."""
    if config.data != "digits":
        yield from batches(data, config.batch, config.seed, epoch, 0, last)
        return
    generator = torch.Generator().manual_seed(100_003 * config.seed + epoch)
    order = torch.randperm(len(data), generator=generator)
    for index in order.split(config.batch)[:last]:
        yield normalized(data.train[index]), data.labels[index]


def train(config: Config, model: nn.Module, optimizer: Any, data: Images) -> Iterator[int]:
    """One optimizer step after the other, over as many epochs as they take."""
    per_epoch = len(data) // config.batch
    for i in range(config.steps):
        epoch, b = divmod(i, per_epoch)
        if b == 0:
            source = stream(config, data, epoch, min(per_epoch, config.steps - i))
        x, y = next(source)
        share = 0.0 if config.order == "direct" else (1 + math.cos(math.pi * i / config.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = config.lr * share
        model.train()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield i


def learned(config: Config, model: nn.Module, data: Images) -> Scheduled | LC | None:
    """The model trained and compressed in one of the ways."""
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    steps = train(config, model, optimizer, data)
    if config.order == "dense":
        for _ in steps:
            pass
        return None
    if config.order == "lc":
        schedule = geometric(0.05, 2.0, LC_STEPS)
        lc = LC(model, parts(config), schedule=schedule, optimizer=optimizer)
        for k in lc.steps(progress=False):
            first, last = (config.steps * i // LC_STEPS for i in (k.index, k.index + 1))
            for _ in itertools.islice(steps, last - first):
                pass
        lc.finalize(calibration=None)
        return lc
    plan = (ORDERS | OTHERS)[config.order](config.steps)
    run = Scheduled(model, parts(config), plan=plan, optimizer=optimizer, batch_size=config.batch)
    for _ in steps:
        pass
    run.finalize()
    return run


# ------------------------------------------------------------------ measuring


def one(config: Config, data: Images) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    if config.order == "direct":  # nothing moves: as few steps as show the activations
        config = replace(config, steps=1 + config.window // config.batch)
    model = with_activations(config, pretrained(config, data))
    run = learned(config, model, data)
    recalibrate(model, [x for x, _ in stream(config, data, CALIBRATION, config.calibration)])
    test = (data.test[: config.test_images], data.test_labels[: config.test_images])
    if run is None:
        error, loss = measured(model, *test)
        return {"accuracy": 100 - error, "loss": loss}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.lc"
        save(run, path)
        size = path.stat().st_size
        stored = load(path, with_activations(config, empty(config)))
    error, loss = measured(stored, *test)
    found = {"accuracy": 100 - error, "loss": loss, "file_bytes": size}
    found |= densities(config, stored, run, 100 - error)
    if config.what == "both":
        x = normalized(test[0][: config.batch])
        found["levels_evaluation"] = levels(stored.eval(), x)
        found["levels_training"] = levels(stored.train(), x)
    return found


def densities(
    config: Config, model: nn.Module, run: Scheduled | LC, accuracy: float
) -> dict[str, float]:
    """Performance density by the paper's formula, with the shares that are in fact pruned, and with
    everything that is stored.
    """
    weights = sum(p.numel() for p in model.parameters())
    pruned = sum(int((p == 0).sum()) for n, p in model.named_parameters() if n.startswith("layer"))
    model.eval()
    features = count_features(model, torch.zeros(2, 3, *config.size))
    both = config.what == "both"
    off = sum(int((x == 0).sum()) for n, x in model.named_buffers() if n.endswith(".mask"))
    amounts = (
        Amount(weights, config.bits, pruned / weights),
        Amount(features.count, config.bits if both else 32, off / features.count),
    )
    return {
        "weights_pruned": pruned / weights,
        "activations_pruned": off / features.count,
        "activation_bits": features.bits,
        "model_bits": run.report().total.bits,
        "density_paper": performance_density(accuracy, *amounts),
        "density_stored": stored_density(accuracy, run.report(), features),
    }


def levels(model: nn.Module, x: Tensor) -> int:
    """The most distinct values that any quantizer of the model lets through."""
    seen = [0]
    look = lambda m, args, out: seen.append(out.unique().numel())  # noqa: E731
    handles = [
        m.register_forward_hook(look) for m in model.modules() if isinstance(m, ActivationQuantizer)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return max(seen)


# ------------------------------------------------------------------ all runs


def slug(config: Config) -> str:
    extra = [config.rounding] if config.rounding != "nearest" else []
    extra += ["masks-after"] if config.masks != "before" else []
    name = (config.order, config.what, f"{config.bits}bit", *extra, f"s{config.seed}")
    return "_".join(name) if config.order != "dense" else f"dense_s{config.seed}"


def command(config: Config) -> str:
    single = {"order": "orders", "what": "whats", "bits": "bits", "seed": "seeds"}
    kept = {k: v for k, v in asdict(config).items() if k in single}
    given = [f"--{single[k]} {v}" for k, v in kept.items()]
    skipped = (*single, "data", "weights")
    given += [option(k, v) for k, v in changed(config).items() if k not in skipped]
    data = "digits" if config.data == "digits" else "DIR --weights FILE"
    return " ".join([f"python experiments/training_order.py --data {data}", *given])


def parse(argv: list[str]) -> tuple[list[Config], Path]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--orders", default="all", help=f"of {' '.join(WAYS)}; all: the paper's")
    parser.add_argument("--whats", default="weights both", help="weights, both")
    parser.add_argument("--bits", default="8 4")
    parser.add_argument("--seeds", default="0 1 2")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the records")
    several = ("order", "what", "bits", "seed")
    options = argparse.ArgumentParser(add_help=False)
    add_options(options, Config())
    for action in options._actions:
        if action.dest not in several:
            parser._add_action(action)
    given = vars(parser.parse_args(argv))
    orders, whats, bits, seeds = (
        given.pop(k).split() for k in ("orders", "whats", "bits", "seeds")
    )
    out = Path(given.pop("out"))
    orders = list(ORDERS) if orders == ["all"] else orders
    if unknown := (set(orders) - set(WAYS)) | (set(whats) - {"weights", "both"}):
        raise SystemExit(f"There is no {', '.join(sorted(unknown))}: see --help.")
    if given["smoke"]:
        given |= {"steps": 25, "batch": 8, "window": 8, "calibration": 2, "test_images": 16}
    configs = [
        Config(order=o, what=w, bits=int(b), seed=int(s), **given)
        for b, s, w, o in itertools.product(bits, seeds, whats, orders)
        if o != "lc" or w == "weights"
    ]
    return [replace(c, what="none", bits=32) if c.order == "dense" else c for c in configs], out


def main(argv: list[str]) -> None:
    configs, out = parse(argv)
    torch.set_num_threads(1)
    where, data = origin(__file__), None
    for config in configs:
        path = out / f"{slug(config)}.json"
        kept = {k: v for k, v in asdict(config).items() if k not in ("data", "weights")}
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8"))["config"] != kept:
                raise SystemExit(f"{path} is of other settings: give another --out.")
            continue
        data = data or pictures(config)
        started, cpu = time.perf_counter(), time.process_time()
        result = one(config, data)
        result["seconds"] = time.perf_counter() - started
        result["processor_seconds"] = time.process_time() - cpu
        write(path, {"command": command(config), "config": kept, "result": result, **where})
        print(f"{path.stem:40} {result['accuracy']:6.2f} %  {result['seconds']:5.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
