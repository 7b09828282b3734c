"""The sizes that one run has finished: their numbers in a file beside each, a table and a picture of all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .pictures import sizes_figure
from .summary import Summary
from .tables import markdown_table, plain_text

FILE_NAME = "milestone.json"
PICTURE = "milestones"

_NO_SCORES = ("_time", "runtime", "_per_second", "_samples", "eval_milestone")


@dataclass(frozen=True)
class Size:
    """
    One finished size of a run.

    Args:
        share (`float`): What was to be removed: a milestone, or the target.
        step (`int`): The training's step that its weights are of.
        weights, macs (`float`): Shares of the prunable weights, and of their multiply-accumulates, that are kept.
        latency (`float`, *optional*): Share of the dense model's time that the run's table of latencies says.
        parameters (`int`, *optional*): All parameters of the small model.
        scores (`Mapping[str, float]`): Metrics of the evaluation at that step, by name; empty if there was none.
    """

    share: float
    step: int
    weights: float
    macs: float
    latency: float | None
    parameters: int | None
    scores: Mapping[str, float]

    @classmethod
    def of(cls, share: float, step: int, summary: Summary, scores: Mapping[str, Any]) -> Size:
        """From the summary of the model, and what an evaluation of it has logged."""
        kept = (summary.prunable_ratio, summary.macs_ratio, summary.latency_ratio)
        return cls(share, step, *kept, summary.parameters, counted(scores))

    @property
    def name(self) -> str:
        return folder_name(self.share)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the numbers into the folder of the model."""
        Path(folder, FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Size | None:
        """The numbers of a folder; `None` if it has none, or others than these."""
        path = Path(folder, FILE_NAME)
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
        except (TypeError, ValueError):
            return None


def folder_name(share: float) -> str:
    """`0.30`: as many decimals as the share has, two to six: one that was computed is called as what it is meant."""
    whole, _, decimals = f"{share:.6f}".partition(".")
    return f"{whole}.{decimals.rstrip('0'):0<2}"


def folders_in(folder: str | os.PathLike) -> list[str]:
    """The names of the folders in one that hold a milestone's model, of this run or of another."""
    return sorted(path.parent.name for path in Path(folder).glob(f"*/{FILE_NAME}"))


def counted(scores: Mapping[str, Any]) -> dict[str, float]:
    """Of what an evaluation has logged, the metrics that are one number: not how long it took, no lists or words."""
    return {
        name: value
        for name, value in scores.items()
        if name.startswith("eval_") and not name.endswith(_NO_SCORES)
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def logged_name(metric: str) -> str:
    """A metric's name in the log, where it may be given without the prefix."""
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def evaluations(log_history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries of a log that evaluations wrote."""
    return [entry for entry in log_history if any(name.startswith("eval_") for name in entry)]


def plotted_score(sizes: Sequence[Size], chosen: str | None) -> str | None:
    """The metric that all sizes have to draw: the one that chooses the best model, or the first that is no loss."""
    names = [name for name in sizes[0].scores if all(name in size.scores for size in sizes)] if sizes else []
    if chosen is not None and logged_name(chosen) in names:
        return logged_name(chosen)
    return next((name for name in names if not name.endswith("loss")), next(iter(names), None))


def sizes_table(sizes: Sequence[Size]) -> str:
    """A line for every size, as Markdown: what was removed, what is kept of it, its scores."""
    timed = any(size.latency is not None for size in sizes)
    names = list(dict.fromkeys(name for size in sizes for name in size.scores))
    kept = ("weights kept", "MACs kept", *(("latency",) if timed else ()))
    table = markdown_table("removed", *kept, *(name.removeprefix("eval_") for name in names), "parameters", "step")
    for size in sizes:
        shares = (size.weights, size.macs, *((size.latency,) if timed else ()))
        table.add_row(
            size.name,
            *("" if share is None else f"{share:.1%}" for share in shares),
            *(f"{size.scores[name]:.4g}" if name in size.scores else "" for name in names),
            "" if size.parameters is None else f"{size.parameters:,}",
            f"{size.step:,}",
        )
    return plain_text(table, width=40 + 24 * (len(names) + 5))


def sizes_picture(sizes: Sequence[Size], chosen: str | None) -> dict[str, Any]:
    """The score over each measure of size; nothing where there are no two sizes, no score or no matplotlib."""
    name = plotted_score(sizes, chosen)
    if len(sizes) < 2 or name is None:
        return {}
    measures = {"weights": [size.weights for size in sizes], "multiply-accumulates": [size.macs for size in sizes]}
    if all(size.latency is not None for size in sizes):
        measures["latency by the table"] = [size.latency or 0.0 for size in sizes]
    try:
        figure = sizes_figure(measures, [size.scores[name] for size in sizes], name, [size.name for size in sizes])
    except ImportError:
        return {}
    return {PICTURE: figure}


def sizes_section(sizes: Sequence[Size], *, pictured: bool) -> str:
    """What a model card says of the other sizes of the run."""
    if len(sizes) < 2:
        return ""
    picture = f"\n![Score over what is kept, for every size]({PICTURE}.png)\n" if pictured else ""
    return f"""## Every size of this run

The run finished a model of each of these sizes on its way. The last one is this model; each of the others is in a
folder of its name, and on the Hub, where it was pushed, in a branch of that name (`revision="{sizes[0].name}"`).

{sizes_table(sizes)}
{picture}
"""
