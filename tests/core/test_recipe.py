"""Recipes are refused as a whole, before anything loads, with the reason and what to do."""

from __future__ import annotations

import pytest
import yaml

from gossamer.core.errors import InputError
from gossamer.core.recipe import RecipeError, read_recipe


def recipe(**changes):
    base = {
        "model": "llama-7m",
        "data": {"name": "python_functions", "train": 10},
        "seed": 1,
        "steps": [{"mos": {"rank": 8}}, {"train": {"steps": 5}}, {"merge": {}}, {"finequant": {"bits": 4}}],
        "measure": ["task", "size"],
    }
    return {**base, **changes}


def problems(**changes):
    with pytest.raises(RecipeError) as error:
        read_recipe(recipe(**changes))
    return error.value.problems


def test_a_good_recipe_resolves_and_reads_back():
    checked = read_recipe(recipe())
    assert [step.name for step in checked.steps] == ["mos", "train", "merge", "finequant"]
    written = yaml.safe_load(yaml.safe_dump(checked.as_dict()))
    assert written["steps"][0]["mos"]["budget"] == 2  # defaults are written out
    assert read_recipe(written).as_dict() == checked.as_dict()


def test_misspelt_key():
    assert problems(sead=3) == ["'sead' is no key of a recipe; did you mean 'seed'?"]


def test_all_problems_at_once():
    found = problems(sead=3, seed="x", steps=[{"moss": {}}, {"train": {"stepps": 3}}, {"mos": {"rank": 0}}])
    text = "\n".join(found)
    assert len(found) == 5
    for words in ("did you mean 'seed'?", "seed: must be int", "did you mean 'mos'?", "did you mean 'steps'?", ">= 1"):
        assert words in text


def test_wrong_type_and_bound():
    assert "must be int, got 'eight'" in problems(steps=[{"mos": {"rank": "eight"}}])[0]


def test_training_a_quantised_base_without_adapter():
    (text,) = problems(steps=[{"finequant": {}}, {"train": {}}])
    assert "train needs" in text
    assert "finequant ended that" in text
    assert "an order that works: train -> finequant" in text


def test_an_adapter_on_a_quantised_base_may_train():
    read_recipe(recipe(steps=[{"finequant": {}}, {"lora": {}}, {"train": {}}]))


def test_merge_needs_an_adapter_and_one_is_offered():
    (text,) = problems(steps=[{"merge": {}}])
    assert "an order that works: " in text
    assert "-> merge" in text


def test_kinds_that_are_no_step():
    assert "name it in train.objective" in problems(steps=[{"dpo": {}}])[0]


def test_references_are_checked_inside():
    text = problems(steps=[{"lora": {}}, {"train": {"objective": {"dpo": {"betta": 1.0}}}}])[0]
    assert "did you mean 'beta'?" in text
    assert "dpo" in problems(steps=[{"lora": {}}, {"train": {"objective": "dop"}}])[0]


def test_data_needs_name_or_path():
    assert "either a name" in problems(data={"train": 3})[0]


def test_quantities_are_checked():
    assert "did you mean 'perplexity'?" in problems(measure=["perplexiti"])[0]


def test_yaml_numbers_and_repeated_keys(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nsteps:\n- lora: {}\n- train: {optimizer: {adamw: {lr: 1e-3}}}\n")
    assert read_recipe(path).steps[1].options["optimizer"] == {"adamw": {"lr": 0.001}}
    path.write_text("model: m\nseed: 1\nseed: 2\n")
    with pytest.raises(InputError, match="line 1: key 'seed'"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"model: [", "must be YAML"), (b"- a\n", "must be a mapping"), (b"\xff\xfe", "must be UTF-8")],
)
def test_files_that_are_no_recipe(tmp_path, content, words):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_recipe(path)


def test_overrides_reach_into_steps():
    checked = read_recipe(recipe(), {"steps.train.steps": 2, "data.train": 3, "measure.batch_size": 4, "seed": 9})
    assert (checked.steps[1].options["steps"], checked.data.train, checked.seed) == (2, 3, 9)
    assert checked.measure["batch_size"] == 4
    assert checked.measure["quantities"] == ("task", "size")


def test_a_local_quantised_folder_starts_quantised(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    assert "train needs" in problems(model=str(tmp_path), steps=[{"train": {}}])[0]


@pytest.mark.parametrize("name", ["promptkd", "narrate"])
def test_a_system_that_no_recipe_can_feed_is_to_be_called(name):
    with pytest.raises(RecipeError, match=r"must be a step, got one of the \w+; call it: gossamer.system"):
        read_recipe({"model": "m", "steps": [name]})
