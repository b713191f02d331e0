"""gradient="sum": the loss gradient is taken at Δ(θ) and applied to w, which LC keeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lc_compress import LC, Binary, Joint, KMeans, LowRank, Sparse, constant, each
from lc_compress.binary import BinaryState

PART = Binary() + Sparse(nonzeros=3)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(seed: int = 1, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(size, 6, **draw), torch.randn(size, 3, **draw)


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(data[0]), data[1])


def controller(model: nn.Module, optimizer: Optimizer, **options: Any) -> LC:
    options.setdefault("schedule", (0.5, 2.0))
    return LC(model, {"*.weight": PART}, optimizer=optimizer, gradient="sum", **options)


def sgd(model: nn.Module, **options: Any) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def iterate(model: nn.Module, optimizer: Optimizer, data: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    loss_of(model, data).backward()
    optimizer.step()


def holds_delta(lc: LC) -> bool:
    return all(
        torch.equal(p, delta)
        for task in lc.tasks
        for p, delta in zip(task.parameters, task.delta, strict=True)
    )


def weights_of(lc: LC) -> list[Tensor]:
    return [w.clone() for task in lc.tasks for w in task.current]


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# ------------------------------------------------------------------ one step


def test_construction_shows_delta_and_keeps_w() -> None:
    model = net()
    before = parameters_of(model)
    lc = controller(model, sgd(model))
    assert holds_delta(lc)
    assert all(map(torch.equal, weights_of(lc), (before[0], before[2])))
    assert torch.equal(model[0].weight, PART.reconstruct(PART.project(before[0], mu=0.5)))
    assert not torch.equal(model[0].weight, before[0])
    assert lc.gap()["0.weight"] > 0


@pytest.mark.parametrize("mus", [(0.5, 2.0), (0.0, 0.0)])
def test_a_step_is_the_formula(mus: tuple[float, float]) -> None:
    """w ← w − lr (∇L(Δ) + μ (w − Δ) − λ), then θ ← Π(w − λ/μ)."""
    model = net()
    optimizer = sgd(model)
    lc = controller(model, optimizer, schedule=mus)
    for step in lc.steps(progress=False):
        task = lc.tasks[0]
        assert bool(task.multipliers[0].any()) == (step.index == 1 and step.mu > 0)
        w, delta, multiplier = task.current[0].clone(), task.delta[0], task.multipliers[0]
        bias, state = model[0].bias.detach().clone(), task.state
        at_delta = torch.autograd.grad(loss_of(model, batch()), [model[0].weight, model[0].bias])
        iterate(model, optimizer, batch())
        expected = w - 0.1 * (at_delta[0] + step.mu * (w - delta) - multiplier)
        torch.testing.assert_close(task.current[0], expected, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(model[0].bias.detach(), bias - 0.1 * at_delta[1])
        target = task.current[0] - (multiplier / step.mu if step.mu else 0)
        solved = PART.project(target, state, mu=step.mu or None)
        assert torch.equal(task.delta[0], PART.reconstruct(solved))
        assert holds_delta(lc)


def test_momentum_and_decay_act_on_w() -> None:
    model = net()
    optimizer = sgd(model, momentum=0.9, weight_decay=0.01)
    lc = LC(
        model,
        {"0.weight": Binary()},
        schedule=constant(0.0, steps=1),
        optimizer=optimizer,
        gradient="sum",
    )
    own = net()
    w, velocity = own[0].weight.detach().clone(), torch.zeros(5, 6, dtype=torch.float64)
    rest = [p for p in own.parameters() if p is not own[0].weight]
    other = torch.optim.SGD(rest, lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in lc.steps(progress=False):
        for seed in range(5):
            iterate(model, optimizer, batch(seed))
            with torch.no_grad():
                own[0].weight.copy_(w.sign() * w.abs().mean())
            own.zero_grad()
            loss_of(own, batch(seed)).backward()
            assert own[0].weight.grad is not None
            velocity = 0.9 * velocity + own[0].weight.grad + 0.01 * w
            w = w - 0.1 * velocity
            other.step()
    torch.testing.assert_close(lc.tasks[0].current[0], w, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model[2].weight, own[2].weight, rtol=1e-10, atol=1e-12)


def test_inside_the_step_the_parameters_hold_w() -> None:
    model = net()
    optimizer = sgd(model)
    lc = controller(model, optimizer)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(model[0].weight.detach().clone()))
    w = lc.tasks[0].current[0].clone()
    iterate(model, optimizer, batch())
    assert torch.equal(seen[0], w)
    assert holds_delta(lc)


def test_a_c_step_follows_every_n_steps_and_ends_the_body() -> None:
    model = net()
    optimizer = sgd(model)
    lc = controller(model, optimizer, every=3)
    for _ in lc.steps(progress=False):
        changed = []
        for seed in range(5):
            state = lc.tasks[0].state
            iterate(model, optimizer, batch(seed))
            changed.append(lc.tasks[0].state is not state)
            assert holds_delta(lc)
        last = lc.tasks[0].state
    # 10 optimizer steps in all: the count runs on over the LC steps
    assert changed == [True, False, False, True, False]
    assert lc.tasks[0].state is not last
    assert lc.position == 2


def test_the_rule_changes_the_loss_gradient_only() -> None:
    model = net()
    optimizer = sgd(model)

    def rule(grad: Tensor, w: Tensor, state: BinaryState) -> Tensor:
        assert isinstance(state, BinaryState)
        return grad * (w.abs() <= 0.2)

    lc = LC(
        model,
        {"0.weight": Binary()},
        schedule=(0.5,),
        optimizer=optimizer,
        gradient="sum",
        rule=rule,
    )
    w, delta = lc.tasks[0].current[0].clone(), lc.tasks[0].delta[0]
    grad = torch.autograd.grad(loss_of(model, batch()), model[0].weight)[0]
    iterate(model, optimizer, batch())
    masked = torch.where(w.abs() <= 0.2, grad, 0)
    assert not torch.equal(masked, grad)
    expected = w - 0.1 * (masked + 0.5 * (w - delta))
    torch.testing.assert_close(lc.tasks[0].current[0], expected, rtol=1e-13, atol=1e-14)


def test_a_weight_that_the_loss_does_not_reach_is_still_pulled() -> None:
    model = net()
    optimizer = sgd(model)
    lc = controller(model, optimizer)
    w, delta = lc.tasks[1].current[0].clone(), lc.tasks[1].delta[0]
    model[0](batch()[0]).square().mean().backward()
    optimizer.step()
    expected = w - 0.1 * 0.5 * (w - delta)
    torch.testing.assert_close(lc.tasks[1].current[0], expected, rtol=1e-13, atol=1e-14)


def test_the_guard_limits_the_rate() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    lc = controller(model, optimizer, schedule=(4.0,), lr_guard=True)
    w, delta = lc.tasks[0].current[0].clone(), lc.tasks[0].delta[0]
    grad = torch.autograd.grad(loss_of(model, batch()), model[0].weight)[0]
    iterate(model, optimizer, batch())
    expected = w - 0.25 * (grad + 4.0 * (w - delta))
    torch.testing.assert_close(lc.tasks[0].current[0], expected, rtol=1e-13, atol=1e-14)
    assert lc.guarded == 1 and optimizer.param_groups[0]["lr"] == 1.0


# ------------------------------------------------------------------ other people's training loops


def test_a_skipped_amp_step_changes_nothing() -> None:
    model = net()
    optimizer = sgd(model, momentum=0.9)
    lc = controller(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    before, shown, state = weights_of(lc), parameters_of(model), lc.tasks[0].state
    scaler.scale(loss_of(model, batch())).backward()
    assert model[0].weight.grad is not None
    model[0].weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8.0  # it was skipped
    assert all(map(torch.equal, weights_of(lc), before))
    assert all(map(torch.equal, parameters_of(model), shown))
    assert lc.tasks[0].state is state and holds_delta(lc)
    # and the next one is as if it had not been there
    optimizer.zero_grad()
    scaler.scale(loss_of(model, batch())).backward()
    scaler.step(optimizer)
    other = net()
    other_optimizer = sgd(other, momentum=0.9)
    other_lc = controller(other, other_optimizer)
    iterate(other, other_optimizer, batch())
    torch.testing.assert_close(weights_of(lc), weights_of(other_lc), rtol=1e-13, atol=1e-14)


def test_accumulated_gradients_are_one_step() -> None:
    whole, results = batch(size=8), []
    for parts in (1, 4):
        model = net()
        optimizer = sgd(model, momentum=0.9)
        lc = controller(model, optimizer)
        for _ in lc.steps(progress=False):
            for _ in range(2):
                optimizer.zero_grad()
                for x, y in zip(whole[0].chunk(parts), whole[1].chunk(parts), strict=True):
                    (loss_of(model, (x, y)) / parts).backward()
                optimizer.step()
        results.append([*weights_of(lc), *parameters_of(model)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_a_compiled_model_trains_the_same() -> None:
    results = []
    for compiled in (False, True):
        model = net()
        used = torch.compile(model, backend="eager") if compiled else model
        optimizer = sgd(used)
        lc = controller(used, optimizer)
        assert [task.name for task in lc.tasks] == ["0.weight", "2.weight"]
        for _ in lc.steps(progress=False):
            for seed in range(2):
                iterate(used, optimizer, batch(seed))
        results.append([*weights_of(lc), *parameters_of(model)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def trained(model: nn.Module, gradient: Any, data: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    optimizer = sgd(model, momentum=0.9)
    lc = LC(
        model,
        {"0.weight": PART, "2.weight": LowRank(1)},
        schedule=(0.2, 0.8),
        optimizer=optimizer,
        gradient=gradient,
    )
    for _ in lc.steps(progress=False):
        for one in data:
            iterate(model, optimizer, one)
    arrays = [x for task in lc.tasks for x in task.state_dict()["arrays"].values()]
    return {"w": weights_of(lc), "theta": arrays, "model": parameters_of(model)}


def one_of_two(rank: int, folder: str) -> None:
    """A process of the test below: its half of each batch, both gradient points."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    data = [tuple(x[rank::2] for x in batch(seed)) for seed in range(3)]
    results = {
        gradient: trained(nn.parallel.DistributedDataParallel(net()), gradient, data)
        for gradient in ("weights", "sum")
    }
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_end_with_the_same_weights_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for gradient in ("weights", "sum"):
        for key, mine in first[gradient].items():
            assert all(map(torch.equal, mine, second[gradient][key])), (gradient, key)
        alone = trained(net(), gradient, [batch(seed) for seed in range(3)])
        for key, mine in first[gradient].items():
            torch.testing.assert_close(mine, alone[key], rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------ the rest of the controller


def test_joint_tasks_share_what_they_share() -> None:
    model = net()
    optimizer = sgd(model)
    lc = LC(
        model,
        {Joint("*.weight"): each(Binary()) + Sparse(nonzeros=2)},
        schedule=(0.5, 1.0),
        optimizer=optimizer,
        gradient="sum",
    )
    for _ in lc.steps(progress=False):
        iterate(model, optimizer, batch())
        assert holds_delta(lc)
    lc.finalize()
    values = [torch.unique(w.detach().abs()).numel() for w in (model[0].weight, model[2].weight)]
    assert sum(values) <= 2 + 2


def test_finalize_keeps_delta_and_forgets_w() -> None:
    model = net()
    optimizer = sgd(model)
    lc = controller(model, optimizer)
    for _ in lc.steps(progress=False):
        iterate(model, optimizer, batch())
    with lc.compressed():
        assert holds_delta(lc)
    assert holds_delta(lc) and lc.gap()["0.weight"] > 0
    lc.finalize()
    for task in lc.tasks:
        assert torch.equal(task.parameters[0], task.part.reconstruct(task.state))
    assert lc.gap()["0.weight"] == 0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert holds_delta(lc)


def test_penalty_and_closures_are_refused() -> None:
    model = net()
    lc = controller(model, optimizer := torch.optim.LBFGS(model.parameters()))
    with pytest.raises(RuntimeError, match="count twice"):
        lc.penalty()
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        optimizer.step(lambda: 0.0)
    assert holds_delta(lc)


def test_a_rule_that_raises_leaves_everything_in_place() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def rule(grad: Tensor, w: Tensor, state: Any) -> Tensor:
        raise KeyError("the user's")

    lc = controller(model, optimizer, schedule=(4.0,), rule=rule, lr_guard=True)
    before = weights_of(lc)
    with pytest.raises(KeyError):
        iterate(model, optimizer, batch())
    assert holds_delta(lc) and all(map(torch.equal, weights_of(lc), before))
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_c_step_that_fails_names_its_tensor_and_leaves_delta() -> None:
    model = net()
    optimizer = sgd(model)
    lc = controller(model, optimizer)
    shown, states = parameters_of(model), [task.state for task in lc.tasks]
    lc.tasks[1].current[0][0, 0] = math.inf
    with pytest.raises(RuntimeError, match=r"C step failed for '?2.weight'?"):
        iterate(model, optimizer, batch())
    assert holds_delta(lc)
    assert [task.state for task in lc.tasks] == states
    assert torch.equal(model[0].weight, shown[0]) and torch.equal(model[2].weight, shown[2])


def test_a_construction_that_fails_leaves_the_model_and_the_optimizer_alone() -> None:
    model = net()
    before = parameters_of(model)
    for tasks in ({"*.weight": Binary(), "0.bias": LowRank(1)}, {"*.weight": KMeans(2), "x": PART}):
        optimizer = sgd(model)
        with pytest.raises((ValueError, RuntimeError)):
            LC(model, tasks, schedule=(1.0,), optimizer=optimizer, gradient="sum")
        assert all(map(torch.equal, parameters_of(model), before))
        assert not optimizer._optimizer_step_pre_hooks
