"""Models whose weights are spread over ranks or devices: known as such, refused or gathered."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .empty_models import check_parameters, class_of, empty_model, set_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are spread over ranks, even if they are gathered just now, for a forward pass."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def check_whole(model: nn.Module) -> None:
    """Raise `ValueError` if a model's weights are spread over ranks."""
    if is_sharded(model):
        raise ValueError("`model` must be whole, got one that is spread over ranks. Pass what `gather` makes of it.")


def check_placed(model: nn.Module, name: str = "model") -> None:
    """
    Raise `ValueError` unless a model holds its weights, all on one device.

    Args:
        model (`nn.Module`): The model.
        name (`str`, *optional*, defaults to `"model"`): The argument that it was given as.
    """
    places = {parameter.device: path for path, parameter in model.named_parameters()}
    for device, path in places.items():
        if device.type == "meta":
            raise ValueError(
                f"`{name}` must hold its weights, {path!r} is on the meta device: it is not loaded, or offloaded. "
                f"Load the model whole, on one device."
            )
    if len(places) > 1:
        listed = " and ".join(f"{path!r} on {device}" for device, path in places.items())
        raise ValueError(
            f"`{name}` must be on one device, got {listed}. Load it without `device_map`, or with one device for all "
            f"of it."
        )


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass has gathered: an evaluation leaves what is in no block whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
    whole = empty_model(class_of(model), model, config)
    check_parameters(whole, dict(model.named_parameters(remove_duplicate=False)), {})
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() > 0:
        return None
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    for name, buffer in model.named_buffers():
        set_tensor(whole, name, buffer.to("cpu", copy=True))
    for name, parameter in model.named_parameters():
        whole.get_parameter(name).requires_grad_(parameter.requires_grad)
    return whole.train(model.training)
