"""GGUF: weights, tokens and settings come back by readers that are not ours; what cannot be expressed is refused."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from gossamer.core.errors import GossamerError, InputError
from gossamer.parts import export_gguf
from gossamer.parts.export_gguf import check_gguf_model, gguf_bytes, write_gguf
from gossamer.parts.export_gguf_proof import prove_gguf
from gossamer.parts.export_gguf_tokens import read_tokens
from gossamer.parts.export_proof import TEXTS, record
from gossamer.parts.surgery import find_blocks
from gossamer.parts.surgery_format import write_widths
from gossamer.parts.vocabulary import trim_vocabulary
from gossamer.testing.bench import TEXTS as BENCH_TEXTS
from gossamer.testing.bench import Bench

MARK = "\u2581"


def sentencepiece_like(rows: int = 600) -> PreTrainedTokenizerFast:
    """BPE with byte fallback whose merges are all splits of each piece, in the order of the pieces: as Gemma's."""
    trained = Tokenizer(tokenizer_models.BPE())
    trained.normalizer = normalizers.Replace(" ", MARK)
    trained.train_from_iterator([*TEXTS[:2], *BENCH_TEXTS], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"]
    words = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "\n\n", *pieces]
    vocab = {word: number for number, word in enumerate(words)}
    cuts = [(piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece))]
    merges = [(left, right) for left, right in cuts if left in vocab and right in vocab]
    core = Tokenizer(tokenizer_models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", MARK)
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in specials])
    core.add_tokens([AddedToken("\n\n", normalized=False)])
    core.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    assert len(words) <= rows
    return tokenizer


def resized(family: str, rows: int, **changes: Any) -> Any:
    model = Bench(family).model()
    config = copy.deepcopy(model.config)
    for key, value in {"vocab_size": rows, **changes}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return type(model)(config).eval()


def written(model: Any, tokenizer: Any, path: Path, kind: str = "f16") -> dict[str, Any]:
    check_gguf_model(model)
    before = record(model, tokenizer)
    tokens = read_tokens(tokenizer, model.config.vocab_size, before.ends)
    write_gguf(model, tokens, path, kind)
    assert path.stat().st_size <= gguf_bytes(model, kind)
    return prove_gguf(path, model, tokenizer, before, kind)


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llama_cpp" else find(name, *rest)
    )


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_transformers_reads_the_same_model(family: str, kind: str, tmp_path: Path, no_llama_cpp: None) -> None:
    bench = Bench(family)
    figures = written(bench.model(), bench.tokenizer(), tmp_path / "model.gguf", kind)["transformers"]
    assert figures["positions"] >= 500
    assert 0 <= figures["kl"] <= {"f16": 1e-5, "q8_0": 5e-3, "q4_0": 0.5}[kind]


def test_trimmed_sentencepiece_like_vocabularies(tmp_path: Path, no_llama_cpp: None) -> None:
    model, tokenizer = resized("gemma3", 600, pad_token_id=0, eos_token_id=1, bos_token_id=2), sentencepiece_like()
    model.generation_config.eos_token_id = [1, 4]
    trimmed = trim_vocabulary(model, tokenizer, ["The function returns."])
    assert trimmed.report.tokens_after < trimmed.report.tokens_before
    tokens = read_tokens(trimmed.tokenizer, model.config.vocab_size, model.generation_config.eos_token_id)
    assert (tokens.model, tokens.adds_bos, tokens.eos, len(tokens.other_ends)) == ("llama", True, 1, 1)
    assert written(model, trimmed.tokenizer, tmp_path / "model.gguf")["transformers"]["top1"] >= 0.99


def test_rows_without_a_token_are_unused(tmp_path: Path, no_llama_cpp: None) -> None:
    tokenizer = sentencepiece_like()
    tokens = read_tokens(tokenizer, 600, [1])
    assert tokens.tokens[-1] == "[PAD599]"
    assert tokens.types[-1] == 5
    assert tokens.types[: len(tokenizer)].count(6) == 256
    written(resized("gemma3", 600, eos_token_id=1, bos_token_id=2), tokenizer, tmp_path / "model.gguf")


