"""What goes to the Hub while a run goes on, and from a run with several sizes at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import create_branch, upload_folder
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..report.milestones import FILE_NAME, folders_in
from .saving import CODE, NOT_THE_MODEL

# Of the model that was there before, where the one that takes its place has no such file.
_REPLACED = [FILE_NAME, *CODE]


def start_push(
    args: TrainingArguments, repo_id: str, step: int, checkpoint: str, beside: Iterable[str] = ()
) -> PushInProgress:
    """
    Begin to push the model in `output_dir`, and the checkpoint of a step where the strategy asks for it. Folders
    `beside` the model are other models.
    """

    def upload(
        folder: str,
        message: str,
        ignored: Sequence[str] = (),
        path_in_repo: str | None = None,
        replaced: Sequence[str] = (),
    ) -> Any:
        return upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=message,
            token=args.hub_token,
            revision=args.hub_revision,
            ignore_patterns=list(ignored),
            delete_patterns=list(replaced),
            run_as_future=True,
        )

    run = cast(str, args.output_dir)
    left_out = _left_out({*beside, *folders_in(run)})
    jobs = [upload(run, f"Training in progress, step {step}", left_out, replaced=_REPLACED)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        last = args.hub_strategy == HubStrategy.CHECKPOINT
        place = "last-checkpoint" if last else Path(checkpoint).name
        jobs.append(upload(checkpoint, f"Checkpoint of step {step}", path_in_repo=place))
    return PushInProgress(cast(Any, jobs))


def _left_out(beside: Iterable[str]) -> tuple[str, ...]:
    return (*NOT_THE_MODEL, *(f"{name}/*" for name in beside))


def push_sizes(
    args: TrainingArguments,
    repo_id: str,
    milestones: Mapping[str, Path],
    *,
    branches: bool,
    message: str,
    token: str | None,
    revision: str | None,
    blocking: bool,
) -> Any:
    """
    Push the model in `output_dir`, and before it, where asked for, those of the milestones, each to a branch of its
    name, which then has nothing else in it.

    Args:
        args ([`TrainingArguments`]): Of the run.
        repo_id (`str`): Where to.
        milestones (`Mapping[str, Path]`): Their folders in `output_dir`, by their names.
        branches (`bool`): Whether to push them.
        message (`str`): Of the commits.
        token, revision (`str`, *optional*), blocking (`bool`): As in [`Trainer.push_to_hub`].
    """
    for name, folder in milestones.items() if branches else ():
        create_branch(repo_id, branch=name, token=token, exist_ok=True)
        upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=f"{message}, {name}",
            token=token,
            revision=name,
            delete_patterns=["*"],
        )
    return upload_folder(
        repo_id=repo_id,
        folder_path=cast(str, args.output_dir),
        commit_message=message,
        token=token,
        revision=revision or args.hub_revision,
        run_as_future=cast(Any, not blocking),
        ignore_patterns=list(_left_out({*milestones, *folders_in(cast(str, args.output_dir))})),
        delete_patterns=_REPLACED,
    )
