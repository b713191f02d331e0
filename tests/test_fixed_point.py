"""FixedPoint beyond the contract: the exponent, the roundings, the paper's numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lc_compress import FixedPoint, Sparse
from lc_compress.fixed_point import FixedPointState
from lc_compress.grids import Grid, grid, has_grid
from lc_compress.part import Part
from lc_compress.storage.specs import built_part, describe_part, known_types


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def by_hand(x: float, d: int, width: int, rounding: str) -> float:
    """⌊x · 2^d⌉ clipped, over 2^d, with Python's own rounding."""
    scaled = x * 2.0**d
    k = {"nearest": round(scaled), "truncate": int(scaled), "floor": int(scaled // 1)}[rounding]
    return max(-(2 ** (width - 1)), min(2 ** (width - 1) - 1, k)) / 2.0**d


# ------------------------------------------------------------------ T13: exponent and rounding


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "floor"])
@pytest.mark.parametrize("width", [2, 5])
def test_the_exponent_is_that_of_an_exhaustive_search(rounding: str, width: int) -> None:
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        w = torch.randn(9, generator=g, dtype=torch.float64) * 4.0 ** (seed - 2)
        h = torch.rand(9, generator=g, dtype=torch.float64)
        part = FixedPoint(width, rounding=rounding, exponents=(-4, 9))  # type: ignore[arg-type]
        for importance in (None, h):
            counts = torch.ones(9) if importance is None else importance
            errors = [
                sum(
                    float(c) * (float(x) - by_hand(float(x), d, width, rounding)) ** 2
                    for x, c in zip(w, counts, strict=True)
                )
                for d in range(-4, 10)
            ]
            best = errors.index(min(errors)) - 4
            state = part.project(w, importance=importance)
            assert state.exponents.tolist() == [best]
            expected = [by_hand(float(x), best, width, rounding) for x in w]
            assert part.reconstruct(state).tolist() == expected


PAPER = [  # bits, rounding, d*, MSE, share of zeros, bias: of 100 000 Gaussian samples
    (8, "truncate", 5, 3.316e-4, 0.0254, 1.6e-5),
    (8, "floor", 5, 3.337e-4, 0.0131, -1.56e-2),
    (8, "nearest", 5, 9.093e-5, 0.0130, -4e-5),
    (4, "truncate", 2, 3.660e-2, 0.1970, -5.5e-3),
    (4, "floor", 2, 3.752e-2, 0.0982, -1.25e-1),
    (4, "nearest", 1, 2.080e-2, 0.1970, -4e-5),
]


@pytest.mark.parametrize(("width", "rounding", "d", "mse", "zeros", "bias"), PAPER)
def test_the_table_of_the_papers_page(
    width: int, rounding: str, d: int, mse: float, zeros: float, bias: float
) -> None:
    x = gaussian(100_000)
    part = FixedPoint(width, rounding=rounding)  # type: ignore[arg-type]
    state = part.project(x)
    delta = part.reconstruct(state)
    assert state.exponents.item() == d
    # the samples are other ones than the page's: four standard errors
    assert float((x - delta).square().mean()) == pytest.approx(mse, rel=0.02)
    assert float((delta == 0).float().mean()) == pytest.approx(zeros, abs=4e-3)
    assert float((delta - x).mean()) == pytest.approx(bias, abs=2e-3 if width == 4 else 3e-4)


def test_ties_go_to_the_smaller_exponent() -> None:
    w = torch.tensor([1.0, -3.0, 2.0])  # exact for every d that does not clip
    assert FixedPoint(8).project(w).exponents.tolist() == [0]
    assert FixedPoint(8, exponents=(-3, 5)).project(w).exponents.tolist() == [0]
    assert FixedPoint(8, exponents=(-3, 5)).project(2 * w).exponents.tolist() == [-1]
    assert FixedPoint(8, exponents=(-3, 5)).project(0 * w).exponents.tolist() == [-3]


def test_halves_go_to_the_even_integer() -> None:
    part = FixedPoint(4, exponents=(0, 0))
    w = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -9.0, 9.0])
    assert part.project(w).integers.tolist() == [0, 2, 2, 0, -2, -8, 7]


def test_only_the_nearest_is_a_projection() -> None:
    assert FixedPoint(8).exact and FixedPoint(8, axis=0).exact_weighted
    for part in (FixedPoint(8, rounding="floor"), FixedPoint(8, saturate=(0.0, 1.0))):
        assert not part.exact and not part.exact_weighted


def test_saturation_fits_the_exponent_to_the_quantiles() -> None:
    x = torch.cat((gaussian(1000), torch.tensor([100.0])))
    plain, saturated = FixedPoint(8), FixedPoint(8, saturate=(1e-3, 1 - 1e-3))
    assert plain.project(x).exponents.item() == 0
    low, high = (float(torch.quantile(x, q)) for q in (1e-3, 1 - 1e-3))
    state = saturated.project(x)
    assert torch.equal(state.exponents, plain.project(x.clamp(low, high)).exponents)
    assert state.exponents.item() == 5
    assert saturated.reconstruct(state)[-1].item() == 127 / 32  # rounded all the same: to the end


