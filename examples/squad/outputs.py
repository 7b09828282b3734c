"""What a run leaves on disk, written whole or not at all, and what it shows meanwhile."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import logging


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Whether the libraries show bars of their own for tokenizing and for loading and saving models."""
    of_datasets, of_models = not datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    if not shown:
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if of_datasets and not shown:
            datasets.enable_progress_bars()
        if of_models and not shown:
            logging.enable_progress_bar()


def write_json(path: Path, content: Any) -> None:
    """Write a file in one step: a reader, or a run that is stopped, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def check_output_dir(output_dir: str, *, resume: str | None, overwrite: bool) -> str | None:
    """
    Decide, touching nothing, whether a run may write into a folder.

    Args:
        output_dir (`str`): The folder.
        resume (`str`, *optional*): A checkpoint, or `"true"` or `"last"` for the newest one in the folder.
        overwrite (`bool`): Whether what is in the folder may be replaced.

    Returns:
        `str | None`: The checkpoint to resume from.

    Raises:
        `ValueError`: The folder holds something, and is neither to be replaced nor that of the checkpoint; or there is
            no such checkpoint.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` {output_dir} is a file.")
    if resume is not None and resume.lower() not in ("false", "none"):
        last = get_last_checkpoint(output_dir) if folder.is_dir() else None
        checkpoint = last if resume.lower() in ("true", "last") else resume
        if checkpoint is None or not Path(checkpoint, "trainer_state.json").is_file():
            raise ValueError(f"`resume_from_checkpoint` {resume}: there is no such checkpoint to resume from.")
        if Path(checkpoint).resolve().parent == folder.resolve():
            return checkpoint
    else:
        checkpoint = None
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(
            f"`output_dir` {output_dir} is not empty, it may hold another run. Choose another one, continue that run "
            "with `--resume_from_checkpoint last`, or replace it with `--overwrite_output_dir`."
        )
    return checkpoint


def remove_checkpoints(output_dir: str) -> None:
    """Remove the checkpoints of a run that is replaced: Trainer would count them as its own."""
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (folder / "trainer_state.json").is_file():
            shutil.rmtree(folder)


class Results:
    """Collects a run's numbers: `<name>_results.json` of each part, and all of them in `all_results.json`."""

    def __init__(self, output_dir: str, *, enabled: bool) -> None:
        self.folder = Path(output_dir)
        self.enabled = enabled
        self.all: dict[str, Any] = {}

    def add(self, name: str, numbers: dict[str, Any]) -> None:
        self.all.update(numbers)
        if self.enabled:
            write_json(self.folder / f"{name}_results.json", numbers)
            write_json(self.folder / "all_results.json", self.all)
