"""Every C step against the clock, an optimum found by other means, and the peers' engines.

Inputs: (a) 512×512×3×3 weights N(0, 0.05); (b) all layers of real networks (with --data); (c)
near-binary weights, as late in an LC run. A time is the wall clock of `part.project(w)`, checks
included, the best of interleaved repeats: cold without a state, warm after w moved, from the cold
state. Units of the same process: S = `numpy.sort` of the weights, RW = reading and writing them
once, G = one product W Wᵀ (Wᵀ W for tall ones). Memory is the peak of the first projection beyond
what the process held, results included.

Low-rank rows see a tensor as a matrix, of the outputs by the rest. Each row runs in a process of
its own, which --limit stops; OMP_NUM_THREADS and the like, which numpy's BLAS reads when it loads,
are set where it is started. Peers run on (a) and (c). The C step of a network is `project` on each
of its layers, beside a compiled training step.

Run:      python experiments/bench_c_step.py [--data DIR] [--rows "Binary, KMeans 16"] [--quiet]
          DIR: a folder with resnet_cifar10/*.th and stories15m/*.npz.
Results:  bench_c_step.json, .png and .svg in experiments/results or where --out says;
          bench_c_step_part.* with --rows. Written when all is done.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest import mock

import bench_peers
import numpy as np
import torch
from bench_peers import DENSITY, LEAST, LISTED, LISTED_COLUMNS, LISTED_SOURCE, RANK
from bench_report import check_matplotlib, draw, judged, tables
from common import option, origin, write
from networks import ResNet
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lc_compress import LC, Binary, Int, KMeans, LowRank, Part, Sparse, Sum, Ternary, constant
from lc_compress.joint import low_rank_sparse
from lc_compress.part import squared_error

RESULTS = Path(__file__).parent / "results"
THREADS = ("OMP", "OPENBLAS", "MKL", "VECLIB", "NUMEXPR")  # …_NUM_THREADS
Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Config:
    data: str = ""  # folder of the real networks; without: input (b) is skipped
    rows: str = ""  # names of solvers and networks, separated by commas; all if empty
    inputs: str = "abc"
    repeats: int = 15  # rounds of a process: every call once, interleaved
    seconds: float = 20.0  # a call that took as long in all is not repeated
    limit: float = 600.0  # seconds after which a solver or peer is stopped
    all_threads: bool = True  # after one thread, as many as there are cores
    peers: bool = True
    batch: int = 128  # of the training step
    vectors: int = 200  # weighted ones on which k-means is compared with the plain programme
    out: str = ""  # folder
    figure: bool = True
    quiet: bool = False  # no progress on stderr
    smoke: bool = False


SMOKE = Config(repeats=2, seconds=1.0, all_threads=False, batch=4, vectors=6, smoke=True)
SMOKE_PROCESS = ("a", "scipy.linalg.svd")  # a process of its own in the smoke run too


# ------------------------------------------------------------------ solvers and their targets


@dataclass(frozen=True)
class Row:
    """A solver, and what it must show on (a) with one thread."""

    part: Part[Any]
    cold: float | None  # most time of a cold call, in the unit; None: reported
    unit: str = "S"
    warm: float | None = None  # the same for a warm call
    excess: float = 1e-9  # most relative excess over the least error
    below: float | None = None  # where no least error is known: most error
    reach: float | None = None  # the time is that to an error of this


BINARY, SPARSE = Binary(), Sparse(density=DENSITY)
LOW_RANK = LowRank(RANK)
ROWS = {
    "Binary": Row(BINARY, 1),
    "Ternary": Row(Ternary(), 4),
    "KMeans 2": Row(KMeans(2), 4),
    "KMeans 4": Row(KMeans(4), 5),
    "KMeans 16": Row(KMeans(16), 10, warm=3),
    "Sparse 5 %": Row(SPARSE, 1.5),
    "Int 4 per channel": Row(Int(4, axis=0), 10, excess=1e-6),
    "Binary + Sparse 5 %": Row(BINARY + SPARSE, 4),
    "LowRank 32": Row(LOW_RANK, 2, "G", excess=1e-6),
    "LowRank 32 + Sparse 5 %": Row(LOW_RANK + SPARSE, 30, "G", below=3673.8, reach=3676.65),
    "Binary + LowRank 32 + Sparse 5 %": Row(BINARY + LOW_RANK + SPARSE, None, "G"),
}
THREE = "Binary + LowRank 32 + Sparse 5 %"
NETWORK_PART = Binary() + Sparse(density=0.02)
NETWORKS = {"ResNet20": 20, "ResNet56": 56}


# ------------------------------------------------------------------ inputs

Pair = tuple[Tensor, Tensor]  # w, and w a little later


def weights(job: dict[str, Any], config: Config) -> list[Pair]:
    """The tensors of a job's input; for low rank as matrices, of the outputs by the rest."""
    pairs = tensors(job["input"], config)
    if "LowRank" in job["row"]:
        return [(w.flatten(1), later.flatten(1)) for w, later in pairs]
    return pairs


