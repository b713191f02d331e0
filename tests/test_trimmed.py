"""Trimmed k-means against enumeration and a dense programme; the joint C step that uses it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lc_compress import KMeans, Part, Sparse, SparsePenalty, joint, trimmed
from lc_compress.compose import Sum
from lc_compress.ordered import Floats, Ordered, ascending
from lc_compress.part import squared_error
from lc_compress.trimmed import trimmed_centres
from lc_compress.windows import Windows, counted, split

Draw = Callable[[np.random.Generator, int], Floats]


# ------------------------------------------------------------------ two other ways


def enumerated(x: Floats, k: int) -> Floats:
    """The least error by the number of dropped values, 0 to n: all supports, each kept set cut into
    k consecutive clusters in all ways.
    """
    x = np.sort(x)
    n = x.size
    least = np.zeros(n + 1)
    for drop in range(n):
        least[drop] = np.inf
        for kept in combinations(x, n - drop):
            for cuts in combinations(range(1, n - drop), min(k, n - drop) - 1):
                pieces = np.split(np.array(kept), cuts)
                error = sum(float(((piece - piece.mean()) ** 2).sum()) for piece in pieces)
                least[drop] = min(least[drop], error)
    return least


def dense(x: Floats, k: int, drop: int) -> Floats:
    """The same for 0 to `drop` dropped values, by a programme over positions, clusters and numbers
    of dropped values: O(n² k drop).
    """
    x = np.sort(x)
    n = x.size
    y = np.triu(x - x[:, None])  # sums from the first value of a cluster on lose no digits
    mass = np.maximum(np.arange(n) - np.arange(n)[:, None] + 1, 1)
    error = np.maximum((y**2).cumsum(1) - y.cumsum(1) ** 2 / mass, 0)
    cost = np.full((n + 1, n + 1), np.inf)
    cost[:-1, 1:] = np.where(np.tri(n, n, -1) > 0, np.inf, error)
    np.fill_diagonal(cost, 0)
    least = np.full((drop + 1, n + 1), np.inf)  # by dropped values and position
    least[np.arange(drop + 1), np.arange(drop + 1)] = 0
    for _ in range(k):
        least = np.stack([(row[:, None] + cost).min(0) for row in least])
        for d in range(1, drop + 1):  # the value before a position dropped
            least[d, 1:] = np.minimum(least[d, 1:], least[d - 1, :-1])
    return least[:, -1]


def normal(g: np.random.Generator, n: int) -> Floats:
    return g.normal(size=n)


def near_binary(g: np.random.Generator, n: int) -> Floats:
    """The shape of weights late in an LC run (papers/learning-compression.md, 4.7)."""
    size = np.where(g.random(n) < 0.08, 0.0, 0.05)
    return np.where(g.random(n) < 0.5, -size, size) + 0.005 * g.normal(size=n)


def heavy_tailed(g: np.random.Generator, n: int) -> Floats:
    return g.normal(size=n) * np.exp(1.5 * g.normal(size=n))


def tied(g: np.random.Generator, n: int) -> Floats:
    return np.round(g.normal(size=n) * 6) / 8


def modes(g: np.random.Generator, n: int) -> Floats:
    """A few clusters of different widths."""
    count = int(g.integers(2, 9))
    which = g.integers(0, count, n)
    return g.normal(size=count)[which] + 10 ** (-3 * g.random(count))[which] * g.normal(size=n)


DRAWS = [normal, near_binary, heavy_tailed, tied, modes]


def error_of(x: Floats, centres: Floats, drop: int) -> float:
    """All but the largest squared distances to the nearest centre."""
    distance = np.sort(np.abs(x[:, None] - centres).min(1)) ** 2
    return float(distance[: x.size - drop].sum())


# ------------------------------------------------------------------ exact


@pytest.mark.parametrize("draw", DRAWS)
def test_the_programme_is_right(draw: Draw) -> None:
    """The dense programme itself, by enumeration."""
    g = np.random.default_rng(0)
    for k in (1, 2, 3):
        x = draw(g, 8)
        np.testing.assert_allclose(dense(x, k, 8), enumerated(x, k), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("grid", [8, 24, 320])
def test_optimal_for_a_number(draw: Draw, grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On grids from a few positions, which have to be refined and split, to all of them."""
    monkeypatch.setattr(trimmed, "_GRID", grid)
    monkeypatch.setattr(trimmed, "_PER_CLUSTER", 4)
    g = np.random.default_rng(grid)
    for n, k in ((7, 2), (40, 1), (90, 2), (120, 3), (60, 5)):
        x = draw(g, n)
        least = dense(x, k, n // 2)
        for drop in (0, 1, n // 20, n // 5, n // 2):
            found = trimmed_centres(torch.from_numpy(x), k, drop=drop)
            slack = 1e-9 * least[drop] + 1e-13 * float(x @ x)
            assert found.certain and found.centres.shape == (k,)
            assert (np.diff(found.centres) >= 0).all()
            assert error_of(x, found.centres, drop) == pytest.approx(least[drop], abs=slack)
            assert found.value == pytest.approx(least[drop], abs=slack)
            assert found.bound <= least[drop] + slack


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("grid", [8, 320])
def test_optimal_at_a_price(draw: Draw, grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trimmed, "_GRID", grid)
    g = np.random.default_rng(grid)
    for n, k in ((7, 2), (50, 1), (60, 2), (60, 4)):
        x = draw(g, n)
        least = dense(x, k, n)
        for share in (1e-4, 1e-2, 0.1, 10):
            price = share * float(x.var())
            best = float((least + price * np.arange(n + 1)).min())
            found = trimmed_centres(torch.from_numpy(x), k, price=price)
            distance = np.abs(x[:, None] - found.centres).min(1) ** 2
            assert found.certain
            assert float(np.minimum(distance, price).sum()) == pytest.approx(best, rel=1e-9)
            assert found.value == pytest.approx(best, rel=1e-9)


def test_far_outliers_hide_nothing() -> None:
    """The rounding of values that are dropped does not blur the others."""
    g = np.random.default_rng(1)
    x = normal(g, 120)
    for far in (1e6, 1e12):
        spoiled = np.append(x, [far, -far, 2 * far])
        found = trimmed_centres(torch.from_numpy(spoiled), 3, drop=9)
        assert found.certain
        assert found.value == pytest.approx(dense(x, 3, 6)[6], rel=1e-9)


def test_large_layers_are_certain() -> None:
    """And what is claimed of one is true of its shortest paths at other prices."""
    g = np.random.default_rng(2)
    for draw, k, n in ((normal, 4, 36864), (near_binary, 4, 36864), (normal, 2, 300_000)):
        x = torch.from_numpy(draw(g, n)).float()
        found = trimmed_centres(x, k, drop=n // 20)
        assert found.certain
        assert error_of(x.double().numpy(), found.centres, n // 20) == pytest.approx(
            found.value, rel=1e-9
        )
        for factor in (0.7, 1.0, 1.4):
            distance = np.abs(x.double().numpy()[:, None] - found.centres).min(1)
            price = factor * float(np.sort(distance)[n - n // 20]) ** 2
            priced = trimmed_centres(x, k, price=price)
            assert priced.certain
            assert priced.value - price * (n // 20) <= found.value * (1 + 1e-12)


# ------------------------------------------------------------------ the programmes


def windows(x: Floats, positions: Floats, k: int) -> Windows:
    low = np.zeros(2 * k, dtype=np.int64)
    values = Ordered(ascending(torch.from_numpy(x), None))
    return Windows(values, np.unique(positions).astype(np.int64), low, low + x.size)


@pytest.mark.parametrize("draw", DRAWS)
def test_bounds_hold_on_any_grid(draw: Draw) -> None:
    """No number of dropped values costs less, at no price, on no grid; and the bound is the cost
    itself where every position is on the grid.
    """
    g = np.random.default_rng(3)
    for n, k in ((12, 2), (60, 1), (60, 3)):
        x = draw(g, n)
        least = dense(x, k, n)
        for price in (float(x.var()) * np.array([1e-5, 1e-3, 1e-2, 0.1, 1.0, 10.0])).tolist():
            best = float((least + price * np.arange(n + 1)).min())
            for count in (0, 3, 10, n):
                grid = windows(x, np.append([0, n], g.choice(n + 1, count, replace=False)), k)
                through = grid.through(price)
                bound = min(float(error.min()) for error in through)
                assert bound <= best * (1 + 1e-12)
                cuts, error = grid.best(price)
                found = error + price * (n - int((cuts[1::2] - cuts[::2]).sum()))
                assert found >= best * (1 - 1e-9)
            everywhere = windows(x, np.arange(n + 1), k)
            through = everywhere.through(price)
            for error in through:
                assert float(error.min()) == pytest.approx(best, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("draw", DRAWS)
def test_counted(draw: Draw) -> None:
    """The best cuts for a number of dropped values; it says where there are none, or too many."""
    g = np.random.default_rng(4)
    n, k = 30, 3
    x = np.sort(draw(g, n))
    values = Ordered(ascending(torch.from_numpy(x), None))
    low = np.zeros(2 * k, dtype=np.int64)
    least = dense(x, k, n)
    for drop in (0, 1, 4, 17, n):
        cuts, done = counted(values, low, low + n, drop, 1 << 20)
        assert cuts is not None and done
        assert (np.diff(cuts) >= 0).all() and n - int((cuts[1::2] - cuts[::2]).sum()) == drop
        pieces = [x[a:b] for a, b in zip(cuts[::2], cuts[1::2], strict=True) if b > a]
        error = sum(float(((piece - piece.mean()) ** 2).sum()) for piece in pieces)
        assert error == pytest.approx(least[drop], rel=1e-9, abs=1e-14)
    assert counted(values, low, low + n, 4, 100) == (None, False)
    narrow = np.array([0, 5, 8, 15, 20, 30])
    assert counted(values, narrow, narrow, 8, 1 << 20)[0] is not None
    assert counted(values, narrow, narrow, 7, 1 << 20) == (None, True)
    assert counted(values, narrow, narrow, 9, 1 << 20) == (None, True)


def test_split() -> None:
    """All ascending cuts within the windows are in one of the halves, none in both, and the halves
    lie on their grid.
    """
    g = np.random.default_rng(12)
    for _ in range(50):
        low = np.sort(g.integers(0, 7, 4))
        high = np.maximum.accumulate(low + g.integers(0, 4, 4))
        if (low == high).all():
            continue
        everywhere = set(product(*(range(a, b + 1) for a, b in zip(low, high, strict=True))))
        cuts = {x for x in everywhere if list(x) == sorted(x)}
        paths = [np.array(x) for x in list(cuts)[: int(g.integers(0, 3))]]
        positions = np.unique([0, 12, *low, *high])
        halves = []
        for grid, least, most in split(positions, low, high, paths):
            assert np.isin([*least, *most], grid).all() and np.isin(positions, grid).all()
            assert (np.diff(least) >= 0).all() and (np.diff(most) >= 0).all()
            inside = {x for x in cuts if (x >= least).all() and (x <= most).all()}
            assert inside < cuts
            halves.append(inside)
        assert halves[0] | halves[1] == cuts and not halves[0] & halves[1]


def test_out_of_work() -> None:
    """Then the result is still one that no alternation improves, with a bound that holds."""
    g = np.random.default_rng(5)
    for draw in DRAWS:
        x = draw(g, 200)
        least = dense(x, 4, 20)[20]
        for work in (0.0, 1e-3, 0.02):
            found = trimmed_centres(torch.from_numpy(x), 4, drop=20, work=work)
            slack = 1e-13 * float(x @ x)
            assert found.bound <= least + slack <= found.value + 2 * slack
            assert found.certain == (found.bound >= found.value - slack)
            assert not (work == 0.0 and found.certain)
            again = trimmed_centres(torch.from_numpy(x), 4, drop=20, work=work, warm=found.centres)
            assert again.value <= found.value + slack
            assert error_of(x, found.centres, 20) == pytest.approx(found.value, rel=1e-9)
            best = trimmed_centres(torch.from_numpy(x), 4, drop=20).centres
            warm = trimmed_centres(torch.from_numpy(x), 4, drop=20, work=work, warm=best)
            assert warm.value == pytest.approx(least, rel=1e-9)


# ------------------------------------------------------------------ edges


def test_edges() -> None:
    """Ties, few distinct values, budgets that keep one value, numbers of any size."""
    for values, k, drop in (
        ([2.0], 3, 0),
        ([1.0, 1.0, 1.0], 1, 1),
        ([0.0, 1.0, 5.0], 2, 1),
        ([0.0, 1.0, 5.0, 5.0], 1, 3),
        ([0.0, 1.0, 5.0], 9, 0),
    ):
        found = trimmed_centres(torch.tensor(values), k, drop=drop)
        assert found.certain and error_of(np.array(values), found.centres, drop) == 0
    g = np.random.default_rng(6)
    x = normal(g, 100)
    plain = trimmed_centres(torch.from_numpy(x), 3, drop=5)
    for exponent in (-1000, -400, -100, 100, 400, 900):
        scaled = trimmed_centres(torch.from_numpy(np.ldexp(x, exponent)), 3, drop=5)
        assert scaled.certain
        np.testing.assert_allclose(np.ldexp(scaled.centres, -exponent), plain.centres, rtol=1e-12)


# ------------------------------------------------------------------ the joint C step


def solved(part: Part, w: Tensor, mu: float | None = None, h: Tensor | None = None) -> float:
    """Twice the objective that `solve` reaches from nothing."""
    state = part.solve(w, None, mu, h)
    return 2 * part.objective(w, state, mu, h)


@pytest.mark.parametrize("draw", DRAWS)
def test_pair_is_optimal(draw: Draw) -> None:
    """By enumeration on tiny weights, by the dense programme on more of them, in either order."""
    g = np.random.default_rng(7)
    for n in (8, 70):
        w = torch.from_numpy(draw(g, n))
        for k in (1, 2, 3):
            least = enumerated(w.numpy(), k) if n == 8 else dense(w.numpy(), k, n)
            slack = 1e-13 * float(w @ w)
            for count in (0, 1, n // 4, n - 1, n, 99):
                expected = pytest.approx(least[min(count, n)], rel=1e-9, abs=slack)
                assert solved(KMeans(k) + Sparse(nonzeros=count), w) == expected
            assert solved(Sparse(density=0.25) + KMeans(k), w.view(2, -1)) == pytest.approx(
                least[round(n / 4)], rel=1e-9, abs=slack
            )
            for alpha in (0.0, 1e-3, 0.1, 1e3):
                mu = 2.0
                best = float((least + 2 * alpha / mu * np.arange(n + 1)).min())
                found = solved(KMeans(k) + SparsePenalty(alpha), w, mu) / mu
                assert found == pytest.approx(best, rel=1e-9, abs=slack)


def test_pair_claims_no_more_than_it_knows() -> None:
    assert joint.find(Sparse(nonzeros=3), KMeans(2)) is not None
    assert joint.find(KMeans(2), SparsePenalty(0.1)) is not None
    assert not (KMeans(2) + Sparse(nonzeros=3)).exact
    assert not (KMeans(2) + SparsePenalty(0.1)).exact
    for nothing in (Sparse(nonzeros=0), Sparse(density=0.0)):
        assert (KMeans(2) + nothing).exact and (nothing + KMeans(2)).exact_weighted
        assert not (KMeans(2, value_dtype=torch.float16) + nothing).exact


def test_better_than_alternating() -> None:
    """On near-binary weights the parts in turn are stuck far above (papers, 4.7)."""
    w = torch.from_numpy(near_binary(np.random.default_rng(8), 20_000)).float()
    part = Sparse(density=0.05) + KMeans(2)
    pruned = part.parts[0].solve(w, None, None, None)
    kept = part.parts[0].reconstruct(pruned)
    state = part.parts[1].solve(w - kept, None, None, None)
    stuck = squared_error(w, kept + part.parts[1].reconstruct(state))
    assert solved(part, w) < 0.75 * stuck


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_weights(dtype: torch.dtype) -> None:
    """Near the optimum for the weights as they are; codebook and values as they are stored."""
    w = torch.from_numpy(normal(np.random.default_rng(9), 600)).to(dtype)
    best = dense(w.double().numpy(), 3, 30)[30]
    part = KMeans(3) + Sparse(nonzeros=30)
    assert solved(part, w) <= best * (1 + 2e-3)
    stored = KMeans(3, value_dtype=torch.bfloat16) + Sparse(nonzeros=30, value_dtype=torch.bfloat16)
    state = stored.project(w)
    assert stored.admits(state)
    assert 2 * stored.objective(w, state) <= best * (1 + 2e-2)
    assert 2 * stored.objective(w, stored.project(w, part.project(w))) <= best * (1 + 2e-2)


def test_huge_and_tiny_weights() -> None:
    w = torch.from_numpy(normal(np.random.default_rng(10), 90)).float()
    part = KMeans(2) + Sparse(nonzeros=7)
    delta = part.reconstruct(part.project(w))
    for exponent in (-100, 100):
        scaled = part.reconstruct(part.project(torch.ldexp(w, torch.tensor(exponent))))
        torch.testing.assert_close(torch.ldexp(scaled, torch.tensor(-exponent)), delta)


# ------------------------------------------------------------------ importance


def descended(part: Sum, w: Tensor, mu: float | None, h: Tensor) -> float:
    """The better of both orders of the parts, each in turn until nothing changes."""
    reached = math.inf
    for first in (0, 1):
        deltas = [torch.zeros_like(w), torch.zeros_like(w)]
        for step in range(first, 60 + first):
            i = step % 2
            state = part.parts[i].solve(w - deltas[1 - i], None, mu, h)
            deltas[i] = part.parts[i].reconstruct(state)
        used = int((deltas[1] != 0).sum())
        price = part.parts[1].alpha if isinstance(part.parts[1], SparsePenalty) else 0.0
        scale = 1.0 if mu is None else mu
        reached = min(reached, scale * squared_error(w, sum(deltas), h) + 2 * price * used)
    return reached


@pytest.mark.parametrize(
    ("part", "mu"),
    [(KMeans(2) + Sparse(nonzeros=9), None), (KMeans(3) + SparsePenalty(0.05), 2.0)],
)
def test_importance(part: Sum, mu: float | None) -> None:
    """Never much above the parts in turn, on average below; never worse than a warm start; weights
    that do not count take no correction; equal importance is a matter of μ alone.
    """
    g = torch.Generator().manual_seed(11)
    ratios = []
    for _ in range(12):
        w = torch.randn(80, generator=g, dtype=torch.float64)
        h = torch.rand(80, generator=g, dtype=torch.float64) ** 3
        h[:10] = 0
        state = part.project(w, mu=mu, importance=h)
        found = 2 * part.objective(w, state, mu, h)
        ratios.append(found / descended(part, w, mu, h))
        moved = w + 0.1 * torch.randn(80, generator=g, dtype=torch.float64)
        warm = part.project(moved, state, mu=mu, importance=h)
        before = part.objective(moved, state, mu, h)
        assert part.objective(moved, warm, mu, h) <= before * (1 + 1e-12)
    assert max(ratios) <= 1 + 1e-6 and sum(ratios) / len(ratios) < 0.995

    w = torch.randn(60, generator=g, dtype=torch.float64)
    three = torch.full_like(w, 3.0)
    other = None if mu is None else 3 * mu
    expected = part.reconstruct(part.project(w, mu=other))
    torch.testing.assert_close(part.reconstruct(part.project(w, mu=mu, importance=three)), expected)
    nothing = part.project(w, mu=mu, importance=torch.zeros_like(w))
    assert part.objective(w, nothing, mu, torch.zeros_like(w)) == 0


# ------------------------------------------------------------------ the measurement


def test_experiment(tmp_path: Path) -> None:
    """It runs, and what it calls certain is optimal; the stored results say so of all they show."""
    folder = Path(__file__).parents[1] / "experiments"
    path = tmp_path / "trimmed.json"
    command = [sys.executable, folder / "trimmed.py", "--smoke", "--out", path]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    for file in (path, folder / "results" / "trimmed.json"):
        result = json.loads(file.read_text())["result"]
        assert result["dense_programme"]["largest_relative_difference"] < 1e-9
        assert result["certain"] >= 0.95 * result["draws"] > 0
        assert result["gap_mean"] <= 1e-4
        assert {row["weights"] for row in result["rows"]} >= {"normal", "near-binary"}
