"""Random inputs for models.

Shapes: batch, choices (multiple choice only), length.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .configuration_oto import BLOCK_SPECS, dense_model_type

OPTIONAL_INPUT = "token_type_ids"


def random_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A small batch that any task head of any family takes: tokens, images or sound."""
    config: Any = model.config
    generator = torch.Generator("cpu").manual_seed(0)  # of its own: the caller's random numbers are not used up
    here: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2
        return {"pixel_values": torch.randn(2, config.num_channels, *size, **here)}
    if model.main_input_name == "input_values":
        length = sum(config.conv_kernel) + 32 * math.prod(config.conv_stride)
        return {"input_values": torch.randn(2, length, **here)}
    # A decoder's classifier reads the last token that is not padding: where none is, it takes one row.
    single = config.pad_token_id is None and type(model).__name__.endswith("ForSequenceClassification")
    return example_batch(model, 1 if single else 4, min(longest_input(model), 32))


def example_batch(
    model: PreTrainedModel, batch_size: int, length: int, *, padded: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """
    Random tokens that any task head takes; of the second half of the rows, the second half is padding.

    Shapes: `[batch, length]`, for multiple choice `[batch, 2, length]`.
    """
    check_tokens(type(model))
    config: Any = model.config
    padding = max(config.pad_token_id or 0, 0)  # Llama's may be -1, which is none
    shape = (batch_size, 2, length) if type(model).__name__.endswith("ForMultipleChoice") else (batch_size, length)
    generator = torch.Generator("cpu").manual_seed(seed)
    # Never the padding id, from which the RoBERTas tell positions.
    input_ids = torch.randint(config.vocab_size - 1, shape, generator=generator, device="cpu")
    input_ids += input_ids >= padding
    attention_mask = torch.ones_like(input_ids)
    if padded:
        attention_mask[batch_size // 2 :, ..., (length + 1) // 2 :] = 0
    batch = {"input_ids": input_ids.masked_fill(attention_mask == 0, padding), "attention_mask": attention_mask}
    takes_types = OPTIONAL_INPUT in inspect.signature(model.forward).parameters
    if takes_types and getattr(config, "type_vocab_size", 0) > 1:
        batch[OPTIONAL_INPUT] = (torch.arange(length, device="cpu") >= length // 3).long().expand(shape).contiguous()
    return batch


def unpadded_batch(model: PreTrainedModel, batch_size: int, length: int) -> dict[str, Tensor]:
    """
    [`example_batch`] without padding, where the model is. On an accelerator no mask says so: in every forward the host
    would wait for the device to tell that it masks nothing. DeBERTa-v2 would look at the tokens instead.
    """
    batch = example_batch(model, batch_size, length, padded=False)
    if model.device.type != "cpu" and dense_model_type(model.config.model_type) != "deberta-v2":
        del batch["attention_mask"]
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def longest_input(model: PreTrainedModel) -> int:
    """Tokens that a model reads at once."""
    check_tokens(type(model))
    config: Any = model.config
    taken = config.pad_token_id + 1 if BLOCK_SPECS[dense_model_type(config.model_type)].positions_after_padding else 0
    return config.max_position_embeddings - taken


def check_tokens(model_class: type[PreTrainedModel]) -> None:
    """Raise `ValueError` if models of a class read something else than tokens."""
    if model_class.main_input_name != "input_ids":
        raise ValueError(
            f"`model` must read tokens, {model_class.__name__} reads {model_class.main_input_name!r}: there is no "
            f"timing, export or answer of it. `inspect` and `compress` take it."
        )
