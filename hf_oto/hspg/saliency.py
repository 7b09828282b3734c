"""Scores of zero-invariant groups from gradients.

Shapes: `H` hidden size, `G` groups, `D` columns that one group owns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..models.groups import GroupArray
from . import devices
from .group_weights import Places
from .sharding import local, sum_over_shards


def mask_derivatives(columns_HC: Tensor, gradient_HC: Tensor, width: int) -> Tensor:
    """
    Derivative of the loss by a mask m_g = 1 on each group's output: ⟨W[:, g], ∂L/∂W[:, g]⟩.

    Scaling the output of a structure is scaling the columns that read it, so the columns alone give it exactly.
    Kwon et al. (NeurIPS 2022, arXiv:2204.09656) introduce the masks.

    Shapes: [H, G·D], [H, G·D], D -> float32 [G].
    """
    # Weights and gradients are read once, and where there is a cache, the sums over rows stay in it.
    rows = max(1, devices.entries(columns_HC) // columns_HC.shape[1])
    shape = min(rows, columns_HC.shape[0]), columns_HC.shape[1]
    sums_RC = torch.zeros(shape, dtype=torch.float32, device=columns_HC.device)
    for columns_RC, gradient_RC in zip(columns_HC.split(rows), gradient_HC.split(rows), strict=True):
        sums_RC[: columns_RC.shape[0]].addcmul_(columns_RC, gradient_RC)
    return sums_RC.sum(dim=0).unflatten(0, (-1, width)).sum(dim=1)


def gathered_derivatives(arrays: Sequence[GroupArray], places: Places) -> Tensor:
    """[`mask_derivatives`] of every group, from the gradients that the parameters have now: float32 `[G]`."""
    parameters = [places[array.columns][0] for array in arrays]
    columns = [local(parameter) for parameter in parameters]
    gradients = [None if parameter.grad is None else local(parameter.grad) for parameter in parameters]
    if devices.gathers(columns[0]):
        found = [_derivatives(*given) for given in zip(arrays, columns, gradients, strict=True)]
    else:
        found = _multi_tensor_derivatives(arrays, columns, gradients)
    gathered_G = torch.cat(found)
    sum_over_shards(gathered_G, parameters)
    return gathered_G


def _derivatives(array: GroupArray, columns: Tensor, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.zeros(array.count, dtype=torch.float32, device=columns.device)
    return mask_derivatives(columns, gradient, array.width)


def _multi_tensor_derivatives(
    arrays: Sequence[GroupArray], columns: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor]:
    """Matrices of one shape together, up to as many entries as are held at once."""
    alike = defaultdict(list)
    for index, (array, own, gradient) in enumerate(zip(arrays, columns, gradients, strict=True)):
        alike[own.shape, array.width, None if gradient is None else gradient.dtype].append(index)
    found: dict[int, Tensor] = {}
    for (shape, width, dtype), indices in alike.items():
        together = len(indices) if dtype is None else max(1, devices.entries(columns[0]) // max(1, shape.numel()))
        for first in range(0, len(indices), together):
            some = indices[first : first + together]
            if dtype is None:
                products = columns[0].new_zeros(len(some), 1, shape[1], dtype=torch.float32)
            else:
                products = torch.stack([cast(Tensor, gradients[index]) for index in some]).float()
                torch._foreach_mul_(list(products.unbind()), [columns[index] for index in some])
            sums = products.unflatten(2, (-1, width)).sum(dim=(1, 3))
            found.update(zip(some, sums.unbind(), strict=True))
    return [found[index] for index in range(len(arrays))]


def saliency_of(derivatives_G: Tensor, kind: str) -> Tensor:
    """
    What one micro-step says of the groups' saliency.

    `"fisher"`: (∂L/∂m_g)², whose mean is the empirical Fisher information of the mask (Kwon et al., section 4.1);
    `"taylor"`: |∂L/∂m_g|.

    Shapes: [G] -> [G].
    """
    return derivatives_G.square() if kind == "fisher" else derivatives_G.abs()


def update_saliency(saliency_G: Tensor, observed_G: Tensor, decay: float) -> None:
    """
    Move the running mean by one optimizer step's observation, in place: s ← decay·s + (1 − decay)·observed.

    Shapes: [G], [G].
    """
    saliency_G.lerp_(observed_G, 1 - decay)


class Observations:
    """
    What the micro-steps of one optimizer step say of the groups' saliency; false without any.

    A step's gradient is the mean over its K micro-steps, so that each of them adds γ = d/K to it, with d the
    derivatives of its own loss. What counts is the mean of d² (or of |d|), which does not depend on K:

        (1/K)·Σ_m w_m·(K·γ_m)²  for `"fisher"`,   (1/K)·Σ_m √w_m·K·|γ_m|  for `"taylor"`.

    The square of a mean over n rows falls as 1/n where rows differ more than their mean is large, as in training they
    do: weights w ∝ n keep a batch of one row from counting as much as n others. Where all steps are alike, none of it
    changes which groups are lowest.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._observed: list[Tensor] = []
        self._gathered_G: Tensor | None = None  # derivatives of the gradients added up so far

    def __bool__(self) -> bool:
        return bool(self._observed)

    def add(self, gathered_G: Tensor, *, accumulated: bool, weight: float | Tensor = 1.0) -> None:
        """Add a micro-step: whose gradients were added to those of the last one, or with which a step begins."""
        if not accumulated:
            self.clear()
        own_G = gathered_G if self._gathered_G is None else gathered_G - self._gathered_G
        observed_G = saliency_of(own_G, self.kind)
        factor = weight if self.kind == "fisher" else weight**0.5
        usual = not isinstance(factor, Tensor) and factor == 1  # a tensor is not asked: its device may be at work
        self._observed.append(observed_G if usual else observed_G * factor)
        self._gathered_G = gathered_G

    def mean(self) -> Tensor:
        """Mean over the micro-steps."""
        total = sum(self._observed[1:], start=self._observed[0])
        return total * len(self._observed) if self.kind == "fisher" else total
