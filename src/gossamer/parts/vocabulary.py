"""Safe vocabulary trimming for BPE tokenizers that can spell any text in bytes, and for the model behind them.

Kept are the tokens that the texts use, the special tokens, the 256 byte tokens, and everything that a kept token is
merged from. With M the ordered merges (a, b) -> ab and K the kept tokens,

    K = closure of (special + bytes + used) under  ab in K and (a, b) in M  =>  a, b in K
    M' = those of M whose a, b and ab are in K, in their old order

Every merge that the old tokenizer applies to a kept text is in M', and M' offers no other merge at any step, so that a
kept text gets the same tokens (with new numbers); any other text falls to smaller tokens and at last to bytes, and
decodes to what the old tokenizer decodes it to. The model's rows are selected, never averaged: logits of kept tokens
stay as they are. Dropped special tokens ("<unused7>") become ordinary text.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gossamer.core.errors import GossamerError, InputError, did_you_mean

_ID_KEYS = ("_token_id", "_token_ids", "_token_index")
_SUPPRESS_KEYS = ("suppress_tokens", "begin_suppress_tokens")
_UNMAPPED_KEYS = ("bad_words_ids", "sequence_bias", "forced_decoder_ids")
_KEPT_SETTINGS = ("model_max_length", "padding_side", "truncation_side", "model_input_names")
_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class TrimReport:
    """Token counts, embedding and head bytes before and after; ``old_ids[new]`` is the old id of a new one."""

    tokens_before: int
    tokens_after: int
    bytes_before: int
    bytes_after: int
    special_dropped: int
    old_ids: list[int]

    @property
    def bytes_saved(self) -> int:
        """Bytes that the input embeddings and an untied head lost."""
        return self.bytes_before - self.bytes_after

    @property
    def share_kept(self) -> float:
        """Kept tokens over all tokens."""
        return self.tokens_after / self.tokens_before


@dataclasses.dataclass(frozen=True)
class Trimmed:
    """The model (the same object), a new tokenizer, and the report."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    report: TrimReport


def trim_vocabulary(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    extra_tokens: Sequence[str] = (),
    min_count: int = 1,
) -> Trimmed:
    """Cut model and tokenizer down to the tokens of ``texts``; the model is changed in place, the tokenizer is not.

    Give the texts as they will be tokenized (chat template applied, prompts and answers apart where they are apart).
    ``extra_tokens`` are vocabulary entries to keep besides; a token used fewer than ``min_count`` times is dropped.
    Special tokens stay if the tokenizer, its chat template, the config or the generation config names them. Raises
    InputError, before anything is changed, for a tokenizer that cannot spell every text or a model whose
    vocabulary-sized tensors are not plain embeddings and head.
    """
    texts = list(texts)
    spec = _specification(tokenizer)
    tokens = _all_tokens(spec)
    embeddings, head = _layers(model)
    named = _config_ids(model, tokens) | set(tokenizer.all_special_ids) | _json_ids(tokenizer, spec, tokens)
    used = {id_ for id_, count in _count(tokenizer, texts).items() if count >= min_count}
    old_ids = _close(named | used | _extra_ids(extra_tokens, tokens) | _byte_ids(spec, tokens), spec, tokens)
    if old_ids[-1] >= embeddings.num_embeddings:
        got = f"token id {old_ids[-1]} and {embeddings.num_embeddings} rows"
        do = "give the tokenizer that the model was trained with"
        raise InputError("trim_vocabulary", must="have an embedding row for each kept token", got=got, do=do)
    trimmed = _build_tokenizer(tokenizer, spec, tokens, old_ids)
    _verify(tokenizer, trimmed, texts, old_ids)
    bytes_before = _bytes(embeddings, head)
    _select_rows(model, embeddings, head, old_ids)
    kept = set(old_ids)
    report = TrimReport(
        tokens_before=len(tokens),
        tokens_after=len(old_ids),
        bytes_before=bytes_before,
        bytes_after=_bytes(embeddings, head),
        special_dropped=sum(token["special"] and token["id"] not in kept for token in spec["added_tokens"]),
        old_ids=old_ids,
    )
    return Trimmed(model, trimmed, report)


