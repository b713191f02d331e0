"""Resume: killed at any instant and started again = never killed, bit for bit; or refused."""

from __future__ import annotations

import copy
import io
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts_under_test import CASES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from lc_compress import (
    LC,
    Binary,
    Joint,
    KMeans,
    LowRank,
    Matrix,
    Part,
    Sparse,
    Sum,
    each,
    geometric,
)
from lc_compress.testing import Case

STEPS = 4
THREE = Sum((Binary(), LowRank(2), Sparse(density=0.05)), tolerance=1e-3)


# ------------------------------------------------------------------ a run with everything in it


@dataclass(frozen=True)
class Setup:
    """What differs between runs; the rest is a loop that draws from every generator."""

    tasks: Mapping[Any, Part[Any]]
    optimizer: str = "sgd"
    gradient: Any = "weights"
    every: int = 1
    hook: bool = True
    lr_guard: bool = False
    implicit: bool = False
    mus: tuple[float, ...] = tuple(geometric(0.05, growth=1.5, steps=STEPS))
    amp: bool = True
    dtype: torch.dtype = torch.float32
    shape: tuple[int, int] = (12, 10)


PAIR = Binary() + Sparse(density=0.05)
SETUPS = {
    "classic": Setup({"*.weight": PAIR}),
    "same mu twice": Setup({"*.weight": PAIR}, mus=(0.1, 0.1, 0.2, 0.2)),
    "bfloat16": Setup({"*.weight": PAIR}, amp=False, dtype=torch.bfloat16),
    "bfloat16 sum": Setup({"*.weight": PAIR}, "adamw", "sum", amp=False, dtype=torch.bfloat16),
    "adamw": Setup({"*.weight": KMeans(3)}, optimizer="adamw"),
    "penalty": Setup({"*.weight": PAIR}, hook=False),
    "guard": Setup({"*.weight": PAIR}, lr_guard=True, mus=(5.0, 30.0, 30.0, 50.0)),
    "implicit": Setup({"*.weight": PAIR}, implicit=True, mus=(5.0, 30.0, 30.0, 50.0)),
    "sum": Setup({"*.weight": PAIR}, gradient="sum", every=2, amp=False),
    "sum with mu": Setup(
        {"0.weight": PAIR, "4.weight": KMeans(3)}, gradient="sum", mus=(0.0, 0.1, 0.1, 0.3)
    ),
    "joint": Setup({Joint("*.weight"): each(Binary()) + Sparse(density=0.05)}),
    "three": Setup({"*.weight": THREE}, optimizer="adamw", amp=False),
    "then": Setup({"*.weight": Sparse(density=0.3).then(KMeans(3)) + LowRank(1).then(Binary())}),
}


