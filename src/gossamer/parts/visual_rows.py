"""Rows ``{"image", "question" or "prompt", "answer"}`` as batches of a vision-language model, padded on the left.

A question goes through the processor's chat template where it has one, the answer then stands as the template writes
it. A prompt is taken as it is, the answer right behind it, the end token last; an image token that it lacks is put in
front. ``image`` is a PIL image, a path, or None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import InputError

IGNORED = -100  # label of a token that bears no loss


def visual_batch(rows: Sequence[Mapping[str, Any]], processor: Any) -> dict[str, Tensor]:
    """What ``model(**batch)`` takes: input_ids, attention_mask, labels [b, t] (-100 before the answer), pixel_values.

    Raises InputError for a row without a question or an answer.
    """
    if not rows:
        raise InputError("visual rows", must="be at least one", got="none")
    ids, labels = list[Tensor](), list[Tensor]()
    images: dict[str, list[Tensor]] = {}
    for number, row in enumerate(rows):
        prompt, answer = row_texts(row, processor, f"row {number}")
        picture = _picture(row.get("image"))
        given = {"text": [prompt]} if picture is None else {"text": [prompt], "images": [picture]}
        found = processor(**given, return_tensors="pt")
        asked = found["input_ids"][0]
        said = torch.tensor(processor.tokenizer(answer, add_special_tokens=False)["input_ids"], dtype=torch.long)
        ids.append(torch.cat([asked, said]))
        labels.append(torch.cat([torch.full_like(asked, IGNORED), said]))
        for key, value in found.items():
            if picture is not None and (key.startswith("pixel") or key == "image_sizes"):
                images.setdefault(key, []).append(value)
    pad = processor.tokenizer.pad_token_id or 0
    batch = {
        "input_ids": _left(ids, pad),
        "attention_mask": _left([torch.ones_like(row) for row in ids], 0),
        "labels": _left(labels, IGNORED),
    }
    return batch | {key: torch.cat(values) for key, values in images.items()}


def row_texts(row: Mapping[str, Any], processor: Any, where: str) -> tuple[str, str]:
    """Prompt, image token included, and answer with its end token."""
    asked, answer = row.get("prompt") or row.get("question"), row.get("answer")
    if not isinstance(asked, str) or not asked.strip() or not isinstance(answer, str) or not answer.strip():
        do = 'give {"image": ..., "question": ..., "answer": ...}'
        raise InputError(where, must="have a question and an answer with text in them", got=sorted(row), do=do)
    tokenizer, token = processor.tokenizer, processor.image_token
    if row.get("prompt") is None and getattr(processor, "chat_template", None):
        parts = [{"type": "image"}] if row.get("image") is not None else []
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": asked}]}
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        prompt = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        both = processor.apply_chat_template([turn, reply], tokenize=False)
        if both.startswith(prompt):
            return prompt, both.removeprefix(prompt)
    missing = row.get("image") is not None and token not in asked
    return (token + asked if missing else asked), answer + (tokenizer.eos_token or "")


def _picture(image: Any) -> Any:
    if image is None or not isinstance(image, str):
        return image
    from PIL import Image

    return Image.open(image).convert("RGB")


def _left(rows: Sequence[Tensor], fill: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.stack([torch.cat([torch.full((width - len(row),), fill, dtype=row.dtype), row]) for row in rows])
