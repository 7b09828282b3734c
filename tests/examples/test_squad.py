"""The parts of the SQuAD example: reading, windows, the search for answers, arguments, and what is left on disk."""

import dataclasses
import json
import math
import os
from itertools import pairwise
from pathlib import Path

import answers as answers_module
import numpy as np
import pytest
import transformers
from answers import find_answers
from arguments import parse_arguments
from datasets import Dataset
from families import made_table, tiny_model
from features import OUTSIDE, check_tokenizer, feature_maker, label_positions
from outputs import Results, check_output_dir, remove_checkpoints, write_json
from reading import FEATURES, check_examples, read_squad
from squad_data import byte_bpe, folding_bpe, make_questions, question, squad, wordpiece, write

from hf_oto.config import OTOConfig
from hf_oto.models.groups import partition

TOWER = "The Eiffel Tower (Paris) was built from 1887 to 1889 by Gustave Eiffel's company."


# Reading


def rows(*questions):
    """Questions as `read_squad` gives them, without the disk."""
    made = [
        {
            "id": asked["id"],
            "context": context,
            "question": asked["question"],
            "answers": {key: [one[key] for one in asked["answers"]] for key in ("text", "answer_start")},
        }
        for context, asked in questions
    ]
    return Dataset.from_list(made, features=FEATURES)


def test_every_question_of_a_file_is_a_row(tmp_path):
    content = squad(
        question("a", TOWER, "Where is it?", "Paris", is_impossible=False),
        question("b", TOWER, "When?", "1889", ("1887 to 1889", 40)),
        question("c", "Zoë et Łukasz\n— ☃", "Who?", "Łukasz", plausible_answers=[{"text": "Zoë", "answer_start": 0}]),
        question("d", TOWER, "Who painted it?", is_impossible=True),
    )
    del content["data"][0]["paragraphs"][3]["qas"][0]["answers"]  # as in a file of questions only
    content["data"][0]["paragraphs"][0]["qas"].append({"id": "a2", "question": "Again?", "answers": []})
    content["data"].append({"paragraphs": [{"context": "x", "qas": [{"id": "e", "question": "y", "answers": []}]}]})
    found = read_squad(write(tmp_path / "squad.json", content), cache_dir=str(tmp_path / "cache"))
    assert found.features == FEATURES
    assert found["id"][:] == ["a", "a2", "b", "c", "d", "e"]
    assert found["context"][:] == [TOWER, TOWER, TOWER, "Zoë et Łukasz\n— ☃", TOWER, "x"]
    assert found[2]["answers"] == {"text": ["1889", "1887 to 1889"], "answer_start": [48, 40]}
    assert found[3]["answers"] == {"text": ["Łukasz"], "answer_start": [7]}
    assert found[4]["answers"] == found[5]["answers"] == {"text": [], "answer_start": []}


def test_a_byte_order_mark_is_no_content(tmp_path):
    path = write(tmp_path / "squad.json", squad(question("a", TOWER, "Where is it?", "Paris")))
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    found = read_squad(path, cache_dir=str(tmp_path / "cache"))
    assert (found["id"][:], found["context"][:]) == (["a"], [TOWER])


def test_fields_that_are_not_read_may_be_of_any_type(tmp_path):
    content = squad(
        *(question(f"q{i}", TOWER, "?", meta=meta) for i, meta in enumerate(({"a": 1}, [2], None, "b", {})))
    )
    content["data"].append({"title": 5, "paragraphs": []})
    assert len(read_squad(write(tmp_path / "squad.json", content), cache_dir=str(tmp_path / "cache"))) == 5


def test_a_file_that_has_changed_is_read_again(tmp_path):
    for name in ("one", "two"):
        path = write(tmp_path / "squad.json", squad(question(name, TOWER, "Where?", "Paris")))
        os.utime(path, (0, 0))  # the same time and size
        assert read_squad(path, cache_dir=str(tmp_path / "cache"))["id"][:] == [name]


def edited(path, value):
    """A good file's content with one thing replaced; `path` leads to it, `None` as the value removes it."""
    content = squad(question("a", TOWER, "Where is it?", "Paris"))
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(content).encode()


