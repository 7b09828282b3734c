"""A small BERT that learns to read from scratch in minutes: random weights with three habits.

Learning to answer questions means learning to look for the question's words in the text, and from scratch that takes
longer than a demo lasts. So three heads of every layer begin with such a habit, as random projections that training is
free to change; values, outputs, feed-forward layers and the fourth head are plain random.

The hidden size H is split: words in the first dims, positions in the next D (a head's size), the segment in the last.

Shapes: `H` hidden size, `D` head size, `T` positions.
"""

import torch
from transformers import BertConfig, BertForQuestionAnswering

SEGMENT = 4  # dims that say whether a token is of the question
CHOICE = 8  # dims of a head that prefers the question, whatever the word
WIDEST = 50.0  # base of the wavelengths of positions
BACK = 2.5  # words between a value and what is said of it, about


@torch.no_grad()
def make_model(config: BertConfig, seed: int = 0) -> BertForQuestionAnswering:
    """
    A model to be trained from scratch.

    Args:
        config (`BertConfig`): At least three heads.
        seed (`int`, *optional*, defaults to 0): Of the random weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForQuestionAnswering(config)
        head = config.hidden_size // config.num_attention_heads
        words = config.hidden_size - head - SEGMENT
        embeddings = model.bert.embeddings
        embeddings.word_embeddings.weight.normal_()[:, words:] = 0
        wavelengths, waves = positions(config.max_position_embeddings, head)
        embeddings.position_embeddings.weight[:, words : words + head] = waves
        embeddings.token_type_embeddings.weight[:, -SEGMENT:] = torch.tensor([[1.0], [-1.0]])
        for layer in model.bert.encoder.layer:
            attention = layer.attention.self
            query, key = (one.weight.unflatten(0, (-1, head)) for one in (attention.query, attention.key))
            bias = attention.query.bias.unflatten(0, (-1, head))
            query[:3], key[:3] = 0, 0
            # The same word, in the question first.
            query[0, :-CHOICE, :words] = torch.randn(head - CHOICE, words) * 2 / words**0.5
            key[0] = query[0]
            key[0, -CHOICE:, -SEGMENT:] = 1 / SEGMENT
            bias[0, -CHOICE:] = 3
            # A few words back.
            key[1, :, words : words + head] = torch.eye(head)
            query[1, :, words : words + head] = rotation(wavelengths * BACK)
            # The question.
            key[2, :, -SEGMENT:] = 1 / SEGMENT
            bias[2] = 3
    return model


def positions(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Angular speeds `[D/2]`; sines and cosines in turn `[T, D]`. Vaswani et al. (arXiv:1706.03762), section 3.5."""
    speeds = WIDEST ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(count)[:, None] * speeds
    return speeds, 2**0.5 * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def rotation(angles: torch.Tensor) -> torch.Tensor:
    """The matrix `[D, D]` that turns every (sine, cosine) back by an angle `[D/2]`: a position some words earlier."""
    sine, cosine = angles.sin(), angles.cos()
    return torch.block_diag(*torch.stack([cosine, -sine, sine, cosine], dim=-1).unflatten(-1, (2, 2)))
