"""Order of pruning and quantization: theorems T1 to T6 and counterexamples C1 to C5 of
papers/sparsity-quantization-order.md, `order_report` on models, and `orthogonality`.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from lc_compress import HBFP, MX, NM, Format, Int, KernelMatrix, Matrix, Sparse, View, nests
from lc_compress.interplay import Orders, order_report, orthogonality
from lc_compress.interplay.layers import Layer
from lc_compress.interplay.orders import mask_of

FORMATS: list[Format[Any]] = [
    *(HBFP(width) for width in (8, 6, 4)),
    *(MX(element) for element in ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "int8")),
    Int(8, axis=0, scale="max"),
    Int(4, axis=0, scale="max"),
    Int(4, group=32, scale="max"),
    Int(3, group=32, scale="max"),
]
PRUNERS = [NM(2, 4), NM(1, 4), Sparse(density=0.5), Sparse(density=0.25), Sparse(density=0.1)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
NORMS = (1, 1.5, 2, 3, math.inf)
INT4, INT4_ROWS = Int(4, scale="max"), Int(4, axis=0, scale="max")


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Gaussian, heavy-tailed or of a scale per group, with zeros and ties among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, columns = draw(st.integers(1, 6)), draw(st.sampled_from([4, 32, 77, 96, 128]))
    shape, float64 = (rows, columns), torch.float64
    w = torch.randn(shape, generator=generator, dtype=float64)
    kind = draw(st.sampled_from(["gaussian", "student", "scaled", "tied"]))
    if kind == "student":
        chi = torch.randn((3, *shape), generator=generator, dtype=float64).square().mean(0)
        w = w / chi.sqrt()
    elif kind == "scaled":
        w = w * torch.logspace(-2, 1, columns, dtype=float64).roll(rows)
    elif kind == "tied":
        w = (2 * w).round() / 2
    return (w * 10.0 ** draw(st.integers(-3, 3))).to(draw(st.sampled_from(list(TOLERANCE))))


def orders(w: Tensor, sparse: Any, quantizer: Any) -> Orders:
    return order_report(w, sparse, quantizer).layers[0].weights


def norm(x: Tensor, p: float) -> float:
    return float(torch.linalg.vector_norm(x.double(), p))


def results(w: Tensor, sparse: Any, quantizer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s, q, S→Q, Q→S from the parts' own verbs."""

    def s(x: Tensor) -> Tensor:
        return sparse.reconstruct(sparse.project(x))

    q = quantizer.quantize
    return s(w), q(w), q(s(w)), s(q(w))


def keeps_maxima(sparse: Any, quantizer: Any, shape: torch.Size) -> bool:
    """Condition (c): one budget for the tensor, or groups inside blocks."""
    return isinstance(sparse, Sparse) or nests(sparse, quantizer, shape)


# ------------------------------------------------------------------ theorems

every = pytest.mark.parametrize("quantizer", FORMATS, ids=str)


@every
@settings(max_examples=8)
@given(w=tensors(), sparse=st.sampled_from(PRUNERS))
def test_t1_pythagoras(quantizer: Any, w: Tensor, sparse: Any) -> None:
    if not keeps_maxima(sparse, quantizer, w.shape):
        return
    s, q, sq, _ = results(w, sparse, quantizer)
    mask = mask_of(sparse, w)
    for p in (1, 2, 3):
        whole = norm(w.double() - sq, p) ** p
        split = norm(w.double() - s, p) ** p + norm((w.double() - q) * mask, p) ** p
        assert whole == pytest.approx(split, rel=TOLERANCE[w.dtype], abs=1e-300)
    assert orders(w, sparse, quantizer).pythagoras <= TOLERANCE[w.dtype]


@every
@settings(max_examples=8)
@given(w=tensors(), sparse=st.sampled_from(PRUNERS))
def test_t2_prune_then_quantize_adds_nothing(quantizer: Any, w: Tensor, sparse: Any) -> None:
    if not keeps_maxima(sparse, quantizer, w.shape):
        return
    s, q, sq, _ = results(w, sparse, quantizer)
    for p in NORMS:
        most = norm(w.double() - s, p) + norm(w.double() - q, p)
        assert norm(w.double() - sq, p) <= most * (1 + TOLERANCE[w.dtype])


@every
@settings(max_examples=8)
@given(w=tensors(), sparse=st.sampled_from(PRUNERS))
def test_t3_nested_groups_prefer_prune_then_quantize(
    quantizer: Any, w: Tensor, sparse: Any
) -> None:
    row = orders(w, sparse, quantizer)
    assert row.nests == row.certain == nests(sparse, quantizer, w.shape)
    if row.certain:
        _, _, sq, qs = results(w, sparse, quantizer)
        for p in NORMS:
            other = norm(w.double() - qs, p)
            assert norm(w.double() - sq, p) <= other * (1 + TOLERANCE[w.dtype])


OTHERS = [Int(4), Int(4, symmetric=False, axis=0), HBFP(4, scale="best"), MX("e2m1", scale="best")]


