"""Still scenes: exact graphs, exact pictures, balanced questions."""

from __future__ import annotations

import importlib.util
import itertools
import random
import time
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gossamer.core.errors import InputError, MissingExtra, OptionError
from gossamer.hub.worlds.backdrops import BACKDROPS
from gossamer.hub.worlds.draw import PAINTS, STYLES, boxes, draw, draw_thing, masks, paint_background
from gossamer.hub.worlds.scene import ANIMALS, BACKGROUNDS, COLOURS, KINDS, Scene, Thing, holds, sample_scene
from gossamer.hub.worlds.shapes import ROLES, SHAPES, rectangle
from gossamer.hub.worlds.stills import ANSWERS, QUESTION_KINDS, SPLITS, Question, Still, split_of, still_scenes
from gossamer.hub.worlds.textures import photographs


def _scenes(count: int, **controls: object) -> list[Scene]:
    rng = random.Random(3)
    return [sample_scene(rng, **controls) for _ in range(count)]  # type: ignore[arg-type]


def _pixels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


def test_every_name_can_be_drawn() -> None:
    assert set(SHAPES) == set(KINDS)
    assert set(PAINTS) == set(COLOURS)
    assert set(BACKDROPS) == set(BACKGROUNDS)
    assert {role for shape in SHAPES.values() for role, _ in shape} <= set(ROLES)


@pytest.mark.parametrize("style", STYLES)
def test_a_scene_has_one_picture_and_no_global_random_state(style: str) -> None:
    (scene,) = _scenes(1, things=4, glyphs=0.5, actions=1.0)
    before = random.getstate(), str(np.random.get_state())
    first, second = draw(scene, 112, style), draw(scene, 112, style)
    assert first.mode == "RGB"
    assert first.size == (112, 112)
    assert first.tobytes() == second.tobytes()
    assert (random.getstate(), str(np.random.get_state())) == before
    assert draw(replace(scene, light=0.7), 112, style).tobytes() != first.tobytes()


@pytest.mark.parametrize("size", [48, 224, 448])
def test_pictures_of_other_sizes_show_the_same(size: int) -> None:
    (scene,) = _scenes(1, things=3)
    small = _pixels(draw(scene, 112).resize((48, 48), Image.Resampling.BOX))
    other = _pixels(draw(scene, size).resize((48, 48), Image.Resampling.BOX))
    assert np.abs(small - other).mean() < 6


def test_size_and_style_are_checked() -> None:
    (scene,) = _scenes(1)
    with pytest.raises(OptionError, match="must be 48 to 448 pixels, got 47"):
        draw(scene, 47)
    with pytest.raises(OptionError, match="did you mean 'photo'"):
        draw(scene, 112, "foto")


def test_masks_are_the_pixels_that_a_thing_changes() -> None:
    for scene in _scenes(12, things=(2, 5), glyphs=0.3, actions=1.0):
        covered = masks(scene, 112)
        whole = _pixels(draw(scene, 112))
        for index, mask in covered.items():
            rest = replace(scene, things=scene.things[:index] + scene.things[index + 1 :])
            changed = np.abs(whole - _pixels(draw(rest, 112))).sum(axis=2) > 0
            assert not (changed & ~_grown(mask)).any()
            assert (changed & mask).sum() > 0.93 * mask.sum()
        for first, second in itertools.combinations(covered.values(), 2):
            assert not (first & second).any()


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """One pixel more on each side: the rim, which antialiasing mixes."""
    padded = np.pad(mask, 1)
    shifts = [np.roll(padded, (down, across), (0, 1)) for down in (-1, 0, 1) for across in (-1, 0, 1)]
    return np.any(shifts, axis=0)[1:-1, 1:-1]


def test_boxes_lie_in_their_cells_and_big_is_bigger() -> None:
    for scene in _scenes(20, things=4):
        areas = defaultdict(list)
        for index, (left, top, right, bottom) in boxes(scene, 112).items():
            thing = scene.things[index]
            row, column = (top + bottom) / 2 * 3 / 112, (left + right) / 2 * 3 / 112
            assert (int(row), int(column)) == thing.cell
            areas[thing.size].append(max(right - left, bottom - top))
        if len(areas) == 2:
            assert min(areas["big"]) > max(areas["small"])


def test_outlines_differ() -> None:
    outlines = {kind: masks(Scene((Thing(kind, "red"),), grid=1), 112)[0] for kind in KINDS}
    for first, second in itertools.combinations(KINDS, 2):
        either = (outlines[first] | outlines[second]).sum()
        assert (outlines[first] & outlines[second]).sum() / either < 0.9, (first, second)


