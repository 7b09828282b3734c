"""Losses against a teacher: what the model in training learns from the outputs of a larger one.

Shapes: `B` sequences, `L` tokens or frames, `C` classes (or positions of an answer), `H` hidden size, `N` items: what
one distribution is predicted for.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import find_labels

from ..config import OTOConfig
from ..models.sharding import check_placed

logger: Any = logging.get_logger(__name__)  # upstream's has `warning_once`, of which checkers do not know

IGNORED = -100  # the label of a token that counts in no loss

_NO_NAME = re.compile(r"LABEL_\d+")  # of a class that nobody has named


class Distiller:
    """
    Asks a teacher, and compares the model in training with it.

    Args:
        teacher ([`PreTrainedModel`]): As [`load_teacher`] gives it, on the device of the training.
        config ([`OTOConfig`]): How much of what is learnt, and at which temperature.
    """

    def __init__(self, teacher: PreTrainedModel, config: OTOConfig) -> None:
        self.teacher, self.config = teacher, config

    @property
    def teaches(self) -> bool:
        """Whether anything is learnt from the teacher."""
        return self.config.distillation_weight > 0 or self.config.distillation_hidden_weight > 0

    @property
    def options(self) -> dict[str, bool]:
        """What both forwards are asked for beyond their usual outputs."""
        return {"output_hidden_states": True} if self.config.distillation_hidden_weight else {}

    def __call__(
        self, student: PreTrainedModel, outputs: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | int]:
        """
        The loss against the teacher per item, weighted, and the number of items.

        Args:
            student ([`PreTrainedModel`]): The model in training, not wrapped.
            outputs (`Mapping[str, Any]`): What it gave, with the [`~Distiller.options`].
            inputs (`Mapping[str, Any]`): What it got, labels too, and what the teacher alone reads.
        """
        expected = self.ask(student, inputs)
        terms: list[Tensor] = []
        count: Tensor | int = 1
        if self.config.distillation_weight:
            loss, count = self._compare(student, outputs, expected, inputs)
            terms.append(self.config.distillation_weight * loss)
        if self.config.distillation_hidden_weight:
            states, theirs = outputs["hidden_states"], expected["hidden_states"]
            real_BL = real_positions(student, inputs.get("attention_mask"), states[-1], encoder=True)
            terms.append(self.config.distillation_hidden_weight * hidden_states_loss(states, theirs, real_BL))
        return torch.stack(terms).sum(), count

    @torch.no_grad()
    def ask(self, student: PreTrainedModel, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the teacher says: it gets what its own forward takes of the inputs, but no labels."""
        known = _arguments(self.teacher)
        asked = {name: value for name, value in inputs.items() if name in known}
        if "token_type_ids" not in inputs and _segments(self.teacher) > 1 >= _segments(student):
            logger.warning_once(
                f"`teacher_model` ({type(self.teacher).__name__}) tells segments apart by `token_type_ids`, which "
                f"{type(student).__name__} does not read and the data does not have: all tokens are of the first "
                f"segment to it. With pairs of texts, tokenize with `return_token_type_ids=True`."
            )
        dtype = self.teacher.dtype
        asked = {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in asked.items()
        }
        return self.teacher(**asked, **self.options)

    def _compare(
        self,
        student: PreTrainedModel,
        outputs: Mapping[str, Any],
        expected: Mapping[str, Any],
        inputs: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor | int]:
        """The divergence per item, and the number of items."""
        logits = {name: value for name, value in outputs.items() if name.endswith("logits")}
        theirs = {name: value for name, value in expected.items() if name.endswith("logits")}
        order = class_order(self.teacher, student)
        if order is not None:
            theirs = {name: value[..., _index(order, value.device)] for name, value in theirs.items()}
        first = next(iter(logits.values()), None)
        counted = None if first is None else counted_items(student, first, inputs)
        loss = logits_loss(
            logits,
            theirs,
            temperature=self.config.distillation_temperature,
            problem_type=None if first is None else problem_type_of(student, first, inputs.get("labels")),
            counted_BL=counted,
        )
        return loss, len(outputs[next(iter(logits))]) if counted is None else counted.sum()


# Which teacher may teach.


