"""What the older LC toolkit got wrong, row by row of papers/learning-compression.md, section 7.

Row 6 (ℓ1 forms) and most of row 20 concern parts that do not exist here yet; row 18 is about a
model of the toolkit's own.
"""

from __future__ import annotations

import importlib
import importlib.resources
import itertools
import pkgutil
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lc_compress
from lc_compress import (
    LC,
    Binary,
    FixedCodebook,
    Joint,
    KMeans,
    LowRank,
    Part,
    Sparse,
    SparsePenalty,
    Ternary,
    each,
)

PARTS: list[Part[Any]] = [
    Binary(),
    Ternary(),
    KMeans(3),
    FixedCodebook((-0.5, 0.0, 0.5)),
    LowRank(1),
    Sparse(nonzeros=3),
    SparsePenalty(0.01),
    Binary() + Sparse(nonzeros=3),
    LowRank(1) + Sparse(nonzeros=3),
    Binary() + LowRank(1) + Sparse(nonzeros=2),
]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 3)
    )


def run(model: nn.Module, tasks: Any, mus: tuple[float, ...] = (0.1, 1.0)) -> LC:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lc = LC(model, tasks, schedule=mus, optimizer=optimizer)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    for _ in lc.steps(progress=False):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return lc


def test_row_01_every_layer_has_a_sum_of_its_own() -> None:
    model = net()
    lc = run(
        model,
        {
            "0.weight": Binary() + Sparse(nonzeros=3),
            "2.weight": LowRank(1) + Sparse(nonzeros=2),
            "4.weight": Binary() + LowRank(1) + Sparse(nonzeros=1),
        },
    )
    assert [len(task.state) for task in lc.tasks] == [2, 2, 3]
    lc.finalize()
    for task in lc.tasks:
        assert torch.equal(task.parameters[0], task.part.reconstruct(task.state))


