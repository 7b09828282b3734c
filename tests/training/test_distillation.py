"""Distillation: the losses against their definitions, and OTOTrainer learning from a teacher."""

import copy
import dataclasses

import pytest
import torch
from families import ONE_EACH, counts, question_batch, tiny_model
from short_runs import CONFIG, DATA, arguments, make, same_weights
from torch.distributions import Bernoulli, Categorical, kl_divergence
from transformers import AutoModelForQuestionAnswering

from hf_oto import OTOConfig, OTOTrainer, compress
from hf_oto.training.distillation import divergence, hidden_states_loss, load_teacher, logits_loss

STUDENT, TEACHER = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()


def test_divergence_is_the_softened_kl_times_the_squared_temperature():
    for temperature in (1.0, 2.0, 5.0):
        expected = kl_divergence(Categorical(logits=TEACHER / temperature), Categorical(logits=STUDENT / temperature))
        torch.testing.assert_close(divergence(STUDENT, TEACHER, temperature), temperature**2 * expected)
        expected = kl_divergence(Bernoulli(logits=TEACHER / temperature), Bernoulli(logits=STUDENT / temperature))
        actual = divergence(STUDENT, TEACHER, temperature, "multi_label_classification")
        torch.testing.assert_close(actual, temperature**2 * expected)
    torch.testing.assert_close(divergence(STUDENT, TEACHER, 2.0, "regression"), (STUDENT - TEACHER) ** 2)


def test_at_a_high_temperature_the_gradient_is_that_of_matching_logits():
    student = STUDENT.clone().requires_grad_()
    divergence(student, TEACHER, 1e3).sum().backward()
    difference = STUDENT - TEACHER
    expected = (difference - difference.mean(1, keepdim=True)) / 7
    torch.testing.assert_close(student.grad, expected, rtol=0.02, atol=1e-3)  # up to order 1/T


def test_every_output_counts_alike_and_only_tokens_with_a_label():
    outputs = {"start_logits": STUDENT, "end_logits": TEACHER, "hidden_states": None}
    expected = {"start_logits": TEACHER, "end_logits": TEACHER}
    loss = logits_loss(outputs, expected, temperature=2.0)
    torch.testing.assert_close(loss, divergence(STUDENT, TEACHER, 2.0).mean() / 2)

    counted = torch.tensor([[True, True, False, False, True]])
    student, teacher = {"logits": STUDENT[None]}, {"logits": TEACHER[None]}
    loss = logits_loss(student, teacher, temperature=2.0, counted_BL=counted)
    torch.testing.assert_close(loss, divergence(STUDENT, TEACHER, 2.0)[counted[0]].mean())
    assert logits_loss(student, teacher, temperature=2.0, counted_BL=torch.zeros_like(counted)) == 0


def test_outputs_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"`teacher` must give the outputs .*end_logits"):
        logits_loss({"end_logits": STUDENT}, {"logits": TEACHER}, temperature=2.0)
    with pytest.raises(ValueError, match=r"`logits` of shape \(5, 6\), the model in training of shape \(5, 7\)"):
        logits_loss({"logits": STUDENT}, {"logits": TEACHER[:, 1:]}, temperature=2.0)


