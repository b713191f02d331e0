"""Tables of the stored CIFAR-10 runs (`results/cifar/*.json`) for `experiments/README.md`: seeds of
one configuration are one row; what was not run says how to run it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from tables import cell, table

Record: TypeAlias = dict[str, Any]

DENSITIES = {
    "0 %": "binary",
    "1 %": "binary + sparse 1%",
    "2 %": "binary + sparse 2%",
    "3 %": "binary + sparse 3%",
    "5 %": "binary + sparse 5%",
}
WEIGHTS = {
    "resnet20": "resnet20-12fca82f.th",
    "resnet32": "resnet32-d509ac18.th",
    "resnet56": "resnet56-4bfd9763.th",
    "vgg16/4": "vgg16.pt",
}
SCHEMES = (  # what the table of a network compares
    "binary",
    "kmeans 2",
    "kmeans 4",
    "sparse 7%",
    "rank 4e-4",
    "lowrank 8%",
    *list(DENSITIES.values())[1:],
    "lowrank 6% + sparse 1.5%",
    "binary + lowrank 2%",
    "binary + lowrank 2% + sparse 0.5%",
    "sparse 19% > int 4",
    "lowrank 33% > int 4",
)
PAIRS = ("binary + sparse 2%", "lowrank 6% + sparse 1.5%", "sparse 19% > int 4")  # of one size
PRICED = "lc-weights"  # how schemes with a price are learned
SEVERAL = 4  # epochs, at least, of what the first page shows
LONG = 12  # epochs of what is asked of a GPU
_ALIKE = ("network", "scheme", "method", "epochs", "refine", "distill", "mu0", "growth", "bfloat16")
WAYS = {
    "lc-sum": "LC, gradient at Δ(θ)",
    "lc-weights": "LC, classic",
    "lc-implicit": "LC, classic, implicit step",
    "handover": "LC, classic then Δ(θ)",
    "finetune": "direct compression, then its continuous fields trained",
    "ste": "straight-through binarization",
    "parq": "PARQ (torchao)",
}
APART = {PRICED: ", classic", "finetune": ", its factors and values trained, no LC"}


def runs(folder: Path) -> list[Record]:
    """The finished ones."""
    found = (json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json")))
    return [run for run in found if run["status"] == "done"]


def groups(found: Iterable[Record]) -> list[list[Record]]:
    """Runs that differ in their seed only, in the order of their configuration."""
    sorted_ones: dict[tuple[Any, ...], list[Record]] = {}
    for run in found:
        key = tuple(run["config"][name] for name in _ALIKE)
        sorted_ones.setdefault(key, []).append(run)
    return [sorted_ones[key] for key in sorted(sorted_ones, key=str)]


def by_default(folder: Path, network: str, method: str = "lc-sum") -> list[list[Record]]:
    """Groups of a network that were learned with the gradient at Δ(θ), or by another method,
    without distillation.
    """
    wanted = {"network": network, "method": method, "distill": 0}
    return [g for g in groups(runs(folder)) if wanted.items() <= g[0]["config"].items()]


def longest(found: list[list[Record]]) -> list[list[Record]]:
    """Of the groups with at least three seeds those with the most epochs."""
    found = [group for group in found if len(group) >= 3]
    most = max((group[0]["config"]["epochs"] for group in found), default=0)
    return [group for group in found if group[0]["config"]["epochs"] == most]


def values(group: list[Record], point: str, name: str) -> list[float]:
    return [run["points"][point][name] for run in group if point in run["points"]]


def row(group: list[Record]) -> list[str]:
    """Errors of direct compression, learned, refined; loss of the last; size, seeds, minutes."""
    last = "refined" if "refined" in group[0]["points"] else "learned"
    return [
        *(cell(values(group, point, "test_error")) for point in ("direct", "learned", "refined")),
        cell(values(group, last, "train_loss"), 3),
        cell(values(group, last, "bits_per_weight")[:1]),
        cell(values(group, last, "file_ratio")[:1]),
        str(len(group)),
        f"{statistics.mean(values(group, last, 'seconds')) / 60:.0f}",
        "bfloat16" if group[0]["config"]["bfloat16"] else "float32",
    ]


HEADER = ["direct", "learned", "refined", "training loss"]
HEADER += ["bits per weight", "file ratio", "seeds", "minutes", "trained in"]


def command(network: str, scheme: str, epochs: float, method: str = "lc-sum") -> str:
    """What fills a row that is not there."""
    if scheme.startswith("rank"):
        method = PRICED
    way = "" if method == "lc-sum" else f" --method {method}"
    way += " --refine 0.25" if method.startswith("lc-") else ""
    way += " --steps 8 --growth 8" if method in ("lc-weights", "lc-implicit") else ""
    return (
        f"`python experiments/sweep.py --out runs -- --data DIR --weights {WEIGHTS[network]} "
        f'--network {network} --scheme "{scheme}"{way} --epochs {epochs:g} --bfloat16 '
        "--seed 0 1 2`"
    )


def spent(config: dict[str, Any]) -> str:
    """Epochs of learning, and of training the continuous fields afterwards."""
    refined = f" + {config['refine']:g}" if config["refine"] else ""
    return f"{config['epochs']:g}{refined}"


def uncompressed(found: list[list[Record]]) -> list[str]:
    """A row's cells of the reference: its error stands where that of direct compression does."""
    one = found[0][0]["reference"]
    return [f"{one['test_error']:.2f}", "", "", f"{one['train_loss']:.3f}", "32.00", "1.00"]


