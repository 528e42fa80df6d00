"""Fit what a system learns of its own (a guard's classifier) for a model, without touching its weights."""

from __future__ import annotations

import typer

from gossamer.cli._output import parse_settings
from gossamer.cli._recipes import run_steps, step


def command(
    system: str = typer.Argument(help="A system that learns, e.g. toxicdetector."),
    model: str = typer.Argument(help="A name, folder or hub id."),
    data: str = typer.Argument(help="JSON lines in the shape that the system asks for."),
    settings: list[str] = typer.Option([], "--set", help="key=value."),  # noqa: B008
    out: str = typer.Option("", "--out", help="A new folder for the run."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    recipe = {"model": model, "steps": [step("fit", system=system, path=data), step("save")]}
    run_steps(recipe, out, parse_settings(settings), as_json)
