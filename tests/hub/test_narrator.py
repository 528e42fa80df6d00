"""The sample narrator as it is in the package: small, whole, better than asked for; its helpers on a tiny scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.hub.nursery import narrator as module
from gossamer.hub.nursery.narrator import RECOMBINED, UNSEEN, load_narrator, truths, vocabulary_rows
from gossamer.hub.worlds.events import HELD_OUT_SCENES, SCENES, event_videos
from gossamer.parts.narration import Narrator

FOLDER = Path(module.__file__).parent / "narrator"


def test_model_processor_and_vocabulary_belong_together() -> None:
    model, processor, index = load_narrator()
    assert index.encoder == processor.text_encoder
    assert model.config.method == "vlog"
    assert 0 < model.config.oov_threshold < 1
    assert set(index.scenes) == set(SCENES)
    assert index.postfixes[0] == ""
    features = 2 * torch.randn(8, model.config.image_width)
    narrator = Narrator(model, processor, index)
    told = narrator.narrate([features[:2], features[2:5]], narrator.scene(features))
    assert len(told) == 2
    assert all(-1 <= row.score <= 1 for row in told)


def test_it_is_small_and_its_figures_are_those_that_were_asked_for() -> None:
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size < 8_000_000
    report = json.loads((FOLDER / "training.json").read_text())
    assert report["held_out_current_narration"] > 60
    assert report["held_out_next_narration"] > 40
    for split in ("recombined", "recombined_textured", "unseen"):
        assert report[f"held_out_{split}_marked_out_of_vocabulary"] > 50
    assert report["held_out_recombined_after_adding_event"] > 50
    assert report["held_out_recombined_textured_after_adding_event"] > 35
    assert report["held_out_test_marked_out_of_vocabulary"] < 15
    assert report["command"].endswith("gossamer.hub.nursery.train narrator")


def test_places_that_are_not_in_the_vocabulary_are_the_held_out_ones() -> None:
    assert {RECOMBINED, UNSEEN} == set(HELD_OUT_SCENES)
    _, _, index = load_narrator()
    video = event_videos("test", 1, scenes=[RECOMBINED])[0]
    assert not {clip.narration for clip in video.clips} & set(index.narrations())


def test_questions_about_neighbours_are_answered_by_the_right_clips() -> None:
    video = event_videos("test", 1)[0]
    assert truths(video, "current") == list(video.clips)
    assert truths(video, "next") == list(video.clips[1:])
    assert truths(video, "previous") == list(video.clips[:-1])
    rows = vocabulary_rows([video])
    assert rows[0] == {"text": video.clips[0].narration, "video": video.name, "scene": video.scene}


@pytest.mark.parametrize(("jitter", "least", "most"), [("none", 0, 0), ("light", 1, 40), ("strong", 3, 70)])
def test_jitter_changes_pictures_a_little_and_always_alike(jitter: Any, least: float, most: float) -> None:
    video = event_videos("train", 1)[0]
    first, again = (module._frames(video, jitter)[:2] for _ in range(2))
    plain = next(iter(video.frames(2.0, module.FRAME)))
    assert np.array_equal(first[0], again[0])
    difference = np.abs(first[0].astype(float) - plain).mean()
    assert least <= difference <= most
