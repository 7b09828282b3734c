"""Loading in interpreters of their own: what is imported for it, in which order, and by which code."""

import json
import pickle
import subprocess
from pathlib import Path

import pytest
from families import batch, outputs, tiny_model, zero_uneven
from interpreters import run_fresh
from safetensors.torch import save_file

from hf_oto import compress
from hf_oto.models.configuration_oto import BLOCK_SPECS

# Written by version 0.1.0 as released, with its code (`modeling.py`, `architectures.py`), and what it computes.
BEFORE = Path(__file__).resolve().parents[1] / "data" / "bert_qa_0_1"

LOAD_BEFORE = """
import json, sys
import torch
from transformers import AutoModelForQuestionAnswering

folder, code = sys.argv[1:]
if code == "own":
    import hf_oto
expected = json.load(open(folder + "/expected.json"))
model = AutoModelForQuestionAnswering.from_pretrained(folder, trust_remote_code=code == "travelled")
with torch.no_grad():
    found = model(torch.tensor(expected["input_ids"])).start_logits
assert torch.allclose(found, torch.tensor(expected["start_logits"]), rtol=0, atol=1e-6), found
model.save_pretrained("again")
again = AutoModelForQuestionAnswering.from_pretrained("again", trust_remote_code=code == "travelled")
assert torch.equal(again(torch.tensor(expected["input_ids"])).start_logits, found)
print(type(model).__module__)
"""


@pytest.mark.parametrize("code", ["own", "travelled"])
def test_a_checkpoint_of_an_earlier_version_loads(code, tmp_path):
    module = run_fresh(LOAD_BEFORE, BEFORE, code, home=tmp_path, with_hf_oto=code == "own").strip()
    assert module.startswith({"own": "hf_oto.models.modeling_oto", "travelled": "transformers_modules."}[code])
    files = {path.name for path in (tmp_path / "again").glob("*.py")}
    assert (
        files
        == {  # a model that the travelled code made is saved with that code
            "own": {"modeling_oto.py", "configuration_oto.py"},
            "travelled": {"modeling.py", "architectures.py"},
        }[code]
    )


LOAD = """
import json, sys

folder, order = sys.argv[1:]
if order == "hf_oto first":
    import hf_oto
    assert "transformers" not in sys.modules
    import transformers
elif order == "transformers first":
    import transformers
    import hf_oto
elif order == "the Auto classes first":
    from transformers import AutoModel, AutoModelForQuestionAnswering
    import hf_oto
else:
    import transformers

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering

trust = order == "without hf_oto"
assert AutoConfig.from_pretrained(folder, trust_remote_code=trust).model_type == "oto_bert"
model = AutoModelForQuestionAnswering.from_pretrained(folder, trust_remote_code=trust)
data = load_file(folder + "/data.safetensors")
with torch.no_grad():
    found = model(data["input_ids"], attention_mask=data["attention_mask"])
assert torch.allclose(found.start_logits, data["start_logits"], rtol=0, atol=1e-6)
assert type(AutoModel.from_config(model.config, trust_remote_code=trust)).__name__ == "OTOBertModel"
if not trust:
    config = AutoConfig.for_model("oto_bert", hidden_size=32, num_attention_heads=4)
    assert type(config) is type(model.config) and config.num_attention_heads == 4
start = "transformers.models."
print(json.dumps(sorted({name.split(".")[2] for name in sys.modules if name.startswith(start)})))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_model("BertForQuestionAnswering")
    zero_uneven(model)
    small = compress(model)
    folder = tmp_path_factory.mktemp("small")
    small.save_pretrained(folder)
    save_file({**batch(small), **outputs(small)}, folder / "data.safetensors")
    (folder / "model.pickle").write_bytes(pickle.dumps(small))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("order", ["hf_oto first", "transformers first", "the Auto classes first", "without hf_oto"])
def test_one_familys_model_is_loaded_without_the_others(order, folder, tmp_path):
    found = json.loads(run_fresh(LOAD, folder, order, home=tmp_path, with_hf_oto=order != "without hf_oto"))
    families = {name.replace("-", "_") for name in BLOCK_SPECS}
    assert families & set(found) == {"bert"}


UNPICKLE = """
import pickle, sys
import torch

with open(sys.argv[1] + "/model.pickle", "rb") as file:
    model = pickle.load(file)  # the first thing of hf_oto that this interpreter hears of
from safetensors.torch import load_file
from transformers import AutoModel

data = load_file(sys.argv[1] + "/data.safetensors")
with torch.no_grad():
    found = model(data["input_ids"], attention_mask=data["attention_mask"])
assert torch.allclose(found.start_logits, data["start_logits"], rtol=0, atol=1e-6)
print(type(AutoModel.from_config(model.config)).__name__)
"""


def test_a_pickled_model_is_one_where_nothing_is_imported_yet(folder, tmp_path):
    assert run_fresh(UNPICKLE, folder, home=tmp_path).strip() == "OTOBertModel"


IMPORTS = """
import sys

import hf_oto
assert not {"torch", "transformers"} & set(sys.modules)
from hf_oto import HSPG, OTOConfig, partition
others = {"transformers", "accelerate", "safetensors", "torch.distributed.tensor", "torch._dynamo"}
print(sorted(others & set(sys.modules)))
"""


def test_the_optimizer_is_imported_with_torch_alone(tmp_path):
    assert run_fresh(IMPORTS, home=tmp_path, run=subprocess.run).strip() == "[]"  # where nothing is imported


OLD_TRANSFORMERS = """
import sys
import transformers

class PreTrainedConfig: ...  # as it was: without sizes for each layer

transformers.PreTrainedConfig = PreTrainedConfig
transformers.__version__ = "4.57.6"
try:
    transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print(error)
"""


def test_older_transformers_are_told_what_is_needed(folder, tmp_path):
    """As simulated here; with 4.57.6 itself it was tried by hand."""
    found = run_fresh(OLD_TRANSFORMERS, folder, home=tmp_path, with_hf_oto=False).strip()
    assert found == "Pruned models need transformers 5.14 or later, got 4.57.6. Upgrade it."


ADAPTERS = """
import sys

sys.path.insert(0, "packages")
if sys.argv[1] == "before":
    import hf_oto
import peft.utils.constants as constants
import hf_oto

table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
assert table["oto_bert"] == table["bert"] == ["query", "value"] and "gpt2" in table
assert table["oto_xlm_roberta"] == ["query"] and "oto_gpt2" not in table and "oto_llama" not in table
assert constants.__spec__.loader is constants.__loader__ and constants.EMBEDDING_LAYER_NAMES == ["embed_tokens"]
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_go_where_they_go_in_the_familys_dense_models(order, tmp_path):
    """With a package that has peft's tables at peft's place; peft 0.21.2 itself was tried by hand."""
    folder = tmp_path / "packages" / "peft" / "utils"
    folder.mkdir(parents=True)
    for name in (folder.parent / "__init__.py", folder / "__init__.py"):
        name.write_text("")
    (folder / "constants.py").write_text(
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = "
        "{'bert': ['query', 'value'], 'xlm-roberta': ['query'], 'gpt2': ['c_attn']}\n"
        "EMBEDDING_LAYER_NAMES = ['embed_tokens']\n"
    )
    run_fresh(ADAPTERS, order, home=tmp_path)
