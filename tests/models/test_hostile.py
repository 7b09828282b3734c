"""Checkpoints are somebody else's data: tampered configs, and files that would run code."""

import ast
import json
import os
import pickle
import sys
from pathlib import Path

import forking
import hostile
import pytest
import transformers
from families import ONE_EACH, batch, outputs, tiny_model, zero_uneven
from hostile import Checkpoint, fuzz
from safetensors.torch import load_file, save_file

import hf_oto
from hf_oto import OTOConfig
from hf_oto.models.surgery import compress

EXAMPLES, BY_OTHER_CODE = 1000, 500


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Thousands of loads would each report what is wrong with them."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A pruned checkpoint of every family, with what it computes on a batch."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ONE_EACH:
        model = tiny_model(name, num_hidden_layers=2)
        zero_uneven(model)
        model = compress(model)
        model.save_pretrained(root / name)
        save_file({**batch(model), **outputs(model)}, root / name / "data.safetensors")
    return root


@pytest.mark.slow
def test_no_tampered_config_gets_through_wrong(checkpoints):
    def load(checkpoint: Checkpoint, folder: Path):
        return getattr(transformers, f"AutoModelFor{checkpoint.head}").from_pretrained(folder)

    found = fuzz(checkpoints, load, EXAMPLES)
    assert found.total() >= EXAMPLES and set(found) == {"refused", "do not fit", "the same"}


@pytest.mark.slow
def test_none_gets_through_where_hf_oto_is_not_installed(checkpoints, tmp_path):
    """Half of these configs, by the code that came with the checkpoints: a copy of that which all were tried on."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    script = Path(hostile.__file__)
    done = forking.run(
        [sys.executable, str(script), str(checkpoints), str(BY_OTHER_CODE)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found.values()) >= BY_OTHER_CODE and set(found) == {"refused", "do not fit", "the same"}


# Nothing unpickles. Which modules may be imported at all is tested with the imports.


def unpickling(source: str) -> list[str]:
    """Calls that read or write pickles, or run what they are given."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.rpartition(".")[2]
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unsafe = options.get("weights_only", "True") != "True" or options.get("allow_pickle", "False") != "False"
            if name in ("torch.load", "torch.save", "eval", "exec") or "pickle" in last or unsafe:
                found.append(name)
    return found


def test_no_call_in_the_package_unpickles():
    files = sorted(Path(hf_oto.__file__).parent.glob("**/*.py"))
    assert len(files) > 15
    assert {path.name: calls for path in files if (calls := unpickling(path.read_text(encoding="utf-8")))} == {}
    for wrong in ("torch.load(f)", "pandas.read_pickle(f)", "numpy.load(f, allow_pickle=True)", "x.unpickle(f)"):
        assert unpickling(wrong)
    assert unpickling("load_state_dict(f, weights_only=False)") and not unpickling("load_file(f)")


class Attack:
    """What makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def test_a_pickle_in_the_weights_place_is_not_run(checkpoints, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text((checkpoints / ONE_EACH[0] / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(tmp_path / "made")))
    with pytest.raises(Exception, match="(?i)weights_only|unpickl|pickle"):
        transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
    assert not (tmp_path / "made").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "made").exists()  # it would have


def test_what_is_written_is_safetensors_and_json(checkpoints, tmp_path):
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(checkpoints / ONE_EACH[0])
    compress(model).save_pretrained(tmp_path)
    OTOConfig().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("model.safetensors", "config.json", "oto_config.json"),
        *("modeling_oto.py", "configuration_oto.py"),  # the code that loads it
    }
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    assert load_file(tmp_path / "model.safetensors")
