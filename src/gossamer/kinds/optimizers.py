"""Optimizers: ``build(params) -> torch.optim.Optimizer``, with the callbacks that feed it."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.kinds.base import System


class Optimizer(System):
    """Builds an ordinary torch optimizer, so that schedulers, clipping, accumulation and checkpoints work as usual."""

    verb = "build"

    def check(self, params: Iterable[Any]) -> None:
        if isinstance(params, list | tuple) and not params:
            raise InputError(
                f"{self.name}.build",
                must="get at least one trainable parameter",
                got="none",
                do="attach an adapter, or call model.requires_grad_(True)",
            )

    @abc.abstractmethod
    def build(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        """The optimizer over ``params``: parameters, or groups, whose own ``weight_decay`` overrides the option's."""

    def callbacks(self, model: nn.Module, objective: Any) -> list[Any]:
        """Step hooks (:class:`gossamer.parts.training.StepHook`) or Trainer callbacks that the optimizer needs."""
        return []
