"""How fast layers with packed weights are against dense ones, and how much memory they take.

Speed: one thread, processor time, the least of many calls, dense and packed ones in turns in the
same process, in inference mode. Square linear layers at batch 1 and 128, and a 3×3 convolution.
Under "never" each forward unpacks the weight, tile by tile; under "on_first_use" it was unpacked
before, to the dense weight or, for low-rank and sparse terms only, to factors and sparse rows.
A ratio is the time of the packed layer over that of the dense float32 one: above 1 it is slower.

Memory: a stack of linear layers of 100 million weights, saved to a file. Another process loads it
with materialize="never" and runs one input; its resident size is read by this process, before the
load and after the forward. It has run such a stack of tiny layers before, so that the code of torch
is in memory ("cold": without that).

Run:      python experiments/bench_modules.py [--smoke]
Results:  experiments/results/bench_modules.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import origin, write
from torch import Tensor, nn

from lc_compress import Binary, KMeans, LowRank, Matrix, Part, Sparse, Ternary
from lc_compress.modules import compress_module, replace_modules
from lc_compress.modules.term import TILE
from lc_compress.storage import load, save

RESULTS = Path(__file__).parent / "results" / "bench_modules.json"
POLICIES = ("never", "on_first_use")
HALF = torch.float16
STACKS: dict[str, tuple[Part[Any], int, int]] = {  # part, layers, side
    "Binary + Sparse 1 %": (Binary() + Sparse(density=0.01, value_dtype=HALF), 24, 2048),
    "Binary + Sparse 1 %, 4096": (Binary() + Sparse(density=0.01, value_dtype=HALF), 6, 4096),
    "Ternary per row": (Ternary(axis=0), 24, 2048),
    "KMeans 8": (KMeans(8), 24, 2048),
    "LowRank 64 + Sparse 2 %": (
        LowRank(64, value_dtype=HALF) + Sparse(density=0.02, value_dtype=HALF),
        24,
        2048,
    ),
}

# ------------------------------------------------------------------ speed


def schemes(rank: int) -> dict[str, list[Part[Any]]]:
    """The terms, each solved on what the ones before it leave: speed depends on sizes only."""
    low_rank, sparse = LowRank(rank).over(Matrix()), Sparse(density=0.05)
    return {
        "low-rank n/16": [low_rank],
        "low-rank n/16 + sparse 5 %": [low_rank, sparse],
        "binary": [Binary()],
        "binary + sparse 5 %": [Binary(), sparse],
    }


def greedy(terms: list[Part[Any]], w: Tensor) -> tuple[Part[Any], Any]:
    states = []
    for term in terms:
        states.append(term.project(w))
        w = w - term.reconstruct(states[-1])
    if len(terms) == 1:
        return terms[0], states[0]
    return terms[0] + terms[1], tuple(states)


def in_turns(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The least processor time of each, in milliseconds."""
    best = dict.fromkeys(functions, float("inf"))
    for f in functions.values():
        f()
        f()
    end = time.process_time() + seconds * len(functions)
    rounds = 0
    while rounds < 5 or time.process_time() < end:
        for name, f in functions.items():
            calls = max(1, round(5e-4 / best[name])) if rounds else 1  # a few: the first is cold
            for _ in range(min(calls, 10)):
                start = time.process_time()
                f()
                best[name] = min(best[name], time.process_time() - start)
        rounds += 1
    return {name: 1e3 * value for name, value in best.items()}


def speed(config: argparse.Namespace) -> list[dict[str, Any]]:
    plain: list[tuple[str, nn.Module, list[Tensor]]] = []
    for n in config.sides:
        inputs = [torch.randn(batch, n) for batch in config.batches]
        plain.append((f"linear {n}", nn.Linear(n, n), inputs))
    c = config.channels
    inputs = [torch.randn(batch, c, 14, 14) for batch in config.batches]
    plain.append((f"conv 3x3 {c}", nn.Conv2d(c, c, 3, padding=1), inputs))
    rows = []
    for layer, module, inputs in plain:
        for name, terms in schemes(module.weight.shape[0] // 16).items():
            part, state = greedy(terms, module.weight.detach())
            packed = {p: compress_module(module, part, state, p) for p in POLICIES}
            for x in inputs:
                functions = {"dense": lambda m=module, x=x: m(x)}
                functions |= {p: lambda m=m, x=x: m(x) for p, m in packed.items()}
                with torch.inference_mode():
                    times = in_turns(functions, config.seconds)
                form = type(packed["on_first_use"].packed.ready).__name__.lower()
                row = {"layer": layer, "scheme": name, "batch": len(x), "form": form}
                row |= {f"{p}_ms": t for p, t in times.items()}
                row |= {f"{p}_ratio": times[p] / times["dense"] for p in POLICIES}
                rows.append(row)
                marks = [
                    f"{p} {row[f'{p}_ratio']:6.2f}{' slower' if row[f'{p}_ratio'] > 1 else '':7}"
                    for p in POLICIES
                ]
                print(
                    f"{layer:14}{name:28}batch {len(x):4}  dense {times['dense']:8.3f} ms  "
                    + "  ".join(marks)
                    + f" ({form})",
                    flush=True,
                )
    return rows


# ------------------------------------------------------------------ memory


def stack(layers: int, side: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(layers)])


