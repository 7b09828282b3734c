"""A [`Trainer`] that makes the model small while it trains it."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging

from ..config import OTOConfig
from ..hspg.optimizer import HSPG
from ..models.groups import partition
from ..models.modes import dropping_modules
from ..models.saved_names import own_names
from ..models.sharding import is_sharded
from ..models.surgery import block_counts, compress, gather, shrink
from ..report.card import save_figures
from . import checkpoints, showing
from .attaching import decay_in_recovery, hspg_in, wrapped
from .distillation import Distiller, load_teacher, share_of_step, sums_items, teacher_columns
from .hub import start_push
from .pruned_part import find_part, path_of, put_part, save_beside, saved_config
from .refusals import NO_DEEPSPEED, check_model, check_optimizer, check_parallelism, check_writable
from .saving import explaining, replacing

logger = logging.get_logger(__name__)


class OTOTrainer(Trainer):
    r"""
    [`Trainer`], with one more argument: it drives attention heads and FFN neurons to zero while it trains, and saves a
    model without them.

    The optimizer of [`TrainingArguments`] keeps its meaning; [`HSPG`] wraps it. So does the learning rate's schedule;
    `lr_scheduler_type="warmup_stable_decay"` may go without its `num_decay_steps`: the rate then stays at its peak
    until the target is reached, and decays, linearly if nothing else is said, while the model recovers.

    `checkpoint-N` folders hold the model in training and all that resuming needs; it is full-size, unless
    `shrink_during_training` has cut it since. [`~OTOTrainer.save_model`], a push to the Hub and the end of training
    write the small model, which `from_pretrained` loads. `load_best_model_at_end` considers only evaluations at the
    target: before it, a model scores better because it is larger. `EarlyStoppingCallback` counts from there on, for
    the same reason. A run that stops before its target ends with a checkpoint to resume from, and without a small
    model.

    Args:
        oto_config ([`OTOConfig`], *optional*):
            The settings of the compression; all defaults if `None`.
        teacher ([`PreTrainedModel`], `str` or `os.PathLike`, *optional*):
            A model of the same task, or its folder or Hub id, that the one in training learns from beside the labels:
            the dense model of an ordinary fine-tuning, or a larger one. It is set to evaluation mode and moved to the
            device of the training; it is no part of the model and saved nowhere. Columns of the data that it reads are
            kept for it. With it, the loss of a step is the mean over all of the step's labels, however many
            micro-steps they come in, also of heads that leave that to Trainer. Everything else is as in [`Trainer`].

    Raises:
        `ValueError`: The model or the teacher is not supported, the target cannot be reached, or another setting rules
            compression out. A schedule that does not fit in the run raises when training starts, before its first
            step.

    Example:

    ```python
    trainer = OTOTrainer(model=model, args=args, oto_config=OTOConfig(target_sparsity=0.5), train_dataset=train)
    trainer.train()
    trainer.save_model("small")
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
        oto_config: OTOConfig | None = None,
        teacher: PreTrainedModel | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.oto_config = OTOConfig() if oto_config is None else oto_config
        if not isinstance(self.oto_config, OTOConfig):
            raise TypeError(f"`oto_config` must be an OTOConfig, got {type(oto_config).__name__}.")
        # Before Trainer makes `output_dir`.
        if model is not None:
            check_model(self.pruned_part(model), self.oto_config)
            teacher = self._load_teacher(teacher, model)
        check_optimizer(args)
        check_parallelism(model, args)
        self._accumulating = False
        self._shrunk_checkpoint: str | None = None  # to resume from, when the optimizer can follow
        self._newest_checkpoint: int | None = None  # the step of the one that this run wrote last
        self._checkpoints_folder: str | None = None  # while one is written
        super().__init__(model, args, *others, **kwargs)
        self._check_supported()
        loaded = self._load_teacher(teacher, self.model)
        self.teacher = None if loaded is None else cast(nn.Module, loaded).to(self.args.device).eval()
        self._teacher_asked = False
        self._for_teacher: dict[str, Any] = {}  # what it alone reads of the batch

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
            part ([`PreTrainedModel`]): What takes the place of [`~OTOTrainer.pruned_part`].
        """
        return put_part(model, self.pruned_part(model), part)

    def _whole_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _part(self) -> PreTrainedModel:
        return self.pruned_part(self._whole_model())

    # Before the first step.

    def _check_supported(self) -> None:
        """Refuse what would train something else than it says, and what only accelerate knows of."""
        if self.is_deepspeed_enabled:
            raise ValueError(NO_DEEPSPEED)
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel is not supported by OTOTrainer. Launch one process per GPU.")

    def _load_teacher(
        self, teacher: PreTrainedModel | str | os.PathLike[str] | None, model: Any
    ) -> PreTrainedModel | None:
        if teacher is None:
            return None
        return load_teacher(teacher, model, hidden_states=self.oto_config.hidden_state_weight > 0)

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

    def _attach(self, optimizer: Optimizer, total_steps: int) -> None:
        """Let HSPG prune what an optimizer trains. In a run that had been shrunk the model becomes as small again."""
        part = self._part()
        if self.hspg is None:
            check_model(part, self.oto_config)
            self.optimizer = wrapped(optimizer, self._whole_model(), part, self.oto_config, total_steps)
            if self.oto_config.shrink_during_training and (reason := self._unshrinkable):
                logger.warning(f"The model is trained in full size, `shrink_during_training` does nothing: {reason}.")
        checkpoint, self._shrunk_checkpoint = self._shrunk_checkpoint, None
        if checkpoint is not None:
            shrink(part, cast(HSPG, self.hspg), like=self._saved_config(checkpoint))
            self._load_weights(checkpoint, None)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            made = cast(Optimizer, optimizer or self.optimizer)
            self.lr_scheduler = decay_in_recovery(self.args, self.oto_config, made, num_training_steps)
            self._created_lr_scheduler = self.lr_scheduler is not None
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def _unshrinkable(self) -> str | None:
        if self.oto_config.target_sparsity is None:
            return "`target_sparsity`=None has no pruning periods"
        if self.is_fsdp_enabled or is_sharded(self._part()):
            return "its parameters are sharded"
        if self.args.world_size > 1:
            return "DistributedDataParallel goes by the weights that it was given"
        return None if self.hspg is None else self.hspg.unshrinkable

    @property
    def hspg(self) -> HSPG | None:
        """The optimizer that prunes, without accelerate's wrapper. `None` before training."""
        return hspg_in(self.optimizer)

    # Training.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        distiller = self._distiller
        if distiller is None or not model.training:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        self._teacher_asked = True
        student, weight = self._part(), self.oto_config.distillation_weight
        # Many heads give their micro-step's mean, whatever they are told of the step's items: told of theirs, all do.
        shifted = getattr(self, "_loss_shifts_labels", False)
        share, num_items_in_batch = share_of_step(inputs, num_items_in_batch, shifted=shifted)
        loss, outputs = super().compute_loss(
            model, {**inputs, **distiller.options}, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        with self.accelerator.autocast():
            taught, items = distiller(student, outputs, {**inputs, **self._for_teacher})
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            taught = taught * self.accelerator.num_processes  # as Trainer's own loss
        loss = (1 - weight) * loss + taught * (items if sums_items(student) else 1)
        if share is not None and not sums_items(student) and getattr(self, "loss_is_scaled_for_ga", None) is not False:
            loss = loss * share
        return (loss, outputs) if return_outputs else loss

    @property
    def _distiller(self) -> Distiller | None:
        """`None` where nothing is to be learnt from a teacher."""
        if self.teacher is None:
            return None
        distiller = Distiller(cast(PreTrainedModel, self.teacher), self.oto_config)
        return distiller if distiller.teaches else None

    def _set_signature_columns_if_needed(self) -> None:
        missing = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if missing and self._distiller is not None:
            columns: Any = self._signature_columns
            columns.extend(teacher_columns(self._distiller.teacher, self._part()))

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As in [`Trainer`], without what only the teacher reads: that is laid aside for it."""
        prepared = super()._prepare_inputs(inputs)
        if self._distiller is not None and isinstance(prepared, Mapping):
            columns = teacher_columns(self._distiller.teacher, self._part())
            self._for_teacher = {name: prepared[name] for name in columns if name in prepared}
            if self._for_teacher:
                return {name: value for name, value in prepared.items() if name not in self._for_teacher}
        return prepared

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
        if self._distiller is not None and not self._teacher_asked:
            raise ValueError(
                f"`teacher` was not asked: a `compute_loss` of {type(self).__name__} computes its loss without "
                f"OTOTrainer's. Let it call `super().compute_loss(model, inputs, return_outputs=True, …)` and go on "
                f"from that, hand a function over as `compute_loss_func`, or leave `teacher` out."
            )
        if self._drops_nothing:
            model.train()
        if not math.isfinite(float(loss)):
            raise FloatingPointError(
                f"The loss is {float(loss)} at step {self.state.global_step}. Training stops before it spoils the "
                f"weights; checkpoints in {self.args.output_dir!r} are as they were. Lower the learning rate, and go "
                f"on from the last one."
            )
        synced = self.accelerator.sync_gradients
        # Between processes only the last micro-step's gradients agree.
        if self.hspg is not None and (synced or self.args.world_size == 1):
            scaler = self.accelerator.scaler
            self.hspg.observe(loss_scale=1.0 if scaler is None else scaler.get_scale(), accumulated=self._accumulating)
        self._accumulating = not synced and self.args.world_size == 1
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # After a step, and before anything is saved: what is saved at the target is then all of one size.
        hspg = self.hspg if self.oto_config.shrink_during_training else None
        if hspg is not None and hspg.shrink_due and self._unshrinkable is None:
            shrink(self._part(), hspg)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.hspg is not None:
            stage: Any = self.hspg.stage
            logs = {**logs, **self.hspg.metrics(), "stage": stage}
        super().log(logs, start_time)
        stages = [entry["stage"] for entry in self.state.log_history if "stage" in entry][-2:]
        if "train_runtime" in logs or ("stage" in logs and len(set(stages)) == 2):  # the end, or a new stage
            callbacks = self.callback_handler.callbacks
            showing.add_to_tensorboard(callbacks, self._pictures, self.state.global_step)

    def _pictures(self, small: PreTrainedModel | None = None) -> dict[str, Any]:
        # The large one knows better which heads are kept, if it is whole.
        return showing.pictures(small or self._part(), self.oto_config, self.state.log_history)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        at_target = self.hspg is None or self.hspg.target_reached or self.oto_config.target_sparsity is None
        return at_target and super()._determine_best_metric(metrics, trial)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """
        As [`Trainer.train`]. Unless nothing is to be saved, the small model is in `output_dir` at the end; or, if the
        run stopped before it reached its target, a checkpoint to resume from.
        """
        saves = self.args.save_strategy != SaveStrategy.NO
        if saves and self.args.should_save and os.path.isdir(self._output_dir):
            check_writable(self._output_dir)
            checkpoints.clear(Path(self._output_dir))
        self._accumulating = False  # an earlier call may have broken off between two micro-steps
        self._newest_checkpoint = None
        output = super().train(*args, **kwargs)
        if self.state.is_hyper_param_search:
            return output
        if self._target_ahead:
            self._keep_for_later()
        elif saves:
            self._save_small(self._output_dir)
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that is resumed when all its steps are done would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    @property
    def _target_ahead(self) -> bool:
        """Whether the model is larger than it was asked for, because the run has not come that far."""
        hspg = self.hspg
        return hspg is not None and self.oto_config.target_sparsity is not None and not hspg.target_reached

    def _keep_for_later(self) -> None:
        """At the end of a run that stopped before its target: a checkpoint, and no model that looks finished."""
        hspg = cast(HSPG, self.hspg)
        kept = "Nothing is saved, as `save_strategy` or `save_only_model` asks for"
        if self.args.save_strategy != SaveStrategy.NO and not self.args.save_only_model:
            if self._newest_checkpoint != self.state.global_step:
                self._save_checkpoint(cast(nn.Module, self.model), trial=None)
            kept = (
                f"The run is kept in {Path(self._output_dir, checkpoints.name_of(self.state.global_step))}, "
                f"from where `train(resume_from_checkpoint=True)` goes on"
            )
        logger.warning(
            f"Training stopped at step {hspg.steps_done} of {hspg.schedule.total_steps}, in stage {hspg.stage!r}. "
            f"`target_sparsity`={self.oto_config.target_sparsity} is not reached: no small model is written. {kept}."
        )

    # Resuming.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights now, or, if they are of a model that had been shrunk, when the optimizer can follow."""
        part, saved = self._part(), self._saved_config(resume_from_checkpoint)
        groups = partition(part)
        counts = list(zip(groups.counts("heads"), groups.counts("neurons"), strict=True))
        if saved is None or block_counts(saved) == counts:
            checkpoints.check_shapes(resume_from_checkpoint, self._whole_model(), part)
            self._load_weights(resume_from_checkpoint, model)
        elif not self.oto_config.shrink_during_training:
            raise ValueError(
                f"{resume_from_checkpoint} has {block_counts(saved)} (heads, neurons) in its blocks, `model` "
                f"{counts}. Resume with the model that the run began with, and with `shrink_during_training=True` if "
                f"it had that."
            )
        else:
            self._shrunk_checkpoint = resume_from_checkpoint

    def _load_weights(self, checkpoint: str, model: nn.Module | None) -> None:
        # Not every Trainer takes `model`, and upstream gives one under FSDP alone.
        super()._load_from_checkpoint(checkpoint, *([] if model is None else [model]))

    def _saved_config(self, checkpoint: str) -> Any:
        part = self._part()
        return saved_config(checkpoint, partition(part).model_type, path_of(self._whole_model(), part))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
            checkpoints.check_complete(checkpoint, None if plugin is None else str(plugin.state_dict_type))
        super()._load_optimizer_and_scheduler(checkpoint)

    # Saving.

    def compressed_model(self) -> PreTrainedModel | None:
        """
        The small model: a new one, cut out of the one in training and checked against it. Where that is sharded, every
        rank has to call it, and only the first one gets the small model, on the CPU; the others get `None`.

        Raises:
            `ValueError`: The cut model does not compute what the one in training computes.
        """
        if self.hspg is not None and self._target_ahead:
            logger.warning(
                f"The target is not reached at step {self.hspg.steps_done} (stage {self.hspg.stage!r}): the model is "
                f"larger than `target_sparsity`={self.oto_config.target_sparsity} asks for."
            )
        part = self._part()
        model = gather(part) if is_sharded(part) else part
        if model is None:
            return None
        return compress(model, show_progress=not self.args.disable_tqdm and self.is_world_process_zero())

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoints_folder or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, name = Path(self._get_output_dir(trial)), checkpoints.name_of(self.state.global_step)
        writes, wait = self.args.should_save, self.accelerator.wait_for_everyone
        with checkpoints.appearing(run / name, writes=writes, wait=wait) as folder:
            self._checkpoints_folder = str(folder)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._checkpoints_folder = None
            best = checkpoints.name_of(self.state.best_global_step)
            if best == name or (run / best).is_dir():
                self.state.best_model_checkpoint = str(run / best)
            if writes:
                self.state.save_to_json(str(folder / name / TRAINER_STATE_NAME))  # with the best one's place
        if writes:
            checkpoints.remove_superfluous(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        self._newest_checkpoint = self.state.global_step
        wait()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the small model, so that `from_pretrained` loads it, with pictures of it and of the run if there is
        matplotlib. A model around it is saved as Trainer saves it, with the small part in it, and the part beside it
        in a folder of its own. A training checkpoint is saved full-size.

        The folder gets all of its files or none. What else is in it stays.

        Raises:
            `ValueError`: The cut model does not compute what the one in training computes, or the folder holds a
                checkpoint to resume from, whose weights would be lost.
        """
        if _internal_call and output_dir is not None:  # upstream names the folder for a checkpoint alone
            self._save_full(output_dir)
            return
        self._save_small(output_dir or self._output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_full(self, folder: str) -> None:
        """The model as it is in training, under its own names: Trainer resumes by `load_state_dict`."""
        whole, part = self._whole_model(), self._part()
        with own_names(whole), own_names(part):
            super().save_model(folder, _internal_call=True)
        if self.args.should_save and whole is not part:
            save_beside(Path(folder), whole, part, weights=False)

    def _save_small(self, folder: str) -> None:
        writes, small = self.args.should_save, None
        if is_sharded(self._part()):  # all ranks gather it, before the one that writes may fail
            small = self.compressed_model()
            writes = small is not None
        if not writes:
            return
        self._finish_current_push()  # which may still read the files that are about to change
        with replacing(Path(folder)) as unfinished:
            small = small or cast(PreTrainedModel, self.compressed_model())
            pictures = self._pictures(small if is_sharded(self._part()) else None)
            full, whole, part = self.model, self._whole_model(), self._part()
            self.model = cast(Any, self.put_back(whole, small))
            try:
                with explaining(Path(folder)):
                    self._save(str(unfinished))
                    save_beside(unfinished, cast(nn.Module, self.model), small, weights=True)
            finally:
                if whole is not part:
                    self.put_back(whole, part)
                self.model = full
            save_figures(pictures, unfinished)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.oto_config.save_pretrained(output_dir or self._output_dir)

    # The Hub.

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the small model of this step with its code, and the checkpoint where the strategy asks for it."""
        if self._checkpoints_folder is not None:  # it has no place yet
            return
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not (self.args.hub_always_push or self.push_in_progress is None or self.push_in_progress.is_done()):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._save_small(self._output_dir)
        repo_id, step = cast(str, self.hub_model_id), self.state.global_step
        self.push_in_progress = cast(Any, start_push(self.args, repo_id, step, checkpoint_folder))

    def create_model_card(self, *args: Any, dense_metrics: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        """
        As [`Trainer.create_model_card`], with what was removed, what every layer kept and how to load the model. Where
        the data set is known, or its id is given as `dataset_tags`, the last evaluation is in the leaderboards' form.

        Args:
            dense_metrics (`Mapping[str, float]`, *optional*):
                Metrics of the dense model, to be put beside those of the last evaluation that have the same names
                (`{"eval_f1": 88.5}`). [`~Trainer.push_to_hub`] passes it on.
        """
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            showing.complete_card(
                Path(self._output_dir, "README.md"),
                self._part(),
                self.oto_config,
                self.state.log_history,
                repo_id=self.hub_model_id or self._output_dir,
                said=inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments,
                dense_scores=dense_metrics,
            )
