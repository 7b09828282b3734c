"""Cut zero groups out of a model, and check the cut model against the one it came from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_oto import BLOCK_SPECS, PRUNED_PREFIX, BlockSpec, dense_model_type, layer_counts
from .groups import Partition, partition, refusal, zero_groups
from .modeling_oto import (
    KEPT_HEADS,
    BiasOnly,
    config_class,
    pruned_heads,
    replace_module,
    resize_heads,
    resize_neurons,
)
from .modes import evaluating
from .saved_names import CONVERSIONS
from .sharding import is_sharded
from .trial_inputs import random_inputs

# What became of a parameter in a cut: its smaller successor (None where nothing is left), the dim, and what was kept.
Cut = tuple[nn.Parameter | None, int, Tensor]


def compress(
    model: PreTrainedModel,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    atol: float = 1e-5,
    show_progress: bool = False,
) -> PreTrainedModel:
    """
    Cut the exactly-zero attention heads and FFN neurons out of a model.

    Args:
        model ([`PreTrainedModel`]):
            A dense or pruned model of a supported family, with any task head, not wrapped. It is left as it is. Where
            nothing is zero, the result has the same blocks and is of the pruned class all the same.
        example_inputs (`Mapping[str, Any]`, *optional*):
            Arguments of `forward` on which both models are compared. By default a small random batch with padding.
        atol (`float`, *optional*, defaults to 1e-5):
            How far an output may be off, as a share of that output's largest magnitude. Models in half precision are
            compared in float32: what they compute is the same function of the same weights.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether a bar tells that it cuts, and then that it compares: seconds for a large model on the CPU.

    Returns:
        [`PreTrainedModel`]: A new model of the pruned class for the same task, with the same dtype, device and mode.

    Raises:
        `ValueError`: The model is not supported, or the cut model does not compute what the model computes.
    """
    groups = partition(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError("`model` must hold its weights, got parameters on the meta device. Load them first.")
    if is_sharded(model):
        raise ValueError("`model` must be whole, got one that is spread over ranks. Pass what `gather` makes of it.")
    kept = [~zero_groups(array, parameters) for array in groups.arrays]
    with tqdm(total=2, desc="Cutting out what is zero", leave=False, disable=not show_progress) as bar:
        cut = keep_groups(model, groups, kept)
        if model.can_generate():
            cut.generation_config = copy.deepcopy(model.generation_config)
        cut.train(model.training)
        bar.update()
        bar.set_description("Checking the small model")
        _compare(model, cut, random_inputs(model) if example_inputs is None else example_inputs, atol)
        bar.update()
    return cut


def keep_groups(model: PreTrainedModel, groups: Partition, kept: Sequence[Tensor]) -> PreTrainedModel:
    """
    A new model of the pruned class with copies of some groups' weights and of all that no group owns. It computes what
    `model` does only where the others are zero: [`compress`] chooses so, and checks.

    Args:
        model ([`PreTrainedModel`]): Whole, with its weights, not wrapped.
        groups ([`~hf_oto.models.groups.Partition`]): Its groups.
        kept (`Sequence[Tensor]`): For every array of the groups, which to keep: bool `[G]`.
    """
    heads, neurons = ([int(keep.sum()) for keep in kept[offset::2]] for offset in (0, 1))
    cut = _empty_pruned(model, heads, neurons)
    buffers = dict(model.named_buffers(remove_duplicate=False)) | _kept_heads(model, groups, kept)
    _fill(cut, dict(model.named_parameters(remove_duplicate=False)), buffers, _indices(groups, kept))
    return cut


@torch.no_grad()
def gather(model: PreTrainedModel) -> PreTrainedModel | None:
    """
    Gather a model that FSDP2's `fully_shard` has spread over ranks, so that [`compress`] can cut it.

    Every rank has to call it. The weights are gathered one by one, and only the first rank keeps them, on the CPU: it
    needs room for one whole model, the others for one weight.

    Args:
        model ([`PreTrainedModel`]):
            A model whose weights are sharded. It is left as it is.

    Returns:
        [`PreTrainedModel`]: On the first rank a new, whole model of the class that it had before it was sharded, with
        the same dtype and mode. `None` on every other rank.

    Raises:
        `ValueError`: The model is not sharded, or has other parameters than its class.

    Example:

    ```python
    whole = gather(model)
    if whole is not None:  # on the first rank
        compress(whole).save_pretrained("small")
    ```
    """
    if not is_sharded(model):
        raise ValueError("`model` must be sharded, got one that is whole. Pass it to `compress` as it is.")
    config = copy.deepcopy(model.config)
    vars(config).pop("distributed_config", None)  # with which a save would wait for the other ranks
    whole = _empty_model(_class_of(model), model, config)
    _check_parameters(whole, dict(model.named_parameters(remove_duplicate=False)), {})
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() > 0:
        return None
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    for name, buffer in model.named_buffers():
        _set(whole, name, buffer.to("cpu", copy=True))
    for name, parameter in model.named_parameters():
        whole.get_parameter(name).requires_grad_(parameter.requires_grad)
    return whole.train(model.training)


class Shrinking(Protocol):
    """What [`shrink`] asks of an optimizer. [`HSPG`] has it."""

    partition: Partition

    @property
    def unshrinkable(self) -> str | None: ...

    def zero_masks(self) -> dict[tuple[int, str], Tensor]: ...

    def shrink(self, partition: Partition, kept: Sequence[Tensor], cuts: Mapping[Tensor, Cut]) -> None: ...


@torch.no_grad()
def shrink(model: PreTrainedModel, optimizer: Shrinking, *, like: PreTrainedConfig | None = None) -> None:
    """
    Cut the groups that are zero for good out of a model in training, in place, and out of its optimizer.

    Zero groups have zero gradients and stay zero, so training goes on as it would have, by smaller matrices: up to
    rounding, and but for the random numbers of dropout. The model object and its modules stay; it becomes of the
    pruned class, so that `save_pretrained` writes what `from_pretrained` loads. Parameters that are cut are new
    objects, in the optimizer as well, without a gradient: call it after a step and before the next `backward`, on
    every rank, and wrap the model in DistributedDataParallel anew.

    Args:
        model ([`PreTrainedModel`]):
            The model that `optimizer` trains, not wrapped.
        optimizer ([`HSPG`]):
            Knows which groups are zero, and whether cutting them out pays now: [`~HSPG.shrink_due`].
        like ([`PreTrainedConfig`], *optional*):
            To resume a run that had been shrunk: the config saved with its weights. As many groups are cut as it
            lacks, the last ones, whatever they hold; weights and optimizer state are to be loaded afterwards.

    Raises:
        `ValueError`: The optimizer cannot be shrunk or is of another model, a group to be cut is not zero, or `like`
            has more groups than the model. Nothing is cut.

    Example:

    ```python
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if optimizer.shrink_due:
        shrink(model, optimizer)
    ```
    """
    if optimizer.unshrinkable is not None:
        raise ValueError(f"`optimizer` cannot be shrunk: {optimizer.unshrinkable}.")
    groups = partition(model)
    if optimizer.partition != groups:
        raise ValueError("`optimizer` is of a model with other groups than `model`. Pass the two that train together.")
    kept = _not_zero(model, groups, optimizer.zero_masks()) if like is None else _as_many(groups, like)
    if all(bool(keep.all()) for keep in kept):
        return
    heads, neurons = ([int(keep.sum()) for keep in kept[offset::2]] for offset in (0, 1))
    config = pruned_config(model.config, heads, neurons)
    pruned_class = _pruned_class(model, config)
    cuts = _cut_in_place(model, config, groups, kept)
    model.__class__ = pruned_class
    vars(model).pop(CONVERSIONS, None)  # of the dense class
    for module in model.modules():
        if "config" in vars(module):
            vars(module)["config"] = config
    optimizer.shrink(partition(model), kept, cuts)


def _not_zero(model: PreTrainedModel, groups: Partition, zero: Mapping[tuple[int, str], Tensor]) -> list[Tensor]:
    """Array by array the groups that an optimizer has not set to zero."""
    parameters = dict(model.named_parameters())
    kept = []
    for array in groups.arrays:
        gone = zero.get((array.layer, array.kind), torch.zeros(array.count, dtype=torch.bool))
        if not bool(zero_groups(array, parameters).cpu()[gone].all()):
            raise ValueError(
                f"`model` has {array.kind} in layer {array.layer} that are not zero, as `optimizer` left them. Shrink "
                f"after a step, before the weights are changed."
            )
        kept.append(~gone)
    return kept


def _as_many(groups: Partition, config: PreTrainedConfig) -> list[Tensor]:
    """Array by array the first groups, as many as a config has."""
    if dense_model_type(config.model_type) != groups.model_type:
        raise ValueError(f"`like` is of type {config.model_type!r}, `model` of {groups.model_type!r}.")
    counts = [count for block in block_counts(config) for count in block]
    if len(counts) != len(groups.arrays) or any(
        count > array.count for count, array in zip(counts, groups.arrays, strict=True)
    ):
        raise ValueError(
            f"`like` has {counts} heads and neurons, block by block, where `model` has "
            f"{[array.count for array in groups.arrays]}: nothing that is gone can be put back. Make the model anew."
        )
    return [torch.arange(array.count) < count for count, array in zip(counts, groups.arrays, strict=True)]


def block_counts(config: Any) -> list[tuple[int, int]]:
    """Heads and neurons of every block that the config of a dense or a pruned model gives."""
    if config.model_type.startswith(PRUNED_PREFIX):
        return layer_counts(config)
    spec = BLOCK_SPECS[dense_model_type(config.model_type)]
    heads = getattr(config, spec.key_heads_field or spec.heads_field)
    return [(heads, getattr(config, spec.width_field))] * config.num_hidden_layers


def _cut_in_place(
    model: PreTrainedModel, config: PreTrainedConfig, groups: Partition, kept: Sequence[Tensor]
) -> dict[Tensor, Cut]:
    """Put smaller parameters into a model's own modules. Gives what became of those that were there."""
    spec = BLOCK_SPECS[groups.model_type]
    parameters = dict(model.named_parameters())
    blocks = model.base_model.get_submodule(spec.blocks)
    kept_heads = _kept_heads(model, groups, kept)
    for array, keep in zip(groups.arrays, kept, strict=True):
        if bool(keep.all()):
            continue
        block = blocks.get_submodule(str(array.layer))
        modules = dict(block.named_modules())
        with torch.device("meta"):  # no memory, no random numbers
            (resize_heads if array.kind == "heads" else resize_neurons)(block, spec, config, int(keep.sum()))
        for path, made in list(block.named_modules()):
            old: Any = modules[path]
            if made is old:
                continue
            made.training = old.training
            if isinstance(made, nn.Linear):  # the module stays, for whoever holds it
                old.out_features, old.in_features = made.out_features, made.in_features
                replace_module(block, path, old)
            elif isinstance(made, BiasOnly):
                made.bias = old.bias
    for name, heads in kept_heads.items():
        path, _, leaf = name.rpartition(".")
        if hasattr(model.get_submodule(path), leaf):
            _set(model, name, heads.to(model.device))
    cuts: dict[Tensor, Cut] = {}
    for name, (dim, entries) in _indices(groups, kept).items():
        source = parameters[name]
        if len(entries) == source.shape[dim]:
            continue
        entries = entries.to(source.device)
        cut = None
        if len(entries):
            cut = nn.Parameter(source.detach().index_select(dim, entries), requires_grad=source.requires_grad)
            _set(model, name, cut)
        cuts[source] = cut, dim, entries
    return cuts


