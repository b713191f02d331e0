"""The tables of README.md and experiments/README.md, made from the stored results: no number is
copied by hand.

Run:      python experiments/readme_tables.py       (rewrites both pages between their markers)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cifar_tables
import interplay_tables
import order_tables
from tables import cell, table

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
    text = f"{table(header, rows)}\n\n{note([run['seeds'] for run in runs])}"
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
    return f"{table(header, rows)}\n\n{note([run['seeds'] for run in results.values()])}"


def note(seeds: list[list[int]]) -> str:
    counts = sorted({len(each) for each in seeds})
    if counts == [1]:
        return "One seed; the last step counts."
    text = " or ".join(map(str, counts))
    return f"Mean and standard deviation over {text} seeds; the last step counts."


# ------------------------------------------------------------------ experiments/README.md


def claims(folder: Path) -> str:
    """One line for each script: what it claims, how to run it, on what, how long, the result."""
    rows = []
    for script, (claim, result) in CLAIMS.items():
        path = folder / f"{script}.json"
        if not path.is_file():
            rows.append([f"`{script}.py`", claim, "not measured yet", "", "", ""])
            continue
        content = read(path)
        seconds = content["result"].get("wall_seconds", content.get("wall_seconds"))
        seconds = content["result"].get("cpu_seconds", seconds)
        time = "" if seconds is None else f"{seconds / 60:.0f} min"
        text = result(content["result"])
        rows.append([f"`{script}.py`", claim, f"`{content['command']}`", content["device"], time])
        rows[-1].append(text)
    rows += [_vgg(folder), _cifar(folder), _training_order(folder), _super_resolution(folder)]
    header = ["script", "claim", "command", "hardware", "time", "result"]
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def settings(folder: Path) -> str:
    """A plain training step in several settings of PyTorch, on the machine of the benchmark."""
    content = read(folder / "bench_l_step.json")
    rows = [
        [name, f"{1000 * own['seconds']:.0f}", f"{own['ratio']:.2f}"]
        for name, own in content["result"]["settings"].items()
    ]
    rows.sort(key=lambda row: float(row[2]))
    header = [f"ResNet20, batch 128, {content['device']}, one thread", "ms a step", "ratio"]
    return table(header, rows)


def _vgg(folder: Path) -> list[str]:
    content = read(folder / "train_vgg16.json")
    config, result = content["config"], content["result"]
    claim = f"the reference {config['network']}, trained from random weights"
    time, text = f"{result['wall_seconds'] / 60:.0f} min", f"{result['test_error']:.2f} %"
    return ["`train_network.py`", claim, f"`{content['command']}`", content["device"], time, text]


def _cifar(folder: Path) -> list[str]:
    """The paper's headline, with the most epochs that three seeds have."""
    scheme = cifar_tables.DENSITIES["2 %"]
    found = cifar_tables.by_default(folder / "cifar", "resnet20")
    own = cifar_tables.longest([g for g in found if g[0]["config"]["scheme"] == scheme])
    claim = "ResNet20, 1 bit + 2 % floats as good as the reference: not reached"
    if not own:
        return ["`cifar.py`", claim, "not measured yet", "", "", ""]
    group = own[0]
    last = "refined" if "refined" in group[0]["points"] else "learned"
    error = cell(cifar_tables.values(group, last, "test_error"))
    seconds = statistics.mean(cifar_tables.values(group, last, "seconds"))
    text = f"{error} %, reference {group[0]['reference']['test_error']:.2f} %"
    device = group[0]["hardware"]["device"]
    time = f"{seconds / 60:.0f} min a seed"
    return ["`cifar.py`", claim, f"`{group[0]['command']}`", device, time, text]


def _training_order(folder: Path) -> list[str]:
    claim = (
        "ResNet20, weights and activations, 8 bits: pruning first is better than quantizing first"
    )
    runs = order_tables.runs(folder / "training_order_400")
    plan = {"what": "both", "bits": 8}
    first, second = (
        order_tables.chosen(runs, order=order, **plan) for order in list(order_tables.ORDERS)[:2]
    )
    if not (first and second):
        return ["`training_order.py`", claim, "not measured yet", "", "", ""]
    pair = [cell(order_tables.numbers(own, "accuracy")) for own in (first, second)]
    minutes = statistics.mean(order_tables.numbers(first, "processor_seconds")) / 60
    return [
        "`training_order.py`",
        claim,
        f"`{order_tables.command(first + second)}`",
        first[0]["device"],
        f"{minutes:.0f} min a run",
        f"P then Q {pair[0]} %, Q then P {pair[1]} %",
    ]