def tensors(name: str, config: Config) -> list[Pair]:
    """The tensors of an input. Real layers move by 4 % of their spread, as (a) does."""
    rng = np.random.default_rng(0)
    if name == "a":
        shape = (36, 4, 3, 3) if config.smoke else (512, 512, 3, 3)
        return [moved(rng.normal(0, 0.05, shape), 0.002)]
    if name == "c":  # papers/learning-compression.md, section 4.7
        shape = (36, 40) if config.smoke else (500, 400)
        level = 0.05 * rng.choice([-1, 1], shape) * (rng.random(shape) > 0.08)
        return [moved(level + rng.normal(0, 0.005, shape), 0.002)]
    return [moved(w, 0.04 * float(w.std())) for w in layers(name, Path(config.data))]


def moved(w: np.ndarray[Any, Any], by: float) -> Pair:
    first = torch.from_numpy(w.astype(np.float32))
    step = np.random.default_rng(1).normal(0, by, w.shape).astype(np.float32)
    return first, first + torch.from_numpy(step)


def layers(name: str, folder: Path) -> Iterator[np.ndarray[Any, Any]]:
    """Every weight with two axes or more, in float32."""
    for path in sorted(folder.glob(FILES[name])):
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                for key in arrays.files:
                    x = arrays[key].astype(np.float32)  # stacked over the layers, the embedding not
                    yield from (x if x.ndim == 3 else [x] if key == "tok_emb" else [])
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
            yield from (x.float().numpy() for x in state.values() if x.dim() >= 2)


FILES = {"b, ResNets": "resnet_cifar10/*.th", "b, stories15M": "stories15m/*.npz"}


def inputs(config: Config) -> tuple[list[str], list[str]]:
    """Names of the inputs that are there, and a line for each that is not."""
    found = [name for name in ("a", "c") if name in config.inputs]
    missing = []
    for name, pattern in FILES.items():
        if "b" not in config.inputs:
            continue
        if config.data and any(Path(config.data).glob(pattern)):
            found.append(name)
        else:
            missing.append(f"Input ({name}) skipped: give --data a folder with {pattern}.")
    return found, missing


# ------------------------------------------------------------------ measuring


def rounds(
    calls: dict[str, Callable[[], Any]], config: Config, samples: dict[str, list[float]]
) -> None:
    """Time every call once in each round; those that took long enough in all sit out."""
    for _ in range(config.repeats):
        for name, call in calls.items():
            if sum(samples.setdefault(name, [])) < config.seconds:
                begin = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - begin)


def yardsticks(tensors: list[Tensor], product: bool) -> dict[str, Callable[[], Any]]:
    arrays = [w.reshape(-1).numpy() for w in tensors]
    targets = [np.empty_like(x) for x in arrays]
    matrices = [m if m.shape[0] <= m.shape[1] else m.T for m in (w.flatten(1) for w in tensors)]
    units: dict[str, Callable[[], Any]] = {
        "S": lambda: [np.sort(x) for x in arrays],
        "RW": lambda: [np.copyto(y, x) for x, y in zip(arrays, targets, strict=True)],
    }
    return units | ({"G": lambda: [m @ m.T for m in matrices]} if product else {})


