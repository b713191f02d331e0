"""The README's tables, made from the stored results: no number is copied by hand.

Run:      python experiments/readme_tables.py          (rewrites the README between its markers)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
WAYS = {
    "weights": "LC, classic",
    "sum": "LC, gradient at Δ(θ)",
    "both": "LC, one then the other",
}
PLANE = "Test error against bits per weight, from direct compression to LC"


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def missing(command: str) -> str:
    return f"Not measured yet: run `{command}`."


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def percent(result: dict[str, Any], name: str, seeds: list[int]) -> str:
    """Mean error, with the standard deviation where there are several seeds."""
    mean = f"{result[f'{name}_mean']:.2f}"
    return f"{mean} ± {result[f'{name}_std']:.2f}" if len(seeds) > 1 else mean


def size(result: dict[str, Any]) -> list[str]:
    return [f"{result['bits_per_weight']:.2f}", f"{result['ratio_float32']:.1f}"]


def digits(folder: Path) -> str:
    """Every scheme: direct compression, each way of learning that was run, size."""
    path = folder / "digits.json"
    if not path.is_file():
        return missing("python experiments/digits.py --seeds 5")
    others = (folder / f"digits_{way}.json" for way in WAYS)
    files = [read(path), *(read(other) for other in others if other.is_file())]
    files.sort(key=lambda file: list(WAYS).index(file["config"]["gradient"]))
    runs = [file["result"] for file in files]
    main = read(path)["result"]
    reference = percent(main, "reference_error", main["seeds"])
    rows = [["reference, not compressed", reference, *[""] * len(runs), "32.00", "1.0"]]
    for name, scheme in main["schemes"].items():
        learned = [percent(run["schemes"][name], "lc_error", run["seeds"]) for run in runs]
        direct = percent(scheme, "direct_error", main["seeds"])
        rows.append([name, direct, *learned, *size(scheme)])
    ways = [WAYS[file["config"]["gradient"]] for file in files]
    header = ["test error, %", "direct compression", *ways, "bits per weight", "ratio to float32"]
    text = f"{markdown(header, rows)}\n\n{note([run['seeds'] for run in runs])}"
    if (folder / "digits.svg").is_file():
        text += f"\n\n![{PLANE}](experiments/results/digits.svg)"
    return text


def resnet20(folder: Path) -> str:
    """One bit per weight and 2 % floats: reference, direct compression, both ways of learning."""
    path = folder / "cifar_resnet20.json"
    results: dict[str, dict[str, Any]] = read(path) if path.is_file() else {}
    if not results:
        return missing("python experiments/cifar_resnet.py --data DIR --weights FILE")
    any_one = next(iter(results.values()))
    rows = [["reference, not compressed", f"{any_one['reference_error']:.2f}", "", "32.00", "1.0"]]
    direct = {
        "direct compression": "direct_error",
        "the same, BatchNorm of the reference": "direct_error_reference_batchnorm",
    }
    for name, key in direct.items():
        rows.append([name, f"{any_one[key]:.2f}", "", *size(any_one)])
    for way, name in WAYS.items():
        if way in results:
            run = results[way]
            error = percent(run, "lc_error", run["seeds"])
            rows.append([name, error, str(run["epochs"]), *size(run)])
    header = ["", "test error, %", "epochs", "bits per weight", "ratio to float32"]
    return f"{markdown(header, rows)}\n\n{note([run['seeds'] for run in results.values()])}"


def note(seeds: list[list[int]]) -> str:
    counts = sorted({len(each) for each in seeds})
    if counts == [1]:
        return "One seed; the last step counts."
    text = " or ".join(map(str, counts))
    return f"Mean and standard deviation over {text} seeds; the last step counts."


TABLES: dict[str, Callable[[Path], str]] = {"digits table": digits, "resnet20 table": resnet20}


def filled(text: str, folder: Path) -> str:
    """`text` with each table between its marker and the next end made from the results in `folder`.

    Raises:
        ValueError: a marker is missing.
    """
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, marker, rest = text.partition(start)
        _, closing, after = rest.partition(end)
        if not (marker and closing):
            raise ValueError(f"No block {start.strip()} ... {end} to fill.")
        text = f"{before}{start}\n{make(folder)}\n\n{end}{after}"
    return text


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
