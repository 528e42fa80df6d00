"""Plain models: packed weights are restored exactly, under the names and shapes of transformers' own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gossamer.core.errors import InputError
from gossamer.parts.export_plain import as_float32, plain_model, refuse_own_shapes, restore_linears
from gossamer.parts.quant_linear import PackedWeight
from gossamer.parts.surgery import find_blocks
from gossamer.parts.surgery_format import write_widths
from gossamer.pipeline.single import compress, system
from gossamer.testing.bench import Bench


def packed(family: str) -> Any:
    return compress(Bench(family).model(), "rounding", bits=4, skip=()).model


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_restored_weights_compute_the_same(family: str) -> None:
    model, inputs = as_float32(packed(family)), Bench(family).inputs()
    plain = plain_model(model)
    assert not any(isinstance(module, PackedWeight) for module in plain.modules())
    assert getattr(plain.config, "quantization_config", None) is None
    with torch.no_grad():
        assert torch.allclose(plain(**inputs).logits, model(**inputs).logits, atol=1e-5)


def test_tied_rows_are_tied_again() -> None:
    model = packed("gemma3")
    assert not model.config.tie_word_embeddings
    plain = plain_model(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_a_model_without_packed_weights_is_itself() -> None:
    model = Bench("llama").model()
    assert plain_model(model) is model


def test_an_adapter_on_packed_layers_can_be_folded_in() -> None:
    model, inputs = packed("llama"), Bench("llama").inputs()
    mos = system("mos", rank=3)
    attached = mos.attach(model)
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wanted = as_float32(attached)(**inputs).logits
    restore_linears(attached)
    plain = plain_model(mos.merge(attached))
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with torch.no_grad():
        assert torch.allclose(plain(**inputs).logits, wanted, atol=1e-4)


def test_the_embedding_scale_of_gemma_is_not_rounded() -> None:
    model = Bench("gemma3").model().to(torch.bfloat16)
    model.model.embed_tokens.scalar_embed_scale = 640**0.5
    model.model.embed_tokens.embed_scale = torch.tensor(640**0.5, dtype=torch.bfloat16)
    as_float32(model)
    assert model.dtype == torch.float32
    assert float(model.model.embed_tokens.embed_scale) == pytest.approx(640**0.5, rel=1e-6)


def test_ragged_models_are_refused() -> None:
    model = Bench("llama").model()
    write_widths(model, find_blocks(model))
    with pytest.raises(InputError, match="loads after `import gossamer`"):
        refuse_own_shapes(model, "export safetensors")
