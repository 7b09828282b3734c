#!/usr/bin/env python
"""Dense against pruned on questions made up from a seed: what `make demo` runs, without a network.

It makes the questions, a tokenizer and a small BERT of random weights, trains that with `run_squad.py`, once as it is
and once with `--compress`, with as many steps, and scores the pruned checkpoint in a process of its own. The pruned
training shrinks as it goes, so that it costs less than the dense one.
"""

import argparse
import math
import os
import shutil
import statistics
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the example's own modules

import torch
from outputs import write_json
from precision import choose_bf16
from processes import console, run_squad
from rich.table import Table
from tokenizers.trainers import WordPieceTrainer
from transformers import AutoModelForQuestionAnswering, BertConfig, BertTokenizer, PreTrainedModel

from demo.scratch import make_model
from demo.synthetic import make_squad
from hf_oto import summarize

OUTPUT_DIR = Path(__file__).resolve().parents[3] / "build" / "demo"
MARKER = ".hf_oto_demo"  # in a folder that a demo made, and may replace
SEQUENCE_LENGTH = 128
BATCH_SIZE = 32
VOCABULARY = 2400  # enough for every word, and the pieces that it was put together from
QUESTIONS = 4  # of a paragraph
CACHE = "cache"
SCORES = ("exact_match", "f1")
SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {  # rows of the table
    "parameters": ("parameters", "{:,}".format),
    "encoder_parameters": ("of them in the encoder", "{:,}".format),
    "macs": (f"MACs, {SEQUENCE_LENGTH} tokens", lambda macs: f"{macs / 1e6:.1f} M"),
    "file_size": ("file", lambda size: f"{size / 1e6:.2f} MB"),
    "latency": (f"latency, {BATCH_SIZE} x {SEQUENCE_LENGTH} tokens", lambda seconds: f"{1000 * seconds:.1f} ms"),
    "train_macs": ("price of the training, MACs", lambda macs: f"{macs / 1e12:.2f} T"),
    "train_seconds": ("time of the training", "{:.0f} s".format),
    "exact_match": ("exact match", "{:.2f}".format),
    "f1": ("F1", "{:.2f}".format),
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help="What it makes; replaced if it made it.")
    parser.add_argument("--seed", type=int, default=0, help="Of the questions and of both trainings.")
    parser.add_argument("--steps", type=int, default=1000, help="Of each training.")
    parser.add_argument("--eval_paragraphs", type=int, default=250, help="Paragraphs to be scored on.")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="Train in bfloat16; by default if the processor can."
    )
    return parser.parse_args(arguments)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """
    A folder to work in, which becomes `target` when all is done; on an error nothing is left of it.

    Raises:
        `ValueError`: There is a `target` that no demo made.
    """
    if target.is_symlink() or (target.exists() and not (target / MARKER).is_file()):
        raise ValueError(
            f"`output_dir` {target} was not made by this demo, so it is not replaced. Choose another one."
        )
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        (folder / MARKER).touch()
        yield folder
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_tokenizer(texts: Iterable[str]) -> BertTokenizer:
    """BERT's tokenizer, with a WordPiece vocabulary trained on `texts`."""
    empty = BertTokenizer()
    special = sorted(empty.get_vocab(), key=empty.get_vocab().__getitem__)
    # Letters within words get their ids in the order of a hash, and merges their order from the ids: given here, they
    # make the same vocabulary every time.
    letters = [f"##{letter}" for letter in string.ascii_lowercase + string.digits]
    trainer = WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special + letters, show_progress=False)
    empty.backend_tokenizer.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=empty.backend_tokenizer.get_vocab(), model_max_length=SEQUENCE_LENGTH)


def make_config(tokenizer: BertTokenizer) -> BertConfig:
    """A small BERT: four blocks of four heads."""
    return BertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=SEQUENCE_LENGTH,
        initializer_range=0.08,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def train_options(arguments: argparse.Namespace) -> list[str]:
    """What both trainings have in common."""
    options = "--model_name_or_path model --train_file train.json --validation_file dev.json --do_train --do_eval"
    options += f" --seed {arguments.seed}"
    return [*options.split(), *step_options(arguments.steps), *common_options(arguments.bf16)]


def step_options(steps: int) -> list[str]:
    return f"""--max_steps {steps} --per_device_train_batch_size {BATCH_SIZE} --learning_rate 1e-3 --warmup_steps 0.1
        --train_sampling_strategy group_by_length --save_strategy no --logging_steps 0.1""".split()


