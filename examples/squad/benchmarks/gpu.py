#!/usr/bin/env python
"""One command for one GPU: do the contracts hold there, and what do pruning and a pruned model cost there.

It needs no network and at most `--seconds`. Every part runs in processes of its own, within its share of that time;
what is found is appended to `--output` at once, as JSON lines, and is shown as a table at the end. A part that fails
costs itself. `--small` takes tiny models and few steps, to try the command where there is no GPU.

Parts, the shortest answers first: `half` (tests/accelerator trained in bf16, in fp16 with a scaler, and compiled),
`runs` (whole runs over the dense one), `steps` (the optimizer's step over fused AdamW, the step of a training over
plain Trainer's, peak memory), `latency-target` (asked for half of the time, by a table measured there: what it is),
`latency` (dense over pruned by the device's own time), `contracts` (tests/accelerator in float32, one rank of NCCL).
"""

import argparse
import gc
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # hf_oto need not be installed

import torch
import transformers
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForQuestionAnswering, Trainer, TrainerCallback, TrainingArguments

from hf_oto import HSPG, OTOConfig, OTOTrainer, compress, measure_latency, partition
from hf_oto.deploy.benchmark import measure

ROOT = Path(__file__).resolve().parents[3]
# Of the time, the share of each part; and what each does with it.
SHARES = {"half": 0.20, "runs": 0.26, "steps": 0.13, "latency-target": 0.11, "latency": 0.14, "contracts": 0.16}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
TINY = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
RATES = {"lr": 1e-5, "fused": True}
WORDS = ("what", "run", "stage", "removed", "batch", "length")  # what a number is of
BARS = {
    ("steps", "trainer", "warmup"): 1.03,
    ("steps", "trainer", "recovery"): 1.03,
    ("steps", "trainer", "pruning"): 1.10,
    ("steps", "memory", "peak"): 1.03,
    ("latency-target", "bfloat16", "50%"): 0.05,
    ("runs", "bfloat16", "50 %"): 1.05,
    ("runs", "float32", "50 %, shrinking"): 0.75,
    ("runs", "float32", "70 %, shrinking"): 0.62,
}


class Options(argparse.Namespace):
    """What was asked for, and the model and the batch that come of it."""

    device: str
    small: bool
    seconds: float
    output: Path

    @property
    def batch(self) -> tuple[int, int]:
        return (2, 16) if self.small else (32, 384)


def parse(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES), help="In this order. All.")
    parser.add_argument("--seconds", type=float, default=300, help="For all of it. 300.")
    # Which of several GPUs, CUDA_VISIBLE_DEVICES says.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cuda; cpu to try it.")
    parser.add_argument("--small", action="store_true", help="Tiny models, few steps.")
    parser.add_argument("--output", type=Path, default=Path("build/gpu.jsonl"), help="JSON lines; build/gpu.jsonl.")
    parser.add_argument("--within", help=argparse.SUPPRESS)  # the part that this process is
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # by the clock that all processes share
    return parser.parse_args(arguments, namespace=Options())


def write(options: Options, **line: Any) -> None:
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def guarded(options: Options, part: str, **what: Any) -> Iterator[None]:
    """What fails inside is a line of its own, and the rest goes on."""
    try:
        yield
    except Exception as error:
        write(
            options, part=part, **what, error=f"{type(error).__name__}: {error}", trace=traceback.format_exc()[-2000:]
        )
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()


def model_of(options: Options, device: str | None = None) -> BertForQuestionAnswering:
    torch.manual_seed(0)
    sizes = TINY if options.small else BASE
    return BertForQuestionAnswering(BertConfig(**sizes)).to(device or options.device)


def synchronize(options: Options) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


# The contracts.


FOLDER = ROOT / "tests" / "accelerator"
MODELS, TRAINING = (str(FOLDER / f"contract_{name}.py") for name in ("models", "training"))
FIRST = f"{TRAINING}::test_a_run_saves_what_it_trained_and_resumes[BertForQuestionAnswering-"
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
# What is given to pytest, and what is set.
JOBS: dict[str, dict[str, tuple[list[str], dict[str, str]]]] = {
    "half": {
        "training, bf16": ([TRAINING], {"HF_OTO_TEST_PRECISION": "bfloat16"}),
        "training, fp16 with a scaler": ([TRAINING], {"HF_OTO_TEST_PRECISION": "float16"}),
        "torch.compile": ([FIRST + "shrunk]"], {"HF_OTO_TEST_COMPILE": "1"}),
    },
    "contracts": {
        "models, float32": ([MODELS], {}),
        "training, float32": ([TRAINING], {}),
        "one rank": ([FIRST + "full]", FIRST + "shrunk]"], ONE_RANK),
    },
}


