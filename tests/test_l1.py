"""The ℓ1 ball and penalty: another solver's answers, feasibility in the stored numbers, edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from lc_compress.l1 import L1Ball, L1Penalty
from lc_compress.part import Part, squared_error
from lc_compress.sparse import Sparse

FEW_EPS = 1 + 8 * torch.finfo(torch.float64).eps


def norm(delta: Tensor) -> float:
    return float(delta.double().abs().sum())


def by_sorting(w: Tensor, radius: float, h: Tensor | None = None) -> Tensor:
    """The projection from all breakpoints h |w| in order: the textbook's algorithm, in float64."""
    u = w.double().abs().flatten().numpy()
    weights = np.ones_like(u) if h is None else h.double().flatten().numpy()
    if u[weights > 0].sum() <= radius:
        return torch.where(torch.from_numpy(weights > 0).view(w.shape), w.double(), 0.0)
    shrink = np.divide(1, weights, out=np.zeros_like(u), where=weights > 0)
    u = np.where(weights > 0, u, 0)

    def surplus(tau: float) -> float:
        return float(np.maximum(u - tau * shrink, 0).sum()) - radius

    breakpoints = np.append(np.sort(u * weights), 0.0)
    breakpoints.sort()
    low, high = 0, len(breakpoints) - 1  # the norm is above the radius at low, not above it at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if surplus(breakpoints[middle]) > 0 else (low, middle)
    a, b = float(breakpoints[low]), float(breakpoints[high])
    tau = b if surplus(b) >= 0 else brentq(surplus, a, b, xtol=1e-300, rtol=1e-15)
    theta = torch.from_numpy(np.maximum(u - tau * shrink, 0)).view(w.shape)
    return theta * w.double().sign()


def kinds(n: int, g: torch.Generator) -> dict[str, Tensor]:
    gaussian = torch.randn(n, generator=g, dtype=torch.float64)
    return {
        "gaussian": gaussian,
        "heavy tails": gaussian.sign() * torch.exp(3 * gaussian),
        "few values": torch.randint(-2, 3, (n,), generator=g).double() / 2,
        "a geometric series": 0.9 ** torch.arange(n, dtype=torch.float64),
        "constant": torch.full((n,), -0.75, dtype=torch.float64),
    }


@pytest.mark.parametrize("n", [1, 2, 7, 500, 20_000])
@pytest.mark.parametrize("weighted", [False, True])
def test_ball_is_the_projection_by_sorting(n: int, weighted: bool, generator) -> None:  # type: ignore[no-untyped-def]
    for name, w in kinds(n, generator).items():
        h = torch.rand(n, generator=generator, dtype=torch.float64) ** 4 if weighted else None
        if h is not None:
            h[torch.rand(n, generator=generator) < 0.2] = 0
        for share in (1e-6, 0.01, 0.3, 0.97, 1.1):
            part = L1Ball(share * norm(w))
            delta = part.reconstruct(part.project(w, importance=h))
            expected = by_sorting(w, part.radius, h)
            message = f"{name}, {share}"
            torch.testing.assert_close(delta, expected, rtol=1e-9, atol=1e-12, msg=message)
            assert norm(delta) <= part.radius * FEW_EPS, message


def test_threshold_is_not_one_index_late() -> None:
    """The older toolkit leaves [1, 1] as it is (papers/learning-compression.md, section 7, 6)."""
    part = L1Ball(1.9)
    delta = part.reconstruct(part.project(torch.ones(2)))
    assert torch.equal(delta, torch.tensor([0.95, 0.95]))
    assert norm(delta) <= 1.9


