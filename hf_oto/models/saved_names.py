"""Under which names `save_pretrained` writes a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Where a Transformers model keeps how the names in its checkpoint differ from its own, for `save_pretrained`.
CONVERSIONS = "_weight_conversions"


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
