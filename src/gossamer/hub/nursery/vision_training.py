"""Trains a small vision-language model on the still-image world, on a CPU, in about half an hour.

The tower is frozen and its features are computed once (bfloat16, memory-mapped). One image supervises many answers:

    row = [v_1 .. v_64][question answer end][question answer end] ...

A turn attends to the image and to itself, and its positions go on from the image, so that each turn is exactly what a
prompt with one question is. A few rows get zeros for the picture, so that what is answered without it is a fair
baseline. Loss: cross-entropy of the answers' tokens, end token included, each kind of question with the same weight. A
step's batch is a pure function of its number and there is no dropout, so that a run that was killed goes on from its
last checkpoint with the very steps it would have taken.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from filelock import FileLock
from torch import Tensor, nn

from gossamer.core.errors import OptionError, did_you_mean
from gossamer.core.paths import atomic_dir, atomic_file, cache_dir, write_json
from gossamer.hub.nursery.vision import save_language
from gossamer.hub.nursery.vision_build import new_model, optimizers, with_lora
from gossamer.hub.nursery.vision_data import DESCRIBE, SceneData, VisionSpec

IGNORED = -100
CAPTION = "caption"
Turn = tuple[str, str, str]  # kind, question, answer
SPECS = {
    "vlm-small": VisionSpec(),
    "vlm-gemma": VisionSpec(base="gemma-3-270m", lora=16, steps=400, restart=0, batch=8, rate=1e-3, captions=0.0),
}


def train_vision(
    name: str = "vlm-small",
    *,
    steps: int | None = None,
    out: Path | None = None,
    spec: VisionSpec | None = None,
    stop_after: int | None = None,
    checkpoint_every: int = 50,
) -> dict[str, Any]:
    """Train (or go on training) and write model, processor and training.json to ``out``.

    ``out`` defaults to the package for a model that is new there, to the cache for one on a pretrained base, whose
    weights are written whole. ``stop_after`` ends after that step of the same schedule with a checkpoint and no model.
    Returns the content of training.json.
    """
    if spec is None:
        if name not in SPECS:
            raise OptionError("nursery model", must="be a known name", got=repr(name), do=did_you_mean(name, SPECS))
        spec = SPECS[name]
    spec = replace(spec, steps=steps or spec.steps)
    work = cache_dir("nursery", f"{name}-work")
    with FileLock(work / ".lock"):
        data = SceneData(spec)
        model, processor = new_model(spec, data)
        trainer = _Trainer(spec, model, processor, data, work / "checkpoint.pt")
        while trainer.step < spec.steps:
            trainer.advance()
            if trainer.step % checkpoint_every == 0 or trainer.step in (spec.steps, stop_after):
                trainer.save()
            if trainer.step == stop_after:
                return trainer.report()
        trainer.merge()
        report = trainer.report() | {"held_out": {split: held_out(trainer, split) for split in ("test", "textured")}}
        final = out or (cache_dir("nursery") / name if spec.base else Path(__file__).parent / name)
        with atomic_dir(final) as temporary:
            if spec.base:
                model.to(torch.bfloat16).save_pretrained(temporary)
                processor.save_pretrained(temporary)
            else:
                save_language(model, processor, temporary)
            write_json(temporary / "training.json", report)
    return report


@torch.no_grad()
def held_out(trainer: Any, split: str) -> dict[str, Any]:
    """Share of questions of ``split`` answered exactly, in all and by kind, with the picture and with zeros for it.

    An answer counts where each of its tokens and its end is the likeliest one after the right tokens before it, which
    is where greedy generation gives it exactly.
    """
    kinds: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    trainer.model.eval()
    rows = trainer.data.rows[split]
    for start in range(0, len(rows), 16):
        numbers = range(start, min(start + 16, len(rows)))
        turns = [[_turn(turn) for turn in rows[number]["questions"]] for number in numbers]
        batch = trainer.collate(split, numbers, turns)
        seen = [trainer.right(batch, blind=blind) for blind in (False, True)]
        names = [turn["kind"] for number in numbers for turn in rows[number]["questions"]]
        for kind, *hits in zip(names, *seen, strict=True):
            kinds[kind].append((hits[0], hits[1]))
    trainer.model.train()
    table = {
        kind: {"questions": len(hits), "exact": _mean(hits, 0), "without_image": _mean(hits, 1)}
        for kind, hits in sorted(kinds.items())
    }
    every = [hit for hits in kinds.values() for hit in hits]
    return {
        "questions": len(every), "exact": _mean(every, 0), "without_image": _mean(every, 1), "kinds": table,
    }  # fmt: skip


@dataclass(frozen=True)
class _Batch:
    """ids, positions, labels [b, t] (labels already shifted: the token that follows), mask [b, 1, t, t], features."""

    ids: Tensor
    positions: Tensor
    labels: Tensor
    turns: Tensor  # [b, t]: 0 the image, 1.. the turns, -1 the padding
    weights: Tensor  # [b, t]: what a label counts in the loss
    features: Tensor
    sees: Tensor  # [b]: 0 where the row gets zeros for the picture

    def mask(self, dtype: torch.dtype) -> Tensor:
        """0 where a place attends (back, to the image and to its own turn; padding to itself), else very low."""
        t = self.ids.shape[1]
        back = torch.ones(t, t, dtype=torch.bool).tril()
        query, key = self.turns[:, :, None], self.turns[:, None, :]
        seen = (back & ((key == 0) | (key == query)))[:, None] | torch.eye(t, dtype=torch.bool)
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


class _Trainer:
    """Model, optimizer, step and loss curve, with a checkpoint that is used only by a run with the same settings."""

    def __init__(self, spec: VisionSpec, model: Any, processor: Any, data: SceneData, path: Path) -> None:
        self.spec, self.model, self.data, self.path = spec, model, data, path
        self.tokenizer = processor.tokenizer
        self.image_id = processor.image_token_id
        self.prefix = self.tokenizer(processor.image_token * spec.patches).input_ids
        self._ids: dict[str, list[int]] = {}
        self._weights = _kind_weights(data.rows["train"])
        key = json.dumps([asdict(spec), data.sha256, torch.__version__, transformers.__version__])
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
        self.step, self.seconds = 0, 0.0
        self.curve: list[list[float]] = []
        self._recent: list[float] = []
        self.language: Any = with_lora(spec, model) if spec.lora else model.model.language_model
        # four times as fast as sdpa under a mask, on a CPU in bfloat16 at these lengths
        model.model.language_model.set_attn_implementation("eager")
        model.model.vision_tower.requires_grad_(False)
        self.trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.optimizers = optimizers(spec, self.trained)
        self._load()

    def advance(self) -> None:
        """One optimizer step."""
        started = time.perf_counter()
        if self.step and self.step == self.spec.restart:
            self.optimizers = optimizers(self.spec, self.trained)
        batch = self._batch(self.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * self._rate(self.step)
        places = batch.labels != IGNORED
        logits = self._logits(batch, places)
        weights = batch.weights[places]
        loss = (nn.functional.cross_entropy(logits, batch.labels[places], reduction="none") * weights).sum()
        loss = loss / weights.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.seconds += time.perf_counter() - started
        self._recent.append(loss.item())
        if self.step % 20 == 0 or self.step == self.spec.steps:
            self.curve.append([self.step, round(sum(self._recent) / len(self._recent), 4)])
            self._recent = []
            print(f"step {self.step}/{self.spec.steps} loss {self.curve[-1][1]:.3f} {self.seconds:.0f} s", flush=True)

    def right(self, batch: _Batch, *, blind: bool) -> list[bool]:
        """For each turn, rows one after another, whether the likeliest tokens are the answer and its end."""
        places = batch.labels != IGNORED
        hits = torch.ones_like(places)
        hits[places] = self._logits(batch, places, blind=blind).argmax(-1) == batch.labels[places]
        found = []
        for row, turns in zip(hits, batch.turns, strict=True):
            found += [bool(row[turns == turn].all()) for turn in range(1, int(turns.max()) + 1)]
        return found

    def collate(self, split: str, numbers: Sequence[int], turns: list[list[Turn]]) -> _Batch:
        """Rows of the images ``numbers``, each with its turns (kind, question, answer), padded on the right."""
        rows = [self._row(row) for row in turns]
        ids, positions, labels, marks, weights = (
            nn.utils.rnn.pad_sequence([torch.tensor(row[part]) for row in rows], batch_first=True, padding_value=fill)
            for part, fill in enumerate((self.tokenizer.pad_token_id, 0, IGNORED, -1, 0.0))
        )
        features = self.data.features(split, numbers)
        return _Batch(ids, positions, labels, marks, weights, features, torch.ones(len(rows)))

    def merge(self) -> None:
        """Put what the low-rank adapters learned into the weights, in float32."""
        if self.spec.lora:
            self.model.float()
            self.language = self.model.model.language_model = self.language.merge_and_unload()

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        state = {
            "fingerprint": self.fingerprint, "step": self.step, "seconds": self.seconds, "curve": self.curve,
            "recent": self._recent, "trained": {name: value.detach() for name, value in self.trained.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }  # fmt: skip
        with atomic_file(self.path) as temporary:
            torch.save(state, temporary)

    def report(self) -> dict[str, Any]:
        """Command, settings, seconds and the loss curve (mean over the 20 steps before each entry)."""
        return {
            "command": " ".join(["python", "-m", "gossamer.hub.nursery.train", *sys.argv[1:]]),
            "spec": asdict(self.spec),
            "data_sha256": self.data.sha256,
            "versions": {"python": platform.python_version(), "torch": torch.__version__}
            | {"transformers": transformers.__version__},
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "threads": torch.get_num_threads(),
            "epochs": round(self.step * self.spec.batch / len(self.data.rows["train"]), 2),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trained_parameters": sum(p.numel() for p in self.trained.values()),
            "vocabulary": self.model.config.get_text_config().vocab_size,
            "curve": self.curve,
        }

    def _logits(self, batch: _Batch, places: Tensor, *, blind: bool = False) -> Tensor:
        """Logits [n, vocabulary] in float32 at the places that bear labels."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.spec.bfloat16):
            visual = self.model.model.multi_modal_projector(batch.features.float())
            embeds = self.model.get_input_embeddings()(batch.ids)
            visual = torch.zeros_like(visual) if blind else visual * batch.sees[:, None, None]
            embeds = embeds.masked_scatter((batch.ids == self.image_id)[..., None], visual.to(embeds.dtype))
            mask: Any = batch.mask(embeds.dtype)
            window = getattr(self.model.config.get_text_config(), "sliding_window", None)
            if window is not None:
                assert batch.ids.shape[1] <= window
                mask = {"full_attention": mask, "sliding_attention": mask}
            states = self.language(inputs_embeds=embeds, attention_mask=mask, position_ids=batch.positions)
            logits: Tensor = self.model.lm_head(states.last_hidden_state[places])
        return logits.float()

    def _row(self, turns: list[Turn]) -> tuple[list[int], list[int], list[int], list[int], list[float]]:
        """ids, positions, labels, turn numbers and weights of one row."""
        start = len(self.prefix)
        ids, positions, marks = list(self.prefix), list(range(start)), [0] * start
        labels, weights = [IGNORED] * start, [0.0] * start
        for number, (kind, question, answer) in enumerate(turns, 1):
            asked, told = self._encode(question), [*self._encode(f" {answer}"), self.tokenizer.eos_token_id]
            ids += asked + told
            labels += [IGNORED] * (len(asked) - 1) + told + [IGNORED]
            positions += range(start, start + len(asked) + len(told))
            marks += [number] * (len(asked) + len(told))
            weights += [self._weights[kind]] * (len(asked) + len(told))
        return ids, positions, labels, marks, weights

    def _encode(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._ids[text]

    def _batch(self, step: int) -> _Batch:
        """Images in a new random order each epoch; their questions drawn anew each time."""
        rows = self.data.rows["train"]
        places = range(step * self.spec.batch, (step + 1) * self.spec.batch)
        numbers = [int(self._order(place // len(rows))[place % len(rows)]) for place in places]
        rng = np.random.default_rng([self.spec.seed, 1, step])
        batch = self.collate("train", numbers, [list(self._turns(rows[number], rng)) for number in numbers])
        return replace(batch, sees=torch.from_numpy(rng.random(len(numbers)) >= self.spec.blind).float())

    def _turns(self, row: dict[str, Any], rng: np.random.Generator) -> Iterator[Turn]:
        for place in rng.permutation(len(row["questions"]))[: self.spec.turns]:
            yield _turn(row["questions"][place])
        if rng.random() < self.spec.captions:
            yield CAPTION, DESCRIBE, row["captions"][rng.integers(len(row["captions"]))]

    def _order(self, epoch: int) -> np.ndarray[Any, Any]:
        return np.random.default_rng([self.spec.seed, 0, epoch]).permutation(len(self.data.rows["train"]))

    def _rate(self, step: int) -> float:
        """Warm-up and cosine, once more from ``restart`` on."""
        steps, restart = self.spec.steps, self.spec.restart
        between = restart if 0 < restart < steps else steps
        first, last = (0, between) if step < between else (between, steps)
        warm = max(1, round(self.spec.warmup * (last - first)))
        if step < first + warm:
            return self.spec.rate * (step - first + 1) / warm
        done = (step - first - warm) / max(1, last - first - warm)
        return self.spec.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def _load(self) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        if state["fingerprint"] != self.fingerprint:
            return
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(state["trained"][name])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve, self._recent = state["curve"], state["recent"]
        print(f"going on from step {self.step}", flush=True)


def _turn(turn: dict[str, str]) -> Turn:
    return turn["kind"], turn["text"], turn["answer"]


def _kind_weights(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Weights that give each kind of question the same share of the loss, 1 in the mean; a caption's token has 0.3."""
    counts = Counter(turn["kind"] for row in rows for turn in row["questions"])
    return {kind: counts.total() / len(counts) / count for kind, count in counts.items()} | {CAPTION: 0.3}


def _mean(hits: list[tuple[bool, bool]], part: int) -> float:
    return round(sum(hit[part] for hit in hits) / max(1, len(hits)), 4)
