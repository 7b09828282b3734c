"""The example of embedding models: every method runs and says what it did; texts, tables and speeds."""

import csv
import json
import re

import encode_speed
import pytest
import run_embeddings
import tables
import texts
from embedding_runs import embedder
from squad_data import make_questions, squad, write


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scored pairs, questions, other texts, and a tiny model."""
    folder = tmp_path_factory.mktemp("data")
    asked = make_questions(40, seed=3)
    for part in ("train", "dev"):
        with open(folder / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
            rows = [(one["question"], context, number % 6) for number, (context, one) in enumerate(asked)]
            csv.writer(file).writerows(rows)
        write(folder / f"{part}.json", squad(*asked))
    (folder / "more.txt").write_text("1 a fine cliché .\n0 a dull one\x85 .\n", encoding="utf-8")
    (folder / "more.conll").write_text("Ada\tB\nlives\tO\n\t\nKofi\tB\n", encoding="utf-8")
    embedder(folder / "encoder").save_pretrained(str(folder / "model"))
    return folder


def run(data, tmp_path, method, *more):
    given = ["--method", method, "--model", str(data / "model"), "--stsb", str(data), "--squad", str(data)]
    given += ["--texts", str(data / "more.txt"), str(data / "more.conll"), "--embeddings", str(data / "kept.npz")]
    results = tmp_path / "results.jsonl"
    short = ["--max_steps", "10", "--batch_size", "4", "--max_samples", "20", "--results", str(results)]
    run_embeddings.main([*given, *short, *more])
    return json.loads(results.read_text().splitlines()[-1])


def pairs_in(context):
    sentences = texts.SENTENCE_END.split(context)
    return zip(sentences, sentences[1:], strict=False)


def test_texts_are_each_once_and_long_ones_give_runs_of_sentences(data):
    found = texts.texts_to_learn_from([data / name for name in ("train.csv", "train.json", "more.txt", "more.conll")])
    every = found["sentences"]
    assert len(every) == len(set(every))
    assert {"a fine cliché .", "a dull one\x85 .", "Ada lives", "Kofi"} <= set(found["sentences"])
    context = make_questions(1, seed=3)[0][0]
    first, second, third = texts.SENTENCE_END.split(context)
    assert {context, first, second, third} <= set(every)
    assert any(f"{one} {other}" in every for text, _ in make_questions(40, seed=3) for one, other in pairs_in(text))
    assert set(found) == {"sentences"}  # none of these is long


@pytest.mark.parametrize("name", ["train.csv", "train.json", "more.txt", "more.conll"])
def test_a_byte_order_mark_is_no_content(name, data, tmp_path):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (data / name).read_bytes())
    assert texts.read_texts(tmp_path / name) == texts.read_texts(data / name)


@pytest.mark.parametrize("row", ["a,b", "a,b,6"])
def test_pairs_that_are_none_are_refused(row, tmp_path):
    (tmp_path / "pairs.csv").write_text(f"a,b,5.0\n{row}\n")
    with pytest.raises(ValueError, match="row 2"):
        texts.read_pairs(tmp_path / "pairs.csv")


def test_the_original_keeps_all_and_other_texts_do_not_get_its_embeddings(data, tmp_path):
    line = run(data, tmp_path, "original")
    assert line["macs_kept"] == 1 and line["steps"] == 10
    with pytest.raises(ValueError, match="other texts"):
        run(data, tmp_path, "distill", "--max_samples", "10")


@pytest.mark.parametrize("method", ["distill", "sts", "retrieval", "rerank"])
def test_what_prunes_keeps_what_was_asked(method, data, tmp_path):
    line = run(data, tmp_path, method, "--sparsity", "0.5")
    assert 0.4 < line["macs_kept"] < 0.6
    assert -1 <= line["spearman"] <= 1
    assert ("ndcg@10" in line) == (method != "rerank")


def test_layers_are_dropped_and_the_dense_one_is_not_pruned(data, tmp_path, monkeypatch):
    monkeypatch.setitem(run_embeddings.KEPT_BLOCKS, 1, (1,))
    assert run(data, tmp_path, "layers", "--blocks", "1")["macs_kept"] == pytest.approx(1 / 3)
    assert run(data, tmp_path, "sts", "--sparsity", "0")["macs_kept"] == 1


def test_the_table_has_means_ranges_and_shares():
    common = {"metric": "mse", "saliency": "fisher", "macs_kept": 0.5, "sparsity": 0.5}
    lines = [{**common, "method": "original", "sparsity": 0, "spearman": 0.8, "ndcg@10": 0.5, "macs_kept": 1}]
    lines += [{**common, "method": "distill", "spearman": score, "ndcg@10": 0.45} for score in (0.7, 0.74)]
    lines += [{**common, "method": "rerank", "sparsity": share, "spearman": 0.9 - share} for share in (0.0, 0.3)]
    found = dict(row.strip("| ").split(" | ", 1) for row in tables.rows(lines)[2:])
    assert found["distilled, mse, 50% removed"] == "2 | 50.0% | 0.7200 ± 0.0200 | 90.0% | 0.4500 ± 0.0000 | 90.0%"
    assert "66.7%" in found["cross-encoder, 30% removed"]
    assert not re.search("%.*%", found["cross-encoder, dense"])


def test_speeds_are_of_all_models_in_turns(data, tmp_path, capsys):
    run(data, tmp_path, "distill", "--save", str(tmp_path / "small"))
    given = ["--model", str(data / "model"), "--small", str(tmp_path / "small"), "--stsb", str(data)]
    given += ["--squad", str(data), "--count", "8", "--repeats", "1"]
    lines = encode_speed.main(given)
    assert [line["model"] for line in lines] == [str(data / "model"), str(tmp_path / "small")] * 2
    assert all(1.5 < line["macs"] < 2.5 and line["speed"] > 0 for line in lines[1::2])
