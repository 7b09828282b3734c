"""Tiny random models of every family with every task head: what the contract tests run over.

A new family is a line in `CONFIGS`. What heads a family has is the table of the pruned classes, which a test compares
with transformers' own.
"""

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_oto.config import LatencyTable, OTOConfig
from hf_oto.hspg.budget import dense_cost, floor_and_multiple, removable_groups, removal_costs
from hf_oto.models.configuration_oto import FAMILIES
from hf_oto.models.groups import BlockCounts, GroupArray, Partition, partition

_COMMON = {
    "vocab_size": 61,
    "num_hidden_layers": 3,
    "max_position_embeddings": 40,
}
_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24}
_NO_TOKENS = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0)
_GROUPED = _COMMON | _SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0}
_SPEECH = _SIZES | {
    **{"vocab_size": 61, "num_hidden_layers": 3, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    **{"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2},
    **{"tdnn_dim": (16, 16), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 8},
    **{"layerdrop": 0.0, "mask_time_prob": 0.0, "pad_token_id": 0, "ctc_loss_reduction": "mean"},
}

CONFIGS = {
    "bert": _COMMON | _SIZES,
    "roberta": _COMMON | _SIZES | {"pad_token_id": 1},
    "xlm-roberta": _COMMON | _SIZES | {"pad_token_id": 1},
    "electra": _COMMON | _SIZES | {"embedding_size": 16},
    "distilbert": _COMMON | {"dim": 32, "n_heads": 4, "hidden_dim": 24},
    "camembert": _COMMON | _SIZES | {"pad_token_id": 1},
    "bert-generation": _COMMON | _SIZES,
    "mpnet": _COMMON | _SIZES | {"pad_token_id": 1},
    "esm": _COMMON | _SIZES | {"pad_token_id": 1, "mask_token_id": 3, "position_embedding_type": "rotary"},
    "modernbert": _COMMON | _SIZES | {"local_attention": 8} | _NO_TOKENS,
    "deberta-v2": _COMMON
    | _SIZES
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": False},
    "vit": _SIZES | {"num_hidden_layers": 3, "image_size": 16, "patch_size": 4, "encoder_stride": 4},
    "wav2vec2": _SPEECH | {"proj_codevector_dim": 16, "codevector_dim": 16, "num_codevectors_per_group": 8},
    "hubert": _SPEECH,
    "llama": _GROUPED | {"bos_token_id": 1, "eos_token_id": 2},
    "qwen3": _GROUPED | {"eos_token_id": 2},
}

MODELS: dict[str, tuple[str, ...]] = {
    family: tuple(f"{stem}{ending}" for ending in endings) for family, (stem, endings) in FAMILIES.items()
}

# Every family with every head, and every family with one.
ALL = [name for names in MODELS.values() for name in names]
EVERY = [names[-1] for names in MODELS.values()]
# A head for question answering of those whose blocks differ as far as the training goes: for what takes long.
FIRST = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
ONE_EACH = [MODELS[family][-1] for family in FIRST]
# A head to train of each of the others; BertGeneration's encoder has none.
OTHERS = [
    next((name for name in names if name.endswith("CausalLM")), names[-1])
    for family, names in MODELS.items()
    if family not in FIRST
]


def family_of(name: str) -> str:
    """The `model_type` of a dense class of [`MODELS`]."""
    return next(family for family, names in MODELS.items() if name in names)


def group_sizes(name: str) -> tuple[int, int]:
    """Weights of a head and of a neuron, by hand, for hidden size 32 and head size 8."""
    bert = 4 * 32 * 8 + 3 * 8, 2 * 32 + 1  # four projections, three biases; two weights and a bias
    others = {
        "modernbert": (4 * 32 * 8, 3 * 32),
        "deberta-v2": (6 * 32 * 8 + 5 * 8, 2 * 32 + 1),
        # Two heads read one key/value head.
        **dict.fromkeys(("llama", "qwen3"), (6 * 32 * 8, 3 * 32)),
    }
    return others.get(family_of(name), bert)


def attentions(name: str) -> list[str]:
    """The attention implementations of a dense class that run here."""
    return ["eager", "sdpa"] if getattr(transformers, name)._supports_sdpa else ["eager"]


def tiny_config(family: str, **overrides) -> PreTrainedConfig:
    return transformers.AutoConfig.for_model(family, **CONFIGS[family] | overrides)


def tiny_model(name: str, attention: str | None = None, seed: int = 0, **overrides) -> PreTrainedModel:
    """A dense model in evaluation mode. Biases and LayerNorms are random as well, so that none may be forgotten."""
    torch.manual_seed(seed)
    config = tiny_config(family_of(name), attn_implementation=attention or attentions(name)[-1], **overrides)
    model = getattr(transformers, name)(config).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)


def batch(model: PreTrainedModel, seed: int = 1, length: int = 13, size: int = 3) -> dict[str, Tensor]:
    """Inputs that every head takes, with padding at the end of the first sequence. Images have one size."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator).to(model.dtype)}
    if model.main_input_name == "input_values":
        values = torch.randn(size, 16 * length + 20, generator=generator)
        attention_mask = torch.ones_like(values, dtype=torch.int64)
        attention_mask[0, values.shape[1] // 2 :] = 0
        return {"input_values": (values * attention_mask).to(model.dtype), "attention_mask": attention_mask}
    choices = type(model).__name__.endswith("ForMultipleChoice")
    input_ids = torch.randint(2, 61, (size, 2, length) if choices else (size, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, ..., length // 2 :] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def outputs(model: PreTrainedModel, seed: int = 1, **inputs) -> dict[str, Tensor]:
    """The floating-point outputs of a model on [`batch`]."""
    found = model(**batch(model, seed), **inputs)
    return {key: value for key, value in found.items() if isinstance(value, Tensor) and value.is_floating_point()}


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any output, as a share of that output's largest magnitude."""
    assert actual.keys() == expected.keys() and expected
    return max(
        float((actual[key].float() - value.float()).abs().max() / value.float().abs().max())
        for key, value in expected.items()
    )


@torch.no_grad()
def zero(model: PreTrainedModel, array: GroupArray, groups, members: tuple = ()) -> None:
    """Set groups of an array to zero: all that they own, or their part of the given (name, dim) or [`Owned`]."""
    parameters = dict(model.named_parameters())
    for owned in array.owned if not members or isinstance(members[0], tuple) else members:
        if not members or owned in members or (owned.name, owned.dim) in members:
            positions = owned.positions(array.count, torch.as_tensor(groups))
            parameters[owned.name].index_fill_(owned.dim, positions, 0)


def zero_uneven(model: PreTrainedModel, seed: int = 0) -> list[tuple[int, int]]:
    """Zero groups in every block, all heads of the second and all neurons of the last. Gives (heads, neurons) kept."""
    generator = torch.Generator().manual_seed(seed)
    groups = partition(model)
    kept = []
    for array in groups.arrays:
        gone = max(1, array.count * (2 + array.layer) // 6)
        if (array.layer, array.kind) in ((1, "heads"), (groups.num_layers - 1, "neurons")):
            gone = array.count
        if gone:
            zero(model, array, torch.randperm(array.count, generator=generator)[:gone])
        kept.append(array.count - gone)
    return list(BlockCounts.of_arrays(kept).blocks)


def counts(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(heads, neurons) of every block."""
    return list(partition(model).block_counts.blocks)


def question_batch(model: PreTrainedModel, seed: int = 1, size: int = 3) -> dict[str, Tensor]:
    """[`batch`] of another size, with the positions of answers: what a model for question answering trains on."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, 61, (size, 13), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[::3, 9:] = 0
    positions = torch.randint(0, 9, (2, size), generator=generator)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "start_positions": positions[0],
        "end_positions": positions[1],
    }


def training_batch(model: PreTrainedModel, seed: int = 1, size: int = 3) -> dict[str, Tensor]:
    """[`batch`] of another size, with what the model's head learns: as many labels in every row."""
    kind = type(model).__name__
    if kind.endswith("ForQuestionAnswering"):
        return question_batch(model, seed, size)
    inputs = batch(model, seed, size=size)
    if kind.endswith(("Model", "Encoder")):
        return inputs
    speech = kind.endswith("ForCTC")
    shape = (size, 3) if speech else (size,) if "pixel_values" in inputs else inputs["input_ids"].shape
    generator = torch.Generator().manual_seed(seed)
    return inputs | {"labels": torch.randint(2, shape, generator=generator) + speech}  # CTC's blank is 0


def squares(outputs: ModelOutput, *_, **__) -> Tensor:
    """The loss of a model without a head."""
    return outputs.last_hidden_state.square().mean()


def owned(model: PreTrainedModel, array: GroupArray, group: int) -> list[Tensor]:
    """Views of all that one group owns, parameter by parameter."""
    parameters = dict(model.named_parameters())
    return [
        parameters[owned.name].data.narrow(owned.dim, (block * array.count + group) * owned.width, owned.width)
        for owned in array.owned
        for block in owned.blocks
    ]


def removed_and_next(groups: Partition, config: OTOConfig, zero: dict[tuple[int, str], Tensor]) -> tuple[int, int]:
    """The cost that is gone, and that of the cheapest cut that the floors allow still (all of it if there is none)."""
    removed, cheapest = 0, dense_cost(groups, config)
    for array in groups.arrays:
        if array.kind in config.structures:
            costs = removal_costs(groups, array.kind, config).tolist()
            gone = int(zero[array.layer, array.kind].sum())
            removed += sum(costs[:gone])
            floor, multiple = floor_and_multiple(array.kind, config)
            if removable_groups(array.count - gone, floor, multiple):
                cheapest = min(cheapest, sum(costs[gone : gone + ((array.count - gone) % multiple or multiple)]))
    return removed, cheapest


def made_table(groups: Partition, seed: int = 0, fixed: int = 1000, points: int = 4) -> LatencyTable:
    """A table of latencies for an architecture, made up: curves with random corners, in which no group is free."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    def curve(dense: int, slope: int) -> list[list[int]]:
        counts = sorted({0, dense} | {draw(dense) for _ in range(points)})
        found = [[0, 0]]
        for low, high in zip(counts, counts[1:], strict=False):
            found.append([high, found[-1][1] + (high - low) * (1 + draw(slope)) + draw(slope)])
        return found

    heads, neurons = curve(groups.dense_heads, 900), curve(groups.dense_neurons, 90)
    names = ("model_type", "num_layers", "hidden_size", "head_size", "queries", "dense_heads", "dense_neurons")
    return LatencyTable(
        **{name: getattr(groups, name) for name in names},
        total=fixed + groups.num_layers * (heads[-1][1] + neurons[-1][1]),
        heads=heads,
        neurons=neurons,
        batch_size=2,
        sequence_length=13,
        threads=1,
        device="cpu",
        dtype="float32",
        attention="sdpa",
        torch="2.13.0",
    )
