"""What the packed file of a model weighs, how fast it loads, and how much memory it takes.

Sizes: ResNet20 as 1 bit + s floats per layer, everything else in half precision, the whole file
against all floats of the state dict at 32 bits; floats of 16 bits without entropy coding, bfloat16
with it. Beside it the entropy bound: signs at their entropy, positions at log2 of the number of
supports, the upper bits of the floats at their entropy within the layer and the lower ones as they
are, uncompressed tensors and the header as stored.
Loading: linear layers of 28 million weights, from the warm file cache into the dense weights of a
model, against reading the dense float32 file into memory that the process did not have before,
`open(...).read()`, as any program does that reads a file; wall time with PyTorch's threads, the
best of some repeats in turn, the median over three processes. Beside it the two ways that only
copy: into memory that is there already (`readinto`), and safetensors' `load_file` with
`load_state_dict`. For low rank the product of the factors alone is there too: no reader can do
without it.
Memory: of saving and loading, the peak beyond what the process held, in layers; freed arrays are
given back to the system at once (a fixed threshold of `malloc`), so that is what was in use.

Run:      python experiments/packed_files.py [--weights FILE]     (resnet20-12fca82f.th)
Results:  experiments/results/packed_files.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_c_step import forget_peak, memory
from common import origin, write
from networks import ResNet
from safetensors.torch import load_file
from torch import Tensor, nn

from lc_compress import LC, Binary, Int, KMeans, LowRank, Part, Sparse, Ternary, constant
from lc_compress.storage import inspect, load, save, to_dense, verify

RESULTS = Path(__file__).parent / "results" / "packed_files.json"
TARGETS = {  # density: without and with entropy coding
    0.01: (22.1, 23.4),
    0.02: (19.0, 21.1),
    0.03: (16.8, 19.4),
    0.05: (13.7, 16.5),
}
LOADED: dict[str, Part[Any]] = {
    "Binary": Binary(),
    "Binary + Sparse 1 %": Binary() + Sparse(density=0.01, value_dtype=torch.float16),
    "Binary + Sparse 2 %": Binary() + Sparse(density=0.02, value_dtype=torch.float16),
    "Binary + Sparse 5 %": Binary() + Sparse(density=0.05, value_dtype=torch.float16),
    "Ternary": Ternary(),
    "KMeans 4": KMeans(4),
    "KMeans 2": KMeans(2),
    "KMeans 16": KMeans(16),
    "Int 4 per channel": Int(4, axis=0),
    "Int 8 per channel": Int(8, axis=0, scale="max"),
    "LowRank n/16": LowRank(96),
    "LowRank n/16 + Sparse 5 %": LowRank(96) + Sparse(density=0.05, value_dtype=torch.float16),
    "KMeans 4 + Sparse 2 %": KMeans(4) + Sparse(density=0.02, value_dtype=torch.float16),
    "Sparse 5 %": Sparse(density=0.05, value_dtype=torch.float16),
    "Sparse 10 %": Sparse(density=0.1, value_dtype=torch.float16),
    "Sparse 10 %, then Int 4": Sparse(density=0.1).then(Int(4)),
}
LIMIT = 4  # times as long as reading the dense file


# ------------------------------------------------------------------ sizes


def network(weights: str | None) -> nn.Module:
    torch.manual_seed(0)
    model = ResNet(20)
    if weights:
        state = torch.load(weights, weights_only=True, map_location="cpu")["state_dict"]
        known = {name.removeprefix("module."): x for name, x in state.items()}
        model.load_state_dict(known, strict=False)  # without the batch counts of BatchNorm
    return model


def sizes(weights: str | None, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for density, targets in TARGETS.items():
        for entropy, dtype in ((False, torch.float16), (True, torch.bfloat16)):
            model = network(weights)
            part = Binary(value_dtype=dtype) + Sparse(density=density, value_dtype=dtype)
            tasks = {"*conv*.weight": part, "linear.weight": part}
            lc = LC(model, tasks, schedule=constant(1.0, 1))
            lc.finalize(calibration=None)
            path = folder / "resnet20.lc"
            save(lc, path, uncompressed=torch.float16, entropy=entropy)
            verify(path)
            check_loaded(path, model)
            report = inspect(path)
            floats = sum(x.numel() for x in model.state_dict().values() if x.is_floating_point())
            bound = bound_bytes(lc) if entropy else 0.0
            kept = report.uncompressed.bytes + report.header.bytes
            rows.append(
                {
                    "density": density,
                    "entropy_coded": entropy,
                    "bytes": report.total.bytes,
                    "ratio": 4 * floats / report.total.bytes,
                    "target": targets[entropy],
                    "header_share": report.header.bytes / report.total.bytes,
                    "task_bytes": sum(row.bytes for row in report.rows),
                    **(
                        {"bound_bytes": bound, "bound_ratio": 4 * floats / (bound + kept)}
                        if entropy
                        else {}
                    ),
                }
            )
            print(
                f"{density:.0%} {'entropy' if entropy else 'plain':8}{rows[-1]['bytes']:7} bytes, "
                f"ratio {rows[-1]['ratio']:.2f} (target {targets[entropy]}), header "
                f"{rows[-1]['header_share']:.2%}"
                + (f", bound {rows[-1]['bound_ratio']:.2f}" if entropy else "")
            )
    return rows


def check_loaded(path: Path, model: nn.Module) -> None:
    again = load(path, ResNet(20)).state_dict()
    for name, x in model.state_dict().items():
        if x.dim() > 1 and not torch.equal(x, again[name]):
            raise AssertionError(f"{name} was not read back")


def bound_bytes(lc: LC) -> float:
    """The entropy of all compressed tasks, the scales as they are."""
    bits = 0.0
    for task in lc.tasks:
        binary, sparse = task.state
        bits += entropy_of(binary.positive) + 16
        n, k = binary.positive.numel(), sparse.positions.numel()
        bits += (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
        bits += bound_of_values(sparse.values.bfloat16().view(torch.int16).int())
    return bits / 8


def bound_of_values(x: Tensor) -> float:
    """Upper bits at their entropy and lower bits as they are, split where a table of a byte a
    symbol would pay; the table is not counted.
    """
    splits = []
    for r in range(16):
        bits = entropy_of(x >> r) + r * x.numel()
        splits.append((bits + 8 * torch.unique(x >> r).numel(), bits))
    return min(splits)[1]


def entropy_of(x: Tensor) -> float:
    """Bits of all entries at the frequencies they have."""
    counts = torch.unique(x, return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum())


# ------------------------------------------------------------------ loading


class Stack(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))


def stack(layers: int, width: int) -> Stack:
    torch.manual_seed(0)
    return Stack(layers, width)


def written(part: Part[Any], model: Stack, path: Path) -> LC:
    lc = LC(model, {"layers.*.weight": part}, schedule=constant(1.0, 1))
    lc.finalize()
    save(lc, path)
    return lc


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def stored(name: str, layers: int, width: int, folder: Path) -> None:
    """The packed file and the dense one of a stack."""
    written(LOADED[name], stack(layers, width), folder / "stack.lc")
    to_dense(folder / "stack.lc", folder / "stack.safetensors")


def timed(name: str, layers: int, width: int, repeats: int, folder: Path) -> dict[str, float]:
    """Nanoseconds a weight of one process."""
    path, dense = folder / "stack.lc", folder / "stack.safetensors"
    target = stack(layers, width)
    memory = memoryview(bytearray(dense.stat().st_size))

    def read() -> None:
        with open(dense, "rb") as file:
            file.read()

    def read_again() -> None:
        with open(dense, "rb", buffering=0) as file:
            done = 0
            while done < len(memory):
                done += file.readinto(memory[done:])

    ways: dict[str, Callable[[], object]] = {
        "read": read,
        "read_again": read_again,
        "load_file": lambda: target.load_state_dict(load_file(dense)),
        "load": lambda: load(path, target),
    }
    if "LowRank" in name:
        rank = 96 * width // 1536
        factors = torch.randn(width, rank), torch.randn(rank, width)
        product = torch.empty(width, width)
        ways["products"] = lambda: [torch.mm(*factors, out=product) for _ in range(layers)]
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3 * repeats):  # in turn, for what else the machine does
        for way, call in ways.items():
            times[way].append(seconds(call))
    return {way: 1e9 * min(x) / (layers * width * width) for way, x in times.items()}


def loading(name: str, layers: int, width: int, repeats: int, folder: Path) -> dict[str, Any]:
    shape = [layers, width]
    apart(["stored", name, *shape, str(folder)])
    processes = 3 if repeats > 1 else 1
    job = ["timed", name, *shape, repeats, str(folder)]
    runs = [apart(job, threads=0) for _ in range(processes)]
    ns = {way: statistics.median(run[way] for run in runs) for way in runs[0]}
    ratios = [run["load"] / run["read"] for run in runs]
    ratio = statistics.median(ratios)
    print(
        f"{name:28}{ratio:6.2f} times reading the dense file, {ns['load'] / ns['read_again']:.2f} "
        "times copying it; ns a weight: " + ", ".join(f"{way} {x:.2f}" for way, x in ns.items())
    )
    return {
        "part": name,
        "dense_bytes": (folder / "stack.safetensors").stat().st_size,
        "bytes": (folder / "stack.lc").stat().st_size,
        "nanoseconds_per_weight": ns,
        "ratio": ratio,
        "ratios": ratios,
        "ratio_to_copying": ns["load"] / ns["read_again"],
        "at_most_4": ratio <= LIMIT,
    }


# ------------------------------------------------------------------ memory


def peaks(name: str, layers: int, width: int, folder: Path) -> dict[str, Any]:
    """Peak memory of `save` and `load` beyond what the process held before, in dense layers."""
    path = folder / "stack.lc"
    model = stack(layers, width)
    lc = written(LOADED[name], model, path)
    layer = 4 * width * width / 1e6
    found: dict[str, Any] = {"part": name, "layers": layers, "layer_megabytes": layer}
    for key, call in (
        ("save", lambda: save(lc, path)),
        ("load", lambda: load(path, model)),
    ):
        call()  # imports
        forget_peak()
        before = memory(peak=False)
        call()
        found[f"{key}_layers"] = (memory(peak=True) - before) / layer
    return found


def apart(job: list[Any], threads: int = 1) -> Any:
    """A job in a process of its own, with so many threads; 0: as many as PyTorch takes."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if not threads:
        del environment["OMP_NUM_THREADS"]
    if job[0] == "peaks":
        environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 18)  # glibc would raise it by itself
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    *lines, last = done.stdout.splitlines()
    if lines:
        print("\n".join(lines))
    return json.loads(last)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", help="file of the pretrained ResNet20; without: random ones")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="seconds; the sizes mean nothing")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    layers, width, repeats = (3, 64, 1) if options.smoke else (12, 1536, 3)
    if options.job:
        kind, name, *shape, folder = options.job
        call: Callable[..., Any] = {"stored": stored, "timed": timed, "peaks": peaks}[kind]
        print(json.dumps(call(name, *shape, Path(folder))))
        return
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = sizes(options.weights, folder)
        chosen = list(LOADED)[:1] if options.smoke else list(LOADED)
        loaded = [loading(x, layers, width, repeats, folder) for x in chosen]
        held = [apart(["peaks", x, layers, width, name]) for x in chosen]
    for row in held:
        print(
            f"{row['part']:28}save {row['save_layers']:.2f}, load {row['load_layers']:.2f} layers"
        )
    content = {
        "command": "python experiments/packed_files.py --weights FILE",
        "config": {"layers": layers, "width": width, "repeats": repeats, "smoke": options.smoke},
        "result": {"sizes": found, "loading": loaded, "memory": held},
        **origin(__file__),
        "wall_seconds": time.perf_counter() - begin,
    }
    write(options.out, content)


if __name__ == "__main__":
    main()
