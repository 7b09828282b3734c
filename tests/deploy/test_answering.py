"""Answers against a search in plain loops over windows that the test cuts itself."""

import copy
import math

import pytest
import torch
import transformers
from families import ONE_EACH, family_of, tiny_model, zero_uneven
from squad_data import byte_bpe, make_questions, wordpiece

from hf_oto import QuestionAnswerer, compress
from hf_oto.deploy.answering import Answer, span_scores

LENGTH, STRIDE, LONGEST = 40, 12, 6


@pytest.fixture(scope="module")
def tokenizers():
    return {"wordpiece": wordpiece(), "byte_bpe": byte_bpe(trim_offsets=False)}  # a space has its place


def kind(name):
    return "byte_bpe" if "oberta" in name else "wordpiece"


def answerer(name, tokenizers, **options):
    tokenizer = tokenizers[kind(name)]
    model = tiny_model(name, vocab_size=len(tokenizer), max_position_embeddings=64, num_hidden_layers=2)
    # Of random weights all spans are about as good. Sharper logits have answers that stand out.
    model.qa_outputs.weight.data *= 10
    settings = {"max_seq_length": LENGTH, "doc_stride": STRIDE, "max_answer_length": LONGEST} | options
    return QuestionAnswerer(model, tokenizer, **settings)


def questions(count=3):
    """Of several lengths, the longest in many windows, one with spaces around it."""
    made = make_questions(3 * count, seed=5)
    contexts = [" ".join(context for context, _ in made[: 1 + 2 * index]) for index in range(count)]
    return [asked["question"] for _, asked in made[:count]], [contexts[0], *contexts[1:-1], f"  {contexts[-1]}\n"]


@torch.no_grad()
def plain(found, question, context, no_answer):
    """All answers by loops: one window at a time, cut by hand from the context's tokens."""
    tokenizer, model = found.tokenizer, found.model
    ask = tokenizer(question, add_special_tokens=False)["input_ids"]
    encoded = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    middle = [tokenizer.sep_token_id] * (2 if isinstance(tokenizer, transformers.RobertaTokenizer) else 1)
    room = LENGTH - len(ask) - len(middle) - 2
    scores, nulls, first = {}, [], 0
    while True:
        part = tokens[first : first + room]
        ids = [tokenizer.cls_token_id, *ask, *middle, *part, tokenizer.sep_token_id]
        before = 1 + len(ask) + len(middle)
        inputs = {"input_ids": torch.tensor([ids])}
        if "token_type_ids" in tokenizer.model_input_names and family_of(type(model).__name__) != "distilbert":
            inputs["token_type_ids"] = torch.tensor([[0] * before + [1] * (len(part) + 1)])
        output = model(**inputs)
        starts, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        nulls.append(starts[0] + ends[0])
        for i in range(len(part)):
            for j in range(i, min(i + LONGEST, len(part))):
                (start, after), (final, end) = offsets[first + i], offsets[first + j]
                if not context[start:after].strip() or not context[final:end].strip():
                    continue  # a token of spaces
                start += len(context[start:end]) - len(context[start:end].lstrip())
                end -= len(context[start:end]) - len(context[start:end].rstrip())
                score = starts[before + i] + ends[before + j]
                scores[start, end] = max(score, scores.get((start, end), -math.inf))
        if first + room >= len(tokens):
            break
        first += room - STRIDE
    if no_answer:
        scores[0, 0] = min(nulls)
    total = math.log(sum(math.exp(score) for score in scores.values()))
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    return [Answer(context[start:end], start, end, math.exp(score - total)) for (start, end), score in ranked]


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("no_answer", [False, True])
def test_answers_are_those_of_plain_loops(name, no_answer, tokenizers):
    found = answerer(name, tokenizers)
    asked, contexts = questions()
    answers = found.answer(asked, contexts, top_k=10**9, handle_impossible_answer=no_answer)
    windows = [len(found._windows(0, *pair)) for pair in zip(asked, contexts, strict=True)]
    assert windows[0] >= 1 and windows[-1] > 5
    for question, context, own in zip(asked, contexts, answers, strict=True):
        expected = plain(found, question, context, no_answer)
        assert len(own) == len(expected)
        assert sum(one.score for one in own) == pytest.approx(1, abs=1e-4)
        assert all(context[one.start : one.end] == one.text == one.text.strip() for one in own)
        assert {(one.start, one.end) for one in own} == {(one.start, one.end) for one in expected}
        assert ((0, 0) in {(one.start, one.end) for one in own}) == no_answer
        # Padding and batches change logits by 1e-6 of some tens: near ties may change places.
        for rank, (one, other) in enumerate(zip(own[:20], expected[:20], strict=True)):
            assert one.score == pytest.approx(other.score, rel=1e-3), rank
        by_place = {(one.start, one.end): one.score for one in expected}
        for one in own:
            assert one.score == pytest.approx(by_place[one.start, one.end], rel=1e-3, abs=1e-12)


def test_a_batch_gives_what_each_question_gives_alone(tokenizers):
    asked, contexts = questions(5)
    found = answerer(ONE_EACH[0], tokenizers, batch_size=4)
    together = found.answer(asked, contexts, top_k=3)
    for question, context, own in zip(asked, contexts, together, strict=True):
        alone = found(question, context, top_k=3)
        assert [one.text for one in alone] == [one.text for one in own] and len(own) == 3
        assert [one.score for one in alone] == pytest.approx([one.score for one in own], rel=1e-3)
        assert found(question, context) == found(question, context, top_k=3)[:1]
    assert found.answer([], []) == []


