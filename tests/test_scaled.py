"""Codebooks times a scale: solver against brute force and fine grids; the part; given scales."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from parts_under_test import brute, scaled
from torch import Tensor

from lc_compress import scaling as module
from lc_compress.binary import Binary, Ternary
from lc_compress.codebook import FixedCodebook
from lc_compress.part import Part, squared_error
from lc_compress.scaled import ScaledCodebook
from lc_compress.scaling import best_scales, best_scales_and_zeros

HALVES = (torch.float16, torch.bfloat16)
F64 = torch.float64


def error(rows: Tensor, h: Tensor | None, levels: Tensor, scales: Tensor) -> Tensor:
    """Σ h (w − a t)² of each row, with the nearest levels, in any order."""
    residual = (rows[..., None] - scales[:, None, None] * levels).abs().amin(-1)
    return (residual**2 * (1 if h is None else h)).sum(1)


def refined(rows: Tensor, h: Tensor | None, levels: Tensor, count: int = 3000) -> Tensor:
    """The least error of each row over a fine grid of scales of both signs, each then fitted."""
    largest = rows.abs().amax(1)
    steps = torch.logspace(-4, 1.5, count, dtype=F64)
    least = torch.full(largest.shape, math.inf, dtype=F64)
    weights = torch.ones_like(rows) if h is None else h
    for signed in (steps, -steps):
        for step in signed:
            a = largest * step / levels.abs().max()
            t = levels[(rows[..., None] / a[:, None, None] - levels).abs().argmin(-1)]
            b = (weights * t * t).sum(1)
            fitted = (weights * t * rows).sum(1) / b.clamp_min(1e-300)
            least = torch.minimum(least, error(rows, h, levels, fitted))
    return least


def total(part: Part[object], w: Tensor, h: Tensor | None = None) -> float:
    return squared_error(w, part.reconstruct(part.solve(w, None, None, h)), h)


# ------------------------------------------------------------------ the solver is exact

CODEBOOKS = {
    "none zero": (0.4, -1.3, 0.9),
    "positive": (0.2, 0.5, 1.7),
    "negative": (-0.3, -1.1),
    "symmetric": (-1.5, -1.0, 1.0, 1.5),
    "symmetric, zero": (-2.0, -1.0, 0.0, 1.0, 2.0),
    "lopsided": (-1.0, 0.0, 0.25, 0.5),
    "midpoint at zero": (-1.0, 1.0, 4.0),
    "one": (-0.7,),
    "zero": (0.0,),
}


@pytest.mark.parametrize("values", CODEBOOKS.values(), ids=CODEBOOKS.keys())
@pytest.mark.parametrize("weighted", [False, True])
def test_no_assignment_is_better(
    values: tuple[float, ...], weighted: bool, generator: torch.Generator
) -> None:
    levels = torch.tensor(sorted(values), dtype=F64)
    least = brute(scaled(*levels.tolist()), len(values))
    for n in (1, 2, 5):
        rows = torch.randn(8, n, generator=generator, dtype=F64)
        rows[2:4] = rows[2:4].round()
        rows[4] = rows[4].abs()
        rows[5] *= torch.exp(5 * torch.randn(n, generator=generator, dtype=F64))
        rows[6] = rows[6, 0]
        h = torch.rand(8, n, generator=generator, dtype=F64)
        h *= torch.rand(8, n, generator=generator) > 0.3
        h[7] *= 10.0 ** torch.randint(-12, 12, (n,), generator=generator)
        importance = h if weighted else None
        found = error(rows, importance, levels, best_scales(rows, importance, levels))
        for row, weights, value in zip(
            rows, h if weighted else torch.ones(8, n), found, strict=True
        ):
            expected = least(row, weights.double(), 2.0)
            slack = 1e-13 * float((weights * row**2).sum())
            assert expected is not None
            assert float(value) == pytest.approx(expected, rel=1e-9, abs=slack)


@pytest.mark.parametrize("weighted", [False, True])
def test_no_zero_point_is_better(weighted: bool, generator: torch.Generator) -> None:
    for top in (1, 3):
        rows = torch.randn(12, 5, generator=generator, dtype=F64)
        rows += torch.randn(12, 1, generator=generator, dtype=F64)
        rows[:3] = rows[:3].round()
        h = torch.rand(12, 5, generator=generator, dtype=F64)
        h *= torch.rand(12, 5, generator=generator) > 0.3
        importance = h if weighted else None
        scales, zeros = best_scales_and_zeros(rows, importance, top)
        assert bool((scales >= 0).all()) and set(zeros.tolist()) <= set(range(top + 1))
        for i in range(12):
            weights = h[i] if weighted else torch.ones(5, dtype=F64)
            choices = [range(-z, top - z + 1) for z in range(top + 1)]
            expected = min(brute(scaled(*c), top + 1)(rows[i], weights, 2.0) for c in choices)
            levels = torch.arange(top + 1, dtype=F64) - zeros[i]
            row = slice(i, i + 1)
            value = error(rows[row], None if importance is None else h[row], levels, scales[row])
            slack = 1e-13 * float((weights * rows[i] ** 2).sum())
            assert float(value) == pytest.approx(expected, rel=1e-9, abs=slack)


DRAWS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "gaussian": lambda g: torch.randn(4, 90, generator=g, dtype=F64),
    "shifted": lambda g: torch.randn(4, 90, generator=g, dtype=F64) + 0.8,
    "heavy": lambda g: torch.empty(4, 90, dtype=F64).cauchy_(generator=g).clamp(-500, 500),
    "tied": lambda g: torch.randint(-9, 10, (4, 90), generator=g).double(),
    "two scales": lambda g: (
        torch.randn(4, 90, generator=g, dtype=F64) * torch.tensor([1.0, 0.01]).repeat(45)
    ),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
@pytest.mark.parametrize("values", [range(-7, 8), (-1, -0.3, 0, 0.1, 0.5, 0.6), (1, 2, 4)])
def test_no_scale_of_a_fine_grid_is_better(
    draw: Callable[[torch.Generator], Tensor],
    values: tuple[float, ...],
    generator: torch.Generator,
) -> None:
    levels, rows = torch.tensor(list(values), dtype=F64), draw(generator)
    h = torch.rand(rows.shape, generator=generator, dtype=F64) ** 4
    for importance in (None, h):
        found = error(rows, importance, levels, best_scales(rows, importance, levels))
        assert bool((found <= refined(rows, importance, levels, 400) * (1 + 1e-9)).all())


def test_zero_points_beat_each_of_them(generator: torch.Generator) -> None:
    rows = torch.randn(6, 60, generator=generator, dtype=F64) + torch.arange(6)[:, None] / 3
    scales, zeros = best_scales_and_zeros(rows, None, 15)
    each = []
    for z in range(16):
        levels = torch.arange(-z, 16 - z, dtype=F64)
        each.append(error(rows, None, levels, best_scales(rows, None, levels)))
    least, which = torch.stack(each).min(0)
    found = torch.stack(each).gather(0, zeros[None])[0]  # best_scales may take a < 0, z = 15 − z
    torch.testing.assert_close(found, least, rtol=1e-9, atol=0)
    for i in range(6):
        levels = torch.arange(16, dtype=F64) - zeros[i]
        value = error(rows[i : i + 1], None, levels, scales[i : i + 1])
        torch.testing.assert_close(value[0], least[i], rtol=1e-9, atol=0)
    assert len(set(which.tolist())) > 2


@pytest.mark.parametrize("grid", [1, 3])
def test_the_first_grid_and_the_chunks_do_not_matter(
    grid: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.empty(9, 120, dtype=F64).cauchy_(generator=generator).clamp(-99, 99)
    levels = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0], dtype=F64)
    expected = error(rows, None, levels, best_scales(rows, None, levels))
    zeros = best_scales_and_zeros(rows, None, 7)
    monkeypatch.setattr(module, "_GRID", grid)
    monkeypatch.setattr(module, "_CHUNK", 30)
    found = error(rows, None, levels, best_scales(rows, None, levels))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(best_scales_and_zeros(rows, None, 7), zeros, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_rounding_and_searching_agree(
    weighted: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randn(5, 40, generator=generator, dtype=F64) ** 3
    h = torch.rand(5, 40, generator=generator, dtype=F64) if weighted else None
    levels = torch.arange(-31, 32, dtype=F64) / 4
    monkeypatch.setattr(module, "_FEW", 0)
    expected = error(rows, h, levels, best_scales(rows, h, levels))
    monkeypatch.setattr(module, "_FEW", 1000)
    found = error(rows, h, levels, best_scales(rows, h, levels))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_row_does_not_see_the_others(generator: torch.Generator) -> None:
    rows = torch.randn(5, 40, generator=generator, dtype=F64) * torch.logspace(-9, 9, 5)[:, None]
    rows[2] = 0
    levels = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=F64)
    together = best_scales(rows, None, levels)
    alone = torch.cat([best_scales(row[None], None, levels) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=0)
    assert together[2] == 0


def test_many_small_weights_do_not_blur_a_large_one() -> None:
    """The best scale stores the outlier alone: what the others add cancels to the last digit."""
    rows = torch.full((1, 20_001), -1e-7, dtype=F64)
    rows[0, ::2] = 1e-7
    rows[0, 77] = 3.0
    levels = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=F64)
    for scale in best_scales(rows, None, levels), best_scales_and_zeros(rows, None, 3)[0]:
        t = (3.0 / scale).round()
        assert float(scale * t) == pytest.approx(3.0, rel=1e-15)


def test_an_exact_fit_is_found() -> None:
    levels = torch.arange(-127, 128, dtype=F64)
    for scale in (0.3, 1e-5, 7e8):
        rows = scale * torch.arange(-100, 128, 3, dtype=F64)[None]
        found = best_scales(rows, None, levels)
        assert float(error(rows, None, levels, found)) <= 1e-28 * float((rows**2).sum())


@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30, 1e150, 1e-150, 1e-310])
def test_no_size_is_too_large_or_small(size: float, generator: torch.Generator) -> None:
    rows = torch.randn(3, 50, generator=generator, dtype=F64)
    h = torch.rand(3, 50, generator=generator, dtype=F64)
    levels = torch.tensor([-1.0, 0.0, 0.4, 1.0], dtype=F64)
    expected = best_scales(rows, h, levels)
    rtol = 1e-12 if size > 1e-300 else 1e-2  # subnormal numbers have few digits
    torch.testing.assert_close(
        best_scales(rows * size, h, levels), expected * size, rtol=rtol, atol=0
    )
    if size > 1e-300:
        scales = best_scales(rows, h * size, levels)
        torch.testing.assert_close(scales, expected, rtol=1e-12, atol=0)
        scales = best_scales(rows, h, levels * size)
        torch.testing.assert_close(scales, expected / size, rtol=1e-12, atol=0)


def test_weights_that_do_not_count_do_not_blur_the_others(generator: torch.Generator) -> None:
    rows = torch.randn(3, 30, generator=generator, dtype=F64)
    h = torch.rand(3, 30, generator=generator, dtype=F64)
    h[:, 4] = 0
    levels = torch.tensor([-1.0, 0.0, 0.4, 1.0], dtype=F64)
    expected = best_scales(rows, h, levels)
    for value in (0.0, 1e200, -1e300):
        rows[:, 4] = value
        torch.testing.assert_close(best_scales(rows, h, levels), expected, rtol=1e-12, atol=0)


# ------------------------------------------------------------------ the part


def test_two_and_three_values_are_binary_and_ternary(generator: torch.Generator) -> None:
    w = torch.randn(7, 30, generator=generator, dtype=F64)
    h = torch.rand(7, 30, generator=generator, dtype=F64)
    for importance in (None, h):
        for blocks in ({}, {"axis": 1}, {"group": 8}):
            for values, part in (((-1, 1), Binary(**blocks)), ((-1, 0, 1), Ternary(**blocks))):
                expected = total(part, w, importance)
                found = total(ScaledCodebook(values, **blocks), w, importance)
                assert found == pytest.approx(expected, rel=1e-12)


def test_only_ratios_of_values_matter(generator: torch.Generator) -> None:
    w = torch.randn(40, generator=generator, dtype=F64)
    small, large = ScaledCodebook((-1, 0.25, 0.5)), ScaledCodebook((2, 1, -4))
    assert large.values == (-4.0, 1.0, 2.0)
    torch.testing.assert_close(
        small.reconstruct(small.project(w)), large.reconstruct(large.project(w))
    )


def test_the_scale_may_be_negative() -> None:
    part = ScaledCodebook((0.0, 1.0, 3.0))
    w = torch.tensor([-2.0, -6.0, 0.0])
    state = part.project(w)
    assert state.scale.tolist() == [-2.0] and state.codes.tolist() == [1, 2, 0]
    assert torch.equal(part.reconstruct(state), w)
    both = part.project(torch.tensor([-2.0, -6.0, 1.0, 3.0]))
    assert part.reconstruct(both).tolist() == pytest.approx([-2, -6, 0, 0], rel=0.1)


def test_what_does_not_count_is_zero(dtype: torch.dtype) -> None:
    for values in ((-1.0, 0.5, 2.0), (1.0, 3.0), (0.0,)):
        part = ScaledCodebook(values, axis=0)
        w = torch.tensor([[1.0, -2.0], [0.0, 0.0], [3.0, 4.0]], dtype=dtype)
        state = part.project(w, importance=torch.tensor([[0.0], [1.0], [1.0]]))
        delta = part.reconstruct(state)
        assert delta.dtype == dtype and not bool(delta[:2].any())
        assert bool(delta[2].any()) == (values != (0.0,))


@pytest.mark.parametrize("value", [1e30, 1e-30, 3e38, 1e-44])
def test_extreme_weights(value: float) -> None:
    for values in ((-1, 0.5, 2), tuple(range(-127, 128))):
        part = ScaledCodebook(values)
        w = torch.tensor([value, -value, 0.0, value / 3])
        delta = part.reconstruct(part.project(w))
        assert bool(delta.isfinite().all())
        # (−1, 0.5, 2) misses a third of the energy, and subnormal scales are coarse
        assert float((delta / value - w / value).double().square().sum()) < (
            1.0 if value < 1e-40 else 0.6
        )


@pytest.mark.parametrize("n", [1, 70_000])
def test_equal_weights(n: int) -> None:
    part = ScaledCodebook((-1.0, 0.5, 3.0))
    for value in (0.7, -0.7, 0.0):
        w = torch.full((n,), value, dtype=F64)
        torch.testing.assert_close(part.reconstruct(part.project(w)), w)


def test_half_precision(generator: torch.Generator) -> None:
    w = torch.randn(400, generator=generator)
    part = ScaledCodebook((-1.0, -0.5, 0.0, 0.5, 1.0))
    for dtype in HALVES:
        rough = w.to(dtype)
        best = total(part, rough.double())
        assert total(part, rough) <= best * (1 + 20 * torch.finfo(dtype).eps)
        stored = ScaledCodebook(part.values, value_dtype=dtype)
        state = stored.project(w)
        assert torch.equal(state.scale.to(dtype).float(), state.scale)
        assert not stored.exact and not stored.admits(part.project(w))
        assert part.admits(state) and not ScaledCodebook((0.0, 1.0)).admits(state)
        assert not ScaledCodebook(part.values, axis=0).admits(state)


@pytest.mark.parametrize("count", [1, 2, 5, 16, 300])
def test_what_is_stored_rebuilds_the_state(count: int, generator: torch.Generator) -> None:
    w = torch.randn(6, 11, generator=generator)
    part = ScaledCodebook(tuple(torch.randn(count, generator=generator).tolist()), axis=1)
    state = part.project(w)
    assert part.bits(state) == 11 * 32 + 66 * math.ceil(math.log2(count))
    arrays = {
        name: field.coding.unpack(field.coding.pack(field.data), field.data.shape)
        for name, field in part.encode(state).items()
    }
    again = part.decode(arrays, w.shape, w.dtype)
    assert torch.equal(again.scale, state.scale) and torch.equal(again.codes, state.codes)
    assert part.free_shapes(w.shape, {}) == {"scale": state.scale.shape}
    with pytest.raises(ValueError, match=f"below {count}, found 999"):
        part.decode(arrays | {"codes": torch.tensor([999])}, w.shape, w.dtype)


def test_operations(generator: torch.Generator) -> None:
    part = ScaledCodebook((-1.0, 0.0, 2.0), group=5)
    ops = part.ops(part.project(torch.randn(3, 10, generator=generator)), positions=7)
    assert (ops.mults, ops.adds) == (7 * 4 * 6, 7 * 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": ()}, "at least one"),
        ({"values": (1.0, math.nan)}, "finite"),
        ({"values": (1.0,), "axis": 0, "group": 2}, "per axis or per group"),
        ({"values": (1.0,), "value_dtype": torch.int8}, "value_dtype"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaledCodebook(**arguments)


# ------------------------------------------------------------------ binary and ternary, given scale


def test_a_given_scale_is_a_fixed_codebook(
    dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    w = torch.randn(6, 20, generator=generator).to(device, dtype)
    h = torch.rand(6, 20, generator=generator).to(device)
    for part, levels in ((Binary(scale=0.6), (-0.6, 0.6)), (Ternary(scale=0.6), (-0.6, 0.0, 0.6))):
        fixed = FixedCodebook(levels)
        for importance in (None, h):
            state = part.project(w, importance=importance)
            delta = part.reconstruct(state)
            assert delta.dtype == dtype and delta.device == device
            assert torch.equal(delta, fixed.reconstruct(fixed.project(w)))
        assert part.free == () and part.tunable(state) == {} and part.free_shapes(w.shape, {}) == {}
        assert part.exact and part.exact_weighted


def test_a_given_scale_is_not_stored(generator: torch.Generator) -> None:
    w = torch.randn(5, 8, generator=generator)
    for part, bits in ((Binary(scale=0.25), 40), (Ternary(scale=0.25), 64)):
        state = part.project(w)
        fields = part.encode(state)
        assert len(fields) == 1 and part.bits(state) == bits
        again = part.decode({name: f.data for name, f in fields.items()}, w.shape, w.dtype)
        assert torch.equal(part.reconstruct(again), part.reconstruct(state))


def test_a_learned_scale_is_only_a_start_for_a_given_one() -> None:
    w = torch.tensor([3.0, -1.0, 2.0])
    for kind in (Binary, Ternary):
        learned, given = kind(), kind(scale=0.5)
        assert not given.admits(learned.project(w)) and learned.admits(given.project(w))
        assert given.project(w, learned.project(w)).scale.tolist() == [0.5]


def test_the_threshold_of_a_given_ternary_is_half_the_scale() -> None:
    w = torch.tensor([0.5, 0.50001, -0.5, -0.50001, 9.0])
    assert Ternary(scale=1.0).project(w).signs.tolist() == [0, 1, 0, -1, 1]


@pytest.mark.parametrize("kind", [Binary, Ternary])
@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_given_scale_is_checked(kind: type, scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        kind(scale=scale)


@pytest.mark.parametrize("kind", [Binary, Ternary])
@pytest.mark.parametrize("other", [{"axis": 0}, {"group": 4}, {"value_dtype": torch.float16}])
def test_a_given_scale_has_no_blocks(kind: type, other: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="do not apply"):
        kind(scale=1.0, **other)
