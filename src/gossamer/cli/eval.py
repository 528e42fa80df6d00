"""Measure a model on a corpus or file: task scores with intervals, perplexity, bytes, memory, speed."""

from __future__ import annotations

import typer

from gossamer.cli._output import parse_settings
from gossamer.cli._recipes import data_block, run_steps


def command(
    model: str = typer.Argument(help="A name, folder or hub id."),
    data: str = typer.Argument(help="A packaged corpus or a file or folder of rows."),
    quantities: str = typer.Option(
        "task,perplexity", "--measure", help="Among task, perplexity, size, memory, decode_speed."
    ),
    settings: list[str] = typer.Option([], "--set", help="key=value, e.g. measure.batch_size=4."),  # noqa: B008
    out: str = typer.Option("", "--out", help="A new folder for the run."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    recipe = {"model": model, "data": data_block(data), "steps": [], "measure": {"quantities": quantities.split(",")}}
    run_steps(recipe, out, parse_settings(settings), as_json)
