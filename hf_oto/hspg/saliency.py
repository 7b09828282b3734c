"""Scores of zero-invariant groups from gradients.

Shapes: `H` hidden size, `G` groups, `D` columns that one group owns.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CACHED = 2**17  # numbers in float32: half a second-level cache of 1 MiB


def mask_derivatives(columns_HC: Tensor, gradient_HC: Tensor, width: int) -> Tensor:
    """
    Derivative of the loss by a mask m_g = 1 on each group's output: ⟨W[:, g], ∂L/∂W[:, g]⟩.

    Scaling the output of a structure is scaling the columns that read it, so the columns alone give it exactly.
    Kwon et al. (NeurIPS 2022, arXiv:2204.09656) introduce the masks.

    Shapes: [H, G·D], [H, G·D], D -> float32 [G].
    """
    # On the CPU weights and gradients are read once, and the sums over rows stay in the cache.
    rows = max(1, _CACHED // columns_HC.shape[1]) if columns_HC.is_cpu else columns_HC.shape[0]
    sums_RC = torch.zeros(min(rows, columns_HC.shape[0]), columns_HC.shape[1], device=columns_HC.device)
    for columns_RC, gradient_RC in zip(columns_HC.split(rows), gradient_HC.split(rows), strict=True):
        sums_RC[: columns_RC.shape[0]].addcmul_(columns_RC, gradient_RC)
    return sums_RC.sum(dim=0).unflatten(0, (-1, width)).sum(dim=1)


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
