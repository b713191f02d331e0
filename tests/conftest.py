"""What the tests share: a seeded generator, devices, dtypes and real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # tests run in parallel processes; threads on top would only compete

# The same examples in every run, and no verdict that depends on how busy the machine is.
settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded CPU generator: draw on the CPU and move, so that every device sees the same."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype that weights come in; `parametrize("dtype", ...)` narrows it."""
    return request.param


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data; a test without it is skipped, but fails where CI is set."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LC_COMPRESS_DATA") or default)
    if not folder.is_dir():
        reason = f"needs real data, no folder {folder}: set LC_COMPRESS_DATA to where it is."
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return folder
