"""GPTQ: weights rounded column by column, each rounding error made up for by the columns that are still to come.

Frantar, Ashkboos, Hoefler, Alistarh 2022 (arXiv 2210.17323). For ``W [out, in]`` with Hessian ``H = 2/n sum x x^T`` of
its inputs, ``U`` the upper Cholesky factor of ``(H + damp mean(diag H) I)^-1``, and the columns ``j`` in order

    e_j = (W_j - round(W_j)) / U_jj        W_k <- W_k - e_j U_jk   for k > j

on the grid of :mod:`gossamer.parts.quantiser`; a group's scale is taken when its first column is reached, from the
weights as they are then. Blocks of the model follow one another, the Hessians of each on inputs that passed the
rounded blocks before it (``sequential``); the layers inside of one block see its inputs unrounded. Columns of inputs
that are always 0 become 0. Where plain rounding has the smaller error on the calibration inputs, it is taken; stacks of
expert matrices and embeddings without a head, whose inputs are not those of a linear layer, are rounded. A head that is
tied to the embedding comes first, so that the blocks make up for what the embedding lost.

:meth:`GPTQ.pack` takes bits and groups for each matrix, from whatever planned them.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.kinds.compression import Choice, Compressed, Compression, pack_model, scale_dtype_of
from gossamer.parts.calibration import Batch, block_by_block, check_batches, collect, invert
from gossamer.parts.calibration import squared_error as output_error
from gossamer.parts.quant_format import Packing, find_matrices
from gossamer.parts.quantiser import PER_TENSOR, Quantised, dequantise, divisor_below, largest_code, quantise

CARD = Card(
    title="GPTQ",
    claim="at equal bits, loss on calibration data at most that of rounding to nearest",
    requires=("float_weights",),
    forbids=("adapter_attached",),
    provides=("quantised",),
    removes=("float_weights",),
    registers=("quantizer:gossamer",),
    families=("llama", "gemma3", "gpt2"),
    limits="columns are taken in their order, not by size of their inputs; norms and routers stay float",
    builtin=True,
)
_BLOCK = 128  # columns whose errors are carried on together
_ROWS = 16384  # of a matrix that are worked on at a time


class GPTQConfig(Config):
    bits: int = option(4, "bits of a weight", ge=2, le=8)
    group: int = option(128, "weights that share a scale; 0 is an output channel, -1 the whole matrix", ge=-1)
    symmetric: bool = option(True, "a grid around zero, without minima to store")
    damp: float = option(0.01, "added to the diagonal of the Hessian, in means of it", gt=0)
    sequential: bool = option(True, "inputs pass the rounded blocks before; off: all as the float model has them")
    skip: tuple[str, ...] = option(
        ("lm_head", "embed", "wte", "router", "shared_expert_gate"), "parts of names of modules that stay float"
    )
    dtype: str = option(
        "auto", "dtype of the scales; auto: the model's, if it has 16 bits", choices=("auto", "bfloat16", "float16")
    )


class GPTQ(Compression):
    """Packs every linear layer, its errors made up for. ``data`` is a list of token batches."""

    config_class = GPTQConfig
    calibrates = True

    def compress(self, model: Any, data: Any = None) -> Compressed:
        """Works in place. InputError for nothing to pack, no or too little data, or NaN inputs."""
        matrices, left = find_matrices(model, self.config.skip)
        if not matrices:
            raise InputError(f"{self.name}.compress", must="find linear layers", got="none", do=f"left float: {left}")
        packings, notes = {}, {}
        for matrix in matrices:
            asked = self.config.group
            group = asked if asked <= 0 else divisor_below(matrix.columns, asked)
            notes[matrix.name] = "" if group == asked else f"{asked} does not divide {matrix.columns}: {group} used"
            packings[matrix.name] = Packing(self.config.bits, group, self.config.symmetric)
        return self.pack(model, data, packings, notes)

    def pack(
        self, model: Any, data: Any, packings: Mapping[str, Packing], notes: Mapping[str, str] | None = None
    ) -> Compressed:
        """As :meth:`compress` with a packing for each matrix, by name; what has none stays float."""
        found, left = find_matrices(model, self.config.skip)
        matrices = {matrix.name: matrix for matrix in found if matrix.name in packings}
        left |= {matrix.name: "not in the plan" for matrix in found if matrix.name not in packings}
        widest = max((matrix.columns for matrix in matrices.values()), default=1)
        batches = check_batches(data, self.name, width=widest)
        dtype = scale_dtype_of(model, self.config.dtype)
        choices = {
            name: Choice(matrix, packings[name], (notes or {}).get(name, "")) for name, matrix in matrices.items()
        }
        rounded = 0
        linear = {matrix.linear: name for name, matrix in matrices.items() if matrix.linear}
        for place, statistics in self._statistics(model, batches, list(linear)):
            name = linear[place]
            matrix, original = matrices[name], matrices[name].weight.detach().clone()
            parts, better = compensated(original, statistics.hessian, packings[name], dtype, self.config.damp)
            rounded += not better
            with torch.no_grad():
                matrix.weight.copy_(dequantise(parts, torch.float32))
            choices[name] = Choice(matrix, packings[name], choices[name].note, parts, original)
        return pack_model(model, list(choices.values()), left, self.config.dtype, {"plainly_rounded": rounded})

    def _statistics(self, model: nn.Module, batches: Sequence[Batch], names: Sequence[str]) -> Any:
        """(name, statistics) of each layer: what stands outside of blocks, then block after block."""
        stack = _stack(names) if self.config.sequential else ""
        rest = [name for name in names if not stack or not name.startswith(stack + ".")]
        yield from collect(model, batches, rest) if rest else ()
        if stack:
            paths = [f"{stack}.{name}" for name, _ in model.get_submodule(stack).named_children()]
            # blocks without a layer to round are passed too
            inside = [[n.removeprefix(path + ".") for n in names if n.startswith(path + ".")] for path in paths]
            for step in block_by_block(model, batches, [model.get_submodule(path) for path in paths], inside):
                for name, statistics in step.statistics.items():
                    yield f"{paths[step.index]}.{name}", statistics


def compensated(
    weight: Tensor, hessian: Tensor, packing: Packing, dtype: torch.dtype, damp: float
) -> tuple[Quantised, bool]:
    """``weight [out, in]`` on the grid of ``packing``, and whether making up for errors was better than rounding."""
    weight = weight.float()
    plain = quantise(weight, packing.bits, packing.group, symmetric=packing.symmetric, dtype=dtype)
    careful = _by_columns(weight, hessian, packing, dtype, damp)
    errors = [output_error(weight - dequantise(parts, torch.float32), hessian) for parts in (careful, plain)]
    return (careful, True) if errors[0] <= errors[1] else (plain, False)


def _by_columns(weight: Tensor, hessian: Tensor, packing: Packing, dtype: torch.dtype, damp: float) -> Quantised:
    inverse = invert(hessian, damp=damp, always=True)
    upper = torch.linalg.cholesky(inverse.matrix, upper=True).float()
    # rows know nothing of one another, but for one scale of all
    rows = len(weight) if packing.group == PER_TENSOR else _ROWS
    parts = [_rows_by_columns(part, upper, inverse.dead, packing, dtype) for part in weight.split(rows)]
    minima = [part.minima for part in parts if part.minima is not None]
    return Quantised(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(minima) if minima else None,
        packing.bits,
        parts[0].group,
    )


def _rows_by_columns(weight: Tensor, upper: Tensor, dead: Tensor, packing: Packing, dtype: torch.dtype) -> Quantised:
    """``weight [out, in]``; works on its transpose, so that a column lies in one piece."""
    work = weight.t().clone(memory_format=torch.contiguous_format)
    work[dead] = 0
    columns = len(work)
    size = packing.group if packing.group > 0 else columns
    top = largest_code(packing.bits)
    low, high = (-top, top) if packing.symmetric else (0, 2 * top + 1)
    codes = torch.empty_like(work)
    grids: list[Quantised] = []
    block = size * max(1, _BLOCK // size) if size <= _BLOCK else divisor_below(size, _BLOCK)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros_like(work[start:end])
        for j in range(start, end):
            if j % size == 0:
                span = work if packing.group == PER_TENSOR else work[j : j + size]
                kind = PER_TENSOR if packing.group == PER_TENSOR else 0
                grids.append(quantise(span.t(), packing.bits, kind, symmetric=packing.symmetric, dtype=dtype))
            scale, least = _column_of(grids[-1])
            codes[j] = torch.where(scale > 0, (work[j] - least) / scale, 0.0).round().clamp(low, high)
            errors[j - start] = (work[j] - codes[j] * scale - least) / upper[j, j]
            work[j + 1 : end] -= upper[j, j + 1 : end, None] * errors[j - start]
        work[end:] -= upper[start:end, end:].t() @ errors
    minima = [grid.minima for grid in grids if grid.minima is not None]
    return Quantised(
        codes.t().to(torch.int8 if packing.symmetric else torch.uint8).contiguous(),
        torch.cat([grid.scales for grid in grids], 1),
        torch.cat(minima, 1) if minima else None,
        packing.bits,
        PER_TENSOR if packing.group == PER_TENSOR else size,
    )


def _column_of(grid: Quantised) -> tuple[Tensor, Tensor]:
    """Scale and minimum of a column, ``[out]`` or ``[1]``."""
    scale = grid.scales[:, 0].float()
    return scale, torch.zeros_like(scale) if grid.minima is None else grid.minima[:, 0].float()


def _stack(names: Sequence[str]) -> str:
    """The list of blocks that most names stand in; empty where none has a number."""
    found: collections.Counter[str] = collections.Counter()
    for name in names:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        found[".".join(parts[:place])] += place > 0
    return max(found, key=lambda stack: found[stack], default="")
