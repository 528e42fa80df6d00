"""Integer matrix kernels of torch on the CPU, and the layout that they want.

Two kernels, both for bfloat16 activations ``x [m, in]`` and bfloat16 scales:

- int8, ``torch._weight_int8pack_mm``: one scale per output channel, codes as they are stored, but for two things that
  crash it: ``in`` must be a multiple of 32, since it reads whole vectors, and codes and ``x`` be aligned in memory;
- int4, ``aten::_weight_int4pack_mm_for_cpu``: ``w = (u - 8) s + z`` with codes ``u`` in 0..15 in a blocked layout of
  its own, groups of 32, 64, 128 or 256 along ``in``, ``(s, z)`` as ``[in / g, out, 2]``; ``out`` a multiple of 16.

Coarser groups repeat their scales. A signed code ``q`` of 5 to 8 bits is two int4 codes, ``q + 128 = 16 h + l``, so

    w = q s = (h - 8) 16 s  +  (l - 8) s + 8 s

and ``x W^T = [x, x] [W_h, W_l]^T`` is one call: grouped 8-bit weights at half the speed of 4-bit ones, exact in the
scales, since only powers of two are multiplied in. Codes of 2 to 4 bits take 4 bits in this layout, others 8.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

_GROUPS = (256, 128, 64, 32)
_ALIGNMENT = 64  # bytes; what torch allocates is, what was mapped from a file need not be
_ROWS = 64  # the layout never mixes rows of different blocks of 64


class Int4(NamedTuple):
    """A weight as the int4 kernel holds it."""

    packed: Tensor  # uint8 [out, depth / 2], the kernel's own order
    scales_zeros: Tensor  # bfloat16 [depth / group, out, 2]
    group: int
    split: bool  # depth is 2 in: high and low halves of each code


def int8_fits(columns: int, bits: int, scales: Tensor, minima: Tensor | None) -> bool:
    """Whether stored codes go straight to the int8 kernel: 8 bits, symmetric, one bfloat16 scale per channel."""
    return (
        bits == 8
        and columns % 32 == 0
        and minima is None
        and scales.shape[0] > 1
        and scales.shape[1] == 1
        and scales.dtype == torch.bfloat16
        and scales.device.type == "cpu"
    )


def aligned(tensor: Tensor) -> Tensor:
    """``tensor`` where the int8 kernel can read it."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def int4_group(out: int, columns: int, bits: int, scales: Tensor, minima: Tensor | None) -> int | None:
    """Group size that the int4 kernel would use, or ``None`` where it does not fit."""
    supported = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") and scales.device.type == "cpu"
    if not supported or out % 16 or scales.dtype != torch.bfloat16 or (minima is not None and bits > 4):
        return None
    stored = columns // scales.shape[1]
    return next((group for group in _GROUPS if stored % group == 0), None)


def to_int4(codes: Tensor, scales: Tensor, minima: Tensor | None, group: int, bits: int) -> Int4:
    """Lay out codes ``[out, in]``; see :func:`int4_group` for what fits."""
    out, columns = codes.shape
    groups = columns // group
    scale = scales.expand(out, -1).repeat_interleave(groups // scales.shape[1], 1)
    zero = torch.zeros_like(scale)
    if bits > 4:
        shifted = codes.int() + 128
        unsigned = torch.cat((shifted >> 4, shifted & 15), 1)
        scale, zero = torch.cat((16 * scale, scale), 1), torch.cat((zero, 8 * scale), 1)
    elif minima is None:
        unsigned = codes.int() + 8
    else:
        unsigned = codes.int()
        zero = minima.expand(out, -1).repeat_interleave(groups // minima.shape[1], 1) + 8 * scale
    scales_zeros = torch.stack((scale.t(), zero.t()), -1).contiguous()
    return Int4(_pack(unsigned), scales_zeros, group, bits > 4)


def from_int4(form: Int4, bits: int, *, symmetric: bool) -> Tensor:
    """The codes ``[out, in]`` that :func:`to_int4` was given."""
    out, depth = form.packed.shape[0], 2 * form.packed.shape[1]
    nibbles = torch.stack((form.packed & 15, form.packed >> 4), -1).view(out, depth)
    whole = out // _ROWS * _ROWS
    parts = []
    if whole:
        parts.append(nibbles[:whole].reshape(-1, _ROWS * depth)[:, _order(_ROWS, depth)].view(whole, depth))
    if out > whole:
        parts.append(nibbles[whole:].reshape(-1)[_order(out - whole, depth)].view(out - whole, depth))
    unsigned = torch.cat(parts)
    assert torch.equal(_pack(unsigned.int()), form.packed), "the int4 layout mixes blocks of 64 rows"
    if form.split:
        high, low = unsigned.int().chunk(2, 1)
        return (16 * high + low - 128).to(torch.int8)
    return (unsigned.view(torch.int8) - 8) if symmetric else unsigned


def int4_product(x: Tensor, form: Int4) -> Tensor:
    """``x W^T`` for ``x [..., in]``."""
    flat = x.reshape(-1, x.shape[-1])
    if form.split:
        flat = torch.cat((flat, flat), 1)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat.contiguous(), form.packed, form.group, form.scales_zeros)
    return y.view(*x.shape[:-1], y.shape[-1])


def int8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """``x W^T`` for ``x [..., in]``, codes int8 ``[out, in]`` :func:`aligned`, scales ``[out, 1]``."""
    y = torch._weight_int8pack_mm(aligned(x.reshape(-1, x.shape[-1]).contiguous()), codes, scales.view(-1))
    return y.view(*x.shape[:-1], y.shape[-1])


def _pack(unsigned: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.int().contiguous(), 1)
    return packed


@functools.lru_cache(maxsize=16)
def _order(rows: int, depth: int) -> Tensor:
    """Where each code of a ``[rows, depth]`` block lies in its packed form, found by packing the digits of its index.

    The layout depends on the vector width of the machine, so it is asked for, not assumed.
    """
    index = torch.arange(rows * depth)
    original, shift = torch.zeros_like(index), 0
    while (rows * depth - 1) >> shift:
        packed = _pack(((index >> shift) & 15).view(rows, depth))
        original += torch.stack((packed & 15, packed >> 4), -1).flatten().long() << shift
        shift += 4
    return original.argsort()
