"""Narrate: a video file becomes a timed log of what happens, by retrieval from a vocabulary of narrations.

    frames at ``fps``  ->  clips of ``clip`` seconds  ->  features v (frozen image encoder)
    scene query on at most ``max_frames`` frames, evenly spaced over the whole video -> candidate prefixes, once
    per clip: query -> prefix p, and query + p -> postfix s, both by argmax of cos(t, o) with one forward pass each
    row = (start, end, scene, p, s, score);  known where score >= threshold, else marked out of vocabulary

The model is a retrieval narrator (VLog, arXiv 2503.09402), the vocabulary a folder that ``gossamer vocab`` makes. The
threshold is calibrated: a low quantile of the scores of clips whose narration the vocabulary holds.

Memory does not depend on the length of the video: features lie on disk, block by block, until all is narrated, and a
run that was cut off goes on from there (:mod:`gossamer.applications.narrate.watching`). Only the rows themselves and at
most 150 key frames are held. Two passes are made because the scene needs the whole video; with ``scene`` given, clips
are narrated as they are watched.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gossamer.applications.narrate.result import Narration, Row, clock, key_rows
from gossamer.applications.narrate.vocabulary import Upgrade, upgrade
from gossamer.applications.narrate.watching import Block, Cut, Work, cut_video
from gossamer.core.card import Card
from gossamer.core.errors import InputError, did_you_mean
from gossamer.core.options import Config, option
from gossamer.kinds.applications import Application
from gossamer.parts.fingerprint import fingerprint
from gossamer.parts.narration import QUERIES, Narrator, Scene, calibrate, narrate_features, read_clips
from gossamer.parts.narration_index import NarrationIndex
from gossamer.parts.video import probe_video

CARD = Card(
    title="Narrate",
    claim="narrates an hour of video in the memory of a minute, marks what its vocabulary does not hold",
    modality=("video", "text"),
    extras=("video", "minilm"),
    builtin=True,
)
SAMPLE = "narrator"
ROW = '{"video": path, "narrations": [[start, end, text], ...], "scene": text} or {"text": narration, "scene": text}'
OnRow = Callable[[Row], None]
OnProgress = Callable[[str, int, int], None]


class NarrateConfig(Config):
    model: str = option("narrator", "a trained narrator: name or folder", effect="report")
    vocab: str | None = option(None, "vocabulary folder; None takes the one that lies with the model", effect="report")
    query: str = option("current", "what is asked of each clip: current, next, previous, or a question")
    scene: str | None = option(None, "the scene where it is known, e.g. kitchen; None finds it")
    fps: float = option(2.0, "frames a second that are looked at", gt=0, le=60)
    clip: float = option(1.0, "seconds of a clip", gt=0)
    start: float = option(0.0, "second of the video where the first clip starts", ge=0)
    end: float | None = option(None, "second where the last clip ends; None is the end of the video", gt=0)
    search: str = option("hierarchical", "what is searched", choices=("hierarchical", "brute", "ann"))
    top_scenes: int = option(10, "reference videos whose prefixes are searched", ge=1)
    use_postfix: bool = option(True, "ask for a postfix too")
    threshold: float | None = option(None, "score below which a clip is out of vocabulary; None as calibrated")


class Narrate(Application):
    """``apply(path) -> Narration``. Without ``fit`` it uses the vocabulary of the options."""

    config_class = NarrateConfig
    config: NarrateConfig
    _vocabulary: NarrationIndex | None = None

    @property
    def model(self) -> Any:
        """The narrator's weights; nothing here changes them."""
        return _loaded(self.config.model)[0]

    @property
    def processor(self) -> Any:
        return _loaded(self.config.model)[1]

    @property
    def encoder(self) -> Any:
        """The frozen image and text encoders that the narrator was trained with."""
        return self.processor.encoder

    @property
    def vocabulary(self) -> NarrationIndex:
        """What :meth:`fit` built, else the folder of the option ``vocab``, else the one beside the model."""
        if self._vocabulary is None:
            folder = Path(self.config.vocab) if self.config.vocab else _own_vocabulary(self.config.model)
            self._vocabulary = NarrationIndex.load(folder, self.processor.text_encoder or self.encoder)
        return self._vocabulary

    @property
    def threshold(self) -> float:
        """Of the option, else the vocabulary's (see :meth:`fit`), else the model's own; -1 (all known) without any."""
        found = (self.config.threshold, self.vocabulary.threshold, getattr(self.model.config, "oov_threshold", None))
        return next((float(value) for value in found if value is not None), -1.0)

    def fit(self, data: Iterable[Mapping[str, Any]]) -> Narrate:
        """Build the vocabulary from narrated rows, and calibrate the threshold on those that have a video.

        Rows as in :data:`ROW`. The threshold is the 5th percentile of the scores of their clips, so the videos should
        be ones that the model was not trained on; without videos the model's own threshold stays.
        """
        rows = list(data)
        texts: list[dict[str, str]] = []
        for number, row in enumerate(rows):
            texts += _narrations(row, f"narrate.fit: row {number}")
        if not texts:
            raise InputError("narrate.fit", must="get at least one narration", got="none", do=f"give rows {ROW}")
        self._vocabulary = NarrationIndex.build(texts, self.encoder)
        scores: list[float] = []
        for row in rows:
            if "narrations" in row and "video" in row:
                spans = [(clip.start, clip.end) for clip in read_clips(row, "narrate.fit")]
                found = narrate_features(
                    self.model, self.processor, self._vocabulary, self.processor.features(row["video"]), spans
                )
                scores += [one.score for one in found]
        self._vocabulary.threshold = calibrate(scores) if scores else None
        return self

    def check(self, inputs: Any, **_: Any) -> None:
        if not isinstance(inputs, str | Path):
            got = type(inputs).__name__
            raise InputError("narrate.apply", must="get the path of a video", got=got, do="give an mp4, webm or mkv")

    def apply(
        self, inputs: str | Path, *, on_row: OnRow | None = None, on_progress: OnProgress | None = None
    ) -> Narration:
        """Narrate the video file ``inputs``. ``on_row`` is called with each row as it is found, in order;
        ``on_progress`` with what is done ("watching", "narrating"), how many clips, and of how many.

        A file that is cut off is narrated as far as it decodes; ``stopped`` says where that is. Raises InputError for
        what is no video, an interval outside it, a query that is too long, a vocabulary of another encoder.
        """
        with self._open(Path(inputs)) as (work, cut, narrator, seconds):
            rows, scene = _narrate(work, cut, narrator, self._scene(narrator), on_row, on_progress)
            frames = work.pictures(key_rows(rows))
            stopped = work.stopped
            work.clear()
        notes: tuple[str, ...] = ()
        if stopped is not None:
            notes = (f"the file breaks off at {clock(stopped)} of {clock(seconds)}; what comes before is narrated",)
        return Narration(
            video=Path(inputs).name,
            seconds=seconds,
            rows=rows,
            scene=_scene_name(scene, self.threshold),
            model=self.config.model,
            vocabulary=self.config.vocab or f"of {self.config.model}",
            threshold=self.threshold,
            query="" if self.config.query == "current" else narrator.question,
            scenes=tuple(self.vocabulary.scenes),
            stopped=stopped,
            notes=notes,
            frames=frames,
        )

    def upgrade(
        self,
        inputs: str | Path,
        describe: Callable[[Any], str],
        list_actions: Callable[[str], str],
        *,
        calls: int = 50,
        note: Callable[[str], None] = lambda text: None,
    ) -> Upgrade:
        """Add to :attr:`vocabulary` what is proposed for clips that are out of it; at most ``calls`` are asked about.

        ``describe`` gives one sentence for a picture, ``list_actions`` continues a prompt with actions separated by ;.
        """
        self.check(inputs)
        with self._open(Path(inputs)) as (work, cut, narrator, _):
            rows, _ = _narrate(work, cut, narrator, self._scene(narrator), None, None)

            def picture(number: int) -> Image.Image:
                return Image.open(io.BytesIO(work.pictures([number])[number]))

            def still_unknown(numbers: Sequence[int]) -> list[int]:
                if not numbers:
                    return []
                scene = self._scene(narrator) or _whole(work, cut, narrator)
                clips = work.clips(cut, numbers)
                found = narrator.narrate([clips[number] for number in numbers], scene)
                return [number for number, one in zip(numbers, found, strict=True) if not one.known]

            unknown = [number for number, row in enumerate(rows) if not row.known]
            functions = picture, still_unknown, describe, list_actions
            made = upgrade(self.vocabulary, self.encoder, len(rows), unknown, *functions, calls=calls, note=note)
            work.clear()
        return made

    def example(self, folder: Path) -> tuple[list[dict[str, Any]], Path]:
        """A few seconds of the sample world with what is done in them, and that video."""
        from gossamer.hub.worlds.events import event_videos
        from gossamer.parts.video import write_video

        video = event_videos("test", 1)[0]
        clips = [clip for clip in video.clips if clip.end <= 6.0]
        frames = itertools.islice(video.frames(fps=4.0, size=(112, 112)), round(4 * clips[-1].end))
        path = write_video(folder / "sample.mp4", frames, 4.0)
        narrations = [[clip.start, clip.end, clip.narration] for clip in clips]
        # without the bare prefixes nothing would be a postfix; the first video of the scene has other doings
        texts = [{"text": clip.prefix, "scene": video.scene, "video": str(path)} for clip in clips]
        earlier = {"text": "peel a mango slowly", "scene": video.scene, "video": "earlier"}
        other = {"text": "pick an apple", "scene": "orchard"}
        return [earlier, {"video": str(path), "narrations": narrations, "scene": video.scene}, *texts, other], path

    @contextlib.contextmanager
    def _open(self, video: Path) -> Iterator[tuple[Work, Cut, Narrator, float]]:
        """Everything that narrating a file needs, its work folder locked."""
        info = probe_video(video)
        config = self.config
        cut = cut_video(info, start=config.start, end=config.end, clip=config.clip, fps=config.fps)
        narrator = Narrator(
            self.model,
            self.processor,
            self.vocabulary,
            query=_known_query(config.query),
            search=config.search,
            top_scenes=config.top_scenes,
            use_postfix=config.use_postfix,
            threshold=self.threshold,
        )
        # a query that is too long is refused before anything is watched
        self.processor.inputs([torch.zeros(1, self.encoder.image_width)], [narrator.question])
        facts = {
            **config.as_dict(),
            "model": fingerprint(self.model),
            "vocab": _digest(self.vocabulary),
            "encoder": self.encoder.fingerprint,
            "threshold": self.threshold,
        }
        with Work(video, facts, self.encoder.images) as work:
            yield work, cut, narrator, info.seconds

    def _scene(self, narrator: Narrator) -> Scene | None:
        """The scene of the option; None where it is to be found."""
        name = self.config.scene
        if name is None:
            return None
        index = narrator.index
        given = {scene.lower(): scene for scene in index.scenes}.get(name.lower())
        if given is None:
            do = did_you_mean(name, index.scenes)
            raise InputError(f"scene {name!r}", must="be a scene of the vocabulary", do=do)
        vector = self.encoder.texts([given])[0]
        videos = sum(video.scene == given for video in index.videos)
        among = index.candidates(vector, videos) if self.config.search == "hierarchical" else None
        return Scene(index.scene(vector), among)


