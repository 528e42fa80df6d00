"""The answers of the OpenAI API, as models for its description and as plain JSON values from the engine's pieces."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from gossamer.serving.sequences import Piece, Tally, Token

Finish = Literal["stop", "length", "content_filter"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail


class CachedTokens(BaseModel):
    cached_tokens: int


class StageReport(BaseModel):
    """``stages`` by name: ``ms`` that the answers waited for it, and what it tells of itself."""

    stages: dict[str, dict[str, Any]]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    gossamer: StageReport


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish


class TextReply(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelFacts(BaseModel):
    """An extension: tokens that fit, and the stages that a request can switch off. Embedding models have no stages."""

    max_length: int
    stages: list[str]
    kind: Literal["generation", "embedding"]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    gossamer: ModelFacts


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"]
    model: str


@dataclasses.dataclass
class Collected:
    """The whole of one answer."""

    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finish: str | None = None
    tally: Tally | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish, self.tally = piece.finish, piece.tally


class Shape:
    """One reply, chat or completion: its id, and how choices look, whole or as parts of a stream."""

    def __init__(self, model: str, *, chat: bool, logprobs: bool, echo: Sequence[str] = ()) -> None:
        self.chat, self.logprobs, self.echo = chat, logprobs, list(echo)
        self.offsets: dict[int, int] = {}  # letters of each answer whose tokens were told
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: Sequence[Collected], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "choices": [self._choice(n, answer) for n, answer in enumerate(answers)], "usage": usage}

    def part(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, told: bool) -> dict[str, Any]:
        """A chunk of a stream; ``told``: usage comes at the end, and is null before."""
        kind = {"object": "chat.completion.chunk"} if self.chat else {}
        return {**self.head, **kind, "choices": choices, **({"usage": usage} if told else {})}

    def opening(self, index: int) -> dict[str, Any]:
        """The first part of an answer."""
        if self.chat:
            delta = {"role": "assistant", "content": "", "refusal": None}
            return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {"index": index, "text": self._echoed(index), "logprobs": None, "finish_reason": None}

    def news(self, piece: Piece) -> dict[str, Any]:
        shown = {"logprobs": self._logprobs(piece.index, piece.tokens), "finish_reason": piece.finish}
        if self.chat:
            return {"index": piece.index, "delta": {"content": piece.text} if piece.text else {}, **shown}
        return {"index": piece.index, "text": piece.text, **shown}

    def _choice(self, index: int, answer: Collected) -> dict[str, Any]:
        shown = {"index": index, "logprobs": self._logprobs(index, answer.tokens), "finish_reason": answer.finish}
        if self.chat:
            return {**shown, "message": {"role": "assistant", "content": answer.text, "refusal": None}}
        return {**shown, "text": self._echoed(index) + answer.text}

    def _echoed(self, index: int) -> str:
        return self.echo[index] if self.echo else ""

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            return {"content": [_token(token, True) for token in tokens], "refusal": None}
        offsets, at = [], self.offsets.get(index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token.text)
        self.offsets[index] = at
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{other.text: other.logprob for other in token.top} for token in tokens],
            "text_offset": offsets,
        }


def usage_of(tallies: Sequence[Tally], prompts: int) -> dict[str, Any]:
    """Tokens of all answers together, each of the ``prompts`` counted once; what the stages report is summed over the
    answers where it is milliseconds, and else that of the first."""
    choices = len(tallies) // prompts
    prompt = sum(tally.prompt for tally in tallies[::choices])
    cached = sum(tally.cached for tally in tallies[::choices])
    written = sum(tally.written for tally in tallies)
    stages: dict[str, dict[str, Any]] = {}
    for tally in tallies:
        for name, found in tally.stages.items():
            row = stages.setdefault(name, {**found, "ms": 0.0})
            row["ms"] += found["ms"]
    for row in stages.values():
        row["ms"] = round(row["ms"], 3)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
        "gossamer": {"stages": stages},
    }


def _token(token: Token, top: bool = False) -> dict[str, Any]:
    shown: dict[str, Any] = {"token": token.text, "logprob": token.logprob, "bytes": token.data}
    return {**shown, "top_logprobs": [_token(other) for other in token.top]} if top else shown
