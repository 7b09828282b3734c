"""A run of OTOTrainer in processes of its own, for tests to launch in every way, to kill and to resume.

`runs.py FOLDER` trains in `FOLDER/run`, from the last checkpoint there if there is one, and writes what every rank
held to `FOLDER/run-RANK.pt`. The global batch is the same on any number of processes, and the model has no dropout,
whose random numbers are each rank's own.

`--notebook` starts two processes as a notebook does. `--die WHEN SIGNAL` lets a process end itself on the way; several
of them, each in a process and a folder `FOLDER/WHEN` of its own, print what their parent saw. `--resume STEP...` makes
two more runs: the same afresh, and one with dropout and a checkpoint at every step, which it resumes from these.
`--shrink` cuts zeros out on the way, in all of them; `--static` fixes DistributedDataParallel's graph;
`--double` trains in float64, where what is rounded otherwise does not grow.
"""

import argparse
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from families import ONE_EACH, squares, tiny_model, training_batch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_oto import OTOConfig, OTOTrainer

STEPS, GLOBAL_BATCH = 24, 8
SELECTIONS = (4, 9)  # the first steps of the two pruning periods; recovery begins at 14
CONFIG = OTOConfig(min_neurons=4, round_to=4, pruning_periods=len(SELECTIONS))
NAME = ONE_EACH[0]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# When the last rank may die: after a step, or with a part of a save on the disk.
SHRINKS, STATIC, DOUBLE = "--shrink", "--static", "--double"
STEP, CHECKPOINT, MODEL = "step", "checkpoint", "model"
LAST_STEP = 11  # from then on


class Mortal(OTOTrainer):
    dies: tuple[str, str] | None = None

    def die(self, when: str) -> None:
        if self.dies is not None and self.dies[0] == when and self.state.global_step >= LAST_STEP:
            os.kill(os.getpid(), signal.Signals[self.dies[1]])

    def _save(self, *args, **kwargs):
        super()._save(*args, **kwargs)
        self.die(CHECKPOINT if Path(args[0]).name.startswith("checkpoint-") else MODEL)


class Note(TrainerCallback):
    """Notes the masks after every step."""

    def __init__(self):
        self.masks = []

    def on_step_end(self, args, state, control, **kwargs):
        self.masks.append(self.trainer.hspg.param_groups[0]["hspg_status"].clone())
        if args.process_index == args.world_size - 1:
            self.trainer.die(STEP)


def make(
    folder: Path, extra=None, dropout: bool = False, name: str = NAME, config: OTOConfig = CONFIG, **options
) -> Mortal:
    torch.set_num_threads(1)
    model = tiny_model(name, **({} if dropout else NO_DROPOUT))
    model = model.double() if DOUBLE in sys.argv else model
    rows = training_batch(model, size=64)
    defaults = {"save_steps": 8, "learning_rate": 3e-3, "max_steps": STEPS, "report_to": [], "disable_tqdm": True}
    defaults |= {"ddp_find_unused_parameters": False, "ddp_static_graph": True} if STATIC in sys.argv else {}
    arguments = TrainingArguments(str(folder), use_cpu=True, **defaults | options)
    arguments.per_device_train_batch_size = GLOBAL_BATCH // arguments.world_size
    note = Note()
    note.trainer = Mortal(
        model=model,
        args=arguments,
        train_dataset=[{key: value[row] for key, value in rows.items()} for row in range(64)],
        compute_loss_func=None if {"labels", "start_positions"} & rows.keys() else squares,
        oto_config=replace(config, shrink_during_training=SHRINKS in sys.argv or config.shrink_during_training),
        callbacks=[note, *(extra or [])],
    )
    note.trainer.note = note
    return note.trainer


def held(trainer: OTOTrainer) -> dict:
    """What a run has to end with to the bit."""
    hspg = trainer.hspg
    state = [hspg.state[parameter] for group in hspg.param_groups for parameter in group["params"]]
    return {
        "weights": {key: value.detach().clone() for key, value in trainer.model.state_dict().items()},
        "optimizer": [{key: torch.as_tensor(value).clone() for key, value in entry.items()} for entry in state],
        "saliency": hspg.param_groups[0]["hspg_saliency"].clone(),
        "masks": hspg.param_groups[0]["hspg_status"].clone(),
    }


def differences(one, other, place: str = "") -> list[str]:
    """Where two states are not the same to the bit."""
    if not isinstance(one, dict | list | tuple):
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        return [] if same else [place]
    if len(one) != len(other):
        return [place]
    pairs = one.items() if isinstance(one, dict) else enumerate(one)
    return [found for key, value in pairs for found in differences(value, other[key], f"{place}/{key}")]


def train(folder: Path, dies: tuple[str, str] | None = None) -> Mortal:
    """Train in `FOLDER/run`, or go on there."""
    trainer, run = make(folder / "run"), folder / "run"
    trainer.dies = dies
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if run.is_dir() else None)
    return trainer


def launched(folder: Path, dies: tuple[str, str] | None = None, stops: tuple[int, ...] = ()) -> None:
    """What every process of a launch does. Its standard error stays, for the launcher's own words."""
    written = []
    sys.addaudithook(lambda event, args: event == "open" and "w" in str(args[1]) and written.append(str(args[0])))
    trainer = train(folder, dies)
    rank = trainer.args.process_index
    masks = trainer.note.masks  # fewer and fewer where it shrinks
    found = held(trainer) | {"every_step": masks if SHRINKS in sys.argv else torch.stack(masks)}
    torch.save(found, folder / f"run-{rank}.pt")
    (folder / f"written-{rank}.txt").write_text("\n".join(path for path in written if str(folder) in path))
    if stops:
        torch.save(held(train(folder / "afresh")), folder / f"afresh-{rank}.pt")
        whole = make(folder / "whole", dropout=True, save_steps=1)
        whole.train()
        torch.save(held(whole), folder / f"whole-{rank}.pt")
    for stop in stops:
        resumed = make(folder / "resumed", dropout=True, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{stop}"))
        torch.save(held(resumed), folder / f"{stop}-{rank}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name in (SHRINKS, STATIC, DOUBLE):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--notebook", action="store_true")
    parser.add_argument("--die", nargs=2, action="append", default=[])
    parser.add_argument("--resume", nargs="*", type=int, default=[])
    options = parser.parse_args()
    if options.notebook:
        from accelerate import notebook_launcher
        from accelerate.utils.other import get_free_port

        notebook_launcher(launched, (options.folder,), num_processes=2, use_port=str(get_free_port()))
    elif len(options.die) > 1:
        for dies in options.die:
            if not (child := os.fork()):
                launched(options.folder / dies[0], dies)
                os._exit(0)
            print("ended:", dies[0], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    else:
        launched(options.folder, *options.die, stops=tuple(options.resume))


if __name__ == "__main__":
    main()
