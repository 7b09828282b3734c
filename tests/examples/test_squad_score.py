"""Exact match and F1 of hand-computed cases, through `evaluate` and offline, as the example computes them."""

from pathlib import Path

import evaluate
import pytest
from families import tiny_model
from squad_data import make_questions, squad, wordpiece, write

from hf_oto import QuestionAnswerer
from hf_oto.deploy.squad_scoring import read_questions, squad_scores

FOLDER = str(Path(__file__).resolve().parents[2] / "examples" / "squad" / "squad_score")

# Sums of a few fractions: what differs from the fraction written here is the last bit.
EXACTLY = {"rel": 1e-12}


def load(version):
    return evaluate.load(FOLDER, version, keep_in_memory=True)


@pytest.fixture(scope="module")
def v1():
    return load("v1.1")


@pytest.fixture(scope="module")
def v2():
    return load("v2.0")


def score(metric, *cases, **options):
    """Scores of (prediction, gold answers) or, in v2.0, (prediction, gold answers, null odds)."""
    predictions, references = [], []
    for number, (text, golds, *odds) in enumerate(cases):
        predictions.append({"id": str(number), "prediction_text": text})
        predictions[-1] |= {"no_answer_probability": odds[0]} if odds else {}
        answers = {"text": golds, "answer_start": [0] * len(golds)}
        references.append({"id": str(number), "answers": answers})
    return metric.compute(predictions=predictions, references=references, **options)


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("Paris", ["Paris"], 100, 100),
        ("Paris", ["London"], 0, 0),
        # Articles, case, spaces and ASCII punctuation do not count.
        ("The Eiffel  Tower.", ["eiffel tower"], 100, 100),
        ("an apple, a pear", ["apple pear"], 100, 100),
        ("U.S.A.", ["USA"], 100, 100),
        ("\tParis\n", ["Paris"], 100, 100),
        # An article is a whole word only; once its hyphen is gone this one is none.
        ("theatre", ["atre"], 0, 0),
        ("a-ha", ["ha"], 0, 0),
        ("now–the–end", ["now– –end"], 100, 100),  # a space takes its place
        # Precision 2/3, recall 2/2: 2 * 2/3 / (5/3).
        ("in Paris France", ["Paris, France"], 0, 80),
        # Words count as often as they occur on both sides: 2 shared, precision 2/4, recall 2/3.
        ("do do do mi", ["do do re"], 0, 400 / 7),
        # The best of several gold answers, for each measure: the second is closer (2 of 3, 2 of 2).
        ("in Paris France", ["London", "Paris, France", "Berlin"], 0, 80),
        ("Berlin", ["London", "Paris", "Berlin"], 100, 100),
        # Empty predictions.
        ("", ["Paris"], 0, 0),
        ("", ["the"], 100, 0),  # v1.1: the texts are the same, and share no word
        # Letters beyond ASCII are compared as they are, in lower case.
        ("ZOË", ["zoë"], 100, 100),
        ("Zoe", ["Zoë"], 0, 0),
        ("東京", ["東京"], 100, 100),
        ("ΣΊΣΥΦΟΣ", ["σίσυφος"], 100, 100),  # the last letter's own small form is lower()'s
        # Punctuation beyond ASCII does count.
        ("“Paris”", ["Paris"], 0, 0),
        ("1914–1918", ["19141918"], 0, 0),
        ("1914-1918", ["19141918"], 100, 100),
        # A no-break space is a space.
        ("20\u00a0km", ["20 km"], 100, 100),
    ],
)
def test_one_question_of_v1(v1, prediction, golds, exact, f1):
    assert score(v1, (prediction, golds)) == {"exact_match": exact, "f1": pytest.approx(f1, **EXACTLY)}


def test_v1_is_a_mean_over_questions(v1):
    found = score(v1, ("Paris", ["Paris"]), ("in Paris France", ["Paris, France"]), ("", ["London"]))
    assert found == {"exact_match": pytest.approx(100 / 3, **EXACTLY), "f1": pytest.approx(180 / 3, **EXACTLY)}


