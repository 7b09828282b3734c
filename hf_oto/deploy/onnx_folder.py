"""A folder with a model as ONNX, laid out as browsers, servers and embedding libraries read it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..models.configuration_oto import BLOCK_SPECS, dense_model_type
from ..models.folders import folder_beside
from ..report.card import as_onnx, rewrite
from .model_files import copy_beside_weights
from .onnx_export import Export, export_precisions
from .pooling import Pooling

GRAPH, INT8_GRAPH = "onnx/model.onnx", "onnx/model_int8.onnx"
SPECIAL_TOKENS = "special_tokens_map.json"  # Transformers 5 writes none; fastembed reads it


@dataclass(frozen=True)
class FolderExport:
    """
    What was written.

    Args:
        path (`str`): The folder.
        files (`tuple[str, ...]`): Its files.
        exports (`tuple[Export, ...]`): Of `onnx/model.onnx`, and of `onnx/model_int8.onnx` if asked for.
    """

    path: str
    files: tuple[str, ...]
    exports: tuple[Export, ...]


def dense_config(config: PreTrainedConfig) -> dict[str, Any]:
    """
    The `config.json` of a model as if nothing had been cut: its `model_type` and architecture are the family's own,
    and nothing says what single layers have kept. An ONNX file carries its own sizes; who reads it asks the config
    which kind of model it is, for labels, and for the tokens that it reads.
    """
    family = dense_model_type(config.model_type)
    # `_name_or_path` is a folder of this machine, which no one else has to know.
    left_out = {"per_layer_config", "auto_map", "refused_as_dense", "_name_or_path"} | (
        set() if BLOCK_SPECS[family].own_head_size else {"head_dim"}
    )
    values = {name: value for name, value in config.to_dict().items() if name not in left_out}
    architectures = [name.removeprefix("OTO") for name in values.get("architectures") or []]
    return {**values, "model_type": family, "architectures": architectures}


def export_folder(
    model: PreTrainedModel,
    path: str | os.PathLike,
    source: str | os.PathLike,
    *,
    int8: bool = False,
    pooling: Pooling | None = None,
    **options: Any,
) -> FolderExport:
    """
    Write a model as ONNX with all that is read beside it.

    Args:
        model ([`PreTrainedModel`]): On the CPU, in float32.
        path (`str` or `os.PathLike`): The folder, which must not exist. It appears whole or not at all.
        source (`str` or `os.PathLike`):
            The model's folder: everything in it but weights, config, code and training state is copied, so that
            tokenizers, processors and the modules of sentence-transformers come along.
        int8 (`bool`, *optional*, defaults to `False`): Write `onnx/model_int8.onnx` as well.
        pooling ([`~hf_oto.deploy.pooling.Pooling`], *optional*): Pool inside the graph.
        options: As in [`~hf_oto.deploy.onnx_export.export_onnx`].

    Returns:
        [`FolderExport`]

    Raises:
        `FileExistsError`: There is something at `path`.
        `ValueError`: `source` has no tokenizer with a `tokenizer.json`, or see
            [`~hf_oto.deploy.onnx_export.export_onnx`].
    """
    path, source = Path(path), Path(source)
    if path.exists():
        raise FileExistsError(f"{path} exists already. Choose another folder, or remove it.")
    place = path.resolve()  # where a link leads, which may be another disk
    with folder_beside(place) as folder:
        made = folder / "model"
        (made / "onnx").mkdir(parents=True)
        copy_beside_weights(source, made)
        rewrite(made / "README.md", functools.partial(as_onnx, pooled=pooling is not None))
        _complete_tokenizer(source, made)
        values = {**dense_config(model.config), "architectures": [type(model).__name__.removeprefix("OTO")]}
        (made / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        int8_graph = made / INT8_GRAPH if int8 else None
        exports = export_precisions(model, made / GRAPH, int8_graph, pooling=pooling, **options)
        files = tuple(sorted(str(file.relative_to(made)) for file in made.rglob("*") if file.is_file()))
        made.rename(place)
    placed = (dataclasses.replace(one, path=str(path / Path(one.path).relative_to(made))) for one in exports)
    return FolderExport(str(path), files, tuple(placed))


def _complete_tokenizer(source: Path, made: Path) -> None:
    """What engines that are not Python read of a tokenizer, where its folder does not have it."""
    if (made / "tokenizer.json").is_file() and (made / SPECIAL_TOKENS).is_file():
        return
    tokenizer = AutoTokenizer.from_pretrained(source)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what Transformers makes of no file at all
        raise ValueError(f"{source} has no tokenizer. Save the one that the model was trained with beside it.")
    if not (made / "tokenizer.json").is_file():
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{source} has no tokenizer.json, and {type(tokenizer).__name__} makes none.")
        tokenizer.save_pretrained(made)
    if not (made / SPECIAL_TOKENS).is_file():
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        (made / SPECIAL_TOKENS).write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
