"""Entropy coding: what was packed comes back, close to the entropy, and damage is refused.

`read` below is a second reader, written from the docstrings symbol by symbol: it shows that they
say enough, and that long arrays, coded many at a time, follow them too.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lc_compress.binary import Binary
from lc_compress.coding import Fixed, Radix, Raw, Support
from lc_compress.entropy import Entropy, frequencies, positions, rans
from lc_compress.entropy.numbers import base128, read_base128
from lc_compress.part import Coding
from lc_compress.sparse import Sparse

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
seeds = st.integers(0, 2**32 - 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_round_trip(coding: Entropy, data: torch.Tensor) -> bytes:
    payload = coding.pack(data)
    assert 0 <= 8 * len(payload) - coding.bits(data) < 8
    assert coding.bits(data) <= coding.inner.bits(data) + 8
    assert (coding.bits(data) == 0) == (coding.inner.bits(data) == 0)
    back = coding.unpack(payload, data.shape)
    plain = coding.inner.unpack(coding.inner.pack(data), data.shape)
    assert back.dtype == plain.dtype and back.shape == data.shape
    assert octets(back) == octets(plain)  # NaN and -0.0 as well
    return payload


def octets(data: torch.Tensor) -> bytes:
    bits = data.view(torch.int16) if data.dtype == torch.bfloat16 else data
    return bits.numpy().tobytes()


def entropy(data: torch.Tensor) -> float:
    """Bits of the counts of the values."""
    counts = np.unique(data.numpy(), return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def bernoulli(kept: int, size: int) -> float:
    p = kept / size
    return size * (-p * math.log2(p) - (1 - p) * math.log2(1 - p))


def random_support(size: int, density: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(size, generator=generator).lt(density).nonzero().squeeze(1)


# ------------------------------------------------------------------ a second reader


def bits_of(payload: bytes, at: int, count: int, width: int) -> tuple[list[int], int]:
    """`count` codes of `width` bits from byte `at`."""
    length = math.ceil(count * width / 8)
    whole = int.from_bytes(payload[at : at + length], "little")
    return [whole >> i * width & (1 << width) - 1 for i in range(count)], at + length


def seven_bits(payload: bytes, at: int) -> tuple[int, int]:
    number, place = 0, 1
    while payload[at] >= 128:
        number, place, at = number + (payload[at] - 128) * place, place * 128, at + 1
    return number + payload[at] * place, at + 1


def to_frequencies(weights: list[int]) -> list[int]:
    m, total = sum(w > 0 for w in weights), sum(weights)
    found = [1 + w * (2**14 - m) // total if w else 0 for w in weights]
    found[weights.index(max(weights))] += 2**14 - sum(found)
    return found


def symbols_of(payload: bytes, count: int, f: list[int]) -> Iterator[int]:
    several = count >= 2**17
    lanes = 2 ** int(math.log2(count / 8192)) if several else 1
    states = [int.from_bytes(payload[4 * i : 4 * i + 4], "little") for i in range(lanes)]
    at = 4 * lanes
    starts = [sum(f[:s]) for s in range(len(f))]
    owner = [s for s, x in enumerate(f) for _ in range(x)]
    for i in range(count):
        x = states[i % lanes]
        y = x % 2**14
        s = owner[y]
        yield s
        x = f[s] * (x // 2**14) + y - starts[s]
        if x < 2**16 and at < len(payload):
            x = x * 2**16 + int.from_bytes(payload[at : at + 2], "little")
            at += 2
        states[i % lanes] = x
    assert at == len(payload) and states == [2**16 if several else 0] * lanes


def read_numbers(payload: bytes, count: int) -> list[int]:
    r = payload[0] - 1
    least, at = seven_bits(payload, 1)
    more, at = seven_bits(payload, at)
    a, b = payload[at] % 16, payload[at] // 16
    codes, at = bits_of(payload, at + 1, more + 1, b)
    weights = [1] * len(codes)
    if b:
        weights = [(2**a + (c - 1) % 2**a) * 2 ** ((c - 1) // 2**a) if c else 0 for c in codes]
    lower, at = bits_of(payload, at, count, r)
    symbols = symbols_of(payload[at:], count, to_frequencies(weights))
    return [(least + s) * 2**r + low for s, low in zip(symbols, lower, strict=True)]


def read_positions(payload: bytes, kept: int, size: int) -> list[int]:
    k = min(kept, size - kept)
    r = max(0, math.floor(math.log2(size / k)) - 2)
    q = (size - k) * 2**62 // size
    for _ in range(r):
        q = q * q // 2**62
    s = [2**40]
    for _ in range(63):
        s.append(s[-1] * q // 2**62)
    weights = [max(1, s[i] - s[i + 1]) for i in range(63)] + [max(1, s[63])]
    at, extra = 1, []
    if payload[0] == 2:
        escapes, at = seven_bits(payload, at)
        for _ in range(escapes):
            more, at = seven_bits(payload, at)
            extra.append(more)
    lower, at = bits_of(payload, at, k, r)
    positions, last = [], -1
    for symbol, low in zip(
        symbols_of(payload[at:], k, to_frequencies(weights)), lower, strict=True
    ):
        upper = symbol + extra.pop(0) if symbol == 63 else symbol
        last += upper * 2**r + low + 1
        positions.append(last)
    if k == kept:
        return positions
    return sorted(set(range(size)) - set(positions))


# ------------------------------------------------------------------ numbers


@given(st.integers(1, 63), st.integers(0, 400), st.floats(0.05, 30), seeds)
def test_codes_round_trip(width: int, count: int, spread: float, seed: int) -> None:
    codes = torch.randn(count, generator=seeded(seed)).mul(spread).round().abs().long()
    codes = codes.clamp(max=2**width - 1)
    if seed % 2:
        codes = 2**width - 1 - codes
    payload = check_round_trip(Entropy(Fixed(width)), codes)
    if payload and payload[0]:
        assert read_numbers(payload, count) == codes.tolist()


@given(st.integers(2, 256), st.integers(0, 400), seeds)
def test_digits_round_trip(base: int, count: int, seed: int) -> None:
    codes = torch.randn(count, generator=seeded(seed)).mul(base / 6).add(base / 2).long()
    payload = check_round_trip(Entropy(Radix(base)), codes.clamp(0, base - 1))
    if payload and payload[0]:
        assert read_numbers(payload, count) == codes.clamp(0, base - 1).tolist()


@given(st.sampled_from(FLOATS), st.integers(0, 300), st.floats(-30, 30), seeds)
def test_floats_round_trip(dtype: torch.dtype, count: int, scale: float, seed: int) -> None:
    values = torch.randn(count, generator=seeded(seed), dtype=torch.float64) * 2.0**scale
    if count > 3:
        values[:3] = torch.tensor([math.nan, -math.inf, -0.0])
    check_round_trip(Entropy(Raw(dtype)), values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.bool])
def test_integers_round_trip(dtype: torch.dtype, generator: torch.Generator) -> None:
    values = torch.randn(1000, generator=generator).mul(3).round()
    payload = check_round_trip(
        Entropy(Raw(dtype)), (values != 0 if dtype == torch.bool else values).to(dtype)
    )
    assert len(payload) < 1000 * dtype.itemsize


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0)])
def test_shapes(shape: tuple[int, ...]) -> None:
    for coding in (Entropy(Fixed(3)), Entropy(Raw(torch.float32)), Entropy(Radix(3))):
        ones = torch.ones(shape)
        check_round_trip(coding, ones if isinstance(coding.inner, Raw) else ones.long())


@pytest.mark.parametrize(
    "shares",
    [[0.5, 0.5], [0.7, 0.3], [0.97, 0.03], [0.2, 0.5, 0.3], [0.6, 0.3, 0.05, 0.05], [1 / 16] * 16],
)
@pytest.mark.parametrize("count", [300, 4608, 36_864])
def test_codes_close_to_their_entropy(
    shares: list[float], count: int, generator: torch.Generator
) -> None:
    codes = torch.multinomial(torch.tensor(shares), count, True, generator=generator)
    width = max(1, (len(shares) - 1).bit_length())
    bits = Entropy(Fixed(width)).bits(codes)
    model = 40 + 10 * len(shares)  # first bytes, state, and 10 bits for a frequency
    assert entropy(codes) <= bits <= min(8 + width * count, entropy(codes) * 1.002 + model)


def test_long_arrays_close_to_their_entropy(generator: torch.Generator) -> None:
    """A quarter of a million symbols have 32 states of four bytes."""
    codes = torch.multinomial(
        torch.tensor([0.6, 0.3, 0.07, 0.03]), 2**18, True, generator=generator
    )
    payload = check_round_trip(Entropy(Fixed(2)), codes)
    assert 8 * len(payload) <= 1.001 * entropy(codes) + 32 * 32
    assert read_numbers(payload, codes.numel()) == codes.tolist()


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 10.8), (torch.float16, 13.7)])
def test_values_of_gaussian_weights(
    dtype: torch.dtype, most: float, generator: torch.Generator
) -> None:
    """A sign and 7 or 10 bits of mantissa are random; an exponent carries two to three bits."""
    values = torch.randn(2000, generator=generator).to(dtype)
    assert Entropy(Raw(dtype)).bits(values) / 2000 < most


def test_numbers_by_hand() -> None:
    """Symbols 0 and 1, equally often: frequencies of 2**13 and one state."""
    codes = torch.tensor([8, 9, 9] + 100 * [8, 9])
    payload = Entropy(Fixed(6)).pack(codes)
    # no lower bits; the least symbol is 8; two symbols; all weights 1
    assert payload[:4] == bytes([1, 8, 1, 0])
    assert rans.encode(np.array([1, 0, 1]), np.array([2**13, 2**13])) == b"\x00\xa0\x00\x00"
    # from 0: 1 gives 8192, 0 gives 16384, 1 gives 2 · 16384 + 8192 = 0xa000


# ------------------------------------------------------------------ positions


@given(st.integers(1, 3000), st.floats(0, 1), seeds)
@example(2, 0.5, 2)
def test_support_round_trip(size: int, density: float, seed: int) -> None:
    positions = random_support(size, density, seeded(seed))
    payload = check_round_trip(Entropy(Support(size)), positions)
    if payload and payload[0]:
        assert read_positions(payload, positions.numel(), size) == positions.tolist()


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=30), st.integers(0, 2**62))
def test_far_positions(steps: list[int], beyond: int) -> None:
    """Sizes up to 2**63, and gaps far longer than the model expects."""
    positions = torch.tensor(steps).add(1).cumsum(0).sub(1)
    size = int(positions[-1]) + 1 + beyond
    if positions.numel() < size:
        check_round_trip(Entropy(Support(size)), positions)


@pytest.mark.parametrize("density", [0.01, 0.02, 0.05, 0.3, 0.5, 0.7, 0.95, 0.99])
@pytest.mark.parametrize("size", [2304, 36_864, 2**20])
def test_support_close_to_its_entropy(
    size: int, density: float, generator: torch.Generator
) -> None:
    positions = random_support(size, density, generator)
    bits = Entropy(Support(size)).bits(positions)
    bound = bernoulli(positions.numel(), size)
    states = rans.states(min(positions.numel(), size - positions.numel()))
    assert 0.97 * bound - 40 <= bits <= 1.005 * bound + 64 + 32 * states


def test_clustered_support(generator: torch.Generator) -> None:
    """Gaps that the model does not expect are escapes."""
    positions = torch.cat([torch.arange(500), torch.tensor([2**20, 2**30])])
    coding = Entropy(Support(2**31))
    assert check_round_trip(coding, positions)[0] == 2
    assert check_round_trip(Entropy(Support(10**6)), random_support(10**6, 0.9, generator))[0]


def test_resnet20(data_folder: Path) -> None:
    """One bit and 1 to 5 % floats: supports within 1 % + 4 bytes a layer of their entropy, values
    at most 70 % of bfloat16, and less in all than a packed file is to take.
    """
    path = data_folder / "resnet_cifar10" / "resnet20-12fca82f.th"
    weights = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    floats = [w for w in weights.values() if w.is_floating_point()]
    total = sum(w.numel() for w in floats)
    for density, plain_ratio, ratio in [
        (0.01, 22.1, 23.4),
        (0.02, 19.0, 21.1),
        (0.03, 16.8, 19.4),
        (0.05, 13.7, 16.5),
    ]:
        rest = 1200 + 2 * sum(w.numel() for w in floats if w.dim() < 2)  # header; half precision
        part = Binary(value_dtype=torch.float16)
        part = part + Sparse(density=density, value_dtype=torch.bfloat16)
        plain = coded = rest
        bound = found = values = 0.0
        for w in floats:
            if w.dim() < 2:
                continue
            fields = part.encode(part.project(w))
            for name, field in fields.items():
                flat = field.data.reshape(-1)
                length = len(Entropy(field.coding).pack(flat))
                plain += len(field.coding.pack(flat))
                coded += length
                if isinstance(field.coding, Support):
                    bound += bernoulli(flat.numel(), w.numel()) / 8
                    found += length
                elif name.endswith("values"):
                    values += length / (2 * flat.numel())
        layers = sum(w.dim() >= 2 for w in floats)
        assert abs(found - bound) <= 0.01 * bound + 4 * layers
        assert values / layers < 0.7
        assert 4 * total / plain > plain_ratio
        assert 4 * total / coded > ratio


# ------------------------------------------------------------------ the coder itself


@given(st.lists(st.integers(0, 2**35), min_size=1, max_size=200).filter(any))
def test_quantized_frequencies(weights: list[int]) -> None:
    found = rans.quantized(np.array(weights))
    assert int(found.sum()) == rans.TOTAL
    assert [f > 0 for f in found.tolist()] == [w > 0 for w in weights]
    assert found.tolist() == to_frequencies(weights)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000, 2**17 - 1, 2**17, 2**18 + 8191])
@pytest.mark.parametrize("shares", [[1], [0, 1, 0], [1, 1], [1, 2**12], [5, 0, 3, 1]])
def test_symbols_round_trip(count: int, shares: list[int], generator: torch.Generator) -> None:
    f = rans.quantized(np.array(shares))
    symbols = torch.multinomial(
        torch.tensor(shares).double(), max(count, 1), True, generator=generator
    )
    symbols = symbols[:count].numpy()
    payload = rans.encode(symbols, f)
    assert (rans.decode(payload, count, f) == symbols).all()
    ideal = -np.log2(f[symbols] / rans.TOTAL).sum() / 8
    assert len(payload) <= ideal * 1.0005 + (4 * rans.states(count) if count else 0)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300).filter(any))
def test_tables_of_frequencies(counts: list[int]) -> None:
    table, fitted, cost = frequencies.fitted(np.array(counts))
    back, length = frequencies.read(table + b"\xff", len(counts))
    assert length == len(table) and back.tolist() == fitted.tolist()
    assert all(f > 0 for f, c in zip(fitted.tolist(), counts, strict=True) if c)
    total, present = sum(counts), sum(c > 0 for c in counts)
    ideal = -sum(c * math.log2(c / total) for c in counts if c)
    # a table of b bits a symbol; rounding frequencies to 2**-14 and keeping all of them above 0
    most = 8 + 16 * len(counts) + ideal + total * (0.003 + present * 2**-12)
    assert ideal <= cost <= most


@given(st.integers(0, 2**63 - 1))
def test_base128(number: int) -> None:
    octets = base128(number)
    assert read_base128(b"x" + octets + b"\xff", 1) == (number, 1 + len(octets))
    assert seven_bits(octets, 0) == (number, len(octets))


# ------------------------------------------------------------------ damage


def samples() -> list[tuple[Entropy, torch.Tensor]]:
    g = seeded(1)
    return [
        (Entropy(Fixed(1)), torch.rand(900, generator=g).lt(0.2)),
        (Entropy(Fixed(4)), torch.randn(300, generator=g).add(8).round().clamp(0, 15).long()),
        (Entropy(Fixed(20)), torch.randn(300, generator=g).mul(900).abs().long()),
        (Entropy(Radix(3)), torch.randn(900, generator=g).mul(0.7).round().clamp(-1, 1).long() + 1),
        (Entropy(Raw(torch.bfloat16)), torch.randn(200, generator=g).bfloat16()),
        (Entropy(Raw(torch.float32)), torch.randn(200, generator=g)),
        (Entropy(Raw(torch.bool)), torch.rand(400, generator=g).lt(0.1)),
        (Entropy(Support(9000)), random_support(9000, 0.03, g)),
        (Entropy(Support(900)), random_support(900, 0.9, g)),
        (Entropy(Support(2**40)), torch.cat([torch.arange(300), torch.tensor([2**39])])),
        (Entropy(Fixed(3)), torch.randint(8, (50,), generator=g)),  # the inner coding
    ]


def check_read(coding: Entropy, payload: bytes, shape: torch.Size) -> bool:
    try:
        return coding.unpack(payload, shape).shape == shape
    except ValueError:
        return False


def check_unpacked(coding: Entropy, payload: bytes, shape: torch.Size) -> bool:
    """Whether the payload was read, as an array that can be written again."""
    try:
        data = coding.unpack(payload, shape)
    except ValueError as error:
        assert str(error).startswith(("Entropy(", "Raw(", "Fixed(", "Radix(", "Support("))
        return False
    assert data.shape == shape
    again = coding.unpack(coding.pack(data), shape)
    assert again.dtype == data.dtype
    assert octets(again) == octets(data)
    return True


SAMPLES = [(coding, coding.pack(array), array.shape) for coding, array in samples()]


@given(st.sampled_from(SAMPLES), st.data())
def test_mutated_payloads(sample: tuple[Entropy, bytes, torch.Size], data: st.DataObject) -> None:
    coding, original, shape = sample
    payload = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1) | st.integers(0, min(8, len(payload) - 1)))
        act = data.draw(st.sampled_from(["flip", "set", "cut", "insert", "drop"]))
        if act == "flip":
            payload[at] ^= 1 << data.draw(st.integers(0, 7))
        elif act == "set":
            payload[at] = data.draw(st.integers(0, 255))
        elif act == "cut":
            del payload[max(at, 1) :]
        elif act == "insert":
            payload.insert(at, data.draw(st.integers(0, 255)))
        elif len(payload) > 1:
            del payload[at]
    check_unpacked(coding, bytes(payload), shape)


codings = st.one_of(
    st.sampled_from([*FLOATS, torch.int64, torch.int8, torch.bool]).map(Raw),
    st.integers(0, 63).map(Fixed),
    st.integers(2, 256).map(Radix),
    st.integers(0, 2**12).map(Support),
    st.integers(0, 2**63 - 1).map(Support),
)
shapes = st.lists(st.integers(0, 40), min_size=1, max_size=2).map(torch.Size)


@given(codings, st.integers(0, 66), st.binary(max_size=60), shapes)
def test_any_bytes_give_an_array_or_a_value_error(
    coding: Coding, first: int, payload: bytes, shape: torch.Size
) -> None:
    if isinstance(coding, Support) and shape.numel() * 2 > coding.size > 10**6:
        return
    check_unpacked(Entropy(coding), bytes([first]) + payload, shape)


def test_a_state_notices_damage() -> None:
    """Whatever bit of the symbols flips, the state does not end where it started, nearly always."""
    codes = torch.randn(300, generator=seeded(2)).add(8).round().clamp(0, 15).long()
    coding = Entropy(Fixed(4))
    payload = coding.pack(codes)
    unnoticed = 0
    for bit in range(8 * (len(payload) - 20), 8 * len(payload)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        unnoticed += check_unpacked(coding, bytes(damaged), codes.shape)
    assert unnoticed < 3


@pytest.mark.parametrize(
    "coding, payload, shape, message",
    [
        (Fixed(4), b"", (2,), "must be 1 bytes long"),
        (Fixed(4), b"\0", (2,), "damaged payload, it starts with 0"),
        (Fixed(4), b"\0\x11\x11", (2,), "must be 1 bytes long, got 2"),
        (Fixed(4), b"\5\0\0", (2,), "starts with 5, beyond 4 bits"),
        (Fixed(4), b"\1", (2,), "base 128 does not end"),
        (Fixed(4), b"\1" + b"\xff" * 12, (2,), "base 128 does not end"),
        (Fixed(4), b"\1\x0f\x01\0", (2,), "2 symbols from 15 do not fit 4 bits"),
        (Fixed(20), b"\1\0\xff\x7f\0", (2,), "16384 symbols from 0"),
        (Fixed(4), b"\1\0\1", (2,), "table of frequencies is missing"),
        (Fixed(4), b"\1\0\1\x0b\0", (2,), "11 names no table"),
        (Fixed(4), b"\1\0\1\xf0\0", (2,), "240 names no table"),
        (Fixed(4), b"\1\0\1\x84\0", (2,), "hold no table of 3"),
        (Fixed(4), b"\1\0\1\x10\0\0\0\0\0", (2,), "no symbol of the table"),
        (Fixed(4), b"\3\0\1\0", (2,), "do not hold 2 times 2 bits"),
        (Fixed(4), b"\3\0\1\0\x10\0\0\0\0", (2,), "bits after the last code"),
        (Fixed(4), b"\1\0\1\0\0\0\0", (2,), "no 1 states"),
        (Fixed(4), b"\1\0\1\0\0\0\0\0\0", (2,), "no 1 states"),
        (Fixed(4), b"\1\0\1\0\0\0\0\1", (2,), "or in another state"),
        (Fixed(4), b"\1\0\0\0\0\0\0\0", (0,), "8 bytes for no entry"),
        (Fixed(0), b"\1\0\0\0\0\0\0\0", (3,), "starts with 1, beyond 0 bits"),
        (Radix(3), b"\1\2\1\0\0\xa0\0\0", (3,), "found a code of 3, not below 3"),
        (Support(9), b"\3\0\0\0\0", (2,), "starts with 3, not 1 or 2"),
        (Support(9), b"\2\0\0\0\0\0", (2,), "0 long gaps"),
        (Support(9), b"\2\x63\0\0\0\0", (2,), "99 long gaps"),
        (Support(9), b"\2\1\x0a\0\0\0\0", (2,), "a gap is beyond 9"),
        (Support(9), b"\2\1\1\0\0\0\0", (2,), "0 gaps are long, 1 were announced"),
        (Support(9), b"\1\0\0\0\0", (9,), "5 bytes for positions of shape"),
        (Support(9), b"\1\0\0\0\0", (0,), "5 bytes for positions of shape"),
        (Support(9), b"\1\0\0\0\0", (1, 2), "5 bytes for positions of shape"),
    ],
)
def test_impossible_payload(
    coding: Coding, payload: bytes, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Entropy(coding).unpack(payload, torch.Size(shape))


def test_several_states_notice_damage(generator: torch.Generator) -> None:
    count = 2**17 + 100
    f = rans.quantized(np.array([3, 1]))
    payload = rans.encode(torch.rand(count, generator=generator).lt(0.25).long().numpy(), f)
    for damaged in (payload[:-2], payload + b"\0\0"):
        with pytest.raises(ValueError, match="words"):
            rans.decode(damaged, count, f)
    still = 16 * (2**16).to_bytes(4, "little")  # one symbol alone leaves a state as it is
    assert not rans.decode(still, count, np.array([rans.TOTAL])).any()
    for at in range(0, 64, 4):
        moved = still[:at] + b"\1" + still[at + 1 :]
        with pytest.raises(ValueError, match="another state"):
            rans.decode(moved, count, np.array([rans.TOTAL]))


def test_gaps_that_overflow() -> None:
    """One position below 2**63 has 60 lower bits: upper bits of 16 would leave 64 bits as 0."""
    f = positions._model(1, 2**63 - 1)[1]
    for symbol in range(63):
        payload = b"\1" + bytes(8) + rans.encode(np.array([symbol]), f)
        if symbol < 8:
            found = positions.unpack_positions(payload, 1, 2**63 - 1)
            assert found.tolist() == [symbol << 60]
        else:
            with pytest.raises(ValueError, match="beyond"):
                positions.unpack_positions(payload, 1, 2**63 - 1)


def test_gaps_beyond_the_size() -> None:
    """Positions of a larger support, read with a size that gives the same model."""
    gaps = Support(100).gaps(torch.tensor([3, 70, 99]))
    payload = positions.pack_positions(gaps, 100)
    assert positions.unpack_positions(payload, 3, 100).tolist() == [3, 70, 99]
    payload = positions.pack_positions(gaps + 1, 100)
    with pytest.raises(ValueError, match="lead beyond 100"):
        positions.unpack_positions(payload, 3, 100)


@pytest.mark.parametrize(
    "coding", [Fixed(1), Fixed(40), Radix(3), Raw(torch.bfloat16), Support(2**60)], ids=str
)
@pytest.mark.parametrize("first", [0, 1, 2, 9])
def test_a_huge_shape_allocates_nothing(coding: Coding, first: int) -> None:
    payload = bytes([first, 0, 0, 0]) + bytes(60)
    tracemalloc.start()
    with pytest.raises(ValueError):
        Entropy(coding).unpack(payload, torch.Size((2**50,)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_memory_follows_the_payload() -> None:
    """Symbols without information: a state of four bytes claims at most 16384 entries."""
    payload = b"\1\0\0\0" + 64 * (2**16).to_bytes(4, "little")
    for count, good in [(2**20 - 1, True), (2**20, False)]:
        tracemalloc.start()
        assert check_read(Entropy(Fixed(1)), payload, torch.Size((count,))) == good
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**14 * len(payload)


@pytest.mark.parametrize("inner", [Entropy(Fixed(1)), "fixed", None])
def test_inner_codings(inner: object) -> None:
    with pytest.raises(ValueError, match="Raw, Fixed, Radix or Support"):
        Entropy(inner)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "inner, data, message",
    [
        (Fixed(2), torch.tensor([4]), "integers from 0 to 3"),
        (Fixed(0), torch.tensor([1]), "integers from 0 to 0"),
        (Radix(3), torch.tensor([3]), "integers from 0 to 2"),
        (Raw(torch.float16), torch.tensor([0.1]), "not exactly representable"),
        (Support(4), torch.tensor([2, 1]), "strictly increasing"),
    ],
)
def test_refuses_what_the_inner_coding_refuses(
    inner: Coding, data: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Entropy(inner).pack(data)


def test_entropy_codings_are_values() -> None:
    assert Entropy(Fixed(3)) == Entropy(Fixed(3)) != Entropy(Fixed(4))
    assert len({Entropy(Support(5)), Entropy(Support(5)), Support(5)}) == 2


@pytest.mark.parametrize(
    ("coding", "most"),
    [(Fixed(1), 4), (Fixed(4), 4), (Fixed(8), 5), (Raw(torch.float32), 20)],
    ids=str,
)
def test_memory_of_packing(coding: Coding, most: float) -> None:
    """Bytes per entry beside the data: a 64-bit integer for each would be 8 and more, and floats
    with their bits as bytes 35.
    """
    count = 1 << 19
    data = torch.randn(count, generator=torch.Generator().manual_seed(0))
    if isinstance(coding, Fixed):
        data = (data.abs() * 2**coding.width / 4).clamp(max=2**coding.width - 1).to(torch.uint8)
    tracemalloc.start()
    try:
        Entropy(coding).pack(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most * count + (1 << 21)
