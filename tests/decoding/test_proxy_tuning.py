"""Proxy-tuning against a naive sum of logits without caches, its limit cases, prompts of the expert's own, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError
from gossamer.decoding.proxy_tuning import ProxyTuning
from gossamer.parts.scorer import perplexity

WORDS = ["<pad>", "<end>", "<unk>", *(f"w{n}" for n in range(37))]
VOCABULARY = len(WORDS)
PROMPTS = [[5, 9, 20, 7, 11, 30], [8, 4], [6, 31, 12]]


def llama(seed: int, hidden: int = 16, vocabulary: int = VOCABULARY, layers: int = 1) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokenizer(words: Sequence[str] = WORDS) -> Any:
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


@pytest.fixture(scope="module")
def trio() -> dict[str, Any]:
    return {"base": llama(0, 32, layers=2), "expert": llama(1), "anti": llama(2)}


def proxy(trio: dict[str, Any], *, seed: int = 0, **options: Any) -> ProxyTuning:
    companions = {"expert": trio["expert"], "anti": trio["anti"]}
    return ProxyTuning(**{"anti_expert": "anti", **options}, companions=companions, seed=seed)


@torch.no_grad()
def naive(trio: dict[str, Any], ids: Sequence[int], alpha: float, expert_ids: Sequence[int] | None = None) -> Any:
    """softmax( s_M + alpha (s_M+ - s_M-) ) before the softmax, at the last position; no caches."""

    def logits(name: str, tokens: Sequence[int]) -> torch.Tensor:
        return trio[name](input_ids=torch.tensor([list(tokens)])).logits[0, -1]

    return logits("base", ids) + alpha * (logits("expert", expert_ids or ids) - logits("anti", ids))


def run(step: Callable[[list[int]], int], ids: Sequence[int], count: int, end: int = 1) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count and end not in tokens:
        tokens.append(step([*ids, *tokens]))
    return tokens


def padded(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_greedy_in_a_padded_batch_with_finished_rows_equals_the_naive_sum(trio: dict[str, Any], alpha: float) -> None:
    expected = [run(lambda ids: int(naive(trio, ids, alpha).argmax()), prompt, 14) for prompt in PROMPTS]
    system = proxy(trio, alpha=alpha)
    assert system.generate(trio["base"], None, padded(PROMPTS), max_new_tokens=14).tokens == expected
    assert expected != [run(lambda ids: int(naive(trio, ids, 0).argmax()), prompt, 14) for prompt in PROMPTS]


def test_a_finished_row_does_not_disturb_the_others(trio: dict[str, Any]) -> None:
    alone, other = (run(lambda ids: int(naive(trio, ids, 1).argmax()), prompt, 14, end=-1) for prompt in PROMPTS[:2])
    end = next(token for token in other if token not in alone)
    system = proxy(trio)
    done = system.generate(trio["base"], None, padded(PROMPTS[:2]), max_new_tokens=14, eos_token_id=end).tokens
    assert done == [alone, other[: other.index(end) + 1]]


def test_sampling_with_the_same_seed_equals_the_naive_sum(trio: dict[str, Any]) -> None:
    torch.manual_seed(7)

    def step(ids: list[int]) -> int:
        scores = naive(trio, ids, 1.0) / 0.8
        scores[11] = -torch.inf
        kept = scores.sort(descending=True)
        cut = kept.values.softmax(-1).cumsum(-1) - kept.values.softmax(-1) > 0.9
        scores[kept.indices[cut]] = -torch.inf
        return int(torch.multinomial(scores.softmax(-1), 1))

    expected = run(step, PROMPTS[0], 12)
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "suppress_tokens": [11]}
    found = proxy(trio, seed=7).generate(trio["base"], None, padded(PROMPTS[:1]), max_new_tokens=12, **options)
    assert found.tokens == [expected]


def test_beams_equal_the_naive_search(trio: dict[str, Any]) -> None:
    width, length = 3, 7

    def naive_beams(prompt: list[int]) -> list[int]:
        beams = [(0.0, prompt)]
        for _ in range(length):
            grown = []
            for total, ids in beams:
                scores = naive(trio, ids, 1.0).log_softmax(-1)
                scores[1] = -torch.inf
                grown += [(total + float(value), [*ids, token]) for token, value in enumerate(scores)]
            beams = sorted(grown, reverse=True)[:width]
        return beams[0][1][len(prompt) :]

    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[2]]
    options: dict[str, Any] = {"max_new_tokens": length, "num_beams": width, "suppress_tokens": [1]}
    found = proxy(trio).generate(trio["base"], None, padded(prompts), **options).tokens
    assert found == [naive_beams(prompt) for prompt in prompts]
    processor = proxy(trio).processor(trio["base"], attention_mask=padded(prompts)["attention_mask"], beams=width)
    out = trio["base"].generate(**padded(prompts), logits_processor=[processor], do_sample=False, **options)
    assert out[:, len(prompts[0]) :].tolist() == found


def test_alpha_0_and_twin_experts_are_the_base_token_for_token(trio: dict[str, Any]) -> None:
    base, inputs = trio["base"], padded(PROMPTS)
    plain = base.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    plain = [row[: row.index(1) + 1] if 1 in row else row for row in plain]
    assert proxy(trio, alpha=0.0).generate(base, None, inputs, max_new_tokens=12).tokens == plain
    twins = {**trio, "anti": copy.deepcopy(trio["expert"])}
    with pytest.warns(UserWarning, match="identical"):
        assert proxy(twins).generate(base, None, inputs, max_new_tokens=12).tokens == plain


def test_an_adapter_on_and_off_are_expert_and_anti_expert(trio: dict[str, Any]) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    expert = get_peft_model(copy.deepcopy(trio["anti"]), adapter)
    merged = copy.deepcopy(expert).merge_and_unload()
    system = ProxyTuning(companions={"expert": expert})
    expected = proxy({**trio, "expert": merged}).generate(trio["base"], None, padded(PROMPTS), max_new_tokens=10)
    assert system.generate(trio["base"], None, padded(PROMPTS), max_new_tokens=10).tokens == expected.tokens


def test_requests_step_in_any_company_with_the_tokens_that_they_get_alone(trio: dict[str, Any]) -> None:
    alone = [run(lambda ids: int(naive(trio, ids, 1).argmax()), prompt, 8) for prompt in PROMPTS]
    system, base = proxy(trio), trio["base"]
    first, second = (system.open(base, prompt) for prompt in PROMPTS[:2])
    system.step(base, [first, second])
    third = system.open(base, PROMPTS[2])
    for _ in range(8):
        system.step(base, [third, first])
    for _ in range(7):
        system.step(base, [second])
    for state, tokens in zip((first, second, third), alone, strict=True):
        assert state.tokens[: len(tokens)] == tokens


def test_taking_tokens_back_leaves_all_three_models_where_they_were(trio: dict[str, Any]) -> None:
    system, base = proxy(trio), trio["base"]
    state, fresh = system.open(base, PROMPTS[0]), system.open(base, PROMPTS[0])
    for _ in range(6):
        system.step(base, [state])
    kept = state.tokens[:2]
    state.rewind(4)
    for token in kept:
        fresh.accept(token)
    twin = state.fork()
    assert system.step(base, [state]) == system.step(base, [fresh]) == system.step(base, [twin])


def test_the_expert_sees_its_own_prompt_and_the_others_the_plain_one(trio: dict[str, Any]) -> None:
    plain, chat = tokenizer(), tokenizer()
    chat.chat_template = (
        "{% for m in messages %}{{ 'w1 ' if m.role == 'system' else 'w2 ' }}{{ m.content }} {% endfor %}w3 "
    )
    bundled = {**trio, "expert": Bundle(trio["expert"], chat)}
    system = proxy(bundled, expert_chat_template=True, system_prompt="w30 w31", response_prefix="w35")
    prompt = "w10 w11 w12"
    expert_prompt = chat("w1 w30 w31 w2 w10 w11 w12 w3 w35")["input_ids"]
    ids = plain(prompt)["input_ids"]
    expected = run(lambda now: int(naive(trio, now, 1.0, [*expert_prompt, *now[len(ids) :]]).argmax()), ids, 9)
    found = system.generate(trio["base"], plain, [prompt, "w5"], max_new_tokens=9)
    assert found.tokens[0] == expected
    without = proxy(trio, system_prompt="w30").open(trio["base"], ids, plain)
    assert plain.decode(without.expert_prompt) == "w30 w10 w11 w12"
    with pytest.raises(InputError, match="show all models the same text"):
        system.combined(trio["base"])


def test_only_visible_tokens_are_shifted_and_drawn(trio: dict[str, Any]) -> None:
    scores = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(0))
    system = proxy(trio, top_k_access=3)
    states = [system.open(trio["base"], prompt) for prompt in PROMPTS[:2]]
    shifted = system.shift(states, scores)
    whole = proxy(trio).shift([system.open(trio["base"], prompt) for prompt in PROMPTS[:2]], scores)
    best = scores.topk(3).indices
    assert torch.isfinite(shifted).sum() == 6
    torch.testing.assert_close(shifted.gather(1, best), whole.gather(1, best))
    normalised = scores.log_softmax(-1)
    again = system.shift([system.open(trio["base"], prompt) for prompt in PROMPTS[:2]], normalised)
    torch.testing.assert_close(again.softmax(-1), shifted.softmax(-1))


def test_extra_head_rows_of_the_expert_are_cut_and_unused_rows_of_the_base_never_drawn(trio: dict[str, Any]) -> None:
    wide = copy.deepcopy(trio["expert"])
    wide.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    assert (
        proxy({**trio, "expert": wide}).generate(trio["base"], None, padded(PROMPTS), max_new_tokens=8).tokens
        == proxy(trio).generate(trio["base"], None, padded(PROMPTS), max_new_tokens=8).tokens
    )
    base = copy.deepcopy(trio["base"])
    base.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    system = proxy(trio)
    shifted = system.shift([system.open(base, PROMPTS[0], tokenizer())], torch.zeros(1, VOCABULARY + 5))
    assert torch.isinf(shifted[0, VOCABULARY:]).all()
    assert torch.isfinite(shifted[0, :VOCABULARY]).all()


def test_the_sum_is_made_in_float32(trio: dict[str, Any]) -> None:
    half = {name: copy.deepcopy(model).bfloat16() for name, model in trio.items()}
    system = proxy(half, alpha=1.0)
    state = system.open(half["base"], PROMPTS[0])
    shifted = system.shift([state], torch.zeros(1, VOCABULARY, dtype=torch.bfloat16))
    logits = [half[name](input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].float() for name in ("expert", "anti")]
    assert shifted.dtype == torch.float32
    torch.testing.assert_close(shifted[0], logits[0] - logits[1], atol=0.05, rtol=0)


def test_scores_equal_the_naive_sum(trio: dict[str, Any]) -> None:
    prompt, answer = "w10 w11", " w12 w5 w30"
    ids, tail = [13, 14], [15, 8, 33]
    expected = [float(naive(trio, [*ids, *tail[:n]], 1.0).log_softmax(-1)[token]) for n, token in enumerate(tail)]
    system = proxy(trio)
    (found,) = system.score(trio["base"], tokenizer(), [prompt], [answer])
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    table = system.combined(trio["base"])(torch.tensor([[*ids, *tail]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(table[1:4].gather(1, torch.tensor(tail)[:, None])[:, 0], found, atol=1e-4, rtol=1e-4)
    whole = perplexity(system.combined(trio["base"]), tokenizer(), ["w10 w11 w12"], max_length=16)
    assert whole.tokens == 3


def test_the_trace_tells_what_the_shift_did(trio: dict[str, Any]) -> None:
    system = proxy(trio, trace=True)
    done = system.generate(trio["base"], None, padded(PROMPTS), max_new_tokens=6)
    for prompt, tokens, report in zip(PROMPTS, done.tokens, done.reports, strict=True):
        assert [entry["token"] for entry in report["tokens"][: len(tokens)]] == tokens
        for place, entry in enumerate(report["tokens"][: len(tokens)]):
            ids = [*prompt, *tokens[:place]]
            before, after = (naive(trio, ids, alpha).log_softmax(-1) for alpha in (0.0, 1.0))
            assert entry["before"] == pytest.approx(float(before[tokens[place]].exp()), abs=1e-4)
            assert entry["after"] == pytest.approx(float(after[tokens[place]].exp()), abs=1e-4)
            assert entry["changed"] == (int(before.argmax()) != int(after.argmax()))
            assert entry["kl"] == pytest.approx(float((before.exp() * (before - after)).sum()), abs=1e-3)
    assert any(report["changed"] > 0 for report in done.reports)


def test_what_does_not_fit_is_refused(trio: dict[str, Any]) -> None:
    base = trio["base"]
    with pytest.raises(InputError, match="companion 'expert'"):
        ProxyTuning().open(base, [3])
    with pytest.raises(InputError, match="expert is no PEFT model"):
        ProxyTuning(companions={"expert": trio["expert"]}).open(base, [3])
    swapped = [*WORDS[:5], WORDS[6], WORDS[5], *WORDS[7:]]
    other = {**trio, "expert": Bundle(trio["expert"], tokenizer(swapped))}
    with pytest.raises(InputError, match="2 tokens with other ids"):
        proxy(other).open(base, [3], tokenizer())
    with pytest.raises(InputError, match="a head row for each"):
        proxy({**trio, "anti": llama(3, vocabulary=30)}).open(base, [3], tokenizer())
    with pytest.raises(InputError, match="find a chat template"):
        proxy(trio, expert_chat_template=True).open(base, [3], tokenizer())
