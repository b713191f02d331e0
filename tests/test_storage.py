"""The packed file: what is stored is what is counted and what is read; damage is never silent."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts_under_test import CASES
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lc_compress import (
    LC,
    NM,
    Binary,
    FixedCodebook,
    Int,
    Joint,
    KMeans,
    LowRank,
    Matrix,
    PowersOfTwo,
    RankSelection,
    ScaledCodebook,
    Sparse,
    Ternary,
    constant,
    each,
    modules,
)
from lc_compress.__main__ import main
from lc_compress.codings_json import described
from lc_compress.part import Field, Part
from lc_compress.storage import FormatError, container, inspect, load, save, tiles, to_dense, verify
from lc_compress.storage.records import PackedFile
from lc_compress.storage.saving import Compressed, _write
from lc_compress.storage.specs import built_part, describe_part, known_types
from lc_compress.testing import Case, gaussian, zero


class Holder(nn.Module):
    """A model of one tensor."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)


class Net(nn.Module):
    """A little of everything: convolution, BatchNorm, linear layers of which two are tied."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.embedding = nn.Embedding(12, 8)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.arange(5) % 2 == 0)


TASKS: dict[Any, Part[Any]] = {
    "conv.weight": Binary(axis=0) + Sparse(density=0.05, value_dtype=torch.float16),
    "fc.weight": LowRank(2) + Sparse(nonzeros=3),
    "embedding.weight": KMeans(5),
}


def compressed(tasks: dict[Any, Part[Any]] | None = None) -> LC:
    lc = LC(Net(), tasks or TASKS, schedule=constant(1.0, 1))
    lc.finalize(calibration=None)
    return lc


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "net.lc"
    save(compressed(), path)
    return path


def written(path: Path, part: Part[Any], w: Tensor, mu: float | None) -> Any:
    """One task in a file; its state."""
    state = part.project(w, mu=mu)
    task = Compressed(("w",), (w.shape,), w.dtype, part, part.encode(state))
    with container.writing(path) as writer:
        _write(writer, Holder(w), [task], None, False)
    return state


# ------------------------------------------------------------------ what is stored


@pytest.mark.parametrize("tile", [1, 20])
@pytest.mark.parametrize(
    "part",
    [
        *(Binary(), Binary(axis=0), Binary(axis=1), Binary(group=5), Ternary(axis=-2)),
        *(KMeans(3), FixedCodebook((-1, 0, 0.5)), PowersOfTwo(2), ScaledCodebook((-1, 2), axis=0)),
        *(Int(4, axis=0), Int(3, symmetric=False), Int(3, axis=0, symmetric=False), Int(9)),
        Binary(axis=0) + Sparse(density=0.1) + NM(1, 4),
        Sparse(density=0.1) + Binary(),
        Binary() + LowRank(1) + Sparse(nonzeros=3),
    ],
    ids=str,
)
def test_loading_a_few_rows_at_a_time(
    part: Part[Any],
    tile: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    monkeypatch.setattr(tiles, "TILE", tile)
    w = torch.randn(13, 4, 2, generator=generator)
    w = w.flatten(1) if "LowRank" in str(part) else w
    delta = part.reconstruct(written(tmp_path / "x.lc", part, w, None))
    loaded = load(tmp_path / "x.lc", Holder(torch.full_like(w, torch.nan)))
    assert torch.equal(loaded.w, delta)
    turned = torch.full_like(w, torch.nan).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(load(tmp_path / "x.lc", Holder(turned)).w, delta)


@pytest.mark.parametrize("kind", [gaussian, zero], ids=["gaussian", "zero"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.part).replace("torch.", ""))
def test_every_part_is_on_disk_to_the_bit(
    case: Case, kind: Any, tmp_path: Path, generator: torch.Generator
) -> None:
    path = tmp_path / "part.lc"
    w = kind(case.shapes[0], generator).float()
    state = written(path, case.part, w, case.mu)
    delta, fields = case.part.reconstruct(state), case.part.encode(state)
    row = inspect(path).rows[0]
    counted = [field.coding.bits(field.data) for field in fields.values()]
    assert sum(counted) == case.part.bits(state)
    assert row.bytes == sum(-(-bits // 8) for bits in counted)
    assert 0 <= 8 * row.bytes - sum(counted) < 8 * len(fields)
    loaded = load(path, Holder(torch.full_like(w, torch.nan)))
    assert torch.equal(loaded.w, delta)
    assert verify(path) == 1


def test_the_rows_add_up_to_the_file(saved: Path) -> None:
    report = inspect(saved)
    rows = (*report.rows, report.uncompressed, report.header)
    assert sum(row.bytes for row in rows) == report.total.bytes == saved.stat().st_size
    assert report.total.weights == sum(row.weights for row in rows)
    by_name = {row.name: row for row in report.rows}
    assert set(by_name) == {"conv.weight", "embedding.weight", "fc.weight"}
    assert by_name["embedding.weight"].weights == 96  # tied: once
    assert json.loads(report.json())["rows"][-1]["bytes"] == report.total.bytes
    lc = compressed()
    for row in lc.report().rows:
        assert 0 <= 8 * by_name[row.name].bytes - row.bits < 8 * 4


def test_a_report_on_screen(saved: Path) -> None:
    text = str(inspect(saved))
    assert "conv.weight" in text and "uncompressed" in text and "header" in text
    assert f"{saved.stat().st_size:,}" in text.splitlines()[-1]


def test_the_whole_model_comes_back(saved: Path) -> None:
    lc = compressed()
    model = load(saved, Net(seed=1))
    for name, x in lc.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], x), name
        assert model.state_dict()[name].dtype == x.dtype
    assert model.head.weight is model.embedding.weight


def test_a_plain_model_is_stored_too(tmp_path: Path) -> None:
    model = Net()
    save(model, tmp_path / "plain.lc")
    loaded = load(tmp_path / "plain.lc", Net(seed=1))
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in loaded.state_dict().items())
    assert inspect(tmp_path / "plain.lc").rows == ()


def test_safetensors_can_open_it(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        assert file.keys() == ["index", "payload"] or set(file.keys()) == {"index", "payload"}
        assert file.metadata() == {"lc_compress": "1"}
        index = zlib.decompressobj(-15).decompress(file.get_tensor("index").numpy().tobytes())
    assert json.loads(index)["version"] == 1


def test_joint_tasks(tmp_path: Path) -> None:
    tasks: dict[Any, Part[Any]] = {
        Joint("re:(conv|fc).weight"): each(Binary()) + Sparse(density=0.1)
    }
    lc = compressed(tasks)
    save(lc, tmp_path / "joint.lc")
    model = load(tmp_path / "joint.lc", Net(seed=1))
    assert torch.equal(model.conv.weight, lc.model.conv.weight)
    assert torch.equal(model.fc.weight, lc.model.fc.weight)
    assert verify(tmp_path / "joint.lc") == inspect(tmp_path / "joint.lc").rows.__len__() + 5


def test_rest_in_half_precision_and_small_integers(tmp_path: Path) -> None:
    lc = compressed()
    model = lc.model
    model.bn.num_batches_tracked.fill_(70_000)
    save(lc, tmp_path / "half.lc", uncompressed=torch.float16)
    save(lc, tmp_path / "full.lc")
    half, full = (inspect(tmp_path / name).uncompressed for name in ("half.lc", "full.lc"))
    floats = 8 + 4 * 8 + 8
    assert full.bytes - half.bytes == 2 * floats
    assert full.bytes == 4 * floats + 4 + 1  # 70 000 in 32 bits, five bools in a byte
    loaded = load(tmp_path / "half.lc", Net(seed=1))
    assert torch.equal(loaded.bn.num_batches_tracked, model.bn.num_batches_tracked)
    assert torch.equal(loaded.mask, model.mask)
    assert torch.equal(loaded.fc.bias, model.fc.bias.half().float())
    assert torch.equal(loaded.fc.weight, model.fc.weight)  # θ is not rounded


def test_entropy_coded_files(tmp_path: Path) -> None:
    """Smaller, and the same model; a constant takes next to nothing and is read all the same."""
    model = nn.Module()
    model.register_buffer("constant", torch.ones(300_000))
    model.register_buffer("few", torch.arange(5000) % 3)
    model.layer = nn.Linear(200, 200)
    lc = LC(model, {"layer.weight": KMeans(4) + Sparse(density=0.02)}, schedule=constant(1.0, 1))
    lc.finalize()
    sizes = []
    for entropy in (False, True):
        path = tmp_path / f"{entropy}.lc"
        save(lc, path, entropy=entropy)
        sizes.append(path.stat().st_size)
        again = nn.Module()
        again.register_buffer("constant", torch.zeros(300_000))
        again.register_buffer("few", torch.zeros(5000, dtype=torch.int64))
        again.layer = nn.Linear(200, 200)
        load(path, again)
        for name, x in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], x), name
        assert verify(path) == 3
        assert inspect(path).total.bytes == sizes[-1]
    assert sizes[1] < sizes[0] - 1_190_000


def test_unusual_tensors(tmp_path: Path) -> None:
    def make(fill: bool) -> nn.Module:
        model = nn.Module()
        values = {
            "wave": torch.randn(3, 2, dtype=torch.complex64),
            "tiny": torch.randn(5).to(torch.float8_e4m3fn),
            "brain": torch.randn(4).bfloat16(),
            "scalar": torch.randn((), dtype=torch.float64),
            "empty": torch.empty(0, 4),
            "octets": torch.arange(200, dtype=torch.uint8),
            "wide": torch.tensor([-(2**40), 5]),
            "mask": torch.full((2, 2), -torch.inf),
            "lasting": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        }
        for name, x in values.items():
            model.register_buffer(name, x if fill else torch.zeros_like(x))
        return model

    torch.manual_seed(0)
    model = make(fill=True)
    save(model, tmp_path / "odd.lc")
    loaded = load(tmp_path / "odd.lc", make(fill=False))
    for name, x in model.state_dict().items():
        y = loaded.state_dict()[name]
        assert y.dtype == x.dtype and y.shape == x.shape
        assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (x, y)))
    assert loaded.lasting.is_contiguous(memory_format=torch.channels_last)


def test_other_dtypes_and_devices_of_the_model(saved: Path) -> None:
    half = load(saved, Net(seed=1).bfloat16())
    assert torch.equal(half.fc.weight, compressed().model.fc.weight.bfloat16())
    with torch.device("meta"):
        model = Net()
    load(saved, model)
    assert not any(x.is_meta for x in model.state_dict().values())
    assert model.head.weight is model.embedding.weight
    assert isinstance(model.fc.weight, nn.Parameter) and model.fc.weight.requires_grad
    assert torch.equal(model.fc.weight, compressed().model.fc.weight)


def test_dense_file(saved: Path, tmp_path: Path) -> None:
    to_dense(saved, tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    state = compressed().model.state_dict()
    assert set(dense) == set(state)
    assert all(
        torch.equal(dense[name], x) and dense[name].dtype == x.dtype for name, x in state.items()
    )


# ------------------------------------------------------------------ packed layers

POLICIES = ("never", "on_load", "on_first_use")


def forward(model: Net, images: Tensor, words: Tensor) -> Tensor:
    hidden = model.bn(model.conv(images)).mean((2, 3)) + model.embedding(words)
    out: Tensor = model.head(model.fc(hidden))
    return out


@pytest.mark.parametrize("materialize", POLICIES)
@pytest.mark.parametrize("meta", [False, True])
def test_packed_layers_compute_the_same(
    materialize: Any, meta: bool, saved: Path, generator: torch.Generator
) -> None:
    dense = load(saved, Net(seed=1)).eval()
    with torch.device("meta" if meta else "cpu"):
        model = Net(seed=1).eval()
    load(saved, model, materialize=materialize)
    kinds = [type(getattr(model, n)) for n in ("conv", "fc", "embedding", "head")]
    assert kinds == [modules.Conv2d, modules.Linear, modules.Embedding, modules.Linear]
    assert model.head.packed is model.embedding.packed
    images = torch.randn(3, 3, 6, 6, generator=generator)
    words = torch.tensor([1, 0, 11])
    torch.testing.assert_close(forward(model, images, words), forward(dense, images, words))
    assert not any(x.is_meta for x in model.state_dict().values())


@pytest.mark.parametrize("materialize", POLICIES)
def test_packed_layers_are_saved_again(materialize: Any, saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.lc"
    save(load(saved, Net(seed=1), materialize=materialize), again)
    rows = [{(r.name, r.parts, r.bytes) for r in inspect(path).rows} for path in (saved, again)]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    assert verify(again) == verify(saved)
    first, second = load(saved, Net(seed=1)).state_dict(), load(again, Net(seed=2)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_packed_layers_where_the_model_differs(saved: Path) -> None:
    model = Net(seed=1)
    model.head.weight = nn.Parameter(torch.zeros(12, 8))  # tied in the file only
    load(saved, model, materialize="never")
    assert type(model.head) is nn.Linear
    assert torch.equal(model.head.weight, model.embedding.weight)
    with pytest.raises(ValueError, match=r"is torch\.float32 in .* torch\.bfloat16 in the model"):
        load(saved, Net().bfloat16(), materialize="never")
    with pytest.raises(ValueError, match="materialize must be"):
        load(saved, Net(), materialize="always")  # type: ignore[arg-type]


def test_joint_tasks_are_dense_in_layers(tmp_path: Path) -> None:
    lc = compressed({Joint("re:(conv|fc).weight"): each(Binary()) + Sparse(density=0.1)})
    save(lc, tmp_path / "joint.lc")
    model = load(tmp_path / "joint.lc", Net(seed=1), materialize="never")
    assert type(model.fc) is nn.Linear
    assert torch.equal(model.fc.weight, lc.model.fc.weight)


# ------------------------------------------------------------------ parts as data


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.part).replace("torch.", ""))
def test_specs(case: Case) -> None:
    spec = json.loads(json.dumps(describe_part(case.part)))
    again = built_part(spec, known_types())
    assert describe_part(again) == describe_part(case.part)
    if "function" not in json.dumps(spec):
        assert again == case.part


def price(rank: int, rows: int, columns: int) -> float:
    return float(rank)


def test_functions_are_named_not_stored() -> None:
    part = built_part(describe_part(RankSelection(0.1, cost=price)), known_types())
    assert "price" in str(part)
    with pytest.raises(RuntimeError, match="price"):
        part.project(torch.randn(3, 4), mu=1.0)


@dataclass(frozen=True)
class Custom(Part[Any]):
    """A part of somebody else: Binary in other clothes."""

    flavour: str = "plain"

    def solve(self, w: Tensor, warm: Any, mu: float | None, importance: Tensor | None) -> Any:
        return Binary().solve(w, None, mu, importance)

    def reconstruct(self, state: Any) -> Tensor:
        return Binary().reconstruct(state)

    def encode(self, state: Any) -> dict[str, Field]:
        return Binary().encode(state)

    def decode(self, arrays: Any, shape: torch.Size, dtype: torch.dtype) -> Any:
        return Binary().decode(arrays, shape, dtype)

    def ops(self, state: Any, positions: int = 1) -> Any:
        return Binary().ops(state, positions)


def test_third_party_parts_by_class_only(tmp_path: Path) -> None:
    path = tmp_path / "custom.lc"
    w = torch.randn(4, 6)
    written(path, Custom("sweet"), w, None)
    for read in (inspect, verify, lambda path: load(path, Holder(w.clone()))):
        with pytest.raises(FormatError, match="Custom"):
            read(path)
    assert inspect(path, parts=[Custom]).rows[0].parts == "Custom(flavour=sweet)"
    assert verify(path, parts=[Custom]) == 1
    loaded = load(path, Holder(torch.zeros(4, 6)), parts=[Custom])
    assert torch.equal(loaded.w, Binary().reconstruct(Binary().project(w)))
    with pytest.raises(TypeError, match="dataclass"):
        inspect(path, parts=[int])


# ------------------------------------------------------------------ refused


def test_models_that_do_not_fit(saved: Path) -> None:
    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)
            del self.fc

    with pytest.raises(ValueError, match=r"lacks extra\.bias, extra\.weight, and has fc\.bias"):
        load(saved, Other())
    model = Net()
    model.fc = nn.Linear(8, 9)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"fc\.weight has shape \(8, 8\) there, \(9, 8\)"):
        load(saved, model)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    model = Net()
    model.head.weight = nn.Parameter(torch.zeros(12, 8))
    assert torch.equal(load(saved, model).head.weight, model.embedding.weight)  # tied there only


def test_tied_here_but_not_there(tmp_path: Path) -> None:
    model = Net()
    model.head.weight = nn.Parameter(torch.zeros(12, 8))
    save(model, tmp_path / "untied.lc")
    with pytest.raises(ValueError, match="one tied tensor in the model"):
        load(tmp_path / "untied.lc", Net())


def _as_before(model: nn.Module) -> Callable[[], None]:
    """Asserts that a model has the modules, tensors and values that it has now."""
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = model.state_dict(keep_vars=True)
    values = {name: x.detach().clone() for name, x in tensors.items()}

    def compare() -> None:
        now = dict(model.named_modules(remove_duplicate=False))
        assert now.keys() == modules.keys() and all(now[n] is modules[n] for n in now)
        found = model.state_dict(keep_vars=True)
        assert found.keys() == tensors.keys() and all(found[n] is tensors[n] for n in found)
        assert all(torch.equal(x, values[n]) for n, x in found.items())

    return compare


def _late_dtype(model: Net) -> None:
    model.embedding.weight.data = model.embedding.weight.data.double()


def _late_hook(model: Net) -> None:
    model.embedding.register_forward_hook(lambda *_: None)


def _late_option(model: Net) -> None:
    model.embedding.max_norm = 1.0


def _late_kind(model: Net) -> None:
    model.mask = torch.zeros(5)


def _late_memory(model: Net) -> None:
    model.bn.running_var = torch.ones(1).expand(8)


@pytest.mark.parametrize("materialize", [None, *POLICIES])
@pytest.mark.parametrize(
    ("change", "cause", "dense"),
    [
        (_late_dtype, "embedding.weight is torch.float32", False),
        (_late_hook, "embedding.weight: Embedding has hooks", False),
        (_late_option, "embedding.weight: Embedding with max_norm=1.0", False),
        (_late_kind, "mask is torch.bool .* torch.float32 here", True),
        (_late_memory, "bn.running_var is an expanded tensor", True),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(
    change: Callable[[Net], None], cause: str, dense: bool, materialize: Any, saved: Path
) -> None:
    """What the last layer is refused for is found before the first is changed."""
    model = Net(seed=1)
    change(model)
    if materialize is None and not dense:
        load(saved, model)
        return
    unchanged = _as_before(model)
    with pytest.raises(ValueError, match=cause):
        load(saved, model, materialize=materialize)
    unchanged()


@pytest.mark.parametrize("materialize", POLICIES)
def test_forged_bytes_leave_the_model_as_it_was(
    materialize: Any, saved: Path, tmp_path: Path
) -> None:
    file = PackedFile(saved, known_types())
    start, body = container._START, saved.read_bytes()
    payload = bytearray(body[start : start + file._reader.payload])
    (record,) = (r for r in file.records if r.names == ("embedding.weight",))
    assert record.number > 0
    at = record.offset
    for field in record.fields:
        if field.name == "codes":
            payload[at : at + field.bytes] = b"\xff" * field.bytes
        at += field.bytes
    forged(saved, tmp_path / "bad.lc", lambda index: None, bytes(payload))
    model = Net(seed=1)
    unchanged = _as_before(model)
    with pytest.raises(FormatError, match=r"embedding\.weight: the stored bytes are no"):
        load(tmp_path / "bad.lc", model, materialize=materialize)
    unchanged()


@pytest.mark.parametrize("materialize", POLICIES)
def test_a_compressed_buffer_is_dense_in_every_policy(materialize: Any, saved: Path) -> None:
    model = Net(seed=1)
    weight = model.fc.weight.detach()
    del model.fc.weight
    model.fc.register_buffer("weight", weight)
    load(saved, model, materialize=materialize)
    assert type(model.fc) is nn.Linear and type(model.conv) is not nn.Conv2d
    assert torch.equal(model.fc.weight, load(saved, Net(seed=2)).fc.weight)


def test_runs_that_are_not_finished(tmp_path: Path) -> None:
    path = tmp_path / "x.lc"
    lc = LC(Net(), TASKS, schedule=constant(1.0, 1))
    with pytest.raises(RuntimeError, match="BatchNorm"):
        save(lc, path)
    with lc.compressed(calibration=None):
        save(lc, path)
    assert torch.equal(load(path, Net()).fc.weight, lc.tasks[1].delta[0])
    path.unlink()
    lc.finalize(calibration=None)
    with torch.no_grad():
        lc.model.fc.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"fc\.weight was changed"):
        save(lc, path)
    assert not path.exists()


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "x.lc"
    with pytest.raises(TypeError, match="a module, got dict"):
        save({}, path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"float16, bfloat16, float32 or None, got torch\.int8"):
        save(Net(), path, uncompressed=torch.int8)
    with pytest.raises(FileNotFoundError, match="no folder"):
        save(Net(), tmp_path / "nowhere" / "x.lc")
    model = Net()
    model.bn.running_var.fill_(1e6)
    with pytest.raises(ValueError, match=r"8 of 8 values of bn\.running_var are too large"):
        save(model, path, uncompressed=torch.float16)
    with pytest.raises(ValueError, match="meta"):
        save(Net().to("meta"), path)

    class Extra(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(ValueError, match="_extra_state is a dict"):
        save(Extra(), path)
    lc = compressed()
    lc.tasks[1].state[0].left[0, 0] = torch.nan
    lc.model.fc.weight.data.copy_(lc.tasks[1].delta[0])
    with pytest.raises(ValueError, match=r"fc\.weight, field 0\.left: it contains NaN"):
        save(lc, path)
    assert list(tmp_path.iterdir()) == []


def test_saving_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "net.lc.tmp").write_bytes(b"mine")
    save(compressed(), tmp_path / "net.lc")
    assert (tmp_path / "net.lc.tmp").read_bytes() == b"mine"
    assert {p.name for p in tmp_path.iterdir()} == {"net.lc", "net.lc.tmp"}


@pytest.mark.parametrize("where", ["record", "finish", "replace"])
def test_saving_is_whole_or_nothing(
    where: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    if where == "replace":
        monkeypatch.setattr(container.os, "replace", fail)
    else:
        monkeypatch.setattr(container.Writer, where, fail)
    with pytest.raises(OSError, match="no space left"):
        save(Net(), saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


# ------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.lc"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 2))
    lc = LC(model, {"0.weight": Binary() + Sparse(nonzeros=5)}, schedule=constant(1.0, 1))
    lc.finalize()
    save(lc, path)
    return path


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 2))


def refuses(path: Path) -> None:
    """Every way to read it says what is wrong, and a model is left as it was."""
    model = small_model()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(FormatError, match=str(path)):
        load(path, model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with pytest.raises(FormatError):
        verify(path)


def test_every_flipped_byte_is_found(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    path = tmp_path / "damaged.lc"
    model = small_model()
    before = [p.clone() for p in model.parameters()]
    for i in range(len(whole)):
        for mask in (1, 128, 255):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1 :])
            with pytest.raises(FormatError, match=r"damaged\.lc"):
                load(path, model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_every_truncation_is_found(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    path = tmp_path / "short.lc"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"short\.lc"):
            inspect(path)
    path.write_bytes(whole + b"\0")
    refuses(path)


def test_a_file_that_changes_while_it_is_read(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checksums are compared once: what is written to the file after that is found all the same."""
    path = tmp_path / "changing.lc"
    path.write_bytes(small.read_bytes())
    check = PackedFile.check

    def damaged_after(file: PackedFile) -> None:
        check(file)
        whole = bytearray(path.read_bytes())
        whole[container._START] ^= 1
        path.write_bytes(whole)
        os.utime(path, ns=(0, 0))  # however coarse the clock is

    monkeypatch.setattr(PackedFile, "check", damaged_after)
    with pytest.raises(FormatError, match="has changed since it was opened"):
        load(path, small_model())


