"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lc_compress.atomic import replacing


def test_the_new_file_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    seen: list[bytes] = []
    with replacing(path, check=lambda p: seen.append(p.read_bytes())) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and seen == [b"new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["body", "check"])
def test_after_a_failure_the_old_file_is_whole(where: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def refuse(_: Path) -> None:
        raise OSError("check")

    with pytest.raises(OSError, match=where), replacing(path, check=refuse) as file:
        file.write(b"new")
        if where == "body":
            raise OSError("body")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_the_user_beside_it_is_left_alone(tmp_path: Path) -> None:
    for name in ("x.tmp", "x.unfinished"):
        (tmp_path / name).write_bytes(b"mine")
    with replacing(tmp_path / "x") as file:
        file.write(b"new")
    found = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert found == {"x": b"new", "x.tmp": b"mine", "x.unfinished": b"mine"}


def test_a_name_that_is_taken_is_refused_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda _: "12345678")
    (tmp_path / "x.12345678.unfinished").write_bytes(b"mine")
    with pytest.raises(FileExistsError), replacing(tmp_path / "x"):
        pass
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"mine"]


def test_two_writers_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as first:
        first.write(b"fir")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        first.write(b"st")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_the_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "x"):
        pass
    (tmp_path / "y").touch()
    x, y = ((tmp_path / name).stat().st_mode for name in "xy")
    assert stat.S_IMODE(x) == stat.S_IMODE(y)


def test_what_a_kill_leaves_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    script = (
        "import os, sys; from pathlib import Path; from lc_compress.atomic import replacing\n"
        "with replacing(Path(sys.argv[1])) as file: os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], env=os.environ, check=False)
    assert done.returncode == -9 and path.read_bytes() == b"old"
    (left,) = (p for p in tmp_path.iterdir() if p != path)
    assert left.name.startswith("x.") and left.name.endswith(".unfinished")


def test_an_owned_name_is_one_and_the_same(tmp_path: Path) -> None:
    (tmp_path / "x.tmp").write_bytes(b"left by a kill")
    with replacing(tmp_path / "x", owned=True) as file:
        file.write(b"new")
        assert (tmp_path / "x.tmp").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
