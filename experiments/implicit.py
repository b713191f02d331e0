"""Handwritten digits, one bit plus 2 % floats: the penalty's gradient in the optimizer's own step,
or an implicit step w ← (w + η (μ Δ(θ) + λ)) / (1 + η μ) after it?

Both ways get the same grid of first μ, growth and multipliers, in equal epochs. The setting with
the lowest training loss of the compressed model over three seeds is then run on five other seeds,
whose losses, errors and gaps decide. Test images are not looked at.

Run:      python experiments/implicit.py [--quiet]
Results:  experiments/results/implicit.json
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import digits
import torch
from common import add_options, apart, changed, option, origin, write
from torch import nn
from tqdm import tqdm

FORMS = {"gradient": False, "implicit": True}


@dataclass(frozen=True)
class Config:
    seeds: int = 3  # of the grid
    fresh: int = 5  # other seeds, of the comparison
    epochs: int = 20
    scheme: str = "binary + sparse"
    out: str = "experiments/results/implicit.json"
    quiet: bool = False
    smoke: bool = False


def grid(smoke: bool) -> list[dict[str, Any]]:
    mus, growths = ((0.05,), (1.4,)) if smoke else ((0.02, 0.1, 0.5, 2.0), (1.2, 1.4, 1.7))
    return [
        {"gradient": "weights", "mu0": mu, "growth": growth, "multipliers": multipliers}
        for mu, growth, multipliers in product(mus, growths, (True, False))
    ]


@functools.cache
def trained(base: digits.Config, seed: int) -> tuple[digits.Data, nn.Module]:
    data = digits.load(base, seed)
    return data, digits.reference(data, base, seed)


def one(base: digits.Config, settings: dict[str, Any], scheme: str, seed: int) -> dict[str, float]:
    """Training loss and error, and gap, of the compressed model; inf where it diverged."""
    config = replace(base, **settings)
    data, model = trained(base, seed)
    part = digits.schemes(config)[scheme]
    try:
        found = digits.compress(deepcopy(model), part, data, config, seed, data.train)
    except RuntimeError as cause:
        if "NaN or inf" not in str(cause):
            raise
        return {"loss": math.inf, "gap": math.inf}
    return {"loss": found["lc_loss"], "error": found["lc_error"], "gap": found["gap"]}


def run(config: Config) -> dict[str, Any]:
    started = time.process_time()
    base = replace(digits.SMOKE if config.smoke else digits.Config(), epochs=config.epochs)
    plan = grid(config.smoke)
    seeds = range(100, 100 + config.seeds)
    result: dict[str, Any] = {"grid": [], "compared": {}}
    total = len(FORMS) * (len(plan) * len(seeds) + config.fresh)
    with tqdm(total=total, disable=config.quiet) as bar:
        for form, implicit in FORMS.items():
            rows = []
            for settings in plan:
                losses = []
                for seed in seeds:
                    own = settings | {"implicit": implicit}
                    losses.append(one(base, own, config.scheme, seed)["loss"])
                    bar.update()
                diverged = sum(map(math.isinf, losses))
                mean = None if diverged else statistics.mean(losses)
                row = {"form": form, **settings, "diverged": diverged, "train_loss_mean": mean}
                rows.append(row)
            result["grid"] += rows
            best = min((r for r in rows if not r["diverged"]), key=lambda r: r["train_loss_mean"])
            chosen = {key: best[key] for key in plan[0]}
            found = []
            for seed in range(200, 200 + config.fresh):
                own = chosen | {"implicit": implicit}
                found.append(one(base, own, config.scheme, seed))
                bar.update()
            result["compared"][form] = {"settings": chosen} | {
                key: digits.spread(key, [x[key] for x in found]) for key in ("loss", "error", "gap")
            }
    return result | {"cpu_seconds": time.process_time() - started}


def table(result: dict[str, Any]) -> str:
    lines = [f"{'penalty':10} {'μ0':>5} {'growth':>6} {'λ':>5}  training loss, error %, gap"]
    for form, x in result["compared"].items():
        s = x["settings"]
        cells = [f"{x[k][f'{k}_mean']:.4f} ± {x[k][f'{k}_std']:.4f}" for k in ("loss", "error")]
        gap = f"{x['gap']['gap_mean']:.4f}"
        lines.append(
            f"{form:10} {s['mu0']:5} {s['growth']:6} {s['multipliers']!s:>5}  "
            f"{', '.join(cells)}, {gap}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, Config())
    config = apart(Config(**vars(parser.parse_args(argv))))
    if config.smoke:
        config = replace(config, seeds=1, fresh=1, epochs=1)
    torch.set_num_threads(1)
    where = origin(__file__)
    result = run(config)
    given = {k: v for k, v in changed(config).items() if k not in ("out", "quiet")}
    command = " ".join(
        ["python experiments/implicit.py", *(option(k, v) for k, v in given.items())]
    )
    kept = {k: v for k, v in asdict(config).items() if k not in ("out", "quiet")}
    write(Path(config.out), {"command": command, "config": kept, "result": result, **where})
    print(table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
