"""Does a generative task prefer the other order? ESPCN (1 → 64 → 32 → 9, tanh, pixel shuffle)
learns to enlarge images three times; weights, or weights and activations, are pruned by half and
quantized to 8 bits in both orders, with the paper's schedule as shares of the training.

Images: the luminance of CIFAR-10, 30×30 from the middle, and 10×10 by bicubic down-sampling with
antialiasing. The last convolution is not pruned; masks sit before the tanh. Every order begins
after 70 % of the training: the steps until then are the same for all runs of a seed and done once
(not for `from start`, which quantizes from the beginning). PSNR is the mean over test images, after
the last step, of the network as its packed file holds it.

Run:      python experiments/super_resolution.py --data DIR [--seeds "0 1 2 3 4"]
Results:  OUT/sSEED.json, one for each seed; a seed that has one is not run again.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import add_options, changed, option, origin, write
from data import TEST, TRAIN, cifar10
from torch import Tensor, nn
from torch.nn import functional as F

from lc_compress import FixedPoint, Sparse, load, save
from lc_compress.density import Amount, count_features, performance_density, stored_density
from lc_compress.scheduled import (
    ActivationPruner,
    ActivationQuantizer,
    Cubic,
    Delay,
    Plan,
    Scheduled,
    insert,
)

RESULTS = Path(__file__).parent / "results" / "super_resolution"
BEFORE = 0.7  # share of the training before anything is switched on
_LUMA = (0.299, 0.587, 0.114)

# The paper's schedules of 200 epochs, in percent of the last 30 % (papers page, section 3): pruning
# from epoch 140 every 5 and quantization at 160 and 170, against 140 and 150 and pruning from 155.
_RAMP, _LATER = Cubic(0, 100 / 12, 4), Cubic(25, 100 / 12, 4)
PRUNE_FIRST = Plan(100, _RAMP, Delay(100 / 3), _RAMP, Delay(50))
QUANTIZE_FIRST = Plan(100, _LATER, Delay(0), _LATER, Delay(50 / 3))
# In these the order, the time of pruning and the learning rate at that time change together. Here
# pruning is as in the first, quantization before it: the order alone changes.
SAME_PRUNING = Plan(100, _RAMP, Delay(0), _RAMP, Delay(100 / 24))


@dataclass(frozen=True)
class Arm:
    """One way to compress: what (weights or both), when, how rounded, where masked."""

    what: str
    plan: Plan
    bits: int = 8
    rounding: str = "nearest"
    masks: str = "before"


ARMS = {
    "weights, prune then quantize": Arm("weights", PRUNE_FIRST),
    "weights, quantize then prune": Arm("weights", QUANTIZE_FIRST),
    "both, prune then quantize": Arm("both", PRUNE_FIRST),
    "both, quantize then prune": Arm("both", QUANTIZE_FIRST),
    "both, quantize then prune, pruned at the same steps": Arm("both", SAME_PRUNING),
    "both, prune then quantize, truncated": Arm("both", PRUNE_FIRST, rounding="truncate"),
    "both, prune then quantize, masks after tanh": Arm("both", PRUNE_FIRST, masks="after"),
    "both, prune then quantize, 4 bit": Arm("both", PRUNE_FIRST, 4),
    "both, quantize then prune, 4 bit": Arm("both", QUANTIZE_FIRST, 4),
    "both, prune then quantize, 4 bit, truncated": Arm("both", PRUNE_FIRST, 4, "truncate"),
}
FROM_START = "both, prune then quantize, from start"


@dataclass(frozen=True)
class Config:
    data: str = "data"
    steps: int = 2000  # of Adam
    batch: int = 16
    lr: float = 1e-3  # a tenth from 80 % on
    window: int = 64  # examples that masks and scales of activations are chosen from
    test_images: int = 1000  # the first so many
    seed: int = 0
    smoke: bool = False


class ESPCN(nn.Module):
    """22 729 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 5, padding=2)
        self.conv2 = nn.Conv2d(64, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 9, 3, padding=1)
        self.tanh1, self.tanh2 = nn.Tanh(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.tanh2(self.conv2(self.tanh1(self.conv1(x))))
        return F.pixel_shuffle(self.conv3(x), 3)


# ------------------------------------------------------------------ images


def pairs(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 3, 32, 32) uint8 to 10×10 and 30×30 luminance in [0, 1]."""
    luma = torch.tensor(_LUMA).view(1, 3, 1, 1)
    large = (pixels[:, :, 1:31, 1:31].float() * luma).sum(1, keepdim=True) / 255
    small = F.interpolate(large, size=(10, 10), mode="bicubic", antialias=True).clamp(0, 1)
    return small, large


def images(config: Config) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if config.smoke:
        generator = torch.Generator().manual_seed(0)
        train = torch.randint(0, 256, (64, 3, 32, 32), generator=generator).to(torch.uint8)
        return pairs(train), pairs(train[: config.test_images])
    train, test = cifar10(config.data, TRAIN)[0], cifar10(config.data, TEST)[0]
    return pairs(train), pairs(test[: config.test_images])


@torch.no_grad()
def psnr(model: nn.Module, small: Tensor, large: Tensor) -> float:
    model.eval()
    found = [model(x).clamp(0, 1) for x in small.split(500)]
    return mean_psnr(torch.cat(found), large)


def mean_psnr(found: Tensor, large: Tensor) -> float:
    error = (found - large).double().square().mean((1, 2, 3)).clamp_min(1e-10)
    return float((-10 * error.log10()).mean())


# ------------------------------------------------------------------ training


def ready(arm: Arm, model: nn.Module, window: int) -> nn.Module:
    """With the modules for activations, if the arm has them."""
    if arm.what == "weights":
        return model
    part = FixedPoint(arm.bits, rounding=arm.rounding)  # type: ignore[arg-type]
    quantize, prune = ActivationQuantizer(part, window=window), ActivationPruner(0.5, window=window)
    places = "conv[12]" if arm.masks == "before" else "tanh?"
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(2, 1, 10, 10, generator=generator)
    return insert(model, example, before={"conv1": quantize}, after={places: (prune, quantize)})


def weights(arm: Arm) -> dict[str, Any]:
    part = FixedPoint(arm.bits, rounding=arm.rounding)  # type: ignore[arg-type]
    return {"conv[12].weight": Sparse(density=0.5).then(part), "conv3.weight": part}


def train(
    config: Config, model: nn.Module, optimizer: Any, data: tuple[Tensor, Tensor], steps: range
) -> Iterator[int]:
    """These steps of the whole training; which images they see depends on seed and step alone."""
    small, large = data
    for i in steps:
        generator = torch.Generator().manual_seed(1_000_003 * config.seed + i)
        index = torch.randint(0, len(small), (config.batch,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (0.1 if i >= 0.8 * config.steps else 1.0)
        model.train()
        loss = F.mse_loss(model(small[index]), large[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield i


def compressed(
    config: Config, arm: Arm, plan: Plan, start: Any, data: Any, test: Any, first: int
) -> dict[str, float]:
    """Trained from `start` on by the arm, and measured from its file."""
    model = ESPCN()
    if start is not None:
        model.load_state_dict(start[0])
    ready(arm, model, config.window)
    optimizer = torch.optim.Adam(model.parameters(), config.lr)
    if start is not None:
        optimizer.load_state_dict(copy.deepcopy(start[1]))
    run = Scheduled(model, weights(arm), plan=plan, optimizer=optimizer, batch_size=config.batch)
    for _ in train(config, model, optimizer, data, range(first, config.steps)):
        pass
    run.finalize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.lc"
        save(run, path)
        size = path.stat().st_size
        stored = load(path, ready(arm, ESPCN(), config.window))
    quality, report = psnr(stored, *test), run.report()
    features = count_features(stored, torch.zeros(2, 1, 10, 10))
    count = sum(p.numel() for p in stored.parameters())
    zeros = sum(int((p == 0).sum()) for n, p in stored.named_parameters() if n in weights_pruned())
    off = sum(int((x == 0).sum()) for n, x in stored.named_buffers() if n.endswith(".mask"))
    bits = arm.bits if arm.what == "both" else 32
    amounts = (
        Amount(count, arm.bits, zeros / count),
        Amount(features.count, bits, off / features.count),
    )
    return {
        "psnr": quality,
        "file_bytes": size,
        "density_paper": performance_density(quality, *amounts),
        "density_stored": stored_density(quality, report, features),
    }


def weights_pruned() -> tuple[str, ...]:
    return "conv1.weight", "conv2.weight"


def one(config: Config) -> dict[str, Any]:
    data, test = images(config)
    bicubic = F.interpolate(test[0], size=(30, 30), mode="bicubic").clamp(0, 1)
    torch.manual_seed(config.seed)
    model = ESPCN()
    untrained = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), config.lr)
    first = round(BEFORE * config.steps)
    for _ in train(config, model, optimizer, data, range(first)):
        pass
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for _ in train(config, model, optimizer, data, range(first, config.steps)):
        pass
    found: dict[str, Any] = {
        "bicubic": {"psnr": mean_psnr(bicubic, test[1])},
        "not compressed": {"psnr": psnr(model, *test)},
    }
    left = config.steps - first
    for name, arm in ARMS.items():
        found[name] = compressed(config, arm, arm.plan.scaled(left), start, data, test, first)
    whole = PRUNE_FIRST.scaled(left)
    moved = {
        n: replace(x, start=x.start + first) for n, x in whole.schedules.items() if "q" not in n
    }
    early = max(1, config.window // config.batch)
    plan = Plan(config.steps, **moved, quantize=Delay(0), quantize_activations=Delay(early))
    begun = (untrained, torch.optim.Adam(ESPCN().parameters(), config.lr).state_dict())
    found[FROM_START] = compressed(config, Arm("both", plan), plan, begun, data, test, 0)
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0 1 2 3 4")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the records")
    add_options(parser, Config())
    given = vars(parser.parse_args(argv))
    seeds, out = given.pop("seeds").split(), Path(given.pop("out"))
    if given["smoke"]:
        given |= {"steps": 60, "window": 16, "test_images": 16}
    torch.set_num_threads(1)
    where = origin(__file__)
    for seed in seeds:
        config = Config(**given | {"seed": int(seed)})
        path = out / f"s{seed}.json"
        if path.exists():
            continue
        started, cpu = time.perf_counter(), time.process_time()
        arms = one(config)
        result = {
            "arms": arms,
            "seconds": time.perf_counter() - started,
            "processor_seconds": time.process_time() - cpu,
        }
        options = [option(k, v) for k, v in changed(config).items() if k not in ("data", "seed")]
        command = ["python experiments/super_resolution.py --data DIR --seeds", seed, *options]
        kept = {k: v for k, v in asdict(config).items() if k != "data"}
        write(path, {"command": " ".join(command), "config": kept, "result": result, **where})
        for name, row in arms.items():
            print(f"seed {seed}  {name:50} {row['psnr']:6.2f} dB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
