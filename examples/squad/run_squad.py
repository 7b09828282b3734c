#!/usr/bin/env python
"""Fine-tune a Transformers model on SQuAD, and with `--compress` make it small in the same run."""

import logging
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import transformers
from answers import find_answers
from arguments import CompressionArguments, DataArguments, ModelArguments, parse_arguments
from datasets import Dataset, load_dataset
from features import check_length, check_tokenizer, feature_maker
from outputs import Results, check_output_dir, progress_bars, remove_checkpoints, write_json
from precision import made_for_bf16
from price import PriceMixin
from qa_trainer import PostProcess, QuestionAnsweringMixin, QuestionAnsweringTrainer
from reading import check_examples, read_squad
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_oto import OTOTrainer, summarize

logger = logging.getLogger("run_squad")

METRIC = str(Path(__file__).resolve().parent / "squad_score")


def load_model(
    arguments: ModelArguments, auto: Any = AutoModelForQuestionAnswering, **labels: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The model and its tokenizer, from a checkpoint or from scratch.

    Args:
        arguments (`ModelArguments`): Which.
        auto (`type`, *optional*, defaults to `AutoModelForQuestionAnswering`): The Auto class of its head.
        labels: What the config has to say of the head.
    """
    source = {
        "cache_dir": arguments.cache_dir,
        "revision": arguments.model_revision,
        "trust_remote_code": arguments.trust_remote_code,
    }
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name or arguments.model_name_or_path, **source)
    check_tokenizer(tokenizer)
    config = AutoConfig.from_pretrained(arguments.config_name or arguments.model_name_or_path, **source, **labels)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"The tokenizer has {len(tokenizer)} entries, the model's vocabulary {config.vocab_size}.")
    attention = {"attn_implementation": arguments.attn_implementation}
    if arguments.model_name_or_path is None:
        return auto.from_config(config, **attention), tokenizer
    name = arguments.model_name_or_path
    model = auto.from_pretrained(name, config=config, **attention, **source)
    return model, tokenizer


def load_examples(data: DataArguments, cache_dir: str | None, split: str, limit: int | None) -> Dataset:
    """The questions of `train`, `validation` or `test`, checked."""
    if data.dataset_name is not None:
        name = f"{data.dataset_name} ({split})"
        examples = load_dataset(data.dataset_name, data.dataset_config_name, split=split, cache_dir=cache_dir)
    else:
        name = getattr(data, f"{split}_file")
        examples = read_squad(name, cache_dir=cache_dir)
    check_examples(examples, name, version_2=data.version_2_with_negative, answered=split != "test")
    return examples if limit is None else examples.select(range(min(limit, len(examples))))


def make_features(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataArguments, *, labels: bool, segments: bool
) -> Dataset:
    """The windows of all questions; with segments for a teacher, which may read them where the model does not."""
    make = feature_maker(
        tokenizer,
        max_seq_length=data.max_seq_length,
        doc_stride=data.doc_stride,
        pad=data.pad_to_max_length,
        labels=labels,
        segments=segments,
    )
    return examples.map(
        make,
        batched=True,
        with_indices=True,
        remove_columns=examples.column_names,
        num_proc=data.preprocessing_num_workers,
        load_from_cache_file=not data.overwrite_cache,
        desc="Tokenizing",
    )


def make_post_process(examples: dict[str, Dataset], data: DataArguments, training: TrainingArguments) -> PostProcess:
    """Logits -> answers, written to `<stage>_predictions.json` and its siblings, and their scores if there are golds.

    Args:
        examples (`dict[str, Dataset]`): The questions, by what the prefix of the metrics may be.
        data (`DataArguments`): How to search.
        training (`TrainingArguments`): Where to write.
    """
    version = "v2.0" if data.version_2_with_negative else "v1.1"
    metric = evaluate.load(METRIC, version, keep_in_memory=True)

    def post_process(windows: Dataset, logits: tuple[np.ndarray, np.ndarray], stage: str) -> dict[str, Any]:
        answers = find_answers(
            examples[stage],
            windows,
            logits,
            n_best_size=data.n_best_size,
            max_answer_length=data.max_answer_length,
            version_2=data.version_2_with_negative,
            null_score_diff_threshold=data.null_score_diff_threshold,
            show_progress=training.should_log and not training.disable_tqdm,
        )
        if training.should_save:
            folder = Path(training.output_dir)
            write_json(folder / f"{stage}_predictions.json", answers.texts)
            write_json(folder / f"{stage}_nbest_predictions.json", answers.n_best)
            if answers.null_odds is not None:
                write_json(folder / f"{stage}_null_odds.json", answers.null_odds)
        if stage == "test":
            return {}
        references = [{"id": one["id"], "answers": one["answers"]} for one in examples[stage]]
        if answers.null_odds is None:
            predictions = [{"id": name, "prediction_text": text} for name, text in answers.texts.items()]
            return metric.compute(predictions=predictions, references=references)
        # The best spans, whatever was decided about them: the best threshold may lie on either side of this one.
        predictions = [
            {"id": name, "prediction_text": text, "no_answer_probability": answers.null_odds[name]}
            for name, text in answers.spans.items()
        ]
        return metric.compute(
            predictions=predictions, references=references, no_answer_threshold=data.null_score_diff_threshold
        )

    return post_process


def trainer_class(compression: CompressionArguments) -> tuple[type[Trainer], dict[str, Any]]:
    """The Trainer of this run and what it takes beyond the usual."""
    config = compression.oto_config()
    if config is None:
        return QuestionAnsweringTrainer, {}

    class QuestionAnsweringOTOTrainer(QuestionAnsweringMixin, PriceMixin, OTOTrainer):
        """[`OTOTrainer`] that scores answers, and counts what it costs."""

    return QuestionAnsweringOTOTrainer, {"oto_config": config, "teacher_model": compression.teacher_model_name_or_path}


def size(model: PreTrainedModel, sequence_length: int) -> dict[str, Any]:
    """Parameters, all and in the blocks, multiply-accumulates of heads and neurons, and bytes of the weights."""
    try:
        numbers = summarize(model, sequence_length=sequence_length).to_dict()
    except ValueError:  # a dense run of a model that cannot be pruned
        return {"parameters": model.num_parameters()}
    return {name: numbers[name] for name in ("parameters", "encoder_parameters", "macs", "file_size")}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run what the arguments ask for, and return the numbers of `all_results.json`."""
    parsed = parse_arguments(arguments)
    with progress_bars(not parsed[-1].disable_tqdm):
        return run(*parsed)


def run(
    model_arguments: ModelArguments,
    data: DataArguments,
    compression: CompressionArguments,
    training: TrainingArguments,
) -> dict[str, Any]:
    """As [`main`], of arguments that are parsed."""
    checkpoint = check_output_dir(
        training.output_dir, resume=training.resume_from_checkpoint, overwrite=data.overwrite_output_dir
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(training.get_process_log_level())
    transformers.utils.logging.set_verbosity(training.get_process_log_level())
    if (training.bf16 or training.bf16_full_eval) and training.device.type == "cpu" and not made_for_bf16():
        logger.warning(
            "bfloat16 will be slow, many times as slow as float32: this processor has no instructions for it "
            "(AVX-512 BF16 or AMX). Leave out `--bf16` and `--bf16_full_eval`."
        )

    set_seed(training.seed)
    model, tokenizer = load_model(model_arguments)
    check_length(model, data.max_seq_length)
    examples, windows = {}, {}
    for wanted, stage, split, limit in (
        (training.do_train, "train", "train", data.max_train_samples),
        (training.do_eval, "eval", "validation", data.max_eval_samples),
        (training.do_predict, "test", "test", data.max_predict_samples),
    ):
        if wanted:
            with training.main_process_first(desc=f"reading the questions to {stage}"):
                examples[stage] = load_examples(data, model_arguments.cache_dir, split, limit)
                taught = stage == "train" and compression.teacher_model_name_or_path is not None
                windows[stage] = make_features(
                    examples[stage], tokenizer, data, labels=stage == "train", segments=taught
                )
            logger.info("%s: %d questions, %d windows", stage, len(examples[stage]), len(windows[stage]))
    if compression.compress and training.do_eval:
        examples["zeroed"] = examples["eval"]

    multiple = 8 if training.fp16 or training.bf16 else None
    common: dict[str, Any] = {
        "args": training,
        "data_collator": default_data_collator
        if data.pad_to_max_length
        else DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple),
        "eval_dataset": windows.get("eval"),
        "processing_class": tokenizer,
        "post_process": make_post_process(examples, data, training)
        if training.do_eval or training.do_predict
        else None,
    }
    kind, extra = trainer_class(compression) if training.do_train else (QuestionAnsweringTrainer, {})
    trainer = trained_by = kind(model=model, train_dataset=windows.get("train"), **common, **extra)
    results = Results(training.output_dir, enabled=training.should_save)
    if training.do_train:
        if data.overwrite_output_dir and checkpoint is None and training.should_save:
            remove_checkpoints(training.output_dir)
        trained = trainer.train(resume_from_checkpoint=checkpoint).metrics
        if compression.compress and training.do_eval:
            zeroed = trainer.evaluate(metric_key_prefix="zeroed")
        trainer.save_model()
        trainer.save_state()
        results.add("train", {**trained, **trainer.price, "train_samples": len(windows["train"])})
        if compression.compress:
            # What counts is what a user gets: the small model as it is on disk.
            trainer.accelerator.wait_for_everyone()
            model = AutoModelForQuestionAnswering.from_pretrained(
                training.output_dir, attn_implementation=model_arguments.attn_implementation
            )
            trainer = QuestionAnsweringTrainer(model=model, **common)
            if training.do_eval:
                results.add("zeroed", zeroed)
    if training.do_eval:
        scores = trainer.evaluate()
        results.add("eval", {**scores, "eval_samples": len(windows["eval"])})
        if trainer is not trained_by:
            # For its card; logged they were.
            trained_by.state.log_history.append({**scores, "step": trained_by.state.global_step})
    if training.do_predict:
        results.add("test", {**trainer.predict(windows["test"]).metrics, "test_samples": len(windows["test"])})
    results.add("model", size(model, data.max_seq_length))
    if training.do_train and not trained_by.is_fsdp_enabled:
        tell = trained_by.push_to_hub if training.push_to_hub else trained_by.create_model_card
        tell(
            tasks="question-answering",
            dataset=data.dataset_name or Path(str(data.train_file)).name,
            dataset_tags=data.dataset_name or [],  # else the card names what made the windows: "generator"
        )
    for name, value in results.all.items():
        logger.info("%s = %s", name, value)
    return results.all


if __name__ == "__main__":
    main()
