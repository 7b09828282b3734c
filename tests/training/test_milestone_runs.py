"""One run that keeps a finished model of every size on its way: what it writes, when, and what it goes on from."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import ONE_EACH, counts, largest_difference, outputs, tiny_model
from runs import differences, held
from runs import make as make_run
from short_runs import DATA, SIZES, STEPS, StopAt, arguments, make
from transformers import AutoModelForQuestionAnswering, BertConfig, TrainerCallback

from hf_oto import OTOTrainer
from hf_oto.report.milestones import Size, counted, folder_name, plotted_score, sizes_table
from hf_oto.training.learning_rate import scheduler_of
from hf_oto.training.milestones import best_step

# Of the 24 steps, legs end after 12, 18 and 24: the first prunes in the steps 2 … 7, each later one in its first 3.


def read(folder):
    return AutoModelForQuestionAnswering.from_pretrained(folder)


def numbers(folder):
    return json.loads((folder / "milestone.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that shrinks and keeps one checkpoint, and what it held when its milestones ended."""
    folder, seen = tmp_path_factory.mktemp("milestones"), {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            share = trainer.hspg.milestone_due
            if share is not None:
                seen[share] = outputs(trainer.model.eval())

    trainer = make(
        folder / "run",
        config=replace(SIZES, shrink_during_training=True),
        extra={"callbacks": [Look()]},
        save_strategy="steps",
        save_steps=4,
        save_total_limit=1,
        logging_steps=1,
    )
    trainer.train()
    trainer.save_model(str(folder / "small"))
    return folder, trainer, seen


def test_every_size_loads_and_computes_what_was_trained(trained):
    folder, trainer, seen = trained
    assert list(seen) == [0.3, 0.5, 0.7]
    kept = []
    for share, name in ((0.3, "0.30"), (0.5, "0.50"), (0.7, "")):
        for place in ("run", "small"):
            assert largest_difference(outputs(read(folder / place / name)), seen[share]) <= 1e-5
        kept.append(sum(sum(block) for block in counts(read(folder / "small" / name))))
        assert numbers(folder / "small" / name)["share"] == share
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 3
    assert {path.name for path in (folder / "run").glob("checkpoint-*")} == {"checkpoint-24"}


def test_the_log_says_what_each_evaluation_is_of(trained):
    _, trainer, _ = trained
    log = trainer.state.log_history
    assert [(e["step"], e["eval_milestone"]) for e in log if "eval_loss" in e] == [(12, 0.3), (18, 0.5), (24, 0.7)]
    aims = {e["step"]: e["milestone"] for e in log if "milestone" in e}
    assert [step for step in aims if aims.get(step - 1, 0.3) != aims[step]] == [12, 18]  # as the next stage is


def test_the_rate_falls_to_every_size_and_rises_again(trained, tmp_path):
    """As Trainer's own schedule of a run of 12 steps, and of 6 twice."""
    _, trainer, _ = trained
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates == pytest.approx([3e-3 * left / leg for leg in (12, 6, 6) for left in range(leg, 0, -1)])
    options = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 1 / 6, "learning_rate": 1.0}
    model = torch.nn.Linear(1, 1)
    stable = scheduler_of(arguments(tmp_path, **options), SIZES, torch.optim.SGD(model.parameters(), lr=1.0), STEPS)
    factors = [stable.lr_lambdas[0](step) for step in range(STEPS)]
    later = [0, 1, 1, 1, 2 / 3, 1 / 3]
    assert factors == pytest.approx([0, 0.5, *[1.0] * 6, 0.8, 0.6, 0.4, 0.2, *later, *later][:STEPS])


def test_the_card_has_a_table_and_a_picture_of_all_sizes(trained):
    folder, trainer, _ = trained
    trainer.create_model_card()
    text = (folder / "run" / "README.md").read_text()
    section = text[text.index("## Every size of this run") : text.index("## How to load it")]
    for share, name in ((0.3, "0.30"), (0.5, "0.50"), (0.7, "")):
        found = numbers(folder / "run" / name)
        line = next(line for line in section.splitlines() if line.startswith(f"| {folder_name(share)}"))
        assert f"{found['weights']:.1%}" in line and f"{found['scores']['eval_loss']:.4g}" in line
    assert "(milestones.png)" in section and (folder / "run" / "milestones.png").stat().st_size > 1000


