"""Prompt look-up: what it drafts, and that the text stays the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from gossamer.decoding.prompt_lookup import PromptLookup
from gossamer.kinds.decoding import Draft


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gemma3() -> Any:
    config = Gemma3TextConfig(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, max_position_embeddings=128, initializer_range=0.3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], eos_token_id=None,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def drafted(ids: list[int], **options: Any) -> list[int]:
    system = PromptLookup(**options)
    state = system.begin(None, ids, None)
    return list(system.draft([state], system.draft_tokens)[0].tokens)


def test_it_drafts_what_followed_the_latest_occurrence_of_the_longest_ngram() -> None:
    assert drafted([1, 2, 3, 9, 5, 3, 8, 1, 2, 3], tokens=3) == [9, 5, 3]
    assert drafted([1, 2, 3, 9, 5, 3, 8, 1, 2, 3], ngram=1, tokens=2) == [8, 1]
    assert drafted([4, 4], tokens=2) == [4]
    assert drafted([1, 2, 3], tokens=2) == []


@pytest.mark.parametrize("family", [llama, gemma3])
def test_greedy_text_is_the_models_own_also_past_a_sliding_window_in_fewer_steps(family: Any) -> None:
    torch.manual_seed(0)
    model, ids = family(), [5, 6, 7, 8, 9, 5, 6, 7, 8]
    plain = model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0, len(ids) :].tolist()
    system = PromptLookup(switch_off=False)
    state = system.open(model, ids)
    steps = 0
    while len(state.tokens) < 60:
        system.step(model, [state])
        steps += 1
    assert state.tokens[:60] == plain
    assert steps < 60
    inputs = {"input_ids": torch.tensor([ids])}
    assert system.generate(model, None, inputs, max_new_tokens=60).tokens == [plain]


def test_more_tokens_a_draft_take_fewer_steps_of_the_model_where_text_repeats() -> None:
    torch.manual_seed(0)
    model, ids = llama(), [5, 6, 7, 8, 9, 5, 6, 7, 8]
    count = {}
    for tokens in (1, 10):
        system = PromptLookup(tokens=tokens, switch_off=False)
        state = system.open(model, ids)
        count[tokens] = 0
        while len(state.tokens) < 100:
            system.step(model, [state])
            count[tokens] += 1
    assert count[10] < count[1] < 100


def test_switch_off_stops_guessing_where_drafts_are_never_right(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, ids = llama(), [5, 6, 7, 8, 9, 5, 6, 7, 8]
    plain = model.generate(torch.tensor([ids]), max_new_tokens=80, do_sample=False)[0, len(ids) :].tolist()
    reports = {}
    for switch_off in (True, False):
        system = PromptLookup(switch_off=switch_off)

        def wrong(states: Any, k: int) -> list[Draft]:
            return [Draft([(plain[len(s.tokens) % 80] + 1) % 24] * 10) for s in states]

        monkeypatch.setattr(system, "draft", wrong)
        done = system.generate(model, None, {"input_ids": torch.tensor([ids])}, max_new_tokens=80)
        assert done.tokens == [plain]
        reports[switch_off] = done.reports[0]["guessing_steps"]
    assert reports[True] < reports[False] >= 78
