"""OTOTrainer: what it trains, logs, saves and resumes, and what it refuses before it touches anything."""

import json
import logging

import pytest
import torch
import transformers
from families import (
    ONE_EACH,
    counts,
    largest_difference,
    outputs,
    tiny_model,
    zero_uneven,
)
from short_runs import CONFIG, DATA, STEPS, StopAt, arguments, make, same_weights
from transformers import AutoModelForQuestionAnswering, Trainer, TrainerCallback

from hf_oto import OTOConfig, OTOTrainer, compress, partition
from hf_oto.hspg.optimizer import HSPG
from hf_oto.models.groups import zero_groups


class Dropping(TrainerCallback):
    """Whether the model dropped out at every step: in its embeddings, and in a block's attention."""

    def __init__(self, model):
        self.seen, self.now = [], []
        for path in ("embeddings.dropout", "encoder.layer.1.attention.self"):
            model.bert.get_submodule(path).register_forward_hook(lambda module, *_: self.now.append(module.training))

    def on_step_begin(self, args, state, control, **kwargs):
        self.now.clear()

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(set(self.now))


def zeros(model):
    parameters = dict(model.named_parameters())
    return sum(int(zero_groups(array, parameters).sum()) for array in partition(model).arrays)


@pytest.mark.parametrize("name", ONE_EACH)
def test_train_once_get_a_small_model(name, tmp_path):
    trainer = make(tmp_path, name)
    before = sum(parameter.numel() for parameter in trainer.model.parameters())
    trainer.train()
    assert counts(trainer.model) == [(4, 24)] * 3  # it goes on full-size: it can be resumed and evaluated
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "small"))
    small = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "small")
    assert type(small).__name__ == f"OTO{name}"
    assert largest_difference(outputs(small), outputs(trainer.model.eval())) <= 1e-5
    metrics = trainer.hspg.metrics()
    assert sum(heads for heads, _ in counts(small)) == metrics["heads"] < 12
    assert sum(neurons for _, neurons in counts(small)) == metrics["neurons"] < 72
    removed = before - sum(parameter.numel() for parameter in small.parameters())
    assert 0.5 * 3 * 5752 - 1048 < removed <= 0.5 * 3 * 5752
    assert OTOConfig.from_pretrained(tmp_path / "small") == CONFIG
    assert make(tmp_path, model=small, kind=Trainer).evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


