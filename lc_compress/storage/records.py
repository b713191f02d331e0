"""What a file holds, record by record: a compressed task, or what a module keeps uncompressed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from ..codings_json import describe, described, payload_bytes
from ..entropy import Entropy
from ..part import Coding, Field, Part
from .container import FormatError, Reader
from .specs import built_part

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.complex64, torch.complex128),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    )
}
Made = TypeVar("Made")

_WEIGHTS = ("float64", "float32", "float16", "bfloat16")
_LARGEST = 2**63 - 1
_AXES = 64  # more than torch allows
# weights that a record of so many bytes may stand for where no model says how many there are
_FREE, _PER_BYTE = 1 << 24, 1 << 12
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
        return self.shapes[0] if len(self.shapes) == 1 else torch.Size((self.weights,))

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
            raise ValueError(f"unknown entries {_short(sorted(extra))}")
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
                raise ValueError(f"a module is a name and a list of tensors, got {_short(data)}")
            self.where = f"module {_short(data[0])}"
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
                raise ValueError(f"{_short(name)} is tied to {_short(first)}, which is impossible")
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
            raise ValueError(f"the names of a task are a list, got {_short(names)}")
        own = tuple(self._new(name) for name in names)
        self.where = ", ".join(own[:4])
        if not isinstance(shapes, list) or len(shapes) != len(own):
            raise ValueError(f"{len(own)} tensors need as many shapes, got {_short(shapes)}")
        if not isinstance(part, int) or isinstance(part, bool) or not 0 <= part < len(parts):
            raise ValueError(f"there are {len(parts)} parts, got number {_short(part)}")
        if not isinstance(fields, list):
            raise ValueError(f"the fields of a task are a list, got {_short(fields)}")
        if dtype not in _WEIGHTS:
            raise ValueError(f"weights are one of {', '.join(_WEIGHTS)}, got {_short(dtype)}")
        sizes = tuple(map(_shape, shapes))
        record = Record(own, sizes, (_DTYPES[dtype],) * len(own), parts[part], (), number, offset)
        stored = tuple(_field(field, record.shape) for field in fields)
        if len({field.name for field in stored}) < len(stored):
            raise ValueError("a field is there twice")
        for field in stored:
            _check_size(field, record.weights)
        return replace(record, fields=stored)

    def _module(self, module: str, entries: Any, number: int, offset: int) -> Record:
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"the tensors of a module are a list, got {_short(entries)}")
        names, shapes, dtypes, stored = [], [], [], []
        for data in entries:
            if not isinstance(data, list) or len(data) < 3 or not isinstance(data[0], str):
                raise ValueError(f"a tensor is a name, a type and a field, got {_short(data)}")
            entry, dtype, *field = data
            names.append(self._new(f"{module}.{entry}" if module else entry))
            self.where = names[-1]
            dtypes.append(_dtype(dtype))
            stored.append(_field([entry, *field]))
            shape = stored[-1].shape
            if dtypes[-1].is_complex:
                if shape[-1:] != (2,):
                    raise ValueError("complex numbers need a last axis of 2")
                shape = shape[:-1]
            shapes.append(shape)
            _check_size(stored[-1], 0)
        return Record(
            tuple(names), tuple(shapes), tuple(dtypes), None, tuple(stored), number, offset
        )

    def _new(self, name: Any) -> str:
        if not isinstance(name, str) or name in self.names:
            raise ValueError(f"{_short(name)} is no name, or there twice")
        self.names.add(name)
        return name


def _entries(data: Any, *names: str) -> list[Any]:
    if not isinstance(data, dict) or set(data) != set(names):
        raise ValueError(f"an object of {', '.join(names)} was expected, got {_short(data)}")
    return [data[name] for name in names]


def _field(data: Any, own: torch.Size | None = None) -> StoredField:
    if not isinstance(data, list) or len(data) < 2 or not isinstance(data[0], str):
        raise ValueError(f"a field is a name, a coding, a shape, got {_short(data)}")
    name, coding, *more = data
    how = described(coding)
    shape = own
    if more and isinstance(more[0], list):
        shape = _shape(more.pop(0))
    if shape is None:
        raise ValueError(f"field {_short(name)} has no shape")
    length = payload_bytes(how, shape)
    if len(more) != (length is None):
        raise ValueError(f"field {_short(name)}: its number of bytes is missing or superfluous")
    if length is None:
        length = _integer("a number of bytes", more[0])
    return StoredField(name, how, shape, length)


def _check_size(field: StoredField, weights: int) -> None:
    """Refuse an array larger than its bytes and its weights can account for."""
    coded = isinstance(field.coding, Entropy)  # one symbol in millions of entries takes few bytes
    entries = math.prod(field.shape)
    most = (_PER_BYTE if coded else 8) * field.bytes + 2 * weights + (_CODED if coded else 64)
    if entries > most:
        raise ValueError(
            f"field {_short(field.name)} tells of {entries} entries in {field.bytes} bytes"
        )


def _shape(lengths: Any) -> torch.Size:
    if not isinstance(lengths, list) or len(lengths) > _AXES:
        raise ValueError(f"a shape is a list of lengths, got {_short(lengths)}")
    shape = [_integer("a length", x) for x in lengths]
    if math.prod(shape) > _LARGEST:
        raise ValueError(f"a shape of more than 2**63 - 1 entries, {_short(lengths)}")
    return torch.Size(shape)


def _integer(what: str, number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= _LARGEST:
        raise ValueError(f"{what} must be an integer from 0 to 2**63 - 1, got {_short(number)}")
    return number


def _dtype(name: Any) -> torch.dtype:
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError(f"unknown dtype {_short(name)}")
    return dtype


def _short(data: object) -> str:
    text = data[:200] if isinstance(data, str) else repr(data)
    return text if len(text) <= 80 else text[:77] + "..."


# ------------------------------------------------------------------ decoded


class PackedFile:
    """A packed file, its index checked: what `load` and the command line read from.

    Args:
        path: the file.
        known: the classes that it may name, from `specs.known_types`.
        bounded: refuse records that stand for far more weights than bytes; a caller that knows the
            model's shapes need not.

    Raises:
        FormatError: not such a file, damaged, of an unknown version or with unknown parts.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, known: dict[str, type], bounded: bool = True) -> None:
        self.path = path
        self._reader = Reader(path)
        self.records, self.aliases = parse(self._reader, known)
        self.bounded = bounded

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._reader.size

    @property
    def overhead(self) -> int:
        """Bytes that are no payload: header, index and checksums."""
        return self._reader.overhead

    def error(self, cause: str) -> FormatError:
        """An error of this file."""
        return self._reader.error(cause)

    def check(self) -> None:
        """Compare all checksums.

        Raises:
            FormatError: a record is damaged; the message names its tensors.
        """
        with self._reader.open() as file:
            for record in self.records:
                self._payload(file, record)

    def _payload(self, file: IO[bytes], record: Record) -> bytes:
        return self._reader.read(file, record.number, record.offset, record.bytes, str(record))

    def payloads(self, record: Record) -> dict[str, bytes]:
        """The bytes of each field."""
        with self._reader.open() as file:
            whole = memoryview(self._payload(file, record))
        found, start = {}, 0
        for field in record.fields:
            found[field.name] = bytes(whole[start : start + field.bytes])
            start += field.bytes
        return found

    def arrays(self, record: Record) -> dict[str, Tensor]:
        """The arrays of each field."""
        payloads = self.payloads(record)
        return self.attempt(
            record,
            lambda: {f.name: f.coding.unpack(payloads[f.name], f.shape) for f in record.fields},
        )

    def state(self, record: Record, arrays: Mapping[str, Tensor] | None = None) -> Any:
        """θ of a compressed task, on the CPU; from its arrays, if they are read already."""
        part = record.part
        assert part is not None
        if self.bounded and record.weights > _FREE + _PER_BYTE * record.bytes:
            raise self.error(
                f"{record}: {record.bytes} bytes that stand for {record.weights} weights are only "
                "read into a model that has them"
            )
        found = self.arrays(record) if arrays is None else arrays
        return self.attempt(record, lambda: part.decode(found, record.shape, record.dtypes[0]))

    def tensors(
        self, record: Record, arrays: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The model's tensors, Δ(θ) for a compressed task, on the CPU, by their names; from the
        arrays, if they are read already.
        """
        if record.part is not None:
            return self.weights(record, self.state(record, arrays))
        found = (self.arrays(record) if arrays is None else arrays).values()
        values = [
            _restored(x, dtype, shape)
            for x, dtype, shape in zip(found, record.dtypes, record.shapes, strict=True)
        ]
        return dict(zip(record.names, values, strict=True))

    def weights(self, record: Record, state: Any) -> dict[str, Tensor]:
        """Δ(θ) of a compressed task as the model's tensors, by their names."""
        part = record.part
        assert part is not None
        delta = self.attempt(record, lambda: part.reconstruct(state))
        if delta.shape != record.shape or delta.dtype != record.dtypes[0]:
            raise self.error(
                f"{record}: the parts make weights of shape {tuple(delta.shape)}, {delta.dtype}"
            )
        pieces = delta.reshape(-1).split([math.prod(shape) for shape in record.shapes])
        values = [x.view(shape) for x, shape in zip(pieces, record.shapes, strict=True)]
        return dict(zip(record.names, values, strict=True))

    def attempt(self, record: Record, step: Callable[[], Made]) -> Made:
        """Bytes with the right checksum may still be no array, and arrays no state."""
        try:
            return step()
        except Exception as cause:
            raise self.error(
                f"{record}: the stored bytes are no {record.part or 'tensor'} ({cause})"
            ) from cause


def _restored(x: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """An uncompressed tensor in the type that the model had it in."""
    if dtype.is_complex:
        real = torch.float64 if dtype == torch.complex128 else torch.float32
        return torch.view_as_complex(x.to(real))
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return x.view(dtype)
    return x.to(dtype).view(shape)
