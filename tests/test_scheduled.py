"""Parts on a schedule: plans, gradient rules, weights, activations, resume, and what is refused."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lc_compress.scheduled
from lc_compress import (
    HBFP,
    LC,
    NM,
    BlockSparse,
    FixedPoint,
    Int,
    Joint,
    KMeans,
    Matrix,
    Part,
    Sparse,
    SparsePenalty,
    constant,
    each,
    gradients,
    load,
    save,
)
from lc_compress.density import Amount, count_features, performance_density, stored_density
from lc_compress.modules import PackedModule, to_dense
from lc_compress.scheduled import (
    ActivationPruner,
    ActivationQuantizer,
    Cubic,
    Delay,
    Plan,
    Scheduled,
    insert,
    prune_then_quantize,
    quantize_then_prune,
    together,
)
from lc_compress.storage.records import PackedFile
from lc_compress.storage.specs import known_types

WINDOW = 16
X = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(9))


class Net(nn.Module):
    """Two convolutions and a linear layer, for 6×6 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(4, 4, 3), nn.ReLU()
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.fc(self.relu2(self.conv2(x)).flatten(1))


def net(dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype)


def batch(i: int, like: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(i)
    x, y = torch.randn(8, 1, 6, 6, generator=g), torch.randint(0, 3, (8,), generator=g)
    return x.to(next(like.parameters()).dtype) if like is not None else x, y


def sgd(model: nn.Module, **options: Any) -> Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9} | options)


