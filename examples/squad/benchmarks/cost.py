#!/usr/bin/env python
"""What pruning costs beside plain training, as ratios of one run: a dense and a pruned model of random weights take
turns, step by step, so that both meet the same machine. Above 1 it is dearer than dense training, below 1 cheaper.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the example's own modules

import torch
from outputs import write_json
from precision import choose_bf16
from processes import console
from rich.table import Table
from torch import is_tensor
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForQuestionAnswering

from hf_oto import HSPG, OTOConfig, compress, partition, shrink
from hf_oto.hspg.schedule import Schedule
from hf_oto.training.distillation import logits_loss

SIZES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "mini": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
STAGES = ("warmup", "pruning", "selection", "recovery")
AT_REST = ", at rest"  # steps that no saliency is gathered in, as most are in a long run
RATES = {"lr": 1e-4, "fused": True}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base", help="Of the model.")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.7], help="Shares to be removed.")
    parser.add_argument("--steps", type=int, default=60, help="Of each training.")
    parser.add_argument("--run_steps", type=int, default=11_000, help="Of the run that mean steps are of.")
    parser.add_argument("--batch_size", type=int, default=16, help="Sequences of a step.")
    parser.add_argument("--sequence_length", type=int, default=384, help="Tokens of a sequence.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where it runs.")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="Train under autocast; by default if made for it."
    )
    parser.add_argument("--output", type=Path, default=Path("build/cost.json"), help="The numbers.")
    parser.add_argument("--memory_of", choices=("dense", "pruned"), help=argparse.SUPPRESS)  # in a process of its own
    return parser.parse_args(arguments)


def make_model(size: str, device: str) -> BertForQuestionAnswering:
    torch.manual_seed(0)
    return BertForQuestionAnswering(BertConfig(**SIZES[size])).to(device).train()


def batch(size: int, length: int, device: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 30000, (size, length))
    positions = torch.randint(length, (2, size))
    return {
        name: tensor.to(device)
        for name, tensor in (("input_ids", ids), ("start_positions", positions[0]), ("end_positions", positions[1]))
    }


def seconds(action: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    action()
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def backward(model: BertForQuestionAnswering, inputs: dict[str, torch.Tensor], bf16: bool) -> None:
    with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=bf16):
        loss = model(**inputs).loss
    loss.backward()


def stage_of(schedule: Schedule, step: int) -> str:
    return "selection" if schedule.starts_period(step) else schedule.stage(step)


def looked_at(schedule: Schedule, step: int, config: OTOConfig) -> str:
    """The stage of a step, and whether it is at rest."""
    observed = schedule.observed(step, config.saliency_interval, config.saliency_decay)
    return stage_of(schedule, step) + ("" if observed or schedule.stage(step) == "recovery" else AT_REST)


def optimizer_steps(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """
    The optimizer's step over that of the AdamW that it wraps, stage by stage; nothing is shrunk. Saliency is gathered
    in every other step.
    """
    models = [make_model(options.size, options.device) for _ in range(2)]
    base = AdamW(models[0].parameters(), **RATES)
    inner = AdamW(models[1].named_parameters(), **RATES)
    config = OTOConfig(target_sparsity=options.targets[0], saliency_interval=2)
    pruning = HSPG(inner, partition(models[1]), config, options.steps)
    times = defaultdict(list)
    for _ in range(options.steps):
        for model in models:  # short sequences: the step does not depend on them
            backward(model, batch(2, 16, options.device), options.bf16)
        stage = looked_at(pruning.schedule, pruning.steps_done, config)
        times[stage].append((seconds(base.step, options.device), seconds(pruning.step, options.device)))
        for optimizer in (base, pruning):
            optimizer.zero_grad()
    return {
        stage: {
            "ratio": statistics.median(ours / theirs for theirs, ours in pairs[1:] or pairs),  # the first allocates
            "milliseconds": 1000 * statistics.median(ours for _, ours in pairs),
        }
        for stage, pairs in times.items()
    }


def mean_steps(options: argparse.Namespace, steps: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean step of every stage of a training of `run_steps` steps with the default settings, if all its kinds of
    steps were measured."""
    config = OTOConfig(target_sparsity=options.targets[0])
    schedule = Schedule.from_config(config, options.run_steps)
    ratios = defaultdict(list)
    for step in range(options.run_steps):
        measured = steps.get(looked_at(schedule, step, config), {"ratio": math.nan})
        ratios[stage_of(schedule, step)].append(measured["ratio"])
    return {stage: statistics.mean(found) for stage, found in ratios.items() if not math.isnan(sum(found))}


