"""Tables of docs/interplay.md, from the stored results of the experiments on the order.

`readme_tables.py` fills the page; what was not run is a row that says so.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from tables import difference, table

Cell: TypeAlias = dict[str, Any]  # setting, format, pruning, orthogonality

PRUNINGS = ("2:4", "50%", "75%")
SETTINGS = ("weights", "weights and activations")
ORDERS = ("S→Q", "Q→S")
FAMILIES = {"then": "prune, then quantize", "sum": "quantize + exact floats"}


def result(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"order_{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["result"]
    return found


def one_shot(folder: Path, name: str, metric: str = "") -> list[Cell]:
    found = result(folder, name)
    return found["one_shot"][metric] if metric else found["cells"]  # type: ignore[no-any-return]


def tuned(folder: Path, name: str, metric: str = "") -> list[Cell]:
    found = result(folder, name)
    cells = found["cells"] if name == "lm_tuned" else found.get("tuned", [])
    return cells[metric] if metric else cells  # type: ignore[no-any-return]


# ------------------------------------------------------------------ orders


def short(x: float) -> str:
    """Four digits are enough for any of the metrics."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.4g}" if abs(x) >= 10 else f"{x:.3g}"


def better(found: dict[str, Any]) -> int | None:
    """The order, a place in ORDERS, that is better beyond noise."""
    (difference,) = found["differences"]
    if difference["noise"]:
        return None
    lower = difference["difference"]["value"] < 0  # the second order gives less
    return int(lower != found["higher_is_better"])


def both(cell: Cell) -> str:
    """Both orders; bold: the better one where they differ beyond noise; + behind a value: more harm
    than that of the parts added up.
    """
    found = cell["orthogonality"]
    best, texts = better(found), []
    for i, one in enumerate(found["combined"]):
        text = short(one["metric"])
        text = f"**{text}**" if i == best else text
        texts.append(text + ("+" if one["verdict"] == "non-orthogonal" else ""))
    return " / ".join(texts)


def grid(cells: list[Cell]) -> str:
    """One row per setting and format: Q alone, and both orders with each pruning."""
    if not cells:
        return "Not run."
    found = {(c["setting"], c["format"], c["pruning"]): c for c in cells}
    prunings = [p for p in PRUNINGS if any(p == key[2] for key in found)]
    alone = {p: next(c for c in cells if c["pruning"] == p) for p in prunings}
    dense = cells[0]["orthogonality"]["dense"]
    rows = [
        ["no quantization", short(dense)]
        + [short(alone[p]["orthogonality"]["parts"]["S"]) for p in prunings]
    ]
    for setting, form in dict.fromkeys(key[:2] for key in found):
        own = [found[setting, form, p] for p in prunings]
        q = short(own[0]["orthogonality"]["parts"]["Q"])
        rows.append([f"{form}, {setting}", q, *map(both, own)])
    return table(["", "not pruned", *[f"{p}: S→Q / Q→S" for p in prunings]], rows)


def counted(name: str, cells: list[Cell]) -> list[str]:
    """In how many cells the orders differ, and in how many the harms do more than add up."""
    wins = [better(cell["orthogonality"]) for cell in cells]
    won = [str(wins.count(i)) for i in (0, 1, None)]
    verdicts = {order: dict.fromkeys(("non-orthogonal", "orthogonal"), 0) for order in ORDERS}
    for cell in cells:
        for one in cell["orthogonality"]["combined"]:
            if one["verdict"] in verdicts[one["name"]]:
                verdicts[one["name"]][one["verdict"]] += 1
    return [name, str(len(cells)), *won] + [
        " / ".join(str(n) for n in verdicts[order].values()) for order in ORDERS
    ]


MODELS: dict[str, Callable[[Path], list[Cell]]] = {
    "ResNet20, one shot (loss)": lambda f: one_shot(f, "resnet", "loss"),
    "ResNet20, one shot (error)": lambda f: one_shot(f, "resnet", "error"),
    "sentence encoder, one shot": lambda f: one_shot(f, "encoder"),
    "language model, one shot": lambda f: one_shot(f, "lm"),
    "ResNet20, fine-tuned (loss)": lambda f: tuned(f, "resnet", "loss"),
    "ResNet20, fine-tuned (error)": lambda f: tuned(f, "resnet", "error"),
    "sentence encoder, fine-tuned": lambda f: tuned(f, "encoder"),
    "language model, fine-tuned": lambda f: tuned(f, "lm_tuned"),
}


