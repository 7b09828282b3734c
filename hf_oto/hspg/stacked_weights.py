"""What groups own of many whole parameters at once, for devices where time goes by what is launched.

Blocks of one shape are read by one operation where torch has one for lists of tensors, and all that was read is one
tensor `[R, n, …]`: R roles (the query's weight, the key's, …), and n groups of one kind over all blocks.

Shapes: `A` a set of groups, those of one kind together; `R` roles; `n` neighbours among them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..models.groups import GroupArray
from .group_weights import Places, norms_along


@dataclass(frozen=True)
class Chosen:
    """Some of an array's groups.

    Args:
        array ([`~hf_oto.models.groups.GroupArray`]): The array.
        numbers (`list[int]`): Which of its groups.
        index_g (`Tensor`): The same, int64, on the device of the weights.
    """

    array: GroupArray
    numbers: list[int]
    index_g: Tensor


@dataclass(frozen=True)
class _Owned:
    """What chosen groups of one block own in one role.

    Args:
        name (`str`): The parameter.
        tensor (`Tensor`): It, or what belongs to it, turned so that groups lie along dim 0.
        index_g (`Tensor`): Where the groups lie, counted in their own width, int64, on the tensor's device.
        places (`list[int]`): The same numbers.
        width (`int`): Rows that one group owns.
    """

    name: str
    tensor: Tensor
    index_g: Tensor
    places: list[int]
    width: int

    @property
    def size(self) -> int:
        """Entries of one group."""
        return self.width * math.prod(self.tensor.shape[1:])

    def views(self) -> list[Tensor]:
        """Of every group the rows, where it owns several."""
        return [self.tensor.narrow(0, place * self.width, self.width) for place in self.places]


class Stacked:
    """What neighbouring groups of one kind own of many parameters, in some roles.

    Args:
        roles (`Sequence[Sequence[_Owned]]`): Role by role, block by block.
        group (`dict`): The parameter group of all of them.
        owners (`slice`): Which of the groups.
    """

    def __init__(self, roles: Sequence[Sequence[_Owned]], group: dict[str, Any], owners: slice) -> None:
        self.roles, self.group, self.owners = roles, group, owners
        first = roles[0][0]
        self.wide, self.vectors = first.width > 1, first.tensor.dim() == 1
        self.count = owners.stop - owners.start
        if self.wide:
            self.views = [view for role in roles for owned in role for view in owned.views()]
        elif self.vectors:
            self.whole = [owned.tensor for role in roles for owned in role]
            starts = list(accumulate((len(vector) for vector in self.whole), initial=0))
            moved = [owned.index_g for role in roles for owned in role]
            self.index_P = torch.cat([index + start for index, start in zip(moved, starts, strict=False)])

    def read(self) -> Tensor:
        if self.wide:
            return torch.stack(self.views).unflatten(0, (-1, self.count))
        if self.vectors:
            return torch.cat(self.whole).index_select(0, self.index_P).unflatten(0, (-1, self.count))
        like = self.roles[0][0].tensor
        values = torch.empty(len(self.roles), self.count, like.shape[1], dtype=like.dtype, device=like.device)
        for owned, own in self._rows(values):
            torch.index_select(owned.tensor, 0, owned.index_g, out=own)
        return values

    def write(self, values: Tensor) -> None:
        if self.wide:
            torch._foreach_copy_(self.views, list(values.flatten(0, 1).unbind()))
        elif self.vectors:  # a vector is small: it is written whole
            joined = torch.cat(self.whole).index_copy_(0, self.index_P, values.flatten())
            torch._foreach_copy_(self.whole, list(joined.split([len(vector) for vector in self.whole])))
        else:
            for owned, own in self._rows(values):
                owned.tensor.index_copy_(0, owned.index_g, own)

    def _rows(self, values: Tensor) -> Iterator[tuple[_Owned, Tensor]]:
        for role, own in zip(self.roles, values.unbind(), strict=True):
            yield from zip(role, own.split([len(owned.places) for owned in role]), strict=True)

    def along(self, values_A: Tensor) -> Tensor:
        """One value per group, shaped to broadcast over what was read."""
        values = values_A[self.owners]
        dims = self.views[0].dim() if self.wide else 0 if self.vectors else 1
        return values.view(-1, *(1,) * dims)

    def put_products(self, sums_A: Tensor, values: Tensor, others: Tensor) -> None:
        """Put each group's sum of products in its place, and use `values` up."""
        products = values.mul_(others) if values.dtype == torch.float32 else values.float() * others.float()
        torch.sum(products, dim=self._others(values), out=sums_A[self.owners])

    def put_norms(self, norms_A: Tensor, values: Tensor) -> None:
        """Put each group's norm in its place."""
        if values.dtype == torch.float64:
            norms_A[self.owners] = norms_along(values, self._others(values))
        else:
            out = norms_A[self.owners]
            torch.linalg.vector_norm(values, dim=self._others(values), dtype=torch.float32, out=out)

    def _others(self, values: Tensor) -> list[int]:
        return [dim for dim in range(values.dim()) if dim != 1]


