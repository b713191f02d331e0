"""Both orders on real activations: errors of dot products, and how they grow through the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..batchnorm import Calibration, inputs
from ..evaluating import evaluating
from ..number_format import Format
from ..part import all_finite
from .layers import Layer
from .orders import Errors

ARMS = ("s", "q", "sq", "qs")
_ROWS = 1 << 14  # input vectors whose float64 copies are held at a time


class Refused(ValueError):
    """Calibration that the report itself refuses, not the model."""


@dataclass(frozen=True)
class Dots:
    """Errors of dot products, root mean squares over all outputs, in float64.

    ε^D = ⟨x, w⟩ − ⟨f(x), g(w)⟩, with the uncompressed model's activations x and without biases.

    outputs: how many dot products.   reference: of ⟨x, w⟩.
    s: pruned weights alone.   q, sq, qs: weights and activations quantized.
    interaction: of ε^D(q, q)|_P, over the pruned positions P alone, in the exact identity
        ε^D(q, q∘s) = ε^D(I, s) + ε^D(q, q) − ε^D(q, q)|_P.
    residual: largest deviation from the identity, over `reference`. Zero, up to rounding, where
        `Orders.pythagoras` is.
    excess_sq, excess_qs: share of the dot products with |ε^D(q, ·)| > |ε^D(I, s)| + |ε^D(q, q)|.
    """

    outputs: int
    reference: float
    s: float
    q: float
    sq: float
    qs: float
    interaction: float
    residual: float
    excess_sq: float
    excess_qs: float


@dataclass
class Sums:
    """Sums of squares, counts and the largest deviation, over the dot products seen so far."""

    outputs: int = 0
    reference: float = 0.0
    s: float = 0.0
    q: float = 0.0
    sq: float = 0.0
    qs: float = 0.0
    interaction: float = 0.0
    excess_sq: int = 0
    excess_qs: int = 0
    deviation: float = 0.0

    def add(self, other: Sums) -> None:
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, max(mine, theirs) if f.name == "deviation" else mine + theirs)

    def dots(self) -> Dots | None:
        """Root mean squares; None without outputs (an embedding)."""
        if not self.outputs:
            return None
        names = ("reference", *ARMS, "interaction")
        rms = {name: math.sqrt(getattr(self, name) / self.outputs) for name in names}
        return Dots(
            outputs=self.outputs,
            residual=self.deviation / (rms["reference"] or 1.0),
            excess_sq=self.excess_sq / self.outputs,
            excess_qs=self.excess_qs / self.outputs,
            **rms,
        )


def dot_errors(layer: Layer, x: Tensor, quantizer: Format[Any] | None) -> Sums:
    """The errors of one layer's dot products on input x."""
    sums = Sums()
    columns = layer.columns(x)
    codes = columns if quantizer is None else quantizer.quantize(columns)
    w, s, q, sq, qs = (layer.rows[name].double() for name in ("dense", *ARMS))
    on_pruned = q * (s == 0)
    for exact, code in zip(columns.split(_ROWS), codes.split(_ROWS), strict=True):
        exact, code = exact.double(), code.double()
        y, e_s = layer.product(exact, w), layer.product(exact, w - s)
        e_q, e_sq, e_qs = (y - layer.product(code, rows) for rows in (q, sq, qs))
        interaction = e_s - layer.product(code, on_pruned)
        both = e_s.abs() + e_q.abs()
        sums.add(
            Sums(
                y.numel(),
                squares(y),
                squares(e_s),
                squares(e_q),
                squares(e_sq),
                squares(e_qs),
                squares(interaction),
                int((e_sq.abs() > both).sum()),
                int((e_qs.abs() > both).sum()),
                float((e_sq - (e_s + e_q - interaction)).abs().max()),
            )
        )
    return sums


def squares(e: Tensor) -> float:
    return float(e.square().sum())


