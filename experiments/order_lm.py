"""Does pruning before quantization beat the other order in a language model? One shot, no training.

The 15 M-parameter model of TinyStories (llama2.c), perplexity on windows of the validation text.
Pruned and quantized are the 42 matrices of the blocks; the embedding, which is also the head, stays
float32. Two settings: weights only, and weights and activations, where every quantized matrix gets
its inputs in the same format. For each pruning and format: dense, S, Q, S→Q and Q→S, the
orthogonality threshold EM(S) + EM(Q) − EM(dense) and the excess over it, with 95 % t
intervals over the windows, which all settings share. `order_lm_tuned.py` fine-tunes first.

Run:      python experiments/order_lm.py --weights DIR --data DIR [--windows 8]
          --weights: folder of stories15M_fp16.npz.   --data: folder of valid_tokens.npz.
          --all-windows checks the reference perplexity, 2.7631 (a minute) and does nothing else.
Results:  experiments/results/order_lm.json, with command, hardware and wall time; .png and .svg.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import origin, write
from order_figure import excesses
from order_grid import (
    FORMATS,
    PRUNERS,
    SETTINGS,
    Hook,
    Weights,
    compressed,
    copies,
    pruned,
    quantized,
    token_inputs,
)
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lc_compress import number_format
from lc_compress.interplay import Orthogonality, orthogonality

RESULTS = Path(__file__).parent / "results"
CONTEXT, HEADS, EPS, BASE = 256, 6, 1e-5, 10_000.0
REFERENCE = 2.7631  # perplexity on all windows


# ------------------------------------------------------------------ model


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.weight


class Block(nn.Module):
    """Attention with rotary positions, pairs interleaved, and a gated MLP."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.att_norm, self.ffn_norm = Norm(width), Norm(width)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        n, length, width = x.shape
        y = self.att_norm(x)
        q, k, v = (
            part(y).view(n, length, self.heads, -1).transpose(1, 2)
            for part in (self.wq, self.wk, self.wv)
        )
        y = F.scaled_dot_product_attention(turned(q, turn), turned(k, turn), v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).reshape(n, length, width))
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Each pair (2i, 2i + 1) of x (n, heads, length, size) turned by the angle of its place.

    turn: (places, size / 2, 2), cosines and sines.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    angles = torch.view_as_complex(turn[: x.shape[2]].float().contiguous())
    return torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)


