"""Kills training runs at random moments and lets them go on: `make soak`.

Every round starts a run in a folder of its own, kills it (SIGKILL) after a random time, looks at all that it left
behind, resumes it, and compares the end with that of a run that was never killed, bit for bit. The runs write a
checkpoint after every second step, so that many are killed while they write one, or while they save the small model.

`soak.py [--kills N] [--seed S]`; `soak.py run FOLDER` is what it kills.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering
from transformers.trainer_utils import get_last_checkpoint

import hf_oto  # noqa: F401  (the Auto classes know the pruned types)

STARTED = "started"
STEPS = 60
LAST = f"checkpoint-{STEPS}"


def train(folder: str) -> None:
    from families import ONE_EACH, tiny_model
    from test_trainer import make
    from transformers import TrainerCallback

    class Tell(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            print(STARTED, flush=True)

    # Large enough for a write to take its time.
    model = tiny_model(ONE_EACH[0], vocab_size=20_000)
    extra = {"callbacks": [Tell()]}
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    trainer = make(folder, model=model, extra=extra, max_steps=STEPS, **saving)
    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(Path(folder, "small")))


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "run", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder: Path) -> None:
    process = start(folder)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"A run did not end well:\n{errors[-3000:]}")


def check(folder: Path, reference: Path) -> None:
    """Raise unless everything under the names that a user reads is complete."""
    for path in folder.glob("checkpoint-*"):
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(path / name, weights_only=True)
        load_file(path / "model.safetensors")
    for path in (folder, folder / "small"):
        if (path / "model.safetensors").exists():
            AutoModelForQuestionAnswering.from_pretrained(path)
            same(path, reference / "small")


def same(folder: Path, reference: Path) -> None:
    if not (folder / "model.safetensors").is_file():
        raise AssertionError(f"{folder} is not there, but {sorted(path.name for path in folder.parent.iterdir())}")
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, reference))
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        raise AssertionError(f"{folder} is not {reference}")


def soak(kills: int, seed: int) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        reference = Path(place, "reference")
        finish(reference)
        process = start(Path(place, "timed"))
        assert process.stdout is not None
        process.stdout.readline()
        begun = time.monotonic()
        process.communicate()
        length = time.monotonic() - begun
        killed = resumed = identical = in_checkpoint = 0
        while killed < kills:
            folder = Path(place, str(killed))
            process = start(folder)
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.uniform(0, length))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if process.returncode != -signal.SIGKILL:  # it was done
                shutil.rmtree(folder)
                continue
            check(folder, reference)
            if (folder / LAST).is_dir():  # all steps were done; Trainer would take one more if it went on from here
                shutil.rmtree(folder)
                continue
            killed += 1
            in_checkpoint += (folder / "_unfinished").exists() or bool(list(folder.glob(".*")))
            finish(folder)
            resumed += 1
            check(folder, reference)
            for path in reference.glob("checkpoint-*"):  # one more may be there, if it was killed before the removal
                same(folder / path.name, path)
            identical += 1
            shutil.rmtree(folder)
        print(f"{killed} kills, {resumed} resumed, {identical} identical ({in_checkpoint} killed while writing)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["run"]:
        train(sys.argv[2])
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--kills", type=int, default=50)
        parser.add_argument("--seed", type=int, default=0)
        options = parser.parse_args()
        soak(options.kills, options.seed)