def train(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    model.train()
    for i in range(first, last):
        x, y = batch(i, model)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


PRUNE = ActivationPruner(0.5, window=WINDOW)
QUANTIZE = ActivationQuantizer(FixedPoint(4), window=WINDOW)


def ready(model: Net) -> Net:
    """With modules for activations: the input quantized, pruning before the first ReLU."""
    return insert(
        model,
        X.to(next(model.parameters()).dtype),
        before={"conv1": QUANTIZE},
        after={"bn1": (PRUNE, QUANTIZE), "relu2": QUANTIZE},
    )


PART = Sparse(density=0.5).then(FixedPoint(8))


def started(
    plan: Plan, weights: Any = None, model: Any = None, **options: Any
) -> tuple[Any, Optimizer, Scheduled]:
    model = ready(net()) if model is None else model
    optimizer = sgd(model)
    weights = {"*.weight": PART} if weights is None else weights
    options.setdefault("batch_size", 8)
    return model, optimizer, Scheduled(model, weights, plan=plan, optimizer=optimizer, **options)


def only(plan: Plan, part: Part[Any], **options: Any) -> tuple[Net, Optimizer, Scheduled]:
    """Weights alone."""
    return started(plan, {"*.weight": part}, net(), **options)


def zeros(p: Tensor) -> int:
    return int((p == 0).sum())


def same(a: Any, b: Any) -> bool:
    """Equal, bit for bit, down to the last tensor."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


# ------------------------------------------------------------------ T11: schedules and plans


def test_the_cubic_ramp() -> None:
    ramp = Cubic(100, every=15, repeats=4)
    assert ramp.levels(0.5) == (0.2890625, 0.4375, 0.4921875, 0.5)
    assert ramp.times == (115, 130, 145, 160)
    assert Cubic(0, every=2, repeats=1).levels(0.75) == (0.75,)


def test_a_plan_in_epochs() -> None:
    """The paper's own: MobileNetV2 on CIFAR-10."""
    plan = Plan(250, Cubic(100, 15, 4), Delay(230), steps_per_epoch=391)
    assert plan.steps == 250 * 391
    assert [event.step for event in plan.events("prune")] == [x * 391 for x in (115, 130, 145, 160)]
    assert [event.step for event in plan.events("quantize")] == [230 * 391]
    assert plan.events("prune_activations") == ()
    shorter = plan.scaled(25, steps_per_epoch=10)
    assert [event.step for event in shorter.events("prune")] == [115, 130, 145, 160]


def test_the_three_orders() -> None:
    def span(plan: Plan, name: str) -> tuple[int, int]:
        steps = [event.step for event in plan.events(name)]
        return steps[0], steps[-1]

    for of in ("", "_activations"):
        plan = prune_then_quantize(1000)
        assert span(plan, f"prune{of}") == (460, 640)
        assert span(plan, f"quantize{of}")[0] == (940 if of else 920)
        for late in (False, True):
            plan = quantize_then_prune(1000, late=late)
            assert span(plan, f"quantize{of}")[1] < span(plan, f"prune{of}")[0]
        assert span(plan, f"prune{of}") == (780, 960)
        assert span(together(1000), f"quantize{of}")[0] == span(together(1000), f"prune{of}")[0]


def test_a_plan_shows_itself(tmp_path: Path) -> None:
    plan = Plan(40, prune=Cubic(0, 10, 3), quantize_activations=Delay(20))
    assert str(plan).splitlines() == [
        "plan of 40 steps",
        "weights     prune    ··········▒▒▒▒▒▒▒▒▒▒▓▓▓▓▓▓▓▓▓▓██████████  at 10, 20, 30",
        "activations quantize ····················████████████████████  at 20",
    ]
    plan.figure(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cubic(10, every=0), "ends before it starts"),
        (lambda: Cubic(10, every=-2), "ends before it starts"),
        (lambda: Cubic(10, every=1, repeats=0), "at least 1"),
        (lambda: Cubic(-1, every=1), "finite and >= 0"),
        (lambda: Cubic(math.nan, every=1), "finite and >= 0"),
        (lambda: Delay(-1), "finite and >= 0"),
        (lambda: Delay(math.inf), "finite and >= 0"),
        (lambda: Plan(0), "total > 0"),
        (lambda: Plan(10, steps_per_epoch=0), "steps_per_epoch >= 1"),
        (lambda: Plan(100, quantize=Delay(100)), "never happens in full.*ends after 100"),
        (lambda: Plan(100, prune=Cubic(40, 20, 4)), "never happens in full.*step 120"),
        (lambda: Plan(100, prune=Cubic(40, 0.3, 4)), r"overlaps itself.*\[40, 41, 41, 41\]"),
        (lambda: prune_then_quantize(10), "overlaps itself"),
        (lambda: Plan(100, quantize=Cubic(1, 1)), "give a Delay"),  # type: ignore[arg-type]
        (lambda: Cubic(1, 2, 4.0), "a whole number"),  # type: ignore[arg-type]
        (lambda: Cubic(1, 2, math.nan), "a whole number"),  # type: ignore[arg-type]
        (lambda: Cubic("1", 2), "times are numbers, got '1'"),  # type: ignore[arg-type]
        (lambda: Cubic(1, "2"), "times are numbers, got '2'"),  # type: ignore[arg-type]
        (lambda: Plan(9).scaled(9, 0), "steps_per_epoch >= 1"),
        (lambda: Delay(None), "times are numbers, got None"),  # type: ignore[arg-type]
        (lambda: Plan(100, quantize=50), r"quantize=50: give Delay\(when\)"),  # type: ignore[arg-type]
        (lambda: Plan(100, prune_activations=PART), "Cubic.*or None for never"),  # type: ignore[arg-type]
    ],
)
def test_plans_that_cannot_be(build: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_a_plan_of_another_length_keeps_its_unit() -> None:
    plan = prune_then_quantize(100, steps_per_epoch=10)
    assert plan.scaled(25) == prune_then_quantize(25, steps_per_epoch=10)
    assert plan.scaled(25, 1) == prune_then_quantize(25)
    assert plan.only("quantize") == Plan(100, quantize=Delay(92), steps_per_epoch=10)


def test_a_timeline_shows_the_first_and_the_last_step() -> None:
    first, last = (str(Plan(1000, quantize=Delay(at))).split()[-3] for at in (0, 999))
    assert first == "█" * 40 and last == "·" * 39 + "█"


# ------------------------------------------------------------------ T12: performance density


def test_the_papers_densities() -> None:
    w, f = 2_296_922, 6_899_732
    for metric, weights, features, density in (
        (92.6, Amount(w), Amount(f), 0.31465248),
        (91.87, Amount(w), Amount(f, 32, 0.5), 0.49957254),
        (91.44, Amount(w, 8), Amount(f, 8, 0.5), 1.98893712),
        (91.44, Amount(w, 8, 0.5), Amount(f, 8, 0.5), 2.48568664),
        (86.84, Amount(w, 8, 0.5), Amount(f, 8, 0.5), 2.36064116),
        (85.94, Amount(w, 8, 0.5), Amount(f, 8), 1.33477167),
    ):
        assert performance_density(metric, weights, features) == pytest.approx(density, abs=5e-9)


def test_what_is_stored_counts() -> None:
    plain = count_features(net(), X)
    sizes = [4 * 16, 4 * 16, 4 * 16, 4 * 4, 4 * 4, 3]  # conv1, bn1, relu1, conv2, relu2, fc
    assert plain.count == sum(sizes) and plain.bits == 32 * sum(sizes)
    model, optimizer, run = started(together(30))
    train(model, optimizer, 0, 30)
    run.finalize()
    features = count_features(model, X)
    # bn1: half of the values at 4 bits, a mask of 64 bits and an exponent; relu2: 4 bits, exponent
    expected = 32 * (64 + 64 + 16 + 3) + (4 * 32 + 64 + 8) + (4 * 16 + 8)
    assert (features.count, features.bits) == (plain.count, expected)
    report = run.report()
    megabits = (report.total.bits + expected) / 1e6
    assert stored_density(90.0, report, features) == pytest.approx(90 / megabits)


def test_the_features_of_other_masks() -> None:
    model = insert(
        net(),
        X,
        after={
            "bn1": ActivationPruner(0.5, "channel"),
            "conv2": (ActivationPruner(0.5, "dynamic"), ActivationQuantizer(HBFP(4, block=8))),
        },
    )
    for module in (m for m in model.modules() if hasattr(m, "switch")):
        if isinstance(module, ActivationPruner) and module.kind == "channel":
            module.begin(1, 8)
            model.train()(X)
        module.switch(1.0)
    expected = 32 * (64 + 64 + 16 + 3) + (32 * 32 + 4) + count_hbfp()
    assert count_features(model, X).bits == expected


def count_hbfp() -> int:
    """16 values of 4 bits in 8 blocks, zeros too, and the mask of 16 bits."""
    return round(HBFP(4, block=8).bits_per_element(torch.Size((1, 4, 2, 2))) * 16) + 16


# ------------------------------------------------------------------ T14: gradient rules


GRAD = torch.tensor([0.1, 5.0, -5.0, 0.3, 0.95])
CLIPPED = torch.tensor([0.1, 0.875, -1.0, 0.3, 0.875])  # 4 bits, d = 3: −1 … 0.875


def fixed() -> tuple[FixedPoint, Any, Tensor]:
    """Weights whose best exponent is 3; the last is far outside the range."""
    part = FixedPoint(4, exponents=(3, 3))
    w = torch.tensor([0.5, -0.25, 0.1, 0.0, 40.0])
    return part, part.project(w), w


def test_the_gradients_value_is_clipped() -> None:
    _, state, w = fixed()
    before = GRAD.clone()
    assert torch.equal(gradients.clipped(GRAD, w, state), CLIPPED)
    assert torch.equal(GRAD, before)  # not in place
    # no mask by w: the weight far outside has its gradient
    assert gradients.clipped(GRAD, w, state)[4] == 0.875


def test_the_other_rules() -> None:
    part, state, w = fixed()
    assert gradients.dense(GRAD, w, state) is GRAD
    assert torch.equal(gradients.masked(GRAD, w, state), GRAD)  # nothing is pruned
    sparse = Sparse(nonzeros=2)
    assert gradients.masked(GRAD, w, sparse.project(w)).tolist() == [GRAD[0], 0, 0, 0, GRAD[4]]
    both = sparse.then(part)
    state = both.project(w)
    expected = [CLIPPED[0], 0, 0, 0, CLIPPED[4]]
    assert gradients.paper(GRAD, w, state).tolist() == expected
    assert gradients.clipped(GRAD, w, state).tolist() == CLIPPED.tolist()
    kmeans = KMeans(2).project(w)
    assert gradients.paper(GRAD, w, kmeans) is GRAD


@pytest.mark.parametrize("rule", ["dense", "masked", "clipped", "paper"])
def test_rules_in_lc(rule: str) -> None:
    """Also in a joint group, whose state is one for all."""
    model = net()
    optimizer = sgd(model, momentum=0.0)
    tasks = {Joint("*.weight"): Sparse(density=0.25).then(FixedPoint(2, exponents=(6, 6)))}
    lc = LC(
        model,
        tasks,
        schedule=constant(0, 1),
        optimizer=optimizer,
        gradient="sum",
        rule=getattr(gradients, rule),
    )
    (task,) = lc.tasks
    w = task.join(task.current).clone()
    mask = task.join(task.delta) != 0
    train_gradients(model)
    grad = task.join([p.grad for p in task.parameters]).clone()
    optimizer.step()
    moved = (w - task.join(task.current)) / 0.05
    kept = gradients.kept(task.state) if rule in ("masked", "paper") else None
    assert kept is None or kept.sum() == mask.numel() // 4
    if rule in ("clipped", "paper"):
        grad = grad.clamp(-2 / 64, 1 / 64)
    if rule in ("masked", "paper"):
        chosen = torch.zeros_like(w, dtype=torch.bool)
        chosen[w.abs().topk(w.numel() // 4).indices] = True
        grad = torch.where(chosen, grad, 0)
    torch.testing.assert_close(moved, grad, rtol=1e-3, atol=2e-6)


def train_gradients(model: nn.Module) -> None:
    x, y = batch(0, model)
    nn.functional.cross_entropy(model.train()(x), y).backward()


def test_the_gradient_of_activations() -> None:
    """Of a scalar autograd case: values clipped, nothing masked by x."""
    module = ActivationQuantizer(FixedPoint(4, exponents=(3, 3)))
    module.begin(1, 1)
    module(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    x = torch.tensor([0.5, -0.25, 0.1, 0.0, 40.0], requires_grad=True)
    module(x).backward(GRAD.clone())
    assert torch.equal(x.grad, GRAD)  # still off  # type: ignore[arg-type]
    module.switch()
    incoming = GRAD.clone()
    x.grad = None
    y = module(x)
    assert y.tolist() == [0.5, -0.25, 0.125, 0, 0.875]
    y.backward(incoming)
    assert torch.equal(x.grad, CLIPPED) and torch.equal(incoming, GRAD)  # type: ignore[arg-type]
    module.clip = False
    x.grad = None
    module(x).backward(GRAD)
    assert torch.equal(x.grad, GRAD)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [FixedPoint(4), HBFP(4)], ids=str)
def test_values_that_are_not_finite_show_in_the_gradient(part: Any) -> None:
    module = ActivationQuantizer(part)
    x = torch.tensor([[1.0, math.inf, -2.0]], requires_grad=True)
    module(x).backward(torch.ones(1, 3))
    assert x.grad is not None
    assert x.grad.isnan().tolist() == [[False, True, False]]
    assert x.grad[0, ::2].tolist() == [1, 1]


def test_the_gradient_of_pruned_activations() -> None:
    module = ActivationPruner(0.5, shape=(4,))
    module.begin(1, 1)
    module(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
    module.switch(1.0)
    x = torch.ones(2, 4, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0, 1, 1, 0]] * 2


# ------------------------------------------------------------------ weights


def test_the_ramp_of_weights() -> None:
    """Sparsity by the formula; masks stay between events and after the last."""
    plan = Plan(20, prune=Cubic(2, 3, 4))
    model, optimizer, run = only(plan, Sparse(density=0.5), rule=gradients.dense)
    names = [name for name, _ in model.named_parameters()]
    levels = {5: 0.2890625, 8: 0.4375, 11: 0.4921875, 14: 0.5}
    level, before = 0.0, None
    for step in range(20):
        train(model, optimizer, step, step + 1)
        level = levels.get(step + 1, level)
        for p in (model.conv2.weight, model.fc.weight):
            assert zeros(p) == round(level * p.numel())
        mask = model.conv2.weight != 0
        if step + 1 in levels:
            hidden = run.tasks[1].current[0]
            assert float(hidden[mask].abs().min()) >= float(hidden[~mask].abs().max())
        elif before is not None:
            assert torch.equal(mask, before)
        before = mask
    assert [name for name, _ in model.named_parameters()] == names
    hidden = run.tasks[1].current[0]  # dense: what is pruned has gone on learning
    assert float(hidden[mask].abs().min()) < float(hidden[~mask].abs().max())
    assert torch.equal(model.conv2.weight, torch.where(mask, hidden, 0))


def test_masked_weights_rest() -> None:
    model, optimizer, run = only(Plan(9, prune=Cubic(1, 1, 1)), Sparse(density=0.5))
    train(model, optimizer, 0, 2)
    optimizer.state.clear()  # no momentum from before
    hidden, mask = run.tasks[0].current[0].clone(), model.conv1.weight != 0
    train(model, optimizer, 2, 5)
    moved = run.tasks[0].current[0] != hidden
    assert torch.equal(moved, mask)


def test_the_scale_is_frozen_and_codes_follow() -> None:
    model, optimizer, run = only(Plan(20, quantize=Delay(4)), FixedPoint(4))
    first = model.fc.weight.detach().clone()
    train(model, optimizer, 0, 3)
    assert not torch.equal(first, model.fc.weight)
    seen = set()
    for step in range(3, 20):
        train(model, optimizer, step, step + 1)
        task = run.tasks[2]
        if step == 3:
            exponents = task.current_inner().exponents.clone()
            assert torch.equal(exponents, FixedPoint(4).project(task.current[0]).exponents)
        assert torch.equal(task.current_inner().exponents, exponents)
        expected = task.inner.grid.values(task.current[0])
        assert torch.equal(model.fc.weight, expected)
        seen.add(tuple(task.inner.integers.flatten().tolist()))
    assert len(seen) > 1


@pytest.mark.parametrize("part", [FixedPoint(4).over(Matrix()), Joint("*.weight")], ids=str)
def test_scales_are_frozen_behind_views_and_in_groups(part: Any) -> None:
    weights = {part: each(FixedPoint(4))} if isinstance(part, Joint) else {"conv2.weight": part}
    model, optimizer, run = started(Plan(20, quantize=Delay(4)), weights, net())
    train(model, optimizer, 0, 4)
    (task,) = run.tasks
    before = [n for n in task.arrays()["inner"] if "exponents" in n]
    exponents = {name: task.arrays()["inner"][name] for name in before}
    assert exponents
    with torch.no_grad():
        for w in task.weights:
            w.mul_(8)
    train(model, optimizer, 4, 5)
    assert same({name: task.arrays()["inner"][name] for name in before}, exponents)
    again = FixedPoint(4).project(task.weights[-1]).exponents
    assert not any(torch.equal(x.reshape(-1), again.reshape(-1)) for x in exponents.values())
    assert model.conv2.weight.unique().numel() <= 16


def test_inside_the_step_the_parameters_hold_w() -> None:
    model, optimizer, run = only(Plan(9, quantize=Delay(0)), FixedPoint(2))
    seen: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.fc.weight.detach().clone()))
    w = run.tasks[2].current[0].clone()
    assert len(set(model.fc.weight.flatten().tolist())) <= 4  # from the start
    train(model, optimizer, 0, 1)
    assert torch.equal(seen[0], w)
    assert len(set(model.fc.weight.flatten().tolist())) <= 4


PARTS = [
    Sparse(density=0.25),
    Sparse(nonzeros=7),
    Sparse(density=0.5, value_dtype=torch.bfloat16),
    NM(1, 4),
    BlockSparse(density=0.5, axis=0),
    FixedPoint(4, axis=0),
    Int(4, axis=0),
    Int(3, symmetric=False),
    HBFP(4, block=4),
    KMeans(4),
    PART,
    NM(2, 4).then(FixedPoint(8, axis=0)),
    BlockSparse(blocks=2, axis=0).then(Int(4)),
    Sparse(density=0.5).then(KMeans(3)),
    KMeans(4) + Sparse(nonzeros=2),
]


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize(
    "plan", [prune_then_quantize(17), quantize_then_prune(17)], ids="PQ QP".split()
)
def test_any_part_ends_as_in_lc(plan: Plan, part: Part[Any], tmp_path: Path) -> None:
    """Its state is admitted, rebuilds the parameters, and is written and read as LC's."""
    model, optimizer, run = only(plan, part)
    train(model, optimizer, 0, 10)
    pruned = run.tasks[0].pruner is not None
    alone = (
        "nothing is switched on"
        if plan.quantize == prune_then_quantize(17).quantize
        else "all events are done"
    )
    assert f"step 10 of 17: {'half-ramped' if pruned else alone}" in str(run.report())
    train(model, optimizer, 10, 17)
    trained = [p.detach().clone() for p in model.parameters()]
    run.finalize()
    for task in run.tasks:
        assert task.part == part and part.admits(task.state)
        assert torch.equal(part.reconstruct(task.state), task.parameters[0])
    assert all(map(torch.equal, model.parameters(), trained))
    save(run, tmp_path / "model.lc")
    again = load(tmp_path / "model.lc", net())
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    report = run.report()
    assert sum(row.bits for row in report.rows) == sum(part.bits(t.state) for t in run.tasks)
    assert "all events are done" in str(report)
    for p in model.parameters():  # the hooks are gone
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(model.fc.weight, trained[-2])


def test_one_budget_for_all() -> None:
    plan = prune_then_quantize(17)
    part = Sparse(density=0.25).then(FixedPoint(6))
    model, optimizer, run = started(plan, {Joint("*.weight"): part}, net())
    train(model, optimizer, 0, 17)
    run.finalize()
    (task,) = run.tasks
    kept = [int((p != 0).sum()) for p in task.parameters]
    assert sum(kept) <= task.size // 4
    assert len({k / p.numel() for k, p in zip(kept, task.parameters, strict=True)}) > 1
    assert torch.equal(
        task.join([p.detach() for p in task.parameters]), part.reconstruct(task.state)
    )


def test_other_plans_for_some() -> None:
    plan = Plan(10, prune=Delay(2), quantize=Delay(3))
    late = Plan(10, prune=Delay(8), quantize=Delay(8))
    model, optimizer, _ = only(plan, PART, plans={"fc*": late})
    train(model, optimizer, 0, 5)
    assert zeros(model.conv2.weight) >= 72 and zeros(model.fc.weight) == 0
    train(model, optimizer, 5, 10)
    assert zeros(model.fc.weight) >= 24


def test_a_run_shows_the_plans_that_apply() -> None:
    _, _, run = only(prune_then_quantize(30), Sparse(density=0.5), plans={"fc*": together(30)})
    rows = [line[:20] for line in str(run).splitlines()]
    assert rows == [
        "plan of 30 steps",
        "weights     prune   ",
        "fc*: plan of 30 step",
        "weights     prune   ",
        "step 0 of 30: nothin",
    ]
    _, _, run = started(together(30), {})
    assert str(run).count("activations ") == 2 and "weights" not in str(run)


def test_a_skipped_step_is_no_step() -> None:
    model, optimizer, run = only(Plan(9, prune=Delay(1)), Sparse(density=0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    model.fc.weight.grad = torch.full_like(model.fc.weight, math.inf)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert run.position == 0 and zeros(model.fc.weight) == 0


# ------------------------------------------------------------------ activations


@pytest.mark.parametrize(
    "part", [FixedPoint(4), Int(4), FixedPoint(4, axis=1), Int(4, axis=1)], ids=str
)
def test_four_bits_are_sixteen_values(part: Any) -> None:
    """Per scale, in training and evaluation, whatever arrives."""
    module = ActivationQuantizer(part, shape=(3, 5, 5), window=32)
    module.begin(4, 8)
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        module(torch.randn(8, 3, 5, 5, generator=g))
    module.switch()
    for training in (True, False):
        module.train(training)
        for scale in (1e-20, 1e-3, 1.0, 10.0, 1e6, 1e20):
            y = module(scale * torch.randn(64, 3, 5, 5, generator=g))
            for block in y.unbind(1) if part.axis else [y]:
                assert len(torch.unique(block)) <= 16
                assert scale < 1 or len(torch.unique(block)) > 1


def test_the_scale_of_activations_is_fitted_to_the_window() -> None:
    part = FixedPoint(4)
    module = ActivationQuantizer(part, shape=(3,), window=16)
    module.begin(2, 8)
    batches = [
        torch.randn(8, 3, generator=torch.Generator().manual_seed(i)) * 4.0**-i for i in range(3)
    ]
    for x in batches:
        assert torch.equal(module(x), x)  # not yet
    module.eval()(1e9 * batches[0])  # evaluation does not count
    module.train().switch()
    window = torch.cat(batches[1:]).flatten()  # the first has slid out
    assert module.step.item() == 2.0 ** -part.project(window).exponents.item()
    assert torch.equal(
        module(batches[0]),
        part.with_scales(batches[0], part.project(window)).grid.values(batches[0]),
    )


def test_a_long_window_is_sampled() -> None:
    """Not on a line of equal columns: here a stride of 512 would see zeros only."""
    module = ActivationQuantizer(FixedPoint(8), shape=(16, 32, 32), window=256)
    module.begin(16, 16)
    x = torch.randn(16, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 0
    module(x)
    assert module.store is not None and module.store.shape == (1, 16, 4096)
    assert float((module.store[0, 0] == 0).float().mean()) < 0.05
    module.switch()
    assert module.step.item() == 2.0**-5


def test_formats_with_their_own_scales() -> None:
    part = HBFP(4, axis=1, block=4)
    module = ActivationQuantizer(part)
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x), x)
    module.switch()  # no window is needed
    assert torch.equal(module(x), part.quantize(x)) and not torch.equal(module(x), x)
    x.requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())


def test_channels_that_have_no_scale() -> None:
    module = ActivationQuantizer(FixedPoint(4, axis=1), shape=(3, 5, 5))
    assert module(torch.ones(2, 3, 7, 9)).shape == (2, 3, 7, 9)
    for channels in (1, 4):
        with pytest.raises(ValueError, match=r"has 3 scales along axis 1, got .*One scale per ten"):
            module(torch.ones(2, channels, 5, 5))


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_leave_scales_and_shares_as_they_are(cast: torch.dtype) -> None:
    quantizer, pruner = ActivationQuantizer(FixedPoint(16), (3,)), ActivationPruner(0.3, "dynamic")
    quantizer.begin(1, 8)
    quantizer(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    quantizer.switch()
    pruner.switch(1.0)
    module = nn.Sequential(quantizer, pruner)
    before = copy.deepcopy(module.state_dict())
    module.to(cast)
    assert same(module.state_dict(), before)
    x = torch.arange(1, 300_001).view(1, -1).to(torch.bfloat16)
    assert 0.68 < float((pruner(x) != 0).double().mean()) < 0.75
    assert module.to("meta")[0].step.device.type == "meta"


@pytest.mark.parametrize(("kind", "window"), [("map", 16), ("channel", 16), ("map", 9999)])
def test_static_masks_are_of_the_window(kind: Any, window: int) -> None:
    """16 examples are two steps; a long window reaches back to the event before."""
    plan = Plan(12, prune_activations=Cubic(2, 3, 2))
    model = insert(net(), X, after={"bn1": ActivationPruner(0.5, kind, window=window)})
    seen: list[Tensor] = []
    model.bn1.inserted_after[0].register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    model, optimizer, _ = started(plan, {}, model)
    module = model.bn1.inserted_after[0]
    for before, step, share in ((0, 5, 0.875), (5, 8, 1.0)):
        train(model, optimizer, before, step)
        first = step - 2 if window == 16 else before
        sums = torch.cat(seen[first:step]).abs().double().sum(0)
        if kind == "channel":
            sums = sums.sum((1, 2))
        count = round(share * 0.5 * sums.numel())
        mask = sums.flatten() > sums.flatten().sort().values[count - 1]
        assert torch.equal(module.mask.flatten() == 1, mask)
        assert torch.equal(model.eval().bn1(seen[-1]) != 0, (module.mask == 1).expand_as(seen[-1]))
        seen.pop()
    frozen = module.mask.clone()
    train(model, optimizer, 8, 12)
    assert torch.equal(module.mask, frozen) and module.store is None


def test_dynamic_masks() -> None:
    module = ActivationPruner(0.75, "dynamic")
    x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.equal(module(x), x)
    module.switch(2 / 3)
    y = module(x)
    for row, out in zip(x.flatten(1), y.flatten(1), strict=True):
        kept = row.abs().topk(12).indices
        assert sorted(out.nonzero()[:, 0].tolist()) == sorted(kept.tolist())
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)  # type: ignore[union-attr]
    module.switch(1.0)
    assert int((module(x[:, :2, :2]) != 0).sum()) == 5  # any shape: 1 of 4 each
    assert int((module(x[:, :1, :1]) != 0).sum()) == 5  # one at least


def test_channel_masks_take_any_size() -> None:
    module = ActivationPruner(0.5, "channel", shape=(4, 6, 6))
    module.begin(1, 2)
    module(torch.tensor([1.0, 4.0, 3.0, 2.0]).view(1, 4, 1, 1).expand(2, 4, 6, 6))
    module.switch(1.0)
    y = module(torch.ones(1, 4, 3, 9))
    assert y[0, :, 0, 0].tolist() == [0, 1, 1, 0]


def test_other_shapes_under_a_static_mask() -> None:
    model, optimizer, _ = started(
        Plan(9, prune_activations=Delay(2), quantize_activations=Delay(3)), {}
    )
    train(model, optimizer, 0, 4)
    with pytest.raises(
        ValueError, match=r"\(4, 4, 4\), got \(4, 5, 5\).*'channel' or kind='dynamic'"
    ):
        model(torch.randn(2, 1, 7, 7))
    channel = ActivationPruner(0.5, "channel", shape=(4, 6, 6))
    with pytest.raises(ValueError, match="static mask"):
        channel(torch.ones(1, 3, 6, 6))


def test_pruning_behind_a_relu_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"'relu1'.*behind a ReLU.*before the non-linearity"):
        insert(net(), X, after={"relu1": PRUNE})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        insert(net(), X, before={"relu1": PRUNE})
    module = ActivationPruner(0.4, shape=(5,))
    module.begin(1, 2)
    module(torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0]] * 2))
    with pytest.warns(UserWarning, match="prunes 2 of 5 activations, 0 in the whole window"):
        module.switch(1.0)
    module = ActivationPruner(0.4, "dynamic")
    x = torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0]] * 2)
    module(x)  # not on yet
    module.switch(1.0)
    with pytest.warns(UserWarning, match="40% of each example, all of them 0 already"):
        module(x)
    module(x)  # once is enough
    module.switch(0.25)  # of five values nothing is pruned yet
    module(x)
    module.switch(1.0)
    module(x[:0])
    module.switch(1.0)
    module(x - 1)


