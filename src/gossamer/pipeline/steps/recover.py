"""Recover: bring a LoRA that was trained on a small copy back to the whole model, as a plain PEFT LoRA.

The whole model is the one before ``small_copy`` in this recipe, or one listed under ``models:`` where the recipe began
with the copy. From here on the run is about the whole model.
"""

from __future__ import annotations

from gossamer.core.bundle import Bundle
from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.pipeline.job import Job, Step
from gossamer.pipeline.stage import whole_path

CARD = Card(
    title="Recover",
    claim="the adapter on the whole model loads with PEFT alone, and what was pruned gets no update",
    requires=("small_copy", "adapter_attached"),
    removes=("small_copy", "pruned", "quantised"),
    provides=("float_weights",),
    builtin=True,
)


class RecoverConfig(Config):
    base: str | None = option(None, "the whole model, where the recipe's own is the copy", companion=True)
    fill: str = option(
        "zero", "inputs that were pruned: no update, or small random factors", choices=("zero", "normal")
    )


class Recover(Step):
    config_class = RecoverConfig

    def apply(self, bundle: Bundle, job: Job) -> Bundle:
        from gossamer.hub.models import load_model, resolve

        system = bundle.adapters[-1]
        if not hasattr(system, "recover"):
            do = "attach loram to the small copy"
            raise InputError("recover", must="follow an adapter that can be recovered", got=system.name, do=do)
        named = self.config.base
        path = whole_path(job) if named is None else resolve(job.recipe.models[named]).path
        base = load_model(str(path))[0]
        held = sum(parameter.numel() for parameter in bundle.model.get_base_model().parameters())
        bundle.model = system.recover(bundle.model, base, fill=self.config.fill)
        job.base = str(path)
        self.notes = {"parameters_in_training": held}
        return bundle
