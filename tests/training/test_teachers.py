"""OTOTrainer with a teacher: what the teacher is asked, and what a step learns from it."""

import copy
import dataclasses

import datasets
import pytest
import torch
import torch.nn.functional as F
from families import ONE_EACH, question_batch, tiny_model, training_batch
from short_runs import CONFIG, arguments, make, same_weights
from torch.distributions import Bernoulli, Categorical, kl_divergence
from transformers import Trainer
from transformers.utils import logging as transformers_logging

from hf_oto import OTOConfig, OTOTrainer
from hf_oto.training.distillation import divergence

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T = 2.0  # the default temperature


def token_rows(count):
    """Sequences of uneven length, with labels for some of their tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 14, (1,), generator=generator))
        labels = torch.randint(0, 3, (length,), generator=generator)
        labels[torch.rand(length, generator=generator) < 0.4] = -100
        labels[0] = 1
        ids = torch.randint(2, 61, (length,), generator=generator)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


class Padding:
    """What DataCollatorForTokenClassification does, without a tokenizer."""

    def __call__(self, rows):
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name, value):
            return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

        ids = padded("input_ids", 0)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": padded("labels", -100)}


# Heads that divide by the labels of the step, as Trainer asks (the causal model), that give their micro-step's mean,
# and whose labels Trainer does not count.
ACCUMULATED = {
    "LlamaForCausalLM": {},
    "BertForMaskedLM": NO_DROPOUT,
    "BertForTokenClassification": NO_DROPOUT | {"num_labels": 3},
    "ViTForImageClassification": {"num_labels": 3},
    "BertForQuestionAnswering": NO_DROPOUT,
}


def rows_for(model, count):
    if type(model).__name__.endswith(("CausalLM", "MaskedLM", "TokenClassification")):
        return token_rows(count)
    batch = training_batch(model, size=count)
    return [{key: value[row] for key, value in batch.items()} for row in range(count)]


def collate(rows):
    if isinstance(rows[0].get("input_ids"), list):
        return Padding()(rows)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def expected_loss(model, teacher, rows, weight, smoothing=0.0):
    """By its definition, over all items of all rows at once."""
    inputs = collate(rows)
    targets = {key: inputs.pop(key) for key in ("labels", "start_positions", "end_positions") if key in inputs}
    ours, theirs = model(**inputs), teacher(**inputs)
    own, taught = [], []
    for name, target in zip([key for key in ours if key.endswith("logits")], targets.values(), strict=True):
        logits, expected = ours[name], theirs[name].detach()
        if type(model).__name__.endswith("CausalLM"):
            logits, expected, target = logits[:, :-1], expected[:, :-1], target[:, 1:]
        counted = target != -100
        logits, expected, target = logits[counted], expected[counted], target[counted]
        own.append(F.cross_entropy(logits, target, label_smoothing=smoothing))
        divergence = kl_divergence(Categorical(logits=expected / T), Categorical(logits=logits / T))
        taught.append(T**2 * divergence.mean())
    return (1 - weight) * torch.stack(own).mean() + weight * torch.stack(taught).mean()


def moved_by_one_step(folder, name, rows, micro_steps, weight=0.5, **options):
    """Start and end of a step of plain gradient descent, which moves every weight by its gradient."""
    trainer = OTOTrainer(
        model=tiny_model(name, **ACCUMULATED[name]),
        args=arguments(
            folder,
            per_device_train_batch_size=len(rows) // micro_steps,
            gradient_accumulation_steps=micro_steps,
            max_steps=1,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            **options,
        ),
        oto_config=OTOConfig(target_sparsity=0.0, pruning_periods=1, distillation_weight=weight),
        teacher_model=tiny_model(name, seed=5, **ACCUMULATED[name]),
        train_dataset=rows,
        data_collator=collate,
    )
    start = copy.deepcopy(trainer.model)
    trainer.train()
    return start, trainer


def assert_moved_as(start, trainer, loss):
    names, parameters = zip(*start.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    moved = dict(trainer.model.named_parameters())
    for name, before, gradient in zip(names, parameters, gradients, strict=True):
        gradient = torch.zeros_like(before) if gradient is None else gradient
        torch.testing.assert_close(
            moved[name], before - gradient, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert max(float(gradient.abs().max()) for gradient in gradients if gradient is not None) > 0.01


@pytest.mark.parametrize("micro_steps", [1, 2, 4])
@pytest.mark.parametrize("name", ACCUMULATED)
def test_a_step_is_that_of_one_batch_however_many_micro_steps_it_has(name, micro_steps, tmp_path):
    """Also where these have unequal numbers of labels: each label counts alike, for the own loss and the teacher's."""
    rows = rows_for(tiny_model(name), 16)
    start, trainer = moved_by_one_step(tmp_path, name, rows, micro_steps)
    loss = expected_loss(start, trainer.teacher_model, rows, 0.5)
    assert_moved_as(start, trainer, loss)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("micro_steps", [1, 4])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_smoothed_labels_are_mixed_with_the_teacher_in_the_same_way(name, micro_steps, tmp_path):
    rows = token_rows(16)
    start, trainer = moved_by_one_step(tmp_path, name, rows, micro_steps, label_smoothing_factor=0.1)
    assert_moved_as(start, trainer, expected_loss(start, trainer.teacher_model, rows, 0.5, smoothing=0.1))