def test_row_02_sums_plain_tasks_and_shared_codebooks_mix() -> None:
    model = net()
    lc = run(
        model,
        {
            "0.weight": Binary() + Sparse(nonzeros=3),
            "2.weight": KMeans(2),
            Joint(("4.weight", "5.weight")): KMeans(2),
        },
    )
    lc.finalize()
    assert model[2].weight.unique().numel() == 2
    assert torch.cat([model[4].weight, model[5].weight.T], 1).unique().numel() == 2  # one codebook


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_row_03_the_model_holds_what_is_stored_bit_for_bit(part: Part[Any]) -> None:
    model = net()
    lc = run(model, {"*.weight": part})
    lc.finalize()
    for task in lc.tasks:
        arrays = {}
        for name, field in task.part.encode(task.state).items():
            payload = field.coding.pack(field.data)
            assert len(payload) == -(-field.coding.bits(field.data) // 8)
            arrays[name] = field.coding.unpack(payload, field.data.shape)
        (p,) = task.parameters
        assert torch.equal(p, part.reconstruct(part.decode(arrays, p.shape, p.dtype)))


def test_row_04_a_budget_of_zero_keeps_nothing(generator: torch.Generator) -> None:
    w = torch.randn(5, 4, generator=generator)
    for part in (Sparse(nonzeros=0), Sparse(density=0.0)):
        state = part.project(w)
        assert not part.reconstruct(state).any() and part.bits(state) == 0
    both = Binary() + Sparse(nonzeros=0)
    expected = Binary().reconstruct(Binary().project(w))
    assert torch.equal(both.reconstruct(both.project(w)), expected)


@pytest.mark.parametrize("rank", [3, 4, 100])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_row_05_full_rank_is_the_matrix_and_the_report_shows_that_it_is_not_smaller(
    rank: int, shape: tuple[int, int], generator: torch.Generator
) -> None:
    w = torch.randn(shape, generator=generator)
    part = LowRank(rank)
    torch.testing.assert_close(part.reconstruct(part.project(w)), w, rtol=1e-5, atol=1e-6)
    model = nn.Linear(5, 3)
    lc = LC(model, {"weight": part}, schedule=(0.1,))
    assert lc.report().rows[0].bits_per_weight == 32 * 3 * (3 + 5) / 15 > 32


@pytest.mark.parametrize("mu", [1e-3, 1.0, 1e3])
def test_row_07_penalty_forms_start_at_the_first_mu_and_save_at_every_mu(mu: float) -> None:
    alpha = 0.5 * mu * 0.2**2  # the threshold √(2α/μ) is 0.2 at this μ
    for part in (SparsePenalty(alpha), Binary() + SparsePenalty(alpha)):
        model = net()
        w = model[0].weight.detach().clone()
        lc = LC(model, {"0.weight": part}, schedule=(mu, 2 * mu))
        if isinstance(part, SparsePenalty):
            expected = torch.where(w.abs() > 0.2, w, 0)
            assert expected.any() and torch.equal(lc.tasks[0].delta[0], expected)
        for _ in lc.steps(progress=False):
            other = LC(net(), {"0.weight": part}, schedule=(mu, 2 * mu))
            other.load_state_dict(lc.state_dict())
            assert torch.equal(other.tasks[0].delta[0], lc.tasks[0].delta[0])
    nothing = SparsePenalty(1e9)  # no weight is worth its price: an empty support is saved, too
    lc = LC(net(), {"0.weight": nothing}, schedule=(mu,))
    assert not lc.tasks[0].delta[0].any()
    LC(net(), {"0.weight": nothing}, schedule=(mu,)).load_state_dict(lc.state_dict())


def test_row_07_a_penalty_form_without_mu_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs `mu`"):
        SparsePenalty(0.1).project(torch.ones(2, 2))


def test_row_08_ternary_works_for_a_group_of_tensors() -> None:
    for part in (Ternary(), each(Ternary()), each(Ternary()) + Sparse(nonzeros=2)):
        model = net()
        lc = run(model, {Joint(("0.weight", "2.weight")): part})
        assert [d.shape for d in lc.tasks[0].delta] == [(8, 6), (5, 8)]
        lc.finalize()
    w = torch.linspace(-1, 1, 24).view(2, 3, 4)
    assert Ternary().reconstruct(Ternary().project(w)).shape == w.shape


def test_row_09_binary_runs_on_this_numpy(generator: torch.Generator) -> None:
    w = torch.randn(4, 5, generator=generator)
    expected = torch.where(w >= 0, 1.0, -1.0) * w.double().abs().mean().float()
    assert torch.equal(Binary().reconstruct(Binary().project(w)), expected)
    signs = FixedCodebook((-1.0, 1.0))
    assert torch.equal(signs.reconstruct(signs.project(w)), torch.where(w > 0, 1.0, -1.0))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_row_10_k_means_is_optimal(k: int, generator: torch.Generator) -> None:
    for _ in range(20):
        w = torch.randn(7, generator=generator, dtype=torch.float64)
        w[3] = w[5]  # a tie
        x = w.sort().values
        best = min(
            sum(float(x[a:b].var(unbiased=False) * (b - a)) for a, b in itertools.pairwise(cuts))
            for inner in itertools.combinations(range(1, 7), k - 1)
            for cuts in [(0, *inner, 7)]
        )
        state = KMeans(k).project(w)
        error = float((w - KMeans(k).reconstruct(state)).square().sum())
        assert error == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_row_11_dtype_and_device_are_those_of_the_parameter(
    part: Part[Any], dtype: torch.dtype, device: torch.device
) -> None:
    model = net().to(device, dtype)
    lc = LC(model, {"*.weight": part}, schedule=(0.1, 0.2))
    for _ in lc.steps(progress=False):
        for task in lc.tasks:
            seen = (*task.delta, part.reconstruct(task.state))
            assert {(x.dtype, x.device.type) for x in seen} == {(dtype, device.type)}
            assert {x.device.type for x in task.multipliers} == {device.type}
    lc.finalize()
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_row_12_batchnorm_is_fitted_to_delta_and_both_can_be_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False))
    batch = 2 + 3 * torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    lc_compress.recalibrate(model, [batch])
    model.eval()
    lc = LC(model, {"0.weight": Binary()}, schedule=(0.1,))

    def off() -> float:
        """How far the normalized outputs are from mean 0 and variance 1."""
        with torch.no_grad():
            out = model(batch)
        return float((out.mean(0).abs() + (out.var(0) - 1).abs()).max())

    assert off() < 1e-3
    with lc.compressed(calibration=None):
        assert off() > 0.3
    with lc.compressed(calibration=[batch]):
        assert off() < 1e-3
    with pytest.raises(TypeError, match="BatchNorm"):
        lc.finalize()


