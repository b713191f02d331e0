"""One shot, both orders, every pruning and format: what the experiments on the order share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import write
from order_runs import Run
from torch import Tensor, nn
from tqdm import tqdm

from lc_compress import NM, Format, Matrix, Part, Sparse, number_format
from lc_compress.interplay import orthogonality

FORMATS = ("INT8", "HBFP8", "HBFP6", "MXFP8", "MXFP6", "MXFP4", "INT4")
PRUNERS: dict[str, Part[Any]] = {
    "2:4": NM(2, 4),
    "50%": Sparse(density=0.5),
    "75%": Sparse(density=0.25),
}
SETTINGS = ("weights", "weights and activations")
ORDERS = ("S→Q", "Q→S")
Weights = dict[str, Tensor]
Values = dict[str, list[float]]  # metric: one value per batch of the evaluation
Hook = Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]
Measure = Callable[[Weights, Hook | None], Any]
_VIEW = Matrix()  # a convolution weight as rows, each one dot product


class Records:
    """What was measured, by name, in a JSON file: a run that was stopped goes on where it was."""

    def __init__(self, run: Run[Any], total: int) -> None:
        path = self.path = Path(run.options.records or run.stem.with_suffix(".records.json"))
        self.config = run.setup
        self.found: dict[str, Any] = {}
        self.started, self.earlier = time.perf_counter(), 0.0
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["config"] != self.config:
                raise SystemExit(
                    f"{path} was made with {content['config']}, asked for is {self.config}: give "
                    "another --records."
                )
            self.found, self.earlier = content["found"], content.get("seconds", 0.0)
        self.bar = tqdm(total=total, disable=run.options.quiet)

    @property
    def seconds(self) -> float:
        """Wall time of all starts."""
        return self.earlier + time.perf_counter() - self.started

    def get(self, name: str, measure: Callable[[], Any], now: bool = True) -> Any:
        """The measurement; None if it is not there and `now` is false."""
        if name not in self.found and not now:
            return None
        if name not in self.found:
            self.found[name] = measure()
            content = {"config": self.config, "seconds": self.seconds, "found": self.found}
            write(self.path, content)
        self.bar.update()
        return self.found[name]


def pruned(w: Tensor, pruner: Part[Any]) -> Tensor:
    shown = _VIEW.show(w)
    return _VIEW.restore(pruner.reconstruct(pruner.project(shown)), w.shape)


def quantized(w: Tensor, form: Format[Any]) -> Tensor:
    return _VIEW.restore(form.quantize(_VIEW.show(w)), w.shape)


def ordered(w: Tensor, order: str, pruner: Part[Any], form: Format[Any]) -> Tensor:
    """q(s(w)) or s(q(w)); the largest magnitudes are kept."""
    if order == "S→Q":
        return quantized(pruned(w, pruner), form)
    return pruned(quantized(w, form), pruner)


def token_inputs(form: Format[Any]) -> Hook:
    """Inputs of a matrix, quantized: rows of the format are tokens."""

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0]
        return (form.quantize(x.flatten(0, -2)).view(x.shape),)

    return hook


@contextmanager
def compressed(
    layers: Mapping[str, nn.Module], weights: Weights, hook: Hook | None
) -> Iterator[None]:
    """Layers with these weights, and with `hook` on their inputs."""
    before = copies(layers)
    handles = []
    try:
        for name, layer in layers.items():
            put(layer, weights[name])
            if hook is not None:
                handles.append(layer.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            put(layer, before[name])


def copies(layers: Mapping[str, nn.Module]) -> Weights:
    return {name: x.weight.detach().clone() for name, x in layers.items()}  # type: ignore[operator, union-attr]


@torch.no_grad()
def put(layer: nn.Module, w: Tensor) -> None:
    layer.weight.copy_(w)  # type: ignore[operator, union-attr]


def name_of(*parts: str) -> str:
    return "/".join(parts)


def one_shot(
    layers: Mapping[str, nn.Module],
    measure: Measure,
    inputs: Callable[[Format[Any]], Hook],
    records: Records,
    prefix: Sequence[str] = (),
    formats: Sequence[str] = FORMATS,
    prunings: Sequence[str] = tuple(PRUNERS),
) -> None:
    """Dense, S, Q and both orders, from the weights that the layers have."""
    w = copies(layers)
    records.get(name_of(*prefix, "dense"), lambda: measure(w, None))
    for pruning in prunings:
        sparse(layers, measure, records, pruning, prefix)
    for form in formats:
        number = number_format(form)
        codes = {name: quantized(x, number) for name, x in w.items()}
        for setting in SETTINGS:
            hook = None if setting == "weights" else inputs(number)
            key = name_of(*prefix, "Q", setting, form)
            records.get(key, lambda codes=codes, hook=hook: measure(codes, hook))
            for pruning in prunings:
                both_orders(layers, measure, hook, records, setting, form, pruning, prefix)


def sparse(
    layers: Mapping[str, nn.Module],
    measure: Measure,
    records: Records,
    pruning: str,
    prefix: Sequence[str] = (),
) -> None:
    def run() -> Any:
        return measure({n: pruned(x, PRUNERS[pruning]) for n, x in copies(layers).items()}, None)

    records.get(name_of(*prefix, "S", pruning), run)


def both_orders(
    layers: Mapping[str, nn.Module],
    measure: Measure,
    hook: Hook | None,
    records: Records,
    setting: str,
    form: str,
    pruning: str,
    prefix: Sequence[str] = (),
) -> None:
    for order in ORDERS:

        def run(order: str = order) -> Any:
            number, pruner = number_format(form), PRUNERS[pruning]
            weights = {n: ordered(x, order, pruner, number) for n, x in copies(layers).items()}
            return measure(weights, hook)

        records.get(name_of(*prefix, order, setting, form, pruning), run)


def tuned(
    train: Callable[[str | None, int], tuple[Mapping[str, nn.Module], Measure]],
    inputs: Callable[[Format[Any]], Hook],
    records: Records,
    seeds: int,
    formats: Sequence[str] = FORMATS,
) -> None:
    """Dense and Q of every seed's dense network, S and both orders of its sparse ones.

    train: (pruning or None, seed) → the layers of a network that was fine-tuned so, and its
    measure.
    """
    for seed in range(seeds):
        for pruning in (None, *PRUNERS):
            prefix = ("tuned", pruning or "dense", f"seed{seed}")
            wanted = name_of(*prefix, "done")
            if wanted in records.found:
                continue
            layers, measure = train(pruning, seed)
            if pruning is None:
                one_shot(layers, measure, inputs, records, prefix, formats, ())
            else:
                sparse(layers, measure, records, pruning, prefix)
                for form in formats:
                    for setting in SETTINGS:
                        hook = None if setting == "weights" else inputs(number_format(form))
                        both_orders(layers, measure, hook, records, setting, form, pruning, prefix)
            records.get(wanted, lambda: True)


def tuned_cells(
    found: Mapping[str, Any],
    metric: str,
    name: str,
    higher_is_better: bool,
    seeds: int,
    formats: Sequence[str] = FORMATS,
) -> list[dict[str, Any]]:
    """Over the seeds of which all was measured, if there are at least two."""
    rows: list[dict[str, Any]] = []
    nets = ("dense", *PRUNERS)
    done = [
        seed
        for seed in range(seeds)
        if all(name_of("tuned", net, f"seed{seed}", "done") in found for net in nets)
    ]
    if len(done) < 2:
        return rows

    def each(net: str, *key: str) -> list[float]:
        names = [name_of("tuned", net, f"seed{seed}", *key) for seed in done]
        return [sum(found[n][metric]) / len(found[n][metric]) for n in names]

    for setting in SETTINGS:
        for form in formats:
            for pruning in PRUNERS:
                series = {"dense": each("dense", "dense"), "S": each(pruning, "S", pruning)}
                series["Q"] = each("dense", "Q", setting, form)
                for order in ORDERS:
                    series[order] = each(pruning, order, setting, form, pruning)
                plan = {"setting": setting, "format": form, "pruning": pruning}
                result = cell(series, name, higher_is_better)
                rows.append(plan | {"series": series, "orthogonality": result})
    return rows


def cell(
    series: Mapping[str, Sequence[float]], metric: str, higher_is_better: bool
) -> dict[str, Any]:
    """Threshold and excess of both orders from the values of dense, S, Q, S→Q and Q→S."""
    return orthogonality(
        metric,
        dense=series["dense"],
        parts={name: series[name] for name in ("S", "Q")},
        combined={name: series[name] for name in ORDERS},
        higher_is_better=higher_is_better,
    ).dicts()


def cells(
    found: Mapping[str, Any], metric: str, name: str, higher_is_better: bool
) -> list[dict[str, Any]]:
    """Of a one-shot grid: what was measured of every setting, format and pruning, over the batches
    of the evaluation.
    """
    rows = []
    for setting in SETTINGS:
        for form in FORMATS:
            for pruning in PRUNERS:
                keys = {"dense": "dense", "S": name_of("S", pruning)}
                keys["Q"] = name_of("Q", setting, form)
                keys |= {order: name_of(order, setting, form, pruning) for order in ORDERS}
                if not all(key in found for key in keys.values()):
                    continue
                series = {arm: found[key][metric] for arm, key in keys.items()}
                plan = {"setting": setting, "format": form, "pruning": pruning}
                rows.append(plan | {"orthogonality": cell(series, name, higher_is_better)})
    return rows


def grid_size(formats: Sequence[str] = FORMATS, seeds: int = 0) -> int:
    """Measurements of a one-shot grid, and of the fine-tuned networks."""
    pairs = len(formats) * len(SETTINGS)
    each = 2 + pairs + len(PRUNERS) * (2 + 2 * pairs)
    one = 1 + len(PRUNERS) + pairs * (1 + 2 * len(PRUNERS))
    return one + seeds * each
