"""Log-probabilities of answers and texts, with logits only where something is scored.

    sequence_logprobs   log p(y|x) = sum_t log p(y_t | x, y_<t)          one number for each row of a batch
    score_choices       the same for several answers to one prompt, whose keys and values are computed once
    perplexity          exp(mean nll) and bits per byte = sum nll / (ln 2 * UTF-8 bytes), over whole texts

Bits per byte compare models with different vocabularies; perplexities and nll per token do not. All sums are float32
or better, and padding on either side changes nothing.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from gossamer.core.errors import InputError
from gossamer.parts.data_batch import Collator, forward_parameters
from gossamer.parts.data_loss import label_mask, supervised_logits, token_nll
from gossamer.parts.data_tokens import IGNORE, Example, Prompt, encode_border, encode_prompt, prefix_ids


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """``nll_per_token`` in nats; ``tokens`` scored and the UTF-8 ``bytes`` that they stand for."""

    ppl: float
    nll_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class ChoiceScores:
    """For each choice: log-probability in nats [c], its tokens [c] and UTF-8 bytes [c] (for length norms)."""

    logprobs: Tensor
    tokens: Tensor
    bytes: Tensor

    def best(self, norm: str = "none") -> int:
        """Index of the likeliest choice: ``norm`` "none", "tokens" (mean per token) or "bytes"."""
        lengths = {"none": torch.ones_like(self.tokens), "tokens": self.tokens, "bytes": self.bytes}
        return int((self.logprobs / lengths[norm]).argmax())


def sequence_logprobs(
    model: Any, batch: Mapping[str, Any], *, average: bool = False, chunk: int | None = None
) -> Tensor:
    """Log-probability of the labelled tokens of each row, [b] float32; differentiable. Float weights do not enter.

    ``average`` divides by the number of labelled tokens (of a row without any: 0). ``chunk`` rows run at a time, which
    bounds memory where no gradient is kept. A packed batch is refused: its rows hold several sequences.
    """
    if batch.get("segment_ids") is not None:
        raise InputError("sequence_logprobs", must="get one sequence a row", got="a packed batch", do="do not pack it")
    rows = batch["labels"].shape[0]
    step = chunk or rows
    parts = [_row_logprobs(model, _rows_of(batch, at, at + step), average) for at in range(0, rows, step)]
    return torch.cat(parts)


@torch.no_grad()
def score_choices(
    model: Any, tokenizer: Any, prompt: Prompt, choices: Sequence[str], *, batch_size: int = 16
) -> ChoiceScores:
    """Score each choice as what follows ``prompt`` (a string, or messages before an assistant turn). No eos is scored.

    A choice after a string carries its own leading space, as in the text. The prompt runs once; models whose cache is
    not one of keys and values run the whole sequences instead. The model is in eval mode meanwhile.
    """
    if not choices or not all(choices):
        raise InputError("choices", must="be at least one non-empty text", got=list(choices), do="leave empty ones out")
    head = encode_prompt(prompt, tokenizer)
    answers = [encode_border(prompt, text, tokenizer)[1] for text in choices]
    if not head:
        do = "give a prompt, or a tokenizer that adds a bos token"
        raise InputError("prompt", must="have at least one token", got="none", do=do)
    with _evaluating(model):
        cache = _prefix_cache(model, head[:-1])
        start = len(head) - 1 if cache is not None else 0
        rows = [_answer_example(head[start:], answer) for answer in answers]
        parts = [
            _score_rows(model, tokenizer, rows[at : at + batch_size], cache, start)
            for at in range(0, len(rows), batch_size)
        ]
    tokens = torch.tensor([len(answer) for answer in answers])
    return ChoiceScores(torch.cat(parts), tokens, torch.tensor([len(choice.encode()) for choice in choices]))


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 512,
    stride: int | None = None,
    batch_size: int = 4,
) -> Perplexity:
    """Perplexity over whole texts: every token is scored once, texts do not see one another.

    Texts longer than a window of ``max_length`` tokens run in several; each begins with the tokenizer's bos token (or
    eos, for a tokenizer without one) and moves on by ``stride`` tokens (default: no overlap), so that a smaller stride
    gives each token more context and costs more.
    """
    texts = [text for text in texts if text]
    prefix = (
        prefix_ids(tokenizer)
        or [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    )
    room = max_length - len(prefix)
    stride = room if stride is None else stride
    if not texts:
        raise InputError("texts", must="hold at least one non-empty text", got="none")
    if not prefix:
        do = "set tokenizer.bos_token or tokenizer.eos_token, so that the first token can be predicted"
        raise InputError("tokenizer", must="have a bos or eos token", got="neither", do=do)
    if not 1 <= stride <= room:
        raise InputError("stride", must=f"be from 1 to {room} (max_length less the bos token)", got=stride)
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    windows = [window for row in ids for window in _windows(row, prefix, room, stride)]
    if not windows:
        raise InputError("texts", must="give at least one token", got="none")
    windows.sort(key=lambda window: len(window.input_ids))
    collate = Collator(tokenizer)
    total, tokens = 0.0, 0
    with _evaluating(model):
        for at in range(0, len(windows), batch_size):
            logits, targets, _ = supervised_logits(model, _to(model, collate(windows[at : at + batch_size])))
            total += float(token_nll(logits, targets).double().sum())
            tokens += len(targets)
    size = sum(len(text.encode()) for text in texts)
    mean = total / tokens
    return Perplexity(math.exp(min(mean, 700.0)), mean, total / math.log(2) / size, tokens, size)


def _row_logprobs(model: Any, batch: Mapping[str, Any], average: bool) -> Tensor:
    logits, targets, _ = supervised_logits(model, batch)
    mask = label_mask(batch["labels"])
    rows = mask.nonzero()[:, 0]
    zeros = torch.zeros(len(mask), device=logits.device)
    sums = zeros.index_add(0, rows, -token_nll(logits, targets))
    return sums / mask.sum(dim=1).clamp(min=1) if average else sums


def _rows_of(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    rows = batch["labels"].shape[0]
    return {
        key: item[start:stop] if isinstance(item, Tensor) and item.dim() and item.shape[0] == rows else item
        for key, item in batch.items()
    }


def _prefix_cache(model: Any, ids: Sequence[int]) -> DynamicCache | None:
    """Keys and values of the prompt; None where the model keeps none (recurrent layers) or there is no prompt."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    attends = all(kind in ("full_attention", "sliding_attention") for kind in kinds)
    if not ids or not attends or "past_key_values" not in forward_parameters(model):
        return None
    # without a config all layers keep everything: exact with sliding windows too, whose mask does the work
    cache = DynamicCache()
    inputs = torch.tensor([list(ids)], device=_device(model))
    out = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), past_key_values=cache, use_cache=True)
    filled = getattr(out, "past_key_values", None) is cache and cache.get_seq_length() == len(ids)
    return cache if filled else None


