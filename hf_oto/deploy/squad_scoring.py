"""Exact match and F1 of answers, as SQuAD's official scripts compute them.

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text" (EMNLP 2016) and "Know What You Don't
Know: Unanswerable Questions for SQuAD" (ACL 2018).
"""

from __future__ import annotations

import collections
import json
import os
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .answering import QuestionAnswerer

_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII's only, as in the official scripts
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> int:
    """1 if both are the same text once normalized, else 0."""
    return int(normalize(prediction) == normalize(gold))


def f1(prediction: str, gold: str, empty_matches: bool) -> float:
    """Harmonic mean of precision and recall of the words. `empty_matches`: v2.0's rule for texts without words."""
    predicted = normalize(prediction).split()
    expected = normalize(gold).split()
    if empty_matches and not (predicted and expected):
        return int(predicted == expected)
    shared = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    if not shared:
        return 0
    precision = shared / len(predicted)
    recall = shared / len(expected)
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True)
class Question:
    """A question, the text that it is about, and its gold answers; none where there is no answer (SQuAD v2.0)."""

    text: str
    context: str
    answers: tuple[str, ...]


def read_questions(path: str | os.PathLike, limit: int | None = None) -> list[Question]:
    """
    Read a file of SQuAD's layout, or its first `limit` questions.

    Raises:
        `ValueError`: The file is not of that layout, or has no question; or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        questions = [
            Question(
                _text(asked["question"]),
                _text(paragraph["context"]),
                tuple(_text(gold["text"]) for gold in asked["answers"]),
            )
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no JSON of SQuAD's layout (v1.1 or v2.0), with answers: {found}.") from error
    if not questions:
        raise ValueError(f"{path} has no question. Give a file with some.")
    return questions[:limit]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {repr(value)[:80]}")
    return value


def squad_scores(
    answerer: QuestionAnswerer, questions: Sequence[Question], *, show_progress: bool = False
) -> dict[str, float]:
    """
    Exact match and F1 in percent, the mean over all questions of the best over the gold answers.

    By v2.0's rules, with no answer among the answers, if a question has no gold answer; else by v1.1's.
    """
    version_2 = any(not question.answers for question in questions)
    texts, contexts = [question.text for question in questions], [question.context for question in questions]
    found = answerer.answer(texts, contexts, handle_impossible_answer=version_2, show_progress=show_progress)
    predictions = [answers[0].text if answers else "" for answers in found]
    exact = words = 0.0
    for question, prediction in zip(questions, predictions, strict=True):
        golds: Sequence[str] = question.answers
        if version_2:  # a gold answer without words is none
            golds = [gold for gold in golds if normalize(gold)] or [""]
        exact += max(exact_match(prediction, gold) for gold in golds)
        words += max(f1(prediction, gold, version_2) for gold in golds)
    return {"exact_match": 100 * exact / len(questions), "f1": 100 * words / len(questions)}
