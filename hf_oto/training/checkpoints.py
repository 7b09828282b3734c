"""Checkpoints to resume from: written beside their place, and checked before anything of them is loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, get_last_checkpoint, sort_checkpoints
from transformers.utils import logging

from .refusals import check_writable
from .saving import SHARDED_OPTIMIZER_NAMES, explaining

logger = logging.get_logger(__name__)

# Where a checkpoint is written; a push leaves out what begins with an underscore.
UNFINISHED = "_unfinished"


class CheckpointingTrainer(Trainer):
    """[`Trainer`] whose checkpoints are there whole or not at all, and are resumed from only if they are."""

    _checkpoints_folder: str | None = None  # while one is written
    _newest_checkpoint: int | None = None  # the step of the one that this run wrote last
    _pushed_checkpoint: str | None = None  # the one that the last push takes along

    def train(self, *args: Any, **kwargs: Any) -> Any:
        folder = cast(str, self.args.output_dir)
        if self.args.save_strategy != SaveStrategy.NO and self.args.should_save and os.path.isdir(folder):
            check_writable(folder)
            clear(Path(folder))
        checkpoint = resumed_from(args, kwargs)
        if checkpoint is True and os.path.isdir(folder):
            checkpoint = get_last_checkpoint(folder)
        if isinstance(checkpoint, str | os.PathLike):
            plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
            check_complete(checkpoint, None if plugin is None else str(plugin.state_dict_type))
        self._newest_checkpoint = None
        return super().train(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoints_folder or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, name = Path(self._get_output_dir(trial)), name_of(self.state.global_step)
        writes, wait = self.args.should_save, self.accelerator.wait_for_everyone
        with appearing(run / name, writes=writes, wait=wait) as folder:
            self._checkpoints_folder = str(folder)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._checkpoints_folder = None
            best = name_of(self.state.best_global_step)
            if best == name or (run / best).is_dir():
                self.state.best_model_checkpoint = str(run / best)
            if writes:
                self.state.save_to_json(str(folder / name / TRAINER_STATE_NAME))  # with the best one's place
        if writes:
            remove_superfluous(run, self.args.save_total_limit, self._best_checkpoint(run), self._read_by_a_push())
        self._newest_checkpoint = self.state.global_step
        wait()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _best_checkpoint(self, run: Path) -> str | None:
        """The checkpoint in a run's folder that has to stay, whatever their limit."""
        return self.state.best_model_checkpoint

    def _read_by_a_push(self) -> str | None:
        """The checkpoint whose files a push may still be reading."""
        push = getattr(self, "push_in_progress", None)
        return None if push is None or push.is_done() else self._pushed_checkpoint

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint
        if best is not None and self.args.save_total_limit == 1:  # upstream removes all others than the best one
            self._finish_current_push()  # which may still read them
            if not os.path.isdir(best):
                logger.warning(f"The best model's checkpoint {best} is gone: the run ends with the last weights.")
                self.state.best_model_checkpoint = None
        return super()._finalize_training(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that is resumed when all its steps are done would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)


def name_of(step: int | None) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def clear(run: Path) -> None:
    """Remove what a run that was killed had begun to write."""
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)


@contextmanager
def appearing(place: Path, *, writes: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """
    A folder in which a checkpoint is to be made, under its name. It appears at `place` when all ranks have written all
    of it; on an error nothing does, and what was there is as it was.

    Args:
        place (`Path`): Where the checkpoint is to be.
        writes (`bool`): Whether this rank moves and removes folders.
        wait (`Callable`): Returns when all ranks have called it.
    """
    folder = place.parent / UNFINISHED
    if writes:
        clear(place.parent)
    wait()
    try:
        with explaining(place):
            yield folder
        wait()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if writes:
        if place.exists():
            place.rename(folder / "replaced")
        (folder / place.name).rename(place)


def remove_superfluous(run: Path, limit: int | None, best: str | None, pushed: str | None = None) -> None:
    """Remove checkpoints beyond `save_total_limit`, but not the newest, the best, and one that is being pushed."""
    found = [Path(path) for path in sort_checkpoints(str(run), use_mtime=True, best_model_checkpoint=best)]
    protected = {found[-1], found[-1] if best is None else Path(best)}
    for path in found[: -max(limit, len(protected))] if limit and limit > 0 else []:
        if pushed is not None and path == Path(pushed):
            continue
        path.rename(run / UNFINISHED / path.name)  # gone at once: one that is half removed must not be read
    clear(run)


def resumed_from(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The checkpoint among the arguments of [`Trainer.train`]; `True` for the last one."""
    return (*args, kwargs.get("resume_from_checkpoint"))[0]


def check_complete(checkpoint: str | os.PathLike[str], fsdp_state: str | None) -> None:
    """
    Refuse a checkpoint that cannot be resumed from.

    Args:
        checkpoint (`str`): Its folder.
        fsdp_state (`str`, *optional*): Under FSDP2, the type of its state dicts.
    """
    optimizer = OPTIMIZER_NAME
    if fsdp_state is not None:
        optimizer = SHARDED_OPTIMIZER_NAMES[0 if "FULL_STATE_DICT" in fsdp_state else 1]
    needed = (optimizer, SCHEDULER_NAME, TRAINER_STATE_NAME)
    if lost := [name for name in needed if not Path(checkpoint, name).exists()]:
        raise ValueError(
            f"{checkpoint} lacks {', '.join(lost)}: the groups that are zero and the step would be forgotten. "
            f"Resume from a complete checkpoint, or start a new run from its weights."
        )


def check_shapes(checkpoint: str, model: nn.Module, part: PreTrainedModel) -> None:
    """Refuse weights of other shapes, of which some would have been loaded before torch finds out."""
    mine = {
        name: list(tensor.shape)
        for module in (part, model)  # a folder may hold the part under its own names
        for name, tensor in module.state_dict().items()
    }
    for path in Path(checkpoint).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if (saved := file.get_slice(name).get_shape()) != mine.get(name, saved):
                    raise ValueError(
                        f"{checkpoint} is of another model: {name!r} has shape {saved} there and {mine[name]} in "
                        f"`model`. Resume with the model that the run began with."
                    )
