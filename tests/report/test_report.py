"""The numbers of a summary against counts made in another way: by hand, by hooks on a forward pass, on the disk."""

import dataclasses
import json

import pytest
import torch
import transformers
from families import ALL, EVERY, ONE_EACH, batch, family_of, group_sizes, tiny_model, zero, zero_uneven
from torch.utils.flop_counter import FlopCounterMode

from hf_oto.models.configuration_oto import BLOCK_SPECS
from hf_oto.models.groups import partition, zero_groups
from hf_oto.models.surgery import compress
from hf_oto.report.card import leaderboard_results
from hf_oto.report.summary import Summary, summarize

# What `zero_uneven` leaves of three blocks of 4 heads and 24 neurons.
HEADS, NEURONS = (3, 0, 2), (16, 12, 0)
# By hand, for hidden size 32 and head size 8: weights of four projections and biases of three; two weights and a bias.
HEAD, NEURON = 4 * 32 * 8 + 3 * 8, 2 * 32 + 1
KEPT, DENSE = 5 * HEAD + 28 * NEURON, 12 * HEAD + 72 * NEURON
# Two output biases and two LayerNorms of every block are never cut.
ENCODER = KEPT + 3 * (2 * 32 + 2 * 64)
# 61 tokens, 40 positions, 2 segments (DistilBERT has none) and a LayerNorm, of size 32 (ELECTRA's have 16).
EMBEDDINGS = dict.fromkeys(BLOCK_SPECS, (61 + 40 + 2) * 32 + 64)
EMBEDDINGS |= {"electra": (61 + 40 + 2) * 16 + 32, "distilbert": (61 + 40) * 32 + 64}
# Outside of embeddings and blocks: two outputs of the task, and ELECTRA's projection from 16 to 32.
REST = dict.fromkeys(BLOCK_SPECS, 2 * 32 + 2) | {"electra": 2 * 32 + 2 + 16 * 32 + 32}

OF_THE_MODEL = ("parameters", "parameters_without_embeddings", "encoder_parameters", "file_size")


def zeroed(name, **overrides):
    model = tiny_model(name, **overrides)
    zero_uneven(model)
    return model


def numel(parameters):
    return sum(parameter.numel() for parameter in parameters)


def prunable(name):
    """Weights of groups that [`zero_uneven`] leaves, and of the dense model."""
    head, neuron = group_sizes(name)
    return 5 * head + 28 * neuron, 12 * head + 72 * neuron


@pytest.mark.parametrize("name", ONE_EACH)
def test_numbers_counted_by_hand(name):
    family = family_of(name)
    without_embeddings = ENCODER + REST[family]
    parameters = without_embeddings + EMBEDDINGS[family]
    # One sequence of 10 tokens: four products of 32 x 8 and two of 10 x 8 per token and head; two of 32 per neuron.
    head_macs, neuron_macs = 10 * (4 * 32 * 8 + 2 * 10 * 8), 10 * 2 * 32
    assert summarize(zeroed(name), sequence_length=10) == Summary(
        model_type=family,
        sequence_length=10,
        heads=HEADS,
        neurons=NEURONS,
        dense_heads=4,
        dense_neurons=24,
        prunable_parameters=KEPT,
        dense_prunable_parameters=DENSE,
        macs=5 * head_macs + 28 * neuron_macs,
        dense_macs=12 * head_macs + 72 * neuron_macs,
        parameters=parameters,
        parameters_without_embeddings=without_embeddings,
        encoder_parameters=ENCODER,
        file_size=4 * parameters,
    )


@pytest.mark.parametrize("name", ALL)
def test_a_zeroed_model_and_its_cut_one_have_the_summary_of_the_cut_ones_weights(name):
    model = zeroed(name)
    cut = compress(model)
    summary = summarize(cut)
    assert summarize(model) == summary
    spec, base = BLOCK_SPECS[family_of(name)], cut.base_model
    embeddings = {id(parameter) for parameter in base.get_submodule(spec.embeddings).parameters()}
    assert summary.heads == HEADS and summary.neurons == NEURONS
    assert summary.parameters == numel(cut.parameters())
    assert summary.parameters_without_embeddings == numel(p for p in cut.parameters() if id(p) not in embeddings)
    assert summary.encoder_parameters == numel(base.get_submodule(spec.blocks).parameters())
    kept, dense = prunable(name)
    assert summary.prunable_parameters == kept
    assert summary.parameters == numel(tiny_model(name).parameters()) - (dense - kept) - 8 * len(spec.head_norms)