@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.float16])
def test_ball_is_feasible_in_the_stored_numbers(dtype, stored, generator) -> None:  # type: ignore[no-untyped-def]
    """Equal weights all round the same way, and to the nearest would leave the ball."""
    left_it = 0
    for radius in (0.013, 0.7, 1.0, 2.9, 11.0):
        for w in (torch.full((6, 8), 0.75), torch.randn(6, 8, generator=generator)):
            part = L1Ball(radius, value_dtype=stored)
            state = part.project(w.to(dtype))
            assert norm(part.reconstruct(state)) <= radius * FEW_EPS and part.admits(state)
            exact = by_sorting(w.to(dtype), radius)
            nearest = exact.to(dtype if stored is None else stored).double()
            left_it += norm(nearest) > radius * FEW_EPS
            eps = max(torch.finfo(t).eps for t in (dtype, stored or dtype))
            torch.testing.assert_close(
                part.reconstruct(state).double(), exact, rtol=2 * eps, atol=1e-7
            )
    assert left_it or dtype == torch.float64


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("weighted", [False, True])
def test_ball_of_huge_and_tiny_weights(scale: float, weighted: bool, generator) -> None:  # type: ignore[no-untyped-def]
    w = torch.randn(30, generator=generator) * scale
    h = torch.rand(30, generator=generator) if weighted else None
    part = L1Ball(0.2 * norm(w))
    delta = part.reconstruct(part.project(w, importance=h))
    expected = by_sorting(w, part.radius, h).float()
    torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6 * scale)
    inside = L1Ball(norm(w) * 1.01)
    assert torch.equal(inside.reconstruct(inside.project(w)), w)


def test_ball_far_smaller_than_the_weights_is_still_reached() -> None:
    w = torch.tensor([3e30, -1.0, 3e30], dtype=torch.float64)
    part = L1Ball(5.0)
    assert part.reconstruct(part.project(w)).tolist() == [2.5, 0.0, 2.5]
    assert part.project(w, importance=torch.tensor([1.0, 1.0, 0.5])).values.tolist() == [5.0]


def test_ball_of_radius_zero_of_zeros_and_of_nothing_that_counts() -> None:
    w = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    for part, weights, h in (
        (L1Ball(0.0), w, None),
        (L1Ball(0.0), w, torch.rand(2, 2)),
        (L1Ball(3.0), torch.zeros(2, 2), None),
        (L1Ball(0.0), torch.zeros(2, 2), None),
        (L1Ball(3.0), w, torch.zeros(2, 2)),
    ):
        state = part.project(weights, importance=h)
        assert state.positions.numel() == 0 and part.bits(state) == 0


def test_importance_of_any_size() -> None:
    """What counts next to nothing is given up first, without overflow."""
    w = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    h = torch.tensor([1e200, 1e-300, 5e199, 0.0], dtype=torch.float64)
    part = L1Ball(1.7)
    assert part.reconstruct(part.project(w, importance=h)).tolist() == pytest.approx(
        [0.9, 0.0, 0.8, 0.0]
    )
    everything = L1Ball(3.5)
    assert everything.reconstruct(everything.project(w, importance=h)).tolist() == pytest.approx(
        [1.0, 0.0, 1.0, 0.0]  # 1e-500 of the largest importance is none
    )


@pytest.mark.parametrize("sampled", [False, True])
def test_a_sample_that_misleads_only_costs_time(sampled: bool, generator) -> None:  # type: ignore[no-untyped-def]
    """The first guess looks at every n-th weight: all large ones are there, or none."""
    w = 0.01 * torch.randn(40_960, generator=generator, dtype=torch.float64)
    where = slice(0, None, 10) if sampled else slice(1, None, 10)
    w[where] = torch.randn(4096, generator=generator, dtype=torch.float64)
    for share in (0.001, 0.5, 0.99):
        part = L1Ball(share * norm(w))
        expected = by_sorting(w, part.radius)
        torch.testing.assert_close(part.reconstruct(part.project(w)), expected, atol=1e-9, rtol=0)


def test_ball_beyond_what_float32_can_count() -> None:
    w = torch.full((2**24 + 7,), 2.0**-24)
    w[-3:] = -2.0
    part = L1Ball(3.0)
    state = part.project(w)
    assert state.positions.tolist() == [2**24 + 4, 2**24 + 5, 2**24 + 6]
    assert state.values.tolist() == [-1.0, -1.0, -1.0]


