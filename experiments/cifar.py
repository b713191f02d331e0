"""One CIFAR-10 run: a trained network, a compression scheme and a way to learn it.

Reference, direct compression, the learned model and (with --refine) the one whose continuous fields
were trained further, each measured from its packed file: saved, loaded into a new network, tested.
Nothing is chosen on test images: the last step counts.

Run:      python experiments/cifar.py --data DIR --weights FILE --scheme "binary + sparse 2%"
          DIR: CIFAR-10's binary files.  FILE: the trained network, resnet20-12fca82f.th or your own
          (--model FILE.py:factory --checkpoint FILE).  --smoke: a few seconds on random data.
Results:  OUT/NAME.json (what `report.py` reads) and OUT/NAME.lc (the packed model). The run goes on
          from OUT/NAME.*.ckpt if it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

import learning
import schemes
import torch
from common import add_options, bfloat16_pays, changed, check_out, locked, option, origin, write
from data import normalized
from networks import file_of, network, reference
from safetensors.torch import save as dense_bytes
from torch import Tensor, nn
from tqdm import tqdm
from training import CALIBRATION, Images, batches, images, measured

from lc_compress import LC, load, save

METHODS = ("lc-sum", "lc-weights", "lc-implicit", "handover", "finetune", "ste", "parq")
ERRORS = {"resnet20": 8.27, "resnet32": 7.37, "resnet44": 6.90, "resnet56": 6.61}
TRAIN_LOSS_IMAGES = 2_000
RANGES: dict[str, tuple[float | None, float]] = {  # least (None: above 0) and most
    **dict.fromkeys(("epochs", "steps", "every", "batch", "calibration", "lr", "mu0"), (None, inf)),
    **dict.fromkeys(("refine", "lr_end", "weight_decay"), (0, inf)),
    **dict.fromkeys(("handover", "distill"), (0, 1)),
    "momentum": (0, 0.999),
    "seed": (0, 10**9),
    "growth": (1, inf),
}
LOCAL = ("data", "weights", "out", "name", "device")  # do not change what a run computes


def said(default: Any, text: str, *also: str) -> Any:
    return field(default=default, metadata={"help": text, "also": also})


@dataclass(frozen=True)
class Config:
    data: str = said("data", "folder with CIFAR-10's binary files")
    weights: str = said("", "file of the trained network", "--checkpoint")
    out: str = said("runs", "folder of the results")
    name: str = said("", "of the result; empty: made from the settings")
    network: str = said("resnet20", "see networks.py, or FILE.py:factory", "--model")
    scheme: str = said("binary + sparse 2%", "see schemes.py")
    method: str = said("lc-sum", ", ".join(METHODS))
    epochs: float = said(4.0, "of learning")
    refine: float = said(0.0, "epochs of training the continuous fields afterwards")
    steps: int = said(4, "LC steps, or checkpoints, in one epoch")
    every: int = said(1, "lc-sum: optimizer steps between C steps")
    handover: float = said(0.3, "handover: share of the epochs before the gradient moves to Δ(θ)")
    mu0: float = said(0.05, "classic: first μ")
    growth: float = said(1.6, "classic: factor of μ in one epoch")
    multipliers: bool = said(True, "classic: augmented Lagrangian, else quadratic penalty")
    lr: float = said(0.02, "at the start; falls linearly")
    lr_end: float = said(0.0005, "at the end")
    momentum: float = said(0.9, "")
    weight_decay: float = said(1e-4, "")
    batch: int = said(128, "")
    distill: float = said(0.0, "share of the loss that is the divergence from the reference")
    calibration: int = said(25, "augmented training batches for BatchNorm's statistics")
    seed: int = said(0, "of the order and augmentation of the images")
    device: str = said("auto", "cpu, cuda, or auto: cuda where there is one")
    compile: bool = said(True, "torch.compile")
    bfloat16: bool = said(bfloat16_pays(), "autocast; default: where the hardware has it")
    smoke: bool = said(False, "a small network, random images, seconds")


def kept(config: Config) -> dict[str, Any]:
    """All settings that change what a run computes."""
    return {k: v for k, v in asdict(config).items() if k not in LOCAL}


def described(config: Config) -> dict[str, Any]:
    """The settings as a record has them: a run for trying out is of no network that there is."""
    own = kept(config) | {"family": schemes.family(config.scheme)}
    return own | ({"network": f"{config.network}, smoke"} if config.smoke else {})


def digest(config: Config) -> str:
    text = json.dumps(kept(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def sources(config: Config) -> dict[str, str]:
    """Checksums of the files that a run starts from: the weights, and the user's network."""
    files = {"weights": file_of(config.network, config.weights)}
    if ".py:" in config.network:
        files["network"] = Path(config.network.rpartition(":")[0])
    return {name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for name, p in files.items()}


