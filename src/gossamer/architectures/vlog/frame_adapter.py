"""The trained adapter of the retrieval baseline: a small transformer over the frames, without any query."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gossamer.core.errors import OptionError


class FrameAdapter(nn.Module):
    """Baseline: two transformer layers over frames [b, T, H], normalised after each part, sine positions on q and k."""

    def __init__(self, width: int, layers: int = 2, heads: int = 8, inner: int = 2048, dropout: float = 0.1) -> None:
        super().__init__()
        if width % heads:
            raise OptionError("vlog.method", must=f"fit the width {width}: 'adapter' has {heads} heads", got="adapter")
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(width, heads, dropout, batch_first=True) for _ in range(layers)
        )
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, width))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.dropout = nn.Dropout(dropout)
        self.path = dropout

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        places = sine_positions(x.shape[1], x.shape[2]).to(x)
        for layer, (attention, feed) in enumerate(zip(self.attention, self.feed, strict=True)):
            query = x + places
            seen = attention(query, query, x, key_padding_mask=~mask, need_weights=False)[0]
            x = self.norms[2 * layer](x + self._drop_path(self.dropout(seen)))
            x = self.norms[2 * layer + 1](x + self._drop_path(self.dropout(feed(x))))
        return x

    def _drop_path(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.path
        return x * kept / (1 - self.path)


def sine_positions(length: int, width: int) -> Tensor:
    """[length, width]: sine in the even, cosine in the odd columns, wave lengths from 2 pi to 10000 x 2 pi."""
    rates = torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
