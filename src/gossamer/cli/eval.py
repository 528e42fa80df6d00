"""Measure a model: task scores on a corpus or file with intervals, evaluations, perplexity, bytes, memory, speed."""

from __future__ import annotations

import typer

from gossamer.cli._output import parse_settings
from gossamer.cli._recipes import data_block, run_steps


def command(
    model: str = typer.Argument(help="A name, folder or hub id."),
    data: str = typer.Argument("", help="A packaged corpus or a file or folder of rows; evaluations need none."),
    quantities: str = typer.Option(
        "task,perplexity",
        "--measure",
        help="Among task, perplexity, size, memory, decode_speed and evaluations such as llm_kick.",
    ),
    questions: str = typer.Option("", "--questions", help="JSON lines that the evaluations ask instead of their own."),
    settings: list[str] = typer.Option([], "--set", help="key=value, e.g. measure.batch_size=4."),  # noqa: B008
    out: str = typer.Option("", "--out", help="A new folder for the run."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    measure = {"quantities": quantities.split(","), **({"questions": questions} if questions else {})}
    recipe = {"model": model, "steps": [], "measure": measure, **({"data": data_block(data)} if data else {})}
    run_steps(recipe, out, parse_settings(settings), as_json)
