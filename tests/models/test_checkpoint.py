"""Pruned checkpoints: what is written, who can load it, and what is refused."""

import copy
import json
import os
import pickle
import sys
from pathlib import Path

import forking
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
    family_of,
    largest_difference,
    outputs,
    tiny_model,
    zero,
    zero_uneven,
)
from safetensors.torch import load_file, save_file
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoModel, AutoModelForQuestionAnswering

from hf_oto.models import modeling_oto
from hf_oto.models.configuration_oto import BLOCK_SPECS, has_bias
from hf_oto.models.empty_models import auto_class_of, block_fields
from hf_oto.models.groups import partition
from hf_oto.models.surgery import compress

KEPT = [(3, 16), (0, 12), (2, 0)]
# Loaded weights lie at another address, where the same product may be summed in another order.
SAME = 1e-6


def pruned(name, seed=0, **overrides):
    model = tiny_model(name, seed=seed, **overrides)
    zero_uneven(model)
    return compress(model)


def auto_class(name):
    """The Auto class of a dense class's task: BertForMaskedLM -> AutoModelForMaskedLM."""
    task = name.partition("For")[2]
    speech = {"SequenceClassification": "AudioClassification", "XVector": "AudioXVector"}
    if family_of(name) in ("wav2vec2", "hubert"):
        task = speech.get(task, task)
    return getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")


def same_weights(model, other):
    mine, others = model.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


@pytest.mark.parametrize("name", ALL)
def test_round_trip_through_the_auto_class(name, tmp_path, caplog, recwarn):
    model = pruned(name)
    model.save_pretrained(tmp_path)
    assert auto_class_of(model) == auto_class(name).__name__
    loaded = auto_class(name).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert same_weights(loaded, model)
    assert largest_difference(outputs(loaded), outputs(model)) < SAME
    assert not loaded.training and counts(loaded) == KEPT
    assert (caplog.text, list(recwarn)) == ("", [])

    config = json.loads((tmp_path / "config.json").read_text())
    spec = BLOCK_SPECS[family_of(name)]
    assert config["architectures"] == [f"OTO{name}"]
    assert config["per_layer_config"] == {
        str(layer): block_fields(spec, config, heads, neurons) for layer, (heads, neurons) in enumerate(KEPT)
    }
    assert [config[name] for name in (spec.key_heads_field or spec.heads_field, spec.width_field)] == [4, 24]
    assert config["head_dim"] == 8
    assert config["auto_map"]["AutoModel"] == f"modeling_oto.OTO{MODELS[family_of(name)][0]}"
    for source in ("modeling_oto.py", "configuration_oto.py"):
        assert (tmp_path / source).read_bytes() == Path(modeling_oto.__file__).with_name(source).read_bytes()
    # No weights but those that are left: what was cut to nothing has a bias only.
    keys = loaded.state_dict()
    assert {tuple(tensor.shape) for tensor in load_file(tmp_path / "model.safetensors").values()} <= {
        tuple(tensor.shape) for tensor in keys.values()
    }
    heads, neurons = f"{spec.blocks}.1.{spec.query}", f"{spec.blocks}.2.{spec.neurons_in}"
    assert not [key for key in keys if heads in key or neurons in key]
    biases = [key.rpartition(".")[2] for key in keys if f"{spec.blocks}.1.{spec.attention_out}" in key]
    assert biases == ["bias"] * has_bias(spec.out_bias, config)