def load_teacher(
    teacher: PreTrainedModel | str | os.PathLike[str], student: PreTrainedModel, *, hidden_states: bool
) -> PreTrainedModel:
    """
    The teacher of a student, checked.

    Args:
        teacher ([`PreTrainedModel`], `str` or `os.PathLike`):
            A model, or the folder or Hub id of one, which is loaded for the task of the student.
        student ([`PreTrainedModel`]): The model in training, not wrapped.
        hidden_states (`bool`): Whether hidden states are to be matched, which then have to be of one size.

    Raises:
        `ValueError`: The teacher does another task, reads other tokens, predicts other classes, has hidden states of
            another size, or is a model of sentence-transformers.
        `TypeError`: It is no Transformers model.
    """
    task = task_of(student)
    if isinstance(teacher, str | os.PathLike):
        loader = getattr(transformers, f"AutoModel{task}", None)
        if loader is None:
            raise ValueError(
                f"`teacher_model`={teacher!r} cannot be loaded for {type(student).__name__}: pass a model."
            )
        teacher = cast(PreTrainedModel, loader.from_pretrained(teacher))
    if any(cls.__module__.startswith("sentence_transformers.") for cls in type(teacher).__mro__):
        raise ValueError(
            f"`teacher_model` must have the outputs of the model in training, got a {type(teacher).__name__}, which "
            f"gives embeddings or scores. Learn these as labels: `OTOSentenceTransformerTrainer` with `MSELoss` or "
            f"`EmbedDistillLoss` of `teacher.encode(texts)`; `OTOCrossEncoderTrainer` with its `MSELoss` of scores."
        )
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(
            f"`teacher_model` must be a Transformers model, a folder or a Hub id, got {type(teacher).__name__}."
        )
    check_placed(teacher, "teacher_model")
    if task == "ForPreTraining":
        raise ValueError(
            f"`teacher_model` is not supported for {type(student).__name__}: its outputs are of several kinds."
        )
    if teacher is student:
        raise ValueError("`teacher_model` must be another model than the one in training. Pass a copy of it.")
    if task_of(teacher) != task:
        raise ValueError(
            f"`teacher_model` must have the head of the model in training, got {type(teacher).__name__} for "
            f"{type(student).__name__}."
        )
    names = ["vocab_size", "num_labels"] + ["hidden_size"] * hidden_states
    for name in names:
        theirs, ours = getattr(teacher.config, name, None), getattr(student.config, name, None)
        if theirs != ours:
            remedy = (
                "Set `distillation_hidden_weight` to 0." if name == "hidden_size" else "Choose a teacher of the same."
            )
            raise ValueError(f"`teacher_model` has `{name}`={theirs}, the model in training {ours}. {remedy}")
    class_order(teacher, student)
    return teacher


def task_of(model: PreTrainedModel) -> str:
    """The end of the class's name that names its head: "ForQuestionAnswering"; nothing for a base model."""
    _, found, head = type(model).__name__.partition("For")
    return found + head


def class_order(teacher: PreTrainedModel, student: PreTrainedModel) -> tuple[int, ...] | None:
    """
    The teacher's class for each class of the student, by their names; `None` where the order is the same, or unknown
    because one of the two has no names.

    Raises:
        `ValueError`: Both have names, and not the same ones.
    """
    if not task_of(student).endswith("Classification"):
        return None
    theirs, ours = (cast(dict[int, str], model.config.id2label) for model in (teacher, student))
    return _order(*(tuple(str(name) for _, name in sorted(names.items())) for names in (theirs, ours)))


@lru_cache(maxsize=8)
def _index(order: tuple[int, ...], device: torch.device) -> Tensor:
    """On the device, where a list would have to be copied to in every step."""
    return torch.tensor(order, device=device)


@lru_cache(maxsize=8)
def _order(theirs: tuple[str, ...], ours: tuple[str, ...]) -> tuple[int, ...] | None:
    unnamed = [all(_NO_NAME.fullmatch(name) for name in names) for names in (theirs, ours)]
    if all(unnamed) or theirs == ours or len(ours) == 1:
        return None
    if any(unnamed):
        logger.warning(
            f"`teacher_model` has the classes {list(theirs)}, the model in training {list(ours)}: they are taken to "
            f"be in the same order. Give both their names (`id2label`), and the order is followed."
        )
        return None
    for found in ((theirs, ours), tuple(tuple(name.casefold() for name in names) for names in (theirs, ours))):
        if sorted(found[0]) == sorted(found[1]) and len({*found[0]}) == len(ours):
            return tuple(found[0].index(name) for name in found[1])
    raise ValueError(
        f"`teacher_model` must have the classes of the model in training, got {list(theirs)} for {list(ours)}. If "
        f"they mean the same, give both the same names (`id2label`), each in its own order."
    )


