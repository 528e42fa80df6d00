"""Text as it comes: whole characters, and no part of a stop string."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.serving.prefixes import Kept, Prefixes, common
from gossamer.serving.text import Detokeniser, Stops, token_bytes
from gossamer.testing.bench import Bench

TOKENIZER = Bench("llama").tokenizer()


def pieces(ids: list[int], prompt: list[int]) -> list[str]:
    reader = Detokeniser(TOKENIZER, prompt)
    return [*(reader.add(token) for token in ids), reader.rest()]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_pieces_are_the_text_and_never_half_a_character(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    found = pieces(ids, TOKENIZER("before ")["input_ids"])
    assert "".join(found) == text
    assert text.isascii() or len("".join(found[:-1])) <= len(text)
    # a piece that is shown stays: each is the next part of the text
    at = 0
    for piece in found:
        assert text.startswith(piece, at)
        at += len(piece)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(3, 319), max_size=60))
def test_broken_bytes_are_those_of_the_whole_text_and_wait_for_little(ids: list[int]) -> None:
    assert "".join(pieces(ids, [])) == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_character_of_many_tokens_comes_whole() -> None:
    ids = TOKENIZER("né 日", add_special_tokens=False)["input_ids"]
    found = pieces(ids, [])
    assert "\ufffd" not in "".join(found)
    assert "".join(found) == "né 日"
    assert [byte for token in ids for byte in token_bytes(TOKENIZER, token)] == list("né 日".encode())
    assert token_bytes(TOKENIZER, TOKENIZER.eos_token_id) is None


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stops_are_those_of_a_search_in_the_whole_text(parts: list[str], stops: list[str]) -> None:
    reader, shown = Stops(stops), ""
    for part in parts:
        shown += reader.add(part)
        whole = "".join(parts)
        assert whole.startswith(shown)
        assert not any(stop in shown for stop in stops)
        if reader.found:
            break
    if not reader.found:
        shown += reader.rest()
    whole = "".join(parts)
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert reader.found == bool(places)
    assert places or shown == whole


class Past:
    """A state of the runner as the slotted cache sees it."""

    def __init__(self) -> None:
        self.closed = self.forked = False

    def fork(self) -> Any:
        self.forked = True
        return Past()

    def close(self) -> None:
        self.closed = True


def test_prefixes_hand_over_what_is_whole_and_copy_what_is_cut() -> None:
    cache, long, short = Prefixes(100), Past(), Past()
    cache.keep(Kept(list(range(40)), long, False))
    cache.keep(Kept(list(range(20)), short, False))
    assert cache.take([*range(40), 7], False) == (long, 40)
    assert cache.tokens == 20
    found = cache.take([*range(15), 99, 99], False)
    assert found is not None
    assert found[1] == 15
    assert found[0] is not short
    assert short.forked
    assert cache.tokens == 20
    assert cache.take([50] * 30, False) is None
    assert cache.take(list(range(20)), True) is None
    known = cache.take(list(range(20)), False)
    assert known is not None
    assert known[1] == 19  # the last token has to be run


def test_prefixes_drop_the_least_recently_used() -> None:
    cache, states = Prefixes(50), [Past() for _ in range(4)]
    for number, state in enumerate(states[:2]):
        cache.keep(Kept([number] * 20, state, False))
    cache.take([0] * 15 + [9], False)  # the first was used last
    cache.keep(Kept([2] * 20, states[2], False))
    assert [state.closed for state in states[:3]] == [False, True, False]
    cache.keep(Kept([3] * 51, states[3], False))
    assert states[3].closed
    assert cache.tokens == 40


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_common_is_the_length_of_the_common_beginning(first: list[int], second: list[int]) -> None:
    length = common(first, second)
    assert first[:length] == second[:length]
    assert first[length : length + 1] != second[length : length + 1] or length == min(len(first), len(second))
