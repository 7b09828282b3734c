#!/usr/bin/env python
"""What a target in latency gets: a table of a model of random weights is measured, the model is cut to each target in
three ways, and the small models are timed beside the dense one, their forwards taking turns. `got` is the share of
the dense model's time that is gone, the median over the turns.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the example's own modules

import torch
from outputs import write_json
from processes import console
from rich.table import Table
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedModel

from benchmarks.cost import SIZES
from hf_oto import OTOConfig, measure_latency, partition
from hf_oto.hspg.budget import removed_cost
from hf_oto.hspg.selection import target_examples
from hf_oto.models.surgery import keep_groups


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mini", help="Of the model.")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.3, 0.5, 0.7], help="Shares of the time to go.")
    parser.add_argument("--batch_size", type=int, default=1, help="Sequences of a forward.")
    parser.add_argument("--sequence_length", type=int, default=128, help="Tokens of a sequence.")
    parser.add_argument("--threads", type=int, default=1, help="Of one operation.")
    parser.add_argument("--repeats", type=int, default=15, help="Forwards that count, of the table and of each pair.")
    parser.add_argument(
        "--cpu_time", action="store_true", help="Count the processor's time, for a machine that is busy: one thread."
    )
    parser.add_argument("--output", type=Path, default=Path("build/latency.json"), help="The numbers and the table.")
    return parser.parse_args(arguments)


@torch.inference_mode()
def removed_time(dense: PreTrainedModel, pruned: list[PreTrainedModel], options: argparse.Namespace) -> list[float]:
    """Share of the dense model's time that each pruned one does not take. All of them take turns."""
    clock: Callable[[], int] = time.thread_time_ns if options.cpu_time else time.perf_counter_ns
    inputs: dict[str, Any] = {"input_ids": torch.randint(1000, 30000, (options.batch_size, options.sequence_length))}
    models = [dense, *pruned]
    shares: list[list[float]] = [[] for _ in pruned]
    for repeat in range(-2, options.repeats):
        took = [0] * len(models)
        for index in range(len(models)) if repeat % 2 else reversed(range(len(models))):
            start = clock()
            models[index](**inputs)
            took[index] = clock() - start
        if repeat >= 0:
            for found, own in zip(shares, took[1:], strict=True):
                found.append(1 - own / took[0])
    return [statistics.median(found) for found in shares]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**SIZES[options.size])).eval()
    groups = partition(model)
    start = time.perf_counter()
    table = measure_latency(
        model,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        threads=options.threads,
        repeats=options.repeats,
        cpu_time=options.cpu_time,
    )
    seconds = time.perf_counter() - start
    rows = []
    for target in options.targets:
        config = OTOConfig(target_sparsity=target, target_unit="latency", latency_table=table)
        cut = target_examples(groups, config)
        models = []
        for counts in cut.values():
            kept = [torch.arange(array.count) < count for array, count in zip(groups.arrays, counts, strict=True)]
            models.append(keep_groups(model, groups, kept).eval())
        for (way, counts), got in zip(cut.items(), removed_time(model, models, options), strict=True):
            by_table = removed_cost(groups, config, counts) / table.total
            rows.append({"asked": target, "way": way, "by_table": by_table, "got": got})
    shown = Table(title=f"{options.size}: {table.conditions}; dense {table.total / 1e6:.2f} ms", title_justify="left")
    for column in ("asked", "cut", "by the table", "got"):
        shown.add_column(column)
    for row in rows:
        shown.add_row(f"{row['asked']:.0%}", row["way"], f"{row['by_table']:.2%}", f"{row['got']:.2%}")
    numbers = {"rows": rows, "seconds": seconds, "cpu_time": options.cpu_time, "table": table.to_dict()}
    write_json(options.output, numbers)
    console.print(shown)
    console.print(f"The table took {seconds:.0f} seconds.", highlight=False)
    return numbers


if __name__ == "__main__":
    main()
