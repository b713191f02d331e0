"""Integers times a scale: grids, zero points, the search for wide ones, storage."""

from __future__ import annotations

import pytest
import torch

from lc_compress import formats as module
from lc_compress.binary import Ternary
from lc_compress.coding import Fixed
from lc_compress.compose import Then
from lc_compress.formats import Int, IntState
from lc_compress.low_rank import LowRank
from lc_compress.part import squared_error
from lc_compress.scaled import ScaledCodebook
from lc_compress.sparse import Sparse

F64 = torch.float64


def error(part: Int, w: torch.Tensor, h: torch.Tensor | None = None) -> float:
    return squared_error(w, part.reconstruct(part.solve(w, None, None, h)), h)


# ------------------------------------------------------------------ the best scale


@pytest.mark.parametrize("width", [2, 3, 5])
def test_symmetric_integers_are_a_scaled_codebook(width: int, generator: torch.Generator) -> None:
    w = torch.randn(6, 30, generator=generator, dtype=F64)
    h = torch.rand(6, 30, generator=generator, dtype=F64)
    m = 2 ** (width - 1) - 1
    for blocks in ({}, {"axis": 0}, {"group": 7}):
        codebook = ScaledCodebook(tuple(range(-m, m + 1)), **blocks)
        for importance in (None, h):
            state = Int(width, **blocks).project(w, importance=importance)
            expected = codebook.project(w, importance=importance)
            assert torch.equal(state.scale, expected.scale)
            assert torch.equal(state.integers.long(), expected.codes.long() - m)


def test_two_bits_are_ternary(generator: torch.Generator) -> None:
    w = torch.randn(9, 40, generator=generator, dtype=F64)
    ternary = Ternary().project(w)
    state = Int(2).project(w)
    torch.testing.assert_close(state.scale, ternary.scale)
    assert torch.equal(state.integers, ternary.signs)


