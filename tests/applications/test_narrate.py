"""Narrate, on rendered videos with a small untrained narrator: what the rows are made of, breaks, bad input."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import gossamer
from gossamer.applications.narrate import Narrate
from gossamer.applications.narrate.result import UNKNOWN
from gossamer.core.errors import InputError
from gossamer.core.paths import sha256
from gossamer.hub.nursery import load_nursery
from gossamer.hub.worlds.events import event_videos
from gossamer.parts.narration import QUERIES, Narrator
from gossamer.parts.narration_index import NarrationIndex
from gossamer.parts.video import read_frames, write_video

NARRATE = "from gossamer.cli import main; main()"
SLOWLY = """
import time
from gossamer.parts.narration import Narrator
plain = Narrator.narrate
def narrate(self, *arguments):
    found = plain(self, *arguments)
    time.sleep(5)
    return found
Narrator.narrate = narrate
"""


@pytest.fixture(scope="module")
def narrator(tmp_path_factory) -> Path:
    """A folder with a random model, its processor, and a vocabulary of the events of a few videos."""
    folder = tmp_path_factory.mktemp("narrator") / "tiny"
    _, tokenizer = load_nursery("llama-7m")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=192, **shape))
    vlog = gossamer.system("vlog")
    model, processor = vlog.build(base), vlog.processor(tokenizer)
    model.config.oov_threshold = 0.0
    rows = [
        {"text": clip.narration, "scene": video.scene, "video": video.name}
        for video in event_videos("train", 12)
        for clip in video.clips
    ]
    index = NarrationIndex.build(rows, processor.encoder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    index.save(folder / "tiny.vocab")
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """36 seconds of several scenes."""
    parts = (video.frames(4.0, (64, 96)) for video in event_videos("test", 4))
    frames = itertools.islice(itertools.chain.from_iterable(parts), 4 * 36)
    return write_video(tmp_path_factory.mktemp("video") / "scenes.mp4", frames, 4.0)


@pytest.fixture(autouse=True)
def own_work(tmp_path, monkeypatch):
    """Work in progress of a test is its own; models stay in the common cache."""
    import gossamer.applications.narrate.watching as watching

    monkeypatch.setattr(watching, "cache_dir", lambda *parts: tmp_path.joinpath("work", *parts))


def narrate(narrator: Path, video: Path, **options):
    return gossamer.system("narrate", model=str(narrator), **options).apply(video)


def test_rows_are_what_the_chain_gives_on_the_frames(narrator, video):
    found = narrate(narrator, video)
    assert [(row.start, row.end) for row in found.rows] == [(k, k + 1) for k in range(36)]
    system = Narrate(model=str(narrator))
    frames = [frame.image for frame in read_frames(video, 2.0)]
    features = torch.cat([system.encoder.images(frames[32 * k : 32 * k + 32]) for k in range(3)])
    chain = Narrator(system.model, system.processor, system.vocabulary)
    scene = chain.scene(features)
    expected = chain.narrate([features[2 * k : 2 * k + 2] for k in range(36)], scene)
    assert [row.nearest for row in found.rows] == [one.text for one in expected]
    assert np.allclose([row.score for row in found.rows], [one.score for one in expected], atol=1e-4)
    assert found.scene == scene.hit.text
    assert {row.scene for row in found.rows} == {found.scene}


def test_rows_come_as_they_are_found(narrator, video):
    rows, steps = [], []
    found = Narrate(model=str(narrator)).apply(
        video, on_row=rows.append, on_progress=lambda what, done, total: steps.append((what, done, total))
    )
    assert rows == found.rows
    assert steps == [(what, done, 36) for what in ("watching", "narrating") for done in (16, 32, 36)]


def test_with_a_scene_clips_are_narrated_while_they_are_watched(narrator, video):
    steps = []
    found = Narrate(model=str(narrator), scene="Kitchen").apply(
        video, on_progress=lambda what, done, total: steps.append(what)
    )
    assert set(steps) == {"narrating"}
    assert found.scene == "kitchen"
    index = Narrate(model=str(narrator)).vocabulary
    of_kitchen = {index.prefixes[row] for one in index.videos if one.scene == "kitchen" for row in one.rows}
    assert {row.prefix for row in found.rows} <= of_kitchen
    with pytest.raises(InputError, match="scene 'kitchn': must be a scene of the vocabulary; did you mean 'kitchen'"):
        narrate(narrator, video, scene="kitchn")


def test_threshold_marks_what_is_unknown(narrator, video):
    found = narrate(narrator, video, threshold=0.999)
    assert found.unknown_share == 1
    assert {row.text for row in found.rows} == {UNKNOWN}
    assert found.scene == ""
    assert "gossamer vocab add" in found.advice
    assert narrate(narrator, video, threshold=-1.0).unknown_share == 0


def test_a_question_of_the_user_reaches_the_model(narrator, video):
    plain, asked = (narrate(narrator, video, query=query) for query in ("current", "What happens next?"))
    assert [row.score for row in plain.rows] != [row.score for row in asked.rows]
    assert asked.query == "What happens next?"
    loose = narrate(narrator, video, query="what happens next")
    assert [row.score for row in loose.rows] == [row.score for row in asked.rows]
    assert narrate(narrator, video, query="next").query == QUERIES["next"][0]


def test_it_may_start_and_end_inside(narrator, video):
    found = narrate(narrator, video, start=3.0, end=7.5)
    assert [(row.start, row.end) for row in found.rows] == [(3, 4), (4, 5), (5, 6), (6, 7), (7, 7.5)]


def test_model_and_vocab_are_taken_from_where_they_are_said_to_be(narrator, video, tmp_path):
    system = Narrate(model=str(narrator))
    NarrationIndex.build(["peel a mango", "dance"], system.encoder).save(tmp_path / "other.vocab")
    found = narrate(narrator, video, vocab=str(tmp_path / "other.vocab"))
    assert {row.prefix for row in found.rows} <= {"peel a mango", "dance"}
    assert found.scene == ""
    run = tmp_path / "run" / "result" / "model"
    run.parent.mkdir(parents=True)
    run.symlink_to(narrator)
    assert narrate(tmp_path / "run", video).rows == narrate(narrator, video).rows


def test_fit_builds_the_vocabulary_and_calibrates_the_threshold(narrator, video, tmp_path):
    system = Narrate(model=str(narrator))
    before = [tensor.clone() for tensor in system.model.state_dict().values()]
    data = [
        {"video": str(video), "narrations": [[k, k + 1, f"event {k}"] for k in range(30)], "scene": "garage"},
        {"text": "wait"},
    ]
    system.fit(data)
    assert set(system.vocabulary.narrations()) == {*(f"event {k}" for k in range(30)), "wait"}
    found = system.apply(video)
    assert sum(not row.known for row in found.rows[:30]) in (1, 2, 3)
    assert found.threshold == system.threshold == system.vocabulary.threshold
    system.vocabulary.save(tmp_path / "fitted.vocab")
    assert Narrate(model=str(narrator), vocab=str(tmp_path / "fitted.vocab")).threshold == found.threshold
    after = system.model.state_dict().values()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_kill_in_the_middle_costs_nothing(narrator, video, tmp_path):
    """The process dies after its first rows; the next one goes on after them and ends with the unbroken run's rows."""
    arguments = ["narrate", str(video), "--model", str(narrator), "--set", "threshold=0.0", "--json"]
    cache = tmp_path / "cache"
    environment = {**os.environ, "GOSSAMER_CACHE": str(cache)}
    cache.mkdir()
    models = Path(os.environ.get("GOSSAMER_CACHE", Path.home() / ".cache" / "gossamer")) / "models"
    (cache / "models").symlink_to(models)
    command = [sys.executable, "-c", SLOWLY + NARRATE, *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not list(cache.glob("narrate/*/000000.json")) and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (work,) = cache.glob("narrate/*")
    kept = {path.name for path in work.glob("*.json")}
    assert kept == {"000000.json"}
    command = [sys.executable, "-c", NARRATE, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = narrate(narrator, video, threshold=0.0).as_dict()
    assert json.loads(done.stdout)["rows"] == expected["rows"]
    assert not work.exists()


def test_rows_of_a_block_that_is_done_are_not_made_again(narrator, video, monkeypatch):
    whole = narrate(narrator, video)
    batches = []
    plain = Narrator.narrate

    def stops(self, clips, scene=None):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(clips))
        return plain(self, clips, scene)

    monkeypatch.setattr(Narrator, "narrate", stops)
    with pytest.raises(KeyboardInterrupt):
        narrate(narrator, video)
    batches.clear()
    again = narrate(narrator, video)
    assert batches == [4]
    assert again.rows == whole.rows


def test_a_cut_file_is_narrated_as_far_as_it_goes(narrator, video, tmp_path):
    short = tmp_path / "short.mp4"
    short.write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
    found = narrate(narrator, short)
    assert 1 < found.stopped < 36
    assert found.rows[-1].end == pytest.approx(found.stopped)
    assert found.notes[0].startswith("the file breaks off at ")
    whole = narrate(narrator, video)
    assert [row.prefix for row in found.rows[:16]] == [
        row.prefix for row in whole.rows[:16]
    ] or found.scene != whole.scene


def test_bad_input_is_refused_before_anything_is_watched(narrator, video, tmp_path, monkeypatch):
    def watched(*_):
        raise AssertionError("frames were encoded")

    text = tmp_path / "text.mp4"
    text.write_text("no video")
    folder = tmp_path / "empty.vocab"
    for options, path, words in (
        ({}, tmp_path / "nothing.mp4", "no such file"),
        ({}, text, "must be a video file"),
        ({"start": 40.0}, video, "must lie inside the video"),
        ({"start": 2.0, "end": 90.0}, video, "must lie inside the video"),
        ({"query": "why " * 300}, video, "must have at most"),
        ({"query": " "}, video, "narrate.query: must be a question"),
        ({"vocab": str(folder)}, video, "must be a folder with vocab.json"),
        ({"model": "llama-7m"}, video, "must be a narrator that retrieves"),
    ):
        system = gossamer.system("narrate", **{"model": str(narrator)} | options)
        with monkeypatch.context() as patched:
            if system.config.model == str(narrator):
                patched.setattr(system.encoder, "images", watched)
            with pytest.raises(InputError, match=words):
                system.apply(path)


def test_a_vocabulary_of_another_encoder_is_refused(narrator, video, tmp_path):
    folder = tmp_path / "other.vocab"
    Narrate(model=str(narrator)).vocabulary.save(folder)
    meta = json.loads((folder / "vocab.json").read_text())
    meta["encoder"] |= {"name": "another", "fingerprint": "0" * 16}
    (folder / "vocab.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="another"):
        narrate(narrator, video, vocab=str(folder))


def test_an_empty_vocabulary_is_refused(narrator, video, tmp_path):
    folder = tmp_path / "empty.vocab"
    Narrate(model=str(narrator)).vocabulary.save(folder)
    meta = json.loads((folder / "vocab.json").read_text()) | {"prefixes": [], "videos": [], "scenes": []}
    (folder / "vocab.json").write_text(json.dumps(meta))
    tensors = load_file(folder / "vocab.safetensors")
    for name in ("prefix_vectors", "scene_vectors", "video_rows", "video_sizes", "anywhere", "counts"):
        tensors[name] = tensors[name][:0].clone()
    save_file(tensors, folder / "vocab.safetensors")
    with pytest.raises(InputError, match="must hold at least one narration"):
        narrate(narrator, video, vocab=str(folder))


def test_features_that_are_not_finite_are_refused(narrator, video, monkeypatch):
    system = Narrate(model=str(narrator))
    monkeypatch.setattr(system.encoder, "images", lambda images: torch.full((len(images), 768), float("nan")))
    with pytest.raises(InputError, match=r"features of .*scenes.mp4 at 0 s: must be finite numbers"):
        system.apply(video)


def test_upgrade_asks_about_unknown_clips_and_changes_no_weight(narrator, video):
    system = Narrate(model=str(narrator), threshold=0.9)
    before = sha256(narrator / "model.safetensors"), len(system.vocabulary.prefixes)
    seen, asked = [], []

    def describe(picture):
        seen.append(picture.size)
        return "Somebody peels fruit in an orchard."

    def actions(prompt):
        asked.append(prompt)
        return "peel mango; Cut Mango; peel mango;"

    found = system.upgrade(video, describe, actions, calls=3)
    assert (found.calls, found.clips, found.before) == (3, 36, 36)
    assert found.added == {"Somebody peels fruit in an orchard.": ["peel mango", "cut mango"]}
    assert seen == [(96, 64)] * 3
    assert all("Somebody peels fruit in an orchard." in prompt for prompt in asked)
    assert system.vocabulary.prefixes[before[1] :] == ["peel mango", "cut mango"]
    assert sha256(narrator / "model.safetensors") == before[0]
