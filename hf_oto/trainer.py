"""A [`Trainer`] that makes the model small while it trains it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import SaveStrategy
from transformers.utils import CONFIG_NAME, logging

from . import budget
from .config import OTOConfig
from .groups import partition
from .hspg import HSPG
from .surgery import block_counts, check_compressible, compress, shrink

logger = logging.get_logger(__name__)

# These step during backward, or keep weights or states that are no longer laid out as the model's weights.
_REFUSED_OPTIMIZERS = ("lomo", "layerwise", "galore", "apollo", "schedule_free")


class OTOTrainer(Trainer):
    r"""
    [`Trainer`], with one more argument: it drives attention heads and FFN neurons to zero while it trains, and saves a
    model without them.

    The optimizer of [`TrainingArguments`] keeps its meaning; [`HSPG`] wraps it. `checkpoint-N` folders hold the model
    in training and all that resuming needs; it is full-size, unless `shrink_during_training` has cut it since.
    [`~OTOTrainer.save_model`], a push to the Hub and the end of training write the small model, which
    `from_pretrained` loads. `load_best_model_at_end` considers only evaluations at the target: before it, a model
    scores better because it is larger.

    Args:
        oto_config ([`OTOConfig`], *optional*):
            The settings of the compression; all defaults if `None`. Everything else is as in [`Trainer`].

    Raises:
        `ValueError`: The model is not supported, the target cannot be reached from it, or another setting rules
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
        **kwargs: Any,
    ) -> None:
        self.oto_config = OTOConfig() if oto_config is None else oto_config
        if not isinstance(self.oto_config, OTOConfig):
            raise TypeError(f"`oto_config` must be an OTOConfig, got {type(oto_config).__name__}.")
        # Before Trainer makes `output_dir`.
        if model is not None:
            _check_model(model, self.oto_config)
        optim = str(getattr(args, "optim", "")).rpartition(".")[2].lower()
        if any(name in optim for name in _REFUSED_OPTIMIZERS):
            raise ValueError(
                f"`optim`={optim!r} is not supported by OTOTrainer: it steps during backward, or keeps weights or "
                f"states that are not laid out as the model's weights. Use another, such as 'adamw_torch'."
            )
        self._total_steps: int | None = None
        self._saving_checkpoint = False
        self._accumulating = False
        self._waiting_checkpoint: str | None = None
        super().__init__(model, args, *others, **kwargs)
        self._check_supported()

    # Before the first step.

    def _check_supported(self) -> None:
        """Refuse what would train something else than it says."""
        if self.is_deepspeed_enabled:
            raise ValueError("`deepspeed` is not supported by OTOTrainer: it keeps its own copies of the weights.")
        if self.is_fsdp_enabled or self.is_fsdp_xla_enabled:
            raise ValueError("`fsdp` is not supported by OTOTrainer. HSPG itself runs under `fully_shard`.")
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel is not supported by OTOTrainer. Launch one process per GPU.")

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

    def _wrap_optimizer(self, optimizer: Optimizer) -> None:
        if self._total_steps is None:
            raise ValueError(
                "OTOTrainer needs the number of training steps to make its optimizer: call `train`, or "
                "`create_optimizer_and_scheduler(num_training_steps)`."
            )
        plain = self._plain_model()
        _check_model(plain, self.oto_config)
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
        if self.args.world_size > 1:
            return "DistributedDataParallel goes by the weights that it was given"
        return None if self.hspg is None else self.hspg.unshrinkable

    @property
    def hspg(self) -> HSPG | None:
        """The optimizer that prunes, without accelerate's wrapper. `None` before training."""
        return _hspg_in(self.optimizer)

    # Training.

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
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

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        at_target = self.hspg is None or self.hspg.target_reached or self.oto_config.target_sparsity is None
        return at_target and super()._determine_best_metric(metrics, trial)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As [`Trainer.train`]. Unless nothing is to be saved, the small model is in `output_dir` at the end."""
        self._accumulating = False  # an earlier call may have broken off between two micro-steps
        output = super().train(*args, **kwargs)
        if self.args.save_strategy != SaveStrategy.NO and not self.state.is_hyper_param_search:
            self.save_model(_internal_call=True)
        return output

    # Resuming.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights now, or, if they are of a model that had been shrunk, when the optimizer can follow."""
        counts = _saved_counts(resume_from_checkpoint)
        if counts is None or counts == _counts(self._plain_model()):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif not self.oto_config.shrink_during_training:
            raise ValueError(
                f"{resume_from_checkpoint} has {counts} (heads, neurons) in its blocks, `model` "
                f"{_counts(self._plain_model())}. Resume with the model that the run began with, and with "
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

    def compressed_model(self) -> PreTrainedModel:
        """
        The small model: a new one, cut out of the one in training and checked against it.

        Raises:
            `ValueError`: The cut model does not compute what the one in training computes.
        """
        if self.hspg is not None and self.oto_config.target_sparsity is not None and not self.hspg.target_reached:
            logger.warning(
                f"The target is not reached at step {self.hspg.steps_done} (stage {self.hspg.stage!r}): the model is "
                f"larger than `target_sparsity`={self.oto_config.target_sparsity} asks for."
            )
        return compress(self._plain_model())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the small model, so that `from_pretrained` loads it. A training checkpoint is saved full-size.

        The folder gets all of its files or none. What else is in it stays.

        Raises:
            `ValueError`: The cut model does not compute what the one in training computes, or the folder holds a
                checkpoint to resume from, whose weights would be lost.
        """
        if self._saving_checkpoint:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            with _replacing(Path(output_dir or self._output_dir)) as folder:
                full, self.model = self.model, self.compressed_model()
                try:
                    super().save_model(str(folder), _internal_call=True)
                finally:
                    self.model = full
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.oto_config.save_pretrained(output_dir or self._output_dir)


def _check_model(model: nn.Module, config: OTOConfig) -> None:
    """Refuse a model without groups or a pruned class, with frozen groups, or with the target behind it."""
    groups = partition(model)
    budget.check_target(groups, config)
    check_compressible(cast(PreTrainedModel, model))
    parameters = dict(model.named_parameters())
    owned = [name for array in groups.arrays if array.kind in config.structures for name, _ in array.members]
    if frozen := [name for name in owned if not parameters[name].requires_grad]:
        raise ValueError(
            f"`model` has {len(frozen)} frozen parameters in zero-invariant groups ({frozen[0]!r}, …). Train them, or "
            f"leave their kind out of `structures`."
        )


def _counts(model: nn.Module) -> list[tuple[int, int]]:
    """Heads and neurons of every block of a model."""
    groups = partition(model)
    return list(zip(groups.counts("heads"), groups.counts("neurons"), strict=True))


def _saved_counts(checkpoint: str) -> list[tuple[int, int]] | None:
    """Heads and neurons of every block of a saved model, `None` where there is no config."""
    if not (Path(checkpoint) / CONFIG_NAME).is_file():
        return None
    return block_counts(AutoConfig.from_pretrained(checkpoint))


def _hspg_in(optimizer: Any) -> HSPG | None:
    while optimizer is not None and not isinstance(optimizer, HSPG):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """
    A folder to write into, whose files move into `target` when all is written; on an error nothing changes.

    Weights that `target` held before go, or shards of the old model would lie beside the new one's.
    """
    if found := [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if (target / name).is_file()]:
        raise ValueError(
            f"{target} holds a checkpoint to resume from ({', '.join(found)}), whose weights would be lost. Save the "
            f"small model elsewhere."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that had this number and was killed
    folder.mkdir()
    try:
        yield folder
        if not target.exists():
            folder.rename(target)
            return
        written = {path.name for path in folder.iterdir()}
        for path in folder.iterdir():
            path.replace(target / path.name)
        for path in target.glob("*model*.safetensors*"):
            if path.name not in written:
                path.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
