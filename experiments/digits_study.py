"""Handwritten digits, one bit per weight plus 2 % floats: what the settings of LC are worth.

One setting at a time is changed from a classic and from a straight-through baseline; all variants
have the same epochs, batches and seeds, and are judged by the error and the cross-entropy on
held-out training images and by the gap that is left. Test images are not looked at.

Run:      python experiments/digits_study.py [--quiet]
Results:  digits_study.json in experiments/results, or where --out says.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import digits
import torch
from common import origin, write
from digits import RESULTS, compress, load, measure, reference, schemes
from tqdm import tqdm


@dataclass(frozen=True)
class Config:
    seed: int = 100  # the first; not those of digits.py
    seeds: int = 3
    epochs: int = 20
    scheme: str = "binary + sparse"
    out: str = ""  # folder
    quiet: bool = False  # no progress on stderr
    smoke: bool = False


MEASURES = {
    "held_out_error": "lc_error",
    "held_out_loss": "lc_loss",
    "gap": "gap",
    "guarded_steps": "guarded_steps",
}


@dataclass(frozen=True)
class Variant:
    """A baseline with some settings changed."""

    question: str
    name: str
    changes: dict[str, Any]


def variants(smoke: bool) -> list[Variant]:
    """The grid, one question after the other."""
    sets: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
        "classic": (
            {"gradient": "weights"},
            {"baseline": {}},
        ),
        "mu0": (
            {"gradient": "weights"},
            {"0.01": {"mu0": 0.01}, "0.2": {"mu0": 0.2}},
        ),
        "growth of mu per epoch": (
            {"gradient": "weights"},
            {"1.2": {"growth": 1.2}, "1.7": {"growth": 1.7}},
        ),
        "C steps": (
            {"gradient": "weights"},
            {
                "one in 2 epochs": {"steps": 10},
                "one an epoch": {"steps": 20},
                "every iteration": {"steps": 300},
            },
        ),
        "learning rate": (
            {"gradient": "weights"},
            {"0.02": {"lr": 0.02}, "0.1": {"lr": 0.1}},
        ),
        "quadratic penalty": (
            {"gradient": "weights", "multipliers": False},
            {"4 C steps an epoch": {}, "C step every iteration": {"steps": 300}},
        ),
        "learning-rate guard": (
            {"gradient": "weights", "lr_guard": True},
            {"growth 1.4": {}, "growth 1.7": {"growth": 1.7}},
        ),
        "first L step": (
            {"gradient": "weights", "steps": 20},
            {"4 times as long": {"first": 4.0}},
        ),
        "straight-through": (
            {"gradient": "sum"},
            {
                "baseline": {},
                "learning rate 0.02": {"lr": 0.02},
                "learning rate 0.1": {"lr": 0.1},
                "C step every 5 iterations": {"every": 5},
                "C step every 15 iterations": {"every": 15},
            },
        ),
        "hand-over": (
            {"gradient": "both"},
            {
                "after 1/4 of the epochs": {"handover": 0.25},
                "after 1/2": {"handover": 0.5},
                "after 3/4": {"handover": 0.75},
            },
        ),
    }
    every = [
        Variant(question, name, base | changes)
        for question, (base, names) in sets.items()
        for name, changes in names.items()
    ]
    return (
        [v for v in every if v.name in ("baseline", "growth 1.7", "after 1/2")] if smoke else every
    )


def run(config: Config) -> dict[str, Any]:
    started = time.process_time()
    base = replace(digits.SMOKE if config.smoke else digits.Config(), epochs=config.epochs)
    plan = variants(config.smoke)
    seeds = range(config.seed, config.seed + config.seeds)
    references: list[float] = []
    found: list[list[dict[str, float]]] = [[] for _ in plan]  # of the runs that did not diverge
    with tqdm(total=len(seeds) * len(plan), disable=config.quiet) as bar:
        for seed in seeds:
            data = load(base, seed)
            model = reference(data, base, seed)
            references.append(measure(model, data, data.held_out)[0])
            for variant, rows in zip(plan, found, strict=True):
                bar.set_description(f"seed {seed}: {variant.question}, {variant.name}")
                settings = replace(base, **variant.changes)
                part = schemes(settings)[config.scheme]
                index = data.held_out
                try:
                    rows.append(compress(deepcopy(model), part, data, settings, seed, index))
                except RuntimeError as cause:
                    if "NaN or inf" not in str(cause):
                        raise
                bar.update()
    return {
        "reference_held_out_errors": references,
        "reference_held_out_error_mean": statistics.mean(references),
        "direct_held_out_error_mean": statistics.mean(r["direct_error"] for r in found[0]),
        "baseline": asdict(base),
        "variants": [
            {
                **asdict(variant),
                "diverged": len(seeds) - len(rows),
                "held_out_errors": [r["lc_error"] for r in rows],
                **{
                    f"{name}_mean": statistics.mean(r[key] for r in rows)
                    for name, key in MEASURES.items()
                    if rows
                },
            }
            for variant, rows in zip(plan, found, strict=True)
        ],
        "cpu_seconds": time.process_time() - started,
    }


def table(result: dict[str, Any]) -> str:
    lines = [("held-out", "", "error, %", "loss", "gap", "guarded steps", "diverged")]
    for name in ("reference", "direct"):
        lines.append((name, "", f"{result[f'{name}_held_out_error_mean']:.2f}", *4 * ("",)))
    question = ""
    for row in result["variants"]:
        digits_shown = zip(MEASURES, (2, 3, 4, 0), strict=True)
        means = [f"{row[f'{m}_mean']:.{n}f}" if f"{m}_mean" in row else "" for m, n in digits_shown]
        shown = "" if row["question"] == question else row["question"]
        question = row["question"]
        diverged = f"{row['diverged']} of {len(result['reference_held_out_errors'])}"
        lines.append((shown, row["name"], *means, diverged if row["diverged"] else ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i > 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def parse(argv: list[str]) -> Config:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Config):
        option = f"--{field.name}"
        if isinstance(field.default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(option, action=action, default=field.default)
        elif field.name == "scheme":
            names = list(schemes(digits.Config()))
            parser.add_argument(option, choices=names, default=field.default)
        else:
            parser.add_argument(option, type=type(field.default), default=field.default)
    config = Config(**vars(parser.parse_args(argv)))
    if config.seeds < 1:
        raise SystemExit(f"--seeds {config.seeds}: at least 1.")
    return replace(config, seeds=1, epochs=1) if config.smoke else config


def main(argv: list[str]) -> None:
    config = parse(argv)
    torch.set_num_threads(1)
    where = origin(
        digits.__file__
    )  # of the code that runs, not of what the folder holds when it ends
    where["study_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    try:
        result = run(config)
    except KeyboardInterrupt:
        print("Interrupted: nothing was written.", file=sys.stderr)
        raise SystemExit(130) from None
    kept = {key: x for key, x in asdict(config).items() if key not in ("out", "quiet", "smoke")}
    given = [f"--{key} '{x}'" for key, x in kept.items() if x != getattr(Config, key)]
    command = " ".join(["python experiments/digits_study.py", *given])
    path = Path(config.out) if config.out else RESULTS
    path /= f"digits_study{'_smoke' if config.smoke else ''}.json"
    write(path, {"command": command, "config": kept, "result": result, **where})
    print(table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
