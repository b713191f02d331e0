"""Compression schemes as text: `binary + sparse 2%`, `sparse 30% > int 4`, `lowrank 25%`.

`+` adds parts, `>` compresses what a part left continuous (`.then`) and binds tighter. Parts:

    binary   ternary   int BITS   kmeans K      quantization, a scale or codebook per layer
    sparse P%   nm N:M                          the largest weights, exact
    lowrank P%                                  rank P % of the layer's smaller side, at least 1
    rank ALPHA                                  rank learned at a price per stored number

All values are stored in 16 bits. The same scheme holds for every convolution and linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lc_compress import NM, Binary, Int, KMeans, LowRank, Matrix, Part, Sparse, Ternary
from lc_compress import RankSelection as Rank

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)  # whose weights are compressed
_HALF = torch.float16
_QUANTIZERS, _SPARSE = ("binary", "ternary", "int", "kmeans"), ("sparse", "nm")


def _lowrank(share: str, shape: torch.Size, value_dtype: torch.dtype | None) -> Part[Any]:
    side = min(shape[0], shape[1:].numel())
    return LowRank(max(1, round(_percent(share) * side)), value_dtype)


def _percent(text: str) -> float:
    share = float(text[:-1]) if text.endswith("%") else 0.0
    if not 0 < share <= 100:
        raise ValueError("P% is above 0 and at most 100 %")
    return share / 100


_PARTS: dict[str, Callable[[str, torch.Size, torch.dtype | None], Part[Any]]] = {
    "binary": lambda x, shape, dtype: Binary(value_dtype=dtype),
    "ternary": lambda x, shape, dtype: Ternary(value_dtype=dtype),
    "int": lambda x, shape, dtype: Int(int(x), value_dtype=dtype),
    "kmeans": lambda x, shape, dtype: KMeans(int(x), value_dtype=dtype),
    "sparse": lambda x, shape, dtype: Sparse(density=_percent(x), value_dtype=dtype),
    "nm": lambda x, shape, dtype: NM(*map(int, x.split(":")), axis=1, value_dtype=dtype),
    "lowrank": _lowrank,
    "rank": lambda x, shape, dtype: Rank(float(x), value_dtype=dtype, schemes=(Matrix(),)),
}
_WITHOUT = ("binary", "ternary")


def part(scheme: str, shape: torch.Size) -> Part[Any]:
    """The part for weights of this shape.

    Raises:
        SystemExit: no such part or argument; the message lists what there is.
    """
    total: Part[Any] | None = None
    for term in scheme.split("+"):
        names = [name.strip() for name in term.split(">")]
        chained: Part[Any] | None = None
        for i, name in enumerate(names):
            # what a later part compresses need not be rounded first
            made = _single(scheme, name, shape, _HALF if i + 1 == len(names) else None)
            chained = made if chained is None else chained.then(made)
        assert chained is not None
        total = chained if total is None else total + chained
    assert total is not None
    return total.over(Matrix()) if "lowrank" in scheme and len(shape) > 2 else total


def _single(scheme: str, text: str, shape: torch.Size, dtype: torch.dtype | None) -> Part[Any]:
    name, _, argument = text.partition(" ")
    if not text:
        raise SystemExit(f"--scheme {scheme!r}: a part is missing beside + or >.")
    try:
        if name not in _PARTS or (name in _WITHOUT) != (argument == ""):
            raise ValueError(text)
        return _PARTS[name](argument.strip(), shape, dtype)
    except (ValueError, TypeError) as cause:
        raise SystemExit(
            f"--scheme {scheme!r}: {text!r} is none of binary, ternary, int BITS, kmeans K, "
            f"sparse P%, nm N:M, lowrank P%, rank ALPHA ({cause})."
        ) from cause


def family(scheme: str) -> str:
    """What kinds of parts: Q, L, S, in a sum Q+S, in a chain S>Q."""
    kinds = []
    for term in scheme.split("+"):
        kinds.append(">".join(_kind(name.split()[0]) for name in term.split(">")))
    return "+".join(sorted(kinds, key="QLS".find))


def _kind(name: str) -> str:
    return "Q" if name in _QUANTIZERS else "S" if name in _SPARSE else "L"


def tasks(model: nn.Module, scheme: str) -> dict[Any, Part[Any]]:
    """{name of a weight: its part} for every convolution and linear layer; shared weights once."""
    found: dict[Any, Part[Any]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[f"{name}.weight"] = part(scheme, module.weight.shape)
    return found
