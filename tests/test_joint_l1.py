"""Quantized plus ℓ1 or structured sparse, and pruned with quantized on one support: random problems
against all codes and supports, and what the joint step gains.
"""

from __future__ import annotations

import pytest
import torch
from parts_under_test import assignments, at_most, l1_ball, l1_penalty, n_of_m, scaled, supports
from parts_under_test import fixed as levels_of
from torch import Tensor

from lc_compress import Binary, FixedCodebook, Part, Sparse, SparsePenalty, Ternary
from lc_compress.codebook import PowersOfTwo
from lc_compress.l1 import L1Ball, L1Penalty
from lc_compress.nm import NM
from lc_compress.part import squared_error
from lc_compress.structured import BlockPenalty, BlockSparse, GroupL2Penalty

CODEBOOK = (-0.8, 0.1, 0.7)


def draw(shape: tuple[int, ...], g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights, some of them tied, and importance, some of it zero."""
    w = torch.randn(shape, generator=g, dtype=torch.float64)
    if torch.rand((), generator=g) < 0.3:
        w = (2 * w).round() / 2
    h = torch.rand(shape, generator=g, dtype=torch.float64) ** 3
    return w, torch.where(torch.rand(shape, generator=g) < 0.15, 0, h)


@pytest.mark.parametrize("weighted", [False, True])
def test_codebook_and_ball_against_all_codes_and_supports(weighted: bool, generator) -> None:  # type: ignore[no-untyped-def]
    for _ in range(200):
        w, h = draw((4,), generator)
        h = h if weighted else torch.ones_like(h)
        radius = float(torch.rand((), generator=generator))
        part = FixedCodebook(CODEBOOK) + L1Ball(radius)
        assert part.exact_weighted
        state = part.project(w, importance=h if weighted else None)
        reached = part.objective(w, state, importance=h)
        least = l1_ball(radius, *CODEBOOK)(w, h, 1.0)
        assert reached == pytest.approx(least, rel=1e-9, abs=1e-12)
        assert float(state[1].values.abs().sum()) <= radius * (1 + 1e-15)


@pytest.mark.parametrize("weighted", [False, True])
def test_codebook_and_price_against_all_codes(weighted: bool, generator) -> None:  # type: ignore[no-untyped-def]
    for _ in range(200):
        w, h = draw((5,), generator)
        h = h if weighted else torch.ones_like(h)
        alpha, mu = (0.05 + torch.rand(2, generator=generator)).tolist()
        part = FixedCodebook(CODEBOOK) + L1Penalty(alpha)
        state = part.project(w, mu=mu, importance=h if weighted else None)
        least = l1_penalty(alpha, *CODEBOOK)(w, h, mu)
        assert part.objective(w, state, mu, h) == pytest.approx(least, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "sparse",
    [
        NM(1, 2),
        BlockSparse(blocks=1, axis=1),
        BlockPenalty(0.4, axis=1),
        GroupL2Penalty(0.25, axis=0),
    ],
    ids=str,
)
def test_codebook_and_structure_against_all_codes(sparse: Part, generator) -> None:  # type: ignore[no-untyped-def]
    """For each code the best correction of what it leaves."""
    codes = torch.tensor(CODEBOOK, dtype=torch.float64)[assignments(4, 3)].view(-1, 2, 2)
    for _ in range(6):
        w, h = draw((2, 2), generator)
        for importance in (None, h):
            least = min(
                sparse.objective(
                    w - q, sparse.project(w - q, mu=1.5, importance=importance), 1.5, importance
                )
                for q in codes
            )
            part = sparse + FixedCodebook(CODEBOOK)
            assert part.exact and part.exact_weighted
            state = part.project(w, mu=1.5, importance=importance)
            assert part.objective(w, state, 1.5, importance) == pytest.approx(least, abs=1e-12)


def test_a_bad_start_changes_nothing(generator) -> None:  # type: ignore[no-untyped-def]
    w = torch.randn(500, generator=generator)
    part = L1Ball(80.0) + FixedCodebook((-1.0, 0.0, 1.0))
    cold = part.project(w)
    warm = part.project(w, part.project(-w))
    assert torch.equal(part.reconstruct(warm), part.reconstruct(cold))
    assert [len(block.terms) for block in part.blocks] == [2]


# ------------------------------------------------------------------ one support

PAIRS = [
    (Sparse(nonzeros=2), at_most(2)),
    (Sparse(nonzeros=0), at_most(0)),
    (Sparse(nonzeros=9), at_most(9)),
    (NM(1, 3), n_of_m(1, 3)),
    (NM(2, 3, axis=1), n_of_m(2, 3)),
    (NM(1, 2, axis=0), n_of_m(1, 2, 1)),
]


@pytest.mark.parametrize(
    ("outer", "cost"), PAIRS, ids=lambda x: str(x) if isinstance(x, Part) else ""
)
@pytest.mark.parametrize("codebook", [CODEBOOK, (-1.0, 0.0, 1.0), (0.3,), (-0.9, -0.5)])
def test_codebook_on_a_support_against_all(outer, cost, codebook, generator) -> None:  # type: ignore[no-untyped-def]
    least = supports(cost, levels_of(*codebook, 0.0), len(codebook))
    part = outer.then(FixedCodebook(codebook))
    assert part.exact and part.exact_weighted
    for _ in range(50):
        w, h = draw((2, 3), generator)
        for importance in (None, h):
            state = part.project(w, importance=importance)
            weights = torch.ones_like(w) if importance is None else importance
            value = part.objective(w, state, importance=importance)
            assert value == pytest.approx(least(w, weights, 1.0), abs=1e-13)
            assert part.admits(state) and bool((state.outer.values != 0).all())


GIVEN = [
    (Binary(scale=0.6), (-0.6, 0.6)),
    (Ternary(scale=0.6), (-0.6, 0.0, 0.6)),
    (PowersOfTwo(1), (-1.0, -0.5, 0.0, 0.5, 1.0)),
]


@pytest.mark.parametrize(("quantizer", "values"), GIVEN, ids=str)
def test_other_given_values_are_a_fixed_codebook(quantizer, values, generator) -> None:  # type: ignore[no-untyped-def]
    """In sums with every form of sparsity, and on the support of a pruned tensor."""
    same = FixedCodebook(values)
    forms: list[Part] = [
        Sparse(nonzeros=5),
        SparsePenalty(0.05),
        L1Ball(1.0),
        L1Penalty(0.1),
        NM(1, 4),
        BlockSparse(blocks=2, axis=0),
    ]
    w, h = draw((6, 8), generator)
    for form in forms:
        pairs = [(quantizer + form, same + form)]
        if isinstance(form, Sparse | NM):
            pairs.append((form.then(quantizer), form.then(same)))
        for one, other in pairs:
            assert one.exact and one.exact_weighted
            for importance in (None, h):
                a, b = (p.project(w, mu=1.5, importance=importance) for p in (one, other))
                assert torch.equal(one.reconstruct(a), other.reconstruct(b))


@pytest.mark.parametrize(
    ("outer", "cost"), PAIRS, ids=lambda x: str(x) if isinstance(x, Part) else ""
)
@pytest.mark.parametrize("inner", [Binary(), Ternary()], ids=str)
def test_one_scale_on_a_support_against_all(outer, cost, inner, generator) -> None:  # type: ignore[no-untyped-def]
    """Exact where every weight counts the same; otherwise close, and never below the optimum."""
    least = supports(cost, scaled(-1, 1, 0), 2)
    part = outer.then(inner)
    assert part.exact and not part.exact_weighted
    hits, worst, problems = 0, 1.0, 60
    for _ in range(problems):
        w, h = draw((2, 3), generator)
        plain = part.project(w)
        assert part.objective(w, plain) == pytest.approx(
            least(w, torch.ones_like(w), 1.0), abs=1e-13
        )
        state = part.project(w, importance=h)
        best, value = least(w, h, 1.0), part.objective(w, state, importance=h)
        assert value >= best - 1e-13
        hits += value <= best * (1 + 1e-9) + 1e-13
        worst = max(worst, value / best) if best > 1e-12 else worst
    assert hits >= 0.95 * problems and worst < 1.1, (hits, worst)


@pytest.mark.parametrize("outer", [Sparse(density=0.4), NM(2, 4), NM(3, 8, axis=0)], ids=str)
@pytest.mark.parametrize(
    "inner",
    [Binary(), Ternary(), Binary(axis=0), Ternary(group=6), FixedCodebook((-1.0, 0.5, 2.0))],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True])
def test_never_worse_than_one_after_the_other(outer, inner, weighted, generator) -> None:  # type: ignore[no-untyped-def]
    """Prune to the budget, then quantize what is left: what `then` does without a joint step."""
    part = outer.then(inner)
    gained = False
    for _ in range(10):
        w = torch.randn(8, 16, generator=generator)
        h = torch.rand(8, 16, generator=generator) ** 3 if weighted else None
        kept = outer.project(w, importance=h)
        mask = (outer.reconstruct(kept) != 0).double()
        counts = mask if h is None else mask * h
        codes = inner.project(outer.reconstruct(kept), importance=counts)
        plain = torch.where(mask > 0, inner.reconstruct(codes), 0)
        value = 2 * part.objective(w, part.project(w, importance=h), importance=h)
        before = squared_error(w, plain, h)
        assert value <= before * (1 + 1e-6)
        gained = gained or value < before * 0.999
        moved = w + 0.1 * torch.randn(8, 16, generator=generator)
        warm = part.project(w, importance=h)
        after = part.objective(moved, part.project(moved, warm, importance=h), importance=h)
        assert after <= part.objective(moved, warm, importance=h) * (1 + 1e-6)
    assert gained or not weighted


def test_codes_are_stored_for_the_kept_weights_only(generator) -> None:  # type: ignore[no-untyped-def]
    w = torch.randn(16, 16, generator=generator)
    part = NM(2, 4).then(Binary())
    state = part.project(w)
    kept = state.outer.positions.numel()
    support = part.encode(state)["positions"]
    assert part.bits(state) == support.coding.bits(support.data) + kept + 32
    assert len(part.reconstruct(state).abs().unique()) == 2
    ternary = NM(2, 4).then(Ternary())
    assert torch.equal(ternary.reconstruct(ternary.project(w)), part.reconstruct(state))


def test_scales_are_exact_where_no_group_lies_across_two() -> None:
    for axes, exact in (
        ((-1, 0), True),  # of a vector every weight has its own scale: exact too
        ((1, 0), True),
        ((-1, -2), True),
        ((0, 1), True),
        ((0, 0), False),
        ((-1, 1), False),  # the same axis of a matrix
        ((0, -1), False),  # the same axis of a vector
    ):
        part = NM(1, 2, axis=axes[0]).then(Binary(axis=axes[1]))
        assert part.exact == exact, axes
    assert not NM(1, 2).then(Binary(group=4)).exact


@pytest.mark.parametrize("shape", [(7,), (2, 4), (4, 2)])
def test_a_scale_per_row_on_groups_along_rows(shape, generator) -> None:  # type: ignore[no-untyped-def]
    """Of a vector the rows are single weights, and groups do lie across scales."""
    part = NM(1, 2).then(Ternary(axis=0))
    for _ in range(20):
        w, _ = draw(shape, generator)
        rows = w.view(len(w), -1)
        if w.dim() == 1:
            kept = NM(1, 2).reconstruct(NM(1, 2).project(w))
            least = squared_error(w, kept) / 2
        else:
            row = supports(n_of_m(1, 2), scaled(-1, 1, 0), 2)
            least = sum(row(x, torch.ones_like(x), 1.0) for x in rows)
        assert part.objective(w, part.project(w)) == pytest.approx(least, abs=1e-13)


def test_a_rounded_scale_is_not_claimed_exact() -> None:
    assert not NM(2, 4).then(Binary(value_dtype=torch.bfloat16)).exact
    assert not Sparse(nonzeros=3).then(Ternary(axis=0)).exact
    assert not (FixedCodebook((0.0, 1.0)) + L1Ball(1.0, value_dtype=torch.float16)).exact
