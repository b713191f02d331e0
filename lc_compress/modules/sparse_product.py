"""x Sᵀ for a sparse matrix S (rows, columns) in compressed rows: where row i starts, (rows + 1,),
columns and values of the entries, (k,).

On a CPU two kernels of torch are fast, each at its own batch size. Times are relative to the dense
product, for 5 % of 1024×1024 and of 2048×2048, one thread of a Zen 3:

* one vector: the product of MKL with a CSR tensor, made for the moment, 0.24 to 0.3
  (`embedding_bag` 2.5);
* more: `embedding_bag` of xᵀ, which adds up for each row the scaled rows of xᵀ that it needs, 0.17
  at batch 128 (MKL 0.3, scipy 0.45).
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

_BATCH = 128  # columns of xᵀ at once: more leave the cache

_library = torch.library.Library("lc_compress", "FRAGMENT")
_library.define(
    "csr_matvec(Tensor starts, Tensor columns, Tensor values, Tensor x, Tensor plus) -> Tensor"
)
_HAS_MKL = torch.backends.mkl.is_available()


@lru_cache(maxsize=1)
def _announced() -> None:
    """Torch says once in a process that CSR tensors are in beta. Only their product with a vector
    is used, and the tests compare it: take that one warning, at a moment of our own choice.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), check_invariants=False)


@torch.library.impl(_library, "csr_matvec", "CPU")
def _csr_matvec(starts: Tensor, columns: Tensor, values: Tensor, x: Tensor, plus: Tensor) -> Tensor:
    """S x + plus for x (columns,) and plus (rows,)."""
    _announced()
    matrix = torch.sparse_csr_tensor(
        starts, columns, values, (plus.shape[0], x.shape[0]), check_invariants=False
    )
    return torch.addmv(plus, matrix, x)


@torch.library.register_fake("lc_compress::csr_matvec")  # type: ignore[untyped-decorator]
def _(starts: Tensor, columns: Tensor, values: Tensor, x: Tensor, plus: Tensor) -> Tensor:
    return torch.empty_like(plus)


_as_operator = torch.ops.lc_compress.csr_matvec.default


def sparse_linear(
    x: Tensor, starts: Tensor, columns: Tensor, values: Tensor, plus: Tensor | None = None
) -> Tensor:
    """x Sᵀ + plus for x (..., columns), differentiable in x and plus. Half precisions are added up
    in float32.

    starts, columns: int32. values: float32 or float64. plus: (..., rows) or (rows,).

    The way for one vector is written for few calls: those of Python take a third of its time.
    """
    inner = x.shape[-1]
    if x.numel() == inner and _HAS_MKL and x.is_cpu and not _recorded(x, plus):
        multiply = _as_operator if torch.compiler.is_compiling() else _csr_matvec
        if plus is None or plus.dim() != x.dim():
            shape = (*x.shape[:-1], starts.shape[0] - 1)
            plus = x.new_zeros(shape) if plus is None else plus.expand(shape)
        if x.dtype == values.dtype:
            y = multiply(starts, columns, values, x.reshape(-1), plus.reshape(-1))
            return y.view_as(plus)
        exact, more = x.reshape(-1).to(values.dtype), plus.reshape(-1).to(values.dtype)
        return multiply(starts, columns, values, exact, more).to(x.dtype).view_as(plus)
    rows = starts.shape[0] - 1
    if x.numel() == 0 or values.shape[0] == 0:
        result = x[..., :1] * x.new_zeros(rows)
    else:
        flat = x.reshape(-1, inner).to(values.dtype)
        pieces = [_bag(piece.t(), starts, columns, values).t() for piece in flat.split(_BATCH)]
        result = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        result = result.to(x.dtype).reshape(*x.shape[:-1], rows)
    return result if plus is None else plus + result


def _recorded(x: Tensor, plus: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or (plus is not None and plus.requires_grad)


def _bag(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """S x for x (columns, batch)."""
    if x.shape[1] == 1:  # of one number each the sums are slow
        return _bag(x.expand(-1, 2), starts, columns, values)[:, :1]
    return F.embedding_bag(
        columns,
        x.contiguous(),
        starts,
        mode="sum",
        per_sample_weights=values,
        include_last_offset=True,
    )