PARAGRAPH = ("data", 0, "paragraphs", 0)
QUESTION = (*PARAGRAPH, "qas", 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: "),
        (b'{"data": [', "is not JSON: "),
        ("Straße".encode("latin-1"), "is not JSON: "),
        (b"[]", "not in SQuAD's format at the file: "),
        (b"{}", "not in SQuAD's format: the file lacks 'data'"),
        (b'{"data": {"train": []}}', "at the file: expected list, got dict"),
        (b'{"data": []}', "holds no question"),
        (edited((*PARAGRAPH, "qas"), []), "holds no question"),
        (edited(("data", 0), "text"), r"at data\[0\]"),
        (edited(("data", 0, "paragraphs"), None), r"data\[0\] lacks 'paragraphs'"),
        (edited((*PARAGRAPH, "context"), None), r"data\[0\].paragraphs\[0\] lacks 'context'"),
        (edited((*PARAGRAPH, "context"), ["a"]), r"at data\[0\].paragraphs\[0\]: expected str, got list"),
        (edited((*PARAGRAPH, "qas"), None), r"data\[0\].paragraphs\[0\] lacks 'qas'"),
        (edited((*QUESTION, "id"), 7), r"at data\[0\].paragraphs\[0\].qas\[0\]: expected str, got int"),
        (edited((*QUESTION, "question"), None), r"qas\[0\] lacks 'question'"),
        (edited((*QUESTION, "answers"), {"text": ["Paris"]}), r"qas\[0\]: expected list, got dict"),
        (edited((*QUESTION, "answers", 0, "answer_start"), "18"), r"qas\[0\]: expected int, got str"),
        (edited((*QUESTION, "answers", 0, "text"), None), r"qas\[0\] lacks 'text'"),
    ],
)
def test_bad_files_are_refused_with_the_place(content, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.json .*{message}"):
        read_squad(str(path), cache_dir=str(tmp_path / "cache"))
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*none.json"):
        read_squad(str(tmp_path / "none.json"))


def test_answers_have_to_stand_where_they_say():
    good = [question(f"good{i}", TOWER, "Where?", "Paris", ("1889", TOWER.index("1889"))) for i in range(3)]
    check_examples(rows(*good), "dev", version_2=False)
    shifted = question("shifted", TOWER, "Where?", "Paris", ("Paris", 3))  # the second of two
    negative = question("negative", TOWER, "Where?", (".", -1))  # which indexes the last character
    blank = question("blank", TOWER, "Where?", (" ", 3))
    beyond = question("beyond", TOWER, "Where?", ("company.", len(TOWER)))
    with pytest.raises(
        ValueError, match="dev: 4 questions with answers that are not .*Ids: shifted, negative, blank, b"
    ):
        check_examples(rows(good[0], shifted, negative, blank, good[1], beyond), "dev", version_2=True)
    check_examples(rows(shifted, negative), "test", version_2=False, answered=False)
    many = [question(f"q{i}", TOWER, "Where?", ("Rome", 0)) for i in range(7)]
    with pytest.raises(ValueError, match="7 questions with .* Ids: q0, q1, q2, q3, q4, …$"):
        check_examples(rows(*many), "dev", version_2=False)


def test_ids_occur_once():
    twice = [question(name, TOWER, "Where?", "Paris") for name in ("a", "b", "a", "c")]
    for answered in (True, False):
        with pytest.raises(ValueError, match="dev: 1 question with an id that another question has. Ids: a$"):
            check_examples(rows(*twice), "dev", version_2=True, answered=answered)


def test_questions_without_an_answer_are_of_version_2():
    examples = rows(question("a", TOWER, "Where?", "Paris"), question("b", TOWER, "Which river?"))
    with pytest.raises(ValueError, match="1 question with no answer.*--version_2_with_negative.*Ids: b"):
        check_examples(examples, "dev", version_2=False)
    check_examples(examples, "dev", version_2=True)
    check_examples(examples, "test", version_2=False, answered=False)


def test_a_data_set_needs_its_columns_and_a_question():
    examples = rows(question("a", TOWER, "Where?", "Paris"))
    with pytest.raises(ValueError, match=r"squad lacks the columns \['context', 'answers'\]"):
        check_examples(examples.remove_columns(["answers", "context"]), "squad", version_2=False)
    with pytest.raises(ValueError, match="squad holds no question"):
        check_examples(examples.select([]), "squad", version_2=False)


# Windows


TOKENIZERS = {
    "wordpiece": lambda: wordpiece(),
    "wordpiece, left": lambda: wordpiece(padding_side="left"),
    "byte bpe": lambda: byte_bpe(),
}
LENGTH, STRIDE = 56, 12


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def examples():
    joined = [
        question(
            "long",
            " ".join([TOWER] * 4),
            "Who built it?",
            ("Eiffel's company", 3 * len(TOWER) + 3 + TOWER.index("Eiffel's")),
        )
    ]
    return rows(*make_questions(12, seed=3, negatives=True), *joined)


def windows_of(examples, tokenizer, labels, pad=False, max_seq_length=LENGTH, doc_stride=STRIDE, **options):
    make = feature_maker(tokenizer, max_seq_length=max_seq_length, doc_stride=doc_stride, pad=pad, labels=labels)
    columns = examples.column_names
    return examples.map(make, batched=True, with_indices=True, remove_columns=columns, batch_size=5, **options)


def expected_windows(tokenizer, example):
    """What [`windows_of`] has to give for one question, from the whole context's tokens and their offsets."""
    whole = tokenizer(example["question"], example["context"], return_offsets_mapping=True)
    tokens = [i for i, sequence in enumerate(whole.sequence_ids()) if sequence == 1]
    first, last = tokens[0], tokens[-1] + 1
    room = LENGTH - (len(whole["input_ids"]) - len(tokens))
    start = first
    while True:
        end = min(start + room, last)
        around = [*whole["input_ids"][:first], *whole["input_ids"][start:end], *whole["input_ids"][last:]]
        spans = [(OUTSIDE, OUTSIDE)] * first + whole["offset_mapping"][start:end]
        yield around, spans + [(OUTSIDE, OUTSIDE)] * (len(whole["input_ids"]) - last)
        if end == last:
            return
        start = end - STRIDE


@pytest.mark.parametrize("pad", [False, True])
def test_windows_cover_the_context_and_share_the_stride(tokenizer, examples, pad):
    found = windows_of(examples, tokenizer, labels=False, pad=pad)
    expected = [(row, *window) for row, one in enumerate(examples) for window in expected_windows(tokenizer, one)]
    assert len(found) == len(expected) > 1.5 * len(examples)
    left = tokenizer.padding_side == "left"
    for window, (row, ids, spans) in zip(found, expected, strict=True):
        missing = LENGTH - len(ids) if pad or left else 0
        real = slice(missing, None) if left else slice(0, len(ids))
        assert len(window["input_ids"]) == len(ids) + missing
        assert window["input_ids"][real] == ids
        assert list(zip(window["token_start"], window["token_end"], strict=True))[real] == spans
        assert window["token_start"].count(OUTSIDE) == spans.count((OUTSIDE, OUTSIDE)) + missing
        assert sum(window["attention_mask"]) == len(ids) and window["attention_mask"][real] == [1] * len(ids)
        assert (window["example"], window["null_position"]) == (row, missing if left else 0)


def test_labels_are_the_answer_wherever_it_is_whole(tokenizer, examples):
    train = windows_of(examples, tokenizer, labels=True)
    told = windows_of(examples, tokenizer, labels=False)  # the same windows, with their offsets
    assert "example" not in train.column_names and "start_positions" not in told.column_names
    assert train["input_ids"][:] == told["input_ids"][:]
    labelled = set()
    for window, where in zip(train, told, strict=True):
        example = examples[where["example"]]
        starts, ends = where["token_start"], where["token_end"]
        first, last = window["start_positions"], window["end_positions"]
        answers = example["answers"]
        begin = answers["answer_start"][0] if answers["text"] else None
        inside = begin is not None and any(
            start != OUTSIDE and start <= begin < max(end, start + 1) for start, end in zip(starts, ends, strict=True)
        )
        inside = inside and begin + len(answers["text"][0]) <= max(ends)
        if not inside:
            assert first == last == where["null_position"]
        else:
            labelled.add(example["id"])
            assert example["context"][starts[first] : ends[last]] == answers["text"][0]
    assert labelled == {one["id"] for one in examples if one["answers"]["text"]}


def test_labels_of_spans_worked_out_by_hand():
    # Two windows: [CLS] ? [SEP] and the tokens of "ab cd, ef" (0-2, 3-5, 5-6, 7-9), then those of its second half.
    starts = np.array([-1, -1, -1, 0, 3, 5, 7, -1, -1, -1, -1, 5, 7, -1])
    ends = np.array([-1, -1, -1, 2, 5, 6, 9, -1, -1, -1, -1, 6, 9, -1])
    lengths, null = np.array([8, 6]), np.array([0, 1])
    for answer, first, second in (
        ((0, 2), (3, 3), (1, 1)),
        ((3, 6), (4, 5), (1, 1)),  # the second window has its end only
        ((5, 9), (5, 6), (3, 4)),
        ((8, 9), (6, 6), (4, 4)),  # a part of a token
        ((0, 9), (3, 6), (1, 1)),
        ((8, 12), (0, 0), (1, 1)),  # beyond the last token
        ((-1, -1), (0, 0), (1, 1)),
    ):
        found = label_positions(starts, ends, lengths, np.array([answer, answer]), null)
        assert list(zip(*(side.tolist() for side in found), strict=True)) == [first, second], answer


FATHA = "\u064e"
ACUTE = "\u0301"
LABELLED = {  # context, answer, and what its labels read, which is the answer but for what no token holds
    "several tokens of one character": ("Snow \u2603 falls", "\u2603", "\u2603"),
    "the last of them": ("\u96ea\u2603 falls", "\u2603", "\u2603"),
    "one that becomes three": ("Add ½ cup", "½", "½"),
    "one within a word": ("1½x cups", "½", "½"),
    "a mark at the end": (f"The cafe{ACUTE} is open", f"cafe{ACUTE}", "cafe"),
    "a mark at the end of all": (f"It is a cafe{ACUTE}", f"cafe{ACUTE}", "cafe"),
    "a mark in the middle": (f"The re{ACUTE}gime is over", f"re{ACUTE}gime", f"re{ACUTE}gime"),
    "a vowel sign": (f"\u0642\u0627\u0644 \u0643\u062a{FATHA} \u0647\u0648", f"\u0643\u062a{FATHA}", "\u0643\u062a"),
    "marks alone": (f"The cafe{ACUTE}{ACUTE} is open", ACUTE + ACUTE, ""),
}


@pytest.mark.parametrize("case", LABELLED)
@pytest.mark.parametrize("make", [wordpiece, folding_bpe], ids=lambda make: make.__name__)
def test_labels_where_tokens_and_characters_are_not_one_to_one(make, case):
    tokenizer = make()
    context, answer, read = LABELLED[case]
    asked = rows(question("a", context, "What?", (answer, context.index(answer))))
    labelled, told = (windows_of(asked, tokenizer, labels=labels)[0] for labels in (True, False))
    first, last = labelled["start_positions"], labelled["end_positions"]
    if not read:
        assert first == last == told["null_position"]
        return
    whole = context[told["token_start"][first] : told["token_end"][last]]
    assert whole == read or make is wordpiece and read in whole and " " not in whole  # a word that it does not know
    held = [
        i
        for i, (start, end) in enumerate(zip(told["token_start"], told["token_end"], strict=True))
        if start != OUTSIDE and end > context.index(answer) and start < context.index(answer) + len(answer)
    ]
    assert (first, last) == (held[0], held[-1])
    assert make is wordpiece or last > first or "mark" in case or len(read) > 1


ALPHABET = [
    "a",
    "b",
    "Ada",
    " ",
    " ",
    ".",
    "½",
    "é",
    f"e{ACUTE}",
    FATHA,
    "\u2603",
    "\u96ea",
    "\U0001f600",
    "\u0643",
    "ﬁ",
]


@pytest.mark.parametrize("make", [wordpiece, byte_bpe, folding_bpe], ids=lambda make: make.__name__)
@pytest.mark.parametrize("seed", range(2))
def test_labels_are_the_tokens_that_hold_the_answer_in_every_window_that_has_them(make, seed):
    """Against a search in the whole context's tokens, over random texts of all kinds of characters."""
    random, tokenizer = np.random.default_rng(seed), make()
    made = []
    while len(made) < 60:
        context = "".join(random.choice(ALPHABET, 60))
        start, length = random.integers(0, len(context)), random.integers(1, 8)
        if context[start : start + length].strip():
            made.append(question(f"q{len(made)}", context, "a?", (context[start : start + length], int(start))))
    asked = rows(*made)
    labelled, told = (
        windows_of(asked, tokenizer, labels=labels, max_seq_length=20, doc_stride=8) for labels in (True, False)
    )
    found = {True: 0, False: 0}
    for window, where in zip(labelled, told, strict=True):
        example = asked[where["example"]]
        begin, end = answers_span(example)
        spans = list(zip(where["token_start"], where["token_end"], strict=True))
        encoded = tokenizer(example["question"], example["context"], return_offsets_mapping=True)
        whole = [  # a space may be a token of no characters
            span
            for span, part in zip(encoded["offset_mapping"], encoded.sequence_ids(), strict=True)
            if part == 1 and span[0] < span[1]
        ]
        first = next((span for span in whole if span[1] > begin), None)
        last = next((span for span in reversed(whole) if span[0] < end), None)
        nothing = first is None or last is None or first[0] >= last[1] or min(last[1], end) <= max(first[0], begin)
        own = [i for i, span in enumerate(spans) if span[0] < span[1] and span[1] > begin and span[0] < end]
        if nothing or not own or spans[own[0]][0] > first[0] or spans[own[-1]][1] < last[1]:
            expected = where["null_position"], where["null_position"]
        else:
            expected = own[0], own[-1]
        assert (window["start_positions"], window["end_positions"]) == expected, (example["context"], begin, end)
        found[expected[0] != where["null_position"]] += 1
    assert min(found.values()) > 40


def answers_span(example):
    """Characters of the first answer, without spaces around it."""
    text, start = example["answers"]["text"][0], example["answers"]["answer_start"][0]
    return start + len(text) - len(text.lstrip()), start + len(text.rstrip())


def test_spaces_around_an_answer_are_no_part_of_it(tokenizer):
    text = "Where does Ada live?"
    context = "Ada lives in New York and works as a baker ."
    padded = question("a", context, text, (" New York ", context.index(" New")))
    plain = question("b", context, text, "New York")
    found = windows_of(rows(padded, plain), tokenizer, labels=True)
    assert found[0] == found[1]
    told = windows_of(rows(plain), tokenizer, labels=False)[0]
    first, last = found[0]["start_positions"], found[0]["end_positions"]
    assert context[told["token_start"][first] : told["token_end"][last]] == "New York"


def test_windows_made_by_several_processes_know_their_question(examples):
    tokenizer = wordpiece()
    alone, together = (windows_of(examples, tokenizer, labels=False, num_proc=number) for number in (None, 2))
    assert together["example"][:] == alone["example"][:] and together["input_ids"][:] == alone["input_ids"][:]


def test_a_question_that_leaves_no_room_is_refused(examples):
    tokenizer = wordpiece()
    words = "Where does Ada live and what does Ada work as ?"
    length = len(tokenizer(words, add_special_tokens=False)["input_ids"])
    asked = rows(question("a", TOWER, "When?", "1889"), question("b", TOWER, words, "1889"))
    windows_of(asked, tokenizer, labels=True, max_seq_length=length + 3 + 9, doc_stride=8)  # one new token a window
    with pytest.raises(
        ValueError, match=f"leaves 8 tokens .* a question of {length}, and `doc_stride` 8.*'Where does"
    ):
        windows_of(asked, tokenizer, labels=True, max_seq_length=length + 3 + 8, doc_stride=8)
    with pytest.raises(ValueError, match="leaves 0 tokens"):
        windows_of(asked, tokenizer, labels=True, max_seq_length=length - 1, doc_stride=0)


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(ValueError, match="CanineTokenizer gives no character offsets.*fast tokenizer"):
        check_tokenizer(transformers.CanineTokenizer())
    check_tokenizer(wordpiece())


# The search for answers


def random_windows(seed, whole_numbers=False):
    """Questions, their windows (some without context, in any order) and logits wider than the longest window."""
    random = np.random.default_rng(seed)
    contexts = ["".join(random.choice(list("abcdefgh"), 40)) for _ in range(int(random.integers(1, 5)))]
    examples = rows(*(question(f"q{i}", context, "?") for i, context in enumerate(contexts)))
    made = []
    for example in [*range(len(contexts)), *random.integers(0, len(contexts), 3)]:
        length = int(random.integers(4, 12))
        first, last = sorted(random.integers(1, length, 2))
        start = np.where(np.arange(length) < first, OUTSIDE, 3 * np.arange(length))
        start[last + 1 :] = OUTSIDE
        if random.random() < 0.15:
            start[:] = OUTSIDE
        end = np.where(start == OUTSIDE, OUTSIDE, start + random.integers(1, 4, length))
        made.append({"example": int(example), "null_position": 0, "token_start": start, "token_end": end})
    random.shuffle(made)
    shape = (len(made), max(len(window["token_start"]) for window in made) + int(random.integers(0, 3)))
    # Whole numbers give ties and mean the same in half precision.
    draw = random.integers(-3, 4, (2, *shape)) if whole_numbers else random.normal(size=(2, *shape))
    return examples, Dataset.from_list(made), (draw[0], draw[1])


def search_by_loops(examples, features, logits, n_best_size, max_answer_length):
    """Per question: every (score, text) that the search may see, best first, and the lowest null score."""
    starts, ends = (side.tolist() for side in logits)
    found = [[] for _ in examples]
    null = [math.inf for _ in examples]
    for window, start, end in zip(features, starts, ends, strict=True):
        context = examples[window["example"]]["context"]
        tokens = [i for i, first in enumerate(window["token_start"]) if first != OUTSIDE]
        best_starts = sorted(tokens, key=lambda i: -start[i])[:n_best_size]
        best_ends = sorted(tokens, key=lambda i: -end[i])[:n_best_size]
        for i in best_starts:
            for j in best_ends:
                if i <= j < i + max_answer_length:
                    text = context[window["token_start"][i] : window["token_end"][j]]
                    found[window["example"]].append((start[i] + end[j], text))
        score = start[window["null_position"]] + end[window["null_position"]]
        null[window["example"]] = min(null[window["example"]], score)
    return [sorted(spans, key=lambda span: -span[0]) for spans in found], null


def scores(candidates):
    return [one["start_logit"] + one["end_logit"] for one in candidates]


@pytest.mark.parametrize("seed", range(20))
def test_search_finds_what_plain_loops_find(seed, monkeypatch):
    monkeypatch.setattr(answers_module, "WINDOWS_AT_ONCE", 3)
    examples, features, logits = random_windows(seed)
    for size, longest in ((1, 30), (3, 2), (20, 30), (5, 1)):
        answers = find_answers(examples, features, logits, n_best_size=size, max_answer_length=longest)
        expected, _ = search_by_loops(examples, features, logits, size, longest)
        assert answers.null_odds is None
        for name, spans in zip(examples["id"], expected, strict=True):
            found = answers.n_best[name]
            assert [one["text"] for one in found] == [text for _, text in spans[:size]]
            assert scores(found) == [score for score, _ in spans[:size]]  # the same two numbers are added
            assert answers.texts[name] == answers.spans[name] == (spans[0][1] if spans else "")
            weights = [math.exp(score - spans[0][0]) for score, _ in spans[:size]]
            expected_odds = [weight / sum(weights) for weight in weights]
            # Numpy's exp and sum may round the last bit otherwise.
            assert [one["probability"] for one in found] == pytest.approx(expected_odds, rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_search_with_ties_and_half_precision(seed):
    examples, features, logits = random_windows(seed, whole_numbers=True)
    half = tuple(side.astype(np.float16) for side in logits)
    answers = find_answers(examples, features, half, n_best_size=50, max_answer_length=4)
    expected, _ = search_by_loops(examples, features, logits, 50, 4)
    for name, spans in zip(examples["id"], expected, strict=True):
        assert scores(answers.n_best[name]) == [score for score, _ in spans][:50]
        best = {text for score, text in spans if score == spans[0][0]}
        assert answers.texts[name] in (best or {""})


@pytest.mark.parametrize("seed", range(10))
def test_no_answer_is_weighed_against_the_best_span(seed):
    examples, features, logits = random_windows(seed)
    expected, null = search_by_loops(examples, features, logits, 4, 30)
    for threshold in (-1.0, 0.0, 2.0):
        answers = find_answers(
            examples,
            features,
            logits,
            n_best_size=4,
            max_answer_length=30,
            version_2=True,
            null_score_diff_threshold=threshold,
        )
        for name, spans, score in zip(examples["id"], expected, null, strict=True):
            odds = score - spans[0][0] if spans else 1e9
            assert answers.null_odds[name] == odds
            assert answers.spans[name] == (spans[0][1] if spans else "")
            assert answers.texts[name] == ("" if odds > threshold else spans[0][1])
            candidates = answers.n_best[name]
            assert scores(candidates) == sorted([score, *(one for one, _ in spans[:4])], reverse=True)
            assert next(one for one in candidates if one["text"] == "")
            assert sum(one["probability"] for one in candidates) == pytest.approx(1, rel=1e-12)


def test_odds_equal_to_the_threshold_answer():
    examples = rows(question("q", "abc", "?"))
    one = {"example": 0, "null_position": 0, "token_start": [OUTSIDE, 0, 1], "token_end": [OUTSIDE, 1, 3]}
    logits = np.array([[2.0, 1.0, 0.0]]), np.array([[2.0, 0.0, 1.0]])
    options = {"n_best_size": 3, "max_answer_length": 3, "version_2": True}
    for threshold, text in ((1.9, ""), (2.0, "abc")):
        found = find_answers(
            examples, Dataset.from_list([one]), logits, null_score_diff_threshold=threshold, **options
        )
        assert (found.null_odds, found.texts, found.spans) == ({"q": 2.0}, {"q": text}, {"q": "abc"})


def test_logits_of_other_windows_are_refused():
    examples, features, (starts, ends) = random_windows(0)
    with pytest.raises(ValueError, match=f"one row a window, got {len(features) - 1} and {len(features) - 1} of"):
        find_answers(examples, features, (starts[1:], ends[1:]), n_best_size=2, max_answer_length=3)


# Arguments


BASE = ["--model_name_or_path", "m", "--output_dir", "o", "--report_to", "none", "--use_cpu"]
TRAIN = [*BASE, "--do_train", "--train_file", "t.json"]
OTHERS = {
    "target_sparsity": 0.7,
    "target_unit": "macs",
    "sequence_length": 128,
    "structures": ("neurons",),
    "pruning_start_ratio": 0.1,
    "pruning_end_ratio": 0.5,
    "pruning_periods": 3,
    "milestones": (0.3, 0.4),  # below the default target as well
    "saliency": "taylor",
    "saliency_decay": 0.9,
    "saliency_interval": 2,
    "epsilon": 0.2,
    "lmbda": 0.01,
    "min_heads": 2,
    "min_neurons": 16,
    "round_to": 4,
    "distillation_weight": 0.5,
    "distillation_temperature": 4.0,
    "distillation_hidden_weight": 0.1,
    "uniform": True,
    "shrink_during_training": True,
    "keep_dropout": False,
}


def command_line(settings):
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name}", *(map(str, value) if isinstance(value, tuple) else (str(value),)))
    ]


