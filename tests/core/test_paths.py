"""Nothing half-written is ever left under a final name."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os

import pytest

from gossamer.core.errors import GossamerError
from gossamer.core.paths import atomic_dir, atomic_file, cache_dir, write_json


def test_the_old_folder_stays_until_the_new_one_is_whole(tmp_path):
    final = tmp_path / "model"
    with atomic_dir(final) as path:
        (path / "a").write_text("1")
    with pytest.raises(RuntimeError), atomic_dir(final) as path:
        (path / "a").write_text("2")
        raise RuntimeError("killed")
    assert (final / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with atomic_dir(final) as path:
        (path / "b").write_text("3")
    assert [p.name for p in final.iterdir()] == ["b"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    final = tmp_path / "model"
    with (
        pytest.raises(GossamerError, match=r"model: must be possible, got No space.*nothing was left"),
        atomic_dir(final) as path,
    ):
        (path / "a").write_text("1")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_files_are_replaced_whole(tmp_path):
    final = tmp_path / "x.json"
    write_json(final, {"a": 1})
    with pytest.raises(GossamerError, match="No space"), atomic_file(final) as path:
        path.write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert json.loads(final.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def _write(folder: str, number: int) -> None:
    for _ in range(30):
        write_json(cache_dir() / "shared.json", {"rows": [number] * 2000})


def test_two_processes_on_one_file(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(str(tmp_path), number)) for number in (1, 2)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        path = tmp_path / "shared.json"
        if path.exists():
            assert len(set(json.loads(path.read_text())["rows"])) == 1
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