def test_resuming_is_exact_from_every_stage(tmp_path, caplog, without_pictures):
    """Elsewhere: milestones that were passed before are taken from beside the checkpoint."""
    options = {"dropout": True, "config": replace(SIZES, shrink_during_training=True), "max_steps": STEPS}
    whole = make_run(tmp_path / "whole", save_steps=1, **options)
    whole.train()
    for stop in (4, 9, 12, 14, 20):
        resumed = make_run(tmp_path / f"from-{stop}", save_strategy="no", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert differences(held(resumed), held(whole)) == [], stop
        for name in ("0.30", "0.50"):
            for file in ("model.safetensors", "config.json", "milestone.json"):
                mine, theirs = (tmp_path / place / name / file for place in (f"from-{stop}", "whole"))
                assert mine.read_bytes() == theirs.read_bytes(), (stop, name, file)
    shutil.rmtree(tmp_path / "whole" / "0.30")
    late = make_run(tmp_path / "late", save_strategy="no", **options)
    late.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    assert "The model of milestone 0.3 is neither in" in caplog.text
    assert not (tmp_path / "late" / "0.30").exists() and (tmp_path / "late" / "0.50").is_dir()


class Scripted(OTOTrainer):
    """The evaluation after each step is as good as the script says: best while the model is still large."""

    losses = dict.fromkeys(range(STEPS + 1), 9.0) | {3: 0.0, 9: 1.0, 12: 2.0, 14: 0.0, 18: 4.0, 22: 7.0, 24: 8.0}
    seen: dict = {}

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = self.losses[self.state.global_step]
        self.seen[self.state.global_step] = outputs(self.model.eval())
        return output


def test_each_size_is_the_best_of_its_recovery_and_training_goes_on_from_the_last(tmp_path, without_pictures):
    options = {"kind": Scripted, "config": SIZES, "eval_strategy": "steps", "eval_steps": 1}
    plain = make(tmp_path / "plain", save_strategy="steps", save_steps=STEPS, **options)
    plain.train()
    trainer = make(
        tmp_path / "run",
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        **options,
    )
    trainer.train()
    for name, step in {"0.30": 9, "0.50": 18, "": 22}.items():
        assert numbers(tmp_path / "run" / name)["step"] == step
        assert largest_difference(outputs(read(tmp_path / "run" / name)), Scripted.seen[step]) <= 1e-5, name
    last = read(tmp_path / "run" / "checkpoint-24"), read(tmp_path / "plain" / "checkpoint-24")
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in last), strict=True))
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-22", "checkpoint-24"}


def test_the_numbers_are_those_of_the_weights_that_are_kept(tmp_path, caplog, without_pictures):
    """The best ones, of step 9 and of 22, are in no checkpoint; and what is evaluated later is of other data."""
    trainer = make(
        tmp_path / "run",
        kind=Scripted,
        config=SIZES,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
    )
    trainer.train()
    trainer.losses = dict.fromkeys(range(STEPS + 1), 0.5)
    trainer.evaluate(DATA[8:])
    trainer.save_model(str(tmp_path / "small"))
    assert "The best model of 0.30 was that of step 9, whose checkpoint is not in" in caplog.text
    for name, step in {"0.30": 12, "0.50": 18, "": 24}.items():
        found = numbers(tmp_path / "small" / name)
        assert (found["step"], found["scores"]["eval_loss"]) == (step, Scripted.losses[step])
        assert largest_difference(outputs(read(tmp_path / "small" / name)), Scripted.seen[step]) <= 1e-5, name


