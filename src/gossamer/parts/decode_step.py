"""One step of the decoding runner in plain torch: any dtype, any weights, experts by the model's own module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.parts.decode_plan import Attention, Feed, Layer, Plan
from gossamer.parts.decode_state import BEFORE_NORM, Chunk, Output, State, Tree
from gossamer.parts.decode_weights import Weight


class TorchStep:
    """Rows of all chunks go through the linear layers together; attention goes chunk by chunk."""

    def __init__(
        self, plan: Plan, matrices: dict[int, Weight], max_length: int, dtype: torch.dtype, device: Any
    ) -> None:
        self.plan, self.matrices, self.max_length, self.dtype = plan, matrices, max_length, dtype
        self.device = device
        places = torch.arange(max_length, device=self.device)
        self.ropes = {key: angles(places, dtype) for key, angles in plan.ropes.items()}
        self.feeds = [_feed(layer, matrices) for layer in plan.layers]

    def open(self) -> State:
        return State(
            [layer.cached for layer in self.plan.layers], self.max_length, self.dtype, self.device, blocked=False
        )

    def run(self, chunks: Sequence[Chunk], hidden: tuple[int, ...], head: Callable[[Tensor], Tensor]) -> list[Output]:
        positions = positions_of(chunks, self.device)
        masks = [_mask(chunk, self.device) for chunk in chunks]
        angles = {key: (cos[positions], sin[positions]) for key, (cos, sin) in self.ropes.items()}
        x = embedded(self.plan, chunks, positions, self.device).to(self.dtype)
        seen = [x]
        for number, layer in enumerate(self.plan.layers):
            a, feed = layer.attention, self.feeds[number]
            if a is not None and layer.before_attention is not None:
                h = self._attend(number, a, layer.before_attention(x), angles.get(a.rope or ""), chunks, masks)
                x = x + (h if layer.after_attention is None else layer.after_attention(h))
            if feed is not None and layer.before_feed is not None:
                h = feed(layer.before_feed(x))
                x = x + (h if layer.after_feed is None else layer.after_feed(h))
            seen.append(x)
        seen[-1] = self.plan.norm(x)
        return outputs(chunks, seen, x, hidden, head)

    def _attend(
        self,
        number: int,
        a: Attention,
        x: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        chunks: Sequence[Chunk],
        masks: Sequence[Tensor | None],
    ) -> Tensor:
        """x [n, d] -> [n, d]; keys and values of the new tokens are written to the states."""
        joined = self.matrices[id(a.qkv)](x).view(len(x), -1, a.head_dim)
        q, k, v = joined.split((a.heads, a.kv_heads, a.kv_heads), 1)
        q = q if a.q_norm is None else a.q_norm(q)
        k = k if a.k_norm is None else a.k_norm(k)
        if angles is not None:
            q, k = _turn(q, *angles), _turn(k, *angles)
        parts, start = [], 0
        for chunk, mask in zip(chunks, masks, strict=True):
            rows = slice(start, start := start + len(chunk.tokens))
            parts.append(_over_past(a, chunk, q[rows], k[rows], v[rows], number, mask))
        return self.matrices[id(a.out)](torch.cat(parts))


def positions_of(chunks: Sequence[Chunk], device: Any = "cpu") -> Tensor:
    """int64 [new tokens of all chunks]."""
    places = [chunk.state.length + depth for chunk in chunks for depth in chunk.tree.depths]
    return torch.tensor(places, device=device)


def embedded(plan: Plan, chunks: Sequence[Chunk], positions: Tensor, device: Any = "cpu") -> Tensor:
    """[new tokens of all chunks, d], by the model's own embedding."""
    x: Tensor = plan.embed(torch.tensor([token for chunk in chunks for token in chunk.tokens], device=device))
    return x if plan.positions is None else x + plan.positions[positions]


