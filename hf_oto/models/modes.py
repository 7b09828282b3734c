"""In which mode a model's modules are: training or evaluation, dropping out or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .configuration_oto import BLOCK_SPECS, dense_model_type


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