def _specification(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's JSON, of a kind that can be trimmed."""
    where, do = "trim_vocabulary", "leave the vocabulary as it is for this model"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(where, must="get a fast tokenizer (tokenizer.json)", got=type(tokenizer).__name__, do=do)
    spec: dict[str, Any] = json.loads(backend.to_str())
    kind = spec["model"].get("type")
    if kind != "BPE":
        reason = {
            "WordPiece": "WordPiece, in which an unseen word becomes [UNK]",
            "Unigram": "Unigram, which chooses among all pieces, so that a dropped one changes other texts",
        }
        raise InputError(where, must="get a BPE tokenizer", got=reason.get(kind, str(kind)), do=do)
    if spec["model"].get("continuing_subword_prefix") or spec["model"].get("end_of_word_suffix"):
        raise InputError(where, must="get BPE without word affixes", got="continuing_subword_prefix or suffix", do=do)
    missing = [token for token in _byte_tokens(spec) if token not in spec["model"]["vocab"]]
    if missing:
        got = f"{len(missing)} byte tokens missing, {missing[0]!r} first"
        raise InputError(where, must="get BPE that can spell every byte", got=got, do=do)
    return spec


def _byte_tokens(spec: dict[str, Any]) -> list[str]:
    """The 256 tokens that stand for one byte each: the alphabet of byte-level BPE, or ``<0x00>`` to ``<0xFF>``."""
    if "ByteLevel" in json.dumps([spec["pre_tokenizer"], spec["decoder"]]):
        return sorted(pre_tokenizers.ByteLevel.alphabet())
    if not spec["model"].get("byte_fallback"):
        got = "neither byte_fallback nor a ByteLevel alphabet, so that an unseen character is lost"
        do = "leave the vocabulary as it is for this model"
        raise InputError("trim_vocabulary", must="get BPE that can spell every byte", got=got, do=do)
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _all_tokens(spec: dict[str, Any]) -> dict[str, int]:
    return spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}


def _count(tokenizer: Any, texts: list[str]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for start in range(0, len(texts), _BATCH):
        for ids in tokenizer(texts[start : start + _BATCH], verbose=False)["input_ids"]:
            counts.update(ids)
    return counts


def _json_ids(tokenizer: Any, spec: dict[str, Any], tokens: dict[str, int]) -> set[int]:
    """Tokens that the tokenizer itself names: the unknown token, the post-processor's, the chat template's."""
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False) if tokenizer.chat_template else ""
    names = [token["content"] for token in spec["added_tokens"] if token["special"] and token["content"] in template]
    names += [spec["model"]["unk_token"]] if spec["model"].get("unk_token") else []
    for node in _processors(spec["post_processor"]):
        names += [name for special in node.get("special_tokens", {}).values() for name in special["tokens"]]
        names += [node[key][0] for key in ("sep", "cls") if key in node]
    return {tokens[name] for name in names}