def check_compressible(model: PreTrainedModel) -> None:
    """
    Refuse, before any training, a model that [`compress`] would refuse after it.

    Raises:
        `ValueError`: The family or the class is not supported, or the model has other parameters than its class.
    """
    groups = partition(model)
    kept = [torch.ones(array.count, dtype=torch.bool) for array in groups.arrays]
    cut = _empty_pruned(model, groups.counts("heads"), groups.counts("neurons"))
    _check_parameters(cut, dict(model.named_parameters(remove_duplicate=False)), _indices(groups, kept))


def pruned_config(config: PreTrainedConfig, heads: Sequence[int], neurons: Sequence[int]) -> PreTrainedConfig:
    """
    The config of a model pruned to these counts.

    Args:
        config ([`PreTrainedConfig`]): The config of the dense model, or of one that is pruned already.
        heads, neurons (`Sequence[int]`): What each block keeps.

    Returns:
        [`PreTrainedConfig`]: A config of the family's pruned class. All else in it (labels, problem type, dtype,
        attention implementation, ...) is as in `config`.

    Raises:
        `ValueError`: The family is not supported, or a count is not possible.
    """
    family = dense_model_type(config.model_type)
    if family not in BLOCK_SPECS:
        raise ValueError(f"`config` is {refusal(config.model_type)}")
    if len(heads) != len(neurons):
        raise ValueError(f"`heads` and `neurons` must have one count per block, got {len(heads)} and {len(neurons)}.")
    spec = BLOCK_SPECS[family]
    settings = config.to_dict()
    for name in ("model_type", "architectures", "auto_map"):  # those of the old class
        settings.pop(name, None)
    settings["head_dim"] = settings.get("head_dim") or config.hidden_size // settings[spec.heads_field]
    settings["per_layer_config"] = {
        layer: block_fields(spec, settings, count, width)
        for layer, (count, width) in enumerate(zip(heads, neurons, strict=True))
    }
    return config_class(family)(**settings, attn_implementation=config._attn_implementation)


