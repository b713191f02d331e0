"""The programme behind k-means against a dense one, and the sums that it runs on."""

from __future__ import annotations

import math
from collections.abc import Callable

import kmeans1d
import numpy as np
import pytest
import torch
from torch import Tensor

from lc_compress import clustering, intervals, ordered
from lc_compress.codebook import KMeans, nearest
from lc_compress.part import squared_error

Draw = Callable[[torch.Generator], Tensor]


def error(w: Tensor, h: Tensor | None, k: int) -> float:
    state = KMeans(k).solve(w, None, None, h)
    return squared_error(w, KMeans(k).reconstruct(state), h)


def dense(w: Tensor, h: Tensor | None, k: int) -> float:
    """The least error, by a dynamic programme over the whole table of costs."""
    order = w.argsort()
    x = w.double()[order]
    h = torch.ones_like(x) if h is None else h.double()[order]
    y = (x - x[:, None]).triu()  # sums from the first value of a cluster on lose no digits
    mass = h.expand_as(y).triu()
    mass, first, second = mass.cumsum(1), (mass * y).cumsum(1), (mass * y**2).cumsum(1)
    cost = (second - first**2 / mass.clamp_min(1e-300)).clamp_min(0)
    # from each position to each: none before it, and nothing up to it
    cost = torch.nn.functional.pad(cost, (1, 0, 0, 1))
    cost = cost.masked_fill(torch.ones_like(cost).tril(-1).bool(), math.inf)
    cost.fill_diagonal_(0)
    least = cost[0]
    for _ in range(k - 1):
        least = (least[:, None] + cost).min(0).values
    return float(least[-1])


def normal(g: torch.Generator, n: int = 60) -> Tensor:
    return torch.randn(n, generator=g, dtype=torch.float64)


def modes(g: torch.Generator, n: int = 60) -> Tensor:
    """A few clusters of different widths."""
    count = int(torch.randint(2, 12, (), generator=g))
    which = torch.randint(count, (n,), generator=g)
    width = 10 ** (-3 * torch.rand(count, generator=g, dtype=torch.float64) - 0.5)
    return normal(g, count)[which] + width[which] * normal(g, n)


def near_binary(g: torch.Generator, n: int = 60) -> Tensor:
    """The shape of weights late in an LC run (papers/learning-compression.md, 4.7)."""
    size = torch.where(torch.rand(n, generator=g) < 0.08, 0.0, 0.05)
    sign = torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0)
    return size * sign + 0.005 * normal(g, n)


