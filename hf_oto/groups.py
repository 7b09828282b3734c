"""A model -> its zero-invariant groups: index algebra over parameter names.

Groups hold names, never tensors, and the groups of one block and kind are one array: BERT-base's 37,008 groups are 24
small objects. Source: OTO (Chen et al., NeurIPS 2021, arXiv:2107.07467), section 3.1.

Shapes: `G` groups of one array, `D` head size, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import BLOCK_SPECS, BlockSpec, dense_model_type


@dataclass(frozen=True)
class GroupArray:
    """All zero-invariant groups of one block and one kind. Group `g` owns `width` consecutive rows and columns.

    Args:
        layer (`int`): Index of the block.
        kind (`str`): `"heads"` or `"neurons"`.
        count (`int`): Groups that the block has now, `G`; 0 where a pruned model has none left.
        width (`int`): Rows of one projection that one group owns: the head size `D`, or 1 for a neuron.
        rows (`tuple[str, ...]`): Names of the parameters whose dim 0 is `[G * width]`: weights and biases.
        columns (`str`): Name of the weight whose dim 1 is `[G * width]`.
        silencers (`tuple[str, ...]`): The rows which, when zero, silence the group: value rows with their bias (the
            context is zero whatever the attention weights), or the neuron's row with its bias (act(0) = 0).
    """

    layer: int
    kind: str
    count: int
    width: int
    rows: tuple[str, ...]
    columns: str
    silencers: tuple[str, ...]

    @property
    def members(self) -> tuple[tuple[str, int], ...]:
        """Every parameter that the groups own a part of, with the dim that they are laid out along."""
        return (*((name, 0) for name in self.rows), (self.columns, 1)) if self.count else ()


@dataclass(frozen=True)
class Partition:
    """The zero-invariant groups of a model's transformer blocks.

    Args:
        model_type (`str`): The dense family, also for a model that is pruned already.
        hidden_size (`int`): `H`, the size of the residual stream, which is never pruned.
        head_size (`int`): `D`, rows of W_v that one head owns.
        dense_heads, dense_neurons (`int`): Heads and neurons of one block before any pruning.
        arrays (`tuple[GroupArray, ...]`): Block by block: heads, then neurons.
    """

    model_type: str
    hidden_size: int
    head_size: int
    dense_heads: int
    dense_neurons: int
    arrays: tuple[GroupArray, ...]

    @property
    def num_layers(self) -> int:
        return len(self.arrays) // 2

    @property
    def num_groups(self) -> int:
        """Groups that the model has now, heads and neurons."""
        return sum(array.count for array in self.arrays)

    def counts(self, kind: str) -> list[int]:
        """Groups of a kind that every block has now, block by block."""
        return [array.count for array in self.arrays if array.kind == kind]

    def dense_count(self, kind: str) -> int:
        """Groups of a kind that every block had before any pruning."""
        return self.dense_heads if kind == "heads" else self.dense_neurons


def partition(model: nn.Module) -> Partition:
    """
    Find the zero-invariant groups of a Transformers model from the table of families: no input, no tracing.

    Args:
        model (`PreTrainedModel`): A base model or one with a task head, dense or pruned, not wrapped.

    Returns:
        [`Partition`]

    Raises:
        `ValueError`: The family, the configuration or the activation is not supported; the message says which are.
    """
    config, spec, family = _supported(model)
    fields = vars(config)  # a pruned config refuses to read a per-layer field as if it were global
    dense_heads, dense_neurons = fields[spec.heads_field], fields[spec.width_field]
    hidden_size = config.hidden_size
    head_size = fields.get("head_dim") or hidden_size // dense_heads

    base: Any = model.base_model
    root = "" if base is model else f"{model.base_model_prefix}."
    names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    arrays = []
    for layer, block in enumerate(base.get_submodule(spec.blocks)):
        prefix = f"{root}{spec.blocks}.{layer}."
        heads = (spec.query, spec.key, spec.value), spec.attention_out, (spec.value,), head_size
        neurons = (spec.neurons_in,), spec.neurons_out, (spec.neurons_in,), 1
        for kind, (sources, sink, silencers, width) in (("heads", heads), ("neurons", neurons)):
            arrays.append(_array(names, prefix, layer, kind, sources, sink, silencers, width, hidden_size))
        if arrays[-1].count:
            _check_activation(block, spec)
    return Partition(family, hidden_size, head_size, dense_heads, dense_neurons, tuple(arrays))


def zero_groups(array: GroupArray, parameters: Mapping[str, Tensor]) -> Tensor:
    """
    Which groups of an array add exactly nothing to their block.

    Args:
        array ([`GroupArray`]): The groups.
        parameters (`Mapping[str, Tensor]`): `dict(model.named_parameters())`.

    Returns:
        `Tensor`: bool `[G]`. A group counts as zero when all its silencing rows are, or all its columns.
    """
    if not array.count:
        return torch.zeros(0, dtype=torch.bool)
    columns = parameters[array.columns]
    no_output = (columns.detach().unflatten(1, (array.count, array.width)) == 0).all(dim=2).all(dim=0)
    silent = torch.ones_like(no_output)
    for name in array.silencers:
        silent &= (parameters[name].detach().reshape(array.count, -1) == 0).all(dim=1)
    return silent | no_output


def _supported(model: nn.Module) -> tuple[Any, BlockSpec, str]:
    """The model's config, its family's row of the table and the family's name, or a refusal."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    supported = f"Supported families: {', '.join(BLOCK_SPECS)}."
    if model_type is None or not hasattr(model, "base_model"):
        raise ValueError(
            f"`model` must be a Transformers model that is not wrapped, got {type(model).__name__}. {supported}"
        )
    family = dense_model_type(model_type)
    spec = BLOCK_SPECS.get(family)
    if spec is None:
        raise ValueError(f"`model` is of type {model_type!r}, whose groups are not known. {supported}")
    for flag, reason in spec.refused:
        if getattr(config, flag, False):
            raise ValueError(f"`model` has `{flag}=True`, which is not supported: {reason}. Set it to False.")
    return config, spec, family


