"""What a run hands over about itself: arms, comparisons, steps, samples, budget. Plain data with a JSON round trip.

An *arm* is one model as measured (the untouched model zero-shot, the same few-shot, the result, ...). Its ``values``
are keyed by metric name; the names in :data:`METRICS` carry a label, a unit and a direction, and any other name may be
used with a :class:`Value` that states its own. Non-finite numbers are written as null and read back as nan.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from gossamer.core.errors import InputError, did_you_mean

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric:
    """How a quantity is called, in which unit it is kept, which direction is better, and where it is listed.

    ``inner`` marks a part of the quantity before it.
    """

    label: str
    unit: str = ""
    better: Better | None = None
    group: str = "Other"
    inner: bool = False


METRICS: dict[str, Metric] = {
    "chrf": Metric("chrF", "points", "higher", "Quality"),
    "rouge_l": Metric("ROUGE-L", "points", "higher", "Quality"),
    "exact_match": Metric("Exact match", "%", "higher", "Quality"),
    "loss": Metric("Held-out loss", "nats", "lower", "Quality"),
    "perplexity": Metric("Perplexity", "", "lower", "Quality"),
    "bits_per_byte": Metric("Bits per byte of text", "bits", "lower", "Quality"),
    "total_bytes": Metric("Bytes on disk", "bytes", "lower", "Size"),
    "weights_bytes": Metric("of which weights", "bytes", None, "Size", inner=True),
    "tokenizer_bytes": Metric("of which tokenizer", "bytes", None, "Size", inner=True),
    "other_bytes": Metric("of which other files", "bytes", None, "Size", inner=True),
    "parameters": Metric("Parameters", "count", "lower", "Size"),
    "bits_per_weight": Metric("Bits per weight", "bits", "lower", "Size"),
    "peak_rss_bytes": Metric("Peak resident memory", "bytes", "lower", "Memory and speed"),
    "net_rss_bytes": Metric("above the bare libraries", "bytes", "lower", "Memory and speed", inner=True),
    "tokens_per_s": Metric("Decoding, batch 1", "tokens/s", "higher", "Memory and speed"),
    "ms_per_token": Metric("Time per token", "ms", "lower", "Memory and speed"),
    "first_token_ms": Metric("Time to first token", "ms", "lower", "Memory and speed"),
}


@dataclass(frozen=True)
class Value:
    """A measured quantity, with its interval and the number of items or runs behind it where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    n: int | None = None
    better: Better | None = None


@dataclass
class Arm:
    """One model as measured. ``untouched`` says that nothing of the recipe was applied to it."""

    name: str
    label: str
    values: dict[str, Value] = field(default_factory=dict)
    notes: str = ""
    untouched: bool = False


@dataclass(frozen=True)
class Comparison:
    """``arm`` minus ``baseline`` on the same items: the difference with its interval, and a two-sided p value."""

    metric: str
    arm: str
    baseline: str
    difference: Value
    p_value: float | None = None


@dataclass
class StepRecord:
    """One step of the recipe: its resolved options, its time, and each thing it changed as ``[before, after]``."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    changed: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass
class Sample:
    """One test item and what each arm, by name, answered."""

    prompt: str
    reference: str
    outputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BudgetLine:
    """One bound that the user set, e.g. ``size_mb`` at most 200."""

    name: str
    bound: float
    value: float
    met: bool
    unit: str = ""


@dataclass
class Report:
    """Everything that a run measured.

    ``baseline`` and ``result`` name the two arms of the headline (the first and the last arm when empty), ``task`` the
    metric that judges the task, ``curves`` named series of (x, y), e.g. ``{"training loss": [(1.0, 3.2), ...]}``.
    ``created`` is an ISO 8601 time.
    """

    title: str
    model: str
    data: str
    seed: int
    created: str
    device: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    arms: list[Arm] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    budget: list[BudgetLine] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    task: str = "chrf"
    baseline: str = ""
    result: str = ""

    def arm(self, name: str) -> Arm:
        """The arm called ``name``; raises :class:`InputError` with the names there are."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        hint = did_you_mean(name, [arm.name for arm in self.arms])
        raise InputError("report", must="name an arm that was measured", got=repr(name), do=hint)

    def ends(self) -> tuple[Arm, Arm] | None:
        """The two arms of the headline, before and after; None when fewer than two were measured."""
        if len(self.arms) < 2:
            return None
        before = self.arm(self.baseline) if self.baseline else self.arms[0]
        return before, self.arm(self.result) if self.result else self.arms[-1]

    def metrics(self) -> list[str]:
        """Every metric that some arm has: known ones in the order of :data:`METRICS`, then the rest as they come."""
        present = list(dict.fromkeys(name for arm in self.arms for name in arm.values))
        return [name for name in METRICS if name in present] + [name for name in present if name not in METRICS]

    def best(self, metric: str) -> set[str]:
        """Names of the arms with the best value of ``metric``; empty without a direction or a second arm to beat."""
        values = {arm.name: arm.values[metric] for arm in self.arms if metric in arm.values}
        values = {name: value for name, value in values.items() if not math.isnan(value.value)}
        better = {value.better for value in values.values()}
        if len(values) < 2 or len(better) != 1 or better == {None}:
            return set()
        pick = max if better == {"higher"} else min
        top = pick(value.value for value in values.values())
        winners = {name for name, value in values.items() if value.value == top}
        return winners if len(winners) < len(values) else set()

    def met(self) -> bool:
        """True where every line of the budget holds (also where there is none)."""
        return all(line.met for line in self.budget)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: dicts, lists, strings and finite numbers only."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Inverse of :meth:`as_dict`; an unknown, missing or mistyped field raises :class:`InputError`."""
        return _read(cls, data, "report")