def whole_runs(options: argparse.Namespace, target: float) -> dict[str, float]:
    """All of a training that shrinks over all of a dense one, and a step of it before anything was cut."""
    models = [make_model(options.size, options.device) for _ in range(2)]
    config = OTOConfig(target_sparsity=target, shrink_during_training=True)
    base = AdamW(models[0].named_parameters(), **RATES)
    inner = AdamW(models[1].named_parameters(), **RATES)
    pruning = HSPG(inner, partition(models[1]), config, options.steps)
    times = []

    def step(model: BertForQuestionAnswering, optimizer: torch.optim.Optimizer, inputs: dict[str, Any]) -> None:
        backward(model, inputs, options.bf16)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(optimizer, HSPG) and optimizer.shrink_due:
            shrink(model, optimizer)

    for number in range(options.steps):
        inputs = batch(options.batch_size, options.sequence_length, options.device)
        warmup = pruning.stage == "warmup"
        pair = [(models[0], base), (models[1], pruning)]
        order = (0, 1) if number % 2 else (1, 0)  # the second finds the caches as the first left them
        measured = {
            index: seconds(lambda own=pair[index], given=inputs: step(*own, given), options.device) for index in order
        }
        if number:  # the first allocates
            times.append((measured[0], measured[1], warmup))
    early = [ours / theirs for theirs, ours, warmup in times if warmup]
    return {
        "run": sum(ours for _, ours, _ in times) / sum(theirs for theirs, _, _ in times),
        "step_before_shrinking": statistics.median(early) if early else float("nan"),
        "step_at_the_target": statistics.median(ours / theirs for theirs, ours, _ in times[-len(times) // 4 :]),
        "macs": pruning.metrics()["removed_macs"],
    }


def taught_step(options: argparse.Namespace) -> float:
    """A step that learns from a teacher of the model's own size over one that does not, by the median of pairs."""
    student, teacher = (make_model(options.size, options.device) for _ in range(2))
    teacher.eval()
    optimizer = AdamW(student.named_parameters(), **RATES)

    def step(inputs: dict[str, torch.Tensor], learns: bool) -> None:
        with torch.autocast(options.device.partition(":")[0], torch.bfloat16, enabled=options.bf16):
            outputs = student(**inputs)
            loss = outputs.loss
            if learns:
                with torch.no_grad():
                    expected = teacher(input_ids=inputs["input_ids"])
                loss = 0.1 * loss + 0.9 * logits_loss(outputs, expected, temperature=2.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ratios = []
    for number in range(max(4, options.steps // 6)):
        inputs = batch(options.batch_size, options.sequence_length, options.device)
        order = (True, False) if number % 2 else (False, True)
        times = {
            learns: seconds(lambda own=learns, given=inputs: step(given, own), options.device) for learns in order
        }
        ratios.append(times[True] / times[False])
    return statistics.median(ratios[1:])  # the first allocates


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside it: of those still there, `now`, and the most that there were, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)}
        for tensor in filter(is_tensor, tree_leaves(made)):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _gone(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.now -= size


def optimizer_memory(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """
    Bytes that HSPG takes beside the weights and the AdamW that it wraps, stage by stage: what it keeps after a step,
    and the most that there is in the middle of one. `redundant` is what the groups weigh that a period removes, and
    `matrix` the part of them in one matrix, both at the most.
    """
    model = make_model(options.size, options.device)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    inner = AdamW(parameters.items(), **RATES)
    inner.step()  # which makes its state
    pruning = HSPG(inner, partition(model), OTOConfig(target_sparsity=options.targets[0]), options.steps)
    arrays = pruning.partition.arrays
    prunable = sum(parameters[name].nbytes for array in arrays for name, _ in array.members)
    found: dict[str, dict[str, float]] = {stage: {"kept": 0, "peak": 0} for stage in STAGES}
    largest = {"redundant": 0.0, "matrix": 0.0}
    live, gone = LiveBytes(), 0.0
    zero = {(array.layer, array.kind): torch.zeros(array.count, dtype=torch.bool) for array in arrays}
    for _ in range(options.steps):
        for parameter in parameters.values():
            parameter.grad *= parameter != 0  # as those of what the model computes
        step, ended = pruning.steps_done, pruning.schedule.boundaries[-1]
        stage = "pruning" if step == ended else stage_of(pruning.schedule, step)  # what it left is looked at once more
        numbers, live.peak = found[stage], live.now
        with live:
            pruning.step()
        numbers["kept"], numbers["peak"] = max(numbers["kept"], live.now), max(numbers["peak"], live.peak)
        removed, masks = pruning.metrics()["removed_params"], pruning.zero_masks()
        largest["redundant"] = max(largest["redundant"], (removed - gone) * prunable)
        for array in arrays:
            new = int((masks[array.layer, array.kind] & ~zero[array.layer, array.kind]).sum())
            largest["matrix"] = max(largest["matrix"], parameters[array.columns].nbytes * new / array.count)
        gone, zero = removed, masks
    return {**found, "largest": largest}


def memory_of(options: argparse.Namespace) -> int:
    """Bytes that a training takes at its peak, all of this process; on a GPU those of tensors."""
    model = make_model(options.size, options.device)
    optimizer: torch.optim.Optimizer = AdamW(model.named_parameters(), **RATES)
    if options.memory_of == "pruned":
        optimizer = HSPG(optimizer, partition(model), OTOConfig(target_sparsity=options.targets[0]), 24)
    for _ in range(24):
        backward(model, batch(options.batch_size, 128, options.device), options.bf16)
        optimizer.step()
        optimizer.zero_grad()
    if options.device != "cpu":
        return torch.cuda.max_memory_allocated(options.device)
    status = Path("/proc/self/status")
    if status.is_file():  # where `ru_maxrss` begins with what the process that started this one had
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of a pruning run that does not shrink over that of a dense one, each in a process of its own."""
    peaks = {}
    for kind in ("dense", "pruned"):
        names = ("size", "batch_size", "device")
        passed = {name: getattr(options, name) for name in names} | {"targets": options.targets[0], "memory_of": kind}
        command = [
            sys.executable,
            __file__,
            *(word for name, value in passed.items() for word in (f"--{name}", str(value))),
        ]
        command.append("--bf16" if options.bf16 else "--no-bf16")
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[kind] = int(done.stdout.split()[-1])
    return {**peaks, "ratio": peaks["pruned"] / peaks["dense"]}


def once(options: argparse.Namespace) -> dict[str, float]:
    """What is done once: finding the groups, cutting with its check, saving."""
    found = {}
    for size in ("base", "large"):
        with torch.device("meta"):
            model = BertForQuestionAnswering(BertConfig(**SIZES[size]))
        found[f"partition_{size}"] = min(seconds(lambda one=model: partition(one), "cpu") for _ in range(3))
    model = make_model(options.size, "cpu")
    config = OTOConfig(target_sparsity=options.targets[0], saliency="magnitude", pruning_periods=1)
    optimizer = HSPG(torch.optim.SGD(model.named_parameters(), lr=0.0), partition(model), config, 4)
    for _ in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    optimizer.zero_grad()
    inputs = {"input_ids": batch(4, 32, "cpu")["input_ids"]}  # as many tokens as the check reads
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        plain = seconds(lambda: (model.save_pretrained(folder), model(**inputs), model(**inputs)), "cpu")
        found["compress_and_save"] = seconds(lambda: compress(model).save_pretrained(f"{folder}/small"), "cpu")
    found["save_and_two_forwards"] = plain
    return {**found, "compress_ratio": found["compress_and_save"] / plain}


def result_table(numbers: dict[str, Any]) -> Table:
    table = Table(title="Ratios to plain training of the same steps")
    table.add_column("what")
    table.add_column("ratio", justify="right")
    for stage, measured in numbers["optimizer_step"].items():
        table.add_row(f"optimizer's step, {stage}", f"{measured['ratio']:.2f}")
    for stage, ratio in numbers["mean_steps"].items():
        table.add_row(f"the same, mean in {stage} of {numbers['options']['run_steps']} steps", f"{ratio:.2f}")
    for target, run in numbers["runs"].items():
        table.add_row(f"whole step, {float(target):.0%}, before shrinking", f"{run['step_before_shrinking']:.2f}")
        table.add_row(f"whole step, {float(target):.0%}, at the target", f"{run['step_at_the_target']:.2f}")
        table.add_row(f"whole run, {float(target):.0%}", f"{run['run']:.2f}")
    table.add_row("whole step, with a teacher of the same size", f"{numbers['taught_step']:.2f}")
    redundant = numbers["optimizer_memory"]["largest"]["redundant"]
    for stage in STAGES:
        peak = numbers["optimizer_memory"][stage]["peak"]
        table.add_row(f"optimizer's memory beside AdamW's, {stage}, to redundant weights", f"{peak / redundant:.2f}")
    table.add_row("peak memory, not shrinking", f"{numbers['memory']['ratio']:.2f}")
    table.add_row("cut, check and save, to save and two forwards", f"{numbers['once']['compress_ratio']:.2f}")
    return table


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    if options.memory_of:
        print(memory_of(options))
        return {}
    options.bf16 = choose_bf16(options.bf16, options.device)
    numbers: dict[str, Any] = {
        "options": {
            name: value if isinstance(value, int | float | list) else str(value)
            for name, value in vars(options).items()
        },
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "runs": {},
    }

    def add(part: dict[str, Any], name: str, found: Any) -> None:  # large models take long: what is known is written
        part[name] = found
        write_json(options.output, numbers)

    add(numbers, "optimizer_step", optimizer_steps(options))
    add(numbers, "mean_steps", mean_steps(options, numbers["optimizer_step"]))
    for target in options.targets:
        add(numbers["runs"], str(target), whole_runs(options, target))
    for measure in (taught_step, memory, optimizer_memory, once):
        add(numbers, measure.__name__, measure(options))
    console.print(result_table(numbers))
    console.print(json.dumps(numbers["once"]), highlight=False, soft_wrap=True)
    return numbers


if __name__ == "__main__":
    main()
