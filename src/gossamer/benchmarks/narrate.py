"""Narration: clips a second against writing token by token, search among 10^5 narrations, a video file, pair encoding.

Clips a second: the sample narrator against its own language model writing the same narrations, both in this process,
taking turns, medians over rounds. The writer has the narrator's weights, the untrained head that generation needs, and
is made to write as many tokens as the true narration has, and its end token; a batch goes on until its longest is done.
Its time does not depend on what it writes. Features and the vocabulary's vectors are there before the clock starts.
Both compute in bfloat16, as the weights are kept, and again in float32; the targets are bfloat16's, clip by clip.

Search: prefixes of the sample world among distractors, each embedded by the text encoder; hierarchical search counts
its scene search and the gathering of candidates, once a video. A file: 10 minutes at 360p, one process, from the
opening of the file to the last row, features included; peak memory beside that of one minute. Pair encoding: each size
in a process of its own, its list of narrations made before the clock starts.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.applications.narrate import Narrate
from gossamer.core.errors import GossamerError
from gossamer.core.paths import atomic_file, cache_dir
from gossamer.hub.worlds.events import EventVideo, event_videos, sample_video
from gossamer.parts.narration import Narrator
from gossamer.parts.narration_index import NarrationIndex, Video
from gossamer.parts.narration_pairs import narration_pairs

Log = Callable[[str], None]
Rows = list[dict[str, Any]]

_DEEDS = """
polish tune carry count sort wrap shake empty fill lock load scan clean dust cover press bend twist split
grind boil steam grill toast chop blend taste drain strain freeze warm lace button patch sew knit weave dye
brush comb feed walk groom milk shear saddle row sail launch rig patrol check test charge solder wire print
copy bind frame
"""
_KINDS = """
small large old new red blue green yellow heavy light broken clean wooden plastic round square empty full
borrowed painted
"""
_OBJECTS = """
violin piano drum trumpet guitar flute candle mirror carpet curtain pillow blanket barrel bottle jar kettle
spoon fork cup glass carrot onion apple pear plum cherry lemon melon pumpkin cheese butter egg rice noodle
salad pie horse goat sheep cow parrot rabbit duck goose boat raft kayak oar net rope tent stove torch map
compass camera tripod lens screen printer radio cable battery motor pump valve pipe hose ladder bucket brick
tile stone fence gate hinge hook nail bolt statue poster globe atlas ticket coin medal
"""
DEEDS, KINDS, OBJECTS = (tuple(words.split()) for words in (_DEEDS, _KINDS, _OBJECTS))
MANNERS = tuple(f"{how} the {what}" for how in ("on", "under", "behind", "near", "with") for what in OBJECTS[:18])


def run(quick: bool, log: Log) -> dict[str, Any]:
    """All four parts: their tables and targets."""
    tables, targets = [], []
    for part in (clips_a_second, search_among_many, a_video_file, pair_encoding):
        log(part.__doc__ or "")
        title, rows, met = part(quick, log)
        tables.append({"title": title, "rows": rows})
        targets += met
    return {"quick": quick, "threads": torch.get_num_threads(), "tables": tables, "targets": targets}


def clips_a_second(quick: bool, log: Log) -> tuple[str, Rows, Rows]:
    """Clips a second, retrieved and written."""
    narrate = Narrate()
    told = event_videos("test", 6 if quick else 24)
    rows: Rows = []
    targets: Rows = []
    for length, factor in (("short", 5), ("long", 10)):
        texts = [clip.words(length) for video in told for clip in video.clips]
        features = [clip for video in told for clip in _features(video, narrate.encoder)]
        index = NarrationIndex.build(_vocabulary(event_videos("train", 60), length), narrate.encoder)
        counts = [len(narrate.processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        for dtype, batch in itertools.product((torch.bfloat16, torch.float32), (1, 16)):
            model = copy.deepcopy(narrate.model).to(dtype)
            row = _speed(model, narrate.processor, index, features, counts, batch, quick)
            named = {"narrations": length, "mean tokens": statistics.fmean(counts), "in": str(dtype), "batch": batch}
            rows.append({**named, **row})
            log(json.dumps(rows[-1]))
        for name in ("prefix", "prefix + postfix"):
            ratio = rows[-4][f"{name}: times as fast"]
            text = (
                f"{length} narrations (mean {statistics.fmean(counts):.1f} tokens), {name}, clip by clip: times as fast"
            )
            targets.append(_target(text, ratio, f">= {factor}", ratio >= factor))
    return "Clips a second: retrieved in whole, and written token by token", rows, targets


def search_among_many(quick: bool, log: Log) -> tuple[str, Rows, Rows]:
    """Hierarchical search and brute force."""
    narrate = Narrate()
    size = 5_000 if quick else 100_000
    index = _grown(narrate, size, log)
    told = event_videos("test", 8 if quick else 40)
    ways = {name: Narrator(narrate.model, narrate.processor, index, search=name, use_postfix=False)
            for name in ("hierarchical", "brute", "ann")}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    right = dict.fromkeys(ways, 0)
    for round_, video in itertools.product(range(2), told):  # the first round warms up
        features = _features(video, narrate.encoder)
        scene = ways["brute"]._embed([torch.cat(features)], ["What is the overall activity in the video?"])[0]
        queries = ways["brute"]._embed(features, [ways["brute"].question] * len(features))
        for name in ways:
            start = time.perf_counter()
            among = index.candidates(scene) if name == "hierarchical" else None
            hits = index.search(queries, among=among, method="ann" if name == "ann" else "brute")
            if round_:
                seconds[name].append(time.perf_counter() - start)
                right[name] += sum(found[0].text == clip.prefix for found, clip in zip(hits, video.clips, strict=True))
    clips = sum(len(video.clips) for video in told)
    rows = [
        {"search": name, "narrations": len(index.prefixes), "ms a clip": 1000 * sum(seconds[name]) / clips,
         "R@1, %": 100 * right[name] / clips}
        for name in ways
    ]  # fmt: skip
    share = sum(seconds["hierarchical"]) / sum(seconds["brute"])
    lost = 100 * abs(right["hierarchical"] - right["brute"]) / clips
    return "Search", rows, [
        _target(f"hierarchical search among {size}: its time over brute force's", share, "< 0.1", share < 0.1),
        _target("its R@1 from brute force's, in points", lost, "<= 2", lost <= 2),
    ]  # fmt: skip


def a_video_file(quick: bool, log: Log) -> tuple[str, Rows, Rows]:
    """A file of 360p, narrated by one process."""
    minutes = (0.25, 0.5) if quick else (1.0, 10.0)
    rows: Rows = []
    for length in minutes:
        path = cache_dir("bench", "narrate") / f"kitchen-{length:g}-minutes.mp4"
        if not path.exists():
            log(f"rendering {length:g} minutes")
            sample_video(path, length, fps=25.0, scenes=("kitchen",))
        found = _child("_narrate_child", str(path))
        rows.append({"minutes of video": length, **found, "times real time": 60 * length / found["seconds"]})
        log(json.dumps(rows[-1]))
    grown = rows[1]["peak MB"] - rows[0]["peak MB"]
    speed = rows[1]["times real time"]
    return "A file of 640 x 360 at 25 frames a second, features included", rows, [
        _target(f"{minutes[1]:g} minutes of video: times real time", speed, "> 1", speed > 1),
        _target(f"peak memory at {minutes[1]:g} minutes beyond that at {minutes[0]:g}, MB", grown, "< 60", grown < 60),
    ]  # fmt: skip


def pair_encoding(quick: bool, log: Log) -> tuple[str, Rows, Rows]:
    """Narration pair encoding."""
    rows: Rows = []
    for count in (10**3, 10**4) if quick else (10**4, 10**5, 10**6):
        found = _child("_pairs_child", str(count))
        rows.append({"narrations": count, **found, "us a narration": 1e6 * found["seconds"] / count})
        log(json.dumps(rows[-1]))
    last = rows[-1]
    growth = last["us a narration"] / rows[-2]["us a narration"]
    return "Narration pair encoding", rows, [
        _target(f"seconds for {last['narrations']} narrations", last["seconds"], "< 60", last["seconds"] < 60),
        _target("peak memory of the process, GB", last["peak MB"] / 1000, "< 4", last["peak MB"] < 4000),
        _target("time a narration, last size over the one before", growth, "< 2", growth < 2),
    ]  # fmt: skip


def _speed(
    model: Any,
    processor: Any,
    index: NarrationIndex,
    features: list[Tensor],
    counts: list[int],
    batch: int,
    quick: bool,
) -> dict[str, float]:
    """Medians of clips a second of the three ways over the same clips, which take turns."""
    writer = _writer(model)
    short, whole = (Narrator(model, processor, index, use_postfix=both) for both in (False, True))
    scene = short.scene(torch.cat(features[:32]))
    parts = [slice(at, at + batch) for at in range(0, len(features) - batch + 1, batch)][: 4 if quick else 24]

    def written(part: slice) -> None:
        inputs = processor.inputs(features[part], [short.question] * batch)
        tokens = 1 + max(counts[part])
        writer.write(**inputs, max_new_tokens=tokens, min_new_tokens=tokens)

    ways: dict[str, Callable[[slice], Any]] = {
        "prefix": lambda part: short.narrate(features[part], scene),
        "prefix + postfix": lambda part: whole.narrate(features[part], scene),
        "written": written,
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(1 + (1 if quick else 5)):
        spent = dict.fromkeys(ways, 0.0)
        for part in parts:
            for name, way in ways.items():
                start = time.perf_counter()
                way(part)
                spent[name] += time.perf_counter() - start
        if round_:
            for name in ways:
                taken[name].append(spent[name] / (batch * len(parts)))
    rate = {name: 1 / statistics.median(values) for name, values in taken.items()}
    row = {f"{name}, clips/s": value for name, value in rate.items()}
    return row | {f"{name}: times as fast": rate[name] / rate["written"] for name in ("prefix", "prefix + postfix")}


def _writer(model: Any) -> Any:
    """The generative model with the narrator's language model and a head."""
    config = copy.deepcopy(model.config)
    config.method = "generative"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        writer = type(model)(config)
    writer.language_model.base_model.load_state_dict(model.language_model.state_dict())
    writer.in_projector.load_state_dict(model.in_projector.state_dict())
    return writer.to(model.dtype).eval()


