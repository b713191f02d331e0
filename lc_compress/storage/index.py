"""The index of a file: its records, each a compressed task or what a module keeps uncompressed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..codings_json import describe, described, payload_bytes
from ..entropy import Entropy
from ..part import Coding, Field, Part
from ..plain_data import FLOATS, as_dtype, as_integer, as_shape, dtype_name, short
from ..views import joined
from .container import FormatError, Reader
from .specs import built_part

PER_BYTE = 1 << 12  # entries that a byte may stand for where it can be many
_CODED = 1 << 17  # entries of an entropy-coded array that may take next to nothing


@dataclass(frozen=True)
class StoredField:
    """One array of a record: its coding, its shape, and the bytes that it takes."""

    name: str
    coding: Coding
    shape: torch.Size
    bytes: int

    @property
    def bits(self) -> int:
        """Without the padding to a byte where that is known from the shape alone."""
        exact = payload_bits(self.coding, self.shape)
        return 8 * self.bytes if exact is None else exact


@dataclass(frozen=True)
class Record:
    """A compressed task (a tensor, or several in a joint group), or the uncompressed tensors of a
    module.

    names, shapes, dtypes: of the model's tensors, with their tied names left out.
    part: what they are compressed as; None: not at all, there is one field per tensor.
    number, offset, bytes: which record it is, and where its bytes are in the payload.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    part: Part[Any] | None
    fields: tuple[StoredField, ...]
    number: int
    offset: int

    @property
    def bytes(self) -> int:
        return sum(field.bytes for field in self.fields)

    @property
    def bits(self) -> int:
        return sum(field.bits for field in self.fields)

    @property
    def weights(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def shape(self) -> torch.Size:
        """Of what the part sees: a tensor, or the group's as one vector."""
        return joined(self.shapes)

    def split(self, delta: Tensor) -> dict[str, Tensor]:
        """What the part makes, as the model's tensors."""
        pieces = delta.reshape(-1).split([math.prod(shape) for shape in self.shapes])
        values = [x.view(shape) for x, shape in zip(pieces, self.shapes, strict=True)]
        return dict(zip(self.names, values, strict=True))

    def __str__(self) -> str:
        text = ", ".join(self.names[:4])
        return text if len(self.names) <= 4 else f"{text}, … ({len(self.names)} tensors)"


def payload_bits(coding: Coding, shape: torch.Size) -> int | None:
    """Exact size where the shape alone says it."""
    length = payload_bytes(coding, shape)
    width = getattr(coding, "width", None)
    return length and (math.prod(shape) * width if width is not None else 8 * length)


# ------------------------------------------------------------------ written


def describe_fields(
    fields: Mapping[str, Field], payloads: Mapping[str, bytes], own: torch.Size | None = None
) -> list[list[Any]]:
    """The fields of a task as JSON data: name, coding, and where they do not follow from those the
    shape (without one it is the weights' `own`) and the number of bytes.
    """
    found = []
    for name, field in fields.items():
        shape = field.data.shape
        data: list[Any] = [name, describe(field.coding)]
        if shape != own:
            data.append(list(shape))
        if payload_bytes(field.coding, shape) is None:
            data.append(len(payloads[name]))
        found.append(data)
    return found


# ------------------------------------------------------------------ read


def parse(reader: Reader, known: dict[str, type]) -> tuple[list[Record], dict[str, str]]:
    """All records of a file, and for each further name of a tied tensor its first.

    Raises:
        FormatError: an index that no writer makes.
    """
    parser = _Parser(reader, known)
    try:
        return parser.records(), parser.aliases()
    except FormatError:
        raise
    except (ValueError, RecursionError) as cause:
        raise reader.error(f"{parser.where}: {cause}") from None


class _Parser:
    def __init__(self, reader: Reader, known: dict[str, type]) -> None:
        self.reader, self.index, self.known = reader, reader.index, known
        self.where = "index"
        self.names: set[str] = set()

    def records(self) -> list[Record]:
        extra = set(self.index) - {"version", "parts", "tensors", "rest", "aliases"}
        if extra:
            raise ValueError(f"unknown entries {short(sorted(extra))}")
        parts = []
        for i, spec in enumerate(self._list("parts")):
            self.where = f"part {i}"
            parts.append(built_part(spec, self.known))
        found: list[Record] = []
        offset = 0
        for data in self._list("tensors"):
            self.where = "index"
            found.append(self._task(data, parts, len(found), offset))
            offset += found[-1].bytes
        modules: set[str] = set()
        for data in self._list("rest"):
            self.where = "index"
            if not isinstance(data, list) or len(data) != 2 or not isinstance(data[0], str):
                raise ValueError(f"a module is a name and a list of tensors, got {short(data)}")
            self.where = f"module {short(data[0])}"
            if data[0] in modules:
                raise ValueError("it is there twice")
            modules.add(data[0])
            found.append(self._module(data[0], data[1], len(found), offset))
            offset += found[-1].bytes
        self.where = "index"
        if offset != self.reader.payload:
            raise ValueError(f"the records take {offset} bytes, there are {self.reader.payload}")
        if len(self.reader.checksums) != len(found):
            raise ValueError(f"{len(found)} records have {len(self.reader.checksums)} checksums")
        return found

    def aliases(self) -> dict[str, str]:
        aliases = self.index.get("aliases")
        if not isinstance(aliases, dict):
            raise ValueError("'aliases' is missing or no object")
        for name, first in aliases.items():
            if not isinstance(first, str) or first not in self.names or name in self.names:
                raise ValueError(f"{short(name)} is tied to {short(first)}, which is impossible")
        return aliases

    def _list(self, name: str) -> list[Any]:
        data = self.index.get(name)
        if not isinstance(data, list):
            raise ValueError(f"'{name}' is missing or no list")
        return data

    def _task(self, data: Any, parts: list[Part[Any]], number: int, offset: int) -> Record:
        names, shapes, dtype, part, fields = _entries(
            data, "names", "shapes", "dtype", "part", "fields"
        )
        if not isinstance(names, list) or not names:
            raise ValueError(f"the names of a task are a list, got {short(names)}")
        own = tuple(self._new(name) for name in names)
        self.where = ", ".join(own[:4])
        if not isinstance(shapes, list) or len(shapes) != len(own):
            raise ValueError(f"{len(own)} tensors need as many shapes, got {short(shapes)}")
        if not isinstance(part, int) or isinstance(part, bool) or not 0 <= part < len(parts):
            raise ValueError(f"there are {len(parts)} parts, got number {short(part)}")
        if not isinstance(fields, list):
            raise ValueError(f"the fields of a task are a list, got {short(fields)}")
        of = as_dtype(dtype, FLOATS)
        if of is None:
            known = ", ".join(map(dtype_name, FLOATS))
            raise ValueError(f"weights are one of {known}, got {short(dtype)}")
        sizes = tuple(as_shape("a shape", lengths) for lengths in shapes)
        record = Record(own, sizes, (of,) * len(own), parts[part], (), number, offset)
        stored = tuple(_field(field, record.shape) for field in fields)
        if len({field.name for field in stored}) < len(stored):
            raise ValueError("a field is there twice")
        for field in stored:
            _check_size(field, record.weights)
        return replace(record, fields=stored)

    def _module(self, module: str, entries: Any, number: int, offset: int) -> Record:
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"the tensors of a module are a list, got {short(entries)}")
        names, shapes, dtypes, stored = [], [], [], []
        for data in entries:
            if not isinstance(data, list) or len(data) < 3 or not isinstance(data[0], str):
                raise ValueError(f"a tensor is a name, a type and a field, got {short(data)}")
            entry, dtype, *field = data
            names.append(self._new(f"{module}.{entry}" if module else entry))
            self.where = names[-1]
            found = as_dtype(dtype)
            if found is None:
                raise ValueError(f"unknown dtype {short(dtype)}")
            dtypes.append(found)
            stored.append(_field([entry, *field]))
            own = stored[-1].shape
            if found.is_complex:
                if own[-1:] != (2,):
                    raise ValueError("complex numbers need a last axis of 2")
                own = own[:-1]
            shapes.append(own)
            _check_size(stored[-1], 0)
        return Record(
            tuple(names), tuple(shapes), tuple(dtypes), None, tuple(stored), number, offset
        )

    def _new(self, name: Any) -> str:
        if not isinstance(name, str) or name in self.names:
            raise ValueError(f"{short(name)} is no name, or there twice")
        self.names.add(name)
        return name


