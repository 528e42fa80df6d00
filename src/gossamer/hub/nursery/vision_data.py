"""What the nursery's vision-language models see and are asked: scenes, questions, and features computed once.

Features lie in the cache as files of 256 images, bfloat16 [256, patches, width] stored as int16 and memory-mapped; a
file is written whole, so that an interrupted run goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from gossamer.core.paths import atomic_file, cache_dir
from gossamer.hub.models import load_model
from gossamer.hub.worlds.scene import Scene
from gossamer.hub.worlds.stills import Still, still_scenes

DESCRIBE = "Describe the picture."
_CHUNK = 256  # images a file of features


@dataclass(frozen=True)
class VisionSpec:
    """Shape of a model, what it sees and how it is trained. ``base`` "" is a new Llama of the given shape.

    ``tower_layer`` is a hidden state of the tower (0 = its embeddings). Halfway up, linear probes of four patches read
    shapes, colours and glyphs best: 94, 93 and 82 %, against 78, 84 and 54 % at the end. ``turns`` questions of an
    image are drawn for a row, and with chance ``captions`` a caption besides; ``wordings`` sets of questions are asked
    of each training image. ``blind`` is the share of rows that get zeros for the picture. At step ``restart`` (0: at
    none) the rate goes up again and the optimizers start anew. ``lora`` is the rank on a pretrained base; 0 trains all.
    """

    base: str = ""
    vocabulary: int = 1024
    hidden: int = 192
    intermediate: int = 512
    layers: int = 12
    heads: int = 4
    tower: str = "dinov2-small"
    tower_layer: int = 6
    size: int = 112
    flat: int = 10_000
    textured: int = 2_500
    held: int = 300
    turns: int = 14
    wordings: int = 6
    captions: float = 0.2
    blind: float = 0.04
    steps: int = 4600
    restart: int = 2600
    batch: int = 16
    rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.03
    lora: int = 0
    seed: int = 0
    bfloat16: bool = True

    @property
    def patches(self) -> int:
        return (self.size // 14) ** 2


class SceneData:
    """Rows (questions and captions of each image) and features of the training and held-out scenes, from the cache.

    ``rows[split]`` is a list of {"questions": [{kind, text, answer}], "captions": [...]}; splits are train, validation,
    test (flat) and textured (test scenes in that style).
    """

    def __init__(self, spec: VisionSpec) -> None:
        self.spec = spec
        self.stills = wanted = {
            "train": [*_stills("train", spec.flat, "flat"), *_stills("train", spec.textured, "textured", 1)],
            "validation": _stills("validation", spec.held // 2, "flat"),
            "test": _stills("test", spec.held, "flat"),
            "textured": _stills("test", spec.held // 2, "textured", 1),
        }
        self.rows = {
            split: [_questions(still, spec.wordings if split == "train" else 1) for still in stills]
            for split, stills in wanted.items()
        }
        pictures = _pictures(spec, wanted)
        self.sha256 = hashlib.sha256(json.dumps([pictures, self.rows]).encode()).hexdigest()
        self.folder = cache_dir("nursery", f"scenes-{pictures[:16]}")
        with FileLock(self.folder / ".lock"):
            self._files = {split: self._extract(split, stills) for split, stills in wanted.items()}

    def texts(self) -> list[str]:
        """Every question, and every answer and caption with the space before it, of the training rows."""
        found = {DESCRIBE: None}
        for row in self.rows["train"]:
            for turn in row["questions"]:
                found |= {turn["text"]: None, f" {turn['answer']}": None}
            found |= {f" {caption}": None for caption in row["captions"]}
        return list(found)

    def features(self, split: str, numbers: Sequence[int]) -> Tensor:
        """[len(numbers), patches, width] in bfloat16."""
        files = self._files[split]
        rows = [files[number // _CHUNK][number % _CHUNK] for number in numbers]
        return torch.from_numpy(np.stack(rows).view(np.int16)).view(torch.bfloat16)

    def _extract(self, split: str, stills: list[Still]) -> list[np.ndarray[Any, Any]]:
        """Memory maps of the chunks; those not there yet are computed."""
        files = [self.folder / f"{split}-{start // _CHUNK:03d}.npy" for start in range(0, len(stills), _CHUNK)]
        model: Any = None
        for number, path in enumerate(files):
            if path.is_file():
                continue
            if model is None:
                model = load_model(self.spec.tower, dtype="bfloat16")[0]
                del model.encoder.layer[self.spec.tower_layer :]
                process = image_processor(self.spec.size)
            part = stills[number * _CHUNK : (number + 1) * _CHUNK]
            made = [self._features(model, process, part[start : start + 32]) for start in range(0, len(part), 32)]
            with atomic_file(path) as temporary, open(temporary, "wb") as stream:
                np.save(stream, torch.cat(made).view(torch.int16).numpy())
            print(f"features of {split}: {min(len(stills), (number + 1) * _CHUNK)}/{len(stills)}", flush=True)
        return [np.load(path, mmap_mode="r") for path in files]

    @torch.no_grad()
    def _features(self, model: Any, process: Any, stills: list[Still]) -> Tensor:
        pixels = process([still.image(self.spec.size) for still in stills], return_tensors="pt")["pixel_values"]
        states = model(pixels.to(torch.bfloat16), output_hidden_states=True).hidden_states
        return states[-1][:, 1:]


def image_processor(size: int) -> Any:
    """Pictures to [3, size, size] with the tower's normalisation, whole (nothing is cropped)."""
    return BitImageProcessorPil(
        size={"height": size, "width": size},
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def _stills(split: str, count: int, style: str, seed: int = 0) -> list[Still]:
    return still_scenes(split, count, seed=seed, style=style) if count else []


def _questions(still: Still, sets: int) -> dict[str, Any]:
    """Questions of ``sets`` draws, each once, and captions; another key draws anew about the same picture."""
    draws = [still, *(replace(still, key=f"{still.key} again {number}") for number in range(1, sets))]
    turns = {turn.text: turn for drawn in draws for turn in drawn.questions}
    asked = [{"kind": turn.kind, "text": turn.text, "answer": turn.answer} for turn in turns.values()]
    asked += list(_easy(still.scene)) if sets > 1 else []
    return {"questions": asked, "captions": list(still.captions)}


def _easy(scene: Scene) -> Iterator[dict[str, str]]:
    """Places and glyphs asked of the only or the big thing, which the world asks of one thing among several alone."""
    big = scene.matching(size="big")
    if len(scene.things) == 1:
        yield {"kind": "place", "text": "Where is it?", "answer": scene.place(scene.things[0])}
    elif len(big) == 1:
        yield {"kind": "place", "text": "Where is the big thing?", "answer": scene.place(big[0])}
    signed = [thing for thing in scene.things if thing.glyph]
    if len(signed) == 1:
        yield {"kind": "glyph", "text": "What is written in the picture?", "answer": signed[0].glyph}
        yield {"kind": "place", "text": "Where is something written?", "answer": scene.place(signed[0])}


def _pictures(spec: VisionSpec, stills: dict[str, list[Still]]) -> str:
    """Hash of what decides the features: scenes, styles, tower, and a sample of the pictures."""
    scenes = [[split, still.style, still.scene.key()] for split, part in stills.items() for still in part]
    digest = hashlib.sha256(json.dumps([spec.tower, spec.tower_layer, spec.size, scenes]).encode())
    for part in stills.values():
        for still in part[:: max(1, len(part) // 8)]:
            digest.update(still.image(spec.size).tobytes())
    return digest.hexdigest()
