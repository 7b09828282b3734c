"""Trackers that keep a model at the end of training keep the small one; all others see the one in training."""

import contextlib
from pathlib import Path

import pytest
import torch
from families import ONE_EACH, counts, tiny_model
from safetensors.torch import load_file
from short_runs import StopAt, make
from torch import nn
from transformers import AutoModelForQuestionAnswering, TrainerCallback
from transformers.integrations import DVCLiveCallback, WandbCallback
from transformers.integrations.integration_utils import WandbLogModel


class Artifact:
    """Of W&B: files that are written one by one."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, name, type, metadata):
        return self

    @contextlib.contextmanager
    def new_file(self, name, mode):
        with open(self.folder / name, mode) as file:
            yield file


class Wandb(WandbCallback):
    """Transformers' own, with a client that writes into a folder."""

    def __init__(self, folder, kept=WandbLogModel.END):
        folder.mkdir()
        self._initialized, self._log_model = True, kept
        self.summary, self.id, self.run, self.Artifact = {}, "1", self, Artifact(folder)
        self._wandb = self

    def log(self, logs):
        pass

    def log_artifact(self, artifact, aliases):
        self.aliases = aliases


class DvcLive(DVCLiveCallback):
    """Transformers' own, with a client that does nothing: the model is in `output_dir` then."""

    def __init__(self, kept=True):
        self._initialized, self._log_model, self.live = True, kept, self

    def on_log(self, *args, **kwargs):
        pass

    def log_artifact(self, folder, **kwargs):
        self.folder = folder

    def end(self):
        pass


class Last(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.model = model


def test_trackers_keep_the_small_model_and_others_are_handed_the_one_in_training(tmp_path):
    wandb, live, last = Wandb(tmp_path / "artifact"), DvcLive(), Last()
    trainer = make(tmp_path / "out", extra={"callbacks": [wandb, live, last]}, save_strategy="steps", save_steps=12)
    trainer.train()
    assert wandb.aliases == ["final_model"] and last.model is trainer.model
    saved = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert counts(saved) != counts(trainer.model)
    for folder in (tmp_path / "artifact", Path(live.folder)):
        kept = AutoModelForQuestionAnswering.from_pretrained(folder, trust_remote_code=True)
        assert counts(kept) == counts(saved)
        assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), saved.parameters(), strict=True))
        assert {"modeling_oto.py", "configuration_oto.py"} < {path.name for path in folder.iterdir()}
    assert "on_train_end" not in {**vars(wandb), **vars(live)}


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = tiny_model(ONE_EACH[0])

    def forward(self, **inputs):
        return self.inner(**inputs)


def test_of_a_model_around_the_pruned_one_trackers_keep_weights_that_it_loads(tmp_path):
    live = DvcLive()
    trainer = make(tmp_path, model=Around(), extra={"callbacks": [live]}, remove_unused_columns=False)
    trainer.train()
    kept = Around()
    kept.load_state_dict(load_file(tmp_path / "last/model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), trainer.model.parameters(), strict=True))


def test_a_run_that_stops_before_its_target_has_no_small_model_to_keep(tmp_path):
    live, last = DvcLive(), Last()
    make(tmp_path, extra={"callbacks": [live, StopAt(9), last]}).train()
    assert counts(AutoModelForQuestionAnswering.from_pretrained(tmp_path / "last")) == counts(last.model)


@pytest.mark.parametrize("kept", [False, "all"])
def test_none_is_made_where_none_is_kept(kept, tmp_path, monkeypatch):
    live, wandb = DvcLive(kept), Wandb(tmp_path / "artifact", WandbLogModel.FALSE)
    trainer = make(tmp_path / "out", extra={"callbacks": [live, wandb]})
    monkeypatch.setattr(type(trainer), "compressed_model", None)
    trainer.train()
    assert not list((tmp_path / "artifact").iterdir())
