"""Runs the blocks of documents as a reader would, in the order of the pages, in one process and the current folder.

`run_blocks.py PAGE…`: blocks of Python share their names, like cells of a notebook. Of the shell's, `hf-oto` runs; a
line that stood on an earlier page as well runs once.
"""

import re
import shlex
import sys
from pathlib import Path

from typer.testing import CliRunner

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """Line, language and text of every block that says its language."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start()) + 1, *found.groups()) for found in BLOCK.finditer(text)]


def commands(text: str) -> list[list[str]]:
    """The words of every command of a shell's block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def main(pages: list[str]) -> None:
    from hf_oto.cli.app import app

    names: dict = {"__name__": "__main__"}
    done: list[list[str]] = []
    for page in pages:
        for line, language, text in blocks(Path(page)):
            place = f"{Path(page).name}:{line}"
            print(f"--- {place}", flush=True)
            if language == "python":  # a traceback has the page's own lines
                exec(compile("\n" * line + text, place, "exec"), names)
            for words in commands(text) if language == "bash" else []:
                if words[0] == "hf-oto" and words not in done:
                    done.append(words)
                    result = CliRunner().invoke(app, words[1:])
                    print(result.output)
                    assert result.exit_code == 0, f"{place}: {shlex.join(words)}"


if __name__ == "__main__":
    main(sys.argv[1:])
