"""The report against counts made by hand."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lc_compress import LC, Binary, Joint, KMeans, LowRank, Sparse, each

TASKS = {"conv.weight": Binary(axis=0) + Sparse(nonzeros=2), "fc.weight": LowRank(2)}

# conv.weight, 3 × 2 × 2 × 2: 24 signs, 3 scales, two values, and positions 3 and 9 out of 24:
# gaps of 3 and 5 in 3 bits each, after a first byte. fc.weight: factors 4 × 2 and 2 × 12.
CONV_BITS = 24 + 3 * 32 + 2 * 32 + (8 + 2 * 3)
FC_BITS = 2 * (4 + 12) * 32
# biases 3 + 4, and weight, bias, mean and variance of three channels; the batch count is no float
REST = 3 + 4 + 4 * 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(12, 4)
        with torch.no_grad():
            self.conv.weight.view(-1)[[3, 9]] = torch.tensor([5.0, -6.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).flatten(1))


def controller(model: nn.Module, tasks: Any = TASKS, **options: Any) -> LC:
    return LC(model, tasks, schedule=(0.1, 0.2), **options)


def test_sizes() -> None:
    report = controller(Net()).report()
    conv, fc = report.rows
    assert (conv.name, conv.parts) == ("conv.weight", "Binary(axis=0) + Sparse(nonzeros=2)")
    assert (conv.weights, conv.bits) == (24, CONV_BITS)
    assert (fc.weights, fc.bits) == (48, FC_BITS)
    assert (report.uncompressed.weights, report.uncompressed.bits) == (REST, 32 * REST)
    bits = CONV_BITS + FC_BITS + 32 * REST
    assert (report.total.weights, report.total.bits) == (24 + 48 + REST, bits)
    assert conv.bits_per_weight == CONV_BITS / 24
    assert report.total.ratio32 == pytest.approx(32 * (24 + 48 + REST) / bits)
    assert report.total.ratio16 == pytest.approx(report.total.ratio32 / 2)
    assert fc.ratio32 == pytest.approx(48 / (2 * 16))


def test_other_dtypes_count_at_their_own_size() -> None:
    report = controller(Net().to(torch.bfloat16)).report()
    assert report.rows[0].bits == 24 + 3 * 16 + 2 * 16 + 14
    assert report.uncompressed.bits == 16 * REST


def test_operations_for_one_example() -> None:
    model = Net()
    conv, fc = controller(model, example_inputs=torch.zeros(5, 2, 3, 3)).report().rows
    # four output positions; per position a multiplication per output, and 24 − 3 additions of
    # inputs under the signs; two multiplications and additions for the floats
    assert (conv.mults, conv.adds) == (4 * (3 + 2), 4 * (21 + 2))
    assert conv.dense_mults == 4 * 24
    # V x: 2 × 12 mults, 2 × 11 adds; U (V x): 4 × 2 mults, 4 adds
    assert (fc.mults, fc.adds, fc.dense_mults) == (24 + 8, 22 + 4, 48)
    total = controller(model, example_inputs=(torch.zeros(1, 2, 3, 3),)).report().total
    assert (total.mults, total.adds) == (20 + 32, 92 + 26)
    assert total.dense_mults == 96 + 48


def test_operations_of_convolutions_need_an_example() -> None:
    report = controller(Net()).report()
    conv, fc = report.rows
    assert conv.mults is conv.adds is conv.dense_mults is None
    assert fc.mults == 32
    assert report.total.mults is None  # not a sum of what happens to be known


def test_measuring_positions_leaves_the_model_alone() -> None:
    model = Net()
    model.norm.eval()
    before = [x.clone() for x in model.state_dict().values()]
    modes = [module.training for module in model.modules()]
    controller(model, example_inputs=torch.ones(2, 2, 3, 3))
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


class Reused(nn.Module):
    """One layer applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        self.table = nn.Embedding(5, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.fc(self.fc(self.table(tokens))))


def test_a_layer_counts_once_per_use_and_position() -> None:
    tasks = {"fc.weight": Binary(), "table.weight": Binary()}
    tokens = torch.zeros(2, 6, dtype=torch.long)
    fc, table = controller(Reused(), tasks, example_inputs=tokens).report().rows
    assert fc.dense_mults == 3 * 6 * 16
    assert (fc.mults, fc.adds) == (18 * 4, 18 * 12)
    assert table.mults is None  # a look-up multiplies nothing


