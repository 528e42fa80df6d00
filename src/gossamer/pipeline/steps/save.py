"""Save: write the model, tokenizer, adapter and fitted parts to the run folder, as a whole or not at all."""

from __future__ import annotations

from gossamer.core.bundle import Bundle
from gossamer.core.card import Card
from gossamer.pipeline.job import Job, Step
from gossamer.pipeline.stage import save_bundle

CARD = Card(title="Save", claim="what is saved is what was measured", provides=("saved",), builtin=True)

RESULT = "result"


class Save(Step):
    def apply(self, bundle: Bundle, job: Job) -> Bundle:
        save_bundle(bundle, job.folder / RESULT, base=job.base, keep_base=True)
        return bundle
