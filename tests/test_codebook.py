"""Codebooks: k-means against brute force and another implementation; storage."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import kmeans1d
import pytest
import torch
from torch import Tensor

from lc_compress.codebook import CodebookState, FixedCodebook, KMeans, PowersOfTwo, nearest
from lc_compress.coding import Fixed
from lc_compress.part import Part, squared_error

HALVES = (torch.float16, torch.bfloat16)
BULK = torch.linspace(-1, 1, 9, dtype=torch.float64) ** 3


def error(part: Part[CodebookState], w: Tensor, importance: Tensor | None = None) -> float:
    state = part.solve(w, None, None, importance)
    return squared_error(w, part.reconstruct(state), importance)


def brute(w: Tensor, h: Tensor, k: int) -> float:
    """The least error over all ways to cut the sorted weights into at most k intervals."""
    order = w.argsort()
    x, h = w.double()[order], h.double()[order]
    n = x.numel()

    def cost(a: int, b: int) -> float:
        mass = float(h[a:b].sum())
        if mass == 0:
            return 0.0
        centre = (h[a:b] * x[a:b]).sum() / mass
        return float((h[a:b] * (x[a:b] - centre) ** 2).sum())

    costs = {(a, b): cost(a, b) for a in range(n) for b in range(a + 1, n + 1)}
    return min(
        sum(costs[interval] for interval in pairwise((0, *cuts, n)))
        for cuts in combinations(range(1, n), min(k, n) - 1)
    )


# ------------------------------------------------------------------ k-means is optimal


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_partition_is_better(k: int, weighted: bool, generator: torch.Generator) -> None:
    for n in (1, 2, 4, 7, 9):
        for tied in (False, True):
            w = torch.randn(n, generator=generator, dtype=torch.float64)
            if tied:
                w = (2 * w).round()
            h = torch.rand(n, generator=generator, dtype=torch.float64) if weighted else None
            if h is not None:
                h[torch.rand(n, generator=generator) < 0.3] = 0
            expected = brute(w, torch.ones(n) if h is None else h, k)
            assert error(KMeans(k), w, h) == pytest.approx(expected, rel=1e-12, abs=1e-28)


@pytest.mark.parametrize("k", [2, 3, 5, 16])
def test_agrees_with_another_implementation(k: int, generator: torch.Generator) -> None:
    gaussian = torch.randn(6000, generator=generator)
    heavy = torch.empty(6000).cauchy_(generator=generator).clamp(-100, 100)
    for w in (gaussian, heavy, (20 * gaussian).round(), gaussian.view(20, 30, 10)):
        codes, centres = kmeans1d.cluster(w.flatten().tolist(), k)
        expected = torch.tensor(centres, dtype=torch.float64)[torch.tensor(codes)]
        assert error(KMeans(k), w) == pytest.approx(
            squared_error(w.flatten(), expected), rel=1e-6, abs=0
        )


def test_far_outliers_do_not_blur_the_rest() -> None:
    for far in ([-1.0], [1.0], [-1.0, 1.0]):
        w = torch.cat((1e-9 * BULK, torch.tensor(far, dtype=torch.float64)))
        k = 3 + len(far)
        expected = brute(w, torch.ones(w.shape), k)
        assert error(KMeans(k), w) == pytest.approx(expected, rel=1e-6, abs=0)


def test_tight_clusters_keep_their_digits() -> None:
    w = torch.cat((BULK - 100, BULK, BULK + 100)) * 1e-6 + 1
    centres = KMeans(3).project(w).codebook
    torch.testing.assert_close(centres - 1, w.view(3, -1).mean(1) - 1, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("exponent", [-99, -40, 40, 99])
def test_scale_is_immaterial(exponent: int, generator: torch.Generator) -> None:
    w = torch.randn(500, generator=generator)
    h = torch.rand(500, generator=generator, dtype=torch.float64)
    for importance in (None, h, h * 2.0**900, h * 2.0**-900):
        one = KMeans(5).project(w, importance=None if importance is None else h)
        other = KMeans(5).project(w * 2.0**exponent, importance=importance)
        assert torch.equal(other.codes, one.codes)
        assert torch.equal(other.codebook, one.codebook * 2.0**exponent)


def test_the_largest_and_the_smallest_numbers() -> None:
    for dtype in (torch.float64, torch.float32, *HALVES):
        limits = torch.finfo(dtype)
        least = limits.smallest_normal
        w = torch.tensor([-limits.max, limits.max, least, -least, 0.0], dtype=dtype)
        for k in (1, 2, 3, 5):
            delta = KMeans(k).reconstruct(KMeans(k).project(w))
            assert bool(delta.isfinite().all())
            torch.testing.assert_close(delta[:2], w[:2] if k > 2 else delta[:2])
        assert torch.equal(delta, w)
        tiny = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64) * 5e-324
        assert torch.equal(KMeans(3).project(tiny).codebook, tiny)
    mixed = torch.tensor([1e30, 1e-30, 2e-30])
    assert KMeans(2).project(mixed).codes.tolist() == [1, 0, 0]


# ------------------------------------------------------------------ k-means, the rest


def test_dtypes(dtype: torch.dtype, generator: torch.Generator) -> None:
    w = torch.randn(40, 5, generator=generator).to(dtype)
    state = KMeans(4).project(w)
    delta = KMeans(4).reconstruct(state)
    assert (state.codebook.dtype, delta.dtype, delta.shape) == (dtype, dtype, w.shape)
    assert state.codes.dtype == torch.uint8
    best = brute_rounded(w, KMeans(4).project(w.double()).codebook)
    assert squared_error(w, delta) <= best * (1 + 1e-6)


def brute_rounded(w: Tensor, centres: Tensor) -> float:
    """The error of these centres in w's dtype."""
    distance = (w.double().reshape(-1, 1) - centres.to(w.dtype).double()).abs()
    return float((distance.min(1).values ** 2).sum())


