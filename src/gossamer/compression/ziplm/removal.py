"""Greedy removal of units from a layer's inputs, with the other weights made up for it, and the levels it leaves.

For ``W [out, in]`` with Hessian ``H`` and ``Hinv`` its inverse, ``M`` the columns of a unit, ``B = (Hinv_MM)^-1``:

    rho_M = sum_i W_iM B W_iM^T        what removing M adds to the squared error: for one column |W_j|^2 / Hinv_jj
    W    <- W - W_M B Hinv_M           the least-squares refit on what is left
    Hinv <- Hinv - Hinv_M^T B Hinv_M   the inverse Hessian of what is left

The unit with the smallest ``rho`` goes, then all are looked at again: correlated units are seen, which a ranking made
once does not. ``rho`` is in units of ``trace(D H D^T)``, twice the mean squared output error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.parts.calibration import Batch, collect, invert, squared_error
from gossamer.parts.injection import is_transposed
from gossamer.parts.surgery import Block

_COMPACT = 0.9  # rows that were removed are dropped from the matrices when this share is left
_THINNEST = 0.01  # narrowest FFN before it goes altogether


@dataclasses.dataclass(frozen=True)
class Level:
    """A layer with ``len(keep)`` units left: ``weight [out, kept columns]``, ``error = |W X - W' X|^2 / |W X|^2``."""

    keep: Tensor
    weight: Tensor
    error: float


@dataclasses.dataclass(frozen=True)
class Levels:
    """What can be made of one output layer, from whole to gone. ``kind`` is a field of surgery's ``Keep``."""

    block: Block
    kind: str  # head_groups or neurons
    width: int  # columns of a unit
    weight: Tensor  # [out, in] as it was
    bias: Tensor | None
    levels: list[Level]

    @property
    def path(self) -> str:
        return self.block.out_path if self.kind == "head_groups" else self.block.down_path

    @property
    def units(self) -> list[int]:
        """How many are left at each level."""
        return [len(level.keep) for level in self.levels]

    @property
    def errors(self) -> list[float]:
        """``p`` of each level."""
        return [level.error for level in self.levels]

    def around(self, level: int) -> tuple[int, int]:
        """A level above and one below: about one and a half times as many units, and half as many."""
        left = self.units
        more = min(range(level + 1), key=lambda place: abs(left[place] - 1.5 * left[level]))
        fewer = min(range(level, len(left)), key=lambda place: abs(left[place] - 0.5 * left[level]))
        if more == fewer:
            return max(0, level - 1), min(len(left) - 1, level + 1)
        return more, fewer


Removal = Callable[[Tensor, Tensor, int, Collection[int]], dict[int, Level]]


def remove_units(
    weight: Tensor, hessian: Tensor, width: int, counts: Collection[int], *, damp: float = 0.01
) -> dict[int, Level]:
    """Levels of ``weight [out, in]`` at the ``counts`` of units left, units being runs of ``width`` columns."""
    inverse = invert(hessian, damp=damp)
    work, hinv = weight.to(torch.float64, copy=True), inverse.matrix
    work[:, inverse.dead] = 0
    total, least = weight.shape[1] // width, max(1, min((c for c in counts if c), default=1))
    units = torch.arange(total, device=weight.device)  # what the columns of `work` belong to
    alive = torch.ones(total, dtype=torch.bool, device=weight.device)
    found: dict[int, Level] = {}
    for left in range(total, least - 1, -1):
        if left < total:
            scores = unit_scores(work, hinv, width).masked_fill(~alive, float("inf"))
            _remove(work, hinv, int(scores.argmin()), width)
            alive[int(scores.argmin())] = False
        if left in counts:
            keep = units[alive]
            found[left] = level_of(weight, hessian, width, keep, work[:, _columns(alive.nonzero()[:, 0], width)])
        if int(alive.sum()) < _COMPACT * len(alive):
            places = _columns(alive.nonzero()[:, 0], width)
            work, hinv = work[:, places].contiguous(), hinv[places][:, places].contiguous()
            units, alive = units[alive], alive[alive]
    if 0 in counts:
        found[0] = Level(units[:0], weight[:, :0], 1.0)
    return found