def test_one_exponent_per_channel() -> None:
    w = gaussian(3, 4, 5) * torch.tensor([1.0, 0.1, 0.01])[:, None, None]
    state = FixedPoint(6, axis=0).project(w)
    alone = [FixedPoint(6).project(row).exponents.item() for row in w]
    assert state.exponents.tolist() == alone and len(set(alone)) == 3
    assert FixedPoint(6, axis=0).bits(state) == 6 * 60 + 3 * 8


# ------------------------------------------------------------------ its state, its grid, its format


def test_codes_and_exponents_come_back() -> None:
    part = FixedPoint(10, axis=1, exponents=(-7, 12))
    w = gaussian(5, 4) * 1000
    state = part.project(w)
    arrays = {
        n: f.coding.unpack(f.coding.pack(f.data), f.data.shape)
        for n, f in part.encode(state).items()
    }
    again = part.decode(arrays, w.shape, w.dtype)
    assert torch.equal(again.exponents, state.exponents) and bool((state.exponents < 0).any())
    assert torch.equal(part.reconstruct(again), part.reconstruct(state))
    arrays["exponents"] = torch.full_like(arrays["exponents"], 255)
    with pytest.raises(ValueError, match="damaged exponents"):
        part.decode(arrays, w.shape, w.dtype)


def test_admits_its_own_states_only() -> None:
    w = gaussian(4, 4)
    state = FixedPoint(4).project(w)
    assert FixedPoint(4).admits(state) and FixedPoint(5).admits(state)
    assert not FixedPoint(2).admits(state)
    assert not FixedPoint(4, exponents=(10, 12)).admits(state)
    assert not FixedPoint(4, axis=0).admits(state)


def test_the_grid_rounds_as_the_part() -> None:
    w = gaussian(3, 50)
    for rounding, axis in itertools.product(("nearest", "truncate", "floor"), (None, 0)):
        part = FixedPoint(4, axis=axis, rounding=rounding)  # type: ignore[arg-type]
        state = part.project(w)
        assert torch.equal(state.grid.values(w), part.reconstruct(state))
        found = grid(part, state)
        assert isinstance(found, Grid) and found.step.tolist() == [
            2.0**-d for d in state.exponents.tolist()
        ]
    assert has_grid(FixedPoint(4)) and not has_grid(Sparse(nonzeros=3))
    assert grid(Sparse(nonzeros=3), Sparse(nonzeros=3).project(w)) is None


def test_frozen_scales() -> None:
    part = FixedPoint(4)
    state = part.project(gaussian(20))
    moved = part.with_scales(100 * gaussian(20), state)
    assert isinstance(moved, FixedPointState)
    assert torch.equal(moved.exponents, state.exponents)
    step = 2.0 ** -state.exponents.item()
    values = part.reconstruct(moved)
    assert set(values.tolist()) <= {k * step for k in range(-8, 8)}
    assert values.min() == -8 * step and values.max() == 7 * step


def test_as_a_format() -> None:
    part = FixedPoint(4, axis=0)
    x = gaussian(2, 30)
    assert part.bits_per_element(x.shape) == 4 + 8 / 30
    assert part.monotone and not part.keeps_zero and not part.scale_of_largest
    assert torch.equal(part.quantize(x), part.reconstruct(part.project(x)))
    assert part.block_ids(x.shape).tolist() == [[0] * 30, [1] * 30]
    x[0, 0] = 40.0  # clipped: its error is half of the widest cell, or less
    for rounding in ("nearest", "truncate", "floor"):
        part = FixedPoint(4, axis=0, rounding=rounding, exponents=(0, 9))  # type: ignore[arg-type]
        state = part.project(x)
        error = (x - part.reconstruct(state)).abs()
        cell = part.widest_cell(x)
        assert bool((error <= cell).all()) and cell.shape == x.shape
        assert bool((cell >= state.grid.step).all())


def test_a_file_names_it() -> None:
    part: Part[FixedPointState] = FixedPoint(4, 1, "floor", (-3, 8), (0.01, 0.99))
    assert built_part(describe_part(part), known_types()) == part
    assert str(part) == (
        "FixedPoint(width=4, axis=1, rounding=floor, exponents=(-3, 8), saturate=(0.01, 0.99))"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 1}, "width must be from 2 to 16"),
        ({"width": 17}, "width must be from 2 to 16"),
        ({"width": 8, "rounding": "up"}, "rounding must be one of nearest, truncate, floor"),
        ({"width": 8, "exponents": (3, 2)}, "least, largest"),
        ({"width": 8, "exponents": (0, 127)}, "from -126 to 126"),
        ({"width": 8, "exponents": (0.5, 2)}, "two integers"),
        ({"width": 8, "exponents": (1,)}, "two integers"),
        ({"width": 8, "saturate": (0.9, 0.1)}, "two quantiles"),
        ({"width": 8, "saturate": (0.0, 1.5)}, "two quantiles"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        FixedPoint(**arguments)


def test_no_such_axis() -> None:
    with pytest.raises(ValueError, match="axis=3 does not exist"):
        FixedPoint(8, axis=3).project(gaussian(2, 2))
