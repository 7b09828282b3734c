"""What a step is made of on the device where the weights are: the one place that tells devices apart."""

from __future__ import annotations

from torch import Tensor

CACHED = 2**17  # entries in float32: half a second-level cache of 1 MiB
AT_ONCE = 2**23  # entries that a step holds beside what it needs, where there is no such cache


def gathers(tensor: Tensor) -> bool:
    """
    Whether weights are gathered, changed and scattered in pieces that stay in a cache: on a CPU, where time goes by
    what is read. On an accelerator it goes by what is launched, and as many weights as possible share an operation.
    """
    return tensor.is_cpu


def entries(tensor: Tensor) -> int:
    """How many entries are acted on at once."""
    return CACHED if gathers(tensor) else AT_ONCE
