"""Decoding with several models at once: each keeps the past of each request in a row of its own.

A :class:`Row` is what one model remembers of one request: keys and values [heads, length, width] of every layer. Rows
know nothing of one another, so any subset of them can be run together in any order, a row can be cut back (rejected
drafts), copied (beams) and dropped. :class:`CachedModel` joins the rows of a step to one batch:

    past, padded on the left     new tokens, padded on the right
    [ . . k k k k ]              [ a b c ]
    [ k k k k k k ]              [ d . . ]

Position ids count real tokens only, masks hide the padding, and no row has a gap between what it sees, so that sliding
windows measured in array positions stay exact. While the same rows come in the same order, the batch of the last step
is carried on without copying.

Every layer keeps its whole past, those with a sliding window too: the window is then a matter of the mask, and cutting
back is exact (transformers' sliding cache layers cannot be cut once they are full).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from gossamer.core.errors import InputError


class Row:
    """The past of one request in one model: ``length`` tokens; ``layers`` holds keys and values per layer."""

    def __init__(self) -> None:
        self.length = 0
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.slot: tuple[object, int] | None = None  # the carried batch that holds this row, and where

    def crop(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens."""
        assert 0 <= length <= self.length, (length, self.length)
        if length < self.length:
            self.length, self.slot = length, None
            self.layers = [(keys[:, :length], values[:, :length]) for keys, values in self.layers]

    def fork(self) -> Row:
        """A row with the same past that goes its own way; storage is shared until then."""
        twin = Row()
        twin.length, twin.layers = self.length, list(self.layers)
        return twin


@dataclasses.dataclass
class Step:
    """Per row, for its last ``keep`` new tokens: float32 ``logits`` [keep, V], and ``hidden`` [keep, d] if asked."""

    logits: list[Tensor]
    hidden: list[Tensor] | None = None


class CachedModel:
    """A causal model run over rows. ``context`` makes a context manager for each forward (e.g. adapters off)."""

    def __init__(self, model: Any, context: Callable[[], Any] = contextlib.nullcontext) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise InputError(type(model).__name__, must="be a decoder-only model", do="give a causal language model")
        self.model, self.context = model, context
        self._batch: tuple[object, DynamicCache, list[int]] | None = None  # its mark, cache, left padding per row

    @torch.no_grad()
    def forward(
        self,
        rows: Sequence[Row],
        chunks: Sequence[Sequence[int]],
        keep: Sequence[int] | None = None,
        hidden: bool = False,
    ) -> Step:
        """Run each row's new tokens ``chunks`` on top of its past, and add them to it.

        ``keep`` says how many of the last new tokens of each row give logits (default: one).
        """
        assert len(rows) == len(chunks) == len(set(map(id, rows))), "one chunk for each row, no row twice"
        assert all(chunks), "every row needs a new token"
        keep = keep or [1] * len(rows)
        cache, left = self._join(rows)
        past, width = max(row.length for row in rows), max(len(chunk) for chunk in chunks)
        inputs = self._inputs(rows, chunks, past, width)
        asked = sorted({len(chunk) - 1 - back for chunk, n in zip(chunks, keep, strict=True) for back in range(n)})
        place = {position: index for index, position in enumerate(asked)}
        wanted = torch.tensor(asked, device=self.model.device)
        with self.context(), _evaluating(self.model):
            out = self.model(
                **inputs, past_key_values=cache, use_cache=True, logits_to_keep=wanted, output_hidden_states=hidden
            )
        self._check(out, cache)
        # a model without logits_to_keep swallows it and gives the logits of every position
        logits = out.logits if out.logits.shape[1] == len(asked) else out.logits[:, wanted]
        self._split(rows, chunks, cache, left)
        picks = [[place[len(chunk) - n + i] for i in range(n)] for chunk, n in zip(chunks, keep, strict=True)]
        states = out.hidden_states[-1][:, wanted] if hidden else None
        return Step(
            [logits[row, pick].float() for row, pick in enumerate(picks)],
            None if states is None else [states[row, pick] for row, pick in enumerate(picks)],
        )

    def _inputs(self, rows: Sequence[Row], chunks: Sequence[Sequence[int]], past: int, width: int) -> dict[str, Tensor]:
        """input_ids, position_ids [n, width] and attention_mask [n, past + width]."""
        ids, positions, masks = [], [], []
        for row, chunk in zip(rows, chunks, strict=True):
            pad = width - len(chunk)
            ids.append([*chunk, *[0] * pad])
            # padding repeats the last position: it must not run out of a model's position table
            positions.append([row.length + min(i, len(chunk) - 1) for i in range(width)])
            masks.append([0] * (past - row.length) + [1] * (row.length + len(chunk)) + [0] * pad)
        names = ("input_ids", "position_ids", "attention_mask")
        tensors = (torch.tensor(value, device=self.model.device) for value in (ids, positions, masks))
        return dict(zip(names, tensors, strict=True))

    def _join(self, rows: Sequence[Row]) -> tuple[DynamicCache, list[int]]:
        """One cache of the rows' pasts, padded on the left to the longest, and the padding of each."""
        if self._batch is not None:
            mark, cache, left = self._batch
            if len(left) == len(rows) and all(row.slot == (mark, i) for i, row in enumerate(rows)):
                return cache, left
        past = max(row.length for row in rows)
        left = [past - row.length for row in rows]
        cache = DynamicCache()
        shapes = next((row.layers for row in rows if row.length), [])
        for layer, (like_key, like_value) in enumerate(shapes):
            keys, values = [], []
            for row, pad in zip(rows, left, strict=True):
                key, value = row.layers[layer] if row.length else (like_key[:, :0], like_value[:, :0])
                keys.append(torch.nn.functional.pad(key, (0, 0, pad, 0)))
                values.append(torch.nn.functional.pad(value, (0, 0, pad, 0)))
            cache.update(torch.stack(keys), torch.stack(values), layer)
        return cache, left

    def _split(
        self, rows: Sequence[Row], chunks: Sequence[Sequence[int]], cache: DynamicCache, left: list[int]
    ) -> None:
        """Give every row its part of the cache; keep the batch where no padding came in on the right."""
        mark, held = object(), list[Any](cache.layers)
        even = len({len(chunk) for chunk in chunks}) == 1
        for index, (row, chunk, pad) in enumerate(zip(rows, chunks, left, strict=True)):
            row.length += len(chunk)
            end = pad + row.length
            row.layers = [(layer.keys[index, :, pad:end], layer.values[index, :, pad:end]) for layer in held]
            row.slot = (mark, index) if even else None
        self._batch = (mark, cache, left) if even else None

    def _check(self, out: Any, cache: DynamicCache) -> None:
        held = getattr(out, "past_key_values", None) is cache and all(hasattr(layer, "keys") for layer in cache.layers)
        if not held or not cache.layers:
            raise InputError(
                type(self.model).__name__,
                must="keep its past as keys and values per layer",
                got=type(getattr(out, "past_key_values", None)).__name__,
                do="use an attention model",
            )


@contextlib.contextmanager
def _evaluating(model: Any) -> Any:
    """Evaluation mode for the duration, without walking over a model that is in it already."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
