"""HSPG around a run's optimizer, whoever made that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import OTOConfig
from ..hspg.optimizer import HSPG
from ..models.groups import partition

logger = logging.get_logger(__name__)


def hspg_in(optimizer: Any) -> HSPG | None:
    """The optimizer that prunes, without accelerate's wrapper."""
    while optimizer is not None and not isinstance(optimizer, HSPG):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def optimizers_in(others: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The optimizer among Trainer's arguments, given by position or by name."""
    given = (kwargs.get("optimizers"), *others)
    pairs = [pair for pair in given if isinstance(pair, tuple) and len(pair) == 2]
    found = [optimizer for optimizer, _ in pairs if isinstance(optimizer, Optimizer)]
    return found[0] if found else None


def settled_config(config: OTOConfig | None, optimizer: Any) -> OTOConfig:
    """The settings of a run: those given, or a ready HSPG's. Raises `ValueError` where both are there and differ."""
    hspg = hspg_in(optimizer)
    if hspg is None:
        return OTOConfig() if config is None else config
    if config is not None and config != hspg.config:
        mine, theirs = config.to_dict(), hspg.config.to_dict()
        listed = ", ".join(f"`{name}`: {mine[name]} and {theirs[name]}" for name in mine if mine[name] != theirs[name])
        raise ValueError(
            f"`oto_config` and the HSPG in `optimizers` have other settings ({listed}). Leave `oto_config` out, or "
            f"pass the optimizer below and let OTOTrainer wrap it."
        )
    return hspg.config


def goes_on(hspg: HSPG, part: PreTrainedModel, total_steps: int, *, resumes: bool) -> bool:
    """
    Whether an HSPG that a run finds serves it, laid out anew if need be; otherwise nothing of it has happened to the
    model, and a new one may take its place.

    Args:
        hspg ([`HSPG`]): The user's, or that of an earlier call of `train` or of one that found no memory.
        part ([`PreTrainedModel`]): What is pruned.
        total_steps (`int`): Optimizer steps of the run.
        resumes (`bool`): Whether a checkpoint's state is about to be loaded.

    Raises:
        `ValueError`: It is of another model, or groups are being removed or are gone already.
    """
    if hspg.partition != partition(part):
        raise ValueError(
            "The HSPG in `optimizers` is of a model with other groups. Make it from `partition(model)` of this one, "
            "or pass the optimizer below and let OTOTrainer wrap it."
        )
    if resumes and hspg.schedule.total_steps == total_steps:
        return True
    if hspg.steps_done == 0:
        hspg.reschedule(total_steps)
        return True
    check_begins(hspg)
    for name in [name for name in hspg.param_groups[0] if name.startswith("hspg_")]:
        del hspg.param_groups[0][name]
    return False


def check_begins(hspg: HSPG) -> None:
    """Refuse, with a `ValueError`, to begin a run with a model of which groups are being removed or are gone."""
    if hspg.steps_done == 0 or hspg.stage == "warmup":
        return
    raise ValueError(
        f"A run cannot begin with a model of which {hspg.steps_done} of {hspg.schedule.total_steps} steps of pruning "
        f"are done (stage {hspg.stage!r}). `train` was called again, or `auto_find_batch_size` begins anew after a "
        f"batch that did not fit: set `per_device_train_batch_size` lower. Go on with `resume_from_checkpoint`, or "
        f"make a new OTOTrainer with the model to be trained."
    )


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
    if (ready := hspg_in(optimizer)) is not None:
        optimizer = ready.base_optimizer
    outside = {parameter: f"outside.{name}" for name, parameter in model.named_parameters()}
    names = outside | {parameter: name for name, parameter in part.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        group["param_names"] = [
            names.get(parameter, f"outside.{number}.{position}")  # of a loss
            for position, parameter in enumerate(group["params"])
        ]
    hspg = HSPG(optimizer, partition(part), config, total_steps)
    if 0 < hspg.schedule.periods < config.pruning_periods:
        logger.warning(
            f"A run of {total_steps} steps has {hspg.schedule.periods} of pruning: as many periods are used, not "
            f"`pruning_periods`={config.pruning_periods}. Train longer for a result that counts."
        )
    return hspg


def take_skipped_steps(hspg: HSPG) -> None:
    """Take the steps that a run has counted and its optimizer has not, and say so. No parameter has a gradient."""
    left, total = hspg.schedule.total_steps - hspg.steps_done, hspg.schedule.total_steps
    if left:
        logger.warning(
            f"The loss scaler left out {left} of {total} steps, as their gradients were infinite or NaN: what is on "
            f"its way to zero goes there, and nothing is trained after it. If that is more than a few, the model is "
            f"spoilt: look for batches that give no number, lower the learning rate, or set `bf16` for `fp16`."
        )
    for _ in range(left):
        hspg.step()
