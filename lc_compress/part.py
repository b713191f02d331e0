"""A part: a set of representable weights and the projection onto it. Read this file first.

A part is a frozen bundle of hyper-parameters. Its state θ is a value: it goes into `solve` as a
warm start and comes out as the solution. `Δ(θ)` is `part.reconstruct(state)`. Everything else in
the library (sums, the LC loop, files, reports) is built on these verbs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .compose import Over, Sum
    from .views import View

State = TypeVar("State")

_CHUNK = 1 << 16  # weights whose float64 copies stay in the cache


@dataclass(frozen=True)
class Ops:
    """Multiplications and additions; the two counts add up over parts and layers."""

    mults: int
    adds: int

    def __add__(self, other: Ops) -> Ops:
        return Ops(self.mults + other.mults, self.adds + other.adds)


class Coding(ABC):
    """How one array is written: a value. `bits(data)` is what `pack(data)` fills, before padding to
    a byte.
    """

    @abstractmethod
    def bits(self, data: Tensor) -> int:
        """Exact size of `data` in this coding."""

    @abstractmethod
    def pack(self, data: Tensor) -> bytes:
        """`data` as ceil(bits(data) / 8) bytes."""

    @abstractmethod
    def unpack(self, payload: bytes, shape: torch.Size) -> Tensor:
        """The array that `pack` was given, on the CPU."""


@dataclass(frozen=True, eq=False)
class Field:
    """One stored array and the coding that writes it.

    `per_weight` says that `data` has one entry for each weight, in the weights' own shape. A
    composition that keeps only some of the weights (`Sparse(...).then(...)`) then stores only
    theirs.
    """

    data: Tensor
    coding: Coding
    per_weight: bool = False


class Part(ABC, Generic[State]):
    """A set of representable weights {Δ(θ)} and its projection.

    Subclasses are frozen dataclasses of hyper-parameters (compared by value) and are not subclassed
    again: to tweak one, wrap it.
    """

    @property
    def exact(self) -> bool:
        """`solve` returns a global minimiser when every weight counts the same."""
        return False

    @property
    def exact_weighted(self) -> bool:
        """`solve` returns a global minimiser for any `importance`."""
        return False

    @property
    def free(self) -> tuple[str, ...]:
        """Fields of the state that are still continuous: what `then` compresses further and
        `refine` trains.
        """
        return ()

    @abstractmethod
    def solve(
        self, w: Tensor, warm: State | None, mu: float | None, importance: Tensor | None
    ) -> State:
        """θ minimising  μ/2 Σ importance·(w − Δ(θ))² + penalty(θ), started from `warm` if given."""

    @abstractmethod
    def reconstruct(self, state: State) -> Tensor:
        """Δ(θ): shape, dtype and device of the projected `w`; differentiable in the
        `free` fields.
        """

    @abstractmethod
    def encode(self, state: State) -> dict[str, Field]:
        """Everything needed to rebuild θ, and nothing else."""

    @abstractmethod
    def decode(self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> State:
        """The state that `encode` described, for weights of this shape and dtype."""

    @abstractmethod
    def ops(self, state: State, positions: int = 1) -> Ops:
        """Operations to apply Δ(θ) to `positions` input vectors."""

    def free_shapes(self, shape: torch.Size, arrays: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        """Shapes of the `free` fields for weights of this shape; `arrays` are the other fields, as
        `decode` gets them.
        """
        raise TypeError(f"{self} does not say which shapes its fields {self.free} have.")

    def penalty(self, state: State) -> float:
        """Value of the penalty term; 0 for constraint forms."""
        return 0.0

    def admits(self, state: State) -> bool:
        """Whether `state` satisfies this part's constraints; one that does not only serves as a
        start.
        """
        return True

    def with_share(self, share: float) -> Part[State] | None:
        """This part with a share (0 to 1) of its budget, for sums that let corrections grow to
        their number; None where the part has no such budget.
        """
        return None

    def tunable(self, state: State) -> dict[str, Tensor]:
        """The continuous values of the state by name; composites collect those of their parts."""
        return {name: getattr(state, name) for name in self.free}

    def with_tunable(self, state: State, values: Mapping[str, Tensor]) -> State:
        """`state` with its continuous values replaced (not rounded: `rounded` does that)."""
        return replace(state, **values) if values else state  # type: ignore[type-var]  # states are dataclasses

    def added(self, total: Tensor, state: State) -> Tensor:
        """total + Δ(θ), for a contiguous total in a type that holds the sum."""
        return total + self.reconstruct(state)

    # ------------------------------------------------------------------ final: written once

    def __str__(self) -> str:
        """The part as its constructor was called, without what is at its default."""
        if not is_dataclass(self):
            return repr(self)
        arguments = (f"{name}={x}" for name, x in given(self).items())
        return f"{type(self).__name__}({', '.join(arguments)})"

    def project(
        self,
        w: Tensor,
        warm: State | None = None,
        *,
        mu: float | None = None,
        importance: Tensor | None = None,
    ) -> State:
        """The C step: θ minimising  μ/2 Σ importance·(w − Δ(θ))² + penalty(θ).

        Args:
            w: floating-point weights, finite, not empty. Left untouched; no graph is recorded.
            warm: a state of the same shape to start from. An admissible one is kept if the new
            state is not better.
            mu: weight of the distance, > 0. Needed by penalty forms only; constraint forms ignore
            it.
            importance: non-negative weights that broadcast to `w`; `None` counts every weight as 1.

        Raises:
            TypeError: `w` is not a floating-point tensor.
            ValueError: `w` or `importance` is empty, not finite, negative or of the wrong shape;
                `mu` is missing or not positive.
        """
        check_weights(self, w, importance, mu)
        with torch.no_grad():
            return self.improve(w.detach(), warm, mu, importance)

    def improve(
        self, w: Tensor, warm: State | None, mu: float | None, importance: Tensor | None
    ) -> State:
        """`project` without the checks: solve, then keep the better of new and warm."""
        state = self.solve(w, warm, mu, importance)
        certain = self.exact if importance is None else self.exact_weighted
        certain = certain and working(w) is w  # half precisions round the optimum noticeably
        if warm is None or certain or not self.admits(warm):
            return state
        if self.objective(w, state, mu, importance) <= self.objective(w, warm, mu, importance):
            return state
        return warm

    def objective(
        self,
        w: Tensor,
        state: State,
        mu: float | None = None,
        importance: Tensor | None = None,
    ) -> float:
        """μ/2 Σ importance·(w − Δ(θ))² + penalty(θ), summed in float64; μ = 1 where none
        is given.
        """
        error = squared_error(w, self.reconstruct(state), importance)
        return (1.0 if mu is None else mu) / 2 * error + self.penalty(state)

    def bits(self, state: State) -> int:
        """Size of the state in bits: what `encode` writes, without a file's header."""
        return sum(field.coding.bits(field.data) for field in self.encode(state).values())

    def __add__(self, other: Part[Any]) -> Sum:
        from .compose import Sum

        return Sum((self, other)) if isinstance(other, Part) else NotImplemented

    def then(self, inner: Part[Any]) -> Part[Any]:
        """Compress with `inner` what this part leaves continuous (`compose.Then`)."""
        from .compose import then

        return then(self, inner)

    def over(self, view: View) -> Over:
        """This part, applied to the weights as `view` shows them (`compose.Over`)."""
        from .compose import Over

        return Over(self, view)


