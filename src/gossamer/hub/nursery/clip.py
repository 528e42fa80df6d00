"""Trains a small CLIP on real pairs of image and text: two frozen encoders and one linear map on each side (LiT).

    x = A layer_norm(dinov2(image)),  y = B layer_norm(minilm(text)),  loss = contrastive_loss(x, y, tau)

A [256, 768], B [256, 384] and tau are learned; nothing else is (locked-image tuning, Zhai et al. 2022, with both
towers locked). Pairs: emoji in two drawing styles and the stamps' cut-outs, each caption of a picture in turn, pictures
mirrored half of the time. Equal captions are no negatives of each other. Features are made once and kept, so training
takes seconds and features two minutes. On the validation pairs a second layer (256 wide, 60 passes) was no better.

The scores in training.json are on held-out pairs, with the weights as they are stored: retrieval among the captions of
one style's test split, zero-shot categories by their names, and the shift of style: trained on google's drawings alone,
tested on twitter's.
"""

from __future__ import annotations

import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from safetensors.torch import save_file

from gossamer.core.errors import OptionError, did_you_mean
from gossamer.core.paths import atomic_dir, cache_dir, write_json
from gossamer.hub.archives import picture
from gossamer.hub.corpora import SPLITS, Corpus, load_corpus
from gossamer.hub.corpora.emoji_pictures import STYLES
from gossamer.hub.encoders import DESCRIPTION, open_dual_encoder
from gossamer.parts.contrastive import contrastive_loss, cosine_logits, equal_pairs
from gossamer.parts.dual_encoder import DualEncoder, FeatureCache, Head, as_array

HARD = ("Flags", "Symbols")  # a country or a sign is known or not: its picture does not tell


@dataclass(frozen=True)
class ClipSpec:
    """Encoders, head, pairs and training. ``steps`` None is ``epochs`` over the pairs; ``styles`` None takes all."""

    images: str = "dinov2-small"
    texts: str = "all-minilm-l6-v2"
    size: int = 112
    width: int = 256
    hidden: int | None = None
    corpora: tuple[str, ...] = ("emoji_pictures", "stamp_photos")
    styles: tuple[str, ...] | None = None
    epochs: int = 30
    steps: int | None = None
    batch: int = 256
    rate: float = 1e-3
    weight_decay: float = 0.1
    dropout: float = 0.2
    seed: int = 0


SPECS = {"clip-small": ClipSpec()}


@dataclass
class _Pairs:
    """Rows with their features: ``images`` [n, 1 or 2, width] (as it is, mirrored), ``texts`` by caption."""

    rows: list[dict[str, Any]]
    images: torch.Tensor
    texts: dict[str, torch.Tensor]

    def where(self, styles: Iterable[str] | None = None, without: Iterable[str] = ()) -> _Pairs:
        wanted, unwanted = None if styles is None else set(styles), set(without)
        places = [
            place
            for place, row in enumerate(self.rows)
            if (wanted is None or row["style"] in wanted) and row["category"] not in unwanted
        ]
        return _Pairs([self.rows[place] for place in places], self.images[places], self.texts)


