"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

UNFINISHED = ".unfinished-"  # and the number of the process that writes


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """
    A new hidden folder beside `target`, on the same disk: what is complete moves into its place by a rename. The
    folder goes at the end, with all that was not moved, and with it those of processes that were killed.
    """
    missing = [parent for parent in target.parents if not parent.exists()]  # the deepest first
    start = f".{target.name}{UNFINISHED}"
    for left in target.parent.glob(f"{escape(start)}*"):
        number = left.name.removeprefix(start)
        if number.isdecimal() and not _runs(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    folder = target.with_name(f"{start}{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)  # of another process that had this number
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # where something moved in, they are not empty and stay
            for parent in missing:
                parent.rmdir()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks, and does nothing
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's, or none of this machine's
        pass
    return True
