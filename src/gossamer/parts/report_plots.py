"""The plots of the report as inline SVG, drawn by matplotlib in stand-in colours that become CSS variables.

Inline, the text stays text, and light and dark follow the page. Every row is labelled on its own line above its mark,
so that no label is cut however long it is.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.core.report import Arm, Report, Value, metric_of, show

INK, MUTED, HAIR, PAPER = "#010101", "#020202", "#030303", "#040404"
AFTER, BEFORE, BETWEEN = "#050505", "#060606", "#070707"
SERIES = (AFTER, "#080808", "#090909", BEFORE)
CSS = {
    INK: "--ink",
    MUTED: "--muted",
    HAIR: "--hair",
    PAPER: "--paper",
    AFTER: "--accent",
    BEFORE: "--before",
    BETWEEN: "--between",
    "#080808": "--ochre",
    "#090909": "--slate",
}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.4,
    "text.parse_math": False,
    "text.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.edgecolor": HAIR,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "grid.color": HAIR,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}
WIDTH = 4.9  # inches; the page scales the drawing to its column
PARTS = (("weights_bytes", "weights", 1.0), ("tokenizer_bytes", "tokenizer", 0.5), ("other_bytes", "other files", 0.22))


@dataclass(frozen=True)
class Plot:
    """One figure: its title, a caption, a sentence for those who cannot see it, and the SVG."""

    title: str
    caption: str
    spoken: str
    svg: str


def plots(report: Report) -> list[Plot]:
    """Those of the four plots (task score, bytes on disk, curves, decoding speed) that the report has numbers for."""
    made = [_task(report), _bytes(report), _speed(report), *_curves(report)]
    return [plot for plot in made if plot is not None]


def _task(report: Report) -> Plot | None:
    arms = _with(report, report.task)
    if not arms:
        return None
    metric = metric_of(report.task)
    count = next((arm.values[report.task].n for arm in arms if arm.values[report.task].n), None)

    def draw(axes: Any) -> None:
        for row, arm in enumerate(arms):
            value, colour = arm.values[report.task], _colour(report, arm)
            if value.low is not None and value.high is not None:
                axes.plot([value.low, value.high], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
            axes.plot([value.value], [row], marker="o", markersize=6.5, color=colour, markeredgecolor=PAPER)
        axes.grid(axis="x")
        axes.tick_params(labelbottom=True)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))

    caption = "Mean over the test items; the bar is the 95 % interval." + (f" n = {count}." if count else "")
    title = f"Task score, {metric.label}"
    return Plot(title, caption, _spoken(title, arms, report.task), _rows(arms, report.task, draw, "task", ticks=True))


def _bytes(report: Report) -> Plot | None:
    arms = _with(report, "total_bytes")
    if not arms:
        return None

    def draw(axes: Any) -> None:
        for row, arm in enumerate(arms):
            left, colour = 0.0, _colour(report, arm)
            for name, _, strength in PARTS:
                size = arm.values[name].value if name in arm.values else 0.0
                axes.barh(row, size, left=left, height=0.34, color=colour, alpha=strength, linewidth=0)
                left += size
            rest = arm.values["total_bytes"].value - left
            axes.barh(row, max(rest, 0.0), left=left, height=0.34, color=colour, linewidth=0)

    title = "Bytes on disk"
    caption = "Every file counted. From strong to faint: " + ", ".join(label for _, label, _ in PARTS) + "."
    return Plot(title, caption, _spoken(title, arms, "total_bytes"), _rows(arms, "total_bytes", draw, "bytes"))


def _speed(report: Report) -> Plot | None:
    arms = _with(report, "tokens_per_s")
    if not arms:
        return None

    def draw(axes: Any) -> None:
        for row, arm in enumerate(arms):
            value = arm.values["tokens_per_s"]
            axes.barh(row, value.value, height=0.34, color=_colour(report, arm), linewidth=0)
            if value.low is not None and value.high is not None:
                for colour, width in ((PAPER, 3.4), (INK, 1.2)):
                    axes.plot([value.low, value.high], [row, row], color=colour, linewidth=width)

    title = "Decoding speed"
    caption = "Greedy, batch 1: median of alternating rounds; the line runs from the slowest to the fastest."
    return Plot(title, caption, _spoken(title, arms, "tokens_per_s"), _rows(arms, "tokens_per_s", draw, "speed"))


def _curves(report: Report) -> list[Plot]:
    made = []
    for number, (name, points) in enumerate(report.curves.items()):
        finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        if len(finite) > 1:
            made.append(_curve(name, finite, number))
    return made


def _curve(name: str, points: list[tuple[float, float]], number: int) -> Plot:
    xs, ys = zip(*points, strict=True)

    def draw(axes: Any) -> None:
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        if len(points) > 30:
            axes.plot(xs, ys, color=BEFORE, linewidth=0.7, alpha=0.7)
        axes.plot(xs, _smooth(ys) if len(points) > 30 else ys, color=SERIES[number % len(SERIES)], linewidth=1.7)
        axes.annotate(f"{ys[-1]:.3g}", (xs[-1], ys[-1]), (5, 0), textcoords="offset points", va="center", color=INK)
        axes.margins(x=0.02)

    svg = _svg(draw, 2.35, f"curve-{number}", left=0.09, right=0.91, bottom=0.11, top=0.97)
    caption = "Each step, and its running mean." if len(points) > 30 else "Each point as recorded."
    spoken = f"{name}: from {ys[0]:.3g} at {xs[0]:g} to {ys[-1]:.3g} at {xs[-1]:g}."
    return Plot(name[:1].upper() + name[1:], caption, spoken, svg)


def _rows(arms: list[Arm], metric: str, draw: Callable[[Any], None], name: str, *, ticks: bool = False) -> str:
    """One row an arm: its label and number on a line of text, its mark below."""

    def body(axes: Any) -> None:
        draw(axes)
        axes.set_ylim(len(arms) - 0.6, -0.72)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_visible(False)
        if not ticks:
            axes.set_xticks([])
        # the paper-coloured box keeps grid lines out of the words
        box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.2}
        for row, arm in enumerate(arms):
            line = {"y": row - 0.34, "transform": axes.get_yaxis_transform(), "va": "bottom", "color": INK, "bbox": box}
            axes.text(x=0, s=arm.label, **line)
            axes.text(x=1, s=_number(arm.values[metric]), ha="right", weight="bold", **line)

    height = 0.5 * len(arms) + (0.3 if ticks else 0.06)
    return _svg(body, height, name, left=0.005, right=0.995, bottom=0.2 / height if ticks else 0.0, top=1.0)


def _svg(draw: Callable[[Any], None], height: float, name: str, **margins: float) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {**STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height))
        canvas = FigureCanvasSVG(figure)
        figure.subplots_adjust(**margins)
        draw(figure.add_subplot())
        out = io.StringIO()
        canvas.print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    head, rest = text.split(">", 1)
    text = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head) + ">" + rest
    text = re.sub(r'\bid="(?=[a-z])', f'id="{name}-', text)
    text = re.sub(r'href="#|url\(#', lambda found: found.group() + f"{name}-", text)
    for stand_in, variable in CSS.items():
        text = text.replace(stand_in, f"var({variable})")
    return text


def _with(report: Report, metric: str) -> list[Arm]:
    return [arm for arm in report.arms if metric in arm.values and math.isfinite(arm.values[metric].value)]


def _colour(report: Report, arm: Arm) -> str:
    ends = report.ends()
    if ends is None or arm is ends[1]:
        return AFTER
    return BEFORE if arm.untouched or arm is ends[0] else BETWEEN


def _number(value: Value) -> str:
    return show(value.value, value.unit)


def _spoken(title: str, arms: list[Arm], metric: str) -> str:
    return f"{title}: " + "; ".join(f"{arm.label} {_number(arm.values[metric])}" for arm in arms) + "."


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean over about a tenth of the values; the window is cut alike on both sides at the ends."""
    half = max(2, len(values) // 20)
    smooth = []
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        window = values[place - reach : place + reach + 1]
        smooth.append(sum(window) / len(window))
    return smooth
