"""Watching: clips and blocks, constant memory, and going on after a break with the very same blocks."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gossamer.applications.narrate.result import Row
from gossamer.applications.narrate.watching import BLOCK, Cut, Work, cut_video
from gossamer.core.errors import GossamerError, InputError
from gossamer.parts.video import probe_video, write_video


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """40.5 seconds at 4 frames a second; the grey level is the number of the half second."""
    frames = (np.full((64, 96, 3), number // 2 * 3, np.uint8) for number in range(162))
    return write_video(tmp_path_factory.mktemp("video") / "grey.mp4", frames, 4)


def encode(images) -> torch.Tensor:
    return torch.tensor([[float(image.mean()), float(len(images))] for image in images])


def whole(video: Path, **options) -> Cut:
    return cut_video(probe_video(video), **{"start": 0.0, "end": None, "clip": 1.0, "fps": 2.0} | options)


def test_clips_have_the_frames_of_their_seconds(video):
    with Work(video, {}, encode) as work:
        blocks = list(work.blocks(whole(video)))
    assert [len(block.spans) for block in blocks] == [BLOCK, BLOCK, 41 - 2 * BLOCK]
    spans = [span for block in blocks for span in block.spans]
    assert spans[:2] == [(0.0, 1.0), (1.0, 2.0)]
    assert spans[-1] == (40.0, 40.5)
    clips = [clip for block in blocks for clip in block.clips()]
    assert [len(clip) for clip in clips] == [2] * 40 + [1]
    for number, clip in enumerate(clips):
        assert torch.allclose(clip[:, 0], torch.arange(2 * number, 2 * number + len(clip)) * 3.0, atol=2.5)


@pytest.mark.parametrize(
    ("clip", "fps", "start"), [(0.75, 2.0, 0.0), (2.0, 2.0, 3.0), (0.3, 1.0, 1.5), (1.0, 4.0, 0.0)]
)
def test_a_clip_is_what_the_formula_says(video, clip, fps, start):
    cut = whole(video, clip=clip, fps=fps, start=start)
    with Work(video, {}, encode) as work:
        blocks = list(work.blocks(cut))
    clips = [part for block in blocks for part in block.clips()]
    assert len(clips) == int(np.ceil((40.5 - start) / clip - 1e-9))
    for number, part in enumerate(clips[:-1]):
        low = int(np.floor(number * clip * fps + 1e-9))
        high = max(low + 1, int(np.ceil((number + 1) * clip * fps - 1e-9)))
        assert len(part) == high - low
        seconds = start + np.arange(low, high) / fps
        assert np.allclose(part[:, 0], np.floor(seconds * 2) * 3, atol=2.5)


def test_it_goes_on_after_a_break_with_the_same_blocks(video):
    cut = whole(video)
    with Work(video, {"query": "whole"}, encode) as work:
        unbroken = list(work.blocks(cut))
    seen = []
    with Work(video, {"query": "broken"}, encode) as work:
        list(itertools.islice(work.blocks(cut), 1))
    with Work(video, {"query": "broken"}, lambda images: seen.append(len(images)) or encode(images)) as work:
        again = list(work.blocks(cut))
    assert len(seen) == 2
    for one, other in zip(unbroken, again, strict=True):
        assert (one.spans, one.parts) == (other.spans, other.parts)
        assert torch.equal(one.features, other.features)


def test_sample_is_even_over_the_whole_video(video):
    with Work(video, {}, encode) as work:
        blocks = list(work.blocks(whole(video)))
        features = torch.cat([block.features for block in blocks])
        assert torch.equal(work.sample(len(blocks), 1000), features)
        rows = torch.linspace(0, len(features) - 1, 8).long()
        assert torch.equal(work.sample(len(blocks), 8), features[rows])


def test_key_frames_are_jpeg_pictures_of_their_clip(video, tmp_path):
    with Work(video, {}, encode) as work:
        list(work.blocks(whole(video)))
        pictures = work.pictures([0, 20, 40])
    assert set(pictures) == {0, 20, 40}
    for number, jpeg in pictures.items():
        path = tmp_path / "frame.jpg"
        path.write_bytes(jpeg)
        with Image.open(path) as image:
            assert image.format == "JPEG"
            assert image.size == (96, 64)
            assert abs(np.asarray(image).mean() - (2 * number + (number < 40)) * 3) < 4


def test_a_cut_file_gives_what_decodes_and_where_it_stopped(video, tmp_path):
    short = tmp_path / "short.mp4"
    data = video.read_bytes()
    short.write_bytes(data[: len(data) * 2 // 3])
    cut = whole(short)
    for _ in range(2):  # the second time from what was kept
        with Work(short, {}, encode) as work:
            blocks = list(work.blocks(cut))
            stopped = work.stopped
        clips = sum(len(block.spans) for block in blocks)
        assert stopped is not None
        assert 0 < stopped < 40
        assert clips == int(np.ceil(stopped))


def test_features_that_are_not_finite_are_refused(video):
    def broken(images):
        return encode(images).log10() if len(images) < 2 * BLOCK else encode(images) * float("nan")

    with Work(video, {}, broken) as work, pytest.raises(InputError, match="at 0 s: must be finite"):
        list(work.blocks(whole(video)))


@pytest.mark.parametrize("times", [(-1.0, None), (41.0, None), (5.0, 5.0), (5.0, 50.0), (7.0, 6.0)])
def test_seconds_outside_the_video_are_refused(video, times):
    with pytest.raises(InputError, match="must lie inside the video"):
        whole(video, start=times[0], end=times[1])


def test_two_processes_do_not_work_on_one_video(video):
    with Work(video, {}, encode), pytest.raises(GossamerError, match="another at work"), Work(video, {}, encode):
        pass


def test_rows_are_kept_by_block_and_other_options_are_other_work(video):
    row = Row(0.0, 1.0, "kitchen", "cut the potato", "", 0.5, True)
    with Work(video, {"query": "a"}, encode) as work:
        work.keep_rows(0, [row])
        assert work.rows(0) == [row]
        assert work.rows(1) is None
    with Work(video, {"query": "b"}, encode) as work:
        assert work.rows(0) is None
    with Work(video, {"query": "a"}, encode) as work:
        work.clear()
    with Work(video, {"query": "a"}, encode) as work:
        assert work.rows(0) is None
