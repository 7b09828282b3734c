"""The comparison of a cut model with the one it came from sees every structure, and nothing but the function."""

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import CONFIGS, EVERY, ONE_EACH, batch, counts, family_of, tiny_model, zero_uneven
from torch import nn

from hf_oto.models import comparing
from hf_oto.models.comparing import compare, plain_forward
from hf_oto.models.configuration_oto import BLOCK_SPECS
from hf_oto.models.example_inputs import longest_input, random_inputs
from hf_oto.models.groups import partition
from hf_oto.models.surgery import check_compressible, compress

# What published configs say of special tokens and of positions, with the models that have them.
PUBLISHED = {
    "bert": {"vocab_size": 30522, "pad_token_id": 0, "max_position_embeddings": 512},  # bert-base-uncased
    "roberta": {"vocab_size": 50265, "pad_token_id": 1, "max_position_embeddings": 514},  # roberta-base
    "xlm-roberta": {"vocab_size": 250002, "pad_token_id": 1, "max_position_embeddings": 514},  # xlm-roberta-base
    "electra": {"vocab_size": 30522, "pad_token_id": 0, "max_position_embeddings": 512},  # electra-base
    "distilbert": {"vocab_size": 30522, "pad_token_id": 0, "max_position_embeddings": 512},  # distilbert-base-uncased
    "camembert": {"vocab_size": 32005, "pad_token_id": 1, "max_position_embeddings": 514},  # camembert-base
    "bert-generation": {"vocab_size": 50358, "pad_token_id": 0, "max_position_embeddings": 512},  # bert_for_seq_…
    "mpnet": {"vocab_size": 30527, "pad_token_id": 1, "max_position_embeddings": 514},  # mpnet-base
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "max_position_embeddings": 1026},  # esm2
    "modernbert": {  # ModernBERT-base
        **{"vocab_size": 50368, "pad_token_id": 50283, "bos_token_id": 50281, "eos_token_id": 50282},
        **{"cls_token_id": 50281, "sep_token_id": 50282, "max_position_embeddings": 8192},
    },
    "deberta-v2": {"vocab_size": 128100, "pad_token_id": 0, "max_position_embeddings": 512},  # deberta-v3-base
    "llama": {  # Llama 3.2, whose tokenizers pad with <|finetune_right_pad_id|>
        **{"vocab_size": 128256, "pad_token_id": 128004, "bos_token_id": 128000, "eos_token_id": 128001},
        "max_position_embeddings": 131072,
    },
    "qwen3": {  # Qwen3-0.6B
        **{"vocab_size": 151936, "pad_token_id": 151643, "bos_token_id": 151643, "eos_token_id": 151645},
        "max_position_embeddings": 40960,
    },
}
LONGEST = {
    **dict.fromkeys(("bert", "electra", "distilbert", "bert-generation", "deberta-v2"), 512),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), 512),
    **{"esm": 1024, "modernbert": 8192, "llama": 131072, "qwen3": 40960},
}
TEXT = [name for name in EVERY if family_of(name) in PUBLISHED]
BIASED = {
    "modernbert": {"attention_bias": True, "mlp_bias": True},
    "llama": {"attention_bias": True, "mlp_bias": True},
}
ROTARY = ("modernbert", "esm", "llama", "qwen3")  # there a key's bias matters: elsewhere it is the same for all


def published(name):
    """A tiny model with the special tokens, the positions and the vocabulary of a published one."""
    family = family_of(name)
    return tiny_model(name, **PUBLISHED.get(family, {}), **BIASED.get(family, {}))


def breaks(model):
    """Every way to break a projection of a block: (what, undo), the model broken in between."""
    spec, groups = BLOCK_SPECS[partition(model).model_type], partition(model)
    parameters = dict(model.named_parameters())
    for array in groups.arrays[:2]:
        for owned in array.owned:
            parameter = parameters[owned.name]
            for block in owned.blocks:
                length = array.count * owned.width
                part = parameter.data.narrow(owned.dim, block * length, length)
                before = part.clone()
                projection = [spec.query, spec.key, spec.value][block] if len(owned.blocks) == 3 else owned.name
                if owned.name.endswith("bias"):
                    if spec.key in projection and groups.model_type not in (*ROTARY, "deberta-v2"):
                        continue
                    if "pos_key" in projection:
                        continue
                    part.zero_()
                    yield f"{owned.name} of {projection} is missing"
                else:
                    part.neg_()
                    yield f"{owned.name}, {block}: sign"
                    part.copy_(before)
                    heads = before.unflatten(owned.dim, (array.count, owned.width))
                    part.copy_(heads.roll(1, owned.dim).flatten(owned.dim, owned.dim + 1))
                    yield f"{owned.name}, {block}: order"
                part.copy_(before)


@pytest.mark.parametrize("name", EVERY)
def test_no_broken_projection_gets_through(name):
    model = published(name)
    cut = compress(model)
    inputs = random_inputs(model)
    compare(model, cut, inputs, 1e-5)
    seen = []
    for what in breaks(cut):
        with pytest.raises(ValueError, match="does not compute what `model` computes"):
            compare(model, cut, inputs, 1e-5)
            pytest.fail(f"{name}: {what}")
        seen.append(what)
    assert len(seen) >= 2 * 5
    compare(model, cut, inputs, 1e-5)  # and all is whole again


