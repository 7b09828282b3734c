"""Budget: what a group costs, and that a target is met: never over, and under by less than what would still fit."""

import dataclasses
from fractions import Fraction

import pytest
import torch
import transformers
from families import made_table, tiny_model, zero_uneven
from hypothesis import given
from hypothesis import strategies as st

from hf_oto.config import OTOConfig
from hf_oto.hspg.budget import (
    allowance,
    check_target,
    dense_cost,
    floor_and_multiple,
    group_cost,
    reach,
    removable_groups,
    removal_costs,
    removed_cost,
    select_groups,
)
from hf_oto.hspg.schedule import Schedule
from hf_oto.hspg.selection import target_examples
from hf_oto.models.groups import GroupArray, Partition, partition
from hf_oto.models.surgery import compress


def made_up(layers=2, heads=4, head_size=8, neurons=24, left=None):
    """A partition without a model; `left` gives (heads, neurons) block by block."""
    left = left or [(heads, neurons)] * layers
    arrays = [
        GroupArray(layer, kind, count, head_size if kind == "heads" else 1, (), "columns", ())
        for layer, counts in enumerate(left)
        for kind, count in zip(("heads", "neurons"), counts, strict=True)
    ]
    hidden = heads * head_size
    weights = (4 * hidden * head_size, 3 * head_size), (2 * hidden, 1)
    return Partition("bert", hidden, head_size, heads, neurons, tuple(arrays), *weights)


def test_costs_of_bert_base():
    with torch.device("meta"):
        groups = partition(transformers.BertModel(transformers.BertConfig()))
    assert group_cost(groups, "heads", "params", 384) == 196_800
    assert group_cost(groups, "neurons", "params", 384) == 1_537
    # MACs of a head: three projections and one back, L·64·768 each; scores and context, L·L·64 each.
    assert group_cost(groups, "heads", "macs", 128) == 128 * (4 * 64 * 768) + 2 * 128 * 128 * 64
    assert group_cost(groups, "neurons", "macs", 128) == 128 * 2 * 768
    assert {group_cost(groups, kind, "groups", 1) for kind in ("heads", "neurons")} == {1}
    assert dense_cost(groups, OTOConfig()) == 12 * (12 * 196_800 + 3072 * 1_537)
    assert dense_cost(groups, OTOConfig(structures=("neurons",))) == 12 * 3072 * 1_537
    assert dense_cost(groups, OTOConfig(), "groups") == 37008
    # All weights of the blocks but LayerNorms and output biases: 4 · 768 each and 2 · 768.
    blocks = sum(
        parameter.numel()
        for parameter in transformers.BertModel._from_config(
            transformers.BertConfig(num_hidden_layers=1, vocab_size=1)
        ).encoder.parameters()
    )
    assert dense_cost(groups, OTOConfig()) == 12 * (blocks - 6 * 768)


def test_a_share_is_the_decimal_that_it_prints_as():
    assert allowance(0.29, 100) == 29  # 0.29 · 100 is 28.999999999999996 in floating point
    assert allowance(0.5, 7) == 3
    assert allowance(0.0, 7) == 0


@pytest.mark.parametrize(
    ("count", "floor", "multiple", "can_go"),
    [(24, 8, 8, 16), (24, 0, 8, 24), (24, 9, 8, 8), (23, 8, 8, 15), (5, 8, 8, 0), (4, 1, 1, 3), (4, 0, 1, 4)],
)
def test_removable_groups(count, floor, multiple, can_go):
    assert removable_groups(count, floor, multiple) == can_go


