"""refine(): continuous fields of θ are trained, the structure is fixed, the result is storable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parts_under_test import CASES
from torch import Tensor, nn

from lc_compress import LC, Binary, Joint, KMeans, LowRank, Matrix, Part, Sparse, Ternary, each
from lc_compress.refine import squared_influence
from lc_compress.testing import Case

TASKS: list[dict[Any, Part[Any]]] = [
    {"0.weight": Binary(axis=0) + Sparse(nonzeros=3), "3.weight": KMeans(3)},
    {"0.weight": LowRank(1).over(Matrix()) + Binary(), "3.weight": Ternary(group=4)},
    {"0.weight": Sparse(nonzeros=9).then(KMeans(2)) + LowRank(1).over(Matrix()).then(KMeans(3))},
    {Joint("*.weight"): each(Binary()) + Sparse(nonzeros=5)},
    {"3.weight": Binary() + LowRank(2).then(KMeans(4)) + Sparse(nonzeros=2)},
]


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3))
    return nn.Sequential(*layers).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 2, 3, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(8, 3, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module) -> Tensor:
    x, y = data(next(model.parameters()).dtype)
    return nn.functional.mse_loss(model(x), y)


def done(model: nn.Module, tasks: Any, **options: Any) -> LC:
    """A controller whose LC steps are over."""
    lc = LC(model, tasks, schedule=(1.0,), **options)
    for _ in lc.steps(progress=False):
        pass
    return lc


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def structure(lc: LC) -> list[Tensor]:
    """All stored arrays that are not continuous."""
    fields = [f.data for task in lc.tasks for f in task.part.encode(task.state).values()]
    return [x for x in fields if not x.is_floating_point()]


def is_delta(lc: LC) -> bool:
    return all(
        torch.equal(p, delta)
        for task in lc.tasks
        for p, delta in zip(
            task.parameters, task.split(task.part.reconstruct(task.state)), strict=True
        )
    )


@pytest.mark.parametrize("tasks", TASKS, ids=lambda t: ", ".join(map(str, t.values())))
def test_gradients_of_the_fields_are_finite_differences(tasks: Any) -> None:
    model = net()
    lc = done(model, tasks)
    given: list[nn.Parameter] = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        given.extend(parameters)
        return sgd(parameters)

    def loss_with(index: int, name: str, entry: int, change: float) -> float:
        task = lc.tasks[index]
        x = task.part.tunable(task.state)[name].clone()
        x.view(-1)[entry] += change
        # the other fields as they are: a composition replaces all of them at once
        values = {**task.part.tunable(task.state), name: x}
        delta = task.split(task.part.reconstruct(task.part.with_tunable(task.state, values)))
        with torch.no_grad():
            weights = dict(zip(task.names, delta, strict=True))
            out = torch.func.functional_call(model, weights, (data()[0],))
            return float(nn.functional.mse_loss(out, data()[1]))

    checked = 0
    with lc.refine(make, preconditioned=False):
        loss_of(model).backward()
        fields = iter(given)
        for index, task in enumerate(lc.tasks):
            assert all(p.grad is None for p in task.parameters)
            for name, x in task.part.tunable(task.state).items():
                field = next(fields)
                assert torch.equal(field, x) and field.grad is not None
                for entry in range(x.numel()):
                    ahead, behind = (loss_with(index, name, entry, h) for h in (1e-6, -1e-6))
                    slope = (ahead - behind) / 2e-6
                    assert float(field.grad.view(-1)[entry]) == pytest.approx(slope, abs=1e-8)
                    checked += 1
        rest = list(fields)
        compressed = sum(len(task.parameters) for task in lc.tasks)
        assert len(rest) == 4 - compressed  # the uncompressed parameters follow
    assert checked >= 3


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.part).replace("torch.", ""))
def test_the_squared_influence_is_that_of_finite_differences(case: Case) -> None:
    part = case.part
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(case.shapes[0], generator=generator, dtype=torch.float64)
    state = part.project(w, mu=case.mu)
    values = part.tunable(state)
    for name, x in values.items():
        if x.numel() == 0:
            continue
        columns = []
        for entry in range(x.numel()):
            h = 1e-4 * (torch.arange(x.numel()) == entry).to(x).view(x.shape)
            ahead, behind = (
                part.reconstruct(part.with_tunable(state, {**values, name: y}))
                for y in (x + h, x - h)
            )
            columns.append((ahead - behind).flatten() / 2e-4)
        gram = torch.stack(columns) @ torch.stack(columns).T
        exact, found = gram.diagonal(), squared_influence(part, state, name).flatten()
        used = exact > 1e-12
        assert bool((found[~used] == 1).all())
        if float((gram - exact.diag()).abs().max()) < 1e-6:  # no weight is touched twice
            torch.testing.assert_close(found[used], exact[used], rtol=1e-5, atol=0)
        else:
            ratio = found[used] / exact[used]
            assert 0.5 < float(ratio.min()) and float(ratio.max()) < 4


def clusters(w: Tensor) -> list[Tensor]:
    return [(w == value).to(w) for value in w.unique() if value != 0]


def signs_of_rows(w: Tensor) -> list[Tensor]:
    return [w.sign() * (torch.arange(len(w)) == i)[:, None] for i in range(len(w))]


@pytest.mark.parametrize(
    "part, directions",
    [
        (KMeans(3), clusters),
        (Sparse(nonzeros=9).then(KMeans(2)), clusters),
        (Binary(axis=0), signs_of_rows),
    ],
    ids=("clusters", "clusters of a support", "rows"),
)
def test_a_step_is_that_of_the_weights_projected_on_what_the_fields_reach(
    part: Any, directions: Any
) -> None:
    model, plain = net(), net()
    lc = done(model, {"3.weight": part})
    with lc.refine(sgd) as optimizer:
        plain.load_state_dict(model.state_dict())
        for each_ in (plain, model):
            loss_of(each_).backward()
        optimizer.step()
        moved = (model[3].weight - plain[3].weight).detach()
    assert plain[3].weight.grad is not None
    step = -0.1 * plain[3].weight.grad
    basis = directions(plain[3].weight.detach())
    expected = sum(v * (v * step).sum() / (v * v).sum() for v in basis)
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)


def test_a_rate_that_suits_weights_suits_the_values_they_share() -> None:
    # ‖W − T‖²/2 has curvature 1: one step of SGD at rate 1 solves it for weights and for clusters
    torch.manual_seed(0)
    target = 2 * torch.randn(40, 40, dtype=torch.float64) + 0.3
    losses = {}
    for preconditioned in (True, False):
        model = nn.Linear(40, 40, bias=False).double()
        lc = done(model, {"weight": KMeans(4)})

        def loss(model: nn.Module = model) -> Tensor:
            return ((model.weight - target) ** 2).sum() / 2  # type: ignore[operator]

        def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=1.0)

        with lc.refine(make, preconditioned=preconditioned) as optimizer:
            groups = [model.weight == value for value in model.weight.unique()]
            loss().backward()
            optimizer.step()
        losses[preconditioned] = float(loss().detach())
        best = sum(float(((target[g] - target[g].mean()) ** 2).sum() / 2) for g in groups)
        if preconditioned:
            assert losses[True] == pytest.approx(best, rel=1e-9)
    assert losses[False] > 1e3 * losses[True]


def test_values_of_half_precision_weights_have_a_finite_influence() -> None:
    part, w = Binary(), torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        found = squared_influence(part, part.project(w.to(dtype)), "scale")
        assert float(found.float()) == pytest.approx(min(9e4, torch.finfo(dtype).max), rel=0.02)


@pytest.mark.parametrize("tasks", TASKS, ids=lambda t: ", ".join(map(str, t.values())))
def test_the_loss_goes_down_with_the_structure_fixed(tasks: Any) -> None:
    model = net()
    lc = done(model, tasks)
    before = structure(lc)
    bits = [task.part.bits(task.state) for task in lc.tasks]
    continuous = [t.part.tunable(t.state) for t in lc.tasks]
    with lc.refine(adam) as optimizer:
        first = float(loss_of(model).detach())
        for _ in range(30):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            assert is_delta(lc)
    assert float(loss_of(model).detach()) < 0.9 * first
    assert all(map(torch.equal, structure(lc), before))
    assert [task.part.bits(task.state) for task in lc.tasks] == bits
    for task, old in zip(lc.tasks, continuous, strict=True):
        for name, x in task.part.tunable(task.state).items():
            assert not torch.equal(x, old[name]), name
    assert is_delta(lc) and lc.gap()[lc.tasks[0].name] == 0


def test_accumulated_gradients_add_up() -> None:
    results = []
    for parts in (1, 2):
        model = net()
        lc = done(model, {Joint("*.weight"): each(Binary()) + Sparse(nonzeros=5)})
        with lc.refine(sgd) as optimizer:
            for _ in range(parts):
                (loss_of(model) / parts).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_at_the_end_values_are_rounded_to_what_is_stored() -> None:
    model = net(torch.float32)
    part = Binary(value_dtype=torch.bfloat16) + Sparse(nonzeros=3, value_dtype=torch.float16)
    lc = done(model, {"*.weight": part})
    with lc.refine(adam) as optimizer:
        loss_of(model).backward()
        optimizer.step()
        inside = lc.tasks[0].state[0].scale
        assert not torch.equal(inside.bfloat16().float(), inside)
    for task in lc.tasks:
        binary, sparse = task.state
        assert torch.equal(binary.scale.bfloat16().float(), binary.scale)
        assert torch.equal(sparse.values.half().float(), sparse.values)
        assert binary.scale.dtype == sparse.values.dtype == torch.float32
    assert torch.equal(lc.tasks[0].state[0].scale, inside.bfloat16().float())
    assert is_delta(lc)


@pytest.mark.parametrize("gradient", ["weights", "sum"])
@pytest.mark.parametrize("finalized", [False, True])
def test_it_works_before_and_after_finalize(gradient: Any, finalized: bool) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lc = done(model, TASKS[0], optimizer=optimizer, gradient=gradient)
    first = [delta.clone() for task in lc.tasks for delta in task.delta]
    if finalized:
        lc.finalize()
    with lc.refine(sgd) as inner:
        assert all(torch.equal(t.parameters[0], d) for t, d in zip(lc.tasks, first, strict=True))
        loss_of(model).backward()
        inner.step()
    refined = [p.detach().clone() for p in model.parameters()]
    assert not torch.equal(refined[0], first[0])
    if not finalized:
        with lc.compressed():
            pass
        lc.finalize()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # its hooks are gone
    assert all(map(torch.equal, model.parameters(), refined)) and is_delta(lc)


def test_what_was_refined_is_what_the_report_and_the_state_hold() -> None:
    model = net()
    lc = done(model, TASKS[0])
    with lc.refine(sgd) as optimizer:
        loss_of(model).backward()
        optimizer.step()
    other = LC(net(), TASKS[0], schedule=(1.0,))
    other.load_state_dict(lc.state_dict())
    other.finalize()
    assert torch.equal(other.model[0].weight, model[0].weight)
    assert lc.report().rows[0].gap == 0


def test_it_is_refused_while_steps_are_left() -> None:
    lc = LC(net(), TASKS[0], schedule=(1.0, 2.0))
    with pytest.raises(RuntimeError, match=r"finish the LC steps first \(0 of 2 done\)"):
        lc.refine(sgd)


def test_nothing_else_runs_inside() -> None:
    lc = done(net(), TASKS[0])
    with lc.refine(sgd):
        with pytest.raises(RuntimeError, match=r"c_step\(\) inside refine\(\)"):
            lc.c_step()
        with pytest.raises(RuntimeError, match=r"compressed\(\) inside refine\(\)"):
            lc.compressed().__enter__()
        with pytest.raises(RuntimeError, match=r"finalize\(\) inside refine\(\)"):
            lc.finalize()
        with pytest.raises(RuntimeError, match=r"refine\(\) inside refine\(\)"):
            lc.refine(sgd).__enter__()


def test_an_exception_leaves_a_rounded_delta_and_no_hooks() -> None:
    model = net(torch.float32)
    lc = done(model, {"*.weight": Binary(value_dtype=torch.bfloat16)})
    with pytest.raises(KeyError):
        with lc.refine(adam) as optimizer:
            loss_of(model).backward()
            optimizer.step()
            raise KeyError("in the body")
    assert is_delta(lc)
    scale = lc.tasks[0].state.scale
    assert torch.equal(scale.bfloat16().float(), scale)
    loss_of(model).backward()
    assert model[0].weight.grad is not None


def test_frozen_weights_are_left_alone() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    lc = done(model, TASKS[0])
    before = model[0].weight.detach().clone()
    with lc.refine(sgd) as optimizer:
        shown = model[0].weight.detach().clone()
        loss_of(model).backward()
        optimizer.step()
    assert torch.equal(model[0].weight, shown) and not torch.equal(shown, before)


def test_distributed_data_parallel_is_refused() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        lc = done(nn.parallel.DistributedDataParallel(net()), TASKS[0])
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            lc.refine(sgd).__enter__()
    finally:
        torch.distributed.destroy_process_group()


def test_a_loop_that_clears_the_model_s_gradients_trains_the_same() -> None:
    scales = []
    for clears_model in (False, True):
        model = net()
        lc = done(model, {"3.weight": Binary()})
        with lc.refine(sgd) as optimizer:
            for _ in range(3):
                model.zero_grad() if clears_model else optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
        scales.append(lc.tasks[0].state.scale)
    assert torch.equal(*scales)


def test_an_optimizer_that_cannot_be_made_changes_nothing() -> None:
    model = net()
    own = sgd(list(model.parameters()))
    lc = done(model, {"3.weight": Binary()}, optimizer=own, gradient="sum")
    w = lc.tasks[0].current[0].clone()
    with pytest.raises(ZeroDivisionError), lc.refine(lambda parameters: 1 / 0):  # type: ignore[arg-type,return-value]
        pass
    assert torch.equal(lc.tasks[0].current[0], w)
    assert len(own._optimizer_step_pre_hooks) == 1