def test_without_the_best_checkpoint_the_numbers_are_those_of_the_last_weights(tmp_path, without_pictures):
    class Lost(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == STEPS:
                shutil.rmtree(state.best_model_checkpoint)

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    options |= {"load_best_model_at_end": True, "extra": {"callbacks": [Lost()]}}
    trainer = make(tmp_path, kind=Scripted, config=SIZES, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-22")
    found = numbers(tmp_path)
    assert (found["step"], found["scores"]["eval_loss"]) == (STEPS, Scripted.losses[STEPS])
    assert largest_difference(outputs(read(tmp_path)), Scripted.seen[STEPS]) <= 1e-5


@pytest.mark.parametrize("milestones", [(0.3, 0.5), ()], ids=str)
def test_a_metric_that_there_is_not_is_refused_at_the_first_evaluation(milestones, tmp_path, without_pictures):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "f1"}
    trainer = make(tmp_path, config=replace(SIZES, milestones=milestones), **options)
    with pytest.raises(KeyError, match="`metric_for_best_model`='eval_f1' is not among what the evaluation gives"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_metric_for_the_picture_alone_stops_nothing(tmp_path, without_pictures):
    trainer = make(tmp_path, config=SIZES, metric_for_best_model="f1")
    trainer.train()
    assert trainer.hspg.target_reached


def test_an_epochs_evaluation_is_the_last_one(tmp_path, without_pictures):
    trainer = make(tmp_path, config=SIZES, max_steps=-1, num_train_epochs=2, eval_strategy="epoch")
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "eval_loss" in e] == [10, 10, 15, 20]  # of legs, epochs


def put_file(place):
    place.write_text("notes")


def put_link(place):
    place.symlink_to("nowhere")


def put_checkpoint(place):
    place.mkdir()
    (place / "optimizer.pt").write_text("state")


def put_model(place):
    place.mkdir()
    (place / "model.safetensors").write_text("weights")


@pytest.mark.parametrize("put", [put_file, put_link, put_checkpoint, put_model])
def test_what_is_in_the_way_is_refused_before_anything_is_done(put, tmp_path, without_pictures):
    trainer = make(tmp_path / "run", config=SIZES)
    (tmp_path / "run").mkdir(exist_ok=True)
    put(tmp_path / "run" / "0.50")
    with pytest.raises(ValueError, match=r"0\.50 (is no folder|holds a checkpoint|holds model.safetensors and no)"):
        trainer.train()
    assert trainer.hspg is None and [path.name for path in (tmp_path / "run").iterdir()] == ["0.50"]
    (tmp_path / "run" / "0.50").rename(tmp_path / "moved")
    trainer.train()
    (tmp_path / "small").mkdir()
    (tmp_path / "moved").rename(tmp_path / "small" / "0.50")
    with pytest.raises(ValueError, match="0.50"):
        trainer.save_model(str(tmp_path / "small"))
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["0.50"]


def test_another_runs_model_is_not_taken_for_ones_own(tmp_path, caplog, without_pictures):
    """Of a folder with the milestones of another run in it, into which one is resumed."""
    other = make(tmp_path / "here", config=SIZES, learning_rate=1e-2)
    other.train()
    whole = make(tmp_path / "there", config=SIZES, save_strategy="steps", save_steps=20)
    whole.train()
    mine, theirs = (tmp_path / "there" / "0.30", tmp_path / "here" / "0.30")
    assert (mine / "model.safetensors").read_bytes() != (theirs / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "there" / "0.50")
    resumed = make(tmp_path / "here", config=SIZES)
    resumed.train(resume_from_checkpoint=str(tmp_path / "there" / "checkpoint-20"))
    assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert "The model of milestone 0.5 is neither in" in caplog.text and (tmp_path / "here" / "0.50").is_dir()
    resumed.save_model(str(tmp_path / "small"))
    assert f"The model of milestone 0.5 of this run is not in {tmp_path / 'here'} any more" in caplog.text
    assert [path.name for path in (tmp_path / "small").glob("0.*")] == ["0.30"]
    assert [size.name for size in resumed._sizes()] == ["0.30", "0.70"]


def test_a_second_run_of_a_trainer_keeps_its_own(tmp_path, without_pictures):
    trainer = make(tmp_path, config=SIZES, extra={"callbacks": [StopAt(13)]})
    trainer.model_init = lambda: tiny_model(ONE_EACH[0])
    trainer.train()
    first = (tmp_path / "0.30" / "model.safetensors").read_bytes()
    trainer.args.learning_rate = 1e-2
    trainer.train()
    assert (tmp_path / "0.30" / "model.safetensors").read_bytes() != first


def test_a_call_of_train_that_is_refused_forgets_nothing(tmp_path, without_pictures):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    trainer = make(tmp_path / "run", kind=Scripted, config=SIZES, load_best_model_at_end=True, **options)
    trainer.train()
    log = list(trainer.state.log_history)
    for again in ((), (None,), (False,)):
        with pytest.raises(ValueError, match="A run cannot begin with a model of which 24 of 24 steps"):
            trainer.train(*again)
    assert trainer.state.log_history == log
    trainer.save_model(str(tmp_path / "small"))
    assert [numbers(tmp_path / "small" / name)["step"] for name in ("0.30", "0.50", "")] == [12, 18, 22]


def test_a_model_between_sizes_has_no_numbers_of_an_earlier_one(tmp_path, without_pictures):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "milestone.json").write_text("{}")
    trainer = make(tmp_path / "run", config=SIZES, extra={"callbacks": [StopAt(19)]})
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    assert not (tmp_path / "small" / "milestone.json").exists() and numbers(tmp_path / "small" / "0.50")
    trainer.create_model_card()
    assert "Every size of this run" not in (tmp_path / "run" / "README.md").read_text()  # it is none of them


