"""`order_report`: which order of pruning and quantization, layer by layer."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..batchnorm import Calibration
from ..metrics import table, written
from ..nm import NM
from ..number_format import Format
from ..part import Part
from ..selection import Pattern, named_tensors, select, unwrap
from ..views import Matrix, View
from .calibrated import ARMS, Dots, follow
from .layers import FOLLOWED, Layer
from .orders import Errors, Orders, Pruner, both_orders, check_format, check_pruner, compare, total

_HEADER = ("", "nests", "S", "Q", "S→Q", "Q→S", "Q→S/S→Q", "swapped", "tied", "L1/bound")
_DOTS = ("", "", "S", "Q", "S→Q", "Q→S", "interaction", "excess S→Q", "excess Q→S")


@dataclass(frozen=True)
class LayerReport:
    """What was measured of one weight: `weights`, and with data `dots` and `propagated`.

    propagated: ‖y − y'‖ / ‖y‖ of the layer's output, all earlier layers and this one compressed;
        in the total of the model's own output. None for an embedding's dot products, without data,
        and for a model whose output is no tensor.
    """

    weights: Orders
    dots: Dots | None = None
    propagated: Errors | None = None


@dataclass(frozen=True)
class OrderReport:
    """Layers and their total. `print` it, write it as JSON, or draw it."""

    sparse: str
    quantizer: str
    activations: str | None
    view: str
    layers: tuple[LayerReport, ...]
    total: LayerReport

    def dicts(self) -> dict[str, Any]:
        """Everything as plain dictionaries, the derived shares and ratios included."""
        plan = {
            name: getattr(self, name) for name in ("sparse", "quantizer", "activations", "view")
        }
        return plan | {"layers": [_plain(x) for x in self.layers], "total": _plain(self.total)}

    def json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON; also written to `path` if given."""
        return written(json.dumps(self.dicts(), indent=1), path)

    def figure(self, path: str | os.PathLike[str]) -> None:
        """Draw it, in the format of the path's suffix (.png, .svg, .pdf).

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .figures import draw_orders

        draw_orders(self, path)

    def __str__(self) -> str:
        rows = (*self.layers, self.total)
        lines = [
            f"S = {self.sparse}, Q = {self.quantizer}, weights as {self.view} shows them.",
            "Relative L2 error of the weights; swapped survivors, weights in a tie, and the L1 "
            "error of Q→S over its bound:",
            table([_HEADER, *(_weights_row(row.weights) for row in rows)]),
        ]
        if any(row.dots for row in rows):
            shown = self.activations or "not quantized"
            lines += [
                f"Root mean square error of dot products, over that of the outputs; activations: "
                f"{shown}:",
                table([_DOTS, *(_dots_row(row) for row in rows if row.dots)]),
            ]
        if any(row.propagated for row in rows):
            head = ("", "", "S", "Q", "S→Q", "Q→S")
            cells = [
                (row.weights.name, "", *(f"{x:.4f}" for x in _four(row.propagated)))
                for row in rows
                if row.propagated
            ]
            lines += [
                "Relative error of outputs, earlier layers compressed (total: the model's output):",
                table([head, *cells]),
            ]
        return "\n".join(lines)


def _four(errors: Errors) -> tuple[float, ...]:
    return tuple(getattr(errors, arm) for arm in ARMS)


def _weights_row(x: Orders) -> tuple[str, ...]:
    errors = (f"{e / (x.norm or 1.0):.4f}" for e in _four(x.l2))
    shares = (f"{x.l2.ratio:.4f}", f"{x.swapped:.2%}", f"{x.tied:.2%}", f"{x.tightness:.3f}")
    return (x.name, "yes" if x.nests else "no", *errors, *shares)


def _dots_row(row: LayerReport) -> tuple[str, ...]:
    x = row.dots
    assert x is not None
    values = (*(getattr(x, arm) for arm in ARMS), x.interaction)
    errors = (f"{value / (x.reference or 1.0):.4f}" for value in values)
    return (row.weights.name, "", *errors, f"{x.excess_sq:.1%}", f"{x.excess_qs:.1%}")


def _plain(row: LayerReport) -> dict[str, Any]:
    x = row.weights
    derived = {"swapped": x.swapped, "tied": x.tied, "tightness": x.tightness}
    derived |= {"ratio": x.l2.ratio}
    for name in ("l1", "l2", "linf"):
        derived[f"{name}_triangle"] = getattr(x, name).triangle
    return {
        "weights": asdict(x) | derived,
        "dots": None if row.dots is None else asdict(row.dots),
        "propagated": None if row.propagated is None else asdict(row.propagated),
    }


@torch.no_grad()
def order_report(
    model: nn.Module | Tensor,
    sparse: Part[Any],
    quantizer: Part[Any],
    data: Calibration | None = None,
    *,
    layers: Pattern | Sequence[Pattern] | None = None,
    view: View = Matrix(),  # noqa: B008  # a value
    activations: Part[Any] | Literal["same"] | None = "same",
) -> OrderReport:
    """How much pruning s and quantization q harm each other, and which order harms less.

    Measures, for each layer and in total, s(w), q(w), q(s(w)) (S→Q) and s(q(w)) (Q→S) against w,
    with what bounds them (`Orders`). With data also the dot products on real activations (`Dots`)
    and how errors grow through the model (`LayerReport.propagated`). Neither order is always the
    better one: `Orders.certain` says where S→Q cannot lose, on weights. On outputs either can win.

    Args:
        model: or a single tensor. Not changed.
        sparse: `Sparse` or `NM`: keeps the largest magnitudes.
        quantizer: `Int`, `HBFP` or `MX`. Scales that pruning may change (`Int(scale="best")`, zero
            points) void the identities, which `pythagoras` shows.
        data: calibration: an iterable of batches, each a tensor, a mapping of keyword arguments or
            a sequence that starts with the input; or a function that runs the model. Each batch
            runs five times, in evaluation mode.
        layers: patterns of weights as in `LC`. By default the weights of linear and one- and
            two-dimensional convolution layers except the first convolution and the last linear
            layer; embeddings only if named.
        view: how pruner and format see each weight. Blocks and groups lie along the last axis of
            what it shows. `Matrix()`: a convolution weight (out, in, kh, kw) as rows of in·kh·kw,
            kernel positions fastest, so that a block lies within one dot product. The patches of
            the activations are laid out, and quantized, in the same order.
        activations: format for the inputs of each layer where weights are quantized; "same": the
            quantizer, None: they stay as they are.

    Cost: a few passes over the weights. With data five forward passes and the products of each
        layer once in float64; activations of convolutions are quantized as patches, kh·kw times as
        many numbers as the layer has inputs. Holds one batch's layer outputs.

    Raises:
        TypeError: `sparse` does not keep the largest weights, a format does not quantize, or data
            is no iterable of batches.
        ValueError: patterns match nothing, no layer is left, groups do not fit a layer, weights or
            data have NaN or inf, a batch does not run through the model, data never reaches a
            layer, calibration runs differ. Each names the layer or the batch.

    Source: papers/sparsity-quantization-order.md, sections 7 and 11.
    """
    pruner, form = check_pruner(sparse), check_format(quantizer, "quantizer")
    chosen = quantizer if activations == "same" else activations
    inputs = None if chosen is None else check_format(chosen, "activations")
    plan = (str(sparse), str(quantizer), None if chosen is None else str(chosen), str(view))
    if isinstance(model, Tensor):
        if data is not None:
            raise ValueError("order_report: `data` needs a model, got a single tensor.")
        alone, _ = _compared("tensor", model, pruner, form, view)
        return OrderReport(*plan, (LayerReport(alone),), LayerReport(total([alone])))
    inner = unwrap(model)
    rows, followed = [], []
    for name, weight in _selected(inner, sparse, layers).items():
        row, versions = _compared(name, weight.detach(), pruner, form, view)
        rows.append(row)
        if data is not None:
            followed.append(Layer(name, _owner(inner, name, weight), view, versions))
    if data is None:
        return OrderReport(*plan, tuple(map(LayerReport, rows)), LayerReport(total(rows)))
    each, whole = follow(inner, followed, data, inputs)
    reports = tuple(LayerReport(row, *seen) for row, seen in zip(rows, each, strict=True))
    return OrderReport(*plan, reports, LayerReport(total(rows), *whole))


def _compared(
    name: str, w: Tensor, sparse: Pruner, quantizer: Format[Any], view: View
) -> tuple[Orders, dict[str, Tensor]]:
    """The row of one weight, and its versions as the view shows them."""
    shown = view.show(w) if w.dim() > 1 else w
    if isinstance(sparse, NM) and sparse.m > sparse.groups.lines(shown.shape)[1]:
        raise ValueError(
            f"order_report: {name!r} as {view} shows it, shape {tuple(shown.shape)}, is shorter "
            f"than one group of {sparse}. Leave it out by `layers`, or use another `view`."
        )
    try:
        results = both_orders(shown, sparse, quantizer)
        row = compare(name, shown, sparse, quantizer, results)
    except (ValueError, TypeError) as cause:
        raise type(cause)(
            f"order_report: {name!r} as {view} shows it, shape {tuple(shown.shape)}: {cause}"
        ) from cause
    return row, dict(zip(("dense", *ARMS), (shown, *results), strict=True))


def _selected(
    model: nn.Module, sparse: Part[Any], layers: Pattern | Sequence[Pattern] | None
) -> dict[str, nn.Parameter]:
    """The weights that the patterns match, or those compressed by default, in the model's order."""
    if layers is None:
        patterns: tuple[Pattern, ...] = _default(model)
        if not patterns:
            raise ValueError(
                "order_report: nothing is left of the model without its first convolution, its "
                "last linear layer and embeddings. Say which by `layers`."
            )
    else:
        patterns = (layers,) if isinstance(layers, str) or callable(layers) else tuple(layers)
        if not patterns:
            raise ValueError("order_report: `layers` is empty. Give at least one pattern.")
    tasks: Any = {patterns: sparse}  # a tuple of patterns is one key
    found = {name: p for task in select(model, tasks) for name, p in task.tensors.items()}
    return {name: p for name, p in named_tensors(model)[0].items() if name in found}


