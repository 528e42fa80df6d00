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

Under ``target_bpw`` a threshold for all steps would be wrong: halving 64 costs 16 times the bits of halving 1024 and
is passed as easily. There the step is weighed against its bits. Rounding on a uniform grid leaves the relative error

    E(b, B) = mean_(o,g) r_B[o, g]^2 / (12 (2^(b-1) - 1)^2 mean w^2)

and from ``B = in`` the step with the largest fall of ``E`` per added bit per weight is taken, over all matrices, until
the average cost is the target. Where even ``min_group`` everywhere costs less than that, one more bit for a matrix is
a step too, up to 8. Like alpha's rule this reads ranges of weights only. ``target_kl`` looks for the least such average
with which the mean KL from the float model, on the first :data:`JUDGED` tokens of the data, is at most the target.

Differences from the paper: the abstract and summaries leave the statistic and the threshold open, both are settled
here. The rule under a target is ours, not the paper's: on validation text with Gemma-3-270M the alpha rule, at its
default or bisected to 4.125 bits, lost to one group size of 128 for all. Experts of one stack share ``B`` (each has
its own scales). The paper's GPU kernels are not here, torch's CPU kernels are (:mod:`gossamer.parts.quant_kernels`).
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.errors import InputError, OptionError
from gossamer.core.options import Config, option
from gossamer.kinds.compression import COLLAPSE, Choice, Compressed, Compression, pack_model
from gossamer.parts.calibration import Batch, at_rest, check_batches, moved, without_cache
from gossamer.parts.quant_format import Matrix, Packing, find_matrices
from gossamer.parts.quantiser import (
    MAX_BITS,
    PER_CHANNEL,
    bits_per_weight,
    dequantise,
    group_ranges,
    largest_code,
    quantise,
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
JUDGED = 512
_HALVINGS = 7
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
    target_kl: float | None = option(
        None, "mean KL from the float model in nats a token, on the data; replaces alpha", gt=0
    )
    skip: tuple[str, ...] = option(
        ("lm_head", "embed", "wte", "router", "shared_expert_gate"), "parts of names of modules that stay float"
    )
    dtype: str = option(
        "auto", "dtype of the scales; auto: the model's, if it has 16 bits", choices=("auto", "bfloat16", "float16")
    )


class FineQuant(Compression):
    """Packs every linear layer, with a group size (and under a target, a width) of its own."""

    config_class = FineQuantConfig

    @property
    def calibrates(self) -> bool:
        return self.config.target_kl is not None

    def check(self, model: Any, data: Any = None) -> None:
        super().check(model, data)
        if self.config.target_bpw is not None and self.config.target_kl is not None:
            raise OptionError(f"{self.name}.target_kl", must="stand without target_bpw", got="both", do="leave one out")

    def compress(self, model: Any, data: Any = None) -> Compressed:
        """Needs data, a list of token batches, for ``target_kl`` alone. Works in place; errors: nothing to pack, or a
        target that ``bits`` cannot reach."""
        config = self.config
        matrices, left = find_matrices(model, config.skip)
        if not matrices:
            raise InputError(f"{self.name}.compress", must="find linear layers", got="none", do=f"left float: {left}")
        plans = [_plan(matrix, config) for matrix in matrices]
        values: dict[str, Any] = {}
        if config.target_kl is not None:
            values["kl"] = _spend_for(model, check_batches(data, self.name), plans, config.target_kl, self.name)
        elif config.target_bpw is not None:
            _spend(plans, config.target_bpw, f"{self.name}.target_bpw")
        else:
            for plan in plans:
                plan.level = plan.level_at(config.alpha)
        values |= {
            "groups": dict(sorted(collections.Counter(plan.size for plan in plans).items())),
            "widths": dict(sorted(collections.Counter(plan.bits for plan in plans).items())),
            "collapse_per_channel": [plan.matrix.name for plan in plans if plan.fragile],
        }
        choices = [Choice(plan.matrix, Packing(plan.bits, plan.size), plan.note()) for plan in plans]
        del plans, matrices
        return pack_model(model, choices, left, config.dtype, values)


class _Step(NamedTuple):
    gain: float  # fall of the error per bit
    cost: float  # bits of a weight
    bits: int
    level: int


@dataclasses.dataclass
class _Plan:
    """One matrix on its way down the group sizes."""

    matrix: Matrix
    bits: int
    sizes: list[int]  # from coarse to fine
    shrinks: list[float]  # statistic per halving, of each step to the next size
    ranges: list[float]  # mean r_B^2 / mean w^2 at each size
    fragile: bool  # rounded per channel it would collapse
    level: int = 0

    @property
    def size(self) -> int:
        return self.sizes[self.level]

    @property
    def weights(self) -> int:
        return self.matrix.weight.numel()

    def cost(self, bits: int, level: int) -> float:
        """Bits of a weight, scales included."""
        return bits_per_weight(bits, self.sizes[level], self.matrix.columns)

    def error(self, bits: int, level: int) -> float:
        """``E(b, B)``."""
        return self.ranges[level] / (12 * largest_code(bits) ** 2)

    def step(self, widen: bool) -> _Step | None:
        """The step from here whose fall of the error per bit is largest."""
        ways = [(self.bits, self.level + 1)] if self.level + 1 < len(self.sizes) else []
        ways += [(self.bits + 1, self.level)] if widen and self.bits < MAX_BITS else []
        here, error = self.cost(self.bits, self.level), self.error(self.bits, self.level)
        steps = [
            _Step((error - self.error(*way)) / (self.cost(*way) - here), self.cost(*way) - here, *way) for way in ways
        ]
        return max(steps, default=None)

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
    power = float(weight.float().square().mean()) or 1.0
    ranges = [float(group_ranges(weight, size).float().square().mean()) / power for size in sizes]
    return _Plan(matrix, config.bits, sizes, shrinks, ranges, fragile)


def _spend(plans: list[_Plan], target: float, where: str) -> None:
    """Take the steps that lower the errors most per bit while the average size stays at or below ``target``."""
    total, least = sum(plan.weights for plan in plans), _least(plans)
    finest = sum(plan.weights * plan.cost(plan.bits, len(plan.sizes) - 1) for plan in plans)
    left, widen = (target - least) * total, finest <= target * total
    if left < 0:
        do = "raise it, or lower bits"
        raise OptionError(where, must=f"be at least {least:.3f} with these bits", got=target, do=do)
    queue: list[tuple[float, int, _Step]] = []

    def offer(index: int) -> None:
        step = plans[index].step(widen)
        if step is not None:
            heapq.heappush(queue, (-step.gain, index, step))

    for index in range(len(plans)):
        offer(index)
    while queue:
        _, index, step = heapq.heappop(queue)
        plan = plans[index]
        if step.cost * plan.weights <= left:
            left -= step.cost * plan.weights
            plan.bits, plan.level = step.bits, step.level
            offer(index)


def _least(plans: list[_Plan]) -> float:
    """Average bits with the coarsest groups."""
    return sum(plan.weights * plan.cost(plan.bits, 0) for plan in plans) / sum(plan.weights for plan in plans)


def _spend_for(model: Any, batches: list[Batch], plans: list[_Plan], target: float, where: str) -> float:
    """:func:`_spend` the fewest bits with which the KL is at most ``target``; gives the KL."""
    kept = [plan.matrix.weight.detach().clone() for plan in plans]
    float_model = _log_probs(model, batches)
    found: list[_Plan] | None = None
    low, high, best = _least(plans), MAX_BITS + 1.0, math.nan
    for number in range(_HALVINGS + 1):
        bits = (low + high) / 2 if number else high
        trial = [copy.copy(plan) for plan in plans]
        _spend(trial, bits, where)
        kl = _kl_with(model, batches, trial, kept, float_model)
        if kl <= target:
            high, found, best = bits, trial, kl
        elif found is None:
            raise OptionError(f"{where}.target_kl", must=f"be at least {kl:.3g}, which 8 bits reach", got=target)
        else:
            low = bits
    for plan, chosen in zip(plans, found or (), strict=True):
        plan.bits, plan.level = chosen.bits, chosen.level
    return best


@torch.no_grad()
def _kl_with(
    model: Any, batches: list[Batch], trial: list[_Plan], kept: list[Tensor], float_model: list[Tensor]
) -> float:
    """Mean KL(float || rounded as ``trial`` says) per token; the weights are ``kept`` again afterwards."""
    for plan, weight in zip(trial, kept, strict=True):
        flat = plan.matrix.weight.reshape(-1, *weight.shape[-2:])
        for place, matrix in enumerate(weight.reshape(flat.shape)):
            flat[place] = dequantise(quantise(matrix, plan.bits, plan.size, dtype=torch.bfloat16), matrix.dtype)
    try:
        rounded = _log_probs(model, batches)
    finally:
        for plan, weight in zip(trial, kept, strict=True):
            plan.matrix.weight.copy_(weight)
    each = [(a.exp() * (a - b)).sum(-1) for a, b in zip(float_model, rounded, strict=True)]
    return float(torch.cat(each).mean())


@torch.no_grad()
def _log_probs(model: Any, batches: list[Batch]) -> list[Tensor]:
    """Of the first JUDGED tokens, padding left out: float32 [tokens, V] a batch."""
    found, left = [], JUDGED
    with at_rest(model):
        for batch in batches:
            logits = model(**moved(batch, model), **without_cache(model)).logits
            mask = batch.get("attention_mask")
            rows = logits.flatten(0, 1) if mask is None else logits[mask.bool().to(logits.device)]
            found.append(rows[:left].float().log_softmax(-1))
            left -= len(found[-1])
            if not left:
                break
    return found


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
