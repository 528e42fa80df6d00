"""Chimera: a drafter that sees all earlier tokens, the near ones as a trigram and the far ones through the base.

Of a text of n tokens the base gives its last states h_1..h_n (normed, as its output matrix W_lm takes them) and the
next token; e_t are its embeddings [d].

    trigram encoder    g_t = E([e_{t-2} ; e_{t-1} ; e_t])           E: 3d -> d; the first tokens repeat token 1
    fast layer         u_{n+1} = one decoder layer at the end of h_1..h_n, g_{n+1}, causal, rotary positions
    head k             logits of token n+1+k from W_lm A_k [h_n ; u_{n+k}]     A_k: 2d -> d, [I, I] at the start

u_{n+1} plays the part of the unknown h_{n+1}: the next place is drafted at the end of h_1..h_n, u_{n+1}, g_{n+2}. E is
an MLP 3d -> d -> d, or with ``encoder="residual"`` W(x + SiLU(L x)) with L zero at the start.

Training, all places of a window at once: block k holds g of the tokens that heads below k would draft; its query at
index i sees h_j for j <= i, the u of earlier blocks at index i, and itself. With c_i the label at place i

    L = sum_k CE(head k at i, c_{i+k}) + mse_weight mean (u_{i+1} - h_{i+1})^2

labels being the text, the base's best token or its distribution. The tree is EAGLE's of 25 tokens, or the best tokens
of a beam; verification is :mod:`gossamer.parts.speculation`'s.

Different from the paper: W_lm is shared and each head is a 2d -> d map before it (the paper: a matrix 2d -> V a head).
Deeper than there are heads the last one goes on. ``encoder="token"`` and ``full_context=False`` are the ablations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.options import Config, option
from gossamer.kinds.drafting import DraftState, FittedDrafter
from gossamer.parts.draft_layer import DraftLayer, layer_shape
from gossamer.parts.draft_trees import Source, beam_tree, static_tree
from gossamer.parts.drafter_training import Batch, Targets
from gossamer.parts.requests import Draft

CARD = Card(
    title="Chimera",
    paper="2402.15758",
    year=2024,
    claim="at the same training and tree, more tokens accepted a step than Medusa heads, whose text is kept exactly",
    traits=("lossless", "needs_fit"),
    provides=("decoder_set",),
    forbids=("decoder_set",),
    limits="speeds of 7B models on a GPU are not shown",
)


class ChimeraConfig(Config):
    heads: int = option(4, "decoding heads", ge=1)
    encoder: str = option("mlp", "of the last tokens: an MLP, the released block, or the last token alone",
                          choices=("mlp", "residual", "token"))  # fmt: skip
    full_context: bool = option(True, "use the fast layer over the base's states")
    tree: str = option("static", "EAGLE's tree of 25 tokens, or the best tokens of a beam", choices=("static", "beam"))
    depth: int = option(5, "longest path of a tree", ge=1)
    top_k: int = option(8, "beam: places that are looked at on a level", ge=1)
    total_tokens: int = option(24, "beam: tokens of a tree", ge=1)
    labels: str = option("base_soft", "what the heads learn", choices=("text", "base_argmax", "base_soft"))
    mse_weight: float = option(0.0, "weight of the distance between u and the base's state", ge=0)
    draft_vocab: int | None = option(None, "draft only this many frequent tokens; all where not given", ge=2)
    steps: int = option(400, "training steps", ge=1)
    batch_size: int = option(8, "windows a step", ge=1)
    rate: float = option(1e-3, "peak learning rate (AdamW, cosine)", gt=0)
    length: int = option(256, "longest window of training", ge=8)
    switch_off: bool = option(True, "stop guessing while it is slower than plain steps", effect="speed")


class Chimera(FittedDrafter):
    config_class = ChimeraConfig
    config: ChimeraConfig

    @property
    def draft_tokens(self) -> int:
        return 25 if self.config.tree == "static" else self.config.total_tokens

    def build(self, model: Any) -> nn.Module:
        return _Module(model, self.config)

    def loss(self, module: Any, batch: Batch, targets: Targets) -> Tensor:
        h, total = batch.states[0], torch.zeros(())
        for k, (z, u) in enumerate(module.unrolled(batch.ids, h, self._best), 1):
            total = total + targets.loss(self.reading(z), k)
            if self.config.mse_weight:
                there = batch.counts[:, k:, None]
                gap = ((u[:, : h.shape[1] - k] - h[:, k:]).pow(2) * there).sum() / (there.sum() * h.shape[-1])
                total = total + self.config.mse_weight * gap
        return total

    def source(self, state: DraftState) -> Source:
        news = state.take()
        if news.shape[1]:
            if self.config.full_context:
                memory = state.memories[0]
                self.module.layer.remember(news[0], memory.length, memory)
            state.last["h"] = news[0, -1]
        return _Source(self, state)

    def tree(self, source: Source, floor: float) -> Draft:
        if self.config.tree == "static":
            return static_tree(source, self.config.depth)
        return beam_tree(source, self.config.depth, self.config.top_k, self.config.total_tokens, floor)

    def _best(self, z: Tensor) -> Tensor:
        return self.reading.tokens(self.reading(z).argmax(-1))


class _Source:
    """One request's tree: every expanded place has its last three tokens, its u in the layer's memory, and what it
    sees of the draft."""

    def __init__(self, system: Chimera, state: DraftState) -> None:
        self.system, self.module, self.memory = system, system.module, state.memories[0]
        self.vocabulary = system.reading.vocabulary
        self.h, self.start = state.last["h"], state.past.length
        self.memory.crop(self.memory.length)
        ids = state.ids
        self.tokens = [[ids[max(0, self.start - 2)], ids[max(0, self.start - 1)]]]  # before the root's token
        self.root_token = ids[self.start]
        self.seen = torch.zeros(0, 0, dtype=torch.bool)  # [expanded, expanded], the root first

    def root(self) -> Tensor:
        return self._run([0], [self.root_token], 0)[0]

    def expand(self, parents: Sequence[int], tokens: Sequence[int], depth: int) -> Tensor:
        return self._run([parent + 1 for parent in parents], tokens, depth)

    def _run(self, parents: Sequence[int], tokens: Sequence[int], depth: int) -> Tensor:
        """Places after rows ``parents`` of what was expanded (``depth`` 0: the root itself)."""
        before = self.tokens if depth == 0 else self.tokens[1:]
        grams = [[*before[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        self.tokens += [gram[1:] for gram in grams]
        g = self.module.encode(torch.tensor(grams, device=self.h.device))
        u = self._look(g, parents, depth) if self.system.config.full_context else g
        z = self.module.head(min(depth + 1, self.system.config.heads), self.h.expand_as(u), u)
        return self.system.logits(z).log_softmax(-1)

    def _look(self, g: Tensor, parents: Sequence[int], depth: int) -> Tensor:
        layer, n, old = self.module.layer, len(g), len(self.seen)
        positions = torch.full((n,), self.start + depth, device=g.device)
        above = torch.zeros(n, old, dtype=torch.bool)
        if depth:
            above = self.seen[list(parents)]
        q, k, v = layer.project(g, positions)
        keys, values = self.memory.entries()
        itself = torch.eye(n, dtype=torch.bool)
        visible = torch.cat((torch.ones(n, self.memory.length, dtype=torch.bool), above, itself), 1).to(g.device)
        u: Tensor = layer.finish(g, layer.attend(q, torch.cat((keys, k)), torch.cat((values, v)), visible))
        _, k, v = layer.project(u, positions)
        self.memory.add(k, v, settle=False)
        grown = torch.zeros(old + n, old + n, dtype=torch.bool)
        grown[:old, :old], grown[old:, :old], grown[old:, old:] = self.seen, above, itself
        self.seen = grown
        return u


class _Module(nn.Module):
    def __init__(self, model: Any, config: ChimeraConfig) -> None:
        super().__init__()
        shape = layer_shape(model)
        d, self.kind = shape.width, config.encoder
        # the base's own module, so that Gemma's scale is in it; not saved with the drafter
        self._embed: list[Any] = [model.get_input_embeddings()]
        if config.encoder == "mlp":
            self.encoder: nn.Module = nn.Sequential(nn.Linear(3 * d, d), nn.SiLU(), nn.Linear(d, d, bias=False))
        elif config.encoder == "residual":
            self.encoder = nn.Sequential(_Residual(3 * d), nn.Linear(3 * d, d, bias=False))
        else:
            self.encoder = nn.Linear(d, d, bias=False)
        self.layer: DraftLayer | None = DraftLayer(shape) if config.full_context else None
        linears = [nn.Linear(2 * d, d, bias=False) for _ in range(config.heads)]
        with torch.no_grad():
            for linear in linears:
                linear.weight.copy_(torch.eye(d).repeat(1, 2))
        self.heads = nn.ModuleList(linears)

    def encode(self, grams: Tensor) -> Tensor:
        """Token ids [..., 3] -> g [..., d]."""
        with torch.no_grad():
            e = self._embed[0](grams[..., -1:] if self.kind == "token" else grams).float()
        g: Tensor = self.encoder(e.flatten(-2))
        return g

    def head(self, k: int, h: Tensor, u: Tensor) -> Tensor:
        """What W_lm reads for head k (from 1): h, u [..., d] -> [..., d]."""
        z: Tensor = self.heads[k - 1](torch.cat((h, u), -1))
        return z

    def unrolled(self, ids: Tensor, h: Tensor, best: Any) -> list[tuple[Tensor, Tensor]]:
        """For each head its z [b, n - 1, d] and u [b, n - 1, d], at all places of the text that have a next token."""
        n = ids.shape[1] - 1
        h = h[:, :n]
        grams = torch.stack((torch.cat((ids[:, :1], ids[:, : n - 1]), 1), ids[:, :n], ids[:, 1:]), -1)
        past, chain, found = None, list[tuple[Tensor, Tensor]](), list[tuple[Tensor, Tensor]]()
        for k in range(1, len(self.heads) + 1):
            u = self.encode(grams)
            if self.layer is not None:
                places = torch.arange(n, device=ids.device)
                past = self.layer.project(h, places)[1:] if past is None else past
                u = self.layer.chained(u, places + k, past, chain)
                _, keys, values = self.layer.project(u.detach(), places + k)
                chain.append((keys, values))
            z = self.head(k, h, u)
            found.append((z, u))
            if k < len(self.heads):
                with torch.no_grad():
                    grams = torch.cat((grams[..., 1:], best(z)[..., None]), -1)
        return found


class _Residual(nn.Module):
    """x + SiLU(L x), the identity at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))
