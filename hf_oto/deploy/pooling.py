"""What a folder of sentence-transformers does with a model's tokens: one embedding of each text.

Shapes: `B` texts, `L` tokens, `H` hidden size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

MODULES = "modules.json"
# By the names in `1_Pooling/config.json`: one name since sentence-transformers 5, before it a flag for each, in the
# order in which it puts the results one after another, whatever that of the file.
_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
}


@dataclass(frozen=True)
class Pooling:
    """How token embeddings become the embedding of a text.

    Args:
        modes (`tuple[str, ...]`): `"cls"`, `"mean"`, `"max"` or `"mean_sqrt_len_tokens"`; the results of several are
            put one after another.
        normalize (`bool`): Whether the embedding is brought to length 1.
    """

    modes: tuple[str, ...]
    normalize: bool

    @classmethod
    def from_folder(cls, folder: Path) -> Pooling:
        """
        Read the modules of a sentence-transformers folder.

        Raises:
            `ValueError`: It is no such folder, or has a module or a mode that is not one of these.
        """
        if not (folder / MODULES).is_file():
            raise ValueError(f"{folder} has no {MODULES}, so it does not say how to pool. Leave pooling out.")
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise ValueError(
                f"{folder} has the modules {', '.join(kinds)}; inside the graph there can be Transformer, Pooling and "
                f"Normalize, in this order. Leave pooling out."
            )
        settings = json.loads((folder / modules[1]["path"] / "config.json").read_text(encoding="utf-8"))
        modes = _modes(settings)
        unknown = [mode for mode in modes if mode not in _FLAGS]
        if unknown or not modes:
            raise ValueError(f"{folder} pools by {unknown or 'nothing'}; known are {', '.join(_FLAGS)}.")
        if not settings.get("include_prompt", True):
            raise ValueError(
                f"{folder} pools without the tokens of a prompt (`include_prompt` is false in its Pooling), which a "
                f"graph cannot tell from the others. Leave pooling out."
            )
        return cls(modes, "Normalize" in kinds)

    def __call__(self, states_BLH: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """The embeddings, `[B, H]` for each mode."""
        mask_BL1 = attention_mask_BL.unsqueeze(-1).to(states_BLH.dtype)
        length_B1 = mask_BL1.sum(1).clamp(min=1e-9)
        found = []
        for mode in self.modes:
            if mode == "cls":
                found.append(states_BLH[:, 0])
            elif mode == "max":
                found.append(states_BLH.masked_fill(mask_BL1 == 0, -torch.inf).amax(1))
            else:
                found.append((states_BLH * mask_BL1).sum(1) / (length_B1 if mode == "mean" else length_B1.sqrt()))
        pooled = torch.cat(found, dim=-1)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled


def _modes(settings: dict[str, Any]) -> tuple[str, ...]:
    named = settings.get("pooling_mode")
    if named is not None:
        return (named,) if isinstance(named, str) else tuple(named)
    flags = {name for name, on in settings.items() if name.startswith("pooling_mode_") and on}
    found = [mode for mode, flag in _FLAGS.items() if flag in flags]
    return (*found, *sorted(flags.difference(_FLAGS.values())))


class PooledModel(nn.Module):
    """A base model that gives `sentence_embedding`, the embedding of the text, beside its tokens' own."""

    def __init__(self, model: PreTrainedModel, pooling: Pooling) -> None:
        super().__init__()
        self.model, self.pooling, self.config = model, pooling, model.config
        self.main_input_name = model.main_input_name

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        inputs.pop("return_dict", None)
        states_BLH = self.model(**inputs, return_dict=True).last_hidden_state
        pooled = self.pooling(states_BLH, inputs["attention_mask"])
        return {"last_hidden_state": states_BLH, "sentence_embedding": pooled}