@pytest.mark.parametrize("quantizer", [*FORMATS, *OTHERS], ids=str)
@settings(max_examples=10)
@given(w=tensors(), sparse=st.sampled_from(PRUNERS))
def test_t4_bound(quantizer: Any, w: Tensor, sparse: Any) -> None:
    """Nested or not, of fitted scales and zero points too. Where groups nest it is the papers'
    formula: one cell for each possible swap.
    """
    row = orders(w, sparse, quantizer)
    assert row.l1.qs <= row.bound * (1 + TOLERANCE[w.dtype])
    assert 0 <= row.tightness <= 1 + TOLERANCE[w.dtype]
    if row.nests and isinstance(sparse, NM) and w.shape[1] % sparse.m == 0:
        cells = quantizer.widest_cell(w).reshape(-1, sparse.m)[:, 0].double()
        swaps = min(sparse.n, sparse.m - sparse.n)
        expected = row.l1.triangle + swaps * float(cells.sum())
        assert row.bound == pytest.approx(expected, rel=1e-12, abs=1e-300)


@every
@settings(max_examples=5)
@given(w=tensors(), sparse=st.sampled_from(PRUNERS), seed=st.integers(0, 2**32))
def test_t5_interaction_is_exact(quantizer: Any, w: Tensor, sparse: Any, seed: int) -> None:
    if not keeps_maxima(sparse, quantizer, w.shape):
        return
    x = torch.randn(3, w.shape[1], generator=torch.Generator().manual_seed(seed)).to(w.dtype)
    report = order_report(linear(w), sparse, quantizer, [x], layers="weight")
    dots = report.layers[0].dots
    assert dots is not None
    assert dots.residual <= 1e-11

    s, q, sq, qs = (y.double() for y in results(w, sparse, quantizer))
    exact, code = x.double(), quantizer.quantize(x).double()
    y = exact @ w.double().T
    out = 1 - mask_of(sparse, w).double()
    errors = {
        "reference": y,
        "s": y - exact @ s.T,
        "q": y - code @ q.T,
        "sq": y - code @ sq.T,
        "qs": y - code @ qs.T,
        "interaction": exact @ (w * out).T - code @ (q * out).T,
    }
    scale = norm(y, 2) / math.sqrt(y.numel())
    for name, e in errors.items():
        rms = norm(e, 2) / math.sqrt(y.numel())
        assert getattr(dots, name) == pytest.approx(rms, rel=1e-6, abs=1e-9 * scale)
    most = errors["s"].abs() + errors["q"].abs()
    assert dots.excess_sq == pytest.approx(float((errors["sq"].abs() > most).double().mean()))
    assert dots.excess_qs == pytest.approx(float((errors["qs"].abs() > most).double().mean()))


@every
@settings(max_examples=8)
@given(w=tensors(), sparse=st.sampled_from(PRUNERS))
def test_t6_scores_before_quantization(quantizer: Any, w: Tensor, sparse: Any) -> None:
    """Pruning the quantized weights by the scores of the others is S→Q, bit for bit."""
    if keeps_maxima(sparse, quantizer, w.shape):
        _, q, sq, _ = results(w, sparse, quantizer)
        assert torch.equal(q * mask_of(sparse, w), sq)


def linear(w: Tensor) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    with torch.no_grad():
        layer.weight.copy_(w)
    return layer


# ------------------------------------------------------------------ counterexamples


def of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_c1_quantize_then_prune_exceeds_the_sum() -> None:
    """Of two equal weights NM keeps the first, the papers' example the last: its pair is turned."""
    x = of(7, 0, 0.51, 1.49)
    _, q, sq, qs = results(x, NM(1, 2), INT4)
    assert q.tolist() == [7, 0, 1, 1]
    assert sq.tolist() == [7, 0, 0, 1] and qs.tolist() == [7, 0, 1, 0]
    row = orders(x, NM(1, 2), INT4)
    for errors, printed in (
        (row.l1, (1.00, 1.98, 1.49)),
        (row.l2, (0.7072, 1.5685, 1.2030)),
        (row.linf, (0.51, 1.49, 1.00)),
    ):
        found = (errors.sq, errors.qs, errors.triangle)
        assert found == pytest.approx(printed, abs=5e-5)
        assert errors.qs > errors.triangle >= errors.sq
    assert (row.swaps, row.kept, row.swapped, row.ties, row.tied) == (2, 2, 0.5, 2, 0.5)


def test_c2_a_mask_without_the_largest_weight() -> None:
    x, mask = of(7, 5, 3, 1), of(0, 1, 1, 0)
    both, alone = x - INT4.quantize(x * mask), (x - x * mask, x - INT4.quantize(x))
    for p, printed in ((1, (8.1429, 8.0)), (2, (7.0725, 7.0711)), (math.inf, (7, 7))):
        found = (norm(both, p), sum(norm(e, p) for e in alone))
        assert found == pytest.approx(printed, abs=5e-5)
    assert norm(both, 1) > sum(norm(e, 1) for e in alone)
    assert norm(both, 2) > sum(norm(e, 2) for e in alone)


