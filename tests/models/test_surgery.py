"""The cut model computes what the zeroed one does, for every family and task head, or is not returned."""

import importlib

import pytest
import torch
import transformers
from families import (
    ALL,
    EVERY,
    MODELS,
    ONE_EACH,
    attentions,
    batch,
    counts,
    largest_difference,
    outputs,
    tiny_model,
    zero,
    zero_uneven,
)
from torch import nn

from hf_oto.hspg.budget import group_cost
from hf_oto.models import comparing, modeling_oto, surgery
from hf_oto.models.empty_models import pruned_config
from hf_oto.models.groups import BlockCounts, partition
from hf_oto.models.surgery import check_compressible, compress

# Cut and zeroed model add the same float32 numbers in another order. Three blocks of width 32 are off by a few 1e-7 of
# the largest output; a single wrong row or column by more than 1e-2.
TOLERANCE = 1e-5


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_count_of(model, names):
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)


@pytest.mark.parametrize(("name", "attention"), [(name, attention) for name in ALL for attention in attentions(name)])
def test_cut_model_computes_what_the_zeroed_one_does(name, attention):
    model = tiny_model(name, attention)
    dense = outputs(model)
    kept = zero_uneven(model)
    zeroed = outputs(model)
    assert largest_difference(zeroed, dense) > 1e-2  # the groups did matter

    cut = compress(model)
    assert largest_difference(outputs(cut), zeroed) <= TOLERANCE
    assert type(cut) is getattr(modeling_oto, f"OTO{name}")
    assert cut.config._attn_implementation == attention
    assert counts(cut) == kept
    groups = partition(model)
    head, neuron = (group_cost(groups, kind, "params", 1) for kind in ("heads", "neurons"))
    gone = sum((4 - heads) * head + (24 - neurons) * neuron for heads, neurons in kept)
    gone += sum(parameter_count_of(model, array.shared) for array in groups.arrays[::2] if not kept[array.layer][0])
    assert parameter_count(cut) == parameter_count(model) - gone


def test_every_head_of_every_family_is_in_the_table():
    for family, names in MODELS.items():
        name = family.replace("-", "_")
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        others = ("PreTrainedModel", "LMHeadModel", "ForCausalLM", "Layer", "Decoder")
        heads = {name for name in module.__all__ if not name.endswith(others)}
        assert heads == {name for name in names if not name.endswith(others)}


@pytest.mark.parametrize("name", EVERY)
def test_a_group_is_cut_where_all_that_it_owns_is_zero(name):
    """Not where its output alone is, or what goes in: blocks that are put between others begin so, and learn."""
    model = tiny_model(name)
    for array in partition(model).arrays[:4]:
        zero(model, array, [0], ((array.columns, 1),))
        zero(model, array, [1], tuple(array.rows))
        zero(model, array, [2])
    for array in partition(model).arrays[4:]:  # a whole block without outputs
        zero(model, array, range(array.count), ((array.columns, 1),))
    zeroed = outputs(model)
    cut = compress(model)
    assert counts(cut) == [(3, 23), (3, 23), (4, 24)]
    assert largest_difference(outputs(cut), zeroed) <= TOLERANCE


@pytest.mark.parametrize("name", EVERY)
def test_a_pruned_model_is_pruned_further(name):
    model = tiny_model(name)
    zero_uneven(model)
    once = compress(model)
    assert counts(once) == [(3, 16), (0, 12), (2, 0)]
    zero(once, partition(once).arrays[0], [1])
    zero(once, partition(once).arrays[3], range(12))
    zeroed = outputs(once)
    twice = compress(once)
    assert type(twice) is type(once)
    assert counts(twice) == [(2, 16), (0, 0), (2, 0)]
    assert largest_difference(outputs(twice), zeroed) <= TOLERANCE
    assert partition(twice).dense_heads == 4 and partition(twice).dense_neurons == 24


@pytest.mark.parametrize("name", EVERY)
def test_nothing_zero_gives_the_pruned_class_with_dense_widths(name):
    model = tiny_model(name)
    cut = compress(model)
    assert counts(cut) == [(4, 24)] * 3
    assert all(torch.equal(*pair) for pair in zip(cut.parameters(), model.parameters(), strict=True))


def test_everything_may_go():
    model = tiny_model("BertForQuestionAnswering")
    for array in partition(model).arrays:
        zero(model, array, range(array.count))
    zeroed = outputs(model)
    cut = compress(model)
    assert counts(cut) == [(0, 0)] * 3
    assert largest_difference(outputs(cut), zeroed) <= TOLERANCE


