"""FSPAD: an EAGLE drafter whose input samples the feature by the token, and whose output is split in two.

f_t is the base's last state after its final norm, e_{t+1} the embedding of the token that follows. The drafter predicts
f_{t+1} from both, and the frozen output matrix W_lm reads tokens:

    z   = W_fc [e_{t+1} ; f_t] + b
    z'  = z + W_down( SiLU(W_gate e_{t+1}) * (W_up N(z)) )                   feature sampling
    a   = z' + A(z')       one causal decoder layer, no norm before A
    [p_t ; r_t] = [a ; a] + W_2 FFN(N(a))          FFN down to 2d            partial alignment
    L   = w_feat SmoothL1(r_t, f_{t+1}) + w_tok CE(label of token t+2, softmax W_lm p_t)

p is read by W_lm, r is fed back as the next place's f, so neither has to serve both ends. ``fs=False`` leaves z' = z,
``pad=False`` p = r (both off is EAGLE-2); ``feed_factor`` widens the layer's FFN, 4/3 of it matches the parameters of
the split. Noise U(-0.5, 0.5) noise 512 / n is added to the features of a window of n, not to the targets.

Drafting is EAGLE-2's beam: a level runs its best places together, a child with its parent's r; of all tokens seen the
best ``total_tokens`` by joint log-probability are guessed. After verification all accepted places are run again with
their true features. Every level reads W_lm once: over a vocabulary of 262k that costs more than the small model's step,
so without ``draft_vocab`` no time is won there on a CPU. The text stays exact either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.errors import InputError, OptionError
from gossamer.core.options import Config, option
from gossamer.kinds.drafting import DraftState, FittedDrafter
from gossamer.parts.draft_layer import DraftLayer, Rms, layer_shape
from gossamer.parts.draft_trees import Source, beam_tree
from gossamer.parts.drafter_training import Batch, Targets
from gossamer.parts.requests import Draft

CARD = Card(
    title="Feature sampling and partial alignment distillation",
    paper="2408.15562",
    year=2024,
    claim="more tokens accepted a step than an EAGLE-2 drafter at the same training, the text kept exactly",
    traits=("lossless", "needs_fit"),
    provides=("decoder_set",),
    forbids=("decoder_set",),
    limits="speeds of 7B to 70B models are not shown; on Gemma's whole vocabulary drafting costs more than it wins",
)


class FSPADConfig(Config):
    depth: int = option(5, "longest path of a tree", ge=1)
    top_k: int = option(8, "places that are looked at on a level", ge=1)
    total_tokens: int = option(59, "tokens of a tree", ge=1)
    fs: bool = option(True, "feature sampling")
    pad: bool = option(True, "partial alignment: another half of the output for tokens than for features")
    feed_factor: float = option(1.0, "width of the draft layer's FFN against the base's", gt=0)
    w_feat: float = option(1.0, "weight of the feature loss", ge=0)
    w_tok: float = option(0.1, "weight of the token loss", ge=0)
    noise: float = option(0.2, "noise on the features of training", ge=0)
    labels: str = option("base_soft", "what p learns", choices=("text", "base_argmax", "base_soft"))
    draft_vocab: int | None = option(None, "draft only this many frequent tokens; all where not given", ge=2)
    steps: int = option(400, "training steps", ge=1)
    batch_size: int = option(8, "windows a step", ge=1)
    rate: float = option(1e-3, "peak learning rate (AdamW, linear)", gt=0)
    length: int = option(256, "longest window of training", ge=8)
    switch_off: bool = option(True, "stop guessing while it is slower than plain steps", effect="speed")


class FSPAD(FittedDrafter):
    config_class = FSPADConfig
    config: FSPADConfig

    @property
    def draft_tokens(self) -> int:
        return self.config.total_tokens

    def check(self, model: Any, inputs: Any = None, *, tokenizer: Any = None, **kwargs: Any) -> None:
        self._check_size()
        super().check(model)
        active = [name for name, part in model.named_modules() if isinstance(part, nn.Dropout) and part.training]
        if any(model.get_submodule(name).p > 0 for name in active):
            raise InputError(self.name, must="get a model without dropout", got="training mode", do="call model.eval()")

    def learn(self, bundle: Any, data: Any) -> Any:
        self._check_size()
        return super().learn(bundle, data)

    def training(self) -> Mapping[str, Any]:
        return {"cosine": False}

    def build(self, model: Any) -> nn.Module:
        return _Module(model, self.config)

    def loss(self, module: Any, batch: Batch, targets: Targets) -> Tensor:
        f = batch.states[0]
        n = f.shape[1]
        noise = (torch.rand_like(f) - 0.5) * self.config.noise * 512 / n
        p, r = module.halves(module.layer(module.mix(batch.ids[:, 1:], (f + noise)[:, :-1])))
        there = batch.counts[:, 1:, None]
        feature = (F.smooth_l1_loss(r, f[:, 1:], reduction="none") * there).sum() / (there.sum() * f.shape[-1])
        loss: Tensor = self.config.w_feat * feature + self.config.w_tok * targets.loss(self.reading(p), 1)
        return loss

    def source(self, state: DraftState) -> Source:
        news = state.take()
        if news.shape[1]:
            start = state.past.length - news.shape[1]
            follow = torch.tensor(state.ids[start + 1 : state.past.length + 1], device=news.device)
            out = self.module.layer.settle(self.module.mix(follow, news[0]), state.memories[0])
            p, r = self.module.halves(out[-1:])
            state.last |= {"p": p, "r": r}
        return _Source(self, state)

    def tree(self, source: Source, floor: float) -> Draft:
        return beam_tree(source, self.config.depth, self.config.top_k, self.config.total_tokens, floor)

    def _check_size(self) -> None:
        config = self.config
        most = config.top_k + (config.depth - 1) * config.top_k**2
        if config.total_tokens > most:
            raise OptionError(
                f"{self.name}.total_tokens",
                must=f"be at most {most}, the tokens that depth {config.depth} and top_k {config.top_k} see",
                got=config.total_tokens,
            )


class _Source:
    """One request's tree: r of the root and of every expanded place, and what each sees of the draft."""

    def __init__(self, system: FSPAD, state: DraftState) -> None:
        self.system, self.module, self.memory = system, system.module, state.memories[0]
        self.memory.crop(self.memory.length)
        self.vocabulary, self.start = system.reading.vocabulary, state.past.length
        self.p, self.r = state.last["p"], state.last["r"]
        self.seen = torch.zeros(0, 0, dtype=torch.bool)  # [expanded, expanded]

    def root(self) -> Tensor:
        return self.system.logits(self.p).log_softmax(-1)[0]

    def expand(self, parents: Sequence[int], tokens: Sequence[int], depth: int) -> Tensor:
        layer, n, old = self.module.layer, len(tokens), len(self.seen)
        device = self.r.device
        x = self.module.mix(torch.tensor(tokens, device=device), self.r[[parent + 1 for parent in parents]])
        above = torch.stack(
            [self.seen[parent] if parent >= 0 else torch.zeros(old, dtype=torch.bool) for parent in parents]
        )
        itself = torch.eye(n, dtype=torch.bool)
        q, k, v = layer.project(x, torch.full((n,), self.start + depth - 1, device=device))
        self.memory.add(k, v, settle=False)
        visible = torch.cat((torch.ones(n, self.memory.length, dtype=torch.bool), above, itself), 1).to(device)
        p, r = self.module.halves(layer.finish(x, layer.attend(q, *self.memory.entries(), visible)))
        self.r = torch.cat((self.r, r))
        grown = torch.zeros(old + n, old + n, dtype=torch.bool)
        grown[:old, :old], grown[old:, :old], grown[old:, old:] = self.seen, above, itself
        self.seen = grown
        return self.system.logits(p).log_softmax(-1)


