"""What a run shows of itself beside its numbers: pictures, in folders and in TensorBoard, and the model's card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.modelcard import TASK_MAPPING
from transformers.utils import CONFIG_NAME

from ..config import OTOConfig
from ..models.empty_models import auto_class_of
from ..models.sharding import is_sharded
from ..report.card import TRUSTING, card_section, figures, leaderboard_results, save_figures
from ..report.milestones import Size, evaluations, sizes_picture
from ..report.summary import summarize
from .pruned_part import path_of


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


# Trackers that make a Trainer of their own when training ends, to save the model that they are handed by it.
_KEEPERS = ("WandbCallback", "DVCLiveCallback")


@contextmanager
def handing_over(
    callbacks: Sequence[TrainerCallback], small: Callable[[], AbstractContextManager[nn.Module | None]]
) -> Iterator[None]:
    """
    Hand another model than the one in training to trackers that keep what they are given when training ends.

    Args:
        callbacks (`Sequence[TrainerCallback]`): Of the run. All but those trackers get what they always get.
        small (`Callable`): Makes the model for the time that a tracker needs it; `None` for the one in training.
    """
    keepers = [callback for callback in callbacks if _keeps_the_last(callback)]
    for callback in keepers:
        vars(callback)["on_train_end"] = _with_another(callback.on_train_end, small)
    try:
        yield
    finally:
        for callback in keepers:
            del vars(callback)["on_train_end"]


def _keeps_the_last(callback: TrainerCallback) -> bool:
    """Whether a tracker was asked for the model of the end: by `WANDB_LOG_MODEL`, or `log_model=True`."""
    asked = getattr(callback, "_log_model", None)
    asked = getattr(asked, "is_enabled", asked)
    return asked is True and any(cls.__name__ in _KEEPERS for cls in type(callback).__mro__)


def _with_another(
    on_train_end: Callable[..., Any], small: Callable[[], AbstractContextManager[nn.Module | None]]
) -> Callable[..., Any]:
    def handed(*args: Any, model: Any = None, **kwargs: Any) -> Any:
        with small() as another:
            return on_train_end(*args, model=model if another is None else another, **kwargs)

    return handed


@contextmanager
def configured(model: nn.Module, part: PreTrainedModel) -> Iterator[None]:
    """A module of one's own with the config of its part: Trainer's card asks whatever is trained for one."""
    if hasattr(model, "config"):
        yield
        return
    model.config = cast(Any, part.config)
    try:
        yield
    finally:
        del model.config


def complete_card(
    path: Path,
    whole: nn.Module,
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
        whole (`nn.Module`): The model in training.
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
    logged = evaluations(log_history)
    summary = summarize(model, sequence_length=config.sequence_length, latency_table=config.latency_table)
    section = card_section(
        summary,
        repo_id=repo_id,
        auto_class=auto_class_of(model),
        loading=_loading_part(path.parent, whole, model, repo_id, plain=plain),
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


def _loading_part(folder: Path, whole: nn.Module, part: PreTrainedModel, repo_id: str, *, plain: bool) -> str | None:
    """Python that loads a part from beside a model of the user's own; `None` where the part is no such one."""
    path, auto_class = path_of(whole, part), auto_class_of(part)
    if not path or not (folder / path / CONFIG_NAME).is_file():
        return None
    trusting = "" if plain else TRUSTING
    return (
        f"from transformers import {auto_class}\n\n"
        f"# What is at `{path}` in a {type(whole).__name__}, all of whose weights are in model.safetensors.\n"
        f'part = {auto_class}.from_pretrained("{repo_id}", subfolder="{path}"{trusting})'
    )


def _hub_tasks(model: PreTrainedModel) -> list[str]:
    """What the Hub calls the model's task."""
    known = cast(dict[str, dict[str, str]], TASK_MAPPING)
    return [task for task, classes in known.items() if type(model).__name__ in classes.values()]


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])
