"""Parameters of which a rank may hold a shard: what it holds, and what the ranks hold together."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """
    Whether a tensor is one of torch's that lie on several ranks. Where there is one, their module is imported, which
    takes a third of the time that torch itself does: where it is not there is none.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor.detach()


def held(parameter: Any, dim: int) -> tuple[int, int]:
    """Which indices along a dim this rank holds: all, or its shard in the layout of `torch.chunk`."""
    size = parameter.shape[dim]
    if is_sharded(parameter):
        for axis, placement in enumerate(parameter.placements):
            if placement.is_shard(dim):
                length = -(-size // parameter.device_mesh.size(axis))
                start = min(parameter.device_mesh.get_local_rank(axis) * length, size)
                return start, min(start + length, size)
    return 0, size


def check_sharding(parameters: Mapping[str, Any]) -> None:
    """
    Raise `ValueError` unless parameters are whole, or all of them sharded as FSDP2 does it: along dim 0, over one mesh
    dimension. Tensor parallelism shards some of them along dim 1, or a second time along dim 0.
    """
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            sharded = [placement for placement in parameter.placements if not placement.is_replicate()]
            # By the name: what shards a second time is of a class derived from it.
            along_0 = [type(placement).__name__ == "Shard" and placement.is_shard(0) for placement in sharded]
            if not all(along_0) or len(along_0) > 1:
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


def _shards(parameter: Any) -> tuple[tuple[Any, int], ...]:
    """The mesh dimensions over which a parameter is cut into shards."""
    if not is_sharded(parameter):
        return ()
    return tuple((parameter.device_mesh, axis) for axis, kind in enumerate(parameter.placements) if kind.is_shard())