def test_damage_names_the_tensor(small: Path, tmp_path: Path) -> None:
    whole = bytearray(small.read_bytes())
    whole[container._START] ^= 1
    path = tmp_path / "damaged.lc"
    path.write_bytes(whole)
    with pytest.raises(FormatError, match=r"0\.weight: the checksum is wrong"):
        load(path, small_model())


Data = dict[str, Any]


def forged(
    path: Path,
    target: Path,
    change: Callable[[Data], Any],
    payload: bytes | None = None,
    sizes: list[int] | None = None,
) -> None:
    """A file with another index, all checksums right: what damage cannot make, but malice can."""
    file = PackedFile(path, known_types())
    whole = path.read_bytes()
    start, stop = container._START, container._START + file._reader.payload
    index = dict(file._reader.index)
    index = json.loads(json.dumps(index))
    changed = change(index)
    index = index if changed is None else changed
    body = whole[start:stop] if payload is None else payload
    lengths = sizes or [record.bytes for record in file.records]
    ends = list(itertools.accumulate(lengths))
    checksums = [zlib.crc32(body[b - n : b]) for b, n in zip(ends, lengths, strict=True)]
    text = container.indexed(json.dumps(index).encode(), checksums)
    target.write_bytes(container._header(len(body), len(text)) + body + text)


