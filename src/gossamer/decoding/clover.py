"""Clover: heads that know what the earlier heads guessed, over one look at the whole context a step.

Of place t the base gives its state before the final norm x_t, after it h_t, and the next token y_{t+1} is known. e(y)
are the unscaled rows of the base's output matrix W_lm.

    regressive block   R(s, e) = s + concat_heads( cos(q_head, k_head) v_head ),  q = W_q N(s), k = W_k e, v = W_v e
    augmenting block   s_t = R_0(x_t, e(y_{t+1})),  c^0_t = N(decoder layers over s_1..s_t)     once a step
    head 0             f = N(A c^0)                                           for token t+2
    head i             c^i = R_2(c^{i-1}, e(y^i)),  f = N(B [c^i ; e(y^i)])   for token t+2+i, y^i guessed by head i-1

with logits W_lm f. One key has nothing to compete with, so a softmax over it would be 1 always: the cosine gates it.
W_q, W_k are I + U(0, 0.01), W_v is U(0, 0.01), A = I, B = [I, 0], the layers and norms those of the base at its end.
R_2 and B are shared by the heads from 1 on.

Training is teacher-forced: head i at t is given y_{t+1+i} of the text, with the base's h_{t+1+i} as its aim:

    L = sum_i decay^i ( feat_weight SmoothL1(f, h_{t+1+i}) / scale^2 + CE(label at t+1+i, softmax W_lm f) )

``scale`` is the root mean square of h over the first windows, as the weights assume a scale near 1. With
``filter_top`` places whose text token is not among the base's own best 8, or not in its top-p 0.8, do not count.

Trees: ``clover`` spends a budget by joint probability, each place's tokens cut at a cumulative ``top_p`` and at
``ratio`` times the best; or EAGLE's static tree, or a beam (``eagle2``). ``version=1`` has one augmenting layer and
text labels alone, without the paper's second key (the released code is version 2). ``regressive=False`` (e is zero for
the heads) and ``layers=0`` (no augmenting layer) are the ablations. The context layers see all of the past, without
sliding windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.kinds.drafting import DraftState, FittedDrafter
from gossamer.parts.decode_plan import NotPlanned, read_plan
from gossamer.parts.decode_state import BEFORE_NORM
from gossamer.parts.draft_layer import DraftLayer, Memory, Rms, layer_shape
from gossamer.parts.draft_trees import Source, beam_tree, budget_tree, static_tree
from gossamer.parts.drafter_training import Batch, Reading, Targets
from gossamer.parts.requests import Draft

CARD = Card(
    title="Clover",
    paper="2405.00263",
    year=2024,
    claim="at a budget of four drafted tokens, more of them accepted a step than of independent Medusa heads",
    traits=("lossless", "needs_fit"),
    provides=("decoder_set",),
    forbids=("decoder_set",),
    limits="the throughput of a 100B server is not shown",
)
NOISE = 0.01


class CloverConfig(Config):
    heads: int = option(5, "tokens that are guessed one after another", ge=1)
    layers: int = option(2, "decoder layers of the augmenting block", ge=0, le=8)
    regressive: bool = option(True, "give heads the tokens guessed before")
    version: int = option(2, "2, or 1: one layer and text labels", choices=(1, 2))
    decay: float = option(0.7, "weight of a head against the one before", gt=0)
    feat_weight: float = option(10.0, "weight of the distance to the base's states", ge=0)
    filter_top: bool = option(False, "learn only where the text is likely to the base")
    labels: str = option("base_soft", "what the heads learn", choices=("text", "base_argmax", "base_soft"))
    tree: str = option("clover", "how trees are grown", choices=("clover", "static", "eagle2"))
    budget: int = option(20, "tokens of a tree; a few where many requests run together", ge=1)
    top_p: float = option(0.95, "clover: a place's tokens up to this cumulative probability", gt=0, le=1)
    ratio: float = option(0.25, "clover: none below this share of the best's probability", ge=0, le=1)
    draft_vocab: int | None = option(None, "draft only this many frequent tokens; all where not given", ge=2)
    steps: int = option(400, "training steps", ge=1)
    batch_size: int = option(8, "windows a step", ge=1)
    rate: float = option(1e-3, "peak learning rate (AdamW, linear)", gt=0)
    length: int = option(256, "longest window of training", ge=8)
    switch_off: bool = option(True, "stop guessing while it is slower than plain steps", effect="speed")


class Clover(FittedDrafter):
    config_class = CloverConfig
    config: CloverConfig

    @property
    def draft_tokens(self) -> int:
        return 25 if self.config.tree == "static" else self.config.budget

    def hidden(self, model: Any) -> tuple[int, ...]:
        try:
            read_plan(model)
        except NotPlanned as refusal:
            raise InputError(
                self.name,
                must="see the base's states before its final norm",
                got=f"a base whose blocks are not known ({refusal})",
            ) from refusal
        return (-1, BEFORE_NORM)

    @property
    def layer_count(self) -> int:
        return min(self.config.layers, 1) if self.config.version == 1 else self.config.layers

    def training(self) -> Mapping[str, Any]:
        return {"cosine": False}

    def build(self, model: Any) -> nn.Module:
        return _Module(model, self.layer_count)

    def loss(self, module: Any, batch: Batch, targets: Targets) -> Tensor:
        h, x = batch.states[0], batch.states[1]
        if self.config.version == 1:
            targets = Targets(batch, h, "text", self.reading)
        if self.config.filter_top:
            likely = _likely(self.reading, h[:, :-1], batch.ids[:, 1:])
            targets.hard = targets.hard.masked_fill(~likely, -100)
        if float(module.scale) == 0.0:
            module.scale.fill_(float(h[batch.counts].pow(2).mean().sqrt()))
        total = torch.zeros((), device=h.device)
        for i, f in enumerate(self._taught(module, x, batch.ids)):
            there = (batch.counts[:, 1 + i : 1 + i + f.shape[1]])[..., None]
            aim = h[:, 1 + i : 1 + i + f.shape[1]]
            gap = F.smooth_l1_loss(f / module.scale, aim / module.scale, reduction="none") * there
            feature = gap.sum() / (there.sum() * f.shape[-1]).clamp(min=1)
            each = self.config.feat_weight * feature + targets.loss(self.reading(f), 1 + i)
            total = total + self.config.decay**i * each
        return total

    def source(self, state: DraftState) -> Source:
        news = state.take()
        if news.shape[1]:
            start = state.past.length - news.shape[1]
            follow = torch.tensor(state.ids[start + 1 : state.past.length + 1], device=news.device)
            s = self.module.first(news[1], self.reading.rows(follow).float())
            state.last["c"] = self.module.augment(s, state.memories)[-1]
        return _Source(self, state.last["c"])

    def tree(self, source: Source, floor: float) -> Draft:
        config = self.config
        if config.tree == "static":
            return static_tree(source, config.heads)
        if config.tree == "eagle2":
            return beam_tree(source, config.heads, max(1, config.budget // 2), config.budget, floor)
        return budget_tree(source, config.heads, config.budget, config.top_p, config.ratio, floor)

    def token(self, ids: Tensor) -> Tensor:
        """What the heads are told of guessed tokens."""
        e = self.reading.rows(ids).float()
        return e if self.config.regressive else torch.zeros_like(e)

    def _taught(self, module: Any, x: Tensor, ids: Tensor) -> list[Tensor]:
        """f of each head, [b, n - 1 - i, d] at indices t = 0.."""
        c = module.augment(module.first(x[:, :-1], self.reading.rows(ids[:, 1:]).float()))
        found = [module.head(c, None)]
        for i in range(1, self.config.heads):
            if c.shape[1] < 3:
                break
            e = self.token(ids[:, 1 + i :])
            c = module.again(c[:, :-1], e)
            found.append(module.head(c, e))
        return found


class _Source:
    def __init__(self, system: Clover, c: Tensor) -> None:
        self.system, self.vocabulary = system, system.reading.vocabulary
        self.c = [c]  # of the root and of every expanded place

    def root(self) -> Tensor:
        f = self.system.module.head(self.c[0][None], None)
        return self.system.logits(f).log_softmax(-1)[0]

    def expand(self, parents: Sequence[int], tokens: Sequence[int], depth: int) -> Tensor:
        before = torch.stack([self.c[parent + 1] for parent in parents])
        e = self.system.token(torch.tensor(tokens, device=before.device))
        c = self.system.module.again(before, e)
        self.c += list(c)
        return self.system.logits(self.system.module.head(c, e)).log_softmax(-1)


class _Regressive(nn.Module):
    """R(s, e)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, Rms(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        for linear in (self.q, self.k, self.v):
            nn.init.uniform_(linear.weight, 0.0, NOISE)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            for linear in (self.q, self.k):
                linear.weight += torch.eye(width)

    def forward(self, s: Tensor, e: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (self.q(self.norm(s)), self.k(e), self.v(e)))
        gate = F.cosine_similarity(q, k, dim=-1)
        return s + (gate[..., None] * v).flatten(-2)


class _Module(nn.Module):
    scale: Tensor

    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        shape = layer_shape(model)
        d = shape.width
        heads = next(n for n in range(min(shape.heads, d), 0, -1) if d % n == 0)
        self.first, self.again = _Regressive(d, heads), _Regressive(d, heads)
        self.layers = nn.ModuleList(DraftLayer.like_last(model) for _ in range(layers))
        self.norm, self.norm_first, self.norm_next = Rms(d), Rms(d), Rms(d)
        self.a = nn.Linear(d, d, bias=False)
        self.b = nn.Linear(2 * d, d, bias=False)
        self.register_buffer("scale", torch.zeros(()))
        gain = read_plan(model).norm.gain
        with torch.no_grad():
            self.a.weight.copy_(torch.eye(d))
            self.b.weight.copy_(torch.cat((torch.eye(d), torch.zeros(d, d)), 1))
            self.norm.gain.copy_(gain)
            for norm in (self.norm_first, self.norm_next):
                norm.gain.copy_(gain)

    def augment(self, s: Tensor, memories: Sequence[Memory] | None = None) -> Tensor:
        """c^0 of s [b, n, d]; with ``memories`` s [n, d] follows what they hold, and is settled in them."""
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, DraftLayer)
            s = layer(s) if memories is None else layer.settle(s, memories[number])
        c: Tensor = self.norm(s)
        return c

    def head(self, c: Tensor, e: Tensor | None) -> Tensor:
        """f [..., d] of head 0 (``e`` None) or of a later one."""
        f: Tensor = self.norm_first(self.a(c)) if e is None else self.norm_next(self.b(torch.cat((c, e), -1)))
        return f


def _likely(reading: Reading, last: Tensor, ids: Tensor) -> Tensor:
    """bool [b, n]: the token is among the base's best 8 and within its top-p of 0.8."""
    with torch.no_grad():
        chances = F.linear(last, reading.whole).softmax(-1)
        own = chances.gather(-1, ids[..., None])
        above = chances > own
        return (above.sum(-1) < 8) & ((chances * above).sum(-1) <= 0.8)
