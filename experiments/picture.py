"""The picture of the README: one layer's weights as binary + low-rank + sparse, from a real run.

A small net learns scikit-learn's handwritten digits, then LC learns its first layer as a sum of the
three parts. Drawn are the layer's weights w after the last L step and the three terms of Δ(θ),
all in one colour scale; the captions count the bits that each part stores.

Run:      python experiments/picture.py
Results:  docs/figures/parts.svg and parts.png; in another folder with --out. Seconds on one core.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lc_compress import LC, Binary, LowRank, Sparse, geometric

FIGURES = Path(__file__).parents[1] / "docs" / "figures"


@dataclass(frozen=True)
class Config:
    seed: int = 0
    hidden: int = 64  # the layer drawn is hidden × 64 pixels
    reference_steps: int = 1500
    rank: int = 2
    density: float = 0.03
    steps: int = 15  # LC steps
    length: int = 100  # optimizer steps in each
    mu0: float = 1e-2
    growth: float = 1.5
    lr: float = 2e-3
    weight_decay: float = 0.1
    batch: int = 128


@dataclass(frozen=True)
class Panel:
    """A matrix, what it is, and its size."""

    matrix: Tensor
    title: str
    caption: str


# ------------------------------------------------------------------ data and training


def train(model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, steps: int) -> None:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels).long()
    for _ in range(steps):
        index = torch.randint(len(x), (config.batch,))
        loss = F.cross_entropy(model(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def learn(config: Config) -> tuple[list[Panel], str]:
    """The four panels, w and the terms of Δ(θ), and a line about their sum."""
    torch.manual_seed(config.seed)
    model = nn.Sequential(nn.Linear(64, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 10))
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    train(model, optimizer, config, config.reference_steps)

    half = torch.float16
    part = Binary() + LowRank(config.rank, value_dtype=half)
    part = part + Sparse(density=config.density, value_dtype=half)
    schedule = geometric(config.mu0, config.growth, config.steps)
    lc = LC(model, {"0.weight": part}, schedule=schedule, optimizer=optimizer)
    for _ in lc.steps(progress=False):
        train(model, optimizer, config, config.length)

    (task,) = lc.tasks
    w = task.current[0].clone()
    titles = ["binary ±a", f"low-rank, rank {config.rank}", f"sparse, {100 * config.density:g} %"]
    terms = [
        Panel(term.reconstruct(state), title, f"{term.bits(state) / w.numel():.2f} bits per weight")
        for term, state, title in zip(part.parts, task.state, titles, strict=True)
    ]
    size, distance = part.bits(task.state) / w.numel(), task.gap()
    below = f"{size:.2f} bits per weight in all, at a distance of {100 * distance:.2f} % from W"
    return [Panel(w, "W", "32 bits per weight"), *terms], below


# ------------------------------------------------------------------ figure


def draw(panels: list[Panel], below: str, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "parts", "svg.fonttype": "path", "font.size": 11}
    from matplotlib import pyplot as plt

    limit = float(torch.quantile(panels[0].matrix.abs().flatten(), 0.995))
    figure, axes = plt.subplots(1, len(panels), figsize=(9.6, 2.95), facecolor="white")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.19, top=0.89, wspace=0.22)
    for axis, panel in zip(axes, panels, strict=True):
        axis.imshow(panel.matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(panel.title, fontsize=13, pad=5)
        axis.set_xlabel(panel.caption, labelpad=5)
        for spine in axis.spines.values():
            spine.set(color="0.6", linewidth=0.6)
    for axis, sign in zip(axes[1:], ["≈", "+", "+"], strict=True):
        axis.text(-0.11, 0.5, sign, transform=axis.transAxes, ha="center", va="center", fontsize=22)
    figure.text(0.63, 0.035, below, ha="center", va="center", color="0.35")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "parts.svg", metadata={"Date": None})
    figure.savefig(folder / "parts.png", dpi=150)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of the figures")
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    options = parser.parse_args(argv)
    config = Config(reference_steps=20, steps=2, length=5) if options.smoke else Config()
    draw(*learn(config), options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
