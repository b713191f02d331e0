"""Codings: what was packed comes back, sizes are exact, damage is refused."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lc_compress import bits
from lc_compress.bits import look_up
from lc_compress.coding import Fixed, Radix, Raw, Support
from lc_compress.part import Coding

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]

shapes = st.lists(st.integers(0, 5), max_size=3).map(torch.Size)
seeds = st.integers(0, 2**32 - 1)


def check_round_trip(coding: Coding, data: torch.Tensor) -> torch.Tensor:
    payload = coding.pack(data)
    assert 0 <= 8 * len(payload) - coding.bits(data) < 8
    back = coding.unpack(payload, data.shape)
    assert back.shape == data.shape and back.device.type == "cpu"
    assert torch.equal(back.long() if not data.is_floating_point() else back, data.to(back.dtype))
    back.zero_()  # it owns its memory
    return back


def vector(*positions: int) -> torch.Tensor:
    return torch.tensor(positions, dtype=torch.int64)


def gaps_of(positions: torch.Tensor) -> list[int]:
    listed = positions.tolist()
    return [b - a - 1 for a, b in zip([-1, *listed], listed, strict=False)]


@st.composite
def supports(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    """Sizes to 2**40, gaps of every length, empty and full ones."""
    gaps = draw(
        st.one_of(
            st.lists(st.integers(0, 3), max_size=60),
            st.lists(st.integers(0, 2**9), max_size=12),
            st.lists(st.integers(0, 2**36), max_size=6),
        )
    )
    positions = torch.tensor(gaps, dtype=torch.int64).add(1).cumsum(0).sub(1)
    size = (int(positions[-1]) + 1 if gaps else 0) + draw(st.integers(0, 20))
    return size, positions


# ------------------------------------------------------------------ Raw


@given(shapes, seeds, st.sampled_from(FLOATS), st.sampled_from(FLOATS))
def test_raw_keeps_floats(
    shape: torch.Size, seed: int, dtype: torch.dtype, arrives: torch.dtype
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values = values.bfloat16().half().to(dtype).to(arrives).to(dtype).to(arrives)
    assert check_round_trip(Raw(dtype), values).dtype == dtype


@given(shapes, seeds, st.sampled_from(INTEGERS))
def test_raw_keeps_integers(shape: torch.Size, seed: int, dtype: torch.dtype) -> None:
    low, high = (0, 2) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    values = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
    assert check_round_trip(Raw(dtype), values.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    "dtype, octets",
    [
        (torch.float64, struct.pack("<d", -1.5)),
        (torch.float32, struct.pack("<f", -1.5)),
        (torch.float16, struct.pack("<e", -1.5)),
        (torch.bfloat16, struct.pack("<f", -1.5)[2:]),  # the upper half of a float32
    ],
)
def test_raw_is_little_endian(dtype: torch.dtype, octets: bytes) -> None:
    data = torch.tensor(-1.5)
    assert Raw(dtype).pack(data) == octets
    assert Raw(dtype).bits(data) == 8 * len(octets)
    assert Raw(torch.int32).pack(vector(258)) == b"\x02\x01\x00\x00"


@pytest.mark.parametrize("dtype", FLOATS)
def test_raw_keeps_special_values_of_its_own_dtype(dtype: torch.dtype) -> None:
    data = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=dtype)
    back = Raw(dtype).unpack(Raw(dtype).pack(data), data.shape)
    torch.testing.assert_close(back, data, rtol=0, atol=0, equal_nan=True)
    assert bool(back[3].signbit())


@pytest.mark.parametrize(
    "dtype, data",
    [
        (torch.float16, torch.tensor([1.0, 0.1])),
        (torch.float16, torch.tensor([1.0, 65536.0])),
        (torch.float32, torch.tensor([1.0, 0.1], dtype=torch.float64)),
        (torch.float32, torch.tensor([0, 2**24 + 1])),
        (torch.uint8, torch.tensor([0, -1])),
        (torch.int32, torch.tensor([0.0, 0.5])),
        (torch.bool, torch.tensor([0, 2])),
    ],
)
def test_raw_refuses_what_it_would_round(dtype: torch.dtype, data: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="1 of 2 values are not exactly representable"):
        Raw(dtype).pack(data)


def test_raw_takes_any_layout() -> None:
    data = torch.arange(12.0, requires_grad=True).view(3, 4).T
    assert torch.equal(Raw(torch.float32).unpack(Raw(torch.float32).pack(data), data.shape), data)


# ------------------------------------------------------------------ Fixed


@given(shapes, st.integers(0, 63), seeds)
def test_fixed_round_trip(shape: torch.Size, width: int, seed: int) -> None:
    codes = torch.randint(2**width, shape, generator=torch.Generator().manual_seed(seed))
    back = check_round_trip(Fixed(width), codes)
    assert back.dtype == (torch.uint8 if width <= 8 else torch.int64)
    assert Fixed(width).bits(codes) == codes.numel() * width
    if codes.numel():
        codes.view(-1)[-1] = 2**width - 1
        check_round_trip(Fixed(width), codes)


@pytest.mark.parametrize(
    "width, codes, payload",
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 0, 1], b"\x0d\x01"),
        (4, [1, 2, 3], b"\x21\x03"),
        (3, [7, 0, 7], b"\xc7\x01"),
        (12, [0xABC, 0x123], b"\xbc\x3a\x12"),
        (0, [0, 0, 0], b""),
        (5, [], b""),
    ],
)
def test_fixed_by_hand(width: int, codes: list[int], payload: bytes) -> None:
    assert Fixed(width).pack(vector(*codes)) == payload
    assert torch.equal(
        Fixed(width).unpack(payload, torch.Size([len(codes)])).long(), vector(*codes)
    )


@pytest.mark.parametrize("dtype", INTEGERS)
def test_fixed_and_radix_take_every_integer_dtype(dtype: torch.dtype) -> None:
    codes = torch.tensor([[1, 0, 1], [0, 0, 1]]).to(dtype)
    check_round_trip(Fixed(1), codes)
    check_round_trip(Radix(2), codes.T)


@pytest.mark.parametrize("coding, limit", [(Fixed(0), 1), (Fixed(2), 4), (Radix(3), 3)])
def test_codes_out_of_range(coding: Coding, limit: int) -> None:
    for bad in (limit, -1):
        with pytest.raises(ValueError, match=rf"from 0 to {limit - 1}, got {min(bad, 0)} to"):
            coding.pack(vector(0, bad))
    with pytest.raises(ValueError, match=r"writes bool, uint8.*got torch.float32"):
        coding.pack(torch.zeros(2))


@pytest.mark.parametrize("width", range(1, 64))
def test_fixed_over_many_words(width: int, generator: torch.Generator) -> None:
    """Enough codes for several blocks of words, against Python's own integers."""
    count = 2**17 + 13 if width in (2, 3, 7, 9, 31) else 1003
    codes = torch.randint(2**width - 1, (count,), generator=generator)
    check_round_trip(Fixed(width), codes)
    payload = Fixed(width).pack(codes)
    some = codes[:1003].tolist()
    whole = sum(code << i * width for i, code in enumerate(some))
    whole &= (1 << 1000 * width) - 1
    assert int.from_bytes(payload[: 125 * width], "little") == whole