@pytest.mark.parametrize("name", EVERY)
def test_ways_to_load_and_to_save(name, tmp_path, caplog, recwarn):
    model = pruned(name)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1

    def load(**options):
        return auto_class(name).from_pretrained(tmp_path / "shards", **options)

    assert largest_difference(outputs(load()), expected) < SAME
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        assert largest_difference(outputs(load(device_map=device_map)), expected) < SAME
    eager = load(attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    # Not the other implementation's outputs: where a window holds padding alone they may differ.
    assert largest_difference(outputs(eager), outputs(pruned(name, attention="eager"))) < SAME
    maps = eager(**batch(eager), output_attentions=True).attentions
    queries = partition(model).queries
    assert [weights.shape[1] for weights in maps] == [heads * queries for heads, _ in KEPT]
    eager.set_attn_implementation(attentions(name)[-1])
    assert largest_difference(outputs(eager), expected) < SAME
    small = load(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert largest_difference(outputs(small), expected) < 0.2  # eight bits of mantissa through three blocks
    with torch.device("meta"):
        empty = auto_class(name).from_config(model.config)
    assert {key: value.shape for key, value in empty.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert (caplog.text, list(recwarn)) == ("", [])


@pytest.mark.parametrize("name", ONE_EACH)
def test_base_model_and_task_head_load_from_each_other(name, tmp_path, caplog, recwarn):
    task = pruned(name)
    task.save_pretrained(tmp_path / "task")
    base, info = AutoModel.from_pretrained(tmp_path / "task", output_loading_info=True)
    assert not [key for key in info["missing_keys"] if not key.startswith("pooler")]
    assert info["unexpected_keys"] == {"qa_outputs.weight", "qa_outputs.bias"}
    assert "qa_outputs.bias" in caplog.text  # as transformers reports it for any model
    state = {"last_hidden_state": task.base_model(**batch(task)).last_hidden_state.detach()}
    assert largest_difference({"last_hidden_state": outputs(base)["last_hidden_state"]}, state) < SAME

    # The base model that is a part of a task's model saves as well as one that was loaded.
    for number, part in enumerate((base, task.base_model)):
        part.save_pretrained(tmp_path / str(number))
        again, info = AutoModelForQuestionAnswering.from_pretrained(tmp_path / str(number), output_loading_info=True)
        assert {key.split(".")[0] for key in info["missing_keys"]} == {"qa_outputs"}
        state = {"hidden": task.base_model(**batch(task)).last_hidden_state.detach()}
        assert largest_difference({"hidden": again.base_model(**batch(task)).last_hidden_state.detach()}, state) < SAME
        assert counts(AutoModel.from_pretrained(tmp_path / str(number))) == KEPT


# Each family's base model with a head; weights may be read and written under older names. In decoders for question
# answering upstream has the base model under another name, and loads nothing.
CAUSAL = [name for name in ALL if name.endswith("CausalLM")]
PAIRS = [
    (names[0], names[1] if names[1].endswith("CausalLM") else names[-1]) for names in MODELS.values() if len(names) > 1
]


@pytest.mark.parametrize(("base", "task"), PAIRS)
def test_every_familys_base_model_and_task_head_load_from_each_other(base, task, tmp_path):
    model = pruned(task)
    model.save_pretrained(tmp_path / "task")
    part = auto_class(base).from_pretrained(tmp_path / "task")
    assert type(part).__name__ == f"OTO{base}"
    mine, found = model.base_model.state_dict(), part.state_dict()
    assert all(torch.equal(found[key], value) for key, value in mine.items())
    model = pruned(base)
    model.save_pretrained(tmp_path / "base")
    whole = auto_class(task).from_pretrained(tmp_path / "base")
    assert type(whole).__name__ == f"OTO{task}"
    mine, found = model.state_dict(), whole.base_model.state_dict()
    assert all(torch.equal(value, mine[key]) for key, value in found.items())


def test_the_mask_token_of_images_is_new_where_a_classifier_had_none(tmp_path):
    model = pruned("ViTForImageClassification")
    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert "vit.embeddings.mask_token" in info["missing_keys"] and counts(loaded) == counts(model)


def test_features_of_images_come_from_a_classifiers_checkpoint(tmp_path):
    from PIL import Image

    model = pruned("ViTForImageClassification")
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    extract = transformers.pipeline("image-feature-extraction", model=str(tmp_path))
    image = Image.new("RGB", (20, 20), (200, 10, 90))
    pixels = extract.image_processor(image, return_tensors="pt")
    with torch.no_grad():
        expected = model.base_model(**pixels).last_hidden_state
    assert torch.allclose(torch.tensor(extract(image)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM"])
def test_tied_embeddings_are_tied_when_loaded(name, tmp_path):
    pruned(name).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert type(transformers.AutoModelForPreTraining.from_pretrained(tmp_path)).__name__.startswith(
        "OTORobertaForMaskedLM" if name.startswith("Roberta") else f"OTO{name.partition('For')[0]}ForPreTraining"
    )


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*:FutureWarning")  # the oldest releases know no other name
@pytest.mark.parametrize("name", ONE_EACH)
def test_gradients_reach_every_weight(name):
    model = pruned(name).train()
    inputs = {**batch(model), "start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 5, 6])}

    def gradients():
        torch.manual_seed(0)
        model.zero_grad()
        model(**inputs).loss.backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    plain = gradients()
    assert [key for key, value in plain.items() if not value.any()] == []
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert all(torch.equal(checkpointed[key], value) for key, value in plain.items())


@pytest.mark.parametrize("name", ONE_EACH)
def test_feed_forward_in_chunks(name):
    model = pruned(name)
    chunked = pruned(name, chunk_size_feed_forward=1)
    assert largest_difference(outputs(chunked), outputs(model)) < 1e-5


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*:FutureWarning")  # the oldest releases know no other name
@pytest.mark.parametrize("name", ONE_EACH)
def test_plain_trainer_goes_on(name, tmp_path):
    pruned(name).save_pretrained(tmp_path / "before")
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "before")
    before = outputs(model)
    example = {key: value[1] for key, value in batch(model).items()}
    data = [{**example, "start_positions": 3, "end_positions": 5}] * 8
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2])
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < loss
    assert largest_difference(outputs(model.eval()), before) > 1e-3
    trainer.save_model(str(tmp_path / "after"))
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "after")
    assert largest_difference(outputs(loaded), outputs(model)) < SAME and counts(loaded) == KEPT
    assert counts(AutoModel.from_pretrained(tmp_path / "run" / "checkpoint-2")) == KEPT


@pytest.mark.parametrize("name", EVERY)
def test_configs_and_models_are_copied(name):
    model = pruned(name)
    config = model.config
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), type(config)(**config.to_dict())):
        assert type(twin) is type(config)
        assert twin.to_dict()["per_layer_config"] == config.to_dict()["per_layer_config"]
        assert counts(type(model)(twin)) == KEPT
    assert copy.deepcopy(config) == config
    assert pruned(MODELS[family_of(name)][0], num_hidden_layers=4).config != config
    twins = [copy.deepcopy(model)]
    if not any(map(is_parametrized, model.modules())):  # of which torch pickles no model, dense or pruned
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert largest_difference(outputs(twin), outputs(model)) < SAME


