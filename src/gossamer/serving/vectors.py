"""Embeddings: one vector of length 1 for each text, from the served model or from an encoder beside it.

With h_t [d] the last hidden states of a text of n tokens, after the final norm, the vector is v / |v| with

    v = (h_1 + ... + h_n) / n        "mean"        v = h_n        "last"
"""

from __future__ import annotations

import base64
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.parts.decode_state import Chunk, chain
from gossamer.serving.engine import BESIDE, Engine

Pooling = Literal["mean", "last"]


class ModelVectors:
    """Of the served model, read on the engine's thread in blocks between its steps."""

    def __init__(self, engine: Engine, pooling: Pooling = "mean") -> None:
        self.engine, self.pooling, self.name = engine, pooling, engine.name
        self.tokenizer, self.created = engine.tokenizer, engine.created
        self.max_length = engine.max_length

    def parts(self, ids: Sequence[int]) -> list[Callable[[], Any]]:
        """What is to be run one after another on the engine's thread; the last gives the vector."""
        runner, total = self.engine.runner, list[Tensor]()
        state = runner.open()

        def read(start: int) -> list[float]:
            part = ids[start : start + BESIDE]
            hidden = runner.run([Chunk(state, part, chain(len(part)), "none")], (-1,))[0].hidden
            assert hidden is not None
            total.append(hidden[0].float().sum(0) if self.pooling == "mean" else hidden[0, -1].float())
            pooled = torch.stack(total).sum(0) / len(ids) if self.pooling == "mean" else total[-1]
            return _unit(pooled)

        return [functools.partial(read, start) for start in range(0, len(ids), BESIDE)]


class EncoderVectors:
    """Of an encoder: the mean over a text's tokens."""

    def __init__(self, model: Any, tokenizer: Any, name: str, created: int) -> None:
        self.model, self.tokenizer, self.name, self.created = model, tokenizer, name, created
        config = model.config
        if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
            raise InputError(f"embeddings {name}", must="be a text encoder", got=type(model).__name__)
        room = int(getattr(config, "max_position_embeddings", 512))
        self.max_length = min(room, int(min(getattr(tokenizer, "model_max_length", room), room)))
        tokenizer("a")  # the first call may change its settings, which threads must not do to one another

    def parts(self, ids: Sequence[int]) -> list[Callable[[], Any]]:
        return [lambda: self._vector(ids)]

    @torch.no_grad()
    def _vector(self, ids: Sequence[int]) -> list[float]:
        hidden = self.model(input_ids=torch.tensor([list(ids)], device=self.model.device)).last_hidden_state
        return _unit(hidden[0].float().mean(0))


def as_base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as the OpenAI API writes them."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _unit(vector: Tensor) -> list[float]:
    found: list[float] = torch.nn.functional.normalize(vector, dim=0).tolist()
    return found