def test_c3_prune_then_quantize_is_not_always_best() -> None:
    x = of(9, 1.4, 0.9, 1.3)
    blocks = Int(3, group=2, scale="max")
    row = orders(x, Sparse(density=0.5), blocks)
    assert not row.nests and not row.certain
    for errors, printed in (
        (row.l1, (3.6, 2.3)),
        (row.l2, (2.1119, 1.6643)),
        (row.linf, (1.4, 1.4)),
    ):
        assert (errors.sq, errors.qs) == pytest.approx(printed, abs=5e-5)
    assert row.l2.ratio < 1
    assert orders(x, NM(1, 2), blocks).certain  # the same weights, pruned inside the blocks


def test_c4_zero_points_break_the_triangle() -> None:
    x, quantizer = of(6, 5, 2, -1), Int(3, symmetric=False, scale="max")
    _, _, sq, _ = results(x, NM(3, 4), quantizer)
    assert sq.tolist() == pytest.approx([6, 5.142857, 1.714286, 0], abs=5e-7)
    row = orders(x, NM(3, 4), quantizer)
    assert row.nests and not row.certain
    assert row.pythagoras > 0.01
    printed = ((row.l1, 1.4286, 1.0), (row.l2, 1.0498, 1.0), (row.linf, 1.0, 1.0))
    for errors, both, most in printed:
        assert (errors.sq, errors.triangle) == pytest.approx((both, most), abs=5e-5)
    assert row.l1.sq > row.l1.triangle and row.l2.sq > row.l2.triangle


def test_c5_dot_products_are_not_orthogonal() -> None:
    x, w = of(-2.8, -1.3, -0.7, 3.3), of(-4.4, 1.4, 5.5, -0.4)
    report = order_report(linear(w[None]), NM(2, 4), INT4, [x[None]], layers="weight")
    dots = report.layers[0].dots
    assert dots is not None and dots.outputs == 1
    assert dots.sq == pytest.approx(5.411837, abs=5e-7)
    assert dots.s + dots.q == pytest.approx(3.736531, abs=5e-7)
    assert dots.excess_sq == 1
    assert dots.residual <= 1e-12


def test_random_tensors_as_in_the_papers(generator: torch.Generator) -> None:
    """Sections 7 and 13: ratios near 1 at 8 bits and of some percent at 4; the triangle holds in L1
    and L2; where groups do not nest and scales differ, S→Q is the worse order for some tensors.
    """
    for quantizer, low, high in ((HBFP(8), 1, 1.003), (MX("e2m1"), 1.02, 1.05), (INT4, 1.02, 1.1)):
        ratios = []
        for _ in range(20):
            w = torch.randn(32, 64, generator=generator, dtype=torch.float64)
            row = orders(w, NM(2, 4), quantizer)
            assert row.l1.qs <= row.l1.triangle and row.l2.qs <= row.l2.triangle
            ratios.append(row.l2.ratio)
        assert low < sum(ratios) / 20 < high
    losses = 0
    for _ in range(30):
        w = torch.randn(4, 16, 4, generator=generator, dtype=torch.float64)
        w = w * torch.randn(4, 16, 1, generator=generator, dtype=torch.float64).exp()
        losses += orders(w.view(4, 64), Sparse(density=0.5), INT4_ROWS).l2.ratio < 1
    assert 0 < losses < 30


# ------------------------------------------------------------------ one tensor


def test_measures_by_hand() -> None:
    """Blocks of 4, 2:4, INT3 (codes −3 … 3): the second group has no tie, the third keeps zeros."""
    w = of(3, -1.4, 1.2, 0.1, 3, 2.2, 0.4, 0.3, 3, 0.4, 0.3, 0.2).view(3, 4)
    row = orders(w, NM(2, 4), Int(3, axis=0, scale="max"))
    assert (row.weights, row.kept, row.nests) == (12, 6, True)
    assert row.l1.s == pytest.approx(1.3 + 0.7 + 0.5)
    assert row.l1.q == pytest.approx(0.4 + 0.2 + 0.1 + 0.2 + 0.4 + 0.3 + 0.9)
    assert row.linf.s == 1.2
    assert row.bound == pytest.approx(row.l1.triangle + 3 * 2)
    assert row.ties == 2  # −1.4 and 1.2, both of code ±1; zeros are no tie
    assert row.swaps == 0  # the first of the two is kept, as before
    assert row.norm == pytest.approx(float(w.norm()))


def test_edge_budgets(generator: torch.Generator) -> None:
    w = torch.randn(4, 64, generator=generator)
    for nothing in (NM(0, 4), Sparse(nonzeros=0)):
        row = orders(w, nothing, MX("e2m1"))
        assert (row.kept, row.swaps, row.swapped, row.ties) == (0, 0, 0, 0)
        assert row.l1.sq == row.l1.qs == row.l1.s == pytest.approx(float(w.abs().sum()))
    for everything in (NM(4, 4), Sparse(density=1.0)):
        row = orders(w, everything, MX("e2m1"))
        assert row.l1.s == 0 and row.ties == 0
        assert row.l1.sq == row.l1.qs == row.l1.q == row.bound
    zeros = orders(torch.zeros(2, 8), NM(2, 4), INT4)
    assert zeros.l2.ratio == 1 and zeros.pythagoras == 0 and zeros.tightness == 0


# ------------------------------------------------------------------ models


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 12),
        nn.ReLU(),
        nn.Linear(12, 5),
    ).double()


