"""Questions and tokenizers for the tests of the SQuAD example: small, made here, the same every time."""

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer, PreTrainedTokenizerBase, RobertaTokenizer

NAMES = (
    "Ada",
    "Zoë",
    "Björn",
    "Chiara",
    "Dmitri",
    "Eun-ji",
    "Farah",
    "Gustav",
    "Hina",
    "Íñigo",
    "Jack O'Neill",
    "Kofi",
)
CITIES = ("Paris", "São Paulo", "Łódź", "New York", "Tōkyō", "Nairobi", "the Hague", "Reykjavík")
JOBS = ("baker", "pilot", "civil engineer", "violinist", "nurse", "shepherd")
YEARS = ("1914", "1968", "c. 1700", "2003", "the 1920s")


def question(
    name: str, context: str, text: str, *answers: str | tuple[str, int], **more: Any
) -> tuple[str, dict[str, Any]]:
    """A context, and one question to it in SQuAD's layout. An answer starts where it first occurs, or as given."""
    golds = [(answer, context.index(answer)) if isinstance(answer, str) else answer for answer in answers]
    found = [{"text": gold, "answer_start": start} for gold, start in golds]
    return context, {"id": name, "question": text, "answers": found, **more}


def squad(*questions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """SQuAD's layout of what [`question`] gives, each in a paragraph of its own."""
    paragraphs = [{"context": context, "qas": [asked]} for context, asked in questions]
    return {"version": "1.1", "data": [{"title": "Tests", "paragraphs": paragraphs}]}


def write(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return str(path)


def make_questions(count: int, seed: int, negatives: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """Questions about what some sentences say; with `negatives` every third one about somebody they leave out."""
    generator = random.Random(seed)
    made = []
    for number in range(count):
        *people, absent = generator.sample(NAMES, 4)
        facts = [(name, *map(generator.choice, (CITIES, JOBS, YEARS))) for name in people]
        context = " ".join(
            f"{name} lives in {city}, works as a {job} since {year}." for name, city, job, year in facts
        )
        name, city, job, year = generator.choice(facts)
        start = context.index(f"{name} lives")
        text, answer = generator.choice(
            (("Where does {} live?", city), ("What does {} work as?", job), ("Since when does {} work?", year))
        )
        impossible = negatives and number % 3 == 2
        answers = [] if impossible else [(answer, context.index(answer, start + len(name)))]
        asked = text.format(absent if impossible else name)
        made.append(question(f"{seed}-{number}", context, asked, *answers, is_impossible=impossible))
    return made


def _texts() -> list[str]:
    return [text for context, asked in make_questions(60, seed=0) for text in (context, asked["question"])]


def wordpiece(**options: Any) -> PreTrainedTokenizerBase:
    """BERT's kind of tokenizer. Most words are one token; rare ones are several."""
    empty = BertTokenizer()
    special = sorted(empty.get_vocab(), key=empty.get_vocab().__getitem__)
    # Letters within words would get their ids in the order of a hash, and merges their order from the ids.
    text = empty.backend_tokenizer.normalizer.normalize_str("".join(_texts()))
    letters = sorted(f"##{letter}" for letter in set(text) if letter.isalnum())
    trainer = WordPieceTrainer(vocab_size=180, special_tokens=special + letters, show_progress=False)
    empty.backend_tokenizer.train_from_iterator(_texts(), trainer)
    return BertTokenizer(vocab=empty.backend_tokenizer.get_vocab(), **options)


def byte_bpe(**options: Any) -> PreTrainedTokenizerBase:
    """RoBERTa's kind: a space belongs to the token after it, and a letter may be several tokens."""
    return RobertaTokenizer(**options).train_new_from_iterator(_texts(), 320, show_progress=False)


def folding_bpe(**options: Any) -> PreTrainedTokenizerBase:
    """The same of text in NFKC, where one character may become several, and without accents, which no token holds."""
    tokenizer = byte_bpe(**options)
    folding = [normalizers.NFD(), normalizers.StripAccents(), normalizers.NFKC()]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(folding)
    return tokenizer
