"""Distillation: the losses against their definitions, and OTOTrainer learning from a teacher."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from families import ALL, ONE_EACH, batch, counts, question_batch, tiny_model, training_batch
from short_runs import CONFIG, DATA, make, same_weights
from torch.distributions import Bernoulli, Categorical, kl_divergence
from transformers import AutoModelForQuestionAnswering

from hf_oto import OTOConfig, compress, partition
from hf_oto.training.distillation import (
    Distiller,
    divergence,
    hidden_states_loss,
    load_teacher,
    logits_loss,
    sums_items,
)

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
    with pytest.raises(ValueError, match=r"`teacher_model` must give the outputs .*end_logits"):
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
        (lambda student: tiny_model(ONE_EACH[0]).to("meta"), "must hold its weights, '.*' is on the meta device"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_made(teacher, message, tmp_path):
    student = tiny_model(ONE_EACH[0])
    config = dataclasses.replace(CONFIG, distillation_hidden_weight=1.0)
    with pytest.raises((ValueError, TypeError), match=message):
        make(tmp_path / "out", model=student, config=config, extra={"teacher_model": teacher(student)})
    assert not (tmp_path / "out").exists()


def test_heads_of_several_kinds_have_no_teacher():
    name = "ElectraForPreTraining"
    with pytest.raises(ValueError, match="not supported for ElectraForPreTraining"):
        load_teacher(tiny_model(name, seed=1), tiny_model(name), hidden_states=False)


def test_without_weight_a_teacher_changes_nothing(tmp_path):
    config = dataclasses.replace(CONFIG, distillation_weight=0.0)
    taught = make(tmp_path, config=config, extra={"teacher_model": tiny_model(ONE_EACH[0], seed=5)})
    taught.train()
    plain = make(tmp_path)
    plain.train()
    assert same_weights(taught.model, plain.model)


@pytest.mark.parametrize("name", [ONE_EACH[0], ONE_EACH[-1]])  # every other head learns below, without a Trainer
def test_from_a_teacher_alone_the_model_learns_what_it_says(name, tmp_path):
    """Of another size, read from a folder (a path or its name), and with dropout that must not act."""
    teacher = tiny_model(name, seed=5, **{"dim" if name.startswith("Distil") else "hidden_size": 16})
    teacher.save_pretrained(tmp_path / "teacher")
    folder = tmp_path / "teacher" if name == ONE_EACH[0] else str(tmp_path / "teacher")
    config = OTOConfig(target_sparsity=0.2, distillation_weight=1.0, min_neurons=4, round_to=4)
    trainer = make(tmp_path / "out", name, config=config, extra={"teacher_model": folder}, max_steps=200)
    assert not trainer.teacher_model.training
    before = copy.deepcopy(trainer.teacher_model)

    def distance():
        trainer.model.eval()
        with torch.no_grad():
            found = [
                logits_loss(trainer.model(**inputs), trainer.teacher_model(**inputs), temperature=2.0)
                for inputs in (question_batch(trainer.model, seed) for seed in range(4))
            ]
        return float(torch.stack(found).mean())

    at_first = distance()
    trainer.train()
    assert distance() < 0.5 * at_first
    assert same_weights(trainer.teacher_model, before)
    assert counts(trainer.compressed_model()) != counts(trainer.model)
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "teacher").eval()
    assert same_weights(loaded, trainer.teacher_model)


def test_the_loss_is_the_weighted_sum(tmp_path):
    config = dataclasses.replace(
        CONFIG, distillation_weight=0.7, distillation_temperature=3.0, distillation_hidden_weight=0.2
    )
    student = tiny_model(ONE_EACH[0], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    teacher = tiny_model(ONE_EACH[0], seed=5)
    trainer = make(tmp_path, model=student, config=config, extra={"teacher_model": teacher})
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
    trainer = make(tmp_path, extra={"teacher_model": teacher})
    trainer.train_dataset = data
    trainer.train()
    assert trainer.hspg.target_reached


# The Distiller, with real models.

TAUGHT = [
    name
    for name in ALL
    if not name.endswith(("Model", "Encoder", "ForPreTraining", "ForMaskedImageModeling"))  # which have no logits
]


def labelled(model):
    """Inputs with padding, and the labels that the head takes."""
    if model.base_model_prefix in ("wav2vec2", "hubert") and type(model).__name__.endswith("FrameClassification"):
        frames = int(model._get_feat_extract_output_lengths(batch(model)["input_values"].shape[1]))
        return batch(model) | {"labels": F.one_hot(torch.arange(frames).expand(3, -1) % 2).float()}
    if type(model).__name__.endswith(
        ("SequenceClassification", "MultipleChoice", "NextSentencePrediction", "XVector")
    ):
        return batch(model) | {"labels": torch.tensor([1, 0, 1])}
    return training_batch(model)


def distil(student, teacher, inputs, **options):
    """The loss and the number of items, of what both say without dropout."""
    distiller = Distiller(teacher, OTOConfig(**options))
    outputs = student(**inputs, **distiller.options)
    return distiller(student, outputs, inputs)


@pytest.mark.parametrize("name", TAUGHT)
def test_every_head_learns_until_it_says_what_its_teacher_says(name):
    student, teacher = tiny_model(name), tiny_model(name, seed=5)
    inputs = labelled(student)
    loss, items = distil(student, teacher, inputs, distillation_hidden_weight=1.0)
    assert loss > 0.01 and 1 <= items <= 3 * 100
    loss.backward()
    arrays = partition(student).arrays
    owned = dict(student.named_parameters())
    assert all(owned[array.members[0][0]].grad.abs().max() > 0 for array in arrays)
    loss, _ = distil(copy.deepcopy(teacher), teacher, inputs, distillation_hidden_weight=1.0)
    assert loss.abs() < 1e-6


def by_hand(values, others, lengths):
    """Mean squared difference, or divergence, over the positions of every row that are real."""
    rows = zip(values, others, lengths.tolist(), strict=True)
    return torch.cat([(ours - theirs)[:length].square().flatten() for ours, theirs, length in rows]).mean()


@pytest.mark.parametrize("name", ["Wav2Vec2ForCTC", "HubertForCTC", "Wav2Vec2ForAudioFrameClassification"])
def test_frames_of_padding_count_for_nothing(name):
    student, teacher = tiny_model(name), tiny_model(name, seed=5)
    inputs = batch(student)
    frames = student._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1))
    states = {"output_hidden_states": True}
    with torch.no_grad():
        ours, theirs = student(**inputs, **states), teacher(**inputs, **states)
        taught, items = distil(student, teacher, inputs, distillation_weight=1.0)
        hidden, _ = distil(student, teacher, inputs, distillation_weight=0.0, distillation_hidden_weight=1.0)
    assert frames[0] < ours.logits.shape[1] == frames[1]
    real = torch.arange(ours.logits.shape[1]) < frames[:, None]
    assert items == real.sum()
    torch.testing.assert_close(taught, divergence(ours.logits[real], theirs.logits[real], 2.0).mean())
    blocks = zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    torch.testing.assert_close(hidden, torch.stack([by_hand(*block, frames) for block in blocks]).mean())


def test_choices_are_sequences_of_their_own():
    name = "BertForMultipleChoice"
    student, teacher = tiny_model(name), tiny_model(name, seed=5)
    inputs, states = batch(student), {"output_hidden_states": True}
    lengths = inputs["attention_mask"].sum(-1).flatten()
    assert lengths.min() < lengths.max()
    with torch.no_grad():
        ours, theirs = student(**inputs, **states), teacher(**inputs, **states)
        hidden, _ = distil(student, teacher, inputs, distillation_weight=0.0, distillation_hidden_weight=1.0)
    blocks = zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    torch.testing.assert_close(hidden, torch.stack([by_hand(*block, lengths) for block in blocks]).mean())


@pytest.mark.parametrize("shifts", [False, True])
def test_a_causal_model_learns_where_the_next_token_counts(shifts):
    """Whether the labels are shifted by the loss, or were by whoever packed the sequences."""
    name = "LlamaForCausalLM"
    student, teacher = tiny_model(name), tiny_model(name, seed=5)
    inputs = batch(student)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[1, :5] = -100  # a prompt
    next_counts = torch.zeros_like(labels, dtype=torch.bool)
    next_counts[:, :-1] = labels[:, 1:] != -100
    given = {}
    if shifts:
        given = {"shift_labels": F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()}
        given["shift_labels"][2, 6] = -100  # where one text ends and another begins
        next_counts[2, 6] = False
    with torch.no_grad():
        taught, items = distil(student, teacher, {**inputs, "labels": labels, **given}, distillation_weight=1.0)
        ours, theirs = student(**inputs).logits[next_counts], teacher(**inputs).logits[next_counts]
    assert items == next_counts.sum()
    torch.testing.assert_close(taught, divergence(ours, theirs, 2.0).mean())


def test_a_ctc_loss_that_is_a_sum_is_taught_by_sums():
    summed, mean = (tiny_model("Wav2Vec2ForCTC", ctc_loss_reduction=reduction) for reduction in ("sum", "mean"))
    assert sums_items(summed) and not sums_items(mean) and not sums_items(tiny_model("BertForMaskedLM"))


MNLI = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
GLUE = {0: "entailment", 1: "neutral", 2: "contradiction"}


def classifier(name, names, seed=0):
    return tiny_model(name, seed=seed, id2label=names, label2id={value: key for key, value in names.items()})


@pytest.mark.parametrize("name", ["RobertaForSequenceClassification", "BertForTokenClassification"])
def test_classes_are_followed_by_their_names(name):
    student, teacher = classifier(name, GLUE), classifier(name, MNLI, seed=5)
    assert load_teacher(teacher, student, hidden_states=False) is teacher
    inputs = labelled(student)
    same = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in (same.classifier.out_proj if name.startswith("Rob") else same.classifier).parameters():
            parameter.copy_(parameter.flip(0))  # GLUE's order
        same.config.id2label = GLUE
        found, expected = (distil(student, model, inputs, distillation_weight=1.0)[0] for model in (teacher, same))
        torch.testing.assert_close(found, expected)
        unnamed = distil(student, classifier(name, {n: f"LABEL_{n}" for n in range(3)}, seed=5), inputs)[0]
    assert (unnamed - found).abs() > 0.01


def test_other_classes_are_refused_with_both_orders(tmp_path):
    name, others = "BertForSequenceClassification", {0: "positive", 1: "negative", 2: "neutral"}
    message = (
        r"must have the classes .*\['positive', 'negative', 'neutral'\] for \['entailment', 'neutral', 'contradic"
    )
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", model=classifier(name, GLUE), extra={"teacher_model": classifier(name, others)})
    assert not (tmp_path / "out").exists()


def test_an_order_that_only_one_of_them_names_is_said(caplog):
    name, plain = "BertForSequenceClassification", {n: f"LABEL_{n}" for n in range(3)}
    load_teacher(classifier(name, {**GLUE, 2: "else"}, seed=5), classifier(name, plain), hidden_states=False)
    assert "['entailment', 'neutral', 'else'], the model in training ['LABEL_0', " in caplog.text
    caplog.clear()
    load_teacher(classifier(name, plain, seed=5), classifier(name, plain), hidden_states=False)
    assert not caplog.text
