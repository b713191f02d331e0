"""docs/format.md is true, and enough to write a reader from: the one in format_reader.py rebuilds
what `load` does, and every table and example of the page holds.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import format_reader as reader
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts_under_test import CASES
from torch import Tensor, nn

from lc_compress import (
    LC,
    NM,
    Binary,
    BlockSparse,
    FixedCodebook,
    Int,
    Joint,
    KernelMatrix,
    KMeans,
    LowRank,
    Matrix,
    Part,
    PowersOfTwo,
    RankSelection,
    ScaledCodebook,
    Sparse,
    Sum,
    Ternary,
    Vector,
    constant,
    each,
)
from lc_compress.binary import BinaryState, TernaryState
from lc_compress.coding import Fixed, Radix, Raw, Support
from lc_compress.codings_json import describe, described, payload_bytes
from lc_compress.entropy import Entropy
from lc_compress.formats import IntState
from lc_compress.nm import GroupSupport
from lc_compress.part import Coding, working
from lc_compress.scaled import ScaledState
from lc_compress.storage import container, load, save, verify
from lc_compress.storage.saving import Compressed, _write
from lc_compress.storage.specs import _plain, built_part, describe_part, known_types
from lc_compress.testing import Case, gaussian, zero
from lc_compress.tiling import BlockSupport, Tiling

PAGE = (Path(__file__).parents[1] / "docs/format.md").read_text(encoding="utf-8")
HALVES = (torch.float16, torch.bfloat16)
ROUNDINGS = 16  # units of rounding in which two orders of a sum over a rank may differ, times ‖w‖


class Holder(nn.Module):
    """A model of one tensor."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)


def blocks(language: str) -> list[str]:
    """The page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def tables(*heading: str) -> list[list[str]]:
    """The cells of the page's table with this heading."""
    lines = PAGE.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line == f"| {' | '.join(heading)} |"]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    raise AssertionError


def same(ours: Tensor, theirs: reader.Tensor) -> bool:
    """The same type, shape and bits, where NaN counts as one number."""
    name = str(ours.dtype).removeprefix("torch.")
    if theirs.dtype != name or theirs.array.shape != tuple(ours.shape):
        return False
    x = ours.detach()
    if "float8" in name:
        x = x.contiguous().view(torch.uint8)
    x = (working(x) if x.is_floating_point() else x).contiguous().numpy()
    y = np.ascontiguousarray(theirs.array)
    if x.dtype != y.dtype:
        return False
    equal = (x.reshape(-1)[:, None].view(np.uint8) == y.reshape(-1)[:, None].view(np.uint8)).all(1)
    return bool((equal | (np.isnan(x) & np.isnan(y)).reshape(-1)).all())


def stored(path: Path, part: Part[Any], state: Any, w: Tensor, entropy: bool = False) -> None:
    """A file of one task."""
    task = Compressed(("w",), (w.shape,), w.dtype, part, part.encode(state))
    with container.writing(path) as writer:
        _write(writer, Holder(w), [task], None, entropy)


def products(part: Part[Any]) -> bool:
    """Whether Δ takes a product of matrices, whose rounding is nobody's."""
    return "LowRank" in str(part) or "RankSelection" in str(part)


def agree(path: Path, part: Part[Any], state: Any, w: Tensor, entropy: bool = False) -> None:
    """The independent reader rebuilds what `load` does."""
    stored(path, part, state, w, entropy)
    ours = load(path, Holder(torch.full_like(w, torch.nan))).w
    theirs = reader.read(path.read_bytes())["w"]
    if not products(part):
        assert same(ours, theirs)
        return
    assert theirs.dtype == str(w.dtype).removeprefix("torch.")
    assert theirs.array.shape == tuple(w.shape)
    allowed = ROUNDINGS * torch.finfo(w.dtype).eps * float(w.double().norm())
    assert np.abs(theirs.array - working(ours.detach()).numpy()).max() <= allowed


# ------------------------------------------------------------------ every part


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.part).replace("torch.", ""))
def test_every_part_is_rebuilt(case: Case, tmp_path: Path, generator: torch.Generator) -> None:
    for kind, shape, entropy in (
        (gaussian, case.shapes[0], False),
        (zero, case.shapes[0], True),
        (gaussian, case.shapes[-1], True),
    ):
        w = kind(shape, generator).float()
        state = case.part.project(w, mu=case.mu)
        agree(tmp_path / "part.lc", case.part, state, w, entropy)


