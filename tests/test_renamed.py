"""Names that arguments had before: read where they were saved, refused with the new one where they are passed."""

import dataclasses
import inspect
import json

import pytest
import torch
from arguments import parse_arguments
from benchmarks import run_task
from families import ONE_EACH, made_table, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from short_runs import StopAt, make, same_weights
from transformers import TrainingArguments
from typer.testing import CliRunner

from hf_oto import HSPG, OTOConfig, QuestionAnswerer, measure_latency, partition
from hf_oto.cli.app import OLD_OPTIONS, app
from hf_oto.config import CONFIG_NAME, LatencyTable
from hf_oto.renamed import OLD_SETTINGS, read_old_names
from hf_oto.training.search import split_space

OLD = {"warmup_ratio": 0.2, "hidden_state_weight": 3.0, "macs_sequence_length": 17}
NEW = OTOConfig(pruning_start_ratio=0.2, distillation_hidden_weight=3.0, sequence_length=17)
TABLE = made_table(partition(tiny_model(ONE_EACH[0])))
TIMED = OTOConfig(target_unit="latency", latency_table=TABLE)


def with_old_names(settings):
    """Saved settings as they were written before."""
    back = {new: old for old, new in OLD_SETTINGS.items()}
    written = {back.get(name, name): value for name, value in settings.items()}
    if table := written.get("latency_table"):
        written["latency_table"] = {"length" if n == "sequence_length" else n: value for n, value in table.items()}
    return written


@pytest.mark.parametrize("config", [NEW, TIMED])
def test_a_saved_file_is_loaded(tmp_path, config):
    written = with_old_names(config.to_dict())
    assert OLD.keys() <= written.keys() and not written.keys() & OLD_SETTINGS.values()
    (tmp_path / CONFIG_NAME).write_text(json.dumps(written))
    assert OTOConfig.from_pretrained(tmp_path) == config


def test_a_saved_table_is_loaded(tmp_path):
    written = with_old_names(TIMED.to_dict())["latency_table"]
    assert "length" in written
    (tmp_path / "table.json").write_text(json.dumps(written))
    assert LatencyTable.load(tmp_path / "table.json") == TABLE


def test_a_file_with_both_names_of_a_setting_is_refused():
    with pytest.raises(ValueError, match=r"Unknown settings \['warmup_ratio'\]"):
        OTOConfig.from_dict({"warmup_ratio": 0.2, "pruning_start_ratio": 0.3})


def test_a_saved_checkpoint_is_resumed(tmp_path):
    whole = make(tmp_path / "whole")
    whole.train()
    make(tmp_path, extra={"callbacks": [StopAt(9)]}).train()
    folder = tmp_path / "checkpoint-9"
    (folder / CONFIG_NAME).write_text(json.dumps(with_old_names(json.loads((folder / CONFIG_NAME).read_text()))))
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    group = state["param_groups"][0]
    group["hspg_settings"] = json.dumps(with_old_names(json.loads(group["hspg_settings"])))
    torch.save(state, folder / "optimizer.pt")
    assert "warmup_ratio" in group["hspg_settings"]
    trainer = make(tmp_path)
    trainer.train(resume_from_checkpoint=str(folder))
    assert same_weights(trainer.model, whole.model)


def test_the_table_in_a_saved_state_is_read():
    model = tiny_model(ONE_EACH[0])
    optimizer = HSPG(torch.optim.SGD(model.named_parameters(), lr=0.1), partition(model), TIMED, 40)
    state = optimizer.state_dict()
    group = state["param_groups"][0]
    group["hspg_settings"] = json.dumps(with_old_names(json.loads(group["hspg_settings"])))
    optimizer.load_state_dict(state)
    group["hspg_settings"] = group["hspg_settings"].replace('"length": 13', '"length": 14')
    with pytest.raises(ValueError, match="latency_table: "):
        optimizer.load_state_dict(state)


