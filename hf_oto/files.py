"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """
    A new hidden folder beside `target`, on the same disk: what is complete moves into its place by a rename. The
    folder goes at the end, with all that was not moved.
    """
    missing = [parent for parent in target.parents if not parent.exists()]  # the deepest first
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that had this number and was killed
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # where something moved in, they are not empty and stay
            for parent in missing:
                parent.rmdir()
