"""Merge: fold the attached adapter into the weights, W <- W + scaling B A, and prove that nothing else changed.

The sum is taken in float32 and rounded once to the weights' own type.
"""

from __future__ import annotations

import torch

from gossamer.core.bundle import Bundle
from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.kinds.adapters import ModuleAdapter
from gossamer.parts.roundtrip import probe, prove_changed, prove_same
from gossamer.pipeline.job import Job, Step
from gossamer.pipeline.probe_texts import probe_texts

CARD = Card(
    title="Merge",
    claim="the merged model gives the adapted model's outputs",
    requires=("adapter_attached", "float_weights"),
    removes=("adapter_attached",),
    provides=("merged",),
    builtin=True,
)


class MergeConfig(Config):
    bound: float = option(
        1e-3, "largest change of a log-probability that is taken as the same, in float32", gt=0, effect="report"
    )


class Merge(Step):
    config_class = MergeConfig

    def apply(self, bundle: Bundle, job: Job) -> Bundle:
        model, tokenizer = bundle.model, bundle.processor
        texts = probe_texts(job)
        adapter = bundle.adapters[-1]
        of_hooks = isinstance(adapter, ModuleAdapter)
        if not hasattr(adapter, "merge"):
            raise InputError("merge", must="follow an adapter that can be folded in", got=adapter.name)
        stored = _stored(model, of_hooks)
        _cast(model.eval(), torch.float32)
        adapted = probe(model, tokenizer, texts)
        with adapter.disabled(model) if of_hooks else model.disable_adapter():
            plain = probe(model, tokenizer, texts, like=adapted)
        merged = adapter.merge(model)
        after = probe(merged, tokenizer, texts, like=adapted)
        found = prove_same(adapted, after, what="merge", largest=self.config.bound, weights=False)
        if _trained(bundle):
            prove_changed(plain, after, what="merge")
        self.notes = {"round_trip": found.as_dict()}
        _cast(merged, stored)
        bundle.model = merged.requires_grad_(False)
        bundle.adapters.pop()
        return bundle


def _stored(model: torch.nn.Module, of_hooks: bool) -> torch.dtype:
    """The type of the model's own weights."""
    own = (
        parameter.dtype
        for name, parameter in model.named_parameters()
        if (not name.startswith(f"{ModuleAdapter.slot}.") if of_hooks else "base_layer" in name)
    )
    return next(own)


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: rotary frequencies and other buffers keep the type that from_pretrained gives them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _trained(bundle: Bundle) -> bool:
    return any(record["step"] == "train" for record in bundle.lineage)
