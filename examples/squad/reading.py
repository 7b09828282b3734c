"""Questions in SQuAD's format: read, checked, and laid out one question a row."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

FEATURES = Features(
    {
        "id": Value("string"),
        "context": Value("string"),
        "question": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int64"))},
    }
)
SHOWN = 5  # ids that an error names


def read_squad(path: str, *, cache_dir: str | None = None) -> Dataset:
    """
    Read a file in SQuAD's JSON, v1.1 or v2.0.

    Args:
        path (`str`): The file.
        cache_dir (`str`, *optional*): Where `datasets` keeps what it has read.

    Returns:
        `Dataset`: One row a question, with the columns of `FEATURES`.

    Raises:
        `FileNotFoundError`, `ValueError`: There is no such file, or it is not JSON, not SQuAD's, or without questions.
    """
    check_layout(path)
    # The digest is what `datasets` knows a cached file by: a path alone would give the questions that it once held.
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    settings = {"path": path, "digest": digest}
    return Dataset.from_generator(_questions, features=FEATURES, cache_dir=cache_dir, gen_kwargs=settings)


def _questions(path: str, digest: str) -> Iterator[dict[str, Any]]:
    """The rows of a file that is laid out right. Fields that no row has may be of any type."""
    for article in json.loads(Path(path).read_text(encoding="utf-8-sig"))["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question.get("answers", [])
                yield {
                    "id": question["id"],
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": {key: [answer[key] for answer in answers] for key in ("text", "answer_start")},
                }


def check_layout(path: str) -> None:
    """Raise `ValueError`, naming the place, unless the file is laid out as SQuAD's are and holds a question."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:  # of json, or of the decoding
        raise ValueError(f"{path} is not JSON: {error}") from error
    place = "the file"
    questions = 0
    try:
        for i, article in enumerate(_typed(content["data"], list)):
            place = f"data[{i}]"
            for j, paragraph in enumerate(_typed(article["paragraphs"], list)):
                place = f"data[{i}].paragraphs[{j}]"
                _typed(paragraph["context"], str)
                for k, question in enumerate(_typed(paragraph["qas"], list)):
                    place = f"data[{i}].paragraphs[{j}].qas[{k}]"
                    _typed(question["id"], str), _typed(question["question"], str)
                    for answer in _typed(question.get("answers", []), list):
                        _typed(answer["text"], str), _typed(answer["answer_start"], int)
                    questions += 1
    except KeyError as error:
        raise ValueError(f"{path} is not in SQuAD's format: {place} lacks {error}.") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not in SQuAD's format at {place}: {error}.") from error
    if not questions:
        raise ValueError(f"{path} holds no question.")


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def check_examples(examples: Dataset, name: str, *, version_2: bool, answered: bool = True) -> None:
    """
    Check what training and scoring rely on.

    Args:
        examples (`Dataset`): Questions, with the columns of `FEATURES`.
        name (`str`): What an error calls them.
        version_2 (`bool`): Whether questions may have no answer.
        answered (`bool`, *optional*, defaults to `True`): Whether answers matter: not for questions to predict.

    Raises:
        `ValueError`: A column is missing, there is no question, an id occurs twice, an answer does not stand in its
            context where it says, or there are questions without an answer although `version_2` is off.
    """
    if missing := [column for column in FEATURES if column not in examples.column_names]:
        raise ValueError(f"{name} lacks the columns {missing}: it must have {', '.join(FEATURES)}.")
    if not len(examples):
        raise ValueError(f"{name} holds no question.")
    ids, contexts, answers = examples["id"][:], examples["context"][:], examples["answers"][:]
    seen: set[str] = set()
    _refuse(name, [i for i in ids if i in seen or seen.add(i)], "an id that another question has")  # type: ignore[func-returns-value]
    if not answered:
        return
    misplaced = [
        question_id
        for question_id, context, answer in zip(ids, contexts, answers, strict=True)
        if any(
            not text.strip() or start < 0 or context[start : start + len(text)] != text
            for text, start in zip(answer["text"], answer["answer_start"], strict=True)
        )
    ]
    _refuse(name, misplaced, "answers that are not in their context at `answer_start`")
    if not version_2:
        unanswered = [question_id for question_id, answer in zip(ids, answers, strict=True) if not answer["text"]]
        _refuse(name, unanswered, "no answer. If this is SQuAD v2.0, give `--version_2_with_negative`")


def _refuse(name: str, ids: list[str], what: str) -> None:
    if ids:
        shown = ", ".join(ids[:SHOWN]) + (", …" if len(ids) > SHOWN else "")
        raise ValueError(f"{name}: {len(ids)} question{'s' * (len(ids) > 1)} with {what}. Ids: {shown}")
