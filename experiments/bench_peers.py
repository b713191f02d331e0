"""What `bench_c_step.py` measures the C steps against: other libraries' engines for the same job,
the older toolkit's listed times, and least errors that are found by other means than ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from lc_compress import Part
from lc_compress.part import squared_error

Floats = NDArray[np.floating]
DENSITY, RANK = 0.05, 32

# The older toolkit on tensor (a), one thread of an AMD EPYC, ± 50 % between repeats
LISTED_SOURCE = "papers/learning-compression.md, section 8: listed, not measured here"
LISTED_COLUMNS = ("cold seconds", "warm seconds", "cold error", "warm error")
LISTED = {
    "Binary": (0.34, 0.11, 2143.275652, 2146.590565),
    "Ternary": (1.23, 1.03, 1121.851642, 1123.410215),
    "KMeans 2": (7.22, 0.41, 2143.275550, 2146.590432),
    "KMeans 4": (31.98, 1.15, 693.740657, 694.838491),
    "KMeans 16": (145.4, 7.38, 55.972751, 56.058917),
    "Sparse 5 %": (0.46, 0.54, 4248.509203, 4254.560077),
    "Binary + Sparse 5 %": (6.19, 5.27, 1371.742181, 1374.213435),
    "LowRank 32": (0.39, 0.55, 5287.967718, 5295.739920),
    "LowRank 32 + Sparse 5 %": (13.09, 10.67, 3676.650475, 3678.456845),
}


# ------------------------------------------------------------------ peers

# A peer does its job on w and returns how its error ‖w − Δ‖² is found: that is not timed.
Peer = Callable[[Tensor], Callable[[], float]]


def scikit_learn(k: int, **settings: Any) -> Peer:
    def peer(w: Tensor) -> Callable[[], float]:
        from sklearn.cluster import KMeans

        found = KMeans(k, random_state=0, **settings).fit(w.reshape(-1, 1).numpy())
        return lambda: codebook_error(w, found.cluster_centers_.ravel())

    return peer


def kmeans1d_(k: int) -> Peer:
    def peer(w: Tensor) -> Callable[[], float]:
        import kmeans1d

        _, centres = kmeans1d.cluster(w.reshape(-1).numpy().astype(np.float64), k)
        return lambda: codebook_error(w, np.array(centres))

    return peer


def ckwrap_(k: int) -> Peer:
    def peer(w: Tensor) -> Callable[[], float]:
        import ckwrap

        found = ckwrap.ckmeans(w.reshape(-1).numpy().astype(np.float64), k)
        return lambda: codebook_error(w, found.centers)

    return peer


def full_svd(w: Tensor) -> Callable[[], float]:
    matrix = w.flatten(1)
    u, s, vt = scipy.linalg.svd(matrix.numpy(), full_matrices=False)
    left, right = u[:, :RANK] * s[:RANK], vt[:RANK]
    return lambda: squared_error(matrix, torch.from_numpy(left @ right))


def svd_lowrank(w: Tensor) -> Callable[[], float]:
    torch.manual_seed(0)
    matrix = w.flatten(1)
    u, s, v = torch.svd_lowrank(matrix, q=min(RANK, *matrix.shape))
    return lambda: squared_error(matrix, (u * s) @ v.T)


def stable_argsort(w: Tensor) -> Callable[[], float]:
    x = w.reshape(-1).numpy()
    dropped = np.argsort(np.abs(x), kind="stable")[: x.size - round(DENSITY * x.size)]
    return lambda: float(np.square(x[dropped], dtype=np.float64).sum())


def peers(row: str) -> dict[str, tuple[str, Peer]]:
    """Engines for the job of a row, by name, and the package each needs."""
    if row.startswith("KMeans"):
        k = int(row.split()[1])
        return {
            "scikit-learn, n_init=1": ("sklearn", scikit_learn(k, n_init=1)),
            # as the older toolkit calls it
            "scikit-learn, n_init=10": ("sklearn", scikit_learn(k, n_init=10, tol=1e-10)),
            "kmeans1d": ("kmeans1d", kmeans1d_(k)),
            "ckwrap": ("ckwrap", ckwrap_(k)),
        }
    if row == "LowRank 32":
        return {
            "scipy.linalg.svd": ("scipy", full_svd),
            "torch.svd_lowrank": ("torch", svd_lowrank),
        }
    if row == "Sparse 5 %":
        return {"stable argsort": ("numpy", stable_argsort)}
    return {}


# ------------------------------------------------------------------ least errors, by other means


def magnitudes(w: Tensor) -> Floats:
    return np.sort(np.abs(w.reshape(-1).numpy().astype(np.float64)))


def binary_error(w: Tensor) -> float:
    u = magnitudes(w)
    return float(np.square(u - u.mean()).sum())


def ternary_error(w: Tensor) -> float:
    """Σ u² − max_j (Σ of the j largest u)² / j, with u = |w|."""
    u = magnitudes(w)[::-1]
    gains = np.square(np.cumsum(u)) / np.arange(1, u.size + 1)
    return float(np.square(u).sum() - gains.max())


def sparse_error(w: Tensor) -> float:
    u = magnitudes(w)
    return float(np.square(u[: u.size - round(DENSITY * u.size)]).sum())


def binary_sparse_error(w: Tensor) -> float:
    """The best window of sorted |w| (papers/learning-compression.md, 4.4), all of them scored."""
    u = magnitudes(w)
    size = u.size - round(DENSITY * u.size)
    shifted = u - u.mean()
    first, second = (np.concatenate(([0.0], np.cumsum(x))) for x in (shifted, shifted**2))
    sums = first[size:] - first[:-size]
    best = int((second[size:] - second[:-size] - sums * sums / size).argmin())
    kept = u[best : best + size]
    return float(np.square(kept - kept.mean()).sum())


def low_rank_error(w: Tensor) -> float:
    """The tail of the spectrum, from the full decomposition in float64."""
    s = scipy.linalg.svdvals(w.flatten(1).numpy().astype(np.float64))
    return float(np.square(s[RANK:]).sum())


def int_error(w: Tensor, bits: int = 4) -> float:
    """A fine grid of scales for each channel, the best then fitted to its own integers."""
    top = 2 ** (bits - 1) - 1
    rows, total = w.flatten(1), 0.0
    for x in rows.split(max(1, 2**17 // rows.shape[1])):  # as much as the cache holds
        full = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / top
        least, scale = torch.full((len(x),), math.inf), full.clone()
        for share in torch.linspace(0.05, 1.1, 2000):
            k = (x / (full * share)).round_().clamp_(-top, top)
            error = (x - k * (full * share)).square_().sum(1)
            better = error < least
            least = torch.where(better, error, least)
            scale[better] = (full * share)[better]
        x, scale = x.double(), scale.double()
        for _ in range(30):
            k = (x / scale).round_().clamp_(-top, top)
            scale = (k * x).sum(1, True) / (k * k).sum(1, True).clamp_min(1e-30)
            scale.clamp_min_(1e-30)
        total += float((x - k * scale).square().sum())
    return total


def kmeans_error(k: int) -> Callable[[Tensor], float]:
    """By an optimal k-means of another library, or the plain programme below (slow on many
    weights).
    """

    def least(w: Tensor) -> float:
        x = w.reshape(-1).numpy().astype(np.float64)
        if x.size > 5000:
            if find_spec("ckwrap"):
                return ckwrap_(k)(w)()
            if find_spec("kmeans1d"):
                return kmeans1d_(k)(w)()
        return plain_kmeans(x, np.ones_like(x), k)

    return least


LEAST: dict[str, Callable[[Tensor], float]] = {
    "Binary": binary_error,
    "Ternary": ternary_error,
    "KMeans 2": kmeans_error(2),
    "KMeans 4": kmeans_error(4),
    "KMeans 16": kmeans_error(16),
    "Sparse 5 %": sparse_error,
    "Int 4 per channel": int_error,
    "Binary + Sparse 5 %": binary_sparse_error,
    "LowRank 32": low_rank_error,
}


def codebook_error(w: Tensor, centres: Floats) -> float:
    """Σ (w − nearest centre)²."""
    x, c = w.reshape(-1).numpy().astype(np.float64), np.sort(centres).astype(np.float64)
    return float(np.square(x - c[np.searchsorted((c[1:] + c[:-1]) / 2, x)]).sum())


def plain_kmeans(x: Floats, h: Floats, k: int) -> float:
    """Least Σ h (x − centre)² with k centres, by D_j(i) = min_t D_(j−1)(t) + cost(t, i), the error
    of the i smallest values in j clusters. The best t does not decrease with i: O(k n log n).
    """
    order = np.argsort(x)
    x, h = x[order], h[order]
    shifted = (x - np.average(x, weights=h)).astype(np.longdouble)
    terms = np.stack([h, h * shifted, h * shifted**2]).astype(np.longdouble)
    sums = np.concatenate([np.zeros((3, 1)), terms.cumsum(1)], axis=1)

    def cost(t: Any, i: Any) -> Any:
        mass, first, second = sums[:, i, None] - sums[:, t]
        return second - first * first / np.maximum(mass, np.finfo(float).tiny)

    n = x.size
    least = np.array([cost(np.array([0]), i)[0] for i in range(n + 1)])
    choices = []
    for _ in range(k - 1):
        now, choice = least.copy(), np.zeros(n + 1, np.int64)
        stack = [(0, n, 0, n)]  # rows first … last, whose best t lies between low and high
        while stack:
            first, last, low, high = stack.pop()
            if first > last:
                continue
            i = (first + last) // 2
            t = np.arange(low, min(high, i) + 1)
            errors = least[t] + cost(t, i)
            best = int(errors.argmin())
            now[i], choice[i] = errors[best], t[best]
            stack += [(first, i - 1, low, choice[i]), (i + 1, last, choice[i], high)]
        least = now
        choices.append(choice)
    cuts = [n]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    error = 0.0
    for a, b in zip([0, *cuts[:0:-1]], cuts[::-1], strict=True):
        if h[a:b].sum() > 0:
            error += float((h[a:b] * np.square(x[a:b] - np.average(x[a:b], weights=h[a:b]))).sum())
    return error


def multimodal(seed: int) -> tuple[Floats, Floats]:
    """Values of several modes of different widths, some tied, and their importance, some 0."""
    rng = np.random.default_rng(seed)
    modes, n = int(rng.integers(2, 9)), int(rng.integers(30, 300))
    mode = rng.integers(modes, size=n)
    centre, width = rng.normal(0, 1, modes), rng.lognormal(-3, 1, modes)
    x = centre[mode] + width[mode] * rng.normal(size=n)
    if seed % 3 == 0:
        x = np.round(x, 1)
    h = rng.lognormal(0, 2, n) * (rng.random(n) > 0.1)
    h[0] = 1.0
    return x, h


# ------------------------------------------------------------------ block descent in one order


def alternated(
    parts: Sequence[Part[Any]], order: Sequence[int], w: Tensor, most: int
) -> tuple[float, int]:
    """‖w − Σ Δ‖² and the sweeps when each part in turn projects what the others leave, until none
    gains more than 1e-6, relatively, or for `most` sweeps.
    """
    states: list[Any] = [None] * len(parts)
    terms = [torch.zeros_like(w) for _ in parts]
    error, sweeps, gain = squared_error(w, sum(terms)), 0, math.inf
    while gain > 1e-6 and sweeps < most:
        gain, sweeps = 0.0, sweeps + 1
        for i in order:
            residual = w - sum(t for j, t in enumerate(terms) if j != i)
            states[i] = parts[i].project(residual, states[i])
            terms[i] = parts[i].reconstruct(states[i])
            now = squared_error(w, sum(terms))
            gain, error = max(gain, (error - now) / now if now else 0.0), now
    return error, sweeps