@pytest.mark.parametrize("width", [4, 8])
def test_no_scale_of_a_fine_grid_is_better(width: int, generator: torch.Generator) -> None:
    w = torch.randn(4, 500, generator=generator, dtype=F64)
    w[1] = torch.empty(500, dtype=F64).exponential_(generator=generator)
    w[2] = w[2] ** 3
    part = Int(width, axis=0)
    delta = part.reconstruct(part.project(w))
    found = ((w - delta) ** 2).sum(1)
    m = 2 ** (width - 1) - 1
    least = torch.full((4,), float("inf"), dtype=F64)
    for ratio in torch.linspace(0.02, 1.05, 4000, dtype=F64):
        a = ratio * w.abs().amax(1, keepdim=True) / m
        least = torch.minimum(least, ((w - a * (w / a).round().clamp(-m, m)) ** 2).sum(1))
    assert bool((found <= least).all())
    torch.testing.assert_close(found, least, rtol=1e-3, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_best_scale_beats_the_range(symmetric: bool, generator: torch.Generator) -> None:
    w = torch.randn(8, 200, generator=generator) + 0.4
    for width in (3, 4, 6):
        best = error(Int(width, symmetric, axis=0), w)
        assert best < 0.95 * error(Int(width, symmetric, axis=0, scale="max"), w)
    assert error(Int(4, symmetric=False), w) < error(Int(4), w)  # the weights are not symmetric


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_comes_close(
    symmetric: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.randn(5, 400, generator=generator, dtype=F64) + 0.3
    w[1] **= 3
    w[2] = torch.empty(400, dtype=F64).exponential_(generator=generator)
    h = torch.rand(5, 400, generator=generator, dtype=F64)
    part = Int(7, symmetric, axis=0)
    monkeypatch.setattr(module, "_EXACT_ASYMMETRIC", 7)
    assert part.exact and part.exact_weighted
    exact = [error(part, w, importance) for importance in (None, h)]
    monkeypatch.setattr(module, "_EXACT_ASYMMETRIC", 6)
    monkeypatch.setattr(module, "_EXACT_SYMMETRIC", 6)
    assert not part.exact and not part.exact_weighted
    for least, importance in zip(exact, (None, h), strict=True):
        assert least <= error(part, w, importance) * (1 + 1e-12) <= 1.02 * least


def test_wide_integers(generator: torch.Generator) -> None:
    w = torch.randn(3, 300, generator=generator, dtype=F64)
    w[1, 5] = 40.0
    errors = [error(Int(width, axis=0), w) for width in range(6, 17)]
    for wide, narrow in zip(errors[1:], errors[:-1], strict=True):
        assert wide < narrow / 2.5
    assert errors[-1] < 1e-7 * float((w**2).sum())
    for width in (9, 12, 16):
        for symmetric in (True, False):
            part = Int(width, symmetric, axis=0)
            assert error(part, w) <= error(Int(width, symmetric, axis=0, scale="max"), w)


def test_each_channel_is_on_its_own(generator: torch.Generator) -> None:
    w = torch.randn(4, 3, 5, generator=generator) * torch.logspace(-3, 3, 4)[:, None, None]
    for part, one in (
        (Int(4, axis=0), Int(4)),
        (Int(3, symmetric=False, axis=0), Int(3, symmetric=False)),
        (Int(4, axis=-3, scale="max"), Int(4, scale="max")),
    ):
        state = part.project(w)
        for i in range(4):
            alone = one.project(w[i])
            torch.testing.assert_close(state.scale[i], alone.scale[0])
            assert torch.equal(state.integers[i], alone.integers)
            assert state.zero[i] == alone.zero[0]


# ------------------------------------------------------------------ the range, and both grids


def test_the_range_of_a_symmetric_grid() -> None:
    w = torch.tensor([-0.7, 0.0, 0.16, 1.4])
    state = Int(4, scale="max").project(w)
    assert state.scale.tolist() == pytest.approx([0.2]) and state.zero.tolist() == [7]
    assert state.integers.tolist() == [-4, 0, 1, 7]  # −3.5 goes to the even neighbour


def test_the_range_of_a_grid_with_a_zero_point() -> None:
    w = torch.tensor([-1.0, 0.0, 0.4, 2.0])
    state = Int(4, symmetric=False, scale="max").project(w)
    assert state.scale.tolist() == pytest.approx([0.2]) and state.zero.tolist() == [5]
    assert state.integers.tolist() == [-5, 0, 2, 10]
    positive = Int(2, symmetric=False, scale="max").project(torch.tensor([3.0, 6.0, 9.0]))
    assert positive.zero.tolist() == [0] and positive.integers.tolist() == [1, 2, 3]
    negative = Int(2, symmetric=False, scale="max").project(torch.tensor([-3.0, -6.0, -9.0]))
    assert negative.zero.tolist() == [3] and negative.integers.tolist() == [-1, -2, -3]


@pytest.mark.parametrize("scale", ["best", "max"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_zero_stays_zero(
    scale: str, symmetric: bool, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    part = Int(width, symmetric, group=4, scale=scale)
    w = torch.randn(4, 4, generator=generator).to(dtype)
    w[0], w[1, 1] = 0, 0
    w[3] = w[3].abs() + 1
    state = part.project(w)
    delta = part.reconstruct(state)
    assert delta.dtype == dtype and delta.shape == w.shape
    assert state.scale[0] == 0 and not bool(delta[0].any())
    assert delta[1, 1] == 0
    assert bool((state.scale >= 0).all())
    if scale == "best" and dtype == torch.float32:
        unimportant = part.project(w, importance=torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None])
        assert unimportant.scale[2] == 0


def test_all_codes_are_used() -> None:
    for part in (Int(4), Int(4, symmetric=False)):
        w = torch.linspace(-1, 1, 301, dtype=F64)
        codes = part.encode(part.project(w))["codes"].data
        assert sorted(set(codes.tolist())) == list(range(part.top + 1))


def test_negating_the_weights_negates_symmetric_integers(generator: torch.Generator) -> None:
    w = torch.cat((torch.randn(60, generator=generator), torch.tensor([0.5, 1.5, 2.5])))
    for part in (Int(3), Int(4, scale="max"), Int(10)):
        there, back = part.project(w), part.project(-w)
        assert torch.equal(there.integers, -back.integers)
        assert torch.equal(there.scale, back.scale)


@pytest.mark.parametrize("value", [1e30, 1e-30, 3e38])
def test_extreme_weights(value: float) -> None:
    w = torch.tensor([value, -value, value / 7, 0.0])
    for part in (Int(4), Int(12), Int(4, symmetric=False), Int(4, scale="max")):
        delta = part.reconstruct(part.project(w))
        assert bool(delta.isfinite().all())
        assert float((delta / value - w / value).abs().max()) < 0.1
    top = torch.full((9,), torch.finfo(torch.float16).max, dtype=torch.float16)
    for part in (Int(4), Int(8, symmetric=False), Int(4, scale="max")):
        torch.testing.assert_close(part.reconstruct(part.project(top)), top)


def test_a_single_weight() -> None:
    w = torch.tensor([-0.3], dtype=F64)
    for part in (Int(2), Int(8), Int(11), Int(4, symmetric=False), Int(9, symmetric=False)):
        torch.testing.assert_close(part.reconstruct(part.project(w)), w)


# ------------------------------------------------------------------ storage, composition, errors


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [2, 4, 7, 8, 9, 16])
def test_what_is_stored_rebuilds_the_state(
    width: int, symmetric: bool, generator: torch.Generator
) -> None:
    w = torch.randn(6, 11, generator=generator)
    w[0] = w[0].abs()
    part = Int(width, symmetric, axis=0, value_dtype=torch.float16)
    state = part.project(w)
    fields = part.encode(state)
    assert fields["codes"].coding == Fixed(width) and fields["codes"].per_weight
    assert part.bits(state) == 66 * width + 6 * 16 + (0 if symmetric else 6 * width)
    arrays = {
        name: field.coding.unpack(field.coding.pack(field.data), field.data.shape)
        for name, field in fields.items()
    }
    again = part.decode(arrays, w.shape, w.dtype)
    for x, y in zip(vars(again).values(), vars(state).values(), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
    assert torch.equal(part.reconstruct(again), part.reconstruct(state))
    assert part.free_shapes(w.shape, {}) == {"scale": state.scale.shape}
    assert part.admits(state) and not Int(width, symmetric).admits(state)
    if width > 2:
        assert not Int(width - 1, symmetric, axis=0).admits(state)
    whole = Int(width, symmetric)
    codes = whole.encode(whole.project(w))["codes"].data
    assert int(codes.min()) >= 0 and whole.top / 2 < int(codes.max()) <= whole.top


def test_integers_take_the_fewest_bytes(generator: torch.Generator) -> None:
    w = torch.randn(50, generator=generator)
    for width, symmetric, expected in (
        (8, True, torch.int8),
        (7, False, torch.int8),
        (8, False, torch.int16),
        (16, True, torch.int16),
        (16, False, torch.int32),
    ):
        assert Int(width, symmetric).project(w).integers.dtype == expected


def test_a_damaged_code_is_named() -> None:
    arrays = {"scale": torch.ones(1), "codes": torch.tensor([0, 15], dtype=torch.uint8)}
    with pytest.raises(ValueError, match="at most 14, found 15"):
        Int(4).decode(arrays, torch.Size((2,)), torch.float32)


def test_states_of_another_grid_only_serve_as_a_start(generator: torch.Generator) -> None:
    w = torch.randn(20, generator=generator)
    symmetric, shifted = Int(4).project(w), Int(4, symmetric=False).project(w.abs())
    assert not Int(4).admits(shifted)
    assert not Int(4, value_dtype=torch.float16).admits(symmetric)
    broken = IntState(symmetric.scale, symmetric.zero, symmetric.integers + 20)
    assert not Int(4).admits(broken)
    assert Int(5).project(w, symmetric).integers.max() <= 15


def test_other_parts_compose_with_integers(generator: torch.Generator) -> None:
    w = torch.randn(8, 12, generator=generator)
    for inner in (Int(4, axis=0), Int(4, symmetric=False), Int(3, group=5)):
        part = Sparse(nonzeros=20).then(inner)
        assert isinstance(part, Then)
        state = part.project(w)
        delta = part.reconstruct(state)
        assert int((delta != 0).sum()) <= 20
        assert squared_error(w, delta) <= float((w**2).sum())
    part = LowRank(2).then(Int(8))
    delta, plain = part.reconstruct(part.project(w)), LowRank(2).reconstruct(LowRank(2).project(w))
    assert squared_error(w, delta) < 1.01 * squared_error(w, plain)


def test_the_scale_can_be_trained() -> None:
    part = Int(4, symmetric=False)
    state = part.project(torch.tensor([-1.0, 0.0, 2.0]))
    scale = state.scale.clone().requires_grad_()
    part.reconstruct(part.with_tunable(state, {"scale": scale})).sum().backward()
    assert scale.grad is not None
    assert scale.grad.tolist() == [float(state.integers.sum())]


def test_operations() -> None:
    part = Int(4, axis=0)
    ops = part.ops(part.project(torch.tensor([[1.0, 0.0, -7.0], [0.0, 0.0, 3.0]])), positions=5)
    assert (ops.mults, ops.adds) == (5 * (3 + 2), 5 * (3 - 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 1}, "Use `Binary`"),
        ({"width": 0}, "width must be from 2 to 16"),
        ({"width": 17}, "width must be from 2 to 16"),
        ({"width": 4, "scale": "mean"}, 'scale must be "best" or "max"'),
        ({"width": 4, "axis": 0, "group": 8}, "per axis or per group"),
        ({"width": 4, "group": 0}, "group must be at least 1"),
        ({"width": 4, "value_dtype": torch.int8}, "value_dtype"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int(**arguments)


def test_an_axis_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="axis=2 does not exist"):
        Int(4, axis=2).project(torch.ones(3, 3))