def stacked_weights(
    arrays: Sequence[GroupArray], groups: Sequence[Tensor], places: Places, entries: int
) -> tuple[list[Stacked], list[int]]:
    """
    Everything that groups own, in pieces of about so many entries or one matrix.

    Args:
        arrays (`Sequence[GroupArray]`): The arrays.
        groups (`Sequence[Tensor]`): Which groups of each array, int64, on the CPU.
        places (`Mapping[str, tuple[Tensor, dict]]`): Whole parameter and its parameter group, by name.

    Returns:
        `tuple[list[Stacked], list[int]]`: The pieces, and the order of the arrays that their owners are counted in.
    """
    order = sorted(range(len(arrays)), key=lambda index: arrays[index].kind)
    tensors = {name: parameter.detach() for name, (parameter, _) in places.items()}
    chosen = choose(arrays, groups, places)
    found, first = [], 0
    for kind in dict.fromkeys(arrays[index].kind for index in order):
        mine = [index for index in order if arrays[index].kind == kind]
        by_role = _roles([each for each in chosen if each.array.kind == kind], tensors)
        runs: dict[tuple, list[list[_Owned]]] = defaultdict(list)
        for role in by_role:
            for start, run in _runs(role, places, entries):
                tensor, count = run[0].tensor, sum(len(owned.places) for owned in run)
                # Single rows of either orientation are alike: they are reached one matrix at a time.
                dense = run[0].width == 1 or tensor.is_contiguous()
                of_group = id(places[run[0].name][1])
                runs[start, count, of_group, tensor.shape[1:], tensor.dtype, run[0].width, dense].append(run)
        for (start, count, *_), roles in runs.items():
            together = max(1, entries // max(1, count * roles[0][0].size))
            for index in range(0, len(roles), together):
                group = places[roles[0][0].name][1]
                owners = slice(first + start, first + start + count)
                found.append(Stacked(roles[index : index + together], group, owners))
        first += sum(len(groups[index]) for index in mine)
    return found, order


def choose(arrays: Sequence[GroupArray], groups: Sequence[Tensor], places: Places) -> list[Chosen]:
    """Array by array the groups that are meant, where there are any: copied to the device of the weights at once."""
    some = [(array, groups_g) for array, groups_g in zip(arrays, groups, strict=True) if groups_g.numel()]
    if not some:
        return []
    device = places[some[0][0].columns][0].device
    moved = torch.cat([groups_g for _, groups_g in some]).to(device).split([len(each) for _, each in some])
    return [Chosen(array, given.tolist(), index_g) for (array, given), index_g in zip(some, moved, strict=True)]


def clear_stacked(chosen: Sequence[Chosen], tensors: Sequence[Mapping[str, Tensor]]) -> None:
    """Set what groups own to zero, in whole tensors that are laid out as the parameters are."""
    for named in tensors:
        rows: list[_Owned] = []
        wide: list[_Owned] = []
        for role in _roles(chosen, named):
            for owned in role:
                (rows if owned.width == 1 else wide).append(owned)
        if views := [view for owned in wide for view in owned.views()]:
            torch._foreach_zero_(views)
        for owned in rows:
            owned.tensor.index_fill_(0, owned.index_g, 0)


def _roles(chosen: Sequence[Chosen], tensors: Mapping[str, Tensor]) -> list[list[_Owned]]:
    """Role by role what groups own of each block; a role's blocks are in the arrays' order."""
    roles: dict[tuple[str, int, int], list[_Owned]] = defaultdict(list)
    for each in chosen:
        array, numbers, moved_g = each.array, each.numbers, each.index_g
        for role, owned in enumerate(array.owned):
            if owned.name not in tensors:
                continue
            tensor = tensors[owned.name]
            tensor = tensor.t() if owned.dim == 1 else tensor
            for block in owned.blocks:
                start = block * array.count
                places = [start + number for number in numbers] if start else numbers
                index_g = moved_g + start if start else moved_g
                roles[array.kind, role, block].append(_Owned(owned.name, tensor, index_g, places, owned.width))
    return list(roles.values())


def _runs(role: Sequence[_Owned], places: Places, entries: int) -> Iterator[tuple[int, list[_Owned]]]:
    """Neighbouring blocks of one parameter group and about so many entries: the first group's number, and they."""
    start = count = 0
    run: list[_Owned] = []
    for owned in role:
        mine = len(owned.places)
        same = run and places[run[0].name][1] is places[owned.name][1] and run[0].tensor.dtype == owned.tensor.dtype
        if run and (not same or (count + mine) * owned.size > entries):
            yield start, run
            start, count, run = start + count, 0, []
        run.append(owned)
        count += mine
    if run:
        yield start, run