class Rates(TrainerCallback):
    """The learning rate of every step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_a_stable_learning_rate_decays_in_recovery(tmp_path):
    """It stays at its peak until the target is reached. What `lr_scheduler_kwargs` says comes first."""
    rates, given, other = Rates(), Rates(), Rates()
    stable = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2}
    make(tmp_path, extra={"callbacks": [rates]}, **stable).train()
    assert rates.seen == pytest.approx([0, 1.5e-3] + [3e-3] * 13 + [3e-3 * left / 10 for left in range(9, 0, -1)])
    make(tmp_path, extra={"callbacks": [given]}, lr_scheduler_kwargs={"num_decay_steps": 4}, **stable).train()
    assert given.seen[:20] == pytest.approx([0, 1.5e-3] + [3e-3] * 18) and given.seen[-1] < 1e-3
    make(tmp_path, extra={"callbacks": [other]}, lr_scheduler_kwargs={"decay_type": "cosine"}, **stable).train()
    assert other.seen[:15] == pytest.approx(rates.seen[:15]) and other.seen[16] > rates.seen[16] * 1.1


def test_a_stable_learning_rate_needs_room(tmp_path):
    trainer = make(tmp_path / "run", lr_scheduler_type="warmup_stable_decay", warmup_steps=15)
    with pytest.raises(
        ValueError, match="`warmup_steps` must end before the target is reached .* got 15 and 14 of 24"
    ):
        trainer.train()


def test_a_checkpoint_is_full_size_and_the_end_is_small(tmp_path):
    trainer = make(tmp_path / "run", save_strategy="steps", save_steps=8)
    trainer.train()
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-16"} | {
        "checkpoint-24"
    }
    for path in (tmp_path / "run").glob("checkpoint-*"):
        full = AutoModelForQuestionAnswering.from_pretrained(path)
        assert type(full).__name__ == "BertForQuestionAnswering" and counts(full) == [(4, 24)] * 3
        assert OTOConfig.from_pretrained(path) == CONFIG
        assert not list(path.glob("*.py"))
    full = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run" / "checkpoint-24")
    small = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run")
    assert type(small).__name__ == "OTOBertForQuestionAnswering"
    assert largest_difference(outputs(small), outputs(full)) <= 1e-5
    assert not [path for path in tmp_path.iterdir() if path.name != "run"]  # nothing half-written is left


def test_nothing_is_written_at_the_end_where_nothing_is_to_be_saved(tmp_path):
    make(tmp_path / "run").train()
    assert list((tmp_path / "run").iterdir()) == []


class SaveAt(TrainerCallback):
    def __init__(self, *steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


ADAFACTOR = {"optim": "adafactor", "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("options", [{}, ADAFACTOR])
def test_resuming_is_exact_in_every_stage(options, tmp_path):
    stops = (2, 5, 9, 14, 20)
    whole = make(tmp_path / "whole", extra={"callbacks": [SaveAt(*stops)]}, **options)
    whole.train()
    for stop in stops:
        folder = tmp_path / "whole"
        if stop == 9:  # one that stops where it is saved
            folder = tmp_path / "stopped"
            make(folder, extra={"callbacks": [StopAt(stop)]}, **options).train()
        resumed = make(tmp_path / "resumed", **options)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
        assert resumed.state.global_step == STEPS
        assert same_weights(resumed.model, whole.model), stop
        for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            mine, others = resumed.hspg.state[a], whole.hspg.state[b]
            assert all(torch.equal(mine[key], others[key]) for key in mine if isinstance(mine[key], torch.Tensor))
        assert resumed.state.log_history[-2]["heads"] == whole.state.log_history[-2]["heads"]


def test_resuming_with_other_settings_is_refused_before_the_first_step(tmp_path):
    make(tmp_path, extra={"callbacks": [StopAt(6)]}).train()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = make(tmp_path, config=OTOConfig(target_sparsity=0.3, min_neurons=4, round_to=4))
    with pytest.raises(ValueError, match=r"other settings \(target_sparsity: 0.5 saved, 0.3 now\)"):
        other.train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_checkpoint_of_a_plain_run_is_refused(tmp_path):
    make(tmp_path, kind=Trainer, extra={"callbacks": [StopAt(6)]}).train()
    with pytest.raises(ValueError, match="holds no HSPG state"):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_progress_is_logged_through_trainer(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [4, 8, 12, 16, 20, 24]
    assert [entry["stage"] for entry in logs] == ["pruning"] * 3 + ["recovery"] * 3  # of the step to come
    removed = [entry["removed_params"] for entry in logs]
    assert removed[0] == 0 and removed == sorted(removed) and 0.44 < removed[-1] <= 0.5
    assert set(logs[-1]) >= {"group_sparsity", "removed_params", "removed_macs", "heads", "neurons", "learning_rate"}
    assert 0 < logs[-1]["removed_macs"] < 1 and zeros(trainer.model) == 84 - logs[-1]["heads"] - logs[-1]["neurons"]
    json.dumps(logs)  # as trainer_state.json needs it


def test_with_target_zero_it_is_trainer(tmp_path):
    """The same optimizer, schedule, clipping and data order, to the bit."""
    plain = make(tmp_path, kind=Trainer)
    plain.train()
    trainer = make(tmp_path, config=OTOConfig(target_sparsity=0.0))
    trainer.train()
    assert same_weights(trainer.model, plain.model)
    pruned = make(tmp_path)
    pruned.train()
    assert not same_weights(pruned.model, plain.model)


@pytest.mark.parametrize(
    ("config", "options", "until"),
    [
        (OTOConfig(keep_dropout=False), {}, 4),
        (OTOConfig(keep_dropout=False), {"gradient_checkpointing": True}, 4),  # whose backward passes go through again
        (OTOConfig(), {}, STEPS),
        (OTOConfig(target_sparsity=0.0, keep_dropout=False), {}, STEPS),
        (OTOConfig(target_sparsity=None, keep_dropout=False), {}, STEPS),
    ],
)
def test_nothing_need_be_dropped_out_once_groups_are_redundant(config, options, until, tmp_path):
    trainer = make(tmp_path, config=config, **options)
    trainer.add_callback(dropping := Dropping(trainer.model))
    trainer.train()
    assert dropping.seen == [{True}] * until + [{False}] * (STEPS - until)
    assert all(module.training for module in trainer.model.modules())
    trainer.evaluate()
    assert dropping.now[-1] is False


def test_weight_decay_leaves_out_what_trainer_leaves_out(tmp_path):
    trainer = make(tmp_path)
    trainer.create_optimizer_and_scheduler(STEPS)
    first, second = trainer.hspg.param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.01, 0.0)
    assert all("bias" not in name and "LayerNorm" not in name for name in first["param_names"])
    assert "bert.encoder.layer.0.output.dense.bias" in second["param_names"]
    made = trainer.hspg
    assert trainer.create_optimizer() is made is trainer.hspg  # not wrapped twice


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_optimizers_of_the_arguments(optim, tmp_path):
    trainer = make(tmp_path, optim=optim, learning_rate=1e-3)
    trainer.train()
    assert trainer.hspg.target_reached and trainer.hspg.metrics()["removed_params"] > 0.44
    assert zeros(trainer.model) == 84 - trainer.hspg.metrics()["heads"] - trainer.hspg.metrics()["neurons"]


def test_the_users_own_optimizer_and_scheduler(tmp_path):
    model = tiny_model(ONE_EACH[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = make(tmp_path, model=model, extra={"optimizers": (optimizer, scheduler)})
    trainer.train()
    assert trainer.hspg.base_optimizer is optimizer and trainer.hspg.target_reached
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**STEPS)


class Doubling(Trainer):
    """Somebody's own Trainer."""

    def __init__(self, *args, factor=2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor, self.calls = factor, 0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.calls += 1
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        return (loss[0] * self.factor, loss[1]) if return_outputs else loss * self.factor

    def log(self, logs, start_time=None):
        super().log({**logs, "calls": self.calls}, start_time)


class Both(Doubling, OTOTrainer): ...


class BothAround(OTOTrainer, Doubling): ...


@pytest.mark.parametrize("kind", [Both, BothAround])
def test_it_mixes_with_another_subclass(kind, tmp_path):
    trainer = make(tmp_path, kind=kind, extra={"factor": 3.0})
    trainer.train()
    assert trainer.factor == 3.0 and trainer.calls == STEPS
    log = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert log["calls"] == STEPS and log["removed_params"] > 0.44
    trainer.save_model(str(tmp_path / "small"))
    assert counts(AutoModelForQuestionAnswering.from_pretrained(tmp_path / "small")) != [(4, 24)] * 3


def test_model_init(tmp_path):
    trainer = OTOTrainer(
        args=arguments(tmp_path),
        model_init=lambda: tiny_model(ONE_EACH[0]),
        train_dataset=DATA,
        oto_config=CONFIG,
    )
    trainer.train()
    assert trainer.hspg.target_reached
    bad = OTOTrainer(args=arguments(tmp_path), model_init=frozen_model, train_dataset=DATA, oto_config=CONFIG)
    with pytest.raises(ValueError, match="frozen parameters"):
        bad.train()


def test_the_best_model_is_one_at_the_target(tmp_path):
    """The loss grows with every evaluation, so plain Trainer would choose the first."""

    class Worse(OTOTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_loss"] = float(self.state.global_step)
            return metrics

    trainer = make(
        tmp_path,
        kind=Worse,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    trainer.train()
    assert trainer.hspg.schedule.boundaries[-1] == 14
    assert trainer.state.best_metric == 16 and trainer.state.best_model_checkpoint.endswith("checkpoint-16")
    best = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "checkpoint-16")
    assert same_weights(best, trainer.model)
    small = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert largest_difference(outputs(small), outputs(best)) <= 1e-5


def test_as_published_without_a_target(tmp_path):
    config = OTOConfig(target_sparsity=None, lmbda=1.0, epsilon=0.9, pruning_start_ratio=0.2)
    trainer = make(tmp_path, config=config, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant")
    trainer.train()
    assert trainer.hspg.stage == "half-space"
    gone = zeros(trainer.model)
    assert gone > 3
    trainer.save_model(str(tmp_path / "small"))
    small = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "small")
    assert sum(heads + neurons for heads, neurons in counts(small)) == 84 - gone


def test_a_pruned_model_is_pruned_again(tmp_path):
    trainer = make(tmp_path / "once")
    trainer.train()
    trainer.save_model(str(tmp_path / "once"))
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "once")
    finished = make(tmp_path / "none", model=again, config=OTOConfig(target_sparsity=0.4))
    assert finished.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="`target_sparsity`=0.4 of the dense model's params is removed already"):
        finished.train()
    assert list((tmp_path / "none").iterdir()) == []
    trainer = make(tmp_path / "twice", model=again, config=OTOConfig(target_sparsity=0.7, min_neurons=0, round_to=4))
    trainer.train()
    trainer.save_model()
    small = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "twice")
    assert type(small) is type(again)
    removed = trainer.hspg.metrics()["removed_params"]
    assert 0.63 < removed <= 0.7
    kept = sum(heads * 1048 + neurons * 65 for heads, neurons in counts(small))
    assert removed == pytest.approx(1 - kept / (3 * 5752))


