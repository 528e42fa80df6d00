"""Check a recipe, a file of data or a package, before anything loads."""

from __future__ import annotations

from pathlib import Path

import typer

from gossamer.cli._output import json_out, parse_settings, table


def command(
    target: str = typer.Argument(help="A recipe (.yaml) or data (JSONL, JSON, CSV, Parquet, folder), or a package."),
    model: str = typer.Option(
        "", "--model", help="For data: also tokenise for this model and show which tokens carry loss."
    ),
    max_length: int = typer.Option(1024, "--max-length", help="For data with --model: longest row in tokens."),
    settings: list[str] = typer.Option([], "--set", help="For a recipe: key=value, several times."),  # noqa: B008
    replay: bool = typer.Option(False, "--replay", help="For a package: also load it and compare its outputs."),
    as_json: bool = typer.Option(False, "--json", help="For machines."),
) -> None:
    from gossamer.core.manifest import is_package

    if Path(target).suffix in (".yaml", ".yml"):
        _recipe(target, settings, as_json)
    elif is_package(Path(target)):
        _package(target, replay, as_json)
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


def _package(path: str, again: bool, as_json: bool) -> None:
    from gossamer.core.manifest import check_package, summary

    manifest = check_package(Path(path))
    found = summary(manifest)
    if again and manifest["probe"] is not None:
        import gossamer
        from gossamer.pipeline.packages import replay

        found["replay"] = replay(*gossamer.load(path), manifest["probe"], where=f"package {path}")
    if as_json:
        json_out(found)
        return
    typer.echo(f"{path}: whole; {found['files']} files, {found['bytes'] / 1e6:.1f} MB, sha256 {found['sha256']}")
    typer.echo(f"base {found['base']}; on it: {', '.join([*found['adapters'], *found['parts']]) or 'nothing'}")
    typer.echo("claims: " + (", ".join(f"{name} {status}" for name, status in found["claims"].items()) or "none"))
    if "replay" in found:
        values = found["replay"]
        typer.echo(
            f"{values['tokens']} greedy tokens equal, no log-probability moved by more than {values['largest']:g}"
        )
    elif again:
        typer.echo("no probe to replay: its model writes no text")


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
