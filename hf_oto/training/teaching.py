"""A [`Trainer`] whose model learns from a teacher beside the labels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..config import OTOConfig
from .distillation import Distiller, load_teacher, share_of_step, sums_items, teacher_columns


class TaughtTrainer(Trainer):
    """
    [`Trainer`], with a teacher. Of pruning it knows nothing.

    Args:
        oto_config ([`OTOConfig`], *optional*): How much is learnt from the teacher, and how.
        teacher_model ([`PreTrainedModel`], `str` or `os.PathLike`, *optional*): See [`OTOTrainer`].
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
        oto_config: OTOConfig | None = None,
        teacher_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.oto_config = OTOConfig() if oto_config is None else oto_config
        if model is not None:  # before Trainer makes `output_dir`
            teacher_model = self._load_teacher(teacher_model, model)
        self._teacher_asked = False
        self._for_teacher: dict[str, Any] = {}  # what it alone reads of the batch
        super().__init__(model, args, *others, **kwargs)
        loaded = self._load_teacher(teacher_model, self.model)
        self.teacher_model = None if loaded is None else cast(nn.Module, loaded).to(self.args.device).eval()

    def _load_teacher(
        self, teacher: PreTrainedModel | str | os.PathLike[str] | None, model: Any
    ) -> PreTrainedModel | None:
        if teacher is None:
            return None
        return load_teacher(teacher, model, hidden_states=self.oto_config.distillation_hidden_weight > 0)

    def _whole_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

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
        student, weight = cast(PreTrainedModel, self._whole_model()), self.oto_config.distillation_weight
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
        if self.teacher_model is None:
            return None
        distiller = Distiller(cast(PreTrainedModel, self.teacher_model), self.oto_config)
        return distiller if distiller.teaches else None

    def _set_signature_columns_if_needed(self) -> None:
        missing = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if missing and self._distiller is not None:
            columns: Any = self._signature_columns
            columns.extend(teacher_columns(self._distiller.teacher, cast(PreTrainedModel, self._whole_model())))

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As in [`Trainer`], without what only the teacher reads: that is laid aside for it."""
        prepared = super()._prepare_inputs(inputs)
        if self._distiller is not None and isinstance(prepared, Mapping):
            columns = teacher_columns(self._distiller.teacher, cast(PreTrainedModel, self._whole_model()))
            self._for_teacher = {name: prepared[name] for name in columns if name in prepared}
            if self._for_teacher:
                return {name: value for name, value in prepared.items() if name not in self._for_teacher}
        return prepared

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._distiller is not None and not self._teacher_asked:
            raise ValueError(
                f"`teacher_model` was not asked: a `compute_loss` of {type(self).__name__} computes its loss without "
                f"OTOTrainer's. Let it call `super().compute_loss(model, inputs, return_outputs=True, …)` and go on "
                f"from that, hand a function over as `compute_loss_func`, or leave `teacher_model` out."
            )
        return loss