def _super_resolution(folder: Path) -> list[str]:
    claim = "super-resolution, 8 bits: the order flips (it does not)"
    runs = order_tables.runs(folder / "super_resolution")
    if not runs:
        return ["`super_resolution.py`", claim, "not measured yet", "", "", ""]
    arms = [run["result"]["arms"] for run in runs]
    pair = [cell([arm[f"both, {order}"]["psnr"] for arm in arms]) for order in order_tables.SUPER]
    minutes = sum(order_tables.numbers(runs, "processor_seconds")) / 60
    return [
        "`super_resolution.py`",
        claim,
        f"`{order_tables.command(runs)}`",
        runs[0]["device"],
        f"{minutes:.0f} min",
        f"P then Q {pair[0]} dB, Q then P {pair[1]} dB",
    ]


def _digits(result: dict[str, Any]) -> str:
    found = percent(result["schemes"]["binary + sparse"], "lc_error", result["seeds"])
    return f"{found} %, reference {percent(result, 'reference_error', result['seeds'])} %"


def _c_step(result: dict[str, Any]) -> str:
    held = [row["ok"] for row in result["must_show"]]
    return f"{sum(held)} of {len(held)} rows hold"


def _packed(result: dict[str, Any]) -> str:
    kept = [row for row in result["sizes"] if row["density"] == 0.02]
    ratios = ", ".join(f"{row['ratio']:.2f}" for row in kept)
    slowest = max(row["ratio"] for row in result["loading"])
    return (
        f"ResNet20, 1 bit + 2 %: ratio {ratios} (without, with entropy coding); loading to dense "
        f"at most {slowest:.2f} times reading the dense file"
    )


def _fuzz(result: dict[str, Any]) -> str:
    failures = len(result["failures"]) + len(result["kills"]["failures"])
    return f"{failures} failures in {result['mutations']:,} mutations"


def _kills(result: dict[str, Any]) -> str:
    same = "identical" if result["identical"] else "NOT identical"
    return f"{same} after {result['kills']} kills, {result['in_a_write']} of them in a write"


def _trimmed(result: dict[str, Any]) -> str:
    return f"{result['certain']} of {result['draws']} certain, worst gap {result['gap_worst']:.1e}"


def _restarts(result: dict[str, Any]) -> str:
    return f"largest ratio to the best order {result['largest_ratio']:.6f}"


def _l_step(result: dict[str, Any]) -> str:
    """In float32, and where it was measured, in bfloat16."""
    half = result.get("ways_bfloat16")
    parts = []
    for name, row in result["ways"].items():
        if name != "plain":
            parts.append(f"{name}: {row['ratio']:.3f}")
            parts[-1] += f" (bfloat16: {half[name]['ratio']:.3f})" if half else ""
    return ", ".join(parts)


def _implicit(result: dict[str, Any]) -> str:
    found = {
        form: f"{x['loss']['loss_mean']:.4f} ± {x['loss']['loss_std']:.4f}"
        for form, x in result["compared"].items()
    }
    return ", ".join(f"{form}: {text}" for form, text in found.items())


def _report_time(result: dict[str, Any]) -> str:
    return f"ResNet56: at most {max(row['seconds'] for row in result['rows']):.0f} s"


def _orders(result: dict[str, Any]) -> str:
    cells = result["one_shot"]["loss"] if "one_shot" in result else result["cells"]
    _, count, first, second, noise, *_ = interplay_tables.counted("", cells)
    return f"{count} cells: S→Q better in {first}, Q→S in {second}, noise in {noise}"


def _or_sum(result: dict[str, Any]) -> str:
    return f"{len(result['one_shot'])} one-shot points, {len(result['learned'])} learned"


CLAIMS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "digits": ("1 bit + 2 % floats within 0.5 points of the reference", _digits),
    "bench_c_step": ("the C step's costs against peers and physical limits", _c_step),
    "restarts": ("a sum of three parts is as good as its best order of sweeps", _restarts),
    "trimmed": ("k-means + sparse: how often the optimum is certain", _trimmed),
    "packed_files": ("what a report says is on disk", _packed),
    "fuzz_storage": ("a damaged file is an error that names the cause", _fuzz),
    "kill_resume": ("killed anywhere and resumed = never killed", _kills),
    "bench_l_step": ("cost of a training step against one without LC", _l_step),
    "bench_scheduled": ("cost of a training step with a schedule against one without", _l_step),
    "implicit": ("penalty in the gradient or as an implicit step: training loss", _implicit),
    "bench_order_report": ("`order_report` of a whole network takes seconds", _report_time),
    "order_lm": ("prune or quantize first, language model, one shot", _orders),
    "order_lm_tuned": ("the same after sparse fine-tuning, and a matched arm", _orders),
    "order_resnet": ("the same, ResNet20", _orders),
    "order_encoder": ("the same, sentence encoder", _orders),
    "order_or_sum": ("at equal bytes: prune, then quantize, or a sum", _or_sum),
}

