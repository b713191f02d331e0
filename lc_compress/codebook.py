"""Codebooks: every weight is one of K values, learned (`KMeans`) or given (`FixedCodebook`,
`PowersOfTwo`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .clustering import optimal_centres
from .coding import Fixed, Raw
from .part import Field, Ops, Part, check_value_dtype, rounded, working

_COMPARED = 256  # codebooks up to this size are compared entry by entry
_CHUNK = 1 << 16  # weights compared at once: they stay in the cache


@dataclass(frozen=True, eq=False)
class CodebookState:
    """codebook (K,), in the weights' dtype, ascending until it is trained; codes, in their shape.

    Codes are uint8 for K <= 256, else int64.
    """

    codebook: Tensor
    codes: Tensor


@dataclass(frozen=True)
class KMeans(Part[CodebookState]):
    """Weights that take at most k learned values.

    Solves   min Σ h (w − c[q])²   over c (k,), q of w's shape in {0 … k − 1}
    to the global optimum, with importance too. In one dimension the optimal clusters are intervals
    of the sorted weights, so the problem is a shortest path over the cuts between them,
    D_j(i) = min_t D_{j−1}(t) + cost(t, i)  (dynamic programme of Wu and Rokne,
    papers/learning-compression.md, section 3). It is solved on a coarse grid of cuts, which bounds
    where the optimal ones can be, and on finer grids there, down to single weights
    (`clustering.optimal_starts`). A warm start is not needed.

    Weights without importance do not influence the codebook; if none has any, all count the same.
    At the end every weight gets its nearest codeword, the lower code in a tie. With fewer than k
    distinct weights the last codeword is repeated and Δ = w.

    Exact up to rounding: sums carry a relative error of about 1e-16 Σ h (w − median)², and the
    optimal centres are rounded to the weights' dtype and to `value_dtype`. Among codebooks of half
    precision another one may then be slightly better; with a `value_dtype` the part does not claim
    to be exact.

    Args:
        k: number of codewords, at least 1.
        value_dtype: how the codebook is stored; None: in the weights' dtype.

    State:
        codebook (k,), ascending, in w's dtype; codes of w's shape.

    Cost: O(N log N) to sort, a pass over the sorted weights, and for the cuts far less than that
    where the grids exclude most positions (with importance the sort takes its positions along and
    is four times as slow). With far outliers or many clusters the cuts cost more, at most
    O(k N log N) for each grid. k − 1 comparisons per weight for the codes. On CUDA the weights are
    sorted, summed and assigned there, the programme runs on the CPU.
    Memory O(N). Stores N ceil(log2 k) bits and k floats.

    Raises:
        ValueError: `k` < 1, or a `value_dtype` that is not floating point.
    """

    k: int
    value_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_value_dtype(self, self.value_dtype)
        if self.k < 1:
            raise ValueError(f"{self}: k must be >= 1.")

    @property
    def exact(self) -> bool:
        return self.value_dtype is None

    @property
    def exact_weighted(self) -> bool:
        return self.value_dtype is None

    @property
    def free(self) -> tuple[str, ...]:
        return ("codebook",)

    def solve(
        self, w: Tensor, warm: CodebookState | None, mu: float | None, importance: Tensor | None
    ) -> CodebookState:
        h = None
        if importance is not None and bool(importance.any()):
            h = importance.detach().double().expand(w.shape).reshape(-1)
        centres = optimal_centres(working(w).detach().reshape(-1), h, self.k)
        codebook = rounded(torch.from_numpy(centres).to(w.device), w.dtype, self.value_dtype)
        return CodebookState(codebook, nearest(w, codebook))

    def reconstruct(self, state: CodebookState) -> Tensor:
        return looked_up(state.codebook, state.codes)

    def encode(self, state: CodebookState) -> dict[str, Field]:
        stored = self.value_dtype or state.codebook.dtype
        return {
            "codebook": Field(state.codebook.to(stored), Raw(stored)),
            "codes": Field(state.codes, _code(self.k), per_weight=True),
        }

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> CodebookState:
        codes = _checked_codes(self, arrays["codes"], self.k)
        return CodebookState(arrays["codebook"].to(dtype), codes.reshape(shape))

    def free_shapes(self, shape: torch.Size, arrays: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {"codebook": torch.Size((self.k,))}

    def admits(self, state: CodebookState) -> bool:
        c = state.codebook
        return c.shape == (self.k,) and torch.equal(rounded(c, c.dtype, self.value_dtype), c)

    def ops(self, state: CodebookState, positions: int = 1) -> Ops:
        return _codebook_ops(state, self.k, positions)


@dataclass(frozen=True)
class FixedCodebook(Part[CodebookState]):
    """Weights that take given values.

    Solves   min Σ h (w − c[q])²   over q of w's shape
    exactly, whatever the importance: the nearest value, the lower one in a tie
    (papers/learning-compression.md, section 3). Values are first rounded to w's dtype, those beyond
    its range to its largest number.

    Args:
        values: the codebook, at least one finite number; sorted, repeats dropped.

    State:
        codes of w's shape; the codebook in w's dtype, which is not stored: it is the part's own.

    Cost: O(N log K). Stores N ceil(log2 K) bits.

    Raises:
        ValueError: no value, or one that is NaN or inf.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", checked_values(self, self.values))

    @property
    def exact(self) -> bool:
        return True

    @property
    def exact_weighted(self) -> bool:
        return True

    def codebook(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The values (K,) as weights of this dtype can take them."""
        return rounded(torch.tensor(self.values, dtype=torch.float64), dtype, None).to(device)

    def solve(
        self, w: Tensor, warm: CodebookState | None, mu: float | None, importance: Tensor | None
    ) -> CodebookState:
        codebook = self.codebook(w.dtype, w.device)
        return CodebookState(codebook, nearest(w, codebook))

    def reconstruct(self, state: CodebookState) -> Tensor:
        return looked_up(state.codebook, state.codes)

    def encode(self, state: CodebookState) -> dict[str, Field]:
        return {"codes": Field(state.codes, _code(len(self.values)), per_weight=True)}

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> CodebookState:
        codes = _checked_codes(self, arrays["codes"], len(self.values))
        return CodebookState(self.codebook(dtype, codes.device), codes.reshape(shape))

    def admits(self, state: CodebookState) -> bool:
        c = state.codebook
        return torch.equal(c, self.codebook(c.dtype, c.device))

    def ops(self, state: CodebookState, positions: int = 1) -> Ops:
        return _codebook_ops(state, len(self.values), positions)


@dataclass(frozen=True)
class PowersOfTwo(Part[CodebookState]):
    """Weights that are 0 or a signed power of two, 1 at most: products are shifts.

    Solves   min Σ h (w − t)²   over t ∈ {0, ±1, ±1/2, …, ±2^−c}
    exactly, whatever the importance: the `FixedCodebook` of these values. Magnitudes from 2^−k−1 to
    2^−k part at 1.5 · 2^−k−1, those below 2^−c at half of it (papers/learning-compression.md,
    section 3, powers of two). For another range multiply by a learned scale:
    `ScaledCodebook(PowersOfTwo(c).fixed.values)`.

    Args:
        c: the least magnitude is 2^−c, from 0 to 126.

    State, Cost: as `FixedCodebook`; stores N ceil(log2(2 c + 3)) bits.

    Raises:
        ValueError: `c` outside 0 to 126.
    """

    c: int

    def __post_init__(self) -> None:
        if not 0 <= self.c <= 126:
            raise ValueError(f"{self}: c must be from 0 to 126.")

    @property
    def fixed(self) -> FixedCodebook:
        """The same part as a list of values."""
        powers = [2.0**-k for k in range(self.c + 1)]
        return FixedCodebook((0.0, *powers, *(-power for power in powers)))

    @property
    def exact(self) -> bool:
        return True

    @property
    def exact_weighted(self) -> bool:
        return True

    def solve(
        self, w: Tensor, warm: CodebookState | None, mu: float | None, importance: Tensor | None
    ) -> CodebookState:
        return self.fixed.solve(w, warm, mu, importance)

    def reconstruct(self, state: CodebookState) -> Tensor:
        return self.fixed.reconstruct(state)

    def encode(self, state: CodebookState) -> dict[str, Field]:
        return self.fixed.encode(state)

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> CodebookState:
        return self.fixed.decode(arrays, shape, dtype)

    def admits(self, state: CodebookState) -> bool:
        return self.fixed.admits(state)

    def ops(self, state: CodebookState, positions: int = 1) -> Ops:
        return self.fixed.ops(state, positions)


def checked_values(part: object, values: Iterable[float]) -> tuple[float, ...]:
    """The values of a codebook, sorted and without repeats.

    Raises:
        ValueError: no value, or one that is NaN or inf.
    """
    numbers = [float(value) for value in values]
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{part}: values must be finite numbers, at least one.")
    return tuple(sorted({number + 0.0 for number in numbers}))  # + 0.0 turns −0.0 into 0.0


def looked_up(codebook: Tensor, codes: Tensor) -> Tensor:
    """codebook[codes]; differentiable in the codebook."""
    # a quarter of the time of indexing by a tensor
    return codebook.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Codes, of x's shape, of the nearest entries of an ascending codebook (K,).

    The lowest code in a tie, also among equal entries.
    """
    c = codebook.double()
    middles = c[:-1] / 2 + c[1:] / 2  # halved before the sum: it may overflow
    if x.device.type == "cpu" and codebook.numel() <= _COMPARED:
        x = working(x).contiguous()
        return torch.from_numpy(_count_below(x.numpy().reshape(-1), middles.numpy())).view(x.shape)
    codes = torch.bucketize(x.double().contiguous(), middles, out_int32=True)
    return codes.to(torch.uint8 if codebook.numel() <= 256 else torch.int64)


def _count_below(
    x: npt.NDArray[np.floating], limits: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8]:
    """How many limits are below each x: a vectorised comparison for each limit is faster than a
    search for each x.
    """
    # x is above a limit if it is above the largest number of its own type that is not
    own = limits.astype(x.dtype)
    own = np.where(own > limits, np.nextafter(own, -np.inf, dtype=x.dtype), own)
    counts = np.zeros(x.size, dtype=np.uint8)
    above = np.empty(min(x.size, _CHUNK), dtype=bool)
    for a in range(0, x.size, _CHUNK):
        piece, count = x[a : a + _CHUNK], counts[a : a + _CHUNK]
        here = above[: piece.size]
        for limit in own:
            np.greater(piece, limit, out=here)
            np.add(count, here.view(np.uint8), out=count)
    return counts


def _code(k: int) -> Fixed:
    return Fixed((k - 1).bit_length())


def _checked_codes(part: object, codes: Tensor, k: int) -> Tensor:
    if codes.numel() and int(codes.max()) >= k:
        raise ValueError(f"{part}: damaged codes, they must be below {k}, found {codes.max()}.")
    return codes


def _codebook_ops(state: CodebookState, k: int, positions: int) -> Ops:
    """Each output adds up its inputs by code, one addition per weight, then scales the k sums."""
    rows = state.codes.shape[0] if state.codes.dim() > 1 else 1
    return Ops(positions * k * rows, positions * state.codes.numel())
