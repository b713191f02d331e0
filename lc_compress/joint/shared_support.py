"""Pruned and quantized on one support: what the quantizer can represent decides what is kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..binary import Binary, BinaryState, Ternary, TernaryState
from ..codebook import FixedCodebook, PowersOfTwo
from ..nm import NM
from ..part import Part, working
from ..sparse import Sparse, SparseState, where
from .registry import register_then


def separate(sparse: Any, quantizer: Any) -> bool:
    """One learned scale, or groups that never lie across two scales, whatever the shape."""
    if quantizer.axis is None:
        return quantizer.group is None
    axes = (sparse.axis, quantizer.axis) if isinstance(sparse, NM) else (0, 0)
    return axes[0] != axes[1] and (axes == (-1, 0) or (axes[0] < 0) == (axes[1] < 0))


def _exact(sparse: Any, quantizer: Any) -> bool:
    return separate(sparse, quantizer) and quantizer.value_dtype is None


def _always(sparse: Any, quantizer: Any) -> bool:
    return True


def _given(sparse: Any, quantizer: Any) -> bool:
    return quantizer.scale is not None


def _learned(sparse: Any, quantizer: Any) -> bool:
    return quantizer.scale is None


def _kept(delta: Tensor, positions: Tensor) -> SparseState:
    return SparseState(positions, delta.reshape(-1)[positions], delta.shape)


@register_then(Sparse, FixedCodebook, weighted=_always)
@register_then(NM, FixedCodebook, weighted=_always)
@register_then(Sparse, PowersOfTwo, weighted=_always)
@register_then(NM, PowersOfTwo, weighted=_always)
@register_then(Sparse, Binary, applies=_given, weighted=_always)
@register_then(NM, Binary, applies=_given, weighted=_always)
@register_then(Sparse, Ternary, applies=_given, weighted=_always)
@register_then(NM, Ternary, applies=_given, weighted=_always)
def sparse_codebook(
    a: Sparse | NM,
    b: Part[Any],
    w: Tensor,
    warm: tuple[SparseState, Any] | None,
    mu: float | None,
    importance: Tensor | None,
) -> tuple[SparseState, Any]:
    """Weights that are zero or one of given values (a fixed codebook, powers of two, binary or
    ternary of a given scale), at most κ of them (or n in every m) not zero; exact,
    weighted too.

    Proof. Storing the value q in place of 0 lowers the error by h (w² − (w − q)²) =
    h q (2 w − q), most for the q nearest to w. So each weight has one best gain, and a support
    gains the sum of those in it: the largest ones win, and none that is not positive.
    O(N log K) and a selection.
    """
    state = b.solve(w, None, mu, importance)
    delta = b.reconstruct(state)
    q = delta.double()
    gain = q * (2 * w.double() - q)
    if importance is not None:
        gain = gain * importance
    positions = a.select(gain)
    positions = positions[gain.reshape(-1)[positions] > 0]
    return _kept(delta, positions), state


@register_then(Sparse, Ternary, applies=_learned, exact=_exact)
@register_then(NM, Ternary, applies=_learned, exact=_exact)
def sparse_ternary(
    a: Sparse | NM,
    b: Ternary,
    w: Tensor,
    warm: tuple[SparseState, TernaryState | BinaryState] | None,
    mu: float | None,
    importance: Tensor | None,
) -> tuple[SparseState, TernaryState]:
    """Weights −a, 0 or a, at most κ of them (or n in every m) not zero. Exact for one scale, and
    for groups along another axis than that of the scales, where every weight counts the same.

    Proof. For a given a > 0 a weight gains a (2|w| − a) by not being zero, more for larger |w|:
    whatever a is, the best support lies in the κ largest |w| (the n largest of each group). Among
    these every choice is allowed, which is `Ternary` with the other weights set to zero. Where
    every group has one scale, the weights of each scale are such a problem of their own.

    With importance h, or scales that share a budget, the gain h a (2|w| − a) orders the weights
    differently for every a. Then local, from the weights of largest h w²: their best scale, a few
    multiples of it and the warm scale are tried, and from the best of them support and scale are
    improved in turn while the error falls. Never worse than the weights of largest h w² alone.
    """
    u = working(w).abs()
    energy = u if importance is None else u.double().square() * importance
    best = _among(b, w, a.select(energy), importance)
    if importance is None and separate(a, b):
        return best
    h = torch.ones_like(w) if importance is None else importance.to(w.device).expand(w.shape)
    middle = best[1].scale.double()
    starts = (
        [middle * f for f in (0.5, 0.7, 1, 1.4, 2)] if warm is None else [middle, warm[1].scale]
    )
    scale = max((_climb(a, b, u.double(), h, x.double(), 2) for x in starts), key=lambda x: x[0])[1]
    _, scale, kept = _climb(a, b, u.double(), h, scale, 100)
    found = _among(b, w, kept, importance)
    errors = [b.objective(w, state, None, importance) for _, state in (found, best)]
    return found if errors[0] < errors[1] else best


def _climb(
    a: Sparse | NM, b: Ternary, u: Tensor, h: Tensor, scale: Tensor, steps: int
) -> tuple[float, Tensor, Tensor]:
    """Support and scales improved in turn: the gain reached, the scales, the candidates."""
    gained, candidates = -math.inf, torch.empty(0)
    for _ in range(steps):
        spread = b.blocks.spread(scale, u.shape)
        gain = spread * (2 * u - spread) * h
        chosen = a.select(gain)
        kept = chosen[gain.reshape(-1)[chosen] > 0]
        now = float(gain.reshape(-1)[kept].sum())
        if not now > gained * (1 + 1e-12):
            break
        gained, candidates = now, chosen
        counts = u.new_zeros(u.numel())
        counts[kept] = h.reshape(-1)[kept].double()
        mass = b.blocks.split(counts.view(u.shape)).sum(1)
        mean = b.blocks.split(counts.view(u.shape) * u).sum(1) / mass
        scale = torch.where(mass > 0, mean, scale)  # a block that keeps nothing may come back
    return gained, scale, candidates


def _among(
    b: Ternary, w: Tensor, candidates: Tensor, importance: Tensor | None
) -> tuple[SparseState, TernaryState]:
    """The best ternary weights that are zero outside the candidates."""
    signs = torch.zeros(w.shape, dtype=torch.int8, device=w.device)
    if b.axis is None and b.group is None and candidates.numel() > 0:  # only these are sorted
        h = None if importance is None else importance.expand(w.shape).reshape(-1)[candidates]
        state = b.solve(w.reshape(-1)[candidates], None, None, h)
        signs.view(-1)[candidates] = state.signs
        state = TernaryState(state.scale, signs)
    else:
        masked = w.new_zeros(w.numel())
        masked[candidates] = w.reshape(-1)[candidates]
        state = b.solve(masked.view(w.shape), None, None, importance)
    delta = b.reconstruct(state)
    return _kept(delta, where(delta != 0)), state


@register_then(Sparse, Binary, applies=_learned, exact=_exact)
@register_then(NM, Binary, applies=_learned, exact=_exact)
def sparse_binary(
    a: Sparse | NM,
    b: Binary,
    w: Tensor,
    warm: tuple[SparseState, BinaryState] | None,
    mu: float | None,
    importance: Tensor | None,
) -> tuple[SparseState, BinaryState]:
    """The same weights as with `Ternary`, stored with one bit for each that is not zero.

    A support need not be full, so the kept signs with zeros among them are a smaller support.
    """
    ternary = Ternary(b.axis, b.group, b.value_dtype)
    kept, state = sparse_ternary(a, ternary, w, warm, mu, importance)
    return kept, BinaryState(state.scale, state.signs >= 0)
