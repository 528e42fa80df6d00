"""The data doctor: everything that is wrong with a training set, and what of it would be trained.

:func:`examine` reports all findings; :func:`load_examples` runs the same checks for training and raises the first
error. With a tokenizer the rows are tokenised as training would, so that truncation, chat templates and loss weights
are those of the real run. A set without any supervised token is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, overload

from gossamer.core.errors import InputError
from gossamer.parts.data_files import Finding, Source
from gossamer.parts.data_rows import Row, Rows, message_weight, scan
from gossamer.parts.data_tokens import Example, PreferencePair, tokenise

_PREVIEW_ROWS = 3

Item = Example | PreferencePair


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was found.

    ``preview``: for the first rows, {"file", "row", "shape", "tokens"}, each token {"text", "weight"}, with its "id"
    where a tokenizer was given (a preference pair shows its chosen and then its rejected answer).
    ``counts``: rows, rows of each shape, dropped rows, duplicates, errors, warnings, and with a tokenizer tokens,
    supervised tokens, sum of loss weights, rows whose prompt or answer is cut, borders tokenised apart.
    """

    findings: tuple[Finding, ...]
    preview: tuple[dict[str, Any], ...]
    counts: dict[str, float]
    mapping: dict[str, str]

    @property
    def ok(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        findings = [finding.as_dict() for finding in self.findings]
        parts = {"findings": findings, "preview": list(self.preview), "counts": self.counts, "mapping": self.mapping}
        return {"ok": self.ok, **parts}


@dataclasses.dataclass(frozen=True)
class Examples(Sequence[Item]):
    """Tokenised rows, ready for a data loader, with the counts, the mapping and the warnings of their diagnosis."""

    items: tuple[Item, ...]
    diagnosis: Diagnosis

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        return self.items[index]


def examine(
    source: Source,
    tokenizer: Any = None,
    *,
    max_length: int = 1024,
    truncation: str = "keep_end",
    limit: int | None = None,
) -> Diagnosis:
    """Check a source and preview its loss. Raises InputError only where there is no source to look at."""
    return _diagnose(source, tokenizer, max_length, truncation, limit)[0]


def load_examples(
    source: Source, tokenizer: Any, *, max_length: int, truncation: str = "keep_end", limit: int | None = None
) -> Examples:
    """Read, check and tokenise for training. Raises InputError with the first error that :func:`examine` would show."""
    diagnosis, items = _diagnose(source, tokenizer, max_length, truncation, limit)
    for finding in diagnosis.findings:
        if finding.severity == "error":
            raise finding.error()
    return Examples(tuple(items), diagnosis)


def _diagnose(
    source: Source, tokenizer: Any, max_length: int, truncation: str, limit: int | None
) -> tuple[Diagnosis, list[Item]]:
    rows = scan(source, limit=limit)
    findings = list(rows.findings)
    counts: dict[str, float] = {"rows": len(rows) + sum(rows.dropped.values())}
    for row in rows:
        counts[row.shape] = counts.get(row.shape, 0) + 1
    counts.update({f"dropped: {reason}": count for reason, count in rows.dropped.items()})
    duplicates = _duplicates(rows)
    counts["duplicates"] = len(duplicates)
    items: list[Item] = []
    if tokenizer is not None:
        items, problems = _tokenised(rows, tokenizer, max_length, truncation)
        findings += problems + _truncated(rows, items, max_length) + _control_tokens(rows, tokenizer)
        counts.update(_token_counts(items))
        shown = list(zip(rows, items, strict=True))[:_PREVIEW_ROWS]
        preview = [_token_preview(row, item, tokenizer) for row, item in shown]
    else:
        preview = [_text_preview(row) for row in rows[:_PREVIEW_ROWS]]
    findings += duplicates + _unsupervised(rows, items, tokenizer)
    for severity in ("error", "warning"):
        counts[f"{severity}s"] = sum(finding.severity == severity for finding in findings)
    return Diagnosis(tuple(findings), tuple(preview), counts, rows.mapping), items


def _tokenised(rows: Rows, tokenizer: Any, max_length: int, truncation: str) -> tuple[list[Item], list[Finding]]:
    """One item for each row; a row that cannot be tokenised becomes an empty example and a finding."""
    items: list[Item] = []
    findings: list[Finding] = []
    for row in rows:
        try:
            items.append(tokenise(row, tokenizer, max_length=max_length, truncation=truncation))
        except InputError as error:
            findings.append(row.finding(_field(error), str(error.got), error.must, error.do))
            items.append(Example([], [], []))
    return items, findings


def _field(error: InputError) -> str:
    """The field that an error of one row names; its own place is repeated by the finding."""
    return error.where if error.where.startswith(("messages", "tokenizer")) else ""


def _truncated(rows: Rows, items: Sequence[Item], max_length: int) -> list[Finding]:
    """One warning for all rows whose prompt is cut, one for all whose answer is cut, naming the first."""
    findings = []
    for side, part in enumerate(("prompt", "answer")):
        cut = [
            (row, tokens)
            for row, item in zip(rows, items, strict=True)
            if (tokens := max(example.cut[side] for example in _examples(item)))
        ]
        if cut:
            row, tokens = cut[0]
            found = f"{len(cut)} rows that are too long; this one, the first, loses {tokens} {part} tokens"
            expected = f"have at most {max_length} tokens"
            fix = "raise max_length or shorten them" + (" (answers lose their end mark)" if side else "")
            findings.append(row.finding(part, found, expected, fix, "warning"))
    return findings


def _control_tokens(rows: Rows, tokenizer: Any) -> list[Finding]:
    """Text of a message that the tokenizer reads as a control token, such as an end-of-turn mark."""
    findings = []
    tokens = [token for token in tokenizer.all_special_tokens if token]
    for row in rows:
        for index, message in enumerate(row.data.get("messages", ())):
            held = [token for token in tokens if token in message["content"]]
            if held:
                fix = "remove it unless it is meant as the control token"
                field = f"messages[{index}].content"
                findings.append(row.finding(field, f"the control token {held[0]!r}", "be plain text", fix, "warning"))
    return findings


def _unsupervised(rows: Rows, items: Sequence[Item], tokenizer: Any) -> list[Finding]:
    """Rows without loss, and a set without any (an error)."""
    if not len(rows):
        return []
    if tokenizer is None:
        trained = [any(weight > 0 for _, weight in _text_pieces(row)) for row in rows]
    else:
        trained = [any(example.supervised for example in _examples(item)) for item in items]
    whole = max((len(example.input_ids) for item in items for example in _examples(item)), default=0)
    fix = "give an assistant turn or completion with a weight above 0"
    fix += " and a max_length that leaves room for it" if whole else ""
    if not any(trained):
        found = f"no token with loss in {len(rows)} rows"
        return [Finding(rows[0].file, None, "", found, "have at least one token with loss", fix)]
    silent = [row for row, has in zip(rows, trained, strict=True) if not has]
    return [row.finding("", "no token with loss", "have a token with loss", fix, "warning") for row in silent]


def _duplicates(rows: Rows) -> list[Finding]:
    first: dict[bytes, Row] = {}
    findings = []
    for row in rows:
        text = json.dumps(row.data, sort_keys=True, ensure_ascii=False, default=str)
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        original = first.setdefault(key, row)
        if original is not row:
            found = f"the same as row {original.number} of {original.file}"
            fix = "delete one, or give one of them a weight of 2 if the repetition is meant"
            findings.append(row.finding("", found, "differ from other rows", fix, "warning"))
    return findings


def _token_counts(items: Sequence[Item]) -> dict[str, float]:
    examples = [example for item in items for example in _examples(item)]
    return {
        "tokens": sum(len(example.input_ids) for example in examples),
        "supervised tokens": sum(example.supervised for example in examples),
        "loss weight": sum(sum(example.weights) for example in examples),
        "prompts cut": sum(any(example.cut[0] for example in _examples(item)) for item in items),
        "answers cut": sum(any(example.cut[1] for example in _examples(item)) for item in items),
        "borders tokenised apart": sum(any(example.merged for example in _examples(item)) for item in items),
    }


def _examples(item: Item) -> tuple[Example, ...]:
    return (item,) if isinstance(item, Example) else (item.chosen, item.rejected)


def _token_preview(row: Row, item: Item, tokenizer: Any) -> dict[str, Any]:
    tokens = [
        {"id": token, "text": tokenizer.decode([token]), "weight": weight}
        for example in _examples(item)
        for token, weight in zip(example.input_ids, example.weights, strict=True)
    ]
    return {"file": row.file, "row": row.number, "shape": row.shape, "tokens": tokens}


def _text_preview(row: Row) -> dict[str, Any]:
    tokens = [{"text": text, "weight": weight} for text, weight in _text_pieces(row)]
    return {"file": row.file, "row": row.number, "shape": row.shape, "tokens": tokens}


def _text_pieces(row: Row) -> list[tuple[str, float]]:
    """The row's texts with their loss weights, as far as they are known without a tokenizer."""
    if row.shape == "text":
        return [(row.data["text"], row.weight)]
    if row.shape == "messages":
        return [(turn["content"], row.weight * message_weight(turn)) for turn in row.data["messages"]]
    prompt = row.data["prompt"]
    asked = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    answers = [row.data[key] for key in ("completion", "chosen", "rejected") if key in row.data]
    return [(text, 0.0) for text in asked] + [(text, row.weight) for text in answers]
