"""One packed weight: its terms, and the policy of when it is unpacked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..part import Part
from .factors import Factors
from .packed import Packed
from .sparse_product import sparse_linear
from .supports import Scattered
from .term import Term, tile_rows
from .terms import terms

Materialize = Literal["never", "on_load", "on_first_use"]

SPARSE_PRICE = 5  # what one stored value costs in a product, in weights of a dense one
_SMALL = 1 << 16  # weights: below, a dense product costs less than several calls


class Dense(nn.Module):
    """The weight, unpacked."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)


class Factored(nn.Module):
    """The weight as products: pairs of factors, and at most one sparse matrix in rows."""

    def __init__(
        self, pairs: Sequence[Factors], sparse: Scattered | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.kernels = [pair.split_kernel for pair in pairs]  # which are of `KernelMatrix`
        self.names = [(f"left{i}", f"right{i}") for i in range(len(pairs))]
        self.sparse = sparse is not None
        found: dict[str, Tensor] = {}
        for (left, right), pair in zip(self.names, pairs, strict=True):
            found |= {left: pair.floats("left").to(dtype), right: pair.floats("right").to(dtype)}
        if sparse is not None:
            rows = sparse.rows(torch.promote_types(dtype, torch.float32))
            found |= dict(zip(("starts", "columns", "values"), rows, strict=True))
        for name, x in found.items():
            self.register_buffer(name, x, persistent=False)

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(getattr(self, left), getattr(self, right)) for left, right in self.names]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Δᵀ + b for an x of the weight's dtype, or of that of autocast.

        Written for few calls: those of Python take as long as a small product.
        """
        own: dict[str, Any] = self._buffers
        total, more = None, bias
        for left, right in self.names:
            u, v = own[left], own[right]
            if x.dtype != u.dtype:
                u, v = u.to(x.dtype), v.to(x.dtype)
            y = F.linear(F.linear(x, v), u, more)
            total, more = y if total is None else total + y, None
        if not self.sparse:
            assert total is not None
            return total
        plus = bias if total is None else total
        return sparse_linear(x, own["starts"], own["columns"], own["values"], plus)


class PackedWeight(nn.Module):
    """A weight as the packed arrays of its part, shared by all modules that use it.

    Its buffers are bytes, so casts leave them alone: what they change is `dtype`, in which the
    weight takes part in products. The arithmetic of unpacking is in float32 (float64 for that);
    the result is rounded once. Nothing here is trained: gradients reach the inputs and the biases
    only, `LC.refine` trains the continuous values of a part.

    materialize:
        "never": only the packed bytes stay in memory. Each forward unpacks tiles of 2^18 weights
            (one row, if that is longer), and multiplies by one after the other; low-rank factors
            are used as two small products where they have fewer numbers than the weight. With a
            gradient to the inputs, autograd keeps the tiles of a forward until its backward.
        "on_load": unpacked when the module is built, beside the packed bytes, which `state_dict`,
            `to_dense` and later casts need.
        "on_first_use": the same at the first forward. A forward that is being compiled or exported
            does not do that: call the module once before, or `unpack_all`.

    What unpacking leads to:
        factors and sparse rows: if all terms are low-rank or sparse, products with factors and the
            sparse rows cost at most half of a dense one (a stored value counts as 5 weights), and
            the module has such products (`Linear`; a convolution without groups has them for
            low-rank terms only; both only from 2^16 weights on);
        the dense weight: else.
    """

    like: Tensor
    ready: Dense | Factored | None

    def __init__(
        self,
        part: Part[Any],
        arrays: Mapping[str, Packed],
        shape: torch.Size,
        dtype: torch.dtype,
        materialize: Materialize = "never",
        products: frozenset[str] = frozenset(),
    ) -> None:
        """products: what every module that uses the weight can do, of "factors" and "sparse"."""
        super().__init__()
        if materialize not in get_args(Materialize):
            raise ValueError(
                f"materialize must be one of {get_args(Materialize)}, got {materialize!r}."
            )
        self.part, self.shape, self.stored_dtype = part, shape, dtype
        self.materialize, self.products = materialize, products
        try:
            found = terms(part, arrays, shape, dtype)
        except Exception as cause:
            raise ValueError(
                f"{part}: the state is not one for weights of shape {tuple(shape)}: {cause}"
            ) from cause
        self.terms = nn.ModuleList(found)
        device = found[0].shapes.device
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.ready = None
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]
        if materialize == "on_load":
            self.unpack_now()

    # ------------------------------------------------------------------ what it is

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def nbytes(self) -> int:
        """Of the packed arrays."""
        return sum(x.payload.numel() for term in self._terms() for x in term.arrays().values())

    def arrays(self) -> dict[str, Packed]:
        """The packed arrays under the names of `part.encode`."""
        return {
            term.prefix + name: x for term in self._terms() for name, x in term.arrays().items()
        }

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Δ(θ), as `part.reconstruct` gives it, in the module's dtype."""
        arrays = {name: x.unpack() for name, x in self.arrays().items()}
        state = self.part.decode(arrays, self.shape, self.stored_dtype)
        return self.part.reconstruct(state).to(self.like)

    def extra_repr(self) -> str:
        bits = 8 * self.nbytes / max(1, math.prod(self.shape))
        return (
            f"{self.part}, shape={tuple(self.shape)}, {bits:.3g} bits per weight, "
            f"materialize={self.materialize!r}"
        )

    def _terms(self) -> list[Term]:
        return list(self.terms)  # type: ignore[arg-type]  # it holds terms only

    # ------------------------------------------------------------------ a tile at a time

    def split(self) -> tuple[list[Factors], list[Term]]:
        """Terms that are used as two products, if the module has those, and the others."""
        pairs: list[Factors] = []
        others: list[Term] = []
        for term in self._terms():
            if self._as_product(term):
                pairs.append(term)  # type: ignore[arg-type]
            else:
                others.append(term)
        return pairs, others

    def _as_product(self, term: Term) -> bool:
        return (
            "factors" in self.products
            and isinstance(term, Factors)
            and (term.whole_rows or term.split_kernel)
            and term.numbers <= math.prod(self.shape)
        )

    def blocks(self, groups: int = 1) -> list[tuple[int, int]]:
        """First and last row of each tile; with groups, whole ones or parts of one."""
        rows, per_group = tile_rows(self.shape), self.shape[0] // groups
        if rows >= per_group:
            rows = rows // per_group * per_group
            return [(a, min(a + rows, self.shape[0])) for a in range(0, self.shape[0], rows)]
        return [
            (a, min(a + rows, group + per_group))
            for group in range(0, self.shape[0], per_group)
            for a in range(group, group + per_group, rows)
        ]

    def reader(
        self, found: Sequence[Term], dtype: torch.dtype, kept: bool = False
    ) -> Callable[[int, int], Tensor]:
        """A function that unpacks the sum of these terms for a range of rows of one of `blocks`, in
        `dtype`. Unless they are to be kept, as autograd does, its results share one memory: the
        next call overwrites the last one.
        """
        exact = torch.promote_types(dtype, torch.float32)
        ready = [term.prepare(exact) for term in found]
        per_row = math.prod(self.shape[1:])
        most = min(tile_rows(self.shape), self.shape[0]) * per_row
        own = kept or torch.compiler.is_compiling()
        memory = {t: None if own else self._empty(most, t) for t in (exact, dtype)}

        def rows(first: int, last: int) -> Tensor:
            start, size = first * per_row, (last - first) * per_row
            total = memory[exact]
            total = self._empty(size, exact) if total is None else total.narrow(0, 0, size)
            found[0].fill(total, ready[0], start)
            for term, prepared in zip(found[1:], ready[1:], strict=True):
                term.add_to(total, prepared, start)
            if dtype != exact:
                cast = memory[dtype]
                total = total.to(dtype) if cast is None else cast.narrow(0, 0, size).copy_(total)
            return total.view(last - first, *self.shape[1:])

        return rows

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    # ------------------------------------------------------------------ unpacked

    def form(self) -> Dense | Factored | None:
        """The weight, unpacked, if the policy has it so by now."""
        ready = self.ready
        if ready is not None or self.materialize != "on_first_use":
            return ready
        if not torch.compiler.is_compiling():
            self.unpack_now()
        return self.ready

    def unpack_now(self) -> None:
        """Unpack as the policy says, or do it again."""
        self.ready = None
        if self.materialize == "never":
            return
        with torch.inference_mode(False), torch.no_grad():
            self.ready = self._factored() or Dense(self._dense())

    def _factored(self) -> Factored | None:
        pairs = [t for t in self._terms() if isinstance(t, Factors) and self._as_product(t)]
        sparse = [t for t in self._terms() if isinstance(t, Scattered)]
        if len(pairs) + len(sparse) < len(self.terms) or len(sparse) > 1:
            return None
        if sparse and "sparse" not in self.products:
            return None
        cost = sum(x.numbers for x in pairs) + SPARSE_PRICE * sum(x.count for x in sparse)
        size = math.prod(self.shape)
        if size < _SMALL or 2 * cost > size:
            return None
        return Factored(pairs, sparse[0] if sparse else None, self.dtype)

    def _dense(self) -> Tensor:
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        rows = self.reader(self._terms(), self.dtype)
        for first, last in self.blocks():
            weight[first:last] = rows(first, last)
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        before = self.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.ready is not None and self.dtype != before:
            self.unpack_now()  # from the packed values: a cast of a cast would lose digits
        return self


def _after_load(weight: PackedWeight, _: Any) -> None:
    if weight.ready is not None:
        weight.unpack_now()
