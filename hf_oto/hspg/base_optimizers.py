"""What HSPG asks of the optimizer that it wraps: named parameters, all that groups own, and states it can clear."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..models.groups import GroupArray
from .sharding import is_sharded, local, sum_over_shards


def named_parameters(param_groups: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Every parameter that has a name, as it is now, with its group: accelerate swaps parameters under FSDP2."""
    for group in param_groups:
        if "param_names" in group:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                yield name, parameter, group


def check_kind(base: Any, own: type) -> None:
    """
    Refuse a `base_optimizer` whose `step` is not one step of a run.

    Args:
        base: What was given.
        own (`type`): The class that wraps it.

    Raises:
        `TypeError`: It is no optimizer, one that prunes already, accelerate's wrapper, or needs a closure.
    """
    name = type(base).__name__
    if not isinstance(base, Optimizer):
        raise TypeError(f"`base_optimizer` must be a torch.optim.Optimizer, such as AdamW, got {name}.")
    if isinstance(base, own):
        raise TypeError(
            "`base_optimizer` is an HSPG already, which prunes one model. Give each model an optimizer of its own, "
            "and an HSPG around that."
        )
    if any(cls.__module__.startswith("accelerate.") for cls in type(base).__mro__):
        raise TypeError(
            f"`base_optimizer` must be the optimizer itself, got accelerate's {name}, which takes no step while "
            f"gradients accumulate or a scaler skips them. Wrap the optimizer first, and hand what comes of it to "
            f"`accelerator.prepare`."
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"`base_optimizer` {name} computes the loss anew within a step, by a `closure` that it needs: there is "
            f"not one gradient of a step to go by. Use another, such as AdamW."
        )


def check_names(base: Optimizer, arrays: Sequence[GroupArray]) -> None:
    """Refuse, with a `ValueError`, an optimizer in which what groups own is not found by its name, once."""
    named = list(named_parameters(base.param_groups))
    if not named:
        raise ValueError(
            "`base_optimizer` must be built from named parameters, such as AdamW(model.named_parameters()): HSPG "
            "finds the groups' weights by name."
        )
    owned = [name for array in arrays for name, _ in array.members]
    times = Counter(name for name, _, _ in named)
    if twice := [name for name in owned if times[name] > 1]:
        raise ValueError(
            f"`base_optimizer` has {len(twice)} names of zero-invariant groups' parameters more than once "
            f"({twice[0]!r}, …). Give the parameters that are not the model's names of their own."
        )
    trained = {name for name, parameter, _ in named if parameter.requires_grad}
    missing = [name for name in owned if name not in trained]
    if missing and (longer := [name for name in trained if name.endswith(f".{missing[0]}")]):
        raise ValueError(
            f"`base_optimizer` has {longer[0]!r}, where the groups have {missing[0]!r}: names must be those of the "
            f"model that `partition` was given. Build it from that one's `named_parameters()`, and give what is "
            f"around it names of its own."
        )
    if missing:
        raise ValueError(
            f"`base_optimizer` lacks {len(missing)} parameters of zero-invariant groups ({missing[0]!r}, …): they "
            f"are frozen or left out. Train them, or leave their kind out of `structures`."
        )


def add_group(base: Optimizer, group: dict[str, Any], arrays: Sequence[GroupArray]) -> None:
    """Add a parameter group to an optimizer, unless what groups own would not be found by its name, once, any more."""
    base.add_param_group(group)
    try:
        check_names(base, arrays)
    except ValueError:
        base.param_groups.pop()
        raise


def check_trained(owned: Mapping[str, Tensor], step: int) -> None:
    """Refuse, with a `ValueError`, to prune what was frozen since: by its gradients it would be worth nothing."""
    if frozen := [name for name, parameter in owned.items() if not parameter.requires_grad]:
        raise ValueError(
            f"{len(frozen)} parameters of zero-invariant groups are frozen at step {step} ({frozen[0]!r}, …): without "
            f"gradients they would go first. Train them at least until the target is reached, or leave their kind out "
            f"of `structures`."
        )


def check_state(base: Optimizer, owned: Mapping[str, Tensor]) -> None:
    """
    Refuse, at the first step and not in the middle of the run, a state of which no part can be set to zero.

    Raises:
        `TypeError`: What is kept for a weight takes no zeros. Names the optimizer, the parameter and the kind.
    """
    for name, parameter in owned.items():
        for value in base.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and not _can_clear(value):
                raise TypeError(
                    f"`base_optimizer` {type(base).__name__} keeps a {type(value).__name__} for {name!r}, of which no "
                    f"part can be set to zero in place, as HSPG does with what is kept for zero groups. Use another "
                    f"optimizer, such as AdamW."
                )


def _can_clear(tensor: Tensor) -> bool:
    """Whether a part of a tensor can be set to zero in place: not of every kind that packs its entries into blocks."""
    if type(tensor) in (Tensor, torch.nn.Parameter) or is_sharded(tensor) or not tensor.dim():
        return True
    try:
        return tensor.index_fill_(0, torch.empty(0, dtype=torch.int64, device=tensor.device), 0) is tensor
    except (NotImplementedError, RuntimeError, TypeError):
        return False


def makes_state(optimizer: Optimizer, owned: Mapping[str, Tensor]) -> bool:
    """
    Whether a step is none of the run: `torch.distributed.checkpoint` takes one with zero step sizes and gradients, so
    that the base optimizer makes the state which is then saved or filled. No weight may move in it. Made with zero
    step sizes, an optimizer takes such steps on purpose.
    """
    groups = optimizer.param_groups
    if optimizer.state or not optimizer.defaults.get("lr") or any(group.get("lr") != 0 for group in groups):
        return False
    gradients = [local(each.grad) for group in groups for each in group["params"] if each.grad is not None]
    if not gradients:
        return False
    # Some ranks' shards have no rows, and what no group owns a part of may be on another device.
    held = [gradient for gradient in gradients if gradient.numel()] or [gradients[0].new_zeros(1)]
    device = local(next(iter(owned.values()))).device
    places = dict.fromkeys(gradient.device for gradient in held)
    norms = [
        norm.float().to(device)
        for place in places
        for norm in torch._foreach_norm([one for one in held if one.device == place], ord=torch.inf)
    ]
    found = torch.stack(norms).ne(0).sum()
    sum_over_shards(found, owned.values())
    return not bool(found)
