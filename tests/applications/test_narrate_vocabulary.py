"""Narration files, and where callables come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.applications.narrate.vocabulary import entry, read_narrations
from gossamer.core.errors import InputError


@pytest.mark.parametrize("name", ["json", "json:", "json:nothing", "no.such.module:f", "json:__name__"])
def test_what_is_no_function_is_refused(name):
    with pytest.raises(InputError, match="--describe"):
        entry(name, "describe")
    assert entry("json:dumps", "propose")([1]) == "[1]"


def test_text_files_have_one_narration_a_line(tmp_path: Path):
    path = tmp_path / "n.txt"
    path.write_text("#C C cut the potato.\n\nwash the cup\nwash the cup\n")
    assert read_narrations(path) == [{"text": "cut the potato"}, {"text": "wash the cup"}, {"text": "wash the cup"}]


def test_json_lines_have_scenes(tmp_path: Path):
    path = tmp_path / "n.jsonl"
    path.write_text('{"text": "cut the potato", "scene": "kitchen", "video": "a", "other": 1}\n{"text": "sit"}\n')
    assert read_narrations(path) == [{"text": "cut the potato", "scene": "kitchen", "video": "a"}, {"text": "sit"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("n.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: must be a JSON object"),
        ("n.jsonl", b'["a"]\n', "line 1: must have a text"),
        ("n.jsonl", b'{"narration": "a"}\n', "line 1: must have a text"),
        ("n.jsonl", b'{"text": "a", "scene": 3}\n', "line 1, scene: must be text"),
        ("n.txt", b"\n \n", "must hold at least one narration"),
        ("n.txt", b"\xff\xfe\x00", "must be a text file"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_narrations(path)
    with pytest.raises(InputError, match="must be a text file"):
        read_narrations(tmp_path / "nothing.txt")
