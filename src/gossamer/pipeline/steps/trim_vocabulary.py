"""Trim the vocabulary: keep the tokens that a corpus uses, with the bytes and merges that they are made of.

Text of the corpus is tokenised as before; other text falls back to bytes. Nothing is trained and the logits of kept
tokens are the same bits.
"""

from __future__ import annotations

from gossamer.core.bundle import Bundle
from gossamer.core.card import Card
from gossamer.core.options import Config, option
from gossamer.pipeline.job import Job, Step
from gossamer.pipeline.probe_texts import row_text

CARD = Card(
    title="Trim the vocabulary",
    claim="fewer embedding rows with the same outputs on the corpus",
    requires=("float_weights",),
    forbids=("adapter_attached",),
    provides=("vocabulary_trimmed",),
    builtin=True,
)


class TrimVocabularyConfig(Config):
    corpus: str = option(
        "data", "whose tokens to keep: the recipe's data (its whole train split), or a packaged corpus"
    )
    min_count: int = option(1, "how often a token must occur to be kept", ge=1)


class TrimVocabulary(Step):
    config_class = TrimVocabularyConfig

    def apply(self, bundle: Bundle, job: Job) -> Bundle:
        from gossamer.parts.vocabulary import trim_vocabulary

        trimmed = trim_vocabulary(bundle.model, bundle.processor, self._texts(job), min_count=self.config.min_count)
        bundle.model, bundle.processor = trimmed.model, trimmed.tokenizer
        self.notes = {"vocabulary": [trimmed.report.tokens_before, trimmed.report.tokens_after]}
        return bundle

    def _texts(self, job: Job) -> list[str]:
        from gossamer.hub.corpora import load_corpus

        data = job.recipe.data
        if self.config.corpus != "data":
            rows = load_corpus(self.config.corpus, split="train").rows
        elif data is not None and data.name is not None:
            # the whole train split, not the sample that is trained on: more of the words to come are kept whole
            rows = load_corpus(data.name, split="train").rows
        else:
            rows = job.data["train"]
        return [row_text(row) for row in rows]
