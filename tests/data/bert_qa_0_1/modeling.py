"""The pruned architectures: Transformers' own classes, each block with its own number of heads and neurons.

This file and `architectures.py` are copied beside the weights of every pruned checkpoint, so that
`from_pretrained(..., trust_remote_code=True)` rebuilds the model where hf_oto is not installed. They import torch and
transformers only.

A pruned config keeps the dense counts as its global values and says what each block has left in `per_layer_config`.
"""

import copy
import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.bert_generation.modeling_bert_generation import BertGenerationSelfAttention
from transformers.models.camembert.modeling_camembert import CamembertSelfAttention
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention
from transformers.models.electra.modeling_electra import ElectraSelfAttention
from transformers.models.esm.modeling_esm import EsmSelfAttention
from transformers.models.hubert.modeling_hubert import HubertAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.modernbert.modeling_modernbert import ModernBertAttention
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention
from transformers.models.vit.modeling_vit import ViTAttention
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Attention
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaSelfAttention

from .architectures import BLOCK_SPECS, PRUNED_PREFIX, BlockSpec, attention_rows, dense_model_type, has_bias

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError(f"Pruned models need transformers 5.14 or later, got {transformers.__version__}. Upgrade it.")


# Sizes that are no business of pruning, but of tensors that are made before the weights are looked at.
_OTHER_SIZES = ("vocab_size", "max_position_embeddings", "type_vocab_size", "embedding_size")
_LARGEST_SIZE = 2**31 - 1  # of products of two of them none overflows
_MOST_LABELS = 2**20  # upstream makes up a name for each