class Run:
    """What a script makes when it starts: model, optimizer, scheduler, scaler, loader and LC."""

    def __init__(
        self, setup: Setup, seed: int = 0, wrap: Callable[[nn.Module], nn.Module] = lambda m: m
    ) -> None:
        self.setup = setup
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        hidden, inputs = setup.shape
        layers = (nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.2))
        self.net = nn.Sequential(*layers, nn.Linear(hidden, 3))
        self.model = wrap(self.net.to(setup.dtype))
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
            if setup.optimizer == "sgd"
            else torch.optim.AdamW(self.model.parameters(), lr=0.01)
        )
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, STEPS + 1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
        data = torch.Generator().manual_seed(7)  # of every seed the same
        x, y = torch.randn(20, inputs, generator=data), torch.randint(0, 3, (20,), generator=data)
        self.order, self.noise = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        self.loader = DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=self.order)
        self.lc = LC(
            self.model,
            setup.tasks,
            schedule=setup.mus,
            optimizer=self.optimizer if setup.hook else None,
            gradient=setup.gradient,
            every=setup.every,
            lr_guard=setup.lr_guard,
            implicit=setup.implicit,
        )
        self.save: dict[str, Any] = {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "order": self.order,
            "noise": self.noise,
        }

    def train(self, index: int, stop: int | None = None) -> None:
        """One body. With `stop`, it is left before that batch."""
        self.model.train()
        for i, (x, y) in enumerate(self.loader):  # five batches
            if i == stop:
                raise KeyboardInterrupt
            x = x + 0.01 * random.random() * torch.from_numpy(np.random.randn(*x.shape)).float()
            x = x + 0.01 * torch.from_numpy(self.noise.standard_normal(x.shape)).float()
            x = x.to(self.setup.dtype)
            loss = F.cross_entropy(self.model(x), y)
            if not self.setup.hook:
                loss = loss + self.lc.penalty()
            if not self.setup.amp:
                loss.backward()
                self.optimizer.step()  # five a body: odd, so that `every=2` runs across bodies
                self.optimizer.zero_grad()
                continue
            self.scaler.scale(loss).backward()
            if i % 2:  # the last gradient of a body waits for the next body
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
        self.scheduler.step()
        if index == 1:
            self.lc.log(loss=loss.item())
        with self.lc.compressed(calibration=[x]):
            self.model.eval()  # and left so: a resume restores the mode too
            with torch.no_grad():
                self.lc.keep_best(F.cross_entropy(self.model(x), y).item())

    def go(self, path: Path | None = None, at: int | None = None, stop: int | None = None) -> Run:
        """The LC steps; body `at` is left before batch `stop` or, with no `stop`, at its end."""
        for step in self.lc.steps(progress=False, checkpoint=path, save=self.save if path else {}):
            self.train(step.index, stop if step.index == at else None)
            if step.index == at:
                raise KeyboardInterrupt
        return self

    def outcome(self) -> dict[str, Any]:
        """Every bit that could differ."""
        states = {name: x.state_dict() for name, x in self.save.items() if hasattr(x, "state_dict")}
        return {
            "model": dict(self.net.state_dict()),
            "lc": self.lc.state_dict(),
            "delta": [task.delta for task in self.lc.tasks],
            "noise": self.noise.bit_generator.state,
            "order": self.order.get_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state()[1:],  # type: ignore[index]  # a tuple
            "torch": torch.get_rng_state(),
            "grads": [p.grad for p in self.model.parameters()],
            "modes": [module.training for module in self.net.modules()],
            **states,
        }


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Where two nested values first differ in type, value, dtype or layout, or None."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return None if np.array_equal(a, b) else where
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__}, {type(b).__name__}"
    if isinstance(a, Tensor):
        same = a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        return None if same else where
    if isinstance(a, Mapping):
        if list(a) != list(b):
            return f"{where}: {list(a)}, {list(b)}"
        return next((d for k in a if (d := difference(a[k], b[k], f"{where}.{k}"))), None)
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{where}: lengths {len(a)}, {len(b)}"
        pairs = enumerate(zip(a, b, strict=True))
        return next((d for i, (x, y) in pairs if (d := difference(x, y, f"{where}.{i}"))), None)
    return None if a == b or a != a else f"{where}: {a}, {b}"


def snapshot(run: Run) -> dict[str, Any]:
    """The outcome, as a copy that later training does not change."""
    return copy.deepcopy(run.outcome())


# ------------------------------------------------------------------ resume = no interruption


@pytest.mark.parametrize("name", SETUPS)
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    setup = SETUPS[name]
    expected = snapshot(Run(setup).go())  # without checkpoints
    for at, stop in ((0, 3), (1, None), (3, 2)):  # a body left at its start, end, and in between
        with pytest.raises(KeyboardInterrupt):
            Run(setup, seed=at).go(path, at, stop)
    resumed = Run(setup, seed=99).go(path)  # another seed: nothing may come from the new process
    assert difference(expected, resumed.outcome()) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.pt"]
    again = Run(setup, seed=98).go(path)  # a finished run has no steps left
    assert difference(expected, again.outcome()) is None


def test_body_left_early_is_run_again_by_the_same_objects(tmp_path: Path) -> None:
    setup = SETUPS["classic"]
    expected = snapshot(Run(setup).go())
    run = Run(setup)
    for at, stop in ((0, 2), (2, 3)):
        with pytest.raises(KeyboardInterrupt):
            run.go(tmp_path / "run.pt", at, stop)
        kept = (tmp_path / "run.pt").read_bytes()
        assert run.lc.position == at
    run.go(tmp_path / "run.pt")
    assert (tmp_path / "run.pt").read_bytes() != kept
    assert difference(expected, run.outcome()) is None


