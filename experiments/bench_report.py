"""What `bench_c_step.py` found: its tables, each target beside what was reached, and the figure.

Run:      python experiments/bench_report.py [FILE]      (tables and figure of stored results again)
          FILE: bench_c_step.json; without: that in experiments/results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]
STATIONARY = 1e-6  # no block gains more, relatively
MARKS = {  # of the peers in the figure
    "scikit-learn, n_init=10": ("s", "#D55E00"),
    "scikit-learn, n_init=1": ("o", "#D55E00"),
    "kmeans1d": ("^", "#009E73"),
    "ckwrap": ("v", "#009E73"),
    "scipy.linalg.svd": ("P", "#7F3C8D"),
    "torch.svd_lowrank": ("X", "#7F3C8D"),
    "stable argsort": ("*", "#B87A00"),
}


# ------------------------------------------------------------------ targets


def judged(result: Record) -> list[Record]:
    """The targets, each with what was reached on (a) with one thread, and whether that is enough.

    `reached` is in units of S, G or a training step; `objective` says what `error` must be.
    """
    lines = []
    for record in result.get("solver", []):
        if (record["input"], record["threads"]) == ("a", 1):
            lines += of_solver(record, result)
    for k in (2, 4, 16):
        for record in result.get("solver", []):
            if record["row"] == f"KMeans {k}" and record["input"] != "a":
                lines += of_inputs(record, result)
    for record in result.get("vectors", []):
        if "excess" in record:
            worst = max(record["excess"].values())
            solver = f"KMeans 2, 4, 16: {record['vectors']} weighted vectors"
            lines.append(line(solver, worst <= 1e-9, objective="excess ≤ 1e-9", error=worst))
    for record in result.get("network", []):
        if record["threads"] == 1 and "c_step_seconds" in record:
            steps = {kind: record[f"{kind}_step_seconds"] for kind in ("float32", "bfloat16")}
            faster = min(steps, key=lambda kind: steps[kind])
            share = record["c_step_seconds"] / steps[faster]
            target = 0.1 if record["depth"] == 20 else None
            shown: Record = {"unit": "training step", "objective": f"the faster: {faster}"}
            name, good = f"C step of ResNet{record['depth']}", target is None or share <= target
            lines.append(line(name, good, target=target, reached=share, **shown))
    return lines


def line(
    solver: str,
    ok: bool,
    *,
    target: float | None = None,
    reached: float | None = None,
    unit: str = "",
    objective: str = "",
    error: float | None = None,
    reference: float | None = None,
    faster: float | None = None,
) -> Record:
    """One target. `faster`: the older toolkit's listed time over ours."""
    return {
        "solver": solver,
        "target": target,
        "reached": reached,
        "unit": unit,
        "objective": objective,
        "error": error,
        "reference": reference,
        "ok": ok,
        "times_faster": faster,
    }


