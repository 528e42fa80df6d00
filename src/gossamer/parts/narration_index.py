"""A vocabulary of whole narrations, searched by vector: prefixes, postfixes, and reference videos by scene.

With q [d] a query and o_i [d] the text vector of entry i, both of one frozen text encoder's space,

    score_i = cos(q, o_i),    answer = argmax over the entries that are searched

Brute force searches all prefixes. Hierarchical search first takes the ``top`` reference videos whose scene text is
nearest to a scene query, and then searches the union of their prefixes only; this union is gathered once a video.
Above :data:`LARGE` entries a search of everything is approximate (faiss, extra "index").

A vocabulary is a folder ``NAME.vocab``: ``vocab.safetensors`` (vectors as the encoder gave them, reference videos,
pair counts) and ``vocab.json`` (texts; the encoder's name, width and fingerprint). It fits one text encoder only and is
refused with any other. Adding narrations encodes their text; nothing is trained.

The postfix list always begins with the empty postfix, a class of its own, whose vector is that of :data:`NOTHING`.
Source: VLog (arXiv 2503.09402), sections 3.2 and 3.3; where it says nothing: reference videos of equal scores rank the
newest first, and narrations added without a scene are candidates of every video.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.core.errors import InputError, OptionError, did_you_mean
from gossamer.core.paths import atomic_dir, write_json
from gossamer.parts.dual_encoder import same_encoder
from gossamer.parts.narration_pairs import join, narration_pairs, normalise
from gossamer.parts.nearest import InvertedFile, best, checked_unit, unit

LARGE = 100_000  # entries beyond which "auto" searches approximately
NOTHING = "nothing more"
SEARCHES = ("auto", "brute", "ann")
VERSION = 1


class TextEncoder(Protocol):
    """What embeds the texts: see :class:`gossamer.parts.dual_encoder.DualEncoder`."""

    @property
    def name(self) -> str: ...
    @property
    def text_width(self) -> int: ...
    @property
    def text_fingerprint(self) -> str: ...
    def texts(self, texts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class Hit:
    """One answer; ``row`` is its place among the prefixes or postfixes, ``score`` the cosine."""

    text: str
    score: float
    row: int


@dataclass
class Video:
    """A reference video: its scene text and the rows of its prefixes, without repeats; ``added``: see ``add``."""

    name: str
    scene: str
    rows: list[int]
    added: bool = False


@dataclass(frozen=True)
class Candidates:
    """The prefixes that a search is limited to: their ``rows`` and unit vectors [n, d], and the videos they are of."""

    rows: list[int]
    unit: Tensor
    videos: tuple[Hit, ...] = ()


@dataclass(eq=False)
class NarrationIndex:
    """Texts and vectors [n, d] float32 of prefixes and postfixes (the first postfix is empty), videos by scene.

    ``anywhere`` holds rows that are candidates of every video, ``counts`` how often a (prefix, postfix) was seen.
    ``threshold`` is the score below which a clip is out of this vocabulary, where that was calibrated on it.
    """

    encoder: dict[str, Any]
    prefixes: list[str]
    prefix_vectors: Tensor
    postfixes: list[str]
    postfix_vectors: Tensor
    scenes: list[str] = field(default_factory=list)
    scene_vectors: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    videos: list[Video] = field(default_factory=list)
    anywhere: list[int] = field(default_factory=list)
    counts: Counter[tuple[int, int]] = field(default_factory=Counter)
    threshold: float | None = None
    _file: InvertedFile | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.prefixes:
            raise InputError("narration vocabulary", must="hold at least one narration", got="none")
        assert self.postfixes[0] == ""
        self._refresh()

    @classmethod
    def build(
        cls,
        rows: Iterable[Mapping[str, Any] | str],
        encoder: TextEncoder,
        *,
        mode: str = "consistent",
        min_count: int = 1,
        pairs: bool = True,
    ) -> Self:
        """From rows ``{"text", "video"?, "scene"?}`` or plain texts.

        Rows of one ``video`` (or, without it, of one ``scene``) make a reference video. ``pairs=False`` keeps whole
        narrations and no postfix but the empty one. Raises InputError when no text is left.
        """
        read = [_row(row) for row in rows]
        read = [row for row in read if row["text"]]
        if not read:
            raise InputError("narration vocabulary", must="hold at least one narration", got="none")
        coded = narration_pairs((row["text"] for row in read), mode=mode, min_count=min_count) if pairs else None
        if coded is not None:
            read = [row for row in read if row["text"] in coded]  # the literal box may lose some
        split = [coded.encode(row["text"]) if coded is not None else (row["text"], "") for row in read]
        prefixes = list(dict.fromkeys(prefix for prefix, _ in split))
        postfixes = list(dict.fromkeys(["", *(postfix for _, postfix in split)]))
        places, ends = _places(prefixes), _places(postfixes)
        videos, anywhere = _reference_videos(read, [places[prefix] for prefix, _ in split])
        scenes = list(dict.fromkeys(video.scene for video in videos))
        return cls(
            described(encoder),
            prefixes,
            _encode(encoder, prefixes),
            postfixes,
            _encode(encoder, [postfix or NOTHING for postfix in postfixes]),
            scenes,
            _encode(encoder, scenes),
            videos,
            anywhere,
            Counter((places[prefix], ends[postfix]) for prefix, postfix in split),
        )

    def add(self, texts: Sequence[str], encoder: TextEncoder, *, scene: str | None = None) -> list[str]:
        """Make narrations retrievable; returns those that were new. With ``scene`` they join that scene's videos.

        A text that a prefix and a postfix make up already only has its prefix made a candidate.
        """
        self.check(encoder)
        wanted = list(dict.fromkeys(text for text in map(normalise, texts) if text))
        if not wanted:
            raise InputError("vocabulary: add", must="get at least one narration that is not empty", got="none")
        known, ends = _places(self.prefixes), set(self.postfixes)
        rows, new = [], list[str]()
        for text in wanted:
            heads = [text[:at] for at, char in enumerate(text) if char == " " and text[at + 1 :] in ends]
            head = next((head for head in [text, *heads] if head in known), None)
            if head is None:
                known[text] = len(known)
                new.append(text)
            rows.append(known[head or text])
        if new:
            self.prefix_vectors = torch.cat([self.prefix_vectors, _encode(encoder, new)])
            self.prefixes.extend(new)
        if scene is None:
            self.anywhere = sorted({*self.anywhere, *rows})
        else:
            self._join_scene(normalise(scene), rows, encoder)
        self._refresh()
        return new

    def check(self, encoder: TextEncoder | Mapping[str, Any]) -> None:
        """InputError when the vectors are not of ``encoder``, which may be given as :func:`described`."""
        given = encoder if isinstance(encoder, Mapping) else described(encoder)
        same = same_encoder(str(given["fingerprint"]), str(self.encoder["fingerprint"]))
        if not same or given["width"] != self.encoder["width"]:
            raise InputError(
                f"vocabulary of the text encoder {_show(self.encoder)}",
                must="be used with that encoder",
                got=_show(given),
                do="build the vocabulary again with this encoder, or load the model that goes with it",
            )

    def narrations(self) -> list[str]:
        """The narrations it was built from and those added since: the pairs seen, and prefixes without a count."""
        seen = [join(self.prefixes[p], self.postfixes[s]) for p, s in self.counts]
        return list(dict.fromkeys([*seen, *self.prefixes]))

    def reference_videos(self, query: Tensor, top: int = 10) -> list[Hit]:
        """The ``top`` videos whose scene is nearest to ``query`` [d], and what was added to scenes that rank no lower.

        Among equals the newest come first. Additions do not count towards ``top``, so they displace nothing.
        """
        if not self.videos:
            return []
        scores = self._scene_scores(query)
        hits: list[Hit] = []
        counted = 0
        for scene in torch.sort(scores, descending=True, stable=True).indices.tolist():
            for row in reversed(self._of_scene[self.scenes[scene]]):
                hits.append(Hit(self.videos[row].name, float(scores[scene]), row))
                counted += not self.videos[row].added
                if counted == top:
                    return hits
        return hits

    def scene(self, query: Tensor) -> Hit | None:
        """The nearest scene text; None where the vocabulary has no scenes."""
        if not self.scenes:
            return None
        scores = self._scene_scores(query)
        row = int(scores.argmax())
        return Hit(self.scenes[row], float(scores[row]), row)

    def candidates(self, query: Tensor, top: int = 10) -> Candidates | None:
        """The union of the prefixes of the ``top`` reference videos; None (search everything) where there are none."""
        videos = self.reference_videos(query, top)
        if not videos:
            return None
        rows = self.rows_of([video.row for video in videos])
        return Candidates(rows.tolist(), self._unit[rows], tuple(videos))

    def rows_of(self, videos: Sequence[int]) -> Tensor:
        """Prefix rows of these videos and of all that belong anywhere, ascending, int64 [n]."""
        pieces = [self._rows[video] for video in videos] + [torch.tensor(self.anywhere, dtype=torch.int64)]
        return torch.unique(torch.cat(pieces))

    def search(
        self, queries: Tensor, k: int = 1, *, among: Candidates | None = None, method: str = "auto"
    ) -> list[list[Hit]]:
        """The ``k`` best prefixes of each query [q, d], best first; ``method`` counts where all are searched."""
        if method not in SEARCHES:
            raise OptionError(
                "search.method", must=f"be one of {SEARCHES}", got=method, do=did_you_mean(method, SEARCHES)
            )
        vectors = checked_unit(queries, self.encoder["width"])
        if among is not None:
            rows = among.rows
            found = best(vectors, among.unit, k)
            return [[Hit(self.prefixes[rows[place]], score, rows[place]) for score, place in hits] for hits in found]
        if method == "ann" or (method == "auto" and len(self.prefixes) > LARGE):
            if self._file is None:
                self._file = InvertedFile(self._unit)
            found = self._file.best(vectors, k)
        else:
            found = best(vectors, self._unit, k)
        return [[Hit(self.prefixes[row], score, row) for score, row in hits] for hits in found]

    def search_postfixes(self, queries: Tensor, k: int = 1) -> list[list[Hit]]:
        """The ``k`` best postfixes of each query [q, d]; the empty one is among them."""
        found = best(checked_unit(queries, self.encoder["width"]), self._postfix_unit, k)
        return [[Hit(self.postfixes[row], score, row) for score, row in hits] for hits in found]

    def save(self, folder: Path) -> None:
        """Write the folder whole or not at all."""
        tensors = {
            "prefix_vectors": self.prefix_vectors,
            "postfix_vectors": self.postfix_vectors,
            "scene_vectors": self.scene_vectors,
            "video_rows": torch.tensor([row for video in self.videos for row in video.rows], dtype=torch.int32),
            "video_sizes": torch.tensor([len(video.rows) for video in self.videos], dtype=torch.int32),
            "anywhere": torch.tensor(self.anywhere, dtype=torch.int32),
            "counts": torch.tensor([[p, s, n] for (p, s), n in self.counts.items()], dtype=torch.int32).reshape(-1, 3),
        }
        places = _places(self.scenes)
        with atomic_dir(Path(folder)) as path:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "vocab.safetensors")
            write_json(
                path / "vocab.json",
                {
                    "version": VERSION,
                    "encoder": self.encoder,
                    "prefixes": self.prefixes,
                    "postfixes": self.postfixes,
                    "scenes": self.scenes,
                    "videos": [[video.name, places[video.scene], video.added] for video in self.videos],
                    "threshold": self.threshold,
                },
            )

    @classmethod
    def load(cls, folder: Path, encoder: TextEncoder | Mapping[str, Any] | None = None) -> Self:
        """Read a folder that :meth:`save` wrote; with ``encoder`` refuse one of another. InputError if it is none."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "vocab.safetensors")
            rows = iter(tensors["video_rows"].split(tensors["video_sizes"].tolist()))
            index = cls(
                meta["encoder"],
                meta["prefixes"],
                tensors["prefix_vectors"],
                meta["postfixes"],
                tensors["postfix_vectors"],
                meta["scenes"],
                tensors["scene_vectors"],
                [
                    Video(name, meta["scenes"][scene], next(rows).tolist(), added)
                    for name, scene, added in meta["videos"]
                ],
                tensors["anywhere"].tolist(),
                Counter({(p, s): n for p, s, n in tensors["counts"].tolist()}),
                meta.get("threshold"),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"vocabulary {folder}",
                must="be a folder with vocab.json and vocab.safetensors",
                got=f"{type(error).__name__}: {error}",
                do="build one with `gossamer vocab build NARRATIONS --out NAME.vocab`",
            ) from error
        if encoder is not None:
            index.check(encoder)
        return index

    def _join_scene(self, scene: str, rows: list[int], encoder: TextEncoder) -> None:
        if scene not in self._of_scene:
            vector = _encode(encoder, [scene])
            self.scene_vectors = torch.cat([self.scene_vectors, vector]) if self.scenes else vector
            self.scenes.append(scene)
        old = next((video for video in self.videos if video.added and video.scene == scene), None)
        if old is not None:
            self.videos.remove(old)
            rows = [*old.rows, *rows]
        # last, so that it ranks before the videos of its scene
        self.videos.append(Video(f"added: {scene}", scene, list(dict.fromkeys(rows)), added=True))

    def _scene_scores(self, query: Tensor) -> Tensor:
        return self._scene_unit @ checked_unit(query.reshape(1, -1), self.encoder["width"])[0]

    def _refresh(self) -> None:
        """Unit vectors and rows as tensors, made once after every change."""
        for vectors, texts in ((self.prefix_vectors, self.prefixes), (self.postfix_vectors, self.postfixes)):
            if vectors.shape != (len(texts), self.encoder["width"]):
                raise InputError(
                    "vocabulary vectors",
                    must=f"be of shape {(len(texts), self.encoder['width'])}",
                    got=tuple(vectors.shape),
                    do="build the vocabulary again",
                )
        self._unit = unit(self.prefix_vectors)
        self._postfix_unit = unit(self.postfix_vectors)
        self._scene_unit = unit(self.scene_vectors)
        self._rows = [torch.tensor(video.rows, dtype=torch.int64) for video in self.videos]
        self._of_scene: dict[str, list[int]] = defaultdict(list)
        for row, video in enumerate(self.videos):
            self._of_scene[video.scene].append(row)
        self._file = None


