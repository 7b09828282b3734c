"""Where each Transformers family keeps its attention heads and FFN neurons, and what makes its config a pruned one.

This file and `modeling_oto.py` are copied beside the weights of every pruned checkpoint, so that
`from_pretrained(..., trust_remote_code=True)` rebuilds the model where hf_oto is not installed. They import torch and
transformers only, and this one neither: the table is read without them.

A pruned config keeps the dense counts as its global values and says what each block has left in `per_layer_config`.
Adding a family is one row of [`BLOCK_SPECS`], one of [`FAMILIES`], and one in the tests' list.
"""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar


@dataclass(frozen=True)
class BlockSpec:
    """
    The paths and names by which the transformer blocks of one `model_type` are read and resized.

    Module paths are relative to one block, `blocks` and `embeddings` are relative to the base model. Weights are
    `nn.Linear`'s: rows (dim 0) are outputs, columns (dim 1) are inputs. Projections with the same path are one matrix,
    in which they lie one after another.
    """

    blocks: str  # the `nn.ModuleList` of blocks
    attention: str  # the module that splits its projections into heads
    query: str  # projections whose rows, with their biases, are grouped by head
    key: str
    value: str
    attention_out: str  # the projection whose columns are grouped by head
    neurons_in: str  # the projection whose rows, with its bias, are the FFN neurons
    neurons_out: str  # the projection whose columns are the FFN neurons
    activation: str | None  # the FFN's; act(0) must be 0. None: it is GELU for sure
    gate: str | None = None  # the projection whose outputs are multiplied by the activated ones, in a gated FFN
    # Projections of positions whose rows are grouped by head too, each with what the config's `pos_att_type` holds
    # where the blocks have it.
    positions: tuple[tuple[str, str], ...] = ()
    head_norms: tuple[str, ...] = ()  # normalizations inside a head, one for all of them, which go with the last
    position_bias: bool = False  # whether every block's attention is given the same bias, with an entry for each head
    heads_field: str = "num_attention_heads"  # the config's fields that count heads,
    width_field: str = "intermediate_size"  # neurons,
    # and key/value heads, where several heads read one. A group is then such a head and those that read it.
    key_heads_field: str | None = None
    # Whether the projections of queries, keys and values, that of the attention's output, and those of the FFN have
    # biases, or the config's flag that says so.
    query_bias: bool | str = True
    out_bias: bool | str = True
    neuron_bias: bool | str = True
    heads_divide: bool = False  # whether the family's config asks for a hidden size that is a multiple of the heads
    own_head_size: bool = False  # whether the family's config has a `head_dim`, which need not be hidden size / heads
    positions_after_padding: bool = False  # whether positions are counted from the padding token's id + 1
    embeddings: str = "embeddings"
    refused: tuple[tuple[str, str], ...] = (  # the config's flags that must be off, each with the reason
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

_ROBERTA = replace(_BERT, positions_after_padding=True)

_VIT = BlockSpec(
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
)

_WAV2VEC2 = replace(
    _VIT,
    blocks="encoder.layers",
    attention_out="attention.out_proj",
    neurons_in="feed_forward.intermediate_dense",
    neurons_out="feed_forward.output_dense",
    activation="feed_forward.intermediate_act_fn",
    query_bias=True,
    embeddings="feature_extractor",
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
    heads_divide=True,
    embeddings="embed_tokens",
    refused=(),
)

BLOCK_SPECS: dict[str, BlockSpec] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
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
    "camembert": _ROBERTA,
    "bert-generation": _BERT,
    "mpnet": replace(
        _ROBERTA,
        attention="attention.attn",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_out="attention.attn.o",
        position_bias=True,
        refused=(),
    ),
    "esm": replace(_ROBERTA, activation=None),
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
    "vit": _VIT,
    "wav2vec2": _WAV2VEC2,
    "hubert": _WAV2VEC2,
    "llama": _LLAMA,
    "qwen3": replace(
        _LLAMA, head_norms=("self_attn.q_norm", "self_attn.k_norm"), neuron_bias=False, heads_divide=False
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


def attention_rows(spec: BlockSpec, fields: Mapping[str, Any]) -> list[str]:
    """Paths of the projections whose rows are grouped by head, in their order; those of one matrix repeat its path."""
    kinds = () if fields.get("share_att_key") or not fields.get("relative_attention") else fields["pos_att_type"] or ()
    positions = [path for path, kind in spec.positions if kind in kinds]
    return [spec.query, spec.key, spec.value, *positions]


def has_bias(flag: bool | str, fields: Mapping[str, Any]) -> bool:
    """Whether a projection has a bias: one of a spec's flags, or what the config's field of that name says."""
    return bool(fields[flag]) if isinstance(flag, str) else flag


_SHORT = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
_TEXT = (*_SHORT, "ForMultipleChoice", "ForQuestionAnswering")
_SPEECH = ("ForSequenceClassification", "ForCTC")
_DECODER = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

# Every family's name in its classes, and the endings of those that have a pruned counterpart: base model, then heads.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bert": ("Bert", ("Model", "ForPreTraining", "ForNextSentencePrediction", *_TEXT)),
    "roberta": ("Roberta", ("Model", *_TEXT)),
    "xlm-roberta": ("XLMRoberta", ("Model", *_TEXT)),
    "electra": ("Electra", ("Model", "ForPreTraining", *_TEXT)),
    "distilbert": ("DistilBert", ("Model", *_TEXT)),
    "camembert": ("Camembert", ("Model", *_TEXT)),
    "bert-generation": ("BertGeneration", ("Encoder",)),
    "mpnet": ("MPNet", ("Model", *_TEXT)),
    "esm": ("Esm", ("Model", *_SHORT)),
    "modernbert": ("ModernBert", ("Model", *_TEXT)),
    "deberta-v2": ("DebertaV2", ("Model", *_TEXT)),
    "vit": ("ViT", ("Model", "ForMaskedImageModeling", "ForImageClassification")),
    "wav2vec2": ("Wav2Vec2", ("Model", "ForPreTraining", "ForAudioFrameClassification", "ForXVector", *_SPEECH)),
    "hubert": ("Hubert", ("Model", *_SPEECH)),
    "llama": ("Llama", ("Model", "ForCausalLM", *_DECODER)),
    "qwen3": ("Qwen3", ("Model", "ForCausalLM", *_DECODER)),
}

# Sizes that are no business of pruning, but of tensors that are made before the weights are looked at.
_OTHER_SIZES = ("vocab_size", "max_position_embeddings", "type_vocab_size", "embedding_size")
_LARGEST_SIZE = 2**31 - 1  # of products of two of them none overflows
_MOST_LABELS = 2**20  # upstream makes up a name for each
_READ_CONFIGS = ("transformers.configuration_utils", "transformers.integrations.heterogeneity")  # for whoever asks
_FLOATS = r"(torch\.)?(b?float(16|32|64)|half|float|double)"


class PrunedConfig:
    """
    What the pruned configs add to their family's config.

    Args:
        head_dim (`int`): Rows of a projection that one head owns. Pruning leaves it as it is in every block.
        per_layer_config (`dict[int | str, dict[str, int]]`):
            Heads and neurons left, for every block, under the family's own field names (`num_attention_heads` and
            `intermediate_size`, also `num_key_value_heads` where several heads read one of those). 0 is allowed.

    Raises:
        `ValueError`: The counts are no counts of a model pruned from the global values; see [`layer_counts`].
    """

    model_type: ClassVar[str]
    auto_classes: ClassVar[Mapping[str, str]]  # each Auto class that has one for the family, with the class's name

    # Written for every block, also where a block kept all it had: the file shows the whole architecture.
    serialize_explicit_per_layer_config = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The comparison that `dataclass` makes reads per-layer fields as if they were global, and raises.
        upstream = next(base for base in cls.__mro__ if base.__name__ == "PreTrainedConfig")
        cls.__eq__ = upstream.__eq__  # type: ignore[assignment]

    # Whoever asks for heads without knowing of blocks is given the dense number, with upstream's warning: it goes with
    # `hidden_size`. Upstream raises, also in `getattr`. Its own models would make blocks of that number: they may not.
    @property
    def allow_global_per_layer_attribute_access(self) -> bool:
        frame: Any = sys._getframe(1)
        while (reader := frame.f_globals.get("__name__", "")).startswith(_READ_CONFIGS):
            frame = frame.f_back
        if re.match(r"transformers\.models\..*\.modeling_", reader):
            raise ValueError(self._refusal())
        return vars(self).get("allow_global_per_layer_attribute_access", True)

    @allow_global_per_layer_attribute_access.setter
    def allow_global_per_layer_attribute_access(self, value: bool) -> None:
        vars(self)["allow_global_per_layer_attribute_access"] = value

    @property
    def per_layer_config(self) -> Any:
        return super().per_layer_config  # type: ignore[misc]

    @per_layer_config.setter
    def per_layer_config(self, value: Mapping[int | str, Mapping[str, int]] | None) -> None:
        if value is not None:
            layer_counts(self, value)
        super(PrunedConfig, type(self)).per_layer_config.fset(self, value)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As [`~PreTrainedConfig.from_dict`], with a `ValueError` for what a field of a `config.json` cannot have."""
        own = config_dict.get("model_type", cls.model_type)
        if not isinstance(own, str) or dense_model_type(own) != dense_model_type(cls.model_type):
            raise ValueError(f"`model_type` must be that of {cls.__name__}, {cls.model_type!r}, got {shortened(own)}.")
        _check_fields(config_dict)
        try:
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        except (TypeError, ValueError):
            raise
        except Exception as error:  # upstream has a kind of its own for a value of the wrong type
            text = _cut(str(error))
            raise ValueError(f"The config of a pruned model has a value that it cannot have: {text}") from error

    def validate(self) -> None:
        # Some families' own checks read the per-layer fields as if they were global.
        dense = copy.copy(self)
        dense.per_layer_config = None
        super(PrunedConfig, dense).validate()  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        # Trainer reads a checkpoint's config as a plain PreTrainedConfig: it knows the number of blocks by this name.
        return {**super().to_dict(), "num_hidden_layers": self.num_hidden_layers}  # type: ignore[misc, attr-defined]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        # All heads of the family, not only the one being saved: the base model can then be loaded from a task's
        # checkpoint, and a task's model from a base checkpoint, where hf_oto is not installed.
        module = type(self).__module__.rpartition(".")[2]
        self.auto_map = {auto: f"{module}.{name}" for auto, name in self.auto_classes.items()}
        # Instead of all else the family's own class reads this, and raises with the text that is no number.
        family = dense_model_type(self.model_type)
        self.refused_as_dense = {"model_type": family, BLOCK_SPECS[family].heads_field: self._refusal()}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]

    def _refusal(self) -> str:
        """Why a pruned model is none of the family's own classes, and how it is loaded."""
        name = (vars(self).get("architectures") or [self.auto_classes["AutoModel"]])[0]
        auto = next((auto for auto, cls in self.auto_classes.items() if cls == name), "AutoModel")
        return (
            f"this model is pruned: its blocks have sizes of their own, {name.removeprefix('OTO')} has one size for "
            f"all. Load it with {auto}.from_pretrained(..., trust_remote_code=True), or with hf_oto's {name}"
        )


def layer_counts(config: Any, per_layer_config: Any = None) -> list[tuple[int, int]]:
    """
    Heads and neurons that every block of a pruned config has left: (heads, neurons), block by block.

    A config may come from anybody on the Hub, so all of it is checked here, before anything is allocated. An argument
    `per_layer_config` is read instead of the config's own.

    Raises:
        `ValueError`: An entry is missing, unknown, no integer, negative or above the dense count.
    """
    spec = BLOCK_SPECS[dense_model_type(config.model_type)]
    for flag, reason in spec.refused:
        if getattr(config, flag, False):
            raise ValueError(f"`{flag}` must be off in a pruned config: {reason}.")
    if per_layer_config is None:
        per_layer_config = config.to_dict().get("per_layer_config")
    if not isinstance(per_layer_config, Mapping):
        raise ValueError(
            f"`per_layer_config` must give the heads and neurons left in each block of a pruned config, got "
            f"{shortened(per_layer_config)}. For a model that is not pruned use the family's own class."
        )
    # The per-layer fields may not be read from the config itself as if they were global.
    names = (spec.heads_field, spec.width_field, *([spec.key_heads_field] if spec.key_heads_field else []))
    dense = {name: vars(config)[name] for name in names}
    _check_sizes(config, spec, dense)
    layers = config.num_hidden_layers
    entries = {int(key): entry for key, entry in per_layer_config.items() if _is_number(key)}
    if not len(per_layer_config) == len(entries) == layers or set(entries) != set(range(layers)):
        raise ValueError(
            f"`per_layer_config` must have one entry for each of the {layers} blocks, got the keys "
            f"{shortened(list(per_layer_config))}."
        )
    groups_field = spec.key_heads_field or spec.heads_field
    for layer, entry in entries.items():
        _check_entry(layer, entry, dense)
        if entry[spec.heads_field] * dense[groups_field] != entry[groups_field] * dense[spec.heads_field]:
            raise ValueError(
                f"`per_layer_config[{layer}]` must have as many heads for each key/value head as the dense model, got "
                f"{shortened(entry)}."
            )
    return [(entries[layer][groups_field], entries[layer][spec.width_field]) for layer in range(layers)]


def _check_sizes(config: Any, spec: BlockSpec, dense: Mapping[str, Any]) -> None:
    """Raise `ValueError` where the global values of a pruned config cannot be those of a model before pruning."""
    names = ("hidden_size", "head_dim", "num_hidden_layers")
    sizes = {name: getattr(config, name) for name in names} | dict(dense)
    sizes |= {name: vars(config)[name] for name in _OTHER_SIZES if name in vars(config)}
    for name, size in sizes.items():
        if not _is_count(size) or (size == 0 and name != "type_vocab_size"):  # DeBERTa has no types of tokens
            raise ValueError(f"`{name}` must be a positive integer in a pruned config, got {shortened(size)}.")
        if size > _LARGEST_SIZE:
            raise ValueError(f"`{name}` must be at most {_LARGEST_SIZE} in a pruned config, got {shortened(size)}.")
    pad, rows = getattr(config, "pad_token_id", None), sizes.get("vocab_size")
    if pad is not None and rows is not None and not -rows <= pad < rows:
        raise ValueError(f"`pad_token_id` must be None or a row of the {rows} of `vocab_size`, got {shortened(pad)}.")
    if not spec.own_head_size and config.head_dim * dense[spec.heads_field] != config.hidden_size:
        raise ValueError(
            f"`head_dim` * `{spec.heads_field}` must be `hidden_size` in a pruned config, got {config.head_dim} * "
            f"{dense[spec.heads_field]} and {config.hidden_size}: global values are those before pruning."
        )


def _check_entry(layer: int, entry: Any, dense: Mapping[str, int]) -> None:
    if not isinstance(entry, Mapping) or set(entry) != set(dense):
        names = " and ".join(f"`{name}`" for name in dense)
        raise ValueError(f"`per_layer_config[{layer}]` must have {names}, no more, got {shortened(entry)}.")
    for name, limit in dense.items():
        if not _is_count(entry[name]) or entry[name] > limit:
            raise ValueError(
                f"`per_layer_config[{layer}]['{name}']` must be an integer from 0 to the dense {limit}, got "
                f"{shortened(entry[name])}."
            )


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Raise `ValueError` for values in a config's file that upstream takes unseen, or trips over."""
    labels = fields.get("num_labels", 1)
    if not _is_count(labels) or not 0 < labels <= _MOST_LABELS:
        raise ValueError(
            f"`num_labels` must be an integer from 1 to {_MOST_LABELS} in the file of a pruned config, got "
            f"{shortened(labels)}. Name the labels in `id2label` where there are more."
        )
    names = fields.get("id2label")
    if names is not None and not (isinstance(names, Mapping) and all(map(_is_number, names))):
        raise ValueError(f"`id2label` must map the labels' numbers to their names, got {shortened(names)}.")
    for field in ("dtype", "torch_dtype"):
        if fields.get(field) is not None and not re.fullmatch(_FLOATS, str(fields[field])):
            raise ValueError(f"`{field}` must name a floating-point type of torch, got {shortened(fields[field])}.")


def _is_number(key: object) -> bool:
    """Whether a key of a JSON object, or of the dict that it becomes, is an index."""
    return re.fullmatch("[0-9]{1,9}", str(key)) is not None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def shortened(value: object) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
