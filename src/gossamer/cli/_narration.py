"""What `narrate` and `vocab` share: libraries that leave the terminal to the log, and the rows as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


def quiet_libraries() -> None:
    """No bars of transformers for the files of the model."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def shown_rows(quiet: bool) -> Iterator[tuple[Any, Any]]:
    """What to call with each row and with the progress: a bar under the log on a terminal, plain lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    from gossamer.applications.narrate.result import line

    console = Console(stderr=True)
    together = console.is_terminal and sys.stdout.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[at]}"), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total, at="")
        bar.update(tasks[what], completed=done, total=total, at=f"{done} of {total} clips")

    def row(one: Any) -> None:
        if together and not quiet:
            console.print(Text(line(one), style="" if one.known else "dim"))
        elif not quiet:
            typer.echo(line(one))

    try:
        with bar:
            yield row, progress
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        sys.exit(1)