def _processors(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    if node is None:
        return []
    if node["type"] == "Sequence":
        return [leaf for part in node["processors"] for leaf in _processors(part)]
    return [node]


def _config_ids(model: PreTrainedModel, tokens: dict[str, int]) -> set[int]:
    """Ids that the config and the generation config name; refuses what could not be renumbered."""
    ids: set[int] = set()
    known = set(tokens.values())
    for config in _configs(model):
        unmapped = [key for key in _UNMAPPED_KEYS if getattr(config, key, None)]
        if unmapped:
            do = f"set generation_config.{unmapped[0]} to None and add it again with the new ids"
            raise InputError("trim_vocabulary", must="renumber every id of the model", got=unmapped[0], do=do)
        for key, value in _id_items(config):
            found = {id_ for id_ in (value if isinstance(value, list) else [value]) if id_ >= 0}
            if found - known:
                got, do = f"{key} = {value}", f"set {key} to a token of this tokenizer, or to None"
                raise InputError("trim_vocabulary", must="find the config's ids in the tokenizer", got=got, do=do)
            ids |= found
    return ids


def _configs(model: PreTrainedModel) -> list[Any]:
    candidates = [model.config, model.config.get_text_config(), getattr(model, "generation_config", None)]
    unique = {id(config): config for config in candidates if config is not None}
    return list(unique.values())


def _id_items(config: Any) -> list[tuple[str, Any]]:
    values = {key: value for key, value in vars(config).items() if key.endswith(_ID_KEYS) and value is not None}
    return [(key, list(value) if isinstance(value, tuple) else value) for key, value in values.items()]


def _extra_ids(extra: Sequence[str], tokens: dict[str, int]) -> set[int]:
    for token in extra:
        if token not in tokens:
            near = [name for name in tokens if name[:1] == token[:1] and abs(len(name) - len(token)) < 2]
            do = did_you_mean(token, near[:_BATCH]) if near else "give tokens as the vocabulary spells them"
            raise InputError("trim_vocabulary: extra_tokens", must="be in the vocabulary", got=repr(token), do=do)
    return {tokens[token] for token in extra}


def _byte_ids(spec: dict[str, Any], tokens: dict[str, int]) -> set[int]:
    return {tokens[token] for token in _byte_tokens(spec)}


def _close(keep: set[int], spec: dict[str, Any], tokens: dict[str, int]) -> list[int]:
    """``keep`` with everything that its tokens are merged from, sorted."""
    halves: dict[int, list[int]] = {}
    for left, right in spec["model"]["merges"]:
        halves.setdefault(tokens[left + right], []).extend((tokens[left], tokens[right]))
    closed, open_ = set(keep), list(keep)
    while open_:
        for half in halves.get(open_.pop(), ()):
            if half not in closed:
                closed.add(half)
                open_.append(half)
    return sorted(closed)


def _build_tokenizer(
    tokenizer: Any, spec: dict[str, Any], tokens: dict[str, int], old_ids: list[int]
) -> PreTrainedTokenizerFast:
    new = {old: index for index, old in enumerate(old_ids)}
    model = dict(spec["model"])
    model["vocab"] = {token: new[old] for token, old in model["vocab"].items() if old in new}
    vocab = model["vocab"]
    model["merges"] = [[a, b] for a, b in model["merges"] if a in vocab and b in vocab and a + b in vocab]
    added = [token | {"id": new[token["id"]]} for token in spec["added_tokens"] if token["id"] in new]
    processor = json.loads(json.dumps(spec["post_processor"]))
    for node in _processors(processor):
        for special in node.get("special_tokens", {}).values():
            special["ids"] = [new[tokens[name]] for name in special["tokens"]]
        for key in ("sep", "cls"):
            if key in node:
                node[key][1] = new[tokens[node[key][0]]]
    changed = {"model": model, "added_tokens": added, "post_processor": processor, "padding": None, "truncation": None}
    backend = Tokenizer.from_str(json.dumps(spec | changed))
    wanted = {token: new[old] for token, old in tokens.items() if old in new}
    if backend.get_vocab() != wanted:
        wrong = sorted(set(backend.get_vocab().items()) ^ set(wanted.items()))[:2]
        raise GossamerError("trim_vocabulary", must="renumber the tokens without holes", got=str(wrong))
    extra = [token for token in tokenizer.extra_special_tokens if token in wanted]
    settings = {key: getattr(tokenizer, key) for key in _KEPT_SETTINGS}
    trimmed = PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=extra, **settings, **tokenizer.special_tokens_map
    )
    trimmed.chat_template = tokenizer.chat_template
    return trimmed


