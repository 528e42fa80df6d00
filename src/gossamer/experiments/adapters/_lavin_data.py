"""Rows of the LaVIN experiment: questions to scenes, to a text, to both, and instructions without an image.

A row is ``{"group", "instruction", "answer", "features"}``; ``features`` [n, width] are the class tokens of its picture
or None. Groups: ``image`` (the picture answers), ``context`` (the text answers, the picture has nothing to do with it),
``both`` (the text says what the thing in the picture stands for), ``text`` (no picture). Scenes of one split are in no
other; instructions without a picture are split by the hash of their words.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GROUPS = ("image", "context", "both", "text")
SHARES = {"image": 0.36, "context": 0.12, "both": 0.12, "text": 0.4}
KINDS = ("apple", "ball", "bird", "boat", "car", "cat", "fish", "flower", "house", "star", "tree", "umbrella")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
NAMES = ("Ann", "Ben", "Eve", "Max", "Sue", "Tom")
WORDS = (
    "apple", "bread", "chair", "cloud", "door", "field", "glass", "green", "hand", "heart", "horse", "house", "kite",
    "lake", "leaf", "light", "milk", "moon", "night", "paper", "plant", "rain", "river", "road", "salt", "ship",
    "snow", "star", "stone", "sugar", "table", "train", "tree", "voice", "wall", "water", "wind", "wood", "world",
)  # fmt: skip
SIZE = 112
# what a pretrained model can go on with before it is tuned, and should afterwards
CLOZE = (
    ("The capital of France is", " Paris"), ("The capital of Italy is", " Rome"),
    ("The capital of Germany is", " Berlin"), ("The capital of Japan is", " Tokyo"),
    ("The capital of Spain is", " Madrid"), ("The capital of Russia is", " Moscow"),
    ("The capital of England is", " London"), ("The capital of China is", " Beijing"),
    ("The capital of Austria is", " Vienna"), ("The capital of Greece is", " Athens"),
    ("The opposite of hot is", " cold"), ("The opposite of big is", " small"), ("The opposite of up is", " down"),
    ("The opposite of left is", " right"), ("The opposite of black is", " white"), ("The opposite of old is", " young"),
    ("One, two, three, four,", " five"), ("Monday, Tuesday, Wednesday,", " Thursday"),
    ("January, February, March,", " April"), ("A, B, C, D,", " E"), ("2, 4, 6, 8,", " 10"), ("10, 20, 30, 40,", " 50"),
    ("Grass is green and the sky is", " blue"), ("Snow is white and coal is", " black"),
    ("red, orange, yellow, green,", " blue"), ("north, south, east and", " west"),
    ("spring, summer, autumn and", " winter"), ("king and queen, prince and", " princess"),
    ("man and woman, boy and", " girl"), ("father and mother, brother and", " sister"),
    ("salt and", " pepper"), ("black and", " white"), ("Once upon a", " time"), ("Ladies and", " gentlemen"),
    ("The sun rises in the", " east"), ("Water freezes at zero degrees", " Celsius"),
    ("The United States of", " America"), ("The author of Romeo and Juliet is William", " Shakespeare"),
    ("Albert", " Einstein"), ("The Statue of Liberty is in New", " York"), ("An hour has sixty", " minutes"),
    ("A week has seven", " days"), ("Bees make", " honey"), ("A cow says", " moo"), ("Cats chase", " mice"),
    ("The Earth goes around the", " sun"), ("Fish live in", " water"), ("We see with our", " eyes"),
)  # fmt: skip


def rows(split: str, count: int, tables: Path, eyes: Any) -> list[Row]:
    """``count`` rows of a split, groups mixed; ``eyes(images) -> [i, n, width]``, kept in the folder ``tables``."""
    rng = random.Random(f"lavin {split}")
    numbers = {group: round(SHARES[group] * count) for group in GROUPS}
    seen = _asked(split, numbers, rng)
    features = _features(split, [still for _, _, still in seen], tables, eyes)
    made: list[Row] = [
        {"group": group, "instruction": question[0], "answer": question[1], "features": picture}
        for (group, question, _), picture in zip(seen, features, strict=True)
    ]
    for question, answer in _instructions(split, numbers["text"], rng):
        made.append({"group": "text", "instruction": question, "answer": answer, "features": None})
    rng.shuffle(made)
    return made


def prose(count: int) -> list[str]:
    """Paragraphs of the held-out split of the prose corpus."""
    from gossamer.hub.corpora import load_corpus

    return [row["text"] for row in load_corpus("english_prose", split="test", limit=count).rows]


def _asked(split: str, numbers: dict[str, int], rng: random.Random) -> list[tuple[str, tuple[str, str], Any]]:
    """(group, (question, answer), still) for each row with a picture."""
    from gossamer.hub.worlds.stills import still_scenes

    groups = [group for group in GROUPS[:-1] for _ in range(numbers[group])]
    stills = still_scenes(
        split, len(groups), things=(1, 3), kinds=KINDS, colours=COLOURS, glyphs=0.0, actions=0.0, seed=3
    )
    made = []
    for group, still in zip(groups, stills, strict=True):
        asked = [question for question in still.questions if question.kind != "glyph"]
        chosen = rng.choice(asked)
        if group == "context":
            pair = _told(rng)
        elif group == "both":
            pair = _stands_for(still.scene, rng)
        else:
            pair = (chosen.text, chosen.answer)
        made.append((group, pair, still))
    return made


def _told(rng: random.Random) -> tuple[str, str]:
    """A question that its own text answers."""
    names, kinds, colours = rng.sample(NAMES, 2), rng.sample(KINDS, 2), rng.sample(COLOURS, 2)
    facts = [f"The {kind} of {name} is {colour}." for name, kind, colour in zip(names, kinds, colours, strict=True)]
    place = rng.randrange(2)
    return f"{' '.join(facts)} What colour is the {kinds[place]} of {names[place]}?", colours[place]


def _stands_for(scene: Any, rng: random.Random) -> tuple[str, str]:
    """Who likes the first thing's colour, or owns it: the text lists the names, the picture says which."""
    thing = scene.things[0]
    options: tuple[str, ...] = COLOURS
    if all(other.colour == thing.colour for other in scene.things):
        wanted, verb = thing.colour, "likes {}"
        question = "Who likes what is in the picture?"
    else:
        options = tuple(kind for kind in KINDS if not scene.count(kind))
        wanted, verb = thing.kind, "looks for the {}"
        question = "Who finds it in the picture?"
    listed = rng.sample([option for option in options if option != wanted], 2)
    listed.insert(rng.randrange(3), wanted)
    names = rng.sample(NAMES, 3)
    facts = ", ".join(f"{name} {verb.format(option)}" for name, option in zip(names, listed, strict=True))
    return f"{facts}. {question}", names[listed.index(wanted)]