def given(thing: Any) -> dict[str, Any]:
    """The arguments of a dataclass that are not at their default."""
    return {
        f.name: getattr(thing, f.name)
        for f in fields(thing)
        if f.init and (f.default is MISSING or getattr(thing, f.name) != f.default)
    }


def squared_error(w: Tensor, approximation: Tensor, importance: Tensor | None = None) -> float:
    """Σ importance·(w − approximation)², summed in float64."""
    size = w.numel() if w.device.type != "cpu" else _CHUNK
    pieces = [w.detach().reshape(-1).split(size), approximation.detach().reshape(-1).split(size)]
    if importance is not None:
        pieces.append(importance.expand(w.shape).reshape(-1).split(size))
    total = torch.zeros((), dtype=torch.float64, device=w.device)
    for x, y, *h in zip(*pieces, strict=True):
        residual = x.double() - y
        total += residual @ (residual * h[0] if h else residual)
    return float(total)


def all_finite(x: Tensor) -> bool:
    """Whether `x` has no NaN and no inf.

    One of either makes the sum NaN or inf, and a sum costs a fraction of a test of each entry. Only
    where finite entries overflow the sum is each looked at.
    """
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def working(w: Tensor) -> Tensor:
    """`w` in a precision to compute in: half precisions as float32, the others as they are."""
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w


