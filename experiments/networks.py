"""The networks of the CIFAR-10 experiments, and their reference weights."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESNETS = {"resnet20": 20, "resnet32": 32, "resnet44": 44, "resnet56": 56, "resnet110": 110}
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut.

    Where the size halves, the shortcut takes every second pixel and pads channels with zeros.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(x + y)


class ResNet(nn.Module):
    """CIFAR ResNet of depth 6n + 2 with widths 16, 32, 64."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16, 1) for _ in range(n)])
        self.layer2 = nn.Sequential(
            *[Block(16 if i == 0 else 32, 32, 2 if i == 0 else 1) for i in range(n)]
        )
        self.layer3 = nn.Sequential(
            *[Block(32 if i == 0 else 64, 64, 2 if i == 0 else 1) for i in range(n)]
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class VGG(nn.Module):
    """VGG16 for 32×32 images: 13 convolutions with BatchNorm, one linear layer; `width` scales the
    channels (1: 14.7 M weights, 1/4: 0.92 M).
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for channels in _VGG16:
            if channels == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            outputs = max(1, round(channels * width))
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).flatten(1))


def network(name: str) -> nn.Module:
    """A network with random weights: a name below, or `FILE.py:factory`, a function without
    arguments in the user's own file.

    resnet20, resnet32, resnet44, resnet56, resnet110; vgg16, and vgg16/4 with a quarter of the
    channels (any divisor); resnet8 for trying out.

    Raises:
        SystemExit: an unknown name, or a file without that function.
    """
    if ".py:" in name:
        return _users(name)
    if name in RESNETS or name == "resnet8":
        return ResNet(RESNETS.get(name, 8))
    base, _, divisor = name.partition("/")
    if base == "vgg16" and (not divisor or (divisor.isdigit() and int(divisor) > 0)):
        return VGG(1 / int(divisor or 1))
    known = ", ".join(RESNETS)
    raise SystemExit(f"There is no network {name!r}: {known}, vgg16, vgg16/4 or FILE.py:factory.")


def _users(name: str) -> nn.Module:
    path, _, factory = name.rpartition(":")
    if not Path(path).is_file():
        raise SystemExit(f"{path} is missing: --network FILE.py:factory names a Python file.")
    make = getattr(_module(Path(path)), factory, None)
    if not callable(make):
        raise SystemExit(f"{path} has no function {factory!r}.")
    try:
        inspect.signature(make).bind()
    except TypeError as cause:
        raise SystemExit(f"{name} is called without arguments: {cause}.") from cause
    model = make()
    if not isinstance(model, nn.Module):
        raise SystemExit(f"{name} returned {type(model).__name__} instead of a torch module.")
    return model


def _module(path: Path) -> ModuleType:
    """The user's file as a module. Like that of a script, its folder is searched for others, and
    torch.compile and dataclasses find it by its name.
    """
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as cause:
        raise SystemExit(f"{path} is not Python: {cause}.") from cause
    return module


def reference(name: str, file: str) -> nn.Module:
    """The network with the weights in `file`: a state dict, alone or under "state_dict".

    Raises:
        SystemExit: the file is missing, or of another network.
    """
    model = network(name)
    path = file_of(name, file)
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        state = content.get("state_dict", content)
        model.load_state_dict({key.removeprefix("module."): x for key, x in state.items()})
    except Exception as cause:
        reason = str(cause).splitlines()
        text = " ".join(reason)[:300]
        raise SystemExit(
            f"{path} does not hold the weights of {name}: give another --weights or --network "
            f"({text})."
        ) from cause
    return model


def file_of(name: str, file: str) -> Path:
    """The file of a network's weights; `{network}` in it stands for the name, `*` for anything.

    Raises:
        SystemExit: there is none, or several.
    """
    if Path(file).is_file():
        return Path(file)
    found = [Path(x) for x in glob.glob(file.replace("{network}", glob.escape(name)))]
    if len(found) != 1 or not found[0].is_file():
        known = " (those of akamaster/pytorch_resnet_cifar10)" if name in RESNETS else ""
        what = f"{file!r} names {len(found)} files" if len(found) > 1 else f"{file!r} is missing"
        raise SystemExit(f"{what}: give --weights the file of the trained {name}{known}.")
    return found[0]
