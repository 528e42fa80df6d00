"""Event videos with their features, questions about them, and the training and judging of one model on them."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.experiments.lab import Lab
from gossamer.hub.nursery.narrator import event_features
from gossamer.hub.worlds.events import HELD_OUT_SCENES, EventVideo, event_videos, narrations
from gossamer.parts.cider import cider_d
from gossamer.parts.narration import QUERIES, Clip, instructions
from gossamer.parts.narration_index import NarrationIndex
from gossamer.parts.narration_pairs import narration_pairs, normalise

Told = tuple[EventVideo, Tensor]  # a video and its features
CAUSAL = ("next", "previous")
NEW_TOKENS = 16
BATCH = 64
LAYERS = 3  # of llama-7m's eight
FRAMES = 8  # a clip has 2; only whole videos are thinned out


@functools.cache
def encoder() -> Any:
    from gossamer.hub.encoders import open_dual_encoder

    return open_dual_encoder("dinov2-small", "all-minilm-l6-v2")


@functools.cache
def videos(split: str, quick: bool) -> list[Told]:
    """Videos of a split with their features: train, validation, test, or held_out (places that no training sees)."""
    count = {"train": 160, "validation": 24, "test": 40, "held_out": 16}[split] // (8 if quick else 1)
    some = event_videos("test", count, scenes=HELD_OUT_SCENES) if split == "held_out" else event_videos(split, count)
    return list(zip(some, event_features(some, encoder()), strict=True))


@functools.cache
def flat_index() -> NarrationIndex:
    """Every narration of the known places, whole."""
    return NarrationIndex.build(narrations(), encoder(), pairs=False)


def questions(told: Sequence[Told], *, halves: bool = False) -> list[dict[str, Any]]:
    """Rows that a processor takes; with ``halves`` prefixes and postfixes are asked for one after the other."""
    pairs = narration_pairs(narrations()) if halves else None
    rows = []
    for video, features in told:
        clips = [Clip(clip.start, clip.end, clip.narration) for clip in video.clips]
        for row in instructions(clips, video.scene, pairs=pairs):
            rows.append({"features": features, **{key: row[key] for key in ("context", "question", "answer")}})
    return rows


def trained(arm: str, options: dict[str, Any], rate: float, seed: int, lab: Lab, *, steps: int) -> tuple[Any, Any]:
    """Model and processor of an arm, trained once and kept in the lab's folder."""
    from transformers import AutoModel, AutoProcessor

    import gossamer

    key = hashlib.sha256(repr((sorted(options.items()), rate, steps, LAYERS, BATCH, FRAMES)).encode()).hexdigest()[:8]
    folder = lab.folder("models") / f"{arm}-{seed}-{key}"
    if not folder.is_dir():
        model, processor = fresh(options, seed)
        rows = questions(videos("train", lab.quick), halves=bool(options.get("halves")))
        fit(model, processor, rows, rate, seed, steps, lab.folder("run", f"{arm}-{seed}"))
        _save(folder, model, processor)
    assert gossamer.__version__
    processor = AutoProcessor.from_pretrained(folder)
    processor.encoder = encoder()
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), processor


def fresh(options: dict[str, Any], seed: int) -> tuple[Any, Any]:
    """An untrained model of these options on its base, and its processor."""
    from gossamer.architectures.vlog import VLog

    base, tokenizer = _base(options.get("random", False), seed)
    own = {key: value for key, value in options.items() if key not in ("random", "halves")}
    system = VLog(seed=seed, max_frames=FRAMES, **own)
    processor = system.processor(tokenizer)
    processor.encoder = encoder()
    return system.build(base), processor


def fit(
    model: Any,
    processor: Any,
    rows: list[dict[str, Any]],
    rate: float,
    seed: int,
    steps: int,
    folder: Path,
    batch: int = 48,
) -> Any:
    from gossamer.objectives.own_loss import OwnLoss
    from gossamer.optimizers.adamw import AdamW
    from gossamer.parts.training import TrainSettings, train

    settings = TrainSettings(steps=steps, batch_size=BATCH, warmup=0.08, seed=seed, save_every=0)
    optimizer = AdamW(lr=rate, beta2=0.95)
    return train(
        model, processor, rows, objective=OwnLoss(), optimizer=optimizer, settings=settings, folder=folder, resume=False
    )


def asked(told: Sequence[Told], relation: str) -> list[tuple[Tensor, Any]]:
    """(features of the clip on show, the clip that answers), video by video."""
    step = {"current": 0, "next": -1, "previous": 1}[relation]
    found = []
    for video, features in told:
        for wanted, clip in enumerate(video.clips):
            shown = wanted + step
            if 0 <= shown < len(video.clips):
                found.append((features[2 * shown : 2 * shown + 2], clip))
    return found