def test_masks_lie_in_memory_as_the_activations() -> None:
    """A mask in another order than its activations is transposed for each example: half the cost of
    a convolution.
    """
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=layout)
        other = copy.deepcopy(conv)
        x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(2))
        x = x.contiguous(memory_format=layout)
        model = insert(nn.Sequential(conv), x, after={"0": ActivationPruner(0.5, window=8)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        plan = Plan(3, prune_activations=Delay(2))
        run = Scheduled(model, plan=plan, optimizer=optimizer, batch_size=8)
        for _ in range(3):
            model(x).sum().backward()
            optimizer.step()
        run.finalize()
        new = insert(nn.Sequential(other), x, after={"0": ActivationPruner(0.5, window=8)})
        new.load_state_dict(model.state_dict())
        for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), new):
            pruner = next(m for m in same.modules() if isinstance(m, ActivationPruner))
            assert pruner.mask.stride() == same(x)[0].stride()
            assert int(pruner.mask.sum()) == 72
            torch.testing.assert_close(same(x), model(x))
        results.append(model(x))
    torch.testing.assert_close(*results)


def test_inserted_modules_keep_names() -> None:
    plain, model = net(), ready(net())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    added = set(model.state_dict()) - set(plain.state_dict())
    assert "bn1.inserted_after.0.mask" in added and "conv1.inserted_before.0.step" in added
    assert torch.equal(model.eval()(X), plain.eval()(X))
    assert all(module is not QUANTIZE and module is not PRUNE for module in model.modules())