def plain_selection(score, cost, array, alive, budget, floor, multiple):
    """The rule as a plain loop: cut the item of the lowest score per cost that fits, until none fits."""
    chosen = [False] * len(score)
    while True:
        items = []
        for block in range(len(floor)):
            left = sorted(
                (group for group in range(len(score)) if array[group] == block and alive[group] and not chosen[group]),
                key=lambda group: (score[group], group),
            )
            size = len(left) % multiple[block] or multiple[block]
            keep = -(-floor[block] // multiple[block]) * multiple[block]
            if left and len(left) - size >= keep:
                item = left[:size]
                price = sum(cost[group] for group in item)
                items.append((sum(score[group] for group in item) / price, block, price, item))
        fitting = [item for item in items if item[2] <= budget]
        if not fitting:
            return chosen, budget, [item[2] for item in items]
        _, _, price, item = min(fitting, key=lambda item: item[:2])
        budget -= price
        for group in item:
            chosen[group] = True


@st.composite
def problems(draw):
    blocks = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(0, 13), min_size=blocks, max_size=blocks))
    prices = st.sampled_from([1, 3, 8, 50])
    costs = draw(st.lists(prices, min_size=blocks, max_size=blocks))
    floor = draw(st.lists(st.integers(0, 6), min_size=blocks, max_size=blocks))
    multiple = draw(st.lists(st.sampled_from([1, 1, 2, 4]), min_size=blocks, max_size=blocks))
    array = [block for block, size in enumerate(sizes) for _ in range(size)]
    # Whole scores are added exactly, so both ways of adding give the same ranking.
    score = draw(st.lists(st.integers(0, 50), min_size=len(array), max_size=len(array)))
    alive = draw(st.lists(st.booleans(), min_size=len(array), max_size=len(array)))
    budget = draw(st.integers(0, 300))
    # The same for every group of an array, or another for the first, second, … to go.
    cost = [costs[block] for block in array]
    if draw(st.booleans()):
        cost = draw(st.lists(prices, min_size=len(array), max_size=len(array)))
    return score, cost, array, alive, budget, floor, multiple


def selection(score, cost, array, alive, budget, floor, multiple):
    whole = {"dtype": torch.int64}
    return select_groups(
        torch.tensor(score, dtype=torch.float64),
        torch.tensor(cost, **whole),
        torch.tensor(array, **whole),
        torch.tensor(alive, dtype=torch.bool),
        budget,
        torch.tensor(floor, **whole),
        torch.tensor(multiple, **whole),
    ).tolist()


