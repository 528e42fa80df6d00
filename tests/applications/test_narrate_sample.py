"""The committed sample narrator on video files: what it knows it narrates, what it does not know it marks."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from gossamer.applications.narrate import Narrate
from gossamer.core.paths import sha256
from gossamer.hub.nursery import nursery_folder
from gossamer.hub.nursery.narrator import RECOMBINED
from gossamer.hub.worlds.events import HELD_OUT_SCENES, EventVideo, event_videos, narrations

VIDEOS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[tuple[EventVideo, Path]]:
    """Videos of the test split at 360p."""
    return written(event_videos("test", VIDEOS), tmp_path_factory.mktemp("known"))


def written(videos: list[EventVideo], folder: Path) -> list[tuple[EventVideo, Path]]:
    return [(video, video.write(folder / f"{video.name}.mp4", fps=4.0)) for video in videos]


def test_held_out_videos_of_its_world_get_their_true_script(files):
    right, known, scenes = [], [], []
    for video, path in files:
        found = Narrate().apply(path)
        right += [row.nearest == clip.narration for row, clip in zip(found.rows, video.clips, strict=True)]
        known += [row.known for row in found.rows]
        scenes.append(found.scene == video.scene)
    assert statistics.fmean(right) > 0.6
    assert statistics.fmean(known) > 0.8
    assert all(scenes)


@pytest.mark.parametrize(("style", "least"), [("flat", 0.5), ("textured", 0.3)])
def test_another_world_is_mostly_marked_and_narrated_after_its_events_are_added(style, least, tmp_path):
    """Held-out events in held-out places; "textured" is held out as well. An eighth is chance within a place."""
    weights = nursery_folder("narrator") / "model.safetensors"
    before = sha256(weights)
    foreign = written(event_videos("test", VIDEOS, scenes=HELD_OUT_SCENES, style=style), tmp_path)
    plain = [Narrate().apply(path) for _, path in foreign]
    assert statistics.fmean(row.known for found in plain for row in found.rows) < 0.2
    assert any(found.advice for found in plain)
    system = Narrate()
    system.vocabulary.add(narrations(HELD_OUT_SCENES), system.encoder)
    system.vocabulary.save(tmp_path / "grown.vocab")
    right = []
    for video, path in foreign:
        if video.scene == RECOMBINED:  # of the other place training knows no word
            found = Narrate(vocab=str(tmp_path / "grown.vocab")).apply(path)
            right += [row.prefix == clip.prefix for row, clip in zip(found.rows, video.clips, strict=True)]
    assert statistics.fmean(right) > least  # of 64 events
    assert sha256(weights) == before


def test_a_narration_that_is_added_is_retrieved_at_once(files, tmp_path):
    """The vocabulary lacks one event of the video; once it is added, its clips are narrated with it."""
    video, path = files[0]
    missing = video.clips[0].prefix
    system = Narrate()
    rows = [{"text": text, "scene": video.scene} for text in narrations([video.scene]) if not text.startswith(missing)]
    system.fit(rows)
    at = [number for number, clip in enumerate(video.clips) if clip.prefix == missing]
    before = system.apply(path)
    assert all(before.rows[number].prefix != missing for number in at)
    assert system.vocabulary.add([missing], system.encoder, scene=video.scene) == [missing]
    after = system.apply(path)
    assert statistics.fmean(after.rows[number].prefix == missing for number in at) > 0.5