def _features(video: EventVideo, encoder: Any) -> list[Tensor]:
    """Features [2, D] of each clip, kept in the cache."""
    path = cache_dir("bench", "narrate", encoder.image_fingerprint) / f"{video.name}.safetensors"
    if not path.exists():
        with atomic_file(path) as temporary:
            save_file({"features": encoder.images(list(video.frames(2.0, (180, 320))))}, temporary)
    return list(load_file(path)["features"].split(2))


def _vocabulary(videos: Sequence[EventVideo], length: str = "short") -> Rows:
    return [
        {"text": clip.words(length), "video": video.name, "scene": video.scene}
        for video in videos
        for clip in video.clips
    ]


def _grown(narrate: Narrate, size: int, log: Log) -> NarrationIndex:
    """The sample vocabulary with distractors, every one of them embedded, in invented reference videos of 20 each."""
    index, encoder = narrate.vocabulary, narrate.encoder
    words = itertools.product(DEEDS, KINDS, OBJECTS)
    texts = [f"{deed} the {kind} {thing}" for deed, kind, thing in words]
    random.Random(0).shuffle(texts)
    texts = texts[: size - len(index.prefixes)]
    path = cache_dir("bench", "narrate") / f"distractors-{len(texts)}-{encoder.text_fingerprint}.safetensors"
    if not path.exists():
        log(f"embedding {len(texts)} distractors")
        with atomic_file(path) as temporary:
            save_file({"vectors": encoder.texts(texts)}, temporary)
    scenes = [f"{thing} {place}" for thing in OBJECTS for place in ("shop", "room", "fair", "factory", "museum")]
    first, last = len(index.prefixes), len(index.prefixes) + len(texts)
    foreign = [
        Video(f"distractor {place}", scenes[number % len(scenes)], list(range(place, min(place + 20, last))))
        for number, place in enumerate(range(first, last, 20))
    ]
    return NarrationIndex(
        index.encoder,
        [*index.prefixes, *texts],
        torch.cat([index.prefix_vectors, load_file(path)["vectors"]]),
        index.postfixes,
        index.postfix_vectors,
        [*index.scenes, *scenes],
        torch.cat([index.scene_vectors, encoder.texts(scenes)]),
        [*foreign, *index.videos],
        index.anywhere,
    )


