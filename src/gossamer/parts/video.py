"""Video files as a stream of frames at even times, and frames as video files.

    t_k = start + k / fps,    frame(t) = the frame with the largest time stamp that is at most t

so a variable frame rate is right by construction, the last frame stays until the video ends, and no more than the
decoder's own few frames are ever held, however long the file is. Times are seconds from the first frame; images are
uint8 [h, w, 3], turned upright. Scaling is libswscale's, on the decoded frame, before it becomes an array.

Decoding and encoding are PyAV's (FFmpeg's libraries). Whether a file was cut off is read from its own structure: ISO
base media boxes (ISO/IEC 14496-12), the EBML segment of Matroska and WebM (RFC 8794), the RIFF chunk of AVI.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gossamer.core.errors import GossamerError, InputError, MissingExtra, OptionError, did_you_mean
from gossamer.core.paths import atomic_file

# Matroska and WebM round time stamps to the millisecond
GRAIN = 0.001
# a last picture held for longer, with no pause like it before, is a file whose rest was never written
HOLD = 5.0
CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".m4v": "mp4", ".mkv": "matroska", ".webm": "webm"}
CODECS = {
    "libx264": {"preset": "veryfast", "crf": "23"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "33", "b": "0"},
    "mpeg4": {"q": "4"},
}


@dataclasses.dataclass(frozen=True)
class Frame:
    """``image`` uint8 [h, w, 3], upright, as shown ``time`` seconds after the video's first frame."""

    time: float
    image: npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a file says of its first video stream.

    ``seconds`` is the length by the header (of a file that is ``cut`` off: what it would have been). ``width`` and
    ``height`` are the upright image's; ``rotation`` is the turn to upright, degrees counter-clockwise, counted in.
    """

    path: Path
    seconds: float
    width: int
    height: int
    rotation: int
    fps: float
    codec: str
    container: str
    audio: bool
    cut: bool


class Truncated(GossamerError):
    """The file stops decoding before its end. ``seconds`` is where; every frame before that was handed out."""

    def __init__(self, path: Path, seconds: float, expected: float) -> None:
        super().__init__(
            f"video {path}",
            must=f"be whole ({expected:.2f} s by its header)",
            got=f"a file that stops at {seconds:.2f} s",
            do="what comes before that was used; copy or record the file again for the rest",
        )
        self.seconds = seconds


def probe_video(path: str | Path) -> VideoInfo:
    """Read the header and the first frame. Raises MissingExtra without PyAV, InputError for what is no video."""
    path = Path(path)
    cut = _is_cut(path)
    with _open(path, cut) as container:
        stream = _pictures(container)[0]
        first = next(_decoded(container, stream, cut), None)
        if first is None:
            raise _no_frames(path, cut)
        seconds = _header_seconds(container, stream)
        height, width = _upright_size(first)
        return VideoInfo(
            path=path,
            seconds=_scan_seconds(path, cut) if seconds is None else seconds,
            width=width,
            height=height,
            rotation=round(first.rotation) % 360,
            fps=float(stream.average_rate or 0),
            codec=stream.codec_context.name,
            container=container.format.name,
            audio=bool(container.streams.audio),
            cut=cut,
        )


def read_frames(
    path: str | Path,
    fps: float = 2.0,
    *,
    start: float = 0.0,
    end: float | None = None,
    size: tuple[int, int] | None = None,
    short_side: int | None = None,
    threads: int = 0,
) -> Iterator[Frame]:
    """The frames shown at ``start``, ``start + 1/fps``, ... before ``end`` (None: the video's end), one at a time.

    ``size`` (height, width) stretches, ``short_side`` scales and keeps the shape, neither keeps the video's own size.
    ``start`` seeks to the keyframe before it. ``threads`` decode (0: as many as there are cores).

    Raises at the call: MissingExtra without PyAV; OptionError; InputError for a file that is no video, holds no frame,
    or does not hold the interval. Raises while reading: ``Truncated`` after the last frame that decodes.
    """
    _check_rate("read_frames: fps", fps)
    if size is not None and short_side is not None:
        raise OptionError("read_frames", must="get size or short_side", got="both", do="leave one out")
    if min(size or (1,)) < 1 or (short_side is not None and short_side < 1):
        raise OptionError("read_frames: size", must="be at least 1 pixel", got=size or short_side, do="give pixels")
    info = probe_video(path)
    slack = max(0.1, 2 / info.fps if info.fps else 0.0)
    if start >= info.seconds - GRAIN or (end is not None and end > info.seconds + slack):
        # headers of files with a variable frame rate may tell too little; the time stamps do not
        info = dataclasses.replace(info, seconds=max(info.seconds, _scan_seconds(info.path, info.cut)))
    if not 0 <= start < info.seconds - GRAIN or (end is not None and not (start < end <= info.seconds + slack)):
        raise InputError(
            f"video {info.path}: interval",
            must=f"lie inside the video, 0 to {info.seconds:.2f} s, its start before its end",
            got=f"{start:g} to {'the end' if end is None else f'{end:g}'}",
            do="give times in seconds from the start of the file",
        )
    return _sampled(info, fps, start, math.inf if end is None else end, size or short_side, threads)


def write_video(
    path: str | Path, frames: Iterable[npt.NDArray[np.uint8]], fps: float, *, codec: str | None = None, threads: int = 0
) -> Path:
    """Encode ``frames`` (uint8 [h, w, 3], one size, even sides) at a steady ``fps``; nothing is left after an error.

    The container is that of the suffix (mp4, m4v, mov, mkv, webm). ``codec`` is libx264, libvpx-vp9 or mpeg4; None
    takes libvpx-vp9 for webm, libx264 for the others. A keyframe every two seconds keeps seeking cheap.
    """
    path = Path(path)
    av = _av("write_video")
    suffix, where = path.suffix.lower(), f"write_video {path}"
    if suffix not in CONTAINERS:
        raise InputError(where, must="end in a known suffix", got=repr(suffix), do=did_you_mean(suffix, CONTAINERS))
    fitting = ["libvpx-vp9"] if suffix == ".webm" else list(CODECS)
    codec = codec or fitting[0]
    if codec not in fitting:
        raise OptionError(f"{where}: codec", must=f"fit {suffix}", got=repr(codec), do=did_you_mean(codec, fitting))
    _check_rate("write_video: fps", fps)
    images = iter(frames)
    first = next(images, None)
    if first is None:
        raise InputError(where, must="get at least one frame", got=0, do="check where they come from")
    shape = first.shape
    if len(shape) != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2:
        raise InputError(f"{where}: frame", must="be [h, w, 3], h and w even", got=list(shape), do="crop a pixel")
    with atomic_file(path) as temporary:
        # the index at the front, so that a file cut off later still decodes up to the cut
        flags = {"movflags": "+faststart"} if CONTAINERS[suffix] in ("mp4", "mov") else {}
        with av.open(str(temporary), "w", format=CONTAINERS[suffix], options=flags) as container:
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=CODECS[codec])
            stream.height, stream.width, stream.pix_fmt = shape[0], shape[1], "yuv420p"
            stream.codec_context.gop_size = max(1, round(2 * fps))
            stream.codec_context.thread_count = threads
            for image in itertools.chain([first], images):
                if image.shape != shape or image.dtype != np.uint8:
                    got, must = f"{image.dtype} {list(image.shape)}", f"be uint8 {list(shape)} like the first"
                    raise InputError(f"{where}: frame", must=must, got=got, do="scale all frames to one size")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
            container.mux(stream.encode())
    return path


def _sampled(
    info: VideoInfo, fps: float, start: float, end: float, size: tuple[int, int] | int | None, threads: int
) -> Iterator[Frame]:
    """One pass of the decoder; holds the frame on show and nothing else."""
    with _open(info.path, info.cut) as container:
        stream = _pictures(container)[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        clock = _Clock(stream)
        taken, shown, stop = 0, None, start
        for frame in _from_keyframe(container, stream, info.cut, clock, start):
            now = clock.time(frame)
            while shown is not None and start + taken / fps < min(now - GRAIN, end):
                yield Frame(start + taken / fps, _image(shown, size))
                taken += 1
            shown, stop = frame, clock.until
            if start + taken / fps >= end:
                return
        if shown is None:
            raise _no_frames(info.path, info.cut)
        whole = not info.cut and not clock.failed and info.seconds - stop <= max(HOLD, 2 * clock.longest)
        last = min(end, max(stop, info.seconds) if whole else stop)
        while start + taken / fps < last - GRAIN:
            yield Frame(start + taken / fps, _image(shown, size))
            taken += 1
    if not whole and stop < end - GRAIN:
        raise Truncated(info.path, stop, info.seconds)


class _Clock:
    """Seconds since the first frame, by time stamps; ``until``: end of the latest frame; ``longest``: longest pause."""

    def __init__(self, stream: Any) -> None:
        self.base = float(stream.time_base)
        self.origin = stream.start_time or 0
        self.step = 1 / float(stream.average_rate) if stream.average_rate else 0.04
        self.until, self.longest = -math.inf, 0.0
        self.failed = False

    def time(self, frame: Any) -> float:
        now = max(0.0, self.until) if frame.pts is None else (frame.pts - self.origin) * self.base
        if self.until >= 0:
            self.longest = max(self.longest, now - self.until)
        self.until = now + (frame.duration * self.base if frame.duration else self.step)
        return now

    def ticks(self, seconds: float) -> int:
        return self.origin + int(seconds / self.base)


def _from_keyframe(container: Any, stream: Any, cut: bool, clock: _Clock, start: float) -> Iterator[Any]:
    """Frames from the keyframe at or before ``start``; from the first frame where the file cannot seek there."""
    if start > 0:
        with contextlib.suppress(_av("read_frames").error.FFmpegError):
            container.seek(clock.ticks(start), stream=stream)
        frames = _decoded(container, stream, cut, clock)
        first = next(frames, None)
        if first is not None and (first.pts or 0) <= clock.ticks(start + GRAIN):
            return itertools.chain([first], frames)
        container.seek(clock.ticks(0), stream=stream)
    return _decoded(container, stream, cut, clock)


def _decoded(container: Any, stream: Any, cut: bool, clock: _Clock | None = None) -> Iterator[Any]:
    """Frames in order of presentation, up to the end or to the first packet that does not decode."""
    av = _av("read_frames")
    try:
        for packet in container.demux(stream):
            # the packet that the cut goes through would give half a picture
            if not (cut and packet.is_corrupt):
                yield from packet.decode()
    except av.error.FFmpegError:
        if clock is not None:
            clock.failed = True
        # threads hold frames that came before the damage
        with contextlib.suppress(av.error.FFmpegError):
            yield from stream.codec_context.decode(None)


def _image(frame: Any, size: tuple[int, int] | int | None) -> npt.NDArray[np.uint8]:
    """Scaled (to height and width, or to a short side), as RGB, turned upright: uint8 [h, w, 3], contiguous."""
    height, width = size if isinstance(size, tuple) else _upright_size(frame)
    if isinstance(size, int):
        scale = size / min(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
    quarter = round(frame.rotation / 90) % 4
    if quarter % 2:
        height, width = width, height
    scaled = frame.reformat(width=width, height=height, format="rgb24", interpolation="BILINEAR", threads=1)
    return np.ascontiguousarray(np.rot90(scaled.to_ndarray(), quarter))


def _upright_size(frame: Any) -> tuple[int, int]:
    return (frame.width, frame.height) if round(frame.rotation / 90) % 2 else (frame.height, frame.width)


def _header_seconds(container: Any, stream: Any) -> float | None:
    """Length of the video stream as written in the file, None where no length is written (live recordings)."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION")
    if tag:
        hours, minutes, seconds = map(float, tag.split(":"))
        return hours * 3600 + minutes * 60 + seconds - float((stream.start_time or 0) * stream.time_base)
    return container.duration / 1e6 if container.duration else None


