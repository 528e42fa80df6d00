"""MoS against a naive version of the paper's formulas, against PEFT's LoRA, and through PEFT's life cycle."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from gossamer.adapters.mos import MoS, MoSLinear, MoSPeftConfig, draw_indices
from gossamer.core.errors import InputError, OptionError
from gossamer.parts.injection import grouped, projections

IDS = torch.tensor([[3, 7, 1, 9, 4], [2, 2, 8, 5, 6]])


def llama(layers: int = 8) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def gemma() -> Gemma3ForCausalLM:
    """Widths as in Gemma 3: heads times head width is not the hidden width."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=20,
        hidden_size=20,
        intermediate_size=40,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
    )
    return Gemma3ForCausalLM(config).eval()


def filled(model: Any, seed: int = 1) -> Any:
    """Random numbers in the pools of B, so that the update is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".mos_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def mos_layers(model: Any) -> dict[str, MoSLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoSLinear)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def naive_factor(pool: Tensor, index: Tensor, rank: int, shards: int) -> Tensor:
    """Rows put together shard by shard, as in the paper."""
    return torch.stack(
        [torch.cat([pool[int(index[j * shards + piece])] for piece in range(shards)]) for j in range(rank)]
    )


def test_agrees_with_the_formula_in_values_and_gradients() -> None:
    model = filled(MoS(rank=5, alpha=10.0, dropout=0.0).attach(llama()))
    layers = [layer for name, layer in mos_layers(model).items() if name.endswith("q_proj")]
    pool_a, pool_b = (
        p.detach().clone().requires_grad_() for p in (layers[0].mos_A["default"], layers[0].mos_B["default"])
    )
    x = torch.randn(3, 16)
    total, expected_total = torch.zeros(()), torch.zeros(())
    for layer in layers:
        a = naive_factor(pool_a, layer.mos_index_A["default"], 5, 4)
        b = naive_factor(pool_b, layer.mos_index_B["default"], 5, 4).T
        expected = x @ layer.base_layer.weight.T + 10 / 5 * (x @ a.T) @ b.T
        assert a.shape == (5, 16)
        assert b.shape == (16, 5)
        torch.testing.assert_close(layer(x), expected)
        total, expected_total = total + layer(x).square().sum(), expected_total + expected.square().sum()
    total.backward()
    expected_total.backward()
    torch.testing.assert_close(layers[0].mos_A["default"].grad, pool_a.grad)
    torch.testing.assert_close(layers[0].mos_B["default"].grad, pool_b.grad)


@pytest.mark.parametrize("make", [llama, gemma])
def test_counts_as_lora_of_rank_budget(make: Any) -> None:
    system = MoS()
    model = system.attach(make())
    targets = sorted({name.rsplit(".", 1)[-1] for name in mos_layers(model)})
    lora = get_peft_model(make(), LoraConfig(r=2, target_modules=targets))
    report = system.parameter_report(model)
    assert report["trainable"] == report["lora_of_budget"] == lora.get_nb_trainable_parameters()[0]
    assert report["lora_of_rank"] == 4 * report["trainable"]
    assert len({id(p) for p in model.parameters() if p.requires_grad}) == 2 * len(targets)


def test_indices_follow_the_four_strategies() -> None:
    config = MoSPeftConfig(rank=5, budget=2, private=1, shards=4)
    drawn = draw_indices(config, 8, torch.Generator().manual_seed(0))
    public = 1 * 8 * 4
    for layer, (a, b) in enumerate(drawn):
        for index in (a, b):
            assert len(index) == 5 * 4
            assert len(set(index.tolist())) == 5 * 4, "drawn with replacement"
            assert int(index[:16].max()) < public
            assert index[16:].tolist() == list(range(public + layer * 4, public + layer * 4 + 4))
        assert not torch.equal(a[:16], b[:16]), "one index for A and B"
    assert not torch.equal(drawn[0][0][:16], drawn[1][0][:16]), "one choice for all layers"
    paired = MoSPeftConfig(rank=5, pair_dissociation=False)
    assert all(torch.equal(a, b) for a, b in draw_indices(paired, 8, torch.Generator()))


def test_private_rows_get_gradient_from_one_layer_only() -> None:
    model = filled(MoS(dropout=0.0).attach(llama()))
    layers = [layer for name, layer in mos_layers(model).items() if name.endswith("up_proj")]
    public = 1 * 8 * 4
    for number in (0, 5):
        model.zero_grad()
        layers[number](torch.randn(3, 16)).square().sum().backward()
        touched = layers[0].mos_A["default"].grad.abs().sum(1) > 0
        assert touched[public:].nonzero().flatten().tolist() == [number * 4 + piece for piece in range(4)]
        assert int(touched[:public].sum()) == 7 * 4


def test_starts_with_the_fan_in_of_the_whole_vector() -> None:
    model = MoS().attach(llama())
    for layer in mos_layers(model).values():
        for pool in layer.mos_A.values():
            assert pool.shape[1] == layer.d_in // 4
            assert 0.95 * layer.d_in**-0.5 < float(pool.detach().abs().max()) <= layer.d_in**-0.5
        assert all(not pool.any() for pool in layer.mos_B.values())


def test_all_private_without_shards_is_lora() -> None:
    model = filled(MoS(rank=2, budget=2, private=2, shards=1, alpha=8.0).attach(llama()))
    targets = sorted({name.rsplit(".", 1)[-1] for name in mos_layers(model)})
    lora = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=8, target_modules=targets))
    lora.eval()
    for name, layer in mos_layers(model).items():
        k = int(name.split("layers.")[1].split(".")[0])
        home = layer.mos_home["default"]
        twin = lora.get_submodule(name)
        twin.lora_A["default"].weight.data = home.mos_A["default"].data[2 * k : 2 * k + 2]
        twin.lora_B["default"].weight.data = home.mos_B["default"].data[2 * k : 2 * k + 2].T
    torch.testing.assert_close(logits(model.eval()), logits(lora))


def test_pure_sharing_is_one_update_for_all_layers() -> None:
    system = MoS(rank=16, budget=2, private=0, shards=1, pair_dissociation=False, target_modules=("q_proj",))
    model = filled(system.attach(llama()))
    deltas = [layer.get_delta_weight("default") for name, layer in mos_layers(model).items() if "q_proj" in name]
    assert deltas[0].any()
    for delta in deltas[1:]:
        torch.testing.assert_close(delta, deltas[0])


def test_types_and_shapes_have_their_own_pools() -> None:
    model = MoS().attach(gemma())
    pools = {name: tuple(p.shape) for name, p in model.named_parameters() if ".mos_" in name}
    assert len(pools) == 2 * 7
    assert {shape for name, shape in pools.items() if "q_proj" in name} == {(64, 5), (64, 8)}
    assert {shape for name, shape in pools.items() if "k_proj" in name} == {(64, 5), (64, 2)}
    assert all(".layers.0." in name for name in pools)
    assert {len(group) for group in grouped(projections(gemma())).values()} == {8}


def test_identity_at_start_detach_and_trainability() -> None:
    base = llama()
    base.model.embed_tokens.weight.requires_grad_(False)
    before, plain = logits(base), {k: v.clone() for k, v in base.state_dict().items()}
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    system = MoS()
    model = system.attach(base)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert all((".mos_" in name) == p.requires_grad for name, p in model.named_parameters())
    assert not any(buffer.requires_grad for buffer in model.buffers())
    with pytest.raises(InputError, match="without an adapter"):
        system.attach(model)
    back = system.detach(filled(model))
    assert isinstance(back, LlamaForCausalLM)
    assert flags == {name: p.requires_grad for name, p in back.named_parameters()}
    assert all(torch.equal(value, plain[key]) for key, value in back.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_unmerged(dtype: torch.dtype) -> None:
    system = MoS()
    model = filled(system.attach(llama().to(dtype))).eval()
    assert {p.dtype for name, p in model.named_parameters() if ".mos_" in name} == {torch.float32}
    apart = logits(model)
    model.merge_adapter()
    assert all(layer.merged_adapters == ["default"] for layer in mos_layers(model).values())
    torch.testing.assert_close(logits(model), apart, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-2)
    with pytest.raises(InputError, match="not merged"):
        system.detach(model)
    model.unmerge_adapter()
    merged = system.merge(model)
    assert type(merged) is LlamaForCausalLM
    torch.testing.assert_close(logits(merged), apart, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-2)


def test_saves_each_pool_once_and_loads(tmp_path: Path) -> None:
    model = filled(MoS(seed=3).attach(llama())).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    pools = {key: value for key, value in tensors.items() if ".mos_A" in key or ".mos_B" in key}
    assert len(pools) == 2 * 7
    assert sum(value.numel() for value in pools.values()) == model.get_nb_trainable_parameters()[0]
    assert {value.dtype for key, value in tensors.items() if key not in pools} == {torch.int32}

    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    frugal = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(frugal), logits(model), rtol=0, atol=0)
    resumed = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert resumed.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_loads_with_transformers(tmp_path: Path) -> None:
    model = filled(MoS(seed=3).attach(llama())).eval()
    model.save_pretrained(tmp_path)
    # indices that the seed would not give: they must come from the file
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, value in tensors.items():
        if ".mos_index_" in key:
            tensors[key] = value.flip(0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    expected = logits(PeftModel.from_pretrained(llama(), tmp_path))
    plain = llama()
    plain.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=0)
    assert not torch.allclose(expected, logits(model))
    with pytest.raises(InputError, match="without an adapter"):
        MoS().attach(plain)


def test_refuses_files_that_do_not_fit(tmp_path: Path) -> None:
    model = MoS().attach(llama())
    model.save_pretrained(tmp_path)
    shallow = llama(7)
    with pytest.raises(InputError, match=r"have 8 layers of .*, got 7"):
        PeftModel.from_pretrained(shallow, tmp_path)
    assert not mos_layers(shallow)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    index = next(key for key in tensors if "mos_index_A" in key)
    save_file(tensors | {index: tensors[index] + 50}, file)
    with pytest.raises(InputError, match="whole numbers from 0 to 63"):
        PeftModel.from_pretrained(llama(), tmp_path)
    save_file({key: value for key, value in tensors.items() if key != index}, file)
    with pytest.raises(InputError, match="got none"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_two_adapters_switch_and_delete() -> None:
    model = filled(MoS(seed=1).attach(llama()), seed=1).eval()
    first = logits(model)
    model.add_adapter("other", MoSPeftConfig(rank=4, shards=2, seed=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if name.endswith("mos_B.other"):
            parameter.data.normal_()
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second)
    assert {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(llama()), rtol=0, atol=0)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    torch.testing.assert_close(logits(model), second, rtol=0, atol=0)


def test_copies_share_their_own_pools() -> None:
    model = filled(MoS().attach(llama())).eval()
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if ".mos_B." in name:
            parameter.data.zero_()
    torch.testing.assert_close(logits(twin), logits(llama()), rtol=0, atol=0)
    assert not torch.allclose(logits(model), logits(twin))


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_exported_lora_loads_without_gossamer(family: str, tmp_path: Path) -> None:
    base: PreTrainedModel
    if family == "gpt2":
        torch.manual_seed(0)
        base = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=8, n_head=2, n_positions=16)).eval()
    else:
        base = llama() if family == "llama" else gemma()
    base.save_pretrained(tmp_path / "base")
    system = MoS()
    model = filled(system.attach(base)).eval()
    system.export_lora(model, tmp_path / "lora")
    save_file({"ids": IDS, "logits": logits(model)}, tmp_path / "expected.safetensors")
    merged = system.merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=0)
    script = f"""
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
expected = load_file(r"{tmp_path / "expected.safetensors"}")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(r"{tmp_path / "base"}"), r"{tmp_path / "lora"}")
with torch.no_grad():
    error = (model.eval()(expected["ids"]).logits - expected["logits"]).abs().max().item()
