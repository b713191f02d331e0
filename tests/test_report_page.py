"""The report over a folder of runs: tables against their own arithmetic, the page in a browser."""

from __future__ import annotations

import csv
import fcntl
import importlib
import json
import math
import os
import re
import select
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='hacked = 2'>|`$_{$"
SCHEMES = {  # family, bits per weight, error above the reference
    "binary": ("Q", 1.1, 6.0),
    "binary + sparse 2%": ("Q+S", 1.5, 1.0),
    "sparse 20% > kmeans 4": ("S>Q", 1.5, 2.5),
    "lowrank 20% + sparse 1%": ("L+S", 3.0, 0.5),
}
REFERENCES = {"resnet20": (8.27, 269_722), HOSTILE: (6.61, 853_018)}
Record = dict[str, Any]


def point(error: float, bits: float, weights: int, epochs: float) -> Record:
    """Where the training loss is not known, as baselines may have it."""
    size = int(bits * weights / 8) + 1234
    return {
        "test_error": error,
        "train_loss": None if epochs else 1.25,
        "bits": int(bits * weights),
        "bits_per_weight": bits,
        "file_bytes": size,
        "file_ratio": (4 * weights + 800) / size,
        "epochs": epochs,
        "seconds": 110.0 * epochs,
    }


def run(network: str, scheme: str, method: str, seed: int, **other: Any) -> Record:
    """A finished run whose numbers depend on all that it is told."""
    (reference, weights), (family, bits, above) = REFERENCES[network], SCHEMES[scheme]
    shift = {"lc-sum": 1.0, "lc-weights": 1.5, "ste": 1.25}[method]
    error = reference + above * shift + (0.1, -0.2, 0.03)[seed]
    points = {
        "direct": point(reference + 5 * above + 20 + 0.3 * seed, bits, weights, 0),
        "learned": point(error, bits, weights, 12),
    }
    if method != "ste":
        points["refined"] = point(error - 0.07 - 0.01 * seed, bits, weights, 13)
    curve = [
        {"epoch": i / 4, "step": i, "mu": 0.1 * 1.1**i, "gap": 0.5 / (i + 1), "loss": 2 / (i + 1)}
        for i in range(49)
    ]
    layers = [
        {"name": f"layer{i}.weight", "weights": 100, "bits": {"Binary": 100, "Sparse": 10 * i}}
        for i in range(4)
    ]
    config = {"network": network, "scheme": scheme, "family": family, "method": method}
    record: Record = {
        "format": 1,
        "name": f"{network} {scheme} {method} {seed}",
        "status": "done",
        "command": "python -m experiments.cifar",
        "config": config | {"seed": seed, "epochs": 12, "lr": 0.02, "data": f"/disk{seed}"},
        "reference": {"test_error": reference, "train_loss": 0.002, "weights": weights},
        "points": points,
        "curve": curve,
        "layers": layers,
        "hardware": {"device": "CPU", "threads": 1, "torch": "2.9", "commit": "abc"},
    }
    record["reference"]["file_bytes"] = 4 * weights + 800
    return record | other


def write(folder: Path, name: str, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")


def good_runs() -> list[Record]:
    methods = ("lc-sum", "lc-weights", "ste")
    grid = [*product(REFERENCES, SCHEMES, methods, range(3))]
    return [run(*each) for each in grid if each[1] == "binary" or each[2] == "lc-sum"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two networks, four schemes, three methods, three seeds; some files are no such."""
    found = tmp_path_factory.mktemp("runs")
    for i, record in enumerate(good_runs()):
        write(found, f"{i:03}", record)
    write(found, "half", json.dumps({"format": 1, "name": "\ud800"}))
    write(found, "cut", '{"format": 1, "name": "cut", "sta')
    write(found, "foreign", [1, 2])
    write(found, "future", {"format": 2, "name": "future", "status": "done"})
    write(found, "failed", run("resnet20", "binary", "ste", 0, status="failed", error=HOSTILE))
    write(found, "running", run("resnet20", "binary", "ste", 1, status="running"))
    lost = run("resnet20", "binary + sparse 2%", "lc-sum", 0, status="failed", error="killed")
    lost["config"]["seed"] = 7
    write(found, "lost", lost)
    nan = run("resnet20", "binary", "lc-sum", 0)
    nan["points"]["learned"]["test_error"] = math.nan
    write(found, "nan", nan)
    write(found, "twin", run("resnet20", "binary", "lc-sum", 0))
    return found


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    """The folder of results, made as a user would."""
    done = command(folder, "--no-figure")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder / "report"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("report")


def command(*options: str | Path, module: bool = False) -> subprocess.CompletedProcess[str]:
    start = ["-m", "experiments.report"] if module else [str(EXPERIMENTS / "report.py")]
    return subprocess.run(
        [sys.executable, *start, *map(str, options)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=EXPERIMENTS.parent,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
    )


def table(report: Path) -> list[dict[str, str]]:
    with (report / "table.csv").open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


# ------------------------------------------------------------------ tables


def test_every_stage_of_every_configuration_is_the_mean_over_its_seeds(report: Path) -> None:
    expected: dict[tuple[str, ...], list[Record]] = {}
    for record in good_runs():
        config = record["config"]
        for stage, value in record["points"].items():
            method = "" if stage == "direct" else config["method"]  # the same for all methods
            expected.setdefault((config["network"], config["scheme"], method, stage), [])
            known = expected[config["network"], config["scheme"], method, stage]
            if len(known) < 3:
                known.append(value | {"reference": record["reference"]["test_error"]})
    rows = [row for row in table(report) if row["stage"] != "reference"]
    names = ("network", "scheme", "method", "stage")
    assert sorted(tuple(row[name] for name in names) for row in rows) == sorted(expected)
    for row in rows:
        points = expected[tuple(row[name] for name in names)]
        errors = [x["test_error"] for x in points]
        assert [float(x) for x in row["errors"].split()] == errors
        assert float(row["test_error"]) == pytest.approx(sum(errors) / 3, rel=1e-12)
        spread = math.sqrt(sum((x - sum(errors) / 3) ** 2 for x in errors) / 2)
        assert float(row["test_error_std"]) == pytest.approx(spread, rel=1e-9)
        delta = sum(x["test_error"] - x["reference"] for x in points) / 3
        assert float(row["delta"]) == pytest.approx(delta, abs=1e-12)
        for name in ("bits_per_weight", "file_ratio", "file_bytes", "bits", "epochs", "seconds"):
            assert float(row[name]) == pytest.approx(points[0][name], rel=1e-12)
        assert (row["train_loss"] == "") == (row["stage"] != "direct")
        assert row["seeds"] == "0 1 2"
        lost = (row["scheme"], row["network"]) == ("binary + sparse 2%", "resnet20")
        assert row["missing"] == ("1" if lost and row["stage"] != "direct" else "0")


def test_one_reference_on_two_processors_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss differs in the last digits there; another network is another row."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    runs = [run("resnet20", "binary", "lc-sum", seed) for seed in range(3)]
    runs[1]["reference"]["train_loss"] *= 1 + 1e-6
    rows = importlib.import_module("report_runs").reference_rows
    assert len(rows(runs)) == 1
    runs[2]["reference"]["test_error"] += 0.01
    assert len(rows(runs)) == 2


def test_the_front_holds_what_no_other_row_beats(report: Path) -> None:
    rows = [row for row in table(report) if row["stage"] != "reference"]
    for axis, sign in (("bits_per_weight", 1), ("file_ratio", -1)):
        for network in REFERENCES:
            own = [x for x in rows if x["network"] == network]
            costs = [(sign * float(x[axis]), float(x["test_error"])) for x in own]
            for x, (size, error) in zip(own, costs, strict=True):
                beaten = any(a <= size and b <= error and (a, b) != (size, error) for a, b in costs)
                assert (axis in x["front"].split()) == (not beaten)
    assert 2 <= sum(bool(x["front"]) for x in rows) < len(rows) / 2


def test_markdown_states_spread_seeds_and_how_values_were_obtained(report: Path) -> None:
    text = (report / "table.md").read_text(encoding="utf-8")
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line[:1] == "|"]
    head = [cell.strip() for cell in lines[0]]
    assert {len(line) for line in lines} == {len(head)}  # no name broke a row
    rows = [dict(zip(head, map(str.strip, line), strict=True)) for line in lines]
    errors = [x["points"]["learned"]["test_error"] for x in good_runs()[:3]]
    (row,) = [
        x
        for x in rows[len(rows) // 2 :]  # the second network, as names are in order
        if (x["scheme"], x["method"], x["stage"]) == ("binary", "LC, gradient at Δ(θ)", "learned")
    ]
    assert row["test error, %"] == f"{sum(errors) / 3:.2f} ± {statistics.stdev(errors):.2f}"
    assert (row["seeds"], row["obtained"]) == ("3", "last step of training")
    assert (row["bits per weight"], row["wall time, min"]) == ("1.100", "22.0 ± 0.0")
    assert "3 of 4" in {x["seeds"] for x in rows}
    assert "<script" not in text and "Nothing is chosen on test images" in text
    assert "## resnet20" in text


def test_files_that_are_no_finished_run_are_named_with_the_cause(report: Path) -> None:
    text = (report / "table.md").read_text(encoding="utf-8").partition("## Left out")[2]
    causes = dict(line[2:].split(".json: ", 1) for line in text.strip().splitlines())
    expected = {
        "half": "surrogates not allowed",
        "cut": "no complete JSON",
        "foreign": "not an object",
        "future": "format 2: this report reads format 1",
        "failed": "failed: &lt;/script&gt;",
        "lost": "failed: killed",
        "running": "not finished, at epoch 12",
        "nan": "points.learned.test\\_error is None, not a finite number",
        "twin": "configuration and seed of",
    }
    assert causes.keys() == expected.keys()
    assert all(part in causes[name] for name, part in expected.items())


def test_one_seed_has_no_spread_and_other_settings_tell_configurations_apart(
    module: Any, tmp_path: Path
) -> None:
    one = run("resnet20", "binary", "lc-sum", 0)
    other = run("resnet20", "binary", "lc-sum", 1)
    other["config"] |= {"lr": 0.5, "epochs": 4}
    write(tmp_path, "one", one)
    write(tmp_path, "other", other)
    rows = [x for x in module.collect(tmp_path)["rows"] if x["stage"] == "learned"]
    assert {x["cells"]["scheme"] for x in rows} == {"binary (lr 0.02)", "binary (lr 0.5)"}
    for x in rows:
        assert "±" not in "".join(x["cells"].values())
        assert x["test_error"][1] is None and x["cells"]["seeds"] == "1"


@pytest.mark.parametrize(
    "change, cause",
    [
        ({"points": {}}, "points"),
        ({"points": {"best": {}}}, "points"),
        ({"points": {"learned": 3}}, "points.learned is 3"),
        ({"reference": None}, "reference is None"),
        ({"config": {"network": "n"}}, "config.scheme is None"),
        ({"layers": [{"name": "a", "weights": 0, "bits": {}}]}, "layers[0].weights is 0"),
        ({"layers": [{"name": "a", "weights": 2, "bits": {"B": "x"}}]}, "layers[0]"),
        ({"curve": [{"loss": 1}]}, "curve[0].epoch is None"),
        ({"curve": 3}, "curve is 3"),
        ({"status": "lost"}, "status 'lost'"),
        ({"layers": [{"name": "a", "weights": 10**400, "bits": {}}]}, "too large"),
    ],
)
def test_a_field_of_a_wrong_kind_is_named(
    module: Any, tmp_path: Path, change: Record, cause: str
) -> None:
    write(tmp_path, "bad", run("resnet20", "binary", "lc-sum", 0) | change)
    (left,) = module.collect(tmp_path)["left"]
    assert cause in left["cause"]


def test_a_diverged_curve_is_shown_with_gaps(module: Any, tmp_path: Path) -> None:
    record = run("resnet20", "binary", "lc-sum", 0)
    record["curve"] = [{"epoch": i, "loss": x} for i, x in enumerate([1.0, math.nan, math.inf])]
    write(tmp_path, "run", json.dumps(record).replace("Infinity", "1e999"))
    (shown,) = module.collect(tmp_path)["runs"]
    assert shown["curve"]["loss"] == [1.0, None, None]
    assert "NaN" not in module.page(module.collect(tmp_path))


def test_a_long_curve_keeps_its_ends(module: Any) -> None:
    found = module.curve([{"epoch": i, "loss": 1.0} for i in range(5000)])
    assert len(found["epoch"]) == module.CURVE_POINTS
    assert (found["epoch"][0], found["epoch"][-1]) == (0, 4999)
    assert len(set(found["epoch"])) == module.CURVE_POINTS


def test_no_runs_is_an_error(tmp_path: Path) -> None:
    for folder, cause in ((tmp_path, "no *.json in it"), (tmp_path / "none", "no such folder")):
        done = command(folder)
        assert done.returncode == 2 and cause in done.stderr
        assert "Traceback" not in done.stderr
    assert [*tmp_path.iterdir()] == []


def test_a_folder_of_failures_gives_a_page_that_lists_them(tmp_path: Path) -> None:
    write(tmp_path, "bad", "{")
    done = command(tmp_path, "--out", tmp_path / "elsewhere", module=True)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "elsewhere" / "index.html").read_text(encoding="utf-8")
    assert "no complete JSON" in page
    assert {x.name for x in tmp_path.iterdir()} == {"bad.json", "elsewhere"}


def test_figures_of_every_network(module: Any, folder: Path, tmp_path: Path) -> None:
    report = module.collect(folder)
    slugs = [x["slug"] for x in report["networks"]]
    assert len({*slugs}) == 2 and all(re.fullmatch(r"[\w.-]+", slug) for slug in slugs)
    module.draw(report | {"networks": report["networks"][:1]}, tmp_path)  # the hostile name
    kinds = product(slugs[:1], ("plane", "curves", "layers"), (".png", ".svg"))
    assert {x.name for x in tmp_path.iterdir()} == {f"{a}_{b}{c}" for a, b, c in kinds}
    assert all(x.stat().st_size > 10_000 for x in tmp_path.iterdir())


def test_the_plane_has_a_mark_for_every_row_and_a_line_through_the_front(
    module: Any, folder: Path
) -> None:
    figures = importlib.import_module("report_figures")
    report = module.collect(folder)
    figure = Figure()
    FigureCanvasAgg(figure)
    figures.plane(figure, report, report["networks"][1])
    rows = [x for x in report["rows"] if x["network"] == "resnet20" and x["stage"] != "reference"]
    for axes, axis in zip(figure.axes, ("bits_per_weight", "file_ratio"), strict=True):
        lines = [[*zip(*line.get_data(), strict=True)] for line in axes.lines]
        marks = [line[0] for line in lines if len(line) == 1]
        places = [(x[axis][0], x["test_error"][0]) for x in rows]
        assert {*places} <= {*marks}
        front = [place for place, x in zip(places, rows, strict=True) if axis in x["front"]]
        assert sorted(front) in lines
        assert any(x.get_linestyle() == "--" and x.get_ydata()[0] == 8.27 for x in axes.lines)
        assert len(axes.collections) == len(rows)  # a bar of the spread each


# ------------------------------------------------------------------ page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --remote-debugging-pipe""".split()
AWAITED = {"returnByValue": True, "awaitPromise": True}
# The browser takes commands from descriptor 3 and answers on 4.
START = """import os, sys
os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])"""


class Browser:
    """A page in headless Chromium, driven over DevTools' pipe."""

    def __init__(self, profile: Path) -> None:
        def pipe() -> tuple[int, int]:
            ends = os.pipe()
            high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
            for end in ends:
                os.close(end)
            return high[0], high[1]

        (commands, self.into), (self.outof, answers) = pipe(), pipe()
        start = [sys.executable, "-c", START, str(commands), str(answers), str(CHROMIUM)]
        self.process = subprocess.Popen(
            [*start, *QUIET, f"--user-data-dir={profile}", "--window-size=1200,900", "about:blank"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.events: list[Record] = []
        self.buffer, self.count, self.session = b"", 0, ""
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(x["targetId"] for x in targets if x["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def message(self, deadline: float) -> Record:
        while b"\0" not in self.buffer:
            if not select.select([self.outof], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"The browser is silent. Last events: {self.events[-3:]}")
            new = os.read(self.outof, 1 << 20)
            assert new, "the browser has ended"
            self.buffer += new
        text, _, self.buffer = self.buffer.partition(b"\0")
        found: Record = json.loads(text)
        return found

    def send(self, method: str, **params: Any) -> Record:
        self.count += 1
        call = {"id": self.count, "method": method, "params": params}
        call |= {"sessionId": self.session} if self.session else {}
        os.write(self.into, json.dumps(call).encode() + b"\0")
        deadline = time.monotonic() + 60
        while (found := self.message(deadline)).get("id") != self.count:
            self.events.append(found)
        assert "error" not in found, found
        result: Record = found["result"]
        return result

    def open(self, path: Path) -> None:
        self.send("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 60
        while not any(x.get("method") == "Page.loadEventFired" for x in self.events):
            self.events.append(self.message(deadline))

    def value(self, expression: str) -> Any:
        found = self.send("Runtime.evaluate", expression=expression, **AWAITED)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of an element, after it was scrolled into view."""
        x, y, width, height = self.value(
            f"""(() => {{ const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{block: "center", inline: "center"}});
            const box = node.getBoundingClientRect();
            return [box.x, box.y, box.width, box.height]; }})()"""
        )
        assert width > 0 and height > 0
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return x + width / 2, y + height / 2

    def mouse(self, selector: str, *kinds: str) -> None:
        x, y = self.place(selector)
        for kind in kinds:
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def click(self, selector: str) -> None:
        self.mouse(selector, "mouseMoved", "mousePressed", "mouseReleased")

    def press(self, key: str) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "ArrowRight": 39, "Escape": 27}[key]
        for kind in ("keyDown", "keyUp"):
            more = {"key": key, "code": key, "windowsVirtualKeyCode": code, **text}
            self.send("Input.dispatchKeyEvent", type=kind, **more)

    def close(self) -> None:
        try:
            self.session = ""
            self.send("Browser.close")
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.into)
            os.close(self.outof)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome on the PATH")
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


def test_the_page_refers_to_nothing_outside(report: Path) -> None:
    text = (report / "index.html").read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2  # no name ended the data
    without = text.replace("http://www.w3.org/2000/svg", "")  # a name, never asked for
    assert not re.search(
        r"https?:|//\w+\.\w+|@import|url\(|\bsrc=\W*[\w/]|fetch\(", markup(without)
    )
    assert "default-src 'none'" in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data and json.loads(data[1])["networks"][0]["name"] == min(REFERENCES)


def markup(text: str) -> str:
    """The page without its data."""
    return re.sub(r'(?s)(id="data">).*?(</script>)', r"\1\2", text)


def column(browser: Browser, index: int) -> list[str]:
    cells = f"[...document.querySelectorAll('#rows tbody tr')].map(x => x.cells[{index}].innerText)"
    found: list[str] = browser.value(cells)
    return [x.strip() for x in found]


def test_the_page_works(report: Path, browser: Browser) -> None:
    rows = table(report)
    points = [row for row in rows if row["stage"] != "reference"]
    browser.open(report / "index.html")

    # figures: a mark for each row, curves of every run, bars of every layer
    assert browser.value("document.querySelectorAll('#planes svg').length") == 2
    assert browser.value("document.querySelectorAll('#planes .point').length") == len(points)
    sizes = "[...document.querySelectorAll('#planes .point')].map(x => x.getBBox().width)"
    assert min(browser.value(sizes)) > 5
    lines = "[...document.querySelectorAll('#curves svg')].map(x => x.querySelectorAll('.curve')"
    assert browser.value(f"{lines}.length)") == [len(good_runs())] * 3
    assert browser.value("document.querySelectorAll('#layers tbody tr .stack i').length") == 8
    assert browser.value("document.querySelectorAll('#planes .reference').length") == 2
    assert browser.value("document.querySelectorAll('#left li').length") == 9

    # a hostile name is text
    assert browser.value("typeof window.hacked") == "undefined"
    assert HOSTILE in browser.value("document.querySelector('#planes').textContent")

    # details: of the point under the mouse, of the next with the arrow keys
    index = next(i for i, row in enumerate(rows) if row["scheme"].startswith("lowrank"))
    browser.mouse(f".point[data-row='{index}']", "mouseMoved")
    tip = browser.value("document.querySelector('#tip').innerText")
    mean, std = float(rows[index]["test_error"]), float(rows[index]["test_error_std"])
    assert rows[index]["scheme"] in tip and f"{mean:.2f} ± {std:.2f}" in tip
    assert rows[index]["obtained"] in tip
    assert browser.value(f"document.querySelector('.point[data-row=\"{index}\"]').matches('.hot')")
    browser.press("Escape")
    assert browser.value("document.querySelector('#tip').hidden")
    browser.value("document.querySelector('.point[tabindex=\"0\"]').focus()")
    first = browser.value("document.querySelector('#tip').innerText")
    browser.press("ArrowRight")
    assert not browser.value("document.querySelector('#tip').hidden")
    assert browser.value("document.querySelector('#tip').innerText") not in ("", first)

    focused = browser.value("document.activeElement.dataset.row")
    browser.press("Enter")
    assert browser.value("document.activeElement.tagName") == "TR"
    assert browser.value("document.activeElement.dataset.row") == focused

    # sorting: by a click, back by another, by the keyboard
    names = browser.value(
        "[...document.querySelectorAll('#rows thead th')].map(x => x.dataset.name)"
    )
    at, heading = names.index("test_error"), "#rows th[data-name='test_error'] button"
    expected = sorted(float(row["test_error"]) for row in rows)
    before = column(browser, at)
    browser.click(heading)
    up = [float(x.split(" ")[0]) for x in column(browser, at)]
    assert up == [round(x, 2) for x in expected] and column(browser, at) != before
    state = "document.querySelector(\"#rows th[data-name='test_error']\").ariaSort"
    assert browser.value(state) == "ascending"
    browser.click(heading)
    down = [float(x.split(" ")[0]) for x in column(browser, at)]
    assert down == up[::-1] and browser.value(state) == "descending"
    browser.value("document.querySelector(\"#rows th[data-name='train_loss'] button\").focus()")
    browser.press("Enter")
    losses = column(browser, names.index("train_loss"))
    known = [float(x.split(" ")[0]) for x in losses if x]
    assert known == sorted(known) and losses == [
        *losses[: len(known)],
        *[""] * (len(losses) - len(known)),
    ]
    assert browser.value(state) == "none"

    # filters hold for the table, the figures and the curves
    browser.click("#filters fieldset:nth-child(2) button:nth-of-type(1)")  # family Q
    kept = [row for row in points if row["family"] != "Q"]
    assert browser.value("document.querySelectorAll('#planes .point').length") == len(kept)
    assert len(column(browser, 0)) == len(kept) + 2
    remaining = sum(x["config"]["family"] != "Q" for x in good_runs())
    assert browser.value(f"{lines}.length)") == [remaining] * 3
    browser.click("#filters fieldset:nth-child(1) button:nth-of-type(2)")  # the first network
    assert browser.value("document.querySelectorAll('#planes svg').length") == 1
    x = "document.querySelector('#planes .point').getAttribute('transform')"
    place = browser.value(x)
    browser.click("#axes fieldset:nth-child(1) button:nth-of-type(2)")  # file ratio
    assert browser.value(x) != place

    # a phone, in the dark
    before_dark = browser.value("getComputedStyle(document.body).backgroundColor")
    browser.send(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-color-scheme", "value": "dark"}],
    )
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.send("Emulation.setDeviceMetricsOverride", **phone)
    assert browser.value("getComputedStyle(document.body).backgroundColor") != before_dark
    assert browser.value("document.documentElement.scrollWidth") <= 390

    # it asked for nothing but itself, and no error was told
    asked = [x for x in browser.events if x.get("method") == "Network.requestWillBeSent"]
    urls = {x["params"]["request"]["url"] for x in asked}
    assert {url for url in urls if not url.startswith("data:")} == {
        (report / "index.html").as_uri()
    }
    told = [
        x
        for x in browser.events
        if x.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")
    ]
    said = [x for x in browser.events if x.get("method") == "Runtime.consoleAPICalled"]
    assert told == [] and said == []
