"""Latency of two models side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.example_inputs import longest_input, unpadded_batch
from ..models.modes import evaluating
from ..report.summary import summarize
from .onnx_export import check_packages, export_precisions, inference_session
from .threads import using_threads
from .timing import Timer, device_name

BACKENDS = ("eager", "compile", "onnx", "onnx-int8")
ONNX_BACKENDS = {"onnx", "onnx-int8"}

Run = Callable[[dict[str, Tensor]], Any]


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one batch: the median, the lower and the upper quartile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """
    Two models on batches of one size.

    Args:
        backend (`str`): `"eager"`, `"compile"`, `"onnx"` or `"onnx-int8"`.
        batch_size, sequence_length (`int`): Sequences of a batch, and tokens of each.
        threads (`int`): Threads of one operation.
        device, dtype (`str`): Where both were timed, and the dtype of their weights.
        method (`str`): How, as in [`~hf_oto.deploy.timing.Timer`].
        dense, pruned ([`Latency`]): What a batch takes.
        macs_ratio (`float`):
            MACs of the dense model's blocks over the pruned one's, at this length. What pruning leaves alone
            (embeddings, LayerNorms, task heads) takes as long as before, so a latency ratio cannot go beyond it, but
            for noise and what fits into caches.
    """

    backend: str
    batch_size: int
    sequence_length: int
    threads: int
    device: str
    dtype: str
    method: str
    dense: Latency
    pruned: Latency
    macs_ratio: float

    @property
    def latency_ratio(self) -> float:
        """Of the medians: dense over pruned."""
        return self.dense.median / self.pruned.median

    def throughput(self, latency: Latency) -> float:
        """Sequences per second at a latency's median."""
        return 1000 * self.batch_size / latency.median


def measure(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    *,
    backends: Sequence[str] = ("eager",),
    batch_sizes: Sequence[int] = (1,),
    sequence_lengths: Sequence[int] = (128,),
    threads: int | None = None,
    repeats: int = 30,
    warmup: int = 3,
) -> Iterator[Measurement]:
    """
    Time two models on the same random batches, without padding. The runs of the two take turns, so that what slows the
    machine down slows both. On an accelerator the device's own time counts: [`~hf_oto.deploy.timing.Timer`].

    Args:
        dense, pruned ([`PreTrainedModel`]): On one device and in one dtype; for ONNX on the CPU.
        backends (`Sequence[str]`):
            Of `"eager"`, `"compile"` (`torch.compile`), `"onnx"` (ONNX Runtime, float32, on the CPU) and `"onnx-int8"`
            (the same, quantized as [`~hf_oto.deploy.onnx_export.export_onnx`] does it).
        batch_sizes, sequence_lengths (`Sequence[int]`): Every backend is timed on every combination.
        threads (`int`, *optional*): Threads of one operation. By default torch's own number.
        repeats (`int`, *optional*, defaults to 30): Runs of each model that count.
        warmup (`int`, *optional*, defaults to 3): Runs before them.

    Returns:
        `Iterator[Measurement]`: One after another, as they are done.

    Raises:
        `ValueError`: A backend is unknown or not for the device, the models are on two devices or of two dtypes, a
            number is too small, or a model does not read so many tokens, or none.
        `ImportError`: A package that ONNX needs is not installed.
    """
    for backend in backends:
        if backend not in BACKENDS:
            raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    for name, values in (
        ("batch_size", batch_sizes),
        ("sequence_length", sequence_lengths),
        ("threads", [] if threads is None else [threads]),
        ("repeats", [repeats]),
        ("warmup", [warmup]),
    ):
        if any(value < 1 for value in values):
            raise ValueError(f"`{name}` must be at least 1, got {min(values)}.")
    longest = min(longest_input(dense), longest_input(pruned))
    if sequence_lengths and max(sequence_lengths) > longest:
        raise ValueError(
            f"`sequence_length` must be at most {longest}, what both models read, got {max(sequence_lengths)}."
        )
    if (dense.device, dense.dtype) != (pruned.device, pruned.dtype):
        raise ValueError(
            f"`dense` and `pruned` must be on one device and of one dtype, got {dense.dtype} on {dense.device} and "
            f"{pruned.dtype} on {pruned.device}. Move the one to the other's."
        )
    if ONNX_BACKENDS.intersection(backends):
        if dense.device.type != "cpu":
            raise ValueError(f"`backends` of ONNX are timed on the CPU, got models on {dense.device}.")
        check_packages()
    return _measurements((dense, pruned), backends, batch_sizes, sequence_lengths, threads, repeats, warmup)


