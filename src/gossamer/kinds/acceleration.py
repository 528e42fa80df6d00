"""Acceleration: ``accelerate(model, processor) -> (model, processor)`` with fewer tokens, layers or context a step."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from torch import nn

from gossamer.core.errors import InputError
from gossamer.kinds.base import System


class Acceleration(System):
    """Changes how a model runs, not its weights; ``model.gossamer_acceleration`` names what is on it."""

    verb = "accelerate"
    slot: ClassVar[str] = "gossamer_acceleration"

    def check(self, model: nn.Module, processor: Any = None) -> None:
        present = getattr(model, self.slot, None)
        if present is not None:
            raise InputError(
                f"{self.name}.accelerate",
                must="get a model that nothing accelerates yet",
                got=f"one with {present}",
                do="release it first",
            )

    def finish(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        setattr(result[0], self.slot, self.name)
        return result

    @abc.abstractmethod
    def accelerate(self, model: Any, processor: Any = None) -> tuple[Any, Any]:
        """Return the model, changed in place, and its processor; ``generate`` and ``forward`` work as before."""

    @abc.abstractmethod
    def release(self, model: Any) -> Any:
        """Take it off: bit for bit the model that was accelerated. Ends with ``self.released(model)``."""

    @abc.abstractmethod
    def report(self) -> dict[str, Any]:
        """What the last prefill cost: tokens by layer, operations, cache bytes, beside those of the plain model."""

    def released(self, model: Any) -> Any:
        """Forget the mark; :class:`InputError` where this system is not on the model."""
        present = getattr(model, self.slot, None)
        if present != self.name:
            raise InputError(
                f"{self.name}.release", must="get the model that it accelerates", got=f"one with {present or 'nothing'}"
            )
        delattr(model, self.slot)
        return model
