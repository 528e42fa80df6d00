"""Visual-prefix front end of a language model: projected features spliced among token embeddings.

    v = P(f) in R^[n*m, H]        f: n features of a frozen encoder, P: the projector, m tokens a feature
    x = [e(w_1..p), v, e(w_p+1..)]    e: the model's own input embedding module, its scale included (Gemma: sqrt(H))

Rows of a batch are packed (no padding inside), padded with zeros on one side, and their positions counted over real
places only, so that a row gives the same states alone, in any batch, and under either padding side. Callers give
``model(**spliced.inputs())``; transformers would otherwise count positions over the padding (GPT-2, Llama).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError, OptionError, did_you_mean

Rows = Tensor | Sequence[Tensor]  # [b, t, H], or b tensors [t_i, H]
Blocks = Tensor | Sequence[Tensor | Sequence[Tensor]]  # [b, v, H], or for each row one block [v_i, H] or several
Places = int | Sequence[int | Sequence[int]]  # one for all rows, one a row, or one a block
Side = Literal["left", "right"]
IGNORED = -100  # label of a place that bears no loss


class Projector(nn.Module):
    """Features [..., n, in_width] to visual tokens [..., n * tokens, out_width].

    ``kind`` is "linear", "mlp" (Linear, GELU, Linear; ``hidden`` defaults to ``out_width``) or "bottleneck" (Linear,
    SiLU, Linear with ``hidden`` 128, xavier weights and zero biases). ``dropout`` acts on the output. Raises
    OptionError for an unknown kind, InputError for features of another width.
    """

    KINDS = ("linear", "mlp", "bottleneck")

    def __init__(
        self,
        kind: str,
        in_width: int,
        out_width: int,
        tokens: int = 1,
        *,
        hidden: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in self.KINDS:
            raise OptionError("projector kind", must="exist", got=repr(kind), do=did_you_mean(kind, self.KINDS))
        self.kind, self.in_width, self.out_width, self.tokens = kind, in_width, out_width, tokens
        wide = hidden or (128 if kind == "bottleneck" else out_width)
        first = [] if kind == "linear" else [nn.Linear(in_width, wide), nn.GELU() if kind == "mlp" else nn.SiLU()]
        self.layers = nn.Sequential(*first, nn.Linear(wide if first else in_width, tokens * out_width))
        self.dropout = nn.Dropout(dropout)
        if kind == "bottleneck":
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        if features.shape[-1] != self.in_width:
            got, do = f"width {features.shape[-1]}", "use the encoder that the projector was made for"
            raise InputError("visual features", must=f"be {self.in_width} wide", got=got, do=do)
        projected = self.dropout(self.layers(features))
        return projected.unflatten(-1, (self.tokens, self.out_width)).flatten(-3, -2)

    @torch.no_grad()
    def match(self, model: Any, features: Tensor | None = None) -> None:
        """Scale the last layer so that visual tokens start with the root mean square of the token embeddings.

        ``features`` [..., n, in_width] is a sample of what will come (default: standard normal, seeded).
        """
        if features is None:
            features = torch.randn(256, self.in_width, generator=torch.Generator().manual_seed(0))
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        was_training = self.training
        size = self.eval()(features.to(last.weight)).float().square().mean().sqrt().item()
        self.train(was_training)
        factor = embedding_size(model) / max(size, 1e-12)
        last.weight.mul_(factor)
        last.bias.mul_(factor)


@dataclass(frozen=True)
class Spliced:
    """A batch of embedded rows; ``visual`` [b, t] is True at visual places, ``labels`` [b, t] are -100 there."""

    inputs_embeds: Tensor  # [b, t, H]
    attention_mask: Tensor  # [b, t] int64
    position_ids: Tensor  # [b, t] int64, 0 at the padding
    visual: Tensor  # [b, t] bool
    labels: Tensor | None = None

    def inputs(self) -> dict[str, Tensor]:
        """Keywords for the model's forward; a mask and positions only where rows are padded."""
        padded = not bool(self.attention_mask.all())
        values = {
            "inputs_embeds": self.inputs_embeds,
            "attention_mask": self.attention_mask if padded else None,
            "position_ids": self.position_ids if padded else None,
            "labels": self.labels,
        }
        return {key: value for key, value in values.items() if value is not None}


def splice(
    embeddings: Rows,
    visual: Blocks,
    *,
    mask: Tensor | None = None,
    places: Places = 0,
    replace: bool = False,
    labels: Tensor | Sequence[Tensor] | None = None,
    side: Side = "right",
) -> Spliced:
    """Put visual blocks among token embeddings, in front by default.

    A place p says how many real tokens of the row come before the block, before anything is spliced in; blocks with the
    same place keep their order. With ``replace`` the token at p gives way to the block (see :func:`marker_places`).
    ``mask`` [b, t] marks real tokens of padded ``embeddings``; ``labels`` are of their shape. A row without an image
    has an empty block [0, H] or no block. The result is padded on ``side``. Raises InputError where counts, widths or
    places do not fit.
    """
    if side not in ("left", "right"):
        raise OptionError("padding side", must="be 'left' or 'right'", got=repr(side))
    texts = _rows(embeddings, mask)
    blocks = [[row] if isinstance(row, Tensor) else list(row) for row in visual]
    wanted = _places(places, blocks)
    targets = _rows(labels, mask) if labels is not None else [torch.full((len(row),), IGNORED) for row in texts]
    for what, count in (("rows of visual blocks", len(blocks)), ("rows of labels", len(targets))):
        if count != len(texts):
            raise InputError(f"splice: {what}", must=f"be {len(texts)}, as the token rows", got=count)
    rows = [_join(number, *row, replace) for number, row in enumerate(zip(texts, blocks, wanted, targets, strict=True))]
    embeds, seen, marked = ([row[part] for row in rows] for part in range(3))
    attention = _pad([torch.ones(len(row), dtype=torch.int64, device=row.device) for row in embeds], 0, side)
    return Spliced(
        inputs_embeds=_pad(embeds, 0.0, side),
        attention_mask=attention,
        position_ids=positions(attention),
        visual=_pad(seen, False, side),
        labels=_pad(marked, IGNORED, side) if labels is not None else None,
    )


