"""Trees of guesses: verified exactly, sampled in the model's own law, cut at ends, left off where they do not pay."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.parts.decode_runner import Runner
from gossamer.parts.draft_trees import SHAPE, beam_tree, budget_tree, static_tree
from gossamer.parts.guessing import Chances, Pace
from gossamer.parts.look_up import with_copy
from gossamer.parts.requests import Choice, Draft, RequestState
from gossamer.parts.speculation import FIRST_WAIT, TRIAL, Record, Speculator, settle
from gossamer.testing.bench import Bench

PROMPT = [7, 30, 51, 98, 200, 11, 45, 12, 8]


class Table:
    """A source whose next token depends on the last one: rows [v, v] of log-probabilities, ``start`` the last token."""

    def __init__(self, table: Tensor, start: int, vocabulary: Tensor | None = None) -> None:
        self.table, self.start, self.vocabulary = table, start, vocabulary
        self.asked: list[tuple[list[int], list[int], int]] = []

    def root(self) -> Tensor:
        return self.table[self.start]

    def expand(self, parents: Any, tokens: Any, depth: int) -> Tensor:
        self.asked.append((list(parents), list(tokens), depth))
        return self.table[list(tokens)]


def table_of(size: int = 12, seed: int = 0) -> Tensor:
    return (3 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def paths(draft: Draft) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.tree, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def score(path: tuple[int, ...], table: Tensor, start: int) -> float:
    return sum(float(table[a, b]) for a, b in itertools.pairwise((start, *path)))


def test_the_static_tree_is_eagles() -> None:
    source = Table(table_of(), 3)
    draft = static_tree(source, 5)
    ranks: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
    for path in paths(draft):
        before = (3, *path)[-2]
        rank = source.table[before].argsort(descending=True).tolist().index(path[-1])
        ranks[path] = (*ranks[path[:-1]], rank)
    expected = [
        *("0", "1", "2", "3"),
        *("00", "01", "02", "10", "11", "20", "21", "30"),
        *("000", "001", "002", "010", "011", "020", "021", "100"),
        *("0000", "0001", "0002", "00000", "00001"),
    ]
    assert ["".join(map(str, ranks[path])) for path in paths(draft)] == expected
    assert sum(map(sum, SHAPE)) == 25
    assert max(map(len, paths(static_tree(source, 2)))) == 2


def test_the_beam_tree_holds_the_best_paths_of_what_was_seen() -> None:
    table = table_of(6)
    source = Table(table, 2)
    everything = [path for depth in (1, 2, 3) for path in itertools.product(range(6), repeat=depth)]
    everything.sort(key=lambda path: -score(path, table, 2))
    # as wide as a level, so the search is exhaustive
    assert set(paths(beam_tree(source, 3, 36, 20))) == set(everything[:20])
    narrow = beam_tree(Table(table, 2), 4, 2, 5)
    assert len(narrow.tokens) == 5
    assert all(parent < place for place, parent in enumerate(narrow.tree))


def test_the_source_is_told_which_expanded_place_a_token_follows() -> None:
    source = Table(table_of(), 3)
    beam_tree(source, 4, 3, 12)
    chains: list[tuple[int, ...]] = []
    for parents, tokens, depth in source.asked:
        new = [(*(chains[parent] if parent >= 0 else ()), token) for parent, token in zip(parents, tokens, strict=True)]
        assert {len(one) for one in new} == {depth}
        chains += new
    assert len(source.asked) == 3
    assert all(len(tokens) == 3 for _, tokens, _ in source.asked)


def test_the_budget_tree_drops_unlikely_tokens_and_goes_deep_where_one_is_sure() -> None:
    sure = torch.full((5, 5), 0.01)
    sure[range(5), [1, 2, 3, 4, 0]] = 0.96
    assert paths(budget_tree(Table(sure.log(), 0), 4, 4, 0.95, 0.25)) == [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    torn = torch.tensor([[0.4, 0.35, 0.2, 0.05]] * 4).log()
    assert paths(budget_tree(Table(torn, 0), 4, 4, 0.95, 0.25))[:3] == [(0,), (1,), (2,)]
    assert paths(budget_tree(Table(torn, 0), 1, 4, 0.5, 0.25)) == [(0,), (1,)]
    assert paths(budget_tree(Table(torn, 0), 1, 4, 0.95, 0.9)) == [(0,)]
    assert len(budget_tree(Table(torn, 0), 5, 7, 0.95, 0.1).tokens) == 7


def test_columns_of_a_restricted_vocabulary_become_token_ids() -> None:
    table = table_of(4)
    named = torch.tensor([90, 91, 92, 93])
    assert set(static_tree(Table(table, 1, named), 1).tokens) == {90, 91, 92, 93}


def test_a_cut_keeps_a_tree() -> None:
    draft = Draft([1, 2, 3, 4, 5], [-1, -1, 0, 2, 1], torch.eye(5))
    assert draft.cut(2, 9).tree == [-1, -1, 0, 1]
    assert draft.cut(9, 2).tokens == [1, 2]
    assert [int(row.argmax()) for row in draft.cut(2, 9).probs or ()] == [0, 1, 2, 4]


@functools.cache
def runner_of(family: str, weights: str = "float32") -> Runner:
    return Runner(Bench(family).model(), weights=weights, native="reference", max_length=128)


def speculate(runner: Runner, draft: Any, count: int, **given: Any) -> tuple[RequestState, list[list[int]]]:
    speculator = Speculator(runner, hidden=given.pop("hidden", ()), switch_off=False)
    state = speculator.open(RequestState(PROMPT))
    for name, value in given.items():
        setattr(state, name, value)
    emitted: list[list[int]] = []
    while len(state.tokens) < count and not state.ends & set(state.tokens):
        emitted += speculator.step([state], lambda states: [draft(s) for s in states], lambda *_: None, settle)
    return state, emitted


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_trees_of_right_and_wrong_tokens_give_the_greedy_text(family: str) -> None:
    runner = runner_of(family)
    truth = runner.generate(PROMPT, max_new_tokens=40)

    def draft(state: RequestState) -> Draft:
        """The right path at depth two behind two wrong ones, and a wrong child before the right one."""
        at = truth[len(state.tokens) :]
        wrong = [(token + 1) % 300 for token in at]
        if len(at) < 3:
            return Draft(())
        return Draft([wrong[0], wrong[1], at[0], wrong[1], at[1], wrong[2]], [-1, 0, -1, 2, 2, 4])

    state, emitted = speculate(runner, draft, 40)
    assert state.tokens[:40] == truth
    # a wrong token may be right by chance where the text repeats itself
    assert [len(tokens) for tokens in emitted][:12] == [3] * 12
    assert state.past.length == len(state.ids) - 1


def test_it_stops_at_an_end_token_inside_an_accepted_path() -> None:
    runner = runner_of("llama")
    truth = runner.generate(PROMPT, max_new_tokens=12)
    end = truth[3]
    stop = truth.index(end)
    state, emitted = speculate(runner, lambda s: Draft(truth[len(s.tokens) :]), 12, ends=frozenset([end]))
    assert state.tokens == truth[: stop + 1]
    assert emitted == [truth[: stop + 1]]


def test_no_more_tokens_come_than_there_is_room_for() -> None:
    runner = runner_of("llama")
    truth = runner.generate(PROMPT, max_new_tokens=12)
    state, _ = speculate(runner, lambda s: Draft(truth[len(s.tokens) :]), 5, room=5)
    assert state.tokens == truth[:5]
    assert state.room == 0


@pytest.mark.parametrize("drawn", [False, True])
def test_two_sampled_tokens_have_the_models_joint_law(drawn: bool) -> None:
    """A tree two deep over a vocabulary of five, children chosen or drawn without replacement from a wrong drafter."""
    generator = torch.Generator().manual_seed(0)
    first, second = 1.2 * torch.randn(5, generator=generator), 1.2 * torch.randn(5, 5, generator=generator)
    drafter = torch.tensor([0.1, 0.3, 0.3, 0.2, 0.1])
    count = 6000
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(count):
        tokens, parents, probs = list[int](), list[int](), list[Tensor]()
        for parent in (-1, 0, 1):
            q = drafter.clone()
            for _ in range(2):
                q = q / q.sum()
                token = int(torch.multinomial(q, 1, generator=generator)) if drawn else int(q.argmax())
                tokens.append(token)
                parents.append(parent)
                probs.append(q.clone())
                q[token] = 0.0
        draft = Draft(tokens, parents, probs if drawn else None)
        logits = torch.stack([first, *(second[token] for token in tokens)])
        state = RequestState([0])
        state.choice = Choice((lambda _, scores: scores / 0.9,), True, generator)
        settle(state, draft, logits)
        if len(state.tokens) < 2:
            state.accept(state.choice.pick(state.ids, second[state.tokens[0]]))
        found[tuple(state.tokens[:2])] += 1
    law = (first / 0.9).softmax(-1)[:, None] * (second / 0.9).softmax(-1)
    expected = {pair: count * float(law[pair]) for pair in itertools.product(range(5), repeat=2)}
    chi2 = sum((found[pair] - n) ** 2 / n for pair, n in expected.items())
    assert chi2 < 51.2  # 0.1 % point at 24 degrees of freedom
    assert sum(abs(found[pair] - n) for pair, n in expected.items()) / (2 * count) < 0.05


def test_a_chosen_draft_leaves_sampled_text_as_it_is_with_the_same_generator() -> None:
    runner = runner_of("gemma3")
    texts = []
    for guess in ([], [3, 4, 5], list(range(60))):
        choice = Choice((lambda _, scores: scores / 4,), True, torch.Generator().manual_seed(5))
        draft = Draft(guess, [-1] * len(guess))
        texts.append(speculate(runner, lambda _, draft=draft: draft, 20, choice=choice)[0].tokens[:20])
    assert texts[0] == texts[1] == texts[2]


def test_hidden_states_are_those_of_every_token_of_the_text_in_order() -> None:
    runner = runner_of("llama")
    truth = runner.generate(PROMPT, max_new_tokens=12)
    speculator, seen = Speculator(runner, hidden=(-1,), switch_off=False), list[Tensor]()
    state = speculator.open(RequestState(PROMPT))
    while len(state.tokens) < 12:
        right = truth[len(state.tokens) :][:2]
        draft = Draft([5, *right], [-1, -1, 1][: 1 + len(right)])
        speculator.step([state], lambda _, d=draft: [d], lambda *told: seen.extend(told[2] or ()), settle)
    whole = torch.cat(seen, 1)[0]
    with torch.no_grad():
        ids = torch.tensor([state.ids[:-1]])
        expected = Bench("llama").model()(ids, output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(whole, expected, atol=2e-4, rtol=1e-4)


def test_integer_weights_verify_against_their_own_steps() -> None:
    runner = runner_of("llama", "int8")
    truth = runner.generate(PROMPT, max_new_tokens=20)

    def draft(state: RequestState) -> Draft:
        right = truth[len(state.tokens) :][:3]
        return Draft([9, *right], [-1, -1, 1, 2][: 1 + len(right)])

    state, emitted = speculate(runner, draft, 20)
    assert state.tokens[:20] == truth
    assert len(emitted) == 5


def test_a_request_that_gains_nothing_stops_guessing_and_tries_again_later() -> None:
    record, guessed = Record(), list[bool]()
    for _ in range(200):
        guessed.append(record.wants(2.0))
        record.count(Draft([1] if guessed[-1] else ()), 0, 1, guessed[-1])
    assert guessed[:TRIAL] == [True] * TRIAL
    assert guessed[TRIAL : TRIAL + FIRST_WAIT] == [False] * FIRST_WAIT
    assert 3 * TRIAL <= sum(guessed) <= 5 * TRIAL
    gaining = Record()
    for _ in range(50):
        assert gaining.wants(2.0)
        gaining.count(Draft([1, 2]), 2, 3, True)


def test_slow_drafts_are_left_off_by_the_clock_and_the_text_stays() -> None:
    import time

    runner, asked = runner_of("llama"), list[int]()
    truth = runner.generate(PROMPT, max_new_tokens=60)

    def slow(states: Any) -> list[Draft]:
        asked.append(len(states))
        time.sleep(0.05)
        return [Draft([1, 2])] * len(states)

    speculator = Speculator(runner)
    state = speculator.open(RequestState(PROMPT))
    while len(state.tokens) < 60:
        speculator.step([state], slow, lambda *_: None, settle)
    assert state.tokens[:60] == truth
    assert TRIAL <= len(asked) <= 3 * TRIAL
    assert (speculator.cost(1) or 0) > 1


def test_the_record_counts_steps_tokens_and_depths() -> None:
    record = Record()
    record.count(Draft(()), 0, 1, False)
    record.count(Draft([1, 2, 3], [-1, 0, 0]), 1, 2, True)
    record.count(Draft([1, 2, 3]), 3, 4, True)
    found = record.summary()
    assert found["tokens"] == 7
    assert found["forwards_per_token"] == pytest.approx(3 / 7)
    assert found["accepted_length"] == 3.0
    assert found["acceptance"] == [1.0, 0.5, 1.0]


@pytest.mark.parametrize("chances", [[0.9, 0.5, 0.45, 0.1], [0.2, 0.1], [0.99, 0.98, 0.97], [0.5, 0.05, 0.049]])
@pytest.mark.parametrize("slope", [0.2, 2.0, 9.0])
def test_a_guess_is_cut_where_a_token_costs_more_than_it_wins(chances: list[float], slope: float) -> None:
    pace = Pace()
    assert pace.worth(chances) == 0.0
    for tokens in (1, 1, 5, 8):
        pace.note(tokens, 10 + slope * tokens)
    assert [pace.of(tokens) for tokens in (1, 3, 20)] == pytest.approx([10 + slope * n for n in (1, 3, 20)])
    rates = [(1 + sum(chances[:n])) / (10 + slope * (1 + n)) for n in range(len(chances) + 1)]
    kept = [chance for chance in chances if chance >= pace.worth(chances)]
    assert kept == chances[: rates.index(max(rates))]


def test_steps_of_a_size_that_was_seen_cost_what_they_cost() -> None:
    """Kernels work on tiles, so cost is no straight line: three guessed tokens may be as cheap as two."""
    pace = Pace()
    for tokens, seconds in ((1, 10.0), (3, 13.0), (4, 12.0), (4, 13.0), (4, 14.0), (6, 18.0)):
        pace.note(tokens, seconds)
    assert (pace.of(4), pace.of(5), pace.of(2)) == (13.0, 15.5, 11.5)
    assert pace.worth([0.5, 0.4, 0.1, 0.09, 0.08]) == 0.1


def test_pruned_guesses_leave_the_text_alone_and_keep_their_tree() -> None:
    runner = runner_of("llama")
    truth = runner.generate(PROMPT, max_new_tokens=30)
    speculator = Speculator(runner)
    state = speculator.open(RequestState(PROMPT))
    sizes = list[int]()

    def draft(states: list[RequestState]) -> list[Draft]:
        at = truth[len(states[0].tokens) :][:3]
        wrong = [(token + 1) % 300 for token in at]
        return [Draft([*at, *wrong], [-1, 0, 1, -1, 3, 4][: 2 * len(at)], joint=[-0.1, -0.2, -0.3, -3.0, -6.0, -9.0])]

    def settling(state: RequestState, guess: Draft, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        sizes.append(len(guess.tokens))
        return settle(state, guess, logits)

    while len(state.tokens) < 27:
        # verifying a token is made out to cost a third of a step
        speculator.pace.of = lambda tokens: 3.0 + tokens  # type: ignore[method-assign]
        speculator.step(
            [state], draft, lambda *_: None, lambda s, d, o: (sizes.append(len(d.tokens)), settle(s, d, o))[1]
        )
    assert state.tokens[:27] == truth[:27]
    assert set(sizes) <= {0, 3}
    assert 3 in sizes


def test_chances_of_a_drafter_that_names_none_are_how_often_it_was_right() -> None:
    record = Record()
    for taken in (3, 3, 1, 0):
        record.count(Draft([5, 6, 7]), taken, taken + 1, True)
    assert record.chances(Draft([1, 2, 3, 4])) == pytest.approx([4 / 6, 3 / 6, 3 / 6, 1 / 4])
    assert Record().chances(Draft([1, 2])) == [0.5, 0.25]


def test_chances_are_the_drafters_own_and_then_what_was_seen() -> None:
    chances = Chances()
    logs = [math.log(p) for p in (0.5, 0.3, 0.25, 0.1)]
    draft = Draft([5, 6, 7, 8], [-1, -1, 0, 2], joint=logs)  # 7 follows 5 (one half), 8 follows 7 (0.4)
    assert chances.of(draft) == pytest.approx([0.5, 0.3, 0.25, 0.1])
    for path in ([0, 2], [0], [0, 2, 3]):
        chances.note(draft, path)
    # 5 was right in three of three, 7 alike in rank and probability in two of three, 6 never; 8 once of two
    first = (3 + 2 + 2 * 0.5) / (6 + 2)
    assert chances.of(draft) == pytest.approx([first, 0.6 / 5, first**2, first**2 * (1 + 2 * 0.4) / 4])


@pytest.mark.parametrize("grow", [(beam_tree, 4, 2, 8), (budget_tree, 4, 8, 1.0, 0.0)], ids=["beam", "budget"])
def test_a_level_below_the_floor_is_not_looked_at(grow: tuple[Any, ...]) -> None:
    make, *sizes = grow
    source = Table(torch.full((2, 2), math.log(0.5)), 0)
    make(source, *sizes, floor=math.log(0.2))
    assert [depth for *_, depth in source.asked] == [1, 2]
    make(source, *sizes, floor=math.log(0.6))
    assert len(source.asked) == 2


def test_the_floor_is_what_a_level_of_drafting_costs_in_tokens() -> None:
    speculator = Speculator(runner_of("llama"))
    assert speculator.floor == -math.inf
    state = speculator.open(RequestState(PROMPT))
    while len(state.tokens) < 12:
        speculator.step([state], lambda states: [Draft([1, 2])] * len(states), lambda *_: None, settle)
    assert -math.inf < speculator.floor < math.log(10)
    assert Speculator(speculator.runner, switch_off=False).floor == -math.inf


def test_a_copy_joins_the_tree_where_both_agree() -> None:
    ids = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    drafted = Draft([4, 9, 5], [-1, -1, 0], joint=[-0.1, -2.0, -0.5])
    joined = with_copy(drafted, ids, 3, 3)
    assert (joined.tokens, joined.tree) == ([4, 9, 5, 6], [-1, -1, 0, 2])
    assert joined.copied == [-3, 0, -4, 5]
    assert joined.joint == pytest.approx([-0.1, -2.0, -0.5, -0.5 + math.log(0.5)])
    assert with_copy(Draft((), joint=()), ids, 2, 2).tokens == [4, 5]
    assert with_copy(drafted, [1, 2, 3], 3) is drafted
    drawn = dataclasses.replace(drafted, probs=torch.zeros(3, 12))
    assert with_copy(drawn, ids, 3) is drawn


@pytest.mark.parametrize("sample", [False, True])
def test_copies_beside_a_drafter_leave_the_text_alone(sample: bool) -> None:
    runner, ids = runner_of("llama"), PROMPT * 2
    choice = lambda: Choice((lambda _, scores: scores / 3,), sample, torch.Generator().manual_seed(5))  # noqa: E731
    truth = list(runner.stream(ids, max_new_tokens=60, choice=choice()))
    speculator, copies = Speculator(runner, look_up=3), list[int]()
    state = speculator.open(RequestState(ids))
    state.choice, state.room = choice(), 60

    def settling(state: RequestState, guess: Draft, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        copies.append(sum(mark > 0 for mark in guess.copied or ()))
        return settle(state, guess, logits)

    def draft(states: list[RequestState]) -> list[Draft]:
        return [Draft([3, 4], joint=[-0.2, -0.4])] * len(states)

    while state.room:
        speculator.step([state], draft, lambda *_: None, settling)
    assert state.tokens == truth
    assert any(copies)


def test_copies_go_on_where_the_drafter_is_left_off() -> None:
    speculator = Speculator(runner_of("llama"), look_up=3)
    state = speculator.open(RequestState(PROMPT * 2))
    state.record.wait = 5
    seen = list[int]()
    for _ in range(5):
        speculator.step(
            [state],
            lambda states: pytest.fail("asked"),
            lambda *_: None,
            lambda s, d, o: (seen.append(len(d.tokens)), settle(s, d, o))[1],
        )
    assert any(seen)
    assert len(speculator.plain[1]) == 5