def counts(folder: Path) -> str:
    rows = []
    for name, of in MODELS.items():
        cells = of(folder)
        rows.append(counted(name, cells) if cells else [name, "not run", *[""] * 5])
    header = ["", "cells", "S→Q better", "Q→S better", "noise"]
    header += [f"{order}: non-orthogonal / orthogonal" for order in ORDERS]
    return table(header, rows)


def gaps(folder: Path) -> str:
    """The published comparison, split into the way of training and the order."""
    rows = []
    for gap in result(folder, "lm_tuned")["gaps"]:
        parts = [gap[name] for name in ("published_gap", "training", "order")]
        cells = [
            f"{x['value']:+.3f} [{x['low']:+.3f}, {x['high']:+.3f}]"
            + (" noise" if x["noise"] else "")
            for x in parts
        ]
        perplexity = [short(x) for x in gap["perplexity"].values()]
        name = f"{gap['format']}, {gap['pruning']}"
        rows.append([name, *perplexity, *cells, f"{gap['seeds']}"])
    if not rows:
        return "Not run."
    header = ["", "S→Q, one shot", "S→Q, trained", "Q→S, trained"]
    return table([*header, "published gap", "of it training", "of it order", "seeds"], rows)


# ------------------------------------------------------------------ equal bytes


def equal_bytes(folder: Path) -> str:
    """Of each family the width whose weights have the least error, chosen without any data; beside
    it the one with the least loss.
    """
    rows = []
    found = result(folder, "or_sum")["one_shot"]
    for network, target in dict.fromkeys((r["network"], r["target"]) for r in found):
        here = [r for r in found if (r["network"], r["target"]) == (network, target)]
        chain = None
        for family, name in FAMILIES.items():
            own = [r for r in here if r["family"] == family]
            if not own:
                continue
            best = min(own, key=lambda r: r["error"])
            least = min(own, key=lambda r: r["loss"])
            chain = chain or best
            cells = [f"{best['bits']:.2f}", f"{best['error']:.3f}", short(best["loss"])]
            cells += [metric(best), "" if best is chain else beyond(chain, best)]
            cells.append("the same" if least is best else f"{scheme(least)}: {metric(least)}")
            rows.append([f"{network}, {name}: {scheme(best)}", *cells])
    header = ["", "bits per weight", "error of the weights", "loss", "test error, % or perplexity"]
    return table([*header, "loss less that of the chain", "width of least loss"], rows)


def scheme(row: dict[str, Any]) -> str:
    bits = "1 bit" if row["width"] == 1 else f"int {row['width']}"
    if row["family"] == "then":
        return f"{100 * row['density']:.3g} % kept > {bits}"
    return f"{bits} + {100 * row['density']:.2g} % floats"


def metric(row: dict[str, Any]) -> str:
    """Test error of ResNet20 in percent, or perplexity."""
    return short(row["test_error" if "test_error" in row else "perplexity"])


def beyond(first: dict[str, Any], second: dict[str, Any]) -> str:
    return difference(first["losses"], second["losses"], 3) if "losses" in first else ""


def learned(folder: Path) -> str:
    """The language model, LC: both families at equal size, over seeds."""
    found = result(folder, "or_sum")["learned"]
    if not found:
        return "Not run."
    rows = []
    for family, name in FAMILIES.items():
        own = [r for r in found if r["family"] == family]
        if not own:
            continue
        values = [r["perplexity"] for r in own]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        learned_ = f"{statistics.mean(values):.2f}{spread}"
        what = f"{name}: int {own[0]['width']}, {100 * own[0]['density']:.3g} %"
        bits = f"{statistics.mean(r['bits'] for r in own):.2f}"
        rows.append([what, bits, short(own[0]["direct"]), learned_, str(len(own))])
    return table(["", "bits per weight", "direct", "learned", "seeds"], rows)


def selection(folder: Path) -> str:
    """Which weights survive: the largest magnitudes, or the largest gains once quantized."""
    found = result(folder, "or_sum")["selection"]
    if not found:
        return "Not run."
    at = {(r["network"], r["format"], r["density"], r["way"]): r for r in found}
    rows = []
    for network, form, density in dict.fromkeys(key[:3] for key in at):
        pair = [at.get((network, form, density, way)) for way in ("magnitude", "gain")]
        if None in pair:
            continue
        first, second = pair
        cells = [f"{r['error']:.4f}" for r in pair] + [metric(r) for r in pair]
        cells.append(beyond(first, second))
        rows.append([f"{network}, {form}, {100 * density:g} % kept", *cells])
    header = ["", "error, magnitude", "error, gain", "metric, magnitude", "metric, gain"]
    return table([*header, "loss, gain less magnitude"], rows)