def test_a_run_that_stops_between_milestones_says_which_sizes_are_finished(tmp_path, caplog, without_pictures):
    trainer = make(tmp_path, config=SIZES, save_strategy="steps", save_steps=50, extra={"callbacks": [StopAt(14)]})
    trainer.train()
    assert "The sizes 0.30 are finished, each in its folder." in caplog.text
    assert not (tmp_path / "config.json").exists() and read(tmp_path / "0.30")


def test_milestones_of_equal_blocks_are_of_the_familys_own_class(tmp_path, without_pictures):
    config = replace(SIZES, uniform=True, structures=("neurons",))
    make(tmp_path, config=config, save_strategy="steps", save_steps=50, max_steps=STEPS).train()
    widths = [BertConfig.from_pretrained(tmp_path / name).intermediate_size for name in ("0.30", "0.50", "")]
    assert widths == [20, 12, 8]  # of 24, in fours
    assert json.loads((tmp_path / "0.30" / "config.json").read_text())["model_type"] == "bert"


def test_a_decay_that_is_longer_than_what_leads_to_a_size_is_refused(tmp_path):
    options = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 7}}
    with pytest.raises(ValueError, match=r"`num_decay_steps`=7 .* into the 6 that lead to 0\.5: with `milestones`"):
        make(tmp_path, config=SIZES, **options).train()


def test_the_rate_may_be_that_of_the_groups_alone(tmp_path):
    class Descent(torch.optim.SGD):
        def __init__(self, groups):
            super().__init__(groups)
            self.defaults = {}

    model, options = torch.nn.Linear(1, 1), {"lr_scheduler_type": "cosine_with_min_lr"}
    options["lr_scheduler_kwargs"] = {"min_lr": 1e-3}
    optimizer = Descent([{"params": list(model.parameters()), "lr": 0.1}])
    made = scheduler_of(arguments(tmp_path, **options), SIZES, optimizer, STEPS)
    lowest = min(made.lr_lambdas[0](step) for step in range(STEPS))
    assert 0.01 < lowest < 0.2 and made.get_last_lr() == [0.1]


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
def test_a_rate_that_never_rises_again_is_refused(scheduler, tmp_path):
    options = {"lr_scheduler_type": scheduler, "metric_for_best_model": "loss", "eval_strategy": "steps"}
    with pytest.raises(ValueError, match=rf"`lr_scheduler_type`='{scheduler}' goes by evaluations and never rises"):
        make(tmp_path, config=SIZES, **options).train()


def test_the_best_step_is_of_its_size_and_the_first_of_equals():
    log = [
        {"step": 1, "eval_loss": 0.1, "eval_milestone": None},
        {"step": 2, "eval_loss": 0.5, "eval_milestone": 0.3},
        {"step": 3, "eval_loss": 0.4, "eval_milestone": 0.3},
        {"step": 4, "eval_loss": 0.4, "eval_milestone": 0.3},
        {"step": 5, "eval_loss": 0.2, "eval_milestone": 0.5},
    ]
    assert best_step(log, 0.3, "eval_loss", greater=False) == 3 and best_step(log, 0.3, "eval_loss", greater=True) == 2
    assert best_step(log, 0.5, "eval_f1", greater=True) is None
    nothing = {"step": 0, "eval_loss": float("nan"), "eval_milestone": 0.3}
    assert best_step([nothing, *log], 0.3, "eval_loss", greater=False) == 3


def test_names_and_columns():
    assert [folder_name(share) for share in (0.3, 0.55, 0.125, 1 / 3)] == ["0.30", "0.55", "0.125", "0.333333"]
    assert folder_name(0.1 + 0.2) == folder_name(float(np.float32(0.3))) == "0.30"
    odd = {"eval_a": 1, "eval_b": [1.0], "eval_c": {"f1": 1.0}, "eval_d": None, "eval_e": "x", "eval_f": True}
    assert counted({**odd, "eval_runtime": 1.0, "epoch": 1.0}) == {"eval_a": 1}
    scores = {"eval_loss": 1.0, "eval_f1": 61.234}
    small = Size(0.5, 7, 0.5, 0.6, 0.75, 10, scores)
    assert plotted_score([small], None) == "eval_f1" and plotted_score([small], "loss") == "eval_loss"
    header, _, line = sizes_table([small]).splitlines()
    assert [part.strip() for part in header.strip("|").split("|")] == [
        *("removed", "weights kept", "MACs kept", "latency", "loss", "f1", "parameters", "step"),
    ]
    assert [part.strip() for part in line.strip("|").split("|")] == [
        *("0.50", "50.0%", "60.0%", "75.0%", "1", "61.23", "10", "7"),
    ]