def of_solver(record: Record, result: Record) -> list[Record]:
    """The lines of one solver: cold, warm where that has a target, and the time to an error."""
    name, goal = record["row"], result["targets"][record["row"]]
    if "cold_seconds" not in record:
        stopped = record.get("stopped_after_seconds")
        why = f"stopped after {stopped:g} s" if stopped else "failed"
        return [line(name, False, target=goal["cold"], unit=goal["unit"], objective=why)]
    listed = result["listed"]["times"].get(name, [None] * 4)
    unit = record[f"{goal['unit']}_seconds"]

    def timed(title: str, most: float | None, seconds: float, good: bool, **other: Any) -> Record:
        reached, old = seconds / unit, other.pop("old")
        good = good and (most is None or reached <= most)
        faster = old / seconds if old else None
        units = {"target": most, "reached": reached, "unit": goal["unit"]}
        return line(title, good, **units, faster=faster, **other)

    def least(state: str) -> Record:
        """How the error of this state compares with the least one."""
        error, excess = record[f"{state}_error"], record.get(f"{state}_excess")
        shown: Record = {"objective": f"least, ≤ +{goal['excess']:g}", "error": error}
        if not goal["least"]:
            return shown | {"objective": "reported", "good": True}
        if excess is None:  # what it is measured against is missing
            return shown | {"good": False}
        return shown | {"reference": error / (1 + excess), "good": excess <= goal["excess"]}

    cold, most = least("cold"), goal["cold"]
    title = name
    orders = [x["error"] for x in result.get("order", []) if "error" in x]
    if goal["below"] is not None:
        cold |= {"objective": "≤, stationary", "reference": goal["below"]}
        cold["good"] = cold["error"] <= goal["below"]
    elif goal["stationary"] and orders:
        cold |= {"objective": f"≤ best of {len(orders)} orders", "reference": min(orders)}
        cold["good"] = cold["error"] <= min(orders) * (1 + 1e-9)
    if goal["stationary"]:
        cold["good"] = cold["good"] and record.get("block_gain", 1) <= STATIONARY
    lines = []
    if goal["reach"] is not None and "reach_error" in record:
        aim: Record = {"objective": "≤", "reference": record["reach_error"]}
        title, reaching = f"{name}, to the end", f"{name}, to reach"
        if record["reach_seconds"] is None:
            lines.append(line(reaching, False, target=most, unit=goal["unit"], **aim))
        else:
            aim |= {"error": record["reached_error"], "good": True, "old": listed[0]}
            lines.append(timed(reaching, most, record["reach_seconds"], **aim))
        most = None
    lines.append(timed(title, most, record["cold_seconds"], old=listed[0], **cold))
    if goal["warm"] is not None:
        warm = {**least("warm"), "old": listed[1]}
        lines.append(timed(f"{name}, warm", goal["warm"], record["warm_seconds"], **warm))
    return lines


def of_inputs(record: Record, result: Record) -> list[Record]:
    """Whether k-means is optimal on another input than (a), cold and warm."""
    found = [record[f"{x}_excess"] for x in ("cold", "warm") if f"{x}_excess" in record]
    if not found or record["threads"] != 1:
        return []
    title, worst = f"{record['row']} on ({record['input']})", max(found)
    return [line(title, worst <= 1e-9, objective="excess ≤ 1e-9", error=worst)]


# ------------------------------------------------------------------ tables


def tables(result: Record) -> str:
    """Everything measured, then the targets."""
    texts = []
    groups = dict.fromkeys((x["input"], x["threads"]) for x in result.get("solver", []))
    for name, threads in groups:
        chosen = [
            [x for x in result.get(kind, []) if (x["input"], x["threads"]) == (name, threads)]
            for kind in ("solver", "peer")
        ]
        listed = result["listed"]["times"] if (name, threads) == ("a", 1) else {}
        title = f"Input ({name}), {threads} thread{'s' if threads > 1 else ''}"
        texts.append(f"{title}\n{solver_table(chosen[0], listed)}")
        if chosen[1]:
            texts.append(f"{title}: peers, cold\n{peer_table(*chosen)}")
    if result.get("order"):
        texts.append(f"Three parts, each order alone on (a)\n{order_table(result['order'])}")
    if result.get("network"):
        texts.append(f"C step of a whole network, warm\n{network_table(result['network'])}")
    if result["must_show"]:
        texts.append(f"Targets: (a), one thread\n{target_table(result['must_show'])}")
    texts.append(f"Older toolkit: {result['listed']['source']}.")
    return "\n\n".join([*texts, *result["notes"]])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    )


def number(x: float | None, form: str = ".3g") -> str:
    return "" if x is None else f"{x:{form}}"


def over(record: Record, name: str, unit: str) -> float | None:
    """A time in a unit of the same process."""
    seconds, one = record.get(f"{name}_seconds"), record.get(f"{unit}_seconds")
    return seconds / one if seconds is not None and one else None


