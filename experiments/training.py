"""The L step of the CIFAR-10 experiments: images that stay on the device, one loop that never waits
for it, and what is measured afterwards. (A C step in every iteration does: which of two states is
better, and where a support lies, are read back.)
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import TEST, TRAIN, cifar10, normalized, padded
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

CALIBRATION = 99_999  # the "epoch" whose batches are drawn for BatchNorm only
_TEMPERATURE = 4.0  # of distillation


@dataclass(frozen=True)
class Images:
    """CIFAR-10 on one device: training images with their border, and the test images."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def images(folder: str, device: torch.device, smoke: bool) -> Images:
    """The real ones, or 192 and 96 random ones."""
    if smoke:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (288, 3, 32, 32), generator=generator).to(torch.uint8)
        classes = torch.randint(0, 10, (288,), generator=generator)
        train, labels, test, test_labels = pixels[:192], classes[:192], pixels[192:], classes[192:]
    else:
        train, labels = cifar10(folder, TRAIN)
        test, test_labels = cifar10(folder, TEST)
    return Images(*(x.to(device) for x in (padded(train), labels, test, test_labels)))


def batches(
    data: Images, size: int, seed: int, epoch: int, first: int, last: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches first … last − 1 of an epoch: random crops and flips, normalized, and labels.

    A function of seed and epoch alone, so a resumed run sees the same ones. What is random is drawn
    at once and moved to the device at once.
    """
    generator = torch.Generator().manual_seed(100_003 * seed + epoch)
    n = len(data)
    drawn = torch.stack(
        [
            torch.randperm(n, generator=generator),
            torch.randint(0, 9, (n,), generator=generator),
            torch.randint(0, 9, (n,), generator=generator),
            torch.randint(0, 2, (n,), generator=generator),
        ]
    )
    if data.train.is_cuda:
        drawn = drawn.pin_memory()  # or the copy would wait
    drawn = drawn.to(data.train.device, non_blocking=True)
    cells = torch.arange(32, device=data.train.device)
    for b in range(first, last):
        index, top, left, flip = drawn[:, b * size : (b + 1) * size, None]
        columns = left + torch.where(flip == 1, 31 - cells, cells)
        rows = top + cells
        crops = data.train[index[:, :, None], :, rows[:, :, None], columns[:, None, :]]
        yield normalized(crops.permute(0, 3, 1, 2)), data.labels[index[:, 0]]


def loss_of(logits: Tensor, labels: Tensor, teacher: Tensor | None, share: float) -> Tensor:
    """Cross-entropy; with a teacher's logits, a share of it is the divergence from them."""
    hard = F.cross_entropy(logits, labels)
    if teacher is None:
        return hard
    scaled = [F.log_softmax(x / _TEMPERATURE, 1) for x in (logits, teacher)]
    soft = F.kl_div(*scaled, reduction="batchmean", log_target=True) * _TEMPERATURE**2
    return (1 - share) * hard + share * soft


@torch.no_grad()
def measured(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of wrong answers in percent and mean cross-entropy, in float32, evaluation mode."""
    mode = model.training
    model.eval()
    wrong = torch.zeros((), device=labels.device)
    total = torch.zeros((), device=labels.device)
    for x, y in zip(pixels.split(1000), labels.split(1000), strict=True):
        logits = model(normalized(x)).float()
        wrong += (logits.argmax(1) != y).sum()
        total += F.cross_entropy(logits, y, reduction="sum")
    model.train(mode)
    return 100 * float(wrong) / len(labels), float(total) / len(labels)


def pieces(
    path: Path, count: int, get: Callable[[], Any], put: Callable[[Any], None], bar: tqdm
) -> Iterator[int]:
    """0 … count − 1: after each, what `get` returns is kept in a file; a run that was interrupted
    gives it to `put` and goes on behind it. `get` and `put` plain data and tensors.

    Raises:
        SystemExit: the file cannot be read.
    """
    done = 0
    if path.exists():
        try:
            old = torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as cause:
            first = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise SystemExit(
                f"{path} is not a readable checkpoint ({first}). Delete it to start again."
            ) from cause
        put(old["state"])
        done = old["done"]
    bar.reset(count)
    bar.update(done)
    for k in range(done, count):
        yield k
        temporary = path.with_name(f"{path.name}.tmp")
        torch.save({"done": k + 1, "state": get()}, temporary)
        os.replace(temporary, path)
        bar.update()


def train(
    step: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    stream: Iterator[tuple[Tensor, Tensor]],
    rates: Iterator[float],
) -> float:
    """One pass over `stream`: `step` returns the loss; one learning rate for each batch. Returns
    the mean loss. The loop reads nothing back from the device before its end.
    """
    total: Tensor | None = None
    count = 0
    for (x, y), rate in zip(stream, rates, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = step(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach() if total is None else total + loss.detach()
        count += 1
    return float(total) / count if total is not None else 0.0