@pytest.mark.parametrize("name", EVERY)
def test_a_config_gives_strangers_the_dense_numbers(name, tmp_path, caplog):
    pruned(name).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert caplog.text == "" and "allow_global" not in (tmp_path / "config.json").read_text()
    spec = BLOCK_SPECS[family_of(name)]
    found = {field: getattr(config, field, 0) for field in (spec.heads_field, spec.width_field)}
    assert found == {spec.heads_field: 8 if spec.key_heads_field else 4, spec.width_field: 24}
    assert hasattr(config, spec.heads_field) and not hasattr(config, "no_such_field")
    config.allow_global_per_layer_attribute_access = False  # as upstream has it
    with pytest.raises(RuntimeError, match="is a per-layer attribute"):
        getattr(config, spec.heads_field)


# Decoders' heads for tasks take the base model that goes with the config: they are right with any.
@pytest.mark.parametrize("name", [name for name in EVERY if family_of(name) not in ("llama", "qwen3")] + CAUSAL)
def test_a_dense_class_says_which_one_is_needed(name, tmp_path):
    """However it comes to a pruned model: it would have other blocks, with weights made up for what is gone."""
    model = tiny_model(name)
    for array in partition(model).arrays:  # no shape would tell: a block has kept all or nothing
        if array.layer == 1:
            zero(model, array, range(array.count))
    compress(model).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    needed = f"this model is pruned.*{auto_class(name).__name__}.from_pretrained.*, or with hf_oto's OTO{name}"
    dense = getattr(transformers, name)
    with pytest.raises(Exception, match=needed) as raised:
        dense.from_pretrained(tmp_path)
    assert len(str(raised.value)) < 400 and "per-layer" not in str(raised.value)
    with pytest.raises(ValueError, match=needed):
        dense.from_pretrained(tmp_path, config=config)
    with pytest.raises(ValueError, match=needed):
        dense(config)
    assert getattr(config, BLOCK_SPECS[family_of(name)].heads_field) and counts(auto_class(name).from_config(config))


VALID = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "per_layer_config": {
        "0": {"num_attention_heads": 4, "intermediate_size": 24},
        "1": {"num_attention_heads": 0, "intermediate_size": 3},
    },
}


