"""What a folder of runs found: tables, figures, and one HTML page with all of it.

Puts the seeds of one configuration together, and marks for each network the Pareto front of test
error against size. A file that is no finished run of this format is listed with the cause.

Run:      python -m experiments.report RUNS [--out DIR]     (or python experiments/report.py)
          RUNS: a folder with one JSON per run.
Results:  table.md, table.csv, index.html (one file, asks no network) and the figures of each
          network as PNG and SVG; in DIR, or RUNS/report. Exit status 2: no run file in RUNS.
"""

from __future__ import annotations

import argparse
import csv
import html
import io
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__:
    from .report_figures import BASELINES, MARKS, PANELS, PARTS, check_matplotlib, draw
    from .report_runs import MEASURED, SIZES, STAGES, Record, Stat, read, rows_of
else:
    from report_figures import BASELINES, MARKS, PANELS, PARTS, check_matplotlib, draw
    from report_runs import MEASURED, SIZES, STAGES, Record, Stat, read, rows_of

TEMPLATE = Path(__file__).with_name("report.html")
CURVE_POINTS = 400
METHODS = {
    "lc-weights": "LC, gradient at w",
    "lc-sum": "LC, gradient at Δ(θ)",
    "lc-implicit": "LC, implicit step",
    "handover": "LC, hand-over",
    "ste": "straight-through",
    "finetune": "fine-tuning",
    "parq": "PARQ",
}
FAMILIES = {
    "Q": "quantized",
    "L": "low rank",
    "S": "sparse",
    "Q+S": "quantized + sparse",
    "L+S": "low rank + sparse",
    "Q+L": "quantized + low rank",
    "Q+L+S": "quantized + low rank + sparse",
    "S>Q": "sparse, then quantized",
    "L>Q": "low rank, then quantized",
}
NUMBERS = {  # columns: title, decimals, unit
    "test_error": ("test error, %", 2, 1),
    "delta": ("to reference, points", 2, 1),
    "bits_per_weight": ("bits per weight", 3, 1),
    "file_ratio": ("file ratio", 2, 1),
    "file_bytes": ("file, kB", 1, 1e3),
    "epochs": ("epochs", 1, 1),
    "seconds": ("wall time, min", 1, 60),
    "train_loss": ("training loss", 4, 1),
}
TITLES = {"scheme": "scheme", "family": "family", "method": "method", "stage": "stage"}
TITLES |= {name: title for name, (title, _, _) in NUMBERS.items()}
TITLES |= {"seeds": "seeds", "front": "Pareto front", "obtained": "obtained"}
NOTES = (
    "Nothing is chosen on test images: every value is that of the last step, never of the best; "
    "the column obtained says of which.",
    "± is the sample standard deviation over the seeds of one configuration; one seed has none. "
    "Seeds 3 of 5: two more did not end.",
    "Bits per weight: of the compressed layers, with everything that their parts store. File "
    "ratio: the dense float32 file over the packed file of the whole network.",
    "Epochs and wall time: all training of the run so far.",
    "Rounded to: errors and ratios 2 decimals, bits per weight 3, training loss 4, kB, epochs and "
    "minutes 1. table.csv has full precision and the error of each seed.",
    "Pareto front: no other row of the network has at most this size and at most this mean error, "
    "and less of one. Size is bits per weight (bits) or the file (file).",
    f"Training curves of more than {CURVE_POINTS} points are shown at {CURVE_POINTS} of them.",
    f"The layers' figure shows {PANELS} configurations of the front at most, smallest first, and "
    "of each the first seed; the page shows every run.",
)


# ------------------------------------------------------------------ tables


def shown(value: Stat, name: str) -> str:
    """Mean ± standard deviation with the decimals of the column."""
    (mean, std), (_, digits, unit) = value, NUMBERS[name]
    if mean is None:
        return ""
    text = f"{mean / unit:{'+' if name == 'delta' else ''}.{digits}f}"
    exact = std == 0 and name in (*SIZES, "file_bytes", "epochs")  # the same for every seed
    return text if std is None or exact else f"{text} ± {std / unit:.{digits}f}"


def cells(x: Record) -> dict[str, str]:
    """A row as the text of each column."""
    found = {name: x[name] for name in TITLES if isinstance(x[name], str)}
    found |= {name: shown(x[name], name) for name in NUMBERS}
    found["scheme"] += f" ({x['settings']})" if x["settings"] else ""
    found["method"] = METHODS.get(x["method"], x["method"])
    found["stage"] = STAGES[x["stage"]][0]
    found["front"] = ", ".join(SIZES[axis] for axis in x["front"])
    seeds = len(x["seeds"])
    found["seeds"] = f"{seeds} of {seeds + x['missing']}" if x["missing"] else f"{seeds or ''}"
    return {name: found[name] for name in TITLES}


