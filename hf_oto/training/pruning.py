"""A [`Trainer`] whose optimizer prunes: where HSPG is attached, and what it needs of a training."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from operator import gt
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size
from transformers.utils import logging

from ..config import OTOConfig
from ..hspg import budget
from ..hspg.optimizer import HSPG
from ..models.groups import config_counts, partition
from ..models.modes import dropping_modules
from ..models.sharding import check_placed, is_sharded
from ..models.surgery import check_compressible, shrink
from ..renamed import refuse_old_names
from . import checkpoints, showing
from .attaching import goes_on, hspg_in, optimizers_in, settled_config, take_skipped_steps, wrapped
from .data_parallel import unwatchable, watch_anew
from .learning_rate import scheduler_of
from .pruned_part import find_part, path_of, put_config, put_part, saved_config, shared_outside
from .refusals import (
    NO_DEEPSPEED,
    NO_FSDP_AROUND,
    check_gradients,
    check_kind,
    check_metric,
    check_optimizer,
    check_parallelism,
    check_places_of_settings,
    check_settings,
    check_trainable,
    may_be_empty,
)
from .search import split_space
from .teaching import TaughtTrainer
from .zeros import check_zeros

logger = logging.get_logger(__name__)


class PruningTrainer(TaughtTrainer):
    """
    [`Trainer`] whose optimizer prunes, whoever made it. What becomes of the pruned model is not its business.

    Args:
        oto_config ([`OTOConfig`], *optional*): The settings of the compression; all defaults if `None`.
    """

    # What gives an evaluation another metric.
    _metric_remedy = "let `compute_metrics` return it, which is called where batches have what `label_names` names"

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
        oto_config: OTOConfig | None = None,
        teacher_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_old_names(f"{type(self).__name__}()", kwargs, {"teacher": "teacher_model"})
        if oto_config is not None and not isinstance(oto_config, OTOConfig):
            raise TypeError(f"`oto_config` must be an OTOConfig, got {type(oto_config).__name__}.")
        oto_config = settled_config(oto_config, optimizers_in(others, kwargs))
        self._checked: nn.Module | None = None  # what is known to be prunable, with these settings
        self._checked_settings: dict[str, Any] = {}
        if model is not None:  # before Trainer makes `output_dir`
            check_kind(type(self), model)
            trains = kwargs.get("train_dataset") is not None or any(other is not None for other in others)
            if trains and not may_be_empty(args):
                check_placed(model)
            self._check_part(self.pruned_part(model), oto_config if trains else None)
        check_optimizer(args)
        check_parallelism(model, args)
        self._accumulating = False
        self._rows: list[int] = []  # of the micro-steps that saliency has not been gathered of
        self._last_loss: Any = math.nan
        self._shrunk_checkpoint: str | None = None  # to resume from, when the optimizer can follow
        super().__init__(model, args, *others, oto_config=oto_config, teacher_model=teacher_model, **kwargs)
        self._check_supported()

    # What is pruned.

    def pruned_part(self, model: nn.Module) -> PreTrainedModel:
        """
        The part of a model that has the groups: the model itself, or the one Transformers model inside it. Override it
        to choose another; all that concerns pruning, and nothing else, asks it.

        Args:
            model (`nn.Module`): What is trained, not wrapped.
        """
        return find_part(model)

    def put_back(self, model: nn.Module, part: PreTrainedModel) -> nn.Module:
        """
        A model with another pruned part in place of its own: `part` itself where that is all there is, otherwise
        `model`, changed in place. It is asked for a save, to put the small part in, and then the large one again.

        Args:
            model (`nn.Module`): What is trained, not wrapped.
            part ([`PreTrainedModel`]): What takes the place of `pruned_part`.
        """
        return put_part(model, self.pruned_part(model), part)

    def _part(self) -> PreTrainedModel:
        return self.pruned_part(self._whole_model())

    def _trained_modules(self) -> list[nn.Module]:
        """All modules whose weights the optimizer may have: those of some Trainers have losses with weights."""
        return [self._whole_model()]

    # Before the first step.

    def _check_supported(self) -> None:
        """Refuse what would train something else than it says, and what only accelerate knows of."""
        if self.is_deepspeed_enabled:
            raise ValueError(NO_DEEPSPEED)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"DataParallel is not supported by OTOTrainer, and this process sees {self.args.n_gpu} GPUs. Launch "
                f"one process per GPU with `torchrun`, or let it see one: CUDA_VISIBLE_DEVICES=0."
            )

    @property
    def _output_dir(self) -> str:
        return cast(str, self.args.output_dir)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        # Here is the optimizer, whoever made it and however, and nothing is wrapped or sharded yet.
        if training and self.optimizer is not None:
            self._attach(self.optimizer, self.state.max_steps)
        return super()._wrap_model(model, training, dataloader)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        super().create_optimizer_and_scheduler(num_training_steps)
        self._attach(cast(Optimizer, self.optimizer), num_training_steps)

    def _check_part(self, part: PreTrainedModel, config: OTOConfig | None) -> None:
        """Refuse what cannot be pruned and, unless the model is only used, what cannot be trained to the target."""
        if part is not self._checked:
            check_compressible(part)
        elif part.config.to_dict() != self._checked_settings:
            check_settings(part, self._checked_settings)
        self._checked, self._checked_settings = part, part.config.to_dict()
        if config is not None and not budget.is_reached(partition(part), config):  # a finished model may be evaluated
            check_trainable(part, config)

    def _attach(self, optimizer: Optimizer, total_steps: int) -> None:
        """Let HSPG prune what an optimizer trains. In a run that had been shrunk the model becomes as small again."""
        check_places_of_settings(self.args, self.oto_config)
        whole, part, config = self._whole_model(), self._part(), self.oto_config
        self._accumulating, self._rows = False, []
        if self.hspg is None or not goes_on(self.hspg, part, total_steps, resumes=self.state.global_step > 0):
            self._check_part(part, None)
            check_trainable(part, config)
            if whole is not part and self.is_fsdp_enabled:
                raise ValueError(NO_FSDP_AROUND)
            self.optimizer = wrapped(optimizer, whole, part, config, total_steps)
            if config.shrink_during_training and (reason := self._unshrinkable):
                logger.warning(f"The model is trained in full size, `shrink_during_training` does nothing: {reason}.")
            elif config.shrink_during_training and self._compiled:
                logger.warning(
                    "The model is compiled: it shrinks once, when the target is reached, as every size of it is "
                    "compiled anew."
                )
        checkpoint, self._shrunk_checkpoint = self._shrunk_checkpoint, None
        if checkpoint is not None:
            self._shrink(like=self._saved_config(checkpoint))
            self._load_weights(checkpoint, None)

    def _shrink(self, like: PreTrainedConfig | None = None) -> None:
        part = self._part()
        before = part.config
        shrink(part, cast(HSPG, self.hspg), like=like)
        put_config(self._whole_model(), before, part.config)
        if isinstance(self.model_wrapped, DistributedDataParallel):
            watch_anew(self.model_wrapped)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            made = cast(Optimizer, optimizer or self.optimizer)
            self.lr_scheduler = scheduler_of(self.args, self.oto_config, made, num_training_steps)
            self._created_lr_scheduler = self.lr_scheduler is not None
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def _unshrinkable(self) -> str | None:
        if self.oto_config.target_sparsity is None:
            return "`target_sparsity`=None has no pruning periods"
        if self.is_fsdp_enabled or is_sharded(self._part()):
            return "its parameters are sharded"
        if self.args.world_size > 1 and self._compiled:
            return "what is compiled around several processes goes by the weights that it was given"
        if reason := unwatchable(self.model_wrapped):
            return reason
        if shared := shared_outside(self._part(), self._trained_modules()):
            return f"{shared!r} shares its weights with the part that is pruned, and would no longer"
        return None if self.hspg is None else self.hspg.unshrinkable

    @property
    def _compiled(self) -> bool:
        """Whether the arguments ask for it, or the user has called `model.compile()`."""
        modules = self._whole_model().modules()
        return self.args.torch_compile or any(vars(module).get("_compiled_call_impl") for module in modules)

    @property
    def _may_change_size(self) -> bool:
        """Whether another size costs nothing beside its cut: a compiled one is compiled anew, for half a minute."""
        return not self._compiled or cast(HSPG, self.hspg).target_reached

    @property
    def hspg(self) -> HSPG | None:
        """The optimizer that prunes, without accelerate's wrapper. `None` before training."""
        return hspg_in(self.optimizer)

    # Training.

    def compute_loss_context_manager(self) -> Any:
        # Trainer has just set the model to training mode. The backward pass may go through the blocks once more.
        whole = self._whole_model()
        if whole.training and self._drops_nothing:
            around = [module for module in whole.modules() if isinstance(module, nn.Dropout)]
            for module in (*dropping_modules(self._part()), *around):
                module.eval()
        return super().compute_loss_context_manager()

    @property
    def _drops_nothing(self) -> bool:
        pruned = self.hspg is not None and bool(self.oto_config.target_sparsity) and self.hspg.stage != "warmup"
        return pruned and not self.oto_config.keep_dropout

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._drops_nothing:
            model.train()
        self._last_loss = loss
        self._rows.append(find_batch_size(inputs) or 1)
        synced = self.accelerator.sync_gradients
        # Between processes only the last micro-step's gradients agree.
        if self.hspg is not None and (synced or self.args.world_size == 1):
            rows, self._rows = sum(self._rows), []
            scaler = self.accelerator.scaler
            self.hspg.observe(
                loss_scale=1.0 if scaler is None else scaler.scale(torch.ones_like(loss)),  # asks no device for it
                accumulated=self._accumulating,
                weight=self._weight_of(rows) if self.hspg.observes else 1.0,
            )
        self._accumulating = not synced and self.args.world_size == 1
        return loss

    def _weight_of(self, rows: int) -> float | Tensor:
        """
        Of the gradients since the last look, to that of the usual ones: 1 unless it is an epoch's last batch. Saliency
        is that of as many micro-steps as were looked at, where those of a usual step weigh 1 together. Of several
        processes the batches may differ, and all have to choose the same groups: the mean of their rows counts.
        """
        usual = getattr(self, "_train_batch_size", None) or self.args.train_batch_size
        steps = self.args.gradient_accumulation_steps
        if self.args.world_size == 1:
            return rows / usual / steps**2
        own = torch.full((), rows, dtype=torch.float32, device=self.args.device)
        return cast(Tensor, self.accelerator.reduce(own, "mean")) / usual / steps

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None:  # which leaves such steps out, and scales less
            check_gradients(norm, self._last_loss, self.state.global_step, self._output_dir)
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # After a step, and before anything is saved: what is saved at the target is then all of one size.
        hspg = self.hspg if self.oto_config.shrink_during_training else None
        if hspg is not None and hspg.shrink_due and self._unshrinkable is None and self._may_change_size:
            self._shrink()
        if self.state.global_step >= self.state.max_steps:
            self._take_skipped_steps()
        if self.control.should_log and self.hspg is not None:  # on all ranks, as not everybody's `log` is
            check_zeros(self.hspg)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            self._take_skipped_steps()  # of a run that was resumed when all of its steps were done
        return super()._finalize_training(*args, **kwargs)

    def _take_skipped_steps(self) -> None:
        """
        Under fp16 Trainer counts steps that its scaler skips, HSPG does not: at the end of a run without recovery it
        would lack them. Without gradients nothing moves but what is on its way to zero.
        """
        if self.hspg is not None and not self._at_target and self.hspg.steps_done > 0:
            self._whole_model().zero_grad()
            take_skipped_steps(self.hspg)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        stage = None
        if "loss" in logs and self.hspg is not None:
            logs, stage = {**logs, **self.hspg.metrics()}, self.hspg.stage
        super().log(logs, start_time)
        seen = [entry["stage"] for entry in self.state.log_history if "stage" in entry][-1:]
        if stage is not None:  # no number: what loggers of numbers would warn of
            self.state.log_history[-1]["stage"] = cast(Any, stage)
        if "train_runtime" in logs or (stage is not None and seen not in ([], [stage])):  # the end, or a new stage
            callbacks = self.callback_handler.callbacks
            showing.add_to_tensorboard(callbacks, self._pictures, self.state.global_step)

    def _pictures(self, small: PreTrainedModel | None = None) -> dict[str, Any]:
        # The large one knows better which heads are kept, if it is whole.
        return showing.pictures(small or self._part(), self.oto_config, self.state.log_history)

    @property
    def _at_target(self) -> bool:
        """Whether evaluations are of a model that is as small as it was asked for."""
        return self.hspg is None or self.hspg.target_reached or self.oto_config.target_sparsity is None

    @property
    def _at_a_size(self) -> bool:
        """Whether the model is as small as the target or a milestone asks for, no more groups and no fewer."""
        return self._at_target or cast(HSPG, self.hspg).milestone_reached is not None

    def _check_metric(self, metrics: Mapping[str, float]) -> None:
        check_metric(metrics, self.args.metric_for_best_model, self._metric_remedy)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self._check_metric(metrics)
        return self._at_target and super()._determine_best_metric(metrics, trial)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        # A learning rate that goes by evaluations would fall when the model gets smaller.
        skip = skip_scheduler or not self._at_target
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """
        As [`Trainer.hyperparameter_search`]. Fields of [`OTOConfig`] may be in the space as well. Afterwards
        `oto_config` is what it was before: those of the best run are yours to put into it.
        """
        self._config_of_search = self.oto_config
        try:
            return super().hyperparameter_search(*args, **kwargs)
        finally:
            self.oto_config = self._config_of_search
            self.hp_search_backend = None  # upstream leaves it after an error, and the next run is no trial

    def _hp_search_setup(self, trial: Any) -> None:
        if self.hp_search_backend is None or trial is None:
            super()._hp_search_setup(trial)
            return
        space = cast(Any, self.hp_space)
        found, rest = split_space(trial if isinstance(trial, Mapping) else space(trial))
        self.hp_space = lambda _: rest
        try:
            super()._hp_search_setup(rest if isinstance(trial, Mapping) else trial)
        finally:
            self.hp_space = space
        self.oto_config = replace(self._config_of_search, **found)

    # Resuming.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights now, or, if they are of a model that had been shrunk, when the optimizer can follow."""
        part, saved = self._part(), self._saved_config(resume_from_checkpoint)
        counts = partition(part).block_counts
        if saved is None or config_counts(saved) == counts:
            checkpoints.check_shapes(resume_from_checkpoint, self._whole_model(), part)
            self._load_weights(resume_from_checkpoint, model)
        elif not self.oto_config.shrink_during_training or any(map(gt, config_counts(saved).arrays, counts.arrays)):
            raise ValueError(
                f"{resume_from_checkpoint} has {list(config_counts(saved).blocks)} (heads, neurons) in its blocks, "
                f"`model` {list(counts.blocks)}. Resume with the model that the run began with, and with "
                f"`shrink_during_training=True` if it had that."
            )
        else:
            self._shrunk_checkpoint = resume_from_checkpoint

    def _load_weights(self, checkpoint: str, model: nn.Module | None) -> None:
        # Not every Trainer takes `model`, and upstream gives one under FSDP alone.
        super()._load_from_checkpoint(checkpoint, *([] if model is None else [model]))

    def _saved_config(self, checkpoint: str) -> Any:
        part = self._part()
        return saved_config(checkpoint, partition(part).model_type, path_of(self._whole_model(), part))