ODD = {
    "another window pattern": ("gemma3", {"sliding_window": 20}),
    "rotary base of sliding layers": (
        "gemma3",
        {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        }},
    ),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama3": (
        "llama",
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }},
    ),
    "wide heads": ("llama", {"head_dim": 32}),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_llama_cpp_computes_the_same(odd: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    family, changes = ODD[odd]
    figures = written(resized(family, 320, **changes), Bench(family).tokenizer(), tmp_path / "model.gguf")["llama.cpp"]
    assert figures["top1"] >= 0.99
    assert figures["kl"] < 1e-4


def test_llama_cpp_cuts_texts_and_ends_answers_alike(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model, tokenizer = resized("gemma3", 600, pad_token_id=0, eos_token_id=1, bos_token_id=2), sentencepiece_like()
    model.generation_config.eos_token_id = [1, 4]
    trimmed = trim_vocabulary(model, tokenizer, ["The function returns."]).tokenizer
    written(model, trimmed, tmp_path / "model.gguf")
    read = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    try:
        assert read.token_eos() == 1
        assert read.metadata["tokenizer.chat_template"] == trimmed.chat_template
        chat = trimmed.apply_chat_template([{"role": "user", "content": "Return a sum!"}], tokenize=False)
        ids = trimmed(chat, add_special_tokens=False)["input_ids"]
        assert read.tokenize(chat.encode(), add_bos=False, special=True) == ids
        assert read.detokenize(ids[1:-2]).decode() == "Return a sum!"
    finally:
        read.close()


@pytest.mark.parametrize(
    ("family", "name", "broken"),
    [
        ("llama", "_interleave", lambda weight, heads: weight),
        ("gemma3", "_encoded", lambda name, tensor, qtype, real=export_gguf._encoded: real(name, tensor * 0.9, qtype)),
    ],
)
def test_a_wrong_layout_is_caught(
    family: str, name: str, broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_llama_cpp: None
) -> None:
    monkeypatch.setattr(export_gguf, name, broken)
    with pytest.raises(GossamerError, match="round trip, export gguf f16: must keep the most probable token"):
        written(Bench(family).model(), Bench(family).tokenizer(), tmp_path / "model.gguf")


def test_another_tokenizer_or_template_is_caught(tmp_path: Path, no_llama_cpp: None) -> None:
    bench = Bench("llama")
    model, tokenizer = bench.model(), bench.tokenizer()
    before, path = record(model, tokenizer), tmp_path / "model.gguf"
    tokens = read_tokens(tokenizer, 320, before.ends)
    write_gguf(model, tokens, path, "f16")
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(GossamerError, match="chat template: must be as before"):
        prove_gguf(path, model, other, before, "f16")
    write_gguf(model, dataclasses.replace(tokens, merges=tokens.merges[:20]), path, "f16")
    with pytest.raises(GossamerError, match="tokenizer: must cut texts as before"):
        prove_gguf(path, model, tokenizer, before, "f16")
    before.ends.append(7)
    with pytest.raises(GossamerError, match="end tokens: must be as before"):
        prove_gguf(path, model, tokenizer, before, "f16")


def ragged() -> Any:
    model = Bench("llama").model()
    write_widths(model, find_blocks(model))
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            lambda: Bench("gpt2").model(),
            r"LlamaForCausalLM \(llama\), Gemma3ForCausalLM \(gemma3\), got GPT2LMHeadModel",
        ),
        (lambda: Bench("bert").model(), "got BertModel"),
        (ragged, "pruned model"),
        (lambda: resized("gemma3", 320, query_pre_attn_scalar=32), "query_pre_attn_scalar = 16"),
        (lambda: resized("gemma3", 320, final_logit_softcapping=30.0), "final_logit_softcapping = None"),
        (lambda: resized("llama", 320, hidden_act="gelu"), "activation = 'silu'"),
        (lambda: resized("llama", 320, attention_bias=True), "attention_bias = False"),
        (
            lambda: resized("llama", 320, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "default or linear or llama3",
        ),
    ],
)
def test_models_without_a_gguf_form_are_refused(model: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_gguf_model(model())


def _changed(**changes: Any) -> PreTrainedTokenizerFast:
    tokenizer = Bench("llama").tokenizer()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for key, value in changes.items():
        owner = spec["model"] if key in spec["model"] else spec
        owner[key] = value
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="</s>", bos_token="<s>"
    )


def _word_piece() -> PreTrainedTokenizerFast:
    core = Tokenizer(tokenizer_models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[UNK]")


def _unordered() -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece_like()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = spec["model"]["merges"]
    made = [left + right for left, right in merges]
    place = next(place for place in range(1, len(made)) if made[place] == made[place - 1])
    merges.append(merges.pop(place))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="<eos>")


def _other_split() -> PreTrainedTokenizerFast:
    """Numbers cut digit by digit before the bytes."""
    steps = [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return _changed(pre_tokenizer=json.loads(pre_tokenizers.Sequence(steps).__getstate__()))


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (_word_piece, "must be BPE"),
        (lambda: _changed(pre_tokenizer=json.loads(pre_tokenizers.Whitespace().__getstate__())), "as GPT-2 or Llama 3"),
        (_other_split, "as GPT-2 or Llama 3"),
        (lambda: _changed(ignore_merges=True), "as GPT-2 or Llama 3"),
        (_unordered, "do not stand together"),
    ],
)
def test_tokenizers_that_gguf_cannot_express_are_refused(tokenizer: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_tokens(tokenizer(), 1000, [2])


def test_a_tokenizer_beyond_the_rows_is_refused() -> None:
    with pytest.raises(InputError, match="fit the model's 100 embedding rows, got token ids up to"):
        read_tokens(Bench("llama").tokenizer(), 100, [2])


def test_a_tokenizer_needs_an_end_token() -> None:
    tokenizer = Bench("llama").tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="have an end token"):
        read_tokens(tokenizer, 320, [])
    assert read_tokens(tokenizer, 320, [2]).eos == 2


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = Bench("llama").model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    tokens = read_tokens(Bench("llama").tokenizer(), 320, [2])
    with pytest.raises(InputError, match=r"range of float16, got 1e\+05 in blk\.0\.ffn_up\.weight"):
        write_gguf(model, tokens, tmp_path / "model.gguf", "q8_0")