def densities(folder: Path, networks: tuple[str, ...]) -> str:
    """One bit and s exact floats, by network and s, for all epochs there are; the paper's
    setting is marked as missing where it was not run.
    """
    rows = []
    for network in networks:
        found = by_default(folder, network)
        for share, scheme in DENSITIES.items():
            own = [group for group in found if group[0]["config"]["scheme"] == scheme]
            name = f"{network}, {share}"
            if not own:
                missing = f"needs a GPU: {command(network, scheme, LONG)}"
                rows.append([name, missing, *[""] * (len(HEADER) + 1)])
                continue
            for group in sorted(own, key=lambda g: g[0]["config"]["epochs"]):
                reference = f"{group[0]['reference']['test_error']:.2f}"
                epochs = spent(group[0]["config"])
                rows.append([name, epochs, reference, *row(group)])
    return table(["network, floats", "epochs", "reference", *HEADER], rows)


def repeated(folder: Path, network: str) -> str:
    """What was learned with three seeds or more and several epochs, by size: the first page."""
    found = [group for group in by_default(folder, network) if len(group) >= 3]
    found = [group for group in found if group[0]["config"]["epochs"] >= SEVERAL]
    found.sort(key=lambda g: (-values(g, "learned", "file_ratio")[0], g[0]["config"]["epochs"]))
    if not found:
        return f"Not measured yet: {command(network, 'binary + sparse 2%', LONG)}"
    reference = f"{found[0][0]['reference']['test_error']:.2f}"
    rows = [["reference, not compressed", reference, "", "", "", "32.00", "1.00"]]
    for group in found:
        config, last = group[0]["config"], "refined" if group[0]["config"]["refine"] else "learned"
        errors = [values(group, point, "test_error") for point in ("direct", "learned", "refined")]
        size = [cell(values(group, last, key)[:1]) for key in ("bits_per_weight", "file_ratio")]
        name = f"`{config['scheme']}`, {len(group)} seeds"
        rows.append([name, *map(cell, errors), f"{config['epochs']:g}", *size])
    header = ["test error, %", "direct compression", "LC", "LC, then refined", "epochs"]
    return table([*header, "bits per weight", "file, ratio to float32"], rows)