def best(samples: dict[str, list[float]]) -> dict[str, float]:
    return {f"{name}_seconds": min(x) for name, x in samples.items()}


def memory(peak: bool) -> float:
    """Megabytes in memory now, or at most since `forget_peak`."""
    try:
        name = "VmHWM:" if peak else "VmRSS:"
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith(name)).split()[1]) * 1024 / 1e6
    except OSError:  # not Linux: only the peak since the start is known
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def forget_peak() -> None:
    if sys.platform == "linux":
        import ctypes

        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # freed memory would hide later peaks
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


# ------------------------------------------------------------------ jobs, each in its own process


def solver(job: dict[str, Any], config: Config, emit: Emit) -> None:
    """A part's time, memory and error on an input."""
    pairs, row = weights(job, config), ROWS[job["row"]]
    part = replace(row.part, sweeps=8) if config.smoke and stationary(row.part) else row.part
    part.project(torch.linspace(-1, 1, 4000).view(50, 80))  # imports and thread pools
    states: dict[str, list[Any]] = {}

    def cold() -> None:
        states["cold"] = [part.project(w) for w, _ in pairs]

    def warm() -> None:
        starts = zip(pairs, states["first"], strict=True)
        states["warm"] = [part.project(w, state) for (_, w), state in starts]

    units = yardsticks([w for w, _ in pairs], "LowRank" in job["row"])
    early: dict[str, list[float]] = {}
    rounds(units, replace(config, repeats=2), early)
    forget_peak()
    before = memory(peak=False)
    begin = time.perf_counter()
    cold()
    samples = {"cold": [time.perf_counter() - begin]}
    peak = memory(peak=True) - before
    states["first"] = states["cold"]
    deltas = [part.reconstruct(state) for state in states["cold"]]
    error = sum(squared_error(w, d) for (w, _), d in zip(pairs, deltas, strict=True))
    emit({"weights": sum(w.numel() for w, _ in pairs), "cold_error": error, "peak_megabytes": peak})
    emit(best(early | samples))  # in case the process is stopped
    rounds({**units, "cold": cold, "warm": warm}, config, samples)
    emit(best(samples))
    deltas = [part.reconstruct(state) for state in states["warm"]]
    emit({"warm_error": sum(squared_error(w, d) for (_, w), d in zip(pairs, deltas, strict=True))})
    if stationary(part):
        gains = [block_gain(part, w, s) for (w, _), s in zip(pairs, states["cold"], strict=True)]
        emit({"block_gain": max(gains)})
    if row.reach is not None and job["input"] == "a":
        target = 1.02 * error if config.smoke else row.reach
        emit(reached(part, pairs[0][0], target, config))


def stationary(part: Part[Any]) -> bool:
    """Whether the part is solved by block descent, which must end where no block gains."""
    return isinstance(part, Sum) and not part.exact


def block_gain(part: Sum, w: Tensor, states: tuple[Any, ...]) -> float:
    """By how much one part alone can still lower ‖w − Δ‖², relatively."""
    terms = [p.reconstruct(s) for p, s in zip(part.parts, states, strict=True)]
    error = squared_error(w, sum(terms))
    gains = [0.0]
    for i, (p, state) in enumerate(zip(part.parts, states, strict=True)):
        residual = w - sum(t for j, t in enumerate(terms) if j != i)
        delta = p.reconstruct(p.project(residual, state))
        gains.append((error - squared_error(residual, delta)) / max(error, 1e-300))
    return max(gains)


