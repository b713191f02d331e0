"""A reader of packed files that knows docs/format.md and nothing else: no torch, no lc_compress.

`read` takes the bytes of a file and gives its tensors by name. It is written to be compared with
the page, section by section, not to be fast.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
Fields = dict[str, Array]
Part = dict[str, Any]


class Refused(ValueError):
    """The bytes are no file of this format."""


def check(good: Any, cause: str) -> None:
    if not good:
        raise Refused(cause)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a model. Half precisions are held as float32, 8-bit floats as their bytes."""

    dtype: str
    array: Array


def read(data: bytes) -> dict[str, Tensor]:
    """All tensors of a model, each under all its names.

    Raises:
        Refused: the bytes break a rule of the format.
    """
    index, payload, checksums = opened(data)
    version = index.pop("version", None)
    check(type(version) is int and version == 1, "an unknown version")
    check(set(index) == {"parts", "tensors", "rest", "aliases"}, "keys of the index")
    check(isinstance(index["parts"], list) and isinstance(index["tensors"], list), "lists")
    check(isinstance(index["rest"], list) and isinstance(index["aliases"], dict), "rest, aliases")
    found: dict[str, Tensor] = {}
    records: list[tuple[list[Field], Callable[[Fields], dict[str, Tensor]]]] = []
    for task in index["tensors"]:
        records.append(read_task(task, index["parts"]))
    for data in index["rest"]:
        check(isinstance(data, list) and len(data) == 2 and isinstance(data[0], str), "a module")
        records.append(read_module(data[0], data[1]))
    check(len({data[0] for data in index["rest"]}) == len(index["rest"]), "a module twice")
    check(len(checksums) == len(records), "records and checksums")
    check(sum(f.bytes for fields, _ in records for f in fields) == len(payload), "bytes of records")
    at = 0
    for (fields, rebuild), checksum in zip(records, checksums, strict=True):
        length = sum(f.bytes for f in fields)
        record = payload[at : at + length]
        check(zlib.crc32(record) == checksum, "the checksum of a record")
        arrays = {}
        start = 0
        for f in fields:
            arrays[f.name] = decode(f.coding, record[start : start + f.bytes], f.shape)
            start += f.bytes
        at += length
        for name, tensor in rebuild(arrays).items():
            check(name not in found, "a name twice")
            found[name] = tensor
    for alias, first in index["aliases"].items():
        check(first in found and alias not in found, "a tied name")
    return found | {alias: found[first] for alias, first in index["aliases"].items()}


# ------------------------------------------------------------------ 1. bytes


def header(payload: int, index: int) -> bytes:
    text = (
        '{"__metadata__":{"lc_compress":"1"},'
        f'"payload":{{"dtype":"U8","shape":[{payload}],"data_offsets":[0,{payload}]}},'
        f'"index":{{"dtype":"U8","shape":[{index}],"data_offsets":[{payload},{payload + index}]}}}}'
    )
    return struct.pack("<Q", 200) + text.encode().ljust(200)


def opened(data: bytes) -> tuple[dict[str, Any], bytes, list[int]]:
    """Index, payload and the records' checksums."""
    sizes = re.findall(rb'"shape":\[(\d{1,13})\]', data[:208])
    check(len(sizes) == 2, "no header of a packed file")
    payload, length = map(int, sizes)
    check(data[:208] == header(payload, length), "the header is damaged")
    check(len(data) == 208 + payload + length, "the length of the file")
    packed = data[208 + payload :]
    check(length >= 4 and zlib.crc32(packed[:-4]) == uint(packed[-4:]), "the index is damaged")
    stream = zlib.decompressobj(-15)
    try:
        text = stream.decompress(packed[:-4], max(2**20, 400 * length))
    except zlib.error as cause:
        raise Refused("the index is no deflate stream") from cause
    check(stream.eof and len(stream.unused_data) % 4 == 0, "the index does not end")
    try:
        index = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_number)
    except (ValueError, RecursionError) as cause:
        raise Refused("the index is no JSON") from cause
    check(isinstance(index, dict), "the index is no object")
    checksums = np.frombuffer(stream.unused_data, "<u4").tolist()
    return index, data[208 : 208 + payload], checksums


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    check(len(dict(pairs)) == len(pairs), "a key twice")
    return dict(pairs)


def no_number(text: str) -> None:
    raise Refused(f"{text} is no JSON")


def uint(octets: bytes) -> int:
    return int.from_bytes(octets, "little")


# ------------------------------------------------------------------ 2. index


@dataclass(frozen=True)
class Field:
    name: str
    coding: list[Any]
    shape: Shape
    bytes: int


FLOATS = ("float64", "float32", "float16", "bfloat16")