def unit_scores(weight: Tensor, hinv: Tensor, width: int) -> Tensor:
    """``rho`` of every unit, ``[units]``."""
    if width == 1:
        return weight.square().sum(0) / hinv.diagonal()
    count = weight.shape[1] // width
    blocks = torch.stack([hinv[i : i + width, i : i + width] for i in range(0, count * width, width)])
    parts = weight.view(len(weight), count, width).transpose(0, 1)  # [units, out, width]
    return ((parts @ torch.linalg.inv(blocks)) * parts).sum((1, 2))


def level_of(weight: Tensor, hessian: Tensor, width: int, keep: Tensor, left: Tensor | None = None) -> Level:
    """The level that keeps ``keep`` with the weights ``left [out, kept columns]``, by default those of ``weight``."""
    columns = _columns(keep, width)
    if len(columns) == weight.shape[1]:
        return Level(keep, weight.clone(), 0.0)
    left = weight[:, columns] if left is None else left.to(weight.dtype)
    difference = weight.to(torch.float64, copy=True)
    difference[:, columns] -= left
    whole = squared_error(weight, hessian)
    return Level(keep, left.clone(), squared_error(difference, hessian) / whole if whole else 0.0)


def ffn_widths(neurons: int, factor: float) -> list[int]:
    """``round(neurons * factor^i)`` down to 1 % and then 0, each once."""
    widths: list[int] = []
    width = float(neurons)
    while width > _THINNEST * neurons and round(width) >= 1:
        widths.append(round(width))
        width *= factor
    return [*dict.fromkeys(widths), 0]


def build_levels(
    model: nn.Module, batches: Sequence[Batch], blocks: Sequence[Block], widths: Collection[int], removal: Removal
) -> list[Levels]:
    """Levels of every attention output and FFN output that is left: all counts of head groups, FFNs at ``widths``."""
    layers: dict[str, tuple[Block, str, int, set[int]]] = {}
    for block in blocks:
        if block.has_attention:
            counts = set(range(block.head_groups + 1))
            layers[block.out_path] = (block, "head_groups", block.group_width, counts)
        if block.has_ffn:
            counts = {width for width in widths if width <= block.neurons} | {block.neurons, 0}
            layers[block.down_path] = (block, "neurons", 1, counts)
    if not layers:
        raise InputError("ziplm", must="find heads or neurons to remove", got="blocks without any")
    found = []
    for name, statistics in collect(model, batches, list(layers)):
        block, kind, width, counts = layers[name]
        layer: Any = model.get_submodule(name)
        weight = matrix(layer).detach().clone()
        levels = removal(weight, statistics.hessian, width, counts)
        ordered = [levels[count] for count in sorted(levels, reverse=True)]
        bias = None if layer.bias is None else layer.bias.detach().clone()
        found.append(Levels(block, kind, width, weight, bias, ordered))
    return found


@torch.no_grad()
def install(model: nn.Module, levels: Levels, level: Level) -> None:
    """Put a level's weights into the layer, zeros where columns went: it computes what the cut one will."""
    layer: Any = model.get_submodule(levels.path)
    columns = _columns(level.keep, levels.width)
    target = matrix(layer)
    target.zero_()
    target[:, columns] = level.weight
    if levels.bias is not None:
        layer.bias.copy_(levels.bias if len(level.keep) else torch.zeros_like(levels.bias))


def matrix(layer: Any) -> Tensor:
    """The weight as ``[out, in]``, sharing memory."""
    weight: Tensor = layer.weight
    return weight.T if is_transposed(layer) else weight


def _remove(weight: Tensor, hinv: Tensor, unit: int, width: int) -> None:
    """Take one unit out of ``weight`` and ``hinv``, in place; its rows of ``hinv`` become those of the identity."""
    span = slice(unit * width, (unit + 1) * width)
    rows = hinv[span].clone()  # Hinv_M: [width, in]
    factor = torch.linalg.inv(rows[:, span])
    weight.addmm_(weight[:, span] @ factor, rows, alpha=-1)
    hinv.addmm_(rows.T @ factor, rows, alpha=-1)
    weight[:, span] = 0
    hinv[span] = 0
    hinv[:, span] = 0
    hinv[span, span] = torch.eye(width, dtype=hinv.dtype, device=hinv.device)


def _columns(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
