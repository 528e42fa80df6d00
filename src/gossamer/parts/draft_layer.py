"""One decoder layer as a drafter owns it: trained over whole sequences, run over a memory and a tree while drafting.

    a = x + N2(A(N1 x))        o = [a] * copies + N4(W_down (act(W_gate N3 a) * W_up N3 a))

A is causal attention with rotary positions in the shape of the base's last layer (grouped heads, norms of queries and
keys where it has them). Norms N1, N2, N4 may be absent. It looks at the whole past, whatever windows the base has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.parts.decode_plan import Feed, Layer, NotPlanned, read_plan
from gossamer.parts.decode_weights import float_weight

_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer. ``frequencies``: radians a position of each pair of a head's places."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    feed: int
    act: str
    scale: float
    frequencies: tuple[float, ...]
    qk_norm: bool = False


class Rms(nn.Module):
    """``gain * x / rms(x)``, gain one at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Memory:
    """Keys and values [m, kv heads, head_dim] of a request: ``length`` settled entries, then those of a draft."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.used = 0

    def add(self, keys: Tensor, values: Tensor, *, settle: bool) -> None:
        """Append entries; settled ones take the place of a draft."""
        if settle:
            self.used = self.length
        end = self.used + len(keys)
        if self._keys is None or self._values is None or end > len(self._keys):
            room = max(64, 2 * end)
            old = (self._keys, self._values)
            self._keys, self._values = (t.new_empty(room, *t.shape[1:]) for t in (keys, values))
            if old[0] is not None and old[1] is not None:
                self._keys[: self.used], self._values[: self.used] = old[0][: self.used], old[1][: self.used]
        self._keys[self.used : end], self._values[self.used : end] = keys, values
        self.used = end
        self.length = end if settle else self.length

    def entries(self) -> tuple[Tensor, Tensor]:
        assert self._keys is not None
        assert self._values is not None
        return self._keys[: self.used], self._values[: self.used]

    def crop(self, length: int) -> None:
        """Keep the first ``length`` settled entries; drafts are forgotten."""
        self.length = self.used = min(length, self.length)

    def fork(self) -> Memory:
        twin = Memory()
        twin.length, twin.used = self.length, self.used
        twin._keys = None if self._keys is None else self._keys.clone()
        twin._values = None if self._values is None else self._values.clone()
        return twin


class DraftLayer(nn.Module):
    """The layer. ``input_norm``: with N1; ``sandwich``: with N2 and N4; ``copies`` of the residual in the output."""

    frequencies: Tensor

    def __init__(
        self, shape: LayerShape, *, input_norm: bool = True, sandwich: bool = False, copies: int = 1, feed: int = 0
    ) -> None:
        super().__init__()
        self.shape, self.copies = shape, copies
        width, feed = shape.width, feed or shape.feed
        self.qkv = nn.Linear(width, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, bias=False)
        self.out = nn.Linear(shape.heads * shape.head_dim, width, bias=False)
        self.up = nn.Linear(width, 2 * feed, bias=False)
        self.down = nn.Linear(feed, copies * width, bias=False)
        self.before_attention = Rms(width) if input_norm else nn.Identity()
        self.before_feed = Rms(width)
        self.after_attention = Rms(width) if sandwich else nn.Identity()
        self.after_feed = Rms(copies * width) if sandwich else nn.Identity()
        self.q_norm = Rms(shape.head_dim) if shape.qk_norm else nn.Identity()
        self.k_norm = Rms(shape.head_dim) if shape.qk_norm else nn.Identity()
        self.register_buffer("frequencies", torch.tensor(shape.frequencies), persistent=False)

    @classmethod
    def like_last(cls, model: Any) -> Self:
        """A copy of the base's last layer where its parts are known, else a random layer of its shape."""
        shape = layer_shape(model)
        last = _last(model)
        layer = cls(shape, sandwich=last is not None and last.after_feed is not None)
        if last is not None:
            layer._copy(last)
        return layer

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., n, d] at ``positions`` [n] -> queries [..., n, heads, hd], keys and values [..., n, kv heads, hd]."""
        s = self.shape
        joined = self.qkv(self.before_attention(x)).unflatten(-1, (-1, s.head_dim))
        q, k, v = joined.split((s.heads, s.kv_heads, s.kv_heads), -2)
        angles = positions[:, None].float() * self.frequencies
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return _turn(self.q_norm(q), cos, sin), _turn(self.k_norm(k), cos, sin), v

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Output [..., copies d] from the input x [..., d] and what attention gave, [..., heads, hd]."""
        a = x + self.after_attention(self.out(mixed.flatten(-2)))
        gate, value = self.up(self.before_feed(a)).chunk(2, -1)
        fed = self.after_feed(self.down(_ACTS[self.shape.act](gate) * value))
        return torch.cat([a] * self.copies, -1) + fed

    def forward(self, x: Tensor) -> Tensor:
        """x [b, n, d], padded on the right -> [b, n, copies d], causal from position 0."""
        q, k, v = self.project(x, torch.arange(x.shape[1], device=x.device))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.shape.scale, enable_gqa=True)
        return self.finish(x, mixed.transpose(1, 2))

    def chained(
        self, x: Tensor, positions: Tensor, past: tuple[Tensor, Tensor], chain: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """x [b, n, d] -> [b, n, d] where the query at index i sees entries j <= i of ``past`` (keys and values
        [b, n, kv heads, hd]), entry i of each of ``chain``, and itself."""
        q, k, v = self.project(x, positions)
        group = self.shape.heads // self.shape.kv_heads
        q = q.unflatten(2, (-1, group))
        scores = torch.einsum("bqhgd,bkhd->bhgqk", q, past[0])
        n = x.shape[1]
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool, device=x.device).tril(), -torch.inf)
        links = [*chain, (k, v)]
        keys, values = (torch.stack(part, 2) for part in zip(*links, strict=True))  # [b, n, links, kv heads, hd]
        own = torch.einsum("bqhgd,bqlhd->bhgql", q, keys)
        weights = (torch.cat((scores, own), -1) * self.shape.scale).softmax(-1)
        mixed = torch.einsum("bhgqk,bkhd->bqhgd", weights[..., :n], past[1])
        mixed = mixed + torch.einsum("bhgql,bqlhd->bqhgd", weights[..., n:], values)
        return self.finish(x, mixed.flatten(2, 3))

    def remember(self, x: Tensor, start: int, memory: Memory) -> None:
        """Settle entries x [n, d] at positions from ``start``."""
        _, k, v = self.project(x, torch.arange(start, start + len(x), device=x.device))
        memory.add(k, v, settle=True)

    def settle(self, x: Tensor, memory: Memory) -> Tensor:
        """Run x [n, d] after the settled entries, and settle it; [n, copies d]."""
        start, n = memory.length, len(x)
        q, k, v = self.project(x, torch.arange(start, start + n, device=x.device))
        memory.add(k, v, settle=True)
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        visible = torch.cat((causal.new_ones(n, start), causal), 1)
        return self.finish(x, self.attend(q, *memory.entries(), visible))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """q [n, heads, hd] over m keys where ``visible`` [n, m] -> [n, heads, hd]."""
        n = len(q)
        q = q.view(n, self.shape.kv_heads, -1, self.shape.head_dim)
        scores = torch.einsum("nhgd,mhd->hgnm", q, k) * self.shape.scale
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.einsum("hgnm,mhd->nhgd", weights, v).flatten(1, 2)

    @torch.no_grad()
    def _copy(self, last: Layer) -> None:
        a = last.attention
        assert a is not None
        assert last.before_feed is not None
        pairs: list[tuple[Any, Tensor]] = [
            (self.qkv.weight, float_weight(a.qkv, "float32", torch.float32).weight),
            (self.out.weight, float_weight(a.out, "float32", torch.float32).weight),
            (self.before_feed.gain, last.before_feed.gain),
        ]
        if isinstance(last.feed, Feed):
            pairs += [
                (self.up.weight, float_weight(last.feed.up, "float32", torch.float32).weight),
                (self.down.weight, float_weight(last.feed.down, "float32", torch.float32).weight),
            ]
        norms = ((self.before_attention, last.before_attention), (self.after_attention, last.after_attention),
                 (self.after_feed, last.after_feed), (self.q_norm, a.q_norm), (self.k_norm, a.k_norm))  # fmt: skip
        pairs += [(own.gain, norm.gain) for own, norm in norms if isinstance(own, Rms) and norm is not None]
        for own, value in pairs:
            if own.shape == value.shape:
                own.copy_(value)


