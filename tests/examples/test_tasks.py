"""The tasks beside SQuAD: their files, their scores, and runs of each from files to files."""

import json
import random
import subprocess
from types import SimpleNamespace

import forking
import numpy as np
import processes
import pytest
import torch
from benchmarks import frontier, run_task
from benchmarks.tasks import IGNORED, TASKS, accuracy, entities, entity_f1, spearman
from squad_data import CITIES, JOBS, NAMES, wordpiece
from transformers import BertConfig, BertModel

TAGS = {"O", "B-city", "I-city", "B-person"}


def sentences(count, seed):
    """Words and tags of sentences on who lives where."""
    generator = random.Random(seed)
    made = []
    for _ in range(count):
        name, city = generator.choice(NAMES).split(), generator.choice(CITIES).split()
        words = [*name, "lives", "in", *city]
        tags = ["B-person", *["O"] * (len(name) - 1), "O", "O", "B-city", *["I-city"] * (len(city) - 1)]
        made.append((words, tags))
    return made


def file_of(task, count, seed):
    """A file of made-up rows as that task's is laid out."""
    generator = random.Random(seed)
    rows = sentences(count, seed)
    if task == "wnut17":
        blocks = ["\n".join(f"{word}\t{tag}" for word, tag in zip(*row, strict=True)) for row in rows]
        return "\n\t\n".join(blocks) + "\n\n"
    if task == "sst2":
        return "".join(f"{int('Paris' in words)} {' '.join(words)}\n" for words, _ in rows)
    pairs = [generator.choices(range(len(JOBS)), k=2) for _ in range(count)]
    return "".join(f'{JOBS[one]},"a {JOBS[two]}, or so",{(one > 2) + (two > 2)}.0\n' for one, two in pairs)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    tokenizer = wordpiece()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for task in TASKS:
        for split, count in (("train", 60), ("dev", 20)):
            (folder / f"{task}-{split}").write_text(file_of(task, count, split), encoding="utf-8")
    return folder


def options(work, task, *more):
    files = ("--train_file", str(work / f"{task}-train"), "--validation_file", str(work / f"{task}-dev"))
    model = ("--model_name_or_path", str(work / "model"), "--max_seq_length", "32", "--use_cpu")
    quiet = ("--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True")
    return [*files, *model, *quiet, "--max_steps", "40", "--learning_rate", "3e-3", *more]


