"""Batches: padding, packing without cross-talk, and losses from selected logits, each against the plain way."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from gossamer.core.errors import InputError
from gossamer.parts.data_batch import Collator, model_inputs, pack, packed_mask
from gossamer.parts.data_loss import supervised_logits, weight_sum, weighted_loss, weighted_nll
from gossamer.parts.data_tokens import IGNORE, Example, PreferencePair

VOCABULARY = 48
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=2)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
TYPES = ["sliding_attention", "full_attention"]


def _llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def _mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3))


def _gemma3() -> Any:
    config = Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=3,
        layer_types=TYPES,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=None,
    )
    return Gemma3ForCausalLM(config)


def _gemma2() -> Any:
    return Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, sliding_window=3, layer_types=TYPES, final_logit_softcapping=2.0)
    )


def _cohere() -> Any:
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.5))


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64))


def _lora() -> Any:
    model = peft.get_peft_model(_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def _prompt_tuned() -> Any:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(_llama(), config)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _examples(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    out = []
    for length in lengths:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        weights = [0.0, 0.0, *torch.rand(length - 2, generator=generator).tolist()]
        weights[length // 2] = 0.0
        out.append(Example(ids, [i if w else IGNORE for i, w in zip(ids, weights, strict=True)], weights))
    return out


def _naive_loss(model: Any, examples: list[Example]) -> torch.Tensor:
    """One example at a time, all logits, in double precision."""
    total = torch.zeros(())
    for example in examples:
        ids = torch.tensor(example.input_ids)
        logits = model(input_ids=ids[None]).logits[0, -len(ids) :].double()
        nll = torch.logsumexp(logits[:-1], dim=-1) - logits[:-1].gather(1, ids[1:, None])[:, 0]
        total = total + (torch.tensor(example.weights[1:]) * nll).sum()
    return total / 7.0


def _gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros(1) if grad is None else grad for grad in found]


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator_pads_and_restarts_positions(side: str) -> None:
    batch = Collator(TOKENIZER, padding_side=side, pad_to_multiple_of=4)(_examples(3, 5))
    assert {key: tuple(item.shape) for key, item in batch.items()} == dict.fromkeys(batch, (2, 8))
    assert batch["loss_weights"].dtype == torch.float32
    own = slice(0, 3) if side == "right" else slice(5, 8)
    assert batch["attention_mask"][0].nonzero()[:, 0].tolist() == list(range(8))[own]
    assert batch["position_ids"][0, own].tolist() == [0, 1, 2]
    assert batch["input_ids"][0, own].tolist() == _examples(3)[0].input_ids
    outside = batch["attention_mask"] == 0
    assert batch["labels"][outside].unique().tolist() == [IGNORE]
    assert batch["loss_weights"][outside].sum() == 0


def test_pairs_give_chosen_rows_then_rejected_rows() -> None:
    one, two, three, four = _examples(3, 4, 5, 6)
    batch = Collator(TOKENIZER)([PreferencePair(one, two), PreferencePair(three, four)])
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 5, 4, 6]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("build", [_llama, _gemma3, _gemma2, _cohere, _gpt2, _lora])
def test_weighted_loss_equals_the_naive_sum(build: Callable[[], Any], side: str) -> None:
    model = build().eval()
    examples = _examples(9, 4, 6)
    batch = Collator(TOKENIZER, padding_side=side)(examples)
    loss, naive = weighted_loss(model, batch, 7.0), _naive_loss(model, examples)
    full = weighted_nll(model(**model_inputs(model, batch)).logits, batch["labels"], batch["loss_weights"], 7.0)
    torch.testing.assert_close(loss, naive.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, full, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(_gradients(model, loss), _gradients(model, naive), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_output_layer_sees_supervised_positions_only() -> None:
    model = _llama()
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    batch = Collator(TOKENIZER)(_examples(9, 4))
    logits, targets, weights = supervised_logits(model, batch)
    count = int((batch["labels"] != IGNORE).sum())
    assert seen == [(1, count, VOCABULARY)]
    assert logits.shape == (count, VOCABULARY)
    assert targets.tolist() == batch["labels"][batch["labels"] != IGNORE].tolist()
    torch.testing.assert_close(weights, batch["loss_weights"][batch["loss_weights"] > 0])
    assert not model.lm_head._forward_pre_hooks


def test_virtual_tokens_and_a_model_without_output_layer() -> None:
    examples = _examples(6, 6)
    batch = Collator(TOKENIZER)(examples)
    del batch["position_ids"]
    tuned = _prompt_tuned().eval()
    torch.testing.assert_close(weighted_loss(tuned, batch, 7.0), _naive_loss(tuned, examples).float())
    headless = _llama().eval()
    expected = weighted_loss(headless, batch, 7.0)
    headless.get_output_embeddings = lambda: None
    torch.testing.assert_close(weighted_loss(headless, batch, 7.0), expected)


def test_batch_without_loss_gives_zero_with_a_graph() -> None:
    model = _llama()
    batch = Collator(TOKENIZER)([Example([3, 4], [IGNORE, IGNORE], [0.0, 0.0])])
    loss = weighted_loss(model, batch, 1.0)
    assert loss.item() == 0.0
    loss.backward()


def test_global_normaliser_makes_micro_batches_equal_the_whole() -> None:
    model = _llama().eval()
    examples = _examples(9, 4, 6, 5)
    collate = Collator(TOKENIZER)
    total = weight_sum(collate(examples))
    parts = [weighted_loss(model, collate(examples[at : at + 2]), total) for at in (0, 2)]
    torch.testing.assert_close(sum(parts), weighted_loss(model, collate(examples)))


def test_weights_scale_like_repetition() -> None:
    model = _llama().eval()
    (example,) = _examples(6)
    twice = Example(example.input_ids, example.labels, [2 * weight for weight in example.weights])
    collate = Collator(TOKENIZER)
    torch.testing.assert_close(
        weighted_loss(model, collate([twice]), 1.0), weighted_loss(model, collate([example, example]), 1.0)
    )


def test_packing_fills_rows_and_loses_nothing() -> None:
    examples = _examples(9, 4, 6, 5, 3, 8)
    rows = pack(examples, 12)
    assert len(rows) == 3
    assert all(len(row.input_ids) <= 12 for row in rows)
    assert sum(len(row.input_ids) for row in rows) == sum(len(one.input_ids) for one in examples)
    assert sum(sum(row.weights) for row in rows) == pytest.approx(sum(sum(one.weights) for one in examples))
    with pytest.raises(InputError, match="must get examples of at most 8 tokens, got 9"):
        pack(examples, 8)


def test_first_token_of_a_segment_is_never_a_label() -> None:
    (row,) = pack([Example([3, 4], [3, 4], [1.0, 1.0]), Example([5, 6], [5, 6], [1.0, 1.0])], 4)
    assert row.labels == [IGNORE, 4, IGNORE, 6]
    assert row.weights == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [_llama, _gemma3, _mistral, _gpt2])
def test_packed_equals_one_by_one(build: Callable[[], Any], attention: str, side: str) -> None:
    model = build().eval()
    model.set_attn_implementation(attention)
    examples = _examples(9, 4, 6, 5, 3, 8)
    rows = pack(examples, 16)
    assert max(max(row.segment_ids or []) for row in rows) > 1
    batch = Collator(TOKENIZER, padding_side=side)(rows)
    logits = model(**model_inputs(model, batch)).logits
    assert torch.isfinite(logits).all()
    by_ids = {tuple(one.input_ids): one for one in examples}
    for row, ids, segments in zip(logits, batch["input_ids"], batch["segment_ids"], strict=True):
        for segment in range(1, int(segments.max()) + 1):
            own = segments == segment
            alone = model(input_ids=ids[own][None]).logits[0]
            torch.testing.assert_close(row[own], alone, rtol=1e-5, atol=1e-5)
            by_ids.pop(tuple(ids[own].tolist()))
    assert not by_ids
    packed, naive = weighted_loss(model, batch, 7.0), _naive_loss(model, examples)
    torch.testing.assert_close(packed, naive.float(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(_gradients(model, packed), _gradients(model, naive), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_packed_mask_refuses_what_it_cannot_separate() -> None:
    segments = torch.tensor([[1, 1, 2]])
    with pytest.raises(InputError, match='must run on "sdpa" or "eager" attention'):
        packed_mask(segments, LlamaConfig(**SIZES), "flash_attention_2")
    config = Gemma3TextConfig(**SIZES, layer_types=TYPES)
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(InputError, match="full or sliding attention in all layers, got linear_attention"):
        packed_mask(segments, config, "sdpa")


def test_cross_entropy_is_the_unweighted_case() -> None:
    logits = torch.randn(2, 5, VOCABULARY)
    labels = torch.randint(0, VOCABULARY, (2, 5))
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(weighted_nll(logits, labels, torch.ones(2, 5), 8.0), expected)
