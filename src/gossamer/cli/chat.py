"""Talk with a model in the terminal; an empty line ends it."""

from __future__ import annotations

import typer


def command(
    model: str = typer.Argument(help="A name, folder, hub id or the folder of a run."),
    new_tokens: int = typer.Option(200, "--new-tokens", help="Longest answer, in tokens."),
    temperature: float = typer.Option(0.7, "--temperature", help="0 is greedy."),
    seed: int = typer.Option(0, "--seed", help="For sampling."),
) -> None:
    from gossamer.cli._models import Writer, load_any
    from gossamer.parts.data import render

    writer = Writer(load_any(model))
    messages: list[dict[str, str]] = []
    while text := typer.prompt("you", default="", show_default=False).strip():
        messages.append({"role": "user", "content": text})
        # the tokenizer puts its own bos first
        prompt = render(messages, writer.tokenizer, add_generation_prompt=True).removeprefix(
            writer.tokenizer.bos_token or ""
        )
        answer = writer.write(prompt, new_tokens, temperature, seed)
        messages.append({"role": "assistant", "content": answer.strip()})
