"""Rows to tokens: input ids, labels and a float loss weight for every token.

    weight of token t = row weight * weight of the message that holds t;   label = id where weight > 0, else -100

- completion: the prompt has no loss; the completion and the end-of-sequence token after it have.
- messages: rendered by the tokenizer's chat template, or by :data:`PLAIN_TEMPLATE` if it has none. Assistant turns with
  their end mark have loss. Spans come from the template's ``{% generation %}`` marks, else from rendering the turns
  before each answer with the generation prompt and looking where the whole conversation goes on.
- preference: chosen and rejected after the same prompt tokens, each as a completion.
- text: all tokens but the first, which nothing predicts.

The border of prompt and answer is where it will be at inference: the prompt's own tokens, then the answer's. Where
tokenising both together would merge across that border, they are tokenised apart (``Example.merged``). A beginning-of-
sequence token that the tokenizer adds by itself is put once, unless the text already begins with it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.core.errors import InputError
from gossamer.parts.data_rows import Row, as_row, message_weight

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
IGNORE = -100
TRUNCATIONS = ("keep_end", "refuse")

Prompt = str | Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One sequence. All lists have its length; ``labels[0]`` is always -100.

    ``cut``: prompt and answer tokens that truncation took away. ``merged``: prompt and answer were tokenised apart.
    ``segment_ids`` (1, 2, ...) stand only in packed examples.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float]
    cut: tuple[int, int] = (0, 0)
    merged: bool = False
    segment_ids: list[int] | None = None

    @property
    def supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels)


@dataclasses.dataclass(frozen=True, slots=True)
class PreferencePair:
    """Chosen and rejected answer after the same prompt tokens."""

    chosen: Example
    rejected: Example


def tokenise(
    row: Row | Mapping[str, Any], tokenizer: Any, *, max_length: int, truncation: str = "keep_end"
) -> Example | PreferencePair:
    """Turn one row into tokens, at most ``max_length`` of them.

    ``truncation`` "keep_end": the prompt loses its beginning (never the bos token); what is still too long loses its
    end. "refuse": an InputError instead. Raises InputError for a row that the chat template refuses.
    """
    assert truncation in TRUNCATIONS, truncation
    assert max_length >= 2, max_length
    row = as_row(row)
    if row.shape == "preference":
        return _tokenise_pair(row, tokenizer, max_length, truncation)
    if row.shape == "messages":
        encoded = _from_marks(row, tokenizer) or _encode(_chat(row, row.data["messages"], tokenizer), tokenizer)
    elif row.shape == "completion":
        encoded = _encode(_answer(row, row.data["completion"], tokenizer), tokenizer)
    else:
        text = row.data["text"]
        encoded = _encode(_Pieces([(text, row.weight), (_eos(tokenizer, text), row.weight)]), tokenizer)
    return _fit(encoded, len(encoded.ids), max_length, truncation, row)


def encode_prompt(prompt: Prompt, tokenizer: Any) -> list[int]:
    """The tokens that an answer follows: exactly those that :func:`tokenise` puts before the answer in training."""
    return _encode(_prompt(prompt, tokenizer), tokenizer).ids


def encode_border(prompt: Prompt, answer: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids of the prompt (with bos) and of the answer after it, split at the border that inference has. No end mark."""
    asked = _prompt(prompt, tokenizer)
    prompt_ids = _encode(asked, tokenizer).ids
    both = _encode(_Pieces([*asked.pieces, (answer, 1.0)], asked.templated), tokenizer).ids
    return prompt_ids, both[len(prompt_ids) :]


