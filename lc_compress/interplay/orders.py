"""Pruning and quantization of one tensor, in both orders: the errors, and what bounds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..nm import NM
from ..number_format import Format, nests
from ..sparse import Sparse

Pruner: TypeAlias = Sparse | NM


@dataclass(frozen=True)
class Errors:
    """One measure of four errors: s, q: pruning and quantization alone; sq: prune, then quantize;
    qs: quantize, then prune.
    """

    s: float
    q: float
    sq: float
    qs: float

    @property
    def triangle(self) -> float:
        """ε_s + ε_q, above which an order does more harm than its parts one by one."""
        return self.s + self.q

    @property
    def ratio(self) -> float:
        """Q→S over S→Q; 1 where both are 0."""
        if self.sq > 0:
            return self.qs / self.sq
        return 1.0 if self.qs == 0 else math.inf


@dataclass(frozen=True)
class Orders:
    """Both orders on one tensor w, or the total over several.

    norm: ‖w‖₂.   weights, kept: how many, and how many of them pruning keeps.
    nests: every pruning group lies inside one scale block.
    certain: S→Q ≤ Q→S in every Lp norm is a theorem here: groups nest, and the scale depends on the
        largest magnitude only, on a grid symmetric about 0. Elsewhere either order can be better.
    l1, l2, linf: norms of w minus the result. The total adds absolute values and squares, and takes
        the largest of the largest.
    bound: upper bound of l1.qs,  ‖ε_s‖₁ + ‖ε_q‖₁ + Σ_groups (the k widest code cells of the
        group),  k = min(kept, pruned).  Proof: let pruning keep A of w and B of q(w). Then
        l1.qs = Σ_B |ε_q| + Σ_not A |w| + Σ_A∖B |w| − Σ_B∖A |w|. Pair a in A∖B with b in B∖A: since
        |q_b| ≥ |q_a|, |w_a| − |w_b| ≤ (|w_a| − |q_a|) + (|q_b| − |w_b|), which is at most one cell,
        the wider of the two. There are at most k pairs, of different entries. It holds for every
        format that is monotone, nested or not. Nested, all cells of a group are equal and this
        is the bound of papers/sparsity-quantization-order.md, section 7 item 4.
    pythagoras: relative deviation of ‖w − q(s(w))‖² from ‖w − s(w)‖² + ‖(w − q(w)) ⊙ mask‖². Zero,
        up to rounding, where the codes of the survivors do not depend on the others: scales of the
        largest magnitude, which pruning keeps (nested groups, or one budget for the tensor).
    swaps: positions that are zero after one order and not after the other.
    ties: weights at a boundary tied: |q(w)| equals the smallest that is kept and the largest that
        is not. Which of them survive is a matter of chance. Zeros, which are all the same, are not
        counted.
    """

    name: str
    weights: int
    kept: int
    nests: bool
    certain: bool
    norm: float
    l1: Errors
    l2: Errors
    linf: Errors
    bound: float
    pythagoras: float
    swaps: int
    ties: int

    @property
    def swapped(self) -> float:
        """Share of the survivors that the orders do not have in common."""
        return self.swaps / (2 * self.kept) if self.kept else 0.0

    @property
    def tied(self) -> float:
        """Share of the weights in a tie."""
        return self.ties / self.weights

    @property
    def tightness(self) -> float:
        """l1.qs over its bound, at most 1."""
        return self.l1.qs / self.bound if self.bound > 0 else 0.0


def check_pruner(pruner: object) -> Pruner:
    """Refuse what does not keep the largest magnitudes."""
    if not isinstance(pruner, Sparse | NM):
        raise TypeError(
            "`sparse` must keep the largest weights, Sparse(...) or NM(n, m), got "
            f"{type(pruner).__name__}."
        )
    return pruner


def check_format(quantizer: object, argument: str) -> Format[Any]:
    """Refuse what is no number format."""
    if not isinstance(quantizer, Format):
        raise TypeError(
            f"`{argument}` must be a number format (Int, HBFP, MX, or what number_format('MXFP4') "
            f"gives), got {quantizer!r}."
        )
    return quantizer


def both_orders(w: Tensor, sparse: Pruner, quantizer: Format[Any]) -> tuple[Tensor, ...]:
    """s(w), q(w), q(s(w)) and s(q(w))."""
    s, q = sparse.reconstruct(sparse.project(w)), quantizer.quantize(w)
    return s, q, quantizer.quantize(s), sparse.reconstruct(sparse.project(q))


def compare(
    name: str, w: Tensor, sparse: Pruner, quantizer: Format[Any], results: Sequence[Tensor]
) -> Orders:
    """Everything that the weights alone say; `results` are those of `both_orders`."""
    s, q, sq, qs = results
    exact = w.double()
    errors = [(exact - x.double()).reshape(-1) for x in results]

    def norms(p: float) -> Errors:
        return Errors(*(float(torch.linalg.vector_norm(e, p)) for e in errors))

    l1, l2, linf = norms(1), norms(2), norms(math.inf)
    mask = mask_of(sparse, w)
    split = l2.s**2 + float((errors[1] * mask.reshape(-1)).square().sum())
    nested = nests(sparse, quantizer, w.shape)
    sound = quantizer.monotone and quantizer.keeps_zero and quantizer.scale_of_largest
    cells = quantizer.widest_cell(w).double().expand(w.shape)
    return Orders(
        name=name,
        weights=w.numel(),
        kept=int((s != 0).sum()),
        nests=nested,
        certain=nested and sound,
        norm=float(torch.linalg.vector_norm(exact)),
        l1=l1,
        l2=l2,
        linf=linf,
        bound=l1.triangle + swap_cost(sparse, cells),
        pythagoras=abs(l2.sq**2 - split) / split if split > 0 else abs(l2.sq),
        swaps=int(((sq != 0) != (qs != 0)).sum()),
        ties=tied_entries(sparse, q.abs()),
    )


def mask_of(pruner: Pruner, w: Tensor) -> Tensor:
    """Bool, of w's shape: what pruning keeps, zeros included."""
    kept = torch.zeros(w.numel(), dtype=torch.bool, device=w.device)
    kept[pruner.select(w.abs())] = True
    return kept.view(w.shape)


