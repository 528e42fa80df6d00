"""Evaluation: ``evaluate(subject, data) -> Scores``, tasks with exact truth, intervals, and the rate of chance.

An evaluation makes *requests*, each with its truth, and marks what the subject outputs from 0 to 1. The base class
asks, marks and sums up:

    mark_i   = mark(output_i, request_i)
    chance_i = mean over shifts k of mark(output_i, request_(i+k))      the same outputs against the truth of others

A task says something about its subject where the mean of mark_i - chance_i is above 0 with its 95 % bootstrap interval;
else it is marked as uninformative. Long or hedged outputs that happen to hold any answer raise both alike.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError
from gossamer.kinds.base import System

SHIFTS = 8


@dataclasses.dataclass(frozen=True)
class Request:
    """One thing that is asked. ``reply`` is an output that earns full marks.

    With ``choices`` the subject ranks them as continuations of ``prompt`` and its output is the place of the likeliest,
    "0", "1" ...; else it continues the prompt, up to the end of a line where ``line`` is set. ``about`` is the
    evaluation's own.
    """

    task: str
    prompt: str
    truth: tuple[str, ...]
    reply: str
    choices: tuple[str, ...] = ()
    new_tokens: int = 32
    line: bool = True
    about: Any = None


@dataclasses.dataclass(frozen=True)
class Score:
    """Mean of ``n`` items with its 95 % interval. ``chance``: see the head of this file; None where there is none."""

    value: float
    low: float
    high: float
    n: int
    better: Literal["higher", "lower"] = "higher"
    chance: float | None = None
    informative: bool = True
    items: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request with what the subject said to it, kept for audit."""

    request: Request
    output: str
    mark: float