def test_a_run_stopped_early_says_that_the_target_is_not_reached(tmp_path, caplog):
    trainer = make(tmp_path, extra={"callbacks": [StopAt(8)]})
    trainer.train()
    logger = logging.getLogger("hf_oto.training.trainer")
    logger.addHandler(caplog.handler)
    try:
        trainer.save_model(str(tmp_path / "early"))
    finally:
        logger.removeHandler(caplog.handler)
    assert "The target is not reached at step 8 (stage 'pruning')" in caplog.text
    assert (
        largest_difference(
            outputs(AutoModelForQuestionAnswering.from_pretrained(tmp_path / "early")), outputs(trainer.model.eval())
        )
        <= 1e-5
    )


def test_gradients_are_observed_before_they_are_clipped(tmp_path):
    """With a learning rate of 0 the weights stay, and a clip to almost nothing is all that differs."""
    found = []
    for norm in (1e-9, 1e9):
        trainer = make(tmp_path, max_grad_norm=norm, optim="sgd", learning_rate=0.0, extra={"callbacks": [StopAt(4)]})
        trainer.train()
        found.append(trainer.hspg.param_groups[0]["hspg_saliency"])
    assert torch.equal(*found) and bool((found[0] > 0).any())


@pytest.mark.parametrize("steps", [1, 3])
def test_accumulated_micro_steps_are_observed_one_by_one(steps, tmp_path, monkeypatch):
    calls, observe = [], HSPG.observe

    def recorded(self, **options):
        if options:
            calls.append(options["accumulated"])
        observe(self, **options)

    monkeypatch.setattr(HSPG, "observe", recorded)
    make(tmp_path, gradient_accumulation_steps=steps).train()
    assert calls[:6] == ([False] * 6 if steps == 1 else [False, True, True, False, True, True])


