"""The pretrained ResNet20 and real images: the reference and its direct compression."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lc_compress import LC, Binary, Int, KMeans, LowRank, Sparse, constant, geometric, load, save
from lc_compress.part import squared_error

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def experiment() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        return load_module(EXPERIMENTS / "cifar_resnet.py")


@pytest.fixture(scope="module")
def images(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test images and one part of the training images, in the official layout."""
    unpacker = load_module(data_folder / "unpack_cifar10.py")
    folder = tmp_path_factory.mktemp("cifar10")
    for name in ("test_batch", "data_batch_1"):
        pixels, labels = unpacker.decode((unpacker.HERE / unpacker.BATCHES[name]).read_bytes())
        records = np.concatenate([labels[:, None], pixels.reshape(len(labels), -1)], axis=1)
        records.tofile(folder / f"{name}.bin")
    return folder


@pytest.fixture
def resnet20(experiment: Any, data_folder: Path) -> Any:
    weights = data_folder / "resnet_cifar10" / "resnet20-12fca82f.th"
    return experiment.pretrained(experiment.Config(weights=str(weights)))


def test_reference_and_direct_compression_of_resnet20(
    experiment: Any, resnet20: Any, images: Path
) -> None:
    test = experiment.cifar10(images, ["test_batch"])
    assert len(test[0]) == 10_000  # of which 8.27 % are wrong; every run of `cifar.py` checks that
    few = tuple(x[:1000] for x in test)
    assert experiment.error(resnet20, *few) == pytest.approx(
        8.5, abs=0.11
    )  # one image more or less
    train, _ = experiment.cifar10(images, ["data_batch_1"])
    part = Binary() + Sparse(density=0.02)
    tasks = {"*conv*.weight": part, "linear.weight": part}
    lc = LC(resnet20, tasks, schedule=geometric(0.05, 1.6, 9))
    assert len(lc.tasks) == 20
    with lc.compressed(calibration=None):
        kept = experiment.error(resnet20, *few)
    calibration = [experiment.normalized(x) for x in train[:2000].split(500)]
    with lc.compressed(calibration=calibration):
        estimated = experiment.error(resnet20, *few)
    assert kept > 80 and 25 < estimated < 55  # statistics of w ruin it, those of Δ(θ) do not


def test_c_steps_on_real_layers_are_optimal(resnet20: Any) -> None:
    import kmeans1d

    for name, p in resnet20.named_parameters():
        if p.dim() < 2:
            continue
        w = p.detach()
        u = w.abs().flatten().double().sort().values
        kept = u.numel() - round(0.02 * u.numel())
        windows = u.unfold(0, kept, 1) if kept < 2000 else None
        part = Binary() + Sparse(density=0.02)
        state = part.project(w)
        if windows is not None:
            best = float(windows.var(1, correction=0).min() * kept)
            assert 2 * part.objective(w, state) == pytest.approx(best, rel=1e-6), name
        centres = KMeans(4)
        reached = 2 * centres.objective(w, centres.project(w))
        clusters, values = kmeans1d.cluster(w.flatten().double().numpy(), 4)
        optimal = squared_error(w.flatten(), torch.tensor(values)[torch.tensor(clusters)])
        assert reached == pytest.approx(optimal, rel=1e-6), name


# ------------------------------------------------------------------ packed files of real networks

PACKED = Binary() + Sparse(density=0.02, value_dtype=torch.float16)
POLICIES: tuple[Any, ...] = ("never", "on_load", "on_first_use")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_packed_resnets_agree(
    depth: int,
    dtype: torch.dtype,
    experiment: Any,
    data_folder: Path,
    tmp_path: Path,
    generator: torch.Generator,
) -> None:
    """Saved, loaded, dense and packed: the same logits to rounding."""
    model = experiment.network(f"resnet{depth}")
    (weights,) = (data_folder / "resnet_cifar10").glob(f"resnet{depth}-*.th")
    state = torch.load(weights, weights_only=True, map_location="cpu")["state_dict"]
    model.load_state_dict(
        {name.removeprefix("module."): x for name, x in state.items()}, strict=False
    )
    tasks = {"*conv*.weight": PACKED, "linear.weight": LowRank(4) + Sparse(density=0.05)}
    lc = LC(model, tasks, schedule=constant(1.0, 1))
    lc.finalize(calibration=None)
    save(lc, tmp_path / "net.lc")
    dense = load(tmp_path / "net.lc", experiment.network(f"resnet{depth}")).eval()
    for name, x in model.state_dict().items():
        assert torch.equal(dense.state_dict()[name], x), name
    images = torch.randn(4, 3, 32, 32, generator=generator).to(dtype)
    near = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.5}
    with torch.no_grad():
        expected = dense.to(dtype)(images)
        for policy in POLICIES:
            other = experiment.network(f"resnet{depth}")
            packed = load(tmp_path / "net.lc", other, materialize=policy)
            torch.testing.assert_close(packed.eval().to(dtype)(images), expected, **near)


def test_packed_language_model_agrees(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embedding, tied head and all matrices packed: the whole forward pass, by every policy."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    order_lm = load_module(EXPERIMENTS / "order_lm.py")
    model = order_lm.pretrained(data_folder / "stories15m")
    words = order_lm.windows(data_folder / "tinystories")[:1, :48]
    with torch.no_grad():
        reference = model(words)
    tasks = {
        "layers.*.w[qkvo].weight": PACKED,
        "layers.*.w3.weight": Int(4, axis=0, scale="max"),
        "layers.0.w[12].weight": LowRank(16) + Sparse(density=0.05),
        "layers.[1-5].w[12].weight": LowRank(144),
        "words.weight": Int(8, axis=0, scale="max"),
    }
    lc = LC(copy.deepcopy(model), tasks, schedule=constant(1.0, 1))
    lc.finalize()
    save(lc, tmp_path / "model.lc")

    @torch.no_grad()
    def logits(policy: Any, dtype: torch.dtype) -> Any:
        net = load(tmp_path / "model.lc", copy.deepcopy(model), materialize=policy).to(dtype)
        assert policy is None or net.head.packed is net.words.packed
        return net(words).float()

    spread = float(reference.std())
    for dtype, near in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        expected = logits(None, dtype)
        assert float((expected - reference).std()) > 0.05 * spread  # compressed
        for policy in POLICIES:
            difference = (logits(policy, dtype) - expected).square().mean().sqrt()
            assert float(difference) < near * spread, (policy, dtype)
