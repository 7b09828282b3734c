"""The command line on models on the disk: what it prints, writes and refuses."""

import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import evaluate
import forking
import pytest
import torch
import transformers
from families import (
    EVERY,
    ONE_EACH,
    OTHERS,
    batch,
    family_of,
    largest_difference,
    made_table,
    outputs,
    tiny_model,
    zero,
    zero_uneven,
)
from squad_data import make_questions, squad, wordpiece, write
from typer.testing import CliRunner

from hf_oto import HSPG, OTOConfig, QuestionAnswerer, partition, summarize
from hf_oto.cli.app import COMMANDS as APP_COMMANDS
from hf_oto.cli.app import app, main
from hf_oto.deploy import benchmark, onnx_export
from hf_oto.deploy.answering import OnnxAnswerer
from hf_oto.deploy.benchmark import measure
from hf_oto.deploy.model_files import files_beside_weights
from hf_oto.deploy.onnx_export import export_onnx, inference_session
from hf_oto.hspg.budget import reach
from hf_oto.models.configuration_oto import BLOCK_SPECS
from hf_oto.models.folders import UNFINISHED
from hf_oto.models.surgery import compress
from hf_oto.report.card import card_section

COMMANDS = ("inspect", "compress", "latency", "bench", "export", "answer")
CODE = ["configuration_oto.py", "modeling_oto.py"]  # what travels beside the weights
BERT = ONE_EACH[0]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "squad"


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def answered(*args):
    """The JSON that a command prints, and nothing else."""
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def refused(*args):
    """The one line that a failed command prints."""
    result = run(*args)
    assert result.exit_code != 0 and result.stdout == ""
    assert result.stderr.startswith("hf-oto: error: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def saved(folder, name=BERT, zeros=False, **overrides):
    """A model on the disk, as it was saved."""
    model = tiny_model(name, **overrides)
    if zeros:
        zero_uneven(model)
    model.save_pretrained(folder)
    return model


def everything_in(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: hf-oto {command}" in result.stdout and "--json" in result.stdout


def test_help_and_version():
    result = run()
    assert result.exit_code == 0 and all(command in result.stdout for command in COMMANDS)
    assert run("--help").stdout == result.stdout
    assert run("--version").stdout.strip()[0].isdigit()


def test_help_imports_no_command():
    code = "import sys; from hf_oto.cli.app import main; sys.argv[1:] = ['--help']; main()"
    heavy = "print([name for name in ('torch', 'transformers', 'hf_oto.cli.inspect') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"import atexit, sys; atexit.register(lambda: {heavy}); {code}"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
    )
    assert "Commands:" in done.stdout and done.stdout.endswith("[]\n")


def test_help_says_what_the_commands_say():
    for command in COMMANDS:
        function = getattr(importlib.import_module(f"hf_oto.cli.{command}"), command)
        first = " ".join(function.__doc__.strip().split("\n\n")[0].split())
        assert first == APP_COMMANDS[command]


def test_mistakes_on_the_command_line_are_one_line():
    assert "No such command 'frob'" in refused("frob")
    assert "Missing argument 'MODEL'. Try `hf-oto inspect --help`." in refused("inspect")
    assert "--top-k" in refused("answer", "model", "--question", "why?", "--top-k", "many")


def test_a_process_of_its_own_prints_one_line_and_importing_loads_no_tool(tmp_path):
    code = f"""if True:
        import sys
        import hf_oto
        heavy = ("typer", "onnx", "onnxruntime", "onnxscript", "sentence_transformers")
        print([name for name in heavy if name in sys.modules])
        from hf_oto.cli.app import main
        sys.argv = ["hf-oto", "inspect", {str(tmp_path)!r}]
        main()
    """
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "[]\n")
    assert result.stderr == (
        f"hf-oto: error: {tmp_path} has no config.json. Give a folder with a model, or a model of the Hub.\n"
    )
    assert 'hf-oto = "hf_oto.cli.app:main"' in (root / "pyproject.toml").read_text(encoding="utf-8")


def test_the_libraries_speak_as_loudly_after_a_command_as_before(tmp_path):
    logging = transformers.utils.logging
    logging.set_verbosity_info()
    try:
        refused("inspect", tmp_path)
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


# inspect


@pytest.mark.parametrize("name", EVERY)
def test_inspect_reads_the_config_alone(name, tmp_path):
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    model = saved(dense, name)
    expected = summarize(model, sequence_length=17).to_dict()
    zero_uneven(model)
    small = compress(model)
    small.save_pretrained(pruned)
    for folder in (dense, pruned):
        (folder / "model.safetensors").unlink()
    found = answered("inspect", dense, "--sequence-length", 17)
    assert found == found | expected | {"pruned": False, "class": name, "groups": 3 * (4 + 24), "head_size": 8}
    found = answered("inspect", pruned, "--sequence-length", 17)
    expected = summarize(small, sequence_length=17).to_dict()
    assert found == found | expected | {"pruned": True, "class": f"OTO{name}", "heads": [3, 0, 2]}
    text = run("inspect", pruned).stdout
    assert "| 1     |     0 |  4 |      12 | 24 |" in text and "OTO" in text


def test_inspect_knows_the_precision_of_the_weights(tmp_path):
    saved(tmp_path, torch_dtype="bfloat16").to(torch.bfloat16).save_pretrained(tmp_path)
    found = answered("inspect", tmp_path)
    assert found["file_size"] == 2 * found["parameters"]


