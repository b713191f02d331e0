"""The runs of a folder: read, checked, and put together by configuration into rows.

A row is one stage (direct compression, learned, refined) of one configuration: means over its
seeds. It is one line of the tables and one point of the figures that `report.py` makes.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Stat = tuple[float | None, float | None]  # mean, standard deviation

FORMAT = 1
LOCAL = {"seed", "name", "data", "weights", "out", "device"}  # the same for one configuration
SCHEME = ("network", "scheme", "family")
SIZES = {"bits_per_weight": "bits", "file_ratio": "file"}  # axes, and how their fronts are marked
MEASURED = ("test_error", "train_loss", "bits", *SIZES, "file_bytes", "epochs", "seconds")
STAGES = {  # name, and how its values were obtained
    "reference": ("reference", "as given"),
    "direct": ("direct", "no training; BatchNorm re-estimated"),
    "learned": ("learned", "last step of training"),
    "refined": ("refined", "last step of refining"),
}


# ------------------------------------------------------------------ reading


def fields(record: Any, where: str) -> Record:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {record!r:.60}, not an object")
    return record


def number(record: Record, name: str, where: str, least: float = -math.inf) -> None:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where}.{name} is {value!r:.60}, not a finite number")
    if value < least or (value == 0 and name in ("weights", "bits", *SIZES, "file_bytes")):
        raise ValueError(f"{where}.{name} is {value}, too small")


def check(run: Record) -> None:
    """Raises ValueError, with what is wrong, unless `run` has this format, whatever its status."""
    if missing := {"format", "name", "status"} - run.keys():
        raise ValueError(f"no run file: it has no {', '.join(sorted(missing))}")
    if run["format"] != FORMAT:
        raise ValueError(f"format {run['format']!r}: this report reads format {FORMAT}")
    if run["status"] not in ("done", "failed", "running"):
        raise ValueError(f"status {run['status']!r:.60}: known are done, failed, running")
    if run["status"] == "done":
        check_config(fields(run.get("config"), "config"))
        check_results(run)


def check_config(config: Record) -> None:
    for name in (*SCHEME, "method"):
        if not isinstance(config.get(name), str):
            raise ValueError(f"config.{name} is {config.get(name)!r:.60}, not a text")
    if type(config.get("seed")) is not int:
        raise ValueError(f"config.seed is {config.get('seed')!r:.60}, not an integer")


def check_results(run: Record) -> None:
    reference = fields(run.get("reference"), "reference")
    points = fields(run.get("points"), "points")
    if not points or not points.keys() <= STAGES.keys() - {"reference"}:
        raise ValueError(f"points are {[*points]!r:.60}, not some of direct, learned, refined")
    for name in ("test_error", "file_bytes", "weights"):
        number(reference, name, "reference", 0)
    for where, point in (("reference", reference), *points.items()):
        if fields(point, f"points.{where}").get("train_loss") is not None:
            number(point, "train_loss", where)
    for stage, point in points.items():
        for name in MEASURED:
            if name != "train_loss":
                number(point, name, f"points.{stage}", 0)
    for name in ("curve", "layers"):
        if not isinstance(run.setdefault(name, []), list):
            raise ValueError(f"{name} is {run[name]!r:.60}, not a list")
    for i, entry in enumerate(run["curve"]):
        number(fields(entry, f"curve[{i}]"), "epoch", f"curve[{i}]", 0)
    for i, layer in enumerate(run["layers"]):
        number(fields(layer, f"layers[{i}]"), "weights", f"layers[{i}]", 0)
        for part in fields(layer.get("bits"), f"layers[{i}].bits"):
            number({"bits of a part": layer["bits"][part]}, "bits of a part", f"layers[{i}]", 0)


def read(folder: Path) -> tuple[list[Record], list[Record]]:
    """The runs that are done, and what was left out: {file, cause; seed, configuration if known}.

    Raises:
        FileNotFoundError: no such folder, or no JSON file in it.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        what = "no *.json in it" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder}: {what}. Give the folder that holds one JSON per run.")
    runs: list[Record] = []
    left: list[Record] = []
    seen: dict[tuple[str, int], str] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
            json.dumps(content, ensure_ascii=False).encode()  # every text in it can be written
            check(run := fields(content, "the file"))
        except json.JSONDecodeError as error:
            left.append({"file": path.name, "cause": f"no complete JSON: {error}"})
            continue
        except (OSError, ValueError, OverflowError, RecursionError) as error:
            left.append({"file": path.name, "cause": str(error)})
            continue
        if run["status"] != "done":
            left.append({"file": path.name} | unfinished(run))
            continue
        same = (configuration(run), run["config"]["seed"])
        if (twin := seen.setdefault(same, path.name)) == path.name:
            runs.append(run | {"file": path.name})
        else:
            cause = f"has the configuration and seed of {twin}, which is shown"
            left.append({"file": path.name, "cause": cause})
    return runs, left