@pytest.mark.parametrize("style", STYLES)
def test_colours_keep_apart_in_every_style(style: str) -> None:
    def mean(colour: str, style: str, texture: int) -> NDArray[np.float64]:
        scene = Scene((Thing("ball", colour),), "room", 1, texture=texture)
        values = _pixels(draw(scene, 112, style))[masks(scene, 112)[0]]
        return values.mean(axis=0) - values.mean()

    plain = {colour: mean(colour, "flat", 0) for colour in COLOURS}
    for colour in COLOURS:
        average = np.mean([mean(colour, style, texture) for texture in range(6)], axis=0)
        cosine = {
            name: float(average @ other / np.linalg.norm(average) / np.linalg.norm(other))
            for name, other in plain.items()
        }
        near = {"orange", "brown"} if colour in ("orange", "brown") else {colour}  # one hue, told apart by lightness
        assert max(cosine, key=lambda name: cosine[name]) in near, (colour, cosine)


def test_a_glyph_is_tall_enough_to_be_read() -> None:
    def picture(glyph: str) -> NDArray[np.int64]:
        return _pixels(draw(Scene((Thing("cat", "red", cell=(1, 1), glyph=glyph),)), 112))

    changed = (np.abs(picture("H") - picture("L")).sum(axis=2) > 200).any(axis=1)
    assert changed.sum() >= 18  # the right stem of H, whose foot is L's foot
    assert (np.abs(picture("3") - picture("8")) > 100).any()


def test_drawing_is_fast() -> None:
    scenes = _scenes(60, things=(1, 5), glyphs=0.3)
    started = time.process_time()
    for scene in scenes:
        draw(scene, 112)
    assert 60 / (time.process_time() - started) > 300


def test_draw_thing_takes_shapes_and_colours_of_ones_own() -> None:
    canvas = paint_background("room", (80, 40))
    assert canvas.size == (80, 40)
    draw_thing(canvas, (rectangle("main", 0, 0, 0.5, 1),), (1, 2, 3), (0.0, 0.0, 40.0, 40.0))
    assert canvas.getpixel((10, 20)) == (1, 2, 3)
    turned = paint_background("room", (80, 40))
    draw_thing(turned, (rectangle("main", 0, 0, 0.5, 1),), (1, 2, 3), (0.0, 0.0, 40.0, 40.0), mirror=True)
    assert turned.getpixel((30, 20)) == (1, 2, 3)
    assert turned.getpixel((10, 20)) != (1, 2, 3)
    for kind, colour, hint in (("cta", "red", "'cat'"), ("cat", "rde", "'red'")):
        with pytest.raises(OptionError, match=hint):
            draw_thing(canvas, kind, colour, (0.0, 0.0, 40.0, 40.0))
    with pytest.raises(OptionError, match="did you mean 'beach'"):
        paint_background("beech", 40)


def test_photographs_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    photographs.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="sklearn"):
        draw(Scene((Thing("cat", "red"),)), 112, "photo")


def test_scenes_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'boat'"):
        Thing("boot", "red")
    with pytest.raises(InputError, match="cell of their own"):
        Scene((Thing("cat", "red"), Thing("car", "blue")))
    with pytest.raises(InputError, match="lie on the 3 x 3 grid"):
        Scene((Thing("cat", "red", cell=(0, 3)),))
    with pytest.raises(InputError, match="grid of at most 3"):
        Scene((Thing("cat", "red", glyph="7"),), grid=4)
    with pytest.raises(InputError, match="must be 1 to 9"):
        sample_scene(random.Random(0), things=10)


def test_places_counts_and_relations() -> None:
    cat, car = Thing("cat", "red", cell=(0, 0)), Thing("car", "red", "small", cell=(1, 3))
    scene = Scene((cat, car), grid=4)
    assert [scene.place(thing) for thing in scene.things] == ["top left", "right"]
    assert scene.place(Thing("box", "red", cell=(1, 2))) == "middle"
    assert [holds(cat, name, car) for name in ("left of", "right of", "above", "below")] == [True, False, True, False]
    assert (scene.count(colour="red"), scene.count("cat"), scene.count("cat", size="small")) == (2, 1, 0)
    moved = replace(scene, things=(replace(cat, shift=(0.5, 0.5), angle=3.0), car), light=0.9)
    assert moved.key() == scene.key()
    assert replace(scene, background="sea").key() != scene.key()


def test_sampling_keeps_to_its_controls() -> None:
    for scene in _scenes(60, things=4, same=3, kinds=("cat", "car", "sun"), colours=("red", "blue"), actions=1.0):
        assert 3 in Counter(thing.kind for thing in scene.things).values()
        assert {thing.colour for thing in scene.things} <= {"red", "blue"}
        assert all(thing.kind in ANIMALS for thing in scene.things if thing.action)
    assert all(thing.size == "big" and thing.glyph for scene in _scenes(20, glyphs=1.0) for thing in scene.things)
    assert all(scene.count(size="big") == 1 for scene in _scenes(20, one_big=1.0))
    plain = _scenes(5, jitter=False)
    assert all(thing.shift == (0.0, 0.0) and scene.light == 1.0 for scene in plain for thing in scene.things)


