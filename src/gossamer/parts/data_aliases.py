"""Other spellings of the row schema, converted: Alpaca, Dolly, ShareGPT, question/answer, answers as message lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# in the order in which a row that has the keys of several is read
SHAPES = {
    "preference": ("prompt", "chosen", "rejected"),
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "function": "tool",
    "observation": "tool",
}
# (prompt field, optional context field, answer field)
_PAIR_ALIASES = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("question", None, "answer"),
    ("prompt", None, "response"),
)


def to_schema(value: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Rename other spellings; returns the row and {theirs: ours}."""
    mapping: dict[str, str] = {}
    if "messages" not in value and isinstance(value.get("conversations"), list):
        value["messages"] = value.pop("conversations")
        mapping["conversations"] = "messages"
    if isinstance(value.get("messages"), list):
        value["messages"] = [_from_sharegpt(message, mapping) for message in value["messages"]]
    for prompt, context, answer in _PAIR_ALIASES:
        known = any(keys <= value.keys() for keys in (set(SHAPES[shape]) for shape in SHAPES))
        if known or not {prompt, answer} <= value.keys():
            continue
        asked, given = value.pop(prompt), value.pop(context, None) if context else None
        joined = isinstance(asked, str) and isinstance(given, str) and given.strip()
        value["prompt"] = f"{asked}\n\n{given}" if joined else asked
        value["completion"] = value.pop(answer)
        if prompt != "prompt":
            mapping[f"{prompt} + {context}" if context and given is not None else prompt] = "prompt"
        mapping[answer] = "completion"
    _answers_as_text(value, mapping)
    return value, mapping


def _from_sharegpt(message: Any, mapping: dict[str, str]) -> Any:
    if not isinstance(message, Mapping) or "from" not in message or "role" in message:
        return message
    mapping.update({"messages[].from": "messages[].role", "messages[].value": "messages[].content"})
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    content = {"content": message["value"]} if "value" in message else {}
    return {**rest, "role": OTHER_ROLES.get(message["from"], message["from"]), **content}


def _answers_as_text(value: dict[str, Any], mapping: dict[str, str]) -> None:
    """Answers given as message lists: the last turn is the answer, what precedes it (alike in all) is the prompt."""
    keys = [key for key in ("completion", "chosen", "rejected") if isinstance(value.get(key), list) and value[key]]
    turns = [value[key] for key in keys]
    if not keys or not all(isinstance(turn, Mapping) for answer in turns for turn in answer):
        return
    if any(answer[-1].get("role") != "assistant" or answer[:-1] != turns[0][:-1] for answer in turns):
        return
    if turns[0][:-1]:
        value["prompt"] = turns[0][:-1]
        mapping[f"{keys[0]}[:-1]"] = "prompt"
    for key in keys:
        value[key] = value[key][-1].get("content")
        mapping[f"{key}[-1].content"] = key
