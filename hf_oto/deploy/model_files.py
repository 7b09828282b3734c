"""Which files of a model's folder belong to another form of that model as well."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

# Not the weights, in whatever form, nor the code that travelled with them, nor what a training resumes from or has
# logged. The config is written anew.
WEIGHTS: tuple[str, ...] = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"),
    *("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.gguf", "onnx", "openvino", "coreml"),
    *("adapter_config.json", "adapter_model*"),  # with the first, Transformers looks for what an adapter is of
)
TRAINING: tuple[str, ...] = (
    *("optimizer.*", "optimizer_[0-9]*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin"),
    *("trainer_state.json", f"{PREFIX_CHECKPOINT_DIR}-*", "global_step*", "latest", "runs", "events.out.*"),
)
LEFT_OUT = (*WEIGHTS, *TRAINING, "*.py", "__pycache__", "config.json", ".*")


def files_beside_weights(folder: Path) -> Iterator[Path]:
    """
    Every file of a model's folder that belongs to its other forms. The patterns are of the folder itself: in a folder
    of its own, such as those of sentence-transformers' modules, weights are somebody else's.
    """
    for path in sorted(folder.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in LEFT_OUT):
            continue
        if path.is_dir():
            yield from (inner for inner in sorted(path.rglob("*")) if inner.is_file())
        elif path.is_file():
            yield path


def copy_beside_weights(source: Path, target: Path) -> None:
    """Copy these files into a folder that has the new weights; what is there already stays."""
    for path in files_beside_weights(source):
        copied = target / path.relative_to(source)
        if not copied.exists():
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
