"""The file itself: a safetensors container with two byte tensors, `payload` and `index`.

    8 bytes      length of the safetensors header, always 200
    200 bytes    safetensors header: JSON, padded with spaces
    payload      the records' bytes, one after the other
    index        deflated JSON that says what the records are, a CRC-32 of each record, and one of
                 the index before it

The index is last so that a file is written in one pass, a record at a time. A header of fixed
length is filled in at the end. docs/format.md describes every byte.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ..atomic import replacing

VERSION = 1

_HEADER = 200  # bytes of the safetensors header
_START = 8 + _HEADER
_MOST_JSON = 400  # an index of `describe` is at most so many times longer than deflated, or
_SMALL_JSON = 1 << 20  # at most this long
_PIECE = 1 << 19  # bytes whose checksum is taken at once: they stay in the cache


class FormatError(ValueError):
    """A file that is damaged, of another kind, or of a version or with parts that are unknown."""


class Writer:
    """Writes a file front to back: records, then the index.

    Nothing is at `path` until `finish` has brought the whole file to the disk.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._checksums: list[int] = []
        self.length = 0
        file.seek(_START)

    def record(self, payloads: Iterable[bytes]) -> None:
        """One record: the payloads of its fields, each of a whole number of bytes."""
        checksum = 0
        for payload in payloads:
            self._file.write(payload)
            self.length += len(payload)
            checksum = zlib.crc32(payload, checksum)
        self._checksums.append(checksum)

    def finish(self, index: dict[str, Any]) -> int:
        """The index and the header; returns the bytes of both, the checksums among them."""
        text = json.dumps({"version": VERSION, **index}, separators=(",", ":"), allow_nan=False)
        packed = indexed(text.encode(), self._checksums)
        self._file.write(packed)
        self._file.seek(0)
        self._file.write(_header(self.length, len(packed)))
        return _START + len(packed)


def indexed(text: bytes, checksums: Sequence[int]) -> bytes:
    """The index of a file: JSON, the records' checksums, and its own."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)  # without zlib's frame
    packed = deflate.compress(text) + deflate.flush() + np.array(checksums, "<u4").tobytes()
    return packed + zlib.crc32(packed).to_bytes(4, "little")


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """A `Writer` whose file takes the place of `path` at the end, whole or not at all."""
    with replacing(path) as file:
        yield Writer(file)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _header(payload: int, index: int) -> bytes:
    """The first bytes of a file with this many bytes of payload and index."""
    tensors = {
        "__metadata__": {"lc_compress": str(VERSION)},
        "payload": {"dtype": "U8", "shape": [payload], "data_offsets": [0, payload]},
        "index": {"dtype": "U8", "shape": [index], "data_offsets": [payload, payload + index]},
    }
    text = json.dumps(tensors, separators=(",", ":")).encode().ljust(_HEADER)
    assert len(text) == _HEADER, "the header has room for 10^13 bytes"
    return _HEADER.to_bytes(8, "little") + text


class Reader:
    """The index and the checked records of a file.

    Raises:
        FormatError: not such a file, or damaged; the message names the file and the cause.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checked = False
        with open(path, "rb") as file:
            self._opened = _identity(file)
            self.size = os.fstat(file.fileno()).st_size
            self.payload, length = self._lengths(file.read(_START))
            file.seek(_START + self.payload)
            index, rest = self._inflated(file.read(length))
        self.overhead = _START + length
        self.checksums: list[int] = (
            np.frombuffer(rest, "<u4").tolist() if len(rest) % 4 == 0 else []
        )
        if len(rest) % 4:
            raise self.error(f"the checksums are {len(rest)} bytes, no multiple of 4")
        try:
            data = json.loads(index.decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as cause:
            raise self.error(f"the index is no JSON ({cause})") from None
        if not isinstance(data, dict):
            raise self.error("the index is no JSON object")
        version = data.get("version")
        if type(version) is not int or version != VERSION:
            raise self.error(f"it has version {str(version)[:20]}, this library reads {VERSION}")
        self.index: dict[str, Any] = data

    def error(self, cause: str) -> FormatError:
        return FormatError(f"{self.path}: {cause}.")

    def _lengths(self, start: bytes) -> tuple[int, int]:
        """Bytes of payload and index; the header is compared with the only one there can be."""
        numbers = re.search(
            rb'"payload":{"dtype":"U8","shape":\[(\d{1,13})\].*"shape":\[(\d{1,13})\]', start
        )
        if b'"lc_compress"' not in start or numbers is None:
            raise self.error(
                "not a packed file of this library, or the first bytes are damaged: they are no "
                "header of one"
            )
        payload, index = int(numbers[1]), int(numbers[2])
        if b'"lc_compress":"%d"' % VERSION not in start:
            raise self.error(f"the header is damaged or of another version than {VERSION}")
        if _header(payload, index) != start:
            raise self.error("the header is damaged")
        if _START + payload + index != self.size:
            raise self.error(
                f"the header tells of {_START + payload + index} bytes, the file has {self.size}: "
                "it is truncated or damaged"
            )
        return payload, index

    def _inflated(self, packed: bytes) -> tuple[bytes, bytes]:
        """The index's text, and the checksums that follow it."""
        if zlib.crc32(packed[:-4]) != int.from_bytes(packed[-4:], "little"):
            raise self.error("the index is damaged: its checksum is wrong")
        stream = zlib.decompressobj(-15)
        most = max(_SMALL_JSON, _MOST_JSON * len(packed))
        try:
            text = stream.decompress(packed[:-4], most)
        except zlib.error as cause:
            raise self.error(f"the index is damaged ({cause})") from None
        if not stream.eof:
            raise self.error("the index is cut off, or far longer than an index can be")
        return text, stream.unused_data

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        with open(self.path, "rb", buffering=0) as file:
            if _identity(file) != self._opened:
                raise self.error("it has changed since it was opened")
            yield file

    def check(self, records: Iterable[tuple[int, int, str]]) -> None:
        """Compare the checksums of all records, each given as offset, length and what it is called;
        they are not compared again, as long as the file is not written to.
        """
        piece = memoryview(bytearray(_PIECE))
        with self.open() as file:
            for number, (offset, length, what) in enumerate(records):
                file.seek(_START + offset)
                checksum, left = 0, length
                while left and (count := file.readinto(piece[:left])):  # type: ignore[attr-defined]
                    checksum = zlib.crc32(piece[:count], checksum)
                    left -= count
                self._compare(number, checksum, left, what)
        self._checked = True

    def read(self, number: int, offset: int, lengths: Sequence[int], what: str) -> list[Tensor]:
        """The bytes (uint8) of each field of a record, its checksum compared."""
        found, checksum, left = [], 0, 0
        with self.open() as file:
            file.seek(_START + offset)
            for length in lengths:
                field = torch.empty(length, dtype=torch.uint8)
                memory = field.numpy().data
                while length and (count := file.readinto(memory[-length:])):  # type: ignore[attr-defined]
                    length -= count
                left += length
                if not self._checked:
                    checksum = zlib.crc32(memory, checksum)
                found.append(field)
        self._compare(number, self.checksums[number] if self._checked else checksum, left, what)
        return found

    def _compare(self, number: int, checksum: int, left: int, what: str) -> None:
        if left or checksum != self.checksums[number]:
            raise self.error(f"{what}: the checksum is wrong, the stored bytes are damaged")


def _identity(file: IO[bytes]) -> tuple[int, ...]:
    """Changes when the file is written to, or replaced."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
