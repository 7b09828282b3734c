"""The half-space step, as a pure function over lists of weights.

Shapes: `A` the groups acted on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from .group_weights import GroupWeights
from .stacked_weights import Stacked

Weights: TypeAlias = Sequence[GroupWeights] | Sequence[Stacked]


def penalized(step: Tensor, before: Tensor, factor: Tensor | float) -> Tensor:
    """The trial iterate x̂_g = x⁺_g − c_g·x_g, in place of x⁺, the base optimizer's step.

    As published c_g = αλ/‖x_g‖ (OTO, arXiv:2107.07467, section 3.2). With a target λ_g = ‖x_g‖/(α·r), so c_g = 1/r:
    with r steps left the penalty takes the r-th part of the group away, and all that is left at the last step.

    Shapes: all alike, or a factor that broadcasts.
    """
    return step.sub_(before * factor) if isinstance(factor, Tensor) else step.sub_(before, alpha=factor)


def outside_half_space(dot_A: Tensor, sq_norm_A: Tensor, epsilon: float) -> Tensor:
    """Which groups' trial iterates left the half-space: ⟨x̂_g, x_g⟩ < ε‖x_g‖². A group that is zero has none: outside.

    Shapes: [A], [A] -> bool [A]. OTO (arXiv:2107.07467), half-space step.
    """
    return (dot_A < epsilon * sq_norm_A) | (sq_norm_A == 0)


def half_space_step(
    weights: Weights,
    before: list[Tensor],
    sq_norm_A: Tensor,
    *,
    epsilon: float | None,
    steps_left: int | None,
    lmbda: float,
    keep: bool,
    reduce: Callable[[Tensor], None],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """
    Penalty, half-space test and projection, in place of what the base optimizer's step left.

    Beside the weights there is one copy of those acted on, `before`, which this uses up one by one.

    Args:
        weights (`Sequence[GroupWeights]` or `Sequence[Stacked]`):
            What the groups own. Of many parameters at once, nothing waits for the test's outcome: all is written once.
            Otherwise each is written while it is in the cache, and again if its group is projected.
        before (`list[Tensor]`): x_k: what `weights` held before the step, in their order. It is empty afterwards.
        sq_norm_A (`Tensor`): ‖x_k‖² of the groups.
        epsilon (`float`, *optional*): ε; `None` tests nothing, as in the published warm-up. What is zero stays zero.
        steps_left (`int`, *optional*): r, with a target; `None` is the penalty as published.
        lmbda (`float`): λ of the penalty as published.
        keep (`bool`): Whether what was written is handed back.
        reduce (`Callable`): Adds the sums of other ranks, in place.

    Returns:
        `tuple[Tensor, list[Tensor], Tensor]`: Which groups are zero now, bool `[A]`; x_{k+1} in the order of
        `weights`, and ‖x_{k+1}‖², both if they are kept.
    """
    inverse_norm_A = sq_norm_A.sqrt().reciprocal().nan_to_num(posinf=0.0) if steps_left is None else sq_norm_A

    def trial_of(part: Any, x: Tensor) -> Tensor:
        factor: Tensor | float
        if steps_left is None:
            factor = part.along(inverse_norm_A).to(x.dtype) * (part.group["lr"] * lmbda)
        else:
            factor = 1 / steps_left
        return penalized(part.read(), x, factor)

    def zero_of(dot_A: Tensor) -> Tensor:
        reduce(dot_A)
        return sq_norm_A == 0 if epsilon is None else outside_half_space(dot_A, sq_norm_A, epsilon)

    step: Callable[..., Any] = _multi_tensor_step if isinstance(weights[0], Stacked) else _cached_step
    return step(weights, before, torch.zeros_like(sq_norm_A), trial_of, zero_of, keep)


def read(weights: Weights, zeros_A: Tensor) -> tuple[list[Tensor], Tensor]:
    """What the weights hold, in their order, and ‖x_g‖² of the groups on this rank, added to `zeros_A`."""
    values = [part.read() for part in weights]
    if isinstance(weights[0], Stacked):
        norms = zeros_A.new_zeros(len(weights), len(zeros_A))
        for part, norm_A, value in zip(weights, norms, values, strict=True):
            cast(Stacked, part).put_norms(norm_A, value)
        return values, zeros_A.add_(norms.square_().sum(dim=0))
    for part, value in zip(weights, values, strict=True):
        cast(GroupWeights, part).add_squares(zeros_A, value)
    return values, zeros_A


def _multi_tensor_step(
    weights: Sequence[Stacked],
    before: list[Tensor],
    zeros_A: Tensor,
    trial_of: Callable[[Any, Tensor], Tensor],
    zero_of: Callable[[Tensor], Tensor],
    keep: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    after, (dots, norms) = [], zeros_A.new_zeros(2, len(weights), len(zeros_A))
    for part, dot_A, norm_A in zip(weights, dots, norms, strict=True):
        x = before.pop(0)
        trial = trial_of(part, x)
        part.put_products(dot_A, x, trial)
        del x
        if keep:
            part.put_norms(norm_A, trial)
        after.append(trial)
    zero_A = zero_of(dots.sum(dim=0))
    for part, trial in zip(weights, after, strict=True):
        part.write(trial.masked_fill_(part.along(zero_A), 0))
    return zero_A, after if keep else [], norms.square_().sum(dim=0).masked_fill_(zero_A, 0)


def _cached_step(
    weights: Sequence[GroupWeights],
    before: list[Tensor],
    dot_A: Tensor,
    trial_of: Callable[[Any, Tensor], Tensor],
    zero_of: Callable[[Tensor], Tensor],
    keep: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    after, after_A = [], torch.zeros_like(dot_A)
    for part in weights:
        x = before.pop(0)
        trial = trial_of(part, x)
        part.write(trial)
        part.add_products(dot_A, x, trial)
        del x
        if keep:
            after.append(trial)
            part.add_squares(after_A, trial)
        del trial
    zero_A = zero_of(dot_A)
    if bool(zero_A.any()):
        for index, part in enumerate(weights):
            trial = after[index] if keep else part.read()
            part.write(trial.masked_fill_(part.along(zero_A), 0))
    return zero_A, after, after_A.masked_fill_(zero_A, 0)
