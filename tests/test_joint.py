"""Joint C steps: where alternation gets stuck, golden values, and the table's rules.

Brute force is in the contract.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lc_compress import (
    Binary,
    FixedCodebook,
    KMeans,
    L1Ball,
    LowRank,
    Matrix,
    Sparse,
    SparsePenalty,
    Ternary,
    Vector,
    joint,
)
from lc_compress.binary import BinaryState
from lc_compress.part import squared_error


def near_binary(n: int) -> Tensor:
    """The shape of weights late in an LC run (papers/learning-compression.md, 4.7)."""
    g = torch.Generator().manual_seed(0)
    centres = torch.where(torch.rand(n, generator=g) < 0.08, 0.0, 0.05)
    signs = torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0)
    return centres * signs + 0.005 * torch.randn(n, generator=g)


def alternation(w: Tensor, kappa: int, sweeps: int) -> float:
    """The older toolkit's C step: prune, then binarize, from zero, for a fixed number of sweeps."""
    binary, sparse = Binary(), Sparse(nonzeros=kappa)
    q = torch.zeros_like(w)
    for _ in range(sweeps):
        s = sparse.reconstruct(sparse.project(w - q))
        q = binary.reconstruct(binary.project(w - s))
    return squared_error(w, q + s)


@pytest.mark.parametrize(("share", "factor"), [(0.01, 1.04), (0.05, 1.5), (0.2, 1.2)])
def test_alternation_stays_stuck_where_the_joint_step_does_not(share: float, factor: float) -> None:
    w = near_binary(50_000)
    kappa = round(share * w.numel())
    part = Binary() + Sparse(nonzeros=kappa)
    exact = 2 * part.objective(w, part.project(w))
    assert alternation(w, kappa, 10) > factor * exact
    assert alternation(w, kappa, 15) > factor * exact


def test_golden_values_of_a_large_layer() -> None:
    """From the timings of the older toolkit (papers/learning-compression.md, section 8)."""
    w = torch.from_numpy(
        np.random.default_rng(0).normal(0, 0.05, (512, 512, 3, 3)).astype(np.float32)
    )
    assert squared_error(w, torch.zeros_like(w)) == pytest.approx(5895.8102, abs=1e-4)
    part = Binary() + Sparse(nonzeros=117_965)
    state = part.project(w)
    assert 2 * part.objective(w, state) == pytest.approx(1371.7421809430, rel=1e-9)
    assert float(state[0].scale) == pytest.approx(0.0358260845752, rel=1e-7)
    assert (
        float(w.flatten()[state[1].positions].abs().min()) > 0.0358260845752
    )  # no small weight dropped


def test_written_order_does_not_matter() -> None:
    w = near_binary(1000).view(20, 50)
    a, b = Binary() + Sparse(nonzeros=30), Sparse(nonzeros=30) + Binary()
    one, other = a.project(w), b.project(w)
    assert torch.equal(a.reconstruct(one), b.reconstruct(other))
    assert a.exact and b.exact
    assert b.objective(w, b.project(w, other)) == b.objective(w, other)


def test_pair_behind_equal_views_is_one_block() -> None:
    w = near_binary(1000).view(20, 50)
    plain = Binary() + Sparse(nonzeros=30)
    viewed = Binary().over(Matrix()) + Sparse(nonzeros=30).over(Matrix())
    mixed = Binary().over(Vector()) + Sparse(nonzeros=30).over(Matrix())
    assert viewed.exact and not mixed.exact
    assert [len(block.terms) for block in viewed.blocks] == [2]
    assert [len(block.terms) for block in mixed.blocks] == [1, 1]
    state = viewed.project(w)
    assert torch.equal(viewed.reconstruct(state), plain.reconstruct(plain.project(w)))
    again = viewed.project(w + 1e-3, state)
    assert torch.equal(viewed.reconstruct(again), plain.reconstruct(plain.project(w + 1e-3)))


