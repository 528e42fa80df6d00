"""Counts and times for ``/metrics``, in the text format of Prometheus."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from gossamer.serving.sequences import Tally

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds
Labels = tuple[tuple[str, str], ...]

_HELP = {
    "prompt_tokens": "Prompt tokens of finished answers",
    "cached_prompt_tokens": "Those of them that were reused and not run",
    "prompt_tokens_run": "Prompt tokens that were run",
    "written_tokens": "Tokens of finished answers",
    "failed_answers": "Answers that ended by an error",
    "steps": "Steps of the engine",
    "stepped_answers": "Answers in all steps together",
    "step_seconds": "Seconds in steps",
    "stage_ms": "Milliseconds that answers waited for a stage",
    "requests": "Requests by path and status",
    "first_piece_seconds": "Seconds from a request to the first piece of its answer",
    "request_seconds": "Seconds from a request to its end",
}


class Metrics:
    """Counters, and histograms of seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, Labels], float] = collections.defaultdict(float)
        self._times: dict[str, list[float]] = {}  # a count a bound, one for all, and the sum

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += amount

    def time(self, name: str, seconds: float) -> None:
        with self._lock:
            row = self._times.setdefault(name, [0.0] * (len(BOUNDS) + 2))
            for place, bound in enumerate(BOUNDS):
                row[place] += seconds <= bound
            row[-2] += 1
            row[-1] += seconds

    def step(self, answers: int, seconds: float) -> None:
        self.count("steps")
        self.count("stepped_answers", answers)
        self.count("step_seconds", seconds)

    def answer(self, tally: Tally) -> None:
        self.count("prompt_tokens", tally.prompt)
        self.count("cached_prompt_tokens", tally.cached)
        self.count("written_tokens", tally.written)
        for stage, found in tally.stages.items():
            self.count("stage_ms", found["ms"], stage=stage)

    def rows(self, **labels: str) -> list[tuple[str, str, Labels, float]]:
        """(name, type, labels, value) of all, with ``labels`` added."""
        more = tuple(sorted(labels.items()))
        with self._lock:
            found = [(f"{name}_total", "counter", (*more, *own), n) for (name, own), n in self._counts.items()]
            for name, row in self._times.items():
                for bound, n in zip((*map(str, BOUNDS), "+Inf"), row, strict=False):
                    found.append((f"{name}_bucket", "histogram", (*more, ("le", bound)), n))
                found.append((f"{name}_count", "histogram", more, row[-2]))
                found.append((f"{name}_sum", "histogram", more, row[-1]))
        return found


def render(rows: Iterable[tuple[str, str, Labels, float]], gauges: Mapping[str, Mapping[str, Any]]) -> str:
    """The page: ``rows`` of :meth:`Metrics.rows`, and ``gauges`` by model and name."""
    by_family: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for name, kind, labels, value in rows:
        family = name.removesuffix("_total")
        for ending in ("_bucket", "_count", "_sum") if kind == "histogram" else ():
            family = family.removesuffix(ending)
        by_family[family, kind].append(f"gossamer_{name}{_labels(labels)} {value:.10g}")
    for model, values in gauges.items():
        for name, value in values.items():
            by_family[name, "gauge"].append(f"gossamer_{name}{_labels((('model', model),))} {value}")
    lines = []
    for (family, kind), found in sorted(by_family.items()):
        shown = f"gossamer_{family}" + ("_total" if kind == "counter" else "")
        lines += [f"# HELP {shown} {_HELP.get(family, family.replace('_', ' '))}.", f"# TYPE {shown} {kind}", *found]
    return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = ((key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for key, value in labels)
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped) + "}"
