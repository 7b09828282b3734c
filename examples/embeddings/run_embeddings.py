#!/usr/bin/env python
"""Make an embedding model or a reranker small by one method, score it, and write a line of JSON.

`original` only scores the model. `distill` prunes it while it learns its own embeddings of texts, without labels;
`layers` does the same with whole blocks dropped at the start and nothing pruned. `sts` and `retrieval` fine-tune it on
scored pairs or on questions and their paragraphs, `rerank` makes a cross-encoder for scored pairs out of it: pruned
meanwhile, or dense at `--sparsity 0`.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, disable_progress_bars
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.training_args import BatchSamplers
from sentence_transformers.cross_encoder.evaluation import CrossEncoderCorrelationEvaluator
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.losses import (
    CoSENTLoss,
    EmbedDistillLoss,
    MultipleNegativesRankingLoss,
)
from texts import read_pairs, read_questions, texts_to_learn_from
from transformers import set_seed
from transformers.utils import logging

from hf_oto import OTOConfig, OTOCrossEncoderTrainer, OTOSentenceTransformerTrainer, summarize

METHODS = ("original", "distill", "layers", "sts", "retrieval", "rerank")
PRUNING = ("distill", "sts", "retrieval", "rerank")

# Optimizer steps and peak learning rates where none are given.
STEPS_AND_RATES = {
    "original": (0, 0.0),
    "distill": (1500, 5e-4),
    "layers": (1500, 5e-4),
    "sts": (450, 2e-4),
    "retrieval": (450, 2e-4),
    "rerank": (900, 2e-4),
}

# Which blocks stay, spread over the depth as in Sentence Transformers' own example of layer reduction.
KEPT_BLOCKS = {1: (3,), 2: (1, 4), 3: (1, 3, 5), 4: (0, 2, 3, 5), 5: (0, 1, 2, 4, 5)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, required=True, help="What is done.")
    parser.add_argument("--model", required=True, help="Sentence Transformers model: a folder or a name on the Hub.")
    parser.add_argument("--stsb", type=Path, required=True, help="Folder with train.csv and dev.csv: scored pairs.")
    parser.add_argument("--squad", type=Path, required=True, help="Folder with train.json and dev.json: questions.")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="Files to distill on, beside both.")
    parser.add_argument("--embeddings", type=Path, help="Where the original's embeddings of them are kept (.npz).")
    parser.add_argument("--sparsity", type=float, default=0.5, help="Share of the encoder to remove; 0 trains dense.")
    parser.add_argument("--saliency", default="fisher", help="As in OTOConfig.")
    parser.add_argument("--blocks", type=int, default=3, choices=KEPT_BLOCKS, help="Blocks that `layers` keeps.")
    parser.add_argument("--metric", choices=("mse", "cosine"), default="mse", help="Distance of embeddings.")
    parser.add_argument("--max_steps", type=int, help="Optimizer steps; if not given, the usual for the method.")
    parser.add_argument("--batch_size", type=int, default=64, help="Texts, pairs or questions of a step.")
    parser.add_argument("--learning_rate", type=float, help="At its peak; if not given, the usual for the method.")
    parser.add_argument("--pruning_start_ratio", type=float, default=0.1, help="As in OTOConfig.")
    parser.add_argument("--pruning_end_ratio", type=float, default=0.5, help="As in OTOConfig.")
    parser.add_argument("--pruning_periods", type=int, default=10, help="As in OTOConfig.")
    parser.add_argument("--keep_dropout", action="store_true", help="As in OTOConfig, but off if not given.")
    parser.add_argument("--shrink_during_training", action="store_true", help="As in OTOConfig.")
    parser.add_argument("--bf16", action="store_true", help="Train in bfloat16, where the processor is made for it.")
    parser.add_argument(
        "--max_samples", type=int, help="Use so many texts, pairs and questions only: to try a command."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the order of the data and of dropout.")
    parser.add_argument("--results", type=Path, default=Path("embeddings.jsonl"), help="File that gets the line.")
    parser.add_argument("--save", type=Path, help="Folder for the model.")
    options = parser.parse_args(arguments)
    steps, rate = STEPS_AND_RATES[options.method]
    options.max_steps = steps if options.max_steps is None else options.max_steps
    options.learning_rate = rate if options.learning_rate is None else options.learning_rate
    return options


# What is learnt from.


def embeddings_of(texts: list[str], original: SentenceTransformer, kept: Path | None) -> np.ndarray:
    """The original's embeddings, computed once for all runs that name one file."""
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    if kept is not None and kept.exists():
        with np.load(kept) as file:
            if file["digest"] == digest:
                return file["embeddings"]
        raise ValueError(f"{kept} holds the embeddings of other texts. Remove it, or name another file.")
    embeddings = original.encode(texts, batch_size=128, show_progress_bar=False)
    if kept is not None:
        temporary = kept.with_name(f"{os.getpid()}-{kept.name}")
        np.savez(temporary, digest=digest, embeddings=embeddings)
        temporary.replace(kept)
    return embeddings


