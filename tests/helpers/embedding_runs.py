"""Short runs of tiny models of sentence-transformers, made here from random weights.

As a script it trains on every rank that torchrun starts, `embedding_runs.py ranks FOLDER`, or pushes to the Hub,
`embedding_runs.py push REPO FOLDER`.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments
from sentence_transformers.multi_vector_encoder import MultiVectorEncoderTrainingArguments
from sentence_transformers.sentence_transformer import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.sparse_encoder import SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder.modules import SpladePooling
from squad_data import make_questions, wordpiece
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from hf_oto import (
    OTOConfig,
    OTOCrossEncoderTrainer,
    OTOMultiVectorEncoderTrainer,
    OTOSentenceTransformerTrainer,
    OTOSparseEncoderTrainer,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
CONFIG = OTOConfig(target_sparsity=0.5, min_neurons=4, round_to=4, sequence_length=16, pruning_periods=4)
STEPS = 16

QUESTIONS = [asked["question"] for _, asked in make_questions(64, seed=1)]
CONTEXTS = [context for context, _ in make_questions(64, seed=1)]


def encoder_folder(folder: Path, kind: type = BertModel) -> str:
    """A folder with a tiny BERT of random weights and its tokenizer."""
    tokenizer = wordpiece(model_max_length=48)
    torch.manual_seed(0)
    labels = {"num_labels": 1} if kind is BertForSequenceClassification else {}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **SIZES, **labels)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def embedder(folder: Path) -> SentenceTransformer:
    torch.manual_seed(0)
    modules = [Transformer(encoder_folder(folder)), Pooling(32, "mean"), Dense(32, 16), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu")


def reranker(folder: Path) -> CrossEncoder:
    return CrossEncoder(encoder_folder(folder, BertForSequenceClassification), device="cpu")


def splade(folder: Path) -> SparseEncoder:
    body = Transformer(encoder_folder(folder, BertForMaskedLM), transformer_task="fill-mask")
    return SparseEncoder(modules=[body, SpladePooling()], device="cpu")


def colbert(folder: Path) -> MultiVectorEncoder:
    torch.manual_seed(0)
    return MultiVectorEncoder(encoder_folder(folder), device="cpu")


def pairs() -> Dataset:
    return Dataset.from_dict({"anchor": QUESTIONS, "positive": CONTEXTS})


def scored() -> Dataset:
    scores = [number % 5 / 4 for number in range(len(QUESTIONS))]
    return Dataset.from_dict({"first": QUESTIONS, "second": CONTEXTS, "label": scores})


def classes() -> Dataset:
    return Dataset.from_dict(
        {"first": QUESTIONS, "second": CONTEXTS, "label": [number % 3 for number in range(len(QUESTIONS))]}
    )


def taught(size: int = 16) -> Dataset:
    drawn = torch.randn(len(QUESTIONS), size, generator=torch.Generator().manual_seed(0))
    labels = torch.nn.functional.normalize(drawn)
    return Dataset.from_dict({"text": QUESTIONS, "label": labels.tolist()})


def margins() -> Dataset:
    return Dataset.from_dict(
        {"query": QUESTIONS, "positive": CONTEXTS, "negative": CONTEXTS[::-1], "label": [0.5] * len(QUESTIONS)}
    )


def lists() -> Dataset:
    documents = [[CONTEXTS[row], CONTEXTS[row - 1], CONTEXTS[row - 2]] for row in range(len(QUESTIONS))]
    return Dataset.from_dict({"query": QUESTIONS, "documents": documents, "labels": [[1, 0, 0]] * len(QUESTIONS)})


KINDS = {
    SentenceTransformer: (OTOSentenceTransformerTrainer, SentenceTransformerTrainingArguments),
    CrossEncoder: (OTOCrossEncoderTrainer, CrossEncoderTrainingArguments),
    SparseEncoder: (OTOSparseEncoderTrainer, SparseEncoderTrainingArguments),
    MultiVectorEncoder: (OTOMultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments),
}


def make(folder, model, data, loss, config=CONFIG, extra=None, kind=None, **options):
    """A trainer for a model of any of the four kinds."""
    trainer_class, arguments_class = KINDS[type(model)]
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return (kind or trainer_class)(
        model=model,
        args=arguments_class(str(folder), **defaults | options),
        train_dataset=data,
        loss=loss,
        **({} if kind else {"oto_config": config}),
        **(extra or {}),
    )


def main(mode: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    folder = Path(arguments[-1])
    model = embedder(folder / "encoder")
    if mode == "ranks":
        data = DatasetDict({"pairs": scored(), "more": scored()})
        trainer = make(folder / "run", model, data, CoSENTLoss(model), gradient_accumulation_steps=2)
        trainer.train()
        trainer.save_model(str(folder / "small"))
        state = {key: value.clone() for key, value in model.state_dict().items()}
        torch.save(state, folder / f"rank-{trainer.args.process_index}.pt")
        return
    hub = {"push_to_hub": True, "hub_model_id": arguments[0], "hub_strategy": "every_save"}
    saves = {"save_strategy": "steps", "save_steps": 8, "eval_strategy": "no"}
    trainer = make(folder / "run", model, scored(), CoSENTLoss(model), **hub, **saves)
    trainer.train()
    trainer.push_to_hub(commit_message="End of training")
    torch.save(torch.from_numpy(model.encode(QUESTIONS[:8])), folder / "embeddings.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