DRAWS: dict[str, Draw] = {
    "gaussian": normal,
    "heavy": lambda g: torch.empty(60, dtype=torch.float64).cauchy_(generator=g),
    "modes": modes,
    "near binary": near_binary,
    "tied": lambda g: torch.randint(-20, 21, (60,), generator=g).double(),
    "mostly zero": lambda g: normal(g) * (torch.rand(60, generator=g) < 0.2),
    "skewed": lambda g: (3 * normal(g)).exp(),
    "outliers": lambda g: torch.cat((normal(g, 57), torch.tensor([1e3, -1e4, 1e5]).double())),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_the_coarse_grids_lose_nothing(
    draw: Draw, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clustering, "_EVERY", 0)
    for i in range(24):
        # grids so coarse that a bound too tight shows; tables, chunks and blocks of all sizes
        monkeypatch.setattr(clustering, "_GRID", 1 + i % 3)
        monkeypatch.setattr(clustering, "_FINER", 2 + i % 2)
        monkeypatch.setattr(clustering, "_TABLE", 300 * (i // 6 % 2))
        monkeypatch.setattr(intervals, "_CHUNK", 20 + 50 * (i % 4))
        monkeypatch.setattr(ordered, "_BLOCKS", (10, 25, 100)[i % 3])
        w, k = draw(generator), 2 + i % 5
        h = (2 * normal(generator)).exp() if i % 2 else None
        expected = dense(w, h, k)
        energy = (w - w.median()) ** 2 * (1 if h is None else h)
        assert error(w, h, k) == pytest.approx(expected, rel=1e-9, abs=1e-13 * float(energy.sum()))


def test_two_hundred_weighted_vectors_of_many_modes(generator: torch.Generator) -> None:
    for i in range(200):
        w, k = modes(generator, 150), 2 + i % 15
        h = normal(generator, 150).exp() * (torch.rand(150, generator=generator) < 0.9)
        assert error(w, h, k) == pytest.approx(dense(w, h, k), rel=1e-9, abs=0)


@pytest.mark.parametrize("k", [2, 4, 16])
def test_larger_weights_agree_with_another_implementation(
    k: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered, "_BLOCKS", 1000)
    for draw in (normal, modes, near_binary):
        w = draw(generator, 20_000).float()
        codes, centres = kmeans1d.cluster(w.tolist(), k)
        expected = torch.tensor(centres, dtype=torch.float64)[torch.tensor(codes)]
        # its sums are less accurate
        assert error(w, None, k) == pytest.approx(squared_error(w, expected), rel=1e-8, abs=0)


def test_outliers_of_many_sizes_do_not_blur_the_rest(generator: torch.Generator) -> None:
    bulk = normal(generator, 300)
    far = torch.tensor([1e3, -1e6, 1e9]).double()
    expected = dense(bulk, None, 4)
    for order in (torch.cat((bulk, far)), -torch.cat((far, bulk))):
        assert error(order, None, 7) == pytest.approx(expected, rel=1e-9, abs=0)


def test_counts_beyond_the_integers_of_float32() -> None:
    w = torch.zeros(2**24 + 5)
    w[-4:] = torch.tensor([1.0, 1.0, 1.0, 2.0])
    state = KMeans(2).project(w)
    assert state.codebook.tolist() == [0.0, 1.25]
    assert int(state.codes.sum()) == 4
    w[: 2**23] = -1  # and a mean of many
    expected = (3 + 2 - 2**23) / w.numel()
    assert float(KMeans(1).project(w).codebook) == pytest.approx(expected, rel=1e-7)


# ------------------------------------------------------------------ ordered values


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
def test_running_sums(
    n: int, weighted: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered, "_BLOCKS", 20)
    monkeypatch.setattr(ordered, "_CHUNK", 100)
    w = normal(generator, n)
    h = normal(generator, n).exp() if weighted else None
    x, order = w.sort()
    mass = torch.ones_like(x) if h is None else h[order]
    host = ordered.ascending(w, h)
    assert isinstance(host, ordered._OnHost)
    device = ordered._OnDevice(x, None if h is None else mass)
    for source in (host, device):  # the second is for CUDA, and runs here too
        values = ordered.Ordered(source)
        assert values.block == (64 if n == 1000 else 16 if n == 64 else 1)
        v = x - values.shift
        terms = torch.stack((mass, mass * v, mass * v * v))
        sums = torch.cat((torch.zeros(3, 1, dtype=torch.float64), terms.cumsum(1)), 1).numpy()
        for positions in (np.arange(n + 1), np.array([n, 0, n // 3, n // 3])):
            found = values.sums(positions) - values.sums(np.array([0]))
            np.testing.assert_allclose(found, sums[:, positions], rtol=1e-12, atol=1e-12 * n)
        np.testing.assert_array_equal(values.values(np.arange(n)), x.numpy())
        starts = np.array([0, n // 2]) if n > 1 else np.array([0])
        pieces = zip(
            np.split(x.numpy(), starts[1:]), np.split(mass.numpy(), starts[1:]), strict=True
        )
        means = [float((b * a).sum() / b.sum()) for a, b in pieces]
        np.testing.assert_allclose(values.means(starts), means, rtol=1e-12)
        grid = values.even_grid(5)
        assert grid[0] == 0 and grid[-1] == n and grid.size <= 6 and bool((np.diff(grid) > 0).all())


def test_distinct_values_and_scale() -> None:
    x = torch.tensor([-1.0, -1.0, 0.5, 3.0, 3.0, 3.0])
    for source in (ordered._OnHost(x.numpy(), None), ordered._OnDevice(x, None)):
        assert source.distinct(2) is None
        found = source.distinct(3)
        assert found is not None and found.tolist() == [-1.0, 0.5, 3.0]
        assert source.scale() == 0
    for size in (2.0**1000, 2.0**-1074):
        huge = torch.tensor([-1.0, 0.5, 1.0], dtype=torch.float64).mul(size).sort().values
        for source in (ordered._OnHost(huge.numpy(), None), ordered._OnDevice(huge, None)):
            exponent = source.scale()
            back = np.ldexp(source.take(np.arange(3)), exponent)
            np.testing.assert_array_equal(back, huge.numpy())
            assert np.abs(source.take(np.arange(3))).max() in (0.5, 1.0)


def test_importance_follows_its_values(generator: torch.Generator) -> None:
    w = torch.randn(5000, generator=generator)
    w[:4] = torch.tensor([0.0, -0.0, 1e-45, -3e38])
    h = torch.rand(5000, generator=generator, dtype=torch.float64)
    for x in (w, w.double(), (10 * w).round().nan_to_num(neginf=0.0)):
        source = ordered.ascending(x, h)
        assert isinstance(source, ordered._OnHost) and source.h is not None
        order = x.argsort(stable=True)
        np.testing.assert_array_equal(source.x, x[order].numpy())
        mass = np.bincount(np.unique(x.numpy(), return_inverse=True)[1], h.numpy())
        starts = np.flatnonzero(np.append(True, source.x[1:] != source.x[:-1]))
        np.testing.assert_allclose(np.add.reduceat(source.h, starts), mass, rtol=1e-12)


# ------------------------------------------------------------------ assignment


@pytest.mark.parametrize("k", [1, 2, 16, 200, 256, 300])
def test_codes_are_exact_at_the_middles(
    k: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    codebook = torch.randn(k, generator=generator).to(dtype).sort().values
    middles = (codebook[:-1].double() + codebook[1:].double()) / 2
    near = middles.to(dtype)
    up, down = near.clone(), near.clone()
    above, below = torch.full_like(near, math.inf), torch.full_like(near, -math.inf)
    for _ in range(2):
        up, down = up.nextafter(above), down.nextafter(below)
    x = torch.cat((codebook, near, up, down, near.nextafter(above), near.nextafter(below)))
    expected = torch.bucketize(x.double(), middles)
    codes = nearest(x, codebook)
    assert codes.dtype == (torch.uint8 if k <= 256 else torch.int64)
    assert torch.equal(codes.long(), expected)
    transposed = x.repeat(3, 1).T
    assert torch.equal(nearest(transposed, codebook).long(), expected.repeat(3, 1).T)
