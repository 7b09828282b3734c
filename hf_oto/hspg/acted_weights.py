"""The weights that the half-space step acts on, from one step to the next.

Shapes: `A` the groups acted on, `G` all groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..models.groups import GroupArray
from . import devices
from .group_weights import GroupWeights, Places, group_weights, squared_norms, zero_of
from .half_space import Weights, half_space_step, read
from .selection import indices
from .sharding import is_sharded, local, sum_over_shards
from .stacked_weights import Chosen, choose, clear_stacked, stacked_weights


class ActedWeights:
    """
    All that a set of groups owns, and what it held when the last step left it, so that it need not be read again.

    Args:
        arrays (`Sequence[GroupArray]`): The arrays.
        groups (`Sequence[Tensor]`): Which groups of each array, int64, on the CPU; one at least.
        places (`Mapping[str, tuple[Tensor, dict]]`): Parameter and its parameter group, by name.
        keeps (`bool`): Whether it may remember, which costs the memory of these weights between steps.
    """

    def __init__(self, arrays: Sequence[GroupArray], groups: Sequence[Tensor], places: Places, *, keeps: bool) -> None:
        self._chosen = arrays, groups, places
        owned = [
            owned.name
            for array, groups_g in zip(arrays, groups, strict=True)
            if groups_g.numel()
            for owned in array.owned
        ]
        self._parameters = [places[name][0] for name in owned]
        whole = not any(is_sharded(parameter) for parameter in self._parameters)
        self._foreach = whole and not devices.gathers(self._parameters[0])
        self._keeps = keeps and whole
        self._weights: Weights
        self._numbers_A: Tensor | None = None
        self._find()
        if keeps and not self._foreach:  # nobody asks for them again
            self._chosen = arrays, [], places
        self._values: list[Tensor] = []
        self._sq_norm_A = torch.zeros(0, dtype=torch.float32, device=self._device)
        self._marks = self._mark()

    def _find(self) -> None:
        arrays, groups, places = self._chosen
        entries = devices.entries(local(self._parameters[0]))
        self._order: Sequence[int] = range(len(arrays))
        if self._foreach:
            self._weights, self._order = stacked_weights(arrays, groups, places, entries)
        else:
            self._weights = [part for each in group_weights(arrays, groups, places) for part in each.split(entries)]
        self._number = sum(groups_g.numel() for groups_g in groups)

    @property
    def groups_A(self) -> Tensor:
        """The groups' numbers among all, int64, of weights that are not remembered."""
        if self._numbers_A is None:
            arrays, groups, _ = self._chosen
            firsts = list(accumulate((array.count for array in arrays), initial=0))
            self._numbers_A = torch.cat([groups[index] + firsts[index] for index in self._order]).to(self._device)
        return self._numbers_A

    @property
    def _device(self) -> torch.device:
        return local(self._parameters[0]).device

    def look(self) -> None:
        """
        Read x_k, before the base optimizer's step: unless it is what the last step left, and nobody has written to it
        since, which torch counts. It does not count what is written in place through `.data`.
        """
        marks = self._mark()
        if self._values and marks == self._marks:
            return
        if self._foreach and [pointer for pointer, _ in marks] != [pointer for pointer, _ in self._marks]:
            self._find()
            self._marks = marks
        zeros_A = torch.zeros(self._number, dtype=torch.float32, device=self._device)
        self._values, self._sq_norm_A = read(self._weights, zeros_A)
        self._sum_up(self._sq_norm_A)

    def step(self, *, epsilon: float | None, steps_left: int | None, lmbda: float) -> Tensor:
        """[`half_space_step`] after the base optimizer's. Gives which of `groups_A` are zero now: bool `[A]`."""
        zero_A, self._values, self._sq_norm_A = half_space_step(
            self._weights,
            self._values,
            self._sq_norm_A,
            epsilon=epsilon,
            steps_left=steps_left,
            lmbda=lmbda,
            keep=self._keeps,
            reduce=self._sum_up,
        )
        if self._keeps:
            self._marks = self._mark()
        return zero_A

    def _sum_up(self, sums_A: Tensor) -> None:
        sum_over_shards(sums_A, self._parameters)

    def _mark(self) -> list[tuple[int, int]]:
        """Where the parameters lie, and how often they were written to; nothing where neither matters."""
        if not (self._keeps or self._foreach):
            return []
        return [(parameter.data_ptr(), parameter._version) for parameter in self._parameters]


class ZeroWeights:
    """
    All that groups own which are zero for good, with what the optimizer keeps for it.

    Args:
        arrays (`Sequence[GroupArray]`): The arrays.
        zero_G (`Tensor`): Which of their groups, bool `[G]`.
        places (`Mapping[str, tuple[Tensor, dict]]`): Parameter and its parameter group, by name.
    """

    def __init__(self, arrays: Sequence[GroupArray], zero_G: Tensor, places: Places) -> None:
        self._chosen = arrays, indices(zero_G, arrays), places
        self._zero_G = zero_G
        self._weights: list[GroupWeights] | None = None
        self._on_device: list[Chosen] | None = None

    def clear(self, state: Mapping[Any, Mapping[str, Any]]) -> None:
        """Set them to zero, once more."""
        arrays, groups, places = self._chosen
        if (tensors := _alike(arrays, places, state)) is not None:
            if self._on_device is None:  # a copy there waits for the device
                self._on_device = choose(arrays, groups, places)
            clear_stacked(self._on_device, tensors)
            return
        if self._weights is None:
            self._weights = group_weights(arrays, groups, places)
        for part in self._weights:
            part.clear(state)

    def moved(self) -> bool:
        """Whether any of them is not zero, on any rank."""
        arrays, groups, places = self._chosen
        owned = [places[owned.name][0] for array in arrays for owned in array.owned]
        if not any(groups_g.numel() for groups_g in groups):
            return False
        if devices.gathers(owned[0]) or any(is_sharded(parameter) for parameter in owned):
            return bool((squared_norms(arrays, places) * self._zero_G).any())
        pieces, _ = stacked_weights(arrays, groups, places, devices.entries(owned[0]))
        return bool(torch.stack([piece.read().any() for piece in pieces]).any())


def _alike(
    arrays: Sequence[GroupArray], places: Places, state: Mapping[Any, Mapping[str, Any]]
) -> list[Mapping[str, Tensor]] | None:
    """
    The weights, and whatever else is kept for each of them, by name: whole and laid out as they are, with a zero that
    is 0. `None` where that is not so, and on a CPU.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name in (owned.name for array in arrays for owned in array.owned):
        parameter, _ = places[name]
        if is_sharded(parameter) or devices.gathers(parameter):
            return None
        kept = state.get(parameter, {})
        found.setdefault("", {})[name] = parameter.detach()
        for key, tensor in kept.items():
            if isinstance(tensor, Tensor) and tensor.shape[-parameter.dim() :] == parameter.shape:
                if tensor.dim() != parameter.dim() or not isinstance(zero_of(kept, key), int):
                    return None
                found.setdefault(key, {})[name] = tensor.detach()
    return list(found.values())