@dataclasses.dataclass
class Scores:
    """``tasks`` by name; ``values`` are further figures without a direction; ``asked`` every request and output."""

    tasks: dict[str, Score] = dataclasses.field(default_factory=dict)
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    asked: list[Asked] = dataclasses.field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of ``asked`` task, prompt, output, truth and mark."""
        return {
            "tasks": {task: {**dataclasses.asdict(one), "items": list(one.items)} for task, one in self.tasks.items()},
            "values": dict(self.values),
            "asked": [
                {
                    "task": one.request.task,
                    "prompt": one.request.prompt,
                    "output": one.output,
                    "truth": list(one.request.truth),
                    "mark": one.mark,
                }
                for one in self.asked
            ],
        }

    def uninformative(self) -> list[str]:
        """Tasks at which the subject does no better than chance."""
        return [task for task, score in self.tasks.items() if not score.informative]


class Subject(Protocol):
    """What can be evaluated: a model behind these calls, or anything scripted."""

    @property
    def room(self) -> int | None:
        """Tokens that prompt and answer may have together; None: any number."""

    def length(self, text: str) -> int:
        """Tokens of a prompt."""

    def answers(self, prompts: Sequence[str], new_tokens: int, line: bool) -> list[str]:
        """The continuation of each prompt."""

    def logprobs(self, prompt: str, choices: Sequence[str]) -> list[float]:
        """Log-probability of each choice after the prompt."""

    def nats(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """Summed negative log-likelihood of each text, and its number of tokens."""


class ModelSubject:
    """A causal language model and its tokenizer, greedy; a decoding system in the bundle rules how it generates."""

    def __init__(
        self, bundle: Bundle, batch_size: int = 16, progress: Callable[[int, int], None] | None = None
    ) -> None:
        from gossamer.kinds.decoding import Decoding

        self.model = bundle.model
        self.tokenizer = getattr(bundle.processor, "tokenizer", bundle.processor)  # of a processor of images too
        self.batch_size, self.progress = batch_size, progress
        decoders = [part for part in bundle.parts.values() if isinstance(part, Decoding)]
        self.ways: dict[str, Any] = (
            {"custom_generate": decoders[-1].custom_generate(self.tokenizer)} if decoders else {}
        )

    @property
    def room(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def length(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    def answers(self, prompts: Sequence[str], new_tokens: int, line: bool) -> list[str]:
        from gossamer.parts.generation import generate_texts

        return generate_texts(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=new_tokens,
            batch_size=self.batch_size,
            stop_at_newline=line,
            progress=self.progress,
            **self.ways,
        )

    def logprobs(self, prompt: str, choices: Sequence[str]) -> list[float]:
        from gossamer.parts.scorer import score_choices

        found = score_choices(self.model, self.tokenizer, prompt, choices, batch_size=self.batch_size)
        return [float(value) for value in found.logprobs]

    def nats(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        from gossamer.parts.scorer import perplexity

        found = [perplexity(self.model, self.tokenizer, [text]) for text in texts]
        return [(one.nll_per_token * one.tokens, one.tokens) for one in found]


class Evaluation(System):
    """Subclasses make the requests and mark one output; ``further`` adds what is no mark."""

    verb = "evaluate"
    batch_size: int = 16
    progress: Callable[[int, int], None] | None = None  # called while it generates: done, total

    def check(self, subject: Any, data: Any = None) -> None:
        """Refuse a bundle whose model does not generate, or that has no tokenizer."""
        if not isinstance(subject, Bundle):
            return
        generates = getattr(subject.model, "can_generate", lambda: False)()
        if not generates or getattr(subject.model.config, "is_encoder_decoder", False):
            raise InputError(
                f"{self.name}.evaluate", must="get a causal language model", got=type(subject.model).__name__
            )
        if not hasattr(subject.processor, "decode"):
            raise InputError(
                f"{self.name}.evaluate", must="get its tokenizer too", got=type(subject.processor).__name__
            )

    @abc.abstractmethod
    def requests(self, subject: Subject, data: Any = None) -> list[Request]:
        """Everything that is asked; prompts fit ``subject.room``. The order of ``data`` must not matter."""

    @abc.abstractmethod
    def mark(self, output: str, request: Request) -> float:
        """From 0 to 1: how right ``output`` is, were it the answer to ``request``."""

    def further(self, scores: Scores, subject: Subject) -> None:
        """Add figures that are no marks of single outputs, and what is computed from all of them."""

    def evaluate(self, subject: Any, data: Any = None) -> Scores:
        """Ask a :class:`~gossamer.core.bundle.Bundle` or any :class:`Subject`; ``data`` None: the built-in tasks."""
        asked = self.asking(subject)
        requests = sorted(self.requests(asked, data), key=lambda one: (one.task, one.prompt, one.truth))
        outputs = _outputs(asked, requests)
        marks = [self.mark(output, one) for output, one in zip(outputs, requests, strict=True)]
        scores = Scores(asked=[Asked(*found) for found in zip(requests, outputs, marks, strict=True)])
        for task, places in _places(one.task for one in requests).items():
            mine = [requests[place] for place in places]
            said = [outputs[place] for place in places]
            scores.tasks[task] = scored([marks[place] for place in places], self._chances(said, mine), seed=self.seed)
        self.further(scores, asked)
        return scores

    def asking(self, subject: Any) -> Subject:
        """A bundle as a subject."""
        return ModelSubject(subject, self.batch_size, self.progress) if isinstance(subject, Bundle) else subject

    def _chances(self, outputs: list[str], requests: list[Request]) -> list[float] | None:
        count = len(requests)
        if count < 2:
            return None
        draw = np.random.default_rng(self.seed)
        shifts = draw.permutation(np.arange(1, count))[:SHIFTS]
        # a shift of a shuffled order: neighbours in the sorted order are alike
        order = draw.permutation(count)
        chances = np.zeros(count)
        for shift in shifts:
            for place in range(count):
                other = requests[order[(place + shift) % count]]
                chances[order[place]] += self.mark(outputs[order[place]], other)
        return list(chances / len(shifts))


def scored(marks: Sequence[float], chances: Sequence[float] | None = None, *, seed: int = 0) -> Score:
    """Sum up one task; InputError for fewer than two items, which have no interval."""
    from gossamer.parts.metrics import bootstrap

    low, high = bootstrap(marks, seed=seed)
    value = math.fsum(marks) / len(marks)
    if chances is None:
        return Score(value, low, high, len(marks), items=tuple(marks))
    above, _ = bootstrap([mark - chance for mark, chance in zip(marks, chances, strict=True)], seed=seed)
    chance = math.fsum(chances) / len(chances)
    return Score(value, low, high, len(marks), chance=chance, informative=above > 0, items=tuple(marks))


def _outputs(subject: Subject, requests: Sequence[Request]) -> list[str]:
    outputs = [""] * len(requests)
    for place, one in enumerate(requests):
        if one.choices:
            outputs[place] = str(int(np.argmax(subject.logprobs(one.prompt, one.choices))))
    written = [place for place, one in enumerate(requests) if not one.choices]
    ways = _places((requests[place].new_tokens, requests[place].line) for place in written)
    for (new_tokens, line), group in ways.items():
        chosen = [written[number] for number in group]
        texts = subject.answers([requests[place].prompt for place in chosen], new_tokens, line)
        for place, text in zip(chosen, texts, strict=True):
            outputs[place] = text
    return outputs


def _places(keys: Iterable[Any]) -> dict[Any, list[int]]:
    """Places of equal keys, keys in the order of their first place."""
    found: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        found.setdefault(key, []).append(place)
    return found
