"""What a packed file holds, counted from the file; and whether it keeps the format's promises."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..entropy import Entropy
from ..metrics import table
from ..modules import Packed
from ..part import all_finite
from .container import FormatError
from .index import Record
from .records import PackedFile
from .specs import known_types


@dataclass(frozen=True)
class FileRow:
    """A task, what is not compressed, the header, or the whole file.

    weights: how many numbers.   bits: their size without padding.   bytes: their size in the file.
    ratio: 32 · weights / (8 · bytes).
    """

    name: str
    parts: str
    weights: int
    bits: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return self.bits / self.weights if self.weights else 0.0

    @property
    def ratio(self) -> float:
        return 4 * self.weights / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class FileReport:
    """Rows per task; what is uncompressed; the header (with index and checksums); the whole file.

    The rows' bytes add up to the size of the file.
    """

    path: str
    rows: tuple[FileRow, ...]
    uncompressed: FileRow
    header: FileRow
    total: FileRow

    def dicts(self) -> list[dict[str, Any]]:
        """All rows as plain dictionaries."""
        every = (*self.rows, self.uncompressed, self.header, self.total)
        return [
            asdict(row) | {"bits_per_weight": row.bits_per_weight, "ratio": row.ratio}
            for row in every
        ]

    def json(self) -> str:
        return json.dumps({"path": self.path, "rows": self.dicts()}, indent=1)

    def __str__(self) -> str:
        lines = [("", "parts", "weights", "bits", "bits/w", "×f32", "bytes")]
        for row in (*self.rows, self.uncompressed, self.header, self.total):
            lines.append(
                (
                    row.name,
                    row.parts,
                    f"{row.weights:,}",
                    f"{row.bits:,}",
                    f"{row.bits_per_weight:.3f}" if row.weights else "–",
                    f"{row.ratio:.2f}" if row.weights else "–",
                    f"{row.bytes:,}",
                )
            )
        return table(lines)


def inspect(path: str | os.PathLike[str], *, parts: Iterable[type] = ()) -> FileReport:
    """What a packed file holds, read from its header alone: no weights are decoded.

    Args:
        path: a file that `save` wrote.
        parts: classes of third-party parts and views that the file may name.

    Raises:
        FormatError, OSError: see `load`.
    """
    file = PackedFile(Path(path), known_types(parts))
    rows = tuple(_row(str(r), r) for r in file.records if r.part is not None)
    plain = [r for r in file.records if r.part is None]
    uncompressed = FileRow(
        "uncompressed",
        "",
        sum(r.weights for r in plain),
        sum(r.bits for r in plain),
        sum(r.bytes for r in plain),
    )
    header = FileRow("header", "", 0, 8 * file.overhead, file.overhead)
    every = (*rows, uncompressed, header)
    total = FileRow(
        "total",
        "",
        *(sum(getattr(row, key) for row in every) for key in ("weights", "bits", "bytes")),
    )
    return FileReport(str(path), rows, uncompressed, header, total)


def _row(name: str, record: Record) -> FileRow:
    return FileRow(name, str(record.part or ""), record.weights, record.bits, record.bytes)


def verify(path: str | os.PathLike[str], *, parts: Iterable[type] = ()) -> int:
    """Check everything that the format promises; returns how many records there are.

    Checksums; every array and state can be decoded; Δ(θ) has the stored shape and type and is
    finite; θ keeps the constraints of its part; and it is encoded to the same arrays in the same
    codings and bytes again.

    Raises:
        FormatError: a promise is broken; the message names the file, the tensor and the cause.
        OSError: it cannot be read.
    """
    file = PackedFile(Path(path), known_types(parts))
    file.check()
    for record in file.records:
        _check_tensors(file, record)
        if record.part is not None:
            packed = file.packed(record)
            _check_state(file, record, packed, file.state(record, packed))
            del packed  # before the next ones are read
    return len(file.records)


def _check_tensors(file: PackedFile, record: Record) -> None:
    """The tensors can be decoded; Δ(θ) is finite."""
    for name, x in file.tensors(record).items():
        if record.part is not None and not all_finite(x):
            raise FormatError(f"{file.path}: {name}: the weights contain NaN or inf.")


def _check_state(
    file: PackedFile, record: Record, packed: Mapping[str, Packed], state: Any
) -> None:
    """The state keeps its part's constraints, and is encoded to what is stored."""
    part = record.part
    assert part is not None
    if not file.attempt(record, lambda: part.admits(state)):
        raise FormatError(f"{file.path}: {record}: the state breaks a constraint of {part}.")
    fields = file.attempt(record, lambda: part.encode(state))
    if list(fields) != [field.name for field in record.fields]:
        raise FormatError(
            f"{file.path}: {record}: {record.part} has fields {list(fields)}, stored are "
            f"{[field.name for field in record.fields]}."
        )
    for stored in record.fields:
        field = fields[stored.name]
        inner = stored.coding.inner if isinstance(stored.coding, Entropy) else stored.coding
        same = field.data.shape == stored.shape and field.coding == inner
        coding, data = stored.coding, field.data
        if not same or coding.pack(data) != packed[stored.name].payload.numpy().tobytes():
            raise FormatError(
                f"{file.path}: {record}, field {stored.name}: the stored bytes are not those that "
                f"{record.part} writes."
            )