def test_questions_are_matched_by_id(v1):
    predictions = [{"id": "a", "prediction_text": "one"}, {"id": "b", "prediction_text": "two"}]
    golds = [
        {"id": name, "answers": {"text": [text], "answer_start": [0]}} for name, text in (("b", "two"), ("a", "one"))
    ]
    assert v1.compute(predictions=predictions, references=golds)["exact_match"] == 100
    with pytest.raises(ValueError, match="same ids"):
        v1.compute(predictions=[{"id": "c", "prediction_text": "one"}], references=golds[:1])


def test_v1_wants_an_answer_to_every_question(v1):
    with pytest.raises(ValueError, match=r"1 have none: \['1'\]"):
        score(v1, ("Paris", ["Paris"]), ("", []))


# (prediction, golds, null odds): what is answered at a threshold of 0 is what has lower odds.
V2 = [
    ("Paris", ["Paris"], -3.0),
    ("in Paris France", ["Paris, France"], -2.0),  # exact 0, F1 0.8
    ("London", [], -1.0),  # answers a question that has no answer
    ("Rome", ["Rome"], 1.0),  # right, but not said at 0
    ("Berlin", [], 2.0),
    ("", ["Madrid"], 3.0),
]


def test_v2(v2):
    found = score(v2, *V2, no_answer_threshold=0.0)
    # Exact: 1, 0, 0, 0 (withheld), 1 (withheld), 0. F1 has 0.8 for the second.
    expected = {
        "exact": 200 / 6,
        "f1": 280 / 6,
        "total": 6,
        "HasAns_exact": 100 / 4,
        "HasAns_f1": 180 / 4,
        "HasAns_total": 4,
        "NoAns_exact": 50.0,
        "NoAns_f1": 50.0,
        "NoAns_total": 2,
        # From nothing answered (2 right) in the order of the odds: 3, 3 or 3.8, one less, 3 or 3.8 once Rome is in.
        # A tie does not move the threshold.
        "best_exact": 300 / 6,
        "best_exact_thresh": -3.0,
        "best_f1": 380 / 6,
        "best_f1_thresh": -2.0,
    }
    assert found == {name: pytest.approx(number, **EXACTLY) for name, number in expected.items()}


@pytest.mark.parametrize(
    ("threshold", "exact", "f1"),
    [
        (-5.0, 2, 2),  # nothing is answered
        (-3.0, 3, 3),  # odds equal to the threshold answer
        (-1.0, 2, 2.8),
        (1.0, 3, 3.8),
        (9.0, 2, 2.8),  # all is answered
    ],
)
def test_v2_threshold(v2, threshold, exact, f1):
    found = score(v2, *V2, no_answer_threshold=threshold)
    assert found["exact"] == pytest.approx(100 * exact / 6, **EXACTLY)
    assert found["f1"] == pytest.approx(100 * f1 / 6, **EXACTLY)
    assert found["best_f1"] == pytest.approx(380 / 6, **EXACTLY)


def test_v2_threshold_is_1_by_default_as_in_the_official_script(v2):
    case = ("Paris", ["Paris"])
    assert score(v2, (*case, 1.0))["exact"] == 100
    assert score(v2, (*case, 1.01))["exact"] == 0


def test_v2_best_thresholds_lie_on_either_side(v2):
    # The sure ones are wrong and the unsure right: all have to be answered. exact 2 of 3, at the highest odds.
    found = score(v2, ("x", [], -1.0), ("Paris", ["Paris"], 4.0), ("Rome", ["Rome"], 5.0), no_answer_threshold=0.0)
    assert found["exact"] == 0
    assert (found["best_exact"], found["best_exact_thresh"]) == (pytest.approx(200 / 3, **EXACTLY), 5.0)
    # Nothing is worth answering: the threshold stays 0.
    found = score(v2, ("x", [], -1.0), ("y", ["Rome"], -2.0))
    assert (found["best_exact"], found["best_exact_thresh"]) == (50, 0)
    assert (found["best_f1"], found["best_f1_thresh"]) == (50, 0)