# ------------------------------------------------------------------ going on, going elsewhere


@pytest.mark.parametrize("stop", [14, 16, 26, 28])
def test_resumed_bit_for_bit(stop: int) -> None:
    """In a ramp, in a window, after the first quantizer."""
    plan = prune_then_quantize(30)  # pruning at 14, 16, 17, 19; weights at 28, activations at 28
    whole = started(plan)
    train(*whole[:2], 0, 30)

    first = started(plan)
    train(*first[:2], 0, stop)
    file = io.BytesIO()
    torch.save([x.state_dict() for x in first], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    train(*first[:2], stop, 30)  # what was saved is not what goes on

    second = started(plan)
    for thing, state in zip(second, states, strict=True):
        thing.load_state_dict(state)
    assert same(second[0].state_dict(), states[0]) and same(second[2].state_dict(), states[2])
    assert second[2].position == stop
    train(*second[:2], stop, 30)
    for run in (whole, second):
        run[2].finalize()
    assert same(second[0].state_dict(), whole[0].state_dict())
    assert same(
        [t.part.encode(t.state)["positions"].data for t in second[2].tasks],
        [t.part.encode(t.state)["positions"].data for t in whole[2].tasks],
    )
    assert same(second[1].state_dict()["state"], whole[1].state_dict()["state"])


def test_states_that_do_not_fit() -> None:
    _, _, run = started(prune_then_quantize(30))
    state = run.state_dict()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"version": 99}, "version 1"),
        ({"plan": {}}, "another plan"),
        ({"timeline": {}}, "another timeline"),
        ({"tasks": {}}, "of a finished run"),
        ({"tasks": {"x": {}}}, "another model"),
        ({"windows": {}}, "another model"),
        (
            {"tasks": state["tasks"] | {"fc.weight": state["tasks"]["conv1.weight"]}},
            "another model",
        ),
        (
            {"tasks": state["tasks"] | {"fc.weight": state["tasks"]["fc.weight"] | {"inner": {}}}},
            "damaged",
        ),
    ]
    name, one = "bn1.inserted_after.0", state["tasks"]["fc.weight"]
    counts = {"store": torch.zeros(4, 4, 4), "seen": torch.zeros((), dtype=torch.int64)}
    for window in (None, {}, {"training": None}, counts, counts | {"store": torch.zeros(2)}):
        cases.append(({"windows": state["windows"] | {name: window}}, f"damaged.*{name}"))
    for entry in ({}, one | {"share": 2}, one | {"share": "x"}):
        cases.append(({"tasks": state["tasks"] | {"fc.weight": entry}}, "damaged"))
    entry = one | {"weights": [0]}
    cases.append(({"tasks": state["tasks"] | {"fc.weight": entry}}, "of shapes"))
    for at in (-5, "x", None, True):
        cases.append(({"position": at}, "position .* is no number of steps"))
    cases.append(({"position": 29}, "conv1.weight at step 29"))  # with a mask, by then
    cases.append(({"windows": None}, "windows is None"))
    nan = one | {"weights": [torch.full((3, 16), math.nan)]}
    cases.append(({"tasks": state["tasks"] | {"fc.weight": nan}}, "NaN or inf"))
    cases.append(({"tasks": state["tasks"] | {"fc.weight": one | {"weights": None}}}, "of shapes"))
    cases.append(({"started": state["started"] | {"fc.weight": None}}, "started weights of fc"))
    cases.append(({"started": state["started"] | {"fc.weight": [0]}}, "started weights of fc"))
    before = copy.deepcopy(run.state_dict())
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            run.load_state_dict(state | change)
        assert same(run.state_dict(), before)
    del state["position"]
    with pytest.raises(ValueError, match=r"lacks \['position'\]"):
        run.load_state_dict(state)


