"""Searches among many distractors, and vocabularies that lack places: what VLog's index and its upgrade are worth."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.core.paths import atomic_file
from gossamer.experiments.architectures._vlog_data import Told, asked, encoder, videos
from gossamer.experiments.lab import Lab
from gossamer.hub.nursery.narrator import vocabulary_rows
from gossamer.hub.worlds.events import HELD_OUT_SCENES, narrations
from gossamer.parts.narration import QUERIES, Narrator, calibrate, propose
from gossamer.parts.narration_index import Candidates, NarrationIndex, Video

VERBS = (
    "polish tune carry count sort wrap shake empty fill lock load scan clean dust cover press bend twist split grind "
    "boil steam grill toast chop blend taste pour drain strain freeze warm lace button patch sew knit weave dye brush "
    "comb cut wash feed walk train groom milk shear saddle row sail anchor launch rig patrol check test charge solder "
    "wire print copy bind frame draw sketch erase mount"
)
THINGS = (
    "violin piano drum trumpet guitar flute lamp candle mirror carpet curtain pillow blanket basket barrel bottle jar "
    "kettle spoon fork plate cup glass carrot onion apple pear plum cherry lemon melon pumpkin cheese butter egg soup "
    "rice noodle salad pie horse goat sheep cow dog cat parrot rabbit duck goose boat raft kayak oar net rope anchor "
    "tent stove torch map compass camera tripod lens screen printer radio cable battery motor pump valve pipe hose "
    "ladder bucket brick tile stone fence gate hinge hook nail screw bolt statue poster globe atlas ticket coin medal"
)
KINDS = "small large old new red blue green yellow heavy light broken clean"
PLACES = (
    "concert hall|music school|museum|harbour|ship deck|farm yard|stable|pet shop|restaurant|canteen|camp site|"
    "photo studio|print shop|radio station|building site|roof|cellar|attic|nursery|classroom|laboratory|hospital|"
    "pharmacy|theatre|gym|swimming pool|airport|train station|fire station|market|bank|post van|cinema|zoo|orchard|"
    "vineyard|forest hut|lighthouse|factory hall|power plant|tailor shop|shoe shop|barber shop|bookshop|library|"
    "hotel room|reception|parking deck|subway|bridge"
)
PER_VIDEO = 20  # prefixes of a distractor video


def searches(model: Any, processor: Any, seed: int, lab: Lab) -> dict[str, float]:
    """Prefix R@1 and milliseconds a clip of each search over vocabularies grown with distractors of other places."""
    told = videos("test", lab.quick)
    clips = [features for features, _ in asked(told, "current")]
    truth = [clip.prefix for _, clip in asked(told, "current")]
    figures: dict[str, float] = {}
    for size in (1_000, 2_000) if lab.quick else (10_000, 100_000):
        index = grown(size, seed, lab)
        narrator = Narrator(model, processor, index)
        queries = _embedded(narrator, clips, QUERIES["current"][0])
        scenes = [narrator.scene(features).among for _, features in told]
        sizes = [len(video.clips) for video, _ in told]
        rng = random.Random(seed)
        subsets = [_random_videos(index, rng, 10) for _ in told]
        ways: dict[str, Any] = {
            "brute": functools.partial(_search, index, None, "brute"),
            "ann": functools.partial(_search, index, None, "ann"),
            "hierarchical": functools.partial(_search, index, scenes, "brute"),
            "random": functools.partial(_search, index, subsets, "brute"),
        }
        index.search(queries[:1], method="ann")  # builds its file
        for name, (answers, spent) in _alternating(ways, queries, sizes).items():
            right = [text == wanted for text, wanted in zip(answers, truth, strict=True)]
            figures[f"{name}_{size}_r1"] = 100 * sum(right) / len(right)
            figures[f"{name}_{size}_ms"] = 1000 * spent / len(right)
    return figures


def grown(size: int, seed: int, lab: Lab) -> NarrationIndex:
    """The reference videos of training among those of other places, ``size`` prefixes in all.

    Up to 20,000 distractors are encoded; beyond that a vector is the mean of two encoded ones plus noise.
    """
    index = NarrationIndex.build(vocabulary_rows(video for video, _ in videos("train", lab.quick)), encoder())
    texts = [f"{v} the {k} {t}" for v, k, t in itertools.product(VERBS.split(), KINDS.split(), THINGS.split())]
    random.Random(0).shuffle(texts)
    texts = texts[: size - len(index.prefixes)]
    known = _distractors(texts[: 400 if lab.quick else 20_000], lab)
    extra = len(texts) - len(known)
    draw = torch.Generator().manual_seed(0)
    pairs = torch.randint(0, len(known), (2, max(0, extra)), generator=draw)
    mixed = (known[pairs[0]] + known[pairs[1]]) / 2 + 0.01 * torch.randn(max(0, extra), known.shape[1], generator=draw)
    vectors = torch.cat([index.prefix_vectors, known, mixed])[: len(index.prefixes) + len(texts)]
    own, first = index.videos, len(index.prefixes)
    places = PLACES.split("|")
    foreign = [
        Video(f"{places[number % len(places)]} {number}", places[number % len(places)], list(range(start, stop)))
        for number, (start, stop) in enumerate(_stretches(first, first + len(texts)))
    ]
    return NarrationIndex(
        index.encoder,
        [*index.prefixes, *texts],
        vectors,
        index.postfixes,
        index.postfix_vectors,
        [*index.scenes, *places],
        torch.cat([index.scene_vectors, encoder().texts(places)]),
        [*foreign, *own],
    )


def upgrades(model: Any, processor: Any, seed: int, lab: Lab) -> dict[str, float]:
    """Places left out of the vocabulary: whether their clips are noticed, and recall before and after additions.

    "unlisted": two places that training knows, left out of the vocabulary; "unseen": two that training does not know.
    """
    known, unlisted = _split_places(seed)
    rows = [row for row in vocabulary_rows(video for video, _ in videos("train", lab.quick)) if row["scene"] in known]
    told = {
        "calibration": _of(videos("validation", lab.quick), known),
        "known": _of(videos("test", lab.quick), known),
        "unlisted": _of(videos("test", lab.quick), unlisted),
        "unseen": videos("held_out", lab.quick),
    }
    plain = NarrationIndex.build(rows, encoder())
    scores = {name: _scores(model, processor, plain, some) for name, some in told.items()}
    cut = calibrate(scores["calibration"])
    figures = {"threshold": cut, "known_r1": _recall(model, processor, plain, told["known"])}
    figures["known_marked"] = 100 * statistics.fmean(score < cut for score in scores["known"])
    for name, places in (("unlisted", unlisted), ("unseen", HELD_OUT_SCENES)):
        figures[f"{name}_auroc"] = _auroc(scores[name], scores["known"])
        figures[f"{name}_marked"] = 100 * statistics.fmean(score < cut for score in scores[name])
        figures[f"{name}_marked_at_0.4"] = 100 * statistics.fmean(score < 0.4 for score in scores[name])
        figures[f"{name}_before_r1"] = _recall(model, processor, plain, told[name])
        oracle, proposed = (NarrationIndex.build(rows, encoder()) for _ in range(2))
        start = time.perf_counter()
        for place in places:
            oracle.add(_events(place), encoder(), scene=place)
        figures[f"{name}_add_seconds"] = time.perf_counter() - start
        listed = _proposals(places, lab)
        for place in places:
            proposed.add(listed[place], encoder(), scene=place)
        wanted = {text for place in places for text in _events(place)}
        given = {text for place in places for text in listed[place]}
        figures[f"{name}_proposals"] = float(len(given))
        figures[f"{name}_proposals_exact"] = float(len(wanted & given))
        figures[f"{name}_proposed_r1"] = _recall(model, processor, proposed, told[name])
        figures[f"{name}_oracle_r1"] = _recall(model, processor, oracle, told[name])
        figures[f"{name}_oracle_scene_r1"] = _scene_recall(model, processor, oracle, told[name])
        figures[f"{name}_known_after_r1"] = _recall(model, processor, oracle, told["known"])
    return figures


def _proposals(places: Any, lab: Lab) -> dict[str, list[str]]:
    """Actions that Gemma-3-270M lists for the place's name; a sentence with that name stands for an image model."""

    def make() -> dict[str, list[str]]:
        from gossamer.hub.models import load_model

        loaded: tuple[Any, Any] = load_model("gemma-3-270m", dtype="bfloat16")
        model, tokenizer = loaded

        def complete(prompt: str) -> str:
            ids = dict(tokenizer(prompt, return_tensors="pt"))
            new = model.generate(**ids, max_new_tokens=8 if lab.quick else 60, do_sample=False)[
                0, ids["input_ids"].shape[1] :
            ]
            return str(tokenizer.decode(new, skip_special_tokens=True))

        listed = {}
        for place in sorted({*narrations_by_place(), *HELD_OUT_SCENES}):
            listed[place] = propose(None, functools.partial(_stand_in, place), complete)[1]
        return listed

    found = lab.once("proposals", make)
    return {place: found[place] for place in places}


