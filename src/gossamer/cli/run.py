"""Run a recipe, or go on with one that was cut off."""

from __future__ import annotations

import typer

from gossamer.cli._output import Bars, parse_settings, show_report


def command(
    recipe: str = typer.Argument("", help="A recipe (.yaml); none with --resume."),
    out: str = typer.Option("", "--out", help="A new folder for the run; runs/NAME-N where not given."),
    resume: str = typer.Option("", "--resume", help="The folder of a run to go on with."),
    settings: list[str] = typer.Option([], "--set", help="key=value, several times, e.g. steps.train.steps=20."),  # noqa: B008
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    from gossamer.core.errors import OptionError
    from gossamer.core.recipe import read_recipe

    if bool(recipe) == bool(resume):
        do = "gossamer run RECIPE, or gossamer run --resume DIR"
        raise OptionError("run", must="get a recipe or --resume DIR, and not both", do=do)
    if not resume:
        read_recipe(recipe, parse_settings(settings))  # refuse before torch loads
    from gossamer.pipeline import engine

    bars = Bars()
    report = (
        engine.resume(resume, reporter=bars)
        if resume
        else engine.run(recipe, out=out or None, overrides=parse_settings(settings), reporter=bars)
    )
    show_report(report, as_json)
