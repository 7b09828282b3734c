"""What goes to the Hub while a run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import upload_folder
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from .saving import NOT_THE_MODEL


def start_push(args: TrainingArguments, repo_id: str, step: int, checkpoint: str) -> PushInProgress:
    """Begin to push the model in `output_dir`, and the checkpoint of a step where the strategy asks for it."""

    def upload(folder: str, message: str, ignored: Sequence[str] = (), path_in_repo: str | None = None) -> Any:
        return upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=message,
            token=args.hub_token,
            revision=args.hub_revision,
            ignore_patterns=list(ignored),
            run_as_future=True,
        )

    jobs = [upload(cast(str, args.output_dir), f"Training in progress, step {step}", NOT_THE_MODEL)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        last = args.hub_strategy == HubStrategy.CHECKPOINT
        place = "last-checkpoint" if last else Path(checkpoint).name
        jobs.append(upload(checkpoint, f"Checkpoint of step {step}", path_in_repo=place))
    return PushInProgress(cast(Any, jobs))