def train_clip(
    name: str = "clip-small", *, steps: int | None = None, out: Path | None = None, spec: ClipSpec | None = None
) -> dict[str, Any]:
    """Train the head and write it with dual_encoder.json and training.json to ``out`` (default: the package).

    Returns the content of training.json. Raises OptionError for an unknown name, InputError where a corpus cannot be
    read: both have to be at hand.
    """
    if spec is None:
        if name not in SPECS:
            raise OptionError("nursery model", must="be a known name", got=repr(name), do=did_you_mean(name, SPECS))
        spec = SPECS[name]
    spec = replace(spec, steps=steps or spec.steps)
    work = cache_dir("nursery", name)
    with FileLock(work / ".lock"):
        encoder = open_dual_encoder(spec.images, spec.texts, size=spec.size)
        loaded = {split: [load_corpus(corpus, split=split) for corpus in spec.corpora] for split in SPLITS}
        pairs = {split: _features(loaded[split], encoder, work, mirrored=split == "train") for split in SPLITS}
        started = time.perf_counter()
        head, curve = _fit(spec, pairs["train"], encoder)
        seconds = time.perf_counter() - started
        report = {
            "command": " ".join(["python", "-m", "gossamer.hub.nursery.train", *sys.argv[1:]]),
            "spec": asdict(spec),
            "pairs": {split: Counter(row["style"] for row in pairs[split].rows) for split in SPLITS},
            "corpora": {corpus.name: _facts(corpus) for corpus in loaded["train"]},
            "versions": {"python": platform.python_version(), "torch": torch.__version__}
            | {"transformers": transformers.__version__},
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "parameters": sum(value.numel() for value in head.parameters()),
            "tau": head.temperature().item(),
            "curve": curve,
            "validation_scores": scores(head, pairs["validation"], encoder),
            "test_scores": scores(head, pairs["test"], encoder),
        }
        named = {"text_recall_at_5": ("all", "text R@5"), "category_accuracy": ("category", "accuracy")}
        for key, (part, score) in named.items():
            report[f"held_out_{key}"] = {style: found[part][score] for style, found in report["test_scores"].items()}
        if {row["style"] for row in pairs["train"].rows} >= set(STYLES):
            alone, _ = _fit(replace(spec, styles=STYLES[:1]), pairs["train"], encoder)
            report["test_scores_after_google_alone"] = scores(alone, pairs["test"].where(STYLES), encoder)
        _write(out or Path(__file__).parent / name, spec, head, encoder, report)
    return report


def scores(head: Head, pairs: _Pairs, encoder: DualEncoder) -> dict[str, Any]:
    """By style: recall at 1 and 5 in both directions and zero-shot accuracies, each with what chance gives.

    A caption is right where it is the picture's own first caption. "things" leaves out flags and symbols.
    """
    found: dict[str, Any] = {}
    for style in sorted({row["style"] for row in pairs.rows}):
        own = pairs.where([style])
        found[style] = {"all": _retrieval(head, own), "things": _retrieval(head, own.where(without=HARD))}
        for level in ("category", "subcategory"):
            found[style][level] = _zero_shot(head, own, encoder, level)
    return found


@torch.no_grad()
def _retrieval(head: Head, pairs: _Pairs) -> dict[str, float]:
    if not pairs.rows:
        return {"pictures": 0}
    captions = list(dict.fromkeys(row["caption"] for row in pairs.rows))
    x = head.images(pairs.images[:, 0])
    y = head.texts(torch.stack([pairs.texts[caption] for caption in captions]))
    similar = cosine_logits(x, y)
    right = torch.tensor([[row["caption"] == caption for caption in captions] for row in pairs.rows])
    result: dict[str, float] = {"pictures": len(pairs.rows), "captions": len(captions)}
    for direction, values, mask in (("text", similar, right), ("image", similar.T, right.T)):
        best = values.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
        rank = (values > best).sum(dim=1)
        for depth in (1, 5):
            result[f"{direction} R@{depth}"] = round(float((rank < depth).float().mean()), 4)
    return result | {"chance R@1": round(1 / len(captions), 4), "chance R@5": round(min(1, 5 / len(captions)), 4)}


@torch.no_grad()
def _zero_shot(head: Head, pairs: _Pairs, encoder: DualEncoder, level: str) -> dict[str, float]:
    """Accuracy of the nearest category name, among the categories that occur."""
    counts = Counter(row[level] for row in pairs.rows)
    names = sorted(counts)
    spoken = [" ".join(name.lower().replace("&", "and").replace("-", " ").split("/")) for name in names]
    similar = cosine_logits(head.images(pairs.images[:, 0]), head.texts(encoder.texts(spoken)))
    hits = [names[int(place)] == row[level] for place, row in zip(similar.argmax(dim=1), pairs.rows, strict=True)]
    return {
        "accuracy": round(sum(hits) / len(hits), 4),
        "classes": len(names),
        "chance": round(1 / len(names), 4),
        "largest class": round(max(counts.values()) / len(hits), 4),
    }


