"""`hf-oto bench`: two models side by side."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

import typer
from tqdm.auto import tqdm

from ..deploy import benchmark
from ..deploy.onnx_export import check_packages
from ..report.tables import markdown_table
from .loading import DeviceOption, DtypeOption, load_model, read_device, read_dtype, read_text_config
from .printing import JsonOption, at_home, show


def bench(
    dense: Annotated[
        str,
        typer.Argument(metavar="DENSE", help="The model to compare with: a folder, or of the Hub.", callback=at_home),
    ],
    pruned: Annotated[
        str, typer.Argument(metavar="PRUNED", help="The small model: a folder, or of the Hub.", callback=at_home)
    ],
    batch_size: Annotated[list[int] | None, typer.Option(help="Sequences of a batch; repeat it. Default 1.")] = None,
    sequence_length: Annotated[
        list[int] | None, typer.Option(help="Tokens of a sequence; repeat it. Default 128.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="eager, compile, onnx or onnx-int8; repeat it. By default eager.")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    threads: Annotated[int | None, typer.Option(help="Threads of one operation. By default torch's number.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each model that count.")] = 30,
    warmup: Annotated[int, typer.Option(help="Runs before them.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """
    Time two models side by side on a device, their runs taking turns.

    Medians, with quartiles in brackets. The ratio of the MACs is the limit of the ratio of the latencies. On an
    accelerator the device's own time counts, not the host's launching: by a CUDA graph, or by events over many
    forwards.

    Example: hf-oto bench dense small --batch-size 1 --batch-size 8 --sequence-length 384 --backend eager --threads 1
    """
    if backend and benchmark.ONNX_BACKENDS.intersection(backend):
        check_packages()
    place, kind = read_device(device), read_dtype(dtype)
    configs = [read_text_config(name) for name in (dense, pruned)]
    loaded: Any = [load_model(*pair, dtype=kind) for pair in zip((dense, pruned), configs, strict=True)]
    models = [model.to(place) for model in loaded]
    choices: dict[str, Any] = {
        "backends": backend or ["eager"],
        "batch_sizes": batch_size or [1],
        "sequence_lengths": sequence_length or [128],
    }
    timed = benchmark.measure(*models, **choices, threads=threads, repeats=repeats, warmup=warmup)
    rounds = math.prod(len(values) for values in choices.values())
    # None: only on a terminal.
    measurements = list(tqdm(timed, desc="Timing", total=rounds, leave=False, disable=None))
    columns = ("backend", "batch", "length", "dense ms", "pruned ms", "dense /s", "pruned /s", "latency", "MACs")
    table = markdown_table(*columns)
    rows = []
    for one in measurements:
        speeds = [one.throughput(latency) for latency in (one.dense, one.pruned)]
        spreads = [f"{x.median:.2f} [{x.low:.2f}, {x.high:.2f}]" for x in (one.dense, one.pruned)]
        numbers = [f"{speed:.1f}" for speed in speeds]
        ratios = f"{one.latency_ratio:.2f}x", f"{one.macs_ratio:.2f}x"
        table.add_row(one.backend, f"{one.batch_size}", f"{one.sequence_length}", *spreads, *numbers, *ratios)
        row = {**dataclasses.asdict(one), "latency_ratio": one.latency_ratio}
        rows.append({**row, "dense_throughput": speeds[0], "pruned_throughput": speeds[1]})
    one = measurements[0]
    how = f"{one.threads} thread{'s' if one.threads > 1 else ''}, {one.dtype}"
    if place.type != "cpu":  # where the host's threads do not count
        methods = " and ".join(sorted({each.method for each in measurements}))
        how = f"{one.dtype}, {one.device} by {methods}"
    text = f"{repeats} runs each, {how}; the ratios are dense over pruned"
    show({"dense": dense, "pruned": pruned, "measurements": rows}, [text, table], as_json)