def reached(part: Sum, w: Tensor, target: float, config: Config) -> dict[str, Any]:
    """Time to an error of at most `target`: that of the solver stopped at the coarsest tolerance
    which ends there.
    """

    def attempt(tolerance: float) -> tuple[float, float]:
        limited = replace(part, tolerance=tolerance)
        with mock.patch.object(low_rank_sparse, "_FINE", tolerance):  # the joint solver's own
            begin = time.perf_counter()
            state = limited.project(w)
            seconds = time.perf_counter() - begin
        return seconds, squared_error(w, limited.reconstruct(state))

    for k in range(2, 19):
        tolerance = 10 ** (-k / 2)
        tries = [attempt(tolerance)]
        if tries[0][1] <= target:
            break
    else:
        return {"reach_error": target, "reach_seconds": None}
    while len(tries) < config.repeats and sum(x for x, _ in tries) < config.seconds:
        tries.append(attempt(tolerance))
    seconds, error = min(tries)
    return {
        "reach_error": target,
        "reach_seconds": seconds,
        "reach_tolerance": tolerance,
        "reached_error": error,
    }


def peer(job: dict[str, Any], config: Config, emit: Emit) -> None:
    """Another library's time and error on an input, cold."""
    pairs = weights(job, config)
    _, engine = bench_peers.peers(job["row"])[job["peer"]]
    engine(torch.linspace(-1, 1, 3600).view(50, 8, 3, 3))
    found: list[Callable[[], float]] = []

    def cold() -> None:
        found[:] = [engine(w) for w, _ in pairs]

    samples: dict[str, list[float]] = {}
    units = yardsticks([w for w, _ in pairs], "LowRank" in job["row"])
    rounds({**units, "cold": cold}, config, samples)
    emit({**best(samples), "cold_error": sum(error() for error in found)})


def optimum(job: dict[str, Any], config: Config, emit: Emit) -> None:
    """The least error on an input, found by other means than ours."""
    pairs, least = weights(job, config), LEAST[job["row"]]
    emit({"cold_error": sum(least(w) for w, _ in pairs)})
    emit({"warm_error": sum(least(w) for _, w in pairs)})


def order(job: dict[str, Any], config: Config, emit: Emit) -> None:
    """Plain block descent of the three parts in one order, to stationarity."""
    ((w, _),) = weights(job, config)
    part = ROWS[job["row"]].part
    begin = time.perf_counter()
    most = 8 if config.smoke else 5000
    error, sweeps = bench_peers.alternated(part.parts, job["order"], w, most)
    emit({"error": error, "sweeps": sweeps, "seconds": time.perf_counter() - begin})


def vectors(job: dict[str, Any], config: Config, emit: Emit) -> None:
    """KMeans with importance against the plain programme, on small vectors of several modes."""
    worst = {}
    for k in (2, 4, 16):
        excess = []
        for seed in range(config.vectors):
            x, h = bench_peers.multimodal(seed)
            w, importance = torch.from_numpy(x), torch.from_numpy(h)
            part = KMeans(k)
            delta = part.reconstruct(part.project(w, importance=importance))
            least = bench_peers.plain_kmeans(x, h, k)
            error = squared_error(w, delta, importance)
            # fewer distinct values than k: the least error is 0
            excess.append((error - least) / (least or float((importance * w * w).sum())))
        worst[str(k)] = max(excess)
    emit({"vectors": config.vectors, "excess": worst})