def _stand_in(place: str, image: Any) -> str:
    """For an image model, which would have to see it."""
    return f"A person is working in a {place}."


def narrations_by_place() -> dict[str, list[str]]:
    from gossamer.hub.worlds.events import SCENES

    return {place: narrations([place]) for place in SCENES}


def _events(place: str) -> list[str]:
    """The bare events of a place, without postfixes."""
    from gossamer.parts.narration_pairs import narration_pairs

    return narration_pairs(narrations([place])).prefixes


def _split_places(seed: int) -> tuple[list[str], list[str]]:
    names = sorted(narrations_by_place())
    out = [names[(2 * seed) % len(names)], names[(2 * seed + 1) % len(names)]]
    return [name for name in names if name not in out], out


def _of(told: list[Told], places: list[str]) -> list[Told]:
    return [(video, features) for video, features in told if video.scene in places]


def _embedded(narrator: Narrator, clips: list[Tensor], question: str) -> Tensor:
    parts = [clips[start : start + 64] for start in range(0, len(clips), 64)]
    return torch.cat([narrator._embed(part, [question] * len(part)) for part in parts])


def _found(model: Any, processor: Any, index: NarrationIndex, told: list[Told]) -> list[tuple[float, str, str, str]]:
    """(score, prefix found, prefix wanted, scene found) of every clip."""
    narrator = Narrator(model, processor, index, use_postfix=False)
    rows = []
    for video, features in told:
        scene = narrator.scene(features)
        clips = [features[2 * place : 2 * place + 2] for place in range(len(video.clips))]
        for row, clip in zip(narrator.narrate(clips, scene), video.clips, strict=True):
            rows.append((row.score, row.prefix, clip.prefix, row.scene or ""))
    return rows


