"""The before/after report as one HTML file that asks nothing of the network: style, plots and text are all in it.

What the page says is worked out here (headline, table, step changes, matched words); how it looks is report.html.j2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gossamer.core.paths import atomic_file
from gossamer.core.report import (
    Arm,
    Comparison,
    Report,
    StepRecord,
    Value,
    metric_of,
    show,
    show_interval,
    show_p,
)
from gossamer.parts.report_plots import plots


@dataclass
class Figure:
    """One number of the headline: ``after`` in large, ``before`` beside it, and what the difference is."""

    label: str
    after: str
    before: str
    change: str
    detail: str = ""
    good: bool | None = None


@dataclass
class Cell:
    """One number of the table of arms."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass
class Row:
    """One quantity over all arms; ``inner`` for a part of the row above."""

    label: str
    direction: str
    cells: list[Cell] = field(default_factory=list)
    inner: bool = False


def write_html(report: Report, path: str | Path) -> None:
    """Write the report to ``path``, atomically."""
    page = render(report)
    with atomic_file(Path(path)) as file:
        file.write_text(page, encoding="utf-8")


def render(report: Report) -> str:
    """The page as text. Everything that comes from models and data is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("gossamer.parts").joinpath("report.html.j2").read_text(encoding="utf-8")
    drawn = [(plot, Markup(plot.svg)) for plot in plots(report)]
    return environment.from_string(source).render(
        report=report,
        figures=headline(report),
        plots=drawn,
        groups=table(report),
        ends=report.ends(),
        comparisons=[(comparison, *_compared(report, comparison)) for comparison in report.comparisons],
        steps=[(step, show(step.seconds, "s"), changes(step)) for step in report.steps],
        seconds=show(sum(step.seconds for step in report.steps), "s"),
        samples=[(sample, [_answer(report, sample, name) for name in sample.outputs]) for sample in report.samples],
        device=[(_label(name), _text(value, name)) for name, value in report.device.items()],
        show=show,
        label=_label,
        text=_text,
    )


def headline(report: Report) -> list[Figure]:
    """The few numbers that matter: bytes, task score with its interval, decoding speed, peak memory."""
    ends = report.ends()
    if ends is None:
        return []
    made = [
        _ratio(ends, "total_bytes", "Bytes on disk", ("smaller", "larger"), lower=True),
        _task_figure(report, ends),
        _ratio(ends, "tokens_per_s", "Tokens per second, batch 1", ("faster", "slower"), lower=False),
        _ratio(ends, "peak_rss_bytes", "Peak memory", ("less", "more"), lower=True),
    ]
    return [figure for figure in made if figure is not None]


def rival(report: Report) -> Comparison | None:
    """The task comparison of the result with the untouched arm that came nearest to it: the hardest one to win."""
    ends = report.ends()
    if ends is None:
        return None
    untouched = {arm.name for arm in report.arms if arm.untouched} or {ends[0].name}
    fitting = [
        comparison
        for comparison in report.comparisons
        if comparison.metric == report.task and comparison.arm == ends[1].name and comparison.baseline in untouched
    ]
    sign = -1 if metric_of(report.task).better == "lower" else 1
    return min(fitting, key=lambda comparison: sign * comparison.difference.value, default=None)


def table(report: Report) -> list[tuple[str, list[Row]]]:
    """Quantities by group, one cell an arm in the order of ``report.arms``."""
    rows = [(metric_of(name).group, _row(report, name)) for name in report.metrics()]
    return [(group, [row for _, row in items]) for group, items in groupby(rows, key=lambda item: item[0])]


def changes(step: StepRecord) -> list[tuple[str, str, str]]:
    """(what, before, after) of each thing the step changed; before is "" where only one value was recorded."""
    made = []
    for name, value in step.changed.items():
        pair = isinstance(value, list | tuple) and len(value) == 2
        before, after = value if pair else ("", value)
        made.append((_label(name), _text(before, name) if pair else "", _text(after, name)))
    return made


def matched(text: str, reference: str) -> list[tuple[str, bool]]:
    """``text`` in pieces, each with whether it is a word of the reference (case ignored)."""
    known = set(re.findall(r"\w+", reference.lower()))
    return [(piece, piece.lower() in known) for piece in re.findall(r"\w+|\W+", text)]


def _task_figure(report: Report, ends: tuple[Arm, Arm]) -> Figure | None:
    before, after = (arm.values.get(report.task) for arm in ends)
    if before is None or after is None:
        return None
    metric = metric_of(report.task)
    label = f"Task score, {metric.label}"
    nearest = rival(report)
    if nearest is None:
        change = f"{show(after.value - before.value, after.unit, signed=True)} {metric.label}"
        return Figure(label, show(after.value, after.unit), show(before.value, before.unit), change)
    arm, difference = report.arm(nearest.baseline), nearest.difference
    start = arm.values.get(report.task, before)
    parts = (f"against {arm.label}", _interval(difference), show_p(nearest.p_value))
    detail = ", ".join(part for part in parts if part)
    change = f"{_signed(difference)} {metric.label}"
    return Figure(
        label, show(after.value, after.unit), show(start.value, start.unit), change, detail, _good(difference)
    )


def _ratio(ends: tuple[Arm, Arm], metric: str, label: str, words: tuple[str, str], *, lower: bool) -> Figure | None:
    before, after = (arm.values.get(metric) for arm in ends)
    if before is None or after is None or not before.value > 0 or not after.value > 0:
        return None
    gain = before.value / after.value if lower else after.value / before.value
    times, word = (gain, words[0]) if gain >= 1 else (1 / gain, words[1])
    percent = 100 * abs(after.value / before.value - 1)
    same = percent < 0.5
    change = "the same" if same else f"{times:.1f} times {word}" if times >= 1.95 else f"{percent:.0f} % {word}"
    return Figure(
        label,
        show(after.value, after.unit),
        show(before.value, before.unit),
        change,
        f"from {ends[0].label}",
        None if same else gain > 1,
    )


def _row(report: Report, name: str) -> Row:
    metric, best = metric_of(name), report.best(name)
    direction = next((arm.values[name].better for arm in report.arms if name in arm.values), None)
    row = Row(metric.label, {"higher": "↑", "lower": "↓"}.get(direction or "", ""), inner=metric.inner)
    for arm in report.arms:
        value = arm.values.get(name)
        if value is None:
            row.cells.append(Cell("–"))
        else:
            row.cells.append(Cell(show(value.value, value.unit), show_interval(value), arm.name in best))
    return row


def _compared(report: Report, comparison: Comparison) -> tuple[str, str, str, str, str, bool | None]:
    difference = comparison.difference
    arm, baseline = report.arm(comparison.arm).label, report.arm(comparison.baseline).label
    interval, p_value = show_interval(difference), show_p(comparison.p_value)
    metric = metric_of(comparison.metric).label
    return metric, f"{arm} − {baseline}", _signed(difference), interval, p_value, _good(difference)


def _answer(report: Report, sample: Any, name: str) -> tuple[str, str, list[tuple[str, bool]]]:
    ends = report.ends()
    known = next((arm for arm in report.arms if arm.name == name), None)
    role = "after" if ends is not None and name == ends[1].name else "before"
    return (known.label if known else _label(name)), role, matched(sample.outputs[name], sample.reference)


def _good(difference: Value) -> bool | None:
    """Whether the interval lies wholly on the better side; None where it holds 0 or nothing is better."""
    if difference.better is None or difference.low is None or difference.high is None:
        return None
    if difference.low <= 0 <= difference.high:
        return None
    return (difference.low > 0) == (difference.better == "higher")


def _signed(difference: Value) -> str:
    return show(difference.value, difference.unit, signed=True)


def _interval(value: Value) -> str:
    text = show_interval(value)
    return f"95 % interval {text}" if text else ""


def _label(name: str) -> str:
    words = {"cpu": "CPU", "os": "OS", "lr": "Learning rate", "memory_bytes": "Memory"}
    return words.get(name) or metric_of(name).label


def _text(value: Any, name: str = "") -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int | float):
        unit = metric_of(name).unit or ("bytes" if name.endswith("bytes") else "")
        return show(float(value), unit)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item, str(key))}" for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(_text(item, name) for item in value) or "none"
    return str(value)