def slug(config: Config) -> str:
    """A file name from the settings: readable, and other settings give another one."""
    if config.name:
        return config.name
    plain = config.scheme.replace(" + ", "+").replace(" > ", ">").replace(" ", "")
    name = config.network
    parts = (Path(name.partition(":")[0]).stem if ".py:" in name else name, plain, config.method)
    text = "_".join([*parts, f"{config.epochs:g}ep", f"s{config.seed}", digest(config)])
    return text.replace("%", "").replace("/", "-").replace(">", "-then-").replace(":", "of")


class Run:
    """Everything that one run holds; `go` does it."""

    def __init__(self, config: Config, *, progress: bool = True) -> None:
        self.config, self.progress = config, progress
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if config.device == "auto" else config.device)
        torch.manual_seed(config.seed)
        self.model = self.fresh()
        if config.smoke:
            network(config.network)  # refuses what there is not
        else:
            self.model.load_state_dict(reference(config.network, config.weights).state_dict())
        self.data: Images = images(config.data, self.device, config.smoke)
        self.sources = {} if config.smoke else sources(config)
        self.per_epoch = len(self.data) // config.batch
        if self.per_epoch < 1:
            raise SystemExit(f"--batch {config.batch}: at most {len(self.data)}, all images.")
        self.total = round(config.epochs * self.per_epoch)  # optimizer steps of learning
        self.path = Path(config.out) / f"{slug(config)}.json"

    def fresh(self) -> nn.Module:
        name = "resnet8" if self.config.smoke and "." not in self.config.network else None
        model = network(name or self.config.network)
        return model.to(self.device, memory_format=torch.channels_last)

    def file(self, suffix: str) -> Path:
        """Beside the record. Checkpoints are of these settings and sources, whatever the name."""
        if suffix.endswith(".ckpt"):
            suffix = f".{self.identity()}{suffix}"
        return self.path.with_name(self.path.stem + suffix)

    def identity(self) -> str:
        """Of the settings and the sources, in six digits."""
        of = json.dumps([digest(self.config), self.sources])
        return hashlib.sha256(of.encode()).hexdigest()[:6]

    def checkpoints(self, of: str) -> list[Path]:
        """Those of this name whose settings and sources the pattern `of` matches."""
        return list(self.path.parent.glob(f"{glob.escape(self.path.stem)}.{of}.*.ckpt"))

    def bar(self, name: str) -> tqdm[Any]:
        return tqdm(desc=name, unit="step", disable=not self.progress)

    # -------------------------------------------------------------- the record

    def _started(self) -> dict[str, Any]:
        """The record of this run: a new one, or that of an interrupted one."""
        config = self.config
        shown = changed(config) | {"bfloat16": config.bfloat16}  # its default is the machine's
        command = " ".join(
            ["python experiments/cifar.py --data DIR --weights FILE"]
            + [option(k, v) for k, v in shown.items() if k not in LOCAL]
        )
        where = origin(__file__)
        new = {
            "format": 1,
            "name": self.path.stem,
            "status": "running",
            "command": command,
            "config": described(config),
            "sources": self.sources,
            "reference": {},
            "points": {},
            "curve": [],
            "layers": [],
            "hardware": where,
        }
        if not self.path.exists():
            return new
        try:
            old: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            same = old["config"] == new["config"]
            if old["status"] == "failed" and not old.get("points"):  # nothing is lost
                return new
            there = old.get("sources", self.sources)
            if same and there != self.sources:
                files = [f"{k} {there.get(k)} there, {x} here" for k, x in self.sources.items()]
                raise SystemExit(
                    f"{self.path} was made from another trained network, by the checksums of its "
                    f"files ({'; '.join(files)}). Give another --name or --out."
                )
        except (ValueError, KeyError, TypeError):
            own = self.checkpoints(self.identity())
            from_ = "goes on from its checkpoint" if own else "starts again"
            tqdm.write(f"{self.path} was cut short: the run {from_}.")
            return new
        if not same:
            other = [
                f"{k} {old['config'].get(k)!r} there, {new['config'].get(k)!r} here"
                for k in old["config"] | new["config"]
                if old["config"].get(k) != new["config"].get(k)
            ]
            raise SystemExit(
                f"{self.path} is of a run with other settings ({'; '.join(other)}): give another "
                "--name or --out."
            )
        old.pop("error", None)
        status = "done" if old["status"] == "done" else "running"
        return old | {"status": status, "hardware": old["hardware"] if status == "done" else where}

    def write(self) -> None:
        self.content["seconds"] = self.seconds()
        write(self.path, self.content)

    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    # -------------------------------------------------------------- measuring

    def calibration(self) -> list[Tensor]:
        count = min(self.config.calibration, self.per_epoch)
        seed = self.config.seed
        stream = batches(self.data, self.config.batch, seed, CALIBRATION, 0, count)
        return [x for x, _ in stream]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Test error, and loss on training images without augmentation."""
        data = self.data
        error, _ = measured(model, data.test, data.test_labels)
        clean = data.train[:TRAIN_LOSS_IMAGES, :, 4:-4, 4:-4]
        _, loss = measured(model, clean, data.labels[:TRAIN_LOSS_IMAGES])
        return {"test_error": error, "train_loss": loss}

    def point(self, name: str, lc: LC, epochs: float) -> None:
        """Measure what a packed file of the model holds; the weights are Δ(θ) now."""
        if name in self.content["points"]:
            return
        path = self.file(".lc")
        try:
            save(lc, path, uncompressed=torch.float16)
        except ValueError:  # a variance of BatchNorm beyond its range
            save(lc, path, uncompressed=torch.bfloat16)
        report, size = lc.report(), path.stat().st_size
        entry: dict[str, Any] = self.evaluate(load(path, self.fresh()))
        weights = sum(row.weights for row in report.rows)
        entry |= {
            "bits": 8 * size,
            "bits_per_weight": sum(row.bits for row in report.rows) / weights,
            "file_bytes": size,
            "file_ratio": self.content["reference"]["file_bytes"] / size,
            "epochs": epochs,
            "seconds": self.seconds(),
        }
        self.content["points"][name] = entry
        self.content["layers"] = [
            {"name": row.name, "weights": row.weights, "bits": parts, "error": row.error}
            for row, parts in zip(report.rows, map(bits_by_part, lc.tasks), strict=True)
        ]
        self.write()
        tqdm.write(
            f"{name}: {entry['test_error']:.2f} % test error, {entry['bits_per_weight']:.3f} bits "
            f"per weight, file {size:,} bytes, ratio {entry['file_ratio']:.2f}, "
            f"{self.seconds():.0f} s"
        )

    def direct(self, lc: LC) -> None:
        """Direct compression, which LC starts from."""
        if "direct" not in self.content["points"]:
            with lc.compressed(calibration=self.calibration()):
                self.point("direct", lc, 0.0)

    def measure_reference(self) -> None:
        if self.content["reference"]:
            return
        config, classes = self.config, int(self.data.labels.max()) + 1
        with torch.no_grad():
            shape = tuple(self.model.eval()(normalized(self.data.test[:2])).shape)
        if len(shape) != 2 or shape[1] < classes:
            raise SystemExit(
                f"--network {config.network} gives {shape} for 2 images: (2, {classes}) is needed."
            )
        entry: dict[str, Any] = self.evaluate(self.model)
        known = None if config.smoke else ERRORS.get(config.network)
        if known is not None and abs(entry["test_error"] - known) > 0.02:
            raise SystemExit(
                f"The reference {config.network} has {entry['test_error']:.2f} % test error, not "
                f"{known:.2f} %: other weights or data."
            )
        state = {k: x.contiguous() for k, x in self.model.state_dict().items()}
        entry["file_bytes"] = len(dense_bytes(state))
        entry["weights"] = sum(x.numel() for x in self.model.parameters())
        self.content["reference"] = entry
        self.write()
        tqdm.write(f"reference: {entry['test_error']:.2f} % test error")

    # -------------------------------------------------------------- the whole run

    def go(self) -> dict[str, Any]:
        """The run, or what is left of it. Returns the record, as it is on disk.

        Raises:
            SystemExit: another process is doing it.
        """
        try:
            with locked(self.path.with_suffix(".lock")):
                self.content = self._started()
                self.begun = time.perf_counter() - self.content.get("seconds", 0.0)
                if self.content["status"] != "done":
                    self._go()
                return self.content
        except BlockingIOError as cause:
            raise SystemExit(
                f"{self.path} is being made by another process: wait for it."
            ) from cause

    def _go(self) -> None:
        config = self.config
        self.measure_reference()
        step = learning.step(self)
        lc = learning.learn(self, step)
        if config.method == "finetune":
            learning.refine(self, lc, step, config.epochs)
        elif config.refine > 0:
            with lc.compressed(calibration=self.calibration()):
                self.point("learned", lc, config.epochs)
            learning.refine(self, lc, step, config.refine)
        lc.finalize(calibration=self.calibration())
        name = "refined" if config.refine > 0 else "learned"
        self.point(name, lc, config.epochs + config.refine)
        self.content["status"] = "done"
        self.write()
        for checkpoint in self.checkpoints("[0-9a-f]" * 6):
            checkpoint.unlink()


def bits_by_part(task: Any) -> dict[str, int]:
    """Stored bits of a task by the kind of part, of every field by the part it belongs to."""
    total: dict[str, int] = {}
    for name, fld in task.part.encode(task.state).items():
        kind = owner(task.part, name)
        total[kind] = total.get(kind, 0) + fld.coding.bits(fld.data)
    return total


def owner(part: Any, name: str) -> str:
    """The kind of the term of a sum that a field belongs to; of anything else its own name."""
    inner = getattr(part, "part", part)  # seen through a view
    head = name.split(".", 1)[0]
    terms = getattr(inner, "parts", None)
    if terms is None or not head.isdigit():
        return str(inner).split("(")[0] if terms is None else type(inner).__name__
    return type(terms[int(head)]).__name__


def parse(argv: list[str]) -> Config:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, Config())
    config = Config(**vars(parser.parse_args(argv)))
    if config.method not in METHODS:
        raise SystemExit(f"--method {config.method!r}: one of {', '.join(METHODS)}.")
    schemes.part(config.scheme, torch.Size((16, 16, 3, 3)))  # refuses what does not exist
    for name, (least, most) in RANGES.items():
        value, option_ = getattr(config, name), f"--{name.replace('_', '-')}"
        if not isfinite(value):
            raise SystemExit(f"{option_} {value}: a finite number.")
        if least is None and value <= 0:
            raise SystemExit(f"{option_} {value}: more than 0.")
        if not (least or 0) <= value <= most:
            upper = "" if most == inf else f", at most {most}"
            raise SystemExit(f"{option_} {value}: at least {least or 0}{upper}.")
    if "rank" in config.scheme.replace("lowrank", "") and config.method in ("lc-sum", "handover"):
        raise SystemExit(
            f"--scheme {config.scheme!r}: the price of rank is weighed against μ, which is 0 in "
            f"--method {config.method}. Use lc-weights or lc-implicit."
        )
    try:
        torch.ones(1, device="cpu" if config.device == "auto" else config.device).item()
    except (RuntimeError, AssertionError) as cause:
        first = str(cause).splitlines()[0]
        raise SystemExit(f"--device {config.device}: {first}") from cause
    if config.smoke:
        config = replace(config, epochs=min(config.epochs, 1.0), batch=32, compile=False, steps=2)
    return config


def main(argv: list[str]) -> None:
    config = parse(argv)
    check_out(Path(config.out))
    with contextlib.suppress(KeyboardInterrupt):
        Run(config, progress=sys.stderr.isatty()).go()
        return
    raise SystemExit("Interrupted. The same command goes on from the last LC step.")


if __name__ == "__main__":
    main(sys.argv[1:])
