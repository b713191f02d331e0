"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(
    path: Path, check: Callable[[Path], object] | None = None, *, owned: bool = False
) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` at the end of the block, once it is on the disk.

    It is first written beside `path`, as "<name>.<8 random digits>.unfinished": no other file is
    touched, and two processes that write one `path` at once do not meet. After an exception `path`
    is as before, and that file is gone; a killed process leaves it.

    Args:
        path: where the file is to be; its folder exists.
        check: called with the path of the written file; what it raises keeps the old file.
        owned: nobody else writes here, time and again, as a run its checkpoints: the name is always
            "<name>.tmp", so that what a killed process left is overwritten by the next.

    Raises:
        OSError: no room, or no permission.
    """
    ending = "tmp" if owned else f"{secrets.token_hex(4)}.unfinished"
    temporary = path.with_name(f"{path.name}.{ending}")
    file = open(temporary, "wb" if owned else "xb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