def first(index: Data) -> Data:
    task: Data = index["tensors"][0]
    return task


def put(*path: Any, value: Any) -> Callable[[Data], None]:
    def change(index: Data) -> None:
        inner: Any = index
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


FIELDS = ("tensors", 0, "fields")
HOSTILE: dict[str, tuple[Callable[[Data], Any], str]] = {
    "version": (put("version", value=2), "version 2"),
    "no version": (lambda index: index.pop("version") and None, "version None"),
    "no parts": (put("parts", value=[]), "there are 0 parts"),
    "unknown part": (put("parts", 0, "type", value="os.system"), "unknown part"),
    "a module's path": (put("parts", 0, "type", value="torch.nn.Linear"), "unknown part"),
    "unknown argument": (put("parts", 0, "parts", 0, "evil", value=1), "no arguments"),
    "impossible argument": (put("parts", 0, "parts", 1, "nonzeros", value=-1), "nonzeros"),
    "a view as part": (put("parts", 0, value={"type": "Vector"}), "is no part"),
    "negative shape": (put("tensors", 0, "shapes", value=[[-7, 9]]), "from 0"),
    "a bool as length": (put("tensors", 0, "shapes", value=[[True, 9]]), "integer"),
    "overflow": (put("tensors", 0, "shapes", value=[[2**40, 2**40]]), "more than"),
    "a huge number": (put("tensors", 0, "shapes", value=[[10**30, 1]]), "integer"),
    "not all bytes": (put(*FIELDS, 1, value=["0.positive", ["fixed", 1], [7, 8]]), "bytes"),
    "huge field": (
        put(*FIELDS, 1, value=["0.positive", ["fixed", 0], [10**12]]),
        "entries",
    ),
    "huge support": (
        put(*FIELDS, 2, value=["1.positions", ["support", 10**12], [10**12], 6]),
        "entries",
    ),
    "huge entropy": (
        put(*FIELDS, 2, value=["1.positions", ["entropy", ["fixed", 8]], [10**12], 6]),
        "entries",
    ),
    "unknown coding": (put(*FIELDS, 1, 1, value=["pickle"]), "coding"),
    "no number of bytes": (put(*FIELDS, 2, value=["1.positions", ["support", 63], [5]]), "bytes"),
    "a field twice": (put(*FIELDS, 0, 0, value="0.positive"), "twice"),
    "no field": (put(*FIELDS, 0, value={}), "a field is"),
    "no tensor": (put("rest", 0, 1, value=[["bias"]]), "a tensor is"),
    "no module": (put("rest", 0, value="x"), "a module is"),
    "a module twice": (lambda index: index["rest"].append(index["rest"][0]), "twice"),
    "integer weights": (put("tensors", 0, "dtype", value="int64"), "weights are one of"),
    "version true": (put("version", value=True), "version True"),
    "unknown dtype": (put("rest", 0, 1, 0, 1, value="object"), "unknown dtype"),
    "unknown weights": (put("tensors", 0, "dtype", value="object"), "weights are one of"),
    "twice": (put("tensors", 0, "names", value=["1.bias"]), "twice"),
    "no name": (put("tensors", 0, "names", value=[3]), "no name"),
    "tied to no name": (put("aliases", value={"a": {}}), "impossible"),
    "tied to nothing": (put("aliases", value={"a": "b"}), "impossible"),
    "no rest": (lambda index: index.pop("rest") and None, "'rest' is missing"),
    "extra": (put("more", value=1), "unknown entries"),
    "a list": (lambda index: [index], "no JSON object"),
    "field of another name": (
        put(*FIELDS, 0, 0, value="0.scales"),
        "no Binary",
    ),
}


