"""Zero groups cut out while training goes on: whether they can be, when it pays, and what becomes of the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..config import OTOConfig
from ..models.groups import Partition
from . import budget
from .sharding import is_sharded

Cuts = Mapping[Tensor, tuple[Tensor | None, int, Tensor]]
"""Of every parameter that was cut: its successor, the dim along which it was cut, and the indices kept."""

# These move every weight by its own gradient and state alone, so they do the same where the zeros are gone. Others,
# such as Adafactor, average over rows and columns. A subclass may do anything.
_ELEMENTWISE = (
    *(torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.SGD),
    *(torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.ASGD, torch.optim.RMSprop, torch.optim.Rprop),
)

# Copying what is left costs about a step; under torch.compile every new shape is compiled, and torch gives up after 8.
_SHRINK_SHARE = 0.1


def moves_each_by_itself(base: Optimizer) -> bool:
    """Whether an optimizer moves every weight by its own gradient and state alone."""
    return type(base) in _ELEMENTWISE


def unshrinkable(base: Optimizer, config: OTOConfig) -> str | None:
    """Why zero groups cannot be cut out while training goes on, `None` if they can."""
    if not moves_each_by_itself(base):
        return f"a step of {type(base).__name__} may depend on how many weights a matrix has, zeros included"
    if any(is_sharded(parameter) for group in base.param_groups for parameter in group["params"]):
        return "its parameters are sharded"
    if config.saliency == "random":
        return "random groups would be drawn from those that are left"
    return None


def pays(partition: Partition, config: OTOConfig, zero_masks: Iterable[tuple[str, Tensor]], *, last: bool) -> bool:
    """
    Whether it pays to cut: a tenth or more of the multiply-accumulates that the blocks have left are of groups that
    are zero, given kind by kind; at the last occasion any that are.
    """

    def cost(kind: str) -> int:
        return budget.group_cost(partition, kind, "macs", config.sequence_length)

    total = sum(array.count * cost(array.kind) for array in partition.arrays)
    gone = sum(int(mask.sum()) * cost(kind) for kind, mask in zero_masks)
    return gone > 0 if last else gone >= _SHRINK_SHARE * total


def cut_parameters(param_groups: Sequence[dict[str, Any]], state: dict[Any, Any], cuts: Cuts) -> None:
    """Go on with the successors of parameters that were cut, and with their share of the optimizer's state."""
    for group in param_groups:
        left = []
        names = group.get("param_names", [None] * len(group["params"]))
        for name, parameter in zip(names, group["params"], strict=True):
            successor, dim, kept_P = cuts.get(parameter, (parameter, 0, None))
            if kept_P is not None and (kept := state.pop(parameter, None)) and successor is not None:
                state[successor] = {
                    key: value.index_select(dim, kept_P)
                    if isinstance(value, Tensor) and value.shape == parameter.shape
                    else value
                    for key, value in kept.items()
                }
            if successor is not None:
                left.append((name, successor))
        if "param_names" in group:
            group["param_names"] = [name for name, _ in left]
        group["params"] = [parameter for _, parameter in left]
