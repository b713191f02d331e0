"""The experiment scripts run from end to end on a smoke setting, and say what they miss."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
ORIGIN = {"command", "config", "result", "commit", "source_sha256", "package_sha256", "torch"} | {
    "device",
    "threads",
}


def run(script: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXPERIMENTS / script, *map(str, options)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
    )


def numbers(content: Any) -> Iterator[float]:
    """Every number of a JSON file, however deep."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for x in content:
            yield from numbers(x)
    elif isinstance(content, (int, float)):
        yield content


def read(path: Path, origin: set[str] = ORIGIN) -> dict[str, Any]:
    """The result in a script's JSON, which says where it comes from; its numbers are finite."""
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content.keys() == origin
    assert all(map(math.isfinite, numbers(content)))
    result: dict[str, Any] = content["result"]
    return result


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A script as a module, without running it."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module


# ------------------------------------------------------------------ digits


def test_digits(tmp_path: Path) -> None:
    options = ("--smoke", "--quiet", "--batch", 32, "--seeds", 2, "--out", tmp_path / "new")
    done = run("digits.py", *map(str, options))
    assert done.stderr == ""
    stem = tmp_path / "new" / "digits_smoke"
    names = [f"{stem.name}{suffix}" for suffix in (".json", ".png", ".svg")]
    assert sorted(path.name for path in stem.parent.iterdir()) == names
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    picture = stem.with_suffix(".svg").read_text(encoding="utf-8")

    content = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    assert "--batch 32" in content["command"] and "--seeds 2" in content["command"]
    assert content["config"]["batch"] == 32
    assert str(tmp_path) not in json.dumps(content)
    result = read(stem.with_suffix(".json"))
    assert result["seeds"] == [0, 1]
    assert len(result["reference_errors"]) == 2
    table = done.stdout.splitlines()
    for name, entry in result["schemes"].items():
        assert len(entry["direct_errors"]) == len(entry["lc_errors"]) == 2
        assert entry["lc_error_mean"] == sum(entry["lc_errors"]) / 2
        assert entry["ratio_float32"] == pytest.approx(32 / entry["bits_per_weight"], rel=1e-3)
        assert sum(line.startswith(f"{name}  ") for line in table) == 1
        assert f"<!-- {name} -->" in picture
    alone = {"binary", "ternary", "low-rank", "sparse"}
    sums = {"binary + sparse", "low-rank + sparse", "binary + low-rank"}
    assert result["schemes"].keys() == alone | sums | {"binary + low-rank + sparse"}