def _score_rows(model: Any, tokenizer: Any, rows: Sequence[Example], cache: DynamicCache | None, start: int) -> Tensor:
    batch = _to(model, Collator(tokenizer)(rows))
    if cache is not None:
        mine = copy.deepcopy(cache)
        mine.batch_repeat_interleave(len(rows))
        seen = torch.ones(len(rows), start, dtype=torch.long, device=batch["attention_mask"].device)
        batch["attention_mask"] = torch.cat([seen, batch["attention_mask"]], dim=1)
        batch["position_ids"] = batch["position_ids"] + start
        batch.update(past_key_values=mine, use_cache=True)
    return _row_logprobs(model, batch, average=False).cpu()


def _answer_example(head: Sequence[int], answer: Sequence[int]) -> Example:
    labels = [IGNORE] * len(head) + list(answer)
    return Example([*head, *answer], labels, [float(label != IGNORE) for label in labels])


def _windows(ids: Sequence[int], prefix: Sequence[int], room: int, stride: int) -> Iterator[Example]:
    """Windows of the prefix and at most ``room`` tokens; each token is labelled in the first window that holds it."""
    done = 0
    for start in range(0, len(ids), stride):
        stop = min(start + room, len(ids))
        known = len(prefix) + done - start
        row = [*prefix, *ids[start:stop]]
        labels = [IGNORE] * known + row[known:]
        yield Example(row, labels, [float(label != IGNORE) for label in labels])
        done = stop
        if stop == len(ids):
            return


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode for every module, and each module's own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _to(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    device = _device(model)
    return {key: item.to(device) for key, item in batch.items()}


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
