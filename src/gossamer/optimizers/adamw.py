"""AdamW: Adam with decoupled weight decay.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    theta = (1 - lr * wd) theta - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

torch's own class, fused where the device has a fused kernel. Loshchilov and Hutter, arXiv 1711.05101.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from gossamer.core.card import Card
from gossamer.core.options import Config, option
from gossamer.kinds.optimizers import Optimizer

CARD = Card(title="AdamW", claim="the baseline that other optimizers are measured against", builtin=True)


class AdamWConfig(Config):
    """Rate, averages and decay."""

    lr: float = option(3e-4, "learning rate at the top of the schedule", gt=0)
    beta1: float = option(0.9, "decay of the gradient average", ge=0, lt=1)
    beta2: float = option(0.999, "decay of the average of squared gradients", ge=0, lt=1)
    eps: float = option(1e-8, "added to the root of the second average", gt=0)
    weight_decay: float = option(0.0, "decoupled decay of matrices; vectors never decay", ge=0)


class AdamW(Optimizer):
    """Builds ``torch.optim.AdamW``."""

    config_class = AdamWConfig

    def build(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        config: AdamWConfig = self.config
        return torch.optim.AdamW(
            params,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