def test_hidden_states_are_matched_block_by_block_over_what_is_no_padding():
    torch.manual_seed(0)
    teacher = list(torch.randn(7, 2, 4, 3))  # embeddings and six blocks
    student = [torch.randn(2, 4, 3), teacher[3].clone(), teacher[6].clone()]
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert hidden_states_loss(student, teacher, mask) == 0
    student[1][0, 2:] += 5  # padding
    assert hidden_states_loss(student, teacher, mask) == 0
    student[2][0, 0] += 3.0  # one of six tokens, in one of two blocks
    torch.testing.assert_close(hidden_states_loss(student, teacher, mask), torch.tensor(9 / 6 / 2))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda student: student, "must be another model"),
        (lambda student: tiny_model("BertForMaskedLM"), "got BertForMaskedLM for BertForQuestionAnswering"),
        (lambda student: tiny_model(ONE_EACH[0], vocab_size=62), "`vocab_size`=62, the model in training 61"),
        (lambda student: tiny_model(ONE_EACH[0], num_labels=3), "`num_labels`=3, the model in training 2"),
        (lambda student: tiny_model(ONE_EACH[0], hidden_size=16), "`hidden_size`=16, the model in training 32"),
        (lambda student: object(), "must be a Transformers model, a folder or a Hub id, got object"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_made(teacher, message, tmp_path):
    student = tiny_model(ONE_EACH[0])
    config = dataclasses.replace(CONFIG, hidden_state_weight=1.0)
    with pytest.raises((ValueError, TypeError), match=message):
        make(tmp_path / "out", model=student, config=config, extra={"teacher": teacher(student)})
    assert not (tmp_path / "out").exists()


def test_heads_of_several_kinds_have_no_teacher():
    name = "ElectraForPreTraining"
    with pytest.raises(ValueError, match="not supported for ElectraForPreTraining"):
        load_teacher(tiny_model(name, seed=1), tiny_model(name), hidden_states=False)


def test_without_weight_a_teacher_changes_nothing(tmp_path):
    config = dataclasses.replace(CONFIG, distillation_weight=0.0)
    taught = make(tmp_path, config=config, extra={"teacher": tiny_model(ONE_EACH[0], seed=5)})
    taught.train()
    plain = make(tmp_path)
    plain.train()
    assert same_weights(taught.model, plain.model)


@pytest.mark.parametrize("name", ONE_EACH)
def test_from_a_teacher_alone_the_model_learns_what_it_says(name, tmp_path):
    """Of another size, read from a folder, and with dropout that must not act."""
    teacher = tiny_model(name, seed=5, **{"dim" if name.startswith("Distil") else "hidden_size": 16})
    teacher.save_pretrained(tmp_path / "teacher")
    config = OTOConfig(target_sparsity=0.2, distillation_weight=1.0, min_neurons=4, round_to=4)
    trainer = make(tmp_path / "out", name, config=config, extra={"teacher": str(tmp_path / "teacher")}, max_steps=200)
    assert not trainer.teacher.training
    before = copy.deepcopy(trainer.teacher)

    def distance():
        trainer.model.eval()
        with torch.no_grad():
            found = [
                logits_loss(trainer.model(**inputs), trainer.teacher(**inputs), temperature=2.0)
                for inputs in (question_batch(trainer.model, seed) for seed in range(4))
            ]
        return float(torch.stack(found).mean())

    at_first = distance()
    trainer.train()
    assert distance() < 0.5 * at_first
    assert same_weights(trainer.teacher, before)
    assert counts(trainer.compressed_model()) != counts(trainer.model)
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "teacher").eval()
    assert same_weights(loaded, trainer.teacher)


def test_the_loss_is_the_weighted_sum(tmp_path):
    config = dataclasses.replace(
        CONFIG, distillation_weight=0.7, distillation_temperature=3.0, hidden_state_weight=0.2
    )
    student = tiny_model(ONE_EACH[0], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    teacher = tiny_model(ONE_EACH[0], seed=5)
    trainer = make(tmp_path, model=student, config=config, extra={"teacher": teacher})
    inputs = question_batch(student)
    with torch.no_grad():
        own = student(**inputs, output_hidden_states=True)
        theirs = teacher(**inputs, output_hidden_states=True)
        expected = (
            0.3 * own.loss
            + 0.7 * logits_loss(own, theirs, temperature=3.0)
            + 0.2 * hidden_states_loss(own.hidden_states, theirs.hidden_states, inputs["attention_mask"])
        )
        torch.testing.assert_close(trainer.compute_loss(student.train(), dict(inputs)), expected)
        plain = trainer.compute_loss(student.eval(), dict(inputs))  # what an evaluation reports
    torch.testing.assert_close(plain, own.loss)


def test_a_pruned_model_of_another_family_may_teach(tmp_path):
    """DistilBERT takes no segments, and a pruned model is one like others."""
    teacher = compress(tiny_model("DistilBertForQuestionAnswering"))
    data = [{**row, "token_type_ids": torch.zeros(13, dtype=torch.long)} for row in DATA]
    trainer = make(tmp_path, extra={"teacher": teacher})
    trainer.train_dataset = data
    trainer.train()
    assert trainer.hspg.target_reached


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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulated_gradients_are_those_of_one_batch(smoothing, tmp_path):
    """
    Also where micro-steps have unequal numbers of labels: each counts by its share. Without label smoothing BERT's own
    loss does not (it is a mean over the micro-step, which Trainer takes for a share), so that the teacher is alone.
    """
    name = "BertForMaskedLM"
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    trained = []
    for size, accumulation in ((16, 1), (4, 4)):
        trainer = OTOTrainer(
            model=tiny_model(name, **options),
            args=arguments(
                tmp_path,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                max_steps=1,
                max_grad_norm=0.0,
                optim="sgd",
                learning_rate=1.0,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                label_smoothing_factor=smoothing,
            ),
            oto_config=OTOConfig(
                target_sparsity=0.0, pruning_periods=1, distillation_weight=0.9 if smoothing else 1.0
            ),
            teacher=tiny_model(name, seed=5, **options),
            train_dataset=token_rows(16),
            data_collator=Padding(),
        )
        trainer.train()
        trained.append(trainer.model)
    start = tiny_model(name, **options)
    moved = 0.0
    for first, one, four in zip(start.parameters(), *(model.parameters() for model in trained), strict=True):
        torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-6)
        moved = max(moved, float((one - first).detach().abs().max()))
    assert moved > 0.01
