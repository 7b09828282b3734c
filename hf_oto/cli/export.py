"""`hf-oto export`: a model as ONNX."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..deploy.answering import OnnxAnswerer
from ..deploy.onnx_export import Export, check_packages, export_onnx
from ..deploy.onnx_folder import export_folder
from ..deploy.pooling import Pooling
from ..deploy.squad_scoring import read_questions, squad_scores
from .loading import load_answerer, load_model, local_folder, read_text_config
from .printing import JsonOption, ModelArgument, at_home, show


def export(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A file OUT.onnx, or a folder, that does not exist.", callback=at_home),
    ],
    folder: Annotated[
        bool, typer.Option("--folder", help="A folder for browsers and servers: onnx/model.onnx, config, tokenizer.")
    ] = False,
    pooling: Annotated[
        bool,
        typer.Option("--pooling", help="Pool inside the graph, as its sentence-transformers folder does."),
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize with ONNX Runtime, dynamically.")] = False,
    squad: Annotated[
        Path | None,
        typer.Option(
            help="Questions with answers in SQuAD's JSON: give the scores in ONNX Runtime.", callback=at_home
        ),
    ] = None,
    max_questions: Annotated[int | None, typer.Option(help="Of that file the first ones only.")] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Write a model as ONNX, for any batch size and length, checked with ONNX Runtime.

    It says how far the logits are off, and with questions what that does to exact match and F1, in int8 as well. A
    folder has a config that says the family's own type, so that engines which know only that read it; with --int8 it
    has both files.

    Example: hf-oto export small small.onnx --int8 --squad dev.json
    """
    check_packages()
    if not folder and out.suffix != ".onnx":
        raise ValueError(f"OUT must end in .onnx, got {out}. For a folder add --folder.")
    if out.exists():
        raise FileExistsError(f"{out} exists already. Choose another, or remove it.")
    if max_questions is not None and squad is None:
        raise ValueError("--max-questions is of the questions of --squad: give both.")
    config = read_text_config(model)
    source = local_folder(model)
    options: dict[str, Any] = {"int8": int8, "pooling": Pooling.from_folder(source) if pooling else None}
    number = 0
    if squad is not None:
        questions, answerer = read_questions(squad, max_questions), load_answerer(model)
        number = len(questions)

        def score(session: Any) -> dict[str, float]:
            return squad_scores(OnnxAnswerer(answerer, session), questions, show_progress=sys.stderr.isatty())

        options["score"] = score
    loaded = load_model(model, config, dtype=torch.float32)
    if folder:
        written = export_folder(loaded, out, source, **options)
        lines = [f"{out}: {', '.join(written.files)}"]
        lines += [line for one in written.exports for line in _lines(one, f"{number:,} questions of {squad}")]
        show(dataclasses.asdict(written), lines, as_json)
    else:
        done = export_onnx(loaded, out, **options)
        show(dataclasses.asdict(done), _lines(done, f"{number:,} questions of {squad}"), as_json)


def _lines(done: Export, questions: str) -> list[str]:
    lines = [
        f"{done.path}: {done.bytes:,} bytes, inputs {', '.join(done.inputs)}, outputs {', '.join(done.outputs)}",
        f"float32 in ONNX Runtime is off by {done.error:.1e} of the largest output, on random tokens with padding",
    ]
    if done.int8_error is not None:
        lines.append(f"int8, which is in the file, by {done.int8_error:.1e}, in the mean {done.int8_mean_error:.1e}")
    for precision, scores in (("float32", done.scores), ("int8", done.int8_scores)):
        if scores is not None:
            numbers = f"exact match {scores['exact_match']:.2f}, F1 {scores['f1']:.2f}"
            lines.append(f"{precision} answers {questions} with {numbers}")
    return lines
