"""The door to models: where each comes from, and what is said when there is none."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from gossamer.core.errors import InputError, MissingExtra
from gossamer.core.paths import sha256
from gossamer.hub import models
from gossamer.hub.models import load_model, packaged, packaged_names, resolve
from gossamer.hub.models._onnx import read_onnx
from gossamer.hub.models._packaged import PackagedFile, PackagedModel
from gossamer.hub.models.dinov2_small import backbone_state
from gossamer.parts.sentences import encode_texts


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "gossamer"))
    return tmp_path / "gossamer" / "models"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "hf"


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(tokenizer_models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


def _llama_folder(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval().to(dtype)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return model


def test_names_are_the_files_of_the_folder() -> None:
    assert {"gemma-3-270m", "all-minilm-l6-v2", "dinov2-small"} <= set(packaged_names())
    for name in packaged_names():
        model, _ = packaged(name)
        assert model.name == name
        assert model.licence
        assert all(len(file.sha256) == 64 and file.version for file in model.files)
        assert model.extra or model.install


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_folder(tmp_path: Path, dtype: Any, expected: torch.dtype) -> None:
    saved = _llama_folder(tmp_path / "m", torch.bfloat16)
    model, tokenizer = load_model(tmp_path / "m", dtype=dtype)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == expected
    assert not model.training
    assert model.config._name_or_path == model.name_or_path == str(tmp_path / "m")
    assert tokenizer.decode(tokenizer("héllo")["input_ids"]) == "héllo"
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight.to(expected))
    assert resolve(tmp_path / "m").source == "folder"


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(InputError, match=r"got no config\.json"):
        resolve(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="an adapter"):
        resolve(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no \.safetensors"):
        resolve(folder)
    (folder / "pytest.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickled weights only"):
        resolve(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')
    with pytest.raises(InputError, match="no model-00002"):
        resolve(folder)


def test_a_dropped_weight_is_refused(tmp_path: Path) -> None:
    _llama_folder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"must hold every weight.*up_proj"):
        load_model(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-50])
    with pytest.raises(InputError, match="whole safetensors files"):
        load_model(tmp_path)


def test_an_unknown_quantiser_is_refused(tmp_path: Path) -> None:
    _llama_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "nobody"}}))
    with pytest.raises(InputError, match=r"registered quantiser.*'nobody'"):
        load_model(tmp_path)


def test_no_tokenizer_is_refused(tmp_path: Path) -> None:
    _llama_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="save the tokenizer"):
        load_model(tmp_path)


def test_an_encoder_is_loaded_as_one(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    assert type(load_model(tmp_path)[0]) is BertModel
    with pytest.raises(InputError, match="must hold every weight"):
        load_model(tmp_path, task="causal-lm")


def test_nothing_found_names_each_place_and_asks_no_network(
    cache: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def snapshot(name: str, *, local_files_only: bool = False, **_: Any) -> str:
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(InputError) as caught:
        resolve("gemma-3-270", offline=True)
    text = str(caught.value)
    for part in ("local folder", "packaged models", "Hugging Face cache", str(hub_cache), "offline", "'gemma-3-270m'?"):
        assert part in text
    assert asked == [True]
    asked.clear()
    with pytest.raises(InputError, match="Hugging Face hub: LocalEntryNotFoundError"):
        resolve("gemma-3-270", offline=False)
    assert asked == [True, False]


def test_a_path_that_does_not_exist() -> None:
    with pytest.raises(InputError, match="not an id of the form owner/name"):
        resolve("/no/such/folder", offline=True)


def test_hub_cache_and_an_incomplete_one(hub_cache: Path) -> None:
    repo = hub_cache / "models--own--tiny"
    (repo / "refs").mkdir(parents=True)
    revision = "0" * 40
    (repo / "refs" / "main").write_text(revision)
    _llama_folder(repo / "snapshots" / revision)
    found = resolve("own/tiny", offline=True)
    assert (found.source, found.name) == ("cache", "own/tiny")
    assert load_model("own/tiny", offline=True)[0].config._name_or_path == "own/tiny"
    (found.path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"Hugging Face cache: no \.safetensors file"):
        resolve("own/tiny", offline=True)


def test_minilm_is_converted_once_and_encodes(cache: Path) -> None:
    found = resolve("all-minilm-l6-v2")
    assert (found.source, found.path) == ("package", cache / "all-minilm-l6-v2")
    manifest = json.loads((found.path / "manifest.json").read_text())
    assert {name: sha256(found.path / name) for name in manifest["files"]} == {
        name: file["sha256"] for name, file in manifest["files"].items()
    }
    written = (found.path / "model.safetensors").stat().st_mtime_ns
    model, tokenizer = load_model("all-minilm-l6-v2")
    assert (found.path / "model.safetensors").stat().st_mtime_ns == written
    assert model.config._name_or_path == "all-minilm-l6-v2"

    texts = ["A cat sits on the mat.", "The stock market fell today.", "A kitten rests on a rug, " * 3]
    vectors = encode_texts(model, tokenizer, texts, batch_size=2)
    assert vectors.shape == (3, 384)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1] + 0.3
    alone = torch.cat([encode_texts(model, tokenizer, [text]) for text in texts])
    torch.testing.assert_close(vectors, alone, atol=1e-5, rtol=0)
    assert encode_texts(model, tokenizer, []).shape == (0, 384)
    long = encode_texts(model, tokenizer, ["word " * 254, "word " * 900])
    torch.testing.assert_close(long[0], long[1], atol=1e-5, rtol=0)

    (found.path / "config.json").write_text("{}")
    resolve("all-minilm-l6-v2")
    assert json.loads((found.path / "config.json").read_text())["model_type"] == "bert"


def test_dinov2_has_every_weight_and_sees(cache: Path) -> None:
    model, processor = load_model("dinov2-small")
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 255, (7, 9, 3)), np.ones((40, 40, 1))).astype(np.uint8)
    noise = rng.integers(0, 255, image.shape, dtype=np.uint8)
    pixels = processor(images=[image, image[:, ::-1], noise], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, 224, 224)
    with torch.no_grad():
        states = model(pixels).last_hidden_state
    assert states.shape == (3, 257, 384)
    mirrored, other = torch.cosine_similarity(states[0, 0], states[1:, 0], dim=-1)
    assert mirrored > other + 0.2


def _message(*fields: tuple[int, bytes | int]) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += bytes([number << 3]) + _varint(value)
        else:
            out += bytes([number << 3 | 2]) + _varint(len(value)) + value
    return out


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def test_onnx_reader_finds_weights_through_their_biases(tmp_path: Path) -> None:
    matrix, bias = torch.randn(3, 200), torch.randn(200)

    def tensor(name: str, value: torch.Tensor) -> bytes:
        dims = tuple((1, size) for size in value.shape)
        return _message(*dims, (2, 1), (8, name.encode()), (9, value.numpy().tobytes()))

    graph = _message(
        (1, _message((1, b"x"), (1, b"onnx::MatMul_1"), (2, b"y"), (4, b"MatMul"))),
        (1, _message((1, b"backbone.fc.bias"), (1, b"y"), (2, b"z"), (4, b"Add"))),
        *((5, tensor(name, value)) for name, value in (("onnx::MatMul_1", matrix), ("backbone.fc.bias", bias))),
        (5, tensor("onnx::Reshape_3", torch.ones(1, 4, 2))),
        (5, tensor("onnx::Concat_2", torch.zeros(1, 1, 2))),
    )
    path = tmp_path / "x.onnx"
    path.write_bytes(_message((1, 8), (7, graph)))
    state = backbone_state(*read_onnx(path))
    assert torch.equal(state["fc.weight"], matrix.T)
    assert torch.equal(state["fc.bias"], bias)
    assert state["embeddings.position_embeddings"][0, :, 0].tolist() == [0, 1, 1, 1, 1]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="whole ONNX file"):
        read_onnx(path)


def test_a_corrupt_or_missing_package_is_refused_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, convert = packaged("all-minilm-l6-v2")
    changed = dataclasses.replace(model, files=(dataclasses.replace(model.files[0], sha256="0" * 64),))
    with monkeypatch.context() as patch:
        patch.setattr(f"{models.__name__}.all_minilm_l6_v2.MODEL", changed)
        with pytest.raises(InputError, match="must have SHA-256 0000"):
            resolve("all-minilm-l6-v2")
    gone = dataclasses.replace(model, files=(PackagedFile("no-such-package", "1", "x", "0"),))
    with pytest.raises(MissingExtra, match=r"gossamer\[minilm\]"):
        gone.read()
    with pytest.raises(InputError, match="pip install it"):
        dataclasses.replace(gone, extra="", install="pip install it").read()

    def half(target: Path) -> dict[str, Any]:
        convert(target)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "packaged", lambda name: (model, half))
    with pytest.raises(KeyboardInterrupt):
        resolve("all-minilm-l6-v2")
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_two_at_once_convert_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def slow(target: Path) -> dict[str, Any]:
        calls.append(target)
        time.sleep(0.2)
        (target / "config.json").write_text("{}")
        return {}

    tiny = PackagedModel(name="dinov2-small", licence="none", files=(), notes=())
    monkeypatch.setattr(models, "packaged", lambda name: (tiny, slow))
    threads = [threading.Thread(target=resolve, args=("dinov2-small",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert (cache / "dinov2-small" / "manifest.json").is_file()


def _gguf(path: Path) -> Gemma3ForCausalLM:
    """A tiny Gemma 3 in GGUF's layout: norm weights hold 1 + w."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abc▁", "ab"]
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(pieces), hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, max_position_embeddings=64,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(6)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(8)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([3] * 4 + [6] * 256 + [1] * 5)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 6)
    for key, value in model.state_dict().items():
        if key != "lm_head.weight":
            name = names.get_name(key, try_suffixes=(".weight",))
            writer.add_tensor(name, (value + 1 if "norm" in key else value).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    saved = _gguf(path)
    found = resolve(path)
    assert (found.gguf, found.name, found.gguf_bytes) == (path, "tiny", path.stat().st_size)
    model, tokenizer = load_model(path)
    assert model.dtype == torch.float32
    ids = tokenizer("ab c", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, saved(ids).logits, atol=1e-4, rtol=1e-4)
    whole = path.read_bytes()
    for size in (20, 400, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="cut short"):
            load_model(path)
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match="must be a GGUF file"):
        resolve(path)
    with pytest.raises(InputError, match="give the file itself"):
        resolve(tmp_path)
