"""What HSPG keeps: where it travels, in which format, and which saved one it goes on from.

It is in the first parameter group, from where `state_dict` and distributed checkpoints take it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from ..config import LatencyTable, OTOConfig
from ..models.groups import Partition
from ..renamed import OLD_SETTINGS, read_old_names

STEP, SETTINGS, SALIENCY, STATUS = "hspg_step", "hspg_settings", "hspg_saliency", "hspg_status"
KEPT, REDUNDANT, ZERO = 0, 1, 2
"""What a group's status may be."""

# What these mean, and how a run goes on from them. A version that reads an older one as it was meant counts up and
# lists both; one that cannot refuses it.
FORMAT = 1

# What settings were before there was a choice: states written then do not name them.
_OLDER_SETTINGS: dict[str, Any] = {
    "format": 1,
    "shrink_during_training": False,
    "saliency_interval": 1,
    "keep_dropout": True,
    "latency_table": None,
    "uniform": False,
    "milestones": [],
}


def bring(kept: dict[str, Any], device: torch.device) -> bool:
    """Bring what is kept to the device where the weights are now. Gives whether it was elsewhere."""
    elsewhere = [name for name in (SALIENCY, STATUS) if name in kept and kept[name].device != device]
    for name in elsewhere:
        kept[name] = kept[name].to(device)
    return bool(elsewhere)


def settings(config: OTOConfig, partition: Partition, total_steps: int) -> str:
    """What a run has to be resumed with, as JSON."""
    counts = [array.count for array in partition.arrays]
    named = {**config.to_dict(), "format": FORMAT, "total_steps": total_steps, "groups": counts}
    return json.dumps(named, sort_keys=True)


def begin(groups: Sequence[dict[str, Any]], now: str, num_groups: int) -> None:
    """
    Begin a run in an optimizer's parameter groups, or go on with the one whose state was loaded into them before.

    Args:
        groups (`Sequence[dict[str, Any]]`): Parameter groups.
        now (`str`): The run's [`settings`].
        num_groups (`int`): Zero-invariant groups that the model has.

    Raises:
        `ValueError`: They hold steps of another run.
    """
    kept = groups[0]
    if kept.get(STEP):
        try:
            check_saved(groups, [{SETTINGS: now}], num_groups)
        except ValueError as error:
            raise ValueError(
                f"`base_optimizer` has {kept[STEP]} steps of another run in it: {error} Or make the optimizer anew."
            ) from error
    else:
        for name in (SALIENCY, STATUS):
            kept.pop(name, None)
    kept.setdefault(STEP, 0)
    kept[SETTINGS] = now


def check_saved(saved: Sequence[Mapping[str, Any]], mine: Sequence[Mapping[str, Any]], num_groups: int) -> None:
    """
    Refuse parameter groups of a state that a run cannot go on from.

    Args:
        saved, mine (`Sequence[Mapping[str, Any]]`): Parameter groups.
        num_groups (`int`): Zero-invariant groups that the model has now.

    Raises:
        `ValueError`: They are not of an HSPG run with the same settings, parameters, groups and number of steps, or of
            a version of hf_oto that wrote them in another format.
    """
    theirs = saved[0] if saved else {}
    if SETTINGS not in theirs:
        raise ValueError(
            "`state_dict` holds no HSPG state, so it is of a run without compression. Start a new run from its "
            "weights instead of resuming it."
        )
    own, others = json.loads(mine[0][SETTINGS]), _OLDER_SETTINGS | _saved_settings(theirs[SETTINGS])
    if others["format"] != FORMAT:
        raise ValueError(
            f"`state_dict` is of format {others['format']}, written by another version of hf_oto; this one reads "
            f"format {FORMAT}. Resume with the version that the run began with."
        )
    if changed := sorted(name for name in own.keys() | others.keys() if own.get(name) != others.get(name)):
        listed = ", ".join(f"{name}: {_cut(others.get(name))} saved, {_cut(own.get(name))} now" for name in changed)
        raise ValueError(f"`state_dict` is of a run with other settings ({listed}). Resume with those it began with.")
    if STATUS in theirs and theirs[STATUS].numel() != num_groups:
        raise ValueError(
            f"`state_dict` is of a model with {theirs[STATUS].numel()} groups left, this one has {num_groups}. Call "
            f"`shrink` with `like`, the config saved with that model, before loading."
        )
    _check_names(saved, mine)


def _saved_settings(text: str) -> dict[str, Any]:
    """What a state was written with, by the names that it has today."""
    saved = read_old_names(json.loads(text), OLD_SETTINGS)
    if table := saved.get("latency_table"):
        saved["latency_table"] = dict(sorted(LatencyTable.from_dict(table).to_dict().items()))  # as it was written
    return saved


def _check_names(saved: Sequence[Mapping[str, Any]], mine: Sequence[Mapping[str, Any]]) -> None:
    """torch goes by position: it would give one parameter the state of another."""
    for theirs, own in zip(saved, mine, strict=False):  # torch itself counts the groups
        if "param_names" not in theirs or "param_names" not in own:
            continue
        for name, expected in zip_longest(theirs["param_names"], own["param_names"], fillvalue="none"):
            if name != expected:
                raise ValueError(
                    f"`state_dict` is of a model with other parameters, or of an optimizer with other groups of "
                    f"them: {name!r} saved, {expected!r} now. Resume with those the run began with."
                )


def _cut(value: object) -> str:
    """A setting in words, a whole table by its beginning."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
