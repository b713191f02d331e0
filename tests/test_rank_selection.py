"""Rank selection: the threshold on the spectrum, costs, schemes, the smallest μ, importance."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from lc_compress import LC
from lc_compress.low_rank import LowRank
from lc_compress.part import squared_error
from lc_compress.rank_selection import RankSelection, RankSelectionState
from lc_compress.views import KernelMatrix, Matrix

DOUBLE = torch.float64
BOTH = (Matrix(), KernelMatrix())


def odd_ranks_are_free(rank: int, rows: int, columns: int) -> float:
    return rank // 2 * (rows + columns)


def best(part: RankSelection, w: Tensor, mu: float, importance: Tensor | None = None) -> float:
    """The least objective over all schemes and ranks, each solved as a plain low-rank part."""
    values = []
    for view in part.schemes:
        m, n = view.shape(w.shape)
        for rank in range(min(m, n) + 1):
            plain = LowRank(rank).over(view)
            state = plain.solve(w, None, None, importance)
            error = plain.objective(w, state, mu, importance)
            values.append(error + part.price(rank, m, n))
    return min(values)


@pytest.mark.parametrize("shape", [(7, 9), (9, 7), (1, 5), (80, 90)])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
def test_kept_are_the_singular_values_above_a_threshold(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    w = torch.randn(shape, generator=generator, dtype=dtype)
    s = torch.linalg.svdvals(w.double())
    for mu in (0.1, 1.0, 10.0):
        for alpha in (0.0, 0.01, 0.1, 1.0):
            part = RankSelection(alpha)
            state = part.project(w, mu=mu)
            expected = int((s**2 > 2 * alpha * sum(shape) / mu).sum())
            assert state.rank == expected
            assert part.penalty(state) == pytest.approx(alpha * expected * sum(shape))
            plain = LowRank(expected)
            delta = plain.reconstruct(plain.project(w))
            torch.testing.assert_close(part.reconstruct(state), delta, rtol=1e-4, atol=1e-4)


def test_any_cost_is_minimised(generator: torch.Generator) -> None:
    for cost in ("storage", "flops", odd_ranks_are_free):
        for schemes in ((Matrix(),), (KernelMatrix(),), BOTH, BOTH[::-1], (Matrix(2), Matrix())):
            part = RankSelection(0.05, cost, schemes)
            for mu in (0.3, 1.0, 4.0):
                w = torch.randn(4, 3, 2, 2, generator=generator, dtype=DOUBLE)
                found = part.objective(w, part.project(w, mu=mu), mu)
                assert found == pytest.approx(best(part, w, mu), rel=1e-9)


def test_positions_multiply_the_price_of_operations(generator: torch.Generator) -> None:
    w = torch.randn(6, 4, 3, 3, generator=generator)
    many = RankSelection(0.001, "flops", positions=49)
    once = RankSelection(0.049)
    a, b = many.project(w, mu=1.0), once.project(w, mu=1.0)
    assert a.rank == b.rank > 0
    assert many.penalty(a) == pytest.approx(once.penalty(b))
    assert many.ops(a, 49).mults == a.rank * (6 + 36) * 49


def test_the_shape_that_suits_the_weights_is_taken(generator: torch.Generator) -> None:
    shape = torch.Size((8, 6, 3, 3))
    for truth, view in enumerate(BOTH):
        m, n = view.shape(shape)
        left = torch.randn(m, 2, generator=generator)
        w = view.restore(left @ torch.randn(2, n, generator=generator), shape)
        w = w + 0.01 * torch.randn(shape, generator=generator)
        for schemes in (BOTH, BOTH[::-1]):
            part = RankSelection(0.1, schemes=schemes)
            state = part.project(w, mu=1.0)
            assert schemes[state.scheme] == view and state.rank == 2
            assert squared_error(w, part.reconstruct(state)) < 1e-3 * float(w.square().sum())
            only = RankSelection(0.1, schemes=(BOTH[1 - truth],))
            other = only.objective(w, only.project(w, mu=1.0), 1.0)
            assert part.objective(w, state, 1.0) < other


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16], ids=str)
def test_smallest_mu_is_where_the_rank_leaves_zero(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    for scale in (1.0, 1e-6, 1e9):
        w = (scale * torch.randn(5, 3, 2, 3, generator=generator)).to(dtype)
        top = float(torch.linalg.svdvals(w.double().flatten(1))[0])
        parts = [
            RankSelection(0.02),
            RankSelection(0.02, "flops", positions=9),
            RankSelection(0.02, schemes=BOTH),
            RankSelection(0.02, odd_ranks_are_free),
            RankSelection(0.0),
        ]
        for part in parts:
            least = part.smallest_mu(w)
            if least > 0:
                assert part.project(w, mu=least * (1 - 1e-6)).rank == 0
            assert part.project(w, mu=max(least, 1e-12) * (1 + 1e-6)).rank >= 1
        assert parts[0].smallest_mu(w) == pytest.approx(2 * 0.02 * (5 + 18) / top**2)
        assert parts[1].smallest_mu(w) == pytest.approx(2 * 0.02 * (5 + 18) * 9 / top**2)
    assert RankSelection(0.1).smallest_mu(torch.zeros(3, 4)) == math.inf
    with pytest.raises(ValueError, match="NaN"):
        RankSelection(0.1).smallest_mu(torch.full((2, 2), math.nan))


def test_edges() -> None:
    zeros = torch.zeros(3, 4)
    for w in (zeros, torch.ones(3, 4), torch.ones(1, 1)):
        for importance in (None, torch.zeros(1, 1)):
            for alpha in (0.1, 1e30):
                part = RankSelection(alpha)
                state = part.project(w, mu=1e-3, importance=importance)
                assert state.rank == 0 and not part.reconstruct(state).any()
                assert part.penalty(state) == 0 and part.ops(state).mults == 0
    for scale in (1e30, 1e-30):
        w = scale * torch.randn(70, 80, generator=torch.Generator().manual_seed(0))
        assert RankSelection(1.0).project(w, mu=1.0).rank == (70 if scale > 1 else 0)
        state = RankSelection(1e-9).project(w, mu=1e60)
        assert bool(RankSelection(1e-9).reconstruct(state).isfinite().all())
    wide = torch.full((2, 3), 1e200, dtype=DOUBLE)
    assert RankSelection(1.0).project(wide, mu=1.0).rank in (1, 2)
    assert RankSelection(1.0).project(1e-200 * wide / 1e200, mu=1.0).rank == 0
    ones = torch.ones(2, 3, dtype=DOUBLE)
    assert RankSelection(1.0).project(ones * 1e-200, mu=1.0, importance=ones).rank == 0


# ------------------------------------------------------------------ importance


def test_importance_by_rows_and_columns_is_exact(generator: torch.Generator) -> None:
    for shape in ((5, 4), (4, 7)):
        w = torch.randn(shape, generator=generator, dtype=DOUBLE)
        rows = torch.rand(shape[0], 1, generator=generator, dtype=DOUBLE)
        columns = torch.rand(shape[1], generator=generator, dtype=DOUBLE)
        for h in (rows, columns, rows * columns):
            for mu in (0.5, 2.0, 8.0):
                part = RankSelection(0.05)
                found = part.objective(w, part.project(w, mu=mu, importance=h), mu, h)
                assert found == pytest.approx(best(part, w, mu, h), rel=1e-9)


def test_general_importance_never_rises_from_a_warm_start(generator: torch.Generator) -> None:
    part = RankSelection(0.03, schemes=BOTH)
    w = torch.randn(4, 2, 2, 2, generator=generator, dtype=DOUBLE)
    h = torch.randn(w.shape, generator=generator, dtype=DOUBLE).exp()
    ranks = set()
    for mu in (0.05, 0.5, 8.0):
        plain = part.objective(w, part.project(w, mu=mu * float(h.mean())), mu, h)
        state = part.project(w, mu=mu, importance=h)
        ranks.add(state.rank)
        found = part.objective(w, state, mu, h)
        assert found <= plain * (1 + 1e-9)
        assert found <= best(part, w, mu, h) * 1.05  # every rank, each by its own descent
        for _ in range(3):
            state = part.solve(w, state, mu, h)  # not `project`, which would hide a rise
            now = part.objective(w, state, mu, h)
            assert now <= found * (1 + 1e-9)
            found = now
    assert len(ranks) > 1


# ------------------------------------------------------------------ the rest


def test_what_is_stored_rebuilds_the_state(dtype: torch.dtype, generator: torch.Generator) -> None:
    w = torch.randn(6, 4, 3, 3, generator=generator).to(dtype)
    for schemes, value_dtype in ((BOTH, None), ((KernelMatrix(),), torch.float16)):
        part = RankSelection(0.01, schemes=schemes, value_dtype=value_dtype)
        for mu in (1e-6, 1.0):
            state = part.project(w, mu=mu)
            fields = part.encode(state)
            arrays = {
                name: field.coding.unpack(field.coding.pack(field.data), field.data.shape)
                for name, field in fields.items()
            }
            again = part.decode(arrays, w.shape, dtype)
            assert torch.equal(part.reconstruct(again), part.reconstruct(state))
            assert (again.rank, again.scheme) == (state.rank, state.scheme)
            m, n = schemes[state.scheme].shape(w.shape)
            floats = state.rank * (m + n) * 8 * (value_dtype or dtype).itemsize
            assert part.bits(state) == floats + (len(schemes) - 1) + min(m, n).bit_length()
            shapes = {"left": state.left.shape, "right": state.right.shape}
            assert part.free_shapes(w.shape, arrays) == shapes
            assert part.admits(state) and part.exact == (value_dtype is None)
        assert state.rank > 0


def test_a_run_learns_ranks_and_resumes() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.Flatten(), torch.nn.Linear(6, 4))
    part = RankSelection(1e-3, schemes=(Matrix(),))
    mu = [part.smallest_mu(layer.weight) for layer in (model[0], model[2])]
    schedule = (0.5 * min(mu), 2 * max(mu), 40 * max(mu))
    lc = LC(model, {"*.weight": part}, schedule=schedule)
    ranks = []
    for _ in lc.steps(progress=False):
        ranks.append([task.state.rank for task in lc.tasks])
    ranks.append([task.state.rank for task in lc.tasks])
    assert ranks[0] == [0, 0] and min(ranks[-1]) >= 1
    saved = lc.state_dict()
    other = LC(copy.deepcopy(model), {"*.weight": part}, schedule=schedule)
    other.load_state_dict(saved)
    for one, two in zip(lc.tasks, other.tasks, strict=True):
        assert one.state.rank == two.state.rank
        assert all(torch.equal(a, b) for a, b in zip(one.delta, two.delta, strict=True))


def test_a_part_is_a_value() -> None:
    part = RankSelection(0.1, odd_ranks_are_free, BOTH)
    assert pickle.loads(pickle.dumps(part)) == part and hash(part) == hash(
        pickle.loads(pickle.dumps(part))
    )
    assert "cost=odd_ranks_are_free" in str(part) and "0x" not in str(part)
    assert RankSelection(0.1, schemes=[Matrix()]) == RankSelection(0.1)  # type: ignore[arg-type]
    assert str(RankSelection(0.1)) == "RankSelection(alpha=0.1)"


def test_the_factors_can_be_trained(generator: torch.Generator) -> None:
    part = RankSelection(0.01, schemes=(KernelMatrix(),))
    state = part.project(torch.randn(4, 3, 2, 2, generator=generator), mu=1.0)
    values = {name: value.clone().requires_grad_() for name, value in part.tunable(state).items()}
    assert set(values) == {"left", "right"}
    trained = part.with_tunable(state, values)
    assert isinstance(trained, RankSelectionState) and trained.rank == state.rank
    part.reconstruct(trained).sum().backward()
    grad = values["left"].grad
    assert grad is not None
    torch.testing.assert_close(grad, state.right.sum(1).expand_as(state.left))


def nothing_is_known(rank: int, rows: int, columns: int) -> float:
    return math.nan


def test_errors_say_what_to_do() -> None:
    w = torch.ones(2, 3)
    with pytest.raises(ValueError, match="needs `mu`"):
        RankSelection(0.1).project(w)
    with pytest.raises(ValueError, match="alpha must be finite and >= 0"):
        RankSelection(-1.0)
    with pytest.raises(ValueError, match="'storage', 'flops' or a function, got 'bits'"):
        RankSelection(0.1, "bits")
    with pytest.raises(ValueError, match="schemes must be views"):
        RankSelection(0.1, schemes=())
    with pytest.raises(ValueError, match="positions"):
        RankSelection(0.1, positions=4)
    with pytest.raises(ValueError, match="positions"):
        RankSelection(0.1, "flops", positions=0)
    with pytest.raises(ValueError, match="value_dtype"):
        RankSelection(0.1, value_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"cost of \(0, 2, 3\) is nan"):
        RankSelection(0.1, nothing_is_known).project(w, mu=1.0)
    with pytest.raises(ValueError, match=r"KernelMatrix.*Use Matrix\(\)"):
        RankSelection(0.1, schemes=BOTH).project(w, mu=1.0)