def plain(text: str) -> str:
    """Any text within one cell of a Markdown table."""
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def markdown(report: Record) -> str:
    """A table per network, then how to read it and what was left out."""
    rule = ["---:" if name in (*NUMBERS, "seeds") else "---" for name in TITLES]
    text = "# Test error and size of every run\n"
    for network in report["networks"]:
        own = [x["cells"].values() for x in report["rows"] if x["network"] == network["name"]]
        lines = [TITLES.values(), rule, *([plain(cell) for cell in line] for line in own)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        text += f"\n## {plain(network['name'])}\n\n{table}\n"
    text += "\n## Notes\n\n" + "".join(f"- {note}\n" for note in report["notes"])
    if report["left"]:
        text += "\n## Left out\n\n"
    return text + "".join(f"- {plain(x['file'])}: {plain(x['cause'])}\n" for x in report["left"])


def table_csv(report: Record) -> str:
    """The same rows in full precision: mean, standard deviation, and the error of every seed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    texts = ("network", "scheme", "settings", "family", "method", "stage", "obtained", "missing")
    lists, stats = ("seeds", "errors", "front"), (*MEASURED, "delta")
    writer.writerow([*texts, *lists, *(f"{x}{end}" for x in stats for end in ("", "_std"))])
    for x in report["rows"]:
        line = [*(x[name] for name in texts), *(" ".join(map(str, x[name])) for name in lists)]
        writer.writerow([*line, *(value for name in stats for value in x[name])])
    return out.getvalue()


# ------------------------------------------------------------------ what is shown


def finite(x: Any) -> float | None:
    return x if isinstance(x, (int, float)) and math.isfinite(x) else None


def curve(entries: Sequence[Record]) -> dict[str, list[float | None]]:
    """By quantity; of a long curve evenly spread points, with the first and the last."""
    count = min(len(entries), CURVE_POINTS)
    kept = [entries[round(i * (len(entries) - 1) / max(count - 1, 1))] for i in range(count)]
    names = ("epoch", "loss", "gap", "mu")
    return {name: [finite(entry.get(name)) for entry in kept] for name in names}


def run_of(run: Record) -> Record:
    """What curves and layers show of a run."""
    names = ("network", "scheme", "family", "method", "seed")
    where = run.get("hardware")
    where = where if isinstance(where, dict) else {}
    told = ("device", "threads", "torch", "commit")
    hardware = ", ".join(f"{name} {where[name]!s:.60}" for name in told if name in where)
    texts = {"name": run["name"], "command": run.get("command", ""), "hardware": hardware}
    layers = [
        {"name": str(x.get("name")), "weights": x["weights"], "bits": x["bits"]}
        | {"error": finite(x.get("error"))}
        for x in run["layers"]
    ]
    found = {name: run["config"][name] for name in names} | {"curve": curve(run["curve"])}
    found["file"] = run["file"]
    return found | {name: str(x) for name, x in texts.items()} | {"layers": layers}


def collect(folder: Path) -> Record:
    """All that tables, figures and page show, as plain data.

    Raises:
        FileNotFoundError: no such folder, or no JSON file in it.
    """
    runs, left = read(folder)
    rows, notes = rows_of(runs, left), [*NOTES]
    networks: list[Record] = []
    for name in dict.fromkeys(x["network"] for x in rows):
        known = [x for x in rows if x["network"] == name and x["stage"] == "reference"]
        if len(known) > 1:
            notes.append(f"{plain(name)}: its runs started from {len(known)} references.")
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")[:60] or "network"
        slug += f"_{len(networks)}" if slug in [x["slug"] for x in networks] else ""
        errors = [x["test_error"][0] for x in known]
        networks.append({"name": name, "slug": slug, "references": errors})
    return {
        "networks": networks,
        "rows": [x | {"cells": cells(x)} for x in rows],
        "runs": [run_of(run) for run in runs],
        "notes": notes,
        "left": [{"file": x["file"], "cause": x["cause"]} for x in left],
        "titles": TITLES,
        "numbers": [*NUMBERS],
        "sizes": [*SIZES],
        "methods": METHODS,
        "families": FAMILIES,
        "stages": {name: title for name, (title, _) in STAGES.items()},
        "marks": MARKS,
        "baselines": BASELINES,
        "parts": PARTS,
    }


def page(report: Record) -> str:
    """The template with the data in it; no text in a run can end the script that holds it."""
    data = json.dumps(report, allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    before, marker, after = TEMPLATE.read_text(encoding="utf-8").partition("{DATA}")
    assert marker
    return f"{before}{data}{after}"


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder with one JSON per run")
    parser.add_argument("--out", type=Path, help="folder of the results; without: RUNS/report")
    parser.add_argument("--no-figure", action="store_true", help="the tables and the page only")
    options = parser.parse_args(argv)
    if not options.no_figure:
        check_matplotlib()
    out: Path = options.out or options.runs / "report"
    try:
        report = collect(options.runs)
        out.mkdir(parents=True, exist_ok=True)
        for name, make in (("table.md", markdown), ("table.csv", table_csv), ("index.html", page)):
            write(out / name, make(report))
        if not options.no_figure:
            draw(report, out)
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
