"""Every block keeps equally many groups: what is chosen, and the model of the family's own class that comes of it."""

import copy
import dataclasses
import itertools
import json
import sys

import forking
import pytest
import torch
import transformers
from families import (
    ONE_EACH,
    OTHERS,
    counts,
    family_of,
    largest_difference,
    made_table,
    outputs,
    squares,
    tiny_model,
    training_batch,
    zero,
)
from hypothesis import given
from hypothesis import strategies as st
from short_runs import StopAt, make
from transformers import TrainerCallback

from hf_oto import HSPG, OTOConfig, compress, partition, shrink
from hf_oto.hspg.budget import check_target, dense_cost, reach, removed_cost, select_uniformly, uniform_cuts

STEPS, STOP = 14, 6  # warm-up 2, two periods that end before the steps 5 and 8
NEURONS = {"structures": ("neurons",), "min_neurons": 4, "round_to": 4, "uniform": True}


@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(0, 400),
    st.integers(0, 5),
)
def test_the_pair_of_least_score_that_fits_and_is_full(blocks, head_costs, neuron_costs, budget, seed):
    """Against every pair, tried one by one."""
    generator = torch.Generator().manual_seed(seed)
    costs = {"heads": torch.tensor(head_costs), "neurons": torch.tensor(neuron_costs)}
    scores = {kind: torch.rand(blocks, len(cost), generator=generator) for kind, cost in costs.items()}
    cuts = {"heads": list(range(len(head_costs) + 1)), "neurons": list(range(0, len(neuron_costs) + 1, 2))}
    number = select_uniformly(scores, costs, cuts, budget)

    def spent(pair):
        return blocks * sum(int(costs[kind][:cut].sum()) for kind, cut in pair.items())

    def score(pair):
        lowest = {kind: scores[kind].double().sort(dim=1).values for kind in pair}
        return sum(float(lowest[kind][:, :cut].sum()) for kind, cut in pair.items())

    pairs = [dict(zip(cuts, pair, strict=True)) for pair in itertools.product(*cuts.values())]
    fitting = [pair for pair in pairs if spent(pair) <= budget]
    full = [pair for pair in fitting if not any(more != pair and covers(more, pair) for more in fitting)]
    assert number in full
    assert score(number) == pytest.approx(min(map(score, full)))


def covers(more, pair):
    return all(more[kind] >= pair[kind] for kind in pair)


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_run_keeps_as_many_neurons_in_every_block(name, tmp_path):
    """At every step where a period ends, not only at the last; what is saved is of the family's own class."""
    trainer = make(tmp_path, name, OTOConfig(target_sparsity=0.4, pruning_periods=3, **NEURONS), logging_steps=1)
    dense = tiny_model(name)
    trainer.train()
    seen = {entry["neurons"] for entry in trainer.state.log_history if "neurons" in entry}
    assert len(seen) > 1 and all(number % 3 == 0 for number in seen)
    (heads, neurons), *others = counts(trainer.compressed_model())
    assert others == [(heads, neurons)] * 2 and heads == 4 and neurons % 4 == 0 and neurons < 24
    groups, found = partition(dense), trainer.hspg.metrics()
    cheapest = reach(groups, trainer.oto_config).cheapest / reach(groups, trainer.oto_config).total
    assert 0.4 - cheapest < found["removed_params"] <= 0.4
    trainer.save_model(str(tmp_path / "small"))
    small = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "small")
    assert type(small) is type(dense)
    saved = json.loads((tmp_path / "small" / "config.json").read_text())
    assert saved["model_type"] == family_of(name)
    assert not {"auto_map", "per_layer_config", "refused_as_dense"} & set(saved)
    assert not list((tmp_path / "small").glob("*.py"))
    assert largest_difference(outputs(small), outputs(trainer.model.eval())) <= 1e-5


def begin(model, config, steps=STEPS):
    return HSPG(torch.optim.AdamW(model.named_parameters(), lr=3e-3), partition(model), config, steps)


