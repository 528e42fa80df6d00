"""A tokenizer in the terms of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

GGUF names a kind of tokenizer and a way of cutting text before it, and lists tokens with their types. Two kinds can
hold what the models here bring:

    "llama"  BPE over characters with the 256 byte tokens <0x00> to <0xFF> to fall back to (Llama 2, Gemma). There are
             no merges in the file: neighbours are joined by the score of what they make, so that a score is minus the
             place of the first merge that makes the token. This is the same order only where all merges of a token
             stand together, which is checked.
    "gpt2"   byte-level BPE with its merges, cut as GPT-2 ("gpt-2") or as Llama 3 ("llama-bpe") does.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from gguf import TokenType

from gossamer.core.errors import InputError

_WHERE = "export gguf: tokenizer"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE, _MARK = " ", "\u2581"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_LOWEST = -(2.0**24)  # below every place of a merge, and exact in float32


@dataclasses.dataclass(frozen=True)
class GgufTokens:
    """What is written under ``tokenizer.ggml``; ``tokens`` and ``types`` have one entry for each embedding row."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    space_prefix: bool
    adds_bos: bool
    adds_eos: bool
    bos: int | None
    eos: int
    unk: int | None
    pad: int | None
    other_ends: tuple[int, ...]  # further tokens that end an answer, two at most
    chat_template: Any


def read_tokens(tokenizer: Any, rows: int, ends: list[int]) -> GgufTokens:
    """``tokenizer`` for a model of ``rows`` embedding rows whose answers end with one of ``ends``.

    Raises InputError for one whose ids do not fit the rows, and for what the two kinds above cannot express.
    """
    spec = _specification(tokenizer)
    tokens, types = _tokens(spec, rows)
    space_prefix, scores, merges = False, None, None
    if spec["model"].get("byte_fallback"):
        model, pre = "llama", "default"
        space_prefix = _space_prefix(spec)
        scores = _scores(spec, rows)
        for token in _BYTES:
            types[spec["model"]["vocab"][token]] = TokenType.BYTE
    else:
        model, pre = "gpt2", _byte_level(spec)
        merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    unk = tokenizer.unk_token_id
    if unk is not None and model == "llama":
        types[unk] = TokenType.UNKNOWN
    adds_bos, adds_eos = _frame(tokenizer)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else (ends[0] if ends else None)
    if eos is None:
        raise _refusal(
            "have an end token, for which llama.cpp would otherwise take token 11 or 2", "none", "set eos_token"
        )
    others = tuple(end for end in ends if end != eos)
    if len(others) > 2:
        raise _refusal("have three end tokens at most", ends, "shorten generation_config.eos_token_id")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return GgufTokens(
        model, pre, tokens, [int(kind) for kind in types], scores, merges, space_prefix, adds_bos, adds_eos,
        tokenizer.bos_token_id, eos, unk, tokenizer.pad_token_id, others, template,
    )  # fmt: skip


def _specification(tokenizer: Any) -> dict[str, Any]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal("be a fast tokenizer (tokenizer.json)", type(tokenizer).__name__)
    spec: dict[str, Any] = json.loads(backend.to_str())
    model = spec["model"]
    if model.get("type") != "BPE":
        raise _refusal("be BPE, which is what these files can hold", model.get("type"))
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise _refusal(f"do without {key}", model[key])
    return spec


def _tokens(spec: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Tokens and types by id; rows that no token has are marked as unused."""
    added = {token["id"]: token for token in spec["added_tokens"]}
    by_id = {id_: token for token, id_ in spec["model"]["vocab"].items()}
    by_id |= {id_: token["content"] for id_, token in added.items()}
    if max(by_id) >= rows:
        do = "give the tokenizer that the model was trained with, or resize the embedding"
        raise _refusal(f"fit the model's {rows} embedding rows", f"token ids up to {max(by_id)}", do)
    tokens = [by_id.get(id_, f"[PAD{id_}]") for id_ in range(rows)]
    types: list[int] = [TokenType.NORMAL if id_ in by_id else TokenType.UNUSED for id_ in range(rows)]
    for id_, token in added.items():
        types[id_] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return tokens, types


def _space_prefix(spec: dict[str, Any]) -> bool:
    """Whether a space is put before a text, of a tokenizer that writes spaces as marks."""
    missing = [token for token in _BYTES if token not in spec["model"]["vocab"]]
    if missing:
        raise _refusal("hold the 256 byte tokens", f"{len(missing)} missing, {missing[0]} first")
    if spec["model"].get("ignore_merges"):
        raise _refusal("follow its merges", "ignore_merges")
    steps = _leaves(spec["normalizer"], "normalizers")
    before = _leaves(spec["pre_tokenizer"], "pretokenizers")
    prefix = {"type": "Prepend", "prepend": _MARK} in steps
    steps = [step for step in steps if step["type"] != "Prepend"]
    replace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": _MARK}
    # a split at spaces does nothing once they have been replaced
    split = {"type": "Split", "pattern": {"String": _SPACE}, "behavior": "MergedWithPrevious", "invert": False}
    if steps == [replace] and before in ([], [split]):
        return prefix
    if not steps and len(before) == 1 and before[0]["type"] == "Metaspace":
        space = before[0]
        if space["replacement"] == _MARK and not space.get("split", True):
            return bool(space["prepend_scheme"] != "never")
    raise _refusal("write spaces as marks and split nowhere", f"{steps or 'no normalizer'}, {before or 'no split'}")


def _scores(spec: dict[str, Any], rows: int) -> list[float]:
    """Minus the place of the first merge that makes a token; the lowest for tokens that no merge makes."""
    vocab = spec["model"]["vocab"]
    first: dict[str, int] = {}
    last = ""
    for place, (left, right) in enumerate(spec["model"]["merges"]):
        made = left + right
        if made in first and made != last:
            raise _refusal("merge in the order of what is made", f"merges of {made!r} that do not stand together")
        first.setdefault(made, place)
        last = made
    scores = [_LOWEST] * rows
    for token, place in first.items():
        scores[vocab[token]] = -float(place)
    return scores


def _byte_level(spec: dict[str, Any]) -> str:
    """The name that llama.cpp has for the way in which the text is cut into words."""
    ignores = bool(spec["model"].get("ignore_merges"))
    steps = _leaves(spec["pre_tokenizer"], "pretokenizers")
    words = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    level = {"type": "ByteLevel", "add_prefix_space": False}
    split = {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False}
    if spec["normalizer"] is None and not ignores and words == [level | {"use_regex": True}]:
        return "gpt-2"
    if spec["normalizer"] is None and ignores and words == [split, level | {"use_regex": False}]:
        return "llama-bpe"
    raise _refusal(
        "be byte-level BPE that cuts text as GPT-2 or Llama 3 does, or BPE with byte fallback",
        json.dumps([spec["normalizer"], words])[:200],
    )


def _frame(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the start and the end token are put around a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for first, last in ((False, False), (True, False), (False, True), (True, True)):
        if whole == bos * first + bare + eos * last:
            return first, last
    raise _refusal("put nothing but the start and end token around a text", f"{whole} around {bare}")


def _leaves(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if node is None:
        return []
    return [leaf for part in node[key] for leaf in _leaves(part, key)] if node["type"] == "Sequence" else [node]


def _refusal(
    must: str, got: Any, do: str = "export to safetensors or onnx, which keep the tokenizer as it is"
) -> InputError:
    return InputError(_WHERE, must=must, got=got, do=do)