def _default(model: nn.Module) -> tuple[str, ...]:
    """Names of the weights of linear and convolution layers, but for the first convolution, the
    last linear layer and what is tied to either or to an embedding.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    modules = [x for x in model.modules() if isinstance(x, kinds)]
    convolutions = [x for x in modules if not isinstance(x, nn.Linear)]
    linear = [x for x in modules if isinstance(x, nn.Linear)]
    embeddings = [x for x in model.modules() if isinstance(x, nn.Embedding | nn.EmbeddingBag)]
    spared = {id(x.weight) for x in (*convolutions[:1], *linear[-1:], *embeddings)}
    wanted = {id(x.weight) for x in modules} - spared
    return tuple(name for name, p in named_tensors(model)[0].items() if id(p) in wanted)


def _owner(model: nn.Module, name: str, weight: nn.Parameter) -> nn.Module:
    """The one layer whose weight it is."""
    owners = [x for x in model.modules() if getattr(x, "weight", None) is weight]
    if len(owners) == 1 and isinstance(owners[0], FOLLOWED):
        return owners[0]
    kinds = [type(x).__name__ for x in owners]
    raise ValueError(
        f"order_report: {name!r} is the weight of {kinds or 'no layer'}. Data is followed through "
        "weights of one linear, one- or two-dimensional convolution or embedding layer: leave it "
        "out by `layers`, or leave `data` out."
    )