def images(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    return [torch.randn(4, 3, 4, 4, **draw) for _ in range(count)]


def test_default_layers() -> None:
    report = order_report(net(), NM(2, 4), HBFP(4))
    assert [row.weights.name for row in report.layers] == ["3.weight", "5.weight"]
    assert report.layers[0].weights.weights == 8 * 4 * 9
    assert all(row.dots is None and row.propagated is None for row in report.layers)


def test_default_spares_embeddings_and_what_is_tied_to_them() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix = nn.Embedding(10, 8), nn.Linear(8, 8)
            self.head, self.last = nn.Linear(8, 10, bias=False), nn.Linear(8, 8)
            self.head.weight = self.words.weight

    report = order_report(Language(), NM(2, 4), HBFP(4))
    assert [row.weights.name for row in report.layers] == ["mix.weight"]


def test_patterns_choose_layers_in_the_models_order() -> None:
    patterns: Any
    for patterns, expected in (
        ("5.weight", ["5.weight"]),
        (["7.weight", "re:[03].weight"], ["0.weight", "3.weight", "7.weight"]),
        (lambda name, w: w.dim() == 4, ["0.weight", "3.weight"]),
        (["*", "5.weight"], ["0.weight", "3.weight", "5.weight", "7.weight"]),
    ):
        report = order_report(net(), Sparse(density=0.5), HBFP(4), layers=patterns)
        assert [row.weights.name for row in report.layers] == expected


def test_totals(generator: torch.Generator) -> None:
    model = net()
    report = order_report(model, NM(2, 4), MX("e2m1"), layers="*")
    rows, total = [row.weights for row in report.layers], report.total.weights
    assert len(rows) == 4
    for name in ("s", "q", "sq", "qs"):
        parts = {p: [getattr(getattr(row, p), name) for row in rows] for p in ("l1", "l2", "linf")}
        assert getattr(total.l1, name) == pytest.approx(sum(parts["l1"]))
        assert getattr(total.l2, name) == pytest.approx(math.hypot(*parts["l2"]))
        assert getattr(total.linf, name) == max(parts["linf"])
    for name in ("weights", "kept", "swaps", "ties", "bound"):
        assert getattr(total, name) == pytest.approx(sum(getattr(row, name) for row in rows))
    assert total.norm == pytest.approx(math.hypot(*(row.norm for row in rows)))


@dataclass(frozen=True)
class ChannelsLast(View):
    """(out, in, kh, kw) as rows of kh·kw·in."""

    def show(self, w: Tensor) -> Tensor:
        return w.permute(0, 2, 3, 1).reshape(w.shape[0], -1)

    def restore(self, shown: Tensor, shape: torch.Size) -> Tensor:
        raise NotImplementedError

    def shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((shape[0], math.prod(shape[1:])))


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 4), (5, 6)),
    (nn.Linear(6, 4, bias=False), (2, 3, 6)),
    (nn.Linear(6, 4), (6,)),
    (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), bias=False), (2, 4, 7, 5)),
    (nn.Conv2d(4, 6, 3, dilation=2, groups=2), (2, 4, 7, 9)),
    (nn.Conv2d(4, 4, 3, padding="same", groups=4), (2, 4, 5, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 6)),
    (nn.Conv2d(4, 6, 3, padding=1), (4, 5, 6)),
    (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (2, 4, 9)),
    (nn.Conv1d(4, 6, 3, padding="same", padding_mode="reflect"), (4, 9)),
]


@pytest.mark.parametrize("view", [Matrix(), ChannelsLast()], ids=str)
@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=str)
def test_layers_are_dot_products(
    module: nn.Module, shape: tuple[int, ...], view: View, generator: torch.Generator
) -> None:
    if isinstance(view, ChannelsLast) and not isinstance(module, nn.Conv2d):
        return
    module = copy.deepcopy(module).double()
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
        layer = Layer("x", module, view, {"dense": view.show(module.weight)})
        torch.testing.assert_close(layer.output(x, "dense", None, expected), expected)


@pytest.mark.parametrize("arm", ["s", "q", "sq", "qs"])
@pytest.mark.parametrize("activations", [None, MX("e2m1", block=4)], ids=str)
def test_propagation_is_that_of_a_compressed_model(activations: Any, arm: str) -> None:
    model, sparse, quantizer = net(), NM(2, 4), HBFP(4, block=8)
    data = images()
    report = order_report(
        model, sparse, quantizer, data, activations=activations, layers=["3.weight", "5.weight"]
    )

    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        for i in (3, 5):
            w = other[i].weight
            index = ("s", "q", "sq", "qs").index(arm)
            w.copy_(results(w.view(len(w), -1), sparse, quantizer)[index].view(w.shape))
    if activations is not None and arm != "s":
        other[5].register_forward_pre_hook(lambda m, args: activations.quantize(args[0]))
        other[3].register_forward_hook(lambda m, args, y: by_patches(m, args[0], activations))
    model.eval()
    places: list[tuple[int | None, Any]] = [
        (4, report.layers[0]),
        (6, report.layers[1]),
        (None, report.total),
    ]
    for end, row in places:
        with torch.no_grad():
            ys = torch.cat([model[:end](x).flatten() for x in data])
            zs = torch.cat([other[:end](x).flatten() for x in data])
        expected = norm(ys - zs, 2) / norm(ys, 2)
        assert expected > 0.01
        assert getattr(row.propagated, arm) == pytest.approx(expected, rel=1e-9)


