"""The data: pairs with a score, questions with their paragraphs, and texts of any kind to learn embeddings from."""

import csv
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-ZÀ-ÞĀ-Ž\"'(])")
LONG = 40  # words from which a text goes into the batches of passages


@dataclass(frozen=True)
class Questions:
    """
    Questions, and the paragraphs that answer them.

    Args:
        paragraphs (`list[str]`): What is searched, each once.
        questions (`list[str]`): What is asked.
        answers (`list[int]`): For every question, which paragraph it was asked about.
    """

    paragraphs: list[str]
    questions: list[str]
    answers: list[int]

    def first(self, count: int | None) -> "Questions":
        """The first questions, and all paragraphs up to the last that they were asked about."""
        answers = self.answers[:count]
        return Questions(self.paragraphs[: max(answers) + 1], self.questions[:count], answers)


def read_pairs(path: Path) -> list[tuple[str, str, float]]:
    """Two sentences and how alike they are, in [0, 1], from a CSV file without a header whose scores are 0 to 5."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    pairs = []
    for number, row in enumerate(rows, 1):
        if len(row) != 3:
            raise ValueError(f"{path}, row {number}: two sentences and a score are needed, got {len(row)} fields.")
        score = float(row[2])
        if not 0 <= score <= 5:
            raise ValueError(f"{path}, row {number}: the score must be in [0, 5], got {score}.")
        pairs.append((row[0], row[1], score / 5))
    return pairs


def read_questions(path: Path) -> Questions:
    """What a file in SQuAD's JSON asks, and about which paragraphs."""
    paragraphs: dict[str, int] = {}
    questions, answers = [], []
    for article in json.loads(path.read_text(encoding="utf-8-sig"))["data"]:
        for paragraph in article["paragraphs"]:
            place = paragraphs.setdefault(paragraph["context"], len(paragraphs))
            for question in paragraph["qas"]:
                questions.append(question["question"])
                answers.append(place)
    return Questions(list(paragraphs), questions, answers)


def read_texts(path: Path) -> list[str]:
    """
    Every text of a file, by its ending: `.csv`, the two sentences of every pair; `.json`, SQuAD's questions, its
    paragraphs and their sentences; `.conll`, sentences of a token a line; `.txt`, a sentence a line after its label.
    """
    if path.suffix == ".csv":
        return [sentence for first, second, _ in read_pairs(path) for sentence in (first, second)]
    if path.suffix == ".json":
        asked = read_questions(path)
        return asked.questions + asked.paragraphs + [s for text in asked.paragraphs for s in SENTENCE_END.split(text)]
    if path.suffix == ".conll":
        blocks = re.split(r"\n\s*\n", path.read_text(encoding="utf-8-sig"))
        return [" ".join(line.split("\t")[0] for line in block.splitlines() if line.strip()) for block in blocks]
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # some characters break lines for Python alone
        return [line.partition(" ")[2] for line in lines if line.strip()]
    raise ValueError(f"{path}: its ending must be .csv, .json, .conll or .txt.")


def texts_to_learn_from(paths: Iterable[Path], seed: int = 0) -> dict[str, list[str]]:
    """
    Sentences and passages, each once, or one of them where there are no others. Long texts give more of either: every
    run of two to four of their sentences.

    Args:
        paths (`Iterable[Path]`): Files that [`read_texts`] reads.
        seed (`int`, *optional*, defaults to 0): Draws how many sentences a run has, and where it begins.
    """
    generator = random.Random(seed)
    texts = list(dict.fromkeys(text.strip() for path in paths for text in read_texts(path) if text.strip()))
    runs = []
    for text in texts:
        parts = SENTENCE_END.split(text)
        while len(parts) > 2:
            count = generator.randint(2, 4)
            runs.append(" ".join(parts[:count]))
            parts = parts[generator.randint(1, count) :]
    texts = list(dict.fromkeys(texts + runs))
    found = {
        "sentences": [text for text in texts if len(text.split()) < LONG],
        "passages": [text for text in texts if len(text.split()) >= LONG],
    }
    return {name: texts for name, texts in found.items() if texts}
