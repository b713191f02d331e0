"""Pruned weights on the grid of a number format: which to keep, and at which scales."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..formats import Int
from ..hbfp import HBFP
from ..mx import MX
from ..nm import NM
from ..number_format import Format, nests
from ..part import squared_error
from ..sparse import Sparse, SparseState, magnitudes
from .registry import register_then
from .shared_support import separate

_STEPS = 20

Found = tuple[SparseState, Any]


def _exact(sparse: Sparse | NM, quantizer: Format[Any]) -> bool:
    """Each group has one scale whatever the shape, the best one, and a symmetric grid."""
    if not (quantizer.exact and quantizer.keeps_zero):
        return False
    if isinstance(quantizer, Int):
        return separate(sparse, quantizer)
    assert isinstance(quantizer, HBFP | MX)
    if not isinstance(sparse, NM) or sparse.axis != quantizer.axis:
        return False
    return quantizer.block % sparse.m == 0


@register_then(Sparse, Int, exact=_exact)
@register_then(NM, Int, exact=_exact)
@register_then(Sparse, HBFP, exact=_exact)
@register_then(NM, HBFP, exact=_exact)
@register_then(Sparse, MX, exact=_exact)
@register_then(NM, MX, exact=_exact)
def sparse_format(
    a: Sparse | NM,
    b: Format[Any],
    w: Tensor,
    warm: Found | None,
    mu: float | None,
    importance: Tensor | None,
) -> Found:
    """Weights on the grid of b, at most κ of them (or n in every m) not zero.

    For given scales, storing the nearest value q in place of 0 lowers the error by h q (2 w − q),
    so the largest gains are the exact choice (papers/sparsity-quantization-order.md, section 9).

    Where each group lies in one scale block, the grid is symmetric and all weights count the same,
    the gain grows with |w|: the largest |w| are the best support for every scale. They are kept
    and quantized: exact given the scales that b finds for them, and without that condition if
    these are the best ones.

    Otherwise local: choice and scales are improved in turn while the error falls, from the scales
    of the largest |w| (of the largest h w²), of all weights and of the warm start. A block's scale
    is that of its survivors; one that has none is weighed at the scale of all its weights, and may
    come back. The result is never worse than the largest |w| (h w²), quantized.

    `Sparse` stores no survivor that became 0. `NM` does, so that all groups are full.
    """
    best = _on(a, b, w, a.select(magnitudes(w, importance)), importance)
    if importance is None and b.keeps_zero and nests(a, b, w.shape):
        return best
    least = squared_error(w, b.reconstruct(best[1]), importance)
    ids = b.block_ids(w.shape, w.device).reshape(-1)
    dense = b.solve(w, None, None, importance)
    for scales in (_revived(b, w, best, ids, importance), dense, warm and warm[1]):
        reached = math.inf
        for _ in range(_STEPS if scales is not None else 0):
            q = b.reconstruct(b.with_scales(w, scales)).double()
            gain = q * (2 * w.double() - q)
            if importance is not None:
                gain = gain * importance
            found = _on(a, b, w, a.select(gain), importance)
            error = squared_error(w, b.reconstruct(found[1]), importance)
            if error < least:
                best, least = found, error
            if not error < reached:
                break
            reached = error
            scales = _revived(b, w, found, ids, importance)
    return best


def _on(
    a: Sparse | NM, b: Format[Any], w: Tensor, positions: Tensor, importance: Tensor | None
) -> Found:
    """The weights at these positions, quantized with their own scales."""
    flat = w.reshape(-1)
    masked = torch.zeros_like(flat)
    masked[positions] = flat[positions]
    state = b.solve(masked.view(w.shape), None, None, importance)
    values = b.reconstruct(state).reshape(-1)[positions]
    if isinstance(a, Sparse):
        positions, values = positions[values != 0], values[values != 0]
    return SparseState(positions, values, w.shape), state


def _revived(
    b: Format[Any], w: Tensor, found: Found, ids: Tensor, importance: Tensor | None
) -> Any:
    """The state with the scales of the survivors, or of all weights of a block without any."""
    sparse, state = found
    kept = torch.zeros_like(ids, dtype=torch.bool)
    kept[sparse.positions] = True
    alive = torch.zeros_like(kept).index_fill_(0, ids[sparse.positions], True)[ids]
    if bool(alive.all()):
        return state
    flat = torch.where(kept | ~alive, w.reshape(-1), 0)
    return b.solve(flat.view(w.shape), None, None, importance)