def _verify(old: Any, trimmed: Any, texts: list[str], old_ids: list[int]) -> None:
    """Texts whose tokens are all kept must get the same ones."""
    new = {old_id: index for index, old_id in enumerate(old_ids)}
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        pair = [tokenizer(batch, verbose=False)["input_ids"] for tokenizer in (old, trimmed)]
        for text, before, after in zip(batch, *pair, strict=True):
            if all(id_ in new for id_ in before) and [new[id_] for id_ in before] != after:
                got = f"another tokenization of {text[:60]!r}"
                do = "leave the vocabulary as it is for this tokenizer"
                raise GossamerError("trim_vocabulary", must="keep the tokens of the texts", got=got, do=do)


def _layers(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear | None]:
    """Input embeddings and head, plain ones."""
    where, do = "trim_vocabulary", "trim before quantising and before attaching adapters"
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embeddings, nn.Embedding) or not embeddings.weight.is_floating_point():
        raise InputError(where, must="get plain float embeddings", got=type(embeddings).__name__, do=do)
    if head is not None and (not isinstance(head, nn.Linear) or not head.weight.is_floating_point()):
        raise InputError(where, must="get a plain float head", got=type(head).__name__, do=do)
    rows = embeddings.num_embeddings
    if head is not None and head.out_features != rows:
        got = f"{rows} rows and {head.out_features} outputs"
        raise InputError(where, must="get embeddings and head of one size", got=got, do=do)
    for name, buffer in model.named_buffers():
        if name.endswith("final_logits_bias") and buffer.shape[-1] == rows:
            raise InputError(where, must="get no other vocabulary-sized tensor", got=name, do="leave this model")
    for name, module in model.named_modules():
        other = isinstance(module, nn.Embedding) and module.weight is not embeddings.weight
        if other and "token" in name and module.num_embeddings == rows:
            raise InputError(where, must="get no other vocabulary-sized tensor", got=name, do="leave this model")
    return embeddings, head


def _bytes(embeddings: nn.Embedding, head: nn.Linear | None) -> int:
    tensors = [embeddings.weight]
    if head is not None and head.weight is not embeddings.weight:
        tensors.append(head.weight)
    if head is not None and head.bias is not None:
        tensors.append(head.bias)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def _select_rows(model: PreTrainedModel, embeddings: nn.Embedding, head: nn.Linear | None, old_ids: list[int]) -> None:
    """Keep the rows ``old_ids`` inside the same Parameters, so that ties, scales and requires_grad stay."""
    rows, size = embeddings.num_embeddings, len(old_ids)
    new = {old: index for index, old in enumerate(old_ids)}
    index = torch.tensor(old_ids, device=embeddings.weight.device)
    tied = head is not None and head.weight is embeddings.weight
    embeddings.weight.data = embeddings.weight.data[index]
    if head is not None:
        if not tied:
            head.weight.data = head.weight.data[index]
        if head.bias is not None:
            head.bias.data = head.bias.data[index]
        head.out_features = size
    modules: list[Any] = list(model.modules())
    for module in modules:
        shares = isinstance(module, nn.Embedding) and module.weight is embeddings.weight
        if shares:
            module.num_embeddings = size
        if (shares or not isinstance(module, nn.Embedding)) and isinstance(getattr(module, "padding_idx", None), int):
            module.padding_idx = new.get(module.padding_idx)
        if getattr(module, "vocab_size", None) == rows:
            module.vocab_size = size
    model.config.get_text_config().vocab_size = size
    for config in _configs(model):
        for key, value in _id_items(config):
            setattr(
                config, key, [new.get(id_, id_) for id_ in value] if isinstance(value, list) else new.get(value, value)
            )
        for key in _SUPPRESS_KEYS:
            if getattr(config, key, None):
                setattr(config, key, [new[id_] for id_ in getattr(config, key) if id_ in new])
