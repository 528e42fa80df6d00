"""Matrices as the decoding runner multiplies by them: floats, or integers in groups of 32.

Integer weights ``w = q s + m`` (``q`` signed, of 4 or 8 bits; ``s``, and where asymmetric ``m``, for each row and group
``g`` of 32 inputs) meet activations that are quantised on the way, each row in the same groups:

    t_g = max |x_g| / 127      a_g = round(x_g / t_g)
    y   = sum_g  t_g ( s_g sum_i q_i a_i  +  m_g sum_i a_i )

The inner sums are integers, so they are exact however they are computed. :class:`IntegerWeight` does this in plain
torch: it is the reference that the compiled kernels are tested against. :class:`TorchIntegerWeight` is what runs where
there is no compiler: torch's packed int4 operator, bfloat16 activations that are not quantised.

Matrices of a model saved in the project's own format keep their codes; others are rounded to nearest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from gossamer.core.errors import OptionError, did_you_mean
from gossamer.parts import quant_kernels
from gossamer.parts.decode_plan import Matrix
from gossamer.parts.quant_linear import QuantLinear
from gossamer.parts.quantiser import quantise, restore

GROUP = 32
FORMATS = ("stored", "float32", "bfloat16", "int8", "int4")
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ROWS = 4096  # of a matrix that are restored at a time


class Weight(Protocol):
    """A matrix to multiply by: [n, in] -> [n, out]."""

    nbytes: int

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Codes:
    """An integer matrix in groups of 32; columns beyond the inputs are zeros."""

    codes: Tensor  # int8 [out, in up to a multiple of 32]
    scales: Tensor  # bfloat16 or float32 [out, in / 32]
    minima: Tensor | None  # float32 [out, in / 32]
    bias: Tensor | None  # float32 [out]
    bits: int  # 4 or 8: what a code takes
    inputs: int


class FloatWeight:
    """Its own dtype inside, that of ``x`` outside."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias, self.inputs = weight, bias, weight.shape[1]
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class IntegerWeight:
    """The equation above in torch; float32 in and out."""

    def __init__(self, form: Codes) -> None:
        self.form = form
        self.nbytes = stored_bytes(form)

    def __call__(self, x: Tensor) -> Tensor:
        form = self.form
        codes, scales = quantise_rows(x, form.codes.shape[1])
        parts = []
        for start in range(0, len(form.codes), _ROWS):
            rows = slice(start, start + _ROWS)
            minima = None if form.minima is None else form.minima[rows]
            parts.append(_grouped(codes, scales, form.codes[rows], form.scales[rows], minima))
        y = torch.cat(parts, 1)
        return y if form.bias is None else y + form.bias

    def rows(self, numbers: Tensor) -> Tensor:
        """Restored rows float32 [n, in]."""
        form = self.form
        minima = None if form.minima is None else form.minima[numbers]
        return restore(form.codes[numbers], form.scales[numbers], minima, torch.float32)[:, : form.inputs]


class TorchIntegerWeight:
    """torch's int4 operator: codes of 8 bits as two of 4. bfloat16 inside, float32 in and out."""

    def __init__(self, form: Codes) -> None:
        self.layout = quant_kernels.to_int4(form.codes, form.scales, None, GROUP, form.bits)
        self.columns, self.bias = form.codes.shape[1], form.bias
        self.nbytes = self.layout.packed.nbytes + self.layout.scales_zeros.nbytes

    @staticmethod
    def fits(form: Codes) -> bool:
        out, columns = form.codes.shape
        if form.minima is not None:
            return False
        return quant_kernels.int4_group(out, columns, form.bits, form.scales, None) == GROUP

    def __call__(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, self.columns - x.shape[1])).bfloat16()
        y = quant_kernels.int4_product(padded, self.layout).float()
        return y if self.bias is None else y + self.bias


def check_format(name: str, where: str) -> str:
    """``name`` if it is in :data:`FORMATS`, else :class:`OptionError`."""
    if name not in FORMATS:
        raise OptionError(f"{where} {name!r}", must="be known", do=did_you_mean(name, FORMATS))
    return name


def compute_dtype(weights: str, model: Any) -> torch.dtype:
    """That of activations and of keys and values: float32 around integers, else the weights' own."""
    if weights == "stored":
        packed = any(isinstance(module, QuantLinear) for module in model.modules())
        return torch.float32 if packed else model.dtype
    return _FLOATS.get(weights, torch.float32)


def integer_form(matrix: Matrix, weights: str) -> Codes | None:
    """The matrix as integers where ``weights`` asks for them and its own groups, if it is packed, are whole 32s."""
    packed = [isinstance(part, QuantLinear) for part in matrix.parts]
    if weights in _FLOATS or (weights == "stored" and not all(packed)):
        return None
    forms = []
    for part in matrix.parts:
        bits = 4 if weights == "int4" else 8
        form = _from_packed(part) if isinstance(part, QuantLinear) else rounded(*_floats(part, torch.float32), bits)
        if form is None:
            return None
        forms.append(form)
    return _joined(forms)


