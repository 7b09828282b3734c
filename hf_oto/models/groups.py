"""A model -> its zero-invariant groups: index algebra over parameter names.

Groups hold names, never tensors, and the groups of one block and kind are one array: BERT-base's 37,008 groups are 24
small objects. Source: OTO (Chen et al., NeurIPS 2021, arXiv:2107.07467), section 3.1.

Shapes: `G` groups of one array, `D` head size, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .configuration_oto import (
    BLOCK_SPECS,
    PRUNED_PREFIX,
    BlockSpec,
    attention_rows,
    dense_model_type,
    has_bias,
    layer_counts,
)

# Families that have blocks of this kind and are refused all the same, with the reason.
REFUSED: dict[str, str] = {
    "albert": "one block's weights serve all its layers, so that a layer cannot have sizes of its own",
    "bart": "its decoder's cross-attention heads read the encoder's states, and both have their sizes in one config",
    "t5": "its first block computes a bias by head that serves all blocks, and one config serves encoder and decoder",
    "gpt2": "its projections keep rows and columns the other way round, and its key/value cache is laid out by head",
}


class BlockCounts(NamedTuple):
    """Heads and neurons of every block, block by block."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]

    @classmethod
    def of_arrays(cls, numbers: Sequence[int]) -> BlockCounts:
        """From a number for each array of a [`Partition`]."""
        return cls(tuple(numbers[::2]), tuple(numbers[1::2]))

    @property
    def arrays(self) -> tuple[int, ...]:
        """A number for each array of a [`Partition`]."""
        return tuple(count for block in self.blocks for count in block)

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(heads, neurons) of each block."""
        return tuple(zip(self.heads, self.neurons, strict=True))


def config_counts(config: Any) -> BlockCounts:
    """What the config of a dense or a pruned model of a supported family says."""
    if config.model_type.startswith(PRUNED_PREFIX):
        heads, neurons = zip(*layer_counts(config), strict=True)
        return BlockCounts(heads, neurons)
    spec, layers = BLOCK_SPECS[dense_model_type(config.model_type)], config.num_hidden_layers
    heads = getattr(config, spec.key_heads_field or spec.heads_field)
    return BlockCounts((heads,) * layers, (getattr(config, spec.width_field),) * layers)


@dataclass(frozen=True)
class Owned:
    """What the groups of an array own of one parameter.

    Args:
        name (`str`): The parameter.
        dim (`int`): The dim that the groups lie along: 0 for rows and biases, 1 for columns.
        width (`int`): Consecutive entries that one group owns, in each of the blocks.
        blocks (`tuple[int, ...]`): Where projections lie one after another in one matrix, those of them that are
            meant: a group owns its entries in each. Otherwise there is the first alone.
    """

    name: str
    dim: int
    width: int
    blocks: tuple[int, ...] = (0,)

    def positions(self, count: int, groups: Tensor) -> Tensor:
        """Where some of `count` groups lie along the dim: block by block, group by group, int64."""
        blocks, within = (
            torch.tensor(self.blocks, device=groups.device),
            torch.arange(self.width, device=groups.device),
        )
        return (blocks[:, None, None] * (count * self.width) + groups[:, None] * self.width + within).flatten()


@dataclass(frozen=True)
class GroupArray:
    """All zero-invariant groups of one block and one kind.

    Args:
        layer (`int`): Index of the block.
        kind (`str`): `"heads"` or `"neurons"`.
        count (`int`): Groups that the block has now, `G`; 0 where a pruned model has none left.
        width (`int`): Columns that one group owns: the head size `D` (times the heads that read one key/value head,
            where several do), or 1 for a neuron.
        rows (`tuple[Owned, ...]`): The parameters whose rows the groups own: weights and biases.
        columns (`str`): Name of the weight whose dim 1 is `[G * width]`.
        shared (`tuple[str, ...]`): Parameters that all groups use alike, and that go when none is left.
    """

    layer: int
    kind: str
    count: int
    width: int
    rows: tuple[Owned, ...]
    columns: str
    shared: tuple[str, ...] = ()

    @property
    def owned(self) -> tuple[Owned, ...]:
        """All that the groups own."""
        return (*self.rows, Owned(self.columns, 1, self.width)) if self.count else ()

    @property
    def members(self) -> tuple[tuple[str, int], ...]:
        """Every parameter that the groups own a part of, with the dim that they are laid out along."""
        return tuple((owned.name, owned.dim) for owned in self.owned)


@dataclass(frozen=True)
class Partition:
    """The zero-invariant groups of a model's transformer blocks.

    Args:
        model_type (`str`): The dense family, also for a model that is pruned already.
        hidden_size (`int`): `H`, the size of the residual stream, which is never pruned.
        head_size (`int`): `D`, rows of W_v that one head owns.
        dense_heads, dense_neurons (`int`): Heads and neurons of one block before any pruning.
        arrays (`tuple[GroupArray, ...]`): Block by block: heads, then neurons.
        head_weights, neuron_weights (`tuple[int, int]`): Entries of matrices and of biases that one group owns.
        queries (`int`): Heads that read one key/value head. Where it is more than 1, what is counted as a head is a
            key/value head with those that read it.
    """

    model_type: str
    hidden_size: int
    head_size: int
    dense_heads: int
    dense_neurons: int
    arrays: tuple[GroupArray, ...]
    head_weights: tuple[int, int]
    neuron_weights: tuple[int, int]
    queries: int = 1

    @property
    def num_layers(self) -> int:
        return len(self.arrays) // 2

    @property
    def num_groups(self) -> int:
        """Groups that the model has now, heads and neurons."""
        return sum(array.count for array in self.arrays)

    @property
    def block_counts(self) -> BlockCounts:
        """What every block has now."""
        return BlockCounts.of_arrays([array.count for array in self.arrays])

    def plain_counts(self, kind: str) -> list[int]:
        """
        How many groups of a kind, none excepted, every block may keep in a config of the family's own: any number of
        neurons; of heads all, or where the config has a head size of its own, those that it takes.
        """
        dense, spec = self.dense_count(kind), BLOCK_SPECS[self.model_type]
        if kind == "heads" and not spec.own_head_size:
            return [dense]
        divides = kind == "heads" and spec.heads_divide
        return [
            count for count in range(1, dense + 1) if not divides or self.hidden_size % (count * self.queries) == 0
        ]

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
    dense_heads, dense_neurons = fields[spec.key_heads_field or spec.heads_field], fields[spec.width_field]
    queries = fields[spec.heads_field] // dense_heads
    hidden_size = config.hidden_size
    head_size = fields.get("head_dim") or hidden_size // fields[spec.heads_field]

    base: Any = model.base_model
    root = "" if base is model else f"{model.base_model_prefix}."
    names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    pruned = family != config.model_type
    kinds = _head_kind(spec, fields, head_size, queries), _neuron_kind(spec, fields)
    arrays: list[GroupArray] = []
    for layer, block in enumerate(base.get_submodule(spec.blocks)):
        prefix = f"{root}{spec.blocks}.{layer}."
        arrays.extend(_array(names, prefix, layer, kind, hidden_size, pruned) for kind in kinds)
        if arrays[-1].count and spec.activation is not None:
            _check_activation(block, spec.activation)
    return Partition(
        family,
        hidden_size,
        head_size,
        dense_heads,
        dense_neurons,
        tuple(arrays),
        head_weights=kinds[0].weights(hidden_size),
        neuron_weights=kinds[1].weights(hidden_size),
        queries=queries,
    )


def zero_groups(array: GroupArray, parameters: Mapping[str, Tensor]) -> Tensor:
    """
    Which groups of an array add exactly nothing to their block.

    Args:
        array ([`GroupArray`]): The groups.
        parameters (`Mapping[str, Tensor]`): `dict(model.named_parameters())`.

    Returns:
        `Tensor`: bool `[G]`. A group counts as zero when all that it owns is. One with an output projection of zeros
        and other weights adds nothing yet, and learns: blocks that are put between others begin so.
    """
    zero = None
    for owned in array.owned:
        parts = parameters[owned.name].detach().movedim(owned.dim, 0).unflatten(0, (-1, array.count, owned.width))
        found = (parts == 0).transpose(0, 1).flatten(1).all(dim=1)
        zero = found if zero is None else zero & found
    return torch.zeros(0, dtype=torch.bool, device="cpu") if zero is None else zero


def refusal(model_type: str) -> str:
    """Why models of a `model_type` that is no family of [`BLOCK_SPECS`] are refused, and which families are not."""
    reason = f"which is refused: {REFUSED[model_type]}" if model_type in REFUSED else "whose groups are not known"
    return f"of type {model_type!r}, {reason}. Supported families: {', '.join(BLOCK_SPECS)}."


def _supported(model: nn.Module) -> tuple[Any, BlockSpec, str]:
    """The model's config, its family's row of the table and the family's name, or a refusal."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None or not hasattr(model, "base_model") or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"`model` must be a Transformers model that is not wrapped, got {type(model).__name__}. "
            f"Supported families: {', '.join(BLOCK_SPECS)}."
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"`model` must not have adapters, got {type(model).__name__}: its own weights are frozen, or no longer "
            f"alone. Pass `model.merge_and_unload().requires_grad_()` (where `add_adapter` made them, "
            f"`PeftModel.from_pretrained(dense, folder)` can), or add adapters to the compressed model."
        )
    family = dense_model_type(model_type)
    spec = BLOCK_SPECS.get(family)
    if spec is None:
        raise ValueError(f"`model` is {refusal(model_type)}")
    for flag, reason in spec.refused:
        if getattr(config, flag, False):
            raise ValueError(f"`model` has `{flag}=True`, which is not supported: {reason}. Set it to False.")
    _check_weights(model)
    return config, spec, family


