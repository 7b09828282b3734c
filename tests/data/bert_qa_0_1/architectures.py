"""Where each Transformers family keeps its attention heads and FFN neurons: data, no logic.

Adding a family is one row of [`BLOCK_SPECS`], one of `FAMILIES` in `modeling.py`, and one in the tests' list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class BlockSpec:
    """The paths and names by which the transformer blocks of one `model_type` are read and resized.

    Module paths are relative to one block, `blocks` and `embeddings` are relative to the base model. Weights are
    `nn.Linear`'s: rows (dim 0) are outputs, columns (dim 1) are inputs. Projections with the same path are one matrix,
    in which they lie one after another.

    Args:
        blocks (`str`): Path of the `nn.ModuleList` of blocks inside the base model.
        attention (`str`): Path of the module that splits its projections into heads.
        query, key, value (`str`): Projections whose rows, with their biases, are grouped by head.
        attention_out (`str`): Projection whose columns are grouped by head.
        neurons_in (`str`): Projection whose rows, with its bias, are the FFN neurons.
        neurons_out (`str`): Projection whose columns are the FFN neurons.
        activation (`str`, *optional*): Path of the FFN's activation; act(0) must be 0. `None`: it is GELU for sure.
        gate (`str`, *optional*): Projection whose outputs are multiplied by the activated ones, in a gated FFN.
        positions (`tuple[tuple[str, str], ...]`): Projections of positions whose rows are grouped by head as well,
            each with what the config's `pos_att_type` holds where the blocks have it.
        head_norms (`tuple[str, ...]`): Normalizations inside a head, one for all of them, which go with the last.
        position_bias (`bool`): Whether every block's attention is given the same bias, with an entry for each head.
        heads_field (`str`): Field of the config that counts the heads.
        key_heads_field (`str`, *optional*): Field of the config that counts the key/value heads, where several heads
            read one. A group is then such a head and those that read it.
        width_field (`str`): Field of the config that counts the neurons.
        query_bias, out_bias, neuron_bias (`bool` or `str`): Whether the projections of queries, keys and values, that
            of the attention's output, and those of the FFN have biases, or the config's flag that says so.
        own_head_size (`bool`): Whether the family's config has a head size of its own (`head_dim`), which need not be
            the hidden size divided by the number of heads.
        embeddings (`str`): Path of the embeddings inside the base model.
        refused (`tuple[tuple[str, str], ...]`): Config flags that must be off, each with the reason.
    """

    blocks: str
    attention: str
    query: str
    key: str
    value: str
    attention_out: str
    neurons_in: str
    neurons_out: str
    activation: str | None
    gate: str | None = None
    positions: tuple[tuple[str, str], ...] = ()
    head_norms: tuple[str, ...] = ()
    position_bias: bool = False
    heads_field: str = "num_attention_heads"
    key_heads_field: str | None = None
    width_field: str = "intermediate_size"
    query_bias: bool | str = True
    out_bias: bool | str = True
    neuron_bias: bool | str = True
    own_head_size: bool = False
    embeddings: str = "embeddings"
    refused: tuple[tuple[str, str], ...] = (
        ("is_decoder", "a decoder's key/value cache is laid out by head"),
        ("add_cross_attention", "cross-attention heads read another model's states"),
    )


_BERT = BlockSpec(
    blocks="encoder.layer",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_out="attention.output.dense",
    neurons_in="intermediate.dense",
    neurons_out="output.dense",
    activation="intermediate.intermediate_act_fn",
)

_WAV2VEC2 = BlockSpec(
    blocks="encoder.layers",
    attention="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    attention_out="attention.out_proj",
    neurons_in="feed_forward.intermediate_dense",
    neurons_out="feed_forward.output_dense",
    activation="feed_forward.intermediate_act_fn",
    embeddings="feature_extractor",
    refused=(),
)

_LLAMA = BlockSpec(
    blocks="layers",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_out="self_attn.o_proj",
    neurons_in="mlp.gate_proj",
    gate="mlp.up_proj",
    neurons_out="mlp.down_proj",
    activation="mlp.act_fn",
    key_heads_field="num_key_value_heads",
    query_bias="attention_bias",
    out_bias="attention_bias",
    neuron_bias="mlp_bias",
    own_head_size=True,
    embeddings="embed_tokens",
    refused=(),
)

BLOCK_SPECS: dict[str, BlockSpec] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": BlockSpec(
        blocks="transformer.layer",
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_out="attention.out_lin",
        neurons_in="ffn.lin1",
        neurons_out="ffn.lin2",
        activation="ffn.activation",
        heads_field="n_heads",
        width_field="hidden_dim",
        refused=(),
    ),
    "camembert": _BERT,
    "bert-generation": _BERT,
    "mpnet": replace(
        _BERT,
        attention="attention.attn",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_out="attention.attn.o",
        position_bias=True,
        refused=(),
    ),
    "esm": replace(_BERT, activation=None),
    "modernbert": BlockSpec(
        blocks="layers",
        attention="attn",
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        attention_out="attn.Wo",
        neurons_in="mlp.Wi",
        gate="mlp.Wi",
        neurons_out="mlp.Wo",
        activation="mlp.act",
        query_bias="attention_bias",
        out_bias="attention_bias",
        neuron_bias="mlp_bias",
        refused=(),
    ),
    "deberta-v2": replace(
        _BERT,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        positions=(("attention.self.pos_key_proj", "c2p"), ("attention.self.pos_query_proj", "p2c")),
        refused=(),
    ),
    "vit": BlockSpec(
        blocks="layers",
        attention="attention",
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        attention_out="attention.o_proj",
        neurons_in="mlp.fc1",
        neurons_out="mlp.fc2",
        activation="mlp.activation_fn",
        query_bias="qkv_bias",
        refused=(),
    ),
    "wav2vec2": _WAV2VEC2,
    "hubert": _WAV2VEC2,
    "llama": _LLAMA,
    "qwen3": replace(_LLAMA, head_norms=("self_attn.q_norm", "self_attn.k_norm"), neuron_bias=False),
}

# Families that have blocks of this kind and are refused all the same, with the reason.
REFUSED: dict[str, str] = {
    "albert": "one block's weights serve all its layers, so that a layer cannot have sizes of its own",
    "bart": "its decoder's cross-attention heads read the encoder's states, and both have their sizes in one config",
    "t5": "its first block computes a bias by head that serves all blocks, and one config serves encoder and decoder",
    "gpt2": "its projections keep rows and columns the other way round, and its key/value cache is laid out by head",
}

# The pruned architectures' `model_type` is this prefix and the family's own, "-" written as "_": "oto_xlm_roberta".
PRUNED_PREFIX = "oto_"


def dense_model_type(model_type: str) -> str:
    """The family that a `model_type` belongs to: `"oto_xlm_roberta"` and `"xlm-roberta"` both give `"xlm-roberta"`."""
    if model_type.startswith(PRUNED_PREFIX):
        name = model_type.removeprefix(PRUNED_PREFIX)
        return next((family for family in BLOCK_SPECS if family.replace("-", "_") == name), model_type)
    return model_type


def refusal(model_type: str) -> str:
    """Why models of a `model_type` that is no family of [`BLOCK_SPECS`] are refused, and which families are not."""
    reason = f"which is refused: {REFUSED[model_type]}" if model_type in REFUSED else "whose groups are not known"
    return f"of type {model_type!r}, {reason}. Supported families: {', '.join(BLOCK_SPECS)}."


def attention_rows(spec: BlockSpec, fields: Mapping[str, Any]) -> list[str]:
    """Paths of the projections whose rows are grouped by head, in their order; those of one matrix repeat its path."""
    kinds = () if fields.get("share_att_key") or not fields.get("relative_attention") else fields["pos_att_type"]
    positions = [path for path, kind in spec.positions if kind in kinds]
    return [spec.query, spec.key, spec.value, *positions]


def has_bias(flag: bool | str, fields: Mapping[str, Any]) -> bool:
    """Whether a projection has a bias: one of a spec's flags, or what the config's field of that name says."""
    return bool(fields[flag]) if isinstance(flag, str) else flag
