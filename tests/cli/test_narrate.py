"""`gossamer narrate` and `gossamer vocab` with the sample narrator: what is printed, written and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.cli import main
from gossamer.core.paths import sha256
from gossamer.hub.nursery import nursery_folder
from gossamer.hub.worlds.events import SCENES, event_videos


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """One video of the test split as a file, 10 to 20 seconds."""
    return event_videos("test", 1)[0].write(tmp_path_factory.mktemp("video") / "sample.mp4", fps=4.0, size=(180, 320))


@pytest.fixture
def gossamer(monkeypatch, capsys):
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_a_log_with_one_line_a_clip_and_all_files(gossamer, video, tmp_path):
    code, out, err = gossamer("narrate", video, "--out", tmp_path / "out")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == len(event_videos("test", 1)[0].clips)
    assert [line.split()[0] for line in lines[:2]] == ["0:00", "0:01"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "narration.json", "narration.srt", "narration.html"
    }  # fmt: skip
    found = json.loads((tmp_path / "out" / "narration.json").read_text())
    assert len(found["rows"]) == len(lines)
    for line, row in zip(lines, found["rows"], strict=True):
        assert f"{row['score']:.2f}" in line
        assert (row["narration"] or "[out of vocabulary]") in line
    assert "data:image/jpeg" in (tmp_path / "out" / "narration.html").read_text()
    assert (tmp_path / "out" / "narration.srt").read_text().startswith("1\n00:00:00,000 --> ")


def test_json_is_alone_on_standard_output(gossamer, video):
    code, out, _ = gossamer("narrate", video, "--json", "--start", "2", "--end", "5", "--query", "what happens next?")
    assert code == 0
    found = json.loads(out)
    assert [(row["start"], row["end"]) for row in found["rows"]] == [(2, 3), (3, 4), (4, 5)]
    assert found["query"] == "What happens next?"


def test_a_cut_file_is_exit_code_1_with_the_place(gossamer, video, tmp_path):
    short = tmp_path / "short.mp4"
    short.write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
    code, out, err = gossamer("narrate", short, "--srt", tmp_path / "s.srt")
    assert code == 1
    assert "the file breaks off at" in err
    assert 1 < len(out.splitlines()) < len(event_videos("test", 1)[0].clips)
    assert (tmp_path / "s.srt").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.mp4"], "no such file"),
        ([__file__], "must"),
        (["VIDEO", "--start", "500"], "must lie inside the video"),
        (["VIDEO", "--end", "-2"], "narrate.end: must be > 0"),
        (["VIDEO", "--fps", "0"], "narrate.fps: must be > 0"),
        (["VIDEO", "--query", "why " * 300], "must have at most"),
        (["VIDEO", "--vocab", "nothing.vocab"], "must be a folder with vocab.json"),
        (["VIDEO", "--model", "no-such-narrator"], "must"),
        (["VIDEO", "--scene", "kitchn"], "did you mean 'kitchen'"),
        (["VIDEO", "--set", "top_scene=2"], "did you mean 'top_scenes'"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(gossamer, video, arguments, words):
    code, out, err = gossamer("narrate", *(str(video) if part == "VIDEO" else part for part in arguments))
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("error: ")


def test_a_vocabulary_is_built_shown_and_added_to(gossamer, tmp_path):
    source, vocab = tmp_path / "n.txt", tmp_path / "own.vocab"
    source.write_text("#C C cut the potato.\ncut the potato on the board\nwash the cup\n")
    code, out, err = gossamer("vocab", "build", source, "--out", vocab, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["prefixes"] == ["cut the potato", "wash the cup"]
    assert found["postfixes"] == ["on the board"]
    code, out, _ = gossamer("vocab", "add", vocab, "peel a mango", "wash the cup", "--scene", "kitchen")
    assert (code, "1 new prefix in the scene 'kitchen', 3 in all" in out) == (0, True)
    code, out, _ = gossamer("vocab", "show", vocab)
    assert code == 0
    assert "peel a mango" in out
    assert "kitchen" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "SOURCE", "--out", "x"], "must end in .vocab"),
        (["build", "nothing.txt", "--out", "x.vocab"], "must be a text file"),
        (["build", "SOURCE", "--out", "x.vocab", "--mode", "consistant"], "did you mean 'consistent'"),
        (["add", "nothing.vocab", "a"], "must be a folder with vocab.json"),
        (["show", "nothing.vocab"], "must be a folder with vocab.json"),
        (["upgrade", "x.vocab", "v.mp4", "--describe", "json", "--propose", "json:dumps"], "must be module:function"),
    ],
)
def test_wrong_use_of_vocab(gossamer, tmp_path, arguments, words):
    (tmp_path / "n.txt").write_text("sit\n")
    code, _, err = gossamer("vocab", *(str(tmp_path / "n.txt") if part == "SOURCE" else part for part in arguments))
    assert code == 2
    assert words in err


def test_upgrade_changes_the_vocabulary_and_no_weight(gossamer, video, tmp_path, monkeypatch):
    (tmp_path / "proposals.py").write_text(
        "def describe(picture):\n    return f'A scene of {picture.width} pixels.'\n"
        "def actions(prompt):\n    return 'peel mango; cut mango'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source, vocab = tmp_path / "n.txt", tmp_path / "own.vocab"
    source.write_text("orbit the moon\n")
    assert gossamer("vocab", "build", source, "--out", vocab)[0] == 0
    weights = nursery_folder("narrator") / "model.safetensors"
    before = sha256(weights)
    functions = ["--describe", "proposals:describe", "--propose", "proposals:actions"]
    code, out, err = gossamer("vocab", "upgrade", vocab, video, *functions, "--calls", "2", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["before"] > 0
    assert found["added"] == {"A scene of 320 pixels.": ["peel mango", "cut mango"]}
    assert json.loads(gossamer("vocab", "show", vocab, "--json")[1])["prefixes"] == [
        "orbit the moon", "peel mango", "cut mango"
    ]  # fmt: skip
    assert sha256(weights) == before


def test_help_of_both_is_quick_and_loads_no_torch():
    code = (
        "import sys\nfrom gossamer.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    for arguments in (["narrate", "--help"], ["vocab", "--help"], ["vocab", "add", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout


def test_the_sample_knows_the_places_of_the_sample_world(gossamer):
    folder = nursery_folder("narrator") / "narrator.vocab"
    found = json.loads(gossamer("vocab", "show", folder, "--json")[1])
    assert set(found["scenes"]) == set(SCENES)