def rounded(values: Tensor, dtype: torch.dtype, value_dtype: torch.dtype | None) -> Tensor:
    """The nearest values that both `dtype` (of the weights) and `value_dtype` (of the file) can
    hold, in `dtype`.

    Values beyond the largest finite number are clamped to it: that is the nearest one.
    """
    targets = [x for x in (value_dtype, dtype) if x is not None and x != values.dtype]
    if targets:
        limit = _largest(values.dtype, dtype, value_dtype or dtype)
        values = values.clamp(-limit, limit)
    for target in targets:
        values = values.to(target)
    return values.to(dtype)


@lru_cache(maxsize=64)
def _largest(*dtypes: torch.dtype) -> float:
    """The largest number that all the dtypes hold."""
    limit = min(torch.finfo(x).max for x in dtypes)
    for dtype in dtypes:
        held = torch.tensor(limit, dtype=dtype)
        limit = float(held if held.double() <= limit else held.nextafter(torch.zeros_like(held)))
    return limit


def check_value_dtype(part: object, value_dtype: torch.dtype | None) -> None:
    """Refuse a storage type that is not a floating-point number of 16, 32 or 64 bits."""
    allowed = (None, torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if value_dtype not in allowed:
        raise ValueError(
            f"{type(part).__name__}: value_dtype must be float16, bfloat16, float32, float64 or "
            "None (that of the weights), "
            f"got {value_dtype}."
        )


def check_whole(part: object, **numbers: object) -> None:
    """Refuse hyper-parameters that are no `int`, NumPy's too, which no file could hold.

    part: for the message, or None.
    """
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            of = "" if part is None else f"{type(part).__name__}: "
            raise TypeError(f"{of}{name} must be a whole number, an int, got {number!r}.")


def check_weights(
    part: object, w: Tensor, importance: Tensor | None = None, mu: float | None = None
) -> None:
    """Refuse what no projection is defined for, saying what was asked and what arrived."""
    if not isinstance(w, Tensor) or not w.is_floating_point():
        arrived = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"{part} projects real floating-point tensors, got {arrived}.")
    if w.is_meta:
        raise ValueError(f"{part} cannot project a meta tensor: it has a shape but no values.")
    if w.numel() == 0:
        raise ValueError(f"{part} cannot project an empty tensor of shape {tuple(w.shape)}.")
    if not all_finite(w):
        raise ValueError(f"{part}: the weights, shape {tuple(w.shape)}, contain NaN or inf.")
    if mu is not None and not (mu > 0 and mu < float("inf")):
        raise ValueError(f"{part}: mu must be positive and finite, got {mu}.")
    if importance is None:
        return
    try:
        expanded = torch.broadcast_shapes(importance.shape, w.shape)
    except RuntimeError:
        expanded = None
    if expanded != w.shape:
        raise ValueError(
            f"{part}: importance of shape {tuple(importance.shape)} does not broadcast to the "
            f"weights' {tuple(w.shape)}."
        )
    if not all_finite(importance) or bool((importance < 0).any()):
        raise ValueError(f"{part}: importance must be finite and non-negative.")
