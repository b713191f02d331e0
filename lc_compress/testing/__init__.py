"""The contract every part lives by, as checks that a third-party part can run: `check_part(part)`.

One function per property. A property takes a `Case` (a part and the facts stated about it) and
weights, raises `AssertionError` where the part breaks the property, and returns whether there was
anything to check (a part that declares no cone has no cone to test).

The checks are mathematics, not recorded output: feasibility, stationarity, comparison with brute
force, symmetry. `project` keeps a warm start that is better than the new state, which hides a bad
solver; so wherever that matters `solve` is called directly as well.
"""

from __future__ import annotations

from typing import Any

import torch

from ..part import Part
from .cases import DTYPES as DTYPES
from .cases import KINDS as KINDS
from .cases import SHAPES as SHAPES
from .cases import Brute as Brute
from .cases import Case as Case
from .cases import Kind as Kind
from .cases import Shape as Shape
from .cases import Symmetry as Symmetry
from .cases import constant as constant
from .cases import flip_signs as flip_signs
from .cases import gaussian as gaussian
from .cases import heavy_tailed as heavy_tailed
from .cases import huge as huge
from .cases import name_of as name_of
from .cases import negate as negate
from .cases import permute as permute
from .cases import permute_axes as permute_axes
from .cases import rescale as rescale
from .cases import rotate as rotate
from .cases import tied as tied
from .cases import tiny as tiny
from .cases import zero as zero
from .problem import expect_same as expect_same
from .properties import PROPERTIES as PROPERTIES
from .properties import Property as Property


def check_property(check: Property, case: Case) -> int:
    """Run one property on all samples of a case; how many there was something to check on.

    Raises:
        AssertionError: naming the property, the part and the weights it fails on.
    """
    count = 0
    for label, w in case.samples():
        try:
            count += check(case, w)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise AssertionError(f"{name_of(check)}: {case.part} on {label}: {text}") from error
    return count


def check_part(
    part: Part[Any],
    *,
    shapes: tuple[Shape, ...] = SHAPES,
    cone: bool = False,
    symmetries: tuple[Symmetry, ...] = (),
    brute: Brute | None = None,
    brute_shape: Shape = (2, 4),
    mu: float | None = None,
    value_dtype: torch.dtype | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    kinds: tuple[Kind, ...] = KINDS,
    device: str = "cpu",
) -> int:
    """Check that `part` keeps the contract. The arguments are those of `Case`.

    Example:
        >>> from lc_compress.sparse import Sparse
        >>> check_part(Sparse(nonzeros=3), cone=True, symmetries=(permute, negate)) > 100
        True

    Returns:
        The number of checks run.

    Raises:
        AssertionError: naming the property, the part and the weights it fails on.
    """
    if value_dtype is None:
        value_dtype = getattr(part, "value_dtype", None)
    case = Case(
        part, shapes, cone, symmetries, brute, brute_shape, mu, value_dtype, dtypes, kinds, device
    )
    return sum(check_property(check, case) for check in PROPERTIES)
