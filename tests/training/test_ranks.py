"""Two real processes, or four: every rank holds the same masks, those of one process on the same global batch."""

import functools

import pytest
import ranks
import torch
from families import ONE_EACH, counts, largest_difference, outputs, removed_and_next, tiny_model
from launching import Launches, shared_folder
from ranks import GLOBAL_BATCH, names, plan, taught_rows, uneven
from transformers import AutoModelForQuestionAnswering

from hf_oto import partition
from hf_oto.hspg import budget
from hf_oto.hspg.optimizer import KEPT, ZERO
from hf_oto.hspg.schedule import Schedule
from hf_oto.models.groups import zero_groups
from hf_oto.training.distillation import divergence

pytestmark = pytest.mark.slow


LAUNCHES = {"ddp,fsdp,fsdp_blocks,shrinking,taught,trainer,unequal": 2, "ddp4": 4}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What each rank held."""
    launches = Launches(ranks, LAUNCHES, shared_folder(tmp_path_factory, "ranks"))

    def found(mode, name=None, rank=0):
        launches.done(mode)
        file = "-".join(str(part) for part in (mode, name, rank) if part is not None)
        return torch.load(launches.folder / f"{file}.pt", weights_only=True)

    found.folder = launches.folder
    return found


@functools.cache
def alone(name):
    """What one process holds: this one."""
    return ranks.run(name, "single", 0, 1)


@pytest.mark.parametrize(
    ("mode", "name"),
    [(mode, name) for mode in ("ddp", "fsdp", "fsdp_blocks") for name in names(mode)],
)
def test_ranks_agree_with_each_other_and_with_one_process(ran, mode, name):
    agree(ran, mode, name)


def test_four_ranks_agree_with_each_other_and_with_one_process(ran):
    for name in ONE_EACH:
        agree(ran, "ddp4", name)


def agree(ran, mode, name):
    first, *others = (ran(mode, name, rank) for rank in range(4 if mode == "ddp4" else 2))
    single = alone(name)
    for other in others:
        assert torch.equal(first["status"], other["status"])  # at every step
        assert torch.equal(first["saliency"], other["saliency"])
        assert all(torch.equal(first["weights"][key], other["weights"][key]) for key in first["weights"])

    config, steps = plan(name)
    start = Schedule.from_config(config, steps).boundaries[0]
    assert not (single["status"][start - 1] != KEPT).any() and (single["status"][start] != KEPT).any()
    assert torch.equal(first["status"][: start + 1], single["status"][: start + 1])

    # What is marked zero is zero, and the target is met with nothing that would still fit.
    model = tiny_model(name, **uneven(name))
    model.load_state_dict(first["weights"])
    groups, parameters = partition(model), dict(model.named_parameters())
    zero = {(array.layer, array.kind): zero_groups(array, parameters) for array in groups.arrays}
    assert torch.equal(torch.cat(list(zero.values())), first["status"][-1] == ZERO)
    removed, cheapest = removed_and_next(groups, config, zero)
    half = budget.dense_cost(groups, config) / 2
    assert half - cheapest < removed <= half


def test_the_global_batch_is_split():
    assert GLOBAL_BATCH % 4 == 0  # or the mean over the ranks is not that over the batch


def test_ranks_that_shrink_agree_with_those_that_do_not(ran):
    first, second = ran("shrinking", True, 0), ran("shrinking", True, 1)
    assert first["cuts"] == second["cuts"] and len(first["cuts"]) > 2
    full = ran("shrinking", False)["weights"]
    assert first["weights"].keys() == full.keys()
    for key, expected in full.items():
        assert torch.equal(first["weights"][key], second["weights"][key])
        assert torch.allclose(first["weights"][key], expected, rtol=0, atol=1e-7)  # float64, and Adam's ε of 1e-8


@pytest.mark.parametrize("average", [True, False])
def test_ranks_that_are_taught_take_the_step_of_one_process(ran, average):
    """Over all labels; or, where their numbers are not averaged, the mean of the ranks' own steps."""
    first, second = (ran("taught", average, rank) for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    model = tiny_model("BertForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    teacher = tiny_model("BertForMaskedLM", seed=5)
    rows = taught_rows()
    shares = [rows] if average else [rows[0:4] + rows[8:12], rows[4:8] + rows[12:16]]  # a rank's batches of four
    losses = []
    for share in shares:
        batch = {key: torch.stack([row[key] for row in share]) for key in rows[0]}
        labels = batch.pop("labels")
        counted = labels != -100
        ours, theirs = model(**batch).logits[counted], teacher(**batch).logits[counted].detach()
        own = torch.nn.functional.cross_entropy(ours, labels[counted])
        losses.append(0.5 * own + 0.5 * divergence(ours, theirs, 2.0).mean())
    torch.stack(losses).mean().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(first[key], parameter.detach() - parameter.grad, rtol=1e-4, atol=2e-6)


def test_ranks_whose_batches_differ_choose_the_same_groups(ran):
    first, second = (ran("unequal", rank=rank) for rank in range(2))
    assert (first["rows"], second["rows"]) == ([2] * 24, [2, 2, 2, 1] * 6)
    assert torch.equal(first["saliency"], second["saliency"])
    assert torch.equal(first["status"], second["status"]) and (first["status"][-1] == ZERO).any()


def test_trainer_on_two_ranks_saves_once_what_both_hold(ran):
    first, second = (ran("trainer", rank=rank) for rank in (0, 1))
    assert torch.equal(first["status"], second["status"]) and (first["status"] == ZERO).any()
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])
    assert {path.name for path in (ran.folder / "run").glob("checkpoint-*")} == {"checkpoint-12", "checkpoint-24"}
    assert not [path for path in ran.folder.iterdir() if path.name.startswith(".")]
    full = tiny_model(ONE_EACH[0])
    full.load_state_dict(first["weights"])
    small = AutoModelForQuestionAnswering.from_pretrained(ran.folder / "run")
    assert counts(small) != counts(full) and type(small).__name__ == f"OTO{ONE_EACH[0]}"
    assert largest_difference(outputs(small), outputs(full)) <= 1e-5