def test_every_setting_of_the_compression_is_an_argument():
    names = [field.name for field in dataclasses.fields(OTOConfig)]
    alone = [name for name in names if name != "latency_table"]  # which needs its unit; see the test after this one
    assert [name for name in alone if getattr(OTOConfig(), name) != OTHERS[name]] == alone  # none is left out here
    compression = parse_arguments([*TRAIN, "--compress"])[2]
    assert compression.oto_config() == OTOConfig()
    assert {*vars(compression)} == {*names, "compress", "teacher_model_name_or_path"}
    compression = parse_arguments([*TRAIN, "--compress", *command_line(OTHERS)])[2]
    assert compression.oto_config() == OTOConfig(**OTHERS)
    assert parse_arguments(TRAIN)[2].oto_config() is None


def test_a_table_of_latencies_is_given_by_its_file(tmp_path):
    table = made_table(partition(tiny_model("BertForQuestionAnswering")))
    table.save(tmp_path / "table.json")
    given = command_line({"target_unit": "latency", "latency_table": tmp_path / "table.json"})
    expected = OTOConfig(target_unit="latency", latency_table=table)
    assert parse_arguments([*TRAIN, "--compress", *given])[2].oto_config() == expected
    with pytest.raises(ValueError, match="^`--target_unit`, `--latency_table` set up the compression"):
        parse_arguments([*TRAIN, *given])
    with pytest.raises(FileNotFoundError, match="`latency_table` nowhere.json is no file"):
        parse_arguments([*TRAIN, "--compress", "--target_unit", "latency", "--latency_table", "nowhere.json"])


