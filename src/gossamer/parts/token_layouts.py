"""Which tokens of an input a stage of layers holds: gathering them, putting their states back, adding decoded ones."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gossamer.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which tokens a stage holds. All tensors [b, t]; ``mask`` is true at real tokens, padding is on the left.

    ``origin`` is each token's place in the input; ``removed`` [b] is how far renumbering moved what comes after;
    ``gaps`` says that positions are not contiguous.
    """

    mask: Tensor
    positions: Tensor
    origin: Tensor
    removed: Tensor
    gaps: bool = False

    def of(self, values: Tensor) -> Tensor:
        """Booleans [b, T] over the input, as they fall on these tokens; false at padding."""
        return values.gather(1, self.origin) & self.mask


def whole(mask: Tensor, positions: Tensor | None = None) -> Layout:
    """All tokens of an input with ``mask`` [b, t]; positions default to 0, 1, 2 ... as the models count them."""
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    removed = torch.zeros(mask.shape[0], dtype=torch.long, device=mask.device)
    return Layout(mask.bool(), places if positions is None else positions, places, removed)


def select(hidden: Tensor, layout: Layout, keep: Tensor, *, renumber: bool) -> tuple[Tensor, Layout]:
    """The tokens ``keep`` [b, t] of ``hidden`` [b, t, d] in their order, padded on the left, and their layout."""
    counts = keep.sum(1)
    width = int(counts.max())
    # a stable sort of the booleans puts what stays, in order, to the end
    index = keep.byte().argsort(dim=1, stable=True)[:, -width:]
    mask = torch.arange(width, device=keep.device) >= width - counts[:, None]
    positions, removed = layout.positions.gather(1, index), layout.removed
    if renumber:
        first = layout.positions.masked_fill(~layout.mask, torch.iinfo(torch.long).max).amin(1)
        positions = first[:, None] + (mask.long().cumsum(1) - 1).clamp(min=0)
        removed = removed + layout.mask.sum(1) - counts
    chosen = Layout(mask, positions, layout.origin.gather(1, index), removed, layout.gaps or not renumber)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1])), chosen


def restore(hidden: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """States [b, t', d] of the kept tokens at the places of the input ``like`` [b, T]: see the head of this file."""
    kept = torch.zeros(like.shape, dtype=torch.long, device=like.device)
    kept = kept.scatter_add(1, layout.origin, layout.mask.long()).cumsum(1)
    padding = (~layout.mask).sum(1, keepdim=True)
    index = (padding + kept - 1).clamp(min=0)
    states = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    return states.masked_fill((kept == 0)[..., None], 0.0)


def places_of(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Places [b, m] of the true values of [b, t], and which of them are real: rows may have fewer than m."""
    counts = chosen.sum(1)
    order = chosen.byte().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(counts.max()))]
    return order, torch.arange(order.shape[1], device=chosen.device) < counts[:, None]


def extend(layout: Layout, stored: int, mask: Tensor, positions: Tensor) -> Layout:
    """The first ``stored`` tokens of the layout, and new ones [b, q] at these positions of the input."""
    if layout.mask.shape[0] != mask.shape[0]:
        got = f"{mask.shape[0]} after {layout.mask.shape[0]}"
        raise InputError("token selection", must="get as many rows as the cache was filled with", got=got)
    moved = positions - layout.removed[:, None]
    return dataclasses.replace(
        layout,
        mask=torch.cat([layout.mask[:, :stored], mask], dim=1),
        positions=torch.cat([layout.positions[:, :stored], moved], dim=1),
    )