@pytest.fixture(scope="module")
def trained() -> tuple[Net, Scheduled]:
    model, optimizer, run = started(together(20))
    train(model, optimizer, 0, 20)
    run.finalize()
    return model.eval(), run


def test_a_trained_model_is_a_model(trained: tuple[Net, Scheduled]) -> None:
    """Copied, pickled, loaded before any forward, exported."""
    model, _ = trained
    y = model(X)
    fresh = ready(net())
    fresh.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh.eval()):
        assert torch.equal(twin(X), y)
        twin.bn1.inserted_after[1].step.mul_(2)
        assert not torch.equal(twin(X), y) and torch.equal(model(X), y)
    exported = torch.export.export(model, (X,)).module()
    assert torch.equal(exported(X), y)
    assert len(torch.unique(model.bn1(torch.randn(9, 4, 4, 4) * 50))) <= 16


def test_a_file_holds_activations_too(trained: tuple[Net, Scheduled], tmp_path: Path) -> None:
    model, run = trained
    save(run, tmp_path / "model.lc")
    records = PackedFile(tmp_path / "model.lc", known_types()).records
    (mask,) = [r for r in records if r.names[0] == "bn1.inserted_after.0.mask"]
    assert mask.bits == 64  # of 4×4×4 values
    for materialize in (None, "never", "on_load"):
        again = load(tmp_path / "model.lc", ready(net()), materialize=materialize).eval()  # type: ignore[arg-type]
        assert isinstance(again.conv1, PackedModule) == (materialize is not None)
        torch.testing.assert_close(again(X), model(X))
        assert len(torch.unique(again.bn1(50 * torch.randn(9, 4, 4, 4)))) <= 16
        torch.testing.assert_close(to_dense(again)(X), model(X))
    save(again, tmp_path / "again.lc")
    torch.testing.assert_close(load(tmp_path / "again.lc", ready(net())).eval()(X), model(X))


