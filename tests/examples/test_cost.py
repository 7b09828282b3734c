"""The benchmarks of cost and speed: a tiny run of each. What they measure is for the machine to say, in no test."""

import json
import math
import subprocess
from types import SimpleNamespace

import forking
import pytest
from benchmarks import cost, frontier, scale, speed
from families import group_sizes, tiny_model, zero

from hf_oto import partition


@pytest.mark.slow
def test_a_tiny_benchmark_measures_every_stage(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cost, "subprocess", SimpleNamespace(run=forking.run, PIPE=subprocess.PIPE))
    sizes = {"size": "tiny", "steps": 60, "batch_size": 2, "sequence_length": 16, "targets": 0.5, "device": "cpu"}
    command = [*(word for name, value in sizes.items() for word in (f"--{name}", str(value))), "--no-bf16"]
    numbers = cost.main([*command, "--output", str(tmp_path / "cost.json")])
    assert json.loads((tmp_path / "cost.json").read_text(encoding="utf-8")) == numbers
    at_rest = {f"{stage}{cost.AT_REST}" for stage in ("warmup", "pruning")}
    assert set(numbers["optimizer_step"]) == {*cost.STAGES, *at_rest}
    assert set(numbers["mean_steps"]) == set(cost.STAGES)
    run = numbers["runs"]["0.5"]
    assert 0.4 < run["macs"] < 0.6  # the model that was timed did reach its target
    ratios = [stage["ratio"] for stage in numbers["optimizer_step"].values()]
    ratios += [run["run"], run["step_before_shrinking"], run["step_at_the_target"], numbers["once"]["compress_ratio"]]
    ratios += [numbers["taught_step"], *numbers["mean_steps"].values()]
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
    assert 0.5 < numbers["memory"]["ratio"] < 2 and numbers["memory"]["dense"] > 10**8
    memory, vector = numbers["optimizer_memory"], 4 * 2 * (2 + 512)  # bytes of a number for every group
    redundant, matrix = memory["largest"]["redundant"], memory["largest"]["matrix"]
    assert memory["recovery"]["kept"] == memory["recovery"]["peak"] == memory["warmup"]["kept"] < 2 * vector
    assert memory["warmup"]["peak"] < 1.5 * 4 * 512 * 128  # one matrix at a time, in the first step
    for stage in ("selection", "pruning"):  # and where the groups lie
        assert 4 * vector < memory[stage]["kept"] < redundant + 4 * vector
        assert memory[stage]["peak"] < redundant + 4 * 512 * 128 + 6 * vector  # while one matrix is looked at
    assert memory["selection"]["peak"] > redundant > 4 * matrix  # it was measured
    shown = capsys.readouterr().out
    assert all(f"optimizer's step, {stage}" in shown for stage in cost.STAGES) and "whole run, 50%" in shown


def test_the_device_that_is_timed_is_waited_for(monkeypatch):
    """Of several GPUs not the first."""
    order = []
    monkeypatch.setattr(cost.torch.accelerator, "synchronize", order.append)
    for device in ("cuda:1", "cpu"):
        assert cost.seconds(lambda: order.append("work"), device) >= 0
    assert order == ["cuda:1", "work", "cuda:1", "work"]


def test_the_mean_step_counts_those_at_rest():
    """Of 11,000 steps 1,650 are warm-up, of which 227 before the selection at their end are looked at."""
    ratios = {"warmup": 2.0, "pruning": 5.0, "selection": 9.0, "recovery": 0.5}
    ratios |= {f"{stage}{cost.AT_REST}": 1.0 for stage in ("warmup", "pruning")}
    options = cost.parse(["--run_steps", "11000"])
    means = cost.mean_steps(options, {stage: {"ratio": ratio} for stage, ratio in ratios.items()})
    assert means["warmup"] == pytest.approx(1 + 227 / 1650)
    # Periods of 495 steps: the selection, 267 steps at rest and 227 before the next; after the last one all are.
    assert means["pruning"] == pytest.approx((9 * (267 + 5 * 227) + 494) / (10 * 494))
    assert (means["selection"], means["recovery"]) == (9.0, 0.5)
    assert cost.mean_steps(options, {"warmup": {"ratio": 2.0}, "recovery": {"ratio": 0.5}}) == {"recovery": 0.5}