def teacher_columns(teacher: PreTrainedModel, student: PreTrainedModel) -> list[str]:
    """What the teacher's forward takes, labels apart, and the student's does not."""
    return [name for name in _arguments(teacher) if name not in _arguments(student)]


def _arguments(model: PreTrainedModel) -> tuple[str, ...]:
    """What a model's forward takes by name, labels apart."""
    return _arguments_of(cast(Hashable, type(model)))


@lru_cache(maxsize=16)
def _arguments_of(kind: Any) -> tuple[str, ...]:
    found = list(inspect.signature(kind.forward).parameters.values())[1:]
    labels = find_labels(kind)
    return tuple(one.name for one in found if one.kind is not one.VAR_KEYWORD and one.name not in labels)


def _segments(model: PreTrainedModel) -> int:
    """How many segments a model tells apart."""
    return getattr(model.config, "type_vocab_size", 1) if "token_type_ids" in _arguments(model) else 1


# What is compared, and what counts.


def problem_type_of(student: PreTrainedModel, logits: Tensor, labels: Tensor | None) -> str | None:
    """
    What kind of distribution is predicted; `None` for one over all classes.

    The config says it only where the model computes its own loss, so the rest is decided as it would be there: one
    class is a number, and numbers for every class are as many answers of yes and no.
    """
    task = task_of(student)
    if not task.endswith("Classification") or task.endswith("FrameClassification"):  # whose labels are one-hot
        return None
    if given := getattr(student.config, "problem_type", None):
        return given
    if logits.shape[-1] == 1:
        return "regression"
    several = labels is not None and labels.is_floating_point() and labels.shape == logits.shape
    return "multi_label_classification" if several else None


def counted_items(student: PreTrainedModel, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
    """
    The items that count, bool, of the first dimensions of the logits: those with a label, or where tokens or frames
    have none of their own, those that are no padding. All without either.
    """
    per_token, task = logits.dim() == 3, task_of(student)
    labels = inputs.get("labels")
    if "shift_labels" in inputs:
        labels = inputs["shift_labels"]
    elif labels is not None and task == "ForCausalLM":  # each token says the next one
        labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    if labels is not None and (per_token or not labels.is_floating_point()):  # a number may be -100
        several = problem_type_of(student, logits, labels) == "multi_label_classification"
        if labels.shape == (logits.shape if several else logits.shape[:-1]) and task != "ForCTC":
            return labels != IGNORED
    return real_positions(student, inputs.get("attention_mask"), logits) if per_token else None


def real_positions(
    student: PreTrainedModel, attention_mask: Tensor | None, states: Tensor, *, encoder: bool = False
) -> Tensor | None:
    """
    The tokens or frames that are no padding, bool [B, L]; `None` where no mask says it.

    Args:
        student ([`PreTrainedModel`]): The model in training, which knows how samples become frames.
        attention_mask (`Tensor`, *optional*): Of the inputs: of choices as well, or of samples.
        states (`Tensor`): What is masked, [B, L, …].
        encoder (`bool`): Whether these are the encoder's own, before an adapter makes fewer of them.
    """
    if attention_mask is None or attention_mask.dim() > 3:
        return None
    mask_BL = attention_mask.reshape(-1, attention_mask.shape[-1])
    to_frames: Any = getattr(student, "_get_feature_vector_attention_mask", None)
    if to_frames is not None:
        adapted = {"add_adapter": not encoder} if getattr(student.config, "add_adapter", False) else {}
        mask_BL = to_frames(states.shape[1], mask_BL, **adapted)
    return mask_BL.bool() if mask_BL.shape == states.shape[:2] else None


def share_of_step(
    inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None, *, shifted: bool
) -> tuple[Tensor | None, Tensor | int | None]:
    """
    How much of the step's loss is this micro-step's, by labels, and how many labels it has: `num_items_in_batch` for a
    loss that is to be their mean. Where either is not known, `None` and what was given.

    Args:
        inputs (`Mapping[str, Any]`): Of the micro-step.
        num_items_in_batch (`Tensor` or `int`, *optional*): The labels of all micro-steps, as Trainer counts them.
        shifted (`bool`): Whether the first label of a row counts for nothing.
    """
    labels = inputs.get("labels")
    if "shift_labels" in inputs:
        labels = inputs["shift_labels"]
    elif shifted and labels is not None:
        labels = labels[..., 1:]
    if labels is None or num_items_in_batch is None:
        return None, num_items_in_batch
    count = labels.ne(IGNORED).sum()
    # A number stays one: as a tensor it would have to be copied to where the labels are.
    total = num_items_in_batch
    return count.float() / (total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)), count.clamp(min=1)