F16 = torch.float16
KERNEL = (4, 6, 2, 3)
COMPOSED: list[tuple[Part[Any], tuple[int, ...]]] = [
    (Binary(axis=0), (5, 7)),
    (Ternary(group=4, value_dtype=F16), (5, 7)),
    (KMeans(300), (20, 30)),
    (FixedCodebook((-0.3, 0.1, 1e6)), (5, 7)),
    (PowersOfTwo(30), (5, 7)),
    (ScaledCodebook((-0.3, 0.1, 0.7), axis=-1), (5, 7)),
    (Int(5, symmetric=False, axis=1, scale="max"), (5, 7)),
    (Int(9, group=4, scale="max"), (5, 7)),
    (LowRank(3, value_dtype=F16), (5, 7)),
    (NM(2, 4, axis=0), (7, 5)),
    (BlockSparse(density=0.4, block=(2, 3)), (5, 7)),
    (Binary() + LowRank(2) + Sparse(density=0.2), (5, 7)),
    (Ternary(axis=0) + KMeans(3) + Sparse(density=0.2, value_dtype=F16), (5, 7)),
    (Sparse(density=0.4).then(KMeans(5)), (5, 7)),
    (Sparse(density=0.4).then(Int(4, axis=0)), (5, 7)),
    (Sparse(density=0.4).then(LowRank(2)), (5, 7)),
    (Sparse(density=0.4).then(Binary(axis=1).then(KMeans(2))), (5, 7)),
    (Sparse(density=0.6).then(Sparse(density=0.3).then(KMeans(2))), (5, 7)),
    (NM(2, 4).then(ScaledCodebook((-1.0, 0.5, 2.0), group=4)), (5, 8)),
    (BlockSparse(density=0.4, axis=0).then(Ternary(axis=1)), (5, 7)),
    (LowRank(2).then(Binary(axis=1).then(KMeans(2))), (5, 7)),
    (LowRank(0).then(KMeans(2)), (5, 7)),
    (RankSelection(0.05, schemes=(Matrix(), KernelMatrix())).then(Int(6)), KERNEL),
    (KMeans(4).then(Int(8)), (5, 7)),
    (Int(4, axis=0).then(KMeans(2)), (5, 7)),
    ((Binary(axis=0) + Sparse(density=0.2)).over(KernelMatrix()), KERNEL),
    (Binary(axis=1).then(KMeans(2)).over(KernelMatrix()), KERNEL),
    (Sparse(density=0.3).then(KMeans(3)).over(KernelMatrix()), KERNEL),
    (Sparse(density=0.3).then(Binary(axis=0).over(KernelMatrix())), KERNEL),
    (NM(2, 4).over(Matrix(2)), KERNEL),
    (Int(3, group=5).over(Vector()), KERNEL),
    (each(Ternary(axis=0), shapes=((5, 3), (4, 5))).over(Vector()), (5, 7)),
    (each(KMeans(3), shapes=((5, 3), (4, 5))) + Sparse(density=0.1), (35,)),
    (each(LowRank(1).then(KMeans(3)), shapes=((5, 3), (4, 5))), (35,)),
    (each(NM(1, 2, axis=0).then(Binary()), shapes=((5, 3), (4, 5))), (35,)),
    (BlockSparse(blocks=3, axis=1, shapes=(torch.Size((5, 3)), torch.Size((4, 5)))), (35,)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, F16], ids=str)
