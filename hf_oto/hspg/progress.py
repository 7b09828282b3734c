"""How far the compression has come: numbers for logs, and what has been removed in the target's metric.

Shapes: `G` groups of one array.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..config import OTOConfig
from ..models.groups import Partition
from . import budget


def metrics(
    partition: Partition, config: OTOConfig, zero_masks: Mapping[tuple[int, str], Tensor], aim: float
) -> dict[str, float]:
    """
    Progress of the compression.

    Args:
        partition ([`~hf_oto.models.groups.Partition`]): The groups that the model has now.
        config ([`OTOConfig`]): The settings.
        zero_masks (`Mapping[tuple[int, str], Tensor]`): Which of them are zero: (layer, kind) -> bool `[G]`.
        aim (`float`): The milestone, or the target, that the run goes for.

    Returns:
        `dict[str, float]`: `group_sparsity`, `removed_params` and `removed_macs` are shares in [0, 1] of the chosen
        structures of the dense architecture; `heads` and `neurons` count what the whole model has left. With the unit
        `"latency"` also `removed_latency`, the share of the whole model's time by the table; with milestones also
        `milestone`, the aim.
    """
    counts = {key: int(mask.sum()) for key, mask in zero_masks.items()}
    kept = [array.count - counts.get((array.layer, array.kind), 0) for array in partition.arrays]
    left = {"heads": 0, "neurons": 0}
    for array, count in zip(partition.arrays, kept, strict=True):
        left[array.kind] += count
    found: dict[str, float] = {}
    for name, unit in (("group_sparsity", "groups"), ("removed_params", "params"), ("removed_macs", "macs")):
        cost = sum(
            left[kind] * budget.group_cost(partition, kind, unit, config.sequence_length) for kind in config.structures
        )
        found[name] = 1 - cost / budget.dense_cost(partition, config, unit)
    if config.target_unit == "latency":
        removed = budget.removed_cost(partition, config, kept)
        found["removed_latency"] = removed / budget.dense_cost(partition, config)
    if config.milestones:
        found["milestone"] = aim
    return {**found, **left}
