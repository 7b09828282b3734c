"""What a model card says of a compression, and the pictures that lie beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .milestones import PICTURE, Size, counted, sizes_section
from .pictures import FORMATS, run_figure, save_figure, training_entries
from .summary import Summary
from .tables import cell

CAPTIONS = {
    "layers": "Heads and neurons that every layer kept",
    "run": "Loss and removed share over the steps of the training, with its stages",
}


def figures(summary: Summary, log_history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`"layers"` and, where a run has logged something, `"run"`; nothing where there is no matplotlib."""
    try:
        found = {"layers": summary.figure()}
    except ImportError:
        return {}
    return {**found, "run": run_figure(log_history)} if training_entries(log_history) else found


def save_figures(found: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Write each figure into a folder, as PNG and as SVG."""
    for name, figure in found.items():
        for form in FORMATS:
            save_figure(figure, Path(folder, f"{name}.{form}"))


_HEADING = "## How to load it"
TRUSTING = ", trust_remote_code=True"
_WITH_CODE = "With `import hf_oto` before it, `trust_remote_code` is not needed."
_WITHOUT_CODE = "It is a model of its family's own class, and needs no code of its own."


_WITH_ONNX = """
```python
import onnxruntime

session = onnxruntime.InferenceSession("onnx/model.onnx")
```

There are no weights beside it. ONNX Runtime, Transformers.js and fastembed read it by the config of its family.
"""

# Upstream's own line in the cards of sentence-transformers, with or without what a pruned class needs.
_EMBEDDERS = "SentenceTransformer|CrossEncoder|SparseEncoder|MultiVectorEncoder"
_BY_WEIGHTS = re.compile(rf'\b({_EMBEDDERS})\(("[^"]*")({TRUSTING})?\)')


def as_plain(card: str) -> str:
    """A card whose section on loading is that of a model of the family's own class, where it has such a section."""
    found = _with_loading(card, lambda found: found.replace(TRUSTING, "").replace(_WITH_CODE, _WITHOUT_CODE))
    return _BY_WEIGHTS.sub(r"\1(\2)", found)


def as_pruned(card: str) -> str:
    """A card whose lines of sentence-transformers, where it has such, run the code of a pruned class."""
    return _BY_WEIGHTS.sub(rf"\1(\2{TRUSTING})", card)


def as_onnx(card: str, *, pooled: bool = False) -> str:
    """A card that tells to load `onnx/model.onnx`, where it tells to load weights; sentence-transformers pool by
    themselves, and cannot read one that is `pooled` inside."""
    found = _with_loading(card, lambda _: _WITH_ONNX)
    return found if pooled else _BY_WEIGHTS.sub(r'\1(\2, backend="onnx")', found)


def rewrite(card: Path, to: Callable[[str], str]) -> None:
    """Put what [`as_plain`] or another makes of a card in its place, if there is one. The rest stays, byte by byte."""
    if card.is_file():
        text = card.read_bytes().decode("utf-8", "surrogateescape")
        card.write_bytes(to(text).encode("utf-8", "surrogateescape"))


def _with_loading(card: str, to: Callable[[str], str]) -> str:
    before, heading, after = card.partition(f"{_HEADING}\n")
    loading, following, rest = after.partition("\n## ")
    return before + heading + (to(loading) if heading else loading) + following + rest


def card_section(
    summary: Summary,
    *,
    repo_id: str,
    auto_class: str = "AutoModel",
    loading: str | None = None,
    plain: bool = False,
    pictures: Sequence[str] = (),
    scores: Mapping[str, float] | None = None,
    dense_scores: Mapping[str, float] | None = None,
    sizes: Sequence[Size] = (),
) -> str:
    """
    What a model card says of the compression: what was removed, what is left of every layer, how to load it.

    Args:
        summary ([`Summary`]): Of the model.
        repo_id (`str`): Where it is loaded from.
        auto_class (`str`, *optional*, defaults to `"AutoModel"`): The Auto class of its task.
        loading (`str`, *optional*): Python that loads it, where that is no Auto class.
        plain (`bool`, *optional*, defaults to `False`): Whether it is of the family's own class, without code.
        pictures (`Sequence[str]`, *optional*):
            Those of `"layers"`, `"run"` and `"milestones"` that lie beside the card, as [`save_figures`] writes them.
        scores, dense_scores (`Mapping[str, float]`, *optional*):
            Metrics of the model, and those of the dense one to be put beside them, by name. Without those the
            model's are told alone, if [`Trainer`] does not: it lists what was evaluated with a loss.
        sizes (`Sequence[Size]`, *optional*): All that the run has finished, this one last.

    Returns:
        `str`: Markdown.
    """
    found, dense = counted(scores or {}), dense_scores or {}
    rows = [f"| {cell(name)} | {dense[name]:.4g} | {value:.4g} |" for name, value in found.items() if name in dense]
    head = ["| | dense | this model |", "| --- | --- | --- |"]
    if not rows and "eval_loss" not in found:  # upstream lists them beside a loss alone
        rows = [f"| {cell(name)} | {value:.4g} |" for name, value in found.items()]
        head = ["| | this model |", "| --- | --- |"]
    table = "\n".join([*head, *rows]) + "\n\n" if rows else ""
    layers = f"![{CAPTIONS['layers']}](layers.png)\n\n" if "layers" in pictures else ""
    run = f"![{CAPTIONS['run']}](run.png)\n\n" if "run" in pictures else ""
    trusting = "" if plain else TRUSTING
    loading = loading or (
        f'from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained("{repo_id}"{trusting})'
    )
    return f"""## Compression

While it was fine-tuned, whole attention heads and feed-forward neurons were removed by
[Only Train Once](https://arxiv.org/abs/2107.07467): {1 - summary.prunable_ratio:.1%} of the weights that they own, and
{1 - summary.macs_ratio:.1%} of their multiply-accumulates. No mask is left, and nothing has to be fine-tuned again.
{_faster(summary)}
{table}{layers}{summary}

{run}{sizes_section(sizes, pictured=PICTURE in pictures)}{_HEADING}

```python
{loading}
```

{_WITHOUT_CODE if plain else _WITH_CODE}

"""


def _faster(summary: Summary) -> str:
    if summary.latency_ratio is None:
        return ""
    return (
        f"\nA forward takes {1 - summary.latency_ratio:.1%} less time than the dense model's, by a table that was "
        f"measured with {summary.latency_conditions}.\n"
    )


def leaderboard_results(
    scores: Mapping[str, float], *, tasks: Sequence[str], datasets: Mapping[str, str]
) -> list[EvalResult]:
    """
    Scores of an evaluation in the form in which the Hub's leaderboards read them from a model card.

    Args:
        scores (`Mapping[str, float]`): As [`Trainer`] logs them; only names that begin with `eval_` count, and of
            these not how long it took.
        tasks (`Sequence[str]`): The Hub's names of the tasks: `"question-answering"`.
        datasets (`Mapping[str, str]`): The data sets' names, by their ids on the Hub.

    Returns:
        `list[EvalResult]`: One for every task, data set and score.
    """
    metrics = {name.removeprefix("eval_"): value for name, value in counted(scores).items()}
    return [
        EvalResult(task_type=task, dataset_type=dataset, dataset_name=name, metric_type=metric, metric_value=value)
        for task in tasks
        for dataset, name in datasets.items()
        for metric, value in metrics.items()
    ]
