"""What [`~hf_oto.OTOTrainer`] refuses, before anything is written or trained."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, cast

from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from ..config import OTOConfig
from ..hspg import budget
from ..hspg.sharding import check_sharding
from ..models.groups import partition
from ..models.sharding import is_sharded
from ..models.surgery import check_compressible
from ..report.milestones import logged_name

# These step during backward, or keep weights or states that are no longer laid out as the model's weights.
_REFUSED_OPTIMIZERS = ("lomo", "layerwise", "galore", "apollo", "schedule_free", "torch_4bit", "torch_8bit")

NO_DEEPSPEED = (
    "`deepspeed` is not supported by OTOTrainer: ZeRO-1, ZeRO-2 and ZeRO-3 keep weights or states of their own, in "
    "which groups cannot be found. Use `fsdp` with 'fsdp_version' 2, or DistributedDataParallel."
)
NO_FSDP1 = (
    "FSDP1 is not supported by OTOTrainer: it makes one flat vector of a block's weights, in which groups cannot be "
    "found. Set 'fsdp_version' to 2 in `fsdp_config`."
)
NO_FSDP_AROUND = (
    "`fsdp` is not supported for a model around the one that is pruned: its own weights would be sharded as well, and "
    "what is saved has to be whole. Use DistributedDataParallel, or train the Transformers model itself."
)


# The models of sentence-transformers, each with a Trainer of its own here.
_EMBEDDERS = ("SentenceTransformer", "CrossEncoder", "SparseEncoder", "MultiVectorEncoder")


def check_kind(trainer: type, model: Any) -> None:
    """Refuse what is no model, and a model of sentence-transformers in a Trainer that is none of that package's."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a model, got {type(model).__name__} {model!r}. Load it before, as by `from_pretrained`."
        )
    found, trainers = (
        [cls.__name__ for cls in kind.__mro__ if cls.__module__.startswith("sentence_transformers.")]
        for kind in (type(model), trainer)
    )
    found = [name for name in found if name in _EMBEDDERS]
    if found and not trainers:
        raise ValueError(
            f"`model` is a {found[0]} of sentence-transformers, whose losses and texts {trainer.__name__} does not "
            f"know. Use OTO{found[0]}Trainer with {found[0]}TrainingArguments."
        )


def check_optimizer(args: TrainingArguments | None) -> None:
    """Refuse optimizers that HSPG cannot wrap."""
    optim = str(getattr(args, "optim", "")).rpartition(".")[2].lower()
    if any(name in optim for name in _REFUSED_OPTIMIZERS):
        raise ValueError(
            f"`optim`={optim!r} is not supported by OTOTrainer: it steps during backward, or keeps weights or "
            f"states that are not laid out as the model's weights. Use another, such as 'adamw_torch'."
        )


def check_places_of_settings(args: TrainingArguments, config: OTOConfig) -> None:
    """Refuse other settings than those of `config` on the arguments, where a search's best are set by habit."""
    settings, own = ({field.name for field in dataclasses.fields(each)} for each in (config, args))
    unread = {name: value for name, value in vars(args).items() if name in settings - own}
    # Equal ones do no harm: a script may keep all of its settings there.
    if dataclasses.replace(config, **unread) != config:
        listed = ", ".join(f"{name}={value!r}" for name, value in unread.items())
        raise ValueError(
            f"`args` must not have settings that differ from `oto_config`: nothing reads {listed} there. Set "
            f"`trainer.oto_config = dataclasses.replace(trainer.oto_config, {listed})`."
        )


def check_parallelism(model: Any, args: TrainingArguments | None) -> None:
    """Refuse ways of training on many devices that are not supported, or that would not be what they are called."""
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            f"`model` is loaded with tensor parallelism (tp_size={model.tp_size}), which OTOTrainer does not support: "
            f"it would split groups. Load it whole, or sharded by FSDP2."
        )
    if args is None:
        return
    launched = _launched()
    if args.deepspeed or "DEEPSPEED" in launched:
        raise ValueError(NO_DEEPSPEED)
    parallelism = args.parallelism_config
    if parallelism is not None:
        sizes = {name: getattr(parallelism, f"{name}_size") for name in ("tp", "cp", "sp")}
        if split := [f"{name}_size={size}" for name, size in sizes.items() if size > 1]:
            raise ValueError(
                f"`parallelism_config` with {', '.join(split)} is not supported by OTOTrainer: tensor parallelism "
                f"would split groups, context and sequence parallelism are untested. Use `dp_replicate_size` and "
                f"`dp_shard_size` alone."
            )
    if (args.fsdp or "FSDP" in launched) and args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        raise ValueError(
            "`fsdp` is not supported on the CPU: accelerate ignores it there and would train with "
            "DistributedDataParallel. Leave it out, or use `fully_shard` and HSPG in a loop of your own."
        )
    if args.fsdp:
        if cast(dict[str, Any], args.fsdp_config).get("xla"):
            raise ValueError("`fsdp_config` with 'xla' is not supported by OTOTrainer. Use FSDP2.")
        if args.fsdp_plugin_args["fsdp_version"] != 2:
            raise ValueError(NO_FSDP1)
        if args.fsdp_plugin_args.get("activation_checkpointing"):
            raise ValueError(
                "`fsdp_config` with 'activation_checkpointing' is not supported by OTOTrainer: it renames the blocks. "
                "Use `gradient_checkpointing`=True."
            )
    elif "FSDP" in launched and os.environ.get("FSDP_VERSION", "1") != "2":  # as accelerate reads it
        raise ValueError(NO_FSDP1)
    if args.push_to_hub and (args.fsdp or is_sharded(model)):
        raise ValueError(
            "`push_to_hub` is not supported with a sharded model. Train without it, and upload the folder that "
            "`save_model` wrote."
        )


