"""Damaged and hostile packed files: each is refused by name, and nothing else happens.

Hypothesis mutates files with every kind of part (`mutations.py`), each kind of damage in equal
shares, from a seed; a failure is shrunk to a small one, reported, and the search goes on. Each
file is inspected, verified and loaded into a model. Counted as failures: another exception than
the one for damaged files (or, where the index was changed, for files of another model), a changed
model after a refusal by checksum or shape, damage that was not noticed, a file whose reads take
more than a second or 100 MB beyond what the process held, and a load into packed layers (each
policy in turn) that refuses what the dense load takes, takes what it refuses, holds other weights,
or changes the model it refuses.

What the process holds at the end grows with what Hypothesis remembers of its examples; that reads
themselves keep nothing is checked on whole files, read many times.

Then a process that saves two models in turn under one name is killed at random instants: each time
the file must be whole, and one of the two.

Claim: no failure in 10 000 mutations and more, and in 40 kills.

Run:      python experiments/fuzz_storage.py [--count 12000] [--kills 40] [--seed 0]
Results:  experiments/results/fuzz_storage.json
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import torch
from bench_c_step import forget_peak, memory
from common import origin, write
from hypothesis import strategies as st
from mutations import KINDS, Mutation, Source, mutations
from torch import Tensor, nn
from tqdm import tqdm

from lc_compress import (
    HBFP,
    LC,
    MX,
    NM,
    Binary,
    BlockSparse,
    FixedCodebook,
    FixedPoint,
    Int,
    Joint,
    KernelMatrix,
    KMeans,
    LowRank,
    Matrix,
    PowersOfTwo,
    RankSelection,
    ScaledCodebook,
    Sparse,
    Ternary,
    constant,
    each,
)
from lc_compress.modules import to_dense
from lc_compress.storage import FormatError, inspect, load, save, verify

RESULTS = Path(__file__).parent / "results" / "fuzz_storage.json"
POLICIES = ("never", "on_load", "on_first_use")
MOST_FAILURES = 5  # of one kind, before the search for more ends


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(9))
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)
        self.tied = nn.Linear(6, 4)
        self.tied.weight = self.second.weight


def corpus(folder: Path) -> list[Path]:
    half = torch.float16
    plans: list[dict[Any, Any]] = [
        {
            "conv.weight": LowRank(1).over(KernelMatrix()) + Binary(),
            "layers.0.weight": Ternary(group=16) + Sparse(nonzeros=4, value_dtype=half),
            "layers.1.weight": KMeans(5),
            "layers.2.weight": LowRank(2).then(KMeans(4)) + NM(2, 4, axis=0),
            "layers.3.weight": Sparse(density=0.2).then(Int(4)),
            "layers.4.weight": BlockSparse(blocks=3, axis=0) + PowersOfTwo(2),
            "layers.5.weight": RankSelection(0.01, schemes=(Matrix(),)),
            "layers.6.weight": ScaledCodebook((-1, 0, 0.5), axis=1),
            "layers.7.weight": Int(3, axis=0, symmetric=False),
            Joint("re:(first|second).weight"): each(Binary()) + Sparse(density=0.1),
        },
        {"layers.*.weight": Binary() + Sparse(density=0.05)},
        {
            "conv.weight": HBFP(6, block=4),
            "layers.0.weight": MX("e2m1", block=8) + LowRank(1),
            "layers.1.weight": FixedPoint(5, axis=0),
            "layers.2.weight": NM(2, 4).then(MX("int8", block=4)),
            "layers.3.weight": Int(4, axis=0).then(Sparse(density=0.3)),
            "layers.4.weight": Sparse(density=0.3).then(HBFP(4, block=8)),
            "layers.5.weight": FixedCodebook((-0.3, 0.0, 0.3)),
        },
    ]
    paths = []
    for i, plan in enumerate(plans):
        for entropy in (False, True):
            torch.manual_seed(i)
            lc = LC(Net(), plan, schedule=constant(1.0, 1))
            lc.finalize(calibration=None)
            paths.append(folder / f"{i}{'e' if entropy else ''}.lc")
            save(lc, paths[-1], uncompressed=half, entropy=entropy)
    return paths


def outcome(kind: str, path: Path, model: nn.Module) -> tuple[str, str]:
    """How loading ended, and what was wrong with that ("" where nothing was)."""
    try:
        for read in (inspect, verify):
            try:
                read(path)
            except FormatError as refusal:
                if str(path) not in str(refusal):
                    return "unnamed", str(refusal)
        load(path, model)
    except FormatError as refusal:
        return "refused", "" if str(path) in str(refusal) else f"no name: {refusal}"
    except ValueError as refusal:
        fits = kind == "index" and str(path) in str(refusal)
        return "of another model", "" if fits else f"ValueError: {refusal}"
    except Exception as failure:
        return "crashed", f"{type(failure).__name__}: {failure}"
    signed = kind in ("index", "payload")
    return "another valid file", "" if signed else "damage was not noticed"


def held_packed(path: Path, policy: Any, model: nn.Module, dense: nn.Module | None) -> str:
    """What is wrong with loading into packed layers; `dense`: the model of the dense load, None if
    that was refused.
    """
    kept, layers = copies(model), list(model.modules())
    try:
        packed = load(path, model, materialize=policy)
    except (FormatError, ValueError) as refusal:
        if not same(model, kept) or layers != list(model.modules()):
            return f"{policy} changed the model that it refused"
        fits = str(path) in str(refusal)
        return "" if dense is None and fits else f"{policy} refused what dense loads: {refusal}"
    except Exception as failure:
        return f"{policy} crashed: {type(failure).__name__}: {failure}"
    if dense is None:
        return f"{policy} loaded what dense refuses"
    plain = dict(to_dense(packed).named_parameters())
    for name, x in dense.named_parameters():
        if not torch.allclose(plain[name], x, rtol=1e-4, atol=1e-5, equal_nan=True):
            return f"{policy} holds another {name}"
    return ""


def copies(model: nn.Module) -> list[Tensor]:
    return [x.clone() for x in model.state_dict().values()]


def same(model: nn.Module, kept: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), kept, strict=True))


class Fuzz:
    """Mutations that are tried, and what was found."""

    def __init__(self, folder: Path, quiet: bool) -> None:
        self.whole = corpus(folder)
        self.sources = [Source(path) for path in self.whole]
        self.path = folder / "mutated.lc"
        self.quiet = quiet
        self.model = Net()
        self.kept = copies(self.model)
        self.spare: Net | None = None
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        self.slowest = 0.0
        self.most = 0.0  # megabytes that the reads of one file took
        self.heaviest = ""

    def attempt(self, mutation: Mutation, policy: str) -> tuple[str, str]:
        """How loading this file ended, and what was wrong with that."""
        self.path.write_bytes(mutation.content)
        forget_peak()
        before, begin = memory(peak=False), time.process_time()
        end, wrong = outcome(mutation.kind, self.path, self.model)
        changed = not same(self.model, self.kept)
        dense = self.model if end == "another valid file" else None
        packed = self.spare or Net()
        wrong = wrong or held_packed(self.path, policy, packed, dense)
        self.slowest = max(self.slowest, time.process_time() - begin)
        if (taken := memory(peak=True) - before) > self.most:
            self.most, self.heaviest = taken, f"{mutation}, {policy}"[:300]
        if changed and (end == "of another model" or mutation.kind not in ("index", "payload")):
            wrong = wrong or "the model was changed"
        self.spare = None if wrong or dense else packed  # a refused one is as it was
        if changed or dense:
            self.model = Net()
            self.kept = copies(self.model)
        return end, wrong

    def read_again(self, rounds: int) -> float:
        """Megabytes that reading every whole file so many times, by every policy, has kept."""
        before = 0.0
        for i in range(rounds + 1):
            for path in self.whole:
                for policy in (None, *POLICIES):
                    load(path, Net(), materialize=policy)  # type: ignore[arg-type]
            if i == 0:  # what is made once
                gc.collect()
                forget_peak()
                before = memory(peak=False)
        gc.collect()
        forget_peak()
        return memory(peak=False) - before

    def search(self, kind: str, count: int, seed: int) -> int:
        """Up to `count` mutations, less after a failure; how many were counted."""
        done = 0
        smallest = ""  # of the failures; Hypothesis ends with the smallest

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            suppress_health_check=list(hypothesis.HealthCheck),
            verbosity=hypothesis.Verbosity.quiet,
        )
        @hypothesis.given(mutations(kind, self.sources), st.sampled_from(POLICIES))
        def every(mutation: Mutation, policy: str) -> None:
            nonlocal done, smallest
            end, wrong = self.attempt(mutation, policy)
            if not smallest:  # after a failure, it shrinks
                done += 1
                self.outcomes[f"{kind}: {end}"] += 1
                progress.update()
            if wrong:
                smallest = f"{mutation}, {policy}: {wrong}"
                raise AssertionError(wrong.split(":")[0])

        with tqdm(total=count, desc=kind, disable=self.quiet) as progress:
            try:
                every()
            except (AssertionError, hypothesis.errors.Flaky):
                self.failures.append(smallest[:1000])
        return done


def run(count: int, seed: int, quiet: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        fuzz = Fuzz(Path(name), quiet)
        kept = fuzz.read_again(count // 60)
        forget_peak()
        before = memory(peak=False)
        for i, kind in enumerate(KINDS):
            share = count // len(KINDS) + (i < count % len(KINDS))
            for again in range(MOST_FAILURES):
                done = fuzz.search(kind, share, seed + 1000 * i + 100_000 * again)
                share -= done
                if not share or not done:  # all are tried, or there are no others
                    break
        gc.collect()
        forget_peak()
        growth = memory(peak=False) - before
    failures = list(fuzz.failures)
    if fuzz.slowest > 1.0:
        failures.append(f"a read took {fuzz.slowest:.1f} s")
    if fuzz.most > 100:
        failures.append(f"reading took {fuzz.most:.0f} MB: {fuzz.heaviest}")
    if kept > 20:
        failures.append(f"reading whole files again and again kept {kept:.0f} MB")
    tried = sum(fuzz.outcomes.values())
    if tried < count:
        failures.append(f"{tried} mutations instead of {count}")
    return {
        "mutations": tried,
        "hypothesis": hypothesis.__version__,
        "outcomes": dict(sorted(fuzz.outcomes.items())),
        "failures": failures,
        "slowest_seconds": fuzz.slowest,
        "peak_megabytes": fuzz.most,
        "peak_at": fuzz.heaviest,
        "kept_megabytes": kept,
        "growth_with_hypothesis_megabytes": growth,
    }


def saves_for_ever(path: Path) -> None:
    """Two models in turn under one name, to be killed."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        lc = LC(nn.Linear(300, 300), {"weight": Binary() + Sparse(nonzeros=9)}, schedule=[1.0])
        lc.finalize()
        models.append(lc)
    while True:
        for lc in models:
            save(lc, path)
            print(path.stat().st_ino, flush=True)


