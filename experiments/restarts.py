"""Does the cold start of a sum find the best order? Binary + low rank + sparse, ResNet20 layers.

Each of the six orders of the three terms is run from scratch to stationarity, one term at a time,
beside the library's own cold start (`Sum`), and beside the best start from the two orders of its
blocks, of which one is the exact pair binary + sparse.

Run:      python experiments/restarts.py --weights FILE      (resnet20-12fca82f.th)
Results:  experiments/results/restarts.json: per layer the squared errors, and the largest ratio of
          the library's to the best of the six.
"""

from __future__ import annotations

import argparse
from itertools import permutations
from pathlib import Path

import torch
from common import origin, write
from torch import Tensor
from tqdm import tqdm

from lc_compress import Binary, LowRank, Matrix, Sparse
from lc_compress.compose.sums import Block, Sum, _Descent

RESULTS = Path(__file__).parent / "results" / "restarts.json"
PARTS = {"binary": Binary(), "low rank": LowRank(2).over(Matrix()), "sparse": Sparse(density=0.02)}
TOLERANCE, SWEEPS = 1e-8, 2000


def layers(weights: str | None) -> dict[str, Tensor]:
    """The convolutions and the linear layer; random ones without a file."""
    if weights is None:
        generator = torch.Generator().manual_seed(0)
        return {"random": torch.randn(8, 4, 3, 3, generator=generator)}
    state = torch.load(weights, weights_only=True, map_location="cpu")["state_dict"]
    return {
        name.removeprefix("module."): w
        for name, w in state.items()
        if name.endswith("weight") and w.dim() > 1
    }


def by_order(w: Tensor) -> dict[str, float]:
    """Squared error of each order of single terms, from its greedy start to stationarity."""
    found = {}
    for order in permutations(PARTS):
        total = Sum(tuple(PARTS[name] for name in order))
        descent = _Descent(total, w, None, None)
        single = tuple(Block((i,)) for i in range(3))
        states = descent.descend(descent.greedy(single), TOLERANCE, SWEEPS, blocks=single)
        found[", ".join(order)] = 2 * total.objective(w, states)
    return found


def by_blocks(w: Tensor) -> float:
    """The better of both orders of the blocks, to stationarity."""
    descent = _Descent(Sum(tuple(PARTS.values())), w, None, None)
    orders = permutations(descent.blocks)
    return 2 * min(
        descent.value(descent.descend(descent.greedy(x), TOLERANCE, SWEEPS)) for x in orders
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", help="file of the pretrained ResNet20")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    total = Sum(tuple(PARTS.values()))
    rows = {}
    for name, w in tqdm(layers(options.weights).items()):
        orders = by_order(w)
        ours = 2 * total.objective(w, total.project(w))
        best = min(orders.values())
        rows[name] = {
            "orders": orders,
            "sum": ours,
            "ratio": ours / best,
            "ratio_from_blocks": by_blocks(w) / best,
        }
        worst = max(orders.values()) / best
        tqdm.write(f"{name}: sum / best order {ours / best:.6f}, worst / best {worst:.4f}")
    ratios = [row["ratio"] for row in rows.values()]
    content = {
        "command": "python experiments/restarts.py --weights FILE",
        "config": {"parts": str(total), "tolerance": TOLERANCE, "sweeps": SWEEPS},
        "result": {
            "largest_ratio": max(ratios),
            "mean_ratio": sum(ratios) / len(ratios),
            "largest_ratio_from_blocks": max(row["ratio_from_blocks"] for row in rows.values()),
            "layers_not_worse": sum(ratio <= 1 + 1e-6 for ratio in ratios),
            "layers": rows,
        },
        **origin(__file__),
    }
    write(options.out, content)
    print(f"largest ratio {max(ratios):.6f} over {len(ratios)} layers")


if __name__ == "__main__":
    main()
