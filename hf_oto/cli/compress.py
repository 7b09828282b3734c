"""`hf-oto compress`: a small model out of a training checkpoint."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import snapshot_download
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import CONFIG_NAME as OTO_CONFIG_NAME
from ..config import OTOConfig
from ..models.folders import folder_beside
from ..models.groups import partition
from ..models.surgery import compress as cut
from ..report.summary import summarize
from .loading import load_model, read_config
from .printing import JsonOption, show

# What a model's folder holds that is not of the small model: the weights in whatever form, the code that travelled
# with it, and what a training resumes from or has logged. The config is written anew.
WEIGHTS: tuple[str, ...] = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"),
    *("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.gguf", "onnx", "openvino", "coreml"),
)
TRAINING: tuple[str, ...] = (
    *("optimizer.*", "optimizer_[0-9]*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin"),
    *("trainer_state.json", f"{PREFIX_CHECKPOINT_DIR}-*", "global_step*", "latest", "runs", "events.out.*"),
)
LEFT_OUT = (*WEIGHTS, *TRAINING, "*.py", "__pycache__", "config.json", ".*")


def compress(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A training checkpoint with zero groups.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist, or is empty.")],
    as_json: JsonOption = False,
) -> None:
    """
    Cut the zero groups out of a training checkpoint: a small model, in a folder of its own.

    The cut model is compared with the checkpoint's before it is written. The code for loading without hf_oto comes
    with it, and everything in the checkpoint's folder but its weights, config, code and training state.

    Example: hf-oto compress out/checkpoint-1000 small
    """
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"OUT {out} is not empty. Choose a folder that does not exist.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT {out} is a file. Choose a folder that does not exist.")
    model = load_model(checkpoint, read_config(checkpoint))
    source = Path(
        checkpoint if Path(checkpoint).is_dir() else snapshot_download(checkpoint, ignore_patterns=[*WEIGHTS])
    )
    settings = OTOConfig.from_pretrained(source) if (source / OTO_CONFIG_NAME).is_file() else OTOConfig()
    summary = summarize(model, sequence_length=settings.macs_sequence_length, latency_table=settings.latency_table)
    before = partition(model)
    zeros = before.num_groups - sum(summary.heads) - sum(summary.neurons)
    if not zeros:
        raise ValueError(
            f"{checkpoint} has no group of zeros, there is nothing to cut out. Use a checkpoint that OTOTrainer wrote "
            f"after its first pruning period, best one of the recovery stage."
        )
    small = cut(model, show_progress=sys.stderr.isatty())
    with folder_beside(out) as folder:
        made = folder / "model"
        small.save_pretrained(made)
        for path in _files_beside_the_model(source):
            target = made / path.relative_to(source)
            if not target.exists():  # what the small model brought is its own
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        files = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
        if out.is_dir():
            out.rmdir()  # it is empty; not every system renames onto it
        made.rename(out)
    removed = {kind: sum(before.counts(kind)) - sum(getattr(summary, kind)) for kind in ("heads", "neurons")}
    numbers = {"out": str(out), "files": files, "removed": removed, **summary.to_dict()}
    text = f"{out}: removed {removed['heads']:,} heads and {removed['neurons']:,} neurons of {checkpoint}."
    show(numbers, [text, *summary.table().renderables], as_json)


def _files_beside_the_model(folder: Path) -> Iterator[Path]:
    """
    Every file of a model's folder that belongs to the small model as well. The patterns are of the folder itself: in a
    folder of its own, such as those of sentence-transformers' modules, weights are somebody else's.
    """
    for path in sorted(folder.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in LEFT_OUT):
            continue
        if path.is_dir():
            yield from (inner for inner in sorted(path.rglob("*")) if inner.is_file())
        elif path.is_file():
            yield path
