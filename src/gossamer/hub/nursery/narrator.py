"""The sample narrator: a small VLog that knows the event videos of the sample world, and its vocabulary.

The first four of llama-7m's layers with the vocabulary of the questions and of some English, trained on videos of the
places that are not held out, drawn at 180 x 320 and jittered a little (shift, brightness, contrast, JPEG) so that video
files look like training. The places' own scripts are drawn in style "flat"; mixed videos, in which anything is done
with anything, in "flat" and "photo", jittered more (colour, sharpness). They are not in the vocabulary: from them the
model learns what verbs and objects look like apart, so that an event that is added later is found by its words. Nine of
ten mixed validation clips with events that the vocabulary lacks score below its out-of-vocabulary threshold.

Two places and the style "textured" are held out. Of "garage" ("recombined" in the figures) the words are known, each
from other events; of "pottery" ("unseen") nothing is, neither pictures nor words: clips are marked, not narrated.

``python -m gossamer.hub.nursery.train narrator`` makes the folder ``narrator`` again; features are kept in the cache,
and a run that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import platform
import random
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from filelock import FileLock
from torch import Tensor

from gossamer.core.paths import atomic_dir, cache_dir, write_json
from gossamer.hub.worlds.events import SCENES, EventVideo, event_videos, narrations
from gossamer.parts.dual_encoder import FeatureCache
from gossamer.parts.narration import QUERIES, Clip, Narrated, Narrator, instructions
from gossamer.parts.narration_index import NarrationIndex
from gossamer.parts.narration_pairs import NarrationPairs, narration_pairs

Jitter = Literal["none", "light", "strong"]
RECOMBINED, UNSEEN = "garage", "pottery"
FOREIGN = 0.9  # share of foreign clips that are to be marked
FRAME = (180, 320)  # height, width in which training videos are drawn
SETTINGS: dict[str, Any] = {
    "videos": 160, "mixed": 1200, "validation": 24, "test": 40, "layers": 4, "max_frames": 16, "steps": 3600,
    "batch": 64, "rate": 2e-3, "ways": 2, "seed": 0,
}  # fmt: skip


def load_narrator(folder: Path | None = None) -> tuple[Any, Any, NarrationIndex]:
    """(model in float32, its processor, its vocabulary) of ``folder``, by default the one in the package."""
    from transformers import AutoModel, AutoProcessor

    from gossamer.core import hook

    hook.install()
    folder = folder or Path(__file__).parent / "narrator"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    return model, processor, NarrationIndex.load(folder / "narrator.vocab", processor.text_encoder)


def train_narrator(
    name: str = "narrator", *, out: Path | None = None, steps: int | None = None, **settings: Any
) -> dict[str, Any]:
    """Train and write model, processor, narrator.vocab and training.json; returns the content of the last."""
    given = SETTINGS | settings | ({"steps": steps} if steps else {})
    with FileLock(cache_dir("nursery", name) / ".lock"):
        started = time.perf_counter()
        data = _data(given)
        prepared = time.perf_counter() - started
        model, processor = _model(given)
        processor.encoder = data["encoder"]
        processor.closed = True
        rows = [row for video, features in data["train"] for row in _rows(video, features, given)]
        rows += [row for video, features in data["mixed"] for row in _rows(video, features, given, ("current",))]
        key = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]
        run = cache_dir("nursery", name, f"run-{key}")
        result = _train(model, processor, rows, given, run)
        # as it will be read from disk
        model.to(torch.bfloat16).float().eval()
        index = NarrationIndex.build(vocabulary_rows(video for video, _ in data["train"]), data["encoder"])
        report = _report(model, processor, index, data) | {
            "command": " ".join(["python", "-m", "gossamer.hub.nursery.train", *sys.argv[1:]]),
            "settings": given,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": round(result.seconds, 1),
            "seconds_of_data": round(prepared, 1),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__}
            | {"transformers": transformers.__version__},
            "curve": [[step, round(loss, 3)] for step, loss in result.curve[:: max(1, len(result.curve) // 100)]],
        }
        with atomic_dir(out or Path(__file__).parent / name) as folder:
            model.to(torch.bfloat16).save_pretrained(folder)
            processor.save_pretrained(folder)
            index.save(folder / "narrator.vocab")
            write_json(folder / "training.json", report)
        shutil.rmtree(run)
    return report


def event_features(videos: Sequence[EventVideo], encoder: Any, *, jitter: Jitter = "light") -> list[Tensor]:
    """Features [2 a second, width] of event videos, from the cache where they are there."""
    kinds = {"none": "plain", "light": "jittered", "strong": "strongly-jittered"}
    cache = FeatureCache(cache_dir("features", "events", kinds[jitter], encoder.image_fingerprint), encoder)
    found = []
    for video in videos:
        key = f"{video.name} {video.style} {FRAME}"
        found.append(cache.of(key, functools.partial(_encoded, video, encoder, jitter)))
    return found


def vocabulary_rows(videos: Iterable[EventVideo]) -> list[dict[str, str]]:
    """What :meth:`NarrationIndex.build` takes: the narrations of each video with its name and place."""
    return [
        {"text": clip.narration, "video": video.name, "scene": video.scene} for video in videos for clip in video.clips
    ]


def narrated(narrator: Narrator, video: EventVideo, features: Tensor, relation: str = "current") -> list[Narrated]:
    """The answers for each clip that has one; see :func:`truths` for what they should be."""
    clips = [features[2 * shown : 2 * shown + 2] for shown, _ in _places(video, relation)]
    narrator.question = QUERIES[relation][0]
    return narrator.narrate(clips, narrator.scene(features))


def truths(video: EventVideo, relation: str = "current") -> list[Any]:
    """The clips that answer the question of ``relation``, in the order of :func:`narrated`."""
    return [video.clips[wanted] for _, wanted in _places(video, relation)]


def _places(video: EventVideo, relation: str) -> list[tuple[int, int]]:
    """(clip on show, clip that answers)"""
    step = {"current": 0, "next": -1, "previous": 1}[relation]
    count = len(video.clips)
    return [(wanted + step, wanted) for wanted in range(count) if 0 <= wanted + step < count]


def _data(given: dict[str, Any]) -> dict[str, Any]:
    """Videos with their features by split, and the encoder."""
    from gossamer.hub.encoders import open_dual_encoder

    encoder = open_dual_encoder("dinov2-small", "all-minilm-l6-v2")
    videos = {
        "train": event_videos("train", given["videos"]),
        "validation": event_videos("validation", given["validation"]),
        "test": event_videos("test", given["test"]),
        "mixed": [
            video
            for seed, style in enumerate(("flat", "photo"))
            for video in event_videos("train", given["mixed"] // 2, seed=seed, style=style, mixed=True)
        ],
        "outside": event_videos("validation", 24, mixed=True),
        "mixed_test": event_videos("test", 20, mixed=True),
        "recombined": event_videos("test", 10, scenes=[RECOMBINED]),
        "recombined_textured": event_videos("test", 10, scenes=[RECOMBINED], style="textured"),
        "unseen": event_videos("test", 10, scenes=[UNSEEN]),
        "unseen_textured": event_videos("test", 10, scenes=[UNSEEN], style="textured"),
        "textured": event_videos("test", 12, style="textured"),
    }
    data: dict[str, Any] = {"encoder": encoder}
    for split, some in videos.items():
        jitter: Jitter = "strong" if split == "mixed" else "light"
        data[split] = list(zip(some, event_features(some, encoder, jitter=jitter), strict=True))
        print(f"features of {len(some)} videos of {split}", flush=True)
    return data


def _model(given: dict[str, Any]) -> tuple[Any, Any]:
    """A VLog on the first layers of llama-7m with a trimmed vocabulary, and its processor."""
    from gossamer.core import registry
    from gossamer.hub.corpora import load_corpus
    from gossamer.hub.nursery import load_nursery
    from gossamer.parts.vocabulary import trim_vocabulary

    base, tokenizer = load_nursery("llama-7m")
    prose = load_corpus("english_prose", split="validation", limit=150).rows
    texts = [
        *(way for ways in QUERIES.values() for way in ways),
        *narrations([*SCENES, RECOMBINED], mixed=True),
        *(row["text"] for row in prose),
    ]
    trimmed = trim_vocabulary(base, tokenizer, texts)
    base = trimmed.model
    base.model.layers = base.model.layers[: given["layers"]]
    base.config.num_hidden_layers = given["layers"]
    base.config.name_or_path = "llama-7m"  # and not where it lies here
    system = registry.find("vlog").load()(max_frames=given["max_frames"], seed=given["seed"])
    return system.build(base), system.processor(trimmed.tokenizer)


def _rows(
    video: EventVideo, features: Tensor, given: dict[str, Any], relations: Sequence[str] = tuple(QUERIES)
) -> list[dict[str, Any]]:
    """All questions with both halves of the answer once, events alone ``ways`` times more, asked differently each
    time, and the place of stretches of 5 seconds and more."""
    rng = random.Random(f"{video.name} {video.style}")
    told = [Clip(clip.start, clip.end, clip.narration) for clip in video.clips]
    bare = [Clip(clip.start, clip.end, clip.prefix) for clip in video.clips]
    asked = instructions(told, None, pairs=_pairs(), relations=relations, rng=rng)
    for _ in range(given["ways"]):
        asked += instructions(bare, None, relations=relations, rng=rng)
    keys = ("context", "question", "answer")
    rows: list[dict[str, Any]] = [{"features": features, **{key: row[key] for key in keys}} for row in asked]
    for _ in range(8 if "scene" in relations else 0):
        length = rng.randint(5, len(video.clips))
        start = rng.randint(0, len(video.clips) - length)
        question = rng.choice(QUERIES["scene"])
        context = [[start, start + length]]
        rows.append({"features": features, "context": context, "question": question, "answer": video.scene})
    return rows


@functools.cache
def _pairs() -> NarrationPairs:
    return narration_pairs(narrations(mixed=True))


def _train(model: Any, processor: Any, rows: list[dict[str, Any]], given: dict[str, Any], folder: Path) -> Any:
    from gossamer.core import registry
    from gossamer.parts.training import TrainSettings, train

    def say(step: int, total: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"step {step}/{total} loss {loss:.3f}", flush=True)

    return train(
        model,
        processor,
        rows,
        objective=registry.find("own_loss").load()(),
        optimizer=registry.find("adamw").load()(lr=given["rate"], beta2=0.95),
        settings=TrainSettings(
            steps=given["steps"], batch_size=given["batch"], warmup=0.06, seed=given["seed"], save_every=200
        ),
        folder=folder,
        progress=say,
    )


def _report(model: Any, processor: Any, index: NarrationIndex, data: dict[str, Any]) -> dict[str, Any]:
    """R@1 by text on test videos, and how well scores tell known clips from others; sets the threshold."""
    narrator = Narrator(model, processor, index)
    foreign = [
        row.score
        for told in data["outside"]
        for row, clip in zip(narrated(narrator, *told), truths(told[0]), strict=True)
        if clip.prefix not in index.prefixes
    ]
    narrator.threshold = model.config.oov_threshold = float(np.quantile(foreign, FOREIGN))
    figures: dict[str, Any] = {"oov_threshold": model.config.oov_threshold}
    for relation in ("current", "next", "previous"):
        figures |= _right(narrator, data["test"], relation, relation)
    places = [(narrator.scene(features).hit, video.scene) for video, features in data["test"]]
    figures["scene"] = round(100 * float(np.mean([hit is not None and hit.text == name for hit, name in places])), 1)
    figures |= _right(narrator, data["textured"], "current", "textured")
    for split in ("test", "textured", "mixed_test", "recombined", "recombined_textured", "unseen", "unseen_textured"):
        marked = [not row.known for told in data[split] for row in narrated(narrator, *told)]
        figures[f"{split}_marked_out_of_vocabulary"] = round(100 * float(np.mean(marked)), 1)
    larger = NarrationIndex.build(vocabulary_rows(video for video, _ in data["train"]), data["encoder"])
    # without a scene: the model does not know this one
    larger.add(narrations([RECOMBINED]), data["encoder"])
    after = Narrator(model, processor, larger)
    for split in ("recombined", "recombined_textured", "test"):
        figures |= _right(after, data[split], "current", f"{split}_after_adding")
    everything = NarrationIndex.build(narrations(mixed=True), data["encoder"])
    figures |= _right(Narrator(model, processor, everything), data["mixed_test"], "current", "mixed_among_all")
    return {f"held_out_{name}": value for name, value in figures.items()}


def _right(narrator: Narrator, told: Any, relation: str, name: str) -> dict[str, float]:
    """Events and whole narrations that are right, in per cent."""
    pairs = [
        (row.prefix == clip.prefix, row.text == clip.narration)
        for video, features in told
        for row, clip in zip(narrated(narrator, video, features, relation), truths(video, relation), strict=True)
    ]
    events, whole = (round(100 * float(np.mean([pair[place] for pair in pairs])), 1) for place in (0, 1))
    return {f"{name}_event": events, f"{name}_narration": whole}


def _encoded(video: EventVideo, encoder: Any, jitter: Jitter) -> Tensor:
    return encoder.images(_frames(video, jitter))


def _frames(video: EventVideo, jitter: Jitter) -> list[np.ndarray[Any, Any]]:
    frames = list(video.frames(2.0, FRAME))
    if jitter == "none":
        return frames
    rng = random.Random(f"jitter {video.name} {video.style}")
    light, contrast = rng.uniform(-12, 12), rng.uniform(0.9, 1.1)
    down, right = rng.randint(-5, 5), rng.randint(-8, 8)
    quality = rng.randint(45, 95)
    if jitter == "strong":
        colour = np.array([rng.uniform(0.8, 1.2) for _ in range(3)], np.float32)
        contrast *= rng.uniform(0.8, 1.2)
        share = rng.uniform(0.35, 1.0)
        frames = [_softened(frame, colour, share) for frame in frames]
    return [_jittered(frame, light, contrast, down, right, quality) for frame in frames]


def _softened(frame: np.ndarray[Any, Any], colour: np.ndarray[Any, Any], share: float) -> np.ndarray[Any, Any]:
    """In other light, and with the sharpness of a picture of ``share`` of its size."""
    from PIL import Image

    height, width = frame.shape[:2]
    tinted = Image.fromarray(np.clip(frame * colour, 0, 255).astype(np.uint8))
    small = tinted.resize((max(1, round(width * share)), max(1, round(height * share))), Image.Resampling.BILINEAR)
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def _jittered(
    frame: np.ndarray[Any, Any], light: float, contrast: float, down: int, right: int, quality: int
) -> np.ndarray[Any, Any]:
    from PIL import Image

    height, width = frame.shape[:2]
    rows = np.clip(np.arange(height) + down, 0, height - 1)
    columns = np.clip(np.arange(width) + right, 0, width - 1)
    moved = frame[rows][:, columns].astype(np.float32)
    toned = np.clip((moved - 128) * contrast + 128 + light, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(toned).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream).convert("RGB"))
