"""Cut zero groups out of a model: into a new one, or in place while it trains."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from .comparing import compare
from .configuration_oto import BLOCK_SPECS, dense_model_type
from .empty_models import check_parameters, empty_cut, pruned_class, pruned_config, set_tensor
from .example_inputs import random_inputs
from .groups import BlockCounts, Partition, config_counts, partition, zero_groups
from .modeling_oto import KEPT_HEADS, BiasOnly, replace_module, resize_heads, resize_neurons
from .saved_names import CONVERSIONS
from .sharding import check_placed, check_whole, is_sharded

ATOL = 1e-5

# What became of a parameter in a cut: its smaller successor (None where nothing is left), the dim, and what was kept.
Cut = tuple[nn.Parameter | None, int, Tensor]


def compress(
    model: PreTrainedModel,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    atol: float = ATOL,
    plain: bool = False,
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
        plain (`bool`, *optional*, defaults to `False`):
            Whether the result is of the family's own class, which loads everywhere and needs no code of its own. Every
            block must have kept as many neurons, and as many heads: all of them, or in families whose config has a
            head size (Llama, Qwen3) any number.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether a bar tells that it cuts, and then that it compares: seconds for a large model on the CPU.

    Returns:
        [`PreTrainedModel`]: A new model of the pruned class for the same task, with the same dtype, device and mode.

    Raises:
        `ValueError`: The model is not supported, or the cut model does not compute what the model computes.
    """
    groups, kept = _zeros_of(model)
    return _cut(model, groups, kept, example_inputs, atol=atol, plain=plain, show_progress=show_progress)


def compress_evenly(model: PreTrainedModel, *, show_progress: bool = False) -> PreTrainedModel:
    """
    As [`compress`] with `plain=True`, of a model on its way there: of every block goes what all can spare.

    Args:
        model ([`PreTrainedModel`]), show_progress (`bool`, *optional*): As in [`compress`].
    """
    groups, kept = _zeros_of(model)
    return _cut(model, groups, evenly(groups, kept), plain=True, show_progress=show_progress)


def evenly(groups: Partition, kept: Sequence[Tensor]) -> list[Tensor]:
    """
    With zero groups beside them, so that all blocks keep as many, and as many as the family's own config can say.

    Args:
        groups ([`~hf_oto.models.groups.Partition`]): Of the model.
        kept (`Sequence[Tensor]`): For every array of the groups, which are not zero: bool `[G]`, as in the result.
    """
    least = {"heads": 0, "neurons": 0}
    for array, keep in zip(groups.arrays, kept, strict=True):
        least[array.kind] = max(least[array.kind], int(keep.sum()))
    number = {kind: min(count for count in groups.plain_counts(kind) if count >= least[kind]) for kind in least}
    filled = [keep.clone() for keep in kept]
    for array, keep in zip(groups.arrays, filled, strict=True):
        keep[(~keep).nonzero().flatten()[: number[array.kind] - int(keep.sum())]] = True
    return filled


