"""Checkpoints are somebody else's data: tampered configs, and files that would run code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from families import ONE_EACH, batch, outputs, tiny_model, zero_uneven
from hostile import Checkpoint, fuzz
from safetensors.torch import save_file

from hf_oto.surgery import compress

EXAMPLES = 2000


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
    """The same configs, by the code that came with the checkpoints."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    script = Path(__file__).with_name("hostile.py")
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoints), str(EXAMPLES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found.values()) >= EXAMPLES and set(found) == {"refused", "do not fit", "the same"}