def test_interrupt_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    run, path = Run(SETUPS["classic"]), tmp_path / "run.pt"
    steps = run.lc.steps(progress=False, checkpoint=path, save=run.save)
    run.train(next(steps).index)
    next(steps)
    before = path.read_bytes()
    run.optimizer.param_groups[0]["lr"] = 1.0
    with pytest.raises(KeyboardInterrupt):
        run.train(1, stop=3)
    steps.close()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_interrupt_inside_a_write_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = Run(SETUPS["classic"]), tmp_path / "run.pt"
    steps = run.lc.steps(progress=False, checkpoint=path, save=run.save)
    next(steps)
    before = path.read_bytes()

    def interrupted(*_: object) -> None:
        assert (tmp_path / "run.pt.tmp").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_what_a_killed_write_left_is_gone_after_the_run(tmp_path: Path) -> None:
    (tmp_path / "run.pt.tmp").write_bytes(b"half")
    Run(SETUPS["classic"]).go(tmp_path / "run.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_best_state_survives(tmp_path: Path) -> None:
    setup = SETUPS["classic"]
    expected = Run(setup).go()
    with pytest.raises(KeyboardInterrupt):
        Run(setup).go(tmp_path / "run.pt", at=3)
    resumed = Run(setup, seed=5).go(tmp_path / "run.pt")
    for run in (expected, resumed):
        run.lc.finalize(calibration=None, best=True)
    assert difference(dict(expected.model.state_dict()), dict(resumed.model.state_dict())) is None


# ------------------------------------------------------------------ θ through a file


def test_next_c_step_from_a_stored_state_is_the_same() -> None:
    """decode(encode(θ)) is as good a warm start as θ, for every part in the table."""
    convolutions = [
        Case(part, shapes=((6, 4, 3, 3),))
        for part in (THREE.over(Matrix()), Binary(axis=0) + LowRank(2).over(Matrix()))
    ]
    for case in [*CASES, *convolutions]:
        part, g = case.part, torch.Generator().manual_seed(1)
        w = torch.randn(case.shapes[0], generator=g)
        if w.dim() == 4:
            w = w.contiguous(memory_format=torch.channels_last)
        state = part.project(w, mu=case.mu)
        stored = through_file({n: f.data for n, f in part.encode(state).items()})
        read = part.decode(stored, w.shape, w.dtype)
        assert difference(part.reconstruct(state), part.reconstruct(read)) is None, part
        w = w + 0.1 * torch.randn(w.shape, generator=g)
        both = [part.project(w, warm, mu=case.mu) for warm in (state, read)]
        fields = [{n: f.data for n, f in part.encode(s).items()} for s in both]
        assert difference(*fields) is None, part


def through_file(content: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("name", ["classic", "sum", "joint", "three", "then"])
@pytest.mark.parametrize("file", [False, True], ids=["memory", "file"])
def test_state_dict_round_trip(name: str, file: bool) -> None:
    run = Run(SETUPS[name])
    with pytest.raises(KeyboardInterrupt):
        run.go(at=2)
    state = run.lc.state_dict()
    other = Run(SETUPS[name], seed=3)
    other.model.load_state_dict(run.model.state_dict())
    other.lc.load_state_dict(through_file(state) if file else state)
    assert difference(state, other.lc.state_dict()) is None
    for a, b in zip(run.lc.tasks, other.lc.tasks, strict=True):
        assert difference(a.delta, b.delta) is None
        assert difference(a.current, b.current) is None
    assert run.lc.gap() == other.lc.gap() and other.lc.mu == run.lc.mu
    kept = through_file(state)
    with pytest.raises(KeyboardInterrupt):
        other.go(at=2)  # training on does not change the state that was given
    assert difference(kept, state if file else through_file(state)) is None


# ------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of "classic" after two steps."""
    path = tmp_path_factory.mktemp("written") / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        Run(SETUPS["classic"]).go(path, at=2)
    return path.read_bytes()


def refused(path: Path, match: str, run: Run | None = None) -> None:
    """`path` is refused with a ValueError that says `match`; run and file are as before."""
    run = run or Run(SETUPS["classic"], seed=1)
    before, file = snapshot(run), path.read_bytes()
    with pytest.raises(ValueError, match=match):
        next(run.lc.steps(progress=False, checkpoint=path, save=run.save))
    assert difference(before, run.outcome()) is None
    assert path.read_bytes() == file and not path.with_name(f"{path.name}.tmp").exists()


FOREIGN = {
    "another shape": (Setup({"*.weight": PAIR}, shape=(8, 10)), "another model"),
    "another part": (Setup({"*.weight": Binary()}), "another model or plan"),
    "other tasks": (Setup({"4.weight": PAIR}), "another model or plan"),
    "another order": (Setup({"4.weight": PAIR, "0.weight": PAIR}), "another model or plan"),
    "another schedule": (Setup({"*.weight": PAIR}, mus=(0.1, 0.2)), "another schedule"),
    "another gradient": (Setup({"*.weight": PAIR}, gradient="sum"), "'gradient': 'weights'"),
    "with a guard": (Setup({"*.weight": PAIR}, lr_guard=True), "'lr_guard': False"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_state_of_another_run_is_refused_and_nothing_changes(
    name: str, written: bytes, tmp_path: Path
) -> None:
    setup, match = FOREIGN[name]
    run, path = Run(setup, seed=1), tmp_path / "run.pt"
    path.write_bytes(written)
    before = snapshot(run)
    state = torch.load(path, weights_only=True)["lc"]
    with pytest.raises(ValueError, match=match):
        run.lc.load_state_dict(state)
    assert difference(before, run.outcome()) is None
    refused(path, match, run)


def test_another_every_is_refused() -> None:
    state = Run(SETUPS["sum"]).lc.state_dict()
    run = Run(Setup({"*.weight": PAIR}, gradient="sum", every=3, amp=False))
    with pytest.raises(ValueError, match="'every': 2"):
        run.lc.load_state_dict(state)


def _cut_codes(state: dict[str, Any]) -> None:
    arrays = state["tasks"]["0.weight"]["arrays"]
    arrays["0.positive"] = arrays["0.positive"][:-1]


def _drop_array(state: dict[str, Any]) -> None:
    del state["tasks"]["4.weight"]["arrays"]["1.values"]


def _cut_multipliers(state: dict[str, Any]) -> None:
    state["tasks"]["4.weight"]["multipliers"] = [torch.zeros(2)]


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda s: s.update(version=0), "of version 0"),
    "no version": (lambda s: s.clear(), "of version None"),
    "no history": (lambda s: s.pop("history"), "lacks \\['history'\\]"),
    "cut codes": (_cut_codes, "The state of 0.weight, shape \\(12, 10\\), is damaged"),
    "missing array": (_drop_array, "The state of 4.weight.* is damaged"),
    "cut multipliers": (_cut_multipliers, "The state of 4.weight.* is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_state_is_refused_and_nothing_changes(name: str) -> None:
    damage, match = DAMAGES[name]
    run = Run(SETUPS["classic"])
    with pytest.raises(KeyboardInterrupt):
        run.go(at=1)
    state = through_file(run.lc.state_dict())
    damage(state)
    fresh = Run(SETUPS["classic"], seed=1)
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=match):
        fresh.lc.load_state_dict(state)
    assert difference(before, fresh.outcome()) is None


def test_finished_run_takes_no_state() -> None:
    run = Run(SETUPS["classic"])
    state = run.lc.state_dict()
    run.lc.finalize(calibration=None)
    with pytest.raises(RuntimeError, match="after finalize"):
        run.lc.load_state_dict(state)


def test_damaged_files_are_refused(written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    for content in (b"", b"text, no checkpoint", written[:-1], written[: len(written) // 2]):
        path.write_bytes(content)
        refused(path, "run.pt is not a readable checkpoint .*Delete it to start anew")


def test_a_flipped_byte_is_found_or_harmless(written: bytes, tmp_path: Path) -> None:
    path, run = tmp_path / "run.pt", Run(SETUPS["classic"], seed=1)
    path.write_bytes(written)
    next(run.lc.steps(progress=False, checkpoint=path, save=run.save))
    expected, found = snapshot(run), 0
    places = random.Random(0).sample(range(len(written)), 60)
    for place in places:
        damaged = bytearray(written)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            next(run.lc.steps(progress=False, checkpoint=path, save=run.save))
        except ValueError:
            found += 1
        assert difference(expected, run.outcome()) is None, place
    assert found > 20  # the rest is padding and what a reader of the archive does not use


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    torch.save({"weight": torch.zeros(2)}, path)
    refused(path, "not a checkpoint of version 1")
    torch.save([1, 2], path)
    refused(path, "not a checkpoint of version 1")
    torch.save({"version": 1, "lc": {}, "model": {}}, path)
    refused(path, "not a checkpoint of this library")
    torch.save({"version": 1, "lc": {}, "model": {}, "ranks": [{"saved": {}}]}, path)
    refused(path, "not a checkpoint of this library")
    torch.save(nn.Linear(2, 2), path)  # code, which is not run
    refused(path, "not a readable checkpoint")


def test_uncompressed_layers_of_another_model_are_refused(written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(written)
    run = Run(SETUPS["classic"], seed=1)
    run.net.append(nn.Linear(3, 3, bias=False).requires_grad_(False))
    refused(path, "of another model: \\['5.weight'\\] are missing", run)
    run = Run(SETUPS["classic"], seed=1)
    run.net[1].double()
    refused(path, "of another model: .*'1.running_mean'.* of another shape or type", run)


def test_other_saved_objects_are_refused(written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(written)
    run = Run(SETUPS["classic"], seed=1)
    del run.save["scaler"]
    refused(path, "give the same objects", run)
    run = Run(SETUPS["classic"], seed=1)
    run.save["order"] = run.scaler
    refused(path, "give the same objects", run)
    run = Run(SETUPS["classic"], seed=1)
    run.save["optimizer"] = torch.optim.AdamW(run.model.parameters())
    refused(path, "'optimizer': 'SGD'", run)


def test_an_object_that_refuses_its_state_leaves_all_as_they_were(
    written: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(written)
    run = Run(SETUPS["classic"], seed=1)
    run.save["noise"] = np.random.Generator(np.random.MT19937(0))  # was PCG64
    refused(path, "does not fit save={'noise': ...}", run)
    run = Run(SETUPS["classic"], seed=1)
    run.save["optimizer"] = torch.optim.SGD([{"params": [p]} for p in run.model.parameters()])
    refused(path, "does not fit save={'optimizer': ...}", run)


class Odd:
    """An object whose state is whatever it is told to be."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["state"]


@pytest.mark.parametrize(
    "state", [Path(), lambda: None, np.float64(1), np.zeros(2)], ids=lambda x: type(x).__name__
)
def test_what_is_not_plain_data_is_refused_before_any_training(state: Any, tmp_path: Path) -> None:
    lc = Run(SETUPS["classic"]).lc
    steps = lc.steps(progress=False, checkpoint=tmp_path / "run.pt", save={"odd": Odd(state)})
    with pytest.raises(TypeError, match="not plain data"):
        next(steps)
    assert list(tmp_path.iterdir()) == []


def test_what_turns_odd_later_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    run, odd = Run(SETUPS["classic"]), Odd(1)
    steps = run.lc.steps(progress=False, checkpoint=tmp_path / "run.pt", save={"odd": odd})
    next(steps)
    before = (tmp_path / "run.pt").read_bytes()
    odd.state = Path()
    with pytest.raises(TypeError, match="not plain data"):
        next(steps)
    assert (tmp_path / "run.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_object_without_a_state_is_refused(tmp_path: Path) -> None:
    lc = Run(SETUPS["classic"]).lc
    with pytest.raises(TypeError, match=r"save=\{'loader': ...\} needs an object with state_dict"):
        next(lc.steps(progress=False, checkpoint=tmp_path / "run.pt", save={"loader": [1]}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64]
)
def test_every_numpy_generator_is_restored(
    kind: Callable[[int], np.random.BitGenerator], tmp_path: Path
) -> None:
    run, noise = Run(SETUPS["classic"]), np.random.Generator(kind(0))
    noise.standard_normal(3), noise.integers(5, dtype=np.int32)
    next(run.lc.steps(progress=False, checkpoint=tmp_path / "run.pt", save={"noise": noise}))
    expected = noise.standard_normal(4), noise.integers(9, size=3, dtype=np.int32)
    other = np.random.Generator(kind(1))
    fresh = Run(SETUPS["classic"])
    next(fresh.lc.steps(progress=False, checkpoint=tmp_path / "run.pt", save={"noise": other}))
    drawn = other.standard_normal(4), other.integers(9, size=3, dtype=np.int32)
    assert difference(expected, drawn) is None


def test_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    lc = Run(SETUPS["classic"]).lc
    with pytest.raises(ValueError, match="is not a folder that can be written to"):
        next(lc.steps(progress=False, checkpoint=tmp_path / "missing" / "run.pt"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder that can be written to"):
        next(lc.steps(progress=False, checkpoint=tmp_path / "file" / "run.pt"))
    if os.getuid() != 0:  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(ValueError, match="is not a folder that can be written to"):
            next(lc.steps(progress=False, checkpoint=tmp_path / "run.pt"))


def test_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = Run(SETUPS["classic"]), tmp_path / "run.pt"
    steps = run.lc.steps(progress=False, checkpoint=path, save=run.save)
    next(steps)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        next(steps)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["run.pt"]


# ------------------------------------------------------------------ real kills


@pytest.fixture(scope="module")
def processes() -> Any:
    """New processes that need not import torch each: forked from one that did nothing else."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # it does not inherit sys.path
        forkserver.ensure_running()
    return context


def _script(path: str) -> None:
    """As a user would write it: run to the end, going on from the checkpoint if there is one."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its semaphores would survive the kill
    fsync = os.fsync

    def slow(file: int) -> None:
        time.sleep(0.05)  # long enough to be hit
        fsync(file)

    os.fsync = slow
    run = Run(SETUPS["sum with mu"], seed=9 if Path(path).exists() else 0)
    Path(f"{path}.started").touch()
    for step in run.lc.steps(progress=False, checkpoint=path, save=run.save):
        run.train(step.index)
        time.sleep(0.1)
    torch.save(run.outcome(), f"{path}.end")


def test_sigkill(processes: Any, tmp_path: Path) -> None:
    """Killed in a write, in a body, and anywhere; then started again and left alone."""
    path, temporary, started, end = (
        tmp_path / f"run.pt{suffix}" for suffix in ("", ".tmp", ".started", ".end")
    )

    def kill(ready: Callable[[], bool], delay: float) -> None:
        started.unlink(missing_ok=True)
        process = processes.Process(target=_script, args=(str(path),))
        process.start()
        while not (started.exists() and ready()):
            assert process.is_alive(), "it ended before it could be killed"
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and not end.exists()

    kill(lambda: path.exists() and temporary.exists(), 0)  # in the write after the first step
    assert temporary.exists()
    written = path.stat().st_mtime_ns
    kill(lambda: path.stat().st_mtime_ns != written, random.Random().uniform(0, 0.1))
    kill(lambda: True, random.Random().uniform(0, 0.15))
    process = processes.Process(target=_script, args=(str(path),))
    process.start()
    process.join()
    expected = snapshot(Run(SETUPS["sum with mu"]).go())
    assert difference(expected, torch.load(end, weights_only=False)) is None
    assert not temporary.exists()


# ------------------------------------------------------------------ two processes


def _rank(rank: int, folder: str) -> None:
    """One of two processes, each with its own dropout masks and order of the data."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    path = Path(folder) / "run.pt"

    def make(seed: int) -> Run:
        run = Run(SETUPS["sum"], seed, nn.parallel.DistributedDataParallel)
        torch.manual_seed(100 * seed + rank)
        run.order.manual_seed(100 * seed + rank)
        return run

    def refused(match: str, path: Path, save: dict[str, Any]) -> None:
        with pytest.raises((TypeError, ValueError), match=match):
            next(make(0).lc.steps(progress=False, checkpoint=path, save=save))

    try:
        expected = snapshot(make(0).go())
        with pytest.raises(KeyboardInterrupt):
            make(0).go(path, at=2, stop=1)
        for seed in (1, 2):  # the second time nothing is left to do
            assert difference(expected, make(seed).go(path).outcome()) is None
        odd = {"odd": Odd(Path() if rank == 1 else 1)}  # in one process, refused in both
        refused("not plain data", Path(folder) / "odd.pt", odd)
        own = Path(folder) / str(rank)  # a path that is another file in each process
        own.mkdir()
        if rank == 0:
            (own / "run.pt").touch()
        torch.distributed.barrier()
        refused("only processes \\[0\\] of 2 see this file", own / "run.pt", {})
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes(processes: Any, tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        _rank, (str(tmp_path),), nprocs=2, start_method="forkserver"
    )
    assert not (tmp_path / "odd.pt").exists()
    refused(tmp_path / "run.pt", "was written by 2 processes, now there are 1")
