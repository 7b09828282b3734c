"""Folders written whole: other people's files, trees, and a process that dies at any step of a save."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from families import ONE_EACH, counts, tiny_model, zero_uneven
from short_runs import make
from transformers import AutoModelForQuestionAnswering, TrainerCallback

from hf_oto import OTOTrainer
from hf_oto.training.saving import finish, replacing

OTHERS = [
    *("ema_model.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "teacher_model.safetensors"),
    *("model-ema.safetensors", "pytorch_model.bin", "model.safetensors.bak", "best_model.safetensors.index.json"),
    *("notes.txt", "onnx/model.onnx", "adapters/model.safetensors", "extra/mine.json"),
]


class Tree:
    """A processing class whose files lie in folders, as chat templates and image processors' may."""

    def __init__(self, text):
        self.text = text

    def save_pretrained(self, folder):
        for name in ("tokenizer.json", "extra/one.json", "extra/deep/two.json"):
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{self.text} {name}")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def write(folder, files):
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_a_folder_with_folders_is_saved_into_again(tmp_path):
    model = tiny_model(ONE_EACH[0])
    zero_uneven(model)
    trainer = make(tmp_path / "run", model=model, extra={"processing_class": Tree("first")})
    folder = tmp_path / "small"
    write(folder, {name: name.encode() for name in OTHERS})
    trainer.save_model(str(folder))
    trainer.processing_class = Tree("second")
    trainer.save_model(str(folder))
    found = files_of(folder)
    assert {name: found[name] for name in OTHERS} == {name: name.encode() for name in OTHERS}
    assert found["extra/deep/two.json"] == b"second extra/deep/two.json" and b"second" in found["tokenizer.json"]
    assert counts(AutoModelForQuestionAnswering.from_pretrained(folder)) != [(4, 24)] * 3
    assert not [name for name in found if "unfinished" in name]


@pytest.mark.parametrize("blocked", ["extra", "tokenizer.json"])
def test_what_cannot_be_put_in_its_place_is_refused_before_anything_moves(blocked, tmp_path):
    trainer = make(tmp_path / "run", extra={"processing_class": Tree("first")})
    folder = tmp_path / "small"
    write(folder, {"model.safetensors": b"old", ("extra" if blocked == "extra" else f"{blocked}/file"): b"mine"})
    before = files_of(folder)
    with pytest.raises(ValueError, match=rf"{blocked} is a (file|folder) where a (file|folder) has to go"):
        trainer.save_model(str(folder))
    assert files_of(folder) == before


OLD = {
    "config.json": b"old",
    "model-00001-of-00002.safetensors": b"old",
    "model-00002-of-00002.safetensors": b"old",
    "model.safetensors.index.json": b"old",
    "tokenizer.json": b"old",
    "2_Dense/model.safetensors": b"old",
    "2_Dense/config.json": b"old",
}
NEW = {
    "config.json": b"new",
    "model.safetensors": b"new",
    "tokenizer.json": b"new",
    "modeling.py": b"new",
    "1_Pooling/config.json": b"new",
    "2_Dense/model.safetensors": b"new",
    "2_Dense/config.json": b"new",
}
MINE = {"ema_model.safetensors": b"mine", "3_Mine/model.safetensors": b"mine", "notes.txt": b"mine"}
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def save_and_die(folder, at):
    """Save in a process of its own, which is killed at the change of the disk of this number. Whether it was."""
    if not (child := os.fork()):
        changes = 0

        def count(event, arguments):
            nonlocal changes
            written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if event in CHANGES or written:
                changes += 1
                if changes == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        with replacing(folder) as unfinished:
            write(unfinished, NEW)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def weights(files, folder=""):
    return {name: content for name, content in files.items() if Path(name).parent == Path(folder) and "model" in name}


