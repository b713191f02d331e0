"""Every Python block of the README and of docs/ runs, and every table and link in them holds.

The blocks are taken from the pages. Those of one page run in order in one module, which already has
what the pages call the user's own: `pretrained`, `loader`, `train_one_epoch` and `evaluate`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import lc_compress
from lc_compress import LC, Part
from lc_compress.testing import check_part

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]

# ------------------------------------------------------------------ what the pages call yours


class Net(nn.Module):
    """A convolution with BatchNorm and three linear layers, for 8×8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x))).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


Loader = list[tuple[Tensor, Tensor]]


def digits() -> tuple[Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()


def train_one_epoch(model: nn.Module, loader: Loader, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def evaluate(model: nn.Module) -> float:
    """Share of the images after the training ones that the model gets wrong."""
    model.eval()
    images, labels = digits()
    with torch.no_grad():
        return float((model(images[512:]).argmax(1) != labels[512:]).float().mean())


@pytest.fixture(scope="module")
def yours() -> dict[str, Any]:
    """The names that the pages take for granted."""
    images, labels = digits()
    loader = list(zip(images[:512].split(32), labels[:512].split(32), strict=True))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = Net()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for _ in range(8):
        train_one_epoch(reference, loader, optimizer)
    return {
        "pretrained": lambda: deepcopy(reference),
        "loader": loader,
        "train_one_epoch": train_one_epoch,
        "evaluate": evaluate,
    }


# ------------------------------------------------------------------ blocks


def blocks(page: str) -> Iterator[str]:
    """The page's Python blocks, each moved down to its own lines, so that tracebacks name them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield "\n" * text[: match.start(1)].count("\n") + match[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages write files where they run."""
    monkeypatch.chdir(tmp_path)


def run(page: str, yours: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the page's blocks make; importable, as pickling a part of theirs needs."""
    module = ModuleType("page_" + re.sub(r"\W", "_", page))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(yours)
    for block in blocks(page):
        exec(compile(block, str(ROOT / page), "exec", dont_inherit=True), vars(module))
    return module


def test_every_page_has_python_blocks() -> None:
    assert PAGES[0] == "README.md" and "docs/from-lc-toolkit.md" in PAGES
    assert all(list(blocks(page)) for page in PAGES)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_blocks_run(page: str, yours: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run(page, yours, monkeypatch)


def sum_gap(lc: LC) -> float:
    """How far the model's weights are from Δ(θ), at most."""
    gaps = []
    for task in lc.tasks:
        delta = task.split(task.part.reconstruct(task.state))
        gaps += [
            float((p.detach() - d).abs().max()) for p, d in zip(task.parameters, delta, strict=True)
        ]
    return max(gaps)


def test_readme(yours: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning beats direct compression; the third-party part passes the contract and trains."""
    module = run("README.md", yours, monkeypatch)
    assert module.learned < module.direct
    assert Path("model.lc").stat().st_size < 6_000
    with torch.no_grad():
        x = torch.randn(5, 1, 8, 8)
        torch.testing.assert_close(module.packed.eval()(x), module.dense.eval()(x))

    (written,) = [block for block in blocks("README.md") if "class SharedRow(" in block]
    assert sum(bool(line.strip()) for line in written.splitlines()) < 30

    def spread(w: Tensor, importance: Tensor, mu: float) -> float:
        """The least error by another formula: Σ_i<j h_i h_j (w_i − w_j)² / Σ h for each column."""
        pairs = importance[:, None] * importance * (w[:, None] - w) ** 2
        total = importance.sum(0)
        return float((pairs.sum((0, 1)) / total.where(total > 0, 1)).sum() * mu / 4)

    assert check_part(module.SharedRow(), brute=spread, dtypes=(torch.float64,)) > 0

    lc = module.lc  # of the last block: SharedRow + Binary + Sparse in every layer
    assert all(task.part.parts[0] == module.SharedRow() for task in lc.tasks)
    assert lc.history[-1]["gap"] < lc.history[0]["gap"] / 2
    lc.finalize(calibration=yours["loader"])
    assert sum_gap(lc) == 0
    assert evaluate(module.model) < module.direct


# ------------------------------------------------------------------ the migration page


def table_rows(page: str, heading: str) -> list[tuple[str, str]]:
    """The rows of the two-column table under a heading."""
    text = (ROOT / page).read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert rows[0] == ("there", "here")
    return rows[1:]


@pytest.mark.parametrize(("there", "here"), table_rows("docs/from-lc-toolkit.md", "Compressions"))
def test_compressions_of_the_toolkit(there: str, here: str) -> None:
    """What stands beside each of its classes is a part that compresses, or still missing."""
    names = vars(lc_compress) | {"torch": torch}
    if here.startswith("planned: "):
        name = here.removeprefix("planned: ").strip("`")
        assert name not in names, f"{name} exists now: put it into the table"
        return
    part = eval(here.strip("`"), names)
    assert isinstance(part, Part)
    shape = (8, 4, 3, 3) if "scheme_" in there else (32, 40)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    delta = part.reconstruct(part.project(w, mu=1.0))
    assert delta.shape == w.shape and 0 < float((w - delta).norm()) <= float(w.norm())


def test_calls_exist() -> None:
    """Every `lc.name` and every keyword of LC on our side of the pages is there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    here = [right for _, right in table_rows("docs/from-lc-toolkit.md", "Calls")]
    named = set(re.findall(r"\blc\.([a-z]\w*)", "\n".join([text, *here])))
    built = LC(nn.Linear(3, 2), {"weight": lc_compress.Binary()}, schedule=[1.0])
    assert {"steps", "compressed", "finalize", "penalty", "gap", "report"} <= named
    assert [name for name in sorted(named) if not hasattr(built, name)] == []


# ------------------------------------------------------------------ tables, links


@pytest.fixture(scope="module")
def tables() -> Any:
    """The script that writes the README's tables."""
    path = ROOT / "experiments" / "readme_tables.py"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


@pytest.mark.parametrize(
    "page",
    ["README.md", "experiments/README.md", "docs/interplay.md", "docs/training-order.md"],
)
def test_tables_are_what_the_results_say(tables: Any, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    message = "run experiments/readme_tables.py"
    assert tables.filled(text, ROOT / "experiments" / "results", page) == text, message


def test_tables_without_results(tables: Any, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    bare = tables.filled(text, tmp_path)
    for name in ("digits", "cifar_resnet"):
        assert re.search(rf"^Not measured yet: run `.*{name}\.py.*`\.$", bare, re.MULTILINE)
    assert "Not measured yet: `python experiments/sweep.py" in bare
    with pytest.raises(ValueError, match="digits table"):
        tables.filled("no markers", tmp_path)


def test_tables_with_results(tables: Any, tmp_path: Path) -> None:
    size = {"bits_per_weight": 1.234, "ratio_float32": 25.94}
    errors = {"direct_error_mean": 40.0, "direct_error_std": 2.0, "lc_error_std": 0.1} | size
    for name, way, error in (("digits", "sum", 1.5), ("digits_weights", "weights", 2.5)):
        schemes = {"binary": errors | {"lc_error_mean": error}}
        result = {"seeds": [0, 1], "reference_error_mean": 1.0, "reference_error_std": 0.5}
        content = {"config": {"gradient": way}, "result": result | {"schemes": schemes}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    run = {"reference_error": 8.27, "direct_error_reference_batchnorm": 88.0, "direct_error": 40.9}
    run |= {"seeds": [0], "epochs": 8, "lc_error_mean": 15.0, "lc_error_std": 0.0}
    (tmp_path / "cifar_resnet20.json").write_text(json.dumps({"weights": run | size}))

    (tmp_path / "digits.svg").touch()
    assert tables.digits(tmp_path).splitlines() == [
        "| test error, % | direct compression | LC, classic | LC, gradient at Δ(θ) "
        "| bits per weight | ratio to float32 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| reference, not compressed | 1.00 ± 0.50 |  |  | 32.00 | 1.0 |",
        "| binary | 40.00 ± 2.00 | 2.50 ± 0.10 | 1.50 ± 0.10 | 1.23 | 25.9 |",
        "",
        "Mean and standard deviation over 2 seeds; the last step counts.",
        "",
        f"![{tables.PLANE}](experiments/results/digits.svg)",
    ]
    assert tables.resnet20(tmp_path).splitlines()[2:] == [
        "| reference, not compressed | 8.27 |  | 32.00 | 1.0 |",
        "| direct compression | 40.90 |  | 1.23 | 25.9 |",
        "| the same, BatchNorm of the reference | 88.00 |  | 1.23 | 25.9 |",
        "| LC, classic | 15.00 | 8 | 1.23 | 25.9 |",
        "",
        "One seed; the last step counts.",
    ]


class Understood(Exception):
    """A script has read its command line."""


def commands(page: str) -> list[str]:
    """Every command line of the page that runs an experiment, in tables and in blocks."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for name, value in re.findall(r'^([A-Z])="(.*)"$', text, re.MULTILINE):
        text = text.replace(f"${name}", value)
    found = re.findall(r"python (?:-m experiments\.|experiments/)[^`\n]*", text)
    return list(dict.fromkeys(found))


def test_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option of every command on the page is one that its script has."""
    read = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any) -> Any:
        read(self, *args)
        raise Understood

    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    lines = commands("experiments/README.md")
    assert len(lines) > 30
    for line in lines:
        script, *words = shlex.split(line.replace("-m experiments.", "experiments/"))[1:]
        path = ROOT / f"{script.removesuffix('.py')}.py"
        if path.stem == "sweep":
            importlib.import_module("sweep").jobs(words[words.index("--") + 1 :], "runs")
            words = words[: words.index("--")]
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(sys, "argv", [str(path), *words])
            with pytest.raises(Understood):
                runpy.run_path(str(path), run_name="__main__")


def test_links() -> None:
    """Every relative link and picture on the pages leads to a file, and to a heading of it."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)]+)\)", text):
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
                assert anchor in anchors, f"{page}: {target}"


# ------------------------------------------------------------------ the page of parts


def parts_page() -> list[tuple[str, str]]:
    """Each part named in the first column of the tables of docs/parts.md, and how exact it is."""
    found = []
    for line in (ROOT / "docs/parts.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("| `"):
            exact = next(cell for cell in cells[1:] if cell in ("all", "h = 1", "no"))
            found += [(code, exact) for code in re.findall(r"`([^`]+)`", cells[0])]
    return found


@pytest.mark.parametrize(("code", "exact"), parts_page())
def test_parts_page(code: str, exact: str) -> None:
    """It says the truth about exactness, and every part projects."""
    part = eval(code, vars(lc_compress) | {"torch": torch})
    assert isinstance(part, Part)
    assert (part.exact, part.exact_weighted) == (exact != "no", exact == "all")
    matrix = "LowRank(2)" in code and "over" not in code
    shape = (16, 8) if matrix else (8, 4, 3, 3)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    delta = part.reconstruct(part.project(w, mu=1.0))
    assert delta.shape == w.shape and float((w - delta).norm()) < float(w.norm())
