"""CIFAR-10 from its official binary files, augmented in whole batches of tensors."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN, TEST = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]


def cifar10(folder: str | Path, names: list[str]) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of the named batches.

    `folder` holds, or its subfolder `cifar-10-batches-bin` does, the files of the "binary version"
    on the data set's page: records of one label byte and 3072 pixel bytes.
    """
    root = Path(folder)
    where = "cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html"
    root = root / "cifar-10-batches-bin" if (root / "cifar-10-batches-bin").is_dir() else root
    records = []
    for name in names:
        path = root / f"{name}.bin"
        if not path.is_file():
            raise SystemExit(
                f"{path} is missing. Give --data the folder with CIFAR-10's binary version "
                f"({where}, unpacked: data_batch_1.bin ... test_batch.bin)."
            )
        raw = np.fromfile(path, np.uint8)
        if raw.size != 10_000 * 3073:
            raise SystemExit(
                f"{path} has {raw.size} bytes instead of {10_000 * 3073}: fetch it again ({where})."
            )
        records.append(raw.reshape(-1, 3073))
    data = np.concatenate(records)
    images = torch.from_numpy(data[:, 1:].reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(data[:, 0].astype(np.int64))


@lru_cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels, moved to the device once."""
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))
    return mean, std


def normalized(images: Tensor) -> Tensor:
    """uint8 (n, 3, 32, 32) to float32, channels last."""
    mean, std = _statistics(images.device)
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def padded(images: Tensor) -> Tensor:
    """Four black pixels on each side, for `augmented`."""
    return F.pad(images, (4, 4, 4, 4))


def augmented(images: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """Random 32×32 crops and flips of the padded images at `index`, as uint8 (n, 3, 32, 32)."""
    n, cells = len(index), torch.arange(32)
    top = torch.randint(0, 9, (n, 1), generator=generator)
    left = torch.randint(0, 9, (n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    rows, columns = top + cells, left + torch.where(flip, 31 - cells, cells)
    place = [
        x.to(images.device) for x in (index[:, None, None], rows[:, :, None], columns[:, None, :])
    ]
    return images[place[0], :, place[1], place[2]].permute(0, 3, 1, 2)