def prefix_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text by itself: the bos token, or nothing."""
    plain, whole = _ids("a", tokenizer), list(tokenizer("a")["input_ids"])
    starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
    return whole[: next(starts, 0)]


def render(messages: Sequence[Mapping[str, Any]], tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    """The conversation as text, by the tokenizer's template or the plain one. InputError if the template refuses it."""
    import jinja2

    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    try:
        return tokenizer.apply_chat_template(
            _bare(messages), chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        roles = [turn["role"] for turn in messages]
        do = "mend the order of the roles or give a tokenizer with another template"
        raise InputError("messages", must=f"fit the chat template ({error})", got=f"roles {roles}", do=do) from error


@dataclasses.dataclass(frozen=True, slots=True)
class _Pieces:
    """Text with loss weights; ``templated`` text comes from the tokenizer's own template, which sees to bos itself."""

    pieces: list[tuple[str, float]]
    templated: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class _Encoded:
    ids: list[int]
    weights: list[float]
    kept: int  # tokens at the start that truncation never takes
    merged: bool = False


def _encode(text: _Pieces, tokenizer: Any, *, apart: bool = False) -> _Encoded:
    """Tokenise so that every border between weights falls between two tokens."""
    pieces = _joined(text.pieces)
    chunks = None if apart else _split_whole([piece for piece, _ in pieces], tokenizer)
    merged = chunks is None
    if chunks is None:
        chunks = [_ids(piece, tokenizer) for piece, _ in pieces]
    ids = [token for chunk in chunks for token in chunk]
    weights = [weight for chunk, (_, weight) in zip(chunks, pieces, strict=True) for _ in chunk]
    prefix = prefix_ids(tokenizer)
    begun = ids[: len(prefix)] == prefix
    if not begun and not text.templated:
        ids, weights, begun = [*prefix, *ids], [0.0] * len(prefix) + weights, True
    kept = len(prefix) if prefix and begun else int(ids[:1] == [tokenizer.bos_token_id])
    return _Encoded(ids, weights, kept, merged)


def _joined(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of equal weight become one piece; empty ones vanish."""
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if text and joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        elif text:
            joined.append((text, weight))
    return joined


def _split_whole(texts: Sequence[str], tokenizer: Any) -> list[list[int]] | None:
    """Ids of the joined text, cut at the borders; None if what precedes a border has other ids when it stands alone."""
    if not texts:
        return []
    whole = _ids("".join(texts), tokenizer)
    chunks, at = [], 0
    for count in range(1, len(texts)):
        head = _ids("".join(texts[:count]), tokenizer)
        if whole[: len(head)] != head:
            return None
        chunks.append(head[at:])
        at = len(head)
    return [*chunks, whole[at:]]


def _tokenise_pair(row: Row, tokenizer: Any, max_length: int, truncation: str) -> PreferencePair:
    texts = [_answer(row, row.data[key], tokenizer) for key in ("chosen", "rejected")]
    encoded = [_encode(text, tokenizer) for text in texts]
    if any(one.merged for one in encoded):
        # apart in both, or the two answers would follow different prompt tokens
        encoded = [_encode(text, tokenizer, apart=True) for text in texts]
    longest = max(len(one.ids) for one in encoded)
    chosen, rejected = (_fit(one, longest, max_length, truncation, row) for one in encoded)
    return PreferencePair(chosen, rejected)


def _prompt(prompt: Prompt, tokenizer: Any) -> _Pieces:
    if isinstance(prompt, str):
        return _Pieces([(prompt, 0.0)])
    return _Pieces([(render(prompt, tokenizer, add_generation_prompt=True), 0.0)], bool(tokenizer.chat_template))


def _answer(row: Row, answer: str, tokenizer: Any) -> _Pieces:
    """Prompt (text or messages) and one answer; only the answer and its end mark carry loss."""
    prompt = row.data["prompt"]
    if isinstance(prompt, str):
        return _Pieces([(prompt, 0.0), (answer, row.weight), (_eos(tokenizer, answer), row.weight)])
    history = [{**turn, "train": False} for turn in prompt]
    return _chat(row, [*history, {"role": "assistant", "content": answer}], tokenizer)


def _chat(row: Row, messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> _Pieces:
    """The rendered conversation in pieces, those of trained messages with their weight."""
    whole = render(messages, tokenizer)
    pieces: list[tuple[str, float]] = []
    at = 0
    for index, message in enumerate(messages):
        weight = row.weight * message_weight(message)
        if weight == 0:
            continue
        start, end = _span(messages, index, whole, at, tokenizer)
        pieces += [(whole[at:start], 0.0), (whole[start:end], weight)]
        at = end
    pieces.append((whole[at:], 0.0))
    last = messages[-1]
    unmarked = not whole[at:].strip() and whole[:at].rstrip().endswith(last["content"].strip())
    if last["role"] == "assistant" and message_weight(last) > 0 and unmarked:
        # a template without an end mark: without eos the model would never learn to stop
        pieces[-1] = (_eos(tokenizer, ""), row.weight * message_weight(last))
    return _Pieces(pieces, templated=bool(tokenizer.chat_template))


def _span(messages: Sequence[Mapping[str, Any]], index: int, whole: str, at: int, tokenizer: Any) -> tuple[int, int]:
    """Where message ``index`` stands in ``whole``: for the assistant from the generation prompt to its end mark."""
    message = messages[index]
    content = message["content"].strip()
    answers = message["role"] == "assistant"
    before = render(messages[:index], tokenizer, add_generation_prompt=answers) if index else ""
    prompted = bool(index) and answers and whole.startswith(before)
    start = max(at, len(before)) if prompted else at
    found = whole.find(content, start)
    if found < 0:
        do = "use a template that keeps the text of each turn, or one with {% generation %} marks"
        raise InputError(f"messages[{index}]", must="stand in the rendered conversation", got="another text", do=do)
    upto = render(messages[: index + 1], tokenizer)
    end = found + len(content)
    tail = upto[upto.rfind(content) + len(content) :]
    # line breaks after an end mark are the template's; without a mark they are the only sign that the turn ends
    mark = tail.rstrip() or tail
    if whole.startswith(mark, end):
        end += len(mark)
    return (start if prompted else found), end


def _from_marks(row: Row, tokenizer: Any) -> _Encoded | None:
    """By ``{% generation %}`` marks, if the template has them and they mark one run of tokens for each answer."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or not re.search(r"\{%-?\s*generation\b", template):
        return None
    messages = row.data["messages"]
    if any(message_weight(turn) > 0 for turn in messages if turn["role"] != "assistant"):
        return None
    render(messages, tokenizer)
    out = tokenizer.apply_chat_template(_bare(messages), return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
    starts = [at for at, (last, now) in enumerate(zip([0, *mask], mask, strict=False)) if now and not last]
    answers = [row.weight * message_weight(turn) for turn in messages if turn["role"] == "assistant"]
    if len(starts) != len(answers):
        return None
    weights = [0.0] * len(ids)
    for start, weight in zip(starts, answers, strict=True):
        at = start
        while at < len(ids) and mask[at]:
            weights[at] = weight
            at += 1
    return _Encoded(ids, weights, int(ids[:1] == [tokenizer.bos_token_id]))


def _fit(encoded: _Encoded, longest: int, max_length: int, truncation: str, row: Row) -> Example:
    """Cut to ``max_length``; ``longest`` is the length of the longer one of two that must keep the same prompt."""
    ids, weights = encoded.ids, encoded.weights
    if len(ids) > max_length and truncation == "refuse":
        do = "raise max_length, shorten the row or allow truncation"
        raise row.finding("", f"{len(ids)} tokens", f"have at most {max_length} tokens", do).error()
    first = next((at for at, weight in enumerate(weights) if weight > 0), 0)
    # something must stand before the first answer token, or nothing predicts it
    keep = encoded.kept or 1
    shed = min(max(longest - max_length, 0), max(first - keep, 0))
    begin = encoded.kept
    ids, weights = ids[:begin] + ids[begin + shed :], weights[:begin] + weights[begin + shed :]
    lost = sum(weight > 0 for weight in weights[max_length:])
    ids, weights = ids[:max_length], [0.0, *weights[1:max_length]]
    labels = [token if weight > 0 else IGNORE for token, weight in zip(ids, weights, strict=True)]
    return Example(ids, labels, weights, (shed, lost), encoded.merged)


def _bare(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: item for key, item in turn.items() if key not in ("weight", "train")} for turn in messages]


def _eos(tokenizer: Any, after: str) -> str:
    """The end-of-sequence token as text, or nothing where ``after`` ends with it."""
    eos = tokenizer.eos_token
    if eos is None:
        do = "set tokenizer.eos_token to the token that ends an answer"
        raise InputError("tokenizer", must="have an end-of-sequence token", got="none", do=do)
    return "" if after.endswith(eos) else str(eos)


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
