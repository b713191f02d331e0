"""The classic controller: what it adds to the loop, where it converges, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lc_compress import (
    LC,
    Binary,
    Joint,
    KMeans,
    LowRank,
    Part,
    Sparse,
    SparsePenalty,
    constant,
    geometric,
)

SCHEDULE = (0.1, 0.1, 0.4)
PART = Binary() + Sparse(nonzeros=3)


def sgd(parameters: Iterator[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2)


def adamw(parameters: Iterator[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def plain(parameters: Iterator[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    return [(torch.randn(8, 6, **draw), torch.randn(8, 3, **draw)) for _ in range(count)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def controller(model: nn.Module, optimizer: Optimizer | None = None, **options: Any) -> LC:
    options.setdefault("schedule", SCHEDULE)
    return LC(model, {"*.weight": PART}, optimizer=optimizer, **options)


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def train(lc: LC, model: nn.Module, optimizer: Optimizer, penalty: bool) -> None:
    for _ in lc.steps(progress=False):
        for batch in batches():
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            (loss + lc.penalty() if penalty else loss).backward()
            optimizer.step()


class Quadratic(nn.Module):
    """L(w) = ½ Σ a (w − t)²: its Newton step is the exact L step."""

    def __init__(self, a: Tensor, t: Tensor, start: Tensor) -> None:
        super().__init__()
        self.a, self.t = a, t
        self.w = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        return 0.5 * (self.a * (self.w - self.t).square()).sum()

    def minimise(self, lc: LC) -> None:
        self.w.grad = None
        (self() + lc.penalty()).backward()
        with torch.no_grad():
            self.w -= self.w.grad / (self.a + lc.mu)


# ------------------------------------------------------------------ the penalty


def test_penalty_is_its_formula_and_its_gradient_that_of_finite_differences() -> None:
    model = net()
    lc = controller(model, schedule=(0.5, 2.0))
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    for step in lc.steps(progress=False):
        if step.index == 1:  # the multipliers are not zero any more
            break
    with torch.no_grad():
        model[2].weight.add_(0.3)

    expected = 0.0
    for task in lc.tasks:
        (w,), (delta,), (multiplier,) = task.parameters, task.delta, task.multipliers
        assert multiplier.abs().sum() > 0 or task is lc.tasks[1]
        distance = w.detach() - delta
        expected += float(2.0 / 2 * distance.square().sum() - (multiplier * distance).sum())
    penalty = lc.penalty()
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-12)

    penalty.backward()
    for w in (model[0].weight, model[2].weight):
        grad = w.grad
        assert grad is not None
        for i in ((0, 0), (1, 2), (2, 4)):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    w[i] += step
                    values.append(float(lc.penalty().detach()))
                    w[i] -= step
            assert float(grad[i]) == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-7)
    assert model[0].bias.grad is None


@pytest.mark.parametrize("make", [sgd, adamw])
def test_hook_and_penalty_give_the_same_weights(make: Callable[..., Optimizer]) -> None:
    results = []
    for penalty in (True, False):
        model = net()
        optimizer = make(model.parameters())
        lc = controller(model, None if penalty else optimizer, implicit=False)
        train(lc, model, optimizer, penalty)
        results.append(parameters_of(model))
        assert any(bool(m.any()) for task in lc.tasks for m in task.multipliers)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_hook_and_penalty_agree_under_grad_scaler_and_accumulation(
    make: Callable[..., Optimizer],
) -> None:
    results = []
    for penalty in (True, False):
        model = net()
        optimizer = make(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        lc = controller(model, None if penalty else optimizer, implicit=False)
        for _ in lc.steps(progress=False):
            for i, batch in enumerate(batches(6), start=1):
                loss = loss_of(model, batch)
                loss = (loss + lc.penalty() if penalty else loss) / 2
                scaler.scale(loss).backward()
                if i % 2 == 0:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 1e6)  # does not bind
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
        results.append(parameters_of(model))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_hook_and_penalty_agree_where_the_loss_does_not_reach_a_weight() -> None:
    results = []
    for penalty in (True, False):
        model = net()
        optimizer = plain(model.parameters())
        lc = controller(model, None if penalty else optimizer, schedule=(1.0,), implicit=False)
        for _ in lc.steps(progress=False):
            loss = model[0](batches(1)[0][0]).square().mean()  # not through model[2]
            (loss + lc.penalty() if penalty else loss).backward()
            optimizer.step()
        results.append(parameters_of(model))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)
    assert not torch.equal(results[0][2], net()[2].weight)


@pytest.mark.parametrize("penalty", [True, False])
def test_where_clipping_binds_each_form_follows_its_formula(penalty: bool) -> None:
    model = net()
    optimizer = plain(model.parameters())
    lc = controller(model, None if penalty else optimizer, schedule=(0.7,), implicit=False)
    with torch.no_grad():
        model[0].weight.add_(0.5)  # away from Δ(θ)
    before, batch, limit = parameters_of(model), batches(1)[0], 0.01
    pulls = [torch.zeros_like(w) for w in before]
    for i, task in zip((0, 2), lc.tasks, strict=True):
        pulls[i] = 0.7 * (before[i] - task.delta[0]) - task.multipliers[0]
    losses = list(torch.autograd.grad(loss_of(model, batch), list(model.parameters())))

    loss = loss_of(model, batch)
    (loss + lc.penalty() if penalty else loss).backward()
    nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()

    inside = [g + q for g, q in zip(losses, pulls, strict=True)] if penalty else losses
    norm = torch.stack([g.norm() for g in inside]).norm()
    assert norm > limit
    clipped = [g * (limit / (norm + 1e-6)) for g in inside]
    steps = clipped if penalty else [g + q for g, q in zip(clipped, pulls, strict=True)]
    expected = [w - 0.1 * g for w, g in zip(before, steps, strict=True)]
    torch.testing.assert_close(parameters_of(model), expected, rtol=1e-9, atol=1e-12)


def test_a_c_step_in_the_body_is_seen_by_both_forms_and_replaces_the_last_one() -> None:
    results = []
    for penalty in (True, False):
        model = net()
        optimizer = plain(model.parameters())
        given = None if penalty else optimizer
        lc = controller(model, given, schedule=(1.0, 2.0), implicit=False)
        states = []
        for _ in lc.steps(progress=False):
            if states:
                assert lc.tasks[0].state is states[-1]
            for i, batch in enumerate(batches(4)):
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                (loss + lc.penalty() if penalty else loss).backward()
                optimizer.step()
                if i == 1:
                    lc.c_step()
                    states.append(lc.tasks[0].state)
        results.append(parameters_of(model))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", ["implicit", "weights", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_train_by_the_hooks(way: str, dtype: torch.dtype) -> None:
    model = net().to(dtype)
    optimizer = plain(model.parameters())
    gradient: Any = "sum" if way == "sum" else "weights"
    options: dict[str, Any] = {"gradient": gradient, "implicit": way == "implicit"}
    lc = controller(model, optimizer, schedule=(0.5, 2.0), **options)
    for step in lc.steps(progress=False):
        task = lc.tasks[0]
        w, delta, multiplier = task.current[0].float(), task.delta[0].float(), task.multipliers[0]
        assert bool(multiplier.any()) == (step.index == 1)
        x, y = batches(1)[0]
        optimizer.zero_grad()
        loss_of(model, (x.to(dtype), y.to(dtype))).backward()
        grad = model[0].weight.grad
        assert grad is not None
        expected = w - 0.1 * (grad.float() + step.mu * (w - delta) - multiplier)
        if way == "implicit":
            pull = 0.1 * (step.mu * delta + multiplier)
            expected = (w - 0.1 * grad.float() + pull) / (1 + 0.1 * step.mu)
        optimizer.step()
        assert task.current[0].dtype == dtype
        torch.testing.assert_close(task.current[0].float(), expected, rtol=0.02, atol=0.002)


# ------------------------------------------------------------------ the algorithm


def test_convex_constraint_set_is_solved_to_the_known_optimum() -> None:
    """KMeans(1) asks for equal weights, a subspace: the optimum is a weighted mean of targets."""
    a = torch.tensor([1.0, 3.0, 0.5, 2.0, 1.5, 1.0], dtype=torch.float64)
    t = torch.tensor([0.3, -1.0, 2.0, 0.7, 0.1, -0.4], dtype=torch.float64)
    model = Quadratic(a, t, torch.linspace(-1, 1, 6, dtype=torch.float64))
    lc = LC(model, {"w": KMeans(1)}, schedule=geometric(0.5, growth=1.02, steps=80))
    for _ in lc.steps(progress=False):
        model.minimise(lc)
    best = (a * t).sum() / a.sum()
    gaps = [entry["gap"] for entry in lc.history]
    assert gaps[-1] < 1e-8 < gaps[0]
    torch.testing.assert_close(model.w.detach(), best.expand(6), rtol=1e-7, atol=1e-7)
    # stationarity of the Lagrangian L(w) − λᵀ(w − Δ): λ is the gradient of the loss
    gradient = a * (best - t)
    torch.testing.assert_close(lc.tasks[0].multipliers[0], gradient, rtol=1e-6, atol=1e-7)
    lc.finalize()
    assert model.w.unique().numel() == 1


@pytest.mark.parametrize(
    "part", [LowRank(1), Sparse(nonzeros=4), Binary(), Binary() + Sparse(nonzeros=2)], ids=str
)
def test_an_isotropic_loss_is_solved_by_the_projection_of_its_minimum(
    part: Part[Any], generator: torch.Generator
) -> None:
    t = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    start = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    model = Quadratic(torch.full_like(t, 2.0), t, start)
    lc = LC(model, {"w": part}, schedule=geometric(1e-2, growth=1.1, steps=100))
    for _ in lc.steps(progress=False):
        model.minimise(lc)
    best = part.reconstruct(part.project(t))
    assert lc.gap()["w"] < 1e-4
    torch.testing.assert_close(lc.tasks[0].delta[0], best, rtol=1e-3, atol=3e-5)
    gradient = 2.0 * (best - t)
    torch.testing.assert_close(lc.tasks[0].multipliers[0], gradient, rtol=1e-3, atol=3e-5)


@pytest.mark.parametrize(
    "part",
    [Binary(), KMeans(2), LowRank(2), Sparse(density=0.2), SparsePenalty(0.05), PART],
    ids=str,
)
def test_the_run_starts_at_direct_compression(part: Part[Any]) -> None:
    model = net()
    before = parameters_of(model)
    lc = LC(model, {"0.weight": part}, schedule=(0.3, 0.6))
    expected = part.reconstruct(part.project(before[0], mu=0.3))
    assert torch.equal(lc.tasks[0].delta[0], expected)
    assert not lc.tasks[0].multipliers[0].any()
    assert all(map(torch.equal, parameters_of(model), before))


def test_multipliers_move_after_the_last_repeat_of_a_mu() -> None:
    model = net()
    lc = controller(model, schedule=(0.1, 0.1, 0.1, 0.2))
    task = lc.tasks[0]
    expected = torch.zeros_like(task.multipliers[0])
    for step in lc.steps(progress=False):
        assert torch.equal(task.multipliers[0], expected), step
        with torch.no_grad():
            model[0].weight.mul_(1.2)
        if step.index >= 2:
            lc.c_step()
            expected = expected - step.mu * (model[0].weight.detach() - task.delta[0])
    torch.testing.assert_close(task.multipliers[0], expected, rtol=1e-13, atol=1e-16)
    assert expected.any()


def test_the_c_step_projects_w_minus_the_multipliers_over_mu() -> None:
    model = net()
    lc = LC(model, {"0.weight": Binary()}, schedule=(0.5, 2.0))
    for _ in lc.steps(progress=False):
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        multiplier = lc.tasks[0].multipliers[0].clone()
        lc.c_step()
    target = model[0].weight.detach() - multiplier / 2.0
    assert multiplier.any()
    expected = Binary().reconstruct(Binary().project(target))
    assert torch.equal(lc.tasks[0].delta[0], expected)


def test_the_quadratic_penalty_keeps_multipliers_at_zero() -> None:
    model = Quadratic(*torch.ones(2, 4, dtype=torch.float64), torch.arange(4.0).double())
    lc = LC(model, {"w": KMeans(1)}, schedule=geometric(1, growth=2, steps=20), multipliers=False)
    for _ in lc.steps(progress=False):
        model.minimise(lc)
    assert not lc.tasks[0].multipliers[0].any()
    assert lc.gap()["w"] < 1e-4


def test_a_joint_task_pulls_every_one_of_its_tensors() -> None:
    results = []
    for penalty in (True, False):
        model = net()
        optimizer = sgd(model.parameters())
        tasks = {Joint("*.weight"): KMeans(2)}
        given = None if penalty else optimizer
        schedule = constant(2.0, steps=3)
        lc = LC(model, tasks, schedule=schedule, optimizer=given, implicit=False)
        train(lc, model, optimizer, penalty)
        results.append(parameters_of(model))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    lc.finalize()
    values = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()])
    assert values.unique().numel() == 2


# ------------------------------------------------------------------ the learning-rate guard


@pytest.mark.parametrize("tensor", [False, True])
def test_the_guard_steps_with_the_smaller_of_lr_and_one_over_mu(
    tensor: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = net()
    rate: Any = torch.tensor(0.5) if tensor else 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, foreach=False if tensor else None)
    lc = controller(model, optimizer, schedule=(1.0, 4.0), lr_guard=True)
    for step in lc.steps():
        before, delta = model[0].weight.detach().clone(), lc.tasks[0].delta[0]
        multiplier = lc.tasks[0].multipliers[0].clone()
        batch = batches(1)[0]
        grad = torch.autograd.grad(loss_of(model, batch), model[0].weight)[0]
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        pull = step.mu * (before - delta) - multiplier
        expected = before - (0.5, 0.25)[step.index] * (grad + pull)
        torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-10, atol=1e-12)
        assert float(optimizer.param_groups[0]["lr"]) == 0.5
        assert (optimizer.param_groups[0]["lr"] is rate) == tensor or not tensor
        assert lc.guarded == step.index
    assert "lr≤1/μ=1 steps" in capsys.readouterr().err
    lc.finalize()
    assert lc.guarded == 1


def test_without_the_guard_the_rate_is_the_users() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    lc = controller(model, optimizer, schedule=(4.0,))
    train(lc, model, optimizer, penalty=False)
    assert lc.guarded == 0


# ------------------------------------------------------------------ the implicit step


@pytest.mark.parametrize("tensor", [False, True])
def test_the_implicit_step_follows_the_optimizers_own(tensor: bool) -> None:
    model = net()
    rates: list[Any] = [torch.tensor(0.05), torch.tensor(0.2)] if tensor else [0.05, 0.2]
    groups = [
        {"params": layer.parameters(), "lr": x} for layer, x in zip(model[::2], rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, foreach=False)
    lc = controller(model, optimizer, schedule=(0.5, 1e9, 1e9), implicit=True)
    for step in lc.steps(progress=False):
        layers, batch = (model[0], model[2]), batches(1)[0]
        befores = [layer.weight.detach().clone() for layer in layers]
        biases = [layer.bias.detach().clone() for layer in layers]
        grads = torch.autograd.grad(loss_of(model, batch), list(model.parameters()))
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        for i, layer in enumerate(layers):
            rate, task = float(rates[i]), lc.tasks[i]
            moved = befores[i] - rate * grads[2 * i]
            pull = step.mu * task.delta[0] + task.multipliers[0]
            expected = (moved + rate * pull) / (1 + rate * step.mu)
            torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(layer.bias.detach(), biases[i] - rate * grads[2 * i + 1])
    assert all(task.multipliers[0].any() for task in lc.tasks)
    lc.finalize()


def test_the_implicit_step_leaves_frozen_weights_and_ends_with_the_run() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].weight.requires_grad_(False)
    lc = LC(model, {"2.weight": PART}, schedule=(5.0,), optimizer=optimizer, implicit=True)
    frozen = model[0].weight.clone()
    train(lc, model, optimizer, penalty=False)
    assert torch.equal(model[0].weight, frozen)
    lc.finalize()
    delta = model[2].weight.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(model[2].weight, delta)


# ------------------------------------------------------------------ the hand-over


@pytest.mark.parametrize("gradient", ["weights", "sum"])
def test_a_released_model_holds_w_and_another_run_goes_on_from_it(gradient: Any) -> None:
    model = net()
    optimizer = sgd(model.parameters())
    lc = controller(model, optimizer, gradient=gradient)
    train(lc, model, optimizer, penalty=False)
    w, gap = [x.clone() for task in lc.tasks for x in task.current], lc.gap()
    lc.release()
    assert lc.finished
    assert all(torch.equal(x, model[i].weight) for x, i in zip(w, (0, 2), strict=True))
    with pytest.raises(RuntimeError, match=r"release\(\): the run is over and the model holds w"):
        lc.finalize()
    with pytest.raises(RuntimeError, match=r"refine\(\) after release"), lc.refine(adamw):
        pass
    other = controller(model, optimizer, gradient="weights" if gradient == "sum" else "sum")
    assert other.gap().keys() == gap.keys()
    train(other, model, optimizer, penalty=False)
    other.finalize()


# ------------------------------------------------------------------ the loop


def test_the_bar_shows_mu_gap_and_what_was_logged(capsys: pytest.CaptureFixture[str]) -> None:
    lc = controller(net())
    for _ in lc.steps():
        lc.log(loss=0.125)
    shown = capsys.readouterr()
    assert "μ=0.1" in shown.err and "gap=" in shown.err and "loss=0.125" in shown.err
    assert shown.out == ""


def test_the_bar_can_be_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    lc = controller(net())
    for _ in lc.steps(progress=False):
        lc.log(loss=1.0)
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


def test_history_has_what_was_logged_in_its_own_step() -> None:
    lc = controller(net())
    for step in lc.steps(progress=False):
        assert (step.count, step.mu) == (3, SCHEDULE[step.index])
        if step.index != 1:
            lc.log(loss=torch.tensor(0.5 + step.index, requires_grad=True))
    assert [entry["step"] for entry in lc.history] == [0, 1, 2]
    assert [entry["mu"] for entry in lc.history] == list(SCHEDULE)
    assert [entry.get("loss") for entry in lc.history] == [0.5, None, 2.5]
    w = torch.cat([task.current[0].flatten() for task in lc.tasks])
    delta = torch.cat([task.delta[0].flatten() for task in lc.tasks])
    expected = float((w - delta).norm() / w.norm())
    assert lc.history[-1]["gap"] == pytest.approx(expected, rel=1e-12)
    assert lc.gap().keys() == {"0.weight", "2.weight"}
    assert list(lc.steps(progress=False)) == []


def test_a_body_left_early_is_run_again() -> None:
    lc = controller(net())
    seen = []
    for step in lc.steps(progress=False):
        seen.append(step.index)
        if step.index == 1:
            break
    assert (lc.position, len(lc.history)) == (1, 1)
    seen += [step.index for step in lc.steps(progress=False)]
    assert seen == [0, 1, 1, 2]


def test_an_exception_in_the_body_leaves_its_step_undone() -> None:
    model = net()
    optimizer = plain(model.parameters())
    lc = controller(model, optimizer)
    states = [task.state for task in lc.tasks]
    with pytest.raises(KeyboardInterrupt):
        for _ in lc.steps(progress=False):
            lc.log(loss=1.0)
            raise KeyboardInterrupt
    assert lc.position == 0 and lc.history == []
    assert [task.state for task in lc.tasks] == states
    train(lc, model, optimizer, penalty=False)
    assert lc.position == 3 and "loss" not in lc.history[0]


# ------------------------------------------------------------------ the compressed model


def test_finalize_leaves_delta_bit_for_bit_and_no_hooks() -> None:
    model = net()
    optimizer = plain(model.parameters())
    lc = controller(model, optimizer)
    train(lc, model, optimizer, penalty=False)
    lc.finalize()
    for task, w in zip(lc.tasks, (model[0].weight, model[2].weight), strict=True):
        assert torch.equal(w, task.part.reconstruct(task.state))
    before = parameters_of(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(map(torch.equal, parameters_of(model), before))
    for use in (lc.penalty, lc.c_step, lc.finalize, lambda: list(lc.steps())):
        with pytest.raises(RuntimeError, match=r"after finalize\(\)"):
            use()


@pytest.mark.parametrize("fails", [False, True])
def test_compressed_restores_the_weights_exactly(fails: bool) -> None:
    model = net()
    lc = controller(model)
    before = parameters_of(model)
    try:
        with lc.compressed() as inside:
            assert inside is model
            assert torch.equal(model[0].weight, lc.tasks[0].delta[0])
            assert torch.equal(model[0].bias, before[1])
            if fails:
                raise KeyError("in the body")
    except KeyError:
        assert fails
    assert all(map(torch.equal, parameters_of(model), before))


def test_nothing_else_runs_inside_compressed() -> None:
    lc = controller(net())
    with lc.compressed():
        with pytest.raises(RuntimeError, match=r"c_step\(\) inside compressed\(\)"):
            lc.c_step()
        with pytest.raises(RuntimeError, match=r"finalize\(\) inside compressed\(\)"):
            lc.finalize()
        with pytest.raises(RuntimeError, match=r"compressed\(\) inside compressed\(\)"):
            lc.compressed().__enter__()
    lc.c_step()


def test_keep_best_brings_back_the_best_model() -> None:
    model = net()
    lc = controller(model, schedule=(0.1, 0.2, 0.3, 0.4))
    kept = []
    for _step, metric in zip(lc.steps(progress=False), (3.0, 1.0, 2.0, 1.0), strict=True):
        with torch.no_grad():
            model[0].weight.mul_(1.1)
            model[0].bias.add_(1.0)
        lc.c_step()
        with lc.compressed():
            kept.append(lc.keep_best(metric))
            if metric == 1.0 and kept[-1]:
                best = parameters_of(model)
    assert kept == [True, True, False, False]
    lc.finalize(best=True)
    assert all(map(torch.equal, parameters_of(model), best))


def test_keep_best_can_maximise_and_refuses_nan() -> None:
    lc = controller(net())
    assert [lc.keep_best(m, smaller_is_better=False) for m in (0.5, 0.4, 0.6)] == [1, 0, 1]
    with pytest.raises(ValueError, match="NaN"):
        lc.keep_best(math.nan)
    with pytest.raises(RuntimeError, match="never called"):
        controller(net()).finalize(best=True)


def test_print_shows_the_plan() -> None:
    text = str(controller(net()))
    assert "0.weight" in text and "Binary() + Sparse(nonzeros=3)" in text and "5×6" in text
    assert "step 0 of 3, μ 0.1 … 0.4" in text


# ------------------------------------------------------------------ misuse


def test_penalty_beside_the_hook_would_count_twice() -> None:
    model = net()
    lc = controller(model, plain(model.parameters()))
    with pytest.raises(RuntimeError, match="count twice"):
        lc.penalty()


def test_two_controllers_on_one_optimizer_would_count_twice() -> None:
    model = net()
    optimizer = plain(model.parameters())
    first = controller(model, optimizer)
    with pytest.raises(ValueError, match=r"\['0.weight', '2.weight'\].*count twice"):
        controller(model, optimizer)
    first.finalize()
    controller(model, optimizer)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_closure_is_refused_before_any_step(make: Callable[..., Optimizer]) -> None:
    model = net()
    optimizer = make(model.parameters(), lr=0.1)
    controller(model, optimizer)
    before = parameters_of(model)

    def closure() -> Tensor:
        raise AssertionError("not reached")

    for call in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        with pytest.raises(RuntimeError, match=r"step\(closure\)"):
            call()
    assert all(map(torch.equal, parameters_of(model), before))


def test_a_fused_optimizer_under_grad_scaler_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    controller(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = parameters_of(model)
    scaler.scale(loss_of(model, batches(1)[0])).backward()
    with pytest.raises(RuntimeError, match=r"SGD\(fused=True\) under GradScaler"):
        scaler.step(optimizer)
    assert all(map(torch.equal, parameters_of(model), before))


def test_a_fused_optimizer_without_a_scaler_is_fine() -> None:
    results = []
    for fused in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        train(controller(model, optimizer), model, optimizer, penalty=False)
        results.append(parameters_of(model))
    torch.testing.assert_close(*results)


def test_an_optimizer_must_hold_what_is_compressed() -> None:
    model = net()
    before = parameters_of(model)
    with pytest.raises(ValueError, match=r"'2.weight' .* not in the optimizer"):
        controller(model, plain(model[0].parameters()))
    assert all(map(torch.equal, parameters_of(model), before))
    model[2].weight.requires_grad_(False)  # a frozen weight needs no optimizer
    controller(model, plain(model[0].parameters()))


def test_nan_in_a_gradient_names_the_tensor_and_takes_no_step() -> None:
    model = net()
    optimizer = plain(model.parameters())
    controller(model, optimizer)
    loss_of(model, batches(1)[0]).backward()
    model[2].weight.grad[1, 1] = math.nan
    before = parameters_of(model)
    with pytest.raises(RuntimeError, match=r"\['2.weight'\] contains NaN or inf; no step"):
        optimizer.step()
    assert all(map(torch.equal, parameters_of(model), before))


def test_a_sparse_gradient_is_refused_by_name() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = plain(model.parameters())
    LC(model, {"weight": Binary()}, schedule=(1.0,), optimizer=optimizer)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"\['weight'\] is sparse"):
        optimizer.step()


def test_weights_that_became_nan_are_named_and_theta_is_kept() -> None:
    model = net()
    lc = controller(model)
    states = [task.state for task in lc.tasks]
    with torch.no_grad():
        model[2].weight[0, 0] = math.inf
    with pytest.raises(RuntimeError, match=r"C step failed for '?2.weight'?, shape \(3, 5\)"):
        lc.c_step()
    assert [task.state for task in lc.tasks] == states


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((), "empty"),
        ((-0.1, 0.2), "got -0.1 at step 0"),
        ((0.1, math.nan), "got nan at step 1"),
        ((0.1, math.inf), "got inf at step 1"),
        ((0.1, 0.3, 0.2), "falls from 0.3 to 0.2 at step 2"),
        ((0.0, 0.1), "mu = 0"),
    ],
)
def test_schedules_that_are_refused(schedule: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        controller(net(), schedule=schedule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "both"}, "'weights' or 'sum', got 'both'"),
        ({"gradient": "sum"}, "needs optimizer="),
        ({"every": 2}, "every=2"),
        ({"every": 0}, "every=0"),
        ({"rule": lambda grad, w, state: grad}, "gradient='sum'"),
        ({"lr_guard": True}, "needs optimizer="),
        ({"implicit": True}, "needs optimizer="),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        controller(net(), **options)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="Optimizer, got list"):
        controller(net(), optimizer=[])  # type: ignore[arg-type]


def test_two_guards_on_one_optimizer_restore_its_rate() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for name, mu in (("0.weight", 2.0), ("2.weight", 4.0)):
        LC(model, {name: Binary()}, schedule=(mu,), optimizer=optimizer, lr_guard=True)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_maximizing_optimizer_is_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"SGD\(maximize=True\)"):
        controller(model, torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))


def test_parameters_replaced_in_the_model_are_an_error() -> None:
    model = net()
    lc = controller(model)
    model.load_state_dict({n: x.clone() for n, x in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match=r"\['0.weight', '2.weight'\] were replaced"):
        lc.finalize()
    with pytest.raises(RuntimeError, match="were replaced"), lc.compressed():
        pass
    with pytest.raises(RuntimeError, match="were replaced"):
        for _ in lc.steps(progress=False):
            pass


def test_a_body_left_early_leaves_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    lc = controller(net())
    for _ in lc.steps():
        break
    capsys.readouterr()
    lc.log(loss=1.0)
    assert capsys.readouterr().err == ""


def test_the_gap_inside_compressed_is_that_of_w_and_nothing_is_trained_there() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lc = LC(model, {"weight": Binary()}, schedule=(0.1, 0.2), optimizer=optimizer)
    gap, w = lc.gap(), model.weight.detach().clone()
    assert gap["weight"] > 0.1
    with lc.compressed(calibration=None):
        assert lc.gap() == gap
        model(torch.ones(1, 6)).sum().backward()
        with pytest.raises(RuntimeError, match="inside compressed"):
            optimizer.step()
    assert torch.equal(model.weight, w)
    optimizer.step()
    assert not torch.equal(model.weight, w)
