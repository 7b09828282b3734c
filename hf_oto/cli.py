"""`hf-oto`: look at a model, make it small, time it, export it, ask it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import torch
import transformers
import typer
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file, logging
from typer.core import TyperGroup

from .config import CONFIG_NAME as OTO_CONFIG_NAME
from .config import LatencyTable, OTOConfig
from .deploy import benchmark
from .deploy.answering import OnnxAnswerer, QuestionAnswerer
from .deploy.latency_tables import measure_latency
from .deploy.onnx_export import check_packages, export_onnx
from .deploy.squad_scoring import read_questions, squad_scores
from .hspg.budget import allowance, check_target, reach, target_examples
from .models import modeling
from .models.architectures import BLOCK_SPECS, PRUNED_PREFIX, dense_model_type, refusal
from .models.folders import folder_beside
from .models.groups import partition
from .models.surgery import compress as cut
from .models.trial_inputs import check_tokens
from .report.summary import markdown_table, plain_text, summarize, summarize_kept

# Of the supported families' tokenizers, whole or in parts.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model"),
)
TRAINER_STATE = "trainer_state.json"
TABLE_WIDTH = 200  # not narrower where the terminal is: a cut number is a wrong one


class _OneLineErrors(TyperGroup):
    """Every error is one line on standard error: what is wrong and what to do."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # Progress bars and warnings of loading say nothing to who asked for a table.
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            code = super().main(*args, **{**kwargs, "prog_name": "hf-oto", "standalone_mode": False})
        except Exception as error:
            _fail(error)
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
        sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception) -> NoReturn:
    if hasattr(error, "format_message"):  # of the command line itself; click's class or typer's copy of it
        context = getattr(error, "ctx", None)
        help_line = f" Try `{context.command_path} --help`." if context is not None else ""
        message, code = f"{error.format_message()}{help_line}", 2
    else:
        expected = isinstance(error, (OSError, ValueError, TypeError, ImportError))
        message, code = f"{'' if expected else f'{type(error).__name__}: '}{error}", 1
    print(f"hf-oto: error: {' '.join(message.split()) or type(error).__name__}", file=sys.stderr)
    sys.exit(code)


