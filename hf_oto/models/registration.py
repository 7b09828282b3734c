"""Has Transformers' Auto classes know the pruned types: at once where Transformers is imported, otherwise when it is.

Neither Transformers nor any family is imported for it before somebody asks for them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .configuration_oto import BLOCK_SPECS, PRUNED_PREFIX

AUTO = "transformers.models.auto.configuration_auto"


def register_types() -> None:
    """Register the pruned types, now or as soon as Transformers has the place for them."""
    auto = sys.modules.get(AUTO)
    if auto is not None and hasattr(auto, "AutoConfig"):
        _register(auto)
    else:
        sys.meta_path.insert(0, _WhenImported())


def _register(auto: Any) -> None:
    for model_type in BLOCK_SPECS:
        name = f"{PRUNED_PREFIX}{model_type.replace('-', '_')}"
        if name not in auto.CONFIG_MAPPING:
            auto.AutoConfig.register(name, _InPlace(name, (), {"model_type": name}))


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
    """Finds one module the way the others do, and has the types registered once it is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _AndRegister(spec.loader)
        return spec


class _AndRegister(Loader):
    """A module's own loader, which it is given back; and then the types are registered."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        _register(module)
