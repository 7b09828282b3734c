"""partition: which weights belong to which group, in every family, and which models have none."""

import pytest
import torch
import transformers
from families import (
    ALL,
    EVERY,
    ONE_EACH,
    counts,
    family_of,
    group_sizes,
    owned,
    tiny_config,
    tiny_model,
    zero,
    zero_uneven,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_oto.hspg.budget import group_cost
from hf_oto.models.configuration_oto import BLOCK_SPECS, FAMILIES, dense_model_type, has_bias
from hf_oto.models.groups import REFUSED, partition, zero_groups
from hf_oto.models.surgery import compress


@pytest.mark.parametrize("name", ALL)
def test_groups_own_heads_and_neurons_and_nothing_else(name):
    model = tiny_model(name)
    groups = partition(model)
    assert (groups.model_type, groups.num_layers) == (family_of(name), 3)
    assert (groups.hidden_size, groups.head_size, groups.dense_heads, groups.dense_neurons) == (32, 8, 4, 24)
    assert groups.block_counts == ((4,) * 3, (24,) * 3)
    assert groups.num_groups == 3 * 28
    parameters = dict(model.named_parameters())
    for array in groups.arrays:
        size = sum(part.numel() for part in owned(model, array, 0))
        assert size == group_sizes(name)[array.kind == "neurons"]
        assert size == group_cost(groups, array.kind, "params", 1)
        # Together the groups own each of their parameters whole, and no entry twice.
        for each in array.owned:
            positions = each.positions(array.count, torch.arange(array.count))
            assert sorted(positions.tolist()) == list(range(parameters[each.name].shape[each.dim]))
    names = [name for array in groups.arrays for name, _ in array.members]
    assert len(names) == len(set(names))
    spec = BLOCK_SPECS[family_of(name)]
    blocks = [name for name in parameters if f".{spec.blocks}." in f".{name}"]
    # What is left of the blocks: LayerNorms, and the biases of the output projections.
    rest = {name.partition(f"{spec.blocks}.")[2].partition(".")[2] for name in set(blocks) - set(names)}
    flags = {spec.attention_out: spec.out_bias, spec.neurons_out: spec.neuron_bias}
    biases = {f"{path}.bias" for path, flag in flags.items() if has_bias(flag, vars(model.config))}
    assert biases < rest and all("norm" in name.lower() for name in rest - biases)


@pytest.mark.parametrize("name", EVERY)
def test_a_zero_group_adds_nothing(name):
    """And is one only where all that it owns is zero: what has an entry left may learn."""
    model = tiny_model(name)
    parameters = dict(model.named_parameters())
    for array in partition(model).arrays[:2]:
        assert not zero_groups(array, parameters).any()
        zero(model, array, [1, 3])
        assert zero_groups(array, parameters).nonzero().flatten().tolist() == [1, 3]
        for part in owned(model, array, 1):
            before = part.clone()
            part[(-1,) * part.dim()] = 1e-30
            assert zero_groups(array, parameters).nonzero().flatten().tolist() == [3]
            part.copy_(before)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.data())
def test_rows_and_columns_of_a_group(heads, head_size, neurons, data):
    config = transformers.BertConfig(
        hidden_size=heads * head_size,
        num_attention_heads=heads,
        intermediate_size=neurons,
        num_hidden_layers=1,
        vocab_size=5,
        max_position_embeddings=4,
    )
    model = transformers.BertModel(config)
    for array in partition(model).arrays:
        group = data.draw(st.integers(0, array.count - 1))
        with torch.no_grad():
            for name, _ in array.members:
                dict(model.named_parameters())[name].fill_(1)
        zero(model, array, [group])
        for name, dim in array.members:
            parameter = dict(model.named_parameters())[name]
            gone = (parameter == 0).movedim(dim, 0).flatten(1).all(dim=1) if parameter.dim() > 1 else parameter == 0
            assert gone.nonzero().flatten().tolist() == list(range(group * array.width, (group + 1) * array.width))
            assert int((parameter == 0).sum()) == array.width * parameter.numel() // parameter.shape[dim]


@pytest.mark.parametrize("name", EVERY)
def test_a_pruned_model_has_the_groups_that_are_left(name):
    model = tiny_model(name)
    kept = zero_uneven(model)
    groups = partition(compress(model))
    assert list(groups.block_counts.blocks) == kept
    assert (groups.dense_count("heads"), groups.dense_count("neurons")) == (4, 24)
    assert groups.arrays[2].count == 0 and groups.arrays[2].members == ()
    assert zero_groups(groups.arrays[2], {}).tolist() == []


def test_bert_base_has_its_37008_groups_without_a_weight():
    with torch.device("meta"):
        model = transformers.BertForQuestionAnswering(transformers.BertConfig())
    groups = partition(model)
    assert groups.num_groups == 12 * (12 + 3072) == 37008
    assert len(groups.arrays) == 24


