"""Narration pair encoding: its invariant on any list and on three corpora, the literal box, counts, linear growth."""

from __future__ import annotations

import functools
import random
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import InputError, OptionError
from gossamer.hub.corpora import load_corpus
from gossamer.parts.narration_pairs import clean, join, narration_pairs, normalise

# few words, so that lists are full of prefixes of one another; "\x01" sorts before the blank, "ab" begins with "a"
WORDS = st.sampled_from(["a", "ab", "b", "c", "a\x01", "ü"])
NARRATIONS = st.lists(st.lists(WORDS, min_size=1, max_size=5).map(" ".join), min_size=1, max_size=30)
FOLDOC = Path("/usr/share/dictd/foldoc.index")


def naive(narrations: list[str], min_count: int = 1) -> tuple[set[str], set[str]]:
    """The docstring's definition, quadratic."""
    known = set(narrations)

    def heads(text: str) -> list[str]:
        words = text.split(" ")
        return [" ".join(words[:n]) for n in range(1, len(words)) if " ".join(words[:n]) in known]

    prefixes = {text for text in known if not heads(text)}
    rests = [text[len(heads(text)[0]) + 1 :] for text in narrations if heads(text)]
    postfixes = {rest for rest in rests if rests.count(rest) >= min_count}
    for text in sorted(known, key=len):
        words = text.split(" ")
        pairs = [(" ".join(words[:n]), " ".join(words[n:])) for n in range(1, len(words))]
        if text not in prefixes and not any(p in prefixes and s in postfixes for p, s in pairs):
            prefixes.add(text)
    return prefixes, postfixes


@settings(max_examples=300, deadline=None)
@given(NARRATIONS, st.integers(1, 3))
def test_every_narration_is_a_prefix_or_a_prefix_and_a_postfix(narrations: list[str], min_count: int) -> None:
    pairs = narration_pairs(narrations, min_count=min_count)
    for text in narrations:
        prefix, postfix = pairs.encode(text)
        assert join(prefix, postfix) == text
        assert prefix in pairs.prefixes
        assert postfix == "" or postfix in pairs.postfixes
    assert (set(pairs.prefixes), set(pairs.postfixes)) == naive(narrations, min_count)
    assert len(set(pairs.prefixes)) == len(pairs.prefixes)


@settings(max_examples=100, deadline=None)
@given(NARRATIONS)
def test_counts_are_those_of_the_list_and_no_prefix_is_made_of_others(narrations: list[str]) -> None:
    pairs = narration_pairs(narrations)
    assert sum(pairs.counts.values()) == len(narrations)
    for (prefix, postfix), count in pairs.counts.items():
        assert count == sum(text == join(prefix, postfix) for text in narrations)
    for prefix in pairs.prefixes:
        others = [(p, s) for p in pairs.prefixes for s in pairs.postfixes if join(p, s) == prefix]
        assert not others


@functools.cache
def corpus(name: str) -> list[str]:
    if name == "procedural":
        from gossamer.hub.worlds.events import narrations

        return list(narrations())
    if name == "docstrings":
        return [row["completion"].strip() for row in load_corpus("python_functions", limit=4000).rows]
    if name == "foldoc":
        if not FOLDOC.exists():
            pytest.skip(f"{FOLDOC} is not there: apt-get install dict-foldoc")
        definitions = [row["text"] for split in ("train", "test") for row in load_corpus("foldoc", split=split).rows]
        return [sentence for text in definitions for sentence in text.split(". ") if sentence.strip()]
    if name == "unicode names":
        return [name for name in (unicodedata.name(chr(code), "") for code in range(0x20000)) if name]
    from pydoc_data.topics import topics

    return [sentence for text in topics.values() for sentence in text.split(". ") if sentence.strip()]


@pytest.mark.parametrize("name", ["procedural", "docstrings", "foldoc", "unicode names", "manual"])
def test_the_invariant_holds_on_real_corpora(name: str) -> None:
    texts = corpus(name)
    pairs = narration_pairs(texts)
    assert all(join(*pairs.encode(text)) == normalise(text) for text in texts)
    assert len(pairs.prefixes) < len(set(map(normalise, texts)))
    assert pairs.postfixes


@pytest.mark.parametrize("name", ["procedural", "docstrings", "foldoc"])
@settings(max_examples=30, deadline=None)
@given(rng=st.randoms(use_true_random=False), min_count=st.integers(1, 4))
def test_the_invariant_holds_on_any_sample_of_lines_cut_short(name: str, rng: random.Random, min_count: int) -> None:
    lines = rng.sample(corpus(name), 60)
    texts = [" ".join(line.split()[: rng.randint(1, 6)]) for line in lines for _ in range(4)]
    pairs = narration_pairs(texts, min_count=min_count)
    assert all(join(*pairs.encode(text)) == text for text in texts)


def test_the_papers_example_and_the_literal_box_that_loses_it() -> None:
    texts = ["cut a potato", "cut a potato with a knife", "cut a tomato", "wash a cup", "wash a cup with a knife"]
    pairs = narration_pairs(texts)
    assert pairs.prefixes == ["cut a potato", "cut a tomato", "wash a cup"]
    assert pairs.postfixes == ["with a knife"]
    assert pairs.encode("cut a tomato with a knife") == ("cut a tomato", "with a knife")
    box = narration_pairs(texts, mode="algorithm1")
    assert box.prefixes == ["cut a potato with a knife", "cut a tomato", "wash a cup with a knife"]
    assert box.postfixes == ["with a knife"]
    assert "cut a potato" not in box
    with pytest.raises(InputError, match="cut a potato"):
        box.encode("cut a potato")


def test_a_word_is_no_prefix_of_a_longer_word() -> None:
    assert narration_pairs(["cut", "cutting bread", "cut bread"]).postfixes == ["bread"]


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        narration_pairs(["", "  "])
    with pytest.raises(OptionError, match="consistent"):
        narration_pairs(["a"], mode="consistant")
    with pytest.raises(OptionError, match="min_count"):
        narration_pairs(["a"], min_count=0)


def test_tags_of_annotators_go() -> None:
    assert clean("#C C picks up  the cup.") == "picks up the cup"
    assert clean("#O man X pours #unsure water") == "man X pours water"
    assert clean("turns right #3 times") == "turns right #3 times"


def test_time_grows_linearly() -> None:
    def seconds(count: int) -> float:
        rng = random.Random(0)
        texts = [f"v{rng.randrange(300)} the o{rng.randrange(2000)}" for _ in range(count)]
        texts = [text + (f" with p{rng.randrange(500)}" if rng.random() < 0.6 else "") for text in texts]
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            narration_pairs(texts)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(64_000) < 16 * seconds(8_000) + 0.05
