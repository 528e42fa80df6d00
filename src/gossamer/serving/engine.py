"""Continuous batching: a thread that owns a model and moves all answers that are due, one step after another.

A turn of the thread lets waiting answers in while there are slots, asks the guards about one new prompt, reads at most
a block of prompt tokens, and steps every answer whose prompt is read. Prompts come in smaller blocks while others are
writing, so that a long one does not hold them up. Answers come and go between turns; nothing is padded. The first
request of a burst wakes an idle engine, which waits a few milliseconds for the others.

An error that belongs to one answer ends that one: see :mod:`gossamer.serving.stepping`. A cancelled one leaves at the
next turn. What finished answers leave is reused by those that begin alike (:mod:`gossamer.serving.prefixes`).
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from gossamer.core.bundle import Bundle
from gossamer.core.errors import GossamerError
from gossamer.parts.decode_runner import BLOCK
from gossamer.parts.generation import end_ids
from gossamer.serving.metrics import Metrics
from gossamer.serving.prefixes import Kept, Prefixes
from gossamer.serving.sequences import Ask, Sink, Ticket, Writing
from gossamer.serving.stages import Stages
from gossamer.serving.stepping import make_stepper

log = logging.getLogger("gossamer.serving")
T = TypeVar("T")
BESIDE = 64  # prompt tokens a turn while answers are being written
_SILENCE, _GATHER = 0.002, 0.012  # seconds in which nobody else came, and at most, before an idle engine begins


class Full(GossamerError):
    """No slot and no place in the queue."""


class Stopped(GossamerError):
    """The engine was stopped before the answer was written."""


@dataclasses.dataclass(frozen=True)
class Capacity:
    """``slots`` answers are written at once, ``queue`` more may wait; ``prefix_tokens`` of finished ones are kept."""

    slots: int = 8
    queue: int = 64
    prefix_tokens: int = 16384


class Engine:
    """A model that answers; ``name`` is what requests call it. ``runner``: options of the decoding runner."""

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        *,
        stages: Stages | None = None,
        capacity: Capacity | None = None,
        **runner: Any,
    ) -> None:
        self.name, self.capacity, self.created = name, capacity or Capacity(), int(time.time())
        self.model, self.tokenizer, self.stages = bundle.model, bundle.processor, stages or Stages()
        self.stepper = make_stepper(self.model, self.tokenizer, self.stages.decoding, **runner)
        self.runner = self.stepper.runner
        self.ends = frozenset(end_ids(self.model, self.tokenizer))
        self.vocabulary_size = int(self.model.get_output_embeddings().out_features)
        self.metrics = Metrics()
        self._prefixes = Prefixes(self.capacity.prefix_tokens)
        self._waiting: collections.deque[Writing] = collections.deque()
        self._active: list[Writing] = []
        self._calls: collections.deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = collections.deque()
        self._wake = threading.Condition()
        self._stopping = self._at_once = False
        self._announced = 0
        self._thread = threading.Thread(target=self._loop, name=f"engine {name}", daemon=True)
        self._thread.start()

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.runner.max_length

    def load(self) -> dict[str, int]:
        """How many answers are in slots and waiting, and how many tokens are kept."""
        with self._wake:
            return {"running": len(self._active), "waiting": len(self._waiting), "kept_tokens": self._prefixes.tokens}

    @contextlib.contextmanager
    def announced(self) -> Iterator[None]:
        """A request is being made ready: those that are first of a burst wait for it a few milliseconds."""
        with self._wake:
            self._announced += 1
        try:
            yield
        finally:
            with self._wake:
                self._announced -= 1
                self._wake.notify()

    def submit(self, asks: Sequence[Ask], sink: Sink) -> Ticket:
        """Queue the answers of one request; ``sink`` gets their pieces from the engine's thread.

        Asks of equal prompts share its reading. Raises :class:`Full`, and :class:`Stopped` after :meth:`stop`.
        """
        ticket, first = Ticket(), dict[tuple[int, ...], Writing]()
        answers = [Writing(ask, ticket, sink, self.tokenizer, self.ends) for ask in asks]
        for answer in answers:
            answer.judged = not self.stages.judges(answer.ask)
            leader = first.setdefault(tuple(answer.ask.prompt), answer)
            answer.first = None if leader is answer else leader
        with self._wake:
            if self._stopping:
                raise Stopped("the server", must="be running", got="a stop")
            held = len(self._waiting) + len(self._active)
            if held + len(answers) > self.capacity.slots + self.capacity.queue:
                raise Full("the server", must="have room for the request", got=f"{held} answers under way or waiting")
            self._waiting.extend(answers)
            self._wake.notify()
        return ticket

    def call(self, act: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run ``act`` on the engine's thread, between two turns."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._wake:
            if self._stopping:
                raise Stopped("the server", must="be running", got="a stop")
            self._calls.append((act, future))
            self._wake.notify()
        return future

    def stop(self, *, at_once: bool = False) -> None:
        """Finish what was submitted, or with ``at_once`` fail it, and end the thread."""
        with self._wake:
            self._stopping, self._at_once = True, self._at_once or at_once
            self._wake.notify()
        self._thread.join()

    @torch.no_grad()
    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._active or self._calls or self._stopping):
                    self._wake.wait()
                if self._at_once or (self._stopping and not (self._waiting or self._active or self._calls)):
                    break
                if self._waiting and not self._active:
                    self._gather()
            try:
                self._turn()
            except Exception as error:
                log.exception("a turn of the engine failed; every answer in a slot ends with an error")
                for answer in list(self._active):
                    self._fail(answer, error)
        self._give_up()

    def _gather(self) -> None:
        """Requests of a burst come one by one; read together, all of them are answered sooner."""
        end = time.monotonic() + _GATHER
        while (self._wake.wait(_SILENCE) or self._announced) and time.monotonic() < end:
            pass

    def _turn(self) -> None:
        self._run_call()
        with self._wake:
            gone = [answer for answer in self._waiting if answer.ticket.cancelled]
            for answer in gone:
                self._waiting.remove(answer)
        for answer in [answer for answer in self._active if answer.ticket.cancelled]:
            self._leave(answer)
        self._admit()
        self._judge()
        for answer in [answer for answer in self._active if answer.judged and answer.state is None]:
            self._open(answer)
        self._read()
        self._write()

    def _run_call(self) -> None:
        with self._wake:
            act, future = self._calls.popleft() if self._calls else (None, None)
        if act is None or future is None or not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(act())
        except Exception as error:
            future.set_exception(error)

    def _admit(self) -> None:
        with self._wake:
            for answer in list(self._waiting):
                if len(self._active) >= self.capacity.slots:
                    return
                leader = answer.first
                if leader is None or leader.read or leader.over or leader.ticket.cancelled:
                    self._waiting.remove(answer)
                    self._active.append(answer)

    def _judge(self) -> None:
        """Ask the guards about one prompt."""
        answer = next((answer for answer in self._active if not answer.judged), None)
        if answer is None:
            return
        try:
            flagged = self.stages.judge(answer.ask, answer.tally)
        except Exception as error:
            self._fail(answer, error)
            return
        answer.judged = True
        if flagged is not None:
            text, written = flagged
            self._guarded(answer, lambda: answer.refuse(text, written))
            self._leave(answer)

    def _open(self, answer: Writing) -> None:
        drafting = self.stepper.drafts and self.stepper.uses(answer)
        running = [
            Kept(other.settled, other.state, other.drafting) for other in self._active if other.state is not None
        ]
        try:
            found = self._prefixes.take(answer.ask.prompt, drafting, running)
            self.stepper.open(answer, found)
        except Exception as error:
            self._fail(answer, error)

    def _read(self) -> None:
        reading = [answer for answer in self._active if answer.state is not None and not answer.read]
        budget = BESIDE if any(answer.read for answer in self._active) else BLOCK
        chosen, counts = list[Writing](), list[int]()
        for answer in reading:
            count = min(len(answer.ask.prompt) - 1 - answer.state.past.length, budget)
            budget -= count
            if count:
                chosen.append(answer)
                counts.append(count)
        if not chosen:
            return
        for answer, error in zip(chosen, self.stepper.read(chosen, counts), strict=True):
            if error is not None:
                self._fail(answer, error)
        self.metrics.count("prompt_tokens_run", sum(counts))

    def _write(self) -> None:
        writing = [answer for answer in self._active if answer.read]
        if not writing:
            return
        began = time.perf_counter()
        results = self.stepper.step(writing)
        self.metrics.step(len(writing), time.perf_counter() - began)
        for answer, result in zip(writing, results, strict=True):
            if isinstance(result, Exception):
                self._fail(answer, result)
            elif self._guarded(answer, functools.partial(self._take, answer, result)) and answer.over:
                self._leave(answer)

    def _take(self, answer: Writing, tokens: list[int]) -> None:
        answer.take(tokens, lambda: self.stepper.summary(answer))

    def _guarded(self, answer: Writing, act: Callable[[], None]) -> bool:
        """Do what may fail for one answer; whether it went well."""
        try:
            act()
        except Exception as error:
            self._fail(answer, error)
            return False
        return True

    def _fail(self, answer: Writing, error: Exception) -> None:
        log.error("an answer failed", exc_info=error)
        self.metrics.count("failed_answers")
        self._remove(answer)
        if answer.state is not None:
            answer.state.close()
        try:
            answer.fail(error)
        except Exception:
            log.exception("nobody could be told of the failed answer")

    def _leave(self, answer: Writing) -> None:
        """A finished or cancelled answer frees its slot and leaves its past to others."""
        self._remove(answer)
        answer.over = True
        self.metrics.answer(answer.tally)
        if answer.state is not None:
            self._prefixes.keep(Kept(answer.settled, answer.state, answer.drafting))

    def _remove(self, answer: Writing) -> None:
        with self._wake:
            self._active = [other for other in self._active if other is not answer]

    def _give_up(self) -> None:
        with self._wake:
            left, self._waiting = [*self._active, *self._waiting], collections.deque()
            calls, self._calls = list(self._calls), collections.deque()
        for answer in left:
            self._fail(answer, Stopped("the server", must="be running", got="a stop"))
        for _, future in calls:
            future.cancel()
        self._prefixes.clear()
