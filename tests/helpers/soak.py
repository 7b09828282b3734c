"""Kills training runs and lets them go on: `make soak`.

Every round starts a run in a folder of its own and kills it (SIGKILL): one at any moment, the next while it writes a
checkpoint, the next while it saves the small model, and so on. Then it looks at all that is left, resumes it, and
compares the end with that of a run that was never killed: weights, optimizer, masks and saliency, bit for bit.

Every run is a process of its own, forked from this one, which has imported everything and trained nothing.

`soak.py [--kills N] [--seed S]`
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from glob import glob
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from families import ONE_EACH, tiny_model
from runs import differences
from safetensors.torch import load_file
from short_runs import make
from transformers import AutoModelForQuestionAnswering, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

STEPS = 60
# What is on the disk while it is written, and nowhere else.
CHECKPOINT, MODEL = "_unfinished/checkpoint-*", ".*.unfinished-*"
MOMENTS = (None, CHECKPOINT, MODEL)


class Tell(TrainerCallback):
    def __init__(self, parent: Connection):
        self.parent = parent

    def on_train_begin(self, args, state, control, **kwargs):
        self.parent.send("training")


def train(folder: Path, parent: Connection) -> None:
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Large enough for a write to take its time.
    model = tiny_model(ONE_EACH[0], vocab_size=20_000)
    # A checkpoint after every second step, so that a run can be killed in many.
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    trainer = make(str(folder), model=model, extra={"callbacks": [Tell(parent)]}, max_steps=STEPS, **saving)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    trainer.save_model(str(folder / "small"))


def start(folder: Path) -> multiprocessing.Process:
    """A run, from the moment when it trains."""
    folder.mkdir(exist_ok=True)
    hears, tells = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=train, args=(folder, tells))
    process.start()
    tells.close()
    try:
        hears.recv()
    except EOFError:
        finish(process, folder)
    return process


def finish(process: multiprocessing.Process, folder: Path) -> None:
    process.join()
    if process.exitcode:
        raise RuntimeError(f"A run did not end well:\n{folder.with_suffix('.log').read_text()[-3000:]}")


def kill(process: multiprocessing.Process, folder: Path, moment: str | None, delay: float, later: float) -> bool:
    """
    Kill a run after a delay, or a little later than it next begins to write what is asked for. Gives whether it was
    there to be killed.
    """
    time.sleep(delay)
    if moment is not None:
        while process.is_alive() and not glob(moment, root_dir=folder):
            time.sleep(0.0005)
        time.sleep(later)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


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
    """Raise unless two folders hold the same model, and the same optimizer if there is one."""
    if not (folder / "model.safetensors").is_file():
        raise AssertionError(f"{folder} is not there, but {sorted(path.name for path in folder.parent.iterdir())}")
    states = []
    for path in (folder, reference):
        states.append({"model": load_file(path / "model.safetensors")})
        if (reference / "optimizer.pt").exists():
            states[-1] |= torch.load(path / "optimizer.pt", weights_only=True)
    if found := differences(*states):
        raise AssertionError(f"{folder} is not {reference}: {found[:5]}")


def soak(kills: int, seed: int) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        reference = Path(place, "reference")
        process = start(reference)
        begun = time.monotonic()
        finish(process, reference)
        length = time.monotonic() - begun
        killed = resumed = identical = 0
        amid = {CHECKPOINT: 0, MODEL: 0}
        while killed < kills:
            folder = Path(place, str(killed))
            moment = MOMENTS[killed % len(MOMENTS)]
            process = start(folder)
            delay, later = 0 if moment is MODEL else draw.uniform(0, length), draw.uniform(0, 0.03)
            was_there = kill(process, folder, moment, delay, later)
            check(folder, reference)
            if not was_there:  # it was done before
                shutil.rmtree(folder)
                continue
            killed += 1
            for kind in amid:
                amid[kind] += bool(glob(kind, root_dir=folder))
            finish(start(folder), folder)
            resumed += 1
            check(folder, reference)
            for path in reference.glob("checkpoint-*"):  # one more may be there, if it was killed before the removal
                same(folder / path.name, path)
            if left := [*glob(CHECKPOINT, root_dir=folder), *glob(MODEL, root_dir=folder)]:
                raise AssertionError(f"{left} are left")
            identical += 1
            shutil.rmtree(folder)
            print(f"\r{killed}/{kills}", end="\r", flush=True)
        print(
            f"{killed} kills, {resumed} resumed, {identical} identical "
            f"({amid[CHECKPOINT]} killed in a checkpoint, {amid[MODEL]} in a save of the small model)"
        )
        if kills >= len(MOMENTS) and not all(amid.values()):
            raise AssertionError("None was killed in the middle of one of the two: this machine writes too fast.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    multiprocessing.set_start_method("fork")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    soak(options.kills, options.seed)