def test_inspect_reads_the_zeros_of_a_training_checkpoint(tmp_path):
    model = saved(tmp_path, zeros=True)
    assert answered("inspect", tmp_path)["heads"] == [4, 4, 4]
    assert answered("inspect", tmp_path, "--weights")["heads"] == [3, 0, 2]
    OTOConfig().save_pretrained(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    found = answered("inspect", tmp_path)
    assert found == found | summarize(model).to_dict() | {"pruned": False}


@pytest.mark.parametrize("unit", ["params", "macs", "groups"])
@pytest.mark.parametrize("pruned", [False, True])
def test_inspect_says_what_a_target_leaves(unit, pruned, tmp_path):
    model = tiny_model(BERT)
    if pruned:  # a model that has lost a head already
        for name in ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight", "value.bias"):
            model.get_parameter(f"bert.encoder.layer.1.attention.self.{name}").data[:8] = 0
        model.bert.encoder.layer[1].attention.output.dense.weight.data[:, :8] = 0
        model = compress(model)
    model.save_pretrained(tmp_path)
    settings = {"target_sparsity": 0.4, "target_unit": unit, "sequence_length": 20, "min_heads": 2}
    settings |= {"min_neurons": 4, "round_to": 4}
    options = ["--target-sparsity", 0.4, "--target-unit", unit, "--sequence-length", 20]
    options += ["--min-heads", 2, "--min-neurons", 4, "--round-to", 4]
    target = answered("inspect", tmp_path, *options)["target"]
    assert target == target | settings
    limits = reach(partition(model), OTOConfig(**settings))
    expected = {"total": limits.total, "removed_already": limits.removed, "reachable": limits.reachable}
    assert target == target | expected and bool(target["removed_already"]) == pruned
    cost = {  # of a head, of a neuron; by hand, as in test_report.py
        "params": (4 * 32 * 8 + 3 * 8, 2 * 32 + 1),
        "macs": (20 * (4 * 32 * 8 + 2 * 20 * 8), 20 * 2 * 32),
        "groups": (1, 1),
    }[unit]
    assert target["total"] == 12 * cost[0] + 72 * cost[1]
    # All but two heads and four neurons of each of the three blocks.
    assert target["reachable"] == 6 * cost[0] + 60 * cost[1]
    assert target["budget"] == target["total"] * 4 // 10
    leaves = target["leaves"]
    for example in leaves.values():
        heads, neurons = example["heads"], example["neurons"]
        removed = (12 - sum(heads)) * cost[0] + (72 - sum(neurons)) * cost[1]
        assert target["budget"] - max(4 * cost[1], cost[0]) < removed <= target["budget"]
        assert min(heads) >= 2 and min(neurons) >= 4 and all(width % 4 == 0 for width in neurons)
    assert leaves["heads first"]["heads"] == [2, 2, 2]
    kept_heads, kept_neurons = (
        {name: sum(one[kind]) for name, one in leaves.items()} for kind in ("heads", "neurons")
    )
    assert kept_heads["heads first"] <= kept_heads["evenly"] < kept_heads["neurons first"]
    assert kept_neurons["heads first"] >= kept_neurons["evenly"] > kept_neurons["neurons first"]
    text = run("inspect", tmp_path, *options).stdout
    assert f"at most {target['budget']:,} of {target['total']:,} {unit}" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    row = next(cells for cells in rows if cells[0] == "evenly")
    assert row[1:4] == [f"{sum(leaves['evenly'][kind]):,}" for kind in ("heads", "neurons")] + [
        f"{leaves['evenly']['prunable_parameters']:,}"
    ]


def test_a_target_of_one_structure_leaves_the_other_alone(tmp_path):
    saved(tmp_path)
    found = answered("inspect", tmp_path, "--target-sparsity", 0.5, "--structures", "neurons", "--round-to", 1)
    assert found["target"]["total"] == 72 * 65 and found["target"]["budget"] == 36 * 65
    assert all(sum(one["heads"]) == 12 and sum(one["neurons"]) == 36 for one in found["target"]["leaves"].values())


def rows_of(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_inspect_says_what_a_uniform_target_leaves(tmp_path):
    """Every block alike, and within the budget by less than one more cut of all blocks would take."""
    saved(tmp_path / "bert")
    options = ["--target-sparsity", 0.5, "--uniform", "--min-neurons", 4, "--round-to", 4]
    found = answered("inspect", tmp_path / "bert", *options, "--structures", "neurons")["target"]
    assert found["uniform"] is True and found["budget"] == 72 * 65 // 2
    assert all(one["heads"] == [4] * 3 and one["neurons"] == [12] * 3 for one in found["leaves"].values())
    text = run("inspect", tmp_path / "bert", *options, "--structures", "neurons").stdout
    *_, head, _, row = rows_of(text)
    assert head[:3] == ["", "heads", "neurons"] and row[:3] == ["", "3 x 4", "3 x 12"]  # one outcome, one row
    assert "Training finds which groups go; every block would keep as many\n" in text
    assert "needs `structures`=('neurons',)" in refused("inspect", tmp_path / "bert", *options)
    saved(tmp_path / "qwen3", "Qwen3ForCausalLM")  # a head that two queries read owns 1,536 weights, a neuron 96
    found = answered("inspect", tmp_path / "qwen3", *options)["target"]
    assert found["budget"] == 3 * (4 * 1536 + 24 * 96) // 2
    kept = {name: (one["heads"], one["neurons"]) for name, one in found["leaves"].items()}
    assert kept["neurons first"] == kept["evenly"] == ([3] * 3, [4] * 3)
    assert kept["heads first"] == ([2] * 3, [12] * 3)
    *_, first, _, third = rows_of(run("inspect", tmp_path / "qwen3", *options).stdout)
    assert [first[:3], third[:3]] == [["heads first", "3 x 2", "3 x 12"], ["neurons first", "3 x 3", "3 x 4"]]


def test_what_cannot_be_inspected_is_refused(tmp_path):
    saved(tmp_path / "model")
    assert "got 1.5" in refused("inspect", tmp_path / "model", "--target-sparsity", 1.5)
    assert "cannot be reached" in refused("inspect", tmp_path / "model", "--target-sparsity", 0.99)
    assert "must be one of params" in refused("inspect", tmp_path / "model", "--target-unit", "grams")
    assert "`sequence_length`" in refused("inspect", tmp_path / "model", "--sequence-length", 0)
    assert "nobody/nothing is no folder" in refused("inspect", "nobody/nothing")
    assert "is no folder, and no model" in refused("inspect", tmp_path / "absent" / "model")
    transformers.GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert "is of type 'gpt2', which is refused: " in refused("inspect", tmp_path / "gpt2")
    for wrong in ("pipeline", "PreTrainedModel", "RobertaModel", "BertConfig"):
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "wrong").mkdir(exist_ok=True)
        (tmp_path / "wrong" / "config.json").write_text(json.dumps(config | {"architectures": [wrong]}))
        assert f"says '{wrong}', which is no class" in refused("inspect", tmp_path / "wrong")
    (tmp_path / "wrong" / "config.json").write_text("{")
    refused("inspect", tmp_path / "wrong")


# compress


@pytest.mark.parametrize("name", ONE_EACH)
def test_compress_makes_a_small_model_of_a_checkpoint(name, tmp_path):
    checkpoint, out = tmp_path / "run" / "checkpoint-7", tmp_path / "new" / "small"
    model = saved(checkpoint, name, zeros=True)
    OTOConfig(target_sparsity=0.25).save_pretrained(checkpoint)
    wordpiece().save_pretrained(checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(b"not for inference")
    before = everything_in(checkpoint)
    found = answered("compress", checkpoint, out)
    assert everything_in(checkpoint) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "run"] and list(out.parent.iterdir()) == [out]
    files = ["config.json", "model.safetensors", "oto_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert found["files"] == sorted(path.name for path in out.iterdir()) == sorted([*CODE, *files])
    assert found["removed"] == {"heads": 12 - 5, "neurons": 72 - 28}
    assert found == found | summarize(model).to_dict()
    small = transformers.AutoModelForQuestionAnswering.from_pretrained(out)
    assert type(small).__name__ == f"OTO{name}"
    assert largest_difference(outputs(small), outputs(model)) <= 1e-5
    assert OTOConfig.from_pretrained(out).target_sparsity == 0.25
    for file in files[2:]:
        assert (out / file).read_bytes() == (checkpoint / file).read_bytes()


def test_an_encoder_may_be_without_its_pooler(tmp_path):
    """As that of a model around it, and of sentence-transformers' models, often is."""
    model = tiny_model(BERT).bert
    zero_uneven(model)
    assert model.pooler is None
    model.save_pretrained(tmp_path / "dense")
    size = sum(parameter.numel() for parameter in model.parameters())
    assert answered("inspect", tmp_path / "dense")["parameters"] == size
    answered("compress", tmp_path / "dense", tmp_path / "small")
    small = transformers.AutoModel.from_pretrained(tmp_path / "small", add_pooling_layer=False)
    assert summarize(small).parameters < size
    assert largest_difference(outputs(small), outputs(model)) < 1e-5


def test_compress_keeps_what_it_does_not_know(tmp_path):
    """Files of processors, other tokenizers and sentence-transformers' modules; not weights, code or training."""
    checkpoint, out = tmp_path / "checkpoint-7", tmp_path / "small"
    saved(checkpoint, zeros=True)
    kept = ["preprocessor_config.json", "processor_config.json", "chat_template.jinja", "bpe.codes", "spiece.model"]
    kept += [
        "sentencepiece.bpe.model",
        "modules.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
        "notes.md",
    ]
    kept += ["2_Dense/model.safetensors", "2_Dense/config.json", "additional_chat_templates/tool.jinja"]
    dropped = ["ema_model.safetensors", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "openvino/model.xml"]
    dropped += ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json"]
    dropped += ["checkpoint-3/model.safetensors", "runs/now/events.out.tfevents.1", ".gitattributes", "modeling_x.py"]
    for file in (*kept, *dropped):
        (checkpoint / file).parent.mkdir(exist_ok=True, parents=True)
        (checkpoint / file).write_text(file)
    answered("compress", checkpoint, out)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {"config.json", "model.safetensors", *CODE, *kept}
    assert all((out / file).read_text() == file for file in kept)


def test_an_adapter_of_the_large_model_stays_behind(tmp_path):
    """Where peft is installed its config alone would have the small model's loading look for its weights."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "notes.md"):
        (tmp_path / name).write_text(name)
    assert [path.name for path in files_beside_weights(tmp_path)] == ["notes.md"]


def test_a_config_that_names_a_head_without_weights_is_a_base_model(tmp_path):
    """As in the published folders of sentence-transformers."""
    checkpoint, out = tmp_path / "model", tmp_path / "small"
    model = saved(checkpoint, "MPNetModel", zeros=True, num_hidden_layers=1)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"architectures": ["MPNetForMaskedLM"]}))
    assert answered("inspect", checkpoint)["class"] == "MPNetModel"
    answered("compress", checkpoint, out)
    small = transformers.AutoModel.from_pretrained(out)
    assert largest_difference(outputs(small), outputs(model)) <= 1e-5
    assert answered("inspect", out)["class"] == "OTOMPNetModel"
    answered("bench", checkpoint, out, "--sequence-length", 8, "--repeats", 1)
    wordpiece().save_pretrained(checkpoint)
    answered("export", checkpoint, tmp_path / "onnx", "--folder")
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["architectures"] == ["MPNetModel"]


@pytest.mark.parametrize("shards", [False, True])
def test_weights_in_pickled_files_say_as_much(shards, tmp_path):
    """As older folders have them."""
    checkpoint = tmp_path / "model"
    model = saved(checkpoint, "MPNetModel", zeros=True)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"architectures": ["MPNetForMaskedLM"]}))
    (checkpoint / "model.safetensors").unlink()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = "pytorch_model-00001-of-00001.bin" if shards else "pytorch_model.bin"
    torch.save(weights, checkpoint / file)
    if shards:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file)}
        (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert answered("inspect", checkpoint)["class"] == "MPNetModel"
    answered("compress", checkpoint, tmp_path / "small")
    small = transformers.AutoModel.from_pretrained(tmp_path / "small")
    assert largest_difference(outputs(small), outputs(model)) <= 1e-5


def test_a_folder_around_models_names_them(tmp_path):
    """A run's folder with checkpoints, and how sentence-transformers once laid out its own."""
    saved(tmp_path / "run" / "checkpoint-8", zeros=True)
    (tmp_path / "run" / "1_Pooling").mkdir()
    (tmp_path / "run" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    error = refused("compress", tmp_path / "run", tmp_path / "out")
    assert f"There are models in it: {tmp_path / 'run' / 'checkpoint-8'}." in error


def test_the_card_of_a_plain_model_tells_to_load_it_without_code(tmp_path):
    model = tiny_model(BERT)
    for array in partition(model).arrays:
        if array.kind == "neurons":
            zero(model, array, range(8))
    small = compress(model)
    small.save_pretrained(tmp_path / "small")
    before, after = b"# Mine \xff\r\n, trust_remote_code=True)\n", "## Rest\n\nmodel(trust_remote_code=True)\n"
    lines = {plain: f'CrossEncoder("it"{"" if plain else ", trust_remote_code=True"})\n' for plain in (False, True)}
    told = {plain: card_section(summarize(small), repo_id="me/it", plain=plain) for plain in (False, True)}
    (tmp_path / "small" / "README.md").write_bytes(before + (told[False] + after + lines[False]).encode())
    answered("compress", tmp_path / "small", tmp_path / "plain", "--plain")
    assert (tmp_path / "plain" / "README.md").read_bytes() == before + (told[True] + after + lines[True]).encode()
    assert "trust_remote_code" not in told[True] and 'from_pretrained("me/it")' in told[True]


def test_the_card_of_an_embedding_model_that_was_cut_tells_to_load_it_with_its_code(tmp_path):
    saved(tmp_path / "full", zeros=True)
    line = 'model = SentenceTransformer("sentence_transformers_model_id"'
    (tmp_path / "full" / "README.md").write_text(f"# Mine\n\n{line})\n", encoding="utf-8")
    answered("compress", tmp_path / "full", tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert card == f"# Mine\n\n{line}, trust_remote_code=True)\n"


def test_compress_says_what_went_and_takes_an_empty_folder(tmp_path):
    saved(tmp_path / "checkpoint", zeros=True)
    (tmp_path / "small").mkdir()
    result = run("compress", tmp_path / "checkpoint", tmp_path / "small")
    assert result.exit_code == 0
    assert f"{tmp_path / 'small'}: removed 7 heads and 44 neurons of {tmp_path / 'checkpoint'}." in result.stdout
    assert "| prunable parameters |" in result.stdout
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == sorted(
        [*CODE, "config.json", "model.safetensors"]
    )


@pytest.mark.parametrize("name", ONE_EACH)
def test_compress_writes_the_familys_own_class_where_it_can(name, tmp_path):
    checkpoint, small, plain, late = (tmp_path / each for each in ("checkpoint", "small", "plain", "late"))
    model = tiny_model(name)
    for array in partition(model).arrays:
        if array.kind == "neurons":
            zero(model, array, range(array.layer, array.layer + 10))
    model.save_pretrained(checkpoint)
    assert "with --plain it loads everywhere" in run("compress", checkpoint, small).stdout
    assert "--plain" not in run("compress", checkpoint, plain, "--plain").stdout
    assert answered("compress", small, late, "--plain")["removed"] == {"heads": 0, "neurons": 0}
    for folder in (plain, late):
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == family_of(name) and not {"auto_map", "per_layer_config"} & set(config)
        loaded = getattr(transformers, name).from_pretrained(folder)
        assert largest_difference(outputs(loaded), outputs(model)) <= 1e-5
    assert "has no group of zeros" in refused("compress", plain, tmp_path / "again", "--plain")


def test_compress_names_what_no_config_of_the_familys_own_can_say(tmp_path):
    saved(tmp_path / "uneven", zeros=True)
    error = refused("compress", tmp_path / "uneven", tmp_path / "out", "--plain")
    assert "needs as many heads in every block, got [3, 0, 2]" in error
    assert "--plain" not in run("compress", tmp_path / "uneven", tmp_path / "small").stdout
    error = refused("compress", tmp_path / "small", tmp_path / "out", "--plain")
    assert "needs as many heads in every block, got [3, 0, 2]" in error
    model = tiny_model(BERT)
    for array in partition(model).arrays:
        zero(model, array, range(2))
    model.save_pretrained(tmp_path / "heads")
    assert "needs all 4 heads" in refused("compress", tmp_path / "heads", tmp_path / "out", "--plain")
    assert not (tmp_path / "out").exists()


def test_compress_counts_as_the_settings_of_the_run_do(tmp_path):
    model, table = saved(tmp_path / "checkpoint", zeros=True), made_table(partition(tiny_model(BERT)))
    config = OTOConfig(sequence_length=17, target_unit="latency", latency_table=table)
    config.save_pretrained(tmp_path / "checkpoint")
    expected = summarize(model, sequence_length=17, latency_table=table).to_dict()
    found = answered("compress", tmp_path / "checkpoint", tmp_path / "small")
    assert found == found | expected and 0 < found["latency"] < found["dense_latency"]


def test_compress_prunes_a_pruned_model_further(tmp_path):
    model = tiny_model(BERT)
    zero_uneven(model)
    model = compress(model)
    zero(model, partition(model).arrays[1], range(3))
    model.save_pretrained(tmp_path / "pruned")
    assert answered("compress", tmp_path / "pruned", tmp_path / "out")["removed"] == {"heads": 0, "neurons": 3}


def test_compress_writes_nothing_where_it_refuses(tmp_path):
    saved(tmp_path / "dense")
    saved(tmp_path / "zeros", zeros=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = everything_in(tmp_path)
    error = refused("compress", tmp_path / "dense", tmp_path / "out" / "small")
    assert "has no group of zeros" in error and "Use a checkpoint that OTOTrainer wrote after" in error
    assert "is not empty" in refused("compress", tmp_path / "zeros", tmp_path / "full")
    assert "is a file" in refused("compress", tmp_path / "zeros", tmp_path / "full" / "thesis.txt")
    assert "no config.json" in refused("compress", tmp_path / "full", tmp_path / "out")
    assert everything_in(tmp_path) == before


def test_compress_refuses_a_checkpoint_without_all_weights(tmp_path):
    model = saved(tmp_path / "zeros", zeros=True)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "qa_outputs.bias"}
    model.save_pretrained(tmp_path / "zeros", state_dict=weights)
    assert "lacks 1 weights" in refused("compress", tmp_path / "zeros", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_compress_leaves_nothing_where_the_disk_is_full(tmp_path):
    saved(tmp_path / "zeros", zeros=True)
    before = everything_in(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the weights have more
    try:
        refused("compress", tmp_path / "zeros", tmp_path / "new" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert everything_in(tmp_path) == before


# latency


def test_the_table_that_latency_writes_is_one_for_a_target(tmp_path):
    saved(tmp_path / "dense")
    out = tmp_path / "table.json"
    options = ["--batch-size", 2, "--sequence-length", 9, "--threads", 1, "--repeats", 2, "--cpu-time"]
    found = answered("latency", tmp_path / "dense", out, *options)
    assert found == {"out": str(out), **json.loads(out.read_text(encoding="utf-8"))}
    assert (found["batch_size"], found["sequence_length"], found["threads"], found["model_type"]) == (2, 9, 1, "bert")
    config = OTOConfig(target_unit="latency", latency_table=out, target_sparsity=0.0)
    HSPG(torch.optim.SGD(tiny_model(BERT).named_parameters()), partition(tiny_model(BERT)), config, 40)
    text = run("latency", tmp_path / "dense", tmp_path / "half.json", *options, "--dtype", "bfloat16").stdout
    table = json.loads((tmp_path / "half.json").read_text(encoding="utf-8"))
    assert "2 x 9 tokens, bfloat16, sdpa attention, cpu, 1 thread" in text and table["dtype"] == "bfloat16"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == [
        [str(heads), f"{time / 1e6:.3f}", str(neurons), f"{more / 1e6:.3f}"]
        for (heads, time), (neurons, more) in zip(table["heads"], [*table["neurons"], ("", 0)], strict=True)
    ][:-1] + [["4", f"{table['heads'][-1][1] / 1e6:.3f}", "", ""]]


def test_inspect_takes_a_table(tmp_path):
    model = saved(tmp_path / "dense")
    table = made_table(partition(model), fixed=2000, seed=2)
    table.save(tmp_path / "table.json")
    options = ["--target-unit", "latency", "--latency-table", tmp_path / "table.json", "--target-sparsity", 0.3]
    found = answered("inspect", tmp_path / "dense", *options)
    assert found["latency"] == found["dense_latency"] == table.total and found["latency_ratio"] == 1
    target = found["target"]
    assert target["latency_table"] == table.to_dict() and target["total"] == table.total
    for example in target["leaves"].values():
        assert 0.7 * table.total <= example["latency"] < 0.75 * table.total
    text = run("inspect", tmp_path / "dense", *options).stdout
    assert f"at most {target['budget']:,} of {table.total:,} ns of latency" in text
    assert f"| {target['leaves']['evenly']['latency']:,} |" in " ".join(text.split())
    assert "need each other" in refused("inspect", tmp_path / "dense", "--target-unit", "latency")
    saved(tmp_path / "wide", intermediate_size=32)
    assert "`dense_neurons` 24, the model has 32" in refused("inspect", tmp_path / "wide", *options)


def test_what_latency_refuses_writes_nothing(tmp_path):
    model = saved(tmp_path / "dense")
    zero_uneven(model)
    compress(model).save_pretrained(tmp_path / "small")
    (tmp_path / "there.json").write_text("mine")
    before = everything_in(tmp_path)
    assert "exists already" in refused("latency", tmp_path / "dense", tmp_path / "there.json")
    out = tmp_path / "table.json"
    assert "no folder" in refused("latency", tmp_path / "dense", tmp_path / "new" / "table.json")
    assert "pruned already" in refused("latency", tmp_path / "small", out)
    assert "`dtype` must be one of float32" in refused("latency", tmp_path / "dense", out, "--dtype", "int8")
    # torch does not know the first, has no module for the second, and sees no GPU or was built without.
    for device in ("tpu", "hpu", "mps:9", "meta", "cuda"):
        assert "`device` must be cpu, or cuda where" in refused("latency", tmp_path / "dense", out, "--device", device)
    assert "`sequence_length` must be at most 40" in refused(
        "latency", tmp_path / "dense", out, "--sequence-length", 41
    )
    assert everything_in(tmp_path) == before


# bench


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A dense model and a pruned one on the disk."""
    folder = tmp_path_factory.mktemp("pair")
    model = saved(folder / "dense", num_hidden_layers=1)
    zero_uneven(model)
    compress(model).save_pretrained(folder / "pruned")
    return folder / "dense", folder / "pruned"


def test_bench_times_every_size_side_by_side(pair):
    options = [
        "--batch-size",
        1,
        "--batch-size",
        3,
        "--sequence-length",
        8,
        "--sequence-length",
        30,
        "--repeats",
        5,
        "--threads",
        1,
    ]
    rows = answered("bench", *pair, *options)["measurements"]
    assert [(row["batch_size"], row["sequence_length"]) for row in rows] == [(1, 8), (3, 8), (1, 30), (3, 30)]
    for row in rows:
        assert (row["backend"], row["threads"]) == ("eager", 1)
        for name in ("dense", "pruned"):
            latency = row[name]
            assert 0 < latency["low"] <= latency["median"] <= latency["high"] < 10_000
            assert row[f"{name}_throughput"] == pytest.approx(1000 * row["batch_size"] / latency["median"])
        assert row["latency_ratio"] == row["dense"]["median"] / row["pruned"]["median"]
        macs = [
            summarize(transformers.AutoModel.from_pretrained(model), sequence_length=row["sequence_length"])
            for model in pair
        ]
        assert row["macs_ratio"] == macs[0].macs / macs[1].macs > 1
    text = run("bench", *pair, *options).stdout
    assert "5 runs each, 1 thread, float32" in text and text.count("| eager   |") == 4
    assert f"| {rows[0]['macs_ratio']:.2f}x |" in text


def test_bench_takes_another_dtype(pair):
    options = ["--sequence-length", 8, "--threads", 1, "--repeats", 1, "--dtype", "bfloat16"]
    (row,) = answered("bench", *pair, *options)["measurements"]
    assert (row["dtype"], row["device"], row["method"]) == ("bfloat16", "cpu", "clock")
    assert "1 runs each, 1 thread, bfloat16" in run("bench", *pair, *options).stdout


def test_bench_sees_that_a_model_is_slower(tmp_path):
    saved(tmp_path / "slow", num_hidden_layers=12)
    saved(tmp_path / "fast", num_hidden_layers=1)
    (row,) = answered("bench", tmp_path / "slow", tmp_path / "fast", "--sequence-length", 30, "--threads", 1)[
        "measurements"
    ]
    assert row["latency_ratio"] > 3 and row["macs_ratio"] == 12


def test_bench_restores_the_threads_and_takes_models_of_two_families(tmp_path):
    saved(tmp_path / "bert")
    saved(tmp_path / "distilbert", "DistilBertForQuestionAnswering", vocab_size=31)
    before = torch.get_num_threads()
    options = ["--sequence-length", 8, "--threads", before + 1, "--repeats", 1]
    (row,) = answered("bench", tmp_path / "bert", tmp_path / "distilbert", *options)["measurements"]
    assert row["threads"] == before + 1 and torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.parametrize("backends", [["compile"], ["onnx-int8", "onnx"]], ids="-and-".join)
def test_bench_on_other_backends(backends, pair, monkeypatch):
    """Of both kinds of ONNX a model is traced once."""
    import onnx

    operations, traces, traced = [], [], onnx_export._traced

    def session(path, threads):
        operations.append({node.op_type for node in onnx.load(path).graph.node})
        return inference_session(path, threads)

    monkeypatch.setattr(benchmark, "inference_session", session)
    monkeypatch.setattr(onnx_export, "_traced", lambda *args: traces.append(args) or traced(*args))
    options = [option for backend in backends for option in ("--backend", backend)]
    options += ["--sequence-length", 8, "--repeats", 2, "--threads", 1]
    rows = answered("bench", *pair, *options)["measurements"]
    assert [row["backend"] for row in rows] == backends
    assert all(row["dense"]["median"] > 0 and row["pruned"]["median"] > 0 for row in rows)
    assert set(pair[0].parent.iterdir()) == {*pair}
    in_int8 = ["MatMulInteger" in found or "DynamicQuantizeMatMul" in found for found in operations]
    assert in_int8 == ([] if backends == ["compile"] else [True, True, False, False])
    assert len(traces) == len(in_int8) / 2


def test_what_cannot_be_timed_is_refused(pair, monkeypatch):
    assert "must be one of eager, compile, onnx, onnx-int8, got 'tpu'" in refused("bench", *pair, "--backend", "tpu")
    assert "`sequence_length` must be at most 40, what both models read, got 41" in refused(
        "bench", *pair, "--sequence-length", 41
    )
    assert "`dtype` must be one of float32, bfloat16, float16, got 'int8'" in refused(
        "bench", *pair, "--dtype", "int8"
    )
    assert "`device` must be cpu, or cuda where there is one, got 'tpu'" in refused("bench", *pair, "--device", "tpu")
    assert "`device` must be cpu, or cuda where there is one, got 'cuda'" in refused(
        "bench", *pair, "--device", "cuda"
    )
    models = [transformers.AutoModel.from_pretrained(model) for model in pair]
    with pytest.raises(
        ValueError, match="must be on one device and of one dtype, got torch.float32 on cpu and torch.bf"
    ):
        benchmark.measure(models[0], models[1].bfloat16(), sequence_lengths=(8,))
    for name in ("batch-size", "sequence-length", "threads", "repeats", "warmup"):
        assert f"`{name.replace('-', '_')}` must be at least 1, got 0" in refused("bench", *pair, f"--{name}", 0)
    exporter, version = "transformers.exporters.exporter_onnx", transformers.__version__
    errors = {
        "onnxruntime": "ONNX needs onnxruntime: `pip install 'hf-oto[onnx]'`.",
        exporter: f"ONNX export by transformers {version} does not import with torch {torch.__version__}: ",
    }
    for missing, error in errors.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            assert error in refused("bench", *pair, "--backend", "eager", "--backend", "onnx")
            assert error in refused("export", pair[0], "model.onnx")
    least = {"torch": "99.0.0"}
    monkeypatch.setattr(importlib.import_module(exporter).OnnxExporter, "min_versions", least, raising=False)
    assert "needs torch 99.0.0 or later, got 2." in refused("export", pair[0], "model.onnx")


# export


def in_onnxruntime(path, model, **sizes):
    """The outputs of the file on a padded batch that the export has not seen, and those of the model."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert {(value.shape[0], value.shape[-1]) for value in session.get_inputs()} == {("batch", "length")}
    inputs = batch(model, **sizes)
    if "token_type_ids" in {value.name for value in session.get_inputs()}:
        inputs["token_type_ids"] = inputs["input_ids"] % 2
    with torch.no_grad():
        expected = model(**inputs)
    values = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    names = [value.name for value in session.get_outputs()]
    actual = {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
    return actual, {name: expected[name] for name in names}


# An export takes seconds: one of those with the blocks of BERT, and one of the decoders, whose heads Qwen3 normalizes.
LIKE_ANOTHER = {"roberta", "xlm-roberta", "electra", "camembert", "bert-generation", "llama"}
READERS = [name for name in ONE_EACH + OTHERS if getattr(transformers, name).main_input_name == "input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in READERS if family_of(name) not in LIKE_ANOTHER])
def test_export_of_a_model_with_a_block_cut_to_nothing(name, tmp_path):
    """Its last block has neither a head nor a neuron."""
    model = tiny_model(name, num_hidden_layers=2)
    zero_uneven(model)
    small = compress(model)
    summary = summarize(small)
    assert summary.heads[1] == summary.neurons[1] == 0 < summary.heads[0]
    small.save_pretrained(tmp_path / "small")
    out = tmp_path / "onnx" / "small.onnx"
    found = answered("export", tmp_path / "small", out)
    assert list(out.parent.iterdir()) == [out] and found["bytes"] == out.stat().st_size > 4 * summary.parameters
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (family_of(name) == "bert")
    names = ["start_logits", "end_logits"] if name.endswith("ForQuestionAnswering") else ["logits"]
    assert found == found | {"inputs": inputs, "outputs": names, "int8_error": None}
    assert 0 < found["error"] < 1e-5
    for length in (5, 37):
        actual, expected = in_onnxruntime(out, small, length=length)
        assert largest_difference(actual, expected) <= 1e-5


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in READERS])
def test_models_that_read_no_tokens_are_refused_before_their_weights_are_read(name, tmp_path):
    model = saved(tmp_path / "model", name)
    wordpiece().save_pretrained(tmp_path / "model")
    saved(tmp_path / "reader")
    for folder in ("model", "reader"):
        (tmp_path / folder / "model.safetensors").unlink()
    before, path = everything_in(tmp_path), tmp_path / "model"
    error = f"`model` must read tokens, {name} reads '{model.main_input_name}'"
    assert error in refused("export", path, tmp_path / "new.onnx")
    assert error in refused("bench", path, path)
    assert error in refused("bench", tmp_path / "reader", path)
    assert error in refused("answer", path, "--question", "why?", "--context", "a")
    for call in (lambda: export_onnx(model, tmp_path / "new" / "model.onnx"), lambda: measure(model, model)):
        with pytest.raises(ValueError, match=error):
            call()
    assert everything_in(tmp_path) == before


@pytest.mark.slow
def test_export_in_int8_says_how_far_the_logits_are(tmp_path):
    model = tiny_model("BertForMultipleChoice", num_hidden_layers=1)
    small = compress(model)
    small.half().save_pretrained(tmp_path / "small")  # exported in float32 all the same
    out = tmp_path / "small.onnx"
    result = run("export", tmp_path / "small", out, "--int8")
    assert result.exit_code == 0 and result.stderr == ""
    assert "int8, which is in the file, by " in result.stdout and "outputs logits" in result.stdout
    reported = float(result.stdout.split("in the file, by ")[1].split(",")[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "small.onnx"]
    assert b"DynamicQuantizeLinear" in out.read_bytes()
    actual, expected = in_onnxruntime(out, small.float(), length=20)
    # Other tokens than the report's: of its order, neither exact nor nonsense.
    assert 1e-4 < largest_difference(actual, expected) < 3 * reported < 0.5


@pytest.mark.slow
def test_export_says_what_onnxruntime_answers(reader, tmp_path):
    """Against PyTorch's answers, and those of the written file, scored by the example's metric."""
    import onnxruntime

    made = make_questions(12, seed=19)
    file = write(tmp_path / "dev.json", squad(*made, *make_questions(3, seed=6)))
    out = tmp_path / "reader.onnx"
    found = answered("export", reader, out, "--int8", "--squad", file, "--max-questions", 12)
    answerer = QuestionAnswerer.from_pretrained(reader)
    in_int8 = OnnxAnswerer(answerer, onnxruntime.InferenceSession(str(out)))
    metric = evaluate.load(str(EXAMPLE / "squad_score"), "v1.1", keep_in_memory=True)
    for key, one in (("scores", answerer), ("int8_scores", in_int8)):
        # All together: int8 scales its activations by what is in the batch.
        answers = one.answer([asked["question"] for _, asked in made], [context for context, _ in made])
        predictions, references = [], []
        for (_, asked), (best,) in zip(made, answers, strict=True):
            predictions.append({"id": asked["id"], "prediction_text": best.text})
            texts = [gold["text"] for gold in asked["answers"]]
            references.append({"id": asked["id"], "answers": {"text": texts, "answer_start": [0] * len(texts)}})
        expected = metric.compute(predictions=predictions, references=references)
        assert found[key] == pytest.approx(expected) and expected["f1"] > 0


@pytest.mark.slow
def test_export_writes_nothing_where_it_refuses(tmp_path):
    model = saved(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "there.onnx").write_bytes(b"mine")
    before = everything_in(tmp_path)
    assert "exists already" in refused("export", tmp_path / "model", tmp_path / "there.onnx")
    assert "must end in .onnx" in refused("export", tmp_path / "model", tmp_path / "model.pt")
    assert "no config.json" in refused("export", tmp_path, tmp_path / "new.onnx")
    questions = write(tmp_path / "dev.json", squad(*make_questions(1, seed=5)))
    before = everything_in(tmp_path)
    scored = ["export", tmp_path / "model", tmp_path / "new.onnx", "--max-questions"]
    assert "has no tokenizer_config.json" in refused(*scored, 1, "--squad", questions)
    assert "`limit` must be at least 1, got 0" in refused(*scored, 0, "--squad", questions)
    assert "--max-questions is of the questions of --squad" in refused(*scored, 1)
    assert "is no JSON of SQuAD's layout" in refused(*scored, 1, "--squad", tmp_path / "there.onnx")
    with pytest.raises(ValueError, match="does not compute what PyTorch does.*Nothing is written"):
        export_onnx(model, tmp_path / "new" / "model.onnx", atol=0.0)
    with pytest.raises(ValueError, match="must be on the CPU in float32, got torch.float64"):
        export_onnx(model.double(), tmp_path / "model.onnx")
    assert everything_in(tmp_path) == before


@pytest.mark.slow
def test_weights_too_large_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_oto.deploy.onnx_export.LARGEST_FILE", 1000)
    model = tiny_model("DistilBertModel", num_hidden_layers=1)
    path = tmp_path / "model[1].onnx"  # a pattern that it does not match itself
    done = export_onnx(model, path)
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes.keys() == {path.name, f"{path.name}.data"} and sum(sizes.values()) == done.bytes
    actual, expected = in_onnxruntime(path, model, length=11)
    assert largest_difference(actual, expected) <= 1e-5
    path.unlink()
    before = everything_in(tmp_path)
    with pytest.raises(FileExistsError, match=r"model\[1\].onnx.data exists already"):
        export_onnx(model, path)
    assert everything_in(tmp_path) == before


# answer


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A model that answers, with its tokenizer, on the disk."""
    folder = tmp_path_factory.mktemp("reader")
    tokenizer = wordpiece()
    saved(folder, num_hidden_layers=1, vocab_size=len(tokenizer), max_position_embeddings=64)
    tokenizer.save_pretrained(folder)
    return folder


def test_answer_gives_what_the_class_gives(reader, tmp_path):
    (context, first), (_, second), *_ = make_questions(3, seed=1)
    asked = [first["question"], second["question"]]
    found = answered("answer", reader, "--question", asked[0], "--question", asked[1], "--context", context)
    answerer = QuestionAnswerer.from_pretrained(reader)
    expected = answerer.answer(asked, [context] * 2)
    assert [row["question"] for row in found["questions"]] == asked
    for row, own in zip(found["questions"], expected, strict=True):
        assert row["answers"] == [vars(one) for one in own]
    (tmp_path / "page.txt").write_text(context, encoding="utf-8")
    options = ["--top-k", 500, "--handle-impossible-answer", "--max-seq-length", 50, "--doc-stride", 10]
    options += ["--max-answer-length", 4]
    result = run("answer", reader, "--question", asked[0], "--context-file", tmp_path / "page.txt", *options)
    assert result.exit_code == 0, result.stderr
    answerer = QuestionAnswerer.from_pretrained(reader, max_seq_length=50, doc_stride=10, max_answer_length=4)
    lines = [
        f"{one.score:.3f}  {one.start}-{one.end}  {one.text or '(no answer)'}"
        for one in answerer(asked[0], context, top_k=500, handle_impossible_answer=True)
    ]
    assert result.stdout.splitlines() == lines and any(line.endswith("  0-0  (no answer)") for line in lines)


def test_places_in_a_file_are_its_own(reader, tmp_path):
    """Line ends of two characters count as two, a byte-order mark is none."""
    ask = "--question", "Who wrote it?"
    text = "It was\r\nwritten\r\nby Ada Lovelace."
    (tmp_path / "page.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = answered("answer", reader, *ask, "--context-file", tmp_path / "page.txt", "--top-k", 5)["questions"][0]
    assert found == answered("answer", reader, *ask, "--context", text, "--top-k", 5)["questions"][0]
    assert all(text[one["start"] : one["end"]] == one["text"] for one in found["answers"])
    assert any(one["start"] > text.index("written") for one in found["answers"])


@pytest.mark.parametrize(
    "content",
    [b"", b"\xef\xbb\xbf", b"\r\n\r\n", b"\xef\xbb\xbf \t\n", "\u200b\u00ad".encode(), b"\x00", b"\xef\xbb\xbf" * 2],
)
def test_a_file_without_a_word_is_no_context(content, reader, tmp_path):
    """Not an empty list of answers, nor a sure "there is none": nothing was read."""
    (tmp_path / "page.txt").write_bytes(content)
    ask = "answer", reader, "--context-file", tmp_path / "page.txt", "--question", "Who wrote it?"
    for option in ((), ("--handle-impossible-answer",)):
        assert "`question` and `context` must be text that is not empty" in refused(*ask, *option)


def test_a_file_in_another_encoding_is_refused_by_name(reader, tmp_path):
    (tmp_path / "page.txt").write_bytes("It was written by Ada.".encode("utf-16"))
    ask = "answer", reader, "--context-file", tmp_path / "page.txt", "--question", "Who wrote it?"
    assert f"must be in UTF-8, {tmp_path / 'page.txt'} is not" in refused(*ask)


def test_what_cannot_be_answered_is_refused(reader, tmp_path):
    ask = ["--question", "why?"]
    assert "either --context or --context-file" in refused("answer", reader, *ask)
    assert "either --context or --context-file" in refused(
        "answer", reader, *ask, "--context", "a", "--context-file", tmp_path / "a.txt"
    )
    assert "a.txt" in refused("answer", reader, *ask, "--context-file", tmp_path / "a.txt")
    assert "must be text that is not empty" in refused("answer", reader, *ask, "--context", " ")
    for question in (" ", "\u200b"):
        assert "must be text that is not empty" in refused("answer", reader, "--question", question, "--context", "a")
    assert "`top_k` must be at least 1" in refused("answer", reader, *ask, "--context", "a", "--top-k", 0)
    saved(tmp_path / "model")
    assert "has no tokenizer_config.json" in refused("answer", tmp_path / "model", *ask, "--context", "a")
    saved(tmp_path / "masked", "BertForMaskedLM")
    wordpiece().save_pretrained(tmp_path / "masked")
    assert "has no weights for qa_outputs.bias" in refused("answer", tmp_path / "masked", *ask, "--context", "a")
    saved(tmp_path / "other", vocab_size=31)
    wordpiece().save_pretrained(tmp_path / "other")
    error = "`tokenizer` must be the one that the model was trained with"
    assert error in refused("answer", tmp_path / "other", *ask, "--context", "a")


def test_every_family_has_a_test_here():
    assert {family_of(name) for name in EVERY} == set(BLOCK_SPECS)


# Names, pipes and interruptions as they come.


def test_a_tilde_in_words_is_the_home_folder(tmp_path, monkeypatch):
    """Shells leave it in quotes and after `=`. A folder of that name would go by `rm -r ~`, and more with it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    saved("checkpoint", zeros=True, vocab_size=len(wordpiece()))
    wordpiece().save_pretrained("checkpoint")
    made_table(partition(tiny_model(BERT))).save("table.json")
    answered("compress", "~/checkpoint", "~/small")
    options = ["--target-unit", "latency", "--latency-table=~/table.json"]
    assert answered("inspect", "~/small")["heads"] == answered("inspect", "~/checkpoint", "--weights")["heads"]
    assert answered("inspect", "~/checkpoint", *options)["latency"]
    timing = ["--sequence-length", 8, "--repeats", 1]
    answered("latency", "~/checkpoint", "~/measured.json", *timing, "--threads", 1)
    answered("bench", "~/checkpoint", "~/small", *timing)
    (tmp_path / "page.txt").write_text("~/ is home", encoding="utf-8")
    found = answered("answer", "~/checkpoint", "--question", "~/?", "--context-file=~/page.txt")["questions"][0]
    assert found["question"] == "~/?"
    assert "questions.json" in refused("export", "~/checkpoint", "~/x.onnx", "--squad=~/questions.json")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("checkpoint", "small", "table.json", "measured.json", "page.txt")
    }


def test_nothing_is_no_name(tmp_path, monkeypatch):
    """As of a variable of the shell that is not set: not the current folder."""
    saved(tmp_path, zeros=True)
    monkeypatch.chdir(tmp_path)
    for command in (["inspect", ""], ["compress", "", "out"], ["bench", "", "."], ["latency", "", "out"]):
        assert "It must be a folder or a name, got nothing." in refused(*command)
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_model(tmp_path):
    saved(tmp_path, zeros=True)
    assert "config.json is a file. Give the folder with the model." in refused("inspect", tmp_path / "config.json")


def test_where_links_lead_is_where_the_model_goes(tmp_path, monkeypatch):
    """An empty folder on another disk, and one that is not made yet. The folder that one is in stays."""
    checkpoint = tmp_path / "checkpoint"
    saved(checkpoint, zeros=True)
    (tmp_path / "disk").mkdir()
    for link, target in (("linked", "disk"), ("later", "made")):
        (tmp_path / link).symlink_to(target)
        assert answered("compress", checkpoint, tmp_path / link)["out"] == str(tmp_path / link)
        assert (tmp_path / link).is_symlink() and (tmp_path / target / "model.safetensors").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "OUT . is the current folder. Choose one in it." in refused("compress", checkpoint, ".")
    answered("compress", checkpoint, "small")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["small"]


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\nsize 5\n", None])
def test_weights_that_are_none_are_refused_by_name(content, tmp_path):
    saved(tmp_path / "model", zeros=True)
    wordpiece().save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000] if content is None else content)
    for command in (["compress", tmp_path / "model", tmp_path / "out"], ["inspect", tmp_path / "model", "--weights"]):
        error = refused(*command)
        assert f"The weights of {tmp_path / 'model'} cannot be read" in error and "`git lfs pull`" in error
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'{"model_type": "b\xe9rt"}'])
def test_configs_that_are_none_are_refused_by_name(content, tmp_path):
    saved(tmp_path, zeros=True)
    settings = tmp_path / "oto_config.json"
    settings.write_bytes(content)
    assert str(settings) in refused("compress", tmp_path, tmp_path / "out")
    settings.unlink()
    (tmp_path / "config.json").write_bytes(content)
    assert str(tmp_path) in (error := refused("inspect", tmp_path)) and "no folder" not in error


def child(args, reader, encoding):
    """What a command does in a process of its own, as the entry point runs it: its exit status and standard error."""
    code = "import sys; from hf_oto.cli.app import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", code, *map(str, args)]
    if reader:
        done = forking.run(command, env=environment, capture_output=True)
        return done.returncode, done.stdout, done.stderr.decode()
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        done = forking.run(command, env=environment, stdout=out, stderr=subprocess.PIPE)
    return done.returncode, None, done.stderr.decode()


def test_whoever_reads_may_stop_and_may_read_in_another_encoding(tmp_path):
    """As `| head` and `| true` do, and a pipe of Windows."""
    folder = tmp_path / "modèle"
    saved(folder)
    status, _, error = child(["inspect", folder], reader=False, encoding="utf-8")
    assert (status, error) == (1, "")
    status, out, error = child(["inspect", folder, "--json"], reader=True, encoding="ascii")
    assert (status, error) == (0, "") and json.loads(out)["model"] == str(folder)


def test_tables_are_printed_in_any_encoding(tmp_path, monkeypatch):
    folder = tmp_path / "modèle"
    saved(folder, zeros=True)
    result = CliRunner(charset="ascii").invoke(app, ["compress", str(folder), str(tmp_path / "petit modèle")])
    assert result.exit_code == 0 and "petit mod\\xe8le: removed 7 heads" in result.stdout


def test_trying_again_is_not_told(tmp_path, monkeypatch):
    """Of the Hub's client, which warns before every new try: the error comes once, at the end."""
    client = importlib.import_module("huggingface_hub.utils").logging.get_logger("huggingface_hub.utils._http")

    def unreachable(*args, **kwargs):
        client.warning("Retrying in 1s [Retry 1/5].")
        raise OSError("We couldn't connect")

    monkeypatch.setattr("hf_oto.cli.loading.AutoConfig.from_pretrained", unreachable)
    told = []
    handler = importlib.import_module("logging").Handler()
    handler.emit = told.append
    client.addHandler(handler)
    try:
        assert "We couldn't connect" in refused("inspect", "nobody/nothing")
        assert told == []
        client.warning("as loud as before")
        assert len(told) == 1
    finally:
        client.removeHandler(handler)


def test_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    """As soon as the folder is there in which the model is made; and before a command runs it prints nothing."""
    saved(tmp_path / "checkpoint", zeros=True)
    make = Path.mkdir

    def interrupted(path, *args, **kwargs):
        make(path, *args, **kwargs)
        if UNFINISHED in path.name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", interrupted)
        result = run("compress", tmp_path / "checkpoint", tmp_path / "new" / "small")
    assert result.exit_code == 130 and list(tmp_path.iterdir()) == [tmp_path / "checkpoint"]

    def before():
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_oto.cli.app.app", before)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