def unpadded(embeds: Tensor, visual: slice) -> Spliced:
    """Rows [b, t, H] that are joined already and of one length, with visual tokens at the places ``visual``."""
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
    seen = torch.zeros_like(mask, dtype=torch.bool)
    seen[:, visual] = True
    return Spliced(embeds, mask, positions(mask), seen)


def embed_tokens(model: Any, ids: Tensor) -> Tensor:
    """Embeddings [..., H] as the model's own forward would make them: through its module, which may scale."""
    return model.get_input_embeddings()(ids)


@torch.no_grad()
def embedding_size(model: Any) -> float:
    """Root mean square of the token embeddings as the layers get them (at most 4096 tokens, evenly spaced)."""
    table = model.get_input_embeddings()
    count = table.weight.shape[0]
    ids = torch.arange(0, count, max(1, count // 4096), device=table.weight.device)
    return float(table(ids).float().square().mean().sqrt())


def marker_places(ids: Tensor | Sequence[Tensor], marker: int, mask: Tensor | None = None) -> list[list[int]]:
    """For each row, the places of the token ``marker`` counted over real tokens: ``places`` for ``replace=True``."""
    return [(row == marker).nonzero().flatten().tolist() for row in _rows(ids, mask)]


def positions(mask: Tensor) -> Tensor:
    """Positions [b, t] counted over real places; 0 at the padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def last_real(hidden: Tensor, mask: Tensor) -> Tensor:
    """States [b, H] at each row's last real place, of hidden [b, t, H] padded on either side."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), places, -1).amax(1)
    if bool((last < 0).any()):
        row = int((last < 0).nonzero()[0])
        raise InputError(f"row {row} of the batch", must="hold a real place", got="padding only")
    return hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]


def mean_real(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean [b, H] over the real places of hidden [b, t, H]; a row without any gives zeros."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)


def _rows(values: Tensor | Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    if mask is None:
        return list(values)
    if len(mask) != len(values) or any(len(row) != mask.shape[1] for row in values):
        got = f"{len(values)} rows of {sorted({len(row) for row in values})}"
        raise InputError("splice: mask", must="be of the padded rows' shape", got=f"{tuple(mask.shape)} for {got}")
    return [row[real] for row, real in zip(values, mask.bool(), strict=True)]


def _places(places: Places, blocks: list[list[Tensor]]) -> list[list[int]]:
    """One place for each block of each row."""
    if isinstance(places, int):
        return [[places] * len(row) for row in blocks]
    if len(places) != len(blocks):
        raise InputError("splice: places", must=f"be given for {len(blocks)} rows", got=len(places))
    pairs = zip(places, blocks, strict=True)
    return [[place] * len(row) if isinstance(place, int) else list(place) for place, row in pairs]


def _join(
    number: int, text: Tensor, blocks: list[Tensor], places: list[int], target: Tensor, replace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, visual mask and labels of one row."""
    where = f"splice: row {number}"
    if len(places) != len(blocks):
        raise InputError(where, must="have one place for each visual block", got=f"{len(places)} for {len(blocks)}")
    if len(target) != len(text):
        raise InputError(where, must=f"have a label for each of {len(text)} tokens", got=len(target))
    end = len(text) - 1 if replace else len(text)
    pieces: list[tuple[Tensor, bool, Tensor]] = []
    done = 0
    for place, block in sorted(zip(places, blocks, strict=True), key=lambda pair: pair[0]):
        if not 0 <= place <= end:
            raise InputError(where, must=f"have its visual block at a place from 0 to {end}", got=place)
        if block.dim() != 2 or block.shape[1] != text.shape[1]:
            got = f"shape {tuple(block.shape)}"
            raise InputError(where, must=f"get visual blocks [n, {text.shape[1]}]", got=got, do="project them first")
        ignored = torch.full((len(block),), IGNORED, device=target.device)
        pieces += [(text[done:place], False, target[done:place]), (block.to(text), True, ignored)]
        done = place + replace
    pieces.append((text[done:], False, target[done:]))
    seen = [torch.full((len(piece),), flag, device=text.device) for piece, flag, _ in pieces]
    return torch.cat([piece[0] for piece in pieces]), torch.cat(seen), torch.cat([piece[2] for piece in pieces])


def _pad(rows: list[Tensor], fill: float | bool, side: Side) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)
