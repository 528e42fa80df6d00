"""Greedy texts for many prompts: left-padded batches that stop when every row has its line.

Prompts are sorted by length, so that a batch holds little padding, and the answers come back in the order given. In
float32 the answers are those of one prompt at a time; in bfloat16 a batch may round differently where two tokens tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from gossamer.core.errors import InputError

# each one is set because generate() fills what is unset from the checkpoint's own generation_config
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


class LineStop(StoppingCriteria):
    """A row is done when its new text holds a non-blank line that a newline ends. ``ends[row]`` is its token count."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int, rows: int) -> None:
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.ends: list[int | None] = [None] * rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """input_ids [rows, prompt + new] -> bool [rows]."""
        new = input_ids[:, self.prompt_length :]
        for row, end in enumerate(self.ends):
            if end is None and "\n" in str(self.tokenizer.decode(new[row], skip_special_tokens=True)).lstrip():
                self.ends[row] = new.shape[1]
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    stop_at_newline: bool = True,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[str]:
    """The greedy continuation of each prompt, special tokens removed, in the order of ``prompts``.

    With ``stop_at_newline`` a row ends with the token that completes its first non-blank line (cut the text with
    ``metrics.cut_first_line``). ``progress(done, total)`` is called after each batch; ``options`` go to
    ``model.generate`` (e.g. ``logits_processor``). Tokenizer, training mode and random state are left as they were.

    Raises InputError for a prompt that gives no token, or with its answer does not fit the model's positions.
    """
    encoded = [_encode(tokenizer, prompt, number) for number, prompt in enumerate(prompts)]
    _check_lengths(model, encoded, max_new_tokens)
    order = sorted(range(len(encoded)), key=lambda number: -len(encoded[number]))
    texts = [""] * len(encoded)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            answers = _batch(model, tokenizer, [encoded[i] for i in chosen], max_new_tokens, stop_at_newline, options)
            for number, answer in zip(chosen, answers, strict=True):
                texts[number] = answer
            if progress is not None:
                progress(start + len(chosen), len(order))
    finally:
        model.train(training)
    return texts


def few_shot_prompt(examples: Sequence[tuple[str, str]], prompt: str, separator: str = "\n\n") -> str:
    """Worked examples, each ``prompt + answer``, before ``prompt``; prompts hold their own final space or line."""
    return "".join(question + answer + separator for question, answer in examples) + prompt


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: Any = None) -> dict[str, torch.Tensor]:
    """Token lists -> input_ids and attention_mask, both int64 [rows, longest], padded on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the generation config's, else the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if configured is not None else tokenizer.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def greedy_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> GenerationConfig:
    """Plain greedy decoding, whatever the checkpoint's own generation_config says; ``options`` are set on top."""
    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    return GenerationConfig(**GREEDY, eos_token_id=ends or None, pad_token_id=pad, **options)


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    max_new_tokens: int,
    stop_at_newline: bool,
    options: dict[str, Any],
) -> list[str]:
    config = greedy_config(model, tokenizer, max_new_tokens=max_new_tokens)
    inputs = left_pad(rows, config.pad_token_id, model.device)
    length = inputs["input_ids"].shape[1]
    stop = LineStop(tokenizer, length, len(rows))
    if stop_at_newline:
        options = {**options, "stopping_criteria": [*options.get("stopping_criteria", ()), stop]}
    generate: Any = model.generate
    new = generate(**inputs, generation_config=config, **options)[:, length:].tolist()
    ends = set(end_ids(model, tokenizer))
    return [_text(tokenizer, tokens[:end], ends) for tokens, end in zip(new, stop.ends, strict=True)]


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: set[int]) -> str:
    # what follows the end is padding, and a pad token need not be a special one
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return str(tokenizer.decode(tokens[:end], skip_special_tokens=True))


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, number: int) -> list[int]:
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise InputError(f"prompt {number}", must="give at least one token", got=repr(prompt), do="write some text")
    return ids


def _check_lengths(model: PreTrainedModel, encoded: list[list[int]], max_new_tokens: int) -> None:
    room = getattr(model.config, "max_position_embeddings", None)
    for number, ids in enumerate(encoded):
        if room is not None and len(ids) + max_new_tokens > room:
            raise InputError(
                f"prompt {number}",
                must=f"fit, with {max_new_tokens} new tokens, the model's {room} positions",
                got=f"{len(ids)} tokens",
                do="shorten the prompt or use fewer examples",
            )
