"""Scorer: sums over answer tokens, shared prefixes and windows, each against one position at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from gossamer.core.errors import InputError
from gossamer.parts.data_batch import Collator, pack
from gossamer.parts.data_tokens import Example, encode_border, tokenise
from gossamer.parts.scorer import perplexity, score_choices, sequence_logprobs

SPECIALS = ["<pad>", "<s>", "</s>"]
ROWS = [
    {"prompt": "what is", "completion": " it"},
    {"prompt": "a", "completion": " longer answer"},
    {"prompt": "the question", "completion": "?"},
]
CHOICES = [" yes", " no, never", " x"]
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def _llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3))


def _gemma3() -> Any:
    types = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=types, initializer_range=0.3)
    return Gemma3ForCausalLM(config)


def _mamba() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=2, state_size=4))


def _tokenizer(bos: bool = True) -> Any:
    """Bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIALS, *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names: dict[str, Any] = {"eos_token": "</s>", "pad_token": "<pad>", **({"bos_token": "<s>"} if bos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tokenizer() -> Any:
    return _tokenizer()


def _naive(model: Any, ids: list[int], first: int) -> list[float]:
    """Log-probabilities of ids[first:] from one plain forward."""
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    return [float(logprobs[at - 1, ids[at]]) for at in range(first, len(ids))]


def _examples(tokenizer: Any) -> list[Example]:
    examples = [tokenise(row, tokenizer, max_length=64) for row in ROWS]
    assert all(isinstance(example, Example) for example in examples)
    return examples  # type: ignore[return-value]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("build", [_llama, _gemma3])
def test_sequence_logprobs(build: Callable[[], Any], side: str, tokenizer: Any) -> None:
    model = build().eval()
    examples = _examples(tokenizer)
    batch = Collator(tokenizer, padding_side=side)(examples)
    naive = [_naive(model, one.input_ids, len(one.input_ids) - one.supervised) for one in examples]
    sums = torch.tensor([sum(values) for values in naive])
    counts = torch.tensor([len(values) for values in naive])
    for chunk in (None, 1, 2):
        torch.testing.assert_close(sequence_logprobs(model, batch, chunk=chunk), sums, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sequence_logprobs(model, batch, average=True), sums / counts, rtol=1e-5, atol=1e-5)
    batch["loss_weights"] *= 0.25
    torch.testing.assert_close(sequence_logprobs(model, batch), sums, rtol=1e-5, atol=1e-4)


def test_sequence_logprobs_are_differentiable_in_chunks(tokenizer: Any) -> None:
    model = _llama()
    batch = Collator(tokenizer)(_examples(tokenizer))
    weight = model.lm_head.weight
    (whole,) = torch.autograd.grad(sequence_logprobs(model, batch).sum(), weight)
    (chunked,) = torch.autograd.grad(sequence_logprobs(model, batch, chunk=1).sum(), weight)
    torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-5)
    assert whole.abs().sum() > 0


def test_packed_rows_are_refused(tokenizer: Any) -> None:
    batch = Collator(tokenizer)(pack(_examples(tokenizer), 64))
    with pytest.raises(InputError, match="must get one sequence a row, got a packed batch"):
        sequence_logprobs(_llama(), batch)


@pytest.mark.parametrize("prompt", ["is it so that this holds?", [{"role": "user", "content": "is it so?"}], ""])
@pytest.mark.parametrize("build", [_llama, _gemma3, _mamba])
def test_score_choices(build: Callable[[], Any], prompt: Any, tokenizer: Any) -> None:
    model = build().train()
    scores = score_choices(model, tokenizer, prompt, CHOICES, batch_size=2)
    assert all(module.training for module in model.modules())
    model.eval()
    naive = []
    for choice in CHOICES:
        head, answer = encode_border(prompt, choice, tokenizer)
        naive.append(sum(_naive(model, head + answer, len(head))))
    torch.testing.assert_close(scores.logprobs, torch.tensor(naive), rtol=1e-5, atol=1e-4)
    assert scores.tokens.tolist() == scores.bytes.tolist() == [len(choice) for choice in CHOICES]
    assert scores.best() == naive.index(max(naive))
    means = [value / len(choice) for value, choice in zip(naive, CHOICES, strict=True)]
    assert scores.best("tokens") == means.index(max(means))


def test_score_choices_computes_the_prompt_once(tokenizer: Any) -> None:
    model = _llama()
    widths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    score_choices(model, tokenizer, "a prompt of some length", CHOICES)
    longest = max(len(choice) for choice in CHOICES)
    assert widths == [len("a prompt of some length"), longest + 1]


def test_score_choices_needs_something_to_score(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="choices: must be at least one non-empty text"):
        score_choices(_llama(), tokenizer, "a", ["b", ""])
    with pytest.raises(InputError, match="prompt: must have at least one token"):
        score_choices(_llama(), _tokenizer(bos=False), "", ["b"])


@pytest.mark.parametrize(
    ("max_length", "stride", "bos"), [(64, None, True), (64, None, False), (8, None, True), (8, 3, False), (8, 1, True)]
)
def test_perplexity(max_length: int, stride: int | None, bos: bool) -> None:
    tokenizer, model = _tokenizer(bos), _llama()
    texts = ["längere Texte", "b", ""]
    start = 1 if bos else 2
    room = max_length - 1
    step = stride or room
    total = 0.0
    model.eval()
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for at in range(len(ids)):
            # the first window that reaches this token, and what precedes the token in it
            window = max(0, math.ceil((at + 1 - room) / step)) * step
            total -= _naive(model, [start, *ids[window : at + 1]], at + 1 - window)[0]
    size = len("".join(texts).encode())
    model.train()
    found = perplexity(model, tokenizer, texts, max_length=max_length, stride=stride, batch_size=3)
    assert model.training
    assert (found.tokens, found.bytes) == (size, size)
    assert found.nll_per_token == pytest.approx(total / size, rel=1e-5)
    assert found.ppl == pytest.approx(math.exp(total / size), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(total / size / math.log(2), rel=1e-5)


def test_uniform_model_has_the_perplexity_of_its_vocabulary(tokenizer: Any) -> None:
    model = _llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = perplexity(model, tokenizer, ["any text"])
    assert found.ppl == pytest.approx(259, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(math.log2(259), rel=1e-5)


def test_perplexity_refuses_bad_strides_and_no_text(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="stride: must be from 1 to 7"):
        perplexity(_llama(), tokenizer, ["abc"], max_length=8, stride=8)
    with pytest.raises(InputError, match="texts: must hold at least one non-empty text"):
        perplexity(_llama(), tokenizer, [""])
