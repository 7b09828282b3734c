"""What HSPG does with the rest of what it wraps: parameters that are no model's, and modes of the optimizer."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from families import ONE_EACH, question_batch, tiny_model

from hf_oto import HSPG, OTOConfig, partition

CONFIG = OTOConfig(min_neurons=4, round_to=4, pruning_periods=2)
STEPS = 12


def with_weights_of_a_loss(seed=0):
    """A model, two weights of its loss in a group of their own, and HSPG around both."""
    model, own = tiny_model(ONE_EACH[0], seed=seed), torch.nn.Parameter(torch.ones(2))
    groups = [
        {"params": list(model.named_parameters()), "lr": 3e-3},
        {"params": [("loss.weights", own)], "lr": 1e-2, "weight_decay": 0.5},
    ]
    return model, own, HSPG(torch.optim.AdamW(groups), partition(model), CONFIG, STEPS)


def step(model, own, optimizer, seed):
    outputs = model(**question_batch(model, seed))
    (outputs.loss * own.square().sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_parameters_that_are_not_the_models_take_the_base_optimizers_step():
    model, own, optimizer = with_weights_of_a_loss()
    alone = torch.nn.Parameter(torch.ones(2))
    twin = torch.optim.AdamW([alone], lr=1e-2, weight_decay=0.5)
    for seed in range(STEPS):
        loss = model(**question_batch(model, seed)).loss
        (loss.detach() * alone.square().sum()).backward()
        twin.step()
        twin.zero_grad()
        step(model, own, optimizer, seed)
        assert torch.equal(own, alone)
    assert optimizer.target_reached and not torch.equal(own, torch.ones(2))


def test_they_are_resumed_with_the_rest():
    model, own, optimizer = with_weights_of_a_loss()
    for seed in range(5):
        step(model, own, optimizer, seed)
    saved = copy.deepcopy((model.state_dict(), own.data, optimizer.state_dict()))
    other, theirs, resumed = with_weights_of_a_loss(seed=1)
    other.load_state_dict(saved[0])
    theirs.data.copy_(saved[1])
    resumed.load_state_dict(saved[2])
    for seed in range(5, STEPS):
        step(model, own, optimizer, seed)
        step(other, theirs, resumed, seed)
    assert torch.equal(own, theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


class TwoModes(torch.optim.SGD):
    mode = None

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


@pytest.mark.parametrize("prepared", [False, True])
def test_modes_of_the_base_optimizer_are_its_own(prepared):
    """As of optimizers without a schedule, whose weights are others for evaluation: Trainer asks what it holds."""
    model = tiny_model(ONE_EACH[0])
    base = TwoModes(model.named_parameters(), lr=0.1)
    optimizer = HSPG(base, partition(model), CONFIG, STEPS)
    if prepared:
        optimizer = Accelerator(cpu=True).prepare(optimizer)
    optimizer.eval()
    assert base.mode == "eval"
    optimizer.train()
    assert base.mode == "train"
    plain = HSPG(torch.optim.SGD(model.named_parameters(), lr=0.1), partition(model), CONFIG, STEPS)
    plain.train()
    plain.eval()


# What is not one step of a run, or not of this one.


def begun(config=CONFIG, steps=STEPS):
    model = tiny_model(ONE_EACH[0])
    return model, HSPG(torch.optim.AdamW(model.named_parameters(), lr=3e-3), partition(model), config, steps)


def take(model, optimizer, steps):
    for seed in range(steps):
        model(**question_batch(model, seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_optimizer_whose_step_is_not_one_of_the_run_is_refused():
    model, optimizer = begun()
    other = tiny_model(ONE_EACH[-1])
    names = [(f"other.{name}", parameter) for name, parameter in other.named_parameters()]
    for wrong, rule in [
        (model.named_parameters(), "must be a torch.optim.Optimizer, such as AdamW, got generator"),
        (optimizer, "is an HSPG already, which prunes one model. Give each model an optimizer of its own"),
        # Which takes no step while gradients accumulate, and then counts more of them than there were.
        (Accelerator(cpu=True).prepare(torch.optim.AdamW(model.named_parameters())), "got accelerate's Accelerated"),
        (torch.optim.LBFGS(model.named_parameters()), "LBFGS computes the loss anew within a step, by a `closure`"),
    ]:
        with pytest.raises(TypeError, match=f"`base_optimizer` .*{rule}|`base_optimizer` {rule}"):
            HSPG(wrong, partition(model), CONFIG, STEPS)
    optimizer.add_param_group({"params": names})
    take(model, optimizer, STEPS)
    assert optimizer.target_reached


def test_names_with_something_before_them_are_told():
    """As the parameters of a model around the one with the groups have, and of one that was compiled or wrapped."""
    around = torch.nn.ModuleDict({"encoder": tiny_model(ONE_EACH[0])})
    names = "has 'encoder.bert.*', where the groups have 'bert.encoder.layer.0.attention.self.query.weight'"
    with pytest.raises(ValueError, match=f"`base_optimizer` {names}: names must be those of the model"):
        HSPG(torch.optim.AdamW(around.named_parameters()), partition(around["encoder"]), CONFIG, STEPS)


def test_an_optimizer_with_the_steps_of_another_run_is_refused():
    """As where a notebook makes HSPG anew with another target: it would go on from the last step of the first run."""
    model, optimizer = begun(replace(CONFIG, target_sparsity=0.3))
    base, groups = optimizer.base_optimizer, partition(model)
    again = HSPG(base, groups, CONFIG, STEPS + 1)  # nothing has happened yet
    take(model, again, 4)
    saved = copy.deepcopy(again.state_dict())
    for config, steps, changed in [
        (replace(CONFIG, target_sparsity=0.7), STEPS + 1, "target_sparsity: 0.5 saved, 0.7"),
        (CONFIG, STEPS, "total_steps: 13 saved, 12 now"),
    ]:
        rule = rf"`base_optimizer` has 4 steps of another run in it: .* \({changed}.* Or make the optimizer anew"
        with pytest.raises(ValueError, match=rule):
            HSPG(base, groups, config, steps)
    other = torch.optim.AdamW(tiny_model(ONE_EACH[0]).named_parameters())
    other.load_state_dict(saved)
    assert HSPG(other, groups, CONFIG, STEPS + 1).steps_done == 4


def test_parameters_that_would_be_taken_for_those_of_groups_are_not_added():
    model, optimizer = begun()
    with pytest.raises(ValueError, match="more than once .*names of their own"):
        optimizer.add_param_group({"params": list(tiny_model(ONE_EACH[0], seed=1).named_parameters())})
    assert len(optimizer.param_groups) == 1
    take(model, optimizer, STEPS)
    assert optimizer.metrics()["removed_params"] > 0.4


@pytest.mark.parametrize("target", [0.5, None])
def test_what_is_frozen_after_all_is_not_pruned(target):
    """Without gradients it would be worth nothing, and go first. Until groups go, blocks may thaw one by one."""
    model, optimizer = begun(replace(CONFIG, target_sparsity=target))
    block = model.bert.encoder.layer[0]
    before = copy.deepcopy(block.state_dict())
    block.requires_grad_(False)
    first = optimizer.schedule.boundaries[0] if target else 0
    take(model, optimizer, first)
    rule = rf"10 parameters .* are frozen at step {first} \('bert.encoder.layer.0.attention.self.query.weight'"
    with pytest.raises(ValueError, match=rule):
        take(model, optimizer, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    block.requires_grad_(True)
    optimizer.zero_grad()
    take(model, optimizer, 1)
    while target and optimizer.stage != "recovery":
        take(model, optimizer, 1)
    block.requires_grad_(False)
    take(model, optimizer, 1)