def save_stack(part: Part[Any], layers: int, side: int, path: Path) -> None:
    """A stack whose layers are compressed one after the other."""
    with torch.device("meta"):
        model = stack(layers, side)
    for i in range(layers):
        generator = torch.Generator().manual_seed(i)
        w = torch.randn(side, side, generator=generator) / side**0.5
        terms = list(getattr(part, "parts", [part]))
        replace_modules(model, {f"{i}.weight": (part, greedy(terms, w)[1])})
    save(model, path)


def child(file: Path, tiny: Path | None, layers: int, side: int) -> None:
    """Load and run, with a stop before and after."""
    if tiny is not None:
        run(tiny, 2, 64)
    print("before", flush=True)
    sys.stdin.readline()
    model = run(file, layers, side)
    print("after", flush=True)
    sys.stdin.readline()
    del model


def run(file: Path, layers: int, side: int) -> nn.Module:
    with torch.device("meta"):
        model = stack(layers, side)
    load(file, model, materialize="never")
    with torch.inference_mode():
        model(torch.zeros(1, side))
    return model


def resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no resident size of process {pid}")


def growth(file: Path, tiny: Path | None, layers: int, side: int) -> int:
    """By how much the resident size of a process grows, in bytes."""
    command = [sys.executable, __file__, "--child", str(file), str(tiny or ""), str(layers)]
    with subprocess.Popen(
        [*command, str(side)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        sizes = []
        for expected in ("before", "after"):
            if process.stdout.readline().strip() != expected:
                raise RuntimeError("the other process failed")
            sizes.append(resident(process.pid))
            process.stdin.write("\n")
            process.stdin.flush()
    return sizes[1] - sizes[0]


def memory(config: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for name, (part, layers, side) in list(STACKS.items())[: 1 if config.smoke else None]:
        if config.smoke:
            layers, side = 2, 128
        file, tiny = folder / "stack.lc", folder / "tiny.lc"
        save_stack(part, layers, side, file)
        save_stack(part, 2, 64, tiny)
        size = file.stat().st_size
        limit = 1.3 * size + 4 * TILE + 4 * 2**20
        grown = [growth(file, tiny, layers, side) for _ in range(config.repeats)]
        row = {
            "scheme": name,
            "layers": layers,
            "side": side,
            "file_bytes": size,
            "grown_bytes": grown,
            "grown_cold_bytes": growth(file, None, layers, side),
            "limit_bytes": limit,
        }
        rows.append(row)
        print(
            f"{name:28}{layers}x{side}²  file {size / 1e6:6.2f} MB  grown "
            f"{min(grown) / 1e6:.2f} to {max(grown) / 1e6:.2f} MB (cold "
            f"{row['grown_cold_bytes'] / 1e6:.2f})  limit {limit / 1e6:.2f} MB  "
            f"{'within' if max(grown) <= limit else 'ABOVE'}",
            flush=True,
        )
    return rows


# ------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of packed layers.")
    parser.add_argument("--smoke", action="store_true", help="seconds, on tiny layers")
    parser.add_argument("--seconds", type=float, default=1.0, help="per layer and batch")
    parser.add_argument("--repeats", type=int, default=5, help="processes per stack")
    parser.add_argument("--only", choices=("speed", "memory"), help="one of the two")
    parser.add_argument("--out", type=Path, default=RESULTS)
    config = parser.parse_args(argv)
    config.sides, config.batches, config.channels = [1024, 2048], [1, 128], 256
    if config.smoke:
        config.sides, config.channels, config.seconds, config.repeats = [64], 16, 0.0, 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {}
    if config.only != "memory":
        result["speed"] = speed(config)
    if config.only != "speed":
        with tempfile.TemporaryDirectory() as folder:
            result["memory"] = memory(config, Path(folder))
    content = {
        "command": " ".join(["python experiments/bench_modules.py", *(argv or sys.argv[1:])]),
        "config": {k: v for k, v in vars(config).items() if k != "out"},
        "result": result,
        **origin(__file__),
    }
    write(config.out, content)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        torch.set_num_threads(1)
        given, warm, count, width = sys.argv[2:]
        child(Path(given), Path(warm) if warm else None, int(count), int(width))
    else:
        main()
