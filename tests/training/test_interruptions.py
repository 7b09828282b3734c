"""Runs that stop, are killed, find no room or no way to write: nothing is lost, and nothing that is left is wrong."""

import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import forking
import pytest
import runs
import torch
from families import ONE_EACH, OTHERS, counts, largest_difference, outputs, tiny_model
from optuna.samplers import GridSampler
from runs import CHECKPOINT, MODEL, NO_DROPOUT, STEP, STEPS, differences, held, train
from runs import make as make_run
from short_runs import CONFIG, DATA, StopAt, arguments, make, same_weights
from transformers import AutoModelForQuestionAnswering, EarlyStoppingCallback, TrainerCallback

from hf_oto import OTOTrainer
from hf_oto.hspg.optimizer import REDUNDANT, ZERO
from hf_oto.models.folders import folder_beside


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_model(one, other):
    """Two saved models are the same to the bit."""
    read = AutoModelForQuestionAnswering.from_pretrained
    return counts(read(one)) == counts(read(other)) and same_weights(read(one), read(other))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Stopping and resuming.


def test_resuming_is_exact_from_every_step(tmp_path):
    """Periods of five steps, with dropout: first steps, middles and last steps of each, and both other stages."""
    whole = make_run(tmp_path / "whole", dropout=True, save_steps=1)
    whole.train()
    for stop in range(1, STEPS):
        resumed = make_run(tmp_path / "resumed", dropout=True, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert resumed.state.global_step == STEPS
        assert differences(held(resumed), held(whole)) == [], stop


@pytest.mark.parametrize("name", ONE_EACH[1:] + OTHERS)
def test_resuming_is_exact_in_the_other_families(name, tmp_path, without_pictures):
    """From the middle of a pruning period, with dropout where the family has it."""
    whole = make_run(tmp_path / "whole", dropout=True, name=name, save_steps=6)
    whole.train()
    assert (whole.note.masks[5] == REDUNDANT).any()
    resumed = make_run(tmp_path / "resumed", dropout=True, name=name, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert differences([resumed.note.masks, held(resumed)], [whole.note.masks[6:], held(whole)]) == []
    full, small = type(whole.model).from_pretrained(tmp_path / "whole" / "checkpoint-24"), whole.compressed_model()
    assert same_weights(full, whole.model)
    loaded = type(small).from_pretrained(tmp_path / "whole")
    assert same_weights(loaded, small) and counts(loaded) != counts(full)


@pytest.mark.parametrize("length", [{"max_steps": 24}, {"max_steps": -1, "num_train_epochs": 2.4}])
def test_a_finished_run_takes_no_step_more(length, tmp_path):
    """Ten batches an epoch, so it ends within one."""
    first = make(tmp_path, save_strategy="steps", save_steps=8, **length)
    first.train()
    before = files_of(tmp_path)
    # As if it was killed while it removed an old checkpoint, before it wrote the small model.
    (tmp_path / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "checkpoint-8", tmp_path / "_unfinished" / "checkpoint-4")
    again = make(tmp_path, save_strategy="steps", save_steps=8, **length)
    assert again.train(resume_from_checkpoint=True).global_step == 24
    assert again.hspg.steps_done == 24 and same_weights(again.model, first.model)
    after = files_of(tmp_path)
    assert {name for name in before if before[name] != after.get(name)} <= {"training_args.bin"}
    assert before.keys() == after.keys()


class Worse(OTOTrainer):
    """Its loss grows with every evaluation."""

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = float(self.state.global_step)
        return output


def test_early_stopping_begins_to_count_at_the_target(tmp_path):
    trainer = make(
        tmp_path,
        kind=Worse,
        extra={"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]},
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    trainer.train()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]  # the target is reached after 14 steps, the best one
    assert trainer.hspg.schedule.boundaries[-1] == 14 == trainer.state.best_global_step
    small, best = (AutoModelForQuestionAnswering.from_pretrained(tmp_path / name) for name in ("", "checkpoint-14"))
    assert counts(small) != counts(best)
    assert largest_difference(outputs(small), outputs(best)) <= 1e-5


class JustStop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 7


@pytest.mark.parametrize("options", [{"save_steps": 4}, {"save_steps": 7}])
def test_a_run_stopped_before_its_target_is_kept_and_not_cut(options, tmp_path, caplog):
    options = {"save_strategy": "steps", **options}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    run = tmp_path / "run"
    caplog.clear()
    stopped = make(run, extra={"callbacks": [JustStop()]}, **options)
    stopped.train()
    assert "Training stopped at step 7 of 24, in stage 'pruning'. `target_sparsity`=0.5 is not reached" in caplog.text
    assert f"no small model is written. The run is kept in {run / 'checkpoint-7'}, from where" in caplog.text
    assert names(run) == (["checkpoint-4", "checkpoint-7"] if options["save_steps"] == 4 else ["checkpoint-7"])
    resumed = make(run, **options)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(resumed.model, whole.model)
    assert same_model(run, tmp_path / "whole")


@pytest.mark.parametrize("options", [{}, {"save_strategy": "steps", "save_steps": 4, "save_only_model": True}])
def test_a_run_stopped_early_where_nothing_is_to_be_saved_says_so(options, tmp_path, caplog):
    make(tmp_path, extra={"callbacks": [JustStop()]}, **options).train()
    assert (
        "Training stopped at step 7 of 24" in caplog.text and "Nothing is saved, as `save_strategy` or" in caplog.text
    )
    assert names(tmp_path) == (["checkpoint-4"] if options else [])


def test_epochs_with_an_evaluation_at_the_start(tmp_path):
    options = {"max_steps": -1, "num_train_epochs": 3}
    model, other = (tiny_model(ONE_EACH[0], **NO_DROPOUT) for _ in range(2))  # evaluations draw random numbers
    trainer = make(tmp_path, model=model, eval_on_start=True, eval_strategy="epoch", save_strategy="epoch", **options)
    trainer.train()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == [0, 10, 20, 30] and trainer.hspg.schedule.total_steps == 30 and trainer.hspg.target_reached
    plain = make(tmp_path / "plain", model=other, **options)
    plain.train()
    assert differences(held(trainer), held(plain)) == []
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (10, 20, 30)}


def test_hyperparameter_search(tmp_path):
    def begin(folder, **options):
        return OTOTrainer(
            args=arguments(folder, eval_strategy="steps", eval_steps=8, **options),
            model_init=lambda: tiny_model(ONE_EACH[0]),
            train_dataset=DATA,
            eval_dataset=DATA[:8],
            oto_config=CONFIG,
        )

    space = {"max_steps": [24, 32], "learning_rate": [1e-3, 3e-3]}
    best = begin(tmp_path / "search", save_strategy="steps", save_steps=8).hyperparameter_search(
        backend="optuna",
        n_trials=4,
        hp_space=lambda trial: {name: trial.suggest_categorical(name, values) for name, values in space.items()},
        sampler=GridSampler(space),
    )
    runs = sorted((tmp_path / "search").iterdir())
    assert [run.name for run in runs] == [f"run-{number}" for number in range(4)]  # and no model of whichever was last
    lengths = []
    for run in runs:
        last = max(int(path.name.rpartition("-")[2]) for path in run.iterdir())
        state = torch.load(run / f"checkpoint-{last}" / "optimizer.pt", weights_only=True)["param_groups"][0]
        assert state["hspg_step"] == last and f'"total_steps": {last},' in state["hspg_settings"]
        assert (state["hspg_status"] == ZERO).any() and not (state["hspg_status"] == REDUNDANT).any()
        lengths.append(last)
    assert sorted(lengths) == [24, 24, 32, 32]
    alone = begin(tmp_path / "best", **best.hyperparameters)  # nothing was left over from the trials before
    alone.train()
    assert alone.evaluate()["eval_loss"] == best.objective


# What does not belong together.


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"vocab_size": 70}, r"word_embeddings.weight' has shape \[61, 32\] there and \[70, 32\] in `model`"),
        (
            {"num_hidden_layers": 4},
            r"\(heads, neurons\) in its blocks, `model` .*Resume with the model that",
        ),
        ({"intermediate_size": 32}, r"checkpoint-6 has \[\(4, 24\), .* `model` \[\(4, 32\)"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(model, message, tmp_path):
    make(tmp_path, extra={"callbacks": [StopAt(6)]}).train()
    files = files_of(tmp_path)
    other = make(tmp_path, model=tiny_model(ONE_EACH[0], **model))
    before = [parameter.clone() for parameter in other.model.parameters()]
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(before, other.model.parameters(), strict=True))
    assert files_of(tmp_path) == files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BertForTokenClassification", "'qa_outputs.weight' saved, 'classifier.weight' now"),
        (
            "RobertaForQuestionAnswering",
            "'bert.embeddings.word_embeddings.weight' saved, 'roberta.embeddings.wor",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(name, message, tmp_path):
    """Their weights are as many and of the same shapes, and Trainer itself only warns."""
    make(tmp_path, extra={"callbacks": [StopAt(6)]}).train()
    with pytest.raises(ValueError, match=message):
        make(tmp_path, name).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("written", "message"), [(2, "is of format 2, .* this one reads format 1"), (None, None)])
