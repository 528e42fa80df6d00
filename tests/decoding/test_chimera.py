"""Chimera against a loop over places, its traps, and its text."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError, OptionError
from gossamer.decoding.chimera import Chimera
from gossamer.parts.drafter_training import Batch, Targets
from gossamer.parts.speculation import Speculator
from gossamer.testing.bench import Bench

IDS = [7, 30, 51, 98, 200, 11, 45, 12]
QUICK: dict[str, Any] = {"steps": 4, "batch_size": 2, "switch_off": False}


@functools.cache
def fitted(family: str = "llama", **options: Any) -> tuple[Any, Chimera]:
    bench = Bench(family)
    model = bench.model()
    system = Chimera(**QUICK, **options)
    system.fit(Bundle(model, bench.tokenizer()), bench.rows(("text",)))
    return model, system


@torch.no_grad()
def states_of(model: Any, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]


def naive_layer(layer: Any, rows: Tensor, places: list[int]) -> Tensor:
    """The layer's output at the last of ``rows`` [n, d] at ``places``, which sees all of them."""
    s = layer.shape
    x = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6) * layer.before_attention.gain
    qkv = (x @ layer.qkv.weight.T).view(len(rows), -1, s.head_dim)

    def turned(part: Tensor) -> Tensor:
        half = s.head_dim // 2
        out = part.clone()
        for n, place in enumerate(places):
            for i, frequency in enumerate(s.frequencies):
                c, d = torch.cos(torch.tensor(place * frequency)), torch.sin(torch.tensor(place * frequency))
                a, b = part[n, :, i], part[n, :, i + half]
                out[n, :, i], out[n, :, i + half] = a * c - b * d, b * c + a * d
        return out

    q, k = turned(qkv[:, : s.heads]), turned(qkv[:, s.heads : s.heads + s.kv_heads])
    v = qkv[:, s.heads + s.kv_heads :]
    heads = []
    for head in range(s.heads):
        own = head // (s.heads // s.kv_heads)
        weights = ((k[:, own] @ q[-1, head]) * s.head_dim**-0.5).softmax(0)
        heads.append(weights @ v[:, own])
    a = rows[-1] + layer.out.weight @ torch.cat(heads)
    y = a * torch.rsqrt(a.pow(2).mean() + 1e-6) * layer.before_feed.gain
    gate, value = (layer.up.weight @ y).chunk(2)
    return a + layer.down.weight @ (F.silu(gate) * value)


def naive_heads(model: Any, system: Chimera, ids: list[int], h: Tensor, guessed: list[int]) -> list[Tensor]:
    """z of each head after ``ids`` (n + 1 tokens, of which h holds n states), the path ``guessed`` being drafted."""
    module: Any = system.module
    rows, n, found = h[: len(ids) - 1], len(ids) - 1, []
    text = [*ids, *guessed]
    for k in range(system.config.heads):
        last = n + k
        gram = [text[max(0, last - 2)], text[max(0, last - 1)], text[last]]
        e = model.get_input_embeddings()(torch.tensor(gram)).flatten()
        first, _, second = module.encoder
        g = second.weight @ F.silu(first.weight @ e + first.bias)
        u = naive_layer(module.layer, torch.cat((rows, g[None])), list(range(last + 1)))
        found.append(module.heads[k].weight @ torch.cat((h[n - 1], u)))
        rows = torch.cat((rows, u[None]))
    return found


def test_drafting_and_training_give_the_formulas_for_every_place() -> None:
    model, system = fitted()
    module: Any = system.module
    h = states_of(model, IDS)
    with torch.no_grad():
        found = module.unrolled(torch.tensor([IDS]), h[None], system._best)
        for place in (0, 1, 4, len(IDS) - 2):
            guessed = [int(system._best(z[0, place])) for z, _ in found]
            wanted = naive_heads(model, system, IDS[: place + 2], h, guessed)
            for (z, _), expected in zip(found, wanted, strict=True):
                torch.testing.assert_close(z[0, place], expected, atol=2e-4, rtol=1e-4)
        state = system.open(model, IDS)
        state.observe(h[None, : len(IDS) - 1])
        state.past.length = len(IDS) - 1
        source: Any = system.source(state)
        expected = naive_heads(model, system, IDS, h, [40, 41, 42])
        tables = [source.root()]
        # wrong siblings run beside the path and must not be seen by it
        for depth, tokens in enumerate(([9, 40], [8, 41], [7, 42]), 1):
            tables.append(source.expand([2 * depth - 3] * 2 if depth > 1 else [-1] * 2, tokens, depth)[1])
        for table, z in zip(tables, expected, strict=True):
            torch.testing.assert_close(table, system.reading(z).log_softmax(-1), atol=3e-4, rtol=1e-4)


def test_loss_and_gradients_are_those_of_a_loop_over_heads_and_places() -> None:
    model, system = fitted(mse_weight=0.5, labels="text")
    module: Any = system.module
    h = states_of(model, IDS)
    batch = Batch(torch.tensor([IDS]), torch.ones(1, len(IDS), dtype=torch.bool), h[None, None])
    loss = system.loss(module, batch, Targets(batch, h[None], "text", system.reading))
    loss.backward()
    gradient = module.encoder[0].weight.grad.clone()
    module.zero_grad()
    found = module.unrolled(torch.tensor([IDS]), h[None], system._best)
    total = torch.zeros(())
    for k, (z, u) in enumerate(found, 1):
        places = range(len(IDS) - 1 - k)
        nll = [F.cross_entropy(system.reading(z[0, i]), torch.tensor(IDS[i + 1 + k])) for i in places]
        gaps = [(u[0, i] - h[i + k]).pow(2).mean() for i in range(len(IDS) - k)]
        total = total + torch.stack(nll).mean() + 0.5 * torch.stack(gaps).mean()
    total.backward()
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(gradient, module.encoder[0].weight.grad)
    module.zero_grad()


