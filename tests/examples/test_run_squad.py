"""`run_squad.py` from its command line to its files, with a tiny random BERT on a few made-up questions."""

import functools
import json
import os
import shutil
import sys

import datasets
import evaluate
import forking
import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import ModelCard
from qa_trainer import QuestionAnsweringTrainer
from run_squad import METRIC, main
from safetensors.torch import load_file
from squad_data import make_questions, question, squad, wordpiece, write
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
)

from hf_oto import summarize

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TRAIN, DEV, TEST = (make_questions(count, seed) for count, seed in ((48, 1), (20, 2), (6, 3)))
DEV_2 = make_questions(20, 4, negatives=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, its tokenizer and the questions."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    tokenizer = wordpiece()
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES)
    BertForQuestionAnswering(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, questions in (("train", TRAIN), ("dev", DEV), ("dev2", DEV_2)):
        write(folder / f"{name}.json", squad(*questions))
    content = squad(*TEST)
    for paragraph in content["data"][0]["paragraphs"]:
        del paragraph["qas"][0]["answers"]
    write(folder / "test.json", content)
    return folder


@pytest.fixture(autouse=True)
def verbosity():
    before = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(before)


def run(work, output, *more, model=None, **files):
    """Run the example. Keyword arguments are its files, by name of the argument."""
    files = {f"{name}_file": work / f"{path}.json" for name, path in files.items()}
    options = {
        "model_name_or_path": model or work / "model",
        "cache_dir": work / "cache",
        "output_dir": output,
        "max_seq_length": 64,  # most contexts take two windows
        "doc_stride": 16,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 2e-3,
        "report_to": "none",
        "save_strategy": "no",
        **files,
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return main([*arguments, "--use_cpu", "--disable_tqdm", "True", *more])


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def golds(questions):
    return [
        {
            "id": asked["id"],
            "answers": {key: [one[key] for one in asked["answers"]] for key in ("text", "answer_start")},
        }
        for _, asked in questions
    ]


def rescored(path, questions):
    """What v1.1's metric says of a file of predictions."""
    predictions = [{"id": name, "prediction_text": text} for name, text in read(path).items()]
    metric = evaluate.load(METRIC, "v1.1", keep_in_memory=True)
    return metric.compute(predictions=predictions, references=golds(questions))


def test_dense_training_evaluation_and_prediction(work, tmp_path):
    out = tmp_path / "runs" / "dense"
    more = ("--max_steps", "16", "--logging_steps", "4", "--eval_strategy", "steps", "--eval_steps", "8")
    switches = ("--do_train", "--do_eval", "--do_predict")
    results = run(work, out, *switches, *more, train="train", validation="dev", test="test")

    contexts = {asked["id"]: context for context, asked in (*DEV, *TEST)}
    for stage, questions in (("eval", DEV), ("test", TEST)):
        predictions = read(out / f"{stage}_predictions.json")
        n_best = read(out / f"{stage}_nbest_predictions.json")
        assert list(predictions) == list(n_best) == [asked["id"] for _, asked in questions]
        for name, text in predictions.items():
            assert text and text in contexts[name]
            assert len(n_best[name]) == 20 and n_best[name][0]["text"] == text
            assert sum(one["probability"] for one in n_best[name]) == pytest.approx(1, rel=1e-12)
        assert not (out / f"{stage}_null_odds.json").exists()

    scores = rescored(out / "eval_predictions.json", DEV)
    assert 0 < scores["f1"] < 100
    assert {name: results[f"eval_{name}"] for name in scores} == scores
    assert not [name for name in results if name.startswith("test_") and name.endswith(("f1", "exact_match"))]
    assert results["eval_samples"] > len(DEV)  # windows

    history = read(out / "trainer_state.json")["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    evaluations = {entry["step"]: entry["eval_f1"] for entry in history if "eval_f1" in entry}
    assert set(evaluations) == {8, 16} and evaluations[16] == results["eval_f1"]  # scored while it trains, too

    model = AutoModelForQuestionAnswering.from_pretrained(out)
    assert type(model) is BertForQuestionAnswering
    untrained = load_file(work / "model" / "model.safetensors")
    assert not torch.equal(model.qa_outputs.weight, untrained["qa_outputs.weight"])
    summary = summarize(model, sequence_length=64)
    size = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "encoder_parameters": sum(parameter.numel() for parameter in model.bert.encoder.parameters()),
        "macs": summary.macs,
        "file_size": summary.file_size,
    }
    assert read(out / "model_results.json") == size
    assert read(out / "all_results.json") == results and size.items() <= results.items()
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size


def test_version_2_says_nothing_above_the_threshold(work, tmp_path):
    def answers(name, threshold):
        out = tmp_path / name
        arguments = ("--version_2_with_negative", "--null_score_diff_threshold", str(threshold), "--do_eval")
        results = run(work, out, *arguments, validation="dev2")
        kinds = ("predictions", "null_odds", "nbest_predictions")
        return results, *(read(out / f"eval_{kind}.json") for kind in kinds)

    _, all_said, odds, _ = answers("first", 1e6)
    assert list(odds) == [asked["id"] for _, asked in DEV_2] and all(all_said.values())
    threshold = sorted(odds.values())[9]  # half of the questions
    results, predictions, again, n_best = answers("second", threshold)
    assert again == odds
    assert predictions == {name: all_said[name] if odds[name] <= threshold else "" for name in odds}
    assert sum(map(bool, predictions.values())) == 10
    assert all("" in [one["text"] for one in candidates] for candidates in n_best.values())

    absent = {asked["id"] for _, asked in DEV_2 if asked["is_impossible"]}
    assert (results["eval_HasAns_total"], results["eval_NoAns_total"]) == (20 - len(absent), len(absent)) == (14, 6)
    right = sum(not predictions[name] for name in absent)
    assert results["eval_NoAns_exact"] == pytest.approx(100 * right / 6, rel=1e-12)  # the last bit of one division
    assert results["eval_best_f1"] >= results["eval_f1"] >= results["eval_exact"]


def test_a_model_from_scratch(work, tmp_path):
    arguments = ("--config_name", str(work / "model"), "--tokenizer_name", str(work / "model"), "--seed", "5")
    options = ["--do_eval", "--validation_file", str(work / "dev.json"), "--report_to", "none", "--use_cpu"]
    options += ["--cache_dir", str(work / "cache"), "--max_seq_length", "64", "--doc_stride", "16"]
    results = main([*arguments, *options, "--output_dir", str(tmp_path / "out")])
    torch.manual_seed(5)
    expected = BertForQuestionAnswering(BertConfig.from_pretrained(work / "model"))
    assert results["parameters"] == expected.num_parameters()
    assert results["eval_f1"] == rescored(tmp_path / "out" / "eval_predictions.json", DEV)["f1"]


BAD = {
    "broken": ("[", "is not JSON"),
    "other": (json.dumps({"data": [{"title": "a"}]}), r"lacks 'paragraphs'"),
    "misplaced": (json.dumps(squad(*TRAIN, question("m", "abc def", "?", ("def", 3)))), "1 question .* Ids: m"),
    "negative": (json.dumps(squad(*TRAIN, question("n", "abc def", "?"))), "no answer.*version_2_with_negative"),
    "long": (json.dumps(squad(*TRAIN, question("l", "abc def", "why " * 60, "def"))), "`max_seq_length` 64 leaves"),
}


@pytest.mark.parametrize("kind", ["train", "validation"])
@pytest.mark.parametrize("name", BAD)
def test_bad_questions_are_refused_before_anything_is_written(work, tmp_path, monkeypatch, name, kind):
    content, message = BAD[name]
    (tmp_path / "bad.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    files = {"train": work / "train", "validation": work / "dev", kind: tmp_path / "bad"}
    with pytest.raises(ValueError, match=message):
        run(work, tmp_path / "out", "--do_train", "--do_eval", "--max_steps", "1", **files)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_what_cannot_work_is_refused_before_anything_is_written(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = wordpiece()
    tokenizer.add_tokens(["Atlantis"])
    tokenizer.save_pretrained(tmp_path / "larger")
    BertForQuestionAnswering(BertConfig(vocab_size=151, **SIZES)).save_pretrained(tmp_path / "larger")
    for arguments, message in (
        (("--compress", "--target_sparsity", "0.99"), "`target_sparsity`=0.99 .* cannot be reached"),
        (("--target_sparsity", "0.3"), "`--target_sparsity` set up the compression: give `--compress` too"),
        (("--max_seq_length", "65"), "`max_seq_length` must be at most 64, what the model reads, got 65"),
        (("--tokenizer_name", str(tmp_path / "larger")), "tokenizer has 181 entries, the model's vocabulary 180"),
        (
            ("--compress", "--teacher_model_name_or_path", str(tmp_path / "larger")),
            "`teacher_model` has `vocab_size`=151",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(work, tmp_path / "out", "--do_train", "--max_steps", "20", *arguments, train="train")
    assert [path.name for path in tmp_path.iterdir()] == ["larger"]


def test_a_teacher_that_tells_segments_apart_gets_them(work, tmp_path, monkeypatch):
    """DistilBERT does not, nor does its tokenizer."""
    torch.manual_seed(1)
    tokenizer = wordpiece(model_input_names=["input_ids", "attention_mask"])
    student = tmp_path / "student"
    DistilBertForQuestionAnswering(
        DistilBertConfig(vocab_size=180, max_position_embeddings=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    ).save_pretrained(student)
    tokenizer.save_pretrained(student)
    seen, forward = [], BertForQuestionAnswering.forward

    @functools.wraps(forward)
    def noting(*args, **kwargs):
        seen.append(kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(BertForQuestionAnswering, "forward", noting)
    more = (
        "--compress",
        "--pruning_periods",
        "2",
        "--teacher_model_name_or_path",
        str(work / "model"),
        "--max_steps",
        "8",
    )
    run(work, tmp_path / "out", "--do_train", *more, train="train", model=student)
    assert len(seen) == 8
    for inputs in seen:
        context = ((inputs["input_ids"] == tokenizer.sep_token_id).cumsum(-1) > 0).roll(1, -1)
        context[:, 0] = False
        assert torch.equal(inputs["token_type_ids"], (context & (inputs["attention_mask"] == 1)).long())
        assert context.any()


def test_a_run_is_refused_resumed_and_replaced(work, tmp_path):
    out = tmp_path / "out"
    # The later --save_strategy counts.
    saving = ("--do_train", "--save_strategy", "steps", "--save_steps", "4")
    run(work, out, *saving, "--max_steps", "8", train="train")
    weights = load_file(out / "model.safetensors")
    names = {path.name for path in out.iterdir()}
    assert {"checkpoint-4", "checkpoint-8", "train_results.json"} <= names

    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in out.rglob("*")}
    with pytest.raises(ValueError, match="is not empty, it may hold another run"):
        run(work, out, *saving, "--max_steps", "4", train="train")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in out.rglob("*")} == before

    shutil.rmtree(out / "checkpoint-8")
    (out / "model.safetensors").unlink()
    run(work, out, *saving, "--max_steps", "8", "--resume_from_checkpoint", "last", train="train")
    assert read(out / "trainer_state.json")["global_step"] == 8
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)

    run(work, out, *saving, "--max_steps", "4", "--overwrite_output_dir", train="train")
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4"}
    assert read(out / "trainer_state.json")["global_step"] == 4


STRANGER = """
import json, sys
import torch
from transformers import AutoModelForQuestionAnswering

model = AutoModelForQuestionAnswering.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    outputs = model(torch.arange(2, 22)[None])
logits = torch.stack([outputs.start_logits, outputs.end_logits]).tolist()
print(json.dumps([type(model).__name__, model.config.model_type, sum(p.numel() for p in model.parameters()), logits]))
"""


def test_compressed_training_leaves_a_small_model_that_scores_as_the_zeroed_one(work, tmp_path):
    out = tmp_path / "small"
    more = ("--compress", "--target_sparsity", "0.5", "--pruning_periods", "4", "--max_steps", "40")
    eager = ("--attn_implementation", "eager")
    results = run(work, out, "--do_train", "--do_eval", *more, *eager, train="train", validation="dev")
    assert read(out / "all_results.json") == results

    # The same function of the same weights: other sums of the same float32 numbers move logits by some 1e-6, and an
    # answer only where two are that close.
    for name in ("exact_match", "f1"):
        assert results[f"zeroed_{name}"] == results[f"eval_{name}"]
    assert results["eval_f1"] > 0
    zeroed, small = (read(out / f"{stage}_nbest_predictions.json") for stage in ("zeroed", "eval"))
    assert len({candidates[0]["text"] for candidates in small.values()}) > 5
    for name, candidates in small.items():
        for one, other in zip(candidates, zeroed[name], strict=True):
            assert one["start_logit"] == pytest.approx(other["start_logit"], abs=1e-4)
            assert one["end_logit"] == pytest.approx(other["end_logit"], abs=1e-4)

    card = ModelCard.load(out / "README.md")
    assert "## Compression" in card.text and "on the train.json dataset" in card.text and not card.data.datasets
    assert f"| eval_f1 | {results['eval_f1']:.4g} |" in card.text
    config = read(out / "config.json")
    assert config["model_type"] == "oto_bert"
    model = AutoModelForQuestionAnswering.from_pretrained(out)
    summary = summarize(model, sequence_length=64)
    # Never over the target, and under it by less than one item of 8 neurons.
    removed = summary.dense_prunable_parameters - summary.prunable_parameters
    assert 0 <= 0.5 * summary.dense_prunable_parameters - removed < 8 * (2 * 32 + 1)
    dense = BertForQuestionAnswering.from_pretrained(work / "model").num_parameters()
    assert results["parameters"] == model.num_parameters() == dense - removed
    assert results["macs"] == summary.macs < summary.dense_macs
    assert results["file_size"] == summary.file_size

    # Any process, without this package, and a later run of the example.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", STRANGER, str(out)]
    done = forking.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    *found, logits = json.loads(done.stdout)
    assert found == ["OTOBertForQuestionAnswering", "oto_bert", results["parameters"]]
    with torch.no_grad():
        outputs = model(torch.arange(2, 22)[None])
    expected = torch.stack([outputs.start_logits, outputs.end_logits])
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-5)  # float32, in another process
    again = run(work, tmp_path / "again", "--do_eval", *eager, model=out, validation="dev")
    for name in ("eval_f1", "eval_exact_match", "parameters", "macs"):
        assert again[name] == results[name]


def test_bfloat16_on_a_processor_that_is_not_made_for_it_is_said_to_be_slow(work, tmp_path, monkeypatch, caplog):
    for able in (True, False):
        monkeypatch.setattr("run_squad.made_for_bf16", lambda able=able: able)
        caplog.clear()
        run(work, tmp_path / str(able), "--do_eval", "--bf16", "--max_eval_samples", "2", validation="dev")
        said = [record.getMessage() for record in caplog.records if "bfloat16" in record.getMessage()]
        assert len(said) == (not able)
    assert "will be slow" in said[0] and "Leave out `--bf16`" in said[0]
    monkeypatch.setattr("run_squad.made_for_bf16", lambda: 1 / 0)  # not asked without it
    run(work, tmp_path / "float32", "--do_eval", "--max_eval_samples", "2", validation="dev")


def test_the_price_counts_every_step_as_large_as_the_model_is_in_it(work, tmp_path):
    """In float32, of windows that are all padded to 64 tokens: dense, shrunk on the way, and with a teacher."""
    batch = ("--max_steps", "40", "--pad_to_max_length", "--do_train")
    shrinking = ("--compress", "--pruning_periods", "4", "--shrink_during_training", "True", "--logging_steps", "1")
    dense = run(work, tmp_path / "dense", *batch, train="train")
    pruned = run(work, tmp_path / "pruned", *batch, *shrinking, train="train")
    teacher = ("--compress", "--target_sparsity", "0", "--teacher_model_name_or_path", str(work / "model"))
    taught = run(work, tmp_path / "taught", *batch, *teacher, train="train")
    windows = dense["train_samples"]
    epochs, rest = divmod(40, -(-windows // 8))
    rows = epochs * windows + 8 * rest
    assert dense["train_steps"] == pruned["train_steps"] == 40
    assert dense["train_macs"] == 3 * rows * dense["macs"]  # one forward, and twice as much to go back
    assert taught["train_macs"] == 4 * rows * dense["macs"]
    # Six steps of warm-up in full size, eighteen in which it is cut four times, and all others small.
    assert 0.6 * dense["train_macs"] < pruned["train_macs"] < 0.85 * dense["train_macs"]
    assert pruned["train_macs"] > 3 * rows * pruned["macs"]


@pytest.mark.parametrize("disabled", [False, True])
def test_all_that_takes_long_has_a_bar_unless_they_are_disabled(work, tmp_path, capfd, disabled):
    more = ["--compress", "--do_train", "--do_eval", "--max_train_samples", "8", "--max_steps", "24"]
    more += ["--disable_tqdm", str(disabled), "--overwrite_cache"]
    run(work, tmp_path / "out", *more, train="train", validation="dev")
    shown = capfd.readouterr().err
    bars = ("Tokenizing", "Searching answers", "Reading answers off", "Cutting out what is zero", "it/s]")
    assert [bar for bar in bars if bar in shown] == ([] if disabled else [*bars])
    assert "Checking the small model" in shown or disabled
    assert transformers.utils.logging.is_progress_bar_enabled() and not datasets.are_progress_bars_disabled()


def test_every_evaluation_set_is_scored_with_its_own_windows(tmp_path):
    """As [`Trainer`] does for a dict of data sets; windows keep the columns that the model does not take."""
    seen = []

    def post_process(windows, logits, prefix):
        seen.append((prefix, windows["example"][:], [side.shape for side in logits]))
        return {"windows": len(windows)}

    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(vocab_size=20, max_position_embeddings=8, **SIZES))
    sets = {
        name: Dataset.from_dict({"input_ids": [[row, 1, 2] for row in range(count)], "example": range(count)})
        for name, count in (("near", 3), ("far", 2))
    }
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = QuestionAnsweringTrainer(model=model, args=args, eval_dataset=sets, post_process=post_process)
    metrics = trainer.evaluate()
    assert (metrics["eval_near_windows"], metrics["eval_far_windows"]) == (3, 2)
    assert trainer.evaluate(sets["far"], metric_key_prefix="zeroed")["zeroed_windows"] == 2
    prediction = trainer.predict(sets["near"])
    assert prediction.metrics["test_windows"] == 3
    shapes = {count: [(count, 3)] * 2 for count in (2, 3)}
    assert seen == [
        ("eval_near", [0, 1, 2], shapes[3]),
        ("eval_far", [0, 1], shapes[2]),
        ("zeroed", [0, 1], shapes[2]),
        ("test", [0, 1, 2], shapes[3]),
    ]
    plain = QuestionAnsweringTrainer(model=model, args=args, eval_dataset=sets["far"])
    assert not [name for name in plain.evaluate() if name.endswith("windows")]


def test_windows_are_scored_in_their_own_order_also_where_training_groups_them_by_length(work, tmp_path):
    """Trainer would group the evaluation as well, and answers would be read off other windows."""
    plain = run(work, tmp_path / "plain", "--do_eval", validation="dev")
    grouped = ("--do_eval", "--train_sampling_strategy", "group_by_length")
    run(work, tmp_path / "grouped", *grouped, "--per_device_eval_batch_size", "4", validation="dev")
    names = ("eval_predictions.json", "eval_nbest_predictions.json")
    texts, n_best = ([read(tmp_path / run_name / name) for run_name in ("plain", "grouped")] for name in names)
    assert texts[0] == texts[1] and plain["eval_f1"] > 0
    for name, expected in n_best[0].items():
        logits = ([one["start_logit"] for one in found[:3]] for found in (expected, n_best[1][name]))
        assert next(logits) == pytest.approx(next(logits), abs=1e-4)  # other batches, other padding