@pytest.mark.parametrize("name", OTHERS)
def test_settings_without_compress_are_refused(name):
    given = command_line({name: OTHERS[name]})
    with pytest.raises(ValueError, match=f"^`--{name}` set up the compression: give `--compress` too"):
        parse_arguments([*TRAIN, *given])
    with pytest.raises(ValueError, match=f"^`--{name}`, `--teacher_model_name_or_path` set up the compression"):
        parse_arguments([*TRAIN, *given, "--teacher_model_name_or_path", "t"])


def test_the_target_may_be_none():
    for word in ("none", "None"):
        config = parse_arguments([*TRAIN, "--compress", "--target_sparsity", word])[2].oto_config()
        assert config == OTOConfig(target_sparsity=None)
    with pytest.raises(ValueError, match="`target_sparsity` must be a number or \"none\", got 'half'"):
        parse_arguments([*TRAIN, "--compress", "--target_sparsity", "half"])
    with pytest.raises(ValueError, match=r"`target_sparsity` must be in \[0, 1\), got 1.5"):
        parse_arguments([*TRAIN, "--compress", "--target_sparsity", "1.5"])


def test_arguments_in_a_json_file(tmp_path):
    settings = {
        "model_name_or_path": "m",
        "output_dir": "o",
        "do_train": True,
        "train_file": "t.json",
        "compress": True,
        **OTHERS,
        "structures": ["neurons"],
    }
    assert parse_arguments([write(tmp_path / "a.json", settings)])[2].oto_config() == OTOConfig(**OTHERS)
    published = {"target_sparsity": None, "milestones": []}
    path = write(tmp_path / "a.json", {**settings, **published, "learning_rate": 0.5, "n_best_size": 9})
    _, data, compression, training = parse_arguments([path])
    assert compression.oto_config() == OTOConfig(**OTHERS | published)
    assert (data.n_best_size, training.learning_rate) == (9, 0.5)
    with pytest.raises(ValueError, match="speed"):
        parse_arguments([write(tmp_path / "b.json", {**settings, "speed": 1})])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (BASE[2:] + ["--do_train", "--train_file", "t.json"], "Give `--model_name_or_path`, or both"),
        (BASE[2:] + ["--config_name", "c", "--train_file", "t.json"], "Give `--model_name_or_path`, or both"),
        ([*BASE, "--do_train"], "Give either `--dataset_name` or files"),
        ([*TRAIN, "--dataset_name", "squad"], "Give either `--dataset_name` or files"),
        ([*BASE, "--train_file", "t.json"], "Nothing to do"),
        ([*TRAIN, "--do_eval"], "`--do_eval` needs `--validation_file`"),
        ([*BASE, "--do_predict", "--train_file", "t.json"], "`--do_predict` needs `--test_file`"),
        ([*BASE, "--do_train", "--test_file", "t.json"], "`--do_train` needs `--train_file`"),
        ([*BASE, "--compress", "--do_eval", "--validation_file", "t.json"], "`--compress` .*give `--do_train` too"),
        ([*TRAIN, "--max_seq_length", "0"], "`max_seq_length` must be at least 1, got 0"),
        ([*TRAIN, "--n_best_size", "0"], "`n_best_size` must be at least 1, got 0"),
        ([*TRAIN, "--max_answer_length", "-1"], "`max_answer_length` must be at least 1, got -1"),
        ([*TRAIN, "--max_eval_samples", "0"], "`max_eval_samples` must be at least 1, got 0"),
        ([*TRAIN, "--doc_stride", "384"], r"`doc_stride` must be in \[0, `max_seq_length`\), got 384 and 384"),
        ([*TRAIN, "--doc_stride", "-1"], "`doc_stride` must be in"),
        ([*TRAIN, "--speed", "3"], "--speed"),
    ],
)
def test_arguments_that_break_a_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(arguments)


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as done:
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert "--target_sparsity" in text and "--null_score_diff_threshold" in text


