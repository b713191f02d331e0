"""The table of joint solvers: C steps for pairs of parts, where one after the other gets stuck.

In a sum, where alternating between the two would:

    @register(Binary, Sparse, exact=lambda a, b: ...)
    def binary_sparse(a, b, w, warm, mu, importance) -> (state of a, state of b)

and for `a.then(b)`, where what b can represent decides what a should keep:

    @register_then(Sparse, FixedCodebook)
    def pruned_codebook(a, b, w, warm, mu, importance) -> (state of a, state of b for a's values)

Tables are keyed by the pair of types, that of sums is looked up both ways; users add to them with
the same decorators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from ..part import Part

Solver: TypeAlias = Callable[..., tuple[Any, Any]]
Fact: TypeAlias = Callable[[Any, Any], bool]


@dataclass(frozen=True)
class Joint:
    """A solver for one pair, and for which hyper-parameters it reaches the global minimum."""

    solve: Solver
    exact: Fact
    exact_weighted: Fact
    swapped: bool = False

    def __call__(
        self,
        a: Part[Any],
        b: Part[Any],
        w: Tensor,
        warm: tuple[Any, Any] | None,
        mu: float | None,
        importance: Tensor | None,
    ) -> tuple[Any, Any]:
        if not self.swapped:
            return self.solve(a, b, w, warm, mu, importance)
        second, first = self.solve(b, a, w, None if warm is None else warm[::-1], mu, importance)
        return first, second

    def certain(self, a: Part[Any], b: Part[Any], weighted: bool) -> bool:
        """Whether the pair's solution is a global minimum."""
        fact = self.exact_weighted if weighted else self.exact
        return fact(b, a) if self.swapped else fact(a, b)


Rows: TypeAlias = tuple[tuple[Joint, Fact], ...]  # solvers of one pair of types, the last first

_table: dict[tuple[type, type], Rows] = {}


def _never(a: Any, b: Any) -> bool:
    return False


def _always(a: Any, b: Any) -> bool:
    return True


def register(
    a: type, b: type, *, applies: Fact = _always, exact: Fact = _always, weighted: Fact = _never
) -> Callable[[Solver], Solver]:
    """Use the decorated function as the C step of every `a + b` for which `applies(a, b)` holds.

    Args:
        applies: whether this pair of hyper-parameters is the function's case; otherwise the sum
            alternates.
        exact, weighted: whether the result is a global minimum, without and with importance. Where
            it is not, the sum keeps the better of the result and its warm start.

    Of several functions for one pair of types the one registered last that applies is used.
    """

    def add(solver: Solver) -> Solver:
        _table[a, b] = ((Joint(solver, exact, weighted), applies), *_table.get((a, b), ()))
        return solver

    return add


def find(a: Part[Any], b: Part[Any]) -> Joint | None:
    """The joint solver of this pair, in this order, or None."""
    for first, second, swapped in ((a, b, False), (b, a, True)):
        for joint, applies in _table.get((type(first), type(second)), ()):
            if applies(first, second):
                return replace(joint, swapped=swapped)
    return None


_then: dict[tuple[type, type], Rows] = {}


def register_then(
    outer: type,
    inner: type,
    *,
    applies: Fact = _always,
    exact: Fact = _always,
    weighted: Fact = _never,
) -> Callable[[Solver], Solver]:
    """Use the decorated function as the projection of `outer.then(inner)`; arguments as `register`.

    It returns the state of `outer`, its values already those of `inner`, and that of `inner` for
    the values as `compose.expose` lays them out. `outer` has one continuous field.
    """

    def add(solver: Solver) -> Solver:
        rows = _then.get((outer, inner), ())
        _then[outer, inner] = ((Joint(solver, exact, weighted), applies), *rows)
        return solver

    return add


def find_then(outer: Part[Any], inner: Part[Any]) -> Joint | None:
    """The projection of `outer.then(inner)`, or None."""
    for joint, applies in _then.get((type(outer), type(inner)), ()):
        if applies(outer, inner):
            return joint
    return None