def _scan_seconds(path: Path, cut: bool) -> float:
    """Length found by reading all packets, without decoding them."""
    last = 0.0
    with _open(path, cut) as container, contextlib.suppress(_av("probe_video").error.FFmpegError):
        stream = _pictures(container)[0]
        clock = _Clock(stream)
        for packet in container.demux(stream):
            last = max(last, clock.time(packet) + clock.step) if packet.pts is not None else last
    return last


def _open(path: Path, cut: bool) -> Any:
    """The container, known to have a video stream."""
    av = _av("video")
    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        do = "give an mp4, webm or mkv file"
        if cut:
            do = "its index (moov) is missing or cut off, so that nothing decodes; copy or record the file again"
        raise InputError(f"video {path}", must="be a video file", got=error.strerror, do=do) from error
    kind = container.format.name
    if _pictures(container) and not (kind in ("tty", "image2") or kind.endswith("_pipe")):
        return container
    still = "a single image" if container.streams.video else f"{kind} without video"
    got = "sound only" if container.streams.audio else "a text file" if kind == "tty" else still
    container.close()
    raise InputError(f"video {path}", must="hold moving pictures", got=got, do="give an mp4, webm or mkv file")


def _pictures(container: Any) -> list[Any]:
    """Video streams, without the cover pictures that sound files carry as one."""
    from av.stream import Disposition

    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def _check_rate(where: str, fps: float) -> None:
    if not 0 < fps < math.inf:
        raise OptionError(where, must="be above 0", got=fps, do="give frames per second")


