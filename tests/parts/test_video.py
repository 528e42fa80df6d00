"""Video files: the frame on show at each time, in every container, and what is no video said plainly."""

from __future__ import annotations

import dataclasses
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from gossamer.core.errors import InputError, MissingExtra, OptionError
from gossamer.parts.video import Frame, Truncated, probe_video, read_frames, write_video

# a phone held upright: shown a quarter turn clockwise (16.16 fixed point, last column 2.30)
PORTRAIT = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
FORMATS = [
    ("a.mp4", "libx264"),
    ("a.mp4", "mpeg4"),
    ("a.mkv", "libx264"),
    ("a.webm", "libvpx-vp9"),
    ("a.mov", "libx264"),
]


def grey(level: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def ramp(count: int) -> Iterator[np.ndarray]:
    """Frame i has level 10 + 6 (i mod 40)."""
    return (grey(10 + 6 * (index % 40)) for index in range(count))


def level(frame: Frame) -> float:
    return float(frame.image.mean())


def encode(path: Path, images: list[np.ndarray], stamps: list[int], rate: int = 10, **more: object) -> Path:
    """Straight through PyAV, with a time stamp for each frame in units of 1 / ``rate`` s."""
    with av.open(str(path), "w", options=more.get("options", {})) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = more.get("gop", 10)
        if "matrix" in more:
            stream.set_display_matrix(more["matrix"])
        for image, stamp in zip(images, stamps, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = stamp
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def noise(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 255, (count, 48, 64, 3), dtype=np.uint8))


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    short = path.with_stem("cut")
    short.write_bytes(data[: int(len(data) * share)])
    return short


@pytest.mark.parametrize(("name", "codec"), FORMATS)
def test_the_frame_on_show_is_handed_out(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, ramp(40), 10, codec=codec)
    frames = list(read_frames(path, fps=2))
    assert [frame.time for frame in frames] == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert [level(frame) for frame in frames] == pytest.approx([10 + 6 * index for index in range(0, 40, 5)], abs=4)
    info = probe_video(path)
    assert (info.width, info.height, info.rotation, info.audio, info.cut) == (64, 48, 0, False, False)
    assert info.seconds == pytest.approx(4, abs=0.05)
    assert info.fps == pytest.approx(10, abs=0.1)


def test_variable_frame_rate_goes_by_time_stamps(tmp_path: Path) -> None:
    stamps = [0, 1, 2, 3, 20, 21, 35]
    for name in ("v.mp4", "v.mkv"):
        path = encode(tmp_path / name, [grey(20 * index + 20) for index in range(7)], stamps)
        shown = {frame.time: round(level(frame) / 20) - 1 for frame in read_frames(path, fps=4)}
        for time, index in shown.items():
            assert index == sum(stamp <= time * 10 for stamp in stamps) - 1
        assert max(shown) >= 3.5
        assert [round(level(frame) / 20) - 1 for frame in read_frames(path, start=3, end=3.6)] == [5, 6]


def test_time_starts_at_the_first_frame(tmp_path: Path) -> None:
    path = encode(tmp_path / "late.mkv", [grey(20 * index + 20) for index in range(10)], list(range(50, 60)))
    frames = list(read_frames(path, fps=10))
    assert [round(level(frame) / 20) - 1 for frame in frames] == list(range(10))
    assert frames[0].time == 0


@pytest.mark.parametrize("name", ["r.mp4", "r.mov"])
def test_rotation_turns_the_picture_upright(tmp_path: Path, name: str) -> None:
    image = grey(30)
    image[:24, :32] = 220
    path = encode(tmp_path / name, [image] * 5, list(range(5)), matrix=PORTRAIT)
    info = probe_video(path)
    assert (info.height, info.width, info.rotation) == (64, 48, 270)
    frame = next(read_frames(path, fps=2)).image
    assert frame.shape == (64, 48, 3)
    # a quarter turn clockwise takes the top left corner to the top right
    assert frame[:28, 28:].mean() > 200
    assert frame[:28, :20].mean() < 50
    assert frame[36:].mean() < 50
    assert next(read_frames(path, short_side=24)).image.shape == (32, 24, 3)


def test_sizes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "s.mp4", ramp(5), 10)
    assert next(read_frames(path, size=(112, 112))).image.shape == (112, 112, 3)
    assert next(read_frames(path, short_side=24)).image.shape == (24, 32, 3)
    assert next(read_frames(path, short_side=31)).image.shape == (31, 41, 3)
    with pytest.raises(OptionError, match="leave one out"):
        read_frames(path, size=(8, 8), short_side=8)
    with pytest.raises(OptionError, match="at least 1 pixel"):
        read_frames(path, size=(0, 8))
    with pytest.raises(OptionError, match="above 0"):
        read_frames(path, fps=0)


