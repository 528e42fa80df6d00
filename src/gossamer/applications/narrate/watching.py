"""Watching a video: frames become features, clip by clip, in constant memory, and lie on disk until all is narrated.

Clip k is the seconds [start + k c, start + (k + 1) c). At f frames a second it has the frames

    floor(k c f) : max(floor(k c f) + 1, ceil((k + 1) c f))

Clips go in blocks of :data:`BLOCK`: the features of a block [frames, D] with one key frame a clip are one safetensors
file, its rows one JSON file, each written whole or not at all. A run that was cut off goes on after the last finished
block; blocks are cut at the same clips as before, so every batch is the same, and so is every row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.applications.narrate.result import Row
from gossamer.core.errors import GossamerError, InputError
from gossamer.core.paths import atomic_file, cache_dir, write_json
from gossamer.parts.video import Truncated, VideoInfo, read_frames

BLOCK = 16  # clips that are encoded and narrated together
HEAD = 1 << 20  # bytes of a file that, with its size, stand for its content
SHORT_SIDE = 180  # larger frames are scaled down to this when they are decoded: enough for a key frame


Picture = npt.NDArray[np.uint8]
Encode = Callable[[Sequence[Picture]], Tensor]


@dataclasses.dataclass(frozen=True)
class Block:
    """Clips that lie together: the seconds of each (``spans``) and its rows of ``features`` [frames, D] (``parts``)."""

    number: int
    spans: list[tuple[float, float]]
    parts: list[tuple[int, int]]
    features: Tensor

    def clips(self) -> list[Tensor]:
        """Features of each clip, float32 [its frames, D]."""
        return [self.features[low:high] for low, high in self.parts]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a video is cut: from ``start`` to ``end``, clips of ``clip`` seconds at ``fps``, frames of ``short_side``."""

    start: float
    end: float
    clip: float
    fps: float
    short_side: int | None = None

    @property
    def clips(self) -> int:
        """Number of clips; the last one may be shorter."""
        return max(1, math.ceil((self.end - self.start) / self.clip - 1e-6))

    @property
    def blocks(self) -> int:
        return -(-self.clips // BLOCK)

    def frames(self, number: int) -> tuple[int, int]:
        """First frame of a clip and the one after its last."""
        low = math.floor(number * self.clip * self.fps + 1e-6)
        return low, max(low + 1, math.ceil((number + 1) * self.clip * self.fps - 1e-6))

    def span(self, number: int) -> tuple[float, float]:
        """Seconds of a clip."""
        low, high = (self.start + place * self.clip for place in (number, number + 1))
        return round(low, 6), round(min(high, self.end), 6)

    def until(self, second: float) -> Cut:
        """The same clips of a video that breaks off."""
        return dataclasses.replace(self, end=min(second, self.end))

    def members(self, block: int) -> range:
        """The clips of a block."""
        return range(block * BLOCK, min((block + 1) * BLOCK, self.clips))


class Work:
    """The folder of one narration in progress; one process at a time works in it.

    ``options`` is all that the rows depend on besides the video; ``encode`` makes features [n, D] of n frames.
    ``stopped`` is the second where the video broke off.
    """

    def __init__(self, video: Path, options: Mapping[str, Any], encode: Encode) -> None:
        self.video, self.encode = video, encode
        self.folder = cache_dir("narrate") / _key(video, options)
        self.lock = FileLock(self.folder / ".lock")
        self.stopped: float | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            must, do = "be narrated by one process at a time", "wait for the other to end"
            raise GossamerError(str(self.video), must=must, got="another at work on it", do=do) from error
        return self

    def __exit__(self, *exception: object) -> None:
        # what was refused before a block was done leaves nothing
        if self.folder.is_dir() and all(path.name == ".lock" for path in self.folder.iterdir()):
            self.clear()
        self.lock.release()

    def clear(self) -> None:
        """Forget the work: it is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def blocks(self, cut: Cut) -> Iterator[Block]:
        """The blocks of the video in order: those on disk first, then what is watched now and put there."""
        done = 0
        self._read_stop()
        while done < cut.blocks and self._path(done).exists():
            yield self._load(done, cut if self.stopped is None else cut.until(self.stopped))
            done += 1
        if done < cut.blocks and self.stopped is None:
            yield from self._watch(done, cut)
        self._read_stop()

    def rows(self, block: int) -> list[Row] | None:
        """The rows of a block, None where it is not narrated yet."""
        path = self._rows_path(block)
        if not path.exists():
            return None
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]

    def keep_rows(self, block: int, rows: Sequence[Row]) -> None:
        write_json(self._rows_path(block), [dataclasses.asdict(row) for row in rows])

    def clips(self, cut: Cut, numbers: Sequence[int]) -> dict[int, Tensor]:
        """Features of these clips, which have been watched."""
        found: dict[int, Tensor] = {}
        for block in sorted({number // BLOCK for number in numbers}):
            for number, clip in enumerate(self._load(block, cut).clips(), start=block * BLOCK):
                if number in numbers:
                    found[number] = clip
        return found

    def pictures(self, numbers: Sequence[int]) -> dict[int, bytes]:
        """JPEG key frames of these clips."""
        found: dict[int, bytes] = {}
        for number in numbers:
            with safe_open(self._path(number // BLOCK), "pt") as stored:
                found[number] = stored.get_tensor(f"picture.{number}").numpy().tobytes()
        return found

    def sample(self, blocks: int, most: int) -> Tensor:
        """Features [at most ``most``, D], evenly spaced over all frames of the first ``blocks`` blocks."""
        sizes = []
        for block in range(blocks):
            with safe_open(self._path(block), "pt") as stored:
                sizes.append(stored.get_slice("features").get_shape()[0])
        total = sum(sizes)
        wanted = torch.linspace(0, total - 1, min(total, most)).long()
        chosen, offset = [], 0
        for block, size in enumerate(sizes):
            inside = wanted[(wanted >= offset) & (wanted < offset + size)] - offset
            if len(inside):
                with safe_open(self._path(block), "pt") as stored:
                    chosen.append(stored.get_tensor("features")[inside])
            offset += size
        return torch.cat(chosen)

    def _watch(self, first: int, cut: Cut) -> Iterator[Block]:
        low = cut.frames(first * BLOCK)[0]
        begin = cut.start + low / cut.fps
        frames = read_frames(self.video, cut.fps, start=begin, end=cut.end, short_side=cut.short_side)
        held: deque[Picture] = deque()  # frames from number ``low`` on
        broken: float | None = None
        over = False
        for block in range(first, cut.blocks):
            clips = cut.members(block)
            start, stop = cut.frames(clips[0])[0], cut.frames(clips[-1])[1]
            try:
                while not over and low + len(held) < stop:
                    held.append(next(frames).image)
            except StopIteration:
                over = True
            except Truncated as error:
                over, broken = True, error.seconds
            while held and low < start:
                held.popleft()
                low += 1
            seen = [number for number in clips if cut.frames(number)[0] < low + len(held)]
            if seen and held:
                images = [held[place] for place in range(min(stop - start, len(held)))]
                span = range(seen[0], seen[-1] + 1)
                yield self._store(block, cut if broken is None else cut.until(broken), span, images)
            if over:
                break
        if broken is not None:
            write_json(self._stop_file, broken)

    def _store(self, block: int, cut: Cut, clips: range, images: Sequence[Picture]) -> Block:
        features = self.encode(images)
        wrong = (~torch.isfinite(features)).any(dim=1)
        if wrong.any():
            second = cut.start + (cut.frames(clips[0])[0] + int(wrong.nonzero()[0])) / cut.fps
            must, do = "be finite numbers", "look at that frame, and at the weights of the encoder"
            raise InputError(f"features of {self.video} at {second:g} s", must=must, got="NaN or infinity", do=do)
        parts = _parts(cut, clips, len(images))
        tensors = {"features": features.float().contiguous()}
        for number, (low, high) in zip(clips, parts, strict=True):
            tensors[f"picture.{number}"] = _jpeg(images[(low + high) // 2])
        with atomic_file(self._path(block)) as path:
            save_file(tensors, path)
        return Block(block, [cut.span(number) for number in clips], parts, tensors["features"])

    def _load(self, block: int, cut: Cut) -> Block:
        with safe_open(self._path(block), "pt") as stored:
            features = stored.get_tensor("features")
            clips = [number for number in cut.members(block) if f"picture.{number}" in stored.keys()]  # noqa: SIM118
        parts = _parts(cut, range(clips[0], clips[-1] + 1), len(features))
        return Block(block, [cut.span(number) for number in clips], parts, features)

    def _read_stop(self) -> None:
        if self._stop_file.exists():
            self.stopped = float(json.loads(self._stop_file.read_text(encoding="utf-8")))

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:06}.safetensors"

    def _rows_path(self, block: int) -> Path:
        return self.folder / f"{block:06}.json"

    @property
    def _stop_file(self) -> Path:
        return self.folder / "stopped.json"


def cut_video(info: VideoInfo, *, start: float, end: float | None, clip: float, fps: float) -> Cut:
    """The clips of a video between two seconds. InputError where they do not lie inside it."""
    stop = info.seconds if end is None else end
    if not 0 <= start < stop or start >= info.seconds or stop > info.seconds + 1 / fps:
        raise InputError(
            f"{info.path}: clip from {start:g} s to {'the end' if end is None else f'{end:g} s'}",
            must=f"lie inside the video, 0 to {info.seconds:.2f} s, and end after its start",
            do="give --start and --end in seconds",
        )
    large = min(info.width, info.height) > SHORT_SIDE
    return Cut(start, min(stop, info.seconds), clip, fps, SHORT_SIDE if large else None)


def _parts(cut: Cut, clips: range, frames: int) -> list[tuple[int, int]]:
    """Rows of each clip within its block, as far as there are ``frames``."""
    first = cut.frames(clips[0])[0]
    return [(low - first, min(high - first, frames)) for low, high in map(cut.frames, clips)]


def _jpeg(image: Picture) -> Tensor:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=72)
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


def _key(video: Path, options: Mapping[str, Any]) -> str:
    """Of the content of the video (head and size) and of the options."""
    digest = hashlib.sha256()
    with open(video, "rb") as stream:
        digest.update(stream.read(HEAD))
    digest.update(f"{os.path.getsize(video)} {json.dumps(options, sort_keys=True, default=str)}".encode())
    return digest.hexdigest()[:24]
