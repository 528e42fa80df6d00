"""Modules whose weights are stored as packed integers: linear layers, stacks of expert matrices, embeddings.

:class:`QuantLinear` computes ``y = x W_hat^T + b``. On the CPU, with bfloat16 activations and no gradient asked of the
input, torch's int4 and int8 kernels do it; everywhere else (float32, training through the layer, odd shapes, other
devices) the weight is restored in the dtype of ``x`` for the length of the product and dropped again.

A layer holds its weight once: as the packed bit stream that is saved, or, after the first kernel call, in the kernel's
layout (4 or 8 bits a weight), from which the bit stream is made again when the state is read or the layer moves.
Nothing keeps a float copy. Scales keep the dtype that they were rounded to whatever the model is cast to.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.parts import quant_kernels as kernels
from gossamer.parts.quantiser import (
    PER_TENSOR,
    Quantised,
    pack,
    packed_columns,
    quantise,
    resolve_group,
    restore,
    unpack,
)


class PackedWeight(nn.Module):
    """A weight ``[..., out, in]`` as buffers ``qweight`` (bytes), ``scales`` and, where asymmetric, ``minima``."""

    qweight: Tensor  # uint8 [..., out, ceil(in bits / 8)]
    scales: Tensor  # [..., out, in / B], or [..., 1, 1] per tensor
    minima: Tensor | None

    def __init__(
        self, shape: tuple[int, ...], bits: int, group: int, *, symmetric: bool, scale_dtype: torch.dtype
    ) -> None:
        super().__init__()
        *stack, out, columns = shape
        self.shape, self.bits, self.symmetric = tuple(shape), bits, symmetric
        self.group = resolve_group(columns, group)
        grid = (1, 1) if self.group == PER_TENSOR else (out, columns // self.group)
        self.register_buffer("qweight", torch.zeros(*stack, out, packed_columns(columns, bits), dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(*stack, *grid, dtype=scale_dtype))
        self.register_buffer("minima", None if symmetric else torch.zeros(*stack, *grid, dtype=scale_dtype))

    @property
    def logical_weight_count(self) -> int:
        """How many weights the bytes stand for."""
        return torch.Size(self.shape).numel()

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Quantise ``weight [..., out, in]`` into the buffers, matrix by matrix."""
        *_, out, columns = self.shape
        assert tuple(weight.shape) == self.shape, (weight.shape, self.shape)
        self.fill_parts(
            [
                quantise(matrix, self.bits, self.group, symmetric=self.symmetric, dtype=self.scales.dtype)
                for matrix in weight.reshape(-1, out, columns)
            ]
        )

    @torch.no_grad()
    def fill_parts(self, parts: list[Quantised]) -> None:
        """Take over codes, scales and minima of each matrix as they are."""
        *stack, out, _ = self.shape
        self.qweight = torch.stack([pack(part.codes, self.bits) for part in parts]).view(*stack, out, -1)
        self.scales = torch.stack([part.scales for part in parts]).view(*stack, *parts[0].scales.shape)
        if not self.symmetric:
            minima = [part.minima for part in parts if part.minima is not None]
            self.minima = torch.stack(minima).view(*stack, *minima[0].shape)

    def codes(self) -> Tensor:
        """The integer codes ``[..., out, in]``."""
        return unpack(self.qweight, self.bits, self.shape[-1], symmetric=self.symmetric)

    def dequantised(self, dtype: torch.dtype | None = None) -> Tensor:
        """``w_hat [..., out, in]`` in ``dtype``, by default that of the scales."""
        return restore(self.codes(), self.scales, self.minima, dtype or self.scales.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            is_scale = tensor is self.scales or tensor is self.minima
            return tensor.to(moved.device) if is_scale and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        grid = "per tensor" if self.group == PER_TENSOR else f"groups of {self.group}"
        return f"{list(self.shape)}, {self.bits} bits, {grid}" + ("" if self.symmetric else ", asymmetric")


class QuantLinear(PackedWeight):
    """A linear layer on a packed weight ``[out, in]``; the bias, if any, stays a float parameter.

    It has no ``weight``, so that code which would change a float weight in place, such as merging an adapter, fails
    instead of losing the change. Plain PEFT LoRA takes it after :func:`register_with_lora`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        *,
        bias: bool = False,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), bits, group, symmetric=symmetric, scale_dtype=scale_dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None
        self._int4: kernels.Int4 | None = None

    def forward(self, x: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and x.requires_grad
        y = None if trains or x.dtype != torch.bfloat16 or x.device.type != "cpu" else self._kernel_product(x)
        if y is None:
            self.unlay()
            y = _Product.apply(x, self.qweight, self.scales, self.minima, (self.bits, self.in_features))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def codes(self) -> Tensor:
        if self._int4 is not None:
            return kernels.from_int4(self._int4, self.bits, symmetric=self.symmetric)
        return super().codes()

    def lay(self) -> bool:
        """Take up the int4 kernel's layout where it fits; says whether it did."""
        if self._int4 is None:
            size = (self.out_features, self.in_features)
            group = kernels.int4_group(*size, self.bits, self.scales, self.minima)
            if group is None:
                return False
            self._int4 = kernels.to_int4(super().codes(), self.scales, self.minima, group, self.bits)
            self.qweight = self.qweight.new_empty(0)
        return True

    def unlay(self) -> None:
        """Go back to the packed bit stream."""
        if self._int4 is not None:
            self.qweight, self._int4 = pack(self.codes(), self.bits), None

    def _kernel_product(self, x: Tensor) -> Tensor | None:
        if kernels.int8_fits(self.in_features, self.bits, self.scales, self.minima):
            self.qweight = kernels.aligned(self.qweight)
            return kernels.int8_product(x, self.qweight.view(torch.int8), self.scales)
        return kernels.int4_product(x, self._int4) if self.lay() and self._int4 is not None else None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.unlay()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._int4 is not None:
            destination[prefix + "qweight"] = pack(self.codes(), self.bits)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unlay()
        super()._load_from_state_dict(*args, **kwargs)


class QuantExperts(PackedWeight):
    """Stands where a stack of expert matrices ``[experts, out, in]`` was; ``stack[e]`` restores one matrix.

    The loop that transformers' experts modules run by default reads ``self.gate_up_proj[e]`` for the experts that some
    token chose, so only those are restored, one at a time.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        bits: int,
        group: int,
        *,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(shape, bits, group, symmetric=symmetric, scale_dtype=scale_dtype)
        self.dtype = dtype  # of the restored matrices: the model's

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        codes = unpack(self.qweight[expert], self.bits, self.shape[-1], symmetric=self.symmetric)
        minima = None if self.minima is None else self.minima[expert]
        return restore(codes, self.scales[expert], minima, self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device)).dtype
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        raise InputError("QuantExperts", must="be indexed by the expert", do="use the eager experts implementation")


class QuantEmbedding(PackedWeight):
    """Rows of a packed weight ``[vocabulary, d]``, restored as they are looked up, times ``scale``."""

    def __init__(
        self,
        shape: tuple[int, ...],
        bits: int,
        group: int,
        *,
        scale: float = 1.0,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(shape, bits, group, symmetric=symmetric, scale_dtype=scale_dtype)
        self.scale, self.dtype = scale, dtype  # of the rows: the model's

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., d]"""
        codes = unpack(self.qweight[ids], self.bits, self.shape[-1], symmetric=self.symmetric)
        whole = self.group == PER_TENSOR
        scales = self.scales.expand(*ids.shape, 1) if whole else self.scales[ids]
        minima = None if self.minima is None else self.minima.expand(*ids.shape, 1) if whole else self.minima[ids]
        # transformers multiplies in the model's dtype too
        return restore(codes, scales, minima, self.dtype) * torch.tensor(self.scale, dtype=self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device)).dtype
        return super()._apply(fn, recurse)


