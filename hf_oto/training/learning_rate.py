"""The learning rate that goes with the stages of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler, get_wsd_schedule
from transformers.trainer_utils import SchedulerType

from ..config import OTOConfig
from ..hspg.schedule import Leg, Schedule

_BY_EVALUATIONS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def scheduler_of(args: TrainingArguments, config: OTOConfig, optimizer: Optimizer, total_steps: int) -> Any:
    """
    The learning rate's schedule where it goes by the stages of the run, `None` where it does not.

    With milestones the schedule of the arguments is run once for every size, over the steps that lead to it, each with
    the same share of warm-up. Where the arguments leave open when a stable rate decays, it stays at its peak until
    the size is reached.

    Args:
        args ([`TrainingArguments`]): Name the schedule.
        config ([`OTOConfig`]): The run's settings.
        optimizer (`torch.optim.Optimizer`): Whose rate it is.
        total_steps (`int`): Optimizer steps of the run.

    Raises:
        `ValueError`: The schedule does not fit into its steps, or cannot begin anew at a milestone.
    """
    if config.target_sparsity is None:
        return None
    warmup = args.get_warmup_steps(total_steps)
    if not config.milestones:
        if not _decays_in_recovery(args):
            return None
        (leg,) = Schedule.from_config(config, total_steps).legs
        return _stable(args, optimizer, warmup, leg)
    if args.lr_scheduler_type in _BY_EVALUATIONS:
        raise ValueError(
            f"`lr_scheduler_type`={SchedulerType(args.lr_scheduler_type).value!r} goes by evaluations and never rises "
            f"again, as the learning rate has to after each of `milestones`={config.milestones}. Choose another, such "
            f"as 'linear', or hand over a scheduler of your own in `optimizers`."
        )
    legs = Schedule.from_config(config, total_steps).legs
    factors = [_factor(args, optimizer, round(warmup * (leg.end - leg.start) / total_steps), leg) for leg in legs]

    def factor(step: int) -> float:  # a plain function: torch saves the attributes of any other callable
        number = sum(step >= leg.start for leg in legs) - 1
        return factors[number](step - legs[number].start)

    return LambdaLR(optimizer, factor)


def _factor(args: TrainingArguments, optimizer: Optimizer, warmup: int, leg: Leg) -> Callable[[int], float]:
    """What the rate is multiplied by at every step of a leg, counted from its first."""
    # Transformers makes schedules around an optimizer only, and lets each begin at once.
    number = nn.Parameter(torch.zeros((), dtype=torch.float32, device="cpu"))
    unused = torch.optim.SGD([number], lr=optimizer.defaults.get("lr", optimizer.param_groups[0]["lr"]))
    if _decays_in_recovery(args):
        made = _stable(args, unused, warmup, leg)
    else:
        given: Any = args.lr_scheduler_kwargs
        decay, steps = (given or {}).get("num_decay_steps", 0), leg.end - leg.start
        if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and warmup + decay > steps:
            raise ValueError(
                f"`num_decay_steps`={decay} in `lr_scheduler_kwargs` does not fit after {warmup} steps of warm-up "
                f"into the {steps} that lead to {leg.share:g}: with `milestones` the schedule is run once for every "
                f"size. Lower it, or leave it out: the rate then decays once the size is reached."
            )
        made = get_scheduler(args.lr_scheduler_type, unused, warmup, leg.end - leg.start, given)
    return made.lr_lambdas[0]


def _decays_in_recovery(args: TrainingArguments) -> bool:
    """Whether a stable rate is asked for, and when it decays is not said."""
    given: Any = args.lr_scheduler_kwargs or {}
    return args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and "num_decay_steps" not in given


def _stable(args: TrainingArguments, optimizer: Optimizer, warmup: int, leg: Leg) -> LambdaLR:
    """At its peak until the leg's size is reached, or for as long as is said, then falling."""
    given: Any = args.lr_scheduler_kwargs or {}
    steps, pruned = leg.end - leg.start, leg.boundaries[-1] - leg.start
    if (stable := given.get("num_stable_steps")) is not None:
        decay = steps - warmup - stable
        if decay < 1:
            raise ValueError(
                f"`num_stable_steps`={stable} in `lr_scheduler_kwargs` leaves nothing to decay in: {warmup} steps of "
                f"warm-up and {stable} of {steps}. Lower it, or leave it out: the rate is then stable until the "
                f"target is reached."
            )
        return get_wsd_schedule(optimizer, warmup, decay, **{"decay_type": "linear", **given})
    if warmup > pruned:
        raise ValueError(
            f"`warmup_steps` must end before the target is reached for `lr_scheduler_type`='warmup_stable_decay', "
            f"got {warmup} and {pruned} of {steps} steps. Give `lr_scheduler_kwargs` its own "
            f"`num_decay_steps`, or shorten it."
        )
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=warmup,
        num_decay_steps=steps - pruned,
        num_training_steps=steps,
        **{"decay_type": "linear", **given},
    )
