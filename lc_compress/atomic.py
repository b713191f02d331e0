"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path, check: Callable[[Path], object] | None = None) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` at the end of the block, once it is on the disk.

    It is first written beside `path` under one fixed name: what a killed process left there is
    overwritten by the next. After an exception `path` is as before.

    Args:
        path: where the file is to be; its folder exists.
        check: called with the path of the written file; what it raises keeps the old file.

    Raises:
        OSError: no room, or no permission.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