def unfinished(run: Record) -> Record:
    """Why it is left out; with seed and configuration, if it got as far as to say them."""
    config, curve = run.get("config"), run.get("curve")
    known: Record = {}
    if isinstance(config, dict) and "seed" in config:
        known = {"seed": config["seed"], "configuration": configuration(run)}
    if run["status"] == "failed":
        return known | {"cause": f"failed: {run.get('error') or 'without a message'}"}
    last = curve[-1] if isinstance(curve, list) and curve else None
    at = last.get("epoch", 0) if isinstance(last, dict) else 0
    return known | {"cause": f"not finished, at epoch {at}"}


def configuration(run: Record) -> str:
    """What the seeds of one configuration have in common."""
    kept = {name: x for name, x in run["config"].items() if name not in LOCAL}
    return json.dumps(kept, sort_keys=True)


# ------------------------------------------------------------------ grouping


def grouped(runs: Iterable[Record]) -> list[list[Record]]:
    """The runs of each configuration, by seed."""
    groups: dict[str, list[Record]] = {}
    for run in sorted(runs, key=lambda run: run["config"]["seed"]):
        groups.setdefault(configuration(run), []).append(run)
    return [*groups.values()]


def starts(groups: Iterable[Sequence[Record]]) -> list[list[Record]]:
    """The runs that give direct compression, each once: it does not depend on how training goes on,
    so configurations of one scheme are one where they agree at every seed that they share."""

    def values(group: Sequence[Record]) -> dict[int, tuple[Any, ...]]:
        return {
            run["config"]["seed"]: (
                [run["config"][name] for name in SCHEME],
                [run["points"]["direct"][name] for name in ("test_error", "bits", "file_bytes")],
            )
            for run in group
        }

    merged: list[list[Record]] = []
    for group in groups:
        own = values(new := [run for run in group if "direct" in run["points"]])
        for other in merged:
            known = values(other)
            shared = own.keys() & known.keys()
            if shared and all(own[seed] == known[seed] for seed in shared):
                other.extend(run for run in new if run["config"]["seed"] not in known)
                break
        else:
            merged += [new] if new else []
    return merged


def stat(values: Sequence[float | None]) -> Stat:
    """Mean, and the sample standard deviation of two values and more; nothing if one is missing."""
    known = [x for x in values if x is not None]
    if not known or len(known) < len(values):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def settings(group: Sequence[Record], groups: Iterable[Sequence[Record]], same: set[str]) -> str:
    """The fields, but for the epochs, that tell a configuration from those alike in `same`."""
    own = group[0]["config"]
    alike = [x[0]["config"] for x in groups]
    alike = [x for x in alike if all(x[name] == own[name] for name in same)]
    names = sorted(set().union(*alike) - LOCAL - {"epochs"})
    told = [name for name in names if any(x.get(name) != own.get(name) for x in alike)]
    return ", ".join(f"{name} {own.get(name, 'not set')}" for name in told)


