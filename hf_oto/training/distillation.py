"""Losses against a teacher: what the model in training learns from the outputs of a larger one.

Shapes: `B` sequences, `L` tokens, `C` classes (or positions of an answer), `H` hidden size, `N` items: what one
distribution is predicted for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel

IGNORED = -100  # the label of a token that counts in no loss


def load_teacher(teacher: PreTrainedModel | str, student: PreTrainedModel, *, hidden_states: bool) -> PreTrainedModel:
    """
    The teacher of a student, checked.

    Args:
        teacher ([`PreTrainedModel`] or `str`):
            A model, or the folder or Hub id of one, which is loaded for the task of the student.
        student ([`PreTrainedModel`]): The model in training, not wrapped.
        hidden_states (`bool`): Whether hidden states are to be matched, which then have to be of one size.

    Raises:
        `ValueError`: The teacher does another task, reads other tokens, predicts other classes, or has hidden states
            of another size.
        `TypeError`: It is no Transformers model.
    """
    task = task_of(student)
    if isinstance(teacher, str):
        loader = getattr(transformers, f"AutoModel{task}", None)
        if loader is None:
            raise ValueError(f"`teacher`={teacher!r} cannot be loaded for {type(student).__name__}: pass a model.")
        teacher = loader.from_pretrained(teacher)
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"`teacher` must be a Transformers model, a folder or a Hub id, got {type(teacher).__name__}.")
    if task == "ForPreTraining":
        raise ValueError(f"`teacher` is not supported for {type(student).__name__}: its outputs are of several kinds.")
    if teacher is student:
        raise ValueError("`teacher` must be another model than the one in training. Pass a copy of it.")
    if task_of(teacher) != task:
        raise ValueError(
            f"`teacher` must have the head of the model in training, got {type(teacher).__name__} for "
            f"{type(student).__name__}."
        )
    names = ["vocab_size", "num_labels"] + ["hidden_size"] * hidden_states
    for name in names:
        theirs, ours = getattr(teacher.config, name, None), getattr(student.config, name, None)
        if theirs != ours:
            remedy = "Set `hidden_state_weight` to 0." if name == "hidden_size" else "Choose a teacher of the same."
            raise ValueError(f"`teacher` has `{name}`={theirs}, the model in training {ours}. {remedy}")
    return teacher


def task_of(model: PreTrainedModel) -> str:
    """The end of the class's name that names its head: "ForQuestionAnswering"; nothing for a base model."""
    _, found, head = type(model).__name__.partition("For")
    return found + head


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
        problem_type (`str`, *optional*): The student's `config.problem_type`.
        counted_BL (`Tensor`, *optional*):
            The tokens that count, bool. It is used where there is a distribution for each token.

    Raises:
        `ValueError`: The models share no such output, or one differs in shape.
    """
    names = [name for name in student if name.endswith("logits")]
    if not names or any(name not in teacher for name in names):
        raise ValueError(f"`teacher` must give the outputs of the model in training, {names}, got {list(teacher)}.")
    losses = []
    for name in names:
        if student[name].shape != teacher[name].shape:
            raise ValueError(
                f"`teacher` gives `{name}` of shape {tuple(teacher[name].shape)}, the model in training of shape "
                f"{tuple(student[name].shape)}."
            )
        items_N = divergence(student[name], teacher[name], temperature, problem_type)
        if counted_BL is not None and student[name].shape[:-1] == counted_BL.shape:
            items_N = items_N[counted_BL]
        losses.append(items_N.sum() / max(items_N.numel(), 1))
    return torch.stack(losses).mean()


def hidden_states_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask_BL: Tensor | None = None
) -> Tensor:
    """
    Mean squared difference of the blocks' outputs over the tokens that are no padding, or all without a mask.

    Each of the student's n blocks learns from the last of its share of the teacher's m: block i from block ⌊i·m/n⌋
    (Sun et al., EMNLP 2019, arXiv:1908.09355, "skip").

    Shapes: 1 + n and 1 + m tensors [B, L, H], the embeddings first; [B, L].
    """
    blocks, theirs = len(student) - 1, len(teacher) - 1
    counted = ... if attention_mask_BL is None else attention_mask_BL.bool()
    differences = [
        (student[block].float() - teacher[max(1, block * theirs // blocks)].float())[counted].square().mean()
        for block in range(1, blocks + 1)
    ]
    return torch.stack(differences).mean()
