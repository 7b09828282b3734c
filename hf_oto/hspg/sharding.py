"""Parameters of which a rank may hold a shard: what it holds, and what the ranks hold together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def held(parameter: Tensor, dim: int) -> tuple[int, int]:
    """Which indices along a dim this rank holds: all, or its shard in the layout of `torch.chunk`."""
    size = parameter.shape[dim]
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if placement.is_shard(dim):
                length = -(-size // parameter.device_mesh.size(axis))
                start = min(parameter.device_mesh.get_local_rank(axis) * length, size)
                return start, min(start + length, size)
    return 0, size


def check_sharding(parameters: Mapping[str, Tensor]) -> None:
    """
    Raise `ValueError` unless parameters are whole, or all of them sharded as FSDP2 does it: along dim 0, over one mesh
    dimension. Tensor parallelism shards some of them along dim 1, or a second time along dim 0.
    """
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            sharded = [placement for placement in parameter.placements if not placement.is_replicate()]
            if any(type(placement) is not Shard or placement.dim != 0 for placement in sharded) or len(sharded) > 1:
                raise ValueError(
                    f"{name!r} is placed as {tuple(parameter.placements)} on {parameter.device_mesh}, as tensor "
                    f"parallelism places weights, which HSPG does not support. Shard the weights of zero-invariant "
                    f"groups with `fully_shard` alone: along dim 0, over one mesh dimension."
                )
    if len({_shards(parameter) for parameter in parameters.values()}) > 1:
        whole = [name for name, parameter in parameters.items() if not _shards(parameter)]
        raise ValueError(
            f"The weights of zero-invariant groups must be sharded alike: over the same mesh dimension, or not at "
            f"all. {len(whole)} of {len(parameters)} are whole{f' ({whole[0]!r}, …)' if whole else ''}. Call "
            f"`fully_shard` on the whole model."
        )


def sum_over_shards(sums: Tensor, parameters: Iterable[Tensor]) -> None:
    """Add what the other ranks' shards gave to sums over this rank's shards, in place."""
    for mesh, axis in _shards(next(iter(parameters))):
        dist.all_reduce(sums, group=mesh.get_group(axis))


def from_first_rank(drawn: Tensor) -> Tensor:
    """What the first rank drew, on every rank."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(drawn, src=0)
    return drawn


def _shards(parameter: Tensor) -> tuple[tuple[Any, int], ...]:
    """The mesh dimensions over which a parameter is cut into shards."""
    if not isinstance(parameter, DTensor):
        return ()
    return tuple((parameter.device_mesh, axis) for axis, kind in enumerate(parameter.placements) if kind.is_shard())