def test_a_joint_task_is_one_row() -> None:
    model = Net()
    joint = Joint("*.weight")
    report = controller(model, {joint: each(Binary()) + Sparse(nonzeros=2)}).report()
    (row,) = report.rows
    assert row.name == "Joint('*.weight')"
    assert row.parts == "each(Binary()) + Sparse(nonzeros=2)"
    assert row.weights == 72
    assert row.bits == 72 + 2 * 32 + 2 * 32 + (8 + 2 * 3)
    assert row.mults is None
    (row,) = controller(model, {joint: KMeans(4)}).report().rows
    assert row.bits == 72 * 2 + 4 * 32
    example = torch.zeros(1, 2, 3, 3)
    (row,) = controller(model, {joint: KMeans(4)}, example_inputs=example).report().rows
    assert row.dense_mults == 4 * 24 + 48


def test_gap_is_of_now_and_error_of_the_start() -> None:
    model = Net()
    start = model.fc.weight.detach().clone()
    lc = controller(model)
    row = lc.report().rows[1]
    assert row.gap == row.error == pytest.approx(lc.gap()["fc.weight"])
    with torch.no_grad():
        model.fc.weight.mul_(2.0)
    lc.c_step()
    row = lc.report().rows[1]
    delta = lc.tasks[1].delta[0].double()
    assert row.gap == pytest.approx(float((2 * start - delta).norm() / (2 * start).norm()))
    assert row.error == pytest.approx(float((start - delta).norm() / start.norm()))
    weights = torch.cat([task.current[0].flatten().double() for task in lc.tasks])
    deltas = torch.cat([task.delta[0].flatten().double() for task in lc.tasks])
    overall = float((weights - deltas).norm() / weights.norm())
    assert lc.report().total.gap == pytest.approx(overall)
    lc.finalize(calibration=None)
    assert [row.gap for row in lc.report().rows] == [0, 0]
    assert lc.report().rows[1].error == row.error


def test_json_and_csv_parse_back(tmp_path: Path) -> None:
    report = controller(Net()).report()
    text = report.json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == text
    rows = json.loads(text)
    assert [row["name"] for row in rows] == ["conv.weight", "fc.weight", "uncompressed", "total"]
    assert rows == report.dicts()
    assert rows[0]["bits"] == CONV_BITS and rows[0]["mults"] is None
    assert rows[-1]["ratio32"] == report.total.ratio32

    text = report.csv(tmp_path / "report.csv")
    assert (tmp_path / "report.csv").read_text(encoding="utf-8") == text
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["name"] for line in lines] == [row["name"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        for key, value in row.items():
            assert line[key] == ("" if value is None else str(value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.csv", "report.json"]


def test_it_prints_a_table() -> None:
    lines = str(controller(Net()).report()).splitlines()
    assert len(lines) == 5
    assert lines[0].split() == "parts weights bits bits/w ×f32 ×f16 mults adds gap error".split()
    assert lines[1].startswith("conv.weight") and f"{CONV_BITS / 24:.3f}" in lines[1]
    assert f"{FC_BITS:,}" in lines[2] and "–" not in lines[2]
    assert lines[4].startswith("total")


class Extra(nn.Module):
    """Keeps something in its state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}


def test_extra_state_of_modules_is_passed_over() -> None:
    lc = controller(Extra(), {"*.weight": Binary()})
    assert lc.report().uncompressed.weights == 2
    lc.keep_best(1.0)
    lc.finalize(best=True)


def test_a_transposed_convolution_meets_each_weight_once_per_input_position() -> None:
    model = nn.ConvTranspose2d(3, 5, 2, stride=2)
    lc = controller(model, {"weight": Binary()}, example_inputs=torch.zeros(2, 3, 4, 4))
    assert lc.report().rows[0].dense_mults == 16 * 3 * 5 * 4


def test_a_layer_that_is_not_called_has_no_count() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)  # uses out_proj's weight directly
    x = torch.zeros(1, 5, 8)
    lc = controller(model, {"out_proj.weight": Binary()}, example_inputs=(x, x, x))
    assert lc.report().rows[0].mults is None