def _zeros_of(model: PreTrainedModel) -> tuple[Partition, list[Tensor]]:
    """The groups of a model that can be cut, and which of them are not zero."""
    groups = partition(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    check_whole(model)
    check_placed(model)
    return groups, [~zero_groups(array, parameters) for array in groups.arrays]


def _cut(
    model: PreTrainedModel,
    groups: Partition,
    kept: Sequence[Tensor],
    example_inputs: Mapping[str, Any] | None = None,
    *,
    plain: bool,
    atol: float = ATOL,
    show_progress: bool,
) -> PreTrainedModel:
    """A small model that was compared with the large one. Its weights can be trained, wherever this is called."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        tqdm(total=2, desc="Cutting out what is zero", leave=False, disable=not show_progress) as bar,
    ):
        cut = keep_groups(model, groups, kept, plain=plain)
        if model.can_generate():
            cut.generation_config = copy.deepcopy(model.generation_config)
        cut.train(model.training)
        bar.update()
        bar.set_description("Checking the small model")
        compare(model, cut, random_inputs(model) if example_inputs is None else example_inputs, atol)
        bar.update()
    return cut


def _counts(kept: Sequence[Tensor]) -> BlockCounts:
    return BlockCounts.of_arrays([int(keep.sum()) for keep in kept])


def keep_groups(
    model: PreTrainedModel, groups: Partition, kept: Sequence[Tensor], *, plain: bool = False
) -> PreTrainedModel:
    """
    A new model of the pruned class with copies of some groups' weights and of all that no group owns. It computes what
    `model` does only where the others are zero: [`compress`] chooses so, and checks.

    Args:
        model ([`PreTrainedModel`]): Whole, with its weights, not wrapped.
        groups ([`~hf_oto.models.groups.Partition`]): Its groups.
        kept (`Sequence[Tensor]`): For every array of the groups, which to keep: bool `[G]`.
        plain (`bool`, *optional*, defaults to `False`): As in [`compress`].
    """
    cut = empty_cut(model, _counts(kept), plain)
    buffers = dict(model.named_buffers(remove_duplicate=False)) | _kept_heads(model, groups, kept)
    _fill(cut, dict(model.named_parameters(remove_duplicate=False)), buffers, _indices(groups, kept))
    return cut


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
    config = pruned_config(model.config, _counts(kept))
    cls = pruned_class(model)
    cuts = _cut_in_place(model, config, groups, kept)
    model.__class__ = cls
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
        gone = zero.get((array.layer, array.kind), torch.zeros(array.count, dtype=torch.bool, device="cpu"))
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
    counts = config_counts(config).arrays
    if len(counts) != len(groups.arrays) or any(
        count > array.count for count, array in zip(counts, groups.arrays, strict=True)
    ):
        raise ValueError(
            f"`like` has {list(counts)} heads and neurons, block by block, where `model` has "
            f"{list(groups.block_counts.arrays)}: nothing that is gone can be put back. Make the model anew."
        )
    return [
        torch.arange(array.count, device="cpu") < count for count, array in zip(counts, groups.arrays, strict=True)
    ]


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
            set_tensor(model, name, heads.to(model.device))
    cuts: dict[Tensor, Cut] = {}
    for name, (dim, entries) in _indices(groups, kept).items():
        source = parameters[name]
        if len(entries) == source.shape[dim]:
            continue
        entries = entries.to(source.device)
        cut = None
        if len(entries):
            cut = nn.Parameter(source.detach().index_select(dim, entries), requires_grad=source.requires_grad)
            set_tensor(model, name, cut)
        cuts[source] = cut, dim, entries
    return cuts


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
    for array, keep in zip(groups.arrays, kept, strict=True):
        if array.kind != "heads":
            continue
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
    check_parameters(cut, parameters, indices)
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
        set_tensor(cut, name, copies[source])
    for name, _ in list(cut.named_buffers(remove_duplicate=False)):
        set_tensor(cut, name, buffers[name].clone())


def check_compressible(model: PreTrainedModel) -> None:
    """
    Refuse, before any training, a model that [`compress`] would refuse after it: it is cut with everything kept, its
    modules are compared, and what both compute. No weight is copied, it takes about as long as two forward passes of a
    small batch. Where weights are on the meta device or spread over ranks, nothing is computed.

    Raises:
        `ValueError`: The family or the class is not supported, the model has other parameters or other modules than
            its class, or it computes something else.
    """
    groups = partition(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = [torch.ones(array.count, dtype=torch.bool, device="cpu") for array in groups.arrays]
    cut = empty_cut(model, groups.block_counts)
    check_parameters(cut, parameters, _indices(groups, kept))
    _check_modules(model, cut)
    if any(parameter.is_meta for parameter in parameters.values()) or is_sharded(model):
        return
    check_placed(model)
    buffers = dict(model.named_buffers(remove_duplicate=False)) | _kept_heads(model, groups, kept)
    for name, _ in list(cut.named_parameters(remove_duplicate=False)):
        set_tensor(cut, name, parameters[name])
    for name, _ in list(cut.named_buffers(remove_duplicate=False)):
        set_tensor(cut, name, buffers[name])
    compare(model, cut, random_inputs(model), ATOL)


def _check_modules(model: PreTrainedModel, cut: PreTrainedModel) -> None:
    """
    Raise `ValueError` where a module has a `forward` of its own, which the cut model will not have, even if both
    compute the same as yet: adapters and fake quantization begin so.
    """
    modules = dict(model.named_modules())
    for path, made in cut.named_modules():
        found = type(modules.get(path, made))
        if (
            path
            and found.forward is not type(made).forward
            and not found.__module__.startswith("transformers_modules.")
        ):
            raise ValueError(
                f"`model` has a {found.__module__}.{found.__qualname__} at {path!r}, where its class has a "
                f"{type(made).__name__}: the compressed model would not have it. Put it in after `compress`."
            )