app = typer.Typer(
    cls=_OneLineErrors,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a model of the Hub.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _version(asked: bool) -> None:
    if asked:
        print(metadata.version("hf-oto"))
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Only Train Once for Transformers models: one training, and a small model out of it."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def inspect(
    model: ModelArgument,
    target: Annotated[float | None, typer.Option(help="Show what this `target_sparsity` would leave.")] = None,
    target_unit: Annotated[str, typer.Option(help="The target's currency: params, macs, groups, latency.")] = "params",
    sequence_length: Annotated[int, typer.Option(help="Tokens of the sequence for which MACs are counted.")] = 384,
    latency_table: Annotated[
        Path | None, typer.Option(help="What `hf-oto latency` wrote: for the currency latency.")
    ] = None,
    structures: Annotated[list[str] | None, typer.Option(help="heads or neurons; repeat it. Both by default.")] = None,
    min_heads: Annotated[int, typer.Option(help="Heads that every block keeps at least.")] = 1,
    min_neurons: Annotated[int, typer.Option(help="Neurons that every block keeps at least.")] = 8,
    round_to: Annotated[int, typer.Option(help="What the width of every FFN is a multiple of.")] = 8,
    weights: Annotated[
        bool, typer.Option("--weights", help="Read the weights of a dense model too: groups of zeros are removed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Show a model's groups, what it has kept, and what a target would leave.

    Reads the config alone. Of a checkpoint that OTOTrainer wrote it reads the weights: zeros count as removed.

    Example: hf-oto inspect bert-base-uncased --target 0.5
    """
    settings = OTOConfig(
        target_sparsity=target,
        target_unit=target_unit,
        macs_sequence_length=sequence_length,
        latency_table=None if latency_table is None else LatencyTable.load(latency_table),
        structures=tuple(structures or ("heads", "neurons")),
        min_heads=min_heads,
        min_neurons=min_neurons,
        round_to=round_to,
    )
    options: dict[str, Any] = {"sequence_length": sequence_length, "latency_table": settings.latency_table}
    config = _config(model)
    pruned = config.model_type.startswith(PRUNED_PREFIX)
    in_training = not pruned and all(Path(model, name).is_file() for name in (OTO_CONFIG_NAME, TRAINER_STATE))
    if weights or in_training:
        found: PreTrainedModel = _load(model, config)
        summary = summarize(found, **options)
    else:
        found = _empty(config)
        summary = summarize_kept(found, [array.count for array in partition(found).arrays], **options)
    groups = partition(found)
    numbers: dict[str, Any] = {
        "model": model,
        "class": type(found).__name__,
        "pruned": pruned,
        "groups": groups.num_groups,
        "head_size": groups.head_size,
        "hidden_size": groups.hidden_size,
        **summary.to_dict(),
    }
    parts: list[Any] = [
        f"{type(found).__name__}: {groups.num_groups:,} zero-invariant groups in {groups.num_layers} blocks, "
        f"heads of size {groups.head_size}, hidden size {groups.hidden_size}",
        *summary.table().renderables,
    ]
    if target is not None:
        check_target(groups, settings)
        limits = reach(groups, settings)
        budget = allowance(target, limits.total)
        examples = {
            name: summarize_kept(found, kept, **options) for name, kept in target_examples(groups, settings).items()
        }
        numbers["target"] = {
            **settings.to_dict(),
            "total": limits.total,
            "removed_already": limits.removed,
            "budget": budget,
            "reachable": limits.reachable,
            "reachable_share": limits.reachable / limits.total if limits.total else 0.0,
            "leaves": {name: example.to_dict() for name, example in examples.items()},
        }
        share = f"{limits.reachable / limits.total:.2%}" if limits.total else "nothing"
        currency = "ns of latency" if target_unit == "latency" else target_unit
        parts.append(
            f"A target of {target} removes at most {budget:,} of {limits.total:,} {currency}. The floors "
            f"(min_heads {min_heads}, min_neurons {min_neurons}, round_to {round_to}) let {share} go. Training finds "
            f"which groups go; the blocks would keep, if it were"
        )
        timed = ("latency, ns", "share") if settings.latency_table else ()
        columns = ("heads", "neurons", "parameters", "share", "MACs", "share", *timed, "all parameters")
        table = markdown_table("", *columns)
        for name, example in examples.items():
            table.add_row(
                name,
                f"{sum(example.heads):,}",
                f"{sum(example.neurons):,}",
                f"{example.prunable_parameters:,}",
                f"{example.prunable_ratio:.1%}",
                f"{example.macs:,}",
                f"{example.macs_ratio:.1%}",
                *((f"{example.latency:,}", f"{example.latency_ratio:.1%}") if timed else ()),
                f"{example.parameters:,}",
            )
        parts.append(table)
    _show(numbers, parts, as_json)


@app.command()
def compress(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A training checkpoint with zero groups.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist, or is empty.")],
    as_json: JsonOption = False,
) -> None:
    """
    Cut the zero groups out of a training checkpoint: a small model, in a folder of its own.

    The cut model is compared with the checkpoint's before it is written. The tokenizer, the settings of the
    compression and the code for loading without hf_oto come with it.

    Example: hf-oto compress out/checkpoint-1000 small
    """
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"OUT {out} is not empty. Choose a folder that does not exist.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT {out} is a file. Choose a folder that does not exist.")
    model = _load(checkpoint, _config(checkpoint))
    written = _file(checkpoint, OTO_CONFIG_NAME)
    settings = OTOConfig() if written is None else OTOConfig.from_pretrained(Path(written).parent)
    summary = summarize(model, sequence_length=settings.macs_sequence_length, latency_table=settings.latency_table)
    before = partition(model)
    zeros = before.num_groups - sum(summary.heads) - sum(summary.neurons)
    if not zeros:
        raise ValueError(
            f"{checkpoint} has no group of zeros, there is nothing to cut out. Use a checkpoint that OTOTrainer wrote "
            f"after its first pruning period, best one of the recovery stage."
        )
    small = cut(model, show_progress=sys.stderr.isatty())
    with folder_beside(out) as folder:
        made = folder / "model"
        small.save_pretrained(made)
        for name in (*TOKENIZER_FILES, OTO_CONFIG_NAME):
            if (source := _file(checkpoint, name)) is not None:
                shutil.copyfile(source, made / name)
        files = sorted(path.name for path in made.iterdir())
        if out.is_dir():
            out.rmdir()  # it is empty; not every system renames onto it
        made.rename(out)
    removed = {kind: sum(before.counts(kind)) - sum(getattr(summary, kind)) for kind in ("heads", "neurons")}
    numbers = {"out": str(out), "files": files, "removed": removed, **summary.to_dict()}
    text = f"{out}: removed {removed['heads']:,} heads and {removed['neurons']:,} neurons of {checkpoint}."
    _show(numbers, [text, *summary.table().renderables], as_json)


@app.command()
def bench(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="The model to compare with: a folder, or of the Hub.")],
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="The small model: a folder, or of the Hub.")],
    batch_size: Annotated[list[int] | None, typer.Option(help="Sequences of a batch; repeat it. Default 1.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a sequence; repeat it. Default 128.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="eager, compile, onnx or onnx-int8; repeat it. By default eager.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of one operation. By default torch's number.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each model that count.")] = 30,
    warmup: Annotated[int, typer.Option(help="Runs before them.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """
    Time two models side by side on the CPU, their runs taking turns.

    Medians, with quartiles in brackets. The ratio of the MACs is the limit of the ratio of the latencies.

    Example: hf-oto bench dense small --batch-size 1 --batch-size 8 --length 384 --backend eager --threads 1
    """
    if backend and benchmark.ONNX_BACKENDS.intersection(backend):
        check_packages()
    configs = [_text_config(name) for name in (dense, pruned)]
    models = [_load(*pair, dtype=torch.float32) for pair in zip((dense, pruned), configs, strict=True)]
    choices: dict[str, Any] = {
        "backends": backend or ["eager"],
        "batch_sizes": batch_size or [1],
        "lengths": length or [128],
    }
    timed = benchmark.measure(*models, **choices, threads=threads, repeats=repeats, warmup=warmup)
    rounds = math.prod(len(values) for values in choices.values())
    # None: only on a terminal.
    measurements = list(tqdm(timed, desc="Timing", total=rounds, leave=False, disable=None))
    columns = ("backend", "batch", "length", "dense ms", "pruned ms", "dense /s", "pruned /s", "latency", "MACs")
    table = markdown_table(*columns)
    rows = []
    for one in measurements:
        speeds = [one.throughput(latency) for latency in (one.dense, one.pruned)]
        spreads = [f"{x.median:.2f} [{x.low:.2f}, {x.high:.2f}]" for x in (one.dense, one.pruned)]
        numbers = [f"{speed:.1f}" for speed in speeds]
        ratios = f"{one.latency_ratio:.2f}x", f"{one.macs_ratio:.2f}x"
        table.add_row(one.backend, f"{one.batch_size}", f"{one.length}", *spreads, *numbers, *ratios)
        row = {**dataclasses.asdict(one), "latency_ratio": one.latency_ratio}
        rows.append({**row, "dense_throughput": speeds[0], "pruned_throughput": speeds[1]})
    used = measurements[0].threads
    text = f"{repeats} runs each, {used} thread{'s' if used > 1 else ''}, float32; the ratios are dense over pruned"
    _show({"dense": dense, "pruned": pruned, "measurements": rows}, [text, table], as_json)


@app.command()
def latency(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The dense model: a folder, or of the Hub.")],
    out: Annotated[Path, typer.Argument(metavar="TABLE.json", help="A file that does not exist.")],
    batch_size: Annotated[int, typer.Option(help="Sequences of a batch.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    threads: Annotated[int | None, typer.Option(help="Threads of one operation. By default torch's number.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    repeats: Annotated[int, typer.Option(help="Forwards of every size that count.")] = 15,
    warmup: Annotated[int, typer.Option(help="Forwards before them.")] = 2,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count the processor's time, on a busy machine; with one thread only.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Measure what heads and neurons take on this device, for a target in latency.

    The table is for OTOConfig(target_unit="latency", latency_table="TABLE.json"), and for inspect.

    Example: hf-oto latency dense table.json --batch-size 1 --length 384 --threads 1
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already. Choose another file, or remove it.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"TABLE.json: there is no folder {out.parent}. Make it first.")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"`dtype` must be one of {', '.join(dtypes)}, got {dtype!r}.")
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"`device` must be cpu, or cuda where there is one, got {device!r}.")
    found: Any = _load(model, _config(model), dtype=dtypes[dtype])
    table = measure_latency(
        found.to(device),
        batch_size=batch_size,
        length=length,
        threads=threads,
        repeats=repeats,
        warmup=warmup,
        cpu_time=cpu_time,
    )
    table.save(out)
    shown = markdown_table("heads of a block", "ms", "its neurons", "ms")
    for left, right in zip_longest(table.heads, table.neurons):
        shown.add_row(*(cell for point in (left, right) for cell in _point(point)))
    kept = table.num_layers * (table.heads[-1][1] + table.neurons[-1][1]) / table.total
    text = f"{out}: {table.conditions}. The dense model takes {table.total / 1e6:.2f} ms, {kept:.1%} of it for heads "
    text += "and neurons: no target reaches beyond."
    _show({"out": str(out), **table.to_dict()}, [text, shown], as_json)


@app.command()
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
    config = _text_config(model)
    score, questions = None, []
    if squad is not None:
        questions, answerer = read_questions(squad, max_questions), _answerer(model)

        def score(session: Any) -> dict[str, float]:
            return squad_scores(OnnxAnswerer(answerer, session), questions, show_progress=sys.stderr.isatty())

    done = export_onnx(_load(model, config, dtype=torch.float32), out, int8=int8, score=score)
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
    _show(dataclasses.asdict(done), lines, as_json)


@app.command()
def answer(
    model: ModelArgument,
    question: Annotated[list[str], typer.Option(help="A question; repeat it for more about the same context.")],
    context: Annotated[str | None, typer.Option(help="The text to find the answer in.")] = None,
    context_file: Annotated[Path | None, typer.Option(help="A file in UTF-8 with that text.")] = None,
    top_k: Annotated[int, typer.Option(help="Answers to each question.")] = 1,
    no_answer: Annotated[
        bool, typer.Option("--no-answer", help='Let "there is none" be an answer, as in SQuAD v2.0.')
    ] = False,
    max_length: Annotated[int | None, typer.Option(help="Tokens that the model reads at once.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens that two windows of a long context share.")] = None,
    max_answer_length: Annotated[int, typer.Option(help="Tokens of the longest answer.")] = 30,
    as_json: JsonOption = False,
) -> None:
    """
    Answer questions about a text.

    Example: hf-oto answer small --question "Who wrote it?" --context-file page.txt --top-k 3
    """
    if (context is None) == (context_file is None):
        raise ValueError("Give the text by either --context or --context-file.")
    text = context if context_file is None else context_file.read_text(encoding="utf-8")
    assert text is not None
    answerer = _answerer(model, max_length=max_length, stride=stride, max_answer_length=max_answer_length)
    answers = answerer.answer(question, [text] * len(question), top_k=top_k, no_answer=no_answer)
    lines = []
    for asked, found in zip(question, answers, strict=True):
        lines += [asked] if len(question) > 1 else []
        lines += [f"{one.score:.3f}  {one.start}-{one.end}  {one.text or '(no answer)'}" for one in found]
    rows = [
        {"question": asked, "answers": [dataclasses.asdict(one) for one in found]}
        for asked, found in zip(question, answers, strict=True)
    ]
    _show({"model": model, "questions": rows}, lines, as_json)


def _point(point: tuple[int, int] | None) -> tuple[str, str]:
    return ("", "") if point is None else (f"{point[0]:,}", f"{point[1] / 1e6:.3f}")


def _config(name: str) -> PreTrainedConfig:
    """The config of a supported family, from a folder or the Hub."""
    folder = Path(name)
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{name} has no {CONFIG_NAME}. Give a folder with a model, or a model of the Hub.")
    # hf_oto's own classes: no code that came with a model runs.
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise OSError(f"{name} is no folder, and no model that the Hub gives: {error}") from error
    if dense_model_type(config.model_type) not in BLOCK_SPECS:
        raise ValueError(f"{name} is {refusal(config.model_type)}")
    return config


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that the config was saved with; the base model's where it does not say."""
    names = config.architectures or [type(config).__name__.replace("Config", "Model")]
    found = getattr(modeling, names[0], None) or getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config)):
        raise ValueError(
            f"`architectures` of the config says {names[0]!r}, which is no class of Transformers or hf_oto for "
            f"{config.model_type!r}."
        )
    return found


def _text_config(name: str) -> PreTrainedConfig:
    """The same of a model that reads tokens; known before its weights are read."""
    config = _config(name)
    check_tokens(_model_class(config))
    return config


def _empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: its shapes, no weights."""
    with torch.device("meta"):
        model = _model_class(config)(config)
    return model if config.dtype is None else cast(Any, model).to(config.dtype)


def _load(name: str, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    options: dict[str, Any] = {"config": config, "output_loading_info": True}
    if dtype is not None:
        options["dtype"] = dtype
    loaded: Any = _model_class(config).from_pretrained(name, **options)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights of {type(model).__name__}: {missing[0]!r}, …. Give a complete model."
        )
    return model.eval()


def _answerer(name: str, **options: Any) -> QuestionAnswerer:
    _text_config(name)
    if _file(name, "tokenizer_config.json") is None:
        raise ValueError(f"{name} has no tokenizer_config.json. Save the tokenizer with the model.")
    return QuestionAnswerer.from_pretrained(name, **options)


def _file(name: str, file: str) -> str | None:
    """A file of a folder or of a model on the Hub, if it is there."""
    return cached_file(
        name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )


def _show(numbers: dict[str, Any], parts: Sequence[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(numbers, indent=2, ensure_ascii=False))
        return
    for part in parts:
        print(part if isinstance(part, str) else f"\n{plain_text(part, TABLE_WIDTH)}\n")


def main() -> None:
    """The entry point of `hf-oto`."""
    app()


if __name__ == "__main__":
    main()
