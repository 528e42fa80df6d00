"""The runner's interface over a model's own forward, for models whose blocks are not known.

Every request is a :class:`~gossamer.parts.several_models.Row`. A tree is verified path by path, each on a copy of the
row that shares its past, so nothing depends on how the model reads masks; it costs a forward pass over all paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.parts.decode_state import Chunk, Output, Tree, check_new, settled_path
from gossamer.parts.several_models import CachedModel, Row


class OwnState:
    """A request of :class:`OwnForward`; as :class:`~gossamer.parts.decode_state.State`."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.row = Row()
        self.pending: Tree | None = None
        self.branches: list[tuple[list[int], Row]] = []

    @property
    def room(self) -> int:
        return self.capacity - self.length

    def crop(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise InputError("crop", must=f"keep from 0 to {self.length} tokens", got=length)
        self.row.crop(length)
        self.length, self.pending, self.branches = length, None, []

    def keep(self, indices: Sequence[int]) -> None:
        settled_path(self.pending, indices)
        path = list(indices)
        if path:
            self.row = next(row for branch, row in self.branches if branch[: len(path)] == path)
            self.row.crop(self.length + len(path))
        self.length += len(path)
        self.pending, self.branches = None, []

    def fork(self) -> OwnState:
        twin = OwnState(self.capacity)
        twin.length, twin.row = self.length, self.row.fork()
        return twin

    def check(self, count: int, where: str) -> None:
        check_new(self, count, where)


class OwnForward:
    """Runs chunks through the model as transformers would."""

    def __init__(self, model: Any, max_length: int) -> None:
        self.base, self.max_length = CachedModel(model), max_length

    def open(self) -> OwnState:
        return OwnState(self.max_length)

    def run(self, chunks: Sequence[Chunk], hidden: tuple[int, ...], head: Callable[[Tensor], Tensor]) -> list[Output]:
        if any(layer != -1 for layer in hidden):
            raise InputError("hidden", must="be (-1,) where the model runs its own forward", got=hidden)
        found = []
        for chunk in chunks:
            scores, states = self._chunk(chunk, bool(hidden))
            rows = {"all": slice(None), "last": slice(-1, None), "none": slice(0, 0)}[chunk.logits]
            found.append(Output(scores[rows], None if states is None else states[None]))
        return found

    def _chunk(self, chunk: Chunk, hidden: bool) -> tuple[Tensor, Tensor | None]:
        """Logits and last hidden states of all new tokens."""
        state = chunk.state
        if chunk.tree.chain:
            out = self.base.forward([state.row], [chunk.tokens], keep=[len(chunk.tokens)], hidden=hidden)
            return out.logits[0], None if out.hidden is None else out.hidden[0]
        scores: dict[int, Tensor] = {}
        states: dict[int, Tensor] = {}
        for path in chunk.tree.paths():
            row = state.row.fork()
            out = self.base.forward([row], [[chunk.tokens[i] for i in path]], keep=[len(path)], hidden=hidden)
            state.branches.append((path, row))
            scores.update(zip(path, out.logits[0], strict=True))
            if out.hidden is not None:
                states.update(zip(path, out.hidden[0], strict=True))
        order = range(len(chunk.tokens))
        return torch.stack([scores[i] for i in order]), torch.stack([states[i] for i in order]) if hidden else None
