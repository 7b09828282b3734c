#!/usr/bin/env python
"""The lines that run_embeddings.py wrote, as tables: means over seeds, their range, and the share that is kept."""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

METRICS = ("spearman", "ndcg@10")


def name_of(line: dict[str, Any]) -> str:
    method, removed = line["method"], f"{line['sparsity']:.0%} removed"
    trained = {"distill": f"distilled, {line['metric']}", "rerank": "cross-encoder"}
    if method == "original":
        return "the original"
    if method == "layers":
        return f"layer dropping, {line['blocks']} of 6 blocks, {line['metric']}"
    name = trained.get(method, f"fine-tuned, {method}")
    if not line["sparsity"]:
        return f"{name}, dense"
    return f"{name}, {removed}" + ("" if line["saliency"] == "fisher" else f", {line['saliency']}")


def rows(lines: Iterable[dict[str, Any]]) -> list[str]:
    """Markdown. A cross-encoder's scores are beside the dense one's, an embedding model's beside the original's."""
    found = defaultdict(list)
    for line in lines:
        found[name_of(line)].append(line)
    table = ["| | seeds | MACs kept | STS-B, Spearman | kept | retrieval, nDCG@10 | kept |", "| --- " * 7 + "|"]
    for name, own in found.items():
        reference = "cross-encoder, dense" if own[0]["method"] == "rerank" else "the original"
        cells = [name, f"{len(own)}", f"{statistics.mean(line['macs_kept'] for line in own):.1%}"]
        for metric in METRICS:
            values = [line[metric] for line in own if metric in line]
            if not values:
                cells += ["", ""]
                continue
            mean, spread = statistics.mean(values), (max(values) - min(values)) / 2
            cells.append(f"{mean:.4f} ± {spread:.4f}" if len(values) > 1 else f"{mean:.4f}")
            beside = [line[metric] for line in found.get(reference, ()) if metric in line]
            cells.append(f"{mean / statistics.mean(beside):.1%}" if beside and name != reference else "")
        table.append(f"| {' | '.join(cells)} |")
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="Files of JSON lines.")
    options = parser.parse_args(arguments)
    lines = [json.loads(line) for path in options.results for line in path.read_text(encoding="utf-8").splitlines()]
    print("\n".join(rows(lines)))


if __name__ == "__main__":
    main()
