"""Which linear layers of a model an adapter goes into, and how they group.

A *projection* is a linear layer y = W x + b with widths (d_in, d_out): ``nn.Linear``, transformers' ``Conv1D``, or any
module with ``in_features`` and ``out_features`` (quantised layers). Its *type* is its path with the layer numbers
starred, ``model.layers.*.self_attn.q_proj``: the layers of one type and one pair of widths form a group.

Targets are "all-linear" (every projection inside a repeated block: the head, a pooler or a connector between towers
stand outside), names such as "q_proj" or "mlp.down_proj" that end a path, or a string that is a regular expression
over whole paths, as in PEFT.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

from gossamer.core.errors import OptionError, did_you_mean

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear layer at ``path``; ``module`` is the layer itself where an adapter layer wraps it."""

    path: str
    module: nn.Module
    d_in: int
    d_out: int

    @property
    def group(self) -> str:
        """Type and widths, e.g. ``model.layers.*.self_attn.q_proj 640x1024``."""
        starred = ".".join("*" if part.isdigit() else part for part in self.path.split("."))
        return f"{starred} {self.d_in}x{self.d_out}"


def projections(model: nn.Module, targets: str | Collection[str] = ALL_LINEAR) -> list[Projection]:
    """The targeted projections of ``model`` in module order. Raises OptionError for a target that matches nothing."""
    every = list(_linear_layers(model))
    if targets == ALL_LINEAR:
        found = [p for p in every if any(part.isdigit() for part in p.path.split("."))]
    elif isinstance(targets, str):
        found = [p for p in every if re.fullmatch(targets, p.path)]
    else:
        for target in targets:
            if not any(_ends(p.path, target) for p in every):
                names = {p.path.rsplit(".", 1)[-1] for p in every}
                raise OptionError(
                    "target_modules", must="name linear layers", got=repr(target), do=did_you_mean(target, names)
                )
        found = [p for p in every if any(_ends(p.path, target) for target in targets)]
    if not found:
        names = {p.path.rsplit(".", 1)[-1] for p in every}
        raise OptionError("target_modules", must="match linear layers", got=repr(targets), do=did_you_mean("", names))
    return found


def target_names(model: nn.Module, targets: str | Collection[str] = ALL_LINEAR) -> str | set[str]:
    """``targets`` as PEFT configs take them: "all-linear" becomes the path ends below the repeated blocks."""
    found = projections(model, targets)
    if targets != ALL_LINEAR:
        return targets if isinstance(targets, str) else set(targets)
    return {_below_block(projection.path) for projection in found}


def grouped(found: Iterable[Projection]) -> dict[str, list[Projection]]:
    """Projections by :attr:`Projection.group`, in module order."""
    groups: dict[str, list[Projection]] = {}
    for projection in found:
        groups.setdefault(projection.group, []).append(projection)
    return groups


def check_rank(where: str, rank: int, found: Iterable[Projection]) -> None:
    """Refuse a rank above the smaller width of any of the projections."""
    for projection in found:
        if rank > min(projection.d_in, projection.d_out):
            raise OptionError(
                where,
                must=f"be at most {min(projection.d_in, projection.d_out)}, the smaller width of {projection.path}",
                got=rank,
                do="lower it, or leave that layer out with target_modules",
            )


def check_divisor(where: str, parts: int, found: Iterable[Projection]) -> None:
    """Refuse a number of parts that does not divide all widths, and say which numbers do."""
    widths = {width for projection in found for width in (projection.d_in, projection.d_out)}
    if any(width % parts for width in widths):
        common = functools.reduce(math.gcd, widths)
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise OptionError(where, must=f"divide the widths {sorted(widths)}", got=parts, do=f"use one of {fitting}")


def task_type(model: nn.Module) -> Any:
    """PEFT's task type where it wraps without adding heads: "CAUSAL_LM" or None."""
    return "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None


def widths(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer; None for any other module."""
    if isinstance(module, nn.Embedding | nn.Bilinear):
        return None
    if is_transposed(module):
        d_in, d_out = module.weight.shape  # type: ignore[misc]
        return int(d_in), int(d_out)
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as [d_in, d_out] (transformers' Conv1D, used by GPT-2)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _linear_layers(model: nn.Module) -> Iterator[Projection]:
    head = _output_head(model)
    inside = "\0"  # path of the last linear layer: an adapter layer's own parts are no projections
    for path, module in model.named_modules():
        if not path or path.startswith(inside):
            continue
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        shape = widths(base)
        if shape is not None:
            inside = path + "."
            if base is not head:
                yield Projection(path, base, *shape)


def _output_head(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _below_block(path: str) -> str:
    parts = path.split(".")
    first = next(place for place, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[first + 1 :]) or path