@pytest.mark.parametrize(("name", "codec"), FORMATS)
def test_an_interval_equals_that_part_of_the_whole(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, ramp(90), 10, codec=codec)
    whole = {round(frame.time, 3): frame.image for frame in read_frames(path, fps=4)}
    part = list(read_frames(path, fps=4, start=4.25, end=6.5))
    assert [frame.time for frame in part] == [4.25 + 0.25 * index for index in range(9)]
    for frame in part:
        np.testing.assert_array_equal(frame.image, whole[round(frame.time, 3)])


def test_seeking_decodes_from_the_keyframe_before_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gossamer.parts.video as video

    path = encode(tmp_path / "k.mp4", noise(100), list(range(100)), gop=10)
    decoded = 0
    original = video._decoded

    def counting(*arguments: object) -> Iterator[object]:
        nonlocal decoded
        for frame in original(*arguments):
            decoded += 1
            yield frame

    monkeypatch.setattr(video, "_decoded", counting)
    list(read_frames(path, start=8.5, end=9, threads=1))
    assert decoded < 30


def test_intervals_outside_the_video_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "i.mp4", ramp(30), 10)
    for start, end in ((-1, None), (3, None), (2, 1), (0, 4), (1, 1)):
        with pytest.raises(InputError, match=r"0 to 3\.00 s"):
            read_frames(path, start=start, end=end)
    assert len(list(read_frames(path, end=3.05))) == 6


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("front.mp4", {"movflags": "+faststart"}),
        ("parts.mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("m.mkv", {}),
    ],
)
def test_a_cut_file_gives_what_decodes_then_says_where_it_stopped(
    tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    path = encode(tmp_path / name, noise(100), list(range(100)), options=options)
    whole = list(read_frames(path, fps=10))
    short = cut(path, 0.6)
    assert probe_video(short).cut
    frames = []
    with pytest.raises(Truncated, match="stops at") as caught:
        for frame in read_frames(short, fps=10):
            frames.append(frame)
    assert 50 <= len(frames) <= 60
    assert caught.value.seconds == pytest.approx(len(frames) / 10, abs=0.11)
    for ours, theirs in zip(frames, whole, strict=False):
        np.testing.assert_array_equal(ours.image, theirs.image)
    assert len(list(read_frames(short, fps=2, end=4))) == 8


@pytest.mark.parametrize(("name", "part"), [("d.mp4", 0.25), ("d.webm", 0.5)])
def test_damage_stops_with_the_time(tmp_path: Path, name: str, part: float) -> None:
    """A stretch of zeros inside the file, and a file laid out in full of which the rest never arrived."""
    path = write_video(tmp_path / name, noise(120), 10)
    data = bytearray(path.read_bytes())
    middle, length = len(data) // 2, int(len(data) * part)
    data[middle : middle + length] = bytes(length)
    path.write_bytes(data)
    count = 0
    with pytest.raises(Truncated) as caught:
        for _ in read_frames(path, fps=10):
            count += 1
    assert 30 < count < 80
    assert caught.value.seconds == pytest.approx(count / 10, abs=0.11)


def test_an_index_at_the_end_that_is_missing(tmp_path: Path) -> None:
    path = encode(tmp_path / "end.mp4", noise(30), list(range(30)))
    with pytest.raises(InputError, match=r"moov.*nothing decodes"):
        read_frames(cut(path, 0.6))


def test_an_unknown_length_is_found_by_reading(tmp_path: Path) -> None:
    """A live recording: the muxer cannot go back to write the length."""
    path = tmp_path / "live.mkv"
    encode(path, noise(40), list(range(40)), options={"live": "1"})
    info = probe_video(path)
    assert not info.cut
    assert info.seconds == pytest.approx(4, abs=0.11)
    assert len(list(read_frames(path, fps=2))) == 8


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_what_is_no_video_is_refused_with_the_reason(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "text.mp4").write_text("hello\n" * 99)
    (tmp_path / "text.txt").write_text("hello\n" * 99)
    (tmp_path / "empty.mp4").touch()
    Image.new("RGB", (32, 32)).save(tmp_path / "still.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "still.jpg")
    sound(tmp_path / "sound.mp4")
    reasons = {
        "none.mp4": "no such file",
        ".": "a folder",
        "empty.mp4": "an empty file",
        "text.mp4": "Invalid data",
        "text.txt": "a text file",
        "still.png": "a single image",
        "still.jpg": "a single image",
        "sound.mp4": "sound only",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=reason):
            probe_video(tmp_path / name)
        with pytest.raises(InputError, match=reason):
            read_frames(tmp_path / name)


def test_zero_frames(tmp_path: Path) -> None:
    """A fragmented file cut after its index and before its first fragment."""
    path = encode(tmp_path / "z.mp4", noise(20), list(range(20)), options={"movflags": "frag_keyframe+empty_moov"})
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moof") - 4])
    with pytest.raises(InputError, match="at least one frame"):
        read_frames(path)


def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    def peak(seconds: int) -> int:
        path = write_video(tmp_path / f"{seconds}.mp4", (grey(index % 200) for index in range(10 * seconds)), 10)
        tracemalloc.start()
        count = sum(frame.image.shape == (48, 64, 3) for frame in read_frames(path, fps=5))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 5 * seconds
        return top

    short, long = peak(5), peak(200)
    assert long < 2 * short + 200_000


def test_frames_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = write_video(tmp_path / "l.mp4", ramp(100), 10)
    frames = read_frames(path)
    assert next(frames).time == 0
    frames.close()


def test_writing_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield grey(1)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_video(tmp_path / "x.mp4", broken(), 10)
    for frames, words in (
        ([], "at least one frame"),
        ([grey(1, 47, 64)], "even"),
        ([grey(1), grey(1, 24, 64)], "like the first"),
    ):
        with pytest.raises(InputError, match=words):
            write_video(tmp_path / "x.mp4", frames, 10)
    with pytest.raises(InputError, match=r"did you mean '\.mp4'"):
        write_video(tmp_path / "x.mp3", ramp(2), 10)
    with pytest.raises(OptionError, match=r"fit \.webm"):
        write_video(tmp_path / "x.webm", ramp(2), 10, codec="libx264")
    with pytest.raises(OptionError, match="above 0"):
        write_video(tmp_path / "x.mp4", ramp(2), 0)
    assert not list(tmp_path.iterdir())


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "x.mp4", ramp(5), 10)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"gossamer\[video\]"):
        read_frames(path)
    with pytest.raises(MissingExtra, match=r"gossamer\[video\]"):
        write_video(path, ramp(5), 10)


def test_info_is_a_record(tmp_path: Path) -> None:
    info = probe_video(write_video(tmp_path / "x.webm", ramp(5), 10))
    assert dataclasses.asdict(info)["codec"] in ("vp9", "libvpx-vp9")
