"""Composition: what nests, what is refused, what is stored."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from lc_compress import (
    Binary,
    FixedCodebook,
    KMeans,
    LowRank,
    Matrix,
    Part,
    RankSelection,
    Sparse,
    Sum,
    Ternary,
    Then,
    each,
)
from lc_compress.compose import Over, bound
from lc_compress.part import squared_error


@pytest.fixture
def w(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(24, 16, generator=generator)


def test_sums_are_flat_values() -> None:
    a, b, c = Binary(), LowRank(1), Sparse(nonzeros=3)
    assert (a + b) + c == a + (b + c) == Sum((a, b, c))
    assert hash((a + b) + c) == hash(a + (b + c))
    assert a + b != b + a
    assert str(a + b) == "Binary() + LowRank(rank=1)"


def test_only_parts_add_up() -> None:
    for other in (1.0, torch.ones(2), None):
        with pytest.raises(TypeError):
            Binary() + other  # type: ignore[operator]
    with pytest.raises(TypeError, match="Sum adds parts, got int"):
        Sum((Binary(), 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one part"):
        Sum(())


def test_three_terms_end_no_worse_than_the_best_greedy_order(w: torch.Tensor) -> None:
    terms: list[Part] = [Binary(), LowRank(2), Sparse(nonzeros=20)]
    part = Sum(tuple(terms))
    reached = 2 * part.objective(w, part.project(w))
    for order in permutations(terms):
        residual = w
        for term in order:
            residual = residual - term.reconstruct(term.project(residual))
        assert reached <= squared_error(residual, torch.zeros_like(w)) + 1e-6


def test_a_tighter_budget_starts_from_a_looser_state(w: torch.Tensor) -> None:
    loose, tight = LowRank(3) + Sparse(nonzeros=50), LowRank(2) + Sparse(nonzeros=10)
    start = loose.project(w)
    assert not tight.admits(start)
    state = tight.project(w, start)
    assert tight.admits(state)
    assert state[1].positions.numel() <= 10


def test_then_reaches_the_part_whose_values_are_continuous() -> None:
    quantized = LowRank(2).over(Matrix()).then(KMeans(4))
    assert quantized == Over(Then(LowRank(2), KMeans(4)), Matrix())
    assert Sparse(nonzeros=5).then(LowRank(1)).then(KMeans(2)) == Then(
        Sparse(nonzeros=5), Then(LowRank(1), KMeans(2))
    )
    assert each(Sparse(nonzeros=5)).then(Binary()) == each(Sparse(nonzeros=5).then(Binary()))


@pytest.mark.parametrize(
    ("outer", "match"),
    [
        (FixedCodebook((0.0, 1.0)), "leaves nothing continuous"),
        (Binary() + Sparse(nonzeros=1), "no one meaning"),
    ],
)
def test_then_is_refused(outer: Part, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        outer.then(KMeans(2))
    with pytest.raises(TypeError, match="takes a part"):
        Sparse(nonzeros=1).then(4)  # type: ignore[arg-type]


def test_pruned_then_quantized_stores_codes_on_the_support_only(w: torch.Tensor) -> None:
    part = Sparse(nonzeros=40).then(KMeans(4))
    state = part.project(w)
    fields = part.encode(state)
    assert fields["values@positions.codes"].data.shape == (40,)
    support = Sparse(nonzeros=40).encode(state.outer)["positions"]
    assert part.bits(state) == support.coding.bits(support.data) + 40 * 2 + 4 * 32
    delta = part.reconstruct(state)
    assert int((delta != 0).sum()) == 40 and len(delta[delta != 0].unique()) <= 4
    survivors = w.flatten()[state.outer.positions]
    best = KMeans(4).project(survivors)
    assert squared_error(survivors, delta.flatten()[state.outer.positions]) == pytest.approx(
        2 * KMeans(4).objective(survivors, best)
    )


def test_scales_can_be_compressed_too(w: torch.Tensor) -> None:
    part = Binary(group=8).then(KMeans(2))
    state = part.project(w)
    assert len(part.reconstruct(state).abs().unique()) == 2
    assert part.bits(state) == w.numel() + 48 + 2 * 32


def test_each_keeps_one_state_per_tensor_and_one_array_of_signs(w: torch.Tensor) -> None:
    shapes = ((8, 16), (16, 16))
    part = each(Binary(), shapes)
    flat = w.flatten()
    state = part.project(flat)
    first, second = flat.split([128, 256])
    expected = torch.cat([Binary().reconstruct(Binary().project(x)) for x in (first, second)])
    assert torch.equal(part.reconstruct(state), expected)
    fields = part.encode(state)
    assert sorted(fields) == ["0.scale", "1.scale", "all.positive"]
    decoded = part.decode({k: f.data for k, f in fields.items()}, flat.shape, flat.dtype)
    assert torch.equal(part.reconstruct(decoded), expected)


def test_each_without_shapes_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="use it in a Joint task, or give `shapes`"):
        each(Binary()).project(torch.ones(4))
    with pytest.raises(ValueError, match="splits a vector of 6 weights"):
        each(Binary(), [(2, 3)]).project(torch.ones(4))


def test_binding_reaches_every_each() -> None:
    shapes = (torch.Size((2, 3)), torch.Size((4,)))
    part = each(Binary()) + Sparse(nonzeros=2).then(each(Ternary())) + Sparse(nonzeros=1)
    expected = (
        each(Binary(), shapes)
        + Sparse(nonzeros=2).then(each(Ternary(), shapes))
        + Sparse(nonzeros=1)
    )
    assert bound(part, shapes) == expected
    w = torch.randn(10, generator=torch.Generator().manual_seed(0))
    state = expected.project(w)
    arrays = {name: field.data for name, field in expected.encode(state).items()}
    again = expected.decode(arrays, w.shape, w.dtype)
    assert torch.equal(expected.reconstruct(again), expected.reconstruct(state))


def test_half_precision_sums_round_once(w: torch.Tensor) -> None:
    half = w.bfloat16()
    part = Binary() + Sparse(density=0.1)
    state = part.project(half)
    delta = part.reconstruct(state)
    assert delta.dtype == torch.bfloat16
    exact = Binary() + Sparse(density=0.1)
    reference = exact.objective(half.float(), exact.project(half.float()))
    assert part.objective(half, state) <= reference * 1.02
    corrected = state[1].positions
    torch.testing.assert_close(  # two bfloat16 values, added: one unit in the last place
        delta.flatten()[corrected], half.flatten()[corrected], rtol=2**-7, atol=0
    )


def test_importance_reaches_every_term(w: torch.Tensor) -> None:
    h = torch.ones_like(w)
    h[:, :8] = 0
    part = Binary() + LowRank(1) + Sparse(nonzeros=16)
    state = part.project(w, importance=h)
    weighted = 2 * part.objective(w, state, importance=h)
    plain = squared_error(w, part.reconstruct(part.project(w)), h)
    assert weighted < plain
    assert math.isfinite(weighted)


def test_each_of_a_sum_reads_its_state_back(w: torch.Tensor) -> None:
    part = each(Binary() + Ternary() + Sparse(nonzeros=2), ((8, 16), (16, 16)))
    flat = w.flatten()
    state = part.project(flat)
    arrays = {name: field.data for name, field in part.encode(state).items()}
    decoded = part.decode(arrays, flat.shape, flat.dtype)
    assert torch.equal(part.reconstruct(decoded), part.reconstruct(state))


def test_then_starts_cold_where_the_factors_have_another_rank(w: torch.Tensor) -> None:
    inner = KMeans(4, value_dtype=torch.float16)  # not exact: it compares with the warm state
    warm = LowRank(2).then(inner).project(w)
    state = LowRank(3).then(inner).project(w, warm)
    assert state.inner["left"].codes.shape == (24, 3)


def test_then_refuses_a_part_that_cannot_be_read_back() -> None:
    class Shapeless(Binary):
        free_shapes = Part.free_shapes

    with pytest.raises(TypeError, match=r"`then` needs Shapeless.free_shapes"):
        Shapeless().then(KMeans(2))


def best_order(total: Sum, w: torch.Tensor) -> float:
    """The least objective of single terms projected in turn, over all orders, run to the end."""
    found = []
    for order in permutations(range(len(total.parts))):
        states: list[object] = [None] * len(order)
        deltas = [torch.zeros_like(w) for _ in order]
        for _ in range(100):
            for i in order:
                rest = w - sum(x for j, x in enumerate(deltas) if j != i)
                states[i] = total.parts[i].project(rest, states[i])
                deltas[i] = total.parts[i].reconstruct(states[i])
        found.append(squared_error(w, sum(deltas)) / 2)
    return min(found)


@pytest.mark.parametrize("budget", [{"density": 0.05}, {"nonzeros": 57}])
def test_growing_budgets_end_below_every_order(
    budget: dict[str, float], generator: torch.Generator
) -> None:
    w = torch.randn(24, 48, generator=generator, dtype=torch.float64)
    total = Binary() + LowRank(3) + Sparse(**budget)
    viewed = Binary().over(Matrix()) + LowRank(3) + Sparse(**budget).over(Matrix())
    least = best_order(total, w)
    for part in (total, viewed):
        assert part.objective(w, part.project(w)) < 0.995 * least


def test_growing_budgets_are_one_start_of_several(generator: torch.Generator) -> None:
    """Next to huge outliers growth ends badly: other starts must be there."""
    w = torch.randn(24, 16, generator=generator, dtype=torch.float64)
    w.view(-1)[torch.randperm(w.numel(), generator=generator)[:19]] *= 1e3
    total = Binary() + LowRank(2) + Sparse(density=0.05)
    assert total.objective(w, total.project(w)) <= best_order(total, w) * (1 + 1e-6)


def test_shares_of_a_budget() -> None:
    assert Sparse(nonzeros=10).with_share(0.25) == Sparse(nonzeros=2)
    assert Sparse(density=0.5).with_share(0.25) == Sparse(density=0.125)
    assert Sparse(nonzeros=4).over(Matrix()).with_share(0.5) == Sparse(nonzeros=2).over(Matrix())
    assert each(Sparse(nonzeros=4)).with_share(0.5) == each(Sparse(nonzeros=2))
    assert Binary().with_share(0.5) is None
    assert each(Binary()).with_share(0.5) is None


def test_tensors_of_a_group_may_store_other_fields() -> None:
    """A factor of rank 0 has nothing to quantize."""
    part = each(RankSelection(1.0).then(KMeans(2)), [(4, 5), (5, 4)])
    w = torch.cat([torch.zeros(20), torch.randn(20, generator=torch.Generator().manual_seed(0))])
    state = part.project(w, mu=10.0)
    assert [s.outer.rank > 0 for s in state] == [False, True]
    arrays = {
        n: f.coding.unpack(f.coding.pack(f.data), f.data.shape)
        for n, f in part.encode(state).items()
    }
    again = part.decode(arrays, w.shape, w.dtype)
    assert torch.equal(part.reconstruct(again), part.reconstruct(state))