def test_a_process_killed_at_any_step_leaves_one_of_both_models(tmp_path):
    folder, at, seen = tmp_path / "small", 0, set()
    killed = True
    while killed:
        at += 1
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, OLD | MINE)
        killed = save_and_die(folder, at)
        found = files_of(folder)
        shown = {name: content for name, content in found.items() if not name.startswith(".")}
        assert MINE.items() <= shown.items()
        for place in ("", "2_Dense"):
            # Weights of one model only, and with its own config: otherwise there are none that could be loaded.
            there = set(weights({k: v for k, v in shown.items() if k not in MINE and ".py" not in k}, place).values())
            assert len(there) <= 1
            if there == {b"new"}:
                assert shown[str(Path(place, "config.json"))] == b"new"
        whole = shown == OLD | MINE or shown == NEW | MINE
        seen.add("old" if shown == OLD | MINE else "new" if shown == NEW | MINE else "between")
        finish(folder)  # what the next save or run does
        after = {name: content for name, content in files_of(folder).items() if not name.startswith(".")}
        assert after == NEW | MINE or (whole and after == shown)
        with replacing(folder) as unfinished:
            write(unfinished, NEW)
        assert files_of(folder) == NEW | MINE
    assert at > 25 and seen == {"old", "between", "new"}


def test_an_error_on_the_way_changes_nothing(tmp_path):
    folder = tmp_path / "small"
    write(folder, OLD | MINE)
    with pytest.raises(KeyboardInterrupt), replacing(folder) as unfinished:
        write(unfinished, NEW)
        raise KeyboardInterrupt
    assert files_of(folder) == OLD | MINE


class Push:
    """One that takes as long as it is told to."""

    done = False

    def is_done(self):
        return self.done

    def wait_until_done(self):
        self.done = True


@pytest.fixture
def pushes(monkeypatch):
    """The pushes of a run, which has no Hub: what a checkpoint of each step is."""
    found = []

    def start(args, repo_id, step, checkpoint, beside):
        found.append(Push())
        found[-1].checkpoint = Path(checkpoint)
        return found[-1]

    monkeypatch.setattr("hf_oto.training.trainer.start_push", start)
    known = {"hub_model_id": "me/small", "push_in_progress": None}
    monkeypatch.setattr(OTOTrainer, "init_hf_repo", lambda trainer, *_: vars(trainer).update(known))
    return found


PUSHING = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "save_strategy": "steps", "save_steps": 4}


def test_a_checkpoint_stays_while_it_is_pushed(tmp_path, pushes):
    """The push of the first one lasts until step 12: `save_total_limit` would take its files away meanwhile."""

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            there[state.global_step] = {int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*")}
            pushes[0].done |= state.global_step == 12

    there = {}
    make(tmp_path, extra={"callbacks": [Look()]}, save_total_limit=1, **PUSHING).train()
    assert {step: there[step] for step in (4, 8, 12, 16)} == {4: {4}, 8: {4, 8}, 12: {4, 12}, 16: {16}}


class Rising(OTOTrainer):
    """Its best model is the first one of its size."""

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = float(self.state.global_step)
        return output


BEST = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "save_total_limit": 1}


def test_the_last_checkpoint_stays_while_it_is_pushed(tmp_path, pushes, monkeypatch):
    """At the end of a run the best one alone is kept."""
    found, wait = [], Push.wait_until_done

    def waited(self):
        found.append((self.checkpoint.name, self.checkpoint.is_dir()))
        wait(self)

    class End(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            for push in pushes[: None if state.global_step < 24 else -1]:
                push.done = True

    monkeypatch.setattr(Push, "wait_until_done", waited)
    make(tmp_path, kind=Rising, extra={"callbacks": [End()]}, hub_always_push=True, **PUSHING, **BEST).train()
    assert found == [("checkpoint-24", True)]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-16"]


def test_a_run_ends_though_its_best_checkpoint_is_gone(tmp_path, caplog):
    class Lost(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 24:
                shutil.rmtree(state.best_model_checkpoint)

    trainer = make(tmp_path, kind=Rising, extra={"callbacks": [Lost()]}, save_strategy="steps", save_steps=4, **BEST)
    trainer.train()
    assert "checkpoint-16 is gone: the run ends with the last weights" in caplog.text
    assert counts(AutoModelForQuestionAnswering.from_pretrained(tmp_path)) != counts(trainer.model)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-24"]
