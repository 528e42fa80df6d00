"""A conversation in the terminal: history, commands, and two models side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.cli._models import Writer
from gossamer.core.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

HELP = {
    "/compare": "answer with the untouched model too, or stop doing so; /compare NAME takes any other model",
    "/reset": "forget what was said",
    "/help": "these lines",
    "/quit": "end; so does the end of the input",
}
Pieces = Generator[tuple[int, str], None, None]  # number of the speaker, a part of its answer
NEXT_TURN = "\n\nUser:"  # where a model without a chat template begins to write for the other side


class Speaker:
    """A model that answers, with a history of its own: it sees its own answers."""

    def __init__(self, name: str, writer: Writer, turns: list[dict[str, str]] | None = None) -> None:
        self.name, self.writer, self.turns = name, writer, list(turns or ())
        self.left_out = 0  # turns that no longer fit

    def prompt(self, text: str, new_tokens: int) -> list[int]:
        """Tokens of the history and ``text``, from the oldest turn on with which an answer still fits. InputError
        where ``text`` alone does not, or the chat template refuses it; the history is then as before."""
        from gossamer.core.errors import InputError
        from gossamer.parts.data import encode_prompt

        turns, room = [*self.turns, {"role": "user", "content": text}], self.writer.length - new_tokens
        ids = encode_prompt(turns, self.writer.tokenizer)
        while len(ids) > room and len(turns) > 1:
            del turns[:2]
            ids = encode_prompt(turns, self.writer.tokenizer)
        if len(ids) > room:
            do = "write less, or give a smaller --new-tokens"
            raise InputError("your message", must=f"have at most {max(room, 0)} tokens", got=len(ids), do=do)
        self.left_out, self.turns = len(self.turns) + 1 - len(turns), turns
        return ids


@dataclasses.dataclass
class Chat:
    """One or two speakers. ``open_model(name)`` gives a writer; ``base`` names the untouched model, if there is one."""

    name: str
    writer: Writer
    open_model: Callable[[str], Writer]
    base: str | None = None
    new_tokens: int = 200
    temperature: float = 0.7
    seed: int = 0
    over: bool = False

    def __post_init__(self) -> None:
        self.speakers = [Speaker(self.name, self.writer)]
        self._opened: dict[str, Writer] = {}

    def ask(self, text: str) -> Pieces:
        """The answers as they come, the speakers in turn. What was said until the iterator is closed goes into the
        history."""
        prompts = [speaker.prompt(text, self.new_tokens) for speaker in self.speakers]
        live = {number: self._answer(self.speakers[number], ids) for number, ids in enumerate(prompts)}
        said = [""] * len(prompts)
        try:
            while live:
                for number, stream in list(live.items()):
                    piece = next(stream, None)
                    if piece is None:
                        del live[number]
                    elif piece:
                        said[number] += piece
                        yield number, piece
        finally:
            for speaker, words in zip(self.speakers, said, strict=True):
                speaker.turns.append({"role": "assistant", "content": words.strip()})

    def command(self, line: str) -> str:
        """Do what a line that begins with / says; what there is to tell. OptionError, InputError for a wrong one."""
        word, _, rest = line.strip().partition(" ")
        if word == "/compare":
            return self._compare(rest.strip())
        if rest or word not in HELP:
            return f"there is no {line.strip()!r}: {did_you_mean(word, HELP)}"
        if word == "/help":
            return "\n".join(f"{name:<9} {text}" for name, text in HELP.items())
        self.over = word == "/quit"
        for speaker in self.speakers:
            speaker.turns.clear()
        return "" if self.over else "forgotten"

    def _compare(self, name: str) -> str:
        if len(self.speakers) > 1 and not name:
            del self.speakers[1:]
            return f"{self.name} answers alone"
        name = name or self.base or ""
        if not name:
            return f"the untouched model of {self.name} is not known: write /compare NAME"
        if name not in self._opened:
            self._opened[name] = self.open_model(name)
        self.speakers[1:] = [Speaker(name, self._opened[name], self.speakers[0].turns)]
        return f"{self.name} and {name} answer"

    def _answer(self, speaker: Speaker, ids: list[int]) -> Iterator[str]:
        pieces = speaker.writer.pieces(ids, self.new_tokens, self.temperature, self.seed)
        return pieces if speaker.writer.tokenizer.chat_template else until(pieces, NEXT_TURN)


def talk(chat: Chat, read: Callable[[], str], console: Console) -> None:
    """Read lines and show answers until /quit or the end of the input. Ctrl-C ends an answer, or at the prompt all."""
    console.print("/help shows the commands", style="dim")
    while not chat.over:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        try:
            if line.startswith("/"):
                console.print(chat.command(line), markup=False, highlight=False)
            elif line:
                _show(chat, chat.ask(line), console)
        except UsageError as error:
            console.print(f"{error}", style="red", markup=False, highlight=False)


def base_of(where: str) -> str | None:
    """The model that a package refers to, or that the run in a folder or above its result began with."""
    from gossamer.core.manifest import is_package, read_manifest
    from gossamer.core.recipe import read_recipe

    if is_package(Path(where)):
        name: str | None = read_manifest(Path(where))["base"]["name"]
        return name
    for folder in (Path(where), Path(where).parent):
        if (folder / "recipe.yaml").is_file() and (folder / "result").is_dir():
            return str(read_recipe(folder / "recipe.yaml").model)
    return None


def until(pieces: Iterator[str], stop: str) -> Iterator[str]:
    """Pieces of a text that ends before ``stop``; what could be its beginning is held back."""
    held = ""
    for piece in pieces:
        held += piece
        before, found, _ = held.partition(stop)
        if found:
            yield before
            return
        keep = next(size for size in range(min(len(stop), len(held)), -1, -1) if held.endswith(stop[:size]))
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held


def _show(chat: Chat, pieces: Pieces, console: Console) -> None:
    try:
        if len(chat.speakers) == 1:
            for _, piece in pieces:
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            console.print()
        else:
            _columns(chat, pieces, console)
    except KeyboardInterrupt:
        pieces.close()
        console.print(" (stopped)", style="dim")
    for speaker in chat.speakers:
        if speaker.left_out:
            text = f"({speaker.name}: the {speaker.left_out} oldest turns no longer fit and are left out)"
            console.print(text, style="dim", markup=False, highlight=False)


def _columns(chat: Chat, pieces: Pieces, console: Console) -> None:
    """Two answers side by side, drawn again as they grow; without a terminal once, at the end."""
    from rich.live import Live

    said = [""] * len(chat.speakers)
    if not console.is_terminal:
        for number, piece in pieces:
            said[number] += piece
        console.print(_grid(chat, said))
        return
    with Live(_grid(chat, said), console=console, vertical_overflow="visible") as live:
        for number, piece in pieces:
            said[number] += piece
            live.update(_grid(chat, said))


def _grid(chat: Chat, said: list[str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    grid = Table(expand=True)
    for speaker in chat.speakers:
        grid.add_column(Text(speaker.name), ratio=1)
    grid.add_row(*[Text(words.strip()) for words in said])
    return grid
