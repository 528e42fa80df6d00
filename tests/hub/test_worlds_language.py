"""Captions and descriptions state only what is so; the reader gets the same facts back, from any text."""

from __future__ import annotations

import itertools
import random

import pytest

from gossamer.core.errors import OptionError
from gossamer.hub.worlds.language import LENGTHS, captions, check_facts, describe, parse, vocabulary
from gossamer.hub.worlds.lexicon import FILLERS, LORE, TEMPLATES
from gossamer.hub.worlds.reading import Fact, _patterns
from gossamer.hub.worlds.scene import KINDS, Scene, Thing, sample_scene

BALL = Thing("ball", "red", "big", (0, 0))
CAT = Thing("cat", "blue", "small", (1, 1), action="sleeping")
BOX = Thing("box", "red", "small", (2, 2), glyph="7")
SCENE = Scene((BALL, CAT, BOX), "beach")


def _scenes(count: int) -> list[Scene]:
    rng = random.Random(11)
    return [
        sample_scene(
            rng, things=(1, 4) if index % 3 else (5, 9), same=1 + index % 3, grid=3 + index % 2,
            glyphs=0.4 * (1 - index % 2), actions=0.5,
        )
        for index in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("length", LENGTHS)
def test_what_is_described_is_so_and_is_read_back(length: str) -> None:
    low, high = LENGTHS[length]
    rng = random.Random(0)
    for scene in _scenes(150):
        text = describe(scene, length, rng)
        parsed = parse(text)
        checked = check_facts(parsed, scene)
        assert low <= len(text.split()) <= high
        assert all(parsed.accepted), text
        assert not checked.false, (text, checked.false)
        assert checked.true
        assert text == " ".join(parsed.sentences)


def test_captions_are_so_and_differ() -> None:
    rng = random.Random(0)
    for scene in _scenes(60):
        written = captions(scene, rng, 4)
        assert len(set(written)) == 4
        for caption in written:
            parsed = parse(caption)
            checked = check_facts(parsed, scene)
            assert all(parsed.accepted), caption
            assert not checked.false, (caption, checked.false)
            assert {fact.value for fact in checked.true if fact.aspect == "kind"} == {t.kind for t in scene.things}


def test_a_description_of_another_scene_is_mostly_false() -> None:
    rng = random.Random(0)
    scenes = _scenes(80)
    share = []
    for scene, other in itertools.pairwise(scenes):
        checked = check_facts(parse(describe(scene, "long", rng)), other)
        share.append(len(checked.true) / (len(checked.true) + len(checked.false)))
    assert sum(share) / len(share) < 0.35


def test_every_template_is_in_use_and_reads_back() -> None:
    rng = random.Random(5)
    texts = [describe(scene, length, rng) for scene in _scenes(400) for length in LENGTHS]
    written = {sentence.lower().rstrip(".") for text in texts for sentence in parse(text).sentences}
    unused = [
        pattern.pattern
        for name, _, pattern in _patterns()
        if name != "caption" and not any(pattern.fullmatch(sentence) for sentence in written)
    ]
    assert unused == []
    assert all(parse(sentence).accepted == (True,) for sentence in [*FILLERS, *(s for ss in LORE.values() for s in ss)])


def test_the_vocabulary_is_a_childs() -> None:
    words = set(vocabulary())
    assert 300 <= len(words) <= 600
    rng = random.Random(2)
    for scene in _scenes(40):
        text = " ".join([describe(scene, "long", rng), *captions(scene, rng)]).lower()
        used = {word.strip(".,?") for word in text.split()}
        assert {word for word in used if word.isalpha()} <= words | set("acefhjklnprtuvxy")
    assert set(LORE) == set(KINDS)
    assert len({template for group in TEMPLATES.values() for template in group}) > 70


def _aspects(facts: tuple[Fact, ...]) -> set[tuple[str, str]]:
    return {(fact.aspect, fact.value) for fact in facts}


@pytest.mark.parametrize(
    ("text", "true", "false"),
    [
        ("I see a big red ball.", {("kind", "ball"), ("colour", "red"), ("size", "big")}, set()),
        ("I see a big blue ball.", {("kind", "ball"), ("size", "big")}, {("colour", "blue")}),
        ("There is a green cat. It is small.", {("kind", "cat"), ("size", "small")}, {("colour", "green")}),
        ("I see a fish. It is red.", set(), {("kind", "fish"), ("colour", "red")}),
        ("The ball is in the middle.", {("kind", "ball")}, {("place", "middle")}),
        ("There are two red things.", {("colour", "red"), ("count", "2")}, set()),
        ("There are two balls.", {("kind", "ball")}, {("count", "2")}),
        ("I count three things.", {("count", "3")}, set()),
        ("I see no car. I see no cat.", {("absent", "car")}, {("absent", "cat")}),
        ("We are at the beach. Here we see the snow.", {("background", "beach")}, {("background", "snow")}),
        ("A cat likes milk. A bird can fly.", {("kind", "cat")}, {("kind", "bird")}),
        ("The box has the number 7 on it.", {("kind", "box"), ("glyph", "7")}, set()),
        ("The letter A is on the box.", {("kind", "box")}, {("glyph", "A")}),
        ("The cat is singing.", {("kind", "cat")}, {("action", "singing")}),
        ("The ball is left of the cat.", {("kind", "ball"), ("kind", "cat"), ("relation", "left of")}, set()),
        ("The ball is under the cat.", {("kind", "ball"), ("kind", "cat")}, {("relation", "below")}),
    ],
)
def test_facts_are_judged_one_by_one(text: str, true: set[tuple[str, str]], false: set[tuple[str, str]]) -> None:
    parsed = parse(text)
    checked = check_facts(parsed, SCENE)
    assert all(parsed.accepted)
    assert (_aspects(checked.true), _aspects(checked.false)) == (true, false)


@pytest.mark.parametrize(
    ("sentence", "facts"),
    [
        ("I see a apple.", {("kind", "apple")}),
        ("I see two ball.", {("kind", "ball"), ("count", "2")}),
        ("There is is a red ball", {("kind", "ball"), ("colour", "red")}),
        ("Ball the red is in.", set()),
        ("A zebra is here.", set()),
    ],
)
def test_broken_sentences_are_not_accepted_but_their_nouns_count(sentence: str, facts: set[tuple[str, str]]) -> None:
    parsed = parse(sentence)
    assert parsed.accepted == (False,)
    assert _aspects(parsed.facts) == facts


def test_saying_a_thing_twice_needs_two_of_them() -> None:
    checked = check_facts(parse("I see a red ball and a red ball."), SCENE)
    assert _aspects(checked.true) == _aspects(checked.false) == {("kind", "ball"), ("colour", "red")}
    again = check_facts(parse("I see a red ball. The red ball is at the top left. The ball is big."), SCENE)
    assert not again.false
    assert len({fact.entity for fact in again.true}) == 1


def test_things_are_paired_so_that_most_is_true() -> None:
    scene = Scene((Thing("cat", "red", "big", (0, 0)), Thing("cat", "blue", "big", (2, 2))))
    assert not check_facts(parse("I see a big cat and a red cat."), scene).false
    assert not check_facts(parse("Look, a cat. It is at the bottom right. I see a red cat."), scene).false


def test_recall_is_the_share_of_the_scene_that_was_told() -> None:
    assert check_facts(parse("How nice."), SCENE).recalled == 0.0
    assert check_facts(parse("We are at the beach. I see a ball."), SCENE).recalled == pytest.approx(2 / 13)
    whole = (
        "We are at the beach. There is a big red ball at the top left. There is a small blue cat in the middle. "
        "Look, a little red box. It is at the bottom right."
    )
    assert check_facts(parse(whole), SCENE).recalled == 1.0
    assert check_facts(parse("I see two red things."), SCENE).recalled == pytest.approx(2 / 13)


def test_texts_of_any_sort_are_read() -> None:
    assert parse("").sentences == ()
    endless = parse("a red ball and " * 400)
    assert endless.accepted == (False,)
    assert len(endless.entities) == 400
    with pytest.raises(OptionError, match="did you mean 'short'"):
        describe(SCENE, "shrot")
