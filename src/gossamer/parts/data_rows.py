"""Rows: one schema in four shapes, read strictly, every problem with its place.

    {"messages": [{"role", "content", "weight"?: float, "train"?: bool}, ...]}    shape "messages"
    {"prompt", "completion"}                                                      shape "completion"
    {"prompt", "chosen", "rejected"}                                              shape "preference"
    {"text"}                                                                      shape "text"

Every row may carry ``"weight"``: a finite number >= 0 that multiplies its loss. A prompt is a string or a list of
messages. Common other spellings (Alpaca, Dolly, ShareGPT, question/answer) are converted and the mapping is recorded.
Keys that the schema does not know stay in ``Row.extra`` and are reported; a near miss of a schema key is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from gossamer.core.errors import did_you_mean
from gossamer.parts.data_aliases import OTHER_ROLES, SHAPES, to_schema
from gossamer.parts.data_files import Finding, Record, Source, records

ROLES = ("system", "developer", "user", "assistant", "tool")

_KEYS = tuple(sorted({key for keys in SHAPES.values() for key in keys} | {"weight"}))
_MESSAGE_KEYS = ("role", "content", "weight", "train")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row in the schema. ``data`` holds the keys of its shape, ``extra`` whatever else the row had."""

    shape: str
    data: dict[str, Any]
    weight: float = 1.0
    file: str = "rows"
    number: int = 1
    line: int | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The row in the schema, with its weight where it is not 1: what :func:`as_row` reads back."""
        return dict(self.data) if self.weight == 1 else {**self.data, "weight": self.weight}

    def finding(self, field: str, found: str, expected: str, fix: str, severity: str = "error") -> Finding:
        return Finding(self.file, self.number, field, found, expected, fix, severity, self.line)


@dataclasses.dataclass(frozen=True)
class Rows(Sequence[Row]):
    """The rows of a source, what was renamed (``mapping``: theirs -> ours), counts of dropped rows, and warnings."""

    rows: tuple[Row, ...]
    mapping: dict[str, str]
    dropped: dict[str, int]
    findings: tuple[Finding, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]


def read_rows(source: Source, *, limit: int | None = None) -> Rows:
    """Read and check rows (see :mod:`gossamer.parts.data_files` for sources).

    Raises InputError with the first error; rows whose chosen answer equals the rejected one are dropped and counted.
    """
    rows = scan(source, limit=limit)
    for finding in rows.findings:
        if finding.severity == "error":
            raise finding.error()
    return rows


def scan(source: Source, *, limit: int | None = None) -> Rows:
    """As :func:`read_rows`, but errors are left among the findings and their rows left out."""
    rows: list[Row] = []
    findings: list[Finding] = []
    mapping: dict[str, str] = {}
    dropped: dict[str, int] = {}
    reported: set[tuple[str, str]] = set()
    seen = 0
    for item in records(source, limit=limit):
        if isinstance(item, Finding):
            findings.append(item)
            continue
        seen += 1
        row, problems = check_record(item, mapping)
        for problem in problems:
            once = (problem.file, problem.field) if problem.expected == _IGNORED else None
            if once is None or once not in reported:
                findings.append(problem)
            if once is not None:
                reported.add(once)
        if row is None:
            continue
        if row.shape == "preference" and row.data["chosen"] == row.data["rejected"]:
            findings.append(_equal_answers(row))
            dropped["chosen equals rejected"] = dropped.get("chosen equals rejected", 0) + 1
            continue
        rows.append(row)
    if not seen and not findings:
        findings.append(Finding(str(source) if isinstance(source, str) else "rows", None, "", *_NO_ROWS))
    findings += _mixed_shapes(rows)
    return Rows(tuple(rows), mapping, dropped, tuple(findings))


def as_row(value: Row | Mapping[str, Any], *, file: str = "rows", number: int = 1) -> Row:
    """One dict in the schema (or one of the known other spellings) as a checked Row.

    Raises InputError, which names ``file`` and ``number``, if it is wrong.
    """
    if isinstance(value, Row):
        return value
    row, problems = check_record(Record(value, file, number), {})
    for problem in problems:
        if problem.severity == "error":
            raise problem.error()
    assert row is not None, "a row without an error is a row"
    return row


def check_record(record: Record, mapping: dict[str, str]) -> tuple[Row | None, list[Finding]]:
    """Convert and check one record; None for the row if any of the findings is an error. ``mapping`` is added to."""
    check = _Check(record)
    if not isinstance(record.value, Mapping):
        check.add("", _show(record.value), "be an object with fields", "write it as one of " + _shapes_text())
        return None, check.findings
    value, renamed = to_schema(dict(record.value))
    mapping.update(renamed)
    shape = _shape_of(value)
    if shape is None:
        hint = _hint_for_keys(value)
        check.add("", f"the keys {sorted(map(str, value))}", "have the keys of one shape", hint)
        return None, check.findings
    extra = {key: item for key, item in value.items() if key not in SHAPES[shape] and key != "weight"}
    check.extra(extra, value, shape)
    weight = check.weight(value, "weight", 1.0)
    data = _CHECKS[shape](check, value)
    if any(finding.severity == "error" for finding in check.findings):
        return None, check.findings
    return Row(shape, data, weight, record.file, record.row, record.line, extra), check.findings


class _Check:
    """Collects the findings of one record."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.findings: list[Finding] = []

    def add(self, field: str, found: str, expected: str, fix: str, severity: str = "error") -> None:
        record = self.record
        self.findings.append(Finding(record.file, record.row, field, found, expected, fix, severity, record.line))

    def text(self, value: Mapping[str, Any], key: str, field: str) -> str:
        if key not in value:
            self.add(field, "no such field", "be there", f"add {key!r} to the row or delete the row")
        elif value[key] is None:
            self.add(field, "null", "be a string", "write the text or delete the row")
        elif not isinstance(value[key], str):
            self.add(field, _show(value[key]), "be a string", "write the text as one string")
        elif not value[key].strip():
            self.add(field, repr(value[key]), "not be empty", "write the text or delete the row")
        else:
            return value[key]
        return ""

    def weight(self, value: Mapping[str, Any], key: str, default: float, field: str = "weight") -> float:
        weight = value.get(key)
        if weight is None:
            return default
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            self.add(field, _show(weight), "be a finite number >= 0", "0 takes it out of the loss, 1 is the default")
            return default
        return float(weight)

    def extra(self, extra: Mapping[str, Any], value: Mapping[str, Any], shape: str) -> None:
        for key in extra:
            near = difflib.get_close_matches(str(key), [name for name in _KEYS if name not in value], 1, cutoff=0.8)
            if near:
                self.add(str(key), "an unknown key", f"be one of {list(_KEYS)}", f"did you mean {near[0]!r}?")
            else:
                fix = f"nothing to do: it is kept beside the row, whose shape is {shape}, and trains nothing"
                self.add(str(key), "a key that this shape does not use", _IGNORED, fix, "warning")

    def messages(self, value: Any, field: str) -> list[dict[str, Any]]:
        if not isinstance(value, list | tuple) or not value:
            found = "null" if value is None else _show(value)
            self.add(field, found, "be a list of messages", 'write [{"role": "user", "content": ...}, ...]')
            return []
        return [self.message(message, f"{field}[{index}]") for index, message in enumerate(value)]

    def message(self, message: Any, field: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            self.add(field, _show(message), "be an object", 'write {"role": ..., "content": ...}')
            return {"role": "user", "content": ""}
        # Parquet gives every message the union of all keys, with null where one had none
        message = {key: item for key, item in message.items() if item is not None or key in ("role", "content")}
        role = message.get("role")
        if role not in ROLES:
            hint = OTHER_ROLES.get(str(role).lower())
            fix = f"write {hint!r}" if hint else did_you_mean(str(role), ROLES)
            self.add(f"{field}.role", _show(role), f"be one of {list(ROLES)}", fix)
        content = self.text(message, "content", f"{field}.content")
        self.weight(message, "weight", 1.0, f"{field}.weight")
        if not isinstance(message.get("train", True), bool):
            self.add(f"{field}.train", _show(message["train"]), "be true or false", "or give a weight instead")
        for key in message:
            near = difflib.get_close_matches(str(key), [k for k in _MESSAGE_KEYS if k not in message], 1, cutoff=0.8)
            if near:
                self.add(f"{field}.{key}", "an unknown key", f"be one of {list(_MESSAGE_KEYS)}", _mean(near[0]))
        return {**message, "role": role, "content": content}

    def prompt(self, value: Mapping[str, Any]) -> str | list[dict[str, Any]]:
        if isinstance(value.get("prompt"), list | tuple):
            return self.messages(value["prompt"], "prompt")
        # an empty prompt is a legitimate start where the model begins with its own first token
        return "" if value.get("prompt") == "" else self.text(value, "prompt", "prompt")


def _check_messages(check: _Check, value: Mapping[str, Any]) -> dict[str, Any]:
    messages = check.messages(value["messages"], "messages")
    roles = [message["role"] for message in messages]
    trained = [message for message in messages if message_weight(message) > 0]
    if messages and not trained and "assistant" not in roles:
        fix = "add the answer that the model should give, or use the text shape"
        check.add("messages", f"the roles {roles}", "have an assistant turn", fix)
    elif trained and messages[-1]["role"] in ("user", "system", "developer"):
        check.add(
            "messages", f"a last turn by {roles[-1]!r}", "end with the assistant", "it carries no loss", "warning"
        )
    for index, (before, role) in enumerate(itertools.pairwise(roles), 1):
        if before == role and role in ("user", "assistant"):
            fix = "join the two turns; templates that forbid this refuse the row"
            check.add(f"messages[{index}].role", f"{role!r} twice in a row", "take turns", fix, "warning")
    return {"messages": messages}


def _check_completion(check: _Check, value: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": check.prompt(value), "completion": check.text(value, "completion", "completion")}


def _check_preference(check: _Check, value: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": check.prompt(value), **{key: check.text(value, key, key) for key in ("chosen", "rejected")}}


def _check_text(check: _Check, value: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": check.text(value, "text", "text")}


_CHECKS = {
    "messages": _check_messages,
    "completion": _check_completion,
    "preference": _check_preference,
    "text": _check_text,
}


def message_weight(message: Mapping[str, Any]) -> float:
    """Loss weight of a message: its own, else 1 for the assistant and 0 for others; ``train`` overrides the role."""
    train = message.get("train", message.get("role") == "assistant" or "weight" in message)
    weight = message.get("weight", 1.0)
    usable = isinstance(weight, int | float) and train is not False
    return float(weight) if usable and train else 0.0


def _shape_of(value: Mapping[str, Any]) -> str | None:
    """Decided by the fields that hold something; a table of mixed rows has null in the columns of other shapes."""
    for present in ({key for key, item in value.items() if item is not None}, set(value)):
        for shape, keys in SHAPES.items():
            if present & (set(keys) - {"prompt"}):
                return shape
    return "completion" if "prompt" in value else None


def _hint_for_keys(value: Mapping[str, Any]) -> str:
    hits = [(key, difflib.get_close_matches(str(key), _KEYS, 1, cutoff=0.6)) for key in value]
    hints = [f"{_mean(near[0])} for {key!r}" for key, near in hits if near]
    return (", ".join(hints) + "; " if hints else "") + "the shapes are " + _shapes_text()


def _mixed_shapes(rows: Sequence[Row]) -> list[Finding]:
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.shape, row)
    if len(first) < 2:
        return []
    pairs = "preference" in first
    found = ", ".join(f"{shape} (first in row {row.number} of {row.file})" for shape, row in first.items())
    fix = "keep preference rows in a set of their own" if pairs else "nothing to do if the mixture is meant"
    odd = list(first.values())[1]
    return [odd.finding("", found, "have one shape in all rows", fix, "error" if pairs else "warning")]


def _equal_answers(row: Row) -> Finding:
    fix = "the row is dropped and counted; give two different answers"
    return row.finding("rejected", "the same text as chosen", "differ from chosen", fix, "warning")


def _shapes_text() -> str:
    return " | ".join("{" + ", ".join(keys) + "}" for keys in SHAPES.values())


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}{' ...' if len(text) > 60 else ''} ({type(value).__name__})"


def _mean(name: str) -> str:
    return f"did you mean {name!r}?"


_IGNORED = "be a key of the row's shape"
_NO_ROWS = ("no rows", "hold at least one row", "give a source that has rows")
