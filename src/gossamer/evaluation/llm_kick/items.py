"""Items: what can be asked, read from rows of the user's own or built from real facts and the invented world.

    {"question", "answers": [...], "context"?, "choices"?: [...], "gold"?: place of the right choice, "task"?}

A row is asked in every task that its fields carry: ``facts`` with answers, ``closed_book`` and ``open_book`` with a
context too, ``choice`` and ``letter`` with choices. ``task`` names one task instead, which is how a row of ``summary``
(context and a reference as its answer) or ``instructions`` is given. Which items are taken, and which serve as worked
examples, goes by the hash of what they say, so the order of the rows is of no importance.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.core.errors import InputError, did_you_mean
from gossamer.hub.worlds import real_facts
from gossamer.hub.worlds.facts import World
from gossamer.parts.data_files import Finding, records

ROW_TASKS = ("facts", "choice", "letter", "closed_book", "open_book")
NAMED_TASKS = ("retrieval", "summary", "instructions")
SUMMARISE = (
    "Summarize the given story in less than 150 words while preserving high coherence, consistency, fluency, and "
    "relevance."
)
_KEYS = ("question", "answers", "context", "choices", "gold", "task", "facts")
_POOL = 64  # built-in items of one task, worked examples included


@dataclasses.dataclass(frozen=True)
class Item:
    """``answers``: accepted ones, the first is the reference; ``facts``: words that a good summary holds."""

    question: str
    answers: tuple[str, ...] = ()
    context: str = ""
    choices: tuple[str, ...] = ()
    gold: int = -1
    facts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.astuple(self), ensure_ascii=False)


def read_items(source: str | Path | Sequence[Mapping[str, Any]]) -> list[Item]:
    """Items of a file or of rows; :class:`InputError` at the first row that cannot be asked."""
    items = []
    for record in records(source):
        if isinstance(record, Finding):
            raise record.error()
        items.append(_item(record.value, f"{record.file} row {record.row}"))
    if not items:
        raise InputError("evaluation data", must="hold rows", got="none", do="give rows of question and answers")
    return items


def ordered(items: Sequence[Item], seed: int, salt: str) -> list[Item]:
    """The items once each, in an order that is drawn by ``seed`` and does not depend on the one given."""
    distinct = {item.key: item for item in items}
    draw = functools.partial(_digest, f"{seed} {salt}")
    return [distinct[key] for key in sorted(distinct, key=draw)]


@functools.cache
def built_in(seed: int) -> tuple[Item, ...]:
    """Real facts with a passage and choices, open-book questions on invented people, stories, instructions."""
    draw = random.Random(f"llm_kick {seed}")
    world = World(people=200, seed=seed)
    invented = [
        Item(row["question"], tuple(row["answers"]), row["context"], tasks=("retrieval",))
        for row in world.rows(_POOL, seed)
    ]
    stories = [
        Item(SUMMARISE, (story["summary"],), story["text"], facts=tuple(story["facts"]), tasks=("summary",))
        for story in world.stories(_POOL, seed)
    ]
    return (*_real(draw), *invented, *stories, *_instructions(draw))


def _real(draw: random.Random) -> list[Item]:
    """Each fact with three wrong choices of its kind, and a passage of facts half of which are of its kind."""
    facts = real_facts.facts()
    items = []
    for fact in facts:
        alike = [other for other in facts if other.kind == fact.kind and other.answers[0] != fact.answers[0]]
        unlike = [other for other in facts if other.kind != fact.kind]
        wrong = draw.sample(alike, 3)
        choices = draw.sample([fact.answers[0], *(other.answers[0] for other in wrong)], 4)
        told = draw.sample([fact, *wrong, *draw.sample(unlike, 3)], 7)
        passage, gold = " ".join(one.statement for one in told), choices.index(fact.answers[0])
        items.append(Item(fact.question, fact.answers, passage, tuple(choices), gold, tasks=ROW_TASKS))
    return items


def _instructions(draw: random.Random) -> list[Item]:
    """Instructions with exactly one right reply."""
    words = sorted({fact.answers[0] for fact in real_facts.facts() if fact.kind == "opposite"})
    items = []
    for number in range(_POOL):
        chosen = draw.sample(words, 4)
        listed, times = ", ".join(chosen), draw.randint(2, 4)
        asked, reply = (
            (f'Write the word "{chosen[0]}" {times} times, separated by commas.', ", ".join([chosen[0]] * times)),
            (f"Write these words in reverse order: {listed}.", ", ".join(reversed(chosen))),
            (f"Write these words in capital letters: {listed}.", listed.upper()),
            (f"Sort these words alphabetically: {listed}.", ", ".join(sorted(chosen))),
            (f"Write only the last of these words: {listed}.", chosen[-1]),
            (f'Write only the words that come before "{chosen[2]}": {listed}.', ", ".join(chosen[:2])),
        )[number % 6]
        items.append(Item(asked, (reply,), tasks=("instructions",)))
    return list(dict.fromkeys(items))


def _item(row: Any, where: str) -> Item:
    if not isinstance(row, Mapping):
        raise InputError(where, must="be a mapping with the keys question and answers", got=type(row).__name__)
    for key in row:
        if key not in _KEYS:
            raise InputError(
                f"{where}, {key}", must="be a key of a row", got=repr(key), do=did_you_mean(str(key), _KEYS)
            )
    answers, choices = _texts(row, "answers", where), _texts(row, "choices", where)
    question, context = _text(row, "question", where), _text(row, "context", where)
    gold = row.get("gold", -1)
    if choices and not (isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(choices)):
        raise InputError(f"{where}, gold", must=f"be from 0 to {len(choices) - 1}", got=repr(row.get("gold")))
    if choices and not 2 <= len(choices) <= 26:
        raise InputError(f"{where}, choices", must="be 2 to 26 texts", got=len(choices))
    if not question and row.get("task") != "summary":
        raise InputError(f"{where}, question", must="be a text", got=repr(row.get("question")))
    if not answers and not choices:
        raise InputError(f"{where}, answers", must="hold at least one text", got=repr(row.get("answers")))
    item = Item(question or SUMMARISE, answers, context, choices, gold if choices else -1, _texts(row, "facts", where))
    return dataclasses.replace(item, tasks=_tasks(item, row.get("task"), where))


def _tasks(item: Item, named: Any, where: str) -> tuple[str, ...]:
    """The tasks that the fields carry, or the one that is named where they carry it."""
    reads, written = bool(item.answers), bool(item.answers and item.context)
    carried = {
        "facts": reads, "choice": bool(item.choices), "letter": bool(item.choices), "closed_book": written,
        "open_book": written, "retrieval": written, "summary": written, "instructions": reads,
    }  # fmt: skip
    if named is None:
        return tuple(task for task in ROW_TASKS if carried[task])
    carried["closed_book"] = reads  # asked alone it needs no text to be compared with
    if named not in carried:
        raise InputError(f"{where}, task", must="be a task", got=repr(named), do=did_you_mean(str(named), carried))
    if not carried[named]:
        raise InputError(f"{where}, task", must="have the fields of its task", got=f"{named} without them")
    return (str(named),)


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key, "")
    if not isinstance(value, str):
        raise InputError(f"{where}, {key}", must="be a text", got=repr(value))
    return value.strip()


def _texts(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = row.get(key, [])
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) and text.strip() for text in value):
        raise InputError(f"{where}, {key}", must="be a list of non-empty texts", got=repr(value))
    return tuple(text.strip() for text in value)


def _digest(salt: str, key: str) -> str:
    return hashlib.sha256(f"{salt} {key}".encode()).hexdigest()