def free_port() -> int:
    """One that no other run on this machine listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def contracts(options: Options, deadline: float) -> None:
    _run_tests(options, deadline, JOBS["contracts"])


def half(options: Options, deadline: float) -> None:
    _run_tests(options, deadline, JOBS["half"])


def _run_tests(options: Options, deadline: float, jobs: dict[str, tuple[list[str], dict[str, str]]]) -> None:
    """All at once, as nothing is timed; each is written down when it is done, or when the time is over."""
    reports = Path(tempfile.mkdtemp())
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # packages may be there
    running: dict[str, tuple[Any, Path]] = {}
    for number, (name, (words, more)) in enumerate(jobs.items()):
        if options.device == "cpu" and "scaler" in name:  # which is for CUDA
            continue
        some = ["-k", "DistilBert"] if options.small and len(words[0]) < len(FIRST) else []
        if "RANK" in more:
            more = {**more, "MASTER_PORT": str(free_port())}
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", *words, *some]
        command += [f"--junitxml={reports / str(number)}.xml", "-o", "junit_logging=no"]
        environment = {**os.environ, "HF_OTO_TEST_DEVICE": options.device, **more, "PYTHONPATH": paths}
        with (reports / f"{number}.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        running[name] = process, reports / str(number)
    while running:
        over = time.monotonic() > deadline - 5  # which it takes to report
        for process, _ in running.values():
            if over:
                process.send_signal(signal.SIGINT)  # pytest then reports what it has
        for name, (process, path) in list(running.items()):
            try:
                process.wait(5 if over else 0.1)
            except subprocess.TimeoutExpired:
                if not over:
                    continue
                process.kill()
                process.wait()
            error = "not done in time" if over else None
            write(options, part="contracts", what=name, **_report(Path(f"{path}.xml"), Path(f"{path}.log"), error))
            del running[name]


def _report(report: Path, log: Path, error: str | None) -> dict[str, Any]:
    text = log.read_text(encoding="utf-8", errors="replace")
    late = {} if error is None else {"error": error}
    if not report.is_file():
        said = re.findall(r"^\S+?::(.+?) (PASSED|FAILED|ERROR)", text, re.MULTILINE)
        failed = {name: "see the trace" for name, outcome in said if outcome != "PASSED"}
        passed = sum(outcome == "PASSED" for _, outcome in said)
        late = late or {"error": "pytest did not come to its end"}
        return {"passed": passed, "skipped": 0, "failed": failed, **late, "trace": text[-2000:]}
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {
        case.get("name", ""): (found.text or "")[-1500:]
        for case in cases
        if (found := case.find("failure")) is not None or (found := case.find("error")) is not None
    }
    seconds = sum(float(case.get("time", 0)) for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    return {"passed": passed, "skipped": skipped, "failed": failed, "seconds": seconds, **late}


# The optimizer's step, and a training's.


class Launches(TorchDispatchMode):
    """Counts dispatched operations that are no views."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def kind_of(optimizer: HSPG) -> str:
    """What the next step is."""
    schedule, step = optimizer.schedule, optimizer.steps_done
    if not step:
        return "first"
    if schedule.stage(step) != "pruning":
        return schedule.stage(step)
    return (
        "selection"
        if schedule.starts_period(step)
        else "period's end"
        if schedule.steps_left(step) == 1
        else "pruning"
    )


def optimizer_steps(
    options: Options, steps: int, measured: Callable[[Callable[[], Any]], float]
) -> dict[str, list[float]]:
    """Something of every step of an HSPG run on gradients that stay as they are, by its kind; and of AdamW's steps."""
    found = defaultdict(list)
    for wrapped in (False, True):
        model = model_of(options)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        optimizer: Any = AdamW(model.named_parameters(), **RATES)
        if wrapped:
            optimizer = HSPG(optimizer, partition(model), OTOConfig(target_sparsity=0.5), steps)
        for step in range(steps if wrapped else 30):
            for parameter in model.parameters():  # what is zero has no gradient, as in a training
                parameter.grad.mul_(parameter.detach() != 0)
            kind = kind_of(optimizer) if wrapped else "AdamW" if step else "AdamW, first"
            found[kind].append(measured(optimizer.step))
    return found


