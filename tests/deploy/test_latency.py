"""Latency as the target's metric: tables, their measurement, and runs that use one. No test looks at a clock."""

import dataclasses
import json

import pytest
import torch
import transformers
from benchmarks import latency as example
from families import ONE_EACH, made_table, question_batch, removed_and_next, tiny_model, zero_uneven
from transformers import TrainingArguments

from hf_oto import HSPG, OTOConfig, OTOTrainer, compress, measure_latency, partition, summarize
from hf_oto.config import LatencyTable
from hf_oto.deploy import latency_tables
from hf_oto.deploy.benchmark import measure
from hf_oto.deploy.latency_tables import _curves, _sizes
from hf_oto.hspg.budget import check_target, removed_cost
from hf_oto.hspg.selection import target_examples
from hf_oto.models.example_inputs import example_batch

BERT = ONE_EACH[0]
ONCE = {"sequence_length": 8, "repeats": 1, "warmup": 1}
# One of each way in which blocks are built: fused projections, a bias of positions, several heads to a key/value head.
BUILDS = (BERT, "DistilBertModel", "MPNetForQuestionAnswering", "ModernBertModel", "LlamaModel")


def table_of(model, **options):
    return made_table(partition(model), **options)


def latency_config(table, **settings):
    return OTOConfig(target_unit="latency", latency_table=table, **{"min_neurons": 4, "round_to": 4} | settings)


# The table.


def test_between_two_points_the_time_is_linear():
    table = dataclasses.replace(
        table_of(tiny_model(BERT)),
        total=10_000,
        heads=((0, 0), (1, 50), (4, 110)),
        neurons=((0, 0), (3, 10), (24, 73)),
    )
    assert table.saved("heads") == (20, 20, 20, 50)
    assert table.saved("neurons")[:21] == (3,) * 21 and sorted(table.saved("neurons")[21:]) == [3, 3, 4]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_saved_adds_up_to_every_point(seed):
    table = table_of(tiny_model(BERT), seed=seed)
    for kind in ("heads", "neurons"):
        saved, curve = table.saved(kind), getattr(table, kind)
        assert [sum(saved[len(saved) - count :]) for count, _ in curve] == [time for _, time in curve]
        assert min(saved) >= 1


def test_a_table_goes_to_json_and_back(tmp_path):
    table = table_of(tiny_model(BERT))
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]
    for given in (table, table.to_dict(), tmp_path / "table.json", str(tmp_path / "table.json")):
        config = latency_config(given)
        assert config.latency_table == table and config.to_dict()["latency_table"] == table.to_dict()
    config.save_pretrained(tmp_path / "out")  # with the table in it, wherever the file goes
    (tmp_path / "table.json").unlink()
    assert OTOConfig.from_pretrained(tmp_path / "out") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total": None}, r"`latency_table.total` must be an integer, got None"),
        ({"total": 0}, r"`latency_table.total` must be at least 1, got 0"),
        (
            {"total": 10},
            r"`latency_table.total` must be at least what heads and neurons of all blocks take, \d+, got 10",
        ),
        ({"threads": True}, r"`latency_table.threads` must be an integer, got True"),
        ({"device": 3}, r"`latency_table.device` must be a string, got 3"),
        ({"heads": [[0, 0], [4, -5]]}, r"`latency_table.heads: a time` must be at least 0, got -5"),
        ({"heads": [[0, 0], [4, 8.5]]}, r"`latency_table.heads: a time` must be an integer, got 8.5"),
        ({"heads": [[0, 3], [4, 90]]}, r"`latency_table.heads` must begin with 0 nanoseconds for none, got 3"),
        ({"heads": [[0, 0], [2, 50], [4, 51]]}, r"`latency_table.heads` must rise by a nanosecond .* 50 for 2 and 51"),
        ({"heads": [[0, 0], [3, 50]]}, r"must have counts that rise from 0 to `dense_heads`=4, got \[0, 3\]"),
        ({"neurons": [[0, 0], [9, 50], [8, 90], [24, 99]]}, r"`latency_table.neurons` must have counts that rise"),
        ({"neurons": [[24, 50]]}, r"must have counts that rise from 0 to `dense_neurons`=24, got \[24\]"),
        ({"neurons": {"0": 0}}, r"`latency_table.neurons` must be pairs of a count and nanoseconds"),
        ({"method": "by hand"}, r"`latency_table.method` must be one of clock, CUDA graph, .* got 'by hand'"),
        ({"colour": "red"}, r"`latency_table` has \['colour'\], which is nothing of it"),
    ],
)
def test_a_bad_table_is_refused_by_name(change, message):
    values = table_of(tiny_model(BERT)).to_dict() | change
    with pytest.raises((ValueError, TypeError), match=message):
        latency_config(values)


