"""Arguments by the names that they had before: refused where they are passed, read where they were saved."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Called = TypeVar("Called", bound=Callable[..., Any])

# Of `OTOConfig`. Files and checkpoints of older versions hold them.
OLD_SETTINGS = {
    "warmup_ratio": "pruning_start_ratio",
    "hidden_state_weight": "distillation_hidden_weight",
    "macs_sequence_length": "sequence_length",
}


def refuse_old_names(what: str, given: Iterable[str], names: Mapping[str, str]) -> None:
    """
    Raises `TypeError` if an argument is given by a name that it no longer has.

    Args:
        what (`str`): What is called, for the message.
        given (`Iterable[str]`): Names of the arguments.
        names (`Mapping[str, str]`): The new name of each old one.
    """
    for name in given:
        if name in names:
            raise TypeError(f"{what} has no argument `{name}`: its name is `{names[name]}`.")


def renamed(**names: str) -> Callable[[Called], Called]:
    """Decorates a function, or a class for its constructor, whose arguments had other names: `old="new"`."""

    def decorate(called: Called) -> Called:
        function = vars(called)["__init__"] if isinstance(called, type) else called

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            refuse_old_names(f"{called.__name__}()", kwargs, names)
            return function(*args, **kwargs)

        if isinstance(called, type):
            called.__init__ = checked  # type: ignore[misc]
            return called
        return checked  # type: ignore[return-value]

    return decorate


def read_old_names(saved: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Saved values by today's names. Where both names of one are there, the old one stays, to be refused."""
    return {name if (new := names.get(name, name)) in saved else new: value for name, value in saved.items()}
