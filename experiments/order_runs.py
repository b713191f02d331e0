"""The command line that the experiments on the order share, and where their results go."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from common import ROOT, add_options, changed, option, origin, write

C = TypeVar("C")  # a script's settings, a dataclass


def parser_of(doc: str | None, inputs: Mapping[str, tuple[str, str]]) -> argparse.ArgumentParser:
    """inputs: option of a file or folder → its default, and what it is: FILE or DIR."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, (default, what) in inputs.items():
        parser.add_argument(f"--{name}", type=Path, default=Path(default), metavar=what)
    parser.add_argument("--records", type=Path, help="where the measurements go")
    parser.add_argument("--smoke", action="store_true", help="tiny random networks, in seconds")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.set_defaults(command=" ".join(f"--{name} {what}" for name, (_, what) in inputs.items()))
    return parser


@dataclass
class Run(Generic[C]):
    script: str
    config: C
    options: argparse.Namespace
    source: dict[str, object]

    @property
    def stem(self) -> Path:
        """Of the results' files."""
        name = Path(self.script).stem + ("_smoke" if self.options.smoke else "")
        return Path(self.options.out or ROOT / "results") / name

    @property
    def setup(self) -> dict[str, Any]:
        return asdict(self.config) | {"smoke": self.options.smoke}  # type: ignore[call-overload,no-any-return]

    def write(self, result: Mapping[str, Any]) -> None:
        given = [f"python experiments/{Path(self.script).name} {self.options.command}"]
        chosen = [option(k, v) for k, v in changed(self.config).items()]
        command = " ".join([*given, *(["--smoke"] if self.options.smoke else chosen)])
        content = {"command": command, "config": self.setup, "result": result, **self.source}
        write(self.stem.with_suffix(".json"), content)


def start(
    script: str,
    parser: argparse.ArgumentParser,
    config: C,
    smoke: Mapping[str, Any],
    argv: list[str],
) -> Run[C]:
    """The settings of the command line; `smoke`: those that are others in a smoke run."""
    add_options(parser, config)
    options = parser.parse_args(argv)
    names = [f.name for f in fields(config)]  # type: ignore[arg-type]
    config = replace(config, **{name: getattr(options, name) for name in names})  # type: ignore[type-var]
    if options.smoke:
        config = replace(config, **smoke)  # type: ignore[type-var]
    torch.set_num_threads(1)
    return Run(script, config, options, origin(script))
