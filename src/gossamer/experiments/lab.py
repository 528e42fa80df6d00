"""What an experiment is written against: results by arm and seed, cached stages, and the conclusion.

An experiment is a module ``experiments/<kind>/<name>.py`` with

- a docstring: the plan, the baselines, what must be seen, where it is smaller than the paper;
- ``SEEDS``, a tuple of ints, and ``ARMS``, a literal dict from arm name to its options, baselines included;
- ``run(arm, seed, lab) -> dict[str, float]``: one arm at one seed, figures by metric;
- ``conclude(results) -> Conclusion``.

The runner (:mod:`gossamer.experiments.runner`) saves every (arm, seed) as it goes and resumes. Figures that are times
are taken by one arm that alternates all contenders in one process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gossamer.core.paths import cache_dir, write_json

# two-sided 95 % quantiles of Student's t by degrees of freedom
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclasses.dataclass(frozen=True)
class MustSee:
    """One line of the spec that the experiment has to show, with the figures that decide it."""

    text: str
    figures: str
    shown: bool


@dataclasses.dataclass(frozen=True)
class Conclusion:
    """The claim's verdict: ``effect`` of the system against ``baseline`` with its interval, in ``unit``."""

    shown: bool
    baseline: str
    result: str
    effect: float
    low: float
    high: float
    unit: str
    must_see: tuple[MustSee, ...] = ()
    notes: tuple[str, ...] = ()


class Results:
    """``results[arm][seed]`` is the dict that ``run`` returned."""

    def __init__(self, table: Mapping[str, Mapping[int, dict[str, Any]]]) -> None:
        self.table = table

    def __getitem__(self, arm: str) -> Mapping[int, dict[str, Any]]:
        return self.table[arm]

    def __contains__(self, arm: str) -> bool:
        return arm in self.table

    def values(self, arm: str, metric: str) -> list[float]:
        """The metric of an arm, one value a seed, seeds in order."""
        return [self.table[arm][seed][metric] for seed in sorted(self.table[arm])]

    def mean(self, arm: str, metric: str) -> float:
        return statistics.fmean(self.values(arm, metric))

    def paired(self, arm: str, baseline: str, metric: str) -> tuple[float, float, float]:
        """Mean difference ``arm - baseline`` over common seeds with its 95 % t-interval (infinite for one seed)."""
        seeds = sorted(set(self.table[arm]) & set(self.table[baseline]))
        differences = [self.table[arm][s][metric] - self.table[baseline][s][metric] for s in seeds]
        return t_interval(differences)


def t_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of ``values`` and its two-sided 95 % t-interval; infinite bounds for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = _T95.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


class Lab:
    """Given to ``run``: where to cache, whether this is a quick pass, and how to log."""

    def __init__(self, name: str, *, quick: bool = False, log: Callable[[str], None] = print) -> None:
        self.name, self.quick, self.log = name, quick, log

    def folder(self, *parts: str) -> Path:
        """A cache folder shared by the arms of this experiment (trained fixtures, features)."""
        return cache_dir("experiments", self.name, "quick" if self.quick else "full", *parts)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """The JSON value that ``make()`` gave the first time, such as a learning rate tuned on one seed."""
        path = self.folder() / f"{key}.json"
        if not path.exists():
            write_json(path, make())
        return json.loads(path.read_text(encoding="utf-8"))