def solver_table(records: Iterable[Record], listed: Record) -> str:
    head = ["solver", "cold s", "S", "RW", "G", "error", "+ over least"]
    head += ["warm s", "S", "error", "+ over least", "peak MB"]
    lines = [[*head, *(["listed/cold", "listed/warm"] if listed else [])]]
    for x in records:
        cells = [x["row"] + (" (stopped)" if "stopped_after_seconds" in x else "")]
        for state in ("cold", "warm"):
            cells.append(number(x.get(f"{state}_seconds"), ".4f"))
            cells += [
                number(over(x, state, u)) for u in (("S", "RW", "G") if state == "cold" else "S")
            ]
            cells.append(number(x.get(f"{state}_error"), ".6f"))
            cells.append(number(x.get(f"{state}_excess"), ".1e"))
        cells.append(number(x.get("peak_megabytes"), ".1f"))
        if "stopped_after_seconds" in x:
            cells[1] = cells[1] or f"> {x['stopped_after_seconds']:g}"
        elif "failed" in x:
            cells[1] = "failed"
        if listed:
            old = listed.get(x["row"], [None, None])
            ours = [x.get(f"{state}_seconds") for state in ("cold", "warm")]
            cells += [
                number(a / b if a and b else None) for a, b in zip(old[:2], ours, strict=True)
            ]
        lines.append(cells)
    return aligned(lines)


def peer_table(solvers: Iterable[Record], peers: Iterable[Record]) -> str:
    ours = {x["row"]: x for x in solvers}
    lines = [["solver: peer", "s", "S", "error", "+ over ours", "time over ours"]]
    for x in peers:
        own, seconds = ours[x["row"]], over(x, "cold", "S")
        mine, excess = over(own, "cold", "S"), None
        if x.get("cold_error") is not None and own.get("cold_error"):
            excess = x["cold_error"] / own["cold_error"] - 1
        shown = number(x.get("cold_seconds"), ".4f")
        if "stopped_after_seconds" in x:
            shown = f"> {x['stopped_after_seconds']:g}"
        cells = [f"{x['row']}: {x['peer']}", "failed" if "failed" in x else shown]
        cells += [number(seconds), number(x.get("cold_error"), ".6f"), number(excess, ".1e")]
        lines.append([*cells, number(seconds / mine if seconds and mine else None)])
    return aligned(lines)


def order_table(records: Iterable[Record]) -> str:
    lines = [["first to last", "s", "sweeps", "error"]]
    for x in records:
        order = " ".join("BLS"[i] for i in x["order"])
        cells = [
            number(x.get("seconds"), ".1f"),
            number(x.get("sweeps")),
            number(x.get("error"), ".6f"),
        ]
        lines.append([order, *cells])
    return aligned(lines)


def network_table(records: Iterable[Record]) -> str:
    head = ["network", "threads", "project s", "S", "LC.c_step s"]
    lines = [[*head, "float32 step s", "bfloat16 step s", "project/float32", "project/bfloat16"]]
    for x in records:
        shares = [over(x, "c_step", f"{kind}_step") for kind in ("float32", "bfloat16")]
        cells = [f"ResNet{x['depth']}", str(x["threads"])]
        cells += [number(x.get("c_step_seconds"), ".4f"), number(over(x, "c_step", "S"))]
        for name in ("lc_c_step", "float32_step", "bfloat16_step"):
            cells.append(number(x.get(f"{name}_seconds"), ".4f"))
        lines.append([*cells, *(number(share, ".1%") for share in shares)])
    return aligned(lines)


def target_table(judgements: Iterable[Record]) -> str:
    lines = [
        ["solver", "target", "reached", "objective", "error", "reference", "ok", "listed/ours"]
    ]
    for x in judgements:
        share = x["unit"] == "training step"
        reached = number(x["reached"], ".1%" if share else ".3g")
        target = number(x["target"], ".0%" if share else ".3g")
        unit = f" {x['unit']}" if x["unit"] else ""
        cells = [f"≤ {target}{unit}" if target else "", f"{reached}{unit}" if reached else ""]
        cells += [x["objective"], number(x["error"], ".10g"), number(x["reference"], ".10g")]
        lines.append([x["solver"], *cells, "yes" if x["ok"] else "NO", number(x["times_faster"])])
    return aligned(lines)


