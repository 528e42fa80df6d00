"""Supervised fine-tuning: weighted negative log-likelihood of the answer tokens.

    L = sum_i sum_t  w[i, t] * -log p(y[i, t] | y[i, <t])  /  N

over the supervised positions of a batch (all tokens of plain text, the answers of prompts and conversations), where w
are the float weights of rows and messages and N their sum over everything that one optimizer step sees. Logits are
computed at supervised positions only, [n, V] instead of [batch, length, V].
"""

from __future__ import annotations

from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.options import Config
from gossamer.kinds.objectives import Batch, Loss, Objective, token_batch
from gossamer.parts.data import selected_nll, supervised_logits, weight_sum

CARD = Card(
    title="Supervised fine-tuning",
    claim="the loss of one large batch, whatever the number of micro-batches and the padding",
    builtin=True,
)


class SFTConfig(Config):
    """It has no options: weights come with the rows."""


class SFT(Objective):
    """The loss that plain fine-tuning minimises; rows are texts, completions or conversations."""

    config_class = SFTConfig
    packs = True
    likelihood = True

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        logits, targets, weights = supervised_logits(model, token_batch(batch))
        return Loss(selected_nll(logits, targets, weights, self.normaliser(batch)))

    def amount(self, batch: Batch) -> float:
        return float(weight_sum(batch))

    def logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, _, weights = supervised_logits(model, token_batch(batch))
        return logits, weights