def _features(corpora: list[Corpus], encoder: DualEncoder, work: Path, mirrored: bool) -> _Pairs:
    """Pictures and captions of several corpora, encoded once and kept."""
    images, texts = FeatureCache(work / "images", encoder), FeatureCache(work / "texts", encoder, side="texts")
    rows: list[dict[str, Any]] = []
    spoken: dict[str, torch.Tensor] = {}
    parts = []
    for corpus in corpora:
        key = f"{corpus.name} {corpus.split} {corpus.sha256}"
        views = [images.of(key, partial(_pictures, encoder, corpus.rows))]
        if mirrored:
            views.append(images.of(f"{key} mirrored", partial(_pictures, encoder, corpus.rows, mirrored=True)))
        captions = sorted({caption for row in corpus.rows for caption in row["captions"]})
        spoken |= dict(zip(captions, texts.of(key, partial(encoder.texts, captions)), strict=True))
        parts.append(torch.stack(views, dim=1))
        rows += [{name: value for name, value in row.items() if name != "image"} for row in corpus.rows]
    return _Pairs(rows, torch.cat(parts), spoken)


def _pictures(encoder: DualEncoder, rows: list[dict[str, Any]], mirrored: bool = False) -> torch.Tensor:
    arrays = [as_array(picture(row)) for row in rows]
    return encoder.images([array[:, ::-1].copy() for array in arrays] if mirrored else arrays)


def _fit(spec: ClipSpec, pairs: _Pairs, encoder: DualEncoder) -> tuple[Head, list[list[float]]]:
    """The head, rounded to bfloat16 as it is stored, and the loss: [step, mean since the last entry]."""
    pairs = pairs.where(spec.styles)
    rng, generator = random.Random(spec.seed), torch.Generator().manual_seed(spec.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        head = Head(encoder.image_width, encoder.text_width, spec.width, spec.hidden)
    optimizer = torch.optim.AdamW(head.parameters(), lr=spec.rate, weight_decay=spec.weight_decay)
    batch = min(spec.batch, len(pairs.rows))
    epoch = len(pairs.rows) // batch
    steps = spec.steps or spec.epochs * epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.rate, total_steps=steps, pct_start=0.1)
    curve, recent = [], []
    for step in range(steps):
        if step % epoch == 0:
            order = torch.randperm(len(pairs.rows), generator=generator)
        places = order[step % epoch * batch :][:batch]
        rows = [pairs.rows[place] for place in places.tolist()]
        view = torch.randint(pairs.images.shape[1], (batch,), generator=generator)
        images = _dropped(pairs.images[places, view], spec.dropout, generator)
        texts = torch.stack([pairs.texts[rng.choice(row["captions"])] for row in rows])
        x, y = head.images(images), head.texts(_dropped(texts, spec.dropout, generator))
        loss = contrastive_loss(x, y, head.temperature(), equal=equal_pairs([row["caption"] for row in rows]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if (step + 1) % 20 == 0 or step + 1 == steps:
            curve.append([step + 1, round(sum(recent) / len(recent), 4)])
            recent = []
    with torch.no_grad():
        for value in head.parameters():
            value.copy_(value.bfloat16().float())
    return head.eval(), curve


def _dropped(features: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    keep = torch.rand(features.shape, generator=generator) >= share
    return features * keep / (1 - share)


def _facts(corpus: Corpus) -> dict[str, Any]:
    return {"sha256": corpus.sha256, "licence": corpus.licence, "sources": list(corpus.sources)}


def _write(folder: Path, spec: ClipSpec, head: Head, encoder: DualEncoder, report: dict[str, Any]) -> None:
    description = {
        "images": spec.images,
        "texts": spec.texts,
        "size": spec.size,
        "fit": encoder.image_tower.prepare.fit,
        "image_width": encoder.image_width,
        "text_width": encoder.text_width,
        "width": spec.width,
        "hidden": spec.hidden,
        "fits": encoder.weights,
    }
    with atomic_dir(folder) as temporary:
        write_json(temporary / "training.json", report)
        state = {key: value.bfloat16().contiguous() for key, value in head.state_dict().items()}
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        # safetensors writes for the owner alone
        (temporary / "model.safetensors").chmod((temporary / "training.json").stat().st_mode)
        write_json(temporary / DESCRIPTION, description)