def test_a_checkpoint_of_another_format_is_refused(written, message, tmp_path):
    """One from before formats had numbers is of the first."""
    first = make(tmp_path, extra={"callbacks": [StopAt(6)]})
    first.train()
    path = tmp_path / "checkpoint-6" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    settings = state["param_groups"][0]["hspg_settings"]
    assert settings.count('"format": 1, ') == 1
    changed = settings.replace('"format": 1, ', "" if written is None else f'"format": {written}, "unheard_of": 5, ')
    state["param_groups"][0]["hspg_settings"] = changed
    torch.save(state, path)
    again = make(tmp_path)
    if message is None:
        again.train(resume_from_checkpoint=True)
        assert again.hspg.target_reached
    else:
        with pytest.raises(ValueError, match=message):
            again.train(resume_from_checkpoint=True)
        assert again.hspg.steps_done == 0


# Disks.


@contextmanager
def disk(place, size):
    """A small disk of its own at `place`, with a function that gives it other options."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def files_no_larger_than(size):
    """The other way of a system to refuse a write, which asks for no rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sizes(folder):
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 8}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    one = sum(sizes(tmp_path / "whole" / "checkpoint-8"))
    with disk(tmp_path / "run", int(1.8 * one)) as remount:
        run = tmp_path / "run"  # itself the disk's root
        with pytest.raises(OSError, match=r"checkpoint-16 could not be written: .* The disk has 0\.0 MiB left"):
            make(run, **options).train()
        assert names(run) == ["checkpoint-8"]
        kept = files_of(run)
        remount(f"size={10 * one}")
        resumed = make(run, **options)
        resumed.train(resume_from_checkpoint=True)
        assert same_weights(resumed.model, whole.model) and same_model(run, tmp_path / "whole")
        assert kept.items() <= files_of(run).items()

        # Full again, and now it is the small model that finds no room.
        small = files_of(run)
        room = shutil.disk_usage(run).free - 4096
        (run / "other").write_bytes(bytes(room))
        for folder in (run, run / "new"):
            with pytest.raises(OSError, match=rf"{folder} could not be written"):
                resumed.save_model(str(folder))
        (run / "other").unlink()
        assert files_of(run) == small and not (run / "new").exists()


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_files_that_cannot_grow_leave_what_was_there(share, tmp_path):
    """In the weights, and in the optimizer's state, which is twice as large."""
    options = {"save_strategy": "steps", "save_steps": 8}
    trainer = make(tmp_path / "run", extra={"callbacks": [StopAt(8)]}, **options)
    trainer.train()
    kept = files_of(tmp_path)
    again = make(tmp_path / "run", **options)
    with (
        files_no_larger_than(int(share * max(sizes(tmp_path)))),
        pytest.raises(OSError, match="checkpoint-16 could not be written: "),
    ):
        again.train(resume_from_checkpoint=True)
    assert files_of(tmp_path) == kept and names(tmp_path / "run") == ["checkpoint-8"]
    with files_no_larger_than(10_000), pytest.raises(OSError, match="small could not be written: "):
        again.save_model(str(tmp_path / "small"))
    assert files_of(tmp_path) == kept and names(tmp_path) == ["run"]


