"""The part of a trained model that has the groups: the one Transformers model inside it, whatever is around."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..models.configuration_oto import BLOCK_SPECS, dense_model_type
from ..models.groups import partition

# Of Transformers' own classes these are no models: whoever writes a model of his own derives it from one of them.
_ABSTRACT = "PreTrainedModel"
_OWN = "transformers.models."


def find_part(model: nn.Module) -> PreTrainedModel:
    """
    The one Transformers model of a supported family that a model is or has in it, from the outside in.

    A class of Transformers' own with a task head (`BertForQuestionAnswering`) is it as a whole. In a module of the
    user's own, or a model of theirs derived from `BertPreTrainedModel`, it is the encoder.

    Args:
        model (`nn.Module`): What is trained, not wrapped.

    Raises:
        `ValueError`: There are several, which are named, or the model is wrapped or adapted. Where there is none, the
            model itself is returned if it could be meant, for its family to be named.
    """
    if getattr(model, "peft_config", None):
        raise ValueError(
            "`model` has adapters of peft, and what is pruned are the weights below them. Prune the model itself, or "
            "what `merge_and_unload().requires_grad_()` returns; adapters can be added to the small model."
        )
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "`model` must be a Transformers model that is not wrapped, got one that `torch.compile` returned. Pass "
            "the model itself, and `torch_compile`=True in the arguments."
        )
    found = _parts(model)
    if len(found) > 1:
        listed = ", ".join(f"{name!r} ({type(part).__name__})" for name, part in found.items())
        raise ValueError(
            f"`model` has {len(found)} Transformers models in it that could be pruned: {listed}. OTOTrainer prunes "
            f"one: train them apart, or override `pruned_part` to choose one."
        )
    return next(iter(found.values()), cast(PreTrainedModel, model))


def _parts(model: nn.Module, prefix: str = "") -> dict[str, PreTrainedModel]:
    if _is_own(model):
        return {prefix: cast(PreTrainedModel, model)}
    found: dict[str, PreTrainedModel] = {}
    for name, child in model.named_children():
        inside = _parts(child, f"{prefix}.{name}" if prefix else name)
        found |= {path: part for path, part in inside.items() if all(part is not other for other in found.values())}
    return found


def _is_own(model: nn.Module) -> bool:
    """Whether a module is of a class of Transformers' own, or one derived of it, of a family that can be pruned."""
    if not isinstance(model, PreTrainedModel):
        return False
    if dense_model_type(getattr(model.config, "model_type", "")) not in BLOCK_SPECS:
        return False
    return any(cls.__module__.startswith(_OWN) and not cls.__name__.endswith(_ABSTRACT) for cls in type(model).__mro__)


def put_part(model: nn.Module, old: PreTrainedModel, new: PreTrainedModel) -> nn.Module:
    """
    Put another part into a model, in place, wherever the old one is. Where that is all there is, the new one is it.

    Args:
        model (`nn.Module`): What is trained.
        old ([`PreTrainedModel`]): The part of it that is replaced.
        new ([`PreTrainedModel`]): What takes its place.
    """
    if model is old:
        return new
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    put_config(model, old.config, new.config)
    return model


def put_config(model: nn.Module, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Put another config of the part into those configs around it that hold the old one, to build the part from."""
    for module in model.modules():
        for name, value in vars(module.config).copy().items() if isinstance(module, PreTrainedModel) else ():
            if value is old:
                setattr(module.config, name, new)


def shared_outside(part: PreTrainedModel, around: Iterable[nn.Module]) -> str | None:
    """
    Where a weight that groups own is used outside of the part as well, `None` if none is.

    Args:
        part ([`PreTrainedModel`]): The part with the groups.
        around (`Iterable[nn.Module]`): What is trained, the part in it.
    """
    parameters, inside = dict(part.named_parameters()), set(part.modules())
    owned = {parameters[name] for array in partition(part).arrays for name, _ in array.members}
    for module in around:
        for path, one in module.named_modules():
            for name, parameter in one._parameters.items() if one not in inside else ():
                if parameter in owned:
                    return f"{path}.{name}"
    return None


def path_of(model: nn.Module, part: nn.Module) -> str:
    """Where a part is in a model: `encoder`, `body.encoder`; nothing where it is all there is."""
    return next(name for name, module in model.named_modules() if module is part)


def saved_config(folder: str | Path, family: str, path: str) -> PreTrainedConfig | None:
    """
    The config of a saved model's part, `None` where there is none.

    Args:
        folder (`str` or `Path`): Of the whole model.
        family (`str`): The part's, dense.
        path (`str`): Where the part is in the model.
    """
    for place in (Path(folder, path), Path(folder), *sorted(Path(folder).glob("*"))):
        if dense_model_type(_model_type(place / CONFIG_NAME)) == family:
            return AutoConfig.from_pretrained(place)
    return None


def save_beside(folder: Path, model: nn.Module, part: PreTrainedModel, *, weights: bool) -> None:
    """
    Save a part in a folder of its own name in that of the whole model, unless what has saved the whole model has
    written the part's config already. From there `from_pretrained` loads the part, to be put into a model around it.

    Args:
        folder (`Path`): Of the whole model, saved.
        model (`nn.Module`): The whole model.
        part ([`PreTrainedModel`]): The part of it with the groups.
        weights (`bool`): Whether to save the weights as well, which the whole model's have, too.
    """
    path, mine = path_of(model, part), part.config.model_type
    written = [_model_type(file) for file in folder.rglob(CONFIG_NAME)]
    # A run that resumes reads the config alone, and could not tell it from that of another encoder.
    of_family = [dense_model_type(found) for found in written].count(dense_model_type(mine))
    if path and not (mine in written and (weights or of_family == 1)):
        (part if weights else part.config).save_pretrained(folder / path)


def _model_type(file: Path) -> str:
    """What a config is of; nothing where there is none, or where it is that of a module of another kind."""
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return settings.get("model_type", "") if isinstance(settings, dict) else ""
