"""A packed file: the arrays, states and weights of its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..coding import Raw
from ..modules import Packed
from .container import FormatError, Reader
from .index import PER_BYTE, Record, parse
from .layout import check_fields
from .tiles import check, fill

Made = TypeVar("Made")

# weights that a record of no bytes may stand for where no model says how many there are
_FREE = 1 << 24


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
        self._reader.check((r.offset, r.bytes, str(r)) for r in self.records)

    def packed(self, record: Record) -> dict[str, Packed]:
        """The fields as they are stored, by name: exactly those of its part."""
        sizes = [field.bytes for field in record.fields]
        payloads = self._reader.read(record.number, record.offset, sizes, str(record))
        fields = {
            field.name: Packed(field.coding, field.shape, payload)
            for field, payload in zip(record.fields, payloads, strict=True)
        }
        part = record.part
        if part is not None:
            self.attempt(record, lambda: check_fields(part, fields, record.shape))
        return fields

    def state(self, record: Record, fields: Mapping[str, Packed]) -> Any:
        """θ of a compressed task, on the CPU."""
        part = record.part
        assert part is not None
        self._check_bound(record)
        return self.attempt(
            record,
            lambda: part.decode(
                {name: x.unpack() for name, x in fields.items()}, record.shape, record.dtypes[0]
            ),
        )

    def fill(self, record: Record, target: Tensor) -> None:
        """Write Δ(θ) of a compressed task to a contiguous tensor of its shape and type, on the CPU,
        a few weights at a time.
        """
        part = record.part
        assert part is not None
        fields = self.packed(record)
        self.attempt(record, lambda: fill(part, fields, target))

    def check_weights(self, record: Record, fields: Mapping[str, Packed]) -> None:
        """Refuse the fields of a compressed task that are no state, without making its weights."""
        part = record.part
        assert part is not None
        self.attempt(record, lambda: check(part, fields, record.shape, record.dtypes[0]))

    def check_record(self, record: Record) -> None:
        """Refuse a record that cannot be read although its checksum is right, without making its
        weights.
        """
        fields = self.packed(record)
        if record.part is not None:
            self.check_weights(record, fields)
            return
        coded = [x for x in fields.values() if not isinstance(x.coding, Raw)]  # those always can
        self.attempt(record, lambda: [x.unpack() for x in coded])

    def tensors(self, record: Record) -> dict[str, Tensor]:
        """The model's tensors, Δ(θ) for a compressed task, on the CPU, by their names."""
        if record.part is not None:
            self._check_bound(record)
            delta = torch.empty(record.shape, dtype=record.dtypes[0])
            self.fill(record, delta)
            return record.split(delta)
        found = self.attempt(record, lambda: [x.unpack() for x in self.packed(record).values()])
        values = map(_restored, found, record.dtypes, record.shapes)
        return dict(zip(record.names, values, strict=True))

    def attempt(self, record: Record, step: Callable[[], Made]) -> Made:
        """Bytes with the right checksum may still be no array, and arrays no state."""
        try:
            return step()
        except Exception as cause:
            raise self.error(
                f"{record}: the stored bytes are no {record.part or 'tensor'} ({cause})"
            ) from cause

    def _check_bound(self, record: Record) -> None:
        if self.bounded and record.weights > _FREE + PER_BYTE * record.bytes:
            raise self.error(
                f"{record}: {record.bytes} bytes that stand for {record.weights} weights are only "
                "read into a model that has them"
            )


def _restored(x: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """An uncompressed tensor in the type that the model had it in."""
    if dtype.is_complex:
        real = torch.float64 if dtype == torch.complex128 else torch.float32
        return torch.view_as_complex(x.to(real))
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return x.view(dtype)
    return x.to(dtype).view(shape)
