"""What drafters learn from: captured states, labels at their places, restricted vocabularies."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gossamer.core.bundle import Bundle
from gossamer.decoding.clover import Clover
from gossamer.decoding.medusa import Medusa
from gossamer.parts.decode_native import NativeLinear
from gossamer.parts.decode_runner import Runner
from gossamer.parts.draft_layer import Memory
from gossamer.parts.drafter_training import Batch, Reading, Targets, capture, frequent
from gossamer.testing.bench import Bench

IDS = [7, 30, 51, 98, 200, 11]


def test_captured_states_are_those_of_one_pass_over_each_row() -> None:
    bench = Bench("gemma3")
    model, tokenizer = bench.model(), bench.tokenizer()
    rows = bench.rows(("text",)) * 3
    windows = capture(Runner(model), rows, tokenizer, length=20, hidden=(-1, 1), where="test")
    assert len(windows) == len(rows)
    assert max(len(window.ids) for window in windows) == 20
    for window in windows[:4]:
        with torch.no_grad():
            out = model(torch.tensor([window.ids]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(window.states, torch.stack((out[-1][0], out[1][0])), atol=2e-4, rtol=1e-4)
        assert window.counts == [False] + [True] * (len(window.ids) - 1)


def test_only_answers_count_in_completions() -> None:
    bench = Bench()
    rows = [{"prompt": "Two and two is", "completion": " four, as is known"}]
    (window,) = capture(Runner(bench.model()), rows, bench.tokenizer(), length=64, hidden=(-1,), where="test")
    answer = bench.tokenizer()(" four, as is known")["input_ids"]
    start = len(window.ids) - len(answer) - 1
    assert window.counts == [False] * start + [True] * (len(answer) + 1)


def test_each_sort_of_label_is_compared_at_its_shift() -> None:
    model = Bench().model()
    reading = Reading(model)
    h = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([[False, True, True, True, False, True]])
    batch = Batch(torch.tensor([IDS]), counts, h[None])
    logits = torch.randn(1, 6, 320, generator=torch.Generator().manual_seed(1))
    base = model.lm_head(h[0]).detach()
    for shift in (0, 2):
        places = [i for i in range(5 - shift) if counts[0, i + shift + 1]]
        text = [F.cross_entropy(logits[0, i], torch.tensor(IDS[i + shift + 1])) for i in places]
        best = [F.cross_entropy(logits[0, i], base[i + shift].argmax()) for i in places]
        soft = [-(base[i + shift].softmax(-1) * logits[0, i].log_softmax(-1)).sum() for i in places]
        for labels, expected in (("text", text), ("base_argmax", best), ("base_soft", soft)):
            found = Targets(batch, h, labels, reading).loss(logits, shift)
            torch.testing.assert_close(found, torch.stack(expected).mean())


def test_a_restricted_vocabulary_leaves_out_tokens_that_it_lacks() -> None:
    model = Bench().model()
    few = torch.tensor([7, 51, 98, 200])
    reading = Reading(model, few)
    batch = Batch(torch.tensor([IDS]), torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, 1, 6, 64))
    logits = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1))
    expected = [F.cross_entropy(logits[0, i], torch.tensor(column)) for i, column in ((1, 1), (2, 2), (3, 3))]
    found = Targets(batch, batch.states[0], "text", reading).loss(logits, 0)
    torch.testing.assert_close(found, torch.stack(expected).mean())
    assert reading.tokens(torch.tensor([3, 0])).tolist() == [200, 7]


def test_frequent_tokens_come_first_and_unseen_ones_fill_up() -> None:
    bench = Bench()
    rows = [{"text": "one two one two one two"}]
    windows = capture(Runner(bench.model()), rows, bench.tokenizer(), length=64, hidden=(-1,), where="test")
    seen = set(windows[0].ids)
    found = frequent(windows, len(seen) + 5, 320)
    assert found is not None
    assert len(found) == len(seen) + 5
    assert seen <= set(found.tolist())
    assert found.tolist() == sorted(found.tolist())
    assert frequent(windows, None, 320) is frequent(windows, 320, 320) is None


def test_a_drafter_learns_from_the_runner_that_it_was_bound_to() -> None:
    bench = Bench()
    bundle = Bundle(bench.model(), bench.tokenizer())
    found = []
    for weights in ("float32", "int8"):
        system = Medusa(steps=3, batch_size=2)
        system.bind(bundle.model, weights=weights, native="reference")
        system.fit(bundle, bench.rows(("text",)))
        assert system.state is not None
        found.append(system.state.values["first_loss"])
    assert found[0] != found[1]
    assert abs(found[0] - found[1]) < 0.1 * found[0]


def test_a_memory_forgets_drafts_and_a_fork_is_its_own() -> None:
    memory, rows = Memory(), torch.arange(200.0).view(100, 1, 2)
    memory.add(rows[:3], rows[:3], settle=True)
    memory.add(rows[50:52], rows[50:52], settle=False)
    assert (memory.length, memory.used) == (3, 5)
    twin = memory.fork()
    memory.add(rows[3:80], rows[3:80], settle=True)
    assert memory.entries()[0].equal(rows[:80])
    assert twin.entries()[0].equal(torch.cat((rows[:3], rows[50:52])))
    memory.crop(2)
    assert memory.entries()[1].equal(rows[:2])


def test_beside_integers_drafters_run_on_the_kernels_and_the_text_stays() -> None:
    bench = Bench("llama")
    model, tokenizer = bench.model(), bench.tokenizer()
    system = Clover(heads=2, layers=1, steps=2, batch_size=2, length=16, draft_vocab=64, switch_off=False)
    runner = system.bind(model, weights="int8").runner
    system.fit(Bundle(model, tokenizer), bench.rows(("text",)))
    kinds = {type(part) for part in system.module.modules()} & {NativeLinear, torch.nn.Linear}
    assert kinds == {NativeLinear if runner.native else torch.nn.Linear}
    ids = tokenizer("The quick brown fox")["input_ids"]
    state = system.open(model, ids)
    state.room = 12
    while state.room:
        system.step(model, [state])
    assert state.record.guesses
    assert state.tokens == runner.generate(ids, max_new_tokens=12)
