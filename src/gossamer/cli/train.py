"""Train a model on a corpus or a file: a recipe of an adapter, a train step and a save."""

from __future__ import annotations

import typer

from gossamer.cli._output import parse_settings
from gossamer.cli._recipes import data_block, run_steps, step


def command(
    model: str = typer.Argument(help="A name, folder or hub id."),
    data: str = typer.Argument(help="A packaged corpus or a file or folder of rows."),
    adapter: str = typer.Option("lora", "--adapter", help="An adapter, or none to train all weights."),
    objective: str = typer.Option("sft", "--objective", help="What to minimise."),
    optimizer: str = typer.Option("adamw", "--optimizer", help="How to step."),
    steps: int = typer.Option(100, "--steps", help="Optimizer steps."),
    merge: bool = typer.Option(False, "--merge", help="Fold the adapter into the weights at the end."),
    settings: list[str] = typer.Option([], "--set", help="key=value, e.g. steps.train.batch_size=4."),  # noqa: B008
    out: str = typer.Option("", "--out", help="A new folder for the run."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    chain = [step(adapter)] if adapter != "none" else []
    chain.append(step("train", objective=objective, optimizer=optimizer, steps=steps))
    chain += [step("merge")] if merge and adapter != "none" else []
    recipe = {"model": model, "data": data_block(data), "steps": [*chain, step("save")]}
    run_steps(recipe, out, parse_settings(settings), as_json)
