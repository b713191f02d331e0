"""Which tensors become which tasks; what is ambiguous or no weight is refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lc_compress import (
    LC,
    Binary,
    Joint,
    KernelMatrix,
    KMeans,
    LowRank,
    Matrix,
    Sparse,
    Ternary,
    Vector,
    each,
)
from lc_compress.selection import Selected, has_low_rank, select, unwrap


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(16, 6)
        self.fc2 = nn.Linear(6, 5)


NAMES = ["conv.weight", "fc1.weight", "fc2.weight"]
A, B, C = Binary(), Ternary(), KMeans(2)


def chosen(model: nn.Module, tasks: Any) -> dict[str, Any]:
    """The part of each tensor."""
    return {name: task.part for task in select(model, tasks) for name in task.tensors}


def build(model: nn.Module, tasks: Any) -> LC:
    return LC(model, tasks, schedule=(0.1, 0.2))


def values(model: nn.Module) -> list[Tensor]:
    return [x.clone() for x in model.state_dict().values()]


# ------------------------------------------------------------------ patterns


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.weight", NAMES),  # not norm.weight: one axis
        ("*", NAMES),
        ("fc?.weight", NAMES[1:]),
        ("fc[1].*", NAMES[1:2]),
        (r"re:fc\d\.weight", NAMES[1:]),
        ("re:.*", NAMES),
        ("conv.weight", NAMES[:1]),
        ("norm.weight", ["norm.weight"]),  # by its exact name it is meant
        ("fc1.bias", ["fc1.bias"]),
        (lambda name, p: p.dim() == 4, NAMES[:1]),
        (lambda name, p: name.startswith("fc"), NAMES[1:]),
    ],
)
def test_patterns(pattern: Any, names: list[str]) -> None:
    assert list(chosen(Net(), {pattern: A})) == names


def test_a_glob_is_no_expression_and_an_expression_matches_the_whole_name() -> None:
    model = nn.Module()
    model.register_module("a_b", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="No parameter named"):
        select(model, {"a.b.weight": A})
    with pytest.raises(ValueError, match="No parameter named"):
        select(model, {"re:a_b": A})


def test_exact_names_win_over_globs_and_those_over_functions() -> None:
    tasks = {lambda name, p: True: A, "fc*": B, "fc2.weight": C}
    expected = {"conv.weight": A, "fc1.weight": B, "fc2.weight": C}
    assert chosen(Net(), tasks) == expected
    assert chosen(Net(), dict(reversed(tasks.items()))) == expected  # whatever the order


@pytest.mark.parametrize(
    "tasks",
    [
        {"fc*": A, "*.weight": B},
        {"*.weight": A, r"re:fc\d\.weight": B},
        {lambda name, p: True: A, lambda name, p: "fc" in name: B},
        {"fc1.weight": A, Joint(("fc1.weight", "fc2.weight")): B},
    ],
)
def test_a_tie_is_an_error(tasks: Any) -> None:
    with pytest.raises(ValueError, match=r"Two equally specific patterns match 'fc1.weight'"):
        select(Net(), tasks)


def test_a_tie_that_an_exact_name_settles_is_none_in_any_order() -> None:
    tasks = {"fc1*": A, "*1.weight": B, "fc1.weight": C, "fc2.weight": A, "conv.weight": B}
    for order in (tasks, dict(reversed(tasks.items()))):
        with pytest.raises(ValueError, match="belongs to a more specific pattern"):
            select(Net(), order)
    tasks = {"fc*": A, "*1.weight": B, "fc1.weight": C}
    for order in (tasks, dict(reversed(tasks.items()))):
        with pytest.raises(ValueError, match=r"Every tensor that '\*1.weight' matches"):
            select(Net(), order)
    tasks = {"fc*": A, "*.weight": B, "fc1.weight": C, "fc2.weight": C}
    for order in (tasks, dict(reversed(tasks.items()))):
        with pytest.raises(ValueError, match=r"Every tensor that 'fc\*' matches"):
            select(Net(), order)
    tasks = {"fc[12].weight": A, "*.weight": B, "fc1.weight": C}
    with pytest.raises(ValueError, match=r"match 'fc2.weight'"):
        select(Net(), tasks)


@pytest.mark.parametrize("pattern", ["fc9.weight", "conv*.wieght", "re:fc", lambda name, p: False])
def test_what_matches_nothing_lists_the_names(pattern: Any) -> None:
    with pytest.raises(ValueError, match=r"No parameter named .* The model has: \['conv.bias', "):
        select(Net(), {pattern: A})


def test_there_must_be_tasks() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        select(Net(), {})


@pytest.mark.parametrize("tasks", [None, [("fc1.weight", A)]])
def test_tasks_are_a_mapping(tasks: Any) -> None:
    with pytest.raises(TypeError, match=f"got {type(tasks).__name__}"):
        select(Net(), tasks)


@pytest.mark.parametrize("value", [Binary, None, "Binary()", 3])
def test_a_value_must_be_a_part(value: Any) -> None:
    with pytest.raises(TypeError, match=r"'fc1.weight' needs a part, got"):
        select(Net(), {"fc1.weight": value})


def test_a_key_must_be_a_pattern() -> None:
    with pytest.raises(TypeError, match="A pattern is a string or a function"):
        select(Net(), {3: A})  # type: ignore[dict-item]


# ------------------------------------------------------------------ names


def test_names_omit_what_wrappers_add() -> None:
    model = Net()
    model.fc1 = torch.compile(model.fc1, backend="eager")  # compiled inside the model
    assert list(chosen(torch.compile(model, backend="eager"), {"*.weight": A})) == NAMES
    assert list(chosen(nn.DataParallel(Net()), {"*.weight": A})) == NAMES
    with pytest.raises(ValueError, match=r"No parameter named 'module.fc1.weight'"):
        select(nn.DataParallel(Net()), {"module.fc1.weight": A})


@pytest.fixture
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_names_omit_module_of_distributed_data_parallel(process_group: None) -> None:
    model = Net()
    wrapped = nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))
    assert list(chosen(wrapped, {"*.weight": A})) == NAMES
    assert unwrap(wrapped) is model


# ------------------------------------------------------------------ tied weights


def tied() -> nn.Module:
    model = nn.Module()
    model.embedding = nn.Embedding(7, 4)
    model.head = nn.Linear(4, 7, bias=False)
    model.head.weight = model.embedding.weight
    return model


@pytest.mark.parametrize("pattern", ["embedding.weight", "head.weight", "head.*", "*"])
def test_a_tied_weight_answers_to_either_name_and_is_compressed_once(pattern: str) -> None:
    model = tied()
    lc = build(model, {pattern: Binary()})
    assert [task.names for task in lc.tasks] == [("embedding.weight",)]
    report = lc.report()
    assert (report.rows[0].weights, report.uncompressed.weights) == (28, 0)
    lc.finalize()
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.abs().unique().numel() == 1


def test_two_tasks_for_one_tied_weight_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"match 'embedding.weight'"):
        select(tied(), {"embedding.weight": A, "head.weight": B})


# ------------------------------------------------------------------ joint groups


def test_joint_makes_one_task_of_all_it_matches() -> None:
    model = Net()
    lc = build(model, {Joint("fc*"): KMeans(3), "conv.weight": Binary()})
    joint = lc.tasks[0]
    assert joint.names == ("fc1.weight", "fc2.weight") and joint.size == 16 * 6 + 6 * 5
    lc.finalize(calibration=None)
    assert torch.cat([model.fc1.weight.flatten(), model.fc2.weight.flatten()]).unique().numel() == 3
    assert model.conv.weight.abs().unique().numel() == 1


def test_each_keeps_one_state_per_tensor_beside_a_shared_budget() -> None:
    model = Net()
    joint = Joint(("fc1.weight", "re:fc2.*"))
    lc = build(model, {joint: each(Binary()) + Sparse(nonzeros=4)})
    binary, sparse = lc.tasks[0].state
    assert [s.scale.shape for s in binary] == [(1,), (1,)]
    assert [s.positive.shape for s in binary] == [(6, 16), (5, 6)]
    assert binary[0].scale != binary[1].scale
    assert sparse.positions.numel() == 4
    joined = torch.cat([model.fc1.weight.flatten(), model.fc2.weight.flatten()]).detach()
    part = lc.tasks[0].part
    solved = part.reconstruct(part.project(joined))
    assert torch.equal(torch.cat([d.flatten() for d in lc.tasks[0].delta]), solved)


def test_each_without_a_group_says_what_it_is_for() -> None:
    with pytest.raises(RuntimeError, match="use it in a Joint task"):
        build(Net(), {"fc1.weight": each(Binary())})


def test_a_group_of_mixed_dtypes_is_refused() -> None:
    model = Net()
    model.fc2.double()
    with pytest.raises(ValueError, match=r"different dtypes or devices: \['fc1.weight', 'fc2"):
        select(model, {Joint("fc*"): A})


# ------------------------------------------------------------------ kinds of layers


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize(
    "part",
    [
        LowRank(1).over(Matrix()),
        Binary() + LowRank(1).over(Matrix()),
        LowRank(1).then(KMeans(2)).over(Matrix()),
    ],
    ids=str,
)
def test_low_rank_in_a_grouped_convolution_is_refused_by_name(part: Any, groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups), nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match=rf"'0.weight' .*grouped convolution \(groups={groups}\)"):
        build(model, {"*": part})
    build(model, {"1.weight": part})
    lc = build(model, {"0.weight": Binary() + Sparse(nonzeros=2)})
    assert lc.tasks[0].delta[0].shape == (4, 4 // groups, 3, 3)


def test_one_dimensional_convolutions_and_embeddings() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(3, 4, 5), "table": nn.Embedding(6, 4)})
    lc = build(model, {"conv.weight": LowRank(2).over(Matrix()), "table.weight": LowRank(1)})
    assert torch.linalg.matrix_rank(lc.tasks[0].delta[0].flatten(1)) == 2
    assert torch.linalg.matrix_rank(lc.tasks[1].delta[0]) == 1
    with pytest.raises(RuntimeError, match=r"'?conv.weight'?.*KernelMatrix splits two-dim"):
        build(model, {"conv.weight": LowRank(2).over(KernelMatrix())})


def test_a_convolution_is_no_matrix_without_a_view() -> None:
    model = Net()
    before = values(model)
    with pytest.raises(RuntimeError, match=r"'?conv.weight'?, shape \(4, 3, 3, 3\), with LowRank"):
        build(model, {"conv.weight": LowRank(2)})
    assert all(map(torch.equal, values(model), before))
    lc = build(model, {"conv.weight": LowRank(2).over(KernelMatrix()) + Sparse(nonzeros=3)})
    assert lc.tasks[0].delta[0].shape == (4, 3, 3, 3)


def test_has_low_rank_looks_into_compositions() -> None:
    inside = (LowRank(1), LowRank(1) + A, LowRank(1).over(Matrix()), LowRank(1).then(KMeans(2)))
    assert all(map(has_low_rank, (*inside, each(LowRank(1)))))
    assert not any(map(has_low_rank, (A, A + Sparse(nonzeros=1), A.over(Vector()), each(A))))


# ------------------------------------------------------------------ what cannot be compressed


def test_nan_and_inf_are_named() -> None:
    for bad in (math.nan, math.inf):
        model = Net()
        with torch.no_grad():
            model.fc2.weight[0, 0] = bad
        before = values(model)
        with pytest.raises(ValueError, match=r"'fc2.weight' contains NaN or inf"):
            build(model, {"*.weight": A})
        torch.testing.assert_close(values(model), before, rtol=0, atol=0, equal_nan=True)
        build(model, {"fc1.weight": A})  # it is not in this task


def test_integer_and_complex_weights_are_refused() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'w' is of type torch.int8"):
        build(model, {"*": A})
    model.w = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"'w' is of type torch.complex64"):
        build(model, {"*": A})


def test_meta_lazy_and_empty_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        build(nn.Linear(2, 3, device="meta"), {"weight": A})
    with pytest.raises(ValueError, match=r"'weight' is empty, shape \(0, 3\)"):
        build(nn.Embedding(0, 3), {"weight": A})
    lazy = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    for pattern in ("1.weight", "*.weight", "re:1.*"):
        with pytest.raises(ValueError, match=r"'1.weight' is not initialized yet: run one batch"):
            build(lazy, {pattern: A})
    build(lazy, {"0.weight": A})
    lazy(torch.zeros(1, 3))
    assert len(build(lazy, {"*.weight": A}).tasks) == 2


def test_parameters_in_the_same_memory_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data)
    with pytest.raises(ValueError, match=r"'1.weight' and '0.weight' are different parameters in"):
        build(model, {"0.weight": A})
    build(model, {"2.weight": A})


def test_sharded_tensors_are_refused_by_name(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    mesh = init_device_mesh("cpu", (1,))
    model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.data, mesh, [Replicate()]))
    with pytest.raises(ValueError, match=r"'1.weight' is a DTensor"):
        build(model, {"*.weight": A})


class FullyShardedDataParallel(nn.Module):
    """Named as torch's, which needs an accelerator."""