def grouped(pruner: Pruner, x: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """`x` as (groups, size), one row for each budget; and how many each keeps, (groups,)."""
    if not isinstance(pruner, NM):
        return x.reshape(1, -1), torch.tensor([pruner.budget(x.numel())], device=x.device)
    sizes = pruner.groups.split(torch.ones_like(x), 0).sum(1).long()
    return pruner.groups.split(x, fill), sizes.clamp_max(pruner.n)


def swap_cost(pruner: Pruner, cells: Tensor) -> float:
    """Σ_groups (the k largest of `cells`), k = min(kept, pruned): no more can swap."""
    rows, kept = grouped(pruner, cells, 0)
    inside, _ = grouped(pruner, torch.ones_like(cells), 0)
    most = torch.minimum(kept, inside.sum(1).long() - kept)
    ranks = torch.arange(rows.shape[1], device=rows.device)
    return float((rows.sort(1, descending=True).values * (ranks < most[:, None])).sum())


def tied_entries(pruner: Pruner, score: Tensor) -> int:
    """Entries equal to both the smallest score kept and the largest not kept of their group, unless
    it is zero.
    """
    rows, kept = grouped(pruner, score, -1)
    some = (kept > 0) & (kept < rows.shape[1])
    rows, kept = rows[some], kept[some, None]
    falling = rows.sort(1, descending=True).values
    last, following = falling.gather(1, kept - 1), falling.gather(1, kept)
    return int(((rows == last) & (last == following) & (last > 0)).sum())


def total(rows: Sequence[Orders]) -> Orders:
    """All rows as one: norms of all weights together."""

    def over(measure: str, join: Callable[[list[float]], float]) -> Errors:
        columns = zip(*(_values(getattr(row, measure)) for row in rows), strict=True)
        return Errors(*(join(list(column)) for column in columns))

    def root(values: list[float]) -> float:
        return math.sqrt(math.fsum(x * x for x in values))

    return Orders(
        name="total",
        weights=sum(row.weights for row in rows),
        kept=sum(row.kept for row in rows),
        nests=all(row.nests for row in rows),
        certain=all(row.certain for row in rows),
        norm=root([row.norm for row in rows]),
        l1=over("l1", math.fsum),
        l2=over("l2", root),
        linf=over("linf", max),
        bound=math.fsum(row.bound for row in rows),
        pythagoras=max(row.pythagoras for row in rows),
        swaps=sum(row.swaps for row in rows),
        ties=sum(row.ties for row in rows),
    )


def _values(errors: Errors) -> tuple[float, ...]:
    return errors.s, errors.q, errors.sq, errors.qs
