"""Quantiser core: uniform integers with a scale per tensor, per output channel or per group, and their packing.

A weight ``W`` has shape ``[out, in]``; groups are runs of ``B`` weights along ``in``, the axis that a matrix product
sums over, so that one output is a sum of scaled partial sums. With ``b`` bits and ``L = 2^(b-1) - 1``, per group ``g``

    symmetric    s_g = max |w| / L             q = clip(round(w / s_g), -L, L)            w_hat = q s_g
    asymmetric   s_g = (max w - min w) / 2L+1  q = clip(round((w - m_g) / s_g), 0, 2L+1)  w_hat = q s_g + m_g

where ``m_g = min w``. The symmetric grid has no level ``-2^(b-1)``: with it the grid would be biased. Scales and minima
are rounded to the dtype that they are stored in *before* the codes are taken.

``group`` is written as an integer everywhere: ``B``, or :data:`PER_CHANNEL` or :data:`PER_TENSOR`. Packed codes are a
little-endian bit stream per row: 8 codes of ``b`` bits fill ``b`` bytes, and a row is cut to whole bytes; symmetric
codes are kept as two's complement. Straight-through gradients: Bengio et al. 2013, arXiv 1308.3432.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import InputError, OptionError

PER_CHANNEL, PER_TENSOR = 0, -1
MIN_BITS, MAX_BITS = 2, 8


@dataclasses.dataclass(frozen=True)
class Quantised:
    """Codes of one matrix. ``scales`` and ``minima`` are ``[out, in / B]``, or ``[1, 1]`` per tensor."""

    codes: Tensor  # [out, in], int8 where symmetric, uint8 where not
    scales: Tensor
    minima: Tensor | None  # None where symmetric
    bits: int
    group: int  # B, or PER_TENSOR


def largest_code(bits: int) -> int:
    """``L = 2^(bits-1) - 1``; :class:`OptionError` outside 2..8 bits."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise OptionError("bits", must=f"be from {MIN_BITS} to {MAX_BITS}", got=bits)
    return int(2 ** (bits - 1) - 1)


def resolve_group(columns: int, group: int) -> int:
    """``B`` of a row of ``columns`` weights (all of them for :data:`PER_CHANNEL`), or :data:`PER_TENSOR`.

    :class:`InputError` where ``group`` does not divide ``columns``, naming the nearest size below that does.
    """
    if group in (PER_TENSOR, PER_CHANNEL):
        return columns if group == PER_CHANNEL else PER_TENSOR
    if group < 0 or columns % group:
        raise InputError(
            f"group size {group}",
            must=f"divide the {columns} weights of a row",
            got=f"a rest of {columns % group}" if group > 0 else group,
            do=f"use {divisor_below(columns, abs(group))}",
        )
    return group


def divisor_below(columns: int, group: int) -> int:
    """The group size that stands in for ``group`` on a row of ``columns``: ``group`` itself where it divides the row,
    else the largest divisor in ``(group / 2, group]``, else the whole row."""
    for size in range(min(group, columns), 0, -1):
        if columns % size == 0:
            return size if 2 * size > group else columns
    return columns


def bits_per_weight(bits: int, group: int, columns: int, *, scale_bits: int = 16, symmetric: bool = True) -> float:
    """``b + 16/B``, scales (and minima) counted; a per-tensor scale is shared by too many weights to count."""
    size = resolve_group(columns, group)
    return bits if size == PER_TENSOR else bits + scale_bits * (1 if symmetric else 2) / size


def group_ranges(weight: Tensor, group: int) -> Tensor:
    """``max |w|`` of each group, ``[out, in / B]`` (``[1, 1]`` per tensor)."""
    return _groups(weight, resolve_group(weight.shape[1], group)).abs().amax(-1)


