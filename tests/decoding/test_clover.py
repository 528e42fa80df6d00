"""Clover against its formulas at one place after another, its alignment, its trees and its text."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError
from gossamer.decoding.clover import Clover
from gossamer.parts.decode_runner import Runner
from gossamer.parts.decode_state import BEFORE_NORM, Chunk, chain
from gossamer.parts.drafter_training import Batch, Targets
from gossamer.parts.speculation import Speculator
from gossamer.testing.bench import Bench

IDS = [7, 30, 51, 98, 200, 11, 45, 12, 8]
QUICK: dict[str, Any] = {"steps": 4, "batch_size": 2, "switch_off": False}


@functools.cache
def fitted(family: str = "llama", **options: Any) -> tuple[Any, Clover]:
    bench = Bench(family)
    model = bench.model()
    system = Clover(**QUICK, **options)
    system.fit(Bundle(model, bench.tokenizer()), bench.rows(("text",)))
    return model, system


def states_of(model: Any, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Normed and raw last states [n, d], the raw ones caught before the final norm."""
    caught: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0][0]))
    with torch.no_grad():
        h = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    hook.remove()
    return h, caught[0]


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def naive_block(block: Any, s: Tensor, e: Tensor) -> Tensor:
    """R(s, e) of one place, head by head."""
    q = block.q.weight @ rms(s, block.norm.gain) + block.q.bias
    k, v = block.k.weight @ e + block.k.bias, block.v.weight @ e + block.v.bias
    width, parts = len(s) // block.heads, []
    for head in range(block.heads):
        part = slice(head * width, (head + 1) * width)
        cosine = (q[part] @ k[part]) / (q[part].norm() * k[part].norm())
        parts.append(cosine * v[part])
    return s + torch.cat(parts)


def naive_heads(model: Any, module: Any, x: Tensor, ids: list[int], place: int, guessed: list[int]) -> list[Tensor]:
    """f of each head at ``place``, the heads from 1 on being told ``guessed``."""
    rows = model.lm_head.weight.detach()
    s = torch.stack([naive_block(module.first, x[t], rows[ids[t + 1]]) for t in range(place + 1)])[None]
    for layer in module.layers:
        s = layer(s)
    c = rms(s[0, place], module.norm.gain)
    found = [rms(module.a.weight @ c, module.norm_first.gain)]
    for token in guessed:
        c = naive_block(module.again, c, rows[token])
        found.append(rms(module.b.weight @ torch.cat((c, rows[token])), module.norm_next.gain))
    return found


def test_the_runner_gives_the_states_before_the_norm() -> None:
    for family in ("llama", "gemma3"):
        model = Bench(family).model()
        for runner in (Runner(model), Runner(model, weights="int8"), Runner(model, weights="int8", native="reference")):
            state = runner.open()
            out = runner.run([Chunk(state, IDS, chain(len(IDS)), "none")], (-1, BEFORE_NORM))[0]
            _h, x = states_of(model, IDS)
            loose = {"atol": 2e-4, "rtol": 1e-4} if runner.dtype == model.dtype and not runner.native else {}
            loose = loose if runner.plan is not None and runner.nbytes > 200_000 else {"atol": 3.0, "rtol": 0.3}
            assert out.hidden is not None
            torch.testing.assert_close(out.hidden[1], x, **loose)
            torch.testing.assert_close(runner.plan.norm(out.hidden[1]), out.hidden[0], atol=1e-4, rtol=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_teacher_forcing_and_drafting_give_the_formulas(family: str) -> None:
    model, system = fitted(family, heads=4)
    module: Any = system.module
    h, x = states_of(model, IDS)
    with torch.no_grad():
        taught = system._taught(module, x[None], torch.tensor([IDS]))
        for place in (0, 3):
            wanted = naive_heads(model, module, x, IDS, place, IDS[place + 2 : place + 5])
            for i, expected in enumerate(wanted):
                torch.testing.assert_close(taught[i][0, place], expected, atol=2e-4, rtol=1e-3)
        state = system.open(model, IDS)
        state.past.length = 3
        state.observe(torch.stack((h, x))[:, :3])
        state.prompt = IDS[:4]
        system.source(state)  # takes in three places
        state.prompt, state.past.length = IDS, len(IDS) - 1
        state.observe(torch.stack((h, x))[:, 3:-1])
        source: Any = system.source(state)
        expected = naive_heads(model, module, x, IDS, len(IDS) - 2, [40, 41, 42])
        tables = [source.root(), source.expand([-1, -1], [9, 40], 1)[1]]
        tables += [source.expand([1, 0], [41, 9], 2)[0], source.expand([2], [42], 3)[0]]
        for table, f in zip(tables, expected, strict=True):
            torch.testing.assert_close(table, system.reading(f).log_softmax(-1), atol=3e-4, rtol=1e-3)


def test_loss_sums_feature_and_token_terms_with_decay() -> None:
    model, system = fitted(heads=3, labels="base_soft")
    module: Any = system.module
    h, x = states_of(model, IDS)
    ids = torch.tensor([IDS])
    batch = Batch(ids, torch.ones_like(ids).bool(), torch.stack((h, x))[:, None])
    base = system.reading(h).softmax(-1)
    scale, total = float(module.scale), torch.zeros(())
    for i, f in enumerate(system._taught(module, x[None], ids)):
        each = []
        for t in range(len(IDS) - 1 - i):
            feature = F.smooth_l1_loss(f[0, t] / scale, h[t + 1 + i] / scale)
            token = -(base[t + 1 + i] * system.reading(f[0, t]).log_softmax(-1)).sum()
            # the last label would need the token after the text
            each.append((feature, token if t < len(IDS) - 2 - i else None))
        tokens = [token for _, token in each if token is not None]
        total = total + 0.7**i * (10 * torch.stack([f for f, _ in each]).mean() + torch.stack(tokens).mean())
    found = system.loss(module, batch, Targets(batch, h[None], "base_soft", system.reading))
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-4)


