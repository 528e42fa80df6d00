"""The quantiser core against loops, its packing, and the packed modules with their kernels."""

import math

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import InputError, OptionError
from gossamer.parts import quant_kernels as kernels
from gossamer.parts.quant_linear import QuantExperts, QuantLinear
from gossamer.parts.quantiser import (
    PER_CHANNEL,
    PER_TENSOR,
    bits_per_weight,
    dequantise,
    divisor_below,
    fake_quantise,
    pack,
    packed_columns,
    quantise,
    relative_error,
    unpack,
)


def naive(weight: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    """The equations of the module, weight by weight."""
    out, columns = weight.shape
    size = {PER_CHANNEL: columns}.get(group, group)
    result = torch.empty_like(weight)
    top = 2 ** (bits - 1) - 1
    whole = [float(w) for row in weight for w in row]
    for o in range(out):
        for start in range(0, columns, columns if group == PER_TENSOR else size):
            run = [float(w) for w in weight[o, start : start + (columns if group == PER_TENSOR else size)]]
            seen = whole if group == PER_TENSOR else run
            low = 0.0 if symmetric else float(torch.tensor(min(seen)))
            step = max(map(abs, seen)) / top if symmetric else (max(seen) - min(seen)) / (2 * top + 1)
            step = float(torch.tensor(step))
            for i, w in enumerate(run):
                code = round((w - low) / step) if step else 0
                code = min(max(code, -top), top) if symmetric else min(max(code, 0), 2 * top + 1)
                result[o, start + i] = code * step + low
    return result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [PER_TENSOR, PER_CHANNEL, 12, 4])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_the_loop(bits: int, group: int, symmetric: bool) -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(bits))
    weight[1] = 0
    got = dequantise(quantise(weight, bits, group, symmetric=symmetric))
    torch.testing.assert_close(got, naive(weight, bits, group, symmetric), atol=1e-6, rtol=1e-5)


def test_groups_run_along_the_input_axis() -> None:
    weight = torch.ones(4, 8)
    weight[:, 4:] = 100.0
    parts = quantise(weight, 4, 4)
    assert parts.scales.shape == (4, 2)
    torch.testing.assert_close(dequantise(parts), weight)
    # along the output axis the two sizes would share scales, and the ones would vanish
    assert (dequantise(quantise(weight.t().contiguous(), 4)).t()[:, :4] == 1).all()


def test_symmetric_grid_has_no_lowest_level() -> None:
    codes = quantise(torch.tensor([[-1.0, 1.0, 0.5, -0.07]]), 4).codes
    assert codes.min() == -7
    assert codes.max() == 7


def test_straight_through_gradient() -> None:
    weight = torch.randn(3, 8, requires_grad=True)
    target = torch.randn(3, 8)
    (fake_quantise(weight, 3, 4) * target).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, target)


