"""Rows of narrated videos to batches: frames to features, narrations to questions, answers to text vectors."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoTokenizer

from gossamer.architectures.vlog.modeling import spread
from gossamer.core.errors import InputError
from gossamer.core.paths import cache_dir, write_json
from gossamer.parts.dual_encoder import FeatureCache, same_encoder
from gossamer.parts.front_end import IGNORED
from gossamer.parts.narration import clip_rows, instructions, read_clips
from gossamer.parts.narration_index import NOTHING, described
from gossamer.parts.narration_pairs import NarrationPairs, narration_pairs, normalise

FILE = "processor_config.json"
SHAPES = "{video or features, narrations: [[start, end, text], ...], scene?} or {video or features, question, answer}"
Example = dict[str, Any]


class VLogProcessor:
    """Tokenizer, encoder and the rules of the data: frames a second, longest query, whether answers are pairs.

    ``encoder`` is opened by name when it is first needed; what its vectors depend on is kept in ``image_encoder`` and
    ``text_encoder``, and another encoder under that name is refused. A row is one of

        {"video": path, "narrations": [[start, end, text], ...], "scene": text}     many questions, see `instructions`
        {"video": path, "context": [[start, end], ...], "question": text, "answer": text or list}

    or has, instead of a video, its ``features`` [T, width]: a tensor, or the path of a .npy or .safetensors file.

    With ``closed`` the answers of all rows are a closed set of labels: a batch then names its row of them and holds
    the vectors of all, instead of the answers' own.

    Batches hold features with ``feature_mean`` taken away, over ``feature_scale``: per column, of the rows that
    :meth:`examples` saw first. Followed by a linear projector this is linear still; without it the encoder's constant
    part, several times the rest, makes learning slow.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        encoder_name: str = "dinov2-small+all-minilm-l6-v2",
        method: str = "vlog",
        max_frames: int = 128,
        max_text: int = 128,
        fps: float = 2.0,
        closed: bool = False,
        image_encoder: Mapping[str, Any] | None = None,
        text_encoder: Mapping[str, Any] | None = None,
        feature_mean: Sequence[float] | None = None,
        feature_scale: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.encoder_name, self.method = tokenizer, encoder_name, method
        self.max_frames, self.max_text, self.fps, self.seed = max_frames, max_text, fps, seed
        self.closed = closed
        self.image_encoder = dict(image_encoder) if image_encoder else None
        self.text_encoder = dict(text_encoder) if text_encoder else None
        self.feature_mean, self.feature_scale = feature_mean, feature_scale
        self._encoder: Any = None
        self._known_ids: dict[str, list[int]] = {}
        self._scaling: tuple[Tensor, Tensor] | None = None

    @property
    def encoder(self) -> Any:
        """The dual encoder, opened on first use. InputError where it is not the one of the saved fingerprints."""
        if self._encoder is None:
            from gossamer.hub.encoders import open_dual_encoder

            images, _, texts = self.encoder_name.partition("+")
            self.encoder = open_dual_encoder(images, texts or None)
        return self._encoder

    @encoder.setter
    def encoder(self, encoder: Any) -> None:
        images = {"name": encoder.name, "width": encoder.image_width, "fingerprint": encoder.image_fingerprint}
        for side, kept, own in (
            ("image", self.image_encoder, images),
            ("text", self.text_encoder, described(encoder)),
        ):
            if kept is not None and not same_encoder(str(kept["fingerprint"]), str(own["fingerprint"])):
                raise InputError(
                    f"vlog: {side} encoder",
                    must=f"be the one that the model was trained with, {kept['name']!r} ({kept['fingerprint']})",
                    got=f"{own['name']!r} ({own['fingerprint']})",
                    do="open that encoder, or train the model with this one",
                )
        self._encoder, self.image_encoder, self.text_encoder = encoder, images, described(encoder)

    def features(self, path: str | Path) -> Tensor:
        """Features [T, width] of a video file at ``fps``; kept in the cache by path, size and time of change."""
        from gossamer.parts.video import read_frames

        file = Path(path)
        stat = file.stat() if file.is_file() else None
        key = f"{file.resolve()} {stat.st_size if stat else 0} {stat.st_mtime_ns if stat else 0} {self.fps}"
        folder = cache_dir("features", self.encoder.image_fingerprint)

        def make() -> Tensor:
            frames: list[Any] = []
            parts: list[Tensor] = []
            for frame in read_frames(file, fps=self.fps):
                frames.append(frame.image)
                if len(frames) == 32:
                    parts.append(self.encoder.images(frames))
                    frames = []
            return torch.cat([*parts, self.encoder.images(frames)])

        return FeatureCache(folder, self.encoder).of(key, make)

    def examples(self, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Rows to examples ``{"features", "input_ids", "text", "target" or "labels"}``, in the order of ``rows``."""
        pairs = None
        if self.method == "vlog":
            texts = [clip.text for row in rows if "narrations" in row for clip in read_clips(row, "row")]
            pairs = narration_pairs(texts) if texts else None
        rng = random.Random(self.seed)
        found: list[Example] = []
        for number, row in enumerate(rows):
            found += self._row(row, f"row {number}", pairs, rng)
        if self.feature_mean is None and found:
            self._standardise(torch.cat([example["features"] for example in found]))
        if self.method != "generative" and found:
            unique = list(dict.fromkeys(example["text"] for example in found))
            vectors = self.encoder.texts([text or NOTHING for text in unique])
            if self.text_encoder is None:
                self.text_encoder = described(self.encoder)
            table = dict(zip(unique, vectors, strict=True))
            numbers = {text: number for number, text in enumerate(unique)}
            for example in found:
                if self.closed:
                    example |= {"candidates": vectors, "label": numbers[example["text"]]}
                else:
                    example["target"] = table[example["text"]]
        return found

    def inputs(self, features: Sequence[Tensor], questions: Sequence[str]) -> dict[str, Tensor]:
        """A batch without answers, from the features [t_i, width] of each row and its question."""
        pairs = zip(features, questions, strict=True)
        return self.collate([{"features": self._thin(rows), "input_ids": self._ids(text)} for rows, text in pairs])

    def continued(self, question: str, words: Sequence[str]) -> dict[str, Tensor] | None:
        """ids and mask [b, t] of ``words`` after ``question``, ended by EOS; None where a token crosses the seam."""
        head, ids = self._plain_ids(question), []
        for text in words:
            whole = self._ids(f"{question} {text}")
            if whole[: len(head)] != head:
                return None
            ids.append(torch.tensor(whole[len(head) :]))
        stack = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": stack(ids, batch_first=True, padding_value=float(self.tokenizer.eos_token_id)),
            "attention_mask": stack([torch.ones_like(row) for row in ids], batch_first=True),
        }

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """One padded batch for the model: features, their mask, ids, their mask, and the answers."""
        frames = [self._standard(example["features"]) for example in examples]
        ids = [torch.tensor(example["input_ids"]) for example in examples]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        stack = torch.nn.utils.rnn.pad_sequence
        batch = {
            "features": stack(frames, batch_first=True),
            "feature_mask": stack([torch.ones(len(rows), dtype=torch.int64) for rows in frames], batch_first=True),
            "input_ids": stack(ids, batch_first=True, padding_value=float(pad)),
            "attention_mask": stack([torch.ones_like(row) for row in ids], batch_first=True),
        }
        if "labels" in examples[0]:
            labels = [torch.tensor(example["labels"]) for example in examples]
            batch["labels"] = stack(labels, batch_first=True, padding_value=float(IGNORED))
        if "candidates" in examples[0]:
            batch["candidates"] = examples[0]["candidates"]
            batch["labels"] = torch.tensor([example["label"] for example in examples])
        if "target" in examples[0]:
            batch["targets"] = torch.stack([example["target"] for example in examples])
            numbers = {text: n for n, text in enumerate(dict.fromkeys(example["text"] for example in examples))}
            batch["target_ids"] = torch.tensor([numbers[example["text"]] for example in examples])
        return batch

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """The tokenizer's files and ``processor_config.json``."""
        self.tokenizer.save_pretrained(str(folder))
        kept = ("encoder_name", "method", "max_frames", "max_text", "fps", "closed", "image_encoder", "text_encoder",
                "feature_mean", "feature_scale", "seed")  # fmt: skip
        write_json(
            Path(folder) / FILE,
            {"processor_class": type(self).__name__, **{name: getattr(self, name) for name in kept}},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> Self:
        """Read what :meth:`save_pretrained` wrote."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise InputError(str(folder), must=f"hold {FILE}", do="give a folder that a VLog processor was saved to")
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("processor_class")
        return cls(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False), **settings)

    def _row(
        self, row: Mapping[str, Any], where: str, pairs: NarrationPairs | None, rng: random.Random
    ) -> list[Example]:
        if "narrations" in row:
            asked = instructions(read_clips(row, where), row.get("scene"), pairs=pairs, rng=rng)
        elif "question" in row and "answer" in row:
            answers = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
            asked = [{"context": row.get("context"), "question": row["question"], "answer": rng.choice(answers)}]
        else:
            raise InputError(where, must=f"be {SHAPES}", got=sorted(row))
        features = self._features_of(row, where)
        made = []
        for item in asked:
            text, ids = normalise(item["answer"]), self._ids(item["question"])
            example: Example = {"features": self._cut(features, item["context"]), "input_ids": ids, "text": text}
            if self.method == "generative":
                answer = [*self._plain_ids(text), self.tokenizer.eos_token_id]
                example["input_ids"] = [*ids, *answer]
                example["labels"] = [IGNORED] * len(ids) + answer
            made.append(example)
        return made

    def _features_of(self, row: Mapping[str, Any], where: str) -> Tensor:
        given = row.get("features")
        if given is None:
            if "video" not in row:
                raise InputError(where, must=f"be {SHAPES}", got=sorted(row))
            return self.features(row["video"])
        if isinstance(given, str | Path):
            given = _read_features(Path(given))
        features = torch.as_tensor(given, dtype=torch.float32)
        if features.dim() != 2 or not len(features) or not torch.isfinite(features).all():
            raise InputError(f"{where}: features", must="be finite [frames, width]", got=tuple(features.shape))
        return features

    def _cut(self, features: Tensor, context: Any) -> Tensor:
        """The rows of one window (start, end), or of several one after the other; all for None."""
        if context is None:
            return self._thin(features)
        windows = [context] if isinstance(context[0], int | float) else context
        cut = [features[clip_rows(start, end, self.fps, len(features))] for start, end in windows]
        return self._thin(torch.cat(cut))

    def _standardise(self, features: Tensor) -> None:
        """Keep mean and deviation of each column; columns that hardly vary are not blown up."""
        deviation = features.std(0, correction=0)
        least = 0.1 * float(deviation.mean()) or 1.0
        self.feature_mean = [round(value, 4) for value in features.mean(0).tolist()]
        self.feature_scale = [round(value, 4) for value in deviation.clamp(min=least).tolist()]
        self._scaling = None

    def _standard(self, features: Tensor) -> Tensor:
        if self.feature_mean is None or self.feature_scale is None:
            return features.float()
        if features.shape[-1] != len(self.feature_mean):
            raise InputError(
                "vlog: features", must=f"be {len(self.feature_mean)} wide, as in training", got=features.shape[-1]
            )
        if self._scaling is None:
            self._scaling = torch.tensor(self.feature_mean), torch.tensor(self.feature_scale)
        return (features.float() - self._scaling[0]) / self._scaling[1]

    def _thin(self, features: Tensor) -> Tensor:
        return features[spread(len(features), self.max_frames)]

    def _ids(self, question: str) -> list[int]:
        """The query's ids, ended by EOS."""
        ids = self._plain_ids(question)
        if len(ids) + 1 > self.max_text:
            raise InputError(
                f"query {question[:40]!r}...",
                must=f"have at most {self.max_text - 1} tokens",
                got=len(ids),
                do="shorten it",
            )
        return [*ids, self.tokenizer.eos_token_id]

    def _plain_ids(self, text: str) -> list[int]:
        if text not in self._known_ids:
            self._known_ids[text] = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._known_ids[text]


def _read_features(path: Path) -> Any:
    if path.suffix == ".npy":
        import numpy as np

        return np.load(path, allow_pickle=False)
    from safetensors.torch import load_file

    return load_file(path)["features"]