def test_what_is_cut_in_inference_mode_can_be_trained():
    model = tiny_model("RobertaForSequenceClassification")
    zero_uneven(model)
    with torch.inference_mode():
        cut = compress(model)
        assert torch.is_inference_mode_enabled()
    cut(**batch(model), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(p.grad is not None for p in cut.classifier.parameters())
    with torch.no_grad():
        assert all(parameter.requires_grad for parameter in compress(model).parameters())
        assert not torch.is_grad_enabled()


def test_the_input_stays_as_it_was():
    model = tiny_model("RobertaForSequenceClassification")
    zero_uneven(model)
    model.train()
    model.roberta.embeddings.eval()
    model.roberta.embeddings.requires_grad_(False)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    config = model.config.to_json_string(use_diff=False)
    random_numbers = torch.get_rng_state()

    cut = compress(model)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert [module.training for module in model.modules()] == modes
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert model.config.to_json_string(use_diff=False) == config
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())

    assert cut.training
    frozen = {name for name, parameter in cut.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in model.named_parameters() if not parameter.requires_grad} != set()
    tensors = [[*half.parameters(), *half.buffers()] for half in (cut, model)]
    addresses = [{tensor.data_ptr() for tensor in half} for half in tensors]
    assert not addresses[0] & addresses[1]
    assert all(tensor.is_contiguous() for tensor in cut.parameters())


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_kept(name, dtype):
    model = tiny_model(name).to(dtype)
    zero_uneven(model)
    zeroed = outputs(model.float())
    cut = compress(model.to(dtype))
    assert cut.dtype == dtype and model.dtype == dtype
    assert {parameter.dtype for parameter in cut.parameters()} == {dtype}
    assert largest_difference(outputs(cut.float()), zeroed) <= TOLERANCE


@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "BertForPreTraining", "DistilBertForMaskedLM", "ElectraForMaskedLM"]
)
def test_tied_embeddings_stay_tied(name):
    model = tiny_model(name)
    zero_uneven(model)
    cut = compress(model)
    assert cut.get_output_embeddings().weight is cut.get_input_embeddings().weight
    untied = tiny_model(name, tie_word_embeddings=False)
    zero_uneven(untied)
    cut = compress(untied)
    assert cut.get_output_embeddings().weight is not cut.get_input_embeddings().weight


def test_the_config_keeps_what_is_not_about_widths():
    labels = {0: "no", 1: "maybe", 2: "yes"}
    model = tiny_model(
        "BertForSequenceClassification",
        id2label=labels,
        label2id={label: index for index, label in labels.items()},
        problem_type="multi_label_classification",
        hidden_dropout_prob=0.3,
        own_setting="kept",
        dtype="bfloat16",
    )
    model.config.name_or_path = "somebody/some-bert"
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.auto_map = {"AutoModel": "other.Model"}
    zero_uneven(model)
    config = compress(model).config
    assert config.architectures is None and not hasattr(config, "auto_map")  # those of the dense class
    assert config.model_type == "oto_bert"
    assert config.id2label == labels and config.label2id["maybe"] == 1
    assert (config.problem_type, config.hidden_dropout_prob) == ("multi_label_classification", 0.3)
    assert (config.own_setting, config.dtype) == ("kept", torch.bfloat16)
    assert config.name_or_path == "somebody/some-bert"
    assert (config.hidden_size, config.head_dim, config.num_hidden_layers) == (32, 8, 3)
    assert vars(config)["num_attention_heads"] == 4 and vars(config)["intermediate_size"] == 24  # the dense counts


def test_own_inputs_are_used():
    model = tiny_model("BertForTokenClassification")
    zero_uneven(model)
    inputs = {**batch(model), "labels": torch.randint(0, 2, (3, 13)), "output_attentions": True}
    assert counts(compress(model, example_inputs=inputs))[0] == (3, 16)
    with pytest.raises(IndexError):  # token 61 of 61: they did arrive
        compress(model, example_inputs={"input_ids": torch.tensor([[61]])})
    assert not model.training


def test_a_classifier_without_a_padding_token_is_compared_on_a_row_alone():
    model = tiny_model("LlamaForSequenceClassification", pad_token_id=None)
    check_compressible(model)
    kept = zero_uneven(model)
    assert counts(compress(model)) == kept


def test_half_precision_inputs_are_compared_in_float32():
    model = tiny_model("BertModel").bfloat16()
    zero_uneven(model)
    embeddings = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    assert compress(model, example_inputs={"inputs_embeds": embeddings}).dtype == torch.bfloat16


def test_attention_weights_have_a_map_for_each_head_that_is_left():
    model = tiny_model("BertModel", "eager", output_attentions=True)
    zero_uneven(model)
    cut = compress(model)
    attentions = cut(**batch(cut)).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(3, 3, 13, 13), (3, 0, 13, 13), (3, 2, 13, 13)]
    blocks = [block.attention.self for block in cut.encoder.layer]
    assert [(blocks[i].num_attention_heads, blocks[i].all_head_size) for i in (0, 2)] == [(3, 24), (2, 16)]
    context, weights = blocks[1](torch.ones(3, 13, 32))
    assert not context.any()
    cut.set_attn_implementation("sdpa")
    assert blocks[1](torch.ones(3, 13, 32))[1] is None  # as every block's


