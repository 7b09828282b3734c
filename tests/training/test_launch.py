"""OTOTrainer by every launcher: the same masks, the same model, written once."""

import subprocess
import sys
from pathlib import Path

import forking
import pytest
import runs
import torch
from families import counts, largest_difference, outputs, tiny_model
from forking import run_ranks
from runs import LAST_STEP, NAME, SELECTIONS, STEPS, differences
from transformers import AutoModelForQuestionAnswering

from hf_oto.hspg.optimizer import KEPT, ZERO

pytestmark = pytest.mark.slow

SCRIPT = str(Path(runs.__file__))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# accelerate itself starts ranks for the distributed types of GPUs only, and leaves MULTI_CPU to MPI. What the ranks
# compute on is the script's own affair.
ACCELERATE = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
num_machines: 1
num_processes: 2
main_process_port: 0
"""


def launch(folder, launcher=(), *arguments, fails=False):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, *launcher, SCRIPT, str(folder), *arguments]
    run = subprocess.run if launcher else forking.run
    done = run(command, capture_output=True, text=True, timeout=280)
    assert bool(done.returncode) == fails, done.stderr[-4000:]
    return done


def load(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def test_every_way_to_launch_gives_the_same_model_once(tmp_path):
    (tmp_path / "accelerate.yaml").write_text(ACCELERATE)
    launch(tmp_path / "python")
    launch(tmp_path / "torchrun", TORCHRUN)
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    launch(tmp_path / "accelerate", accelerate)
    launch(tmp_path / "notebook", (), "--notebook")

    alone, expected = load(tmp_path / "python", "run-0"), load(tmp_path / "torchrun", "run-0")
    assert not (tmp_path / "python" / "run-1.pt").exists()
    start = SELECTIONS[0]
    assert len(alone["every_step"]) == STEPS
    assert not (alone["every_step"][start - 1] != KEPT).any() and (alone["every_step"][start] != KEPT).any()
    for way in ("torchrun", "accelerate", "notebook"):
        folder = tmp_path / way
        first, second = load(folder, "run-0"), load(folder, "run-1")
        assert differences(first, second) == []  # also the masks of every step
        assert differences(first, expected) == [], way
        assert torch.equal(first["every_step"][: start + 1], alone["every_step"][: start + 1])
        written = [Path(path).name for path in (folder / "written-0.txt").read_text().split()]
        assert written.count("config.json") == 4  # three checkpoints and the small model
        assert (folder / "written-1.txt").read_text() == ""
    assert differences(alone, expected) != []  # sums of halves are rounded otherwise: two ranks were at work

    for way, ended in (("python", alone), ("notebook", expected)):
        run = tmp_path / way / "run"
        assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-16", "checkpoint-24"}
        assert not [path for path in run.iterdir() if path.name.startswith((".", "_"))]
        full = tiny_model(NAME)
        full.load_state_dict(ended["weights"])
        small = AutoModelForQuestionAnswering.from_pretrained(run)
        assert counts(small) != counts(full) and (ended["masks"] == ZERO).any()
        assert largest_difference(outputs(small), outputs(full)) <= 1e-5


def test_a_rank_that_dies_ends_the_run_which_goes_on_from_its_checkpoint(tmp_path):
    """Then the same under DDP from every stage: a period's first step, one in the middle, its last, and recovery."""
    done = launch(tmp_path, TORCHRUN, "--die", "step", "SIGKILL", fails=True)
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-8"]

    stops = (2, *SELECTIONS, SELECTIONS[0] + 1, LAST_STEP, SELECTIONS[1] + 4, 14, 19)
    run_ranks(2, [sys.executable, SCRIPT, tmp_path, "--resume", *stops])
    for rank in (0, 1):
        resumed = load(tmp_path, f"run-{rank}")
        assert len(resumed.pop("every_step")) == STEPS - 8  # the others were done
        assert differences(resumed, load(tmp_path, f"afresh-{rank}")) == []
        whole = load(tmp_path, f"whole-{rank}")
        for stop in stops:
            assert differences(load(tmp_path, f"{stop}-{rank}"), whole) == [], stop


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run in float64 of one process, which stays in full size."""
    folder = tmp_path_factory.mktemp("alone")
    launch(folder, (), "--double")
    return folder


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_shrink_together(ranks, alone, tmp_path):
    """Two with what Trainer sets, four with a static graph: to the bit on every rank, and from checkpoints."""
    stops = (2, 10, 16) if ranks == 2 else ()
    options = ["--double", "--shrink", *["--static"] * (ranks == 4)]
    resumes = ["--resume", *map(str, stops)] if stops else []
    (tmp_path / "small").mkdir()
    run_ranks(ranks, [sys.executable, SCRIPT, tmp_path / "small", *options, *resumes])
    first, full = load(tmp_path / "small", "run-0"), load(alone, "run-0")
    sizes = [len(mask) for mask in first["every_step"]]
    assert sizes[0] == len(full["masks"]) > sizes[-1] == len(first["masks"]) and len(set(sizes)) == 3
    assert not (first["masks"] == ZERO).any()  # all that was to go is gone
    for rank in range(1, ranks):
        assert differences(first, load(tmp_path / "small", f"run-{rank}")) == []
    for rank in range(ranks) if stops else ():
        whole = load(tmp_path / "small", f"whole-{rank}")
        for stop in stops:
            assert differences(load(tmp_path / "small", f"{stop}-{rank}"), whole) == [], stop
    models = [AutoModelForQuestionAnswering.from_pretrained(folder / "run") for folder in (tmp_path / "small", alone)]
    assert counts(models[0]) == counts(models[1])
    assert largest_difference(*map(outputs, models)) <= 1e-9  # the same mathematics, rounded otherwise
