"""Direct preference optimisation: learn from pairs of answers without a reward model and without sampling.

For a prompt x with a chosen answer y_w and a rejected one y_l, the log-ratio of an answer is

    a(y) = log pi(y|x) - log ref(y|x),     log pi(y|x) = sum over answer tokens, the end token included

and with the margin d = a(y_w) - a(y_l) the loss of a pair is

    dpo   -(1 - s) log sigmoid(beta d) - s log sigmoid(-beta d)          s > 0: conservative DPO (cDPO)
    ipo    (1 - s) (d - 1 / (2 beta))^2 + s (d + 1 / (2 beta))^2

so that beta a(y) is the implicit reward. Chosen and rejected run in one forward pass, [2n, t]; log-probabilities are
summed in float32; policy and reference both run without dropout. Rafailov et al., arXiv 2305.18290; IPO: arXiv
2310.12036. The mean over pairs is weighted by the rows' weights.

Here the reference is the model with its adapter switched off, another model, or (``precomputed``) the policy itself as
training finds it, scored once before the first step: the choice where the start is an adapter that was trained before,
or where all weights train. ``none`` drops the term. Smoothing applies to IPO as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.kinds.objectives import Batch, Loss, Objective, select_rows, token_batch, without_dropout
from gossamer.parts.data import PreferencePair, label_mask
from gossamer.parts.scorer import sequence_logprobs

CARD = Card(
    title="DPO: direct preference optimisation",
    paper="2305.18290",
    year=2023,
    claim="at equal KL from the reference, clearly more true reward than fine-tuning on the chosen answers",
    traits=("needs_reference",),
    limits="judging by people or by a large model, and PPO, are not shown here",
)


class DPOConfig(Config):
    """Temperature, loss, reference."""

    beta: float = option(0.1, "strength of the tie to the reference: larger stays nearer", gt=0)
    loss: str = option("dpo", "loss of a pair", choices=("dpo", "ipo"))
    label_smoothing: float = option(0.0, "share of pairs taken to be labelled the wrong way round", ge=0, lt=0.5)
    reference: str = option(
        "adapter_off",
        "where reference log-probabilities come from",
        choices=("adapter_off", "model", "precomputed", "none"),
    )
    reference_model: str | None = option(None, "the model for reference: model", companion=True)
    length_norm: bool = option(False, "divide log-probabilities by the number of answer tokens")
    sft_weight: float = option(0.0, "weight of the chosen answers' mean negative log-likelihood", ge=0)
    precompute_ref: bool = option(False, "score the reference once, before training", effect="speed")


class DPO(Objective):
    """Trains on rows of prompt, chosen and rejected."""

    config_class = DPOConfig
    rows = ("preference",)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        tokens = token_batch(batch)
        lengths = label_mask(tokens["labels"]).sum(dim=1)  # [2n]
        reference = self._reference(model, batch, tokens)
        with without_dropout(model):
            policy = sequence_logprobs(model, tokens)  # [2n]
        ratios = policy - reference
        if self.config.length_norm:
            ratios = ratios / lengths
        chosen, rejected = ratios.chunk(2)
        losses = pair_loss(chosen - rejected, self.config)
        if self.config.sft_weight:
            losses = losses - self.config.sft_weight * (policy / lengths).chunk(2)[0]
        weights = _pair_weights(batch)
        return Loss((weights * losses).sum() / self.normaliser(batch), self._parts(ratios, policy, lengths, weights))

    def amount(self, batch: Batch) -> float:
        return float(_pair_weights(batch).sum())

    def narrow(self, batch: Batch, share: float) -> Batch:
        pairs = batch["input_ids"].shape[0] // 2
        kept = torch.arange(max(1, round(share * pairs)))
        return select_rows(batch, torch.cat([kept, pairs + kept]))

    def examples(self, rows: Sequence[Any], tokenizer: Any, *, max_length: int) -> list[Any]:
        pairs = super().examples(rows, tokenizer, max_length=max_length)
        for number, pair in enumerate(pairs):
            if min(pair.chosen.supervised, pair.rejected.supervised) == 0:
                raise InputError(
                    f"{self.name}: row {number}",
                    must="keep tokens of both answers",
                    got=f"none within {max_length} tokens",
                    do="raise max_length or shorten the prompt",
                )
        kept = [pair for pair in pairs if pair.chosen.input_ids != pair.rejected.input_ids]
        if not kept:
            raise InputError(f"{self.name}: rows", must="hold a pair whose answers differ", got=f"none in {len(pairs)}")
        if len(kept) < len(pairs):
            dropped = len(pairs) - len(kept)
            logging.getLogger(__name__).warning(
                "%s: dropped %d of %d pairs whose two answers are equal", self.name, dropped, len(pairs)
            )
        return kept

    def prepare(self, model: nn.Module, examples: list[Any], tokenizer: Any) -> list[Any]:
        """Score the reference once where the options ask for it; float32 log-probabilities join the examples."""
        config: DPOConfig = self.config
        if config.reference == "none" or not (config.reference == "precomputed" or config.precompute_ref):
            return examples
        device = next(model.parameters()).device
        order = sorted(range(len(examples)), key=lambda i: -_longest(examples[i]))
        scored: dict[int, _Scored] = {}
        for first in range(0, len(order), 8):
            chosen = order[first : first + 8]
            batch = super().collate([examples[i] for i in chosen], tokenizer)
            batch = {key: item.to(device) for key, item in batch.items()}
            logprobs = self._live_reference(model, batch).cpu().view(2, -1).T.tolist()
            for place, pair in zip(chosen, logprobs, strict=True):
                scored[place] = _Scored(examples[place], (pair[0], pair[1]))
        return [scored[place] for place in range(len(examples))]

    def collate(self, examples: list[Any], tokenizer: Any) -> Batch:
        """Chosen rows, then rejected rows: [2n, t]; with ``reference_logprobs`` [2n] where they were precomputed."""
        if not isinstance(examples[0], _Scored):
            return super().collate(examples, tokenizer)
        batch = super().collate([example.pair for example in examples], tokenizer)
        batch["reference_logprobs"] = torch.tensor([example.reference for example in examples]).T.flatten()
        return batch

    def _reference(self, model: nn.Module, batch: Batch, tokens: Batch) -> Tensor:
        """Reference log-probabilities [2n]."""
        if self.config.reference == "none":
            return torch.zeros(len(tokens["input_ids"]), device=tokens["input_ids"].device)
        if "reference_logprobs" in batch:
            return batch["reference_logprobs"]
        if self.config.reference == "precomputed":
            raise InputError(
                f"{self.name}.loss",
                must="get batches with reference log-probabilities",
                got="none",
                do="call prepare(model, examples, tokenizer) before collating, as the trainer does",
            )
        return self._live_reference(model, tokens)

    @torch.no_grad()
    def _live_reference(self, model: Any, tokens: Batch) -> Tensor:
        source, switched_off = model, contextlib.nullcontext()
        if self.config.reference == "model":
            source = self._companion_for(model)
        elif self.config.reference == "adapter_off":
            if not hasattr(model, "disable_adapter"):
                raise InputError(
                    f"{self.name}: reference adapter_off",
                    must="have a PEFT adapter to switch off",
                    got=type(model).__name__,
                    do="attach an adapter first, or set reference: precomputed",
                )
            switched_off = model.disable_adapter()
        with switched_off, without_dropout(source):
            return sequence_logprobs(source, tokens)

    def _companion_for(self, model: Any) -> Any:
        if self.config.reference_model is None:
            raise InputError(f"{self.name}: reference model", must="be named", do="set reference_model")
        reference = self.companion(self.config.reference_model)
        sizes = [one.config.get_text_config().vocab_size for one in (model, reference)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{self.name}: reference model",
                must=f"have the policy's vocabulary of {sizes[0]} tokens",
                got=sizes[1],
                do="take the reference from before the vocabulary was changed, or change both",
            )
        return reference

    def _parts(self, ratios: Tensor, policy: Tensor, lengths: Tensor, weights: Tensor) -> dict[str, float]:
        rewards = self.config.beta * ratios.detach()
        chosen, rejected = rewards.chunk(2)
        columns = {
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "margin": chosen - rejected,
            "accuracy": (chosen > rejected).float(),
            "logprob_chosen": policy.detach().chunk(2)[0],
            "logprob_rejected": policy.detach().chunk(2)[1],
            "length_chosen": lengths.chunk(2)[0].float(),
            "length_rejected": lengths.chunk(2)[1].float(),
        }
        total = weights.sum().clamp(min=1e-12)
        return {name: float((weights * column).sum() / total) for name, column in columns.items()}


def pair_loss(margin: Tensor, config: DPOConfig) -> Tensor:
    """The loss of each pair from its margin d (differences of log-ratios), same shape."""
    smoothing = config.label_smoothing
    if config.loss == "ipo":
        target = 1 / (2 * config.beta)
        return (1 - smoothing) * (margin - target) ** 2 + smoothing * (margin + target) ** 2
    scaled = config.beta * margin
    return -(1 - smoothing) * F.logsigmoid(scaled) - smoothing * F.logsigmoid(-scaled)


@dataclasses.dataclass(frozen=True, slots=True)
class _Scored:
    """A pair with the reference's log-probabilities of its chosen and its rejected answer."""

    pair: PreferencePair
    reference: tuple[float, float]


def _pair_weights(batch: Batch) -> Tensor:
    """Weight of each pair [n]: that of its row, which every answer token carries."""
    return batch["loss_weights"].max(dim=1).values.chunk(2)[0]


def _longest(pair: PreferencePair) -> int:
    return max(len(pair.chosen.input_ids), len(pair.rejected.input_ids))
