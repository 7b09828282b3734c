"""Zero groups cut out while training goes on: the same run, by smaller matrices."""

import copy

import pytest
import torch
import torch.distributed as dist
import transformers
from families import ONE_EACH, counts, largest_difference, outputs, question_batch, tiny_model, zero
from short_runs import DATA, StopAt, arguments, same_weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForQuestionAnswering, TrainerCallback

from hf_oto import HSPG, OTOConfig, OTOTrainer, compress, partition, shrink
from hf_oto.models.modeling_oto import BiasOnly, Headless

SLOW = pytest.mark.slow

STEPS = 40  # warm-up 6, pruning 18 in ten periods, recovery 16
# Deep enough that whole blocks lose all their neurons or heads.
DEEP = {"target_sparsity": 0.7, "min_heads": 0, "min_neurons": 0, "round_to": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def optimizer_for(model, base=torch.optim.AdamW, steps=STEPS, config=DEEP, **options):
    options = {"lr": 3e-3} | options
    return HSPG(base(model.named_parameters(), **options), partition(model), OTOConfig(**config), steps)


def train(model, optimizer, steps, first=0, shrinks=False):
    """Steps of two micro-steps each, clipped. Gives the metrics after every step and the steps of the shrinks."""
    metrics, shrunk = [], []
    for step in range(first, first + steps):
        for micro in (0, 1):
            (model(**question_batch(model, 2 * step + micro)).loss / 2).backward()
            optimizer.observe(accumulated=micro > 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if shrinks and optimizer.shrink_due:
            shrink(model, optimizer)
            shrunk.append(optimizer.steps_done)
        metrics.append(optimizer.metrics() | {"target_reached": optimizer.target_reached, "stage": optimizer.stage})
    return metrics, shrunk


def far(actual, expected):
    """The largest difference of any parameter, as a share of its largest magnitude."""
    differences = []
    for (name, mine), (other, theirs) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other and mine.shape == theirs.shape
        differences.append(float((mine - theirs).detach().abs().max() / theirs.detach().abs().max()))
    return max(differences)


def both(name, dtype, base, steps=STEPS, **options):
    """The unshrunk and the shrunk run: model, optimizer, metrics and shrinks of each."""
    runs = []
    for shrinks in (False, True):
        model = tiny_model(name).to(dtype)
        optimizer = optimizer_for(model, base, steps, **options)
        runs.append((model, optimizer, *train(model, optimizer, steps, shrinks=shrinks)))
    return runs


@pytest.mark.parametrize(
    ("name", "base", "options"),
    [
        *((name, torch.optim.AdamW, {"weight_decay": 0.1}) for name in (ONE_EACH[0], ONE_EACH[-1])),
        (ONE_EACH[0], torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.01}),
    ],
)
def test_the_run_is_that_of_the_unshrunk_model(name, base, options):
    """In float64, where only a mistake is above 1e-7. In float32 Adam takes whole steps along gradients that are zero
    but for rounding, such as a key bias's; here its ε = 1e-8 stops them."""
    (full, full_optimizer, expected, _), (model, optimizer, metrics, shrunk) = both(
        name, torch.float64, base, **options
    )
    assert metrics == expected and metrics[-1]["target_reached"]
    assert counts(full) == [(4, 24)] * 3 and 0.65 < metrics[-1]["removed_params"] <= 0.7
    assert 3 <= len(shrunk) <= 8 and set(shrunk) <= set(optimizer.schedule.boundaries[1:])
    assert sum(heads for heads, _ in counts(model)) == metrics[-1]["heads"]
    assert sum(neurons for _, neurons in counts(model)) == metrics[-1]["neurons"]
    assert any(0 in block for block in counts(model))
    small = compress(full)
    assert far(model, small) <= 1e-7
    assert type(model) is type(small) and model.config.to_dict() == small.config.to_dict()
    assert not any(bool(mask.any()) for mask in optimizer.zero_masks().values())  # nothing is left to freeze

    saliency, kept = full_optimizer.param_groups[0]["hspg_saliency"], full_optimizer.zero_masks()
    kept = ~torch.cat(list(kept.values()))
    assert torch.allclose(optimizer.param_groups[0]["hspg_saliency"], saliency[kept], rtol=1e-5, atol=0)
    again = compress(model)  # as at the end of training
    assert far(again, small) <= 1e-7 and counts(again) == counts(small)


def test_in_single_precision_it_differs_by_rounding():
    options = {"lr": 0.03, "momentum": 0.9}
    (full, *_, expected, _), (model, _, metrics, _) = both(ONE_EACH[0], torch.float32, torch.optim.SGD, **options)
    assert metrics == expected
    assert far(model, compress(full)) <= 1e-4  # 40 steps of sums with fewer zeros in them, each off by some 1e-7
    assert largest_difference(outputs(model), outputs(full)) <= 1e-4


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.Adamax, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adadelta, {"lr": 0.3}),
        (torch.optim.ASGD, {"lr": 0.03, "t0": 10}),
    ],
)
def test_optimizers_that_move_every_weight_by_itself(base, options):
    config = DEEP | {"pruning_periods": 5}
    (full, _, expected, _), (model, _, metrics, shrunk) = both(
        ONE_EACH[0], torch.float64, base, steps=20, config=config, **options
    )
    assert shrunk and metrics == expected
    assert far(model, compress(full)) <= 1e-6