def _narrate(
    work: Work, cut: Cut, narrator: Narrator, scene: Scene | None, on_row: OnRow | None, on_progress: OnProgress | None
) -> tuple[list[Row], Scene]:
    """All rows, and the scene they were searched under."""
    if scene is None:
        scene = _whole(work, cut, narrator, on_progress)
    rows: list[Row] = []
    name = _scene_name(scene, narrator.threshold)
    for block in work.blocks(cut):
        found = work.rows(block.number)
        if found is None:
            found = _rows(block, narrator, scene, name)
            work.keep_rows(block.number, found)
        rows += found
        for row in found if on_row is not None else ():
            on_row(row)  # type: ignore[misc]
        if on_progress is not None:
            on_progress("narrating", len(rows), cut.clips)
    if not rows:
        raise InputError(str(work.video), must="hold at least one frame in the seconds asked for", got="none")
    return rows, scene


def _whole(work: Work, cut: Cut, narrator: Narrator, on_progress: OnProgress | None = None) -> Scene:
    """The scene, after all of the video has been watched."""
    blocks = clips = 0
    for block in work.blocks(cut):
        blocks, clips = blocks + 1, clips + len(block.spans)
        if on_progress is not None:
            on_progress("watching", clips, cut.clips)
    if not blocks:
        raise InputError(str(work.video), must="hold at least one frame in the seconds asked for", got="none")
    return narrator.scene(work.sample(blocks, narrator.model.config.max_frames))