def steps(options: Options, deadline: float) -> None:
    number = 40 if options.small else 120

    def milliseconds(step: Callable[[], Any]) -> float:
        synchronize(options)
        start = time.perf_counter()
        step()
        synchronize(options)
        return 1000 * (time.perf_counter() - start)

    with guarded(options, "steps", what="optimizer"):
        found = optimizer_steps(options, number, milliseconds)
        dense = statistics.median(found.pop("AdamW"))
        for kind, times in found.items():
            median = statistics.median(times)
            write(
                options,
                part="steps",
                what="optimizer",
                stage=kind,
                ms=median,
                largest=max(times),
                ratio=median / dense,
            )
        write(options, part="steps", what="optimizer", stage="AdamW", ms=dense)
    with guarded(options, "steps", what="launches"):

        def launches(step: Callable[[], Any]) -> float:
            with Launches() as counted:
                step()
            return counted.count

        for kind, counts in optimizer_steps(options, number, launches).items():
            write(
                options,
                part="steps",
                what="launches",
                stage=kind,
                number=statistics.median(counts),
                largest=max(counts),
            )
    if options.device == "cuda":
        with guarded(options, "steps", what="waits"):
            for kind, counts in optimizer_steps(options, number, _waits).items():
                write(
                    options,
                    part="steps",
                    what="waits",
                    stage=kind,
                    number=statistics.median(counts),
                    largest=max(counts),
                )
    with guarded(options, "steps", what="trainer"):
        trainer_steps(options, deadline)


def _waits(step: Callable[[], Any]) -> float:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


class ByStage(TrainerCallback):
    """
    Milliseconds of a step, stage by stage, and the peak of memory. The device is waited for only where a stage ends:
    in between the host runs ahead of it. The first steps of a run, which allocate, are a stage of their own.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.trainer = options, None
        self.stage, self.done, self.start = "first", 0, 0.0
        self.found: dict[str, dict[str, float]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hspg = getattr(self.trainer, "hspg", None)
        stage = "first" if state.global_step < 3 else hspg.stage if hspg is not None else "dense"
        if stage != self.stage or not self.start:
            self._end()
            self.stage = stage
        self.done += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()

    def _end(self) -> None:
        synchronize(self.options)
        now = time.perf_counter()
        if self.done:
            peak = torch.cuda.max_memory_allocated() if self.options.device == "cuda" else None
            self.found[self.stage] = {"ms": 1000 * (now - self.start) / self.done, "steps": self.done, "peak": peak}
        if self.options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.start, self.done = now, 0


def rows(options: Options) -> list[dict[str, torch.Tensor]]:
    size, length = options.batch
    generator = torch.Generator().manual_seed(0)
    vocabulary = BertConfig().vocab_size
    ids = torch.randint(1000, vocabulary, (4 * size, length), generator=generator)
    positions = torch.randint(length, (4 * size, 2), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "start_positions": start, "end_positions": end}
        for row, (start, end) in zip(ids, positions, strict=True)
    ]


def train(options: Options, folder: str, steps: int, bf16: bool, **settings: Any) -> tuple[Trainer, ByStage, float]:
    """A run, dense without settings: the trainer, its steps, and the seconds without the last save."""
    by_stage = ByStage(options)
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=options.batch[0],
        learning_rate=1e-5,
        bf16=bf16,
        optim="adamw_torch_fused",
        save_strategy="no",
        logging_steps=50,
        report_to=[],
        disable_tqdm=True,
        use_cpu=options.device == "cpu",
    )
    shared: dict[str, Any] = {
        "model": model_of(options, "cpu"),
        "args": arguments,
        "train_dataset": rows(options),
        "callbacks": [by_stage],
    }
    trainer: Any = OTOTrainer(**shared, oto_config=OTOConfig(**settings)) if settings else Trainer(**shared)
    by_stage.trainer = trainer
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    by_stage.trainer = None  # whose model would stay in memory beside the next run's
    return trainer, by_stage, sum(one["ms"] * one["steps"] for one in by_stage.found.values()) / 1000


def bf16_there(options: Options) -> bool:
    """On a processor without instructions for it a product takes fifty times as long."""
    return options.device == "cuda"


def trainer_steps(options: Options, deadline: float) -> None:
    number = 40 if options.small else 100
    with tempfile.TemporaryDirectory() as folder:
        dense = train(options, folder, number // 2, bf16_there(options))[1]
        gc.collect()
        pruned = train(options, folder, number, bf16_there(options), target_sparsity=0.5)[1]
    base = dense.found["dense"]
    for stage, found in pruned.found.items():
        write(options, part="steps", what="trainer", stage=stage, ms=found["ms"], ratio=found["ms"] / base["ms"])
    write(options, part="steps", what="trainer", stage="dense", ms=base["ms"])
    if options.device == "cuda":
        peak, plain = (max(one["peak"] for one in run.found.values()) for run in (pruned, dense))
        write(options, part="steps", what="memory", stage="peak", bytes=peak, ratio=peak / plain)


# Whole runs.

RUNS = {
    "50 %": {"target_sparsity": 0.5},
    "50 %, shrinking": {"target_sparsity": 0.5, "shrink_during_training": True},
    "70 %, shrinking": {"target_sparsity": 0.7, "shrink_during_training": True},
}


def runs(options: Options, deadline: float) -> None:
    """As many steps as there is time for, 400 at most, as many in every run of one precision."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    kinds = {"bfloat16": ["50 %", "50 %, shrinking"], "float32": ["50 %, shrinking", "70 %, shrinking"]}
    if not bf16_there(options):
        del kinds["bfloat16"]
    for index, (precision, names) in enumerate(kinds.items()):
        bf16 = precision == "bfloat16"
        left = (deadline - time.monotonic()) / (len(kinds) - index)
        with guarded(options, "runs", what=precision), tempfile.TemporaryDirectory() as folder:
            _, probe, _ = train(options, folder, 10, bf16)
            step = probe.found["dense"]["ms"] / 1000
            number = int(min(40 if options.small else 400, 0.7 * left / step / (1 + 1.1 * len(names))))
            if number < 30:
                raise TimeoutError(f"{left:.0f} s are left, too few for runs of 30 steps of {step:.3f} s.")
            _, dense, plain = train(options, folder, number, bf16)
            write(options, part="runs", what=precision, run="dense", steps=number, seconds=plain)
            for name in names:
                gc.collect()
                with guarded(options, "runs", what=precision, run=name):
                    trainer, by_stage, seconds = train(options, folder, number, bf16, **RUNS[name])
                    start = time.perf_counter()
                    trainer.save_model(f"{folder}/small")
                    synchronize(options)
                    write(
                        options,
                        part="runs",
                        what=precision,
                        run=name,
                        steps=number,
                        seconds=seconds,
                        save=time.perf_counter() - start,
                        ratio=seconds / plain,
                        stages={stage: found["ms"] for stage, found in by_stage.found.items()},
                        removed=trainer.hspg.metrics()["removed_params"],
                    )


