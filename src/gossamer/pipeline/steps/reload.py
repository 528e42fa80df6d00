"""Reload: read the saved model back from disk and prove that it is the one that was saved."""

from __future__ import annotations

from torch import Tensor

from gossamer.core.bundle import Bundle
from gossamer.core.card import Card
from gossamer.core.errors import GossamerError
from gossamer.core.options import Config, option
from gossamer.parts.roundtrip import encode, probe, prove_same
from gossamer.pipeline.job import Job, Step
from gossamer.pipeline.probe_texts import probe_texts
from gossamer.pipeline.stage import load_bundle
from gossamer.pipeline.steps.save import RESULT

CARD = Card(title="Reload", claim="the model on disk gives the same outputs", requires=("saved",), builtin=True)


class ReloadConfig(Config):
    bound: float = option(0.0, "largest change of a log-probability", ge=0, effect="report")


class Reload(Step):
    config_class = ReloadConfig

    def apply(self, bundle: Bundle, job: Job) -> Bundle:
        texts = probe_texts(job)
        before = probe(bundle.model, bundle.processor, texts)
        read = load_bundle(job.folder / RESULT, lambda: job.companions)
        read.lineage = bundle.lineage
        again = probe(read.model, read.processor, texts, like=before)
        prove_same_tokens(before.ids, [encode(read.processor, text) for text in texts])
        self.notes = {"round_trip": prove_same(before, again, what="reload", largest=self.config.bound).as_dict()}
        return read


def prove_same_tokens(before: list[Tensor], after: list[Tensor]) -> None:
    """The tokenizer read back cuts the texts as the one that was saved."""
    if [ids.tolist() for ids in before] != [ids.tolist() for ids in after]:
        raise GossamerError("reload: tokenizer", must="cut the texts as before", do="do not use the result")
