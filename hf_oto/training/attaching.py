"""HSPG around a run's optimizer, whoever made that, and the learning rate that goes with its stages."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments, get_wsd_schedule
from transformers.trainer_utils import SchedulerType

from ..config import OTOConfig
from ..hspg.optimizer import HSPG
from ..hspg.schedule import Schedule
from ..models.groups import partition


def hspg_in(optimizer: Any) -> HSPG | None:
    """The optimizer that prunes, without accelerate's wrapper."""
    while optimizer is not None and not isinstance(optimizer, HSPG):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def wrapped(
    optimizer: Optimizer, model: nn.Module, part: PreTrainedModel, config: OTOConfig, total_steps: int
) -> HSPG:
    """
    HSPG around an optimizer, whose parameters get names: those of the part's that they have in it, by which groups
    find them; the others such that a run that resumes gives each the same again.

    Args:
        optimizer (`torch.optim.Optimizer`): Of the run.
        model (`nn.Module`): What is trained, not wrapped.
        part ([`PreTrainedModel`]): The part of it with the groups.
        config ([`OTOConfig`]): The run's settings.
        total_steps (`int`): Optimizer steps of the run.
    """
    outside = {parameter: f"outside.{name}" for name, parameter in model.named_parameters()}
    names = outside | {parameter: name for name, parameter in part.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        group["param_names"] = [
            names.get(parameter, f"outside.{number}.{position}")  # of a loss
            for position, parameter in enumerate(group["params"])
        ]
    return HSPG(optimizer, partition(part), config, total_steps)


def decay_in_recovery(args: TrainingArguments, config: OTOConfig, optimizer: Optimizer, total_steps: int) -> Any:
    """
    The learning rate's schedule where the arguments leave open when it decays: it stays at its peak until the target
    is reached. `None` where they do not.
    """
    given: Any = args.lr_scheduler_kwargs or {}
    if args.lr_scheduler_type != SchedulerType.WARMUP_STABLE_DECAY or "num_decay_steps" in given:
        return None
    if config.target_sparsity is None:
        return None
    warmup = args.get_warmup_steps(total_steps)
    pruned = Schedule.from_config(config, total_steps).boundaries[-1]
    if warmup > pruned:
        raise ValueError(
            f"`warmup_steps` must end before the target is reached for `lr_scheduler_type`='warmup_stable_decay', "
            f"got {warmup} and {pruned} of {total_steps} steps. Give `lr_scheduler_kwargs` its own "
            f"`num_decay_steps`, or shorten it."
        )
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=warmup,
        num_decay_steps=total_steps - pruned,
        num_training_steps=total_steps,
        **{"decay_type": "linear", **given},
    )