POSITIVE, SCALE = ["0.positive", ["fixed", 1]], ["0.scale", ["raw", "float32"], [1]]
UNLIKE: dict[str, tuple[Callable[[Data], Any], str]] = {
    "integers as a scale": (put(*FIELDS, 0, value=["0.scale", ["raw", "int32"], [1]]), "floating"),
    "codes as a scale": (put(*FIELDS, 0, value=["0.scale", ["fixed", 32], [1]]), "floating-point"),
    "a scale of another shape": (put(*FIELDS, 0, 2, value=[1, 1]), r"shape \(1, 1\), not \(1,\)"),
    "a scale without an axis": (put(*FIELDS, 0, 2, value=[]), r"shape \(\), not \(1,\)"),
    "signs of another shape": (put(*FIELDS, 1, value=[*POSITIVE, [9, 7]]), r"not \(7, 9\)"),
    "signs as a vector": (put(*FIELDS, 1, value=[*POSITIVE, [63]]), r"not \(7, 9\)"),
    "positions in more weights": (put(*FIELDS, 2, 1, value=["support", 64]), "for other weights"),
    "a field too many": (put(*FIELDS, value=[SCALE, POSITIVE, ["x", ["fixed", 0], [1]]]), "bytes"),
    "a field of no part": (
        lambda index: first(index)["fields"].append(["2.x", ["fixed", 0], [1]]),
        "fields that no part has",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_fields_that_are_not_those_of_the_part(name: str, small: Path, tmp_path: Path) -> None:
    """Arrays that `decode` could use are refused all the same, as the format's page says."""
    change, message = UNLIKE[name]
    forged(small, tmp_path / "unlike.lc", change)
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "unlike.lc", small_model())
    refuses(tmp_path / "unlike.lc")


def test_numbers_out_of_range(tmp_path: Path) -> None:
    """Codes that another coding can hold, but no writer of the part writes."""
    path = tmp_path / "range.lc"
    for part, name, coding in (
        (Binary(), "positive", ["fixed", 2]),
        (Ternary(), "signs", ["raw", "uint8"]),
        (Ternary(), "signs", ["radix", 4]),
        (KMeans(3), "codes", None),
        (KMeans(5), "codes", None),
        (FixedCodebook((-1, 0, 1, 2, 3)), "codes", None),
        (Int(2), "codes", None),
        (Int(4, axis=0), "codes", None),
        (Int(5), "codes", None),
        (Int(8, scale="max"), "codes", None),
    ):
        w = torch.linspace(-1, 1, 40).view(4, 10)
        written(path, part, w, None)
        file = PackedFile(path, known_types())
        (record,) = file.records
        if coding is None:  # all bits set: a code that is left out
            (length,) = (f.bytes for f in record.fields if f.name == name)
            body = [bytes(x.payload) for x in file.packed(record).values()]
            at = [f.name for f in record.fields].index(name)
            body[at] = b"\xff" * length
            forged(path, path, lambda index: None, payload=b"".join(body))
        else:
            octets = described(coding).pack(torch.full((40,), 3, dtype=torch.uint8))
            body = [bytes(x.payload) for x in file.packed(record).values()]
            at = [f.name for f in record.fields].index(name)
            body[at] = octets
            again = [f.bytes if i != at else len(octets) for i, f in enumerate(record.fields)]

            def change(index: Data, at: int = at, coding: Any = coding) -> None:
                first(index)["fields"][at][1] = coding

            forged(path, path, change, payload=b"".join(body), sizes=[sum(again)])
        with pytest.raises(FormatError, match=r"from 0 to|damaged codes"):
            load(path, Holder(torch.zeros(4, 10)))
        with pytest.raises(FormatError):
            verify(path)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, small: Path, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    path = tmp_path / "hostile.lc"
    forged(small, path, change)
    with pytest.raises(FormatError, match=message) as caught:
        load(path, small_model())
    assert str(path) in str(caught.value)
    refuses(path)


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    path = tmp_path / "bomb.lc"
    text = container.indexed(b" " * 200_000_000, [])
    path.write_bytes(container._header(0, len(text)) + text)
    with pytest.raises(FormatError, match="far longer than"):
        inspect(path)


def test_few_bytes_for_many_weights(small: Path, tmp_path: Path) -> None:
    """A file may say that 10^12 weights are zero: only a model that has them is filled."""
    path = tmp_path / "sparse.lc"
    w = torch.zeros(4, 4)
    written(path, Sparse(nonzeros=0), w, None)
    shape = [10**6, 10**6]

    def change(index: Data) -> None:
        first(index)["shapes"] = [shape]
        fields = first(index)["fields"]
        next(field for field in fields if field[0] == "positions")[1] = ["support", 10**12]

    target = tmp_path / "huge.lc"
    forged(path, target, change)
    assert inspect(target).total.weights == 10**12
    for read in (verify, lambda path: to_dense(path, tmp_path / "out")):
        with pytest.raises(FormatError, match="only read into a model that has them"):
            read(target)
    with pytest.raises(ValueError, match="is of another model"):
        load(target, Holder(w))
    assert not (tmp_path / "out").exists()


def trees(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything inside JSON data."""
    if path:
        yield path
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in items:
        yield from trees(value, (*path, key))


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**62, 2**63, 10**40, -(2**63)]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
    st.sampled_from(["float16", "fixed", "raw", "support", "Sparse", "Sum", "0.weight", "type"]),
)
VALUES = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3)
)


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_indexes(data: st.DataObject, small: Path, tmp_path_factory: Any) -> None:
    """Right checksums around a changed index: an error of the format, or a model that fits."""
    path = tmp_path_factory.getbasetemp() / "mutated.lc"

    def change(index: Data) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            where = data.draw(st.sampled_from(list(trees(index))))
            put(*where, value=data.draw(VALUES))(index)

    forged(small, path, change)
    for read in (inspect, verify, lambda path: load(path, small_model())):
        try:
            read(path)
        except ValueError as refusal:  # FormatError is one
            assert str(path) in str(refusal)


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_payloads(data: st.DataObject, small: Path, tmp_path_factory: Any) -> None:
    """Right checksums around a changed payload."""
    path = tmp_path_factory.getbasetemp() / "mutated.lc"
    length = PackedFile(small, known_types())._reader.payload
    whole = bytearray(small.read_bytes()[container._START :][:length])
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    forged(small, path, lambda index: None, payload=bytes(whole))
    for read in (inspect, verify, lambda path: load(path, small_model())):
        try:
            read(path)
        except FormatError as refusal:
            assert str(path) in str(refusal)


# ------------------------------------------------------------------ command line


def test_inspect_command(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved)]) == 0
    assert capsys.readouterr().out.rstrip("\n") == str(inspect(saved))
    assert main(["inspect", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(inspect(saved).json())


def test_verify_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(saved)]) == 0
    assert "all intact" in capsys.readouterr().out
    damaged = tmp_path / "damaged.lc"
    damaged.write_bytes(saved.read_bytes()[:-1])
    assert main(["verify", str(damaged)]) == 1
    assert "damaged.lc" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "none.lc")]) == 3
    assert "none.lc" in capsys.readouterr().err


def test_dense_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "dense.safetensors"
    assert main(["to-dense", str(saved), str(out)]) == 0
    assert "fc.weight" in load_file(out)
    assert main(["to-dense", str(saved), str(tmp_path / "no" / "out")]) == 3
    assert capsys.readouterr().err


def test_usage(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ([], ["inspect"], ["shrink", "x"], ["inspect", str(saved), "--part", "no.such:X"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_a_module_that_fails_is_a_wrong_argument(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing_part.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(saved), "--part", "failing_part:X"])
    assert caught.value.code == 2 and "broken" in capsys.readouterr().err


def test_inspect_on_a_terminal_without_greek(saved: Path) -> None:
    command = [sys.executable, "-m", "lc_compress", "inspect", str(saved)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and b"fc.weight" in done.stdout


def test_third_party_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "custom.lc"
    written(path, Custom(), torch.randn(4, 6), None)
    assert main(["verify", str(path)]) == 1
    assert "parts=" in capsys.readouterr().err
    assert main(["verify", str(path), "--part", f"{__name__}:Custom"]) == 0


def test_a_view_between(tmp_path: Path) -> None:
    w = torch.randn(4, 3, 2, 2)
    part = LowRank(2).over(Matrix()) + Sparse(nonzeros=2)
    written(tmp_path / "x.lc", part, w, None)
    loaded = load(tmp_path / "x.lc", Holder(torch.zeros_like(w)))
    assert torch.equal(loaded.w, part.reconstruct(part.project(w)))


# ------------------------------------------------------------------ packed and dense loads agree


@pytest.mark.parametrize(
    "part", [KMeans(3), FixedCodebook((-1.0, 0.5, 1.0)), Int(4, axis=0)], ids=str
)
@pytest.mark.parametrize("materialize", [None, "never", "on_load", "on_first_use"])
def test_codes_out_of_range_are_refused_by_every_policy(
    part: Part[Any], materialize: Any, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    lc = LC(model, {"0.weight": part}, schedule=[1.0])
    lc.finalize()
    save(lc, tmp_path / "good.lc")
    file = PackedFile(tmp_path / "good.lc", known_types())
    (record,) = file.records
    start, body = container._START, (tmp_path / "good.lc").read_bytes()
    payload = bytearray(body[start : start + file._reader.payload])
    at = 0
    for field in record.fields:
        if field.name == "codes":
            payload[at : at + field.bytes] = b"\xff" * field.bytes
        at += field.bytes
    forged(tmp_path / "good.lc", tmp_path / "bad.lc", lambda index: None, bytes(payload))
    with pytest.raises(FormatError, match=r"0\.weight: the stored bytes are no"):
        load(
            tmp_path / "bad.lc", nn.Sequential(nn.Linear(6, 8, bias=False)), materialize=materialize
        )


def test_stored_nan_is_refused(tmp_path: Path) -> None:
    lc = LC(nn.Linear(6, 8, bias=False), {"weight": Binary(axis=0)}, schedule=[1.0])
    lc.finalize()
    save(lc, tmp_path / "good.lc")
    file = PackedFile(tmp_path / "good.lc", known_types())
    payload = b""
    for field in file.records[0].fields:
        payload += (b"\xff" if field.name == "scale" else b"\x00") * field.bytes
    forged(tmp_path / "good.lc", tmp_path / "bad.lc", lambda index: None, payload)
    with pytest.raises(FormatError, match="field scale contains NaN or inf"):
        load(tmp_path / "bad.lc", nn.Linear(6, 8, bias=False))


def test_groups_of_millions_are_no_long_calculation() -> None:
    coding = described(["groups", [4, 10], 2_000_000, 4_000_000, -1])
    positions = torch.arange(40)
    assert torch.equal(coding.unpack(coding.pack(positions), torch.Size([40])), positions)


@pytest.mark.parametrize("dtype", [torch.uint32, torch.uint16], ids=str)
def test_types_that_the_format_does_not_hold_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("odd", torch.zeros(2, dtype=dtype))
    with pytest.raises(ValueError, match=r"odd is uint\d+, which the format does not hold"):
        save(model, tmp_path / "model.lc")
    assert not list(tmp_path.iterdir())
