"""The paper's data recipe and its grades, for any writer and judge that is a callable from text to text.

``rewrite`` turns a caption into a description in a child's words and asks again until it is valid; ``grade`` lets a
judge mark a completion as a pupil's writing, 0 to 10 for creativity, meaningfulness and consistency.
"""

from __future__ import annotations

import json
import random
import re
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from gossamer.core.errors import InputError

Writer = Callable[[str], str]

LENGTHS = {"short": (20, 25), "long": (60, 70)}
MARKS = ("creativity", "meaningfulness", "consistency")
_META = re.compile(r"\b(?:caption|image|picture|description|photo|sure|here is|as an ai)\b", re.IGNORECASE)


def rewrite_prompt(caption: str, length: str, words: Collection[str] = ()) -> str:
    """What the writer is asked for a description of ``length`` "short" or "long"."""
    low, high = LENGTHS[length]
    allowed = f" Use only these words: {', '.join(sorted(words))}." if words else ""
    return (
        f"A child of three or four reads this. Write {low} to {high} words in short, plain sentences that say only "
        f"what the caption says can be seen.{allowed} Write the sentences alone.\nCaption: {caption}\nSentences:"
    )


def faults(text: str, length: str, words: Collection[str] = ()) -> list[str]:
    """What is wrong with a description: its length, words that are not allowed, or talk about itself."""
    low, high = LENGTHS[length]
    used = re.findall(r"[a-z']+", text.lower())
    found = [] if low <= len(used) <= high else [f"{len(used)} words, not {low} to {high}"]
    unknown = sorted(set(used) - {word.lower() for word in words}) if words else []
    found += [f"the word {unknown[0]!r} is not allowed"] if unknown else []
    return found + ([f"talks about itself: {match.group()!r}"] if (match := _META.search(text)) else [])


def rewrite(caption: str, writer: Writer, length: str = "short", words: Collection[str] = (), tries: int = 3) -> str:
    """A valid description; :class:`InputError` with the last fault after ``tries`` answers."""
    prompt, wrong = rewrite_prompt(caption, length, words), ["no answer"]
    for _ in range(tries):
        text = writer(prompt if wrong == ["no answer"] else f"{prompt}\nNot again: {wrong[0]}.").strip()
        wrong = faults(text, length, words)
        if not wrong:
            return text
    raise InputError(f"description of {caption!r}", must="be valid", got=wrong[0], do="use a stronger writer")


@dataclass(frozen=True)
class Grade:
    """Marks of one completion, 0 to 10."""

    creativity: float
    meaningfulness: float
    consistency: float
    reason: str = ""


def rubric(facts: str, beginning: str, completion: str) -> str:
    """The judge's task; its answer must be one JSON object."""
    return (
        "A pupil was shown a picture and given the beginning of a description, and finished it. Mark the pupil's part "
        "from 0 to 10 for creativity, meaningfulness (sense and grammar) and consistency (with the beginning and with "
        f"what is in the picture).\nIn the picture: {facts}\nBeginning: {beginning}\nPupil: {completion}\n"
        'Answer with JSON alone: {"creativity": n, "meaningfulness": n, "consistency": n, "reason": "..."}'
    )


def grade(facts: str, beginning: str, completion: str, judge: Writer, tries: int = 3) -> Grade:
    """Marks by ``judge``; asked again on a malformed answer, :class:`InputError` after ``tries``."""
    wrong = ""
    for _ in range(tries):
        answer = judge(rubric(facts, beginning, completion))
        try:
            return _read(answer)
        except (ValueError, KeyError, TypeError) as error:
            wrong = f"{error} in {answer[:80]!r}"
    raise InputError("judge", must="answer with the three marks as JSON, 0 to 10", got=wrong, do="use another judge")


def _read(answer: str) -> Grade:
    match = re.search(r"\{.*\}", answer, flags=re.DOTALL)
    values = json.loads(match.group() if match else answer)
    marks = {name: float(values[name]) for name in MARKS}
    outside = [f"{name} {mark:g}" for name, mark in marks.items() if not 0 <= mark <= 10]
    if outside:
        raise ValueError(f"{outside[0]} is not within 0 to 10")
    return Grade(**marks, reason=str(values.get("reason", "")))


def summary(grades: Sequence[Grade], *, seed: int = 0, resamples: int = 1000) -> dict[str, tuple[float, float, float]]:
    """For each mark the mean with its 95 % bootstrap interval."""
    rng = random.Random(seed)
    table = {}
    for name in MARKS:
        marks = [getattr(one, name) for one in grades]
        means = sorted(statistics.fmean(rng.choices(marks, k=len(marks))) for _ in range(resamples))
        table[name] = (statistics.fmean(marks), means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1])
    return table