def test_more_codewords_than_distinct_weights() -> None:
    w = torch.tensor([[3.0, -1.0], [3.0, 0.5]])
    state = KMeans(6).project(w)
    assert state.codebook.tolist() == [-1.0, 0.5, 3.0, 3.0, 3.0, 3.0]
    assert state.codes.tolist() == [[2, 0], [2, 1]]
    assert torch.equal(KMeans(6).reconstruct(state), w)
    assert KMeans(2).project(torch.zeros(3)).codebook.tolist() == [0.0, 0.0]


def test_weights_without_importance_follow_the_others() -> None:
    w = torch.tensor([0.0, 1.0, 10.0, 11.0, 100.0, 5.6])
    h = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    state = KMeans(2).project(w, importance=h)
    assert state.codebook.tolist() == [0.5, 10.5]
    assert state.codes.tolist() == [0, 0, 1, 1, 1, 1]
    none = KMeans(2).project(w, importance=torch.zeros(6))
    assert torch.equal(none.codebook, KMeans(2).project(w).codebook)


def test_importance_broadcasts(generator: torch.Generator) -> None:
    w = torch.randn(4, 6, generator=generator)
    h = torch.rand(4, 1, generator=generator)
    one = KMeans(3).project(w, importance=h)
    assert torch.equal(one.codebook, KMeans(3).project(w, importance=h.expand(4, 6)).codebook)


def test_a_value_dtype_rounds_and_assigns_again(generator: torch.Generator) -> None:
    w = torch.randn(5000, generator=generator, dtype=torch.float64)
    for value_dtype in HALVES:
        part = KMeans(9, value_dtype=value_dtype)
        state = part.project(w)
        assert torch.equal(state.codebook.to(value_dtype).double(), state.codebook)
        assert torch.equal(state.codes, nearest(w, state.codebook))
        assert not part.exact and not part.exact_weighted
        assert part.bits(state) == 9 * 16 + 5000 * 4
        assert not part.admits(KMeans(9).project(w))
        assert part.admits(state) and KMeans(9).admits(state) and not KMeans(8).admits(state)
    assert KMeans(9).exact and KMeans(9).exact_weighted


@pytest.mark.parametrize("k", [1, 2, 3, 256, 300])
def test_what_is_stored_rebuilds_the_state(k: int, generator: torch.Generator) -> None:
    w = torch.randn(31, 11, generator=generator)
    part = KMeans(k)
    state = part.project(w)
    fields = part.encode(state)
    assert fields["codes"].coding == Fixed(math.ceil(math.log2(k))) and fields["codes"].per_weight
    assert part.bits(state) == 32 * k + 341 * math.ceil(math.log2(k))
    arrays = {
        name: field.coding.unpack(field.coding.pack(field.data), field.data.shape)
        for name, field in fields.items()
    }
    again = part.decode(arrays, w.shape, w.dtype)
    assert torch.equal(again.codebook, state.codebook) and torch.equal(again.codes, state.codes)
    assert again.codes.dtype == state.codes.dtype == (torch.uint8 if k <= 256 else torch.int64)
    assert part.free_shapes(w.shape, {}) == {"codebook": state.codebook.shape}


def test_damaged_codes_are_named() -> None:
    arrays = {"codebook": torch.ones(3), "codes": torch.tensor([0, 3], dtype=torch.uint8)}
    with pytest.raises(ValueError, match="below 3, found 3"):
        KMeans(3).decode(arrays, torch.Size((2,)), torch.float32)
    with pytest.raises(ValueError, match="below 1, found 3"):
        FixedCodebook((0.5,)).decode(arrays, torch.Size((2,)), torch.float32)


def test_the_codebook_can_be_trained() -> None:
    state = KMeans(2).project(torch.tensor([1.0, 1.0, 4.0]))
    codebook = state.codebook.clone().requires_grad_()
    KMeans(2).reconstruct(KMeans(2).with_tunable(state, {"codebook": codebook})).sum().backward()
    assert codebook.grad is not None and codebook.grad.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("k", [0, -1])
def test_k_is_checked(k: int) -> None:
    with pytest.raises(ValueError, match="k must be >= 1"):
        KMeans(k)


# ------------------------------------------------------------------ fixed codebooks, nearest, ops