class PrunedConfig:
    """
    What the pruned configs add to their family's config.

    Args:
        head_dim (`int`):
            Rows of a projection that one head owns. Pruning leaves it alone, so the dense
            `hidden_size // num_attention_heads` holds in every block.
        per_layer_config (`dict[int | str, dict[str, int]]`):
            Heads and neurons left, for every block, under the family's own field names (`num_attention_heads` and
            `intermediate_size`; `n_heads` and `hidden_dim` for DistilBERT; `num_key_value_heads` too where several
            heads read one key/value head). 0 is allowed.

    Raises:
        `ValueError`: The counts are no counts of a model pruned from the global values; see [`layer_counts`].
    """

    model_type: ClassVar[str]

    # Written for every block, also where a block kept all it had: the file shows the whole architecture.
    serialize_explicit_per_layer_config = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The comparison that `dataclass` makes reads per-layer fields as if they were global, and raises.
        cls.__eq__ = PreTrainedConfig.__eq__  # type: ignore[assignment]

    @property
    def per_layer_config(self) -> Any:
        return super().per_layer_config  # type: ignore[misc]

    @per_layer_config.setter
    def per_layer_config(self, value: Mapping[int | str, Mapping[str, int]] | None) -> None:
        if value is not None:
            layer_counts(self, value)
        PreTrainedConfig.per_layer_config.fset(self, value)  # type: ignore[attr-defined]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        As [`~PreTrainedConfig.from_dict`]: what a `config.json` goes through.

        Raises:
            `ValueError`: A value is none that its field can have.
        """
        own = config_dict.get("model_type", cls.model_type)
        if not isinstance(own, str) or dense_model_type(own) != dense_model_type(cls.model_type):
            raise ValueError(
                f"`model_type` must be that of {cls.__name__}, {cls.model_type!r}, got {_shortened(own)}."
            )
        _check_fields(config_dict)
        try:
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        except (TypeError, ValueError):
            raise
        except Exception as error:  # upstream has a kind of its own for a value of the wrong type
            raise ValueError(
                f"The config of a pruned model has a value that it cannot have: {_cut(str(error))}"
            ) from error

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
        classes = {"AutoConfig": type(self), **{auto.__name__: cls for auto, cls in pruned_heads(type(self))}}
        self.auto_map = {auto: f"{module}.{cls.__name__}" for auto, cls in classes.items()}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]


def layer_counts(config: Any, per_layer_config: Any = None) -> list[tuple[int, int]]:
    """
    Heads and neurons that every block of a pruned config has left.

    A config may come from anybody on the Hub, so all of it is checked here, before anything is allocated. An argument
    `per_layer_config` is read instead of the config's own.

    Returns:
        `list[tuple[int, int]]`: (heads, neurons), block by block.

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
            f"{_shortened(per_layer_config)}. For a model that is not pruned use the family's own class."
        )
    # The per-layer fields may not be read from the config itself as if they were global.
    dense = {name: vars(config)[name] for name in (spec.heads_field, spec.width_field)}
    if spec.key_heads_field:
        dense[spec.key_heads_field] = vars(config)[spec.key_heads_field]
    sizes = {"hidden_size": config.hidden_size, "head_dim": config.head_dim, **dense}
    sizes["num_hidden_layers"] = layers = config.num_hidden_layers
    sizes |= {name: vars(config)[name] for name in _OTHER_SIZES if name in vars(config)}
    for name, size in sizes.items():
        if not _is_count(size) or (size == 0 and name != "type_vocab_size"):  # DeBERTa has no types of tokens
            raise ValueError(f"`{name}` must be a positive integer in a pruned config, got {_shortened(size)}.")
        if size > _LARGEST_SIZE:
            raise ValueError(f"`{name}` must be at most {_LARGEST_SIZE} in a pruned config, got {_shortened(size)}.")
    pad, rows = getattr(config, "pad_token_id", None), sizes.get("vocab_size")
    if pad is not None and rows is not None and not -rows <= pad < rows:
        raise ValueError(f"`pad_token_id` must be None or a row of the {rows} of `vocab_size`, got {_shortened(pad)}.")
    if not spec.own_head_size and config.head_dim * dense[spec.heads_field] != config.hidden_size:
        raise ValueError(
            f"`head_dim` * `{spec.heads_field}` must be `hidden_size` in a pruned config, got {config.head_dim} * "
            f"{dense[spec.heads_field]} and {config.hidden_size}: global values are those before pruning."
        )
    entries = {int(key): entry for key, entry in per_layer_config.items() if _is_number(key)}
    if not len(per_layer_config) == len(entries) == layers or set(entries) != set(range(layers)):
        raise ValueError(
            f"`per_layer_config` must have one entry for each of the {layers} blocks, got the keys "
            f"{_shortened(list(per_layer_config))}."
        )
    for layer, entry in entries.items():
        if not isinstance(entry, Mapping) or set(entry) != set(dense):
            names = " and ".join(f"`{name}`" for name in dense)
            raise ValueError(f"`per_layer_config[{layer}]` must have {names}, no more, got {_shortened(entry)}.")
        for name, limit in dense.items():
            if not _is_count(entry[name]) or entry[name] > limit:
                raise ValueError(
                    f"`per_layer_config[{layer}]['{name}']` must be an integer from 0 to the dense {limit}, got "
                    f"{_shortened(entry[name])}."
                )
    groups_field = spec.key_heads_field or spec.heads_field
    for layer, entry in entries.items():
        if entry[spec.heads_field] * dense[groups_field] != entry[groups_field] * dense[spec.heads_field]:
            raise ValueError(
                f"`per_layer_config[{layer}]` must have as many heads for each key/value head as the dense model, got "
                f"{_shortened(entry)}."
            )
    return [(entries[layer][groups_field], entries[layer][spec.width_field]) for layer in range(layers)]


def block_fields(spec: BlockSpec, fields: Mapping[str, Any], heads: int, neurons: int) -> dict[str, int]:
    """A block's entry in `per_layer_config`; `fields` are the dense config's."""
    entry = {spec.heads_field: heads, spec.width_field: neurons}
    if spec.key_heads_field:
        queries = fields[spec.heads_field] // fields[spec.key_heads_field]
        entry |= {spec.heads_field: heads * queries, spec.key_heads_field: heads}
    return entry


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Raise `ValueError` for values in a config's file that upstream takes unseen, or trips over."""
    labels = fields.get("num_labels", 1)
    if not _is_count(labels) or not 0 < labels <= _MOST_LABELS:
        raise ValueError(
            f"`num_labels` must be an integer from 1 to {_MOST_LABELS} in the file of a pruned config, got "
            f"{_shortened(labels)}. Name the labels in `id2label` where there are more."
        )
    names = fields.get("id2label")
    if names is not None and not (isinstance(names, Mapping) and all(map(_is_number, names))):
        raise ValueError(f"`id2label` must map the labels' numbers to their names, got {_shortened(names)}.")
    for field in ("dtype", "torch_dtype"):
        dtype = fields.get(field)
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"`{field}` must name a floating-point type of torch, got {_shortened(fields[field])}.")


