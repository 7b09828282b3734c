"""What a model has kept, layer by layer: numbers, a text table, a picture.

A group that is exactly zero counts as removed, so a zeroed model and its cut one have the same summary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from transformers import PreTrainedModel

from ..config import LatencyTable, OTOConfig
from ..hspg.budget import check_table, group_cost, removed_cost
from ..models.configuration_oto import BLOCK_SPECS
from ..models.groups import BlockCounts, Partition, partition, zero_groups
from ..models.sharding import check_whole
from .pictures import check_format, layers_figure, save_figure
from .tables import markdown_table, plain_text


@dataclass(frozen=True)
class Summary:
    """
    What a model has kept. `str()` and rich's `print` give the table.

    Args:
        model_type (`str`): The dense family, also of a pruned model.
        sequence_length (`int`): Tokens of the sequence for which MACs are counted.
        heads, neurons (`tuple[int, ...]`): What every block keeps.
        dense_heads, dense_neurons (`int`): What every block had before any pruning.
        prunable_parameters, dense_prunable_parameters (`int`): Weights that heads and neurons own: kept, before.
        macs, dense_macs (`int`):
            Multiply-accumulates of the heads and neurons for one sequence: kept, before. What is never pruned
            (embeddings, LayerNorms, task heads) is not in it, as in [`OTOConfig`]'s target.
        latency, dense_latency (`int`, *optional*):
            Nanoseconds of a forward by a table of latencies: of this model, of the dense one. `None` without a table.
        latency_conditions (`str`, *optional*): Where and how the table was measured.
        parameters (`int`, *optional*): All parameters of the cut model, a tied one once.
        parameters_without_embeddings (`int`, *optional*): Those without the base model's `embeddings` module.
        encoder_parameters (`int`, *optional*): Those in the transformer blocks, LayerNorms and all biases included.
        file_size (`int`, *optional*):
            Bytes of the cut model's weights in their present dtype, a tied one once: what `model.safetensors` has
            after its header of some kilobytes.
        kept_heads (`tuple[tuple[int, ...], ...]`, *optional*):
            Which heads every block keeps, counted from 0. `None` where that is not known: a model that heads were cut
            out of has only their number. Two summaries that differ in nothing else are equal.

    Those of a whole model are `None` in the summary of a [`Partition`], which knows the blocks only.
    """

    model_type: str
    sequence_length: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    dense_heads: int
    dense_neurons: int
    prunable_parameters: int
    dense_prunable_parameters: int
    macs: int
    dense_macs: int
    latency: int | None = None
    dense_latency: int | None = None
    latency_conditions: str | None = None
    parameters: int | None = None
    parameters_without_embeddings: int | None = None
    encoder_parameters: int | None = None
    file_size: int | None = None
    kept_heads: tuple[tuple[int, ...], ...] | None = dataclasses.field(default=None, compare=False)

    @property
    def prunable_ratio(self) -> float:
        """Share of the prunable parameters that is kept."""
        return ratio(self.prunable_parameters, self.dense_prunable_parameters)

    @property
    def macs_ratio(self) -> float:
        """Share of the MACs that is kept."""
        return ratio(self.macs, self.dense_macs)

    @property
    def latency_ratio(self) -> float | None:
        """Share of the dense model's time that the table says is taken; `None` without a table."""
        return None if self.latency is None or self.dense_latency is None else ratio(self.latency, self.dense_latency)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, and the ratios, as plain JSON values."""
        numbers = {**dataclasses.asdict(self), "heads": list(self.heads), "neurons": list(self.neurons)}
        numbers["kept_heads"] = None if self.kept_heads is None else [list(kept) for kept in self.kept_heads]
        ratios = {name: getattr(self, name) for name in ("prunable_ratio", "macs_ratio", "latency_ratio")}
        return {**numbers, **ratios}

    def table(self) -> Group:
        """Two tables for rich: what every layer keeps, and the sizes. In ASCII, and valid Markdown."""
        layers = markdown_table("layer", "heads", "of", "neurons", "of")
        for layer, (heads, neurons) in enumerate(zip(self.heads, self.neurons, strict=True)):
            row = layer, heads, self.dense_heads, neurons, self.dense_neurons
            layers.add_row(*(f"{number:,}" for number in row))
        sizes = markdown_table(self.model_type, "kept", "of", "kept share")
        removed = self.dense_prunable_parameters - self.prunable_parameters
        totals = (
            ("all parameters", self.parameters),
            ("without embeddings", self.parameters_without_embeddings),
            ("encoder", self.encoder_parameters),
        )
        rows = [
            ("prunable parameters", self.prunable_parameters, self.dense_prunable_parameters),
            (f"MACs, {self.sequence_length} tokens", self.macs, self.dense_macs),
            *((name, kept, kept + removed) for name, kept in totals if kept is not None),
        ]
        if self.latency is not None and self.dense_latency is not None:
            rows.insert(2, ("latency by the table, ns", self.latency, self.dense_latency))
        for name, kept, dense in rows:
            sizes.add_row(name, f"{kept:,}", f"{dense:,}", f"{ratio(kept, dense):.1%}")
        if self.file_size is not None:
            sizes.add_row("bytes of weights", f"{self.file_size:,}", "", "")
        return Group(layers, sizes)

    def __rich__(self) -> Group:
        return self.table()

    def __str__(self) -> str:
        return plain_text(self)

    def figure(self) -> Any:
        """
        The heads of every layer as a grid and the widths of the FFNs as bars, a `matplotlib.figure.Figure`.

        Raises:
            `ImportError`: There is no matplotlib.
        """
        return layers_figure(
            self.heads,
            self.neurons,
            dense_heads=self.dense_heads,
            dense_neurons=self.dense_neurons,
            kept_heads=self.kept_heads,
            title=f"{self.model_type}: {self.prunable_ratio:.1%} of the weights of heads and neurons kept",
        )

    def plot(self, path: str | os.PathLike) -> None:
        """
        Draw what every layer keeps into a PNG or SVG file, written whole or not at all.

        Raises:
            `ValueError`: The name ends in neither `.png` nor `.svg`.
            `ImportError`: There is no matplotlib.
        """
        check_format(path)
        save_figure(self.figure(), path)


def summarize(
    model_or_partition: PreTrainedModel | Partition,
    *,
    sequence_length: int = 384,
    latency_table: LatencyTable | None = None,
) -> Summary:
    """
    Sum up what a model has kept.

    Args:
        model_or_partition ([`PreTrainedModel`] or [`Partition`]):
            A model of a supported family: dense, with groups that are exactly zero (they count as removed), or pruned.
            Or a partition, whose groups all count as kept; what only a model knows is then `None`.
        sequence_length (`int`, *optional*, defaults to 384):
            Tokens of the sequence for which MACs are counted.
        latency_table ([`~hf_oto.config.LatencyTable`], *optional*):
            Says what a forward takes.

    Returns:
        [`Summary`]

    Raises:
        `ValueError`: The model is not supported, is sharded or holds no weights, `sequence_length` is below 1, or
            `latency_table` is of another architecture.
    """
    if isinstance(model_or_partition, Partition):
        arrays = model_or_partition.arrays
        kept = [torch.ones(array.count, dtype=torch.bool, device="cpu") for array in arrays]
    else:
        check_whole(model_or_partition)
        parameters = dict(model_or_partition.named_parameters())
        if any(parameter.is_meta for parameter in parameters.values()):
            raise ValueError("`model` must hold its weights, got the meta device's. Sum up its `partition` instead.")
        arrays = partition(model_or_partition).arrays
        kept = [~zero_groups(array, parameters) for array in arrays]
    summary = summarize_kept(
        model_or_partition,
        [int(keep.sum()) for keep in kept],
        sequence_length=sequence_length,
        latency_table=latency_table,
    )
    heads = [keep for array, keep in zip(arrays, kept, strict=True) if array.kind == "heads"]
    if any(len(keep) < summary.dense_heads for keep in heads):
        return summary
    return dataclasses.replace(summary, kept_heads=tuple(tuple(keep.nonzero().flatten().tolist()) for keep in heads))


def summarize_kept(
    model_or_partition: PreTrainedModel | Partition,
    kept: Sequence[int],
    *,
    sequence_length: int = 384,
    latency_table: LatencyTable | None = None,
) -> Summary:
    """
    As [`summarize`], of what the model would be if it kept so many groups. No weight is read: it may be on the meta
    device.

    Args:
        model_or_partition ([`PreTrainedModel`] or [`Partition`]): As in [`summarize`].
        kept (`Sequence[int]`): Groups to keep of every array of the partition.
        sequence_length (`int`, *optional*, defaults to 384): As in [`summarize`].
        latency_table ([`~hf_oto.config.LatencyTable`], *optional*): As in [`summarize`].
    """
    if sequence_length < 1:
        raise ValueError(f"`sequence_length` must be at least 1, got {sequence_length}.")
    if isinstance(model_or_partition, Partition):
        groups, sizes = model_or_partition, {}
    else:
        groups = partition(model_or_partition)
        sizes = _sizes(model_or_partition, groups, kept)
    times: dict[str, Any] = {}
    if latency_table is not None:
        config = OTOConfig(target_unit="latency", latency_table=latency_table)
        check_table(groups, config)
        total = latency_table.total
        times = {"latency": total - removed_cost(groups, config, kept), "dense_latency": total}
        times["latency_conditions"] = latency_table.conditions
    heads, neurons = BlockCounts.of_arrays(kept)
    everything = tuple(tuple(range(count)) for count in heads) if set(heads) <= {groups.dense_heads} else None
    all_heads, all_neurons = groups.num_layers * groups.dense_heads, groups.num_layers * groups.dense_neurons
    return Summary(
        model_type=groups.model_type,
        sequence_length=sequence_length,
        heads=tuple(heads),
        neurons=tuple(neurons),
        dense_heads=groups.dense_heads,
        dense_neurons=groups.dense_neurons,
        prunable_parameters=total_cost(groups, sum(heads), sum(neurons), "params", sequence_length),
        dense_prunable_parameters=total_cost(groups, all_heads, all_neurons, "params", sequence_length),
        macs=total_cost(groups, sum(heads), sum(neurons), "macs", sequence_length),
        dense_macs=total_cost(groups, all_heads, all_neurons, "macs", sequence_length),
        kept_heads=everything,
        **times,
        **sizes,
    )


def total_cost(groups: Partition, heads: int, neurons: int, unit: str, sequence_length: int) -> int:
    """heads · c_head + neurons · c_neuron, with the costs c of [`~hf_oto.hspg.budget.group_cost`] in `unit`."""
    head, neuron = (group_cost(groups, kind, unit, sequence_length) for kind in ("heads", "neurons"))
    return heads * head + neurons * neuron


def ratio(kept: int, dense: int) -> float:
    """Share that is kept; 1 of nothing."""
    return kept / dense if dense else 1.0


def _sizes(model: PreTrainedModel, groups: Partition, kept: Sequence[int]) -> dict[str, Any]:
    """Parameters and bytes that are left of a model when only `kept` groups of every array are."""
    base = model.base_model
    spec = BLOCK_SPECS[groups.model_type]
    embeddings = set(base.get_submodule(spec.embeddings).parameters())
    blocks = set(base.get_submodule(spec.blocks).parameters())
    shares: dict[str, tuple[int, int]] = {}
    for array, left in zip(groups.arrays, kept, strict=True):
        shares |= {name: (left, array.count) for name, _ in array.members}
        shares |= {name: (int(left > 0), 1) for name in array.shared}
    sizes = dict.fromkeys(("parameters", "parameters_without_embeddings", "encoder_parameters", "file_size"), 0)
    for name, parameter in model.named_parameters():  # a tied one comes once
        left, count = shares.get(name, (1, 1))
        number = parameter.numel() // count * left
        sizes["parameters"] += number
        sizes["parameters_without_embeddings"] += number * (parameter not in embeddings)
        sizes["encoder_parameters"] += number * (parameter in blocks)
        sizes["file_size"] += number * parameter.element_size()
    return sizes
