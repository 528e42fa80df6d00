"""Compression: ``compress(model, data) -> Compressed(model, report)``; the result saves as safetensors."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.kinds.base import System


@dataclasses.dataclass
class MatrixRow:
    """What was done to one weight matrix."""

    name: str
    shape: tuple[int, ...]
    bits: int
    group: int
    bits_per_weight: float  # scales included
    error: float  # ||W - W_hat|| / ||W||
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

    def check(self, model: nn.Module, data: Any = None) -> None:
        if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
            raise InputError(
                f"{self.name}.compress",
                must="get float weights",
                got="a model that is quantised already",
                do="load the float checkpoint",
            )
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise InputError(f"{self.name}: {name}", must="hold finite weights", got="NaN or Inf")

    @abc.abstractmethod
    def compress(self, model: Any, data: Any = None) -> Compressed:
        """Compress ``model`` (in place where possible) and say what was done."""


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, shared ones once."""
    seen: dict[int, int] = {}
    for tensor in model.state_dict().values():
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())