@contextmanager
def unwritable(folder):
    """For root a disk that is mounted to be read, for anybody else the permissions."""
    if os.getuid():
        folder.mkdir()
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
    else:
        with disk(folder, "1m") as remount:
            remount("ro")
            yield


def test_an_output_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    with unwritable(tmp_path / "run"):
        trainer = make(tmp_path / "run", save_strategy="steps", save_steps=8)
        with pytest.raises(PermissionError, match=r"`output_dir` must be writable, '.*run' is not"):
            trainer.train()
        assert trainer.hspg is None
        make(tmp_path / "run").train()  # it writes nothing
        with pytest.raises(OSError, match="Read-only|Permission"):
            trainer.save_model(str(tmp_path / "run" / "small"))


# Signals.


@pytest.mark.slow
def test_a_process_that_is_ended_leaves_what_was_there(tmp_path):
    """During training, in the middle of a checkpoint, and of the small model at the end."""
    script = str(Path(runs.__file__))
    dies = {STEP: "SIGTERM", CHECKPOINT: "SIGTERM", MODEL: "SIGKILL"}
    ways = [word for when, by in dies.items() for word in ("--die", when, by)]
    done = forking.run([sys.executable, script, str(tmp_path), *ways], capture_output=True, text=True, timeout=280)
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended: ")]
    assert ended == [f"ended: {STEP} -15", f"ended: {CHECKPOINT} -15", f"ended: {MODEL} -9"], done.stderr[-3000:]
    whole = held(train(tmp_path / "whole"))
    for when, last in ((STEP, 8), (CHECKPOINT, 8), (MODEL, 24)):
        run = tmp_path / when / "run"
        assert sorted(run.glob("checkpoint-*"))[-1].name == f"checkpoint-{last}" or last == 24
        assert not (run / "config.json").exists() and not (run / "model.safetensors").exists()
        begun = [path for path in run.iterdir() if path.name.startswith((".", "_"))]
        assert bool(begun) == (when != STEP) and all(list(path.rglob("*.safetensors")) for path in begun)
        trainer = train(tmp_path / when)
        assert len(trainer.note.masks) == STEPS - last
        assert differences(held(trainer), whole) == []
        assert same_model(run, tmp_path / "whole" / "run")
        assert not [path for path in run.iterdir() if path.name.startswith((".", "_"))]


def test_what_a_dead_process_left_beside_a_target_goes(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, others = tmp_path / f".small.unfinished-{gone.pid}", tmp_path / f".small.unfinished-{os.getppid()}"
    mine = tmp_path / ".small.unfinished-notes"
    for folder in (left, others, mine):
        folder.mkdir()
    with folder_beside(tmp_path / "small") as folder:
        assert sorted(tmp_path.iterdir()) == sorted([folder, others, mine])
    assert sorted(tmp_path.iterdir()) == sorted([others, mine])
