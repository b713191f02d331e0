"""Every property of the contract on every row of the table; and broken parts, all caught."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import DEVICES
from parts_under_test import CASES, binary, brute
from parts_under_test import fixed as levels
from torch import Tensor

from lc_compress.binary import Binary
from lc_compress.coding import Fixed, Raw
from lc_compress.compose import Sum
from lc_compress.part import Field, Ops, Part, rounded
from lc_compress.sparse import Sparse, SparsePenalty, SparseState
from lc_compress.testing import (
    PROPERTIES,
    Case,
    Property,
    Symmetry,
    check_part,
    check_property,
    flip_signs,
    negate,
    permute,
)


def label(case: Case) -> str:
    dims = "" if case.shapes[0] == (6, 8) else " " + "x".join(map(str, case.shapes[0]))
    return str(case.part).replace("torch.", "") + dims


def has_anything_to_check(check: Property, case: Case) -> bool:
    """Whether the row states the fact that the property is about."""
    needs = {
        "is_orthogonal_to_its_error": case.cone,
        "is_optimal": case.brute is not None,
        "follows_symmetries": bool(case.symmetries),
        "is_block_stationary": isinstance(case.part, Sum),
        "is_idempotent": case.mu is None,
        "names_its_shapes": bool(case.part.free),
    }
    return needs.get(check.__name__, True)


GRID = [
    pytest.param(check, case, id=f"{check.__name__}-{label(case)}")
    for check in PROPERTIES
    for case in CASES
    if has_anything_to_check(check, case)
]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("check", "case"), GRID)
def test_contract(check: Property, case: Case, name: str) -> None:
    assert check_property(check, replace(case, device=name)) > 0


# ------------------------------------------------------------------ the contract bites


@dataclass(frozen=True, eq=False)
class SignState:
    scale: Tensor
    positive: Tensor


@dataclass(frozen=True)
class Sign(Part[SignState]):
    """A correct part from outside the library, {−a, a}. The broken ones change one thing each."""

    @property
    def exact(self) -> bool:
        return True

    @property
    def exact_weighted(self) -> bool:
        return True

    @property
    def free(self) -> tuple[str, ...]:
        return ("scale",)

    def scale(self, u: Tensor, h: Tensor) -> Tensor:
        return (h * u).sum() / h.sum().clamp_min(1e-300)

    def solve(
        self, w: Tensor, warm: SignState | None, mu: float | None, importance: Tensor | None
    ) -> SignState:
        h = torch.ones_like(w) if importance is None else importance.expand(w.shape)
        scale = self.scale(w.abs().double(), h.double())
        return SignState(rounded(scale, w.dtype, None), w >= 0)

    def reconstruct(self, state: SignState) -> Tensor:
        return torch.where(state.positive, state.scale, -state.scale)

    def encode(self, state: SignState) -> dict[str, Field]:
        return {
            "scale": Field(state.scale, Raw(state.scale.dtype)),
            "positive": Field(state.positive, Fixed(1), per_weight=True),
        }

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> SignState:
        return SignState(arrays["scale"].to(dtype), arrays["positive"].bool().reshape(shape))

    def ops(self, state: SignState, positions: int = 1) -> Ops:
        return Ops(positions, positions * state.positive.numel())

    def free_shapes(self, shape: torch.Size, arrays: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {"scale": torch.Size(())}


class WrongScale(Sign):
    """The largest magnitude instead of the mean: idempotent and equivariant, but no minimiser."""

    def scale(self, u: Tensor, h: Tensor) -> Tensor:
        return u.max()


class IgnoresImportance(Sign):
    def scale(self, u: Tensor, h: Tensor) -> Tensor:
        return u.mean()


class SumsInHalf(Sign):
    """A scale summed in the precision of 16 bits."""

    def scale(self, u: Tensor, h: Tensor) -> Tensor:
        return (h.bfloat16() * u.bfloat16()).sum().double() / h.sum().clamp_min(1e-300)


class Random(Sign):
    """Draws from the global generator."""

    def scale(self, u: Tensor, h: Tensor) -> Tensor:
        return super().scale(u, h) * (1 + 1e-3 * torch.rand(()))


class Drifting(Sign):
    """Moves from the start it is given instead of solving: each projection shrinks the last one."""

    def solve(
        self, w: Tensor, warm: SignState | None, mu: float | None, importance: Tensor | None
    ) -> SignState:
        state = super().solve(w, warm, mu, importance)
        return state if warm is None else SignState(state.scale * 0.9, state.positive)


class ChangesWeights(Sign):
    def solve(
        self, w: Tensor, warm: SignState | None, mu: float | None, importance: Tensor | None
    ) -> SignState:
        state = super().solve(w, warm, mu, importance)
        w.clamp_(-1e-30, 1e-30)
        return state


class ChangesWarmStart(Sign):
    def solve(
        self, w: Tensor, warm: SignState | None, mu: float | None, importance: Tensor | None
    ) -> SignState:
        state = super().solve(w, warm, mu, importance)
        if warm is not None:
            warm.scale.copy_(state.scale)
        return state


class FloatsOnly(Sign):
    """Returns float32 whatever the weights."""

    def reconstruct(self, state: SignState) -> Tensor:
        return super().reconstruct(state).float()


class Detached(Sign):
    def reconstruct(self, state: SignState) -> Tensor:
        return super().reconstruct(state).detach()


class Lossy(Sign):
    """Stores fewer digits than Δ has."""

    def encode(self, state: SignState) -> dict[str, Field]:
        stored = Field(state.scale.clamp(-6e4, 6e4).half(), Raw(torch.float16))
        return super().encode(state) | {"scale": stored}


@dataclass(frozen=True)
class Short(Fixed):
    """Counts a byte less than it packs."""

    def bits(self, data: Tensor) -> int:
        return max(super().bits(data) - 8, 0)


class WrongSize(Sign):
    def encode(self, state: SignState) -> dict[str, Field]:
        return super().encode(state) | {"positive": Field(state.positive, Short(1))}


class Shapeless(Sign):
    free_shapes = Part.free_shapes


class WrongShape(Sign):
    def free_shapes(self, shape: torch.Size, arrays: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {"scale": torch.Size((1,))}


class FreeOperations(Sign):
    """Forgets the positions."""

    def ops(self, state: SignState, positions: int = 1) -> Ops:
        return Ops(1, state.positive.numel())


class NotAdmitted(Sign):
    def admits(self, state: SignState) -> bool:
        return bool(state.scale > 0)


class QuietlyAccepts(Sign):
    """An empty or spoiled tensor gives a state, not an error."""

    def project(
        self,
        w: Tensor,
        warm: SignState | None = None,
        *,
        mu: float | None = None,
        importance: Tensor | None = None,
    ) -> SignState:
        with torch.no_grad():
            return self.improve(w.detach(), warm, mu, importance)


class Positional(Sign):
    """The first weight counts twice."""

    def scale(self, u: Tensor, h: Tensor) -> Tensor:
        h = h.clone()
        h.view(-1)[0] *= 2
        return super().scale(u, h)

    @property
    def exact(self) -> bool:
        return False

    @property
    def exact_weighted(self) -> bool:
        return False


@dataclass(frozen=True)
class WrongThreshold(Part[SparseState]):
    """A penalty form that keeps w² > α/μ instead of 2α/μ: consistent in every other respect."""

    alpha: float

    @property
    def inner(self) -> SparsePenalty:
        return SparsePenalty(self.alpha)

    @property
    def free(self) -> tuple[str, ...]:
        return ("values",)

    @property
    def exact(self) -> bool:
        return True

    def solve(
        self, w: Tensor, warm: SparseState | None, mu: float | None, importance: Tensor | None
    ) -> SparseState:
        if mu is None:
            raise ValueError("WrongThreshold needs mu.")
        return self.inner.solve(w, None, 2 * mu, importance)

    def reconstruct(self, state: SparseState) -> Tensor:
        return self.inner.reconstruct(state)

    def encode(self, state: SparseState) -> dict[str, Field]:
        return self.inner.encode(state)

    def decode(
        self, arrays: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> SparseState:
        return self.inner.decode(arrays, shape, dtype)

    def ops(self, state: SparseState, positions: int = 1) -> Ops:
        return self.inner.ops(state, positions)

    def penalty(self, state: SparseState) -> float:
        return self.inner.penalty(state)

    def free_shapes(self, shape: torch.Size, arrays: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {"values": arrays["positions"].shape}


class OneSweep(Sum):
    """Stops after the greedy start: never worse than its warm start, and never good."""

    def solve(
        self, w: Tensor, warm: tuple[Any, ...] | None, mu: float | None, importance: Tensor | None
    ) -> tuple[Any, ...]:
        residual, states = w, []
        for i, part in enumerate(self.parts):
            state = part.improve(residual, None if warm is None else warm[i], mu, importance)
            states.append(state)
            residual = residual - part.reconstruct(state)
        return tuple(states)


SIGN_FACTS: dict[str, Any] = {
    "cone": True,
    "symmetries": (permute, negate, flip_signs),
    "brute": binary,
}


def test_a_correct_part_from_outside_passes() -> None:
    assert check_part(Sign(), **SIGN_FACTS) > 200


def test_a_part_without_facts_is_checked_too() -> None:
    assert check_part(Sign()) > 150


@pytest.mark.parametrize(
    ("part", "caught_by", "facts"),
    [
        (WrongScale(), "never_raises_objective", {}),
        (WrongScale(), "is_orthogonal_to_its_error", SIGN_FACTS),
        (WrongScale(), "is_optimal", SIGN_FACTS),
        (IgnoresImportance(), "is_optimal", SIGN_FACTS),
        (IgnoresImportance(), "respects_importance", {}),
        (SumsInHalf(), "is_optimal", SIGN_FACTS),
        (Random(), "is_deterministic", {}),
        (Drifting(), "is_idempotent", {}),
        (ChangesWeights(), "keeps_shape_dtype_device", {}),
        (ChangesWarmStart(), "is_a_value", {}),
        (FloatsOnly(), "keeps_shape_dtype_device", {}),
        (Detached(), "differentiates", {}),
        (Lossy(), "stores_what_it_counts", {}),
        (WrongSize(), "stores_what_it_counts", {}),
        (Shapeless(), "names_its_shapes", {}),
        (WrongShape(), "names_its_shapes", {}),
        (FreeOperations(), "counts_operations", {}),
        (NotAdmitted(), "admits_its_states", {}),
        (QuietlyAccepts(), "refuses_bad_input", {}),
        (Positional(), "follows_symmetries", {"symmetries": (permute,)}),
        (WrongThreshold(0.3), "is_optimal", {"mu": 2.0, "brute": brute(levels(0), 1, alpha=0.3)}),
        (OneSweep((Binary(axis=0), Sparse(nonzeros=4))), "is_block_stationary", {}),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Part) else x if isinstance(x, str) else "",
)
def test_a_broken_part_is_caught(part: Part[Any], caught_by: str, facts: dict[str, Any]) -> None:
    """By the property it breaks, and so by `check_part`; the message says where."""
    (check,) = (p for p in PROPERTIES if p.__name__ == caught_by)
    with pytest.raises(AssertionError, match=rf"^{caught_by}: .* weights .*, (float|bfloat)"):
        check_property(check, Case(part, **facts))
    with pytest.raises(AssertionError):
        check_part(part, **facts)


@pytest.mark.parametrize(
    "part, facts, only",
    [
        (WrongThreshold(0.3), {"mu": 2.0, "brute": brute(levels(0), 1, alpha=0.3)}, "is_optimal"),
        (OneSweep((Binary(axis=0), Sparse(nonzeros=4))), {}, "is_block_stationary"),
    ],
    ids=["WrongThreshold", "OneSweep"],
)
def test_what_only_one_property_sees(part: Part[Any], facts: dict[str, Any], only: str) -> None:
    """Two mistakes that all other properties let pass: why brute force and stationarity exist."""
    for check in PROPERTIES:
        if check.__name__ != only:
            check_property(check, Case(part, **facts))


def test_symmetries_keep_the_weights_size() -> None:
    """A symmetry is linear and keeps (or scales by a power of two) the norm: one of w, one of Δ."""
    from lc_compress import testing

    g = torch.Generator().manual_seed(0)
    w = torch.randn(6, 8, generator=g, dtype=torch.float64)
    transforms: list[Symmetry] = [
        testing.permute,
        testing.permute_axes,
        testing.negate,
        testing.flip_signs,
        testing.rotate,
    ]
    for symmetry in transforms:
        moved = symmetry((6, 8), g)(w)
        assert moved.shape == w.shape and not torch.equal(moved, w)
        torch.testing.assert_close(moved.norm(), w.norm())