def test_it_starts_near_the_base() -> None:
    """Before training the blocks add next to nothing, and norms, layers and maps are the base's own."""
    model, system = fitted()
    module: Any = system._seeded(model)
    h, x = states_of(model, IDS)
    assert module.b.weight[:, :64].equal(torch.eye(64))
    assert not module.b.weight[:, 64:].any()
    layer, base = module.layers[1], model.model.layers[-1]
    torch.testing.assert_close(layer.qkv.weight[:64], base.self_attn.q_proj.weight)
    torch.testing.assert_close(layer(x[None])[0], base_layer(model, x), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(module.norm(x), h, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def base_layer(model: Any, x: Tensor) -> Tensor:
    n = len(x)
    positions = torch.arange(n)[None]
    mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
    angles = model.model.rotary_emb(x[None], positions)
    out = model.model.layers[-1](x[None], attention_mask=mask, position_embeddings=angles)
    return (out[0] if isinstance(out, tuple) else out)[0]


def test_every_head_learns_a_cycle() -> None:
    """Off by one anywhere between training and drafting would show here."""
    model, tokenizer = Bench().model(), Bench().tokenizer()
    rows = [{"text": "One two one two one two one two one two one two one two one two"}] * 4
    system = Clover(steps=80, batch_size=4, labels="text", heads=4, feat_weight=0.0, switch_off=False)
    system.fit(Bundle(model, tokenizer), rows)
    ids = tokenizer(rows[0]["text"])["input_ids"]
    half = ids[: len(ids) // 2]
    h, x = states_of(model, half)
    state = system.open(model, half)
    state.observe(torch.stack((h, x))[:, :-1])
    state.past.length = len(half) - 1
    draft = system.draft([state], 20)[0]
    best, at = [], -1
    while at in draft.tree:
        at = draft.tree.index(at)
        best.append(draft.tokens[at])
    assert best == ids[len(half) : len(half) + 4]


def test_without_regression_heads_do_not_depend_on_what_was_guessed() -> None:
    model, system = fitted(regressive=False)
    state = system.open(model, IDS)
    system.step(model, [state])
    source = system.source(state)
    source.root()
    first, second = source.expand([-1, -1], [9, 40], 1)
    assert first.equal(second)
    other = fitted()[1]
    state = other.open(model, IDS)
    other.step(model, [state])
    first, second = other.source(state).expand([-1, -1], [9, 40], 1)
    assert not first.allclose(second)


def test_the_context_layers_remember_only_accepted_places() -> None:
    model, system = fitted("gemma3")
    state = system.open(model, IDS)
    while len(state.tokens) < 20:
        system.step(model, [state])
        system.draft([state], 20)
        assert [memory.length for memory in state.memories] == [state.past.length] * 2
        assert state.memories[0].used == state.past.length


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize(
    "options", [{}, {"budget": 4}, {"tree": "static"}, {"tree": "eagle2"}, {"layers": 0}, {"version": 1}]
)
def test_greedy_text_is_the_models_own(family: str, options: dict[str, Any]) -> None:
    model, system = fitted(family, **options)
    plain = model.generate(torch.tensor([IDS]), max_new_tokens=24, do_sample=False)[0, len(IDS) :].tolist()
    done = system.generate(model, None, {"input_ids": torch.tensor([IDS])}, max_new_tokens=24)
    assert done.tokens == [plain]
    assert done.reports[0]["guessing_steps"] > 0
    assert done.reports[0]["drafted"] <= system.draft_tokens * done.reports[0]["guessing_steps"]


def test_a_base_that_hides_its_last_states_is_refused() -> None:
    model = Bench().model()
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="before its final norm"):
        Clover().fit(Bundle(model, Bench().tokenizer()), Bench().rows(("text",)))


def test_switch_off_stops_guessing_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step costs is set here: on a busy machine measured seconds of so small a model say anything."""
    monkeypatch.setattr(Speculator, "cost", lambda *_: 10.0)
    model, _ = fitted()
    system = Clover(**{**QUICK, "switch_off": True})
    system.fit(Bundle(model, Bench().tokenizer()), Bench().rows(("text",)))
    done = system.generate(model, None, {"input_ids": torch.tensor([IDS])}, max_new_tokens=60)
    assert 0 < done.reports[0]["guessing_steps"] < done.reports[0]["forwards"] - 16
