"""The residual stream is found in every family; narrowed, a model whose other channels are empty is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.parts.residual_stream import narrow, residual_stream, untie
from gossamer.testing.bench import Bench

IDS = torch.arange(24).view(2, 12) * 11 % 300
KEEP = torch.tensor([0, 1, 3, 4, 6, 9, 10, 13, 15, 16, 17, 20, 22, 25, 28, 31])
SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "rms_norm_eps": 0.05,
}  # fmt: skip
GEMMA = {"head_dim": 8, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"tie_word_embeddings": True},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 12},
    "Gemma": GEMMA,
    "Gemma2": {**GEMMA, "tie_word_embeddings": False, "query_pre_attn_scalar": 8},
    "Gemma3": {**GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 6},
}


def build(family: str, **options: Any) -> Any:
    """A model whose eps counts, with gains, biases and norms of heads off their start."""
    name = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **FAMILIES[family], **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


@torch.no_grad()
def emptied(model: Any) -> Any:
    """Nothing is written to the channels that are not in KEEP."""
    stream = residual_stream(model, "test")
    drop = torch.ones(stream.width, dtype=torch.bool)
    drop[KEEP] = False
    model.get_submodule(stream.embedding).weight[:, drop] = 0.0
    for path in stream.writers:
        layer = model.get_submodule(path)
        layer.weight[drop] = 0.0
        if layer.bias is not None:
            layer.bias[drop] = 0.0
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_narrow_model_computes_the_same(family: str, tmp_path: Any) -> None:
    model = emptied(build(family))
    before = logits(model)
    small = narrow(model, KEEP, "test")
    assert type(small) is type(model)
    assert small.config.hidden_size == len(KEEP)
    assert small.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert torch.allclose(logits(small), before, rtol=0, atol=2e-5 * float(before.abs().max()))
    assert logits(model).equal(before), "the model that was given is changed"
    assert small.config.rms_norm_eps == model.config.rms_norm_eps
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert logits(again).equal(logits(small))


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_an_untied_head_is_not_scaled(family: str) -> None:
    model = build(family, tie_word_embeddings=True)
    untie(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)
    emptied(model)
    small = narrow(model, KEEP, "test")
    assert not small.config.tie_word_embeddings
    assert not residual_stream(small, "test").tied
    assert torch.allclose(logits(small), logits(model), rtol=0, atol=1e-4)


def test_gain_is_a_factor_of_the_gains_before_readers_alone() -> None:
    """As they are stored in Gemma, 1 + w; for channels that are dropped though they were not empty."""
    model = build("Gemma3")
    plain, scaled = (narrow(model, KEEP, "test", gain=gain) for gain in (1.0, 0.7))
    stream = residual_stream(plain, "test")
    changed = {name for name, value in scaled.state_dict().items() if not value.equal(plain.state_dict()[name])}
    assert changed == {f"{path}.weight" for path in stream.norms}
    for name in changed:
        assert torch.allclose(1 + scaled.state_dict()[name], 0.7 * (1 + plain.state_dict()[name]), atol=1e-5)


def test_what_it_finds() -> None:
    llama, gemma = (residual_stream(Bench(name).model(), "test") for name in ("llama", "gemma3"))
    layers = len(llama.writers) // 2
    assert (llama.width, llama.tied, llama.after_norms) == (64, False, ())
    assert len(llama.readers) == 5 * layers
    assert llama.norms[-1] == "model.norm"
    assert gemma.tied
    assert len(gemma.after_norms) == 2 * layers
    assert all("post_" in path for path in gemma.after_norms)


def test_dtype_mode_gradients_and_random_state_stay() -> None:
    model = emptied(build("Gemma3")).to(torch.bfloat16).train()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    state = torch.get_rng_state()
    small = narrow(model, KEEP, "test")
    assert torch.get_rng_state().equal(state)
    assert small.training
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert [name for name, p in small.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    before, after = (logits(each.eval()).float() for each in (model, small))
    # weights and activations are rounded to 8 bits
    assert float((after - before).square().mean().sqrt()) < 0.03 * float(before.std())


def test_a_width_that_the_class_refuses() -> None:
    with pytest.raises(InputError, match="keep a multiple of 4 channels"):
        narrow(build("Llama"), KEEP[:15], "test")


@pytest.mark.parametrize(
    ("family", "words"),
    [("gpt2", "embed_tokens, layers, norm"), ("bert", "causal decoder"), ("llava", "text alone"),
     ("mixtral", r"layers\.0\.mlp\.down_proj: must be a linear layer")],
)  # fmt: skip
def test_other_builds_are_refused(family: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        residual_stream(Bench(family).model(), "test")


def test_a_layer_norm_is_refused() -> None:
    model = build("Llama")
    model.model.layers[1].input_layernorm = nn.LayerNorm(32, bias=False)
    with pytest.raises(InputError, match=r"layers\.1\.input_layernorm: must be an RMSNorm.*takes off the mean"):
        residual_stream(model, "test")


def test_weights_of_an_unknown_module_are_refused() -> None:
    model = build("Llama")
    model.model.layers[0].self_attn.extra = nn.Linear(32, 2)
    with pytest.raises(InputError, match=r"2 others, .*self_attn\.extra"):
        residual_stream(model, "test")


def test_a_layer_that_is_no_float_linear_is_refused() -> None:
    model = build("Llama")
    model.model.layers[1].mlp.down_proj = nn.Identity()
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj: must be a linear layer with float weights"):
        residual_stream(model, "test")
