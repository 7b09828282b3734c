"""Pictures of a model and of a run. They are to be read in grey as well.

matplotlib is imported where a picture is drawn, without pyplot: no window, no figure that stays in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

FORMATS = ("png", "svg")
KEPT, REMOVED, DARK = "#2b6cb0", "#dddddd", "#222222"
STAGES = {"warmup": "#fafafa", "pruning": "#dcdcdc", "half-space": "#dcdcdc", "recovery": "#eeeeee"}
MOST_NUMBERS = 16  # over more bars than that they would run into each other


def layers_figure(
    heads: Sequence[int],
    neurons: Sequence[int],
    *,
    dense_heads: int,
    dense_neurons: int,
    kept_heads: Sequence[Sequence[int]] | None = None,
    title: str = "",
) -> Any:
    """
    Heads of every layer as a grid, widths of the FFNs as bars.

    Args:
        heads, neurons (`Sequence[int]`): What every layer keeps.
        dense_heads, dense_neurons (`int`): What every layer had.
        kept_heads (`Sequence[Sequence[int]]`, *optional*):
            Which heads are kept, by layer. Without it the grid shows how many, filled from below.
        title (`str`, *optional*): To stand above.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        `ImportError`: There is no matplotlib.
    """
    figure, (grid, bars) = _panels(width=max(6.0, 1.5 + 0.42 * len(heads)), height=5.5, top=0.6)
    layers = range(len(heads))
    _draw_heads(grid, heads, dense_heads, kept_heads)
    bars.bar(layers, [dense_neurons] * len(layers), width=0.86, color=REMOVED, label="removed")
    bars.bar(layers, neurons, width=0.86, color=KEPT, label="kept")
    bars.set_ylabel("FFN width (neurons)")
    bars.set_xlabel("layer")
    bars.set_xticks(layers)
    bars.set_xlim(-0.5, max(len(layers), 1) - 0.5)
    if len(layers) <= MOST_NUMBERS:
        for layer, (head_count, width) in enumerate(zip(heads, neurons, strict=True)):
            _number(grid, layer, dense_heads - 0.5, head_count)
            _number(bars, layer, dense_neurons, width)
    figure.suptitle(title, fontsize=11)
    figure.legend(
        *bars.get_legend_handles_labels(), loc="lower right", bbox_to_anchor=(0.99, 0.0), ncols=2, frameon=False
    )
    return figure


def _draw_heads(grid: Any, heads: Sequence[int], dense_heads: int, kept: Sequence[Sequence[int]] | None) -> None:
    """A cell for each head of each layer, dark where it is kept."""
    from matplotlib.colors import ListedColormap  # there, or `_panels` had raised

    which = [range(count) for count in heads] if kept is None else kept
    if heads and dense_heads:
        grid.pcolormesh(
            [layer - 0.5 for layer in range(len(heads) + 1)],
            [head - 0.5 for head in range(dense_heads + 1)],
            [[int(head in numbers) for numbers in which] for head in range(dense_heads)],
            cmap=ListedColormap([REMOVED, KEPT]),
            vmin=0,
            vmax=1,
            edgecolors="white",
            linewidth=1.5,
        )
    grid.set_ylabel("heads (how many)" if kept is None else "head")
    grid.set_ylim(-0.5, max(dense_heads, 1) - 0.5)
    if kept is None:  # counted from one
        step = math.ceil(dense_heads / 6)
        counted = range(step, dense_heads + 1, step)
        grid.set_yticks([number - 1 for number in counted], [str(number) for number in counted])
    else:
        grid.yaxis.get_major_locator().set_params(integer=True)


def run_figure(log_history: Sequence[Mapping[str, Any]]) -> Any:
    """
    The loss, the removed share and the stages of a run over its steps.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            [`TrainerState`]'s, or what `trainer_state.json` has under that name. A stage begins where an entry first
            names it: it is the one that the run is in after that step.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        `ImportError`: There is no matplotlib.
        `ValueError`: No entry has both a loss and a removed share.
    """
    logged = training_entries(log_history)
    if not logged:
        raise ValueError(
            "`log_history` has no entry with `loss` and `removed_params`, as OTOTrainer logs them: train with "
            "`logging_steps` below the number of steps."
        )
    figure, (losses, shares) = _panels(width=7.5, height=5.2, top=0.35)
    steps = [entry["step"] for entry in logged]
    losses.plot(steps, [entry["loss"] for entry in logged], color=KEPT, marker=".", label="training")
    if evaluated := [entry for entry in log_history if "eval_loss" in entry]:
        x, y = [entry["step"] for entry in evaluated], [entry["eval_loss"] for entry in evaluated]
        losses.plot(x, y, color=DARK, linestyle="--", marker="s", markersize=4, label="evaluation")
        losses.legend(loc="upper right", frameon=False)
    losses.set_ylabel("loss")
    for name, label, style in (
        ("removed_params", "weights", {"color": KEPT, "linestyle": "-"}),
        ("removed_macs", "multiply-accumulates", {"color": DARK, "linestyle": "--"}),
        ("removed_latency", "latency by the table", {"color": DARK, "linestyle": ":"}),
    ):
        if not all(name in entry for entry in logged):  # the last one is logged where it is the target's metric
            continue
        shares.plot(steps, [100 * entry[name] for entry in logged], label=label, **style)
    shares.set_ylabel("removed (%)")
    shares.set_ylim(0, 100)
    shares.set_xlabel("step")
    shares.set_xlim(0, log_history[-1]["step"])
    shares.legend(loc="upper left", frameon=False)
    for stage, start, end in stage_spans(log_history):
        for axes in (losses, shares):
            axes.axvspan(start, end, color=STAGES.get(stage, "white"), linewidth=0, zorder=0)
        losses.text(
            (start + end) / 2, 1.03, stage, transform=losses.get_xaxis_transform(), ha="center", fontsize=9, color=DARK
        )
    return figure


def plot_run(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """
    Draw loss, removed share and stages of a run over its steps into a PNG or SVG file, written whole or not at all.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history` of an [`OTOTrainer`], or what `trainer_state.json` has under that name.
        path (`str` or `os.PathLike`): The file.

    Raises:
        `ValueError`: The name ends in neither `.png` nor `.svg`, or nothing was logged while the model trained.
        `ImportError`: There is no matplotlib.
    """
    check_format(path)
    save_figure(run_figure(log_history), path)


def sizes_figure(
    measures: Mapping[str, Sequence[float]], scores: Sequence[float], label: str, names: Sequence[str]
) -> Any:
    """
    A score over what is kept, one panel for every measure of it.

    Args:
        measures (`Mapping[str, Sequence[float]]`): Shares in [0, 1] that every size keeps, by what is measured.
        scores (`Sequence[float]`): The score of every size.
        label (`str`): What the score is called.
        names (`Sequence[str]`): What every size is called.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        `ImportError`: There is no matplotlib.
    """
    figure, panels = _panels(width=0.6 + 3.4 * len(measures), height=3.6, top=0.3, columns=len(measures))
    for axes, (measure, shares) in zip(panels, measures.items(), strict=True):
        kept = [100 * share for share in shares]
        axes.plot(kept, scores, color=KEPT, marker="o")
        for x, y, name in zip(kept, scores, names, strict=True):
            axes.annotate(name, (x, y), xytext=(0, 6), textcoords="offset points", ha="center", color=DARK)
        axes.set_xlabel(f"{measure} kept (%)")
        axes.margins(x=0.12, y=0.18)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(label, parse_math=False)  # a metric's name may have dollars
    return figure


def training_entries(log_history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries of a log that OTOTrainer wrote while it trained."""
    return [entry for entry in log_history if {"loss", "removed_params", "stage"} <= entry.keys()]


def stage_spans(log_history: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Stages as (name, first step, last step), as well as the logged steps tell; one after the other from 0 on."""
    by_stage = groupby(training_entries(log_history), key=lambda entry: entry["stage"])
    stages = [(stage, next(entries)["step"]) for stage, entries in by_stage]
    starts = [0, *(step for _, step in stages[1:])]
    ends = [*starts[1:], log_history[-1]["step"]]
    return [(stage, start, end) for (stage, _), start, end in zip(stages, starts, ends, strict=True)]


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """
    Write a figure as PNG or SVG, by the name's ending; whole or not at all, and the same bytes for the same figure.

    Raises:
        `ValueError`: The name ends in something else.
    """
    form = check_format(path)
    path = Path(path).resolve()  # a link stays one
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with matplotlib.rc_context({"svg.hashsalt": "hf_oto"}):
            metadata = {"Date": None} if form == "svg" else {}
            figure.savefig(temporary, format=form, dpi=120, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_format(path: str | os.PathLike) -> str:
    """The format that a file's name says. Raises `ValueError` if it is none of [`FORMATS`]."""
    form = Path(path).suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise ValueError(f"`path` must end in {' or '.join(f'.{name}' for name in FORMATS)}, got {path}.")
    return form


def _panels(width: float, height: float, top: float, columns: int = 0) -> tuple[Any, Any]:
    """
    Two panels above each other, or so many side by side, in inches, with margins that hold the labels: laying them out
    anew is slow.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib: `pip install 'hf-oto[plot]'`.") from error
    figure = Figure(figsize=(width, height))
    margins = {"left": 0.8 / width, "right": 1 - 0.2 / width, "bottom": 0.7 / height, "top": 1 - top / height}
    panels: Any
    if columns:
        panels = figure.subplots(1, columns, sharey=True, gridspec_kw={**margins, "wspace": 0.1})
    else:
        panels = figure.subplots(2, sharex=True, gridspec_kw={**margins, "hspace": 0.14})
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _number(axes: Any, layer: int, height: float, number: int) -> None:
    axes.annotate(
        f"{number:,}",
        (layer, height),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8,
        color=DARK,
        annotation_clip=False,
    )
