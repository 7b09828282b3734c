"""Context managers of several rooms: files that appear whole or not at all, models that evaluate for a while."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import nn


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules is in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
