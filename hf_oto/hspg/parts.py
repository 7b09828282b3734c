"""What groups own of the parameters, on this rank: read, written and summed up, whole or sharded.

Shapes: `G` groups of one array, `A` a set of groups over several arrays, `P` positions along a parameter's dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from ..models.groups import GroupArray

# Entries that torch writes by one thread on a CPU. In some processes, by chance, it scatters ten times slower by two.
_SERIAL = 2**15 - 1


@dataclass
class Part:
    """What a set of groups owns of one parameter, on this rank.

    Args:
        parameter (`Tensor`): The parameter, whole or sharded.
        group (`dict`): Its parameter group, for the step size.
        dim (`int`): The dim along which the groups lie.
        positions_P (`Tensor`): Where they lie on this rank, int64.
        owners_P (`Tensor`): Whose each position is: index into the set of groups, int64.
        rows (`slice`, *optional*): Which rows of it are meant, where the groups lie along columns. All by default.
    """

    parameter: Tensor
    group: dict[str, Any]
    dim: int
    positions_P: Tensor
    owners_P: Tensor
    rows: slice | None = None

    @property
    def _own(self) -> Tensor:
        return local(self.parameter) if self.rows is None else local(self.parameter)[self.rows]

    def read(self) -> Tensor:
        return self._own.index_select(self.dim, self.positions_P)

    def write(self, values: Tensor) -> None:
        own, count = self._own, self.positions_P.numel()
        if self.dim == 1:  # a third of what `index_copy_` takes along columns
            height = max(1, _SERIAL // max(1, count) if own.is_cpu else own.shape[0])
            for rows, given in zip(own.split(height), values.split(height), strict=True):
                rows.scatter_(1, self.positions_P.expand_as(given), given)
        else:
            own.index_copy_(self.dim, self.positions_P, values)

    def split(self, entries: int) -> list[Part]:
        """
        The same row by row, in parts of about so many entries. Columns that are read one after the other pull the
        whole matrix through the cache each; of some rows all that was read is still there when it is written.
        """
        own, count = local(self.parameter), self.positions_P.numel()
        if not own.numel() or not count:
            return [self]
        if self.dim == 1:
            height = max(1, entries // count)
            return [replace(self, rows=slice(first, first + height)) for first in range(0, own.shape[0], height)]
        pieces = min(count, -(-count * (own.numel() // own.shape[0]) // entries))
        pairs = zip(self.positions_P.tensor_split(pieces), self.owners_P.tensor_split(pieces), strict=True)
        return [replace(self, positions_P=positions_P, owners_P=owners_P) for positions_P, owners_P in pairs]

    def clear(self, state: dict[Any, dict[str, Any]] | None = None) -> None:
        """Set the weights to zero, or what the optimizer keeps for each of them."""
        if state is None:
            self._own.index_fill_(self.dim, self.positions_P, 0)
            return
        kept, last = state.get(self.parameter, {}), self.parameter.dim()
        for name, tensor in kept.items():
            # AdEMAMix keeps two averages of the gradient in one tensor: the weights' dims are the last.
            if isinstance(tensor, Tensor) and tensor.shape[-last:] == self.parameter.shape:
                dim = self.dim + tensor.dim() - last
                local(tensor).index_fill_(dim, self.positions_P, _zero_of(kept, name))

    def along(self, values_A: Tensor) -> Tensor:
        """One value per group, shaped to broadcast over the part."""
        values_P = values_A[self.owners_P]
        return values_P if self.parameter.dim() == 1 else values_P.unsqueeze(1 - self.dim)

    def add_sums(self, sums_A: Tensor, values: Tensor) -> None:
        """Add each group's sum of entries. The sum down to one vector comes first: sharded rows are uneven."""
        sums_P = values.float() if values.dim() == 1 else values.sum(dim=1 - self.dim, dtype=torch.float32)
        sums_A.index_add_(0, self.owners_P, sums_P)


@dataclass
class Reading:
    """What parts hold at one time.

    Args:
        values (`list[Tensor]`): Their entries, in the parts' order.
        sq_norm_A (`Tensor`): ‖x_g‖² of each group, on this rank: float32.
        marks (`list[tuple[int, int]]`): [`marks_of`] the parts at that time.
    """

    values: list[Tensor]
    sq_norm_A: Tensor
    marks: list[tuple[int, int]] = field(default_factory=list)

    def add(self, part: Part, values: Tensor) -> None:
        self.values.append(values)
        part.add_sums(self.sq_norm_A, values.float().square())


def marks_of(parts: Iterable[Part]) -> list[tuple[int, int]]:
    """
    Where the parts' parameters lie, and how often they were written to: others, once somebody else has written, unless
    it was in place through `.data`, which torch does not count.
    """
    return [(part.parameter.data_ptr(), part.parameter._version) for part in parts]


def can_clear(tensor: Tensor) -> bool:
    """Whether a part of a tensor can be set to zero in place: not of every kind that packs its entries into blocks."""
    if type(tensor) in (Tensor, torch.nn.Parameter, DTensor) or not tensor.dim():
        return True
    try:
        return tensor.index_fill_(0, torch.empty(0, dtype=torch.int64, device=tensor.device), 0) is tensor
    except (NotImplementedError, RuntimeError, TypeError):
        return False


def _zero_of(state: Mapping[str, Any], name: str) -> Tensor | int:
    """
    What stands for zero in a tensor of an optimizer's state: in the 8-bit states of bitsandbytes the code of zero, an
    index into the table of values that is kept beside them (Dettmers et al., arXiv:2110.02861).
    """
    values = state.get(name.replace("state", "qmap"))
    if state[name].is_floating_point() or values is None:
        return 0
    return values.abs().argmin().to(state[name].dtype)


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
