"""Vocabulary trimming: what must stay the same stays bit for bit, and no text is lost."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from gossamer.core.errors import InputError
from gossamer.hub.models import load_model
from gossamer.parts.vocabulary import trim_vocabulary

TRAINING = [
    "the quick brown fox jumps over the lazy dog and the lazy cat",
    "a weaver weaves gossamer thread over the loom, thread by thread",
    "def read_file(path): return open(path).read()",
    "she sells sea shells by the sea shore; über Straße naïve",
] * 4
KEPT = ["the lazy weaver sells thread", "read_file(path)", "Straße by the sea"]


@functools.cache
def _fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Built as Gemma's: spaces become a letter, unknown characters become byte tokens, <bos> is prepended."""
    specials = ["<pad>", "<eos>", "<unk>", *(f"<unused{i}>" for i in range(9)), "<bos>", "<start_of_turn>"]
    tokens = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokens.normalizer = normalizers.Replace(" ", "▁")
    tokens.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=specials + special_bytes, show_progress=False)
    tokens.train_from_iterator(TRAINING, trainer)
    spec = _without_added(tokens.to_str(), special_bytes)
    tokens = Tokenizer.from_str(spec)
    tokens.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", specials.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


@functools.cache
def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|end|>", "<|im_start|>", "<|reserved|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokens.train_from_iterator(TRAINING, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    return tokenizer


def _without_added(text: str, names: list[str]) -> str:
    spec = json.loads(text)
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in names]
    return json.dumps(spec)


def _gemma(vocab: int) -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=[1, 13], bos_token_id=12,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def _llama(vocab: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("kind", ["fallback-tied", "byte-level-untied"])
def test_kept_text_has_the_same_tokens_and_the_same_logits(kind: str) -> None:
    tied = kind == "fallback-tied"
    tokenizer = _fallback_tokenizer() if tied else _byte_level_tokenizer()
    model: Any = _gemma(len(tokenizer)) if tied else _llama(len(tokenizer))
    before = [(tokenizer(text)["input_ids"], _logits(model, tokenizer(text)["input_ids"])) for text in KEPT]
    result = trim_vocabulary(model, tokenizer, KEPT)
    old_ids = result.report.old_ids
    assert len(old_ids) < len(tokenizer) == result.report.tokens_before
    for text, (ids, logits) in zip(KEPT, before, strict=True):
        new = result.tokenizer(text)["input_ids"]
        assert [old_ids[id_] for id_ in new] == ids
        assert torch.equal(_logits(model, new), logits[:, old_ids])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.out_features == model.config.vocab_size == model.vocab_size == len(old_ids)
    rows = 1 if tied else 2
    assert result.report.bytes_saved == (result.report.tokens_before - len(old_ids)) * 32 * 4 * rows


def test_config_and_generation_config_are_renumbered() -> None:
    tokenizer = _fallback_tokenizer()
    model = _gemma(len(tokenizer))
    last = tokenizer.convert_tokens_to_ids("<unused8>")
    model.config.pad_token_id = model.generation_config.pad_token_id = last
    model.model.embed_tokens.padding_idx = last
    dropped = tokenizer.convert_tokens_to_ids("<unused3>")
    model.generation_config.suppress_tokens = [dropped, last]
    result = trim_vocabulary(model, tokenizer, KEPT)
    new = result.tokenizer.convert_tokens_to_ids("<unused8>")
    assert new != last
    assert result.tokenizer.convert_tokens_to_ids("<unused3>") == result.tokenizer.unk_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == new
    assert model.model.embed_tokens.padding_idx == new
    assert model.generation_config.suppress_tokens == [new]
    assert model.config.bos_token_id == result.tokenizer.bos_token_id != 12
    turn = result.tokenizer.convert_tokens_to_ids("<start_of_turn>")
    assert model.config.eos_token_id == [result.tokenizer.eos_token_id, turn]
    assert result.report.special_dropped == 8


def test_saved_model_and_tokenizer_reload_equal(tmp_path: Path) -> None:
    tokenizer = _fallback_tokenizer()
    model = _gemma(len(tokenizer))
    result = trim_vocabulary(model, tokenizer, KEPT)
    model.save_pretrained(tmp_path)
    result.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == result.tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for text in [*KEPT, "Zq \U0001f600 ж\n", "<unused3>"]:
        ids = result.tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids
        assert torch.equal(_logits(reloaded, ids), _logits(model, ids))
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


@functools.cache
def _trimmed(kind: str) -> tuple[Any, Any]:
    tokenizer = _fallback_tokenizer() if kind == "fallback" else _byte_level_tokenizer()
    model: Any = _gemma(len(tokenizer)) if kind == "fallback" else _llama(len(tokenizer))
    return tokenizer, trim_vocabulary(model, tokenizer, KEPT).tokenizer


@pytest.mark.parametrize("kind", ["fallback", "byte-level"])
@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(max_size=40), st.text(alphabet="the lazy\n▁ßж<0x>unsd3\U0001f600", max_size=40)))
def test_any_text_decodes_as_before(kind: str, text: str) -> None:
    tokenizer, trimmed = _trimmed(kind)
    before = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    after = trimmed.decode(trimmed(text, add_special_tokens=False)["input_ids"])
    assert after == before


