"""PAT: a fine-tuning that learns which channels of the residual stream to drop, and merges into a narrower model.

Zhang et al. 2024 (AAAI 2025, arXiv 2408.14721). d channels in the residual stream, of which d' are to stay.

An operator follows every writer to the stream, before it is added: the embedding, each o_proj and each down_proj.

    HSM(x) = v * m(t) * (x + D1 D0 x)       D0 [n_e, d]  D1 [d, n_e]  v [d]   its own;   m(t) [d]   shared by all

D1 = 0, v = 1, and m = 1 at t = 0, so that the model starts as it was. LoRA trains on all linear layers beside it.

    m(t) = sigmoid(tau w) + max(1/2 - t / T, 0)        w [d] the logits, 0 at first;  t optimizer steps of T
    tau  = 1 / (1 - ln(max(1, t)) / ln(T) + 1e-6)      from t = f T on w is fixed and tau stays, f = ``freeze_at``

Beside the objective's loss, added by the trainer (:mod:`gossamer.parts.scheduled`), once a step:

    budget         10 |n - d'| / d'                    n = number of w >= 0, its gradient passed straight through
    polarisation   mean over w > 0 of (w - 1/2)^2 + mean over w <= 0 of (w + 1/2)^2
    identity       over all operators, mean square entry of D0 D0^T - I: lengths are left to v

``trainable_mask: false`` lets the last d - d' channels decay as exp(-2.77 t / T) instead. In evaluation the mask is
rounded, m >= 1/2 to 1. :meth:`PAT.merge` folds LoRA, D1 D0 and v into the writers, drops the masked channels
everywhere and gives a dense model of the same class with hidden_size d', the head untied from the embedding:

    W <- diag(v) (I + D1 D0) (W + s B A), rows of K;   readers: columns of K;   K = kept channels, |K| = d'

How norms and embedding follow is in :mod:`gossamer.parts.residual_stream`. A recipe is pat, train, merge, save.

Where this differs: at the freezing step ``exact`` puts the d' largest logits to 1/2 and the others to -1/2, where the
paper's losses leave them near that after thousands of steps: what is tuned from then on is the model that stays, also
in a short run; norms keep their eps and the stream is scaled instead,
since eps is that of other norms too; d' is a multiple of the number of heads, which stock classes ask for. The untied
head costs vocabulary times d' numbers: cut the vocabulary of a Gemma first. Inputs given as embeddings pass by the
first operator.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from gossamer.adapters.pat.modules import After, LowRank, Modules, Operator
from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.kinds.adapters import ModuleAdapter
from gossamer.parts.injection import Projection, check_rank, projections
from gossamer.parts.residual_stream import Stream, narrow, residual_stream, untie, width_multiple

CARD = Card(
    title="PAT: Pruning-Aware Tuning for Large Language Models",
    paper="2408.14721",
    year=2024,
    claim="with a quarter or 40 % of the hidden channels dropped, held-out loss below that of pruning first and "
    "tuning the rest with LoRA",
    traits=("identity_at_init",),
    requires=("float_weights",),
    provides=("adapter_attached",),
    forbids=("adapter_attached",),
    limits="the gain over LoRA without pruning on 7B models is not shown here",
)


class PATConfig(Config):
    keep_ratio: float = option(0.75, "share of the hidden channels that stays", gt=0, lt=1)
    round_to: int = option(8, "the number kept is a multiple of this and of the number of heads", ge=1)
    inner: int = option(32, "n_e, width inside each operator; the paper has 200 at 4096 channels", ge=1)
    lora_rank: int = option(20, "rank of the low-rank updates", ge=1)
    lora_alpha: float = option(4.0, "the low-rank updates are scaled by lora_alpha / lora_rank", gt=0)
    lora_dropout: float = option(0.05, "share of a layer's inputs dropped before A, in training", ge=0, lt=1)
    mask_steps: int | None = option(None, "T, optimizer steps of the mask's schedule; none: those of the run", ge=1)
    freeze_at: float = option(0.8, "share of T after which the logits stay", gt=0, lt=1)
    budget_weight: float = option(10.0, "weight of the budget term", ge=0)
    identity_weight: float = option(1.0, "weight of the identity term", ge=0)
    trainable_mask: bool = option(True, "learn which channels go; without, the last ones decay")
    exact: bool = option(True, "where the logits stop, harden them to the number kept; without, merging may refuse")


class PAT(ModuleAdapter):
    """``attach``, train with any objective, ``merge`` to a narrower dense model."""

    config_class = PATConfig
    config: PATConfig

    def check(self, model: Any) -> None:
        super().check(model)
        stream = residual_stream(model, self.name)
        if self.config.inner > stream.width:
            raise InputError(f"{self.name}.inner", must=f"be at most the width {stream.width}", got=self.config.inner)
        check_rank(f"{self.name}.lora_rank", self.config.lora_rank, projections(model))
        self.kept_channels(model)

    def kept_channels(self, model: Any) -> int:
        """d' for this model. Raises InputError where rounding leaves nothing to drop or to keep."""
        width = residual_stream(model, self.name).width
        multiple = math.lcm(self.config.round_to, width_multiple(model))
        kept = multiple * round(width * self.config.keep_ratio / multiple)
        if not 0 < kept < width:
            raise InputError(
                f"{self.name}.keep_ratio",
                must=f"leave some of the {width} channels and drop some, in steps of {multiple}",
                got=self.config.keep_ratio,
                do="change keep_ratio or lower round_to",
            )
        return kept

    def modules(self, model: Any) -> Modules:
        stream = residual_stream(model, self.name)
        shapes = [(one.d_in, one.d_out) for one in projections(model)]
        made = Modules(stream.width, len(stream.writers), shapes, self.kept_channels(model), self.config)
        return made.to(next(model.parameters()).device)

    def hook(self, model: Any, modules: Any) -> list[Any]:
        handles = []
        for path, update, operator in _places(residual_stream(model, self.name), projections(model), modules):
            handles.append(model.get_submodule(path).register_forward_hook(After(update, operator)))
        return handles

    def settle(self, model: Any) -> None:
        """End the schedule now, with the d' channels of the largest logits."""
        getattr(model, self.slot).mask.finish()

    def channels(self, model: Any) -> dict[str, int]:
        """Of an attached model: width d, target d', and the channels that the rounded mask keeps now."""
        mask = getattr(model, self.slot).mask
        return {"width": len(mask.logits), "target": mask.target, "kept": len(mask.kept())}

    @torch.no_grad()
    def merge(self, model: Any) -> Any:
        """A dense model with hidden_size d' that computes what ``model`` computes with the rounded mask.

        ``model`` itself is left without adapter, its weights full width with LoRA and operators folded in. Raises
        InputError where the mask does not keep d' channels.
        """
        modules, count = getattr(model, self.slot), self.channels(model)
        if count["kept"] != count["target"]:
            raise InputError(
                f"{self.name}.merge",
                must=f"find a mask that keeps {count['target']} of {count['width']} channels",
                got=f"{count['kept']}",
                do="train to the end of the mask's schedule with exact: true, or call settle(model) to keep the "
                f"{count['target']} channels of the largest logits",
            )
        keep = modules.mask.kept()
        stream = residual_stream(model, self.name)
        places = _places(stream, projections(model), modules)
        self.detach(model)
        if stream.tied:
            untie(model)
        for path, update, operator in places:
            _fold(model.get_submodule(path), update, operator)
        return narrow(model, keep, self.name)


