"""Runs the blocks of documents as a reader would, in the order of the pages, in one process and the current folder.

`run_blocks.py PAGE…`: blocks of Python share their names, like cells of a notebook, of which a page may be one. Of the
shell's, `hf-oto` runs; a line that stood on an earlier page as well runs once. The step of a checkpoint is that of the
run that there was: data sets are smaller here than a reader's.
"""

import json
import re
import shlex
import sys
from pathlib import Path

from typer.testing import CliRunner

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """Line, language and text of every block that says its language."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return [(number, "python", "".join(cell["source"])) for number, cell in enumerate(cells, 1)]
    return [(text.count("\n", 0, found.start()) + 1, *found.groups()) for found in BLOCK.finditer(text)]


def commands(text: str) -> list[list[str]]:
    """The words of every command of a shell's block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def of_this_run(word: str) -> str:
    """A checkpoint's folder; if it is not there, the last one beside it."""
    path = Path(word)
    if re.fullmatch(r"checkpoint-\d+", path.name) and not path.exists():
        return str(max(path.parent.glob("checkpoint-*"), key=lambda other: int(other.name.split("-")[1])))
    return word


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
                    result = CliRunner().invoke(app, [of_this_run(word) for word in words[1:]])
                    print(result.output)
                    assert result.exit_code == 0, f"{place}: {shlex.join(words)}"


if __name__ == "__main__":
    main(sys.argv[1:])