def block_fields(spec: BlockSpec, fields: Mapping[str, Any], heads: int, neurons: int) -> dict[str, int]:
    """A block's entry in `per_layer_config`; `fields` are the dense config's."""
    entry = {spec.heads_field: heads, spec.width_field: neurons}
    if spec.key_heads_field:
        queries = fields[spec.heads_field] // fields[spec.key_heads_field]
        entry |= {spec.heads_field: heads * queries, spec.key_heads_field: heads}
    return entry


def _empty_model(cls: Any, model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a class with the parts that `model` has, on the meta device: no memory, no random numbers."""
    # A base model that is a part of another model may have no pooler.
    options = {"add_pooling_layer": False} if getattr(model, "pooler", model) is None else {}
    with torch.device("meta"):
        return cls(config, **options)


def _empty_pruned(model: PreTrainedModel, heads: Sequence[int], neurons: Sequence[int]) -> PreTrainedModel:
    """A pruned model with the task of `model`, as [`_empty_model`] makes it."""
    config = pruned_config(model.config, heads, neurons)
    return _empty_model(_pruned_class(model, config), model, config)


def _class_of(model: PreTrainedModel) -> Any:
    """The class of a model, without what `fully_shard` derives from it."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def _pruned_class(model: PreTrainedModel, config: PreTrainedConfig) -> Any:
    """The pruned class with the task of `model`."""
    classes = {cls.__name__: cls for _, cls in pruned_heads(config.model_type)}
    name = _class_of(model).__name__
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


def _indices(groups: Partition, kept: Sequence[Tensor]) -> dict[str, tuple[int, Tensor]]:
    """What stays of every parameter that the groups own a part of: name -> (dim, indices)."""
    found: dict[str, tuple[int, Tensor]] = {}
    for array, keep in zip(groups.arrays, kept, strict=True):
        groups_g = keep.nonzero().flatten()
        for owned in array.owned:
            found[owned.name] = owned.dim, owned.positions(array.count, groups_g)
        if not len(groups_g):
            found |= dict.fromkeys(array.shared, (0, groups_g))
    return found


def _kept_heads(model: PreTrainedModel, groups: Partition, kept: Sequence[Tensor]) -> dict[str, Tensor]:
    """Which of the dense heads are left, where attention needs to know: the buffer's name -> int64."""
    spec = BLOCK_SPECS[groups.model_type]
    if not spec.position_bias:
        return {}
    blocks, names = (
        model.base_model.get_submodule(spec.blocks),
        {module: name for name, module in model.named_modules()},
    )
    found = {}
    for array, keep in zip(groups.arrays[::2], kept[::2], strict=True):
        attention = blocks.get_submodule(f"{array.layer}.{spec.attention}")
        now = getattr(attention, KEPT_HEADS, torch.arange(array.count, device=model.device))
        found[f"{names[attention]}.{KEPT_HEADS}"] = now[keep.to(now.device)]
    return found


def _fill(
    cut: PreTrainedModel,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    indices: Mapping[str, tuple[int, Tensor]],
) -> None:
    """Put copies of a model's tensors, without what is cut, into the place of the cut model's empty ones."""
    _check_parameters(cut, parameters, indices)
    copies: dict[Tensor, nn.Parameter] = {}  # what is tied stays tied
    for name, _ in list(cut.named_parameters(remove_duplicate=False)):
        source = parameters[name]
        if source not in copies:
            if name in indices:
                dim, kept = indices[name]
                tensor = source.detach().index_select(dim, kept.to(source.device))
            else:
                tensor = source.detach().clone(memory_format=torch.contiguous_format)
            copies[source] = nn.Parameter(tensor, requires_grad=source.requires_grad)
        _set(cut, name, copies[source])
    for name, _ in list(cut.named_buffers(remove_duplicate=False)):
        _set(cut, name, buffers[name].clone())


def _check_parameters(
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


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, tensor)


def _compare(model: PreTrainedModel, cut: PreTrainedModel, inputs: Mapping[str, Any], atol: float) -> None:
    """Raise `ValueError` unless both models give the same floating-point outputs."""
    inputs = {**inputs, "return_dict": True}
    # The user may have allowed TF32 or less for products in float32. float64 has no such mode and gives the verdict.
    precisions = (torch.float32,) if model.device.type == "mps" else (torch.float32, torch.float64)
    for precision in precisions:
        expected, actual = _outputs(model, inputs, precision), _outputs(cut, inputs, precision)
        if not expected or set(expected) != set(actual):
            raise ValueError(f"The model has the outputs {sorted(expected)}, the cut model {sorted(actual)}.")
        scales = {name: float(output.abs().max()) for name, output in expected.items()}
        errors = {name: float((actual[name] - output).abs().max()) for name, output in expected.items()}
        wrong = [name for name, error in errors.items() if not error <= atol * scales[name]]  # NaN is wrong too
        if not wrong:
            return
    listed = ", ".join(f"`{name}` by {errors[name]:.3g} of {scales[name]:.3g}" for name in wrong)
    raise ValueError(
        f"The cut model does not compute what `model` computes: it is off in {listed}, and `atol` allows {atol:g} of "
        f"the largest magnitude. No model is returned, `model` is as it was."
    )


@torch.no_grad()
def _outputs(model: PreTrainedModel, inputs: Mapping[str, Any], precision: torch.dtype) -> dict[str, Tensor]:
    """
    Floating-point outputs in evaluation mode, computed in `precision` even where the weights are not. Hidden states
    and attention weights are tuples and left out: a cut model has fewer attention weights by design.
    """

    def raised(value: Any, least: torch.dtype = precision) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = torch.promote_types(value.dtype, least) if value.is_floating_point() else value.dtype
        return value.to(model.device, dtype)

    tensors = {name: raised(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    inputs = {name: raised(value, torch.promote_types(precision, model.dtype)) for name, value in inputs.items()}
    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        outputs = functional_call(model, tensors, (), inputs)
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
