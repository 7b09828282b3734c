"""The benchmark for one GPU, as far as it goes without one: what a failure costs, and what is shown."""

import json
from pathlib import Path

import pytest
from benchmarks import gpu


def options_of(folder, *words):
    return gpu.parse(["--device", "cpu", "--small", "--output", str(folder / "found.jsonl"), *words])


def lines_of(options):
    return [json.loads(line) for line in options.output.read_text().splitlines()]


def test_what_fails_is_a_line_and_the_rest_goes_on(tmp_path):
    options = options_of(tmp_path)
    with gpu.guarded(options, "steps", what="trainer"):
        raise RuntimeError("out of memory")
    gpu.write(options, part="steps", what="after", number=1)
    failed, after = lines_of(options)
    assert failed["error"] == "RuntimeError: out of memory" and "test_gpu.py" in failed["trace"]
    assert after == {"part": "steps", "what": "after", "number": 1}


def test_a_part_that_dies_costs_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.sys, "executable", "false")  # whatever is started fails
    assert gpu.main(["--device", "cpu", "--parts", "runs", "latency", "--output", str(tmp_path / "found.jsonl")]) == 1
    shown = capsys.readouterr().out
    assert shown.count("FAILED exit status 1") == 2 and "runs" in shown and "latency" in shown


def test_numbers_stand_beside_their_bars(capsys):
    gpu.show(
        [
            {"part": "runs", "what": "float32", "run": "50 %, shrinking", "ratio": 0.7},
            {"part": "steps", "what": "trainer", "stage": "warmup", "ratio": 1.2},
        ]
    )
    met, missed = capsys.readouterr().out.splitlines()
    assert met.endswith("bar 0.75: met") and missed.endswith("bar 1.03: NOT met")


@pytest.mark.parametrize("written", [False, True])
def test_a_report_of_tests_names_what_failed(written, tmp_path):
    report, log = tmp_path / "report.xml", tmp_path / "log"
    log.write_text("Killed")
    if written:
        cases = '<testcase name="a" time="2"/><testcase name="b" time="1"><failure>why</failure></testcase>'
        report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    found = gpu._report(Path(report), Path(log), None)
    if written:
        assert found == {"passed": 1, "skipped": 0, "failed": {"b": "why"}, "seconds": 3}
    else:
        assert found == {"error": "pytest did not come to its end", "trace": "Killed"}