def test_u_of_earlier_steps_is_seen_but_not_trained_through() -> None:
    model, system = fitted()
    module: Any = system.module
    h = states_of(model, IDS)[None].requires_grad_()
    ids = torch.tensor([IDS])
    guessed = iter([torch.full((1, 7), token) for token in (3, 4, 5)])
    (z1, _), (z2, _), *_ = module.unrolled(ids, h, lambda _: next(guessed))
    with torch.no_grad():
        module.encoder[2].weight.mul_(1.5)
    guessed = iter([torch.full((1, 7), token) for token in (3, 4, 5)])
    moved = module.unrolled(ids, h, lambda _: next(guessed))
    assert not moved[1][0].allclose(z2)
    with torch.no_grad():
        module.encoder[2].weight.div_(1.5)
    assert not z1.allclose(z2)


def test_heads_share_the_models_own_matrix_and_start_as_the_sum_of_both_readings() -> None:
    model, system = fitted("gemma3")
    assert system.state is not None
    vocabulary = model.config.vocab_size
    assert all(vocabulary not in tensor.shape for tensor in system.state.tensors.values())
    module: Any = system._seeded(model)
    h, u = torch.randn(2, 64), torch.randn(2, 64)
    torch.testing.assert_close(module.head(2, h, u), h + u)
    # Gemma's scale belongs to its embedding
    e = model.get_input_embeddings()(torch.tensor([[4, 5, 6]])).flatten(-2)
    torch.testing.assert_close(module.encode(torch.tensor([4, 5, 6])), module.encoder(e)[0])


def test_the_residual_encoder_starts_as_a_plain_projection() -> None:
    model, system = fitted(encoder="residual")
    module: Any = system._seeded(model)
    e = model.get_input_embeddings()(torch.tensor([4, 5, 6])).flatten()
    torch.testing.assert_close(module.encode(torch.tensor([4, 5, 6])), module.encoder[1](e))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"tree": "beam"}, {"full_context": False}, {"draft_vocab": 40}])
def test_greedy_text_is_the_models_own(family: str, options: dict[str, Any]) -> None:
    model, system = fitted(family, **options)
    plain = model.generate(torch.tensor([IDS]), max_new_tokens=30, do_sample=False)[0, len(IDS) :].tolist()
    done = system.generate(model, None, {"input_ids": torch.tensor([IDS])}, max_new_tokens=30)
    assert done.tokens == [plain]
    assert done.reports[0]["guessing_steps"] > 0


def test_a_learnt_cycle_is_drafted_to_the_full_depth() -> None:
    """Off by one anywhere between training and drafting would show here."""
    model, rows = Bench().model(), [{"text": "One two one two one two one two one two one two"}] * 4
    system = Chimera(steps=60, batch_size=4, labels="text", switch_off=False)
    tokenizer = Bench().tokenizer()
    system.fit(Bundle(model, tokenizer), rows)
    ids = tokenizer(rows[0]["text"])["input_ids"]
    half = ids[: len(ids) // 2]
    state = system.open(model, half)
    state.observe(states_of(model, half)[None, :-1])
    state.past.length = len(half) - 1
    draft = system.draft([state], 25)[0]
    best, at = [], -1
    for _ in range(4):
        at = draft.tree.index(at)
        best.append(draft.tokens[at])
    assert best == ids[len(half) : len(half) + 4]


def test_a_restricted_vocabulary_drafts_only_its_tokens() -> None:
    model, system = fitted(draft_vocab=40)
    assert system.state is not None
    allowed = set(system.state.tensors["vocabulary"].tolist())
    assert len(allowed) == 40
    state = system.open(model, IDS)
    system.step(model, [state])
    assert set(system.draft([state], 25)[0].tokens) <= allowed


def test_a_rewound_and_a_forked_request_go_on_as_the_text_does() -> None:
    model, system = fitted()
    plain = model.generate(torch.tensor([IDS]), max_new_tokens=24, do_sample=False)[0, len(IDS) :].tolist()
    state = system.open(model, IDS)
    while len(state.tokens) < 10:
        system.step(model, [state])
    twin = state.fork()
    state.rewind(5)
    for one in (state, twin):
        while len(one.tokens) < 24:
            system.step(model, [one])
        assert one.tokens[:24] == plain
    assert state.memories[0].length <= state.past.length


def test_switch_off_stops_guessing_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step costs is set here: on a busy machine measured seconds of so small a model say anything."""
    monkeypatch.setattr(Speculator, "cost", lambda *_: 10.0)
    model, _ = fitted()
    system = Chimera(**{**QUICK, "switch_off": True})
    system.fit(Bundle(model, Bench().tokenizer()), Bench().rows(("text",)))
    done = system.generate(model, None, {"input_ids": torch.tensor([IDS])}, max_new_tokens=60)
    assert 0 < done.reports[0]["guessing_steps"] < done.reports[0]["forwards"] - 16


def test_other_models_and_too_long_windows_are_refused() -> None:
    model, system = fitted()
    with pytest.raises(InputError, match="draft for the model that it was fitted on"):
        system.drafter(Bench("gemma3").model())
    with pytest.raises(InputError, match="be fitted first"):
        Chimera().drafter(model)
    with pytest.raises(OptionError, match="be at most the base's 256 tokens"):
        Chimera(length=1000).fit(Bundle(model, Bench().tokenizer()), [{"text": "a b c d e f"}])
