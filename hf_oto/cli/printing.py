"""What every command takes and prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..report.tables import plain_text

TABLE_WIDTH = 200  # not narrower where the terminal is: a cut number is a wrong one

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a model of the Hub.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def show(numbers: dict[str, Any], parts: Sequence[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(numbers, indent=2, ensure_ascii=False))
        return
    for part in parts:
        print(part if isinstance(part, str) else f"\n{plain_text(part, TABLE_WIDTH)}\n")