def test_the_state_goes_with_its_weights():
    """Right after a cut: every moment is what it was, at the places that are left; step counts stay."""
    model = tiny_model(ONE_EACH[0])
    optimizer = optimizer_for(model)
    end = optimizer.schedule.boundaries[3]
    train(model, optimizer, end)
    before = {name: copy.copy(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    old, masks = partition(model), optimizer.zero_masks()
    members = {name: (array, dim) for array in old.arrays for name, dim in array.members}
    shrink(model, optimizer)
    named = dict(model.named_parameters())
    assert set(optimizer.state) == set(named.values())
    for name, parameter in named.items():
        state = optimizer.state[parameter]
        assert state["step"] == end and before[name].keys() == state.keys()
        for key in ("exp_avg", "exp_avg_sq"):
            expected = before[name][key]
            if name in members:
                array, dim = members[name]
                left = ~masks[array.layer, array.kind].repeat_interleave(array.width)
                expected = expected.index_select(dim, left.nonzero().flatten())
            assert torch.equal(state[key], expected)
    assert [named[name] for group in optimizer.param_groups for name in group["param_names"]] == [
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ]
    assert optimizer.partition == partition(model) != old


def test_it_is_due_at_the_end_of_periods_that_removed_enough():
    """A tenth of what the blocks have left at the end of any but the last period."""
    model = tiny_model(ONE_EACH[0])
    optimizer = optimizer_for(model, config={"target_sparsity": 0.5, "min_neurons": 4, "round_to": 4})
    ends, left, due = optimizer.schedule.boundaries[1:], 1.0, []
    for step in range(STEPS):
        train(model, optimizer, 1, first=step)
        now = 1 - optimizer.metrics()["removed_macs"]
        worth = now <= 0.9 * left if step + 1 != ends[-1] else now < left
        assert optimizer.shrink_due == (step + 1 in ends and worth)
        if optimizer.shrink_due:
            shrink(model, optimizer)
            assert not optimizer.shrink_due
            left = now
            due.append(step + 1)
    assert 3 <= len(due) < len(ends)


def test_little_is_not_worth_a_cut_before_the_end():
    model = tiny_model(ONE_EACH[0])
    optimizer = optimizer_for(model, config=DEEP | {"target_sparsity": 0.08})
    _, shrunk = train(model, optimizer, STEPS, shrinks=True)
    assert shrunk == [optimizer.schedule.boundaries[-1]]


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_it_is_the_same_object_and_saves_what_loads(name, attention, tmp_path):
    """The model and its modules stay, with their hooks; only what is cut to nothing is replaced."""
    model = tiny_model(name, attention).train()
    groups = partition(model)
    for array in groups.arrays:
        gone = range(array.count) if (array.layer, array.kind) in ((1, "heads"), (2, "neurons")) else range(3)
        zero(model, array, list(gone))
    config = DEEP | {"target_sparsity": 0.8}
    optimizer = optimizer_for(model, torch.optim.SGD, config=config, lr=0.0)
    model(**question_batch(model)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    modules, parameters, expected = dict(model.named_modules()), dict(model.named_parameters()), outputs(model)
    random = torch.get_rng_state()
    shrink(model, optimizer)
    assert torch.equal(torch.get_rng_state(), random)
    assert counts(model) == [(1, 21), (0, 21), (1, 0)]
    assert largest_difference(outputs(model), expected) <= 1e-5
    assert not any(module.training for module in model.modules())
    replaced = {module for path, module in model.named_modules() if module is not modules[path]}
    kinds = (BiasOnly, Headless, torch.nn.Identity)
    assert len(replaced) == 4 and all(isinstance(module, kinds) for module in replaced)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
    owned = {name for array in groups.arrays for name, _ in array.members}
    assert all(
        (parameter is parameters[key]) == (key not in owned) and parameter.requires_grad
        for key, parameter in model.named_parameters()
    )
    assert all(module.config is model.config for module in model.modules() if "config" in vars(module))
    assert isinstance(model, getattr(transformers, name))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert counts(loaded) == counts(model) and largest_difference(outputs(loaded), expected) <= 1e-5
    model.train()
    model(**question_batch(model)).loss.backward()
    optimizer.step()


def test_only_what_may_be_removed_is_cut():
    model = tiny_model(ONE_EACH[0])
    zero(model, partition(model).arrays[1], [0, 1, 2])  # neurons, which are to stay
    config = DEEP | {"structures": ("heads",), "target_sparsity": 0.5}
    optimizer = optimizer_for(model, config=config)
    train(model, optimizer, STEPS, shrinks=True)
    assert partition(model).block_counts.neurons == (24,) * 3 and sum(partition(model).block_counts.heads) == 6


@pytest.mark.parametrize("name", [ONE_EACH[0], ONE_EACH[-1]])
def test_a_loop_of_your_own_resumes_exactly(name, tmp_path):
    model = tiny_model(name)
    optimizer = optimizer_for(model)
    stop = optimizer.schedule.boundaries[4]
    train(model, optimizer, stop, shrinks=True)
    assert counts(model) != [(4, 24)] * 3
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(model, optimizer, STEPS - stop, first=stop, shrinks=True)

    saved = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    resumed = tiny_model(name, seed=7)  # dense, other weights
    follower = optimizer_for(resumed)
    with pytest.raises(ValueError, match="groups left, this one has 84. Call `shrink` with `like`"):
        follower.load_state_dict(state)
    shrink(resumed, follower, like=saved.config)
    resumed.load_state_dict(saved.state_dict())
    follower.load_state_dict(state)
    train(resumed, follower, STEPS - stop, first=stop, shrinks=True)
    assert counts(resumed) == counts(model) and same_weights(resumed, model)
    assert follower.metrics() == optimizer.metrics()


# What cannot be shrunk.


class OwnSGD(torch.optim.SGD):
    """May do anything."""


@pytest.mark.parametrize("base", [torch.optim.Adafactor, OwnSGD])
def test_another_optimizer_is_refused_by_name(base):
    model = tiny_model(ONE_EACH[0])
    optimizer = optimizer_for(model, base)
    _, shrunk = train(model, optimizer, STEPS, shrinks=True)
    assert not shrunk and optimizer.target_reached
    before = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match=f"cannot be shrunk: a step of {base.__name__} may depend on how many weights"
    ):
        shrink(model, optimizer)
    assert same_weights(before, model) and counts(model) == [(4, 24)] * 3


def test_sharded_parameters_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_model(ONE_EACH[0])
        linear = model.bert.encoder.layer[0].intermediate.dense
        linear.weight = torch.nn.Parameter(distribute_tensor(linear.weight.detach(), init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match="cannot be shrunk: its parameters are sharded"):
            shrink(model, optimizer_for(model))
    finally:
        dist.destroy_process_group()


def test_what_does_not_fit_is_refused_and_nothing_is_cut():
    model = tiny_model(ONE_EACH[0])
    optimizer = optimizer_for(model)
    train(model, optimizer, optimizer.schedule.boundaries[1])
    names = [name for name, _ in model.named_parameters()]

    other = tiny_model(ONE_EACH[0], intermediate_size=16)
    with pytest.raises(ValueError, match="`optimizer` is of a model with other groups"):
        shrink(other, optimizer)
    with pytest.raises(ValueError, match="`like` is of type 'roberta', `model` of 'bert'"):
        shrink(model, optimizer, like=tiny_model(ONE_EACH[1]).config)
    wide = tiny_model(ONE_EACH[0], intermediate_size=32).config
    with pytest.raises(ValueError, match="`like` has .* nothing that is gone can be put back"):
        shrink(model, optimizer, like=wide)
    wrapped = torch.nn.parallel.DataParallel(model)
    with pytest.raises(ValueError, match="must be a Transformers model that is not wrapped"):
        shrink(wrapped, optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    with pytest.raises(ValueError, match="that are not zero, as `optimizer` left them"):
        shrink(model, optimizer)
    assert [name for name, _ in model.named_parameters()] == names and counts(model) == [(4, 24)] * 3


# OTOTrainer.

SHRINKING = OTOConfig(**DEEP, shrink_during_training=True)
KEPT_FULL = OTOConfig(**DEEP)


def make(folder, name=ONE_EACH[0], config=SHRINKING, model=None, kind=OTOTrainer, dtype=torch.float32, **options):
    """A trainer without dropout, whose random numbers would depend on the widths."""
    if model is None:
        zeroed = dict.fromkeys(("dropout", "attention_dropout", "qa_dropout"), 0.0) if "Distil" in name else NO_DROPOUT
        model = tiny_model(name, **zeroed).to(dtype)
    extra = {key: options.pop(key) for key in ("callbacks", "optimizers") if key in options}
    data = {"train_dataset": DATA, "eval_dataset": DATA[:8]}
    return kind(model=model, args=arguments(folder, **options), oto_config=config, **data, **extra)


ACCUMULATED = {"optim": "sgd", "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("name", "options"),
    [(ONE_EACH[0], {}), (ONE_EACH[-1], {}), (ONE_EACH[0], ACCUMULATED | {"max_grad_norm": 0.1})],
)
def test_trainer_ends_where_the_unshrunk_run_ends(name, options, tmp_path, without_pictures):
    full, trainer = (make(tmp_path, name, config, dtype=torch.float64, **options) for config in (KEPT_FULL, SHRINKING))
    model = trainer.model
    full.train()
    trainer.train()
    assert trainer.model is model and counts(model) != [(4, 24)] * 3
    assert counts(full.model) == [(4, 24)] * 3
    logs = ([dict(entry) for entry in one.state.log_history[:-1]] for one in (trainer, full))
    for mine, others in zip(*logs, strict=True):
        assert mine.pop("stage", None) == others.pop("stage", None)
        assert mine == pytest.approx(others, rel=1e-6, abs=0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(full.evaluate()["eval_loss"], rel=1e-6)
    for one in (full, trainer):
        one.save_model(str(tmp_path / str(one is full)))
    first, second = (AutoModelForQuestionAnswering.from_pretrained(tmp_path / str(one)) for one in (True, False))
    assert type(second) is type(first) and counts(second) == counts(first) == counts(model)
    assert far(second, first) <= 1e-6
    assert (tmp_path / "False" / "modeling_oto.py").exists()


class SaveAt(TrainerCallback):
    def __init__(self, *steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


@pytest.mark.parametrize(
    ("name", "options", "stops"),
    [(ONE_EACH[0], {}, (3, 5, 9, 14)), (ONE_EACH[-1], {}, (5, 14)), (ONE_EACH[0], ACCUMULATED, (5, 14))],
)
def test_checkpoints_are_as_small_as_the_model_and_resume_exactly(name, options, stops, tmp_path):
    whole = make(tmp_path, name, callbacks=[SaveAt(*stops)], **options)
    whole.train()
    sizes = set()
    for stop in stops:
        resumed = make(tmp_path / "resumed", name, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert resumed.state.global_step == whole.state.global_step
        assert counts(resumed.model) == counts(whole.model) and same_weights(resumed.model, whole.model)
        for mine, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            state, expected = resumed.hspg.state[mine], whole.hspg.state[other]
            assert all(torch.equal(state[key], expected[key]) for key in state if torch.is_tensor(state[key]))
        assert resumed.state.log_history[-2]["heads"] == whole.state.log_history[-2]["heads"]
        loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / f"checkpoint-{stop}")
        assert counts(loaded) == counts(resumed.model) or stop < 14
        sizes.add(sum(parameter.numel() for parameter in loaded.parameters()))
    assert len(sizes) == len(stops)


def test_resuming_in_the_same_trainer_and_with_the_users_own_optimizer(tmp_path):
    whole = make(tmp_path, callbacks=[SaveAt(2, 9)])
    whole.train()
    trainer = make(tmp_path / "same", callbacks=[StopAt(2)])
    trainer.train()
    trainer.pop_callback(StopAt)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert same_weights(trainer.model, whole.model)
    # Backwards it cannot go: what is cut is gone.
    with pytest.raises(ValueError, match=r"checkpoint-2 has \[\(4, 24\), .* the model that the run began with"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    runs = []
    for resume in (None, str(tmp_path / "own" / "checkpoint-9")):
        model = tiny_model(ONE_EACH[0], **NO_DROPOUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
        options = {"save_strategy": "steps", "save_steps": 9, "optimizers": (optimizer, scheduler)}
        runs.append(make(tmp_path / "own", model=model, **options))
        runs[-1].train(resume_from_checkpoint=resume)
    assert same_weights(runs[1].model, runs[0].model) and counts(model) != [(4, 24)] * 3


def test_a_small_checkpoint_is_not_resumed_without_the_setting(tmp_path):
    make(tmp_path, callbacks=[StopAt(9)]).train()
    other = make(tmp_path / "other", config=KEPT_FULL)
    before = copy.deepcopy(other.model)
    with pytest.raises(ValueError, match=r"checkpoint-9 has \[.* `model` \[\(4, 24\), .*shrink_during_training=True"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert same_weights(before, other.model)


def test_a_state_from_before_the_setting_is_resumed():
    model = tiny_model(ONE_EACH[0])
    optimizer = optimizer_for(model)
    state = optimizer.state_dict()
    old = state["param_groups"][0]["hspg_settings"].replace('"shrink_during_training": false, ', "")
    assert old != state["param_groups"][0]["hspg_settings"]
    state["param_groups"][0]["hspg_settings"] = old
    optimizer.load_state_dict(state)
    other = optimizer_for(model, config=DEEP | {"shrink_during_training": True})
    with pytest.raises(ValueError, match="shrink_during_training: False saved, True now"):
        other.load_state_dict(state)


def test_the_best_model_is_loaded(tmp_path):
    trainer = make(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    best = AutoModelForQuestionAnswering.from_pretrained(trainer.state.best_model_checkpoint)
    assert int(trainer.state.best_model_checkpoint.rpartition("-")[2]) >= 14
    assert counts(best) == counts(trainer.model) != [(4, 24)] * 3
    assert same_weights(best, trainer.model)


@pytest.mark.parametrize("mode", ["bf16", "gradient_checkpointing", pytest.param("torch_compile", marks=SLOW)])
def test_ways_to_train(mode, tmp_path):
    options = {mode: True} | ({"torch_compile_backend": "eager"} if mode == "torch_compile" else {})
    options["optim"] = "sgd"
    trainer = make(tmp_path, config=OTOConfig(**DEEP, pruning_periods=3, shrink_during_training=True), **options)
    if mode == "torch_compile":
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    trainer.train()
    if mode == "torch_compile":  # a graph at the start and one for every shrink, not for every step
        assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    # Not before: accelerate's settings are those of the Trainer made last.
    full = make(tmp_path, config=OTOConfig(**DEEP, pruning_periods=3), optim="sgd", bf16=mode == "bf16")
    full.train()
    small = full.compressed_model()
    assert counts(trainer.model) == counts(trainer.compressed_model()) == counts(small) != [(4, 24)] * 3
    # bfloat16 rounds at 2⁻⁹: matrices of other sizes are summed up otherwise.
    assert far(trainer.model, small) <= (0.02 if mode == "bf16" else 1e-4)


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (SHRINKING, {"optim": "adafactor"}, "a step of Adafactor may depend on how many weights a matrix has"),
        (
            OTOConfig(target_sparsity=None, lmbda=1.0, shrink_during_training=True),
            {"optim": "sgd"},
            "`target_sparsity`=None has no pruning periods",
        ),
    ],
)
def test_what_cannot_be_shrunk_is_trained_in_full_size_and_says_so(config, options, reason, tmp_path, caplog):
    trainer = make(tmp_path, config=config, **options)
    trainer.train()
    assert caplog.text.count(f"in full size, `shrink_during_training` does nothing: {reason}") == 1
    assert counts(trainer.model) == [(4, 24)] * 3
    caplog.clear()
    full = make(tmp_path, config=OTOConfig(**config.to_dict() | {"shrink_during_training": False}), **options)
    full.train()
    assert "full size" not in caplog.text
    assert same_weights(full.model, trainer.model)
