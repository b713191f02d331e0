"""One CIFAR-10 run and a sweep of them: every way of learning, interruptions, wrong settings."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lc_compress import inspect, load

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A script as a module, without running it."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module


@pytest.fixture
def run(script: Callable[[str], Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run cifar.py in this process on random images; returns its record."""
    cifar = script("cifar")

    def go(*options: str, out: Path | None = None) -> dict[str, Any]:
        argv = ["--smoke", "--calibration", "2", *options, "--out", str(out or tmp_path)]
        config = cifar.parse(argv)
        cifar.main(argv)
        path = Path(config.out) / f"{cifar.slug(config)}.json"
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content | {"path": path}

    return go


@pytest.fixture
def interrupt(
    run: Any, script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """The same, interrupted by the user in the second stretch of training."""
    learning = script("learning")

    def go(*options: str, out: Path | None = None) -> None:
        train, calls = learning.train, iter(range(9))

        def interrupted(*args: Any) -> Any:
            if next(calls) == 1:
                raise KeyboardInterrupt
            return train(*args)

        with monkeypatch.context() as patch:
            patch.setattr(learning, "train", interrupted)
            with pytest.raises(SystemExit, match="goes on from the last LC step"):
                run(*options, out=out)

    return go


METHODS = {
    "parq": "binary",  # where torchao is installed
    "lc-sum": "binary + sparse 2%",
    "lc-weights": "rank 1e-3",
    "lc-implicit": "lowrank 25% + sparse 2%",
    "handover": "binary + lowrank 10% + sparse 1%",
    "finetune": "sparse 30% > int 4",  # trains the values only
    "ste": "binary",
}


@pytest.mark.filterwarnings("ignore::UserWarning:torchao")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_measures_the_packed_file(method: str, run: Any, script: Any) -> None:
    if method == "parq":
        pytest.importorskip("torchao")
    refine = () if method in ("ste", "parq", "finetune") else ("--refine", "0.3")
    record = run("--method", method, "--scheme", METHODS[method], *refine)
    path: Path = record["path"]
    assert record["status"] == "done" and record["name"] == path.stem
    assert sorted(x.name for x in path.parent.iterdir()) == [path.name, f"{path.stem}.lc"]
    assert f"--method {method}" in record["command"] or method == "lc-sum"
    names = ["direct", "learned", *(["refined"] if refine else [])]
    assert list(record["points"]) == names
    training = script("training")
    data = training.images("", torch.device("cpu"), True)
    file = path.with_suffix(".lc")
    net = load(file, script("networks").network("resnet8"))
    error, _ = training.measured(net, data.test, data.test_labels)
    last = record["points"][names[-1]]
    assert error == last["test_error"] and file.stat().st_size == last["file_bytes"]
    report = inspect(file)
    assert last["bits"] == 8 * last["file_bytes"] == 8 * report.total.bytes
    weights = sum(layer["weights"] for layer in record["layers"])
    bits = sum(sum(layer["bits"].values()) for layer in record["layers"])
    assert last["bits_per_weight"] == pytest.approx(bits / weights)
    assert sum(row.weights for row in report.rows if row.parts != "") >= weights
    for point in record["points"].values():
        assert math.isfinite(point["train_loss"]) and 0 <= point["test_error"] <= 100
        reference = record["reference"]["file_bytes"]
        assert point["file_ratio"] == pytest.approx(reference / point["file_bytes"])
    epochs = [entry["epoch"] for entry in record["curve"]]
    assert epochs == sorted(epochs)
    assert epochs[-1] == pytest.approx(1.0 + 0.3 * bool(refine), abs=0.15)
    assert all(math.isfinite(entry["loss"]) for entry in record["curve"])


def test_families(script: Any) -> None:
    family = script("schemes").family
    given = ["binary", "sparse 5% + kmeans 4", "lowrank 5% + sparse 1%", "lowrank 5% + int 4"]
    assert [family(x) for x in given] == ["Q", "Q+S", "L+S", "Q+L"]
    given = ["sparse 1% + lowrank 5% + ternary", "sparse 5% > int 4", "lowrank 10% > int 8"]
    assert [family(x) for x in given] == ["Q+L+S", "S>Q", "L>Q"]


@pytest.mark.parametrize("method", ["lc-sum", "handover", "ste", "parq", "finetune"])
def test_an_interrupted_run_goes_on_to_the_same_end(
    method: str,
    run: Any,
    interrupt: Any,
    script: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if method == "parq":
        pytest.importorskip("torchao")
    options = ("--method", method, "--scheme", "binary")
    whole = run(*options, out=tmp_path / "whole")
    interrupt(*options, out=tmp_path / "cut")
    (record,) = (tmp_path / "cut").glob("*.json")
    assert json.loads(record.read_text())["status"] == "running"
    learning = script("learning")
    train = learning.train
    with monkeypatch.context() as patch:
        left = []
        patch.setattr(learning, "train", lambda *args: left.append(1) or train(*args))
        resumed = run(*options, out=tmp_path / "cut")
    steps = len(whole["curve"])
    assert len(left) == steps - 1 >= 1
    assert resumed["status"] == "done"
    for name in ("test_error", "train_loss", "file_bytes"):
        assert resumed["points"]["learned"][name] == whole["points"]["learned"][name]
    timeless = [
        [{k: x for k, x in e.items() if k != "seconds"} for e in r["curve"]]
        for r in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]
    seconds = [e["seconds"] for e in resumed["curve"]]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert whole["path"].with_suffix(".lc").read_bytes() == (
        resumed["path"].with_suffix(".lc").read_bytes()
    )


def test_a_finished_run_is_not_repeated_and_a_cut_record_is(
    run: Any, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run("--scheme", "binary", "--epochs", "0.2")
    with monkeypatch.context() as patch:
        patch.setattr(script("learning"), "train", None)  # not called
        assert run("--scheme", "binary", "--epochs", "0.2") == first
    path: Path = first["path"]
    path.write_text(path.read_text()[:300], encoding="utf-8")
    capsys.readouterr()
    again = run("--scheme", "binary", "--epochs", "0.2")
    assert f"{path} was cut short: the run starts again" in capsys.readouterr().out
    assert again["points"]["learned"]["test_error"] == first["points"]["learned"]["test_error"]


def test_a_network_of_the_users(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(4, 10))\n"
    )
    out = tmp_path / "out"
    record = run("--model", f"{file}:make", "--scheme", "kmeans 2", "--epochs", "0.2", out=out)
    assert [layer["name"] for layer in record["layers"]] == ["0.weight", "3.weight"]
    more = (
        "def wide(width): ...\ndef few(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 9))\n"
    )
    file.write_text(file.read_text() + more)
    (tmp_path / "broken.py").write_text("def make(:")
    for text, message in (
        (f"{file}:other", "has no function 'other'"),
        ("no.py:f", "is missing"),
        (f"{file}:wide", "is called without arguments: .*'width'"),
        (f"{file}:few", r"gives \(2, 9\) for 2 images: \(2, 10\) is needed"),
        (f"{tmp_path}/broken.py:make", "is not Python: invalid syntax"),
    ):
        with pytest.raises(SystemExit, match=message):
            run("--network", text, out=out)


def test_shared_weights_are_compressed_once(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "tied.py"
    file.write_text(
        "from torch import nn\n"
        "def make():\n"
        "    a, b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)\n"
        "    b.weight = a.weight\n"
        "    return nn.Sequential(a, b, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))\n"
    )
    record = run("--model", f"{file}:make", "--scheme", "binary", "--epochs", "0.2")
    assert [layer["name"] for layer in record["layers"]] == ["0.weight", "4.weight"]


def test_a_users_file_is_a_module_like_others(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its neighbours can be imported; dataclasses and torch.compile look it up by its name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_it.py").write_text("CLASSES = 10\n")
    (tmp_path / "net.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "from beside_it import CLASSES\n"
        "@dataclass\n"
        "class Sizes:\n"
        "    classes: int = CLASSES\n"
        "class Net(nn.Linear): ...\n"
        "def make():\n"
        "    return Net(3, Sizes().classes)\n"
    )
    net = script("networks").network(f"{tmp_path}/net.py:make")
    assert net.out_features == 10
    assert sys.modules[type(net).__module__].Net is type(net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scheme", "binry"), "none of binary, ternary"),
        (("--scheme", "sparse 2"), "sparse P%"),
        (("--scheme", "binary 3"), "none of binary"),
        (("--method", "magic"), "one of lc-sum"),
        (("--network", "resnet21"), "There is no network 'resnet21'"),
        (("--epochs", "0"), "--epochs 0.0: more than 0"),
        (("--method", "parq", "--scheme", "kmeans 4"), "use --scheme binary"),
        (("--scheme", "binary + "), "a part is missing beside"),
        (("--scheme", "lowrank 500%"), "above 0 and at most 100 %"),
        (("--scheme", "rank 8e-3 + sparse 1%"), "Use lc-weights or lc-implicit"),
        (("--epochs", "nan"), "--epochs nan: a finite number"),
        (("--epochs", "inf"), "--epochs inf: a finite number"),
        (("--growth", "0"), "--growth 0.0: at least 1"),
        (("--mu0", "-1"), "--mu0 -1.0: more than 0"),
        (("--refine", "-1"), "--refine -1.0: at least 0"),
        (("--handover", "2"), "--handover 2.0: at least 0, at most 1"),
        (("--momentum", "2"), "--momentum 2.0: at least 0, at most 0.999"),
        (("--device", "foo"), "--device foo: "),
        (("--device", "meta"), "--device meta: "),
        (("--seed", "-1"), "--seed -1: at least 0"),
        (("--seed", "99999999999999999999"), "--seed 99999999999999999999: at least 0, at most"),
        (("--smoke", "--network", "resnet200"), "There is no network 'resnet200'"),
    ],
)
def test_wrong_settings(
    options: tuple[str, ...], message: str, script: Any, tmp_path: Path
) -> None:
    argv = ["--out", str(tmp_path), "--no-compile", *options]
    smoke = () if "--network" in options else ("--smoke",)
    with pytest.raises(SystemExit, match=message):
        script("cifar").main([*argv, *smoke, "--data", str(tmp_path)])


def test_unknown_settings(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("cifar").parse(["--learning", "3"])
    assert "unrecognized arguments: --learning" in capsys.readouterr().err


def test_missing_files(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar, networks = script("cifar"), script("networks")
    argv = ["--out", str(tmp_path / "out"), "--data", str(tmp_path), "--no-compile"]
    file = tmp_path / "net.th"
    with pytest.raises(SystemExit, match=r"net\.th' is missing: give --weights .*\(those of "):
        cifar.main([*argv, "--weights", str(file)])
    torch.save({"state_dict": networks.network("vgg16/16").state_dict()}, file)
    with pytest.raises(SystemExit, match=r"does not hold the weights of resnet20.*Missing key"):
        cifar.main([*argv, "--weights", str(file)])
    file.write_bytes(b"no weights")
    with pytest.raises(SystemExit, match="does not hold the weights of resnet20"):
        cifar.main([*argv, "--model", "resnet20", "--checkpoint", str(file)])
    torch.save({"state_dict": networks.network("resnet20").state_dict()}, file)
    with pytest.raises(SystemExit, match=r"data_batch_1\.bin is missing.*cifar-10-binary"):
        cifar.main([*argv, "--weights", str(file)])
    random = script("training").images("", torch.device("cpu"), True)
    monkeypatch.setattr(cifar, "images", lambda *_: random)
    with pytest.raises(SystemExit, match=r"test error, not 8\.27 %"):
        cifar.main([*argv, "--weights", str(file)])
    with pytest.raises(SystemExit, match="--batch 193: at most 192"):
        cifar.main([*argv, "--weights", str(file), "--batch", "193"])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot be written to"):
        cifar.main([*argv, "--out", str(tmp_path / "file" / "runs")])


def test_a_run_of_other_weights_is_another_run(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name does not tell; checksums in the record do. `{network}` finds the file."""
    cifar, networks = script("cifar"), script("networks")
    random = script("training").images("", torch.device("cpu"), True)
    monkeypatch.setattr(cifar, "images", lambda *_: random)
    monkeypatch.setattr(cifar, "ERRORS", {})
    for i in range(2):
        torch.manual_seed(i)
        torch.save(networks.network("resnet8").state_dict(), tmp_path / f"resnet8-{i}.th")
    argv = ["--out", str(tmp_path), "--no-compile", "--batch", "32", "--epochs", "0.2"]
    argv += ["--network", "resnet8", "--scheme", "binary"]
    with pytest.raises(SystemExit, match="names 2 files: give --weights"):
        cifar.main([*argv, "--weights", str(tmp_path / "{network}-*.th")])
    cifar.main([*argv, "--weights", str(tmp_path / "{network}-0*.th")])
    cifar.main([*argv, "--weights", str(tmp_path / "resnet8-0.th")])
    with pytest.raises(SystemExit, match="made from another trained network"):
        cifar.main([*argv, "--weights", str(tmp_path / "resnet8-1.th")])
    grid = [*argv[2:], "--weights", str(tmp_path / "resnet8-1.th")]
    (job,) = script("sweep").jobs(grid, str(tmp_path))
    assert job.status() == "foreign"
    before = job.path.read_bytes()
    assert script("sweep").work([job], 1, 1, True) == [job]
    assert f"{job.path} was made from another trained network" in capsys.readouterr().out
    assert job.path.read_bytes() == before
    (tmp_path / "resnet8-1.th").unlink()
    assert job.status() == "done"  # what is finished needs no weights


def test_a_checkpoint_of_other_settings_is_not_used(
    run: Any, interrupt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a name of the user's and a record that was cut short, nothing else would tell."""
    options = ("--method", "ste", "--scheme", "binary", "--name", "mine")
    whole = run(*options, "--lr", "0.1", out=tmp_path / "whole")
    cut = tmp_path / "cut"
    interrupt(*options, out=cut)
    assert list(cut.glob("*.ckpt"))
    record = cut / "mine.json"
    record.write_text(record.read_text()[:100], encoding="utf-8")
    capsys.readouterr()
    other = run(*options, "--lr", "0.1", out=cut)
    assert "was cut short: the run starts again" in capsys.readouterr().out
    assert other["points"]["learned"]["train_loss"] == whole["points"]["learned"]["train_loss"]
    assert not list(cut.glob("*.ckpt"))


def test_a_checkpoint_that_cannot_be_read(
    run: Any, interrupt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name and what to do. A name that goes on from another one takes no checkpoint of it."""
    options = ("--method", "ste", "--scheme", "binary", "--name", "mine.2")
    interrupt(*options)
    run(*options[:-1], "mine")
    (checkpoint,) = tmp_path.glob("*.ckpt")
    whole = checkpoint.read_bytes()
    for left in (99, 0):
        checkpoint.write_bytes(whole[:left])
        message = r"mine\.2\..*ckpt is not a readable checkpoint \(.+\). Delete"
        with pytest.raises(SystemExit, match=message):
            run(*options)
    checkpoint.write_bytes(whole)
    (tmp_path / "mine.2.json").write_text("{")
    capsys.readouterr()
    assert run(*options)["status"] == "done"
    assert "was cut short: the run goes on from its checkpoint" in capsys.readouterr().out


def test_one_process_makes_a_record(run: Any, script: Any, tmp_path: Path) -> None:
    common, sweep = script("common"), script("sweep")
    grid = ["--smoke", "--calibration", "2", "--epochs", "0.2", "--scheme", "binary"]
    (job,) = sweep.jobs(grid, str(tmp_path))
    log = tmp_path / "log"
    log.write_text("what went wrong\n")
    with common.locked(job.path.with_suffix(".lock")):
        with pytest.raises(SystemExit, match="is being made by another process"):
            run(*grid[3:])
        sweep.failed(job, 1, log)
        assert job.status() == "new"
    assert run(*grid[3:])["status"] == "done"
    sweep.failed(job, 139, log)  # died after it had finished
    assert job.status() == "done"
    assert job.progress() == (0.2, 0.2)
    assert sorted(x.suffix for x in tmp_path.iterdir()) == ["", ".json", ".lc"]


def test_a_folder_with_a_run_of_other_settings(run: Any) -> None:
    run("--scheme", "binary", "--epochs", "0.2", "--name", "mine")
    with pytest.raises(
        SystemExit, match=r"\(scheme 'binary' there, 'ternary' here\): give another"
    ):
        run("--scheme", "ternary", "--epochs", "0.2", "--name", "mine")


# ------------------------------------------------------------------ sweeps


def test_a_sweep_runs_the_grid_once_and_reports_failures(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, out = script("sweep"), tmp_path / "runs"
    bad = tmp_path / "bad.py"
    bad.write_text("def make():\n    raise ValueError('broken network')\n")
    grid = [
        "--smoke",
        "--epochs",
        "0.2",
        "--network",
        f"{bad}:make",
        "resnet8",
        "--scheme",
        "binary",
    ]
    argv = ["--quiet", "--jobs", "2", "--out", str(out), "--", *grid]
    with pytest.raises(SystemExit) as stop:
        sweep.main(argv)
    assert stop.value.code == 1
    assert "1 of 2 runs are done" in capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    assert sorted(r["status"] for r in records) == ["done", "failed"]
    (broken,) = (r for r in records if r["status"] == "failed")
    assert "broken network" in broken["error"] and broken["config"]["seed"] == 0
    assert broken["config"].keys() == records[0]["config"].keys()
    bad.write_text(
        (EXPERIMENTS / "networks.py").read_text() + "\ndef make():\n    return ResNet(8)\n"
    )
    done = next(out.glob("resnet8*.json"))
    before = done.stat().st_mtime_ns
    with pytest.raises(SystemExit) as stop:
        sweep.main(argv)
    assert stop.value.code == 0 and done.stat().st_mtime_ns == before
    assert {json.loads(p.read_text())["status"] for p in out.glob("*.json")} == {"done"}
    assert not list(out.glob("*.log"))


def test_a_sweep_says_that_a_record_was_cut_short_and_makes_it_again(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, out = script("sweep"), tmp_path / "runs"
    grid = ["--smoke", "--epochs", "0.2", "--network", "resnet8", "--scheme", "binary", "ternary"]
    cut, _ = (job.path for job in sweep.jobs(grid, str(out)))
    argv = ["--quiet", "--out", str(out), "--", *grid]
    with pytest.raises(SystemExit):
        sweep.main(argv)
    whole = cut.read_text()
    cut.write_text(whole[:200])
    sweep.main(["--list", *argv])
    assert "cut short" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        sweep.main(argv)
    assert stop.value.code == 0 and f"{cut} was cut short" in capsys.readouterr().out
    assert json.loads(cut.read_text())["points"].keys() == json.loads(whole)["points"].keys()


def test_the_grid(script: Any, tmp_path: Path) -> None:
    sweep = script("sweep")
    plan = sweep.jobs(["--seed", "0", "1", "--smoke", "--scheme", "binary", "kmeans 2"], "runs")
    assert [(j.config.seed, j.config.scheme) for j in plan] == [
        (0, "binary"),
        (0, "kmeans 2"),
        (1, "binary"),
        (1, "kmeans 2"),
    ]
    assert len({job.path for job in plan}) == 4 and all(job.config.smoke for job in plan)
    for words, message in (
        (["--sed", "1"], "--sed is no setting"),
        (["binary"], "follows no option"),
        (["--out", "x"], "--out is no setting"),
        (["--scheme", "binry"], "none of binary"),
        (["--scheme", "binary", "--scheme", "kmeans 2"], "--scheme twice"),
        (["--smoke", "--seed", "0", "0"], "the same settings twice"),
        (["--smoke", "--weights", "a.th", "b.th"], "the name does not tell apart"),
    ):
        with pytest.raises(SystemExit, match=message):
            sweep.jobs(words, "runs")
