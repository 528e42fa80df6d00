"""FineQuant: weight-only quantisation that looks for each matrix's group size in the weights alone.

Kim, Henry, Fahim, Hassan Awadalla 2023 (arXiv 2308.09723). Weights are rounded to nearest on a symmetric grid, one
scale per group of ``B`` weights along the input axis of ``W [out, in]`` (:mod:`gossamer.parts.quantiser`), so a weight
costs ``b + 16 / B`` bits. A few outliers stretch a coarse group's range until all its other weights round to zero:
such a matrix needs small groups, others do not. Per matrix, from ``B = in`` downwards, with ``r_B[o, g] = max |w|``:

    shrink_o(B) = mean_g ( r_B[o, g] / mean of r_B' over the parts of g )      B' the next size, as a rule B / 2
    go on to B' while  statistic_o(shrink_o(B)) ^ (1 / log2(B / B')) > alpha,  down to min_group

The statistic over channels is a quantile (0.99), the maximum or the mean. Sizes follow halvings of the row; where a
half is no divisor or suits no kernel, the next one is the largest divisor above half of it, multiples of 32 first
(640: 320, 160, 64, 32). Where ``B'`` does not divide ``B``, the means run over blocks of their common multiple.

``target_bpw`` lowers alpha until the matrices cost that many bits on average: the alphas at which some matrix moves on
are sorted, and the last one that keeps the size is found by bisection. Where even ``min_group`` everywhere costs less
than the target, one more bit goes to one matrix at a time, to the one whose squared relative error falls most per bit
spent, up to 8 bits; the error of a uniform grid falls as ``1 / (2^(b-1) - 1)``.

Differences from the paper: the abstract and summaries leave the statistic and the threshold open, both are settled
here; raising bits for a target is ours; experts of one stack share ``B`` (each has its own scales); the GPU kernels of
the paper are not here, torch's CPU kernels are (:mod:`gossamer.parts.quant_kernels`).
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.errors import InputError, OptionError
from gossamer.core.options import Config, option
from gossamer.kinds.compression import COLLAPSE, Choice, Compressed, Compression, pack_model
from gossamer.parts.quant_format import Matrix, Packing, find_matrices
from gossamer.parts.quantiser import (
    MAX_BITS,
    PER_CHANNEL,
    bits_per_weight,
    dequantise,
    group_ranges,
    largest_code,
    quantise,
    relative_error,
    zero_share,
)

CARD = Card(
    title="FineQuant",
    paper="2308.09723",
    year=2023,
    claim="at equal bits per weight, perplexity at most that of one group size for all matrices; per-tensor int4 fails",
    traits=("budgeted",),
    requires=("float_weights",),
    forbids=("adapter_attached",),
    provides=("quantised",),
    removes=("float_weights",),
    registers=("quantizer:gossamer",),
    families=("llama", "gemma3", "gpt2", "mixtral"),
    limits="throughput at 175B and the GPU kernels are not shown; embeddings, norms, routers and the head stay float",
)
_QUANTILE = 0.99
_STATISTICS: dict[str, Callable[[Tensor], float]] = {
    "quantile": lambda values: float(values.sort().values[min(len(values) - 1, int(_QUANTILE * len(values)))]),
    "max": lambda values: float(values.max()),
    "mean": lambda values: float(values.mean()),
}


class FineQuantConfig(Config):
    bits: int = option(4, "bits of a weight; target_bpw may raise some", ge=2, le=8)
    alpha: float = option(1.25, "how far halving the groups must shrink their ranges to go on", ge=1.0)
    statistic: str = option("quantile", "what is taken over the channels", choices=("quantile", "max", "mean"))
    min_group: int = option(32, "smallest group", choices=(16, 32, 64))
    max_group: int = option(0, "largest group; 0 is a whole output channel", ge=0)
    target_bpw: float | None = option(None, "average bits per weight, scales included; replaces alpha", gt=2, le=9)
    skip: tuple[str, ...] = option(
        ("lm_head", "embed", "router", "shared_expert_gate"), "parts of names of modules that stay float"
    )
    dtype: str = option(
        "auto", "dtype of the scales; auto: the model's, if it has 16 bits", choices=("auto", "bfloat16", "float16")
    )


class FineQuant(Compression):
    """Packs every linear layer, with a group size (and under a target, a width) of its own."""

    config_class = FineQuantConfig

    def compress(self, model: Any, data: Any = None) -> Compressed:
        """Needs no data. Works in place; errors: nothing to pack, or a target that ``bits`` cannot reach."""
        config = self.config
        matrices, left = find_matrices(model, config.skip)
        if not matrices:
            raise InputError(f"{self.name}.compress", must="find linear layers", got="none", do=f"left float: {left}")
        plans = [_plan(matrix, config) for matrix in matrices]
        alpha = config.alpha
        if config.target_bpw is not None:
            alpha = _alpha_for(plans, config.target_bpw, f"{self.name}.target_bpw")
        for plan in plans:
            plan.level = plan.level_at(alpha)
        if config.target_bpw is not None and all(plan.level == len(plan.sizes) - 1 for plan in plans):
            _widen(plans, config.target_bpw)
        values = {
            "alpha": alpha,
            "groups": dict(sorted(collections.Counter(plan.size for plan in plans).items())),
            "widths": dict(sorted(collections.Counter(plan.bits for plan in plans).items())),
            "collapse_per_channel": [plan.matrix.name for plan in plans if plan.fragile],
        }
        choices = [Choice(plan.matrix, Packing(plan.bits, plan.size), plan.note()) for plan in plans]
        del plans, matrices
        return pack_model(model, choices, left, config.dtype, values)


@dataclasses.dataclass
class _Plan:
    """One matrix on its way down the group sizes."""

    matrix: Matrix
    bits: int
    sizes: list[int]  # from coarse to fine
    shrinks: list[float]  # statistic per halving, of each step to the next size
    fragile: bool  # rounded per channel it would collapse
    level: int = 0

    @property
    def size(self) -> int:
        return self.sizes[self.level]

    @property
    def weights(self) -> int:
        return self.matrix.weight.numel()

    def cost(self, level: int | None = None) -> float:
        """Bits of the whole matrix."""
        size = self.sizes[self.level if level is None else level]
        return self.weights * bits_per_weight(self.bits, size, self.matrix.columns)

    def level_at(self, alpha: float) -> int:
        """The first size whose step to the next shrinks the ranges by no more than ``alpha``."""
        return next((i for i, shrink in enumerate(self.shrinks) if shrink <= alpha), len(self.shrinks))

    def note(self) -> str:
        parts = ["collapses per channel"] if self.fragile else []
        if self.size != self.matrix.columns and math.log2(self.matrix.columns / self.size) % 1:
            parts.append(f"{self.matrix.columns} has no such half: groups of {self.size}")
        return "; ".join(parts)


def group_sizes(columns: int, min_group: int, max_group: int = 0) -> list[int]:
    """Group sizes for a row of ``columns``, coarse to fine: all divide it, each at most half of the one before and
    as near to that as a divisor gets, multiples of 32 first; the last is ``min_group`` where that divides the row."""
    top = columns if not max_group else max((s for s in _divisors(columns) if s <= max_group), default=1)
    sizes = [top]
    while sizes[-1] > min_group:
        half = sizes[-1] / 2
        near = [s for s in _divisors(columns) if half / 2 < s <= half and s >= min_group]
        if not near:
            break
        sizes.append(max(near, key=lambda size: (size % 32 == 0, size % 16 == 0, size)))
    if columns % min_group == 0 and sizes[-1] > min_group:
        sizes.append(min_group)
    return sizes


def shrink(weight: Tensor, coarse: int, fine: int, statistic: str) -> float:
    """How far ranges shrink from groups of ``coarse`` to groups of ``fine`` weights, per halving; ``[out, in]``."""
    block = math.lcm(coarse, fine)
    wide, narrow = (
        group_ranges(weight, size).float().view(len(weight), -1, block // size).mean(-1) for size in (coarse, fine)
    )
    ratios = torch.where(narrow > 0, wide / narrow, 1.0).mean(1)
    return _STATISTICS[statistic](ratios) ** (1 / math.log2(coarse / fine))


def _plan(matrix: Matrix, config: Any) -> _Plan:
    weight = matrix.weight.detach().reshape(-1, matrix.columns)
    sizes = group_sizes(matrix.columns, config.min_group, config.max_group)
    shrinks = [shrink(weight, a, b, config.statistic) for a, b in itertools.pairwise(sizes)]
    fragile = zero_share(quantise(weight, config.bits, PER_CHANNEL).codes) > COLLAPSE
    return _Plan(matrix, config.bits, sizes, shrinks, fragile)


def _alpha_for(plans: list[_Plan], target: float, where: str) -> float:
    """The smallest alpha at which the average size is at most ``target``."""
    total = sum(plan.weights for plan in plans)

    def size_at(alpha: float) -> float:
        return sum(plan.cost(plan.level_at(alpha)) for plan in plans) / total

    alphas = sorted({0.0, *(value for plan in plans for value in plan.shrinks)})
    # size_at falls as alpha rises, so its negative is sorted
    index = bisect.bisect_left(alphas, -target, key=lambda alpha: -size_at(alpha))
    if index == len(alphas):
        least, most = size_at(alphas[-1]), MAX_BITS
        raise OptionError(
            where, must=f"be at least {least:.3f} with these bits", got=target, do=f"lower bits (2 to {most})"
        )
    return alphas[index]


def _widen(plans: list[_Plan], target: float) -> None:
    """Give single bits to matrices, the largest fall of squared relative error per bit first, up to ``target``."""
    total = sum(plan.weights for plan in plans)
    left = target * total - sum(plan.cost() for plan in plans)
    errors = [_error(plan) for plan in plans]
    queue = [(-_gain(plan, error), index) for index, (plan, error) in enumerate(zip(plans, errors, strict=True))]
    heapq.heapify(queue)
    while queue:
        _, index = heapq.heappop(queue)
        plan = plans[index]
        if plan.bits == MAX_BITS or plan.weights > left:
            continue
        left -= plan.weights
        errors[index] *= largest_code(plan.bits) / largest_code(plan.bits + 1)
        plan.bits += 1
        heapq.heappush(queue, (-_gain(plan, errors[index]), index))


def _gain(plan: _Plan, error: float) -> float:
    if plan.bits == MAX_BITS:
        return 0.0
    ratio = largest_code(plan.bits) / largest_code(plan.bits + 1)
    return error**2 * (1 - ratio**2) / plan.weights


def _error(plan: _Plan) -> float:
    weight = plan.matrix.weight.detach().reshape(-1, plan.matrix.columns)
    return relative_error(weight, dequantise(quantise(weight, plan.bits, plan.size), torch.float32))


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