def _launched() -> set[str]:
    """What `accelerate launch` has been told to use."""
    return {name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"}


def may_be_empty(args: TrainingArguments | None) -> bool:
    """Whether a rank's model may be on the meta device before training: FSDP2 fills it from the first one's."""
    return bool(args is not None and args.fsdp) or "FSDP" in _launched()


def check_trainable(model: nn.Module, config: OTOConfig) -> None:
    """Refuse a model with the target behind it or out of reach, or with frozen or split groups."""
    groups = partition(model)
    budget.check_target(groups, config)
    parameters = dict(model.named_parameters())
    owned = [name for array in groups.arrays if array.kind in config.structures for name, _ in array.members]
    if frozen := [name for name in owned if not parameters[name].requires_grad]:
        raise ValueError(
            f"`model` has {len(frozen)} frozen parameters in zero-invariant groups ({frozen[0]!r}, …). Train them, or "
            f"leave their kind out of `structures`."
        )
    check_sharding({name: parameters[name] for name in owned})


def check_settings(model: PreTrainedModel, made_with: Mapping[str, Any]) -> None:
    """
    Refuse a config that tells of another model than the one that was made of it: so would be what is saved with it.

    Args:
        model ([`PreTrainedModel`]): With the config as it is now.
        made_with (`Mapping[str, Any]`): The settings with which it was known to be prunable.
    """
    try:
        check_compressible(model)
    except ValueError as error:
        now = model.config.to_dict()
        changed = {name: value for name, value in now.items() if made_with.get(name) != value}
        told = ", ".join(f"{name} {made_with.get(name)!r} -> {value!r}" for name, value in changed.items())
        options = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        raise ValueError(
            f"`model.config` was changed after `model` was made ({told}), and a model made of it now computes "
            f"something else. Trainer sets the special tokens to those of `processing_class`: give it the model's own "
            f"tokenizer, or load the model with these settings: `from_pretrained(folder, {options})`."
        ) from error


def check_gradients(norm: Any, loss: Any, step: int, output_dir: str) -> None:
    """
    Stop before a step by gradients that are no numbers. A loss that is none with gradients that are, as that of a
    batch without a label, does no harm: Trainer goes on, too.

    Args:
        norm (`float` or `Tensor`): The gradients' norm.
        loss (`float` or `Tensor`): Of the last micro-step.
        step (`int`): Steps taken.
        output_dir (`str`): Where the run's checkpoints are.
    """
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if norm is not None and not math.isfinite(float(norm)):
        raise FloatingPointError(
            f"The loss is {float(loss)} at step {step}, and its gradients have the norm {float(norm)}. Training stops "
            f"before that spoils the weights; checkpoints in {output_dir!r} are as they were. Either the data has a "
            f"batch that gives no number (an input that is infinite or NaN, a division by a count of 0 in the loss): "
            f"look at the batch of this step. Or the learning rate is too high: lower it, and go on from the last one."
        )


def check_metric(metrics: Mapping[str, Any], name: str | None, remedy: str) -> None:
    """
    Refuse a metric that an evaluation does not give, at the first one and not only where it counts.

    Args:
        metrics (`Mapping[str, Any]`): Of the evaluation.
        name (`str`, *optional*): Of the metric, with or without its prefix.
        remedy (`str`): What makes the Trainer at hand give it.
    """
    name = name if name is None else logged_name(name)
    if name is not None and name not in metrics:
        raise KeyError(
            f"`metric_for_best_model`={name!r} is not among what the evaluation gives: {', '.join(metrics)}. Name one "
            f"of these, or {remedy}."
        )


def check_writable(folder: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"`output_dir` must be writable, {folder!r} is not: nothing of the run could be saved. Choose another, or "
            f"set `save_strategy`='no'."
        )
