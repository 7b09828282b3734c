"""What a step is made of on the device where the weights are: the one place that tells devices apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CACHED = 2**17  # entries in float32: half a second-level cache of 1 MiB
AT_ONCE = 2**23  # entries that a step holds beside what it needs, where there is no such cache


def gathers(tensor: Tensor) -> bool:
    """
    Whether weights are gathered, changed and scattered in pieces that stay in a cache: on a CPU, where time goes by
    what is read. On an accelerator it goes by what is launched, and as many weights as possible share an operation.
    """
    return tensor.is_cpu


def shared(parameters: Mapping[str, Tensor]) -> torch.device:
    """
    The device that all the parameters of groups are on.

    Raises:
        `ValueError`: They are on several, or on the meta device, where they have no values.
    """
    places: dict[torch.device, str] = {}
    for name, parameter in parameters.items():
        places.setdefault(parameter.device, name)
    device, *others = places
    if device.type == "meta":
        raise ValueError(
            f"The weights of zero-invariant groups have no values: {places[device]!r} is on the meta device. Load "
            f"them, without offloading, before the first step."
        )
    if others:
        raise ValueError(
            f"The weights of zero-invariant groups must be on one device, got {places[device]!r} on {device} and "
            f"{places[others[0]]!r} on {others[0]}. Put the model on one of them: load it without `device_map`, or "
            f"with one device for all of it."
        )
    return device


def entries(tensor: Tensor) -> int:
    """How many entries are acted on at once."""
    return CACHED if gathers(tensor) else AT_ONCE