def test_the_side_that_a_tokenizer_pads_does_not_matter(tokenizers):
    asked, contexts = questions()
    right = answerer(ONE_EACH[0], tokenizers).answer(asked, contexts, top_k=2)
    tokenizer = copy.deepcopy(tokenizers["wordpiece"])
    tokenizer.padding_side = "left"
    left = answerer(ONE_EACH[0], {"wordpiece": tokenizer})
    assert left.answer(asked, contexts, top_k=2) == right


def test_a_pruned_model_on_the_disk_answers_as_the_zeroed_one(tokenizers, tmp_path):
    zeroed = answerer(ONE_EACH[0], tokenizers)
    zero_uneven(zeroed.model)
    compress(zeroed.model).save_pretrained(tmp_path)
    zeroed.tokenizer.save_pretrained(tmp_path)
    pruned = QuestionAnswerer.from_pretrained(
        tmp_path, max_seq_length=LENGTH, doc_stride=STRIDE, max_answer_length=LONGEST
    )
    assert type(pruned.model).__name__ == "OTOBertForQuestionAnswering"
    asked, contexts = questions()
    for own, other in zip(pruned.answer(asked, contexts), zeroed.answer(asked, contexts), strict=True):
        assert (own[0].text, own[0].start) == (other[0].text, other[0].start)
        assert own[0].score == pytest.approx(other[0].score, rel=1e-3)


def test_a_model_in_training_answers_without_dropout_and_stays_in_training(tokenizers):
    found = answerer(ONE_EACH[0], tokenizers)
    asked, contexts = questions()
    expected = found.answer(asked, contexts)
    found.model.train()
    assert found.answer(asked, contexts) == expected
    assert found.model.training and found.model.bert.encoder.layer[0].output.dropout.training


def test_a_config_that_asks_for_tuples_changes_nothing(tokenizers):
    found = answerer(ONE_EACH[0], tokenizers)
    asked, contexts = questions()
    expected = found.answer(asked, contexts)
    found.model.config.return_dict = False
    assert found.answer(asked, contexts) == expected


def test_a_bar_counts_the_windows_where_it_is_asked_for(tokenizers, capfd):
    found = answerer(ONE_EACH[0], tokenizers)
    found.answer(*questions(), show_progress=True)
    assert "Answering" in capfd.readouterr().err
    found.answer(*questions())
    assert capfd.readouterr().err == ""


def test_span_scores_by_hand():
    first, last, score = span_scores(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0]), 2)
    assert [*zip(first.tolist(), last.tolist(), score.tolist(), strict=True)] == [
        *((0, 0, 11.0), (0, 1, 21.0)),
        *((1, 1, 22.0), (1, 2, 32.0)),
        (2, 2, 33.0),
    ]
    assert len(span_scores(torch.zeros(3), torch.zeros(3), 99)[0]) == 6


@pytest.mark.parametrize(
    ("name", "longest"),
    [
        ("BertForQuestionAnswering", 64),
        ("RobertaForQuestionAnswering", 62),
        ("CamembertForQuestionAnswering", 62),
        ("MPNetForQuestionAnswering", 62),
        ("DebertaV2ForQuestionAnswering", 64),
    ],
)
def test_windows_are_by_default_as_long_as_the_model_reads(name, longest, tokenizers):
    found = answerer(name, tokenizers, max_seq_length=None, doc_stride=None)
    assert (found.max_seq_length, found.doc_stride) == (longest, longest // 3)
    asked, contexts = questions()
    assert len(found.answer(asked, contexts)) == 3  # positions suffice
    with pytest.raises(
        ValueError, match=f"`max_seq_length` must be from 1 to the model's {longest}, got {longest + 1}"
    ):
        answerer(name, tokenizers, max_seq_length=longest + 1)
    long = tiny_model(name, vocab_size=len(found.tokenizer), max_position_embeddings=600)
    assert QuestionAnswerer(long, found.tokenizer).max_seq_length == 384


def test_a_family_that_is_not_pruned_is_read_as_far_as_it_reads(tokenizers):
    """Its positions begin behind the padding token, and its name does not say so."""
    tokenizer = tokenizers["byte_bpe"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    config = transformers.Data2VecTextConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    found = QuestionAnswerer(transformers.Data2VecTextForQuestionAnswering(config), tokenizer)
    assert found.max_seq_length == 62
    asked, contexts = questions()
    assert len(found.answer(asked, contexts)) == 3


def test_what_cannot_be_answered_is_refused(tokenizers):
    found = answerer(ONE_EACH[0], tokenizers)
    for question, context in (("", "text"), ("why?", " \n")):
        with pytest.raises(ValueError, match="must be text that is not empty"):
            found(question, context)
    with pytest.raises(TypeError, match="must be text that is not empty, got int"):
        found("why?", 3)
    with pytest.raises(ValueError, match="leaves 0 tokens of context beside a question of 60.*`doc_stride` 12"):
        found("a " * 60, "some text")
    with pytest.raises(ValueError, match="leaves 12 tokens of context beside a question of 25"):
        found("a " * 25, "some text")
    with pytest.raises(ValueError, match="one context each in `contexts`, got 1 and 2"):
        found.answer(["why?"], ["a", "b"])
    with pytest.raises(TypeError, match="must be lists of texts, got one text"):
        found.answer("why?", ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0"):
        found("why?", "a", top_k=0)
    for name in ("doc_stride", "max_answer_length", "batch_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least .*, got -1"):
            answerer(ONE_EACH[0], tokenizers, **{name: -1})
    size = len(found.tokenizer)
    with pytest.raises(ValueError, match=f"token of number {size - 1}, .* vocabulary has {size - 1}, counted"):
        QuestionAnswerer(tiny_model(ONE_EACH[0], vocab_size=size - 1), found.tokenizer)
    with pytest.raises(ValueError, match="question-answering head, got BertForMaskedLM"):
        QuestionAnswerer(tiny_model("BertForMaskedLM"), found.tokenizer)
