"""The mix of requests that a server is loaded with: good ones, bad ones of every sort, and clients that hang up.

Each kind names the statuses that are right for it; a kind whose clients hang up has none.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

from gossamer.benchmarks._serve_client import Request, post

CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
WORDS = ("rain", "river", "lamp", "stone", "garden", "letter", "winter", "bread", "harbour", "clock")
COLOUR = {"type": "object", "properties": {"colour": {"enum": ["red", "green", "blue"]}}, "required": ["colour"],
          "additionalProperties": False}  # fmt: skip
UNMET = {"type": "integer", "minimum": 5, "maximum": 3}
BUSY = frozenset({429})
GOOD = frozenset({200}) | BUSY
BAD = frozenset({400}) | BUSY


@dataclasses.dataclass(frozen=True)
class Kind:
    weight: int
    make: Callable[[random.Random, str], Request]
    right: frozenset[int]


def chat(draw: random.Random, model: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """A body that is good but for ``more``, its prompt another each time."""
    text = " ".join(draw.choices(WORDS, k=draw.randint(2, 12)))
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": draw.randint(1, 8), **more}


def schema_format(schema: Any, name: str = "answer") -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


def _chat(weight: int, right: frozenset[int], **more: Any) -> Kind:
    return Kind(weight, lambda draw, model: post(CHAT, chat(draw, model, more)), right)


def _gone(weight: int, lines: int, **more: Any) -> Kind:
    long = {"max_tokens": 64, **more}
    return Kind(weight, lambda draw, model: post(CHAT, chat(draw, model, long), hang_up=lines), frozenset())


def _raw(weight: int, right: frozenset[int], body: bytes) -> Kind:
    return Kind(weight, lambda draw, model: Request(CHAT, body), right)


def _get(weight: int, path: str, right: frozenset[int] = GOOD) -> Kind:
    return Kind(weight, lambda draw, model: Request(path, method="GET"), right)


def _texts(draw: random.Random, model: str) -> Request:
    prompts = [" ".join(draw.choices(WORDS, k=4)) for _ in range(2)]
    return post(TEXT, {"model": model, "prompt": prompts, "max_tokens": 4, "n": 2, "logprobs": 2, "stop": [" the"]})


def _vectors(draw: random.Random, model: str) -> Request:
    return post(VECTORS, {"model": model, "input": draw.choices(WORDS, k=3)})


def _half(draw: random.Random, model: str) -> Request:
    return post(CHAT, chat(draw, model, {}), cut=True)


KINDS: dict[str, Kind] = {
    "chat": _chat(10, GOOD),
    "greedy chat": _chat(6, GOOD, temperature=0),
    "streamed chat": _chat(12, GOOD, stream=True, stream_options={"include_usage": True}),
    "seeded chat with logprobs": _chat(4, GOOD, seed=7, logprobs=True, top_logprobs=3, n=2),
    "chat under a schema": _chat(4, GOOD, max_tokens=48, response_format=schema_format(COLOUR)),
    "chat under a pattern": _chat(3, GOOD, max_tokens=24, response_format={"type": "regex", "pattern": "[ab]{3,9}"}),
    "completions": Kind(8, _texts, GOOD),
    "embeddings": Kind(4, _vectors, GOOD),
    "models": _get(2, "/v1/models"),
    "health": _get(2, "/health"),
    "metrics": _get(1, "/metrics"),
    "page": _get(1, "/"),
    "negative max_tokens": _chat(3, BAD, max_tokens=-1),
    "max_tokens as text": _chat(2, BAD, max_tokens="8"),
    "temperature out of bounds": _chat(2, BAD, temperature=9),
    "unknown field": _chat(2, BAD, colour="red"),
    "tools": _chat(2, BAD, tools=[{"type": "function", "function": {"name": "f"}}]),
    "no messages": _chat(2, BAD, messages=[]),
    "a role that is none": _chat(2, BAD, messages=[{"role": "nobody", "content": "hi"}]),
    "unknown model": _chat(3, frozenset({404}) | BUSY, model="no-such-model"),
    "unknown stage": _chat(2, BAD, gossamer={"stages": {"no-such-stage": False}}),
    "schema that cannot be met": _chat(2, BAD, response_format=schema_format(UNMET)),
    "pattern that is none": _chat(1, BAD, response_format={"type": "regex", "pattern": "("}),
    "prompt that is too long": _chat(1, BAD, messages=[{"role": "user", "content": "rain " * 20_000}]),
    "broken JSON": _raw(3, BAD, b'{"model": "x", "messages": [{'),
    "invalid UTF-8": _raw(3, BAD, b'{"model": "\xff\xfe", "messages": []}'),
    "NaN": _raw(1, BAD, b'{"model": "x", "messages": [], "temperature": NaN}'),
    "half a surrogate pair": _raw(1, BAD, b'{"model": "\\ud800", "messages": []}'),
    "deep JSON": _raw(1, BAD, b'{"a":' * 20_000),
    "a list": _raw(1, BAD, b"[1, 2]"),
    "nothing": _raw(1, BAD, b""),
    "a body of 10 MB": _raw(1, frozenset({413}) | BUSY, b'{"model": "' + b"x" * 10_000_000 + b'"}'),
    "wrong method": _get(1, CHAT, frozenset({405}) | BUSY),
    "wrong path": _get(1, "/v2/chat", frozenset({404}) | BUSY),
    "gone at once": _gone(4, 0),
    "gone at once, streamed": _gone(3, 0, stream=True),
    "gone at the head of a stream": _gone(3, 1, stream=True),
    "gone within a stream": _gone(5, 9, stream=True),
    "gone within the body": Kind(3, _half, frozenset()),
}  # fmt: skip


def mix(count: int, model: str, seed: int = 0) -> list[tuple[str, Request]]:
    """``count`` requests drawn by the weights, every kind at least once where there is room."""
    draw = random.Random(seed)
    names = list(KINDS)[:count]
    names += draw.choices(list(KINDS), [kind.weight for kind in KINDS.values()], k=count - len(names))
    draw.shuffle(names)
    return [(name, KINDS[name].make(draw, model)) for name in names]