def _array(
    names: Mapping[str, tuple[int, ...]],
    prefix: str,
    layer: int,
    kind: str,
    sources: tuple[str, ...],
    sink: str,
    silencers: tuple[str, ...],
    width: int,
    hidden_size: int,
) -> GroupArray:
    columns = f"{prefix}{sink}.weight"
    if columns not in names:  # a structure cut to nothing leaves only the bias of its output projection
        present = [name for path in sources if (name := f"{prefix}{path}.weight") in names]
        if present or f"{prefix}{sink}.bias" not in names:
            raise ValueError(f"`model` has no plain linear layer at {columns!r}. Pass a model that is not adapted.")
        return GroupArray(layer, kind, 0, width, (), columns, ())

    def parameters(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{prefix}{path}.{leaf}" for path in paths for leaf in ("weight", "bias"))

    rows = parameters(sources)
    total = names[columns][-1]
    expected = {name: (total, hidden_size) if name.endswith("weight") else (total,) for name in rows}
    expected[columns] = (hidden_size, total)
    for name, shape in expected.items():
        if names.get(name) != shape:
            raise ValueError(
                f"`model` has {name!r} of shape {names.get(name)} where {shape} is expected. Pass a model whose "
                f"projections are plain linear layers, not quantized or adapted."
            )
    if total % width:
        raise ValueError(f"`model` has {total} columns in {columns!r}, which is no multiple of the head size {width}.")
    return GroupArray(layer, kind, total // width, width, rows, columns, parameters(silencers))


def _check_activation(block: nn.Module, spec: BlockSpec) -> None:
    activation: Any = block
    for name in spec.activation.split("."):  # a plain function is no submodule
        activation = getattr(activation, name)
    with torch.no_grad():
        at_zero = float(activation(torch.zeros(1, device="cpu")))
    if at_zero != 0:
        raise ValueError(
            f"`model` has the FFN activation {getattr(activation, '__name__', activation)}, act(0) = {at_zero:.3g}: "
            f"a zero neuron would still add to its block. Use one with act(0) = 0, such as GELU or ReLU."
        )