def _narrations(count: int) -> Iterator[str]:
    """``verb the quality thing``, in two of three cases with a manner; drawn with a seed."""
    rng = random.Random(0)
    for _ in range(count):
        text = f"{rng.choice(DEEDS)} the {rng.choice(KINDS)} {rng.choice(OBJECTS)}"
        yield text if rng.random() < 0.33 else f"{text} {rng.choice(MANNERS)}"


def _child(function: str, argument: str) -> dict[str, float]:
    """What ``function(argument)`` prints in a process of its own."""
    code = f"import sys; from gossamer.benchmarks.narrate import {function}; {function}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=False)
    if done.returncode:
        raise GossamerError(f"bench narrate: {function}", must="end well", got=done.stderr.strip().splitlines()[-1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _narrate_child(path: str) -> None:
    narrate = Narrate(start=0.0, end=2.0)
    narrate.apply(path)
    loaded, start = _peak(), time.perf_counter()
    found = Narrate().apply(path)
    seconds = time.perf_counter() - start
    print(json.dumps({"clips": len(found.rows), "seconds": seconds, "peak MB": _peak(), "peak MB of 2 s": loaded}))


def _pairs_child(count: str) -> None:
    texts = list(_narrations(int(count)))
    listed, start = _peak(), time.perf_counter()
    pairs = narration_pairs(texts)
    seconds = time.perf_counter() - start
    found = {"different": len(set(texts)), "prefixes": len(pairs.prefixes), "postfixes": len(pairs.postfixes)}
    print(json.dumps({**found, "seconds": seconds, "peak MB": _peak(), "peak MB of the list": listed}))


def _peak() -> float:
    """High-water mark of this process's resident memory in MB; of a child, ``ru_maxrss`` would be its parent's."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1000
    raise GossamerError("bench narrate", must="find VmHWM in /proc/self/status", do="run it on Linux")


def _target(text: str, value: float, target: str, met: bool) -> dict[str, Any]:
    return {"text": text, "value": round(value, 3), "target": target, "met": bool(met)}
