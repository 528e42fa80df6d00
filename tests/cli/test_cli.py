"""The command line: exit codes, JSON, errors in one line, and the recipes of the repository."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gossamer.hub.worlds.events import event_videos

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TEXT_RECIPES = [path for path in RECIPES if "event_videos" not in path.read_text()]


def gossamer(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from gossamer.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_list_is_json_with_evidence():
    done = gossamer("list", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert {"mos", "dpo", "sophia", "finequant", "proxy_tuning", "toxicdetector"} <= set(rows)
    for row in rows.values():
        assert {"name", "kind", "title", "paper", "claim", "evidence"} <= set(row)
        assert row["evidence"]["status"] in ("shown", "not_shown", "stale", "recheck", "none")
        assert {"status", "date", "device"} == set(row["evidence"])
    assert not any(row["builtin"] for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["lst"], 2, "did you mean 'list'?"),
        (["show", "moss"], 2, "did you mean 'mos'?"),
        (["list", "--kind", "adaptors"], 2, "did you mean 'adapters'?"),
        (["check", "nothing.yaml"], 2, "must be a recipe file"),
        (["run"], 2, "a recipe or --resume"),
        (["run", "--resume", "/nonexistent"], 2, "must be the folder of a run"),
        (["prove", "lora"], 2, "a baseline without a claim"),
        (["export", "llama-7m", "--to", "ggufs", "--out", "/tmp/x"], 2, "did you mean 'gguf'?"),
        (["export", "llama-7m", "--to", "gguf", "--type", "q4", "--out", "x.gguf"], 2, "did you mean 'q4_0'?"),
        (["export", "nothing", "--to", "gguf", "--out", "x.gguf"], 2, "local folder: no nothing"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(arguments, code, words):
    done = gossamer(*arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_is_not_there_is_met_with_each_place_tried(rows_path, tmp_path):
    done = gossamer("eval", "gemma-3-270", rows_path, "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    for words in ("local folder: no gemma-3-270", "packaged models: not among", "did you mean 'gemma-3-270m'?"):
        assert words in done.stderr
    assert not (tmp_path / "run").exists()


def test_check_refuses_quickly(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: gemma-3-270m\nsead: 1\nsteps: []\n")
    start = time.perf_counter()
    done = gossamer("check", str(path))
    assert time.perf_counter() - start < 1
    assert (done.returncode, "did you mean 'seed'?" in done.stderr) == (2, True)
    path.write_text("model: gemma-3-270m\nsteps:\n- finequant: {}\n- train: {}\n")
    done = gossamer("check", str(path))
    assert done.returncode == 2
    assert "an order that works: train -> finequant" in done.stderr


def test_check_of_data_names_the_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": null}\n')
    done = gossamer("check", str(path), "--json")
    assert done.returncode == 2
    (finding,) = [f for f in json.loads(done.stdout)["findings"] if f["severity"] == "error"]
    assert (finding["row"], finding["field"]) == (2, "completion")


def test_check_previews_what_carries_loss(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "What is it?", "completion": " A test."}\n')
    done = gossamer("check", str(path), "--model", "llama-7m", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["preview"]
    assert "".join(t["text"] for t in row["tokens"] if t["weight"]).startswith(" A test.")


def test_the_video_recipe_runs_at_tiny_size(tmp_path):
    """On one's own rows; its result narrates."""
    videos = [dataclasses.replace(video, clips=video.clips[:3]) for video in event_videos("test", 24)]
    rows = []
    for number, video in enumerate(videos):
        video.write(tmp_path / f"{number}.mp4", fps=4.0, size=(90, 160))
        clips = [[clip.start, clip.end, clip.narration] for clip in video.clips]
        rows.append({"video": f"{number}.mp4", "narrations": clips, "scene": video.scene})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    settings = {"data": f"{{path: {tmp_path / 'rows.jsonl'}}}", "steps.train.steps": 2, "steps.train.batch_size": 8}
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = gossamer("run", str(RECIPES[0].parent / "vlog.yaml"), "--out", str(run), "--json", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    changed = {step["name"]: step["changed"] for step in json.loads(done.stdout)["steps"]}
    assert 0 <= changed["vocabulary"]["R@1"] <= 1
    assert changed["vocabulary"]["test_clips"] >= 3
    done = gossamer("narrate", str(tmp_path / "0.mp4"), "--model", str(run), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout)["rows"]) == 3


@pytest.mark.parametrize("recipe", TEXT_RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_at_tiny_size(recipe, rows_path, tmp_path):
    settings = {
        "model": "llama-7m",
        "data": f"{{path: {rows_path}, test: 3, validation: 3}}",
        "measure.new_tokens": 4,
        "measure.rounds": 1,
    }
    if "- train:" in recipe.read_text():
        settings["steps.train.steps"] = 2
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = gossamer("run", str(recipe), "--out", str(tmp_path / "run"), "--json", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    arms = json.loads(done.stdout)["arms"]
    assert arms[-1]["name"] == "result"
    if recipe.stem == "light":
        assert {"untouched", "adapted", "cut", "packed"} <= {arm["name"] for arm in arms}
        assert all(
            {"perplexity", "llm_kick facts"} <= arm["values"].keys() for arm in arms if arm["name"] != "few_shot"
        )
    done = gossamer("generate", str(tmp_path / "run"), "The function", "--new-tokens", "3")
    assert done.returncode == 0, done.stderr[-3000:]


def test_generate_and_export(rows_path, tmp_path):
    run = tmp_path / "run"
    done = gossamer("train", "llama-7m", rows_path, "--adapter", "mos", "--steps", "2", "--out", str(run))
    assert done.returncode == 0, done.stderr[-3000:]
    done = gossamer("generate", str(run), "The function", "--new-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    done = gossamer("export", str(run), "--to", "peft", "--out", str(tmp_path / "lora"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    gguf = tmp_path / "adapted.gguf"
    done = gossamer("export", str(run), "--to", "gguf", "--type", "q8_0", "--out", str(gguf), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["type"], found["bytes"]) == ("q8_0", gguf.stat().st_size)
    assert found["proof"]["transformers"]["positions"] >= 500


def test_doctor():
    done = gossamer("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"gemma-3-270m", "all-minilm-l6-v2", "dinov2-small"} <= set(found["models"])
    assert found["machine"]["cores"] >= 1