def go_on(model, optimizer, until):
    """Steps on new rows each, shrunk where that is due."""
    while optimizer.steps_done < until:
        found = model(**training_batch(model, optimizer.steps_done))
        (found.loss if found.get("loss") is not None else squares(found)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.shrink_due:
            shrink(model, optimizer)


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_families_shrink_resume_and_are_pruned_again(name, tmp_path):
    floors = NEURONS | {"min_neurons": 1, "round_to": 1, "sequence_length": 16}
    config = OTOConfig(target_sparsity=0.84, pruning_periods=2, **floors)
    model = tiny_model(name)
    heads = counts(model)[0][0]
    optimizer = begin(model, config)
    go_on(model, optimizer, STOP)
    assert [neurons for _, neurons in counts(model)] == [7] * 3  # shrunk on the way
    weights, state, smaller = copy.deepcopy((model.state_dict(), optimizer.state_dict(), model.config))
    go_on(model, optimizer, STEPS)
    resumed = tiny_model(name)
    again = begin(resumed, config)
    shrink(resumed, again, like=smaller)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    go_on(resumed, again, STEPS)
    assert counts(model) == [(heads, 4)] * 3 == counts(resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    compress(model, plain=True).save_pretrained(tmp_path)
    small = getattr(transformers, name).from_pretrained(tmp_path)
    assert type(small) is getattr(transformers, name) and not list(tmp_path.glob("*.py"))
    assert largest_difference(outputs(small), outputs(model)) <= 1e-5
    # What is plain is dense: half of what it has may go again.
    optimizer = begin(small, OTOConfig(target_sparsity=0.5, **floors))
    go_on(small, optimizer, STEPS)
    smaller = compress(small, plain=True)
    assert type(smaller) is getattr(transformers, name) and counts(smaller) == [(heads, 2)] * 3


@pytest.mark.parametrize("unit", ["params", "macs", "groups", "latency"])
def test_every_unit_is_met(unit):
    model = tiny_model(ONE_EACH[0])
    groups = partition(model)
    table = made_table(groups) if unit == "latency" else None
    share = reach(groups, OTOConfig(target_unit=unit, latency_table=table, **NEURONS))
    share = 0.7 * share.reachable / share.total
    config = OTOConfig(target_sparsity=share, target_unit=unit, latency_table=table, pruning_periods=2, **NEURONS)
    optimizer = begin(model, config)
    go_on(model, optimizer, STEPS)
    (_, neurons), *others = counts(model)
    assert others == [(4, neurons)] * 2 and neurons % 4 == 0

    def removed(kept):
        return removed_cost(groups, config, [4, kept] * 3)

    assert removed(neurons) <= share * dense_cost(groups, config) < removed(neurons - 4)


def test_a_shrunk_run_resumes_and_ends_in_the_same_form(tmp_path):
    config = OTOConfig(target_sparsity=0.4, pruning_periods=3, shrink_during_training=True, **NEURONS)
    trainer = make(tmp_path / "run", config=config, save_strategy="steps", save_steps=12)
    trainer.train()
    again = make(tmp_path / "again", config=config, save_strategy="steps", save_steps=12)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-12"))
    first, second = (
        transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / name) for name in ("run", "again")
    )
    assert type(first).__name__ == type(second).__name__ == "BertForQuestionAnswering"
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("name", ["BertForQuestionAnswering", "LlamaForQuestionAnswering"])
def test_a_save_on_the_way_is_plain_though_blocks_differ_in_what_is_zero(name, tmp_path, without_pictures):
    """Groups may reach zero one by one: what all blocks can spare goes, and other zeros stay."""
    structures = {"structures": ("heads", "neurons")} if name.startswith("Llama") else {}
    config = OTOConfig(**NEURONS | structures, pruning_periods=2, epsilon=0.95)
    trainer = make(tmp_path / "run", name, config, max_steps=120)
    dense, seen = tiny_model(name), []

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 27
            if not 24 <= state.global_step <= 27:  # of the first period, which ends with step 27
                return
            trainer.save_model(tmp_path / "small")
            small = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "small")
            assert type(small) is type(dense) and not [*(tmp_path / "small").glob("*.py")]
            assert largest_difference(outputs(small), outputs(trainer.model.eval())) <= 1e-5
            seen.append((counts(small), counts(compress(trainer.model))))

    trainer.add_callback(Save())
    trainer.train()
    for small, left in seen:
        least = [max(kept) for kept in zip(*left, strict=True)]  # heads of Llama have to divide the hidden size, too
        assert small == [small[0]] * 3 and small[0][1] == least[1] and least[0] <= small[0][0] <= 2 * least[0]
    assert any(len(set(left)) > 1 for _, left in seen) and len({small[0] for small, _ in seen}) > 1