def test_one_scale_per_channel_is_not_claimed_exact() -> None:
    assert not (Binary(axis=0) + Sparse(nonzeros=3)).exact
    assert not (Binary() + Sparse(nonzeros=3)).exact_weighted
    assert not (Binary() + Sparse(nonzeros=3, value_dtype=torch.bfloat16)).exact
    assert (FixedCodebook((-1, 1)) + Sparse(nonzeros=3)).exact_weighted
    assert not (KMeans(2) + Sparse(nonzeros=3)).exact
    # a given scale is a codebook of two values
    assert (Binary(scale=0.1) + Sparse(nonzeros=3)).exact_weighted
    assert (L1Ball(1.0) + Ternary(scale=0.1)).exact_weighted
    assert not (Binary() + L1Ball(1.0)).exact


def test_penalty_pair_needs_mu() -> None:
    with pytest.raises(ValueError, match="needs `mu`"):
        (Binary() + SparsePenalty(0.1)).project(torch.randn(5))


def test_users_register_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint.registry, "_table", dict(joint.registry._table))
    calls = []

    @joint.register(KMeans, Sparse, applies=lambda a, b: a.k == 3, exact=lambda a, b: False)
    def trimmed(a, b, w, warm, mu, importance):  # type: ignore[no-untyped-def]
        calls.append(warm)
        first = a.solve(w, None, mu, importance)
        return first, b.solve(w - a.reconstruct(first), None, mu, importance)

    w = torch.randn(40, generator=torch.Generator().manual_seed(0))
    swapped = Sparse(nonzeros=4) + KMeans(3)
    state = swapped.project(w)
    assert len(calls) == 1 and calls[0] is None
    swapped.project(w, state)
    assert calls[1][0] is state[1]  # the warm start arrives in the solver's own order
    (KMeans(2) + Sparse(nonzeros=4)).project(w)
    assert len(calls) == 2  # `applies` kept it away


@pytest.mark.parametrize("part", [Binary() + Sparse(nonzeros=6), Binary() + SparsePenalty(0.02)])
def test_weighted_pair_is_never_worse_than_its_warm_start_or_one_term(part) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        w, h = torch.randn(40, generator=g), torch.rand(40, generator=g) ** 4
        cold = part.project(w, mu=1.0, importance=h)
        moved = w + 0.1 * torch.randn(40, generator=g)
        warm = part.project(moved, cold, mu=1.0, importance=h)
        assert part.objective(moved, warm, 1.0, h) <= part.objective(moved, cold, 1.0, h)
        alone = part.parts[1]
        only = alone.objective(w, alone.project(w, mu=1.0, importance=h), 1.0, h)
        assert part.objective(w, cold, 1.0, h) <= only * (1 + 1e-6)


def test_a_rounded_scale_is_not_claimed_to_be_exact() -> None:
    # two windows almost tie, and bfloat16 can hold the mean of the worse one only
    step = 2.0**-7
    w = torch.tensor([1 - 0.85 * step, 1 - 1.15 * step, 1 - 0.551 * step], dtype=torch.float64)
    assert not (Binary(value_dtype=torch.bfloat16) + SparsePenalty(0.1)).exact
    part = Binary(value_dtype=torch.bfloat16) + Sparse(nonzeros=1)
    assert not part.exact
    scale = torch.tensor([1 - step], dtype=torch.float64)
    binary = BinaryState(scale, w >= 0)
    warm = binary, Sparse(nonzeros=1).project(w - Binary().reconstruct(binary))
    assert part.objective(w, part.project(w)) > 2 * part.objective(w, warm)
    assert part.objective(w, part.project(w, warm)) == part.objective(w, warm)


def test_an_exact_pair_goes_before_a_local_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint.registry, "_table", dict(joint.registry._table))

    @joint.register(LowRank, Sparse, exact=lambda a, b: False)
    def local(a, b, w, warm, mu, importance):  # type: ignore[no-untyped-def]
        raise AssertionError

    low_rank, binary, sparse = LowRank(1), Binary(), Sparse(nonzeros=3)
    assert [x.terms for x in (low_rank + binary + sparse).blocks] == [(0,), (1, 2)]
    assert [x.terms for x in (binary + low_rank + sparse).blocks] == [(0, 2), (1,)]
    assert (sparse + low_rank + KMeans(2)).blocks[0].terms == (0, 1)
