"""The plain form of a uniform model: the family's own class, and its own config, which everything loads."""

import json

import pytest
import torch
import transformers
from families import (
    ALL,
    MODELS,
    ONE_EACH,
    counts,
    family_of,
    largest_difference,
    outputs,
    tiny_model,
    zero,
    zero_uneven,
)

from hf_oto import compress
from hf_oto.models.configuration_oto import BLOCK_SPECS
from hf_oto.models.groups import partition

TOLERANCE = 1e-5


def zero_uniformly(model, heads=0, seed=0):
    """As many neurons in every block, other ones each, and so many heads. What each block keeps."""
    generator = torch.Generator().manual_seed(seed)
    for array in partition(model).arrays:
        gone = 10 if array.kind == "neurons" else heads
        zero(model, array, torch.randperm(array.count, generator=generator)[:gone])
    return [(4 - heads, 14)] * 3


@pytest.mark.parametrize("name", ALL)
def test_a_uniform_model_is_written_as_the_familys_own(name, tmp_path):
    spec, family = BLOCK_SPECS[family_of(name)], family_of(name)
    model = tiny_model(name)
    kept = zero_uniformly(model, heads=2 * spec.own_head_size)
    zeroed = outputs(model)
    plain = compress(model, plain=True)
    assert type(plain) is getattr(transformers, name) and plain.config.model_type == family
    assert largest_difference(outputs(plain), zeroed) <= TOLERANCE and counts(plain) == kept
    assert getattr(plain.config, spec.width_field) == 14
    plain.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == family and config["architectures"] == [name]
    of_pruned = {"auto_map", "per_layer_config", "serialize_explicit_per_layer_config", "refused_as_dense"}
    assert not of_pruned & set(config)
    assert ("head_dim" in config) == spec.own_head_size
    loaded = type(plain).from_pretrained(tmp_path)
    assert largest_difference(outputs(loaded), zeroed) <= TOLERANCE
    # What is pruned already takes the same way, and is pruned again.
    small = compress(model)
    small.config.save_pretrained(tmp_path / "small")
    again = compress(small, plain=True)
    assert not of_pruned & again.config.to_dict().keys()
    assert type(again) is type(plain) and largest_difference(outputs(again), zeroed) <= TOLERANCE
    for array in partition(loaded).arrays:
        if array.kind == "neurons":
            zero(loaded, array, range(3))
    assert counts(compress(loaded, plain=True)) == [(heads, 11) for heads, _ in kept]


@pytest.mark.parametrize("name", ONE_EACH)
def test_what_is_not_uniform_is_refused_with_what_differs(name):
    model = tiny_model(name)
    zero_uneven(model)
    with pytest.raises(ValueError, match=r"`plain`=True needs as many heads in every block, got \[3, 0, 2\]"):
        compress(model, plain=True)
    model = tiny_model(name)
    zero(model, partition(model).arrays[1], [5])
    with pytest.raises(ValueError, match=r"needs as many neurons in every block, got \[23, 24, 24\].*uniform=True"):
        compress(model, plain=True)
    model = tiny_model(name)
    zero_uniformly(model, heads=1)
    with pytest.raises(ValueError, match=r"needs all 4 heads in models of type .*no head size.*got 3.*'neurons'"):
        compress(model, plain=True)


@pytest.mark.parametrize("name", [MODELS["llama"][-1], MODELS["bert"][-1]])
def test_blocks_without_a_structure_are_refused(name):
    model = tiny_model(name)
    for array in partition(model).arrays:
        if array.kind == "neurons":
            zero(model, array, range(24))
    with pytest.raises(ValueError, match="needs heads and neurons in every block, got 4 and 0"):
        compress(model, plain=True)


def test_the_plain_config_keeps_the_rest():
    model = tiny_model("LlamaForSequenceClassification", id2label={0: "no", 1: "maybe", 2: "yes"}, dtype="bfloat16")
    model.config.own_setting = "kept"
    zero_uniformly(model, heads=2)
    config = compress(model, plain=True).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert config.id2label[1] == "maybe" and config.own_setting == "kept" and config.dtype == torch.bfloat16


def test_what_the_familys_own_config_refuses_is_refused_in_its_words():
    model = tiny_model("LlamaModel")
    zero_uniformly(model, heads=1)
    with pytest.raises(ValueError, match=r"3 heads and 14 neurons in every block, which LlamaConfig refuses"):
        compress(model, plain=True)
    model = tiny_model("Qwen3Model")
    zero_uniformly(model, heads=1)
    assert compress(model, plain=True).config.num_attention_heads == 6