def _scores(model: Any, processor: Any, index: NarrationIndex, told: list[Told]) -> list[float]:
    return [score for score, *_ in _found(model, processor, index, told)]


def _recall(model: Any, processor: Any, index: NarrationIndex, told: list[Told]) -> float:
    return 100 * statistics.fmean(found == wanted for _, found, wanted, _ in _found(model, processor, index, told))


def _scene_recall(model: Any, processor: Any, index: NarrationIndex, told: list[Told]) -> float:
    narrator = Narrator(model, processor, index)
    hits = [(narrator.scene(features).hit, video.scene) for video, features in told]
    return 100 * statistics.fmean(hit is not None and hit.text == scene for hit, scene in hits)


def _auroc(out: list[float], known: list[float]) -> float:
    """How often a clip from outside scores below one from inside, in per cent; ties count half."""
    a, b = torch.tensor(out)[:, None], torch.tensor(known)[None]
    return 100 * float((a < b).float().mean() + 0.5 * (a == b).float().mean())


def _search(
    index: NarrationIndex, among: Sequence[Candidates | None] | None, method: str, part: Tensor, place: int
) -> Any:
    return index.search(part, among=among[place] if among else None, method=method)


def _random_videos(index: NarrationIndex, rng: random.Random, count: int) -> Candidates:
    rows = index.rows_of(rng.sample(range(len(index.videos)), min(count, len(index.videos))))
    return Candidates(rows.tolist(), index.prefix_vectors[rows] / index.prefix_vectors[rows].norm(dim=1, keepdim=True))


def _stretches(start: int, stop: int) -> list[tuple[int, int]]:
    return [(place, min(place + PER_VIDEO, stop)) for place in range(start, stop, PER_VIDEO)]


def _alternating(ways: dict[str, Any], queries: Tensor, sizes: list[int]) -> dict[str, tuple[list[str], float]]:
    """Answers and seconds of each way; all ways take turns, video by video, the clips of a video as one batch."""
    answers: dict[str, list[str]] = {name: [] for name in ways}
    spent = dict.fromkeys(ways, 0.0)
    for repeat in range(2):  # the first round warms up
        for place, part in enumerate(queries.split(sizes)):
            for name, way in ways.items():
                start = time.perf_counter()
                hits = way(part, place)
                spent[name] += (time.perf_counter() - start) * repeat
                if repeat:
                    answers[name] += [found[0].text for found in hits]
    return {name: (answers[name], spent[name]) for name in ways}


def _distractors(texts: list[str], lab: Lab) -> Tensor:
    path = lab.folder() / f"distractors-{len(texts)}-{encoder().text_fingerprint}.safetensors"
    if not path.exists():
        lab.log(f"encoding {len(texts)} distractors")
        with atomic_file(path) as temporary:
            save_file({"vectors": encoder().texts(texts)}, temporary)
    return load_file(path)["vectors"]
