"""Damage to a packed file as Hypothesis strategies, so that a failure shrinks to a small one.

Six kinds: bytes changed, cut out, doubled or cut off (checksums find these); values in the index or
bytes of the payload replaced, with all checksums made right again (only the checks of the reader
find these).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from lc_compress.storage import container
from lc_compress.storage.records import PackedFile
from lc_compress.storage.specs import known_types

KINDS = ("byte", "cut", "doubled", "truncated", "index", "payload")

_STEPS = [-1, 1, 2, 7, 2**31, 2**62, -(2**63), 10**30]
_ODD = [None, True, -1, 0, 2**63 - 1, 1e300, "", "x" * 1000, [], {}, [[[]]], {"type": "Sum"}]
_KEYS = ["x", "shape", "bytes", "type"]


class Source:
    """A good file: its bytes, the payload and the index among them."""

    def __init__(self, path: Path) -> None:
        self.name, self.whole = path.name, path.read_bytes()
        file = PackedFile(path, known_types())
        start = len(container._header(0, 0))
        self.body = self.whole[start : start + file._reader.payload]
        self.text = json.dumps(file._reader.index)
        self.spans = [(r.offset, r.bytes) for r in file.records]

    def __repr__(self) -> str:
        return self.name

    def signed(self, body: bytes, index: str) -> bytes:
        """A file of this payload and index, with right checksums."""
        checksums = [zlib.crc32(body[start : start + size]) for start, size in self.spans]
        text = container.indexed(index.encode(), checksums)
        return container._header(len(body), len(text)) + body + text


@dataclass
class Mutation:
    """A file with damage.  edits: what was done, in words."""

    kind: str
    source: Source
    content: bytes = field(repr=False)
    edits: list[str]


@st.composite
def mutations(draw: st.DrawFn, kind: str, sources: list[Source]) -> Mutation:
    """One damaged file, never the whole one."""
    source = draw(st.sampled_from(sources))
    edits: list[str] = []
    if kind == "index":
        index = json.loads(source.text)
        for _ in range(draw(st.integers(1, 4))):
            _edit(draw, index, edits)
        assume(json.dumps(index) != source.text)
        content = source.signed(source.body, json.dumps(index))
    elif kind == "payload":
        body = _other_bytes(draw, source.body, 4, edits)
        content = source.signed(body, source.text)
    elif kind == "byte":
        content = _other_bytes(draw, source.whole, 8, edits)
    else:
        whole = source.whole
        at = draw(st.integers(0, len(whole) - 1))
        size = len(whole) if kind == "truncated" else draw(st.integers(1, 16))
        edits.append(f"{kind} at {at}" + ("" if kind == "truncated" else f", {size} bytes"))
        after = at if kind == "doubled" else at + size  # where the rest begins
        content = whole[: at + size if kind == "doubled" else at] + whole[after:]
    assume(content != source.whole)
    return Mutation(kind, source, content, edits)


def _other_bytes(draw: st.DrawFn, old: bytes, most: int, edits: list[str]) -> bytes:
    """Up to `most` bytes changed."""
    new = bytearray(old)
    places = st.lists(st.integers(0, len(old) - 1), min_size=1, max_size=most, unique=True)
    for at in draw(places):
        change = draw(st.integers(1, 255))
        new[at] ^= change
        edits.append(f"byte {at} ^ {change}")
    return bytes(new)


def _edit(draw: st.DrawFn, index: Any, edits: list[str]) -> None:
    """Another value, or another key, somewhere in the index."""
    places = list(nodes(index))
    assume(places)
    *path, last = draw(st.sampled_from(places))
    holder = inner(index, path)
    if isinstance(holder, dict) and draw(st.integers(0, 4)) == 4:
        key = draw(st.sampled_from(_KEYS))
        holder[key] = holder.pop(last)
        edits.append(f"key {[*path, last]} is {key!r}")
        return
    value = holder[last]
    choices = [st.sampled_from(_ODD), st.sampled_from(places).map(lambda at: inner(index, at))]
    if isinstance(value, int):
        choices.append(st.sampled_from([value + step for step in _STEPS] + [-value]))
        choices.append(st.integers(-300, 300))
    if isinstance(value, float):
        choices.append(st.floats(allow_nan=False, allow_infinity=False))
    if isinstance(value, str):
        choices.append(st.text(max_size=4))
    if isinstance(value, list):
        choices.append(st.just(value[:-1]) | st.just(value + value[-1:]))
        choices.append(st.permutations(value))
    new = json.loads(json.dumps(draw(st.one_of(choices))))  # a copy: no cycles
    holder[last] = new
    edits.append(f"{[*path, last]} is {json.dumps(new)[:80]}")


def nodes(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything inside JSON data."""
    if path:
        yield path
    items: Any = ()
    if isinstance(data, dict):
        items = data.items()
    elif isinstance(data, list):
        items = enumerate(data)
    for key, value in items:
        yield from nodes(value, (*path, key))


def inner(data: Any, path: Any) -> Any:
    """What is at the end of a path."""
    for key in path:
        data = data[key]
    return data