class Llama(nn.Module):
    """Logits (n, length, words) of tokens (n, length)."""

    turn: Tensor

    def __init__(self, words: int, width: int, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.layers = nn.ModuleList([Block(width, hidden, heads) for _ in range(layers)])
        self.norm = Norm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight
        size = width // heads
        angle = torch.outer(torch.arange(CONTEXT), BASE ** (-torch.arange(0, size, 2) / size))
        turn = torch.stack((angle.cos(), angle.sin()), dim=-1)
        self.register_buffer("turn", turn, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x, self.turn)
        return self.head(self.norm(x))


def tiny() -> Llama:
    torch.manual_seed(0)
    model = Llama(words=64, width=32, hidden=64, layers=2, heads=2).eval()
    nn.init.normal_(model.words.weight, std=0.2)
    return model


def pretrained(folder: Path) -> Llama:
    path = folder / "stories15M_fp16.npz"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: give --weights the folder of the language model.")
    arrays = {name: torch.from_numpy(x).float() for name, x in np.load(path).items()}
    words, width = arrays["tok_emb"].shape
    layers, hidden, _ = arrays["w1"].shape
    model = Llama(words, width, hidden, layers, HEADS)
    state = {"words.weight": arrays["tok_emb"], "head.weight": arrays["tok_emb"]}
    state["norm.weight"] = arrays["norm"]
    for name in ("att_norm", "ffn_norm", "wq", "wk", "wv", "wo", "w1", "w2", "w3"):
        state |= {f"layers.{i}.{name}.weight": x for i, x in enumerate(arrays[name])}
    model.load_state_dict(state)
    return model.eval()


def matrices(model: Llama) -> dict[str, nn.Linear]:
    """The layers that are compressed."""
    named = model.layers.named_modules()
    return {name: layer for name, layer in named if isinstance(layer, nn.Linear)}


# ------------------------------------------------------------------ data and metric


def windows(folder: Path) -> Tensor:
    """Consecutive windows (n, 257) of the validation tokens: 256 inputs and what follows each."""
    path = folder / "valid_tokens.npz"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: give --data the folder of the token files.")
    tokens = torch.from_numpy(np.load(path)["tokens"].astype(np.int64))
    return tokens.unfold(0, CONTEXT + 1, CONTEXT)


@torch.no_grad()
def losses(model: Llama, data: Tensor) -> list[float]:
    """Mean loss of each window."""
    return [float(F.cross_entropy(model(x[None, :-1])[0], x[1:])) for x in data]


def check(model: Llama, data: Tensor) -> None:
    found = float(np.exp(np.mean(losses(model, data))))
    print(f"perplexity of {len(data)} windows: {found:.4f} (reference {REFERENCE})")


# ------------------------------------------------------------------ arms


def run(model: Llama, data: Tensor, quiet: bool) -> dict[str, Any]:
    layers = matrices(model)
    dense = copies(layers)
    sparse = {
        name: {n: pruned(w, part) for n, w in dense.items()} for name, part in PRUNERS.items()
    }
    total = 1 + len(PRUNERS) + 2 * len(FORMATS) * (1 + 2 * len(PRUNERS))
    bar = tqdm(total=total, disable=quiet, file=sys.stderr)

    def measured(weights: Weights, hook: Hook | None) -> list[float]:
        with compressed(layers, weights, hook):
            found = losses(model, data)
        bar.update()
        return found

    base = measured(dense, None)
    alone = {name: measured(weights, None) for name, weights in sparse.items()}
    cells = []
    for name in FORMATS:
        form = number_format(name)
        codes = {n: quantized(w, form) for n, w in dense.items()}
        both = {
            pruning: {
                "S→Q": {n: quantized(w, form) for n, w in weights.items()},
                "Q→S": {n: pruned(w, PRUNERS[pruning]) for n, w in codes.items()},
            }
            for pruning, weights in sparse.items()
        }
        for setting in SETTINGS:
            hook = None if setting == "weights" else token_inputs(form)
            q = measured(codes, hook)
            for pruning, orders in both.items():
                combined = {order: measured(w, hook) for order, w in orders.items()}
                result = orthogonality(
                    "perplexity",
                    dense=base,
                    parts={"S": alone[pruning], "Q": q},
                    combined=combined,
                    higher_is_better=False,
                    transform=np.exp,
                )
                plan = {"setting": setting, "format": name, "pruning": pruning}
                cells.append(
                    plan
                    | {"losses": {"S": alone[pruning], "Q": q} | combined}
                    | {"orthogonality": result}
                )
    bar.close()
    return {"windows": len(data), "dense_losses": base, "cells": cells}


# ------------------------------------------------------------------ results


def table(cells: list[dict[str, Any]]) -> str:
    head = ["setting", "format", "pruning", "dense", "S", "Q", "S→Q", "Q→S", "threshold"]
    head += ["S→Q is", "Q→S is", "Q→S − S→Q", "order"]
    lines = [head]
    for cell in cells:
        x: Orthogonality = cell["orthogonality"]
        order = x.differences[0]
        metrics = (x.dense, x.parts["S"], x.parts["Q"], *(c.metric for c in x.combined))
        verdict = "noise" if order.noise else ("S→Q" if order.difference.value > 0 else "Q→S")
        lines.append(
            [cell["setting"], cell["format"], cell["pruning"]]
            + [f"{value:.3f}" for value in (*metrics, x.threshold)]
            + [c.verdict for c in x.combined]
            + [str(order.difference), verdict]
        )
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(line, sizes, strict=True)).rstrip()
        for line in lines
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=Path("data/stories15m"))
    parser.add_argument("--data", type=Path, default=Path("data/tinystories"))
    parser.add_argument("--windows", type=int, default=8, help="evenly spread over the text")
    parser.add_argument("--all-windows", action="store_true", help="check the reference and stop")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, in seconds")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    source, started = origin(__file__), time.perf_counter()
    if options.smoke:
        model, data = (
            tiny(),
            torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0)),
        )
    else:
        model, data = pretrained(options.weights), windows(options.data)
    if options.all_windows:
        check(model, data)
        return
    if not options.smoke:
        data = data[torch.linspace(0, len(data) - 1, options.windows).round().long()]
    result = run(model, data, options.quiet)
    cells = result["cells"]
    print(table(cells))
    stem = (options.out or RESULTS) / f"order_lm{'_smoke' if options.smoke else ''}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    result["cells"] = [c | {"orthogonality": c["orthogonality"].dicts()} for c in cells]
    excesses(result["cells"], stem, "perplexity", 0.02)
    result["wall_seconds"] = time.perf_counter() - started
    result["cpu_seconds"] = time.process_time()  # of one core, however busy the machine is
    smoke = " --smoke" if options.smoke else f" --windows {options.windows}"
    command = f"python experiments/order_lm.py --weights DIR --data DIR{smoke}"
    config = {"windows": len(data), "smoke": options.smoke}
    content = {"command": command, "config": config, "result": result, **source}
    write(stem.with_suffix(".json"), content)


if __name__ == "__main__":
    main(sys.argv[1:])