class _Module(nn.Module):
    def __init__(self, model: Any, config: FSPADConfig) -> None:
        super().__init__()
        shape = layer_shape(model)
        d = shape.width
        # the base's own module, so that Gemma's scale is in it; not saved with the drafter
        self._embed: list[Any] = [model.get_input_embeddings()]
        self.fc = nn.Linear(2 * d, d)
        self.sampling = _Sampling(d, shape.feed) if config.fs else None
        feed = max(1, round(config.feed_factor * shape.feed))
        self.layer = DraftLayer(shape, input_norm=False, copies=2 if config.pad else 1, feed=feed)

    def mix(self, ids: Tensor, f: Tensor) -> Tensor:
        """z' [..., d] from the ids of the following tokens [...] and features [..., d]."""
        with torch.no_grad():
            e = self._embed[0](ids).float()
        z: Tensor = self.fc(torch.cat((e, f), -1))
        return z if self.sampling is None else self.sampling(z, e)

    def halves(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """p for the output matrix and r to feed back, each [..., d]."""
        if self.layer.copies == 1:
            return out, out
        p, r = out.chunk(2, -1)
        return p, r


class _Sampling(nn.Module):
    """The token's embedding gates, the fused feature is what passes."""

    def __init__(self, width: int, feed: int) -> None:
        super().__init__()
        self.norm = Rms(width)
        self.gate, self.up = nn.Linear(width, feed, bias=False), nn.Linear(width, feed, bias=False)
        self.down = nn.Linear(feed, width, bias=False)

    def forward(self, z: Tensor, e: Tensor) -> Tensor:
        out: Tensor = z + self.down(F.silu(self.gate(e)) * self.up(self.norm(z)))
        return out
