"""Files that are there whole or not at all."""

from __future__ import annotations

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