def distillation_data(options: argparse.Namespace, original: SentenceTransformer) -> DatasetDict:
    """Sentences and passages in batches of their own, so that no batch is mostly padding."""
    files = [options.stsb / "train.csv", options.squad / "train.json", *options.texts]
    texts = {name: found[: options.max_samples] for name, found in texts_to_learn_from(files).items()}
    every = [text for part in texts.values() for text in part]
    parts = np.split(embeddings_of(every, original, options.embeddings), np.cumsum([*map(len, texts.values())])[:-1])
    return DatasetDict(
        {
            name: Dataset.from_dict({"text": texts[name], "label": part})
            for name, part in zip(texts, parts, strict=True)
        }
    )


def task_data(options: argparse.Namespace) -> Dataset:
    if options.method == "retrieval":
        asked = read_questions(options.squad / "train.json").first(options.max_samples)
        return Dataset.from_dict(
            {"anchor": asked.questions, "positive": [asked.paragraphs[place] for place in asked.answers]}
        )
    first, second, scores = zip(*read_pairs(options.stsb / "train.csv")[: options.max_samples], strict=True)
    return Dataset.from_dict({"sentence1": first, "sentence2": second, "label": scores})


# How it is scored.


def scores_of(model: SentenceTransformer, options: argparse.Namespace) -> dict[str, float]:
    """Spearman's correlation on scored pairs, and nDCG@10 of paragraphs found for questions."""
    first, second, scores = zip(*read_pairs(options.stsb / "dev.csv")[: options.max_samples], strict=True)
    similarity = EmbeddingSimilarityEvaluator(first, second, scores, main_similarity="cosine", write_csv=False)
    asked = read_questions(options.squad / "dev.json").first(options.max_samples)
    retrieval = InformationRetrievalEvaluator(
        {str(number): question for number, question in enumerate(asked.questions)},
        {str(number): paragraph for number, paragraph in enumerate(asked.paragraphs)},
        {str(number): {str(place)} for number, place in enumerate(asked.answers)},
        show_progress_bar=False,
        write_csv=False,
        batch_size=64,
    )
    return {"spearman": similarity(model)["spearman_cosine"], "ndcg@10": retrieval(model)["cosine_ndcg@10"]}


def reranker_scores(model: CrossEncoder, options: argparse.Namespace) -> dict[str, float]:
    pairs = read_pairs(options.stsb / "dev.csv")[: options.max_samples]
    evaluator = CrossEncoderCorrelationEvaluator(
        [[first, second] for first, second, _ in pairs], [score for *_, score in pairs], write_csv=False
    )
    return {"spearman": evaluator(model)["spearman"]}


# The methods.


def drop_blocks(model: SentenceTransformer, kept: tuple[int, ...]) -> None:
    """Leave whole blocks out, before any training."""
    encoder: Any = model.transformers_model
    encoder.encoder.layer = torch.nn.ModuleList([encoder.encoder.layer[number] for number in kept])
    encoder.config.num_hidden_layers = len(kept)


