"""Continue a prompt greedily, or by sampling, with a model or the result of a run."""

from __future__ import annotations

import typer


def command(
    model: str = typer.Argument(help="A name, folder, hub id or the folder of a run."),
    prompt: str = typer.Argument(help="The text to continue; - reads it from standard input."),
    new_tokens: int = typer.Option(64, "--new-tokens", help="Longest answer, in tokens."),
    temperature: float = typer.Option(0.0, "--temperature", help="0 is greedy."),
    seed: int = typer.Option(0, "--seed", help="For sampling."),
) -> None:
    import sys

    from gossamer.cli._models import Writer, load_any

    text = sys.stdin.read() if prompt == "-" else prompt
    Writer(load_any(model)).write(text, new_tokens, temperature, seed)
