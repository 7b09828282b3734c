"""What holds for every test: no network, one thread per worker, the CPU, seeds.

Contracts that hold on any device (`tests/accelerator`) run in processes of their own, which `HF_OTO_TEST_DEVICE` gives
one: all other tests, and the processes that they start, find no GPU.
"""

import os
import sys
from pathlib import Path

DEVICE = os.environ.get("HF_OTO_TEST_DEVICE", "cpu")
# What GPUs there are, for those processes: the workers of a run inherit it.
GPUS = os.environ.setdefault("HF_OTO_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))

# Before the first import of torch or a Hugging Face library: they read these once. Subprocesses inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)
first = "0" if GPUS == "all" else GPUS.partition(",")[0]
os.environ["CUDA_VISIBLE_DEVICES"] = first if DEVICE.startswith("cuda") else ""
if DEVICE.startswith("standin"):
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{DEVICE}:0"  # where Trainer goes

import gc  # noqa: E402
import random  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)

# The example's files are scripts that import each other, no package; so are the tests' helpers.
TESTS = Path(__file__).resolve().parent
EXAMPLES = TESTS.parent / "examples"
sys.path[:0] = [str(TESTS / "helpers"), str(EXAMPLES / "squad"), str(EXAMPLES / "embeddings")]

if DEVICE.startswith("standin"):
    import accelerator  # noqa: F401 (registers the device)

# A busy machine is no failure (deadline), and a run finds what the last one found (derandomize).
settings.register_profile("hf_oto", deadline=None, derandomize=True)
settings.load_profile("hf_oto")


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help="only what tests/quick.txt lists: one test of every contract"
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"):
        return
    first = {}  # case of a parametrized test
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    listed = [line for line in (TESTS / "quick.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    if missing := [name for name in listed if name not in first]:
        raise pytest.UsageError(f"tests/quick.txt lists what was not collected: {', '.join(missing)}")
    chosen = [first[name] for name in listed]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def what_is_imported_stays():
    """
    Trainer collects garbage twice a run, which looks at all that there is: half a million objects of torch and
    Transformers, in a third of the time of a short run. What there is when a file's tests begin is passed over.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def without_pictures(monkeypatch):
    """As where there is no matplotlib, for runs that take less time than to draw them."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def device():
    """Where a contract is tried: what `HF_OTO_TEST_DEVICE` names."""
    return torch.device(DEVICE, 0) if DEVICE != "cpu" else torch.device("cpu")
