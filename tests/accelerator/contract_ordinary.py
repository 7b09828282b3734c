"""What people do with a model, an optimizer and a device, on any device: in loops of their own and beside Trainer."""

import contextlib
import copy
import gc
import io
import weakref

import pytest
import torch
from contract_models import CONFIG, STEPS, gradients
from families import counts, made_table, tiny_model, training_batch
from transformers import Adafactor, Trainer, TrainerCallback, TrainingArguments
from waiting import waits

from hf_oto import HSPG, OTOConfig, OTOTrainer, compress, partition, shrink
from hf_oto.config import LatencyTable
from hf_oto.training.distillation import Distiller

NAME = "BertForQuestionAnswering"
CPU = torch.device("cpu")


class Plain(torch.optim.AdamW):
    """Of which HSPG cannot know what it moves: it clears the zeros after every step."""


def made(model, base=torch.optim.AdamW, steps=STEPS, **settings):
    config = OTOConfig(**{**CONFIG.to_dict(), **settings})
    return HSPG(base(model.named_parameters(), lr=1e-3), partition(model), config, steps)


def trainer(
    model, folder, device, data=({},), teacher_model=None, kind=OTOTrainer, callbacks=(), steps=STEPS, **options
):
    place = {"use_cpu": device.type == "cpu", "dataloader_pin_memory": device.type == "cuda"}
    arguments = TrainingArguments(str(folder), max_steps=steps, report_to=[], **place, **options)
    own = {"oto_config": CONFIG, "teacher_model": teacher_model} if kind is OTOTrainer else {}
    return kind(model=model, args=arguments, train_dataset=list(data), callbacks=list(callbacks), **own)


def move(model, optimizer, device):
    """As it is done to make room: the weights, and the state that the base optimizer keeps for them."""
    model.to(device)
    for kept in optimizer.state.values():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.dim():
                kept[name] = value.to(device)


def draw_gradients(model, step, scale=1e-3):
    """Drawn ones, the same on every device: what they are of is none of an optimizer's business."""
    drawn = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = (torch.randn(parameter.shape, generator=drawn) * scale).to(parameter.device)


def run(model, optimizer, steps=STEPS, moves=None):
    for step in range(steps):
        if moves is not None and step in moves:
            move(model, optimizer, moves[step])
        draw_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("base", [torch.optim.AdamW, Plain])
@pytest.mark.parametrize("settings", [{}, {"target_sparsity": None, "lmbda": 300.0, "epsilon": 0.9}])
def test_weights_may_move_between_any_two_steps(settings, base, device):
    """There and back, in every stage."""
    expected = tiny_model(NAME, num_hidden_layers=2)
    run(expected, made(expected, base, **settings))
    for first in (1, 2, 4, 6):
        model = tiny_model(NAME, num_hidden_layers=2)
        optimizer = made(model, base, **settings)
        run(model, optimizer, moves={first: device, first + 1: CPU, first + 2: device})
        kept = [value for value in optimizer.param_groups[0].values() if isinstance(value, torch.Tensor)]
        assert len(kept) == 2 and {value.device for value in kept} == {device}
        model.to("cpu")
        assert optimizer.zero_masks(measured=True).keys() == optimizer.zero_masks().keys()
        assert counts(compress(model)) == counts(compress(expected))


def test_a_state_is_loaded_to_where_the_groups_are(device):
    """Whatever else the optimizer trains is elsewhere: embeddings that do not fit beside the rest."""
    model = tiny_model(NAME, num_hidden_layers=2)
    model.bert.encoder.to(device)
    optimizer = made(model)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(step, 1)  # a warm-up's first is 0
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer.load_state_dict(torch.load(file, map_location="cpu"))
        optimizer.step()
        if step == STEPS // 2:
            shrink(model, optimizer)
    assert optimizer.target_reached and optimizer.param_groups[0]["hspg_status"].device == device


# What is made without saying where or in which precision.


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "target": {},
    "random": {"saliency": "random"},
    "magnitude": {"saliency": "magnitude"},
    "interval": {"saliency_interval": 2},
    "uniform": {"uniform": True, "structures": ("neurons",)},
    "milestones": {"milestones": (0.3,)},
    "periods without a group": {"target_sparsity": 0.1, "pruning_periods": 9},
    "whole structures": {"target_unit": "latency", "min_heads": 0, "min_neurons": 0, "pruning_periods": 4},
    "published": {"target_sparsity": None, "lmbda": 300.0, "epsilon": 0.9},
}


def settings_of(name, model):
    """With a table by which a group alone saves nothing, where the target is in latency."""
    if "target_unit" not in SETTINGS[name]:
        return SETTINGS[name]
    groups = partition(model)
    price = {"heads": groups.dense_heads, "neurons": groups.dense_neurons}
    curves = {kind: [[0, 0], [1, 100_000], [count, 100_000 + count - 1]] for kind, count in price.items()}
    total = groups.num_layers * (200_000 + sum(price.values()) - 2) + 1000
    table = LatencyTable.from_dict(
        {**made_table(groups).to_dict(), **curves, "total": total, "method": "device events"}
    )
    assert table.goes_whole("heads") and table.goes_whole("neurons")
    return {**SETTINGS[name], "latency_table": table}


