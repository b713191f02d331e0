"""What a compressed model costs and how far it is from its weights: one report, counted from what
would be stored.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .atomic import replacing
from .evaluating import watched
from .part import Ops
from .selection import clean, named_tensors, unwrap
from .task import Task


@dataclass(frozen=True)
class Row:
    """One task (a tensor or a joint group), or what is not compressed, or the total.

    weights: how many numbers.   bits: stored size.
    bits_per_weight, ratio32, ratio16: of it, against float32 and float16 storage.
    mults, adds: for one example; None where the number of positions is not known (convolutions
    without example_inputs) or has no
    meaning (embeddings).   dense_mults: the same for the plain layer.
    gap: ‖w − Δ(θ)‖ / ‖w‖ now.
    error: ‖w₀ − Δ(θ)‖ / ‖w₀‖ for the weights w₀ that the run started from.
    """

    name: str
    parts: str
    weights: int
    bits: int
    mults: int | None = None
    adds: int | None = None
    dense_mults: int | None = None
    gap: float | None = None
    error: float | None = None

    @property
    def bits_per_weight(self) -> float:
        return self.bits / self.weights if self.weights else 0.0

    @property
    def ratio32(self) -> float:
        return 32 * self.weights / self.bits if self.bits else float("inf")

    @property
    def ratio16(self) -> float:
        return 16 * self.weights / self.bits if self.bits else float("inf")


_COLUMNS = ("name", "parts", "weights", "bits", "bits_per_weight", "ratio32", "ratio16")
_COSTS = ("mults", "adds", "dense_mults", "gap", "error")


@dataclass(frozen=True)
class Report:
    """Rows per task, what stays uncompressed, and the total. `print` it, or write it as JSON or
    CSV.

    Uncompressed are all other floating-point entries of the model's state dict (biases, BatchNorm,
    other weights) at their own size. The total counts both; no file header is counted here.
    """

    rows: tuple[Row, ...]
    uncompressed: Row
    total: Row

    def dicts(self) -> list[dict[str, Any]]:
        """The rows, then uncompressed and total, as plain dictionaries."""
        every = (*self.rows, self.uncompressed, self.total)
        return [{key: getattr(row, key) for key in (*_COLUMNS, *_COSTS)} for row in every]

    def json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON; also written to `path` if given."""
        return written(json.dumps(self.dicts(), indent=1), path)

    def csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """As CSV; also written to `path` if given."""
        out = io.StringIO()
        writer = csv.DictWriter(out, (*_COLUMNS, *_COSTS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.dicts())
        return written(out.getvalue(), path)

    def __str__(self) -> str:
        header = (
            "",
            "parts",
            "weights",
            "bits",
            "bits/w",
            "×f32",
            "×f16",
            "mults",
            "adds",
            "gap",
            "error",
        )
        return table(
            [header]
            + [
                (
                    row.name,
                    row.parts,
                    f"{row.weights:,}",
                    f"{row.bits:,}",
                    f"{row.bits_per_weight:.3f}",
                    f"{row.ratio32:.2f}",
                    f"{row.ratio16:.2f}",
                    "–" if row.mults is None else f"{row.mults:,}",
                    "–" if row.adds is None else f"{row.adds:,}",
                    "–" if row.gap is None else f"{row.gap:.4f}",
                    "–" if row.error is None else f"{row.error:.4f}",
                )
                for row in (*self.rows, self.uncompressed, self.total)
            ]
        )


def table(lines: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def written(text: str, path: str | os.PathLike[str] | None) -> str:
    """`text`, which is also written to `path` if there is one."""
    if path is not None:
        with replacing(Path(path)) as file:
            file.write(text.encode())
    return text


def report(
    model: nn.Module,
    tasks: Iterable[Task],
    positions: Mapping[int, int],
    started: Mapping[str, Sequence[Tensor]],
) -> Report:
    """Count everything. `positions`: for each parameter's id, its layer's output positions for one
    example.
    """
    tasks = list(tasks)
    rows = tuple(_row(task, positions, started.get(task.name, ())) for task in tasks)
    owned = {name for task in tasks for name in task.names}
    _, aliases = named_tensors(model)
    entries = {clean(name): x for name, x in unwrap(model).state_dict().items()}
    rest = [
        x
        for name, x in entries.items()
        if isinstance(x, Tensor) and x.is_floating_point()  # a module's extra state may be anything
        if name not in owned and name not in aliases
    ]
    weights = sum(x.numel() for x in rest)
    uncompressed = Row(
        "uncompressed", "", weights, sum(8 * x.numel() * x.element_size() for x in rest)
    )
    sums = {
        key: _total([getattr(row, key) for row in rows]) for key in ("mults", "adds", "dense_mults")
    }
    total = Row(
        "total",
        "",
        sum(row.weights for row in rows) + weights,
        sum(row.bits for row in rows) + uncompressed.bits,
        **sums,
        gap=overall_gap(tasks),
    )
    return Report(rows, uncompressed, total)


def overall_gap(tasks: Iterable[Task]) -> float:
    """‖w − Δ(θ)‖ / ‖w‖ over all tasks together."""
    norms = [task.norms() for task in tasks]
    distance, size = sum(d for d, _ in norms), sum(s for _, s in norms)
    return float((distance / size) ** 0.5) if size > 0 else float(distance**0.5)


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _row(task: Task, positions: Mapping[int, int], started: Sequence[Tensor]) -> Row:
    seen = {positions.get(id(p)) for p in task.parameters}
    ops: Ops | None = None
    dense = _total(
        [n * p.numel() if (n := positions.get(id(p))) else None for p in task.parameters]
    )
    if len(task.parameters) == 1 and (where := seen.pop()) is not None:
        ops = task.part.ops(task.state, where)
    return Row(
        task.name,
        str(task.part),
        task.size,
        task.part.bits(task.state),
        None if ops is None else ops.mults,
        None if ops is None else ops.adds,
        dense,
        task.gap(),
        _error(started, task.delta),
    )


def _error(started: Sequence[Tensor], delta: Sequence[Tensor]) -> float | None:
    if not started:
        return None
    pairs = list(zip(started, delta, strict=True))
    distance = sum(float((w.double() - d.double()).square().sum()) for w, d in pairs)
    size = sum(float(w.double().square().sum()) for w, _ in pairs)
    return float((distance / size) ** 0.5) if size > 0 else float(distance**0.5)


def measure_positions(model: nn.Module, example_inputs: Any = None) -> dict[int, int]:
    """Output positions of one example for each weight of a linear or convolution layer, by the
    parameter's id.

    Without examples a linear layer has one, and convolutions are left out. With `example_inputs`, a
    tensor or a tuple of arguments with the batch as first axis, layers whose `forward` the model
    does not call (attention uses its output layer's weight directly) are left out. For a transposed
    convolution the positions are those of its input: each meets every weight once.
    """
    inner = unwrap(model)
    if example_inputs is None:
        return {id(m.weight): 1 for m in inner.modules() if isinstance(m, nn.Linear)}

    def count(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        over = output
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            channels, over = module.in_channels, args[0] if args else kwargs["input"]
        assert isinstance(channels, int) and isinstance(module.weight, Tensor)
        here = over.numel() // channels // batch
        seen[id(module.weight)] = seen.get(id(module.weight), 0) + here  # may be used repeatedly

    seen: dict[int, int] = {}
    first = example_inputs[0] if isinstance(example_inputs, tuple) else example_inputs
    batch = first.shape[0]
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    handles = [
        m.register_forward_hook(count, with_kwargs=True)
        for m in inner.modules()
        if isinstance(m, layers)
    ]
    watched(inner, example_inputs, handles)
    return seen
