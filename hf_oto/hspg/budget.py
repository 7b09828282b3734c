"""What a group costs, and which groups to cut for a target: pure functions.

Shapes: `G` all groups, `B` arrays (the groups of one block and kind), `I` items (what is cut at once), `P` pools of
items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor

from ..config import OTOConfig
from ..models.groups import GroupArray, Partition


def group_cost(partition: Partition, kind: str, unit: str, sequence_length: int) -> int:
    """
    Cost of one group.

    Args:
        partition ([`~hf_oto.models.groups.Partition`]): Gives the weights that a group owns, and the head size D.
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


def removal_costs(partition: Partition, kind: str, config: OTOConfig) -> Tensor:
    """
    Cost, in the target's unit, of the first, second, … group of a kind that goes from a dense block: int64 `[G]`.

    That of [`group_cost`] for each, but for the unit `"latency"`: there it is what the table says that a block saves,
    in nanoseconds, and that may depend on how many it has left.
    """
    if config.latency_table is not None:
        return torch.tensor(config.latency_table.saved(kind), dtype=torch.int64, device="cpu")
    cost = group_cost(partition, kind, config.target_unit, config.sequence_length)
    return torch.full((partition.dense_count(kind),), cost, dtype=torch.int64, device="cpu")


def dense_cost(partition: Partition, config: OTOConfig, unit: str | None = None) -> int:
    """
    Cost of the whole prunable part of the dense architecture, in `unit` (the config's when None). In `"latency"` it is
    that of the whole model, with what is never pruned.
    """
    unit = unit or config.target_unit
    if unit == "latency" and config.latency_table is not None:
        return config.latency_table.total
    return partition.num_layers * sum(
        partition.dense_count(kind) * group_cost(partition, kind, unit, config.sequence_length)
        for kind in config.structures
    )