TABLES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {
        "digits table": digits,
        "resnet20 files": lambda f: cifar_tables.repeated(f / "cifar", "resnet20"),
        "resnet20 table": resnet20,
    },
    "experiments/README.md": {
        "claims": claims,
        "settings": settings,
        "densities": lambda f: cifar_tables.densities(f / "cifar", NETWORKS),
        "trend": cifar_tables.trend,
        "schemes, resnet20": lambda f: cifar_tables.schemes(f / "cifar", "resnet20", 1),
        "methods, resnet20": lambda f: cifar_tables.methods(f / "cifar", "resnet20", 1),
        "schemes, vgg16/4": lambda f: cifar_tables.schemes(
            f / "cifar", "vgg16/4", 1, cifar_tables.PAIRS
        ),
    },
    "docs/interplay.md": {
        "counts": interplay_tables.counts,
        "one shot, lm": lambda f: interplay_tables.grid(interplay_tables.one_shot(f, "lm")),
        "one shot, resnet": lambda f: interplay_tables.grid(
            interplay_tables.one_shot(f, "resnet", "error")
        ),
        "one shot, encoder": lambda f: interplay_tables.grid(
            interplay_tables.one_shot(f, "encoder")
        ),
        "tuned, lm": lambda f: interplay_tables.grid(interplay_tables.tuned(f, "lm_tuned")),
        "tuned, resnet": lambda f: interplay_tables.grid(
            interplay_tables.tuned(f, "resnet", "error")
        ),
        "tuned, encoder": lambda f: interplay_tables.grid(interplay_tables.tuned(f, "encoder")),
        "gaps": interplay_tables.gaps,
        "equal bytes": interplay_tables.equal_bytes,
        "learned": interplay_tables.learned,
        "selection": interplay_tables.selection,
    },
    "docs/training-order.md": {
        "budget, digits": lambda f: order_tables.budget(f / "training_order_digits"),
        "both, digits": lambda f: order_tables.orders(f / "training_order_digits", "both"),
        "weights, digits": lambda f: order_tables.orders(f / "training_order_digits", "weights"),
        "differences, digits": lambda f: order_tables.differences(f / "training_order_digits"),
        "references, digits": lambda f: order_tables.references(f / "training_order_digits"),
        "levels, digits": lambda f: order_tables.levels(f / "training_order_digits"),
        "ablations, digits": lambda f: order_tables.ablations(f / "training_order_digits"),
        "budget, resnet20": lambda f: order_tables.budget(f / "training_order"),
        "references, resnet20": lambda f: order_tables.references(f / "training_order"),
        "weights, resnet20": lambda f: order_tables.orders(f / "training_order", "weights"),
        "both, resnet20": lambda f: order_tables.orders(f / "training_order", "both"),
        "differences, resnet20": lambda f: order_tables.differences(f / "training_order"),
        "levels, resnet20": lambda f: order_tables.levels(f / "training_order"),
        "budget, rate 0.03": lambda f: order_tables.budget(f / "training_order_lr03"),
        "references, rate 0.03": lambda f: order_tables.references(f / "training_order_lr03"),
        "weights, rate 0.03": lambda f: order_tables.orders(f / "training_order_lr03", "weights"),
        "budget, 400 steps": lambda f: order_tables.budget(f / "training_order_400"),
        "references, 400 steps": lambda f: order_tables.references(f / "training_order_400"),
        "weights, 400 steps": lambda f: order_tables.orders(f / "training_order_400", "weights"),
        "both, 400 steps": lambda f: order_tables.orders(f / "training_order_400", "both"),
        "levels, 400 steps": lambda f: order_tables.levels(f / "training_order_400"),
        "differences, 400 steps": lambda f: order_tables.differences(f / "training_order_400"),
        "super-resolution": lambda f: order_tables.super_resolution(f / "super_resolution"),
        "super-resolution, differences": lambda f: order_tables.super_differences(
            f / "super_resolution"
        ),
        "budget, ways of ResNet20": lambda f: order_tables.budget(f / "ways_400"),
        "ways of ResNet20": lambda f: order_tables.ways(f / "ways_400", (2,)),
        "budget, ways": lambda f: order_tables.budget(f / "ways_digits"),
        "ways": lambda f: order_tables.ways(f / "ways_digits"),
        "overhead": order_tables.overhead,
    },
}
NETWORKS = ("resnet20", "resnet32", "resnet56")


def filled(text: str, folder: Path, page: str = "README.md") -> str:
    """`text` with each table of the page between its marker and the next end made from the results
    in `folder`.

    Raises:
        ValueError: a marker is missing.
    """
    for name, make in TABLES[page].items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, marker, rest = text.partition(start)
        _, closing, after = rest.partition(end)
        if not (marker and closing):
            raise ValueError(f"No block {start.strip()} ... {end} to fill.")
        text = f"{before}{start}\n{make(folder)}\n\n{end}{after}"
    return text


def main() -> None:
    for page in TABLES:
        path = ROOT / page
        text = filled(path.read_text(encoding="utf-8"), RESULTS, page)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