def test_a_file_of_another_format_is_refused(
    trained: tuple[Net, Scheduled], tmp_path: Path
) -> None:
    """Buffers of the same shapes would else be read, and mean something else."""
    model, run = trained
    save(run, tmp_path / "model.lc")
    for part in (FixedPoint(8), FixedPoint(4, rounding="truncate")):
        other = ActivationQuantizer(part, window=WINDOW)
        places = {"bn1": (PRUNE, other), "relu2": QUANTIZE}
        fresh = insert(net(), X, before={"conv1": QUANTIZE}, after=places)
        before = copy.deepcopy(fresh.state_dict())
        with pytest.raises(ValueError, match=r"load: bn1.inserted_after.1 .*another number format"):
            load(tmp_path / "model.lc", fresh)
        assert same(fresh.state_dict(), before)
        with pytest.raises(RuntimeError, match=r"bn1.inserted_after.1: saved with another number"):
            fresh.load_state_dict(model.state_dict())
    fresh = ready(net())
    fresh.stored = [1]  # type: ignore[assignment]  # a name of the user's
    fresh.bn1 = torch.compile(fresh.bn1, backend="eager")  # type: ignore[assignment]
    load(tmp_path / "model.lc", fresh)
    assert fresh.bn1.inserted_after[1].on  # type: ignore[index]
    meta = copy.deepcopy(fresh).to("meta")
    assert not meta.bn1.inserted_after[1].on and "map" in repr(meta)  # type: ignore[index]
    state = model.state_dict()
    state["bn1.inserted_after.1.active"] = torch.tensor(True)  # as files once had it
    again = ready(net())
    again.load_state_dict(state)
    assert torch.equal(again.eval()(X), model(X))
    assert same(again.state_dict(), model.state_dict())
    own = [ActivationQuantizer(HBFP(width, axis=1, block=4)) for width in (4, 8)]
    own[0].switch()
    with pytest.raises(RuntimeError, match="another number format than HBFP"):
        own[1].load_state_dict(own[0].state_dict())