@pytest.mark.parametrize("name", ALL)
def test_a_dense_model_keeps_everything(name):
    model = tiny_model(name)
    summary = summarize(model)
    assert summary.heads == (4, 4, 4) and summary.neurons == (24, 24, 24)
    assert summary.prunable_parameters == summary.dense_prunable_parameters == prunable(name)[1]
    assert summary.macs == summary.dense_macs
    assert summary.prunable_ratio == summary.macs_ratio == 1
    assert summary.parameters == numel(model.parameters())


# DeBERTa's scores of positions are not counted.
@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("Deberta")])
@pytest.mark.parametrize("length", [7, 13])
def test_macs_are_those_of_a_forward_pass(name, length):
    """Torch's counter sees the matrix products that run, at 2 operations for a multiply-accumulate."""
    cut = compress(zeroed(name, attention="eager"))
    inputs = batch(cut, length=length)[cut.main_input_name][:1]
    with FlopCounterMode(display=False) as counter:
        length = cut.base_model(inputs).last_hidden_state.shape[1]
    found, path = counter.get_flop_counts(), f"{type(cut.base_model).__name__}.{BLOCK_SPECS[family_of(name)].blocks}"
    operations = sum(sum(found.get(f"{path}.{layer}", {}).values()) for layer in range(3))
    assert 2 * summarize(cut, sequence_length=length).macs == operations