def test_no_feasible_point_nearby_is_better(generator) -> None:  # type: ignore[no-untyped-def]
    w = torch.randn(12, generator=generator, dtype=torch.float64)
    h = torch.rand(12, generator=generator, dtype=torch.float64)
    part = L1Ball(2.0)
    delta = part.reconstruct(part.project(w, importance=h))
    best = squared_error(w, delta, h)
    for _ in range(500):
        other = delta + 0.1 * torch.randn(12, generator=generator, dtype=torch.float64)
        other = other * min(1.0, 2.0 / norm(other))
        assert squared_error(w, other, h) >= best


def test_penalty_is_the_least_of_a_fine_grid(generator) -> None:  # type: ignore[no-untyped-def]
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    for _ in range(20):
        w = torch.randn(4, generator=generator, dtype=torch.float64)
        h = torch.rand(4, generator=generator, dtype=torch.float64)
        alpha, mu = 0.4 * float(torch.rand((), generator=generator)), 1.7
        part = L1Penalty(alpha)
        state = part.project(w, mu=mu, importance=h)
        cost = mu / 2 * h[:, None] * (w[:, None] - grid) ** 2 + alpha * grid.abs()
        least = grid[cost.argmin(1)]
        torch.testing.assert_close(part.reconstruct(state), least, atol=1e-4, rtol=0)
        assert part.objective(w, state, mu, h) <= float(cost.amin(1).sum())
        assert part.penalty(state) == pytest.approx(alpha * norm(part.reconstruct(state)))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_penalty_takes_the_best_of_the_stored_numbers(stored, generator) -> None:  # type: ignore[no-untyped-def]
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(stored).double()
    every = every[every.isfinite()]
    w = torch.randn(200, generator=generator, dtype=torch.float64)
    part = L1Penalty(0.2, value_dtype=stored)
    cost = 0.5 * (w[:, None] - every) ** 2 + 0.2 * every.abs()
    reached = part.objective(w, part.project(w, mu=1.0), 1.0)
    assert reached == pytest.approx(float(cost.amin(1).sum()), rel=1e-12)


def test_penalty_edges() -> None:
    w = torch.tensor([1e30, -1e-30, 0.0, 2.0])
    free = L1Penalty(0.0)
    assert torch.equal(free.reconstruct(free.project(w, mu=1.0)), w)
    assert L1Penalty(1.0).project(w, mu=1e-300).positions.numel() == 0
    h = torch.tensor([0.0, 1.0, 1.0, 1e-38])
    assert L1Penalty(0.1).project(w, mu=1.0, importance=h).positions.numel() == 0
    assert L1Penalty(1.0).project(w, mu=1.0, importance=h * 1e38).positions.tolist() == [1, 3]


def test_penalty_needs_mu() -> None:
    with pytest.raises(ValueError, match=r"L1Penalty\(alpha=0.1\) weighs .* needs `mu`"):
        L1Penalty(0.1).project(torch.randn(5))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_budget_and_price_are_checked(bad: float) -> None:
    with pytest.raises(ValueError, match="radius must be finite and >= 0"):
        L1Ball(bad)
    with pytest.raises(ValueError, match="alpha must be finite and >= 0"):
        L1Penalty(bad)


def test_a_looser_state_is_not_admitted_and_only_a_start(generator) -> None:  # type: ignore[no-untyped-def]
    w = torch.randn(50, generator=generator)
    loose, tight = L1Ball(9.0, value_dtype=torch.float16), L1Ball(3.0, value_dtype=torch.float16)
    start = loose.project(w)
    assert loose.admits(start) and not tight.admits(start)
    assert tight.admits(tight.project(w, start))
    assert not tight.admits(Sparse(nonzeros=50).project(w))


def test_an_l1_budget_counts_magnitude_not_weights(generator) -> None:  # type: ignore[no-untyped-def]
    """At an equal norm the ball keeps more, smaller weights than the largest ones."""
    w = torch.randn(400, generator=generator)
    sparse = Sparse(nonzeros=40)
    budget = norm(sparse.reconstruct(sparse.project(w)))
    parts: list[Part] = [L1Ball(budget)]
    state = parts[0].project(w)
    assert state.positions.numel() > 40
    kept = set(sparse.project(w).positions.tolist())
    assert kept <= set(state.positions.tolist())