def test_v2_empty_texts(v2):
    # Nothing said where nothing is to be said is right whatever the odds, and takes nothing from the best threshold.
    found = score(v2, ("", [], -1.0), ("Paris", ["Paris"], 0.0))
    assert (found["exact"], found["f1"], found["best_exact"], found["best_exact_thresh"]) == (100, 100, 100, 0)
    # An article alone is no text either: v2.0's F1 of two texts without words is 1.
    found = score(v2, ("The", [], -1.0))
    assert (found["exact"], found["f1"]) == (100, 100)


def test_v2_a_gold_answer_without_words_is_dropped_but_its_question_has_an_answer(v2):
    found = score(v2, ("", ["The"], -1.0), ("Paris", ["a", "Paris"], -1.0))
    assert (found["exact"], found["f1"], found["HasAns_total"]) == (100, 100, 2)
    assert "NoAns_total" not in found
    assert score(v2, ("the", ["the", "Paris"], -1.0))["exact"] == 0
    # Withheld: the question does have an answer.
    assert score(v2, ("Paris", ["The"], 2.0))["exact"] == 0


def test_v2_of_one_kind_only(v2):
    found = score(v2, ("Paris", ["Paris"], -1.0))
    assert found["HasAns_total"] == 1 and not [name for name in found if name.startswith("NoAns")]
    found = score(v2, ("Paris", [], 2.0))
    assert found["NoAns_total"] == 1 and not [name for name in found if name.startswith("HasAns")]
    assert found["exact"] == 100


def test_other_versions_are_refused():
    with pytest.raises(ValueError, match='must be "v1.1" or "v2.0", got \'v3\''):
        load("v3")


@pytest.mark.parametrize("version", ["v1.1", "v2.0"])
def test_an_answerers_scores_are_those_of_the_metric(version, tmp_path):
    tokenizer = wordpiece()
    # Of random models one that is right now and then, and finds no answer where there is none.
    model = tiny_model("BertForQuestionAnswering", seed=5, vocab_size=len(tokenizer), max_position_embeddings=128)
    answerer = QuestionAnswerer(model, tokenizer)
    made = make_questions(60, seed=7, negatives=version == "v2.0")
    questions = read_questions(write(tmp_path / "dev.json", squad(*made)))
    assert [(one.context, one.text) for one in questions] == [(context, asked["question"]) for context, asked in made]
    assert read_questions(tmp_path / "dev.json", 4) == questions[:4]
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "dev.json").read_bytes())
    assert read_questions(tmp_path / "marked.json") == questions
    cases = []
    for one in questions:
        (best,) = answerer(one.text, one.context, handle_impossible_answer=version == "v2.0")
        # Decided by the answerer: its answers all count.
        cases.append((best.text, list(one.answers), *([0.0] if version == "v2.0" else [])))
    expected = score(load(version), *cases)
    found = squad_scores(answerer, questions)
    assert found["exact_match"] == pytest.approx(expected["exact_match" if version == "v1.1" else "exact"])
    assert found["f1"] == pytest.approx(expected["f1"]) and 0 < found["f1"] < 100
    assert version == "v1.1" or found["exact_match"] > 0


@pytest.mark.parametrize("content", ["{", "[]", '{"data": [{"paragraphs": [{"qas": [{}], "context": ""}]}]}'])
def test_what_is_no_squad_file_is_refused(content, tmp_path):
    (tmp_path / "dev.json").write_text(content)
    with pytest.raises(ValueError, match="dev.json is no JSON of SQuAD's layout"):
        read_questions(tmp_path / "dev.json")
    (tmp_path / "dev.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match="dev.json has no question"):
        read_questions(tmp_path / "dev.json")
