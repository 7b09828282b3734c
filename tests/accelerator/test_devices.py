"""The contracts on every accelerator that is there: the stand-in always, a GPU where there is one.

Each runs in a process of its own, as a device that torch knows is known to all tests of its process.
"""

import os
import subprocess
import sys
from pathlib import Path

import forking
import pytest
import torch

CONTRACTS = sorted(Path(__file__).parent.glob("contract_*.py"))
ASK = "import torch; print(torch.cuda.device_count())"


def accelerators():
    """Asked in another process: this one and those that other tests start see no GPU."""
    found = []
    if hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):  # torch 2.10
        found.append("standin")
    if torch.version.cuda or torch.version.hip:
        asked = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ["HF_OTO_TEST_GPUS"]}
        if asked["CUDA_VISIBLE_DEVICES"] == "all":
            del asked["CUDA_VISIBLE_DEVICES"]
        done = subprocess.run([sys.executable, "-c", ASK], env=asked, capture_output=True, text=True)
        found += ["cuda"] * (done.returncode == 0 and int(done.stdout) > 0)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda path: path.stem.removeprefix("contract_"))
@pytest.mark.parametrize("device", accelerators())
def test_contracts_hold(device, contract):
    if contract.stem == "contract_stand_in" and device != "standin":
        pytest.skip("of the stand-in alone")
    hold(device, contract)


@pytest.mark.slow
@pytest.mark.parametrize("device", accelerators())
def test_a_training_in_half_precision_holds(device):
    """Under the device's own autocast, of one family: that of them all is for a GPU."""
    training = Path(__file__).with_name("contract_training.py")
    run = f"{training}::test_a_run_saves_what_it_trained_and_resumes[BertForQuestionAnswering-shrunk]"
    hold(device, run, HF_OTO_TEST_PRECISION="bfloat16")


def hold(device, contract, **settings):
    command = [sys.executable, "-m", "pytest", str(contract), "-q", "--tb=short", "-p", "no:cacheprovider"]
    environment = {**os.environ, "HF_OTO_TEST_DEVICE": device, **settings}  # from which the conftest makes the rest
    run = forking.run if device == "standin" else subprocess.run  # torch counts GPUs when it is imported
    done = run([*command, "-p", "no:xdist"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-2000:]}"


def test_other_tests_see_no_accelerator():
    assert not torch.cuda.is_available() and not hasattr(torch, "standin")
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
