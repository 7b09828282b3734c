#!/usr/bin/env python
"""Fine-tune on sentences, pairs or named entities from files, and with `--compress` make the model small in the same
run. The arguments are those of `run_squad.py`, but for the data; the folder gets the model and `all_results.json`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the example's own modules

from arguments import CompressionArguments, ModelArguments, refuse_old_names
from features import check_length
from outputs import Results, check_output_dir, progress_bars
from price import PriceMixin
from run_squad import load_model, size
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.tasks import IGNORED, TASKS, Row, Task
from hf_oto import OTOTrainer


@dataclass
class TaskArguments:
    """Which task, and its files."""

    task: str = field(metadata={"help": "What is learnt.", "choices": list(TASKS)})
    train_file: str = field(metadata={"help": "Rows to learn from; they say which classes there are, too."})
    validation_file: str = field(metadata={"help": "Rows to score."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a sequence; what is longer is cut off."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into an `output_dir` that is not empty."}
    )


class TaskTrainer(PriceMixin, Trainer):
    """Plain [`Trainer`] that counts what it costs."""


class TaskOTOTrainer(PriceMixin, OTOTrainer):
    """[`OTOTrainer`] that counts what it costs."""


def parse(
    arguments: list[str] | None = None,
) -> tuple[ModelArguments, TaskArguments, CompressionArguments, TrainingArguments]:
    refuse_old_names(sys.argv[1:] if arguments is None else arguments)
    kinds = (ModelArguments, TaskArguments, CompressionArguments, TrainingArguments)
    return HfArgumentParser(kinds).parse_args_into_dataclasses(arguments, look_for_args_file=False)


def class_names(rows: list[Row]) -> list[str]:
    """The classes or tags of rows, sorted; none where the label is a number."""
    labels = [row["label"] for row in rows]
    if isinstance(labels[0], float):
        return []
    return sorted({tag for label in labels for tag in label} if isinstance(labels[0], list) else set(labels))


def start(arguments: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that a run of these arguments starts from, and its tokenizer."""
    model_arguments, data, _, _ = parse(arguments)
    task = TASKS[data.task]
    return load_model(model_arguments, task.auto, **heads(class_names(task.read(Path(data.train_file)))))


def heads(names: list[str]) -> dict[str, Any]:
    """What a config has to say of the classes."""
    if not names:
        return {"num_labels": 1, "problem_type": "regression"}
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def features(rows: list[Row], names: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Row]:
    """What the model reads. Of a word the first token has its tag."""
    made = []
    for row in rows:
        words = isinstance(row["text"], list)
        encoded = tokenizer(
            *([row["text"]] if words else row["text"]), is_split_into_words=words, truncation=True, max_length=length
        )
        label = row["label"]
        if words:
            places = encoded.word_ids()
            first = [place is not None and place not in places[:i] for i, place in enumerate(places)]
            label = [names.index(label[p]) if new else IGNORED for p, new in zip(places, first, strict=True)]
        elif names:
            label = names.index(label)
        made.append({**encoded, "labels": label})
    return made


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run what the arguments ask for, and return the numbers of `all_results.json`."""
    parsed = parse(arguments)
    with progress_bars(not parsed[-1].disable_tqdm):
        return run(*parsed)


def run(
    model_arguments: ModelArguments,
    data: TaskArguments,
    compression: CompressionArguments,
    training: TrainingArguments,
) -> dict[str, Any]:
    """As [`main`], of arguments that are parsed."""
    check_output_dir(training.output_dir, resume=None, overwrite=data.overwrite_output_dir)
    task, config = TASKS[data.task], compression.oto_config()
    rows = {
        stage: task.read(Path(path)) for stage, path in (("train", data.train_file), ("eval", data.validation_file))
    }
    names = class_names(rows["train"])
    if unknown := set(class_names(rows["eval"])) - set(names):
        raise ValueError(f"{data.validation_file} has the classes {sorted(unknown)}, which {data.train_file} has not.")
    set_seed(training.seed)
    model, tokenizer = load_model(model_arguments, task.auto, **heads(names))
    check_length(model, data.max_seq_length)
    read = {stage: features(own, names, tokenizer, data.max_seq_length) for stage, own in rows.items()}
    common: dict[str, Any] = {
        "args": training,
        "eval_dataset": read["eval"],
        "processing_class": tokenizer,
        "data_collator": collator(task, tokenizer),
        "compute_metrics": lambda output: {"score": task.score(output.predictions, output.label_ids, names)},
    }
    extra = {} if config is None else {"oto_config": config, "teacher_model": compression.teacher_model_name_or_path}
    results = Results(training.output_dir, enabled=training.should_save)
    trainer: Any = TaskTrainer(model=model, **common)
    if training.do_train:
        trainer = (TaskTrainer if config is None else TaskOTOTrainer)(
            model=model, train_dataset=read["train"], **common, **extra
        )
        trained = trainer.train().metrics
        trainer.save_model()
        trainer.save_state()
        results.add("train", {**trained, **trainer.price})
        if config is not None:  # what counts is what a user gets: the small model as it is on disk
            trainer.accelerator.wait_for_everyone()
            model = task.auto.from_pretrained(
                training.output_dir, attn_implementation=model_arguments.attn_implementation
            )
            trainer = TaskTrainer(model=model, **common)
    if training.do_eval:
        results.add("eval", trainer.evaluate())
    results.add("model", size(model, data.max_seq_length))
    return results.all


def collator(task: Task, tokenizer: PreTrainedTokenizerBase) -> Any:
    words = task is TASKS["wnut17"]
    return DataCollatorForTokenClassification(tokenizer) if words else DataCollatorWithPadding(tokenizer)


if __name__ == "__main__":
    main()
