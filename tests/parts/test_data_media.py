"""Rows of images and videos: told from rows of text, paths made absolute, what is wrong named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.core.errors import InputError
from gossamer.core.recipe import DataConfig
from gossamer.parts.data_media import media_rows
from gossamer.pipeline.job import load_data


def write(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    (folder / "one.png").write_bytes(b"x")
    return path


def test_rows_of_text_are_left_to_others(tmp_path: Path) -> None:
    assert media_rows(write(tmp_path, [{"text": "a"}])) is None
    assert media_rows(tmp_path / "missing.jsonl") is None


def test_paths_hold_from_anywhere_and_an_image_may_be_null(tmp_path: Path) -> None:
    rows = media_rows(write(tmp_path, [{"image": "one.png", "answer": "x"}, {"image": None, "answer": "y"}]))
    assert rows == [{"image": str((tmp_path / "one.png").resolve()), "answer": "x"}, {"image": None, "answer": "y"}]


@pytest.mark.parametrize("bad", ['{"image": "none.png"}', '{"text": "a"}', "not json", "[1]"])
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, bad: str) -> None:
    with pytest.raises(InputError, match=r"line 2.*must"):
        media_rows(write(tmp_path, [{"image": "one.png"}, bad]))


def test_rows_of_one_video_stay_in_one_split(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.mp4").write_bytes(b"x")
    rows = [{"video": f"{number}.mp4", "question": q, "answer": "a"} for number in range(30) for q in ("now", "next")]
    splits = load_data(DataConfig(path=str(write(tmp_path, rows))), seed=0).splits
    places = [{row["video"] for row in split} for split in splits.values()]
    assert sum(len(split) for split in splits.values()) == 60
    assert sum(map(len, places)) == len(set.union(*places)) == 30
