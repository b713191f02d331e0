"""Sorting and selection, deterministic and as fast as the device has them.

On the CPU numpy's vectorised `sort` and `partition` are 5 to 60 times faster than torch's; on CUDA
torch's stay on the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sort_rows(x: Tensor) -> Tensor:
    """The values of each row of `x` (rows, n) in ascending order."""
    if x.device.type != "cpu":
        return torch.sort(x, dim=-1).values
    return torch.from_numpy(np.sort(x.numpy(), axis=-1))


def argsort_rows(x: Tensor) -> Tensor:
    """Positions that sort each row of `x` (rows, n) in ascending order; equal values keep their
    order.
    """
    return torch.argsort(x, dim=-1, stable=True)


def extremes(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest and the `count` largest values of `x` (n,), each in ascending order."""
    n = x.numel()
    if x.device.type != "cpu" or 2 * count >= n:
        ordered = sort_rows(x.reshape(1, -1)).reshape(-1)
    else:
        ordered = torch.from_numpy(np.partition(x.numpy(), [max(count - 1, 0), n - max(count, 1)]))
    low, high = ordered[:count], ordered[n - count :]
    return sort_rows(low.reshape(1, -1)).reshape(-1), sort_rows(high.reshape(1, -1)).reshape(-1)


def largest(score: Tensor, count: int) -> Tensor:
    """Boolean mask of the `count` largest entries of `score`; among equal ones the first in memory
    order win.
    """
    flat = score.reshape(-1)
    n = flat.numel()
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if count >= n:
        return torch.ones_like(score, dtype=torch.bool)
    if flat.device.type == "cpu":
        threshold = torch.tensor(np.partition(flat.numpy(), n - count)[n - count])
    else:
        threshold = torch.topk(flat, count, sorted=False).values.min()
    mask = flat > threshold
    ties = torch.nonzero(flat == threshold).reshape(-1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(score.shape)