def test_a_file_that_is_no_table_is_refused_by_name(tmp_path):
    values = table_of(tiny_model(BERT)).to_dict()
    del values["neurons"], values["dtype"]
    (tmp_path / "table.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"`latency_table` lacks \['dtype', 'neurons'\]"):
        latency_config(tmp_path / "table.json")
    (tmp_path / "table.json").write_text("[")
    with pytest.raises(ValueError, match="is not JSON"):
        latency_config(tmp_path / "table.json")
    with pytest.raises(FileNotFoundError, match="nowhere.json is no file. Measure one"):
        latency_config("nowhere.json")


# The measurement.


@pytest.mark.parametrize("name", BUILDS)
def test_what_is_measured_is_a_table_of_the_model(name):
    model = tiny_model(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    number = 2 if name == BERT else 1
    table = measure_latency(model, batch_size=2, threads=number, **ONCE)
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == threads
    assert model.training and type(model) is getattr(transformers, name) and not model.base_model._forward_hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    groups = partition(model)
    config = latency_config(json.loads(json.dumps(table.to_dict())), target_sparsity=0.0)
    check_target(groups, config)
    assert [count for count, _ in table.heads] == list(range(groups.dense_heads + 1))
    assert [count for count, _ in table.neurons] == [0, 8, 16, 24]
    assert (table.batch_size, table.sequence_length, table.threads, table.dtype) == (2, 8, number, "float32")


def test_the_dtype_is_the_models():
    table = measure_latency(tiny_model(BERT).bfloat16(), threads=1, cpu_time=True, **ONCE)
    assert table.dtype == "bfloat16" and "bfloat16, sdpa attention, cpu, 1 thread, torch" in table.conditions


@pytest.mark.parametrize("layers", [1, 2, 3, 12])
def test_the_sizes_fill_models_and_tell_the_curves_apart(layers):
    groups = partition(tiny_model(BERT, num_hidden_layers=layers, intermediate_size=96))
    sizes = _sizes(groups)
    assert all(len(chunk) == layers for chunk in sizes) and sum(map(len, sizes)) < 30 + layers
    flat = [size for chunk in sizes for size in chunk]
    assert flat.count((4, 96)) >= 2 and {heads for heads, _ in flat} == {0, 1, 2, 3, 4}

    def took(heads, neurons):  # the first head and the first neurons cost more
        return 500 + 300 * heads + 1000 * (heads > 0) + 7 * neurons + 400 * (neurons > 0)

    heads, neurons, rest = _curves(flat, [took(*size) for size in flat])
    assert rest == pytest.approx(500)
    assert all(time == took(count, 0) - 500 for count, time in heads)
    assert all(time == took(0, count) - 500 for count, time in neurons)


def test_noise_leaves_no_group_free():
    groups = partition(tiny_model(BERT))
    flat = [size for chunk in _sizes(groups) for size in chunk]
    generator = torch.Generator().manual_seed(0)
    heads, neurons, _ = _curves(flat, (1000 + 500 * torch.rand(len(flat), generator=generator)).tolist())
    for curve in (heads, neurons):
        pairs = zip(curve, curve[1:], strict=False)
        assert all(end - start >= high - low for (low, start), (high, end) in pairs)


class Takes:
    """Stands for a timer: a kernel of 100 microseconds for heads, for neurons and for all else, widths hardly any."""

    asked: list[bool] = []

    def __init__(self, call, device, *, graphs=True):
        groups = partition(call.func)
        heads, neurons = groups.block_counts
        self.taken = sum(
            0.1 + 0.1 * (h > 0) + 0.1 * (n > 0) + (h + n) / 1e4 for h, n in zip(heads, neurons, strict=True)
        )
        Takes.asked.append(graphs)
        self.method = "device events" if heads[0] == 0 or not graphs else "CUDA graph"

    def __call__(self):
        return self.taken


def test_sizes_that_are_timed_alone_are_all_timed_in_one_way(monkeypatch):
    monkeypatch.setattr(latency_tables, "Timer", Takes)
    model = tiny_model(BERT)
    sizes = [(4, 24), (4, 0), (0, 24), (2, 8)]
    batch = example_batch(model, 1, 8, padded=False)
    times, method = latency_tables._timed_alone(model, partition(model), sizes, batch, repeats=2, warmup=1)
    assert method == "device events" and Takes.asked == [True, True, True, False, False, False, False]
    assert times == pytest.approx([1e6 * (0.1 + 0.1 * (h > 0) + 0.1 * (n > 0) + (h + n) / 1e4) for h, n in sizes])


def kernels_table(groups, method="CUDA graph"):
    """Of a structure nine parts in ten go with the last group alone."""
    curves = {"heads": ((0, 0), (1, 920), (4, 1000)), "neurons": ((0, 0), (8, 920), (24, 1000))}
    return dataclasses.replace(made_table(groups), total=8000, method=method, **curves)


def test_where_kernels_are_the_price_whole_structures_go():
    model = tiny_model(BERT)
    groups, table = partition(model), kernels_table(partition(tiny_model(BERT)))
    assert table.goes_whole("heads") and table.goes_whole("neurons") and "by CUDA graph" in table.conditions
    config = latency_config(table, target_sparsity=0.4, min_heads=0, min_neurons=0, pruning_periods=2)
    optimizer = HSPG(torch.optim.SGD(model.named_parameters(), lr=0.01), groups, config, 10)
    for step in range(10):
        model(**question_batch(model, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    gone = [float(mask.float().mean()) for mask in optimizer.zero_masks().values()]
    assert sorted(gone) == [0, 0, 0, 1, 1, 1]  # 3000 of the 3200 that may go
    assert optimizer.metrics()["removed_latency"] == 3000 / 8000


def test_where_widths_are_the_price_any_group_may_go():
    groups = partition(tiny_model(BERT))
    for table in (
        kernels_table(groups, method="clock"),
        dataclasses.replace(table_of(tiny_model(BERT)), method="CUDA graph"),
    ):
        assert not (table.goes_whole("heads") and table.goes_whole("neurons"))


def test_floors_that_no_whole_structure_leaves_are_named():
    groups = partition(tiny_model(BERT))
    config = latency_config(kernels_table(groups), target_sparsity=0.4)
    with pytest.raises(
        ValueError, match="at most 0.0 can go.* Lower .* floors, those of heads and neurons to 0: by `lat"
    ):
        check_target(groups, config)


def test_what_cannot_be_measured_is_refused():
    model = tiny_model(BERT)
    for name, value in (("batch_size", 0), ("sequence_length", 0), ("repeats", 0), ("warmup", 0), ("threads", 0)):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            measure_latency(model, **{name: value})
    with pytest.raises(ValueError, match="`sequence_length` must be at most 40, what the model reads, got 200"):
        measure_latency(model, sequence_length=200)
    with pytest.raises(ValueError, match="`cpu_time` is for `threads`=1 on the CPU, got 2 threads"):
        measure_latency(model, threads=2, cpu_time=True, sequence_length=8)
    with pytest.raises(ValueError, match="`model` has no blocks"):
        measure_latency(tiny_model(BERT, num_hidden_layers=0))
    with pytest.raises(ValueError, match="must read tokens, ViTModel reads 'pixel_values'"):
        measure_latency(tiny_model("ViTModel"))
    with torch.device("meta"):
        empty = transformers.BertModel(model.config)
    with pytest.raises(ValueError, match="must hold its weights, .* is on the meta device"):
        measure_latency(empty)
    zero_uneven(model)
    with pytest.raises(ValueError, match="`model` is pruned already"):
        measure_latency(compress(model))


# Runs with a table.


def trained(folder, config, **options):
    questions = question_batch(tiny_model(BERT), size=32)
    defaults = {"max_steps": 24, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 4}
    defaults |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return OTOTrainer(
        model=tiny_model(BERT),
        args=TrainingArguments(str(folder), **defaults | options),
        train_dataset=[{key: value[row] for key, value in questions.items()} for row in range(32)],
        oto_config=config,
    )


@pytest.mark.parametrize("shrink", [False, True])
def test_a_run_meets_its_target_by_the_table(shrink, tmp_path):
    # Half of what is left beside the fixed part would not do: the share is of the whole.
    table = table_of(tiny_model(BERT), seed=3, fixed=3000, points=2)
    config = latency_config(table, target_sparsity=0.4, shrink_during_training=shrink)
    trainer = trained(tmp_path, config)
    trainer.train()
    trainer.save_model()
    logged = [entry["removed_latency"] for entry in trainer.state.log_history if "removed_latency" in entry]
    assert logged[0] == 0 and logged == sorted(logged)
    small = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    summary = summarize(small, latency_table=OTOConfig.from_pretrained(tmp_path).latency_table)
    removed = table.total - summary.latency
    groups = partition(tiny_model(BERT))
    kept = [count for pair in zip(summary.heads, summary.neurons, strict=True) for count in pair]
    assert removed == removed_cost(groups, config, kept) == pytest.approx(logged[-1] * table.total)
    gone = {
        (array.layer, array.kind): torch.arange(array.count) >= count
        for array, count in zip(groups.arrays, kept, strict=True)
    }
    _, cheapest = removed_and_next(groups, config, gone)
    assert 0.4 * table.total - cheapest < removed <= 0.4 * table.total
    assert summary.latency_ratio == summary.latency / table.total
    assert f"| latency by the table, ns | {summary.latency:,} | {table.total:,} |" in " ".join(str(summary).split())
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"takes {1 - summary.latency_ratio:.1%} less time than the dense model's, by a table" in card
    assert table.conditions in card


def test_a_run_resumes_with_its_own_table_only(tmp_path):
    config = latency_config(table_of(tiny_model(BERT)), target_sparsity=0.3)
    model = tiny_model(BERT)
    optimizer = HSPG(torch.optim.AdamW(model.named_parameters()), partition(model), config, 40)
    other = latency_config(table_of(tiny_model(BERT), seed=1), target_sparsity=0.3)
    with pytest.raises(ValueError, match=r"other settings \(latency_table: {'attention': .{,120}… saved, .* now\)"):
        HSPG(torch.optim.AdamW(model.named_parameters()), partition(model), other, 40).load_state_dict(
            optimizer.state_dict()
        )
    HSPG(torch.optim.AdamW(model.named_parameters()), partition(model), config, 40).load_state_dict(
        optimizer.state_dict()
    )


def test_a_table_of_another_model_and_a_target_out_of_reach_are_refused_before_the_first_step(tmp_path):
    wide = table_of(tiny_model(BERT, intermediate_size=32))
    with pytest.raises(ValueError, match="another architecture: `dense_neurons` 32, the model has 24"):
        trained(tmp_path, latency_config(wide, target_sparsity=0.3))
    fixed = table_of(tiny_model(BERT), fixed=10**6)
    with pytest.raises(
        ValueError, match=r"=0.5 of latency cannot be reached: .* at most 0.\d+ can go, as what is never"
    ):
        trained(tmp_path, latency_config(fixed))


# The example.


def test_the_example_times_what_it_cut(tmp_path, capsys):
    options = ["--size", "tiny", "--targets", "0.05", "--sequence_length", "64", "--repeats", "2", "--cpu_time"]
    numbers = example.main([*options, "--output", str(tmp_path / "latency.json")])
    assert json.loads((tmp_path / "latency.json").read_text(encoding="utf-8")) == numbers
    assert [row["way"] for row in numbers["rows"]] == ["heads first", "evenly", "neurons first"]
    config = OTOConfig(target_sparsity=0.05, target_unit="latency", latency_table=numbers["table"])
    with torch.device("meta"):
        groups = partition(transformers.BertModel(transformers.BertConfig(**example.SIZES["tiny"])))
    for row, kept in zip(numbers["rows"], target_examples(groups, config).values(), strict=True):
        assert row["by_table"] == removed_cost(groups, config, kept) / numbers["table"]["total"] <= 0.05
        assert -5 < row["got"] < 1
    assert "neurons first" in capsys.readouterr().out


def test_models_that_are_compared_stay_in_their_modes():
    models = [tiny_model("BertModel").train(training) for training in (True, False)]
    models[0].pooler.eval()  # as one whose dropout is left out
    seen = [[module.training for module in model.modules()] for model in models]
    (found,) = measure(*models, sequence_lengths=(8,), repeats=1, warmup=1)
    assert found.macs_ratio == 1
    assert [[module.training for module in model.modules()] for model in models] == seen