def test_the_card_and_the_pictures_are_of_what_is_saved(tmp_path):
    """Also of one that stopped on the way to its target."""
    pytest.importorskip("matplotlib")
    config = OTOConfig(target_sparsity=0.4, pruning_periods=3, **NEURONS)
    for stop in (10, 24):
        folder = tmp_path / str(stop)
        trainer = make(folder, config=config, extra={"callbacks": [StopAt(stop)]})
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        card = (folder / "README.md").read_text()
        assert f'from_pretrained("{folder}")' in card and "needs no code of its own" in card
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertForQuestionAnswering"]
        for name in ("layers.png", "layers.svg", "run.png", "run.svg"):
            assert (folder / name).stat().st_size > 1000 and (f"({name})" in card) == name.endswith("png")
    assert " ".join(card.split()).count("| 16 | 24 |") == 3  # neurons of every layer


def test_every_milestone_is_of_the_familys_own_class(tmp_path):
    config = OTOConfig(target_sparsity=0.7, milestones=(0.4,), pruning_periods=2, **NEURONS)
    make(tmp_path, config=config, save_strategy="steps", save_steps=12).train()
    for folder, neurons in ((tmp_path / "0.40", 16), (tmp_path, 8)):
        small = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
        assert type(small).__name__ == "BertForQuestionAnswering" and counts(small) == [(4, neurons)] * 3
        assert not list(folder.glob("*.py"))


def test_heads_go_where_a_config_has_a_head_size():
    model = tiny_model("Qwen3ForQuestionAnswering")
    config = OTOConfig(target_sparsity=0.5, uniform=True, min_neurons=4, round_to=4, pruning_periods=2)
    optimizer = HSPG(torch.optim.SGD(model.named_parameters(), lr=1e-3), partition(model), config, total_steps=12)
    for _ in range(12):
        outputs_of = model(input_ids=torch.randint(2, 61, (2, 9)))
        sum(value.square().mean() for value in outputs_of.values() if value.is_floating_point()).backward()
        optimizer.step()
        optimizer.zero_grad()
    small = compress(model, plain=True)
    assert type(small) is type(model)
    assert small.config.num_key_value_heads < model.config.num_key_value_heads or small.config.intermediate_size < 24


def test_what_cannot_be_uniform_is_refused():
    groups = partition(tiny_model("BertForQuestionAnswering"))
    with pytest.raises(ValueError, match="structures.*neurons.*all 4 heads stay"):
        check_target(groups, OTOConfig(uniform=True))
    with pytest.raises(ValueError, match="needs a `target_sparsity`"):
        check_target(groups, OTOConfig(target_sparsity=None, uniform=True, structures=("neurons",)))
    model = tiny_model("BertForQuestionAnswering")
    array = partition(model).arrays[1]
    with torch.no_grad():
        for owned in array.owned:
            positions = owned.positions(array.count, torch.arange(4))
            dict(model.named_parameters())[owned.name].index_fill_(owned.dim, positions, 0)
    with pytest.raises(ValueError, match=r"equally many neurons, got \[20, 24\]"):
        check_target(partition(compress(model)), OTOConfig(**NEURONS))


def cut_in_every_block(name, kind, gone):
    """A model of the pruned class whose blocks have all lost as many."""
    model = tiny_model(name)
    for array in partition(model).arrays:
        if array.kind == kind:
            zero(model, array, range(gone))
    return compress(model)


@pytest.mark.parametrize(
    ("name", "kind", "gone", "structures", "message"),
    [
        ("Bert", "heads", 1, ("neurons",), r"many heads .* type 'bert' can say \(4\), got 3"),
        ("Llama", "heads", 1, ("heads", "neurons"), r"many heads .* type 'llama' can say \(1, 2, 4\), got 3"),
        ("Qwen3", "heads", 4, ("neurons",), r"many heads .* type 'qwen3' can say \(1, 2, 3, 4\), got 0"),
        ("Qwen3", "neurons", 24, ("heads",), r"many neurons .* can say \(one or more\), got 0"),
    ],
)
def test_sizes_that_no_config_of_the_family_says_are_refused(name, kind, gone, structures, message, tmp_path):
    """All blocks are alike, and before the first step: what comes of them could not be of the family's own class."""
    model = cut_in_every_block(f"{name}ForQuestionAnswering", kind, gone)
    config = OTOConfig(target_sparsity=0.7, **NEURONS | {"structures": structures})
    with pytest.raises(ValueError, match=f"`uniform`=True needs as {message}: the model was pruned before"):
        make(tmp_path, model=model, config=config)


