"""Fit: let a system learn what is its own (a guard's classifier, a drafter), without touching the model's weights."""

from __future__ import annotations

from gossamer.core import registry
from gossamer.core.bundle import Bundle
from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.core.recipe import split_reference
from gossamer.pipeline.job import Job, Step

CARD = Card(title="Fit", claim="the fitted part works with this model alone", provides=("guard_fitted",), builtin=True)


class FitConfig(Config):
    system: str | dict[str, str] = option("toxicdetector", "which system to fit", system="guards|decoding|acceleration")
    path: str | None = option(None, "a file of rows to fit on; the recipe's train split where not given")


class Fit(Step):
    config_class = FitConfig

    def apply(self, bundle: Bundle, job: Job) -> Bundle:
        from gossamer.kinds.base import FittedSystem

        name, options = split_reference(self.config.system)
        system = registry.find(name).load()(seed=self.seed, **options)
        if not isinstance(system, FittedSystem):
            raise InputError(
                f"fit {name}", must="name a system that learns", do="use it as it is; it has nothing to fit"
            )
        rows = read_plain(self.config.path) if self.config.path else job.data["train"]
        system.fit(bundle, rows)
        bundle.parts[name] = system
        self.notes = {"rows": len(rows)}
        return bundle


def read_plain(path: str) -> list[dict[str, object]]:
    """JSON lines of any shape; the system checks what it needs of them."""
    import json
    from pathlib import Path

    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(
                f"{path} line {number}", must="be JSON", got=str(error), do="mend or remove the line"
            ) from error
    return rows
