"""Wrapping an existing training loop changes or adds at most four lines: the pairs in loops/."""

from __future__ import annotations

import difflib
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from lc_compress.selection import unwrap

LOOPS = Path(__file__).parent / "loops"
NAMES = ("plain", "amp", "compiled")


def changed(before: list[str], after: list[str]) -> tuple[list[str], list[str]]:
    """Lines of `after` that are new or changed, lines of `before` that are gone; none blank."""
    lines = [line for line in difflib.ndiff(before, after) if line[2:].strip()]
    gone = [line[2:].strip() for line in lines if line.startswith("- ")]
    return [line[2:].strip() for line in lines if line.startswith("+ ")], gone


@pytest.mark.parametrize("name", NAMES)
def test_at_most_four_lines_change(name: str) -> None:
    before = (LOOPS / f"{name}.py").read_text(encoding="utf-8").splitlines()
    after = (LOOPS / f"{name}_lc.py").read_text(encoding="utf-8").splitlines()
    new, gone = changed(before, after)
    assert len(new) <= 4, new
    assert gone == ["for _ in range(6):"]  # it became the steps of LC
    assert any(line.startswith("lc.finalize(") for line in new)


@pytest.mark.parametrize("name", NAMES)
def test_both_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for script in (f"{name}.py", f"{name}_lc.py"):
        model: nn.Module = runpy.run_path(str(LOOPS / script))["main"]()
        results.append([p.detach() for p in unwrap(model).parameters() if p.dim() == 2])
    for plain, compressed in zip(*results, strict=True):
        assert bool(compressed.isfinite().all()) and not torch.equal(plain, compressed)
        assert plain.abs().unique().numel() > plain.numel() // 2
        # one magnitude; and in the sum, nine weights more
        assert compressed.abs().unique().numel() <= (1 + 9 if name == "plain" else 1)
    shown = capsys.readouterr()
    assert shown.out == "" and "6/6" in shown.err
