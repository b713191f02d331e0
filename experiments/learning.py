"""The ways of learning that `cifar.py` compares: LC in one phase or two, the baselines, training of
the continuous fields afterwards. Each goes on from its checkpoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import baselines
import schemes
import torch
from torch import Tensor, nn
from training import batches, loss_of, pieces, train

from lc_compress import LC, constant, geometric

if TYPE_CHECKING:
    from cifar import Run

Step: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def step(run: Run) -> Step:
    """(images, labels) → loss, compiled once for all phases."""
    config = run.config
    compiled: Callable[[nn.Module], Any] = torch.compile if config.compile else lambda m: m
    student, teacher = compiled(run.model), None
    if config.distill > 0:
        other = run.fresh()
        other.load_state_dict(run.model.state_dict())
        teacher = compiled(other.eval().requires_grad_(False))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.bfloat16):
            told = None
            if teacher is not None:
                with torch.no_grad():
                    told = teacher(x).float()
            logits = student(x)
        return loss_of(logits.float(), y, told, config.distill)

    return loss


def stretch(run: Run, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the optimizer steps first … last − 1, counted over the whole run."""
    while first < last:
        epoch, b = divmod(first, run.per_epoch)
        end = min(last, (epoch + 1) * run.per_epoch)
        yield from batches(run.data, run.config.batch, run.config.seed, epoch, b, b + end - first)
        first = end


def rates(run: Run, first: int) -> Iterator[float]:
    config = run.config
    for i in itertools.count(first):
        yield config.lr + (config.lr_end - config.lr) * min(1.0, i / max(1, run.total))