def _encode(encoder: TextEncoder, texts: list[str]) -> Tensor:
    if not texts:
        return torch.zeros(0, encoder.text_width)
    vectors = encoder.texts(texts).detach().float().cpu()
    if vectors.shape != (len(texts), encoder.text_width) or not torch.isfinite(vectors).all():
        raise InputError(
            f"text encoder {encoder.name!r}",
            must=f"give finite vectors [{len(texts)}, {encoder.text_width}]",
            got=tuple(vectors.shape),
        )
    return vectors


def _reference_videos(read: list[dict[str, str]], rows: list[int]) -> tuple[list[Video], list[int]]:
    videos: dict[str, Video] = {}
    anywhere: set[int] = set()
    for row, place in zip(read, rows, strict=True):
        name = row["video"] or row["scene"]
        if not row["scene"]:
            anywhere.add(place)
            continue
        videos.setdefault(name, Video(name, row["scene"], [])).rows.append(place)
    for video in videos.values():
        video.rows = list(dict.fromkeys(video.rows))
    return list(videos.values()), sorted(anywhere)


def _row(row: Mapping[str, Any] | str) -> dict[str, str]:
    given = {"text": row} if isinstance(row, str) else row
    return {key: normalise(str(given.get(key) or "")) for key in ("text", "video", "scene")}


def _places(texts: list[str]) -> dict[str, int]:
    return {text: place for place, text in enumerate(texts)}


def described(encoder: TextEncoder) -> dict[str, Any]:
    """What a vocabulary and a model keep of the encoder that they fit."""
    return {"name": encoder.name, "width": encoder.text_width, "fingerprint": encoder.text_fingerprint}


def _show(encoder: Mapping[str, Any]) -> str:
    return f"{encoder['name']!r} (width {encoder['width']}, fingerprint {encoder['fingerprint']})"
