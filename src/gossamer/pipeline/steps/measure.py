"""Measure: what the model can do and what it costs, as it stands after the steps before.

As a step it measures an intermediate model as an arm of its own; as a recipe's ``measure:`` block it gives the
quantities for the untouched model and the result.
"""

from __future__ import annotations

from typing import Any

from gossamer.core.bundle import Bundle
from gossamer.core.card import Card
from gossamer.core.options import Config, option
from gossamer.pipeline.arms import measure_arm
from gossamer.pipeline.job import Job, Step

CARD = Card(title="Measure", claim="the same prompts and seed for every arm", builtin=True)


class MeasureConfig(Config):
    quantities: tuple[str, ...] = option(
        ("task", "perplexity", "size", "memory", "decode_speed"),
        "what to measure, evaluations such as llm_kick among it; size, memory and decode_speed are taken of saved "
        "models, at the end",
        choices=("task", "perplexity", "size", "memory", "decode_speed"),
        names="evaluation",
        effect="report",
    )
    evaluations: dict[str, Any] = option(
        {}, "options of the evaluations that are measured, such as {llm_kick: {shots: 3}}", names="evaluation",
        effect="report",
    )  # fmt: skip
    questions: str | None = option(
        None, "a file of rows that the evaluations ask, in place of their built-in tasks", effect="report"
    )
    arm: str = option("intermediate", "name of this arm in the report", effect="report")
    batch_size: int = option(16, "prompts generated together", ge=1, effect="speed")
    new_tokens: int = option(24, "longest answer, in tokens", ge=1, effect="report")
    few_shot: int = option(3, "worked examples in the few-shot arm; 0 leaves that arm out", ge=0, effect="report")
    rounds: int = option(5, "rounds of alternating decoding runs", ge=1, effect="report")


class Measure(Step):
    config_class = MeasureConfig

    def apply(self, bundle: Bundle, job: Job) -> Bundle:
        measure_arm(bundle, job, self.config, self.config.arm)
        return bundle
