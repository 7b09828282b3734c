"""`hf-oto`: look at a model, make it small, time it, export it, ask it.

A command's file, and with it torch and Transformers, is imported when that command is asked for.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module, metadata
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

# Every command has a file of its name, with a function of its name; what `hf-oto --help` says of it is here.
COMMANDS = {
    "inspect": "Show a model's groups, what it has kept, and what a target would leave.",
    "compress": "Cut the zero groups out of a training checkpoint: a small model, in a folder of its own.",
    "bench": "Time two models side by side on a device, their runs taking turns.",
    "latency": "Measure what heads and neurons take on a device, for a target in latency.",
    "export": "Write a model as ONNX, for any batch size and length, checked with ONNX Runtime.",
    "answer": "Answer questions about a text.",
}

# Options by the names that they had, with those that they have.
OLD_OPTIONS = {
    "--length": "--sequence-length",
    "--target": "--target-sparsity",
    "--no-answer": "--handle-impossible-answer",
    "--stride": "--doc-stride",
    "--max-length": "--max-seq-length",
}


class _Commands(TyperGroup):
    """The commands, each imported when it is used. Every error is one line on standard error: what is wrong."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f".{cmd_name}", __package__)
        ctx.with_resource(import_module(".loading", __package__).quiet())
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(getattr(module, cmd_name))
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **{**kwargs, "prog_name": "hf-oto", "standalone_mode": False})
            print(end="", flush=True)
        except BrokenPipeError:  # whoever read it has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            _fail(error)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception) -> NoReturn:
    if hasattr(error, "format_message"):  # of the command line itself; click's class or typer's copy of it
        context = getattr(error, "ctx", None)
        help_line = f" Try `{context.command_path} --help`." if context is not None else ""
        message, code = f"{error.format_message()}{help_line}", 2
        old = getattr(error, "option_name", None)
        if old in OLD_OPTIONS:
            message = f"There is no option {old}: its name is {OLD_OPTIONS[old]}.{help_line}"
    else:
        expected = isinstance(error, (OSError, ValueError, TypeError, ImportError))
        message, code = f"{'' if expected else f'{type(error).__name__}: '}{error}", 1
    print(f"hf-oto: error: {' '.join(message.split()) or type(error).__name__}", file=sys.stderr)
    sys.exit(code)


app = typer.Typer(
    cls=_Commands,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        print(metadata.version("hf-oto"))
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Only Train Once for Transformers models: one training, and a small model out of it."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """The entry point of `hf-oto`."""
    try:
        app()
    except KeyboardInterrupt:  # before a command runs; then click ends it in the same way
        sys.exit(130)


if __name__ == "__main__":
    main()
