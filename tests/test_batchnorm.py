"""BatchNorm statistics belong to the weights they were collected with: re-estimated on request."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lc_compress import LC, Binary, recalibrate
from lc_compress.batchnorm import batchnorms


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(3, 2, 1)
    )
    for x in batches(4, seed=7):  # statistics that belong to these weights
        model(3 * x)
    return model


def batches(count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 2, 3, 3, generator=generator) for _ in range(count)]


def statistics(model: nn.Module) -> list[Tensor]:
    return [x.clone() for norm in batchnorms(model).values() for x in norm.buffers()]


def values(model: nn.Module) -> list[Tensor]:
    return [x.clone() for x in model.state_dict().values()]


def by_hand(conv: nn.Module, data: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Means over the batches of their means and unbiased variances."""
    with torch.no_grad():
        channels = [conv(x).transpose(0, 1).flatten(1) for x in data]
    means = torch.stack([x.mean(1) for x in channels])
    variances = torch.stack([x.var(1, unbiased=True) for x in channels])
    return means.mean(0), variances.mean(0)


def controller(model: nn.Module) -> LC:
    return LC(model, {"*.weight": Binary()}, schedule=(0.1, 0.2))


def test_statistics_are_the_mean_over_the_batches() -> None:
    model = net()
    rest = [*model[0].parameters(), *model[1].parameters()]
    before = [p.detach().clone() for p in rest]
    recalibrate(model, batches())
    mean, variance = by_hand(model[0], batches())
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert int(model[1].num_batches_tracked) == 3
    assert all(map(torch.equal, rest, before))
    again = statistics(model)
    recalibrate(model, batches())
    assert all(map(torch.equal, statistics(model), again))  # no trace of what was there


