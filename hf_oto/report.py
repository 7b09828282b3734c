"""What a model has kept, layer by layer: numbers, a text table, a picture.

A group that is exactly zero counts as removed, so a zeroed model and its cut one have the same summary.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from transformers import PreTrainedModel

from .architectures import BLOCK_SPECS
from .budget import group_cost
from .groups import Partition, partition, zero_groups

TEXT_WIDTH = 100


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
        parameters (`int`, *optional*): All parameters of the cut model, a tied one once.
        parameters_without_embeddings (`int`, *optional*): Those without the base model's `embeddings` module.
        encoder_parameters (`int`, *optional*): Those in the transformer blocks, LayerNorms and all biases included.
        file_size (`int`, *optional*):
            Bytes of the cut model's weights in their present dtype, a tied one once: what `model.safetensors` has
            after its header of some kilobytes.

    The optional ones are `None` in the summary of a [`Partition`], which knows the blocks only.
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
    parameters: int | None = None
    parameters_without_embeddings: int | None = None
    encoder_parameters: int | None = None
    file_size: int | None = None

    @property
    def prunable_ratio(self) -> float:
        """Share of the prunable parameters that is kept."""
        return ratio(self.prunable_parameters, self.dense_prunable_parameters)

    @property
    def macs_ratio(self) -> float:
        """Share of the MACs that is kept."""
        return ratio(self.macs, self.dense_macs)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, and both ratios, as plain JSON values."""
        numbers = {**dataclasses.asdict(self), "heads": list(self.heads), "neurons": list(self.neurons)}
        return {**numbers, "prunable_ratio": self.prunable_ratio, "macs_ratio": self.macs_ratio}

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
        for name, kept, dense in rows:
            sizes.add_row(name, f"{kept:,}", f"{dense:,}", f"{ratio(kept, dense):.1%}")
        if self.file_size is not None:
            sizes.add_row("bytes of weights", f"{self.file_size:,}", "", "")
        return Group(layers, sizes)

    def __rich__(self) -> Group:
        return self.table()

    def __str__(self) -> str:
        return plain_text(self)

    def plot(self, path: str | os.PathLike) -> None:
        """
        Draw what every layer keeps into a PNG file, written whole or not at all.

        Raises:
            `ImportError`: There is no matplotlib.
        """
        try:
            from matplotlib.figure import Figure  # without pyplot: no window, no figure that stays in memory
        except ImportError as error:
            raise ImportError("`plot` needs matplotlib: `pip install hf-oto[examples]`.") from error
        layers = range(len(self.heads))
        figure = Figure(figsize=(max(6.0, 3 + 0.3 * len(layers)), 5), layout="constrained")
        panels: Any = figure.subplots(2, sharex=True)
        kinds = (("heads", self.heads, self.dense_heads), ("neurons", self.neurons, self.dense_neurons))
        for axes, (kind, kept, dense) in zip(panels, kinds, strict=True):
            axes.bar(layers, [dense] * len(layers), color="#dddddd", label="removed")
            axes.bar(layers, kept, color="#2b6cb0", label="kept")
            axes.set_ylabel(kind)
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_title(f"{self.model_type}: {self.prunable_ratio:.1%} of the prunable parameters kept")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        panels[1].set_xlabel("layer")
        panels[1].set_xticks(layers)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            figure.savefig(temporary, format="png", dpi=150)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def summarize(model_or_partition: PreTrainedModel | Partition, *, sequence_length: int = 384) -> Summary:
    """
    Sum up what a model has kept.

    Args:
        model_or_partition ([`PreTrainedModel`] or [`Partition`]):
            A model of a supported family: dense, with groups that are exactly zero (they count as removed), or pruned.
            Or a partition, whose groups all count as kept; what only a model knows is then `None`.
        sequence_length (`int`, *optional*, defaults to 384):
            Tokens of the sequence for which MACs are counted.

    Returns:
        [`Summary`]

    Raises:
        `ValueError`: The model is not supported or holds no weights, or `sequence_length` is below 1.
    """
    if isinstance(model_or_partition, Partition):
        kept = [array.count for array in model_or_partition.arrays]
    else:
        parameters = dict(model_or_partition.named_parameters())
        if any(parameter.is_meta for parameter in parameters.values()):
            raise ValueError("`model` must hold its weights, got the meta device's. Sum up its `partition` instead.")
        arrays = partition(model_or_partition).arrays
        kept = [array.count - int(zero_groups(array, parameters).sum()) for array in arrays]
    return summarize_kept(model_or_partition, kept, sequence_length=sequence_length)


