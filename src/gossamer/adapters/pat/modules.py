"""PAT's modules: the mask that all share, the operator on a writer, and the low-rank update of a linear layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.parts.scheduled import Scheduled

DECAY = 2.77  # of the fixed mask
POLE = 0.5  # |w| that the polarisation aims at


class Mask(Scheduled):
    """m(t) [d] for every writer: soft in training, rounded to 0 and 1 in evaluation. See the system's equations.

    ``target`` is d'. The clock, persistent, holds t and T; T is 0 until the first step is told.
    """

    logits: Tensor
    clock: Tensor

    def __init__(self, width: int, target: int, config: Any, operators: nn.ModuleList) -> None:
        super().__init__()
        self.target, self.config = target, config
        self.trains = bool(config.trainable_mask)
        if self.trains:
            self.logits = nn.Parameter(torch.zeros(width))
        else:
            self.register_buffer("logits", POLE - (torch.arange(width) >= target).float())
        self.register_buffer("clock", torch.zeros(2, dtype=torch.long))
        self._operators = [operators]  # in a list, or they would be registered here too

    def forward(self) -> Tensor:
        soft = self.soft()
        return soft if self.training else (soft.detach() >= 0.5).to(soft.dtype)

    def soft(self) -> Tensor:
        """m(t) with its gradient; ones at t = 0."""
        t, span = self._clock()
        if not self.trains:
            return torch.where(self.logits > 0, 1.0, math.exp(-DECAY * t / span))
        w = self.logits.detach() if self.frozen else self.logits
        held = max(1.0, min(t, self.config.freeze_at * span))
        tau = 1.0 / (1.0 - math.log(held) / math.log(max(2, span)) + 1e-6)
        return torch.sigmoid(tau * w) + max(0.5 - t / span, 0.0)

    @property
    def frozen(self) -> bool:
        """Whether the logits have stopped learning."""
        t, span = self._clock()
        return t >= self.config.freeze_at * span

    def kept(self) -> Tensor:
        """int64: the channels whose rounded mask is 1, ascending."""
        return (self.soft().detach() >= 0.5).nonzero().flatten()

    def at_step(self, step: int, steps: int) -> None:
        """Move the clock to ``step``, never back; T is fixed by the first run."""
        if not int(self.clock[1]):
            span = self.config.mask_steps or steps
            if span > steps:
                raise InputError(
                    "pat.mask_steps", must=f"be at most the {steps} steps of the run", got=span, do="train for longer"
                )
            self.clock[1] = span
        was_frozen = self.frozen
        self.clock[0] = max(int(self.clock[0]), step)
        if self.frozen and not was_frozen and self.config.exact:
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Put all logits where the polarisation leads: the d' largest to 1/2, the others to -1/2."""
        poles = torch.full_like(self.logits, -POLE)
        poles[self.logits.topk(self.target).indices] = POLE
        self.logits.copy_(poles)

    def finish(self) -> None:
        """Settle, and end the schedule now."""
        self.clock[1] = max(1, int(self.clock[1]))
        self.clock[0] = torch.maximum(self.clock[0], self.clock[1])
        self.settle()

    def penalties(self) -> dict[str, Tensor]:
        with torch.autocast(self.logits.device.type, enabled=False):
            found = {"identity": self.config.identity_weight * self.identity()}
            if self.trains and not self.frozen:
                found |= {"budget": self.config.budget_weight * self.budget(), "polarisation": self.polarisation()}
        return found

    def budget(self) -> Tensor:
        """|n - d'| / d', n the logits >= 0, with the gradient of n taken as that of sum(w)."""
        through = self.logits - self.logits.detach()
        count = ((self.logits >= 0).to(through.dtype) + through).sum()
        return (count - self.target).abs() / self.target

    def polarisation(self) -> Tensor:
        """Mean square distance of the positive logits to 1/2 plus that of the others to -1/2."""
        w, up = self.logits, self.logits > 0
        parts = [(w[side] - pole).square() for side, pole in ((up, POLE), (~up, -POLE))]
        return torch.stack([part.mean() for part in parts if part.numel()]).sum()

    def identity(self) -> Tensor:
        """Sum over the operators of the mean square entry of D0 D0^T - I."""
        operators: Any = self._operators[0]
        return torch.stack([operator.departure() for operator in operators]).sum()

    def _clock(self) -> tuple[int, int]:
        t, span = self.clock.tolist()
        return t, span or 1


class Operator(nn.Module):
    """HSM(x) = v * m * (x + D1 D0 x) for x [..., d]."""

    def __init__(self, width: int, inner: int, mask: Mask) -> None:
        super().__init__()
        self.d0 = nn.Parameter(torch.empty(inner, width).uniform_(-(width**-0.5), width**-0.5))
        self.d1 = nn.Parameter(torch.zeros(width, inner))
        self.v = nn.Parameter(torch.ones(width))
        self._mask = [mask]  # in a list: the mask is registered once, in Modules

    def forward(self, x: Tensor) -> Tensor:
        turned = x + F.linear(F.linear(x.to(self.d0.dtype), self.d0), self.d1)
        return (self.v * self._mask[0]() * turned).to(x.dtype)

    def departure(self) -> Tensor:
        gram = self.d0 @ self.d0.T
        return (gram - torch.eye(len(gram), device=gram.device)).square().mean()

    def matrix(self) -> Tensor:
        """diag(v) (I + D1 D0) [d, d] in float64; the mask is the choice of rows."""
        d0, d1, v = (parameter.detach().double() for parameter in (self.d0, self.d1, self.v))
        return v[:, None] * (torch.eye(len(v), dtype=v.dtype, device=v.device) + d1 @ d0)


class LowRank(nn.Module):
    """scale B A dropout(x), added to a linear layer's output."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5))
        self.b = nn.Parameter(torch.zeros(d_out, rank))
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(self.dropout(x.to(self.a.dtype)), self.a), self.b)

    def matrix(self) -> Tensor:
        return self.scale * (self.b.detach().double() @ self.a.detach().double())


class Modules(nn.Module):
    """All that PAT adds: operators (the embedding's first, then the writers'), updates of the linear layers, mask."""

    def __init__(self, width: int, writers: int, shapes: list[tuple[int, int]], target: int, config: Any) -> None:
        super().__init__()
        self.operators = nn.ModuleList()
        self.mask = Mask(width, target, config, self.operators)
        self.operators.extend(Operator(width, config.inner, self.mask) for _ in range(writers + 1))
        low_rank = (config.lora_rank, config.lora_alpha, config.lora_dropout)
        self.updates = nn.ModuleList(LowRank(*shape, *low_rank) for shape in shapes)


class After:
    """The forward hook of a layer: its low-rank update, then its operator, as far as it has them."""

    def __init__(self, update: LowRank | None, operator: Operator | None) -> None:
        self.update, self.operator = update, operator

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        out = output
        if self.update is not None:
            out = out + self.update(args[0])
        if self.operator is not None:
            out = self.operator(out)
        return out.to(output.dtype)
