"""Tables in plain text, which are valid Markdown as well."""

from __future__ import annotations

import io
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

TEXT_WIDTH = 100


def plain_text(renderable: Any, width: int = TEXT_WIDTH) -> str:
    """What rich prints, in so many columns and without colours, whatever the terminal."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, force_terminal=False, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def markdown_table(*columns: str) -> Table:
    """An empty table for rich, in ASCII and valid Markdown: names on the left, numbers on the right."""
    table = Table(box=box.MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(cell(column), justify="right" if index else "left", no_wrap=True)
    return table


def cell(name: str) -> str:
    """A name that may have any characters, for a cell of such a table."""
    return name.replace("|", r"\|")
