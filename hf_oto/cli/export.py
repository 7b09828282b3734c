"""`hf-oto export`: a model as ONNX."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..deploy.answering import OnnxAnswerer
from ..deploy.onnx_export import check_packages, export_onnx
from ..deploy.squad_scoring import read_questions, squad_scores
from .loading import load_answerer, load_model, read_text_config
from .printing import JsonOption, ModelArgument, show


def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="A file that does not exist.")],
    int8: Annotated[bool, typer.Option("--int8", help="Quantize with ONNX Runtime, dynamically.")] = False,
    squad: Annotated[
        Path | None, typer.Option(help="Questions with answers in SQuAD's JSON: give the scores in ONNX Runtime.")
    ] = None,
    max_questions: Annotated[int | None, typer.Option(help="Of that file the first ones only.")] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Write a model as ONNX, for any batch size and length, checked with ONNX Runtime.

    It says how far the logits are off, and with questions what that does to exact match and F1, in int8 as well.

    Example: hf-oto export small small.onnx --int8 --squad dev.json
    """
    check_packages()
    if out.suffix != ".onnx":
        raise ValueError(f"OUT.onnx must end in .onnx, got {out}.")
    if out.exists():
        raise FileExistsError(f"{out} exists already. Choose another file, or remove it.")
    if max_questions is not None and squad is None:
        raise ValueError("--max-questions is of the questions of --squad: give both.")
    config = read_text_config(model)
    score, questions = None, []
    if squad is not None:
        questions, answerer = read_questions(squad, max_questions), load_answerer(model)

        def score(session: Any) -> dict[str, float]:
            return squad_scores(OnnxAnswerer(answerer, session), questions, show_progress=sys.stderr.isatty())

    done = export_onnx(load_model(model, config, dtype=torch.float32), out, int8=int8, score=score)
    lines = [
        f"{done.path}: {done.bytes:,} bytes, inputs {', '.join(done.inputs)}, outputs {', '.join(done.outputs)}",
        f"float32 in ONNX Runtime is off by {done.error:.1e} of the largest output, on random tokens with padding",
    ]
    if int8:
        lines.append(f"int8, which is in the file, by {done.int8_error:.1e}, in the mean {done.int8_mean_error:.1e}")
    for precision, scores in (("float32", done.scores), ("int8", done.int8_scores)):
        if scores is not None:
            numbers = f"exact match {scores['exact_match']:.2f}, F1 {scores['f1']:.2f}"
            lines.append(f"{precision} answers {len(questions):,} questions of {squad} with {numbers}")
    show(dataclasses.asdict(done), lines, as_json)