@dataclass
class Track:
    """How far one tensor of the forward pass (a layer's output, or the model's) is from that of the
    uncompressed model.
    """

    name: str
    calls: int = 0
    size: float = 0.0  # Σ ‖y‖²
    squares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ARMS, 0.0))
    kept: list[Tensor] = field(default_factory=list)  # y in the pass of the uncompressed model
    at: int = 0

    def see(self, arm: str | None, y: Tensor) -> None:
        if arm is None:
            self.kept.append(y)
            self.calls += 1
            self.size += squares(y.double())
            return
        if self.at >= len(self.kept) or self.kept[self.at].shape != y.shape:
            raise self.differs()
        self.squares[arm] += squares(self.kept[self.at].double() - y.double())
        self.at += 1

    def rewind(self, arm: str | None) -> None:
        if arm is not None and self.at != len(self.kept):
            raise self.differs()
        self.at = 0

    def differs(self) -> Refused:
        return Refused(
            f"order_report: {self.name} was not called in the same way again. Calibration runs once"
            " as it is and once for each order, with the same batches each time."
        )

    def errors(self) -> Errors | None:
        """‖y − y_arm‖ / ‖y‖ over all calls; None without calls."""
        if not self.calls:
            return None
        return Errors(*(math.sqrt(self.squares[arm] / (self.size or 1.0)) for arm in ARMS))


def follow(
    model: nn.Module, layers: Sequence[Layer], data: Calibration, quantizer: Format[Any] | None
) -> tuple[list[tuple[Dots | None, Errors | None]], tuple[Dots | None, Errors | None]]:
    """Run the model on each batch, once as it is and once with each version of all weights.

    The model is in evaluation mode meanwhile and not changed: hooks replace what its layers give.
    Activations are quantized in the versions that quantize weights.

    Returns: dot products and relative errors of each layer's output; of all layers together and of
    the model's own output (None where that is no floating-point tensor).
    """
    arm: str | None = None
    sums = [Sums() for _ in layers]
    tracks = [Track(repr(layer.name)) for layer in layers]
    whole = Track("the model")

    def of(layer: Layer, total: Sums, track: Track) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
            x = args[0] if args else kwargs["input"]
            if arm is None:
                if not all_finite(y):
                    raise Refused(f"order_report: {track.name} gives NaN or inf on this data.")
                if not isinstance(module, nn.Embedding):
                    total.add(dot_errors(layer, x, quantizer))
                track.see(arm, y)
                return None
            y = layer.output(x, arm, None if arm == "s" else quantizer, y)
            track.see(arm, y)
            return y

        return hook

    def at_end(module: nn.Module, args: Any, y: Any) -> None:
        if isinstance(y, Tensor) and y.is_floating_point():
            whole.see(arm, y)

    batches = 0
    with ExitStack() as stack, torch.no_grad(), evaluating(model):
        for layer, total, track in zip(layers, sums, tracks, strict=True):
            hook = of(layer, total, track)
            stack.callback(layer.module.register_forward_hook(hook, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(at_end).remove)
        for call in calls(model, data):
            batches += 1
            for arm in (None, *ARMS):
                call()
                for track in (*tracks, whole):
                    track.rewind(arm)
            for track in (*tracks, whole):
                track.kept.clear()
    if not batches:
        raise Refused(
            "order_report: calibration got no batch: a loader that is not empty is needed."
        )
    missed = [layer.name for layer, track in zip(layers, tracks, strict=True) if not track.calls]
    if missed:
        raise Refused(
            f"order_report: the data never reaches {missed}; a layer whose weight the model uses "
            "without calling the layer counts as not reached. Leave them out by `layers`, or give "
            "data that does."
        )
    together = Sums()
    for total in sums:
        together.add(total)
    return [(x.dots(), track.errors()) for x, track in zip(sums, tracks, strict=True)], (
        together.dots(),
        whole.errors(),
    )


def calls(model: nn.Module, data: Calibration) -> Iterator[Callable[[], object]]:
    """For each batch, or for the calibration function, a call that runs the model on it.

    Raises:
        TypeError, ValueError: no batches, one with NaN or inf, or that the model cannot take; with
            its number.
    """
    if callable(data):
        yield partial(_call, partial(data, model), "the calibration function fails")
        return
    for count, args, kwargs in inputs(model, data):
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        shapes = ", ".join(str(tuple(x.shape)) for x in given)
        trouble = f"calibration batch {count}, shape {shapes}, does not run through the model"
        yield partial(_call, partial(model, *args, **kwargs), trouble)


def _call(run: Callable[[], object], trouble: str) -> object:
    try:
        return run()
    except Refused:
        raise
    except Exception as cause:
        raise ValueError(f"order_report: {trouble}: {cause}") from cause
