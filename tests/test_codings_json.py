"""Codings as JSON: every one comes back, everything else is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lc_compress.coding import Fixed, Radix, Raw, Support
from lc_compress.codings_json import describe, described, payload_bytes
from lc_compress.entropy import Entropy
from lc_compress.nm import GroupSupport
from lc_compress.part import Coding
from lc_compress.tiling import BlockSupport, Tiling

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]

plain = st.one_of(
    st.sampled_from(DTYPES).map(Raw),
    st.integers(0, 63).map(Fixed),
    st.integers(2, 256).map(Radix),
    st.integers(0, 2**63 - 1).map(Support),
)
groups = st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(-2, 1)).map(
    lambda x: GroupSupport((4, 6), min(x[1], x[0]), x[0], x[2])
)
tilings = st.sampled_from(
    [
        Tiling(axis=0),
        Tiling(axis=-1),
        Tiling(block=(2, 3)),
        Tiling(axis=0, shapes=(torch.Size((4, 3)), torch.Size((2, 6)))),
        Tiling(block=(2, 3), shapes=(torch.Size((4, 6)),)),
    ]
)
codings = st.one_of(
    plain,
    plain.map(Entropy),
    groups,
    tilings.map(lambda tiling: BlockSupport((24,) if tiling.shapes else (4, 6), tiling)),
)


@given(codings)
def test_every_coding_comes_back(coding: Coding) -> None:
    text = json.dumps(describe(coding))
    back = described(json.loads(text))
    assert back == coding and type(back) is type(coding)


@pytest.mark.parametrize(
    "coding, data",
    [
        (Raw(torch.bfloat16), ["raw", "bfloat16"]),
        (Fixed(1), ["fixed", 1]),
        (Radix(3), ["radix", 3]),
        (Support(36864), ["support", 36864]),
        (Entropy(Support(36864)), ["entropy", ["support", 36864]]),
        (GroupSupport((64, 32), 2, 4, -1), ["groups", [64, 32], 2, 4, -1]),
        (BlockSupport((64, 32), Tiling(block=(8, 4))), ["blocks", [64, 32], {"block": [8, 4]}]),
    ],
)
def test_descriptions(coding: Coding, data: list[Any]) -> None:
    assert describe(coding) == data


def test_unknown_coding() -> None:
    class Mine(Fixed):
        pass

    class Own(Coding):
        bits = pack = unpack = None  # type: ignore[assignment]

    for coding in (Own(), Mine(2)):  # a subclass may write anything
        with pytest.raises(ValueError, match="codings raw, fixed, radix"):
            describe(coding)


def nested(depth: int) -> list[Any]:
    data: list[Any] = ["fixed", 1]
    for _ in range(depth):
        data = ["entropy", data]
    return data


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "a list that starts with one of raw, fixed"),
        ([], "a list that starts"),
        ("fixed", "a list that starts"),
        ({"fixed": 1}, "a list that starts"),
        (["zip", 1], "a list that starts"),
        ([["fixed"], 1], "a list that starts"),
        ([1, 1], "a list that starts"),
        (["fixed"], "1 argument"),
        (["fixed", 1, 2], "1 argument"),
        (["fixed", "1"], "integer from 0 to 63"),
        (["fixed", True], "integer from 0 to 63"),
        (["fixed", 1.0], "integer from 0 to 63"),
        (["fixed", 64], "integer from 0 to 63"),
        (["fixed", -1], "integer from 0 to 63"),
        (["fixed", 10**5000], "got a int"),
        (["radix", 257], "integer from 2 to 256"),
        (["radix", 1], "integer from 2 to 256"),
        (["raw", "complex64"], "names one of float64"),
        (["raw", 4], "names one of float64"),
        (["support", 2**63], "integer from 0 to"),
        (["support", None], "integer from 0 to"),
        (nested(2), "holds a plain one"),
        (nested(100_000), "holds a plain one"),
        (["entropy", ["groups", [4], 1, 2, 0]], "Raw, Fixed, Radix or Support"),
        (["entropy", "fixed"], "a list that starts"),
        (["groups", [4], 3, 2, 0], "n of a coding 'groups'"),
        (["groups", [4], 1, 2, 1], "axis of a coding 'groups'"),
        (["groups", [], 1, 2, 0], "axis of a coding 'groups'"),
        (["groups", [2**40, 2**40], 1, 2, 0], "more than 2"),
        (["groups", [1] * 65, 1, 2, 0], "list of lengths"),
        (["blocks", [4, 4], None], "an axis or a block"),
        (["blocks", [4, 4], {}], "an axis or a block"),
        (["blocks", [4, 4], {"axis": 0, "block": [1, 1]}], "an axis or a block"),
        (["blocks", [4, 4], {"axis": None, "block": [1, 1]}], "an axis or a block"),
        (["blocks", [4, 4], {"axis": 0, "more": 1}], "an axis or a block"),
        (["blocks", [4, 4], {"axis": 2}], "axis of a coding 'blocks'"),
        (["blocks", [4, 4], {"block": [0, 1]}], "is two lengths"),
        (["blocks", [4, 4], {"block": [1]}], "is two lengths"),
        (["blocks", [16], {"axis": 0}], "two axes or more"),
        (["blocks", [16], {"axis": 0, "shapes": []}], "are a list"),
        (["blocks", [16], {"axis": 0, "shapes": [[4, 5]]}], "do not add up"),
    ],
)
def test_refused(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        described(data)
    assert len(str(error.value)) < 400


json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=5) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=8,
)
kinds = st.sampled_from(["raw", "fixed", "radix", "support", "entropy", "groups", "blocks"])


@given(st.tuples(kinds, st.lists(json_data, max_size=4)).map(lambda x: [x[0], *x[1]]) | json_data)
def test_anything_gives_a_coding_or_a_value_error(data: object) -> None:
    try:
        coding = described(data)
    except ValueError:
        return
    assert describe(coding) == data


@given(codings, st.integers(0, 40))
def test_payload_bytes(coding: Coding, count: int) -> None:
    expected = payload_bytes(coding, torch.Size((count,)))
    if isinstance(coding, Raw | Fixed | Radix):
        zeros = torch.zeros(count, dtype=torch.uint8)
        assert expected == len(coding.pack(zeros))
    else:
        assert expected is None


def test_payload_bytes_of_a_hostile_shape() -> None:
    assert payload_bytes(Fixed(3), torch.Size((2**40, 2**40))) == 3 * 2**77