def test_scales_are_rounded_before_codes_are_taken() -> None:
    weight = torch.randn(64, 32)
    parts = quantise(weight, 8, dtype=torch.bfloat16)
    assert parts.scales.dtype == torch.bfloat16
    kept = dequantise(parts, torch.float32)
    step = parts.scales.float().expand_as(weight)
    inside = weight.abs() <= 127 * step
    assert ((weight - kept).abs() <= step / 2 + 1e-6)[inside].all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [1, 5, 8, 13, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_packing_is_exact(bits: int, columns: int, symmetric: bool) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    codes = torch.randint(low, high + 1, (3, 2, columns)).to(torch.int8 if symmetric else torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 2, math.ceil(columns * bits / 8))
    assert packed.shape[-1] == packed_columns(columns, bits)
    assert torch.equal(unpack(packed, bits, columns, symmetric=symmetric), codes)


def test_bits_are_counted_with_their_scales() -> None:
    assert bits_per_weight(4, 32, 640) == 4.5
    assert bits_per_weight(4, 32, 640, symmetric=False) == 5.0
    assert bits_per_weight(8, PER_CHANNEL, 640) == 8.025
    assert divisor_below(640, 64) == 64
    assert divisor_below(172, 64) == 43
    assert divisor_below(641, 64) == 641


def test_bad_input_is_refused() -> None:
    weight = torch.randn(4, 10)
    with pytest.raises(InputError, match=r"must divide the 10 weights of a row, got a rest of 4; use 5$"):
        quantise(weight, 4, 6)
    with pytest.raises(OptionError, match="from 2 to 8"):
        quantise(weight, 9)
    with pytest.raises(InputError, match="finite"):
        quantise(weight.index_fill(1, torch.tensor([2]), math.nan), 4)
    with pytest.raises(InputError, match="floating-point matrix"):
        quantise(weight.int(), 4)


def filled(out: int, columns: int, bits: int, group: int, symmetric: bool = True, bias: bool = False) -> QuantLinear:
    layer = QuantLinear(columns, out, bits, group, symmetric=symmetric, bias=bias)
    layer.fill(torch.randn(out, columns, generator=torch.Generator().manual_seed(out)) * 0.05)
    return layer


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [
        (4, 32, True), (4, 64, True), (4, 0, True), (4, -1, True), (4, 32, False), (3, 64, True),
        (8, 0, True), (8, 32, True), (6, 64, True), (5, 0, True),
    ],
)  # fmt: skip
def test_kernels_equal_the_restored_weight(bits: int, group: int, symmetric: bool) -> None:
    layer = filled(80, 320, bits, group, symmetric)
    weight, stored = layer.dequantised(torch.float32), layer.qweight.clone()
    x = torch.randn(3, 7, 320).bfloat16()
    with torch.no_grad():
        y = layer(x)
        single = layer(x[1:2, 2:3])
    held = layer._int4 is not None
    assert held == (bits != 8 or group != 0)
    expected = x.float() @ weight.t()
    assert relative_error(expected, y) < 5e-3
    assert torch.equal(single, y[1:2, 2:3])
    # the saved form comes back from the kernel's layout, and so does the layer
    assert torch.equal(layer.state_dict()["qweight"], stored)
    layer.unlay()
    assert torch.equal(layer.qweight, stored)


def test_a_layer_holds_its_weight_once() -> None:
    layer = filled(64, 256, 4, 64)
    with torch.no_grad():
        layer(torch.randn(1, 256).bfloat16())
    assert layer._int4 is not None
    assert layer.qweight.numel() == 0
    assert layer._int4.packed.numel() == 64 * 128
    assert layer.logical_weight_count == 64 * 256
    assert list(layer.parameters()) == []


def test_rows_that_no_kernel_takes_use_the_plain_path() -> None:
    for out, columns, bits in ((10, 64, 4), (16, 43, 4), (16, 172, 8)):
        layer = filled(out, columns, bits, 0)
        x = torch.randn(5, columns).bfloat16()
        with torch.no_grad():
            y = layer(x)
        assert layer._int4 is None
        assert relative_error(x.float() @ layer.dequantised(torch.float32).t(), y) < 1e-2


def test_int8_kernel_gets_aligned_codes() -> None:
    layer = filled(16, 64, 8, 0)
    loose = torch.empty(16 * 64 + 3, dtype=torch.uint8)[3:].view(16, 64)
    layer.qweight = loose.copy_(layer.qweight)
    x = torch.randn(41, 64).bfloat16()[1:]
    with torch.no_grad():
        assert relative_error(x.float() @ layer.dequantised(torch.float32).t(), layer(x)) < 5e-3
    assert kernels.aligned(loose).data_ptr() != loose.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_reaches_the_input(dtype: torch.dtype) -> None:
    layer = filled(32, 64, 4, 32, bias=True)
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        layer(x.detach())
    y = layer(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    weight = layer.dequantised(dtype)
    expected = ((2 * y.detach().float()).to(dtype) @ weight).float()
    torch.testing.assert_close(x.grad.float(), expected, atol=1e-3, rtol=1e-2)
    assert layer.bias is not None
    assert layer.bias.grad is not None


def test_scales_keep_their_dtype_when_the_model_is_cast() -> None:
    layer = QuantLinear(32, 16, 4, 0, scale_dtype=torch.float16)
    layer.fill(torch.randn(16, 32))
    before = layer.dequantised(torch.float32)
    layer.to(torch.bfloat16)
    assert layer.scales.dtype == torch.float16
    assert torch.equal(layer.dequantised(torch.float32), before)


def test_experts_are_restored_one_at_a_time() -> None:
    weight = torch.randn(3, 16, 64)
    stack = QuantExperts((3, 16, 64), 3, 32, scale_dtype=torch.float32, dtype=torch.float32)
    stack.fill(weight)
    for index in range(3):
        expected = dequantise(quantise(weight[index], 3, 32))
        assert torch.equal(stack[torch.tensor(index)], expected)
    assert stack.logical_weight_count == weight.numel()
