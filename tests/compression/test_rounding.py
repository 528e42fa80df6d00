"""Round to nearest: every weight is the naive loop's, at every granularity, and odd group sizes are met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.compression.rounding import Rounding


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, dtype=torch.float32,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, dtype=torch.float32).eval()


def naive(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """One group at a time: s = max |w| / (2^(b-1) - 1), w_hat = s round(w / s), with s kept in bfloat16."""
    top = 2 ** (bits - 1) - 1
    rounded = weight.clone()
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group]
            scale = (part.abs().max() / top).bfloat16().float()
            rounded[row, start : start + group] = (part / scale).round().clamp(-top, top) * scale
    return rounded


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 32), (3, 16)])
def test_weights_are_those_of_the_naive_loop(bits: int, group: int) -> None:
    model = llama()
    weight = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    packed = Rounding(bits=bits, group=group).compress(model).model.model.layers[0].mlp.down_proj
    expected = naive(weight, bits, group or weight.shape[1])
    torch.testing.assert_close(packed.dequantised(torch.float32), expected, atol=1e-6, rtol=0)


def test_one_scale_for_the_whole_matrix() -> None:
    model = llama()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    packed = Rounding(bits=4, group=-1).compress(model).model.model.layers[0].self_attn.q_proj
    expected = naive(weight.reshape(1, -1), 4, weight.numel()).view_as(weight)
    torch.testing.assert_close(packed.dequantised(torch.float32), expected, atol=1e-6, rtol=0)


def test_rounding_says_which_divisor_it_used() -> None:
    rows = Rounding(bits=4, group=48).compress(llama()).report.rows
    assert {(row.shape[1], row.group, row.note) for row in rows} == {
        (64, 32, "48 does not divide 64: 32 used"),
        (128, 32, "48 does not divide 128: 32 used"),
    }