def _entries(data: Any, *names: str) -> list[Any]:
    if not isinstance(data, dict) or set(data) != set(names):
        raise ValueError(f"an object of {', '.join(names)} was expected, got {short(data)}")
    return [data[name] for name in names]


def _field(data: Any, own: torch.Size | None = None) -> StoredField:
    if not isinstance(data, list) or len(data) < 2 or not isinstance(data[0], str):
        raise ValueError(f"a field is a name, a coding, a shape, got {short(data)}")
    name, coding, *more = data
    how = described(coding)
    if more and isinstance(more[0], list):
        own = as_shape("a shape", more.pop(0))
    if own is None:
        raise ValueError(f"field {short(name)} has no shape")
    length = payload_bytes(how, own)
    if len(more) != (length is None):
        raise ValueError(f"field {short(name)}: its number of bytes is missing or superfluous")
    if length is None:
        length = as_integer("a number of bytes", more[0])
    return StoredField(name, how, own, length)


def _check_size(field: StoredField, weights: int) -> None:
    """Refuse an array larger than its bytes and its weights can account for."""
    coded = isinstance(field.coding, Entropy)  # one symbol in millions of entries takes few bytes
    entries = math.prod(field.shape)
    most = (PER_BYTE if coded else 8) * field.bytes + 2 * weights + (_CODED if coded else 64)
    if entries > most:
        raise ValueError(
            f"field {short(field.name)} tells of {entries} entries in {field.bytes} bytes"
        )
