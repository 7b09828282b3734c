"""The frontier: which runs it plans, what it makes of their numbers, and a tiny one from end to end."""

import json
from types import SimpleNamespace

import forking
import processes
import pytest
import torch
from benchmarks import frontier
from benchmarks.frontier import DISTILLED, METHODS, Run, by_method, cut, plan, plot, result_table, retained, spread
from families import counts, tiny_model, zero
from rich.console import Console
from transformers import AutoModelForQuestionAnswering

from hf_oto import OTOConfig, partition


def line(method, seed, target=None, score=80.0, size=100, macs=50, price=1000):
    run = Run(method, seed, target)
    numbers = {"score": score, "exact_match": score, "encoder_parameters": size, "macs": macs}
    numbers |= {"steps": 60, "price": price}
    return {"run": str(run), "method": method, "seed": seed, "target": target, **numbers}


LINES = [
    line("dense", 0),
    line("dense", 1, score=90.0),
    line("hspg", 0, 0.5, 76.0, 50, 26, 600),
    line("hspg", 1, 0.5, 88.2, 50, 28, 800),
    line("hspg", 0, 0.3, 80.0, 70, 36),
    line("layers+teacher", 0, 0.5, 60.0, 50, 25),
    line("hspg", 2, 0.5, 1.0, 50, 25),  # its dense run is not there
]


def test_every_seed_begins_with_its_dense_run():
    runs = plan(["hspg", "dense", "one-shot"], [0.5, 0.7], [0, 3])
    assert [str(run) for run in runs[:5]] == [
        "dense-0",
        "hspg-0.5-0",
        "one-shot-0.5-0",
        "hspg-0.7-0",
        "one-shot-0.7-0",
    ]
    assert [run.seed for run in runs] == [0] * 5 + [3] * 5
    assert len(set(map(str, plan([*METHODS, *DISTILLED], frontier.TARGETS, range(3))))) == 3 * (1 + 5 * 9)


def test_shares_are_of_the_dense_run_of_the_same_seed():
    found = by_method(retained(LINES))
    assert list(found) == ["hspg", "layers+teacher"] and list(found["hspg"]) == [0.3, 0.5]
    pair = found["hspg"][0.5]
    assert [one["retained"] for one in pair] == pytest.approx([0.95, 0.98])
    assert [one["macs_kept"] for one in pair] == pytest.approx([0.52, 0.56]) and pair[0]["kept"] == 0.5
    assert spread(pair) == pytest.approx(0.015)


def test_table_and_picture(tmp_path):
    console = Console(record=True, width=120)
    console.print(result_table(LINES))
    shown = [row.split() for row in console.export_text().splitlines() if "hspg" in row]
    cells = [cell for cell in shown[1] if cell != "│"]
    assert cells == ["hspg", "50%", "2", "50.0%", "54.0%", "60", "0.70", "82.10", "96.5%", "±", "1.5%"]
    plot(LINES, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes()[1:4] == b"PNG"


def test_the_cut_by_norm_takes_the_least_groups_and_leaves_all_else():
    model = tiny_model("BertForQuestionAnswering")
    array = partition(model).arrays[3]
    with torch.no_grad():
        for name, dim in array.members:
            dict(model.named_parameters())[name].narrow(dim, 0, 16).mul_(1e-3)
    small = cut(model, OTOConfig(target_sparsity=0.2, saliency="magnitude"))
    assert counts(small)[1][1] == 8  # of the 24 neurons, the 16 whose weights are nearly nothing went
    zero(model, array, range(16))
    for array, kept in zip(partition(model).arrays, partition(small).arrays, strict=True):
        if array.count == kept.count:
            name = array.columns
            assert torch.equal(dict(model.named_parameters())[name], dict(small.named_parameters())[name])


@pytest.mark.slow
def test_a_tiny_frontier_from_end_to_end(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(run=forking.run))
    methods = ["hspg", "hspg+teacher", "published", "one-shot", "layers+teacher"]
    command = ["--output_dir", str(tmp_path / "out"), "--steps", "24", "--eval_paragraphs", "5", "--seeds", "0"]
    command += ["--targets", "0.5", "--methods", *methods, "--keep_models"]
    lines = frontier.main(command)
    assert [one["run"] for one in lines] == ["dense-0", *(f"{method}-0.5-0" for method in methods)]
    shown = capfd.readouterr().out
    assert "F1 kept" in shown and (tmp_path / "out" / "frontier.png").is_file()
    (taught,) = (command for command in shown.splitlines() if "hspg+teacher-0.5-0" in command and "$" in command)
    dense = f"{tmp_path}/out/dense-0"
    expected = {"teacher_model_name_or_path": dense, "model_name_or_path": dense, "distillation_hidden_weight": "10"}
    for option, value in {**expected, "lr_scheduler_type": "warmup_stable_decay"}.items():
        assert taught.rpartition(f"--{option} ")[2].split()[0] == value  # the last one counts
    sizes = {one["method"]: one["encoder_parameters"] for one in lines}
    blocks = 4 * 4 * 128 * 129 + 4 * (2 * 128 * 512 + 640 + 4 * 128)
    assert sizes["dense"] == blocks
    assert sizes["layers+teacher"] == blocks / 2
    assert 0.5 * blocks < sizes["hspg"] < 0.52 * blocks and 0.5 * blocks < sizes["one-shot"] < 0.52 * blocks
    assert 0.3 * blocks < sizes["published"] < 0.8 * blocks
    for one in lines:
        if one["method"] != "one-shot":
            folder = tmp_path / "out" / one["run"]
            loaded = AutoModelForQuestionAnswering.from_pretrained(folder)
            assert loaded.num_parameters() == one["parameters"]

    # Price and steps: shrinking is cheaper, and who needs the dense run pays for it.
    found = {one["method"]: (one["steps"], one["price"] / lines[0]["price"]) for one in lines}
    assert [found[method][0] for method in ("dense", *methods)] == [24, 24, 48, 24, 24, 48]
    assert found["published"][1] == pytest.approx(1) and found["one-shot"] == (24, 1)
    assert 0.55 < found["hspg"][1] < 0.85  # four steps of warm-up, ten in which more and more is cut
    assert 1.8 < found["hspg+teacher"][1] < 2.2 and 1.7 < found["layers+teacher"][1] < 2

    # A second call runs nothing; a line that is gone is run again, and other options are refused.
    path = tmp_path / "out" / "runs.jsonl"
    before = path.read_text(encoding="utf-8")
    capfd.readouterr()
    assert frontier.main(command) == lines and path.read_text(encoding="utf-8") == before
    assert "run_squad.py" not in capfd.readouterr().out
    path.write_text("".join(before.splitlines(keepends=True)[:-2]), encoding="utf-8")
    assert frontier.main([*command, "--methods", "one-shot"])[-1]["score"] == lines[4]["score"]
    assert capfd.readouterr().out.count("run_squad.py --output_dir") == 1
    with pytest.raises(ValueError, match="holds runs of other options"):
        frontier.main([*command, "--learning_rate", "1e-4"])
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0]) == lines[0]