# Latency.


def cut_model(options: Options, share: float, **settings: Any) -> Any:
    """A model from which groups by lot are gone: uneven blocks, as a training leaves them."""
    model = model_of(options)
    config = OTOConfig(target_sparsity=share, saliency="random", pruning_periods=1, **settings)
    optimizer = HSPG(torch.optim.SGD(model.named_parameters(), lr=0.0), partition(model), config, 4)
    for _ in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    optimizer.zero_grad()
    return compress(model.eval())


def latency(options: Options, deadline: float) -> None:
    dtype = torch.bfloat16 if bf16_there(options) else torch.float32
    dense: Any = model_of(options).to(dtype).eval()
    pruned = {}
    for share in (0.5, 0.7):
        with guarded(options, "latency", removed=share):
            pruned[share] = cut_model(options, share).to(dtype)
    batches, lengths = ((1, 2), (16,)) if options.small else ((1, 8, 64), (128, 384))
    sizes = [(batch, length) for length in lengths for batch in batches]
    for backend in ("eager", "compile"):
        for batch, length in sizes:
            for share, small in pruned.items():
                what = {"what": backend, "removed": share, "batch": batch, "length": length}
                if backend == "compile" and (share > 0.5 or deadline - time.monotonic() < 25):
                    continue  # half a minute for two models
                with guarded(options, "latency", **what):
                    options_ = {"backends": [backend], "batch_sizes": [batch], "sequence_lengths": [length]}
                    for one in measure(dense, small, **options_, repeats=10, warmup=2):
                        found = {"dense": one.dense.median, "pruned": one.pruned.median, "ratio": one.latency_ratio}
                        write(options, part="latency", **what, method=one.method, **found, macs=one.macs_ratio)


