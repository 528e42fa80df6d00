"""The event world: true scripts, disjoint splits, drawings that show what the truth says, files that read back."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

from gossamer.core.errors import OptionError
from gossamer.hub.worlds.events import (
    HELD_OUT_SCENES,
    SCENES,
    EventVideo,
    event_videos,
    mixed_events,
    narrations,
    sample_video,
)
from gossamer.hub.worlds.events_draw import Painter
from gossamer.hub.worlds.events_scripts import LOOKS, PLACES, POSTFIXES, VERBS
from gossamer.hub.worlds.events_shapes import OBJECTS, TOOLS
from gossamer.parts.video import probe_video, read_frames


def frames(video: EventVideo, **options: object) -> np.ndarray:
    return np.stack(list(video.frames(**options)))  # type: ignore[arg-type]


def test_the_world_is_as_large_as_it_says() -> None:
    events = [event for scene in SCENES for event in PLACES[scene].events]
    assert len(SCENES) >= 6
    assert len(HELD_OUT_SCENES) >= 2
    assert len(set(events)) == len(events) >= 40
    held_out = [event for scene in HELD_OUT_SCENES for event in PLACES[scene].events]
    assert not set(held_out) & set(events)
    assert len(narrations()) == len(events) * len(POSTFIXES)
    assert 4 <= len(POSTFIXES) - 1 <= 8
    assert {VERBS[verb].tool for verb, _ in events + held_out} == set(TOOLS)
    assert {thing for _, thing in events + held_out} == set(OBJECTS) == set(LOOKS)
    assert {verb for verb, _ in events + held_out} == set(VERBS)


def test_mixed_videos_show_all_words_but_no_event_of_a_held_out_place() -> None:
    pairs, words = mixed_events(), {word for event in mixed_events() for word in event}
    assert len(pairs) == len(set(pairs)) > 500
    for name in HELD_OUT_SCENES:
        events = PLACES[name].events
        assert not set(events) & set(pairs)
        known = {word for event in events for word in event} & words
        assert known == ({word for event in events for word in event} if PLACES[name].held_out == "pairs" else set())
    videos = event_videos("train", 12, mixed=True)
    assert [video.scene for video in videos[:6]] == list(SCENES)
    shown = [{(clip.verb, clip.object) for clip in video.clips} for video in videos]
    assert all(events <= set(pairs) and len(events) <= 8 for events in shown)
    assert len(set.union(*shown)) > 60
    assert not {video.name for video in videos} & {video.name for video in event_videos("train", 12)}
    assert {clip.narration for video in videos for clip in video.clips} <= set(narrations(mixed=True))


def test_narrations_are_prefix_and_postfix() -> None:
    short, long = narrations(), narrations(length="long")
    assert "cut the potato" in short
    assert "cut the potato with the left hand" in short
    assert len(set(long)) == len(short)
    assert min(len(text.split()) for text in long) >= 12
    clip = event_videos("train", 1)[0].clips[0]
    assert clip.narration == f"{clip.prefix} {clip.postfix}".strip()
    assert clip.words("long").startswith(f"{clip.verb} the {LOOKS[clip.object]} {clip.object} ")
    with pytest.raises(OptionError, match="did you mean 'short'"):
        clip.words("shor")


def test_a_video_is_fixed_by_split_seed_and_place() -> None:
    once, again = event_videos("test", 12, seed=3), event_videos("test", 12, seed=3)
    assert once == again
    assert once[:5] == event_videos("test", 5, seed=3)
    assert [video.scene for video in once[:6]] == list(SCENES)
    np.testing.assert_array_equal(frames(once[0]), frames(again[0]))
    names = [video.name for video in once]
    for split, seed in (("train", 3), ("validation", 3), ("test", 4)):
        names += [video.name for video in event_videos(split, 12, seed=seed)]
        scripts = {video.clips for video in event_videos(split, 12, seed=seed)}
        assert not scripts & {video.clips for video in once}
    assert len(set(names)) == len(names)


def test_clips_follow_each_other_second_by_second() -> None:
    for video in event_videos("train", 30):
        assert 10 <= len(video.clips) <= 20
        assert [clip.start for clip in video.clips] == list(range(len(video.clips)))
        assert video.seconds == video.clips[-1].end == len(video.truth())
        assert all(clip.end == clip.start + 1 for clip in video.clips)
        assert {(clip.verb, clip.object) for clip in video.clips} <= set(PLACES[video.scene].events)


def test_next_and_previous_follow_from_the_clip_on_show() -> None:
    after: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    before: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    kept = pairs = 0
    for video in event_videos("train", 600):
        for one, two in pairwise(video.clips):
            after.setdefault((one.verb, one.object), Counter())[two.verb, two.object] += 1
            before.setdefault((two.verb, two.object), Counter())[one.verb, one.object] += 1
            kept, pairs = kept + (one.postfix == two.postfix), pairs + 1
            assert (one.verb, one.object) != (two.verb, two.object)
    for counts in (*after.values(), *before.values()):
        assert 0.7 < counts.most_common(1)[0][1] / counts.total() < 0.95
        assert len(counts) <= 3
    assert 0.8 < kept / pairs < 0.93


def test_relations_name_the_right_context() -> None:
    video = event_videos("train", 1)[0]
    rows = video.relations()
    assert Counter(row["relation"] for row in rows) == {
        "current": len(video.clips), "next": len(video.clips) - 1, "previous": len(video.clips) - 1, "scene": 1
    }  # fmt: skip
    for row in rows:
        (start, end) = row["context"][0]
        if row["relation"] == "scene":
            assert (start, end, row["answer"]) == (0, video.seconds, video.scene)
            continue
        shift = {"current": 0, "next": 1, "previous": -1}[row["relation"]]
        clip = video.clips[int(start) + shift]
        assert (end, row["answer"], row["index"]) == (start + 1, clip.narration, int(start) + shift)
        assert row["answer"] == f"{row['prefix']} {row['postfix']}".strip()
    assert all(len(row["answer"].split()) >= 12 for row in video.relations("long")[:-1])


def test_each_event_manner_and_place_is_drawn_its_own_way() -> None:
    """Over one background no two events and no two manners share a picture, and the two frames of a clip differ."""
    look = event_videos("train", 1)[0].look
    for scene, place in PLACES.items():
        painter = Painter(scene, look, "flat", (64, 64))
        shown = {
            event: [painter.frame(*event, "", phase).astype(int) for phase in (0.0, 0.5)] for event in place.events
        }
        for one, two in combinations(shown.values(), 2):
            assert (abs(one[0] - two[0]).max(axis=2) > 40).mean() > 0.02
        for event, (first, second) in shown.items():
            assert (abs(first - second).max(axis=2) > 40).mean() > 0.004, event
        manners = [painter.frame(*place.events[0], postfix, 0.0).astype(int) for postfix in POSTFIXES]
        for one, two in combinations(manners, 2):
            assert (abs(one - two).max(axis=2) > 40).mean() > 0.03


def test_the_middle_of_a_wide_frame_is_the_square_frame() -> None:
    video = event_videos("train", 1)[0]
    square, wide, high = (next(video.frames(size=size)) for size in ((96, 96), (96, 160), (160, 96)))
    assert wide.shape == (96, 160, 3)
    np.testing.assert_array_equal(wide[:, 32:128], square)
    np.testing.assert_array_equal(high[32:128], square)


@pytest.mark.parametrize("style", ["textured", "photo"])
def test_styles_change_the_look_and_not_the_script(style: str) -> None:
    flat, other = event_videos("test", 1)[0], event_videos("test", 1, style=style)[0]
    assert flat.truth() == other.truth()
    one, two = next(flat.frames(size=(64, 64))).astype(int), next(other.frames(size=(64, 64))).astype(int)
    assert abs(one - two).mean() > 5


def test_frames_come_at_the_rate_asked_for() -> None:
    video = event_videos("train", 1)[0]
    assert len(frames(video, fps=2, size=(48, 48))) == 2 * len(video.clips)
    assert len(frames(video, fps=0.5, size=(48, 48))) == (len(video.clips) + 1) // 2


def test_a_file_shows_the_video(tmp_path: Path) -> None:
    video = event_videos("train", 1)[0]
    path = video.write(tmp_path / "v.mp4", fps=10, size=(120, 160))
    info = probe_video(path)
    assert (info.height, info.width) == (120, 160)
    assert info.seconds == pytest.approx(video.seconds, abs=0.05)
    for read, drawn in zip(read_frames(path, fps=2), video.frames(fps=2, size=(120, 160)), strict=True):
        assert abs(read.image.astype(int) - drawn).mean() < 12


def test_the_sample_video_chains_scripts(tmp_path: Path) -> None:
    rows = sample_video(tmp_path / "s.mp4", minutes=0.75, size=(48, 64))
    assert [(row["start"], row["end"]) for row in rows] == [(second, second + 1) for second in range(45)]
    assert len({row["scene"] for row in rows}) >= 3
    assert probe_video(tmp_path / "s.mp4").seconds == pytest.approx(45, abs=0.05)
    assert rows[:10] == event_videos("test", 1)[0].truth()[:10]


def test_what_is_unknown_is_refused() -> None:
    for arguments, words in (
        ({"split": "tran"}, "did you mean 'train'"),
        ({"count": 0}, "at least 1"),
        ({"scenes": ("kitchn",)}, "did you mean 'kitchen'"),
        ({"scenes": ()}, "at least one"),
        ({"style": "flatt"}, "did you mean 'flat'"),
    ):
        with pytest.raises(OptionError, match=words):
            event_videos(**({"split": "train", "count": 1} | arguments))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="48 to 1920"):
        next(event_videos("train", 1)[0].frames(size=(10, 10)))
    with pytest.raises(OptionError, match="at least a second"):
        sample_video("never.mp4", minutes=0)