@pytest.mark.parametrize("name", SETTINGS)
def test_defaults_of_device_and_precision_change_nothing(name, device):
    """`torch.set_default_device`, a device as context, and half precision by default, as models are made under."""
    steps, found = 2 * STEPS, []
    for around in (contextlib.nullcontext, lambda: torch.device(device), lambda: default_dtype(torch.bfloat16)):
        model, masks = tiny_model(NAME, num_hidden_layers=2).to(device), []
        with around():
            optimizer = made(model, steps=steps, **settings_of(name, model))
        for step in range(steps):
            draw_gradients(model, step)
            with around():
                optimizer.step()
                optimizer.zero_grad()
                masks.append({place: mask.tolist() for place, mask in optimizer.zero_masks().items()})
                if optimizer.shrink_due and step % 2:
                    shrink(model, optimizer)
        with around():
            small = compress(model)
        found.append((counts(small), optimizer.param_groups[0]["hspg_saliency"], masks))
    for other in found[1:]:
        assert other[0] == found[0][0] and other[1].dtype == torch.float32 and other[2] == found[0][2]
        torch.testing.assert_close(other[1], found[0][1], rtol=1e-3, atol=1e-9)


# What the host waits for.


def is_ordinary(optimizer):
    """Whether the next step neither begins a run or a period nor ends one."""
    schedule, step = optimizer.schedule, optimizer.steps_done
    ends = (*(leg.boundaries[-1] for leg in schedule.legs), *(leg.start for leg in schedule.legs))
    if not step or schedule.starts_period(step) or step in ends:
        return False
    return optimizer.stage != "pruning" or schedule.steps_left(step) > 1


def adafactor(parameters, lr):
    return Adafactor(parameters, lr=lr, relative_step=False, scale_parameter=False)


# Of the base optimizer HSPG asks alone whether zeros stay, and clears them after every step where they may not: that
# goes by the stage and by what is zero, not by how groups were chosen.
BASES = {"AdamW": torch.optim.AdamW, "derived": Plain, "Adafactor": adafactor}
ORDINARY = [
    *((name, "AdamW") for name in SETTINGS),
    *((name, base) for name in ("target", "milestones", "published") for base in ("derived", "Adafactor")),
]


@pytest.mark.parametrize(("name", "base"), ORDINARY)
def test_no_ordinary_step_waits_for_the_device(name, base, device):
    model = tiny_model(NAME, num_hidden_layers=2).to(device)
    steps, stages = 60 if name == "periods without a group" else 30, set()  # of which one has three steps
    optimizer = made(model, BASES[base], steps=steps, **settings_of(name, model))
    draw_gradients(model, 0)
    while optimizer.steps_done < steps:
        ordinary, stage = is_ordinary(optimizer), optimizer.stage
        with waits(device) as noted:
            optimizer.observe()
            optimizer.step()
            due = optimizer.shrink_due
        if ordinary:
            stages.add(stage)
            assert not due and list(noted) == [], (name, stage, optimizer.steps_done)
    assert stages == {"warmup", *(("half-space",) if name == "published" else ("pruning", "recovery"))}


