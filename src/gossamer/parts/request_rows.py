"""Finds the request state behind each row of ``model.generate``: a LogitsProcessor over states.

transformers shows a processor only the token rows of a batch. Between two calls rows may be reordered (beams), cut back
(rejected drafts) or go on with padding (finished rows); the state that belongs to a row is found from its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from gossamer.core.errors import InputError


class RowStates(LogitsProcessor):
    """``shift(states, scores)`` as a LogitsProcessor; ``open(prompt)`` begins the state of a row.

    A row continues the state with which it shares the most tokens, among those of its own prompt: ``group`` rows each
    (beams, returned sequences). ``attention_mask`` [prompts, t] or [rows, t] tells padding from prompt; without one
    leading tokens equal to ``pad`` are padding, refused where ``pad`` is among the tokens ``ordinary``. With
    ``log_probs`` the scores are log-probabilities and leave as such: beam search adds them up.
    """

    def __init__(
        self,
        open: Callable[[list[int]], Any],
        shift: Callable[[Sequence[Any], Tensor], Tensor],
        *,
        attention_mask: Tensor | None = None,
        pad: int | None = None,
        ordinary: Sequence[int] = (),
        group: int = 1,
        log_probs: bool = False,
    ) -> None:
        self.open, self.shift, self.mask = open, shift, attention_mask
        self.pad, self.ordinary, self.group, self.log_probs = pad, ordinary, group, log_probs
        self.states: list[Any] = []
        self.rows: list[list[int]] = []
        self.width = 0

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        """input_ids [rows, t], scores [rows, V] -> float32 [rows, V]."""
        shifted = self.shift(self.follow(input_ids), scores.float())
        return shifted.log_softmax(-1) if self.log_probs else shifted

    def follow(self, input_ids: Tensor) -> list[Any]:
        """The states of the rows, each having accepted all of its row."""
        rows, before = input_ids.tolist(), self.states
        found = [self._continue(number, row) for number, row in enumerate(rows)] if self.rows else self._open(rows)
        taken = set[int]()
        self.states = []
        for state in found:
            self.states.append(state.fork() if id(state) in taken else state)
            taken.add(id(state))
        for state in before:
            if id(state) not in taken:
                state.close()
        self.rows = rows
        for state, row in zip(self.states, rows, strict=True):
            self._catch_up(state, row[self.width :])
        return self.states

    def close(self) -> None:
        for state in self.states:
            state.close()

    def _open(self, rows: list[list[int]]) -> list[Any]:
        self.width = len(rows[0])
        mask = self.mask if self.mask is not None else self._guess(rows)
        masks = mask.repeat_interleave(len(rows) // mask.shape[0], 0).tolist()
        return [
            self.open([t for t, m in zip(row, real, strict=True) if m]) for row, real in zip(rows, masks, strict=True)
        ]

    def _guess(self, rows: list[list[int]]) -> Tensor:
        lengths = [next((i for i, token in enumerate(row) if token != self.pad), len(row)) for row in rows]
        if any(lengths) and self.pad in self.ordinary:
            raise InputError(
                "rows",
                must="be told apart from their padding",
                got=f"rows that begin with token {self.pad}, which is padding or text",
                do="give attention_mask",
            )
        return torch.tensor([[0] * n + [1] * (len(row) - n) for n, row in zip(lengths, rows, strict=True)])

    def _continue(self, number: int, row: list[int]) -> Any:
        if number < len(self.rows) and row[: len(self.rows[number])] == self.rows[number]:
            return self.states[number]
        start = number // self.group * self.group
        shared = {old: _common(row, self.rows[old]) for old in range(start, min(start + self.group, len(self.rows)))}
        best = max(shared, key=lambda old: shared[old], default=-1)
        if best < 0 or shared[best] < self.width:
            raise InputError(
                "rows",
                must="go on with the prompts that it began with",
                got="another prompt",
                do="make a new processor for each call of generate, with beams=num_beams",
            )
        return self.states[best]

    def _catch_up(self, state: Any, tokens: list[int]) -> None:
        same = _common(state.tokens, tokens)
        state.rewind(len(state.tokens) - same)
        for token in tokens[same:]:
            state.accept(token)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