def _is_number(key: object) -> bool:
    """Whether a key of a JSON object, or of the dict that it becomes, is an index."""
    return re.fullmatch("[0-9]{1,9}", str(key)) is not None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shortened(value: object) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


class PrunedModel(PreTrainedModel):
    """What the pruned models add to their dense classes: blocks of the sizes that the config gives."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        self._pruned = config, layer_counts(config)
        # The dense classes read one number of heads and neurons from a config. The FFN is not worth allocating: every
        # one is replaced. The heads are kept, the dense classes derive the head size from them.
        uniform = copy.copy(config)
        uniform.per_layer_config = None
        uniform.__class__ = type(config).__bases__[1]  # some heads ask AutoModel for the base model of their config
        setattr(uniform, BLOCK_SPECS[dense_model_type(config.model_type)].width_field, 1)
        try:
            super().__init__(uniform, *args, **kwargs)
        except AssertionError as error:  # RoBERTa's positions begin behind `pad_token_id`
            pad, rows = config.pad_token_id, config.max_position_embeddings
            raise ValueError(
                f"`pad_token_id`={pad} and `max_position_embeddings`={rows} do not go together: {error}."
            ) from error

    def post_init(self) -> None:
        config, counts = self.__dict__.pop("_pruned")
        config._attn_implementation = self.config._attn_implementation
        for module in self.modules():
            if "config" in vars(module):
                module.config = config
        spec = BLOCK_SPECS[dense_model_type(config.model_type)]
        blocks = self.base_model.get_submodule(spec.blocks)
        for layer, (heads, neurons) in enumerate(counts):
            block = blocks.get_submodule(str(layer))
            resize_heads(block, spec, config, heads)
            resize_neurons(block, spec, config, neurons)
        super().post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # The families' own initialization looks for the weights that a structure cut to nothing has no more.
        if not isinstance(module, Headless) and not any(isinstance(part, BiasOnly) for part in module.children()):
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        As [`~PreTrainedModel.from_pretrained`], but strict about the blocks: weights that are missing there, left over
        or of another shape mean that config and weights are not of one model, and a new random initialization or a
        dropped weight would pass for a result. `ignore_mismatched_sizes=True` passes over a new task head.

        Raises:
            `ValueError`: The weights do not fit the config.
        """
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        _check_weights(model, info, pretrained_model_name_or_path, kwargs.get("ignore_mismatched_sizes", False))
        return (model, info) if output_loading_info else model

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        # Next, upstream allocates what is missing or of another shape, in the sizes of a config that may be anybody's.
        found = {key: getattr(loading_info, key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        ignored = load_config.ignore_mismatched_sizes
        _check_weights(model, found, load_config.pretrained_model_name_or_path, ignored)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)


def _check_weights(model: Any, info: Mapping[str, Any], source: Any, ignore_mismatched_sizes: bool) -> None:
    """Raise `ValueError` where weights, by what their loading found, are not those of the config."""
    path = f".{BLOCK_SPECS[dense_model_type(model.config.model_type)].blocks}."
    wrong = [f"{key} is missing" for key in info["missing_keys"] if path in f".{key}" or ".embeddings" in f".{key}"]
    wrong += [f"{key} has no place" for key in info["unexpected_keys"] if path in f".{key}"]
    wrong += [
        f"{key} has shape {tuple(found)} instead of {tuple(expected)}"
        for key, found, expected in info["mismatched_keys"]
        if path in f".{key}" or not ignore_mismatched_sizes
    ]
    if wrong:
        raise ValueError(
            f"The weights of {source} do not fit its config: {_shortened(sorted(wrong))}. Use weights and config of "
            f"the same save. `ignore_mismatched_sizes=True` passes over a new task head."
        )


def resize_heads(block: nn.Module, spec: BlockSpec, config: Any, heads: int) -> None:
    """Give one dense block its number of heads."""
    hidden_size, attention = config.hidden_size, block.get_submodule(spec.attention)
    fields = vars(config)
    dense_heads = fields[spec.key_heads_field or spec.heads_field]
    queries = fields[spec.heads_field] // dense_heads
    out_bias = has_bias(spec.out_bias, fields)
    if not heads:
        kept = getattr(attention, "layer_idx", None), spec.attention_out.removeprefix(f"{spec.attention}.")
        replace_module(block, spec.attention, _subclass(_HEADLESS, attention)(config, *kept))
        replace_module(block, spec.attention_out, BiasOnly(hidden_size, out_bias))
        return
    paths, width = attention_rows(spec, fields), heads * config.head_dim
    for path in dict.fromkeys(paths):
        rows = paths.count(path) * width * (queries if path == spec.query else 1)
        replace_module(block, path, nn.Linear(hidden_size, rows, has_bias(spec.query_bias, fields)))
    replace_module(block, spec.attention_out, nn.Linear(width * queries, hidden_size, out_bias))
    for name, size in (*dict.fromkeys(_COUNTS, heads * queries).items(), *dict.fromkeys(_WIDTHS, width).items()):
        if hasattr(attention, name):
            setattr(attention, name, size)
    if spec.position_bias and heads < dense_heads:
        attention.__class__ = _subclass(_SELECTIVE, attention)
        attention.register_buffer(KEPT_HEADS, torch.arange(heads))


def resize_neurons(block: nn.Module, spec: BlockSpec, config: Any, neurons: int) -> None:
    """Give one dense block its number of neurons."""
    hidden_size, bias = config.hidden_size, has_bias(spec.neuron_bias, vars(config))
    paths = [spec.neurons_in] if spec.gate is None else [spec.neurons_in, spec.gate]
    for path in dict.fromkeys(paths):
        rows = nn.Linear(hidden_size, neurons * paths.count(path), bias) if neurons else nn.Identity()
        replace_module(block, path, rows)
    replace_module(
        block, spec.neurons_out, nn.Linear(neurons, hidden_size, bias) if neurons else BiasOnly(hidden_size, bias)
    )


def replace_module(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)


class BiasOnly(nn.Module):
    """The output projection of a structure cut to nothing: its bias. A linear layer of width 0 breaks exporters."""

    def __init__(self, size: int, bias: bool = True) -> None:
        super().__init__()
        self.size = size
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        shape = (*hidden_states.shape[:-1], self.size)
        return hidden_states.new_zeros(shape) if self.bias is None else self.bias.expand(shape)


class Headless(nn.Module):
    """
    Attention without a head: a context of zeros. The subclasses are what `output_attentions` looks for.

    Args:
        config: The model's.
        layer_idx (`int`, *optional*): Its place in a key/value cache.
        out (`str`): Name of the output projection, where the attention holds it itself.
    """

    def __init__(self, config: Any, layer_idx: int | None, out: str) -> None:
        nn.Module.__init__(self)  # the dense class would make its projections
        self.config, self.layer_idx, self.out = config, layer_idx, out
        # In some releases attention gives a third value, which is for decoders.
        dense: Any = type(self).__bases__[1]
        values = get_args(dense.forward.__annotations__.get("return"))
        self.others = (None,) * (len(values) - 2)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch, length = hidden_states.shape[:2]
        eager = self.config._attn_implementation == "eager"  # the others return no weights
        weights = hidden_states.new_zeros(batch, 0, length, length) if eager else None
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its name from transformers 5.24 on, and before
        if cache is not None:  # one number for each token: from the first block a cache tells how many it has
            keys = hidden_states.new_zeros(batch, 1, length, 1)
            cache.update(keys, keys, self.layer_idx)
        project = self._modules.get(self.out)
        context = torch.zeros_like(hidden_states) if project is None else project(hidden_states)
        return (context, weights, *self.others)


# A buffer of attention that is given something for each dense head: those that it has kept.
KEPT_HEADS = "kept_heads"


class SelectiveMPNet(MPNetSelfAttention):
    """Attention that has lost heads, and reads the bias of those that it has kept."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Any = None, position_bias: Any = None, **kwargs: Any
    ) -> Any:
        if position_bias is not None:
            position_bias = position_bias[:, self.kept_heads]
        return super().forward(hidden_states, attention_mask, position_bias, **kwargs)


# Under which names the attention modules keep the number of their heads, and the rows of these together.
_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
_WIDTHS = ("all_head_size",)

_SELECTIVE: dict[type, Any] = {MPNetSelfAttention: SelectiveMPNet}
_HEADLESS: dict[type, Any] = {
    attention: type(f"Headless{attention.__name__}", (Headless, attention), {})
    for attention in (
        BertSelfAttention,
        RobertaSelfAttention,
        XLMRobertaSelfAttention,
        ElectraSelfAttention,
        DistilBertSelfAttention,
        CamembertSelfAttention,
        BertGenerationSelfAttention,
        MPNetSelfAttention,
        EsmSelfAttention,
        ModernBertAttention,
        DisentangledSelfAttention,
        ViTAttention,
        Wav2Vec2Attention,
        HubertAttention,
        LlamaAttention,
        Qwen3Attention,
    )
}
globals().update({cls.__name__: cls for cls in _HEADLESS.values()})  # where pickle looks for them


def _subclass(table: Mapping[type, Any], module: nn.Module) -> Any:
    return next(table[cls] for cls in type(module).__mro__ if cls in table)


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


def _pruned_classes(model_type: str) -> dict[str, type]:
    """The classes of a family by name: `OTOBertConfig`, and one model for each of the family's own."""
    name, endings = FAMILIES[model_type]
    settings = {"model_type": f"{PRUNED_PREFIX}{model_type.replace('-', '_')}"}
    fields: dict[str, Any] = {"head_dim": None, "__annotations__": {"head_dim": int | None}}
    if BLOCK_SPECS[model_type].own_head_size:
        fields = {}
    dense = getattr(transformers, f"{name}Config")
    config = type(f"OTO{name}Config", (PrunedConfig, dense), {**settings, **fields})
    classes = {config.__name__: config}
    for end in endings:
        base = getattr(transformers, f"{name}{end}")
        classes[f"OTO{name}{end}"] = type(f"OTO{name}{end}", (PrunedModel, base), {"config_class": config})
    return classes


_CLASSES = {model_type: _pruned_classes(model_type) for model_type in FAMILIES}
for _classes in _CLASSES.values():
    globals().update(_classes)

CONFIGS: tuple[Any, ...] = tuple(next(iter(classes.values())) for classes in _CLASSES.values())

_AUTO_CLASSES: tuple[Any, ...] = (
    transformers.AutoModel,
    transformers.AutoModelForTextEncoding,
    transformers.AutoModelForMaskedLM,
    transformers.AutoModelForNextSentencePrediction,
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForMultipleChoice,
    transformers.AutoModelForTokenClassification,
    transformers.AutoModelForQuestionAnswering,
    transformers.AutoModelForMaskedImageModeling,
    transformers.AutoModelForImageClassification,
    transformers.AutoModelForAudioClassification,
    transformers.AutoModelForAudioFrameClassification,
    transformers.AutoModelForAudioXVector,
    transformers.AutoModelForCTC,
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForPreTraining,  # the last: many families have no head of its own for it
)


def pruned_heads(config_class: type) -> list[tuple[Any, type[PreTrainedModel]]]:
    """Every Auto class that has a model for a pruned config, with that model's class."""
    dense = config_class.__bases__[1]
    found = []
    for auto in _AUTO_CLASSES:
        model = auto._model_mapping.get(dense, None)
        pruned = globals().get(f"OTO{getattr(model, '__name__', None)}")
        if pruned is not None:
            found.append((auto, pruned))
    return found


for _config_class in CONFIGS:
    _config_class.register_for_auto_class()  # saving a config, alone or with its model, copies this file
    # A copy that came with a checkpoint serves that checkpoint only: registered, it would serve any other as well.
    if not __name__.startswith("transformers_modules."):
        transformers.AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
        for _auto_class, _model_class in pruned_heads(_config_class):
            _auto_class.register(_config_class, _model_class, exist_ok=True)