def metric_of(name: str) -> Metric:
    """The known metric of that name, or one labelled by its name."""
    return METRICS.get(name) or Metric(name.replace("_", " ").capitalize())


def measured(
    name: str, value: float, low: float | None = None, high: float | None = None, n: int | None = None
) -> Value:
    """A :class:`Value` with the unit and direction that :data:`METRICS` gives to ``name``."""
    metric = metric_of(name)
    return Value(float(value), low, high, metric.unit, n, metric.better)


def show(number: float | None, unit: str = "", *, signed: bool = False) -> str:
    """A number for people: ``show(86_400_000, "bytes") == "86.4 MB"``, ``show(31.24, "points") == "31.2"``.

    Bytes are decimal (1 MB = 10^6 bytes). None and nan give a dash.
    """
    if number is None or math.isnan(number):
        return "–"
    sign = "−" if number < 0 else "+" if signed and number > 0 else ""
    size = abs(number)
    if math.isinf(size):
        return f"{sign}∞"
    if unit in ("bytes", "count"):
        return sign + _scaled(size, unit)
    if unit == "s":
        return sign + _duration(size)
    tail = {"": "", "points": "", "%": " %", "times": "×"}.get(unit, f" {unit}")
    return f"{sign}{_digits(size, unit)}{tail}"


def show_interval(value: Value) -> str:
    """``28.0 – 34.5``, ``16.2 – 18.1 tokens/s``, or nothing where the value has no interval."""
    if value.low is None or value.high is None:
        return ""
    low, high = show(value.low, value.unit), show(value.high, value.unit)
    number, _, unit = low.partition(" ")
    return f"{number if unit and high.endswith(' ' + unit) else low} – {high}"


def show_p(p_value: float | None) -> str:
    """``p < 0.001``, ``p = 0.012``, or nothing."""
    if p_value is None or math.isnan(p_value):
        return ""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _scaled(size: float, unit: str) -> str:
    tails = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if unit == "bytes" else (("B", 1e9), ("M", 1e6), ("k", 1e3))
    for tail, scale in tails:
        if size >= 0.9995 * scale:
            number = size / scale
            return f"{number:.2f} {tail}" if number < 9.995 else f"{number:.1f} {tail}"
    return f"{size:.0f} B" if unit == "bytes" else f"{size:.0f}"


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _digits(size: float, unit: str) -> str:
    if unit in ("points", "%", "tokens/s"):
        return f"{size:.1f}"
    if size >= 9999.5:
        return f"{size:,.0f}"
    if size == int(size):
        return f"{size:.0f}"
    return f"{size:.0f}" if size >= 999.5 else f"{size:.1f}" if size >= 99.95 else f"{size:.3g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)


def _read(kind: Any, data: Any, where: str) -> Any:
    """Build a value of the annotated type ``kind`` from JSON data."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _read_fields(kind, data, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if data is None else _read(next(a for a in arguments if a is not type(None)), data, where)
    if origin is list and isinstance(data, list):
        return [_read(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(data)]
    if origin is dict and isinstance(data, dict):
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if origin is tuple and isinstance(data, list) and len(data) == len(arguments):
        return tuple(_read(part, item, where) for part, item in zip(arguments, data, strict=True))
    if kind is Any or (origin is Literal and data in arguments):
        return data
    if kind is float and (data is None or (isinstance(data, int | float) and not isinstance(data, bool))):
        return math.nan if data is None else float(data)
    if isinstance(kind, type) and isinstance(data, kind) and (kind is bool or not isinstance(data, bool)):
        return data
    raise InputError(where, must=f"be {getattr(kind, '__name__', kind)}", got=repr(data), do="write the report again")


def _read_fields(kind: type[Any], data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise InputError(where, must="be a mapping", got=repr(data), do="write the report again")
    hints = typing.get_type_hints(kind)
    for name in data:
        if name not in hints:
            raise InputError(f"{where}.{name}", must="be a field of the report", do=did_you_mean(name, hints))
    needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - set(data)):
        raise InputError(where, must=f"have {', '.join(missing)}", do="write the report again")
    return kind(**{name: _read(hints[name], item, f"{where}.{name}") for name, item in data.items()})