def network(job: dict[str, Any], config: Config, emit: Emit) -> None:
    """The C step of all layers of a ResNet, warm, between training steps of the same network."""
    depth = job["depth"]
    torch.manual_seed(0)
    model = ResNet(depth)
    files = sorted(Path(config.data).glob(f"resnet_cifar10/resnet{depth}-*.th"))
    if config.data and files:
        state = torch.load(files[0], weights_only=True, map_location="cpu")["state_dict"]
        model.load_state_dict({name.removeprefix("module."): x for name, x in state.items()})
    model = model.to(memory_format=torch.channels_last).train()
    images = torch.randn(config.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (config.batch,))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)
    compiled = model if config.smoke else torch.compile(model)

    def train(bfloat16: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(compiled(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    layers = {name: p.detach() for name, p in model.named_parameters() if p.dim() >= 2}
    states: dict[str, Any] = {}

    def c_step() -> None:
        for name, w in layers.items():
            states[name] = NETWORK_PART.project(w, states.get(name))

    twin = ResNet(depth).to(memory_format=torch.channels_last)
    twin.load_state_dict(model.state_dict())
    whole = whole_step(twin)
    arrays = [w.reshape(-1).numpy() for w in layers.values()]
    calls = {
        "float32_step": lambda: train(bfloat16=False),
        "bfloat16_step": lambda: train(bfloat16=True),
        "c_step": c_step,
        "lc_c_step": whole.c_step,
        "S": lambda: [np.sort(x) for x in arrays],
    }
    for call in calls.values():  # compiles
        call()
        call()
    samples: dict[str, list[float]] = {}
    rounds(calls, config, samples)
    emit({"layers": len(layers), "weights": sum(x.size for x in arrays), **best(samples)})


def whole_step(model: nn.Module) -> LC:
    """`LC.c_step` of straight-through training: project all layers and show Δ(θ) in the model."""
    return LC(
        model,
        {"*conv*.weight": NETWORK_PART, "linear.weight": NETWORK_PART},
        schedule=constant(0.0, 1),
        gradient="sum",
        optimizer=torch.optim.SGD(model.parameters(), 1e-3),
    )


JOBS: dict[str, Callable[[dict[str, Any], Config, Emit], None]] = {
    "solver": solver,
    "peer": peer,
    "optimum": optimum,
    "order": order,
    "vectors": vectors,
    "network": network,
}


def cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def chosen_rows(config: Config) -> list[str]:
    return [x.strip() for x in config.rows.split(",")] if config.rows else [*ROWS, *NETWORKS]


def plan(config: Config) -> tuple[list[dict[str, Any]], list[str]]:
    """All jobs, and a line for everything that is left out."""
    names, notes = inputs(config)
    rows, networks = ([x for x in chosen_rows(config) if x in y] for y in (ROWS, NETWORKS))
    counts = [1, cores()] if config.all_threads and cores() > 1 else [1]
    jobs: list[dict[str, Any]] = []
    for threads in counts:
        for name in names:
            for row in rows:
                job = {"threads": threads, "input": name, "row": row}
                jobs.append({"kind": "solver", **job})
                if not config.peers or name not in ("a", "c"):
                    continue
                for other, (package, _) in bench_peers.peers(row).items():
                    if config.smoke and package in ("kmeans1d", "ckwrap"):
                        continue
                    if importlib.util.find_spec(package):
                        jobs.append({"kind": "peer", **job, "peer": other})
                    else:
                        notes.append(f"Peer {other} skipped: {package} is not installed.")
        chosen = dict.fromkeys(8 if config.smoke else NETWORKS[x] for x in networks)
        jobs += [{"kind": "network", "threads": threads, "depth": depth} for depth in chosen]
    last = {"threads": counts[-1]}
    for name in names:
        jobs += [{"kind": "optimum", **last, "input": name, "row": x} for x in rows if x in LEAST]
    if THREE in rows and "a" in names:
        three = {"kind": "order", **last, "input": "a", "row": THREE}
        jobs += [{**three, "order": order} for order in permutations(range(3))]
    if any(row.startswith("KMeans") for row in rows):
        jobs.append({"kind": "vectors", **last})
    if config.smoke:
        notes.append("Smoke run: sizes are not those of the targets and of the listed times.")
    return jobs, list(dict.fromkeys(notes))


def perform(job: dict[str, Any], config: Config, argv: list[str]) -> dict[str, Any]:
    """What a job finds: in a process of its own, which may be stopped half-way."""
    found: dict[str, Any] = {}
    apart = (job.get("input"), job.get("peer")) == SMOKE_PROCESS
    if config.smoke and not apart:  # a process takes seconds to start
        JOBS[job["kind"]](job, config, found.update)
        return job | found
    environment = {f"{name}_NUM_THREADS": str(job["threads"]) for name in THREADS}
    command = [sys.executable, __file__, *argv, "--job", json.dumps(job)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, **environment}, text=True
    )
    try:
        # what a solver is measured against is brought to its end
        limit = config.limit if job["kind"] in ("solver", "peer") else None
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        found["stopped_after_seconds"] = config.limit
    except BaseException:
        process.kill()
        raise
    for line in output.splitlines():
        found |= json.loads(line)
    if process.returncode and "stopped_after_seconds" not in found:
        found["failed"] = True  # its traceback is on stderr
    return job | found


def run(config: Config, argv: list[str]) -> dict[str, Any]:
    started = time.perf_counter()
    jobs, notes = plan(config)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in JOBS}
    with tqdm(total=len(jobs), disable=config.quiet) as bar:
        for job in jobs:
            bar.set_description(", ".join(f"{key} {x}" for key, x in job.items()))
            found[job["kind"]].append(perform(job, config, argv))
            bar.update()
    for record in found["solver"]:
        for other in found["optimum"]:
            if (record["input"], record["row"]) == (other["input"], other["row"]):
                for state in ("cold", "warm"):
                    error, least = (x.get(f"{state}_error") for x in (record, other))
                    if error is not None and least:
                        record[f"{state}_excess"] = error / least - 1
    kept: dict[str, Any] = {kind: records for kind, records in found.items() if records}
    kept["targets"] = {
        name: {
            **asdict(replace(row, part=None)),
            "part": str(row.part),
            "least": name in LEAST,
            "stationary": stationary(row.part),
        }
        for name, row in ROWS.items()
    }
    kept["listed"] = {"source": LISTED_SOURCE, "columns": LISTED_COLUMNS, "times": LISTED}
    kept["notes"] = notes
    kept["must_show"] = judged(kept)
    return kept | {"wall_seconds": time.perf_counter() - started}


# ------------------------------------------------------------------ results


def parse(argv: list[str]) -> tuple[Config, dict[str, Any] | None]:
    """The settings, and for a process started by another run its job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = SMOKE if "--smoke" in argv else Config()
    for field in fields(Config):
        name, value = f"--{field.name.replace('_', '-')}", getattr(defaults, field.name)
        if isinstance(value, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(name, type=type(value), default=value)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    chosen = vars(parser.parse_args(argv))
    job = chosen.pop("job")
    config = Config(**chosen)
    unknown = sorted(set(chosen_rows(config)) - {*ROWS, *NETWORKS})
    if unknown:
        raise SystemExit(f"--rows: no {unknown}. There are: {', '.join([*ROWS, *NETWORKS])}.")
    return config, job


def main(argv: list[str]) -> None:
    config, job = parse(argv)
    if job is not None:
        torch.set_num_threads(job["threads"])
        JOBS[job["kind"]](job, config, lambda found: print(json.dumps(found), flush=True))
        return
    if config.figure:
        check_matplotlib()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the process of a job too
    where = origin(__file__) | {
        "cores": cores()
    }  # of the code that runs, not of what the folder holds when it ends
    where |= {name: version(name) for name in ("numpy", "scipy", "scikit-learn")}
    if config.smoke:
        torch.set_num_threads(1)  # its jobs run in this process
    try:
        result = run(config, argv)
    except KeyboardInterrupt:
        print("Interrupted: nothing was written.", file=sys.stderr)
        raise SystemExit(130) from None
    name = "bench_c_step" + ("_part" if config.rows else "") + ("_smoke" if config.smoke else "")
    stem = (Path(config.out) if config.out else RESULTS) / name
    local = {"data": "DIR" if config.data else "", "out": "", "quiet": False, "figure": True}
    kept = {**asdict(config), **local}
    given = [key for key, x in kept.items() if x != getattr(Config, key)]
    command = ["python experiments/bench_c_step.py", *(option(key, kept[key]) for key in given)]
    write(
        stem.with_name(f"{name}.json"),
        {"command": " ".join(command), "config": kept, "result": result, **where},
    )
    print(tables(result))
    if config.figure:
        draw(result, stem)
    print(f"\n{stem}.json{', .png, .svg' if config.figure else ''}")
    if any("failed" in record for kind in JOBS for record in result.get(kind, [])):
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
