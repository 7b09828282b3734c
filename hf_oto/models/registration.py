"""Has other packages know the pruned types: at once where they are imported, otherwise when they are.

Transformers' Auto classes load them, and peft finds the layers that it adapts by default. Neither package is imported
for it, nor any family, before somebody asks for them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .configuration_oto import BLOCK_SPECS, PRUNED_PREFIX

_PRUNED = {family: f"{PRUNED_PREFIX}{family.replace('-', '_')}" for family in BLOCK_SPECS}


def register_types() -> None:
    """Register the pruned types, now or as soon as there is a place for them."""
    for module, then in _PLACES.items():
        found = sys.modules.get(module)
        if found is not None and not getattr(found.__spec__, "_initializing", False):
            then(found)
        else:
            sys.meta_path.insert(0, _WhenImported(module, then))


def _to_auto_classes(auto: Any) -> None:
    for name in _PRUNED.values():
        if name not in auto.CONFIG_MAPPING:
            auto.AutoConfig.register(name, _InPlace(name, (), {"model_type": name}))


def _to_peft(constants: Any) -> None:
    """By default each kind of adapter goes where it goes in the family's dense models."""
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            table.update({pruned: table[family] for family, pruned in _PRUNED.items() if family in table})


_PLACES: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _to_auto_classes,
    "peft.utils.constants": _to_peft,
}


class _InPlace(type):
    """
    Stands in for a family's pruned config class until it is asked for anything. The class itself is made then, and
    registered in its place together with the family's models.
    """

    model_type: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.own()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.own(), name)

    def own(cls) -> Any:
        return importlib.import_module(".modeling_oto", __package__).config_class(cls.model_type)


class _WhenImported(MetaPathFinder):
    """Finds one module the way the others do, and has something done once it is there."""

    def __init__(self, module: str, then: Callable[[Any], None]) -> None:
        self.module, self.then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _AndThen(spec.loader, self.then)
        return spec


class _AndThen(Loader):
    """A module's own loader, which it is given back; and then something is done."""

    def __init__(self, own: Loader, then: Callable[[Any], None]) -> None:
        self.own, self.then = own, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        self.then(module)
