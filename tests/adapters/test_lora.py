"""LoRA through the adapter base class: targets, scaling, export, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.adapters.lora import LoRA
from gossamer.adapters.mos import MoS
from gossamer.core.errors import InputError, OptionError
from gossamer.parts.injection import projections
from gossamer.parts.lora import lora_parameters
from gossamer.parts.quant_linear import QuantLinear

IDS = torch.tensor([[3, 7, 1, 9, 4], [2, 2, 8, 5, 6]])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def trained(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6.0 / 4), (True, 6.0 / 2)])
def test_forward_is_the_formula(rslora: bool, scale: float) -> None:
    model = trained(LoRA(rank=4, alpha=6.0, use_rslora=rslora).attach(llama()))
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    x = torch.randn(3, 24)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + scale * (x @ a.T) @ b.T)


def test_all_linear_is_every_projection_and_not_the_head() -> None:
    model = LoRA(rank=2).attach(llama())
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    found = projections(llama())
    assert adapted == {projection.path for projection in found}
    assert len(found) == 14
    assert lora_parameters(found, 2) == model.get_nb_trainable_parameters()[0]


def test_export_merge_and_detach(tmp_path: Path) -> None:
    system = LoRA(rank=3, dropout=0.5)
    base = llama()
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    model = trained(system.attach(base))
    expected = logits(model)
    system.export_lora(model, tmp_path / "lora")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert model.peft_config["default"].inference_mode is False
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "lora")), expected)
    assert all(torch.equal(value, weights[key]) for key, value in system.detach(model).state_dict().items())
    again = trained(system.attach(base))
    merged = system.merge(again)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)


def test_refusals() -> None:
    with pytest.raises(OptionError, match=r"must be at most 8, the smaller width of .*k_proj, got 9"):
        LoRA(rank=9).attach(llama())
    with pytest.raises(OptionError, match="must match linear layers, got 'nothing'"):
        LoRA(target_modules="nothing").attach(llama())
    with pytest.raises(OptionError, match="rank: must be >= 1"):
        LoRA(rank=0)
    system = LoRA()
    model = system.attach(llama())
    with pytest.raises(InputError, match="without an adapter"):
        system.attach(model)


@pytest.mark.parametrize("system", [LoRA(rank=2), MoS(rank=2)], ids=["lora", "mos"])
def test_trains_beside_packed_layers_and_refuses_to_merge(system: Any) -> None:
    base = llama()
    for layer in base.model.layers:
        packed = QuantLinear(24, 16, bits=4, group=8, scale_dtype=torch.float32)
        packed.fill(layer.mlp.down_proj.weight)
        layer.mlp.down_proj = packed
    plain = logits(base)
    model = system.attach(base)
    torch.testing.assert_close(logits(model), plain)
    model(IDS, labels=IDS).loss.backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("down_proj" in name for name in moved)
    with pytest.raises(InputError, match="float weight"):
        system.merge(model)