def test_digits_interrupted(
    load: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(config: object) -> None:
        raise KeyboardInterrupt

    for name in ("digits", "digits_study"):
        script = load(name)
        monkeypatch.setattr(script, "run", interrupted)
        with pytest.raises(SystemExit) as stop:
            script.main(["--smoke", "--out", str(tmp_path)])
        assert stop.value.code == 130
        assert capsys.readouterr().err == "Interrupted: nothing was written.\n"
    assert not list(tmp_path.iterdir())


def test_digits_without_matplotlib(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"lc-compress\[plot\].*--no-figure"):
        load("digits").main(["--smoke"])


def test_digits_splits(load: Callable[[str], Any]) -> None:
    """The test images are the same for all seeds, and nothing else sees them."""
    digits = load("digits")
    config = digits.Config()
    one, other = digits.load(config, 0), digits.load(config, 100)
    assert one.test.equal(other.test) and not one.held_out.equal(other.held_out)
    for data in (one, other):
        parts = [set(index.tolist()) for index in (data.train, data.held_out, data.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(data.images)
        assert [len(parts[1]), len(parts[2])] == [config.held_out, config.test]


def test_digits_study(tmp_path: Path) -> None:
    done = run("digits_study.py", "--smoke", "--quiet", "--out", tmp_path)
    assert done.stderr == ""
    result = read(tmp_path / "digits_study_smoke.json", ORIGIN | {"study_sha256"})
    assert len(result["reference_held_out_errors"]) == 1
    for row in result["variants"]:
        assert len(row["held_out_errors"]) + row["diverged"] == 1
        assert row["question"] in done.stdout and row["name"] in done.stdout


def test_digits_study_settings_exist(load: Callable[[str], Any]) -> None:
    """Each variant changes settings that are there, and each is another setting."""
    digits, study = load("digits"), load("digits_study")
    plan = study.variants(smoke=False)
    settings = {replace(digits.Config(), **variant.changes) for variant in plan}
    assert len(settings) == len(plan)


# ------------------------------------------------------------------ CIFAR-10


def test_restarts(tmp_path: Path) -> None:
    path = tmp_path / "restarts.json"
    run("restarts.py", "--out", path)
    result = read(path)
    (layer,) = result["layers"].values()
    assert len(layer["orders"]) == 6
    assert result["largest_ratio"] == layer["ratio"] <= 1 + 1e-6


@pytest.mark.parametrize("gradient", ["weights", "sum"])
def test_cifar_resnet(gradient: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ("--smoke", "--gradient", gradient, "--seed", "3", "--out", path)
    run("cifar_resnet.py", *options)
    assert list(tmp_path.iterdir()) == [path]
    command = json.loads(path.read_text())["command"]
    assert f"--gradient {gradient} " in command
    assert {"--seed 3", "--smoke", "--no-compile"} <= set(
        re.findall(r"--[a-z-]+(?: \d+)?", command)
    )
    result = read(path)
    errors = {"reference_error", "direct_error_reference_batchnorm", "direct_error", "lc_error"}
    sizes = {"bits", "bits_per_weight", "ratio_float32", "ratio_float16"}
    assert result.keys() >= errors | sizes | {"gap", "curve", "wall_seconds"}
    assert all(0 <= result[name] <= 100 for name in errors)
    assert [entry["epoch"] for entry in result["curve"]] == [1, 2]


def test_cifar_without_files(load: Callable[[str], Any], tmp_path: Path) -> None:
    cifar = load("cifar_resnet")
    with pytest.raises(SystemExit, match=r"data_batch_1\.bin is missing\. Give --data"):
        cifar.load(cifar.Config(data=str(tmp_path)))
    (tmp_path / "data_batch_1.bin").write_bytes(b"cut short")
    with pytest.raises(SystemExit, match="has 9 bytes instead of 30730000"):
        cifar.load(cifar.Config(data=str(tmp_path)))
    with pytest.raises(SystemExit, match=r"net\.th' is missing: give --weights"):
        cifar.pretrained(cifar.Config(weights=str(tmp_path / "net.th")))


# ------------------------------------------------------------------ the C steps' benchmark


def test_bench_c_step(tmp_path: Path) -> None:
    out, nets = tmp_path / "new", tmp_path / "data" / "resnet_cifar10"
    nets.mkdir(parents=True)
    layers = {"module.conv1.weight": torch.randn(8, 3, 3, 3), "module.bn1.weight": torch.ones(8)}
    torch.save({"state_dict": layers}, nets / "resnet20-0.th")
    done = run("bench_c_step.py", "--smoke", "--quiet", "--data", nets.parent, "--out", out)
    assert done.stderr == ""
    stem = out / "bench_c_step_smoke"
    names = [f"{stem.name}{suffix}" for suffix in (".json", ".png", ".svg")]
    assert sorted(path.name for path in out.iterdir()) == names
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "Input (b, stories15M) skipped" in done.stdout
    assert "Input (b, ResNets) skipped" not in done.stdout

    text = stem.with_suffix(".json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and "--data DIR" in json.loads(text)["command"]
    versions = {"numpy", "scipy", "scikit-learn", "cores"}
    result = read(stem.with_suffix(".json"), ORIGIN | versions)
    rows = set(result["targets"])
    for name in ("a", "b, ResNets", "c"):
        found = {x["row"]: x for x in result["solver"] if x["input"] == name}
        assert found.keys() == rows
        for row, x in found.items():
            assert min(x[f"{call}_seconds"] for call in ("cold", "warm", "S", "RW")) > 0
            if row in result["listed"]["times"] and not row.startswith("LowRank"):
                assert max(abs(x["cold_excess"]), abs(x["warm_excess"])) < 1e-9
    assert {x["peer"] for x in result["peer"] if x["row"] == "KMeans 16"} == {
        "scikit-learn, n_init=1",
        "scikit-learn, n_init=10",
    }
    assert not any("failed" in x for kind in ("solver", "peer") for x in result[kind])
    assert max(result["vectors"][0]["excess"].values()) < 1e-9
    assert len(result["order"]) == 6 and result["network"][0]["c_step_seconds"] > 0
    table = done.stdout[done.stdout.index("Targets: (a), one thread") :]
    assert all(f"\n{row}" in table for row in rows)
    again = run("bench_report.py", stem.with_suffix(".json"))
    assert again.stderr == "" and again.stdout.rstrip() in done.stdout


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", ["digits", "digits_study", "cifar_resnet"])
def test_overrides(name: str, load: Callable[[str], Any]) -> None:
    """Every setting can be given on the command line; the others stay at their defaults."""
    script = load(name)

    def parsed(*options: str) -> Any:
        config = script.parse(list(options))
        return config[0] if isinstance(config, tuple) else config

    default = parsed()
    other = {"scheme": "binary", "gradient": "weights", "smoke": True}
    for field in fields(script.Config):
        if field.name == "smoke" or (name, field.name) == ("cifar_resnet", "gradient"):
            continue  # these choose other defaults
        value = getattr(default, field.name)
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            wanted: Any = not value
            given = [option if wanted else option.replace("--", "--no-", 1)]
        else:
            text = f"{value}x" if isinstance(value, str) else None
            wanted = other.get(field.name, text if text is not None else value + 1)
            given = [option, str(wanted)]
        assert parsed(*given) == replace(default, **{field.name: wanted}), given
    assert parsed("--smoke").smoke and parsed("--smoke", "--seed", "7").seed == 7


def test_wrong_settings(load: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="--seeds 0: at least 1"):
        load("digits").parse(["--seeds", "0"])
    with pytest.raises(SystemExit):
        load("digits").parse(["--gradient", "other"])
    assert "invalid choice: 'other'" in capsys.readouterr().err


# ------------------------------------------------------------------ packed files


def test_packed_files(tmp_path: Path) -> None:
    done = run("packed_files.py", "--smoke", "--out", tmp_path / "packed.json")
    result = read(tmp_path / "packed.json", ORIGIN | {"wall_seconds"})
    assert [(row["density"], row["entropy_coded"]) for row in result["sizes"]] == [
        (density, coded) for density in (0.01, 0.02, 0.03, 0.05) for coded in (False, True)
    ]
    for row in result["sizes"]:  # of random weights: the target is that of the pretrained ones
        assert row["header_share"] < 0.025
        assert row["ratio"] > row["target"]
    (loaded,), (held,) = result["loading"], result["memory"]
    assert loaded["bytes"] < loaded["dense_bytes"] / 20
    assert loaded["ratio"] > 0 and held["save_layers"] >= 0
    assert "Binary" in done.stdout


@pytest.mark.parametrize("name", ["order_networks", "order_lm"])
def test_order(name: str, tmp_path: Path) -> None:
    run(f"{name}.py", "--smoke", "--quiet", "--out", tmp_path)
    stem = tmp_path / f"{name}_smoke"
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        f"{stem.name}{suffix}" for suffix in (".json", ".png", ".svg")
    ]
    assert read(stem.with_suffix(".json"))


@pytest.mark.parametrize("name", ["order_encoder", "order_resnet", "order_lm_tuned"])
def test_order_of_whole_models(name: str, tmp_path: Path) -> None:
    run(f"{name}.py", "--smoke", "--quiet", "--out", tmp_path)
    stem = tmp_path / f"{name}_smoke"
    names = {x.name for x in tmp_path.iterdir()}
    assert {f"{stem.name}{suffix}" for suffix in (".json", ".png", ".svg")} <= names
    assert json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))["result"]


def test_kill_resume(tmp_path: Path) -> None:
    run("kill_resume.py", "--smoke", "--out", tmp_path / "kills.json")
    found = json.loads((tmp_path / "kills.json").read_text(encoding="utf-8"))
    assert found["result"]["identical"] and found["result"]["kills"] == 2


def test_chain_or_sum(tmp_path: Path) -> None:
    """Both families at one size, stored positions included; the learned ones in it, too."""
    run("order_or_sum.py", "--smoke", "--quiet", "--out", tmp_path)
    found = json.loads((tmp_path / "order_or_sum_smoke.json").read_text(encoding="utf-8"))["result"]
    rows = found["one_shot"]
    assert {row["family"] for row in rows} == {"then", "sum"}
    for row in rows:
        assert row["bits"] == pytest.approx(row["target"], rel=0.01)
        assert statistics.mean(row["losses"]) == pytest.approx(row["loss"], rel=1e-5)
    assert len(found["learned"]) == 4 and found["selection"]


def test_bench_order_report(tmp_path: Path) -> None:
    run("bench_order_report.py", "--smoke", "--out", tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["result"]["rows"]
    assert rows and all(row["layers"] > 0 and row["seconds"] > 0 for row in rows)


def test_implicit(tmp_path: Path) -> None:
    done = run("implicit.py", "--smoke", "--quiet", "--out", tmp_path / "implicit.json")
    result = read(tmp_path / "implicit.json", ORIGIN)
    assert result["compared"].keys() == {"gradient", "implicit"}
    for form, found in result["compared"].items():
        rows = [row for row in result["grid"] if row["form"] == form]
        best = min(rows, key=lambda row: row["train_loss_mean"])
        assert all(best[key] == x for key, x in found["settings"].items())
        assert f"{found['loss']['loss_mean']:.4f}" in done.stdout


def test_bench_l_step(tmp_path: Path) -> None:
    done = run("bench_l_step.py", "--smoke", "--no-settings", "--out", tmp_path / "l.json")
    for group in ("ways", "ways_bfloat16"):
        ways = read(tmp_path / "l.json")[group]
        assert len(ways) == 4 and ways["plain"]["ratio"] == 1
        limited = [row for row in ways.values() if "limit" in row]
        assert [row["met"] for row in limited] == [r["ratio"] <= r["limit"] for r in limited]
        assert len(limited) == 2
    assert "straight-through, C step every iteration" in done.stdout


def test_each_way_of_the_l_step_is_the_one_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    bench = importlib.import_module("bench_l_step")
    config = bench.Config(network="resnet8", batch=2)
    hooks = {
        name: type(bench.Trained(config, options, compiled=False).lc._hook).__name__
        for name, options in bench.WAYS.items()
        if options is not None
    }
    assert hooks == {
        "classic": "PenaltyHook",
        "classic, implicit": "ImplicitHook",
        "straight-through, C step every iteration": "SumHook",
    }
    assert bench.LIMITS.keys() <= bench.WAYS.keys()


def test_train_network(tmp_path: Path) -> None:
    run("train_network.py", "--smoke", "--out", tmp_path / "net")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["net.json", "net.pt"]
    result = read(tmp_path / "net.json")
    assert len(result["losses"]) == 1 and 0 <= result["test_error"] <= 100
    assert set(torch.load(tmp_path / "net.pt", weights_only=True)) > {"linear.weight"}
    before = (tmp_path / "net.pt").read_bytes()
    assert "is there" in run("train_network.py", "--smoke", "--out", tmp_path / "net").stdout
    with pytest.raises(subprocess.CalledProcessError) as refused:
        run("train_network.py", "--smoke", "--lr", "0.2", "--out", tmp_path / "net")
    assert "is of a network trained otherwise" in refused.value.stderr
    assert (tmp_path / "net.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["bench_l_step", "bench_scheduled", "implicit", "train_network"])
def test_smoke_has_an_output_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless one is given: a trial does not replace a result."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    common, config = importlib.import_module("common"), importlib.import_module(name).Config
    assert "= apart(Config(" in (EXPERIMENTS / f"{name}.py").read_text()
    assert "_smoke" in common.apart(config(smoke=True)).out
    assert common.apart(config()) == config()
    assert common.apart(config(smoke=True, out="mine")).out == "mine"


def test_fuzz_storage(tmp_path: Path) -> None:
    options = ("--count", 60, "--kills", 1, "--quiet", "--out", tmp_path / "fuzz.json")
    done = run("fuzz_storage.py", *map(str, options))
    result = read(tmp_path / "fuzz.json", ORIGIN | {"wall_seconds"})
    assert sum(result["outcomes"].values()) == result["mutations"] == 60
    assert result["failures"] == result["kills"]["failures"] == []
    assert "0 failures in 60 mutations and 1 kills" in done.stdout


def test_fuzz_storage_shrinks_what_fails(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect that is planted is found, reported as a small one, and the search goes on."""
    script = load("fuzz_storage")
    fuzz = script.Fuzz(tmp_path, quiet=True)
    whole = {source.name: source.whole for source in fuzz.sources}

    def planted(mutation: Any, policy: str) -> tuple[str, str]:
        assert mutation.content != whole[mutation.source.name]
        wrong = mutation.content[:8] != mutation.source.whole[:8]
        return "refused", "the length was changed" if wrong else ""

    monkeypatch.setattr(fuzz, "attempt", planted)
    done = fuzz.search("byte", 2000, 0)
    assert 0 < done < 2000
    (failure,) = fuzz.failures
    assert re.fullmatch(
        r"Mutation\(kind='byte', source=0.lc, edits=\['byte 0 \^ 1'\]\), never: "
        "the length was changed",
        failure,
    )
    for kind in script.KINDS:
        counts = []
        for _ in range(2):
            seen: list[bytes] = []
            monkeypatch.setattr(
                fuzz, "attempt", lambda m, _, seen=seen: (seen.append(m.content), ("", ""))[1]
            )
            assert fuzz.search(kind, 20, 3) == 20
            counts.append(seen)
        assert counts[0] == counts[1] and len(set(counts[0])) > 10


def test_trimmed(tmp_path: Path) -> None:
    run("trimmed.py", "--smoke", "--out", tmp_path / "trimmed.json")
    content = json.loads((tmp_path / "trimmed.json").read_text(encoding="utf-8"))
    assert content["result"] and all(map(math.isfinite, numbers(content["result"])))


# ------------------------------------------------------------------ training order


def test_training_order(tmp_path: Path) -> None:
    arguments = ("--smoke", "--seeds", "0", "--bits", "4", "--out", str(tmp_path))
    orders = ("--orders", "late direct dense lc", "--whats", "weights both")
    done = run("training_order.py", *arguments, *orders)
    stems = {line.split()[0] for line in done.stdout.splitlines()}
    assert stems == {path.stem for path in tmp_path.glob("*.json")}
    assert stems == {
        *(
            f"{order}_{what}_4bit_s0"
            for order in ("late", "direct")
            for what in ("weights", "both")
        ),
        "lc_weights_4bit_s0",
        "dense_s0",
    }
    found = {stem: read(tmp_path / f"{stem}.json") for stem in stems}
    both = found["late_both_4bit_s0"]
    assert both["levels_training"] <= 16 and both["levels_evaluation"] <= 16
    assert 0.1 < both["activations_pruned"] < 0.5 and 0.45 < both["weights_pruned"] < 0.5
    assert both["density_paper"] > both["density_stored"] or both["accuracy"] == 0
    sizes = {found[f"{name}_weights_4bit_s0"]["file_bytes"] for name in ("late", "direct", "lc")}
    assert max(sizes) < 1.02 * min(sizes)  # equal parts: equal bytes
    assert run("training_order.py", *arguments, *orders).stdout == ""  # all are there
    again = subprocess.run(
        [sys.executable, EXPERIMENTS / "training_order.py", *arguments, *orders, "--lr", "0.5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 1 and "is of other settings" in again.stderr


def test_training_orders_have_their_times(load: Callable[[str], Any]) -> None:
    """The fair comparison: as many steps after the last event as quantize, then prune."""
    module = load("training_order")
    fair, other = (
        (module.ORDERS | module.OTHERS)[name](1000)
        for name in ("prune-quantize-24", "quantize-prune")
    )
    last = [
        max(e.step for name in plan.schedules for e in plan.events(name)) for plan in (fair, other)
    ]
    assert last == [760, 760]
    assert fair.prune == module.ORDERS["prune-quantize"](1000).prune


def test_super_resolution(tmp_path: Path, load: Callable[[str], Any]) -> None:
    run("super_resolution.py", "--smoke", "--seeds", "3", "--out", tmp_path)
    result = read(tmp_path / "s3.json")
    module = load("super_resolution")
    assert set(result["arms"]) == {"bicubic", "not compressed", *module.ARMS, module.FROM_START}
    assert sum(p.numel() for p in module.ESPCN().parameters()) == 22_729
    small = result["arms"]["both, prune then quantize, 4 bit"]["file_bytes"]
    assert small < result["arms"]["both, prune then quantize"]["file_bytes"]


def test_order_figure(tmp_path: Path) -> None:
    run("order_tables.py", "--out", tmp_path)
    assert (tmp_path / "training-order.png").read_bytes().startswith(b"\x89PNG")


def test_bench_scheduled(tmp_path: Path) -> None:
    run("bench_scheduled.py", "--smoke", "--out", tmp_path / "s.json")
    ways = read(tmp_path / "s.json")["ways"]
    assert list(ways) == ["plain", "weights", "weights and activations"]
    assert all(ways[w]["met"] == (ways[w]["ratio"] <= ways[w]["limit"]) for w in list(ways)[1:])
