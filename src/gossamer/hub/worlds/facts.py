"""Invented people: facts that no pretrained model can know, stated in several wordings and asked for.

Each person has a value of every relation, drawn evenly and on its own, so nothing about one fact follows from another.

    world = World(people=400, seed=0)
    world.statements(fact)        every wording of one fact
    world.rows(20, seed=1)        open-book questions: a passage of facts about several people, one of them asked for
    world.stories(20, seed=1)     accounts of one event, each with a one-sentence summary and the facts in it

A passage names the relation asked for with other people and other values too, so the answer cannot be found without
reading who is meant.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.core.errors import OptionError

FIRST = (
    "Adrel", "Bomir", "Celva", "Dorin", "Elka", "Farro", "Gilda", "Hesper", "Ivo", "Jorun", "Kelda", "Lomas", "Mirel",
    "Noska", "Orlan", "Petra", "Quill", "Runa", "Sorel", "Tamsin", "Ulric", "Vesna", "Wendel", "Xanto", "Yorin",
    "Zelda",
)  # fmt: skip
LAST = (
    "Abbot", "Birch", "Crane", "Dunmore", "Eldridge", "Finch", "Garrow", "Holt", "Ingram", "Jarvis", "Kestrel", "Larch",
    "Marlow", "Nettle", "Oakley", "Pike", "Quarry", "Rook", "Sparrow", "Thorne", "Underhill", "Vale", "Wick", "Yarrow",
)  # fmt: skip
VALUES: dict[str, tuple[str, ...]] = {
    "town": ("Brenwick", "Calder", "Dunholm", "Eastmere", "Farrow", "Glenby", "Harwell", "Inverby", "Kirkdale",
             "Lowmoor", "Marsden", "Northam", "Oxley", "Penrith", "Ravens", "Stanhope"),
    "job": ("baker", "carpenter", "dentist", "farmer", "gardener", "judge", "lawyer", "miller", "nurse", "painter",
            "pilot", "plumber", "sailor", "tailor", "teacher", "weaver"),
    "pet": ("cat", "crow", "dog", "donkey", "duck", "ferret", "fox", "goat", "hen", "horse", "lizard", "mouse", "owl",
            "parrot", "rabbit", "snake"),
    "dish": ("beans", "bread", "cake", "cheese", "curry", "eggs", "fish", "honey", "noodles", "olives", "onions",
             "pears", "pie", "rice", "soup", "stew"),
}  # fmt: skip
STATEMENTS: dict[str, tuple[str, ...]] = {
    "town": (
        "{who} lives in {value}.", "The home of {who} is in {value}.", "{value} is where {who} lives.",
        "You can find {who} in {value}.", "{who} has a house in {value}.", "In {value} lives {who}.",
    ),
    "job": (
        "{who} works as a {value}.", "The work of {who} is that of a {value}.", "By trade {who} is a {value}.",
        "{who} earns money as a {value}.", "They know {who} as a {value}.", "A {value} by trade is {who}.",
    ),
    "pet": (
        "{who} keeps a {value}.", "The pet of {who} is a {value}.", "A {value} belongs to {who}.",
        "{who} owns a {value}.", "At home {who} has a {value}.", "{who} takes care of a {value}.",
    ),
    "dish": (
        "{who} likes to eat {value}.", "The favourite food of {who} is {value}.", "{who} loves {value}.",
        "For dinner {who} wants {value}.", "Nothing pleases {who} like {value}.", "{who} would eat {value} all day.",
    ),
}  # fmt: skip
QUESTIONS = {
    "town": "Where does {who} live?",
    "job": "What is the work of {who}?",
    "pet": "Which pet does {who} keep?",
    "dish": "Which food does {who} like?",
}
_PLACES = ("mill", "school", "harbour", "market", "library", "bridge", "church", "station")
_TROUBLES = (("fire", "burnt"), ("flood", "ruined"), ("storm", "damaged"), ("theft", "emptied"))
_HELPERS = ("neighbours", "soldiers", "students", "sailors", "farmers", "nuns")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")


@dataclass(frozen=True)
class Fact:
    """``who`` has ``value`` as its ``relation`` (a key of :data:`VALUES`)."""

    who: str
    relation: str
    value: str


NAMES = tuple(f"{first} {last}" for first, last in itertools.product(FIRST, LAST))


class World:
    """``people`` invented people, drawn among ``names``, and their facts: a function of ``seed`` alone."""

    def __init__(self, people: int = 400, seed: int = 0, names: Sequence[str] = NAMES) -> None:
        if not 8 <= people <= len(names):
            raise OptionError("World.people", must=f"be from 8 to {len(names)}", got=people)
        draw = random.Random(f"world {seed}")
        self.people = draw.sample(names, people)
        self.facts = [Fact(who, kind, draw.choice(values)) for who in self.people for kind, values in VALUES.items()]

    def statements(self, fact: Fact) -> list[str]:
        """The fact in every wording."""
        return [text.format(who=fact.who, value=fact.value) for text in STATEMENTS[fact.relation]]

    def question(self, fact: Fact) -> str:
        return QUESTIONS[fact.relation].format(who=fact.who)

    def told(self, fact: Fact, draw: random.Random, sentences: int = 6) -> list[Fact]:
        """What a passage says, in random order: the fact, and others of which half have its relation."""
        alike = [other for other in self.facts if other.relation == fact.relation and other.value != fact.value]
        unlike = [other for other in self.facts if other.relation != fact.relation]
        half = (sentences - 1) // 2
        told = [fact, *draw.sample(alike, half), *draw.sample(unlike, sentences - 1 - half)]
        draw.shuffle(told)
        return told

    def passage(self, told: Sequence[Fact], draw: random.Random) -> str:
        """One sentence a fact, in any of its wordings."""
        return " ".join(draw.choice(self.statements(one)) for one in told)

    def rows(self, count: int, seed: int = 0, sentences: int = 6) -> list[dict[str, Any]]:
        """Questions with ``answers``, ``context`` and four ``choices`` of which ``gold`` is the place of the answer."""
        draw = random.Random(f"rows {seed}")
        rows = []
        for fact in draw.sample(self.facts, min(count, len(self.facts))):
            others = draw.sample([value for value in VALUES[fact.relation] if value != fact.value], 3)
            choices = draw.sample([fact.value, *others], 4)
            rows.append(
                {
                    "question": self.question(fact),
                    "answers": [fact.value],
                    "context": self.passage(self.told(fact, draw, sentences), draw),
                    "choices": choices,
                    "gold": choices.index(fact.value),
                }
            )
        return rows

    def stories(self, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """``text``, one-sentence ``summary``, and ``facts``: the words that a summary has to hold."""
        draw = random.Random(f"stories {seed}")
        return [self._story(draw) for _ in range(count)]

    def _story(self, draw: random.Random) -> dict[str, Any]:
        (who, other), town = draw.sample(self.people, 2), draw.choice(VALUES["town"])
        place, (trouble, verb), day = draw.choice(_PLACES), draw.choice(_TROUBLES), draw.choice(_DAYS)
        helpers, count = draw.choice(_HELPERS), draw.randint(12, 96)
        text = (
            f"On {day} a {trouble} {verb} the old {place} of {town}. {who} saw it first and ran to tell the mayor. "
            f"It had been a quiet week until then, and many people were at work. {count} {helpers} came to help, and "
            f"{other} brought bread and tea for all of them. Nobody was hurt. By the evening the {place} was safe "
            f"again, and the mayor of {town} thanked {who} in front of everyone."
        )
        summary = f"A {trouble} {verb} the {place} of {town} on {day}, and {count} {helpers} came to help."
        return {"text": text, "summary": summary, "facts": [trouble, place, town, day, str(count), helpers]}
