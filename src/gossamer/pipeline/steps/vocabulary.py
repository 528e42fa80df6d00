"""Vocabulary: write the narrator's vocabulary from the training narrations, calibrate it, score it on the test videos.

The folder is RUN/narrator.vocab, which ``gossamer narrate VIDEO --model RUN`` finds. The threshold below which a clip
is marked out of vocabulary is a low quantile of the scores of the validation clips. R@1 is the share of test clips
whose narration, word by word, comes first; it counts narrations that no training video has against the narrator.
"""

from __future__ import annotations

from typing import Any

from gossamer.core.bundle import Bundle
from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.pipeline.job import Job, Row, Step

CARD = Card(
    title="Vocabulary",
    claim="the narrations of the training videos can be retrieved at once",
    modality=("video", "text"),
    requires=("trained",),
    builtin=True,
)


class VocabularyConfig(Config):
    share: float = option(0.05, "share of validation clips that lie below the threshold", gt=0, lt=1)


class Vocabulary(Step):
    config_class = VocabularyConfig

    def apply(self, bundle: Bundle, job: Job) -> Bundle:
        from gossamer.parts.narration import calibrate, narrate_features
        from gossamer.parts.narration_index import NarrationIndex

        model, processor = bundle.model, bundle.processor
        if not hasattr(model, "embed"):
            raise InputError(
                "vocabulary", must="follow a narrator", got=type(model).__name__, do="build one with a vlog step"
            )
        texts = [
            {"text": clip[2], "video": row["video"]} | ({"scene": row["scene"]} if row.get("scene") else {})
            for row in job.data["train"]
            for clip in _clips(row)
        ]
        index = NarrationIndex.build(texts, processor.encoder)
        index.save(job.folder / "narrator.vocab")

        def narrated(split: str) -> list[tuple[str, Any]]:
            """What each clip is, and what was found."""
            found: list[tuple[str, Any]] = []
            for row in job.data[split]:
                spans = [(float(start), float(end)) for start, end, _ in _clips(row)]
                answers = narrate_features(model, processor, index, processor.features(row["video"]), spans)
                found += zip((clip[2] for clip in _clips(row)), answers, strict=True)
            return found

        model.config.oov_threshold = calibrate((one.score for _, one in narrated("validation")), self.config.share)
        test = narrated("test")
        right = sum(" ".join(text.split()) == one.text for text, one in test) / len(test)
        self.notes = {
            "prefixes": len(index.prefixes),
            "postfixes": len(index.postfixes),
            "threshold": model.config.oov_threshold,
            "test_clips": len(test),
            "R@1": right,
        }
        return bundle


def _clips(row: Row) -> list[Any]:
    if "narrations" not in row:
        do = 'give rows {"video", "narrations": [[start, end, text], ...], "scene"}'
        raise InputError("vocabulary: row", must="have narrations", got=sorted(row), do=do)
    return list(row["narrations"])
