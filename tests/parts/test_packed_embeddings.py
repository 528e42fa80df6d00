"""Embeddings packed with or without the head that is tied to them: one matrix, one place in the file, equal logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

from gossamer.compression.gptq import GPTQ
from gossamer.compression.rounding import Rounding
from gossamer.parts.decode_runner import Runner
from gossamer.parts.measure import parameters
from gossamer.parts.quant_format import find_matrices
from gossamer.parts.quant_linear import QuantEmbedding, TiedQuantLinear
from gossamer.parts.quantiser import dequantise, quantise
from gossamer.testing.bench import Bench, output

EVERYTHING: tuple[str, ...] = ()


def tied(family: str) -> Any:
    model = Bench(family).model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return model


def packed(model: Any, bits: int = 8) -> Any:
    return Rounding(bits=bits, group=16, skip=EVERYTHING).compress(copy.deepcopy(model)).model


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_tied_pair_is_packed_once_and_gives_the_logits_of_its_rounded_weight(family: str, tmp_path: Path) -> None:
    original = tied(family)
    embedding = original.get_input_embeddings()
    model = packed(original)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert isinstance(model.get_output_embeddings(), TiedQuantLinear)
    with torch.no_grad():
        rounded = quantise(embedding.weight, 8, 16, dtype=model.get_input_embeddings().scales.dtype)
        embedding.weight.copy_(dequantise(rounded, torch.float32))
    plain = Rounding(bits=8, group=16).compress(copy.deepcopy(original)).model
    inputs = Bench(family).inputs(2)
    torch.testing.assert_close(output(model, inputs), output(plain, inputs), atol=1e-5, rtol=1e-4)

    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert not any(name.startswith("lm_head") for name in names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output(again, inputs), output(model, inputs))
    assert again.get_output_embeddings().qweight is again.get_input_embeddings().qweight
    bare = AutoModel.from_pretrained(tmp_path)
    ids = inputs["input_ids"]
    assert torch.equal(bare.get_input_embeddings()(ids), model.get_input_embeddings()(ids))
    assert parameters(again)["total"] == parameters(original)["total"]
    twin = copy.deepcopy(again)
    assert twin.get_output_embeddings().qweight is twin.get_input_embeddings().qweight
    assert twin.get_output_embeddings().qweight is not again.get_output_embeddings().qweight


@pytest.mark.parametrize("weights", ["stored", "int4"])
def test_the_runner_reads_embeddings_from_the_packed_head(weights: str) -> None:
    model = packed(tied("gemma3"), bits=4 if weights == "int4" else 8)
    ids = Bench("gemma3").inputs(1)["input_ids"][0].tolist()
    runner = Runner(model, weights=weights, native="reference")
    assert runner.plan is not None, runner.reason
    wanted = output(model, {"input_ids": torch.tensor([ids])})[0, -1].float()
    found = runner.prefill(runner.open(), ids)
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 0.999


def test_moving_and_casting_keep_the_pair_together() -> None:
    model = packed(tied("llama")).to(torch.bfloat16)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.dtype == torch.bfloat16
    assert head.qweight is embedding.qweight
    head.lay()
    head.unlay()
    assert head.qweight is embedding.qweight


def test_an_embedding_of_its_own_is_packed_and_a_skipped_pair_is_not() -> None:
    own = packed(Bench("llama").model())
    assert isinstance(own.get_input_embeddings(), QuantEmbedding)
    assert not isinstance(own.get_output_embeddings(), TiedQuantLinear)
    pair = tied("llama")
    for word in ("lm_head", "embed"):
        matrices, left = find_matrices(pair, (word,))
        assert {"model.embed_tokens", "lm_head"} <= left.keys()
        assert not any("embed" in matrix.name for matrix in matrices)


def test_gptq_makes_up_for_the_errors_of_a_tied_head() -> None:
    model, bench = tied("gemma3"), Bench("gemma3")
    data = [bench.inputs(8), bench.inputs(5)]
    wanted = output(model, data[0]).detach()
    options = {"bits": 3, "group": 16, "skip": EVERYTHING}
    careful = GPTQ(**options).compress(copy.deepcopy(model), data).model
    plain = Rounding(**options).compress(copy.deepcopy(model)).model
    errors = [float((output(done, data[0]).detach() - wanted).pow(2).mean()) for done in (careful, plain)]
    assert errors[0] < errors[1]
