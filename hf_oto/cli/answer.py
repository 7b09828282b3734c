"""`hf-oto answer`: questions about a text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .loading import load_answerer
from .printing import JsonOption, ModelArgument, at_home, show


def answer(
    model: ModelArgument,
    question: Annotated[list[str], typer.Option(help="A question; repeat it for more about the same context.")],
    context: Annotated[str | None, typer.Option(help="The text to find the answer in.")] = None,
    context_file: Annotated[
        Path | None, typer.Option(help="A file in UTF-8 with that text.", callback=at_home)
    ] = None,
    top_k: Annotated[int, typer.Option(help="Answers to each question.")] = 1,
    handle_impossible_answer: Annotated[
        bool, typer.Option("--handle-impossible-answer", help='Let "there is none" be an answer, as in SQuAD v2.0.')
    ] = False,
    max_seq_length: Annotated[int | None, typer.Option(help="Tokens that the model reads at once.")] = None,
    doc_stride: Annotated[int | None, typer.Option(help="Tokens that two windows of a long context share.")] = None,
    max_answer_length: Annotated[int, typer.Option(help="Tokens of the longest answer.")] = 30,
    as_json: JsonOption = False,
) -> None:
    """
    Answer questions about a text.

    Example: hf-oto answer small --question "Who wrote it?" --context-file page.txt --top-k 3
    """
    if (context is None) == (context_file is None):
        raise ValueError("Give the text by either --context or --context-file.")
    text = context if context_file is None else _read(context_file)
    assert text is not None
    answerer = load_answerer(
        model, max_seq_length=max_seq_length, doc_stride=doc_stride, max_answer_length=max_answer_length
    )
    answers = answerer.answer(
        question, [text] * len(question), top_k=top_k, handle_impossible_answer=handle_impossible_answer
    )
    lines = []
    for asked, found in zip(question, answers, strict=True):
        lines += [asked] if len(question) > 1 else []
        lines += [f"{one.score:.3f}  {one.start}-{one.end}  {one.text or '(no answer)'}" for one in found]
    rows = [
        {"question": asked, "answers": [dataclasses.asdict(one) for one in found]}
        for asked, found in zip(question, answers, strict=True)
    ]
    show({"model": model, "questions": rows}, lines, as_json)


def _read(path: Path) -> str:
    """A file's text, without a byte-order mark and with its own line ends: places in it are places in the file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"`--context-file` must be in UTF-8, {path} is not: {error}. Save it in UTF-8.") from error
