"""Models from a folder or the Hub, by their configs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import transformers
import typer
from huggingface_hub import parse_safetensors_file_metadata, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, SafetensorsParsingError  # the first: its client's, whichever it is
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)

from ..deploy.answering import QuestionAnswerer
from ..deploy.model_files import WEIGHTS
from ..models import modeling_oto
from ..models.configuration_oto import BLOCK_SPECS, dense_model_type
from ..models.example_inputs import check_tokens
from ..models.groups import refusal

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DeviceOption = Annotated[str, typer.Option(help="cpu, or cuda or another accelerator that torch knows.")]
DtypeOption = Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")]


def read_device(name: str) -> torch.device:
    """A device that is there."""
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float32, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"`device` must be cpu, or cuda where there is one, got {name!r}: {error}") from error
    return device


def read_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {name!r}.")
    return DTYPES[name]


@contextmanager
def quiet() -> Iterator[None]:
    """Progress bars and warnings of loading say nothing to who asked for a table."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    of_the_hub = hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # which tells of every new try
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(of_the_hub)
        if bars:
            logging.enable_progress_bar()


def read_config(name: str) -> PreTrainedConfig:
    """The config of a supported family, from a folder or the Hub."""
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name} is a file. Give the folder with the model.")
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        found = [str(path.parent) for path in sorted(folder.glob(f"*/{CONFIG_NAME}")) if _is_config(path)]
        inside = f" There are models in it: {', '.join(found)}." if found else ""
        raise ValueError(f"{name} has no {CONFIG_NAME}. Give a folder with a model, or a model of the Hub.{inside}")
    # hf_oto's own classes: no code that came with a model runs.
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, TypeError) as error:  # the latter of JSON that is no object
        wrong = "is no folder, and no model that the Hub gives"
        if folder.is_dir():
            wrong = f"has a {CONFIG_NAME} that cannot be read"
        raise OSError(f"{name} {wrong}: {error}") from error
    if dense_model_type(config.model_type) not in BLOCK_SPECS:
        raise ValueError(f"{name} is {refusal(config.model_type)}")
    return config


def _is_config(path: Path) -> bool:
    """Whether a file is the config of a model, and not of something around one."""
    try:
        return "model_type" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def model_class(config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """
    The class that the config was saved with; the base model's where it does not say, and where it names a head that
    the weights lack, as configs of sentence-transformers' models do.
    """
    base = type(config).__name__.replace("Config", "Model")
    wanted = (config.architectures or [base])[0]
    found = getattr(modeling_oto, wanted, None) or getattr(transformers, wanted, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config)):
        raise ValueError(
            f"`architectures` of the config says {wanted!r}, which is no class of Transformers or hf_oto for "
            f"{config.model_type!r}."
        )
    if wanted == base:
        return found
    names = _weight_names(name)
    if not names or any(one.startswith(f"{found.base_model_prefix}.") for one in names):
        return found
    return cast(type[PreTrainedModel], getattr(modeling_oto, base, None) or getattr(transformers, base, found))


@contextmanager
def _of_weights(name: str) -> Iterator[None]:
    """Say whose weights they are that cannot be read, and why that may be."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {name} cannot be read ({error}). A file is empty, cut short, or a pointer of git-lfs: "
            f"copy or download it again, as by `git lfs pull`."
        ) from error


def _weight_names(name: str) -> list[str]:
    """What a model's weights are called in its files; nothing where it has none."""
    with _of_weights(name):
        return _names_in_files(name)


def _names_in_files(name: str) -> list[str]:
    if (names := _names_on_hub(name)) is not None:
        return names
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (path := file_of(name, whole)) is not None:
            return list(load_state_dict(path, map_location="meta"))  # the names alone, and of tensors only
        if (path := file_of(name, index)) is not None:
            return list(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"])
    return []


def _names_on_hub(name: str) -> list[str] | None:
    """From the first bytes of weights that are on the Hub and not on this disk; `None` where that cannot be."""
    if Path(name).is_dir() or isinstance(try_to_load_from_cache(name, SAFE_WEIGHTS_NAME), str):
        return None
    try:
        return list(parse_safetensors_file_metadata(name, SAFE_WEIGHTS_NAME).tensors)
    except (OSError, HTTPError, SafetensorsParsingError):  # whoever asks for the files is told why
        return None


def read_text_config(name: str) -> PreTrainedConfig:
    """The config of a model that reads tokens; known before its weights are read."""
    config = read_config(name)
    check_tokens(model_class(config, name))
    return config


def _pooler_options(cls: type[PreTrainedModel], name: str) -> dict[str, Any]:
    """An encoder that was saved without the pooler that its class makes by itself goes without."""
    made = [vars(one)["__init__"] for one in cls.__mro__ if "__init__" in vars(one)]
    if not any("add_pooling_layer" in inspect.signature(each).parameters for each in made):
        return {}
    names = [one.removeprefix(f"{cls.base_model_prefix}.") for one in _weight_names(name)]
    lacks = names and not any(one.startswith("pooler.") for one in names)
    return {"add_pooling_layer": False} if lacks else {}


def empty_model(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: its shapes, no weights."""
    cls: Any = model_class(config, name)
    with torch.device("meta"):
        model = cls(config, **_pooler_options(cls, name))
    return model if config.dtype is None else cast(Any, model).to(config.dtype)


def load_model(name: str, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    options: dict[str, Any] = {"config": config, "output_loading_info": True}
    if dtype is not None:
        options["dtype"] = dtype
    cls = model_class(config, name)
    with _of_weights(name):
        loaded: Any = cls.from_pretrained(name, **options, **_pooler_options(cls, name))
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights of {type(model).__name__}: {missing[0]!r}, …. Give a complete model."
        )
    return model.eval()


def load_answerer(name: str, **options: Any) -> QuestionAnswerer:
    read_text_config(name)
    if file_of(name, "tokenizer_config.json") is None:
        raise ValueError(f"{name} has no tokenizer_config.json. Save the tokenizer with the model.")
    with _of_weights(name):
        return QuestionAnswerer.from_pretrained(name, **options)


def local_folder(name: str) -> Path:
    """A model's folder on this disk; of one on the Hub all files but its weights are fetched."""
    return Path(name if Path(name).is_dir() else snapshot_download(name, ignore_patterns=[*WEIGHTS]))


def file_of(name: str, file: str) -> str | None:
    """A file of a folder or of a model on the Hub, if it is there."""
    return cached_file(
        name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