def read_task(
    task: Any, parts: list[Part]
) -> tuple[list[Field], Callable[[Fields], dict[str, Tensor]]]:
    keys = {"names", "shapes", "dtype", "part", "fields"}
    check(isinstance(task, dict) and set(task) == keys, "keys of a task")
    names, dtype, number = task["names"], task["dtype"], task["part"]
    check(isinstance(names, list) and names and len(names) == len(task["shapes"]), "names")
    check(all(isinstance(name, str) for name in names), "a name")
    check(dtype in FLOATS, "a type of weights")
    check(type(number) is int and 0 <= number < len(parts), "a number of a part")
    shapes = [read_shape(x) for x in task["shapes"]]
    sizes = [math.prod(x) for x in shapes]
    whole = shapes[0] if len(shapes) == 1 else (sum(sizes),)
    check(isinstance(task["fields"], list), "fields")
    fields = [read_field(x, sum(sizes), whole) for x in task["fields"]]
    check(len({field.name for field in fields}) == len(fields), "a field twice")
    most = 2**24 + 4096 * sum(f.bytes for f in fields)
    check(sum(sizes) <= most, "more weights than the bytes can mean")
    check(depth(parts[number]) <= 32, "a part nested too deep")

    def rebuild(arrays: Fields) -> dict[str, Tensor]:
        flat = delta(parts[number], arrays, whole, dtype).reshape(-1)
        pieces = np.split(flat, np.cumsum(sizes)[:-1])
        return {
            name: Tensor(dtype, piece.reshape(shape))
            for name, piece, shape in zip(names, pieces, shapes, strict=True)
        }

    return fields, rebuild


def read_field(data: Any, weights: int, own: Shape | None = None) -> Field:
    check(isinstance(data, list) and len(data) > 1 and isinstance(data[0], str), "a field")
    name, coding, *more = data
    shape = read_shape(more.pop(0)) if more and isinstance(more[0], list) else own
    check(shape is not None, "a field without a shape")
    assert shape is not None
    length = known_length(coding, math.prod(shape))
    check(len(more) == (length is None), "bytes are missing, or too much")
    if length is None:
        length = more[0]
        check(type(length) is int and 0 <= length < 2**63, "a number of bytes")
    coded = coding[0] == "entropy"
    most = (4096 if coded else 8) * length + 2 * weights + (2**17 if coded else 64)
    check(math.prod(shape) <= most, "more entries than bytes can mean")
    return Field(name, coding, shape, length)


def read_shape(data: Any) -> Shape:
    check(isinstance(data, list) and len(data) <= 64, "a shape")
    check(all(type(x) is int and 0 <= x < 2**63 for x in data), "a length")
    check(math.prod(data) < 2**63, "too many entries")
    return tuple(data)


def depth(data: Any) -> int:
    if isinstance(data, dict):
        data = list(data.values())
    return 1 + max(map(depth, data), default=0) if isinstance(data, list) else 0


# ------------------------------------------------------------------ 3. codings