Place = tuple[str, LowRank | None, Operator | None]


def _places(stream: Stream, found: list[Projection], modules: Modules) -> list[Place]:
    """What each layer gets, by path: the embedding, then the linear layers."""
    first, *others = modules.operators
    operators: dict[str, Any] = dict(zip(stream.writers, others, strict=True))
    updates: Any = modules.updates
    return [
        (stream.embedding, None, first),  # type: ignore[list-item]
        *((one.path, update, operators.get(one.path)) for one, update in zip(found, updates, strict=True)),
    ]


def _fold(layer: Any, update: LowRank | None, operator: Operator | None) -> None:
    """The layer alone does what it did with them, but for the mask; summed in float64 and rounded once."""
    weight = layer.weight.double()
    bias = None if getattr(layer, "bias", None) is None else layer.bias.double()
    if update is not None:
        weight = weight + update.matrix()
    if operator is not None:
        matrix = operator.matrix()
        # rows of an embedding are what it writes; of a linear layer, columns
        weight = weight @ matrix.T if isinstance(layer, nn.Embedding) else matrix @ weight
        bias = None if bias is None else matrix @ bias
    layer.weight.data = weight.to(layer.weight.dtype)
    if bias is not None:
        layer.bias.data = bias.to(layer.bias.dtype)