def test_files_are_read_as_they_are_laid_out(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes("\ufeffAda\tB-person\r\nwaits\tO\r\n\t\r\nin\tO\nParis\tB-city".encode())
    assert TASKS["wnut17"].read(path) == [
        {"text": ["Ada", "waits"], "label": ["B-person", "O"]},
        {"text": ["in", "Paris"], "label": ["O", "B-city"]},
    ]
    path.write_text(
        "1 a d\u00e9j\u00e0\u0085vu of 3 films\n0 dull .\n\n", encoding="utf-8"
    )  # which str.splitlines breaks
    found = TASKS["sst2"].read(path)
    assert found == [
        {"text": ("a d\u00e9j\u00e0\u0085vu of 3 films",), "label": "1"},
        {"text": ("dull .",), "label": "0"},
    ]
    path.write_text('One.,"Two, three.",4.75\n', encoding="utf-8")
    assert TASKS["stsb"].read(path) == [{"text": ("One.", "Two, three."), "label": 4.75}]
    path.write_text("Ada B-person\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a token, a tab and a tag a line, got 'Ada B-person'"):
        TASKS["wnut17"].read(path)


def test_entities_of_tags():
    tags = ["B-a", "I-a", "O", "I-b", "I-b", "B-b", "I-a", "O", "B-a", "B-a"]
    assert entities(tags) == [(0, 1, "a"), (3, 4, "b"), (5, 5, "b"), (6, 6, "a"), (8, 8, "a"), (9, 9, "a")]


def test_scores_worked_out_by_hand():
    names = ["B-a", "B-b", "I-a", "O"]
    gold = np.array([[0, 2, 3, 1, IGNORED], [3, 0, 3, 3, 3]])
    said = np.array([[0, 2, 3, 0, 1], [3, 0, 2, 3, 3]])  # the first is right, a type is wrong, an end is wrong
    assert entity_f1(np.eye(4)[said], gold, names) == pytest.approx(100 / 3)
    assert entity_f1(np.eye(4)[np.full_like(said, 3)], gold, names) == 0
    assert accuracy(np.array([[1, 2], [2, 1], [0, 1]]), np.array([1, 0, 0]), names) == pytest.approx(200 / 3)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    values = np.array([[0.1], [0.2], [0.2], [9.0]]), np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(*values, []) == pytest.approx(100 * 4.5 / (4.5 * 5) ** 0.5)


def test_sequences_that_the_model_has_no_positions_for_are_refused(work, tmp_path):
    command = options(work, "sst2", "--task", "sst2", "--do_train", "--output_dir", str(tmp_path / "out"))
    with pytest.raises(ValueError, match="`max_seq_length` must be at most .*, what the model reads, got 100000"):
        run_task.main([*command, "--max_seq_length", "100000"])


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_learnt_pruned_and_scored_from_disk(work, tmp_path, task):
    pruning = ("--compress", "--pruning_periods", "4", "--shrink_during_training", "True")
    command = options(work, task, "--task", task, "--do_train", "--do_eval", "--output_dir", str(tmp_path / "out"))
    results = run_task.main([*command, *pruning])
    assert json.loads((tmp_path / "out" / "all_results.json").read_text(encoding="utf-8")) == results
    assert results["eval_score"] > {"wnut17": 60, "sst2": 60, "stsb": 40}[task]  # learnt, if little
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "oto_bert" and results["train_steps"] == 40
    if task == "wnut17":
        assert set(config["id2label"].values()) == TAGS
    again = run_task.main(
        [
            *options(work, task, "--task", task, "--do_eval", "--output_dir", str(tmp_path / "again")),
            *("--model_name_or_path", str(tmp_path / "out")),
        ]
    )
    assert again["eval_score"] == results["eval_score"] and again["macs"] == results["macs"]


def test_classes_that_training_does_not_have_are_refused(work, tmp_path):
    (tmp_path / "dev").write_text("2 neither\n", encoding="utf-8")
    command = options(work, "sst2", "--task", "sst2", "--do_eval", "--output_dir", str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"dev has the classes \['2'\], which .*sst2-train has not"):
        run_task.main([*command, "--validation_file", str(tmp_path / "dev")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_frontier_of_a_task_runs_side_by_side_with_a_log_each(work, tmp_path, capfd, monkeypatch):
    methods = ("hspg+teacher", "one-shot", "layers")
    plan = ("--task", "wnut17", "--jobs", "2", "--methods", *methods, "--targets", "0.5", "--seeds", "0", "1")
    command = ["--output_dir", str(tmp_path / "out"), *plan, *options(work, "wnut17", "--logging_steps", "20")]
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(run=forking.run, STDOUT=subprocess.STDOUT))
    lines = frontier.main(command)
    runs = {f"dense-{seed}" for seed in (0, 1)} | {f"{method}-0.5-{seed}" for method in methods for seed in (0, 1)}
    assert {line["run"] for line in lines} == runs == {path.stem for path in (tmp_path / "out" / "logs").iterdir()}
    assert {line["run"] for line in lines[:2]} == {"dense-0", "dense-1"}  # which the others start from
    shown = capfd.readouterr().out
    assert "F1 of entities kept" in shown and "'loss'" not in shown
    assert "'loss'" in (tmp_path / "out" / "logs" / "layers-0.5-1.log").read_text(encoding="utf-8")
    dense = {line["seed"]: line for line in lines[:2]}
    for line in lines[2:]:
        more = dense[line["seed"]]["price"] * (line["method"] != "layers")
        own = {"hspg+teacher": 1, "one-shot": 0, "layers": 0.5}[line["method"]] * dense[line["seed"]]["price"]
        assert line["price"] == pytest.approx(more + own, rel=0.15) and line["steps"] == 40 + 40 * (
            line["method"] == "hspg+teacher"
        )
