"""Every precision and every way to train: zeros are exact and stay, the target is met, what is saved is right."""

import pytest
import torch
from families import ONE_EACH, counts, largest_difference, outputs, question_batch, tiny_model
from torch.amp import GradScaler
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    TrainerCallback,
    TrainingArguments,
)

from hf_oto import HSPG, OTOConfig, OTOTrainer, partition
from hf_oto.hspg.group_weights import group_weights
from hf_oto.models.groups import zero_groups

pytestmark = pytest.mark.usefixtures("without_pictures")

CONFIG = OTOConfig(min_neurons=4, round_to=4, pruning_periods=4)
STEPS = 24  # warm-up 4, pruning 10, recovery 10
BERT = ONE_EACH[0]
QUESTIONS = [
    {key: value[0] for key, value in question_batch(tiny_model(BERT), seed, size=1).items()} for seed in range(32)
]
TAGS = [
    {**{key: row[key] for key in ("input_ids", "attention_mask")}, "labels": row["input_ids"] % 2} for row in QUESTIONS
]
# Large enough for bitsandbytes to keep 8 bits: it leaves matrices of fewer than 4,096 numbers as they are.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def zero_values(optimizer, parameter, name):
    """What the state of an optimizer means, as numbers: 8-bit codes are looked up in their table."""
    state = optimizer.state[parameter]
    value = state[name]
    if value.is_floating_point() or name.replace("state", "qmap") not in state:
        return value
    blocks = state[name.replace("state", "absmax")].repeat_interleave(256)[: value.numel()].view(value.shape)
    return state[name.replace("state", "qmap")][value.long()] * blocks


class Watch(TrainerCallback):
    """After every step: what HSPG says is zero is zero, with its optimizer state, and nothing comes back."""

    def __init__(self):
        self.trainer = None
        self.last = {}
        self.seen = 0

    def on_step_end(self, args, state, control, **kwargs):
        optimizer = self.trainer.hspg
        masks = optimizer.zero_masks()
        if not masks:  # every step so far was skipped
            return
        parameters = {
            name: parameter
            for group in optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }
        arrays = [array for array in optimizer.partition.arrays if array.count]
        for array in arrays:
            mask = masks[array.layer, array.kind]
            assert bool((self.last.get((array.layer, array.kind), torch.zeros_like(mask)) <= mask).all())
            for name, dim in array.members:
                parameter = parameters[name]
                tensors = [parameter.detach()]
                tensors += [
                    zero_values(optimizer, parameter, key)
                    for key, value in optimizer.state.get(parameter, {}).items()
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape
                ]
                for tensor in tensors:
                    parts = tensor.unflatten(dim, (array.count, array.width)).movedim(dim, 0)
                    assert not parts[mask].any(), (name, optimizer.steps_done)
                    self.seen += int(mask.sum())
        self.last = masks


def make(folder, model=None, data=QUESTIONS, kind=OTOTrainer, config=CONFIG, callbacks=(), **options):
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    watch = Watch()
    watch.trainer = kind(
        model=tiny_model(BERT) if model is None else model,
        args=TrainingArguments(str(folder), **defaults | options),
        train_dataset=data,
        oto_config=config,
        callbacks=[watch, *callbacks],
    )
    return watch.trainer, watch


def check(trainer, watch, folder, skipped=0, auto=AutoModelForQuestionAnswering):
    """The target is met, and the saved model computes what the trained one does."""
    optimizer, trained = trainer.hspg, trainer._part()
    assert watch.seen and optimizer.target_reached and optimizer.steps_done == STEPS - skipped
    parameters = dict(trained.named_parameters())
    zero = sum(int(zero_groups(array, parameters).sum()) for array in partition(trained).arrays)
    assert zero == sum(int(mask.sum()) for mask in optimizer.zero_masks().values())
    assert 0.4 < optimizer.metrics()["removed_params"] <= 0.5
    trainer.save_model(str(folder))
    small = auto.from_pretrained(folder)
    assert small.dtype == trained.dtype
    assert sum(heads for heads, _ in counts(small)) == optimizer.metrics()["heads"]
    assert sum(neurons for _, neurons in counts(small)) == optimizer.metrics()["neurons"]
    dense = type(trained)(trained.config)  # the trained one computes under autocast for good
    dense.load_state_dict(trained.state_dict())
    assert largest_difference(outputs(small.float()), outputs(dense.eval())) <= 1e-5