def killed(kills: int, seed: int, quiet: bool) -> dict[str, Any]:
    rng = random.Random(seed)
    failures: list[str] = []
    seen: set[str] = set()
    left = 0  # kills that came in the middle of writing
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.lc"
        for i in tqdm(range(kills), disable=quiet):
            command = [sys.executable, __file__, "--save-for-ever", str(path)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert process.stdout is not None
            for _ in range(rng.randint(1, 4)):
                process.stdout.readline()
            time.sleep(rng.random() * 0.02)
            process.kill()
            process.wait()
            process.stdout.close()
            for unfinished in path.parent.glob("model.lc.*.unfinished"):
                left += 1
                unfinished.unlink()
            try:
                verify(path)
                model = load(path, nn.Linear(300, 300))
                seen.add(hashlib.sha256(model.weight.detach().numpy().tobytes()).hexdigest())
            except Exception as failure:
                failures.append(f"kill {i}: {failure}")
    if len(seen) > 2:
        failures.append(f"{len(seen)} different models were read, 2 were saved")
    return {"kills": kills, "while_writing": left, "models": len(seen), "failures": failures}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=12_000)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--save-for-ever", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.save_for_ever:
        saves_for_ever(options.save_for_ever)
    begin = time.perf_counter()
    result = run(options.count, options.seed, options.quiet)
    result["kills"] = killed(options.kills, options.seed, options.quiet)
    failures = result["failures"] + result["kills"]["failures"]
    content = {
        "command": f"python experiments/fuzz_storage.py --count {options.count} "
        f"--kills {options.kills} --seed {options.seed}",
        "config": {"count": options.count, "kills": options.kills, "seed": options.seed},
        "result": result,
        **origin(__file__),
        "wall_seconds": time.perf_counter() - begin,
    }
    write(options.out, content)
    for line, count in result["outcomes"].items():
        print(f"{line:30}{count:7}")
    print("\n".join(failures[:20]))
    print(
        f"{len(failures)} failures in {options.count} mutations and {options.kills} kills, "
        f"{result['kills']['while_writing']} of them in the middle of writing"
    )
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