# ------------------------------------------------------------------ Radix


@given(shapes, st.integers(2, 256), seeds)
def test_radix_round_trip(shape: torch.Size, base: int, seed: int) -> None:
    codes = torch.randint(base, shape, generator=torch.Generator().manual_seed(seed))
    assert check_round_trip(Radix(base), codes).dtype == torch.uint8
    check_round_trip(Radix(base), torch.full(shape, base - 1))


@pytest.mark.parametrize(
    "base, digits", [(2, 8), (3, 5), (4, 4), (5, 3), (6, 3), (7, 2), (16, 2), (17, 1), (256, 1)]
)
def test_radix_fills_a_byte(base: int, digits: int) -> None:
    assert base**digits <= 256 < base ** (digits + 1)
    for count, octets in [(0, 0), (1, 1), (digits, 1), (digits + 1, 2), (10 * digits, 10)]:
        assert Radix(base).bits(torch.zeros(count, dtype=torch.uint8)) == 8 * octets


def test_radix_of_every_byte() -> None:
    for base in (2, 3, 5, 16, 17, 256):
        coding = Radix(base)
        for octet in range(256):
            digits = [octet // base**i % base for i in range(coding.digits)]
            if octet < base**coding.digits:
                back = coding.unpack(bytes([octet]), torch.Size([coding.digits]))
                assert back.tolist() == digits and coding.pack(back) == bytes([octet])


def test_radix_by_hand() -> None:
    assert Radix(3).pack(vector(2, 2, 2, 2, 2, 1)) == bytes([242, 1])
    assert Radix(16).pack(vector(1, 2, 3)) == b"\x21\x03"


# ------------------------------------------------------------------ Support


@given(supports())
def test_support_round_trip(case: tuple[int, torch.Tensor]) -> None:
    size, positions = case
    if size > 2**20 and positions.numel() == size:  # a full support of that size is another test
        return
    assert check_round_trip(Support(size), positions).dtype == torch.int64


@given(supports())
def test_support_is_the_cheapest(case: tuple[int, torch.Tensor]) -> None:
    size, positions = case
    costs = [size]
    for width in range(1, 33):
        cost, previous = 0, -1
        for position in positions.tolist():
            gap = position - previous - 1
            cost += width * (gap // (2**width - 1) + 1)
            previous = position
        costs.append(cost)
        zeros = sum(gap >> width for gap in gaps_of(positions))
        costs.append(positions.numel() * (width + 1) + zeros)
    expected = 0 if positions.numel() in (0, size) else 8 + min(costs)
    assert Support(size).bits(positions) == expected


@pytest.mark.parametrize(
    "size, positions, bits, payload",
    [
        (10, [], 0, b""),
        (4, [0, 1, 2, 3], 0, b""),
        (0, [], 0, b""),
        (4, [0, 2, 3], 8 + 4, b"\x00\x0d"),  # the bitmap 1011; gaps in one bit would tie
        (100, [0], 8 + 1, b"\x01\x00"),  # the first gap is 0: one bit
        (100, [3, 9], 8 + 6, b"\x03\x2b"),  # gaps 3 and 5: 011, 101
        # gaps 0, 0, 0, 6: two bits each, the last as two escapes and a 0
        (100, [0, 1, 2, 9], 8 + 10, b"\x01\xf8\x01"),
        (2**40, [2**32 - 2], 8 + 32, b"\x20\xfe\xff\xff\xff"),
        (100, [3], 8 + 3, b"\x03\x03"),  # ties with one lower bit, a zero and a one
        # gaps 1, 2, 3, 9: lower bits 1011, then 1, 01, 01, 00001; fixed widths take 15 bits
        (100, [1, 4, 8, 18], 8 + 14, b"\x41\x5d\x21"),
        # gaps 3, 5, 2, 6, 21: lower bits 11 10 01 01 10, lowest first, then 1, 01, 1, 01, 000001
        (100, [3, 9, 12, 19, 41], 8 + 22, b"\x42\xa7\xb5\x20"),
    ],
)
def test_support_by_hand(size: int, positions: list[int], bits: int, payload: bytes) -> None:
    data = vector(*positions)
    assert Support(size).bits(data) == bits
    assert Support(size).pack(data) == payload
    assert torch.equal(Support(size).unpack(payload, data.shape), data)


def test_support_escapes() -> None:
    """One long gap among short ones: cheaper to escape than to widen every code."""
    positions = torch.cat([torch.arange(0, 350, 7), vector(384)])
    coding = Support(10_000)
    # gaps: 0, then 49 times 6, then 40 = 5 · 7 + 5; three bits take 50 + 6 codes, and upper bits in
    # unary never fewer than 3 bits for a gap of 6 (with two lower bits: 4)
    assert coding.bits(positions) == 8 + 3 * (50 + 6)
    assert coding.pack(positions)[0] == 3
    check_round_trip(coding, positions)


@pytest.mark.parametrize("b", [1, 2, 4, 7, 9, 13])
def test_support_with_upper_bits_in_unary(b: int, generator: torch.Generator) -> None:
    """Every number of lower bits; the bits are those of the docstring, one by one."""
    size = 400 * 2**b
    positions = torch.rand(size, generator=generator).lt(0.68 / 2**b).nonzero().squeeze(1)
    payload = Support(size).pack(positions)
    assert payload[0] == 64 + b
    gaps = gaps_of(positions)
    bits = [gap >> i & 1 for gap in gaps for i in range(b)]
    bits += [bit for gap in gaps for bit in [0] * (gap >> b) + [1]]
    octets = [bits[i : i + 8] for i in range(0, len(bits), 8)]
    assert payload[1:] == bytes(sum(x << i for i, x in enumerate(octet)) for octet in octets)
    check_round_trip(Support(size), positions)


@pytest.mark.parametrize("density", [0.001, 0.02, 0.3, 0.7, 0.999])
def test_support_of_random_weights(density: float, generator: torch.Generator) -> None:
    """Close to the entropy while few are kept, and never more than the bitmap."""
    size = 20_000
    positions = torch.rand(size, generator=generator).lt(density).nonzero().squeeze(1)
    check_round_trip(Support(size), positions)
    share = positions.numel() / size
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    bound = 1.06 * entropy * size if density < 0.5 else size
    assert Support(size).bits(positions) <= 8 + min(size, bound)


@pytest.mark.parametrize(
    "data, message",
    [
        (vector(0, 2, 2), "strictly increasing, got 2 before 2"),
        (vector(3, 1), "strictly increasing, got 3 before 1"),
        (vector(1, 10), "from 0 to 9, got 1 to 10"),
        (vector(-1, 3), "from 0 to 9, got -1 to 3"),
        (vector(2**63 - 1, -(2**63)), "from 0 to 9"),
        (torch.tensor([1, 2], dtype=torch.int32), "vector of int64, got torch.int32"),
        (vector(1, 2).view(1, 2), r"vector of int64, got torch.int64 of shape \(1, 2\)"),
    ],
)
def test_support_refuses(data: torch.Tensor, message: str) -> None:
    for act in (Support(10).bits, Support(10).pack):
        with pytest.raises(ValueError, match=message):
            act(data)


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    "coding, data",
    [
        (Raw(torch.float32), torch.ones(3, 2)),
        (Raw(torch.bool), torch.ones(3, dtype=torch.bool)),
        (Fixed(3), vector(1, 2, 3, 4, 5)),
        (Fixed(0), vector(0, 0)),
        (Radix(3), vector(0, 1, 2, 0, 1, 2)),
        (Support(30), vector(*range(0, 30, 2), 29)),  # a bitmap
        (Support(1000), vector(10, 20, 500)),  # gaps
        (Support(1000), vector(*range(0, 1000, 7), 998)),  # the same with upper bits in unary
        (Support(9), vector()),
        (Support(2), vector(0, 1)),
    ],
    ids=str,
)
def test_wrong_length_is_an_error(coding: Coding, data: torch.Tensor) -> None:
    payload = coding.pack(data)
    for damaged in (payload + b"\0", payload[:-1], b"", payload * 2, b"\1" + payload):
        if damaged != payload:
            with pytest.raises(ValueError, match=r"^(Raw|Fixed|Radix|Support)\("):
                coding.unpack(damaged, data.shape)


@pytest.mark.parametrize(
    "coding, payload, length, message",
    [
        (Raw(torch.bool), b"\1\2", 2, "neither 0 nor 1"),
        (Fixed(3), b"\x40", 2, "bits after the last code"),
        (Radix(3), b"\xf3", 5, "5 digits are less than 243, found a byte of 243"),
        (Radix(3), b"\x03", 1, "digits after the last one"),
        (Support(8), b"\x00\x07", 2, "2 positions below 8 were stored, found 3 up to 2"),
        (Support(4), b"\x00\x17", 3, "bits after the last code"),
        (Support(8), b"\x21\x07", 2, "starts with 33"),
        (Support(8), b"\x08\xff", 1, "hold 0 of 1 positions"),
        (Support(8), b"\x08\x08", 1, "found 1 up to 8"),
        (Support(8), b"\x04\x10", 1, "bits after the last code"),
        (Support(8), b"", 1, "the payload of 1 positions is empty"),
        (Support(8), b"\0\0", 9, "at most 8 positions"),
        (Support(8), b"\x40\x01", 1, "starts with 64"),
        (Support(8), b"\x61\x01", 1, "starts with 97"),
        (Support(8), b"\x42", 1, "do not hold 1 positions"),
        (Support(8), b"\x42\x01", 1, "holds 0 positions, not 1"),
        (Support(8), b"\x42\x0d", 1, "holds 2 positions, not 1"),
        (Support(8), b"\x42\x20", 1, "found 1 up to 12"),  # three zeros: 3 · 4
        (Support(8), b"\x42\x05\x00", 1, "must be 2 bytes long, got 3"),
    ],
)
def test_impossible_payload(coding: Coding, payload: bytes, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coding.unpack(payload, torch.Size([length]))


codings = st.one_of(
    st.sampled_from([*FLOATS, *INTEGERS]).map(Raw),
    st.integers(0, 63).map(Fixed),
    st.integers(2, 256).map(Radix),
    st.integers(0, 2**12).map(Support),
)


@given(codings, st.binary(max_size=40), shapes)
def test_any_bytes_give_an_array_or_a_value_error(
    coding: Coding, payload: bytes, shape: torch.Size
) -> None:
    try:
        data = coding.unpack(payload, shape)
    except ValueError:
        return
    assert data.shape == shape
    if isinstance(coding, Support):  # need not be the cheapest way, but is a support
        assert torch.equal(coding.unpack(coding.pack(data), shape), data)
    else:
        assert coding.pack(data) == payload


@given(st.integers(1, 300), st.binary(max_size=40), st.integers(1, 12), st.integers(0, 98))
def test_any_bytes_give_a_support_or_a_value_error(
    size: int, body: bytes, kept: int, width: int
) -> None:
    try:
        positions = Support(size).unpack(bytes([width]) + body, torch.Size([kept]))
    except ValueError:
        return
    assert positions.shape == (kept,)
    Support(size).bits(positions)  # sorted, distinct and in range, or it would raise


@pytest.mark.parametrize("coding", [Raw(torch.int8), Fixed(2), Radix(3), Support(4)], ids=str)
def test_negative_shape(coding: Coding) -> None:
    with pytest.raises(ValueError, match="is not a shape"):
        coding.unpack(b"", torch.Size([-1]))


@pytest.mark.parametrize("shape", [(2, 2), ()])
def test_support_is_a_vector(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="holds a vector"):
        Support(4).unpack(b"", torch.Size(shape))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Raw(torch.complex64), "dtype must be one of float64"),
        (lambda: Fixed(-1), "width must be from 0 to 63"),
        (lambda: Fixed(64), "width must be from 0 to 63"),
        (lambda: Radix(1), "base must be from 2 to 256"),
        (lambda: Radix(257), "base must be from 2 to 256"),
        (lambda: Support(-1), "size must be >= 0"),
        (lambda: Raw(torch.float32).pack(torch.zeros(1, dtype=torch.complex64)), "got torch.compl"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_codings_are_values(device: torch.device) -> None:
    assert Fixed(3) == Fixed(3) != Fixed(4)
    assert len({Support(5), Support(5), Radix(3), Raw(torch.float32)}) == 3
    check_round_trip(Support(50), vector(3, 9).to(device).cpu())
    assert Fixed(4).pack(vector(1, 2).to(device)) == b"\x21"


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 8])
def test_rows_of_a_table(width: int, dtype: type) -> None:
    """Rows of any number of bytes, cut in pieces or not."""
    generator = np.random.default_rng(0)
    table = generator.integers(0, 100, (256, width)).astype(dtype)
    for count in (0, 1, 1 << 15, (1 << 15) + 3):
        stored = generator.integers(0, 256, count).astype(np.uint8)
        rows = np.zeros((count, width), dtype)
        look_up(table, stored, rows)
        assert np.array_equal(rows, table[stored])


@pytest.mark.parametrize("width", [2, 4])
def test_codes_below_a_limit(width: int) -> None:
    """At every end of a word and of a piece, for every limit, with one code too many or none."""
    rng = np.random.default_rng(0)
    per_byte, piece = 8 // width, 8 * bits._WORDS
    for n in (0, 1, 7, 8, 9, piece, piece + 3):
        for limit in range(1, 2**width + 1):
            codes = rng.integers(0, limit, n * per_byte).astype(np.uint8)
            stored = np.frombuffer(bits.pack_codes(codes, width), np.uint8)
            assert bits.below(limit, width, stored)
            if limit == 2**width or n == 0:
                continue
            for place in (0, -1, int(rng.integers(codes.size))):
                wrong = codes.copy()
                wrong[place] = limit
                stored = np.frombuffer(bits.pack_codes(wrong, width), np.uint8)
                assert not bits.below(limit, width, stored)