def row(stage: str, group: Sequence[Record], method: str, **other: Any) -> Record:
    points = [run["points"][stage] for run in group]
    found: Record = {name: group[0]["config"][name] for name in SCHEME}
    found |= {"stage": stage, "method": method, "obtained": STAGES[stage][1]}
    found |= {"seeds": [run["config"]["seed"] for run in group], "missing": 0, "front": []}
    found |= {"files": [run["file"] for run in group], "settings": "", "before": None} | other
    found["errors"] = [point["test_error"] for point in points]
    beyond = [run["points"][stage]["test_error"] - run["reference"]["test_error"] for run in group]
    found |= {name: stat([point.get(name) for point in points]) for name in MEASURED}
    return found | {"delta": stat(beyond)}


def reference_rows(runs: Iterable[Record]) -> list[Record]:
    """A network before compression: one row, or one per reference that its runs started from."""
    found: dict[str, Record] = {}
    for run in runs:
        x = run["reference"]
        known: Record = {name: (x.get(name), None) for name in MEASURED}
        known |= {"bits": (32 * x["weights"], None), "bits_per_weight": (32.0, None)}
        known |= {"file_ratio": (1.0, None), "delta": (None, None)}
        known |= {"network": run["config"]["network"], "scheme": "not compressed", "family": ""}
        known |= {"stage": "reference", "method": "", "obtained": STAGES["reference"][1]}
        known |= {"seeds": [], "missing": 0, "front": [], "errors": [x["test_error"]]}
        known |= {"files": [], "settings": "", "before": None}
        # the same network on another processor: the loss differs in its last digits
        same = json.dumps({name: float(f"{value:.4g}") for name, value in sorted(x.items())})
        found.setdefault(same, known)
    return [*found.values()]


def rows_of(runs: Sequence[Record], left: Iterable[Record]) -> list[Record]:
    """By network: its reference, then every stage of every configuration, smallest first."""
    groups, rows = grouped(runs), []
    for group in groups:
        lost = {x["seed"] for x in left if x.get("configuration") == configuration(group[0])}
        planned = lost | {run["config"]["seed"] for run in group}
        told = settings(group, groups, {*SCHEME, "method"})
        for stage in ("learned", "refined"):
            if chosen := [run for run in group if stage in run["points"]]:
                missing = len(planned) - len(chosen)
                method = group[0]["config"]["method"]
                rows.append(row(stage, chosen, method, missing=missing, settings=told))
    direct = starts(groups)
    for group in direct:
        rows.append(row("direct", group, "", settings=settings(group, direct, {*SCHEME})))
    found = []
    for network in sorted({run["config"]["network"] for run in runs}):
        found += reference_rows(run for run in runs if run["config"]["network"] == network)
        own = [x for x in rows if x["network"] == network]
        for axis in SIZES:
            for x in front(own, axis):
                x["front"].append(axis)
        found += sorted(own, key=lambda x: (x["bits_per_weight"][0], x["test_error"][0]))
    for x in found:
        x["before"] = next((i for i, y in enumerate(found) if precedes(y, x)), None)
    return found


def precedes(y: Record, x: Record) -> bool:
    """Whether `x` went on from `y`: refined from learned, learned from direct compression."""
    order = {"direct": "learned", "learned": "refined"}
    if order.get(y["stage"]) != x["stage"] or any(y[name] != x[name] for name in SCHEME):
        return False
    return y["stage"] == "direct" or x["files"][0] in y["files"]


def front(rows: Iterable[Record], axis: str) -> list[Record]:
    """The rows for which no other has at most their size and at most their error, and less of one;
    by size."""

    def cost(x: Record) -> tuple[float, float]:
        size = x[axis][0]
        return (-size if axis == "file_ratio" else size), x["test_error"][0]

    kept: list[Record] = []
    for x in sorted(rows, key=cost):
        if not kept or cost(x)[1] < cost(kept[-1])[1] or cost(x) == cost(kept[-1]):
            kept.append(x)
    return kept
