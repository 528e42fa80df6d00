"""Medusa: independent heads that guess tokens 2, 3, ... places ahead from one state of the base.

    head k    logits of token n+1+k from W_lm (h_n + SiLU(L_k h_n)),    L_k: d -> d, zero at the start

No head knows what the others guess: the children of all places of a level are alike. The baseline that the regressive
drafters are measured against, with the base's own output matrix shared by all heads (the paper: one a head), trained on
L = sum_k 0.8^k CE_k (Cai et al. 2024, arXiv 2401.10774).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.options import Config, option
from gossamer.kinds.drafting import DraftState, FittedDrafter
from gossamer.parts.draft_layer import layer_shape
from gossamer.parts.draft_trees import Source, beam_tree, static_tree
from gossamer.parts.drafter_training import Batch, Targets
from gossamer.parts.requests import Draft

CARD = Card(
    title="Medusa heads",
    year=2024,
    paper="2401.10774",
    claim="several tokens a step from independent heads, with the very text of plain decoding",
    traits=("lossless", "needs_fit"),
    provides=("decoder_set",),
    forbids=("decoder_set",),
    builtin=True,
)
DECAY = 0.8


class MedusaConfig(Config):
    heads: int = option(4, "heads, one for each place ahead", ge=1)
    tree: str = option("static", "EAGLE's tree of 25 tokens, or the best tokens of a beam", choices=("static", "beam"))
    top_k: int = option(8, "beam: places that are looked at on a level", ge=1)
    total_tokens: int = option(24, "beam: tokens of a tree", ge=1)
    labels: str = option("base_soft", "what the heads learn", choices=("text", "base_argmax", "base_soft"))
    draft_vocab: int | None = option(None, "draft only this many frequent tokens; all where not given", ge=2)
    steps: int = option(400, "training steps", ge=1)
    batch_size: int = option(8, "windows a step", ge=1)
    rate: float = option(1e-3, "peak learning rate (AdamW, cosine)", gt=0)
    length: int = option(256, "longest window of training", ge=8)
    switch_off: bool = option(True, "stop guessing while it is slower than plain steps", effect="speed")


class Medusa(FittedDrafter):
    config_class = MedusaConfig
    config: MedusaConfig

    @property
    def draft_tokens(self) -> int:
        return 25 if self.config.tree == "static" else self.config.total_tokens

    def build(self, model: Any) -> nn.Module:
        return _Module(layer_shape(model).width, self.config.heads)

    def loss(self, module: Any, batch: Batch, targets: Targets) -> Tensor:
        losses = [
            DECAY**k * targets.loss(self.reading(z), k)
            for k, z in enumerate(module(batch.states[0]).unbind(0), 1)
        ]  # fmt: skip
        return torch.stack(losses).sum()

    def source(self, state: DraftState) -> Source:
        news = state.take()
        if news.shape[1]:
            state.last["h"] = news[0, -1]
        return _Source(self, state.last["h"])

    def tree(self, source: Source, floor: float) -> Draft:
        if self.config.tree == "static":
            return static_tree(source, self.config.heads)
        return beam_tree(source, self.config.heads, self.config.top_k, self.config.total_tokens, floor)


class _Source:
    def __init__(self, system: Medusa, h: Tensor) -> None:
        self.vocabulary = system.reading.vocabulary
        self.table = system.logits(system.module(h)).log_softmax(-1)  # [heads, v]

    def root(self) -> Tensor:
        return self.table[0]

    def expand(self, parents: Sequence[int], tokens: Sequence[int], depth: int) -> Tensor:
        return self.table[depth].expand(len(tokens), -1)


class _Module(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        linears = [nn.Linear(width, width) for _ in range(heads)]
        for linear in linears:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.heads = nn.ModuleList(linears)

    def forward(self, h: Tensor) -> Tensor:
        """h [..., d] -> [heads, ..., d]."""
        return torch.stack([h + nn.functional.silu(head(h)) for head in self.heads])