def test_a_micro_step_without_labels_counts_for_nothing(tmp_path):
    rows = token_rows(16)
    for row in rows[:4]:
        row["labels"] = [-100] * len(row["labels"])
    start, trainer = moved_by_one_step(tmp_path, "LlamaForCausalLM", rows, 4, train_sampling_strategy="sequential")
    assert_moved_as(start, trainer, expected_loss(start, trainer.teacher_model, rows, 0.5))


# What the teacher reads.


def pairs(count, segments=True):
    """Texts in pairs, as BERT's tokenizer gives them, and a column that no model takes."""
    rows = []
    for number, row in enumerate(token_rows(count)):
        ids = row["input_ids"]
        more = {"token_type_ids": [int(place >= len(ids) // 2) for place in range(len(ids))]} if segments else {}
        rows.append({"input_ids": ids, **more, "labels": number % 2, "text": f"pair {number}"})
    return rows


class PaddingPairs:
    """What DataCollatorWithPadding does, without a tokenizer."""

    def __call__(self, rows):
        longest = max(len(row["input_ids"]) for row in rows)
        lists = [name for name in rows[0] if isinstance(rows[0][name], list)]
        padded = {name: torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in rows]) for name in lists}
        labels = torch.tensor([row["labels"] for row in rows])
        return {**padded, "attention_mask": (padded["input_ids"] != 0).long(), "labels": labels}


def taught_on_pairs(folder, rows, kind=OTOTrainer, **options):
    """DistilBERT, which tells no segments apart, and a BERT that does."""
    trainer = kind(
        model=tiny_model("DistilBertForSequenceClassification"),
        args=arguments(folder, max_steps=24, eval_strategy="steps", eval_steps=12, **options),
        oto_config=CONFIG,
        teacher_model=tiny_model("BertForSequenceClassification", seed=5),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=PaddingPairs(),
    )
    seen = {"teacher": [], "student": []}
    for name, model in (("teacher", trainer.teacher_model), ("student", trainer.model)):
        model.register_forward_pre_hook(lambda _, args, kwargs, name=name: seen[name].append(kwargs), with_kwargs=True)
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize("table", [False, True])
def test_a_teacher_of_another_family_reads_all_that_its_own_forward_takes(table, tmp_path):
    rows = pairs(16)
    expected = {tuple(row["input_ids"]): row["token_type_ids"] for row in rows}
    if table:
        rows = datasets.Dataset.from_list(rows)
    trainer, seen = taught_on_pairs(tmp_path, rows)
    assert seen["teacher"] and all("token_type_ids" not in inputs for inputs in seen["student"])
    for inputs in seen["teacher"]:
        lengths = inputs["attention_mask"].sum(-1).tolist()
        for ids, types, length in zip(inputs["input_ids"], inputs["token_type_ids"], lengths, strict=True):
            assert types[:length].tolist() == expected[tuple(ids[:length].tolist())]
    assert trainer.hspg.target_reached
    assert trainer.predict(rows).predictions.shape == (16, 2)


def test_a_teacher_whose_segments_are_not_in_the_data_is_said(tmp_path, caplog):
    transformers_logging.warning_once.cache_clear()
    taught_on_pairs(tmp_path, pairs(16, segments=False))
    said = [record.message for record in caplog.records if "token_type_ids" in record.message]
    assert len(said) == 1 and "`return_token_type_ids=True`" in said[0]


def test_columns_of_the_student_are_its_own_without_a_teacher(tmp_path):
    trainer = make(tmp_path, "DistilBertForQuestionAnswering")
    trainer._set_signature_columns_if_needed()
    assert "token_type_ids" not in trainer._signature_columns


# A loss of one's own.


class OwnLoss(OTOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OtherTrainer(Trainer):
    compute_loss = OwnLoss.compute_loss


class OtherFirst(OtherTrainer, OTOTrainer):
    pass


class OtherLast(OTOTrainer, OtherTrainer):
    pass


class AddedLoss(OTOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (2 * loss, outputs) if return_outputs else 2 * loss


@pytest.mark.parametrize("kind", [OwnLoss, OtherFirst])
def test_a_loss_that_leaves_the_teacher_out_stops_the_first_step(kind, tmp_path):
    trainer = make(tmp_path, kind=kind, extra={"teacher_model": tiny_model(ONE_EACH[0], seed=5)})
    start = copy.deepcopy(trainer.model)
    with pytest.raises(
        ValueError, match=rf"`teacher_model` was not asked: a `compute_loss` of {kind.__name__} .*`super\(\)"
    ):
        trainer.train()
    assert trainer.state.global_step == 0 and same_weights(trainer.model, start)


@pytest.mark.parametrize("kind", [AddedLoss, OtherLast])
def test_a_loss_that_calls_the_trainers_has_the_teacher_in_it(kind, tmp_path):
    teacher = tiny_model(ONE_EACH[0], seed=5)
    trainer = make(tmp_path, kind=kind, extra={"teacher_model": teacher})
    plain = make(tmp_path, model=trainer.model, extra={"teacher_model": teacher})
    inputs = question_batch(trainer.model)
    torch.manual_seed(0)
    expected = plain.compute_loss(trainer.model.train(), dict(inputs))
    torch.manual_seed(0)
    actual = trainer.compute_loss(trainer.model.train(), dict(inputs))
    torch.testing.assert_close(actual, expected * (2 if kind is AddedLoss else 1))
    trainer.train()
    assert trainer.hspg.target_reached


def test_without_the_teachers_weights_its_absence_is_nothing_to_say(tmp_path):
    config = dataclasses.replace(CONFIG, distillation_weight=0.0)
    trainer = make(tmp_path, kind=OwnLoss, config=config, extra={"teacher_model": tiny_model(ONE_EACH[0], seed=5)})
    trainer.train()
    assert trainer.hspg.target_reached


def binary(outputs, labels, num_items_in_batch=None):
    """What rerankers and classifiers of many labels learn from."""
    return F.binary_cross_entropy_with_logits(outputs.logits.view_as(labels), labels)


@pytest.mark.parametrize(
    ("classes", "labels", "taught"),
    [
        (1, torch.tensor([0.0, 1.0, 1.0]), lambda ours, theirs: (ours - theirs) ** 2),
        (
            4,
            torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]),
            lambda ours, theirs: T**2 * kl_divergence(Bernoulli(logits=theirs / T), Bernoulli(logits=ours / T)),
        ),
    ],
    ids=["one logit", "many labels"],
)
def test_beside_a_loss_function_the_kind_of_problem_is_told_from_the_labels(classes, labels, taught, tmp_path):
    """No model computes its own loss there, which is what sets `problem_type`."""
    options = NO_DROPOUT | {"num_labels": classes}
    teacher = tiny_model("BertForSequenceClassification", seed=5, **options)
    config = dataclasses.replace(CONFIG, distillation_weight=0.75)
    trainer = make(
        tmp_path,
        model=tiny_model("BertForSequenceClassification", **options),
        config=config,
        extra={"teacher_model": teacher, "compute_loss_func": binary},
    )
    inputs = training_batch(trainer.model) | {"labels": labels}
    loss = trainer.compute_loss(trainer.model.train(), dict(inputs))
    inputs.pop("labels")
    ours, theirs = trainer.model(**inputs), teacher(**inputs)
    assert trainer.model.config.problem_type is None
    expected = 0.25 * binary(ours, labels) + 0.75 * taught(ours.logits, theirs.logits).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_speech_loss_that_sums_is_taught_by_a_sum(reduction, tmp_path):
    """Whatever the batch, own loss and teacher are in one proportion. A sum has no share of the step to be taken."""
    kinds = ("hidden", "attention", "activation", "feat_proj", "final")
    options = dict.fromkeys((f"{kind}_dropout" for kind in kinds), 0.0)
    student, teacher = (tiny_model("Wav2Vec2ForCTC", seed=n, ctc_loss_reduction=reduction, **options) for n in (0, 5))
    config = dataclasses.replace(CONFIG, distillation_weight=0.75)
    trainer = make(tmp_path, model=student, config=config, extra={"teacher_model": teacher})
    inputs = training_batch(student)
    loss = trainer.compute_loss(student.train(), dict(inputs), num_items_in_batch=torch.tensor(36))  # of 9 here
    student.eval()
    own, theirs = student(**inputs), teacher(**inputs)
    frames = student._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1))
    real = torch.arange(own.logits.shape[1]) < frames[:, None]
    taught = divergence(own.logits[real], theirs.logits[real], T)
    if reduction == "sum":
        torch.testing.assert_close(loss, 0.25 * own.loss + 0.75 * taught.sum())
    else:
        torch.testing.assert_close(loss, (0.25 * own.loss + 0.75 * taught.mean()) * 9 / 36)