def with_layer(**entry):
    layers = copy.deepcopy(VALID["per_layer_config"])
    layers["1"] |= entry
    return {"per_layer_config": layers}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_layer(num_attention_heads=-1),
            r"per_layer_config\[1\]\['num_attention_heads'\].* 0 to the dense 4, got -1",
        ),
        (with_layer(num_attention_heads=5), "from 0 to the dense 4, got 5"),
        (with_layer(intermediate_size=10**30), "from 0 to the dense 24, got 10000"),
        (with_layer(intermediate_size=3.0), "got 3.0"),
        (with_layer(intermediate_size="3"), "got '3'"),
        (with_layer(intermediate_size=True), "got True"),
        (with_layer(intermediate_size=None), "got None"),
        (with_layer(head_dim=8), "no more, got"),
        (with_layer(skip=["attention"]), "no more, got"),
        ({"per_layer_config": {"0": VALID["per_layer_config"]["0"]}}, "for each of the 2 blocks, got the keys"),
        ({"per_layer_config": {"0": VALID["per_layer_config"]["0"], "2": {}}}, "for each of the 2 blocks"),
        ({"per_layer_config": VALID["per_layer_config"] | {"00": {}}}, "for each of the 2 blocks"),
        ({"per_layer_config": VALID["per_layer_config"] | {"x": {}}}, "for each of the 2 blocks"),
        ({"per_layer_config": {"0": VALID["per_layer_config"]["0"], "1": {"intermediate_size": 3}}}, "must have"),
        ({"per_layer_config": {"0": VALID["per_layer_config"]["0"], "1": 3}}, "must have"),
        ({"per_layer_config": [{}, {}]}, "must give the heads and neurons"),
        ({"per_layer_config": {}}, "for each of the 2 blocks"),
        ({"per_layer_config": None}, "must give the heads and neurons"),
        ({"head_dim": 4}, "got 4 \\* 4 and 32"),
        ({"head_dim": None}, "`head_dim` must be a positive integer"),
        ({"head_dim": True}, "`head_dim` must be a positive integer"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be a positive integer"),
        ({"intermediate_size": -24}, "`intermediate_size` must be a positive integer"),
        ({"num_hidden_layers": 10**9}, "for each of the 1000000000 blocks"),
        ({"is_decoder": True}, "`is_decoder` must be off"),
        ({"is_decoder": True, "add_cross_attention": True}, "must be off"),
    ],
)
def test_a_config_that_is_none_is_refused(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VALID | {"model_type": "oto_bert"} | change))
    with pytest.raises(ValueError, match=message):
        AutoModel.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    save_file({}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path)