def sgd(run: Run) -> torch.optim.SGD:
    """The weights to be compressed are in the first group."""
    config, own = run.config, baselines.weights(run.model)
    held = {id(p) for p in own}
    others = [p for p in run.model.parameters() if id(p) not in held]
    return torch.optim.SGD(
        [{"params": own}, {"params": others}],
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def controller(run: Run, phase: str, optimizer: torch.optim.Optimizer, count: int) -> LC:
    config = run.config
    if phase == "sum":
        schedule, options = constant(0.0, count), {"gradient": "sum", "every": config.every}
    else:
        schedule = geometric(config.mu0, config.growth ** (1 / config.steps), count)
        options = {"implicit": phase == "implicit"}
    tasks = schemes.tasks(run.model, config.scheme)
    multipliers = config.multipliers
    return LC(
        run.model, tasks, schedule=schedule, optimizer=optimizer, multipliers=multipliers, **options
    )


def still(run: Run) -> LC:
    """The model's weights as they are, directly compressed: LC without an L step."""
    lc = LC(run.model, schemes.tasks(run.model, run.config.scheme), schedule=constant(1.0, 1))
    for _ in lc.steps(progress=False):
        pass
    return lc


def phases(run: Run) -> list[tuple[str, int, int]]:
    """(where the gradient is taken, first optimizer step, last) of each phase."""
    if run.config.method == "handover":
        middle = round(run.config.handover * run.total)
        return [("weights", 0, middle), ("sum", middle, run.total)]
    return [(run.config.method.removeprefix("lc-"), 0, run.total)]


def learn(run: Run, step: Step) -> LC:
    """LC with all its steps done, in the way that the settings ask for."""
    if run.config.method in ("ste", "parq"):
        return _baseline(run, step)
    if run.config.method == "finetune":
        lc = still(run)
        run.direct(lc)
        return lc
    plan = phases(run)
    for number, (phase, first, last) in enumerate(plan):
        count = max(1, math.ceil(run.config.steps * (last - first) / run.per_epoch))
        optimizer = sgd(run)
        lc = controller(run, phase, optimizer, count)
        if number == 0:
            run.direct(lc)
        if run.file(f".{number + 1}.ckpt").exists():  # this phase was done before
            lc.release()
            continue
        before = [e for e in run.content["curve"] if e["epoch"] * run.per_epoch <= first + 0.5]
        checkpoint, saved = run.file(f".{number}.ckpt"), {"optimizer": optimizer}
        for k in lc.steps(checkpoint=checkpoint, save=saved, progress=run.progress):
            a, b = (first + (last - first) * i // count for i in (k.index, k.index + 1))
            run.model.train()
            loss = train(step, optimizer, stretch(run, a, b), rates(run, a))
            lc.log(loss=loss, epoch=b / run.per_epoch, seconds=run.seconds())
            run.content["curve"] = before + [dict(e) for e in lc.history]
            run.write()  # what is done, and the time that has passed
        run.content["curve"] = before + [dict(e) for e in lc.history]
        run.write()
        if number + 1 < len(plan):
            lc.release()
    return lc


def _baseline(run: Run, step: Step) -> LC:
    """Train by the baseline's own means, then hand its binary weights to LC for the file."""
    config = run.config
    if config.scheme != "binary":
        raise SystemExit(f"--method {config.method} is binary: use --scheme binary.")
    direct = still(run)
    run.direct(direct)
    direct.release()
    if config.method == "ste":
        baselines.binarize(run.model)
        optimizer: Any = sgd(run)
    else:
        optimizer = baselines.parq(run.model, sgd(run), run.total)
    curve: list[dict[str, float | None]] = []
    count = max(1, math.ceil(config.steps * config.epochs))

    def get() -> dict[str, Any]:
        return {
            "model": run.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "curve": curve,
        }

    def put(state: dict[str, Any]) -> None:
        run.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        curve.extend(state["curve"])

    run.content["curve"] = curve
    with run.bar(config.method) as bar:
        for k in pieces(run.file(".0.ckpt"), count, get, put, bar):
            a, b = (run.total * i // count for i in (k, k + 1))
            run.model.train()
            loss = train(step, optimizer, stretch(run, a, b), rates(run, a))
            curve.append(_entry(run, b, k, loss))
            run.write()  # the time that has passed
            bar.set_postfix(loss=f"{loss:.4g}")
    baselines.settle(run.model)
    lc = still(run)
    gap = max(lc.gap().values())
    if gap > 1e-3:
        raise RuntimeError(f"{config.method} ended with weights that are not binary: {gap}.")
    return lc


def _entry(run: Run, b: int, step: int, loss: float) -> dict[str, float | None]:
    """One line of the training curve, where LC keeps none."""
    return {
        "epoch": b / run.per_epoch,
        "step": step,
        "mu": None,
        "gap": None,
        "loss": loss,
        "seconds": run.seconds(),
    }


def refine(run: Run, lc: LC, step: Step, epochs: float) -> None:
    """Train the continuous fields with signs, supports and codes fixed, for the learning rate of
    the run (as the only training) or a fifth of it (after LC), which falls to 0.
    """
    config, total = run.config, round(epochs * run.per_epoch)
    alone = config.method == "finetune"
    first, begin = (config.lr, 0) if alone else (config.lr / 5, run.total)
    count = max(1, math.ceil(config.steps * epochs))
    curve: list[dict[str, float | None]] = []
    kept = [e for e in run.content["curve"] if e["epoch"] * run.per_epoch <= begin + 0.5]

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, first, momentum=config.momentum)

    with lc.refine(make) as optimizer, run.bar("fields") as bar:
        fields = [p for group in optimizer.param_groups for p in group["params"]]

        def get() -> dict[str, Any]:
            return {
                "fields": [p.detach().clone() for p in fields],
                "optimizer": optimizer.state_dict(),
                "model": run.model.state_dict(),
                "curve": curve,
            }

        def put(state: dict[str, Any]) -> None:
            run.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for p, x in zip(fields, state["fields"], strict=True):
                    p.copy_(x)
            optimizer.zero_grad()
            optimizer.step()  # moves nothing; θ follows its fields
            curve.extend(state["curve"])

        for k in pieces(run.file(".refine.ckpt"), count, get, put, bar):
            a, b = (total * i // count for i in (k, k + 1))
            run.model.train()
            falling = (first * (1 - i / total) for i in range(a, b))
            loss = train(step, optimizer, stretch(run, begin + a, begin + b), falling)
            curve.append(_entry(run, begin + b, k, loss))
            run.content["curve"] = kept + curve
            run.write()
            bar.set_postfix(loss=f"{loss:.4g}")
    run.content["curve"] = kept + curve
