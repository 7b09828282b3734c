"""What HSPG does with the rest of what it wraps: parameters that are no model's, and modes of the optimizer."""

import copy

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
