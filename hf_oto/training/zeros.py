"""Whether what was pruned still is: the weights are asked, not the optimizer."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..hspg.optimizer import HSPG
from ..models.groups import partition

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
    masks = hspg.zero_masks()
    expected, left = {"heads": 0, "neurons": 0}, {"heads": 0, "neurons": 0}
    for array, cut in zip(hspg.partition.arrays, partition(small).arrays, strict=True):
        gone = masks.get((array.layer, array.kind))
        expected[array.kind] += array.count - (0 if gone is None else int(gone.sum()))
        left[array.kind] += cut.count
    if any(left[kind] > expected[kind] for kind in left):
        raise ValueError(
            f"The model has {left['heads']} heads and {left['neurons']} neurons left, where {expected['heads']} and "
            f"{expected['neurons']} were not pruned: it is not saved as if it was. {_REMEDY}"
        )