def by_patches(module: nn.Conv2d, x: Tensor, quantizer: Format[Any]) -> Tensor:
    """A convolution of two groups and stride 1, one patch at a time."""
    x = nn.functional.pad(x, (1, 1, 1, 1))
    rows = []
    for i in range(x.shape[2] - 2):
        for j in range(x.shape[3] - 2):
            patch = x[:, :, i : i + 3, j : j + 3].reshape(len(x), 2, -1)
            code = quantizer.quantize(patch)
            w = module.weight.view(2, 4, -1)
            rows.append(torch.cat([code[:, g] @ w[g].T for g in (0, 1)], 1))
    y = torch.stack(rows, 2).view(len(x), 8, x.shape[2] - 2, -1)
    assert module.bias is not None
    return y + module.bias.view(-1, 1, 1)


def test_dots_in_total_and_grouped_convolutions() -> None:
    model = net()
    report = order_report(model, NM(2, 4), HBFP(4), images(), layers=["3.weight", "5.weight"])
    first, second = (row.dots for row in report.layers)
    total = report.total.dots
    assert first and second and total
    assert (first.outputs, second.outputs) == (2 * 4 * 8 * 16, 2 * 4 * 12)
    assert total.outputs == first.outputs + second.outputs
    squares = first.outputs * first.qs**2 + second.outputs * second.qs**2
    assert total.qs == pytest.approx(math.sqrt(squares / total.outputs))
    assert first.residual < 1e-12 and second.residual < 1e-12

    model.eval()
    with torch.no_grad():
        x = torch.cat([model[:3](x) for x in images()])
        y = nn.functional.conv2d(x, model[3].weight, None, padding=1, groups=2)
        w = model[3].weight
        s = NM(2, 4).reconstruct(NM(2, 4).project(w.view(8, -1))).view(w.shape)
        e = y - nn.functional.conv2d(x, s, None, padding=1, groups=2)
    assert first.reference == pytest.approx(norm(y, 2) / math.sqrt(y.numel()))
    assert first.s == pytest.approx(norm(e, 2) / math.sqrt(y.numel()))


