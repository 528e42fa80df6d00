"""Conversations in the terminal: history, commands, two models side by side."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from gossamer.cli._chat import NEXT_TURN, Chat, Speaker, base_of, talk, until
from gossamer.cli._models import Writer
from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError
from gossamer.parts.data import encode_prompt
from gossamer.testing.bench import Bench


def writer(seed: int = 0) -> Writer:
    bench = Bench("llama")
    return Writer(Bundle(bench.model(seed=seed), bench.tokenizer()))


def chat(base: str | None = "base", **options: Any) -> Chat:
    return Chat(
        "mine", writer(), lambda name: writer(seed=len(name)), base, **{"new_tokens": 8, "temperature": 0.0, **options}
    )


def said(chat: Chat, text: str) -> list[str]:
    answers = [""] * len(chat.speakers)
    for number, piece in chat.ask(text):
        answers[number] += piece
    return answers


def talked(chat: Chat, *lines: str | type[BaseException], width: int = 80, terminal: bool = False) -> str:
    left = iter(lines)

    def read() -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    out = io.StringIO()
    talk(chat, read, Console(file=out, width=width, force_terminal=terminal))
    return out.getvalue()


def test_each_answer_sees_what_was_said_before() -> None:
    mine, plain = chat(), writer()
    first = said(mine, "The rain")[0]
    second = said(mine, "One two")[0]
    turns = [{"role": "user", "content": "The rain"}, {"role": "assistant", "content": first.strip()},
             {"role": "user", "content": "One two"}]  # fmt: skip
    ids = encode_prompt(turns, plain.tokenizer)
    assert second == "".join(plain.pieces(ids, 8, 0.0, 0))
    assert [turn["role"] for turn in mine.speakers[0].turns] == ["user", "assistant"] * 2
    assert mine.command("/reset") == "forgotten"
    assert said(mine, "The rain") == [first]


def test_compare_asks_both_with_histories_of_their_own() -> None:
    mine = chat()
    said(mine, "The rain")
    before = list(mine.speakers[0].turns)
    assert mine.command("/compare") == "mine and base answer"
    assert mine.speakers[1].turns == before
    order = [number for number, _ in mine.ask("One two")]
    assert order[:4] == [0, 1, 0, 1]
    own, other = mine.speakers[0].turns[-1], mine.speakers[1].turns[-1]
    assert own["role"] == other["role"] == "assistant"
    assert own != other
    assert mine.command("/compare other") == "mine and other answer"
    assert mine.command("/compare") == "mine answers alone"
    assert len(said(mine, "Again")) == 1


def test_without_an_untouched_model_compare_says_what_to_do() -> None:
    mine = chat(base=None)
    assert "/compare NAME" in mine.command("/compare")
    assert len(mine.speakers) == 1


def test_a_long_history_loses_its_oldest_turns() -> None:
    mine = chat()
    shown = talked(mine, *["The quick brown fox jumps over the lazy dog and on" for _ in range(30)])
    speaker = mine.speakers[0]
    assert "oldest turns no longer fit" in shown
    assert len(encode_prompt(speaker.turns[:-1], speaker.writer.tokenizer)) + 8 <= speaker.writer.length
    assert speaker.turns[0]["role"] == "user"


def test_a_message_that_does_not_fit_leaves_the_history() -> None:
    mine = chat()
    said(mine, "The rain")
    before = list(mine.speakers[0].turns)
    with pytest.raises(InputError, match="your message: must have at most"):
        said(mine, "long " * 2000)
    assert mine.speakers[0].turns == before
    assert "your message" in talked(mine, "long " * 2000)


def test_the_terminal_shows_answers_commands_and_mistakes() -> None:
    mine, other = chat(), chat()
    answer = said(other, "The rain")[0]
    shown = talked(mine, "", "The rain", "/help", "/compar", "/reset now", "/quit", "never read")
    assert answer in shown
    assert "/compare" in shown
    assert "there is no '/compar': did you mean '/compare'?" in shown
    assert "there is no '/reset now'" in shown
    assert mine.over
    assert mine.speakers[0].turns == []


@pytest.mark.parametrize("terminal", [False, True])
def test_two_answers_stand_side_by_side(terminal: bool) -> None:
    shown = talked(chat(), "/compare", "The rain", width=120, terminal=terminal)
    head = next(line for line in shown.splitlines() if "mine" in line and "base" in line and "answer" not in line)
    assert head.index("mine") < head.index("base")


def test_an_interrupt_ends_the_answer_and_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = chat()

    def interrupted(*arguments: Any) -> Any:
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(mine.writer, "pieces", interrupted)
    shown = talked(mine, "The rain", KeyboardInterrupt)
    assert "half (stopped)" in shown
    assert mine.speakers[0].turns[-1] == {"role": "assistant", "content": "half"}


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(("text", "wanted"), [
    ("yes\n\nUser: and", "yes"), ("yes\n\nUse it", "yes\n\nUse it"), ("a\n\n\n\nUser:", "a\n\n"), ("\n\nUs", "\n\nUs"),
])  # fmt: skip
def test_a_model_without_a_template_does_not_write_for_the_user(size: int, text: str, wanted: str) -> None:
    pieces = (text[at : at + size] for at in range(0, len(text), size))
    assert "".join(until(pieces, NEXT_TURN)) == wanted


def test_the_untouched_model_is_what_the_recipe_began_with(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    assert base_of(str(tmp_path)) is None
    assert base_of("llama-7m") is None
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": "llama-7m", "steps": [{"rounding": {"bits": 8}}]}))
    assert base_of(str(tmp_path)) == base_of(str(tmp_path / "result")) == "llama-7m"


def test_the_plain_template_is_stopped_and_a_chat_template_is_not(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    stand_in = Writer(Bundle(make_model(), tokenizer))
    stand_in.pieces = lambda *arguments: iter(["yes\n\nUser: no"])  # type: ignore[method-assign]
    mine = Chat("mine", stand_in, lambda name: stand_in)
    assert tokenizer.chat_template is None
    assert "".join(mine._answer(Speaker("mine", stand_in), [1])) == "yes"
    templated = chat()
    templated.writer.pieces = stand_in.pieces  # type: ignore[method-assign]
    assert "".join(templated._answer(templated.speakers[0], [1])) == "yes\n\nUser: no"
