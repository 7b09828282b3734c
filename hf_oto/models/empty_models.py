"""Models without weights, of the classes that a cut gives: what they need, and which sizes it must have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_oto import BLOCK_SPECS, FAMILIES, PRUNED_PREFIX, BlockSpec, dense_model_type
from .groups import BlockCounts, partition, refusal
from .modeling_oto import config_class, pruned_heads


def pruned_config(config: PreTrainedConfig, counts: BlockCounts) -> PreTrainedConfig:
    """
    The config of a model pruned to these counts.

    Args:
        config ([`PreTrainedConfig`]): The config of the dense model, or of one that is pruned already.
        counts ([`~hf_oto.models.groups.BlockCounts`]): What each block keeps.

    Returns:
        [`PreTrainedConfig`]: A config of the family's pruned class. All else in it (labels, problem type, dtype,
        attention implementation, ...) is as in `config`.

    Raises:
        `ValueError`: The family is not supported, or a count is not possible.
    """
    spec, settings = _settings(config)
    settings["head_dim"] = settings.get("head_dim") or config.hidden_size // settings[spec.heads_field]
    settings["per_layer_config"] = {
        layer: block_fields(spec, settings, *block) for layer, block in enumerate(counts.blocks)
    }
    cls = config_class(config.model_type)
    return cls(**settings, attn_implementation=config._attn_implementation)


def plain_config(config: PreTrainedConfig, counts: BlockCounts) -> PreTrainedConfig:
    """
    The config of the family's own class for a model whose blocks have all become of one size.

    Args:
        config ([`PreTrainedConfig`]): As for [`pruned_config`].
        counts ([`~hf_oto.models.groups.BlockCounts`]): As for [`pruned_config`].

    Raises:
        `ValueError`: The family is not supported, or its own config cannot say what is kept; the message names what.
    """
    spec, settings = _settings(config)
    for kind, numbers in counts._asdict().items():
        if len(set(numbers)) > 1:
            raise ValueError(
                f"`plain`=True needs as many {kind} in every block, got {list(numbers)}. Train with "
                f"`OTOConfig(uniform=True)`, or leave it out."
            )
    heads, neurons = counts.blocks[0]
    dense_heads = settings[spec.key_heads_field or spec.heads_field]
    if heads != dense_heads and not spec.own_head_size:
        raise ValueError(
            f"`plain`=True needs all {dense_heads} heads in models of type {dense_model_type(config.model_type)!r}, "
            f"whose own config has no head size but hidden size / heads: got {heads}. Train with "
            f"`OTOConfig(uniform=True, structures=('neurons',))`, or leave it out."
        )
    if not heads or not neurons:
        raise ValueError(
            f"`plain`=True needs heads and neurons in every block, got {heads} and {neurons}. Leave it out."
        )
    if spec.own_head_size:
        settings["head_dim"] = settings.get("head_dim") or config.hidden_size // settings[spec.heads_field]
    elif config.model_type.startswith(PRUNED_PREFIX):
        settings.pop("head_dim", None)  # a field of the pruned class
    settings.pop("per_layer_config", None)
    cls: Any = getattr(transformers, f"{FAMILIES[dense_model_type(config.model_type)][0]}Config")
    settings |= block_fields(spec, settings, heads, neurons)
    try:
        return cls(**settings, attn_implementation=config._attn_implementation)
    except Exception as error:  # upstream has a kind of its own for what its checks refuse
        raise ValueError(
            f"`plain`=True is not possible with {heads} heads and {neurons} neurons in every block, which "
            f"{cls.__name__} refuses: {error}"
        ) from error


def _settings(config: PreTrainedConfig) -> tuple[BlockSpec, dict[str, Any]]:
    """A family's row of the table, and what a config of another of its classes takes over."""
    family = dense_model_type(config.model_type)
    if family not in BLOCK_SPECS:
        raise ValueError(f"`config` is {refusal(config.model_type)}")
    settings = config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "refused_as_dense"):  # those of the old class
        settings.pop(name, None)
    return BLOCK_SPECS[family], settings


def block_fields(spec: BlockSpec, fields: Mapping[str, Any], heads: int, neurons: int) -> dict[str, int]:
    """A block's entry in `per_layer_config`; `fields` are the dense config's."""
    entry = {spec.heads_field: heads, spec.width_field: neurons}
    if spec.key_heads_field:
        queries = fields[spec.heads_field] // fields[spec.key_heads_field]
        entry |= {spec.heads_field: heads * queries, spec.key_heads_field: heads}
    return entry


def empty_model(cls: Any, model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a class with the parts that `model` has, on the meta device: no memory, no random numbers."""
    # A base model that is a part of another model may have no pooler.
    options = {"add_pooling_layer": False} if getattr(model, "pooler", model) is None else {}
    with torch.device("meta"):
        return cls(config, **options)


def empty_cut(model: PreTrainedModel, counts: BlockCounts, plain: bool = False) -> PreTrainedModel:
    """As [`empty_model`], a pruned model with the task of `model`; if asked for, one of the family's own class."""
    pruned = pruned_class(model)
    if plain:
        return empty_model(pruned.__bases__[1], model, plain_config(model.config, counts))
    return empty_model(pruned, model, pruned_config(model.config, counts))


def class_of(model: PreTrainedModel) -> Any:
    """The class of a model, without what `fully_shard` derives from it."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def pruned_class(model: PreTrainedModel) -> Any:
    """The pruned class with the task of `model`."""
    classes = {cls.__name__: cls for _, cls in pruned_heads(model.config.model_type)}
    name = class_of(model).__name__
    cls = classes.get(name) or classes.get(f"OTO{name}")
    if cls is None:
        raise ValueError(
            f"`model` is a {name}, which is no class of Transformers' own with a pruned counterpart. Those of its "
            f"family are {', '.join(name.removeprefix('OTO') for name in classes)}."
        )
    return cls


def auto_class_of(model: PreTrainedModel) -> str:
    """The name of the Auto class that loads a model of a supported family once it is pruned."""
    name = type(model).__name__
    heads = pruned_heads(partition(model).model_type)
    return next(auto for auto, cls in heads if cls.__name__ in (name, f"OTO{name}"))


def check_parameters(
    cut: PreTrainedModel, parameters: Mapping[str, Tensor], indices: Mapping[str, tuple[int, Tensor]]
) -> None:
    """Raise `ValueError` unless a model's parameters, after the cut, are those of the cut model."""
    shapes = {name: tuple(parameter.shape) for name, parameter in cut.named_parameters(remove_duplicate=False)}
    emptied = {name for name, (_, kept) in indices.items() if not len(kept)}
    lost = sorted(set(parameters) - set(shapes) - emptied)
    if lost or not set(shapes) <= set(parameters):
        raise ValueError(
            f"`model` is not built as its class is: {type(cut).__name__} has no place for {lost} and needs "
            f"{sorted(set(shapes) - set(parameters))}. Remove what was added to it."
        )
    for name, shape in shapes.items():
        found = list(parameters[name].shape)
        if name in indices:
            dim, kept = indices[name]
            found[dim] = len(kept)
        if tuple(found) != shape:
            raise ValueError(
                f"`model` has {name!r} of another shape than its config says: {tuple(found)} instead of {shape} after "
                f"the cut."
            )


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, tensor)
