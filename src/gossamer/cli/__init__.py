"""The command line: one thin file a verb, discovered; what a verb needs is imported when it runs.

Exit codes: 0 done, 1 failed, 2 wrong use, 3 measured but a claim or budget is not met.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from gossamer.core.errors import GossamerError, OptionError, did_you_mean

_FOLDER = Path(__file__).parent


class _Verbs(TyperGroup):
    """Verbs are the files of this folder; their help is the docstring of the file."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(path.stem for path in _FOLDER.glob("[a-z]*.py"))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        module: Any = importlib.import_module(f"gossamer.cli.{cmd_name}")
        if hasattr(module, "app"):  # a verb with verbs of its own
            return typer.main.get_command(module.app)
        verb = typer.Typer(add_completion=False, rich_markup_mode=None)
        verb.command(cmd_name, help=module.__doc__)(module.command)
        return typer.main.get_command(verb)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        names = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in names:
            raise OptionError(f"gossamer {args[0]}", must="be a command", do=did_you_mean(args[0], names))
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Gossamer makes language models and vision-language models light.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from gossamer import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print it.")) -> None:
    """Options before the verb."""


def main() -> None:
    """Entry point: an error is one line on stderr and an exit code."""
    try:
        app()
    except GossamerError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
