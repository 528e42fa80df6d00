"""Exports are proved before they are in place: what is wrong, or does not fit on the disk, leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.core.bundle import Bundle
from gossamer.core.errors import GossamerError, InputError, OptionError
from gossamer.hub.models import load_model
from gossamer.hub.nursery import load_nursery
from gossamer.parts import export_gguf, export_plain
from gossamer.parts.export_onnx import OnnxEncoder
from gossamer.parts.export_proof import Agreement, Bound, prove
from gossamer.parts.sentences import encode_texts
from gossamer.parts.vocabulary import trim_vocabulary
from gossamer.pipeline import exporting
from gossamer.pipeline.exporting import check_export, export
from gossamer.pipeline.single import compress, system
from gossamer.testing.bench import BENIGN, Bench

OUT = {"gguf": "model.gguf", "safetensors": "model", "onnx": "model", "peft": "adapter"}


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def adapted(family: str = "llama", *, bits: int = 0) -> Bundle:
    bundle, mos = Bench(family).bundle(), system("mos", rank=3)
    if bits:
        bundle.model = compress(bundle.model, "rounding", bits=bits, skip=()).model
    bundle.model = mos.attach(bundle.model)
    bundle.adapters.append(mos)
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return bundle


WITHOUT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert "gossamer" not in sys.modules
ids = tokenizer("The function returns")["input_ids"]
logits = model(torch.tensor([ids])).logits[0, -1]
print(json.dumps([ids, tokenizer.chat_template, logits.tolist()]))
"""


def test_plain_safetensors_load_without_gossamer(tmp_path: Path) -> None:
    """From packed weights with an adapter on them."""
    bundle, tokenizer = adapted("gemma3", bits=4), Bench("gemma3").tokenizer()
    ids = tokenizer("The function returns")["input_ids"]
    with torch.no_grad():
        wanted = bundle.model(torch.tensor([ids])).logits[0, -1]
    done = export(bundle, tmp_path / "model", "safetensors", "f32")
    assert done.bytes == sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path / "model")], capture_output=True, text=True, check=True, cwd="/"
    )
    read, template, logits = json.loads(run.stdout.splitlines()[-1])
    assert (read, template) == (ids, tokenizer.chat_template)
    assert torch.allclose(torch.tensor(logits), wanted, atol=1e-4)


def test_packed_weights_become_bfloat16(tmp_path: Path) -> None:
    bundle = Bench("llama").bundle()
    bundle.model = compress(bundle.model, "rounding", bits=4, skip=()).model
    assert export(bundle, tmp_path / "model", "safetensors").type == "bf16"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


