"""What every command takes and prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..report.tables import plain_text

TABLE_WIDTH = 200  # not narrower where the terminal is: a cut number is a wrong one


def at_home(place: Any) -> Any:
    """A folder or file with `~` in words, as shells leave it in quotes and after `=`: never a folder of that name."""
    if place == "":
        raise typer.BadParameter("It must be a folder or a name, got nothing.")
    return place if place is None else type(place)(os.path.expanduser(place))


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, or a model of the Hub.", callback=at_home)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def show(numbers: dict[str, Any], parts: Sequence[Any], as_json: bool) -> None:
    if as_json:
        text = json.dumps(numbers, indent=2, ensure_ascii=False)
        print(text if _printable(text) == text else json.dumps(numbers, indent=2))
        return
    for part in parts:
        print(_printable(part if isinstance(part, str) else f"\n{plain_text(part, TABLE_WIDTH)}\n"))


def _printable(text: str) -> str:
    """A text with what standard output cannot encode written as escapes: a pipe may be in another encoding."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