def _no_frames(path: Path, cut: bool) -> InputError:
    do = "it was cut off before the first; copy or record the file again" if cut else "check how it was recorded"
    return InputError(f"video {path}", must="hold at least one frame that decodes", got=0, do=do)


def _is_cut(path: Path) -> bool:
    """Whether the file is shorter than its own structure says. InputError where there is no file to read."""
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"video {path}", must="be a file", got=got, do="check the spelling and the folder")
    total = path.stat().st_size
    if not total:
        raise InputError(f"video {path}", must="be a video file", got="an empty file", do="copy or record it again")
    with open(path, "rb") as stream:
        head = stream.read(12)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"styp"):
            return _boxes_cut(stream, total)
        if head[:4] == b"\x1aE\xdf\xa3":
            return _segment_cut(stream, total)
        return head[:4] == b"RIFF" and int.from_bytes(head[4:8], "little") + 8 > total


def _boxes_cut(stream: BinaryIO, total: int) -> bool:
    """Top-level boxes: size (4 bytes; 1: 8 more bytes hold it; 0: to the end) and type; the index is ``moov``."""
    position, kinds = 0, set()
    while position < total:
        stream.seek(position)
        head = stream.read(16)
        size = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
        if len(head) < 8 or 0 < size < 8 or position + size > total:
            return True
        kinds.add(head[4:8])
        position = total if size == 0 else position + size
    return b"moov" not in kinds


def _segment_cut(stream: BinaryIO, total: int) -> bool:
    """The EBML header, then the segment with its length in bytes (all ones: unknown, a live recording)."""
    stream.seek(4)
    header, _ = _vint(stream)
    stream.seek(header, 1)
    if stream.read(4) != b"\x18\x53\x80\x67":
        return False
    size, unknown = _vint(stream)
    return not unknown and stream.tell() + size > total


def _vint(stream: BinaryIO) -> tuple[int, bool]:
    """An EBML number of 1 to 8 bytes: as many zero bits as bytes follow, a one, the value; all ones mean unknown."""
    first = stream.read(1)
    length = 9 - first[0].bit_length() if first and first[0] else 1
    ones = (1 << 7 * length) - 1
    value = int.from_bytes(first + stream.read(length - 1), "big") & ones
    return value, value == ones


def _av(where: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtra(where, "video") from error
    return av