def _measurements(
    models: tuple[PreTrainedModel, PreTrainedModel],
    backends: Sequence[str],
    batch_sizes: Sequence[int],
    sequence_lengths: Sequence[int],
    threads: int | None,
    repeats: int,
    warmup: int,
) -> Iterator[Measurement]:
    macs = {length: [summarize(model, sequence_length=length).macs for model in models] for length in sequence_lengths}
    with ExitStack() as stack:
        number = stack.enter_context(using_threads(threads))
        for model in models:
            stack.enter_context(evaluating(model))
        files = _exported(models, ONNX_BACKENDS.intersection(backends), stack)
        for backend in backends:
            sessions = [_session_runner(inference_session(path, number)) for path in files.get(backend, [])]
            for length in sequence_lengths:
                for batch_size in batch_sizes:
                    batches = [unpadded_batch(model, batch_size, length) for model in models]
                    runs = sessions or [_runner(model, backend) for model in models]
                    times, method = _timed(runs, batches, models[0].device, repeats, warmup)
                    dense, pruned = (_latency(own) for own in times)
                    before, after = macs[length]
                    yield Measurement(
                        backend=backend,
                        batch_size=batch_size,
                        sequence_length=length,
                        threads=number,
                        device=device_name(models[0].device),
                        dtype=str(models[0].dtype).removeprefix("torch."),
                        method=method,
                        dense=dense,
                        pruned=pruned,
                        macs_ratio=before / after if after else float("inf"),
                    )


def _exported(models: Sequence[PreTrainedModel], backends: Collection[str], stack: ExitStack) -> dict[str, list[Path]]:
    """The files of both models for every backend of ONNX Runtime. They go when the stack closes."""
    files: dict[str, list[Path]] = {backend: [] for backend in backends}
    for index, model in enumerate(models if files else ()):
        folder = Path(stack.enter_context(TemporaryDirectory()))
        paths = {backend: folder / f"{index}-{backend}.onnx" for backend in backends}
        export_precisions(model, paths.get("onnx"), paths.get("onnx-int8"))
        for backend, path in paths.items():
            files[backend].append(path)
    return files


def _session_runner(session: Any) -> Run:
    return lambda batch: session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})


def _runner(model: PreTrainedModel, backend: str) -> Run:
    forward: Any = model
    if backend == "compile":
        torch.compiler.reset()  # or the limit of recompilations makes later sizes eager, in silence
        forward = torch.compile(model, dynamic=False)
    return lambda batch: forward(**batch)


@torch.inference_mode()
def _timed(
    runs: Sequence[Run], batches: Sequence[dict[str, Tensor]], device: torch.device, repeats: int, warmup: int
) -> tuple[list[list[float]], str]:
    """Milliseconds of every run that counts, model by model, and how they were taken: for both in the same way."""
    calls = [partial(run, batch) for run, batch in zip(runs, batches, strict=True)]
    timers = [Timer(call, device) for call in calls]
    if len({timer.method for timer in timers}) > 1:
        timers = [Timer(call, device, graphs=False) for call in calls]
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(-warmup, repeats):
        # The one that goes second finds the caches as the first left them: each goes first as often.
        order = range(len(runs)) if repeat % 2 else reversed(range(len(runs)))
        for index in order:
            taken = timers[index]()
            if repeat >= 0:
                times[index].append(taken)
    return times, timers[0].method


def _latency(times: Sequence[float]) -> Latency:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return Latency(statistics.median(times), low, high)
