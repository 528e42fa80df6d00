"""Talk with a model in the terminal, alone or beside the untouched one; /help shows what else there is."""

from __future__ import annotations

import typer


def command(
    model: str = typer.Argument(help="A name, folder, hub id or the folder of a run."),
    new_tokens: int = typer.Option(200, "--new-tokens", min=1, help="Longest answer, in tokens."),
    temperature: float = typer.Option(0.7, "--temperature", min=0.0, help="0 is greedy."),
    seed: int = typer.Option(0, "--seed", help="For sampling."),
) -> None:
    from rich.console import Console

    from gossamer.cli._chat import Chat, base_of, talk
    from gossamer.cli._models import Writer, load_any

    def opened(name: str) -> Writer:
        return Writer(load_any(name))

    console = Console()
    chat = Chat(model, opened(model), opened, base_of(model), new_tokens, temperature, seed)
    talk(chat, lambda: console.input("[bold]you>[/bold] "), console)
