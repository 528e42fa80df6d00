"""How verbs print: JSON for machines, Rich tables and progress bars for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import typer


def json_out(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A Rich table, as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(*heads)
    for row in rows:
        made.add_row(*[Text(str(cell)) for cell in row])
    Console().print(made)


class Bars:
    """The engine's reporter on a terminal: notes as lines, tasks as progress bars with the time left.

    Without a terminal a task is a line at its end.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.live = self.console.is_terminal

    def note(self, text: str) -> None:
        self.console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, markup=False)

    def task(self, label: str) -> Callable[[int, int], None]:
        return self._bar(label) if self.live else self._lines(label)

    def _bar(self, label: str) -> Callable[[int, int], None]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
        progress = Progress(*columns, console=self.console)
        progress.start()
        bar = progress.add_task(label)

        def tick(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)
            if done >= total:
                progress.stop()

        return tick

    def _lines(self, label: str) -> Callable[[int, int], None]:
        start = time.monotonic()

        def tick(done: int, total: int) -> None:
            if done >= total:
                self.note(f"{label}: {total} in {time.monotonic() - start:.0f} s")

        return tick


def show_report(report: Any, as_json: bool) -> None:
    """Print a run's report; exit code 3 where its budget is not met."""
    if as_json:
        json_out(report.as_dict())
    else:
        from rich.console import Console

        from gossamer.parts.report_console import console_tables

        for item in console_tables(report):
            Console().print(item)
    fail_over_budget(report.met(), "the budget is not met")


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """``["train.steps=5"]`` to a mapping, values read as YAML."""
    from gossamer.core.errors import OptionError
    from gossamer.core.recipe import parse_value

    values = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise OptionError(f"--set {setting}", must="be key=value", do="write --set steps.train.steps=20")
        values[key] = parse_value(text)
    return values


def fail_over_budget(met: bool, what: str) -> None:
    """Exit code 3 where something was measured and is not met."""
    if not met:
        typer.echo(what, err=True)
        sys.exit(3)