def test_a_second_run_goes_on_from_the_first(trained: tuple[Net, Scheduled]) -> None:
    """Its plan may leave activations as they are."""
    model = copy.deepcopy(trained[0])
    masks = [b.clone() for n, b in model.named_buffers() if n.endswith((".mask", ".step"))]
    optimizer = sgd(model)
    plan = Plan(4, quantize=Delay(1))
    run = Scheduled(model, {"fc.weight": FixedPoint(2)}, plan=plan, optimizer=optimizer)
    assert "activations are on from an earlier run, nothing of this plan" in str(run)
    train(model, optimizer, 0, 4)
    run.finalize()
    assert model.fc.weight.unique().numel() <= 4
    after = [b for n, b in model.named_buffers() if n.endswith((".mask", ".step"))]
    assert same(masks, after)


@pytest.mark.parametrize(
    "module",
    [
        ActivationPruner(0.5, "channel"),
        ActivationPruner(0.5, "dynamic"),
        ActivationQuantizer(HBFP(4, axis=1, block=4)),
        ActivationQuantizer(Int(4, axis=1)),
    ],
    ids=str,
)
def test_every_kind_is_exported(module: Any) -> None:
    model = insert(net(), X, after={"bn1": module})
    model.eval()(X)
    own: Any = model.bn1.inserted_after[0]  # type: ignore[index]
    own.begin(1, 8) if own.watches else None
    model.train()(X)
    own.switch(1.0)
    y = model.eval()(X)
    assert own.on
    assert torch.equal(torch.export.export(model, (X,)).module()(X), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), y)


# dynamo itself instantiates autograd functions
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_without_a_graph_break() -> None:
    results = []
    for compiled in (False, True):
        model, optimizer, run = started(prune_then_quantize(30))
        used = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        train(used, optimizer, 0, 30)
        run.finalize()
        results.append(model.eval()(X))
        if compiled:
            torch.testing.assert_close(used(X), results[-1])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_code_compiled_for_a_plain_model_is_not_used() -> None:
    """Models of a class share compiled code, which by default does not look at hooks."""
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # as in a new process
    torch._dynamo.reset()
    plain, other = net().eval(), net().eval()
    used = torch.compile(plain, backend="eager")
    used(X)
    insert(other, X, before={"relu2": ActivationPruner(0.5, "dynamic")})
    used(X)
    other.relu2.inserted_before[0].switch(1.0)
    pickled = pickle.loads(pickle.dumps(other))
    for model in (other, pickled):
        y = torch.compile(model, backend="eager")(X)
        assert torch.equal(y, model(X)) and not torch.equal(y, plain(X))
    assert torch.equal(used(X), plain(X))