def _rows(block: Block, narrator: Narrator, scene: Scene, name: str) -> list[Row]:
    found = narrator.narrate(block.clips(), scene)
    return [
        Row(start, end, name, one.prefix, one.postfix, one.score, one.known)
        for (start, end), one in zip(block.spans, found, strict=True)
    ]


def _scene_name(scene: Scene, threshold: float | None) -> str:
    """The scene's text; empty where it is as far off as an unknown clip."""
    if scene.hit is None or (threshold is not None and scene.hit.score < threshold):
        return ""
    return scene.hit.text


def _narrations(row: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(row, Mapping) or not ("narrations" in row or isinstance(row.get("text"), str)):
        raise InputError(where, must=f"be {ROW}", got=repr(row)[:80])
    scene, video = str(row.get("scene") or ""), str(row.get("video") or "")
    texts = [clip.text for clip in read_clips(row, where)] if "narrations" in row else [row["text"]]
    return [{"text": text, "scene": scene, "video": video} for text in texts]


def _known_query(query: str) -> str:
    """A question that the model was trained on, where it is one but for capitals and stops."""
    if query in QUERIES:
        return query
    if not query.strip():
        raise InputError("narrate.query", must="be a question, or one of " + ", ".join(QUERIES), got=repr(query))
    known = {_plain(way): way for ways in QUERIES.values() for way in ways}
    return known.get(_plain(query), query)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip("?!. ")


@functools.lru_cache(maxsize=2)
def _loaded(name: str) -> tuple[Any, Any]:
    from gossamer.hub.models import load_model

    model, processor = load_model(_model_folder(name), dtype="float32")
    if not hasattr(model, "embed") or not hasattr(processor, "inputs") or model.config.method == "generative":
        must, do = "be a narrator that retrieves", "train one: gossamer run recipes/vlog.yaml"
        raise InputError(f"model {name}", must=must, got=type(model).__name__, do=do)
    return model, processor


def _model_folder(name: str) -> str:
    """``name`` itself, or the model inside the folder of a run."""
    for inside in ("result/model", "model"):
        if (Path(name) / inside / "config.json").is_file():
            return str(Path(name) / inside)
    return name


def _own_vocabulary(model: str) -> Path:
    from gossamer.hub.models import resolve

    folder = resolve(_model_folder(model)).path
    found = sorted([*folder.glob("*.vocab"), *Path(model).glob("*.vocab")])  # beside the model, or in its run
    if not found:
        do = "give --vocab; `gossamer vocab build NARRATIONS --out NAME.vocab` makes one"
        raise InputError(f"model {model}", must="have a vocabulary beside it where none is given", got="none", do=do)
    return found[0]


def _digest(index: NarrationIndex) -> str:
    content = [index.encoder["fingerprint"], index.prefixes, index.postfixes, index.scenes, index.anywhere]
    videos = [[video.scene, video.rows] for video in index.videos]
    return hashlib.sha256(json.dumps([content, videos]).encode()).hexdigest()[:16]
