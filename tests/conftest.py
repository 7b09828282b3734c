"""What holds for every test: no network, one thread per worker, seeds."""

import os
import sys
from pathlib import Path

# Before the first import of torch or a Hugging Face library: they read these once. Subprocesses inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES="",
)

import random  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)

# The example's files are scripts that import each other, no package; so are the tests' helpers.
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS.parent / "examples" / "squad")]

# A busy machine is no failure (deadline), and a run finds what the last one found (derandomize).
settings.register_profile("hf_oto", deadline=None, derandomize=True)
settings.load_profile("hf_oto")


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    torch.manual_seed(0)
