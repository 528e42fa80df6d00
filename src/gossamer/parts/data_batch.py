"""Examples to batches: padding, packing without cross-talk, and the masks that packing needs.

A batch holds, all of shape [b, t]: ``input_ids``, ``attention_mask`` (1 = token), ``labels`` (-100 = no loss),
``loss_weights`` (float32, the weight of the label at the same place) and ``position_ids`` (from 0 at each sequence's
first token). Packed batches hold ``segment_ids`` besides (0 = padding): query i sees key j only where

    j <= i,   segment_i = segment_j,   and in sliding layers i - j < window.
"""

from __future__ import annotations

import bisect
import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.parts.data_tokens import IGNORE, Example, PreferencePair

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Collator:
    """Pads examples into one batch. Preference pairs give 2n rows: all chosen first, then all rejected."""

    tokenizer: Any
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        assert self.padding_side in ("right", "left"), self.padding_side

    def __call__(self, examples: Sequence[Example | PreferencePair]) -> Batch:
        rows = _flat(examples)
        longest = max(len(row.input_ids) for row in rows)
        step = self.pad_to_multiple_of or 1
        length = -(-longest // step) * step
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else self.tokenizer.eos_token_id or 0
        batch: Batch = {
            "input_ids": self._padded([row.input_ids for row in rows], length, pad),
            "attention_mask": self._padded([[1] * len(row.input_ids) for row in rows], length, 0),
            "labels": self._padded([row.labels for row in rows], length, IGNORE),
            "loss_weights": self._padded([row.weights for row in rows], length, 0.0).float(),
        }
        packed = any(row.segment_ids is not None for row in rows)
        segments = self._padded([row.segment_ids or [1] * len(row.input_ids) for row in rows], length, 0)
        batch["position_ids"] = _positions(segments)
        if packed:
            batch["segment_ids"] = segments
        return batch

    def _padded(self, rows: Sequence[Sequence[float]], length: int, fill: float) -> Tensor:
        fills = [[fill] * (length - len(row)) for row in rows]
        if self.padding_side == "left":
            return torch.tensor([[*pad, *row] for pad, row in zip(fills, rows, strict=True)])
        return torch.tensor([[*row, *pad] for pad, row in zip(fills, rows, strict=True)])


def pack(examples: Iterable[Example], max_length: int) -> list[Example]:
    """Put several examples in each row of at most ``max_length`` tokens, longest first, each where it fits tightest.

    The first token of every segment has no label (it would be predicted from another example). Raises InputError for
    an example that is longer than a row.
    """
    bins: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for example in sorted(examples, key=lambda one: -len(one.input_ids)):
        length = len(example.input_ids)
        if length > max_length:
            do = "tokenise with this max_length or pack into longer rows"
            raise InputError("packing", must=f"get examples of at most {max_length} tokens", got=length, do=do)
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            bins.append([])
            room.append((max_length, len(bins) - 1))
            at = len(room) - 1
        free, index = room.pop(at)
        bins[index].append(example)
        bisect.insort(room, (free - length, index))
    return [_row_of(members) for members in bins]


def packed_mask(
    segment_ids: Tensor, config: Any, attn_implementation: str, *, dtype: torch.dtype = torch.float32
) -> Tensor | dict[str, Tensor]:
    """Block-diagonal causal mask for packed rows ([b, t] segment ids, 0 = padding) in the form that the model takes.

    Returns [b, 1, t, t], boolean (True = attend) for "sdpa", additive of ``dtype`` for "eager"; for a config with
    ``layer_types`` (Gemma 3, Qwen) a dict of one mask for each layer type, the sliding ones with the window.
    Raises InputError for layers that mix tokens otherwise than by these masks (recurrent, chunked).
    """
    config = config.get_text_config()
    _, t = segment_ids.shape
    order = torch.arange(t, device=segment_ids.device)
    back = order[:, None] - order[None, :]
    # padding sees padding, so that no query is left without any key
    full = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (back >= 0)
    window: Any = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    masks: dict[str, Tensor] = {}
    for kind in sorted(set(kinds or ["full_attention" if window is None else "sliding_attention"])):
        if kind not in ("full_attention", "sliding_attention"):
            do = "train without packing"
            raise InputError("packing", must="have full or sliding attention in all layers", got=kind, do=do)
        seen = full & (back < window) if kind == "sliding_attention" else full
        masks[kind] = _for_attention(seen[:, None], attn_implementation, dtype)
    return masks if kinds else next(iter(masks.values()))


def model_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What ``model(...)`` takes from a batch: no labels or weights, and for packed rows the packed mask."""
    inputs = {key: item for key, item in batch.items() if key not in ("labels", "loss_weights", "segment_ids")}
    accepts = forward_parameters(model)
    if "position_ids" not in accepts:
        inputs.pop("position_ids", None)
    if "use_cache" in accepts and "past_key_values" not in inputs:
        inputs.setdefault("use_cache", False)
    segments = batch.get("segment_ids")
    if segments is not None:
        if "position_ids" not in accepts:
            do = "train without packing"
            raise InputError("packing", must="have a model that takes position_ids", got=type(model).__name__, do=do)
        config = model.config
        inputs["attention_mask"] = packed_mask(segments, config, config._attn_implementation, dtype=_dtype(model))
    return inputs


def forward_parameters(model: Any) -> frozenset[str]:
    """Names of the parameters that the forward pass of the model (of the one inside a PEFT wrapper) declares."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(inner.forward).parameters)


def _flat(examples: Sequence[Example | PreferencePair]) -> list[Example]:
    pairs = [one for one in examples if isinstance(one, PreferencePair)]
    single = [one for one in examples if isinstance(one, Example)]
    assert examples, "a batch has at least one example"
    assert not (pairs and single), "a batch holds examples or preference pairs, not both"
    return single or [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def _positions(segments: Tensor) -> Tensor:
    """Positions that restart at 0 where the segment changes; 0 on padding."""
    t = segments.shape[1]
    order = torch.arange(t, device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    begun = torch.where(starts, order, torch.zeros_like(order)).cummax(dim=1).values
    return torch.where(segments > 0, order - begun, torch.zeros_like(order))


def _row_of(members: Sequence[Example]) -> Example:
    ids: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    segments: list[int] = []
    for segment, example in enumerate(members, 1):
        ids += example.input_ids
        labels += [IGNORE, *example.labels[1:]]
        weights += [0.0, *example.weights[1:]]
        segments += [segment] * len(example.input_ids)
    cut = (sum(one.cut[0] for one in members), sum(one.cut[1] for one in members))
    return Example(ids, labels, weights, cut, any(one.merged for one in members), segments)


def _for_attention(seen: Tensor, attn_implementation: str, dtype: torch.dtype) -> Tensor:
    if attn_implementation == "sdpa":
        return seen
    if attn_implementation == "eager":
        # eager adds the mask to the scores: a boolean one would be silently wrong
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    do = 'load the model with attn_implementation="sdpa" or train without packing'
    raise InputError("packing", must='run on "sdpa" or "eager" attention', got=repr(attn_implementation), do=do)


def _dtype(model: Any) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
