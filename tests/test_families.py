"""What the longer tests show for the first families, in short for every other: training, and shrinking."""

import pytest
import torch
from families import EVERY, ONE_EACH, batch, counts, largest_difference, outputs, removed_and_next, tiny_model
from torch import Tensor

from hf_oto import HSPG, OTOConfig, compress, shrink
from hf_oto.budget import allowance, dense_cost
from hf_oto.groups import partition

STEPS = 12
CONFIG = OTOConfig(target_sparsity=0.5, min_heads=0, min_neurons=0, round_to=2, pruning_periods=3)
OTHERS = [name for name in EVERY if name not in ONE_EACH]


def train(model, shrinking=False):
    """Some steps on the squares of all that the model gives; in evaluation mode, without dropout."""
    optimizer = HSPG(torch.optim.AdamW(model.named_parameters(), lr=3e-3), partition(model), CONFIG, STEPS)
    for step in range(STEPS):
        found = model(**batch(model, seed=step)).values()
        loss = sum(value.square().mean() for value in found if isinstance(value, Tensor) and value.requires_grad)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if shrinking and optimizer.shrink_due:
            shrink(model, optimizer)
    return optimizer


@pytest.mark.parametrize("name", OTHERS)
def test_training_meets_the_target_and_goes_on_in_a_shrunk_model(name):
    full = tiny_model(name).double()
    groups, before = partition(full), outputs(full)
    optimizer = train(full)
    removed, cheapest = removed_and_next(groups, CONFIG, optimizer.zero_masks())
    budget = allowance(0.5, dense_cost(groups, CONFIG))
    assert budget - cheapest < removed <= budget
    assert largest_difference(outputs(full), before) > 1e-2
    small = compress(full)
    assert largest_difference(outputs(small), outputs(full)) <= 1e-5

    model = tiny_model(name).double()
    optimizer = train(model, shrinking=True)
    assert counts(model) == counts(small) and type(model) is type(small)
    # In float64 the order of sums leaves 1e-13 after a step, which twelve of them let grow.
    assert largest_difference(outputs(model), outputs(small)) <= 1e-8
    again = tiny_model(name).double()
    shrink(again, HSPG(torch.optim.AdamW(again.named_parameters()), groups, CONFIG, STEPS), like=model.config)
    again.load_state_dict(model.state_dict())
    assert largest_difference(outputs(again), outputs(model)) <= 1e-12


@pytest.mark.parametrize("name", OTHERS)
def test_no_group_is_without_a_gradient(name):
    model = tiny_model(name)
    found = model(**batch(model)).values()
    sum(value.square().sum() for value in found if isinstance(value, Tensor) and value.requires_grad).backward()
    parameters = dict(model.named_parameters())
    for array in partition(model).arrays:
        for owned in array.owned:
            if not owned.name.endswith("bias"):  # softmax takes no notice of a key's bias
                assert parameters[owned.name].grad.abs().sum() > 0, owned.name