def latency_target(options: Options, deadline: float) -> None:
    """The share of the dense model's time that is asked for; off by how much of that the pruned one's is."""
    share = 0.8 if options.small else 0.5  # of a small one's forward, most is none of the blocks'
    dtype = torch.bfloat16 if bf16_there(options) else torch.float32
    dense: Any = model_of(options).to(dtype).eval()
    for batch, length in ((1, 16), (2, 16)) if options.small else ((1, 128), (8, 128)):
        what = {"what": str(dtype).removeprefix("torch."), "run": f"{share:.0%}", "batch": batch, "length": length}
        with guarded(options, "latency-target", **what):
            start = time.monotonic()
            table = measure_latency(dense, batch_size=batch, sequence_length=length, repeats=10)
            taken = time.monotonic() - start
            settings = {"target_unit": "latency", "latency_table": table, "min_heads": 0, "min_neurons": 0}
            small = cut_model(options, round(1 - share, 1), **settings).to(dtype)
            (found,) = measure(dense, small, batch_sizes=[batch], sequence_lengths=[length], repeats=20)
            measured = found.pruned.median / found.dense.median
            write(
                options,
                part="latency-target",
                **what,
                measured=measured,
                ratio=abs(measured - share) / share,
                seconds=taken,
                method=table.method,
                whole=[kind for kind in ("heads", "neurons") if table.goes_whole(kind)],
                kept=list(partition(small).block_counts.blocks),
            )


# All of it.

PARTS = {
    "half": half,
    "runs": runs,
    "steps": steps,
    "latency-target": latency_target,
    "latency": latency,
    "contracts": contracts,
}


def machine(options: Options) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": gpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "small": options.small,
    }


def show(lines: list[dict[str, Any]]) -> None:
    """The table: a line for a number, and its bar where there is one."""
    for line in lines:
        part = line.pop("part")
        named = [name for name in WORDS if name in line and (part, name) != ("runs", "removed")]
        words = [str(line[name]) for name in named]
        bar = BARS.get((part, line.get("what"), line.get("run", line.get("stage"))))
        if "error" in line and "failed" not in line:
            said = f"FAILED {line['error'][:200]}"
        elif "failed" in line:
            said = f"{line['error']}: " if "error" in line else ""
            said += f"{line['passed']} passed, {line['skipped']} skipped, {len(line['failed'])} failed"
            said += f" {sorted(line['failed'])[:20]}" if line["failed"] else ""
        else:
            numbers = {name: value for name, value in line.items() if isinstance(value, float | int)}
            said = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if name not in named)
        verdict = (
            ""
            if bar is None or "ratio" not in line
            else f"   bar {bar}: {'met' if line['ratio'] <= bar else 'NOT met'}"
        )
        print(f"{part:10} {' · '.join(words):44} {said}{verdict}")


def _ended(command: list[str], environment: dict[str, str], seconds: float) -> str | None:
    """What went wrong with a part, which ends with all that it has started."""
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "not done in time"
    return f"exit status {process.returncode}: {said.decode(errors='replace')[-1500:]}" if process.returncode else None


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.within:
        write(options, part="machine", what=options.within, **machine(options))
        PARTS[options.within](options, options.until)
        return 0
    options.output = options.output.resolve()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    begun, before = time.monotonic(), options.output.stat().st_size if options.output.exists() else 0
    whole = sum(SHARES[part] for part in options.parts)
    ahead = options.seconds
    for part in options.parts:
        budget = ahead * SHARES[part] / whole  # what a part leaves is for those after it
        whole -= SHARES[part]
        start = time.monotonic()
        command = [sys.executable, __file__, "--within", part, "--until", str(start + budget)]
        command += ["--device", options.device]
        command += ["--output", str(options.output), *(["--small"] if options.small else [])]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if options.device == "cuda":  # of several the first: one process that sees more would use DataParallel
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        if options.small:  # threads that wait for each other take a hundred times as long where others work, too
            environment.setdefault("OMP_NUM_THREADS", "1")
        error = _ended(command, environment, 1.15 * budget + 5)
        taken = time.monotonic() - start
        write(options, part="parts", what=part, seconds=taken, **({} if error is None else {"error": error}))
        ahead = options.seconds - (time.monotonic() - begun)
    with options.output.open(encoding="utf-8") as file:
        file.seek(before)
        lines = [json.loads(line) for line in file]
    show(lines)
    return int(any("error" in line or line.get("failed") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
