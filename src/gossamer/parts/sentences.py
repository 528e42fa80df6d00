"""Sentence vectors from an encoder: mean over the real tokens of the last layer, then length 1.

    v = sum_t m_t h_t / sum_t m_t,    e = v / ||v||

with h [b, t, d] the last hidden state and m [b, t] the attention mask. Source: Reimers and Gurevych 2019
(Sentence-BERT); the pooling that all-MiniLM-L6-v2 was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def encode_texts(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 32) -> torch.Tensor:
    """Unit vectors [n, d], float32, on the model's device, in the order of ``texts``; [0, d] for no texts.

    Texts beyond the tokenizer's ``model_max_length`` or the model's positions are cut. Texts of like length share a
    batch, so that padding costs little.
    """
    limit = min(
        tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    )
    vectors = torch.zeros(len(texts), model.config.hidden_size, device=model.device)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(model.device)
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        means = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        vectors[rows] = torch.nn.functional.normalize(means, dim=-1)
    return vectors