@pytest.fixture(scope="module")
def stills() -> dict[str, list[Still]]:
    return {"train": still_scenes("train", 2500), "test": still_scenes("test", 400, seed=1)}


def test_splits_share_no_scene(stills: dict[str, list[Still]]) -> None:
    shown = {split: {still.scene.key() for still in rows} for split, rows in stills.items()}
    assert not shown["train"] & shown["test"]
    assert {split_of(still.scene) for still in stills["test"]} == {"test"}
    few = {split: still_scenes(split, 60, kinds=("cat",), colours=("red",), things=(1, 1)) for split in SPLITS}
    keys = [{still.scene.key() for still in rows} for rows in few.values()]
    assert not any(first & second for first, second in itertools.combinations(keys, 2))


def test_stills_are_the_same_by_seed_and_grow_at_the_end() -> None:
    first, longer = still_scenes("validation", 5, seed=4), still_scenes("validation", 8, seed=4)
    assert first == longer[:5]
    assert [s.questions for s in first] == [s.questions for s in longer[:5]]
    assert [s.captions for s in first] == [s.captions for s in longer[:5]]
    assert first[0].describe("long") == longer[0].describe("long")
    assert first[0].describe("short", random.Random(1)) != first[0].describe("short", random.Random(2))
    assert still_scenes("validation", 5, seed=5) != first
    assert first[0].image(56).size == (56, 56)
    assert {still.scene.grid for still in still_scenes("train", 20, glyphs=1.0)} == {2}
    assert {still.scene.grid for still in still_scenes("train", 20, glyphs=1.0, glyph_grid=3)} == {3}
    with pytest.raises(OptionError, match="did you mean 'train'"):
        still_scenes("trian", 1)
    with pytest.raises(OptionError, match="within 1 to 9"):
        still_scenes("train", 1, things=(0, 4))


def test_answers_are_right(stills: dict[str, list[Still]]) -> None:
    for still in stills["test"]:
        for question in still.questions:
            assert question.answer == _oracle(still.scene, question), (still.scene, question)


def _oracle(scene: Scene, question: Question) -> str:
    """The answer, worked out from the words of the question alone."""
    words = question.text.rstrip("?").split()
    named = [thing for word in words for thing in scene.things if thing.kind == word]
    if words[:2] == ["How", "many"]:
        numbers = ("zero", "one", "two", "three", "four")
        kind = {"boxes": "box", "butterflies": "butterfly", "fish": "fish"}.get(words[2], words[2][:-1])
        if words[3] == "things":
            return numbers[sum(thing.colour == words[2] for thing in scene.things)]
        return numbers[sum(thing.kind == kind for thing in scene.things)]
    if words[0] == "Is":
        (down, across) = (named[1].cell[i] - named[0].cell[i] for i in (0, 1))
        if " or " in question.text:
            return "left" if across > 0 else "right"
        return "yes" if {"left": across, "right": -across, "above": down, "below": -down}[words[3]] > 0 else "no"
    if words[0] == "Where":
        return _place(named[0], scene)
    if not named:
        place = " ".join(word for word in words if word in ("top", "bottom", "left", "right", "middle"))
        big = [thing for thing in scene.things if thing.size == "big"]
        named = [thing for thing in scene.things if _place(thing, scene) == place] if place else big
        named = named or list(scene.things)
        named = list(scene.things) if "picture" in words or "it" in words else named
    assert len(named) == 1
    aspect = "colour" if words[1] == "colour" else "glyph" if "written" in words else "kind"
    return str(getattr(named[0], aspect))


def _place(thing: Thing, scene: Scene) -> str:
    far = scene.grid - 1
    row = {0: "top", far: "bottom"}.get(thing.cell[0], "")
    column = {0: "left", far: "right"}.get(thing.cell[1], "")
    return f"{row} {column}".strip() or "middle"


def test_questions_cannot_be_answered_without_the_picture(stills: dict[str, list[Still]]) -> None:
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for still in stills["train"]:
        for question in still.questions:
            by_text[question.text][question.answer] += 1
            by_kind[question.kind][question.answer] += 1
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for still in stills["test"]:
        for question in still.questions:
            seen = by_text[question.text] or by_kind[question.kind]
            asked[question.kind] += 1
            right[question.kind] += seen.most_common(1)[0][0] == question.answer
            assert question.answer in ANSWERS
            assert len(question.answer.split()) <= 2
    assert set(asked) == set(QUESTION_KINDS)
    assert {kind for kind in asked if right[kind] > 0.56 * asked[kind]} == set()
    assert {question.difficulty for still in stills["test"] for question in still.questions} == {1, 2, 3, 4}
