"""Check a recipe or a file of data, before anything loads."""

from __future__ import annotations

from pathlib import Path

import typer

from gossamer.cli._output import json_out, parse_settings, table


def command(
    target: str = typer.Argument(help="A recipe (.yaml) or data (JSONL, JSON, CSV, Parquet, folder)."),
    model: str = typer.Option(
        "", "--model", help="For data: also tokenise for this model and show which tokens carry loss."
    ),
    max_length: int = typer.Option(1024, "--max-length", help="For data with --model: longest row in tokens."),
    settings: list[str] = typer.Option([], "--set", help="For a recipe: key=value, several times."),  # noqa: B008
    as_json: bool = typer.Option(False, "--json", help="For machines."),
) -> None:
    if Path(target).suffix in (".yaml", ".yml"):
        _recipe(target, settings, as_json)
    else:
        _data(target, model, max_length, as_json)


def _recipe(path: str, settings: list[str], as_json: bool) -> None:
    from gossamer.core.recipe import read_recipe

    recipe = read_recipe(path, parse_settings(settings))
    if as_json:
        json_out(recipe.as_dict())
    else:
        steps = " -> ".join(step.name for step in recipe.steps) or "none"
        typer.echo(f"{path}: in order; model {recipe.model}, steps {steps}")


def _data(path: str, model: str, max_length: int, as_json: bool) -> None:
    from gossamer.parts.data_doctor import examine

    tokenizer = None
    if model:
        from transformers import AutoTokenizer

        from gossamer.hub.models import resolve

        tokenizer = AutoTokenizer.from_pretrained(resolve(model).path)
    found = examine(path, tokenizer, max_length=max_length)
    errors = [finding for finding in found.findings if finding.severity == "error"]
    if as_json:
        json_out(found.as_dict())
    else:
        heads = ["file", "row", "field", "found", "expected", "fix"]
        if found.findings:
            rows = [[f.file, f.row, f.field, f.found, f.expected, f"{f.severity}: {f.fix}"] for f in found.findings]
            table(heads, rows)
        for name, renamed in found.mapping.items():
            typer.echo(f"read {name!r} as {renamed!r}")
        _preview(found.preview)
        typer.echo(", ".join(f"{name} {value:g}" for name, value in found.counts.items()))
    if errors:
        raise typer.Exit(2)


def _preview(rows: tuple[dict[str, object], ...]) -> None:
    """Rows with the text that carries loss in bold."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for row in rows:
        text = Text(f"row {row['row']}: ", style="dim")
        tokens = row["tokens"]
        assert isinstance(tokens, list)
        for token in tokens:
            text.append(str(token["text"]), style="bold green" if token["weight"] else "dim")
        console.print(text)
    if rows:
        console.print(Text("bold: carries loss", style="dim"))