class Scaled(OTOTrainer):
    """float16 with a real scaler, which Trainer makes on GPUs only. It begins too high: the first steps overflow."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator.native_amp = True
        self.accelerator.scaler = GradScaler("cpu", init_scale=2.0**20)


# Precision.


# Of the families' layouts nothing is other in another precision.
PRECISIONS = [(BERT, "float32"), (BERT, "bf16"), (BERT, "bfloat16 weights")]
PRECISIONS += zip(ONE_EACH[1:], ("bf16", "bfloat16 weights") * 2, strict=True)


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_zeros_are_exact_in_every_precision(name, precision, tmp_path):
    model = tiny_model(name)
    if precision == "bfloat16 weights":
        model = model.bfloat16()
    trainer, watch = make(tmp_path / "run", model, bf16=precision == "bf16")
    trainer.train()
    check(trainer, watch, tmp_path / "small")


@pytest.mark.parametrize("options", [{}, {"optim": "adamw_torch"}, {"gradient_accumulation_steps": 2}], ids=str)
def test_steps_skipped_by_a_gradient_scaler_do_not_count(options, tmp_path):
    trainer, watch = make(tmp_path / "run", kind=Scaled, fp16=True, **options)
    trainer.train()
    scaler = trainer.accelerator.scaler
    skipped = STEPS - trainer.hspg.steps_done
    assert 0 < skipped < 10 and scaler.get_scale() == 2.0 ** (20 - skipped)
    assert trainer.state.global_step == STEPS and bool(trainer.hspg.param_groups[0]["hspg_saliency"].isfinite().all())
    check(trainer, watch, tmp_path / "small", skipped)


@pytest.mark.parametrize("observed", [True, False])
def test_a_skipped_step_leaves_no_trace(observed):
    """Overflows in warm-up, at a selection and in recovery: the same weights and saliency as without those steps."""
    found = []
    for overflows in ((), (0, 2, 5, 9, 13, 26)):
        model = tiny_model(BERT)
        base = torch.optim.AdamW(model.named_parameters(), lr=3e-3)
        optimizer = HSPG(base, partition(model), CONFIG, STEPS)
        scaler = GradScaler("cpu", init_scale=2.0**20)  # every overflow halves it: powers of two scale exactly
        step = seed = 0
        while optimizer.steps_done < STEPS:
            scaler.scale(model(**question_batch(model, seed)).loss).backward()
            if step in overflows:
                model.bert.encoder.layer[0].output.dense.weight.grad[0, 0] = torch.inf
            if observed:
                # The same number, for which an accelerator is waited for, and a tensor, for which none is.
                optimizer.observe(loss_scale=scaler.scale(torch.ones(())) if step % 2 else scaler.get_scale())
            done = optimizer.steps_done
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert optimizer.steps_done == done + (step not in overflows)
            seed += step not in overflows
            step += 1
        found.append((model, optimizer))
    (model, optimizer), (other, again) = found
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(optimizer.param_groups[0]["hspg_saliency"], again.param_groups[0]["hspg_saliency"])
    assert again.target_reached and again.metrics() == optimizer.metrics()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is a mode of GPUs")
def test_tf32(tmp_path):
    trainer, watch = make(tmp_path / "run", use_cpu=False, tf32=True)
    trainer.train()
    check(trainer, watch, tmp_path / "small")


# Ways to train.

WAYS = {
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    "clipping": {"max_grad_norm": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "adamw_torch": {"optim": "adamw_torch"},
    "adamw_torch_fused": {"optim": "adamw_torch_fused"},
    "sgd": {"optim": "sgd", "learning_rate": 0.03},
    "adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(way, tmp_path):
    model = tiny_model(BERT, num_hidden_layers=2) if way == "compiled" else None  # what is compiled takes its time
    trainer, watch = make(tmp_path / "run", model, **WAYS[way])
    trainer.train()
    check(trainer, watch, tmp_path / "small")


def test_label_smoothing(tmp_path):
    model = tiny_model("BertForTokenClassification")
    trainer, watch = make(tmp_path / "run", model, TAGS, label_smoothing_factor=0.1)
    trainer.train()
    check(trainer, watch, tmp_path / "small", auto=AutoModelForTokenClassification)


def test_four_times_four_is_sixteen(tmp_path):
    """
    Up to the rounding of sums: a few 1e-6 of the weights in 24 steps. Saliency by gradients is another one by
    definition, a mean over micro-steps of what each of them says, so the groups are ranked by their weights here.
    """
    config = OTOConfig(**CONFIG.to_dict() | {"saliency": "magnitude"})
    models = []
    for size, steps in ((16, 1), (4, 4)):
        trainer, watch = make(
            tmp_path / str(size),
            tiny_model(BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            config=config,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.03,
        )
        trainer.train()
        models.append((trainer.model, watch.last))
    (whole, masks), (summed, others) = models
    assert all(torch.equal(masks[key], others[key]) for key in masks) and any(mask.any() for mask in masks.values())
    for a, b in zip(whole.parameters(), summed.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# 8-bit optimizers.


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "lion_8bit", "ademamix_8bit"])
def test_8_bit_optimizers(optim, tmp_path):
    pytest.importorskip("bitsandbytes")
    trainer, watch = make(tmp_path / "run", tiny_model(BERT, **WIDE), optim=optim, learning_rate=1e-3)
    trainer.train()
    kept = [value for state in trainer.hspg.state.values() for value in state.values() if torch.is_tensor(value)]
    assert any(value.dtype == torch.uint8 for value in kept)
    assert "may depend on how many weights" in trainer.hspg.unshrinkable  # 256 numbers in a row share a scale
    check(trainer, watch, tmp_path / "small")


def test_8_bit_states_of_what_stays_are_left_as_they_are():
    optim = pytest.importorskip("bitsandbytes").optim
    model = tiny_model(BERT, **WIDE)
    base = optim.AdamW8bit(model.named_parameters(), lr=1e-3)
    for seed in range(3):
        model(**question_batch(model, seed)).loss.backward()
        base.step()
        base.zero_grad()
    places = {name: (parameter, base.param_groups[0]) for name, parameter in model.named_parameters()}
    arrays = [array for array in partition(model).arrays if array.kind == "neurons"]
    parts = group_weights(arrays, [torch.arange(0, array.count, 3) for array in arrays], places)
    eight_bit = 0
    for part in parts:
        state = base.state[part.parameter]
        before = {name: zero_values(base, part.parameter, name).clone() for name in ("state1", "state2")}
        part.clear(base.state)
        for name, old in before.items():
            now = zero_values(base, part.parameter, name)
            gone = torch.zeros_like(now, dtype=torch.bool).index_fill_(part.dim, part.positions_P, True)
            assert not now[gone].any() and torch.equal(now[~gone], old[~gone]) and bool(old[gone].any())
            eight_bit += state[name].dtype == torch.uint8
    assert eight_bit >= 8


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 9:
            control.should_save = control.should_training_stop = True


def test_8_bit_training_resumes_exactly(tmp_path):
    pytest.importorskip("bitsandbytes")
    models = []
    for callbacks in ([], [StopAt()]):
        options = {"optim": "adamw_bnb_8bit", "learning_rate": 1e-3}
        trainer, _ = make(tmp_path / "run", tiny_model(BERT, **WIDE), callbacks=callbacks, **options)
        trainer.train()
        if callbacks:
            trainer, _ = make(tmp_path / "run", tiny_model(BERT, **WIDE), **options)
            trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
        models.append(trainer.model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_states_in_blocks_of_their_own_are_refused_by_name(optim, tmp_path):
    with pytest.raises(ValueError, match=f"`optim`='{optim}' is not supported by OTOTrainer: .* not laid out as the"):
        make(tmp_path / "run", optim=optim)
    assert list(tmp_path.iterdir()) == []


class Packed(torch.Tensor):
    """A tensor of a kind of its own, which says what it does not do as those do that hold blocks of packed entries."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.index_fill_ and cls is Packed:
            raise NotImplementedError(f"{cls.__name__} does not implement {func}.")
        return super().__torch_function__(func, types, args, kwargs)


class Named(Packed):
    """A tensor of a kind of its own that does all that a plain one does."""


class Packing(torch.optim.SGD):
    """An optimizer that keeps such tensors."""

    kind = Packed

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["packed"] = torch.ones_like(parameter.detach()).as_subclass(self.kind)


def test_a_state_of_which_no_part_can_be_cleared_is_refused_at_the_first_step():
    model = tiny_model(BERT)
    optimizer = HSPG(Packing(model.named_parameters(), lr=0.1), partition(model), CONFIG, STEPS)
    model(**question_batch(model, 0)).loss.backward()
    with pytest.raises(TypeError, match="`base_optimizer` Packing keeps a Packed for .*bert.* Use another optimizer"):
        optimizer.step()


def test_a_state_of_a_kind_of_its_own_that_can_be_cleared_is_taken():
    model = tiny_model(BERT)
    base = Packing(model.named_parameters(), lr=0.1)
    base.kind = Named
    optimizer = HSPG(base, partition(model), CONFIG, STEPS)
    model(**question_batch(model, 0)).loss.backward()
    optimizer.step()
    parameter = model.get_parameter(optimizer.partition.arrays[0].columns)
    assert bool(optimizer.state[parameter]["packed"].eq(1).all())  # to ask changes nothing
