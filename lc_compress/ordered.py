"""Values in ascending order and running sums over them, made where they are asked for.

The values stay where they are, in a numpy array or on a CUDA device; sums are numpy arrays.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Real: TypeAlias = npt.NDArray[np.floating]

_BLOCKS = 1 << 15  # at most as many blocks, whose sums are made at the start
_LEAST = 16  # values in a block of more than one: shorter rows are slow to sum
_CHUNK = 1 << 16  # values converted at once: their float64 copies stay in the cache
_SAFE = 300  # squares and products of numbers up to 2^±300 neither overflow nor vanish


class Ordered:
    """n values in ascending order, each with its importance, and sums over the first p of them.

    The sums are made over blocks of `block` values once; inside a block, value by value, only when
    a position in it is asked for. So all of them cost one pass over the values and little more.

    Sums are of v = x − shift, the shift being the median, and run outwards from it: the difference
    of two running sums then does not cancel against outliers beyond both.
    """

    def __init__(self, values: _OnHost | _OnDevice) -> None:
        n = self.size = values.size
        self._values = values
        self.block = max(1 << (n // _BLOCKS).bit_length(), _LEAST) if n > _BLOCKS else 1
        self.shift = float(values.take(np.array([n // 2]))[0])
        sums = values.block_sums(self.block, self.shift)
        blocks = sums.shape[1]
        middle = blocks // 2
        self._sums = np.zeros((3, blocks + 1))
        np.cumsum(sums[:, middle:], axis=1, out=self._sums[:, middle + 1 :])
        self._sums[:, :middle] = -np.cumsum(sums[:, :middle][:, ::-1], axis=1)[:, ::-1]
        # Σ h and Σ h v²
        self.mass, _, self.energy = (self._sums[:, -1] - self._sums[:, 0]).tolist()
        self._inside = np.empty((3, 0, self.block))  # running sums inside some blocks,
        self._row = np.full(blocks + 1, -1)  # and where those of a block are

    def values(self, positions: Ints) -> Floats:
        """The values at these positions."""
        return self._values.take(positions)

    def sums(self, positions: Ints) -> Floats:
        """Σ h, Σ h v and Σ h v² (3, …) before each position, up to a constant."""
        if self.block == 1:
            return self._sums[:, positions]
        block, offset = positions // self.block, positions % self.block
        sums = self._sums[:, block]
        inner = np.flatnonzero(offset)
        if inner.size:
            block, offset = block[inner], offset[inner]
            missing = block[self._row[block] < 0]
            if missing.size:
                missing = union(missing)
                made = self._values.sums_inside(missing, self.block, self.shift)
                self._row[missing] = self._inside.shape[1] + np.arange(missing.size)
                self._inside = np.concatenate((self._inside, made), axis=1)
            sums[:, inner] += self._inside[:, self._row[block], offset - 1]
        return sums

    def means(self, starts: Ints) -> Floats:
        """The mean of the values from each start to the next; exact where they are all equal."""
        stops = [*starts[1:].tolist(), self.size]
        return np.array([self._values.mean(a, b) for a, b in zip(starts, stops, strict=True)])

    def even_grid(self, count: int) -> Ints:
        """At most `count` + 1 positions, 0 and n among them, between which mass · width is about
        the same.

        They cut a running sum of √(mass · width) over the blocks into equal steps, none inside a
        block.
        """
        starts = np.append(np.arange(0, self.size, self.block), self.size)
        ends = self.values(np.minimum(starts, self.size - 1))
        weight = np.cbrt(np.diff(self._sums[0]) * np.diff(ends) ** 2)
        for _ in range(4):
            # one wide gap is one step: do not spend the grid on it
            weight = np.minimum(weight, weight.sum() / count)
        reached = np.cumsum(weight)
        steps = np.arange(1, count) / count * reached[-1]
        return union(np.array([0, self.size]), starts[np.searchsorted(reached, steps) + 1])


def ascending(x: Tensor, h: Tensor | None) -> _OnHost | _OnDevice:
    """x (n,), finite, sorted where it is.

    h (n,): importance in float64, non-negative and not all zero; None counts every value as 1.
    Values without importance are left out.
    """
    if h is not None:
        exponent = int(np.frexp(float(h.max()))[1])
        if abs(exponent) > _SAFE:
            h = _scaled(h, -exponent)
        if not bool(h.min() > 0):
            x, h = x[h > 0], h[h > 0]
    if x.device.type == "cpu":
        return _OnHost(*_sorted(x.numpy(), None if h is None else h.numpy()))
    x, order = torch.sort(x)
    return _OnDevice(x, None if h is None else h[order])


def _sorted(x: Real, h: Floats | None) -> tuple[Real, Floats | None]:
    if h is None:
        return np.sort(x), None
    if x.dtype != np.float32 or x.size >= 1 << 32:
        order = np.argsort(x, kind="stable")
        return x[order], h[order]
    # A vectorised sort of integers, the value in their upper half and its position in the lower, is
    # four times as fast as `argsort`. Negative numbers have the order of their bits reversed.
    bits = x.view(np.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    keys <<= 32
    keys |= np.arange(x.size)
    keys.sort()
    bits = (keys >> 32).astype(np.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    keys &= 0xFFFFFFFF
    return bits.view(np.float32), h.take(keys, mode="clip")  # in range, so do not check


def union(*arrays: Ints) -> Ints:
    """The distinct entries in ascending order (`np.unique` hashes them, which is slower)."""
    merged = np.concatenate(arrays)
    merged.sort()
    new = np.empty(merged.size, dtype=bool)
    new[:1] = True
    np.not_equal(merged[1:], merged[:-1], out=new[1:])
    return merged[new]


def _block_sums(v: Floats, h: Floats | None) -> tuple[Floats | float, Floats, Floats]:
    """Σ h, Σ h v and Σ h v² of each row."""
    first = v if h is None else h * v
    if v.shape[1] == 1:
        return 1.0 if h is None else h[:, 0], first[:, 0], (first * v)[:, 0]
    mass = float(v.shape[1]) if h is None else np.add.reduce(h, 1)
    return mass, np.add.reduce(first, 1), np.einsum("ij,ij->i", first, v)


def _running_sums(v: Floats, h: Floats | None) -> Floats:
    """The running sums (3, rows, columns) of h, h v and h v² along each row."""
    first = v if h is None else h * v
    sums = np.empty((3, *v.shape))
    sums[0] = np.arange(1, v.shape[1] + 1) if h is None else np.cumsum(h, axis=1)
    np.cumsum(first, axis=1, out=sums[1])
    np.cumsum(first * v, axis=1, out=sums[2])
    return sums


class _OnHost:
    """Numpy arrays, read in pieces that stay in the cache. x (n,) ascending; h (n,) or None."""

    def __init__(self, x: Real, h: Floats | None) -> None:
        self.x, self.h, self.size = x, h, x.size

    def take(self, positions: Ints) -> Floats:
        return self.x[positions].astype(np.float64)

    def block_sums(self, block: int, shift: float) -> Floats:
        n = self.size
        sums = np.empty((3, -(-n // block)))
        whole = n - n % block
        step = max(_CHUNK // block, 1) * block
        pieces = [(a, min(a + step, whole)) for a in range(0, whole, step)]
        for a, b in [*pieces, (whole, n)] if whole < n else pieces:
            shape = (-1, min(block, b - a))
            v = self.x[a:b].astype(np.float64).reshape(shape)
            v -= shift
            h = None if self.h is None else self.h[a:b].reshape(shape)
            for row, value in zip(sums, _block_sums(v, h), strict=True):
                row[a // block : -(-b // block)] = value
        return sums

    def sums_inside(self, blocks: Ints, block: int, shift: float) -> Floats:
        at = np.minimum(blocks[:, None] * block + np.arange(block), self.size - 1)
        v = np.subtract(self.x[at], shift, dtype=np.float64)
        return _running_sums(v, None if self.h is None else self.h[at])

    def mean(self, a: int, b: int) -> float:
        x, first = self.x[a:b], float(self.x[a])
        if self.h is not None:
            h = self.h[a:b]
            mass = h.sum()
            if first != x[-1]:  # an outlier of little importance would blur the rest
                first = float(h @ x / mass)
            rest = h @ np.subtract(x, first, dtype=np.float64) / mass
        elif x.dtype == np.float64:
            rest = (x - first).sum() / (b - a)
        else:  # float64 holds sums of narrower numbers without an offset
            first, rest = 0.0, x.sum(dtype=np.float64) / (b - a)
        return float(first + rest)

    def distinct(self, limit: int) -> Floats | None:
        """The distinct values in ascending order, if there are at most `limit`."""
        few = self.x[np.linspace(0, self.size - 1, min(self.size, 2 * limit + 2)).astype(np.int64)]
        if np.count_nonzero(few[1:] != few[:-1]) >= limit:
            return None
        new = self.x[1:] != self.x[:-1]
        if np.count_nonzero(new) >= limit:
            return None
        return self.take(np.append(0, np.flatnonzero(new) + 1))

    def scale(self) -> int:
        """Bring huge or tiny values to a size around 1 and return the exponent to undo it."""
        size = max(abs(float(self.x[0])), abs(float(self.x[-1])))
        exponent = int(np.frexp(size)[1])
        if abs(exponent) <= _SAFE:
            return 0
        self.x = np.ldexp(self.x, -exponent)
        return exponent


class _OnDevice:
    """Tensors on any device. x (n,) ascending; h (n,) or None."""

    def __init__(self, x: Tensor, h: Tensor | None) -> None:
        self.x, self.h, self.size = x, h, x.numel()

    def take(self, positions: Ints) -> Floats:
        return _numpy(self.x[torch.from_numpy(positions).to(self.x.device)])

    def block_sums(self, block: int, shift: float) -> Floats:
        whole = self.size - self.size % block
        v = self.x.double() - shift
        terms = [torch.ones_like(v), v] if self.h is None else [self.h, self.h * v]
        sums = [
            torch.cat([x[:whole].view(-1, block).sum(1), x[whole:].sum(0, keepdim=True)])
            for x in (*terms, terms[1] * v)
        ]
        return _numpy(torch.stack(sums)[:, : -(-self.size // block)])

    def sums_inside(self, blocks: Ints, block: int, shift: float) -> Floats:
        at = np.minimum(blocks[:, None] * block + np.arange(block), self.size - 1)
        there = torch.from_numpy(at).to(self.x.device)
        v = _numpy(self.x[there])
        return _running_sums(v - shift, None if self.h is None else _numpy(self.h[there]))

    def mean(self, a: int, b: int) -> float:
        x = self.x[a:b].double()
        first = x[0]
        if self.h is None:
            return float(first + (x - first).mean())
        h = self.h[a:b]
        mass = h.sum()
        first = torch.where(first == x[-1], first, h @ x / mass)
        return float(first + h @ (x - first) / mass)

    def distinct(self, limit: int) -> Floats | None:
        new = self.x[1:] != self.x[:-1]
        if int(new.sum()) >= limit:
            return None
        return _numpy(self.x[torch.cat([new.new_ones(1), new])])

    def scale(self) -> int:
        size = float(self.x[[0, -1]].double().abs().max())
        exponent = int(np.frexp(size)[1])
        if abs(exponent) <= _SAFE:
            return 0
        self.x = _scaled(self.x, -exponent)
        return exponent


def _scaled(x: Tensor, exponent: int) -> Tensor:
    """x times 2^exponent, in two steps: that number itself may be too large."""
    half = exponent // 2
    return x * 2.0**half * 2.0 ** (exponent - half)


def _numpy(x: Tensor) -> Floats:
    array: Floats = x.double().cpu().numpy()
    return array
