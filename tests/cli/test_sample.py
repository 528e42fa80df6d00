"""The sample verb writes a real video and its script; wrong names are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from gossamer.cli import app
from gossamer.core.errors import OptionError
from gossamer.parts.video import probe_video


def test_a_video_and_its_script_are_written(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    done = CliRunner().invoke(app, ["sample", str(path), "--minutes", "0.1", "--height", "90", "--json"])
    assert done.exit_code == 0, done.output
    script = json.loads(done.stdout)
    assert script == json.loads(path.with_suffix(".json").read_text())
    assert [row["end"] for row in script] == [1, 2, 3, 4, 5, 6]
    info = probe_video(path)
    assert (info.height, info.width) == (90, 160)
    assert abs(info.seconds - 6) < 0.2


def test_an_unknown_place_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["sample", str(tmp_path / "a.mp4"), "--scene", "kitchn"])
    assert isinstance(done.exception, OptionError)
    assert "did you mean 'kitchen'" in str(done.exception)
