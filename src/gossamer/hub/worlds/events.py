"""Scripted event videos with the truth known: a place, a person's doings in it, one event a second.

A video is 10 to 20 clips of one second, each an event (verb and object) in a manner (postfix, or none), drawn from the
Markov script of its place (``events_scripts``). A clip narrates itself as ``verb the object[ postfix]``, or at length.
Splits differ in their random streams, so no video is in two of them; held-out places have their own events. Mixed
videos have no script: anything known is done with anything known, in any of the known places.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.core.errors import OptionError, did_you_mean
from gossamer.hub.worlds.backdrops import check_style
from gossamer.hub.worlds.events_draw import Look, Painter, random_look
from gossamer.hub.worlds.events_scripts import KEEP, LOOKS, MAIN, PLACES, POSTFIXES, VERBS
from gossamer.parts.video import write_video

SPLITS = ("train", "validation", "test")
LENGTHS = ("short", "long")
SCENES = tuple(name for name, place in PLACES.items() if not place.held_out)
HELD_OUT_SCENES = tuple(name for name, place in PLACES.items() if place.held_out)
MIXED = 8  # events of a mixed video
QUESTIONS = {
    "current": "What is the action in the video?",
    "next": "What is the next action in the video?",
    "previous": "What is the previous action in the video?",
    "scene": "What is the overall activity in the video?",
}


@dataclass(frozen=True)
class Clip:
    """One event, from ``start`` to ``end`` in seconds; ``postfix`` may be empty."""

    start: float
    end: float
    scene: str
    verb: str
    object: str
    postfix: str

    @property
    def prefix(self) -> str:
        return self.words(postfix=False)

    @property
    def narration(self) -> str:
        return self.words()

    def words(self, length: str = "short", *, postfix: bool = True) -> str:
        """``cut the potato with the left hand``, or 12 words and more; OptionError for another length."""
        return _words(self.verb, self.object, self.postfix if postfix else "", length)


@dataclass(frozen=True)
class EventVideo:
    """A video that is drawn when it is looked at. ``name`` is unique over splits, seeds and places."""

    name: str
    scene: str
    style: str
    clips: tuple[Clip, ...]
    look: Look

    @property
    def seconds(self) -> float:
        return self.clips[-1].end

    def frames(self, fps: float = 2.0, size: tuple[int, int] = (112, 112)) -> Iterator[npt.NDArray[np.uint8]]:
        """The frames on show at 0, 1/fps, ...: uint8 [h, w, 3], drawn one by one; ``size`` is (height, width)."""
        painter = Painter(self.scene, self.look, self.style, size)
        for step in itertools.count():
            time = step / fps
            if time >= self.seconds:
                return
            clip = self.clips[int(time)]
            yield painter.frame(clip.verb, clip.object, clip.postfix, time - clip.start)

    def write(
        self, path: str | Path, fps: float = 10.0, size: tuple[int, int] = (360, 640), codec: str | None = None
    ) -> Path:
        """A video file of it (container by suffix); needs the extra video."""
        return write_video(path, self.frames(fps, size), fps, codec=codec)

    def truth(self, length: str = "short") -> list[dict[str, Any]]:
        """A row for each clip: start, end, scene, verb, object, postfix, prefix, narration."""
        return [_row(clip, length) for clip in self.clips]

    def relations(self, length: str = "short") -> list[dict[str, Any]]:
        """Instruction rows: relation, video, context [[start, end]] in seconds, question, answer, scene.

        current: the clip itself; next and previous: the clip before or after the one that is the answer; scene: the
        whole video. ``index`` is the answer's clip, ``prefix`` and ``postfix`` are the answer's (empty for scene).
        """
        rows = []
        for index, clip in enumerate(self.clips):
            for relation, shown in (("current", index), ("next", index - 1), ("previous", index + 1)):
                if 0 <= shown < len(self.clips):
                    context = [[self.clips[shown].start, self.clips[shown].end]]
                    rows.append(self._relation(relation, context, clip.words(length), index, length))
        rows.append(self._relation("scene", [[0.0, self.seconds]], self.scene, None, length))
        return rows

    def _relation(
        self, relation: str, context: list[list[float]], answer: str, index: int | None, length: str
    ) -> dict[str, Any]:
        clip = None if index is None else self.clips[index]
        return {
            "relation": relation, "video": self.name, "context": context, "question": QUESTIONS[relation],
            "answer": answer, "scene": self.scene, "index": index,
            "prefix": clip.words(length, postfix=False) if clip else "", "postfix": clip.postfix if clip else "",
        }  # fmt: skip


def event_videos(
    split: str,
    count: int,
    *,
    seed: int = 0,
    scenes: Sequence[str] | None = None,
    style: str = "flat",
    mixed: bool = False,
) -> list[EventVideo]:
    """``count`` videos, the places taking turns (None: all of SCENES); the same for the same arguments, always.

    With ``mixed`` each has a ring of its own of events from :func:`mixed_events`. Raises OptionError for an unknown
    split, place or style, or a count below 1.
    """
    if split not in SPLITS:
        raise OptionError("event_videos: split", must="exist", got=repr(split), do=did_you_mean(split, SPLITS))
    if count < 1:
        raise OptionError("event_videos: count", must="be at least 1", got=count, do="ask for one video or more")
    check_style(style)
    names = _known(scenes)
    head = f"{split}-mixed-{seed}" if mixed else f"{split}-{seed}"
    return [_video(f"{head}-{index}", names[index % len(names)], style, mixed) for index in range(count)]


@functools.cache
def mixed_events() -> tuple[tuple[str, str], ...]:
    """Every verb with every object of the places that are not held out by words, but for events of held-out places."""
    known = [event for place in PLACES.values() if place.held_out != "words" for event in place.events]
    held_out = {event for name in HELD_OUT_SCENES for event in PLACES[name].events}
    verbs, objects = (dict.fromkeys(event[part] for event in known) for part in (0, 1))
    return tuple(event for event in itertools.product(verbs, objects) if event not in held_out)


def narrations(scenes: Sequence[str] | None = None, length: str = "short", *, mixed: bool = False) -> list[str]:
    """Every narration that can occur in the places (None: all of SCENES), without doubles, in a fixed order.

    With ``mixed`` those of mixed videos come after them.
    """
    events = [event for scene in _known(scenes) for event in PLACES[scene].events]
    events += mixed_events() if mixed else ()
    told = (_words(verb, thing, postfix, length) for verb, thing in events for postfix in POSTFIXES)
    return list(dict.fromkeys(told))


def sample_video(
    path: str | Path,
    minutes: float = 1.0,
    *,
    fps: float = 10.0,
    size: tuple[int, int] = (360, 640),
    seed: int = 0,
    scenes: Sequence[str] | None = None,
    style: str = "flat",
    codec: str | None = None,
) -> list[dict[str, Any]]:
    """Write one long file of videos of the test split, one after the other; gives back its truth, row by row.

    Memory does not grow with ``minutes`` (rounded to whole seconds, at least one). Needs the extra video.
    """
    seconds = round(60 * minutes)
    if seconds < 1:
        raise OptionError("sample_video: minutes", must="be at least a second", got=minutes, do="give more")
    videos = event_videos("test", seconds // 10 + 1, seed=seed, scenes=scenes, style=style)
    rows: list[dict[str, Any]] = []
    for video in videos:
        offset = rows[-1]["end"] if rows else 0.0
        rows += [row | {"start": row["start"] + offset, "end": row["end"] + offset} for row in video.truth()]
    write_video(path, _chained(videos, fps, size, round(seconds * fps)), fps, codec=codec)
    return rows[:seconds]


def _chained(
    videos: Iterable[EventVideo], fps: float, size: tuple[int, int], count: int
) -> Iterator[npt.NDArray[np.uint8]]:
    return itertools.islice(itertools.chain.from_iterable(video.frames(fps, size) for video in videos), count)


def _video(name: str, scene: str, style: str, mixed: bool) -> EventVideo:
    rng = random.Random(f"{name}|{scene}")
    events = rng.sample(mixed_events(), MIXED) if mixed else PLACES[scene].events
    at, postfix, clips = rng.randrange(len(events)), rng.choice(POSTFIXES), []
    for second in range(rng.randint(10, 20)):
        verb, thing = events[at]
        clips.append(Clip(float(second), float(second + 1), scene, verb, thing, postfix))
        at = (at + (1 if rng.random() < MAIN else rng.choice((2, 3)))) % len(events)
        postfix = postfix if rng.random() < KEEP else rng.choice(POSTFIXES)
    return EventVideo(f"{name}-{scene}", scene, style, tuple(clips), random_look(rng))


def _words(verb: str, thing: str, postfix: str, length: str) -> str:
    if length not in LENGTHS:
        raise OptionError("narration: length", must="be known", got=repr(length), do=did_you_mean(length, LENGTHS))
    text = f"{verb} the {thing}" if length == "short" else f"{verb} the {LOOKS[thing]} {thing} {VERBS[verb].detail}"
    return f"{text} {postfix}" if postfix else text


def _row(clip: Clip, length: str) -> dict[str, Any]:
    return {
        "start": clip.start, "end": clip.end, "scene": clip.scene, "verb": clip.verb, "object": clip.object,
        "postfix": clip.postfix, "prefix": clip.words(length, postfix=False), "narration": clip.words(length),
    }  # fmt: skip


def _known(scenes: Sequence[str] | None) -> tuple[str, ...]:
    names = SCENES if scenes is None else tuple(scenes)
    for name in names:
        if name not in PLACES:
            raise OptionError("scenes", must="be known", got=repr(name), do=did_you_mean(name, PLACES))
    if not names:
        raise OptionError("scenes", must="name at least one", got="none", do=did_you_mean("", PLACES))
    return names
