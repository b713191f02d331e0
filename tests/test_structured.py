"""N:M and structured sparsity: choices written out by loops, storage, groups of layers, the group
lasso against another solver.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize
from torch import Tensor, nn

from lc_compress import LC, Joint, KMeans, Matrix, Sparse, each
from lc_compress.coding import Support
from lc_compress.nm import NM, GroupSupport
from lc_compress.part import Part, squared_error
from lc_compress.structured import BlockForm, BlockPenalty, BlockSparse, GroupL2Penalty
from lc_compress.tiling import BlockSupport, Tiling

SHAPES = ((6, 8), (5, 7), (4, 3, 2, 2), (1, 1), (3, 70))


def delta(part: Part, w: Tensor, h: Tensor | None = None, mu: float | None = None) -> Tensor:
    return part.reconstruct(part.project(w, importance=h, mu=mu))


def groups(shape: tuple[int, ...], m: int, axis: int) -> Iterator[list[tuple[int, ...]]]:
    """The indices of every m consecutive entries along the axis."""
    axis %= len(shape)
    others = [range(n) if i != axis else range(1) for i, n in enumerate(shape)]
    for start in torch.cartesian_prod(*map(torch.tensor, map(list, others))).tolist():
        for at in range(0, shape[axis], m):
            stop = min(at + m, shape[axis])
            yield [
                tuple(j if i == axis else x for i, x in enumerate(start)) for j in range(at, stop)
            ]


# ------------------------------------------------------------------ N:M


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (4, 4), (0, 4), (3, 33), (20, 40), (1, 1)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_nm_keeps_the_n_largest_of_each_group(shape, n, m, axis, generator) -> None:  # type: ignore[no-untyped-def]
    part = NM(n, m, axis=axis)
    for w in (
        torch.randn(shape, generator=generator),
        torch.randint(-2, 3, shape, generator=generator).float(),  # ties: the first ones
    ):
        expected = torch.zeros_like(w)
        for group in groups(shape, m, axis):
            for index in sorted(group, key=lambda i: -abs(float(w[i])))[:n]:
                expected[index] = w[index]
        state = part.project(w)
        assert torch.equal(part.reconstruct(state), expected)
        assert part.admits(state)
        dense = Sparse(density=1.0).project(w)
        fits = all(sum(bool(w[i] != 0) for i in group) <= n for group in groups(shape, m, axis))
        assert part.admits(dense) == fits


def test_nm_importance_and_rounding_choose() -> None:
    w = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    h = torch.tensor([[9.0, 0.0, 1.0, 0.5]])  # h w² = 9, 0, 9, 8
    assert delta(NM(2, 4), w, h).tolist() == [[1.0, 0.0, 3.0, 0.0]]
    assert delta(NM(1, 4), w, h).tolist() == [[1.0, 0.0, 0.0, 0.0]]  # a tie: the first
    beyond = torch.tensor([[7e4, 6.6e4]]).double()  # float16 ends at 65504
    assert NM(1, 2, value_dtype=torch.float16).project(beyond).values.tolist() == [65504.0]


@pytest.mark.parametrize(
    ("n", "m", "width"), [(2, 4, 3), (1, 4, 2), (4, 8, 7), (1, 2, 1), (2, 3, 2), (8, 16, 14)]
)
def test_full_groups_are_stored_as_one_number_each(n, m, width, generator) -> None:  # type: ignore[no-untyped-def]
    assert width == math.ceil(math.log2(math.comb(m, n)))
    for axis in (0, 1):
        w = torch.randn(48, 48, generator=generator)
        part = NM(n, m, axis=axis)
        state = part.project(w)
        values = 48 * 48 * n // m
        assert part.bits(state) == 48 * 48 // m * width + 32 * values
        positions = part.encode(state)["positions"]
        payload = positions.coding.pack(positions.data)
        assert len(payload) == math.ceil(48 * 48 // m * width / 8)
        assert torch.equal(positions.coding.unpack(payload, positions.data.shape), positions.data)


def test_every_choice_of_a_group_has_its_own_number() -> None:
    coding = GroupSupport((1, 6), 3, 6, -1)
    masks = [m for m in range(64) if m.bit_count() == 3]
    choices = [torch.tensor([i for i in range(6) if m >> i & 1]) for m in masks]
    payloads = {coding.pack(choice) for choice in choices}
    assert len(payloads) == 20 and payloads == {bytes([i]) for i in range(20)}
    for choice in choices:
        assert torch.equal(coding.unpack(coding.pack(choice), choice.shape), choice)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 200)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5), (1, 64), (33, 66), (35, 70), (199, 200)])
def test_group_support_reads_what_it_writes(shape, n, m, generator) -> None:  # type: ignore[no-untyped-def]
    """Shorter last groups, exact zeros (not full), choices beyond 62 bits."""
    for w in (
        torch.randn(shape, generator=generator),
        torch.randint(0, 2, shape, generator=generator).float(),
        torch.zeros(shape),
    ):
        for axis in (0, -1):
            part = NM(n, m, axis=axis)
            field = part.encode(part.project(w))["positions"]
            payload = field.coding.pack(field.data)
            assert 0 <= 8 * len(payload) - field.coding.bits(field.data) < 8
            assert torch.equal(field.coding.unpack(payload, field.data.shape), field.data)
            if field.data.numel() < w.numel() * n / m / 2:
                assert field.coding.bits(field.data) == Support(w.numel()).bits(field.data)


def test_damaged_groups_are_refused() -> None:
    coding = GroupSupport((2, 4), 2, 4, -1)
    k = torch.Size((4,))
    with pytest.raises(ValueError, match=r"impossible choice|more than 2"):
        coding.unpack(bytes([0b110]), k)  # 6 of 6 choices
    with pytest.raises(ValueError, match="1 bytes long, got 2"):
        coding.unpack(bytes([0, 0]), k)
    with pytest.raises(ValueError, match="bits after the last code"):
        coding.unpack(bytes([0b1000000]), k)
    with pytest.raises(ValueError, match="a group has more than 2 positions"):
        coding.pack(torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="strictly increasing"):
        coding.pack(torch.tensor([0, 1, 5, 4]))
    short = GroupSupport((1, 5), 2, 4, -1)  # the second group has one weight
    with pytest.raises(ValueError, match=r"impossible choice|more than 2"):
        short.unpack(bytes([0b001000]), torch.Size((3,)))


@pytest.mark.parametrize(("n", "m"), [(5, 4), (-1, 4), (0, 0), (1, -2)])
def test_nm_checks_its_numbers(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="m must be at least 1 and n from 0 to m"):
        NM(n, m)


def test_nm_without_such_an_axis_says_so() -> None:
    with pytest.raises(ValueError, match=r"axis=2 does not exist in weights of shape \(3, 4\)"):
        NM(1, 2, axis=2).project(torch.ones(3, 4))


def test_nm_of_a_convolution_along_its_inputs(generator) -> None:  # type: ignore[no-untyped-def]
    w = torch.randn(3, 8, 2, 2, generator=generator)
    kept = delta(NM(2, 4, axis=1), w) != 0
    assert torch.equal(kept.view(3, 2, 4, 2, 2).sum(2), torch.full((3, 2, 2, 2), 2))
    viewed = delta(NM(2, 4).over(Matrix()), w) != 0
    assert torch.equal(viewed.view(3, 8, 4).sum(2), torch.full((3, 8), 2))
    ours = NM(2, 4, axis=1)
    assert ours.ops(ours.project(w), 5).mults == 5 * w.numel() // 2


# ------------------------------------------------------------------ blocks


def numbered(shape: tuple[int, ...], axis: int | None, block: tuple[int, int] | None) -> Tensor:
    """The number of the block that each weight belongs to."""
    if axis is not None:
        view = [-1 if i == axis % len(shape) else 1 for i in range(len(shape))]
        return torch.arange(shape[axis]).view(view).expand(shape)
    assert block is not None
    rows, columns = shape[0], math.prod(shape[1:])
    across = -(-columns // block[1])
    i, j = torch.arange(rows)[:, None] // block[0], torch.arange(columns) // block[1]
    return (i * across + j).view(shape)


KINDS = [(0, None), (1, None), (-1, None), (None, (1, 1)), (None, (2, 3)), (None, (4, 2))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("axis", "block"), [*KINDS, (None, (9, 99))])
def test_blocks_of_largest_energy_are_kept(shape, axis, block, generator) -> None:  # type: ignore[no-untyped-def]
    ids = numbered(shape, axis, block)
    count = int(ids.max()) + 1
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    h = torch.rand(shape, generator=generator, dtype=torch.float64)
    for importance in (None, h):
        weights = torch.ones_like(w) if importance is None else importance
        energy = torch.zeros(count, dtype=torch.float64)
        energy.index_add_(0, ids.reshape(-1), (weights * w**2).reshape(-1))
        for budget in (0, 1, count // 2, count, count + 3):
            part = BlockSparse(blocks=budget, axis=axis, block=block)
            state = part.project(w, importance=importance)
            kept = torch.isin(ids, energy.argsort(descending=True)[:budget])
            assert torch.equal(part.reconstruct(state), torch.where(kept, w, 0))
            assert part.admits(state)
            assert (
                BlockSparse(blocks=budget - 1, axis=axis, block=block).admits(state)
                == (min(budget, count) <= budget - 1)
                if budget
                else True
            )
            field = part.encode(state)["positions"]
            payload = field.coding.pack(field.data)
            assert 0 <= 8 * len(payload) - field.coding.bits(field.data) < 8
            assert torch.equal(field.coding.unpack(payload, field.data.shape), field.data)
        alpha, mu = float(energy.median()), 1.5
        priced = BlockPenalty(alpha, axis=axis, block=block)
        state = priced.project(w, mu=mu, importance=importance)
        kept = energy * mu / 2 > alpha
        assert torch.equal(priced.reconstruct(state), torch.where(kept[ids], w, 0))
        assert priced.penalty(state) == pytest.approx(alpha * int(kept.sum()))


def test_a_kept_filter_costs_its_values_and_a_bit() -> None:
    w = torch.randn(64, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    part = BlockSparse(density=0.5, axis=0)
    state = part.project(w)
    assert 0 < part.bits(state) - 32 * 32 * 144 <= 8 + 64
    unstructured = Sparse(nonzeros=32 * 144).project(w)
    assert part.bits(state) < Sparse(nonzeros=32 * 144).bits(unstructured) - 8000
    few = BlockSparse(blocks=1, axis=0)
    assert few.bits(few.project(w)) <= 32 * 144 + 8 + 7  # one gap below 64
    ragged = BlockSparse(blocks=3, block=(5, 5))  # 65 tiles of up to 25
    state = ragged.project(w.view(64, 144)[:, :23])
    assert ragged.bits(state) == 32 * state.positions.numel() + 65
    half = BlockSparse(blocks=3, axis=0, value_dtype=torch.float16)
    assert 0 < half.bits(half.project(w)) - 16 * 3 * 144 <= 8 + 3 * 6


def test_a_block_of_zeros_is_not_stored_and_zeros_in_a_block_are() -> None:
    w = torch.tensor([[0.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    state = BlockSparse(blocks=3, axis=0).project(w)
    assert state.positions.tolist() == [2, 3, 4, 5]
    assert state.values.tolist() == [0.0, 2.0, 3.0, 0.0]
    tiny = torch.full((2, 2), 1e-30)
    assert (
        BlockSparse(blocks=2, axis=0, value_dtype=torch.float16).project(tiny).values.numel() == 0
    )


def test_damaged_blocks_are_refused() -> None:
    even, ragged = (
        BlockSupport((4, 6), Tiling(block=(2, 3))),
        BlockSupport((4, 5), Tiling(block=(2, 3))),
    )
    for coding in (even, ragged):
        with pytest.raises(ValueError, match="not those of whole blocks"):
            coding.pack(torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="strictly increasing"):
            coding.bits(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="no number of blocks"):
        even.unpack(b"", torch.Size((5,)))
    with pytest.raises(ValueError, match="hold 4 weights, not 6"):
        ragged.unpack(bytes([0b10]), torch.Size((6,)))
    assert ragged.unpack(bytes([0b10]), torch.Size((4,))).tolist() == [3, 4, 8, 9]


def test_a_state_that_is_not_whole_blocks_is_not_admitted() -> None:
    w = torch.arange(1.0, 13.0).view(4, 3)
    part = BlockSparse(blocks=4, axis=0)
    assert not part.admits(Sparse(nonzeros=2).project(w))
    assert part.admits(BlockSparse(blocks=2, axis=0).project(w))
    assert not part.admits(BlockSparse(blocks=2, axis=1).project(w))
    assert BlockPenalty(0.1, axis=0).admits(part.project(w))


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_huge_and_tiny_weights(scale: float, generator) -> None:  # type: ignore[no-untyped-def]
    w = torch.randn(8, 12, generator=generator)
    big = w * scale
    for part in (
        NM(2, 4),
        NM(2, 4, axis=0),
        BlockSparse(blocks=3, axis=0),
        BlockSparse(blocks=3, block=(3, 5)),
    ):
        assert torch.equal(delta(part, big) != 0, delta(part, w) != 0)
        weighted = delta(part, big, torch.rand(8, 1, generator=generator))
        assert bool(weighted.isfinite().all())
    group = GroupL2Penalty(0.5, axis=0)
    expected = delta(group, w, mu=1.0) * scale
    price = GroupL2Penalty(0.5 * scale, axis=0)
    torch.testing.assert_close(delta(price, big, mu=1.0), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"axis": 0}, "exactly one budget"),
        ({"axis": 0, "blocks": 2, "density": 0.5}, "exactly one budget"),
        ({"axis": 0, "blocks": -1}, "blocks must be >= 0"),
        ({"axis": 0, "density": 1.5}, r"density must be in \[0, 1\]"),
        ({"blocks": 1}, "one kind of blocks"),
        ({"blocks": 1, "axis": 0, "block": (1, 1)}, "one kind of blocks"),
        ({"blocks": 1, "block": (0, 2)}, r"block must be \(rows, columns\)"),
    ],
)
def test_block_sparse_checks_its_arguments(arguments, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=match):
        BlockSparse(**arguments)


@pytest.mark.parametrize("kind", [BlockPenalty, GroupL2Penalty])
def test_prices_are_checked(kind) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="alpha must be finite and >= 0"):
        kind(-0.5, axis=0)
    with pytest.raises(ValueError, match="one kind of blocks"):
        kind(0.5)
    with pytest.raises(ValueError, match=r"\(alpha=0.5, axis=0\) weighs .* needs `mu`"):
        kind(0.5, axis=0).project(torch.ones(2, 2))


def test_a_vector_has_no_rows() -> None:
    with pytest.raises(ValueError, match=r"two axes or more.*in a joint group give `shapes`"):
        BlockSparse(blocks=1, axis=0).project(torch.ones(5))
    with pytest.raises(ValueError, match="axis=2 does not exist"):
        BlockSparse(blocks=1, axis=2).project(torch.ones(2, 2))
    with pytest.raises(ValueError, match="do not add up"):
        BlockSparse(blocks=1, axis=0, shapes=((2, 3),)).project(torch.ones(5))


# ------------------------------------------------------------------ one budget over many layers


def test_filters_of_several_layers_share_one_budget(generator) -> None:  # type: ignore[no-untyped-def]
    shapes = ((4, 3), (5, 2, 2, 2), (2, 6))
    tensors = [
        torch.randn(s, generator=generator) * f for s, f in zip(shapes, (1, 2, 1), strict=True)
    ]
    w = torch.cat([x.reshape(-1) for x in tensors])
    energies = torch.cat([x.flatten(1).square().sum(1) for x in tensors])
    part = BlockSparse(blocks=5, axis=0, shapes=shapes)
    state = part.project(w)
    pieces = part.reconstruct(state).split([x.numel() for x in tensors])
    kept = torch.cat(
        [p.view(x.shape).flatten(1).any(1) for p, x in zip(pieces, tensors, strict=True)]
    )
    assert torch.equal(kept, torch.isin(torch.arange(11), energies.argsort(descending=True)[:5]))
    assert int(kept[4:9].sum()) >= 3  # the layer of larger weights keeps more
    assert str(part) == "BlockSparse(blocks=5, axis=0)"
    arrays = {}
    for name, f in part.encode(state).items():
        arrays[name] = f.coding.unpack(f.coding.pack(f.data), f.data.shape)
    again = part.decode(arrays, w.shape, w.dtype)
    assert torch.equal(part.reconstruct(again), part.reconstruct(state))
    values = sum(
        x[0].numel()
        for x, n in zip(tensors, kept.split([4, 5, 2]), strict=True)
        for _ in range(int(n.sum()))
    )
    assert part.bits(state) == 32 * values + 11


def test_the_controller_runs_groups_of_filters_and_one_budget_of_floats() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    rows = LC(model, {Joint("*.weight"): BlockSparse(blocks=7, axis=0)}, schedule=(0.1,))
    assert sum(int(d.any(1).sum()) for d in rows.tasks[0].delta) == 7
    floats = LC(model, {Joint("*.weight"): each(NM(1, 2)) + Sparse(nonzeros=6)}, schedule=(0.1,))
    assert floats.tasks[0].state[1].positions.numel() == 6
    alone = LC(model, {Joint("0.weight"): BlockSparse(blocks=2, axis=0)}, schedule=(0.1,))
    assert int(alone.tasks[0].delta[0].any(1).sum()) == 2


def test_budgets_of_a_group_compete_as_one_long_matrix(generator) -> None:  # type: ignore[no-untyped-def]
    """Rows of one matrix, cut into tensors of equal width, are the same blocks."""
    w = torch.randn(9, 6, generator=generator)
    shapes = ((4, 6), (5, 6))
    forms: list[tuple[BlockForm, BlockForm]] = [
        (BlockSparse(density=0.4, axis=0), BlockSparse(density=0.4, axis=0, shapes=shapes)),
        (BlockPenalty(2.0, axis=0), BlockPenalty(2.0, axis=0, shapes=shapes)),
        (GroupL2Penalty(0.3, axis=0), GroupL2Penalty(0.3, axis=0, shapes=shapes)),
    ]
    for alone, group in forms:
        a, b = alone.project(w, mu=1.0), group.project(w.view(-1), mu=1.0)
        assert torch.equal(a.positions, b.positions) and torch.equal(a.values, b.values)
        assert alone.penalty(a) == group.penalty(b)
        assert alone.bits(a) == group.bits(b)


# ------------------------------------------------------------------ the group lasso


@pytest.mark.parametrize(("axis", "block"), KINDS)
def test_group_l2_is_block_soft_thresholding(axis, block, generator) -> None:  # type: ignore[no-untyped-def]
    w = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    ids, alpha, mu = numbered((6, 8), axis, block), 0.7, 1.3
    part = GroupL2Penalty(alpha, axis=axis, block=block)
    state = part.project(w, mu=mu)
    expected, penalty = torch.zeros_like(w), 0.0
    for i in range(int(ids.max()) + 1):
        x = w[ids == i]
        price = alpha * math.sqrt(x.numel())
        theta = x * max(0.0, 1 - price / mu / float(x.norm()))
        expected[ids == i] = theta
        penalty += price * float(theta.norm())
    torch.testing.assert_close(part.reconstruct(state), expected, rtol=1e-14, atol=0)
    assert part.penalty(state) == pytest.approx(penalty)
    ones = part.project(w, mu=mu, importance=torch.ones(1, 8))
    torch.testing.assert_close(part.reconstruct(ones), expected, rtol=1e-13, atol=0)


def test_group_l2_with_importance_satisfies_its_optimality_condition(generator) -> None:  # type: ignore[no-untyped-def]
    """μ h (w − θ) = λ θ/‖θ‖ on a kept block, ‖μ h w‖ ≤ λ on a dropped one; importance over 20
    orders of magnitude, zeros among it.
    """
    kept = 0
    for spread in (0.1, 3.0, 20.0):
        w = torch.randn(200, 7, generator=generator, dtype=torch.float64)
        h = torch.exp(spread * torch.randn(200, 7, generator=generator, dtype=torch.float64))
        h[torch.rand(200, 7, generator=generator) < 0.2] = 0
        alpha, mu = 0.4, 2.0
        price = alpha * math.sqrt(7)
        part = GroupL2Penalty(alpha, axis=0)
        theta = delta(part, w, h, mu)
        for x, weights, found in zip(w, h, theta, strict=True):
            pull = mu * weights * x
            if not found.any():
                assert float(pull.norm()) <= price * (1 + 1e-12)
                continue
            kept += 1
            norm = float(found.norm())

            def surplus(t: float, p: Tensor = pull, g: Tensor = mu * weights) -> float:
                return float((p / (g * t + 0.4 * math.sqrt(7))).norm()) - 1

            root = brentq(surplus, 0.0, 2 * float(x.norm()), xtol=1e-300, rtol=1e-14)
            assert norm == pytest.approx(root, rel=1e-11)
            torch.testing.assert_close(
                found * (mu * weights * root + price), pull * root, rtol=1e-10, atol=0
            )
            assert not found[weights == 0].any()
    assert kept > 200


def test_group_l2_against_a_general_solver(generator) -> None:  # type: ignore[no-untyped-def]
    for _ in range(10):
        w = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        h = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.05
        part = GroupL2Penalty(0.15, axis=1)
        reached = part.objective(w, part.project(w, mu=1.0, importance=h), 1.0, h)

        def value(theta: np.ndarray, w: Tensor = w, h: Tensor = h) -> float:
            t = torch.from_numpy(theta).view(2, 3)
            price = 0.15 * math.sqrt(2) * float(t.norm(dim=0).sum())
            return squared_error(w, t, h) / 2 + price

        starts = (w.numpy().reshape(-1), 0.1 * w.numpy().reshape(-1))
        least = min(
            minimize(value, x, method="Powell", options={"ftol": 1e-14}).fun for x in starts
        )
        assert reached <= least + 1e-12 and reached == pytest.approx(least, rel=1e-5)


def test_group_l2_edges() -> None:
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.3, 0.4]])
    free = GroupL2Penalty(0.0, axis=0)
    assert torch.equal(delta(free, w, mu=1.0), w)
    h = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.5, 2.0]])
    assert delta(free, w, h, 1.0).tolist() == [[3.0, 0.0], [0.0, 0.0], w[2].tolist()]
    part = GroupL2Penalty(1 / math.sqrt(2), axis=0)
    torch.testing.assert_close(delta(part, w, mu=1.0), torch.tensor([[2.4, 3.2], [0, 0], [0, 0]]))
    assert part.project(w, mu=1.0, importance=torch.zeros(3, 2)).positions.numel() == 0


# ------------------------------------------------------------------ with other parts


@pytest.mark.parametrize(
    "outer", [NM(2, 4), BlockSparse(blocks=3, axis=0), BlockSparse(blocks=3, block=(4, 5))]
)
def test_values_are_quantized_and_stored_for_the_kept_weights_only(outer, generator) -> None:  # type: ignore[no-untyped-def]
    w = torch.randn(6, 8, generator=generator)
    part = outer.then(KMeans(4))
    state = part.project(w)
    kept = outer.project(w).positions
    assert torch.equal(state.outer.positions, kept)
    support = part.encode(state)["positions"]
    assert part.bits(state) == support.coding.bits(support.data) + 2 * kept.numel() + 4 * 32
    assert len(part.reconstruct(state).flatten()[kept].unique()) <= 4