def float_weight(matrix: Matrix, weights: str, dtype: torch.dtype) -> FloatWeight:
    """In ``dtype``; with "stored" in the matrix's own, where it has one."""
    own: Any = matrix.parts[0]
    if weights == "stored" and not isinstance(own, QuantLinear):
        dtype = own.weight.dtype
    floats, biases = zip(*(_floats(part, dtype) for part in matrix.parts), strict=True)
    bias = _joined_or_none(list(biases), [part.shape[0] for part in floats])
    # one part is not copied: a tied head may be most of the model
    return FloatWeight(floats[0] if len(floats) == 1 else torch.cat(floats), bias)


def rounded(weight: Tensor, bias: Tensor | None, bits: int) -> Codes:
    """``weight`` [out, in] rounded to nearest; ``bias`` float32 [out]."""
    form = quantise(_padded(weight), bits, GROUP, dtype=torch.bfloat16)
    return Codes(form.codes, form.scales, None, bias, bits, weight.shape[1])


def quantise_rows(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Activations ``[n, in]`` as codes float32 [n, columns / 32, 32] and scales ``t`` [n, columns / 32]."""
    grouped = F.pad(x.float(), (0, columns - x.shape[1])).view(len(x), -1, GROUP)
    largest = grouped.abs().amax(-1)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    return (grouped * inverse[..., None]).round(), largest / 127.0


def stored_bytes(form: Codes) -> int:
    """Bytes that the matrix takes at its bits, scales and minima and bias included."""
    others = sum(t.nbytes for t in (form.scales, form.minima, form.bias) if t is not None)
    return form.codes.numel() * form.bits // 8 + others


def _grouped(codes: Tensor, scales: Tensor, weights: Any, weight_scales: Any, minima: Tensor | None) -> Tensor:
    q = weights.float().view(len(weights), -1, GROUP)
    # below 2^24, so exact in float32
    sums = torch.einsum("ngi,ogi->nog", codes, q)
    y = (sums * weight_scales.float() * scales[:, None]).sum(-1)
    return y if minima is None else y + (codes.sum(-1) * scales) @ minima.t()


def _from_packed(part: QuantLinear) -> Codes | None:
    codes, scales, minima = part.codes(), part.scales, part.minima
    out, columns = codes.shape
    size = columns // scales.shape[1]
    if size % GROUP and scales.shape[1] > 1:
        return None
    scales = scales if scales.dtype == torch.bfloat16 else scales.float()
    low = None if minima is None else minima.float()
    if low is not None:
        middle = 1 << (part.bits - 1)
        codes = (codes.int() - middle).to(torch.int8)
        low = _spread(low + middle * scales.float(), out, columns, size)
    bias = None if part.bias is None else part.bias.detach().float()
    bits = 4 if part.bits <= 4 else 8
    return Codes(_padded(codes), _spread(scales, out, columns, size), low, bias, bits, columns)


def _floats(part: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias."""
    bias = None if part.bias is None else part.bias.detach().to(dtype)
    if isinstance(part, QuantLinear):
        weight = restore(part.codes(), part.scales, part.minima, torch.float32)
    else:
        weight = part.weight.detach().t() if isinstance(part, Conv1D) else part.weight.detach()
    return weight.to(dtype).contiguous(), bias


def _joined(forms: Sequence[Codes]) -> Codes:
    scales = [form.scales for form in forms]
    if len({t.dtype for t in scales}) > 1:
        scales = [t.float() for t in scales]
    minima = None
    if any(form.minima is not None for form in forms):
        minima = torch.cat([torch.zeros_like(f.scales, dtype=torch.float32) if f.minima is None else f.minima
                            for f in forms])  # fmt: skip
    return Codes(
        torch.cat([form.codes for form in forms]),
        torch.cat(scales),
        minima,
        _joined_or_none([form.bias for form in forms], [len(form.codes) for form in forms]),
        max(form.bits for form in forms),
        forms[0].inputs,
    )


def _joined_or_none(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    return torch.cat([like.new_zeros(n) if bias is None else bias for bias, n in zip(biases, sizes, strict=True)])


def _padded(matrix: Tensor) -> Tensor:
    return F.pad(matrix, (0, -matrix.shape[1] % GROUP)).contiguous()


def _spread(values: Tensor, out: int, columns: int, size: int) -> Tensor:
    """Per-group values ``[out or 1, in / size]`` repeated for groups of 32, the padded one too."""
    groups = -(-columns // GROUP)
    if values.shape[1] == 1:
        return values.expand(out, groups).contiguous()
    return values.expand(out, -1).repeat_interleave(size // GROUP, 1).contiguous()