def test_sizes_that_a_config_of_the_family_says_may_be_pruned_before(tmp_path):
    model = cut_in_every_block("LlamaForQuestionAnswering", "heads", 2)
    trainer = make(tmp_path, model=model, config=OTOConfig(target_sparsity=0.4, pruning_periods=2, **NEURONS))
    trainer.train()
    small = trainer.compressed_model()
    assert type(small).__name__ == "LlamaForQuestionAnswering" and counts(small) == [(2, 16)] * 3


def test_a_target_below_the_smallest_cut_is_refused():
    """It would be met by a model that has lost nothing."""
    llama = partition(tiny_model("LlamaForQuestionAnswering"))  # 4 key/value heads: 2 and 1 divide as well
    heads = {**NEURONS, "structures": ("heads",)}
    assert reach(llama, OTOConfig(**heads)).cheapest == 2 * 3 * 6 * 32 * 8
    with pytest.raises(ValueError, match=r"=0.49 of params is less than .*\(all blocks lose as many.*\), 0.5: n"):
        check_target(llama, OTOConfig(target_sparsity=0.49, **heads))
    check_target(llama, OTOConfig(target_sparsity=0.5, **heads))
    with pytest.raises(ValueError, match=r"`milestones`=0.3 of params is less than the smallest cut takes"):
        check_target(llama, OTOConfig(target_sparsity=0.7, milestones=(0.3,), **heads))


def test_a_table_by_which_all_or_none_go_leaves_nothing_to_be_uniform_in():
    groups = partition(tiny_model("BertForQuestionAnswering"))
    neurons = ((0, 0), (1, 9000), (24, 9023))
    made = made_table(groups)
    total = 1000 + 3 * (made.heads[-1][1] + 9023)
    table = dataclasses.replace(made, method="CUDA graph", neurons=neurons, total=total)
    config = OTOConfig(target_sparsity=0.1, target_unit="latency", latency_table=table, **NEURONS)
    with pytest.raises(ValueError, match="leave `uniform`=True out and set the floors of neurons to 0: by `latency_t"):
        check_target(groups, config)
    with pytest.raises(ValueError, match="Lower the target or the floors, or leave `uniform`=True out"):
        check_target(groups, OTOConfig(target_sparsity=0.95, **NEURONS))


def test_a_plain_model_takes_the_place_of_one_with_code(tmp_path):
    cut_in_every_block("BertForQuestionAnswering", "heads", 1).save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "mine.py").write_text("kept")
    assert len(list((tmp_path / "small").glob("*_oto.py"))) == 2
    trainer = make(tmp_path, config=OTOConfig(target_sparsity=0.4, pruning_periods=3, **NEURONS))
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    assert [path.name for path in (tmp_path / "small").glob("*.py")] == ["mine.py"]


def test_what_a_config_of_the_family_takes():
    llama, qwen = (partition(tiny_model(f"{name}ForQuestionAnswering")) for name in ("Llama", "Qwen3"))
    for groups in (llama, qwen):
        for count in groups.plain_counts("heads"):
            assert 0 < count <= groups.dense_heads
    assert all(llama.hidden_size % (count * llama.queries) == 0 for count in llama.plain_counts("heads"))
    assert qwen.plain_counts("heads") == list(range(1, qwen.dense_heads + 1))
    assert uniform_cuts(qwen, "neurons", 24, 4, 8) == [0, 8, 16]


@pytest.mark.slow
def test_hf_oto_is_not_needed(tmp_path):
    make(tmp_path, config=OTOConfig(target_sparsity=0.4, pruning_periods=3, **NEURONS), save_strategy="epoch").train()
    code = f"""if True:
        import sys
        sys.modules["hf_oto"] = None
        from transformers import AutoModelForQuestionAnswering
        print(type(AutoModelForQuestionAnswering.from_pretrained({str(tmp_path)!r})).__module__)
    """
    done = forking.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "transformers.models.bert.modeling_bert", done.stderr