def test_fully_sharded_models_are_refused() -> None:
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        build(FullyShardedDataParallel(), {"*": A})


def test_other_layouts_and_subclasses_are_refused() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"'w' is a .* of layout torch.sparse_coo"):
        build(model, {"w": A})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_weights_is_kept(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    lc = build(model, {"conv.weight": A, "fc*": KMeans(3) + Sparse(nonzeros=2)})
    exact = model.conv.weight.detach().double().abs().mean()
    assert lc.tasks[0].state.scale == exact.to(dtype)  # summed in float64, rounded once
    for _ in lc.steps(progress=False):
        lc.penalty().backward()
    assert lc.penalty().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for task in lc.tasks:
        assert {x.dtype for x in (*task.delta, *task.parameters)} == {dtype}
        # sums of many small steps: half precisions would lose them
        assert {x.dtype for x in task.multipliers} == {lc.penalty().dtype}
    lc.finalize(calibration=None)
    assert model.conv.weight.dtype == dtype and model.conv.weight.abs().unique().numel() == 1


def test_the_memory_format_is_kept() -> None:
    model = Net().to(memory_format=torch.channels_last)
    stride = model.conv.weight.stride()
    lc = build(model, {"conv.weight": A})
    assert lc.tasks[0].delta[0].stride() == stride
    lc.finalize(calibration=None)
    assert model.conv.weight.stride() == stride


def test_a_selection_holds_the_models_own_parameters() -> None:
    model = Net()
    (task,) = select(model, {"fc1.weight": A})
    assert isinstance(task, Selected) and task.tensors["fc1.weight"] is model.fc1.weight


def test_embeddings_that_change_their_rows_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'weight' .*padding_idx=0"):
        build(nn.Embedding(5, 3, padding_idx=0), {"weight": A})
    with pytest.raises(ValueError, match=r"'weight' .*max_norm=1.0"):
        build(nn.EmbeddingBag(5, 3, max_norm=1.0), {"weight": A})


def test_a_broken_expression_and_a_pattern_of_biases_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"'re:\(' is not a regular expression: missing"):
        build(Net(), {"re:(": A})
    with pytest.raises(ValueError, match=r"'\*.bias'.* only see tensors of two axes or more"):
        build(Net(), {"*.bias": A})
