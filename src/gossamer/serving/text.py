"""Tokens to text as they come: whole characters only, and no part of a stop string ever shown.

Several tokens may make one character, and a tokenizer may write a token differently at the start of a text. So a token
is decoded together with the few before it, and a last character that is still incomplete waits for the next token.
A stop string may begin in one token and end in another: text that could become one is held back until it is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 5  # tokens before the first that are decoded with it
_LONGEST = 16  # tokens that are decoded at a time, and that may wait for a character to become whole
_BROKEN = "\ufffd"


class Detokeniser:
    """``add(token)`` gives the text that became certain; ``rest()`` what is left at the end."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.window = list(prompt[-_CONTEXT:])
        before = self._decode(self.window)
        if before.endswith(_BROKEN):
            self.window, before = [], ""
        self.start = len(self.window)  # of the tokens whose text is not all given
        self.given = len(before)

    def add(self, token: int) -> str:
        self.window.append(token)
        text = self._decode(self.window)
        broken, late = text.endswith(_BROKEN), len(self.window) - self.start > _LONGEST
        certain = text[:-1] if broken and not late else text
        new, self.given = certain[self.given :], max(self.given, len(certain))
        if broken and late:
            self.window, self.given = [], 0
        elif not broken and len(self.window) > _LONGEST:
            self.window = self.window[-_CONTEXT:]
            self.given = len(self._decode(self.window))
        if not broken or late:
            self.start = len(self.window)
        return new

    def rest(self) -> str:
        text = self._decode(self.window)
        new, self.given = text[self.given :], len(text)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


class Stops:
    """``add(text)`` gives what may be shown now; ``found`` says that a stop string came, which is never shown."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.found = tuple(stops), "", False

    def add(self, text: str) -> str:
        if not self.stops:
            return text
        self.held += text
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.found = True
            shown, self.held = self.held[: min(places)], ""
            return shown
        keep = max(_overlap(self.held, stop) for stop in self.stops)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def rest(self) -> str:
        shown, self.held = self.held, ""
        return shown


def token_bytes(tokenizer: Any, token: int) -> list[int] | None:
    """The UTF-8 bytes of one token, those of an incomplete character too; ``None`` for special tokens."""
    if token in tokenizer.all_special_ids:
        return None
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return [int(piece[3:5], 16)]
    text = str(tokenizer.decode([token]))
    if _BROKEN not in text:
        return list(text.encode())
    table = _byte_letters()
    return [table[letter] for letter in piece] if all(letter in table for letter in piece) else list(text.encode())


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: printable ones stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