@given(st.dictionaries(st.sampled_from([*OLD_SETTINGS, *OLD_SETTINGS.values(), "epsilon"]), st.integers()))
def test_reading_loses_no_value(saved):
    assert sorted(read_old_names(saved, OLD_SETTINGS).values()) == sorted(saved.values())


@pytest.mark.parametrize("old", OLD)
def test_an_old_setting_is_refused(old):
    message = f"no argument `{old}`: its name is `{OLD_SETTINGS[old]}`"
    with pytest.raises(TypeError, match=message):
        OTOConfig(**{old: OLD[old]})
    with pytest.raises(TypeError, match=message):
        dataclasses.replace(NEW, **{old: OLD[old]})
    with pytest.raises(TypeError, match=message):
        split_space({old: OLD[old], "learning_rate": 1e-3})


def test_old_arguments_are_refused(tmp_path):
    model = tiny_model(ONE_EACH[0])
    with pytest.raises(TypeError, match=r"OTOTrainer\(\) has no argument `teacher`: its name is `teacher_model`"):
        make(tmp_path / "out", extra={"teacher": model})
    assert not (tmp_path / "out").exists()
    with pytest.raises(TypeError, match="no argument `length`: its name is `sequence_length`"):
        measure_latency(model, length=8)
    with pytest.raises(TypeError, match="no argument `length`: its name is `sequence_length`"):
        LatencyTable(**with_old_names(TIMED.to_dict())["latency_table"])
    with pytest.raises(TypeError, match="no argument `stride`: its name is `doc_stride`"):
        QuestionAnswerer(model, None, stride=8)
    with pytest.raises(TypeError, match="no argument `max_length`: its name is `max_seq_length`"):
        QuestionAnswerer(model, None, max_length=8)
    for method in (QuestionAnswerer.__call__, QuestionAnswerer.answer):
        with pytest.raises(TypeError, match="no argument `no_answer`: its name is `handle_impossible_answer`"):
            method(None, "Who?", "Ada.", no_answer=True)


def test_signatures_are_those_of_the_arguments():
    assert list(inspect.signature(OTOConfig).parameters) == [field.name for field in dataclasses.fields(OTOConfig)]
    assert "doc_stride" in inspect.signature(QuestionAnswerer).parameters


@pytest.mark.parametrize(
    ("command", "old"),
    [
        (("inspect", "m"), "--target"),
        (("latency", "m", "t.json"), "--length"),
        (("bench", "m", "n"), "--length"),
        (("answer", "m", "--question", "Who?"), "--no-answer"),
        (("answer", "m", "--question", "Who?"), "--stride"),
        (("answer", "m", "--question", "Who?"), "--max-length"),
    ],
)
def test_an_old_option_is_refused(command, old):
    result = CliRunner().invoke(app, [*command, old, "1"])
    assert result.exit_code == 2
    assert f"There is no option {old}: its name is {OLD_OPTIONS[old]}." in result.stderr


RUN = ["--model_name_or_path", "m", "--output_dir", "o", "--do_train", "--train_file", "t.json", "--compress"]


@pytest.mark.parametrize("old", [*OLD, "teacher_name_or_path"])
def test_the_examples_refuse_an_old_setting(tmp_path, old):
    new = {**OLD_SETTINGS, "teacher_name_or_path": "teacher_model_name_or_path"}[old]
    message = f"There is no `--{old}`: the name is `--{new}`"
    for words in ([f"--{old}", "0.1"], [f"--{old}=0.1"], [f"--{old.replace('_', '-')}", "0.1"]):
        with pytest.raises(ValueError, match=message):
            parse_arguments([*RUN, *words])
        with pytest.raises(ValueError, match=message):
            run_task.parse([*RUN, *words])
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "output_dir": "o", old: 0.1}))
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(path)])


def test_the_learning_rates_warm_up_is_transformers_own():
    *_, compression, training = parse_arguments([*RUN, "--warmup_steps", "0.1", "--use_cpu"])
    assert isinstance(training, TrainingArguments) and training.warmup_steps == 0.1
    assert compression.oto_config() == OTOConfig()