def test_a_step_that_broke_off_is_not_added_to_the_next(tmp_path, monkeypatch):
    calls, observe = [], HSPG.observe

    def recorded(self, **options):
        if options:
            calls.append(options["accumulated"])
        observe(self, **options)

    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(HSPG, "observe", recorded)
    trainer = make(tmp_path, gradient_accumulation_steps=2)
    trainer.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.train()
    assert calls[:5] == [False, False, True, False, True]


@pytest.mark.parametrize("precision", ["bf16", "gradient_checkpointing", "torch_compile"])
def test_ways_to_train(precision, tmp_path):
    options = {precision: True} | ({"torch_compile_backend": "eager"} if precision == "torch_compile" else {})
    trainer = make(tmp_path, **options)
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    assert trainer.hspg.target_reached
    small = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "small")
    assert 0.44 < 1 - sum(h * 1048 + n * 65 for h, n in counts(small)) / (3 * 5752) <= 0.5


# Saving loses nothing.


def test_a_wrong_cut_is_not_saved(tmp_path, monkeypatch):
    trainer = make(tmp_path / "run", save_strategy="steps", save_steps=8)
    trainer.train()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("hf_oto.models.surgery.zero_groups", lambda array, parameters: torch.arange(array.count) == 1)
    for folder in (None, str(tmp_path / "new")):
        with pytest.raises(ValueError, match="does not compute what `model` computes"):
            trainer.save_model(folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert not (tmp_path / "new").exists()


def test_a_save_that_breaks_off_leaves_the_old_one(tmp_path, monkeypatch):
    trainer = make(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("No space left")))
    for folder in ("small", "other"):
        with pytest.raises(OSError, match="No space left"):
            trainer.save_model(str(tmp_path / folder))
    assert {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "small"]
    assert type(trainer.model).__name__ == "BertForQuestionAnswering"  # and goes on as it was