def test_counts_extra_tokens_and_template_tokens() -> None:
    tokenizer = _byte_level_tokenizer()
    texts = ["the the the lazy"]
    few = trim_vocabulary(_llama(len(tokenizer)), tokenizer, texts, min_count=2)
    all_ = trim_vocabulary(_llama(len(tokenizer)), tokenizer, texts)
    more = trim_vocabulary(_llama(len(tokenizer)), tokenizer, texts, extra_tokens=["<|reserved|>"])
    assert "Ġthe" in few.tokenizer.get_vocab()
    assert "Ġlazy" not in few.tokenizer.get_vocab()
    assert "Ġlazy" in all_.tokenizer.get_vocab()
    assert "<|im_start|>" in all_.tokenizer.get_vocab()
    assert "<|reserved|>" not in all_.tokenizer.get_vocab()
    assert "<|reserved|>" in more.tokenizer.get_vocab()
    assert all_.tokenizer.chat_template == tokenizer.chat_template
    with pytest.raises(InputError, match=r"extra_tokens.*must be in the vocabulary"):
        trim_vocabulary(_llama(len(tokenizer)), tokenizer, texts, extra_tokens=["<|reservd|>"])


def test_position_table_and_rng_are_left_alone() -> None:
    tokenizer = _byte_level_tokenizer()
    size = len(tokenizer)
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size, n_positions=size, n_embd=16, n_layer=1, n_head=2, bos_token_id=end, eos_token_id=end
        )
    )
    state = torch.random.get_rng_state()
    trim_vocabulary(model, tokenizer, KEPT)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.transformer.wpe.num_embeddings == size > model.transformer.wte.num_embeddings


def test_original_tokenizer_is_untouched() -> None:
    tokenizer = _fallback_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    trim_vocabulary(_gemma(len(tokenizer)), tokenizer, KEPT)
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), "WordPiece"),
        (Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)), "Unigram"),
        (Tokenizer(models.BPE({"a": 0}, [])), "neither byte_fallback nor"),
        (Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True)), "256 byte tokens missing"),
    ],
)
def test_tokenizers_that_cannot_be_trimmed_are_refused(backend: Tokenizer, reason: str) -> None:
    model = _llama(64)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=reason):
        trim_vocabulary(model, PreTrainedTokenizerFast(tokenizer_object=backend), ["a"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_models_that_cannot_be_trimmed_are_refused() -> None:
    tokenizer = _byte_level_tokenizer()
    small = _llama(100)
    with pytest.raises(InputError, match="embedding row for each kept token"):
        trim_vocabulary(small, tokenizer, KEPT)
    unknown = _llama(len(tokenizer) + 5)
    unknown.config.pad_token_id = len(tokenizer) + 2
    with pytest.raises(InputError, match=r"pad_token_id = \d+"):
        trim_vocabulary(unknown, tokenizer, KEPT)
    packed = _llama(len(tokenizer))
    packed.lm_head = torch.nn.Identity()
    with pytest.raises(InputError, match="plain float head"):
        trim_vocabulary(packed, tokenizer, KEPT)


def test_real_gemma() -> None:
    """The packaged model, converted on the first call: it reads English, and trimming changes nothing that is kept."""
    model, tokenizer = load_model("gemma-3-270m")
    text = (
        "The sun rises in the east and sets in the west. Water freezes at zero degrees and boils at one hundred. "
        "London is the capital of England."
    )
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        before = model(**batch, labels=batch["input_ids"])
    assert before.loss < 3.0
    result = trim_vocabulary(model, tokenizer, [text])
    new = result.tokenizer(text, return_tensors="pt")
    old_ids = torch.tensor(result.report.old_ids)
    assert len(old_ids) < 500
    assert torch.equal(old_ids[new["input_ids"]], batch["input_ids"])
    with torch.no_grad():
        after = model(**new).logits
    assert torch.equal(after, before.logits[..., old_ids])
    unseen = "Zürich 日本 \U0001f600"
    assert result.tokenizer.decode(result.tokenizer(unseen)["input_ids"], skip_special_tokens=True) == unseen
