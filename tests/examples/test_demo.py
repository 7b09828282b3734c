"""The demo: its questions, its tokenizer, its folder, and a tiny run of it from end to end."""

import json
import random
import re
import subprocess
from collections import Counter, defaultdict
from types import SimpleNamespace

import forking
import processes
import pytest
import torch
from demo import run_demo, scratch, synthetic, topics
from transformers import AutoConfig, AutoTokenizer

SIZES = {"train": 400, "dev": 150}


@pytest.fixture(scope="module")
def splits():
    return synthetic.make_squad(SIZES, questions=4, seed=0)


def paragraphs(split):
    return split["data"][0]["paragraphs"]


def questions(split):
    """Every question with its paragraph's text, its answer and where that starts."""
    return [
        (one["context"], question, question["answers"][0]["text"], question["answers"][0]["answer_start"])
        for one in paragraphs(split)
        for question in one["qas"]
    ]


@pytest.fixture(scope="module")
def written():
    rng = random.Random(0)
    return [(topic, *synthetic.write_paragraph(topic, rng)) for topic in topics.TOPICS for _ in range(80)]


def test_every_answer_stands_where_it_says_and_nowhere_else(splits):
    for split in splits.values():
        for context, _, text, start in questions(split):
            assert text and context[start : start + len(text)] == text
            assert len(re.findall(rf"\b{re.escape(text)}\b", context)) == 1


def test_ids_are_unique_and_sizes_as_asked(splits):
    ids = [question["id"] for split in splits.values() for _, question, _, _ in questions(split)]
    assert len(ids) == len(set(ids)) == 4 * sum(SIZES.values())
    assert {name: len(paragraphs(split)) for name, split in splits.items()} == SIZES


def test_a_paragraph_tells_each_kind_of_fact_of_every_subject(written):
    for topic, text, facts in written:
        values = defaultdict(dict)
        for fact in facts:
            assert text[fact.value_start :].startswith(fact.value)
            sentence = text[: fact.value_start].rpartition(". ")[2]
            assert sentence.startswith((topic.article + fact.subject, topic.article.capitalize() + fact.subject))
            values[fact.relation][fact.subject] = fact.value
        assert len(values) >= 2
        for told in values.values():
            assert len(told) >= 2 and len(set(told.values())) == len(told)
            assert set(told) == {fact.subject for fact in facts}


def test_every_kind_of_fact_and_question_is_used(written):
    told = {fact.relation for _, _, facts in written for fact in facts}
    assert told == {relation for topic in topics.TOPICS for relation in topic.relations}


def test_the_question_alone_does_not_give_the_answer(splits):
    """Guess the train split's most frequent answer to the same question, name or value left out."""

    def kind(question):
        capital = r"(?:(?<!^)[A-Z]\w+ ?)+|\d+"
        return re.sub(capital, "_", question["question"])

    answers = defaultdict(Counter)
    for _, question, text, _ in questions(splits["train"]):
        answers[kind(question)][text] += 1
    assert all(len(counter) > 1 for counter in answers.values() if counter.total() > 20)
    right = [
        answers[kind(question)].most_common(1)[0][0] == text
        for _, question, text, _ in questions(splits["dev"])
        if kind(question) in answers
    ]
    assert len(right) > 500
    assert sum(right) / len(right) < 0.1


def test_splits_share_no_paragraph_and_no_set_of_subjects(monkeypatch):
    """On a topic with few names, which would repeat."""
    names = topics.FEMALES[:6]
    zoo = SimpleNamespace(**{**vars(topics.ZOO), "names": (names,)})
    monkeypatch.setattr(synthetic, "TOPICS", (zoo,))
    splits = synthetic.make_squad({"train": 12, "dev": 30}, questions=4, seed=0)
    texts, subjects = {}, {}
    for name, split in splits.items():
        texts[name] = {one["context"] for one in paragraphs(split)}
        subjects[name] = {frozenset(word for word in names if word in text) for text in texts[name]}
    assert texts["train"].isdisjoint(texts["dev"]) and subjects["train"].isdisjoint(subjects["dev"])
    assert len(texts["dev"]) == 30


def test_the_seed_decides(splits):
    assert synthetic.make_squad(SIZES, questions=4, seed=0) == splits
    assert synthetic.make_squad(SIZES, questions=4, seed=1) != splits


def test_the_english_is_sound(splits):
    for split in splits.values():
        for context, question, _, _ in questions(split):
            assert not re.search(r"[{}]|  |\ba [aeiou]", context + question["question"])
            assert all(sentence[0].isupper() for sentence in re.split(r"\. ", context))
            assert context.endswith(".") and question["question"].endswith("?")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    run_demo.make_inputs(folder, run_demo.parse_arguments(["--steps", "50", "--eval_paragraphs", "60"]))
    return folder