def summarize_kept(
    model_or_partition: PreTrainedModel | Partition, kept: Sequence[int], *, sequence_length: int = 384
) -> Summary:
    """
    As [`summarize`], of what the model would be if it kept so many groups. No weight is read: it may be on the meta
    device.

    Args:
        model_or_partition ([`PreTrainedModel`] or [`Partition`]): As in [`summarize`].
        kept (`Sequence[int]`): Groups to keep of every array of the partition.
        sequence_length (`int`, *optional*, defaults to 384): As in [`summarize`].
    """
    if sequence_length < 1:
        raise ValueError(f"`sequence_length` must be at least 1, got {sequence_length}.")
    if isinstance(model_or_partition, Partition):
        groups, sizes = model_or_partition, {}
    else:
        groups = partition(model_or_partition)
        sizes = _sizes(model_or_partition, groups, kept)
    heads, neurons = kept[::2], kept[1::2]
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
        **sizes,
    )


def card_section(
    summary: Summary,
    *,
    repo_id: str,
    auto_class: str,
    picture: str | None = None,
    scores: Mapping[str, float] | None = None,
    dense_scores: Mapping[str, float] | None = None,
) -> str:
    """
    What a model card says of the compression: what was removed, what is left of every layer, how to load it.

    Args:
        summary ([`Summary`]): Of the model.
        repo_id (`str`): Where it is loaded from.
        auto_class (`str`): The Auto class of its task.
        picture (`str`, *optional*): A file beside the card, drawn by [`~Summary.plot`].
        scores, dense_scores (`Mapping[str, float]`, *optional*):
            Metrics of the model, and those of the dense one to be put beside them, by name.

    Returns:
        `str`: Markdown.
    """
    beside = {name: value for name, value in (scores or {}).items() if name in (dense_scores or {})}
    rows = [f"| {name} | {(dense_scores or {})[name]:.4g} | {value:.4g} |" for name, value in beside.items()]
    table = "\n".join(["| | dense | this model |", "| --- | --- | --- |", *rows]) + "\n\n" if rows else ""
    image = f"![Heads and neurons that every layer kept]({picture})\n\n" if picture else ""
    return f"""## Compression

While it was fine-tuned, whole attention heads and feed-forward neurons were removed by
[Only Train Once](https://arxiv.org/abs/2107.07467): {1 - summary.prunable_ratio:.1%} of the weights that they own, and
{1 - summary.macs_ratio:.1%} of their multiply-accumulates. No mask is left, and nothing has to be fine-tuned again.

{table}{image}{summary}

## How to load it

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
```

With `import hf_oto` before it, `trust_remote_code` is not needed.

"""


def total_cost(groups: Partition, heads: int, neurons: int, unit: str, sequence_length: int) -> int:
    """heads · c_head + neurons · c_neuron, with the costs c of [`~hf_oto.budget.group_cost`] in `unit`."""
    head, neuron = (group_cost(groups, kind, unit, sequence_length) for kind in ("heads", "neurons"))
    return heads * head + neurons * neuron


def ratio(kept: int, dense: int) -> float:
    """Share that is kept; 1 of nothing."""
    return kept / dense if dense else 1.0


def _sizes(model: PreTrainedModel, groups: Partition, kept: Sequence[int]) -> dict[str, int]:
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


def plain_text(renderable: Any, width: int = TEXT_WIDTH) -> str:
    """What rich prints, in so many columns and without colours, whatever the terminal."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, force_terminal=False, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def markdown_table(*columns: str) -> Table:
    """An empty table for rich, in ASCII and valid Markdown: names on the left, numbers on the right."""
    table = Table(box=box.MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table
