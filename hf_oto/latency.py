"""Time that a device takes for a model, by the heads and neurons that its blocks keep: a table, to and from JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_KINDS = ("heads", "neurons")
_COUNTS = ("num_layers", "hidden_size", "head_size", "queries", "dense_heads", "dense_neurons", "total")
_CONDITIONS = ("batch_size", "length", "threads")
_WORDS = ("model_type", "device", "dtype", "attention", "torch")


@dataclass(frozen=True)
class LatencyTable:
    """
    Latency of one architecture on one device, as [`~hf_oto.measure_latency`] finds it: `total` for the dense model,
    and less by what the curves say for the heads and neurons that a block has lost. Between two points of a curve the
    time is linear.

    Args:
        model_type (`str`): The dense family.
        num_layers, hidden_size, head_size, queries, dense_heads, dense_neurons (`int`):
            Its sizes, as in [`~hf_oto.groups.Partition`].
        total (`int`): Nanoseconds of a forward of the dense model, with all that is never pruned.
        heads, neurons (`tuple[tuple[int, int], ...]`):
            (kept, nanoseconds) from none to all: what one block takes above one that keeps none.
        batch_size, length (`int`): Sequences of the batch that was timed, and tokens of each.
        threads (`int`): Threads of one operation.
        device, dtype, attention, torch (`str`): Where and how it was timed: the device's name, the weights' dtype, the
            attention implementation and PyTorch's version.

    Raises:
        `ValueError`, `TypeError`: A number or a curve is none that a measurement can give; the message names it.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    head_size: int
    queries: int
    dense_heads: int
    dense_neurons: int
    total: int
    heads: tuple[tuple[int, int], ...]
    neurons: tuple[tuple[int, int], ...]
    batch_size: int
    length: int
    threads: int
    device: str
    dtype: str
    attention: str
    torch: str

    def __post_init__(self) -> None:
        for name in (*_COUNTS, *_CONDITIONS):
            _check_count(f"latency_table.{name}", getattr(self, name), 1)
        for name in _WORDS:
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"`latency_table.{name}` must be a string, got {getattr(self, name)!r}.")
        for kind in _KINDS:
            curve = _curve(kind, getattr(self, kind), getattr(self, f"dense_{kind}"))
            object.__setattr__(self, kind, curve)
        blocks = self.num_layers * sum(getattr(self, kind)[-1][1] for kind in _KINDS)
        if blocks > self.total:
            raise ValueError(
                f"`latency_table.total` must be at least what heads and neurons of all blocks take, {blocks}, got "
                f"{self.total}. Measure it anew."
            )

    @property
    def conditions(self) -> str:
        """Where and how it was timed, in words."""
        return (
            f"batch {self.batch_size} x {self.length} tokens, {self.dtype}, {self.attention} attention, "
            f"{self.device}, {self.threads} thread{'s' if self.threads > 1 else ''}, torch {self.torch}"
        )

    def saved(self, kind: str) -> tuple[int, ...]:
        """Nanoseconds that a block saves with its first, second, … group of a kind to go. None is below 1."""
        return _saved(getattr(self, kind))

    def to_dict(self) -> dict[str, Any]:
        """The table as plain JSON values."""
        curves = {kind: [list(point) for point in getattr(self, kind)] for kind in _KINDS}
        return {**dataclasses.asdict(self), **curves}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyTable:
        """The table of [`~LatencyTable.to_dict`]'s result. Raises `ValueError` on a missing or an unknown name."""
        names = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(names ^ set(values)):
            missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
            listed = [f"lacks {missing}"] * bool(missing) + [f"has {unknown}, which is nothing of it"] * bool(unknown)
            raise ValueError(f"`latency_table` {' and '.join(listed)} ({len(wrong)} names). Measure it anew.")
        return cls(**values)

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON file, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> LatencyTable:
        """Read a JSON file. Raises `FileNotFoundError` if there is none, `ValueError` if it is no table."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"`latency_table` {path} is no file. Measure one with `hf-oto latency`.")
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"`latency_table` {path} is not JSON: {error}") from error
        return cls.of(values)

    @classmethod
    def of(cls, value: Any) -> LatencyTable:
        """A table as it is, its dict, or its file's path."""
        if isinstance(value, LatencyTable):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, str | os.PathLike):
            return cls.load(value)
        raise TypeError(f"`latency_table` must be a LatencyTable, its dict or its file, got {type(value).__name__}.")


@cache
def _saved(curve: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    times = [0]
    for (low, start), (high, end) in zip(curve, curve[1:], strict=False):
        times += [start + (end - start) * step // (high - low) for step in range(1, high - low + 1)]
    return tuple(after - before for before, after in zip(times, times[1:], strict=False))[::-1]


def _curve(kind: str, points: Any, dense: int) -> tuple[tuple[int, int], ...]:
    """A curve that can be read by every count from none to all, and on which every group takes time."""
    name = f"latency_table.{kind}"
    if not isinstance(points, Sequence) or not all(isinstance(p, Sequence) and len(p) == 2 for p in points):
        raise TypeError(f"`{name}` must be pairs of a count and nanoseconds, got {str(points)[:100]}.")
    for count, time in points:
        _check_count(f"{name}: a count", count, 0)
        _check_count(f"{name}: a time", time, 0)
    curve = tuple((count, time) for count, time in points)
    counts = [count for count, _ in curve]
    if len(counts) < 2 or counts != sorted(set(counts)) or (counts[0], counts[-1]) != (0, dense):
        raise ValueError(f"`{name}` must have counts that rise from 0 to `dense_{kind}`={dense}, got {counts}.")
    if curve[0][1]:
        raise ValueError(f"`{name}` must begin with 0 nanoseconds for none, got {curve[0][1]}.")
    for (low, start), (high, end) in zip(curve, curve[1:], strict=False):
        if end - start < high - low:
            raise ValueError(
                f"`{name}` must rise by a nanosecond or more for each of the {kind}, got {start} for {low} and {end} "
                f"for {high}. Measure it anew."
            )
    return curve


def _check_count(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")
