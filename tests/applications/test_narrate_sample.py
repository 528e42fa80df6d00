"""The committed sample narrator on video files: what it knows it narrates, what it does not know it marks."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from gossamer.applications.narrate import Narrate
from gossamer.core.paths import sha256
from gossamer.hub.nursery import nursery_folder
from gossamer.hub.worlds.events import HELD_OUT_SCENES, EventVideo, event_videos, narrations

VIDEOS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[tuple[EventVideo, Path]]:
    """Videos of the test split at 360p."""
    return written(event_videos("test", VIDEOS), tmp_path_factory.mktemp("known"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> list[tuple[EventVideo, Path]]:
    """Held-out places in a held-out style."""
    videos = event_videos("test", VIDEOS, scenes=HELD_OUT_SCENES, style="textured")
    return written(videos, tmp_path_factory.mktemp("foreign"))


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


def test_another_world_is_mostly_marked_and_known_after_its_events_are_added(foreign, tmp_path):
    weights = nursery_folder("narrator") / "model.safetensors"
    before = sha256(weights)
    plain = [Narrate().apply(path) for _, path in foreign]
    rows = [row for found in plain for row in found.rows]
    assert statistics.fmean(row.known for row in rows) < 0.5
    assert any(found.advice for found in plain)
    system = Narrate()
    vocabulary = system.vocabulary
    for place in HELD_OUT_SCENES:
        vocabulary.add(narrations([place]), system.encoder, scene=place)
    vocabulary.save(tmp_path / "grown.vocab")
    right, chance = [], []
    for video, path in foreign:
        found = Narrate(vocab=str(tmp_path / "grown.vocab")).apply(path)
        right += [row.prefix == clip.prefix for row, clip in zip(found.rows, video.clips, strict=True)]
        chance.append(1 / len({clip.prefix for clip in video.clips}))
    assert statistics.fmean(right) > 2 * statistics.fmean(chance)
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
