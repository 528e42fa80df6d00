"""Compressions that need data get the recipe's training texts, and what they leave is saved and loads again."""

from __future__ import annotations

import pytest

from gossamer.core.errors import InputError
from gossamer.pipeline import engine
from gossamer.pipeline.stage import load_bundle

ZIPLM = {"ziplm": {"metric": "params", "targets": [1.05], "search_starts": 1, "search_steps": 0, "levels_ffn": 0.5}}


def recipe(**changes):
    measure = {"quantities": ["size"]}
    return {
        "model": "llama-7m",
        "seed": 3,
        "measure": measure,
        "steps": [ZIPLM, {"save": {}}, {"reload": {}}],
        **changes,
    }


def test_pruned_then_quantised_by_recipe(rows_path, tmp_path):
    data = {"path": rows_path, "test": 4, "validation": 3}
    steps = [ZIPLM, {"gptq": {"bits": 8}}, {"save": {}}, {"reload": {}}]
    report = engine.run(recipe(data=data, steps=steps), out=tmp_path / "run")
    before, after = report.arm("untouched").values, report.arm("result").values
    assert after["parameters"].value < before["parameters"].value
    assert after["total_bytes"].value < 0.7 * before["total_bytes"].value
    assert report.steps[-1].changed["round_trip.largest"] == 0
    model = load_bundle(tmp_path / "run" / "result").model
    assert model.is_quantized
    assert model.config.gossamer_widths["neurons"] != [model.config.intermediate_size] * len(model.model.layers)


def test_without_data_it_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must hold batches of tokens, got none; .*in a recipe, `data:`"):
        engine.run(recipe(), out=tmp_path / "run")
