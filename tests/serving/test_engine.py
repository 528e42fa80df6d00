"""The engine: company changes nothing, prompts do not hold others up, prefixes are reused, a crash is one answer's."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gossamer.core.bundle import Bundle
from gossamer.parts.decode_runner import Runner
from gossamer.serving.engine import BESIDE, Capacity, Engine, Full, Stopped
from gossamer.serving.sampling import Sampling
from gossamer.serving.sequences import Ask, Failure, Piece

GREEDY = Sampling(temperature=0.0)
WARM = Sampling(temperature=1.3, top_p=0.9, seed=11, presence=0.5)
PROMPTS = [list(range(3, 3 + length)) for length in (4, 9, 1, 30, 12, 7, 21, 5)]


class Heard:
    """What a request said, by answer."""

    def __init__(self, engine: Engine, asks: Sequence[Ask]) -> None:
        self.events: queue.Queue[Piece | Failure] = queue.Queue()
        self.count, self.got = len(asks), list[Piece | Failure]()
        self.ticket = engine.submit(asks, self.events.put)

    def wait(self) -> list[Piece | Failure]:
        """The last event of each answer."""
        last: dict[int, Piece | Failure] = {}
        while len(last) < self.count:
            event = self.events.get(timeout=20)
            self.got.append(event)
            if isinstance(event, Failure) or event.finish:
                last[event.index] = event
        return [last[index] for index in range(self.count)]

    def text(self, index: int = 0) -> str:
        return "".join(e.text for e in self.got if isinstance(e, Piece) and e.index == index)


def said(engine: Engine, ask: Ask) -> str:
    heard = Heard(engine, [ask])
    heard.wait()
    return heard.text()


def test_greedy_text_is_the_runners_in_any_company(engine: Engine, bundle: Bundle) -> None:
    runner = Runner(bundle.model)
    alone = [runner.generate(prompt, max_new_tokens=12, eos=engine.ends) for prompt in PROMPTS]
    asks = [Ask(prompt, 12, index, GREEDY) for index, prompt in enumerate(PROMPTS)]
    heard = Heard(engine, asks)
    ends = heard.wait()
    for index, tokens in enumerate(alone):
        end = ends[index]
        assert isinstance(end, Piece)
        assert end.tally is not None
        assert end.tally.written == len(tokens)
        context = bundle.processor.decode(PROMPTS[index][-5:])
        whole = bundle.processor.decode([*PROMPTS[index][-5:], *tokens], skip_special_tokens=True)
        assert context + heard.text(index) == whole or context.endswith("\ufffd")


def test_a_seed_gives_its_text_in_company_and_alone(engine: Engine) -> None:
    ask = Ask(PROMPTS[1], 20, 0, WARM)
    alone = said(engine, ask)
    others = [Ask(prompt, 30, 1 + index, Sampling()) for index, prompt in enumerate(PROMPTS[2:])]
    heard = Heard(engine, [ask, *others])
    heard.wait()
    assert heard.text(0) == alone
    assert said(engine, Ask(PROMPTS[1], 20, 0, Sampling(temperature=1.3, seed=12))) != alone


def test_eight_answers_share_their_steps(engine: Engine) -> None:
    widest: list[int] = []
    step = engine.stepper.step
    engine.stepper.step = lambda answers: widest.append(len(answers)) or step(answers)  # type: ignore[method-assign, func-returns-value]
    try:
        Heard(engine, [Ask(prompt, 16, index, Sampling(seed=1)) for index, prompt in enumerate(PROMPTS)]).wait()
    finally:
        engine.stepper.step = step  # type: ignore[method-assign]
    assert max(widest) == 8


def test_a_long_prompt_is_read_between_the_steps_of_others(opened: Any, bundle: Bundle) -> None:
    with opened(bundle, capacity=Capacity(prefix_tokens=0)) as engine:
        order: list[str] = []
        step, read = engine.stepper.step, engine.stepper.read
        engine.stepper.step = lambda answers: order.append("step") or step(answers)  # type: ignore[method-assign, func-returns-value]

        def reading(answers: Any, counts: Any) -> Any:
            order.append(f"read {sum(counts)}")
            return read(answers, counts)

        engine.stepper.read = reading  # type: ignore[method-assign]
        first = Heard(engine, [Ask([5, 6], 60, 0, GREEDY)])
        first.events.get(timeout=5)
        Heard(engine, [Ask([7] * 180, 2, 0, GREEDY)]).wait()
        blocks = [entry for entry in order if entry.startswith("read")]
        assert blocks[-3:] == [f"read {BESIDE}", f"read {BESIDE}", f"read {179 - 2 * BESIDE}"]
        start = order.index(blocks[-3])
        assert order[start : start + 5 : 2] == blocks[-3:]


def test_prompts_of_a_burst_are_read_together(
    opened: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    monkeypatch.setattr("gossamer.serving.engine._GATHER", 10.0)
    with opened(bundle, capacity=Capacity(prefix_tokens=0)) as engine:
        reads: list[int] = []
        read = engine.stepper.read
        engine.stepper.read = lambda answers, counts: reads.append(len(answers)) or read(answers, counts)  # type: ignore[method-assign, func-returns-value]
        prompts = [[token] * 4 for token in range(20, 28)]
        with engine.announced():
            # no guard is on, so the text that one would judge holds nothing up
            heard = [Heard(engine, [Ask(prompt, 4, 0, GREEDY, judged=("text",))]) for prompt in prompts[:4]]
            assert not until(lambda: reads, 0.05)
            heard += [Heard(engine, [Ask(prompt, 4, 0, GREEDY, judged=("text",))]) for prompt in prompts[4:]]
        for one in heard:
            one.wait()
        assert reads == [8]


def test_a_burst_is_not_waited_for_without_end(engine: Engine) -> None:
    with engine.announced():
        Heard(engine, [Ask([5, 6], 2, 0, GREEDY)]).wait()


@pytest.mark.parametrize("limit", [0, 4096])
def test_a_reused_prefix_gives_the_same_text(opened: Any, bundle: Bundle, limit: int) -> None:
    with opened(bundle, capacity=Capacity(prefix_tokens=limit)) as engine:
        base = [9, 8, 7, 6, 5, 4, 3, 20, 21, 22, 23, 24]
        for prompt in (base, [*base, 30, 31], [*base[:10], 40, 41, 42], base):
            fresh = Runner(bundle.model).generate(prompt, max_new_tokens=10, eos=engine.ends)
            heard = Heard(engine, [Ask(prompt, 10, 0, GREEDY)])
            (end,) = heard.wait()
            assert isinstance(end, Piece)
            assert end.tally is not None
            assert end.tally.written == len(fresh)
            reader = bundle.processor
            whole = reader.decode([*prompt[-5:], *fresh], skip_special_tokens=True)
            assert whole.endswith(heard.text())
        assert (end.tally.cached > 0) == (limit > 0)
        assert engine.load()["kept_tokens"] <= limit


def test_answers_of_one_prompt_share_its_reading(opened: Any, bundle: Bundle) -> None:
    with opened(bundle) as engine:
        prompt = list(range(3, 103))
        asks = [Ask(prompt, 6, index, Sampling(seed=3)) for index in range(4)]
        ends = Heard(engine, asks).wait()
        cached = [end.tally.cached for end in ends if isinstance(end, Piece) and end.tally]
        assert cached == [0, 99, 99, 99]
        assert not any("prompt_tokens_run" in row[0] and row[3] != 99 for row in engine.metrics.rows())


class Bomb:
    """A grammar stand-in: breaks when its answer has some tokens."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] >= self.at:
            raise RuntimeError("bang")
        return scores


