"""Packed modules compute what dense ones do, survive what modules go through, and stay small."""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from parts_under_test import CASES
from torch import Tensor, nn
from torch.nn import functional as F

from lc_compress import (
    NM,
    Binary,
    FixedCodebook,
    Int,
    KernelMatrix,
    KMeans,
    LowRank,
    Matrix,
    RankSelection,
    ScaledCodebook,
    Sparse,
    Ternary,
    Vector,
)
from lc_compress.coding import Fixed, Radix, Support
from lc_compress.entropy import Entropy
from lc_compress.modules import (
    Packed,
    PackedModule,
    PackedState,
    compress_module,
    pack,
    replace_modules,
    sparse_product,
    supports,
    term,
    to_dense,
    unpack_all,
    unpacking,
)
from lc_compress.modules.coded import Coded
from lc_compress.modules.factors import Factors
from lc_compress.modules.opaque import Opaque
from lc_compress.modules.supports import Scattered
from lc_compress.modules.weight import Dense, Factored
from lc_compress.part import Field, Ops, Part
from lc_compress.testing import Case

POLICIES = ("never", "on_load", "on_first_use")
SCHEMES: list[Part[Any]] = [
    Binary(axis=0) + Sparse(density=0.05, value_dtype=torch.float16),
    LowRank(3).over(Matrix()) + Sparse(density=0.1),
    KMeans(6) + LowRank(2, value_dtype=torch.bfloat16).over(Matrix()),
    Ternary(group=7).over(Vector()) + Sparse(nonzeros=9).then(KMeans(2)),
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of at most 64 weights, so that small layers have many."""
    monkeypatch.setattr(term, "TILE", 64)


def weights(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def solved(part: Part[Any], w: Tensor, mu: float | None = None) -> Any:
    return part.project(w, mu=mu)


def with_weight(module: nn.Module, w: Tensor) -> nn.Module:
    """A copy of the plain module with this weight."""
    dense = copy.deepcopy(module).to(w.dtype)
    dense.weight = nn.Parameter(w.detach().clone())
    return dense


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    eps = torch.finfo(dtype).eps
    return {"rtol": 16 * eps, "atol": 64 * eps}


def label(case: Case) -> str:
    dims = "x".join(map(str, case.shapes[0]))
    return f"{case.part} {dims}".replace("torch.", "")


# ------------------------------------------------------------------ agreement

MATRICES = [case for case in CASES if len(case.shapes[0]) == 2]
KERNELS = [case for case in CASES if len(case.shapes[0]) == 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], indirect=True)
@pytest.mark.parametrize("case", MATRICES, ids=label)
def test_linear_agrees_with_the_dense_weight(
    case: Case, dtype: torch.dtype, small_tiles: None
) -> None:
    for shape in ((12, 40), (5, 7)):
        w = weights(shape, dtype=dtype)
        state = solved(case.part, w, case.mu)
        plain = nn.Linear(shape[1], shape[0], dtype=dtype)
        dense = with_weight(plain, case.part.reconstruct(state))
        x = weights((2, 3, shape[1]), seed=1, dtype=dtype)
        for policy in POLICIES:
            packed = compress_module(plain, case.part, state, policy)
            torch.testing.assert_close(packed(x), dense(x), **tolerance(dtype))
            assert torch.equal(packed.to_dense().weight, dense.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], indirect=True)
@pytest.mark.parametrize("case", KERNELS, ids=label)
def test_convolution_agrees_with_the_dense_weight(
    case: Case, dtype: torch.dtype, small_tiles: None
) -> None:
    plain = nn.Conv2d(6, 10, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), dtype=dtype)
    w = weights(tuple(plain.weight.shape), dtype=dtype)
    state = solved(case.part, w, case.mu)
    dense = with_weight(plain, case.part.reconstruct(state))
    x = weights((2, 6, 9, 8), seed=1, dtype=dtype)
    for policy in POLICIES:
        packed = compress_module(plain, case.part, state, policy)
        torch.testing.assert_close(packed(x), dense(x), **tolerance(dtype))


CONVOLUTIONS: list[Callable[[], nn.Module]] = [
    lambda: nn.Conv1d(4, 6, 3),
    lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False),
    lambda: nn.Conv1d(4, 6, 5, padding="same", padding_mode="circular"),
    lambda: nn.Conv2d(4, 6, 3, padding="same"),
    lambda: nn.Conv2d(4, 6, (2, 3), padding="valid", stride=2),
    lambda: nn.Conv2d(4, 8, 3, padding=(1, 2), groups=4),
    lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
    *(
        lambda mode=mode: nn.Conv2d(4, 6, (3, 5), (1, 2), (1, 2), (2, 1), padding_mode=mode)
        for mode in ("zeros", "reflect", "replicate", "circular")
    ),
    lambda: nn.Conv2d(8, 24, 3, groups=2),  # 12 rows of 36 weights in a group: parts of a group
    lambda: nn.Conv2d(2, 70, 1, groups=1),
]


@pytest.mark.parametrize("build", CONVOLUTIONS)
@pytest.mark.parametrize("index", range(len(SCHEMES)))
def test_every_geometry_of_convolutions(
    build: Callable[[], nn.Module], index: int, small_tiles: None
) -> None:
    plain, part = build(), SCHEMES[index]
    state = solved(part, weights(tuple(plain.weight.shape)))
    dense = with_weight(plain, part.reconstruct(state))
    size = (11,) if isinstance(plain, nn.Conv1d) else (11, 12)
    batch = weights((2, plain.in_channels, *size), seed=1)
    for policy in ("never", "on_load"):
        packed = compress_module(plain, part, state, policy)
        for x in (batch, batch[0], batch[:0]):
            torch.testing.assert_close(packed(x), dense(x))


@pytest.mark.parametrize("padding", ["same", "valid", (1, 2)])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_both_schemes_of_low_rank_convolutions_run_as_two(
    padding: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two convolutions each, on a weight too small to need it otherwise."""
    monkeypatch.setattr("lc_compress.modules.weight._SMALL", 0)
    strides = (1, 1) if padding == "same" else (2, 3)
    plain = nn.Conv2d(16, 12, (3, 5), strides, padding, (2, 1), padding_mode=mode)
    part = LowRank(2).over(KernelMatrix()) + LowRank(1).over(Matrix())
    state = solved(part, weights(tuple(plain.weight.shape)))
    dense = with_weight(plain, part.reconstruct(state))
    x = weights((2, 16, 13, 12), seed=1)
    for policy in ("never", "on_load"):
        packed = compress_module(plain, part, state, policy)
        torch.testing.assert_close(packed(x), dense(x))
        if policy == "on_load":
            assert isinstance(packed.packed.ready, Factored)
        else:
            assert packed.packed.split()[1] == []


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("index", range(len(SCHEMES)))
def test_embedding(index: int, policy: Any, small_tiles: None) -> None:
    plain, part = nn.Embedding(30, 9, padding_idx=2), SCHEMES[index]
    state = solved(part, weights((30, 9)))
    dense = with_weight(plain, part.reconstruct(state))
    packed = compress_module(plain, part, state, policy)
    assert packed.padding_idx == packed.to_dense().padding_idx == 2
    for i in (torch.tensor([[0, 29, 2], [7, 7, 13]]), torch.tensor(5), torch.zeros(0, 3).long()):
        torch.testing.assert_close(packed(i), dense(i), rtol=1e-6, atol=1e-6)


def test_real_network(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet20, every convolution and the last layer packed: logits of the dense Δ."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
    from cifar_resnet import Config, pretrained

    file = data_folder / "resnet_cifar10" / "resnet20-12fca82f.th"
    model = pretrained(Config(weights=str(file))).eval()
    part = Binary() + Sparse(density=0.02)
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    states = {name: (part, solved(part, model.get_parameter(name))) for name in names}
    dense = copy.deepcopy(model)
    for name in names:
        dense.get_parameter(name).data = part.reconstruct(states[name][1])
    x = weights((4, 3, 32, 32), seed=1)
    with torch.no_grad():
        for policy in POLICIES:
            packed = replace_modules(copy.deepcopy(model), states, policy)
            assert sum(isinstance(m, PackedModule) for m in packed.modules()) == 20
            torch.testing.assert_close(packed(x), dense(x), rtol=1e-4, atol=1e-4)
            again = to_dense(packed)
            for name in names:
                assert torch.equal(again.get_parameter(name), dense.get_parameter(name))
            torch.testing.assert_close(again(x), dense(x), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ unpacking


@pytest.mark.parametrize("width", range(33))
def test_codes_of_any_width_and_range(width: int, generator: torch.Generator) -> None:
    for count in (1, 9, 83):
        data = torch.randint(0, 2**width, (count,), generator=generator)
        payload = torch.tensor(list(Fixed(width).pack(data)), dtype=torch.uint8)
        for start, stop in ((0, count), (count // 2, count), (count // 3, count - 1)):
            found = unpacking.codes(payload, Fixed(width), start, stop)
            assert torch.equal(found.long(), data[start:stop])


@pytest.mark.parametrize("base", [2, 3, 5, 6, 7, 16, 17, 256])
def test_codes_of_any_base(base: int, generator: torch.Generator) -> None:
    data = torch.randint(0, base, (83,), generator=generator)
    payload = torch.tensor(list(Radix(base).pack(data)), dtype=torch.uint8)
    for start, stop in ((0, 83), (7, 41), (82, 83)):
        found = unpacking.codes(payload, Radix(base), start, stop)
        assert torch.equal(found.long(), data[start:stop])


def written(positions: Tensor, size: int, kind: int) -> Tensor:
    """Positions in a given way of `Support`, be it the cheapest or not (docs/format.md)."""
    kept = set(positions.tolist())
    gaps = (positions - torch.cat([torch.tensor([-1]), positions[:-1]]) - 1).tolist()
    bits: list[int] = []
    if kind == 0:
        bits = [int(p in kept) for p in range(size)]
    elif kind <= 32:
        for gap in gaps:
            escapes, rest = divmod(gap, 2**kind - 1)
            for code in [2**kind - 1] * escapes + [rest]:
                bits += [code >> i & 1 for i in range(kind)]
    else:
        b = kind - 64
        bits = [gap % 2**b >> i & 1 for gap in gaps for i in range(b)]
        bits += [bit for gap in gaps for bit in [0] * (gap >> b) + [1]]
    body = Fixed(1).pack(torch.tensor(bits, dtype=torch.uint8))
    payload = torch.tensor([kind, *body], dtype=torch.uint8)
    found = Support(size).unpack(bytes(payload.tolist()), positions.shape)
    assert torch.equal(found, positions)
    return payload


def tile(found: Scattered, start: int, stop: int) -> Tensor:
    total = torch.full((stop - start,), torch.nan)
    found.fill(total, None, start)
    return total


SPREADS = {
    "few": lambda g: torch.tensor([0, 7999]),
    "last": lambda g: torch.tensor([7999]),
    "first": lambda g: torch.tensor([0]),
    "clustered": lambda g: torch.cat([torch.arange(0, 87, 3), torch.arange(6000, 6050)]),
    "sparse": lambda g: torch.randperm(8000, generator=g)[:400].sort()[0],
    "half": lambda g: torch.randperm(8000, generator=g)[:4000].sort()[0],
    "nearly full": lambda g: torch.randperm(8000, generator=g)[:7990].sort()[0],
}


@pytest.mark.parametrize("kind", [0, 1, 2, 5, 8, 11, 32, 65, 66, 69, 72, 76, 96])
@pytest.mark.parametrize("spread", SPREADS)
def test_supports_in_every_way(
    spread: str,
    kind: int,
    generator: torch.Generator,
    small_tiles: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read in ranges that begin anywhere, from tables made in small and in large pieces."""
    shape, size = torch.Size((80, 100)), 8000
    positions = SPREADS[spread](generator)
    values = weights((len(positions),))
    dense = torch.zeros(size).scatter(0, positions, values)
    stored = pack(Sparse(nonzeros=1), Sparse(nonzeros=1).keep(dense.view(shape), positions))
    arrays = {"positions": Packed(Support(size), positions.shape, written(positions, size, kind))}
    for piece in (64, 1 << 13):
        monkeypatch.setattr(supports, "_PIECE", piece)
        found = Scattered({**stored, **arrays}, shape)
        for start, stop in ((0, 8000), (0, 100), (300, 500), (7900, 8000), (150, 1234)):
            assert torch.equal(tile(found, start, stop), dense[start:stop])
        starts, columns, kept = found.rows(torch.float32)
        csr = torch.sparse_coo_tensor(
            torch.stack([torch.arange(80).repeat_interleave(starts.diff()), columns.long()]),
            kept,
            (80, 100),
            check_invariants=True,
        )
        assert torch.equal(csr.to_dense().reshape(-1), dense)


@pytest.mark.parametrize("count", [0, 8000])
def test_empty_and_full_supports(count: int) -> None:
    w = weights((80, 100))
    part = Sparse(nonzeros=count)
    state = solved(part, w)
    found = Scattered(pack(part, state), w.shape)
    dense = part.reconstruct(state).reshape(-1)
    for start, stop in ((0, 8000), (300, 500)):
        assert torch.equal(tile(found, start, stop), dense[start:stop])


@pytest.mark.parametrize("batch", [(), (1,), (2,), (3, 50), (2, 0), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], indirect=True)
def test_sparse_product(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    w = weights((40, 30), dtype=dtype)
    state = solved(Sparse(density=0.1), w)
    dense = Sparse(density=0.1).reconstruct(state)
    rows = Scattered(pack(Sparse(density=0.1), state), w.shape).rows(
        torch.promote_types(dtype, torch.float32)
    )
    x = weights((*batch, 30), seed=1, dtype=dtype).requires_grad_()
    plus = weights((40,), seed=2, dtype=dtype)
    y = sparse_product.sparse_linear(x, *rows, plus)
    torch.testing.assert_close(y, F.linear(x, dense, plus), **tolerance(dtype))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, dense.sum(0).expand_as(x), **tolerance(dtype))
    with torch.no_grad():  # another way, for one vector
        for more in (None, plus, plus.expand(*batch, 40)):
            again = sparse_product.sparse_linear(x, *rows, more)
            torch.testing.assert_close(
                again, F.linear(x, dense) + (0 if more is None else more), **tolerance(dtype)
            )


def test_sparse_product_without_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_product, "_HAS_MKL", False)
    state = solved(Sparse(density=0.1), weights((40, 30)))
    rows = Scattered(pack(Sparse(density=0.1), state), torch.Size((40, 30))).rows(torch.float32)
    x = weights((1, 30), seed=1)
    dense = Sparse(density=0.1).reconstruct(state)
    torch.testing.assert_close(sparse_product.sparse_linear(x, *rows), F.linear(x, dense))


# ------------------------------------------------------------------ what unpacking leads to


@pytest.mark.parametrize(
    ("part", "kind", "form"),
    [
        (LowRank(16), "linear", Factored),
        (LowRank(16) + Sparse(density=0.05), "linear", Factored),
        (Sparse(density=0.05), "linear", Factored),
        (Sparse(density=0.2), "linear", Dense),  # as many multiplications, and dearer ones
        (LowRank(16) + Binary(), "linear", Dense),
        (LowRank(120), "linear", Dense),
        (LowRank(4).over(Matrix()), "conv", Factored),
        (LowRank(4).over(Matrix()) + Sparse(density=0.01), "conv", Dense),
        (LowRank(4), "embedding", Dense),
    ],
)
def test_form(part: Part[Any], kind: str, form: type) -> None:
    modules = {
        "linear": nn.Linear(256, 256),
        "conv": nn.Conv2d(128, 64, 3),
        "embedding": nn.Embedding(256, 256),
    }
    module = modules[kind]
    packed = compress_module(module, part, solved(part, module.weight.detach()), "on_load")
    assert type(packed.packed.ready) is form


def test_small_weights_are_unpacked_dense() -> None:
    part = LowRank(1)
    packed = compress_module(nn.Linear(64, 64), part, solved(part, weights((64, 64))), "on_load")
    assert isinstance(packed.packed.ready, Dense)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (Binary(), Coded),
        (Int(3, symmetric=False, axis=0), Coded),
        (NM(2, 4), Scattered),
        (LowRank(1), Factors),
        (RankSelection(1e-3), Factors),
        (FixedCodebook((-1.0, 1.0)).over(Matrix()), Coded),
        (ScaledCodebook((-1.0, 1.0)).over(Vector()), Coded),
        (Binary().over(KernelMatrix()), Coded),
        (Binary(axis=0).over(KernelMatrix()), Opaque),
        (Sparse(nonzeros=3).over(KernelMatrix()), Opaque),
        (Sparse(nonzeros=3).then(KMeans(2)), Opaque),
    ],
)
def test_which_parts_are_read_a_tile_at_a_time(part: Part[Any], kind: type) -> None:
    w = weights((4, 6) if "Kernel" not in str(part) else (4, 3, 2, 1))
    plain = nn.Linear(6, 4) if w.dim() == 2 else nn.Conv2d(3, 4, (2, 1))
    packed = compress_module(plain, part, solved(part, w, 1.0))
    assert [type(t) for t in packed.packed.terms] == [kind]


# ------------------------------------------------------------------ what modules go through


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 12),
    )
    return nn.Sequential(*layers).to(dtype)


def packed_network(policy: Any, index: int = 0, seed: int = 0) -> nn.Module:
    model, part = network(seed), SCHEMES[index]
    names = ("0.weight", "3.weight")
    states = {n: (part, solved(part, model.get_parameter(n).detach())) for n in names}
    return replace_modules(model, states, policy)


IMAGES = weights((5, 3, 4, 4), seed=3)
ALL = pytest.mark.parametrize(
    ("policy", "index"), [(p, i) for p in POLICIES for i in range(len(SCHEMES))]
)


@ALL
def test_copies(policy: Any, index: int) -> None:
    model = packed_network(policy, index)
    expected = model(IMAGES)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin(IMAGES), expected)
        assert twin[0] is not model[0] and str(twin) == str(model)


@ALL
def test_state_dict(policy: Any, index: int) -> None:
    """Into an equal model with other payloads, of other lengths; the unpacked weight follows."""
    model, other = packed_network(policy, index, 1), packed_network(policy, index, 2)
    assert all(
        x.dtype in (torch.uint8, torch.int64)
        for n, x in model.state_dict().items()
        if "packed" in n
    )
    other(IMAGES)  # unpacks the old weight
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(IMAGES), model(IMAGES))
    assert torch.equal(to_dense(other)(IMAGES), to_dense(model)(IMAGES))
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(IMAGES), model(IMAGES))


def test_state_dict_of_another_part_is_refused() -> None:
    part, other = Binary(), KMeans(4)
    plain = nn.Linear(6, 5)
    w = weights((5, 6))
    module = compress_module(plain, part, solved(part, w))
    before = module(w)
    with pytest.raises(RuntimeError, match=r"Missing key.*packed:scale"):
        module.load_state_dict(compress_module(plain, other, solved(other, w)).state_dict())
    damaged = module.state_dict()
    damaged["packed.terms.0.packed:positive"] = torch.zeros(9, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"takes 4 bytes, got 9"):
        module.load_state_dict(damaged)
    damaged["packed.terms.0.packed:positive"] = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"bytes expected, got torch\.float32"):
        module.load_state_dict(damaged)
    assert torch.equal(module(w), before)


@ALL
def test_casts_leave_packed_values_alone(policy: Any, index: int) -> None:
    model = packed_network(policy, index)
    expected, dense = model(IMAGES), to_dense(model)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = copy.deepcopy(model).to(dtype)
        reference = to_dense(model).to(dtype)
        x = IMAGES.to(dtype)
        # three roundings to this dtype in a row, of sums of up to 128 terms
        torch.testing.assert_close(
            cast(x), reference(x), rtol=0, atol=max(20 * torch.finfo(dtype).eps, 1e-6)
        )
        back = cast.float()
        torch.testing.assert_close(back[0].weight, dense[0].weight, rtol=0, atol=0)
        for (name, x), (_, y) in zip(
            model[3].named_buffers(), back[3].named_buffers(), strict=True
        ):
            assert torch.equal(x, y), name
        bias = back[0].bias.detach()  # rounded for good, as any parameter
        back[0].bias.data, back[3].bias.data = model[0].bias.data, model[3].bias.data
        torch.testing.assert_close(back(IMAGES), expected, rtol=1e-6, atol=1e-6)
        assert bias.dtype == torch.float32
    assert packed_network(policy, index).half()[3].packed.dtype == torch.float16


def test_input_of_another_dtype_is_refused() -> None:
    model = packed_network("never")
    with pytest.raises(TypeError, match=r"the weight is torch\.float32, the input torch\.float64"):
        model[3](torch.zeros(1, 128, dtype=torch.float64))


@ALL
def test_devices(policy: Any, index: int, device: torch.device) -> None:
    model = packed_network(policy, index)
    expected = model(IMAGES)
    moved = model.to(device)
    torch.testing.assert_close(moved(IMAGES.to(device)).cpu(), expected, rtol=1e-4, atol=1e-5)
    assert moved[3].packed.device.type == device.type


@pytest.mark.parametrize(
    ("policy", "index"), [*(("never", i) for i in range(len(SCHEMES))), ("on_load", 0)]
)
def test_compiled(policy: Any, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, and the compiler's own differentiation."""
    monkeypatch.setattr(term, "TILE", 512)
    torch.compiler.reset()
    model = packed_network(policy, index)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = IMAGES.clone().requires_grad_()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    found = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, model)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES[:1]), model(IMAGES[:1]), rtol=1e-5, atol=1e-5)


def test_compiled_does_not_unpack_for_good() -> None:
    torch.compiler.reset()
    model = packed_network("on_first_use")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = compiled(IMAGES)
    assert model[3].packed.ready is None
    unpack_all(model)
    assert isinstance(model[3].packed.ready, Dense)
    torch.testing.assert_close(compiled(IMAGES), expected)


def test_compiled_products() -> None:
    """The sparse product of one vector is an operator of its own."""
    torch.compiler.reset()
    part = LowRank(8) + Sparse(density=0.02)
    module = compress_module(
        nn.Linear(256, 256), part, solved(part, weights((256, 256))), "on_load"
    )
    assert isinstance(module.packed.ready, Factored)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (1, 5):
            x = weights((batch, 256), seed=1)
            torch.testing.assert_close(compiled(x), module(x))


@ALL
def test_exported(policy: Any, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(term, "TILE", 512)
    model = packed_network(policy, index).eval()
    program = torch.export.export(model, (IMAGES,))
    torch.testing.assert_close(program.module()(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", range(len(SCHEMES)))
def test_onnx(index: int, tmp_path: Path) -> None:
    """The dense form, run by onnxruntime."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"needs {name}: pip install lc-compress[onnx]")
    import onnxruntime

    model = to_dense(packed_network("never", index)).eval()
    file = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(model, (IMAGES,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(IMAGES), rtol=1e-4, atol=1e-4)


@ALL
def test_autocast(policy: Any, index: int) -> None:
    model = packed_network(policy, index)
    dense = to_dense(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = model(IMAGES), dense(IMAGES)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    torch.testing.assert_close(found.float(), dense(IMAGES), rtol=0, atol=0.1)
    assert model(IMAGES).dtype == torch.float32


@ALL
def test_gradients(policy: Any, index: int, small_tiles: None) -> None:
    """They reach inputs and biases, and there is nothing else that asks for them."""
    model = packed_network(policy, index)
    dense = to_dense(model)
    assert [n for n, _ in model.named_parameters()] == ["0.bias", "3.bias"]
    grads = []
    for net in (model, dense):
        x = IMAGES.clone().requires_grad_()
        net(x).square().sum().backward()
        grads.append((x.grad, net[0].bias.grad, net[3].bias.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for net in (model, dense):  # where only the biases are trained
        net.zero_grad()
        net(IMAGES).square().sum().backward()
        torch.testing.assert_close(net[0].bias.grad, grads[1][1], rtol=1e-3, atol=1e-3)


def test_first_use_in_inference_mode_serves_training() -> None:
    model = packed_network("on_first_use")
    with torch.inference_mode():
        model(IMAGES)
    assert isinstance(model[3].packed.ready, Dense)
    model(IMAGES.clone().requires_grad_()).sum().backward()


def test_extra_dimensions_and_empty_batches() -> None:
    part = LowRank(8) + Sparse(density=0.02)
    w = weights((256, 256))
    state = solved(part, w)
    dense = part.reconstruct(state)
    for policy in POLICIES:
        module = compress_module(nn.Linear(256, 256, bias=False), part, state, policy)
        for batch in ((), (1,), (2, 1, 3), (0,), (2, 0), (300,)):
            x = weights((*batch, 256), seed=1)
            torch.testing.assert_close(module(x), F.linear(x, dense), rtol=1e-4, atol=1e-4)


def test_training_flag_bias_and_printing() -> None:
    plain = nn.Linear(6, 5).eval()
    module = compress_module(plain, Binary(), solved(Binary(), weights((5, 6))))
    assert not module.training and module.bias is plain.bias
    assert not module.to_dense().training and type(module.to_dense()) is nn.Linear
    assert repr(module.to_dense()) == repr(plain)
    assert "in_features=6, out_features=5, bias=True" in str(module)
    assert "Binary(), shape=(5, 6)" in str(module) and "materialize='never'" in str(module)
    assert module.weight.shape == (5, 6)


# ------------------------------------------------------------------ whole models


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.inner = nn.Linear(8, 8)
        self.again = self.inner  # one module under two names
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.again(self.inner(self.embedding(tokens))))


@pytest.mark.parametrize("policy", POLICIES)
def test_tied_weights_share_their_arrays(policy: Any) -> None:
    torch.manual_seed(0)
    model, tokens = Tied(), torch.tensor([[1, 2, 19]])
    part = Binary(axis=0) + LowRank(1)
    states = {
        name: (part, solved(part, model.get_parameter(name).detach()))
        for name in ("head.weight", "again.weight")
    }
    dense = copy.deepcopy(model)
    dense.head.weight.data = part.reconstruct(states["head.weight"][1])
    dense.embedding.weight = dense.head.weight
    dense.inner.weight.data = part.reconstruct(states["again.weight"][1])
    replace_modules(model, states, policy)
    assert model.embedding.packed is model.head.packed and model.inner is model.again
    torch.testing.assert_close(model(tokens), dense(tokens))
    plain = to_dense(model)
    assert plain.embedding.weight is plain.head.weight and plain.inner is plain.again
    assert torch.equal(plain(tokens), dense(tokens))
    twin = copy.deepcopy(model).to(torch.bfloat16)
    assert twin.embedding.packed is twin.head.packed


def test_meta_models_never_hold_the_weight() -> None:
    reference = packed_network("never")
    with torch.device("meta"):
        model = network()
    arrays = {
        f"{i}.weight": (SCHEMES[0], PackedState(reference[i].packed.arrays())) for i in (0, 3)
    }
    replace_modules(model, arrays)
    assert model[0].bias.is_meta and not any(b.is_meta for b in model.buffers())
    model[0].bias, model[3].bias = reference[0].bias, reference[3].bias
    assert torch.equal(model(IMAGES), reference(IMAGES))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 6)
        self.up = nn.ConvTranspose1d(2, 3, 2)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_cannot_be_packed_gets_dense(device: str, packed: bool) -> None:
    """Recurrent and transposed layers, and joint groups."""
    part = Binary() + Sparse(nonzeros=3)
    shapes: dict[Any, tuple[int, ...]] = {
        "rnn.weight_hh_l0": (18, 6),
        "up.weight": (2, 3, 2),
        ("first.weight", "second.weight"): (18,),
    }
    with torch.device(device):
        model = Mixed()
    states = {names: solved(part, weights(shape)) for names, shape in shapes.items()}
    given = {n: PackedState(pack(part, s)) if packed else s for n, s in states.items()}
    replace_modules(model, {n: (part, s) for n, s in given.items()})
    assert not any(isinstance(m, PackedModule) for m in model.modules())
    for names, state in states.items():
        own = (names,) if isinstance(names, str) else names
        held = torch.cat([model.get_parameter(name).detach().reshape(-1) for name in own])
        assert torch.equal(held, part.reconstruct(state).reshape(-1))
    assert model.rnn.weight_hh_l0.requires_grad


# ------------------------------------------------------------------ third-party parts and codings


@dataclass(frozen=True)
class Halves(Part[Tensor]):
    """A part from outside the library: multiples of one half."""

    def solve(self, w: Tensor, warm: Any, mu: Any, importance: Any) -> Tensor:
        return (w * 2).round().clamp(-100, 100)

    def reconstruct(self, state: Tensor) -> Tensor:
        return state / 2

    def encode(self, state: Tensor) -> dict[str, Field]:
        return {"twice.it": Field((state + 100).long(), Fixed(8))}

    def decode(self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return arrays["twice.it"].to(dtype) - 100

    def ops(self, state: Tensor, positions: int = 1) -> Ops:
        return Ops(0, 0)


@pytest.mark.parametrize("part", [Halves(), Halves() + Sparse(nonzeros=5), Binary() + Halves()])
def test_third_party_parts(part: Part[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(term, "TILE", 256)
    torch.compiler.reset()
    w = weights((30, 20))
    state = solved(part, w)
    plain = nn.Linear(20, 30)
    dense = with_weight(plain, part.reconstruct(state))
    x = weights((4, 20), seed=1)
    for policy in POLICIES:
        module = compress_module(plain, part, state, policy)
        torch.testing.assert_close(module(x), dense(x))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), dense(x))
        twin = pickle.loads(pickle.dumps(module))
        torch.testing.assert_close(twin(x), dense(x))


def test_pickled_opaque_term_in_another_process(tmp_path: Path) -> None:
    part = Sparse(nonzeros=9).then(KMeans(2))
    module = compress_module(nn.Linear(6, 5), part, solved(part, weights((5, 6))))
    torch.save((module, weights((2, 6)), module(weights((2, 6)))), tmp_path / "module.pt")
    code = (
        "import sys, torch; m, x, y = torch.load(sys.argv[1], weights_only=False); "
        "torch.testing.assert_close(m(x), y)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "module.pt"], check=True)


@pytest.mark.parametrize("part", SCHEMES[:3], ids=str)
def test_entropy_coded_arrays_are_decoded_once(part: Part[Any]) -> None:
    w = weights((12, 20))
    state = solved(part, w)
    arrays = {}
    for name, field in part.encode(state).items():
        coding = Entropy(field.coding)
        payload = torch.tensor(list(coding.pack(field.data)), dtype=torch.uint8)
        arrays[name] = Packed(coding, field.data.shape, payload)
    plain = nn.Linear(20, 12)
    module = compress_module(plain, part, PackedState(arrays))
    assert not any(isinstance(t, Opaque) for t in module.packed.terms)
    assert not any(isinstance(x.coding, Entropy) for x in module.packed.arrays().values())
    assert torch.equal(module.packed.dense(), part.reconstruct(state))
    x = weights((3, 20), seed=1)
    torch.testing.assert_close(module(x), F.linear(x, part.reconstruct(state), plain.bias))


# ------------------------------------------------------------------ memory


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
    return importlib.import_module("bench_modules")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("name", ["Binary + Sparse 1 %", "LowRank 64 + Sparse 2 %", "KMeans 8"])
def test_memory_is_little_more_than_the_file(name: str, bench: Any, tmp_path: Path) -> None:
    """A quarter of the experiment's stack, by the limit that it has; measured from outside."""
    part, layers, side = bench.STACKS[name]
    file, tiny = tmp_path / "stack.lc", tmp_path / "tiny.lc"
    bench.save_stack(part, layers // 4, side, file)
    bench.save_stack(part, 2, 64, tiny)
    limit = 1.3 * file.stat().st_size + 4 * term.TILE + 4 * 2**20
    assert bench.growth(file, tiny, layers // 4, side) <= limit
    assert limit < 0.25 * 4 * side**2 * (layers // 4)  # far below the dense weights


def test_experiment(tmp_path: Path) -> None:
    """The script's smoke run writes every row."""
    script = Path(__file__).parents[1] / "experiments" / "bench_modules.py"
    out = tmp_path / "new" / "result.json"
    done = subprocess.run(
        [sys.executable, script, "--smoke", "--out", out],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    result = json.loads(out.read_text(encoding="utf-8"))["result"]
    assert len(result["speed"]) == 2 * 4 * 2 and len(result["memory"]) == 1
    assert len(done.stdout.splitlines()) == 17 and done.stderr == ""
    for row in result["speed"]:
        assert row["never_ratio"] == pytest.approx(row["never_ms"] / row["dense_ms"])


# ------------------------------------------------------------------ errors


def test_errors() -> None:
    state = solved(Binary(), weights((5, 6)))
    with pytest.raises(TypeError, match="not subclasses, got Bilinear"):
        compress_module(nn.Bilinear(2, 3, 4), Binary(), state)
    with pytest.raises(ValueError, match="materialize must be one of"):
        compress_module(nn.Linear(6, 5), Binary(), state, "sometimes")  # type: ignore[arg-type]
    for option in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.* cannot be packed"):
            compress_module(nn.Embedding(5, 6, **option), Binary(), state)
    hooked = nn.Linear(6, 5)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has hooks"):
        compress_module(hooked, Binary(), state)
    for part in (Binary(), Binary(axis=0), LowRank(1), Sparse(nonzeros=2), Halves()):
        with pytest.raises(ValueError, match=r"weights of shape \(7, 6\)"):
            compress_module(nn.Linear(6, 7), part, solved(part, weights((5, 6))))


def test_errors_of_whole_models() -> None:
    entry = Binary(), solved(Binary(), weights((5, 6)))
    with pytest.raises(ValueError, match=r"No parameter named 'fc\.weight'"):
        replace_modules(nn.Sequential(nn.Linear(6, 5)), {"fc.weight": entry})
    with pytest.raises(ValueError, match="cannot be replaced in place: use `compress_module`"):
        replace_modules(nn.Linear(6, 5), {"weight": entry})
    model = Tied()
    tied = Binary(), solved(Binary(), weights((20, 8)))
    with pytest.raises(ValueError, match="under another name"):
        replace_modules(model, {"head.weight": tied, "embedding.weight": tied})
    with pytest.raises(ValueError, match=r"shape \(5, 6\), the model has \(2, 3, 2\)"):
        replace_modules(Mixed(), {"up.weight": entry})


def test_a_refused_replacement_changes_nothing() -> None:
    """A dense write comes before the layer that is refused for its hook."""
    model = Mixed()
    up, hooked = model.up.weight, nn.Linear(6, 5)
    model.hooked = hooked
    hooked.register_forward_hook(lambda *_: None)
    part, before = Binary(), up.detach().clone()
    entries = {
        "up.weight": (part, solved(part, up.detach() + 1)),
        "hooked.weight": (part, solved(part, weights((5, 6)))),
    }
    with pytest.raises(ValueError, match=r"hooked\.weight: Linear has hooks"):
        replace_modules(model, entries)
    assert model.up.weight is up and torch.equal(up, before) and model.hooked is hooked


def test_an_embedding_refuses_indices_out_of_range() -> None:
    plain, part = nn.Embedding(30, 4), KMeans(2)
    packed = compress_module(plain, part, part.project(plain.weight.detach()), "never")
    for index in (30, -1):
        with pytest.raises(IndexError, match="30 rows got indices from"):
            packed(torch.tensor([0, index]))
