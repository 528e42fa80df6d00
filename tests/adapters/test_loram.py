"""LoRAM: the small update, its way back to the whole model exactly, and what is refused on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from gossamer.adapters.lora import LoRA
from gossamer.adapters.loram import LoRAM, LoRAMPeftConfig
from gossamer.compression.rounding import Rounding
from gossamer.compression.small_copy import SmallCopyMaker
from gossamer.core.errors import InputError, OptionError
from gossamer.parts.injection import projections
from gossamer.parts.small_copies import Place, places, read_record
from gossamer.testing.adapters import evaluated, fill, train
from gossamer.testing.bench import Bench

FAMILIES = ("llama", "gemma3", "gpt2")
LAYERS = 3


def whole(family: str = "llama", seed: int = 0) -> Any:
    return Bench(family).model(layers=LAYERS, seed=seed)


def small(family: str = "llama", **options: Any) -> Any:
    bench = Bench(family)
    maker = SmallCopyMaker(**{"method": "stru", "protect_first": 1, **options})
    return maker.compress(whole(family), [bench.inputs()]).model


def attached(copied: Any, **options: Any) -> Any:
    """With factors moved off their start."""
    known = set(map(id, copied.parameters()))
    return fill(LoRAM(rank=4, **options).attach(copied), known)


def deltas(model: Any) -> dict[str, Tensor]:
    """Path -> the update ``s B A`` of the layer, [out, in]."""
    found = {}
    for path, layer in model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            name = "default"
            found[path] = layer.get_delta_weight(name).detach()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["rand", "stru"])
def test_the_recovered_delta_is_the_small_one_where_it_stayed_and_zero_elsewhere(family: str, method: str) -> None:
    model = attached(small(family, method=method))
    record, base = read_record(model.get_base_model()), whole(family)
    assert record is not None
    found = places(base, record)
    recovered = LoRAM().recover(model, base)
    little, full = deltas(model), deltas(recovered)
    assert set(little) == set(full)
    for path, update in full.items():
        flip = family == "gpt2"
        wide, part = (update.T, little[path].T) if flip else (update, little[path])
        place = found.get(path, Place())
        rows = torch.arange(wide.shape[0]) if place.rows is None else place.rows
        columns = torch.arange(wide.shape[1]) if place.columns is None else place.columns
        expected = torch.zeros_like(wide)
        expected[rows[:, None], columns] = part
        torch.testing.assert_close(wide, expected, atol=1e-6, rtol=1e-6)
        gone = torch.ones_like(wide, dtype=torch.bool)
        gone[rows[:, None], columns] = False
        assert bool((wide[gone] == 0).all())
        assert bool(gone.any()) == (path in found)
    assert len(found) == {"gpt2": 8, "llama": 14, "gemma3": 14}[family]


def test_it_runs_on_the_original_weights_not_on_the_aligned_ones() -> None:
    copied, base = small(), whole()
    inputs, untouched = Bench("llama").inputs(), evaluated(whole(), Bench("llama").inputs())
    with torch.no_grad():
        for parameter in copied.parameters():  # an alignment
            parameter.add_(0.01)
    model = attached(copied)
    recovered = LoRAM().recover(model, base)
    plain = dict(whole().named_parameters())
    for name, parameter in recovered.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, plain[name.replace(".base_layer", "")])
    with recovered.disable_adapter():
        assert torch.equal(evaluated(recovered, inputs), untouched)
    assert not torch.allclose(evaluated(recovered, inputs), untouched, atol=1e-3)
    merged = LoRAM().merge(recovered)
    naive = whole()
    with torch.no_grad():
        for path, update in deltas(LoRAM().recover(model, whole())).items():
            naive.get_submodule(path).weight.add_(update)
    torch.testing.assert_close(evaluated(merged, inputs), evaluated(naive, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["rand", "unst"])
def test_ratio_0_is_lora(method: str) -> None:
    """The same start, the same steps, the same outputs as LoRA on the whole model."""
    inputs = Bench("llama").inputs()
    copied = small(method=method, ratio=0.0)
    ours = LoRAM(rank=4, dropout=0.0, seed=3).attach(copied)
    rival: Any = LoRA(rank=4, seed=3).attach(whole())
    start = {path: layer for path, layer in rival.get_base_model().named_modules() if hasattr(layer, "lora_A")}
    with torch.no_grad():
        for path, layer in start.items():
            layer.lora_A["default"].weight.copy_(ours.get_base_model().get_submodule(path).loram_A["default"])
    train(ours, inputs, steps=3)
    train(rival, inputs, steps=3)
    torch.testing.assert_close(evaluated(ours, inputs), evaluated(rival, inputs), atol=1e-5, rtol=1e-5)
    recovered = LoRAM().recover(ours, whole())
    torch.testing.assert_close(evaluated(recovered, inputs), evaluated(rival, inputs), atol=1e-5, rtol=1e-5)


def test_a_sparse_layer_is_the_formula_in_value_and_gradient() -> None:
    model = attached(small(method="unst"), dropout=0.0)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    a, b = (factor.detach().clone().requires_grad_(True) for factor in layer.lora_factors("default"))
    weight = layer.base_layer.weight.detach()
    mask = weight != 0
    assert 0.4 < float(mask.float().mean()) < 0.6
    expected = x @ (weight + 16.0 / 4 * (b @ a) * mask).T
    found = layer(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.loram_A["default"].grad, a.grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(layer.loram_B["default"].grad, b.grad, atol=1e-3, rtol=1e-4)
    assert bool((deltas(model)["model.layers.1.mlp.down_proj"][~mask] == 0).all())
    free = attached(small(method="unst"), dropout=0.0, confined=False)
    assert free.get_base_model().model.layers[1].mlp.down_proj(x).sub(found).abs().max() > 1e-3


def test_a_sparse_copy_has_nothing_to_put_back() -> None:
    model = attached(small(method="semi"))
    recovered = LoRAM().recover(model, whole())
    layer = "model.layers.1.mlp.up_proj"
    little, full = model.get_base_model().get_submodule(layer), recovered.get_base_model().get_submodule(layer)
    assert torch.equal(little.loram_A["default"], full.lora_A["default"].weight)
    assert torch.equal(little.loram_B["default"], full.lora_B["default"].weight)
    assert little.scaling["default"] == full.scaling["default"]


def test_the_scale_is_carried_over() -> None:
    model = attached(small(), alpha=10.0)
    recovered = LoRAM().recover(model, whole())
    config = recovered.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 10.0, False)
    assert {layer.scaling["default"] for layer in recovered.modules() if hasattr(layer, "lora_A")} == {2.5}


def test_peft_loads_it_without_gossamer(tmp_path: Path) -> None:
    inputs, base = Bench("llama").inputs(), whole()
    base.save_pretrained(tmp_path / "base")
    model = attached(small())
    model.save_pretrained(str(tmp_path / "small"))
    recovered = LoRAM().recover(tmp_path / "small", base)
    again = LoRAM().recover(model, whole())
    assert torch.equal(evaluated(recovered, inputs), evaluated(again, inputs))
    recovered.save_pretrained(str(tmp_path / "lora"))
    torch.save((inputs, evaluated(recovered, inputs)), tmp_path / "expected.pt")
    code = (
        "import sys, torch; from peft import PeftModel; from transformers import AutoModelForCausalLM as A\n"
        "m = PeftModel.from_pretrained(A.from_pretrained('base'), 'lora').eval()\n"
        "x, y = torch.load('expected.pt', weights_only=True)\n"
        "assert 'gossamer' not in sys.modules\n"
        "torch.testing.assert_close(m(**x).logits, y, atol=1e-5, rtol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"HF_HUB_OFFLINE": "1"})


def test_the_small_adapter_is_saved_with_its_copy_and_goes_back_onto_it_alone(tmp_path: Path) -> None:
    inputs, model = Bench("llama").inputs(), attached(small())
    model.save_pretrained(str(tmp_path))
    config: Any = LoRAMPeftConfig.from_pretrained(str(tmp_path))
    assert config.copy == read_record(small()).as_dict()  # type: ignore[union-attr]
    again: Any = PeftModel.from_pretrained(small(), str(tmp_path))
    assert torch.equal(evaluated(again, inputs), evaluated(model, inputs))
    with pytest.raises(InputError, match=r"must be the copy it was made on, got another copy \(rand of"):
        PeftModel.from_pretrained(small(method="rand"), str(tmp_path))
    with pytest.raises(InputError, match="must be the copy it was made on, got a whole model"):
        PeftModel.from_pretrained(whole(), str(tmp_path))


@pytest.mark.parametrize("method", ["stru", "unst"])
def test_it_trains_on_a_quantised_copy(method: str) -> None:
    copied = small(method=method)
    masks = {path: copied.get_submodule(path).weight != 0 for path in read_record(copied).sparse}  # type: ignore[union-attr]
    packed = Rounding(bits=8, group=0).compress(copied).model
    assert packed.is_quantized
    model = LoRAM(rank=4).attach(packed)
    for path, mask in masks.items():
        assert not (model.get_base_model().get_submodule(path).loram_mask["default"] & ~mask).any()
    inputs = Bench("llama").inputs()
    before = evaluated(model, inputs)
    assert not train(model, inputs, steps=3)
    assert not torch.allclose(evaluated(model, inputs), before)
    recovered = LoRAM().recover(model, whole())
    assert {type(layer.base_layer).__name__ for layer in recovered.modules() if hasattr(layer, "lora_A")} == {"Linear"}


def test_lost_zeros_are_noticed() -> None:
    copied = small(method="unst")
    with torch.no_grad():
        copied.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    with pytest.raises(InputError, match="up_proj: must hold the zeros of its copy, 50% of the weights, got 0%"):
        LoRAM().attach(copied)
    assert LoRAM(confined=False).attach(copied) is not None


def test_fill_normal_gives_pruned_inputs_small_factors() -> None:
    model, record = attached(small()), read_record(small())
    found = places(whole(), record)  # type: ignore[arg-type]
    zero, normal = LoRAM().recover(model, whole()), LoRAM(seed=1).recover(model, whole(), fill="normal")
    path = "model.layers.1.mlp.down_proj"
    a, b = (m.get_base_model().get_submodule(path).lora_A["default"].weight for m in (zero, normal))
    gone = torch.ones(128, dtype=torch.bool)
    gone[found[path].columns] = False
    assert torch.equal(a[:, ~gone], b[:, ~gone])
    assert bool((a[:, gone] == 0).all())
    assert 0.2 < b[:, gone].std().item() < 0.3  # 1 / r
    rows = "model.layers.1.mlp.up_proj"
    out = [m.get_base_model().get_submodule(rows).lora_B["default"].weight for m in (zero, normal)]
    assert torch.equal(*out)


def test_training_numbers_fall_with_the_ratio() -> None:
    counts = [
        sum(p.numel() for p in LoRAM(rank=4).attach(small(method="rand", ratio=ratio)).parameters())
        for ratio in (0.0, 0.25, 0.5)
    ]
    assert counts[0] > counts[1] > counts[2]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = attached(small())
    with pytest.raises(InputError, match="must get a small copy"):
        LoRAM().attach(whole())
    with pytest.raises(InputError, match="must be the model that the copy was made of"):
        LoRAM().recover(model, whole(seed=1))
    with pytest.raises(InputError, match="must be the model that the copy was made of"):
        LoRAM().recover(model, small())
    with pytest.raises(InputError, match=r"must be one of loram, got .*LORA"):
        LoRAM().recover(LoRA(rank=2).attach(small()), whole())
    with pytest.raises(InputError, match="must be one of loram, got no adapter"):
        LoRAM().recover(small(), whole())
    with pytest.raises(InputError, match="must hold an adapter"):
        LoRAM().recover(tmp_path, whole())
    with pytest.raises(InputError, match="must get a model without an adapter"):
        LoRAM().recover(model, LoRA(rank=2).attach(whole()))
    with pytest.raises(OptionError, match=r"recover\.fill: must be one of"):
        LoRAM().recover(model, whole(), fill="ones")
    with pytest.raises(OptionError, match=r"loram\.rank"):
        LoRAM(rank=33).attach(small())


def test_factors_of_other_widths_are_refused() -> None:
    model = attached(small())
    other = attached(small(method="rand", ratio=0.25))
    other.peft_config["default"].copy = model.peft_config["default"].copy
    with pytest.raises(InputError, match="must have factors of widths"):
        LoRAM().recover(other, whole())
    fewer = attached(small(), target_modules=("q_proj",))
    fewer.peft_config["default"].target_modules = {"q_proj", "v_proj"}
    with pytest.raises(InputError, match="must have factors for the 6 targeted layers"):
        LoRAM().recover(fewer, whole())


def test_recovery_leaves_the_adapter_and_detaching_gives_the_base() -> None:
    inputs, model, base = Bench("llama").inputs(), attached(small()), whole()
    before = evaluated(model, inputs)
    recovered = LoRAM().recover(model, base)
    assert torch.equal(evaluated(model, inputs), before)
    assert any(parameter.requires_grad for parameter in recovered.parameters())
    plain = LoRAM().detach(recovered)
    assert torch.equal(evaluated(plain, inputs), evaluated(whole(), inputs))
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert len(projections(plain)) == 7 * LAYERS
    assert F.mse_loss(before, evaluated(plain, inputs)) > 0
