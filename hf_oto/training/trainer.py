"""A [`Trainer`] that makes the model small while it trains it."""

from __future__ import annotations

import inspect
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, upload_folder
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainingArguments, get_wsd_schedule
from transformers.integrations import TensorBoardCallback
from transformers.modelcard import TASK_MAPPING
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    HubStrategy,
    SaveStrategy,
    SchedulerType,
    sort_checkpoints,
)
from transformers.utils import PushInProgress, logging

from ..config import OTOConfig
from ..hspg.optimizer import HSPG
from ..hspg.schedule import Schedule
from ..models.folders import UNFINISHED, folder_beside
from ..models.groups import partition
from ..models.modes import dropping_modules
from ..models.saved_names import own_names
from ..models.sharding import is_sharded
from ..models.surgery import auto_class_of, compress, gather, shrink
from ..report.card import card_section, figures, leaderboard_results, save_figures
from ..report.summary import summarize
from .distillation import Distiller, load_teacher, share_of_step, sums_items, teacher_columns
from .refusals import (
    NO_DEEPSPEED,
    check_model,
    check_optimizer,
    check_parallelism,
    check_shapes,
    check_writable,
    group_counts,
    saved_counts,
)

logger = logging.get_logger(__name__)

# Where a checkpoint is written; a push leaves out what begins with an underscore.
_UNFINISHED = "_unfinished"
_WEIGHTS = "*model*.safetensors*"  # whole, in shards, and the shards' index
# What `output_dir` holds beside the model: upstream leaves the same out of its pushes.
_NOT_THE_MODEL = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", f".*{UNFINISHED}*")

