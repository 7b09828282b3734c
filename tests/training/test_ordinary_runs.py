"""What people do with a Trainer, each with what has to come of it."""

import copy
import json
from dataclasses import dataclass, replace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from families import ONE_EACH, counts, largest_difference, outputs, tiny_model
from optuna.samplers import GridSampler
from short_runs import CONFIG, DATA, SIZES, STEPS, StopAt, arguments, make, same_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_oto import HSPG, OTOConfig, OTOTrainer, partition
from hf_oto.report.milestones import Size

SAVING = {"save_strategy": "steps", "save_steps": 8}


def share(model):
    """What is removed of the tiny model's prunable weights."""
    return 1 - sum(heads * 1048 + neurons * 65 for heads, neurons in counts(model)) / (3 * 5752)


def small(folder):
    return AutoModelForQuestionAnswering.from_pretrained(folder)


# The optimizer is whose it may be.


class OwnOptimizer(OTOTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        return self.optimizer


class TheirOptimizer(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        return self.optimizer


class OursFirst(OTOTrainer, TheirOptimizer): ...


class TheirsFirst(TheirOptimizer, OTOTrainer): ...


@pytest.mark.parametrize("kind", [OwnOptimizer, OursFirst, TheirsFirst])
def test_an_own_create_optimizer_is_pruned_with(kind, tmp_path):
    trainer = make(tmp_path, kind=kind, **SAVING)
    trainer.train()
    assert type(trainer.hspg.base_optimizer) is torch.optim.SGD and trainer.hspg.target_reached
    assert 0.44 < share(small(tmp_path)) <= 0.5


class Around(nn.Module):
    """A loss with weights of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, outputs, labels=None, **kwargs):
        return (outputs.loss * self.weight).sum()


def test_parameters_that_are_not_the_models_are_trained_and_resumed(tmp_path):
    def begin(folder, **options):
        model, loss = tiny_model(ONE_EACH[0]), Around()
        optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=3e-3)
        extra = {"optimizers": (optimizer, None), "compute_loss_func": loss} | options
        return make(folder, model=model, extra=extra, **SAVING), loss

    whole, loss = begin(tmp_path / "whole")
    whole.train()
    assert whole.hspg.target_reached and (loss.weight.detach() < 0.99).all()
    assert whole.hspg.param_groups[0]["param_names"][-1].startswith("outside.")
    resumed, other = begin(tmp_path / "resumed")
    saved = torch.load(tmp_path / "whole" / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["param_names"] == whole.hspg.param_groups[0]["param_names"]
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert resumed.hspg.steps_done == STEPS and resumed.hspg.target_reached


def ready(model, config, steps=STEPS):
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=3e-3)
    return HSPG(optimizer, partition(model), config, steps)


def test_a_ready_hspg_brings_its_settings(tmp_path):
    model = tiny_model(ONE_EACH[0])
    config = OTOConfig(target_sparsity=0.3, min_neurons=4, round_to=4)
    made = ready(model, config, steps=1000)
    trainer = make(tmp_path, model=model, config=None, extra={"optimizers": (made, None)}, **SAVING)
    trainer.train()
    assert trainer.hspg is made and made.schedule.total_steps == STEPS  # its own number was of another run
    assert trainer.oto_config == config == OTOConfig.from_pretrained(tmp_path)
    assert 0.24 < share(small(tmp_path)) <= 0.3


def test_a_ready_hspg_and_other_settings_are_refused(tmp_path):
    model = tiny_model(ONE_EACH[0])
    extra = {"optimizers": (ready(model, OTOConfig(target_sparsity=0.3, min_neurons=4, round_to=4)), None)}
    with pytest.raises(ValueError, match="`oto_config` and the HSPG .*`target_sparsity`: 0.5 and 0.3"):
        make(tmp_path / "run", model=model, extra=extra)
    assert list(tmp_path.iterdir()) == []
    other = ready(tiny_model(ONE_EACH[0], num_hidden_layers=2), CONFIG)
    with pytest.raises(ValueError, match="The HSPG in `optimizers` is of a model with other groups"):
        make(tmp_path, model=model, extra={"optimizers": (other, None)}).train()


# The number of steps changes.


class Full(TrainerCallback):
    """The device has no room for a batch of more than `fits`, at a step."""

    def __init__(self, fits, step=0):
        self.fits, self.step = fits, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.trainer._train_batch_size > self.fits:
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize("step", [0, 3])
def test_auto_find_batch_size_lays_the_run_out_anew(step, tmp_path):
    """Ten batches of four an epoch become twenty of two: at the first step, or later in the warm-up."""
    full = Full(fits=2, step=step)
    options = {"auto_find_batch_size": True, "max_steps": -1, "num_train_epochs": 3, **SAVING}
    trainer = full.trainer = make(tmp_path / "run", extra={"callbacks": [full]}, **options)
    trainer.train()
    total = trainer.state.max_steps
    assert total == trainer.hspg.schedule.total_steps == trainer.hspg.steps_done > 30
    assert trainer.hspg.target_reached and 0.44 < share(small(tmp_path / "run")) <= 0.5
    resumed = make(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-16"))
    assert resumed.state.max_steps == total and same_weights(resumed.model, trainer.model)


def test_auto_find_batch_size_is_refused_where_groups_are_going(tmp_path):
    full = Full(fits=2, step=9)
    options = {"auto_find_batch_size": True, "max_steps": -1, "num_train_epochs": 3}
    trainer = full.trainer = make(tmp_path, extra={"callbacks": [full]}, **options)
    with pytest.raises(ValueError, match="9 of 30 steps of pruning are done .* `per_device_train_batch_size`"):
        trainer.train()


def test_train_again_with_another_number_of_steps(tmp_path):
    trainer = make(tmp_path, extra={"callbacks": [StopAt(3)]}, max_steps=240)
    trainer.train()
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if not isinstance(c, StopAt)]
    trainer.args.max_steps = STEPS
    trainer.train()  # three steps of warm-up are no harm
    assert trainer.hspg.schedule.boundaries[-1] == 14 and trainer.hspg.steps_done == STEPS
    with pytest.raises(ValueError, match="A run cannot begin .* 24 of 24 .* make a new OTOTrainer"):
        trainer.train()


def test_the_same_trainer_resumes(tmp_path):
    whole = make(tmp_path / "whole", **SAVING)
    whole.train()
    trainer = make(tmp_path / "run", extra={"callbacks": [StopAt(12)]}, **SAVING)
    trainer.train()
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if not isinstance(c, StopAt)]
    trainer.train(resume_from_checkpoint=True)
    assert same_weights(trainer.model, whole.model) and trainer.hspg.target_reached


def test_what_could_not_be_resumed_is_no_part_of_a_new_run(tmp_path):
    """Nor does a model that has shrunk grow again."""
    config = replace(CONFIG, shrink_during_training=True)
    whole = make(tmp_path, config=config, save_strategy="steps", save_steps=4)
    whole.train()
    other = make(tmp_path / "other", config=config, extra={"callbacks": [watch := Begun()]})
    data, other.train_dataset = other.train_dataset, None
    with pytest.raises(ValueError, match="requires a train_dataset"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    other.train_dataset = data
    other.train()
    assert watch.counts == counts(tiny_model(ONE_EACH[0])) != counts(whole.model)
    message = r"checkpoint-4 has \[\(4, 24\).* in its blocks, `model` .* Resume with the model that the run began with"
    with pytest.raises(ValueError, match=message):
        whole.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_that_lacks_a_file_is_refused_before_its_weights_are_loaded(lost, tmp_path):
    config = replace(CONFIG, shrink_during_training=True)
    make(tmp_path, config=config, extra={"callbacks": [StopAt(16)]}, **SAVING).train()
    (tmp_path / "checkpoint-16" / lost).unlink()
    trainer, new = (make(tmp_path, config=config, **SAVING) for _ in range(2))
    for checkpoint in (True, str(tmp_path / "checkpoint-16")):
        with pytest.raises(ValueError, match=f"checkpoint-16 lacks {lost}: .* Resume from a complete checkpoint"):
            trainer.train(resume_from_checkpoint=checkpoint)
    assert same_weights(trainer.model, new.model)


class Begun(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        self.counts = counts(model)


# The learning rate.


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_a_given_stable_part_is_followed_by_a_decay_over_the_rest(tmp_path):
    rates = Rates()
    stable = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2}
    options = {"lr_scheduler_kwargs": {"num_stable_steps": 16}, **stable}
    make(tmp_path, extra={"callbacks": [rates]}, **options).train()
    assert rates.seen == pytest.approx([0, 1.5e-3] + [3e-3] * 17 + [3e-3 * left / 6 for left in range(5, 0, -1)])
    with pytest.raises(ValueError, match="`num_stable_steps`=22 .* leaves nothing to decay in: 2 steps of warm-up"):
        make(tmp_path, lr_scheduler_kwargs={"num_stable_steps": 22}, **stable).train()


class Worse(OTOTrainer):
    """Its loss grows with every evaluation."""

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = 1.0 + self.state.global_step
        return output


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
def test_a_rate_that_goes_by_evaluations_waits_for_the_target(scheduler, tmp_path):
    rates = Rates()
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": False}
    options |= {"lr_scheduler_type": scheduler, "lr_scheduler_kwargs": {"patience": 1}}
    try:
        make(tmp_path, kind=Worse, extra={"callbacks": [rates]}, **options).train()
    except ValueError as error:
        pytest.skip(str(error)) if "is not a valid SchedulerType" in str(error) else None
        raise
    assert rates.seen[:15] == pytest.approx([3e-3] * 15) and rates.seen[-1] < 3e-3


# What compress would refuse after training is refused before it.


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(model):
    block = model.bert.encoder.layer[1].intermediate.dense
    block.register_forward_hook(lambda module, inputs, output: 2 * output)


def subclassed(model):
    block = model.bert.encoder.layer[1].intermediate
    block.dense, old = Scaled(32, 24), block.dense
    block.dense.load_state_dict(old.state_dict())


def wider(model):
    model.bert.encoder.layer[1].output.register_parameter("gate", nn.Parameter(torch.ones(1)))


@pytest.mark.parametrize("change", [hooked, subclassed, wider])
@pytest.mark.parametrize("way", ["model", "model_init"])
def test_a_model_that_is_not_built_as_its_class_is_refused_before_the_first_step(change, way, tmp_path):
    model = tiny_model(ONE_EACH[0])
    change(model)
    before = [parameter.clone() for parameter in model.parameters()]
    given = {"model": model} if way == "model" else {"model_init": lambda: model}
    with pytest.raises(ValueError):
        OTOTrainer(args=arguments(tmp_path / "run", **SAVING), train_dataset=DATA, oto_config=CONFIG, **given).train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_tokenizer_of_another_model_is_refused_where_positions_go_by_its_padding(tmp_path):
    """Trainer sets the config's padding token to the tokenizer's, when training starts."""
    tiny_model("RobertaForQuestionAnswering").save_pretrained(tmp_path / "dense")
    given = {"processing_class": tokenizer()}
    trainer = make(tmp_path / "run", model=small(tmp_path / "dense"), extra=given)
    message = r"`model.config` was changed .*pad_token_id 1 -> 0.*`processing_class`.*\(folder, .*pad_token_id=0\b"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    # What it says to do.
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "dense", pad_token_id=0)
    trainer = make(tmp_path / "run", model=model, extra=given)
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    assert largest_difference(outputs(small(tmp_path / "small")), outputs(model.eval())) < 1e-5


class FixedSignature(Trainer):
    """As TRL's: every argument by name, none beside them, and a card of its own at every checkpoint."""

    def __init__(self, model, args=None, data_collator=None, train_dataset=None, eval_dataset=None, callbacks=None):
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, callbacks=callbacks)

    def _save_checkpoint(self, model, trial):
        self.create_model_card(model_name="fixed")
        super()._save_checkpoint(model, trial)


class WithFixedSignature(OTOTrainer, FixedSignature): ...


def test_a_trainer_with_a_fixed_signature_comes_second(tmp_path):
    trainer = make(tmp_path, kind=WithFixedSignature, **SAVING)
    trainer.train()
    assert 0.44 < share(small(tmp_path)) <= 0.5 and "fixed" in (tmp_path / "README.md").read_text()


def test_trls_trainers_come_second(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [{name: row[name].tolist() for name in ("input_ids", "attention_mask")} for row in DATA]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]

    class Mine(OTOTrainer, trl.SFTTrainer): ...

    options = arguments(tmp_path, **SAVING).to_dict() | {"max_length": 16, "bf16": False, "output_dir": str(tmp_path)}
    known = {field for field in trl.SFTConfig.__dataclass_fields__ if trl.SFTConfig.__dataclass_fields__[field].init}
    trainer = Mine(
        model=tiny_model("Qwen3ForCausalLM"),
        args=trl.SFTConfig(**{name: value for name, value in options.items() if name in known}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        oto_config=CONFIG,
    )
    trainer.train()
    assert trainer.hspg.target_reached and trainer.hspg.metrics()["removed_params"] > 0.4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(heads for heads, _ in counts(loaded)) == trainer.hspg.metrics()["heads"]


def tokenizer():
    words = WordLevel({"<pad>": 0, "</s>": 1, **{f"w{number}": number for number in range(2, 61)}}, unk_token="w2")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="</s>")


def skip_steps(monkeypatch, skipped):
    """Leave out some steps, counted from 1, as a loss scaler does. Gives whose all of them were."""
    calls, step = [], AcceleratedOptimizer.step

    def some(self, closure=None):
        calls.append(self)
        self._is_overflow = len(calls) in skipped
        return None if self._is_overflow else step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", some)
    return calls


@pytest.mark.parametrize("skipped", [{3}, {24}, {1, 2, 23}])
def test_steps_that_a_scaler_skips_do_not_leave_the_run_short(skipped, tmp_path, monkeypatch, caplog):
    """As under fp16, in a run without recovery: Trainer counts these steps, the optimizer does not."""
    calls = skip_steps(monkeypatch, skipped)
    config = OTOConfig(min_neurons=4, round_to=4, pruning_end_ratio=1.0)
    trainer = make(tmp_path, config=config, **SAVING)
    trainer.train()
    assert trainer.hspg.target_reached and trainer.hspg.steps_done == STEPS == len(calls)
    assert 0.44 < share(small(tmp_path)) <= 0.5
    assert f"The loss scaler left out {len(skipped)} of 24 steps" in caplog.text
    caplog.clear()
    resumed = make(tmp_path / "resumed", config=config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    assert resumed.hspg.target_reached and same_weights(resumed.model, trainer.model)
    assert "left out" not in caplog.text


@pytest.mark.parametrize("skipped", [{1, 2}, {13, 24}])
def test_the_last_size_is_evaluated_where_a_scaler_skips_steps(skipped, tmp_path, monkeypatch, without_pictures):
    skip_steps(monkeypatch, skipped)
    trainer = make(tmp_path, config=SIZES, **SAVING)
    trainer.train()
    assert trainer.hspg.steps_done == STEPS - 2
    found = [(e["step"], e["eval_milestone"]) for e in trainer.state.log_history if "eval_loss" in e]
    assert [size for _, size in found] == [0.3, 0.5, 0.7] and found[-1][0] == STEPS
    assert Size.load(tmp_path).scores["eval_loss"] == trainer.state.log_history[-2]["eval_loss"]


# Zeros are asked of the weights.


class Restoring(TrainerCallback):
    """Puts averaged or earlier weights in at the end."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.first = copy.deepcopy(model.state_dict())

    def on_train_end(self, args, state, control, model, **kwargs):
        average = {name: value * 0.5 + self.first[name] * 0.5 for name, value in model.state_dict().items()}
        model.load_state_dict(average)


def test_averaged_weights_are_not_saved_as_pruned(tmp_path):
    trainer = make(tmp_path, extra={"callbacks": [Restoring()]}, **SAVING)
    message = r"The model has 12 heads and 72 neurons left, where \d+ and \d+ were not pruned: .*averages of weights"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-16", "checkpoint-24", "checkpoint-8"]
    with pytest.raises(ValueError, match=message):
        trainer.save_model(str(tmp_path / "small"))
    assert not (tmp_path / "small").exists()


class Anchored(OTOTrainer):
    """A penalty on the distance from the first weights."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if not hasattr(self, "first"):
            self.first = [parameter.detach().clone() for parameter in model.parameters()]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + 0.1 * sum((p - q).square().sum() for p, q in zip(model.parameters(), self.first, strict=True))
        return (loss, outputs) if return_outputs else loss


def test_zeros_hold_against_a_penalty_that_pulls_at_them(tmp_path):
    trainer = make(tmp_path, kind=Anchored, logging_steps=1, **SAVING)
    trainer.train()
    assert 0.44 < share(small(tmp_path)) <= 0.5
    resumed = make(tmp_path / "resumed", kind=Anchored, logging_steps=1, save_strategy="no")
    resumed.first = [parameter.detach().clone() for parameter in resumed.model.parameters()]
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert same_weights(resumed.model, trainer.model)


class Late(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        self.first = copy.deepcopy(model.state_dict())

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 17:
            model.load_state_dict(self.first)


def test_a_run_whose_zeros_do_not_stay_stops_when_it_would_say_that_they_are(tmp_path):
    trainer = make(tmp_path, extra={"callbacks": [Late()]}, **SAVING)
    with pytest.raises(ValueError, match=r"\d heads and \d+ neurons that were zero are not any more at step 20"):
        trainer.train()
    assert not (tmp_path / "model.safetensors").exists()


# Losses that are no numbers.


class Unlabelled(OTOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.state.global_step == 10:  # as a mean over no label: NaN, with gradients of zero
            loss = (outputs.start_logits * 0).sum() + torch.tensor(float("nan"))
        return (loss, outputs) if return_outputs else loss


class Infinite(OTOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.state.global_step == 10:  # the loss is a number, its gradients are none
            loss = loss + (outputs.start_logits[0, 0] * 0).sqrt()
        return (loss, outputs) if return_outputs else loss


def test_a_batch_without_a_label_is_passed_over_as_trainer_does(tmp_path):
    trainer = make(tmp_path, kind=Unlabelled, **SAVING)
    trainer.train()
    assert trainer.state.global_step == STEPS and 0.44 < share(small(tmp_path)) <= 0.5
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())


def test_gradients_that_are_no_numbers_stop_a_run_with_a_finite_loss(tmp_path):
    trainer = make(tmp_path, kind=Infinite, **SAVING)
    with pytest.raises(FloatingPointError, match=r"The loss is \d.* at step 10, and its gradients .*data has a batch"):
        trainer.train()
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())


# Searching, logging.


def test_a_search_over_settings_of_the_compression(tmp_path):
    space = {"target_sparsity": [0.2, 0.5], "pruning_start_ratio": [0.2, 0.3], "learning_rate": [1e-3]}
    trainer = OTOTrainer(
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=8, **SAVING),
        model_init=lambda: tiny_model(ONE_EACH[0]),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        oto_config=CONFIG,
    )
    trainer.hyperparameter_search(
        backend="optuna",
        n_trials=4,
        hp_space=lambda trial: {name: trial.suggest_categorical(name, values) for name, values in space.items()},
        sampler=GridSampler(space),
    )
    assert trainer.oto_config == CONFIG
    found = set()
    for run in tmp_path.iterdir():
        config = OTOConfig.from_pretrained(run / "checkpoint-24")
        state = torch.load(run / "checkpoint-24" / "optimizer.pt", weights_only=True)["param_groups"][0]
        assert json.loads(state["hspg_settings"])["target_sparsity"] == config.target_sparsity
        log = json.loads((run / "checkpoint-24" / "trainer_state.json").read_text())["log_history"]
        removed = [entry["removed_params"] for entry in log if "removed_params" in entry][-1]
        assert config.target_sparsity - 0.06 < removed <= config.target_sparsity
        found.add((config.target_sparsity, config.pruning_start_ratio))
    assert found == {(target, warmup) for target in (0.2, 0.5) for warmup in (0.2, 0.3)}


def searching(folder, config=CONFIG, **options):
    return OTOTrainer(
        args=arguments(folder, **options),
        model_init=lambda: tiny_model(ONE_EACH[0]),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        oto_config=config,
    )


def test_the_best_run_of_a_search_is_trained_again_with_its_own_target(tmp_path):
    space = {"target_sparsity": [0.2], "learning_rate": [1e-3]}
    trainer = searching(tmp_path, eval_strategy="steps", eval_steps=24)
    best = trainer.hyperparameter_search(
        backend="optuna",
        n_trials=1,
        hp_space=lambda trial: {name: trial.suggest_categorical(name, values) for name, values in space.items()},
    )
    for name, value in best.hyperparameters.items():  # as the documentation of Transformers does it
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=r"`args` must not have settings that differ.*replace.*target_sparsity=0.2"):
        trainer.train()
    target = best.hyperparameters["target_sparsity"]  # as `args` now
    trainer.oto_config = replace(trainer.oto_config, target_sparsity=target)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == best.objective
    assert 0.14 < trainer.hspg.metrics()["removed_params"] <= 0.2


def test_arguments_of_ones_own_may_have_any_name(tmp_path):
    @dataclass
    class Mine(TrainingArguments):
        target_sparsity: float = 0.9

    args = Mine(str(tmp_path), max_steps=STEPS, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = OTOTrainer(model=tiny_model(ONE_EACH[0]), args=args, train_dataset=DATA, oto_config=CONFIG)
    trainer.train()
    assert 0.44 < trainer.hspg.metrics()["removed_params"] <= 0.5


def test_a_search_that_fails_leaves_a_trainer_that_looks_where_it_writes(tmp_path):
    trainer = searching(tmp_path, replace(CONFIG, target_sparsity=0.7, milestones=(0.3,)))
    with pytest.raises(ValueError, match="cannot be reached"):
        trainer.hyperparameter_search(
            backend="optuna",
            n_trials=1,
            hp_space=lambda trial: {"target_sparsity": trial.suggest_categorical("target_sparsity", [0.999])},
        )
    tiny_model(ONE_EACH[0]).save_pretrained(tmp_path / "0.30")
    with pytest.raises(ValueError, match="0.30 holds .* a model that is of no milestone"):
        trainer.train()


class Numbers(TrainerCallback):
    """What loggers of numbers get."""

    def __init__(self):
        self.others = set()

    def on_log(self, args, state, control, logs, **kwargs):
        self.others |= {name for name, value in logs.items() if not isinstance(value, int | float)}


def test_loggers_get_numbers_only(tmp_path):
    numbers = Numbers()
    trainer = make(tmp_path, extra={"callbacks": [numbers]})
    trainer.train()
    assert numbers.others == set()
    assert [entry["stage"] for entry in trainer.state.log_history if "loss" in entry] == ["pruning"] * 3 + [
        "recovery"
    ] * 3


def test_early_stopping_and_the_best_model_go_together(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    options |= {"metric_for_best_model": "loss", "greater_is_better": False, "save_strategy": "steps", "save_steps": 2}
    trainer = make(tmp_path, kind=Worse, extra={"callbacks": [EarlyStoppingCallback(2)]}, **options)
    trainer.train()
    assert trainer.state.best_global_step == 14 and trainer.state.global_step == 18
    assert largest_difference(outputs(small(tmp_path)), outputs(trainer.model.eval())) <= 1e-5
