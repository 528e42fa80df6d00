"""Narrated event videos of the procedural world, as real files: what a narrator is trained and tried on.

Rows: ``video`` (an mp4 in the cache), ``narrations`` ([[start, end, text], ...], one a second), ``scene``. The videos
of a split share no script and no camera with those of another.
"""

from __future__ import annotations

from typing import Any

from gossamer.core.paths import cache_dir
from gossamer.hub.worlds.events import event_videos

LICENCE = "Apache-2.0: drawn by Gossamer"

_COUNTS = {"train": 64, "validation": 8, "test": 12}
_RATE, _SIZE = 4.0, (180, 320)  # frames a second; height, width


def sources() -> tuple[str, ...]:
    """The world and the sizes of the files."""
    from gossamer import __version__

    return (f"gossamer=={__version__}", f"{_COUNTS} at {_SIZE}, {_RATE:g} a second")


def build() -> dict[str, list[dict[str, Any]]]:
    """Draw and write every video; about half a second each. Needs the extra video."""
    return {split: [_row(video) for video in event_videos(split, count)] for split, count in _COUNTS.items()}


def _row(video: Any) -> dict[str, Any]:
    path = cache_dir("worlds", "event_videos") / f"{video.name}.mp4"
    video.write(path, fps=_RATE, size=_SIZE)
    narrations = [[clip.start, clip.end, clip.narration] for clip in video.clips]
    return {"video": str(path), "narrations": narrations, "scene": video.scene}