def sums_items(student: PreTrainedModel) -> bool:
    """Whether the head's own loss is a sum, neither a mean nor a share."""
    return task_of(student) == "ForCTC" and student.config.ctc_loss_reduction == "sum"


# The losses.


def divergence(student_NC: Tensor, teacher_NC: Tensor, temperature: float, problem_type: str | None = None) -> Tensor:
    """
    T²·KL(teacher ‖ student) of the softened distributions, item by item.

    Hinton et al. (2015, arXiv:1503.02531), section 2: T² keeps the gradients' size whatever the temperature T. With
    `"multi_label_classification"` each class is a distribution of its own, over yes and no. `"regression"` has none:
    the squared difference.

    Shapes: [..., C], [..., C] -> [...]; [..., C] where each class is an item.
    """
    student_NC, teacher_NC = student_NC.float(), teacher_NC.float()
    if problem_type == "regression":
        return (student_NC - teacher_NC).square()
    if problem_type == "multi_label_classification":
        student_NC, teacher_NC = (torch.stack((x, torch.zeros_like(x)), -1) for x in (student_NC, teacher_NC))
    log_student, log_teacher = ((x / temperature).log_softmax(-1) for x in (student_NC, teacher_NC))
    return temperature**2 * F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(-1)


def logits_loss(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    *,
    temperature: float,
    problem_type: str | None = None,
    counted_BL: Tensor | None = None,
) -> Tensor:
    """
    Mean [`divergence`] over items, of all outputs whose names end in `logits` (start and end of an answer alike).

    Args:
        student, teacher (`Mapping[str, Tensor]`): What the two models give for the same inputs.
        temperature (`float`): T.
        problem_type (`str`, *optional*): As [`divergence`] takes it.
        counted_BL (`Tensor`, *optional*): The items that count, bool, of the outputs' first dimensions. All if `None`.

    Raises:
        `ValueError`: The models share no such output, or one differs in shape.
    """
    names = [name for name in student if name.endswith("logits")]
    if not names or any(name not in teacher for name in names):
        raise ValueError(
            f"`teacher_model` must give the outputs of the model in training, {names}, got {list(teacher)}."
        )
    losses = []
    for name in names:
        if student[name].shape != teacher[name].shape:
            raise ValueError(
                f"`teacher_model` gives `{name}` of shape {tuple(teacher[name].shape)}, the model in training of "
                f"shape {tuple(student[name].shape)}."
            )
        losses.append(_mean(divergence(student[name], teacher[name], temperature, problem_type), counted_BL))
    return torch.stack(losses).mean()


def _mean(losses: Tensor, counted: Tensor | None) -> Tensor:
    """Over the losses whose first dimensions are counted; 0 where none is. No device is waited for."""
    if counted is None:
        return losses.mean()
    among = counted.reshape(*counted.shape, *[1] * (losses.dim() - counted.dim())).expand_as(losses)
    return losses.where(among, 0).sum() / among.sum().clamp(min=1)


def hidden_states_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask_BL: Tensor | None = None
) -> Tensor:
    """
    Mean squared difference of the blocks' outputs over the tokens that are no padding, or all without a mask.

    Each of the student's n blocks learns from the last of its share of the teacher's m: block i from block ⌊i·m/n⌋
    (Sun et al., EMNLP 2019, arXiv:1908.09355, "skip").

    Shapes: 1 + n and 1 + m tensors [B, L, H], the embeddings first; [B, L].

    Raises:
        `ValueError`: The teacher's states are of another shape.
    """
    blocks, theirs = len(student) - 1, len(teacher) - 1
    if student[-1].shape != teacher[-1].shape:
        raise ValueError(
            f"`teacher_model` has hidden states of shape {tuple(teacher[-1].shape)}, the model in training of shape "
            f"{tuple(student[-1].shape)}. Set `distillation_hidden_weight` to 0."
        )
    counted_BL = None if attention_mask_BL is None else attention_mask_BL.bool()
    differences = [
        _mean((student[block].float() - teacher[max(1, block * theirs // blocks)].float()).square(), counted_BL)
        for block in range(1, blocks + 1)
    ]
    return torch.stack(differences).mean()
