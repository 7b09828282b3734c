"""Which groups a pruning period takes, from their saliency and what is left of the target; and which it may take.

Shapes: `G` all groups of the chosen structures, array by array.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..config import OTOConfig
from ..models.groups import GroupArray, Partition
from . import budget
from .group_weights import Places, squared_norms
from .sharding import from_first_rank


def split(values_G: Tensor, arrays: Sequence[GroupArray]) -> tuple[Tensor, ...]:
    """Array by array."""
    return values_G.split([array.count for array in arrays])


def masks(mask_G: Tensor, arrays: Sequence[GroupArray]) -> dict[tuple[int, str], Tensor]:
    """Array by array which of its groups are meant: (layer, kind) -> bool `[G]`, on the CPU."""
    return {(array.layer, array.kind): mask for array, mask in zip(arrays, split(mask_G.cpu(), arrays), strict=True)}


def indices(mask_G: Tensor, arrays: Sequence[GroupArray]) -> list[Tensor]:
    """Array by array which of its groups are meant, int64, on the CPU."""
    mask_G = mask_G.cpu()
    found = mask_G.nonzero().flatten().split(counts(mask_G, arrays))
    firsts = accumulate((array.count for array in arrays), initial=0)
    return [each - first for each, first in zip(found, firsts, strict=False)]


def counts(mask_G: Tensor, arrays: Sequence[GroupArray]) -> list[int]:
    """Array by array how many of its groups are meant."""
    ends = torch.tensor(list(accumulate(array.count for array in arrays)), device="cpu") - 1
    so_far = mask_G.cpu().cumsum(0)[ends].tolist()
    return [end - start for start, end in zip([0, *so_far], so_far, strict=False)]


def saliency(
    partition: Partition,
    arrays: Sequence[GroupArray],
    config: OTOConfig,
    gathered_G: Tensor,
    places: Places,
    step: int,
) -> Tensor:
    """
    Every group's score, not yet divided by its cost, on the CPU: what was gathered of it, or what the weights say, or
    one drawn from the run's seed. Per cost that is the same draw for heads and neurons.

    Raises:
        `FloatingPointError`: It is not finite.
    """
    if config.saliency == "magnitude":
        saliency_G = squared_norms(arrays, places)
    elif config.saliency == "random":
        costs = [cost_g.double().mean().float() for cost_g in budget.costs_of(partition, arrays, config)]
        usual_G = torch.cat([cost.expand(array.count) for cost, array in zip(costs, arrays, strict=True)])
        generator = torch.Generator("cpu").manual_seed(torch.initial_seed() + step)
        drawn_G = torch.rand(len(usual_G), dtype=torch.float32, device="cpu", generator=generator) * usual_G
        saliency_G = from_first_rank(drawn_G.to(gathered_G.device))
    else:
        saliency_G = gathered_G
    saliency_G = saliency_G.cpu()
    if not bool(saliency_G.isfinite().all()):
        raise FloatingPointError(
            f"The saliency is not finite at step {step}: gradients or weights are NaN or infinite. Lower the learning "
            f"rate and go on from the last checkpoint."
        )
    return saliency_G


def choose(
    partition: Partition,
    arrays: Sequence[GroupArray],
    config: OTOConfig,
    saliency_G: Tensor,
    alive_G: Tensor,
    share: float,
) -> Tensor:
    """
    The groups of the lowest saliency per cost, for what has to be removed by the end of a period.

    Args:
        partition ([`~hf_oto.models.groups.Partition`]): All groups that the model has now.
        arrays (`Sequence[GroupArray]`): Those of the chosen structures.
        config ([`OTOConfig`]): The settings.
        saliency_G (`Tensor`): Saliency, on the CPU, not yet divided by its cost.
        alive_G (`Tensor`): Which may go, bool `[G]`, on the CPU.
        share (`float`): Share of the dense architecture to be removed.

    Returns:
        `Tensor`: bool `[G]`.
    """
    alive = dict(zip(((array.layer, array.kind) for array in arrays), counts(alive_G, arrays), strict=True))
    kept = [alive.get((array.layer, array.kind), array.count) for array in partition.arrays]
    total, removed = budget.dense_cost(partition, config), budget.removed_cost(partition, config, kept)
    allowed = budget.allowance(share, total) - removed
    if config.uniform:
        return _uniformly(partition, arrays, config, saliency_G, alive_G, allowed)
    sizes = torch.tensor([array.count for array in arrays], device="cpu")
    limits = torch.tensor([budget.floor_and_multiple(array.kind, config) for array in arrays], device="cpu")
    return budget.select_groups(
        saliency_G,
        torch.cat(budget.costs_of(partition, arrays, config)),
        torch.arange(sizes.numel(), device="cpu").repeat_interleave(sizes),
        alive_G,
        allowed,
        limits[:, 0],
        limits[:, 1],
    )


def _uniformly(
    partition: Partition,
    arrays: Sequence[GroupArray],
    config: OTOConfig,
    saliency_G: Tensor,
    alive_G: Tensor,
    allowed: int,
) -> Tensor:
    """The groups of the lowest saliency in every block, as many of a kind in each."""
    saliencies, alive = split(saliency_G, arrays), split(alive_G, arrays)
    costs = budget.costs_of(partition, arrays, config)
    scores, next_costs, cuts = {}, {}, {}
    for kind in config.structures:
        mine = [index for index, array in enumerate(arrays) if array.kind == kind]
        if not mine:
            continue
        left = int(alive[mine[0]].sum())
        scores[kind] = torch.stack([saliencies[index][alive[index]] for index in mine])
        next_costs[kind] = costs[mine[0]][arrays[mine[0]].count - left :]
        cuts[kind] = budget.uniform_cuts(partition, kind, left, *budget.floor_and_multiple(kind, config))
    number = budget.select_uniformly(scores, next_costs, cuts, allowed)
    chosen_G = torch.zeros_like(alive_G)
    for array, chosen, saliency_g, alive_g in zip(arrays, split(chosen_G, arrays), saliencies, alive, strict=True):
        lowest = saliency_g.double().masked_fill(~alive_g, torch.inf).sort(stable=True).indices
        chosen[lowest[: number[array.kind]]] = True
    return chosen_G


def target_examples(partition: Partition, config: OTOConfig) -> dict[str, list[int]]:
    """
    What a target may leave. Which groups go is for the training to find; these are the two extremes, and the cut that
    takes the same share of every array. With `uniform=True` every block keeps as many in each of them.

    Returns:
        `dict[str, list[int]]`: Groups kept of every array, by `"heads first"`, `"evenly"` and `"neurons first"`.

    Raises:
        `ValueError`: See [`~hf_oto.hspg.budget.check_target`].
    """
    budget.check_target(partition, config)
    arrays = [array for array in partition.arrays if array.kind in config.structures and array.count]
    kept = {name: [array.count for array in partition.arrays] for name in ("heads first", "evenly", "neurons first")}
    if not arrays:
        return kept
    array_G = torch.arange(len(arrays), device="cpu").repeat_interleave(
        torch.tensor([array.count for array in arrays], device="cpu")
    )
    mean_B = torch.stack([cost_g.double().mean() for cost_g in budget.costs_of(partition, arrays, config)])
    heads_B = torch.tensor([array.kind == "heads" for array in arrays], device="cpu")
    rank_G = torch.cat([(torch.arange(array.count, device="cpu").double() + 0.5) / array.count for array in arrays])
    alive_G = torch.ones_like(array_G, dtype=torch.bool)
    # Scores per cost about 1 within the kind that goes first, far beyond it in the other.
    late = {"heads first": ~heads_B, "evenly": heads_B & ~heads_B, "neurons first": heads_B}
    for name, late_B in late.items():
        score_G = (rank_G + 1e9 * late_B[array_G]) * mean_B[array_G]
        chosen_G = choose(partition, arrays, config, score_G, alive_G, config.target_sparsity or 0.0)
        for array, gone in zip(arrays, counts(chosen_G, arrays), strict=True):
            kept[name][partition.arrays.index(array)] -= gone
    return kept
