"""Context managers of several rooms: files that appear whole or not at all; another mode or number of threads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .architectures import BLOCK_SPECS, dense_model_type

UNFINISHED = ".unfinished-"  # and the number of the process that writes

# Where a Transformers model keeps how the names in its checkpoint differ from its own, for `save_pretrained`.
CONVERSIONS = "_weight_conversions"


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """
    A new hidden folder beside `target`, on the same disk: what is complete moves into its place by a rename. The
    folder goes at the end, with all that was not moved, and with it those of processes that were killed.
    """
    missing = [parent for parent in target.parents if not parent.exists()]  # the deepest first
    target.parent.mkdir(parents=True, exist_ok=True)
    start = f".{target.name}{UNFINISHED}"
    for left in target.parent.glob(f"{escape(start)}*"):
        number = left.name.removeprefix(start)
        if number.isdecimal() and not _runs(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    folder = target.with_name(f"{start}{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)  # of another process that had this number
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # where something moved in, they are not empty and stay
            for parent in missing:
                parent.rmdir()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks, and does nothing
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's, or none of this machine's
        pass
    return True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules is in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def dropping_modules(model: PreTrainedModel) -> list[nn.Module]:
    """
    What drops out in training mode: `nn.Dropout`, and the blocks' attentions, which do it by themselves. Set to
    evaluation mode they let everything through, and whoever calls them still trains: gradients are checkpointed.
    """
    spec = BLOCK_SPECS[dense_model_type(model.config.model_type)]
    blocks: Any = model.base_model.get_submodule(spec.blocks)
    attentions = {block.get_submodule(spec.attention) for block in blocks}
    return [module for module in model.modules() if isinstance(module, nn.Dropout) or module in attentions]


@contextmanager
def using_threads(number: int | None) -> Iterator[int]:
    """So many threads of one operation, torch's own number if `None`; afterwards those of before. Gives the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield number or before
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """
    `save_pretrained` writes weights under the names that they have in the model. Some families' it gives older ones
    (ViT's, ESM's), which `from_pretrained` knows and `load_state_dict` does not.
    """
    state: dict[str, Any] = vars(model)
    conversions = state.get(CONVERSIONS)
    state[CONVERSIONS] = []
    try:
        yield
    finally:
        state[CONVERSIONS] = conversions
