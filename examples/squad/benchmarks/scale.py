#!/usr/bin/env python
"""How what pruning adds grows with the model: finding the groups, selecting among them, and the optimizer's step.

Models of random weights, from tiny to an encoder of a billion weights. Groups are found, and selected among, on shapes
alone; the step is taken by models whose training fits into memory.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the example's own modules

import torch
from outputs import write_json
from processes import console
from rich.table import Table
from torch.optim import AdamW
from transformers import BertConfig, BertModel

from benchmarks.cost import SIZES, seconds
from hf_oto import HSPG, OTOConfig, partition
from hf_oto.hspg.budget import allowance, dense_cost, floor_and_multiple, group_cost, select_groups
from hf_oto.models.groups import Partition

ENCODERS = {
    **SIZES,
    "billion": {"hidden_size": 1280, "num_hidden_layers": 48, "num_attention_heads": 20, "intermediate_size": 5120},
}
_TRAINING = 16  # bytes of a weight, its gradient and two moments, in float32
LABELS = {
    "partition": "finding the groups",
    "selection": "selecting among them",
    "adamw": "AdamW's step",
    "added": "what pruning adds to it",
    "groups": "groups",
    "prunable": "weights in groups",
}
TIMED = {"partition": "finding", "selection": "selecting", "adamw": "AdamW", "added": "added"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=ENCODERS, default=list(ENCODERS), help="Of the models.")
    parser.add_argument("--memory", type=float, default=12, help="Gigabytes that a training may take.")
    parser.add_argument("--repeats", type=int, default=5, help="Medians are of so many.")
    parser.add_argument("--output_dir", type=Path, default=Path("build/scale"), help="Numbers and picture.")
    return parser.parse_args(arguments)


def median(times: list[float]) -> float:
    """In milliseconds."""
    return 1000 * statistics.median(times)


def selection(groups: Partition, config: OTOConfig) -> float:
    """Seconds that one selection takes, of half of the weights, by random saliency."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([array.count for array in groups.arrays])
    costs = torch.tensor([group_cost(groups, array.kind, "params", 1) for array in groups.arrays])
    limits = torch.tensor([floor_and_multiple(array.kind, config) for array in groups.arrays])
    score_G = torch.rand(groups.num_groups, generator=generator)
    alive_G = torch.ones_like(score_G, dtype=torch.bool)
    array_G = torch.arange(counts.numel()).repeat_interleave(counts)
    budget = allowance(0.5, dense_cost(groups, config))
    return seconds(
        lambda: select_groups(score_G, costs[array_G], array_G, alive_G, budget, limits[:, 0], limits[:, 1]), "cpu"
    )


def steps(size: str, repeats: int) -> dict[str, float]:
    """AdamW's own step, and what HSPG adds to it while it prunes, in milliseconds. They take turns."""
    model = BertModel(BertConfig(**ENCODERS[size]), add_pooling_layer=False)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    inner = AdamW(model.named_parameters(), lr=1e-4, fused=True)
    config = OTOConfig(pruning_start_ratio=0)  # the first period, in which most groups go
    pruning = HSPG(inner, partition(model), config, total_steps=1000)
    pruning.step()
    times = [(seconds(inner.step, "cpu"), seconds(pruning.step, "cpu")) for _ in range(repeats)]
    return {"adamw": median([own for own, _ in times]), "added": median([ours - own for own, ours in times])}


def measure(size: str, options: argparse.Namespace) -> dict[str, Any]:
    with torch.device("meta"):
        model = BertModel(BertConfig(**ENCODERS[size]), add_pooling_layer=False)
    groups, weights = partition(model), sum(parameter.numel() for parameter in model.parameters())
    found: dict[str, Any] = {
        "size": size,
        "layers": groups.num_layers,
        "groups": groups.num_groups,
        "weights": weights,
        "prunable": dense_cost(groups, OTOConfig()),
        "partition": median([seconds(lambda: partition(model), "cpu") for _ in range(options.repeats)]),
        "selection": median([selection(groups, OTOConfig()) for _ in range(options.repeats)]),
    }
    if weights * _TRAINING <= options.memory * 1e9:
        found |= steps(size, options.repeats)
    return found


def growth(lines: list[dict[str, Any]], name: str, against: str) -> float:
    """The power of a size by which a time grows, by least squares on logarithms: 1 is linear."""
    pairs = [(math.log(line[against]), math.log(line[name])) for line in lines if line.get(name, 0) > 0]
    if len({x for x, _ in pairs}) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*pairs, strict=True)).slope


def result_table(lines: list[dict[str, Any]]) -> Table:
    table = Table(title="Milliseconds")
    for column in ("size", "layers", "groups", "weights", *TIMED.values()):
        table.add_column(column, justify="left" if column == "size" else "right")
    for line in lines:
        times = [f"{line[name]:.2f}" if name in line else "" for name in TIMED]
        table.add_row(line["size"], f"{line['layers']}", f"{line['groups']:,}", f"{line['weights']:,}", *times)
    return table


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Times against groups and against weights, on logarithmic axes: what is linear runs along the dotted line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for panel, against, names in zip(
        panels, ("groups", "prunable"), (("partition", "selection"), ("adamw", "added")), strict=True
    ):
        for name, marker in zip(names, "os", strict=True):
            shown = [line for line in lines if line.get(name, 0) > 0]
            panel.plot(
                [line[against] for line in shown], [line[name] for line in shown], marker=marker, label=LABELS[name]
            )
        if shown:  # of the last name
            ends, time = [lines[0][against], shown[-1][against]], shown[-1][names[-1]]
            panel.plot(ends, [time * end / ends[1] for end in ends], color="0.5", linestyle=":", label="linear")
        panel.set(xscale="log", yscale="log", xlabel=LABELS[against], ylabel="milliseconds")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    lines = [measure(size, options) for size in options.sizes]
    powers = {
        name: growth(lines, name, against)
        for name, against in {
            "partition": "layers",
            "selection": "groups",
            "adamw": "weights",
            "added": "prunable",
        }.items()
    }
    write_json(
        options.output_dir / "scale.json", {"threads": torch.get_num_threads(), "sizes": lines, "powers": powers}
    )
    plot(lines, options.output_dir / "scale.png")
    console.print(result_table(lines))
    console.print("powers of growth, 1 is linear:", {name: round(power, 2) for name, power in powers.items()})
    return lines


if __name__ == "__main__":
    main()