def common_options(bf16: bool) -> list[str]:
    options = f"""--max_seq_length {SEQUENCE_LENGTH} --doc_stride 16 --per_device_eval_batch_size 128 --use_cpu
        --attn_implementation eager --report_to none --disable_tqdm true""".split()
    return [*options, "--bf16"] if bf16 else options


@torch.inference_mode()
def latencies(models: list[PreTrainedModel], rounds: int = 30) -> list[float]:
    """Median seconds of one batch, the models taking turns so that all meet the same machine."""
    ids = torch.randint(5, models[0].config.vocab_size, (BATCH_SIZE, SEQUENCE_LENGTH))
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(input_ids=ids)
            times.append(time.perf_counter() - start)
    return [statistics.median(times[3:]) for times in seconds]


def measure(folders: dict[str, Path], scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size, speed and scores of the checkpoints, by name; the picture of each is `layers.png` beside its weights."""
    loaded = {name: AutoModelForQuestionAnswering.from_pretrained(path).eval() for name, path in folders.items()}
    rows = {}
    for (name, model), seconds in zip(loaded.items(), latencies(list(loaded.values())), strict=True):
        summary = summarize(model, sequence_length=SEQUENCE_LENGTH)
        if not (picture := folders[name] / "layers.png").exists():  # OTOTrainer's knows which heads were kept
            summary.plot(picture)
        rows[name] = {
            **summary.to_dict(),
            "file_size": (folders[name] / "model.safetensors").stat().st_size,
            "latency": seconds,
            "train_macs": scores[name]["train_macs"],
            "train_seconds": scores[name]["train_runtime"],
            "exact_match": scores[name]["eval_exact_match"],
            "f1": scores[name]["eval_f1"],
        }
    return rows


def result_table(rows: dict[str, dict[str, Any]]) -> Table:
    """One column a model, and the last one's share of the first one's."""
    first, *_, last = rows.values()
    table = Table()
    for column in ("", *rows, "share"):
        table.add_column(column, justify="right" if column else "left")
    for name, (label, show) in SHOWN.items():
        share = "" if name in SCORES else f"{last[name] / first[name]:.2f}"
        table.add_row(label, *(show(row[name]) for row in rows.values()), share)
    return table


def make_inputs(folder: Path, arguments: argparse.Namespace) -> None:
    """Write `train.json`, `dev.json`, and the `model` to be trained: its config and tokenizer."""
    sizes = {"train": math.ceil(arguments.steps * BATCH_SIZE / QUESTIONS), "dev": arguments.eval_paragraphs}
    splits = make_squad(sizes, questions=QUESTIONS, seed=arguments.seed)
    for name, content in splits.items():
        write_json(folder / f"{name}.json", content)
    paragraphs = splits["train"]["data"][0]["paragraphs"]
    texts = [[one["context"], *(question["question"] for question in one["qas"])] for one in paragraphs]
    tokenizer = make_tokenizer(texts)
    tokenizer.save_pretrained(folder / "model")
    make_model(make_config(tokenizer), arguments.seed).save_pretrained(folder / "model")


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the demo, and return the numbers of `results.json`."""
    options = parse_arguments(arguments)
    options.bf16 = choose_bf16(options.bf16)
    start = time.perf_counter()
    with new_folder(options.output_dir) as folder:
        make_inputs(folder, options)
        console.print(f"All commands run in what becomes {options.output_dir}.")
        where = {"folder": folder, "cache": folder / CACHE}
        scores = {"dense": run_squad(Path("dense"), *train_options(options), **where)}
        pruning = ["--compress", "--target_sparsity", "0.5", "--shrink_during_training", "true"]
        scores["pruned"] = run_squad(Path("pruned"), *train_options(options), *pruning, **where)
        # A process that did not train it, as a user would load it.
        reload = ["--model_name_or_path", "pruned", "--validation_file", "dev.json", "--do_eval"]
        reload += common_options(options.bf16)
        scores["pruned"] |= run_squad(Path("pruned-reloaded"), *reload, **where)
        rows = measure({name: folder / name for name in scores}, scores)
        write_json(folder / "results.json", rows)
        shutil.rmtree(folder / CACHE)
    console.print(result_table(rows))
    picture = options.output_dir / "pruned" / "layers.png"
    console.print(f"What every layer kept: {picture}. {time.perf_counter() - start:.0f} seconds.", soft_wrap=True)
    return rows


if __name__ == "__main__":
    main()