RAW = {
    **{"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"},
    **{"int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "<i1", "uint8": "<u1"},
    "bool": "<u1",
}


def known_length(coding: Any, count: int) -> int | None:
    """Bytes of a coding where its array's shape says them."""
    check(isinstance(coding, list) and coding and isinstance(coding[0], str), "a coding")
    kind, arguments = coding[0], coding[1:]
    expected = {"raw": 1, "fixed": 1, "radix": 1, "support": 1, "entropy": 1}
    expected |= {"groups": 4, "blocks": 2}
    check(expected.get(kind) == len(arguments), "a coding")
    if kind == "raw":
        check(arguments[0] in RAW, "a type")
        return count * np.dtype(RAW[arguments[0]]).itemsize
    if kind == "fixed":
        check(type(arguments[0]) is int and 0 <= arguments[0] <= 63, "a number of bits")
        return -(-count * arguments[0] // 8)
    if kind == "radix":
        check(type(arguments[0]) is int and 2 <= arguments[0] <= 256, "a base")
        return -(-count // digits(arguments[0]))
    return None


def digits(base: int) -> int:
    return max(d for d in range(1, 9) if base**d <= 256)


def decode(coding: list[Any], payload: bytes, shape: Shape) -> Array:
    """The array of a coding. bfloat16 becomes float32; all integers are wide enough."""
    kind, *arguments = coding
    count = math.prod(shape)
    if kind == "raw":
        return decode_raw(arguments[0], payload).reshape(shape)
    if kind == "fixed":
        return codes(payload, count, arguments[0]).reshape(shape)
    if kind == "radix":
        return decode_radix(arguments[0], payload, count).reshape(shape)
    if kind == "entropy":
        return decode_entropy(arguments[0], payload, shape)
    check(len(shape) == 1, "positions are a vector")
    if kind == "support":
        check(type(arguments[0]) is int and 0 <= arguments[0] < 2**63, "a size")
        return decode_support(arguments[0], payload, count)
    if kind == "groups":
        return decode_groups(read_shape(arguments[0]), *arguments[1:], payload, count)
    return decode_blocks(read_shape(arguments[0]), arguments[1], payload, count)


def decode_raw(kind: str, payload: bytes) -> Array:
    numbers = np.frombuffer(payload, RAW[kind])
    if kind == "bfloat16":
        return (numbers.astype("<u4") << 16).view("<f4")
    check(kind != "bool" or not (numbers > 1).any(), "a bool")
    return numbers


def codes(payload: bytes, count: int, width: int) -> Array:
    """`fixed`: int64."""
    check(len(payload) == -(-count * width // 8), "the length of codes")
    bits = np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little")
    check(not bits[count * width :].any(), "padding is not zero")
    return from_bits(bits[: count * width].reshape(count, width))


def from_bits(bits: Array) -> Array:
    """Numbers (n,) of rows of bits, the lowest first."""
    place = np.int64(1) << np.arange(bits.shape[1], dtype=np.int64)
    return (bits.astype(np.int64) * place).sum(1)


def decode_radix(base: int, payload: bytes, count: int) -> Array:
    d = digits(base)
    check(len(payload) == -(-count // d), "the length of digits")
    octets = np.frombuffer(payload, np.uint8).astype(np.int64)
    check(not (octets >= base**d).any(), "a byte of impossible digits")
    found = (octets[:, None] // base ** np.arange(d) % base).reshape(-1)
    check(not found[count:].any(), "padding is not zero")
    return found[:count]


def decode_support(size: int, payload: bytes, k: int) -> Array:
    check(k <= size, "more positions than there are")
    if k in (0, size):
        check(not payload, "bytes where none are needed")
        return np.arange(k)
    check(payload, "no bytes")
    way, bits = payload[0], np.unpackbits(np.frombuffer(payload[1:], np.uint8), bitorder="little")
    if way == 0:
        check(len(bits) == -(-size // 8) * 8 and not bits[size:].any(), "a bitmap")
        positions = np.flatnonzero(bits[:size])
    elif way <= 32:
        escape = 2**way - 1
        positions, end = np.empty(k, np.int64), 0
        at, skipped, found = 0, -1, 0
        while found < k:
            check(at + way <= len(bits), "the gaps end too soon")
            code = uint(np.packbits(bits[at : at + way], bitorder="little").tobytes())
            skipped, at = skipped + code, at + way
            if code != escape:
                skipped += 1
                positions[found] = skipped
                found += 1
            check(skipped < size, "a position beyond the size")
        end = at
        check(len(bits) - end < 8 and not bits[end:].any(), "padding is not zero")
    else:
        b = way - 64
        check(1 <= b <= 32 and k * b < len(bits), "a way of positions")
        lower = from_bits(bits[: k * b].reshape(k, b))
        ones = np.flatnonzero(bits[k * b :])
        check(len(ones) == k, "the number of gaps")
        check(len(bits) - k * b - ones[-1] - 1 < 8, "bytes behind the last gap")
        upper = np.diff(ones, prepend=-1) - 1
        check(int(upper.max()) <= size >> b, "a gap beyond the size")
        positions = np.cumsum(upper * 2**b + lower + 1) - 1
    check(len(positions) == k and positions[-1] < size, "the number or range of positions")
    return positions


def decode_groups(shape: Shape, n: Any, m: Any, axis: Any, payload: bytes, k: int) -> Array:
    check(all(type(x) is int for x in (n, m, axis)) and m >= 1 and 0 <= n <= m, "groups")
    check(-len(shape) <= axis < len(shape), "an axis")
    size, length = math.prod(shape), shape[axis]
    lines = size // length if length else 0
    width = (math.comb(m, n) - 1).bit_length()
    full = lines * (length // m * n + min(length % m, n))
    if not 0 < width <= 62 or k != full or m > 4096 or n > 64:
        return decode_support(size, payload, k)
    per_line = -(-length // m)
    choices = codes(payload, lines * per_line, width)
    # flat positions in lines along the axis, (lines, length)
    order = np.moveaxis(np.arange(size).reshape(shape), axis, -1).reshape(lines, length)
    found = []
    for group, choice in enumerate(choices.tolist()):
        line, first = divmod(group, per_line)
        inside = min(m, length - first * m)
        slots, left = [], choice
        for i in range(n, 0, -1):
            slot = max(s for s in range(m) if math.comb(s, i) <= left)
            left -= math.comb(slot, i)
            slots.append(slot)
        check(left == 0 and len(set(slots)) == n, "an impossible choice")
        check(set(range(inside, n)) <= set(slots), "slots behind the end of a line")
        check(sum(slot >= inside for slot in slots) == max(0, n - inside), "slots behind a line")
        found += [order[line, first * m + slot] for slot in slots if slot < inside]
    return np.sort(np.array(found, np.int64))


def decode_blocks(shape: Shape, tiling: Any, payload: bytes, k: int) -> Array:
    check(isinstance(tiling, dict) and set(tiling) <= {"axis", "block", "shapes"}, "a tiling")
    check(("axis" in tiling) != ("block" in tiling), "a tiling")
    shapes = [read_shape(x) for x in tiling.get("shapes", [list(shape)])]
    check(sum(map(math.prod, shapes)) == math.prod(shape), "shapes of a tiling")
    blocks: list[Array] = []  # flat positions of each
    start = 0
    for tensor in shapes:
        check(len(tensor) >= 2, "a tiling of a vector")
        flat = np.arange(start, start + math.prod(tensor)).reshape(tensor)
        start += flat.size
        if "axis" in tiling:
            axis = tiling["axis"]
            check(type(axis) is int and -len(tensor) <= axis < len(tensor), "an axis")
            blocks += [x.reshape(-1) for x in np.moveaxis(flat, axis, 0)]
        else:
            rows, columns = tiling["block"]
            check(type(rows) is int and type(columns) is int and min(rows, columns) > 0, "a tile")
            matrix = flat.reshape(tensor[0], -1)
            blocks += [
                matrix[i : i + rows, j : j + columns].reshape(-1)
                for i in range(0, matrix.shape[0], rows)
                for j in range(0, matrix.shape[1], columns)
            ]
    sizes = {len(block) for block in blocks}
    if len(sizes) == 1:
        (each,) = sizes
        check(k % each == 0, "a part of a block")
        filled = decode_support(len(blocks), payload, k // each).tolist()
    else:
        filled = np.flatnonzero(codes(payload, len(blocks), 1)).tolist()
    positions = np.sort(np.concatenate([np.empty(0, np.int64), *(blocks[i] for i in filled)]))
    check(len(positions) == k, "the number of positions")
    return positions


def decode_entropy(inner: Any, payload: bytes, shape: Shape) -> Array:
    check(isinstance(inner, list) and inner, "an inner coding")
    check(inner[0] in ("raw", "fixed", "radix", "support"), "an inner coding")
    count = math.prod(shape)
    known_length(inner, count)
    if not payload:
        return decode_plain(inner, b"", shape)
    if payload[0] == 0:
        check(len(payload) > 1, "no bytes of the inner coding")
        return decode_plain(inner, payload[1:], shape)
    if inner[0] == "support":
        return entropy_positions(inner[1], payload, count)
    width = {
        "raw": lambda: 8 * np.dtype(RAW[inner[1]]).itemsize,
        "fixed": lambda: inner[1],
        "radix": lambda: (inner[1] - 1).bit_length(),
    }[inner[0]]()
    numbers = entropy_numbers(payload, count, width)
    if inner[0] != "raw":
        check(inner[0] == "fixed" or all(u < inner[1] for u in numbers), "a code")
        return np.array(numbers, np.int64).reshape(shape)
    if inner[1] in FLOATS:
        numbers = [u >> 1 | (u & 1) << width - 1 for u in numbers]
    octets = b"".join(u.to_bytes(width // 8, "little") for u in numbers)
    return decode_plain(inner, octets, shape)


def decode_plain(coding: list[Any], payload: bytes, shape: Shape) -> Array:
    length = known_length(coding, math.prod(shape))
    check(length is None or length == len(payload), "the length of a coding")
    return decode(coding, payload, shape)


def entropy_numbers(payload: bytes, count: int, width: int) -> list[int]:
    r = payload[0] - 1
    check(0 <= r < width and count > 0, "a number of lower bits")
    least, at = base128(payload, 1)
    more, at = base128(payload, at)
    check(more < 4096 and least + more << r < 2**width, "a range of symbols")
    check(at < len(payload), "no table of frequencies")
    mantissa, bits = payload[at] & 15, payload[at] >> 4
    check(mantissa <= 10 and (bits == 0 or 2**bits - 2 >> mantissa <= 23), "a table")
    end = at + 1 - (-(more + 1) * bits // 8)
    weights = [1] * (more + 1)
    if bits:
        table = codes(payload[at + 1 : end], more + 1, bits).tolist()
        weights = [
            2**mantissa + (c - 1) % 2**mantissa << (c - 1 >> mantissa) if c else 0 for c in table
        ]
    check(any(weights), "no symbol")
    stop = end - (-count * r // 8)
    lower = codes(payload[end:stop], count, r).tolist()
    symbols = read_symbols(payload[stop:], count, frequencies(weights))
    return [(s + least << r) + x for s, x in zip(symbols, lower, strict=True)]


def entropy_positions(size: int, payload: bytes, kept: int) -> Array:
    check(0 < kept < size, "bytes where none are needed")
    k = min(kept, size - kept)
    r = max(0, (size // k).bit_length() - 1 - 2)
    check(payload[0] in (1, 2), "a way of positions")
    escaped, at = [], 1
    if payload[0] == 2:
        escapes, at = base128(payload, 1)
        check(0 < escapes <= len(payload), "a number of long gaps")
        for _ in range(escapes):
            more, at = base128(payload, at)
            escaped.append(more)
    end = at - (-k * r // 8)
    lower = codes(payload[at:end], k, r).tolist()
    q = (size - k) * 2**62 // size
    for _ in range(r):
        q = q * q // 2**62
    beyond = [2**40]
    for _ in range(63):
        beyond.append(beyond[-1] * q // 2**62)
    weights = [max(1, a - b) for a, b in zip(beyond, [*beyond[1:], 0], strict=True)]
    upper = read_symbols(payload[end:], k, frequencies(weights))
    check(upper.count(63) == len(escaped), "the number of long gaps")
    long = iter(escaped)
    positions, at = [], -1
    for u, x in zip(upper, lower, strict=True):
        at += ((u + next(long) if u == 63 else u) << r) + x + 1
        check(at < size, "a position beyond the size")
        positions.append(at)
    if k == kept:
        return np.array(positions)
    mask = np.ones(size, np.bool_)
    mask[positions] = False
    return np.flatnonzero(mask)


def frequencies(weights: list[int]) -> list[int]:
    used, total = sum(w > 0 for w in weights), sum(weights)
    found = [1 + w * (16384 - used) // total if w else 0 for w in weights]
    found[weights.index(max(weights))] += 16384 - sum(found)
    return found


def read_symbols(payload: bytes, count: int, f: list[int]) -> list[int]:
    lanes = 1 if count < 2**17 else 2 ** ((count // 8192).bit_length() - 1)
    check(len(payload) >= 4 * lanes and len(payload) % 2 == 0, "states and words")
    states = np.frombuffer(payload, "<u4", lanes).tolist()
    words = np.frombuffer(payload[4 * lanes :], "<u2").tolist()
    first = np.cumsum([0, *f[:-1]]).tolist()
    of = np.repeat(np.arange(len(f)), f).tolist()
    symbols, used = [], 0
    for i in range(count):
        x = states[i % lanes]
        y = x % 16384
        s = of[y]
        symbols.append(s)
        x = f[s] * (x // 16384) + y - first[s]
        if x < 65536 and (lanes > 1 or used < len(words)):
            check(used < len(words), "the words end too soon")
            x = 65536 * x + words[used]
            used += 1
        states[i % lanes] = x
    check(used == len(words), "words are left")
    check(all(x == (0 if lanes == 1 else 65536) for x in states), "a state at the end")
    return symbols


def base128(payload: bytes, at: int) -> tuple[int, int]:
    number = 0
    for i in range(9):
        check(at + i < len(payload), "a number in base 128")
        number += payload[at + i] % 128 << 7 * i
        if payload[at + i] < 128:
            return number, at + i + 1
    raise Refused("a number in base 128")


# ------------------------------------------------------------------ 4. parts: arithmetic

LARGEST = {
    "float64": float(np.finfo(np.float64).max),
    "float32": float(np.finfo(np.float32).max),
    "float16": 65504.0,
    "bfloat16": float(np.uint32(0x7F7F0000).view(np.float32)),
}


def held(dtype: str) -> str:
    """E, which also holds what is of type D."""
    return "<f8" if dtype == "float64" else "<f4"


def to(x: Array, dtype: str) -> Array:
    """Converted to D, held in E."""
    with np.errstate(over="ignore"):
        x = x.astype(held(dtype))
        if dtype == "float16":
            return x.astype("<f2").astype("<f4")
    if dtype == "bfloat16":
        bits = x.view("<u4").astype(np.uint64)
        bits = bits + 0x7FFF + (bits >> 16 & 1)  # to the nearest, ties to even
        return (bits >> 16 << 16).astype("<u4").view("<f4")
    return x


def sat(x: Array, dtype: str) -> Array:
    if dtype in ("float64", "float32"):
        return x
    limit = np.float32(LARGEST[dtype])
    return to(np.clip(x, -limit, limit), dtype)


def given(values: list[float], dtype: str) -> Array:
    """Numbers of the index as numbers of D."""
    numbers = np.array([float(x) for x in values], np.float64)
    check(np.isfinite(numbers).all(), "a value that is not finite")
    return to(np.clip(numbers, -LARGEST[dtype], LARGEST[dtype]), dtype)


def spread(part: Part, scales: Array, shape: Shape) -> Array:
    """The scale of each weight."""
    axis, group = part.get("axis"), part.get("group")
    check(axis is None or group is None, "an axis and a group")
    number = np.zeros(shape, np.int64)
    if axis is not None:
        check(-len(shape) <= axis < len(shape), "an axis")
        line = np.arange(shape[axis])
        number += line.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    elif group is not None:
        check(group >= 1, "a group")
        number = np.arange(number.size).reshape(shape) // group
    return scales[number]


def scale_count(part: Part, shape: Shape) -> int:
    if part.get("axis") is not None:
        return shape[part["axis"]]
    group = part.get("group")
    return 1 if group is None else -(-math.prod(shape) // group)


# ------------------------------------------------------------------ 4. parts: Δ


def delta(part: Any, fields: Fields, shape: Shape, dtype: str) -> Array:
    """Δ of this shape, of type D, held in E; all fields have to be used."""
    check(isinstance(part, dict) and part.get("type") in PARTS, "an unknown part")
    arguments, rebuild = PARTS[part["type"]]
    check(set(part) - {"type"} <= arguments, "an unknown argument")
    left = dict(fields)
    try:
        result = rebuild(part, left, shape, dtype)
    except (KeyError, IndexError, TypeError) as cause:
        raise Refused(f"a field or argument of {part['type']}: {cause}") from cause
    check(not left, f"fields that {part['type']} does not have: {set(left)}")
    check(result.shape == shape and result.dtype == held(dtype), "the shape of weights")
    return result


def take(fields: Fields, name: str, shape: Shape) -> Array:
    array = fields.pop(name)
    check(array.shape == shape, f"the shape of {name}")
    return array


def floats(fields: Fields, name: str, shape: Shape, dtype: str) -> Array:
    array = take(fields, name, shape)
    check(array.dtype.kind == "f", f"the type of {name}")
    return to(array, dtype)


def integers(fields: Fields, name: str, shape: Shape, below: int) -> Array:
    array = take(fields, name, shape)
    check(array.dtype.kind in "iu", f"the type of {name}")
    check(not ((array < 0) | (array >= below)).any(), f"the range of {name}")
    return array.astype(np.int64)


def signs_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    if part.get("scale") is not None:
        check(part.get("axis") is None and part.get("group") is None, "a given scale")
        scales = given([part["scale"]], dtype)
    else:
        scales = floats(fields, "scale", (scale_count(part, shape),), dtype)
    if part["type"] == "Binary":
        signs = 2 * integers(fields, "positive", shape, 2) - 1
    else:
        signs = integers(fields, "signs", shape, 3) - 1
    return signs.astype(held(dtype)) * spread(part, scales, shape)


def codebook_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    if part["type"] == "KMeans":
        values = floats(fields, "codebook", (part["k"],), dtype)
    elif part["type"] == "FixedCodebook":
        values = given(ascending(part["values"]), dtype)
    else:
        powers = [2.0**-i for i in range(part["c"] + 1)]
        values = given([*(-x for x in powers), 0.0, *reversed(powers)], dtype)
    return values[integers(fields, "codes", shape, len(values))]


def ascending(values: list[float]) -> list[float]:
    return sorted({float(x) + 0.0 for x in values})


def scaled_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    scales = floats(fields, "scale", (scale_count(part, shape),), dtype)
    values = given(ascending(part["values"]), "float64" if dtype == "float64" else "float32")
    numbers = values[integers(fields, "codes", shape, len(values))]
    with np.errstate(over="ignore"):
        return sat(numbers * spread(part, scales, shape), dtype)


def int_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    count, symmetric = scale_count(part, shape), part.get("symmetric", True)
    scales = floats(fields, "scale", (count,), dtype)
    top = 2 ** part["width"] - (2 if symmetric else 1)
    numbers = integers(fields, "codes", shape, top + 1)
    if symmetric:
        zeros = np.full(count, top // 2)
    else:
        zeros = integers(fields, "zero", (count,), top + 1)
    numbers = (numbers - spread(part, zeros, shape)).astype(held(dtype))
    with np.errstate(over="ignore"):
        return sat(numbers * spread(part, scales, shape), dtype)


def fixed_point_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    count, half = scale_count(part, shape), 2 ** (part["width"] - 1)
    exponents = integers(fields, "exponents", (count,), 256).astype(np.int64) - 128
    least, largest = part.get("exponents", [0, 19])
    check(((least <= exponents) & (exponents <= largest)).all(), "an exponent out of range")
    numbers = integers(fields, "codes", shape, 2 * half).astype(np.int64) - half
    steps = spread(part, np.ldexp(1.0, -exponents), shape)
    return sat((numbers * steps).astype(held(dtype)), dtype)


ELEMENTS = {  # bits, mantissa bits, exponent of the subnormals, largest code of a magnitude
    "e4m3": (8, 3, -6, 126),
    "e5m2": (8, 2, -14, 123),
    "e2m3": (6, 3, 0, 31),
    "e3m2": (6, 2, -2, 31),
    "e2m1": (4, 1, 0, 7),
    "int8": (8, 6, 0, 127),
}


def block_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    if part["type"] == "MX":
        width, mantissa, lowest, top = ELEMENTS[part["element"]]
        block, first, count = part.get("block", 32), -127, 255
    else:
        width = part["width"]
        mantissa, lowest, top = width - 1, width - 1, 2 ** (width - 1) - 1
        block, first, count = part.get("block", 64), -127 - (width - 1), 256
    axis = part.get("axis", -1)
    check(-len(shape) <= axis < len(shape) and block >= 1, "an axis, or a block")
    axis %= len(shape)
    length = shape[axis]
    others = shape[:axis] + shape[axis + 1 :]
    s = first + integers(fields, "exponents", (*others, -(-length // block)), count)
    s = np.moveaxis(s.repeat(block, -1)[..., :length], -1, axis)
    codes = integers(fields, "codes", shape, 2**width)
    c = codes % 2 ** (width - 1)
    check(not (c > top).any(), "the range of codes")
    octave = np.maximum((c >> mantissa) - 1, 0)
    sizes = np.ldexp((c - (octave << mantissa)).astype(float), lowest + octave - mantissa + s)
    limit = LARGEST["float64" if dtype == "float64" else "float32"]
    values = np.copysign(np.minimum(sizes, limit), np.where(codes >> (width - 1), -1, 1))
    return sat(values.astype(held(dtype)), dtype)


def sparse_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    positions = fields.pop("positions")
    values = floats(fields, "values", (len(positions),), dtype)
    result = np.zeros(math.prod(shape), held(dtype))
    result[checked(positions, result.size)] = values
    return result.reshape(shape)


def checked(positions: Array, size: int) -> Array:
    check(positions.ndim == 1 and positions.dtype.kind == "i", "positions")
    check((np.diff(positions, prepend=-1) > 0).all(), "the order of positions")
    check(not len(positions) or positions[-1] < size, "a position beyond the weights")
    return positions


def low_rank_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    check(len(shape) == 2, "a matrix")
    r = min(part["rank"], *shape)
    left = floats(fields, "left", (shape[0], r), dtype)
    return sat(left @ floats(fields, "right", (r, shape[1]), dtype), dtype)


def rank_selection_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    schemes = part.get("schemes", [{"type": "Matrix"}])
    view = schemes[int(integers(fields, "scheme", (1,), len(schemes))[0])]
    rows, columns = seen(view, shape)
    r = int(integers(fields, "rank", (1,), min(rows, columns) + 1)[0])
    left = floats(fields, "left", (rows, r), dtype)
    product = left @ floats(fields, "right", (r, columns), dtype)
    return restored(view, sat(product, dtype), shape)


# ------------------------------------------------------------------ 4. parts: compositions


def sum_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    terms = part["parts"]
    check(all(term.get("type") != "Sum" for term in terms) and terms, "terms of a sum")
    total: Any = None
    for i, term in enumerate(terms):
        mine = below(fields, f"{i}.")
        at = mine.get("positions") if term["type"] in SPARSE and i else None
        piece = delta(term, mine, shape, dtype)
        if at is None:
            total = piece if total is None else total + piece
        else:  # −0 stays elsewhere
            total = total.copy()
            total.reshape(-1)[at] += piece.reshape(-1)[at]
    return to(total, dtype)


def below(fields: Fields, prefix: str) -> Fields:
    """Fields whose names start with the prefix, without it; they are taken out."""
    names = [name for name in fields if name.startswith(prefix)]
    return {name[len(prefix) :]: fields.pop(name) for name in names}


def over_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    inner, view = part["part"], part["view"]
    mine = {}
    for name in list(fields):
        array = fields.pop(name)
        if per_weight(inner, name):
            check(array.shape == shape, f"the shape of {name}")
            array = shown(view, array)
        mine[name] = array
    return restored(view, delta(inner, mine, seen(view, shape), dtype), shape)


def seen(view: Part, shape: Shape) -> Shape:
    """The shape that a view makes."""
    if view["type"] == "Vector":
        return (math.prod(shape),)
    if view["type"] == "Matrix":
        rows = view.get("rows", 1)
        check(1 <= rows < len(shape), "rows of a view")
        return math.prod(shape[:rows]), math.prod(shape[rows:])
    check(view["type"] == "KernelMatrix" and len(shape) == 4, "a view")
    return shape[0] * shape[2], shape[1] * shape[3]


def entries(view: Part, shape: Shape) -> Array:
    """For each entry that the view shows, its flat position in the weights."""
    flat = np.arange(math.prod(shape)).reshape(shape)
    if view["type"] == "KernelMatrix":
        rows, columns = seen(view, shape)
        row, column = np.indices((rows, columns))
        return flat[row // shape[2], column // shape[3], row % shape[2], column % shape[3]]
    return flat.reshape(seen(view, shape))


def shown(view: Part, array: Array) -> Array:
    return array.reshape(-1)[entries(view, array.shape)]


def restored(view: Part, array: Array, shape: Shape) -> Array:
    result = np.empty(math.prod(shape), array.dtype)
    result[entries(view, shape)] = array
    return result.reshape(shape)


def each_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    shapes = [read_shape(x) for x in part["shapes"]]
    sizes = [math.prod(x) for x in shapes]
    check(shape == (sum(sizes),), "shapes of a group")
    own = [below(fields, f"{i}.") for i in range(len(shapes))]
    for name, array in below(fields, "all.").items():
        check(array.shape == shape, f"the shape of all.{name}")
        pieces = np.split(array, np.cumsum(sizes)[:-1])
        for mine, piece, tensor in zip(own, pieces, shapes, strict=True):
            mine[name] = piece.reshape(tensor)
    pieces = [
        delta(part["part"], mine, tensor, dtype) for mine, tensor in zip(own, shapes, strict=True)
    ]
    return np.concatenate([piece.reshape(-1) for piece in pieces])


def then_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    outer, inner = part["outer"], part["inner"]
    check(outer["type"] in CONTINUOUS, "what `then` compresses")
    sparse = outer["type"] in SPARSE
    kept = {name: fields.pop(name) for name in list(fields) if "." not in name}
    for name, layout in CONTINUOUS[outer["type"]](outer, kept, shape).items():
        at_positions = below(fields, f"{name}@positions.")
        mine = below(fields, f"{name}.")
        if not mine and not at_positions:
            check(math.prod(layout) == 0, f"{name} is missing")
            continue
        for key, array in at_positions.items():
            dense = np.zeros(math.prod(layout), array.dtype)
            check(sparse and array.shape == kept["positions"].shape, f"the shape of {key}")
            dense[checked(kept["positions"], dense.size)] = array
            mine[key] = dense.reshape(layout)
        values = delta(inner, mine, layout, dtype)
        kept[name] = values.reshape(-1)[kept["positions"]] if sparse else values
    return delta(outer, kept, shape, dtype)


def pruned_delta(part: Part, fields: Fields, shape: Shape, dtype: str) -> Array:
    product = {"outer": part["pruner"], "inner": part["format"]}
    return then_delta(product, fields, shape, dtype)


def scale_layout(part: Part, fields: Fields, shape: Shape) -> dict[str, Shape]:
    return {"scale": (scale_count(part, shape),)}


def low_rank_layout(part: Part, fields: Fields, shape: Shape) -> dict[str, Shape]:
    r = min(part["rank"], *shape)
    return {"left": (shape[0], r), "right": (r, shape[1])}


def rank_selection_layout(part: Part, fields: Fields, shape: Shape) -> dict[str, Shape]:
    schemes = part.get("schemes", [{"type": "Matrix"}])
    rows, columns = seen(schemes[int(fields["scheme"][0])], shape)
    r = int(fields["rank"][0])
    return {"left": (rows, r), "right": (r, columns)}


SPARSE = {
    "Sparse": {"nonzeros", "density", "value_dtype"},
    "SparsePenalty": {"alpha", "value_dtype"},
    "L1Ball": {"radius", "value_dtype"},
    "L1Penalty": {"alpha", "value_dtype"},
    "NM": {"n", "m", "axis", "value_dtype"},
    "BlockSparse": {"blocks", "density", "axis", "block", "value_dtype", "shapes"},
    "BlockPenalty": {"alpha", "axis", "block", "value_dtype", "shapes"},
    "GroupL2Penalty": {"alpha", "axis", "block", "value_dtype", "shapes"},
}
CONTINUOUS: dict[str, Callable[[Part, Fields, Shape], dict[str, Shape]]] = {
    **dict.fromkeys(("Binary", "Ternary", "ScaledCodebook", "Int"), scale_layout),
    "KMeans": lambda part, fields, shape: {"codebook": (part["k"],)},
    **dict.fromkeys(SPARSE, lambda part, fields, shape: {"values": shape}),
    "LowRank": low_rank_layout,
    "RankSelection": rank_selection_layout,
}
PER_WEIGHT = {
    "Binary": "positive",
    "Ternary": "signs",
    **dict.fromkeys(("KMeans", "FixedCodebook", "PowersOfTwo", "ScaledCodebook", "Int"), "codes"),
    **dict.fromkeys(("HBFP", "MX", "FixedPoint"), "codes"),
}
BLOCKS = {"axis", "group", "value_dtype"}
PARTS: dict[str, tuple[set[str], Callable[[Part, Fields, Shape, str], Array]]] = {
    "Binary": (BLOCKS | {"scale"}, signs_delta),
    "Ternary": (BLOCKS | {"scale"}, signs_delta),
    "KMeans": ({"k", "value_dtype"}, codebook_delta),
    "FixedCodebook": ({"values"}, codebook_delta),
    "PowersOfTwo": ({"c"}, codebook_delta),
    "ScaledCodebook": (BLOCKS | {"values"}, scaled_delta),
    "Int": (BLOCKS | {"width", "symmetric", "scale"}, int_delta),
    "FixedPoint": ({"width", "axis", "rounding", "exponents", "saturate"}, fixed_point_delta),
    "HBFP": ({"width", "block", "axis", "scale"}, block_delta),
    "MX": ({"element", "block", "axis", "scale", "rounding"}, block_delta),
    **{name: (arguments, sparse_delta) for name, arguments in SPARSE.items()},
    "LowRank": ({"rank", "value_dtype"}, low_rank_delta),
    "RankSelection": (
        {"alpha", "cost", "schemes", "positions", "value_dtype"},
        rank_selection_delta,
    ),
    "Sum": ({"parts", "tolerance", "sweeps"}, sum_delta),
    "Then": ({"outer", "inner"}, then_delta),
    "QuantizedThenPruned": ({"format", "pruner", "mask_from"}, pruned_delta),
    "Over": ({"part", "view"}, over_delta),
    "Each": ({"part", "shapes"}, each_delta),
}


def per_weight(part: Part, name: str) -> bool:
    """Whether a field has one entry for each weight."""
    kind = part["type"]
    if kind == "Sum":
        i, _, rest = name.partition(".")
        return per_weight(part["parts"][int(i)], rest)
    if kind == "Over":
        return per_weight(part["part"], name)
    if kind == "Each":
        return name.startswith("all.")
    if kind == "Then":
        return "." not in name and per_weight(part["outer"], name)
    return PER_WEIGHT.get(kind) == name


# ------------------------------------------------------------------ 5. uncompressed tensors

INTEGERS = ("int64", "int32", "int16", "int8", "uint8")


def read_module(
    module: str, data: Any
) -> tuple[list[Field], Callable[[Fields], dict[str, Tensor]]]:
    check(isinstance(data, list) and data, "the tensors of a module")
    fields, dtypes = [], {}
    for entry in data:
        check(isinstance(entry, list) and len(entry) > 3, "a tensor")
        name, dtype, *field = entry
        check(isinstance(name, str) and isinstance(dtype, str) and name not in dtypes, "a tensor")
        dtypes[name] = dtype
        fields.append(read_field([name, *field], 0))

    def rebuild(arrays: Fields) -> dict[str, Tensor]:
        return {
            f"{module}.{name}" if module else name: Tensor(dtypes[name], plain(x, dtypes[name]))
            for name, x in arrays.items()
        }

    return fields, rebuild


def plain(x: Array, dtype: str) -> Array:
    if dtype in FLOATS:
        check(x.dtype.kind == "f", "a number that is no float")
        return x.astype(held(dtype))  # exact
    if dtype == "bool":
        check(x.dtype.kind in "iu" and not (x > 1).any(), "a bool")
        return x.astype(np.bool_)
    if dtype in INTEGERS:
        check(x.dtype.kind in "iu", "a number that is no integer")
        limits = np.iinfo(dtype)
        check(not x.size or (limits.min <= x.min() and x.max() <= limits.max), "an integer")
        return x.astype(dtype)
    if dtype in ("complex64", "complex128"):
        check(x.dtype.kind == "f" and x.shape[-1:] == (2,), "a complex number")
        pairs = x.astype("<f4" if dtype == "complex64" else "<f8")
        return np.ascontiguousarray(pairs).view(dtype)[..., 0]
    check(dtype in ("float8_e4m3fn", "float8_e5m2") and x.dtype.itemsize == 1, "an unknown type")
    return x.view(np.uint8)