def test_models_without_known_groups_are_refused():
    supported = f"Supported families: bert, roberta, .*{list(BLOCK_SPECS)[-1]}"
    funnel = transformers.FunnelModel(
        transformers.FunnelConfig(vocab_size=9, d_model=8, n_head=2, d_head=4, d_inner=8)
    )
    with pytest.raises(ValueError, match=f"'funnel', whose groups are not known. {supported}"):
        partition(funnel)
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(ValueError, match=f"'gpt2', which is refused: its projections keep rows.* {supported}"):
        partition(gpt2)
    with pytest.raises(ValueError, match=f"not wrapped, got Linear. {supported}"):
        partition(nn.Linear(2, 2))
    with torch.device("meta"):
        for family, reason in REFUSED.items():
            model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family))
            with pytest.raises(ValueError, match=f"'{family}', which is refused: {reason}. {supported}"):
                partition(model)
    wrapped = nn.DataParallel(tiny_model("BertModel"))
    with pytest.raises(ValueError, match="not wrapped, got DataParallel"):
        partition(wrapped)


@pytest.mark.parametrize("name", [name for name in ONE_EACH if "Distil" not in name])
@pytest.mark.parametrize("flag", ["is_decoder", "add_cross_attention"])
def test_decoders_are_refused(name, flag):
    model = tiny_model(name)
    setattr(model.config, flag, True)
    with pytest.raises(ValueError, match=f"`{flag}=True`, which is not supported: .*Set it to False"):
        partition(model)


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize(("activation", "fine"), [("relu", True), ("silu", True), ("tanh", True), ("sigmoid", False)])
def test_the_activation_has_to_map_zero_to_zero(name, activation, fine):
    field = "activation" if "Distil" in name else "hidden_act"
    config = tiny_config(family_of(name))
    setattr(config, field, activation)
    if not fine and "Distil" in name:  # its own check lists what it takes
        model = tiny_model(name)
        model.distilbert.transformer.layer[2].ffn.activation = nn.Sigmoid()
    else:
        model = getattr(transformers, name)(config)
    if fine:
        assert partition(model).num_groups == 84
    else:
        with pytest.raises(ValueError, match=r"act\(0\) = 0.5: a zero neuron would still add"):
            partition(model)


def test_projections_that_are_no_plain_linear_layers_are_refused():
    model = tiny_model("BertModel")
    model.encoder.layer[1].attention.self.value.bias = None
    with pytest.raises(ValueError, match="layer.1.attention.self.value.bias' of shape None where .32,. is expected"):
        partition(model)
    model = tiny_model("BertModel")
    model.encoder.layer[0].output.dense = nn.Sequential(nn.Linear(24, 32))
    with pytest.raises(ValueError, match="no plain linear layer at 'encoder.layer.0.output.dense.weight'"):
        partition(model)
    model = tiny_model("BertModel")
    model.config.num_attention_heads = 3  # heads of 10
    with pytest.raises(ValueError, match="32 columns in .*, which is no multiple of the head size 10"):
        partition(model)


def test_every_pruned_type_finds_its_family():
    assert [dense_model_type(f"oto_{family.replace('-', '_')}") for family in BLOCK_SPECS] == list(BLOCK_SPECS)
    assert dense_model_type("oto_gpt2") == "oto_gpt2"
    assert not set(REFUSED) & set(BLOCK_SPECS) and set(FAMILIES) == set(BLOCK_SPECS)
    assert counts(tiny_model("BertModel")) == [(4, 24)] * 3


# Models that are something else than they were loaded as: one sentence each.


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="not wrapped, got OptimizedModule"):
        partition(torch.compile(tiny_model("BertModel")))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_model_that_is_wrapped_in_part_is_refused(wrap):
    model = tiny_model("BertForQuestionAnswering")
    model.bert = wrap(model.bert)
    with pytest.raises(ValueError, match=r"must not be wrapped, a part of it is: 'bert\.(module|_orig_mod)\."):
        partition(model)
    model = tiny_model("BertForQuestionAnswering")
    model.bert.encoder.layer[1] = wrap(model.bert.encoder.layer[1])
    with pytest.raises(ValueError, match=r"a part of it is: 'bert.encoder.layer.1\.(module|_orig_mod)\."):
        partition(model)


def test_adapters_are_refused():
    model = tiny_model("BertModel")
    model.peft_config = {"default": object()}
    with pytest.raises(ValueError, match="must not have adapters, got BertModel: .*merge_and_unload"):
        partition(model)


class Packed(torch.Tensor):
    """As libraries keep quantized weights: a tensor of a class of their own, of the shape that it stands for."""


@pytest.mark.parametrize("kind", ["integers", "packed"])
def test_quantized_weights_are_refused(kind):
    model = tiny_model("BertModel")
    dense = model.encoder.layer[0].output.dense
    weight = dense.weight.detach()
    new = weight.char() if kind == "integers" else weight.as_subclass(Packed)
    dense.weight = nn.Parameter(new, requires_grad=False)
    with pytest.raises(ValueError, match="must have plain weights, 'encoder.layer.0.output.dense.weight' is a .* of "):
        partition(model)
