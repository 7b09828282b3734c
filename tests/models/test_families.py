"""What the longer tests show for the first family, in short for every other: training, and shrinking."""

import pytest
import torch
import transformers
from families import (
    MODELS,
    ONE_EACH,
    OTHERS,
    batch,
    counts,
    largest_difference,
    outputs,
    removed_and_next,
    tiny_model,
    zero,
    zero_uneven,
)
from torch import Tensor

from hf_oto import HSPG, OTOConfig, compress, shrink
from hf_oto.hspg.budget import allowance, dense_cost
from hf_oto.models.groups import partition

STEPS = 12
CONFIG = OTOConfig(target_sparsity=0.5, min_heads=0, min_neurons=0, round_to=2, pruning_periods=3)


def train(model, shrinking=False):
    """Some steps on the squares of all that the model gives; in evaluation mode, without dropout."""
    optimizer = HSPG(torch.optim.AdamW(model.named_parameters(), lr=3e-3), partition(model), CONFIG, STEPS)
    for step in range(STEPS):
        found = model(**batch(model, seed=step)).values()
        loss = sum(value.square().mean() for value in found if isinstance(value, Tensor) and value.requires_grad)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if shrinking and optimizer.shrink_due:
            shrink(model, optimizer)
    return optimizer


@pytest.mark.parametrize("name", ONE_EACH[1:] + OTHERS)
def test_training_meets_the_target_and_goes_on_in_a_shrunk_model(name, tmp_path):
    full = tiny_model(name).double()
    full.save_pretrained(tmp_path / "dense")
    groups, before = partition(full), outputs(full)
    optimizer = train(full)
    removed, cheapest = removed_and_next(groups, CONFIG, optimizer.zero_masks())
    budget = allowance(0.5, dense_cost(groups, CONFIG))
    assert budget - cheapest < removed <= budget
    assert largest_difference(outputs(full), before) > 1e-2
    small = compress(full)
    assert largest_difference(outputs(small), outputs(full)) <= 1e-5

    model = type(full).from_pretrained(tmp_path / "dense").eval()
    optimizer = train(model, shrinking=True)
    assert counts(model) == counts(small) and type(model) is type(small)
    # In float64 the order of sums leaves 1e-13 after a step, which twelve of them let grow.
    assert largest_difference(outputs(model), outputs(small)) <= 1e-8
    model.save_pretrained(tmp_path / "small")
    loaded = type(model).from_pretrained(tmp_path / "small")
    assert largest_difference(outputs(loaded), outputs(model)) == 0
    again = tiny_model(name).double()
    shrink(again, HSPG(torch.optim.AdamW(again.named_parameters()), groups, CONFIG, STEPS), like=model.config)
    again.load_state_dict(model.state_dict())
    assert largest_difference(outputs(again), outputs(model)) <= 1e-12


@pytest.mark.parametrize("name", OTHERS)
def test_no_group_is_without_a_gradient(name):
    model = tiny_model(name)
    found = model(**batch(model)).values()
    sum(value.square().sum() for value in found if isinstance(value, Tensor) and value.requires_grad).backward()
    parameters = dict(model.named_parameters())
    for array in partition(model).arrays:
        for owned in array.owned:
            if not owned.name.endswith("bias"):  # softmax takes no notice of a key's bias
                assert parameters[owned.name].grad.abs().sum() > 0, owned.name


# What a config may turn on or off in the blocks of a family.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DebertaV2Model", {"share_att_key": True}),
        ("DebertaV2Model", {"pos_att_type": ["c2p"]}),
        ("DebertaV2Model", {"pos_att_type": None}),
        ("DebertaV2Model", {"relative_attention": False, "position_biased_input": True}),
        ("ModernBertModel", {"attention_bias": True, "mlp_bias": True}),
        ("EsmModel", {"position_embedding_type": "absolute", "emb_layer_norm_before": True}),
        ("ViTModel", {"qkv_bias": False}),
        ("Wav2Vec2Model", {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "adapter_attn_dim": 4}),
        ("LlamaModel", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8}),
        ("LlamaModel", {"num_attention_heads": 4, "head_dim": None, "pad_token_id": -1}),
        (
            "Qwen3Model",
            {"attention_bias": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        ),
    ],
)
def test_blocks_as_the_config_has_them(name, options, tmp_path):
    model = tiny_model(name, **options)
    groups = partition(model)
    everything = {parameter for array in groups.arrays for parameter, _ in array.members}
    projections = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {parameter for parameter in projections if ".0." in parameter and "adapter" not in parameter}
    assert blocks and blocks <= everything
    kept = zero_uneven(model)
    small = compress(model)
    assert counts(small) == kept
    assert largest_difference(outputs(small), outputs(model)) <= 1e-5
    small.save_pretrained(tmp_path)
    assert largest_difference(outputs(transformers.AutoModel.from_pretrained(tmp_path)), outputs(small)) < 1e-6


@pytest.mark.parametrize("name", [name for names in MODELS.values() for name in names if name.endswith("CausalLM")])
@pytest.mark.parametrize("headless", [0, 1])
def test_generation_with_a_cache_gives_the_zeroed_models_tokens(name, headless, tmp_path):
    """The first block tells how many tokens a cache holds, also when it has lost its heads."""
    model = tiny_model(name)
    model.generation_config.repetition_penalty = 1.25
    zero_uneven(model)
    zero(model, partition(model).arrays[2 * headless], range(4))
    small = compress(model)
    assert small.generation_config.repetition_penalty == 1.25
    small.save_pretrained(tmp_path)
    prompt = batch(model)
    prompt = {key: value.flip(1) for key, value in prompt.items()}  # padding on the left
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**prompt, **options)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for copy in (small, loaded):
        for more in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
            found = copy.generate(**prompt, **options, **more)
            assert torch.equal(found.sequences, expected.sequences)
            for logits, right in zip(found.logits, expected.logits, strict=True):
                assert (logits - right).abs().max() <= 1e-5 * right.abs().max()
    beams = {"num_beams": 2, "max_new_tokens": 5}
    assert torch.equal(small.generate(**prompt, **beams), model.generate(**prompt, **beams))
