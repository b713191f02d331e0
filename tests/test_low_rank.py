"""Low rank: the spectrum's tail, importance by rows and columns and in general, storage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lc_compress import low_rank
from lc_compress.low_rank import LowRank, LowRankState
from lc_compress.part import Part, squared_error
from lc_compress.views import KernelMatrix, Matrix

DOUBLE = torch.float64


def error(
    part: Part[LowRankState],
    w: Tensor,
    importance: Tensor | None = None,
    warm: LowRankState | None = None,
) -> float:
    state = part.solve(w, warm, None, importance)
    return squared_error(w, part.reconstruct(state), importance)


def alternating(w: Tensor, h: Tensor, rank: int, start: Tensor, sweeps: int) -> float:
    """The error after alternating weighted least squares from a right factor (rank, n)."""
    right, eye = start, 1e-13 * torch.eye(rank, dtype=DOUBLE)
    for _ in range(sweeps):
        for side in range(2):
            weights, target = (h, w) if side == 0 else (h.T, w.T)
            gram = torch.einsum("rj,ij,sj->irs", right, weights, right) + eye
            known = torch.einsum("rj,ij,ij->ir", right, weights, target)
            left = torch.linalg.solve(gram, known)  # (rows of this side, rank)
            right, product = left.T, left @ right
    return squared_error(w, product.T, h)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 7), (6, 6), (40, 12)])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
def test_the_error_is_the_tail_of_the_spectrum(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    w = torch.randn(shape, generator=generator, dtype=dtype)
    s = torch.linalg.svdvals(w.double())
    rounding = 16 * torch.finfo(dtype).eps * float(s[0])
    for rank in range(min(shape) + 2):
        state = LowRank(rank).project(w)
        r = min(rank, *shape)
        assert state.left.shape == (shape[0], r) and state.right.shape == (r, shape[1])
        assert state.rank == r
        tail = float(s[rank:].square().sum())
        assert error(LowRank(rank), w) == pytest.approx(tail, rel=1e-5, abs=rounding**2)


def test_steep_spectra_keep_their_digits(generator: torch.Generator) -> None:
    u = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=DOUBLE))[0]
    v = torch.linalg.qr(torch.randn(12, 8, generator=generator, dtype=DOUBLE))[0]
    s = 10.0 ** -torch.arange(0, 16, 2, dtype=DOUBLE)
    w = u * s @ v.T
    for rank in range(1, 7):
        tail = float(s[rank:].square().sum())
        assert error(LowRank(rank), w) == pytest.approx(tail, rel=1e-2, abs=0)


SPECTRA = {
    "flat": torch.ones(96),
    "linear": torch.linspace(1, 0.5, 96),
    "pairs": torch.linspace(1, 0.5, 48).repeat_interleave(2),
    "two levels": torch.tensor([1.0] * 8 + [0.999999] * 88),
    "one large": torch.tensor([1e4] + [1.0] * 95),
    "one huge": torch.tensor([1e9] + [1.0] * 95),
    "slow decay": 0.98 ** torch.arange(96),
    "decay": 0.8 ** torch.arange(96),
    "fast decay": 0.5 ** torch.arange(96),
    "to 1e-12": 10 ** (-12 * torch.arange(96) / 95),
    "cliff": torch.tensor([1.0] * 24 + [1e-5] * 72),
    "rank 8": torch.tensor([1.0] * 8 + [0.0] * 88),
    "zero": torch.zeros(96),
}


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_any_spectrum_is_cut_at_its_tail(
    name: str, dtype: torch.dtype, scale: float, generator: torch.Generator
) -> None:
    """Large enough for the float32 Gram matrix, whose digits some spectra need more of."""
    u = torch.linalg.qr(torch.randn(96, 96, generator=generator, dtype=DOUBLE))[0]
    v = torch.linalg.qr(torch.randn(130, 96, generator=generator, dtype=DOUBLE))[0]
    w = (u * SPECTRA[name].double() @ v.T * scale).to(dtype)
    s = torch.linalg.svdvals(w.double())
    for matrix in (w, w.T.contiguous(), w.T):
        for rank in (1, 8, 24, 25, 95, 96):
            state = LowRank(rank).solve(matrix, None, None, None)
            delta = state.left.double() @ state.right.double()
            rounding = (16 * torch.finfo(dtype).eps) ** 2 * float(s.square().sum())
            tail = float(s[rank:].square().sum())
            assert squared_error(matrix, delta) <= tail * (1 + 1e-6) + rounding


def test_golden_values_of_a_large_layer() -> None:
    """From the timings of the older toolkit (papers/learning-compression.md, section 8)."""
    w = torch.from_numpy(
        np.random.default_rng(0).normal(0, 0.05, (512, 512, 3, 3)).astype(np.float32)
    )
    for view, golden in ((Matrix(), 5287.967717), (KernelMatrix(), 5442.582215)):
        assert error(LowRank(32), view.show(w)) == pytest.approx(golden, rel=1e-8)


def test_ordinary_weights_never_need_the_decomposition_itself(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise AssertionError("a full singular value decomposition")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    for dtype in (torch.bfloat16, torch.float32, DOUBLE):
        for shape in ((16, 27), (64, 80), (100, 70), (300, 90)):
            w = torch.randn(shape, generator=generator).to(dtype)
            for rank in (0, 1, 8, min(shape) // 2, min(shape)):
                LowRank(rank).project(w)


def test_inverse_iteration_that_fails_is_replaced(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise low_rank.LinAlgError("3 eigenvectors failed to converge")

    w = torch.randn(80, 90, generator=generator)
    expected = error(LowRank(4), w)
    monkeypatch.setattr(low_rank, "eigh", fails)
    assert error(LowRank(4), w) == pytest.approx(expected, rel=1e-9)


def test_autocast_does_not_cost_digits(generator: torch.Generator) -> None:
    w = torch.randn(80, 90, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = LowRank(4).project(w)
    assert state.left.dtype == torch.float32
    tail = float(torch.linalg.svdvals(w.double())[4:].square().sum())
    assert squared_error(w, LowRank(4).reconstruct(state)) == pytest.approx(tail, rel=1e-6)


def test_two_shapes_represent_more_than_one(generator: torch.Generator) -> None:
    """Sums of differently reshaped low-rank parts, at the same total rank."""
    shape = torch.Size((12, 10, 3, 3))
    w = torch.zeros(shape, dtype=DOUBLE)
    for view in (Matrix(), KernelMatrix()):
        m, n = view.shape(shape)
        left = torch.randn(m, 2, generator=generator, dtype=DOUBLE)
        right = torch.randn(2, n, generator=generator, dtype=DOUBLE)
        w += view.restore(left @ right, shape)
    both = LowRank(2).over(Matrix()) + LowRank(2).over(KernelMatrix())
    found = squared_error(w, both.reconstruct(both.project(w)))
    for view in (Matrix(), KernelMatrix()):
        alone = LowRank(4).over(view)
        assert found < 1e-2 * squared_error(w, alone.reconstruct(alone.project(w)))


def test_factors_are_canonical(generator: torch.Generator) -> None:
    w = torch.randn(9, 5, generator=generator)
    for matrix in (w, w.T.contiguous(), w.double()):
        for importance in (None, torch.rand(matrix.shape[1], generator=generator)):
            state = LowRank(3).project(matrix, importance=importance)
            peaks = state.left.gather(0, state.left.abs().argmax(0, keepdim=True))
            assert bool((peaks > 0).all())
            torch.testing.assert_close(state.left.norm(dim=0), state.right.norm(dim=1))
    gram = LowRank(3).project(w).left
    gram = gram.T @ gram
    torch.testing.assert_close(gram, gram.diagonal().diag())
    assert bool((gram.diagonal().diff() < 0).all())  # the leading terms first


def test_zero_weights_and_rank_zero() -> None:
    zeros = torch.zeros(3, 4)
    for w, rank in ((zeros, 2), (zeros, 0), (torch.ones(3, 4), 0)):
        for importance in (None, torch.ones(3, 1), torch.rand(3, 4), torch.zeros(4)):
            state = LowRank(rank).project(w, importance=importance)
            assert torch.equal(LowRank(rank).reconstruct(state), zeros)
    state = LowRank(0).project(zeros)
    assert LowRank(0).bits(state) == 0
    ops = LowRank(0).ops(state)
    assert (ops.mults, ops.adds) == (0, 0)


@pytest.mark.parametrize(("dtype", "powers"), [(torch.float32, (-60, 100)), (DOUBLE, (-900, 900))])
def test_scale_is_immaterial(
    dtype: torch.dtype, powers: tuple[int, int], generator: torch.Generator
) -> None:
    w = torch.randn(6, 4, generator=generator, dtype=dtype)
    h = torch.rand(6, 4, generator=generator, dtype=DOUBLE)
    for importance in (None, h[:1], h):
        one = LowRank(2).reconstruct(LowRank(2).project(w, importance=importance))
        for power in powers:
            scaled = None if importance is None else importance * 2.0**power
            other = LowRank(2).project(w * 2.0**power, importance=scaled)
            delta = LowRank(2).reconstruct(other)
            torch.testing.assert_close(delta, one * 2.0**power, rtol=1e-5, atol=0)


def test_dtypes(dtype: torch.dtype, generator: torch.Generator) -> None:
    w = torch.randn(12, 8, generator=generator).to(dtype)
    state = LowRank(3).project(w)
    delta = LowRank(3).reconstruct(state)
    assert (state.left.dtype, state.right.dtype, delta.dtype) == (dtype, dtype, dtype)
    tail = float(torch.linalg.svdvals(w.double())[3:].square().sum())
    assert squared_error(w, delta) <= tail * (1 + 8 * torch.finfo(dtype).eps)
    # the product of rounded factors may be just beyond the largest half-precision number
    half = dtype.itemsize == 2
    limit = torch.finfo(dtype).max * (1.0 if half else 0.5)
    for _ in range(20):
        signs = torch.randn(9, 1, generator=generator, dtype=DOUBLE).sign()
        sizes = 1 - 0.01 * torch.rand(7, generator=generator, dtype=DOUBLE)
        w = (signs * sizes * limit).to(dtype)
        assert bool(LowRank(1).reconstruct(LowRank(1).project(w)).isfinite().all())


# ------------------------------------------------------------------ importance


def test_importance_by_rows_and_columns_is_exact(generator: torch.Generator) -> None:
    for shape in ((5, 4), (4, 7)):
        w = torch.randn(shape, generator=generator, dtype=DOUBLE)
        rows = torch.rand(shape[0], 1, generator=generator, dtype=DOUBLE)
        columns = torch.randn(shape[1], generator=generator, dtype=DOUBLE).exp()
        for h in (rows, columns, rows * columns, torch.full((1, 1), 3.0, dtype=DOUBLE)):
            for rank in (1, 2):
                found = error(LowRank(rank), w, h)
                scaled = h.expand(shape).sqrt() * w
                tail = float(torch.linalg.svdvals(scaled)[rank:].square().sum())
                assert found == pytest.approx(tail, rel=1e-9)
                for _ in range(5):
                    start = torch.randn(rank, shape[1], generator=generator, dtype=DOUBLE)
                    assert alternating(w, h.expand(shape), rank, start, 15) >= found * (1 - 1e-9)


def test_rows_and_columns_without_importance(generator: torch.Generator) -> None:
    w = torch.randn(6, 5, generator=generator, dtype=DOUBLE)
    rows = torch.tensor([1.0, 0.0, 2.0, 3.0, 0.5, 1.0], dtype=DOUBLE)[:, None]
    columns = torch.tensor([1.0, 1.0, 0.0, 4.0, 2.0], dtype=DOUBLE)
    delta = LowRank(2).reconstruct(LowRank(2).project(w, importance=rows * columns))
    assert not delta[1].any() and not delta[:, 2].any() and bool(delta.isfinite().all())
    tail = torch.linalg.svdvals((rows * columns).sqrt() * w)[2:].square().sum()
    assert squared_error(w, delta, rows * columns) == pytest.approx(float(tail), rel=1e-9)


def test_rounded_products_still_count_as_products(generator: torch.Generator) -> None:
    w = torch.randn(8, 6, generator=generator)
    h = torch.rand(8, 1, generator=generator) * torch.rand(6, generator=generator)
    tail = torch.linalg.svdvals(h.double().sqrt() * w.double())[2:].square().sum()
    assert error(LowRank(2), w, h) == pytest.approx(float(tail), rel=1e-5)


def test_general_importance_descends_to_a_stationary_point(generator: torch.Generator) -> None:
    for rank in (1, 2):
        for _ in range(6):
            w = torch.randn(7, 5, generator=generator, dtype=DOUBLE)
            h = torch.rand(7, 5, generator=generator, dtype=DOUBLE)
            part = LowRank(rank)
            plain = part.reconstruct(part.project(w))
            state = part.project(w, importance=h)
            found = squared_error(w, part.reconstruct(state), h)
            assert found < squared_error(w, plain, h)
            # alternating least squares descends faster; from here it has next to nowhere to go
            assert found <= alternating(w, h, rank, state.right, 100) * (1 + 1e-3)


def test_general_importance_never_rises_from_a_warm_start(generator: torch.Generator) -> None:
    part = LowRank(2)
    w = torch.randn(7, 5, generator=generator, dtype=DOUBLE)
    h = (2 * torch.randn(7, 5, generator=generator, dtype=DOUBLE)).exp()
    h[h < 0.2] = 0
    plain = squared_error(w, part.reconstruct(part.project(w)), h)
    for scale in (0.01, 0.3, 3.0):
        state = part.project(w, importance=h)
        for _ in range(5):
            warm = squared_error(w, part.reconstruct(state), h)
            state = part.solve(w, state, None, h)  # not `project`, which would hide a rise
            now = squared_error(w, part.reconstruct(state), h)
            assert now <= min(warm * (1 + 1e-12), plain)
        w = w + scale * torch.randn(7, 5, generator=generator, dtype=DOUBLE)
        plain = squared_error(w, part.reconstruct(part.project(w)), h)


def test_a_warm_start_is_used(generator: torch.Generator) -> None:
    w = torch.randn(9, 6, generator=generator, dtype=DOUBLE)
    h = (3 * torch.randn(9, 6, generator=generator, dtype=DOUBLE)).exp()
    best = LowRank(2).project(w, importance=h)
    for _ in range(20):  # each goes on where the last one stopped
        best = LowRank(2).project(w, best, importance=h)
    cold = error(LowRank(2), w, h)
    assert error(LowRank(2), w, h, warm=best) <= squared_error(
        w, LowRank(2).reconstruct(best), h
    ) * (1 + 1e-12)
    assert squared_error(w, LowRank(2).reconstruct(best), h) < cold
    # one of a higher rank only points the way
    wide = LowRank(4).project(w, importance=h)
    state = LowRank(2).solve(w, wide, None, h)
    assert state.left.shape == (9, 2)
    assert squared_error(w, LowRank(2).reconstruct(state), h) <= cold * 1.5


# ------------------------------------------------------------------ the rest


def test_missing_entries_are_filled(generator: torch.Generator) -> None:
    left = torch.randn(12, 1, generator=generator, dtype=DOUBLE)
    right = torch.randn(1, 10, generator=generator, dtype=DOUBLE)
    seen = (torch.rand(12, 10, generator=generator) < 0.8).double()
    state = LowRank(1).project(left @ right * seen, importance=seen)
    torch.testing.assert_close(LowRank(1).reconstruct(state), left @ right, rtol=1e-2, atol=1e-2)


def test_what_is_stored_rebuilds_the_state(dtype: torch.dtype, generator: torch.Generator) -> None:
    w = torch.randn(6, 9, generator=generator).to(dtype)
    for value_dtype in (None, torch.float16, torch.float32):
        part = LowRank(4, value_dtype=value_dtype)
        state = part.project(w)
        arrays = {
            name: field.coding.unpack(field.coding.pack(field.data), field.data.shape)
            for name, field in part.encode(state).items()
        }
        again = part.decode(arrays, w.shape, dtype)
        assert torch.equal(part.reconstruct(again), part.reconstruct(state))
        assert part.bits(state) == 4 * (6 + 9) * 8 * (value_dtype or dtype).itemsize
        assert part.exact == (value_dtype is None) and not part.exact_weighted
        shapes = {"left": state.left.shape, "right": state.right.shape}
        assert part.free_shapes(w.shape, {}) == shapes
        assert part.admits(state) and not LowRank(3).admits(state)
    wide = LowRank(4).project(w.double())
    assert not LowRank(4, value_dtype=torch.float16).admits(wide)


def test_the_factors_can_be_trained(generator: torch.Generator) -> None:
    part = LowRank(2)
    state = part.project(torch.randn(4, 3, generator=generator))
    values = {name: value.clone().requires_grad_() for name, value in part.tunable(state).items()}
    assert set(values) == {"left", "right"}
    part.reconstruct(part.with_tunable(state, values)).sum().backward()
    grad = values["left"].grad
    assert grad is not None
    torch.testing.assert_close(grad, state.right.sum(1).expand(4, 2))


def test_operations() -> None:
    part = LowRank(2)
    ops = part.ops(part.project(torch.ones(5, 7)), positions=3)
    assert (ops.mults, ops.adds) == (3 * 2 * (5 + 7), 3 * (2 * 6 + 5 * 1))


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="rank must be >= 0"):
        LowRank(-1)
    with pytest.raises(ValueError, match=r"matrices, got shape \(2, 3, 1, 1\).*over\(Matrix\(\)\)"):
        LowRank(1).project(torch.ones(2, 3, 1, 1))
    with pytest.raises(ValueError, match="value_dtype"):
        LowRank(1, value_dtype=torch.int8)
