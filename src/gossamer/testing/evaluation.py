"""Laws of evaluations: 1 for the perfect, chance for who guesses and marked so, and no order of items.

A scripted subject that knows every request stands in for a model: it is asked as a model is, and costs nothing.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gossamer.core.bundle import Bundle
from gossamer.core.card import Entry
from gossamer.core.errors import UsageError
from gossamer.kinds.evaluation import Request, Score, Scores
from gossamer.testing.bench import Bench
from gossamer.testing.comparison import differs
from gossamer.testing.running import law
from gossamer.testing.universal import base_options, build

KEPT = ("model", "tokenizer", "data")
QUICK = {"num_examples": 3, "texts": 2, "shots": 1, "new_tokens": 4, "summary_tokens": 6}
DEVIATIONS = 4.0


def subject(system: Any, bench: Bench) -> dict[str, Any]:
    return {"model": bench.model(), "tokenizer": bench.tokenizer(), "data": bench.questions()}


def outcome(system: Any, subject: dict[str, Any]) -> Any:
    return system.evaluate(Bundle(subject["model"], subject["tokenizer"]), subject["data"]).as_dict()


def bad_inputs(system: Any, bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    bundle = bench.bundle()
    yield "no rows", lambda: system.evaluate(bundle, [])
    yield "what are no rows", lambda: system.evaluate(bundle, [7])
    yield "a file that is not there", lambda: system.evaluate(bundle, "no/such/file.jsonl")
    yield "a row with a key that is misspelt", lambda: system.evaluate(bundle, [{"questoin": "Who?", "answers": ["I"]}])
    yield "a row without an answer", lambda: system.evaluate(bundle, [{"question": "Who?"}])
    yield "a model that does not generate", lambda: system.evaluate(Bundle(Bench("bert").model(), bundle.processor))
    yield "a model without a tokenizer", lambda: system.evaluate(Bundle(bundle.model, None))


@law(once=True)
def check_one_for_perfect(entry: Entry, bench: Bench) -> None:
    """Who gives each request its reply has 1 in every task that is marked, and no task is marked as uninformative."""
    found = _scripted(entry, bench, lambda asked, others: asked.reply)
    assert found.tasks, "there is no task"
    wrong = {task: one.value for task, one in found.tasks.items() if one.chance is not None and one.value != 1}
    assert not wrong, f"right in everything, it is given {wrong}"
    assert not found.uninformative(), f"right in everything, it is told it is at chance in {found.uninformative()}"


@law(once=True)
def check_chance_for_chance(entry: Entry, bench: Bench) -> None:
    """Who answers with the reply to any request of the task scores what it is told that chance would."""
    draw = random.Random(0)
    found = _scripted(entry, bench, lambda asked, others: _guess(asked, others, draw))
    for task, one in _marked(found).items():
        error = statistics.stdev(one.items) / math.sqrt(one.n) + 1 / one.n
        gap = abs(one.value - float(one.chance or 0.0))
        assert gap <= DEVIATIONS * error, f"{task}: a guess scores {one.value:.3f}, chance is given as {one.chance:.3f}"


@law(once=True)
def check_uninformative_tasks_are_marked(entry: Entry, bench: Bench) -> None:
    """Who answers every request alike, or with the reply to another one, is marked as at chance."""
    for what, reply in (
        ("says nothing", lambda asked, others: "0" if asked.choices else ""),
        ("answers the next request", lambda asked, others: _next(asked, others)),
    ):
        found = _scripted(entry, bench, reply)
        missed = [task for task in _marked(found) if task not in found.uninformative()]
        assert not missed, f"who {what} is not marked as at chance in {missed}"


@law(once=True)
def check_order_of_items_does_not_matter(entry: Entry, bench: Bench) -> None:
    """The same rows in another order give the same scores, items and prompts."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    forward, backward = (outcome(system, {**given, "data": rows}) for rows in (given["data"], given["data"][::-1]))
    difference = differs(forward, backward)
    assert not difference, f"in another order it gives something else: {difference}"


@law(once=True)
def check_scores_are_whole(entry: Entry, bench: Bench) -> None:
    """Each value lies in its interval and is the mean of its marks; all of it is plain JSON."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    scores: Scores = system.evaluate(Bundle(given["model"], given["tokenizer"]), given["data"])
    for task, one in scores.tasks.items():
        assert one.low <= one.value <= one.high, f"{task}: {one.value} lies outside [{one.low}, {one.high}]"
        assert one.n == len(one.items), f"{task}: {one.n} items, {len(one.items)} marks"
        mean = math.fsum(one.items) / one.n
        assert one.better == "lower" or math.isclose(one.value, mean), f"{task}: {one.value} is not the mean {mean}"
    found = scores.as_dict()
    difference = differs(json.loads(json.dumps(found, allow_nan=False)), found)
    assert not difference, f"as_dict is not the same after JSON: {difference}"


class _Scripted:
    """Answers by a table from prompt and choices to output."""

    room = None

    def __init__(self) -> None:
        self.table: dict[tuple[str, tuple[str, ...]], str] = {}

    def length(self, text: str) -> int:
        return len(text.split())

    def answers(self, prompts: Sequence[str], new_tokens: int, line: bool) -> list[str]:
        return [self.table[prompt, ()] for prompt in prompts]

    def logprobs(self, prompt: str, choices: Sequence[str]) -> list[float]:
        best = int(self.table[prompt, tuple(choices)])
        return [0.0 if place == best else -1.0 - place for place in range(len(choices))]

    def nats(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        return [(2.0 * len(text), len(text)) for text in texts]


def _scripted(entry: Entry, bench: Bench, reply: Callable[[Request, list[Request]], str]) -> Scores:
    """The scores of who says ``reply(request, requests of its task)``, on the built-in tasks where there are any."""
    system = build(entry, bench, {})
    scripted, data = _Scripted(), None
    try:
        requests = system.requests(scripted)
    except UsageError:
        data = bench.questions()
        requests = system.requests(scripted, data)
    tasks: dict[str, list[Request]] = {}
    for asked in requests:
        tasks.setdefault(asked.task, []).append(asked)
    scripted.table = {(asked.prompt, asked.choices): reply(asked, tasks[asked.task]) for asked in requests}
    found: Scores = system.evaluate(scripted, data)
    return found


def _guess(asked: Request, others: list[Request], draw: random.Random) -> str:
    return str(draw.randrange(len(asked.choices))) if asked.choices else draw.choice(others).reply


def _next(asked: Request, others: list[Request]) -> str:
    """The reply to the nearest later request that has another truth."""
    place = others.index(asked)
    later = [*others[place + 1 :], *others[:place]]
    if asked.choices:
        return str((int(asked.reply) + 1) % len(asked.choices))
    return next((other.reply for other in later if other.truth != asked.truth), "")


def _marked(scores: Scores) -> dict[str, Score]:
    return {task: one for task, one in scores.tasks.items() if one.chance is not None}
