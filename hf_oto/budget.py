"""What a group costs, and which groups to cut for a target: pure functions.

Shapes: `G` all groups, `B` arrays (the groups of one block and kind), `I` items (what is cut at once).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from .config import OTOConfig
from .groups import Partition


def group_cost(partition: Partition, kind: str, unit: str, sequence_length: int) -> int:
    """
    Cost of one group.

    Args:
        partition ([`~hf_oto.groups.Partition`]): Gives the weights that a group owns, and the head size D.
        kind (`str`): `"heads"` or `"neurons"`.
        unit (`str`): `"params"`: entries of matrices and biases, in BERT 4HD + 3D of a head and 2H + 1 of a neuron.
            `"macs"` of one sequence of L tokens: L for each entry of a matrix, and of a head 2L²D more for scores and
            context (for each of the heads that read one key/value head). `"groups"`: 1.
        sequence_length (`int`): L, in tokens.
    """
    if unit == "groups":
        return 1
    matrices, biases = partition.head_weights if kind == "heads" else partition.neuron_weights
    if unit == "params":
        return matrices + biases
    scores = 2 * sequence_length * partition.head_size * partition.queries if kind == "heads" else 0
    return sequence_length * (matrices + scores)


def dense_cost(partition: Partition, config: OTOConfig, unit: str | None = None) -> int:
    """Cost of the whole prunable part of the dense architecture, in `unit` (the config's when None)."""
    unit = unit or config.target_unit
    return partition.num_layers * sum(
        partition.dense_count(kind) * group_cost(partition, kind, unit, config.macs_sequence_length)
        for kind in config.structures
    )


def removable_groups(count: int, floor: int, multiple: int) -> int:
    """How many of a block's `count` groups may go when a multiple of `multiple`, at least `floor`, has to stay."""
    return max(count - -(-floor // multiple) * multiple, 0)


def floor_and_multiple(kind: str, config: OTOConfig) -> tuple[int, int]:
    """The least number of groups of a kind that a block keeps, and what the number kept is a multiple of."""
    return (config.min_heads, 1) if kind == "heads" else (config.min_neurons, config.round_to)


def allowance(share: float, total: int) -> int:
    """The cost that may go for a share of a total, rounded down: never over. The share is the decimal it prints as."""
    return int(Fraction(repr(float(share))) * total)


@dataclass(frozen=True)
class Reach:
    """What can be removed of a model, in the target's currency.

    Args:
        total (`int`): Cost of the whole prunable part of the dense architecture.
        removed (`int`): Cost that is gone already.
        reachable (`int`): Cost that is gone once all that the floors leave free is.
        cheapest (`int`): Cost of the cheapest cut that the floors allow; 0 if there is none.
    """

    total: int
    removed: int
    reachable: int
    cheapest: int


def reach(partition: Partition, config: OTOConfig) -> Reach:
    """What can be removed of a model as it is, under the config's structures and floors."""
    removed = reachable = cheapest = 0
    for array in partition.arrays:
        if array.kind not in config.structures:
            continue
        cost = group_cost(partition, array.kind, config.target_unit, config.macs_sequence_length)
        floor, multiple = floor_and_multiple(array.kind, config)
        gone = partition.dense_count(array.kind) - array.count
        can_go = removable_groups(array.count, floor, multiple)
        removed += gone * cost
        reachable += (gone + can_go) * cost
        if can_go:
            step = array.count % multiple or multiple
            cheapest = min(cheapest or step * cost, step * cost)
    return Reach(dense_cost(partition, config), removed, reachable, cheapest)


def check_target(partition: Partition, config: OTOConfig) -> None:
    """
    Refuse a target that cannot be reached from the model as it is.

    Raises:
        `ValueError`: The floors make the target unreachable, or as much is gone already. Names the reachable share.
    """
    if not config.target_sparsity:
        return
    found = reach(partition, config)
    wanted = allowance(config.target_sparsity, found.total)
    if found.removed and wanted - found.removed < (found.cheapest or 1):
        raise ValueError(
            f"`target_sparsity`={config.target_sparsity} of the dense model's {config.target_unit} is removed already "
            f"({found.removed / found.total:.4f}). Choose a larger target."
        )
    if wanted > found.reachable:
        raise ValueError(
            f"`target_sparsity`={config.target_sparsity} of {config.target_unit} cannot be reached: with "
            f"`min_heads`={config.min_heads}, `min_neurons`={config.min_neurons} and `round_to`={config.round_to} at "
            f"most {int(found.reachable / found.total * 1e4) / 1e4} can go. Lower the target or the floors."
        )


def target_examples(partition: Partition, config: OTOConfig) -> dict[str, list[int]]:
    """
    What a target may leave. Which groups go is for the training to find; these are the two extremes, and the cut that
    takes the same share of every array.

    Returns:
        `dict[str, list[int]]`: Groups kept of every array, by `"heads first"`, `"evenly"` and `"neurons first"`.

    Raises:
        `ValueError`: See [`check_target`].
    """
    check_target(partition, config)
    found = reach(partition, config)
    budget = allowance(config.target_sparsity or 0.0, found.total) - found.removed
    arrays = [array for array in partition.arrays if array.kind in config.structures and array.count]
    kept = {name: [array.count for array in partition.arrays] for name in ("heads first", "evenly", "neurons first")}
    if not arrays:
        return kept
    unit, length = config.target_unit, config.macs_sequence_length
    count_B = torch.tensor([array.count for array in arrays])
    cost_B = torch.tensor([group_cost(partition, array.kind, unit, length) for array in arrays])
    heads_B = torch.tensor([array.kind == "heads" for array in arrays])
    floor_B, multiple_B = torch.tensor([floor_and_multiple(array.kind, config) for array in arrays]).unbind(1)
    array_G = torch.arange(len(arrays)).repeat_interleave(count_B)
    cost_G = cost_B[array_G]
    rank_G = torch.cat([(torch.arange(array.count).double() + 0.5) / array.count for array in arrays])
    # Scores per cost below 1 within the kind that goes first, from 1 on in the other.
    late = {"heads first": ~heads_B, "evenly": heads_B & ~heads_B, "neurons first": heads_B}
    for name, late_B in late.items():
        score_G = (rank_G + late_B[array_G]) * cost_G
        alive_G = torch.ones_like(array_G, dtype=torch.bool)
        chosen_G = select_groups(score_G, cost_G, array_G, alive_G, budget, floor_B, multiple_B)
        for array, gone in zip(arrays, torch.bincount(array_G[chosen_G], minlength=len(arrays)), strict=True):
            kept[name][partition.arrays.index(array)] -= int(gone)
    return kept


def select_groups(
    score_G: Tensor,
    cost_G: Tensor,
    array_G: Tensor,
    alive_G: Tensor,
    budget: int,
    floor_B: Tensor,
    multiple_B: Tensor,
) -> Tensor:
    """
    The groups to cut: lowest score per cost first, over all arrays, until nothing that is left would fit.

    Groups of an array whose kept number has to be a multiple are cut together, as an item of `multiple` groups (first
    what makes the number a multiple). What does not fit is passed over for the next that does, so the sum stays at
    most `budget` and falls short of it by less than the cheapest item left.

    Args:
        score_G (`Tensor`): Saliency, float `[G]`.
        cost_G (`Tensor`): Cost of each group, int64 `[G]`, the same within an array.
        array_G (`Tensor`): The array that each group belongs to, int64 `[G]`, ascending.
        alive_G (`Tensor`): Groups that are there to be cut, bool `[G]`.
        budget (`int`): Cost that may be cut.
        floor_B, multiple_B (`Tensor`): Least number kept, and what it is a multiple of, int64 `[B]`.

    Returns:
        `Tensor`: bool `[G]`, a subset of `alive_G`.
    """
    chosen_G = torch.zeros_like(alive_G)
    group_A = alive_G.nonzero().squeeze(1)
    group_A = group_A[score_G[group_A].sort(stable=True).indices]
    group_A = group_A[array_G[group_A].sort(stable=True).indices]  # array by array, ascending score within
    array_A = array_G[group_A]
    alive_B = torch.bincount(array_A, minlength=floor_B.numel())
    rank_A = torch.arange(group_A.numel(), device=group_A.device) - (alive_B.cumsum(0) - alive_B)[array_A]

    keep_B = torch.div(floor_B + multiple_B - 1, multiple_B, rounding_mode="floor") * multiple_B
    removable_A = rank_A < (alive_B - keep_B)[array_A]
    group_A, array_A, rank_A = group_A[removable_A], array_A[removable_A], rank_A[removable_A]
    if not group_A.numel():
        return chosen_G

    # Ranks before the first full item make the number a multiple; the offset puts them in an item of their own.
    offset_A = (-alive_B % multiple_B)[array_A]
    chunk_A = torch.div(rank_A + offset_A, multiple_B[array_A], rounding_mode="floor")
    new_A = torch.ones_like(removable_A[: group_A.numel()])
    new_A[1:] = (array_A[1:] != array_A[:-1]) | (chunk_A[1:] != chunk_A[:-1])
    item_A = new_A.cumsum(0) - 1
    cost_I = torch.zeros(int(item_A[-1]) + 1, dtype=torch.int64, device=cost_G.device)
    cost_I.index_add_(0, item_A, cost_G[group_A])
    score_I = torch.zeros(cost_I.numel(), dtype=torch.float64, device=cost_G.device)
    score_I.index_add_(0, item_A, score_G[group_A].double())

    order_I = (score_I / cost_I).sort(stable=True).indices
    chosen_I = torch.zeros_like(cost_I, dtype=torch.bool)
    # Every pass takes at least one item and drops all that cost more than is left; costs take a handful of values.
    while (order_I := order_I[~chosen_I[order_I] & (cost_I[order_I] <= budget)]).numel():
        fits = order_I[cost_I[order_I].cumsum(0) <= budget]
        chosen_I[fits] = True
        budget -= int(cost_I[fits].sum())
    chosen_G[group_A[chosen_I[item_A]]] = True
    return chosen_G
