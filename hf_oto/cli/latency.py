"""`hf-oto latency`: what heads and neurons take on a device."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from ..deploy.latency_tables import measure_latency
from ..report.tables import markdown_table
from .loading import DeviceOption, DtypeOption, load_model, read_config, read_device, read_dtype
from .printing import JsonOption, at_home, show


def latency(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The dense model: a folder, or of the Hub.", callback=at_home)
    ],
    out: Annotated[Path, typer.Argument(metavar="TABLE.json", help="A file that does not exist.", callback=at_home)],
    batch_size: Annotated[int, typer.Option(help="Sequences of a batch.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    threads: Annotated[int | None, typer.Option(help="Threads of one operation. By default torch's number.")] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    repeats: Annotated[int, typer.Option(help="Forwards of every size that count.")] = 15,
    warmup: Annotated[int, typer.Option(help="Forwards before them.")] = 2,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count the processor's time, on a busy machine; with one thread only.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Measure what heads and neurons take on a device, for a target in latency.

    The table is for OTOConfig(target_unit="latency", latency_table="TABLE.json"), and for inspect. On an accelerator
    the device's own time counts, not the host's launching: by a CUDA graph, or by events over many forwards. Where the
    kernels are the price and not their widths, the table says so, and a target takes whole structures.

    Example: hf-oto latency dense table.json --batch-size 1 --sequence-length 384 --threads 1
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already. Choose another file, or remove it.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"TABLE.json: there is no folder {out.parent}. Make it first.")
    place, kind = read_device(device), read_dtype(dtype)
    found: Any = load_model(model, read_config(model), dtype=kind)
    table = measure_latency(
        found.to(place),
        batch_size=batch_size,
        sequence_length=sequence_length,
        threads=threads,
        repeats=repeats,
        warmup=warmup,
        cpu_time=cpu_time,
    )
    table.save(out)
    shown = markdown_table("heads of a block", "ms", "its neurons", "ms")
    for left, right in zip_longest(table.heads, table.neurons):
        shown.add_row(*(cell for point in (left, right) for cell in _point(point)))
    kept = table.num_layers * (table.heads[-1][1] + table.neurons[-1][1]) / table.total
    text = f"{out}: {table.conditions}. The dense model takes {table.total / 1e6:.2f} ms, {kept:.1%} of it for heads "
    text += "and neurons: no target reaches beyond."
    if whole := [kind for kind in ("heads", "neurons") if table.goes_whole(kind)]:
        text += (
            f" Kernels are the price, whatever their widths: a target takes all {' or all '.join(whole)} of a block, "
        )
        text += "and needs their floors at 0."
    show({"out": str(out), **table.to_dict()}, [text, shown], as_json)


def _point(point: tuple[int, int] | None) -> tuple[str, str]:
    return ("", "") if point is None else (f"{point[0]:,}", f"{point[1] / 1e6:.3f}")
