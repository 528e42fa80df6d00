"""Compression: ``compress(model, data) -> Compressed(model, report)``; the result saves as safetensors."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.kinds.base import System

if TYPE_CHECKING:
    from gossamer.parts.quant_format import Matrix, Packing
    from gossamer.parts.quantiser import Quantised


@dataclasses.dataclass
class MatrixRow:
    """What was done to one weight matrix."""

    name: str
    shape: tuple[int, ...]
    bits: int
    group: int
    bits_per_weight: float  # scales included
    error: float  # ||W - W_hat|| / ||W||
    collapsed: bool = False  # nearly all weights were rounded to zero
    note: str = ""


@dataclasses.dataclass
class CompressionReport:
    """Bytes are of the parameters and buffers as held, counted, not computed from a formula."""

    bytes_before: int
    bytes_after: int
    rows: list[MatrixRow] = dataclasses.field(default_factory=list)
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass
class Compressed:
    model: Any
    report: CompressionReport


class Compression(System):
    """Makes a model smaller. ``data`` is a list of token batches, or ``None`` for methods that need weights only."""

    verb = "compress"
    stands_in: ClassVar[bool] = False  # leaves a model to train on, not to use: a recipe keeps the whole one beside it

    @property
    def calibrates(self) -> bool:
        """Whether it needs data: a recipe then gives it its training texts."""
        return False

    def check(self, model: nn.Module, data: Any = None) -> None:
        if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
            raise InputError(
                f"{self.name}.compress",
                must="get float weights",
                got="a model that is quantised already",
                do="load the float checkpoint",
            )
        if getattr(model, "peft_config", None):
            raise InputError(
                f"{self.name}.compress",
                must="get a model without an adapter",
                got=f"adapters {sorted(model.peft_config)}",  # type: ignore[arg-type]
                do="merge it first",
            )
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise InputError(f"{self.name}: {name}", must="hold finite weights", got="NaN or Inf")

    @abc.abstractmethod
    def compress(self, model: Any, data: Any = None) -> Compressed:
        """Compress ``model`` (in place where possible) and say what was done."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """How one matrix is to be packed. ``group`` as in :mod:`gossamer.parts.quantiser`."""

    matrix: Matrix
    packing: Packing
    note: str = ""
    parts: Quantised | None = None  # codes that are not those of rounding the weight
    original: torch.Tensor | None = None  # the weight as it was, where the model's has been changed meanwhile


COLLAPSE = 0.75
"""A matrix has collapsed where more than this share of its weights is rounded to zero (a Gaussian at 4 bits: 0.2)."""


def pack_model(
    model: nn.Module, choices: list[Choice], left: dict[str, str], dtype: str, values: dict[str, Any]
) -> Compressed:
    """Pack every chosen matrix in place, free its float weight and report. ``left`` says what stays float, and why.

    ``dtype`` is that of the scales; ``"auto"`` means the model's where it has 16 bits, else bfloat16. ``choices`` is
    emptied, so that no float weight outlives its packing.
    """
    from gossamer.parts.quant_format import mark_quantised, pack_matrix
    from gossamer.parts.quantiser import relative_error, zero_share

    before, rows, scale_dtype = held_bytes(model), [], scale_dtype_of(model, dtype)
    choices.reverse()
    while choices:
        choice = choices.pop()
        weight, name = choice.matrix.weight.detach(), choice.matrix.name
        module = pack_matrix(model, choice.matrix, choice.packing, scale_dtype, choice.parts)
        weight = weight if choice.original is None else choice.original
        stored = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers(recurse=False))
        rows.append(
            MatrixRow(
                name=name,
                shape=module.shape,
                bits=module.bits,
                group=module.group,
                bits_per_weight=8 * stored / module.logical_weight_count,
                error=relative_error(weight, module.dequantised(torch.float32)),
                collapsed=module.symmetric and zero_share(module.codes()) > COLLAPSE,
                note=choice.note,
            )
        )
    mark_quantised(model)
    counted = sum(torch.Size(row.shape).numel() * row.bits_per_weight for row in rows)
    average = counted / max(1, sum(torch.Size(row.shape).numel() for row in rows))
    shared: dict[str, Any] = {
        "bits_per_weight": average,
        "scale_dtype": str(scale_dtype).removeprefix("torch."),
        "left_float": left,
    }
    return Compressed(model, CompressionReport(before, held_bytes(model), rows, shared | values))


def scale_dtype_of(model: nn.Module, dtype: str) -> torch.dtype:
    """See :func:`pack_model`."""
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    own = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return own if own.itemsize == 2 else torch.bfloat16


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, shared ones once."""
    seen: dict[int, int] = {}
    for tensor in model.state_dict().values():
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())
