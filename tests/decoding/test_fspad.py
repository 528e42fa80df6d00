"""FSPAD against its formulas at one place after another, its two halves, its tree and its text."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError, OptionError
from gossamer.decoding.fspad import FSPAD
from gossamer.parts.drafter_training import Batch, Targets
from gossamer.parts.speculation import Speculator
from gossamer.testing.bench import Bench

IDS = [7, 30, 51, 98, 200, 11, 45, 12, 8]
QUICK: dict[str, Any] = {"steps": 4, "batch_size": 2, "switch_off": False, "total_tokens": 20, "top_k": 4}


@functools.cache
def fitted(family: str = "llama", **options: Any) -> tuple[Any, FSPAD]:
    bench = Bench(family)
    model = bench.model()
    system = FSPAD(**{**QUICK, **options})
    system.fit(Bundle(model, bench.tokenizer()), bench.rows(("text",)))
    return model, system


@torch.no_grad()
def states_of(model: Any, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def naive(model: Any, module: Any, f: list[Tensor], tokens: list[int]) -> tuple[Tensor, Tensor]:
    """p and r at the last of places 0.., with features ``f`` and the tokens that follow each."""
    rows = []
    for feature, token in zip(f, tokens, strict=True):
        e = model.get_input_embeddings()(torch.tensor([token]))[0]
        z = module.fc.weight @ torch.cat((e, feature)) + module.fc.bias
        s = module.sampling
        rows.append(z + s.down.weight @ (F.silu(s.gate.weight @ e) * (s.up.weight @ rms(z, s.norm.gain))))
    x, layer = torch.stack(rows), module.layer
    shape, n = layer.shape, len(rows)
    qkv = (x @ layer.qkv.weight.T).view(n, -1, shape.head_dim)
    angles = torch.arange(n)[:, None] * torch.tensor(shape.frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    half = shape.head_dim // 2

    def rotated(part: Tensor, norm: Any) -> Tensor:
        part = norm(part)
        turned = torch.complex(part[..., :half], part[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    q = rotated(qkv[:, : shape.heads], layer.q_norm)[-1]
    k = rotated(qkv[:, shape.heads : shape.heads + shape.kv_heads], layer.k_norm)
    v = qkv[:, shape.heads + shape.kv_heads :]
    group = shape.heads // shape.kv_heads
    heads = [((k[:, i // group] @ q[i]) * shape.scale).softmax(0) @ v[:, i // group] for i in range(shape.heads)]
    a = x[-1] + layer.out.weight @ torch.cat(heads)
    gate, value = (layer.up.weight @ rms(a, layer.before_feed.gain)).chunk(2)
    act = F.silu(gate) if shape.act == "silu" else F.gelu(gate, approximate="tanh")
    out = torch.cat((a, a)) + layer.down.weight @ (act * value)
    return out[: len(a)], out[len(a) :]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_drafting_feeds_back_r_and_reads_p(family: str) -> None:
    model, system = fitted(family)
    module: Any = system.module
    f = list(states_of(model, IDS))
    with torch.no_grad():
        state = system.open(model, IDS)
        # three places first, the newly accepted ones later, with their true features
        state.past.length, state.prompt = 3, IDS[:4]
        state.observe(torch.stack(f)[None, :3])
        system.source(state)
        state.past.length, state.prompt = len(IDS) - 1, IDS
        state.observe(torch.stack(f)[None, 3:-1])
        source: Any = system.source(state)
        tables = [source.root(), source.expand([-1, -1], [9, 40], 1)[1]]
        tables += [source.expand([1, 0], [41, 9], 2)[0], source.expand([2], [42], 3)[0]]
        known = f[:-1]
        for depth, table in enumerate(tables):
            p, r = naive(model, module, known, [*IDS[1:], 40, 41, 42][: len(known)])
            torch.testing.assert_close(table, system.reading(p).log_softmax(-1), atol=5e-4, rtol=1e-3)
            known = [*known, r]
            assert len(known) == len(IDS) + depth


def test_the_loss_is_of_r_for_features_and_of_p_for_tokens() -> None:
    model, system = fitted(noise=0.0, labels="base_soft")
    module: Any = system.module
    h, ids = states_of(model, IDS), torch.tensor([IDS])
    batch = Batch(ids, torch.ones_like(ids).bool(), h[None, None])
    features, tokens = [], []
    base = system.reading(h).softmax(-1)
    for t in range(len(IDS) - 1):
        p, r = naive(model, module, list(h[: t + 1]), IDS[1 : t + 2])
        features.append(F.smooth_l1_loss(r, h[t + 1]))
        if t < len(IDS) - 2:
            tokens.append(-(base[t + 1] * system.reading(p).log_softmax(-1)).sum())
    expected = torch.stack(features).mean() + 0.1 * torch.stack(tokens).mean()
    found = system.loss(module, batch, Targets(batch, h[None], "base_soft", system.reading))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    (wanted,) = torch.autograd.grad(expected, module.fc.weight)
    (gradient,) = torch.autograd.grad(found, module.fc.weight)
    torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-3)


def test_noise_is_on_the_inputs_and_not_on_the_targets() -> None:
    model, system = fitted(noise=5.0)
    module: Any = system.module
    h, ids = states_of(model, IDS), torch.tensor([IDS])
    batch = Batch(ids, torch.ones_like(ids).bool(), h[None, None])
    before = batch.states.clone()
    targets = Targets(batch, h[None], "text", system.reading)
    found = {float(system.loss(module, batch, targets).detach()) for _ in range(3)}
    assert len(found) == 3
    assert batch.states.equal(before)


def test_switches_off_leave_eagle() -> None:
    model, system = fitted(fs=False, pad=False)
    module: Any = system.module
    p, r = module.halves(torch.randn(2, 64))
    assert p is r
    e = model.get_input_embeddings()(torch.tensor([5]))
    torch.testing.assert_close(module.mix(torch.tensor([5]), e), module.fc(torch.cat((e, e), -1)))
    assert fitted()[1].module.layer.down.weight.shape[0] == 128
    assert fitted(fs=False, pad=False, feed_factor=4 / 3)[1].module.layer.down.weight.shape == (64, 171)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"pad": False}, {"fs": False}, {"draft_vocab": 40}])
def test_greedy_text_is_the_models_own(family: str, options: dict[str, Any]) -> None:
    model, system = fitted(family, **options)
    plain = model.generate(torch.tensor([IDS]), max_new_tokens=24, do_sample=False)[0, len(IDS) :].tolist()
    done = system.generate(model, None, {"input_ids": torch.tensor([IDS])}, max_new_tokens=24)
    assert done.tokens == [plain]
    assert done.reports[0]["guessing_steps"] > 0


def test_a_learnt_cycle_is_drafted_to_the_full_depth() -> None:
    model, tokenizer = Bench().model(), Bench().tokenizer()
    rows = [{"text": "One two one two one two one two one two one two one two one two"}] * 4
    system = FSPAD(steps=150, batch_size=4, labels="text", w_tok=1.0, noise=0.0, rate=3e-3, switch_off=False)
    system.fit(Bundle(model, tokenizer), rows)
    ids = tokenizer(rows[0]["text"])["input_ids"]
    half = ids[: len(ids) // 2]
    state = system.open(model, half)
    state.observe(states_of(model, half)[None, :-1])
    state.past.length = len(half) - 1
    draft = system.draft([state], 59)[0]
    best, at = [], -1
    for _ in range(3):
        at = draft.tree.index(at)
        best.append(draft.tokens[at])
    assert best == ids[len(half) : len(half) + 3]


def test_more_tokens_than_there_are_places_and_active_dropout_are_refused() -> None:
    model, _system = fitted()
    with pytest.raises(OptionError, match="be at most 6, the tokens that depth 2 and top_k 2 see"):
        FSPAD(depth=2, top_k=2, total_tokens=7).fit(Bundle(model, Bench().tokenizer()), Bench().rows(("text",)))
    gpt2, other = fitted("gpt2")
    gpt2.train()
    other._checked = None
    with pytest.raises(InputError, match="get a model without dropout"):
        other.open(gpt2, IDS)
    gpt2.eval()
    assert other.open(gpt2, IDS)


def test_switch_off_stops_guessing_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step costs is set here: on a busy machine measured seconds of so small a model say anything."""
    monkeypatch.setattr(Speculator, "cost", lambda *_: 10.0)
    model, _ = fitted()
    system = FSPAD(**{**QUICK, "switch_off": True})
    system.fit(Bundle(model, Bench().tokenizer()), Bench().rows(("text",)))
    done = system.generate(model, None, {"input_ids": torch.tensor([IDS])}, max_new_tokens=60)
    assert 0 < done.reports[0]["guessing_steps"] < done.reports[0]["forwards"] - 16
