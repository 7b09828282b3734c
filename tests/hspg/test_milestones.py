"""HSPG with milestones in a loop of one's own: every size on time and within its budget, and every stop resumes."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from families import ONE_EACH, counts, largest_difference, outputs, tiny_model, training_batch
from runs import NO_DROPOUT, differences

from hf_oto import HSPG, OTOConfig, compress, partition, shrink
from hf_oto.hspg.budget import dense_cost, removed_cost
from hf_oto.hspg.saved_state import SETTINGS

STEPS = 24  # legs end after 16 and 24: 2 of warm-up, periods end after 6, 10, 18, 20
CONFIG = OTOConfig(
    target_sparsity=0.6, milestones=(0.3,), min_neurons=4, round_to=4, pruning_periods=2, sequence_length=16
)


def begin(config):
    model = tiny_model(ONE_EACH[0], **NO_DROPOUT)
    base = torch.optim.AdamW(model.named_parameters(), lr=3e-3)
    return model, HSPG(base, partition(model), config, STEPS)


def train(model, optimizer, steps, due=None):
    for step in range(optimizer.steps_done, steps):
        model(**training_batch(model, size=4, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.config.shrink_during_training and optimizer.shrink_due:
            shrink(model, optimizer)
        if due is not None and optimizer.milestone_due is not None:
            due[optimizer.milestone_due] = optimizer.steps_done, optimizer.metrics(), compress(model)


@pytest.mark.parametrize(
    "settings",
    [{}, {"shrink_during_training": True}, {"uniform": True, "structures": ("neurons",)}, {"target_unit": "macs"}],
    ids=str,
)
def test_each_size_is_finished_when_its_recovery_ends(settings):
    config, due = replace(CONFIG, **settings), {}
    model, optimizer = begin(config)
    train(model, optimizer, STEPS, due)
    assert [(share, step) for share, (step, _, _) in due.items()] == [(0.3, 16), (0.6, 24)]
    for share, (_, _, small) in due.items():
        groups = partition(small)
        total = dense_cost(groups, config)
        gone = removed_cost(groups, config, [array.count for array in groups.arrays]) / total
        coarsest = 0.12 if not config.uniform else 0.17  # a head, or four neurons of every block
        assert share - coarsest < gone <= share
        blocks = counts(small)
        assert not config.uniform or len(set(blocks)) == 1
    assert [metrics["milestone"] for _, metrics, _ in due.values()] == [0.6, 0.6]  # the next one, and the last
    assert largest_difference(outputs(model), outputs(due[0.6][2])) <= 1e-5


@pytest.mark.parametrize("stop", [1, 4, 6, 12, 16, 17, 20, 22])
def test_every_stop_resumes_to_the_bit(stop):
    """In warm-up, in both legs' pruning and recovery, and at the milestone."""
    model, optimizer = begin(CONFIG)
    train(model, optimizer, stop)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, STEPS)
    again, resumed = begin(CONFIG)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(again, resumed, STEPS)
    assert differences(dict(again.state_dict()), dict(model.state_dict())) == []
    assert resumed.metrics() == optimizer.metrics() and resumed.target_reached


def test_a_milestone_that_the_model_has_behind_it_is_refused():
    due = {}
    train(*begin(CONFIG), STEPS, due)
    model = due[0.3][2]
    base = torch.optim.AdamW(model.named_parameters())
    with pytest.raises(ValueError, match=r"`milestones`=\(0.3,\): 0.3 of the dense model's params is removed already"):
        HSPG(base, partition(model), CONFIG, STEPS)
    HSPG(base, partition(model), replace(CONFIG, milestones=(0.45,)), STEPS)


@pytest.mark.parametrize(
    ("milestones", "low", "high"), [((0.3, 0.301, 0.5), 0.3, 0.301), ((0.3, 0.59), 0.59, 0.6), ((0.595,), 0.595, 0.6)]
)
def test_sizes_between_which_no_cut_fits_are_refused(milestones, low, high):
    """Four neurons of a block, 260 of the 17,256 weights, are the least that goes."""
    rule = (
        rf"from {low} to {high} of params is less than the smallest cut takes, 0.0151, so that two sizes would be one"
    )
    with pytest.raises(ValueError, match=rule):
        begin(replace(CONFIG, milestones=milestones))
    begin(replace(CONFIG, milestones=(0.3, 0.584)))
    neurons = {"uniform": True, "structures": ("neurons",)}  # of every block, a sixth of all neurons
    begin(replace(CONFIG, milestones=(0.25, 0.43), **neurons))
    with pytest.raises(ValueError, match="from 0.3 to 0.46 of params is less than the smallest cut takes, 0.1667"):
        begin(replace(CONFIG, milestones=(0.3, 0.46), **neurons))


def test_another_runs_milestones_are_refused():
    _, optimizer = begin(CONFIG)
    _, other = begin(replace(CONFIG, milestones=()))
    with pytest.raises(ValueError, match=r"other settings \(milestones: \[0.3\] saved, \[\] now\)"):
        other.load_state_dict(optimizer.state_dict())


def test_a_state_from_before_there_were_milestones_is_of_a_run_without():
    _, optimizer = begin(replace(CONFIG, milestones=()))
    state = copy.deepcopy(optimizer.state_dict())
    settings = json.loads(state["param_groups"][0][SETTINGS])
    del settings["milestones"]
    state["param_groups"][0][SETTINGS] = json.dumps(settings)
    begin(replace(CONFIG, milestones=()))[1].load_state_dict(copy.deepcopy(state))
    with pytest.raises(ValueError, match=r"other settings \(milestones: \[\] saved, \[0.3\] now\)"):
        begin(CONFIG)[1].load_state_dict(state)