def test_the_valid_config_is_accepted_and_then_watched():
    config = modeling_oto.OTOBertConfig(**VALID)
    assert counts(modeling_oto.OTOBertModel(config)) == [(4, 24), (0, 3)]
    with pytest.raises(ValueError, match="from 0 to the dense 4, got 9"):
        config.per_layer_config = with_layer(num_attention_heads=9)["per_layer_config"]
    config.head_dim = 16
    with pytest.raises(ValueError, match="got 16 \\* 4 and 32"):
        modeling_oto.OTOBertModel(config)
    with pytest.raises(ValueError, match="must give the heads and neurons left.* use the family's own class"):
        modeling_oto.OTOBertModel(modeling_oto.OTOBertConfig())


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize(
    ("layer", "heads", "neurons", "message"),
    [
        (0, 2, 16, r"has shape \(24,\) instead of \(16,\)"),
        (0, 3, 17, r"has shape \(16,\) instead of \(17,\)"),
        (0, 0, 16, "has no place"),
        (0, 3, 0, "has no place"),
        (1, 1, 12, "is missing"),
        (2, 2, 8, "is missing"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(name, layer, heads, neurons, message, tmp_path):
    pruned(name).save_pretrained(tmp_path)
    path, spec = tmp_path / "config.json", BLOCK_SPECS[family_of(name)]
    config = json.loads(path.read_text())
    config["per_layer_config"][str(layer)] = {spec.heads_field: heads, spec.width_field: neurons}
    path.write_text(json.dumps(config))
    for auto in (AutoModelForQuestionAnswering, AutoModel):
        with pytest.raises(ValueError, match=f"do not fit its config: .*layer.{layer}.*{message}"):
            auto.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not fit its config"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_only_the_head_may_be_of_another_size(tmp_path):
    pruned("BertForSequenceClassification").save_pretrained(tmp_path)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(2, 32\) instead of \(7, 32\)"):
        load(tmp_path, num_labels=7)
    assert load(tmp_path, num_labels=7, ignore_mismatched_sizes=True).classifier.out_features == 7


def test_a_dense_checkpoint_is_not_a_pruned_one(tmp_path):
    tiny_model("BertModel").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use the family's own class"):
        modeling_oto.OTOBertModel.from_pretrained(tmp_path)


# Runs where hf_oto cannot be imported: loads every checkpoint of a folder in every way and saves it again.
STRANGER = """
import importlib.util, json, sys
from pathlib import Path

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_oto":
            raise ImportError(f"No module named {name!r}: blocked")

sys.meta_path.insert(0, Block())
try:
    import hf_oto
except ImportError:
    pass
else:
    sys.exit("hf_oto can be imported")

import torch
import transformers
from safetensors.torch import load_file

print("warned while importing", file=sys.stderr)
transformers.utils.logging.disable_progress_bar()
root = Path(sys.argv[1])
for folder in sorted(root.glob("*/*")):
    auto = getattr(transformers, (folder / "auto").read_text())
    data = load_file(folder / "data.safetensors")
    inputs = {key: data[key] for key in ("input_ids", "attention_mask", "pixel_values", "input_values") if key in data}
    expected = {key: value for key, value in data.items() if key not in inputs}

    def check(model):
        with torch.no_grad():
            found = model(**inputs)
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=0, atol=1e-6 * value.abs().max()), (folder, key)
        assert type(model).__name__ == "OTO" + folder.name
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__

    model = auto.from_pretrained(folder, trust_remote_code=True)
    check(model)
    again = root.parent / "saved" / folder.parent.name / folder.name
    model.save_pretrained(again)
    saved = json.loads((again / "config.json").read_text())
    assert saved["auto_map"] == json.loads((folder / "config.json").read_text())["auto_map"]
    for source in ("modeling_oto.py", "configuration_oto.py"):
        assert (again / source).read_bytes() == (folder / source).read_bytes()
    check(auto.from_pretrained(again, trust_remote_code=True, device_map="cpu"))
    model = auto.from_pretrained(again, trust_remote_code=True, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    print(folder.name)

# Which code is trusted is the user's choice, each time.
try:
    transformers.AutoModel.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    sys.exit("code was run without consent")
print("warned on purpose", file=sys.stderr)

# Base model from a task's checkpoint, task's model from a base checkpoint.
task, base = root / "1" / "BertForQuestionAnswering", root.parent / "base"
part, info = transformers.AutoModel.from_pretrained(task, trust_remote_code=True, output_loading_info=True)
assert info["unexpected_keys"] == {"qa_outputs.weight", "qa_outputs.bias"}, info
part.save_pretrained(base)
whole, info = transformers.AutoModelForQuestionAnswering.from_pretrained(
    base, trust_remote_code=True, output_loading_info=True
)
assert info["missing_keys"] == {"qa_outputs.weight", "qa_outputs.bias"}, info
assert not [name for name in sys.modules if name.split(".")[0] == "hf_oto"]
print("done")
"""


@pytest.mark.slow
def test_an_interpreter_without_hf_oto_loads_them_all(tmp_path):
    """Every family, and two structures of one, in one process: its imports take seconds."""
    names = [*EVERY, "BertForMaskedLM", "BertForPreTraining", "DistilBertModel", "XLMRobertaForMultipleChoice"]
    for seed, name in enumerate([*names, "BertForQuestionAnswering"]):
        model = tiny_model(name, num_hidden_layers=4 if seed == len(names) else 3)
        zero_uneven(model, seed)
        model = compress(model)
        folder = tmp_path / "checkpoints" / str(1 + (seed == len(names))) / name
        model.save_pretrained(folder)
        (folder / "auto").write_text(auto_class(name).__name__)
        save_file({**batch(model), **outputs(model)}, folder / "data.safetensors")

    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    environment |= {
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONSAFEPATH": "1",
    }
    done = forking.run(
        [sys.executable, "-W", "always", "-c", STRANGER, str(tmp_path / "checkpoints")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*sorted(names), "BertForQuestionAnswering", "done"]
    warned = done.stderr.split("warned while importing\n")[1].split("warned on purpose\n")[0]
    assert warned == "", warned
