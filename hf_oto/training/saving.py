"""Folders written whole: all files of a save are in their places, or none is."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ..models.folders import UNFINISHED, folder_beside
from ..report.milestones import FILE_NAME
from .refusals import check_writable

# What `output_dir` holds beside the model: upstream leaves the same out of its pushes.
NOT_THE_MODEL = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", f".*{UNFINISHED}*")

# Where FSDP2 keeps the optimizer's state in a checkpoint, in place of `OPTIMIZER_NAME`: full, or sharded.
SHARDED_OPTIMIZER_NAMES = ("optimizer.bin", "optimizer_0")

# The names that `save_pretrained` gives weights: whole, in shards, and the shards' index. No one else's.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

# The code that travels with models of the pruned classes: a plain one that takes their place has none.
CODE = ("configuration_oto.py", "modeling_oto.py")

# A save whose files are all there, and on the way to their places; and what goes before the first of them moves.
_WHOLE, _FILES, _GOES = f".model{UNFINISHED}whole", "files", "goes"


@contextmanager
def explaining(target: Path) -> Iterator[None]:
    """Say what could not be written: torch and safetensors name an internal file of theirs, or none."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(target.parent if target.parent.exists() else os.curdir).free
        raise OSError(
            f"{target} could not be written: {error}. The disk has {free / 2**20:.1f} MiB left. What was saved before "
            f"is as it was. Make room if that is little, and go on from the last checkpoint."
        ) from error


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """
    A folder to write into, whose files move into `target` when all is written. On an error nothing changes; what else
    is in `target` stays. A process that is killed on the way leaves `target` as it was, or with all new files beside
    it, which [`finish`] moves.

    Raises:
        `ValueError`: `target` holds a checkpoint to resume from, or a file where a folder has to go or the reverse.
    """
    check_no_checkpoint(target)
    finish(target)
    # Within a folder that is there: it may be the root of its disk.
    with folder_beside(target / "model" if target.is_dir() else target) as folder:
        files = folder / _FILES
        files.mkdir()
        yield files
        if not target.exists():
            files.rename(target)
            return
        _check_places(files, target)
        (folder / _GOES).write_text("\n".join(_of_old_weights(files, target)), encoding="utf-8")
        folder.rename(target / _WHOLE)
        finish(target)


def check_no_checkpoint(target: Path) -> None:
    """Refuse a folder whose weights a run has to be resumed with."""
    of_checkpoints = (OPTIMIZER_NAME, SCHEDULER_NAME, *SHARDED_OPTIMIZER_NAMES)
    if found := [name for name in of_checkpoints if (target / name).exists()]:
        raise ValueError(
            f"{target} holds a checkpoint to resume from ({', '.join(found)}), whose weights would be lost. Save the "
            f"small model elsewhere."
        )


def check_places(folder: Path, names: Iterable[str]) -> None:
    """
    Refuse a folder in which the models of milestones have no place, because of what else is there.

    Args:
        folder (`Path`): In which each gets a folder of its own.
        names (`Iterable[str]`): Of these.
    """
    remedy = "Move it, or choose another folder."
    for place in (folder / name for name in names):
        if not os.path.lexists(place):
            continue
        if not place.is_dir():
            raise ValueError(f"{place} is no folder, and the model of a milestone has to go there. {remedy}")
        check_writable(str(place))
        finish(place)
        check_no_checkpoint(place)
        models = [name for name in (CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME) if (place / name).exists()]
        if models and not (place / FILE_NAME).is_file():
            raise ValueError(
                f"{place} holds {', '.join(models)} and no {FILE_NAME}, so a model that is of no milestone, and would "
                f"be lost. {remedy}"
            )


def finish(target: Path) -> None:
    """
    Move the files of a save that is whole to their places in `target`, if there is one whose process was killed.

    Old weights go first and the new ones come last, their index behind them: at no moment does a folder load as
    something that is neither model.
    """
    whole = target / _WHOLE
    if not whole.is_dir():
        return
    if (whole / _GOES).exists():  # until the first new file moves: one of them may have an old one's name
        for name in (whole / _GOES).read_text(encoding="utf-8").splitlines():
            (target / name).unlink(missing_ok=True)
        (whole / _GOES).unlink()
    found = sorted(_files_in(whole / _FILES), key=lambda path: (_is_weights(path), path.suffix == ".json", path))
    for path in found:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (whole / _FILES / path).replace(target / path)
    shutil.rmtree(whole)


def _files_in(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]


def _is_weights(path: Path) -> bool:
    return _WEIGHTS.fullmatch(path.name) is not None


def _of_old_weights(files: Path, target: Path) -> list[str]:
    """
    The weights of an earlier save, their code and what they scored, in the folders of `target` that get weights now.
    """
    folders = {path.parent for path in _files_in(files) if _is_weights(path)}
    return [
        str(path.relative_to(target))
        for folder in sorted(folders)
        for path in sorted((target / folder).glob("*"))
        if (_is_weights(path) or path.name in (FILE_NAME, *CODE)) and not path.is_dir()
    ]


def _check_places(files: Path, target: Path) -> None:
    """Refuse, before anything moves, what could not."""
    for path in _files_in(files):
        parents = [target / parent for parent in path.parents if (target / parent).exists()]
        if blocked := [place for place in parents if not place.is_dir()]:
            raise ValueError(f"{blocked[0]} is a file where a folder has to go. Move it, or save elsewhere.")
        if (target / path).is_dir():
            raise ValueError(f"{target / path} is a folder where a file has to go. Move it, or save elsewhere.")


def share_code(folder: Path) -> None:
    """Put the code of an encoder in a folder of its own also at the top, where alone Transformers looks for it."""
    for name in CODE:
        for found in sorted(folder.glob(f"*/**/{name}"))[:1]:
            if not (folder / name).exists():
                shutil.copyfile(found, folder / name)
