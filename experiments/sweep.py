"""A grid of CIFAR-10 runs, several at a time, that goes on where it was stopped.

Every combination of the given values is one run of `cifar.py` in a process of its own, with its own
log. A finished run is never repeated, a failed one is reported and does not stop the others; the
record of each run is a JSON file in the folder.

Run:      python experiments/sweep.py --out runs --jobs 2 -- --data DIR --weights FILE
              --scheme "binary + sparse 1%" "binary + sparse 2%" --seed 0 1 2
Exit:     0 all runs are done, 1 some failed, 130 interrupted
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import cifar
import torch
from common import locked, write
from tqdm import tqdm

SCRIPT = Path(__file__).with_name("cifar.py")


@dataclass(frozen=True)
class Job:
    config: cifar.Config
    options: tuple[str, ...]

    @property
    def path(self) -> Path:
        return Path(self.config.out) / f"{cifar.slug(self.config)}.json"

    def status(self) -> str:
        """ "done", "failed" or "running", as the record says; "new" without one; "cut short" if it
        cannot be read, "foreign" if it was made from another trained network.
        """
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            status, sources = str(record["status"]), record.get("sources")
        except FileNotFoundError:
            return "new"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "cut short"
        try:
            own = {} if self.config.smoke else cifar.sources(self.config)
        except (SystemExit, OSError):
            return status  # no file to compare with: the run will say so, if there is one
        if status == "failed" and not record.get("points"):  # nothing is lost: made again
            return status
        return "foreign" if sources and own and sources != own else status

    def progress(self) -> tuple[float, float]:
        """Epochs that are done, as far as the record says, and all of them."""
        total = self.config.epochs + self.config.refine
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            if record["status"] == "done":
                return total, total
            done = max((float(entry["epoch"]) for entry in record["curve"]), default=0.0)
        except (OSError, ValueError, KeyError, TypeError):
            done = 0.0
        return min(done, total), total


def jobs(options: list[str], out: str) -> list[Job]:
    """Every combination of the values that follow each option.

    Raises:
        SystemExit: an option or a value that cifar.py does not have.
    """
    known = {"--model", "--checkpoint"}
    for f in fields(cifar.Config):
        name = f.name.replace("_", "-")
        known |= {f"--{name}", f"--no-{name}"}
    axes: list[list[tuple[str, ...]]] = []
    for word in options:
        if word.startswith("--"):
            if word not in known or word in ("--out", "--name"):
                raise SystemExit(f"sweep: {word} is no setting of cifar.py that a grid may have.")
            if any(axis[0][0] == word for axis in axes):
                raise SystemExit(f"sweep: {word} twice; write all its values behind one.")
            axes.append([(word,)])
        elif not axes:
            raise SystemExit(f"sweep: {word!r} follows no option; write --scheme {word!r} ...")
        else:
            name = axes[-1][0][0]
            bare = axes[-1] == [(name,)]
            axes[-1] = [(name, word)] if bare else [*axes[-1], (name, word)]
    plans = [tuple(itertools.chain(*chosen)) for chosen in itertools.product(*axes)]
    found: dict[Path, Job] = {}
    for plan in plans:
        job = Job(cifar.parse([*plan, "--out", out]), plan)
        if other := found.get(job.path):
            raise SystemExit(
                f"sweep: {' '.join(plan)} would be written where {' '.join(other.options)} is: the "
                "same settings twice, or of files that the name does not tell apart ({network} in "
                "--weights stands for the name of the network)."
            )
        found[job.path] = job
    return list(found.values())


def failed(job: Job, code: int, log: Path) -> None:
    """Say so in the record, keeping what the run had written; a finished one, and one that another
    process works on, stay as they are.
    """
    content = {"format": 1, "name": job.path.stem, "config": cifar.described(job.config)}
    with contextlib.suppress(OSError), locked(job.path.with_suffix(".lock")):
        if job.status() == "done":
            return
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
        with contextlib.suppress(OSError, ValueError, TypeError):
            content |= json.loads(job.path.read_text(encoding="utf-8"))
        content |= {"status": "failed", "error": f"exit status {code}: {lines[-1]}"}
        write(job.path, content)


def work(plan: list[Job], parallel: int, threads: int, quiet: bool) -> list[Job]:
    """Run what is not done. Returns the failed jobs."""
    waiting: list[Job] = []
    broken: list[Job] = []
    for job in plan:
        status = job.status()
        if status == "cut short":
            tqdm.write(f"{job.path} was cut short: its run goes on from its checkpoint, if any.")
        if status == "foreign":  # a finished run perhaps: nothing is written over it
            tqdm.write(
                f"failed: {job.path} was made from another trained network; use another --out."
            )
            broken.append(job)
        elif status != "done":
            waiting.append(job)
    running: dict[subprocess.Popen[bytes], tuple[Job, Path]] = {}
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with Progress(plan, quiet) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    job = waiting.pop(0)
                    log = job.path.with_suffix(".log")
                    command = [sys.executable, SCRIPT, *job.options, "--out", job.config.out]
                    with open(log, "wb") as sink:
                        process = subprocess.Popen(
                            command, stdout=sink, stderr=subprocess.STDOUT, env=env
                        )
                    running[process] = job, log
                for process in [p for p in running if p.poll() is not None]:
                    job, log = running.pop(process)
                    if job.status() != "done":
                        broken.append(job)
                        failed(job, process.returncode, log)
                        tqdm.write(f"failed: {job.path.stem}, see {log}")
                        continue
                    log.unlink(missing_ok=True)
                    if process.returncode != 0:
                        tqdm.write(f"{job.path.stem} is done; exit status {process.returncode}.")
                progress.show([job for job, _ in running.values()], broken)
                time.sleep(0.2)
        finally:  # also when interrupted: each run has its checkpoint
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    return broken


class Progress:
    """A bar over the epochs of all runs, from their records, so that the time left is that of the
    whole sweep.
    """

    def __init__(self, plan: list[Job], quiet: bool) -> None:
        self.plan, self.shown = plan, 0.0
        found = [job.progress() for job in plan]
        self.before = [n for n, _ in found]
        self.bar = tqdm(
            total=sum(total for _, total in found),
            initial=sum(self.before),
            smoothing=0,  # the mean speed: runs differ
            disable=quiet,
            bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} epochs [{elapsed}<{remaining}{postfix}]",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *args: object) -> None:
        self.bar.close()

    def show(self, running: list[Job], broken: list[Job]) -> None:
        """At most every two seconds: records are read for it."""
        if self.bar.disable or time.monotonic() - self.shown < 2:
            return
        self.shown = time.monotonic()
        found = [job.progress() for job in self.plan]
        kept = [job not in broken for job in self.plan]
        whole = list(itertools.compress(found, kept))
        self.bar.initial = sum(itertools.compress(self.before, kept))
        self.bar.n, self.bar.total = (sum(x[i] for x in whole) for i in (0, 1))
        done = sum(n == total for n, total in whole)
        self.bar.set_description(", ".join(job.path.stem for job in running), refresh=False)
        self.bar.set_postfix_str(f"{done}/{len(found)} runs, {len(broken)} failed")


def main(argv: list[str]) -> None:
    if "--" not in argv:
        argv = [*argv, "--"]
    cut = argv.index("--")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs", help="folder of the records")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run, on the CPU")
    parser.add_argument("--list", action="store_true", help="only show what would run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    own = parser.parse_args(argv[:cut])
    if own.jobs < 1 or own.threads < 1:
        raise SystemExit("sweep: --jobs and --threads are at least 1.")
    plan = jobs(argv[cut + 1 :], own.out)
    cifar.check_out(Path(own.out))
    if own.list:
        for job in plan:
            print(f"{job.status():9} {job.path.stem}")
        return
    if own.jobs > 1 and torch.cuda.is_available():
        tqdm.write("Several runs share the GPU: watch its memory.")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the runs first, too
    try:
        broken = work(plan, own.jobs, own.threads, own.quiet)
    except KeyboardInterrupt:
        done = sum(job.status() == "done" for job in plan)
        print(f"Interrupted: {done} of {len(plan)} runs are done; the same command goes on.")
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{len(plan) - len(broken)} of {len(plan)} runs are done.")
    for job in broken:
        print(f"failed: {job.path}")
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
