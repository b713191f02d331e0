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
    if x.device.type != "cpu" or 4 * count >= n:
        ordered = sort_rows(x.reshape(1, -1)).reshape(-1)
        return ordered[:count], ordered[n - count :]
    if count == 0:
        return x[:0], x[:0]
    values = x.numpy()  # numpy is fast at one place at a time only
    low = np.partition(values, count - 1)[:count]
    high = np.partition(values, n - count)[n - count :]
    return torch.from_numpy(np.sort(low)), torch.from_numpy(np.sort(high))


def top(score: Tensor, count: int) -> Tensor:
    """Positions, ascending, of the `count` largest entries of the flattened `score`.

    Among equal ones the first in memory order win.
    """
    flat = score.reshape(-1)
    n = flat.numel()
    if count <= 0:
        return torch.empty(0, dtype=torch.int64, device=flat.device)
    if count >= n:
        return torch.arange(n, device=flat.device)
    return (_top_on_host if flat.device.type == "cpu" else _top_on_device)(flat, count)


def _top_on_host(flat: Tensor, count: int) -> Tensor:
    values = flat.numpy()
    threshold = np.partition(values, values.size - count)[values.size - count]
    found = torch.from_numpy(np.flatnonzero(values >= threshold))
    surplus = found.numel() - count
    if surplus:
        tied = torch.nonzero(flat[found] == torch.tensor(threshold)).reshape(-1)
        keep = torch.ones_like(found, dtype=torch.bool)
        keep[tied[tied.numel() - surplus :]] = False
        found = found[keep]
    return found


def _top_on_device(flat: Tensor, count: int) -> Tensor:
    """The same without waiting for the device, as `nonzero` would: solvers select in loops."""
    threshold = torch.topk(flat, count, sorted=False).values.min()
    above, tied = flat > threshold, flat == threshold
    found = above | (tied & (tied.cumsum(0) <= count - above.sum()))
    return torch.searchsorted(found.cumsum(0), torch.arange(1, count + 1, device=flat.device))


def largest(score: Tensor, count: int) -> Tensor:
    """Boolean mask of the entries that `top` finds, in the shape of `score`."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[top(score, count)] = True
    return mask.view(score.shape)
