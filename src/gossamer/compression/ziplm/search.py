"""Which level each matrix gets: dynamic programming inside of a random local search (SPDY, structured).

With coefficients ``c_l`` the levels minimise ``sum_l c_l p_{l,s}`` subject to ``sum_l cost_{l,s} <= budget``, costs
counted in :data:`BUCKETS` steps of the budget. The outer loop looks for the ``c`` whose solution has the lowest real
loss: all ones, random ones, then steps that draw some of the best ``c`` anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

BUCKETS = 10_000
Numbers = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Found:
    """The best choice: a level for each matrix, and its real loss; ``scored`` counts choices that were looked at."""

    levels: tuple[int, ...]
    loss: float
    scored: int


def solve(errors: Sequence[Numbers], costs: Sequence[Numbers], budget: float) -> tuple[int, ...] | None:
    """The levels of least total error within ``budget``; ``None`` where no choice fits."""
    if budget < 0:
        return None
    step = budget / BUCKETS
    best = np.zeros(BUCKETS + 1)
    taken = []
    for error, cost in zip(errors, costs, strict=True):
        ways = np.full((len(error), BUCKETS + 1), np.inf)
        for level, (more, price) in enumerate(zip(error, cost, strict=True)):
            steps = _steps(price, step)
            if steps <= BUCKETS:
                ways[level, steps:] = best[: BUCKETS + 1 - steps] + more
        taken.append((ways.argmin(0), cost))
        best = ways.min(0)
    if not np.isfinite(best[BUCKETS]):
        return None
    place, levels = BUCKETS, []
    for choice, cost in reversed(taken):
        level = int(choice[place])
        levels.append(level)
        place -= _steps(cost[level], step)
    return tuple(reversed(levels))


def even(units: Sequence[Sequence[int]], costs: Sequence[Numbers], budget: float) -> tuple[int, ...] | None:
    """The levels of the largest density that fits ``budget`` where all matrices have it; ``None`` where none does.

    ``units[l][s]`` are left of matrix l at level s, all at level 0.
    """
    for density in range(100, -1, -1):
        levels = tuple(int(np.abs(np.array(left) / left[0] - density / 100).argmin()) for left in units)
        if sum(cost[level] for cost, level in zip(costs, levels, strict=True)) <= budget:
            return levels
    return None


def search(
    score: Callable[[tuple[int, ...]], float],
    errors: Sequence[Numbers],
    costs: Sequence[Numbers],
    budget: float,
    *,
    starts: int,
    steps: int,
    mutate: float,
    seed: int,
) -> Found | None:
    """The best of ``starts`` coefficient vectors (the first all ones), then ``steps`` of local search from it.

    ``score(levels)`` is the real loss. ``None`` where nothing fits the budget.
    """
    generator = np.random.default_rng(seed)
    seen: dict[tuple[int, ...], float] = {}

    def look(weights: Numbers) -> tuple[float, tuple[int, ...]] | None:
        levels = solve([w * e for w, e in zip(weights, errors, strict=True)], costs, budget)
        if levels is None:
            return None
        if levels not in seen:
            seen[levels] = score(levels)
        return seen[levels], levels

    best_weights = np.ones(len(errors))
    best = look(best_weights)
    if best is None:
        return None
    for turn in range(starts - 1 + steps):
        weights = generator.random(len(errors))
        if turn >= starts - 1:
            weights = np.where(generator.random(len(errors)) < mutate, weights, best_weights)
        found = look(weights)
        if found is not None and found[0] < best[0]:
            best, best_weights = found, weights
    return Found(best[1], best[0], len(seen))


def _steps(price: float, step: float) -> int:
    """``price`` in whole steps; a hair less than the ceiling, so that one that meets the budget exactly still fits."""
    if step:
        return int(np.ceil(price / step - 1e-9))
    return 0 if price <= 0 else BUCKETS + 1
