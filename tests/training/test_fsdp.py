"""FSDP2 in real processes: layouts, checkpoints on any number of ranks, and the whole model out of its shards."""

import json
from importlib.util import find_spec

import fsdp_ranks
import pytest
import torch
from families import counts, largest_difference, outputs, removed_and_next, tiny_model
from launching import Launches, shared_folder
from transformers import AutoModelForQuestionAnswering, TrainingArguments

from hf_oto import OTOTrainer, partition
from hf_oto.hspg import budget
from hf_oto.hspg.optimizer import ZERO
from hf_oto.models.groups import zero_groups

pytestmark = pytest.mark.slow


LAUNCHES = {"bare,gathered,refused,trainer": 2, "resumed": 4}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What each rank held."""
    launches = Launches(fsdp_ranks, LAUNCHES, shared_folder(tmp_path_factory, "fsdp"))

    def found(mode, rank=0, ranks=2):
        if mode == "resumed":
            launches.done("bare")  # whose checkpoints they are
        launches.done(mode)
        return torch.load(launches.folder / f"{mode}-{ranks}-{rank}.pt", weights_only=True)

    found.folder = launches.folder
    return found


def same(actual, expected):
    return actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


def without_history(found):
    return {key: value for key, value in found.items() if key != "history"}


def removed_exactly(model, marked):
    """What is marked zero is zero, and the target is met with nothing that would still fit."""
    groups, parameters = partition(model), dict(model.named_parameters())
    zero = {(array.layer, array.kind): zero_groups(array, parameters) for array in groups.arrays}
    assert torch.equal(torch.cat(list(zero.values())), marked)
    removed, cheapest = removed_and_next(groups, fsdp_ranks.CONFIG, zero)
    half = budget.dense_cost(groups, fsdp_ranks.CONFIG) / 2
    assert half - cheapest < removed <= half


def pruned_to_the_target(held):
    """The full-size model of a run, in which what the run says is zero is, and is as much as it should be."""
    model = tiny_model(fsdp_ranks.NAME, **fsdp_ranks.SIZES)
    model.load_state_dict({key: held[key] for key in model.state_dict()})
    removed_exactly(model, held["history"][-1] == ZERO)
    return model


@pytest.mark.parametrize("layout", fsdp_ranks.LAYOUTS)
def test_every_layout_meets_the_target_on_all_ranks(ran, layout):
    first, second = ran("bare", 0)[layout], ran("bare", 1)[layout]
    assert same(first, second)
    pruned_to_the_target(first)


def test_what_is_kept_after_forward_changes_nothing(ran):
    assert same(ran("bare")["kept"], ran("bare")["blocks"])


def test_saving_changes_nothing_and_every_stop_resumes_to_the_bit(ran):
    for rank in (0, 1):
        found = ran("bare", rank)
        for (base, config), stops in fsdp_ranks.STOPS.items():
            name = fsdp_ranks.run_name(base, config)
            assert same(found[f"{name}-saved"], found[name]), name
            for kind, steps in stops.items():
                for step in steps:
                    resumed = found[f"{name}-{kind}-{step}"]
                    assert same(without_history(resumed), without_history(found[name])), (name, kind, step)
                    assert torch.equal(resumed["history"], found[name]["history"][step:])


@pytest.mark.parametrize("ranks", [1, 4])
def test_another_number_of_ranks_goes_on_from_the_same_checkpoints(ran, ranks):
    expected = ran("bare")[fsdp_ranks.run_name("AdamW", fsdp_ranks.CONFIG)]
    found = [ran("resumed", rank, ranks) for rank in range(ranks)]
    assert len(found[0]) == (3 if ranks == 4 else 2)
    for key in found[0]:
        assert all(same(other[key], found[0][key]) for other in found)
        step = int(key.rpartition("-")[2])
        assert torch.equal(found[0][key]["history"], expected["history"][step:])
        for name, value in without_history(expected).items():
            # float64, in sums of another order; Adam's ε of 1e-8 enlarges what is nothing but rounding.
            assert torch.allclose(found[0][key][name], value, rtol=0, atol=1e-7), name


def test_a_gathered_model_is_cut_and_loads(ran):
    expected = ran("gathered")["weights"]
    full = tiny_model(fsdp_ranks.NAME, **fsdp_ranks.SIZES)
    full.load_state_dict({key: expected[key] for key in full.state_dict()})
    small = AutoModelForQuestionAnswering.from_pretrained(ran.folder / "small")
    assert counts(small) != counts(full)
    assert largest_difference(outputs(small), outputs(full)) <= 1e-5


def test_only_the_first_rank_ever_holds_a_whole_model(ran):
    first, second = ran("gathered", 0), ran("gathered", 1)
    assert 0.5 < first["more"] / first["bytes"] < 1.4
    assert second["more"] < 0.5 * second["bytes"]


@pytest.mark.parametrize("way", ["full", "sharded", "loaded"])
def test_trainer_saves_once_what_all_ranks_hold(ran, way):
    first, second = ran("trainer", 0)[way], ran("trainer", 1)[way]
    assert same(first, second)
    full = pruned_to_the_target(first)
    small = AutoModelForQuestionAnswering.from_pretrained(ran.folder / way)
    assert counts(small) != counts(full) and type(small).__name__ == f"OTO{fsdp_ranks.NAME}"
    assert largest_difference(outputs(small), outputs(full)) <= 1e-5
    assert not [path for path in ran.folder.iterdir() if path.name.startswith(".")]


def test_trainer_keeps_the_best_model_of_a_milestone_and_goes_on_from_the_last(ran):
    """The largest loss is taken for the best: that of the first step of the recovery, the fifth of the run."""
    first, second = ran("trainer", 0)["milestone"], ran("trainer", 1)["milestone"]
    for seen in (first, second):
        assert same(seen["saved 9"], seen[9])
    place = ran.folder / "milestone" / "0.25"
    step = json.loads((place / "milestone.json").read_text())["step"]
    full = tiny_model(fsdp_ranks.NAME, **fsdp_ranks.SIZES)
    full.load_state_dict(first[step])
    assert step == 5
    assert largest_difference(outputs(AutoModelForQuestionAnswering.from_pretrained(place)), outputs(full)) <= 1e-5


def test_trainer_saves_the_familys_own_class_where_blocks_are_alike(ran):
    first, second = ran("trainer", 0)["uniform"], ran("trainer", 1)["uniform"]
    assert same(first, second)
    full = tiny_model(fsdp_ranks.NAME, **fsdp_ranks.SIZES)
    full.load_state_dict({key: first[key] for key in full.state_dict()})
    small = AutoModelForQuestionAnswering.from_pretrained(ran.folder / "uniform")
    assert type(small) is type(full) and not list((ran.folder / "uniform").glob("*.py"))
    assert counts(small) == [(3, 18)] * 2  # half of 33 neurons in threes
    assert largest_difference(outputs(small), outputs(full)) <= 1e-5


def test_zeros_that_are_written_to_on_one_rank_stop_every_rank(ran):
    said = [ran("trainer", rank)["written"] for rank in (0, 1)]
    assert said[0] == said[1]
    assert f"neurons that were zero are not any more at step {fsdp_ranks.STEPS - 2}" in said[0]


@pytest.mark.parametrize("way", ["full", "sharded"])
def test_trainer_resumes_to_the_bit(ran, way):
    for rank in (0, 1):
        whole, resumed = ran("trainer", rank)[way], ran("trainer", rank)[f"{way}-resumed"]
        assert same(without_history(resumed), without_history(whole))
        assert torch.equal(resumed["history"], whole["history"][5:])
    expected = {f"checkpoint-{step}" for step in (5, 10, fsdp_ranks.STEPS)}
    assert {path.name for path in (ran.folder / way).glob("checkpoint-*")} == expected


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("tensor parallel", "Shard(dim=1),) on DeviceMesh((2,), 'cpu', stride=(1,)), as tensor parallelism places"),
        ("tensor parallel and FSDP2", "as tensor parallelism places weights, which HSPG does not support"),
        ("one block", "20 of 30 are whole ('bert.encoder.layer.1.attention.self.query.weight', …)"),
        ("one block, later", "Call `fully_shard` on the whole model"),
        ("gather a whole one", "`model` must be sharded"),
        ("compress a sharded one", "`model` must be whole, got one that is spread over ranks. Pass what `gather`"),
        ("sum up a sharded one", "`model` must be whole, got one that is spread over ranks. Pass what `gather`"),
        ("fsdp on the CPU", "`fsdp` is not supported on the CPU: accelerate ignores it there"),
        ("fsdp on the CPU, by the launcher", "`fsdp` is not supported on the CPU: accelerate ignores it there"),
        ("FSDP1", "FSDP1 is not supported by OTOTrainer"),
        ("FSDP1, by the launcher", "FSDP1 is not supported by OTOTrainer"),
        ("activation", "`fsdp_config` with 'activation_checkpointing' is not supported by OTOTrainer"),
        ("XLA", "`fsdp_config` with 'xla' is not supported by OTOTrainer"),
        ("a push", "`push_to_hub` is not supported with a sharded model"),
        ("tensor parallel Trainer", "`parallelism_config` with tp_size=2 is not supported by OTOTrainer"),
        ("context parallel Trainer", "`parallelism_config` with cp_size=2 is not supported by OTOTrainer"),
        ("tensor parallel model", "as tensor parallelism places weights"),
    ],
)
def test_what_cannot_be_handled_is_refused_on_every_rank(ran, case, says):
    assert all(says in ran("refused", rank)[case] for rank in (0, 1))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_is_refused_by_name(stage, tmp_path):
    settings = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 2}
    plain = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": []}
    if find_spec("deepspeed"):
        args = TrainingArguments(deepspeed=settings, **plain)
    else:  # which the arguments ask for, when they are made with these settings
        args = TrainingArguments(**plain)
        args.deepspeed = settings
    with pytest.raises(ValueError, match="`deepspeed` is not supported by OTOTrainer: ZeRO-1, ZeRO-2 and ZeRO-3 keep"):
        OTOTrainer(model=tiny_model(fsdp_ranks.NAME), args=args)
    assert not (tmp_path / "run").exists()
