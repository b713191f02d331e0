"""A part, the facts stated about it, and the weights that it is tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..part import Part

Shape = tuple[int, ...]
Brute = Callable[[Tensor, Tensor, float], "float | None"]
Kind = Callable[[Shape, torch.Generator], Tensor]
Symmetry = Callable[[Shape, torch.Generator], Callable[[Tensor], Tensor]]

SHAPES: tuple[Shape, ...] = ((6, 8), (13, 2), (2, 13), (1, 1))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def name_of(thing: object) -> str:
    """`float32` for `torch.float32`, the name of a function."""
    return str(getattr(thing, "__name__", thing)).removeprefix("torch.")


def generator(seed: int = 0) -> torch.Generator:
    """A seeded generator: the same numbers on every device."""
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ kinds of weights


def gaussian(shape: Shape, g: torch.Generator) -> Tensor:
    """Independent normal weights, the common case."""
    return torch.randn(shape, generator=g, dtype=torch.float64)


def heavy_tailed(shape: Shape, g: torch.Generator) -> Tensor:
    """A few weights far larger than the rest: signs times exp of a normal."""
    x = gaussian(shape, g)
    return x.sign() * torch.exp(1.5 * gaussian(shape, g))


def zero(shape: Shape, g: torch.Generator) -> Tensor:
    """All zero: nothing to scale by, every weight tied."""
    return torch.zeros(shape, dtype=torch.float64)


def constant(shape: Shape, g: torch.Generator) -> Tensor:
    """All equal."""
    return torch.full(shape, -0.75, dtype=torch.float64)


def tied(shape: Shape, g: torch.Generator) -> Tensor:
    """Few distinct values, zero among them, in both signs."""
    return torch.randint(-2, 3, shape, generator=g).double() / 2


def tiny(shape: Shape, g: torch.Generator) -> Tensor:
    """Squares underflow in float32."""
    return gaussian(shape, g) * 1e-20


def huge(shape: Shape, g: torch.Generator) -> Tensor:
    """Sums of squares overflow in float32."""
    return gaussian(shape, g) * 1e18


KINDS: tuple[Kind, ...] = (gaussian, heavy_tailed, zero, constant, tied, tiny, huge)


# ------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Case:
    """A part and the facts stated about it; what is not stated is not checked.

    Args:
        part: the part under test.
        shapes: shapes it projects. The first carries every kind of weights.
        cone: the set {Δ(θ)} is closed under multiplication by positive numbers, and `solve` ends
            where no common factor of Δ helps. So ⟨w − Δ, Δ⟩ = 0.
        symmetries: transformations of the weights that Δ follows (`permute`, `negate`, ...).
        brute: (w, importance, mu) ↦ the least possible objective by enumeration, for float64
            tensors of `brute_shape`, or `None` where it is not known (importance is all ones for
            the unweighted problem; mu is 1 for constraint forms).
        brute_shape: a shape small enough for `brute`.
        mu: weight of the distance for penalty forms; `None` says that this is a constraint form.
        value_dtype: the type that the part rounds its values to, if not that of the weights.
        dtypes: types of weights that it projects; the first carries every kind of weights.
        kinds: what weights to try; fewer for parts that are slow to solve.
        device: where the weights lie.
    """

    part: Part[Any]
    shapes: tuple[Shape, ...] = SHAPES
    cone: bool = False
    symmetries: tuple[Symmetry, ...] = ()
    brute: Brute | None = None
    brute_shape: Shape = (2, 4)
    mu: float | None = None
    value_dtype: torch.dtype | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES
    kinds: tuple[Kind, ...] = KINDS
    device: str = "cpu"

    def samples(self) -> Iterator[tuple[str, Tensor]]:
        """Labelled weights: every kind in the first shape and type, Gaussian ones in all shapes.

        In the other types those kinds whose rounding and ties differ from one to the next.
        """
        for dtype in self.dtypes:
            first = dtype == self.dtypes[0]
            for kind in self.kinds:
                if not first and kind not in (gaussian, tied):
                    continue
                if dtype == torch.float16 and kind in (tiny, huge):
                    continue  # float16 ends at 6e-8 and 65504
                shapes = self.shapes if first and kind is gaussian else self.shapes[:1]
                for shape in shapes:
                    w = kind(shape, generator()).to(self.device, dtype)
                    yield f"{name_of(kind)} weights {shape}, {name_of(dtype)}", w


# ------------------------------------------------------------------ symmetries


def permute(shape: Shape, g: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Any reordering of the weights."""
    order = torch.randperm(torch.Size(shape).numel(), generator=g)
    return lambda t: t.flatten()[order.to(t.device)].reshape(shape)


def permute_axes(shape: Shape, g: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A reordering of the indices of each axis."""
    orders = [torch.randperm(size, generator=g) for size in shape]

    def apply(t: Tensor) -> Tensor:
        for axis, order in enumerate(orders):
            t = t.index_select(axis, order.to(t.device))
        return t

    return apply


def negate(shape: Shape, g: torch.Generator) -> Callable[[Tensor], Tensor]:
    """All signs at once."""
    return lambda t: -t


def flip_signs(shape: Shape, g: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Any signs."""
    signs = torch.randint(0, 2, shape, generator=g) * 2 - 1
    return lambda t: t * signs.to(t)


def rescale(shape: Shape, g: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Multiplication by a power of four: neither it nor its root, in a factor, is rounded."""
    return lambda t: t * 16


def rotate(shape: Shape, g: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Orthogonal maps from both sides of a matrix."""
    left, right = (torch.linalg.qr(gaussian((size, size), g))[0] for size in shape)
    return lambda t: (left.to(t.device) @ t.double() @ right.to(t.device)).to(t.dtype)
