"""Whether what was pruned still is: the weights are asked, not the optimizer."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..hspg.optimizer import HSPG
from ..models.groups import partition
from ..models.surgery import evenly

_REMEDY = (
    "Something beside the optimizer has written weights since: averages of weights that are copied in, a callback "
    "that restores an earlier state, a penalty that began late. Leave what is zero as it is "
    "(`trainer.hspg.zero_masks()` says what is), or do it before pruning begins, and go on from the last checkpoint."
)


def check_zeros(hspg: HSPG) -> None:
    """Stop a run whose groups do not stay zero: it would end larger than it says. Every rank has to call it."""
    lost = {"heads": 0, "neurons": 0}
    measured = hspg.zero_masks(measured=True)
    for place, mask in hspg.zero_masks().items():
        lost[place[1]] += int((mask & ~measured[place]).sum())
    if any(lost.values()):
        raise ValueError(
            f"{lost['heads']} heads and {lost['neurons']} neurons that were zero are not any more at step "
            f"{hspg.steps_done}. {_REMEDY}"
        )


def check_size(small: PreTrainedModel, hspg: HSPG | None) -> None:
    """Refuse to save a small model that has more left than what was pruned from it."""
    if hspg is None:
        return
    arrays, masks = hspg.partition.arrays, hspg.zero_masks()
    kept = [torch.ones(array.count, dtype=torch.bool, device="cpu") for array in arrays]
    for array, keep in zip(arrays, kept, strict=True):
        if (place := (array.layer, array.kind)) in masks:
            keep &= ~masks[place]
    if hspg.config.uniform:
        kept = evenly(hspg.partition, kept)
    expected, left = {"heads": 0, "neurons": 0}, {"heads": 0, "neurons": 0}
    for array, keep, cut in zip(arrays, kept, partition(small).arrays, strict=True):
        expected[array.kind] += int(keep.sum())
        left[array.kind] += cut.count
    if any(left[kind] > expected[kind] for kind in left):
        raise ValueError(
            f"The model has {left['heads']} heads and {left['neurons']} neurons left, where {expected['heads']} and "
            f"{expected['neurons']} were not pruned: it is not saved as if it was. {_REMEDY}"
        )
