"""The pruned classes: Transformers' own, each block with its own number of heads and neurons.

This file and `configuration_oto.py` are copied beside the weights of every pruned checkpoint, so that
`from_pretrained(..., trust_remote_code=True)` rebuilds the model where hf_oto is not installed. They import torch and
transformers only. The classes of a family are made when the first of them is asked for: no other is imported for it.
"""

import copy
import os
from collections.abc import Mapping
from functools import cache
from typing import Any, get_args

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_oto import (
    BLOCK_SPECS,
    FAMILIES,
    PRUNED_PREFIX,
    BlockSpec,
    PrunedConfig,
    attention_rows,
    dense_model_type,
    has_bias,
    layer_counts,
    shortened,
)

if not hasattr(getattr(transformers, "PreTrainedConfig", None), "per_layer_config"):
    raise ImportError(f"Pruned models need transformers 5.14 or later, got {transformers.__version__}. Upgrade it.")

# Releases that are refused have none.
from transformers.conversion_mapping import (  # noqa: E402
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)


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
    needed = [key for key in info["missing_keys"] if not key.endswith(".mask_token")]  # which one head of ViT's adds
    wrong = [f"{key} is missing" for key in needed if path in f".{key}" or ".embeddings" in f".{key}"]
    wrong += [f"{key} has no place" for key in info["unexpected_keys"] if path in f".{key}"]
    wrong += [
        f"{key} has shape {tuple(found)} instead of {tuple(expected)}"
        for key, found, expected in info["mismatched_keys"]
        if path in f".{key}" or not ignore_mismatched_sizes
    ]
    if wrong:
        raise ValueError(
            f"The weights of {source} do not fit its config: {shortened(sorted(wrong))}. Use weights and config of "
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
        replace_module(block, spec.attention, _derived(Headless, attention)(config, *kept))
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
        attention.__class__ = _derived(Selective, attention)
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


class _Combined(nn.Module):
    """What comes before a family's own attention in the bases of a class that is made when it is asked for."""

    def __reduce__(self) -> Any:
        return _new, type(self).__bases__, self.__dict__


class Headless(_Combined):
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


class Selective(_Combined):
    """Attention that has lost heads, and reads the bias of those that it has kept."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, position_bias: Any = None, **kwargs: Any
    ) -> Any:
        if position_bias is not None:
            position_bias = position_bias[:, self.kept_heads]
        return super().forward(hidden_states, attention_mask, position_bias, **kwargs)


# Under which names the attention modules keep the number of their heads, and the rows of these together.
_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
_WIDTHS = ("all_head_size",)


def _derived(own: type, module: nn.Module) -> Any:
    """One of the two classes above, of the family's own class of attention: what others derive from it is left out."""
    dense = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models."))
    return _subclass(own, dense)


@cache
def _subclass(own: type, dense: type) -> Any:
    return type(f"{own.__name__}{dense.__name__}", (own, dense), {})


def _new(own: type, dense: type) -> Any:
    """An object of such a class, for pickle, which finds the two classes that it is made of."""
    made = _subclass(own, dense)
    return made.__new__(made)


# The Auto classes that may have a model for a family.
AUTO_CLASSES = (
    *("AutoModel", "AutoModelForTextEncoding", "AutoModelForMaskedLM", "AutoModelForNextSentencePrediction"),
    *("AutoModelForSequenceClassification", "AutoModelForMultipleChoice", "AutoModelForTokenClassification"),
    *("AutoModelForQuestionAnswering", "AutoModelForMaskedImageModeling", "AutoModelForImageClassification"),
    *("AutoModelForAudioClassification", "AutoModelForAudioFrameClassification", "AutoModelForAudioXVector"),
    *("AutoModelForCTC", "AutoModelForCausalLM"),
    "AutoModelForPreTraining",  # the last: many families have no head of its own for it
)


def config_class(model_type: str) -> Any:
    """The pruned config class of a family, which may be given by the pruned type as well."""
    return _classes(dense_model_type(model_type))["AutoConfig"]


def pruned_heads(model_type: str) -> list[tuple[str, type[PreTrainedModel]]]:
    """The Auto classes that have a model for a family, by name, with the class of its pruned model."""
    return [item for item in _classes(dense_model_type(model_type)).items() if item[0] != "AutoConfig"]


@cache
def _classes(model_type: str) -> dict[str, Any]:
    """
    Make the classes of a family: `OTOBertConfig`, and one model for each of the family's own. Gives those which an
    Auto class has, by its name.
    """
    stem, endings = FAMILIES[model_type]
    dense = getattr(transformers, f"{stem}Config")
    fields: dict[str, Any] = {"model_type": f"{PRUNED_PREFIX}{model_type.replace('-', '_')}"}
    if not BLOCK_SPECS[model_type].own_head_size:
        fields |= {"head_dim": None, "__annotations__": {"head_dim": int | None}}
    config: Any = type(f"OTO{stem}Config", (PrunedConfig, dense), fields)
    made = {config.__name__: config}
    for name in (f"{stem}{end}" for end in endings):
        made[f"OTO{name}"] = type(f"OTO{name}", (PrunedModel, getattr(transformers, name)), {"config_class": config})
        # By the class's name upstream knows under which older names a family's weights are written and read.
        if (renamed := get_checkpoint_conversion_mapping(name)) is not None:
            register_checkpoint_conversion_mapping(f"OTO{name}", renamed, overwrite=True)
    globals().update(made)  # where pickle looks for them
    found = {"AutoConfig": config}
    for auto in AUTO_CLASSES:
        dense_name = getattr(getattr(transformers, auto)._model_mapping.get(dense, None), "__name__", None)
        if f"OTO{dense_name}" in made:
            found[auto] = made[f"OTO{dense_name}"]
    config.auto_classes = {auto: cls.__name__ for auto, cls in found.items()}
    config.register_for_auto_class()  # saving a config, alone or with its model, copies this file
    # A copy that came with a checkpoint serves that checkpoint only: registered, it would serve any other as well.
    if not __name__.startswith("transformers_modules."):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto in found.keys() - {"AutoConfig"}:
            getattr(transformers, auto).register(config, found[auto], exist_ok=True)
    return found


def __getattr__(name: str) -> Any:
    for model_type, (stem, endings) in FAMILIES.items():
        if name in [f"OTO{stem}{end}" for end in ("Config", *endings)]:
            _classes(model_type)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
