"""ONNX: encoders and decoders with cache run in ONNX Runtime as they do here, in any batch, length and past."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.core.errors import GossamerError, InputError, MissingExtra
from gossamer.parts import export_onnx
from gossamer.parts.export_onnx import OnnxDecoder, check_onnx_model, write_onnx
from gossamer.parts.export_proof import compare, record
from gossamer.parts.generation import greedy_config, left_pad
from gossamer.parts.surgery import find_blocks
from gossamer.parts.surgery_format import write_widths
from gossamer.testing.bench import PROMPTS, Bench


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """One layer with a window of 6 places, one without."""
    bench, folder = Bench("gemma3"), tmp_path_factory.mktemp("onnx")
    model = bench.model()
    write_onnx(model, bench.tokenizer(), folder)
    assert model.config._attn_implementation == "sdpa"
    return model, folder


def test_names_follow_optimum(decoder: tuple[Any, Path]) -> None:
    model, folder = decoder
    session = OnnxDecoder(folder).session
    inputs = {entry.name: entry.shape for entry in session.get_inputs()}
    outputs = {entry.name: entry.shape for entry in session.get_outputs()}
    layers = range(model.config.num_hidden_layers)
    pairs = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    past = [f"past_key_values.{pair}" for pair in pairs]
    assert list(inputs) == ["input_ids", "attention_mask", "position_ids", *past]
    assert list(outputs) == ["logits", *[f"present.{pair}" for pair in pairs]]
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert inputs["past_key_values.0.key"] == ["batch_size", 2, "past_sequence_length", 16]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gemma3_text"
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "generation_config.json").is_file()


def test_greedy_generation_is_that_of_transformers(decoder: tuple[Any, Path]) -> None:
    model, folder = decoder
    tokenizer = Bench("gemma3").tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    assert len({len(ids) for ids in prompts}) > 1
    for company in (prompts, prompts[:1]):
        config = greedy_config(model, tokenizer, max_new_tokens=10)
        config.eos_token_id = None
        wanted = model.generate(**left_pad(company, 0), generation_config=config)[:, -10:]
        assert torch.equal(OnnxDecoder(folder).generate(company, 0, 10), wanted)


def test_logits_through_the_cache_are_those_of_transformers(decoder: tuple[Any, Path]) -> None:
    model, folder = decoder
    before = record(model, Bench("gemma3").tokenizer())
    found = compare(before.logits, OnnxDecoder(folder).logits(before.ids))
    assert found.top1 == 1
    assert found.largest < 1e-3


def _ragged() -> Any:
    model = Bench("llama").model()
    write_widths(model, find_blocks(model))
    return model


@pytest.mark.parametrize(
    ("model", "words"), [(_ragged, "ragged"), (lambda: Bench("llava").model(), "encoder or decoder of text")]
)
def test_other_models_are_refused(model: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_onnx_model(model(), Bench("llama").tokenizer())


def test_an_image_encoder_is_refused() -> None:
    with pytest.raises(InputError, match="encoder or decoder of text"):
        check_onnx_model(Bench("vit").model(), Bench("clip").processor().image_processor)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(MissingExtra, match=r"gossamer\[onnx\]"):
        check_onnx_model(Bench("llama").model(), Bench("llama").tokenizer())


def test_what_cannot_be_traced_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Any) -> Any:
        raise RuntimeError("a data-dependent branch\nlong report")

    monkeypatch.setattr(export_onnx, "_decoder", fail)
    model = Bench("llama").model()
    with pytest.raises(GossamerError, match=r"must be traced by torch\.onnx, got a data-dependent branch; export to"):
        write_onnx(model, Bench("llama").tokenizer(), tmp_path)
    assert model.config._attn_implementation == "sdpa"
