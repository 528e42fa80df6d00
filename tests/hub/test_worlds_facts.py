"""The invented town: every answer can be read from its passage and from nothing else in it; real facts are facts."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from gossamer.core.errors import OptionError
from gossamer.hub.worlds import real_facts
from gossamer.hub.worlds.facts import NAMES, STATEMENTS, VALUES, World


def test_a_world_is_a_function_of_its_seed_and_names() -> None:
    assert World(50, 1).facts == World(50, 1).facts != World(50, 2).facts
    assert set(World(10, 0, NAMES[:12]).people) <= set(NAMES[:12])
    with pytest.raises(OptionError, match="from 8 to"):
        World(len(NAMES) + 1)


def test_every_fact_is_said_in_every_wording_with_name_and_value() -> None:
    world = World(20)
    assert len(world.facts) == 20 * len(VALUES)
    for fact in world.facts:
        found = world.statements(fact)
        assert len(set(found)) == len(STATEMENTS[fact.relation])
        assert all(fact.who in text and fact.value in text for text in found)
    assert len(set(map(len, STATEMENTS.values()))) == 1


def test_passages_hold_the_answer_once_beside_others_of_its_relation() -> None:
    world, draw = World(60), random.Random(0)
    for fact in world.facts[:40]:
        told = world.told(fact, draw)
        assert len(told) == 6
        alike = [one for one in told if one.relation == fact.relation]
        assert len(alike) == 3
        assert [one for one in alike if one.value == fact.value] == [fact]
    for row in world.rows(40, seed=2):
        assert row["answers"][0] in row["context"]
        assert row["choices"][row["gold"]] == row["answers"][0]
        assert len(set(row["choices"])) == 4


def test_values_are_even_and_gold_places_too() -> None:
    world = World(600)
    towns = Counter(fact.value for fact in world.facts if fact.relation == "town")
    assert len(towns) == len(VALUES["town"])
    assert max(towns.values()) < 3 * min(towns.values())
    places = Counter(row["gold"] for row in world.rows(400))
    assert set(places) == {0, 1, 2, 3}
    assert min(places.values()) > 60


def test_stories_and_summaries_hold_their_facts() -> None:
    for story in World(20).stories(20):
        assert all(fact in story["text"] and fact in story["summary"] for fact in story["facts"])
        assert len(story["summary"]) < len(story["text"]) / 3


def test_real_facts_are_distinct_and_have_enough_of_a_kind_for_choices() -> None:
    found = real_facts.facts()
    assert len({fact.question for fact in found}) == len(found) > 120
    for kind, count in Counter(fact.kind for fact in found).items():
        assert count >= 4, kind
        answers = {fact.answers[0] for fact in found if fact.kind == kind}
        assert len(answers) >= 4
    assert all(fact.answers[0] in fact.statement for fact in found)
    known = {fact.question: fact.answers[0] for fact in found}
    assert known["What is the capital of France?"] == "Paris"
    assert known["Which day comes after Sunday?"] == "Monday"
    assert known["What does the HTTP status 404 mean?"] == "Not Found"
