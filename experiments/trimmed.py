"""How far from optimal is the joint C step of a codebook plus sparse, trimmed k-means?

For normal, near-binary and heavy-tailed weights, for the layers of a ResNet20 and for the large
tensor of the C step benchmark: how many results are certain to be optimal, the relative gap
between the others and their bound, and the gap that the alternation alone leaves, which is what
remains where the programme cannot afford to look. A dense programme over n, k and the budget checks
what is called certain, where that is small enough.

Run:      python experiments/trimmed.py --weights FILE      (resnet20-12fca82f.th)
Results:  experiments/results/trimmed.json: for each kind, size, k and budget the share of certain
          results, mean and worst gaps, and CPU time in units of `numpy.sort` of the same weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from common import origin, write
from tqdm import tqdm

from lc_compress.trimmed import trimmed_centres

Floats = npt.NDArray[np.float64]

RESULTS = Path(__file__).parent / "results" / "trimmed.json"
CLUSTERS, SHARES = (2, 4, 16), (0.01, 0.05)


def normal(g: np.random.Generator, n: int) -> Floats:
    return 0.05 * g.normal(size=n)


def near_binary(g: np.random.Generator, n: int) -> Floats:
    """The shape of weights late in an LC run (papers/learning-compression.md, 4.7)."""
    size = np.where(g.random(n) < 0.08, 0.0, 0.05)
    return np.where(g.random(n) < 0.5, -size, size) + 0.005 * g.normal(size=n)


def heavy_tailed(g: np.random.Generator, n: int) -> Floats:
    return 0.05 * g.normal(size=n) * np.exp(1.5 * g.normal(size=n))


KINDS = {"normal": normal, "near-binary": near_binary, "heavy-tailed": heavy_tailed}


def seconds(call: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    best, result = np.inf, None
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        best = min(best, time.process_time() - start)
    return best, result


def dense(x: Floats, k: int, drop: int) -> float:
    """The least error, by a programme over positions, clusters and numbers of dropped values."""
    x = np.sort(x)
    n = x.size
    y = np.triu(x - x[:, None])
    mass = np.maximum(np.arange(n) - np.arange(n)[:, None] + 1, 1)
    cost = np.full((n + 1, n + 1), np.inf)
    error = np.maximum((y**2).cumsum(1) - y.cumsum(1) ** 2 / mass, 0)
    cost[:-1, 1:] = np.where(np.tri(n, n, -1) > 0, np.inf, error)
    np.fill_diagonal(cost, 0)
    least = np.full((drop + 1, n + 1), np.inf)
    least[np.arange(drop + 1), np.arange(drop + 1)] = 0
    for _ in range(k):
        least = np.stack([(row[:, None] + cost).min(0) for row in least])
        for d in range(1, drop + 1):
            least[d, 1:] = np.minimum(least[d, 1:], least[d - 1, :-1])
    return float(least[drop, n])


def measured(draws: list[torch.Tensor], k: int, share: float, alone: bool = True) -> dict[str, Any]:
    """Gaps and times over the draws, of the solver and of its alternation alone."""
    certain, gaps, alternated, times, alone_times, sorts = 0, [], [], [], [], []
    for w in draws:
        drop = max(round(share * w.numel()), 1)
        sorts.append(seconds(lambda w=w: np.sort(w.numpy()), 5)[0])
        spent, found = seconds(lambda w=w, drop=drop: trimmed_centres(w, k, drop=drop))
        times.append(spent)
        certain += found.certain
        gaps.append(0.0 if found.certain else found.value / found.bound - 1)
        if alone:
            spent, other = seconds(lambda w=w, drop=drop: trimmed_centres(w, k, drop=drop, work=0))
            alone_times.append(spent)
            alternated.append(other.value / found.bound - 1)
    row = {
        "draws": len(draws),
        "certain": certain,
        "gap_mean": float(np.mean(gaps)),
        "gap_worst": max(gaps),
        "milliseconds": 1e3 * float(np.mean(times)),
        "sorts": float(np.mean(times) / np.mean(sorts)),
    }
    if alone:
        row |= {
            "alternation_gap_mean": float(np.mean(alternated)),
            "alternation_gap_worst": max(alternated),
            "alternation_milliseconds": 1e3 * float(np.mean(alone_times)),
        }
    return row


def layers(weights: str) -> dict[str, torch.Tensor]:
    state = torch.load(weights, weights_only=True, map_location="cpu")["state_dict"]
    return {
        name.removeprefix("module."): w.reshape(-1)
        for name, w in state.items()
        if name.endswith("weight") and w.dim() > 1
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", help="file of the pretrained ResNet20")
    parser.add_argument("--draws", type=int, default=20, help="of each kind and size")
    parser.add_argument("--smoke", action="store_true", help="few small draws")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draws = 2 if options.smoke else options.draws
    sizes = (300,) if options.smoke else (2000, 20_000)
    large = 3000 if options.smoke else 512 * 512 * 3 * 3
    checked = 120 if options.smoke else 800

    rows: list[dict[str, Any]] = []

    def add(name: str, weights: list[torch.Tensor], n: int, **arguments: Any) -> None:
        for k in CLUSTERS:
            for share in SHARES:
                setting = {"weights": name, "n": n, "k": k, "share": share}
                rows.append(setting | measured(weights, k, share, **arguments))
                row = rows[-1]
                tqdm.write(
                    f"{name:13} n {n:7} k {k:2} {share:.0%}: certain {row['certain']}/"
                    f"{row['draws']}, worst gap {row['gap_worst']:.1e}, alternation "
                    f"{row.get('alternation_gap_worst', np.nan):.1e}, {row['sorts']:.0f} sorts, "
                    f"{row['milliseconds']:.0f} ms"
                )

    for name, draw in tqdm(KINDS.items()):
        for n in sizes:
            generators = [np.random.default_rng(seed) for seed in range(draws)]
            add(name, [torch.from_numpy(draw(g, n)).float() for g in generators], n)
    if options.weights is not None:
        network = list(layers(options.weights).values())
        add("ResNet20", network, sum(w.numel() for w in network))
    tensor = np.random.default_rng(0).normal(0, 0.05, large).astype(np.float32)
    add("large normal", [torch.from_numpy(tensor)], large, alone=False)

    differences = []
    for draw in tqdm(KINDS.values()):
        for seed in range(draws):
            x = draw(np.random.default_rng(seed), checked)
            least = dense(x, 3, checked // 40)
            found = trimmed_centres(torch.from_numpy(x), 3, drop=checked // 40)
            differences.append(abs(found.value / least - 1))

    content = {
        "command": "python experiments/trimmed.py --weights FILE" + " --smoke" * options.smoke,
        "config": {"clusters": CLUSTERS, "shares": SHARES, "draws": draws, "sizes": sizes},
        "result": {
            "certain": sum(row["certain"] for row in rows),
            "draws": sum(row["draws"] for row in rows),
            "gap_mean": float(
                np.average([r["gap_mean"] for r in rows], None, [r["draws"] for r in rows])
            ),
            "gap_worst": max(row["gap_worst"] for row in rows),
            "dense_programme": {
                "n": checked,
                "draws": len(differences),
                "largest_relative_difference": max(differences),
            },
            "rows": rows,
        },
        **origin(__file__),
    }
    write(options.out, content)
    result = content["result"]
    print(f"{result['certain']} of {result['draws']} certain, worst gap {result['gap_worst']:.1e}")


if __name__ == "__main__":
    main()
