"""What narrating a video gives: one row a clip, and the same as a dict, subtitles, a text log or one HTML page."""

from __future__ import annotations

import base64
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from gossamer.core.paths import atomic_file

UNKNOWN = "[out of vocabulary]"
MOSTLY = 0.5  # share of unknown rows from which on a video counts as a foreign one


@dataclasses.dataclass(frozen=True)
class Row:
    """One clip, ``start`` to ``end`` in seconds.

    ``prefix`` and ``postfix`` are the nearest narration of the vocabulary, ``score`` its cosine; ``known`` is whether
    the score reaches the calibrated threshold. Where it does not, the nearest narration is a guess and no narration.
    """

    start: float
    end: float
    scene: str
    prefix: str
    postfix: str
    score: float
    known: bool

    @property
    def nearest(self) -> str:
        """Prefix and postfix as one narration, whether it fits or not."""
        return f"{self.prefix} {self.postfix}".strip()

    @property
    def text(self) -> str:
        """The narration, or the mark of what the vocabulary does not hold."""
        return self.nearest if self.known else UNKNOWN

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"narration": self.nearest if self.known else None}


@dataclasses.dataclass(frozen=True)
class Segment:
    """Neighbouring rows that say the same, as one: seconds, how many clips, their mean score, and a key frame."""

    start: float
    end: float
    scene: str
    text: str
    nearest: str
    known: bool
    score: float
    clips: int
    frame: str = ""  # a data URI, empty where the page has no picture of it


@dataclasses.dataclass
class Narration:
    """The narrated video. ``frames`` are JPEG key frames by row number; ``stopped`` the second where decoding ended."""

    video: str
    seconds: float
    rows: list[Row]
    scene: str
    model: str
    vocabulary: str
    threshold: float
    query: str = ""
    scenes: tuple[str, ...] = ()
    stopped: float | None = None
    notes: tuple[str, ...] = ()
    frames: Mapping[int, bytes] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def unknown_share(self) -> float:
        """Share of the clips that are out of vocabulary; 0 without clips."""
        return sum(not row.known for row in self.rows) / max(1, len(self.rows))

    @property
    def advice(self) -> str:
        """What to do where most of the video is out of vocabulary; empty elsewhere."""
        if not self.rows or self.unknown_share < MOSTLY:
            return ""
        known = f", which knows {_listed(self.scenes)}" if self.scenes else ""
        return (
            f"{self.unknown_share:.0%} of {len(self.rows)} clips are out of the vocabulary {self.vocabulary}{known}. "
            'Add what happens in this video: gossamer vocab add my.vocab "peel a mango" --scene kitchen; '
            "or train on narrated videos of its kind: gossamer run recipes/vlog.yaml"
        )

    def segments(self, *, pictures: bool = False) -> list[Segment]:
        """Runs of rows with the same scene and text; a gap between clips ends a run."""
        made = []
        for numbers in _runs(self.rows):
            rows = [self.rows[number] for number in numbers]
            picture = next((self.frames[number] for number in numbers if number in self.frames), None)
            first, score = rows[0], sum(row.score for row in rows) / len(rows)
            frame = _data_uri(picture) if pictures and picture is not None else ""
            place = (first.start, rows[-1].end, first.scene, first.text, first.nearest, first.known)
            made.append(Segment(*place, score, len(rows), frame))
        return made

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as plain values."""
        names = ("video", "seconds", "scene", "model", "vocabulary", "threshold", "query", "stopped")
        head = {name: getattr(self, name) for name in names}
        return head | {
            "unknown_share": self.unknown_share,
            "notes": list(self.notes),
            "rows": [row.as_dict() for row in self.rows],
        }

    def lines(self) -> list[str]:
        """The timed log, one line a row."""
        return [line(row) for row in self.rows]

    def srt(self, path: str | Path | None = None) -> str:
        """SubRip subtitles, one a segment; written to ``path`` where given."""
        parts = [
            f"{number}\n{_stamp(part.start)} --> {_stamp(part.end)}\n{part.text}\n"
            for number, part in enumerate(self.segments(), start=1)
        ]
        text = "\n".join(parts)
        if path is not None:
            _write(Path(path), text)
        return text

    def html(self, path: str | Path) -> Path:
        """Write one page that stands alone: key frames on a time line, what was narrated, and a search box."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        source = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
        parts = self.segments(pictures=True)
        begin = min((part.start for part in parts), default=0.0)
        end = max((part.end for part in parts), default=1.0)
        page = environment.from_string(source).render(
            narration=self, parts=parts, begin=begin, span=max(end - begin, 1e-9), end=end, clock=clock, unknown=UNKNOWN
        )
        _write(Path(path), page)
        return Path(path)


def key_rows(rows: Sequence[Row], limit: int = 150) -> list[int]:
    """Row numbers that get a picture: the middle of each segment, evenly thinned to ``limit``."""
    middles = [numbers[len(numbers) // 2] for numbers in _runs(rows)]
    if len(middles) <= limit:
        return middles
    return [middles[round(place * (len(middles) - 1) / (limit - 1))] for place in range(limit)]


def line(row: Row) -> str:
    """``0:12  kitchen  cut the potato  0.71``; an unknown row shows its mark and the nearest narration as such."""
    scene = f"{row.scene}  " if row.scene else ""
    nearest = "" if row.known else f"  (nearest: {row.nearest})"
    return f"{clock(row.start):>7}  {scene}{row.text}{nearest}  {row.score:.2f}"


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``, with a tenth where there is one."""
    tenths = round(seconds * 10)
    whole, rest = divmod(tenths, 10)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    text = f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{text}.{rest}" if rest else text


def _runs(rows: Sequence[Row]) -> list[list[int]]:
    """Row numbers of each segment."""
    runs: list[list[int]] = []
    for number, row in enumerate(rows):
        last = rows[runs[-1][-1]] if runs else None
        same = last is not None and (row.scene, row.text) == (last.scene, last.text)
        if same and last is not None and abs(row.start - last.end) < 1e-6:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _stamp(seconds: float) -> str:
    whole, milli = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02},{milli:03}"


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def _listed(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    shown = ", ".join(itertools.islice(names, limit))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write_text(text, encoding="utf-8")