def one_of_two(rank: int, folder: str) -> None:
    """A process of the test below: its half of each batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    model = ready(without_batchnorm())
    result = shared(nn.parallel.DistributedDataParallel(model), model, slice(rank, None, 2))
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def without_batchnorm() -> Net:
    """Statistics of a batch would differ from those of its halves."""
    model = net(torch.float64)
    model.bn1 = nn.Identity()  # type: ignore[assignment]
    return model


def shared(used: nn.Module, model: Net, part: slice) -> dict[str, Any]:
    size = len(range(8)[part])
    optimizer = sgd(used)
    run = Scheduled(
        used, {"*.weight": PART}, plan=together(16), optimizer=optimizer, batch_size=size
    )
    steps = []
    for i in range(16):
        x, y = (z[part] for z in batch(i, model))
        optimizer.zero_grad()
        nn.functional.cross_entropy(used(x), y).backward()
        optimizer.step()
        steps.append(zeros(model.conv2.weight) + zeros(model.bn1.inserted_after[0].mask))
    run.finalize()
    return {"steps": steps, "state": model.state_dict()}


def test_two_processes_have_the_schedule_and_masks_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = ready(without_batchnorm())
    alone = shared(model, model, slice(None))
    assert same(first, second)
    assert first["steps"] == alone["steps"] and len(set(alone["steps"])) > 3
    for name, x in alone["state"].items():
        if x.is_floating_point():
            torch.testing.assert_close(first["state"][name], x)
        else:
            assert torch.equal(first["state"][name], x), name


# ------------------------------------------------------------------ bad input


def test_quantizers_without_data() -> None:
    plan = Plan(9, quantize_activations=Delay(0))
    with pytest.raises(ValueError, match="step 0, before it has seen any data: step 1"):
        started(plan, {})
    model, optimizer, _ = started(
        Plan(9, quantize_activations=Delay(2)), {}, insert(net(), X, before={"conv1": QUANTIZE})
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    model.eval()(X)  # that does not count
    with pytest.raises(RuntimeError, match=r"Step 2: switch conv1.*before it has seen any data"):
        optimizer.step()


def test_nan_in_a_window() -> None:
    model, optimizer, _ = started(
        Plan(9, quantize_activations=Delay(1)), {}, insert(net(), X, before={"conv1": QUANTIZE})
    )
    model.train()(X * math.nan)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match=r"switch conv1.*NaN"):
        optimizer.step()


def test_layers_named_twice_and_other_places() -> None:
    model = net()
    before = model.state_dict().keys()
    shared_relu = net()
    shared_relu.relu2 = shared_relu.relu1
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (model, {"after": {"bn*": PRUNE, "*1": QUANTIZE}}, "'bn1' is named twice, by 'bn\\*'"),
        (model, {"after": {"nothing*": PRUNE}}, "No layer named 'nothing\\*'"),
        (shared_relu, {"before": {"relu1": PRUNE}}, "called 2 times"),
        (nn.Sequential(nn.Sequential(model)), {"before": {"0": PRUNE}}, "name its first or last"),
        (torch.compile(model, backend="eager"), {"before": {"relu1": PRUNE}}, "call it first"),
    ]
    for thing, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            insert(thing, X, **arguments)
    with pytest.raises(TypeError, match="insert takes ActivationPruner and ActivationQuantizer"):
        insert(model, X, after={"bn1": nn.ReLU()})  # type: ignore[dict-item]
    assert model.state_dict().keys() == before
    with pytest.raises(ValueError, match="Every layer that 'bn\\*' matches is named exactly"):
        insert(model, X, after={"bn*": PRUNE, "bn1": QUANTIZE})
    insert(model, X, after={"conv*": PRUNE, "conv1": QUANTIZE})  # an exact name wins
    assert isinstance(model.conv1.inserted_after[0], ActivationQuantizer)
    assert isinstance(model.conv2.inserted_after[0], ActivationPruner)
    with pytest.raises(ValueError, match="'conv1' already has an inserted_after"):
        insert(model, X, after={"conv1": PRUNE})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ActivationPruner(1.0), r"in \[0, 1\)"),
        (lambda: ActivationPruner(0.5, "pixel"), "'map', 'channel' or 'dynamic'"),  # type: ignore[arg-type]
        (lambda: ActivationPruner(0.5, window=0), "at least 1"),
        (lambda: ActivationQuantizer(Int(4, group=8)), "one scale per tensor"),
        (lambda: ActivationQuantizer(Int(4, axis=0)), "not the batch"),
        (lambda: ActivationQuantizer(Int(4, axis=-2), shape=(3,)), "is the batch"),
    ],
)
def test_modules_that_cannot_be(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_modules_without_a_shape() -> None:
    for module in (ActivationPruner(0.5), ActivationQuantizer(Int(4, axis=1))):
        with pytest.raises(RuntimeError, match="give shape="):
            module(X)
    with pytest.raises(TypeError, match="takes a number format"):
        ActivationQuantizer(Sparse(nonzeros=3))  # type: ignore[arg-type]


def test_runs_that_cannot_be() -> None:
    plan = prune_then_quantize(30)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ({}, {"model": net()}, "needs weights="),
        ({"*.weight": SparsePenalty(0.1)}, {"model": net()}, "needs `mu`"),
        ({"*.weight": NM(2, 4, axis=3)}, {"model": net()}, "axis=3 does not exist"),
        (None, {"batch_size": None}, "needs batch_size="),
        (None, {"plan": Plan(30, quantize=Delay(3))}, "never switches .* has no prune"),
        (None, {"plan": Plan(30, Delay(1), Delay(3), Delay(4))}, "has no quantize_activations"),
        (None, {"plans": {"nothing": plan}}, "no task or layer 'nothing'"),
        (None, {"plans": {"fc*": plan.scaled(1000)}}, "is for 1000 steps, the training has 30"),
        (
            None,
            {"plans": {"fc*": plan, "*.weight": plan}},
            "both match 'conv1.weight'|both match 'fc.weight'",
        ),
    ]
    for weights, options, message in cases:
        model = options.pop("model", None) or ready(net())
        optimizer = sgd(model)
        before = copy.deepcopy(model.state_dict())
        options = {"plan": plan, "batch_size": 8} | options
        with pytest.raises(ValueError, match=message):
            Scheduled(
                model,
                {"*.weight": PART} if weights is None else weights,
                optimizer=optimizer,
                **options,
            )
        assert same(model.state_dict(), before)
        assert not optimizer._optimizer_step_pre_hooks


def test_a_half_ramped_model(tmp_path: Path) -> None:
    """Evaluates as what it is, and the report says so."""
    model, optimizer, run = started(prune_then_quantize(30))
    assert "nothing is switched on; next at step 14: prune" in str(run.report())
    assert run.report().rows == ()
    train(model, optimizer, 0, 15)
    report = run.report()
    status = "step 15 of 30: half-ramped; next at step 16: prune conv1.weight and 3 more"
    assert report.status == status and str(report).startswith(status)
    assert "bn1.inserted_after.0: 0.5, map, 0.2812 pruned" in str(report)
    assert [row.parts for row in report.rows] == [
        "Sparse(nonzeros=26)",
        "Sparse(nonzeros=102)",
        "Sparse(nonzeros=34)",
    ]
    before = copy.deepcopy(model.state_dict())
    y = model.eval()(X)
    assert torch.equal(y, model(X)) and same(model.state_dict(), before)
    with pytest.raises(RuntimeError, match=r"step 15.*next event is at step 16.*last at 28"):
        run.finalize()
    with pytest.raises(RuntimeError, match=r"save: the plan is not done"):
        save(run, tmp_path / "model.lc")
    train(model, optimizer, 15, 30)
    run.finalize()
    for call in (run.finalize, lambda: run.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"after finalize\(\)"):
            call()
    assert run.finished and run.position == 30


# ------------------------------------------------------------------ the page for users of QSparse

PAGE = (Path(__file__).parents[1] / "docs" / "from-qsparse.md").read_text(encoding="utf-8")
OURS = [
    code
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| there", "|---"))
    for code in re.findall(r"`([^`]+)`", line.rsplit(" | ", 1)[1])
    if "..." not in code
]


@pytest.mark.parametrize("code", OURS)
def test_what_the_page_puts_beside_qsparses_calls(code: str) -> None:
    """Its blocks are run by test_docs.py; this is its tables."""
    model = net()
    names = vars(lc_compress) | vars(lc_compress.scheduled) | {"nn": nn}
    own = {"net": model, "images": X, "total": 10_000, "state": model.state_dict()}
    thing = eval(code, names | own)
    for part in thing.values() if isinstance(thing, dict) else [thing]:
        if isinstance(part, Part):
            w = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
            delta = part.reconstruct(part.project(w))
            assert 0 < float((w - delta).norm()) < float(w.norm())


def test_the_page_shows_its_plan() -> None:
    assert len(OURS) > 30
    assert f"```\n{prune_then_quantize(4, steps_per_epoch=16)}\n" in PAGE
