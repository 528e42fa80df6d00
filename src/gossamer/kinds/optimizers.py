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
        """The optimizer over ``params`` (parameters or parameter groups)."""

    def callbacks(self, model: nn.Module, objective: Any) -> list[Any]:
        """Trainer callbacks that the optimizer needs, such as curvature estimates every k steps."""
        return []


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay, vectors (norms, biases) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
