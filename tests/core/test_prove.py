"""`gossamer prove`: arms are run once, evidence is written, and changed parts are confirmed by what the figures say."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from gossamer.core import registry
from gossamer.core.errors import InputError
from gossamer.experiments import runner
from gossamer.experiments.lab import Conclusion


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """An experiment of the system mos whose figures, hashes and evidence file are the test's own."""
    state = SimpleNamespace(base=1.0, ours=0.5, parts="p1", code="c1", path=tmp_path / "mos.json", ran=[])

    def run(arm, seed, lab):
        state.ran.append((arm, seed))
        return {"loss": state.ours if arm == "ours" else state.base, "train_seconds": float(len(state.ran))}

    def conclude(results):
        effect, low, high = results.paired("ours", "base", "loss")
        return Conclusion(
            shown=effect < 0, effect=effect, low=low, high=high, unit="nats", baseline="base", result="ours",
            must_see=(), notes=(),
        )  # fmt: skip

    module = SimpleNamespace(SEEDS=(0, 1, 2), ARMS={"base": {}, "ours": {}}, run=run, conclude=conclude)
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gossamer.experiments.adapters.mos", module)
    monkeypatch.setattr(runner, "code_hash", lambda entry: state.code)
    monkeypatch.setattr(runner, "parts_hash", lambda entry: state.parts)
    monkeypatch.setattr(runner, "evidence_path", lambda entry: state.path)
    monkeypatch.setattr(
        runner, "read_evidence", lambda entry: json.loads(state.path.read_text()) if state.path.exists() else None
    )
    state.recorded = lambda: json.loads(state.path.read_text())
    return state


def test_each_arm_and_seed_runs_once_and_the_evidence_says_what_came_out(stage):
    assert registry.find("mos")
    runner.prove("mos", log=lambda text: None)
    assert sorted(stage.ran) == [(arm, seed) for arm in ("base", "ours") for seed in (0, 1, 2)]
    assert stage.recorded()["shown"] is True
    assert stage.recorded()["effect"] == pytest.approx(-0.5)
    runner.prove("mos", log=lambda text: None)
    assert len(stage.ran) == 6


def test_changed_parts_are_confirmed_by_equal_quick_figures_even_without_an_effect(stage):
    runner.prove("mos", log=lambda text: None)
    stage.base = stage.ours = 0.7  # what the tiny size gives: no effect to go by
    runner.prove("mos", quick=True, log=lambda text: None)
    assert stage.recorded()["quick"] == {"base": {"loss": "0.7"}, "ours": {"loss": "0.7"}}
    stage.parts = "p2"
    runner.prove("mos", quick=True, log=lambda text: None)
    assert stage.recorded()["parts_hash"] == "p2"
    assert stage.recorded()["recheck"]["same_figures"] is True
    stage.parts, stage.ours = "p3", 0.8
    said = []
    runner.prove("mos", quick=True, log=said.append)
    assert stage.recorded()["parts_hash"] == "p2"
    assert any("prove it in full" in text for text in said)
    stage.parts, stage.ours = "p4", 0.6
    runner.prove("mos", quick=True, log=said.append)
    assert stage.recorded()["parts_hash"] == "p4"
    assert stage.recorded()["recheck"]["same_figures"] is False


def test_a_changed_system_is_not_confirmed(stage):
    runner.prove("mos", log=lambda text: None)
    stage.code, stage.parts = "c2", "p2"
    runner.prove("mos", quick=True, log=lambda text: None)
    assert (stage.recorded()["code_hash"], stage.recorded()["parts_hash"]) == ("c1", "p1")


def test_a_quick_run_keeps_nothing_of_an_earlier_one(stage):
    from gossamer.experiments.lab import Lab

    kept = Lab("mos", quick=True, log=print).folder() / "kept"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("x")
    runner.prove("mos", quick=True, log=lambda text: None)
    assert not kept.exists()


def test_a_baseline_has_nothing_to_prove():
    with pytest.raises(InputError, match="baseline without a claim"):
        runner.prove("lora")