# Tied and untied output embeddings among them.
@pytest.mark.parametrize("name", [*ONE_EACH, "BertForMaskedLM", "DistilBertForMaskedLM", "ElectraForPreTraining"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_size_is_the_saved_weights(name, dtype, tmp_path):
    model = zeroed(name).to(dtype)
    compress(model).save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")  # the format's: its length in 8 bytes, then the header
    assert summarize(model).file_size == len(content) - header


def test_file_size_counts_every_weight_in_its_own_precision():
    model = zeroed("BertForQuestionAnswering")
    before = summarize(model)
    model.bert.encoder.layer[0].output.dense.weight.data = model.bert.encoder.layer[0].output.dense.weight.bfloat16()
    after = summarize(model)
    assert after.parameters == before.parameters
    assert before.file_size - after.file_size == 2 * 32 * 16  # the 16 neurons that the block keeps


def test_tied_weights_count_once():
    tied = summarize(tiny_model("BertForMaskedLM"))
    untied = summarize(tiny_model("BertForMaskedLM", tie_word_embeddings=False))
    decoder = 61 * 32 + 61  # its bias is tied as well
    assert untied.parameters - tied.parameters == decoder
    assert untied.parameters_without_embeddings - tied.parameters_without_embeddings == decoder
    assert untied.file_size - tied.file_size == 4 * decoder


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_partition_alone(name):
    model = compress(zeroed(name))
    alone = summarize(partition(model), sequence_length=9)
    assert alone == dataclasses.replace(summarize(model, sequence_length=9), **dict.fromkeys(OF_THE_MODEL))
    assert "all parameters" not in str(alone) and f"{KEPT:,}" in str(alone)
    # A partition has no weights: its groups count as kept.
    assert summarize(partition(zeroed(name))).heads == (4, 4, 4)


def test_a_partition_of_a_model_that_was_never_in_memory():
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig())
    summary = summarize(partition(model))
    assert summary.dense_prunable_parameters == 12 * (12 * 196_800 + 3072 * 1537)
    assert summary.dense_macs == 384 * 12 * (4 * 768 * 768 + 2 * 384 * 768 + 2 * 768 * 3072)
    with pytest.raises(ValueError, match="meta device.*Sum up its `partition`"):
        summarize(model)


def test_everything_may_be_gone():
    model = tiny_model("DistilBertModel")
    for array in partition(model).arrays:
        zero(model, array, range(array.count))
    summary = summarize(model)
    assert (summary.heads, summary.neurons, summary.macs, summary.macs_ratio) == ((0, 0, 0), (0, 0, 0), 0, 0)
    assert summarize(compress(model)) == summary
    assert summarize(tiny_model("BertModel", num_hidden_layers=0)).prunable_ratio == 1


def test_to_dict_is_plain_json():
    summary = summarize(zeroed("ElectraForMaskedLM"))
    found = summary.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["heads"] == [3, 0, 2] and found["file_size"] == summary.file_size
    assert set(found) == {field.name for field in dataclasses.fields(Summary)} | {
        *("prunable_ratio", "macs_ratio", "latency_ratio")
    }
    assert found["latency"] is found["latency_ratio"] is None  # nobody has measured it
    assert found["prunable_ratio"] == KEPT / DENSE
    assert found["macs_ratio"] == summary.macs / summary.dense_macs


def test_text_shows_the_numbers(monkeypatch):
    # Neither a narrow terminal nor one with colours changes the text.
    for name, value in (("COLUMNS", "20"), ("FORCE_COLOR", "1"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    summary = summarize(zeroed("BertForQuestionAnswering"), sequence_length=128)
    text = str(summary)
    assert text.isascii() and "\x1b" not in text and "\n " not in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line]
    assert cells[0] == ["layer", "heads", "of", "neurons", "of"]
    assert cells[2:5] == [["0", "3", "4", "16", "24"], ["1", "0", "4", "12", "24"], ["2", "2", "4", "0", "24"]]
    rows = {row[0]: row[1:] for row in cells[5:]}
    assert rows["bert"] == ["kept", "of", "kept share"]
    assert rows["prunable parameters"] == ["7,060", "17,256", "40.9%"]
    assert rows["MACs, 128 tokens"] == [f"{summary.macs:,}", f"{summary.dense_macs:,}", f"{summary.macs_ratio:.1%}"]
    dense = numel(tiny_model("BertForQuestionAnswering").parameters())
    assert rows["all parameters"][:2] == [f"{dense - DENSE + KEPT:,}", f"{dense:,}"]
    assert rows["without embeddings"][:2] == ["7,702", "17,898"]
    assert rows["encoder"][:2] == ["7,636", "17,832"]
    assert rows["bytes of weights"][0] == f"{summary.file_size:,}"


def test_which_heads_are_kept_is_known_until_they_are_cut_out():
    model = zeroed("DistilBertModel")
    summary = summarize(model)
    masks = [zero_groups(array, dict(model.named_parameters())) for array in partition(model).arrays[::2]]
    assert summary.kept_heads == tuple(tuple(i for i in range(4) if not mask[i]) for mask in masks)
    assert tuple(map(len, summary.kept_heads)) == HEADS and summary.to_dict()["kept_heads"][1] == []
    assert summarize(compress(model)).kept_heads is None
    assert summarize(compress(tiny_model("BertModel"))).kept_heads == ((0, 1, 2, 3),) * 3


def test_what_cannot_be_summed_up_is_refused():
    model = tiny_model("BertModel")
    with pytest.raises(ValueError, match="`sequence_length` must be at least 1, got 0"):
        summarize(model, sequence_length=0)
    with pytest.raises(ValueError, match="Supported families: bert, roberta"):
        summarize(transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)))
    with pytest.raises(ValueError, match="not wrapped, got DataParallel"):
        summarize(torch.nn.DataParallel(model))


def test_scores_in_the_leaderboards_form():
    scores = {"eval_f1": 88.5, "eval_exact_match": 81.0, "eval_runtime": 3.0, "eval_samples_per_second": 9.0}
    scores |= {"eval_model_preparation_time": 0.1, "eval_samples": 100, "epoch": 2.0}
    found = leaderboard_results(
        scores, tasks=["question-answering"], datasets={"squad": "SQuAD", "org/other": "Other"}
    )
    assert [(one.dataset_type, one.dataset_name, one.metric_type, one.metric_value) for one in found] == [
        ("squad", "SQuAD", "f1", 88.5),
        ("squad", "SQuAD", "exact_match", 81.0),
        ("org/other", "Other", "f1", 88.5),
        ("org/other", "Other", "exact_match", 81.0),
    ]
    assert leaderboard_results(scores, tasks=["question-answering"], datasets={}) == []
