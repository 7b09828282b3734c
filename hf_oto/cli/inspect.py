"""`hf-oto inspect`: what a model has, has kept, and would keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from ..config import CONFIG_NAME as OTO_CONFIG_NAME
from ..config import LatencyTable, OTOConfig
from ..hspg.budget import allowance, check_target, reach
from ..hspg.selection import target_examples
from ..models.configuration_oto import PRUNED_PREFIX
from ..models.groups import partition
from ..report.summary import summarize, summarize_kept
from ..report.tables import markdown_table
from .loading import empty_model, load_model, read_config
from .printing import JsonOption, ModelArgument, at_home, show

TRAINER_STATE = "trainer_state.json"


def inspect(
    model: ModelArgument,
    target_sparsity: Annotated[
        float | None, typer.Option(help="Show what this `target_sparsity` would leave.")
    ] = None,
    target_unit: Annotated[str, typer.Option(help="The target's metric: params, macs, groups, latency.")] = "params",
    sequence_length: Annotated[int, typer.Option(help="Tokens of the sequence for which MACs are counted.")] = 384,
    latency_table: Annotated[
        Path | None, typer.Option(help="What `hf-oto latency` wrote: for the metric latency.", callback=at_home)
    ] = None,
    structures: Annotated[list[str] | None, typer.Option(help="heads or neurons; repeat it. Both by default.")] = None,
    min_heads: Annotated[int, typer.Option(help="Heads that every block keeps at least.")] = 1,
    min_neurons: Annotated[int, typer.Option(help="Neurons that every block keeps at least.")] = 8,
    round_to: Annotated[int, typer.Option(help="What the width of every FFN is a multiple of.")] = 8,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="Every block keeps as many: a model of the family's own class.")
    ] = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Read the weights of a dense model too: groups of zeros are removed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Show a model's groups, what it has kept, and what a target would leave.

    Reads the config, and of the weights their names. Of a checkpoint that OTOTrainer wrote it reads them: zeros count
    as removed.

    Example: hf-oto inspect bert-base-uncased --target-sparsity 0.5
    """
    settings = OTOConfig(
        target_sparsity=target_sparsity,
        target_unit=target_unit,
        sequence_length=sequence_length,
        latency_table=None if latency_table is None else LatencyTable.load(latency_table),
        structures=tuple(structures or ("heads", "neurons")),
        min_heads=min_heads,
        min_neurons=min_neurons,
        round_to=round_to,
        uniform=uniform,
    )
    options: dict[str, Any] = {"sequence_length": sequence_length, "latency_table": settings.latency_table}
    config = read_config(model)
    pruned = config.model_type.startswith(PRUNED_PREFIX)
    in_training = not pruned and all(Path(model, name).is_file() for name in (OTO_CONFIG_NAME, TRAINER_STATE))
    if weights or in_training:
        found: PreTrainedModel = load_model(model, config)
        summary = summarize(found, **options)
    else:
        found = empty_model(model, config)
        summary = summarize_kept(found, [array.count for array in partition(found).arrays], **options)
    groups = partition(found)
    numbers: dict[str, Any] = {
        "model": model,
        "class": type(found).__name__,
        "pruned": pruned,
        "groups": groups.num_groups,
        "head_size": groups.head_size,
        "hidden_size": groups.hidden_size,
        **summary.to_dict(),
    }
    parts: list[Any] = [
        f"{type(found).__name__}: {groups.num_groups:,} zero-invariant groups in {groups.num_layers} blocks, "
        f"heads of size {groups.head_size}, hidden size {groups.hidden_size}",
        *summary.table().renderables,
    ]
    if target_sparsity is not None:
        numbers["target"], said = _target(found, settings, options)
        parts += said
    show(numbers, parts, as_json)


def _target(found: PreTrainedModel, settings: OTOConfig, options: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """What a target would leave: its numbers, and what is printed of them."""
    groups = partition(found)
    check_target(groups, settings)
    limits = reach(groups, settings)
    budget = allowance(settings.target_sparsity or 0.0, limits.total)
    examples = {
        name: summarize_kept(found, kept, **options) for name, kept in target_examples(groups, settings).items()
    }
    numbers = {
        **settings.to_dict(),
        "total": limits.total,
        "removed_already": limits.removed,
        "budget": budget,
        "reachable": limits.reachable,
        "reachable_share": limits.reachable / limits.total if limits.total else 0.0,
        "leaves": {name: example.to_dict() for name, example in examples.items()},
    }
    share = f"{limits.reachable / limits.total:.2%}" if limits.total else "nothing"
    metric = "ns of latency" if settings.target_unit == "latency" else settings.target_unit
    text = (
        f"A target of {settings.target_sparsity} removes at most {budget:,} of {limits.total:,} {metric}. The "
        f"floors (min_heads {settings.min_heads}, min_neurons {settings.min_neurons}, round_to {settings.round_to}) "
        f"let {share} go. Training finds which groups go; "
    )
    several = len({(*one.heads, *one.neurons) for one in examples.values()}) > 1
    blocks = "every block would keep as many" if settings.uniform else "the blocks would keep"
    text += f"{blocks}{', if it were' if several else ''}"
    timed = ("latency, ns", "share") if settings.latency_table else ()
    table = markdown_table("", "heads", "neurons", "parameters", "share", "MACs", "share", *timed, "all parameters")
    for name, example in list(examples.items())[: None if several else 1]:
        table.add_row(
            name if several else "",
            _counts(example.heads, settings.uniform),
            _counts(example.neurons, settings.uniform),
            f"{example.prunable_parameters:,}",
            f"{example.prunable_ratio:.1%}",
            f"{example.macs:,}",
            f"{example.macs_ratio:.1%}",
            *((f"{example.latency:,}", f"{example.latency_ratio:.1%}") if timed else ()),
            f"{example.parameters:,}",
        )
    return numbers, [text, table]


def _counts(of_blocks: Sequence[int], alike: bool) -> str:
    """How many groups of a kind all blocks together have; where they are alike, blocks times groups."""
    return f"{len(of_blocks)} x {of_blocks[0]:,}" if alike else f"{sum(of_blocks):,}"