def _instructions(split: str, count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Different instructions without a picture, those of this split only."""
    makers = (_sum, _copied, _reversed, _owner)
    known: set[str] = set()
    # by turns of trying: there are fewer sums than rows to make
    for make in itertools.cycle(makers):
        if len(known) == count:
            return
        question, answer = make(rng)
        if question not in known and _split_of(question) == split:
            known.add(question)
            yield question, answer


def _split_of(text: str) -> str:
    share = hashlib.sha256(text.encode()).digest()[0] % 4
    return {0: "test", 1: "validation"}.get(share, "train")


def _sum(rng: random.Random) -> tuple[str, str]:
    from gossamer.hub.worlds.lexicon import NUMBERS

    first, second = rng.randint(0, 16), rng.randint(0, 16)
    if first + second <= 16 and rng.random() < 0.5:
        return f"What is {NUMBERS[first]} plus {NUMBERS[second]}?", NUMBERS[first + second]
    low, high = sorted((first, second))
    return f"What is {NUMBERS[high]} minus {NUMBERS[low]}?", NUMBERS[high - low]


def _copied(rng: random.Random) -> tuple[str, str]:
    words = " ".join(rng.sample(WORDS, 3))
    return f"Repeat these words: {words}", words


def _reversed(rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(WORDS, 2)
    return f"Say these words in reverse order: {first} {second}", f"{second} {first}"


def _owner(rng: random.Random) -> tuple[str, str]:
    names, kinds = rng.sample(NAMES, 3), rng.sample(KINDS, 3)
    facts = " ".join(f"{name} has a {kind}." for name, kind in zip(names, kinds, strict=True))
    place = rng.randrange(3)
    return f"{facts} Who has the {kinds[place]}?", names[place]


def _features(split: str, stills: list[Any], tables: Path, eyes: Any) -> list[Any]:
    """Class tokens of the stills' pictures, computed once."""
    from safetensors.torch import load_file, save_file

    from gossamer.core.paths import atomic_file

    key = hashlib.sha256(" ".join(still.scene.key() + still.key for still in stills).encode()).hexdigest()[:12]
    path = tables / f"{split}-{key}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as whole:
            save_file({"features": eyes([still.image(SIZE) for still in stills])}, whole)
    return list(load_file(path)["features"])