# What wrappers of a part of a model put into the names of its parameters.
_WRAPPED = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if wrapped := _WRAPPED.intersection(name.split(".")):
            raise ValueError(
                f"`model` must not be wrapped, a part of it is: {name!r} has {wrapped.pop()!r} in its name. Pass the "
                f"model as it was, and wrap or compile the whole of it afterwards."
            )
        # Quantized weights are tensors of classes that are not torch's own, or of integers. So are, not quantized, all
        # tensors of a device that torch knows from Python.
        added = parameter.device.type == torch._C._get_privateuse1_backend_name()
        if not parameter.is_floating_point() or not (added or type(parameter).__module__.startswith("torch.")):
            kind = f"{type(parameter).__module__}.{type(parameter).__qualname__} of {parameter.dtype}"
            raise ValueError(
                f"`model` must have plain weights, {name!r} is a {kind}. Load it in float32 or bfloat16, and quantize "
                f"the compressed model."
            )


@dataclass(frozen=True)
class _Kind:
    """The groups of one kind in any block: paths relative to it."""

    name: str
    width: int
    rows: tuple[Owned, ...]
    columns: str
    shared: tuple[str, ...] = ()

    def weights(self, hidden_size: int) -> tuple[int, int]:
        matrices, biases = self.width * hidden_size, 0
        for row in self.rows:
            entries = row.width * len(row.blocks)
            if row.name.endswith(".weight"):
                matrices += entries * hidden_size
            else:
                biases += entries
        return matrices, biases


