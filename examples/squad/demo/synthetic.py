"""Reading comprehension made up from a seed, in SQuAD's v1.1 JSON.

A paragraph tells the same kinds of facts of several subjects: where each of three people was born, which instrument
each of them plays. The type of a question therefore never gives its answer away: the right subject and the right fact
have to be found in the text, in other words than the question's. All names and values are shared by all paragraphs, so
knowing them does not help; which subjects stand together and what is said of them is new in every paragraph.
"""

import random
from dataclasses import dataclass
from typing import Any

from demo.topics import TOPICS, TOWN, Pool, Relation, Topic

COUNTS = {2: "two", 3: "three"}
MORE_OFTEN = (2, 2, 2, 3)  # two subjects are enough to choose from, and learned from sooner
RELATIONS = 2
OPENERS = 0.3


@dataclass(frozen=True)
class Fact:
    """Something that a paragraph says, and the character at which its value stands."""

    relation: Relation
    subject: str
    value: str
    value_start: int


def write_paragraph(topic: Topic, rng: random.Random) -> tuple[str, list[Fact]]:
    """A paragraph that tells the same two kinds of facts of two or three subjects in any order, and the facts."""
    taken: set[str] = set()
    subjects = [draw(topic.names, rng, taken) for _ in range(rng.choice(MORE_OFTEN))]
    relations = rng.sample(topic.relations, RELATIONS)
    text = ""
    if rng.random() < OPENERS:
        opener = rng.choice(topic.openers).format(n=COUNTS[len(subjects)], t=draw((TOWN,), rng, taken))
        text = f"{opener[0].upper()}{opener[1:]}. "
    pairs = [(subject, relation) for subject in subjects for relation in relations]
    rng.shuffle(pairs)
    facts = []
    for subject, relation in pairs:
        value = draw(relation.values, rng, taken)
        before, _, after = rng.choice(relation.statements).format(s=subject, v="\n").partition("\n")
        facts.append(Fact(relation, subject, value, len(text) + len(topic.article) + len(before)))
        text += f"{topic.article.capitalize()}{before}{value}{after}. "
    return text.rstrip(), facts


def draw(pool: Pool, rng: random.Random, taken: set[str]) -> str:
    """A value that shares no word with those that the paragraph has."""
    while True:
        value = " ".join(rng.choice(words) for words in pool)
        if taken.isdisjoint(value.split()):
            taken.update(value.split())
            return value


def ask(topic: Topic, fact: Fact, rng: random.Random) -> str:
    """A question on a fact."""
    return rng.choice(fact.relation.questions).format(s=topic.article + fact.subject)


def make_squad(sizes: dict[str, int], *, questions: int, seed: int) -> dict[str, dict[str, Any]]:
    """
    Make splits that share names and values, but no paragraph and no set of subjects that stand together.

    Args:
        sizes (`dict[str, int]`): Paragraphs of each split, by its name.
        questions (`int`): Questions on a paragraph, at most.
        seed (`int`): The same seed makes the same splits.

    Returns:
        `dict[str, dict]`: Of each split the content of a file in SQuAD's format.
    """
    rng = random.Random(seed)
    elsewhere: set[frozenset[str]] = set()  # subjects that stand together in an earlier split
    splits = {}
    for split, size in sizes.items():
        here: set[frozenset[str]] = set()
        paragraphs: dict[str, list[dict[str, Any]]] = {}  # questions by text
        while len(paragraphs) < size:
            topic = rng.choice(TOPICS)
            text, facts = write_paragraph(topic, rng)
            subjects = frozenset(fact.subject for fact in facts)
            if subjects in elsewhere or text in paragraphs:
                continue
            here.add(subjects)
            asked = rng.sample(facts, min(questions, len(facts)))
            paragraphs[text] = [
                {
                    "id": f"{split}-{len(paragraphs)}-{number}",
                    "question": ask(topic, fact, rng),
                    "answers": [{"text": fact.value, "answer_start": fact.value_start}],
                }
                for number, fact in enumerate(asked)
            ]
        elsewhere |= here
        contexts = [{"context": text, "qas": asked} for text, asked in paragraphs.items()]
        splits[split] = {"version": "1.1", "data": [{"title": f"Made up: {split}", "paragraphs": contexts}]}
    return splits
