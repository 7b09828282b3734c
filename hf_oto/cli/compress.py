"""`hf-oto compress`: a small model out of a training checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from ..config import CONFIG_NAME as OTO_CONFIG_NAME
from ..config import OTOConfig
from ..deploy.model_files import copy_beside_weights
from ..models.configuration_oto import PRUNED_PREFIX
from ..models.folders import folder_beside
from ..models.groups import partition
from ..models.surgery import compress as cut
from ..report.card import as_plain, as_pruned, rewrite
from ..report.summary import summarize
from .loading import load_model, local_folder, read_config
from .printing import JsonOption, at_home, show


def compress(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A training checkpoint with zero groups.", callback=at_home)
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder that does not exist, or is empty.", callback=at_home)
    ],
    plain: Annotated[
        bool, typer.Option("--plain", help="A model of the family's own class: its blocks must all be of one size.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Cut the zero groups out of a training checkpoint: a small model, in a folder of its own.

    The cut model is compared with the checkpoint's before it is written. The code for loading without hf_oto comes
    with it, and everything in the checkpoint's folder but its weights, config, code and training state. With --plain
    no code is needed; a pruned model whose blocks are of one size takes that form, too.

    Example: hf-oto compress out/checkpoint-1000 small
    """
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"OUT {out} is not empty. Choose a folder that does not exist.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT {out} is a file. Choose a folder that does not exist.")
    place = out.resolve()  # where a link leads, which may be another disk
    if place == Path.cwd():
        raise ValueError(f"OUT {out} is the current folder. Choose one in it.")
    model = load_model(checkpoint, read_config(checkpoint))
    source = local_folder(checkpoint)
    settings = OTOConfig.from_pretrained(source) if (source / OTO_CONFIG_NAME).is_file() else OTOConfig()
    summary = summarize(model, sequence_length=settings.sequence_length, latency_table=settings.latency_table)
    before = partition(model)
    zeros = before.num_groups - sum(summary.heads) - sum(summary.neurons)
    if not zeros and not (plain and model.config.model_type.startswith(PRUNED_PREFIX)):
        raise ValueError(
            f"{checkpoint} has no group of zeros, there is nothing to cut out. Use a checkpoint that OTOTrainer wrote "
            f"after its first pruning period, best one of the recovery stage."
        )
    small = cut(model, plain=plain, show_progress=sys.stderr.isatty())
    with folder_beside(place) as folder:
        made = folder / "model"
        small.save_pretrained(made)
        copy_beside_weights(source, made)
        rewrite(made / "README.md", as_plain if plain else as_pruned)
        files = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
        if place.is_dir():
            place.rmdir()  # it is empty; not every system renames onto it
        made.rename(place)
    removed = {
        kind: sum(getattr(before.block_counts, kind)) - sum(getattr(summary, kind)) for kind in ("heads", "neurons")
    }
    numbers = {"out": str(out), "files": files, "removed": removed, **summary.to_dict()}
    text = f"{out}: removed {removed['heads']:,} heads and {removed['neurons']:,} neurons of {checkpoint}."
    if not plain and _could_be_plain(small):
        text += " All blocks are of one size: with --plain it loads everywhere, without code of its own."
    show(numbers, [text, *summary.table().renderables], as_json)


def _could_be_plain(small: PreTrainedModel) -> bool:
    groups = partition(small)
    return all(
        len(set(counts)) == 1 and counts[0] in groups.plain_counts(kind)
        for kind, counts in groups.block_counts._asdict().items()
    )