def trend(folder: Path) -> str:
    """ResNet20, one bit + 2 %, gradient at Δ(θ): what more epochs bring."""
    rows = []
    for group in by_default(folder / "cifar", "resnet20"):
        config = group[0]["config"]
        if config["scheme"] == DENSITIES["2 %"]:
            error = values(group, "refined" if config["refine"] else "learned", "test_error")
            form = "bfloat16" if config["bfloat16"] else "float32"
            name = f"`cifar.py`, 50 000 images, 16-bit values, trained in {form}"
            rows.append((config["epochs"], error, name))
    study = folder / "cifar_resnet20_study_sum_4epochs.json"
    whole = folder / "cifar_resnet20.json"
    if study.is_file():
        content = json.loads(study.read_text(encoding="utf-8"))
        error = [content["result"]["lc_error"]]
        name = "`cifar_resnet.py`, 45 000 images, 32-bit values"
        rows.append((content["config"]["epochs"], error, name))
    if whole.is_file():
        run = json.loads(whole.read_text(encoding="utf-8"))["sum"]
        name = "`cifar_resnet.py`, 50 000 images, 32-bit values"
        rows.append((run["epochs"], run["lc_errors"], name))
    rows.sort(key=lambda r: r[0])
    lines = [[f"{e:g}", cell(error), str(len(error)), name] for e, error, name in rows]
    return table(["epochs", "test error", "seeds", "script"], lines)


def schemes(folder: Path, network: str, epochs: float, wanted: tuple[str, ...] = SCHEMES) -> str:
    """Every scheme that was learned with the gradient at Δ(θ) for so many epochs, by size; those of
    low rank also without LC; those wanted that were not learned.
    """
    found = by_default(folder, network)
    for method, part in ((PRICED, "rank"), ("finetune", "lowrank")):  # the price of rank needs μ
        own = by_default(folder, network, method)
        found += [g for g in own if g[0]["config"]["scheme"].startswith(part)]
    found = [g for g in found if g[0]["config"]["epochs"] == epochs]
    found.sort(key=lambda group: -values(group, "learned", "file_ratio")[0])
    rows = [["not compressed", "", "", *uncompressed(found), "", "", ""]] if found else []
    for group in found:
        config = group[0]["config"]
        name = f"`{config['scheme']}`{APART.get(config['method'], '')}"
        rows.append([name, config["family"], spent(config), *row(group)])
    learned = (group[0]["config"] for group in found)
    there = {config["scheme"] for config in learned if config["method"] != "finetune"}
    for scheme in wanted:
        if scheme not in there:
            missing = f"not run: {command(network, scheme, epochs)}"
            rows.append([f"`{scheme}`", missing, *[""] * (len(HEADER) + 1)])
    return table(["scheme", "family", "epochs", *HEADER], rows)


def methods(folder: Path, network: str, epochs: float) -> str:
    """The ways of learning one scheme in equal epochs."""
    found = [
        group
        for group in groups(runs(folder))
        if (group[0]["config"]["network"], group[0]["config"]["epochs"]) == (network, epochs)
        and group[0]["config"]["scheme"] in ("binary", "binary + sparse 2%")
    ]
    order = list(WAYS)
    found.sort(key=lambda g: (g[0]["config"]["scheme"], order.index(g[0]["config"]["method"])))
    rows = [["not compressed", "", "", *uncompressed(found), "", "", ""]] if found else []
    for group in found:
        config = group[0]["config"]
        way = WAYS[config["method"]]
        if config["distill"]:
            way += f", {config['distill']:g} of the loss from the reference"
        rows.append([f"`{config['scheme']}`", way, spent(config), *row(group)])
    there = {group[0]["config"]["method"] for group in found}
    for method, way in WAYS.items():
        if method not in there:
            scheme = "binary" if method in ("ste", "parq") else "binary + sparse 2%"
            missing = f"not run: {command(network, scheme, epochs, method)}"
            rows.append([f"`{scheme}`", f"{way}: {missing}", *[""] * (len(HEADER) + 1)])
    return table(["scheme", "way", "epochs", *HEADER], rows)