def _head_kind(spec: BlockSpec, fields: Mapping[str, Any], head_size: int, queries: int) -> _Kind:
    paths = attention_rows(spec, fields)
    widths = {path: head_size * (queries if path == spec.query else 1) for path in paths}
    leaves = ("weight", "bias") if has_bias(spec.query_bias, fields) else ("weight",)
    return _Kind(
        "heads",
        head_size * queries,
        _rows(paths, widths, leaves),
        spec.attention_out,
        tuple(f"{path}.weight" for path in spec.head_norms),
    )


def _neuron_kind(spec: BlockSpec, fields: Mapping[str, Any]) -> _Kind:
    paths = [spec.neurons_in] if spec.gate is None else [spec.neurons_in, spec.gate]
    leaves = ("weight", "bias") if has_bias(spec.neuron_bias, fields) else ("weight",)
    return _Kind("neurons", 1, _rows(paths, dict.fromkeys(paths, 1), leaves), spec.neurons_out)


def _rows(paths: list[str], widths: Mapping[str, int], leaves: tuple[str, ...]) -> tuple[Owned, ...]:
    """Projections with the same path are one matrix, in which they lie one after another."""
    blocks = {path: tuple(range(paths.count(path))) for path in paths}
    return tuple(Owned(f"{path}.{leaf}", 0, widths[path], blocks[path]) for path in blocks for leaf in leaves)


def _array(
    names: Mapping[str, tuple[int, ...]], prefix: str, layer: int, kind: _Kind, hidden_size: int, pruned: bool
) -> GroupArray:
    columns = f"{prefix}{kind.columns}.weight"
    if columns not in names:  # a structure cut to nothing leaves only the bias of its output projection
        parts = [f"{prefix}{path.rpartition('.')[0]}." for path in (row.name for row in kind.rows)]
        rest = {name for name in names if name.startswith((*parts, f"{prefix}{kind.columns}."))}
        if not pruned or rest - {f"{prefix}{kind.columns}.bias"}:
            raise ValueError(f"`model` has no plain linear layer at {columns!r}. Pass a model that is not adapted.")
        return GroupArray(layer, kind.name, 0, kind.width, (), columns)
    total = names[columns][-1]
    if total % kind.width:
        raise ValueError(
            f"`model` has {total} columns in {columns!r}, which is no multiple of the head size {kind.width}."
        )
    count = total // kind.width
    rows = tuple(Owned(prefix + row.name, 0, row.width, row.blocks) for row in kind.rows)
    expected: dict[str, tuple[int, ...]] = {columns: (hidden_size, total)}
    for row in rows:
        length = len(row.blocks) * count * row.width
        expected[row.name] = (length, hidden_size) if row.name.endswith("weight") else (length,)
    for name, shape in expected.items():
        if names.get(name) != shape:
            raise ValueError(
                f"`model` has {name!r} of shape {names.get(name)} where {shape} is expected. Pass a model whose "
                f"projections are plain linear layers, not quantized or adapted."
            )
    shared = tuple(prefix + name for name in kind.shared)
    return GroupArray(layer, kind.name, count, kind.width, rows, columns, shared)


def _check_activation(block: nn.Module, path: str) -> None:
    activation: Any = block
    for name in path.split("."):  # a plain function is no submodule
        activation = getattr(activation, name)
    with torch.no_grad():
        at_zero = float(activation(torch.zeros(1, dtype=torch.float32, device="cpu")))
    if at_zero != 0:
        raise ValueError(
            f"`model` has the FFN activation {getattr(activation, '__name__', activation)}, act(0) = {at_zero:.3g}: "
            f"a zero neuron would still add to its block. Use one with act(0) = 0, such as GELU or ReLU."
        )
