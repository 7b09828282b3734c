"""What a run shows of itself beside its numbers: pictures, in folders and in TensorBoard, and the model's card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.modelcard import TASK_MAPPING

from ..config import OTOConfig
from ..models.empty_models import auto_class_of
from ..models.sharding import is_sharded
from ..report.card import card_section, figures, leaderboard_results, save_figures
from ..report.milestones import Size, sizes_picture
from ..report.summary import summarize


def pictures(model: PreTrainedModel, config: OTOConfig, log_history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The pictures of a model and of its run; none of a sharded model."""
    if is_sharded(model):
        return {}
    summary = summarize(model, sequence_length=config.sequence_length, latency_table=config.latency_table)
    return figures(summary, log_history)


def add_to_tensorboard(callbacks: Sequence[TrainerCallback], draw: Callable[[], dict[str, Any]], step: int) -> None:
    """Put pictures beside the numbers, where TensorBoard is among `report_to`; otherwise none is drawn."""
    for callback in callbacks:
        writer: Any = callback.tb_writer if isinstance(callback, TensorBoardCallback) else None
        if writer is not None:
            for name, figure in draw().items():
                writer.add_figure(name, figure, step)


def complete_card(
    path: Path,
    model: PreTrainedModel,
    config: OTOConfig,
    log_history: Sequence[Mapping[str, Any]],
    *,
    repo_id: str,
    plain: bool,
    said: Mapping[str, Any],
    dense_scores: Mapping[str, float] | None,
    sizes: Sequence[Size] = (),
    chosen: str | None = None,
) -> None:
    """
    Add to the card that Trainer has written what was removed and how to load the model, with pictures beside it.

    Args:
        path (`Path`): The card.
        model ([`PreTrainedModel`]): The part of the model in training that is pruned.
        config ([`OTOConfig`]): The run's settings.
        log_history (`Sequence[Mapping[str, Any]]`): What the run has logged.
        repo_id (`str`): From where the card tells to load the model.
        plain (`bool`): Whether it is of its family's own class, and needs no code.
        said (`Mapping[str, Any]`): Arguments of [`Trainer.create_model_card`].
        dense_scores (`Mapping[str, float]`, *optional*): Metrics of the dense model.
        sizes (`Sequence[Size]`, *optional*): All that the run has finished.
        chosen (`str`, *optional*): The metric that chooses the best model.
    """
    drawn = pictures(model, config, log_history) | sizes_picture(sizes, chosen)
    save_figures(drawn, path.parent)
    logged = [entry for entry in log_history if any(name.startswith("eval_") for name in entry)]
    summary = summarize(model, sequence_length=config.sequence_length, latency_table=config.latency_table)
    section = card_section(
        summary,
        repo_id=repo_id,
        auto_class=auto_class_of(model),
        plain=plain,
        pictures=tuple(drawn),
        scores=logged[-1] if logged else None,
        dense_scores=dense_scores,
        sizes=sizes,
    )
    card = ModelCard.load(path)
    ids = card.data.datasets or []
    card.data.model_name = card.data.model_name or path.parent.name
    card.data.eval_results = leaderboard_results(
        logged[-1] if logged else {},
        tasks=_listed(said.get("tasks")) or _hub_tasks(model),
        datasets=dict(zip(ids, _listed(said.get("dataset") or ids), strict=False)),
    )
    draft, heading, rest = card.text.partition("## Model description")
    card.text = draft + section + heading + rest
    card.data.tags = sorted({*(card.data.tags or []), "hf-oto", "pruned"})
    card.save(path)


def _hub_tasks(model: PreTrainedModel) -> list[str]:
    """What the Hub calls the model's task."""
    known = cast(dict[str, dict[str, str]], TASK_MAPPING)
    return [task for task, classes in known.items() if type(model).__name__ in classes.values()]


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])