def judge(model: Any, processor: Any, told: Sequence[Told]) -> dict[str, Any]:
    """R@1 by text in per cent and CIDEr-D of whole narrations, one by one: naive (current) and causal."""
    answers = {relation: answer(model, processor, told, relation) for relation in ("current", *CAUSAL)}
    truth = {relation: [clip.narration for _, clip in asked(told, relation)] for relation in answers}
    figures: dict[str, Any] = {}
    for name, relations in (("naive", ("current",)), ("causal", CAUSAL)):
        given = [text for relation in relations for text in answers[relation]]
        right = [text for relation in relations for text in truth[relation]]
        hits = [a == b for a, b in zip(given, right, strict=True)]
        figures[f"{name}_r1"] = 100 * sum(hits) / len(hits)
        figures[f"{name}_cider"] = 10 * sum(cider_d(given, [[text] for text in right])) / len(right)
        figures[f"{name}_hits"] = packed(hits)
    return figures


def answer(model: Any, processor: Any, told: Sequence[Told], relation: str) -> list[str]:
    """One narration for each clip that has an answer: written, or retrieved from all narrations."""
    clips = [features for features, _ in asked(told, relation)]
    found: list[str] = []
    for start in range(0, len(clips), 32):
        part = clips[start : start + 32]
        batch = processor.inputs(part, [QUERIES[relation][0]] * len(part))
        if model.config.method == "generative":
            ids = model.write(**batch, max_new_tokens=NEW_TOKENS)
            found += [normalise(text) for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        else:
            with torch.no_grad():
                found += [hits[0].text for hits in flat_index().search(model.embed(**batch), method="brute")]
    return found


def packed(hits: Sequence[bool]) -> str:
    """Hits as hexadecimal digits, led by a 1."""
    return f"{int('1' + ''.join(str(int(hit)) for hit in hits), 2):x}"


def unpacked(text: Any) -> list[int]:
    return [int(bit) for bit in f"{int(text, 16):b}"[1:]]


def groups(quick: bool, relations: Sequence[str]) -> list[int]:
    """For each hit of :func:`judge` the number of its video."""
    some = event_videos("test", 5 if quick else 40)
    steps = [0 if relation == "current" else 1 for relation in relations]
    return [number for step in steps for number, video in enumerate(some) for _ in range(len(video.clips) - step)]


def interval(hits: Sequence[Sequence[int]], owners: Sequence[int], draws: int = 2000) -> tuple[float, float, float]:
    """Mean in per cent and its 95 % bootstrap interval, videos and seeds drawn anew; ``hits`` has one row a seed."""
    rng = random.Random(0)
    count = max(owners) + 1
    sums = [[0] * count for _ in hits]
    sizes = [0] * count
    for place, owner in enumerate(owners):
        sizes[owner] += 1
        for row, values in enumerate(hits):
            sums[row][owner] += values[place]
    means = []
    for _ in range(draws):
        chosen = [rng.randrange(count) for _ in range(count)]
        rows = [sums[rng.randrange(len(hits))] for _ in hits]
        total = sum(sizes[owner] for owner in chosen)
        means.append(100 * sum(row[owner] for row in rows for owner in chosen) / (total * len(rows)))
    means.sort()
    mean = 100 * sum(map(sum, hits)) / (len(owners) * len(hits))
    return mean, means[int(0.025 * draws)], means[int(0.975 * draws)]


def _base(random_weights: bool, seed: int) -> tuple[Any, Any]:
    """The first layers of llama-7m with the vocabulary of the questions and narrations, or random weights like it."""
    from transformers import AutoModelForCausalLM

    from gossamer.hub.nursery import load_nursery
    from gossamer.parts.vocabulary import trim_vocabulary

    model, tokenizer = load_nursery("llama-7m")
    texts = [way for ways in QUERIES.values() for way in ways]
    told = [*narrations(), *narrations(length="long"), *narrations(HELD_OUT_SCENES)]
    trimmed = trim_vocabulary(model, tokenizer, [*texts, *told, *(f"{texts[0]} {text}" for text in told)])
    trimmed.model.model.layers = trimmed.model.model.layers[:LAYERS]
    trimmed.model.config.num_hidden_layers = LAYERS
    if random_weights:
        with torch.random.fork_rng():
            torch.manual_seed(1000 + seed)
            return AutoModelForCausalLM.from_config(trimmed.model.config).float().eval(), trimmed.tokenizer
    return trimmed.model.float().eval(), trimmed.tokenizer


def _save(folder: Path, model: Any, processor: Any) -> None:
    from gossamer.core.paths import atomic_dir

    with atomic_dir(folder) as path:
        model.save_pretrained(path)
        processor.save_pretrained(path)
