"""Starts a projector so that a visual token already says, in the text model's own words, what its patch shows.

    P(f) ~ sum over the words w that are so of the patch: e(w)        least squares over patches of training pictures

The words are the truth of the scene graph: kind, colour, size, place and glyph of the thing that covers the patch, or
the background's name. The text model has no part in it (a projector has 0.1M parameters, the whole thing is seconds),
so that training is left with what the text model has to do: to look at the right place. It is LLaVA's alignment stage
with exact targets for each patch in the place of captions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.hub.nursery.vision_data import SceneData
from gossamer.hub.worlds.draw import draw, masks
from gossamer.hub.worlds.scene import Scene
from gossamer.hub.worlds.stills import Still

_COVERED = 0.1  # share of a patch that a thing must cover to be named
_IMAGES, _STEPS, _BATCH, _RATE = 4000, 2000, 1536, 1e-2


def align(
    model: Any, tokenizer: Any, data: SceneData, *, images: int = _IMAGES, steps: int | None = None
) -> list[float]:
    """Fit ``model``'s projector; returns the share of the targets' variance left unexplained, first and last.

    A third of each batch are any patches, a third have a thing, a third a glyph.
    """
    projector = model.model.multi_modal_projector
    numbers = np.random.default_rng([data.spec.seed, 2]).permutation(len(data.rows["train"]))[:_IMAGES].tolist()
    features = data.features("train", numbers).float().flatten(0, 1)
    targets, parts = _targets(model, tokenizer, data, numbers)
    standardise(projector, features, float(targets.square().mean().sqrt()))
    spread = float(targets.var(0).sum())
    optimizer = torch.optim.AdamW(projector.parameters(), lr=_RATE, weight_decay=0.0)
    rng = np.random.default_rng([data.spec.seed, 3])
    losses: list[float] = []
    steps = steps or _STEPS
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _RATE * min(1.0, (step + 1) / 40) * (1 - step / steps)
        rows = torch.from_numpy(np.concatenate([rng.choice(part, _BATCH // len(parts)) for part in parts]))
        loss = (projector(features[rows]) - targets[rows]).square().sum(-1).mean() / spread
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tail = max(1, steps // 20)
    return [round(sum(part) / len(part), 4) for part in (losses[:tail], losses[-tail:])]


@torch.no_grad()
def standardise(projector: Any, features: Tensor, size: float) -> None:
    """Start with standardised inputs, folded into the first layer, and outputs of root mean square ``size``.

    W(x - mean) / std + b = (W / std) x + (b - W mean / std)
    """
    mean, std = features.mean(0), features.std(0)
    nn.init.normal_(projector.linear_1.weight, std=projector.linear_1.in_features**-0.5)
    nn.init.normal_(projector.linear_2.weight, std=projector.linear_2.in_features**-0.5)
    projector.linear_1.weight.div_(std)
    projector.linear_1.bias.copy_(-projector.linear_1.weight @ mean)
    nn.init.zeros_(projector.linear_2.bias)
    projector.linear_2.weight.mul_(size / projector(features[:4096]).square().mean().sqrt())


@torch.no_grad()
def _targets(
    model: Any, tokenizer: Any, data: SceneData, numbers: list[int]
) -> tuple[Tensor, list[np.ndarray[Any, Any]]]:
    """Sums of word embeddings [images * patches, H]; the patches: all, those with a thing, those with a glyph."""
    embeddings = model.get_input_embeddings()
    known: dict[tuple[str, ...], Tensor] = {}
    told = [words for number in numbers for words in patch_words(data.stills["train"][number], data.spec.size)]
    for words in set(told):
        ids = [id_ for word in words for id_ in tokenizer(f" {word}", add_special_tokens=False).input_ids]
        known[words] = embeddings(torch.tensor(ids)).float().sum(0)
    counts = np.array([len(words) for words in told])
    parts = [np.flatnonzero(counts >= least) for least in (1, 4, 5)]
    return torch.stack([known[words] for words in told]), [part for part in parts if len(part)]


def patch_words(still: Still, size: int, patch: int = 14) -> list[tuple[str, ...]]:
    """For each patch, row by row, the words that are so of it; the glyph is named where its plate is."""
    scene, side = still.scene, size // patch
    cover = np.zeros((len(scene.things) + 1, side, side))
    cover[-1] = _COVERED
    for index, mask in masks(scene, size).items():
        cover[index] = mask.reshape(side, patch, side, patch).mean((1, 3))
    plates = _plates(scene, size).reshape(side, patch, side, patch).mean((1, 3)).flatten() > _COVERED
    told = [(thing.kind, thing.colour, thing.size, scene.place(thing)) for thing in scene.things]
    glyphs = [(thing.glyph,) if thing.glyph else () for thing in scene.things]
    return [
        (*told[index], *(glyphs[index] if plate else ())) if index < len(told) else (scene.background,)
        for index, plate in zip(cover.argmax(0).flatten(), plates, strict=True)
    ]


def _plates(scene: Scene, size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Pixels [size, size] that are other ones without the glyphs."""
    bare = replace(scene, things=tuple(replace(thing, glyph="") for thing in scene.things))
    pictures = [np.asarray(draw(one, size), np.int16) for one in (scene, bare)]
    return np.abs(pictures[0] - pictures[1]).max(-1) > 8