def removable_groups(count: int, floor: int, multiple: int) -> int:
    """How many of a block's `count` groups may go when a multiple of `multiple`, at least `floor`, has to stay."""
    return max(count - -(-floor // multiple) * multiple, 0)


def floor_and_multiple(kind: str, config: OTOConfig) -> tuple[int, int]:
    """
    The least number of groups of a kind that a block keeps, and what the number kept is a multiple of: of all or none,
    where a table of latencies says that only the last of them saves much.
    """
    floor, multiple = (config.min_heads, 1) if kind == "heads" else (config.min_neurons, config.round_to)
    table = config.latency_table
    if table is not None and table.goes_whole(kind):
        multiple = table.dense_heads if kind == "heads" else table.dense_neurons
    return floor, multiple


def allowance(share: float, total: int) -> int:
    """The cost that may go for a share of a total, rounded down: never over. The share is the decimal it prints as."""
    return int(Fraction(repr(float(share))) * total)


def costs_of(partition: Partition, arrays: Sequence[GroupArray], config: OTOConfig) -> list[Tensor]:
    """Array by array the cost of the first, second, … of its groups to go, those that are gone already left out."""
    costs = {kind: removal_costs(partition, kind, config) for kind in config.structures}
    return [costs[array.kind][partition.dense_count(array.kind) - array.count :] for array in arrays]


@dataclass(frozen=True)
class Reach:
    """What can be removed of a model, in the target's metric.

    Args:
        total (`int`): Cost of the whole prunable part of the dense architecture; see [`dense_cost`].
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
    costs = {kind: removal_costs(partition, kind, config) for kind in ("heads", "neurons")}
    for array in partition.arrays:
        pruned = array.kind in config.structures
        if not pruned and config.target_unit != "latency":
            continue
        cost_G = costs[array.kind]
        floor, multiple = floor_and_multiple(array.kind, config)
        gone = partition.dense_count(array.kind) - array.count
        can_go = removable_groups(array.count, floor, multiple) if pruned else 0
        first = array.count % multiple or multiple
        if pruned and config.uniform:
            cuts = uniform_cuts(partition, array.kind, array.count, floor, multiple)
            can_go, first = cuts[-1], cuts[min(1, len(cuts) - 1)]
        removed += int(cost_G[:gone].sum())
        reachable += int(cost_G[: gone + can_go].sum())
        if can_go:
            step = int(cost_G[gone : gone + first].sum())
            step *= partition.num_layers if config.uniform else 1
            cheapest = min(cheapest or step, step)
    return Reach(dense_cost(partition, config), removed, reachable, cheapest)


def removed_cost(partition: Partition, config: OTOConfig, kept: Sequence[int]) -> int:
    """Cost, in the target's unit, that is gone of the dense model when every array keeps so many groups."""
    saved = {
        kind: list(accumulate(removal_costs(partition, kind, config).tolist(), initial=0))
        for kind in ("heads", "neurons")
    }
    counted = ("heads", "neurons") if config.target_unit == "latency" else config.structures
    return sum(
        saved[array.kind][partition.dense_count(array.kind) - count]
        for array, count in zip(partition.arrays, kept, strict=True)
        if array.kind in counted
    )


def check_table(partition: Partition, config: OTOConfig) -> None:
    """Refuse, with a `ValueError`, a table of latencies that is of another architecture."""
    table = config.latency_table
    if table is None:
        return
    names = ("model_type", "num_layers", "hidden_size", "head_size", "queries", "dense_heads", "dense_neurons")
    pairs = {name: (getattr(table, name), getattr(partition, name)) for name in names}
    if wrong := [f"`{name}` {found}, the model has {own}" for name, (found, own) in pairs.items() if found != own]:
        raise ValueError(
            f"`latency_table` is of another architecture: {'; '.join(wrong)}. Measure it on the dense model."
        )


def check_uniform(partition: Partition, config: OTOConfig) -> None:
    """Refuse, with a `ValueError`, blocks that cannot all keep as many groups as the family's own config can say."""
    if not config.uniform:
        return
    if "heads" in config.structures and partition.plain_counts("heads") == [partition.dense_heads]:
        raise ValueError(
            f"`uniform`=True needs `structures`=('neurons',) for models of type {partition.model_type!r}, whose own "
            f"config has no head size but hidden size / heads: all {partition.dense_heads} heads stay. Got "
            f"{config.structures}."
        )
    if config.target_sparsity is None:
        raise ValueError("`uniform`=True needs a `target_sparsity`: as published, what goes is for λ to decide.")
    for kind in ("heads", "neurons"):
        if len(numbers := {array.count for array in partition.arrays if array.kind == kind}) > 1:
            raise ValueError(
                f"`uniform`=True needs a model whose blocks have equally many {kind}, got {sorted(numbers)}. Begin "
                f"with the dense model, or leave it out."
            )
        if not numbers <= set(taken := partition.plain_counts(kind)):
            listed = ", ".join(map(str, taken)) if kind == "heads" else "one or more"
            raise ValueError(
                f"`uniform`=True needs as many {kind} in every block as the own config of models of type "
                f"{partition.model_type!r} can say ({listed}), got {numbers.pop()}: the model was pruned before. "
                f"Begin with the dense model, or leave it out."
            )


def is_reached(partition: Partition, config: OTOConfig) -> bool:
    """Whether a model that was pruned before has as much removed as the target asks for."""
    if not config.target_sparsity:
        return False
    check_table(partition, config)
    found = reach(partition, config)
    left = allowance(config.target_sparsity, found.total) - found.removed
    return bool(found.removed) and left < (found.cheapest or 1)


def check_target(partition: Partition, config: OTOConfig) -> None:
    """
    Refuse a target that cannot be reached from the model as it is.

    Raises:
        `ValueError`: The floors make the target unreachable, as much is gone already, or the smallest cut takes more.
            Names the share. Or `latency_table` is of another architecture.
    """
    check_table(partition, config)
    check_uniform(partition, config)
    if not config.target_sparsity:
        return
    found = reach(partition, config)
    wanted = allowance(config.target_sparsity, found.total)
    if is_reached(partition, config):
        raise ValueError(
            f"`target_sparsity`={config.target_sparsity} of the dense model's {config.target_unit} is removed already "
            f"({found.removed / found.total:.4f}). Choose a larger target."
        )
    if wanted > found.reachable:
        whole = ", as what is never pruned takes its time" if config.target_unit == "latency" else ""
        raise ValueError(
            f"`target_sparsity`={config.target_sparsity} of {config.target_unit} cannot be reached: with "
            f"`min_heads`={config.min_heads}, `min_neurons`={config.min_neurons} and `round_to`={config.round_to} at "
            f"most {int(found.reachable / found.total * 1e4) / 1e4} can go{whole}. Lower {_to_lower(config)}."
        )
    first = min((*config.milestones, config.target_sparsity))
    if not found.removed and allowance(first, found.total) < found.cheapest:
        name = "milestones" if config.milestones else "target_sparsity"
        blocks = "all blocks lose as many" if config.uniform else "of one block"
        lower = ", or a lower `round_to`" if "neurons" in config.structures and config.round_to > 1 else ""
        raise ValueError(
            f"`{name}`={first} of {config.target_unit} is less than the smallest cut takes ({blocks}, "
            f"`round_to`={config.round_to}), {math.ceil(found.cheapest / found.total * 1e4) / 1e4}: nothing would "
            f"go. Choose a larger share{lower}."
        )


def check_milestones(partition: Partition, config: OTOConfig) -> None:
    """
    Refuse milestones that a model which was pruned before has behind it, as what is kept there would be smaller, and
    those between which not even the smallest cut fits, as two sizes would be one.
    """
    if not config.milestones:
        return
    sizes = (*config.milestones, config.target_sparsity or 0.0)
    limits = reach(partition, config)
    apart = 0 if config.target_unit == "latency" else limits.cheapest  # by a table later cuts may be cheaper
    for low, high in zip(sizes, sizes[1:], strict=False):
        if allowance(high, limits.total) - allowance(low, limits.total) < apart:
            raise ValueError(
                f"`milestones`={config.milestones}: from {low:g} to {high:g} of {config.target_unit} is less than the "
                f"smallest cut takes, {math.ceil(limits.cheapest / limits.total * 1e4) / 1e4}, so that two sizes "
                f"would be one. Leave one of them out."
            )
    for share in config.milestones:
        if is_reached(partition, replace(config, target_sparsity=share, milestones=())):
            found = reach(partition, config)
            raise ValueError(
                f"`milestones`={config.milestones}: {share:g} of the dense model's {config.target_unit} is removed "
                f"already ({found.removed / found.total:.4f}). Leave it out, or start from a larger model."
            )


def _to_lower(config: OTOConfig) -> str:
    """What to do about a target out of reach."""
    table = config.latency_table
    whole = " and ".join(kind for kind in config.structures if table is not None and table.goes_whole(kind))
    reason = "by `latency_table` a block saves little before the last of them goes"
    if config.uniform:
        rest = f" and set the floors of {whole} to 0: {reason}" if whole else ", by which every block keeps something"
        return f"the target or the floors, or leave `uniform`=True out{rest}"
    return f"the target or the floors{f', those of {whole} to 0: {reason}' if whole else ''}"


def uniform_cuts(partition: Partition, kind: str, count: int, floor: int, multiple: int) -> list[int]:
    """How many groups may go of a block that has `count`, if all blocks lose as many: none, and then ascending."""
    kept = set(partition.plain_counts(kind))
    most = removable_groups(count, max(floor, 1), multiple)
    return [0] + [cut for cut in range(1, most + 1) if (count - cut) % multiple == 0 and count - cut in kept]


def select_uniformly(
    score_BG: Mapping[str, Tensor], cost_G: Mapping[str, Tensor], cuts: Mapping[str, Sequence[int]], budget: int
) -> dict[str, int]:
    """
    How many groups of each kind to cut from every block: of all pairs of numbers that fit the budget, and to which no
    further cut could be added, the one whose groups have the least score together.

    Args:
        score_BG (`Mapping[str, Tensor]`): By kind the scores of a block's groups that are left, `[blocks, left]`.
        cost_G (`Mapping[str, Tensor]`): By kind the cost of the first, second, … group of a block to go next.
        cuts (`Mapping[str, Sequence[int]]`): By kind the numbers that may go; 0 is one of them.
        budget (`int`): Cost that may be cut, of all blocks together.

    Returns:
        `dict[str, int]`: By kind the number; the groups are those of the lowest scores in each block.
    """
    blocks = len(next(iter(score_BG.values())))
    scores, costs = {}, {}
    for kind in score_BG:
        lowest = score_BG[kind].double().sort(dim=1).values.sum(dim=0).cumsum(0).tolist()
        spent = (blocks * cost_G[kind].cumsum(0)).tolist()
        scores[kind] = [lowest[cut - 1] if cut else 0.0 for cut in cuts[kind]]
        costs[kind] = [spent[cut - 1] if cut else 0 for cut in cuts[kind]]
    first, *rest = score_BG
    best: tuple[float, dict[str, int]] | None = None
    for index, cost in enumerate(costs[first]):
        if cost > budget:
            break
        found, score, left = {first: cuts[first][index]}, scores[first][index], budget - cost
        for kind in rest:
            other = max(number for number, spent in enumerate(costs[kind]) if spent <= left)
            found[kind], score, left = cuts[kind][other], score + scores[kind][other], left - costs[kind][other]
        full = index + 1 == len(costs[first]) or costs[first][index + 1] - cost > left
        if full and (best is None or score < best[0]):
            best = score, found
    assert best is not None  # the last that fits is full
    return best[1]


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
    what makes the number a multiple). The items of an array go in the order of their scores. Where a later one has the
    lower score per cost, as costs may change with the number that is left, it is ranked together with those before it
    (the ratios are made to ascend by pooling adjacent violators). What does not fit is passed over for the next that
    does, so the sum stays at most `budget` and falls short of it by less than the cheapest item that could go next.

    Args:
        score_G (`Tensor`): Saliency, float `[G]`.
        cost_G (`Tensor`): Cost of the first, second, … group of each array to go, int64 `[G]`, in the places of that
            array's groups. Those that are not alive have gone first.
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
    size_B = torch.bincount(array_G, minlength=floor_B.numel())
    next_B = size_B.cumsum(0) - alive_B  # where the cost of the next to go stands
    cost_I = torch.zeros(int(item_A[-1]) + 1, dtype=torch.int64, device=cost_G.device)
    cost_I.index_add_(0, item_A, cost_G[next_B[array_A] + rank_A])
    score_I = torch.zeros(cost_I.numel(), dtype=torch.float64, device=cost_G.device)
    score_I.index_add_(0, item_A, score_G[group_A].double())
    array_I = array_A[new_A]

    chosen_I = _fitting_items(score_I, cost_I, array_I, budget)
    chosen_G[group_A[chosen_I[item_A]]] = True
    return chosen_G


def _fitting_items(score_I: Tensor, cost_I: Tensor, array_I: Tensor, budget: int) -> Tensor:
    """The items of the lowest score per cost, those of an array in their order, until none that is next would fit.

    Shapes: all `[I]`, array by array -> bool `[I]`.
    """
    start_I = torch.ones_like(array_I, dtype=torch.bool)
    start_I[1:] = array_I[1:] != array_I[:-1]
    chain_I = start_I.cumsum(0) - 1
    order_I = _ascending_ratios(score_I, cost_I, chain_I).sort(stable=True).indices
    chosen_I = torch.zeros_like(cost_I, dtype=torch.bool)
    # Every pass takes at least one item, and drops those that cost more than is left with all that come after them.
    while True:
        dropped_I = (~chosen_I & (cost_I > budget)).long()
        before_I = dropped_I.cumsum(0)
        before_I -= (before_I - dropped_I)[start_I][chain_I]
        order_I = order_I[((before_I == 0) & ~chosen_I)[order_I]]
        if not order_I.numel():
            return chosen_I
        fits = order_I[cost_I[order_I].cumsum(0) <= budget]
        chosen_I[fits] = True
        budget -= int(cost_I[fits].sum())


def _ascending_ratios(score_I: Tensor, cost_I: Tensor, chain_I: Tensor) -> Tensor:
    """
    Score per cost of every item, pooled with its neighbours in the chain until the ratios of a chain ascend: pool
    adjacent violators (Barlow et al., 1972). Where they ascend already, each is the item's own.

    Shapes: all `[I]`; the chains' numbers ascend from 0.
    """
    pool_I = torch.arange(score_I.numel(), device=score_I.device)
    score_P, cost_P, chain_P = score_I, cost_I.double(), chain_I
    while True:
        ratio_P = score_P / cost_P
        falls = (ratio_P[1:] < ratio_P[:-1]) & (chain_P[1:] == chain_P[:-1])
        if not bool(falls.any()):
            return ratio_P[pool_I]
        own = torch.cat([torch.ones_like(falls[:1]), ~falls])
        merged_P = own.cumsum(0) - 1
        pool_I, chain_P = merged_P[pool_I], chain_P[own]
        score_P, cost_P = (torch.zeros_like(x[own]).index_add_(0, merged_P, x) for x in (score_P, cost_P))