def test_a_stopped_benchmark_leaves_what_it_measured(tmp_path, monkeypatch):
    def stopped(options, target):
        if target == 0.7:
            raise KeyboardInterrupt
        return {"run": 0.5}

    monkeypatch.setattr(cost, "optimizer_steps", lambda options: {"recovery": {"ratio": 1.0}})
    monkeypatch.setattr(cost, "whole_runs", stopped)
    with pytest.raises(KeyboardInterrupt):
        cost.main(["--output", str(tmp_path / "cost.json")])
    left = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))
    assert left["runs"] == {"0.5": {"run": 0.5}} and left["optimizer_step"] == {"recovery": {"ratio": 1.0}}


def test_memory_is_that_of_the_first_target(monkeypatch):
    started = []

    def run(command, **streams):
        started.append(cost.parse(command[2:]))
        return SimpleNamespace(stdout="7")

    monkeypatch.setattr(cost, "subprocess", SimpleNamespace(run=run, PIPE=None))
    options = cost.parse(["--targets", "0.7", "0.3", "--batch_size", "3"])
    assert cost.memory(options) == {"dense": 7, "pruned": 7, "ratio": 1.0}
    assert [(own.memory_of, own.targets[0], own.batch_size) for own in started] == [
        ("dense", 0.7, 3),
        ("pruned", 0.7, 3),
    ]


@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel", "LlamaModel"])
def test_norms_are_those_of_all_that_a_group_owns(name):
    model = tiny_model(name)
    norms, costs = frontier.norms_and_costs(model)
    whole = sum(float(parameter.square().sum()) for parameter in model.parameters())
    first = 0
    for array in partition(model).arrays:
        zero(model, array, [1])
        rest = sum(float(parameter.square().sum()) for parameter in model.parameters())
        assert float(norms[first + 1] ** 2) == pytest.approx(whole - rest, rel=1e-3)
        assert int(costs[first]) == group_sizes(name)[array.kind == "neurons"]
        whole, first = rest, first + array.count


def test_the_growth_with_the_model_is_measured(tmp_path, capsys):
    options = [
        "--sizes",
        "tiny",
        "mini",
        "billion",
        "--memory",
        "0.1",
        "--repeats",
        "1",
        "--output_dir",
        str(tmp_path),
    ]
    lines = scale.main(options)
    assert json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))["sizes"] == lines
    assert [line["groups"] for line in lines] == [2 * 514, 6 * 1548, 48 * 5140]
    assert lines[-1]["weights"] > 9.8e8  # on shapes alone
    assert "added" in lines[0] and not any("added" in line for line in lines[1:])  # what does not fit takes no step
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    assert "powers of growth" in capsys.readouterr().out


def test_the_power_of_growth():
    lines = [{"groups": size, "selection": 3.0 * size**2} for size in (10, 100, 1000)]
    assert scale.growth(lines, "selection", "groups") == pytest.approx(2)
    assert math.isnan(scale.growth(lines[:1], "selection", "groups"))


def test_the_speed_is_measured_beside_its_limit(tmp_path, capsys):
    sizes = {
        "targets": (0.3, 0.5),
        "batch_sizes": (1, 2),
        "sequence_lengths": (8,),
        "threads": (1,),
        "round_to": (4, 64),
    }
    command = [word for name, values in sizes.items() for word in (f"--{name}", *map(str, values))]
    command += ["--size", "tiny", "--backends", "eager", "--repeats", "2", "--output", str(tmp_path / "speed.json")]
    lines = speed.main(command)
    assert json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))["lines"] == lines
    assert [(line["target"], line["round_to"], line["batch_size"]) for line in lines] == [
        (target, width, size) for target in (0.3, 0.5) for width in (4, 64) for size in (1, 2)
    ]
    for line in lines:
        assert line["latency_ratio"] == line["dense"]["median"] / line["pruned"]["median"]
        assert line["of_limit"] == line["latency_ratio"] / line["macs_ratio"]
        assert line["macs_ratio"] == pytest.approx(1 / (1 - line["target"]), rel=0.1)
    assert lines[0]["macs_ratio"] != lines[2]["macs_ratio"]  # of other widths
    shown = [row.split("│")[1:5] for row in capsys.readouterr().out.splitlines() if "eager" in row]
    assert [tuple(cell.strip() for cell in row) for row in shown] == [
        (target, width, "eager", "8") for target in ("30%", "50%") for width in ("4", "64")
    ]
