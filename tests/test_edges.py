"""Budgets, weights and importance at their limits: every public part on every edge of the input.

The contract tries most parts on most weights. This table adds sizes that float32 cannot square, an
importance of zero everywhere, on a row, on a column or on all weights but one, every budget from
nothing to more than all, and more than 2^24 weights, which float32 cannot count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from lc_compress import (
    NM,
    Binary,
    BlockPenalty,
    BlockSparse,
    FixedCodebook,
    GroupL2Penalty,
    Int,
    KMeans,
    L1Ball,
    L1Penalty,
    LowRank,
    Matrix,
    Part,
    PowersOfTwo,
    RankSelection,
    ScaledCodebook,
    Sparse,
    SparsePenalty,
    Ternary,
    Vector,
)
from lc_compress.order import _top_on_device, _top_on_host
from lc_compress.part import squared_error
from lc_compress.testing import expect_same

SHAPE = (4, 6)
SIZE = 24
HUGE = 2.0**100  # about 1e30: its square is beyond float32, a power of two so that nothing rounds


@dataclass(frozen=True)
class Edge:
    """A part and what is known of it at the edges.

    levels: constants that are representable: Δ is never worse than the best of them.
    full: every w is representable.
    uniform: every constant w is representable, beyond the levels.
    scales: k w gives k Δ for every k > 0.
    mu: of penalty forms.
    """

    part: Part[Any]
    levels: tuple[float, ...] = (0.0,)
    full: bool = False
    uniform: bool = False
    scales: bool = True
    mu: float | None = None


SKEWED = (-1.0, 0.25, 0.5)
VALUES = (-1.0, 0.25, 0.5, 3e38)
SCALES: tuple[dict[str, int], ...] = ({}, {"axis": 0}, {"axis": -1}, {"group": 5}, {"group": 99})

QUANTIZED = [
    *(Edge(kind(**where), uniform=True) for kind in (Binary, Ternary) for where in SCALES),
    *(Edge(ScaledCodebook(SKEWED, **where), uniform=True) for where in SCALES[:2]),
    Edge(ScaledCodebook((0.0,))),
    *(Edge(Int(3, **where), uniform=True) for where in SCALES[1:4]),
    *(Edge(Int(3, symmetric=False, **where), uniform=True) for where in SCALES[:2]),
    Edge(Int(8), uniform=True),
    Edge(Int(16), uniform=True),
    Edge(Binary(scale=0.5), levels=(-0.5, 0.5), scales=False),
    Edge(Ternary(scale=0.5), levels=(-0.5, 0.0, 0.5), scales=False),
    *(Edge(KMeans(k), uniform=True) for k in (1, 2, 4)),
    *(Edge(KMeans(k), full=True) for k in (SIZE, 300)),
    Edge(FixedCodebook(VALUES), levels=VALUES, scales=False),
    Edge(FixedCodebook((0.0,)), scales=False),
    Edge(PowersOfTwo(0), levels=(-1.0, 0.0, 1.0), scales=False),
    Edge(PowersOfTwo(126), levels=(-1.0, 2.0**-126, 1.0), scales=False),
]
ENOUGH = (SIZE, 10**9)
SPARSE = [
    *(Edge(Sparse(nonzeros=n), full=n in ENOUGH) for n in (0, 1, SIZE - 1, *ENOUGH)),
    *(Edge(Sparse(density=d), full=d == 1) for d in (0.0, 0.5, 1.0)),
    *(Edge(NM(n, m), full=n == m) for n, m in ((0, 1), (1, 1), (1, 4), (4, 4), (3, 99), (99, 99))),
    *(Edge(NM(1, 2, axis=axis)) for axis in (0, -2)),
    *(Edge(BlockSparse(blocks=n, axis=axis), full=n == 99) for n in (0, 1, 99) for axis in (0, -1)),
    *(Edge(BlockSparse(blocks=n, block=(3, 4)), full=n == 99) for n in (0, 1, 99)),
    Edge(BlockSparse(density=0.5, block=(99, 99))),
    *(Edge(L1Ball(radius), scales=False) for radius in (0.0, 1e-30, 1.5)),
    Edge(L1Ball(1e300), full=True),
]
LOW_RANK = [
    *(Edge(LowRank(rank), full=rank >= 4, uniform=rank > 0) for rank in (0, 1, 4, 99)),
]
PRICED = [
    Edge(form, full=form.alpha == 0, scales=False, mu=0.5)
    for alpha in (0.0, 0.3, 1e300)
    for form in (
        SparsePenalty(alpha),
        L1Penalty(alpha),
        BlockPenalty(alpha, axis=0),
        BlockPenalty(alpha, block=(3, 4)),
        GroupL2Penalty(alpha, axis=0),
        GroupL2Penalty(alpha, block=(3, 4)),
        RankSelection(alpha),
    )
]
QUANTIZERS = (Binary(), Ternary(), KMeans(2), LowRank(1))
SUMS = [
    *(
        Edge(q + Sparse(nonzeros=n), full=n == 99, uniform=True)
        for q in (*QUANTIZERS, Binary(axis=0))
        for n in (0, 1, 99)
    ),
    *(Edge(FixedCodebook(SKEWED) + Sparse(nonzeros=n), SKEWED, scales=False) for n in (0, 1, 99)),
    Edge(FixedCodebook(SKEWED) + NM(1, 2), SKEWED, scales=False),
    Edge(FixedCodebook(SKEWED) + BlockSparse(blocks=1, axis=0), SKEWED, scales=False),
    Edge(FixedCodebook(SKEWED) + L1Ball(1.0), SKEWED, scales=False),
    *(
        Edge(FixedCodebook(SKEWED) + form, SKEWED, scales=False, mu=0.5)
        for form in (L1Penalty(0.3), BlockPenalty(0.3, axis=0), GroupL2Penalty(0.3, axis=0))
    ),
    *(
        Edge(q + SparsePenalty(alpha), uniform=True, scales=False, mu=0.5)
        for q in QUANTIZERS[:3]
        for alpha in (0.0, 1e300)
    ),
    Edge(Int(2) + Sparse(nonzeros=1), uniform=True),
    Edge(LowRank(1).over(Matrix()) + Sparse(nonzeros=1), uniform=True),
    Edge(Binary() + LowRank(0) + Sparse(nonzeros=0), uniform=True),
]
COMPOSED = [
    *(
        Edge(Sparse(nonzeros=n).then(q), scales=not isinstance(q, PowersOfTwo | FixedCodebook))
        for n in (0, 1, 99)
        for q in (Binary(), Ternary(axis=0), KMeans(2), Int(3), PowersOfTwo(2), FixedCodebook((7,)))
    ),
    *(Edge(NM(n, 2).then(q)) for n in (0, 1, 2) for q in (Binary(), KMeans(2))),
    *(Edge(BlockSparse(blocks=n, axis=0).then(KMeans(2))) for n in (0, 1, 99)),
    Edge(SparsePenalty(1e300).then(Binary()), mu=0.5),
    Edge(LowRank(0).then(KMeans(2))),
    Edge(LowRank(1).then(Int(8))),
    Edge(Binary(axis=0).then(KMeans(2))),
    Edge(Binary().over(Vector()), uniform=True),
]
EDGES = [*QUANTIZED, *SPARSE, *LOW_RANK, *PRICED, *SUMS, *COMPOSED]


def draw(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def weights() -> Iterator[tuple[str, Tensor]]:
    """Float32 weights at the edges."""
    w = draw()
    yield "gaussian", w
    yield "zero", torch.zeros(SHAPE)
    yield "minus zero", -torch.zeros(SHAPE)
    yield "constant", torch.full(SHAPE, -0.75)
    yield "tied", (1.5 * w).round() / 2
    yield "a single one", w[:1, :1]
    yield "a single zero", torch.zeros(1, 1)
    yield "a row", w[:1]
    yield "a column", w[:, :1]
    yield "huge", w * HUGE
    yield "tiny", w / HUGE
    yield "a huge outlier", w + HUGE * (torch.arange(SIZE).view(SHAPE) == 8)


def importances(shape: torch.Size) -> Iterator[tuple[str, Tensor | None]]:
    """None, and importance of zero or of an extreme size on some weights or all."""
    h = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1
    rows, columns = (torch.arange(size) for size in shape)
    yield "none", None
    yield "nothing counts", torch.zeros(shape)
    yield "only the last one counts", h * ((rows[:, None] == rows[-1]) & (columns == columns[-1]))
    yield "no first row", h * (rows > 0)[:, None]
    yield "no first column", h * (columns > 0)
    yield "huge", h * HUGE
    yield "tiny", h / HUGE


def problems() -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """All importances with ordinary weights and with outliers, the first three with the others."""
    for name, w in weights():
        count = None if name in ("gaussian", "a huge outlier") else 3
        for what, h in islice(importances(w.shape), count):
            yield f"{name} weights, importance: {what}", w, h


def solved(edge: Edge, w: Tensor, h: Tensor | None, mu: float | None = None) -> Any:
    """The state, which is finite and feasible."""
    state = edge.part.project(w, mu=edge.mu if mu is None else mu, importance=h)
    delta = edge.part.reconstruct(state)
    assert delta.shape == w.shape and delta.dtype == w.dtype
    assert bool(torch.isfinite(delta).all())
    assert edge.part.admits(state)
    return state


def value(edge: Edge, w: Tensor, h: Tensor | None) -> float:
    """The objective reached."""
    return edge.part.objective(w, solved(edge, w, h), edge.mu, h)


def stored(part: Part[Any], state: Any, w: Tensor) -> Any:
    """The state, written and read back."""
    fields = part.encode(state)
    arrays = {k: f.coding.unpack(f.coding.pack(f.data), f.data.shape) for k, f in fields.items()}
    return part.decode(arrays, w.shape, w.dtype)


def name_of(edge: Edge) -> str:
    return str(edge.part)


@pytest.mark.parametrize("edge", EDGES, ids=name_of)
def test_edges(edge: Edge) -> None:
    """Finite, feasible, stored bit for bit, exact where w is representable, and never worse than a
    representable constant.
    """
    half = 0.5 if edge.mu is None else edge.mu / 2
    for message, w, h in problems():
        state = solved(edge, w, h)
        delta = edge.part.reconstruct(state)
        expect_same(edge.part.reconstruct(stored(edge.part, state, w)), delta, message)
        reached = edge.part.objective(w, state, edge.mu, h)
        rounding = 1e-12 * half * squared_error(w, torch.zeros_like(w), h)  # (8 eps)² of float32
        if edge.full or (edge.uniform and bool((w == w[0, 0]).all())):
            assert reached <= rounding, message
        for level in edge.levels:
            error = half * squared_error(w, torch.full_like(w, level), h)
            assert reached <= error * (1 + 1e-6) + rounding, (message, level)


@pytest.mark.parametrize("edge", [e for e in EDGES if e.scales], ids=name_of)
def test_size_is_immaterial(edge: Edge) -> None:
    """Weights of about 1e30 and 1e-30 have the errors of ordinary ones, with importance too."""
    w = draw()
    for h in (None, draw(1).square()):
        expected, energy = value(edge, w, h), squared_error(w, torch.zeros_like(w), h)
        for factor in (HUGE, 1 / HUGE):
            found = value(edge, w * factor, h) / factor**2
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-12 * energy)


@pytest.mark.parametrize("edge", EDGES, ids=name_of)
def test_importance_is_relative(edge: Edge) -> None:
    """Importance of about 1e30 and 1e-30 leads to the same Δ; a price counts against μ h."""
    w, h = draw(), draw(1).square()
    delta = edge.part.reconstruct(solved(edge, w, h))
    for factor in (HUGE, 1 / HUGE):
        state = solved(edge, w, h * factor, None if edge.mu is None else edge.mu / factor)
        torch.testing.assert_close(edge.part.reconstruct(state), delta)


@pytest.mark.parametrize("edge", [e for e in EDGES if e.part.exact_weighted], ids=name_of)
def test_what_does_not_count_does_not_matter(edge: Edge) -> None:
    """Rows, columns and all weights but one without importance: outliers there change nothing."""
    w, outliers = draw(), 1e4 * draw(2)
    for name, h in importances(w.shape):
        if h is not None and not bool(h.all()):
            energy = squared_error(w, torch.zeros_like(w), h)
            found = value(edge, torch.where(h > 0, w, outliers), h)
            assert found == pytest.approx(value(edge, w, h), rel=1e-5, abs=1e-12 * energy), name


@pytest.mark.parametrize("part", [Binary(), KMeans(1)], ids=str)
def test_an_outlier_of_little_importance_does_not_blur_the_mean(part: Part[Any]) -> None:
    w = torch.tensor([-1e30, -1.25, -1.5])
    h = torch.tensor([1e-25, 1e30, 1e30])
    delta = part.reconstruct(part.project(w, importance=h))
    assert delta.tolist() == [-1.375] * 3


def test_prices_are_counted_in_double() -> None:
    """A correction costs 1 + 5e-8, 1 in float32, and saves 1 + 2e-8."""
    w = torch.tensor([0.0, (2 * (1 + 2e-8)) ** 0.5], dtype=torch.float64)
    part = Binary() + SparsePenalty(1 + 5e-8)
    for h in (None, torch.ones(2)):
        _, corrections = part.project(w, mu=2.0, importance=h)
        assert corrections.positions.numel() == 0


@pytest.mark.parametrize("power", [-1000, 1000])
def test_squared_importance_does_not_overflow(power: int) -> None:
    part, w, h = GroupL2Penalty(0.3, axis=0), draw(), draw(1).square().double()
    deltas = [
        part.reconstruct(part.project(w, mu=0.5 * 2.0**-p, importance=h * 2.0**p))
        for p in (0, power)
    ]
    assert 0 < int((deltas[0] != 0).sum())
    assert torch.equal(*deltas)


@pytest.mark.parametrize("count", [1, 2, 11, 23])
def test_a_device_selects_what_the_host_does(count: int) -> None:
    """Of tied weights the first, by two ways of finding them."""
    for name, w in weights():
        if w.numel() == SIZE:
            flat = w.abs().reshape(-1)
            assert torch.equal(_top_on_device(flat, count), _top_on_host(flat, count)), name


# ------------------------------------------------------------------ more than float32 can count

LARGE = 2**24 + 5
ODD = 5  # so many weights, the last ones, are three times as large as the others


@pytest.fixture(scope="module")
def many() -> Tensor:
    """±1 in turn; Σ |w| in float32, or a count, would stop at 2^24."""
    w = torch.ones(LARGE)
    w[::2] = -1
    w[-ODD:] *= 3
    return w


def scaled_error(count: int, outliers: int) -> tuple[float, float]:
    """The mean of `count` ones and some threes, and ½ Σ (u − mean)² over them."""
    mean = (count + 3 * outliers) / (count + outliers)
    return mean, (count * (1 - mean) ** 2 + outliers * (3 - mean) ** 2) / 2


@pytest.mark.parametrize(
    "part",
    [Binary(), Ternary(), Int(2), ScaledCodebook((-1, 0, 1))],
    ids=str,
)
def test_one_scale_of_more_weights_than_float32_counts(part: Part[Any], many: Tensor) -> None:
    state = part.project(many)
    mean, error = scaled_error(LARGE - ODD, ODD)
    assert state.scale.item() == pytest.approx(mean, rel=6e-8)  # float32 would stop at 1
    assert part.objective(many, state) == pytest.approx(error, rel=1e-6)


def test_a_scale_and_corrections_of_more_weights_than_float32_counts(many: Tensor) -> None:
    part = Binary() + Sparse(nonzeros=3)
    signs, sparse = state = part.project(many)
    mean, error = scaled_error(LARGE - ODD, ODD - 3)
    assert signs.scale.item() == pytest.approx(mean, rel=6e-8)
    assert sparse.positions.tolist() == [LARGE - 5, LARGE - 4, LARGE - 3]
    assert part.objective(many, state) == pytest.approx(error, rel=1e-6)


def test_budgets_and_prices_of_more_weights_than_float32_counts(many: Tensor) -> None:
    """Positions and counts beyond 2^24 are whole numbers, stored ones too."""
    fewer = Sparse(nonzeros=LARGE - 2)
    state = fewer.project(many)
    dropped = set(range(LARGE - 9, LARGE)) - set(state.positions[-9:].tolist())
    assert state.positions.numel() == LARGE - 2
    assert dropped == {LARGE - 7, LARGE - 6}  # of the ones, the last
    few = Sparse(nonzeros=ODD)
    read = stored(few, few.project(many), many)
    assert read.positions.tolist() == list(range(LARGE - ODD, LARGE))
    assert read.values.tolist() == many[-ODD:].tolist()
    priced = SparsePenalty(0.125)
    assert priced.objective(many, priced.project(many, mu=1.0), 1.0) == LARGE / 8
    soft = L1Penalty(1.0)
    assert soft.objective(many, soft.project(many, mu=1.0), 1.0) == LARGE / 2 + 2 * ODD
    pairs = NM(1, 2)
    kept = pairs.project(many)
    assert kept.positions.numel() == LARGE // 2 + 1 and pairs.admits(kept)
    fixed = FixedCodebook((-1, 0, 1))
    assert fixed.objective(many, fixed.project(many)) == 2 * ODD


def test_matrices_of_more_weights_than_float32_counts(many: Tensor) -> None:
    w = many.view(3, -1)  # rows of +1 −1 … and of −1 +1 …: of rank 1 but for the last weights
    error = torch.linalg.eigvalsh(w.double() @ w.double().T)[:-1].sum() / 2
    part = LowRank(1)
    assert part.objective(w, part.project(w)) == pytest.approx(float(error), rel=1e-6)
    block = BlockSparse(blocks=1, axis=0)
    row = block.project(w)
    assert row.positions.tolist()[:1] == [2 * w.shape[1]] and block.admits(row)
    whole = BlockSparse(blocks=1, axis=0).project(many.view(1, -1))
    assert whole.positions.numel() == LARGE and block.admits(whole)
