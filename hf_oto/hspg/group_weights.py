"""What groups own of the parameters, on this rank: read, written, summed up and cleared, whole or sharded.

Shapes: `G` groups, `A` a set of groups over several arrays, `P` positions along a parameter's dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..models.groups import GroupArray
from . import devices
from .sharding import held, local, sum_over_shards

Places = Mapping[str, tuple[Tensor, dict[str, Any]]]
"""Parameter and parameter group, by name."""

# Entries that torch writes by one thread on a CPU. In some processes, by chance, it scatters ten times slower by two.
_SERIAL = 2**15 - 1


@dataclass
class GroupWeights:
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
            height = max(1, _SERIAL // max(1, count) if devices.gathers(own) else own.shape[0])
            for rows, given in zip(own.split(height), values.split(height), strict=True):
                rows.scatter_(1, self.positions_P.expand_as(given), given)
        else:
            own.index_copy_(self.dim, self.positions_P, values)

    def split(self, entries: int) -> list[GroupWeights]:
        """
        The same row by row, in pieces of about so many entries. Columns that are read one after the other pull the
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

    def clear(self, state: Mapping[Any, Mapping[str, Any]]) -> None:
        """Set to zero the weights, and what the optimizer keeps for each of them."""
        self._own.index_fill_(self.dim, self.positions_P, 0)
        kept, last = state.get(self.parameter, {}), self.parameter.dim()
        for name, tensor in kept.items():
            # AdEMAMix keeps two averages of the gradient in one tensor: the weights' dims are the last.
            if isinstance(tensor, Tensor) and tensor.shape[-last:] == self.parameter.shape:
                dim = self.dim + tensor.dim() - last
                local(tensor).index_fill_(dim, self.positions_P, zero_of(kept, name))

    def along(self, values_A: Tensor) -> Tensor:
        """One value per group, shaped to broadcast over what was read."""
        values_P = values_A[self.owners_P]
        return values_P if self.parameter.dim() == 1 else values_P.unsqueeze(1 - self.dim)

    def add_products(self, sums_A: Tensor, values: Tensor, others: Tensor) -> None:
        """Add each group's sum of products, and use `values` up."""
        self._add(sums_A, values.mul_(others) if values.dtype == torch.float32 else others.float() * values.float())

    def add_squares(self, sums_A: Tensor, values: Tensor) -> None:
        """Add each group's sum of squares."""
        self._add(sums_A, values.float().square())

    def _add(self, sums_A: Tensor, values: Tensor) -> None:
        # The sum down to one vector comes first: sharded rows are uneven.
        sums_P = values.float() if values.dim() == 1 else values.sum(dim=1 - self.dim, dtype=torch.float32)
        sums_A.index_add_(0, self.owners_P, sums_P)


def group_weights(arrays: Sequence[GroupArray], groups: Sequence[Tensor], places: Places) -> list[GroupWeights]:
    """
    Everything that groups own, parameter by parameter.

    Args:
        arrays (`Sequence[GroupArray]`): The arrays.
        groups (`Sequence[Tensor]`): Which groups of each array, int64, on the CPU.
        places (`Mapping[str, tuple[Tensor, dict]]`): Parameter and its parameter group, by name.

    Returns:
        `list[GroupWeights]`: Owners are counted over all arrays.
    """
    found, first = [], 0
    for array, groups_g in zip(arrays, groups, strict=True):
        if not groups_g.numel():
            continue
        owners_g = torch.arange(first, first + groups_g.numel(), device="cpu")
        for owned in array.owned:
            positions_P = owned.positions(array.count, groups_g)
            owners_P = owners_g.repeat_interleave(owned.width).repeat(len(owned.blocks))
            parameter, group = places[owned.name]
            start, stop = held(parameter, owned.dim)
            here = (positions_P >= start) & (positions_P < stop)
            device = local(parameter).device
            positions_P, owners_P = (positions_P[here] - start).to(device), owners_P[here].to(device)
            found.append(GroupWeights(parameter, group, owned.dim, positions_P, owners_P))
        first += groups_g.numel()
    return found


def squared_norms(arrays: Sequence[GroupArray], places: Places) -> Tensor:
    """
    ‖x_g‖² of every group of some arrays, over all that it owns: float32 `[G]`.

    Sums down to one vector come first, the groups after: sharded rows are uneven.
    """
    sums, parameters = [], []
    for array in arrays:
        norms = []
        for owned in array.owned:
            parameter, _ = places[owned.name]
            parameters.append(parameter)
            own, groups = local(parameter), (len(owned.blocks), array.count, owned.width)
            if own.shape[owned.dim] != parameter.shape[owned.dim]:
                start, stop = held(parameter, owned.dim)
                mine_P = own if own.dim() == 1 else norms_along(own, [1])
                own = torch.zeros(parameter.shape[0], dtype=mine_P.dtype, device=own.device)
                own[start:stop] = mine_P
            split = own.unflatten(owned.dim, groups)
            others = [dim for dim in range(split.dim()) if dim != owned.dim + 1]
            norms.append(norms_along(split, others))
        sums.append(torch.stack(norms).square_().sum(dim=0).float())
    sums_G = torch.cat(sums)
    sum_over_shards(sums_G, parameters)
    return sums_G


def norms_along(values: Tensor, dims: list[int]) -> Tensor:
    """Norms over some dims, in float32 or what is more precise."""
    return torch.linalg.vector_norm(values, dim=dims, dtype=torch.promote_types(values.dtype, torch.float32))


def zero_of(state: Mapping[str, Any], name: str) -> Tensor | int:
    """
    What stands for zero in a tensor of an optimizer's state: in the 8-bit states of bitsandbytes the code of zero, an
    index into the table of values that is kept beside them (Dettmers et al., arXiv:2110.02861).
    """
    values = state.get(name.replace("state", "qmap"))
    if state[name].is_floating_point() or values is None:
        return 0
    return values.abs().argmin().to(state[name].dtype)