@pytest.mark.parametrize(("part", "shape"), COMPOSED, ids=lambda x: str(x).replace("torch.", ""))
def test_compositions_in_other_types(
    part: Part[Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tmp_path: Path,
    generator: torch.Generator,
) -> None:
    w = gaussian(shape, generator).to(dtype)
    terms = part.parts if isinstance(part, Sum) else ()  # each projects w: any state will do
    state = tuple(term.project(w) for term in terms) or part.project(w, mu=1.0)
    agree(tmp_path / "part.lc", part, state, w)


CODES = torch.tensor([0, 1, 2, 2], dtype=torch.uint8)
SIGNS = torch.tensor([True, False, True, False])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_of_half_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    """Two roundings of given numbers, saturated products, the sign of zeros."""
    path, w = tmp_path / "part.lc", torch.ones(4, dtype=dtype)
    largest, half = torch.finfo(dtype).max, torch.finfo(dtype).eps / 2
    given = FixedCodebook((-1e300, 1 + half + 2**-40, 1e300))
    agree(path, given, given.project(torch.tensor([-9, 1, 1, 9], dtype=dtype)), w)
    scaled, scale = ScaledCodebook((-3.3, 0.7, 1 + half)), torch.tensor([largest / 2], dtype=dtype)
    agree(path, scaled, ScaledState(scale, CODES), w)
    agree(path, scaled, ScaledState(scale / 3, CODES), w)
    numbers = torch.tensor([-7, 7, 3, -1], dtype=torch.int8)
    agree(path, Int(4), IntState(scale, torch.tensor([7]), numbers), w)
    agree(path, Int(4), IntState(torch.tensor([0.1], dtype=dtype), torch.tensor([7]), numbers), w)
    for a in (0.0, -0.3):
        scale = torch.tensor([a], dtype=dtype)
        agree(path, Binary(), BinaryState(scale, SIGNS), w)
        agree(path, Ternary(), TernaryState(scale, numbers.clamp(-1, 1)), w)
    total = Binary() + Ternary() + Binary()
    states = [torch.tensor([x], dtype=dtype) for x in (1.0, half * 1.1, half * 1.1)]
    state = (
        BinaryState(states[0], SIGNS),
        TernaryState(states[1], numbers.clamp(-1, 1)),
        BinaryState(states[2], SIGNS),
    )
    agree(path, total, state, w)


# ------------------------------------------------------------------ whole models


class Net(nn.Module):
    """Tied and uncompressed tensors of every type."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.embedding = nn.Embedding(12, 8)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        for name, x in {
            "wave": torch.randn(3, 2, dtype=torch.complex64),
            "wide_wave": torch.randn(2, dtype=torch.complex128),
            "tiny": torch.randn(5).to(torch.float8_e4m3fn),
            "small": torch.randn(5).abs().to(torch.float8_e5m2),
            "brain": torch.randn(4).bfloat16(),
            "nan": torch.tensor([1.0, torch.nan, -torch.inf, 1e-7]).half(),
            "scalar": torch.randn((), dtype=torch.float64),
            "empty": torch.empty(0, 4),
            "octets": torch.arange(200, dtype=torch.uint8),
            "shorts": torch.tensor([-300, 5], dtype=torch.int64),
            "wide": torch.tensor([-(2**40), seed]),
            "mask": torch.arange(9) % 3 == seed % 3,
            "long": torch.randn(1500),
            "strided": torch.randn(3, 4).T,
        }.items():
            self.register_buffer(name, x)


def same_model(path: Path, model: nn.Module) -> None:
    """The reader's tensors are those of the model."""
    found = reader.read(path.read_bytes())
    state = model.state_dict()
    assert set(found) == set(state)
    for name, x in state.items():
        assert same(x, found[name]), name


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("uncompressed", [None, torch.bfloat16])
def test_models(uncompressed: torch.dtype | None, entropy: bool, tmp_path: Path) -> None:
    path = tmp_path / "net.lc"
    tasks: dict[Any, Part[Any]] = {
        "conv.weight": Binary(axis=0) + Sparse(density=0.05, value_dtype=F16),
        "embedding.weight": KMeans(5),
        Joint("layers.*.weight"): each(Ternary()) + Sparse(density=0.1),
    }
    lc = LC(Net(), tasks, schedule=constant(1.0, 1))
    lc.finalize(calibration=None)
    save(lc, path, uncompressed=uncompressed, entropy=entropy)
    same_model(path, load(path, Net(seed=1)))
    if uncompressed is None:
        same_model(path, lc.model)


def test_a_model_that_is_not_compressed(tmp_path: Path) -> None:
    save(Net(), tmp_path / "net.lc")
    same_model(tmp_path / "net.lc", Net())


# ------------------------------------------------------------------ codings


def examples() -> Iterator[Any]:
    for line in "".join(blocks("coding")).splitlines():
        yield pytest.param(*line.split("   "), id=line[:40])


def as_tensor(data: Any, coding: Coding, shape: tuple[int, ...]) -> Tensor:
    while isinstance(coding, Entropy):
        coding = coding.inner
    dtype = coding.dtype if isinstance(coding, Raw) else torch.int64
    return torch.tensor(data, dtype=dtype).reshape(shape)


@pytest.mark.parametrize(("coding", "shape", "octets", "array"), list(examples()))
def test_examples_of_codings(coding: str, shape: str, octets: str, array: str) -> None:
    """What the page says, the library writes and reads, and the reader reads."""
    ours, lengths = described(json.loads(coding)), tuple(json.loads(shape))
    payload = b"" if octets == "-" else bytes.fromhex(octets)
    x = as_tensor(json.loads(array), ours, lengths)
    if isinstance(ours, Entropy):  # its table is free
        assert len(ours.pack(x)) <= len(payload)
    else:
        assert ours.pack(x) == payload
    assert torch.equal(ours.unpack(payload, x.shape).to(x.dtype), x)
    found = reader.decode(json.loads(coding), payload, lengths)
    assert np.array_equal(found, x.double().numpy()) and found.shape == lengths


def test_every_way_has_an_example() -> None:
    ways: dict[str, set[int]] = {}
    for line in "".join(blocks("coding")).splitlines():
        coding, _, octets, _ = line.split("   ")
        kind = json.loads(coding)
        name = kind[0] if kind[0] != "entropy" else f"entropy {kind[1][0]}"
        first = -1 if octets == "-" else int(octets[:2], 16)
        ways.setdefault(name, set()).add(first)
    documented = {row[0].split('"')[1] for row in tables("coding", "array", "bytes")}
    assert {name.split()[0] for name in ways} == documented
    assert set(reader.RAW) == {
        json.loads(line.split("   ")[0])[1]
        for line in "".join(blocks("coding")).splitlines()
        if line.startswith('["raw"')
    } | {"int32", "int8"}
    assert {-1, 0} < ways["support"] and {0 < w <= 32 for w in ways["support"]} == {True, False}
    assert any(w > 64 for w in ways["support"])
    assert ways["entropy support"] >= {1, 2} and {-1, 0, 1} <= ways["entropy fixed"]


PLAIN = st.sampled_from(
    [
        *map(Raw, (torch.float64, torch.float32, *HALVES, torch.int64, torch.int8, torch.uint8)),
        *map(Fixed, (0, 1, 2, 3, 5, 8, 9, 13, 16, 31)),
        *map(Radix, (2, 3, 5, 6, 7, 16, 17, 200, 256)),
    ]
)


@settings(max_examples=300)
@given(PLAIN, st.booleans(), st.integers(0, 200), st.integers(0, 2**32), st.floats(0, 12))
def test_random_arrays(coding: Coding, entropy: bool, count: int, seed: int, skew: float) -> None:
    g = torch.Generator().manual_seed(seed)
    if isinstance(coding, Raw) and coding.dtype.is_floating_point:
        x = (torch.randn(count, generator=g) * 2**-skew).to(coding.dtype)
    else:
        limit = coding.base if isinstance(coding, Radix) else 2 ** getattr(coding, "width", 7)
        x = (torch.rand(count, generator=g).double() ** skew * limit).long().clamp(0, limit - 1)
    whole = Entropy(coding) if entropy else coding
    payload = whole.pack(x)
    data = describe(whole)
    assert reader.known_length(data, count) == payload_bytes(whole, x.shape)
    found = reader.decode(data, payload, (count,))
    assert np.array_equal(found, coding.unpack(coding.pack(x), x.shape).double().numpy())


@settings(max_examples=200)
@given(st.integers(0, 400), st.floats(0, 1), st.integers(0, 2**32), st.booleans(), st.booleans())
def test_random_positions(
    size: int, density: float, seed: int, entropy: bool, clustered: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randperm(size, generator=g)[: round(density * size)]
    if clustered and size:
        x = torch.unique(x // 7 + torch.randint(0, 2, x.shape, generator=g) * (size - size // 7))
        x = x[x < size]
    x = x.sort().values
    coding = Entropy(Support(size)) if entropy else Support(size)
    found = reader.decode(describe(coding), coding.pack(x), tuple(x.shape))
    assert found.tolist() == x.tolist()


GROUPS = [
    ((4, 6), 2, 4, -1),
    ((4, 6), 2, 4, 0),
    ((5, 3, 7), 3, 5, 1),
    ((9,), 1, 2, 0),
    ((3, 70), 31, 66, 1),
]


@pytest.mark.parametrize(("shape", "n", "m", "axis"), GROUPS)
def test_random_groups(
    shape: tuple[int, ...], n: int, m: int, axis: int, generator: torch.Generator
) -> None:
    """Full groups, and groups of which one is not."""
    for _ in range(20):
        x = NM(n, m, axis).project(torch.randn(shape, generator=generator)).positions
        for positions in (x, x[1:]):
            coding = GroupSupport(shape, n, m, axis)
            found = reader.decode(describe(coding), coding.pack(positions), tuple(positions.shape))
            assert found.tolist() == positions.tolist()


TILINGS = [
    ((6, 4), Tiling(axis=0)),
    ((6, 4, 3), Tiling(axis=-2)),
    ((6, 4), Tiling(block=(2, 2))),
    ((7, 5, 2), Tiling(block=(3, 4))),
    ((30,), Tiling(axis=1, shapes=(torch.Size((3, 4)), torch.Size((3, 6))))),
    ((30,), Tiling(block=(2, 2), shapes=(torch.Size((3, 4)), torch.Size((9, 2))))),
]


@pytest.mark.parametrize(("shape", "tiling"), TILINGS)
def test_random_blocks(shape: tuple[int, ...], tiling: Tiling, generator: torch.Generator) -> None:
    coding = BlockSupport(shape, tiling)
    count = tiling.sizes(torch.Size(shape)).numel()
    for density in (0.0, 0.3, 0.6, 1.0):
        kept = torch.rand(count, generator=generator) < density
        x = tiling.spread(kept, torch.Size(shape)).reshape(-1).nonzero()[:, 0]
        assert reader.decode(describe(coding), coding.pack(x), tuple(x.shape)).tolist() == (
            x.tolist()
        )


def test_many_symbols(generator: torch.Generator) -> None:
    """Enough for several states; the last row of them is not full."""
    count = 2**17 + 5
    x = torch.randn(count, generator=generator).mul(2).round().long().clamp(-8, 7) + 8
    coding = Entropy(Fixed(4))
    payload = coding.pack(x)
    assert payload[0] == 1
    assert reader.decode(describe(coding), payload, (count,)).tolist() == x.tolist()


# ------------------------------------------------------------------ the page's tables


def test_arguments_and_defaults() -> None:
    """Every type, every argument and its default, as the classes have them."""
    known = known_types()
    rows = {row[0].strip("`"): row[1] for row in tables("type", "arguments")}
    assert set(rows) == set(known)
    for name, cls in known.items():
        said = dict(re.findall(r"`(\w+)`(?:\*\*)? (.+?)(?:, (?=\*|`)|$)", rows[name]))
        truth = {
            f.name: "needed" if f.default is MISSING else _plain(f.default, cls, f.name)
            for f in fields(cls)
            if f.init
        }
        assert said.keys() == truth.keys(), name
        for argument, default in truth.items():
            found = said[argument] if default == "needed" else json.loads(said[argument])
            assert found == default, f"{name}.{argument}"
        if name in reader.PARTS:
            assert reader.PARTS[name][0] == set(truth), name


def test_arguments_that_change_how_a_file_is_read() -> None:
    """The reader looks at those in bold, and only at those."""
    source = Path(reader.__file__).read_text(encoding="utf-8")
    rows = " ".join(row[1] for row in tables("type", "arguments"))
    bold = set(re.findall(r"\*\*`(\w+)`\*\*", rows))
    looked_at = set(re.findall(r'(?:part|view|outer|inner)(?:\[|\.get\()"(\w+)"', source))
    assert looked_at - {"type"} == bold


def test_fields_of_parts() -> None:
    """Names, codings, and which fields have an entry per weight."""
    sparse = ["Sparse", "SparsePenalty", "L1Ball", "L1Penalty", "NM"]
    sparse += ["BlockSparse", "BlockPenalty", "GroupL2Penalty"]
    said: dict[str, dict[str, tuple[str, bool, bool]]] = {}
    for types, field, _, coding, per_weight in tables(
        "type", "field", "shape", "coding", "per weight"
    ):
        names = sparse if types == "all eight of these" else re.findall(r"`(\w+)`", types)
        for name in names:
            key = field.split("`")[1]
            said.setdefault(name, {})[key] = (coding.split()[0], per_weight == "yes", "," in field)
    composed = {"Sum", "Then", "QuantizedThenPruned", "Over", "Each"}
    leaves = {*known_types()} - composed - {"Vector", "Matrix", "KernelMatrix"}
    assert set(said) == leaves
    seen = set()
    for case in CASES:
        name = type(case.part).__name__
        if name not in said:
            continue
        seen.add(name)
        w = gaussian(case.shapes[0], torch.Generator().manual_seed(0)).float()
        encoded = case.part.encode(case.part.project(w, mu=case.mu))
        needed = {key for key, (_, _, optional) in said[name].items() if not optional}
        assert needed <= set(encoded) <= set(said[name])
        for key, field in encoded.items():
            kind, per_weight, _ = said[name][key]
            assert describe(field.coding)[0] == kind
            assert field.per_weight == per_weight == (reader.PER_WEIGHT.get(name) == key)
    assert seen == leaves


def test_parts_in_json() -> None:
    for text in blocks("json"):
        assert describe_part(built_part(json.loads(text), known_types())) == json.loads(text)


# ------------------------------------------------------------------ a whole file


def whole_file() -> bytes:
    (dump,) = blocks("file")
    lines = [line.split("  ") for line in dump.splitlines()]
    assert [int(at, 16) for at, _ in lines] == list(range(0, 16 * len(lines), 16))
    return b"".join(bytes.fromhex(octets) for _, octets in lines)


class Example(nn.Module):
    """The model of the page's file."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 3))
        self.b = nn.Parameter(torch.zeros(2))


def test_the_whole_file(tmp_path: Path) -> None:
    data, path = whole_file(), tmp_path / "page.lc"
    path.write_bytes(data)
    (text,), (tensors,), (template,) = blocks("index"), blocks("tensors"), blocks("header")
    index, payload, checksums = reader.opened(data)
    assert index == json.loads(text) and len(payload) == 13
    assert checksums == [zlib.crc32(payload[:9]), zlib.crc32(payload[9:])]
    p, i = len(payload), len(data) - 208 - len(payload)
    filled = template.strip().replace("[P]", f"[{p}]").replace("[I]", f"[{i}]")
    filled = filled.replace("[0,P]", f"[0,{p}]").replace("[P,P+I]", f"[{p},{p + i}]")
    assert data[:208] == (200).to_bytes(8, "little") + filled.encode().ljust(200)
    model = load(path, Example())
    assert verify(path) == 2
    found = reader.read(data)
    for name, values in json.loads(tensors).items():
        assert found[name].array.tolist() == model.state_dict()[name].tolist() == values
        assert same(model.state_dict()[name], found[name])


def test_its_checksum() -> None:
    assert "`123456789` it is 0xcbf43926" in PAGE and zlib.crc32(b"123456789") == 0xCBF43926


def test_every_flipped_byte_and_every_truncation_is_refused() -> None:
    data = whole_file()
    for i in range(len(data)):
        for mask in (1, 128):
            with pytest.raises(reader.Refused):
                reader.read(data[:i] + bytes([data[i] ^ mask]) + data[i + 1 :])
        with pytest.raises(reader.Refused):
            reader.read(data[:i])
    with pytest.raises(reader.Refused):
        reader.read(data + b"\0")


def rewritten(
    index: Any, payload: bytes, sizes: list[int], level: int, indent: int | None
) -> bytes:
    """A file by another writer, from section 1 of the page."""
    deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
    text = json.dumps(index, indent=indent, ensure_ascii=False)
    packed, at = deflate.compress(text.encode()) + deflate.flush(), 0
    for size in sizes:
        packed += zlib.crc32(payload[at : at + size]).to_bytes(4, "little")
        at += size
    packed += zlib.crc32(packed).to_bytes(4, "little")
    return reader.header(len(payload), len(packed)) + payload + packed


def other() -> tuple[Any, bytes, list[int]]:
    """The page's file in other codings and another order: index, payload, bytes of the records."""
    index, _, _ = reader.opened(whole_file())
    task = index["tensors"][0]
    task["fields"] = [
        ["1.values", ["raw", "float64"], [1]],
        ["1.positions", ["support", 6], [1], 2],
        ["0.positive", ["entropy", ["fixed", 1]], [2, 3], 2],
        ["0.scale", ["raw", "float16"], [1]],
    ]
    index = {key: index[key] for key in reversed(index)}
    values = np.array([1.5], "<f8").tobytes() + bytes([0, 1 << 4, 0, 0x35])
    return index, values + np.array([0.5, 1, -2], "<f2").tobytes(), [14, 4]


@pytest.mark.parametrize(("level", "indent"), [(0, None), (1, 1), (9, 4)])
def test_files_of_other_writers(level: int, indent: int | None, tmp_path: Path) -> None:
    """All that the page leaves to a writer: `load` reads it."""
    data, path = rewritten(*other(), level, indent), tmp_path / "other.lc"
    path.write_bytes(data)
    model, found = load(path, Example()), reader.read(data)
    for name, values in json.loads(blocks("tensors")[0]).items():
        assert found[name].array.tolist() == model.state_dict()[name].tolist() == values


def test_limits() -> None:
    """What the reader refuses though all checksums are right."""
    good = rewritten(*other(), 9, None)
    assert set(reader.read(good)) == {"w", "b"}
    huge = [10**6, 10**6]
    for path, value in (
        (("version",), 2),
        (("version",), True),
        (("more",), 1),
        (("tensors", 0, "more"), 1),
        (("tensors", 0, "shapes"), [[2, 2**62]]),
        (("tensors", 0, "shapes"), [huge]),
        (("tensors", 0, "part"), 1),
        (("tensors", 0, "dtype"), "int64"),
        (("tensors", 0, "names"), ["b"]),
        (("tensors", 0, "fields", 3, 0), "0.more"),
        (("tensors", 0, "fields", 3, 0), "0.positive"),
        (("tensors", 0, "fields", 3, 2), [True]),
        (("tensors", 0, "fields", 3, 1), ["raw", "int16"]),
        (("tensors", 0, "fields", 1, 1), ["support", 3]),
        (("tensors", 0, "fields", 1, 3), 3),
        (("parts", 0, "parts", 1, "type"), "Dense"),
        (("parts", 0, "parts", 1, "more"), 1),
        (("rest", 0, 1, 0), ["b", "uint8", ["fixed", 0], huge]),
        (("rest", 0, 1, 0, 1), "float128"),
        (("rest", 0, 0), 1),
        (("aliases", "c"), "a"),
        (("aliases", "b"), "w"),
    ):
        index, payload, sizes = other()
        inner = index
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        with pytest.raises(reader.Refused):
            reader.read(rewritten(index, payload, sizes, 9, None))


def with_index(text: bytes) -> bytes:
    """A file without records."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = deflate.compress(text) + deflate.flush()
    packed += zlib.crc32(packed).to_bytes(4, "little")
    return reader.header(0, len(packed)) + packed


def test_texts_of_the_index() -> None:
    good = '{"version": 1, "parts": [], "tensors": [], "rest": [], "aliases": {}}'
    assert reader.read(with_index(good.encode())) == {}
    assert reader.read(with_index((" " * 1_000_000 + good).encode())) == {}
    for text in (
        " " * 3_000_000 + good,  # far longer than deflated
        good[:-1],
        f"[{good}]",
        good.replace("[]", "[NaN]", 1),
        good.replace('"parts"', '"parts": [], "parts"'),
        "\ufeff" + good,
    ):
        with pytest.raises(reader.Refused):
            reader.read(with_index(text.encode()))
    with pytest.raises(reader.Refused):
        reader.read(with_index(good.encode("utf-16")))


def test_the_reader_stands_alone() -> None:
    imports = re.findall(
        r"^(?:import|from) (\w+)", Path(reader.__file__).read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(imports) == {
        *("__future__", "collections", "dataclasses", "json", "math", "re", "struct", "typing"),
        *("numpy", "zlib"),
    }