# Where FSDP2 keeps the optimizer's state in a checkpoint, in place of `OPTIMIZER_NAME`: full, or sharded.
_SHARDED_OPTIMIZER_NAMES = ("optimizer.bin", "optimizer_0")


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
            check_model(model, self.oto_config)
            teacher = self._load_teacher(teacher, model)
        check_optimizer(args)
        check_parallelism(model, args)
        self._total_steps: int | None = None
        self._saving_checkpoint = False
        self._accumulating = False
        self._waiting_checkpoint: str | None = None
        self._newest_checkpoint: int | None = None  # the step of the one that this run wrote last
        super().__init__(model, args, *others, **kwargs)
        self._check_supported()
        loaded = self._load_teacher(teacher, self.model)
        self.teacher = None if loaded is None else cast(nn.Module, loaded).to(self.args.device).eval()
        self._teacher_asked = False
        self._for_teacher: dict[str, Any] = {}  # what it alone reads of the batch

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

    def _plain_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple[Any, ...]:
        values = super().set_initial_training_values(args, dataloader)
        self._total_steps = values[-1]
        return values

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        self._total_steps = num_training_steps
        super().create_optimizer_and_scheduler(num_training_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        optimizer = super().create_optimizer(*([] if model is None else [model]))
        if _hspg_in(optimizer) is None:
            self._wrap_optimizer(optimizer)
        self._load_waiting_checkpoint()
        return cast(Optimizer, self.optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        given = cast(dict[str, Any], self.args.lr_scheduler_kwargs or {})
        wanted = self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and "num_decay_steps" not in given
        if not wanted or self.lr_scheduler is not None or self.oto_config.target_sparsity is None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        pruned = Schedule.from_config(self.oto_config, num_training_steps).boundaries[-1]
        if warmup > pruned:
            raise ValueError(
                f"`warmup_steps` must end before the target is reached for `lr_scheduler_type`='warmup_stable_decay', "
                f"got {warmup} and {pruned} of {num_training_steps} steps. Give `lr_scheduler_kwargs` its own "
                f"`num_decay_steps`, or shorten it."
            )
        self.lr_scheduler = get_wsd_schedule(
            cast(Optimizer, optimizer or self.optimizer),
            num_warmup_steps=warmup,
            num_decay_steps=num_training_steps - pruned,
            num_training_steps=num_training_steps,
            **{"decay_type": "linear", **given},
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _wrap_optimizer(self, optimizer: Optimizer) -> None:
        if self._total_steps is None:
            raise ValueError(
                "OTOTrainer needs the number of training steps to make its optimizer: call `train`, or "
                "`create_optimizer_and_scheduler(num_training_steps)`."
            )
        plain = self._plain_model()
        check_model(plain, self.oto_config)
        names = {parameter: name for name, parameter in plain.named_parameters()}
        for group in optimizer.param_groups:
            group["param_names"] = [names[parameter] for parameter in group["params"]]
        self.optimizer = HSPG(optimizer, partition(plain), self.oto_config, self._total_steps)
        if self.oto_config.shrink_during_training and (reason := self._unshrinkable):
            logger.warning(f"The model is trained in full size, `shrink_during_training` does nothing: {reason}.")

    @property
    def _unshrinkable(self) -> str | None:
        if self.oto_config.target_sparsity is None:
            return "`target_sparsity`=None has no pruning periods"
        if self.is_fsdp_enabled or is_sharded(self._plain_model()):
            return "its parameters are sharded"
        if self.args.world_size > 1:
            return "DistributedDataParallel goes by the weights that it was given"
        return None if self.hspg is None else self.hspg.unshrinkable

    @property
    def hspg(self) -> HSPG | None:
        """The optimizer that prunes, without accelerate's wrapper. `None` before training."""
        return _hspg_in(self.optimizer)

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
        student, weight = self._plain_model(), self.oto_config.distillation_weight
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
            columns.extend(teacher_columns(self._distiller.teacher, self._plain_model()))

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As in [`Trainer`], without what only the teacher reads: that is laid aside for it."""
        prepared = super()._prepare_inputs(inputs)
        if self._distiller is not None and isinstance(prepared, Mapping):
            columns = teacher_columns(self._distiller.teacher, self._plain_model())
            self._for_teacher = {name: prepared[name] for name in columns if name in prepared}
            if self._for_teacher:
                return {name: value for name, value in prepared.items() if name not in self._for_teacher}
        return prepared

    def compute_loss_context_manager(self) -> Any:
        # Trainer has just set the model to training mode. The backward pass may go through the blocks once more.
        if self._plain_model().training and self._drops_nothing:
            for module in dropping_modules(self._plain_model()):
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
            shrink(self._plain_model(), hspg)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.hspg is not None:
            stage: Any = self.hspg.stage
            logs = {**logs, **self.hspg.metrics(), "stage": stage}
        super().log(logs, start_time)
        stages = [entry["stage"] for entry in self.state.log_history if "stage" in entry][-2:]
        if "train_runtime" in logs or ("stage" in logs and len(set(stages)) == 2):  # the end, or a new stage
            self._add_to_tensorboard()

    def _add_to_tensorboard(self) -> None:
        """Put the pictures beside the numbers, where TensorBoard is among `report_to`."""
        for callback in self.callback_handler.callbacks:
            writer: Any = callback.tb_writer if isinstance(callback, TensorBoardCallback) else None
            if writer is not None:
                for name, figure in self._figures().items():
                    writer.add_figure(name, figure, self.state.global_step)

    def _figures(self, small: PreTrainedModel | None = None) -> dict[str, Any]:
        """The pictures; none of a sharded model, unless it is gathered and cut already."""
        model = small or self._plain_model()  # which knows better which heads are kept, if it is whole
        if is_sharded(model):
            return {}
        config = self.oto_config
        summary = summarize(model, sequence_length=config.macs_sequence_length, latency_table=config.latency_table)
        return figures(summary, self.state.log_history)

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
            shutil.rmtree(Path(self._output_dir, _UNFINISHED), ignore_errors=True)  # of a run that was killed
        self._accumulating = False  # an earlier call may have broken off between two micro-steps
        self._newest_checkpoint = None
        output = super().train(*args, **kwargs)
        if self.state.is_hyper_param_search:
            return output
        if self._target_ahead:
            self._keep_for_later()
        elif saves:
            self.save_model(_internal_call=True)
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
                f"The run is kept in {Path(self._output_dir, f'{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}')}, "
                f"from where `train(resume_from_checkpoint=True)` goes on"
            )
        logger.warning(
            f"Training stopped at step {hspg.steps_done} of {hspg.schedule.total_steps}, in stage {hspg.stage!r}. "
            f"`target_sparsity`={self.oto_config.target_sparsity} is not reached: no small model is written. {kept}."
        )

    # Resuming.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights now, or, if they are of a model that had been shrunk, when the optimizer can follow."""
        counts = saved_counts(resume_from_checkpoint)
        if counts is None or counts == group_counts(self._plain_model()):
            check_shapes(resume_from_checkpoint, self._plain_model())
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif not self.oto_config.shrink_during_training:
            raise ValueError(
                f"{resume_from_checkpoint} has {counts} (heads, neurons) in its blocks, `model` "
                f"{group_counts(self._plain_model())}. Resume with the model that the run began with, and with "
                f"`shrink_during_training=True` if it had that."
            )
        else:
            self._waiting_checkpoint = resume_from_checkpoint

    def _load_waiting_checkpoint(self) -> None:
        checkpoint, self._waiting_checkpoint = self._waiting_checkpoint, None
        if checkpoint is not None and self.hspg is not None:
            shrink(self._plain_model(), self.hspg, like=AutoConfig.from_pretrained(checkpoint))
            super()._load_from_checkpoint(checkpoint)

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
        model: PreTrainedModel | None = self._plain_model()
        if is_sharded(self._plain_model()):
            model = gather(self._plain_model())
        if model is None:
            return None
        return compress(model, show_progress=not self.args.disable_tqdm and self.is_world_process_zero())

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _UNFINISHED) if self._saving_checkpoint else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, where it appears when all ranks have written all of it."""
        run, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        made = run / _UNFINISHED / name
        if self.args.should_save:
            shutil.rmtree(made.parent, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        self._saving_checkpoint = True
        try:
            with _writing(run / name):
                super()._save_checkpoint(model, trial)
                best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                if best == name or (run / best).is_dir():
                    self.state.best_model_checkpoint = str(run / best)
                if self.args.should_save:
                    self.state.save_to_json(str(made / TRAINER_STATE_NAME))  # with the best one's place
            self.accelerator.wait_for_everyone()
        except BaseException:
            shutil.rmtree(made.parent, ignore_errors=True)
            raise
        finally:
            self._saving_checkpoint = False
        if self.args.should_save:
            if (run / name).exists():
                (run / name).rename(made.with_name("replaced"))
            made.rename(run / name)
            for path in self._superfluous(run):
                path.rename(made.with_name(path.name))  # gone at once: one that is half removed must not be read
            shutil.rmtree(made.parent)
        self._newest_checkpoint = self.state.global_step
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _superfluous(self, run: Path) -> list[Path]:
        """Checkpoints beyond `save_total_limit`. The newest and the best one are never."""
        limit, best = self.args.save_total_limit or 0, self.state.best_model_checkpoint
        found = [Path(path) for path in sort_checkpoints(str(run), use_mtime=True, best_model_checkpoint=best)]
        protected = {found[-1], found[-1] if best is None else Path(best)}
        return found[: -max(limit, len(protected))] if limit > 0 else []

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = OPTIMIZER_NAME
        if checkpoint is not None and self.is_fsdp_enabled:
            full = "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
            optimizer = _SHARDED_OPTIMIZER_NAMES[0 if full else 1]
        needed = (optimizer, SCHEDULER_NAME, TRAINER_STATE_NAME)
        if checkpoint is not None and (lost := [name for name in needed if not Path(checkpoint, name).exists()]):
            raise ValueError(
                f"{checkpoint} lacks {', '.join(lost)}: the groups that are zero and the step would be forgotten. "
                f"Resume from a complete checkpoint, or start a new run from its weights."
            )
        super()._load_optimizer_and_scheduler(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the small model, so that `from_pretrained` loads it, with pictures of it and of the run if there is
        matplotlib. A training checkpoint is saved full-size.

        The folder gets all of its files or none. What else is in it stays.

        Raises:
            `ValueError`: The cut model does not compute what the one in training computes, or the folder holds a
                checkpoint to resume from, whose weights would be lost.
        """
        if self._saving_checkpoint:
            super().save_model(output_dir, _internal_call)
            return
        writes, small = self.args.should_save, None
        if is_sharded(self._plain_model()):  # all ranks gather it, before the one that writes may fail
            small = self.compressed_model()
            writes = small is not None
        if writes:
            self._finish_current_push()  # which may still read the files that are about to change
            with _replacing(Path(output_dir or self._output_dir)) as folder:
                full, self.model = self.model, small or self.compressed_model()
                try:
                    with _writing(Path(output_dir or self._output_dir)):
                        self._save(str(folder))
                finally:
                    self.model = full
                save_figures(self._figures(small), folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # The Hub.

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the small model of this step with its code, and the checkpoint where the strategy asks for it."""
        if self._saving_checkpoint:  # and it has no place yet
            return
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not (self.args.hub_always_push or self.push_in_progress is None or self.push_in_progress.is_done()):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        step = f"step {self.state.global_step}"
        jobs = [self._upload(self._output_dir, f"Training in progress, {step}", _NOT_THE_MODEL)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if last else Path(checkpoint_folder).name
            jobs.append(self._upload(checkpoint_folder, f"Checkpoint of {step}", path_in_repo=place))
        pushes: Any = PushInProgress(cast(Any, jobs))
        self.push_in_progress = pushes

    def _upload(self, folder: str, message: str, ignored: Sequence[str] = (), path_in_repo: str | None = None) -> Any:
        return upload_folder(
            repo_id=cast(str, self.hub_model_id),
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=message,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            ignore_patterns=list(ignored),
            run_as_future=True,
        )

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
        if not self.is_world_process_zero():
            return
        path = Path(self._output_dir, "README.md")
        config = self.oto_config
        summary = summarize(
            self._plain_model(), sequence_length=config.macs_sequence_length, latency_table=config.latency_table
        )
        pictures = self._figures()
        save_figures(pictures, path.parent)
        logged = [entry for entry in self.state.log_history if any(name.startswith("eval_") for name in entry)]
        section = card_section(
            summary,
            repo_id=self.hub_model_id or self._output_dir,
            auto_class=auto_class_of(self._plain_model()),
            pictures=tuple(pictures),
            scores=logged[-1] if logged else None,
            dense_scores=dense_metrics,
        )
        card = ModelCard.load(path)
        said = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
        ids = card.data.datasets or []
        names = said.get("dataset") or ids
        card.data.model_name = card.data.model_name or path.parent.name
        card.data.eval_results = leaderboard_results(
            logged[-1] if logged else {},
            tasks=_listed(said.get("tasks")) or self._hub_tasks(),
            datasets=dict(zip(ids, _listed(names), strict=False)),
        )
        draft, heading, rest = card.text.partition("## Model description")
        card.text = draft + section + heading + rest
        card.data.tags = sorted({*(card.data.tags or []), "hf-oto", "pruned"})
        card.save(path)

    def _hub_tasks(self) -> list[str]:
        """What the Hub calls the model's task."""
        name = type(self._plain_model()).__name__
        known = cast(dict[str, dict[str, str]], TASK_MAPPING)
        return [task for task, classes in known.items() if name in classes.values()]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Trainer resumes by `load_state_dict`.
        with own_names(self._plain_model()) if self._saving_checkpoint else nullcontext():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.oto_config.save_pretrained(output_dir or self._output_dir)


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _hspg_in(optimizer: Any) -> HSPG | None:
    while optimizer is not None and not isinstance(optimizer, HSPG):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Say what could not be written: torch and safetensors name an internal file of theirs, or none."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(target.parent if target.parent.exists() else os.curdir).free
        raise OSError(
            f"{target} could not be written: {error}. The disk has {free / 2**20:.1f} MiB left. What was saved before "
            f"is as it was. Make room if that is little, and go on from the last checkpoint."
        ) from error


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """
    A folder to write into, whose files move into `target` when all is written; on an error nothing changes.
    """
    of_checkpoints = (OPTIMIZER_NAME, SCHEDULER_NAME, *_SHARDED_OPTIMIZER_NAMES)
    if found := [name for name in of_checkpoints if (target / name).exists()]:
        raise ValueError(
            f"{target} holds a checkpoint to resume from ({', '.join(found)}), whose weights would be lost. Save the "
            f"small model elsewhere."
        )
    # Within a folder that is there: it may be the root of its disk.
    with folder_beside(target / "model" if target.is_dir() else target) as folder:
        yield folder
        if not target.exists():
            folder.rename(target)
            return
        # Old weights go first and the new ones come last, their index behind them: at no moment does it load as
        # something that is neither model.
        for path in target.glob(_WEIGHTS):
            path.unlink()
        for path in sorted(folder.iterdir(), key=lambda path: (path.match(_WEIGHTS), path.suffix == ".json")):
            path.replace(target / path.name)