@pytest.mark.parametrize("kappa", [0.01, 0.05, 0.2])
def test_row_13_no_stuck_alternation(kappa: float, generator: torch.Generator) -> None:
    """Near-binary weights, as late in LC: alternation from zero ends well above the optimum."""
    n = 4000
    w = torch.empty(n, dtype=torch.float64)
    w[: n // 2].fill_(0.05)
    w[n // 2 :].fill_(-0.05)
    w[:: 100 // 8] = 0.0
    w += 0.005 * torch.randn(n, generator=generator, dtype=torch.float64)
    kept = n - round(kappa * n)
    u = np.sort(w.abs().numpy())
    windows = (u[i : i + kept] for i in range(n - kept + 1))
    optimum = min(float(((x - x.mean()) ** 2).sum()) for x in windows)

    part = Binary() + Sparse(density=kappa)
    error = float((w - part.reconstruct(part.project(w))).square().sum())
    assert error == pytest.approx(optimum, rel=1e-9)

    binary, sparse = Binary(), Sparse(density=kappa)
    delta = torch.zeros_like(w)
    for _ in range(10):  # prune, then quantize, as in its README
        floats = sparse.reconstruct(sparse.project(w - delta))
        delta = binary.reconstruct(binary.project(w - floats))
    assert float((w - delta - floats).square().sum()) > 1.04 * optimum
    warm = (
        binary.project(w - floats),
        sparse.project(w - delta),
    )  # and a bad start does not hold us
    error = float((w - part.reconstruct(part.project(w, warm))).square().sum())
    assert error == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_row_14_the_state_is_on_the_weights_device(
    part: Part[Any], device: torch.device, generator: torch.Generator
) -> None:
    w = torch.randn(8, 6, generator=generator).to(device)
    state = part.project(w, mu=1.0)
    assert part.reconstruct(state).device.type == device.type
    assert {x.device.type for x in part.tunable(state).values()} <= {device.type}


def lines_run(work: Callable[[], object]) -> int:
    """How many lines of the package's Python are run."""
    package, count = lc_compress.__path__[0], 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(package):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_row_15_no_loops_over_the_weights(part: Part[Any], generator: torch.Generator) -> None:
    counts = []
    for rows in (50, 800):
        w = torch.randn(rows, 20, generator=generator)
        counts.append(lines_run(lambda w=w: part.bits(part.project(w, mu=1.0))))
    # sixteen times the weights: a descent may take more sweeps, a loop would take sixteen times
    assert counts[1] < 6 * counts[0], counts


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_row_16_a_projection_is_deterministic_and_silent(
    part: Part[Any], generator: torch.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    w = torch.randn(9, 7, generator=generator)
    torch.manual_seed(3)
    np.random.seed(3)
    random = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = part.reconstruct(part.project(w, mu=1.0))
    assert torch.equal(torch.get_rng_state(), random[0])
    assert np.array_equal(np.random.get_state()[1], random[1])
    torch.manual_seed(4)
    assert torch.equal(part.reconstruct(part.project(w, mu=1.0)), first)
    assert capfd.readouterr() == ("", "")


def test_row_16_a_run_is_logged_resumable_and_keeps_its_best(
    capfd: pytest.CaptureFixture[str],
) -> None:
    tasks = {"*.weight": Binary() + Sparse(nonzeros=2)}
    model = net()
    lc = run(model, tasks, mus=(0.1, 0.5, 1.0))
    assert [entry["mu"] for entry in lc.history] == [0.1, 0.5, 1.0]
    assert all(entry["gap"] > 0 for entry in lc.history)
    assert capfd.readouterr() == ("", "")
    with lc.compressed() as compressed:
        lc.keep_best(1.0)
        best = [p.detach().clone() for p in compressed.parameters()]
    other = LC(net(), tasks, schedule=(0.1, 0.5, 1.0))
    other.load_state_dict(lc.state_dict())
    assert other.position == 3 and other.history == lc.history
    other.finalize(best=True)
    assert all(map(torch.equal, other.model.parameters(), best))
    assert lc.report().total.bits > 0  # the report counts it; storage has tests of its own


def test_row_17_a_weight_is_named_not_wrapped() -> None:
    """No getters, no device, no tuples of three: the name and the part."""
    lc = LC(nn.Linear(3, 2), {"weight": Binary()}, schedule=(0.1,))
    assert lc.tasks[0].name == "weight"
    wrong: Any = {"weight": ("AsVector", Binary(), "a task")}
    with pytest.raises(TypeError, match="'weight' needs a part, got tuple"):
        LC(nn.Linear(3, 2), wrong, schedule=(0.1,))


def test_row_19_every_module_imports_and_is_typed() -> None:
    names = [info.name for info in pkgutil.walk_packages(lc_compress.__path__, "lc_compress.")]
    assert len(names) > 15
    for name in names:
        importlib.import_module(name)
    assert (importlib.resources.files("lc_compress") / "py.typed").is_file()


def test_row_20_the_first_types_are_there(generator: torch.Generator) -> None:
    """A codebook that is given, scaled ternary, and low rank of a convolution seen as a matrix."""
    w: Tensor = torch.randn(4, 3, 2, 2, generator=generator)
    for part in (
        FixedCodebook((-1.0, 0.0, 1.0)),
        Ternary(axis=0),
        LowRank(1).over(lc_compress.Matrix()),
        LowRank(1).over(lc_compress.KernelMatrix()),
    ):
        assert part.reconstruct(part.project(w)).shape == w.shape
