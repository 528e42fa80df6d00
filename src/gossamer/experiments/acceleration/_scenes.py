"""What the experiments on image tokens share: the nursery's small model with a table for its tower, questions, scores.

The tower's states are computed once and kept in the cache; an image is then a number, and everything after the tower
(projector, language model, selection, generation) runs as it is. Answers are right where every token of the answer and
its end is the likeliest after the ones before, which is where greedy decoding gives exactly the answer.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gossamer.core.paths import atomic_file, cache_dir
from gossamer.parts.visual_rows import visual_batch

NAME = "vlm-small"
Row = dict[str, Any]


class Table(nn.Module):
    """In the place of a tower: states [images, patches, width] by number; ``pool`` averages them to a coarser grid."""

    def __init__(self, states: Tensor, pool: tuple[int, int] | None = None) -> None:
        super().__init__()
        if pool is not None:
            side = int(states.shape[1] ** 0.5)
            grid = states.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
            states = nn.functional.adaptive_avg_pool2d(grid, pool).flatten(2).transpose(1, 2).to(states.dtype)
        self.states = states  # no buffer: weights and fingerprint stay those of the model

    def forward(self, numbers: Tensor) -> Tensor:
        return self.states[numbers]


class Numbers:
    """In the place of a processor: an image is its number in the table, ``tokens`` image tokens long."""

    def __init__(self, processor: Any, tokens: int) -> None:
        self.processor, self.tokens = processor, tokens
        self.tokenizer, self.image_token = processor.tokenizer, processor.image_token
        self.image_token_id, self.chat_template = processor.image_token_id, processor.chat_template
        self.apply_chat_template = processor.apply_chat_template

    def __call__(self, text: Sequence[str], images: Sequence[int] | None = None, **_: Any) -> dict[str, Tensor]:
        texts = [one.replace(self.image_token, self.image_token * self.tokens) for one in text]
        found = dict(self.tokenizer(texts, return_tensors="pt", return_token_type_ids=False))
        return found | ({} if images is None else {"pixel_values": torch.tensor(images)[:, None]})


@functools.cache
def vlm() -> tuple[Any, Any]:
    """The nursery model in float32 and its processor."""
    from gossamer.hub.nursery import load_nursery

    return load_nursery(NAME)


def tabled(states: Tensor, pool: tuple[int, int] | None = None) -> tuple[Any, Numbers]:
    """A copy of the nursery model that looks its tower's ``states`` up, and what makes its inputs."""
    model, processor = vlm()
    tower, model.model.vision_tower = model.model.vision_tower, nn.Identity()
    try:
        seeing = copy.deepcopy(model)
    finally:
        model.model.vision_tower = tower
    table = seeing.model.vision_tower = Table(states, pool)

    def look_up(pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        projector = seeing.model.multi_modal_projector
        projected = projector(table(pixel_values.long()[:, 0]).to(projector.linear_1.weight.dtype))
        features: Any = list(projected)  # LLaVA's own form: one tensor an image
        return BaseModelOutputWithPooling(pooler_output=features)

    seeing.model.get_image_features = look_up
    return seeing.eval(), Numbers(processor, table.states.shape[1])


@torch.no_grad()
def tower_states(split: str, count: int, seed: int) -> Tensor:
    """The states that the projector reads, bfloat16 [count, patches, width], of ``count`` flat scenes; cached."""
    from gossamer.hub.worlds.stills import still_scenes

    path = _folder() / f"{split}-{seed}-{count}.safetensors"
    if not path.is_file():
        model, processor = vlm()
        tower = copy.deepcopy(model.model.vision_tower).to(torch.bfloat16)
        layers = model.config.vision_feature_layer
        made = []
        scenes = still_scenes(split, count, seed=seed)
        for start in range(0, count, 32):
            pictures = [still.image() for still in scenes[start : start + 32]]
            pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"].to(torch.bfloat16)
            states = tower(pixels, output_hidden_states=True).hidden_states
            chosen = [states[layer][:, 1:] for layer in ([layers] if isinstance(layers, int) else layers)]
            made.append(torch.cat(chosen, dim=-1))
        with atomic_file(path) as temporary:
            save_file({"states": torch.cat(made)}, temporary)
    return load_file(path)["states"]


def asked(split: str, count: int, seed: int, limit: int | None = None) -> list[Row]:
    """Questions on ``count`` scenes: image (its number), question, answer, kind, difficulty. ``limit`` of them, the
    kinds in turns."""
    from gossamer.hub.worlds.stills import still_scenes

    kinds: dict[str, list[Row]] = {}
    for number, still in enumerate(still_scenes(split, count, seed=seed)):
        for turn in still.questions:
            row = {"image": number, "question": turn.text, "answer": turn.answer}
            kinds.setdefault(turn.kind, []).append(row | {"kind": turn.kind, "difficulty": turn.difficulty})
    depth = max(map(len, kinds.values()))
    rows = [rows[place] for place in range(depth) for rows in kinds.values() if place < len(rows)]
    return rows[:limit]


@torch.no_grad()
def right(model: Any, processor: Any, rows: Sequence[Row], batch_size: int = 25) -> list[int]:
    """1 or 0 for each row."""
    found: list[int] = []
    for start in range(0, len(rows), batch_size):
        batch = visual_batch(rows[start : start + batch_size], processor)
        logits = model(**batch).logits
        said = batch["labels"][:, 1:] != -100
        wrong = (logits[:, :-1].argmax(-1) != batch["labels"][:, 1:]) & said
        found += (~wrong.any(1)).long().tolist()
    return found


def marks(values: Sequence[int]) -> str:
    """Zeros and ones as a string, so that evidence keeps every question on one line."""
    return "".join(map(str, values))


def bootstrap(differences: Sequence[float], draws: int = 4000) -> tuple[float, float, float]:
    """Mean of per-question differences, with the 95 % interval of resampled questions."""
    values = torch.tensor(differences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    low, high = torch.quantile(values[picks].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.mean()), low, high


def _folder() -> Path:
    """States belong to the weights of the tower and to the layers that are read."""
    from gossamer.parts.fingerprint import fingerprint

    model = vlm()[0]
    layers = model.config.vision_feature_layer
    named = "-".join(map(str, [layers] if isinstance(layers, int) else layers))
    return cache_dir("experiments", "scenes", f"{fingerprint(model.model.vision_tower)}-{named}")
