"""FineQuant: the choice of group sizes, targets, refusals, and checkpoints that load again."""

import copy
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

import gossamer  # noqa: F401
from gossamer.compression.finequant import FineQuant, group_sizes, shrink
from gossamer.compression.rounding import Rounding
from gossamer.core.errors import InputError, OptionError
from gossamer.parts.quant_linear import PackedWeight, QuantExperts, QuantLinear, register_with_lora
from gossamer.parts.quantiser import quantise, relative_error

IDS = torch.arange(40).view(2, 20) % 64


def llama(dtype: torch.dtype = torch.float32, layers: int = 2, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, dtype=dtype,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def gemma(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, sliding_window=8,
    )  # fmt: skip
    return Gemma3ForCausalLM._from_config(config, dtype=dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel._from_config(config, dtype=dtype).eval()


def mixtral(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM._from_config(config, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


# how far ranges shrink, 640 x 2048 and the 99th percentile of rows, halving 2048, 1024, 512, 256
TABLE = {
    "gaussian": (1.18, 1.14, 1.13, 1.13),
    "student": (1.63, 1.42, 1.34, 1.32),
    "outlier": (1.83, 1.50, 1.31, 1.22),
}


def synthetic(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(640, 2048, generator=generator)
    if kind == "student":
        chi = torch.randn(4, 640, 2048, generator=generator).square().sum(0)
        weight = weight / (chi / 4).sqrt()
    if kind == "outlier":
        weight[torch.arange(640), torch.randint(2048, (640,), generator=generator)] = 30.0
    return weight


@pytest.mark.parametrize("kind", TABLE)
def test_shrink_on_known_matrices(kind: str) -> None:
    weight = synthetic(kind)
    values = [shrink(weight, 2048 >> i, 1024 >> i, "quantile") for i in range(4)]
    assert values == pytest.approx(TABLE[kind], abs=0.08)


def test_shrink_equals_the_loop() -> None:
    weight = torch.randn(6, 32)
    ratios = []
    for row in weight.tolist():
        coarse = [max(map(abs, row[i : i + 16])) for i in range(0, 32, 16)]
        fine = [max(map(abs, row[i : i + 8])) for i in range(0, 32, 8)]
        ratios.append(sum(coarse[g] / ((fine[2 * g] + fine[2 * g + 1]) / 2) for g in range(2)) / 2)
    assert shrink(weight, 16, 8, "max") == pytest.approx(max(ratios), rel=1e-5)
    assert shrink(weight, 16, 8, "mean") == pytest.approx(sum(ratios) / 6, rel=1e-5)


def test_shrink_between_sizes_that_do_not_nest() -> None:
    row = torch.rand(1, 20)
    wide = [float(row[0, i : i + 10].max()) for i in (0, 10)]
    narrow = [float(row[0, i : i + 4].max()) for i in range(0, 20, 4)]
    per_halving = (sum(wide) / 2 / (sum(narrow) / 5)) ** (1 / math.log2(2.5))
    assert shrink(row, 10, 4, "max") == pytest.approx(per_halving, rel=1e-5)


@pytest.mark.parametrize(
    ("columns", "smallest", "sizes"),
    [
        (2048, 32, [2048, 1024, 512, 256, 128, 64, 32]),
        (640, 32, [640, 320, 160, 64, 32]),
        (640, 16, [640, 320, 160, 64, 32, 16]),
        (768, 64, [768, 384, 192, 96, 64]),
        (172, 32, [172, 86, 43]),
        (641, 32, [641]),
        (64, 64, [64]),
    ],
)
def test_group_sizes_divide_the_row(columns: int, smallest: int, sizes: list[int]) -> None:
    assert group_sizes(columns, smallest) == sizes
    assert all(columns % size == 0 for size in sizes)


def test_outliers_get_small_groups_and_others_stay_coarse() -> None:
    model = nn.Sequential(nn.Linear(2048, 320, bias=False), nn.Linear(2048, 320, bias=False))
    model[0].weight.data, model[1].weight.data = synthetic("gaussian")[:320], synthetic("outlier")[:320]
    model.config, model.base_model_prefix = None, ""  # type: ignore[assignment]
    from gossamer.compression.finequant import FineQuantConfig, _plan
    from gossamer.parts.quant_format import find_matrices

    clean, outlier = (_plan(m, FineQuantConfig()) for m in find_matrices(model, ())[0])
    assert clean.level_at(1.25) == 0
    assert outlier.sizes[outlier.level_at(1.25)] <= 512
    assert outlier.fragile
    assert not clean.fragile
    weight = model[1].weight.data
    coarse = relative_error(weight, _rounded(weight, 2048))
    fine = relative_error(weight, _rounded(weight, outlier.sizes[outlier.level_at(1.25)]))
    assert fine < coarse / 2


def _rounded(weight: torch.Tensor, group: int) -> torch.Tensor:
    parts = quantise(weight, 4, group)
    return parts.codes.view(len(weight), -1, group).float().mul(parts.scales[..., None]).view_as(weight)


@pytest.mark.parametrize("make", [llama, gemma, gpt2, mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("system", [FineQuant(bits=4), Rounding(bits=8), Rounding(bits=3, group=32, symmetric=False)])
def test_a_saved_checkpoint_loads_bit_for_bit(make: Any, dtype: torch.dtype, system: Any, tmp_path: Path) -> None:
    model = system.compress(make(dtype)).model
    before = logits(model)
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert again.dtype == dtype
    assert torch.equal(logits(again), before)
    again.save_pretrained(tmp_path / "b")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("first", ["gossamer", "transformers.modeling_utils"])
def test_it_loads_in_either_import_order(first: str, tmp_path: Path) -> None:
    model = FineQuant().compress(llama()).model
    model.save_pretrained(tmp_path)
    second = "gossamer" if first != "gossamer" else "transformers.modeling_utils"
    code = (
        f"import {first}, {second}\nimport torch\nfrom transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(type(m.model.layers[0].mlp.up_proj).__name__, m.hf_quantizer.quantization_config.quant_method)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["QuantLinear", "gossamer"]


def test_the_file_holds_what_was_counted(tmp_path: Path) -> None:
    result = FineQuant().compress(llama(torch.bfloat16))
    result.model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") + 8
    assert size - header == result.report.bytes_after
    packed = sum(math.prod(row.shape) * row.bits_per_weight / 8 for row in result.report.rows)
    rest = sum(p.numel() * 2 for p in result.model.parameters())
    assert packed + rest == result.report.bytes_after
    assert result.report.bytes_after < result.report.bytes_before / 2


def test_report_says_what_was_done() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 3] *= 60
    weight = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    result = FineQuant(min_group=16).compress(model)
    rows = {row.name: row for row in result.report.rows}
    row = rows["model.layers.0.mlp.down_proj"]
    assert (row.bits, row.group, row.shape) == (4, 16, (64, 128))
    assert row.note == "collapses per channel"
    assert row.bits_per_weight == 5.0
    kept = result.model.model.layers[0].mlp.down_proj.dequantised(torch.float32)
    assert row.error == pytest.approx(relative_error(weight, kept), rel=1e-4)
    assert result.report.values["collapse_per_channel"] == ["model.layers.0.mlp.down_proj"]
    assert sum(result.report.values["groups"].values()) == len(rows) == 14
    assert set(result.report.values["left_float"]) == {"lm_head", "model.embed_tokens"}


@pytest.mark.parametrize("target", [4.3, 4.45, 4.9, 5.5, 6.25])
def test_target_is_hit(target: float) -> None:
    result = FineQuant(target_bpw=target).compress(llama(layers=6))
    assert target * 0.98 <= result.report.values["bits_per_weight"] <= target
    widths = set(result.report.values["widths"])
    assert widths == {4} if target < 4.5 else max(widths) > 4


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_target_of_quality_takes_the_fewest_bits_that_reach_it(build: Any) -> None:
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS).index_fill(1, torch.tensor([0]), 0)}]
    reference = build()
    with torch.no_grad():
        plain = reference(**batches[0]).logits[:, 1:].log_softmax(-1)
    skip = ("lm_head", "wte")
    coarse = FineQuant(bits=3, alpha=1e9, skip=skip).compress(build()).model
    with torch.no_grad():
        found = coarse(**batches[0]).logits[:, 1:].log_softmax(-1)
    most = float((plain.exp() * (plain - found)).sum(-1).mean())
    targets, bits = (most / 5, most / 100), {}
    for target in targets:
        done = FineQuant(bits=3, target_kl=target, skip=skip).compress(build(), batches)
        bits[target] = done.report.values["bits_per_weight"]
        with torch.no_grad():
            found = done.model(**batches[0]).logits[:, 1:].log_softmax(-1)
        kl = float((plain.exp() * (plain - found)).sum(-1).mean())
        assert kl == pytest.approx(done.report.values["kl"], rel=0.02)
        assert kl <= target * 1.02
        # the search left the weights alone: the same as asking for these bits
        same = FineQuant(bits=3, target_bpw=bits[target] + 1e-6, skip=skip).compress(build())
        assert same.report.values["groups"] == done.report.values["groups"]
        # what reached the loose target would not do for the tight one
        assert target == targets[1] or kl > targets[1]
    assert bits[targets[1]] > bits[targets[0]]
    with pytest.raises(OptionError, match=r"target_kl: must be at least .*which 8 bits reach"):
        FineQuant(target_kl=1e-15, skip=skip).compress(build(), batches)
    with pytest.raises(OptionError, match="without target_bpw"):
        FineQuant(target_kl=0.1, target_bpw=5).compress(build(), batches)
    with pytest.raises(InputError, match="hold batches of tokens"):
        FineQuant(target_kl=0.1).compress(build())


def test_more_bits_go_where_the_error_is() -> None:
    model = llama(layers=4)
    with torch.no_grad():
        # one large weight in every smallest group: no group size helps this matrix
        model.model.layers[2].mlp.up_proj.weight[:, ::32] *= 4
    result = FineQuant(target_bpw=4.7).compress(model)
    widths = {row.name: row.bits for row in result.report.rows if "up_proj" in row.name}
    assert widths.pop("model.layers.2.mlp.up_proj") > max(widths.values())


def test_a_step_is_the_one_with_the_largest_fall_per_bit() -> None:
    from gossamer.compression.finequant import FineQuantConfig, _plan
    from gossamer.parts.quant_format import find_matrices

    matrix = find_matrices(llama(), ("lm_head", "embed", "self_attn"))[0][-1]
    weight = matrix.weight.detach()
    plan = _plan(matrix, FineQuantConfig())

    def error(bits: int, group: int) -> float:
        steps = weight.view(len(weight), -1, group).abs().amax(-1) / (2 ** (bits - 1) - 1)
        return float(steps.square().mean() / 12 / weight.square().mean())

    assert plan.error(5, 1) == pytest.approx(error(5, 64), rel=1e-5)
    # what the ranges predict is what rounding does
    assert plan.error(4, 1) ** 0.5 == pytest.approx(relative_error(weight, _rounded(weight, 64)), rel=0.1)
    finer = (error(4, 128) - error(4, 64)) / (16 / 64 - 16 / 128)
    wider = error(4, 128) - error(5, 128)
    step = plan.step(widen=True)
    assert step is not None
    assert step.gain == pytest.approx(max(finer, wider), rel=1e-5)


def test_lower_alpha_never_coarsens() -> None:
    sizes = []
    for alpha in (1.0, 1.15, 1.25, 1.4, 9.0):
        rows = FineQuant(alpha=alpha).compress(llama()).report.rows
        sizes.append([row.group for row in rows])
    for fine, coarse in itertools.pairwise(sizes):
        assert all(a <= b for a, b in zip(fine, coarse, strict=True))
    assert set(sizes[0]) == {32}
    assert set(sizes[-1]) == {64, 128}


def test_a_tied_head_is_left_alone_where_either_name_is_skipped() -> None:
    model = llama(tied=True)
    before = model.model.embed_tokens.weight.detach().clone()
    result = FineQuant(skip=("embed",)).compress(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert result.report.values["left_float"] == dict.fromkeys(("lm_head", "model.embed_tokens"), "skipped by 'embed'")
    whole = FineQuant(skip=()).compress(llama(tied=True)).report
    assert whole.values["left_float"] == {}
    assert sum(row.name == "model.embed_tokens" for row in whole.rows) == 1


def test_gpt2_is_transposed_before_grouping() -> None:
    model = gpt2()
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().t().clone()
    FineQuant(alpha=9.0).compress(model)
    layer = model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, QuantLinear)
    assert layer.shape == (256, 64)
    expected = quantise(weight, 4, 64, dtype=torch.bfloat16)
    assert torch.equal(layer.codes(), expected.codes)
    x = torch.randn(2, 64)
    torch.testing.assert_close(layer(x), x @ layer.dequantised(torch.float32).t() + layer.bias)


def test_experts_are_packed_and_the_router_is_not() -> None:
    model = mixtral()
    reference = logits(model)
    FineQuant(bits=8).compress(model)
    block = model.model.layers[0].mlp
    assert isinstance(block.experts.gate_up_proj, QuantExperts)
    assert block.gate.weight.is_floating_point()
    assert relative_error(reference, logits(model)) < 0.02


def test_error_is_at_most_the_naive_baselines() -> None:
    fixed = Rounding(bits=4, group=64).compress(llama())
    target = fixed.report.values["bits_per_weight"]
    ours = FineQuant(bits=4, target_bpw=target, min_group=16).compress(llama())
    assert ours.report.values["bits_per_weight"] <= target
    total = [sum(row.error**2 for row in result.report.rows) for result in (ours, fixed)]
    assert total[0] <= total[1] * 1.01


def test_training_needs_an_adapter(tmp_path: Path) -> None:
    model = FineQuant().compress(llama()).model
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))


def test_lora_trains_over_packed_weights(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = FineQuant().compress(llama(torch.bfloat16)).model
    before = logits(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = register_with_lora(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    tuned = get_peft_model(model, config)
    Trainer(tuned, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    assert torch.equal(logits(tuned), before)
    tuned(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(grads) == 8
    assert all(grads[name] is not None and grads[name].abs().sum() > 0 for name in grads if "lora_B" in name)
    restored = tuned.unload().state_dict()
    assert all(torch.equal(restored[name], value) for name, value in state.items())


def test_no_float_copy_is_kept() -> None:
    model = FineQuant().compress(llama(torch.bfloat16)).model
    logits(model)
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    assert len(packed) == 14
    for module in packed:
        floats = [t for t in (*module.buffers(), *module.parameters()) if t.is_floating_point()]
        assert sum(t.numel() for t in floats) <= module.logical_weight_count / 32


def test_state_survives_the_kernel_layout() -> None:
    model = FineQuant().compress(llama(torch.bfloat16)).model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = logits(model)
    twin = copy.deepcopy(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), first)


def test_what_cannot_be_quantised_is_refused() -> None:
    done = FineQuant().compress(llama()).model
    with pytest.raises(InputError, match="quantised already"):
        FineQuant().compress(done)
    broken = llama()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*finite"):
        FineQuant().compress(broken)
    for bits in (1, 9):
        with pytest.raises(OptionError, match="bits"):
            FineQuant(bits=bits)
    with pytest.raises(OptionError, match=r"at least 4\.2"):
        FineQuant(target_bpw=4.01).compress(llama())
    with pytest.raises(InputError, match="find linear layers"):
        FineQuant(skip=("model",)).compress(llama(tied=True))


def test_an_adapter_must_be_merged_first() -> None:
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"without an adapter.*merge it first"):
        FineQuant().compress(tuned)
