"""Where each Transformers family keeps its attention heads and FFN neurons: data, no logic.

Adding a family is one row of [`BLOCK_SPECS`] and one line in the tests' list of families.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockSpec:
    """The paths and names by which the transformer blocks of one `model_type` are read and resized.

    Module paths are relative to one block, `blocks` is relative to the base model. Weights are `nn.Linear`'s:
    rows (dim 0) are outputs, columns (dim 1) are inputs.

    Args:
        blocks (`str`): Path of the `nn.ModuleList` of blocks inside the base model.
        attention (`str`): Path of the module that splits its projections into heads.
        query, key, value (`str`): Projections whose rows, with their biases, are grouped by head.
        attention_out (`str`): Projection whose columns are grouped by head.
        neurons_in (`str`): Projection whose rows, with its bias, are the FFN neurons.
        neurons_out (`str`): Projection whose columns are the FFN neurons.
        heads_field (`str`): Field of the config, and attribute of the attention module, that counts the heads.
        width_field (`str`): Field of the config that counts the neurons.
        activation (`str`): Path of the FFN's activation; act(0) must be 0.
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
    activation: str
    heads_field: str = "num_attention_heads"
    width_field: str = "intermediate_size"
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
}

# The pruned architectures' `model_type` is this prefix and the family's own, "-" written as "_": "oto_xlm_roberta".
PRUNED_PREFIX = "oto_"


def dense_model_type(model_type: str) -> str:
    """The family that a `model_type` belongs to: `"oto_xlm_roberta"` and `"xlm-roberta"` both give `"xlm-roberta"`."""
    if model_type.startswith(PRUNED_PREFIX):
        name = model_type.removeprefix(PRUNED_PREFIX)
        return next((family for family in BLOCK_SPECS if family.replace("-", "_") == name), model_type)
    return model_type