def test_the_scale_of_half_precision_is_not_waited_for(device, tmp_path, monkeypatch):
    """From the end of the backward pass until saliency is gathered."""
    model = tiny_model(NAME, num_hidden_layers=2)
    rows = training_batch(model, size=8)
    data = [{key: value[row] for key, value in rows.items()} for row in range(8)]
    taken = trainer(model, tmp_path, device, data, save_strategy="no", disable_tqdm=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    open_ones, noted = contextlib.ExitStack(), []
    step, observe = Trainer.training_step, HSPG.observe

    def stepping(*args, **kwargs):
        taken.accelerator.scaler = scaler  # not before: its own part of a step asks for float64
        loss = step(*args, **kwargs)
        noted.append(open_ones.enter_context(waits(device)))
        return loss

    def observing(*args, **kwargs):
        observe(*args, **kwargs)
        open_ones.close()

    monkeypatch.setattr(Trainer, "training_step", stepping)
    monkeypatch.setattr(HSPG, "observe", observing)
    taken.train()
    assert taken.hspg.target_reached and [list(one) for one in noted] == [[]] * STEPS


class Waiting(TrainerCallback):
    """How often the host waits in each step of a training, by whether HSPG's is an ordinary one."""

    def __init__(self, device):
        self.device, self.trainer, self.found = device, None, {True: [], False: []}

    def on_step_begin(self, *args, **kwargs):
        hspg = getattr(self.trainer, "hspg", None)
        self.ordinary, self.open = hspg is None or is_ordinary(hspg), contextlib.ExitStack()
        self.noted = self.open.enter_context(waits(self.device))

    def on_step_end(self, *args, **kwargs):
        self.open.close()
        self.found[self.ordinary].append(len(self.noted))


def test_a_trainings_step_waits_once_more_than_trainers(device, tmp_path):
    """To see whether the gradients' norm is a number, before they change the weights; a teacher's forward, again."""
    name = "BertForTokenClassification"
    rows = training_batch(tiny_model(name, num_hidden_layers=2), size=8)
    data, numbers = [{key: value[row] for key, value in rows.items()} for row in range(8)], []
    for kind, teacher in ((Trainer, None), (OTOTrainer, None), (OTOTrainer, tiny_model(name, seed=1))):
        watch = Waiting(device)
        options = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        model = tiny_model(name, num_hidden_layers=2)
        taken = trainer(model, tmp_path, device, data, teacher, kind=kind, callbacks=[watch], steps=20, **options)
        watch.trainer = taken
        taken.train()
        assert len(watch.found[True]) > 10
        numbers.append(set(watch.found[True]))
    (plain,), (pruned,), (taught,) = numbers
    inputs = {key: value.to(device) for key, value in rows.items()}
    with torch.no_grad(), waits(device) as forward:
        taken.model(**inputs)
    assert device.type == "cpu" or (pruned, taught) == (plain + 1, plain + 1 + len(forward))


# What is learnt from a teacher.

ORDERS = {0: "no", 1: "maybe", 2: "yes"}, {0: "YES", 1: "NO", 2: "MAYBE"}


@pytest.mark.parametrize("name", ["RobertaForSequenceClassification", "BertForTokenClassification", NAME])
def test_a_teacher_teaches_as_on_the_cpu_and_only_its_forward_waits(name, device):
    """Its classes may be in another order."""
    names = ORDERS if name != NAME else ({0: "start", 1: "end"},) * 2
    models = [
        tiny_model(name, seed=seed, id2label=dict(one), label2id={value: key for key, value in one.items()}).eval()
        for seed, one in enumerate(names)
    ]
    losses = []
    for place in (CPU, device):
        student, teacher = (copy.deepcopy(model).to(place) for model in models)
        distiller = Distiller(teacher, OTOConfig(distillation_weight=0.5, distillation_hidden_weight=0.5))
        inputs = {key: value.to(place) for key, value in training_batch(student, size=4).items()}
        if name.endswith("SequenceClassification"):
            inputs["labels"] = inputs["labels"][:, 0]
        outputs = student(**inputs, output_hidden_states=True)
        losses.append(distiller(student, outputs, inputs)[0])
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-4, atol=0)
    with waits(device) as forward:
        distiller.ask(student, inputs)
    with waits(device) as noted:
        distiller(student, outputs, inputs)
    assert len(noted) == len(forward)


# What stays in memory.


def test_nothing_of_full_size_outlives_a_shrink(device):
    model = tiny_model(NAME, num_hidden_layers=2).to(device)
    optimizer = made(model)
    whole = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    states = []
    for step in range(STEPS):
        gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            states = [
                (name, weakref.ref(value))
                for name, ref in whole.items()
                for value in optimizer.state[ref()].values()
                if value.dim()
            ]
        if optimizer.shrink_due:
            shrink(model, optimizer)
    gc.collect()
    now = dict(model.named_parameters())
    cut = {name for name, ref in whole.items() if ref() is not now.get(name)}
    assert len(cut) > 8 and {name for name, ref in whole.items() if ref() is None} == cut
    assert states and {name for name, ref in states if ref() is None} == cut


# Where weights may not be.


def test_a_model_on_two_devices_is_refused_before_the_first_step(device, tmp_path):
    model = tiny_model(NAME, num_hidden_layers=2)
    model.bert.encoder.layer[1].to(device)
    said = "must be on one device, got '.*' on cpu and '.*' on .*Load it without `device_map`"
    for use in (compress, lambda model: trainer(model, tmp_path / "run", device)):
        with pytest.raises(ValueError, match=f"`model` {said}"):
            use(model)
    around = torch.nn.Module()  # of one's own, with what is pruned on one device and its head on the other
    around.encoder, around.head = tiny_model("BertModel", num_hidden_layers=1), torch.nn.Linear(32, 2).to(device)
    with pytest.raises(ValueError, match=f"`model` {said}"):
        trainer(around, tmp_path / "run", device)
    with pytest.raises(ValueError, match=f"`teacher_model` {said}"):
        trainer(tiny_model(NAME, num_hidden_layers=2), tmp_path / "run", device, teacher_model=model)
    assert not (tmp_path / "run").exists()
    before = copy.deepcopy(model.state_dict())
    optimizer = made(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="zero-invariant groups must be on one device, got '.*layer.0.* on cpu and"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