def test_a_checkpoint_is_not_overwritten(tmp_path):
    trainer = make(tmp_path, save_strategy="steps", save_steps=8)
    trainer.train()
    weights = (tmp_path / "checkpoint-16" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint-16 holds a checkpoint to resume from \(optimizer.pt, scheduler"):
        trainer.save_model(str(tmp_path / "checkpoint-16"))
    assert (tmp_path / "checkpoint-16" / "model.safetensors").read_bytes() == weights


def test_other_files_of_the_folder_stay_and_old_weights_go(tmp_path):
    trainer = make(tmp_path / "run")
    trainer.train()
    folder = tmp_path / "small"
    tiny_model(ONE_EACH[0]).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    (folder / "notes.txt").write_text("mine")
    trainer.save_model(str(folder))
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.glob("*safetensors*")] == ["model.safetensors"]
    assert counts(AutoModelForQuestionAnswering.from_pretrained(folder)) != [(4, 24)] * 3


# Bad input: refused, and nothing is touched.


def frozen_model():
    model = tiny_model(ONE_EACH[0])
    model.bert.encoder.layer[1].requires_grad_(False)
    return model


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9))


def sigmoid_model():
    return tiny_model(ONE_EACH[0], hidden_act="sigmoid")


class Custom(transformers.BertForQuestionAnswering): ...


def pruned_model():
    model = tiny_model(ONE_EACH[0])
    zero_uneven(model)
    return compress(model)


def empty_model():
    model = tiny_model(ONE_EACH[0])
    model.bert.encoder.layer[1].to("meta")  # as if it was offloaded
    return model


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (gpt2, CONFIG, "'gpt2', which is refused: .*Supported families: bert, roberta"),
        (sigmoid_model, CONFIG, r"act\(0\) = 0.5"),
        (
            frozen_model,
            CONFIG,
            "10 frozen parameters in zero-invariant groups .'bert.encoder.layer.1.attention.self.q",
        ),
        (None, OTOConfig(target_sparsity=0.9), "cannot be reached: .* can go. Lower the target or the floors"),
        (lambda: Custom(tiny_model(ONE_EACH[0]).config), CONFIG, "no class of Transformers' own with a pruned"),
        (
            empty_model,
            CONFIG,
            "`model` must hold its weights, 'bert.encoder.*' is on the meta device: it is not loaded",
        ),
    ],
)
def test_a_model_that_cannot_be_pruned_is_refused_and_nothing_is_made(model, config, message, tmp_path):
    model = tiny_model(ONE_EACH[0]) if model is None else model()
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "run", model=model, config=config)
    assert list(tmp_path.iterdir()) == []


