"""What a module inside a model may ask of whoever trains it: to be told the step, and terms beside the loss.

The trainer tells every :class:`Scheduled` module of the model the number of finished optimizer steps before the first
step and after each one, so that it is constant over the micro-batches of a step; and adds its penalties to the loss
once a step. Another training loop does the same with :func:`tell_step` and :func:`penalties`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator

from torch import Tensor, nn


class Scheduled(nn.Module, abc.ABC):
    """A module that changes over a training run."""

    @abc.abstractmethod
    def at_step(self, step: int, steps: int) -> None:
        """``step`` optimizer steps of ``steps`` are done. Raises InputError where the run does not fit the schedule."""

    @abc.abstractmethod
    def penalties(self) -> dict[str, Tensor]:
        """Terms that are added to the loss, by name; scalars with gradients, weights included."""


def tell_step(model: nn.Module, step: int, steps: int) -> None:
    """Tell every scheduled module of ``model`` that ``step`` optimizer steps of ``steps`` are done."""
    for module in _scheduled(model):
        module.at_step(step, steps)


def penalties(model: nn.Module) -> dict[str, Tensor]:
    """The penalties of every scheduled module of ``model``; those of one name are summed. Empty for most models."""
    found: dict[str, Tensor] = {}
    for module in _scheduled(model):
        for name, value in module.penalties().items():
            found[name] = found[name] + value if name in found else value
    return found


def _scheduled(model: nn.Module) -> Iterator[Scheduled]:
    return (module for module in model.modules() if isinstance(module, Scheduled))