def training_arguments(kind: Callable[..., Any], options: argparse.Namespace, folder: str) -> Any:
    decays = {"num_decay_steps": round(options.max_steps * (1 - options.pruning_end_ratio)), "decay_type": "linear"}
    # Another question's paragraph is no negative where it is one's own.
    more = {"batch_sampler": BatchSamplers.NO_DUPLICATES} if options.method == "retrieval" else {}
    return kind(
        folder,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs=decays,  # the same for every method
        warmup_steps=0.05,
        weight_decay=0.01,
        bf16=options.bf16,
        use_cpu=not torch.accelerator.is_available(),  # in bfloat16 Trainer asks for it by name
        seed=options.seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=max(1, options.max_steps // 10),
        **more,
    )


def pruning(options: argparse.Namespace) -> dict[str, Any]:
    """What an OTO trainer is given beside the rest."""
    config = OTOConfig(
        target_sparsity=options.sparsity,
        saliency=options.saliency,
        pruning_start_ratio=options.pruning_start_ratio,
        pruning_end_ratio=options.pruning_end_ratio,
        pruning_periods=min(options.pruning_periods, max(1, options.max_steps // 5)),
        keep_dropout=options.keep_dropout,
        shrink_during_training=options.shrink_during_training,
    )
    return {"oto_config": config}


def train(options: argparse.Namespace, model: Any, folder: str) -> Any:
    """Train by the method. Gives the model as it was saved and loaded again, or the dense one as it is."""
    prunes = options.method in PRUNING and options.sparsity > 0
    if options.method == "rerank":
        trainer_class, arguments_class = CrossEncoderTrainer, CrossEncoderTrainingArguments
        if prunes:
            trainer_class = OTOCrossEncoderTrainer
        loss: Any = BinaryCrossEntropyLoss(model)
    else:
        trainer_class, arguments_class = SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        if prunes:
            trainer_class = OTOSentenceTransformerTrainer
        loss = {
            "sts": CoSENTLoss,
            "retrieval": MultipleNegativesRankingLoss,
            **dict.fromkeys(("distill", "layers"), lambda model: EmbedDistillLoss(model, options.metric)),
        }[options.method](model)
    if options.method in ("distill", "layers"):
        data: Any = distillation_data(options, model)
    else:
        data = task_data(options)
    if options.method == "layers":
        drop_blocks(model, KEPT_BLOCKS[options.blocks])
    trainer = trainer_class(
        model=model,
        args=training_arguments(arguments_class, options, folder),
        train_dataset=data,
        loss=loss,
        **(pruning(options) if prunes else {}),
    )
    trainer.train()
    if not prunes:
        return model
    small = options.save or Path(folder, "small")
    trainer.save_model(str(small))
    return type(model)(str(small), trust_remote_code=True, device=str(model.device))


def run(options: argparse.Namespace) -> dict[str, Any]:
    set_seed(options.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU that has it
    kind = CrossEncoder if options.method == "rerank" else SentenceTransformer
    settings = {"num_labels": 1} if options.method == "rerank" else {}
    model: Any = kind(options.model, **settings)
    dense_macs = summarize(model.transformers_model, sequence_length=128).macs
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if options.method == "original":
            if options.texts:
                distillation_data(options, model)  # for the runs that follow
        else:
            model = train(options, model, folder)
        seconds = time.perf_counter() - start
        scores = (reranker_scores if options.method == "rerank" else scores_of)(model, options)
        macs = summarize(model.transformers_model, sequence_length=128).macs
        if options.save is not None and not options.save.exists():
            model.save_pretrained(str(options.save))
    return {
        **{"method": options.method, "sparsity": options.sparsity if options.method in PRUNING else 0.0},
        **({"blocks": options.blocks} if options.method == "layers" else {}),
        **{"metric": options.metric, "saliency": options.saliency, "seed": options.seed, **scores},
        **{"macs_kept": macs / dense_macs, "steps": options.max_steps, "learning_rate": options.learning_rate},
        **{"batch_size": options.batch_size, "keep_dropout": options.keep_dropout, "bf16": options.bf16},
        "seconds": round(seconds, 1),
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    line = json.dumps(run(options))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with open(options.results, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    disable_progress_bars()
    logging.disable_progress_bar()
    main()