def outputs(
    chunks: Sequence[Chunk],
    seen: Sequence[Tensor],
    raw: Tensor,
    hidden: tuple[int, ...],
    head: Callable[[Tensor], Tensor],
) -> list[Output]:
    """Split rows by chunk. ``seen`` holds the hidden states of all layers, the last one normed; ``raw`` it before.

    Where no logits are wanted of any chunk, they are [0, 0]."""
    ends: list[int] = []
    asked = []
    for chunk in chunks:
        start = ends[-1] if ends else 0
        ends.append(start + len(chunk.tokens))
        asked.append(
            {"all": range(start, ends[-1]), "last": range(ends[-1] - 1, ends[-1]), "none": range(0)}[chunk.logits]
        )
    rows = [row for part in asked for row in part]
    # not every product takes no rows
    scores = head(seen[-1] if len(rows) == len(seen[-1]) else seen[-1][rows]) if rows else seen[-1].new_zeros(0, 0)
    picked = torch.stack([raw if layer == BEFORE_NORM else seen[layer] for layer in hidden]) if hidden else None
    found, first = [], 0
    for chunk, part, end in zip(chunks, asked, ends, strict=True):
        states = None if picked is None else picked[:, end - len(chunk.tokens) : end].clone()
        found.append(Output(scores[first : first + len(part)], states))
        first += len(part)
    return found


def _feed(layer: Layer, matrices: dict[int, Weight]) -> Callable[[Tensor], Tensor] | None:
    feed = layer.feed
    if feed is None:
        return None
    if not isinstance(feed, Feed):
        module: Any = feed
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        return lambda x: module(x[None].to(dtype))[0].to(x.dtype)
    up, down, act = matrices[id(feed.up)], matrices[id(feed.down)], feed.act
    if not feed.gated:
        return lambda x: down(act(up(x)))

    def gated(x: Tensor) -> Tensor:
        gate, value = up(x).chunk(2, -1)
        return down(act(gate) * value)

    return gated


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x [n, heads, head_dim]."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def _over_past(a: Attention, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, number: int, mask: Tensor | None) -> Tensor:
    """Attention of one chunk's new tokens q [n, heads, d] over its past and themselves -> [n, heads d]."""
    state, n = chunk.state, len(q)
    past, end = state.length, state.length + n
    keys, values = state.keys[number], state.values[number]
    keys[:, past:end], values[:, past:end] = k.transpose(0, 1), v.transpose(0, 1)
    first = 0 if a.window is None else max(0, past - a.window + 1)
    grouped = q.view(n, a.kv_heads, -1, a.head_dim).permute(1, 2, 0, 3).reshape(a.kv_heads, -1, a.head_dim)
    scores = (grouped @ keys[:, first:end].transpose(1, 2)) * a.scale
    if mask is not None:
        hidden = ~_visible(chunk.tree, mask, past, first, a.window)
        scores = scores.view(a.kv_heads, -1, n, end - first).masked_fill_(hidden, float("-inf")).view_as(scores)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    out = (weights @ values[:, first:end]).view(a.kv_heads, -1, n, a.head_dim)
    return out.permute(2, 0, 1, 3).reshape(n, -1)


def _mask(chunk: Chunk, device: Any) -> Tensor | None:
    """What new tokens see of one another, bool [n, n]; None for one token."""
    n = len(chunk.tokens)
    if n == 1:
        return None
    if chunk.tree.ancestors[-1] == (1 << n) - 1:
        return torch.ones(n, n, dtype=torch.bool, device=device).tril()
    return chunk.tree.visible().to(device)


def _visible(tree: Tree, new: Tensor, past: int, first: int, window: int | None) -> Tensor:
    """bool [n, past - first + n]: the past within the window, and new tokens by the tree, also within it."""
    n = len(new)
    if window is None:
        return torch.cat((new.new_ones(n, past - first), new), 1)
    depths = torch.tensor(tree.depths, device=new.device)
    places = torch.cat((torch.arange(first - past, 0, device=new.device), depths))
    near = depths[:, None] - places[None] < window
    return near & torch.cat((new.new_ones(n, past - first), new), 1)
