"""From a narrated video to training questions, and from a trained retrieval model to a narrated video.

One model answers in a chain, each time with one forward pass and one search (VLog, arXiv 2503.09402):

    (i)   scene query, whole video         -> reference videos -> candidate prefixes     once a video
    (ii)  task query, clip                 -> prefix p         argmax over the candidates
    (iii) task query + " " + p, clip       -> postfix s        argmax over all postfixes, the empty one among them

The paper does not say when there is no postfix; here "no postfix" is a trained class, and a threshold on the best
postfix's score may forbid one as well. A clip whose best prefix scores below the calibrated threshold is marked out of
vocabulary: cosines do not carry over from model to model, so the threshold is a quantile of scores on clips whose
narrations are known to be in the vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import InputError, OptionError, did_you_mean
from gossamer.parts.narration_index import Candidates, Hit, NarrationIndex
from gossamer.parts.narration_pairs import NarrationPairs, join, normalise

QUERIES: dict[str, tuple[str, ...]] = {
    "current": ("What is the action in the video?", "What is happening?", "What happens here?", "Describe the action."),
    "next": (
        "What is the next action in the video?",
        "What happens next?",
        "What will be done next?",
        "What comes after this?",
    ),
    "previous": (
        "What is the previous action in the video?",
        "What happened before?",
        "What was done before this?",
        "What came before?",
    ),
    "scene": ("What is the overall activity in the video?", "What is going on overall?", "Where does this happen?"),
}
SEARCHES = ("hierarchical", "brute", "ann")


@dataclass(frozen=True)
class Clip:
    """A stretch of a video in seconds with what is done in it."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Narrated:
    """What was found for a clip; ``text`` is prefix and postfix, ``others`` the next best prefixes."""

    prefix: str
    postfix: str
    score: float
    postfix_score: float | None
    known: bool
    scene: str | None
    others: tuple[Hit, ...] = ()

    @property
    def text(self) -> str:
        return join(self.prefix, self.postfix)


@dataclass(frozen=True)
class Scene:
    """What a scene query found: the nearest scene text and the prefixes that are searched (None: all)."""

    hit: Hit | None = None
    among: Candidates | None = None