@pytest.mark.parametrize("name", TEXT)
def test_the_longest_input_is_that_of_the_model(name):
    assert set(LONGEST) == set(PUBLISHED) and set(CONFIGS) - set(PUBLISHED) == {"vit", "wav2vec2", "hubert"}
    model, family = published(name), family_of(name)
    assert longest_input(model) == LONGEST[family]
    if LONGEST[family] == 512:
        shape = (1, 2, 512) if name.endswith("MultipleChoice") else (1, 512)
        model(torch.full(shape, 5))  # and it reads as many
        if "relative_attention" not in CONFIGS[family]:
            with pytest.raises((RuntimeError, IndexError)):
                model(torch.full((*shape[:-1], 513), 5))


@pytest.fixture
def bf16():
    """An accelerator, of which a process has one for good."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_forward_under_autocast_is_passed_over(bf16):
    """As accelerate has put it in place, for good: bfloat16's eight bits are no difference between the models."""
    model = tiny_model("BertForQuestionAnswering")
    zero_uneven(model)
    assert bf16.prepare(model) is model and "forward" in vars(model)
    patched = model.forward
    with plain_forward(model):
        assert model(**batch(model)).start_logits.dtype == torch.float32
        exact = model(**batch(model)).start_logits
    assert model.forward is patched
    assert (model(**batch(model)).start_logits - exact).abs().max() > 1e-4
    cut = compress(model)
    compare(model, cut, random_inputs(model), 1e-6)
    assert model.forward is patched and "forward" not in vars(cut)


def test_kernels_for_half_precision_are_replaced_while_comparing():
    called = []

    def half_only(module, query, key, value, attention_mask, **kwargs):
        called.append(query.dtype)
        if query.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        found = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask)
        return found.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("half_only", half_only)
    transformers.AttentionMaskInterface.register("half_only", transformers.masking_utils.sdpa_mask)
    model = tiny_model("BertForQuestionAnswering").bfloat16()
    zero_uneven(model)
    model.set_attn_implementation("half_only")
    model(**batch(model))
    assert called == [torch.bfloat16] * 3
    check_compressible(model)
    cut = compress(model)
    assert called == [torch.bfloat16] * 3
    assert {each.config._attn_implementation for each in (model, cut)} == {"half_only"}
    cut(**batch(cut))
    assert len(called) > 3 and set(called) == {torch.bfloat16}


def test_the_verdict_needs_no_float64_on_the_models_device(monkeypatch):
    """Metal and some of Intel's devices have none; the meta device stands in for one here."""
    asked = []

    def outputs(model, inputs, precision, device):
        asked.append((precision, device.type))
        return {"logits": torch.zeros(1) + len(asked) % 2 * (precision == torch.float32)}

    monkeypatch.setattr(comparing, "plain_outputs", outputs)
    with torch.device("meta"):
        model = tiny_model("BertModel")
    compare(model, model, {}, 1e-5)
    assert asked == [(torch.float32, "meta")] * 2 + [(torch.float64, "cpu")] * 2


# What compress would refuse after the training.


class Masked(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input, self.weight * 1, self.bias)  # as yet the same


class Named(nn.Linear): ...


def test_a_linear_layer_with_a_forward_of_its_own_is_refused_before_training():
    model = tiny_model("BertForQuestionAnswering")
    model.bert.encoder.layer[1].intermediate.dense.__class__ = Masked
    with pytest.raises(ValueError, match=r"a test_comparing.Masked at 'bert.encoder.layer.1.intermediate.dense'"):
        check_compressible(model)
    model.bert.encoder.layer[1].intermediate.dense.__class__ = Named  # which computes what a linear layer does
    check_compressible(model)


def test_a_hook_that_changes_what_is_computed_is_refused_before_training():
    model = tiny_model("BertForQuestionAnswering")
    seen = []
    handle = model.bert.encoder.layer[0].register_forward_hook(lambda module, inputs, output: seen.append(module))
    check_compressible(model)  # it looks on
    assert seen
    handle.remove()
    model.bert.pooler = None
    handle = model.bert.encoder.layer[0].output.register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(ValueError, match="does not compute what `model` computes"):
        check_compressible(model)
    handle.remove()
    check_compressible(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_fake_quantization_is_refused_before_training():
    model = tiny_model("BertForQuestionAnswering").train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.qconfig = None
    torch.ao.quantization.prepare_qat(model, inplace=True)
    with pytest.raises(ValueError, match="the compressed model would not have it|not built as its class is"):
        check_compressible(model)


class OwnEncoder(transformers.BertModel):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.last_hidden_state = found.last_hidden_state + 0
        return found


def test_an_own_class_inside_is_refused_before_training():
    model = tiny_model("BertForQuestionAnswering")
    model.bert.__class__ = OwnEncoder
    with pytest.raises(ValueError, match=r"a test_comparing.OwnEncoder at 'bert', where its class has a BertModel"):
        check_compressible(model)


@pytest.mark.parametrize("name", EVERY)
def test_what_can_be_compressed_passes_and_stays_as_it_was(name):
    model = tiny_model(name).train()
    zero_uneven(model)
    pruned = compress(model)
    for each in (model, pruned):
        weights = {key: (value.data_ptr(), value.clone()) for key, value in each.state_dict().items()}
        modes = [module.training for module in each.modules()]
        before = counts(each), torch.get_rng_state()
        check_compressible(each)
        assert counts(each) == before[0] and torch.equal(torch.get_rng_state(), before[1])
        assert [module.training for module in each.modules()] == modes
        for key, value in each.state_dict().items():
            assert value.data_ptr() == weights[key][0] and torch.equal(value, weights[key][1])


@pytest.mark.parametrize("name", ONE_EACH)
def test_nothing_is_computed_where_there_are_no_weights(name):
    with torch.device("meta"):
        model = tiny_model(name)
    check_compressible(model)
