"""How answers are moved: plain steps of the decoding runner, with a processor over its scores, or with guesses.

A :class:`Stepper` reads prompts in blocks and steps any answers in any company. An error in what belongs to one answer
(how its token is drawn, what a stage keeps for it) is given back for that answer alone; an error in a step over several
is looked for by stepping them one by one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gossamer.kinds.decoding import DrafterDecoding, ProcessorDecoding
from gossamer.parts.decode_runner import Runner
from gossamer.parts.decode_state import Chunk, Output, chain
from gossamer.parts.requests import Draft, RequestState
from gossamer.parts.speculation import Record, Speculator, settle
from gossamer.serving.sequences import Writing

log = logging.getLogger("gossamer.serving")
_NEVER = 1 << 60
Result = list[int] | Exception


class Stepper:
    """Plain steps, and those of a ``processor`` stage that moves the scores of the answers that want it."""

    def __init__(self, model: Any, tokenizer: Any, processor: ProcessorDecoding | None = None, **runner: Any) -> None:
        self.model, self.tokenizer, self.stage = model, tokenizer, processor
        self.runner = self._bind(runner)
        self.hidden: tuple[int, ...] = ()
        self.drafts = False

    def _bind(self, runner: dict[str, Any]) -> Runner:
        return Runner(self.model, **runner)

    def uses(self, answer: Writing) -> bool:
        """Whether the decoding stage is on for this answer."""
        return self.stage is not None and self.stage.name in answer.ask.stages

    def open(self, answer: Writing, found: tuple[Any, int] | None) -> None:
        """Give an answer its request state; ``found`` is a state to go on from and how many tokens of it serve."""
        prompt = list(answer.ask.prompt)
        if self.stage is not None and self.uses(answer):
            state = self.stage.open(self.model, prompt, self.tokenizer)
        else:
            state = RequestState(prompt)
        if found is None:
            state.past = self.runner.open()
        else:
            state.past = found[0].past
            state.past.crop(found[1])
            answer.tally.cached = found[1]
        self._begin(answer, state)

    def _begin(self, answer: Writing, state: Any) -> None:
        state.choice, state.room, state.ends = answer.choice, answer.ask.max_tokens, answer.ends
        answer.state = state

    def read(self, answers: Sequence[Writing], counts: Sequence[int]) -> list[Exception | None]:
        """Run the next ``counts`` tokens of the prompts; what went wrong with each."""
        before = [answer.state.past.length for answer in answers]
        try:
            outputs = self._read(answers, counts)
        except Exception as error:
            for answer, length in zip(answers, before, strict=True):
                answer.state.past.crop(length)
            if len(answers) == 1:
                return [error]
            log.warning("reading %d prompts failed (%s); trying them one by one", len(answers), error)
            return [self.read([answer], [count])[0] for answer, count in zip(answers, counts, strict=True)]
        found: list[Exception | None] = []
        for answer, out in zip(answers, outputs, strict=True):
            result = _alone(self.observe, answer, [], out.hidden)
            found.append(result if isinstance(result, Exception) else None)
        return found

    def _read(self, answers: Sequence[Writing], counts: Sequence[int]) -> list[Output]:
        chunks = []
        for answer, count in zip(answers, counts, strict=True):
            start = answer.state.past.length
            chunks.append(Chunk(answer.state.past, answer.ask.prompt[start : start + count], chain(count), "none"))
        return self.runner.run(chunks, self.hidden)

    def observe(self, answer: Writing, emitted: list[int], hidden: Tensor | None) -> None:
        """Tokens came into the past of an answer, with these hidden states."""

    def summary(self, answer: Writing) -> dict[str, dict[str, Any]]:
        if self.stage is None or not self.uses(answer):
            return {}
        return {self.stage.name: self.stage.summary(answer.state)}

    def step(self, answers: Sequence[Writing]) -> list[Result]:
        """What each answer emitted, or the error that ended it."""
        before = [answer.state.past.length for answer in answers]
        try:
            return self._together(answers)
        except Exception as error:
            for answer, length in zip(answers, before, strict=True):
                answer.state.past.crop(length)
            if len(answers) == 1:
                return [error]
            log.warning("a step over %d answers failed (%s); trying them one by one", len(answers), error)
            return [self.step([answer])[0] for answer in answers]

    def _together(self, answers: Sequence[Writing]) -> list[Result]:
        chunks = []
        for answer in answers:
            new = answer.state.ids[answer.state.past.length :]
            chunks.append(Chunk(answer.state.past, new, chain(len(new)), "last"))
        rows = [out.logits[0] for out in self.runner.run(chunks)]
        self._shift(answers, rows)
        return [_alone(_pick, answer, row) for answer, row in zip(answers, rows, strict=True)]

    def _shift(self, answers: Sequence[Writing], rows: list[Tensor]) -> None:
        """Replace the scores of the answers that the processor is on for."""
        import torch

        moved = [place for place, answer in enumerate(answers) if self.uses(answer)]
        if not moved:
            return
        stage: Any = self.stage
        began = time.perf_counter()
        shifted = stage.shift([answers[n].state for n in moved], torch.stack([rows[n] for n in moved]))
        seconds = time.perf_counter() - began
        for place, row in zip(moved, shifted, strict=True):
            rows[place] = row
            answers[place].tally.spend(stage.name, seconds)


class DraftStepper(Stepper):
    """Steps in which a drafter guesses for the answers that want it; the text is that of plain steps."""

    speculator: Speculator

    def __init__(self, model: Any, tokenizer: Any, drafter: DrafterDecoding, **runner: Any) -> None:
        self.drafter = drafter
        super().__init__(model, tokenizer, **runner)
        self.stage: Any = drafter
        self.hidden, self.drafts = drafter.hidden(model), True

    def _bind(self, runner: dict[str, Any]) -> Runner:
        self.speculator = self.drafter.bind(self.model, **runner)
        return self.speculator.runner

    def open(self, answer: Writing, found: tuple[Any, int] | None) -> None:
        answer.drafting = self.uses(answer)
        if not answer.drafting:
            super().open(answer, found)
            answer.state.record = Record(wait=_NEVER)
            return
        prompt = list(answer.ask.prompt)
        if found is None:
            self._begin(answer, self.drafter.open(self.model, prompt, self.tokenizer))
            return
        state, kept = found
        # as if all of it had been written: then taking it back cuts the drafter's memory too
        state.prompt, state.tokens, state.room = [], state.ids, None
        state.rewind(len(state.tokens) - kept)
        state.prompt, state.tokens, state.record = prompt, [], Record()
        answer.tally.cached = state.past.length
        self._begin(answer, state)

    def observe(self, answer: Writing, emitted: list[int], hidden: Tensor | None) -> None:
        if answer.drafting:
            began = time.perf_counter()
            self.drafter.observe([answer.state], [emitted], None if hidden is None else [hidden])
            answer.tally.spend(self.drafter.name, time.perf_counter() - began)

    def _guess(self, state: Any) -> Draft:
        return self.drafter.draft([state], self.drafter.draft_tokens)[0]

    def _together(self, answers: Sequence[Writing]) -> list[Result]:
        by_state = {id(answer.state): answer for answer in answers}
        failed: dict[int, Exception] = {}

        def guarded(state: Any, otherwise: Any, act: Callable[..., Any], *arguments: Any) -> Any:
            """An error in one answer's own part ends that answer and not the step."""
            try:
                return otherwise if id(state) in failed else act(*arguments)
            except Exception as error:
                failed[id(state)] = error
                return otherwise

        def draft(states: Sequence[Any]) -> list[Draft]:
            began = time.perf_counter()
            on = [state for state in states if by_state[id(state)].drafting]
            found = {id(state): guarded(state, _NONE, self._guess, state) for state in on}
            for state in on:
                by_state[id(state)].tally.spend(self.drafter.name, time.perf_counter() - began)
            return [found.get(id(state), _NONE) for state in states]

        def observe(states: Sequence[Any], emitted: Any, hidden: Any) -> None:
            for place, state in enumerate(states):
                news = None if hidden is None else hidden[place]
                guarded(state, None, self.observe, by_state[id(state)], list(emitted[place]), news)

        def settled(state: Any, guess: Draft, logits: Tensor) -> Any:
            return guarded(state, ([], []), settle, state, guess, logits)

        emitted = self.speculator.step([answer.state for answer in answers], draft, observe, settled)
        return [failed.get(id(answer.state), tokens) for answer, tokens in zip(answers, emitted, strict=True)]


_NONE = Draft(())


def make_stepper(model: Any, tokenizer: Any, stage: Any, **runner: Any) -> Stepper:
    """The stepper for a decoding stage, or for none."""
    if isinstance(stage, DrafterDecoding):
        return DraftStepper(model, tokenizer, stage, **runner)
    return Stepper(model, tokenizer, stage, **runner)


def _pick(answer: Writing, scores: Tensor) -> list[int]:
    token = answer.state.choice.pick(answer.state.ids, scores)
    answer.state.accept(token)
    return [token]


def _alone(act: Callable[..., Any], *arguments: Any) -> Any:
    """What ``act`` gives, or its error."""
    try:
        return act(*arguments)
    except Exception as error:
        return error