# What is left on disk


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob("*"))}


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"Zoë": [1, 2.5]})
    assert path.read_text(encoding="utf-8") == '{\n  "Zoë": [\n    1,\n    2.5\n  ]\n}\n'
    before = tree(tmp_path)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert tree(tmp_path) == before
    write_text = Path.write_text

    def half(self, text, **options):
        write_text(self, text[: len(text) // 2], **options)
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 1})
    assert path.read_bytes() == before[path]


def make_run(folder, *steps):
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
    (folder / "config.json").write_text("{}")


def test_the_folder_of_another_run_is_refused_untouched(tmp_path):
    run = tmp_path / "run"
    assert check_output_dir(str(run), resume=None, overwrite=False) is None
    assert not run.exists()
    run.mkdir()
    assert check_output_dir(str(run), resume=None, overwrite=False) is None  # empty
    make_run(run, 5)
    (run / "config.json").chmod(0o444)
    before = tree(tmp_path)
    for resume in (None, "false", "none"):
        with pytest.raises(ValueError, match="`output_dir` .*run is not empty, .*--overwrite_output_dir"):
            check_output_dir(str(run), resume=resume, overwrite=False)
    assert check_output_dir(str(run), resume=None, overwrite=True) is None
    with pytest.raises(ValueError, match="`output_dir` .*config.json is a file"):
        check_output_dir(str(run / "config.json"), resume=None, overwrite=True)
    assert tree(tmp_path) == before