@dataclass
class Narrator:
    """A retrieval model with its processor and vocabulary; ``query`` is a key of :data:`QUERIES` or any question.

    The model gives ``embed(**batch) -> [n, d]`` and has thresholds in its config; the processor gives
    ``inputs(features, questions) -> batch``. ``threshold`` overrides the model's own.
    """

    model: Any
    processor: Any
    index: NarrationIndex
    query: str = "current"
    search: str = "hierarchical"
    top_scenes: int = 10
    use_postfix: bool = True
    threshold: float | None = None
    batch_size: int = 32
    others: int = 0
    question: str = field(init=False)

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            hint = did_you_mean(self.search, SEARCHES)
            raise OptionError("narrate.search", must=f"be one of {SEARCHES}", got=repr(self.search), do=hint)
        described = getattr(self.processor, "text_encoder", None)
        if described:
            self.index.check(described)
        self.question = QUERIES[self.query][0] if self.query in QUERIES else self.query
        if self.threshold is None:
            self.threshold = getattr(self.model.config, "oov_threshold", None)

    def scene(self, features: Tensor) -> Scene:
        """From the features [t, d] of a whole video, or of frames spread over it."""
        query = self._embed([features], [QUERIES["scene"][0]])[0]
        among = self.index.candidates(query, self.top_scenes) if self.search == "hierarchical" else None
        return Scene(self.index.scene(query), among)

    def narrate(self, clips: Sequence[Tensor], scene: Scene | None = None) -> list[Narrated]:
        """For the features [t_i, d] of each clip; ``scene`` is that of their video."""
        scene = scene or Scene()
        method = "ann" if self.search == "ann" else "brute"
        found: list[Narrated] = []
        for start in range(0, len(clips), self.batch_size):
            batch = clips[start : start + self.batch_size]
            vectors, kept = self._ask(batch)
            hits = self.index.search(vectors, 1 + self.others, among=scene.among, method=method)
            ends: list[Hit | None] = [None] * len(batch)
            if self.use_postfix and len(self.index.postfixes) > 1:
                longer = self._ask_on(kept, batch, [ranked[0].text for ranked in hits])
                ends = [ranked[0] for ranked in self.index.search_postfixes(longer)]
            found += [self._narrated(ranked, end, scene) for ranked, end in zip(hits, ends, strict=True)]
        return found

    def _narrated(self, ranked: list[Hit], end: Hit | None, scene: Scene) -> Narrated:
        least = getattr(self.model.config, "postfix_threshold", None)
        postfix = "" if end is None or (least is not None and end.score < least) else end.text
        return Narrated(
            prefix=ranked[0].text,
            postfix=postfix,
            score=ranked[0].score,
            postfix_score=None if end is None else end.score,
            known=self.threshold is None or ranked[0].score >= self.threshold,
            scene=scene.hit.text if scene.hit else None,
            others=tuple(ranked[1:]),
        )

    @torch.no_grad()
    def _ask(self, clips: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Vectors [n, d] for the question, and what spares :meth:`_ask_on` to read clips and question again."""
        questions = [self.question] * len(clips)
        keeps = self.use_postfix and getattr(self.model.config, "method", "") == "vlog"
        if not keeps or not hasattr(self.model, "embed_keeping"):
            return self._embed(clips, questions), None
        batch = self.processor.inputs(clips, questions)
        vectors, kept = self.model.embed_keeping(**{name: value.to(self.model.device) for name, value in batch.items()})
        return vectors.cpu(), kept

    @torch.no_grad()
    def _ask_on(self, kept: Any, clips: Sequence[Tensor], prefixes: Sequence[str]) -> Tensor:
        """Vectors [n, d] for the question with each clip's prefix after it."""
        more = None if kept is None else self.processor.continued(self.question, prefixes)
        if more is None:
            return self._embed(clips, [f"{self.question} {prefix}" for prefix in prefixes])
        return self.model.embed_on(kept, **{name: value.to(self.model.device) for name, value in more.items()}).cpu()

    @torch.no_grad()
    def _embed(self, features: Sequence[Tensor], questions: Sequence[str]) -> Tensor:
        batch = self.processor.inputs(features, questions)
        return self.model.embed(**{name: tensor.to(self.model.device) for name, tensor in batch.items()}).cpu()


def narrate_features(
    model: Any,
    processor: Any,
    index: NarrationIndex,
    features: Tensor,
    clips: Sequence[tuple[float, float]],
    **options: Any,
) -> list[Narrated]:
    """Narrate the ``clips`` (start, end in seconds) of a video with ``features`` [T, d]; options of Narrator."""
    narrator = Narrator(model, processor, index, **options)
    cut = [features[clip_rows(start, end, processor.fps, len(features))] for start, end in clips]
    return narrator.narrate(cut, narrator.scene(features))


def clip_rows(start: float, end: float, fps: float, frames: int) -> slice:
    """Feature rows of a clip: floor(start fps) up to ceil(end fps), at least one. InputError outside the video."""
    first = math.floor(start * fps + 1e-6)
    last = max(first + 1, math.ceil(end * fps - 1e-6))
    if not (0 <= start < end) or last > frames + 1 or first >= frames:
        raise InputError(
            f"clip {start:g} to {end:g} s",
            must=f"lie inside the video of {frames / fps:g} s and end after its start",
            do="look at the times of the narrations",
        )
    return slice(first, min(last, frames))


def calibrate(scores: Iterable[float], share: float = 0.05) -> float:
    """The score below which ``share`` of the clips with known narrations lie."""
    values = torch.tensor(list(scores), dtype=torch.float64)
    if not len(values):
        raise InputError("calibrate", must="get the scores of at least one clip", got="none")
    return float(torch.quantile(values, share))


def instructions(
    clips: Sequence[Clip],
    scene: str | None,
    *,
    pairs: NarrationPairs | None = None,
    relations: Sequence[str] = tuple(QUERIES),
    rng: random.Random | None = None,
) -> list[dict[str, Any]]:
    """Questions about a narrated video: rows ``context`` (start, end), ``question``, ``answer``, ``relation``.

    current: the clip itself; next: asked of the clip before; previous: asked of the clip after; scene: of the whole
    video. With ``pairs`` an answer is a prefix, and a second row asks for the postfix ("" for none), the prefix after
    the question. ``rng`` draws among the ways to ask; without it the first is taken.
    """
    rows: list[dict[str, Any]] = []
    ordered = sorted(clips, key=lambda clip: clip.start)
    for place, clip in enumerate(ordered):
        shown = {"current": clip}
        if place > 0:
            shown["next"] = ordered[place - 1]
        if place + 1 < len(ordered):
            shown["previous"] = ordered[place + 1]
        for relation, seen in shown.items():
            if relation not in relations:
                continue
            ways = QUERIES[relation]
            question = ways[0] if rng is None else rng.choice(ways)
            row = {"context": (seen.start, seen.end), "relation": relation, "narration": normalise(clip.text)}
            if pairs is None:
                rows.append({**row, "question": question, "answer": row["narration"]})
                continue
            prefix, postfix = pairs.encode(clip.text)
            rows.append({**row, "question": question, "answer": prefix, "part": "prefix"})
            rows.append({**row, "question": f"{question} {prefix}", "answer": postfix, "part": "postfix"})
    if scene and ordered and "scene" in relations:
        ways = QUERIES["scene"]
        whole = (ordered[0].start, ordered[-1].end)
        question = ways[0] if rng is None else rng.choice(ways)
        rows.append({"context": whole, "relation": "scene", "question": question, "answer": normalise(scene)})
    return rows


ACTIONS_PROMPT = """List possible short actions in the scene, each a verb and a noun, separated by ;

Scene: A person is cooking in a small kitchen.
Actions: wash potato; peel carrot; cut onion; open fridge; take pan; pour oil; stir soup; turn knob; wipe table; \
rinse cup; fill kettle; close drawer

Scene: Two people repair a bicycle in a garage.
Actions: remove wheel; hold frame; turn screw; oil chain; pump tire; take wrench; clean rim; fix brake; lift bicycle; \
check light

Scene: {scene}
Actions:"""
SCENE_PROMPT = "What is the overall activity in this picture? Answer in one brief sentence."


def propose(
    image: Any, describe: Callable[[Any], str], list_actions: Callable[[str], str], *, max_words: int = 5
) -> tuple[str, list[str]]:
    """What may be done in the scene of ``image``: its description, and short actions without repeats.

    ``describe`` (image -> text) answers :data:`SCENE_PROMPT`; ``list_actions`` (prompt -> text) continues
    :data:`ACTIONS_PROMPT`. Actions of more than ``max_words`` words are dropped. InputError where none is left.
    """
    scene = normalise(describe(image))
    answer = list_actions(ACTIONS_PROMPT.format(scene=scene)).split("\n\n")[0]
    parts = [normalise(part).lower().strip(" .") for part in answer.split(";")]
    actions = list(dict.fromkeys(part for part in parts if part and len(part.split()) <= max_words))
    if not scene or not actions:
        raise InputError(
            "vocabulary upgrade",
            must="get a scene and actions separated by ;",
            got=f"{scene!r} and {answer[:60]!r}",
            do="use larger models for the proposals, or add narrations yourself with `gossamer vocab add`",
        )
    return scene, actions


def read_clips(row: Mapping[str, Any], where: str) -> list[Clip]:
    """The ``narrations`` [[start, end, text], ...] of a row. InputError where they are something else."""
    try:
        clips = [Clip(float(start), float(end), str(text)) for start, end, text in row["narrations"]]
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"{where}: narrations", must="be a list of [start, end, text]", got=f"{type(error).__name__}: {error}"
        ) from error
    if not clips:
        raise InputError(f"{where}: narrations", must="hold at least one clip", got="none")
    return clips
