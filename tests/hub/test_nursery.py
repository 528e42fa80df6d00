from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import gossamer.hub.nursery
from gossamer.core.errors import OptionError
from gossamer.hub.corpora import Corpus
from gossamer.hub.nursery import load_nursery, nursery_models, training
from gossamer.hub.nursery.training import NurserySpec, train_nursery

TINY = NurserySpec(
    vocabulary=300, hidden=32, intermediate=48, layers=2, heads=2, kv_heads=1, positions=64,
    tokens=24 * 4 * 16, window=16, batch=4, rate=1e-2, bfloat16=False,
)  # fmt: skip
FOLDER = Path(gossamer.hub.nursery.__file__).parent


def corpus(name: str, split: str = "train") -> Corpus:
    rng = random.Random(f"{name} {split}")
    words = ["tensor", "graph", "node", "value", "list", "café", "return", "index"]
    rows = [{"text": " ".join(rng.choices(words, k=12)), "source": f"s{n // 2}"} for n in range(60)]
    return Corpus(name, split, rows, "0" * 64, "none", ("x==1",))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(training, "load_corpus", corpus)
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def test_a_run_learns_and_writes_a_model_that_loads(cache: Path) -> None:
    report = train_nursery("tiny", spec=TINY, out=cache / "out")
    assert report["steps"] == 24
    assert [step for step, _ in report["curve"]] == [20, 24]
    assert report["curve"][-1][1] < report["curve"][0][1] < math.log(300)
    assert report["trained_tokens"] == TINY.tokens
    assert json.loads((cache / "out/training.json").read_text()) == report
    assert all(value.dtype == torch.bfloat16 for value in weights(cache / "out").values())
    model = AutoModelForCausalLM.from_pretrained(cache / "out")
    tokenizer = AutoTokenizer.from_pretrained(cache / "out")
    assert 258 < len(tokenizer) <= model.config.vocab_size == 300
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    text = "un café, a\n\tnode 漢"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (cache / "cache/nursery/tiny-early/model.safetensors").exists()


def test_a_killed_run_goes_on_exactly(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_nursery("tiny", spec=TINY, out=cache / "whole")
    monkeypatch.setenv("GOSSAMER_CACHE", str(cache / "other"))
    torch.manual_seed(99)
    assert train_nursery("tiny", spec=TINY, out=cache / "resumed", stop_after=7)["steps"] == 7
    assert not (cache / "resumed").exists()
    torch.manual_seed(5)
    resumed = train_nursery("tiny", spec=TINY, out=cache / "resumed")
    assert resumed["curve"] == whole["curve"]
    expected = weights(cache / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(cache / "resumed").items())


def test_a_checkpoint_of_other_settings_is_not_used(cache: Path) -> None:
    train_nursery("tiny", spec=TINY, out=cache / "out", stop_after=5)
    again = train_nursery("tiny", spec=TINY, tokens=2 * TINY.tokens, out=cache / "out", stop_after=3)
    assert again["steps"] == 3


def test_every_window_is_seen_once_an_epoch(cache: Path) -> None:
    stream = np.arange(10 * 16 + 5, dtype=np.uint16)
    model = training._new_model(TINY)
    trainer = training._Trainer(TINY, model, stream, cache / "checkpoint.pt", "x")
    seen = np.concatenate([trainer._batch(step) for step in range(5)])[:, 0] // 16
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_held_out_bits_are_per_byte_of_text(cache: Path) -> None:
    train_nursery("tiny", spec=TINY, out=cache / "out")
    model = AutoModelForCausalLM.from_pretrained(cache / "out")
    tokenizer = AutoTokenizer.from_pretrained(cache / "out")
    ids = tokenizer("tensor graph café value " * 8).input_ids[:32]
    measured = training.held_out(model, np.array(ids, np.uint16), tokenizer, TINY)
    nats, size = 0.0, 0
    for start in (0, 16):
        window = torch.tensor([ids[start : start + 16]])
        with torch.no_grad():
            nats += model(input_ids=window, labels=window).loss.item() * 15
        size += len(tokenizer.decode(ids[start + 1 : start + 16]).encode())
    assert measured["held_out_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_code_makes_up_its_share(cache: Path) -> None:
    report = train_nursery("tiny", spec=TINY, out=cache / "out")
    share = report["unique_code_tokens"] / (report["unique_code_tokens"] + report["unique_prose_tokens"])
    assert share == pytest.approx(TINY.code_share, abs=0.05)


@pytest.mark.parametrize("call", [load_nursery, train_nursery])
def test_an_unknown_name_is_told(call: Any) -> None:
    with pytest.raises(OptionError, match="nursery model: must"):
        call("llama-70b")


def test_listing_the_models_needs_no_torch() -> None:
    code = "import sys, gossamer.hub.nursery as n; n.nursery_models(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_committed_model_knows_english() -> None:
    assert "llama-7m" in nursery_models()
    model, tokenizer = load_nursery("llama-7m")
    report = json.loads((FOLDER / "llama-7m/training.json").read_text())
    assert report["command"].startswith("python -m gossamer.hub.nursery.train llama-7m")
    assert len(tokenizer) == model.config.vocab_size == 8192
    assert (FOLDER / "llama-7m/model.safetensors").stat().st_size < 16 * 2**20
    assert sum(p.numel() for p in model.parameters()) == report["parameters"] < 7_000_000
    text = "Returns the number of elements in the list. If the file does not exist, an error is raised."
    window = tokenizer(tokenizer.bos_token + text, return_tensors="pt").input_ids
    with torch.no_grad():
        nats = model(input_ids=window, labels=window).loss.item() * (window.numel() - 1)
    assert nats / math.log(2) / len(text) < 1.6
    assert report["held_out_bits_per_byte"] < 1.8