@pytest.mark.parametrize("bits", [0, 4])
def test_an_adapter_becomes_plain_lora(bits: int, tmp_path: Path) -> None:
    done = export(adapted(bits=bits), tmp_path / "adapter", "peft")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert done.proof["largest"] < 0.05
    assert left(tmp_path) == ["adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


def test_an_adapter_is_folded_into_a_gguf(tmp_path: Path) -> None:
    done = export(adapted("llama", bits=8), tmp_path / "new" / "model.gguf", "gguf")
    assert left(tmp_path) == ["new", "new/model.gguf"]
    assert done.bytes == (tmp_path / "new" / "model.gguf").stat().st_size
    assert done.proof["transformers"]["kl"] < 1e-4


def test_an_encoder_is_written_as_safetensors(tmp_path: Path) -> None:
    bench = Bench("bert")
    done = export(Bundle(bench.model(), bench.tokenizer()), tmp_path / "model", "safetensors", "f16")
    assert done.proof["largest"] <= 1e-3


def test_minilm_in_onnx_gives_the_same_embeddings(tmp_path: Path) -> None:
    model, tokenizer = load_model("all-minilm-l6-v2", dtype="float32")
    wanted = encode_texts(model, tokenizer, BENIGN)
    done = export(Bundle(model, tokenizer), tmp_path / "minilm", "onnx")
    assert done.proof["largest"] <= 1e-4
    encoder = OnnxEncoder(tmp_path / "minilm", model.config)
    assert torch.allclose(encode_texts(encoder, tokenizer, BENIGN), wanted, atol=1e-4)
    assert torch.allclose(encode_texts(encoder, tokenizer, BENIGN[:1]), wanted[:1], atol=1e-4)
    assert not (tmp_path / "minilm" / "generation_config.json").exists()


def test_a_trimmed_gguf_agrees_in_llama_cpp(tmp_path: Path) -> None:
    """At no less than 500 positions."""
    pytest.importorskip("llama_cpp")
    model, tokenizer = load_nursery("llama-7m")
    trimmed = trim_vocabulary(model, tokenizer, [*BENIGN, "def area(width, height):\n    return width * height\n"])
    assert trimmed.report.tokens_after < 2000
    done = export(Bundle(trimmed.model, trimmed.tokenizer), tmp_path / "model.gguf", "gguf")
    figures = done.proof["llama.cpp"]
    assert figures["positions"] >= 500
    assert figures["top1"] >= 0.99


@pytest.mark.parametrize("to", ["gguf", "safetensors"])
def test_a_lie_is_caught_and_leaves_nothing(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers = {"gguf": (export_gguf, "write_gguf"), "safetensors": (export_plain, "write_safetensors")}
    module, name = writers[to]
    real = getattr(module, name)

    def lie(model: Any, *rest: Any) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.zero_()
        real(model, *rest)

    monkeypatch.setattr(module, name, lie)
    with pytest.raises(GossamerError, match=f"round trip, export {to}"):
        export(Bench("llama").bundle(), tmp_path / "deep" / "er" / OUT[to], to)
    assert left(tmp_path) == []


@pytest.mark.parametrize("to", ["gguf", "safetensors", "onnx", "peft"])
def test_a_broken_writer_leaves_nothing(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        for argument in arguments:
            if isinstance(argument, Path):
                target = argument / "half" if argument.is_dir() else argument
                target.write_bytes(b"half")
        raise RuntimeError("broken")

    for module in (export_gguf, export_plain, exporting.export_onnx):
        for name in ("write_gguf", "write_safetensors", "write_peft", "write_onnx"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, broken)
    with pytest.raises(RuntimeError, match="broken"):
        export(adapted(), tmp_path / OUT[to], to)
    assert left(tmp_path) == []


FULL = (
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError("131072 requested and 4096 written"),
    RuntimeError("I/O error: No space left on device (os error 28)"),
)


@pytest.mark.parametrize("error", FULL, ids=["system", "numpy", "safetensors"])
@pytest.mark.parametrize("to", ["gguf", "safetensors"])
def test_a_full_disk_says_how_much_room_is_needed(
    to: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(export_gguf, "write_gguf", full)
    monkeypatch.setattr(export_plain, "write_safetensors", full)
    with pytest.raises(GossamerError, match=r"find room for about [\d,]+ MB, got a full disk .* nothing was left"):
        export(Bench("llama").bundle(), tmp_path / OUT[to], to)
    assert left(tmp_path) == []


def test_too_little_room_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    monkeypatch.setattr(export_gguf, "write_gguf", lambda *_: pytest.fail("written"))
    with pytest.raises(GossamerError, match="find room for about"):
        export(Bench("llama").bundle(), tmp_path / "model.gguf", "gguf")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("to", "kind", "out", "error", "words"),
    [
        ("gguff", None, "x", OptionError, "did you mean 'gguf'?"),
        ("gguf", "q4_k", "x.gguf", OptionError, "did you mean 'q4_0'?"),
        ("onnx", "f16", "x", OptionError, "leave --type out"),
        ("gguf", None, "x", InputError, "ending in .gguf"),
        ("safetensors", None, ".", InputError, "must be a new path"),
    ],
)
def test_wrong_use_is_refused_before_loading(
    to: str, kind: str | None, out: str, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words.replace("?", r"\?")):
        check_export(tmp_path / out, to, kind)


def test_what_has_no_peft_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a PEFT adapter attached, got a model without one"):
        export(Bench("llama").bundle(), tmp_path / "adapter", "peft")
    pat = system("pat")
    bundle = Bench("llama").bundle()
    bundle.model = pat.attach(bundle.model)
    bundle.adapters.append(pat)
    with pytest.raises(InputError, match="an adapter of hooks and own modules"):
        export(bundle, tmp_path / "adapter", "peft")


def test_a_model_of_another_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="get a model of transformers, got Linear"):
        export(Bundle(torch.nn.Linear(2, 2), None), tmp_path / "model", "safetensors")


def test_an_accelerated_model_is_refused(tmp_path: Path) -> None:
    bundle = Bench("llama").bundle()
    bundle.model.gossamer_acceleration = "dyvte"
    with pytest.raises(InputError, match="that nothing accelerates"):
        export(bundle, tmp_path / "model.gguf", "gguf")


@pytest.mark.parametrize(
    ("found", "bound"),
    [
        (Agreement(500, 0.98, 0.0, 0.0), Bound(top1=0.99)),
        (Agreement(500, 1.0, 0.2, 0.0), Bound(kl=0.1)),
        (Agreement(500, 1.0, float("nan"), 0.0), Bound(kl=0.1)),
        (Agreement(500, 1.0, 0.0, float("nan")), Bound(largest=0.1)),
    ],
)
def test_figures_beyond_a_bound_are_errors(found: Agreement, bound: Bound) -> None:
    with pytest.raises(GossamerError, match="round trip, x: must keep the most probable token"):
        prove(found, bound, "x")
    assert prove(Agreement(500, 1.0, 0.0, 0.0), bound, "x")["positions"] == 500
