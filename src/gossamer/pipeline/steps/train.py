"""Train: minimise an objective over the data's train split, with one trainer for all.

Where an adapter is attached only its parameters train; else all of the model does. The step goes on from its last
checkpoint when a run is resumed.
"""

from __future__ import annotations

from typing import Any

from gossamer.core import registry
from gossamer.core.bundle import Bundle
from gossamer.core.card import Card
from gossamer.core.options import Config, option
from gossamer.core.recipe import split_reference
from gossamer.pipeline.job import Job, Step
from gossamer.pipeline.stage import is_adapted

CARD = Card(
    title="Train",
    claim="held-out loss falls",
    requires=("float_weights|adapter_attached",),
    provides=("trained",),
    builtin=True,
)


class TrainConfig(Config):
    objective: str | dict[str, str] = option("sft", "what to minimise", system="objectives")
    optimizer: str | dict[str, str] = option("adamw", "how to step", system="optimizers")
    steps: int = option(100, "optimizer steps", ge=1)
    batch_size: int = option(8, "rows in one forward pass", ge=1)
    accumulation: int = option(1, "forward passes in one step; the result is that of one large batch", ge=1)
    max_length: int = option(512, "tokens of a row; a longer prompt keeps its end", ge=8)
    warmup: float = option(0.1, "share of the steps over which the learning rate rises", ge=0, le=1)
    schedule: str = option("cosine", "course of the learning rate", choices=("cosine", "linear", "constant"))
    clip: float = option(1.0, "largest norm of the gradient", gt=0)
    precision: str = option("bf16", "bf16 autocast or fp32", choices=("bf16", "fp32"))
    packing: bool = option(False, "several rows in one sequence, without attention between them")
    save_every: int = option(20, "steps between checkpoints that a resumed run goes on from", ge=1, effect="speed")


class Train(Step):
    config_class = TrainConfig

    def apply(self, bundle: Bundle, job: Job) -> Bundle:
        from gossamer.parts.training import TrainSettings, train

        config = self.config
        objective = self._system(config.objective, "objectives", job)
        optimizer = self._system(config.optimizer, "optimizers", job)
        names = ("steps", "batch_size", "accumulation", "max_length", "warmup", "schedule", "clip", "precision")
        values = {name: getattr(config, name) for name in (*names, "packing", "save_every")}
        if not is_adapted(bundle.model):
            bundle.model.requires_grad_(True)
        tick = job.reporter.task("train")
        result = train(
            bundle.model,
            bundle.processor,
            job.data["train"],
            objective=objective,
            optimizer=optimizer,
            settings=TrainSettings(**values, seed=self.seed),
            folder=job.scratch,
            progress=lambda step, total, loss: tick(step, total),
        )
        curve = [(float(step), round(float(loss), 4)) for step, loss in result.curve]
        self.notes = {"training_loss": [curve[0][1], curve[-1][1]], "trained_tokens": result.tokens, "curve": curve}
        bundle.model.eval()
        return bundle

    def _system(self, reference: str | dict[str, dict[str, Any]], kind: str, job: Job) -> Any:
        name, options = split_reference(reference)
        entry = registry.find(name, kind=kind)
        companions = job.companions if any(spec.companion for spec in entry.options) else {}
        return entry.load()(seed=self.seed, companions=companions, **options)