def test_the_tokenizer_loads_and_its_tokens_fit_the_answers(inputs):
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    assert tokenizer.is_fast
    assert tokenizer("Who?", "He.")["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    for context, question, text, start in questions(json.loads((inputs / "dev.json").read_text())):
        encoded = tokenizer(question["question"], context, return_offsets_mapping=True)
        assert tokenizer.unk_token_id not in encoded["input_ids"]
        assert len(encoded["input_ids"]) <= run_demo.SEQUENCE_LENGTH
        tokens = [
            (token.removeprefix("##"), first, last)
            for token, (first, last), part in zip(
                encoded.tokens(), encoded["offset_mapping"], encoded.sequence_ids(), strict=True
            )
            if part == 1
        ]
        assert all(token == context[first:last].lower() for token, first, last in tokens)
        assert "".join(token for token, _, _ in tokens) == context.lower().replace(" ", "")
        assert start in {first for _, first, _ in tokens} and start + len(text) in {last for _, _, last in tokens}


def test_the_config_fits_the_tokenizer(inputs):
    config = AutoConfig.from_pretrained(inputs / "model")
    assert config.vocab_size == len(AutoTokenizer.from_pretrained(inputs / "model"))
    assert config.max_position_embeddings >= run_demo.SEQUENCE_LENGTH


def test_inputs_are_the_same_every_time(inputs, tmp_path):
    run_demo.make_inputs(tmp_path, run_demo.parse_arguments(["--steps", "50", "--eval_paragraphs", "60"]))
    names = ("train.json", "dev.json", "model/tokenizer.json", "model/config.json", "model/model.safetensors")
    for name in names:
        assert (tmp_path / name).read_bytes() == (inputs / name).read_bytes(), name


def test_untrained_heads_look_where_they_should(inputs):
    """In the first layer: to the same word in the question, a few words back, to the question."""
    config = AutoConfig.from_pretrained(inputs / "model", attn_implementation="eager")
    model = scratch.make_model(config, seed=0).eval()
    question, text = torch.arange(100, 110), torch.arange(200, 230)
    text[12] = question[4]
    ids = torch.cat([question, text])[None]
    segments = (torch.arange(40) >= 10).long()[None]
    with torch.no_grad():
        same, back, asked = model(input_ids=ids, token_type_ids=segments, output_attentions=True).attentions[0][0, :3]
    assert same[22].argmax() == 4 and same[22, 4] > 0.5
    distance = (torch.arange(15, 40) - back[15:].argmax(dim=-1)).float()
    assert abs(distance.mean() - scratch.BACK) < 0.5  # half a word: LayerNorm lets the words shift it a little
    assert asked[:, :10].sum(dim=-1).min() > 0.8


def test_untrained_weights_come_from_their_own_seed(inputs):
    config = AutoConfig.from_pretrained(inputs / "model")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, same, other = (scratch.make_model(config, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(first[name], other[name])


def test_a_folder_that_is_not_the_demos_stays(tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="`output_dir` .*mine was not made by this demo"), run_demo.new_folder(target):
        raise AssertionError("unreachable")
    # What a link points to may be anybody's, even if a demo made it.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / run_demo.MARKER).touch()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="not made by this demo"), run_demo.new_folder(link):
        raise AssertionError("unreachable")
    assert (target / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine", "other"]


def test_a_run_that_fails_leaves_the_last_one(tmp_path):
    target = tmp_path / "demo"
    for content in ("first", "second"):
        with run_demo.new_folder(target) as folder:
            (folder / content).touch()
        assert sorted(path.name for path in target.iterdir()) == [run_demo.MARKER, content]
    with pytest.raises(KeyboardInterrupt), run_demo.new_folder(target) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["demo"] and (target / "second").exists()


@pytest.mark.slow
def test_the_demo_runs_from_end_to_end(tmp_path, capfd, monkeypatch):
    """What is loaded in the end is loaded by a new interpreter."""
    target = tmp_path / "build" / "demo"
    ways = {True: forking.run, False: subprocess.run}
    trains = SimpleNamespace(run=lambda command, **options: ways["--do_train" in command](command, **options))
    monkeypatch.setattr(processes, "subprocess", trains)
    rows = run_demo.main(["--output_dir", str(target), "--steps", "24", "--eval_paragraphs", "10"])
    shown = capfd.readouterr().out
    assert json.loads((target / "results.json").read_text()) == rows
    dense, pruned = rows["dense"], rows["pruned"]
    removed = 1 - pruned["prunable_parameters"] / dense["prunable_parameters"]
    assert 0.48 <= removed <= 0.5  # never over; short of it by less than 8 neurons of 128 * 2 + 1
    for key in ("parameters", "encoder_parameters", "macs", "file_size"):
        assert pruned[key] < dense[key]
        assert f"{dense[key]:,}" in shown or key in ("macs", "file_size")
    assert pruned["latency"] > 0
    for name in ("train.json", "dense/model.safetensors", "pruned/layers.png"):
        assert (target / name).stat().st_size > 0
    assert not (target / run_demo.CACHE).exists()
    # What a new process scores is what the training one did.
    scored = json.loads((target / "pruned" / "all_results.json").read_text())
    assert (pruned["exact_match"], pruned["f1"]) == (scored["eval_exact_match"], scored["eval_f1"])
    assert shown.count("run_squad.py --output_dir") == 3
    assert [path.name for path in target.parent.iterdir()] == ["demo"]