def layer_shape(model: Any) -> LayerShape:
    """The shape of the base's last whole layer, by its plan where it has one, else by its config."""
    config = model.config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    feed = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    last = _last(model)
    if last is None or last.attention is None:
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or width // heads
        return LayerShape(width, heads, kv_heads, head_dim, feed, "silu", head_dim**-0.5, _frequencies(head_dim))
    a = last.attention
    act = last.feed.act_name if isinstance(last.feed, Feed) else "silu"
    frequencies = _frequencies(a.head_dim)
    if a.rope is not None:
        cos, sin = read_plan(model).ropes[a.rope](torch.ones(1, device=model.device), torch.float32)
        frequencies = tuple(torch.atan2(sin, cos)[0, : a.head_dim // 2].tolist())
    return LayerShape(
        width, a.heads, a.kv_heads, a.head_dim, feed, act or "silu", a.scale, frequencies, a.q_norm is not None
    )


def _last(model: Any) -> Layer | None:
    try:
        layers = read_plan(model).layers
    except NotPlanned:
        return None
    return next((layer for layer in reversed(layers) if layer.attention is not None and layer.feed is not None), None)


def _frequencies(head_dim: int) -> tuple[float, ...]:
    return tuple(10000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x [..., n, heads, hd]; cos and sin [n, 1, hd / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