assert "gossamer" not in sys.modules
assert error < 1e-5, error
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_same_seed_same_adapter_and_the_global_generator_is_left_alone() -> None:
    bases = [llama() for _ in range(3)]
    before = torch.get_rng_state()
    one, two, three = (MoS(seed=seed).attach(base) for seed, base in zip((0, 0, 1), bases, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    states = [{k: v for k, v in m.state_dict().items() if ".mos_" in k} for m in (one, two, three)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(*(next(v for k, v in state.items() if "index_A" in k) for state in (states[0], states[2])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"private": 3}, r"mos.private: must be at most the budget 2, got 3"),
        ({"rank": 1, "private": 2, "budget": 3}, r"mos.rank: must be at least the private part 2"),
        ({"private": 2}, r"mos.rank: must be the budget 2 where all of it is private, got 8"),
        (
            {"rank": 10, "target_modules": ("q_proj",)},
            r"mos.rank: must be at most 9 for the 8 layers of .*q_proj 16x16, got 10",
        ),
        ({"shards": 3}, r"mos.shards: must divide the widths \[8, 16, 24\], got 3; use one of 1, 2, 4, 8"),
        ({"rank": 9, "budget": 16}, r"mos.rank: must be at most 8, the smaller width of .*k_proj, got 9"),
        (
            {"target_modules": ("q_prj",)},
            r"target_modules: must name linear layers, got 'q_prj'; did you mean 'q_proj'",
        ),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    model = llama()
    with pytest.raises(OptionError, match=message):
        MoS(**options).attach(model)
    assert not mos_layers(model)
    assert all(p.requires_grad for p in model.parameters())
