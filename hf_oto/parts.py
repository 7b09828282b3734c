"""What groups own of the parameters, on this rank: read, written and summed up, whole or sharded.

Shapes: `G` groups of one array, `A` a set of groups over several arrays, `P` positions along a parameter's dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .groups import GroupArray


@dataclass
class Part:
    """What a set of groups owns of one parameter, on this rank.

    Args:
        parameter (`Tensor`): The parameter, whole or sharded.
        group (`dict`): Its parameter group, for the step size.
        dim (`int`): The dim along which the groups lie.
        positions_P (`Tensor`): Where they lie on this rank, int64.
        owners_P (`Tensor`): Whose each position is: index into the set of groups, int64.
    """

    parameter: Tensor
    group: dict[str, Any]
    dim: int
    positions_P: Tensor
    owners_P: Tensor

    def read(self) -> Tensor:
        return local(self.parameter).index_select(self.dim, self.positions_P)

    def write(self, values: Tensor) -> None:
        local(self.parameter).index_copy_(self.dim, self.positions_P, values)

    def clear(self, state: dict[Any, dict[str, Any]] | None = None) -> None:
        """Set the weights to zero, or what the optimizer keeps for each of them."""
        kept = [self.parameter] if state is None else state.get(self.parameter, {}).values()
        for tensor in kept:
            if isinstance(tensor, Tensor) and tensor.shape == self.parameter.shape:
                local(tensor).index_fill_(self.dim, self.positions_P, 0)

    def along(self, values_A: Tensor) -> Tensor:
        """One value per group, shaped to broadcast over the part."""
        values_P = values_A[self.owners_P]
        return values_P if self.parameter.dim() == 1 else values_P.unsqueeze(1 - self.dim)

    def add_sums(self, sums_A: Tensor, values: Tensor) -> None:
        """Add each group's sum of entries. The sum down to one vector comes first: sharded rows are uneven."""
        sums_P = values.float() if values.dim() == 1 else values.sum(dim=1 - self.dim, dtype=torch.float32)
        sums_A.index_add_(0, self.owners_P, sums_P)


def parts_of(
    arrays: Sequence[GroupArray],
    groups: Sequence[Tensor],
    places: Mapping[str, tuple[Tensor, dict[str, Any]]],
    *,
    silencers: bool = False,
) -> list[tuple[str, Part]]:
    """
    Everything that groups own.

    Args:
        arrays (`Sequence[GroupArray]`): The arrays.
        groups (`Sequence[Tensor]`): Which groups of each array, int64.
        places (`Mapping[str, tuple[Tensor, dict]]`): Parameter and its parameter group, by name.
        silencers (`bool`): The rows that silence the groups, instead of all that they own.

    Returns:
        `list[tuple[str, Part]]`: The parameter's name and the part of it. Owners are counted over all arrays.
    """
    parts, first = [], 0
    for array, groups_g in zip(arrays, groups, strict=True):
        if not groups_g.numel():
            continue
        owners_g = torch.arange(first, first + groups_g.numel())
        for owned in array.silencers if silencers else array.owned:
            positions_P = owned.positions(array.count, groups_g)
            owners_P = owners_g.repeat_interleave(owned.width).repeat(len(owned.blocks))
            parameter, group = places[owned.name]
            start, stop = _held(parameter, owned.dim)
            here = (positions_P >= start) & (positions_P < stop)
            device = local(parameter).device
            positions_P, owners_P = (positions_P[here] - start).to(device), owners_P[here].to(device)
            parts.append((owned.name, Part(parameter, group, owned.dim, positions_P, owners_P)))
        first += groups_g.numel()
    return parts


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _held(parameter: Tensor, dim: int) -> tuple[int, int]:
    """Which indices along a dim this rank holds: all, or its shard in the layout of `torch.chunk`."""
    size = parameter.shape[dim]
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if placement.is_shard(dim):
                length = -(-size // parameter.device_mesh.size(axis))
                start = min(parameter.device_mesh.get_local_rank(axis) * length, size)
                return start, min(start + length, size)
    return 0, size


def _shards(parameter: Tensor) -> tuple[tuple[Any, int], ...]:
    """The mesh dimensions over which a parameter is cut into shards."""
    if not isinstance(parameter, DTensor):
        return ()
    return tuple((parameter.device_mesh, axis) for axis, kind in enumerate(parameter.placements) if kind.is_shard())


def sum_over_shards(sums: Tensor, parameters: Iterable[Tensor]) -> None:
    """Add what the other ranks' shards gave to sums over this rank's shards, in place."""
    layouts = {_shards(parameter) for parameter in parameters}
    if len(layouts) > 1:
        raise ValueError("The weights of zero-invariant groups must be sharded alike: over the same mesh dimension.")
    for mesh, axis in layouts.pop():
        dist.all_reduce(sums, group=mesh.get_group(axis))


def from_first_rank(drawn: Tensor) -> Tensor:
    """What the first rank drew, on every rank."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(drawn, src=0)
    return drawn