def test_one_large_batch_or_several_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sums, whatever the batches and the slices of the products."""
    one = order_report(net(), NM(2, 4), HBFP(4), [torch.cat(images())])
    monkeypatch.setattr("lc_compress.interplay.calibrated._ROWS", 7)
    several = order_report(net(), NM(2, 4), HBFP(4), images())
    for a, b in zip((*one.layers, one.total), (*several.layers, several.total), strict=True):
        assert a.dots and b.dots and a.propagated and b.propagated
        assert vars(a.dots) == pytest.approx(vars(b.dots), rel=1e-9, abs=1e-14)
        assert vars(a.propagated) == pytest.approx(vars(b.propagated), rel=1e-9)


def test_half_precision() -> None:
    model = net().bfloat16()
    report = order_report(model, NM(2, 4), MX("e2m1"), [x.bfloat16() for x in images()])
    double = order_report(net(), NM(2, 4), MX("e2m1"), images())
    for a, b in zip(report.layers, double.layers, strict=True):
        assert a.dots and b.dots and a.dots.residual < 1e-12
        assert a.weights.l2.qs == pytest.approx(b.weights.l2.qs, rel=0.02)
        assert a.dots.qs == pytest.approx(b.dots.qs, rel=0.1)


def test_every_form_of_calibration() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, picture: Tensor, scale: float = 1.0) -> Tensor:
            return self.inner(picture) * scale

    def loop(model: nn.Module) -> None:
        for x in images():
            model(x)

    def stream() -> Iterator[tuple[Tensor, int]]:
        yield from ((x, 7) for x in images())

    model, plan = Named(), (NM(2, 4), HBFP(4))
    first = order_report(model, *plan, images())
    assert order_report(model, *plan, loop) == first
    assert order_report(model, *plan, stream()) == first
    keyed = [{"picture": x, "scale": 2.0} for x in images()]
    twice = order_report(model, *plan, keyed)
    assert twice.layers == first.layers
    assert twice.total.propagated == pytest.approx(first.total.propagated)


def test_shared_layers_embeddings_and_outputs_of_other_kinds() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix = nn.Embedding(10, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            return {"y": self.mix(input=self.mix(self.words(ids)))}

    torch.manual_seed(0)
    ids = torch.randint(0, 10, (3, 4))
    report = order_report(Shared(), NM(2, 4), HBFP(4), [ids], layers="*")
    words, mix = report.layers
    assert words.dots is None and words.propagated is not None and words.propagated.s > 0
    assert mix.dots is not None and mix.dots.outputs == 2 * 3 * 4 * 8
    assert report.total.dots == mix.dots and report.total.propagated is None


def test_the_model_stays_as_it_was() -> None:
    model = net().train()
    model[3].eval()
    before = copy.deepcopy(model.state_dict())
    good, bad = images(1), [*images(1), torch.full((4, 3, 4, 4), math.nan)]
    order_report(model, NM(2, 4), HBFP(4), good)
    with pytest.raises(ValueError, match="NaN"):
        order_report(model, NM(2, 4), HBFP(4), bad)
    assert model.training and not model[3].training and model[5].training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------ what is refused


def wrong(match: str, call: Callable[[], object], kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=match):
        call()


def test_wrong_plans() -> None:
    model: Any = net()
    s, q = NM(2, 4), HBFP(4)
    wrong("`sparse` must keep the largest", lambda: order_report(model, q, q), TypeError)
    wrong("`quantizer` must be a number format", lambda: order_report(model, s, s), TypeError)
    wrong(r"number_format\('MXFP4'\) gives", lambda: order_report(model, s, "MXFP4"), TypeError)
    wrong(
        "`activations` must be a number format",
        lambda: order_report(model, s, q, images(), activations=s),
        TypeError,
    )
    wrong(r"No parameter named 'fc\*'.*'5.weight'", lambda: order_report(model, s, q, layers="fc*"))
    wrong("`layers` is empty", lambda: order_report(model, s, q, layers=[]))
    wrong("nothing is left", lambda: order_report(nn.Linear(4, 4), s, q))
    wrong("`data` needs a model", lambda: order_report(torch.ones(4), s, q, images()))
    with torch.no_grad():
        model[5].weight[0, 0] = math.nan
    wrong("'5.weight' contains NaN or inf", lambda: order_report(model, s, q))


def test_blocks_that_do_not_fit() -> None:
    model = net()
    wrong(
        r"'3.weight' as Matrix\(rows=1\) shows it, shape \(8, 36\), is shorter than one group of "
        r"NM\(n=2, m=64\)",
        lambda: order_report(model, NM(2, 64), HBFP(4)),
    )
    wrong(
        r"'3.weight' as .* shape \(8, 36\): axis=2 does not exist",
        lambda: order_report(model, NM(2, 4), HBFP(4, axis=2)),
    )
    wrong(
        "does not show '3.weight', shape .* with one row per output",
        lambda: order_report(
            model, NM(2, 4), HBFP(4), images(), view=KernelMatrix(), layers="3.weight"
        ),
    )
    short = order_report(model, NM(2, 5), HBFP(4, block=10), layers="3.weight")  # 36 = 7 · 5 + 1
    assert short.layers[0].weights.kept == 8 * (7 * 2 + 1)
    assert short.layers[0].weights.tightness <= 1


def test_wrong_data() -> None:
    s, q = NM(2, 4), HBFP(4)

    def report(data: Any, model: nn.Module | None = None, **options: Any) -> Callable[[], object]:
        return lambda: order_report(model or net(), s, q, data, **options)

    good = images(1)
    nan = good[0].clone()
    nan[0, 0, 0, 0] = math.inf
    wrong("Calibration batch 2, shape .* contains NaN or inf", report([*good, nan]))
    wrong(
        r"calibration batch 2, shape \(4, 3, 9, 9\), does not run through the model: .*shape",
        report([*good, torch.zeros(4, 3, 9, 9).double()]),
    )
    wrong("calibration batch 1, shape .* does not run", report([torch.zeros(4, 5).double()]))
    wrong("got no batch", report([]))
    wrong(
        "calibration function fails: Expected 3D", report(lambda m: m(torch.zeros(4, 5).double()))
    )
    wrong("iterable of batches.*got Tensor", report(good[0]), TypeError)
    wrong("batch 1 is int", report([5]), TypeError)
    wrong("'3.weight' gives NaN or inf", report(lambda m: m(good[0] * math.inf)))

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.head = (nn.Linear(8, 8) for _ in range(3))
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x)[0] + self.used(x))

    branch, x = Branch(), [torch.randn(4, 8)]
    wrong(r"never reaches \['unused.weight', 'attention.out", report(x, branch, layers="*.weight"))
    wrong("'attention.in_proj_weight' is the weight of no layer", report(x, branch, layers="att*"))

    runs = iter(range(1, 9))
    wrong(
        "'3.weight' was not called in the same way", report(lambda m: m(images(1)[0][: next(runs)]))
    )
    counts = iter([2, 1])
    wrong(
        "'3.weight' was not called in the same way",
        report(lambda m: [m(good[0]) for _ in range(next(counts))]),
    )


# ------------------------------------------------------------------ how it is shown


def test_report_is_shown(tmp_path: Path) -> None:
    report = order_report(net(), NM(2, 4), HBFP(4), images())
    text = str(report)
    assert "S = NM(n=2, m=4), Q = HBFP(width=4), weights as Matrix(rows=1)" in text
    assert "activations: HBFP(width=4)" in text and "interaction" in text
    assert sum(line.startswith("5.weight  ") for line in text.splitlines()) == 3
    assert sum(line.startswith("total  ") for line in text.splitlines()) == 3
    plain = str(order_report(net(), NM(2, 4), HBFP(4)))
    assert sum(line.startswith("total  ") for line in plain.splitlines()) == 1
    unquantized = order_report(net(), NM(2, 4), HBFP(4), images(), activations=None)
    assert "activations: not quantized" in str(unquantized)

    written = report.json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content == json.loads(written) == report.dicts()
    row = content["layers"][1]
    assert row["weights"]["name"] == "5.weight"
    assert row["weights"]["swapped"] == report.layers[1].weights.swapped
    assert row["dots"]["excess_sq"] == report.layers[1].dots.excess_sq  # type: ignore[union-attr]
    assert row["propagated"].keys() == {"s", "q", "sq", "qs"}


def test_figures(tmp_path: Path) -> None:
    with_data = order_report(net(), NM(2, 4), HBFP(4), images())
    weights = order_report(net(), NM(2, 4), HBFP(4), layers="*")
    verdicts = example()
    for i, result in enumerate((with_data, weights, verdicts)):
        result.figure(tmp_path / f"{i}.svg")
    first = (tmp_path / "2.svg").read_bytes()
    verdicts.figure(tmp_path / "2.svg")
    assert (tmp_path / "2.svg").read_bytes() == first
    assert "<!-- 3 -->" in (tmp_path / "0.svg").read_text(encoding="utf-8")  # a layer's name
    assert "<!-- threshold -->" in (tmp_path / "2.svg").read_text(encoding="utf-8")
    verdicts.figure(tmp_path / "3.png")
    assert (tmp_path / "3.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 4


def test_figures_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reports = (order_report(net(), NM(2, 4), HBFP(4)), example())
    for report in reports:
        wrong(r"lc_compress\[plot\]", lambda r=report: r.figure(tmp_path / "a.png"), ImportError)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ orthogonality


DENSE = np.array([10.0, 10.5, 9.8])
PARTS = {"S": DENSE + 1, "Q": DENSE + np.array([0.5, 0.6, 0.4])}
COMBINED = {
    "S→Q": DENSE + np.array([1.0, 1.1, 0.95]),
    "Q→S": DENSE + np.array([2.5, 2.7, 2.55]),
    "other": DENSE + np.array([1.5, 1.7, 1.35]),
}


def example(**options: Any) -> Any:
    """Perplexities of three seeds; S→Q costs less than its parts, Q→S more."""
    plan: dict[str, Any] = {"dense": DENSE, "parts": PARTS, "combined": COMBINED}
    return orthogonality("perplexity", **({"higher_is_better": False} | plan | options))


def test_threshold_excess_and_verdicts() -> None:
    result = example()
    assert result.threshold == pytest.approx(10.1 + 1 + 0.5)
    assert [x.verdict for x in result.combined] == [
        "orthogonal",
        "non-orthogonal",
        "inconclusive",
    ]
    excess = np.array([2.5, 2.7, 2.55]) - 1 - np.array([0.5, 0.6, 0.4])
    found = result.combined[1]
    assert found.metric == pytest.approx(10.1 + np.mean([2.5, 2.7, 2.55]))
    assert found.excess.value == pytest.approx(excess.mean())
    test = stats.ttest_1samp(excess, 0).confidence_interval()
    assert (found.excess.low, found.excess.high) == pytest.approx((test.low, test.high))
    assert result.interval == "t, of 3 values" and result.values == 3
    text = str(result)
    assert "t, of 3 values" in text and "lower is better" in text and "non-orthogonal" in text
    written = json.loads(result.json())
    assert written["combined"][1]["excess"] == vars(found.excess)
    assert written["threshold"] == result.threshold


def test_direction_is_mirrored() -> None:
    lower = example()
    flipped: dict[str, Any] = {"dense": -DENSE}
    flipped |= {"parts": {name: -x for name, x in PARTS.items()}}
    flipped |= {"combined": {name: -x for name, x in COMBINED.items()}}
    higher = example(**flipped, higher_is_better=True)
    assert higher.threshold == pytest.approx(-lower.threshold)
    for a, b in zip(lower.combined, higher.combined, strict=True):
        assert (a.verdict, vars(a.excess)) == (b.verdict, pytest.approx(vars(b.excess)))


def test_k_parts() -> None:
    result = orthogonality(
        "error",
        dense=8.0,
        parts={"S": [9.0, 9.2], "Q": [8.5, 8.6], "L": [10.0, 10.1]},
        combined={"all": [11.4, 11.6]},
        higher_is_better=False,
    )
    assert result.threshold == pytest.approx(9.1 + 8.55 + 10.05 - 2 * 8)
    assert result.combined[0].excess.value == pytest.approx(11.5 - result.threshold)
    assert result.differences == ()


def test_differences_within_noise() -> None:
    result = example()
    pairs = {(x.first, x.second): x for x in result.differences}
    assert pairs.keys() == {("S→Q", "Q→S"), ("S→Q", "other"), ("Q→S", "other")}
    order = pairs["S→Q", "Q→S"]
    assert order.difference.value == pytest.approx(np.mean([1.5, 1.6, 1.6]))
    assert not order.noise
    near = example(combined={"S→Q": [11.0, 12.0, 11.0], "Q→S": [11.5, 11.4, 11.3]})
    assert near.differences[0].noise and "noise" in str(near)
    assert json.loads(near.json())["differences"][0]["noise"] is True


def test_intervals_are_paired() -> None:
    """Batches differ by far more than their excess, which pairing takes out."""
    rng = np.random.default_rng(0)
    dense = rng.normal(5, 2, 24)
    s, q = dense + rng.normal(1, 0.1, 24), dense + rng.normal(2, 0.1, 24)
    both = s + q - dense + rng.normal(0.2, 0.1, 24)
    plan: dict[str, Any] = {"parts": {"S": s, "Q": q}, "combined": {"S→Q": both}}
    result = orthogonality("loss", dense=dense, **plan, higher_is_better=False)
    (found,) = result.combined
    assert found.verdict == "non-orthogonal"
    interval = stats.ttest_1samp(both - s - q + dense, 0).confidence_interval()
    assert (found.excess.low, found.excess.high) == pytest.approx(tuple(interval))


@pytest.mark.parametrize("count", [3, 8, 24])
@pytest.mark.parametrize("transform", [None, np.exp])
def test_intervals_hold_the_truth_as_often_as_they_say(
    count: int, transform: Callable[[Any], Any] | None
) -> None:
    """Of 1000 random cases without an effect, about 5 % get a verdict."""
    rng = np.random.default_rng(count)
    misses = 0
    for _ in range(1000):
        common = rng.normal(1, 0.3, count)
        case = orthogonality(
            "loss",
            dense=0.0,
            parts={"S": common},
            combined={"both": common + rng.normal(0, 0.1, count)},
            higher_is_better=False,
            transform=transform,
        )
        misses += case.combined[0].verdict != "inconclusive"
    assert 30 <= misses <= 70


def test_transform_of_means() -> None:
    """Perplexity is the exponential of the mean loss, not the mean of exponentials."""
    rng = np.random.default_rng(0)
    losses = {name: rng.normal(1, 0.3, 16) for name in ("dense", "S", "Q", "both")}
    result = orthogonality(
        "perplexity",
        dense=losses["dense"],
        parts={"S": losses["S"], "Q": losses["Q"]},
        combined={"both": losses["both"]},
        higher_is_better=False,
        transform=np.exp,
    )
    means = {name: math.exp(x.mean()) for name, x in losses.items()}
    assert result.dense == pytest.approx(means["dense"])
    assert result.threshold == pytest.approx(means["S"] + means["Q"] - means["dense"])
    excess = result.combined[0].excess
    assert excess.value == pytest.approx(means["both"] - result.threshold)
    assert excess.low < excess.value < excess.high


def test_values_without_spread() -> None:
    result = orthogonality(
        "error",
        dense=1,
        parts={"S": 2, "Q": [3, 3]},
        combined={"a": [4, 4]},
        higher_is_better=False,
    )
    assert vars(result.combined[0].excess) == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert result.combined[0].verdict == "orthogonal"


def test_what_rounding_leaves_is_no_effect() -> None:
    """Two orders that differ in the last bit: a sure interval, and still noise."""
    rng = np.random.default_rng(0)
    s = rng.normal(3.0, 0.1, 12)
    tiny = 3e-8 + 1e-9 * rng.random(12)
    plan = {"dense": s - 1, "parts": {"S": s}, "combined": {"a": s, "b": s + tiny}}
    result = example(**plan)
    assert result.differences[0].difference.low > 0
    assert result.differences[0].noise
    assert [x.verdict for x in result.combined] == ["orthogonal", "orthogonal"]
    exact = example(rounding=0.0, **plan)
    assert not exact.differences[0].noise and exact.combined[1].verdict == "non-orthogonal"
    assert result.rounding == pytest.approx(1e-6 * s.mean())
    assert result.dicts()["differences"][0]["rounding"] == result.rounding


def test_wrong_metrics() -> None:
    wrong(
        r"is a higher perplexity better\? Give higher_is_better=True",
        lambda: example(higher_is_better=None),
        TypeError,
    )
    with pytest.raises(TypeError, match="higher_is_better"):
        orthogonality("error", dense=1, parts={"S": [1, 2]}, combined={"a": [1, 2]})
    wrong(
        r"equal lengths, got \{'dense': 2, \"part 'S'\": 3",
        lambda: example(dense=[1.0, 2.0]),
    )
    wrong(
        "combined 'a' has NaN or inf",
        lambda: example(combined={"a": [1.0, math.nan, 2.0]}),
    )
    wrong("part 'Q' has NaN or inf", lambda: example(parts={"Q": [1.0, math.inf, 2.0]}))
    wrong("at least one entry", lambda: example(parts={}))
    wrong("at least one entry", lambda: example(combined={}))
    wrong(
        "1 value has no spread",
        lambda: example(dense=1.0, parts={"S": 1.0}, combined={"a": [2.0]}),
    )
    wrong("one row of values", lambda: example(dense=np.zeros((3, 1))))
    wrong("confidence must be in", lambda: example(confidence=1.0))
    wrong(
        r"\['S'\] stands for two things",
        lambda: example(combined={"S": [1.0, 2.0, 3.0]}),
    )
    wrong("'dense' is that of the uncompressed", lambda: example(parts={"dense": 1.0}))
    wrong(
        "the perplexity of 'a' is inf: `transform` makes it so of the mean 800",
        lambda: example(combined={"a": [800.0, 801.0, 799.0]}, transform=np.exp),
    )
    wrong(
        "without one of the values",
        lambda: example(combined={"a": [1000.0, 1000.0, 0.0]}, transform=np.exp),
    )
    wrong("rounding must be finite", lambda: example(rounding=-1.0))