def test_fixed_values_are_sorted_once() -> None:
    part = FixedCodebook((1, -0.0, 0.0, 0.5, 1.0))
    assert part.values == (0.0, 0.5, 1.0) and part == FixedCodebook((0.0, 0.5, 1.0))
    assert math.copysign(1, part.values[0]) == 1
    assert part.free == () and part.exact and part.exact_weighted


@pytest.mark.parametrize("values", [(), (math.nan,), (0.0, math.inf)])
def test_fixed_values_are_checked(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="values must be finite numbers, at least one"):
        FixedCodebook(values)


def test_a_fixed_codebook_is_not_stored(dtype: torch.dtype) -> None:
    part = FixedCodebook((-1.0, 0.1, 1e30))
    w = torch.tensor([[-3.0, 0.2], [9.0, -0.4]], dtype=dtype)
    state = part.project(w, importance=torch.tensor([0.0, 1.0]))
    assert state.codes.tolist() == [[0, 1], [1, 1]]
    assert list(part.encode(state)) == ["codes"] and part.bits(state) == 8
    again = part.decode({"codes": state.codes}, w.shape, dtype)
    assert torch.equal(again.codebook, state.codebook) and part.admits(again)
    assert part.reconstruct(again).dtype == dtype and bool(again.codebook.isfinite().all())
    assert not FixedCodebook((-1.0, 0.1)).admits(again)
    one = FixedCodebook((0.25,))
    assert one.bits(one.project(w)) == 0
    assert bool((one.reconstruct(one.project(w)) == 0.25).all())


def test_powers_of_two_part_at_the_midpoints() -> None:
    part = PowersOfTwo(3)
    assert part.fixed.values == (-1, -0.5, -0.25, -0.125, 0, 0.125, 0.25, 0.5, 1)
    for k in range(3):
        edge = 1.5 * 2.0 ** -(k + 1)
        w = torch.tensor(
            [edge - 1e-9, edge + 1e-9, -edge + 1e-9, -edge - 1e-9], dtype=torch.float64
        )
        low, high = 2.0 ** -(k + 1), 2.0**-k
        assert part.reconstruct(part.project(w)).tolist() == [low, high, -low, -high]
    far = torch.tensor([9.0, -1e30, 0.0626, 0.0624, -0.0624, 0.0])
    assert part.reconstruct(part.project(far)).tolist() == [1, -1, 0.125, 0, 0, 0]


@pytest.mark.parametrize(("c", "bits"), [(0, 2), (1, 3), (2, 3), (3, 4), (6, 4), (7, 5), (126, 8)])
def test_powers_of_two_are_a_fixed_codebook(
    c: int, bits: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    part = PowersOfTwo(c)
    assert len(part.fixed.values) == 2 * c + 3
    w = torch.randn(5, 7, generator=generator).to(dtype)
    state = part.project(w, importance=torch.rand(5, 7, generator=generator))
    assert torch.equal(part.reconstruct(state), part.fixed.reconstruct(part.fixed.project(w)))
    assert part.bits(state) == 35 * bits == 35 * math.ceil(math.log2(2 * c + 3))
    again = part.decode({"codes": state.codes}, w.shape, dtype)
    assert torch.equal(part.reconstruct(again), part.reconstruct(state))
    assert part.admits(state) and not PowersOfTwo(c + 1 if c < 126 else 0).admits(state)
    assert part.exact and part.exact_weighted and part.free == ()
    assert part.ops(state, 3) == part.fixed.ops(state, 3)


@pytest.mark.parametrize("c", [-1, 127])
def test_the_least_power_is_checked(c: int) -> None:
    with pytest.raises(ValueError, match="c must be from 0 to 126"):
        PowersOfTwo(c)


def test_nearest_takes_the_lower_code_in_a_tie() -> None:
    codebook = torch.tensor([-1.0, 1.0, 1.0, 3.0])
    x = torch.tensor([-5.0, 0.0, 2.0**-140, 1.0, 1.5, 2.0, 2.1])
    assert nearest(x, codebook).tolist() == [0, 0, 1, 1, 2, 2, 3]
    edge = torch.finfo(torch.float64).max
    far = torch.tensor([-edge, edge * 0.9, edge], dtype=torch.float64)
    assert nearest(far, far).tolist() == [0, 1, 2]


def test_nearest_is_the_least_distance(generator: torch.Generator, device: torch.device) -> None:
    codebook = torch.randn(17, generator=generator).sort().values.to(device)
    x = torch.randn(40, 8, generator=generator).T.to(device)  # not contiguous
    codes = nearest(x, codebook)
    expected = (x[..., None].double() - codebook.double()).abs().argmin(-1)
    assert codes.device == x.device and torch.equal(codes.long(), expected)


def test_operations_of_a_codebook() -> None:
    matrix = KMeans(4).project(torch.randn(3, 10, generator=torch.Generator().manual_seed(1)))
    ops = KMeans(4).ops(matrix, positions=5)
    assert (ops.mults, ops.adds) == (5 * 4 * 3, 5 * 30)
    vector = FixedCodebook((0.0, 1.0)).project(torch.ones(7))
    ops = FixedCodebook((0.0, 1.0)).ops(vector)
    assert (ops.mults, ops.adds) == (2, 7)