def test_an_error_in_drawing_ends_one_answer(until: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = Ask(PROMPTS[0], 12, 0, GREEDY)
    alone = said(engine, calm)
    choice = Sampling.choice

    def armed(self: Sampling, start: int, index: int) -> Any:
        found = choice(self, start, index)
        if index == 1:
            found[0].processors = [Bomb(start + 3)]
        return found

    monkeypatch.setattr(Sampling, "choice", armed)
    heard = Heard(engine, [calm, Ask(PROMPTS[1], 12, 1, GREEDY)])
    first, second = heard.wait()
    assert isinstance(first, Piece)
    assert heard.text(0) == alone
    assert isinstance(second, Failure)
    assert "bang" in str(second.error)
    assert until(lambda: engine.load()["running"] == 0)


@pytest.mark.parametrize("reading", [True, False])
def test_a_failing_step_ends_only_who_broke_it(
    opened: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, reading: bool
) -> None:
    with opened(bundle) as engine:
        calm = [Ask(prompt, 12, index, GREEDY) for index, prompt in enumerate(PROMPTS[:3])]
        alone = Heard(engine, calm)
        alone.wait()
        run, states = engine.runner.run, set()
        open_ = engine.stepper.open

        def opening(answer: Any, found: Any) -> None:
            open_(answer, found)
            if answer.ask.index == 3:
                states.add(id(answer.state.past))

        def broken(chunks: Any, hidden: Any = ()) -> Any:
            if any(id(chunk.state) in states and (len(chunk.tokens) > 1) == reading for chunk in chunks):
                raise MemoryError("no room")
            return run(chunks, hidden)

        monkeypatch.setattr(engine.stepper, "open", opening)
        monkeypatch.setattr(engine.runner, "run", broken)
        heard = Heard(engine, [*calm, Ask(list(range(200, 230)), 12, 3, GREEDY)])
        ends = heard.wait()
        assert isinstance(ends[3], Failure)
        assert isinstance(ends[3].error, MemoryError)
        assert [heard.text(index) for index in range(3)] == [alone.text(index) for index in range(3)]


def test_a_deaf_listener_is_dropped(until: Any, engine: Engine) -> None:
    def deaf(event: Any) -> None:
        raise ConnectionError("gone")

    engine.submit([Ask(PROMPTS[0], 50, 0, GREEDY)], deaf)
    assert said(engine, Ask(PROMPTS[1], 5, 0, GREEDY)) is not None
    assert until(lambda: engine.load()["running"] == 0)


def test_a_cancelled_answer_frees_its_slot(slow: Any, until: Any) -> None:
    engine = slow(0.02)
    heard = Heard(engine, [Ask(PROMPTS[0], 200, 0, GREEDY)])
    heard.events.get(timeout=5)
    heard.ticket.cancel()
    assert until(lambda: engine.load()["running"] == 0)
    assert engine.load()["kept_tokens"] < 100


def test_a_full_engine_refuses_and_a_stopped_one_too(slow: Any) -> None:
    engine = slow(0.05, capacity=Capacity(slots=2, queue=2))
    asks = [Ask(PROMPTS[0], 4, index, GREEDY) for index in range(4)]
    first = Heard(engine, asks)
    with pytest.raises(Full):
        engine.submit(asks[:1], print)
    assert all(isinstance(end, Piece) for end in first.wait())
    waiting = Heard(engine, asks[:1])
    engine.stop()  # finishes what was submitted
    assert isinstance(waiting.wait()[0], Piece)
    with pytest.raises(Stopped):
        engine.submit(asks[:1], print)


def test_an_engine_stopped_at_once_fails_what_it_holds(slow: Any) -> None:
    engine = slow(0.05)
    heard = Heard(engine, [Ask(PROMPTS[0], 200, 0, GREEDY)])
    heard.events.get(timeout=5)
    engine.stop(at_once=True)
    (end,) = heard.wait()
    assert isinstance(end, Failure)
    assert isinstance(end.error, Stopped)


def test_a_call_runs_between_turns_and_brings_its_error(engine: Engine) -> None:
    def broken() -> None:
        raise ValueError("no")

    assert engine.call(lambda: 3).result(5) == 3
    with pytest.raises(ValueError, match="no"):
        engine.call(broken).result(5)
    assert said(engine, Ask(PROMPTS[0], 2, 0, GREEDY)) is not None