# ------------------------------------------------------------------ figure


def check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit(
            "The figure needs matplotlib: install it (pip install 'lc-compress[plot]'), "
            "or run with --no-figure for the table and the JSON alone."
        )


def draw(result: Record, stem: Path) -> None:
    """Bars: our time in units of S on (a), one thread; marks: the peers, listed times, targets."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def of_a(kind: str) -> list[Record]:
        found = result.get(kind, [])
        return [x for x in found if (x["input"], x["threads"]) == ("a", 1) and "cold_seconds" in x]

    solvers, listed = of_a("solver"), result["listed"]["times"]
    place = {x["row"]: i for i, x in enumerate(solvers)}
    with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "path", "font.size": 10}):
        height = 1.9 + 0.42 * len(solvers)
        figure = Figure(figsize=(9, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for i, x in enumerate(solvers):
            goal, sort = result["targets"][x["row"]], x["S_seconds"]
            first = {"label": "cold"} if i == 0 else {}
            axes.barh(i - 0.16, x["cold_seconds"] / sort, 0.32, color="#0072B2", **first)
            first = {"label": "warm"} if i == 0 else {}
            if "warm_seconds" in x:
                axes.barh(i + 0.16, x["warm_seconds"] / sort, 0.32, color="#8FC3E8", **first)
            scale = x[f"{goal['unit']}_seconds"] / sort
            for target, up in ((goal["cold"], -0.16), (goal["warm"], 0.16)):
                if target is not None:
                    at = target * scale
                    axes.plot([at, at], [i + up - 0.2, i + up + 0.2], color="black", linewidth=2)
            if x.get("reach_seconds"):
                reach = {"label": f"{x['row']} reaches {x['reach_error']:.6g}"}
                at = x["reach_seconds"] / sort
                axes.plot(at, i - 0.16, "wd", markeredgecolor="black", markersize=6, **reach)
            for state, up in (("cold", -0.16), ("warm", 0.16)):
                if x["row"] in listed and f"{state}_seconds" in x:
                    seconds = listed[x["row"]][0 if state == "cold" else 1] / sort
                    face = "#444444" if state == "cold" else "white"
                    axes.plot(seconds, i + up, "D", color="#444444", markerfacecolor=face, ms=5)
        peers = [x for x in of_a("peer") if x["row"] in place]
        for x in peers:
            marker, color = MARKS[x["peer"]]
            at = x["cold_seconds"] / x["S_seconds"]
            axes.plot(at, place[x["row"]], marker, color=color, markersize=7, linestyle="none")
        shown = {x["peer"] for x in peers}
        empty: list[float] = []
        axes.plot(empty, empty, "|", color="black", markersize=12, mew=2, label="target")
        axes.plot(empty, empty, "D", color="#444444", ms=5, label="older toolkit, cold (listed)")
        axes.plot(
            empty,
            empty,
            "D",
            color="#444444",
            markerfacecolor="white",
            ms=5,
            label="older toolkit, warm (listed)",
        )
        for name, (marker, color) in MARKS.items():
            if name in shown:
                axes.plot(empty, empty, marker, color=color, linestyle="none", label=name)
        axes.set(xscale="log", ylim=(len(solvers) - 0.4, -0.6))
        axes.set_yticks(range(len(solvers)), list(place))
        axes.set_xlabel("time of one C step over numpy.sort of the same weights, one thread")
        axes.grid(axis="x", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        for suffix, options in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
            path = stem.with_name(stem.name + suffix)
            temporary = stem.with_name(f"{stem.name}.{os.getpid()}{suffix}")
            figure.savefig(temporary, **options)
            os.replace(temporary, path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS / "bench_c_step.json")
    path = parser.parse_args(argv).file
    check_matplotlib()
    result = json.loads(path.read_text(encoding="utf-8"))["result"]
    result["must_show"] = judged(result)
    print(tables(result))
    draw(result, path.with_suffix(""))


if __name__ == "__main__":
    main(sys.argv[1:])