@pytest.mark.parametrize(
    "name", ["BertForQuestionAnswering", "ElectraForMaskedLM", "DistilBertForTokenClassification"]
)
def test_a_base_model_inside_another_is_cut(name):
    model = tiny_model(name).base_model
    zero_uneven(model)
    cut = compress(model)
    assert type(cut).__name__ == f"OTO{type(model).__name__}"
    assert set(cut.state_dict()) <= set(model.state_dict())  # no pooler out of nothing
    assert largest_difference(outputs(cut), outputs(model)) <= TOLERANCE
    again = compress(compress(tiny_model(name)).base_model)
    assert type(again) is type(cut)


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_wrong_cut_is_not_returned(name, monkeypatch):
    model = tiny_model(name)
    zero_uneven(model)
    right = surgery._indices

    def wrong(groups, kept):
        found = right(groups, kept)
        dim, entries = found[groups.arrays[1].columns]
        found[groups.arrays[1].columns] = dim, entries.roll(1)  # the columns of other neurons
        return found

    monkeypatch.setattr(surgery, "_indices", wrong)
    with pytest.raises(ValueError, match=r"does not compute what `model` computes: it is off in `\w+_logits` by"):
        compress(model)


def test_a_group_that_is_not_zero_is_not_missed(monkeypatch):
    model = tiny_model("BertForSequenceClassification")
    monkeypatch.setattr(surgery, "zero_groups", lambda array, parameters: torch.arange(array.count) == 1)
    with pytest.raises(ValueError, match="off in `logits` by"):
        compress(model)
    assert counts(compress(model, atol=1e9)) == [(3, 23)] * 3  # the tolerance is the one given


def test_outputs_that_are_no_numbers_are_no_agreement():
    model = tiny_model("BertForSequenceClassification")
    nn.init.constant_(model.classifier.bias, float("nan"))
    with pytest.raises(ValueError, match="off in `logits` by nan"):
        compress(model)


def test_reduced_precision_of_float32_products_is_no_difference(monkeypatch):
    """With TF32, float32 products are right to three digits: float64 decides."""
    model = tiny_model("BertForSequenceClassification")
    zero_uneven(model)
    exact, asked = comparing.plain_outputs, []

    def rounded(model, inputs, precision, device):
        asked.append(precision)
        found = exact(model, inputs, precision, device)
        return {
            key: value * (1 + 1e-3 * torch.rand(())) if precision == torch.float32 else value
            for key, value in found.items()
        }

    monkeypatch.setattr(comparing, "plain_outputs", rounded)
    assert counts(compress(model))[1] == (0, 12)
    assert asked == [torch.float32] * 2 + [torch.float64] * 2


class Custom(transformers.BertForQuestionAnswering): ...


def test_models_without_a_pruned_class_are_refused():
    with pytest.raises(ValueError, match="Custom, which is no class of Transformers' own.*BertForQuestionAnswering"):
        compress(Custom(tiny_model("BertForQuestionAnswering").config))
    with pytest.raises(ValueError, match="BertLMHeadModel, which is no class"):
        compress(transformers.BertLMHeadModel(tiny_model("BertModel").config))
    with pytest.raises(ValueError, match="is_decoder"):
        compress(tiny_model("BertModel", is_decoder=True))
    gpt2 = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)
    with pytest.raises(ValueError, match="'gpt2', which is refused: .*bert, roberta, xlm-roberta"):
        compress(transformers.GPT2Model(gpt2))
    with pytest.raises(ValueError, match="'gpt2'.*bert, roberta"):
        pruned_config(gpt2, BlockCounts((1,), (1,)))


def test_models_that_are_not_what_their_class_is_are_refused():
    added = tiny_model("BertForQuestionAnswering")
    added.probe = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no place for \['probe.bias', 'probe.weight'\]"):
        compress(added)
    removed = tiny_model("BertForQuestionAnswering")
    del removed.qa_outputs.bias
    with pytest.raises(ValueError, match=r"needs \['qa_outputs.bias'\]"):
        compress(removed)
    resized = tiny_model("BertForQuestionAnswering")
    resized.qa_outputs = nn.Linear(32, 5)
    with pytest.raises(ValueError, match=r"'qa_outputs.weight'.*\(5, 32\) instead of \(2, 32\)"):
        compress(resized)
    with torch.device("meta"):
        empty = tiny_model("BertForQuestionAnswering")
    with pytest.raises(ValueError, match="meta device"):
        compress(empty)


def test_pruned_config_wants_a_count_of_each_kind_per_block():
    config = tiny_model("BertModel").config
    assert pruned_config(config, BlockCounts((1, 0, 4), (24, 3, 0))).per_layer_config[1].intermediate_size == 3
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        pruned_config(config, BlockCounts((1, 0, 4), (24, 3)))
    with pytest.raises(ValueError, match="one entry for each of the 3 blocks"):
        pruned_config(config, BlockCounts((1, 0), (24, 3)))
    with pytest.raises(ValueError, match="from 0 to the dense 4, got 5"):
        pruned_config(config, BlockCounts((1, 0, 5), (24, 3, 0)))