def test_frozen_embeddings_are_fine(tmp_path):
    model = tiny_model(ONE_EACH[0])
    model.bert.embeddings.requires_grad_(False)
    make(tmp_path, model=model).train()


def test_a_config_of_another_kind_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`oto_config` must be an OTOConfig, got dict"):
        make(tmp_path / "run", config={"target_sparsity": 0.5})
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_step_to_prune_in_is_refused_before_its_first(tmp_path):
    config = OTOConfig(pruning_start_ratio=0.5, pruning_end_ratio=0.6)
    trainer = make(tmp_path / "run", config=config, max_steps=3)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(ValueError, match="Pruning needs at least 1 step, but a run of 3 steps has none between"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(("steps", "periods"), [(1, 1), (2, 1), (5, 2), (12, 5)])
def test_a_smoke_run_uses_fewer_periods_and_saves_a_small_model(steps, periods, tmp_path, caplog):
    trainer = make(tmp_path / "run", max_steps=steps, save_strategy="steps", save_steps=100)
    trainer.train()
    assert trainer.hspg.target_reached and trainer.hspg.schedule.periods == periods
    assert f"A run of {steps} steps has {periods} of pruning: as many periods are used" in caplog.text
    small = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run")
    assert 0.44 < 1 - sum(h * 1048 + n * 65 for h, n in counts(small)) / (3 * 5752) <= 0.5


@pytest.mark.parametrize(
    "optim",
    ["lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"]
    + ["apollo_adamw_layerwise", "apollo_adamw", "galore_adamw", "schedule_free_adamw"],
)
def test_optimizers_that_step_elsewhere_are_refused_by_name(optim, tmp_path):
    with pytest.raises(ValueError, match=f"`optim`='{optim}' is not supported by OTOTrainer: it steps during"):
        make(tmp_path / "run", optim=optim)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_no_number_stops_and_leaves_the_checkpoints(tmp_path):
    class Breaking(OTOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 10 else loss

    trainer = make(tmp_path, kind=Breaking, save_strategy="steps", save_steps=8)
    with pytest.raises(FloatingPointError, match="The loss is nan at step 10. .* checkpoints in .* are as they were"):
        trainer.train()
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]
    resumed = make(tmp_path, save_strategy="steps", save_steps=8)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS and resumed.hspg.target_reached


@pytest.mark.parametrize("way", ["arguments", "model"])
def test_a_compiled_model_shrinks_once(way, tmp_path, caplog, monkeypatch):
    logger = logging.getLogger("hf_oto.training.pruning")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    sizes = []
    for compiled in (False, True):
        caplog.clear()
        trainer = make(tmp_path, config=OTOConfig(min_neurons=4, round_to=4, shrink_during_training=True))
        if way == "arguments":
            trainer.args.torch_compile = compiled  # and nothing is: it takes half a minute
        elif compiled:
            trainer.model.compile(backend="eager", disable=True)
        steps, shrinks = [], trainer._shrink
        monkeypatch.setattr(
            trainer, "_shrink", lambda steps=steps, own=trainer, go=shrinks: steps.append(own.hspg.steps_done) or go()
        )
        trainer.train()
        assert ("it shrinks once, when the target is reached" in caplog.text) == compiled
        sizes.append(steps)
    logger.removeHandler(caplog.handler)
    assert len(sizes[0]) > 1 and sizes[1] == [14]
