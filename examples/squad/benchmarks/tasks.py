"""Tasks beside SQuAD for `run_task.py`: how their files are read, the head they take, and the score of predictions.

Files are the caller's: `wnut17` is `token<TAB>tag` with a blank line between sentences, `sst2` a label, a space and
the sentence, `stsb` a CSV of two sentences and a number.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

IGNORED = -100  # the label of a token that does not count

Row = dict[str, Any]  # `text`: one or two sentences, or the words of one; `label`: a class, a number, or a tag a word


@dataclass(frozen=True)
class Task:
    """A task, by what differs from the others.

    Args:
        read (`Callable`): A file -> its rows.
        auto (`type`): The Auto class of its head.
        score (`Callable`): Outputs, labels and the names of the classes -> a score of 0 to 100.
        label (`str`): What the score is called.
    """

    read: Callable[[Path], list[Row]]
    auto: Any
    score: Callable[[np.ndarray, np.ndarray, list[str]], float]
    label: str


def read_words(path: Path) -> list[Row]:
    """`token<TAB>tag` a line, a blank line between sentences."""
    rows: list[Row] = []
    for block in _lines(path, blank=True):
        pairs = [line.split("\t") for line in block]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(
                f"{path} must hold a token, a tab and a tag a line, got {block[0]!r} and what follows it."
            )
        rows.append({"text": [token for token, _ in pairs], "label": [tag for _, tag in pairs]})
    return rows


def read_sentences(path: Path) -> list[Row]:
    """A label, a space and the sentence a line."""
    pairs = [line.partition(" ") for line in _lines(path)]
    return [{"text": (sentence,), "label": label} for label, _, sentence in pairs]


def read_pairs(path: Path) -> list[Row]:
    """A CSV without a header: two sentences and a number."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [{"text": (first, second), "label": float(number)} for first, second, number in csv.reader(file)]


def _lines(path: Path, blank: bool = False) -> list[Any]:
    """The lines that are not blank; or the blocks of lines between those that are. Some characters break lines for
    Python alone: only a newline does here."""
    blocks: list[list[str]] = [[]]
    for line in path.read_text(encoding="utf-8-sig").split("\n"):
        line = line.removesuffix("\r")
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    full = [block for block in blocks if block]
    return full if blank else [line for block in full for line in block]


def accuracy(outputs: np.ndarray, labels: np.ndarray, names: list[str]) -> float:
    """Share of right classes."""
    return 100 * float((outputs.argmax(-1) == labels).mean())


def spearman(outputs: np.ndarray, labels: np.ndarray, names: list[str]) -> float:
    """Correlation of ranks; equal numbers share the mean of theirs."""
    return 100 * float(np.corrcoef(_ranks(outputs.reshape(-1)), _ranks(labels.reshape(-1)))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


def entity_f1(outputs: np.ndarray, labels: np.ndarray, names: list[str]) -> float:
    """F1 of entities, right where both ends and the type are, as in CoNLL-2003's and WNUT's evaluation."""
    found, gold = set(), set()
    for row, (own, theirs) in enumerate(zip(outputs.argmax(-1), labels, strict=True)):
        counted = theirs != IGNORED
        for spans, tags in ((found, own[counted]), (gold, theirs[counted])):
            spans |= {(row, *span) for span in entities([names[tag] for tag in tags])}
    shared = len(found & gold)
    return 200 * shared / (len(found) + len(gold)) if shared else 0.0


def entities(tags: list[str]) -> list[tuple[int, int, str]]:
    """First and last word and type of what BIO tags say. An I- without a beginning begins one."""
    spans: list[tuple[int, int, str]] = []
    for place, tag in enumerate(tags):
        position, _, kind = tag.partition("-")
        goes_on = position == "I" and bool(spans) and spans[-1][1:] == (place - 1, kind)
        if goes_on:
            spans[-1] = (spans[-1][0], place, kind)
        elif position in ("B", "I"):
            spans.append((place, place, kind))
    return spans


TASKS = {
    "wnut17": Task(read_words, AutoModelForTokenClassification, entity_f1, "F1 of entities"),
    "sst2": Task(read_sentences, AutoModelForSequenceClassification, accuracy, "accuracy"),
    "stsb": Task(read_pairs, AutoModelForSequenceClassification, spearman, "Spearman correlation"),
}
