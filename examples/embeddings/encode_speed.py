#!/usr/bin/env python
"""Sentences a second of `encode`: the original and smaller models take turns, beside the ratio of their MACs.

The ratio of MACs is the limit: tokenizing, embeddings, LayerNorms and pooling take as long in a small model.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from texts import read_pairs, read_questions

from hf_oto import summarize


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="The original: a folder or a name on the Hub.")
    parser.add_argument("--small", nargs="+", required=True, help="Folders that run_embeddings.py --save wrote.")
    parser.add_argument("--stsb", type=Path, required=True, help="Folder with dev.csv: its sentences are encoded.")
    parser.add_argument("--squad", type=Path, required=True, help="Folder with dev.json: its paragraphs are encoded.")
    parser.add_argument("--count", type=int, default=320, help="Of the sentences and of the paragraphs.")
    parser.add_argument("--batch_size", type=int, default=32, help="Texts of a batch.")
    parser.add_argument("--threads", type=int, default=1, help="Of one operation.")
    parser.add_argument("--repeats", type=int, default=9, help="Medians are of so many turns of each model.")
    parser.add_argument("--device", default="cpu", help="Where they run.")
    return parser.parse_args(arguments)


def seconds(model: SentenceTransformer, texts: list[str], batch_size: int) -> float:
    start = time.perf_counter()
    model.encode(texts, batch_size=batch_size, show_progress_bar=False)
    return time.perf_counter() - start


def compared(models: dict[str, SentenceTransformer], texts: list[str], options: argparse.Namespace) -> list[dict]:
    """Ratios to the first model, of turns that lie side by side: what else the machine does meets all of them."""
    for model in models.values():
        seconds(model, texts[: options.batch_size], options.batch_size)
    turns = [
        {name: seconds(model, texts, options.batch_size) for name, model in models.items()}
        for _ in range(options.repeats)
    ]
    original, *smaller = models
    tokens = [len(ids) for ids in models[original].tokenizer(texts, truncation=True)["input_ids"]]
    length = round(statistics.mean(tokens))
    macs = {name: summarize(model.transformers_model, sequence_length=length).macs for name, model in models.items()}
    lines = []
    for name in smaller:
        ratio = statistics.median(turn[original] / turn[name] for turn in turns)
        limit = macs[original] / macs[name]
        lines.append({"model": name, "tokens": length, "speed": ratio, "macs": limit, "of_limit": ratio / limit})
    rate = len(texts) / statistics.median(turn[original] for turn in turns)
    return [{"model": original, "tokens": length, "texts_per_second": rate}, *lines]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    models = {
        name: SentenceTransformer(name, trust_remote_code=True, device=options.device)
        for name in (options.model, *options.small)
    }
    sentences = [first for first, _, _ in read_pairs(options.stsb / "dev.csv")][: options.count]
    paragraphs = read_questions(options.squad / "dev.json").paragraphs[: options.count]
    lines = compared(models, sentences, options) + compared(models, paragraphs, options)
    for line in lines:
        print(json.dumps(line))
    return lines


if __name__ == "__main__":
    main()