class Tagged(nn.Module):
    """Takes its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, pixels: Tensor, scale: float = 1.0) -> Tensor:
        return self.body(pixels * scale)


def test_every_form_of_batch_is_understood() -> None:
    expected = None
    forms: list[Any] = [
        batches(),
        [(x, torch.zeros(4)) for x in batches()],
        [[x] for x in batches()],
        iter(batches()),
        lambda model: [model(x) for x in batches()],
    ]
    for form in forms:
        model = net()
        recalibrate(model, form)
        expected = expected or statistics(model)
        torch.testing.assert_close(statistics(model), expected)
    named = Tagged()
    recalibrate(named, [{"pixels": x / 2, "scale": 2.0} for x in batches()])
    torch.testing.assert_close(statistics(named), expected)


def test_modes_and_momentum_are_as_before() -> None:
    model = net()
    model.train()
    model[1].eval()  # a frozen layer keeps its mode
    model[1].momentum = 0.3
    modes = [module.training for module in model.modules()]
    seen = []

    def calibration(inner: nn.Module) -> None:
        seen.extend(module.training for module in inner.modules())
        inner(batches()[0])

    recalibrate(model, calibration)
    assert seen == [False, False, True, False, False, False]  # BatchNorm alone is in training mode
    assert [module.training for module in model.modules()] == modes
    assert model[1].momentum == 0.3
    assert not model[1].running_mean.requires_grad


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "no batch"),
        (lambda model: None, "no batch"),
        ([batches()[0], torch.full((4, 2, 3, 3), math.nan)], "batch 2, .* contains NaN or inf"),
        ([(torch.full((4, 2, 3, 3), math.inf), 0)], "batch 1, .* contains NaN or inf"),
        (lambda model: model(torch.full((4, 2, 3, 3), math.nan)), "statistics of '1'"),
        ([1e38 * batches()[0]], "statistics of '1'"),
    ],
)
def test_bad_calibration_leaves_the_old_statistics(calibration: Any, message: str) -> None:
    model = net()
    before, modes = values(model), [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        recalibrate(model, calibration)
    assert all(map(torch.equal, values(model), before))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (batches()[0], r"iterable of batches.*got Tensor of shape \(.*\[batch\]"),
        (5, "iterable of batches, such as a DataLoader.*got int"),
        ({"x": batches()[0]}, "iterable of batches.*got dict"),
        ([5], "batch 1 is int: a batch is a tensor, a mapping"),
        ([batches()[0], ()], "batch 2 is tuple"),
        ([batches()[0].numpy()], "batch 1 is ndarray"),
        (["abc"], "batch 1 is str"),
        ([(batches()[0].numpy(), 0)], "batch 1 holds a NumPy array .*torch.from_numpy"),
    ],
)
def test_what_is_no_calibration(calibration: Any, message: str) -> None:
    model = net()
    before = values(model)
    with pytest.raises(TypeError, match=message):
        recalibrate(model, calibration)
    assert all(map(torch.equal, values(model), before))


def test_a_layer_that_no_batch_reaches_keeps_its_statistics() -> None:
    model = net()
    model.register_module("branch", nn.BatchNorm1d(2))
    model.branch.running_mean.fill_(5.0)

    def calibration(inner: nn.Module) -> None:
        for x in batches():
            inner[:5](x)

    before = model[1].running_mean.clone()
    recalibrate(model, calibration)
    assert model.branch.running_mean.tolist() == [5.0, 5.0]
    assert not torch.equal(model[1].running_mean, before)


# ------------------------------------------------------------------ in the controller


@pytest.mark.parametrize("fails", [False, True])
def test_compressed_fits_the_statistics_to_delta_and_restores_all(fails: bool) -> None:
    model = net()
    lc = controller(model)
    before = values(model)
    try:
        with lc.compressed(calibration=batches()):
            mean, variance = by_hand(model[0], batches())
            torch.testing.assert_close(model[1].running_mean, mean)
            torch.testing.assert_close(model[1].running_var, variance)
            model.train()
            model(batches()[0])  # moves the statistics once more
            if fails:
                raise KeyError("in the body")
    except KeyError:
        assert fails
    assert all(map(torch.equal, values(model), before))


def test_a_calibration_that_fails_restores_all() -> None:
    model = net()
    lc = controller(model)
    before = values(model)
    with pytest.raises(ValueError, match="NaN"):
        with lc.compressed(calibration=[torch.full((4, 2, 3, 3), math.nan)]):
            raise AssertionError("not reached")
    assert all(map(torch.equal, values(model), before))
    with lc.compressed(calibration=batches()):
        pass


def test_calibration_is_hard_to_forget() -> None:
    lc = controller(net())
    with pytest.raises(TypeError, match=r"compressed\(\) needs calibration=.* 1 BatchNorm"):
        with lc.compressed():
            pass
    with pytest.raises(TypeError, match=r"finalize\(\) needs calibration="):
        lc.finalize()
    lc.finalize(calibration=batches())


def test_a_model_without_running_statistics_needs_no_calibration() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    lc = controller(model)
    with lc.compressed(), torch.no_grad():
        model(batches()[0])
    with lc.compressed(calibration=batches()):  # given all the same: nothing to do
        pass
    lc.finalize()


def test_none_keeps_the_statistics() -> None:
    model = net()
    lc = controller(model)
    before = statistics(model)
    with lc.compressed(calibration=None):
        assert all(map(torch.equal, statistics(model), before))
    lc.finalize(calibration=None)
    assert all(map(torch.equal, statistics(model), before))


def test_finalize_fits_the_statistics_to_delta() -> None:
    model = net()
    lc = controller(model)
    lc.finalize(calibration=batches())
    assert torch.equal(model[0].weight, lc.tasks[0].delta[0])
    mean, variance = by_hand(model[0], batches())
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)


@pytest.mark.parametrize("gradient", ["weights", "sum"])
def test_a_finalize_that_fails_can_be_repeated_or_the_run_go_on(gradient: Any) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lc = LC(model, {"*": Binary()}, schedule=(1.0, 2.0), optimizer=optimizer, gradient=gradient)
    lc.keep_best(1.0)
    with torch.no_grad():
        model[0].bias.add_(1.0)
    before, states = values(model), [task.state for task in lc.tasks]
    with pytest.raises(ValueError, match="NaN"):
        lc.finalize(calibration=[torch.full((4, 2, 3, 3), math.nan)], best=True)
    assert all(map(torch.equal, values(model), before))
    assert [task.state for task in lc.tasks] == states
    for _ in lc.steps(progress=False):
        model(batches()[0]).square().mean().backward()
        optimizer.step()
    lc.finalize(calibration=batches(), best=True)
    assert torch.equal(model[0].weight, lc.tasks[0].delta[0])


def test_keep_best_keeps_the_statistics_it_was_measured_with() -> None:
    model = net()
    lc = controller(model)
    with lc.compressed(calibration=batches()):
        lc.keep_best(1.0)
        best = values(model)
    for _ in lc.steps(progress=False):
        with torch.no_grad():
            model[0].weight.mul_(2)
    lc.finalize(calibration=None, best=True)
    assert all(map(torch.equal, values(model), best))