class TiedQuantLinear(QuantLinear):
    """The output matrix of a model whose embedding holds the very same rows: it owns and saves nothing."""

    logical_weight_count = 0

    def __init__(self, source: QuantEmbedding) -> None:
        out, columns = source.shape
        with torch.device("meta"):
            super().__init__(
                columns, out, source.bits, source.group, symmetric=source.symmetric, scale_dtype=source.scales.dtype
            )
        self._source = [source]  # in a list, so that it is no child
        self.share()

    def share(self) -> None:
        """Hold what the embedding holds now."""
        source = self._source[0]
        self._int4 = None
        self.qweight, self.scales, self.minima = source.qweight, source.scales, source.minima

    def unlay(self) -> None:
        if self._int4 is not None:
            self.share()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # the embedding is moved by itself, before or after
        super()._apply(fn, recurse)
        if self._source[0].qweight.device == self.qweight.device:
            self.share()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


def register_with_lora(config: Any) -> Any:
    """Let a PEFT ``LoraConfig`` target packed layers; PEFT does not save this, so do it again before loading."""
    from peft.tuners.lora import Linear

    config._register_custom_module({QuantLinear: Linear})
    return config


class _Product(torch.autograd.Function):
    """``x W_hat^T`` that keeps the bytes for the backward pass, not the restored weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, qweight: Tensor, scales: Tensor, minima: Tensor | None, form: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(qweight, scales, minima)
        ctx.form, ctx.dtype = form, x.dtype
        return F.linear(x, _restored(qweight, scales, minima, form, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        qweight, scales, minima = ctx.saved_tensors
        weight = _restored(qweight, scales, minima, ctx.form, gradients[0].dtype)
        return (gradients[0] @ weight).to(ctx.dtype), None, None, None, None


def _restored(
    qweight: Tensor, scales: Tensor, minima: Tensor | None, form: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    bits, columns = form
    return restore(unpack(qweight, bits, columns, symmetric=minima is None), scales, minima, dtype)