def test_a_run_is_resumed_from_its_own_checkpoint(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    with pytest.raises(ValueError, match="`resume_from_checkpoint` last: there is no such checkpoint"):
        check_output_dir(str(run), resume="last", overwrite=False)
    make_run(run, 5, 10, 9)
    make_run(other, 7)
    for resume in ("last", "true", "True", str(run / "checkpoint-10"), f"{run}/checkpoint-10/"):
        found = check_output_dir(str(run), resume=resume, overwrite=False)
        assert Path(found) == run / "checkpoint-10"
    assert check_output_dir(str(run), resume=str(run / "checkpoint-5"), overwrite=False) == str(run / "checkpoint-5")
    for missing in (run / "checkpoint-6", run):
        with pytest.raises(ValueError, match="there is no such checkpoint"):
            check_output_dir(str(run), resume=str(missing), overwrite=False)
    # Another run's checkpoint starts a run in a folder that is new, not in one that holds a run.
    start = str(other / "checkpoint-7")
    assert check_output_dir(str(tmp_path / "new"), resume=start, overwrite=False) == start
    with pytest.raises(ValueError, match="is not empty"):
        check_output_dir(str(run), resume=start, overwrite=False)
    assert check_output_dir(str(run), resume=start, overwrite=True) == start
    # A checkpoint whose writing was cut short is none.
    (run / "checkpoint-11").mkdir()
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        check_output_dir(str(run), resume="last", overwrite=False)


def test_only_checkpoints_are_removed(tmp_path):
    make_run(tmp_path, 5, 10)
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    remove_checkpoints(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-notes", "config.json"]


def test_results_are_written_part_by_part(tmp_path):
    results = Results(str(tmp_path / "run"), enabled=True)
    results.add("train", {"loss": 1.5})
    results.add("eval", {"eval_f1": 80.0})
    read = {path.name: json.loads(path.read_text()) for path in (tmp_path / "run").iterdir()}
    assert read == {
        "train_results.json": {"loss": 1.5},
        "eval_results.json": {"eval_f1": 80.0},
        "all_results.json": {"loss": 1.5, "eval_f1": 80.0},
    }
    other = Results(str(tmp_path / "other"), enabled=False)  # as in all processes but one
    other.add("eval", {"eval_f1": 80.0})
    assert other.all == {"eval_f1": 80.0} and not (tmp_path / "other").exists()


def test_windows_share_exactly_the_stride():
    """As a user would count it: the tokens that two neighbouring windows both hold."""
    context, asked = question("a", " ".join(f"{number} ." for number in range(1000, 1040)), "Where?", "1020")
    tokenizer = wordpiece()
    found = windows_of(rows((context, asked)), tokenizer, labels=False, max_seq_length=40, doc_stride=7)
    spans = [[start for start in window["token_start"] if start != OUTSIDE] for window in found]
    assert len(spans) > 3
    assert all(earlier[-7:] == later[:7] and earlier[-8] not in later for earlier, later in pairwise(spans))
