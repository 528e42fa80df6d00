"""A recipe runs end to end on the nursery model, and goes on after kill -9 with the result of an unbroken run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gossamer.core.errors import GossamerError, InputError
from gossamer.core.report import Report
from gossamer.pipeline import engine
from gossamer.pipeline.stage import load_bundle

STEPS = [
    {"trim_vocabulary": {"corpus": "data"}},
    {"mos": {"rank": 4, "budget": 2, "private": 1, "shards": 2}},
    {"train": {"steps": 6, "batch_size": 4, "max_length": 64, "save_every": 2}},
    {"merge": {}},
    {"measure": {"arm": "merged", "quantities": ["task"]}},
    {"finequant": {"bits": 8}},
    {"save": {}},
    {"reload": {}},
]


def recipe(rows_path, **changes):
    measure = {"quantities": ["task", "perplexity", "size"], "batch_size": 4, "new_tokens": 6, "few_shot": 2}
    data = {"path": rows_path, "test": 4, "validation": 3}
    return {"model": "llama-7m", "data": data, "seed": 3, "steps": STEPS, "measure": measure, **changes}


@pytest.fixture(scope="module")
def unbroken(rows_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, engine.run(recipe(rows_path), out=folder)


def test_report_and_files(unbroken):
    folder, report = unbroken
    assert [arm.name for arm in report.arms] == ["untouched", "few_shot", "merged", "result"]
    before, after = report.arm("untouched").values, report.arm("result").values
    assert after["total_bytes"].value < before["total_bytes"].value
    assert after["parameters"].value < before["parameters"].value
    assert after["bits_per_weight"].value < 16
    assert {c.baseline for c in report.comparisons if c.metric == "chrf"} == {"untouched", "few_shot", "merged"}
    assert [step.name for step in report.steps] == [next(iter(step)) for step in STEPS]
    assert report.steps[0].changed["vocabulary"][1] < report.steps[0].changed["vocabulary"][0]
    assert report.steps[-1].changed["round_trip.largest"] == 0
    saved = Report.from_dict(json.loads((folder / "report.json").read_text()))
    assert saved.arm("result").values == after
    assert "<html" in (folder / "report.html").read_text()
    assert sorted(p.name for p in folder.iterdir()) == [
        "arms", "log", "recipe.yaml", "report.html", "report.json", "result", "state.json",
    ]  # fmt: skip
    bundle = load_bundle(folder / "result")
    assert [record["step"] for record in bundle.lineage][:3] == ["trim_vocabulary", "mos", "train"]


def test_a_folder_with_files_is_not_written_over(unbroken, rows_path):
    with pytest.raises(InputError, match="--resume"):
        engine.run(recipe(rows_path), out=unbroken[0])


def test_a_finished_run_is_not_run_again(unbroken):
    folder, report = unbroken
    before = (folder / "report.html").stat().st_mtime_ns
    assert results(engine.resume(folder)) == results(report)
    assert (folder / "report.html").stat().st_mtime_ns == before


def test_resume_wants_a_run(tmp_path):
    with pytest.raises(InputError, match=r"no recipe\.yaml"):
        engine.resume(tmp_path)


def results(report):
    """What must be the same: everything but times and memory."""
    timed = ("peak_rss_bytes", "net_rss_bytes", "tokens_per_s", "ms_per_token", "first_token_ms")
    values = {arm.name: {key: value for key, value in arm.values.items() if key not in timed} for arm in report.arms}
    return values, report.curves, [step.changed for step in report.steps], [s.outputs for s in report.samples]


KILLER = """
import sys, os, signal
from gossamer.core import hook
place, target = sys.argv[3], int(sys.argv[4])
if place == "train":
    from transformers import Trainer
    inner = Trainer.training_step
    count = 0
    def step(self, *args, **kwargs):
        global count
        count += 1
        if count == target:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, *args, **kwargs)
    Trainer.training_step = step
else:
    from transformers import PreTrainedModel
    save = PreTrainedModel.save_pretrained
    count = 0
    def killed(self, folder, *args, **kwargs):
        global count
        count += 1
        save(self, folder, *args, **kwargs)
        if count == target:
            os.kill(os.getpid(), signal.SIGKILL)
    PreTrainedModel.save_pretrained = killed
import json
from gossamer.pipeline import engine
engine.run(json.loads(sys.argv[1]), out=sys.argv[2])
"""


@pytest.mark.parametrize(("place", "target"), [("train", 5), ("save", 2), ("save", 4)])
def test_killed_runs_end_alike(unbroken, rows_path, tmp_path, place, target):
    folder = tmp_path / "broken"
    command = [sys.executable, "-c", KILLER, json.dumps(recipe(rows_path)), str(folder), place, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (folder / "report.json").exists()
    assert results(engine.resume(folder)) == results(unbroken[1])


def test_control_c_leaves_a_resumable_run(unbroken, rows_path, tmp_path):
    folder = tmp_path / "stopped"
    # a shell that runs the tests in the background would hand down an ignored SIGINT
    code = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from gossamer.pipeline.engine import run
run(json.loads(sys.argv[1]), out=sys.argv[2])
"""
    command = [sys.executable, "-c", code, json.dumps(recipe(rows_path)), str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (folder / "state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    assert results(engine.resume(folder)) == results(unbroken[1])


def test_a_full_disk_while_saving_leaves_nothing_under_the_name(rows_path, tmp_path, monkeypatch):
    import errno

    from transformers import PreTrainedModel

    def full(self, folder, **kwargs):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    folder = tmp_path / "full"
    with pytest.raises(GossamerError, match="No space left"):
        engine.run(recipe(rows_path, steps=[{"save": {}}], measure=None), out=folder)
    assert not (folder / "result").exists()
    assert not any(path.name.endswith(".safetensors") for path in folder.rglob("*"))