def quantise(
    weight: Tensor, bits: int, group: int = PER_CHANNEL, *, symmetric: bool = True, dtype: torch.dtype | None = None
) -> Quantised:
    """Round ``weight [out, in]`` to ``bits`` bits. ``dtype`` is that of scales and minima, by default the weight's."""
    largest, dtype = largest_code(bits), dtype or weight.dtype
    if weight.ndim != 2 or not weight.is_floating_point():
        got = f"{weight.dtype} {list(weight.shape)}"
        raise InputError("quantise", must="get a floating-point matrix [out, in]", got=got)
    if not torch.isfinite(weight).all():
        raise InputError("quantise", must="get finite weights", got="NaN or Inf")
    size = resolve_group(weight.shape[1], group)
    grouped = _groups(weight.detach().float(), size)
    if symmetric:
        minima, scales = None, _stored(grouped.abs().amax(-1) / largest, dtype)
        shifted, low, high = grouped, -largest, largest
    else:
        minima = _stored(grouped.amin(-1), dtype)
        shifted = grouped - minima.float()[..., None]
        scales = _stored(shifted.amax(-1).clamp_min(0) / (2 * largest + 1), dtype)
        low, high = 0, 2 * largest + 1
    step = scales.float()[..., None]
    codes = torch.where(step > 0, shifted / step, 0.0).round().clamp(low, high)
    kind = torch.int8 if symmetric else torch.uint8
    return Quantised(codes.to(kind).view(weight.shape), scales, minima, bits, size)


def dequantise(parts: Quantised, dtype: torch.dtype | None = None) -> Tensor:
    """``w_hat [out, in]`` in ``dtype`` (by default the scales'), computed in it."""
    return restore(parts.codes, parts.scales, parts.minima, dtype or parts.scales.dtype)


def restore(codes: Tensor, scales: Tensor, minima: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``q s + m`` of codes ``[..., out, in]`` with scales ``[..., out, in / B]`` or ``[..., 1, 1]``."""
    columns = codes.shape[-1]
    grouped = codes.to(dtype).view(*codes.shape[:-1], scales.shape[-1], columns // scales.shape[-1])
    value = grouped * scales.to(dtype)[..., None]
    if minima is not None:
        value = value + minima.to(dtype)[..., None]
    return value.view(codes.shape)


def fake_quantise(weight: Tensor, bits: int, group: int = PER_CHANNEL, *, symmetric: bool = True) -> Tensor:
    """``w_hat`` in the forward pass, the identity in the backward pass (straight-through)."""
    rounded: Tensor = _StraightThrough.apply(weight, bits, group, symmetric)
    return rounded


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """``||W - W_hat|| / ||W||`` in float32; 0 for an all-zero matrix that is kept."""
    reference = weight.float()
    norm, distance = reference.norm(), (reference - approximation.float()).norm()
    return float(distance / norm) if norm > 0 else float(distance)


def zero_share(codes: Tensor) -> float:
    """Share of weights that a symmetric code rounds to zero: near 1 where outliers stretch the range."""
    return float((codes == 0).float().mean())


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., n]`` (int8 or uint8) to bytes ``[..., ceil(n bits / 8)]``."""
    columns, mask = codes.shape[-1], (1 << bits) - 1
    if bits == 8:
        return codes.contiguous().view(torch.uint8).clone()
    values = torch.nn.functional.pad(codes.view(torch.uint8) & mask, (0, -columns % 8))
    words = values.view(*codes.shape[:-1], -1, 8).long() << _offsets(8, bits, codes)
    word = words.sum(-1, keepdim=True)
    stream = (word >> _offsets(bits, 8, codes)) & 255
    return stream.to(torch.uint8).flatten(-2)[..., : packed_columns(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int, *, symmetric: bool = True) -> Tensor:
    """The codes ``[..., columns]`` that :func:`pack` took, int8 where symmetric, else uint8."""
    if bits == 8:
        codes = packed
    elif bits == 4:
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :columns]
    else:
        stream = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits))
        stream = stream.view(*packed.shape[:-1], -1, bits).long()
        word = (stream << _offsets(bits, 8, packed)).sum(-1, keepdim=True)
        codes = ((word >> _offsets(8, bits, packed)) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)[..., :columns]
    if not symmetric:
        return codes
    sign = 1 << (bits - 1)
    return codes.view(torch.int8) if bits == 8 else (codes ^ sign).view(torch.int8) - sign


def packed_columns(columns: int, bits: int) -> int:
    """Bytes of a packed row."""
    return (columns * bits + 7) // 8


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
        return dequantise(quantise(weight, bits, group, symmetric=symmetric))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, None, None


def _groups(weight: Tensor, size: int) -> Tensor:
    """``[out, in / B, B]``, or ``[1, 1, out in]`` per tensor."""
    return weight.reshape(1, 1, -1) if size == PER_TENSOR else weight.reshape(weight.shape[0], -1, size)


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def _offsets(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device) * step
