"""Pruned widths and group-wise int4 weights: columns come in groups of a fixed size, and so must what is kept."""

import pytest
import torch
from families import counts, outputs, tiny_model, zero

from hf_oto import OTOConfig, compress, partition
from hf_oto.hspg.budget import floor_and_multiple

# In no extra: where its GPU kernels do not load it says so on every import of Transformers, in every process.
quantization = pytest.importorskip("torchao.quantization")
granularity = pytest.importorskip("torchao.quantization.granularity")

GROUP = 32


def pruned(neurons):
    """A Llama of two key/value heads (4 x 16 columns each pair), with so many neurons left in every block."""
    model = tiny_model("LlamaForCausalLM", intermediate_size=96, hidden_size=64, head_dim=16)
    for array in partition(model).arrays:
        if array.kind == "neurons":
            zero(model, array, torch.arange(array.count - neurons))
    return compress(model).eval()


def quantized(model):
    def in_blocks(module, name):
        return isinstance(module, torch.nn.Linear) and "layers" in name

    groups = granularity.PerGroup(GROUP)
    int4 = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)
    quantization.quantize_(model, int4, filter_fn=in_blocks)
    return model


def test_round_to_is_the_group_size():
    """What `round_to` rounds to is the number of columns that the next projection reads."""
    assert floor_and_multiple("neurons", OTOConfig(round_to=GROUP)) == (8, GROUP)
    small = pruned(64)
    assert {neurons for _, neurons in counts(small)} == {64}
    weight = small.model.layers[0].mlp.down_proj.weight.detach().clone()
    before = outputs(small)
    after = outputs(quantized(small))
    # By hand: each group of 32 columns of a row has a scale of its own, and sixteen steps.
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    found = small.model.layers[0].mlp.down_proj.weight.dequantize().unflatten(1, (-1, GROUP))
    assert float(((found - groups).abs() / scale).max()) <= 1.1
    assert not torch.equal(found, groups)
    assert all(value.isfinite().all() for value in after.values()) and before.keys() == after.keys()


def test_other_widths_do_not_go():
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        outputs(quantized(pruned(40)))
