"""Compress a model and save the result, with what it cost in bytes, memory and speed."""

from __future__ import annotations

from typing import Any

import typer

from gossamer.cli._output import parse_settings
from gossamer.cli._recipes import data_block, run_steps, step


def command(
    model: str = typer.Argument(help="A name, folder or hub id."),
    method: str = typer.Option("finequant", "--method", help="A compression."),
    data: str = typer.Option("", "--data", help="A corpus or file to measure quality on as well."),
    settings: list[str] = typer.Option([], "--set", help="key=value, e.g. steps.finequant.bits=8."),  # noqa: B008
    out: str = typer.Option("", "--out", help="A new folder for the run."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    quantities = ["size", "memory", "decode_speed"] + (["perplexity", "task"] if data else [])
    recipe: dict[str, Any] = {
        "model": model,
        "steps": [step(method), step("save"), step("reload")],
        "measure": quantities,
    }
    if data:
        recipe["data"] = data_block(data)
    run_steps(recipe, out, parse_settings(settings), as_json)
