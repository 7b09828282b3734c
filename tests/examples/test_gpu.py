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


@pytest.mark.parametrize(("seen", "used"), [(None, "0"), ("2,3", "2"), ("GPU-8f", "GPU-8f")])
def test_of_several_gpus_one_is_used(seen, used, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(gpu, "_ended", lambda command, environment, seconds: started.append(environment))
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    for device in ("cuda", "cpu"):
        gpu.main(["--device", device, "--parts", "runs", "--output", str(tmp_path / "found.jsonl")])
    assert [environment.get("CUDA_VISIBLE_DEVICES") for environment in started] == [used, seen]


def test_one_of_several_gpus_is_not_named_where_it_would_not_be_waited_for(tmp_path, capsys):
    with pytest.raises(SystemExit):
        options_of(tmp_path, "--device", "cuda:1")
    assert "invalid choice: 'cuda:1'" in capsys.readouterr().err


def test_tests_find_the_packages_that_the_command_finds(tmp_path, monkeypatch):
    started = []

    class Done:
        def __init__(self, command, env, **streams):
            started.append(env["PYTHONPATH"].split(gpu.os.pathsep))

        def wait(self, timeout):
            return 0

    monkeypatch.setattr(gpu.subprocess, "Popen", Done)
    for path in ("/elsewhere/site", None):
        if path is None:
            monkeypatch.delenv("PYTHONPATH")
        else:
            monkeypatch.setenv("PYTHONPATH", path)
        gpu.contracts(options_of(tmp_path), deadline=float("inf"))
    number = len(gpu.JOBS["contracts"])
    assert started == [[str(gpu.ROOT), "/elsewhere/site"]] * number + [[str(gpu.ROOT)]] * number


def test_what_a_number_is_of_stands_once(capsys):
    gpu.show(
        [
            {"part": "latency", "what": "eager", "removed": 0.5, "batch": 8, "length": 128, "ratio": 1.5},
            {"part": "runs", "what": "float32", "run": "50 %", "ratio": 1.5, "removed": 0.49},
        ]
    )
    latency, runs = capsys.readouterr().out.splitlines()
    assert " ".join(latency.split()) == "latency eager · 0.5 · 8 · 128 ratio 1.5"
    assert runs.endswith(" ratio 1.5, removed 0.49")


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
    said = "contract_a.py::a PASSED [ 33%]\ncontract_a.py::b[1-x] FAILED [ 66%]\ncontract_a.py::c "
    log.write_text(said)
    if written:
        cases = '<testcase name="a" time="2"/><testcase name="b" time="1"><failure>why</failure></testcase>'
        report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    found = gpu._report(Path(report), Path(log), None)
    if written:
        assert found == {"passed": 1, "skipped": 0, "failed": {"b": "why"}, "seconds": 3}
    else:
        counted = {"passed": 1, "skipped": 0, "failed": {"b[1-x]": "see the trace"}}
        assert found == {**counted, "error": "pytest did not come to its end", "trace": said}


def test_half_of_the_time_is_measured_against_what_was_asked(tmp_path):
    """On the processor, where a small model is timed."""
    options = options_of(tmp_path)
    gpu.latency_target(options, deadline=float("inf"))
    found = lines_of(options)
    assert [(line["batch"], line["method"], line["whole"]) for line in found] == [(1, "clock", []), (2, "clock", [])]
    for line in found:
        assert line["ratio"] == pytest.approx(abs(line["measured"] - 0.8) / 0.8)
        assert line["kept"] != [[4, 128]] * 3 and len(line["kept"]) == 3