@given(problems())
def test_selection_keeps_the_rules(problem):
    score, cost, array, alive, budget, floor, multiple = problem
    chosen = selection(score, cost, array, alive, budget, floor, multiple)
    # By array, what those to go cost: the first of them come after those that are gone.
    prices = [
        [price for group, price in enumerate(cost) if array[group] == block][
            sum(array[group] == block and not alive[group] for group in range(len(score))) :
        ]
        for block in range(len(floor))
    ]
    cuts = [sum(array[group] == block and chosen[group] for group in range(len(score))) for block in range(len(floor))]
    spent = sum(sum(own[:cut]) for own, cut in zip(prices, cuts, strict=True))
    assert spent <= budget
    assert not any(cut and not there for cut, there in zip(chosen, alive, strict=True))
    for block in range(len(floor)):
        groups = [group for group in range(len(score)) if array[group] == block and alive[group]]
        gone = [group for group in groups if chosen[group]]
        left = [group for group in groups if not chosen[group]]
        if gone:
            assert len(left) % multiple[block] == 0 and len(left) >= floor[block]
            assert not left or max(score[group] for group in gone) <= min(score[group] for group in left)
        size = len(left) % multiple[block] or multiple[block]
        keep = -(-floor[block] // multiple[block]) * multiple[block]
        if len(left) >= size and len(left) - size >= keep and left:  # nothing that may still go would fit
            assert sum(prices[block][cuts[block] : cuts[block] + size]) > budget - spent


@given(problems())
def test_a_selection_without_ties_is_that_of_the_plain_loop(problem):
    score, cost, array, alive, budget, floor, multiple = problem
    # Where the order within an array is by one score and all items of one price, the ranking is the plain loop's.
    cost, multiple = [1] * len(cost), [1] * len(multiple)
    score = [value * 1000 + group for group, value in enumerate(score)]
    expected, *_ = plain_selection(score, cost, array, alive, budget, floor, multiple)
    assert selection(score, cost, array, alive, budget, floor, multiple) == expected


def test_heads_and_neurons_are_ranked_together_by_score_per_cost():
    # A head of cost 100 and score 50 is dearer to keep than neurons of cost 1 and score 0.6.
    score = torch.tensor([50.0, 70.0] + [0.6] * 8)
    cost = torch.tensor([100, 100] + [1] * 8)
    array = torch.tensor([0, 0] + [1] * 8)
    alive = torch.ones(10, dtype=torch.bool)
    floors, ones = torch.tensor([1, 0]), torch.ones(2, dtype=torch.int64)
    chosen = select_groups(score, cost, array, alive, 104, floors, ones)
    assert chosen.tolist() == [True, False] + [True] * 4 + [False] * 4
    # Where the head does not fit, what does takes the place.
    chosen = select_groups(score, cost, array, alive, 99, floors, ones)
    assert chosen.tolist() == [False, False] + [True] * 8


def test_a_group_that_frees_little_is_cut_with_one_that_frees_much():
    # Of the first array two groups cost next to nothing and the third, which goes last, is most of it.
    score = torch.tensor([10.0, 11.0, 12.0] + [0.5] * 4)
    cost = torch.tensor([1, 1, 98] + [1] * 4)
    array = torch.tensor([0, 0, 0] + [1] * 4)
    alive = torch.ones(7, dtype=torch.bool)
    floors, ones = torch.tensor([0, 0]), torch.ones(2, dtype=torch.int64)
    chosen = select_groups(score, cost, array, alive, 100, floors, ones)
    assert chosen.tolist() == [True] * 3 + [False] * 4  # 33 for 100 together, where the others ask 50 for 100
    # Where the third does not fit, it blocks what comes after it, and nothing before it.
    chosen = select_groups(score, cost, array, alive, 99, floors, ones)
    assert chosen.tolist() == [True] * 2 + [False] + [True] * 4
    cost = torch.tensor([98, 1, 1] + [1] * 4)
    chosen = select_groups(score, cost, array, alive, 50, floors, ones)
    assert chosen.tolist() == [False] * 3 + [True] * 4


@st.composite
def runs(draw):
    heads, head_size = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    groups = made_up(draw(st.integers(1, 5)), heads, head_size, draw(st.integers(1, 70)))
    structures = draw(st.sampled_from([("heads", "neurons"), ("heads",), ("neurons",)]))
    unit = draw(st.sampled_from(["params", "macs", "groups", "latency"]))
    table = (
        made_table(groups, draw(st.integers(0, 2**31)), draw(st.sampled_from([1, 5000])))
        if unit == "latency"
        else None
    )
    config = OTOConfig(
        target_sparsity=draw(st.floats(0, 0.99)),
        target_unit=unit,
        latency_table=table,
        sequence_length=draw(st.sampled_from([1, 128, 384])),
        structures=structures,
        min_heads=draw(st.integers(0, 3)),
        min_neurons=draw(st.integers(0, 20)),
        round_to=draw(st.sampled_from([1, 2, 8, 16])),
        pruning_periods=draw(st.integers(1, 10)),
    )
    return groups, config, draw(st.integers(0, 2**31))


@given(runs())
def test_the_target_is_met_in_every_metric(run):
    groups, config, seed = run
    arrays = [array for array in groups.arrays if array.kind in config.structures]
    counts = torch.tensor([array.count for array in arrays])
    kinds = [array.kind for array in arrays]
    costs = [removal_costs(groups, kind, config) for kind in kinds]
    limits = torch.tensor([floor_and_multiple(kind, config) for kind in kinds])
    total = dense_cost(groups, config)
    target = Fraction(repr(config.target_sparsity)) * total
    try:
        check_target(groups, config)
    except ValueError:
        blocks = list(zip(counts.tolist(), costs, limits.tolist(), strict=True))
        free = [removable_groups(count, floor, multiple) for count, _, (floor, multiple) in blocks]
        most = sum(int(cost_g[:can_go].sum()) for can_go, (_, cost_g, _) in zip(free, blocks, strict=True))
        firsts = [
            int(cost_g[: count % multiple or multiple].sum())
            for can_go, (count, cost_g, (_, multiple)) in zip(free, blocks, strict=True)
            if can_go
        ]
        assert most < target or target < min(firsts)
        return

    def gone_of(alive):
        """The cost that is gone, by the numbers that are left of every array."""
        kept = alive.split(counts.tolist())
        return sum(int(cost_g[: int((~own).sum())].sum()) for cost_g, own in zip(costs, kept, strict=True))

    alive = torch.ones(int(counts.sum()), dtype=torch.bool)
    array_of, cost = torch.arange(len(arrays)).repeat_interleave(counts), torch.cat(costs)
    generator = torch.Generator().manual_seed(seed)
    schedule = Schedule.from_config(config, 200)
    for boundary in schedule.boundaries[:-1]:
        score = torch.rand(alive.numel(), generator=generator)
        share = allowance(schedule.share(boundary), total)
        gone = gone_of(alive)
        alive &= ~select_groups(score, cost, array_of, alive, share - gone, limits[:, 0], limits[:, 1])
        assert gone_of(alive) <= share
    removed = gone_of(alive)
    assert removed <= target
    cheapest = None
    for block, (floor, multiple) in enumerate(limits.tolist()):
        left = int((alive & (array_of == block)).sum())
        if int(counts[block]) - left:
            assert left % multiple == 0 and left >= floor
        if removable_groups(left, floor, multiple):
            gone = int(counts[block]) - left
            price = int(costs[block][gone : gone + (left % multiple or multiple)].sum())
            cheapest = price if cheapest is None else min(cheapest, price)
    assert cheapest is None or target - removed < cheapest
    assert cheapest is not None or target - removed < 1 or config.target_sparsity == 0


def test_a_target_that_the_floors_rule_out_is_refused_with_what_is_reachable():
    groups = made_up()  # a head 1,048 weights, a neuron 65: 4 · 1,048 + 24 · 65 = 5,752 a block
    check_target(groups, OTOConfig(target_sparsity=0.72, min_heads=1, min_neurons=8))
    with pytest.raises(
        ValueError,
        match=r"`target_sparsity`=0.8 of params cannot be reached: with `min_heads`=1, `min_neurons`=8 and "
        r"`round_to`=8 at most 0.7273 can go",  # (3 · 1,048 + 16 · 65) / 5,752
    ):
        check_target(groups, OTOConfig(target_sparsity=0.8))
    check_target(groups, OTOConfig(target_sparsity=0.99, min_heads=0, min_neurons=0))
    with pytest.raises(ValueError, match=r"=0.7 of groups cannot be reached: .* at most 0.6785 can go"):
        check_target(groups, OTOConfig(target_sparsity=0.7, target_unit="groups"))
    check_target(groups, OTOConfig(target_sparsity=None))
    check_target(groups, OTOConfig(target_sparsity=0.0))


def test_a_target_below_the_smallest_cut_is_refused():
    groups = made_up()  # two blocks; eight neurons, 8 · 65, are less than a head
    with pytest.raises(
        ValueError,
        match=r"`target_sparsity`=0.04 of params is less than the smallest cut takes \(of one block, "
        r"`round_to`=8\), 0.0453: nothing would go. Choose a larger share, or a lower `round_to`",  # 520 / 11,504
    ):
        check_target(groups, OTOConfig(target_sparsity=0.04))
    check_target(groups, OTOConfig(target_sparsity=0.0453))
    check_target(groups, OTOConfig(target_sparsity=0.04, round_to=4))


def test_a_model_that_is_pruned_to_the_target_already_is_refused():
    model = tiny_model("BertModel")
    zero_uneven(model)
    groups = partition(compress(model))  # (3, 16), (0, 12), (2, 0)
    removed = (7 * 1048 + 44 * 65) / (3 * 5752)
    with pytest.raises(ValueError, match=rf"`target_sparsity`=0.5 .* is removed already \({removed:.4f}\)"):
        check_target(groups, OTOConfig(target_sparsity=0.5))
    with pytest.raises(ValueError, match="is removed already"):
        check_target(groups, OTOConfig(target_sparsity=removed + 1e-4, min_neurons=0))  # no group fits between
    check_target(groups, OTOConfig(target_sparsity=0.7))


def test_a_target_in_latency_is_of_the_whole_models_time():
    groups = made_up()  # two blocks of 4 heads and 24 neurons
    curves = {"heads": [[0, 0], [1, 400], [4, 700]], "neurons": [[0, 0], [24, 1200]]}
    table = dataclasses.replace(made_table(groups), total=2 * (700 + 1200) + 1200, **curves)
    config = OTOConfig(target_unit="latency", latency_table=table, target_sparsity=0.5)
    assert removal_costs(groups, "heads", config).tolist() == [100, 100, 100, 400]
    assert removal_costs(groups, "neurons", config).tolist() == [50] * 24
    found = reach(groups, config)
    # A block may lose three heads, 300, and 16 neurons, 800; 50 · 8 is more than a head.
    assert (found.total, found.removed, found.reachable, found.cheapest) == (5000, 0, 2200, 100)
    with pytest.raises(
        ValueError, match=r"=0.5 of latency cannot be reached: .* at most 0.44 can go, as what is never"
    ):
        check_target(groups, config)
    check_target(groups, dataclasses.replace(config, target_sparsity=0.44))
    # Without heads and neurons there is still the rest, 1,200 of 5,000.
    bare = dataclasses.replace(config, min_heads=0, min_neurons=0)
    assert reach(groups, bare).reachable == 3800 and dense_cost(groups, bare) == 5000
    assert dense_cost(groups, bare, "groups") == 56
    # The last head costs more than the others: it is the eighth of the neurons that goes in its place.
    kept = target_examples(groups, dataclasses.replace(bare, target_sparsity=0.12))["heads first"]
    assert kept == [1, 24, 1, 24] and removed_cost(groups, bare, kept) == 600
    # What is gone already counts, whatever may be pruned now.
    left = made_up(left=[(1, 24), (4, 16)])
    only = dataclasses.replace(config, structures=("neurons",), min_neurons=0)
    assert reach(left, only).removed == removed_cost(groups, only, [1, 24, 4, 16]) == 300 + 400
    assert reach(left, only).reachable == 300 + 2 * 1200
    assert reach(left, OTOConfig(structures=("neurons",))).removed == 8 * 65


@pytest.mark.parametrize(
    ("name", "value"),
    [("model_type", "roberta"), ("num_layers", 3), ("hidden_size", 64), ("head_size", 16), ("queries", 2)],
)
def test_a_table_of_another_architecture_is_refused_by_name(name, value):
    groups = made_up()
    table = dataclasses.replace(made_table(groups, fixed=10**6), **{name: value})
    for target in (0.01, 0.0, None):  # where nothing is to be reached as well
        config = OTOConfig(target_unit="latency", latency_table=table, target_sparsity=target)
        with pytest.raises(ValueError, match=rf"another architecture: `{name}` {value}, the model has "):
            check_target(groups, config)
    other = made_table(made_up(heads=5, neurons=20))
    with pytest.raises(ValueError, match=r"`hidden_size` 40, .*; `dense_heads` 5, .* 4; `dense_neurons` 20, .* 24"):
        check_target(groups, OTOConfig(target_unit="latency", latency_table=other))
