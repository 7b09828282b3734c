#!/usr/bin/env python
"""How much faster a pruned model answers: dense and pruned take turns, beside the ratio of their MACs, the limit.

The models are of random weights, with random heads and neurons cut out until the target is met: what is kept differs
from layer to layer, as after a training, and speed does not depend on the weights.
"""

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the example's own modules

import torch
from outputs import write_json
from processes import console
from rich.table import Table
from transformers import BertConfig, BertForQuestionAnswering

from benchmarks.cost import SIZES
from benchmarks.frontier import cut
from hf_oto import OTOConfig
from hf_oto.deploy.benchmark import BACKENDS, Measurement, measure


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base", help="Of the model.")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.7], help="Shares to be removed.")
    parser.add_argument("--round_to", nargs="+", type=int, default=[8], help="What FFN widths are a multiple of.")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="What runs them.")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32], help="Sequences.")
    parser.add_argument("--sequence_lengths", nargs="+", type=int, default=[128, 384], help="Tokens of a sequence.")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="Of one operation.")
    parser.add_argument("--repeats", type=int, default=15, help="Medians are of so many runs of each model.")
    parser.add_argument("--output", type=Path, default=Path("build/speed.json"), help="The numbers.")
    return parser.parse_args(arguments)


def line(target: float, round_to: int, found: Measurement) -> dict[str, Any]:
    of_limit = found.latency_ratio / found.macs_ratio
    numbers = {**dataclasses.asdict(found), "latency_ratio": found.latency_ratio, "of_limit": of_limit}
    return {"target": target, "round_to": round_to, **numbers}


def result_table(lines: list[dict[str, Any]]) -> Table:
    """One row for each target, width, backend and length; ratios are the worst and the median over the rest."""
    table = Table(title="Latency, dense over pruned, and its share of the MACs' ratio")
    for column in ("target", "round_to", "backend", "length", "MACs", "latency", "of the limit", "worst"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    keys = list(
        dict.fromkeys((one["target"], one["round_to"], one["backend"], one["sequence_length"]) for one in lines)
    )
    for key in keys:
        own = [one for one in lines if (one["target"], one["round_to"], one["backend"], one["sequence_length"]) == key]
        shares = [one["of_limit"] for one in own]
        latency, share = statistics.median(one["latency_ratio"] for one in own), statistics.median(shares)
        target, round_to, backend, length = key
        ratios = f"{own[0]['macs_ratio']:.2f}", f"{latency:.2f}", f"{share:.0%}", f"{min(shares):.0%}"
        table.add_row(f"{target:.0%}", f"{round_to}", backend, f"{length}", *ratios)
    return table


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    torch.manual_seed(0)
    dense = BertForQuestionAnswering(BertConfig(**SIZES[options.size])).eval()
    lines = []
    for target in options.targets:
        for round_to in options.round_to:
            model = BertForQuestionAnswering(dense.config)
            pruned = cut(model, OTOConfig(target_sparsity=target, saliency="random", round_to=round_to)).eval()
            for threads in options.threads:
                timed = measure(
                    dense,
                    pruned,
                    backends=options.backends,
                    batch_sizes=options.batch_sizes,
                    sequence_lengths=options.sequence_lengths,
                    threads=threads,
                    repeats=options.repeats,
                )
                for found in timed:
                    lines.append(line(target, round_to, found))
                    write_json(options.output, {"torch": torch.__version__, "size": options.size, "lines": lines})
    console.print(result_table(lines))
    return lines


if __name__ == "__main__":
    main()
